"""R16: extraction of a card from full weights: the best approximation of each ΔW, at the rank that
was asked for.
"""

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from lora.card import DTYPES, same_bits
from lora.extract import METHODS, MaxError, MinEnergy, extract_delta, extract_direct
from lora.testing.plugin import requirement
from lora.testing.strategies import dtypes, features, integers, numbers, ranks
from lora.testing.tolerance import accumulator, gamma, roundoff, underflow

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
PARTS = ("query", "größe", "output.dense")
MODULES = [f"encoder.layer.{layer}.{part}" for layer in (0, 1, 11) for part in PARTS]
shares = st.floats(0.01, 0.999) | st.sampled_from([0.5, 0.9, 0.99, 1.0])
SHAPES = st.tuples(features, features)
bounds = st.floats(0.0, 0.99) | st.sampled_from([0.0, 1e-12, 1e-6, 0.05])
WIDE_RANKS = st.sampled_from([2**8 + 1, 2**16 + 1, 2**32 + 1])


@st.composite
def graded(draw, dtype, shape):
    """A matrix whose singular values spread over powers of two, exactly known rank among them; some
    equal, some zero.
    """
    scales = 2.0 ** -draw(hnp.arrays(np.int64, shape[1], elements=st.integers(0, 12)))
    matrix = draw(integers(F64, shape)) * scales * draw(st.sampled_from([1.0, 2.0**-6, 2.0**6]))
    return matrix.astype(dtype)


def matrices(dtype, shape):
    """Any finite matrix, or one whose singular values differ much."""
    return numbers(dtype, shape) | graded(dtype, shape)


@st.composite
def models(draw, *, dtype=None, most=3, shape=SHAPES):
    """Weights of a base and a tuned model that differ in one module at least, and perhaps not in
    another.
    """
    dtype = draw(dtypes) if dtype is None else dtype
    base, tuned = {}, {}
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=most, unique=True)):
        size, key = draw(shape), f"{module}.weight"
        base[key] = draw(numbers(dtype, size))
        scale = draw(st.sampled_from([1.0, 1.0, 2.0**-30])) if dtype == F64 else 1.0
        change = scale * draw(matrices(dtype, size)).astype(np.float64)
        moved = base[key].astype(np.float64) + change
        tuned[key] = moved.astype(dtype)
        assume(np.isfinite(tuned[key].astype(np.float64)).all())
    assume(any((delta(base, tuned, key) != 0).any() for key in base))
    return base, tuned


@st.composite
def low_rank_models(draw, *, rank=ranks, shape=SHAPES):
    """Whole-number weights whose difference has that rank, and parts of unlike size; nothing in
    them is rounded.
    """
    base, tuned, most = {}, {}, draw(rank)
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=3, unique=True)):
        out, inner = draw(shape)
        left, right = draw(integers(F64, (out, most))), draw(integers(F64, (most, inner)))
        left *= 2.0 ** -draw(hnp.arrays(np.int64, most, elements=st.sampled_from([0, 0, 16, 30])))
        base[f"{module}.weight"] = draw(integers(F64, (out, inner)))
        tuned[f"{module}.weight"] = base[f"{module}.weight"] + left @ right
    assume(any((base[key] != tuned[key]).any() for key in base))
    return base, tuned, most


