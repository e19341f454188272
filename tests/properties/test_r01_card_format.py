"""R1: a card is a value; its file contains the whole value, and reading gives it back."""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import re
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

import lora
from lora.errors import BaseModelError, CardError, CardFileError, LoRAError
from lora.testing.binding import PlainCard, PlainPair
from lora.testing.plugin import requirement
from lora.testing.reference import card_of
from lora.testing.strategies import (
    ALIKE,
    bits,
    dtypes,
    extras,
    features,
    free_text,
    json_values,
    laid_out,
    metadata,
    names,
    orders,
    plain_cards,
    ranks,
    scalings,
)

UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
OWN = ["name", "rank", "alpha", "target_modules", "targets", "extra"]
OWN += [f"lora.{name}" for name in OWN]


def same_bits(a, b):
    """One shape, one dtype, and the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return np.array_equal(a.view(UNSIGNED[a.dtype.itemsize]), b.view(UNSIGNED[b.dtype.itemsize]))


def the_arrow_file(data):
    """What Arrow itself makes of a card's bytes: its one batch."""
    reader = pa.ipc.open_file(pa.py_buffer(data))
    assert reader.num_record_batches == 1
    return reader.get_batch(0)


def written_again(batch, *, schema_metadata=None, with_column=None):
    """A card's file with other schema metadata or one column more."""
    if with_column is not None:
        batch = batch.append_column(with_column, pa.nulls(batch.num_rows, pa.int32()))
    changed = {key.encode(): value.encode() for key, value in (schema_metadata or {}).items()}
    batch = batch.replace_schema_metadata({**batch.schema.metadata, **changed})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


@requirement("R1.1", kind="format")
@given(card=plain_cards())
def test_name_rank_alpha_and_targets_come_back(impl, card):
    loaded = impl.read_card(impl.write_card(card))
    assert (loaded.name, loaded.rank, loaded.alpha, tuple(loaded.target_modules)) == card[:4]


@requirement("R1.2", kind="format")
@given(card=plain_cards(max_modules=5))
def test_every_module_has_its_own_pair_and_no_other_module_has_one(impl, card):
    loaded = impl.read_card(impl.write_card(card)).weights
    assert set(loaded) == set(card.weights)
    for module, pair in card.weights.items():
        assert same_bits(loaded[module].A, pair.A)
        assert same_bits(loaded[module].B, pair.B)


@requirement("R1.3", kind="format")
@given(
    card=plain_cards(),
    shadows=st.dictionaries(st.sampled_from(OWN), json_values, min_size=1),
    more=metadata,
)
@example(
    card=PlainCard("docs", 1, 1.0, (), {}, {}, {}),
    shadows={"name": "a\r\nb\rc\x00d", "rank": "x" * 70_000},
    more={
        "wide": [sign * 2**width + 1 for sign in (1, -1) for width in (31, 32, 53, 63, 64)],
        "twice": ["b", "b", "a"],
    },
)
def test_metadata_comes_back(impl, card, shadows, more):
    asked = {**more, **shadows}
    loaded = impl.read_card(impl.write_card(card._replace(metadata=asked)))
    assert loaded.metadata == asked
    assert _told_apart(loaded.metadata) == _told_apart(asked)


@requirement("R1.3", kind="format")
@given(
    card=plain_cards(),
    shadows=st.dictionaries(st.sampled_from(OWN), json_values, min_size=1),
)
def test_metadata_shadow_no_field(impl, card, shadows):
    loaded = impl.read_card(impl.write_card(card._replace(metadata=shadows)))
    bare = impl.read_card(impl.write_card(card._replace(metadata={})))
    assert loaded[:4] == bare[:4]
    assert loaded.extra == bare.extra


