"""A card as an Arrow table, and back: the one definition of the schema.

One row per module, sorted by name: ``module``, ``scaling``, ``A``, ``B``. Factors use the storage
of Arrow's canonical ``arrow.variable_shape_tensor``: a struct of the flat row-major data and its
shape. bfloat16, which Arrow lacks, is stored as ``uint16`` and declared in ``lora.dtype``. A card's
other fields are schema metadata, each under its own key, so that user metadata (one JSON value) can
never shadow them.

Requirements: R1, R7.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from lora.card import DTYPES, FIELD_KEYS, Array, FrozenJSON, LoRACard, LowRank, check_card
from lora.checks import parse_json
from lora.errors import ArgumentError, CardError, CardFileError, shown

FORMAT_VERSION = (1, 0)
"""Major and minor version of the layout: another major version is refused, another minor one is read."""

MAX_ELEMENTS = 2**31 - 1
"""Elements that one factor column can hold: list offsets are int32."""

ROW_BYTES = 4 + 8 + 2 * (4 + 8)
"""Bytes that every row needs at least: name offset, scaling, and for two factors an offset and a shape."""

N = TypeVar("N", int, float)

_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?(e[-+]?[0-9]{1,4})?")

_ARROW_TYPES: Mapping[str, pa.DataType] = MappingProxyType(
    {
        "float16": pa.float16(),
        "float32": pa.float32(),
        "float64": pa.float64(),
        "bfloat16": pa.uint16(),
    }
)


@dataclass(frozen=True)
class ModuleInfo:
    """Shape and scaling of one module's pair: ``(in, rank)`` and ``(rank, out)``."""

    in_features: int
    rank: int
    out_features: int
    scaling: float


