"""R7: an error says where, what was expected and what was found; nothing is changed."""

import io
import json
import logging
import math
import os
import pickle
import re
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lora
from lora import factors as factors_module
from lora.arrow_format import offsets_of, one_batch, read_header
from lora.checks import integer
from lora.errors import (
    ArgumentError,
    CardError,
    CardFileError,
    ConflictError,
    LoRAError,
    ShapeError,
    TargetError,
    UnboundWarning,
)
from lora.models.encoder import EncoderConfig
from lora.targets import listed
from lora.testing.binding import PlainCard, PlainPair
from lora.testing.plugin import requirement
from lora.testing.reference import card_of
from lora.testing.strategies import features, json_values, metadata, names, plain_cards, ranks

shapes = st.tuples(features, features)


def plain_pair(shape, rank=1):
    return PlainPair(np.ones((shape[0], rank)), np.ones((rank, shape[1])), 1.0)


# Any implementation.


@requirement("R7.2", kind="refusal")
@given(
    modules=st.dictionaries(
        st.integers(0, 20).map("layer.{}.query".format), shapes, min_size=1, max_size=4
    ),
    rank=ranks,
    data=st.data(),
)
def test_a_card_binds_exactly_when_every_pair_fits_its_module(impl, modules, rank, data):
    """One that does not fit is enough, and so is one transposed, one side or as many elements."""

    def bound(pair_shapes):
        pairs = {name: plain_pair(shape, rank) for name, shape in pair_shapes.items()}
        return impl.bind(PlainCard("docs", rank, 1.0, ("query",), pairs, {}, {}), modules)

    assert bound(modules) == {name: name for name in modules}
    name = data.draw(st.sampled_from(sorted(modules)))
    rows, columns = modules[name]
    near = {(columns, rows), (rows, columns + 1), (rows + 1, columns), (rows * columns, 1)}
    for wrong in {*near, data.draw(shapes)} - {modules[name]}:
        with pytest.raises(Exception, match=r"."):
            bound({**modules, name: wrong})


@requirement("R7.2", kind="refusal")
@given(shape=shapes, rank=ranks, other=ranks)
def test_factors_that_disagree_in_rank_are_refused(impl, shape, rank, other):
    pair = PlainPair(np.ones((shape[0], rank)), np.ones((other, shape[1])), 1.0)
    card = PlainCard("docs", rank, 1.0, ("query",), {"query": pair}, {}, {})
    if rank == other:
        assert impl.bind(card, {"query": shape}) == {"query": "query"}
    else:
        with pytest.raises(Exception, match=r"."):
            impl.bind(card, {"query": shape})


bad_ranks = st.integers(max_value=0) | st.floats().filter(lambda x: not x.is_integer())
BAD_RANKS = [None, "2", "x", [], "", float("nan"), 2.5]
bad_alphas = st.floats(max_value=0.0) | st.integers(max_value=0)
BAD_ALPHAS = [None, float("nan"), float("inf"), -0.0, "x", [], "", 10**400]


@requirement("R7.6", kind="refusal")
@given(card=plain_cards(max_modules=0), rank=bad_ranks, alpha=bad_alphas)
def test_a_bad_rank_or_alpha_makes_no_card(impl, card, rank, alpha):
    wrong = [card._replace(rank=rank, alpha=alpha)]
    wrong += [card._replace(rank=bad) for bad in (rank, *BAD_RANKS)]
    wrong += [card._replace(alpha=bad) for bad in (alpha, *BAD_ALPHAS)]
    for each in wrong:
        with pytest.raises(Exception, match=r"."):
            impl.write_card(each)


def with_fields(data, **fields):
    """A card's file with other fields."""
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    changed = {f"lora.{key}".encode(): str(value).encode() for key, value in fields.items()}
    batch = batch.replace_schema_metadata({**batch.schema.metadata, **changed})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


BAD_RANK_TEXTS = ["", "x", "²", "2.5"]
BAD_ALPHA_TEXTS = ["", "x", "nan", "inf", "-inf", "NaN", "Infinity", "1e999"]


@requirement("R7.6", kind="refusal")
@given(card=plain_cards(), rank=bad_ranks, alpha=st.floats(max_value=0.0))
def test_a_file_with_a_bad_rank_or_alpha_is_refused(impl, card, rank, alpha):
    data = impl.write_card(card)
    assert impl.read_card(with_fields(data, rank=card.rank, alpha=repr(card.alpha)))[:4] == card[:4]
    wrong = [{"rank": bad} for bad in (rank, *BAD_RANK_TEXTS)]
    wrong += [{"alpha": bad} for bad in (alpha, *BAD_ALPHA_TEXTS)]
    for fields in wrong:
        with pytest.raises(Exception, match=r"."):
            impl.read_card(with_fields(data, **fields))


# This implementation.


def base_model(shape=(4, 4), count=2):
    model = nn.Sequential(*(nn.Linear(*shape) for _ in range(count)))
    return model.requires_grad_(requires_grad=False)


def card_for(pairs, name="docs", targets=None, alpha=2.0, **fields):
    weights = {module: lora.LowRank(*pair) for module, pair in pairs.items()}
    rank = max((pair.rank for pair in weights.values()), default=1)
    return lora.LoRACard(
        name, rank, alpha, tuple(weights) if targets is None else targets, weights, **fields
    )


ones = np.ones((4, 2), np.float32)
PAIR = lora.LowRank(ones, ones.T)
WEIGHTS = {"0": PAIR}


def docs(name="docs", rank=2, alpha=4.0, target_modules=("0",), weights=WEIGHTS, **fields):
    """A small card, some of its fields replaced."""
    return lora.LoRACard(name, rank, alpha, target_modules, weights, **fields)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)

    def texts(self, level=logging.NOTSET):
        return [record.getMessage() for record in self.records if record.levelno >= level]


@contextmanager
def logged():
    """What the manager logs meanwhile."""
    log, lines = logging.getLogger("lora.models.manager"), Lines()
    level = log.level
    log.addHandler(lines)
    log.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        log.removeHandler(lines)
        log.setLevel(level)


@requirement("R7.7", "R7.2")
@given(site=shapes, shape=shapes, rank=ranks)
def test_a_pair_that_does_not_fit_is_refused_by_name_and_nothing_is_changed(site, shape, rank):
    model = base_model(site)
    good = card_for({"0": plain_pair(site)}, "good")
    wrong = card_for({"1": plain_pair(shape, rank)}, "wrong")
    manager = lora.LoRAManager(model)
    manager.apply_card(good)
    before = manager.state
    if site == shape:
        assert type(lora.adapt(model, wrong)[1]).__name__ == "LoRALinear"
        assert manager.apply_card(wrong).bound == {"1": "1"}
        return
    for refused in (lambda: lora.adapt(model, wrong), lambda: manager.apply_card(wrong)):
        with pytest.raises(ShapeError, match=r"module '1'") as caught:
            refused()
        assert f"{site[0]} -> {site[1]}" in caught.value.expected
        assert f"{shape[0]} -> {shape[1]}" in caught.value.found
    assert manager.state is before