def _told_apart(value):
    """A JSON value in which True is not 1; 1 and 1.0 are one number of JSON."""
    if isinstance(value, dict):
        return {key: _told_apart(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_told_apart(inner) for inner in value]
    return (value,) if isinstance(value, bool) else value


def nested(levels):
    """A JSON object of so many levels."""
    value = []
    for _ in range(levels - 2):
        value = [value]
    return {"in": value}


no_json = st.one_of(
    st.sampled_from([float("nan"), float("inf"), -float("inf"), "\ud800", b"text", {1, 2}]),
    st.sampled_from([{"\udfff": 1}, {1: "one"}]),
    st.integers(64, 80).map(nested),
)
"""What no JSON object of at most 64 levels holds at its second level."""


@requirement("R1.3", kind="refusal")
@given(card=plain_cards(max_modules=1), wrong=no_json, metadata=metadata)
def test_metadata_that_are_no_json_or_too_deep_make_no_card(impl, card, wrong, metadata):
    deepest = card._replace(metadata=nested(64))
    assert impl.read_card(impl.write_card(deepest)).metadata == deepest.metadata
    with pytest.raises(Exception, match=r"."):
        impl.write_card(card._replace(metadata={**metadata, "wrong": wrong}))


@requirement("R1.3", kind="refusal")
@given(
    card=plain_cards(max_modules=1),
    text=st.sampled_from(["", "[]", '"text"', "{", '{"a": NaN}', '{"a": -Infinity}', "{'a': 1}"]),
)
def test_a_file_whose_metadata_are_no_json_object_is_refused(impl, card, text):
    batch = the_arrow_file(impl.write_card(card))
    with pytest.raises(Exception, match=r"."):
        impl.read_card(written_again(batch, schema_metadata={"lora.metadata": text}))


@requirement("R1.4", kind="format")
@given(card=plain_cards())
def test_the_schema_metadata_of_the_arrow_file_carries_the_fields(impl, card):
    batch = the_arrow_file(impl.write_card(card))
    fields = {key.decode(): value.decode() for key, value in batch.schema.metadata.items()}
    assert fields["lora.name"] == card.name
    assert int(fields["lora.rank"]) == card.rank
    assert float(fields["lora.alpha"]) == card.alpha
    assert tuple(json.loads(fields["lora.targets"])) == card.target_modules
    assert json.loads(fields["lora.metadata"]) == card.metadata
    assert set(batch.column("module").to_pylist()) == set(card.weights)
    assert len(batch) == len(card.weights)


@requirement("R1.9", kind="format")
@given(card=plain_cards())
def test_factors_are_declared_as_canonical_tensors_whose_dimensions_have_names(impl, card):
    """Arrow tells them in the text of a type that it knows, and in metadata of one it does not."""
    schema = the_arrow_file(impl.write_card(card)).schema
    for name, dimensions in (("A", "in,rank"), ("B", "rank,out")):
        field = schema.field(name)
        told = re.sub(r'["\s]', "", f"{field.type} {field.metadata}")
        assert "arrow.variable_shape_tensor" in told
        assert re.search(rf"dim_names[=:]\[{dimensions}\]", told)


@requirement("R1.4", kind="format")
@given(card=plain_cards())
def test_the_bytes_are_an_arrow_file_and_not_a_stream(impl, card):
    data = impl.write_card(card)
    assert data[:6] == data[-6:] == b"ARROW1"
    with pytest.raises(pa.ArrowException):
        pa.ipc.open_stream(data).read_all()


@requirement("R1.7", kind="format")
@given(data=st.data(), dtype=dtypes, shape=st.tuples(features, ranks, features))
def test_factors_of_any_bits_come_back_bit_for_bit(impl, data, dtype, shape):
    rows, rank, columns = shape
    a, b = data.draw(bits(dtype, (rows, rank))), data.draw(bits(dtype, (rank, columns)))
    card = PlainCard("docs", rank, 1.0, (), {"m": PlainPair(a, b)}, {}, {})
    loaded = impl.read_card(impl.write_card(card)).weights["m"]
    assert loaded.A.dtype == loaded.B.dtype == dtype
    assert same_bits(loaded.A, a)
    assert same_bits(loaded.B, b)


@requirement("R1.7", kind="format")
@given(dtype=dtypes, payload=st.integers(1, 2**6 - 1))  # all the bits that bfloat16 has
def test_a_signalling_nan_does_not_become_a_quiet_one(impl, dtype, payload):
    """It does where a factor passes through any arithmetic."""
    infinity = int(np.array(np.inf, dtype).view(UNSIGNED[dtype.itemsize]))
    factor = np.full((1, 1), infinity + payload, UNSIGNED[dtype.itemsize]).view(dtype)
    card = PlainCard("docs", 1, 1.0, (), {"m": PlainPair(factor, factor)}, {}, {})
    loaded = impl.read_card(impl.write_card(card)).weights["m"]
    assert same_bits(loaded.A, factor)
    assert same_bits(loaded.B, factor)


@requirement("R1.7", kind="refusal")
@given(dtype=dtypes, other=dtypes, rank=ranks, apart=st.booleans())
def test_a_card_of_two_dtypes_is_refused(impl, dtype, other, rank, apart):
    first = PlainPair(np.ones((2, rank), dtype), np.ones((rank, 3), dtype))
    second = PlainPair(np.ones((2, rank), other), np.ones((rank, 3), other))
    mixed = {"a": first, "b": second} if apart else {"a": PlainPair(first.A, second.B)}
    card = PlainCard("docs", rank, 1.0, (), mixed, {}, {})
    if dtype == other:
        assert impl.read_card(impl.write_card(card)).weights["a"].A.dtype == dtype
    else:
        with pytest.raises(Exception, match=r"."):
            impl.write_card(card)


@requirement("R1.8", kind="format")
@given(card=plain_cards())
def test_every_module_has_a_scaling_in_the_file_and_out_of_it(impl, card):
    data = impl.write_card(card)
    batch, loaded = the_arrow_file(data), impl.read_card(data)
    stored = {row["module"]: row["scaling"] for row in batch.to_pylist()}
    for module, pair in card.weights.items():
        expected = card.alpha / card.rank if pair.scaling is None else pair.scaling
        assert stored[module] == loaded.weights[module].scaling == expected


@requirement("R1.8", kind="refusal")
@given(
    ranked=st.lists(ranks, min_size=1, max_size=3),
    scaling=st.none() | scalings,
    rank=ranks,
    alpha=st.just(8.0),
)
def test_modules_differ_in_rank_only_with_a_scaling_and_the_card_has_the_largest(
    impl, ranked, scaling, rank, alpha
):
    weights = {
        f"m{i}": PlainPair(np.ones((2, r)), np.ones((r, 2)), scaling) for i, r in enumerate(ranked)
    }
    card = PlainCard("docs", rank, alpha, (), weights, {}, {})
    if rank == max(ranked) and (scaling is not None or set(ranked) == {rank}):
        loaded = impl.read_card(impl.write_card(card))
        assert loaded.rank == max(pair.A.shape[1] for pair in loaded.weights.values())
    else:
        with pytest.raises(Exception, match=r"."):
            impl.write_card(card)


versions = st.tuples(
    st.integers(0, 99_999) | st.sampled_from([2**8 + 1, 2**16 + 1, 2**32 + 1]),
    st.integers(0, 99_999),
)


@requirement("R1.10", kind="refusal")
@given(card=plain_cards(), version=versions)
def test_only_the_known_major_version_is_read(impl, card, version):
    major, minor = version
    batch = the_arrow_file(impl.write_card(card))
    known = int(batch.schema.metadata[b"lora.format"].split(b".")[0])
    data = written_again(batch, schema_metadata={"lora.format": f"{major}.{minor}"})
    if major == known:
        assert impl.read_card(data).name == card.name
    else:
        with pytest.raises(Exception, match=r"."):
            impl.read_card(data)


later_keys = extras | st.dictionaries(
    st.sampled_from(["lora.later", "lora.", "name", "", "pandas"]), names, max_size=3
)
"""What a later minor version, or another program, may have put into a file."""


@requirement("R1.10", kind="format")
@given(card=plain_cards(), minor=st.integers(0, 99), later=later_keys)
def test_unknown_keys_of_a_known_version_survive_a_round_trip(impl, card, minor, later):
    batch = the_arrow_file(impl.write_card(card))
    major = batch.schema.metadata[b"lora.format"].split(b".")[0].decode()
    data = written_again(batch, schema_metadata={**later, "lora.format": f"{major}.{minor}"})
    loaded = impl.read_card(data)
    assert loaded.extra == {**card.extra, **later}
    assert impl.read_card(impl.write_card(loaded)).extra == loaded.extra
    assert loaded[:4] == card[:4]


@requirement("R1.10", kind="refusal")
@given(card=plain_cards(), column=names)
def test_an_unknown_column_is_refused(impl, card, column):
    data = written_again(the_arrow_file(impl.write_card(card)), with_column=column)
    with pytest.raises(Exception, match=r"."):
        impl.read_card(data)


@requirement("R1.8", kind="format")
@given(card=plain_cards())
def test_a_scaling_is_fixed_once_and_read_from_a_second_file_as_from_the_first(impl, card):
    once = impl.read_card(impl.write_card(card))
    twice = impl.read_card(impl.write_card(once._replace(alpha=once.alpha / 2 or 1.0)))
    scalings = [{m: pair.scaling for m, pair in read.weights.items()} for read in (once, twice)]
    assert scalings[0] == scalings[1]


@requirement("R1.8", kind="refusal")
@given(card=plain_cards(), more=st.integers(-3, 3) | st.sampled_from([2**16, 2**32, 2**64]))
def test_a_file_that_does_not_state_the_largest_rank_of_its_modules_is_refused(impl, card, more):
    assume(card.weights and more and card.rank + more > 0)
    batch = the_arrow_file(impl.write_card(card))
    stated = written_again(batch, schema_metadata={"lora.rank": str(card.rank + more)})
    with pytest.raises(Exception, match=r"."):
        impl.read_card(stated)


def pair_of(number):
    """A pair that a number tells from others."""
    return PlainPair(np.full((1, 1), number, np.float32), np.ones((1, 1), np.float32), 1.0)


alike = st.sampled_from(ALIKE)


@requirement("R1.16", kind="format")
@given(
    card=st.builds(
        PlainCard,
        name=alike,
        rank=st.just(1),
        alpha=st.just(1.0),
        target_modules=st.lists(alike, unique=True).map(tuple),
        weights=st.dictionaries(alike, st.integers(-9, 9).map(pair_of), max_size=4),
        metadata=st.dictionaries(
            alike | st.just(""), alike | st.just("") | free_text | st.lists(alike)
        ),
        extra=st.dictionaries(alike.map("x-".__add__), alike | st.just("") | free_text),
    )
)
@example(
    PlainCard("fi", 1, 1.0, (), {}, {"fi": "a\r\nb\rc\x00d"}, {"x-fi": "e\u0301\r\n" * 70_000})
)
@example(PlainCard("fi", 1, 1.0, (), {}, {"fi": "e\u0301" * 70_000}, {"x-fi": "\r\x00d"}))
@example(PlainCard("fi", 1, 1.0, (), {}, {"fi": ["b", "b", "a"]}, {}))
def test_text_comes_back_as_it_was_given_and_what_looks_alike_stays_apart(impl, card):
    loaded = impl.read_card(impl.write_card(card))
    assert (loaded.name, tuple(loaded.target_modules)) == (card.name, card.target_modules)
    factors = [
        {module: pair.A[0, 0] for module, pair in own.weights.items()} for own in (loaded, card)
    ]
    assert factors[0] == factors[1]
    assert (loaded.metadata, loaded.extra) == (card.metadata, card.extra)


@requirement("R1.16", kind="format")
@given(targets=st.lists(alike, min_size=1), data=st.data())
def test_a_target_that_stands_twice_comes_back_twice_or_is_refused(impl, targets, data):
    twice = tuple(data.draw(st.permutations([*targets, targets[0]])))
    try:
        card = impl.read_card(impl.write_card(PlainCard("docs", 1, 1.0, twice, {}, {}, {})))
    except Exception:  # noqa: BLE001 - any exception counts as a refusal
        return
    assert tuple(card.target_modules) == twice


@requirement("R1.16", kind="format")
@given(data=st.data(), dtype=dtypes, shape=st.tuples(features, ranks, features))
def test_factors_in_any_memory_order_are_written_by_their_elements(impl, data, dtype, shape):
    rows, rank, columns = shape
    a, b = data.draw(bits(dtype, (rows, rank))), data.draw(bits(dtype, (rank, columns)))
    pair = PlainPair(laid_out(a, data.draw(orders)), laid_out(b, data.draw(orders)))
    written = impl.write_card(PlainCard("docs", rank, 1.0, (), {"m": pair}, {}, {}))
    batch = the_arrow_file(written)
    for column, factor in (("A", a), ("B", b)):
        tensor = batch.column(column)
        tensor = getattr(tensor, "storage", tensor)
        assert tensor.field("shape").to_pylist() == [list(factor.shape)]
        elements = [factor[i, j] for i in range(len(factor)) for j in range(factor.shape[1])]
        stored = tensor.field("data").values.to_numpy(zero_copy_only=False)
        assert same_bits(stored.view(dtype), np.array(elements, dtype))
    loaded = impl.read_card(written).weights["m"]
    assert same_bits(loaded.A, a)
    assert same_bits(loaded.B, b)


# From here on: this implementation.


def saved(card):
    """The bytes of a card's file."""
    with tempfile.TemporaryDirectory() as folder:
        lora.save(card, Path(folder) / "card.lora.arrow")
        return (Path(folder) / "card.lora.arrow").read_bytes()


@requirement("R1.11", "R1.14")
@given(card=plain_cards(), data=st.data())
def test_one_card_is_one_byte_string_in_whatever_order_it_was_said(card, data):
    def shuffled(mapping):
        return dict(data.draw(st.permutations(list(mapping.items()))))

    other = card._replace(
        weights=shuffled(card.weights), metadata=shuffled(card.metadata), extra=shuffled(card.extra)
    )
    assert card_of(other) == card_of(card)
    assert saved(card_of(other)) == saved(card_of(card))


class Killed(BaseException):
    """Stands for the end of the process."""


@contextlib.contextmanager
def breaking(step, error):
    """The n-th of the steps that writing takes raises instead."""
    steps = [(os, "fsync"), (Path, "replace"), (Path, "unlink"), (pa.ipc, "new_file")]

    def broken(*_args, **_options):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*steps[step], broken)
        yield


