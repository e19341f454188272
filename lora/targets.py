"""Which modules a card adapts: from the names and shapes of a model's Linears to a binding plan.

A target or weight key matches a module whose dotted name equals it or ends with ``"." + key``:
``1.query`` matches ``layer.1.query`` but not ``layer.11.query``. `plan` reports what a card binds
to. A card whose keys begin otherwise than the model's names, because it was made for a model with
a head, or without a wrapper, binds with one other leading part for all its keys.

Requirements: R3, R7.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lora.card import LoRACard, LowRank, check_card
from lora.errors import BaseModelError, ShapeError, TargetError

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
"""Name components that mark an output head in the Hugging Face model families."""


@dataclass(frozen=True)
class Site:
    """A Linear that a card may bind to.

    Args:
        owner: The first of the module's names.
        head: Whether its weight is tied to an embedding, which makes it an output head.
        bypassed: Whether a forward may not call it, though its parent may read the weight.
        unused: Whether the model itself says that its forward leaves the Linear out.
    """

    in_features: int
    out_features: int
    owner: str
    head: bool = False
    bypassed: bool = False
    unused: bool = False


@dataclass(frozen=True)
class Injection:
    """Which modules a card adapts, and what found no place.

    Args:
        bound: The weight key of each bound module, sorted by module.
        targets_not_found: Targets that match no module.
        weights_not_used: Weight keys that bind to no targeted module.
        without_factors: Modules that a target matches and for which the card has no factors.
        bypassed: Bound modules that a forward may never call; `lora.uncalled` tells.
        leading: The leading part of all weight keys, and the one that the modules' names have in
            its place, such as ``("model.", "language_model.")``; None if keys bind as they are.
        folded_bytes: Bytes of fused experts, of which the adapted model has folded copies.

    Examples:
        >>> Injection("docs", {"layer.0.query": "query"}, ("gate",)).unbound
        "targets not found: 'gate'"
    """

    name: str
    bound: Mapping[str, str]
    targets_not_found: tuple[str, ...] = ()
    weights_not_used: tuple[str, ...] = ()
    without_factors: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    leading: tuple[str, str] | None = None
    folded_bytes: int = 0

    @property
    def unbound(self) -> str:
        """What the card names and the model lacks, as text; empty if there is nothing."""
        targets, weights = self.targets_not_found, self.weights_not_used
        parts = ("targets not found", targets), ("weights not used", weights)
        return "; ".join(f"{what}: {listed(names)}" for what, names in parts if names)


def matches(name: str, key: str) -> bool:
    """Tell whether a dotted module name equals `key` or ends with ``"." + key``.

    Examples:
        >>> matches("layer.1.query", "1.query"), matches("layer.11.query", "1.query")
        (True, False)
    """
    return name == key or name.endswith("." + key)


def match_targets(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Return the names that any of the targets matches, in their order.

    Examples:
        >>> match_targets(["a.query", "a.key", "lm_head"], ["all-linear"])
        ['a.query', 'a.key']
    """
    targets = set(targets)
    return [name for name in names if _is_targeted(name, targets)]


def targeted_modules(sites: Mapping[str, Site], targets: Iterable[str]) -> set[str]:
    """Return the first names of the modules that a target matches under any of their names."""
    targets = set(targets)
    return {site.owner for name, site in sites.items() if _is_targeted(name, targets, site.head)}


