"""Merging: values, messages, what a merged card holds, and that no ΔW is formed where none is
needed.
"""

import tracemalloc
from dataclasses import FrozenInstanceError, replace

import ml_dtypes
import numpy as np
import pytest

from lora.card import LoRACard, LowRank
from lora.errors import (
    ArgumentError,
    BaseModelError,
    CardError,
    ConflictError,
    ShapeError,
    TargetError,
)
from lora.factors import delta
from lora.merging import OF_ONE_CARD, STRATEGIES, Average, Dare, Slerp, Ties, Weighted, merge
from lora.testing.plugin import requirement

FINGERPRINT, OTHER = "0" * 64, "1" * 64


def card(name="docs", *, rank=2, seed=0, shape=(6, 5), dtype="f4", modules=("0.query",), **fields):
    rng, weights = np.random.default_rng(seed), {}
    for module in modules:
        a, b = (
            rng.normal(size=size).astype(dtype) for size in ((shape[0], rank), (rank, shape[1]))
        )
        weights[module] = LowRank(a, b, 0.5)
    return LoRACard(name, rank, 1.0, ["query"], weights, **fields)


def card_of(pair, name="docs"):
    return LoRACard(name, pair.rank, 1.0, ["q"], {"q": pair})


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


@requirement("R20.1")
def test_a_strategy_may_be_named():
    names = ["average", "weighted", "slerp", "ties", "dare", "task_arithmetic", "cat"]
    assert list(STRATEGIES) == names
    for name, kind in STRATEGIES.items():
        assert kind.__name__.lower() == name.replace("_", "")
        assert merge([DOCS, LAW], name) == merge([DOCS, LAW], kind())
    assert merge([DOCS, LAW]) == merge([DOCS, LAW], Average())


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


@requirement("R20.9", "R1.13")
def test_cards_for_other_weights_of_the_same_modules_are_refused():
    one, two = (replace(c, base_fingerprint=f) for c, f in ((DOCS, FINGERPRINT), (LAW, OTHER)))
    message = "card 'law': base_fingerprint: expected 000.* as in card 'docs'"
    with pytest.raises(BaseModelError, match=message):
        merge([one, two])
    assert merge([one, replace(two, base_fingerprint=FINGERPRINT)]).base_fingerprint == FINGERPRINT
    assert merge([one, LAW]).base_fingerprint == FINGERPRINT


@requirement("R20.9", "R1.13")
def test_fingerprints_of_other_modules_say_nothing_and_do_not_outlive_the_merge():
    one = replace(DOCS, base_fingerprint=FINGERPRINT)
    two = card("law", modules=("1.query",), base_fingerprint=OTHER)
    merged = merge([one, two])
    assert list(merged.weights) == ["0.query", "1.query"]
    assert merged.base_fingerprint is None


@requirement("R20.9", "R1.13")
def test_base_models_of_two_names_are_refused_unless_the_fingerprint_says_they_are_one():
    one, two = replace(DOCS, base_model="minilm"), replace(LAW, base_model="bert")
    message = r"expected one, found \['bert', 'minilm'\]; merge cards of one base model"
    with pytest.raises(BaseModelError, match=message):
        merge([one, two])
    alike = [replace(c, base_fingerprint=FINGERPRINT) for c in (one, two)]
    assert merge(alike).base_model is None
    assert merge([one, LAW]).base_model == "minilm"


# ---- what a merged card holds


@requirement("R20.3", "R20.4")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_what_comes_from_one_card_keeps_that_cards_factors(dtype):
    one = card("docs", dtype=dtype)
    other = card("law", dtype=dtype, modules=("1.query",))
    assert merge([one]).weights == one.weights
    half = merge([one, other]).weights["0.query"]
    assert np.array_equal(half.A, one.weights["0.query"].A)
    assert half.scaling == one.weights["0.query"].scaling / 2
    assert merge([one, replace(one, name="twin")]).weights == one.weights


@requirement("R20.3")
@pytest.mark.parametrize("strategy", ["average", "cat", "ties"])
def test_the_order_of_cards_of_one_name_changes_no_bit(strategy):
    versions = [card("docs", seed=seed, rank=seed + 1) for seed in range(4)]
    assert merge(versions, strategy) == merge(versions[::-1], strategy)


