"""How well embeddings find what belongs together: the reciprocal rank of each own candidate.

Requirements: R17, R18.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora.card import Array
from lora.errors import ArgumentError, ShapeError, shown
from lora.routing import unit


def reciprocal_ranks(queries: Any, candidates: Any, own: Sequence[int]) -> Array:
    """Return one over the rank of each query's own candidate by cosine similarity.

    The rank counts all candidates that score at least as high.

    Args:
        queries, candidates: Embeddings, shapes ``(n, d)`` and ``(m, d)``.
        own: For each query, its candidate's row.

    Examples:
        >>> reciprocal_ranks([[1, 0], [1, 1]], [[1, 0], [0, 1]], [0, 1])
        array([1. , 0.5])
    """
    rows, targets, places = unit(queries), unit(candidates), np.asarray(own)
    if places.shape != (len(rows),) or rows.shape[1] != targets.shape[1]:
        shapes = f"shapes {rows.shape}, {targets.shape} and {places.shape}"
        raise ShapeError("reciprocal ranks", "shapes (n, d), (m, d) and (n,)", shapes)
    if not np.isin(places, np.arange(len(targets))).all() or places.dtype.kind == "f":
        expected = f"rows of {len(targets)} candidates"
        raise ArgumentError("reciprocal ranks: own", expected, shown(own))
    # Not a matrix product: equal candidates score equally.
    scores = np.einsum("nd,md->nm", rows, targets)
    own_scores = np.take_along_axis(scores, places[:, None], axis=1)
    ranks: Array = 1.0 / (scores >= own_scores).sum(axis=1)
    return ranks