@requirement("R7.3")
@given(
    there=st.sets(st.sampled_from("012"), min_size=1),
    gone=st.sets(st.sampled_from(["9", "query", "x.0"]), min_size=1),
)
def test_targets_not_found_are_a_warning_and_the_rest_is_injected_unless_strict(there, gone):
    model = base_model(count=3)
    card = card_for(
        {name: plain_pair((4, 4)) for name in sorted(there)},
        targets=(*sorted(gone), *sorted(there)),
    )
    strict, lenient = lora.LoRAManager(model), lora.LoRAManager(model)
    with pytest.raises(TargetError) as caught:
        strict.apply_card(card, strict=True)
    assert all(name in str(caught.value) for name in gone)
    assert strict.model is model
    with logged() as lines, pytest.warns(UnboundWarning) as warned:
        injection = lenient.apply_card(card)
    assert set(injection.bound) == set(lenient.injected) == there
    assert set(injection.targets_not_found) == gone
    for (warning,) in (lines.texts(logging.WARNING), [str(one.message) for one in warned]):
        assert all(name in warning for name in gone)


@requirement("R7.4")
@given(
    weight=st.sampled_from([1.0, 0.5, -2.0, 0.0]),
    other=st.sampled_from([1.0, 0.25]),
    alpha=st.sampled_from([1.0, 2.0]),
)
def test_applying_what_is_active_is_skipped_and_another_under_its_name_is_refused(
    weight, other, alpha
):
    manager = lora.LoRAManager(base_model())
    first = card_for({"0": plain_pair((4, 4))})
    second = card_for({"0": plain_pair((4, 4))}, alpha=alpha)
    report = manager.apply_card(first, weight=weight)
    before = manager.state
    with logged() as lines:
        if first == second and weight == other:
            assert manager.apply_card(second, weight=other) == report
            assert any("active already" in text for text in lines.texts())
        else:
            hint = "replace_card" if first != second else "set_weight"
            with pytest.raises(ConflictError, match=hint):
                manager.apply_card(second, weight=other)
    assert manager.state is before


@requirement("R7.5")
@given(active=st.lists(names, max_size=3, unique=True), unknown=names)
def test_removing_an_unknown_card_is_silent(active, unknown):
    assume(unknown not in active)
    manager = lora.LoRAManager(base_model())
    for name in active:
        manager.apply_card(card_for({"0": plain_pair((4, 4))}, name))
    before = manager.state
    with logged() as lines:
        assert manager.remove_card(unknown) is None
    assert manager.state is before
    assert lines.records == []


# Bad input by the built-in exception that a caller would guess: its strategy and the call.


def _nested(depth):
    value = 1
    for _ in range(depth):
        value = {"a": value}
    return value


huge = st.builds(lambda: 10**5000)  # an integer that has no repr
nothing = st.none()
no_text = nothing | st.integers() | st.binary() | st.lists(st.integers(), min_size=1) | huge
unprintable = st.text(st.characters(categories=("Cc", "Cf", "Cs", "Zl")), min_size=1)
no_number = (
    st.sampled_from([None, "1", "x", b"1", True, [], 1j, float("nan"), float("inf"), -float("inf")])
    | huge
)
no_path = nothing | st.integers() | st.binary() | st.floats() | huge
no_collection = nothing | st.integers() | st.floats() | huge
no_card = nothing | st.integers() | st.text() | st.just(nn.Linear(1, 1)) | huge
no_module = nothing | st.integers() | st.text() | st.builds(docs) | huge
no_texts = nothing | st.text() | st.integers() | st.lists(no_text, min_size=1) | huge
no_array = nothing | st.floats() | st.lists(st.floats()) | huge
bad_shape = st.sampled_from([(), (3,), (2, 3, 4), (0, 2), (2, 0), (0, 0)])
bad_dtype = st.sampled_from(
    ["int8", "int64", "bool", "complex64", "O", "S3", "U2", "M8[s]", "f4,f4", ">i2"]
)
garbage = st.binary(max_size=200) | st.binary(max_size=80).map(
    lambda data: b"ARROW1\0\0" + data + b"ARROW1"
)
digests = (
    st.sampled_from(["", "0" * 63, "0" * 65, "G" * 64, "A" * 64])
    | st.integers()
    | st.binary(min_size=64, max_size=64)
)
deep = st.integers(66, 5000).map(_nested)
no_json = st.one_of(
    st.dictionaries(
        st.text(),
        st.sampled_from([float("nan"), float("inf"), b"", {1}, 1j, object()]) | huge,
        min_size=1,
    ),
    st.dictionaries(st.integers() | st.booleans() | nothing, json_values, min_size=1),
    st.builds(lambda key, value: {"nested": [{key: value}]}, st.integers(), json_values),
    deep,
    st.just({"a": "\ud800"}),
    no_collection,
    st.text(),
    st.lists(json_values),
)


def _cyclic():
    value = {}
    value["itself"] = value
    return value


def in_folder(call):
    """The call with a path in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        call(Path(folder) / "card.lora.arrow")


def reading(read, data):
    """A file of these bytes, read."""

    def call(path):
        path.write_bytes(data)
        read(path)

    in_folder(call)


def piped(read):
    """A pipe, read."""

    def call(path):
        os.mkfifo(path)
        read(path)

    in_folder(call)


def verified(other):
    """A card's file, asked for by another digest."""

    def call(path):
        digest = lora.save(docs(), path)
        lora.load(path, verify=other if other != digest else "0" * 64)

    in_folder(call)


def one_card():
    return lora.AdapterSet(docs())


def embedding(texts):
    return np.array([[len(text), 1.0] for text in texts])


def router(embed=embedding):
    a_router = lora.LoRARouter(embed)
    a_router.register_virtual_candidate("here", "an example")
    return a_router


class Counting(nn.Module):
    """An encoder of texts that takes no time."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 2).requires_grad_(requires_grad=False)

    def encode(self, texts):
        return self.out(torch.tensor([[len(text), 1.0] for text in texts]).reshape(-1, 2))


def engine():
    return lora.ArrowEngine(Counting())


def managed():
    manager = lora.LoRAManager(base_model())
    manager.apply_card(docs())
    return manager


def patched():
    """A model with a Linear whose forward was replaced."""
    model = base_model()
    model[0].forward = lambda x: x
    return model


def from_config(config, folder):
    """The engine of a folder that has just this configuration."""
    (folder / "config.json").write_text(config)
    lora.ArrowEngine.from_pretrained(folder)


def described(name, description, **options):
    """A candidate of a router."""
    return router().register_virtual_candidate(name, description, **options)


def grouped_scores(count):
    """A score for each of that many groups."""
    return {str(i): [0.5] for i in range(count)}


def a_table(**columns):
    """A card's table with other columns."""
    table = lora.card_to_table(docs())
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


