"""Tells topics that an engine does not know, where a single query can't be told.

A query that no skill knows (`lora.routing.decide`) may be a stray one. Ten of one topic are
compared with what the known skills' own groups of examples score without themselves.

Requirements: R18.
"""

from typing import Any

import numpy as np

from lora.card import Array
from lora.checks import finite
from lora.errors import ArgumentError, ShapeError
from lora.routing import DECIMALS, Index, nearest, unit

LINK = 0.35
"""Cosine from which two texts count as one topic; with MiniLM, different topics stay below it."""

TOPIC = 10
"""Queries of one topic that can be told."""

GROUPS = 20
"""Known groups that a topic can be compared with."""

NOVEL = 0.05
"""Share of the known groups that may score as low as a novel topic."""


def novelty(queries: Any, index: Index) -> float | None:
    """Return the share of known groups that score as low as these queries do on average.

    A score is the share of the nearest skill's examples, each left out with its group, that score
    no higher. Up to `NOVEL` the topic counts as novel. None: that can't be told, since there are
    fewer than `TOPIC` queries or fewer than `GROUPS` groups.

    Args:
        queries: Embeddings, shape ``(n, d)``.
    """
    rows = unit(queries)
    skills = {name: skill for name, skill in index.candidates.items() if len(skill.left_out)}
    groups = [mean for skill in skills.values() for mean in _group_means(skill)]
    if len(rows) < TOPIC or len(groups) < GROUPS:
        return None
    known = Index(skills)
    routes = [nearest(row, known)[0] for row in rows]
    level = np.mean([(skills[route.name].left_out <= route.score).mean() for route in routes])
    return float(1 + (np.array(groups) <= level).sum()) / (1 + len(groups))


def _group_means(skill: Any) -> list[float]:
    """Return the mean over each group of what its examples score, as shares of all."""
    scores = skill.left_out
    shares = np.searchsorted(np.sort(scores), scores, side="right") / len(scores)
    groups = np.unique(skill.groups, return_inverse=True)[1]
    means: list[float] = (np.bincount(groups, shares) / np.bincount(groups)).tolist()
    return means


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
