"""R8: several adapters at once, and the algebra of sets of them."""

import operator
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lora.card import AdapterSet, LoRACard, LowRank, interpolate
from lora.errors import ArgumentError, ConflictError
from lora.models.adapt import adapt
from lora.models.layers import LoRALinear
from lora.models.manager import LoRAManager
from lora.testing.binding import Term
from lora.testing.domains import limit
from lora.testing.plugin import requirement
from lora.testing.reference import linear_of, tensor_of
from lora.testing.strategies import ALIKE, features, integers, layer_dtypes, layers, numbers, ranks
from lora.testing.tolerance import exact, layer_bound, magnitude, roundoff

F64 = np.dtype(np.float64)
WHOLE_WEIGHTS = st.sampled_from([1.0, 2.0, -1.0, 3.0, 0.0])
FINE_WEIGHTS = WHOLE_WEIGHTS | st.sampled_from([2.0**-10, 1 - 2.0**-20, -0.125, 1000.0])
NAMES = [
    "abcdefghi",
    ["f.i", "f_i"],
    ["fi", "Fi", " fi", "fi ", "\ufb01"],
    ["e\u0301", "\u00e9"],
    ALIKE,
]
"""Names of cards, and some that an attribute's name, lower(), strip() or NFKC takes for one."""


@st.composite
def several(draw, *, whole=False, dtype=None, least=2):
    """Input, weight, bias and two or more terms, which may differ in rank."""
    dtype = draw(layer_dtypes()) if dtype is None else dtype
    rows, columns = draw(features), draw(features)
    elements = integers if whole else numbers
    x, weight = draw(elements(dtype, (2, rows))), draw(elements(dtype, (columns, rows)))
    bias = draw(st.none() | elements(dtype, (columns,)))
    terms = {}
    count = min(draw(st.sampled_from([least, 2, 9, 4, 9])), max(2, limit("forward", "terms", 9)))
    for name in draw(st.sampled_from(NAMES).flatmap(st.permutations))[:count]:
        rank = draw(ranks)
        a, b = draw(elements(dtype, (rows, rank))), draw(elements(dtype, (rank, columns)))
        scale = draw(st.sampled_from([1.0, 2.0] if whole else [0.5, 1 / 3, -2.0]))
        terms[name] = Term(
            a, b, scale, draw(WHOLE_WEIGHTS if whole else st.floats(-2, 2, width=16))
        )
    return x, weight, bias, terms


def fits(x, weight, bias, terms):
    """Whether whole numbers leave nothing to round, anywhere on the way."""
    return (magnitude(x, weight, bias, list(terms)) <= 1 / roundoff(x.dtype)).all()


# ---- through the binding


@requirement("R8.2", kind="law")
@given(layer=several())
def test_every_cards_weighted_term_is_in_the_output(impl, layer):
    x, weight, bias, terms = layer
    out, want = impl.forward(x, weight, bias, terms), exact(x, weight, bias, terms.values())
    assert (
        abs(out.astype(want.dtype) - want) <= layer_bound(x, weight, bias, terms.values())
    ).all()


@requirement("R8.1", kind="law")
@given(layer=several(whole=True, dtype=F64))
def test_what_several_cards_add_is_the_sum_of_what_each_adds(impl, layer):
    x, weight, bias, terms = layer
    base = impl.forward(x, weight, bias, {})
    parts = [impl.forward(x, weight, bias, {name: term}) - base for name, term in terms.items()]
    assert np.array_equal(impl.forward(x, weight, bias, terms) - base, sum(parts))


@requirement("R8.5", kind="convention")
@given(layer=several(whole=True, least=1), name=st.sampled_from("xyz"))
def test_two_cards_of_one_content_count_twice(impl, layer, name):
    x, weight, bias, terms = layer
    first, *_ = terms.values()
    others = {other: term for other, term in terms.items() if other != "a"}
    once = {**others, "a": first}
    twice = {**once, name: first}
    assume(fits(x, weight, bias, twice.values()))
    none, one, two = (impl.forward(x, weight, bias, some) for some in (others, once, twice))
    assert np.array_equal(two - one, one - none)


@requirement("R8.7", kind="law")
@given(layer=several(whole=True, dtype=F64), factor=FINE_WEIGHTS)
def test_a_cards_weight_scales_its_term_and_no_other(impl, layer, factor):
    x, weight, bias, terms = layer
    chosen = min(terms)
    others = {name: term for name, term in terms.items() if name != chosen}
    rest = impl.forward(x, weight, bias, others)
    term = (
        impl.forward(x, weight, bias, {**others, chosen: terms[chosen]._replace(weight=1.0)}) - rest
    )
    out = impl.forward(x, weight, bias, {**others, chosen: terms[chosen]._replace(weight=factor)})
    assert np.array_equal(out - rest, factor * term)


@requirement("R8.7", kind="law")
@given(layer=layers())
def test_cards_of_weight_zero_leave_the_base_output_as_it_is(impl, layer):
    x, weight, bias, terms = layer
    silent = {name: term._replace(weight=0.0) for name, term in terms.items()}
    assert np.array_equal(impl.forward(x, weight, bias, silent), impl.forward(x, weight, bias, {}))


