"""R20: merging: several cards become one, by their ΔW."""

import copy
from dataclasses import asdict, replace
from functools import partial

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora.merging import STRATEGIES, content_digest, merge
from lora.testing.binding import Lacks, PlainCard, PlainPair
from lora.testing.domains import limit
from lora.testing.plugin import requirement
from lora.testing.reference import card_of, plain_of
from lora.testing.strategies import ALIKE, dtypes, features, integers, numbers, ranks
from lora.testing.tolerance import accumulator, gamma, roundoff, underflow

F64 = np.dtype(np.float64)
MODULES = ["encoder.0.query", "encoder.0.value", "encoder.11.query"]
FULL = 7  # no module of `features` has a larger rank
OPTIONS = {
    "average": [{}],
    "weighted": [{"normalize": False}, {"normalize": True}],
    "task_arithmetic": [{}],
    "cat": [{}],
    "ties": [{"density": 0.5, "elect": "mass"}, {"density": 0.75, "elect": "count"}],
    "dare": [{"density": 0.5, "seed": 7}],
}
DENSE = ["ties", "dare"]
LINEAR = [strategy for strategy in OPTIONS if strategy not in DENSE]
ANY = [*LINEAR, *DENSE]
POSITIVE = [1.0, 2.0, 0.5, 3.0]
SIGNED = [*POSITIVE, -1.0, -0.5, 0.0]
DENSITIES = st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.9, 1.0]) | st.floats(0.001, 1)
WIDTHS = [8, 16, 31, 32, 53, 63]
SEEDS = st.integers(0, 2**31) | st.sampled_from([2**width + 1 for width in WIDTHS])
WIDE_RANKS = st.sampled_from([2**8 + 1, 2**16 + 1])
SCALINGS = st.sampled_from([1.0, 2.0, -0.5, 0.25] * 2 + [2.0**-24])
CHANCE = 1e-9
"""How often an honest implementation may fail an example by chance."""


def each(*strategies, examples=10, convention=""):
    """A property of each of these strategies, with its share of the examples, or so many; of one
    it may be a convention of ours, where it is a law of the others.
    """
    marks = {convention: [requirement(kind="convention")]}
    values = [pytest.param(name, marks=marks.get(name, [])) for name in strategies]

    def decorated(test):
        fewer = settings(max_examples=max(examples, settings.default.max_examples // 3))
        return pytest.mark.parametrize("strategy", values)(fewer(test))

    return decorated


# ---- cards, small enough for every ΔW to be formed; whole numbers and powers of two: exactly, in
# any dtype


def elements(dtype, shape, *, whole):
    """A factor: with edges and equal entries, as Hypothesis likes them, or of full rank."""

    def spread(seed):
        rng = np.random.default_rng(seed)
        return (rng.integers(-3, 4, shape) if whole else rng.uniform(-4, 4, shape)).astype(dtype)

    return (integers if whole else numbers)(dtype, shape) | st.integers(0, 2**32).map(spread)


@st.composite
def one(draw, name, shapes, *, dtype=F64, whole=True, inner=None, scalings=SCALINGS):
    """A card with these modules ``(in, out)``; of no stated ranks, it goes beside any other."""
    if inner is None and limit("merge", "cards", None) == "alike":
        raise Lacks("merge is declared without cards of other dtypes")
    inner, weights = (ranks if inner is None else inner), {}
    for module, (rows, columns) in shapes.items():
        rank = draw(inner)
        a = draw(elements(dtype, (rows, rank), whole=whole))
        b = draw(elements(dtype, (rank, columns), whole=whole))
        weights[module] = PlainPair(a, b, draw(scalings))
    return card_with(name, weights)


@st.composite
def several(draw, *, least=1, most=4, dtype=F64, whole=True, everywhere=True):
    """Cards of different or of one rank, unless `everywhere` of different modules; of one dtype
    unless that is None. They are alike where the binding under test merges no others.
    """
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=2, unique=True))
    shapes, cards = {module: (draw(features), draw(features)) for module in modules}, []
    inner, kinds, scalings = draw(st.just(ranks) | ranks.map(st.just)), dtypes, SCALINGS
    if limit("merge", "cards", None) == "alike":
        inner, kinds, scalings = (st.just(draw(each)) for each in (ranks, dtypes, SCALINGS))
        everywhere = True
    known = st.lists(st.sampled_from("abcdef"), min_size=least, max_size=most, unique=True)
    for name in draw(known):
        held = modules if everywhere else draw(st.lists(st.sampled_from(modules), unique=True))
        own = dtype or draw(kinds)
        own_shapes = {module: shapes[module] for module in held}
        options = {"dtype": own, "whole": whole, "inner": inner, "scalings": scalings}
        cards.append(draw(one(name, own_shapes, **options)))
    return cards


def card_with(name, weights):
    largest = max((pair.A.shape[1] for pair in weights.values()), default=1)
    targets = tuple(sorted({module.rpartition(".")[2] for module in weights}))
    return PlainCard(name, largest, float(largest), targets, weights, {}, {})


def shapes_of(cards):
    """Module -> ``(out, in)``, of all cards."""
    return {
        m: (pair.B.shape[1], pair.A.shape[0]) for card in cards for m, pair in card.weights.items()
    }


def change(card, module, shape):
    """ΔW, 0 where the card has no such module; a scaling of None stands for alpha / rank."""
    if module not in card.weights:
        return np.zeros(shape)
    a, b, scaling = card.weights[module]
    factor = card.alpha / card.rank if scaling is None else scaling
    return (a.astype(F64) @ b.astype(F64)).T * factor


def flat(card, shapes):
    """ΔW of all modules as one vector, with a 0 in front, lest it be empty."""
    parts = [change(card, module, shape).ravel() for module, shape in sorted(shapes.items())]
    return np.concatenate([[0.0], *parts])


def scaled(card, factor):
    """The card with another ΔW: `factor` times it."""
    pairs = {m: pair._replace(scaling=pair.scaling * factor) for m, pair in card.weights.items()}
    return card._replace(weights=pairs)


def of_one_name(cards):
    """The cards under one name, if the binding under test merges such."""
    if limit("merge", "cards", None) == "alike":
        return cards
    return [card._replace(name="a") for card in cards]