CARD_FIELDS = {
    "name": no_text | unprintable | st.just(""),
    "rank": bad_ranks | huge | st.booleans() | st.integers(3) | st.just(1),
    "alpha": bad_alphas | no_number,
    "target_modules": no_collection
    | st.binary(min_size=1)
    | st.lists(no_text | unprintable, min_size=1)
    | names.map(lambda name: [name, name]),
    "weights": no_collection
    | st.text()
    | st.lists(names)
    | st.dictionaries(st.integers() | nothing | unprintable, st.just(PAIR), min_size=1)
    | no_card.map(lambda bad: {"0": bad}),
    "metadata": no_json | st.builds(_cyclic),
    "extra": no_collection
    | st.lists(names, min_size=1)
    | st.dictionaries(names, no_text, min_size=1)
    | st.dictionaries(st.integers() | nothing, names, min_size=1)
    | st.sampled_from(["lora.name", "lora.rank", "lora.format"]).map(lambda key: {key: "x"}),
    "base_model": no_text.filter(bool) | unprintable,
    "base_fingerprint": digests,
}


def refusals(what, strategy, **calls):
    """Bad input by name: each call refuses every value of the strategy."""
    return {f"{name}: {what}": (strategy, call) for name, call in calls.items()}


other_shapes = shapes.filter(lambda shape: shape != (4, 4))
other_names = names.filter("docs".__ne__)
other_digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
reads = st.sampled_from([lora.load, lora.inspect, lora.digest])
VALUE_ERRORS = {
    f"LoRACard: bad {field}": (strategy, lambda bad, field=field: docs(**{field: bad}))
    for field, strategy in CARD_FIELDS.items()
}
VALUE_ERRORS |= refusals(
    "not a card",
    no_card,
    card_to_table=lora.card_to_table,
    table_to_card=lora.table_to_card,
    save=lambda bad: in_folder(lambda path: lora.save(bad, path)),
    fingerprint=lambda bad: lora.fingerprint(base_model(), bad),
    apply_card=lambda bad: managed().apply_card(bad),
    add_card=lambda bad: managed().add_card(bad),
    replace_card=lambda bad: managed().replace_card(bad),
    register_card=lambda bad: router().register_card(bad, "text"),
    register_lora=lambda bad: engine().register_lora(bad, "text"),
)
VALUE_ERRORS |= refusals(
    "not cards",
    no_collection,
    AdapterSet=lora.AdapterSet,
    adapt=lambda bad: lora.adapt(base_model(), bad),
    prepare=lambda bad: managed().prepare(bad),
)
VALUE_ERRORS |= refusals(
    "not a number",
    no_number,
    AdapterSet=lambda bad: lora.AdapterSet({"docs": (docs(), bad)}),
    product=lambda bad: one_card() * bad,
    interpolate=lambda bad: lora.interpolate(one_card(), one_card(), bad),
    apply_card=lambda bad: managed().apply_card(docs(name="law"), weight=bad),
    set_weight=lambda bad: managed().set_weight("docs", bad),
)
VALUE_ERRORS |= refusals(
    "not a path",
    no_path,
    save=lambda bad: lora.save(docs(), bad),
    load=lora.load,
    inspect=lora.inspect,
    digest=lora.digest,
)
VALUE_ERRORS |= refusals(
    "garbage",
    garbage,
    load=lambda bad: reading(lora.load, bad),
    inspect=lambda bad: reading(lora.inspect, bad),
)
VALUE_ERRORS |= refusals(
    "another shape",
    other_shapes,
    concat=lambda bad: factors_module.concat([(PAIR, 1.0), (lora.LowRank(*plain_pair(bad)), 1.0)]),
    adapt=lambda bad: lora.adapt(base_model(bad), docs()),
    LoRALinear=lambda bad: lora.LoRALinear(nn.Linear(*bad), {"docs": (PAIR, 1.0)}),
)
VALUE_ERRORS |= refusals(
    "another card of the same name",
    st.floats(5, 9),
    AdapterSet=lambda bad: lora.AdapterSet([docs(), docs(alpha=bad)]),
    union=lambda bad: one_card() | docs(alpha=bad),
    adapt=lambda bad: lora.adapt(lora.adapt(base_model(), docs()), docs(alpha=bad)),
    apply_card=lambda bad: managed().apply_card(docs(alpha=bad)),
)
VALUE_ERRORS |= refusals(
    "not texts",
    no_texts,
    select_many=lambda bad: router().select_many(bad),
    encode_with_lora=lambda bad: engine().encode_with_lora(bad, {}),
)
VALUE_ERRORS |= {
    "encode: not texts": (
        no_texts.filter(lambda bad: not isinstance(bad, str)),
        lambda bad: engine().encode(bad),
    ),
    # cards, pairs and sets
    "LoRACard: pairs of two dtypes": (
        st.permutations(["float16", "float32", "float64"]),
        lambda bad: card_for(
            {kind: (np.ones((2, 1), kind), np.ones((1, 2), kind)) for kind in bad}
        ),
    ),
    "LoRACard: two ranks without a scaling": (
        st.tuples(ranks, ranks).filter(lambda pair: pair[0] != pair[1]),
        lambda bad: card_for({str(rank): (np.ones((2, rank)), np.ones((rank, 2))) for rank in bad}),
    ),
    "FrozenJSON: not a JSON object": (no_json, lora.FrozenJSON),
    "LowRank: A is not an array": (no_array, lambda bad: lora.LowRank(bad, ones.T)),
    "LowRank: B is not an array": (no_array, lambda bad: lora.LowRank(ones, bad)),
    "LowRank: A is not a matrix": (bad_shape, lambda bad: lora.LowRank(np.ones(bad), ones.T)),
    "LowRank: bad dtype": (bad_dtype, lambda bad: lora.LowRank(np.zeros((4, 2), bad), ones.T)),
    "LowRank: two dtypes": (st.just("f8"), lambda bad: lora.LowRank(ones, ones.T.astype(bad))),
    "LowRank: two ranks": (st.integers(3, 9), lambda bad: lora.LowRank(ones, np.ones((bad, 4)))),
    "LowRank: scaling is not a number": (
        no_number.filter(lambda bad: bad is not None),
        lambda bad: lora.LowRank(ones, ones.T, bad),
    ),
    "apply: another width": (
        st.integers(0, 9).filter(lambda width: width != 4),
        lambda bad: factors_module.apply(np.ones((2, bad)), [(PAIR, 1.0)]),
    ),
    "concat: no pairs": (st.just([]), factors_module.concat),
    "AdapterSet: numbers": (st.lists(st.integers(), min_size=1), lora.AdapterSet),
    "AdapterSet: text": (st.text(min_size=1), lora.AdapterSet),
    "AdapterSet: another key": (other_names | nothing, lambda bad: lora.AdapterSet({bad: docs()})),
    "AdapterSet: triple": (no_card, lambda bad: lora.AdapterSet({"docs": (docs(), 1.0, bad)})),
    "union: another weight": (st.floats(2, 3), lambda bad: one_card() | {"docs": (docs(), bad)}),
    # tables and files
    "table_to_card: other columns": (
        st.dictionaries(names, st.lists(st.integers(0, 9), min_size=2, max_size=2)),
        lambda bad: lora.table_to_card(pa.table(bad)),
    ),
    "table_to_card: bad scaling": (
        st.sampled_from([[float("nan")], [float("inf")], [None], ["x"], [1]]),
        lambda bad: lora.table_to_card(a_table(scaling=pa.array(bad))),
    ),
    "load: malformed digest": (digests, lambda bad: lora.load("card.lora.arrow", verify=bad)),
    "load: digest of another file": (other_digests, verified),
    # models
    "adapt: another base model": (
        other_digests,
        lambda bad: lora.adapt(base_model(), docs(base_fingerprint=bad)),
    ),
    "LoRALinear: not terms": (
        no_card
        | st.just(PAIR)
        | no_number.map(lambda bad: (PAIR, bad if bad is not True else "x")),
        lambda bad: lora.LoRALinear(nn.Linear(4, 4), {"docs": bad}),
    ),
    # a router
    "LoRARouter: not a function": (no_card.filter(lambda bad: not callable(bad)), lora.LoRARouter),
    "register_card: no description": (st.builds(docs), lambda bad: router().register_card(bad)),
    "description: not text": (no_collection, lambda bad: described("docs", bad)),
    "description: empty list": (st.just([]), lambda bad: described("docs", bad)),
    "description: other values": (
        st.lists(no_text, min_size=1),
        lambda bad: described("docs", bad),
    ),
    "candidate name: not text": (no_text | st.just(""), lambda bad: described(bad, "text")),
    "tags: not texts": (
        no_collection | st.text(min_size=1) | st.lists(no_text, min_size=1),
        lambda bad: described("docs", "text", tags=bad),
    ),
    "embeddings: not finite": (
        st.sampled_from([float("nan"), float("inf")]),
        lambda bad: router(lambda texts: np.full((len(texts), 2), bad)),
    ),
    "embeddings: another shape": (
        st.sampled_from([(), (3,), (7, 2), (1, 2, 3), (0, 2)]),
        lambda bad: router(lambda _texts: np.ones(bad)),
    ),
    "select: query is not text": (no_text, lambda bad: router().select(bad)),
    "select: top_k is not an integer >= 1": (
        bad_ranks | st.booleans() | huge.map(lambda x: -x),
        lambda bad: router().select("x", bad),
    ),
    "select: threshold is not a number": (
        st.sampled_from(["x", "0.5", b"1", [], float("nan"), float("inf"), 1j]),
        lambda bad: router().select("x", 1, bad),
    ),
    # a threshold
    "calibrate: rate outside (0, 1)": (
        st.floats(max_value=0)
        | st.floats(min_value=1)
        | st.sampled_from([None, "x", float("nan"), [], 1j]),
        lambda bad: lora.calibrate(grouped_scores(99), bad),
    ),
    "calibrate: too few groups": (
        st.integers(0, 18),
        lambda bad: lora.calibrate(grouped_scores(bad), 0.05),
    ),
    "calibrate: not a mapping": (no_collection | st.lists(st.floats()), lora.calibrate),
    "calibrate: scores are not finite": (
        st.sampled_from([[], [float("nan")], [0.5, float("inf")], "x", ["x"], None, 0.5, [[0.5]]]),
        lambda bad: lora.calibrate({**grouped_scores(99), "bad": bad}, 0.05),
    ),
    # an engine
    "ArrowEngine: not an encoder": (no_module | st.just(nn.Linear(1, 1)), lora.ArrowEngine),
    "ArrowEngine: unknown device": (
        st.sampled_from(["nonsense", "cpu:x", ""]),
        lambda bad: lora.ArrowEngine(Counting(), device=bad),
    ),
    "from_pretrained: not a path": (no_path.filter(bool), lora.InferenceCore.from_pretrained),
    "encode_with_lora: not adapters": (
        st.integers() | st.floats() | huge,
        lambda bad: engine().encode_with_lora(["x"], bad),
    ),
    "encode_with_lora: adapters of other texts": (
        st.lists(st.just({}), max_size=4).filter(lambda sets: len(sets) != 2),
        lambda bad: engine().encode_with_lora(["x", "y"], bad),
    ),
    "encode_with_lora: adapters and an intent": (
        st.text(),
        lambda bad: engine().encode_with_lora(["x"], {}, intent_query=bad),
    ),
    "encode_with_lora: intent is not text": (
        no_text.filter(lambda bad: bad is not None),
        lambda bad: engine().encode_with_lora(["x"], intent_query=bad),
    ),
}
MISSING_FILES = refusals(
    "missing file",
    st.just(in_folder),
    load=lambda run: run(lora.load),
    inspect=lambda run: run(lora.inspect),
    digest=lambda run: run(lora.digest),
    save=lambda run: run(lambda path: lora.save(docs(), path / path.name)),
    load_card=lambda run: run(managed().load_card),
    from_pretrained=lambda run: run(lora.ArrowEngine.from_pretrained),
    load_lora=lambda run: run(engine().load_lora),
)
OS_ERRORS = {
    "save: path of a folder": (
        st.just(docs()),
        lambda bad: in_folder(lambda path: lora.save(bad, path.parent)),
    ),
    "save: folder is a file": (
        st.just("x"),
        lambda bad: in_folder(lambda path: (path.write_bytes(b""), lora.save(docs(), path / bad))),
    ),
    "load: impossible path": (st.sampled_from(["a\0b", "x" * 5000, "", "/", "."]), lora.load),
    "read: a folder": (reads, lambda read: in_folder(lambda path: read(path.parent))),
    "read: a pipe": (reads, piped),
    "read: a device": (reads, lambda read: read("/dev/zero")),
}
TYPE_ERRORS = refusals(
    "not a model",
    no_module,
    adapt=lambda bad: lora.adapt(bad, docs()),
    fold=lora.fold,
    uncalled=lora.uncalled,
    fingerprint=lambda bad: lora.fingerprint(bad, docs()),
    LoRAManager=lora.LoRAManager,
) | {
    "adapt: model with a replaced forward": (
        st.builds(patched),
        lambda bad: lora.adapt(bad, docs()),
    ),
    "LoRALinear: base is not a Linear": (
        no_module | st.just(nn.Conv1d(1, 1, 1)) | st.just(nn.Bilinear(1, 1, 1)),
        lora.LoRALinear,
    ),
    "from_pretrained: unsupported model type": (
        st.sampled_from(['{"model_type": "gpt2"}', '{"model_type": "t5"}', "{}"]),
        lambda bad: in_folder(lambda path: from_config(bad, path.parent)),
    ),
    "InferenceCore: unknown activation": (
        st.sampled_from(["swish", "", "GELU"]),
        lambda bad: lora.InferenceCore(EncoderConfig(9, 4, 1, 1, 4, 4, hidden_act=bad)),
    ),
}
LOOKUP_ERRORS = {
    "adapt: missing target (strict)": (
        st.sampled_from(["9", "query", "x.0"]),
        lambda bad: lora.adapt(base_model(), docs(target_modules=("0", bad)), strict=True),
    ),
    "adapt: weight fits two modules": (
        st.sampled_from(["0", "1"]),
        lambda bad: lora.adapt(
            nn.Sequential(base_model(), base_model()),
            docs(target_modules=(bad,), weights={bad: PAIR}),
        ),
    ),
}
KEY_ERRORS = refusals(
    "unknown name",
    other_names,
    replace_card=lambda bad: managed().replace_card(docs(name=bad)),
    set_weight=lambda bad: managed().set_weight(bad, 1.0),
    encode_with_lora=lambda bad: engine().encode_with_lora(["x"], bad),
    encode_with_weights=lambda bad: engine().encode_with_lora(["x"], {bad: 1.0}),
)
RUNTIME_ERRORS = {
    "swap: nothing prepared": (st.builds(managed), lambda bad: bad.swap()),
    "rollback: nothing earlier": (st.builds(managed), lambda bad: bad.rollback()),
}
BAD_INPUT = {
    name: (builtin, *case)
    for builtin, cases in (
        (ValueError, VALUE_ERRORS),
        (FileNotFoundError, MISSING_FILES),
        (OSError, OS_ERRORS),
        (TypeError, TYPE_ERRORS),
        (LookupError, LOOKUP_ERRORS),
        (KeyError, KEY_ERRORS),
        (RuntimeError, RUNTIME_ERRORS),
    )
    for name, case in cases.items()
}


