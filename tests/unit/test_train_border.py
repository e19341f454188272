"""Training's border: pairs in every form, and odd input of every kind, right or refused by name."""

import math
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
import torch

from lora.errors import DataError, LoRAError
from lora.testing.plugin import requirement
from lora.training.data import SCHEMA, Pairs
from lora.training.online_adapter import LearningEvent, OnlineAdapter
from lora.training.train import LoRATrainer, Settings, evaluate
from tests.properties.test_r17_training import bits
from tests.properties.test_r17_training import toy_pairs as pairs
from tests.unit.test_completion import drawn
from tests.unit.test_train import DEFAULTS, engine

SETTINGS = Settings(**DEFAULTS)


def trainer(**options):
    return LoRATrainer(engine(), **{"rank": 2, "settings": SETTINGS} | options)


class WithoutRepr:
    """A value that can't be shown."""

    def __repr__(self):
        raise RuntimeError


ODD = {
    "none": None,
    "bool": True,
    "zero": 0,
    "minus": -1,
    "two": 2,
    "half": 0.5,
    "nan": math.nan,
    "infinity": -math.inf,
    "huge": 10**400,
    "complex": 1j,
    "numpy complex": np.complex64(0.5),
    "decimal": Decimal("0.5"),
    "fraction": Fraction(1, 2),
    "text": "x",
    "empty text": "",
    "blank text": " \u3000\u2028",
    "just over one": math.nextafter(1, 2),
    "just under zero": -1e-300,
    "lone surrogate": "\ud800",
    "nul": "a\0b",
    "bytes": b"ab",
    "list": [],
    "tuple": (1, "a"),
    "mapping": {"a": 1},
    "set": {"a"},
    "array": np.arange(3.0),
    "texts as an array": np.array(["a", "b"]),
    "tensor": torch.ones(2),
    "table": pa.table({"query": ["a"]}),
    "class": int,
    "function": math.sqrt,
    "object": object(),
    "without a repr": WithoutRepr(),
}


# The forms of pairs that are taken


def rows_as(form, rows, folder):
    table = pa.Table.from_pylist(rows)
    match form:
        case "mappings":
            return rows
        case "a generator":
            return (row for row in rows)
        case "a table":
            return table
        case "a table of large strings":
            kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.large_string()]
            return table.cast(pa.schema(list(zip(table.column_names, kinds, strict=True))))
        case "a record batch":
            return table.to_batches()[0]
        case _:
            path = folder / f"pairs.{form.rpartition('.')[2]}"
            Pairs.of(rows).save(path)
            return str(path) if form.startswith("the text") else path


FORMS = "mappings;a generator;a table;a table of large strings;a record batch;a path.jsonl"
FORMS += ";a path.parquet;a path.arrow;the text of a path.jsonl"


@requirement("R17.1")
@pytest.mark.parametrize("form", FORMS.split(";"))
def test_a_training_takes_pairs_in_every_form(form, tmp_path):
    rows = pairs().table.select(["query", "positive", "group"]).to_pylist()
    expected = bits(trainer().train(pairs(), name="x", max_steps=2))
    result = trainer().train(rows_as(form, rows, tmp_path), name="x", max_steps=2)
    assert bits(result) == expected


@requirement("R17.1")
def test_tuples_are_pairs_with_groups_and_negatives_of_their_own():
    texts = [(f"a{i} c{j}", f"b{i} d{j}", f"b{j} d{i}") for i in range(4) for j in range(4)]
    rows = [
        dict(zip(SCHEMA.names[:3], row, strict=True)) | {"quality": 1, "group": str(index)}
        for index, row in enumerate(texts)
    ]
    for width in (2, 3):
        full = [row | {"negative": row["negative"] if width == 3 else None} for row in rows]
        results = [
            bits(trainer().train(data, name="x", max_steps=2))
            for data in ([row[:width] for row in texts], [list(row[:width]) for row in texts], full)
        ]
        assert results[0] == results[1] == results[2]
    guard = [row[:2] for row in texts]
    assert OnlineAdapter(engine(), guard, rank=1).guard == Pairs.of(guard)
    assert evaluate(engine(), guard) == evaluate(engine(), Pairs.of(guard))


# What is no pair is refused


def is_utf8(text):
    return isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text)


RULES = {
    "query": lambda value: is_utf8(value) and value.strip() != "",
    "positive": lambda value: is_utf8(value) and value.strip() != "",
    "negative": lambda value: value is None or is_utf8(value),
    "quality": lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    ),
    "group": is_utf8,
}
"""What the values of a pair may be."""


@requirement("R17.1", "R21.5", "R7.8")
@pytest.mark.parametrize(("field", "kind"), [*product(RULES, ODD)])
def test_a_bad_value_in_a_row_is_refused_by_its_row_and_field(field, kind):
    value = ODD[kind]
    rows = [{"query": f"a{i}", "positive": f"b{i}", "group": f"{i}"} for i in range(8)]
    rows[5][field] = value
    if RULES[field](value):
        assert Pairs.of(rows).table.to_pylist()[5][field] == value
        trainer().train(rows, name="x", max_steps=1)
        return
    with pytest.raises(DataError, match=f"^pairs: row 5: {field}: expected") as caught:
        trainer().train(rows, name="x", max_steps=1)
    assert len(str(caught.value)) < 400