@requirement("R1.11")
@given(
    old=st.none() | plain_cards(),
    new=plain_cards(),
    step=st.sampled_from([0, 1, 3]),
    kind=st.sampled_from([OSError, Killed]),
)
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(old, new, step, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "card.lora.arrow"
        if old is not None:
            lora.save(card_of(old), path)
        before = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        with (
            breaking(step, kind(5, "Input/output error")),
            pytest.raises((LoRAError, Killed)) as caught,
        ):
            lora.save(card_of(new), path)
        assert isinstance(caught.value, Killed) == (kind is Killed)
        assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == before


numbers = st.integers(-3, 3)
shapes = st.tuples(features, features)


@st.composite
def bases(draw):
    """A model of two Linears with whole weights, and a card for one of them."""
    model = nn.Sequential(nn.Linear(*draw(shapes)), nn.Linear(*draw(shapes)))
    dtype = draw(st.sampled_from([torch.float16, torch.float32, torch.float64, torch.bfloat16]))
    with torch.no_grad():
        for parameter in model.parameters():
            values = draw(st.lists(numbers, min_size=parameter.numel(), max_size=parameter.numel()))
            parameter.copy_(torch.tensor(values, dtype=torch.float32).reshape(parameter.shape))
    first = model[0]
    pair = lora.LowRank(np.ones((first.in_features, 1)), np.ones((1, first.out_features)))
    card = lora.LoRACard("docs", 1, 1.0, ("0",), {"0": pair})
    return model.to(dtype).requires_grad_(requires_grad=False), card


def stated_fingerprint(weight, key):
    """The fingerprint of one weight, as the specification words it."""
    name = str(weight.dtype).removeprefix("torch.")
    sha = hashlib.sha256(f"{key}\0{name}\0{tuple(weight.shape)}\0".encode())
    sha.update(bytes(weight.contiguous().view(torch.uint8).flatten().tolist()))
    return sha.hexdigest()


@requirement("R1.13")
@given(base=bases(), data=st.data())
def test_a_card_adapts_just_the_weights_it_was_made_for(base, data):
    model, card = base
    card = replace(card, base_model="tiny", base_fingerprint=lora.fingerprint(model, card))
    assert card.base_fingerprint == stated_fingerprint(model[0].weight, "0")
    again = copy.deepcopy(model)
    lora.adapt(again, card)
    with torch.no_grad():
        again[0].bias.add_(1)  # a bias is no targeted weight
        again[1].weight.add_(1)
    assert type(lora.adapt(again, card)[0]).__name__ == "LoRALinear"
    row, column = (data.draw(st.integers(0, size - 1)) for size in model[0].weight.shape)
    with torch.no_grad():
        again[0].weight[row, column] += data.draw(st.sampled_from([1, -1, 2]))
    with pytest.raises(BaseModelError, match=card.base_fingerprint):
        lora.adapt(again, card)
    assert type(lora.adapt(again, card, check_base=False)[0]).__name__ == "LoRALinear"
    assert type(lora.adapt(again, replace(card, base_fingerprint=None))[0]).__name__ == "LoRALinear"


@requirement("R1.13")
@given(base=bases(), prefix=st.sampled_from(["encoder", "model", "1"]))
def test_a_fingerprint_depends_on_the_weights_and_not_on_what_they_are_wrapped_in(base, prefix):
    model, card = base
    loaded = lora.fingerprint(model, card)
    wrapped = nn.Module()
    wrapped.add_module(prefix, copy.deepcopy(model))
    assert lora.fingerprint(wrapped, card) == loaded
    assert lora.fingerprint(lora.adapt(model, card), card) == loaded
    wide = torch.float32 if model[0].weight.dtype == torch.float64 else torch.float64
    assert lora.fingerprint(copy.deepcopy(model).to(wide), card) != loaded  # dtypes count


@requirement("R1.13")
@given(
    card=plain_cards(),
    base=names | st.none() | st.just(""),
    fingerprint=st.none() | st.binary(min_size=32, max_size=32),
)
def test_the_base_model_comes_back_with_the_card(card, base, fingerprint):
    card = replace(
        card_of(card), base_model=base, base_fingerprint=fingerprint and fingerprint.hex()
    )
    with tempfile.TemporaryDirectory() as folder:
        lora.save(card, path := Path(folder) / "card.lora.arrow")
        assert (loaded := lora.load(path)) == card
        header = lora.inspect(path)
    assert loaded.base_model == header.base_model == card.base_model
    assert loaded.base_fingerprint == header.base_fingerprint == card.base_fingerprint


@requirement("R1.14")
@given(card=plain_cards(), data=st.data())
def test_the_digest_is_the_sha256_of_the_bytes_and_lets_no_changed_byte_through(card, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "card.lora.arrow"
        returned = lora.save(card_of(card), path)
        raw = path.read_bytes()
        assert returned == lora.digest(path) == hashlib.sha256(raw).hexdigest()
        assert lora.load(path, verify=returned) == card_of(card)
        position = data.draw(st.integers(0, len(raw) - 1))
        changed = bytearray(raw)
        changed[position] ^= data.draw(st.integers(1, 255))
        path.write_bytes(changed)
        assert lora.digest(path) != returned
        with pytest.raises(CardFileError, match=returned):
            lora.load(path, verify=returned)


@requirement("R1.12")
@given(card=plain_cards())
def test_the_header_says_what_the_card_says(card):
    card = card_of(card)
    with tempfile.TemporaryDirectory() as folder:
        lora.save(card, path := Path(folder) / "card.lora.arrow")
        header = lora.inspect(path)
    fields = "name rank alpha target_modules metadata extra num_params nbytes"
    for field in fields.split():
        assert getattr(header, field) == getattr(card, field)
    assert header.dtype == card.dtype.name
    assert header.modules.keys() == card.weights.keys()
    for name, pair in card.weights.items():
        sizes = (pair.in_features, pair.rank, pair.out_features, pair.scaling)
        assert tuple(header.modules[name]) == sizes


def pickled(value, protocol=pickle.DEFAULT_PROTOCOL):
    """A value after a journey as bytes."""
    return pickle.loads(pickle.dumps(value, protocol))  # noqa: S301 - what was just written


def copies(card):
    """The card by every way that Python copies a value."""
    yield from (pickled(card, protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1))
    yield copy.copy(card)
    yield copy.deepcopy(card)
    yield replace(card)


@requirement("R1.15", "R1.7")
@given(card=plain_cards())
def test_a_copy_is_equal_hashes_equal_prints_equal_and_is_read_only(card):
    card = card_of(card)
    for other in copies(card):
        assert other == card
        assert hash(other) == hash(card)
        assert repr(other) == repr(card)
        for module, pair in other.weights.items():
            assert same_bits(pair.A, card.weights[module].A)
            assert same_bits(pair.B, card.weights[module].B)
            assert not pair.A.flags.writeable
            assert not pair.B.flags.writeable
    assert repr(card.name) in repr(card)
    assert {card: 1}[pickled(card)] == 1


def changed_cards(draw, card):
    """Yield the card with one thing about it changed, for each thing there is."""
    for field, value in {
        "name": draw(names.filter(lambda name: name != card.name)),
        "alpha": card.alpha * 2 if card.alpha < 1e300 else card.alpha / 2,
        "target_modules": (*card.target_modules, "another.target"),
        "metadata": {**card.metadata, "another key": draw(json_values)},
        "base_model": "another base",
        "base_fingerprint": "0" * 64,
        "extra": {**card.extra, "another key": "text"},
    }.items():
        yield replace(card, **{field: value})
    if not card.weights:
        return
    module = draw(st.sampled_from(list(card.weights)))
    pair = card.weights[module]
    others = {key: kept for key, kept in card.weights.items() if key != module}
    scaling = pair.scaling + 1 if abs(pair.scaling) < 1e6 else -pair.scaling
    changed = [(f"{module}.another", pair), (module, replace(pair, scaling=scaling))]
    for which in "AB":
        factor = getattr(pair, which).copy()
        flat = factor.view(UNSIGNED[factor.itemsize]).reshape(-1)
        bit = draw(st.integers(0, flat.itemsize * 8 - 1))
        flat[draw(st.integers(0, flat.size - 1))] ^= flat.dtype.type(1) << flat.dtype.type(bit)
        changed.append((module, replace(pair, **{which: factor})))
    for name, other in changed:
        yield replace(card, weights={**others, name: other})


@requirement("R1.15")
@given(card=plain_cards(), data=st.data())
def test_a_card_with_one_field_or_one_bit_changed_is_another(card, data):
    card = card_of(card)
    for other in changed_cards(data.draw, card):
        assert other != card
        assert len({card, other, pickled(card)}) == 2


@requirement("R1.14", "R1.11")
@given(card=plain_cards(), data=st.data())
def test_cards_are_equal_exactly_when_their_files_are(card, data):
    card = card_of(card)
    for other in (card, pickled(card), *changed_cards(data.draw, card)):
        assert (saved(card) == saved(other)) == (card == other)


payloads = st.integers(1, 2**7 - 1)
"""Of a NaN: bfloat16 has seven bits for it, the others more."""


@requirement("R1.15", "R1.7")
@given(dtype=dtypes, rows=features, rank=ranks, payload=payloads, other=payloads)
@example(np.dtype(np.float32), 1, 1, 1, 2)
def test_nan_payloads_tell_cards_apart_and_zeros_differ_in_sign(dtype, rows, rank, payload, other):
    unsigned = UNSIGNED[dtype.itemsize]
    infinity = int(np.array(np.inf, dtype).view(unsigned))

    def card(pattern):
        a = np.full((rows, rank), pattern, unsigned).view(dtype)
        pair = lora.LowRank(a, np.zeros((rank, 2), dtype))
        return lora.LoRACard("docs", rank, 1.0, (), {"m": pair})

    with np.errstate(invalid="ignore"):  # a signalling NaN is what is asked for
        assert np.isnan(card(infinity + payload).weights["m"].A).all()
    assert (card(infinity + payload) == card(infinity + other)) == (payload == other)
    assert card(0) != card(1 << (dtype.itemsize * 8 - 1))


@requirement("R1.6", "R1.15")
@given(card=plain_cards(), data=st.data())
def test_no_array_that_a_card_was_made_of_can_change_it(card, data):
    assume(card.weights)
    writable = {m: (np.array(p.A), np.array(p.B), p.scaling) for m, p in card.weights.items()}
    seen_through = data.draw(st.booleans())

    def given_as(array):
        view = array.view()
        view.flags.writeable = not seen_through  # others may still write to the array itself
        return view

    weights = {m: lora.LowRank(given_as(a), given_as(b), s) for m, (a, b, s) in writable.items()}
    new_card = lora.LoRACard(*card[:4], weights, card.metadata, extra=card.extra)
    for a, b, _ in writable.values():
        a.view(UNSIGNED[a.itemsize])[...] ^= 1
        b.view(UNSIGNED[b.itemsize])[...] ^= 1
    assert new_card == card_of(card)


@requirement("R1.15", "R1.7")
@given(data=st.data(), rank=ranks, cut=ranks)
def test_factors_of_the_same_bytes_in_another_shape_or_dtype_are_others(data, rank, cut):
    dtype = data.draw(st.sampled_from([np.float16, np.float32]).map(np.dtype))
    a, b = data.draw(bits(dtype, (2 * cut, rank))), data.draw(bits(dtype, (rank, 3 * cut)))
    pair = lora.LowRank(a, b, 1.0)
    taken = {
        "as it is": pair,
        "copied": lora.LowRank(a.copy(), b.copy(), 1),
        "of another rank": lora.LowRank(a.reshape(2, cut * rank), b.reshape(cut * rank, 3), 1.0),
    }
    if dtype == np.float16:
        seen_otherwise = (factor.view(ml_dtypes.bfloat16) for factor in (a, b))
        taken["of another dtype"] = lora.LowRank(*seen_otherwise, 1.0)
    for how, other in taken.items():
        same = how in {"as it is", "copied"} or (how == "of another rank" and cut == 1)
        assert (pair == other) is (other == pair) is same
    assert pair != lora.LowRank(a, b)


@requirement("R1.15")
@given(card=plain_cards())
def test_values_equal_nothing_of_another_kind_and_leave_the_last_word_to_it(card):
    card = card_of(card)
    for value in (card, *card.weights.values()):
        assert value not in (repr(value), None, 1)
        assert value == mock.ANY
    assert all(card != pair != card for pair in card.weights.values())
    assert card.metadata not in (card, repr(card.metadata), None)


@requirement("R1.3", "R1.15")
@given(value=metadata, other=metadata, key=names)
def test_frozen_json_equals_the_mappings_it_was_made_of_and_no_others(value, other, key):
    frozen = lora.FrozenJSON(value)
    assert frozen == value == frozen
    assert lora.FrozenJSON(frozen) == frozen
    assert lora.FrozenJSON(frozen).text == frozen.text
    assert frozen.text == lora.FrozenJSON(json.loads(frozen.text)).text
    assert json.dumps(json.loads(frozen.text), sort_keys=True) == json.dumps(value, sort_keys=True)
    assert (frozen == other) is (other == frozen) is (value == other)
    assert frozen != {**value, key: [value.get(key)]}
    assert (dict(frozen), len(frozen), set(frozen)) == (value, len(value), set(value))


numbers_of_other_types = (
    st.integers(-(2**60), 2**60) | st.fractions(-9, 9) | st.floats(-8, 8, width=16).map(np.float16)
)
scales = (
    scalings
    | numbers_of_other_types
    | st.sampled_from([0, -0.0, np.float32(-0.0), np.int8(3), Fraction(1, 3)])
)


@requirement("R1.8", "R1.15")
@given(scaling=scales, alpha=scales.filter(lambda alpha: float(alpha) > 0))
def test_a_scaling_is_a_plain_float_so_that_equal_ones_make_equal_files(scaling, alpha):
    a, b = np.ones((2, 1)), np.ones((1, 2))
    pair = lora.LowRank(a, b, scaling)
    assert (type(pair.scaling), pair.scaling) == (float, float(scaling))
    assert repr(pair.scaling) != "-0.0"
    assert pair == lora.LowRank(a, b, float(scaling))
    cards = [
        lora.LoRACard("docs", 1, given_as(alpha), (), {"m": lora.LowRank(a, b, given_as(scaling))})
        for given_as in (lambda value: value, float)
    ]
    assert cards[0] == cards[1]
    assert saved(cards[0]) == saved(cards[1])


class Marked(np.ndarray):
    """An array of another class."""


@requirement("R1.6", "R1.7")
@given(data=st.data(), dtype=dtypes, shape=st.tuples(features, ranks))
def test_a_read_only_factor_is_kept_if_it_lies_as_in_the_file_and_copied_otherwise(
    data, dtype, shape
):
    plain = data.draw(bits(dtype, shape))
    layouts = {"plain": plain.copy(), "columns": np.asfortranarray(plain)}
    layouts["every other"] = np.repeat(plain, 2, axis=0)[::2]
    layouts["backwards"] = plain[::-1].copy()[::-1]
    layouts["marked"] = plain.copy().view(Marked)
    if dtype.name != "bfloat16":
        layouts["swapped"] = plain.byteswap().view(dtype.newbyteorder())
    for how, base in layouts.items():
        array, owner = base.view(), base
        while isinstance(owner, np.ndarray):
            owner.flags.writeable = False
            owner = owner.base
        array.flags.writeable = False
        loaded = lora.LowRank(array, np.ones((shape[1], 1), dtype)).A
        assert same_bits(loaded, plain)
        assert (type(loaded), loaded.dtype.isnative) == (np.ndarray, True)
        assert loaded.flags.c_contiguous
        assert not loaded.flags.writeable
        lies_so = array.flags.c_contiguous and how not in {"marked", "swapped"}
        assert (loaded is array) is lies_so
    writable = plain.copy()
    assert lora.LowRank(writable, np.ones((shape[1], 1), dtype)).A is not writable


@requirement("R1.2", "R7.8")
@given(shape=st.lists(st.integers(0, 3), max_size=4), dtype=dtypes, first=st.booleans())
def test_a_factor_has_two_dimensions_and_neither_is_zero(shape, dtype, first):
    factor = np.ones(shape, dtype)
    sound = len(shape) == 2 and all(shape)
    fitting = factor.T if sound else np.ones((2, 2), dtype)
    pair = (factor, fitting) if first else (fitting, factor)
    if sound:
        new_card = lora.LowRank(*pair)
        assert (new_card.in_features, new_card.rank) == pair[0].shape
        assert (new_card.rank, new_card.out_features) == pair[1].shape
    else:
        message = f"^factor {'BA'[first]}: expected a two-dimensional, non-empty .* found shape "
        with pytest.raises(CardError, match=message):
            lora.LowRank(*pair)


@requirement("R1.1")
@given(target=names, several=st.lists(names, max_size=4, unique=True))
def test_targets_are_a_tuple_however_they_are_given(target, several):
    def targets(given_as):
        return lora.LoRACard("docs", 1, 1.0, given_as, {}).target_modules

    assert targets(target) == targets([target]) == (target,)
    assert targets(several) == targets(iter(several)) == targets(tuple(several)) == tuple(several)
    assert targets(set(several)) == targets(frozenset(several)) == tuple(sorted(several))


@requirement("R1.13")
@given(
    hex_digits=st.binary(min_size=32, max_size=32).map(bytes.hex),
    at=st.integers(0, 63),
    data=st.data(),
)
def test_a_fingerprint_is_64_lower_case_hex_digits_and_nothing_else(hex_digits, at, data):
    others = st.characters(exclude_characters="0123456789abcdef") | st.sampled_from("XxghAF _-²")
    other = data.draw(others)
    card = lora.LoRACard("docs", 1, 1.0, (), {})
    assert replace(card, base_fingerprint=hex_digits).base_fingerprint == hex_digits
    replaced = hex_digits[:at] + other + hex_digits[at + 1 :]
    for wrong in (replaced, hex_digits[:-1], hex_digits + "0", hex_digits.upper()):
        if wrong != hex_digits:
            with pytest.raises(CardError, match="base_fingerprint"):
                replace(card, base_fingerprint=wrong)


@requirement("R1.3")
@given(
    kinds=st.lists(st.booleans(), min_size=1, max_size=3),
    depth=st.integers(2, 70) | st.sampled_from([63, 64, 65]),
    innermost=st.sampled_from([1, None, [], {}]),
)
def test_metadata_may_be_nested_64_levels_deep_in_lists_or_objects_and_no_deeper(
    kinds, depth, innermost
):
    value = innermost  # an empty list or object is a level, too
    for level in range(depth - 1 - isinstance(innermost, list | dict)):
        value = [value] if kinds[level % len(kinds)] else {"a": value}
    new_card = {"a": value}  # the object itself is a level
    if depth <= 64:
        card = lora.LoRACard("docs", 1, 1.0, (), {}, new_card)
        assert dict(card.metadata) == new_card
        assert lora.table_to_card(lora.card_to_table(card)) == card
    else:
        with pytest.raises(CardError, match="64 levels"):
            lora.LoRACard("docs", 1, 1.0, (), {}, new_card)