def weights_for(draw, strategy, cards, choice=POSITIVE):
    """Weights where the strategy takes them."""
    if strategy in {"average", "slerp"}:
        return None
    return [draw(st.sampled_from(choice)) for _ in cards]


def choose(data, cards, strategy, choice=POSITIVE):
    """Options, weights where the strategy takes them, and a rank at which nothing is lost."""
    allowed = limit("merge", "strategies", {}).get(strategy, {})
    known = [o for o in OPTIONS[strategy] if all(o.get(k) in allowed.get(k, [o.get(k)]) for k in o)]
    options = data.draw(st.sampled_from(known or OPTIONS[strategy]))
    rank = FULL if strategy in DENSE else None
    return options, weights_for(data.draw, strategy, cards, choice), rank


def applied(strategy, options, weights, count):
    """What each card is multiplied with, or the largest that any of its entries is."""
    if strategy == "average":
        return [1 / count] * count
    if options.get("normalize", False):
        return [weight / sum(weights) for weight in weights]
    if strategy == "ties":
        return [1.0] * count
    return [weight / options.get("density", 1) for weight in weights]


def total(cards, factors, module, shape):
    return sum(change(c, module, shape) * factor for c, factor in zip(cards, factors, strict=True))


def size_of(cards, factors, module):
    """Σ |factor · scaling| ‖A‖ ‖B‖: nothing on the way to the merged ΔW is larger."""
    size, magnitude = 0, 0
    for card, factor in zip(cards, factors, strict=True):
        if module in card.weights:
            *pair, scaling = card.weights[module]
            a, b = (np.linalg.norm(part.astype(F64)) for part in pair)
            f = abs(factor * scaling)
            size, magnitude = size + f * a * b, magnitude + (1 + f) * (1 + a) * (1 + b)
    return size, magnitude


def allowed(merged, cards, factors, module, shape):
    """Largest admissible ‖ΔW - exact‖ of a module (Frobenius).

    An orthogonal transformation of an n × k matrix moves it by no more than γ(c·n·k) of its norm,
    in the accumulator (Higham, theorem 19.4): QR of both stacks, an SVD and the products with its
    vectors make 6. The factors are rounded to the dtype; as ``‖|A||B|‖ ≤ √k · size`` for balanced
    and for stacked ones, that costs (2u + u²) of it.
    """
    dtype = dtype_of(merged, cards)
    inner = sum(card.weights[module].A.shape[1] for card in cards if module in card.weights)
    inner += min(shape)
    size, magnitude = size_of(cards, factors, module)
    u, k = roundoff(dtype), np.sqrt(min(shape))
    steps = gamma(6 * sum(shape) * inner, accumulator(dtype))
    lost = 2 * underflow(dtype) * inner * np.sqrt(np.prod(shape)) * magnitude
    return (2 * u + u * u + steps) * k * size + lost


def dtype_of(merged, cards):
    """The merged card's, or where it holds nothing the widest it could have."""
    return next((pair.A.dtype for card in (merged, *cards) for pair in card.weights.values()), F64)


def assert_near(merged, want, cards, factors):
    """Every module's ΔW is what it should be."""
    shapes = shapes_of(cards)
    assert set(merged.weights) <= set(shapes)
    for module, shape in shapes.items():
        apart = np.linalg.norm(change(merged, module, shape) - want(module, shape))
        assert apart <= allowed(merged, cards, factors, module, shape), module


def assert_same(first, second, cards, factors, others=None, *, moved=None):
    """Two merges of cards have one ΔW, up to what their merging rounds and what was `moved`."""
    merged = [*first.weights.values(), *second.weights.values()]
    assert len({pair.A.dtype for pair in merged}) <= 1
    for module, shape in shapes_of(cards).items():
        apart = np.linalg.norm(change(first, module, shape) - change(second, module, shape))
        off = sum(allowed(first, some, factors, module, shape) for some in (cards, others or cards))
        assert apart <= off + (moved(module, shape) if moved else 0.0), module


def assert_card(card):
    """It is one: the largest rank of its modules, a positive alpha, one dtype, scalings."""
    inner = [pair.A.shape[1] for pair in card.weights.values()]
    assert card.rank == max(inner, default=card.rank) >= 1
    assert 0 < card.alpha < np.inf
    assert len({part.dtype for pair in card.weights.values() for part in pair[:2]}) <= 1
    for pair in card.weights.values():
        assert pair.A.shape[1] == len(pair.B)
        assert pair.A.shape[1] == card.rank if pair.scaling is None else np.isfinite(pair.scaling)


def refuses(impl, *args):
    try:
        impl.merge(*args)
    except Exception:  # noqa: BLE001 - any exception counts as a refusal
        return True
    return False


# ---- R20.1 the strategies


@requirement("R20.1", kind="convention")
@each(*ANY)
@given(cards=several(most=3), data=st.data())
def test_a_strategy_is_a_value_which_gives_the_same_card_whenever_it_is_asked(
    impl, strategy, cards, data
):
    options, weights, rank = choose(data, cards, strategy)
    copies = copy.deepcopy(cards)
    first = impl.merge(cards, strategy, options, weights, rank)
    seed = {"seed": 1} if strategy == "dare" else {}
    impl.merge(cards[:1], strategy, {**options, **seed}, None, rank)
    again = impl.merge(cards, strategy, options, weights, rank)
    for before, after in zip([first, *copies], [again, *cards], strict=True):
        for module, pair in before.weights.items():
            assert np.array_equal(pair.A, after.weights[module].A)
            assert np.array_equal(pair.B, after.weights[module].B)


@requirement("R20.1", kind="convention")
@given(cards=several(), data=st.data())
def test_normalised_weights_are_divided_by_their_sum(impl, cards, data):
    weights = weights_for(data.draw, "weighted", cards, SIGNED)
    assume(sum(weights) != 0)
    merged = impl.merge(cards, "weighted", {"normalize": True}, weights, None)
    factors = [weight / sum(weights) for weight in weights]
    assert_near(merged, lambda m, shape: total(cards, factors, m, shape), cards, factors)
    merged = impl.merge(cards, "weighted", {"normalize": False}, weights, None)
    assert_near(merged, lambda m, shape: total(cards, weights, m, shape), cards, weights)


