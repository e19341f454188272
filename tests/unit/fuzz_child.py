"""Read false, damaged and mutated card files in a process of its own; print counts as JSON.

``python fuzz_child.py SEED …`` reads every file of `false_files` and, for each seed, a few hundred
mutations of real cards. "wrong" lists what is neither a refusal nor a well-formed card.
"""

import hashlib
import io
import json
import random
import resource
import struct
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa

import lora
from lora.arrow_format import schema_of
from lora.errors import CardFileError
from lora.ipc_check import _root, _Table

MODULES = ("layer.0.query", "layer.1.query", "layer.1.value")


def real_card(dtype="float32", modules=MODULES, rank=2, seed=0) -> lora.LoRACard:
    """A card with every kind of field."""
    rng = np.random.default_rng(seed)
    dtype = lora.card.DTYPES[dtype]
    weights = {
        module: lora.LowRank(
            rng.integers(0, 256, (5 + index, rank * dtype.itemsize), np.uint8).view(dtype),
            rng.integers(0, 256, (rank, 3 * dtype.itemsize), np.uint8).view(dtype),
            0.5 + index,
        )
        for index, module in enumerate(modules)
    }
    metadata = {"description": "a card to be damaged", "version": "1.2.3"}
    metadata["tags"], extra = ["fuzz", "größe"], {"x-later": "kept", "x-more": "too"}
    fields = ("docs", rank, 16.0, ("query", "value"), weights, metadata, "tiny", "0" * 64, extra)
    return lora.LoRACard(*fields)


def file_bytes(card: lora.LoRACard) -> bytes:
    """What `lora.save` writes for a card."""
    with tempfile.TemporaryDirectory() as folder:
        lora.save(card, Path(folder) / "card.lora.arrow")
        return (Path(folder) / "card.lora.arrow").read_bytes()