@dataclass(frozen=True)
class Header:
    """What a card says of itself without its weights."""

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dtype: str
    metadata: FrozenJSON
    base_model: str | None
    base_fingerprint: str | None
    extra: FrozenJSON
    format_version: tuple[int, int]
    modules: Mapping[str, ModuleInfo]

    @property
    def num_params(self) -> int:
        """Number of elements in all factors."""
        return sum(m.rank * (m.in_features + m.out_features) for m in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return self.num_params * DTYPES[self.dtype].itemsize


def schema_of(dtype: str) -> pa.Schema:
    """The schema of a card whose factors have `dtype`, without its metadata."""
    storage = pa.struct(
        [("data", pa.list_(_ARROW_TYPES[dtype])), ("shape", pa.list_(pa.int32(), 2))]
    )

    def tensor(name: str, dims: str) -> pa.Field:
        extension = {
            "ARROW:extension:name": "arrow.variable_shape_tensor",
            "ARROW:extension:metadata": f'{{"dim_names":{dims}}}',
        }
        return pa.field(name, storage, nullable=False, metadata=extension)

    return pa.schema(
        [
            pa.field("module", pa.string(), nullable=False),
            pa.field("scaling", pa.float64(), nullable=False),
            tensor("A", '["in","rank"]'),
            tensor("B", '["rank","out"]'),
        ]
    )


def card_to_table(card: LoRACard) -> pa.Table:
    """The card as a table of one batch.

    Raises:
        CardError: If a factor column would hold more than `MAX_ELEMENTS` elements.

    Examples:
        >>> table = card_to_table(LoRACard("empty", 1, 1.0, [], {}))
        >>> table.num_rows, table.column_names
        (0, ['module', 'scaling', 'A', 'B'])
    """
    check_card(card)
    schema = schema_of(card.dtype.name)
    pairs = list(card.weights.values())
    columns = [
        pa.array(list(card.weights), pa.string()),
        pa.array([pair.scaling for pair in pairs], pa.float64()),
        _column(schema.field("A").type, [pair.A for pair in pairs], card.name),
        _column(schema.field("B").type, [pair.B for pair in pairs], card.name),
    ]
    return pa.Table.from_batches(
        [pa.record_batch(columns, schema=schema.with_metadata(_fields(card)))]
    )


def table_to_card(table: pa.Table | pa.RecordBatch) -> LoRACard:
    """The card in a table; factors are views of the table's buffers.

    Raises:
        CardFileError: If the table is not structurally a card: wrong version, columns, types,
            nulls, shapes, duplicates, shared bytes.
    """
    batch = one_batch(table)
    with _file_errors():
        _, dtype, card, rows = _read(batch)
        factors = zip(
            rows.names,
            rows.scalings,
            _views(rows.a, DTYPES[dtype]),
            _views(rows.b, DTYPES[dtype]),
            strict=True,
        )
        return replace(
            card, weights={module: LowRank(a, b, scaling) for module, scaling, a, b in factors}
        )


def one_batch(table: pa.Table | pa.RecordBatch) -> pa.RecordBatch:
    """The table's rows as one fully validated batch: Arrow's own checks first, ours come after."""
    if not isinstance(table, pa.Table | pa.RecordBatch):
        raise ArgumentError("card table", "an Arrow table or record batch", type(table).__name__)
    if table.num_rows * ROW_BYTES > (size := table.get_total_buffer_size()):
        raise CardFileError(
            "card table", f"rows that {size} bytes can hold", f"{table.num_rows} rows"
        )
    try:
        table.validate(full=True)
        batches = table.combine_chunks().to_batches() if isinstance(table, pa.Table) else [table]
    except pa.ArrowException as error:
        raise CardFileError("card table", "a valid Arrow batch", error) from error
    if len(batches) > 1:
        raise CardFileError("card table", "rows that fit one batch", f"{len(batches)} batches")
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def read_header(batch: pa.RecordBatch) -> Header:
    """Check a validated batch's structure and read everything but the factors' elements.

    Offsets and shapes are copied to the heap before they are used, so that what was checked is what
    is read.

    Raises:
        CardFileError: Naming the first rule that is broken.
    """
    with _file_errors():
        version, dtype, card, rows = _read(batch)
        shapes = zip(rows.names, rows.scalings, rows.a.shapes, rows.b.shapes, strict=True)
        modules = {name: ModuleInfo(*a, b[1], scaling) for name, scaling, a, b in shapes}
    return Header(
        name=card.name,
        rank=card.rank,
        alpha=card.alpha,
        target_modules=card.target_modules,
        dtype=dtype,
        metadata=FrozenJSON(card.metadata),
        base_model=card.base_model,
        base_fingerprint=card.base_fingerprint,
        extra=FrozenJSON(card.extra),
        format_version=version,
        modules=MappingProxyType(modules),
    )


@contextmanager
def _file_errors() -> Iterator[None]:
    """What a card may not be, a file may not say."""
    try:
        yield
    except CardFileError:
        raise
    except CardError as error:
        raise CardFileError(error.where, error.expected, error.found, error.hint) from error
    except UnicodeDecodeError as error:
        raise CardFileError("card table: schema", "UTF-8 text", error) from error


class _Factors(NamedTuple):
    """A factor column: where each row's elements start and its shape, both copied, and all rows'
    elements.
    """

    offsets: list[int]
    shapes: list[tuple[int, int]]
    values: pa.Array


class _Rows(NamedTuple):
    """What the rows hold: module names, scalings, and the columns of their factors."""

    names: list[str]
    scalings: list[float]
    a: _Factors
    b: _Factors


def _read(batch: pa.RecordBatch) -> tuple[tuple[int, int], str, LoRACard, _Rows]:
    """All that a batch holds, checked: format version, dtype, the card without its weights, and the
    rows.
    """
    fields, extra = _metadata(batch.schema)
    version = _version(fields)
    dtype = fields.get("lora.dtype", "")
    if dtype not in DTYPES:
        raise CardFileError("card table: lora.dtype", f"one of {', '.join(DTYPES)}", shown(dtype))
    _check_columns(batch, dtype)
    _check_buffers(batch)
    card = LoRACard(
        name=_required(fields, "lora.name"),
        rank=_number(fields, "lora.rank", int),
        alpha=_number(fields, "lora.alpha", float),
        target_modules=_json(fields, "lora.targets", list),
        weights={},
        metadata=_json(fields, "lora.metadata", dict),
        base_model=fields.get("lora.base_model"),
        base_fingerprint=fields.get("lora.base_fingerprint"),
        extra=extra,
    )
    return version, dtype, card, _rows(batch, card.rank)


def _rows(batch: pa.RecordBatch, largest: int) -> _Rows:
    names, scalings = batch.column("module").to_pylist(), batch.column("scaling").to_pylist()
    if len(set(names)) != len(names):
        raise CardFileError("card table: column 'module'", "each module once", "duplicates")
    a, b = _factors(batch, "A"), _factors(batch, "B")
    for name, scaling, (_, rank), (inner, _) in zip(
        names, scalings, a.shapes, b.shapes, strict=True
    ):
        if rank != inner:
            raise CardFileError(
                f"card table: module {shown(name)}", f"B with A's rank {rank}", f"rank {inner}"
            )
        if not name.isprintable() or not math.isfinite(scaling):
            where = f"card table: module {shown(name)}"
            raise CardFileError(where, "a printable name and a finite scaling", scaling)
    if names and (found := max(rank for _, rank in a.shapes)) != largest:
        raise CardFileError(
            "card table: lora.rank", f"the largest rank of its modules, {found}", largest
        )
    return _Rows(names, scalings, a, b)


def _fields(card: LoRACard) -> dict[str, str]:
    """The card's fields as schema metadata, in sorted order."""
    fields = {
        "lora.format": ".".join(map(str, FORMAT_VERSION)),
        "lora.name": card.name,
        "lora.rank": str(card.rank),
        "lora.alpha": repr(card.alpha),
        "lora.targets": json.dumps(card.target_modules, ensure_ascii=False, separators=(",", ":")),
        "lora.dtype": card.dtype.name,
        "lora.metadata": FrozenJSON(card.metadata).text,
        **card.extra,
    }
    if card.base_model is not None:
        fields["lora.base_model"] = card.base_model
    if card.base_fingerprint is not None:
        fields["lora.base_fingerprint"] = card.base_fingerprint
    return dict(sorted(fields.items()))


def offsets_of(sizes: list[int], where: str) -> Array:
    """List offsets of consecutive arrays, int32.

    Raises:
        CardError: If they don't fit.
    """
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    if offsets[-1] > MAX_ELEMENTS:
        raise CardError(
            where, f"at most {MAX_ELEMENTS} elements", int(offsets[-1]), "split the card by module"
        )
    return offsets.astype(np.int32)


def _column(storage: pa.StructType, factors: list[Array], name: str) -> pa.StructArray:
    data_type, shape_type = storage.field("data").type, storage.field("shape").type
    offsets = offsets_of([factor.size for factor in factors], f"card {name!r}: a factor column")
    flat = (
        np.concatenate([factor.reshape(-1) for factor in factors])
        if factors
        else np.empty(0, np.uint16)
    )
    shapes = np.array([factor.shape for factor in factors], np.int32).reshape(-1)
    values = pa.Array.from_buffers(
        data_type.value_type, len(flat), [None, pa.py_buffer(flat.view(np.uint8))]
    )
    lengths = pa.Array.from_buffers(
        shape_type.value_type, len(shapes), [None, pa.py_buffer(shapes)]
    )
    rows = len(factors)
    data = pa.Array.from_buffers(data_type, rows, [None, pa.py_buffer(offsets)], children=[values])
    shape = pa.Array.from_buffers(shape_type, rows, [None], children=[lengths])
    return pa.Array.from_buffers(storage, rows, [None], children=[data, shape])


def _metadata(schema: pa.Schema) -> tuple[dict[str, str], dict[str, str]]:
    """Schema metadata as the card's own fields and the rest."""
    pairs = [(key.decode(), value.decode()) for key, value in (schema.metadata or {}).items()]
    return {k: v for k, v in pairs if k in FIELD_KEYS}, {
        k: v for k, v in pairs if k not in FIELD_KEYS
    }


def _version(fields: Mapping[str, str]) -> tuple[int, int]:
    text = _required(fields, "lora.format")
    parts = text.split(".")
    if len(parts) != 2 or not all(
        part.isascii() and part.isdecimal() and len(part) < 6 for part in parts
    ):
        raise CardFileError("card table: lora.format", "a version major.minor", shown(text))
    version = (int(parts[0]), int(parts[1]))
    if version[0] != FORMAT_VERSION[0]:
        raise CardFileError(
            "card table: lora.format",
            f"major version {FORMAT_VERSION[0]}",
            text,
            "update lora-cards",
        )
    return version


def _required(fields: Mapping[str, str], key: str) -> str:
    if key not in fields:
        raise CardFileError(
            "card table: schema metadata", f"the key {key!r}", f"only {shown(sorted(fields))}"
        )
    return fields[key]


def _number(fields: Mapping[str, str], key: str, kind: type[N]) -> N:
    text = _required(fields, key)
    if not _NUMBER.fullmatch(text):
        raise CardFileError(f"card table: {key}", f"a number ({kind.__name__})", repr(text[:64]))
    try:
        return kind(text)
    except ValueError as error:
        raise CardFileError(
            f"card table: {key}", f"a number ({kind.__name__})", repr(text)
        ) from error


def _json(fields: Mapping[str, str], key: str, kind: type[Any]) -> Any:
    return parse_json(_required(fields, key), f"card table: {key}", kind)


@lru_cache(len(DTYPES))
def _known(dtype: str) -> tuple[pa.Schema, pa.Schema]:
    """The schema of such a card, and how this pyarrow reads it: with our extension's types, if it
    knows them.
    """
    schema = schema_of(dtype)
    return schema, pa.ipc.read_schema(schema.serialize())


def _check_columns(batch: pa.RecordBatch, dtype: str) -> None:
    """Exactly the known columns in order; of the known types, without nulls."""
    expected, known = _known(dtype)
    if batch.schema.names != expected.names:
        raise CardFileError("card table: columns", expected.names, shown(batch.schema.names))
    for want, kept, field, column in zip(expected, known, batch.schema, batch.columns, strict=True):
        where = f"card table: column {want.name!r}"
        if not _declares(field, want, kept) or _plain(_storage(column).type) != want.type:
            raise CardFileError(
                where,
                f"{want.type}, {want.metadata or {}}",
                f"{field.type}, {field.metadata or {}}",
            )
        if _nulls(_storage(column)):
            raise CardFileError(where, "no nulls", "nulls")


def _declares(field: pa.Field, want: pa.Field, kept: pa.Field) -> bool:
    """Whether a column declares no extension or just ours: a permutation would turn every factor
    round.
    """
    if isinstance(field.type, pa.BaseExtensionType):
        return bool(field.type == kept.type)
    declared, ours = field.metadata or {}, want.metadata or {}
    name, parameters = (
        declared.get(key) for key in (b"ARROW:extension:name", b"ARROW:extension:metadata")
    )
    try:
        return name is None or (
            name == ours.get(b"ARROW:extension:name")
            and json.loads(parameters or b"") == json.loads(ours[b"ARROW:extension:metadata"])
        )
    except (ValueError, RecursionError):
        return False


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type less what writers differ in and a reader need not know: names and nullability of
    list items.
    """
    if pa.types.is_struct(kind):
        return pa.struct(
            [(kind.field(i).name, _plain(kind.field(i).type)) for i in range(kind.num_fields)]
        )
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_type, kind.list_size)
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


def _nulls(column: pa.Array) -> bool:
    if column.null_count:
        return True
    if pa.types.is_struct(column.type):
        return any(_nulls(column.field(i)) for i in range(column.type.num_fields))
    return (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)) and _nulls(
        column.values
    )


def _check_buffers(batch: pa.RecordBatch) -> None:
    """No byte belongs to two buffers, so no two factors share any."""
    spans = sorted(
        (buffer.address, buffer.address + buffer.size)
        for column in batch.columns
        for buffer in _storage(column).buffers()
        if buffer is not None and buffer.size
    )
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise CardFileError("card table: buffers", "separate bytes for each", "two that overlap")


def _storage(column: pa.Array) -> pa.Array:
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _factors(batch: pa.RecordBatch, name: str) -> _Factors:
    storage = _storage(batch.column(name))
    data, shape = storage.field("data"), storage.field("shape")
    offsets = (
        _integers(data.offsets) if batch.num_rows else np.zeros(1, np.int64)
    )  # of no rows, a file may have none
    shapes = _integers(shape.values.slice(2 * shape.offset, 2 * batch.num_rows)).reshape(-1, 2)
    if (shapes < 1).any() or (np.diff(offsets) != shapes[:, 0] * shapes[:, 1]).any():
        raise CardFileError(
            f"card table: column {name!r}", "positive shapes, each as long as its data", "others"
        )
    return _Factors(
        offsets.tolist(), [(rows, columns) for rows, columns in shapes.tolist()], data.values
    )


def _integers(column: pa.Array) -> Array:
    """A copy of an int32 column without nulls; its own `to_numpy` would first import pandas, where
    that is installed.
    """
    buffer = column.buffers()[1]
    if buffer is None or not len(column):
        return np.empty(0, np.int64)
    return np.frombuffer(buffer, np.int32, len(column), column.offset * 4).astype(np.int64)


def _views(column: _Factors, dtype: np.dtype[Any]) -> Iterator[Array]:
    """Each row's factor as a read-only view of the column's values (a copy only if they are not
    aligned).
    """
    offsets, shapes, values = column
    buffer = values.buffers()[1]
    if buffer is None or not shapes:
        return
    flat = np.frombuffer(buffer, dtype, count=len(values), offset=values.offset * dtype.itemsize)
    flat = flat if flat.flags.aligned else flat.copy()
    flat.flags.writeable = False
    for start, stop, shape in zip(offsets, offsets[1:], shapes, strict=False):
        yield flat[start:stop].reshape(shape)