@requirement("R20.1", kind="convention")
@pytest.mark.parametrize("elect", ["mass", "count"])
@given(big=st.integers(3, 9), sign=st.sampled_from([1.0, -1.0]))
def test_one_large_entry_wins_by_mass_and_two_small_ones_win_by_count(impl, elect, big, sign):
    values = {"a": big * sign, "b": -sign, "c": -sign}
    cards = [
        card_with(name, {"m": PlainPair(np.array([[value]]), np.array([[1.0]]), 1.0)})
        for name, value in values.items()
    ]
    merged = impl.merge(cards, "ties", {"density": 1.0, "elect": elect}, None, None)
    want = np.array([[values["a" if elect == "mass" else "b"]]])
    assert_near(merged, lambda _m, _s: want, cards, [1.0] * 3)


WRONG = {
    "linear-ish": [({}, None, None)],
    "average": [({"density": 0.5}, None, None), ({}, None, 0)],
    "weighted": [
        ({}, [1.0], None),
        ({}, [1.0, float("nan")], None),
        ({"normalize": True}, [1.0, -1.0], None),
    ],
    "ties": [({"elect": "median"}, None, None), ({"density": 0.0}, None, None)],
    "dare": [({"density": 0.0}, None, None)],
}
"""Options, weights and a rank that a strategy refuses, with two cards."""


@requirement("R20.1", kind="refusal")
@each(*WRONG, "slerp")
@given(
    cards=several(least=2, most=2),
    bad=st.sampled_from([-0.5, 1.5, float("nan"), float("inf")]),
)
def test_what_is_no_strategy_no_option_or_no_weight_is_refused(impl, strategy, cards, bad):
    for wrong in WRONG.get(strategy, []):
        assert refuses(impl, cards, strategy, *wrong)
    if strategy in DENSE:
        assert refuses(impl, cards, strategy, {"density": bad}, None, None)
    if strategy == "slerp":
        assert refuses(impl, cards, strategy, {"t": bad}, None, None)
        assert refuses(impl, [*cards, cards[0]._replace(name="third")], strategy, {}, None, None)
    assert refuses(impl, [], strategy, {}, None, None)


@requirement("R20.1", kind="refusal")
@each(*ANY)
@given(cards=several(most=3), bad=st.sampled_from([float("nan"), float("inf")]), data=st.data())
def test_factors_that_are_not_finite_are_refused(impl, strategy, cards, bad, data):
    simplest = card_with("a", {"m": PlainPair(np.ones((1, 1)), np.full((1, 1), bad), 1.0)})
    assert refuses(impl, [simplest], strategy, {}, None, None)
    options, *_ = choose(data, cards, strategy)
    module, pair = next(iter(cards[0].weights.items()))
    spoilt = pair._replace(B=np.full_like(pair.B, bad))
    cards[0] = cards[0]._replace(weights={**cards[0].weights, module: spoilt})
    assert refuses(impl, cards, strategy, options, None, None)


# ---- R20.2 by ΔW alone


def turned(card, turn):
    """The card with factors A M and M⁻¹ B."""
    weights = {}
    for module, (a, b, scaling) in card.weights.items():
        m, inverse = turn(a.shape[1])
        turned_a, turned_b = a.astype(F64) @ m, inverse @ b.astype(F64)
        weights[module] = PlainPair(turned_a.astype(a.dtype), turned_b.astype(b.dtype), scaling)
    return card._replace(weights=weights)


def widened(card):
    """The card with one column more in A, which no row of B takes up."""
    weights = {
        module: PlainPair(
            np.hstack([a, np.ones_like(a[:, :1])]),
            np.vstack([b, np.zeros_like(b[:1])]),
            card.alpha / card.rank if scaling is None else scaling,
        )
        for module, (a, b, scaling) in card.weights.items()
    }
    return card._replace(rank=card.rank + 1, weights=weights)


def exactly(rng):
    """M: columns exchanged, doubled or halved, negated, and added to each other; so small that no
    dtype rounds.
    """

    def turn(rank):
        m = np.eye(rank)[rng.permutation(rank)] * rng.choice([-2.0, -1.0, 0.5, 1.0, 2.0], rank)
        inverse = np.zeros_like(m)
        np.divide(1, m.T, out=inverse, where=m.T != 0)
        if rank > 1:
            shear = np.eye(rank)
            shear[0, rank - 1] = rng.choice([-1.0, 1.0, 2.0])
            m, inverse = m @ shear, (2 * np.eye(rank) - shear) @ inverse
        return m, inverse

    return turn


def roughly(rng):
    """M: any whole numbers with a determinant of at least 1."""

    def turn(rank):
        m = rng.integers(-3, 4, (rank, rank)).astype(F64)
        while abs(np.linalg.det(m)) < 0.5:
            m = rng.integers(-3, 4, (rank, rank)).astype(F64)
        return m, np.linalg.inv(m)

    return turn


@requirement("R20.2", kind="law")
@each(*ANY)
@given(cards=several(dtype=None, everywhere=False), seed=st.integers(0, 2**32), data=st.data())
def test_every_factorisation_of_one_change_gives_the_same_merge(impl, strategy, cards, seed, data):
    options, weights, rank = choose(data, cards, strategy)
    turn = exactly(np.random.default_rng(seed))  # each factor by another M
    others = [widened(turned(card, turn)) for card in cards]
    shapes = shapes_of(cards)
    for card, other in zip(cards, others, strict=True):
        assert np.array_equal(flat(card, shapes), flat(other, shapes))
    factors = applied(strategy, options, weights, len(cards))
    first, second = (impl.merge(some, strategy, options, weights, rank) for some in (cards, others))
    assert_same(first, second, cards, factors, others)


@requirement("R20.2", kind="law")
@each(*LINEAR)
@given(cards=several(), seed=st.integers(0, 2**32), data=st.data())
def test_any_change_of_factors_moves_the_merge_by_what_it_rounds(impl, strategy, cards, seed, data):
    options, weights, _ = choose(data, cards, strategy)
    turn = roughly(np.random.default_rng(seed))
    others = [turned(card, turn) for card in cards]
    factors = applied(strategy, options, weights, len(cards))
    first, second = (impl.merge(some, strategy, options, weights, None) for some in (cards, others))

    def moved(module, shape):
        return np.linalg.norm(
            total(cards, factors, module, shape) - total(others, factors, module, shape)
        )

    assert_same(first, second, cards, factors, others, moved=moved)


# ---- R20.3 identity, idempotence, symmetry, scaling


