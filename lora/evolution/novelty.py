"""What an engine does not know: two signals of a query in one calibrated score, and the topics that
such queries form.

The signals are the cosine to the nearest exemplar of any known skill, and the margin between the
best skill and the second. Either may be low, so they are calibrated together: each is measured in
steps from the known queries' median to their 5 % point, the lower of the two is the score, and
split conformal prediction, grouped by source, sets on it two thresholds. A query below the first is
*novel*, one at or above the second is *known*, and one between is *unsure*, by name.

Requirements: R18.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from lora.card import Array
from lora.errors import ArgumentError, ShapeError, StateError, shown
from lora.routing import DECIMALS, Calibration, Index, calibrate, unit

Kind: TypeAlias = Literal["known", "unsure", "novel"]

TAIL = 0.05
"""The share of known queries that lies one step below the median."""

LINK = 0.35
"""Cosine at which two texts are of one topic: among MiniLM's embeddings of novel queries, two topics stay apart at it."""


@dataclass(frozen=True)
class Signals:
    """What is seen of a query.

    Args:
        similarity: Cosine to the nearest exemplar of any skill, in [-1, 1].
        margin: That less the second skill's; less -1, the least that there is, where there is no
            second.
        nearest: The best skill's name.
    """

    similarity: float
    margin: float
    nearest: str = ""


@dataclass(frozen=True)
class Novelty:
    """What a query is taken for, and why.

    Args:
        kind: ``"known"``: it routes; ``"novel"``: it counts towards learning; ``"unsure"``:
            neither.
        score: The lower of the two signals, in steps below or above the median of known queries.
        signals: What it was scored by.
    """

    kind: Kind
    score: float
    signals: Signals


@dataclass(frozen=True)
class Detector:
    """Tells known queries from novel ones.

    Args:
        centre, step: Of similarity and of margin: the known queries' median, and its distance to
            their 5 % point (> 0).
        novel, known: The thresholds on the score: novel below the first, known from the second on.
    """

    centre: tuple[float, float]
    step: tuple[float, float]
    novel: Calibration
    known: Calibration

    def __post_init__(self) -> None:
        if not all(step > 0 for step in self.step):
            raise ArgumentError("detector: step", "numbers > 0", shown(self.step))
        if self.novel.threshold > self.known.threshold:
            found = f"{self.novel.threshold} > {self.known.threshold}"
            raise ArgumentError("detector", "novel's threshold at most known's", found)

    def score(self, signals: Signals) -> float:
        """The lower of the two signals, each in its own steps from its centre.

        Raises:
            ArgumentError: If a signal is not finite.
        """
        values = (signals.similarity, signals.margin)
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ArgumentError("signals", "finite numbers", shown(signals))
        return min((x - c) / s for x, c, s in zip(values, self.centre, self.step, strict=True))

    def judge(self, signals: Signals) -> Novelty:
        """Known, unsure or novel: one of the three, whatever the signals."""
        score = self.score(signals)
        kind: Kind = "novel" if score < self.novel.threshold else "unsure"
        return Novelty("known" if score >= self.known.threshold else kind, score, signals)


def signals_of(queries: Any, index: Index) -> list[Signals]:
    """The two signals of each query.

    Args:
        queries: Embeddings, shape ``(n, d)``, of any length.
        index: What is known.

    Raises:
        StateError: If nothing is.
        ShapeError: If the widths differ.

    Examples:
        >>> import numpy as np
        >>> from lora.routing import EMPTY, candidate_of
        >>> docs, law = candidate_of("docs", np.eye(2)[:1]), candidate_of("law", np.eye(2)[1:])
        >>> index = EMPTY.with_candidate(docs).with_candidate(law)
        >>> signals_of([[4.0, 3.0]], index)
        [Signals(similarity=0.8, margin=0.2, nearest='docs')]
    """
    if not index.candidates:
        raise StateError(
            "novelty", "at least one known skill", "none", "register a card with its examples"
        )
    scores = np.maximum.reduceat(similarities(queries, index.rows), index.starts, axis=1)
    names = list(index.candidates)  # sorted: of equal ones, the first is the best
    best = scores.argmax(axis=1)
    found = []
    for row, place in zip(scores, best.tolist(), strict=True):
        second = max(np.delete(row, place).tolist(), default=-1.0)
        found.append(
            Signals(row[place].item(), round(row[place].item() - second, DECIMALS), names[place])
        )
    return found


