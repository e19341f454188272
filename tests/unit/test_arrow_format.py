"""The table of a card: its schema, what is refused about it, what its sizes may be."""

import mmap
import runpy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

import lora
from lora import arrow_format
from lora.arrow_format import FORMAT_VERSION, offsets_of, one_batch, read_header, table_to_card
from lora.errors import CardError, CardFileError
from lora.testing.plugin import requirement

fuzz = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fuzz_child.py"))))


def read_back(card):
    """What pyarrow alone makes of a card's file."""
    return pa.ipc.open_file(pa.py_buffer(fuzz.file_bytes(card))).get_batch(0)


@requirement("R1.9", "R1.7")
def test_the_extension_is_in_the_file_as_text_and_bfloat16_is_declared():
    data = fuzz.file_bytes(fuzz.real_card("bfloat16"))
    names = b'{"dim_names":["in","rank"]}', b'{"dim_names":["rank","out"]}'
    for text in (b"arrow.variable_shape_tensor", *names):
        assert text in data
    batch = read_back(fuzz.real_card("bfloat16"))
    assert batch.schema.metadata[b"lora.dtype"] == b"bfloat16"
    row = batch.column("A").storage.field("data")[0].values.to_numpy()
    assert row.dtype == np.uint16
    factor = fuzz.real_card("bfloat16").weights[fuzz.MODULES[0]].A
    assert np.array_equal(row, factor.view(np.uint16).ravel())


@requirement("R1.9")
def test_any_arrow_reader_finds_each_factor_in_its_row():
    card = fuzz.real_card("float64")
    batch = read_back(card)
    assert batch.column("module").to_pylist() == sorted(card.weights)
    for name in ("A", "B"):
        storage = batch.column(name).storage
        for row, pair in zip(storage, card.weights.values(), strict=True):
            factor, shape = getattr(pair, name), row["shape"].as_py()
            assert tuple(shape) == factor.shape
            values = row["data"].values.to_numpy().reshape(shape)
            assert np.array_equal(values.view(np.uint64), factor.view(np.uint64))


@requirement("R1.9")
def test_a_card_too_large_for_a_column_is_refused_before_a_byte_of_it_is_copied(tmp_path):
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(2**32)  # a hole: reading it would take memory, mapping it takes none
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as zeros:
            a = np.frombuffer(zeros, np.float16).reshape(2**30, 2)
            b = np.zeros((2, 1), np.float16)
            card = lora.LoRACard("vast", 2, 1.0, (), {"m": lora.LowRank(a, b)})
            expected = r"card 'vast': .*: expected at most 2147483647 .*; split the card"
            with pytest.raises(CardError, match=expected):
                lora.card_to_table(card)
            del a, card


@requirement("R1.4", "R1.10")
def test_the_schema_metadata_is_readable_text():
    fields = lora.card_to_table(fuzz.real_card()).schema.metadata
    assert {key.decode(): value.decode() for key, value in fields.items()} == {
        "lora.format": ".".join(map(str, FORMAT_VERSION)),
        "lora.name": "docs",
        "lora.rank": "2",
        "lora.alpha": "16.0",
        "lora.targets": '["query","value"]',
        "lora.dtype": "float32",
        "lora.metadata": '{"description":"a card to be damaged","tags":["fuzz","größe"],'
        '"version":"1.2.3"}',
        "lora.base_model": "tiny",
        "lora.base_fingerprint": "0" * 64,
        "x-later": "kept",
        "x-more": "too",
    }


