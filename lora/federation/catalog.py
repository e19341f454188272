"""The catalog of served card files: the cards by digest and by name, as an immutable value.

Only regular files count, no links. A file is hashed again only when its stamp has changed. Names
and digests from outside are looked up, and never made into a path.

Requirements: R11.
"""

import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from lora.checks import version_order
from lora.errors import LoRAError, StoreError
from lora.federation.keys import read_signed, signature_path
from lora.federation.manifest import Manifest, manifest_of
from lora.files import SUFFIX, digest, inspect, os_errors

log = logging.getLogger(__name__)

Stamp: TypeAlias = tuple[int, int, int]
"""Inode, size and modification time of a file."""

UNREAD: Stamp = (0, 0, 0)
"""Stands for the stamp of a file that the system did not let be read: no file has it."""


@dataclass(frozen=True)
class Served:
    """A card file, as it was when it was hashed."""

    path: Path
    stamp: Stamp
    manifest: Manifest
    schema: pa.Schema


@dataclass(frozen=True)
class Catalog:
    """What a server offers.

    Args:
        files: By path, stamp and stamp of the signature; None for a file that is no card.
        cards: By digest, the lowest version first.
        names: The digest of each name's highest version.
    """

    files: Mapping[tuple[Path, Stamp, Stamp | None], Served | None] = field(default_factory=dict)
    cards: Mapping[str, Served] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


def card_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder that are named like cards, but for hidden ones."""
    with os_errors(folder):
        names = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    return [folder / name for name in names if name.endswith(SUFFIX)]


def scan(paths: Iterable[Path], old: Catalog) -> Catalog:
    """Return the catalog of these files now; `old` if nothing has changed."""
    files = {}
    for path in paths:
        with os_errors(path):
            if stamp := _stamp(path):
                key = path, stamp, _stamp(signature_path(path))
                try:
                    files[key] = old.files[key] if key in old.files else _served(*key)
                except OSError as error:  # it may work at the next look
                    log.warning("not served: %s", error)
                    files[path, UNREAD, None] = None
    if files == old.files:
        return old
    cards = sorted(
        filter(None, files.values()),
        key=lambda card: (version_order(card.manifest.version), card.manifest.digest),
    )
    names = {card.manifest.name: card.manifest.digest for card in cards}
    return Catalog(files, {card.manifest.digest: card for card in cards}, names)


@contextmanager
def opened(card: Served) -> Iterator[FileIO]:
    """Open a card's file, if it is still the file that was hashed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with os_errors(card.path), os.fdopen(os.open(card.path, flags), "rb", 0) as file:
        if _stamp(file.fileno()) != card.stamp:
            raise StoreError(str(card.path), "the file that was hashed", "another")
        yield file


def _stamp(file: Path | int) -> Stamp | None:
    """Return the stamp of a regular file; None for a link, another kind, or nothing."""
    try:
        status = os.fstat(file) if isinstance(file, int) else file.lstat()
    except OSError as error:  # a card's name may be too long to have ".sig.json" added
        if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
            raise
        return None
    regular = stat.S_ISREG(status.st_mode)
    return (status.st_ino, status.st_size, status.st_mtime_ns) if regular else None


def _served(path: Path, stamp: Stamp, signature: Stamp | None) -> Served | None:
    try:
        manifest = manifest_of(inspect(path), digest(path), stamp[1])
        with pa.ipc.open_file(path) as file:
            schema = file.schema
    except OSError:
        raise
    except (LoRAError, pa.ArrowException) as error:
        log.warning("not served: %s", error)
        return None
    if signature:
        try:
            signed = read_signed(signature_path(path))
        except LoRAError as error:
            log.warning("served unsigned: %s", error)
        else:
            if signed.signed_bytes() == manifest.signed_bytes():
                manifest = signed
            else:
                log.warning("served unsigned: the signature beside %s is of another card", path)
    return Served(path, stamp, manifest, schema)
