"""AdapterRegistry: many versions of many cards known by their headers, few of them mapped, within
bounds.

What is registered is an immutable catalogue that a new one replaces. What is mapped is found out,
not counted: a file stays mapped, and before Python 3.13 costs a descriptor, as long as anything
that lies in it is alive, be it a card, a factor of it in another card, or a view of one. So a card
needs no lease: it is in use while somebody holds it, and a registry that lets go of a card looks
whether that closed the file.

Thread safety: one writer at a time (`get` is one, as it decides what stays mapped) and any number
of readers of `entries`, which is a snapshot. A snapshot holds no card and so keeps none mapped.

Requirements: R22.
"""

import gc
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lora.card import LoRACard
from lora.checks import integer, is_digest
from lora.errors import (
    ArgumentError,
    CardFileError,
    ConflictError,
    LoRAError,
    RegistryFull,
    UnknownCardError,
    shown,
)
from lora.presets import CardInfo
from lora.store import PathLike, as_path, digest, inspect, load
from lora.table import Header

Key: TypeAlias = tuple[str, str]
"""A card's name and version."""


class Signature(NamedTuple):
    """What tells a file from another in its place, without reading it."""

    device: int
    inode: int
    size: int
    modified: int


@dataclass(frozen=True)
class Entry:
    """A card that is registered: everything about it but its weights.

    Args:
        name, version: What it is asked for by.
        path: Where it lies, absolute.
        header: What its file says of it.
        nbytes: Size of the file: what mapping it takes.
        digest: SHA-256 that the file must have, if it was given.
        signature: The file's when it was registered.
    """

    name: str
    version: str
    path: Path
    header: Header
    nbytes: int
    digest: str | None
    signature: Signature | None = field(repr=False)

    @property
    def key(self) -> Key:
        """Name and version."""
        return self.name, self.version


