"""LoRARouter: candidates by name, held as one immutable mapping, around an embedding function.

Thread safety: one writer at a time and any number of readers; a `select` sees one state of the
register.

Requirements: R4.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from lora.card import LoRACard, check_card
from lora.errors import ArgumentError, ShapeError, shown
from lora.routing import EMPTY, Candidate, Route, candidate_of, select, texts_of, unit

Description: TypeAlias = str | Sequence[str]
"""One example sentence or several."""


class LoRARouter:
    """Picks cards by meaning, and abstains when none fits.

    Args:
        embed: Texts to embeddings ``(n, d)``; of the *base* model, so that active adapters never
            move scores.

    Examples:
        >>> import numpy as np
        >>> router = LoRARouter(lambda texts: np.array([[t.count("a"), t.count("b")] for t in texts], float))
        >>> router.register_virtual_candidate("apple", "aaa")
        >>> router.select("aa", threshold=0.9)
        [Route(name='apple', score=1.0, virtual=True)]
        >>> router.select("bb", threshold=0.9)
        []
    """

    def __init__(self, embed: Callable[[Sequence[str]], Any]) -> None:
        if not callable(embed):
            raise ArgumentError("embed", "a function of texts", type(embed).__name__)
        self._embed = embed
        self._index = EMPTY
        self._write = threading.Lock()

    @property
    def candidates(self) -> Mapping[str, Candidate]:
        """What is registered now, by name: a snapshot."""
        return self._index.candidates

    def register_card(
        self,
        card: LoRACard,
        description: Description | None = None,
        *,
        tags: Collection[str] | None = None,
    ) -> None:
        """Register a card, in place of an earlier one of its name; see `candidate`."""
        self.register(self.candidate(card, description, tags=tags))

    def candidate(
        self,
        card: LoRACard,
        description: Description | None = None,
        *,
        tags: Collection[str] | None = None,
    ) -> Candidate:
        """What `register_card` would register.

        Args:
            card: The card.
            description: Example sentences; by default the metadata's ``description`` and
                ``examples``.
            tags: By default the metadata's ``tags`` and ``task_type``.

        Raises:
            ArgumentError: If there is no description anywhere.
        """
        check_card(card)
        meta = dict(card.metadata)
        if description is None:
            description = [*_items(meta.get("description")), *_items(meta.get("examples"))]
        if tags is None:
            tags = [*_items(meta.get("task_type")), *_items(meta.get("tags"))]
        return self._described(card.name, description, virtual=False, tags=tags)

    def register(self, candidate: Candidate) -> None:
        """Register a candidate, in place of an earlier one of its name."""
        with self._write:
            self._index = self._index.with_candidate(candidate)

    def register_virtual_candidate(
        self, name: str, description: Description, *, tags: Collection[str] = ()
    ) -> None:
        """Register a card whose weights are elsewhere."""
        self.register(self._described(name, description, virtual=True, tags=tags))

    def unregister(self, name: str) -> None:
        """Forget a candidate; an unknown name is no error."""
        with self._write:
            self._index = self._index.without(name)

    def select(
        self,
        query: str,
        top_k: int = 1,
        threshold: float | None = None,
        *,
        tags: Collection[str] = (),
    ) -> list[Route]:
        """The best cards for a query, best first; see `lora.routing.select`."""
        return self.select_many([query], top_k, threshold, tags=tags)[0]

    def select_many(
        self,
        queries: Sequence[str],
        top_k: int = 1,
        threshold: float | None = None,
        *,
        tags: Collection[str] = (),
    ) -> list[list[Route]]:
        """The routes of many queries, each as it would be alone (as far as `embed` embeds each as
        it would alone).
        """
        index, embedded = self._index.tagged(tags), unit(self._embedded(queries))
        return [select(row, index, top_k=top_k, threshold=threshold) for row in embedded]

    def _described(
        self, name: str, description: Description, *, virtual: bool, tags: Collection[str]
    ) -> Candidate:
        if not isinstance(name, str) or not name:
            raise ArgumentError("candidate", "a name", shown(name))
        if not isinstance(description, str | Collection):
            raise ArgumentError(
                f"candidate {name!r}", "a description or several", shown(description)
            )
        texts = [description] if isinstance(description, str) else list(description)
        if not texts:
            raise ArgumentError(f"candidate {name!r}", "a description", "none", "pass description=")
        return candidate_of(name, self._embedded(texts), virtual=virtual, tags=tags)

    def _embedded(self, texts: Sequence[str]) -> Any:
        texts = texts_of(texts)
        rows = np.asarray(self._embed(texts)) if texts else np.empty((0, 0))
        if rows.ndim != 2 or len(rows) != len(texts):
            raise ShapeError("embed", f"shape ({len(texts)}, d)", f"shape {rows.shape}")
        return rows


def _items(value: Any) -> list[Any]:
    """What a card's metadata says under a key that may hold one thing or several."""
    return [item for item in (value if isinstance(value, list) else [value]) if item]
