"""R2: what an adapted layer computes, to the last bit that its arithmetic allows."""

import itertools
from contextlib import nullcontext

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lora.card import LoRACard, LowRank
from lora.errors import ArgumentError
from lora.factors import apply as apply_pairs
from lora.factors import concat, delta, initial, spectrum, thin_qr
from lora.models.adapt import adapt, fold
from lora.models.layers import LoRALinear, TrainableLinear, add_low_rank
from lora.models.rows import RowLinear, rows
from lora.testing.binding import Term
from lora.testing.domains import limit
from lora.testing.plugin import requirement
from lora.testing.reference import array_of, linear_of, tensor_of
from lora.testing.strategies import (
    dtypes,
    features,
    integers,
    layer_dtypes,
    layers,
    numbers,
    ranks,
)
from lora.testing.tolerance import (
    exact,
    gamma,
    gauge_bound,
    layer_bound,
    magnitude,
    oracle,
    roundoff,
)

# What `fold` leaves out, and reading the state dict of an adapted model, warn: tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:a state dict", "ignore:fold. ")

DTYPES = {
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
}
WIDE = st.sampled_from([np.dtype(np.float32), np.dtype(np.float64)])
NARROW = st.sampled_from([np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)])


def largest(dtype):
    return float(ml_dtypes.finfo(dtype).max)


def assume_no_overflow(x, weight, bias, terms, bound):
    assume((magnitude(x, weight, bias, terms) + bound < largest(x.dtype)).all())


def check(out, x, weight, bias, terms):
    """An output lies within the bound of the formula, and on it where whole numbers leave nothing
    to round.
    """
    terms = list(terms)
    bound = layer_bound(x, weight, bias, terms)
    assume_no_overflow(x, weight, bias, terms, bound)
    want = exact(x, weight, bias, terms)
    assert out.shape == want.shape == (*x.shape[:-1], weight.shape[0])
    assert (abs(out.astype(want.dtype) - want) <= bound).all()


def exactly(x, weight, bias, terms):
    """Where an output on whole numbers is exact: no partial sum needs more digits than the dtype
    has.
    """
    return magnitude(x, weight, bias, terms) <= 1 / roundoff(x.dtype)


def pairs_of(terms):
    return {name: (LowRank(t.A, t.B, t.scaling), t.weight) for name, t in terms.items()}


def state_of(module):
    """Every tensor's name, place, bits, flag and gradient."""
    return [
        (
            name,
            tensor.data_ptr(),
            tensor.dtype,
            tensor.detach().contiguous().view(torch.uint8).tolist(),
            tensor.requires_grad,
        )
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]


# ---- through the binding


@requirement("R2.2", kind="law")
@given(layer=layers())
def test_the_output_equals_the_formula_within_the_bound_of_its_arithmetic(impl, layer):
    x, weight, bias, terms = layer
    check(impl.forward(x, weight, bias, terms), x, weight, bias, terms.values())


@requirement("R9.5", kind="law")
@given(layer=layers(whole=True))
def test_the_output_is_exact_on_small_whole_numbers(impl, layer):
    x, weight, bias, terms = layer
    out, want = impl.forward(x, weight, bias, terms), exact(x, weight, bias, terms.values())
    where = exactly(x, weight, bias, terms.values())
    assert np.array_equal(out[where], want[where])


@requirement("R2.2", kind="convention")
@given(data=st.data(), dtype=NARROW, ones=st.integers(2, 60))
def test_sums_are_accumulated_in_float32_or_better(impl, data, dtype, ones):
    """Ones between a large number and its negative vanish from a sum in a narrow type, whatever the
    order of the rest.
    """
    large = 2 / roundoff(dtype)
    row = data.draw(st.permutations([large, -large, *[1.0] * ones]))
    x, weight = np.array([row, row], dtype), np.ones((3, ones + 2), dtype)
    terms = {"a": Term(np.ones((ones + 2, 1), dtype), np.ones((1, 3), dtype), 1.0, 1.0)}
    assert (impl.forward(x, weight, None, {}) == ones).all()
    assert (impl.forward(x, np.zeros_like(weight), None, terms) == ones).all()


@requirement("R2.5", kind="law")
@given(
    data=st.data(),
    layer=layers(whole=True),
    lead=st.sampled_from([[], [3], [2, 3], [3, 1, 2], [2, 3, 1], [3, 1, 2, 2]])
    | st.lists(st.integers(0, 3), max_size=4),
)
def test_any_leading_dimensions_are_those_of_the_rows_laid_out(impl, data, layer, lead):
    x, weight, bias, terms = layer
    bias = np.ones(len(weight), x.dtype) if bias is None else bias
    x = data.draw(integers(x.dtype, (*lead, weight.shape[1])))
    out = impl.forward(x, weight, bias, terms)
    assert out.shape == (*lead, weight.shape[0])
    rows = x.reshape(-1, weight.shape[1])
    flat = impl.forward(rows, weight, bias, terms)
    where = exactly(rows, weight, bias, terms.values())
    assert np.array_equal(out.reshape(flat.shape)[where], flat[where])
    if limit("forward", "dimensions", 1) == 1:
        for row, want, is_exact in zip(rows[:1], flat, where, strict=False):
            assert np.array_equal(impl.forward(row, weight, bias, terms)[is_exact], want[is_exact])