@st.composite
def large_models(draw, *, rank=None):
    """Weights large enough for a subspace to be smaller, of any spectrum, or whole numbers that
    differ by a product.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([F32, F64]))
    base, tuned = {}, {}
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=3, unique=True)):
        shape = draw(st.tuples(st.integers(12, 40), st.integers(12, 40)))
        base[f"{module}.weight"] = rng.integers(-4, 5, shape).astype(dtype)
        inner = min(shape) if rank is None else rank
        left, right = rng.integers(-3, 4, (shape[0], inner)), rng.integers(-3, 4, (inner, shape[1]))
        decay = 0.0 if rank else draw(st.sampled_from([0.0, 0.1, 1.0]))
        moved = (left * np.exp(-decay * np.arange(inner))) @ right
        tuned[f"{module}.weight"] = (base[f"{module}.weight"] + moved).astype(dtype)
    return base, tuned


@st.composite
def known_spectra(draw):
    """A base and a tuned model, and for each module its singular values, which are whole numbers:
    ties, steps and heavy tails among them.
    """
    base, tuned, spectra = {}, {}, {}
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=2, unique=True)):
        rank, signs = draw(st.sampled_from([2, 4, 8])), np.ones((1, 1))
        while len(signs) < rank:  # of orthogonal columns
            signs = np.block([[signs, signs], [signs, -signs]])
        tails = [[1] * rank, [9] * (rank - 1) + [1], [round(60 / i) for i in range(1, rank + 1)]]
        free = st.lists(st.sampled_from([1, 1, 2, 3, 9, 60]), min_size=rank, max_size=rank)
        values = np.array(sorted(draw(st.sampled_from(tails) | free), reverse=True), F64)
        square = (signs[draw(st.permutations(range(rank)))] * values) @ signs.T
        change = np.pad(square, ((0, draw(st.integers(0, 2))), (0, draw(st.integers(0, 2)))))
        base[f"{module}.weight"] = draw(integers(F64, change.shape))
        tuned[f"{module}.weight"] = base[f"{module}.weight"] + change
        spectra[f"{module}.weight"] = values * rank
    return base, tuned, spectra


def delta(base, tuned, key):
    """ΔW in float64."""
    return tuned[key].astype(np.float64) - base[key].astype(np.float64)


def norm(matrix):
    return float(np.sqrt((matrix.astype(np.float64) ** 2).sum()))


def spectrum(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def tail(values, rank):
    """Norm of what the best approximation of a rank leaves."""
    return float(np.sqrt((values[rank:] ** 2).sum()))


def scaling_of(card, pair):
    return card.alpha / card.rank if pair.scaling is None else pair.scaling


def product(card, key):
    """The card's ΔW for a weight, in float64; zero if it has no row for it."""
    pair = card.weights.get(key.removesuffix(".weight"))
    if pair is None:
        return np.zeros(())
    return scaling_of(card, pair) * (pair.A.astype(np.float64) @ pair.B.astype(np.float64)).T


def slack(base, tuned, key, card):
    """How far the error of a computed best approximation may lie from the exact one's, in the
    Frobenius norm.

    Each of at most min(m, n) Householder steps of a decomposition in accumulator precision has a
    backward error of γ of a small multiple (12) of max(m, n) (Higham, lemma 19.3 and section 20.3);
    singular values move by no more than that (Weyl), and so does what the approximation is of. The
    oracle has such an error too. A factor's entry is a product of two numbers, rounded, and again
    to the card's dtype: u each, of A and of B, and in Σ|A||B| ≤ √r ‖ΔW‖.
    """
    matrix, pair = delta(base, tuned, key), card.weights.get(key.removesuffix(".weight"))
    work = accumulator(base[key].dtype)
    stored = pair.A.dtype if pair else work
    steps, longest = min(matrix.shape), max(matrix.shape)
    inputs = abs(base[key].astype(np.float64)) + abs(tuned[key].astype(np.float64))
    subtracted = roundoff(work) * norm(inputs) if work == F64 else 0.0
    if work == F32:
        subtracted = roundoff(F32) * norm(matrix)
    rounding = np.sqrt(steps) * (10 * max(roundoff(work), roundoff(stored)))
    lost = 0.0
    if pair:
        scale = abs(scaling_of(card, pair))
        lost = underflow(stored) * scale * np.sqrt(matrix.size) * (norm(pair.A) + norm(pair.B) + 1)
    decomposed = (4 * steps * gamma(12 * longest, work) + 2 * rounding) * norm(matrix)
    return decomposed + 2 * subtracted + lost


# ---- through the binding


@requirement("R16.1", kind="law")
@given(models=models(), rank=ranks | WIDE_RANKS)
def test_the_error_is_that_of_the_tail_singular_values(impl, models, rank):
    base, tuned = models
    card = impl.extract(base, tuned, rank, None, None)
    for key in base:
        left = delta(base, tuned, key) - product(card, key)
        least = tail(spectrum(delta(base, tuned, key)), rank)
        assert abs(norm(left) - least) <= slack(base, tuned, key, card)


@requirement("R16.1", kind="law")
@given(models=models(dtype=F64), rank=ranks)
def test_what_is_left_is_orthogonal_to_what_was_taken(impl, models, rank):
    """The law of any projection onto singular directions; a nearly best approximation of another
    kind breaks it.
    """
    base, tuned = models
    card = impl.extract(base, tuned, rank, None, None)
    for key in base:
        taken = product(card, key) + np.zeros_like(base[key])
        left, off = delta(base, tuned, key) - taken, slack(base, tuned, key, card)
        allowed = off * (norm(taken) + norm(left) + off)
        assert norm(left @ taken.T) <= allowed
        assert norm(left.T @ taken) <= allowed


