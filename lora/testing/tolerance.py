"""How far a result may lie from the exact one, derived from the arithmetic.

Each quantity is followed as a pair: a bound on its size and a bound on its error. A matrix product
with n terms a sum has |error| ≤ γₙ Σ|aₖ bₖ| with γₙ = n·u / (1 - n·u), where u is the unit roundoff
of the type that sums are accumulated in, float32 at least. Each stage then rounds once to its
output's dtype, and each operation may lose what lies below the normal numbers. Source: Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., chapters 2, 3 and 9.

Requirements: R2.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lora.card import Array
from lora.testing.binding import Term


def roundoff(dtype: np.dtype[Any]) -> float:
    """Return the unit roundoff u: half the distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps) / 2  # type: ignore[no-untyped-call]


def underflow(dtype: np.dtype[Any]) -> float:
    """Return what one operation may lose below the normal range.

    Results in float16 are rounded to its subnormals, which are normal numbers of the accumulator.
    For other dtypes much hardware flushes subnormals to zero.
    """
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    half = float(info.smallest_subnormal) / 2  # in float16 itself it would be 0
    return half if dtype == np.float16 else float(info.smallest_normal)


def gamma(n: int, dtype: np.dtype[Any]) -> float:
    """Return γₙ for sums of n products that are accumulated in `dtype`."""
    u = roundoff(dtype)
    assert n * u < 1, f"a sum of {n} terms in {dtype} has no bound"
    return n * u / (1 - n * u)


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that sums of products of `dtype` are accumulated in."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def oracle(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that exact results for inputs of `dtype` are computed in."""
    return np.dtype(np.longdouble) if dtype == np.float64 else np.dtype(np.float64)


def exact(x: Array, weight: Array, bias: Array | None, terms: Iterable[Term]) -> Array:
    """Return ``x Wᵀ + b + Σ weight · scaling · (x @ A @ B)`` in the type of `oracle`."""
    wide = oracle(x.dtype).type
    x, weight = x.astype(wide), weight.astype(wide)
    out = x @ weight.T + (0 if bias is None else bias.astype(wide))
    for term in terms:
        factor = wide(term.scaling) * wide(term.weight)
        out = out + x @ term.A.astype(wide) @ term.B.astype(wide) * factor
    result: Array = out
    return result


def magnitude(x: Array, weight: Array, bias: Array | None, terms: Iterable[Term]) -> Array:
    """Return the sum of `exact` over magnitudes, a bound on every partial sum.

    Where it stays below 1/u of the dtype, whole numbers are computed exactly; where it exceeds the
    dtype's largest number, nothing is promised.
    """
    positive = [Term(abs(t.A), abs(t.B), abs(t.scaling), abs(t.weight)) for t in terms]
    out = exact(abs(x), abs(weight), None if bias is None else abs(bias), positive)
    return out.astype(np.float64)


def layer_bound(x: Array, weight: Array, bias: Array | None, terms: Iterable[Term]) -> Array:
    """Return the largest admissible |output - exact| of an adapted layer, element by element.

    It allows the larger error of two ways to compute the layer. Stacked: ``[A₁ …]``,
    ``[w₁s₁B₁; …]`` and one product, whose sums start from the base's output. Plain: term by term,
    with each of ``x @ A``, ``· @ B``, ``· scaling`` and the sum rounded.
    """
    arithmetic, terms = _Arithmetic(x.dtype), list(terms)
    rows, columns = _exact_input(x), _exact_input(weight.T)
    base = arithmetic.rounded(arithmetic.product(rows, columns))
    if bias is not None:
        base = arithmetic.rounded(arithmetic.sum(base, _exact_input(bias)))
    stacked = plain = base
    if terms:
        a = _exact_input(np.concatenate([term.A for term in terms], axis=1))
        parts = [
            arithmetic.rounded(arithmetic.scaled(_exact_input(term.B), term)) for term in terms
        ]
        b = _Bounded(*(np.concatenate(field) for field in zip(*parts, strict=True)))
        low = arithmetic.product(arithmetic.rounded(arithmetic.product(rows, a)), b)
        running = gamma(a.size.shape[1], arithmetic.wide) * (base.size + base.error)
        start = _Bounded(base.size, base.error + running)
        stacked = arithmetic.rounded(arithmetic.sum(start, low))
    for term in terms:
        hidden = arithmetic.rounded(arithmetic.product(rows, _exact_input(term.A)))
        low = arithmetic.rounded(arithmetic.product(hidden, _exact_input(term.B)))
        low = arithmetic.rounded(arithmetic.scaled(low, term))
        plain = arithmetic.rounded(arithmetic.sum(plain, low))
    steps = x.shape[-1] + sum(term.A.shape[1] + 4 for term in terms) + 1
    rounding_of_oracle = gamma(steps, oracle(x.dtype)) * stacked.size
    result: Array = np.maximum(stacked.error, plain.error) + rounding_of_oracle
    return result


