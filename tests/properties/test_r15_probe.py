"""R15: layers ranked without gradients, zones of the hottest, and what separates two models."""

from fractions import Fraction
from itertools import pairwise

import hypothesis.extra.numpy as hnp
import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lora.evolution.probe import (
    SCORES,
    WeightMapProbe,
    changes,
    hot_zones,
    rank_correlation,
    ranking,
    scores_of,
    squares,
    turns,
    wanda,
)
from lora.testing.plugin import requirement
from lora.testing.strategies import dtypes, features, integers, names, numbers
from lora.testing.tolerance import gamma, roundoff

F64 = np.dtype(np.float64)
WIDTH = 4
tokens = st.integers(0, 12)
MASSES = st.floats(0, 4, width=16) | st.sampled_from([0.0, 0.1, 1.0, 5e-324, 1.7e308])
scores = st.dictionaries(names, MASSES, max_size=8)
shares = st.floats(0, 1, exclude_min=True) | st.sampled_from([0.1, 0.5, 0.7, 0.9, 1.0, 5e-324])
texts = st.lists(st.text("abcd", min_size=1, max_size=6), min_size=1, max_size=5)


class Branch(nn.Module):
    """A block with planted scores: its Linear sees the input times a gain, the input is turned."""

    def __init__(self, weight, gain, angle):
        super().__init__()
        self.dense = nn.Linear(WIDTH, len(weight), bias=False)
        self.dense.weight.data = torch.from_numpy(weight)
        turn = torch.eye(WIDTH, dtype=torch.float64)
        cos, sin = np.cos(angle), np.sin(angle)
        turn[:2, :2] = torch.tensor([[cos, -sin], [sin, cos]])
        self.gain, self.turn = gain, turn

    def forward(self, x):
        self.dense(x * self.gain)
        return x @ self.turn.T


class Letters(nn.Module):
    """A positive vector for each letter a to d, through the blocks, averaged; zeros are padding."""

    def __init__(self, table, branches):
        super().__init__()
        self.table = torch.from_numpy(table)
        self.blocks = nn.ModuleList(branches)

    def encode(self, batch):
        longest = max(map(len, batch))
        x = torch.zeros(len(batch), longest, WIDTH, dtype=torch.float64)
        for row, text in enumerate(batch):
            x[row, : len(text)] = self.table[["abcd".index(letter) for letter in text]]
        for block in self.blocks:
            x = block(x)
        return x.sum(1) / torch.tensor([[len(text)] for text in batch])


@st.composite
def planted(draw):
    """A model, and the blocks that are hot: by weights, by weights times activations, by turning.

    Weights are within [1/2, 1], or [4, 8] where hot; inputs are multiplied by 64 where hot, so that
    half of a row's 1-norm times 64 is more than 8 of any other's of the same 2-norm; angles are
    below 1/10, or over 1 where hot.
    """
    count = draw(st.integers(2, 4))
    magnitude, wanda_, influence = hot = [draw(st.integers(0, count - 1)) for _ in range(3)]
    entries = st.floats(0.5, 1, width=16)
    table = draw(hnp.arrays(F64, (4, WIDTH), elements=entries))
    branches = []
    for index in range(count):
        shape = (draw(st.sampled_from([1, 2, 7, 40])), WIDTH)
        weight = draw(hnp.arrays(F64, shape, elements=entries))
        weight *= draw(hnp.arrays(F64, weight.shape, elements=st.sampled_from([-1.0, 1.0])))
        weight *= 8 if index == magnitude else 1
        angle = draw(st.floats(1, 3)) if index == influence else draw(st.floats(-0.1, 0.1))
        branches.append(Branch(weight, 64.0 if index == wanda_ else 1.0, angle))
    return Letters(table, branches), [f"blocks.{index}" for index in hot]


@st.composite
def layers(draw):
    """A weight of any dtype and its channels' norms."""
    shape = draw(st.tuples(features, features))
    norms = draw(hnp.arrays(F64, shape[1], elements=st.floats(0, 8, width=16)))
    return draw(numbers(draw(dtypes), shape)), norms


def bound(n):
    """Relative distance of two means of n products >= 0 in float64, summed in any order."""
    return 2 * gamma(n + 2, F64)


@requirement("R15.1")
@given(layers())
def test_wanda_is_the_mean_over_all_weights_with_and_without_activations(layer):
    weight, norms = layer
    for used in (norms, np.ones_like(norms)):
        products = [
            Fraction(abs(float(w))) * Fraction(n)
            for row in weight
            for w, n in zip(row, used, strict=True)
        ]
        result = wanda(weight, norms) if used is norms else wanda(weight)
        error = abs(Fraction(result) - sum(products) / len(products))
        assert error <= Fraction(bound(weight.size)) * sum(products)


@requirement("R15.1")
@given(layers(), st.integers(1, 5), st.integers(1, 5))
def test_a_layer_of_the_same_weights_repeated_is_as_hot(layer, down, across):
    weight, norms = layer
    tiled = np.tile(weight, (down, across)), np.tile(norms, across)
    once, many = wanda(weight, norms), wanda(*tiled)
    assert abs(once - many) <= bound(weight.size * down * across) * once


@requirement("R15.1")
@given(st.data(), st.integers(1, 4), tokens.filter(bool))
def test_influence_is_the_mean_of_1_less_the_cosine_whatever_the_lengths(data, width, count):
    x, y = (data.draw(integers(F64, (count, width))) for _ in range(2))
    assume(x.any(-1).all() and y.any(-1).all())
    lengths = np.sqrt((x * x).sum(-1).astype(np.longdouble) * (y * y).sum(-1))
    exact = (1 - (x * y).sum(-1) / lengths).mean()
    factors = st.sampled_from([1.0, 0.25, 3.0, 1e200, 1e-200])
    stretch = data.draw(hnp.arrays(F64, (2, count, 1), elements=factors))
    result = turns(x * stretch[0], y * stretch[1]).mean
    # Each direction is off by γ in each component, the square of a distance <= 2 by 4 times that.
    assert abs(result - exact) <= 4 * width * gamma(2 * width + count + 8, F64)
    assert 0 <= result <= 2 + 4 * width * gamma(2 * width + count + 8, F64)


@requirement("R15.1")
@given(st.data(), dtypes, features, tokens.filter(bool))
def test_a_block_that_only_passes_its_input_on_has_exactly_no_influence(data, dtype, width, count):
    x = data.draw(numbers(dtype, (count, width)))
    assert turns(x, x.copy()).mean == 0


@requirement("R15.1", "R15.2")
@given(planted(), texts)
def test_each_score_ranks_its_own_layer_first(model_and_hot, some):
    model, hot = model_and_hot
    result = WeightMapProbe(model).probe(some)
    for score, block in zip(SCORES, [*hot, hot[2]], strict=True):
        assert ranking(scores_of(result.blocks, score))[0] == block, score
    for score, block in zip(SCORES[:2], hot, strict=False):
        assert ranking(scores_of(result.layers, score))[0] == f"{block}.dense", score


@requirement("R15.2")
@given(
    st.lists(st.floats(0.5, 4, width=16), min_size=2, max_size=5, unique=True),
    st.permutations(range(5)),
    features,
)
def test_activations_count_channel_by_channel_where_large_meets_large(values, order, out):
    weight, norms = np.tile(np.sort(values), (out, 1)), np.sort(values)
    shuffled = norms[[i for i in order if i < len(values)]]
    assume((shuffled != norms).any())
    hot = {"a": wanda(weight, shuffled), "b": wanda(weight, norms)}
    assert ranking(hot)[0] == "b"


@requirement("R15.2")
@given(scores, st.data())
def test_a_score_above_all_others_is_first_and_order_is_by_score_then_name(result, data):
    order = ranking(result)
    assert sorted(order) == sorted(result)
    assert all((-result[a], a) < (-result[b], b) for a, b in pairwise(order))


@requirement("R15.3")
@given(scores, shares)
def test_zones_hold_the_share_and_one_layer_less_never_would(result, share):
    zones, masses = hot_zones(result, share), sorted(map(Fraction, result.values()), reverse=True)
    least = Fraction(str(share)) * sum(masses)
    assert sum((Fraction(result[name]) for name in zones), Fraction(0)) >= least
    assert not zones or sum(masses[: len(zones) - 1]) < least
    assert zones == ranking(result)[: len(zones)]