@requirement("R8.8", kind="law")
@given(layer=several(whole=True), data=st.data())
def test_the_order_in_which_terms_are_given_changes_nothing(impl, layer, data):
    x, weight, bias, terms = layer
    assume(fits(x, weight, bias, terms.values()))
    shuffled = dict(data.draw(st.permutations(list(terms.items()))))
    assert np.array_equal(
        impl.forward(x, weight, bias, shuffled), impl.forward(x, weight, bias, terms)
    )


# ---- this library's layers, models and sets


def model_of(weight, bias):
    """A model of one Linear, called ``m``."""
    model = nn.Module()
    model.m = linear_of(weight, bias)
    return model


def cards_of(terms):
    """An adapter set of the terms, in their order."""
    weights = {name: {"m": LowRank(term.A, term.B, term.scaling)} for name, term in terms.items()}
    return {
        n: (LoRACard(n, t.A.shape[1], 1.0, ["m"], weights[n]), t.weight) for n, t in terms.items()
    }


@requirement("R8.8", "R8.5", "R8.7")
@given(layer=several(), data=st.data())
def test_the_order_of_cards_changes_not_one_bit(layer, data):
    x, weight, bias, terms = layer
    shuffled = dict(data.draw(st.permutations(list(terms.items()))))
    model, x = model_of(weight, bias), tensor_of(x)
    one, other = adapt(model, cards_of(terms)).m, adapt(model, cards_of(shuffled)).m
    assert {name: weight for name, (_, weight) in one.terms.items()} == {
        name: term.weight for name, term in terms.items()
    }
    assert torch.equal(one.lora_A, other.lora_A)
    assert torch.equal(one(x), other(x))
    pairs = {name: (LowRank(t.A, t.B, t.scaling), t.weight) for name, t in shuffled.items()}
    assert torch.equal(LoRALinear(model.m, pairs)(x), one(x))
    managers = [LoRAManager(model) for _ in "12"]
    for manager, order in zip(managers, (terms, shuffled), strict=True):
        for card, weighted in cards_of(order).values():
            manager.apply_card(card, weight=weighted)
    assert torch.equal(managers[0].model.m(x), managers[1].model.m(x))
    assert managers[0].active == managers[1].active == AdapterSet(cards_of(terms))


@requirement("R8.3", "R8.4", "R8.1")
@given(layer=several(), data=st.data())
def test_each_card_can_be_removed_alone_and_the_layer_knows_the_rest(layer, data):
    x, weight, bias, terms = layer
    model, cards = model_of(weight, bias), cards_of(terms)
    manager = LoRAManager(model)
    for card, weighted in cards.values():
        manager.apply_card(card, weight=weighted)
    for name in data.draw(st.permutations(list(cards))):
        manager.remove_card(name)
        del cards[name]
        assert manager.injected == ({"m": tuple(sorted(cards))} if cards else {})
        assert torch.equal(manager.model.m(tensor_of(x)), adapt(model, cards).m(tensor_of(x)))
        if cards:
            assert list(manager.model.m.terms) == sorted(cards)
    assert manager.model is model


@requirement("R8.7", "R8.2")
@given(layer=several(), poison=st.sampled_from([np.nan, np.inf]))
def test_a_card_of_weight_zero_adds_nothing_whatever_is_in_it(layer, poison):
    x, weight, bias, terms = layer
    model, x = model_of(weight, bias), tensor_of(x)
    silent = {"zz": Term(*(np.full_like(f, poison) for f in terms[min(terms)][:2]), 1.0, 0.0)}
    without, beside = adapt(model, cards_of(terms)), adapt(model, cards_of({**terms, **silent}))
    assert torch.equal(beside.m(x), without.m(x))
    assert torch.equal(adapt(model, cards_of(silent)).m(x), model.m(x))


EIGHTHS = st.integers(-16, 16).map(lambda n: n / 8)
"""Weights whose sums and products are exact."""


def pool_card(name, version):
    pair = LowRank(
        np.full((2, 1), version, np.float64), np.full((1, 2), len(name) + version, np.float64)
    )
    return LoRACard(name, 1, 1.0, ["m"], {"m": pair}, {"version": version})


@st.composite
def adapter_sets(draw, *, versions=(0,)):
    """Sets over a few names; with several versions, two sets may hold different cards under one
    name.
    """
    chosen = draw(
        st.dictionaries(st.sampled_from("abc"), st.tuples(st.sampled_from(versions), EIGHTHS))
    )
    return AdapterSet(
        {name: (pool_card(name, version), weight) for name, (version, weight) in chosen.items()}
    )


def outcome(operation, *operands):
    """The result, or that it was refused as a conflict."""
    try:
        return operation(*operands)
    except ConflictError:
        return "conflict"


