"""R20: merges of large modules, which this implementation makes in blocks, by a randomised SVD."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.card import LoRACard, LowRank
from lora.errors import ArgumentError
from lora.factors import delta, leading_svd
from lora.merging import BLOCK, Dare, Ties, _largest, merge
from lora.testing.plugin import requirement

RNG = np.random.default_rng(0)
WIDE, NARROW = 530, 515
SEEDS = st.integers(0, 2**32)
few = settings(max_examples=5)


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
@few
@given(seed=SEEDS, elect=st.sampled_from(["mass", "count"]), whole=st.booleans())
def test_ties_in_blocks_is_bit_for_bit_the_rule_written_out(seed, elect, whole):
    pairs = [pair_of(seed + i, shape=(150, 140), whole=whole) for i in range(3)]
    weights = [0.5, -0.25, 1.0]
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
@few
@given(seed=SEEDS, density=st.sampled_from([0.3, 1.0]))
def test_dare_in_blocks_is_the_mean_over_masks_of_the_whole(seed, density):
    pairs, weights = [pair_of(seed + i) for i in range(2)], [0.5, -0.25]
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
@few
@given(
    seed=SEEDS,
    how=st.sampled_from([(Ties(0.3), 1.0), (Dare(0.3), 1.0), (Ties(0.3), 2.0**600)]),
    rank=st.integers(1, 6),
)
def test_a_large_change_is_cut_near_the_best_and_its_error_is_measured(seed, how, rank):
    strategy, size = how
    cards = cards_of(*(pair_of(seed + i, size=size) for i in range(3)))
    merged = merge(cards, strategy, rank=rank)
    terms = [(card.name, card.weights["q"], 1.0) for card in cards]
    dense = strategy.dense("q", terms) / size
    squares = np.linalg.svd(dense, compute_uv=False) ** 2
    least = np.sqrt(squares[rank:].sum() / squares.sum())
    left = np.linalg.norm(dense - delta(merged.weights["q"]) / size) / np.linalg.norm(dense)
    record = merged.metadata["merge"]
    assert least <= left * (1 + 1e-12) <= least * (1 + 1e-4)
    assert record["error"]["q"] == pytest.approx(left, rel=1e-9)
    assert record["kept"] == pytest.approx(1 - left**2, rel=1e-9)
    assert (record["svd_seed"], "rank_90" in record) == (0, False)
    assert merge(cards, strategy, rank=rank) == merged


@requirement("R20.3", "R20.10")
@few
@given(seed=SEEDS)
def test_a_large_change_of_low_rank_is_kept_to_the_last_digit(seed):
    (card,) = cards_of(pair_of(seed, shape=(530, 520), rank=40))
    whole = delta(card.weights["q"])
    merged = merge([card], Ties(1.0))
    assert merged.rank == 40
    assert abs(delta(merged.weights["q"]) - whole).max() <= 1e-13 * np.linalg.norm(whole, 2)
    cut = merge([card], Ties(1.0), rank=39).metadata["merge"]["error"]["q"]
    sigma = np.linalg.svd(whole, compute_uv=False)
    assert cut == pytest.approx(sigma[39] / np.linalg.norm(sigma), rel=1e-6)


def with_values(seed, sigma, shape=(520, 520)):
    """A pair with these singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(side, len(sigma))))[0] for side in shape)
    return LowRank(left * np.array(sigma), right.T, 1.0)


@requirement("R20.10")
@few
@given(seed=SEEDS, last=st.sampled_from([1e-9, 1e-7]))
def test_a_rest_that_is_small_is_computed_from_the_entries(seed, last):
    sigma = [1.0, 0.9, 0.8, 0.7, last]
    (card,) = cards_of(with_values(seed, sigma))
    error = merge([card], Ties(1.0), rank=4).metadata["merge"]["error"]["q"]
    assert error == pytest.approx(last / np.linalg.norm(sigma), rel=1e-5)


@requirement("R16.7", "R20.4")
@few
@given(seed=SEEDS, decay=st.sampled_from([0.95, 0.9, 0.5]), rank=st.integers(1, 8))
def test_leading_directions_are_orthonormal_and_leave_out_little_more_than_must_be(
    seed, decay, rank
):
    sigma = decay ** np.arange(60.0)
    matrix, width = delta(with_values(seed, sigma, (130, 90))).T, rank + 32
    u, s, v = leading_svd(matrix, rank, width, np.random.default_rng(seed), 1e-5)
    assert (u.shape, s.shape, v.shape) == ((130, width), (width,), (width, 90))
    assert np.allclose(u.T @ u, np.eye(width), atol=1e-12)
    assert np.allclose(v @ v.T, np.eye(width), atol=1e-12)
    left_out = np.linalg.norm(matrix - (u[:, :rank] * s[:rank]) @ v[:rank])
    assert left_out <= (1 + 1e-4) * np.linalg.norm(sigma[rank:])
    assert np.allclose(np.sqrt(np.sum(sigma**2) - np.sum(s[:rank] ** 2)), left_out, rtol=1e-6)


@requirement("R20.6", "R20.7")
@given(strategy=st.sampled_from([Ties(0.01), Dare(0.01)]), size=st.sampled_from([1e200, 1e155]))
def test_a_change_beyond_float64_is_refused_though_it_would_be_cut(strategy, size):
    huge = np.full((2, 2), size)
    with pytest.raises(ArgumentError, match="module 'q': expected a ΔW within float64"):
        merge(cards_of(LowRank(huge, huge, 1.0), pair_of(0, shape=(2, 2))), strategy)
