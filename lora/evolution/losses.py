"""The losses of training, each a function of embeddings that gives one value per pair.

Embeddings are rows of shape ``(n, d)``; similarity is the cosine. What a pair lacks, the others of
its batch stand in for.

Requirements: R17.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

SCALE = 20.0
"""Similarities are multiplied by this before the softmax (sentence-transformers' MultipleNegativesRankingLoss)."""

MARGIN = 0.3
"""By how much a positive must be nearer than a negative, in cosine distance."""

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""Queries, positives, negatives or None, qualities ``(n,)`` in [0, 1]; gives ``(n,)``."""


def contrastive(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    qualities: Tensor,
    *,
    scale: float = SCALE,
) -> Tensor:
    """Cross-entropy of each query's own positive among the batch's, and of each positive's own
    query; their mean.

    Negatives join the positives that a query must tell its own from. A pair counts by its quality.

    Source: Henderson et al. 2017, section 4.4 (one direction); Radford et al. 2021 (both).
    """
    queries, positives = F.normalize(queries, dim=-1), F.normalize(positives, dim=-1)
    similar = scale * queries @ positives.T
    own = torch.arange(len(similar), device=similar.device)
    more = [] if negatives is None else [scale * queries @ F.normalize(negatives, dim=-1).T]
    there = F.cross_entropy(torch.cat([similar, *more], dim=1), own, reduction="none")
    return qualities * (there + F.cross_entropy(similar.T, own, reduction="none")) / 2


def contrastive_loss(queries: Tensor, positives: Tensor, *, scale: float = SCALE) -> Tensor:
    """The mean of `contrastive` over pairs of quality 1, without negatives."""
    return contrastive(queries, positives, None, queries.new_ones(len(queries)), scale=scale).mean()


def cosine(
    queries: Tensor, positives: Tensor, negatives: Tensor | None, qualities: Tensor
) -> Tensor:
    """Squared error of a pair's similarity against its quality, and of its negative's against 0.

    Without negatives the next pair's positive is one.

    Source: sentence-transformers' CosineSimilarityLoss.
    """
    other = positives.roll(1, 0) if negatives is None else negatives
    found = (F.cosine_similarity(queries, positives) - qualities) ** 2
    return found + F.cosine_similarity(queries, other) ** 2


def triplet(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    qualities: Tensor,
    *,
    margin: float = MARGIN,
) -> Tensor:
    """By how much a positive is not nearer than its negative by a margin, in cosine distance; a
    pair counts by its quality.

    Without negatives the nearest of the other pairs' positives is one.

    Source: Schroff et al. 2015.
    """
    near = F.cosine_similarity(queries, positives)
    if negatives is None:
        every = F.normalize(queries, dim=-1) @ F.normalize(positives, dim=-1).T
        far = every.masked_fill(
            torch.eye(len(every), dtype=torch.bool, device=every.device), -1.0
        ).amax(1)
    else:
        far = F.cosine_similarity(queries, negatives)
    return qualities * F.relu(margin + far - near)


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {"contrastive": contrastive, "cosine": cosine, "triplet": triplet}
)
"""Losses by name."""
