"""Decides whether a new skill is kept: it must help on held-out queries and not harm a guard set.

The same queries are ranked before and after. A paired bootstrap of the differences in reciprocal
rank gives the bounds. Source: Efron and Tibshirani 1993, chapter 13.

Requirements: R18.
"""

import math
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from lora.checks import integer
from lora.errors import ArgumentError, DataError, ShapeError, shown

LEVEL = 0.95
"""Level of both bounds, each one-sided."""

MAX_LOSS = 0.01
"""What the guard set may lose, in MRR."""

RESAMPLES = 4000
"""Draws of the bootstrap."""

LEAST = 10
"""Queries that the bootstrap needs for meaningful bounds."""


@dataclass(frozen=True)
class Change:
    """A mean difference in reciprocal rank, with its one-sided 95 % bounds and both MRRs."""

    before: float
    after: float
    mean: float
    lower: float
    upper: float
    queries: int


@dataclass(frozen=True)
class Verdict:
    """Whether a skill is accepted, with every figure that this rests on.

    Args:
        gain: On held-out queries of the new topic.
        guard: On queries that were answered before; the upper bound of loss is ``-guard.lower``.
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
        """Return all figures as JSON values."""
        return {
            **{name: getattr(self, name) for name in ("accepted", "helps", "harmless")},
            **asdict(self),
            "level": LEVEL,
            "max_loss": MAX_LOSS,
            "resamples": RESAMPLES,
        }


def judge(gain: tuple[Any, Any], guard: tuple[Any, Any], *, seed: int = 0) -> Verdict:
    """Accept a skill or not.

    Args:
        gain, guard: Reciprocal ranks before and after: of the new topic, and of a guard set.

    Examples:
        >>> better, same = ([0.5] * 10, [1.0] * 10), ([0.5] * 10, [0.5] * 10)
        >>> [judge(*sides).accepted for sides in ((better, same), (same, same))]
        [True, False]
    """
    helps = change(*gain, seed=seed, where="gate: gain")
    return Verdict(helps, change(*guard, seed=seed, where="gate: guard"), seed)


def change(before: Any, after: Any, *, seed: int = 0, where: str = "gate") -> Change:
    """Return the mean of paired differences with its bootstrap bounds.

    Args:
        before, after: Reciprocal ranks of the same queries, at least `LEAST`, shape ``(n,)``.
        where: Named in errors.
    """
    try:
        old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(where, "reciprocal ranks", error) from error
    if old.ndim != 1 or old.shape != new.shape:
        raise ShapeError(where, "the same shape (n,) twice", f"{old.shape} and {new.shape}")
    both = np.concatenate([old, new])
    if not ((both > 0) & (both <= 1)).all():  # NaN is neither
        raise ArgumentError(where, "reciprocal ranks in (0, 1]", shown(both))
    if len(old) < LEAST:
        raise DataError(where, f"at least {LEAST} queries", len(old), "gather more material")
    differences = np.sort(new - old)
    rng, n = np.random.default_rng(integer(seed, f"{where}: seed", least=0)), len(differences)
    rows = max(1, 2**20 // n)  # at once; the draws are the same for any number
    means = [
        differences[rng.integers(n, size=(min(rows, RESAMPLES - start), n))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)
    ]
    # Rounded, so that the last bit of a sum is no gain.
    ordered = np.sort(np.round(np.concatenate(means), 12) + 0.0)
    edge = math.floor((1 - LEVEL) * RESAMPLES)
    mean, lower, upper = fmean(differences), float(ordered[edge - 1]), float(ordered[-edge])
    return Change(fmean(old), fmean(new), mean, min(lower, mean), max(upper, mean), n)
