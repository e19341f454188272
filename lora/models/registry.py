"""AdapterRegistry: many versions of many cards, known by their headers, of which few are mapped.

A file stays mapped, and before Python 3.13 costs a descriptor, as long as anything that lies in it
is alive: the card, a factor of it in another card, or a view of one. Weak references tell which
files are in use; nothing is counted or leased.

Requirements: R22.
"""

import gc
import itertools
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from lora.arrow_format import Header
from lora.card import LoRACard
from lora.checks import integer, is_digest, is_semantic_version, version_order
from lora.errors import (
    ArgumentError,
    CardFileError,
    ConflictError,
    RegistryFull,
    UnknownCardError,
    shown,
)
from lora.files import PathLike, as_path, digest, inspect, load, os_errors
from lora.presets import CardInfo

Key: TypeAlias = tuple[str, str]
"""A card's name and version."""


@dataclass(frozen=True)
class Entry:
    """A registered card: everything about it except its weights.

    Args:
        name, version: The card is asked for by these.
        path, nbytes: Absolute path and size of the file.
        header: What the file says of the card.
        digest: SHA-256 that the file must have, if it was given.
        signature: Device, inode, size and time of modification when it was registered.
    """

    name: str
    version: str
    path: Path
    header: Header
    nbytes: int
    digest: str | None
    signature: tuple[int, ...] = field(repr=False)

    @property
    def key(self) -> Key:
        """Name and version."""
        return self.name, self.version

    def check(self) -> None:
        """Raise `CardFileError` if the file is not the registered one any more."""
        if self.digest is None and _signature(self.path) != self.signature:
            hint = "register it again"
            problem = "another or a changed one"
            raise CardFileError(str(self.path), "the registered file", problem, hint)

    def outdated_by(self, entry: "Entry") -> bool:
        """Tell whether `entry` is of the same path, whose file has changed in between."""
        same = self.path == entry.path
        return same and self.digest is None and self.signature != entry.signature

    def content(self) -> str:
        """Return the SHA-256 of the file."""
        return self.digest or digest(self.path)


@dataclass
class _Map:
    """A mapped file: its card, while the registry keeps it, and references to what lies in it."""

    entry: Entry
    card: LoRACard | None
    contents: list["weakref.ref[Any]"]
    used: int