@requirement("R8.9")
@given(a=adapter_sets(), b=adapter_sets(), c=adapter_sets(), s=EIGHTHS, t=EIGHTHS)
def test_sets_are_a_vector_space_over_their_weights(a, b, c, s, t):
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + AdapterSet() == a == a * 1 == 1 * a
    assert (a + b) * s == a * s + b * s
    assert a * s + a * t == a * (s + t)
    assert (a * s) * t == a * (s * t)
    assert all(weight == 0 for _, weight in (a + a * -1).values())
    for name in "abc":
        assert (a + b * s).weight(name) == a.weight(name) + s * b.weight(name)
        assert (a * 1e-9).weight(name) == a.weight(name) * 1e-9


@requirement("R8.9")
@given(a=adapter_sets(), b=adapter_sets(), t=EIGHTHS)
def test_interpolation_runs_from_one_set_to_the_other(a, b, t):
    for name in "abc":
        assert interpolate(a, b, 0).weight(name) == a.weight(name)
        assert interpolate(a, b, 1).weight(name) == b.weight(name)
        assert interpolate(a, b, t).weight(name) == (1 - t) * a.weight(name) + t * b.weight(name)
    assert interpolate(a, b, t) == interpolate(b, a, 1 - t)
    assert interpolate(a, a, t) == a


@requirement("R8.9")
@given(
    a=adapter_sets(versions=(0, 1)),
    b=adapter_sets(versions=(0, 1)),
    c=adapter_sets(versions=(0, 1)),
)
def test_the_union_is_that_of_sets_and_refuses_a_conflict_from_either_side(a, b, c):
    assert a | a == a == a | AdapterSet() == AdapterSet() | a
    assert outcome(operator.or_, a, b) == outcome(operator.or_, b, a)
    clash = any(a[name] != b[name] for name in a.keys() & b.keys())
    assert (outcome(operator.or_, a, b) == "conflict") is clash
    if not clash:
        assert set(a | b) == set(a) | set(b)
        assert all((a | b)[name] == (a if name in a else b)[name] for name in (*a, *b))
    ways = outcome(lambda: (a | b) | c), outcome(lambda: a | (b | c))
    assert ways[0] == ways[1]
    differ = any(a[name][0] != b[name][0] for name in a.keys() & b.keys())
    assert (outcome(operator.add, a, b) == "conflict") is differ


@requirement("R8.9", "R8.8")
@given(a=adapter_sets(versions=(0, 1)), b=adapter_sets(versions=(0, 1)), data=st.data())
def test_sets_are_values(a, b, data):
    again = AdapterSet(dict(data.draw(st.permutations(list(a.items())))))
    assert (again, hash(again), list(again)) == (a, hash(a), sorted(a))
    assert (a == b) is (dict(a) == dict(b))
    assert a != b or hash(a) == hash(b)
    assert pickle.loads(pickle.dumps(a)) == a  # noqa: S301 - our own bytes
    assert len({a, again}) == 1
    alone = [repr(AdapterSet({name: entry}))[len("AdapterSet(") : -1] for name, entry in a.items()]
    assert repr(a) == f"AdapterSet({', '.join(alone)})"
    assert all(
        repr(name) in text and repr(a.weight(name)) in text
        for name, text in zip(a, alone, strict=True)
    )
    assert all(
        a.without(name) == AdapterSet({n: e for n, e in a.items() if n != name}) for name in "abcd"
    )
    with pytest.raises(AttributeError):
        a.weights = 1
    with pytest.raises(TypeError):
        a["a"] = 1
    with pytest.raises(TypeError):
        a._entries["a"] = 1


@requirement("R8.9")
@given(a=adapter_sets(), bad=st.sampled_from([float("nan"), float("inf"), "1", True, None]))
def test_a_weight_is_a_finite_number(a, bad):
    with pytest.raises(ArgumentError):
        AdapterSet({"a": (pool_card("a", 0), bad)})
    with pytest.raises(ArgumentError, match=r"^t: "):
        interpolate(a, a, bad)
    with pytest.raises(ArgumentError, match=r"^factor of an adapter set: "):
        a * bad


@requirement("R8.9", "R8.7")
@given(a=adapter_sets())
def test_a_card_without_a_weight_counts_once_however_it_is_given(a):
    cards = [card for card, _ in a.values()]
    once = AdapterSet({name: (card, 1.0) for name, (card, _) in a.items()})
    assert (
        AdapterSet(cards)
        == AdapterSet({card.name: card for card in cards})
        == AdapterSet(iter(cards))
        == once
    )
    for card in cards:
        assert AdapterSet(card) == AdapterSet([card, card]) == AdapterSet({card.name: card})
        assert AdapterSet(card).weight(card.name) == 1


@requirement("R8.9", "R8.2")
@given(layer=several(whole=True, dtype=F64), data=st.data())
def test_the_sum_of_two_sets_adds_what_each_adds(layer, data):
    x, weight, bias, terms = layer
    model, x = model_of(weight, bias), tensor_of(x)
    one = AdapterSet(cards_of(terms))
    other = AdapterSet(
        {name: (card, data.draw(WHOLE_WEIGHTS)) for name, (card, _) in one.items()}
    ).without(min(terms))
    base = model.m(x)
    both = adapt(model, one + other).m(x) - base
    assert torch.equal(both, (adapt(model, one).m(x) - base) + (adapt(model, other).m(x) - base))