@requirement("R2.2", kind="law")
@given(data=st.data(), dtype=layer_dtypes(), lead=st.sampled_from([(), (1,), (3,), (2, 1, 2)]))
def test_a_rank_as_large_as_the_layer_is_a_rank_like_any_other(impl, data, dtype, lead):
    rows, columns = data.draw(features), data.draw(features)
    rank = min(rows, columns)
    x, weight = data.draw(numbers(dtype, (*lead, rows))), data.draw(numbers(dtype, (columns, rows)))
    a, b = data.draw(numbers(dtype, (rows, rank))), data.draw(numbers(dtype, (rank, columns)))
    terms = {"a": Term(a, b, 0.5, 1.0)}
    check(impl.forward(x, weight, None, terms), x, weight, None, terms.values())


@requirement("R2.2", kind="law")
@given(dtype=layer_dtypes(), seed=st.integers(0, 2**32 - 1))
def test_no_digit_is_lost_before_it_is_multiplied(impl, dtype, seed):
    """Weights, factors and scaling fill the digits of their type; `layers` draws short ones."""
    rng = np.random.default_rng(seed)
    shapes = (2, 1, 5), (4, 5), (4,), (5, 2), (2, 4)
    x, weight, bias, a, b = (rng.uniform(1, 2, shape).astype(dtype) for shape in shapes)
    terms = {"a": Term(a, b, 1 / 3, -0.7)}
    check(impl.forward(x, weight, bias, terms), x, weight, bias, terms.values())


@requirement("R2.2", kind="law")
@given(layer=layers(min_terms=1, max_terms=1, whole=True), data=st.data())
def test_nothing_is_remembered_of_factors_that_were_used_before(impl, layer, data):
    """The two calls differ in one entry of the factors of one name, changed where they lie."""
    x, weight, bias, terms = layer
    (term,) = terms.values()
    impl.forward(x, weight, bias, terms)
    factor = data.draw(st.sampled_from([term.A, term.B]))
    factor[data.draw(st.tuples(*(st.integers(0, size - 1) for size in factor.shape)))] *= -2
    check(impl.forward(x, weight, bias, terms), x, weight, bias, [term])


@requirement("R2.6", kind="law")
@given(layer=layers(whole=True))
def test_the_term_is_added_to_what_the_base_computes(impl, layer):
    x, weight, bias, terms = layer
    base = impl.forward(x, weight, bias, {})
    term = impl.forward(x, np.zeros_like(weight), None, terms)
    out, where = impl.forward(x, weight, bias, terms), exactly(x, weight, bias, terms.values())
    assert np.array_equal(out[where], (base + term)[where])


@st.composite
def zero_terms(draw):
    """Inputs and factors of any size, infinite and NaN ones among them, and a B of zeros."""
    dtype, rank = draw(layer_dtypes()), draw(ranks)
    rows, columns = draw(features), draw(features)
    big = largest(dtype)
    wild = st.floats(-4, 4, width=16) | st.sampled_from(
        [0.0, big, -big, big / 2, np.inf, -np.inf, np.nan]
    )
    tame = st.floats(-4, 4, width=16) | st.sampled_from([0.0, big, -big])
    a = draw(
        hnp.arrays(np.float64, (rows, rank), elements=draw(st.sampled_from([wild, tame])))
    ).astype(dtype)
    x = np.stack(
        [
            draw(
                hnp.arrays(
                    np.float64, (rows,), elements=draw(st.sampled_from([wild, tame, st.just(0.0)]))
                )
            )
            for _ in "12"
        ]
    )
    return (
        x.astype(dtype),
        draw(numbers(dtype, (columns, rows))),
        draw(st.none() | numbers(dtype, (columns,))),
        a,
    )


@requirement("R2.9", kind="law")
@given(drawn=zero_terms(), scale=st.sampled_from([1.0, 0.5, -3.0]), twice=st.booleans())
def test_with_b_zero_the_output_is_the_bases_wherever_x_a_is_finite(impl, drawn, scale, twice):
    x, weight, bias, a = drawn
    zero = Term(a, np.zeros((a.shape[1], weight.shape[0]), x.dtype), scale, 1.0)
    with np.errstate(all="ignore"):
        finite = (
            abs(x.astype(oracle(x.dtype))) @ abs(a.astype(oracle(x.dtype))) < largest(x.dtype)
        ).all(-1)
        out = impl.forward(x, weight, bias, {"a": zero, "b": zero} if twice else {"a": zero})
        base = impl.forward(x, weight, bias, {})
    assert np.array_equal(out[finite], base[finite], equal_nan=True)


@requirement("R2.9", kind="law")
@given(data=st.data(), dtype=layer_dtypes(), rank=ranks, scale=st.sampled_from([1e5, -1e30]))
def test_with_b_zero_a_scaling_beyond_a_narrow_dtype_changes_nothing(
    impl, data, dtype, rank, scale
):
    rows, columns = data.draw(features), data.draw(features)
    x, weight = data.draw(numbers(dtype, (2, rows))), data.draw(numbers(dtype, (columns, rows)))
    a = data.draw(numbers(dtype, (rows, rank)))
    terms = {"a": Term(a, np.zeros((rank, columns), dtype), scale, 1.0)}
    base = impl.forward(x, weight, None, {})
    assert np.array_equal(impl.forward(x, weight, None, terms), base)


@requirement("R2.9", kind="law")
@given(data=st.data(), dtype=layer_dtypes(), rank=ranks)
def test_with_b_zero_an_output_beyond_the_dtype_stays_what_the_base_gives(impl, data, dtype, rank):
    """The product with A is finite here, that with the weight often is not."""
    rows, columns, big = data.draw(features), data.draw(features), largest(dtype)
    huge = hnp.arrays(np.float64, (2, rows), elements=st.sampled_from([0.0, big, -big]))
    faint = hnp.arrays(np.float64, (rows, rank), elements=st.sampled_from([0.0, 2**-8, -(2**-8)]))
    x, a = data.draw(huge).astype(dtype), data.draw(faint).astype(dtype)
    weight = data.draw(numbers(dtype, (columns, rows)))
    terms = {"a": Term(a, np.zeros((rank, columns), dtype), 1.0, 1.0)}
    with np.errstate(all="ignore"):
        base = impl.forward(x, weight, None, {})
        assert np.array_equal(impl.forward(x, weight, None, terms), base, equal_nan=True)


@st.composite
def unimodular(draw, rank):
    """A whole matrix of determinant ±1 with its inverse."""
    m, inverse = np.eye(rank, dtype=np.int64), np.eye(rank, dtype=np.int64)
    moves = st.tuples(
        st.integers(0, rank - 1), st.integers(0, rank - 1), st.sampled_from([-2, -1, 1, 2])
    )
    for i, j, factor in draw(st.lists(moves, max_size=4)):
        step, back = np.eye(rank, dtype=np.int64), np.eye(rank, dtype=np.int64)
        step[i, j], back[i, j] = (-1, -1) if i == j else (factor, -factor)
        m, inverse = m @ step, back @ inverse
    return m, inverse


@requirement("R2.11", kind="law")
@given(data=st.data(), dtype=WIDE, rank=ranks)
def test_a_unimodular_change_of_gauge_changes_nothing_at_all(impl, data, dtype, rank):
    rows, columns = data.draw(features), data.draw(features)
    m, inverse = data.draw(unimodular(rank))
    assert np.array_equal(m @ inverse, np.eye(rank))
    a, b = data.draw(integers(dtype, (rows, rank))), data.draw(integers(dtype, (rank, columns)))
    x, weight = data.draw(integers(dtype, (2, rows))), data.draw(integers(dtype, (columns, rows)))
    turned = Term((a @ m).astype(dtype), (inverse @ b).astype(dtype), 2.0, 1.0)
    assert exactly(x, weight, None, [turned]).all()
    out = impl.forward(x, weight, None, {"a": turned})
    assert np.array_equal(out, impl.forward(x, weight, None, {"a": Term(a, b, 2.0, 1.0)}))


@requirement("R2.11", kind="law")
@given(data=st.data(), dtype=layer_dtypes(), rank=ranks, scale=st.sampled_from([0.5, 1.0, -2.0]))
def test_any_change_of_gauge_changes_no_more_than_its_condition_allows(
    impl, data, dtype, rank, scale
):
    rows, columns = data.draw(features), data.draw(features)
    m = data.draw(numbers(np.dtype(np.float64), (rank, rank))) + data.draw(
        st.sampled_from([0, 5])
    ) * np.eye(rank)
    assume(abs(np.linalg.det(m)) > 0.01)
    a, b = data.draw(numbers(dtype, (rows, rank))), data.draw(numbers(dtype, (rank, columns)))
    x, weight = data.draw(numbers(dtype, (3, rows))), data.draw(numbers(dtype, (columns, rows)))
    with np.errstate(over="ignore"):
        turned = (
            (a.astype(np.float64) @ m).astype(dtype),
            np.linalg.solve(m, b.astype(np.float64)).astype(dtype),
        )
    assume(np.isfinite(turned[1]).all())
    one, other = Term(a, b, scale, 1.0), Term(*turned, scale, 1.0)
    bounds = [layer_bound(x, weight, None, [term]) for term in (one, other)]
    for term, bound in zip((one, other), bounds, strict=True):
        assume_no_overflow(x, weight, None, [term], bound)
    out, turned_out = (
        impl.forward(x, weight, None, {"a": term}).astype(np.float64) for term in (one, other)
    )
    assert (abs(out - turned_out) <= sum(bounds) + gauge_bound(x, (a, b), m, turned, scale)).all()


