"""Merges of large modules: work in blocks, the bracket of a threshold, the randomised SVD, and the
one thread of small factorisations.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from lora.blas import one_thread
from lora.card import LoRACard, LowRank
from lora.errors import ArgumentError
from lora.factors import delta, leading_svd
from lora.merging import BLOCK, Dare, Ties, _largest, merge
from lora.testing.plugin import requirement

RNG = np.random.default_rng(0)
WIDE, NARROW = 530, 515


def pair_of(seed, *, shape=(WIDE, NARROW), rank=3, whole=False, size=1.0):
    """Whole factors give many entries of equal size."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1]))
    return LowRank(np.rint(a), np.rint(b), size) if whole else LowRank(a, b, size)


def cards_of(*pairs):
    return [LoRACard(f"{i}", pair.rank, 1.0, ["q"], {"q": pair}) for i, pair in enumerate(pairs)]


def trimmed(change, density):
    """The entries that TIES keeps: the largest, of equal ones the first in row-major order."""
    flat = change.ravel()
    first = np.lexsort((np.arange(flat.size), -abs(flat)))[: max(1, round(density * flat.size))]
    return np.isin(np.arange(flat.size), first).reshape(change.shape) * change


@requirement("R20.6")
@pytest.mark.parametrize("elect", ["mass", "count"])
@pytest.mark.parametrize("whole", [False, True])
def test_ties_in_blocks_is_bit_for_bit_the_rule_written_out(elect, whole):
    pairs, weights = [pair_of(i, whole=whole) for i in range(3)], [0.5, -0.25, 1.0]
    parts = np.stack([trimmed(delta(pair), 0.3) for pair in pairs])
    parts = parts * np.reshape(weights, (3, 1, 1))
    sign = np.sign((parts if elect == "mass" else np.sign(parts)).sum(0))
    agrees = (np.sign(parts) == sign) & (sign != 0)
    shares = (agrees * np.reshape(np.abs(weights), (3, 1, 1))).sum(0)
    expected = (parts * agrees).sum(0) / np.where(shares == 0, 1, shares)
    terms = list(zip("abc", pairs, weights, strict=True))
    assert np.array_equal(Ties(0.3, elect).dense("q", terms), expected)


@requirement("R20.6")
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 5e-324, 1e308]), min_size=1, max_size=30),
    repeats=st.sampled_from([1, 700, 3000]),
    share=st.floats(0.0, 1.0),
    spread=st.booleans(),
)
def test_the_bracketed_threshold_is_what_sorting_gives(values, repeats, share, spread):
    size = np.repeat(values, repeats)
    size = size * RNG.uniform(size=size.size) if spread else RNG.permutation(size)
    count = max(1, round(share * size.size))
    assert _largest(size, count) == np.sort(size)[-count]


@requirement("R20.7")
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_dare_in_blocks_is_the_mean_over_masks_of_the_whole(density):
    pairs, weights = [pair_of(i) for i in range(2)], [0.5, -0.25]
    terms = list(zip("ab", pairs, weights, strict=True))
    merged = Dare(density).dense("q", terms)
    parts = [weight / density * delta(pair) for _, pair, weight in terms]
    kept = np.stack([0 * parts[0], *parts, sum(parts)])
    assert (abs(merged - kept).min(0) <= 4e-16 * abs(kept).max()).all()
    if density < 1:
        for i, part in enumerate(parts):  # each mask by itself, with its share and no pattern
            alone = Dare(density).dense("q", terms[i : i + 1])
            mask = abs(alone - part) <= 4e-16 * abs(part).max()
            assert abs(mask.mean() - density) < 0.01
            assert abs(mask.mean(0) - density).max() < 0.15
            assert abs(mask.mean(1) - density).max() < 0.15
            flat = mask.ravel()
            assert (flat[BLOCK:] == flat[:-BLOCK]).mean() < 0.6, "by chance 0.58"


