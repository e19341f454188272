"""Synthetic pairs for the five task presets, to try things out.

A question is drawn by filling a few slots, and its answer is a function of the same slots. So a
model can learn the rule. For real data see `lora.training.data.docstring_pairs`.

Requirements: R21.
"""

from collections.abc import Mapping
from itertools import product
from types import MappingProxyType

import numpy as np

from lora.checks import integer
from lora.errors import ArgumentError, shown
from lora.training.data import Pairs

_WORDS = {
    "thing": "user invoice token sensor ticket parcel recipe lease badge ledger route poll",
    "field": "name date price owner colour status height region length priority",
    "verb": "sort count filter group rank merge",
    "measure": "latency yield error cost recall noise traffic growth",
    "cause": "cache index batch rank filter dropout schedule prompt",
    "way": "rose fell",
    "sink": "query shell path page template",
    "need": "order replay isolation locality failover audit",
    "fault": "unused shadowed mutable unchecked untyped",
}
"""The words that may fill each slot."""

_Task = tuple[str, str, Mapping[str, str]]
"""The question, the slot that decides on the answer, and the answer for each word in that slot."""

_TASKS: Mapping[str, _Task] = MappingProxyType(
    {
        "coder": (
            "{verb} the {thing}s by {field}",
            "verb",
            {
                "sort": "sorted({thing}s, key=lambda {thing}: {thing}.{field})",
                "count": "Counter({thing}.{field} for {thing} in {thing}s)",
                "filter": "[{thing} for {thing} in {thing}s if {thing}.{field}]",
                "group": "groupby({thing}s, key=attrgetter('{field}'))",
                "rank": "nlargest(len({thing}s), {thing}s, key=attrgetter('{field}'))",
                "merge": "{{{thing}.{field}: {thing} for {thing} in {thing}s}}",
            },
        ),
        "researcher": (
            "{measure} {way} in the {thing} runs with {cause}",
            "way",
            {
                "rose": "{thing}: more {measure} with {cause}: leave {cause} out",
                "fell": "{thing}: less {measure} with {cause}: keep {cause}",
            },
        ),
        "security": (
            "{thing}.{field} reaches the {sink} as it came",
            "sink",
            {
                "query": "SQL injection through {thing}.{field}: bind it as a parameter",
                "shell": "command injection through {thing}.{field}: pass a list of arguments",
                "path": "path traversal through {thing}.{field}: resolve and check the folder",
                "page": "cross-site scripting through {thing}.{field}: escape it",
                "template": "template injection through {thing}.{field}: render it as data",
            },
        ),
        "architect": (
            "{need} for every {field} of a {thing}",
            "need",
            {
                "order": "a queue with one partition per {thing} {field}",
                "replay": "event sourcing of {thing} {field}",
                "isolation": "a bulkhead around {thing} {field}",
                "locality": "shards by {thing} {field}",
                "failover": "a replica set of {thing} {field}",
                "audit": "an append-only log of {thing} {field}",
            },
        ),
        "reviewer": (
            "in this change {thing}_{field} is {fault}",
            "fault",
            {
                "unused": "{thing}_{field} is never read: delete it",
                "shadowed": "{thing}_{field} hides an outer name: rename it",
                "mutable": "{thing}_{field} is a mutable default: use None",
                "unchecked": "{thing}_{field} may be None here: check it first",
                "untyped": "{thing}_{field} has no annotation: say its type",
            },
        ),
    }
)

TASKS = tuple(_TASKS)
"""The tasks, by the names of their presets."""


def synthetic_pairs(task: str, count: int, *, seed: int = 0) -> Pairs:
    """Draw different pairs of a task, grouped by the thing that they are about.

    The seed decides the pairs and their order: fewer pairs are the beginning of more.

    Examples:
        >>> pairs = synthetic_pairs("security", 2, seed=1)
        >>> len(pairs), len(set(pairs.queries)), len(set(pairs.positives))
        (2, 2, 2)
    """
    if task not in _TASKS:
        raise ArgumentError("task", f"one of {', '.join(TASKS)}", shown(task))
    question, deciding, answers = _TASKS[task]
    slots = [slot for slot in _WORDS if f"{{{slot}}}" in question]
    fillings = list(product(*(_WORDS[slot].split() for slot in slots)))
    order = np.random.default_rng(integer(seed, "seed", 0)).permutation(len(fillings))
    if integer(count, f"count of {task} pairs", 1) > len(order):
        raise ArgumentError(f"count of {task} pairs", f"at most {len(order)}", count)
    rows = []
    for index in order[:count]:
        words = dict(zip(slots, fillings[index], strict=True))
        answer = answers[words[deciding]].format_map(words)
        query = question.format_map(words)
        rows.append({"query": query, "positive": answer, "group": words["thing"]})
    return Pairs.of(rows)
