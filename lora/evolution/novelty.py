"""Tells queries that an engine knows from novel ones, and groups novel queries into topics.

Two signals may be low: the cosine to the nearest exemplar of any known skill, and the margin to the
second skill. Each is measured in steps from the known queries' median to their 5 % point; the lower
one is the score. Split conformal prediction, grouped by source, sets two thresholds on the score:
below the first a query is *novel*, from the second on *known*, between them *unsure*.

Requirements: R18.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from lora.card import Array
from lora.checks import finite, integer
from lora.errors import ArgumentError, ShapeError, StateError, shown
from lora.routing import DECIMALS, Calibration, Index, calibrate, unit

Kind: TypeAlias = Literal["known", "unsure", "novel"]

TAIL = 0.05
"""Share of known queries that lies at least one step below the median."""

SHARE = 0.4
"""Share of the sources that give centres and steps; the others give the thresholds."""

LINK = 0.35
"""Cosine from which two texts count as one topic; with MiniLM, different topics stay below it."""


@dataclass(frozen=True)
class Signals:
    """The two signals of a query.

    Args:
        similarity: Cosine to the nearest exemplar of any skill.
        margin: Best score minus second-best score. With a single skill, -1 stands for the second.
        nearest: Name of the best skill.
    """

    similarity: float
    margin: float
    nearest: str = ""

    def __post_init__(self) -> None:
        finite(self.similarity, "signals: similarity", ArgumentError)
        finite(self.margin, "signals: margin", ArgumentError)


@dataclass(frozen=True)
class Novelty:
    """The judgement of a query: a known one routes, a novel one counts towards learning."""

    kind: Kind
    score: float
    signals: Signals


@dataclass(frozen=True)
class Detector:
    """Tells known queries from novel ones.

    Args:
        centre, step: Medians of similarity and margin, and distances to their 5 % points.
        novel, known: A query is novel below the first threshold, known from the second on.
    """

    centre: tuple[float, float]
    step: tuple[float, float]
    novel: Calibration
    known: Calibration

    def __post_init__(self) -> None:
        if not all(step > 0 for step in self.step):  # NaN is not either
            raise ArgumentError("detector: step", "numbers > 0", shown(self.step))
        if self.novel.threshold > self.known.threshold:
            thresholds = f"{self.novel.threshold} > {self.known.threshold}"
            raise ArgumentError("detector", "novel's threshold at most known's", thresholds)

    def score(self, signals: Signals) -> float:
        """Return the lower of the two signals, each in its own steps from its centre."""
        similarity = (signals.similarity - self.centre[0]) / self.step[0]
        return min(similarity, (signals.margin - self.centre[1]) / self.step[1])

    def judge(self, signals: Signals) -> Novelty:
        """Judge a query as known, unsure or novel."""
        score = self.score(signals)
        kind: Kind = "known" if score >= self.known.threshold else "unsure"
        return Novelty("novel" if score < self.novel.threshold else kind, score, signals)


def signals_of(queries: Any, index: Index) -> list[Signals]:
    """Return the two signals of each query, from embeddings of shape ``(n, d)``.

    Examples:
        >>> import numpy as np
        >>> from lora.routing import EMPTY, candidate_of
        >>> docs, law = candidate_of("docs", np.eye(2)[:1]), candidate_of("law", np.eye(2)[1:])
        >>> index = EMPTY.with_candidate(docs).with_candidate(law)
        >>> signals_of([[4.0, 3.0]], index)
        [Signals(similarity=0.8, margin=0.2, nearest='docs')]
    """
    if not index.candidates:
        hint = "register a card with its examples"
        raise StateError("novelty", "at least one known skill", "none", hint)
    scores = np.maximum.reduceat(similarities(queries, index.rows), index.starts, axis=1)
    ordered = np.sort(np.pad(scores, ((0, 0), (1, 0)), constant_values=-1.0), axis=1)
    margins = np.round(ordered[:, -1] - ordered[:, -2], DECIMALS)
    # The names are sorted: of equal skills, the first is the best.
    nearest = np.array(list(index.candidates))[scores.argmax(axis=1)]
    return list(map(Signals, ordered[:, -1].tolist(), margins.tolist(), nearest.tolist()))


def fit(
    known: Mapping[str, Sequence[Signals]], *, rate: float = 0.05, doubt: float = 0.2, seed: int = 0
) -> Detector:
    """Return a detector that calls few known queries of new sources novel or unsure.

    One part of the sources gives centres and steps, the other the thresholds, so that the guarantee
    of `lora.routing.calibrate` holds for the joint score.

    Args:
        known: Source group -> signals of known queries from it, none of them exemplars.
        rate, doubt: Largest shares that are novel, and not known.
    """
    if not 0 < finite(rate, "rate", ArgumentError) <= finite(doubt, "doubt", ArgumentError) < 1:
        raise ArgumentError("rate, doubt", "shares in (0, 1), rate <= doubt", f"{rate}, {doubt}")
    named = isinstance(known, Mapping) and all(isinstance(source, str) for source in known)
    if not named or not all(map(_are_signals, known.values())):
        expected = "signals by the name of their source group, at least one in each"
        raise ArgumentError("known", expected, shown(known))
    rng, names = np.random.default_rng([integer(seed, "seed", least=0), len(known)]), sorted(known)
    order = [names[place] for place in rng.permutation(len(names))]
    size = round(SHARE * len(order))
    rows = np.array([(s.similarity, s.margin) for group in order[:size] for s in known[group]])
    if not len(rows):
        raise ArgumentError("known", "several source groups", f"{len(order)} groups")
    centre = np.median(rows, axis=0)
    # The signals may all be equal.
    step = np.maximum(centre - np.quantile(rows, TAIL, axis=0), 10.0**-DECIMALS)
    free = Calibration(-math.inf, 0, 0.0, (0.0, 1.0))
    detector = Detector(tuple(centre.tolist()), tuple(step.tolist()), free, free)
    scores = {group: list(map(detector.score, known[group])) for group in order[size:]}
    novel, unsure = (calibrate(scores, share, seed=seed) for share in (rate, doubt))
    return replace(detector, novel=novel, known=unsure)


def _are_signals(group: object) -> bool:
    """Tell whether a group is a sequence of at least one query's signals."""
    return isinstance(group, Sequence) and {type(signals) for signals in group} == {Signals}


