"""Routing: find the cards that fit a query by cosine similarity, and decide whether one answers.

A card is described by one or several example sentences. `select` scores it by the nearest one.
`decide` scores it by the mean of its three nearest, and compares this with what the card's own
examples score without those of their own source. Scores are rounded to 1e-6 before they are
compared, and ties are ordered by name, so neither the order of registration nor that of summation
decides.

Requirements: R4, R7, R18.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from lora.card import Array
from lora.checks import finite, integer
from lora.errors import ArgumentError, ShapeError, shown

DECIMALS = 6
"""Scores are rounded to this many decimals."""

NEAREST = 3
"""A decision's score is the mean cosine to this many examples."""

UNKNOWN, ROUTES = 0.05, 0.2
"""Shares of a skill's own examples below its two points: a query below the first is unknown, from
the second on it routes."""

LEAST_GROUPS = 5
"""Groups from which on an example is scored without its group; below, without itself alone. Others
of its source then stay, scores and points are higher, and the card answers less."""

LEAST_EXAMPLES = 10
"""Examples that give a card points; below, the threshold is `UNCALIBRATED`."""

UNCALIBRATED = 0.3
"""The score that a card without points needs, where no threshold is stated."""


@dataclass(frozen=True)
class Candidate:
    """A card that may be routed to.

    Args:
        exemplars: Unit embeddings of its example sentences, ``(n, d)``, float64.
        virtual: Whether its weights are elsewhere.
        groups: The source of each example; empty if that is not known.
    """

    name: str
    exemplars: Array
    virtual: bool = False
    tags: frozenset[str] = frozenset()
    groups: tuple[Any, ...] = ()

    @cached_property
    def left_out(self) -> Array:
        """The score of each example by those of the other groups, shape ``(n,)``; or empty."""
        if len(self.groups) < LEAST_EXAMPLES:
            return np.empty(0)
        several = len(set(self.groups)) >= LEAST_GROUPS
        groups = (
            np.unique(self.groups, return_inverse=True)[1]
            if several
            else np.arange(len(self.groups))
        )
        cosines = np.einsum("nd,md->nm", self.exemplars, self.exemplars)
        return _mean_of_nearest(np.where(groups[:, None] == groups, -1.0, cosines))

    @cached_property
    def points(self) -> tuple[float, float] | None:
        """The scores below which a query is unknown, and from which on it routes."""
        scores = np.sort(self.left_out)
        if not len(scores):
            return None
        low, high = (float(scores[math.floor(share * len(scores))]) for share in (UNKNOWN, ROUTES))
        return low, high


@dataclass(frozen=True)
class Index:
    """Candidates by name; the matrices of exemplars are computed when first needed."""

    candidates: Mapping[str, Candidate]

    @cached_property
    def listed(self) -> tuple[Candidate, ...]:
        """The candidates in the mapping's order."""
        return tuple(self.candidates.values())

    @cached_property
    def rows(self) -> Array:
        """The exemplars of every candidate, in the mapping's order; shape ``(N, d)``."""
        return np.concatenate([candidate.exemplars for candidate in self.listed])

    @cached_property
    def narrow(self) -> Array:
        """The rows in float32, which `shortlist` works with."""
        return self.rows.astype(np.float32)

    @cached_property
    def starts(self) -> Array:
        """The first row of each candidate."""
        return np.cumsum([0, *(len(candidate.exemplars) for candidate in self.listed)])[:-1]

    def with_candidate(self, candidate: Candidate) -> "Index":
        """Return a sorted index with `candidate` in place of one of the same name."""
        width = candidate.exemplars.shape[1]
        expected = next((c.exemplars.shape[1] for c in self.candidates.values()), width)
        if width != expected:
            where = f"candidate {candidate.name!r}"
            raise ShapeError(where, f"embeddings of width {expected}", width)
        candidates = {**self.candidates, candidate.name: candidate}
        return Index(MappingProxyType(dict(sorted(candidates.items()))))

    def without(self, name: str) -> "Index":
        """Return an index without the candidate of that name."""
        return self.only(lambda candidate: candidate.name != name)

    def only(self, wanted: Callable[[Candidate], bool]) -> "Index":
        """Return an index of the candidates that are wanted."""
        candidates = {name: each for name, each in self.candidates.items() if wanted(each)}
        return Index(MappingProxyType(candidates))

    def tagged(self, tags: Collection[str]) -> "Index":
        """Return an index of the candidates that have all of these tags."""
        required = set(texts_of(tags, "tags", ordered=False))
        return self.only(lambda candidate: candidate.tags >= required) if required else self