@requirement("R15.3")
@given(scores, shares, st.data())
def test_the_order_of_layers_changes_nothing(result, share, data):
    shuffled = dict(data.draw(st.permutations(list(result.items()))))
    assert hot_zones(shuffled, share) == hot_zones(result, share)


@requirement("R15.3")
@given(st.data(), dtypes, features, tokens.filter(bool))
def test_a_batch_split_changes_a_tally_no_more_than_sums_in_another_order(
    data, dtype, width, count
):
    x, y = (data.draw(numbers(dtype, (count, width))) for _ in range(2))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    for measure in (lambda part: squares(x[part]), lambda part: turns(x[part], y[part])):
        whole = measure(slice(None))
        parts = [measure(slice(a, b)) for a, b in pairwise([0, *cuts, count])]
        split = sum(parts[1:], start=parts[0])
        assert split.count == whole.count == count
        # turns: a row's own sums may be taken in another order too, each term of them at most 4
        alone = 0 if measure(slice(None)).total.shape else 4 * width * gamma(4 * width + 8, F64)
        assert (abs(split.mean - whole.mean) <= bound(count) * whole.mean + alone).all()


@requirement("R15.3")
@given(st.data(), dtypes, features, tokens.filter(bool))
def test_where_sums_are_exact_a_batch_split_changes_nothing(data, dtype, width, count):
    x = data.draw(integers(dtype, (count, width)))
    cut = data.draw(st.integers(0, count))
    split = squares(x[:cut]) + squares(x[cut:])
    np.testing.assert_array_equal(split.total, (x.astype(F64) ** 2).sum(0), strict=True)
    assert split.count == count


@requirement("R15.3", "R15.1")
@given(planted(), texts, st.data())
def test_padding_order_and_repetition_of_texts_change_nothing(model_and_hot, some, data):
    model, probe = model_and_hot[0], WeightMapProbe(model_and_hot[0])
    again = data.draw(st.permutations(some * 2))
    first, second = probe.probe(some, ablation=False), probe.probe(again, ablation=False)
    count = sum(map(len, again))
    for a, b in zip(first.layers + first.blocks, second.layers + second.blocks, strict=True):
        for score in SCORES[:3]:
            x, y = getattr(a, score) or 0.0, getattr(b, score) or 0.0
            assert abs(x - y) <= 2 * bound(count) * abs(x), score
    layers = {model.get_submodule(row.name): row for row in first.layers}
    letters = torch.cat([model.table[["abcd".index(c) for c in text]] for text in some])
    for block in model.blocks:  # the activations of the letters, and nothing else
        rms = np.sqrt(((letters.numpy() * block.gain) ** 2).mean(0))
        expected = wanda(block.dense.weight.detach().numpy(), rms)
        # Four turns of four-term products, then the mean of squares: relative to a length.
        error = (bound(count) + 8 * gamma(WIDTH * 4, F64)) * WIDTH * 8 * 64
        assert abs(layers[block.dense].wanda - expected) <= error
        letters = letters @ block.turn.T


@requirement("R15.4")
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), max_size=8))
def test_rank_correlation_is_that_of_mean_ranks_and_knows_no_scale(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]

    def mean_rank(values, value):
        places = [place for place, other in enumerate(sorted(values)) if other == value]
        return Fraction(sum(places), len(places))

    ranked = [[mean_rank(values, value) for value in values] for values in (a, b)]
    middle = Fraction(len(pairs) - 1, 2)
    left, right = ([rank - middle for rank in ranks] for ranks in ranked)
    spread = sum(x * x for x in left) * sum(y * y for y in right)
    result = rank_correlation(a, b)
    if not spread:
        assert result is None
        return
    expected = float(sum(x * y for x, y in zip(left, right, strict=True))) / float(spread) ** 0.5
    assert abs(result - expected) <= 4 * roundoff(F64)
    assert result == rank_correlation(b, a) == rank_correlation([2.0**x for x in a], b)
    assert result == -rank_correlation([-x for x in a], b)


