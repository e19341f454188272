"""One cycle of evolution over a folder of documents: notice that they are not known, learn them,
keep what helps.

What is known is Python's own documentation, half of it as the router's example of a known topic,
half as the guard set, unless there are cards that say what they know.

Requirements: R5, R18, R19.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora.card import LoRACard
from lora.engine import ArrowEngine
from lora.errors import DataError
from lora.evolution.data import docstring_pairs
from lora.evolution.distill import Outcome, SkillDistiller, Source
from lora.evolution.train import Progress
from lora.evolution.work import KINDS, check
from lora.store import PathLike, as_path, save

EXAMPLES = 1500
"""Sentences of what is known already that the router goes by."""

QUERIES = 150
"""Of the documents' own, that are asked where there are no others."""


def watching(
    engine: ArrowEngine,
    documents: PathLike,
    *,
    cards: Sequence[LoRACard] = (),
    queries: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> SkillDistiller:
    """A distiller of the engine that has seen queries about the documents.

    Args:
        documents: A folder, see `lora.evolution.distill.Source.read`.
        cards: Skills that the engine has, with descriptions; Python's documentation counts as known
            where there are none.
        queries: What users asked; some of the documents' own queries if there is nothing.
        seed: Of every choice.
        options: As `SkillDistiller`'s.

    Raises:
        CardNotFoundError, DataError: If there is nothing to learn from.
    """
    folder, rng = as_path(documents), np.random.default_rng(seed)
    source = Source.read(folder)
    if not len(source.pairs) and not queries:
        raise DataError(str(folder), "something that can be asked about", "nothing")
    known, guard = docstring_pairs().split(0.5, seed=seed)
    for card in cards:
        engine.register_lora(card)
    if not cards:
        engine.router.register_virtual_candidate("python", _some(known.queries, EXAMPLES, rng))
    name = folder.resolve().name or "documents"
    distiller = engine.enable_evolution(guard, sources={name: source}, seed=seed, **options)
    for query in queries or _some(source.pairs.queries, QUERIES, rng):
        distiller.observe(query)
    return distiller


def outcomes(distiller: SkillDistiller, progress: Progress | None = None) -> Iterator[Outcome]:
    """Work on every task that is open, the largest first, until none is."""
    while any(task.state == "open" for task in distiller.tasks):
        yield distiller.work(progress=progress)


def distil(kind: str, parameters: dict[str, Any], folder: Path) -> Path | None:
    """A skill factory's job: learn a folder of documents; None if nothing helped.

    Args:
        kind: ``"distil"``.
        parameters: ``name``, ``documents`` (a folder) and ``model`` (the base model's folder);
            optionally ``steps``, ``rank``, ``alpha`` and ``seed``.
        folder: The job's.
    """
    check(kind, KINDS["distil"], parameters)
    engine = ArrowEngine.from_pretrained(parameters["model"])
    options = {key: parameters[key] for key in ("rank", "alpha", "seed") if key in parameters}
    distiller = watching(
        engine, parameters["documents"], max_steps=parameters.get("steps"), **options
    )
    best = next((outcome.card for outcome in outcomes(distiller) if outcome.card is not None), None)
    if best is None:
        return None
    path = folder / "card.lora.arrow"
    save(replace(best, name=parameters["name"]), path)
    return path


def _some(texts: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    return [texts[row] for row in sorted(rng.permutation(len(texts))[:count].tolist())]
