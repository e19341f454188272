"""Which cards fit a query: cosine similarity to examples, top k, a threshold, and how to set that
threshold.

A card is described by one or several example sentences; its score is that of the nearest one.
Scores are float64, and a score is rounded to 1e-6 before it is compared, so that neither the order
of registration nor that of summation decides a tie: ties are ordered by name. ("Arrow routing" in
the literature, Ostapenko et al. 2024, picks adapters inside a model by singular vectors; this is
another thing.)

Requirements: R4, R7.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np

from lora.card import Array
from lora.errors import ArgumentError, ShapeError, shown

DECIMALS = 6
"""Scores are rounded to this many decimals."""


@dataclass(frozen=True)
class Candidate:
    """A card that may be chosen.

    Args:
        name: The card's.
        exemplars: Unit embeddings of its example sentences, shape ``(n, d)``, float64.
        virtual: Whether its weights are elsewhere.
        tags: What it may be filtered by.
    """

    name: str
    exemplars: Array
    virtual: bool = False
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Index:
    """Candidates by name, with all their exemplars as the rows of one matrix, made when first
    needed.
    """

    candidates: Mapping[str, Candidate]

    @cached_property
    def listed(self) -> tuple[Candidate, ...]:
        """The candidates in the mapping's order."""
        return tuple(self.candidates.values())

    @cached_property
    def rows(self) -> Array:
        """Every candidate's exemplars, candidates in the mapping's order; shape ``(N, d)``."""
        return np.concatenate([candidate.exemplars for candidate in self.candidates.values()])

    @cached_property
    def narrow(self) -> Array:
        """The rows in float32, from which a short list is made."""
        return self.rows.astype(np.float32)

    @cached_property
    def starts(self) -> Array:
        """Each candidate's first row."""
        return np.cumsum(
            [0, *(len(candidate.exemplars) for candidate in self.candidates.values())]
        )[:-1]

    def with_candidate(self, candidate: Candidate) -> "Index":
        """An index in which `candidate` stands in place of any of its name; kept sorted by name."""
        for other in self.candidates.values():
            if other.exemplars.shape[1] != candidate.exemplars.shape[1]:
                where, width = f"candidate {candidate.name!r}", candidate.exemplars.shape[1]
                raise ShapeError(where, f"embeddings of width {other.exemplars.shape[1]}", width)
            break
        return Index(
            MappingProxyType(dict(sorted({**self.candidates, candidate.name: candidate}.items())))
        )

    def without(self, name: str) -> "Index":
        """An index without the candidate of that name."""
        return Index(
            MappingProxyType({key: c for key, c in self.candidates.items() if key != name})
        )

    def tagged(self, tags: Collection[str]) -> "Index":
        """An index of the candidates that have all of these tags."""
        wanted = _tags(tags)
        if not wanted:
            return self
        return Index(
            MappingProxyType({key: c for key, c in self.candidates.items() if c.tags >= wanted})
        )


EMPTY = Index(MappingProxyType({}))


@dataclass(frozen=True)
class Route:
    """A card chosen for a query, with its score: cosine similarity in [-1, 1], rounded to 1e-6."""

    name: str
    score: float
    virtual: bool = False


@dataclass(frozen=True)
class Calibration:
    """A threshold with what is known of its false-trigger rate.

    Args:
        threshold: Queries that score below it are taken as unknown.
        groups: Source groups that it rests on.
        rate: Expected share of known queries below it, at most what was asked for.
        interval: Where 90 % of calibrations with so many groups have their true rate: the 5 % and
            95 % points of Beta(k, n + 1 - k).
    """

    threshold: float
    groups: int
    rate: float
    interval: tuple[float, float]