# ---- this library's own layers


@requirement("R2.1")
@given(layer=layers(), training=st.booleans(), by_columns=st.booleans())
def test_a_wrapped_layer_keeps_the_bases_storage_and_names(layer, training, by_columns):
    _, weight, bias, terms = layer
    base = linear_of(weight, bias).train(training)
    if by_columns:  # a transposed weight, as of a checkpoint in another order
        base.weight = nn.Parameter(base.weight.detach().T.contiguous().T)
    before = state_of(base)
    adapted = LoRALinear(base, pairs_of(terms))
    assert list(adapted.state_dict()) == list(base.state_dict())
    assert all(
        adapted.state_dict()[key].data_ptr() == tensor.data_ptr()
        for key, tensor in base.state_dict().items()
    )
    assert (adapted.in_features, adapted.out_features, adapted.training) == (
        *weight.shape[::-1],
        training,
    )
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert state_of(base) == before


@requirement("R2.9")
@given(layer=layers())
def test_with_b_zero_an_adapted_layer_is_its_base(layer):
    x, weight, bias, terms = layer
    base = linear_of(weight, bias)
    zeros = {name: term._replace(B=np.zeros_like(term.B)) for name, term in terms.items()}
    adapted = LoRALinear(base, pairs_of(zeros))
    assert torch.equal(adapted(tensor_of(x)), base(tensor_of(x)))


@requirement("R2.3")
@given(layer=layers(max_terms=1), data=st.data())
def test_factors_given_at_construction_or_loaded_later_compute_the_same(layer, data):
    x, weight, bias, _ = layer
    rank, dtype = data.draw(ranks), data.draw(dtypes)
    a = data.draw(numbers(dtype, (weight.shape[1], rank)))
    b = data.draw(numbers(dtype, (rank, weight.shape[0])))
    pair = LowRank(a, b, data.draw(st.sampled_from([0.5, 2.0])))
    weighted = data.draw(st.sampled_from([1.0, 0.25]))
    given_at_once = LoRALinear(linear_of(weight, bias), {"default": (pair, weighted)})
    loaded = LoRALinear(linear_of(weight, bias), {"default": (LowRank(2 * a, b, 1.0), 1.0)})
    loaded.load_weights(pair, weight=weighted)
    for factor in ("lora_A", "lora_B"):
        assert torch.equal(getattr(loaded, factor), getattr(given_at_once, factor))
    assert torch.equal(loaded(tensor_of(x)), given_at_once(tensor_of(x)))


@requirement("R2.7")
@given(
    data=st.data(),
    flags=st.tuples(st.booleans(), st.booleans()),
    scale=st.sampled_from([1.0, 0.5, -2.0]),
)
def test_gradients_are_the_formulas_and_reach_the_factors_only(data, flags, scale):
    rows, columns, rank = data.draw(features), data.draw(features), data.draw(ranks)
    f32 = np.dtype(np.float32)
    weight, bias = data.draw(integers(f32, (columns, rows))), data.draw(integers(f32, (columns,)))
    a, b = data.draw(integers(f32, (rows, rank))), data.draw(integers(f32, (rank, columns)))
    x, g = data.draw(integers(f32, (3, rows))), data.draw(integers(f32, (3, columns)))
    base = linear_of(weight, bias)
    base.weight.requires_grad_(flags[0])
    base.bias.requires_grad_(flags[1])
    before = state_of(base)
    layer = TrainableLinear(base, LowRank(a, b, scale))
    layer(tensor_of(x)).backward(tensor_of(g))
    assert np.array_equal(array_of(layer.lora_A.grad), scale * x.T @ (g @ b.T))
    assert np.array_equal(array_of(layer.lora_B.grad), scale * (x @ a).T @ g)
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is not None] == [
        "lora_A",
        "lora_B",
    ]
    assert base.weight.grad is None
    assert base.bias.grad is None
    assert state_of(base) == before


@requirement("R2.7")
@given(layer=layers(), flag=st.booleans())
def test_a_layer_for_inference_passes_gradients_on_and_keeps_none(layer, flag):
    x, weight, bias, terms = layer
    base = linear_of(weight, bias)
    base.weight.requires_grad_(flag)
    adapted, inputs = LoRALinear(base, pairs_of(terms)), tensor_of(x).requires_grad_()
    adapted(inputs).sum().backward()
    assert inputs.grad is not None
    assert all(parameter.grad is None for parameter in (*base.parameters(), *adapted.parameters()))
    assert base.weight.requires_grad is flag


