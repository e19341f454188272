"""The frame of an Arrow IPC file, read by hand: what must be true before Arrow is asked to parse
it.

Arrow believes a file's sizes. A compressed buffer of 8 kB may expand to 256 MB, and 400 bytes may
promise two thousand million rows; both are decided by a few integers in the footer and in the
record batch's message, which are FlatBuffers tables. This module reads just those integers, every
access bounded by the bytes that are there. Layout: Arrow columnar format 1.5, "IPC File Format";
field numbers: ``File.fbs`` and ``Message.fbs``.

Requirements: R7.
"""

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from lora.errors import CardFileError

MAGIC = b"ARROW1"
_HEAD = len(MAGIC) + 2  # the magic is padded to eight bytes
_TAIL = 4 + len(MAGIC)  # footer length, magic
_SLACK = (
    8 + 64
)  # the end-of-stream marker and padding: all that may lie between the batch and the footer
_SCHEMA, _DICTIONARIES, _BATCHES = 1, 2, 3  # fields of Footer
_ENDIANNESS, _METADATA, _KEY = 0, 2, 0  # fields of Schema and KeyValue
_HEADER_TYPE, _HEADER, _BODY, _RECORD_BATCH = 1, 2, 3, 3  # fields of Message, and the union's tag
_LENGTH, _BUFFERS, _COMPRESSION = 0, 2, 3  # fields of RecordBatch

Bytes: TypeAlias = bytes | memoryview


class _Table(NamedTuple):
    """A FlatBuffers table at `at` in `data`."""

    data: Bytes
    at: int

    def field(self, number: int) -> int | None:
        """Position of a field, or None where the table does not have it."""
        vtable = self.at - _read("<i", self.data, self.at)
        slot = 4 + 2 * number
        offset = (
            _read("<H", self.data, vtable + slot) if slot < _read("<H", self.data, vtable) else 0
        )
        return self.at + offset if offset else None

    def follow(self, number: int) -> int | None:
        """Position of what an offset field points to."""
        position = self.field(number)
        return None if position is None else position + _read("<I", self.data, position)

    def length(self, number: int) -> int:
        """Length of a vector field."""
        position = self.follow(number)
        return 0 if position is None else int(_read("<I", self.data, position))

    def tables(self, number: int) -> Iterator["_Table"]:
        """The tables in a vector field."""
        position = self.follow(number)
        if position is not None:
            count = min(_read("<I", self.data, position), len(self.data) // 4)
            for at in range(position + 4, position + 4 + 4 * count, 4):
                yield _Table(self.data, at + _read("<I", self.data, at))

    def text(self, number: int) -> bytes:
        """A string field."""
        position = self.follow(number)
        if position is None:
            return b""
        return bytes(self.data[position + 4 : position + 4 + _read("<I", self.data, position)])


def check_envelope(data: Bytes, row_bytes: int) -> None:
    """Refuse a file whose frame is not that of one plain record batch within its own bytes.

    Args:
        data: The whole file.
        row_bytes: Bytes that a row occupies at the least; more rows than fit are refused.

    Raises:
        CardFileError: Naming what is wrong: the magic, the footer, dictionaries, the number of
            batches, compression, sizes, byte order, a schema key given twice, bytes between the
            batch and the footer.
    """
    try:
        _check(data, row_bytes)
    except struct.error as error:
        raise CardFileError("card file", "offsets inside the file", error) from error


def _check(data: Bytes, row_bytes: int) -> None:
    size = len(data)
    if size < _HEAD + _TAIL or bytes(data[:6]) != MAGIC or bytes(data[-6:]) != MAGIC:
        raise CardFileError("card file", "an Arrow IPC file", f"{size} bytes that are not one")
    footer_size = _read("<i", data, size - _TAIL)
    if not 0 < footer_size <= size - _HEAD - _TAIL:
        raise CardFileError("card file: footer", "a length within the file", footer_size)
    footer = _root(data[size - _TAIL - footer_size : size - _TAIL])
    if footer.length(_DICTIONARIES) or footer.length(_BATCHES) != 1:
        raise CardFileError("card file", "one record batch and no dictionaries", "others")
    block = (
        footer.follow(_BATCHES) or 0
    ) + 4  # behind the vector's length; a Block is 8 + 4 (+ 4) + 8 bytes
    offset, metadata = _read("<q", footer.data, block), _read("<i", footer.data, block + 8)
    body = _read("<q", footer.data, block + 16)
    behind = size - _TAIL - footer_size - (offset + metadata + body)
    if offset < _HEAD or metadata < 8 or body < 0 or not 0 <= behind <= _SLACK:
        raise CardFileError(
            "card file: record batch", "a block that ends at the footer", (offset, metadata, body)
        )
    _check_schema(footer)
    _check_batch(data[offset : offset + metadata], body, row_bytes)


def _check_schema(footer: _Table) -> None:
    """Little-endian, and no key of its metadata twice: readers differ in which of two they take."""
    schema = _Table(footer.data, footer.follow(_SCHEMA) or 0)
    order = schema.field(_ENDIANNESS)
    if order is not None and _read("<h", schema.data, order) != 0:
        raise CardFileError(
            "card file: schema",
            "little-endian buffers",
            "big-endian ones",
            "a card is mapped as it is",
        )
    keys = [pair.text(_KEY) for pair in schema.tables(_METADATA)]
    if len(set(keys)) != len(keys):
        raise CardFileError("card file: schema metadata", "each key once", "duplicates")


def _check_batch(message: Bytes, body: int, row_bytes: int) -> None:
    start = (
        8 if _read("<I", message, 0) == 0xFFFFFFFF else 4
    )  # before 0.15 there was no continuation marker
    root = _root(message[start:])
    kind, header = root.field(_HEADER_TYPE), root.follow(_HEADER)
    if kind is None or header is None or _read("<B", root.data, kind) != _RECORD_BATCH:
        raise CardFileError("card file: record batch", "a record batch message", "another kind")
    stated = root.field(_BODY)
    if body != (0 if stated is None else _read("<q", root.data, stated)):
        raise CardFileError(
            "card file: record batch", f"a body of {body} bytes, as in the footer", "another length"
        )
    batch = _Table(root.data, header)
    if batch.field(_COMPRESSION) is not None:
        raise CardFileError(
            "card file", "uncompressed buffers", "compressed ones", "a card is mapped as it is"
        )
    length = batch.field(_LENGTH)
    rows = 0 if length is None else _read("<q", root.data, length)
    if rows < 0 or rows * row_bytes > body:
        raise CardFileError("card file: record batch", f"rows that {body} bytes can hold", rows)
    _check_spans(batch, body)


def _check_spans(batch: _Table, body: int) -> None:
    """Every buffer lies in the body, and no two share a byte."""
    vector = batch.follow(_BUFFERS)
    spans = []
    for index in range(min(batch.length(_BUFFERS), len(batch.data) // 16)):
        at = (vector or 0) + 4 + 16 * index
        offset, length = _read("<q", batch.data, at), _read("<q", batch.data, at + 8)
        if offset < 0 or length < 0 or offset + length > body:
            raise CardFileError(
                "card file: buffer", f"a span within {body} bytes", (offset, length)
            )
        if length:
            spans.append((offset, offset + length))
    spans.sort()
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise CardFileError("card file: buffers", "separate bytes for each", "two that overlap")


def _root(data: Bytes) -> _Table:
    return _Table(data, _read("<I", data, 0))


def _read(form: str, data: Bytes, at: int) -> Any:
    """The integer at `at`."""
    if at < 0:
        raise struct.error(f"negative offset {at}")
    return struct.unpack_from(form, data, at)[0]
