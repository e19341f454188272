"""Cards on disk: the core's only file I/O.

A card file is an Arrow IPC file, mapped on loading: its factors are views into the map, which is
private copy-on-write, so a stray write can neither crash the process nor reach the file. POSIX
semantics are assumed for replacing a mapped file by rename; nothing is promised for a file that is
edited in place.

Requirements: R1, R7.
"""

import hashlib
import hmac
import mmap
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO, TypeAlias

import pyarrow as pa

from lora.card import LoRACard
from lora.checks import is_digest
from lora.envelope import check_envelope
from lora.errors import (
    ArgumentError,
    CardError,
    CardFileError,
    CardNotFoundError,
    LoRAError,
    StoreError,
    shown,
)
from lora.table import ROW_BYTES, Header, card_to_table, one_batch, read_header, table_to_card

PathLike: TypeAlias = str | os.PathLike[str]

SUFFIX = ".lora.arrow"
"""Of card files, by convention; in folders that are served or cached, by rule."""


def save(card: LoRACard, path: PathLike) -> str:
    """Write a card atomically and return its digest.

    The bytes go to a temporary file beside `path`, are flushed to the disk and renamed over it: a
    reader sees the old file or the new one. On one installation one card always gives the same
    bytes.

    Args:
        card: Any card.
        path: Where to; ``*.lora.arrow`` by convention. The folder must exist.

    Returns:
        SHA-256 of the file, 64 hex digits.

    Raises:
        CardNotFoundError: If the folder does not exist.
        StoreError: If the operating system refuses; `path` is as it was.

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
def replacing(path: PathLike) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, and vanishes when it does
    not.

    It is flushed to the disk before it is renamed, and the folder after, so that a crash leaves the
    old file or the new.
    """
    path = as_path(path)
    with os_errors(path), _folder(path.parent) as folder:
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        os.fsync(folder)


def load(path: PathLike, verify: str | None = None) -> LoRACard:
    """Map a card file and return the card in it, without copying a factor.

    Args:
        path: A card file.
        verify: The digest that the file must have; it is hashed before a byte of it is parsed.

    Raises:
        CardNotFoundError: If there is no such file.
        CardFileError: If it is not a well-formed card, or not the one asked for.
    """
    if verify is not None and not is_digest(verify):
        raise ArgumentError("verify", "a SHA-256 as 64 lower-case hex digits", repr(verify))
    with _card_errors(path):
        data = _map(path)
        if verify is not None:
            _check_digest(data, verify)
        card = table_to_card(_batch(data))
        _forget(data)
        return card


def inspect(path: PathLike) -> Header:
    """Everything a card file says of itself; no byte of its factors is touched.

    Raises:
        CardNotFoundError, CardFileError: As `load`.
    """
    with _card_errors(path):
        return read_header(one_batch(_batch(_map(path))))


def digest(path: PathLike) -> str:
    """SHA-256 of a file's bytes: a card file's identity."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_path(path: PathLike) -> Path:
    """The path, or an error that says what was given instead.

    Raises:
        ArgumentError: If it is neither a str nor an `os.PathLike` of one.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArgumentError("path", "a str or os.PathLike", shown(path))
    return Path(path)


@contextmanager
def _opened(path: PathLike) -> Iterator[FileIO]:
    """A regular file for reading; a pipe would block and a device has no end."""
    path = as_path(path)
    with os_errors(path), open(path, "rb", 0, opener=_not_blocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise StoreError(str(path), "a regular file", "something else")
        yield file


def _not_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _map(path: PathLike) -> mmap.mmap | bytes:
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""  # which can't be mapped
        if sys.version_info >= (3, 13):
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY, trackfd=False)
        return mmap.mmap(
            file.fileno(), 0, access=mmap.ACCESS_COPY
        )  # which keeps a descriptor of its own


def _forget(data: mmap.mmap | bytes) -> None:
    """Let go of the pages that were read to check the file: none is resident until a factor is
    used.
    """
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        with suppress(OSError):  # as where all memory is locked
            data.madvise(mmap.MADV_DONTNEED)


def _check_digest(data: mmap.mmap | bytes, expected: str) -> None:
    with memoryview(data) as view:
        found = hashlib.sha256(view).hexdigest()
    if not hmac.compare_digest(found, expected):
        raise CardFileError("card file: SHA-256", expected, found)


def _batch(data: mmap.mmap | bytes) -> pa.RecordBatch:
    with memoryview(data) as view:
        check_envelope(view, ROW_BYTES)
    try:
        buffer = pa.py_buffer(data)
        reader = pa.ipc.open_file(buffer)
        if not _agrees(buffer, reader.schema):
            raise CardFileError(
                "card file: schema", "one at the start of the file and in its footer", "two"
            )
        return reader.get_batch(0)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CardFileError("card file", "an Arrow IPC file", error) from error


def _agrees(buffer: pa.Buffer, schema: pa.Schema) -> bool:
    """Whether the schema at the start, where a writer puts one, is the footer's: readers differ in
    which they take.
    """
    try:
        first = pa.ipc.read_schema(buffer.slice(8))
    except (pa.ArrowException, OSError):
        return True
    return bool(first.equals(schema, check_metadata=True))


@contextmanager
def _card_errors(path: PathLike) -> Iterator[None]:
    """Name the file in every error that its contents cause."""
    try:
        yield
    except CardError as error:
        raise CardFileError(
            f"{os.fspath(path)}: {error.where}", error.expected, error.found, error.hint
        ) from error


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses, as an error of this library that names the path.

    Raises:
        CardNotFoundError, StoreError:
    """
    try:
        yield
    except LoRAError:
        raise
    except FileNotFoundError as error:
        missing = path if path.parent.is_dir() else path.parent
        raise CardNotFoundError(str(path), "an existing path", f"nothing at {missing}") from error
    except (OSError, ValueError) as error:
        raise StoreError(str(path), "a file that can be read or written", error) from error


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    """A folder's handle, to flush what was renamed in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