@requirement("R2.8")
@given(layer=layers(max_terms=1), data=st.data(), dtype=dtypes)
def test_for_inference_factors_take_the_layers_dtype(layer, data, dtype):
    x, weight, bias, _ = layer
    rank, scale = data.draw(ranks), data.draw(st.sampled_from([1 / 3, 2.0, -0.1]))
    a = data.draw(numbers(dtype, (weight.shape[1], rank)))
    b = data.draw(numbers(dtype, (rank, weight.shape[0])))
    adapted = LoRALinear(linear_of(weight, bias), {"docs": (LowRank(a, b, scale), 1.0)})
    kind = DTYPES[x.dtype]
    assert {adapted.lora_A.dtype, adapted.lora_B.dtype, adapted(tensor_of(x)).dtype} == {kind}
    assert adapted.lora_A.device == adapted.weight.device


@requirement("R2.8", "R2.2")
@given(data=st.data(), dtype=dtypes, scale=st.sampled_from([1 / 3, -0.1, 1e-3]))
def test_a_float64_layer_computes_in_float64_whatever_the_cards_dtype(data, dtype, scale):
    f64 = np.dtype(np.float64)
    rank = data.draw(ranks)
    rows = data.draw(features)
    columns = data.draw(features)
    x, weight = data.draw(numbers(f64, (2, rows))), data.draw(numbers(f64, (columns, rows)))
    a = data.draw(integers(dtype, (rows, rank))) + dtype.type(4)
    b = data.draw(integers(dtype, (rank, columns)))
    adapted = LoRALinear(linear_of(weight), {"docs": (LowRank(a, b, scale), 1.0)})
    check(
        array_of(adapted(tensor_of(x))),
        x,
        weight,
        None,
        [Term(a.astype(f64), b.astype(f64), scale, 1.0)],
    )


@requirement("R2.8")
@given(data=st.data(), base_dtype=dtypes, card_dtype=dtypes, rank=ranks)
def test_for_training_factors_are_float32_masters_whatever_the_base_and_under_autocast(
    data, base_dtype, card_dtype, rank
):
    autocast = base_dtype != np.float64 and data.draw(
        st.booleans()
    )  # torch's autocast leaves float64 alone
    rows, columns = data.draw(features), data.draw(features)
    weight = data.draw(numbers(base_dtype, (columns, rows)))
    a = data.draw(numbers(card_dtype, (rows, rank)))
    b = data.draw(numbers(card_dtype, (rank, columns)))
    layer = TrainableLinear(linear_of(weight), LowRank(a, b, 0.5))
    assert np.array_equal(array_of(layer.lora_A), a.astype(np.float32))
    x = torch.ones(2, rows, dtype=torch.float32 if autocast else DTYPES[base_dtype])
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == (torch.bfloat16 if autocast else DTYPES[base_dtype])
    assert {layer.lora_A.dtype, layer.lora_A.grad.dtype, layer.lora_B.grad.dtype} == {torch.float32}
    assert layer.weight.dtype == DTYPES[base_dtype]
    learned = layer.learned()
    assert (learned.dtype, learned.scaling) == (np.float32, 0.5)


@requirement("R2.10")
@given(
    rows=st.integers(1, 4096), columns=features, rank=st.integers(1, 16), seed=st.integers(0, 2**63)
)
def test_a_fresh_pair_is_zero_in_b_bounded_in_a_and_decided_by_its_seed(rows, columns, rank, seed):
    pair = initial(rows, columns, rank, np.random.default_rng(seed))
    assert (pair.A.shape, pair.B.shape, pair.dtype) == ((rows, rank), (rank, columns), np.float32)
    assert not pair.B.any()
    assert rows * float(abs(pair.A).max()) ** 2 <= 1
    assert pair == initial(rows, columns, rank, np.random.default_rng(seed))
    assert rows * rank < 8 or pair != initial(rows, columns, rank, np.random.default_rng(seed + 1))


class Ends:
    """A generator that draws nothing but the ends of the range it is asked for."""

    def __init__(self, bits):
        self.bits = itertools.cycle(bits)

    def uniform(self, low, high, shape):
        return np.array([high if next(self.bits) else low for _ in range(np.prod(shape))]).reshape(
            shape
        )


@requirement("R2.10")
@given(
    rows=st.integers(1, 4096),
    rank=st.integers(1, 3),
    ends=st.lists(st.booleans(), min_size=1, max_size=9),
)
def test_not_even_a_draw_of_the_bound_itself_is_rounded_beyond_it(rows, rank, ends):
    found = initial(rows, 1, rank, Ends(ends)).A.astype(np.float64)
    assert np.array_equal(found > 0, Ends(ends).uniform(-1, 1, found.shape) > 0)
    assert (rows * found**2 <= 1).all()
    assert (rows * found**2 > 1 - 2 * gamma(4, np.dtype(np.float32))).all()