class AdapterRegistry:
    """Named, versioned cards on disk, of which a bounded number is mapped at a time.

    `register` reads a file's header and leaves no descriptor open. `get` maps a card and keeps it.
    To make room, it drops the least recently used card that nobody else uses.

    Thread safety: one writer at a time (`get` counts as one) and any number of readers of
    `entries`.

    Args:
        max_cards: Largest number of files mapped at a time, >= 1.
        max_bytes: Their largest total size.

    Attributes:
        entries: Name -> the registered entries, the oldest version first; an immutable snapshot.

    Examples:
        >>> import tempfile
        >>> from lora.files import save
        >>> registry = AdapterRegistry(max_cards=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for version in ("1.10.0", "1.9.0"):
        ...         path = f"{folder}/{version}.lora.arrow"
        ...         _ = save(LoRACard("docs", 1, 1.0, [], {}, {"version": version}), path)
        ...         _ = registry.register(path)
        ...     card = registry.get("docs")
        >>> card.metadata["version"], [entry.version for entry in registry.entries["docs"]]
        ('1.10.0', ['1.9.0', '1.10.0'])
    """

    entries: Mapping[str, tuple[Entry, ...]]

    def __init__(self, *, max_cards: int = 64, max_bytes: int = 2**30) -> None:
        self._max_cards = integer(max_cards, "registry: max_cards", 1)
        self._max_bytes = integer(max_bytes, "registry: max_bytes", 1)
        self.entries = MappingProxyType({})
        self._maps: list[_Map] = []
        self._clock = itertools.count()
        self._write = threading.RLock()

    @property
    def mapped(self) -> tuple[Key, ...]:
        """Name and version of each mapped file, in the order of mapping; unregistered ones, too."""
        with self._write:
            return tuple(mapped.entry.key for mapped in self._alive())

    def register(
        self, path: PathLike, *, version: str | None = None, digest: str | None = None
    ) -> Entry:
        """Register a card file by its header; return the earlier entry if it is registered already.

        If the file has changed, the earlier entry of its path and name is forgotten.

        Args:
            version: A semantic version. Default: the metadata's ``version``, else 0.1.0.
            digest: SHA-256 of the file, checked whenever it is mapped. Default: the file is known
                by its inode, size and time of modification.

        Raises:
            ConflictError: Another card is registered under this name and version.
            CardFileError: The file registered under them has changed.
            RegistryFull: The file is too large ever to be mapped.
        """
        if digest is not None and not is_digest(digest):
            raise ArgumentError("digest", "a SHA-256 as 64 lower-case hex digits", shown(digest))
        path = as_path(path).absolute()
        signature, header = _signature(path), inspect(path)
        where, size = f"register {str(path)!r}", signature[2]
        if version is None:
            version = header.metadata.get("version", CardInfo.version)
        if not is_semantic_version(version):
            expected = "a semantic version such as 1.0.0"
            raise ArgumentError(f"{where}: version", expected, shown(version), "pass version=")
        if size > self._max_bytes:
            expected = f"a file of at most {self._max_bytes} bytes"
            raise RegistryFull(where, expected, size, "raise max_bytes")
        entry = Entry(header.name, version, path, header, size, digest, signature)
        entry.check()
        with self._write:
            versions = [e for e in self._versions(entry.name) if not e.outdated_by(entry)]
            for known in versions:
                if known.version == version:
                    known.check()
                    if known.content() == entry.content():
                        return known
                    problem = f"other content than that of {str(known.path)!r}"
                    hint = "pass version=, or unregister it first"
                    where = f"{where}: {entry.name!r} {version}"
                    raise ConflictError(where, "one card per name and version", problem, hint)
            versions.append(entry)
            self._set(
                entry.name, sorted(versions, key=lambda e: (version_order(e.version), e.version))
            )
            return entry

    def unregister(self, name: str, version: str | None = None) -> None:
        """Forget a version of a card, or all of them; a card in use stays usable."""
        with self._write:
            versions = self._versions(name)
            self._set(name, [e for e in versions if version not in (None, e.version)])

    def entry(self, name: str, version: str | None = None) -> Entry:
        """Return what is known of a card: of its newest version, unless another one is given.

        A pre-release is older than its release.
        """
        versions = self._versions(name)
        for entry in reversed(versions):
            if version in (None, entry.version):
                return entry
        where = f"registry: {name!r}" if version is None else f"registry: {name!r} {shown(version)}"
        available = f"only versions {shown([entry.version for entry in versions])}"
        raise UnknownCardError(where, "a registered card", available if versions else "none")

    def get(self, name: str, version: str | None = None) -> LoRACard:
        """Return a card, mapped now or before; by default its newest version.

        Raises:
            UnknownCardError: The card is not registered.
            RegistryFull: The bounds are reached and everything that is mapped is in use.
            CardFileError: The file has changed since it was registered.
        """
        with self._write:
            entry = self.entry(name, version)
            for mapped in self._maps:
                if mapped.entry is entry and mapped.card is not None:
                    mapped.used = next(self._clock)
                    return mapped.card
            self._make_room(entry)
            card = load(entry.path, entry.digest)
            entry.check()
            self._maps.append(_Map(entry, card, _contents(card), next(self._clock)))
            return card

    def _versions(self, name: object) -> tuple[Entry, ...]:
        if not isinstance(name, str):
            raise ArgumentError("registry: name", "text", shown(name))
        return self.entries.get(name, ())

    def _set(self, name: str, versions: list[Entry]) -> None:
        entries = {key: known for key, known in self.entries.items() if key != name}
        self.entries = MappingProxyType({**entries, name: tuple(versions)} if versions else entries)
        for mapped in self._maps:
            if mapped.entry.name == name and mapped.entry not in versions:
                mapped.card = None

    def _make_room(self, entry: Entry) -> None:
        """Let go of cards that nobody else holds, the least recently used first, until one fits."""
        for generation in (1, 2, None):
            for mapped in sorted(self._maps, key=lambda mapped: mapped.used):
                if mapped.card is not None and not self._fits(entry):
                    card = weakref.ref(mapped.card)
                    mapped.card = None
                    mapped.card = card()  # a card that somebody else holds stays
            if self._fits(entry):
                return
            if generation is not None:
                gc.collect(generation)  # garbage in a cycle, first young, is not in use
        raise RegistryFull(
            f"get {entry.name!r} {entry.version}: {entry.nbytes} bytes",
            f"room within max_cards={self._max_cards}, max_bytes={self._max_bytes}",
            f"{len(self._maps)} cards mapped and all in use",
            "deactivate cards, drop references to them and their factors, or raise the bounds",
        )

    def _fits(self, entry: Entry) -> bool:
        sizes = [entry.nbytes, *(mapped.entry.nbytes for mapped in self._alive())]
        return len(sizes) <= self._max_cards and sum(sizes) <= self._max_bytes

    def _alive(self) -> list[_Map]:
        self._maps = [
            mapped for mapped in self._maps if any(ref() is not None for ref in mapped.contents)
        ]
        return self._maps


def _signature(path: Path) -> tuple[int, ...]:
    with os_errors(path):
        status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _contents(card: LoRACard) -> list["weakref.ref[Any]"]:
    """Return references to the card and to the arrays that all views of its factors refer to."""
    roots: list[Any] = [card]
    for pair in card.weights.values():
        for array in (pair.A, pair.B):
            while isinstance(array.base, np.ndarray):
                array = array.base  # noqa: PLW2901 - climbing
            roots.append(array)
    return [weakref.ref(root) for root in roots]
