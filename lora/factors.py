"""Algebra on factor pairs: a pair as a matrix, applied to an input, and added to other pairs.

Pure NumPy. Narrow dtypes are computed in float32, as a layer's matrix products accumulate.

Requirements: R2, R8.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from lora.blas import one_thread
from lora.card import Array, LoRACard, LowRank
from lora.errors import ArgumentError, CardError, ShapeError

MOST_STEPS = 12
"""Power iterations of `leading_svd` at most; three to five do for what is merged and extracted."""


def delta(pair: LowRank, *, dtype: np.dtype[Any] | type | None = None) -> Array:
    """Return ΔW = scaling · (A @ B).T, shape ``(out, in)``: the change to a Linear's weight.

    Args:
        pair: Factors ``(in, r)`` and ``(r, out)``; a scaling of None counts as 1.
        dtype: By default float32, or float64 for float64 factors.

    Examples:
        >>> delta(LowRank(np.eye(2, 1), np.ones((1, 2)), 3.0))
        array([[3., 0.],
               [3., 0.]])
    """
    wide = np.dtype(dtype or _wide(pair.dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        return (pair.A.astype(wide) @ _scaled_b(pair, 1.0, wide)).T


def apply(x: Array, pairs: Iterable[tuple[LowRank, float]]) -> Array:
    """Return Σ weight · scaling · (x @ A @ B), shape ``(..., out)``, for x of ``(..., in)``."""
    pair = concat(pairs, dtype=_wide(x.dtype))
    if x.ndim < 1 or x.shape[-1] != pair.in_features:
        expected = f"last dimension {pair.in_features}"
        raise ShapeError("input of a factor pair", expected, f"shape {x.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(pair.dtype) @ pair.A @ pair.B


def concat(
    pairs: Iterable[tuple[LowRank, float]], *, dtype: np.dtype[Any] | type | None = None
) -> LowRank:
    """Return one pair for a weighted sum: ``[A₁ … Aₙ]`` and ``[w₁s₁B₁; …; wₙsₙBₙ]``, scaling 1.

    Pairs of weight 0 are left out, so that 0 · NaN adds nothing; without others the result is a
    rank-1 pair of zeros. It is float32, or float64 if a factor or `dtype` is.

    Examples:
        >>> pair = LowRank(np.ones((3, 2)), np.ones((2, 3)), 2.0)
        >>> concat([(pair, 1.0), (pair, 0.5)]).rank
        4
    """
    terms = list(pairs)
    if not terms:
        raise ArgumentError("concat", "at least one factor pair", "none")
    features, *others = [(pair.in_features, pair.out_features) for pair, _ in terms]
    for other in others:
        if other != features:
            expected = "in -> out of {} -> {}".format(*features)
            raise ShapeError("stacked factor pairs", expected, "{} -> {}".format(*other))
    wide = np.result_type(dtype or np.float32, *(_wide(pair.dtype) for pair, _ in terms))
    terms = [(pair, weight) for pair, weight in terms if weight != 0]
    if not terms:
        return LowRank(np.zeros((features[0], 1), wide), np.zeros((1, features[1]), wide), 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = [_scaled_b(pair, weight, wide) for pair, weight in terms]
        a = np.concatenate([pair.A.astype(wide) for pair, _ in terms], axis=1)
    return LowRank(a, np.concatenate(scaled), 1.0)


def is_finite(pair: LowRank) -> bool:
    """Return whether neither factor holds NaN or an infinity."""
    with np.errstate(invalid="ignore"):  # a signalling NaN is no reason for a warning
        return bool(np.isfinite(pair.A).all() and np.isfinite(pair.B).all())


def check_finite(card: LoRACard, module: str) -> None:
    """Refuse a card whose factors of a module hold NaN or an infinity."""
    if not is_finite(card.weights[module]):
        where = f"card {card.name!r}: module {module!r}"
        hint = "leave the card out, or train it again"
        raise CardError(where, "finite factors", "NaN or an infinity", hint)


def spectrum(pair: LowRank) -> Array:
    """Return the singular values of ΔW, largest first, as float64 ``(min(in, r, out),)``.

    ΔW is never formed.

    Raises:
        ArgumentError: A factor is not finite.

    Examples:
        >>> spectrum(LowRank(np.eye(3, 1), np.array([[3.0, 4.0]]), -2.0))
        array([10.])
    """
    if not is_finite(pair):
        raise ArgumentError("spectrum of a pair", "finite factors", "NaN or an infinity")
    a, b = pair.A.astype(np.float64), pair.B.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"), one_thread():
        core = np.linalg.qr(a)[1] @ np.linalg.qr(b.T)[1].T * _scaling(pair)
    if not np.isfinite(core).all():
        raise ArgumentError("spectrum of a pair", "a ΔW within float64", "one beyond it")
    return np.linalg.svd(core, compute_uv=False)


def thin_qr(matrix: Array) -> tuple[Array, Array]:
    """Return the reduced QR of a matrix ``(m, n)``: Q ``(m, k)`` and R ``(k, n)``, k = min(m, n).

    Faster than `numpy.linalg.qr` for a small n, because matrix products form Q: the product of the
    reflections ``I - τᵢ vᵢ vᵢᵀ`` is ``I - V T Vᵀ``, where T⁻¹ has 1/τ on its diagonal and VᵀV above
    it. Source: Joffrain et al., "Accumulating Householder transformations, revisited" (2006).
    """
    with one_thread():
        packed, tau = np.linalg.qr(matrix, mode="raw")
        count = len(tau)
        triangle, vectors = np.triu(packed.T[:count]), packed.T[:, :count]
        vectors[:count] = np.tril(vectors[:count], -1) + np.identity(count, vectors.dtype)
        vectors[:, tau == 0] = 0  # no reflection
        inner = np.triu(vectors.T @ vectors, 1)
        np.fill_diagonal(inner, 1 / np.where(tau == 0, 1, tau))
        orthonormal = vectors @ -np.linalg.solve(inner, vectors[:count].T)
        orthonormal.ravel()[:: count + 1][:count] += 1
    return orthonormal, triangle


def leading_svd(
    matrix: Array, rank: int, width: int, rng: np.random.Generator, tolerance: float
) -> tuple[Array, Array, Array]:
    """Return U ``(m, width)``, singular values and Vᵀ of a matrix within a subspace, randomised.

    The subspace is multiplied by the matrix and its transpose until the next time would lower what
    the first `rank` values leave out by less than a share `tolerance`, as the last two gains
    foretell, or `MOST_STEPS` times.

    Source: Halko, Martinsson and Tropp 2011, algorithm 4.4.
    """
    whole = float(np.linalg.norm(matrix)) ** 2
    noise = 4 * float(np.finfo(matrix.dtype).eps) * whole  # of the difference of two sums
    rest = gain = math.nan  # no step, no gain
    long = rng.standard_normal((matrix.shape[1], width), matrix.dtype)
    for _ in range(MOST_STEPS):
        basis = thin_qr(matrix @ long)[0]
        long, small = thin_qr(matrix.T @ basis)
        # The SVD of the small triangle takes a fifth of the time of that of the long side.
        v, s, u = np.linalg.svd(small, full_matrices=False)
        left_out = whole - float(np.square(s[:rank], dtype=np.float64).sum())
        earlier, gain, rest = gain, rest - left_out, left_out
        if gain * min(1.0, gain / (earlier or 1.0)) <= max(2 * tolerance * rest, noise):
            break
    return basis @ u.T, s, (long @ v).T


def initial(in_features: int, out_features: int, rank: int, rng: np.random.Generator) -> LowRank:
    """Return an untrained float32 pair: A uniform with |A| <= 1/√in, B zero.

    Source: Hu et al. 2021, section 4.1, as PEFT initialises it (Kaiming, a = √5).
    """
    bound = 1 / np.sqrt(in_features)
    a = rng.uniform(-bound, bound, (in_features, rank)).astype(np.float32)
    inside = np.nextafter(np.float32(bound), np.float32(0))
    return LowRank(np.clip(a, -inside, inside), np.zeros((rank, out_features), np.float32))


def _scaled_b(pair: LowRank, weight: float, wide: np.dtype[Any]) -> Array:
    """Return weight · scaling · B; the factor is kept finite, so that a zero stays a zero."""
    largest = float(np.finfo(np.float64).max)
    factor = min(max(weight * _scaling(pair), -largest), largest)
    return (pair.B.astype(np.float64) * factor).astype(wide)


def _scaling(pair: LowRank) -> float:
    return 1.0 if pair.scaling is None else pair.scaling


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return at least float32; NumPy can't promote bfloat16 itself."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype
