"""What an implementation must offer to be tested: a handful of functions over plain values.

Only NumPy arrays (in any memory order), bytes, strings, numbers and mappings of them are passed, so
that an implementation may be written in any language.

Requirements: R24.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lora.testing.serve import Array, Lacks, PlainCard, PlainPair, Term

__all__ = ["Array", "Binding", "Lacks", "PlainCard", "PlainPair", "Router", "Term"]


class Router(Protocol):
    """A register of candidates."""

    def register(self, name: str, texts: Sequence[str], *, virtual: bool = False) -> None:
        """Put a candidate in place of any of its name."""
        ...

    def unregister(self, name: str) -> None:
        """Forget a candidate; an unknown name is no error."""
        ...

    def select(self, query: str, top_k: int, threshold: float | None) -> list[tuple[str, float]]:
        """Names and scores, best first."""
        ...

    def select_many(
        self, queries: Sequence[str], top_k: int, threshold: float | None
    ) -> list[list[tuple[str, float]]]:
        """As `select`, for each query."""
        ...


class Binding(Protocol):
    """An implementation under test. Any exception counts as a refusal.

    Three attributes may say what it does not do. ``missing`` maps members that it lacks to the
    reason, ``domains`` members to the limits of what they offer, in the words of
    `lora.testing.domains`, and ``expected_failures`` a requirement to its properties that fail,
    each with a reason and the place in the source: ``{"R3.11": {"test_r03_manager.py::test_…": ("it
    knows no all-linear", "targets.py: match")}}``. For other requirements such a property still
    fails.

    Examples:
        >>> from lora.testing.reference import Reference  # this package's own
        >>> Reference().match_targets(["layer.0.query", "layer.0.key"], ["query"])
        ['layer.0.query']
    """

    name: str
    version: str

    def write_card(self, card: PlainCard) -> bytes:
        """The card's file."""
        ...

    def read_card(self, data: bytes) -> PlainCard:
        """The card in a file, every scaling resolved."""
        ...

    def forward(
        self, x: Array, weight: Array, bias: Array | None, terms: Mapping[str, Term]
    ) -> Array:
        """Output ``(..., out)`` of a Linear with these terms for x ``(..., in)``, of one dtype."""
        ...

    def match_targets(self, names: Sequence[str], targets: Sequence[str]) -> list[str]:
        """The module names that a card with these targets adapts."""
        ...

    def bind(self, card: PlainCard, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """Module -> weight key, for Linears of these ``(in, out)``; refuses what does not fit."""
        ...

    def extract(
        self,
        base: Mapping[str, Array],
        tuned: Mapping[str, Array],
        rank: int | None,
        energy: float | None,
        error: float | None,
    ) -> PlainCard:
        """Card for all Linears that differ; their weights have the key "<module>.weight".

        Exactly one of three rank rules is not None. Per module, `energy` is the least share of
        ΔW's squares to keep, `error` the largest relative Frobenius error.
        """
        ...

    def make_router(self, embed: Callable[[Sequence[str]], Array]) -> Router:
        """An empty router over an embedding function."""
        ...

    def merge(
        self,
        cards: Sequence[PlainCard],
        strategy: str,
        options: Mapping[str, Any],
        weights: Sequence[float] | None,
        rank: int | None,
    ) -> PlainCard:
        """One card merged from several.

        `strategy` is "average", "weighted" (option normalize), "slerp" (t), "ties" (density,
        elect), "dare" (density, seed), "task_arithmetic" or "cat". Without a rank the merge is
        exact; for ties and dare each module gets the largest rank of its parents.
        """
        ...