def assert_exact(impl, base, tuned, rank):
    card = impl.extract(base, tuned, rank, None, None)
    for key in base:
        assert norm(delta(base, tuned, key) - product(card, key)) <= slack(base, tuned, key, card)


@requirement("R16.2", kind="law")
@given(models=low_rank_models())
def test_a_difference_of_no_higher_rank_is_extracted_exactly(impl, models):
    assert_exact(impl, *models)


@requirement("R16.3", kind="law")
@given(models=low_rank_models(), dtype=dtypes)
def test_a_base_of_another_dtype_takes_no_digit_from_the_tuned_model(impl, models, dtype):
    """The base holds small whole numbers, which every dtype does."""
    base, *rest = models
    assert_exact(impl, {key: weight.astype(dtype) for key, weight in base.items()}, *rest)


@requirement("R16.2", kind="law")
@given(models=models(), more=st.integers(0, 20))
def test_at_full_rank_nothing_is_lost(impl, models, more):
    assert_exact(impl, *models, max(min(weight.shape) for weight in models[0].values()) + more)


@requirement("R16.3", kind="law")
@given(models=models(dtype=F32) | models(dtype=F64), rank=ranks, data=st.data())
def test_the_base_with_the_card_gives_what_the_tuned_model_gives(impl, models, rank, data):
    """Off by the tail singular values at most, and by rounding: exactly one ΔW, at any rank."""
    base, tuned = models
    card = impl.extract(base, tuned, rank, None, None)
    for key, weight in base.items():
        x = data.draw(numbers(F64, (2, weight.shape[1])))
        out = x @ (weight.astype(F64) + product(card, key)).T
        want = x @ tuned[key].astype(F64).T
        away = tail(spectrum(delta(base, tuned, key)), rank) + slack(base, tuned, key, card)
        rounded = gamma(2 * len(x.T) + 4, F64) * norm(x) * (norm(weight) + norm(tuned[key]))
        assert norm(out - want) <= norm(x) * away + rounded


@requirement("R16.3", kind="convention")
@given(models=models(), rank=ranks)
def test_the_card_has_and_targets_every_module_that_differs_under_its_name(impl, models, rank):
    base, tuned = models
    card = impl.extract(base, tuned, rank, None, None)
    for key in base:
        module = key.removesuffix(".weight")
        if delta(base, tuned, key).any():
            ends = [module.split(".", count)[-1] for count in range(module.count(".") + 1)]
            assert module in card.weights
            assert set(card.target_modules) & {"all-linear", *ends}


@requirement("R16.3", kind="law")
@given(models=low_rank_models(), rank=ranks)
def test_extracting_from_the_base_with_the_card_gives_the_card_again(impl, models, rank):
    base, tuned, _ = models
    card = impl.extract(base, tuned, rank, None, None)
    made = {key: base[key] + product(card, key) for key in base}
    again = impl.extract(base, made, rank, None, None)
    for key in base:
        allowed = slack(base, tuned, key, card) + slack(base, made, key, again)
        assert norm(product(again, key) - product(card, key)) <= allowed


def rank_of(card, key):
    pair = card.weights.get(key.removesuffix(".weight"))
    return 0 if pair is None else pair.A.shape[1]


@requirement("R16.5", kind="convention")
@given(models=models(), rank=st.integers(1, 40) | WIDE_RANKS)
def test_a_fixed_rank_is_never_exceeded_nor_is_that_of_the_matrix(impl, models, rank):
    base, tuned = models
    card = impl.extract(base, tuned, rank, None, None)
    assert card.rank == max(rank_of(card, key) for key in base)
    for key, weight in base.items():
        assert rank_of(card, key) <= min(rank, *weight.shape)


@requirement("R16.5", kind="convention")
@given(models=models(dtype=F64, most=4), share=shares)
def test_each_module_has_the_smallest_rank_that_holds_the_energy(impl, models, share):
    """Up to what rounding leaves undecided where the share is met almost exactly."""
    base, tuned = models
    card = impl.extract(base, tuned, None, share, None)
    for key in base:
        values, rank = spectrum(delta(base, tuned, key)), rank_of(card, key)
        whole, off = norm(delta(base, tuned, key)), slack(base, tuned, key, card)
        unsure = 2 * off * whole + off * off + gamma(len(values) + 2, F64) * whole**2
        assert rank <= min(base[key].shape)
        assert tail(values, rank) ** 2 <= (1 - share) * whole**2 + unsure
        if rank > 1:
            assert tail(values, rank - 1) ** 2 >= (1 - share) * whole**2 - unsure