@requirement("R20.8")
@pytest.mark.parametrize("strategy", ["task_arithmetic", "weighted", "cat", "ties"])
def test_where_nothing_is_left_there_is_no_row(strategy):
    nothing = merge([DOCS, replace(DOCS, name="twin")], strategy, [1, -1])
    assert (dict(nothing.weights), nothing.rank, nothing.target_modules) == ({}, 1, ("query",))
    assert nothing.metadata["merge"]["error"] == {"0.query": 0.0}


@requirement("R20.8")
def test_a_card_less_another_factorisation_of_itself_leaves_nothing():
    pair = card(dtype=np.float64).weights["0.query"]
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(2, 2)))
    twin = card_of(LowRank(pair.A @ turn, turn.T @ pair.B, 0.5), "twin")
    assert not merge([card_of(pair), twin], "task_arithmetic", [1, -1]).weights


@requirement("R20.4")
def test_merged_factors_are_balanced_and_their_scaling_is_explicit():
    merged = merge([DOCS, LAW], "weighted", [3.0, 0.01])
    pair = merged.weights["0.query"]
    assert merged.rank == pair.rank == 5
    assert merged.alpha == 5.0
    assert pair.scaling == 2.0 ** round(np.log2(pair.scaling))
    gram_a, gram_b = pair.A.T.astype("f8") @ pair.A, pair.B.astype("f8") @ pair.B.T
    assert np.allclose(gram_a, gram_b, atol=6 * 2**-24 * np.trace(gram_a))


@requirement("R20.4")
@pytest.mark.parametrize("size", [2.0**-120, 2.0**120])
def test_changes_far_from_one_survive_in_narrow_dtypes(size):
    pairs = [card(dtype=np.float16, seed=seed).weights["0.query"] for seed in (0, 1)]
    cards = [
        card_of(replace(pair, scaling=size), name) for name, pair in zip("ab", pairs, strict=True)
    ]
    merged = delta(merge(cards, "task_arithmetic").weights["q"], dtype=np.float64) / size
    want = sum(delta(replace(pair, scaling=1.0), dtype=np.float64) for pair in pairs)
    assert abs(merged - want).max() <= 4 * 2**-11 * np.linalg.svd(want, compute_uv=False).sum()


@requirement("R20.1")
def test_cat_keeps_every_a_as_it_is_and_puts_the_weights_into_b():
    merged = merge([LAW, DOCS], "cat", [1.0, 4.0]).weights["0.query"]
    docs, law = DOCS.weights["0.query"], LAW.weights["0.query"]
    assert np.array_equal(merged.A, np.hstack([docs.A, law.A]))
    assert np.array_equal(merged.B, np.vstack([docs.B, law.B / 4]))
    assert merged.scaling == 2.0


@requirement("R20.6", "R20.7")
@pytest.mark.parametrize("strategy", ["ties", "dare"])
def test_entrywise_merges_have_the_largest_rank_of_their_parents_unless_told(strategy):
    assert merge([DOCS, LAW], strategy).rank == 3
    assert merge([DOCS, LAW], strategy, rank=1).rank == 1
    assert merge([DOCS, LAW], strategy, rank=99).rank == 5


@requirement("R20.6")
@pytest.mark.parametrize("size", [1e-320, 2.0**1023])
def test_weights_of_any_size_give_ties_the_same_mean(size):
    assert merge([DOCS, LAW], "ties", [size, size]).weights == merge([DOCS, LAW], "ties").weights


@requirement("R20.7")
def test_a_mask_is_the_same_on_every_machine():
    pair = LowRank(np.ones((4, 1)), np.ones((1, 4)), 1.0)
    merged = merge([card_of(pair)], Dare(0.5, seed=0), rank=4)
    kept = (delta(merged.weights["q"]) > 1).astype(int)
    assert ["".join(map(str, row)) for row in kept] == ["0010", "0111", "1011", "0000"]


@requirement("R20.4", "R20.5")
@pytest.mark.parametrize("strategy", ["average", "cat", "slerp"])
def test_no_change_is_formed_where_a_merge_is_linear(strategy):
    shape = (3000, 2000)
    cards = [card(name, shape=shape, rank=4, seed=i) for i, name in enumerate("ab")]
    tracemalloc.start()
    merge(cards, strategy)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < shape[0] * shape[1] * 4 / 4, "a quarter of one ΔW in float32"


