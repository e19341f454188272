"""Card files on disk: the core's only file I/O.

A card file is an Arrow IPC file. Loading maps it, and the factors are views of the map, which is
private and copy-on-write: a stray write neither crashes the process nor reaches the file. A rename
may replace a mapped file (POSIX), but a file must not be edited in place.

Requirements: R1, R7.
"""

import hashlib
import mmap
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

import pyarrow as pa

from lora.arrow_format import (
    ROW_BYTES,
    Header,
    card_to_table,
    one_batch,
    read_header,
    table_to_card,
)
from lora.card import LoRACard
from lora.checks import is_digest, naming
from lora.errors import (
    ArgumentError,
    CardFileError,
    CardNotFoundError,
    LoRAError,
    StoreError,
    shown,
)
from lora.ipc_check import check_envelope

PathLike: TypeAlias = str | os.PathLike[str]

SUFFIX = ".lora.arrow"
"""The suffix of card files: a convention, and a rule in folders that are served or cached."""


def save(card: LoRACard, path: PathLike) -> str:
    """Write a card atomically and return its digest, the SHA-256 of the file in hex.

    A reader sees the old file or the new one; after an error the old one is as it was. The same
    card gives the same bytes.

    Raises:
        CardNotFoundError: The folder is missing.
        StoreError: The file can't be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save(LoRACard("empty", 1, 1.0, [], {}), f"{folder}/empty.lora.arrow")
        ...     saved == digest(f"{folder}/empty.lora.arrow")
        True
    """
    table = card_to_table(card)
    with replacing(path) as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_batch(one_batch(table))
        file.flush()
        return digest(file.name)


@contextmanager
def replacing(path: PathLike, temporary_name: str | None = None) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the block ends, and is removed when it raises.

    The file is flushed before it is renamed and the folder afterwards, so that a crash leaves the
    old file or the new one. A killed process leaves the file under its temporary name, and the
    next one that states this name takes it over.
    """
    path = as_path(path)
    with os_errors(path):
        temporary = path.with_name(temporary_name or f".{os.urandom(8).hex()}.tmp")
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with temporary.open("wb" if temporary_name else "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            os.fsync(folder)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(folder)


def load(path: PathLike, verify: str | None = None) -> LoRACard:
    """Map a card file and return the card in it, without copying a factor.

    Args:
        path: A card file.
        verify: The digest that the file must have; it is checked before the file is parsed.

    Raises:
        CardNotFoundError: Nothing is at the path.
        StoreError: A folder or a device is.
        CardFileError: The file is no card, is damaged, or has another digest.

    Examples:
        >>> import tempfile
        >>> card = LoRACard("empty", 1, 1.0, [], {})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/empty.lora.arrow"
        ...     load(path, verify=save(card, path)) == card
        True
    """
    if verify is not None and not is_digest(verify):
        raise ArgumentError("verify", "a SHA-256 as 64 lower-case hex digits", repr(verify))
    path = as_path(path)
    with naming(path):
        data = _map(path)
        if verify is not None:
            actual = hashlib.sha256(data).hexdigest()
            if actual != verify:
                raise CardFileError("card file: SHA-256", verify, actual)
        card = table_to_card(_batch(data))
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        with suppress(OSError):  # locked memory stays
            data.madvise(mmap.MADV_DONTNEED)  # drop the pages that were read to check the file
    return card


def inspect(path: PathLike) -> Header:
    """Return all that a card file says, without reading its factors.

    Raises:
        CardNotFoundError, StoreError: As for `load`.
        CardFileError: The file is no card, or is damaged.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(LoRACard("docs", 8, 16.0, [], {}), f"{folder}/docs.arrow")
        ...     inspect(f"{folder}/docs.arrow").rank
        8
    """
    path = as_path(path)
    with naming(path):
        return read_header(one_batch(_batch(_map(path))))


def digest(path: PathLike) -> str:
    """Return the SHA-256 of a file in hex: a card file's identity.

    Raises:
        CardNotFoundError, StoreError: As for `load`.

    Examples:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     digest(file.name)[:8]
        'e3b0c442'
    """
    with (
        _opened(as_path(path)) as (descriptor, _),
        open(descriptor, "rb", 0, closefd=False) as file,
    ):
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_path(path: PathLike) -> Path:
    """Return the path; raise `ArgumentError` unless it is a str or an `os.PathLike` of one."""
    try:
        return Path(path)
    except Exception as error:  # bytes give a TypeError, and `__fspath__` may raise anything
        raise ArgumentError("path", "a str or os.PathLike", shown(path)) from error


def hub_advice(path: Path) -> str:
    """Return what to do with a path that is not there, if it names something on the Hub.

    Examples:
        >>> hub_advice(Path("HF:org/minilm/config.json")).partition("; ")[2]
        'a model is downloaded first: hf download org/minilm prints its folder'
    """
    named = re.search(r"(?:^|/)hf:([^/@]+/[^/@]+)", str(path), re.IGNORECASE)
    if not named:
        return ""
    adapters = f"an adapter is hf:{named[1]} for lora convert, merge and the cards of lora fold"
    return f"{adapters}; a model is downloaded first: hf download {named[1]} prints its folder"


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Re-raise an error of the operating system as `CardNotFoundError` or `StoreError`."""
    try:
        yield
    except LoRAError:
        raise
    except FileNotFoundError as error:
        problem = "none" if path.parent.is_dir() else f"no folder {path.parent}"
        raise CardNotFoundError(str(path), "an existing path", problem, hub_advice(path)) from error
    except (OSError, ValueError) as error:
        raise StoreError(str(path), "a file that can be read or written", error) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file, no pipe or device; yield its descriptor and its size."""
    with os_errors(path):
        # Opening a pipe would block, and a device has no end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StoreError(
                    str(path),
                    "a regular file",
                    "a folder or a device",
                    "`lora convert` makes a card of a PEFT folder",
                )
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)


def _map(path: Path) -> mmap.mmap | bytes:
    with _opened(path) as (descriptor, size):
        if size == 0:
            return b""  # an empty file can't be mapped
        # Python before 3.13 keeps a descriptor for each map.
        options = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY, **options)


def _batch(data: mmap.mmap | bytes) -> pa.RecordBatch:
    """Check the file's structure and that its two schemas agree; return its record batch."""
    check_envelope(memoryview(data), ROW_BYTES)
    try:
        buffer = pa.py_buffer(data)
        reader = pa.ipc.open_file(buffer)
        first = reader.schema
        with suppress(pa.ArrowException, OSError):  # a writer may leave out the schema at the start
            first = pa.ipc.read_schema(buffer.slice(8))
        if not first.equals(reader.schema, check_metadata=True):  # readers differ in which they use
            expected = "one at the start of the file and in its footer"
            raise CardFileError("card file: schema", expected, "two")
        return reader.get_batch(0)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CardFileError("card file", "an Arrow IPC file", error) from error