@requirement("R16.5", kind="convention")
@given(models=models(dtype=F64, most=4), bound=bounds)
def test_each_module_has_the_smallest_rank_within_the_error_bound(impl, models, bound):
    base, tuned = models
    card = impl.extract(base, tuned, None, None, bound)
    for key in base:
        values, rank = spectrum(delta(base, tuned, key)), rank_of(card, key)
        allowed, off = bound * norm(delta(base, tuned, key)), slack(base, tuned, key, card)
        assert rank <= min(base[key].shape)
        assert tail(values, rank) <= allowed + off
        if rank > 1:
            assert tail(values, rank - 1) >= allowed - off


@requirement("R16.5", kind="convention")
@given(models=known_spectra(), data=st.data(), hair=st.sampled_from([1e-6, 1e-9]))
def test_a_rule_that_is_met_by_a_hair_takes_the_rank_and_one_missed_by_a_hair_the_next(
    impl, models, data, hair
):
    """At each rank of each module, from singular values that are known without computing them."""
    base, tuned, spectra = models
    key = data.draw(st.sampled_from(sorted(spectra)))
    values = spectra[key]
    rank = data.draw(st.integers(1, len(values) - 1))
    squares = values**2
    share, rest = squares[:rank].sum() / squares.sum(), squares[rank:].sum() / squares.sum()
    for met, factor in ((0, 1 - hair), (1, 1 + hair)):
        by_energy = impl.extract(base, tuned, None, float(share * factor), None)
        by_error = impl.extract(base, tuned, None, None, float(np.sqrt(rest)) * (2 - factor))
        assert rank_of(by_energy, key) == rank_of(by_error, key) == rank + met


@requirement("R16.5", kind="convention")
@given(models=models(dtype=F64, most=4), share=shares, bound=bounds)
def test_the_rank_of_a_module_does_not_depend_on_the_others(impl, models, share, bound):
    base, tuned = models
    for energy, error in ((share, None), (None, bound)):
        card = impl.extract(base, tuned, None, energy, error)
        for key in base:
            if delta(base, tuned, key).any():
                alone = impl.extract({key: base[key]}, {key: tuned[key]}, None, energy, error)
                assert rank_of(alone, key) == rank_of(card, key)


# ---- this library


rules = st.one_of(ranks, shares.map(MinEnergy), bounds.map(MaxError))


def modules_of(card):
    return card.metadata["extract"]["modules"]


def measured(base, tuned, card, key):
    """Relative error of a card's pair, in float64."""
    pair = card.weights[key.removesuffix(".weight")]
    approximation = (pair.A.astype(np.float64) @ pair.B.astype(np.float64)).T * pair.scaling
    return norm(delta(base, tuned, key) - approximation) / norm(delta(base, tuned, key))


def measuring(base, card, key):
    """How far the recorded relative error may lie from the true one: of the product, the difference
    and the norms.
    """
    pair = card.weights[key.removesuffix(".weight")]
    work = accumulator(base[key].dtype)
    terms = pair.rank + base[key].size + 6
    return 4 * gamma(terms, work) * (1 + np.sqrt(pair.rank))


@requirement("R16.4")
@given(models=models(), rule=rules, method=st.sampled_from(METHODS))
def test_both_factors_of_a_pair_carry_the_same_weights(models, rule, method):
    """AᵀA = BBᵀ = the diagonal matrix of singular values."""
    base, tuned = models
    card = extract_delta(base, tuned, rule, method=method)
    for module, pair in card.weights.items():
        assert pair.scaling == 1.0
        a, b = pair.A.astype(np.float64), pair.B.astype(np.float64)
        off = slack(base, tuned, f"{module}.weight", card)
        values = np.diag(np.diag(a.T @ a))
        assert norm(a.T @ a - b @ b.T) <= 2 * off
        assert norm(a.T @ a - values) <= 2 * off
        assert (np.diff(np.diag(values)) <= 2 * off).all()


@requirement("R16.6")
@given(models=models(), rule=rules, method=st.sampled_from(METHODS))
def test_direct_is_the_difference_from_a_model_of_zeros(models, rule, method):
    _, tuned = models
    assume(any(weight.any() for weight in tuned.values()))
    zeros = {key: np.zeros_like(weight) for key, weight in tuned.items()}
    direct = extract_direct(tuned, rule, method=method)
    card = extract_delta(zeros, tuned, rule, method=method)
    assert (direct.weights, modules_of(direct)) == (card.weights, modules_of(card))