@requirement("R20.10", "R20.6")
@pytest.mark.parametrize(
    ("strategy", "size"), [(Ties(0.3), 1.0), (Dare(0.3), 1.0), (Ties(0.3), 2.0**600)]
)
def test_a_large_change_is_cut_near_the_best_and_its_error_is_measured(strategy, size):
    cards = cards_of(*(pair_of(i, size=size) for i in range(3)))
    merged = merge(cards, strategy, rank=4)
    terms = [(card.name, card.weights["q"], 1.0) for card in cards]
    dense = strategy.dense("q", terms) / size
    squares = np.linalg.svd(dense, compute_uv=False) ** 2
    least = np.sqrt(squares[4:].sum() / squares.sum())
    left = np.linalg.norm(dense - delta(merged.weights["q"]) / size) / np.linalg.norm(dense)
    record = merged.metadata["merge"]
    assert least <= left * (1 + 1e-12) <= least * (1 + 1e-4)
    assert record["error"]["q"] == pytest.approx(left, rel=1e-9)
    assert record["kept"] == pytest.approx(1 - left**2, rel=1e-9)
    assert (record["svd_seed"], "rank_90" in record) == (0, False)
    assert merge(cards, strategy, rank=4) == merged


@requirement("R20.3", "R20.10")
def test_a_large_change_of_low_rank_is_kept_to_the_last_digit():
    (card,) = cards_of(pair_of(0, shape=(530, 520), rank=40))
    whole = delta(card.weights["q"])
    merged = merge([card], Ties(1.0))
    assert merged.rank == 40
    assert abs(delta(merged.weights["q"]) - whole).max() <= 1e-13 * np.linalg.norm(whole, 2)
    cut = merge([card], Ties(1.0), rank=39).metadata["merge"]["error"]["q"]
    sigma = np.linalg.svd(whole, compute_uv=False)
    assert cut == pytest.approx(sigma[39] / np.linalg.norm(sigma), rel=1e-6)


@requirement("R20.10")
def test_a_rest_that_is_small_is_computed_from_the_entries():
    left, _ = np.linalg.qr(RNG.normal(size=(520, 5)))
    right, _ = np.linalg.qr(RNG.normal(size=(520, 5)))
    sigma = np.array([1.0, 0.9, 0.8, 0.7, 1e-9])
    (card,) = cards_of(LowRank(left * sigma, right.T, 1.0))
    error = merge([card], Ties(1.0), rank=4).metadata["merge"]["error"]["q"]
    assert error == pytest.approx(1e-9 / np.linalg.norm(sigma), rel=1e-5)


@requirement("R20.6", "R20.7")
@pytest.mark.parametrize("strategy", [Ties(0.01), Dare(0.01)])
def test_a_change_beyond_float64_is_refused_though_it_would_be_cut(strategy):
    huge = np.full((2, 2), 1e200)
    with pytest.raises(ArgumentError, match="module 'q': expected a ΔW within float64"):
        merge(cards_of(LowRank(huge, huge, 1.0), pair_of(0, shape=(2, 2))), strategy)


@requirement("R16.7")
def test_what_is_found_at_once_takes_two_products_a_side():
    """Products are counted: each further step would cost two."""
    matrix = delta(pair_of(0)).view(Counted)
    Counted.products = 0
    leading_svd(matrix, 3, 8, np.random.default_rng(0), 1e-3)
    assert Counted.products == 4


class Counted(np.ndarray):
    """An array of 530 columns or rows that counts its products."""

    products = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if ufunc is np.matmul and WIDE in np.shape(inputs[0]):
            Counted.products += 1
        inputs = [np.asarray(each) for each in inputs]
        return getattr(ufunc, method)(*inputs, **options)


def blas_threads():
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}


@requirement("R20.4")
def test_blas_has_its_threads_back_whoever_factorises_when():
    before = blas_threads()

    def work(number):
        for _ in range(50):
            with suppress(ZeroDivisionError), one_thread():
                assert number or blas_threads() == {1}
                raise ZeroDivisionError
            merge(cards_of(pair_of(number)))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work, 0).result()
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(work, number) for number in (1, 2, 3)]:
            future.result()
    assert blas_threads() == before
