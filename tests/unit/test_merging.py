"""Merging: values, messages, what a merged card holds, and that no ΔW is formed where none is
needed.
"""

from dataclasses import FrozenInstanceError, replace

import ml_dtypes
import numpy as np
import pytest

from lora.card import LoRACard, LowRank
from lora.errors import ArgumentError, CardError, ConflictError, ShapeError
from lora.merging import STRATEGIES, Dare, Slerp, Ties, Weighted, merge
from lora.testing.plugin import requirement
from tests.properties.test_r20_merged_cards import card, card_of

FINGERPRINT, OTHER = "0" * 64, "1" * 64

DOCS, LAW = card("docs"), card("law", seed=1, rank=3)


# ---- the strategies are values


@requirement("R20.1")
@pytest.mark.parametrize("kind", STRATEGIES.values())
def test_a_strategy_is_frozen_and_compares_and_hashes_by_content(kind):
    value = kind()
    assert value == kind()
    assert hash(value) == hash(kind())
    with pytest.raises((FrozenInstanceError, TypeError, AttributeError)):
        value.density = 0.25
    assert not hasattr(value, "__dict__")


HUGE, TWIN = [1e308, 1e308], replace(DOCS, name="twin")


@requirement("R20.1", "R7.8")
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Slerp, {"t": 1.5}, r"slerp: t: expected a number in \[0, 1\], found 1\.5"),
        (Slerp, {"t": float("nan")}, "slerp: t: expected a finite number, found nan"),
        (Ties, {"density": 0}, r"ties: density: expected a number in \(0, 1\], found 0"),
        (Ties, {"elect": "sum"}, "ties: elect: expected one of mass, count, found 'sum'"),
        (Dare, {"density": 1.01}, r"dare: density: expected a number in \(0, 1\]"),
        (Dare, {"seed": 0.5}, "dare: seed: expected an integer, found 0.5"),
        (Dare, {"seed": True}, "dare: seed: expected an integer, found True"),
        (Weighted, {"normalize": 1}, "weighted: normalize: expected True or False, found 1"),
    ],
)
def test_an_option_out_of_range_is_named(kind, options, message):
    with pytest.raises(ArgumentError, match=message):
        kind(**options)


BARE = LoRACard("bare", 1, 1.0, ["query"], {})
OPPOSITE = replace(
    TWIN, weights={m: replace(p, scaling=-p.scaling) for m, p in DOCS.weights.items()}
)
CANCELS = LowRank(np.full((3, 2), 0.1), np.array([[0.3, 0.7], [-0.3, -0.7]]) * np.pi, 1.0)
CANCELLED = [card_of(CANCELS, name) for name in "xy"]  # 0, although rounding says otherwise


@requirement("R20.1", "R20.5", "R20.7", "R20.9", "R7.8")
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([DOCS], "mean"), ArgumentError, f"one of {', '.join(STRATEGIES)}"),
        (([DOCS], Ties), ArgumentError, "merge: strategy: expected one of"),
        (([],), ArgumentError, "merge: cards: expected at least one card, found none"),
        ((DOCS,), ArgumentError, "merge: cards: expected a list of cards"),
        ((7,), ArgumentError, "merge: cards: expected a list of cards"),
        ((["docs"],), ArgumentError, "card: expected a LoRACard, found str"),
        (([DOCS], "average", [1.0]), ArgumentError, "none for Average, found .*use 'weighted'"),
        (([DOCS, LAW], "slerp", [1, 1]), ArgumentError, "expected none for Slerp"),
        (([DOCS], "slerp"), ArgumentError, "expected exactly two for slerp, found 1"),
        (([DOCS], "weighted", [1, 2]), ArgumentError, "one for each of 1 cards, found 2"),
        (([DOCS], "weighted", ["1"]), ArgumentError, "merge: weight 0: expected a finite number"),
        (([DOCS], "weighted", 1), ArgumentError, "a list of numbers, one per card"),
        (([DOCS, LAW], Weighted(normalize=True), [1, -1]), ArgumentError, "a sum that is not 0"),
        (([DOCS], "average", None, 0), ArgumentError, "rank: expected an integer >= 1, found 0"),
        (
            ([DOCS], "average", None, 1.5),
            ArgumentError,
            "rank: expected an integer >= 1, found 1.5",
        ),
        (([DOCS], "cat", None, 2), ArgumentError, "none for 'cat'.*'weighted' truncates"),
        (([DOCS, TWIN], "weighted", HUGE), ArgumentError, "found an overflow"),
        (([DOCS, LAW], "weighted", HUGE), ArgumentError, "found an overflow"),
        (([DOCS, LAW], "dare", HUGE), ArgumentError, "found an overflow"),
        (([DOCS, LAW], Weighted(normalize=True), HUGE), ArgumentError, "merge: sum of weights"),
        (
            ([DOCS, LAW, TWIN], Weighted(normalize=True), [1e308, -1e308, 1e-300]),
            ArgumentError,
            "merge: weights over their sum: expected a finite number",
        ),
        (([DOCS, LAW], "weighted", {0: 0.5, 1: 0.5}), ArgumentError, "a list of numbers"),
        (([DOCS, BARE], "slerp"), ArgumentError, "card 'bare': .*a ΔW that is not 0.*'weighted'"),
        (([DOCS, OPPOSITE], "slerp"), ArgumentError, "'docs' and 'twin': .* are not opposite"),
        ((CANCELLED, "slerp"), ArgumentError, "a ΔW that is not 0"),
        (([DOCS, DOCS], "dare"), ConflictError, r"dare, found \['docs', 'docs'\]; rename one"),
        (
            ([DOCS, card("law", shape=(5, 6))],),
            ShapeError,
            r"card 'law': module '0.query': expected in, out = \(6, 5\) as in card 'docs'",
        ),
    ],
)
def test_an_argument_out_of_range_and_cards_that_do_not_fit_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        merge(*arguments)


@requirement("R20.9")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_factors_that_are_not_finite_are_refused_even_at_weight_zero(dtype, bad):
    pair = LowRank(np.full((6, 1), bad, dtype), np.ones((1, 5), dtype), 1.0)
    spoilt = LoRACard("spoilt", 1, 1.0, ["query"], {"0.query": pair})
    message = "card 'spoilt': module '0.query': expected finite factors"
    with pytest.raises(CardError, match=message):
        merge([DOCS, spoilt], "weighted", [1, 0])
