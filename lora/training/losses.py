"""The losses of training: each gives one value per pair, from cosine similarities.

Queries, positives and negatives are embeddings ``(n, d)``; qualities ``(n,)`` in [0, 1] weight the
pairs. If negatives are None, the other pairs of the batch take their place.

Requirements: R17.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

SCALE = 20.0
"""Factor on similarities before the softmax; source: MultipleNegativesRankingLoss."""

MARGIN = 0.3
"""By how much a positive must be nearer than a negative, in cosine distance."""


def contrastive(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    qualities: Tensor,
    *,
    scale: float = SCALE,
) -> Tensor:
    """Mean of two cross-entropies: query to own positive, and positive to own query.

    A query must tell its positive from the batch's other positives and from all negatives.

    Source: Henderson et al. 2017, section 4.4 (one direction); Radford et al. 2021 (both).
    """
    queries, positives = F.normalize(queries, dim=-1), F.normalize(positives, dim=-1)
    own = torch.arange(len(queries), device=queries.device)
    similar = scale * queries @ positives.T
    candidates = similar
    if negatives is not None:
        wrong = scale * queries @ F.normalize(negatives, dim=-1).T
        candidates = torch.cat([similar, wrong], dim=1)
    to_positive = F.cross_entropy(candidates, own, reduction="none")
    to_query = F.cross_entropy(similar.T, own, reduction="none")
    return qualities * (to_positive + to_query) / 2


def cosine(
    queries: Tensor, positives: Tensor, negatives: Tensor | None, qualities: Tensor
) -> Tensor:
    """Squared error of the similarity against the quality, plus the negative's against 0.

    Without negatives, the next pair's positive is the negative.

    Source: sentence-transformers' CosineSimilarityLoss.
    """
    negatives = positives.roll(1, 0) if negatives is None else negatives
    error = (F.cosine_similarity(queries, positives) - qualities) ** 2
    return error + F.cosine_similarity(queries, negatives) ** 2


def triplet(
    queries: Tensor, positives: Tensor, negatives: Tensor | None, qualities: Tensor
) -> Tensor:
    """Amount by which the positive fails to be nearer than the negative by `MARGIN`.

    Without negatives, the nearest of the other pairs' positives is the negative.

    Source: Schroff et al. 2015.
    """
    near = F.cosine_similarity(queries, positives)
    if negatives is None:
        similar = F.normalize(queries, dim=-1) @ F.normalize(positives, dim=-1).T
        far = similar.fill_diagonal_(-1.0).amax(1)
    else:
        far = F.cosine_similarity(queries, negatives)
    return qualities * F.relu(MARGIN + far - near)


LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]] = {
    "contrastive": contrastive,
    "cosine": cosine,
    "triplet": triplet,
}
"""Losses by name."""
