"""The table of a card: its schema, what is refused about it, what its sizes may be."""

import json
import mmap
import runpy
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest

import lora
from lora.errors import ArgumentError, CardError, CardFileError
from lora.table import FORMAT_VERSION, MAX_ELEMENTS, offsets_of, one_batch, read_header, schema_of
from lora.testing.plugin import requirement

fuzz = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fuzz_child.py"))))
STORED = {
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bfloat16": pa.uint16(),
}


def read_back(card):
    """What pyarrow alone makes of a card's file."""
    return pa.ipc.open_file(pa.py_buffer(fuzz.file_bytes(card))).get_batch(0)


@requirement("R1.9", "R1.4")
@pytest.mark.parametrize("dtype", STORED)
def test_factors_are_stored_as_canonical_variable_shape_tensors(dtype):
    batch = read_back(fuzz.real_card(dtype))
    storage = pa.struct([("data", pa.list_(STORED[dtype])), ("shape", pa.list_(pa.int32(), 2))])
    assert batch.schema.names == ["module", "scaling", "A", "B"]
    assert batch.schema.types[:2] == [pa.string(), pa.float64()]
    assert not any(field.nullable for field in batch.schema)
    for name, dims in (("A", ["in", "rank"]), ("B", ["rank", "out"])):
        kind = batch.schema.field(name).type
        assert kind.extension_name == "arrow.variable_shape_tensor"
        assert kind.storage_type == storage
        assert f"dim_names=[{','.join(dims)}]" in str(kind)
        declared = schema_of(dtype).field(name).metadata
        assert declared[b"ARROW:extension:name"] == b"arrow.variable_shape_tensor"
        assert json.loads(declared[b"ARROW:extension:metadata"]) == {"dim_names": dims}


@requirement("R1.9", "R1.7")
def test_the_extension_is_in_the_file_as_text_and_bfloat16_is_declared():
    data = fuzz.file_bytes(fuzz.real_card("bfloat16"))
    for text in (
        b"arrow.variable_shape_tensor",
        b'{"dim_names":["in","rank"]}',
        b'{"dim_names":["rank","out"]}',
    ):
        assert text in data
    batch = read_back(fuzz.real_card("bfloat16"))
    assert batch.schema.metadata[b"lora.dtype"] == b"bfloat16"
    row = batch.column("A").storage.field("data")[0].values.to_numpy()
    assert row.dtype == np.uint16
    assert np.array_equal(
        row, fuzz.real_card("bfloat16").weights[fuzz.MODULES[0]].A.view(np.uint16).ravel()
    )


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
def test_more_elements_than_a_column_holds_are_refused_by_name():
    assert offsets_of([MAX_ELEMENTS - 1, 1], "here")[-1] == MAX_ELEMENTS == 2**31 - 1
    assert offsets_of([], "here").tolist() == [0]
    assert offsets_of([3, 4], "here").dtype == np.int32
    with pytest.raises(
        CardError,
        match=r"here: expected at most 2147483647 elements, found 2147483648; split the card",
    ):
        offsets_of([2**30, 2**30], "here")


@requirement("R1.9")
def test_a_card_too_large_for_a_column_is_refused_before_a_byte_of_it_is_copied(tmp_path):
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(2**32)  # a hole: reading it would take memory, mapping it takes none
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as zeros:
            a = np.frombuffer(zeros, np.float16).reshape(2**30, 2)
            b = np.zeros((2, 1), np.float16)
            card = lora.LoRACard("vast", 2, 1.0, (), {"m": lora.LowRank(a, b)})
            with pytest.raises(
                CardError,
                match=r"card 'vast': a factor column: expected at most 2147483647 elements",
            ):
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
        "lora.metadata": '{"description":"a card to be damaged","tags":["fuzz","größe"],"version":"1.2.3"}',
        "lora.base_model": "tiny",
        "lora.base_fingerprint": "0" * 64,
        "x-later": "kept",
        "x-more": "too",
    }


@requirement("R1.4", "R1.6")
def test_a_table_and_its_card_hold_the_same_values():
    for card in (
        fuzz.real_card(),
        fuzz.real_card("bfloat16"),
        lora.LoRACard("empty", 1, 1.0, (), {}),
    ):
        table = lora.card_to_table(card)
        table.validate(full=True)
        assert lora.table_to_card(table) == card
        assert all(lora.table_to_card(batch) == card for batch in table.to_batches())
        assert table.num_rows == len(card.weights)


