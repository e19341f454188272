"""Decides whether a new skill is kept: it must beat every alternative, and harm no other skill.

The same queries are ranked by the skill and by each alternative. A paired bootstrap of the
differences in reciprocal rank gives the bounds (Efron and Tibshirani 1993, chapter 13): over the
queries and over the files that they come from, of which the wider counts.

Requirements: R18.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal, TypeAlias

import numpy as np

from lora.card import Array
from lora.checks import integer
from lora.errors import ArgumentError, DataError, ShapeError, shown

LEVEL = 0.95
"""Level of both bounds, each one-sided."""

RESAMPLES = 4000
"""Draws of the bootstrap."""

LEAST = 10
"""Queries that the bootstrap needs for meaningful bounds."""

FEWEST, MOST = 128, 256
"""Held-out pairs of an exam: with fewer it can't tell, and more are not looked at."""

MAX_FALL = 0.02
"""What the mean on a live skill's sample may fall by, in MRR."""

MAX_TAKEN = 0.05
"""Share of another skill's sample that a new one may take over."""

Kind: TypeAlias = Literal["skill", "format", "nothing", "can't tell"]


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
    """What an exam found.

    Args:
        kind: A skill of the topic; the format of the task alone, which a placebo learns as well;
            nothing; or that too few pairs were held out to tell.
        changes: Alternative -> the difference that the skill makes to it.
    """

    kind: Kind
    changes: Mapping[str, Change]

    @property
    def unbeaten(self) -> tuple[str, ...]:
        """The alternatives that the skill does not surely beat."""
        return tuple(name for name, change in self.changes.items() if change.lower <= 0)


@dataclass(frozen=True)
class Guard:
    """What a new version does to the sample of a live skill.

    Args:
        before, after: MRR on the sample, as served.
        taken: Share of the sample's queries that the new skill answers in another's place.
        pairs: How many; with fewer than `FEWEST` it is weak.
    """

    before: float
    after: float
    taken: float
    pairs: int

    def figures(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {**asdict(self), "weak": self.pairs < FEWEST}

    def refusal(self, name: str, max_taken: float = MAX_TAKEN) -> str:
        """Say why the new version is refused; "" if it is not.

        Examples:
            >>> [Guard(0.5, after, 0.0, 128).refusal("docs") for after in (0.49, 0.45)]
            ['', "on the sample of 'docs' the MRR falls by 0.050, more than 0.02: 0.500 -> 0.450"]
        """
        fall, where = round(self.before - self.after, 6), f"the sample of {name!r}"
        if fall > MAX_FALL:
            change = f"{self.before:.3f} -> {self.after:.3f}"
            return f"on {where} the MRR falls by {fall:.3f}, more than {MAX_FALL}: {change}"
        if self.taken > max_taken:
            return f"it takes {self.taken:.1%} of {where}, more than {max_taken:.1%}"
        return ""


def judge(changes: Mapping[str, Change]) -> Verdict:
    """Judge a skill by what it changes against each alternative.

    Args:
        changes: By alternative: ``"base"``, and names that begin with ``"placebo"`` or ``"skill"``.

    Examples:
        >>> better, same = change([0.5] * 128, [1.0] * 128), change([0.5] * 128, [0.5] * 128)
        >>> sides = (better, better), (better, same), (same, same)
        >>> [judge({"base": base, "placebo": other}).kind for base, other in sides]
        ['skill', 'format', 'nothing']
    """
    unbeaten = Verdict("skill", changes).unbeaten
    kind: Kind = "skill" if changes and not unbeaten else "nothing"
    if kind == "nothing" and "base" not in unbeaten:
        kind = "format" if any(name.startswith("placebo") for name in unbeaten) else "nothing"
    if min((change.queries for change in changes.values()), default=0) < FEWEST:
        kind = "can't tell"
    return Verdict(kind, changes)


def change(
    before: Any, after: Any, groups: Sequence[str] = (), *, seed: int = 0, where: str = "exam"
) -> Change:
    """Return the mean of paired differences with its bootstrap bounds.

    Args:
        before, after: Reciprocal ranks of the same queries, at least `LEAST`, shape ``(n,)``.
        groups: The file of each query; the bounds are then the wider ones.
        where: Named in errors.
    """
    try:
        old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(where, "reciprocal ranks", error) from error
    if old.ndim != 1 or old.shape != new.shape or len(groups) not in (0, len(old)):
        shapes = f"{old.shape}, {new.shape} and {len(groups)} groups"
        raise ShapeError(where, "the same shape (n,) twice, and a group for each", shapes)
    both = np.concatenate([old, new])
    if not ((both > 0) & (both <= 1)).all():  # NaN is neither
        raise ArgumentError(where, "reciprocal ranks in (0, 1]", shown(both))
    if len(old) < LEAST:
        raise DataError(where, f"at least {LEAST} queries", len(old), "gather more material")
    seed = integer(seed, f"{where}: seed", least=0)
    differences, mean = new - old, fmean(new - old)
    bounds = [_bounds(np.sort(differences), np.ones(len(old)), seed)]
    if len(groups):
        _, places, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        bounds.append(_bounds(np.bincount(places, differences), sizes, seed))
    lower, upper = min(low for low, _ in bounds), max(high for _, high in bounds)
    return Change(fmean(old), fmean(new), mean, min(lower, mean), max(upper, mean), len(old))


def _bounds(sums: Array, sizes: Array, seed: int) -> tuple[float, float]:
    """Return the bootstrap bounds of a mean, over units with these sums and sizes."""
    rng, n = np.random.default_rng(seed), len(sums)
    rows = max(1, 2**20 // n)  # at once; the draws are the same for any number
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(n, size=(min(rows, RESAMPLES - start), n))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    # Rounded, so that the last bit of a sum is no gain.
    ordered = np.sort(np.round(np.concatenate(means), 12) + 0.0)
    edge = math.floor((1 - LEVEL) * RESAMPLES)
    return float(ordered[edge - 1]), float(ordered[-edge])