@requirement("R20.3", kind="law")
@each(*ANY, examples=400)  # few cards tell float64 from float32
@given(cards=several(most=1, dtype=None, whole=False), data=st.data())
def test_the_merge_of_one_card_is_that_card(impl, strategy, cards, data):
    options, *_ = choose(data, cards, strategy)
    options = options | ({"density": 1.0} if strategy in DENSE else {})
    merged = impl.merge(cards, strategy, options, None, None)
    assert_near(merged, lambda m, shape: change(cards[0], m, shape), cards, [1.0])
    assert merged.rank <= cards[0].rank


@requirement("R20.3", kind="law")
@settings(max_examples=200)  # few cards tell float64 from float32
@given(cards=several(most=1, dtype=None), count=st.integers(2, 5), seed=st.integers(0, 2**32))
def test_the_average_of_equal_cards_is_that_card(impl, cards, count, seed):
    rng = np.random.default_rng(seed)
    for same in ([cards[0]] * count, [cards[0]._replace(name=f"{i}") for i in range(count)]):
        merged = impl.merge(same, "average", {}, None, None)
        assert_near(merged, lambda m, shape: change(cards[0], m, shape), same, [1 / count] * count)
    wide = turned(cards[0], exactly(rng))
    shapes = shapes_of(cards)
    assert np.array_equal(flat(wide, shapes), flat(cards[0], shapes))
    merged = impl.merge([cards[0], wide], "average", {}, None, None)
    assert_near(merged, lambda m, shape: change(cards[0], m, shape), [cards[0], wide], [0.5, 0.5])


@requirement("R20.3", kind="law")
@each(*ANY, convention="dare")  # a mask is of the card's name, wherever the card stands
@given(cards=several(least=2, dtype=None, everywhere=False), data=st.data())
def test_the_order_in_which_cards_are_given_changes_nothing(impl, strategy, cards, data):
    options, weights, rank = choose(data, cards, strategy)
    order = data.draw(st.permutations(range(len(cards))))
    shuffled = None if weights is None else [weights[i] for i in order]
    first = impl.merge(cards, strategy, options, weights, rank)
    second = impl.merge([cards[i] for i in order], strategy, options, shuffled, rank)
    assert_same(first, second, cards, applied(strategy, options, weights, len(cards)))


@requirement("R20.3", kind="law")
@each(*ANY)
@given(cards=several(least=2, most=2), factor=st.sampled_from([0.25, 2.0, 8.0]), data=st.data())
def test_cards_scaled_alike_give_a_merge_scaled_alike(impl, strategy, cards, factor, data):
    options, weights, rank = choose(data, cards, strategy)
    merged = impl.merge(cards, strategy, options, weights, rank)
    larger = impl.merge([scaled(card, factor) for card in cards], strategy, options, weights, rank)
    factors = [factor * f + f for f in applied(strategy, options, weights, len(cards))]
    assert_near(larger, lambda m, shape: factor * change(merged, m, shape), cards, factors)


@requirement("R20.3", kind="law")
@each(*ANY[1:], convention="ties")  # whose merge is a mean, so that weights are shares
@given(cards=several(least=2), factor=st.sampled_from([0.25, 2.0, 8.0]), data=st.data())
def test_weights_scaled_alike_scale_a_sum_and_leave_a_mean_as_it_is(
    impl, strategy, cards, factor, data
):
    options, weights, rank = choose(data, cards, strategy)
    merged = impl.merge(cards, strategy, options, weights, rank)
    larger = impl.merge(cards, strategy, options, [factor * weight for weight in weights], rank)
    grown = 1 if strategy == "ties" or options.get("normalize", False) else factor
    factors = [factor * f + f for f in applied(strategy, options, weights, len(cards))]
    assert_near(larger, lambda m, shape: grown * change(merged, m, shape), cards, factors)


# ---- R20.4 linear merges


@requirement("R20.4", kind="law")
@each(*LINEAR, examples=200)  # few of them lack a module in a card
@given(cards=several(dtype=None, whole=False, everywhere=False), data=st.data())
def test_a_linear_merge_is_exact_at_the_sum_of_ranks(impl, strategy, cards, data):
    choice = SIGNED if strategy == "cat" else POSITIVE
    options, weights, _ = choose(data, cards, strategy, choice)
    factors = applied(strategy, options, weights, len(cards))
    summed = dict.fromkeys(shapes_of(cards), 0)
    for card in cards:
        for module, pair in card.weights.items():
            summed[module] += pair.A.shape[1]
    largest = max(summed.values(), default=1)
    for rank in (None,) if strategy == "cat" else (None, largest):
        merged = impl.merge(of_one_name(cards), strategy, options, weights, rank)
        assert_near(merged, lambda m, shape: total(cards, factors, m, shape), cards, factors)
        for module, pair in merged.weights.items():
            assert pair.A.shape[1] <= summed[module]
        assert merged.rank == max((pair.A.shape[1] for pair in merged.weights.values()), default=1)


@requirement("R20.4", kind="law")
@each(*LINEAR[:-1])
@given(cards=several(dtype=None, whole=False), rank=st.integers(1, 4) | WIDE_RANKS, data=st.data())
def test_a_truncated_linear_merge_is_the_best_approximation_of_its_rank(
    impl, strategy, cards, rank, data
):
    options, weights, _ = choose(data, cards, strategy)
    factors = applied(strategy, options, weights, len(cards))
    merged = impl.merge(cards, strategy, options, weights, rank)
    for module, shape in shapes_of(cards).items():
        want = total(cards, factors, module, shape)
        found = change(merged, module, shape)
        tail = np.linalg.norm(np.linalg.svd(want, compute_uv=False)[rank:])
        assert np.linalg.norm(found - want) <= tail + allowed(merged, cards, factors, module, shape)
        assert module not in merged.weights or merged.weights[module].A.shape[1] <= rank


# ---- R20.5 SLERP


def angle_between(x, y):
    """Radians; accurate for small and for large angles (Kahan)."""
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return 2 * np.arctan2(np.linalg.norm(x - y), np.linalg.norm(x + y))


