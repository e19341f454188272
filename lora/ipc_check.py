"""What must hold of an Arrow IPC file before Arrow is asked to parse it.

Arrow believes the sizes that a file states: a compressed buffer of 8 kB may expand to 256 MB, and
400 bytes may promise two billion rows. This module reads the integers that decide this from the
file's FlatBuffers tables, and never reads outside the file. Source: Arrow columnar format 1.5,
``File.fbs`` and ``Message.fbs``.

Requirements: R7.
"""

import struct
from typing import TypeAlias

from lora.errors import CardFileError

MAGIC = b"ARROW1"
_HEAD = len(MAGIC) + 2  # the magic is padded to eight bytes
_TAIL = 4 + len(MAGIC)  # the footer's length, and the magic again
_SLACK = 8 + 64  # between batch and footer: the end-of-stream marker and padding
_SCHEMA, _DICTIONARIES, _BATCHES = 1, 2, 3  # fields of Footer
_ENDIANNESS, _METADATA, _KEY = 0, 2, 0  # fields of Schema and KeyValue
_HEADER_TYPE, _HEADER, _BODY, _RECORD_BATCH = 1, 2, 3, 3  # fields of Message, and the union's tag
_LENGTH, _BUFFERS, _COMPRESSION = 0, 2, 3  # fields of RecordBatch

_OTHER_FORMATS = {
    b"GGUF": ("GGUF of llama.cpp", "use lora convert on the PEFT folder that it was made from"),
    b"PK\x03\x04": ("a PyTorch pickle or another ZIP archive", "save it as safetensors"),
}
"""The first bytes of files that are taken for cards -> (what they are, what to do)."""

Bytes: TypeAlias = bytes | memoryview

_read = struct.unpack_from


class _Table:
    """A FlatBuffers table at `at` in `data`; where its fields are is read once."""

    def __init__(self, data: Bytes, at: int) -> None:
        vtable = at - _read("<i", data, at)[0]
        if vtable < 0:  # it would count from the end
            raise struct.error(f"negative offset {vtable}")
        self.data, self.at = data, at
        self.slots = _read(f"<{_read('<H', data, vtable)[0] // 2}H", data, vtable)

    def field(self, number: int) -> int | None:
        """Return the position of a field, or None if the table does not have it."""
        offset = self.slots[number + 2] if number + 2 < len(self.slots) else 0
        return self.at + offset if offset else None

    def number(self, form: str, number: int) -> int:
        """Return an integer field, 0 if the table does not have it."""
        position = self.field(number)
        return 0 if position is None else int(_read(form, self.data, position)[0])

    def follow(self, number: int) -> int | None:
        """Return the position that an offset field points to."""
        position = self.field(number)
        return None if position is None else position + _read("<I", self.data, position)[0]

    def vector(self, number: int, size: int) -> range:
        """Return the positions of a vector field's elements, which have `size` bytes each."""
        position = self.follow(number)
        if position is None:
            return range(0)
        first, count = position + 4, _read("<I", self.data, position)[0]
        return range(first, first + size * count, size)


def check_envelope(data: Bytes, row_bytes: int) -> None:
    """Refuse a file unless its frame is that of one plain record batch within its own bytes.

    Args:
        data: The whole file.
        row_bytes: The least bytes of a row; more rows than fit into the batch are refused.
    """
    try:
        _check_batch(*_batch_message(data), row_bytes)
    except struct.error as error:
        raise CardFileError("card file", "offsets inside the file", error) from error


def _batch_message(data: Bytes) -> tuple[Bytes, int]:
    """Check the footer and return the record batch's message and the length of its body."""
    size = len(data)
    if size < _HEAD + _TAIL or bytes(data[:6]) != MAGIC or bytes(data[-6:]) != MAGIC:
        unknown = (f"{size} bytes that are not one", "")
        if bytes(data[8:9]) == b"{":
            unknown = ("a safetensors file", "lora convert makes a card of it")
        contents, hint = _OTHER_FORMATS.get(bytes(data[:4]), unknown)
        raise CardFileError("card file", "an Arrow IPC file", contents, hint)
    footer_size = _read("<i", data, size - _TAIL)[0]
    if not 0 < footer_size <= size - _HEAD - _TAIL:
        raise CardFileError("card file: footer", "a length within the file", footer_size)
    footer_at = size - _TAIL - footer_size
    footer = _root(data[footer_at : size - _TAIL])
    blocks = footer.vector(_BATCHES, 24)  # a Block is 8 + 4 (+ 4) + 8 bytes
    if len(footer.vector(_DICTIONARIES, 24)) or len(blocks) != 1:
        raise CardFileError("card file", "one record batch and no dictionaries", "others")
    offset, metadata, body = _read("<qi4xq", footer.data, blocks[0])
    behind = footer_at - (offset + metadata + body)
    if offset < _HEAD or metadata < 8 or body < 0 or not 0 <= behind <= _SLACK:
        expected = "a block that ends at the footer"
        raise CardFileError("card file: record batch", expected, (offset, metadata, body))
    schema = _Table(footer.data, footer.follow(_SCHEMA) or 0)
    if schema.number("<h", _ENDIANNESS) != 0:
        where, hint = "card file: schema", "a card is mapped as it is"
        raise CardFileError(where, "little-endian buffers", "big-endian ones", hint)
    keys, total = set(), 0
    for at in schema.vector(_METADATA, 4):
        span = _Table(footer.data, at + _read("<I", footer.data, at)[0]).vector(_KEY, 1)
        key, total = bytes(footer.data[span.start : span.stop]), total + len(span)
        if key in keys or total > footer_size:  # readers differ in which of two values they take
            raise CardFileError("card file: schema metadata", "each key once", "duplicates")
        keys.add(key)
    return data[offset : offset + metadata], body


def _check_batch(message: Bytes, body: int, row_bytes: int) -> None:
    where = "card file: record batch"
    start = 8 if _read("<I", message, 0)[0] == 0xFFFFFFFF else 4  # Arrow before 0.15 had no marker
    root = _root(message[start:])
    header = root.follow(_HEADER)
    if header is None or root.number("<B", _HEADER_TYPE) != _RECORD_BATCH:
        raise CardFileError(where, "a record batch message", "another kind")
    if root.number("<q", _BODY) != body:
        expected = f"a body of {body} bytes, as in the footer"
        raise CardFileError(where, expected, "another length")
    batch = _Table(root.data, header)
    if batch.field(_COMPRESSION) is not None:
        hint = "a card is mapped as it is"
        raise CardFileError("card file", "uncompressed buffers", "compressed ones", hint)
    rows = batch.number("<q", _LENGTH)
    if rows < 0 or rows * row_bytes > body:
        raise CardFileError(where, f"rows that {body} bytes can hold", rows)
    spans = batch.vector(_BUFFERS, 16)
    numbers = _read(f"<{2 * len(spans)}q", batch.data, spans.start)
    for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
        if offset < 0 or length < 0 or offset + length > body:
            expected = f"a span within {body} bytes"
            raise CardFileError("card file: buffer", expected, (offset, length))


def _root(data: Bytes) -> _Table:
    return _Table(data, _read("<I", data, 0)[0])