PERMUTED = 'A as arrow.variable_shape_tensor {"dim_names":["in","rank"],"permutation":[1,0]}'
REFUSALS = {
    "an unknown column": "columns: expected",
    "columns in another order": "columns: expected",
    "no column scaling": "columns: expected",
    "module as large_string": "column 'module': expected string",
    "A of double": r"column 'A': expected struct<data: list<item: float>",
    PERMUTED: "column 'A': .* permutation",
    "A as some.other ": "column 'A': expected .* found .*some.other",
    "a null module": "column 'module': expected no nulls",
    "a null scaling": "column 'scaling': expected no nulls",
    "a null factor": "column 'A': expected no nulls",
    "a null element": "column 'A': expected no nulls",
    "a null dimension": "column 'A': expected no nulls",
    "a module twice": "column 'module': expected each module once",
    "one rank in A, another in B": r"module 'layer.0.query': factor B: .* with A's r = 2",
    "a shape smaller than its data": "column 'A': expected positive shapes, each as long as",
    "an empty factor": "column 'A': expected positive shapes",
    "a scaling of nan": "module 'layer.0.query': scaling: expected a finite number, found nan",
    "no name": "expected the key 'lora.name'",
    "format '2.0' of 3": "lora.format: expected major version 1, found 2.0; update lora-cards",
    "format '1.x' of 3": "lora.format: expected a version major.minor, found '1.x'",
    "dtype 'int8' of 4": "lora.dtype: expected one of float16, .* bfloat16, found 'int8'",
    "name '' of 0": "card name: expected non-empty printable text, found ''",
    "rank '-1' of 2": "rank: expected an integer >= 1 .*, found -1",
    "rank '3' of 1": "rank: expected the largest rank of its modules, 2, found 3",
    "rank '2.0' of 3": "lora.rank: expected a number",
    "alpha '0' of 1": "alpha: expected a finite number > 0, found 0",
    "alpha 'nan' of 3": "lora.alpha: expected a number",
    "targets '[1]' of 3": r"target_modules: expected printable names, found \(1,\)",
    "targets '{}' of 2": "lora.targets: expected a JSON array, found {}",
    """metadata '{"a":NaN}' of 9""": "lora.metadata: expected JSON, found NaN is not JSON",
    "metadata '[]' of 2": r"lora.metadata: expected a JSON object, found \[\]",
    "a name that is not UTF-8": "schema: expected UTF-8 text",
}


@pytest.fixture(scope="module")
def falsified():
    return dict(fuzz.false_files())


@requirement("R7.2", "R7.9", "R7.8", "R1.10", "R1.2")
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_the_file_the_place_and_the_rule(falsified, tmp_path, name):
    path = tmp_path / "false.lora.arrow"
    path.write_bytes(falsified[name])
    for read in (lora.load, lora.inspect):
        with pytest.raises(CardFileError, match=REFUSALS[name]) as caught:
            read(path)
        assert caught.value.where.startswith(f"{path}: ")


@requirement("R7.9")
@pytest.mark.parametrize("place", [0, 31, 63])
def test_a_digest_that_differs_in_one_place_is_another(tmp_path, place):
    digest = lora.save(fuzz.real_card("float32"), tmp_path / "docs.lora.arrow")
    other = "1" if digest[place] == "0" else "0"
    with pytest.raises(CardFileError, match="SHA-256"):
        lora.load(tmp_path / "docs.lora.arrow", f"{digest[:place]}{other}{digest[place + 1 :]}")


@requirement("R7.9")
def test_a_file_that_changes_after_its_check_gives_the_checked_card(monkeypatch):
    card, make, check, stored = fuzz.real_card("float32"), offsets_of, pairwise, []
    monkeypatch.setattr(
        arrow_format, "offsets_of", lambda *sizes: stored.append(make(*sizes)) or stored[-1]
    )
    (batch,) = lora.card_to_table(card).to_batches()

    def checked(numbers):
        if not isinstance(numbers[0], tuple):  # offsets, which are about to be checked
            stored[0].fill(0)
        return check(numbers)

    monkeypatch.setattr(arrow_format, "pairwise", checked)
    assert table_to_card(batch).weights["layer.0.query"] == card.weights["layer.0.query"]


@requirement("R1.12")
def test_a_header_has_the_format_and_can_not_be_changed():
    header = read_header(one_batch(lora.card_to_table(fuzz.real_card("bfloat16"))))
    assert (header.format_version, header.dtype) == (FORMAT_VERSION, "bfloat16")
    with pytest.raises(TypeError):
        header.modules["another"] = None