@requirement("R2.12")
@given(layer=layers(), rounds=st.integers(1, 4), narrow=st.booleans())
def test_folding_and_going_back_any_number_of_times_leaves_the_base_as_it_was(
    layer, rounds, narrow
):
    x, weight, bias, terms = layer
    model = nn.Sequential(
        linear_of(weight, bias), nn.Identity(), linear_of(np.ones((2, len(weight)), x.dtype))
    )
    cards = [
        LoRACard(f"c{i}", t.A.shape[1], 1.0, ["0"], {"0": LowRank(t.A, t.B, t.scaling)})
        for i, t in enumerate(terms.values())
    ]
    before, plain = state_of(model), model(tensor_of(x))
    for _ in range(rounds):
        folded = fold(adapt(model, cards), narrow=narrow)
        assert folded(tensor_of(x)).shape == plain.shape
        assert folded[2].weight.data_ptr() == model[2].weight.data_ptr()
        touched, factored = bool(cards), x.dtype.itemsize < 4 and not narrow
        assert isinstance(folded[0], LoRALinear) == bool(factored and touched)
        assert (folded[0].weight.data_ptr() == model[0].weight.data_ptr()) is (
            factored or not touched
        )
        assert state_of(model) == before
        assert torch.equal(model(tensor_of(x)), plain)


@requirement("R2.12")
@given(data=st.data(), dtype=WIDE, whole=st.booleans())
def test_a_folded_weight_is_w_plus_delta_w(data, dtype, whole):
    x, weight, bias, terms = data.draw(layers(whole=whole, dtype=dtype))
    layer = LoRALinear(linear_of(weight, bias), pairs_of(terms))
    folded = fold(nn.Sequential(layer))[0]
    each = np.eye(weight.shape[1], dtype=dtype)
    check(array_of(folded.weight).T, each, weight, None, terms.values())
    if whole:
        assert np.array_equal(array_of(folded.weight).T, exact(each, weight, None, terms.values()))
        assert torch.equal(folded(tensor_of(x)), layer(tensor_of(x)))
    assert not folded.weight.requires_grad
    assert list(folded.state_dict()) == list(layer.state_dict())


@requirement("R2.2", "R2.12")
@given(layer=layers(max_terms=1, whole=True))
def test_delta_is_what_the_pair_does_to_the_weight(layer):
    x, weight, _, terms = layer
    wide = x.astype(np.float64)
    for term in terms.values():
        pair = LowRank(term.A, term.B, term.scaling)
        assert delta(pair).shape == weight.shape
        assert np.array_equal(
            wide @ delta(pair, dtype=np.float64).T,
            wide @ term.A.astype(float) @ term.B.astype(float) * term.scaling,
        )
        assert np.array_equal(delta(pair), delta(pair, dtype=np.float64))


@requirement("R2.2", "R2.5")
@given(layer=layers(), mixed=dtypes)
def test_the_algebra_of_pairs_agrees_with_the_layer(layer, mixed):
    """`lora.factors.apply` is the low-rank part of the formula, for factors of another dtype than x
    as well.
    """
    x, weight, _, terms = layer
    assume(terms)
    with np.errstate(over="ignore"):
        factors = {
            name: [part.astype(np.float32).astype(mixed) for part in (term.A, term.B)]
            for name, term in terms.items()
        }
    assume(all(np.isfinite(part).all() for pair in factors.values() for part in pair))
    pairs = [(LowRank(*factors[name], t.scaling), t.weight) for name, t in terms.items()]
    work = np.dtype(np.float64 if np.float64 in (x.dtype, mixed) else np.float32)
    rounded = [Term(p.A.astype(work), p.B.astype(work), p.scaling, w) for p, w in pairs]
    out = apply_pairs(x, pairs)
    assert out.dtype == work
    check(out, x.astype(work), np.zeros_like(weight, dtype=work), None, rounded)


@requirement("R2.2", "R2.6")
@given(layer=layers(min_terms=1, max_terms=1), inference=st.booleans())
def test_the_low_rank_term_is_added_within_the_bound(layer, inference):
    x, weight, bias, terms = layer
    for term in terms.values():
        a, b = tensor_of(term.A), tensor_of(term.B)
        out = linear_of(weight, bias)(tensor_of(x)).detach()
        whole = [Term(term.A, term.B, 1.0, 1.0)]
        with torch.inference_mode(inference):
            found = add_low_rank(out.clone(), tensor_of(x), a, b)
        check(array_of(found), x, weight, bias, whole)


@requirement("R2.13", "R2.2", "R2.6")
@given(layer=layers(max_terms=2), many=st.booleans())
def test_the_order_that_forms_the_weight_equals_the_factored_one(layer, many):
    x, weight, bias, terms = layer
    pairs = {
        name: (LowRank(term.A, term.B, term.scaling), term.weight) for name, term in terms.items()
    }
    adapted = LoRALinear(linear_of(weight, bias), pairs)
    adapted.weight_side_threshold = -1.0 if many else float("inf")
    with torch.inference_mode():
        check(array_of(adapted(tensor_of(x))), x, weight, bias, list(terms.values()))


