"""R20: what a merged card holds and says, in this implementation."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.card import LoRACard, LowRank
from lora.errors import ArgumentError, BaseModelError, TargetError
from lora.factors import delta
from lora.merging import OF_ONE_CARD, STRATEGIES, Average, Dare, Weighted, merge
from lora.testing.plugin import requirement
from lora.testing.strategies import dtypes

FINGERPRINT, OTHER = "0" * 64, "1" * 64
SEEDS = st.integers(0, 2**32)
RANKS = st.integers(1, 4)


def card(name="docs", *, rank=2, seed=0, shape=(6, 5), dtype="f4", modules=("0.query",), **fields):
    rng, weights = np.random.default_rng(seed), {}
    for module in modules:
        a, b = (
            rng.normal(size=size).astype(dtype) for size in ((shape[0], rank), (rank, shape[1]))
        )
        weights[module] = LowRank(a, b, 0.5)
    return LoRACard(name, rank, 1.0, ["query"], weights, **fields)


def with_scaling(card, scaling):
    pairs = {module: replace(pair, scaling=scaling) for module, pair in card.weights.items()}
    return replace(card, weights=pairs)


def card_of(pair, name="docs"):
    return LoRACard(name, pair.rank, 1.0, ["q"], {"q": pair})


two_cards = st.builds(
    lambda seed, first, second, dtype: (
        card("docs", seed=seed, rank=first, dtype=dtype),
        card("law", seed=seed + 1, rank=second, dtype=dtype),
    ),
    SEEDS,
    RANKS,
    RANKS,
    dtypes,
)


# ---- by which strategy, for which base model


@requirement("R20.1")
@given(cards=two_cards)
def test_a_strategy_may_be_named(cards):
    names = ["average", "weighted", "slerp", "ties", "dare", "task_arithmetic", "cat"]
    assert list(STRATEGIES) == names
    for name, kind in STRATEGIES.items():
        assert kind.__name__.lower() == name.replace("_", "")
        assert merge(cards, name) == merge(cards, kind())
    merged = merge(cards)
    assert merged == merge(cards, Average(), name="merged")
    assert merge(cards, name="both") == replace(merged, name="both")


@requirement("R20.9", "R1.13")
@given(cards=two_cards)
def test_cards_for_other_weights_of_the_same_modules_are_refused(cards):
    one, two = (replace(card, base_fingerprint=FINGERPRINT) for card in cards)
    assert merge([one, two]).base_fingerprint == FINGERPRINT
    assert merge([one, cards[1]]).base_fingerprint == FINGERPRINT
    message = "card 'law': base_fingerprint: expected 000.* as in card 'docs'"
    with pytest.raises(BaseModelError, match=message):
        merge([one, replace(two, base_fingerprint=OTHER)])
    elsewhere = card("law", modules=("1.query",), base_fingerprint=OTHER)
    merged = merge([one, elsewhere])  # a fingerprint of other modules says nothing
    assert list(merged.weights) == ["0.query", "1.query"]
    assert merged.base_fingerprint is None


@requirement("R26.7", "R20.9", "R20.10", "R1.13")
@given(cards=two_cards, what=st.sampled_from(["model", "revision"]))
def test_bases_of_several_names_or_revisions_need_one_name_or_one_fingerprint(cards, what):
    def of(card, value, **fields):
        if what == "model":
            return replace(card, base_model=value, **fields)
        return replace(card, base_model="base", metadata={"peft": {"revision": value}}, **fields)

    docs, law = cards
    named = [of(docs, "v2"), of(law, "v1")]
    message = rf"base {what}s: expected one, found \['v1', 'v2'\].*name it: `base_model=...`"
    with pytest.raises(BaseModelError, match=message):
        merge(named)
    assert merge(named, base_model="one").base_model == "one"
    assert merge([named[0], of(law, "v2")]).base_model == ("v2" if what == "model" else "base")
    assert merge([named[0], law]).base_model == named[0].base_model
    proven = [replace(card, base_fingerprint=FINGERPRINT) for card in named]
    merged = merge(proven)
    assert merged.base_fingerprint == FINGERPRINT
    assert merged.base_model == (None if what == "model" else "base")
    with pytest.raises(BaseModelError, match="base_fingerprint: expected 0000"):
        merge([proven[0], replace(proven[1], base_fingerprint=OTHER)], base_model="one")


# ---- what a merged card holds


@requirement("R20.3", "R20.4")
@given(seed=SEEDS, rank=RANKS, dtype=dtypes)
def test_what_comes_from_one_card_keeps_that_cards_factors(seed, rank, dtype):
    one = card("docs", seed=seed, rank=rank, dtype=dtype)
    other = card("law", seed=seed, dtype=dtype, modules=("1.query",))
    assert merge([one]).weights == one.weights
    half = merge([one, other]).weights["0.query"]
    assert np.array_equal(half.A, one.weights["0.query"].A)
    assert half.scaling == one.weights["0.query"].scaling / 2
    assert merge([one, replace(one, name="twin")]).weights == one.weights


@requirement("R20.3")
@given(seed=SEEDS, strategy=st.sampled_from(["average", "cat", "ties"]))
def test_the_order_of_cards_of_one_name_changes_no_bit(seed, strategy):
    versions = [card("docs", seed=seed + i, rank=i + 1) for i in range(4)]
    assert merge(versions, strategy) == merge(versions[::-1], strategy)


@requirement("R20.8")
@given(cards=two_cards, strategy=st.sampled_from(["task_arithmetic", "weighted", "cat", "ties"]))
def test_where_nothing_is_left_there_is_no_row(cards, strategy):
    nothing = merge([cards[0], replace(cards[0], name="twin")], strategy, [1, -1])
    assert (dict(nothing.weights), nothing.rank, nothing.target_modules) == ({}, 1, ("query",))
    assert nothing.metadata["merge"]["error"] == {"0.query": 0.0}


@requirement("R20.8")
@given(seed=SEEDS)
def test_a_card_less_another_factorisation_of_itself_leaves_nothing(seed):
    pair = card(seed=seed, dtype=np.float64).weights["0.query"]
    turn, _ = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(2, 2)))
    twin = card_of(LowRank(pair.A @ turn, turn.T @ pair.B, 0.5), "twin")
    assert not merge([card_of(pair), twin], "task_arithmetic", [1, -1]).weights


@requirement("R20.4")
@given(seed=SEEDS)
def test_merged_factors_are_balanced_and_their_scaling_is_explicit(seed):
    cards = [card(name, seed=seed + rank, rank=rank) for name, rank in (("docs", 2), ("law", 3))]
    merged = merge(cards, "weighted", [3.0, 0.01])
    pair = merged.weights["0.query"]
    assert merged.rank == pair.rank == 5
    assert merged.alpha == 5.0
    assert pair.scaling == 2.0 ** round(np.log2(pair.scaling))
    gram_a, gram_b = pair.A.T.astype("f8") @ pair.A, pair.B.astype("f8") @ pair.B.T
    assert np.allclose(gram_a, gram_b, atol=6 * 2**-24 * np.trace(gram_a))


@requirement("R20.4")
@given(seed=SEEDS, size=st.sampled_from([2.0**-120, 2.0**120]))
def test_changes_far_from_one_survive_in_narrow_dtypes(seed, size):
    pairs = [card(dtype=np.float16, seed=seed + i).weights["0.query"] for i in (0, 1)]
    cards = [
        card_of(replace(pair, scaling=size), name) for name, pair in zip("ab", pairs, strict=True)
    ]
    merged = delta(merge(cards, "task_arithmetic").weights["q"], dtype=np.float64) / size
    want = sum(delta(replace(pair, scaling=1.0), dtype=np.float64) for pair in pairs)
    assert abs(merged - want).max() <= 4 * 2**-11 * np.linalg.svd(want, compute_uv=False).sum()


@requirement("R20.1")
@given(cards=two_cards)
def test_cat_keeps_every_a_as_it_is_and_puts_the_weights_into_b(cards):
    merged = merge(cards[::-1], "cat", [1.0, 4.0]).weights["0.query"]
    docs, law = (card.weights["0.query"] for card in cards)
    assert np.array_equal(merged.A, np.hstack([docs.A, law.A]))
    assert np.array_equal(merged.B, np.vstack([docs.B, law.B / 4]))
    assert merged.scaling == 2.0


@requirement("R20.6", "R20.7")
@given(seed=SEEDS, strategy=st.sampled_from(["ties", "dare"]))
def test_entrywise_merges_have_the_largest_rank_of_their_parents_unless_told(seed, strategy):
    cards = [card(name, seed=seed + rank, rank=rank) for name, rank in (("docs", 2), ("law", 3))]
    assert merge(cards, strategy).rank == 3
    assert merge(cards, strategy, rank=1).rank == 1
    assert 3 <= merge(cards, strategy, rank=99).rank <= 5  # 5, unless what is kept leaves out a row


@requirement("R20.6")
@given(cards=two_cards, size=st.sampled_from([2.0**-1060, 2.0**-1000, 2.0**1023]))
def test_weights_of_any_size_give_ties_the_same_mean(cards, size):
    assert merge(cards, "ties", [size, size]).weights == merge(cards, "ties").weights


@requirement("R20.7")
@given(value=st.sampled_from([1.0, -3.0, 0.5]))
def test_a_mask_is_the_same_on_every_machine(value):
    pair = LowRank(np.full((4, 1), value), np.ones((1, 4)), 1.0)
    merged = merge([card_of(pair)], Dare(0.5, seed=0), rank=4)
    kept = (abs(delta(merged.weights["q"])) > abs(value)).astype(int)
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
@given(place=st.sampled_from(["encoder", "model.encoder", "1"]))
def test_names_of_which_one_may_mean_the_other_are_not_merged(place):
    module = f"{place}.0.query"
    short, long = card("short"), card("long", modules=(module,), seed=1)
    message = f"'{module}': expected names of one form.*'0.query' in card 'short'"
    for pair in ((short, long), (long, short)):
        with pytest.raises(TargetError, match=message):
            merge(pair)
    other = card("other", modules=("10.query",))
    assert set(merge([short, other]).weights) == {"0.query", "10.query"}
    both = card("both", modules=("0.query", module))  # its own affair
    assert set(merge([both, short]).weights) == set(both.weights)


# ---- what the merged card says


words = st.sets(st.sampled_from("abcdef"), max_size=4).map(sorted)


@requirement("R20.10")
@given(common=words, tags=st.tuples(words, words), author=st.text(max_size=3))
def test_what_all_cards_say_is_kept_and_nothing_else(common, tags, author):
    docs = {
        "description": "of Python",
        "tags": tags[0],
        "peft": {"task_type": "CAUSAL_LM", "lora_dropout": 0.1, "revision": None},
        "author": author,
        "words": common,
        "version": "1.0.0",
        "quality": 0.5,
    }
    law = {
        **docs,
        "description": "of law",
        "tags": tags[1],
        "peft": {"task_type": "CAUSAL_LM", "lora_dropout": 0.2},
    }
    cards = [card("docs", metadata=docs), card("law", seed=1, metadata=law)]
    metadata = dict(merge(cards).metadata)
    assert set(metadata.pop("merge")) == {"strategy", "options", "parents", "error"}
    shared = [tag for tag in tags[0] if tag in tags[1]]
    assert metadata.pop("tags", []) == shared
    assert metadata.pop("words", []) == common
    assert metadata == {"peft": {"task_type": "CAUSAL_LM"}, "author": author}
    single = dict(merge(cards[:1]).metadata)
    assert single.pop("merge")["parents"][0]["name"] == "docs"
    assert single == {key: value for key, value in docs.items() if key not in OF_ONE_CARD}
    assert {"version", "quality", "created", "modified", "extract", "merge"} == OF_ONE_CARD


@requirement("R20.10")
@given(
    seed=SEEDS,
    cut=st.sampled_from([("ties", 2), ("dare", 1), ("average", 2)]),
)
def test_the_share_that_is_kept_and_the_rank_for_90_percent_are_those_of_the_dense_change(
    seed, cut
):
    (strategy, rank), names = cut, ("0.query", "1.query", "2.query")
    cards = [
        card(f"{i}", shape=(9, 7), rank=4, seed=seed + i, dtype="f8", modules=names) for i in (1, 2)
    ]
    cards.append(card("3", shape=(9, 7), rank=1, seed=seed, dtype="f8", modules=("3.query",)))
    exact, cut = (merge(cards, strategy, rank=limit) for limit in (99, rank))
    changes = [delta(pair) for pair in exact.weights.values()]
    values = np.stack([np.linalg.svd(change, compute_uv=False) ** 2 for change in changes])
    record, shares = cut.metadata["merge"], np.cumsum(values.sum(0)) / values.sum()
    assert record["kept"] == pytest.approx(values[:, :rank].sum() / values.sum(), rel=1e-9)
    assert record["rank_90"] == next(i for i, share in enumerate(shares, 1) if share >= 0.9)
    assert "kept" not in exact.metadata["merge"]


@requirement("R25.3")
@given(first=words, second=words)
def test_a_merge_says_after_each_module_how_far_it_is(first, second):
    calls = []
    cards = [card("docs", modules=first), card("law", seed=1, modules=second)]
    merge(cards, on_module=lambda *call: calls.append(call))
    modules = sorted({*first, *second})
    assert calls == [(each, i + 1, len(modules)) for i, each in enumerate(modules)]


# ---- what it refuses, by name


@requirement("R20.1", "R7.8")
@given(cards=two_cards, place=st.integers(0, 1), bad=st.sampled_from([np.nan, np.inf, "1", None]))
def test_a_weight_that_is_no_finite_number_is_named(cards, place, bad):
    weights = [1.0, 1.0]
    weights[place] = bad
    with pytest.raises(ArgumentError, match=f"merge: weight {place}: expected a finite number"):
        merge(cards, "weighted", weights)
    for wrong in (cards[0], 7):
        with pytest.raises(ArgumentError, match="merge: cards: expected a list of cards"):
            merge(wrong)
        with pytest.raises(ArgumentError, match="merge: weights: expected a list of numbers"):
            merge(cards, "weighted", 7 if wrong == 7 else {0: 1.0, 1: 1.0})


@requirement("R20.1", "R7.8")
@given(cards=two_cards, strategy=st.sampled_from(["weighted", "cat", "dare", "task_arithmetic"]))
def test_an_overflow_names_the_module_or_the_weights(cards, strategy):
    large = [with_scaling(each, 1e10) for each in cards]
    with pytest.raises(ArgumentError, match=r"module '0\.query': expected a ΔW within float64"):
        merge(large, strategy, [1e308, 1e308])
    with pytest.raises(ArgumentError, match="module 'all': expected a ΔW within float64"):
        merge([with_scaling(each, 1e307) for each in large], "slerp")
    twin, mean = replace(cards[0], name="twin"), Weighted(normalize=True)
    with pytest.raises(ArgumentError, match="merge: sum of weights: expected a finite number"):
        merge(cards, mean, [1e308, 1e308])
    with pytest.raises(ArgumentError, match="merge: weights over their sum: expected a finite"):
        merge([*cards, twin], mean, [1e308, -1e308, 1e-300])