@requirement("R7.8")
@pytest.mark.parametrize("named", BAD_INPUT)
@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(data=st.data())
def test_bad_input_is_an_error_that_says_where_what_was_expected_and_what_was_found(named, data):
    builtin, strategy, call = BAD_INPUT[named]
    bad = data.draw(strategy, label=named)
    with pytest.raises(LoRAError) as caught:
        call(bad)
    error = caught.value
    assert isinstance(error, builtin)
    for said in (error.where, error.expected, error.found):
        assert said
        assert said in str(error)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - what was just written
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@requirement("R7.9")
@given(card=plain_cards(max_modules=4), cuts=st.lists(st.integers(0, 4), max_size=3))
def test_a_table_in_chunks_or_slices_is_the_same_card(card, cuts):
    whole = card_of(card)
    table = lora.card_to_table(whole)
    bounds = [0, *sorted(min(cut, table.num_rows) for cut in cuts), table.num_rows]
    parts = [table.slice(start, stop - start) for start, stop in pairwise(bounds)]
    assert lora.table_to_card(pa.concat_tables(parts)) == whole
    for part in parts:
        if part.num_rows == 0 or _largest(part) == whole.rank:
            weights = {name: whole.weights[name] for name in part.column("module").to_pylist()}
            assert lora.table_to_card(part) == replace(whole, weights=weights)


