"""What a binding does within a member, as it declares in ``domains``.

`check_domains` refuses what is not in the vocabulary, the strategies of the suite draw within the
domains where they can (`limit`), and a call outside of them raises `Lacks` in place of being made
(`within`): a property that has no other example is skipped.

Requirements: R24.11, R24.12.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lora.card import DTYPES, Array
from lora.errors import ArgumentError, LoRAError, shown
from lora.merging import STRATEGIES
from lora.testing import folder_of
from lora.testing.binding import Binding, Lacks, PlainCard, PlainPair, Term

RULES = ("rank", "energy", "error")
SIMPLEST_FILE = "vectors/1/R1.4/valid/basic.lora.arrow"


def _are(values: Any, known: Collection[str]) -> bool:
    return bool(values) and isinstance(values, list | tuple) and set(values) <= set(known)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are_strategies(value: Any) -> bool:
    for name, options in value.items():
        for option, values in options.items():
            if not [STRATEGIES[name](**{option: each}) for each in values]:
                return False
    return bool(value) and set(value) <= set(STRATEGIES)


VOCABULARY: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "forward": {
        "dtypes": (f"a list of {', '.join(DTYPES)}", lambda value: _are(value, DTYPES)),
        "terms": ("the largest number of adapters in a layer", _is_count),
        "dimensions": ("the least number of dimensions of x", _is_count),
        "scaling": ("'nonzero'", lambda value: value == "nonzero"),
    },
    "extract": {"rules": (f"a list of {', '.join(RULES)}", lambda value: _are(value, RULES))},
    "merge": {
        "strategies": ("a map of strategies to maps of options to lists", _are_strategies),
        "cards": ("'alike'", lambda value: value == "alike"),
    },
    "make_router": {
        "lengths": (
            "the least and the largest length of a vector",
            lambda value: len(value) == 2 and 0 <= value[0] < value[1],
        )
    },
}
"""What a binding may declare for a member: what is expected there, and whether a value is that."""

DECLARED: dict[str, Mapping[str, Any]] = {}
"""The domains of the binding under test."""


def limit(member: str, name: str, otherwise: Any) -> Any:
    """Return what the binding under test declares in a domain, or something else."""
    return DECLARED.get(member, {}).get(name, otherwise)


def check_domains(domains: Any, where: str) -> None:
    """Refuse domains that are unknown, or that have another value."""
    for member, limits in _items(domains, where):
        if member not in VOCABULARY:
            raise ArgumentError(where, f"one of {', '.join(VOCABULARY)}", shown(member))
        for name, value in _items(limits, f"{where}: {member}"):
            if name not in VOCABULARY[member]:
                expected = f"one of {', '.join(VOCABULARY[member])}"
                raise ArgumentError(f"{where}: {member}", expected, shown(name))
            expected, is_one = VOCABULARY[member][name]
            try:
                is_known = is_one(value)
            except (AttributeError, KeyError, TypeError, LoRAError):
                is_known = False
            if not is_known:
                raise ArgumentError(f"{where}: {member}: {name}", expected, shown(value))


def _items(value: Any, where: str) -> Collection[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        raise ArgumentError(where, "a map", shown(value))
    return value.items()


def within(
    member: str, function: Callable[..., Any], limits: Mapping[str, Any]
) -> Callable[..., Any]:
    """Return a member that raises `Lacks` for calls that lie outside of its limits."""
    signature = inspect.signature(getattr(Binding, member))

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(None, *args, **kwargs).arguments
        for reason in OUTSIDE[member](limits, arguments):
            raise Lacks(f"{member} is declared without {reason}")
        if "lengths" in limits:
            return function(_measured(arguments["embed"], *limits["lengths"]))
        return function(*args, **kwargs)

    return call


def _outside_forward(limits: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[str]:
    dtype, terms = call["x"].dtype.name, call["terms"].values()
    if dtype not in limits.get("dtypes", [dtype]):
        yield dtype
    if len(terms) > limits.get("terms", len(terms)):
        yield f"{len(terms)} adapters in a layer"
    if call["x"].ndim < limits.get("dimensions", 0):
        yield f"x of {call['x'].ndim} dimensions"
    if "scaling" in limits and any(term.scaling == 0 for term in terms):
        yield "a scaling of 0"


def _outside_extract(limits: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[str]:
    for rule in RULES:
        if call[rule] is not None and rule not in limits["rules"]:
            yield f"a rank by {rule}"


def _outside_merge(limits: Mapping[str, Any], call: Mapping[str, Any]) -> Iterator[str]:
    strategy, cards = call["strategy"], call["cards"]
    yield from _outside_strategies(limits.get("strategies"), strategy, call["options"])
    kinds = {
        tuple(sorted((m, a.dtype.name, a.shape[1], s) for m, (a, _, s) in card.weights.items()))
        for card in cards
    }
    if "cards" in limits and max(len(kinds), 1 + len(cards) - len({c.name for c in cards})) > 1:
        yield "cards of one name, or of other modules, dtypes, ranks or scalings"


def _outside_strategies(
    strategies: Mapping[str, Any] | None, strategy: str, options: Mapping[str, Any]
) -> Iterator[str]:
    try:
        complete = asdict(STRATEGIES[strategy](**options))
    except (LoRAError, KeyError, TypeError):
        return  # no strategy or option of any implementation: to be refused
    if strategies is None:
        return
    if strategy not in strategies:
        yield strategy
    for option, values in strategies.get(strategy, {}).items():
        if complete[option] not in values:
            yield f"{strategy} with {option} = {complete[option]!r}"


OUTSIDE: dict[str, Callable[..., Iterator[str]]] = {
    "forward": _outside_forward,
    "extract": _outside_extract,
    "merge": _outside_merge,
    "make_router": lambda *_: iter(()),
}
"""For each member with domains, the reasons why a call lies outside of its limits."""


def smoke(binding: Any, member: str, function: Callable[..., Any]) -> None:
    """Call a member of a binding with the simplest legal input that lies within its domains."""
    limits = getattr(binding, "domains", {}).get(member, {})
    dtype = DTYPES[limits.get("dtypes", ["float32"])[0]]
    x, one = np.ones((1,) * limits.get("dimensions", 2), dtype), np.ones((1, 1), dtype)
    pairs = {"query": PlainPair(one, one, 1.0)}
    cards = [PlainCard(name, 1, 1.0, ("query",), pairs, {}, {}) for name in ("docs", "law")]
    ((strategy, options), *_) = limits.get("strategies", {"average": {}}).items()
    rule = limits.get("rules", RULES)[0]
    rules = [
        {"rank": 1, "energy": 1.0, "error": 0.0}[name] if name == rule else None for name in RULES
    ]
    least, largest = limits.get("lengths", (1.0, 1.0))
    vector = [min(max(1.0, least), largest)]
    data = (folder_of("spec") / SIMPLEST_FILE).read_bytes()
    if member == "read_card" and hasattr(binding, "write_card"):
        data = binding.write_card(cards[0])  # another format is wrong, but not broken
    calls: dict[str, tuple[Any, ...]] = {
        "write_card": (cards[0],),
        "read_card": (data,),
        "forward": (x, one, None, {"docs": Term(one, one, 1.0, 1.0)}),
        "match_targets": (["query"], ["query"]),
        "bind": (cards[0], {"query": (1, 1)}),
        "extract": ({"query.weight": 0 * one}, {"query.weight": one}, *rules),
        "merge": (
            cards,
            strategy,
            {name: values[0] for name, values in options.items()},
            None,
            None,
        ),
        "make_router": (lambda texts: np.array([vector for _ in texts]),),
    }
    answer = function(*calls[member])
    if member == "make_router":
        answer.register("docs", ["a text"])
        answer.select("a text", 1, None)


def has_length(vector: Any, least: float, largest: float) -> bool:
    """Whether a vector is so long."""
    wide = np.array(vector, np.longdouble)  # no square overflows
    return bool(least <= np.sqrt((wide * wide).sum()) <= largest)


def _measured(embed: Callable[..., Array], least: float, largest: float) -> Callable[..., Array]:
    def measured(texts: Sequence[str]) -> Array:
        rows = embed(texts)
        if not all(has_length(row, least, largest) for row in rows):
            raise Lacks(f"make_router is declared for vectors of lengths {least:g} to {largest:g}")
        return rows

    return measured