def arrow_bytes(batches: list[pa.RecordBatch], schema: pa.Schema | None = None, **options) -> bytes:
    """An Arrow file with these batches."""
    sink, options = io.BytesIO(), pa.ipc.IpcWriteOptions(**options)
    with pa.ipc.new_file(sink, schema or batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def plain(card: lora.LoRACard) -> pa.RecordBatch:
    """A card's batch, to be rebuilt with something changed."""
    return lora.card_to_table(card).to_batches()[0]


def with_fields(batch: pa.RecordBatch, changes=(), **fields: str | bytes | None) -> bytes:
    """The file of a batch with other ``lora.`` fields (None leaves one out) and other keys."""
    kept = {key.decode(): value for key, value in batch.schema.metadata.items()}
    kept |= {f"lora.{key}": value for key, value in fields.items()} | dict(changes)
    kept = {key: value for key, value in kept.items() if value is not None}
    return arrow_bytes([batch.replace_schema_metadata(kept)])


def with_column(batch: pa.RecordBatch, name: str, column: pa.Array) -> bytes:
    """The file of a batch with one column replaced, by another type if need be."""
    field = pa.field(name, column.type, metadata=batch.schema.field(name).metadata)
    return arrow_bytes([batch.set_column(batch.schema.get_field_index(name), field, column)])


def tensors(factors, value_type=None, shape_type=None, data=None, shapes=None) -> pa.Array:
    """A factor column of lists of lists, of types as asked for."""
    value_type, shape_type = value_type or pa.float32(), shape_type or pa.list_(pa.int32(), 2)
    data = [np.ravel(factor).tolist() for factor in factors] if data is None else data
    shapes = [list(np.shape(factor)) for factor in factors] if shapes is None else shapes
    value_type = value_type if pa.types.is_nested(value_type) else pa.list_(value_type)
    rows = [{"data": d, "shape": s} for d, s in zip(data, shapes, strict=True)]
    return pa.array(rows, pa.struct([("data", value_type), ("shape", shape_type)]))


class Edit:
    """Positions of a file's sizes, so that each can be given another value."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.footer_length = len(data) - 10
        (length,) = struct.unpack_from("<i", data, self.footer_length)
        self.footer_at = self.footer_length - length
        footer = _root(data[self.footer_at : self.footer_length])
        self.block = self.footer_at + footer.follow(3) + 4
        offset, metadata = struct.unpack_from("<qi", data, self.block)
        self.body = offset + metadata
        self.message_at = offset + 8
        message = _root(data[self.message_at : self.body])
        batch = _Table(message.data, message.follow(2))
        self.body_length = self.message_at + (message.field(3) or 0)
        self.rows = self.message_at + batch.field(0)
        self.nodes = [self.message_at + at for at in batch.vector(1, 16)]
        self.buffers = [self.message_at + at for at in batch.vector(2, 16)]
        self.spans = [struct.unpack_from("<qq", data, at) for at in self.buffers]

    def put(self, at: int, form: str, *values: int) -> bytes:
        """The file with values packed in at a position."""
        patched = bytearray(self.data)
        struct.pack_into(form, patched, at, *values)
        return bytes(patched)

    def put_body(self, buffer: int, form: str, *values: float, skip: int = 0) -> bytes:
        """The file with values packed into one of the batch's buffers."""
        return self.put(self.body + self.spans[buffer][0] + skip, form, *values)


# A batch's buffers by column: validity, then offsets or values, children after parents.
NAME_OFFSETS, NAME_TEXT, SCALING = 1, 2, 4
A_OFFSETS, A_DATA, A_SHAPES = 7, 9, 12
B_OFFSETS, B_DATA, B_SHAPES = 15, 17, 20
# Its nodes: module, scaling, A, A.data, A.data's items, A.shape, A.shape's items, B …
A_NODE, A_ITEMS_NODE, A_SHAPE_NODE, A_SHAPE_ITEMS_NODE = 2, 4, 5, 6


def false_files() -> Iterator[tuple[str, bytes]]:
    """Files that are structurally false, by what is wrong with them."""
    yield from _false_frames()
    yield from _false_sizes()
    yield from _false_spans()
    yield from _false_numbers()
    yield from _false_schemas()
    yield from _false_columns()
    yield from _false_fields()


def _false_frames() -> Iterator[tuple[str, bytes]]:
    card = real_card()
    good, batch = file_bytes(card), plain(card)
    edit = Edit(good)
    yield "nothing", b""
    yield "one byte", b"A"
    yield "the magic alone", b"ARROW1\0\0ARROW1"
    yield "text", b"a card is a value\n" * 100
    yield "a safetensors file", struct.pack("<Q", 2) + b"{}" + bytes(64)
    yield "no magic at the start", b"XRROW1" + good[6:]
    yield "no magic at the end", good[:-1] + b"2"
    for length in (0, -1, -(2**31), 2**31 - 1, len(good), len(good) - 17, edit.footer_length - 7):
        yield f"a footer of {length} bytes", edit.put(edit.footer_length, "<i", length)
    yield "a stream instead of a file", _stream(batch)
    yield "a byte appended", good + b"\0"
    yield "4 kB appended", good + bytes(4096)
    yield "a file appended to itself", good + good
    yield "a file appended to another's batch", good + file_bytes(real_card(seed=1))
    for size in (80, 128, 4096):
        tail = good[edit.footer_at :]
        yield f"{size} bytes between batch and footer", good[: edit.footer_at] + b"x" * size + tail
    yield "no batch", arrow_bytes([], batch.schema)
    yield "two batches", arrow_bytes([batch.slice(0, 1), batch.slice(1)])
    yield "two batches, one empty", arrow_bytes([batch, batch.slice(0, 0)])
    yield "lz4", arrow_bytes([batch], compression="lz4")
    yield "zstd", arrow_bytes([batch], compression="zstd")
    zeros = np.zeros((2**20, 4), np.float32)
    pair = lora.LowRank(zeros, np.zeros((4, 1), np.float32))
    bomb = lora.LoRACard("bomb", 4, 1.0, (), {"m": pair})
    yield "16 MB in a zstd buffer", arrow_bytes([plain(bomb)], compression="zstd")
    names = pa.array(MODULES).dictionary_encode()
    yield "a dictionary", with_column(batch, "module", names)
    blocks = [(-8, 64, 64), (0, 64, 64), (2**62, 64, 64), (8, -8, 64), (8, 8, 2**62), (8, 2**30, 8)]
    for offset, length, body in blocks:
        block = edit.put(edit.block, "<qiiq", offset, length, 0, body)
        yield f"a block at {offset}, {length} + {body}", block
    (offset,) = struct.unpack_from("<q", good, edit.block)
    yield "a block shifted by 8", edit.put(edit.block, "<q", offset + 8)
    yield "another body length in the message", edit.put(edit.body_length, "<q", 2**40)
    yield "a longer body in the footer", edit.put(edit.block + 16, "<q", len(good))
    (start,) = struct.unpack_from("<I", good, edit.footer_at)
    for value in (2**32 - 1, 0, start + 1):
        yield f"footer root at {value}", edit.put(edit.footer_at, "<I", value)
    (length,) = struct.unpack_from("<i", good, 12)
    yield "the schema's message as the batch", edit.put(edit.block, "<qi", 8, length + 8)
    yield "big-endian", good.replace(*_endianness(good))
    position = good.index(b"docs")
    yield "another name at the start of the file", good[:position] + b"dogs" + good[position + 4 :]
    position = good.rindex(b"docs")
    yield "another name in the footer", good[:position] + b"dogs" + good[position + 4 :]


def _stream(batch: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _endianness(good: bytes) -> tuple[bytes, bytes]:
    """The schema's vtable, and one that names `fields` where it should name `endianness`."""
    edit = Edit(good)
    footer = _root(good[edit.footer_at : edit.footer_length])
    schema = _Table(footer.data, footer.follow(1))
    at = schema.field(0)
    assert at is None, "the writer left the default out"
    vtable = schema.at - struct.unpack_from("<i", footer.data, schema.at)[0]
    size = struct.unpack_from("<H", footer.data, vtable)[0]
    old = bytes(footer.data[vtable : vtable + size])
    return old, old[:4] + old[6:8] + old[6:]  # an offset that is not 0 stands for "big"


def _false_sizes() -> Iterator[tuple[str, bytes]]:
    edit = Edit(file_bytes(real_card()))
    for rows in (-1, 0, 1, 2, 4, 2**31 - 1, 2**62, -(2**63)):
        yield f"{rows} rows", edit.put(edit.rows, "<q", rows)
    yield "2**31 - 1 rows", _many_rows(edit)
    schema = plain(real_card()).schema
    nothing = pa.schema([(name, pa.null()) for name in schema.names], schema.metadata)
    rows = arrow_bytes([pa.record_batch([pa.nulls(1)] * 4, nothing)])
    yield "2**31 - 1 rows of nothing", _many_rows(Edit(rows))
    for index, at in enumerate(edit.nodes):
        length, _ = struct.unpack_from("<qq", edit.data, at)
        for value in (-1, 0, length - 1, length + 1, 2**40):
            # Values beyond the last list belong to nobody.
            if index not in (A_ITEMS_NODE, 9) or value < length:
                yield f"node {index} of length {value}", edit.put(at, "<q", value)
        for nulls in (1, length, length + 1):
            yield f"node {index} with {nulls} nulls", edit.put(at + 8, "<q", nulls)


def _false_spans() -> Iterator[tuple[str, bytes]]:
    edit = Edit(file_bytes(real_card()))
    for index, (offset, length) in enumerate(edit.spans):
        wrong = [(offset, -8), (offset, 2**62), (offset, len(edit.data))]
        for span in ((-8, length), (2**62, length), *wrong):
            yield f"buffer {index} at {span}", edit.put(edit.buffers[index], "<qq", *span)
        if length:
            yield f"buffer {index} empty", edit.put(edit.buffers[index] + 8, "<q", 0)
            for other, (start, size) in enumerate(edit.spans):
                if other != index and size:
                    yield f"buffer {index} over {other}", edit.put(edit.buffers[index], "<q", start)
    yield "B is A", edit.put(edit.buffers[B_DATA], "<qq", *edit.spans[A_DATA])


def _false_numbers() -> Iterator[tuple[str, bytes]]:
    edit = Edit(file_bytes(real_card()))
    offsets, shapes = (NAME_OFFSETS, A_OFFSETS, B_OFFSETS), (A_SHAPES, B_SHAPES)
    for buffer, value, row in product(offsets, (-1, 2**31 - 1, -(2**31), 1), range(4)):
        if (buffer, value) != (NAME_OFFSETS, 1) or row > 1:  # these are other names, but names
            data = edit.put_body(buffer, "<i", value, skip=4 * row)
            yield f"offset {row} in buffer {buffer} is {value}", data
    for buffer, value, item in product(shapes, (-1, 0, 1, 2**31 - 1, -(2**31), 2**30), range(6)):
        data = edit.put_body(buffer, "<i", value, skip=4 * item)
        yield f"shape {item} in buffer {buffer} is {value}", data
    for buffer in shapes:
        data = edit.put_body(buffer, "<ii", 2**31 - 1, 2**31 - 1)
        yield f"shapes of 2**62 elements in buffer {buffer}", data
        yield f"negative shapes in buffer {buffer}", edit.put_body(buffer, "<ii", -5, -2)
    for value in (float("nan"), float("inf"), float("-inf")):
        yield f"a scaling of {value}", edit.put_body(SCALING, "<d", value)
    yield "a module name that is not UTF-8", edit.put_body(NAME_TEXT, "<B", 0xFF)
    yield "a module name with a control character", edit.put_body(NAME_TEXT, "<B", 7)


def _many_rows(edit: Edit) -> bytes:
    many = bytearray(edit.put(edit.rows, "<q", 2**31 - 1))
    for at in edit.nodes:
        struct.pack_into("<q", many, at, 2**31 - 1)
    return bytes(many)


def _false_schemas() -> Iterator[tuple[str, bytes]]:
    batch = plain(real_card())
    metadata, index = batch.schema.metadata, pa.array([0, 1, 2], pa.int32())

    def added(key: bytes, value: bytes) -> pa.RecordBatch:
        return batch.replace_schema_metadata(pa.KeyValueMetadata([*metadata.items(), (key, value)]))

    batches = {
        f"the key {key.decode()} twice": added(key, value)
        for key, value in metadata.items()
        if key.startswith(b"lora.")
    }
    batches |= {
        "two names": added(b"lora.name", b"law"),
        "an unknown key twice": added(b"x-later", b"2"),
        "no metadata": batch.replace_schema_metadata(None),
        "an unknown column": batch.append_column(pa.field("index", pa.int32()), index),
        "a column twice": batch.append_column(batch.schema.field("B"), batch.column("B")),
        "columns in another order": batch.select(["module", "scaling", "B", "A"]),
        "a column of another name": batch.rename_columns(["module", "scaling", "A", "b"]),
    }
    batches |= {f"no column {name}": batch.drop_columns([name]) for name in batch.schema.names}
    for name, parameters in (
        ("arrow.variable_shape_tensor", '{"dim_names":["in","rank"],"permutation":[1,0]}'),
        ("arrow.variable_shape_tensor", '{"dim_names":["rank","in"]}'),
        ("arrow.variable_shape_tensor", "{"),
        ("arrow.variable_shape_tensor", "[" * 10_000),
        ("arrow.opaque", "{}"),
        ("some.other", ""),
    ):
        declared = {"ARROW:extension:name": name, "ARROW:extension:metadata": parameters}
        schema = batch.schema.set(2, batch.schema.field("A").with_metadata(declared))
        title = f"A as {name} {parameters[:50]}"
        batches[title] = pa.record_batch(batch.columns, schema=schema)
    for name, changed in batches.items():
        yield name, arrow_bytes([changed])
    yield "a key that is not UTF-8", with_fields(batch, {b"\xff\xfe": "x"}.items())
    yield "an unknown value that is not UTF-8", with_fields(batch, {"x": b"\xff"}.items())
    yield "a name that is not UTF-8", with_fields(batch, name=b"\xff")
    for key in ("format", "name", "rank", "alpha", "targets", "dtype", "metadata"):
        yield f"no {key}", with_fields(batch, **{key: None})


def _false_columns() -> Iterator[tuple[str, bytes]]:
    batch = plain(real_card())
    a, b = ([getattr(pair, name) for pair in real_card().weights.values()] for name in "AB")
    good, names = tensors(a), list(MODULES)
    data, shapes = [x.ravel().tolist() for x in a], [list(x.shape) for x in a]
    module, scaling, first, second = {}, {}, {}, {}
    for kind in (pa.large_string(), pa.binary(), pa.string_view(), pa.int32()):
        module[f"module as {kind}"] = pa.array([1, 2, 3] if kind == pa.int32() else names, kind)
    for kind in (pa.float32(), pa.int64(), pa.decimal128(9, 2)):
        scaling[f"scaling as {kind}"] = pa.array([1, 2, 3], kind)
    lists = pa.large_list(pa.float32()), pa.list_(pa.float32(), 10)
    for kind in (pa.float64(), pa.float16(), pa.int32(), pa.uint16(), *lists):
        number = 1 if kind in (pa.int32(), pa.uint16()) else 1.0
        ones = [[number] * 10] * 3
        first[f"A of {kind}"] = tensors(a, kind, data=ones, shapes=[[5, 2]] * 3)
    for kind in (pa.list_(pa.int64(), 2), pa.list_(pa.int32()), pa.list_(pa.uint32(), 2)):
        first[f"shapes as {kind}"] = tensors(a, shape_type=kind)
    swapped, three = [good.field("shape"), good.field("data")], pa.list_(pa.int32(), 3)
    value = pa.array([1.0])
    module |= {
        "a union": pa.UnionArray.from_sparse(pa.array([0, 0, 0], pa.int8()), [pa.array(names)]),
        "a null module": pa.array([names[0], None, names[2]]),
        "a module twice": pa.array([names[0], names[0], names[2]]),
    }
    scaling |= {
        "run-end encoded scalings": pa.RunEndEncodedArray.from_arrays(
            pa.array([3], "int32"), value
        ),
        "a null scaling": pa.array([1.0, None, 1.0]),
    }
    first |= {
        "shapes of three dimensions": tensors(a, None, three, shapes=[[*s, 1] for s in shapes]),
        "shape before data": pa.StructArray.from_arrays(swapped, ["shape", "data"]),
        "lists without shapes": good.field("data"),
        "a null factor": pa.array([None, *good.to_pylist()[1:]], good.type),
        "null data": tensors(a, data=[None, *data[1:]], shapes=shapes),
        "a null element": tensors(a, data=[[None, *data[0][1:]], *data[1:]], shapes=shapes),
        "a null shape": tensors(a, data=data, shapes=[None, *shapes[1:]]),
        "a null dimension": tensors(a, data=data, shapes=[[5, None], *shapes[1:]]),
        "a shape smaller than its data": tensors(a, shapes=[[5, 2], [5, 2], [7, 2]]),
        "an empty factor": tensors([np.ones((0, 2), np.float32), *a[1:]]),
    }
    second["one rank in A, another in B"] = tensors([np.ones((3, 3), np.float32), *b[1:]])
    columns = {"module": module, "scaling": scaling, "A": first, "B": second}
    for column, changes in columns.items():
        for name, changed in changes.items():
            yield name, with_column(batch, column, changed)
    half = plain(real_card("float16"))
    yield "float16 declared as bfloat16", with_fields(half, dtype="bfloat16")
    yield "bfloat16 declared as float16", with_fields(plain(real_card("bfloat16")), dtype="float16")
    assert schema_of("bfloat16").field("A").type != schema_of("float16").field("A").type


def _false_fields() -> Iterator[tuple[str, bytes]]:
    batch = plain(real_card())
    digits = "9" * 5000
    deep = '{"a":' * 600 + "1" + "}" * 600
    deeper = "[" * 100_000 + "]" * 100_000
    wrong = {
        "format": ("2.0 0.9 1 1.0.0 1.x -1.0 \u0661.\u0660 10.0 1,0", ["", " 1.0", "1." + digits]),
        "dtype": ("int8 FLOAT32 float", ["", digits]),
        "name": ("\0 \u202e \x7f", ["", "a\nb"]),
        "rank": ("0 -1 1 3 2.0 nan inf 1e1 0x2 2_0 \u0662 true null", ["", digits, "2 \x00"]),
        "alpha": ("0 -0.0 -1 nan NaN inf -Infinity 1e999 1_6 0x10 \u0662 true []", ["", digits]),
        "targets": (
            """null {} "query" [1] [null] ["a","a"] ["a\\u0000"] [[]] ['a']""",
            ["", deeper],
        ),
        "metadata": (
            """null [] 1 {"a":NaN} {"a":1e999} { {}x {"a":"\\ud800"} {"a":-Infinity} {'a':1}""",
            ["", '{"a":' + digits + "}", deep, deeper, '{"a":\x01}'],
        ),
        "base_model": ("\0", []),
        "base_fingerprint": ("", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64]),
    }
    for key, (words, more) in wrong.items():
        for value in (*words.split(), *more):
            yield f"{key} {value[:40]!r} of {len(value)}", with_fields(batch, **{key: value})


MUTATIONS = "bits bytes edges cut inserted zeroed swapped spliced".split()


def damaged(kind: str, data: bytes, other: bytes, random: random.Random) -> bytes:
    """A real file with one kind of damage at random places."""
    changed, size = bytearray(data), random.choice((1, 4, 8, 64))
    start = random.randrange(len(data))
    match kind:
        case "bits" | "bytes":
            for _ in range(random.choice((1, 1, 1, 2, 8, 32))):
                bits = 1 << random.randrange(8), random.randrange(256)
                changed[random.randrange(len(data))] ^= bits[kind == "bytes"]
        case "edges":  # an integer at an edge of its range, where integers usually stand
            form, low, high = random.choice(
                (("i", -(2**31), 2**31 - 1), ("I", 0, 2**32 - 1), ("q", -(2**63), 2**63 - 1))
            )
            value = random.choice((low, high, 0, 1, high - 1, high // 2, len(data), 8))
            struct.pack_into(f"<{form}", changed, random.randrange(0, len(data) - 8, 4), value)
        case "cut":
            del changed[start : start + size]
        case "inserted":
            changed[start:start] = random.randbytes(size)
        case "zeroed":
            changed[start : start + size] = bytes(len(changed[start : start + size]))
        case "swapped":  # two spans of eight bytes change places
            first, second = sorted(random.sample(range(0, len(data) - 8, 8), 2))
            changed[first : first + 8] = data[second : second + 8]
            changed[second : second + 8] = data[first : first + 8]
        case "spliced":  # the start of one card and the end of another
            changed[start:] = other[start:]
    return bytes(changed)


class Trial:
    """Reads one file after another and keeps count of what became of them."""

    def __init__(self, folder: Path) -> None:
        self.path, self.again = folder / "read.lora.arrow", folder / "again.lora.arrow"
        self.counts = {"read": 0, "refused": 0, "loaded": 0}
        self.wrong: list[str] = []

    def read(
        self, name: str, data: bytes, original: str | None = None, *, must_fail: bool = False
    ) -> None:
        """Load, inspect and verify a file; note anything but a refusal or a well-formed card."""
        self.counts["read"] += 1
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(data)
        try:
            outcome = self._outcome(original)
        except Exception as error:  # noqa: BLE001 - the parent reads it
            outcome = f"{type(error).__name__}: {error}"
        if outcome in self.counts and not (must_fail and outcome == "loaded"):
            self.counts[outcome] += 1
        else:
            self.wrong.append(f"{name}: {outcome}"[:300])

    def _outcome(self, original: str | None) -> str:
        if original is not None and lora.digest(self.path) != original:
            try:
                lora.load(self.path, verify=original)
            except CardFileError:
                pass
            else:
                return "passed under another file's digest"
        try:
            card = lora.load(self.path)
        except CardFileError as error:
            text = str(error)
            if not all((error.where, error.expected, error.found, str(self.path) in text)):
                return f"an error that says too little: {text}"
            return self._inspected(None)
        return self._inspected(card)

    def _inspected(self, card: lora.LoRACard | None) -> str:
        try:
            header = lora.inspect(self.path)
        except CardFileError:
            return "refused" if card is None else "inspect refused what load took"
        if card is None:
            return "load refused what inspect took"
        for field in ("name", "rank", "alpha", "target_modules", "metadata", "extra"):
            if getattr(header, field) != getattr(card, field):
                return f"another {field} than the card's"
        for sizes in ("in_features", "rank", "out_features", "scaling"):
            listed = {module: getattr(info, sizes) for module, info in header.modules.items()}
            if listed != {module: getattr(pair, sizes) for module, pair in card.weights.items()}:
                return f"another {sizes} than the card's"
        if header.dtype != card.dtype.name:
            return "another dtype than the card's"
        return self._well_formed(card)

    def _well_formed(self, card: lora.LoRACard) -> str:
        if not (repr(card) and isinstance(hash(card), int) and card == lora.load(self.path)):
            return "a card that is not a value"
        with np.errstate(all="ignore"):
            for pair in card.weights.values():
                if pair.A.flags.writeable or pair.B.flags.writeable:
                    return "a card that can be written to"
                pair.A.astype(np.float64).sum() + pair.B.astype(np.float64).sum()
        lora.save(card, self.again)
        if lora.load(self.again) != card:
            return "a card that changes when it is saved"
        return "loaded"


def main(seeds: list[int]) -> None:
    """Read everything and print the counts."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cards = [
        real_card(),
        real_card("bfloat16", modules=("",), rank=1),
        real_card("float64", modules=MODULES[:2], rank=3),
        lora.LoRACard("empty", 1, 1.0, (), {}),
    ]
    files = [file_bytes(card) for card in cards]
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        for data in files:
            trial.read("intact", data)
        intact = dict(trial.counts)
        for name, data in false_files():
            trial.read(name, data, must_fail=True)
        false = trial.counts["read"] - intact["read"]
        small = min(files, key=len)
        for data in files:
            for length in range(0, len(data), 1 if data is small else 64):
                trial.read(f"cut at {length}", data[:length], must_fail=True)
        for seed in seeds:
            source = random.Random(seed)
            for data, other in zip(files, files[1:] + files[:1], strict=True):
                original = hashlib.sha256(data).hexdigest()
                for kind in MUTATIONS * 12:
                    changed = damaged(kind, data, other, source)
                    trial.read(f"seed {seed}: {kind}", changed, original)
            for size in (0, 13, 64, 1024, 5000):
                garbage = source.randbytes(size)
                trial.read(f"seed {seed}: garbage", garbage, must_fail=True)
                framed = b"ARROW1\0\0" + garbage + b"ARROW1"
                trial.read(f"seed {seed}: framed garbage", framed, must_fail=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    counts = {**trial.counts, "intact": intact, "false": false, "grown_mb": grown}
    print(json.dumps({**counts, "wrong": trial.wrong}))  # noqa: T201


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