def gauge_bound(
    x: Array, pair: tuple[Array, Array], m: Array, turned: tuple[Array, Array], scale: float
) -> Array:
    """Return the largest |x A' B' - x A B| · scale for A' = A M and B' = M⁻¹ B in A's dtype.

    Gaussian elimination with partial pivoting solves (M + E) B' = B with |E| ≤ γ₃ᵣ |L||U|, where
    |L| ≤ 1 and |U| ≤ 2ʳ max|M|. So A'B' - AB = (F - A E) B' + A' G, with F and G the errors of
    forming A M and of rounding B': since |M||B'| ≤ |M||M⁻¹||B|, the bound grows with cond(M) and no
    faster.
    """
    dtype, wide = pair[0].dtype, np.dtype(np.float64)
    (a, ta, tb), rank = (abs(factor.astype(wide)) for factor in (pair[0], *turned)), m.shape[0]
    u, lost = roundoff(dtype), underflow(dtype)
    forming = (gamma(rank, wide) + u * (1 + gamma(rank, wide))) * (a @ abs(m)) + lost
    solving = gamma(3 * rank, wide) * rank * 2.0**rank * abs(m).max() * np.ones_like(m)
    solved = (tb + lost) / (1 - u)
    apart = (forming + a @ solving) @ solved + ta @ (u * solved + lost)
    result: Array = abs(x.astype(wide)) @ apart * abs(scale)
    return result


class _Bounded(NamedTuple):
    """Bounds on the magnitude of a quantity and on the error of its computed value."""

    size: Array
    error: Array


def _exact_input(array: Array) -> _Bounded:
    size: Array = abs(array.astype(np.float64))
    return _Bounded(size, np.zeros_like(size))


class _Arithmetic:
    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype, self.wide = dtype, accumulator(dtype)

    def product(self, a: _Bounded, b: _Bounded) -> _Bounded:
        """``a @ b`` in the accumulator; operands, products and sums may each be flushed."""
        n, left, right = b.size.shape[0], a.size + a.error, b.size + b.error
        passed_on = a.error @ right + a.size @ b.error
        lost = underflow(self.wide) * (2 * n + left.sum(-1, keepdims=True) + right.sum(0))
        return _Bounded(a.size @ b.size, passed_on + gamma(n, self.wide) * (left @ right) + lost)

    def sum(self, a: _Bounded, b: _Bounded) -> _Bounded:
        size, error = a.size + b.size, a.error + b.error
        return _Bounded(size, error + roundoff(self.wide) * (size + error) + underflow(self.wide))

    def scaled(self, a: _Bounded, term: Term) -> _Bounded:
        """``a`` times scaling and weight, which are multiplied and rounded beforehand."""
        factor, u, lost = abs(term.scaling * term.weight), roundoff(self.wide), underflow(self.wide)
        off = factor * (2 * u + u * u) + lost
        error = a.error * factor + (a.size + a.error) * off
        size = a.size * factor
        return _Bounded(size, error + u * (size + error) + lost)

    def rounded(self, a: _Bounded) -> _Bounded:
        rounding = roundoff(self.dtype) * (a.size + a.error) + underflow(self.dtype)
        return _Bounded(a.size, a.error + rounding)