@st.composite
def ends(draw):
    """Two cards, not 0, whose modules may differ; one module of theirs keeps them apart."""
    bare = st.just([card_with("a", {}), card_with("b", {})])
    cards = draw(several(least=2, most=2, everywhere=False) | bare)
    other = st.sampled_from(
        [[0.0, 3.0], [2.0, 2.0], [-2.0, 2.0], [3.0, 1.0], [0.0, -1.0], [3.0, 0.375], [3.0, 0.03125]]
    )
    anchors = [PlainPair(np.ones((1, 1)), np.array([p]), 1.0) for p in ([3.0, 0.0], draw(other))]
    return [
        card_with(card.name, {**card.weights, "anchor": anchor})
        for card, anchor in zip(cards, anchors, strict=True)
    ]


def arc_of(cards, narrowest=0.1):
    """Both points, their lengths and angle; how far a merge may lie from the arc.

    The weights are sin(pθ) / sin θ, whose derivative is below 2 / sin² θ, and θ comes from a
    cosine, whose error is magnified by 1 / sin θ.
    """
    shapes = shapes_of(cards)
    x, y = (flat(card, shapes) for card in cards)
    lengths = [np.linalg.norm(x), np.linalg.norm(y)]
    assume(min(lengths) > 0)
    angle = angle_between(x, y)
    assume(angle < np.pi - 0.1)  # nearer to opposite, its error says nothing
    sizes = [sum(size_of([card], [1.0], module)[0] for module in card.weights) for card in cards]
    cond = max(size / length for size, length in zip(sizes, lengths, strict=True))
    worst = max(np.sin(angle), narrowest)
    reach = max(lengths)
    factors = [reach / length / worst for length in lengths]
    off = sum(allowed(cards[0], cards, factors, module, shape) for module, shape in shapes.items())
    return shapes, x, y, lengths, angle, off * (1 + cond**2 * 2 / worst**2)


ARCS = st.sampled_from([0.0, 1.0, 0.5, 0.25]) | st.floats(0, 1)


@requirement("R20.5", kind="law")
@given(cards=ends())
def test_slerp_reaches_its_end_points(impl, cards):
    shapes, x, y, _, _, off = arc_of(cards)
    for t, end in ((0.0, x), (1.0, y)):
        found = flat(impl.merge(cards, "slerp", {"t": t}, None, None), shapes)
        assert np.linalg.norm(found - end) <= off


@requirement("R20.5", kind="law")
@given(cards=ends(), t=ARCS)
def test_slerp_from_the_other_end_is_the_same(impl, cards, t):
    shapes, _, _, _, _, off = arc_of(cards)
    there = flat(impl.merge(cards, "slerp", {"t": t}, None, None), shapes)
    back = flat(impl.merge(cards[::-1], "slerp", {"t": 1 - t}, None, None), shapes)
    assert np.linalg.norm(there - back) <= 2 * off


@requirement("R20.5", kind="convention")
@given(cards=ends(), t=ARCS)
def test_slerp_turns_at_constant_angular_speed_while_the_length_goes_linearly(impl, cards, t):
    shapes, x, y, lengths, angle, off = arc_of(cards, 0.005)
    assume(angle > 0.005)
    found = flat(impl.merge(cards, "slerp", {"t": t}, None, None), shapes)
    length = (1 - t) * lengths[0] + t * lengths[1]
    assert abs(np.linalg.norm(found) - length) <= off
    turned_by = np.pi / 2 * off / length  # a vector that is moved by off turns by no more
    assert abs(angle_between(x, found) - t * angle) <= turned_by
    assert abs(angle_between(y, found) - (1 - t) * angle) <= turned_by


@requirement("R20.5", kind="law")
@given(
    cards=several(most=1),
    factor=st.sampled_from([1.0, 2.0, 0.5]),
    small=st.sampled_from([0.0, 2.0**-30]),
    t=ARCS,
)
def test_slerp_of_nearly_parallel_cards_is_linear(impl, cards, factor, small, t):
    weights = {}
    for module, (a, b, scaling) in cards[0].weights.items():
        wide = np.hstack([a, np.ones((a.shape[0], 1))])
        long = np.vstack([b, np.full((1, b.shape[1]), small)])
        weights[module] = PlainPair(wide, long, scaling * factor)
    cards = [cards[0], card_with("z", weights)]
    shapes, x, y, lengths, angle, off = arc_of(cards)
    found = flat(impl.merge(cards, "slerp", {"t": t}, None, None), shapes)
    bend = angle * abs(lengths[0] - lengths[1]) + angle**2 * max(lengths)
    assume(angle < 1e-6)
    assert np.linalg.norm(found - (1 - t) * x - t * y) <= off + bend


@requirement("R20.5", kind="refusal")
@given(cards=several(least=2, most=2), factor=st.sampled_from([-1.0, -2.0, -0.25]), t=ARCS)
def test_slerp_of_opposite_cards_or_of_nothing_is_refused(impl, cards, factor, t):
    shapes = shapes_of(cards)
    assume(flat(cards[0], shapes).any())
    opposite = scaled(cards[0], factor)._replace(name="z")
    silent = scaled(cards[1], 0.0)._replace(name="z")
    bare = card_with("z", {})
    for other in (opposite, silent, bare):
        assert refuses(impl, [cards[0], other], "slerp", {"t": t}, None, None)
        assert refuses(impl, [other, cards[0]], "slerp", {"t": t}, None, None)


# ---- R20.6 TIES


def kept(part, density):
    """The entries that TIES keeps: the largest ones, and among equals the first."""
    values, result = part.ravel(), np.zeros(part.size)
    order = sorted(range(values.size), key=lambda i: (-abs(values[i]), i))
    for i in order[: max(1, round(density * values.size))]:
        result[i] = values[i]
    return result.reshape(part.shape)


def ties_by_hand(parts, weights, density, elect):
    """TIES entry by entry."""
    trimmed = [kept(part, density) for part in parts]
    result = np.zeros_like(parts[0])
    for place in np.ndindex(result.shape):
        pairs = zip(trimmed, weights, strict=True)
        entries = [(float(part[place]) * weight, abs(weight)) for part, weight in pairs]
        votes = sum(np.sign(value) if elect == "count" else value for value, _ in entries)
        agreeing = [entry for entry in entries if entry[0] * votes > 0]
        if agreeing:
            value, weight = map(sum, zip(*agreeing, strict=True))
            result[place] = value / weight
    return result