@dataclass(frozen=True)
class Alarm:
    """An alarm that rings when k of the last n queries were novel, until at most `release` are.

    Args:
        recent: Whether each of the last queries was novel, oldest first.

    Examples:
        >>> alarm = Alarm(k=2, n=3, release=0)
        >>> for kind in ("novel", "novel", "known", "known", "known"):
        ...     alarm = alarm.after(kind)
        ...     print(kind, alarm.ringing)
        novel False
        novel True
        known True
        known True
        known False
    """

    k: int = 5
    n: int = 20
    release: int = 1
    recent: tuple[bool, ...] = ()
    ringing: bool = False

    def __post_init__(self) -> None:
        numbers = (self.release, self.k, self.n)
        if {type(x) for x in numbers} != {int} or not 0 <= self.release < self.k <= self.n:
            raise ArgumentError("alarm", "integers 0 <= release < k <= n", shown(numbers))

    def after(self, kind: Kind) -> "Alarm":
        """Return the alarm after one more query; an unsure one changes nothing."""
        if kind == "unsure":
            return self
        recent = (*self.recent, kind == "novel")[-self.n :]
        ringing = sum(recent) >= self.k or (self.ringing and sum(recent) > self.release)
        return replace(self, recent=recent, ringing=ringing)


def topics(embeddings: Any, threshold: float = LINK) -> tuple[tuple[int, ...], ...]:
    """Group texts that are alike: the connected components of "cosine >= threshold".

    Returns:
        Positions, ascending within a topic, the largest topic first.

    Examples:
        >>> topics([[1, 0], [0, 1], [9, 1], [0, 2], [8, 1]], 0.9)
        ((0, 2, 4), (1, 3))
    """
    if not -1 <= finite(threshold, "threshold", ArgumentError) <= 1:
        raise ArgumentError("threshold", "a cosine in [-1, 1]", threshold)
    near = similarities(embeddings, embeddings) >= threshold
    labels, last = np.arange(len(near)), np.empty(0, int)
    while not np.array_equal(labels, last):  # every text takes the smallest label near it
        last = labels
        labels = np.where(near, last, last[:, None]).min(axis=1, initial=len(near))
    groups = [tuple(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())]
    return tuple(sorted(groups, key=lambda topic: (-len(topic), topic)))


def similarities(left: Any, right: Any) -> Array:
    """Return the cosines of rows of `left` with rows of `right`, rounded to 1e-6; ``(n, m)``."""
    rows, columns = unit(left), unit(right)
    if rows.shape[1] != columns.shape[1]:
        raise ShapeError("embeddings", f"width {rows.shape[1]}", f"width {columns.shape[1]}")
    # Not a matrix product: the cosine of a pair is the same at any place.
    cosines = np.einsum("nd,md->nm", rows, columns)
    result: Array = np.round(np.clip(cosines, -1, 1), DECIMALS) + 0.0
    return result
