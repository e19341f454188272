"""Algebra on factor pairs: what a pair means as a matrix, what it does to an input, how pairs add
up.

NumPy only, one pass, no state. Narrow dtypes are computed in float32, as a layer's matrix products
accumulate.

Requirements: R2, R8.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lora.card import Array, LowRank
from lora.errors import ArgumentError, ShapeError


def delta(pair: LowRank, *, dtype: np.dtype[Any] | type | None = None) -> Array:
    """ΔW = scaling · (A @ B).T, the change to a Linear's weight.

    Args:
        pair: Factors ``(in, r)`` and ``(r, out)``; a scaling of None counts as 1.
        dtype: Of the computation and the result; float32, or float64 for float64 factors, unless
            given.

    Returns:
        Shape ``(out, in)``.

    Examples:
        >>> import numpy as np
        >>> delta(LowRank(np.eye(2, 1), np.ones((1, 2)), 3.0))
        array([[3., 0.],
               [3., 0.]])
    """
    wide = np.dtype(dtype or np.promote_types(_widened(pair.dtype), np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        product: Array = (pair.A.astype(wide) @ _scaled(pair, 1.0, wide)).T
    return product


def apply(x: Array, pairs: Iterable[tuple[LowRank, float]]) -> Array:
    """Σ weight · scaling · (x @ A @ B): what the pairs add to a Linear's output.

    Args:
        x: Shape ``(..., in)``, any number of leading dimensions.
        pairs: Factor pairs with their weights; all of one ``in`` and ``out``, at least one.

    Returns:
        Shape ``(..., out)``.

    Raises:
        ShapeError: If x's last dimension is not ``in``.
    """
    pair = concat(pairs, dtype=_widened(x.dtype))
    if x.ndim < 1 or x.shape[-1] != pair.in_features:
        raise ShapeError(
            "input of a factor pair", f"last dimension {pair.in_features}", f"shape {x.shape}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        product: Array = x.astype(pair.dtype) @ pair.A @ pair.B
    return product


def concat(
    pairs: Iterable[tuple[LowRank, float]], *, dtype: np.dtype[Any] | type | None = None
) -> LowRank:
    """One pair that does what the weighted sum of all does: ``[A₁ … Aₙ]`` and ``[w₁s₁B₁; …;
    wₙsₙBₙ]``, scaling 1.

    The rank is the sum of ranks. Pairs of weight 0 are left out, so that 0 · NaN adds nothing; if
    none is left the result is a rank-1 pair of zeros. The result is float32, or float64 if any
    factor or `dtype` is.

    Examples:
        >>> import numpy as np
        >>> pair = LowRank(np.ones((3, 2)), np.ones((2, 3)), 2.0)
        >>> concat([(pair, 1.0), (pair, 0.5)]).rank
        4
    """
    terms = list(pairs)
    if not terms:
        raise ArgumentError("concat", "at least one factor pair", "none")
    first = terms[0][0]
    for pair, _ in terms:
        if (pair.in_features, pair.out_features) != (first.in_features, first.out_features):
            raise ShapeError(
                "stacked factor pairs",
                f"in -> out of {first.in_features} -> {first.out_features}",
                f"{pair.in_features} -> {pair.out_features}",
            )
    wide = np.result_type(
        np.float32, dtype or np.float32, *(_widened(pair.dtype) for pair, _ in terms)
    )
    live = [(pair, weight) for pair, weight in terms if weight != 0]
    if not live:
        return LowRank(
            np.zeros((first.in_features, 1), wide), np.zeros((1, first.out_features), wide), 1.0
        )
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = [_scaled(pair, weight, wide) for pair, weight in live]
    return LowRank(_frozen([pair.A.astype(wide) for pair, _ in live], 1), _frozen(scaled, 0), 1.0)


def spectrum(pair: LowRank) -> Array:
    """The singular values of ΔW, largest first, from the factors alone: those of the product of
    their QR triangles.

    Args:
        pair: Finite factors ``(in, r)`` and ``(r, out)``.

    Returns:
        float64, shape ``(min(in, r, out),)``.

    Raises:
        ArgumentError: If a factor, or ΔW, is not finite.

    Examples:
        >>> spectrum(LowRank(np.eye(3, 1), np.array([[3.0, 4.0]]), -2.0))
        array([10.])
    """
    a, b = pair.A.astype(np.float64), pair.B.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ArgumentError("spectrum of a pair", "finite factors", "NaN or an infinity")
    left, right = np.linalg.qr(a)[1], np.linalg.qr(b.T)[1]
    with np.errstate(over="ignore", invalid="ignore"):
        core = left @ right.T * _scaling(pair)
    if not np.isfinite(core).all():
        raise ArgumentError("spectrum of a pair", "a ΔW within float64", "one beyond it")
    values: Array = np.linalg.svd(core, compute_uv=False)
    return values


def thin_qr(matrix: Array) -> tuple[Array, Array]:
    """The reduced QR of a matrix ``(m, n)``: Q ``(m, k)`` orthonormal, R ``(k, n)`` upper
    triangular, k = min(m, n).

    What `numpy.linalg.qr` gives, up to rounding, in about half its time when m is large and n is
    not: Q is formed by matrix products instead of reflection by reflection. Source: Joffrain et
    al., "Accumulating Householder transformations, revisited" (2006): the product of reflections
    ``I - τᵢ vᵢ vᵢᵀ`` is ``I - V T Vᵀ``, where T⁻¹ has 1/τ on its diagonal and VᵀV above it.

    Examples:
        >>> Q, R = thin_qr(np.array([[3.0, 0.0], [4.0, 5.0]]))
        >>> np.allclose(Q @ R, [[3, 0], [4, 5]]), np.allclose(Q.T @ Q, np.identity(2))
        (True, True)
    """
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


def initial(in_features: int, out_features: int, rank: int, rng: np.random.Generator) -> LowRank:
    """A fresh float32 pair: A uniform with |A| <= 1/√in (Kaiming, a = √5, fan-in = in), B zero.

    Source: Hu et al. 2021, section 4.1, as PEFT initialises it.
    """
    bound = 1 / np.sqrt(in_features)
    a = rng.uniform(-bound, bound, (in_features, rank)).astype(np.float32)
    inside = np.nextafter(np.float32(bound), np.float32(0))
    return LowRank(np.clip(a, -inside, inside), np.zeros((rank, out_features), np.float32))


def _scaled(pair: LowRank, weight: float, wide: np.dtype[Any]) -> Array:
    """B times weight and scaling, in float64 before it is narrowed: a factor beyond float32 leaves
    a zero a zero.
    """
    largest = float(np.finfo(np.float64).max)
    factor = min(max(weight * _scaling(pair), -largest), largest)
    return (pair.B.astype(np.float64) * factor).astype(wide)


def _scaling(pair: LowRank) -> float:
    return 1.0 if pair.scaling is None else pair.scaling


def _widened(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Float32 for what is narrower (NumPy can't promote bfloat16 itself), else `dtype`."""
    return np.dtype(np.float32) if dtype.itemsize < np.dtype(np.float32).itemsize else dtype


def _frozen(parts: list[Array], axis: int) -> Array:
    joined: Array = np.concatenate(parts, axis=axis)
    joined.flags.writeable = False
    return joined
