"""R23: a card goes to other formats and comes back with its bits."""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from ml_dtypes import finfo

from lora.card import LoRACard, LowRank
from lora.errors import CardError, CardFileError
from lora.interop.peft import CONFIG, WEIGHTS, export_peft, import_peft
from lora.interop.safetensors import LAYOUTS, load_safetensors, save_safetensors
from lora.targets import match_targets
from lora.testing import strategies as gen
from lora.testing.plugin import requirement

any_scaling = gen.scalings | st.floats(allow_nan=False, allow_infinity=False)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def cards(draw: st.DrawFn) -> LoRACard:
    """Any card: factors of any bits, unequal ranks, scalings of any size, base and fingerprint."""
    plain = draw(gen.plain_cards())
    pairs = {
        module: LowRank(pair.A, pair.B, pair.scaling if pair.scaling is None else draw(any_scaling))
        for module, pair in plain.weights.items()
    }
    rank = max((pair.rank for pair in pairs.values()), default=plain.rank)
    card = LoRACard(plain.name, rank, plain.alpha, plain.target_modules, pairs, plain.metadata)
    digest = draw(st.none() | st.text("0123456789abcdef", min_size=64, max_size=64))
    return replace(
        card, base_model=draw(st.none() | gen.names), base_fingerprint=digest, extra=plain.extra
    )


ALIKE = ["a", "b.a", "c.b.a", "xa", "b.*", "c(a"]
"""Names that end alike, the shorter ones sorted first, or that mean something else in a pattern."""


@st.composite
def exportable(draw: st.DrawFn) -> LoRACard:
    """A card that PEFT can express: named modules, each targeted, and scaling · rank a float."""
    card = draw(cards())
    weights = {
        m: p for m, p in card.weights.items() if m and abs(p.scaling * p.rank) < np.finfo(float).max
    }
    if draw(st.booleans()):
        weights = dict(zip(draw(st.permutations(ALIKE)), weights.values(), strict=False))
    assume(weights)
    rank = max(pair.rank for pair in weights.values())
    return replace(card, weights=weights, target_modules=tuple(weights), rank=rank)


def bits(weights: Mapping[str, LowRank]) -> dict[str, tuple[object, ...]]:
    return {
        m: (p.dtype, p.A.shape, p.A.tobytes(), p.B.shape, p.B.tobytes()) for m, p in weights.items()
    }


@requirement("R23.4")
@given(exportable())
def test_a_card_goes_to_peft_and_back_with_its_bits_and_its_scalings_to_one_ulp(card):
    with folder() as place:
        export_peft(card, place / "x", exact=True)
        back = import_peft(place / "x")
    assert bits(back.weights) == bits(card.weights)
    for module, pair in card.weights.items():
        assert abs(back.weights[module].scaling - pair.scaling) <= np.spacing(abs(pair.scaling))
    assert set(back.target_modules) == set(card.weights)
    for field in ("name", "rank", "alpha", "base_model", "base_fingerprint", "extra"):
        assert getattr(back, field) == getattr(card, field)
    assert dict(back.metadata) | {"peft": 0} == dict(card.metadata) | {"peft": 0}


@st.composite
def of_one_scaling(draw: st.DrawFn) -> LoRACard:
    """A card whose modules have one rank, and one scaling that an alpha over r or √r gives."""
    card = draw(exportable())
    alpha = draw(st.floats(1e-3, 1e3))
    scaling = alpha / draw(st.sampled_from([card.rank, math.sqrt(card.rank)]))
    weights = {
        module: LowRank(pair.A, pair.B, scaling)
        for module, pair in card.weights.items()
        if pair.rank == card.rank
    }
    return replace(card, alpha=alpha, weights=weights, target_modules=tuple(weights))


@requirement("R23.4")
@given(of_one_scaling())
def test_one_alpha_for_all_modules_keeps_every_bit_without_patterns(card):
    with folder() as place:
        export_peft(card, place / "x")
        config = json.loads((place / "x" / CONFIG).read_text())
        back = import_peft(place / "x")
    assert config["alpha_pattern"] == config["rank_pattern"] == {}
    assert back.weights == card.weights
    assert (bits(back.weights), back.alpha) == (bits(card.weights), card.alpha)


def dense(pair: LowRank) -> np.ndarray:
    return pair.scaling * (pair.A.astype("f8") @ pair.B.astype("f8")).T


@requirement("R23.4", "R26.7")
@given(exportable())
def test_any_card_goes_to_peft_and_back_within_one_rounding_of_b(card):
    """|error of ΔW| <= |scaling| · |A| · unit of B, and the sums' own error in float64."""
    with folder() as place, np.errstate(all="ignore"):
        export_peft(card, place / "x")
        back = import_peft(place / "x")
        for module, pair in card.weights.items():
            expected, actual = dense(pair), dense(back.weights[module])
            a, b = np.abs(pair.A.astype("f8")), np.abs(pair.B.astype("f8"))
            unit = float(finfo(pair.dtype).eps) * b.max()
            bound = abs(pair.scaling) * (a.sum(1, keepdims=True) * unit + 1e-14 * (a @ b)).T
            if np.isfinite(expected).all():
                assert (np.abs(actual - expected) <= bound + 1e-300).all()
    assert back.rank == card.rank


@requirement("R23.4")
@given(exportable())
def test_a_second_round_through_peft_changes_nothing_more(card):
    """What one ulp was lost is lost once; and one card gives one directory, byte for byte."""
    with folder() as place:
        export_peft(card, place / "1")
        once = import_peft(place / "1")
        export_peft(once, place / "2")
        twice = import_peft(place / "2")
        export_peft(once, place / "3")
        for file in (CONFIG, WEIGHTS):
            assert (place / "2" / file).read_bytes() == (place / "3" / file).read_bytes()
    assert twice.weights == once.weights


@requirement("R23.4")
@given(cards())
def test_a_card_goes_to_peft_exactly_if_peft_can_express_it(card):
    """No untargeted weight comes to life there, and a refused card leaves nothing behind."""
    finite = all(abs(pair.scaling * pair.rank) < np.inf for pair in card.weights.values())
    applied = set(match_targets(card.weights, card.target_modules)) == set(card.weights)
    sayable = bool(card.weights) and "" not in card.weights and finite and applied
    with folder() as place:
        try:
            export_peft(card, place / "x")
        except CardError:
            assert not sayable
            assert not list(place.iterdir())
        else:
            assert sayable
            assert set(import_peft(place / "x").weights) == set(card.weights)


@requirement("R23.5")
@given(card=cards(), layout=st.sampled_from(LAYOUTS))
def test_a_card_goes_to_safetensors_and_back_as_it_was(card, layout):
    with folder() as place:
        first = save_safetensors(card, place / "x.safetensors", layout=layout)
        back = load_safetensors(place / "x.safetensors")
        again = save_safetensors(back, place / "y.safetensors", layout=layout)
    assert back == card
    assert bits(back.weights) == bits(card.weights)
    assert again == first


@requirement("R23.1", "R23.5")
@given(card=exportable(), data=st.data())
def test_a_changed_file_is_refused_or_is_a_well_formed_card(card, data):
    """Any one byte of a directory or file, and any cut: never another error, never a crash."""
    with folder() as place:
        export_peft(card, place / "x")
        save_safetensors(card, place / "x" / "y.safetensors")
        path = place / "x" / data.draw(st.sampled_from([CONFIG, WEIGHTS, "y.safetensors"]))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, min(len(content), 1500) - 1))
        if data.draw(st.booleans()):
            content[position] = data.draw(st.integers(0, 255))
        else:
            del content[position:]
        path.write_bytes(content)
        readers = {import_peft: place / "x", load_safetensors: place / "x" / "y.safetensors"}
        for read, source in readers.items():
            try:
                assert isinstance(read(source), LoRACard)
            except CardFileError as error:
                assert str(source) in str(error)  # noqa: PT017 - either may happen
