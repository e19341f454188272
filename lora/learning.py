"""One cycle of evolution over a folder of documents: notice, learn, keep what helps.

Without cards, the documentation of Python's standard library counts as known: one half is the
router's example of a known topic, the other half is the guard set.

Requirements: R5, R18.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lora.card import LoRACard
from lora.engine import ArrowEngine
from lora.errors import DataError
from lora.evolution.distill import Outcome, SkillDistiller, Source
from lora.files import PathLike, as_path
from lora.training.data import docstring_pairs
from lora.training.train import Progress

EXAMPLES = 1500
"""Sentences that stand for Python in the router."""

QUERIES = 150
"""Number of queries taken from the documents where the user gives none."""


def watching(
    engine: ArrowEngine,
    documents: PathLike,
    *,
    cards: Sequence[LoRACard] = (),
    queries: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> SkillDistiller:
    """Return a distiller of the engine that has seen queries about the documents.

    Args:
        documents: A folder, see `lora.evolution.distill.Source.read`.
        cards: Skills with descriptions to register; without any, Python's documentation is known.
        queries: What users asked; by default, some of the documents' own queries.
        options: Of `SkillDistiller`.

    Raises:
        DataError: If there is nothing to learn from.
    """
    folder = as_path(documents)
    source = Source.read(folder)
    if not len(source.pairs) and not queries:
        raise DataError(str(folder), "text that queries can be made of", "none")
    known, guard = docstring_pairs().split(0.5, seed=seed)
    for card in cards:
        engine.register_lora(card)
    if not cards:
        examples = known.sample(EXAMPLES, seed).queries
        engine.router.register_virtual_candidate("python", examples)
    name = folder.resolve().name or "documents"
    distiller = engine.enable_evolution(guard, sources={name: source}, seed=seed, **options)
    for query in queries or source.pairs.sample(QUERIES, seed).queries:
        distiller.observe(query)
    return distiller


def outcomes(distiller: SkillDistiller, progress: Progress | None = None) -> Iterator[Outcome]:
    """Work on every open task, the largest first, until none is open."""
    while any(task.state == "open" for task in distiller.tasks):
        yield distiller.work(progress=progress)