def plan(sites: Mapping[str, Site], card: LoRACard, *, strict: bool = False) -> Injection:
    """Decide what a card binds to in a model, and check that it fits.

    Args:
        sites: The Linears of the model, under each of their names.
        strict: Refuse targets and weights without a module.

    Raises:
        ShapeError: A pair does not fit its module.
        TargetError: A weight fits two modules, two weights fit one, or several leading parts bind
            all weights.

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
    where = f"card {card.name!r}"
    targets = {target: target for target in card.target_modules}
    targeted, owners = targeted_modules(sites, targets), dict[str, set[str]]()
    for name, site in sites.items():
        for key in suffixes(name):
            owners.setdefault(key, set()).add(site.owner)
    bound: dict[str, str] = {}
    for key in card.weights:
        modules = sorted(owners.get(key, set()) & targeted)
        if len(modules) > 1:
            raise TargetError(f"{where}: weight {key!r}", "one module that it fits", modules)
        for module in modules:
            if module in bound:
                keys = [bound[module], key]
                raise TargetError(f"{where}: module {module!r}", "one weight that fits it", keys)
            bound[module] = key
    leading = None
    if owners.keys().isdisjoint(card.weights) and (change := _change(sites, card)):
        leading, bound = change
        targets = {target: _changed(target, leading) for target in targets}
        targeted = targeted_modules(sites, targets.values())
    bound = dict(sorted(bound.items()))
    for module, key in bound.items():
        check_shape(sites[module], card.weights[key], f"{where}: module {module!r}")
    injection = Injection(
        name=card.name,
        bound=bound,
        targets_not_found=tuple(
            target
            for target, name in targets.items()
            if name not in owners and not targeted_modules(sites, [name])
        ),
        weights_not_used=tuple(key for key in card.weights if key not in bound.values()),
        without_factors=tuple(sorted(targeted - bound.keys())),
        bypassed=tuple(module for module in bound if sites[module].bypassed),
        leading=leading,
    )
    if strict and injection.unbound:
        expected = "every target to be found and every weight to bind (strict)"
        raise TargetError(where, expected, injection.unbound)
    return injection


def _change(
    sites: Mapping[str, Site], card: LoRACard
) -> tuple[tuple[str, str], dict[str, str]] | None:
    """Find the one other leading part with which all weight keys are names of targeted modules.

    Of the leading parts that all keys share, the shortest that can be replaced is taken, if
    possible by one with which the shapes fit. Returns the old and the new part, and each module's
    key.
    """
    first = next(iter(card.weights), "")
    for rest in suffixes(first)[1:]:
        old = first.removesuffix(rest)
        if not all(key.startswith(old) for key in card.weights):
            break
        changes: dict[tuple[tuple[str, str], ...], tuple[str, str]] = {}
        for name in sites:
            leading = old, name.removesuffix(rest)
            if matches(name, rest) and (keys := _bound_with(leading, sites, card)):
                changes.setdefault(tuple(keys.items()), leading)
        fitting = {
            bound: leading
            for bound, leading in changes.items()
            if all(_shape(sites[module]) == _shape(card.weights[key]) for module, key in bound)
        }
        changes = fitting or changes
        if len(changes) > 1:
            where = f"card {card.name!r}: weights {old}*"
            expected = f"one leading part in place of {old!r} with which all bind"
            raise TargetError(where, expected, listed(new for _, new in changes.values()))
        for bound, leading in changes.items():
            return leading, dict(bound)
    return None


def _bound_with(
    leading: tuple[str, str], sites: Mapping[str, Site], card: LoRACard
) -> dict[str, str]:
    """Return the weight key of each module if all keys bind with another leading part, else none.

    No number takes the place of another one, because numbers tell layers apart.
    """
    old, new = ([part for part in text.split(".") if part.isdecimal()] for text in leading)
    names = {_changed(key, leading): key for key in card.weights}
    if (old and new and old != new) or not names.keys() <= sites.keys():
        return {}
    bound = {sites[name].owner: key for name, key in names.items()}
    targets = [_changed(target, leading) for target in card.target_modules]
    is_bound = len(bound) == len(names) and bound.keys() <= targeted_modules(sites, targets)
    return bound if is_bound else {}


def _changed(name: str, leading: tuple[str, str]) -> str:
    old, new = leading
    return new + name.removeprefix(old) if name.startswith(old) else name


def check_shape(linear: Any, pair: LowRank, where: str) -> None:
    """Refuse a pair whose features are not those of a Linear, or of its `Site`."""
    expected, actual = _shape(linear), _shape(pair)
    if actual != expected:
        raise ShapeError(where, f"in -> out of {expected}", actual)


def _shape(linear: Any) -> str:
    return f"{linear.in_features} -> {linear.out_features}"


def listed(names: Iterable[str], limit: int = 10) -> str:
    """Return names as text, at most `limit` of them.

    Examples:
        >>> listed(["a", "b", "c"], limit=2), listed([])
        ("'a', 'b' and 1 more", 'none')
    """
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more or "none"


def require_bound(sites: Mapping[str, Site], card: LoRACard, injection: Injection) -> None:
    """Refuse a card that binds to no module."""
    if injection.bound:
        return
    keys, targets = listed(card.weights, 3), listed(card.target_modules, 3)
    raise TargetError(
        f"card {card.name!r}",
        "a Linear of the model for at least one of the card's modules",
        f"none (factors for {keys}; targets {targets})",
        f"the Linears of the model are {listed(sites, 3)}: the card may be for another one",
    )


def check_fingerprint(card: LoRACard, injection: Injection, fingerprint: str) -> None:
    """Refuse a card that was made for other weights, or whose weights can't all be compared."""
    if fingerprint == card.base_fingerprint:
        return
    where = f"card {card.name!r}"
    if missing := injection.weights_not_used:
        hint = f"check_base=False adapts the other {len(injection.bound)}, with the base unchecked"
        raise not_all_bound(card, missing, hint)
    where = f"{where}: base model {card.base_model or ''}".rstrip()
    expected = f"weights with fingerprint {card.base_fingerprint}"
    raise BaseModelError(where, expected, fingerprint, "check_base=False waives this")


def not_all_bound(card: LoRACard, missing: Sequence[str], hint: str = "") -> TargetError:
    """Return the error of a card of which some modules have no weights to compare."""
    return TargetError(
        f"card {card.name!r}",
        f"a targeted Linear for each of its {len(card.weights)} modules, because its base "
        "fingerprint is made from all of them",
        f"none for {len(missing)}: {listed(missing)}",
        hint,
    )


def fingerprint_of(weights: Iterable[tuple[str, str, tuple[int, ...], Iterable[Any]]]) -> str:
    """Return the SHA-256 of a base model's weights, over sorted key, dtype, shape and bytes.

    Args:
        weights: (key, name of the dtype, shape, buffers with the bytes) of each weight, sorted by
            key. Only one buffer at a time needs to be in memory.
    """
    sha = hashlib.sha256()
    for key, dtype, shape, buffers in weights:
        sha.update(f"{key}\0{dtype}\0{shape}\0".encode(errors="surrogatepass"))
        for data in buffers:
            sha.update(data)
    return sha.hexdigest()


@lru_cache(4096)
def suffixes(name: str) -> tuple[str, ...]:
    """Return every key that matches a module, longest first: its dotted suffixes."""
    parts = name.split(".")
    return tuple([".".join(parts[start:]) for start in range(len(parts))])


def _is_targeted(name: str, targets: set[str], head: bool = False) -> bool:  # noqa: FBT001, FBT002
    head = head or not OUTPUT_HEADS.isdisjoint(name.split("."))
    return not targets.isdisjoint(suffixes(name)) or (ALL_LINEAR in targets and not head)