@requirement("R5.8", "R2.2")
@given(data=st.data(), layer=layers(max_terms=0), whole=st.booleans())
def test_a_row_of_a_batch_gets_what_it_would_get_alone(data, layer, whole):
    x, weight, bias, _ = layer
    elements = integers if whole else numbers
    if whole:
        weight, bias = data.draw(integers(x.dtype, weight.shape)), None
    count, times = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    tokens = data.draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    x = data.draw(elements(x.dtype, (count * times, *tokens, weight.shape[1])))
    sets = []
    for _ in range(data.draw(st.integers(1, 3))):
        names = data.draw(st.lists(st.sampled_from("abc"), unique=True, max_size=2))
        shapes = [(weight.shape[1], 2), (2, weight.shape[0])]
        sets.append(
            {
                n: Term(*(data.draw(elements(x.dtype, shape)) for shape in shapes), 2.0, 1.0)
                for n in names
            }
        )
    own = data.draw(st.lists(st.integers(0, len(sets) - 1), min_size=count, max_size=count))
    base = linear_of(weight, bias)
    layer = RowLinear(base, [pairs_of(terms) for terms in sets])
    with rows(own), torch.inference_mode(data.draw(st.booleans())):
        out = array_of(layer(tensor_of(x)))
    plain = array_of(base(tensor_of(x)))
    for row in range(count * times):
        terms = sets[own[row // times]]
        if not terms:
            assert np.array_equal(out[row], plain[row])
        check(out[row], x[row], weight, bias, terms.values())
        alone = array_of(LoRALinear(base, pairs_of(terms))(tensor_of(x[row])))
        where = exactly(x[row], weight, bias, terms.values()) & whole
        assert np.array_equal(out[row][where], alone[where])


@requirement("R2.2", "R8.2")
@given(layer=layers(whole=True))
def test_a_stacked_pair_does_what_the_sum_of_its_parts_does(layer):
    x, _, _, terms = layer
    assume(terms)
    stacked = concat(pairs_of(terms).values())
    assert stacked.rank == max(1, sum(t.A.shape[1] for t in terms.values() if t.weight != 0))
    wide = x.astype(np.float64)
    parts = sum(
        wide @ delta(LowRank(t.A, t.B, t.scaling), dtype=np.float64).T * t.weight
        for t in terms.values()
    )
    assert np.array_equal(wide @ delta(stacked, dtype=np.float64).T, parts)


@requirement("R2.2", "R8.2")
@given(data=st.data(), shape=st.tuples(features, features))
def test_pairs_of_any_dtypes_add_up_in_the_widest_and_in_no_less_than_float32(data, shape):
    (rows, columns), whole = shape, []
    for dtype in data.draw(st.lists(dtypes, min_size=1, max_size=3)):
        rank, scaling = data.draw(ranks), data.draw(st.sampled_from([None, 1.0, -2.0]))
        a, b = data.draw(integers(dtype, (rows, rank))), data.draw(integers(dtype, (rank, columns)))
        whole.append((LowRank(a, b, scaling), data.draw(st.sampled_from([1.0, 0.0, 3.0]))))
    asked = data.draw(st.sampled_from([None, np.float32, np.float64]))
    stacked = concat(whole, dtype=asked)
    wide = np.float64 if np.float64 in [asked, *(pair.dtype for pair, _ in whole)] else np.float32
    assert (stacked.dtype, stacked.scaling) == (wide, 1)
    total = np.zeros((columns, rows))
    for pair, weight in whole:
        plain = pair.A.astype(float) @ pair.B.astype(float)
        total += plain.T * (1 if pair.scaling is None else pair.scaling) * weight
        assert delta(pair).dtype == (np.float64 if pair.dtype == np.float64 else np.float32)
    assert np.array_equal(delta(stacked), total)
    for dtype in (np.float32, np.float64):
        assert delta(stacked, dtype=dtype).dtype == dtype
        assert np.array_equal(delta(stacked, dtype=dtype), total)


EXTREME = [0.0, 1.0, -1.0, 2.0, 1e30, -1e30, 3e38, -3e38, np.inf, -np.inf, np.nan]


@requirement("R2.2")
@given(data=st.data())
def test_what_is_too_large_becomes_infinite_or_nan_without_a_warning(data):
    """Rank 1: a product is one multiplication, so that it is what IEEE 754 says, also of infinities
    and NaN.
    """
    numbers_of = st.lists(st.sampled_from(EXTREME), min_size=1, max_size=3)
    a, b = (np.array(data.draw(numbers_of), np.float32) for _ in "ab")
    for scaling in (1.0, 0.0, 1e30, -1e300):
        pair = LowRank(a[:, None], b[None], scaling)
        with np.errstate(all="ignore"):
            scaled = (b.astype(np.float64) * scaling).astype(np.float32)
            want = np.multiply.outer(a, scaled)
        assert np.array_equal(delta(pair), want.T, equal_nan=True)
        assert np.array_equal(concat([(pair, 1.0)]).B[0], scaled, equal_nan=True)
        if np.isfinite(a).all():  # else 0 times an infinity is in each sum
            found = apply_pairs(np.eye(len(a), dtype=np.float32), [(pair, 1.0)])
            assert np.array_equal(found, want, equal_nan=True)
        assert np.isnan(apply_pairs(np.full((1, len(a)), np.nan, np.float32), [(pair, 1.0)])).all()


def spectral_bound(pair):
    """How far computed singular values of ΔW may lie from its own (Higham, theorem 19.4; Weyl).

    Each step of two QR factorisations, a product and an SVD is backward stable: it perturbs by no
    more than γ of its operations, times the Frobenius norms of what it is given.
    """
    size = abs(1 if pair.scaling is None else pair.scaling)
    for factor in (pair.A, pair.B):
        size *= np.linalg.norm(factor.astype(np.float64))
    return (
        gamma(64 * (pair.in_features + pair.out_features) * pair.rank**2, np.dtype(np.float64))
        * size
    )


@requirement("R2.11", "R2.2")
@given(data=st.data(), dtype=dtypes, rank=ranks, scaling=st.sampled_from([None, 2.0, -0.5, 0.0]))
def test_the_spectrum_is_that_of_delta_w_in_whatever_gauge(data, dtype, rank, scaling):
    rows, columns = data.draw(features), data.draw(features)
    a, b = data.draw(integers(dtype, (rows, rank))), data.draw(integers(dtype, (rank, columns)))
    m, inverse = data.draw(unimodular(rank))
    f64 = np.dtype(np.float64)
    pair = LowRank(a, b, scaling)
    turned = LowRank(a.astype(f64) @ m, inverse @ b.astype(f64), scaling)
    found, there = spectrum(pair), spectrum(turned)
    want = np.linalg.svd(delta(pair, dtype=f64), compute_uv=False)
    assert found.dtype == f64
    assert found.shape == there.shape == (min(rows, rank, columns),)
    assert (abs(found - want[: len(found)]) <= spectral_bound(pair)).all()
    assert (abs(want[len(found) :]) <= spectral_bound(pair)).all()
    assert (abs(there - want[: len(found)]) <= spectral_bound(turned)).all()


@requirement("R2.11")
@given(data=st.data(), shape=st.tuples(features, ranks, features))
def test_what_is_not_finite_has_no_spectrum(data, shape):
    """Not either factor, and not ΔW: numbers of 1e300 in both are finite, and their products are
    not.
    """
    rows, rank, columns = shape
    signs = st.integers(0, 2**32).map(
        lambda seed: np.random.default_rng(seed).choice([1.0, -1.0], (9, 9))
    )
    a, b = data.draw(signs)[:rows, :rank], data.draw(signs)[:rank, :columns]
    assert len(spectrum(LowRank(a, b))) == min(shape)
    with pytest.raises(ArgumentError, match=r"^spectrum of a pair: expected a ΔW within float64"):
        spectrum(LowRank(a * 1e300, b * 1e300))
    for bad in (np.nan, np.inf, -np.inf):
        for factor in (a, b):
            row, column = (data.draw(st.integers(0, size - 1)) for size in factor.shape)
            kept, factor[row, column] = factor[row, column], bad
            with pytest.raises(
                ArgumentError, match=r"^spectrum of a pair: expected finite factors"
            ):
                spectrum(LowRank(a, b))
            factor[row, column] = kept


@requirement("R20.4")
@given(data=st.data(), shape=st.tuples(st.integers(1, 9), st.integers(1, 6)), dtype=WIDE)
def test_a_thin_qr_is_orthonormal_times_upper_triangular(data, shape, dtype):
    """Within γ of the operations of Householder's reflections; also for deficient ranks."""
    rows, columns = shape
    matrix = data.draw(numbers(dtype, shape) | integers(dtype, shape, largest=1))
    if data.draw(st.booleans()):
        matrix[:, data.draw(st.integers(0, columns - 1))] = matrix[:, 0]
    if data.draw(st.booleans()):
        matrix[data.draw(st.integers(0, rows - 1)) :] = 0
    before, count = matrix.copy(), min(shape)
    q, r = thin_qr(matrix)
    bound = gamma(64 * rows * columns, dtype)
    assert (q.shape, r.shape, q.dtype, r.dtype) == ((rows, count), (count, columns), dtype, dtype)
    assert np.array_equal(matrix, before)
    assert not np.tril(r, -1).any()
    assert np.linalg.norm(q.T @ q - np.eye(count)) <= bound
    assert np.linalg.norm(q @ r - matrix) <= bound * max(
        np.linalg.norm(matrix), float(np.finfo(dtype).tiny)
    )
    expected = np.linalg.qr(matrix)[1]
    assert np.linalg.norm(r - expected) <= bound * np.linalg.norm(matrix)
