"""A folder of cards by digest: written once, read by any number of processes, without a lock.

A card is written under a hidden temporary name and linked to its final one when it is whole and
checked, so that what is visible is complete, whenever a process dies. Files are read-only. Removing
one by unlink leaves the maps of it alone.

Requirements: R12, R14.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora.checks import is_digest
from lora.errors import ArgumentError
from lora.federation.manifest import Precedence
from lora.store import SUFFIX, PathLike, as_path, digest, os_errors

STALE = 24 * 3600.0
"""Seconds after which a temporary file that nobody finished is removed."""


def default_cache() -> Path:
    """The user's folder for fetched cards: ``lora-cards`` in ``$XDG_CACHE_HOME``, or in
    ``~/.cache``.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-cards"


@dataclass(frozen=True)
class Check:
    """What `CardCache.verify` found: digests that are sound, and those whose file was not and is in
    quarantine.
    """

    sound: tuple[str, ...]
    quarantined: tuple[str, ...]


class CardCache:
    """Cards by digest, in a folder that is made if it is not there.

    Thread safety: any number of threads and processes.
    """

    def __init__(self, root: PathLike) -> None:
        self.root = as_path(root)
        with os_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            for path in self.root.glob(".*.part"):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > STALE:
                        path.unlink()

    def path(self, sha: str) -> Path:
        """Where the card of a digest is, or would be."""
        if not is_digest(sha):
            raise ArgumentError("digest", "64 lower-case hex digits", repr(sha))
        return self.root / f"{sha}{SUFFIX}"

    def digests(self) -> list[str]:
        """What is there, in order."""
        names = (path.name.removesuffix(SUFFIX) for path in self.root.glob(f"*{SUFFIX}"))
        return sorted(name for name in names if is_digest(name))

    @contextmanager
    def arriving(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A hidden file for an arriving card, gone when the block ends; what `admit` has linked
        stays.
        """
        path = self.root / f".{secrets.token_hex(8)}.part"
        with os_errors(self.root):
            try:
                with path.open("xb", buffering=0) as file:
                    yield path, file
            finally:
                with suppress(FileNotFoundError):
                    path.unlink()

    def admit(self, arrived: Path, sha: str) -> Path:
        """Make a whole and checked file visible under its digest; if another process was first,
        theirs stays.

        It is not flushed to the disk: what a power failure does to it is noticed by its digest, and
        fetched again.
        """
        target = self.path(sha)
        with os_errors(target):
            arrived.chmod(0o444)
            with suppress(FileExistsError):
                os.link(arrived, target)
        return target

    def evict(self, max_bytes: int) -> list[str]:
        """Unlink cards, the longest unused first, until the rest take at most `max_bytes`; returns
        their digests.

        A card that is mapped stays whole for those who map it.
        """
        with os_errors(self.root):
            found = [(path.stat(), sha) for sha in self.digests() for path in [self.path(sha)]]
            total, gone = sum(stat.st_size for stat, _ in found), list[str]()
            for stat, sha in sorted(found, key=lambda item: (item[0].st_mtime_ns, item[1])):
                if total <= max_bytes:
                    break
                self.path(sha).unlink(missing_ok=True)
                total -= stat.st_size
                gone.append(sha)
        return gone

    def used(self, sha: str) -> None:
        """Note that a card was used now, for `evict`."""
        with suppress(OSError):
            os.utime(self.path(sha))

    def verify(self) -> Check:
        """Hash every card; put aside those that are not what their name says."""
        good, bad = [], []
        for sha in self.digests():
            with suppress(FileNotFoundError):
                if digest(self.path(sha)) == sha:
                    good.append(sha)
                else:
                    self.quarantine(sha)
                    bad.append(sha)
        return Check(tuple(good), tuple(bad))

    def quarantine(self, sha: str) -> None:
        """Put a card aside: it is no longer found, and can be looked at."""
        with os_errors(self.root), suppress(FileNotFoundError):
            aside = self.root / "quarantine"
            aside.mkdir(exist_ok=True)
            self.path(sha).rename(aside / f"{sha}.{secrets.token_hex(4)}")

    def highest_version(self, name: str, signer: str) -> str:
        """The highest version that `remember_version` was told; empty if none."""
        with os_errors(self.root):
            folder = self._versions(name, signer)
            found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return max(found, key=Precedence, default="")

    def remember_version(self, name: str, signer: str, version: str) -> None:
        """Note that a version was accepted: one empty file for each, so that nobody can lower what
        another raised.
        """
        if version:
            folder = self._versions(name, signer)
            with os_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / version).touch()

    def _versions(self, name: str, signer: str) -> Path:
        key = hashlib.sha256(f"{signer}\n{name}".encode(errors="surrogatepass")).hexdigest()
        return self.root / "versions" / key