@requirement("R1.12")
def test_a_header_counts_as_the_card_does():
    for card in (
        fuzz.real_card(),
        fuzz.real_card("bfloat16", rank=5),
        lora.LoRACard("empty", 1, 1.0, (), {}),
    ):
        header = read_header(one_batch(lora.card_to_table(card)))
        assert (header.num_params, header.nbytes, header.dtype) == (
            card.num_params,
            card.nbytes,
            card.dtype.name,
        )
        assert header.format_version == FORMAT_VERSION
        with pytest.raises(TypeError):
            header.modules["another"] = None


REFUSALS = {
    "an unknown column": "columns: expected",
    "columns in another order": "columns: expected",
    "no column scaling": "columns: expected",
    "module as large_string": "column 'module': expected string",
    "A of double": r"column 'A': expected struct<data: list<item: float>",
    'A as arrow.variable_shape_tensor {"dim_names":["in","rank"],"permutation":[1,0]}': "column 'A': .* permutation",
    "A as some.other ": "column 'A': expected .* found .*some.other",
    "a null module": "column 'module': expected no nulls",
    "a null scaling": "column 'scaling': expected no nulls",
    "a null factor": "column 'A': expected no nulls",
    "a null element": "column 'A': expected no nulls",
    "a null dimension": "column 'A': expected no nulls",
    "a module twice": "column 'module': expected each module once",
    "one rank in A, another in B": r"module 'layer.0.query': factor B: expected shape \(r, out\) with A's r = 2",
    "a shape smaller than its data": "column 'A': expected positive shapes, each as long as its data",
    "an empty factor": "column 'A': expected positive shapes",
    "a scaling of nan": "module 'layer.0.query': scaling: expected a finite number, found nan",
    "no name": "expected the key 'lora.name'",
    "format '2.0' of 3": "lora.format: expected major version 1, found 2.0; update lora-cards",
    "format '1.x' of 3": "lora.format: expected a version major.minor, found '1.x'",
    "dtype 'int8' of 4": "lora.dtype: expected one of float16, float32, float64, bfloat16, found 'int8'",
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


@requirement("R7.9", "R1.3")
@pytest.mark.parametrize("text", ['{"a":1,"a":2}', '{"b":{"a":1,"a":1}}', '{"b":[{"":0,"":0}]}'])
def test_a_key_that_occurs_twice_is_refused_at_any_depth(text):
    table = lora.card_to_table(fuzz.real_card())
    doubled = table.replace_schema_metadata(
        {**table.schema.metadata, b"lora.metadata": text.encode()}
    )
    with pytest.raises(
        CardFileError,
        match=r"lora.metadata: expected JSON, found a key occurs twice in \['a', 'a'\]|''",
    ):
        lora.table_to_card(doubled)


@pytest.fixture(scope="module")
def falsified():
    return dict(fuzz.false_files())


@requirement("R7.9", "R7.8", "R1.10")
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_the_file_the_place_and_the_rule(falsified, tmp_path, name):
    path = tmp_path / "false.lora.arrow"
    path.write_bytes(falsified[name])
    for read in (lora.load, lora.inspect):
        with pytest.raises(CardFileError, match=REFUSALS[name]) as caught:
            read(path)
        assert caught.value.where.startswith(f"{path}: ")


@requirement("R7.9")
def test_a_table_in_memory_is_checked_before_it_is_put_together():
    batch = fuzz.plain(fuzz.real_card())
    a = batch.column("A")
    offsets = pa.py_buffer(
        np.array([0, 2**30, 22, 36], np.int32)
    )  # far beyond the values, and back
    data = a.field("data")
    wild = pa.Array.from_buffers(data.type, 3, [None, offsets], children=[data.values])
    column = pa.Array.from_buffers(a.type, 3, [None], children=[wild, a.field("shape")])
    table = pa.Table.from_batches([batch.set_column(2, batch.schema.field("A"), column)])
    for wrong in (table, pa.concat_tables([table, table]), table.to_batches()[0]):
        with pytest.raises(CardFileError, match=r"card table: expected a valid Arrow batch"):
            lora.table_to_card(wrong)


@requirement("R7.9")
def test_a_table_promises_no_more_rows_than_its_bytes_can_hold():
    schema = pa.schema([(name, pa.null()) for name in ("module", "scaling", "A", "B")])
    with pytest.raises(
        CardFileError, match=r"expected rows that \d+ bytes can hold, found 100000 rows"
    ):
        lora.table_to_card(pa.table([pa.nulls(100_000)] * 4, schema=schema))


@requirement("R7.9")
def test_no_two_factors_share_bytes():
    card = fuzz.real_card()
    batch = fuzz.plain(card)
    square = fuzz.tensors([np.ones((2, 2), np.float32)] * 3)
    shared = batch.set_column(2, batch.schema.field("A"), square).set_column(
        3, batch.schema.field("B"), square
    )
    with pytest.raises(
        CardFileError, match=r"buffers: expected separate bytes for each, found two that overlap"
    ):
        lora.table_to_card(shared)
    apart = fuzz.arrow_bytes([shared])
    assert lora.table_to_card(pa.ipc.open_file(pa.py_buffer(apart)).get_batch(0)).rank == 2


@requirement("R1.10", "R7.9")
def test_an_extension_is_ours_or_none_wherever_the_table_comes_from():
    card = fuzz.real_card()
    table = lora.card_to_table(card)
    bare = pa.schema([pa.field(f.name, f.type) for f in table.schema], table.schema.metadata)
    assert lora.table_to_card(table.cast(bare)) == card
    assert lora.table_to_card(pa.ipc.open_stream(_stream(table)).read_all()) == card
    spaced = {
        "ARROW:extension:name": "arrow.variable_shape_tensor",
        "ARROW:extension:metadata": '{"dim_names": ["in", "rank"]}',
    }
    for declared, taken in (
        (spaced, True),
        ({**spaced, "ARROW:extension:metadata": '{"permutation":[1,0]}'}, False),
        ({**spaced, "ARROW:extension:metadata": "not JSON"}, False),
        ({**spaced, "ARROW:extension:name": "some.other"}, False),
    ):
        schema = table.schema.set(2, table.schema.field("A").with_metadata(declared))
        if taken:
            assert lora.table_to_card(pa.table(table.columns, schema=schema)) == card
        else:
            with pytest.raises(CardFileError, match=r"column 'A'"):
                lora.table_to_card(pa.table(table.columns, schema=schema))


def _stream(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@requirement("R1.6", "R7.9")
def test_values_that_are_not_aligned_are_copied_and_never_read_in_place():
    card = fuzz.real_card("float64")
    batch = fuzz.plain(card)
    column = batch.column("A")
    values = column.field("data").values
    raw = b"\0" + values.buffers()[1].to_pybytes()
    shifted = pa.Array.from_buffers(values.type, len(values), [None, pa.py_buffer(raw).slice(1)])
    data = pa.Array.from_buffers(
        column.field("data").type, 3, column.field("data").buffers()[:2], children=[shifted]
    )
    moved = pa.Array.from_buffers(column.type, 3, [None], children=[data, column.field("shape")])
    found = lora.table_to_card(batch.set_column(2, batch.schema.field("A"), moved))
    assert found == card
    assert all(pair.A.flags.aligned for pair in found.weights.values())


@requirement("R7.8")
def test_what_is_no_table_and_no_card_is_named_by_its_type():
    with pytest.raises(
        ArgumentError, match=r"card table: expected an Arrow table or record batch, found dict"
    ):
        lora.table_to_card({})
    with pytest.raises(ArgumentError, match=r"card: expected a LoRACard, found str"):
        lora.card_to_table("docs")


@requirement("R1.7", "R1.9")
def test_half_a_declared_dtype_is_not_taken_for_another():
    half = fuzz.plain(fuzz.real_card("float16"))
    renamed = half.replace_schema_metadata({**half.schema.metadata, b"lora.dtype": b"bfloat16"})
    with pytest.raises(
        CardFileError, match=r"column 'A': expected struct<data: list<item: uint16>"
    ):
        lora.table_to_card(renamed)
    assert lora.table_to_card(fuzz.plain(fuzz.real_card("bfloat16"))).dtype == ml_dtypes.bfloat16


@requirement("R7.9")
def test_lists_with_a_start_beyond_zero_and_slices_are_read_where_they_point():
    card = fuzz.real_card()
    table = lora.card_to_table(card).slice(1)
    found = lora.table_to_card(table)
    assert {name: found.weights[name] for name in fuzz.MODULES[1:]} == {
        name: card.weights[name] for name in fuzz.MODULES[1:]
    }
    a = [pair.A for pair in card.weights.values()]
    refound = lora.table_to_card(
        pa.ipc.open_file(fuzz.with_column(fuzz.plain(card), "A", fuzz.tensors(a))).get_batch(0)
    )
    assert set(refound.weights) == set(card.weights)
