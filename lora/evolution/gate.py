"""Whether a new skill is kept: it must help on held-out queries and harm none of a guard set, both
beyond chance.

The same queries are ranked before and after, so that the bootstrap is paired: it draws queries, and
with each its difference in reciprocal rank. The bounds are quantiles of the mean difference over
the draws, the wider of two where they fall between. Source: Efron and Tibshirani 1993, chapter 13.

Requirements: R18.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora.card import Array
from lora.errors import ArgumentError, DataError, ShapeError, shown
from lora.routing import unit

LEVEL = 0.95
"""Of both bounds, each one-sided."""

MAX_LOSS = 0.01
"""What the guard set may lose, in MRR."""

RESAMPLES = 4000
"""Draws of the bootstrap."""

LEAST = 10
"""Queries below which the bootstrap's bounds mean too little."""


@dataclass(frozen=True)
class Change:
    """A mean difference in reciprocal rank with its one-sided 95 % bounds.

    Args:
        before, after: MRR, in [0, 1].
        mean: After less before.
        lower, upper: Bounds of the mean.
        queries: How many there were.
    """

    before: float
    after: float
    mean: float
    lower: float
    upper: float
    queries: int


@dataclass(frozen=True)
class Verdict:
    """Whether a skill is accepted, with every figure that it rests on.

    Args:
        gain: On held-out queries of the new topic.
        guard: On queries that were answered before; its loss's upper bound is ``-guard.lower``.
        seed: Of the bootstrap.
    """

    gain: Change
    guard: Change
    seed: int = 0

    @property
    def helps(self) -> bool:
        """Whether the gain's lower bound is above 0."""
        return self.gain.lower > 0

    @property
    def harmless(self) -> bool:
        """Whether the guard set's upper bound of loss is at most `MAX_LOSS`."""
        return -self.guard.lower <= MAX_LOSS

    @property
    def accepted(self) -> bool:
        """Whether it helps and is harmless."""
        return self.helps and self.harmless

    def figures(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "accepted": self.accepted,
            "helps": self.helps,
            "harmless": self.harmless,
            "gain": asdict(self.gain),
            "guard": asdict(self.guard),
            "seed": self.seed,
            "level": LEVEL,
            "max_loss": MAX_LOSS,
            "resamples": RESAMPLES,
        }


def judge(gain: tuple[Any, Any], guard: tuple[Any, Any], *, seed: int = 0) -> Verdict:
    """Accept a skill or not.

    Args:
        gain, guard: Reciprocal ranks before and after, of the same queries in the same order: of
            the new topic, and of a guard set.
        seed: Of the bootstrap.

    Raises:
        DataError: If there are fewer than `LEAST` queries in either.
        ShapeError, ArgumentError: See `change`.

    Examples:
        >>> from dataclasses import replace
        >>> better, same = ([0.5] * 10, [1.0] * 10), ([0.5] * 10, [0.5] * 10)
        >>> judge(better, same).accepted, judge(same, same).accepted, judge(better, better[::-1]).accepted
        (True, False, False)
    """
    found = [
        change(*side, seed=seed, where=where)
        for side, where in ((gain, "gate: gain"), (guard, "gate: guard"))
    ]
    return Verdict(found[0], found[1], seed)


def change(before: Any, after: Any, *, seed: int = 0, where: str = "gate") -> Change:
    """The mean of paired differences with its bootstrap bounds; the order of the queries changes
    nothing.

    Args:
        before, after: Reciprocal ranks, shape ``(n,)``, in (0, 1].
        seed: Of the bootstrap.
        where: Named in errors.

    Raises:
        ShapeError: If the two are not of one shape ``(n,)``.
        ArgumentError: If one is not in (0, 1], or the seed is no integer >= 0.
        DataError: If n is less than `LEAST`.
    """
    sides = [_ranks(side, where) for side in (before, after)]
    if sides[0].shape != sides[1].shape:
        raise ShapeError(where, f"shape {sides[0].shape}, as before", f"shape {sides[1].shape}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError(f"{where}: seed", "an integer >= 0", shown(seed))
    n = len(sides[0])
    if n < LEAST:
        raise DataError(where, f"at least {LEAST} queries", n, "gather more material")
    differences = np.sort(sides[1] - sides[0])
    means = np.sort(_resampled(differences, seed))
    edge = math.floor((1 - LEVEL) * RESAMPLES)
    lower, upper = float(means[edge - 1]), float(means[-edge])
    mean = math.fsum(differences) / n
    return Change(_mean(sides[0]), _mean(sides[1]), mean, min(lower, mean), max(upper, mean), n)


def reciprocal_ranks(queries: Any, candidates: Any, own: Sequence[int]) -> Array:
    """One over the rank of each query's own candidate by cosine similarity, counting all that score
    at least as high.

    Source: the rank of `lora.evolution.train.evaluate`.

    Args:
        queries, candidates: Embeddings, shapes ``(n, d)`` and ``(m, d)``.
        own: For each query, its candidate's row.

    Raises:
        ShapeError: If widths or numbers do not fit.
        ArgumentError: If an embedding is not finite, or a row is none of the candidates'.

    Examples:
        >>> reciprocal_ranks([[1, 0], [1, 1]], [[1, 0], [0, 1]], [0, 1])
        array([1. , 0.5])
    """
    rows, targets, places = unit(queries), unit(candidates), np.asarray(own)
    if places.shape != (len(rows),) or rows.shape[1] != targets.shape[1]:
        found = f"shapes {rows.shape}, {targets.shape} and {places.shape}"
        raise ShapeError("reciprocal ranks", "shapes (n, d), (m, d) and (n,)", found)
    if places.size and (
        places.dtype.kind not in "iu" or not 0 <= places.min() <= places.max() < len(targets)
    ):
        raise ArgumentError(
            "reciprocal ranks: own", f"rows of {len(targets)} candidates", shown(own)
        )
    scores = np.einsum(
        "nd,md->nm", rows, targets
    )  # not a matrix product: equal candidates score equally
    mine = scores[np.arange(len(rows)), places]
    ranks: Array = 1.0 / (scores >= mine[:, None]).sum(axis=1)
    return ranks


def _resampled(differences: Array, seed: int) -> Array:
    """The mean of each draw of n differences with replacement."""
    rng, n = np.random.default_rng(seed), len(differences)
    rows = min(RESAMPLES, max(1, 2**20 // n))  # at once: the draws are the same whatever it is
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    means = [differences[rng.integers(n, size=(size, n))].mean(axis=1) for size in sizes]
    result: Array = np.round(np.concatenate(means), 12) + 0.0  # so that no sum's last bit is a gain
    return result


def _ranks(values: Any, where: str) -> Array:
    try:
        ranks = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(where, "reciprocal ranks", error) from error
    if ranks.ndim != 1:
        raise ShapeError(where, "shape (n,)", f"shape {ranks.shape}")
    if not ((ranks > 0) & (ranks <= 1)).all():  # NaN is neither
        raise ArgumentError(where, "reciprocal ranks in (0, 1]", shown(values))
    return ranks


def _mean(values: Array) -> float:
    return math.fsum(values) / len(values)
