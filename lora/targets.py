"""Which modules a card adapts: names and shapes in, a binding plan out.

One rule serves targets and weight keys: a key matches a module if the module's dotted name equals
it or ends with ``"." + key``. So ``1.query`` matches ``layer.1.query`` and never
``layer.11.query``.

Requirements: R3, R7.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora.card import LoRACard, check_card
from lora.errors import ShapeError, TargetError

ALL_LINEAR = "all-linear"
"""The target that matches every Linear except an output head."""

OUTPUT_HEADS = frozenset(
    {
        "lm_head",
        "embed_out",
        "output_projection",
        "cls",
        "classifier",
        "score",
        "qa_outputs",
        "logits",
        "head",
    }
)
"""Name components that mark an output head, as the Hugging Face model families call them."""


@dataclass(frozen=True)
class Site:
    """A Linear that a card may bind to.

    Args:
        in_features, out_features: Of the Linear.
        owner: The module's first name: modules that are known by several names share it.
        head: Whether it is an output head whatever its name (its weight is tied to an embedding).
        bypassed: Whether its parent is known to read the weight without calling the module.
    """

    in_features: int
    out_features: int
    owner: str
    head: bool = False
    bypassed: bool = False


@dataclass(frozen=True)
class Injection:
    """What applying a card does, or did.

    Args:
        name: The card's.
        bound: Module name -> the card's weight key, sorted by module.
        targets_not_found: Targets that match no module.
        weights_not_used: Weight keys that bind to no targeted module.
        bypassed: Bound modules that their parent may never call, so that the adapter has no effect
            there.
    """

    name: str
    bound: Mapping[str, str]
    targets_not_found: tuple[str, ...] = ()
    weights_not_used: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()


def matches(name: str, key: str) -> bool:
    """Whether a dotted module name equals `key` or ends with ``"." + key``.

    Examples:
        >>> matches("layer.1.query", "1.query"), matches("layer.11.query", "1.query"), matches("layer.1", "")
        (True, False, False)
    """
    return name == key or name.endswith("." + key)


def match_targets(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The names that any of the targets matches, in their order.

    Examples:
        >>> match_targets(["a.query", "a.key", "lm_head"], ["all-linear"])
        ['a.query', 'a.key']
    """
    targets = set(targets)
    every = ALL_LINEAR in targets
    return [n for n in names if not targets.isdisjoint(_suffixes(n)) or (every and not _is_head(n))]


def targeted_modules(sites: Mapping[str, Site], targets: Iterable[str]) -> set[str]:
    """The first names of the modules that any of the targets matches under any of their names."""
    owners = _owners(sites)
    return set().union(
        *(owners.get(target, set()) | _all_linear(sites, target) for target in targets)
    )


def plan(sites: Mapping[str, Site], card: LoRACard, *, strict: bool = False) -> Injection:
    """Decide what a card binds to in a model, and check that it fits.

    Args:
        sites: Every name of every Linear of the model.
        card: The card.
        strict: Make it an error if a target matches no module or a weight binds to none.

    Raises:
        ShapeError: If a pair does not fit its module.
        TargetError: If a weight key fits two modules or two keys one module; with `strict`, if a
            target or a weight binds to nothing.

    Examples:
        >>> import numpy as np
        >>> from lora.card import LowRank
        >>> pair = LowRank(np.zeros((4, 1)), np.zeros((1, 4)))
        >>> card = LoRACard("docs", 1, 1.0, ["query", "value"], {"0.query": pair})
        >>> injection = plan({"layer.0.query": Site(4, 4, "layer.0.query")}, card)
        >>> injection.bound, injection.targets_not_found
        ({'layer.0.query': '0.query'}, ('value',))
    """
    check_card(card)
    owners = _owners(sites)
    targeted = {
        target: owners.get(target, set()) | _all_linear(sites, target)
        for target in card.target_modules
    }
    bound = _bind(owners, set().union(*targeted.values()), card)
    for module, key in bound.items():
        _check_shape(sites[module], module, card, key)
    injection = Injection(
        name=card.name,
        bound=bound,
        targets_not_found=tuple(target for target, modules in targeted.items() if not modules),
        weights_not_used=tuple(key for key in card.weights if key not in bound.values()),
        bypassed=tuple(module for module in bound if sites[module].bypassed),
    )
    if strict and (injection.targets_not_found or injection.weights_not_used):
        raise TargetError(
            f"card {card.name!r}",
            "every target to be found and every weight to bind (strict)",
            f"targets not found: {list(injection.targets_not_found)}, weights not used: {list(injection.weights_not_used)}",
        )
    return injection


def _suffixes(name: str) -> Iterator[str]:
    """Every key that matches `name`."""
    yield name
    for position, character in enumerate(name):
        if character == ".":
            yield name[position + 1 :]


def _owners(sites: Mapping[str, Site]) -> dict[str, set[str]]:
    """Key -> the first names of all modules that it matches under any of their names."""
    found: dict[str, set[str]] = {}
    for name, site in sites.items():
        for key in _suffixes(name):
            found.setdefault(key, set()).add(site.owner)
    return found


def _all_linear(sites: Mapping[str, Site], target: str) -> set[str]:
    """What `target` matches beyond names: every Linear but the output heads, if it says so."""
    if target != ALL_LINEAR:
        return set()
    return {site.owner for name, site in sites.items() if not site.head and not _is_head(name)}


def _is_head(name: str) -> bool:
    return not OUTPUT_HEADS.isdisjoint(name.split("."))


def _bind(owners: Mapping[str, set[str]], targeted: set[str], card: LoRACard) -> dict[str, str]:
    """Targeted module -> the one weight key that matches it."""
    bound: dict[str, str] = {}
    for key in sorted(card.weights):
        modules = sorted(owners.get(key, set()) & targeted)
        if len(modules) > 1:
            raise TargetError(
                f"card {card.name!r}: weight {key!r}", "one module that it fits", modules
            )
        for module in modules:
            if module in bound:
                keys = [bound[module], key]
                raise TargetError(
                    f"card {card.name!r}: module {module!r}", "one weight that fits it", keys
                )
            bound[module] = key
    return dict(sorted(bound.items()))


def _check_shape(site: Site, module: str, card: LoRACard, key: str) -> None:
    pair = card.weights[key]
    if (pair.in_features, pair.out_features) != (site.in_features, site.out_features):
        raise ShapeError(
            f"card {card.name!r}: module {module!r}",
            f"in -> out of {site.in_features} -> {site.out_features}",
            f"{pair.in_features} -> {pair.out_features}",
        )


def fingerprint_of(weights: Iterable[tuple[str, str, tuple[int, ...], Any]]) -> str:
    """Return the SHA-256 of a base model's weights, over sorted key, dtype, shape and bytes.

    Args:
        weights: (card's key, name of the dtype, shape, buffer with the bytes) of each weight, sorted
            by key. They are read one at a time, so that only one needs to be in memory.
    """
    sha = hashlib.sha256()
    for key, dtype, shape, data in weights:
        sha.update(f"{key}\0{dtype}\0{shape}\0".encode(errors="surrogatepass"))
        sha.update(data)
    return sha.hexdigest()
