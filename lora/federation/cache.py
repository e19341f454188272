"""A folder of cards by digest: written once, read by any number of processes, without a lock.

A card is written to a hidden file, checked, and then linked to its name. So what is visible is
complete, whenever a process dies.

Requirements: R12, R14.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lora.card import LoRACard
from lora.checks import is_digest, is_semantic_version, version_order
from lora.errors import ArgumentError, CardError, CardNotFoundError, StoreError
from lora.files import SUFFIX, PathLike, as_path, load, os_errors

STALE = 24 * 3600.0  # seconds after which an unfinished temporary file is removed


def default_cache() -> Path:
    """Return the user's cache: ``lora-cards`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-cards"
    except RuntimeError as error:  # a user without an entry in the system's list, in a container
        hint = "set XDG_CACHE_HOME, or name a folder for the cache"
        raise StoreError("cache", "a home folder", "none", hint) from error


class CardCache:
    """A folder of cards by digest, made if needed; any threads and processes may share it.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     CardCache(root).digests()
        []
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
        """Return where the card of a digest is, or would be."""
        if not is_digest(sha):
            raise ArgumentError("digest", "64 lower-case hex digits", repr(sha))
        return self.root / f"{sha}{SUFFIX}"

    def digests(self) -> list[str]:
        """Return the digests of all cards, sorted."""
        return sorted(path.name[:64] for path in self.root.glob("[0-9a-f]" * 64 + SUFFIX))

    @contextmanager
    def arriving(self) -> Iterator[tuple[Path, BinaryIO]]:
        """Open a hidden file for a card; it is removed at the end."""
        path = self.root / f".{secrets.token_hex(8)}.part"
        with os_errors(self.root):
            try:
                with path.open("xb") as file:
                    yield path, file
            finally:
                path.unlink(missing_ok=True)

    def admit(self, arrived: Path, sha: str) -> bool:
        """Make a checked file visible, read-only; return False if another process was first."""
        target = self.path(sha)
        with os_errors(target):
            arrived.chmod(0o444)  # not flushed: damage by a power failure shows in the digest
            with suppress(FileExistsError):
                os.link(arrived, target)
                return True
        return False

    def load(self, sha: str) -> LoRACard | None:
        """Return the card of a digest, or None if it is not there; a damaged file is deleted."""
        path = self.path(sha)
        try:
            return load(path, verify=sha)
        except CardNotFoundError:  # another process may just be adding it
            return None
        except CardError:
            with os_errors(path):
                path.unlink(missing_ok=True)
            return None

    def highest_version(self, name: str, signer: str) -> str:
        """Return the highest version of a name and signer, or ""."""
        folder = self._versions(name, signer)
        versions: list[str] = []
        with os_errors(self.root), suppress(FileNotFoundError):
            versions = [path.name for path in folder.iterdir() if is_semantic_version(path.name)]
        return max(versions, key=version_order, default="")

    def remember_version(self, name: str, signer: str, version: str) -> None:
        """Remember a version as an empty file, so that no process can lower it."""
        folder = self._versions(name, signer)
        with os_errors(folder):
            if version and not (folder / version).exists():
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / version).touch()
                except OSError:
                    with suppress(OSError):  # they hold other versions, or were not created
                        folder.rmdir()
                        folder.parent.rmdir()
                    raise

    def _versions(self, name: str, signer: str) -> Path:
        key = hashlib.sha256(f"{signer}\n{name}".encode(errors="surrogatepass")).hexdigest()
        return self.root / "versions" / key