@st.composite
def pairs_of_models(draw):
    """Whole-number weights that differ by matrices with one entry at most in each row and column.

    So each entry's magnitude is a singular value of ΔW, and nothing is rounded.
    """
    base, tuned, values = {}, {}, {}
    modules = st.sampled_from(["a.query", "b.query", "größe", "0.dense"])
    for name in draw(st.lists(modules, min_size=1, unique=True)):
        shape = draw(st.tuples(features, features))
        entries = draw(st.lists(st.integers(-9, 9).filter(bool), max_size=min(shape)))
        rows, columns = (draw(st.permutations(range(size)))[: len(entries)] for size in shape)
        delta = np.zeros(shape)
        delta[rows, columns] = entries
        base[f"{name}.weight"] = draw(integers(F64, shape))
        tuned[f"{name}.weight"] = base[f"{name}.weight"] + delta
        values[name] = (shape, sorted(map(abs, entries), reverse=True))
    assume(any(entries for _, entries in values.values()))
    return base, tuned, values


def share_bound(shape):
    """How far the share may lie from the exact one.

    A decomposition and a product of its factors are off by γ of a small multiple (12) of in · out
    in the norm (Higham, chapters 19 and 20), the error's square by 2 and less than 1 times that.
    """
    return 3 * gamma(12 * shape[0] * shape[1] + 12, F64)


@requirement("R15.5")
@given(pairs_of_models(), st.integers(1, 8))
def test_change_is_the_root_mean_square_and_held_the_energy_that_fits(pair, rank):
    base, tuned, values = pair
    result = changes(base, tuned, rank)
    moved = {name for name, (_, entries) in values.items() if entries}
    assert {row.name for row in result} == moved
    for row in result:
        shape, entries = values[row.name]
        exact = np.sqrt(sum(e * e for e in entries) / (shape[0] * shape[1]))
        assert abs(row.change - exact) <= bound(shape[0] * shape[1] + 4) * exact
        share = sum(e * e for e in entries[:rank]) / sum(e * e for e in entries)
        assert abs(row.held - share) <= share_bound(shape)
    assert all((-a.change, a.name) < (-b.change, b.name) for a, b in pairwise(result))


@requirement("R15.5")
@given(pairs_of_models(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_layer_that_repeats_its_weights_changes_as_much(pair, rank, down, across):
    base, tuned, values = pair
    tiled = [
        {name: np.tile(weight, (down, across)) for name, weight in model.items()}
        for model in (base, tuned)
    ]
    small, large = (
        {row.name: row for row in changes(*models, rank)} for models in ((base, tuned), tiled)
    )
    assert small.keys() == large.keys()
    for name, row in small.items():
        (rows, columns), _ = values[name]
        size = (rows * down, columns * across)
        assert abs(row.change - large[name].change) <= bound(size[0] * size[1] + 4) * row.change
        assert abs(row.held - large[name].held) <= 2 * share_bound(size)


@requirement("R15.5")
@given(st.data(), features, features, st.integers(1, 4))
def test_what_an_adapter_did_is_held_by_its_rank_whole(data, out, inner, rank):
    delta = data.draw(integers(F64, (out, rank))) @ data.draw(integers(F64, (rank, inner)))
    assume(delta.any())
    base = data.draw(integers(F64, (out, inner)))
    (row,) = changes({"query.weight": base}, {"query.weight": base + delta}, rank)
    assert abs(row.held - 1) <= share_bound((out, inner))


@requirement("R15.5")
@given(pairs_of_models(), st.integers(-900, 900))
def test_a_difference_of_any_scale_is_ranked_the_same(pair, exponent):
    base, tuned, _ = pair
    scaled = {name: np.ldexp(tuned[name] - base[name], exponent) for name in base}
    zero = {name: np.zeros_like(weight) for name, weight in base.items()}
    delta = {name: tuned[name] - base[name] for name in base}
    plain, moved = (changes(zero, model) for model in (delta, scaled))
    assert [row.name for row in plain] == [row.name for row in moved]
    assert [np.ldexp(row.change, exponent) for row in plain] == [row.change for row in moved]