@requirement("R20.6", kind="convention")
@given(
    cards=several(everywhere=False) | several(least=3),
    density=DENSITIES,
    elect=st.sampled_from(["mass", "count"]),
    data=st.data(),
)
def test_ties_is_the_weighted_mean_of_what_agrees_after_trimming(impl, cards, density, elect, data):
    weights = [data.draw(st.sampled_from(SIGNED)) for _ in cards]
    named = data.draw(st.sampled_from([cards, of_one_name(cards)]))
    options = {"density": density, "elect": elect}
    merged = impl.merge(named, "ties", options, weights, FULL)

    def by_hand(module, shape):
        parts = [change(card, module, shape) for card in cards]
        return ties_by_hand(parts, weights, density, elect)

    assert_near(merged, by_hand, cards, [1.0] * len(cards))


@requirement("R20.6", kind="convention")
@given(rows=features, columns=features, density=DENSITIES, seed=st.integers(0, 2**32))
def test_ties_keeps_exactly_the_stated_count_of_entries(impl, rows, columns, density, seed):
    rng = np.random.default_rng(seed)
    b = rng.permutation(np.arange(1.0, rows * columns + 1)).reshape(rows, columns)
    card = card_with("a", {"m": PlainPair(np.eye(rows), b * rng.choice([-1.0, 1.0], b.shape), 1.0)})
    merged = impl.merge([card], "ties", {"density": density}, None, FULL)
    found = change(merged, "m", (columns, rows))
    assert (abs(found) > 0.5).sum() == max(1, round(density * b.size))


@requirement("R20.6", kind="convention")
@given(count=st.integers(1, 48), size=st.integers(2, 49), hair=st.sampled_from([1e-6, 1e-9]))
def test_a_density_half_way_between_two_counts_keeps_the_nearer_one(impl, count, size, hair):
    assume(count < size)
    card = card_with("a", {"m": PlainPair(np.ones((1, 1)), np.arange(1.0, size + 1)[None], 1.0)})
    for more, nearer in ((0, -hair), (1, hair)):
        density = {"density": (count + 0.5 + nearer) / size}
        found = change(impl.merge([card], "ties", density, None, FULL), "m", (size, 1))
        assert (abs(found) > 0.5).sum() == count + more


@requirement("R20.7", kind="convention")
@given(rows=features, columns=features, density=DENSITIES, seed=SEEDS)
def test_density_is_the_share_that_ties_keeps(impl, rows, columns, density, seed):
    draw = np.random.default_rng(seed).permutation(np.arange(1.0, rows * columns + 1))
    card = card_with("a", {"m": PlainPair(np.eye(rows), draw.reshape(rows, columns), 1.0)})
    merged = impl.merge([card], "ties", {"density": density}, None, FULL)
    count = (abs(change(merged, "m", (columns, rows))) > 0.5).sum()
    assert abs(count - density * draw.size) <= 1


@requirement("R20.6", kind="convention")
@given(rows=features, columns=features, density=DENSITIES, seed=st.integers(0, 2**32))
def test_among_entries_of_one_magnitude_ties_keeps_the_first(impl, rows, columns, density, seed):
    b = np.random.default_rng(seed).choice([-1.0, 1.0], (rows, columns))
    card = card_with("a", {"m": PlainPair(np.eye(rows), b, 1.0)})
    merged = impl.merge([card], "ties", {"density": density}, None, FULL)
    found = change(merged, "m", (columns, rows))
    count = max(1, round(density * b.size))
    assert np.array_equal(np.flatnonzero(abs(found) > 0.5), np.arange(count))


@requirement("R20.6", kind="convention")
@given(
    cards=several(most=1),
    elect=st.sampled_from(["mass", "count"]),
    weight=st.sampled_from(POSITIVE),
)
def test_where_signs_balance_ties_elects_nothing(impl, cards, elect, weight):
    both = [cards[0], scaled(cards[0], -1.0)._replace(name="z")]
    merged = impl.merge(both, "ties", {"density": 1.0, "elect": elect}, [weight, weight], FULL)
    assert_near(merged, lambda _, shape: np.zeros(shape), both, [1.0, 1.0])


@requirement("R20.6", kind="convention")
@given(
    shape=st.tuples(features, features), elect=st.sampled_from(["mass", "count"]), data=st.data()
)
def test_where_some_signs_balance_ties_elects_nothing_there(impl, shape, elect, data):
    """Whatever the other entries elect."""
    whole = data.draw(hnp.arrays(F64, shape, elements=st.sampled_from([1.0, -1.0, 2.0])))
    signs = data.draw(hnp.arrays(F64, shape, elements=st.sampled_from([1.0, -1.0])))
    factors = {"a": whole, "b": whole * signs}
    cards = [
        card_with(name, {"m": PlainPair(np.eye(shape[0]), b, 1.0)}) for name, b in factors.items()
    ]
    merged = impl.merge(cards, "ties", {"density": 1.0, "elect": elect}, None, FULL)
    assert_near(merged, lambda *_: np.where(signs > 0, whole, 0.0).T, cards, [1.0, 1.0])


# ---- R20.7 DARE


def full_entries(name, side, seed, modules=("m",)):
    """A card of rank 1 whose ΔW has no entry of 0: what is 0 after DARE was dropped."""
    rng = np.random.default_rng(seed)
    draw = [1.0, -1.0, 2.0, -2.0, 3.0]
    sizes = (side, 1), (1, side)
    pairs = {m: PlainPair(*(rng.choice(draw, size) for size in sizes), 1.0) for m in modules}
    return card_with(name, pairs)


def mask(impl, cards, density, seed, module="m"):
    """Which entries of the only card are kept."""
    side = cards[0].weights[module].A.shape[0]
    merged = impl.merge(cards, "dare", {"density": density, "seed": seed}, None, side)
    return abs(change(merged, module, (side, side))) > 0.5


SHARES = st.sampled_from([0.1, 0.25, 0.4, 0.6, 0.75, 0.9])


@requirement("R20.7", kind="convention")
@given(cards=several(most=1), density=DENSITIES, seed=SEEDS, weight=st.sampled_from(SIGNED))
def test_an_entry_is_dropped_or_rescaled_by_one_over_density(impl, cards, density, seed, weight):
    merged = impl.merge(cards, "dare", {"density": density, "seed": seed}, [weight], FULL)
    for module, shape in shapes_of(cards).items():
        whole = change(cards[0], module, shape) * weight / density
        found = change(merged, module, shape)
        off = allowed(merged, cards, [weight / density], module, shape)
        assert (np.minimum(abs(found), abs(found - whole)) <= off).all()