def unit(vectors: Array) -> Array:
    """Rows scaled to length 1, float64; a zero row stays zero.

    Scaling a row by a power of two changes nothing: it is first scaled to a largest magnitude in
    [0.5, 1), exactly.

    Args:
        vectors: Shape ``(n, d)``, finite.

    Raises:
        ShapeError: If it is not two-dimensional.
        ArgumentError: If it holds NaN or an infinity.

    Examples:
        >>> import numpy as np
        >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
        array([[0.6, 0.8],
               [0. , 0. ]])
    """
    try:
        rows = np.asarray(vectors, np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise ArgumentError("embeddings", "numbers of shape (n, d)", error) from error
    if rows.ndim != 2:
        raise ShapeError("embeddings", "shape (n, d)", f"shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ArgumentError("embeddings", "finite numbers", "NaN or an infinity")
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    scaled = np.ldexp(rows, -np.frexp(largest)[1])
    length = np.sqrt((scaled * scaled).sum(axis=1, keepdims=True))
    result: Array = np.divide(scaled, length, out=np.zeros_like(scaled), where=length > 0)
    return result


def select(
    query: Array,
    index: Index,
    *,
    top_k: int = 1,
    threshold: float | None = None,
    tags: Collection[str] = (),
) -> list[Route]:
    """The best candidates for a query, best first; none if none reaches the threshold.

    Args:
        query: A unit embedding, shape ``(d,)``.
        index: The candidates.
        top_k: How many at most, >= 1.
        threshold: The least score, or None for no limit.
        tags: Only candidates that have all of these.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ArgumentError("top_k", "an integer >= 1", shown(top_k))
    check_threshold(threshold)
    index = index.tagged(tags)
    if index.candidates and query.shape != (width := index.rows.shape[1:]):
        raise ShapeError("query embedding", f"shape {width}", f"shape {query.shape}")
    return rank(query, index, shortlist(query, index, top_k, threshold), top_k, threshold)


def rank(
    query: Array, index: Index, positions: Sequence[int], top_k: int, threshold: float | None
) -> list[Route]:
    """What `select` gives if just the candidates at these positions are there: the formula itself."""
    chosen = [index.listed[i] for i in positions]
    if not chosen:
        return []
    starts = list(accumulate((len(candidate.exemplars) for candidate in chosen), initial=0))[:-1]
    rows = np.concatenate([candidate.exemplars for candidate in chosen])
    similarity = np.einsum(
        "nd,d->n", rows, query
    )  # a matrix product may score two equal rows differently
    scores = np.round(np.maximum.reduceat(similarity, starts).clip(-1, 1), DECIMALS) + 0.0
    routes = [
        Route(c.name, score, c.virtual) for c, score in zip(chosen, scores.tolist(), strict=True)
    ]
    reached = [route for route in routes if threshold is None or route.score >= threshold]
    return sorted(reached, key=lambda route: (-route.score, route.name))[:top_k]


def shortlist(query: Array, index: Index, top_k: int, threshold: float | None) -> list[int]:
    """Positions of all candidates that may be among the best, by one float32 product with all
    exemplars.

    A product of unit vectors of width d is off by at most (d + 3) u in float32, u = 2⁻²⁴: d for the
    sum, whatever its order, one for each factor's rounding, one for the rest. What that and the
    rounding of scores leave open stays on the list, so that ranking the list gives what ranking all
    would.

    Source of the bound: Higham 2002, section 3.1.

    Args:
        query: A unit embedding, shape ``(d,)``; for one that is longer, nothing is left out.
        index, top_k, threshold: As `select`'s.
    """
    if not index.candidates or not float(query @ query) < 2:
        return list(range(len(index.listed)))
    near = index.narrow @ query.astype(np.float32)
    if len(near) > len(index.listed):
        near = np.maximum.reduceat(near, index.starts)
    margin = np.float32(1.01 * ((len(query) + 3) * 2.0**-24 + 10.0**-DECIMALS))
    least = -np.inf if threshold is None else threshold - margin
    if len(near) > top_k:
        least = max(least, np.partition(near, -top_k)[-top_k] - 2 * margin)
    positions: list[int] = np.flatnonzero(near >= least).tolist()
    return positions


def calibrate(
    scores: Mapping[str, Sequence[float]], rate: float = 0.05, *, seed: int = 0
) -> Calibration:
    """A threshold under which at most a share `rate` of known queries of *new* sources falls.

    Split conformal prediction with one score per source group: queries of one source resemble each
    other, so that a random split is too optimistic. One score of each group is drawn; the threshold
    is the k-th smallest of the n drawn, k = ⌊rate · (n + 1)⌋, which a query of a new source
    undercuts with probability at most k / (n + 1).

    Source: Vovk, Gammerman and Shafer 2005; Angelopoulos and Bates 2021, section 3.2 (the Beta
    law).

    Args:
        scores: Source group -> scores of known queries from it.
        rate: In (0, 1).
        seed: Of the draw.

    Raises:
        ArgumentError: If `rate` is out of range, a group is empty, or the groups are too few for it
            (``1 / rate - 1`` are needed).

    Examples:
        >>> calibrate({f"module {i}": [i / 100] for i in range(19)}, 0.1)
        Calibration(threshold=0.01, groups=19, rate=0.1, interval=(0.019033, 0.226374))
    """
    if not isinstance(rate, int | float) or not 0 < rate < 1:
        raise ArgumentError("rate", "a share in (0, 1)", shown(rate))
    if not isinstance(scores, Mapping) or not all(isinstance(group, str) for group in scores):
        raise ArgumentError("scores", "a mapping of source group to scores", shown(scores))
    if not all(_finite_scores(group) for group in scores.values()):
        raise ArgumentError("scores", "finite scores in every group", shown(scores))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError("seed", "an integer >= 0", shown(seed))
    rng, n = np.random.default_rng(seed), len(scores)
    slack = 1e-12  # a rate of 1 / (n + 1) is seldom exact
    k = min(math.floor(rate * (n + 1) + slack), n)
    if k < 1:
        needed = math.ceil((1 - slack) / rate) - 1
        raise ArgumentError("scores", f"at least {needed} source groups for a rate of {rate}", n)
    drawn = sorted(
        float(scores[group][int(rng.integers(len(scores[group])))]) for group in sorted(scores)
    )
    return Calibration(
        drawn[k - 1], n, k / (n + 1), (_beta_point(k, n, 0.05), _beta_point(k, n, 0.95))
    )


def texts_of(texts: Any) -> list[str]:
    """The texts of a request as a list.

    Raises:
        ArgumentError: If it is one str, or anything else than an ordered collection of str.
    """
    ordered = isinstance(texts, Collection) and not isinstance(texts, str | AbstractSet | Mapping)
    if not ordered or not all(isinstance(text, str) for text in texts):
        raise ArgumentError("texts", "a sequence of str", shown(texts))
    return list(texts)


def check_threshold(threshold: object) -> None:
    """Refuse what is neither a finite number nor None."""
    number = isinstance(threshold, int | float | np.number) and not isinstance(threshold, bool)
    if threshold is not None and not (number and math.isfinite(threshold)):  # type: ignore[arg-type]
        raise ArgumentError("threshold", "a finite number or None", shown(threshold))


def _finite_scores(group: Any) -> bool:
    """Whether a group's scores are numbers, at least one."""
    try:
        numbers = np.asarray(group, np.float64)
    except (TypeError, ValueError):
        return False
    return numbers.ndim == 1 and len(numbers) > 0 and bool(np.isfinite(numbers).all())


def _beta_point(k: int, n: int, probability: float) -> float:
    """The point below which Beta(k, n + 1 - k) has `probability`, by bisection on the binomial
    tail.
    """
    low, high = 0.0, 1.0
    choices = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k)
    ]  # of i in n, as logs
    for _ in range(60):
        middle = (low + high) / 2
        success, failure = math.log(middle), math.log1p(-middle)
        tail = 1.0 - sum(
            math.exp(c + i * success + (n - i) * failure) for i, c in enumerate(choices)
        )
        low, high = (middle, high) if tail < probability else (low, middle)
    return round((low + high) / 2, 6)


def candidate_of(
    name: str, embeddings: Any, *, virtual: bool = False, tags: Collection[str] = ()
) -> Candidate:
    """A candidate with its exemplars normalised."""
    exemplars = unit(embeddings)
    if not len(exemplars):
        raise ArgumentError(f"candidate {name!r}", "at least one example", "none")
    return Candidate(name, exemplars, virtual, _tags(tags))


def _tags(tags: Collection[str]) -> frozenset[str]:
    if (
        isinstance(tags, str)
        or not isinstance(tags, Collection)
        or not all(isinstance(tag, str) for tag in tags)
    ):
        raise ArgumentError("tags", "a collection of str", shown(tags))
    return frozenset(tags)