def fit(
    known: Mapping[str, Sequence[Signals]],
    *,
    rate: float = 0.05,
    doubt: float = 0.2,
    share: float = 0.4,
    seed: int = 0,
) -> Detector:
    """A detector for which at most a share `rate` of known queries of new sources is novel, and
    `doubt` not known.

    The sources are split in two: one part gives the signals' centres and steps, the other the
    thresholds, so that the conformal guarantee holds for the joint score.

    Source: see `lora.routing.calibrate`.

    Args:
        known: Source group -> signals of known queries from it, none of them among the exemplars.
        rate, doubt: In (0, 1), `rate` <= `doubt`.
        share: Of the sources that give centres and steps, in (0, 1).
        seed: Of the split and of the draw of one query from each source.

    Raises:
        ArgumentError: If a number is out of range or there are too few sources: ``1 / rate - 1``
            are needed besides the share.
    """
    if not (isinstance(rate, float) and isinstance(doubt, float) and 0 < rate <= doubt < 1):
        raise ArgumentError("rate, doubt", "shares in (0, 1), rate <= doubt", shown((rate, doubt)))
    if not (isinstance(share, float) and 0 < share < 1):
        raise ArgumentError("share", "a share in (0, 1)", shown(share))
    if not isinstance(known, Mapping) or not all(known.values()):
        raise ArgumentError(
            "known", "a mapping of source group to signals, at least one in each", shown(known)
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError("seed", "an integer >= 0", shown(seed))
    groups = sorted(known)
    order = np.random.default_rng([seed, len(groups)]).permutation(len(groups))
    size = round(share * len(groups))
    scaling, rest = ([groups[i] for i in sorted(part)] for part in (order[:size], order[size:]))
    rows = np.array(
        [(s.similarity, s.margin) for group in scaling for s in known[group]], np.float64
    )
    if not len(rows) or not np.isfinite(rows).all():
        raise ArgumentError(
            "known", "finite signals of several source groups", f"{len(groups)} groups"
        )
    centre = np.median(rows, axis=0)
    step = np.maximum(
        centre - np.quantile(rows, TAIL, axis=0), 10.0**-DECIMALS
    )  # signals may all be equal
    places, steps = (centre[0].item(), centre[1].item()), (step[0].item(), step[1].item())
    free = Calibration(-math.inf, 0, 0.0, (0.0, 1.0))
    scorer = Detector(places, steps, free, free)
    scores = {group: [scorer.score(s) for s in known[group]] for group in rest}
    return Detector(
        places, steps, calibrate(scores, rate, seed=seed), calibrate(scores, doubt, seed=seed)
    )


@dataclass(frozen=True)
class Alarm:
    """k-of-n with hysteresis: rings when k of the last n queries were novel, falls silent when at
    most `release` were.

    Args:
        k, n, release: ``0 <= release < k <= n``.
        recent: Whether each of the last queries was novel, at most n, oldest first.
        ringing: The state.

    Examples:
        >>> alarm = Alarm(k=2, n=3, release=0)
        >>> for kind in ("novel", "known", "novel", "known", "known", "known"):
        ...     alarm = alarm.after(kind)
        ...     print(kind, alarm.ringing)
        novel False
        known False
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
        if (
            any(isinstance(x, bool) or not isinstance(x, int) for x in numbers)
            or not 0 <= self.release < self.k <= self.n
        ):
            raise ArgumentError("alarm", "integers 0 <= release < k <= n", shown(numbers))

    def after(self, kind: Kind) -> "Alarm":
        """The state after one more query; an unsure one says nothing either way and leaves it as it
        is.
        """
        if kind == "unsure":
            return self
        recent = (*self.recent, kind == "novel")[-self.n :]
        count = sum(recent)
        ringing = count >= self.k or (self.ringing and count > self.release)
        return Alarm(self.k, self.n, self.release, recent, ringing)


def topics(embeddings: Any, threshold: float = LINK) -> tuple[tuple[int, ...], ...]:
    """Groups of texts that are alike: the connected components of "cosine >= threshold".

    Which texts are together depends on the texts alone, not on their order.

    Args:
        embeddings: Shape ``(n, d)``.
        threshold: In [-1, 1].

    Returns:
        Positions, ascending within a topic; the largest topic first, of equal ones that with the
        first position.

    Examples:
        >>> topics([[1, 0], [0, 1], [9, 1], [0, 2], [8, 1]], 0.9)
        ((0, 2, 4), (1, 3))
    """
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, int | float)
        or not -1 <= threshold <= 1
    ):
        raise ArgumentError("threshold", "a cosine in [-1, 1]", shown(threshold))
    near = similarities(embeddings, embeddings) >= threshold
    waiting = list(range(len(near)))
    found: list[tuple[int, ...]] = []
    while waiting:
        members, edge = {waiting[0]}, {waiting[0]}
        while edge:
            edge = {j for i in edge for j in np.flatnonzero(near[i]).tolist()} - members
            members |= edge
        found.append(tuple(sorted(members)))
        waiting = [i for i in waiting if i not in members]
    return tuple(sorted(found, key=lambda topic: (-len(topic), topic)))


def similarities(left: Any, right: Any) -> Array:
    """Cosines of every row of `left` with every row of `right`, rounded to 1e-6; shape ``(n, m)``."""
    rows, columns = unit(left), unit(right)
    if rows.shape[1] != columns.shape[1]:
        raise ShapeError("embeddings", f"width {rows.shape[1]}", f"width {columns.shape[1]}")
    cosines = np.einsum(
        "nd,md->nm", rows, columns
    )  # not a matrix product: a pair's cosine is the same at any place
    result: Array = np.round(np.clip(cosines, -1, 1), DECIMALS) + 0.0
    return result


def auroc(novel: Sequence[float], known: Sequence[float]) -> float:
    """The chance that a novel query scores below a known one, a tie counting half: the area under
    the ROC curve.

    Source: Mann and Whitney 1947.

    Args:
        novel, known: Scores, at least one each; lower means more novel.

    Raises:
        ArgumentError: If there is none on one side, or one is NaN.

    Examples:
        >>> auroc([0.1, 0.4], [0.3, 0.5])
        0.75
    """
    low, high = np.sort(np.asarray(novel, np.float64)), np.asarray(known, np.float64)
    if (
        not (low.ndim == high.ndim == 1 and low.size and high.size)
        or np.isnan(low).any()
        or np.isnan(high).any()
    ):
        raise ArgumentError(
            "auroc", "scores on both sides, without NaN", f"shapes {low.shape} and {high.shape}"
        )
    below, ties_too = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return int((below + ties_too).sum()) / (2 * low.size * high.size)
