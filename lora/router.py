"""LoRARouter: chooses cards for a query by the meaning of their descriptions.

Thread safety: one writer at a time and any number of readers; a call sees one state.

Requirements: R4.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lora.card import LoRACard, check_card
from lora.errors import ArgumentError, ShapeError, shown
from lora.routing import (
    EMPTY,
    Candidate,
    Decision,
    Index,
    Route,
    candidate_of,
    decide,
    nearest,
    select,
    texts_of,
    unit,
)
from lora.state import StateReference, Uncopied
from lora.targets import listed

Description: TypeAlias = str | Sequence[str]
"""One example sentence or several."""


@dataclass(frozen=True, kw_only=True)
class RouterState:
    """What a router knows: its candidates."""

    index: Index = EMPTY


class LoRARouter(Uncopied):
    """Picks cards by meaning, and abstains when none fits.

    Args:
        embed: Maps texts to embeddings ``(n, d)`` by the *base* model, so that active adapters
            never move scores.
        reference: An engine's, to share its state.

    Attributes:
        refresh: Called before each selection; by it an engine follows a folder.

    Examples:
        >>> def count(texts):
        ...     return np.array([[text.count("a"), text.count("b")] for text in texts], float)
        >>> router = LoRARouter(count)
        >>> router.register_virtual_candidate("apple", "aaa")
        >>> router.select("aa", threshold=0.9)
        [Route(name='apple', score=1.0, virtual=True)]
        >>> router.select("bb", threshold=0.9)
        []
    """

    def __init__(
        self,
        embed: Callable[[Sequence[str]], Any],
        *,
        reference: StateReference[RouterState] | None = None,
    ) -> None:
        if not callable(embed):
            raise ArgumentError("embed", "a function of texts", type(embed).__name__)
        self._embed = embed
        self.refresh: Callable[[], None] = lambda: None
        self.reference = reference or StateReference(RouterState())

    def __repr__(self) -> str:
        index = self.reference.value.index
        return f"LoRARouter([{listed(index.candidates)}])"

    @property
    def candidates(self) -> Mapping[str, Candidate]:
        """The registered candidates by name: a snapshot."""
        self.refresh()
        return self.reference.value.index.candidates

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
        """Return what `register_card` would register.

        Args:
            description: Default: the metadata's ``description`` and ``examples``, whose sources
                are its ``example_groups``; these give the card thresholds of its own.
            tags: Default: the metadata's ``tags`` and ``task_type``.
        """
        check_card(card)
        meta, groups = dict(card.metadata), list[str]()
        if description is None:
            about, examples = _items(meta.get("description")), _items(meta.get("examples"))
            sources = _items(meta.get("example_groups"))
            if len(sources) == len(examples):
                groups = [*([""] * len(about)), *map(str, sources)]
            description = [*about, *examples]
        if tags is None:
            tags = [*_items(meta.get("task_type")), *_items(meta.get("tags"))]
        return self.described(card.name, description, tags=tags, groups=groups)

    def register(self, candidate: Candidate) -> None:
        """Register a candidate, in place of an earlier one of its name."""
        with self.reference.lock:
            index = self.reference.value.index.with_candidate(candidate)
            self.reference.replace(index=index)

    def register_virtual_candidate(
        self, name: str, description: Description, *, tags: Collection[str] = ()
    ) -> None:
        """Register a card whose weights are elsewhere."""
        self.register(self.described(name, description, virtual=True, tags=tags))

    def unregister(self, name: str) -> None:
        """Forget a candidate; an unknown name is no error."""
        with self.reference.lock:
            self.reference.replace(index=self.reference.value.index.without(name))

    def select(
        self,
        query: str,
        top_k: int = 1,
        threshold: float | None = None,
        *,
        tags: Collection[str] = (),
    ) -> list[Route]:
        """Return the best cards for a query, best first; see `lora.routing.select`."""
        return self.select_many([query], top_k, threshold, tags=tags)[0]

    def select_many(
        self,
        queries: Sequence[str],
        top_k: int = 1,
        threshold: float | None = None,
        *,
        tags: Collection[str] = (),
    ) -> list[list[Route]]:
        """Return the routes of each query, as `select` would give them one by one."""
        self.refresh()
        index, embedded = self.reference.value.index.tagged(tags), unit(self._embedded(queries))
        return [select(row, index, top_k=top_k, threshold=threshold) for row in embedded]

    def decide_many(
        self, queries: Sequence[str], threshold: float | None = None
    ) -> list[Decision | None]:
        """Decide for each query whether the nearest card answers; see `lora.routing.decide`."""
        self.refresh()
        index, rows = self.reference.value.index, self._embedded(queries)
        ranked = [nearest(row, index) for row in unit(rows)]
        return [decide(routes[0], index, threshold) if routes else None for routes in ranked]

    def described(
        self,
        name: str,
        description: Description,
        *,
        virtual: bool = False,
        tags: Collection[str] = (),
        groups: Sequence[str] = (),
    ) -> Candidate:
        """Return a candidate with the embeddings of its description."""
        if not isinstance(name, str) or not name:
            raise ArgumentError("candidate", "a name", shown(name))
        texts = [description] if isinstance(description, str) else texts_of(description)
        if not texts:
            raise ArgumentError(f"candidate {name!r}", "a description", "none", "pass description=")
        rows = self._embedded(texts)
        return candidate_of(name, rows, virtual=virtual, tags=tags, groups=groups)

    def _embedded(self, texts: Sequence[str]) -> Any:
        texts = texts_of(texts)
        rows = np.asarray(self._embed(texts)) if texts else np.empty((0, 0))
        if rows.ndim != 2 or len(rows) != len(texts):
            raise ShapeError("embed", f"shape ({len(texts)}, d)", f"shape {rows.shape}")
        return rows


def _items(value: Any) -> list[Any]:
    return [item for item in (value if isinstance(value, list) else [value]) if item]
