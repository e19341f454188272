"""LoRAManager: which cards are active on one model, as a reference to an immutable state that is
replaced.

Thread safety: one writer at a time (a lock holds the others back) and any number of readers. A
reader takes `model` or `state` once and keeps a snapshot that never changes.

Requirements: R3, R7, R8, R22.
"""

import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Generic, TypeVar

from torch import nn

from lora.card import Adapters, AdapterSet, LoRACard, check_card
from lora.errors import ConflictError, StateError, UnknownCardError
from lora.rewrite import adapt, check_fingerprint, check_module, fold, folded_bytes, injections
from lora.store import PathLike, load
from lora.targets import Injection

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

HISTORY = 8
"""Sets that `rollback` can go back through after a swap."""


@dataclass(frozen=True)
class Active(Generic[M]):
    """One adapter set, what it is bound to, and the model that runs it."""

    adapters: AdapterSet
    injections: Mapping[str, Injection]
    model: M


@dataclass(frozen=True)
class State(Generic[M]):
    """All that a manager knows: what runs, what is prepared, what ran before the last swaps, what
    is loaded.
    """

    active: Active[M]
    prepared: Active[M] | None = None
    earlier: tuple[Active[M], ...] = ()
    loaded: Mapping[str, LoRACard] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def cards(self) -> dict[str, LoRACard]:
        """Every card known, loaded or active, by name."""
        active = {name: card for name, (card, _) in self.active.adapters.items()}
        return dict(sorted({**self.loaded, **active}.items()))


