"""The cards of a folder by digest and by name, as a value; scanning the folder again gives the next
value.

Only regular files directly in the folder are seen, never what a link points to, and only those that
are cards. A file is hashed once, and again when its stamp changes. Nothing from outside is ever
made into a path: names and digests are looked up.

Requirements: R11.
"""

import logging
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import pyarrow as pa

from lora.errors import LoRAError, StoreError, UnknownCardError, shown
from lora.federation.keys import read_signed, signature_path
from lora.federation.manifest import Manifest, Precedence, manifest_of
from lora.store import SUFFIX, digest, inspect, os_errors

log = logging.getLogger(__name__)

Stamp: TypeAlias = tuple[int, int, int, int]
"""Inode, size, time of the last change of contents, and of the signature beside it (0 for none)."""


@dataclass(frozen=True)
class Served:
    """A card file of the folder: where it is, what it was when it was hashed, what it announces."""

    path: Path
    stamp: Stamp
    manifest: Manifest
    schema: pa.Schema


@dataclass(frozen=True)
class Catalog:
    """What a folder holds.

    Args:
        files: Every file that was looked at, by its file name; None where it is no card.
        cards: The cards, by digest.
        names: The digest that a name stands for: of several, the one of the highest version, then
            the greatest digest.
    """

    files: Mapping[str, tuple[Stamp, Served | None]] = field(default_factory=dict)
    cards: Mapping[str, Served] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def find(self, name_or_digest: str) -> Served:
        """The card of a digest or a name.

        Raises:
            UnknownCardError:
        """
        card = self.cards.get(self.names.get(name_or_digest, name_or_digest))
        if card is None:
            raise UnknownCardError("card", "one that is served here", shown(name_or_digest, 80))
        return card


def scan(root: Path, old: Catalog) -> Catalog:
    """The folder as it is now; `old` itself if nothing has changed."""
    stamps = dict(_stamps(root))
    if stamps == {name: stamp for name, (stamp, _) in old.files.items()}:
        return old
    files = {
        name: old.files[name]
        if old.files.get(name, (None,))[0] == stamp
        else (stamp, _served(root / name, stamp))
        for name, stamp in sorted(stamps.items())
    }
    cards = {card.manifest.digest: card for _, card in files.values() if card is not None}
    ordered = sorted(
        cards.values(), key=lambda card: (Precedence(card.manifest.version), card.manifest.digest)
    )
    names = {card.manifest.name: card.manifest.digest for card in ordered}
    return Catalog(MappingProxyType(files), MappingProxyType(cards), MappingProxyType(names))


@contextmanager
def mapped(card: Served) -> Iterator[pa.Buffer]:
    """The bytes of a card's file, mapped for reading.

    Raises:
        StoreError: If the file is not the one that was hashed.
    """
    with os_errors(card.path):
        handle = os.open(card.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _stamp(os.fstat(handle)) != card.stamp[:3]:
                raise StoreError(str(card.path), "the file that was hashed", "another")
            data = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)
    yield pa.py_buffer(data)


def _stamps(root: Path) -> Iterator[tuple[str, Stamp]]:
    with os_errors(root), os.scandir(root) as entries:
        for entry in entries:
            if (
                entry.name.endswith(SUFFIX)
                and not entry.name.startswith(".")
                and entry.is_file(follow_symlinks=False)
            ):
                try:
                    yield (
                        entry.name,
                        (*_stamp(entry.stat(follow_symlinks=False)), _signed_at(Path(entry.path))),
                    )
                except FileNotFoundError:  # gone since
                    continue


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _signed_at(card: Path) -> int:
    try:
        found = signature_path(card).lstat()
    except OSError:
        return 0
    return found.st_mtime_ns if stat.S_ISREG(found.st_mode) else 0


def _served(path: Path, stamp: Stamp) -> Served | None:
    try:
        manifest = manifest_of(inspect(path), digest(path), stamp[1])
        with pa.OSFile(str(path)) as file:
            schema = pa.ipc.open_file(file).schema
    except (LoRAError, OSError, pa.ArrowException) as error:
        log.warning("not served: %s", error)
        return None
    return Served(path, stamp, _signed(manifest, path) if stamp[3] else manifest, schema)


def _signed(manifest: Manifest, path: Path) -> Manifest:
    """The manifest with the signature beside the file, if that is of this card."""
    try:
        beside = read_signed(signature_path(path))
    except LoRAError as error:
        log.warning("served unsigned: %s", error)
        return manifest
    if beside.signed_bytes() != manifest.signed_bytes():
        log.warning("served unsigned: what lies beside %s is the signature of another card", path)
        return manifest
    return replace(manifest, signature=beside.signature)