def _largest(table):
    return max((row["shape"][1] for row in table.column("A").to_pylist()), default=0)


# ---- a table, part by part: what carries no meaning, and what may not be


def rebuilt(column, *, item="item", nullable=True, pad=0, before=0, raw=None, shapes=None):
    """A factor column of the same numbers with other items, start of values, bytes or shapes."""
    data, shape = column.field("data"), column.field("shape")
    kind, rows = data.type.value_type, len(column)
    if raw is None:
        junk = bytes(pad + before * (kind.bit_width // 8))
        raw = pa.py_buffer(junk + data.values.buffers()[1].to_pybytes()).slice(pad)
    values = pa.Array.from_buffers(kind, before + len(data.values), [None, raw])[before:]
    lists = pa.list_(pa.field(item, kind, nullable=nullable))
    sizes = pa.list_(pa.field(item, pa.int32(), nullable=nullable), 2)
    flat = shape.flatten() if shapes is None else pa.array(np.ravel(shapes).tolist(), pa.int32())
    named = [("data", lists), ("shape", sizes)]
    kind = pa.struct([pa.field(name, part, nullable=nullable) for name, part in named])
    children = [
        pa.Array.from_buffers(lists, rows, [None, data.buffers()[1]], children=[values]),
        pa.Array.from_buffers(sizes, rows, [None], children=[flat]),
    ]
    return pa.Array.from_buffers(kind, rows, [None], children=children)


def with_columns(batch, columns, *, nullable=False, declared=lambda metadata: metadata):
    """The batch with other columns, under their names and the same schema metadata."""
    columns = [columns.get(name, batch.column(name)) for name in batch.schema.names]
    fields = [
        pa.field(
            field.name,
            column.type,
            nullable=nullable,
            metadata=declared(field.metadata or {}) or None,
        )
        for field, column in zip(batch.schema, columns, strict=True)
    ]
    return pa.record_batch(columns, schema=pa.schema(fields, batch.schema.metadata))


def batch_of(card):
    return lora.card_to_table(card).to_batches()[0]


@requirement("R1.4", "R1.9")
@given(card=plain_cards())
def test_a_table_declares_four_columns_without_nulls_and_the_canonical_tensors(card):
    card = card_of(card)
    schema = lora.card_to_table(card).schema
    is_bfloat16 = card.dtype.name == "bfloat16"
    number = pa.uint16() if is_bfloat16 else pa.from_numpy_dtype(card.dtype)
    tensor = pa.struct([("data", pa.list_(number)), ("shape", pa.list_(pa.int32(), 2))])
    assert schema.names == ["module", "scaling", "A", "B"]
    assert schema.types == [pa.string(), pa.float64(), tensor, tensor]
    assert not any(field.nullable for field in schema)
    for name, dims in (("A", ["in", "rank"]), ("B", ["rank", "out"])):
        declared = schema.field(name).metadata
        assert declared[b"ARROW:extension:name"] == b"arrow.variable_shape_tensor"
        assert json.loads(declared[b"ARROW:extension:metadata"]) == {"dim_names": dims}
        assert len(declared) == 2


def spaced(metadata):
    """The same extension, its JSON written otherwise."""
    return {
        key: json.dumps(json.loads(value), indent=1).encode() if value.startswith(b"{") else value
        for key, value in metadata.items()
    }


@requirement("R1.9", "R1.6", "R7.9")
@given(card=plain_cards(max_modules=4), data=st.data())
def test_item_names_nullability_the_order_of_rows_and_where_values_start_carry_no_meaning(
    card, data
):
    assume(card.weights)
    card = card_of(card)
    batch = batch_of(card)
    nullable = data.draw(st.booleans())
    declared = data.draw(st.sampled_from([dict, spaced, lambda _: {}]))
    columns = {
        name: rebuilt(
            batch.column(name),
            item=data.draw(st.sampled_from(["item", "element", ""])),
            nullable=nullable,
            pad=data.draw(st.integers(0, 8)),
            before=data.draw(st.integers(0, 3)),
        )
        for name in data.draw(st.sets(st.sampled_from("AB")))
    }
    rewritten = with_columns(batch, columns, nullable=nullable, declared=declared)
    rows = data.draw(st.permutations(range(batch.num_rows)))
    for same in (
        rewritten,
        pa.Table.from_batches([rewritten]),
        rewritten.take(pa.array(rows, pa.int32())),
    ):
        loaded = lora.table_to_card(same)
        assert loaded == card
        assert all(
            factor.flags.aligned for pair in loaded.weights.values() for factor in (pair.A, pair.B)
        )
    for name in "AB":  # what is aligned is seen where it is, and not copied
        values = batch.column(name).field("data").values.buffers()[1]
        for pair in lora.table_to_card(batch).weights.values():
            start = getattr(pair, name).__array_interface__["data"][0]
            assert values.address <= start < values.address + values.size


@requirement("R7.9", "R1.9")
@given(card=plain_cards(dtype=np.dtype(np.float32)), data=st.data())
def test_an_extension_that_is_not_ours_and_names_that_are_not_ours_are_refused(card, data):
    assume(card.weights)
    batch, which = batch_of(card_of(card)), data.draw(st.sampled_from("AB"))
    name, parameters = b"ARROW:extension:name", b"ARROW:extension:metadata"
    wrong = data.draw(
        st.sampled_from(
            [
                {name: b"arrow.fixed_shape_tensor"},
                {parameters: b'{"permutation":[1,0]}'},
                {parameters: b'{"dim_names":["x","y"]}'},
                {parameters: b"no JSON"},
                {parameters: b"[" * 9999},
                {parameters: None},
                {parameters: b""},
            ]
        )
    )
    fields = [
        field.with_metadata({k: v for k, v in {**field.metadata, **wrong}.items() if v is not None})
        if field.name == which
        else field
        for field in batch.schema
    ]
    altered = pa.record_batch(batch.columns, schema=pa.schema(fields, batch.schema.metadata))
    with pytest.raises(CardFileError, match=f"column '{which}'"):
        lora.table_to_card(altered)


@requirement("R7.9")
@given(card=plain_cards(dtype=np.dtype(np.float32), max_modules=4), data=st.data())
def test_a_null_is_refused_at_any_depth_and_its_column_named(card, data):
    assume(card.weights)
    batch = batch_of(card_of(card))
    name = data.draw(st.sampled_from(batch.schema.names))
    row = data.draw(st.integers(0, batch.num_rows - 1))
    column = batch.column(name)
    rewritten = column.to_pylist()
    depth = data.draw(st.integers(0, 2)) if name in "AB" else 0
    if depth == 0:
        rewritten[row] = None
    else:
        part = data.draw(st.sampled_from(["data", "shape"]))
        if depth == 1:
            rewritten[row][part] = None
        else:
            rewritten[row][part][data.draw(st.integers(0, len(rewritten[row][part]) - 1))] = None
    altered = with_columns(batch, {name: pa.array(rewritten, column.type)}, nullable=True)
    with pytest.raises(CardFileError, match=f"column '{name}': expected no nulls"):
        lora.table_to_card(altered)


@requirement("R7.9")
@given(data=st.data(), rank=st.sampled_from([1, 4, 8]), sizes=st.tuples(features, features))
def test_shapes_are_positive_and_as_long_as_their_data_also_where_32_bits_would_overflow(
    data, rank, sizes
):
    f32 = np.float32
    pairs = {
        key: lora.LowRank(np.ones((sizes[0], rank), f32), np.ones((rank, sizes[1]), f32), 1.0)
        for key in "mn"
    }
    batch = batch_of(lora.LoRACard("docs", rank, 1.0, (), pairs))
    which = data.draw(st.sampled_from("AB"))
    true = {"A": (sizes[0], rank), "B": (rank, sizes[1])}
    free = 0 if which == "A" else 1  # the dimension that the other factor does not share
    shapes = {name: [list(true[name]) for _ in pairs] for name in "AB"}
    kinds = ["more", "less", "negative", *(["overflow"] if rank > 2 else [])]
    kind, row = data.draw(st.sampled_from(kinds)), data.draw(st.integers(0, 1))
    if kind == "negative":
        for name in "AB":
            shapes[name][row] = [-size for size in true[name]]
    else:
        shapes[which][row][free] += {"more": 1, "less": -1, "overflow": 2**32 // rank}[kind]
    for name in "AB":
        altered = with_columns(batch, {name: rebuilt(batch.column(name), shapes=[true[name]] * 2)})
        assert lora.table_to_card(altered).weights == pairs
    altered = with_columns(
        batch, {name: rebuilt(batch.column(name), shapes=shapes[name]) for name in "AB"}
    )
    named = "A" if kind == "negative" else which
    with pytest.raises(CardFileError, match=f"column '{named}': expected positive shapes"):
        lora.table_to_card(altered)


@requirement("R7.9")
@given(data=st.data(), rank=ranks, sizes=st.tuples(features, features))
def test_two_factors_may_touch_in_memory_and_not_share_a_byte(data, rank, sizes):
    rng, f32 = np.random.default_rng(data.draw(st.integers(0, 9))), np.float32
    a, b = (
        rng.integers(-3, 4, shape).astype(f32) for shape in ((sizes[0], rank), (rank, sizes[1]))
    )
    card = lora.LoRACard("docs", rank, 1.0, (), {"m": lora.LowRank(a, b, 1.0)})
    shared = data.draw(st.integers(0, min(a.nbytes, b.nbytes)) | st.sampled_from([0, 1]))
    whole = pa.py_buffer(
        a.tobytes() + bytes(b.nbytes - shared) if shared else a.tobytes() + b.tobytes()
    )
    parts = {"A": whole.slice(0, a.nbytes), "B": whole.slice(a.nbytes - shared, b.nbytes)}
    batch = batch_of(card)
    altered = with_columns(
        batch, {name: rebuilt(batch.column(name), raw=part) for name, part in parts.items()}
    )
    if shared == 0:
        assert lora.table_to_card(altered) == card
    else:
        with pytest.raises(CardFileError, match="buffers"):
            lora.table_to_card(altered)


@requirement("R7.9", "R1.12")
@given(card=plain_cards(max_modules=3), data=st.data())
def test_a_module_without_a_printable_name_or_a_finite_scaling_is_named_before_any_weight_is_read(
    card, data
):
    assume(card.weights)
    batch, row = batch_of(card_of(card)), data.draw(st.integers(0, len(card.weights) - 1))
    rewritten = {name: batch.column(name).to_pylist() for name in ("module", "scaling")}
    if data.draw(st.booleans()):
        rewritten["module"][row] = data.draw(
            st.text(st.characters(categories=("Cc", "Cf", "Zl")), min_size=1, max_size=9)
        )
    else:
        rewritten["scaling"][row] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    altered = with_columns(
        batch,
        {name: pa.array(values, batch.column(name).type) for name, values in rewritten.items()},
    )
    for read in (lora.table_to_card, lambda table: read_header(one_batch(table))):
        with pytest.raises(CardFileError) as caught:
            read(altered)
        assert f"module {rewritten['module'][row]!r}" in caught.value.where


@requirement("R7.9", "R1.8")
@given(scaling=st.sampled_from([0.0, -0.0]) | st.floats(), rank=ranks, other=ranks)
def test_a_pair_in_a_table_is_what_the_constructor_makes_of_it(scaling, rank, other):
    a, b = np.ones((3, rank)), np.ones((other, 2))
    batch, second = (
        batch_of(card_for({"m": (np.ones((3, size)), np.ones((size, 2)), 1.0)}))
        for size in (rank, other)
    )
    altered = with_columns(batch, {"B": second.column("B"), "scaling": pa.array([scaling])})
    try:
        expected = lora.LowRank(a, b, scaling)
    except CardError as error:
        with pytest.raises(CardFileError, match=re.escape(str(error)) + "$"):
            lora.table_to_card(altered)
    else:
        pair = lora.table_to_card(altered).weights["m"]
        assert pair == expected
        assert str(pair.scaling) == str(expected.scaling)  # never -0.0


@requirement("R7.9")
@given(data=st.data(), rows=st.integers(1, 99), modules=st.integers(2, 4), rank=ranks)
def test_a_table_holds_its_rows_and_its_offsets_lead_into_its_values(data, rows, modules, rank):
    bare = docs(rank=rank, weights={})
    schema = lora.card_to_table(bare).schema
    assert lora.table_to_card(schema.empty_table()) == bare
    for few in (pa.nulls(rows), pa.array([True] * rows)):
        small = pa.table([few] * 4, names=schema.names).replace_schema_metadata(schema.metadata)
        message = rf"expected rows that \d+ bytes can hold, found {rows} rows"
        with pytest.raises(CardFileError, match=message):
            lora.table_to_card(small)
    pairs = {
        str(index): (np.ones((index + 1, rank)), np.ones((rank, 2)), 1.0)
        for index in range(modules)
    }
    batch, which = batch_of(card_for(pairs)), data.draw(st.sampled_from("AB"))
    column = rebuilt(batch.column(which))
    lists = column.field("data")
    offsets = lists.offsets.to_numpy().copy()
    offsets[data.draw(st.integers(1, modules - 1))] = data.draw(
        st.sampled_from([2**30, -1, offsets[-1] + 1])
    )
    wild = pa.Array.from_buffers(
        lists.type, modules, [None, pa.py_buffer(offsets)], children=[lists.values]
    )
    altered = pa.Array.from_buffers(
        column.type, modules, [None], children=[wild, column.field("shape")]
    )
    with pytest.raises(CardFileError, match=r"^card table: expected a valid Arrow batch"):
        lora.table_to_card(with_columns(batch, {which: altered}))


def with_metadata(card, changes):
    """The card's table with other schema metadata; without what is None."""
    table = lora.card_to_table(card)
    loaded = {
        **table.schema.metadata,
        **{key.encode(): value and value.encode() for key, value in changes.items()},
    }
    return table.replace_schema_metadata(
        {key: value for key, value in loaded.items() if value is not None}
    )


digits = st.text("0123456789", max_size=7)
ODD = "1|1.0.0|+1.0| 1.0|1.0 |1.-0|1.99999|1.100000|000001.0|1.²|1.\u0661|01.0|1_0.0|1.1e1"
version_texts = st.one_of(
    st.builds("{}.{}".format, digits, digits),
    digits.map("1.".__add__),
    st.sampled_from(ODD.split("|")),
)


@requirement("R1.10", "R7.9")
@given(card=plain_cards(), text=version_texts)
def test_a_version_is_two_decimal_numbers_of_at_most_five_digits(card, text):
    major, dot, minor = text.partition(".")
    plain = all(part.isascii() and part.isdigit() and len(part) <= 5 for part in (major, minor))
    altered = with_metadata(card_of(card), {"lora.format": text})
    if dot and plain and int(major) == 1:
        assert lora.table_to_card(altered) == card_of(card)
        assert read_header(one_batch(altered)).format_version == (int(major), int(minor))
    else:
        with pytest.raises(CardFileError, match=r"lora\.format"):
            lora.table_to_card(altered)


SPOILT = " {}|{} |+{}|{}_0|{}\u0661|0x{}|{}x|{}.|.{}|{}.5.5|{}e99999||-|{}" + "0" * 41
"""Forms that make a number something else than a decimal number of JSON."""


@requirement("R7.6", "R7.9")
@given(
    card=plain_cards(max_modules=0),
    rank=st.integers(1, 2**31 - 1),
    alpha=st.floats(5e-324, 1.7e308),
    key=st.sampled_from(["rank", "alpha"]),
    spoilt=st.sampled_from(SPOILT.split("|")),
)
def test_numbers_in_a_file_are_decimal_as_in_json(card, rank, alpha, key, spoilt):
    card, good = card_of(card), {"lora.rank": str(rank), "lora.alpha": repr(alpha)}
    loaded = lora.table_to_card(with_metadata(card, good))
    assert (loaded.rank, loaded.alpha) == (rank, alpha)
    assert (type(loaded.rank), type(loaded.alpha)) == (int, float)
    with pytest.raises(CardFileError, match=rf"lora\.{key}: expected a number"):
        lora.table_to_card(with_metadata(card, {**good, f"lora.{key}": spoilt.format(rank)}))
    with pytest.raises(CardFileError, match=r"lora\.rank: expected a number"):
        lora.table_to_card(with_metadata(card, {**good, "lora.rank": f"{rank}.0"}))


@requirement("R7.9", "R1.3", "R1.4")
@given(
    card=plain_cards(max_modules=1),
    key=st.sampled_from(["name", "rank", "alpha", "targets", "dtype", "metadata", "format"]),
)
def test_each_of_the_seven_fields_must_be_there_and_is_named_if_it_is_not(card, key):
    card = card_of(card)
    bare = with_metadata(card, {"lora.base_model": None, "lora.base_fingerprint": None})
    assert lora.table_to_card(bare) == card
    with pytest.raises(CardFileError, match=rf"lora\.{key}"):
        lora.table_to_card(with_metadata(card, {f"lora.{key}": None}))


@requirement("R1.3", "R7.9")
@given(
    card=plain_cards(max_modules=1),
    rewritten=metadata,
    key=names,
    value=json_values,
    depth=st.integers(0, 3),
)
def test_json_in_a_file_is_of_its_kind_without_constants_of_its_own_or_a_key_twice(
    card, rewritten, key, value, depth
):
    card, item = card_of(card), f"{json.dumps(key)}:{json.dumps(value)}"
    nested = "[" * depth + "{%s}" + "]" * depth
    good = {"lora.metadata": json.dumps({**rewritten, "nested": json.loads(nested % item)})}
    assert dict(lora.table_to_card(with_metadata(card, good)).metadata) == json.loads(
        good["lora.metadata"]
    )
    wrong = [
        nested % f"{item},{item}",
        nested % f'"x":{"NaN" if depth else "-Infinity"}',
        nested % "no JSON",
        "[" * 9999,
    ]
    for text in wrong:
        with pytest.raises(CardFileError, match=r"lora\.metadata: expected JSON"):
            lora.table_to_card(with_metadata(card, {"lora.metadata": f'{{"nested":{text}}}'}))
    for field, other in (
        ("metadata", json.dumps([key])),
        ("targets", json.dumps({key: 1})),
        ("targets", json.dumps(key)),
    ):
        with pytest.raises(CardFileError, match=rf"lora\.{field}: expected a JSON"):
            lora.table_to_card(with_metadata(card, {f"lora.{field}": other}))


@requirement("R1.9")
@given(
    sizes=st.lists(
        st.integers(0, 9) | st.sampled_from([2**30, 2**31 - 1, 2**31, 2**40]), max_size=4
    ),
    where=names,
)
def test_offsets_are_the_sums_of_sizes_as_far_as_32_bits_go(sizes, where):
    if sum(sizes) < 2**31:
        loaded = offsets_of(sizes, where)
        assert loaded.dtype == np.int32
        assert loaded.tolist() == [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    else:
        with pytest.raises(CardError) as caught:
            offsets_of(sizes, where)
        assert (caught.value.where, caught.value.found) == (where, str(sum(sizes)))


@requirement("R7.6", "R1.1")
@given(
    rank=st.integers(1, 2**31 - 1) | st.sampled_from([1, 2**31 - 1]),
    alpha=st.integers(1, 2**60) | st.fractions(Fraction(1, 99), 99) | st.floats(5e-324, 1.7e308),
    wide=st.sampled_from([int, np.int64, np.uint32]),
)
def test_a_rank_is_any_whole_number_and_an_alpha_any_positive_one_as_plain_numbers(
    rank, alpha, wide
):
    card = docs(rank=wide(rank), alpha=alpha, weights={})
    assert (card.rank, card.alpha) == (rank, float(alpha))
    assert (type(card.rank), type(card.alpha)) == (int, float)
    other_kinds = (float(rank), np.float64(rank), str(rank), None)
    for wrong in (True, False, 0, -rank, rank + 2**31, *other_kinds):
        message = f"rank: expected an integer >= 1 and <= {2**31 - 1}, found "
        with pytest.raises(CardError, match=message):
            docs(rank=wrong, weights={})
    texts = (str(alpha), b"1", bytearray(b"1"))
    for wrong in (True, False, 0, -0.0, -alpha, math.inf, math.nan, None, 10**400, *texts):
        with pytest.raises(CardError, match="alpha: expected a finite number"):
            docs(alpha=wrong, weights={})


@requirement("R7.8")
@given(
    value=st.integers(),
    least=st.none() | st.integers(-9, 9),
    gap=st.integers(1, 9),
    where=names,
    hint=names,
)
def test_an_integer_is_taken_from_the_least_on_and_no_bool_nor_text_nor_float_is_one(
    value, least, gap, where, hint
):
    wrong = [True, False, float(gap), np.float64(gap), str(gap), None]
    wrong += [] if least is None else [least - gap]
    for good in (value, np.int64(gap), *([] if least is None else [least])):
        if least is None or good >= least:
            loaded = integer(good, where, least)
            assert (type(loaded), loaded) == (int, good)
        else:
            wrong.append(good)
    for bad in wrong:
        with pytest.raises(ArgumentError) as caught:
            integer(bad, where, least, hint)
        error = caught.value
        assert (error.where, error.hint) == (where, hint)
        assert error.expected == ("an integer" if least is None else f"an integer >= {least}")
        with pytest.raises(ArgumentError, match=f"{re.escape(where)}.*$") as caught:
            integer(bad, where, least)
        assert caught.value.hint == ""


NAMED = {
    "rank": 0,
    "alpha": "x",
    "target_modules": ("a", "a"),
    "metadata": {"a": {1}},
    "extra": {"x": 1},
    "base_model": 1,
    "base_fingerprint": "x",
    "weights": [],
}
"""A value that each field of a card may not have."""


@requirement("R7.8", "R7.6")
@given(
    name=names,
    field=st.sampled_from(sorted(NAMED)),
    module=names,
    scaling=st.sampled_from([math.nan, "x"]),
)
def test_an_error_names_the_card_and_the_field_or_the_factor_that_is_wrong(
    name, field, module, scaling
):
    with pytest.raises(CardError) as caught:
        docs(name=name, **{field: NAMED[field]})
    assert caught.value.where == f"card {name!r}: {field}"
    with pytest.raises(CardError) as caught:
        docs(name=name, extra={"x": "\ud800"})
    assert caught.value.where == f"card {name!r}: extra"
    with pytest.raises(CardError, match=r"^metadata: "):
        lora.FrozenJSON({"a": [{1: 2}]})
    for which, factors in (
        ("A", (ones[0], ones.T)),
        ("B", (ones, ones[0])),
        ("B", (ones, ones)),
        ("B", (ones, ones.T + 1j)),
    ):
        with pytest.raises(CardError, match=f"^factor {which}: "):
            lora.LowRank(*factors)
    for wrong in ([[1.0]], None, 1.0):
        with pytest.raises(CardError, match=f"found {type(wrong).__name__}$"):
            lora.LowRank(wrong, ones)
    with pytest.raises(CardError, match=r"^scaling: "):
        lora.LowRank(ones, ones.T, scaling)
    weights = {module: PAIR, f"{module}.x": lora.LowRank(ones[:, :1], ones.T[:1])}
    with pytest.raises(CardError) as caught:
        docs(name=name, weights=weights)
    assert caught.value.where == f"card {name!r}: module {module + '.x'!r}"
    with pytest.raises(lora.LoRAError) as caught:
        lora.AdapterSet({name: (docs(name=name), scaling)})
    assert caught.value.where == f"weight of {name!r}"


@requirement("R7.3")
@given(known=st.lists(names, max_size=14), limit=st.integers(1, 12))
def test_the_first_of_many_names_are_listed_and_the_others_are_counted(known, limit):
    first = ", ".join(map(repr, known[:limit])) or "none"
    others = len(known[limit:])
    assert listed(known, limit) == (f"{first} and {others} more" if others else first)


@requirement("R7.8")
@given(name=st.sampled_from(["q", "layer.0.q"]), half=st.integers(0xD800, 0xDFFF).map(chr))
def test_weights_whose_name_holds_half_of_a_surrogate_pair_are_not_extracted(name, half):
    base = {f"{name}{half}.weight": np.ones((2, 2), np.float32)}
    tuned = {key: weight + 1 for key, weight in base.items()}
    with pytest.raises(CardError, match="expected a printable name"):
        lora.extract_delta(base, tuned, 1)