@requirement("R16.6", "R16.3")
@given(models=models())
def test_what_tuning_left_alone_has_no_row(models):
    base, tuned = models
    changed = {key.removesuffix(".weight") for key in base if (base[key] != tuned[key]).any()}
    assert set(extract_delta(base, tuned).weights) == changed


@requirement("R16.7")
@given(models=large_models(), rule=rules, seed=st.integers(0, 2**64), data=st.data())
def test_the_randomized_method_depends_on_seed_and_module_alone(models, rule, seed, data):
    base, tuned = models
    options = {"method": "randomized", "seed": seed}
    card = extract_delta(base, tuned, rule, **options)
    order = data.draw(st.permutations(list(base)))
    shuffled = [{key: model[key] for key in order} for model in models]
    assert extract_delta(*shuffled, rule, **options) == card
    for module, pair in card.weights.items():
        options |= {"target_modules": module, "dtype": pair.dtype.name}
        assert extract_delta(base, tuned, rule, **options).weights[module] == pair


@requirement("R16.7", "R16.8", "R16.5")
@given(models=large_models(), rule=rules, seed=st.integers(0, 3))
def test_the_randomized_method_reports_what_it_really_left(models, rule, seed):
    base, tuned = models
    card = extract_delta(base, tuned, rule, method="randomized", seed=seed)
    for module, found in modules_of(card).items():
        key = f"{module}.weight"
        true, unsure = measured(base, tuned, card, key), measuring(base, card, key)
        assert abs(found["error"] - true) <= unsure
        matrix = delta(base, tuned, key)
        off = slack(base, tuned, key, card) / norm(matrix)
        assert true >= tail(spectrum(matrix), found["rank"]) / norm(matrix) - off
        if isinstance(rule, MaxError):
            assert true <= rule.bound + off + unsure
        if isinstance(rule, MinEnergy):
            assert true**2 <= 1 - rule.share + 2 * (off + unsure) + (off + unsure) ** 2
        if isinstance(rule, int):
            assert found["rank"] <= rule


@requirement("R16.7", "R16.2")
@given(rank=st.integers(1, 4), seed=st.integers(0, 3), data=st.data())
def test_the_randomized_method_is_exact_where_the_rank_suffices(rank, seed, data):
    """The images of random vectors span a product of that rank, each direction as well as its share
    lets it.
    """
    base, tuned = data.draw(large_models(rank=rank))
    card = extract_delta(base, tuned, rank, method="randomized", seed=seed)
    for key in base:
        values = spectrum(delta(base, tuned, key))
        spread = values[0] / values[rank - 1]
        assume(spread < 1e3)
        allowed = spread * slack(base, tuned, key, card) / norm(delta(base, tuned, key))
        assert measured(base, tuned, card, key) <= allowed


@requirement("R16.8")
@given(models=models(), rule=rules, dtype=st.sampled_from([None, *DTYPES]))
def test_the_card_records_rank_error_and_energy_of_each_module(models, rule, dtype):
    base, tuned = models
    assume(max(abs(tuned[key].astype(np.float64)).max() for key in tuned) < 1e6)
    card = extract_delta(base, tuned, rule, dtype=dtype)
    assert card.metadata["extract"]["method"] == "full"
    assert set(modules_of(card)) == set(card.weights)
    for module, found in modules_of(card).items():
        true = measured(base, tuned, card, f"{module}.weight")
        unsure = 4 * gamma(base[f"{module}.weight"].size + 12, F64) * (1 + true)
        assert found["rank"] == card.weights[module].rank
        assert abs(found["error"] - true) <= unsure
        assert found["energy"] == 1 - found["error"] ** 2


@requirement("R16.1", "R16.8")
@given(models=models(dtype=F64), power=st.integers(-480, 480), rule=rules)
def test_scaling_both_models_by_a_power_of_two_only_scales_the_difference(models, power, rule):
    """However small or large weights are, no square of one is lost or overflows on the way."""
    base, tuned = models
    scaled = [{key: np.ldexp(w, 2 * power) for key, w in model.items()} for model in models]
    for model, wide in zip(models, scaled, strict=True):
        assume(all(np.array_equal(np.ldexp(wide[key], -2 * power), model[key]) for key in model))
        assume(all(np.isfinite(weight).all() for weight in wide.values()))
    card, other = extract_delta(base, tuned, rule), extract_delta(*scaled, rule)
    for module, pair in card.weights.items():
        assert same_bits(np.ldexp(pair.A, power), other.weights[module].A)
        assert same_bits(np.ldexp(pair.B, power), other.weights[module].B)
    assert modules_of(card) == modules_of(other)