EMPTY = Index(MappingProxyType({}))


@dataclass(frozen=True)
class Route:
    """A card for a query, with its score: cosine similarity in [-1, 1], rounded to 1e-6.

    Args:
        virtual: Whether the card is at a peer.

    Examples:
        >>> Route("docs", 0.81)
        Route(name='docs', score=0.81, virtual=False)
    """

    name: str
    score: float
    virtual: bool = False


@dataclass(frozen=True)
class Decision:
    """Whether the nearest card answers a query.

    Args:
        kind: ``"routes"``; ``"unknown"``: no card knows it; or ``"unsure"``, between the two.
        best: The nearest card, with its score.
        unknown, routes: The card's thresholds.
    """

    kind: Literal["routes", "unsure", "unknown"]
    best: Route
    unknown: float
    routes: float


@dataclass(frozen=True)
class Calibration:
    """A threshold, and how many known queries fall below it.

    Args:
        threshold: Queries that score below it count as unknown.
        groups: Number of source groups.
        rate: Expected share of known queries below it.
        interval: It holds the true rate of 90 % of calibrations with so many groups.
    """

    threshold: float
    groups: int
    rate: float
    interval: tuple[float, float]


def unit(vectors: Array) -> Array:
    """Return the rows ``(n, d)`` scaled to length 1, in float64; a zero row stays zero.

    Examples:
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
    # Scaling by a power of two is exact, and afterwards no square over- or underflows.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    scaled = np.ldexp(rows, -np.frexp(largest)[1])
    length = np.sqrt((scaled * scaled).sum(axis=1, keepdims=True))
    result: Array = scaled / np.where(length > 0, length, 1)
    return result


def select(
    query: Array,
    index: Index,
    *,
    top_k: int = 1,
    threshold: float | None = None,
    tags: Collection[str] = (),
) -> list[Route]:
    """Return the candidates nearest to a query, best first; none if none reaches the threshold.

    Args:
        query: A unit embedding, shape ``(d,)``.
        threshold: The smallest score.
        tags: Only candidates that have all of these tags.
    """
    top_k = integer(top_k, "top_k", 1)
    threshold = check_threshold(threshold)
    index = index.tagged(tags)
    if index.candidates and query.shape != (width := index.rows.shape[1:]):
        raise ShapeError("query embedding", f"shape {width}", f"shape {query.shape}")
    return rank(query, index, shortlist(query, index, top_k, threshold), top_k, threshold)


def rank(
    query: Array, index: Index, positions: Sequence[int], top_k: int, threshold: float | None
) -> list[Route]:
    """Score the candidates at these positions in float64 and return the best."""
    part = Index({index.listed[i].name: index.listed[i] for i in positions})
    if not part.listed:
        return []
    # A matrix product may score two equal rows differently; einsum does not.
    similarity = np.einsum("nd,d->n", part.rows, query)
    scores = np.round(np.maximum.reduceat(similarity, part.starts).clip(-1, 1), DECIMALS) + 0.0
    routes = [
        Route(candidate.name, score, candidate.virtual)
        for candidate, score in zip(part.listed, scores.tolist(), strict=True)
        if threshold is None or score >= threshold
    ]
    return sorted(routes, key=lambda route: (-route.score, route.name))[:top_k]


def shortlist(query: Array, index: Index, top_k: int, threshold: float | None) -> list[int]:
    """Return the positions of all candidates that may be among the best, by a float32 product.

    A float32 product of unit vectors of width d is off by at most (d + 3) u with u = 2⁻²⁴ (Higham
    2002, section 3.1). Every candidate within this error and the rounding of scores stays on the
    list. If the query is not a unit vector, all candidates do.
    """
    if not index.candidates or not float(query @ query) < 2:
        return list(range(len(index.listed)))
    near = index.narrow @ query.astype(np.float32)
    if len(near) > len(index.listed):
        near = np.maximum.reduceat(near, index.starts)
    margin = _float32_error(len(query))
    least = -np.inf if threshold is None else threshold - margin
    if len(near) > top_k:
        least = max(least, np.partition(near, -top_k)[-top_k] - 2 * margin)
    positions: list[int] = np.flatnonzero(near >= least).tolist()
    return positions


def _float32_error(width: int) -> Any:
    """Return what a float32 product and the rounding of a score can be off by; see `shortlist`."""
    return np.float32(1.01 * ((width + 3) * 2.0**-24 + 10.0**-DECIMALS))


def nearest(query: Array, index: Index, top_k: int = 1) -> list[Route]:
    """Return the candidates by the mean cosine to their three nearest exemplars, best first.

    Args:
        query: A unit embedding, shape ``(d,)``.
    """
    if not index.candidates:
        return []
    if query.shape != (width := index.rows.shape[1:]):
        raise ShapeError("query embedding", f"shape {width}", f"shape {query.shape}")
    bounds = np.maximum.reduceat(index.narrow @ query.astype(np.float32), index.starts)
    error, routes = _float32_error(len(query)), list[Route]()
    for place in np.argsort(-bounds, kind="stable").tolist():
        if len(routes) >= top_k and bounds[place] + error < routes[top_k - 1].score:
            break  # no mean is above its largest cosine
        candidate = index.listed[place]
        cosines = np.einsum("nd,d->n", candidate.exemplars, query)
        score = float(_mean_of_nearest(cosines[None])[0])
        routes.append(Route(candidate.name, score, candidate.virtual))
        routes.sort(key=lambda route: (-route.score, route.name))
    return routes[:top_k]


def decide(route: Route, index: Index, threshold: float | None = None) -> Decision:
    """Decide whether a candidate answers the query that it was found for by `nearest`.

    Args:
        threshold: A stated score in place of the candidate's own points.

    Examples:
        >>> index = EMPTY.with_candidate(candidate_of("docs", np.eye(2)[:1]))
        >>> (route,) = nearest(np.array([0.6, 0.8]), index)
        >>> decide(route, index).kind, decide(route, index, 0.7).kind
        ('routes', 'unknown')
    """
    points = index.candidates[route.name].points
    if threshold is not None or points is None:
        points = (UNCALIBRATED if threshold is None else threshold,) * 2
    unknown, routes = points
    kind: Any = "routes" if route.score >= routes else "unsure"
    return Decision("unknown" if route.score < unknown else kind, route, unknown, routes)


def explained(decision: Decision | None) -> str:
    """Say what was decided, with the score and both thresholds."""
    if decision is None:
        return "there is no candidate"
    best, points = decision.best, (decision.unknown, decision.routes)
    thresholds = "unknown below {:.6f}, routes from {:.6f}".format(*points)
    return f"{decision.kind}: {best.name!r} scores {best.score:.6f} ({thresholds})"


def _mean_of_nearest(cosines: Array) -> Array:
    largest = np.sort(cosines.clip(-1, 1), axis=1)[:, -NEAREST:]
    result: Array = np.round(largest.mean(axis=1), DECIMALS) + 0.0
    return result


def calibrate(
    scores: Mapping[str, Sequence[float]], rate: float = 0.05, *, seed: int = 0
) -> Calibration:
    """Find a threshold below which at most a share `rate` of known queries of *new* sources falls.

    This is split conformal prediction (Vovk, Gammerman and Shafer 2005) with one score per group,
    drawn at random, because queries of one source resemble each other. The threshold is the k-th
    smallest of these n, k = ⌊rate · (n + 1)⌋. Over many calibrations, the share of new sources'
    queries below it follows Beta(k, n + 1 - k).

    Args:
        scores: Source group -> scores of known queries from it; at least ``1 / rate - 1`` groups.
        rate: In (0, 1).
        seed: Of the draw of one score for each group.

    Raises:
        ArgumentError: There are too few groups, or a score is not finite.

    Examples:
        >>> calibrate({f"module {i}": [i / 100] for i in range(19)}, 0.1)
        Calibration(threshold=0.01, groups=19, rate=0.1, interval=(0.019033, 0.226374))
    """
    if not isinstance(rate, int | float) or not 0 < rate < 1:
        raise ArgumentError("rate", "a share in (0, 1)", shown(rate))
    try:
        groups = [np.asarray(scores[source], np.float64) for source in sorted(scores)]
    except (LookupError, TypeError, ValueError):
        groups = [np.empty(0)]
    named = isinstance(scores, Mapping) and all(isinstance(source, str) for source in scores)
    if not named or not all(g.ndim == 1 and g.size and np.isfinite(g).all() for g in groups):
        raise ArgumentError("scores", "finite scores in every group, by its name", shown(scores))
    rng, n = np.random.default_rng(integer(seed, "seed", 0)), len(groups)
    slack = 1e-12  # a rate of 1 / (n + 1) is seldom exact
    k = min(math.floor(rate * (n + 1) + slack), n)
    if k < 1:
        needed = math.ceil((1 - slack) / rate) - 1
        raise ArgumentError("scores", f"at least {needed} source groups for a rate of {rate}", n)
    drawn = sorted(float(group[rng.integers(len(group))]) for group in groups)
    interval = (_beta_point(k, n, 0.05), _beta_point(k, n, 0.95))
    return Calibration(drawn[k - 1], n, k / (n + 1), interval)


def texts_of(texts: Any, where: str = "texts", *, ordered: bool = True) -> list[str]:
    """Return the texts as a list; refuse a single str and, where order counts, a set."""
    refused = str | AbstractSet | Mapping if ordered else str
    several = isinstance(texts, Collection) and not isinstance(texts, refused)
    if not several or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(
            where, f"a {'sequence' if ordered else 'collection'} of str", shown(texts)
        )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        expected = "text that UTF-8 can hold, without half of a surrogate pair"
        raise ArgumentError(where, expected, shown(texts)) from error
    return list(texts)


def check_threshold(threshold: object) -> float | None:
    """Return the threshold as a float or None; refuse what is neither a finite number nor None."""
    return None if threshold is None else finite(threshold, "threshold", ArgumentError)


def _beta_point(k: int, n: int, probability: float) -> float:
    """Return the point of Beta(k, n + 1 - k) at `probability`, by bisecting the binomial tail."""
    log_choices = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k)
    ]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        success, failure = math.log(middle), math.log1p(-middle)
        tail = 1.0 - sum(
            math.exp(c + i * success + (n - i) * failure) for i, c in enumerate(log_choices)
        )
        low, high = (middle, high) if tail < probability else (low, middle)
    return round((low + high) / 2, 6)


def candidate_of(
    name: str,
    embeddings: Any,
    *,
    virtual: bool = False,
    tags: Collection[str] = (),
    groups: Sequence[Any] = (),
) -> Candidate:
    """Return a candidate whose exemplars are these embeddings, normalised.

    Args:
        groups: The source of each embedding, if that is known.
    """
    exemplars = unit(embeddings)
    if not len(exemplars):
        raise ArgumentError(f"candidate {name!r}", "at least one example", "none")
    if len(groups) not in (0, len(exemplars)):
        expected = f"none or one for each of {len(exemplars)} examples"
        raise ArgumentError(f"candidate {name!r}: groups", expected, len(groups))
    labels = frozenset(texts_of(tags, "tags", ordered=False))
    return Candidate(name, exemplars, virtual, labels, tuple(groups))
