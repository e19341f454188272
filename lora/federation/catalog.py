"""The catalog of served card files: the cards by digest and by name, as an immutable value.

`Followed` hands an engine what changes in a folder. Only regular files count, no links. A file is
hashed again only when its stamp has changed. Names and digests from outside are looked up, and
never made into a path.

Requirements: R11.
"""

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from lora.card import LoRACard
from lora.checks import version_order
from lora.errors import ConflictError, LoRAError, StoreError
from lora.federation.keys import read_signed, signature_path
from lora.federation.manifest import Manifest, manifest_of
from lora.files import SUFFIX, PathLike, as_path, digest, inspect, load, os_errors

log = logging.getLogger(__name__)

Stamp: TypeAlias = tuple[int, int, int]
"""Inode, size and modification time of a file."""

UNREAD: Stamp = (0, 0, 0)
"""Stands for the stamp of a file that the system did not let be read: no file has it."""

TICK = 10**9
"""Nanoseconds after which a folder that changes again has another time of change."""


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
        files: By path, stamp and stamp of the signature file; None for a file that is no card.
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


class Followed:
    """The cards of a folder: of each name the highest version, as it is at each `refresh`.

    Args:
        folder: A folder of card files, which are replaced by renames.
        take: Called with a card that is new or has changed; an error leaves what was there.
        forget: Called with the name of a card that is gone.
    """

    def __init__(
        self, folder: PathLike, take: Callable[[LoRACard], None], forget: Callable[[str], None]
    ) -> None:
        self._folder, self._take, self._forget = as_path(folder).absolute(), take, forget
        self._catalog, self._time = Catalog(), 0
        self._seen, self._again = dict[str, Served](), set[str]()
        self._lock = threading.Lock()
        self._catalog = scan(card_files(self._folder), self._catalog)
        self._hand_over(refused=ConflictError)

    def refresh(self) -> None:
        """Hand over what has changed since the last look. The reasons of what fails are logged."""
        with self._lock:
            try:
                changed = self._folder.stat().st_mtime_ns
                if changed == self._time:
                    return
                # A folder's clock may tick slower than two changes follow each other.
                is_settled = time.time_ns() - changed > TICK
                self._time = 0  # until all is handed over
                self._catalog = scan(card_files(self._folder), self._catalog)
            except OSError as error:
                log.warning("not followed: %s", error)
                return
            if self._hand_over() and is_settled:
                self._time = changed

    def _hand_over(self, refused: type[LoRAError] | tuple[()] = ()) -> bool:
        """Return whether no file and no card is to be tried again at the next look."""
        names = dict[str, list[Served]]()
        for card in self._catalog.cards.values():
            names.setdefault(card.manifest.name, []).append(card)
        for name, cards in names.items():
            try:
                card = newest(cards)
                old, self._seen[name] = self._seen.get(name), card
                if old is None or old.manifest != card.manifest or name in self._again:
                    self._again.discard(name)
                    self._take(load(card.path, verify=card.manifest.digest))
            except refused:
                raise
            except Exception as error:  # noqa: BLE001 - of an encoder, or a warning made an error
                log.warning("card %r stays as it was: %s", name, error)
                if isinstance(error, OSError) or not isinstance(error, LoRAError):
                    self._again.add(name)  # it is not the card's own fault
        unread = {path for (path, *_), card in self._catalog.files.items() if card is None}
        for name in self._seen.keys() - names.keys():
            if self._seen[name].path not in unread:
                del self._seen[name]
                self._again.discard(name)
                self._forget(name)
        return not self._again and all(stamp != UNREAD for _, stamp, _ in self._catalog.files)


def newest(cards: Sequence[Served]) -> Served:
    """Return the last card of one name, of which the lowest version comes first.

    Raises:
        ConflictError: Another one has the highest version, too.
    """
    *others, card = cards
    version = card.manifest.version
    for other in others[-1:]:
        if version_order(other.manifest.version) == version_order(version):
            where = f"{card.path}: {card.manifest.name!r} {version}"
            problem = f"other content in {other.path.name!r}"
            raise ConflictError(where, "one card per name and version", problem, "remove one")
    return card


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
            if signed.signed_bytes() == manifest.signed_bytes():
                return Served(path, stamp, signed, schema)
            log.warning("served unsigned: the signature beside %s is of another card", path)
        except LoRAError as error:
            log.warning("served unsigned: %s", error)
    return Served(path, stamp, manifest, schema)