@dataclass(frozen=True)
class Catalogue:
    """Entries by name, each name's from its oldest version to its newest."""

    entries: Mapping[str, tuple[Entry, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def find(self, name: str, version: str | None = None) -> Entry | None:
        """The entry of a name and version, by default the newest."""
        known = self.entries.get(name, ())
        if version is None:
            return known[-1] if known else None
        return next((entry for entry in known if entry.version == version), None)

    def registered(self, entry: Entry) -> "Catalogue":
        """A catalogue with an entry more."""
        known = (*self.entries.get(entry.name, ()), entry)
        return self._with(entry.name, tuple(sorted(known, key=lambda one: precedence(one.version))))

    def unregistered(self, name: str, version: str | None = None) -> "Catalogue":
        """A catalogue without that version of a name, or without any."""
        known = self.entries.get(name, ())
        return self._with(
            name, tuple(entry for entry in known if version not in (None, entry.version))
        )

    def _with(self, name: str, known: tuple[Entry, ...]) -> "Catalogue":
        others = {key: entries for key, entries in self.entries.items() if key != name}
        return Catalogue(MappingProxyType({**others, name: known} if known else others))


class AdapterRegistry:
    """Named, versioned cards on disk, of which a bounded number is mapped at a time.

    Registering reads a file's header and leaves no descriptor open. `get` maps a card, or gives the
    one that is mapped, and keeps it for the next time. When there is no room for another, the least
    recently asked for is let go of, but never one that is in use: one that somebody holds, or any
    part of it.

    A manager, an adapter set or a merged card that holds a card's factors uses it; what is given
    back is found unmapped at once by CPython's reference counts, or by the garbage collector, which
    is run before `RegistryFull` is raised.

    Args:
        max_cards: Files that may be mapped at a time, >= 1.
        max_bytes: Their total size.

    Raises:
        ArgumentError: If a bound is no positive integer.

    Examples:
        >>> import tempfile
        >>> from lora.store import save
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

    def __init__(self, *, max_cards: int = 64, max_bytes: int = 2**30) -> None:
        self._max_cards = integer(max_cards, "registry: max_cards", 1)
        self._max_bytes = integer(max_bytes, "registry: max_bytes", 1)
        self._catalogue = Catalogue()
        self._kept: dict[Key, LoRACard] = {}  # the least recently asked for first
        self._maps: list[_Map] = []
        self._write = threading.RLock()

    @property
    def entries(self) -> Mapping[str, tuple[Entry, ...]]:
        """What is registered now, by name, each from its oldest version to its newest: a snapshot."""
        return self._catalogue.entries

    @property
    def mapped(self) -> tuple[Key, ...]:
        """Name and version of every file that is mapped now, in the order in which they were
        mapped.

        One that was unregistered while it was in use is among them, for as long as it is.
        """
        with self._write:
            return tuple(one.key for one in self._alive())

    def register(
        self, path: PathLike, *, version: str | None = None, digest: str | None = None
    ) -> Entry:
        """Know a card file by its header; one that is registered already is no error.

        Args:
            path: A card file.
            version: A semantic version; by default the metadata's ``version``, or that of a
                `CardInfo` without one.
            digest: SHA-256 of the file, where it is known: what is mapped is then hashed first,
                each time. Otherwise the file is known by its inode, size and time of modification.

        Raises:
            CardNotFoundError, CardFileError, StoreError: As `inspect`.
            ConflictError: If another card is registered under this name and version.
            RegistryFull: If it is too large ever to be mapped.
            ArgumentError: If the version is not a semantic one, or `digest` no SHA-256.
        """
        if digest is not None and not is_digest(digest):
            raise ArgumentError("digest", "a SHA-256 as 64 lower-case hex digits", shown(digest))
        entry = _entry(as_path(path).absolute(), version, digest)
        if entry.nbytes > self._max_bytes:
            where, hint = f"register {str(path)!r}", "raise max_bytes"
            raise RegistryFull(
                where, f"a file of at most {self._max_bytes} bytes", entry.nbytes, hint
            )
        with self._write:
            known = self._catalogue.find(*entry.key)
            if known is None:
                self._catalogue = self._catalogue.registered(entry)
            elif not _same(known, entry):
                where = f"register {str(path)!r}: {entry.name!r} {entry.version}"
                found = f"other content than that of {str(known.path)!r}"
                raise ConflictError(
                    where,
                    "one card per name and version",
                    found,
                    "pass version=, or unregister it first",
                )
            return known or entry

    def unregister(self, name: str, version: str | None = None) -> None:
        """Forget a version of a card, or all of them; an unknown one is no error. A card in use
        stays what it is.
        """
        _check_name(name)
        with self._write:
            self._catalogue = self._catalogue.unregistered(name, version)
            self._kept = {
                key: card for key, card in self._kept.items() if self._catalogue.find(*key)
            }

    def entry(self, name: str, version: str | None = None) -> Entry:
        """What is known of a card without mapping it.

        Args:
            name: The card's.
            version: By default the newest: the highest by the precedence of semantic versions, so
                that a pre-release comes before its release.

        Raises:
            UnknownCardError: If no such card, or no such version of it, is registered.
        """
        _check_name(name)
        catalogue = self._catalogue
        found = catalogue.find(name, version)
        if found is None:
            where = (
                f"registry: {name!r}" if version is None else f"registry: {name!r} {shown(version)}"
            )
            known = [entry.version for entry in catalogue.entries.get(name, ())]
            raise UnknownCardError(
                where, "a registered card", f"only versions {shown(known)}" if known else "none"
            )
        return found

    def get(self, name: str, version: str | None = None) -> LoRACard:
        """A card, mapped now or before: by default its newest version, as `entry` has it.

        A card that is mapped stays what it was, whatever has become of its path.

        Raises:
            UnknownCardError: If it is not registered.
            RegistryFull: If the bounds are reached and everything that is mapped is in use.
            CardNotFoundError, CardFileError, StoreError: If the file is gone, is no longer the one
                that was registered, or can't be read.
        """
        with self._write:
            entry = self.entry(name, version)
            card = self._kept.pop(entry.key, None)
            if card is None:
                self._make_room(entry)
                card = _loaded(entry)
                self._maps.append(_Map(entry.key, entry.nbytes, _views(card)))
            self._kept[entry.key] = card  # the most recently asked for is the last
            return card

    def _make_room(self, entry: Entry) -> None:
        for collect in (False, True):
            if collect:
                gc.collect()  # what lies in a cycle of garbage is not in use
            in_use: dict[Key, LoRACard] = {}
            while not (fits := self._fits(entry)) and self._kept:
                self._let_go_of_one(in_use)
            self._kept = {
                **in_use,
                **self._kept,
            }  # these were the least recently asked for, and still are
            if fits:
                return
        alive = self._alive()
        raise RegistryFull(
            f"get {entry.name!r} {entry.version}",
            f"room for {entry.nbytes} bytes within max_cards={self._max_cards}, max_bytes={self._max_bytes}",
            f"{len(alive)} cards of {sum(one.nbytes for one in alive)} bytes mapped and all in use",
            "let go of cards (deactivate them, drop references to them and their factors), or raise the bounds",
        )

    def _let_go_of_one(self, in_use: dict[Key, LoRACard]) -> None:
        """Drop cards, the least recently asked for first, until one is gone; what somebody else
        holds goes to `in_use`.
        """
        for key in list(self._kept):
            seen = weakref.ref(self._kept.pop(key))
            card = seen()
            if card is None:
                return
            in_use[key] = card

    def _fits(self, entry: Entry) -> bool:
        alive = self._alive()
        size = sum(one.nbytes for one in alive) + entry.nbytes
        return len(alive) < self._max_cards and size <= self._max_bytes

    def _alive(self) -> "list[_Map]":
        self._maps = [one for one in self._maps if any(view() is not None for view in one.views)]
        return self._maps


class _Map(NamedTuple):
    """A mapped file, and what lies in it, seen without being held."""

    key: Key
    nbytes: int
    views: tuple["weakref.ref[Any]", ...]


def precedence(version: str) -> tuple[Any, ...]:
    """What semantic versions are sorted by; those that differ in build metadata alone, by their
    text.

    Source: Semantic Versioning 2.0.0, section 11.

    Examples:
        >>> sorted(["1.0.0", "1.0.0-rc.10", "0.9.9", "1.0.0-rc.9", "1.0.0-rc.9.a", "1.0.0-7"], key=precedence)
        ['0.9.9', '1.0.0-7', '1.0.0-rc.9', '1.0.0-rc.9.a', '1.0.0-rc.10', '1.0.0']
    """
    release, _, before = version.partition("+")[0].partition("-")
    numbers = tuple(
        (len(part), part) for part in release.split(".")
    )  # no leading zeros: a longer number is larger
    parts = tuple(
        (0, len(part), part) if part.isdecimal() else (1, 0, part)
        for part in before.split(".")
        if part
    )
    return numbers, not parts, parts, version


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise ArgumentError("registry: name", "text", shown(name))


def _entry(path: Path, version: str | None, digest: str | None) -> Entry:
    with _steady(path) as signature:
        header = inspect(path)
    if version is None:
        version = header.metadata.get("version", CardInfo.version)
    try:
        CardInfo(version)
    except ArgumentError as error:
        where = f"register {str(path)!r}: version"
        raise ArgumentError(
            where, "a semantic version such as 1.0.0", shown(version), "pass version="
        ) from error
    return Entry(
        header.name, version, path, header, signature.size if signature else 0, digest, signature
    )


def _loaded(entry: Entry) -> LoRACard:
    if entry.digest is not None:
        return load(entry.path, entry.digest)
    with _steady(entry.path, entry.signature):
        return load(entry.path)


def _same(known: Entry, other: Entry) -> bool:
    """Whether two entries are of one content; their files are read only if that is not known."""
    if known.signature == other.signature and other.digest in (None, known.digest):
        return True
    content = _content(known)
    return content is not None and content == _content(other)


def _content(entry: Entry) -> str | None:
    """The digest of what was registered; None where that is gone."""
    if entry.digest is not None:
        return entry.digest
    try:
        with _steady(entry.path, entry.signature):
            return digest(entry.path)
    except LoRAError:
        return None


@contextmanager
def _steady(path: Path, expected: Signature | None = None) -> Iterator[Signature | None]:
    """Refuse a file that is not the expected one, or is replaced while the block reads it.

    A file without a signature is left to the block, which fails on it with an error of its own.
    """
    before = _signature(path)
    if expected is not None and before not in (None, expected):
        raise _changed(path)
    yield before
    if _signature(path) != before:
        raise _changed(path)


def _changed(path: Path) -> CardFileError:
    hint = "unregister it and register it again"
    return CardFileError(
        str(path), "the file that was registered", "another one, or a change to it", hint
    )


def _signature(path: Path) -> Signature | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return Signature(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _views(card: LoRACard) -> tuple["weakref.ref[Any]", ...]:
    """The card, and the arrays that all its factors, and all views of these, are views of."""
    roots: dict[int, Any] = {id(card): card}
    for pair in card.weights.values():
        for root in (pair.A, pair.B):
            while isinstance(root.base, np.ndarray):
                root = root.base  # noqa: PLW2901 - climbing
            roots[id(root)] = root
    return tuple(weakref.ref(root) for root in roots.values())
