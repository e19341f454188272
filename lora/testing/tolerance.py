"""How far a result may lie from the exact one, derived from the arithmetic.

A quantity is followed as a pair: how large it may be, and how far what was computed may lie from
it. A product of matrices with n terms a sum has |error| ≤ γₙ Σ|aₖ bₖ| with γₙ = n·u / (1 - n·u),
where u is the unit roundoff of the type that sums are accumulated in: float32 at least (with
bfloat16's u the formula is meaningless at n = 384). Each stage then rounds once to its output's
dtype, and each operation may lose what lies below the normal numbers. Source: Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., chapters 2, 3 and 9.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lora.card import Array
from lora.testing.binding import Term


def roundoff(dtype: np.dtype[Any]) -> float:
    """Unit roundoff u: half the distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps) / 2  # type: ignore[no-untyped-call]


def underflow(dtype: np.dtype[Any]) -> float:
    """What one operation may lose below the normal range: float16's subnormals are rounded to, all
    others may be flushed.

    Half a spacing of float16's subnormals, which are normal numbers of its accumulator; for the
    other dtypes, whose matrix products are faster without subnormals on much hardware, the smallest
    normal number.
    """
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return (
        float(info.smallest_subnormal) / 2 if dtype == np.float16 else float(info.smallest_normal)
    )


def gamma(n: int, dtype: np.dtype[Any]) -> float:
    """γₙ for sums of n products accumulated in `dtype`."""
    u = roundoff(dtype)
    assert n * u < 1, f"a sum of {n} terms in {dtype} has no bound"
    return n * u / (1 - n * u)


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that sums of products of `dtype` are accumulated in."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def oracle(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that exact results for inputs of `dtype` are computed in."""
    return np.dtype(np.longdouble) if dtype == np.float64 else np.dtype(np.float64)


def exact(x: Array, weight: Array, bias: Array | None, terms: Iterable[Term]) -> Array:
    """``x Wᵀ + b + Σ weight · scaling · (x @ A @ B)`` in float64 (longdouble for float64 inputs)."""
    wide = oracle(x.dtype).type
    x, weight = x.astype(wide), weight.astype(wide)
    out = x @ weight.T + (0 if bias is None else bias.astype(wide))
    for term in terms:
        out = out + x @ term.A.astype(wide) @ term.B.astype(wide) * (
            wide(term.scaling) * wide(term.weight)
        )
    result: Array = out
    return result


def magnitude(x: Array, weight: Array, bias: Array | None, terms: Iterable[Term]) -> Array:
    """The same sum over magnitudes: no output, nor any partial sum of it, is larger.

    Where it stays below 1/u of the dtype, whole numbers are computed exactly; where it exceeds the
    dtype's largest number, nothing is promised.
    """
    positive = [Term(abs(t.A), abs(t.B), abs(t.scaling), abs(t.weight)) for t in terms]
    return exact(abs(x), abs(weight), None if bias is None else abs(bias), positive).astype(
        np.float64
    )


def layer_bound(x: Array, weight: Array, bias: Array | None, terms: Iterable[Term]) -> Array:
    """Largest admissible |output - exact| of an adapted layer, element by element.

    The larger one of two ways to compute it. Stacked: ``[A₁ …]``, ``[w₁s₁B₁; …]``, and one product
    added to the base's output before it is rounded. Plain: term by term, each of ``x @ A``, ``· @
    B``, ``· scaling`` and the sum rounded.
    """
    arithmetic, terms = _Arithmetic(x.dtype), list(terms)
    rows, columns = _given(x), _given(weight.T)
    base = arithmetic.rounded(arithmetic.product(rows, columns))
    if bias is not None:
        base = arithmetic.rounded(arithmetic.sum(base, _given(bias)))
    stacked = plain = base
    if terms:
        a = _given(np.concatenate([term.A for term in terms], axis=1))
        parts = [arithmetic.rounded(arithmetic.scaled(_given(term.B), term)) for term in terms]
        b = _Rough(*(np.concatenate(field) for field in zip(*parts, strict=True)))
        low = arithmetic.product(arithmetic.rounded(arithmetic.product(rows, a)), b)
        stacked = arithmetic.rounded(arithmetic.sum(base, low))
    for term in terms:
        hidden = arithmetic.rounded(arithmetic.product(rows, _given(term.A)))
        low = arithmetic.rounded(arithmetic.product(hidden, _given(term.B)))
        low = arithmetic.rounded(arithmetic.scaled(low, term))
        plain = arithmetic.rounded(arithmetic.sum(plain, low))
    steps = x.shape[-1] + sum(term.A.shape[1] + 4 for term in terms) + 1
    result: Array = (
        np.maximum(stacked.error, plain.error) + gamma(steps, oracle(x.dtype)) * stacked.size
    )
    return result


def gauge_bound(
    x: Array, pair: tuple[Array, Array], m: Array, turned: tuple[Array, Array], scale: float
) -> Array:
    """Largest |x A' B' - x A B| · scale where A' = A M and B' = M⁻¹ B were computed in float64 and
    rounded to A's dtype.

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


class _Rough(NamedTuple):
    """A quantity: a bound on its magnitude, and on the error of what was computed for it."""

    size: Array
    error: Array


def _given(array: Array) -> _Rough:
    """An input: exact."""
    size: Array = abs(array.astype(np.float64))
    return _Rough(size, np.zeros_like(size))


class _Arithmetic:
    """Errors of the operations on numbers of one dtype."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype, self.wide = dtype, accumulator(dtype)

    def product(self, a: _Rough, b: _Rough) -> _Rough:
        """``a @ b`` in the accumulator; operands, products and sums may each be flushed."""
        n, left, right = b.size.shape[0], a.size + a.error, b.size + b.error
        passed_on = a.error @ right + a.size @ b.error
        lost = underflow(self.wide) * (2 * n + left.sum(-1, keepdims=True) + right.sum(0))
        return _Rough(a.size @ b.size, passed_on + gamma(n, self.wide) * (left @ right) + lost)

    def sum(self, a: _Rough, b: _Rough) -> _Rough:
        """``a + b`` in the accumulator."""
        size, error = a.size + b.size, a.error + b.error
        return _Rough(size, error + roundoff(self.wide) * (size + error) + underflow(self.wide))

    def scaled(self, a: _Rough, term: Term) -> _Rough:
        """``a`` times the term's scaling and weight, multiplied and rounded to the accumulator
        beforehand.
        """
        factor, u, lost = abs(term.scaling * term.weight), roundoff(self.wide), underflow(self.wide)
        off = factor * (2 * u + u * u) + lost
        error = a.error * factor + (a.size + a.error) * off
        size = a.size * factor
        return _Rough(size, error + u * (size + error) + lost)

    def rounded(self, a: _Rough) -> _Rough:
        """``a`` rounded to the dtype."""
        return _Rough(
            a.size, a.error + roundoff(self.dtype) * (a.size + a.error) + underflow(self.dtype)
        )
