"""The catalog of a served folder: its cards by digest and by name, as an immutable value.

Only regular files directly in the folder count, no links. A file is hashed again only when its
stamp has changed. Names and digests from outside are looked up, and never made into a path.

Requirements: R11.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from lora.checks import version_order
from lora.errors import LoRAError, StoreError
from lora.federation.keys import SUFFIX as SIGNED
from lora.federation.keys import read_signed, signature_path
from lora.federation.manifest import Manifest, manifest_of
from lora.store import SUFFIX, digest, inspect, os_errors

log = logging.getLogger(__name__)

Stamp: TypeAlias = tuple[int, int, int, int]
"""Inode, size and modification time of a card, and modification time of its signature or 0."""


@dataclass(frozen=True)
class Served:
    """A card file of the folder, as it was when it was hashed."""

    path: Path
    stamp: Stamp
    manifest: Manifest
    schema: pa.Schema


@dataclass(frozen=True)
class Catalog:
    """What a folder holds.

    Args:
        files: By file name and stamp; None for a file that is no card.
        cards: By digest, in order.
        names: The digest of each name's highest version.
    """

    files: Mapping[tuple[str, Stamp], Served | None] = field(default_factory=dict)
    cards: Mapping[str, Served] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


def scan(root: Path, old: Catalog) -> Catalog:
    """Return the catalog of the folder now; `old` if nothing has changed."""
    files = {
        key: old.files[key] if key in old.files else _served(root, *key)
        for key in sorted(_stamps(root))
    }
    if files == old.files:
        return old
    cards = sorted(filter(None, files.values()), key=lambda card: card.manifest.digest)
    by_version = sorted(cards, key=lambda card: version_order(card.manifest.version))
    names = {card.manifest.name: card.manifest.digest for card in by_version}
    return Catalog(files, {card.manifest.digest: card for card in cards}, names)


@contextmanager
def opened(card: Served) -> Iterator[FileIO]:
    """Open a card's file, if it is still the file that was hashed."""
    with os_errors(card.path), open(card.path, "rb", 0, opener=_no_links) as file:
        if _stamp(os.fstat(file.fileno())) != card.stamp[:3]:
            raise StoreError(str(card.path), "the file that was hashed", "another")
        yield file


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _stamps(root: Path) -> list[tuple[str, Stamp]]:
    files: dict[str, os.stat_result] = {}
    with os_errors(root), os.scandir(root) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # removed in the meantime
                if entry.is_file(follow_symlinks=False):
                    files[entry.name] = entry.stat(follow_symlinks=False)
    return [
        (name, (*_stamp(file), files[name + SIGNED].st_mtime_ns if name + SIGNED in files else 0))
        for name, file in files.items()
        if name.endswith(SUFFIX) and not name.startswith(".")
    ]


def _stamp(file: os.stat_result) -> tuple[int, int, int]:
    return file.st_ino, file.st_size, file.st_mtime_ns


def _served(root: Path, name: str, stamp: Stamp) -> Served | None:
    path = root / name
    try:
        manifest = manifest_of(inspect(path), digest(path), stamp[1])
        with pa.ipc.open_file(path) as file:
            schema = file.schema
    except (LoRAError, OSError, pa.ArrowException) as error:
        log.warning("not served: %s", error)
        return None
    if stamp[3]:
        try:
            signed = read_signed(signature_path(path))
            if signed.signed_bytes() == manifest.signed_bytes():
                manifest = replace(manifest, signature=signed.signature)
            else:
                log.warning("served unsigned: the signature beside %s is of another card", path)
        except LoRAError as error:
            log.warning("served unsigned: %s", error)
    return Served(path, stamp, manifest, schema)