class LoRAManager(Generic[M]):
    """Loads cards and decides which are active on a model, which itself is never changed.

    Every change plans, validates and builds the new model first and then replaces one reference: a
    failure of any kind leaves the manager as it was.

    Args:
        model: The base model.
        fold: Run float32/64 layers as plain Linears holding ``W + ΔW``: no overhead, at the memory
            of the touched weights.
        fold_budget: Bytes of touched weights above which a set is not folded; None for no limit.

    Examples:
        >>> import numpy as np
        >>> from lora.card import LowRank
        >>> base = nn.Sequential(nn.Linear(2, 2))
        >>> manager = LoRAManager(base)
        >>> card = LoRACard("docs", 1, 1.0, ["0"], {"0": LowRank(np.ones((2, 1)), np.ones((1, 2)))})
        >>> dict(manager.apply_card(card).bound)
        {'0': '0'}
        >>> manager.remove_card("docs")
        >>> manager.model is base
        True
    """

    def __init__(self, model: M, *, fold: bool = False, fold_budget: int | None = None) -> None:
        check_module(model)
        self._fold, self._fold_budget = fold, math.inf if fold_budget is None else fold_budget
        self._base = Active(AdapterSet(), MappingProxyType({}), model)
        self._state: State[M] = State(self._base)
        self._write = threading.RLock()

    @property
    def state(self) -> State[M]:
        """The present state: a snapshot."""
        return self._state

    @property
    def base(self) -> M:
        """The caller's model."""
        return self._base.model

    @property
    def model(self) -> M:
        """What runs now; the caller's own model while no card is active."""
        return self._state.active.model

    @property
    def active(self) -> AdapterSet:
        """The active cards with their weights."""
        return self._state.active.adapters

    @property
    def injected(self) -> dict[str, tuple[str, ...]]:
        """Module -> names of the cards that are active on it, sorted."""
        layers: dict[str, tuple[str, ...]] = {}
        for name, injection in self._state.active.injections.items():
            for module in injection.bound:
                layers[module] = (*layers.get(module, ()), name)
        return dict(sorted(layers.items()))

    def list_cards(self) -> dict[str, LoRACard]:
        """Every card known here, loaded or active, by name."""
        return self._state.cards

    def load_card(self, path: PathLike, *, verify: str | None = None) -> LoRACard:
        """Map a card file and know its card by name, without applying it."""
        card = load(path, verify)
        self.add_card(card)
        log.info("loaded card %r: %d modules, rank %d", card.name, len(card.weights), card.rank)
        return card

    def add_card(self, card: LoRACard) -> None:
        """Know a card by name, in place of an earlier one of that name, without applying it."""
        check_card(card)
        with self._write:
            self._state = replace(
                self._state, loaded=MappingProxyType({**self._state.loaded, card.name: card})
            )

    def unload_card(self, name: str) -> None:
        """Forget a loaded card; an active one stays active, an unknown one is no error."""
        with self._write:
            kept = {key: card for key, card in self._state.loaded.items() if key != name}
            self._state = replace(self._state, loaded=MappingProxyType(kept))

    def apply_card(
        self, card: LoRACard, *, weight: float = 1.0, strict: bool = False, check_base: bool = True
    ) -> Injection:
        """Make a card active beside those that are.

        Raises:
            ConflictError: If another card, or another weight, is active under its name.
            ShapeError, TargetError, BaseModelError, UnsupportedModelError: If it does not fit;
                nothing is changed.
        """
        check_card(card)
        with self._write:
            active = self._state.active
            wanted = AdapterSet({card.name: (card, weight)})
            if card.name in active.adapters:
                return self._already(active, wanted)
            plans = self._plan(wanted, strict=strict, check_base=check_base)
            if plans[card.name].bound:
                self._commit(self._build(active.adapters | wanted, plans))
            _report(plans[card.name], "applied")
            return plans[card.name]

    def remove_card(self, name: str) -> None:
        """Make a card inactive; an unknown name is no error."""
        with self._write:
            if name in self.active:
                layers = len(self._state.active.injections[name].bound)
                self._commit(self._build(self.active.without(name), {}))
                log.info("removed card %r from %d layers", name, layers)

    def replace_card(
        self, card: LoRACard, *, strict: bool = False, check_base: bool = True
    ) -> Injection:
        """Put another card of the same name in the place, and with the weight, of the active one."""
        check_card(card)
        with self._write:
            if card.name not in self.active:
                raise UnknownCardError(
                    f"replace_card {card.name!r}", "an active card", f"only {list(self.active)}"
                )
            wanted = AdapterSet({card.name: (card, self.active.weight(card.name))})
            plans = self._plan(wanted, strict=strict, check_base=check_base)
            self._commit(self._build(self.active.without(card.name) | wanted, plans))
            if card.name in self._state.loaded:
                self.add_card(card)
            _report(plans[card.name], "replaced")
            return plans[card.name]

    def set_weight(self, name: str, weight: float) -> None:
        """Change the weight of an active card."""
        with self._write:
            if name not in self.active:
                raise UnknownCardError(
                    f"set_weight {name!r}", "an active card", f"only {list(self.active)}"
                )
            wanted = AdapterSet({name: (self.active[name][0], weight)})
            self._commit(self._build(self.active.without(name) | wanted, {}))

    def prepare(
        self, adapters: Adapters, *, strict: bool = False, check_base: bool = True
    ) -> dict[str, Injection]:
        """Build the model for another set without making it active; cards that bind nothing are
        left out of it.

        Of what can be rolled back to, the oldest makes room if there are `HISTORY` sets, so that
        the swap frees no model.
        """
        with self._write:
            wanted = AdapterSet(adapters)
            plans = self._plan(wanted, strict=strict, check_base=check_base)
            earlier = self._state.earlier[
                1 - HISTORY :
            ]  # room for one: a swap has no model to free
            self._state = replace(self._state, prepared=self._build(wanted, plans), earlier=earlier)
            for injection in plans.values():
                _report(injection, "prepared")
            return plans

    def swap(self) -> None:
        """Make the prepared set active, by one assignment; what was active can be rolled back to."""
        with self._write:
            state = self._state
            if state.prepared is None:
                raise StateError("swap", "a prepared set", "none", "call prepare first")
            earlier = (*state.earlier, state.active)
            self._state = replace(state, active=state.prepared, prepared=None, earlier=earlier)
            log.info("swapped to %r", state.prepared.adapters)

    def rollback(self) -> None:
        """Make active what was so before the last swap."""
        with self._write:
            state = self._state
            if not state.earlier:
                raise StateError("rollback", "a set that a swap replaced", "none")
            self._state = replace(state, active=state.earlier[-1], earlier=state.earlier[:-1])
            log.info("rolled back to %r", self.active)

    def _plan(self, new: AdapterSet, *, strict: bool, check_base: bool) -> dict[str, Injection]:
        """What new cards bind to, checked as the caller asks; those that are active were when they
        came.
        """
        plans = injections(self.base, new, strict=strict)
        for name, injection in plans.items():
            if check_base:
                check_fingerprint(self.base, new[name][0], injection)
        return plans

    def _build(self, adapters: AdapterSet, new: Mapping[str, Injection]) -> Active[M]:
        """The set less what binds nothing, with its model; what is active binds as it did when it
        came.
        """
        plans = {**self._state.active.injections, **new}
        bound = AdapterSet({name: entry for name, entry in adapters.items() if plans[name].bound})
        if not bound:
            return self._base
        model = adapt(self.base, bound, check_base=False)
        kept = MappingProxyType(
            {name: replace(plans[name], bound=dict(plans[name].bound)) for name in bound}
        )
        folds = self._fold and folded_bytes(model) <= self._fold_budget
        return Active(bound, kept, fold(model) if folds else model)

    def _commit(self, active: Active[M]) -> None:
        self._state = replace(self._state, active=active)

    def _already(self, active: Active[M], wanted: AdapterSet) -> Injection:
        ((name, entry),) = wanted.items()
        if active.adapters[name] != entry:
            same = active.adapters[name][0] == entry[0]
            raise ConflictError(
                f"apply_card {name!r}",
                "the card that is active under this name",
                "another weight" if same else "a card with other content",
                "use set_weight" if same else "use replace_card",
            )
        log.info("card %r is active already", name)
        return injections(self.base, wanted)[name]


def _report(injection: Injection, what: str) -> None:
    log.info("%s card %r: %d layers", what, injection.name, len(injection.bound))
    if not injection.bound:
        log.warning("card %r binds to nothing and is not active", injection.name)
    if injection.targets_not_found:
        log.warning(
            "card %r: targets not found: %s", injection.name, ", ".join(injection.targets_not_found)
        )
    if injection.weights_not_used:
        log.warning(
            "card %r: weights not used: %s", injection.name, ", ".join(injection.weights_not_used)
        )
    if injection.bypassed:
        log.warning(
            "card %r: layers that may never be called: %s",
            injection.name,
            ", ".join(injection.bypassed),
        )