@requirement("R20.7", kind="convention")
@given(density=SHARES, seed=SEEDS)
def test_the_share_kept_is_density(impl, density, seed):
    found = mask(impl, [full_entries("a", 48, seed)], density, seed)
    hoeffding = np.sqrt(np.log(2 / CHANCE) / (2 * found.size))
    assert abs(found.mean() - density) <= hoeffding


@requirement("R20.7", kind="law")
@settings(max_examples=10)
@given(density=SHARES, seed=SEEDS, side=st.integers(1, 4))
def test_over_seeds_each_entry_is_kept_as_often_as_density_says_so_that_its_mean_is_unbiased(
    impl, density, seed, side
):
    card, rounds = full_entries("a", side, seed), 150
    often = sum(mask(impl, [card], density, seed + i).astype(float) for i in range(rounds)) / rounds
    assert (abs(often - density) <= np.sqrt(np.log(2 * side * side / CHANCE) / (2 * rounds))).all()


@requirement("R20.7", kind="convention")
@given(density=SHARES, seed=SEEDS, content=SEEDS)
def test_a_mask_depends_on_seed_module_and_card_name_and_on_nothing_else(
    impl, density, seed, content
):
    side = 24  # of 576 entries with densities from 0.1 to 0.9, all agree with a chance below 1e-49
    found = mask(impl, [full_entries("a", side, seed)], density, seed)
    assert np.array_equal(mask(impl, [full_entries("a", side, content)], density, seed), found)
    two = full_entries("a", side, seed, ("m", "other"))
    assert np.array_equal(mask(impl, [two], density, seed), found)
    assert not np.array_equal(mask(impl, [two], density, seed, "other"), found)
    assert not np.array_equal(mask(impl, [full_entries("b", side, seed)], density, seed), found)
    assert not np.array_equal(mask(impl, [full_entries("a", side, seed)], density, seed + 1), found)


@requirement("R20.7", kind="convention")
@given(density=SHARES, seed=SEEDS)
def test_names_that_read_alike_when_put_together_have_masks_of_their_own(impl, density, seed):
    keys = [("m", "xa", seed), ("mx", "a", seed), ("x", "ma", seed), ("1m", "a", seed)]
    keys += [("m", "a", 10 * seed + 1), *(("m", name, seed) for name in ALIKE)]
    keys += [(module, "b", seed) for module in [*MODULES, "layer.0.query", "encoder.0.Query"]]
    masks = [
        mask(impl, [full_entries(card, 16, 0, (module,))], density, own, module)
        for module, card, own in keys
    ]
    assert len({found.tobytes() for found in masks}) == len(masks)


@requirement("R20.7", kind="convention")
@given(density=SHARES, seed=st.integers(0, 2**16))
def test_seeds_of_any_width_have_masks_of_their_own(impl, density, seed):
    """Of 256 entries with densities from 0.1 to 0.9, all agree with a chance below 1e-21."""
    seeds = [seed, *(seed + 2**width + near for width in WIDTHS for near in (0, 1))]
    masks = [mask(impl, [full_entries("a", 16, 0)], density, own) for own in seeds]
    assert len({found.tobytes() for found in masks}) == len(set(seeds))


@requirement("R20.7", kind="convention")  # as a mask is of one card alone
@given(cards=several(least=2, everywhere=False), density=DENSITIES, seed=SEEDS, data=st.data())
def test_what_dare_makes_of_several_cards_is_the_sum_of_what_it_makes_of_each(
    impl, cards, density, seed, data
):
    options = {"density": density, "seed": seed}
    pairs = list(zip(cards, weights_for(data.draw, "dare", cards, SIGNED), strict=True))
    shuffled, moved = zip(*data.draw(st.permutations(pairs)), strict=True)
    merged = impl.merge(list(shuffled), "dare", options, list(moved), FULL)
    each = [impl.merge([card], "dare", options, [weight], FULL) for card, weight in pairs]
    factors = [2 * weight / density for _, weight in pairs]
    assert_near(merged, lambda m, s: sum(change(part, m, s) for part in each), cards, factors)


@requirement("R20.7", kind="refusal")
@given(cards=several(least=2, most=2))
def test_dare_refuses_two_cards_of_one_name_as_they_would_share_a_mask(impl, cards):
    twins = [cards[0], cards[1]._replace(name=cards[0].name)]
    assert refuses(impl, twins, "dare", {"density": 0.5}, None, None)


# ---- R20.8 task arithmetic


@requirement("R20.8", kind="law")
@given(cards=several(dtype=None, everywhere=False), data=st.data())
def test_task_arithmetic_takes_skills_away_by_negative_weights(impl, cards, data):
    weights = [data.draw(st.sampled_from(SIGNED)) for _ in cards]
    merged = impl.merge(cards, "task_arithmetic", {}, weights, None)
    assert_near(merged, lambda m, shape: total(cards, weights, m, shape), cards, weights)


@requirement("R20.8", kind="law")
@given(cards=several(most=1, dtype=None), weight=st.sampled_from(POSITIVE), seed=SEEDS)
def test_a_card_less_itself_is_a_card_that_changes_nothing(impl, cards, weight, seed):
    one = cards[0]
    renamed, other = one._replace(name="z"), turned(one, exactly(np.random.default_rng(seed)))
    shapes = shapes_of(cards)
    for twin in (one, renamed, other):
        assert np.array_equal(flat(twin, shapes), flat(one, shapes))
        merged = impl.merge([one, twin], "task_arithmetic", {}, [weight, -weight], None)
        assert_near(merged, lambda _, shape: np.zeros(shape), [one, twin], [weight, weight])
        assert_card(merged)


@requirement("R20.8", kind="law")
@given(cards=several(least=2, most=2, dtype=None, everywhere=False))
def test_what_was_added_can_be_taken_away_again(impl, cards):
    both = impl.merge(cards, "task_arithmetic", {}, [1.0, 1.0], None)
    back = impl.merge([both, cards[1]], "task_arithmetic", {}, [1.0, -1.0], None)
    assert_near(back, lambda m, s: change(cards[0], m, s), [*cards, cards[1]], [2.0] * 3)


# ---- R20.9 cards that differ


