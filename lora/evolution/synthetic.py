"""Synthetic pairs for the five task presets: seeded, and every answer is worked out from its
question.

Each task is a small grammar. A question is drawn from a few slots; its answer is a function of the
same slots, so that whoever knows the rule can answer a question never seen before, and a model can
learn it. It is a means to try things out, not a benchmark of a skill: the real data are
`lora.evolution.data.docstring_pairs`.

Requirements: R21.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from lora.errors import ArgumentError, shown
from lora.evolution.data import Pairs

Slots = Mapping[str, str]

_THINGS = (
    "user",
    "invoice",
    "token",
    "sensor",
    "ticket",
    "parcel",
    "recipe",
    "lease",
    "badge",
    "ledger",
    "route",
    "poll",
)
_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "thing": _THINGS,
        "field": (
            "name",
            "date",
            "price",
            "owner",
            "colour",
            "status",
            "height",
            "region",
            "length",
            "priority",
        ),
        "verb": ("sort", "count", "filter", "group", "rank", "merge"),
        "measure": ("latency", "yield", "error", "cost", "recall", "noise", "traffic", "growth"),
        "cause": ("cache", "index", "batch", "rank", "filter", "dropout", "schedule", "prompt"),
        "way": ("rose", "fell"),
        "sink": ("query", "shell", "path", "page", "template"),
        "need": ("order", "replay", "isolation", "locality", "failover", "audit"),
        "fault": ("unused", "shadowed", "mutable", "unchecked", "untyped"),
    }
)
_CODE = {
    "sort": "sorted({thing}s, key=lambda {thing}: {thing}.{field})",
    "count": "Counter({thing}.{field} for {thing} in {thing}s)",
    "filter": "[{thing} for {thing} in {thing}s if {thing}.{field}]",
    "group": "groupby({thing}s, key=attrgetter('{field}'))",
    "rank": "nlargest(len({thing}s), {thing}s, key=attrgetter('{field}'))",
    "merge": "{{{thing}.{field}: {thing} for {thing} in {thing}s}}",
}
_FINDING = {
    "rose": "more {measure} with {cause}: leave {cause} out",
    "fell": "less {measure} with {cause}: keep {cause}",
}
_WEAKNESS = {
    "query": "SQL injection through {thing}.{field}: bind it as a parameter",
    "shell": "command injection through {thing}.{field}: pass a list of arguments",
    "path": "path traversal through {thing}.{field}: resolve and check the folder",
    "page": "cross-site scripting through {thing}.{field}: escape it",
    "template": "template injection through {thing}.{field}: render it as data",
}
_PATTERN = {
    "order": "a queue with one partition per {thing} {field}",
    "replay": "event sourcing of {thing} {field}",
    "isolation": "a bulkhead around {thing} {field}",
    "locality": "shards by {thing} {field}",
    "failover": "a replica set of {thing} {field}",
    "audit": "an append-only log of {thing} {field}",
}
_REMARK = {
    "unused": "{thing}_{field} is never read: delete it",
    "shadowed": "{thing}_{field} hides an outer name: rename it",
    "mutable": "{thing}_{field} is a mutable default: use None",
    "unchecked": "{thing}_{field} may be None here: check it first",
    "untyped": "{thing}_{field} has no annotation: say its type",
}

_Task = tuple[str, Callable[[Slots], str]]

_TASKS: Mapping[str, _Task] = MappingProxyType(
    {
        "coder": ("{verb} the {thing}s by {field}", lambda s: _CODE[s["verb"]]),
        "researcher": (
            "{measure} {way} in the {thing} runs with {cause}",
            lambda s: f"{{thing}}: {_FINDING[s['way']]}",
        ),
        "security": (
            "{thing}.{field} reaches the {sink} as it came",
            lambda s: _WEAKNESS[s["sink"]],
        ),
        "architect": ("{need} for every {field} of a {thing}", lambda s: _PATTERN[s["need"]]),
        "reviewer": ("in this change {thing}_{field} is {fault}", lambda s: _REMARK[s["fault"]]),
    }
)

TASKS = tuple(_TASKS)
"""The tasks, by the names of their presets."""


def synthetic_pairs(task: str, count: int, *, seed: int = 0) -> Pairs:
    """Pairs of a task, all different.

    Args:
        task: One of `TASKS`.
        count: How many, >= 1; a task has some hundreds.
        seed: Of the draw; the same seed gives the same pairs, and fewer of them the first ones.

    Returns:
        Grouped by what they are about, so that a split by group asks about things never trained on.

    Raises:
        ArgumentError: If the task is unknown, or has not so many pairs.

    Examples:
        >>> pairs = synthetic_pairs("security", 2, seed=1)
        >>> len(pairs), len(set(pairs.queries)), len(set(pairs.positives))
        (2, 2, 2)
    """
    if task not in _TASKS:
        raise ArgumentError("task", f"one of {', '.join(TASKS)}", shown(task))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError("seed", "an integer >= 0", shown(seed))
    every = _every(task)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(every):
        raise ArgumentError(
            f"count of {task} pairs", f"an integer from 1 to {len(every)}", shown(count)
        )
    drawn = np.random.default_rng(seed).permutation(len(every))[:count]
    question, rule = _TASKS[task]
    chosen = [every[int(index)] for index in drawn]
    rows = [
        (question.format_map(slots), rule(slots).format_map(slots), slots["thing"])
        for slots in chosen
    ]
    return Pairs.of(
        {"query": query, "positive": answer, "group": thing} for query, answer, thing in rows
    )


def _every(task: str) -> list[Slots]:
    """All ways to fill the slots of a task's question."""
    question, _ = _TASKS[task]
    filled: list[dict[str, str]] = [{}]
    for slot, words in _WORDS.items():
        if f"{{{slot}}}" in question:
            filled = [{**slots, slot: word} for slots in filled for word in words]
    return list(filled)