@requirement("R20.9", "R7.8")
def test_names_of_which_one_may_mean_the_other_are_not_merged():
    short, long = card("short"), card("long", modules=("encoder.0.query",), seed=1)
    message = "'encoder.0.query': expected names of one form.*'0.query' in card 'short'"
    for pair in ((short, long), (long, short)):
        with pytest.raises(TargetError, match=message):
            merge(pair)
    other = card("other", modules=("10.query",))
    assert set(merge([short, other]).weights) == {"0.query", "10.query"}
    both = card("both", modules=("0.query", "encoder.0.query"))  # its own affair
    assert set(merge([both, short]).weights) == set(both.weights)


# ---- what the merged card says


@requirement("R20.10")
def test_what_all_cards_say_is_kept_and_nothing_else():
    docs = {
        "description": "of Python",
        "tags": ["code", "python"],
        "peft": {"task_type": "CAUSAL_LM", "lora_dropout": 0.1, "revision": None},
        "author": "a",
        "version": "1.0.0",
        "quality": 0.5,
    }
    law = {
        **docs,
        "description": "of law",
        "tags": ["law", "code"],
        "peft": {"task_type": "CAUSAL_LM", "lora_dropout": 0.2},
    }
    cards = [card("docs", metadata=docs), card("law", seed=1, metadata=law)]
    told = dict(merge(cards).metadata)
    assert set(told.pop("merge")) == {"strategy", "options", "parents", "error"}
    assert told == {"tags": ["code"], "peft": {"task_type": "CAUSAL_LM"}, "author": "a"}
    single = dict(merge(cards[:1]).metadata)
    assert single.pop("merge")["parents"][0]["name"] == "docs"
    assert single == {key: value for key, value in docs.items() if key not in OF_ONE_CARD}
    assert {"version", "quality", "created", "modified", "extract", "merge"} == OF_ONE_CARD


@requirement("R26.7", "R20.10")
@pytest.mark.parametrize("what", ["model", "revision"])
def test_bases_of_several_names_or_revisions_need_one_name(what):
    def of(value, **fields):
        if what == "model":
            return {"base_model": value, **fields}
        return {"base_model": "base", "metadata": {"peft": {"revision": value}}, **fields}

    docs, law = card("docs", **of("v1")), card("law", seed=1, **of("v2"))
    message = rf"base {what}s: expected one, found \['v1', 'v2'\].*name it: `base_model=...`"
    with pytest.raises(BaseModelError, match=message):
        merge([docs, law])
    assert merge([docs, law], base_model="one").base_model == "one"
    one = card("law", seed=1, **of("v1"))
    assert merge([docs, one]).base_model == ("v1" if what == "model" else "base")
    proven = [card(name, **of(name, base_fingerprint=FINGERPRINT)) for name in ("docs", "law")]
    assert merge(proven).base_fingerprint == FINGERPRINT
    other = [proven[0], replace(proven[1], base_fingerprint=OTHER)]
    with pytest.raises(BaseModelError, match="base_fingerprint: expected 0000"):
        merge(other, base_model="one")


@requirement("R20.10")
@pytest.mark.parametrize(("strategy", "rank"), [("ties", 2), ("dare", 1), ("average", 2)])
def test_the_share_that_is_kept_and_the_rank_for_90_percent_are_those_of_the_dense_change(
    strategy, rank
):
    names = ("0.query", "1.query", "2.query")
    cards = [card(f"{i}", shape=(9, 7), rank=4, seed=i, dtype="f8", modules=names) for i in (1, 2)]
    cards.append(card("3", shape=(9, 7), rank=1, seed=3, dtype="f8", modules=("3.query",)))
    exact, cut = (merge(cards, strategy, rank=limit) for limit in (99, rank))
    changes = [delta(pair) for pair in exact.weights.values()]
    values = np.stack([np.linalg.svd(change, compute_uv=False) ** 2 for change in changes])
    told, shares = cut.metadata["merge"], np.cumsum(values.sum(0)) / values.sum()
    assert told["kept"] == pytest.approx(values[:, :rank].sum() / values.sum(), rel=1e-9)
    assert told["rank_90"] == next(i for i, share in enumerate(shares, 1) if share >= 0.9)
    assert told["kept"] < 0.9
    assert "kept" not in exact.metadata["merge"]


@requirement("R25.3")
def test_a_merge_says_after_each_module_how_far_it_is():
    calls = []
    cards = [card("docs", modules=("b", "a")), card("law", seed=1, modules=("b", "c"))]
    merge(cards, on_module=lambda *call: calls.append(call))
    assert calls == [("a", 1, 3), ("b", 2, 3), ("c", 3, 3)]