@requirement("R20.9", kind="convention")
@each(*ANY)
@given(kinds=st.tuples(dtypes, dtypes), shape=st.tuples(features, features), data=st.data())
def test_cards_of_two_dtypes_merge_into_the_one_that_holds_both(impl, strategy, kinds, shape, data):
    (first, second), named = kinds, zip("ab", kinds, strict=True)
    cards = [data.draw(one(name, {"m": shape}, dtype=dtype)) for name, dtype in named]
    options, weights, rank = choose(data, cards, strategy)
    merged = impl.merge(cards, strategy, options, weights, rank)
    wide = "float64" if F64 in (first, second) else "float32"
    expected = first.name if first == second else wide
    assert {part.dtype.name for pair in merged.weights.values() for part in pair[:2]} <= {expected}
    if strategy in LINEAR:
        factors = applied(strategy, options, weights, len(cards))
        assert_near(merged, partial(total, cards, factors), cards, factors)


@requirement("R20.9", kind="convention")
@each(*ANY)
@given(cards=several(least=2, dtype=None, everywhere=False), data=st.data())
def test_a_module_that_a_card_lacks_counts_as_zero(impl, strategy, cards, data):
    options, weights, rank = choose(data, cards, strategy)
    shapes = shapes_of(cards)
    merged = impl.merge(cards, strategy, options, weights, rank)
    dtype = dtype_of(merged, cards)
    assume(all(dtype_of(card, [merged]) == dtype for card in cards if not card.weights))
    silent = []
    for card in cards:
        own, pairs = dtype_of(card, [merged]), {}
        for m, (rows, columns) in shapes.items():
            zeros = PlainPair(np.zeros((columns, 1), own), np.zeros((1, rows), own), 1.0)
            pairs[m] = card.weights.get(m, zeros)
        silent.append(card_with(card.name, pairs))
    filled = impl.merge(silent, strategy, options, weights, rank)
    assert_same(merged, filled, cards, applied(strategy, options, weights, len(cards)))


@requirement("R20.9", kind="convention")
@each(*ANY)
@given(cards=several(dtype=None, whole=False, everywhere=False), data=st.data())
def test_the_merged_card_is_a_card_with_the_modules_and_targets_of_all(impl, strategy, cards, data):
    options, weights, _ = choose(data, cards, strategy)
    merged = impl.merge(cards, strategy, options, weights, None)
    targets = {target for card in cards for target in card.target_modules}
    assert set(merged.target_modules) == targets
    assert set(merged.weights) <= set(shapes_of(cards))
    assert_card(merged)


@requirement("R20.9", kind="refusal")
@each(*ANY)
@given(cards=several(least=2, most=2), data=st.data())
def test_cards_that_disagree_on_a_modules_shape_are_refused(impl, strategy, cards, data):
    options, *_ = choose(data, cards, strategy)
    module, pair = next(iter(cards[1].weights.items()))
    longer = pair._replace(A=np.vstack([pair.A, np.ones_like(pair.A[:1])]))
    cards[1] = cards[1]._replace(weights={**cards[1].weights, module: longer})
    assert refuses(impl, cards, strategy, options, None, None)


# ---- this library's own: R20.10, and equality bit for bit


@requirement("R20.10")
@given(
    cards=several(dtype=F64, whole=False, everywhere=False), rank=st.integers(1, 3), data=st.data()
)
def test_the_merged_card_tells_its_parents_their_weights_and_what_truncation_cost(
    cards, rank, data
):
    strategy = data.draw(st.sampled_from([*LINEAR[:-1], *DENSE]))
    options, weights, _ = choose(data, cards, strategy)
    value, parents = STRATEGIES[strategy](**options), [card_of(card) for card in cards]
    exact, cut = (merge(parents, value, weights, limit) for limit in (FULL, rank))
    record, factors = cut.metadata["merge"], applied(strategy, options, weights, len(cards))
    plain = weights if weights and not options.get("normalize") else factors
    assert (record["strategy"], record["options"]) == (strategy, {**asdict(value)})
    assert record["parents"] == [
        {"name": card.name, "digest": content_digest(card), "weight": weight}
        for card, weight in sorted(zip(parents, plain, strict=True), key=lambda pair: pair[0].name)
    ]
    assert set(record["error"]) == set(shapes_of(cards))
    for module, shape in shapes_of(cards).items():
        want, found = (change(plain_of(card), module, shape) for card in (exact, cut))
        noise = 4 * allowed(plain_of(cut), cards, factors, module, shape)
        lost = record["error"][module] * np.linalg.norm(want)
        assert abs(lost - np.linalg.norm(found - want)) <= noise


@requirement("R20.10")
@given(cards=several(most=1, dtype=None, whole=False), data=st.data())
def test_a_content_digest_is_equal_for_equal_cards_and_for_no_others(cards, data):
    card = card_of(cards[0])
    assert content_digest(card) == content_digest(card_of(cards[0]))
    module, pair = data.draw(st.sampled_from(list(card.weights.items())))
    a = np.array(pair.A)
    place = data.draw(st.tuples(*(st.integers(0, n - 1) for n in a.shape)))
    a[place] = 1 if a[place] != 1 else 2
    others = [
        replace(card, name=card.name + "2"),
        replace(card, alpha=card.alpha + 1),
        replace(card, target_modules=(*card.target_modules, "key")),
        replace(card, metadata={"version": "1.0.0"}),
        replace(card, base_fingerprint="0" * 64),
        replace(card, weights={**card.weights, module: replace(pair, A=a)}),
        replace(card, weights={**card.weights, module: replace(pair, scaling=pair.scaling + 1)}),
        replace(card, weights={f"{m}.x": p for m, p in card.weights.items()}),
    ]
    assert len({content_digest(other) for other in [card, *others]}) == 1 + len(others)


@requirement("R20.3")
@given(cards=several(least=2, dtype=None, whole=False, everywhere=False), data=st.data())
def test_the_order_of_cards_changes_no_bit(cards, data):
    strategy = data.draw(st.sampled_from(ANY))
    options, weights, _ = choose(data, cards, strategy)
    value, parents = STRATEGIES[strategy](**options), [card_of(card) for card in cards]
    order = data.draw(st.permutations(range(len(cards))))
    shuffled = None if weights is None else [weights[i] for i in order]
    assert merge(parents, value, weights) == merge([parents[i] for i in order], value, shuffled)