NO_ROWS = {str(row): row for row in [("a",), [*"abcd"], (), {"query": "a"}, {1: "a"}]}
for name in ("", "Query"):
    NO_ROWS[f"a column {name!r}"] = {"query": "q", "positive": "p", name: "a"}
NO_ROWS |= {kind: value for kind, value in ODD.items() if kind != "mapping"}


@requirement("R17.1", "R21.5", "R7.8")
@pytest.mark.parametrize("kind", NO_ROWS)
def test_what_is_no_row_is_refused_by_its_position(kind):
    rows = [("a0 c0", "b0 d0"), ("a1 c1", "b1 d1"), NO_ROWS[kind]]
    with pytest.raises(DataError, match=r"^pairs: row 2: ((query|positive): )?expected"):
        trainer().train(rows, name="x", max_steps=1)


@requirement("R17.1", "R7.8")
def test_tables_of_other_columns_and_types_are_refused():
    good = {"query": ["a0", "a1"], "positive": ["b0", "b1"]}
    for columns in (
        {"text": ["a"]},
        good | {"positive": [1, 2]},
        good | {"query": [None, "a"]},
        good | {"quality": [0.5, math.nan]},
        good | {"quality": [0.5, None]},
        good | {"group": pa.array([2**62, 1], pa.timestamp("ns"))},
        good | {"group": pa.array([2**62, 1], pa.timestamp("s"))},
        good | {"group": [["a"], ["b"]]},
        good | {"query": pa.array([b"\xff", b"a"]).view(pa.string())},
    ):
        for table in (pa.table(columns), pa.table(columns).to_batches()[0]):
            with pytest.raises(DataError, match=r"^pairs: (row|expected)"):
                trainer().train(table, name="x", max_steps=1)
    twice = pa.table([["a"], ["b"], ["c"]], names=["query", "positive", "query"])
    with pytest.raises(DataError, match="query"):
        trainer().train(twice, name="x", max_steps=1)


# Options of every kind


def learned(**options):
    return trainer().train(**{"pairs": pairs(), "name": "x", "max_steps": 1} | options)


def configured(**options):
    return trainer(settings=Settings(**DEFAULTS | options)).train(pairs(), name="x", max_steps=1)


def adapted(**options):
    fixed = {"guard": pairs(), "rank": 1}
    return OnlineAdapter(engine(), **fixed | options)


def answered(**options):
    event = LearningEvent(**{"query": "a0", "answer": "b0", "reward": 1.0} | options)
    return adapted(tolerance=1.0).process_learning_event(event)


def anchored(**options):
    start = trainer()
    return start.anchor(**{"card": start.initial, "pairs": pairs(), "examples": 2} | options)


OPTIONS = {
    learned: "pairs name metadata max_steps checkpoint progress start ewc",
    trainer: "rank alpha target_modules seed settings base_model",
    configured: " ".join(Settings.__dataclass_fields__),
    adapted: "guard name rank alpha target_modules step_size tolerance seed",
    answered: "query answer reward rouge entropy_change",
    anchored: "card pairs examples",
    pairs().split: "share seed",
}
"""What can be called, and its options."""

CALLS = {
    f"{entry.__name__}: {name}": lambda value, entry=entry, name=name: entry(**{name: value})
    for entry, names in OPTIONS.items()
    for name in names.split()
}
CALLS |= {
    "engine": LoRATrainer,
    "event": lambda value: adapted().process_learning_event(value),
    "λ": lambda value: learned(ewc=(anchored(), value)),
    "take": lambda value: pairs().take(value),
    "sample: size": lambda value: pairs().sample(value, 0),
    "sample: seed": lambda value: pairs().sample(2, value),
    "load": Pairs.load,
    "from_chat": Pairs.from_chat,
    "table": Pairs,
    "add": lambda value: pairs().add(value),
}


@requirement("R17.1", "R7.8")
@pytest.mark.parametrize("name", CALLS)
def test_an_option_of_an_odd_kind_works_or_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worked = 0
    for value in ODD.values():
        if name.endswith("progress") and callable(value):
            continue  # a function of other arguments raises what it raises
        with suppress(LoRAError):  # any other error fails the test
            CALLS[name](value)
            worked += 1
    assert worked <= len(ODD) / 2


# The bar


CHILD = """
import sys
from tests.unit.test_train import train
train(steps=3, name="odd [/b] name", progress={"own": lambda *_: None}.get(sys.argv[1]))
"""


@requirement("R17.10")
def test_the_trainer_itself_shows_a_bar_on_a_terminal_and_only_there(capfd):
    shown = drawn("default", program=("-c", CHILD), COLUMNS="100")
    for text in ("training odd [/b] name", "3/3", "loss", "\x1b["):
        assert text in shown
    assert drawn("own", program=("-c", CHILD)) == ""
    learned(max_steps=3)
    assert capfd.readouterr() == ("", "")
