"""LoRAManager: which cards are active on one model.

Its state is one immutable value behind one reference. Thread safety: one writer at a time (a lock
makes others wait) and any number of readers; what a reader took never changes.

Requirements: R3, R7, R8, R22.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from torch import nn

from lora.card import Adapters, AdapterSet, LoRACard, check_card
from lora.errors import ConflictError, StateError, UnknownCardError
from lora.files import PathLike, load
from lora.metrics import Metrics
from lora.models.adapt import bindings, build, check_module
from lora.state import StateReference, Uncopied, log_safely
from lora.targets import Injection, listed

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

HISTORY = 8
"""Sets that `rollback` can go back through."""


@dataclass(frozen=True)
class Active(Generic[M]):
    """A model, the adapter set that it runs, and what its cards are bound to."""

    model: M
    adapters: AdapterSet
    injections: Mapping[str, Injection]

    def __str__(self) -> str:
        layers = {module for injection in self.injections.values() for module in injection.bound}
        return f"{self.adapters!r}, {len(layers)} layers"


@dataclass(frozen=True, kw_only=True)
class State(Generic[M]):
    """What a manager knows.

    Args:
        active: What runs.
        loaded: Cards that are known by name, active or not.
        prepared: What `swap` will make active.
        earlier: What ran before the last swaps.
    """

    active: Active[M]
    loaded: Mapping[str, LoRACard]
    prepared: Active[M] | None = None
    earlier: tuple[Active[M], ...] = ()

    @property
    def cards(self) -> dict[str, LoRACard]:
        """Every card that is loaded or active, by name."""
        active = {name: card for name, (card, _) in self.active.adapters.items()}
        return dict(sorted({**self.loaded, **active}.items()))

    def loaded_with(self, card: LoRACard) -> Mapping[str, LoRACard]:
        """Return the loaded cards with `card` in place of any of its name."""
        return MappingProxyType({**self.loaded, card.name: card})

    def loaded_without(self, name: str) -> Mapping[str, LoRACard]:
        """Return the loaded cards without the one called `name`."""
        return MappingProxyType({key: card for key, card in self.loaded.items() if key != name})


class LoRAManager(Uncopied, Generic[M]):
    """Loads cards and decides which are active on a model, which itself is never changed.

    Every change is checked and built first, and then made by one assignment; so a failure leaves
    the manager as it was. `also` holds fields of an engine's state to set in the same step.

    Args:
        model: The base model, which stays as it is.
        fold: Run float32 and float64 layers as plain Linears of ``W + ΔW``.
        fold_budget: Bytes of touched weights above which a set is not folded; None for no limit.
        state: Makes the first state; an engine's has more fields.

    Attributes:
        metrics: Counts and times ``loads`` and ``applies``, and counts ``refusals_…`` by error.

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

    def __init__(
        self,
        model: M,
        *,
        fold: bool = False,
        fold_budget: int | None = None,
        state: Callable[..., State[M]] = State,
    ) -> None:
        check_module(model)
        self.base, self.metrics = model, Metrics()
        self._fold_up_to = (math.inf if fold_budget is None else fold_budget) if fold else -1
        self._idle = Active(model, AdapterSet(), MappingProxyType({}))
        first = state(active=self._idle, loaded=MappingProxyType({}))
        self.reference = StateReference(first)

    def __repr__(self) -> str:
        state = self.state
        about = f"active={state.active.adapters!r}, known=[{listed(state.cards)}]"
        return f"LoRAManager(base={type(self.base).__name__!r}, {about})"

    @property
    def state(self) -> State[M]:
        """The present state: a snapshot."""
        return self.reference.value

    @property
    def model(self) -> M:
        """The model that runs now; the caller's own while no card is active."""
        return self.state.active.model

    @property
    def active(self) -> AdapterSet:
        """The active cards with their weights."""
        return self.state.active.adapters

    @property
    def injected(self) -> dict[str, tuple[str, ...]]:
        """Module -> names of the cards that are active on it, sorted."""
        layers: dict[str, tuple[str, ...]] = {}
        for name, injection in sorted(self.state.active.injections.items()):
            for module in injection.bound:
                layers[module] = (*layers.get(module, ()), name)
        return dict(sorted(layers.items()))

    def list_cards(self) -> dict[str, LoRACard]:
        """Every card that is loaded or active, by name."""
        return self.state.cards

    def load_card(self, path: PathLike, *, verify: str | None = None) -> LoRACard:
        """Map a card file and make its card known by name, without applying it."""
        with self.metrics.judged("loads"):
            card = load(path, verify)
        self.add_card(card)
        return card

    def add_card(self, card: LoRACard, **also: Any) -> None:
        """Make a card known by its name, in place of an earlier one, without applying it."""
        check_card(card)
        with self.reference.lock:
            self.reference.replace(loaded=self.state.loaded_with(card), **also)
        log_loaded(log, card)

    def unload_card(self, name: str) -> None:
        """Forget a loaded card; an active one stays active, an unknown name is no error."""
        with self.reference.lock:
            card = self.state.loaded.get(name)
            self.reference.replace(loaded=self.state.loaded_without(name))
        if card is not None:
            log_safely(log.info, "unloaded card %r: %d modules", name, len(card.weights))

    def apply_card(
        self,
        card: LoRACard,
        *,
        weight: float = 1.0,
        strict: bool = False,
        check_base: bool = True,
        **also: Any,
    ) -> Injection:
        """Make a card active beside those that are.

        Raises:
            ConflictError: Another card, or another weight, is active under its name.
            ShapeError, TargetError, BaseModelError, UnsupportedModelError: The card does not fit.
        """
        check_card(card)
        with self.metrics.judged("applies"), self.reference.lock:
            name, active = card.name, self.active
            entries = {**active, name: (card, weight)}
            if name in active and active[name] != entries[name]:
                same = active[name][0] == card
                raise ConflictError(
                    f"apply_card {name!r}",
                    "the card that is active under this name",
                    "another weight" if same else "a card with other content",
                    f"use {'set_weight' if same else 'replace_card'}",
                )
            again = name in active
            check = check_base and not again  # may have been waived when the card was applied
            result = self._planned(entries, [name], strict=strict, check_base=check)
            self.reference.replace(active=result, **also)
        _log_layers("active already:" if again else "applied", result, [name])
        return _reports(result)[name]

    def remove_card(self, name: str, **also: Any) -> None:
        """Make a card inactive; an unknown name is no error."""
        with self.reference.lock:
            before = self.state.active
            self.reference.replace(active=self._planned(before.adapters.without(name)), **also)
        if name in before.adapters:
            _log_layers("removed", before, [name])

    def replace_card(
        self, card: LoRACard, *, strict: bool = False, check_base: bool = True, **also: Any
    ) -> Injection:
        """Put a card in the place, and with the weight, of the active one of its name."""
        check_card(card)
        with self.metrics.judged("applies"), self.reference.lock:
            name, loaded = card.name, self.state.loaded
            entries = {**self.active, name: (card, self._active_entry("replace_card", name)[1])}
            result = self._planned(entries, [name], strict=strict, check_base=check_base)
            loaded = self.state.loaded_with(card) if name in loaded else loaded
            self.reference.replace(active=result, loaded=loaded, **also)
        _log_layers("replaced", result, [name])
        return _reports(result)[name]

    def set_weight(self, name: str, weight: float) -> None:
        """Change the weight of an active card."""
        with self.reference.lock:
            card, _ = self._active_entry("set_weight", name)
            result = self._planned({**self.active, name: (card, weight)})
            self.reference.replace(active=result)
        _log_layers(f"weight {weight:g} for", result, [name])

    def prepare(
        self, adapters: Adapters, *, strict: bool = False, check_base: bool = True
    ) -> dict[str, Injection]:
        """Build the model for another set without making it active.

        If there are `HISTORY` earlier sets, the oldest is dropped now, so that `swap` does not have
        to free a model.
        """
        with self.metrics.judged("applies"), self.reference.lock:
            earlier, adapters = self.state.earlier[1 - HISTORY :], AdapterSet(adapters)
            result = self._planned(adapters, adapters, strict=strict, check_base=check_base)
            self.reference.replace(prepared=result, earlier=earlier)
        _log_layers("prepared", result, adapters)
        return _reports(result)

    def swap(self) -> None:
        """Make the prepared set active; what was active can be rolled back to."""
        with self.reference.lock:
            state = self.state
            if state.prepared is None:
                raise StateError("swap", "a prepared set", "none", "call prepare first")
            earlier = (*state.earlier, state.active)
            self.reference.replace(active=state.prepared, prepared=None, earlier=earlier)
        log_safely(log.info, "swapped to %s", state.prepared)

    def rollback(self) -> None:
        """Return to what was active before the last swap; drop what was applied since."""
        with self.reference.lock:
            if not self.state.earlier:
                raise StateError("rollback", "a set that a swap replaced", "none")
            before, (*earlier, active) = self.state.active, self.state.earlier
            self.reference.replace(active=active, earlier=tuple(earlier))
        log_safely(log.info, "rolled back to %s; discarded %s", active, before)

    def _active_entry(self, call: str, name: str) -> tuple[LoRACard, float]:
        if name not in self.active:
            available = f"only {list(self.active)}"
            raise UnknownCardError(f"{call} {name!r}", "an active card", available)
        return self.active[name]

    def _planned(
        self,
        adapters: Mapping[str, tuple[LoRACard, float]],
        unplanned: Collection[str] = (),
        *,
        strict: bool = False,
        check_base: bool = True,
    ) -> Active[M]:
        """Plan what the unplanned cards bind to, and build the set; the others bind as they did."""
        active, adapters = self.state.active, AdapterSet(adapters)
        injections = {n: i for n, i in active.injections.items() if n in adapters}
        if unplanned:
            entries = {name: adapters[name] for name in unplanned}
            injections |= bindings(self.base, [entries], strict=strict, check_base=check_base)[0]
        if adapters == active.adapters:
            return active
        if not adapters:
            return self._idle
        model = build(self.base, adapters, injections, fold_up_to=self._fold_up_to)
        return Active(model, adapters, MappingProxyType(injections))


def log_loaded(to: logging.Logger, card: LoRACard) -> None:
    """Log that a card is known by its name now."""
    modules = len(card.weights)
    log_safely(to.info, "loaded card %r: %d modules, rank %d", card.name, modules, card.rank)


def _reports(active: Active[Any]) -> dict[str, Injection]:
    return {n: replace(i, bound=dict(i.bound)) for n, i in active.injections.items()}


def _log_layers(event: str, active: Active[Any], names: Collection[str]) -> None:
    for name in names:
        injection = active.injections[name]
        log_safely(log.info, "%s card %r: %d layers", event, name, len(injection.bound))
        if injection.leading:
            text = "card %r: its keys begin with %r, the names of their layers with %r"
            log_safely(log.info, text, name, *injection.leading)
        if injection.unbound:
            log_safely(log.warning, "card %r: %s", name, injection.unbound)
