"""A card as an Arrow table, and back: the one definition of the schema.

A row is a module: ``module``, ``scaling``, ``A``, ``B``. Factors have the storage of Arrow's
canonical ``arrow.variable_shape_tensor``: a struct of the flat row-major data and its shape.
bfloat16, which Arrow lacks, is stored as ``uint16``. The card's fields are schema metadata, each
under its own key.

Requirements: R1, R7.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lora.card import (
    DTYPES,
    FIELD_KEYS,
    Array,
    FrozenJSON,
    LoRACard,
    LowRank,
    check_card,
    checked_pair,
)
from lora.checks import naming, parse_json, require
from lora.errors import ArgumentError, CardError, CardFileError, shown

FORMAT_VERSION = (1, 0)
"""Major and minor version of the layout. Any minor version of this major version is read."""

MAX_ELEMENTS = 2**31 - 1
"""Elements that one factor column can hold: list offsets are int32."""

ROW_BYTES = 4 + 8 + 2 * (4 + 8)
"""The least bytes of a row: a name's offset, a scaling, and an offset and a shape per factor."""

_VERSION = re.compile(r"([0-9]{1,5})\.([0-9]{1,5})")
_INTEGER = re.compile(r"-?[0-9]{1,40}")
_DECIMAL = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?(e[-+]?[0-9]{1,4})?")

_NAME, _PARAMETERS = b"ARROW:extension:name", b"ARROW:extension:metadata"


class ModuleInfo(NamedTuple):
    """Shape and scaling of one module's pair: ``(in, rank)`` and ``(rank, out)``."""

    in_features: int
    rank: int
    out_features: int
    scaling: float


@dataclass(frozen=True)
class Header:
    """All that a card file says, except the factors' elements; see `lora.inspect`.

    Args:
        dtype: Of the factors, such as ``"float32"``.
        format_version: Major and minor version of the layout.
        modules: Module -> shape and scaling of its pair.
        num_params: Number of elements in all factors; `nbytes` is their size.

    Examples:
        >>> pair = LowRank(np.ones((4, 2)), np.ones((2, 3)), 1.0)
        >>> table = card_to_table(LoRACard("docs", 2, 2.0, ["q"], {"q": pair}))
        >>> read_header(one_batch(table)).modules["q"]
        ModuleInfo(in_features=4, rank=2, out_features=3, scaling=1.0)
    """

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
    num_params: int
    nbytes: int


def schema_of(dtype: str) -> pa.Schema:
    """Return the schema of a card whose factors have `dtype`, without its metadata."""
    element = pa.uint16() if dtype == "bfloat16" else pa.from_numpy_dtype(DTYPES[dtype])
    storage = pa.struct([("data", pa.list_(element)), ("shape", pa.list_(pa.int32(), 2))])
    fields = [
        pa.field("module", pa.string(), nullable=False),
        pa.field("scaling", pa.float64(), nullable=False),
    ]
    for name, dims in (("A", '["in","rank"]'), ("B", '["rank","out"]')):
        extension = {_NAME: "arrow.variable_shape_tensor", _PARAMETERS: f'{{"dim_names":{dims}}}'}
        fields.append(pa.field(name, storage, nullable=False, metadata=extension))
    return pa.schema(fields)


def card_to_table(card: LoRACard) -> pa.Table:
    """Return the card as a table of one batch.

    Examples:
        >>> table = card_to_table(LoRACard("empty", 1, 1.0, [], {}))
        >>> table.num_rows, table.column_names
        (0, ['module', 'scaling', 'A', 'B'])
    """
    check_card(card)
    pairs, schema = card.weights.values(), schema_of(card.dtype.name)
    storage, where = schema.field("A").type, f"card {card.name!r}: a factor column"
    columns = [
        pa.array(list(card.weights), pa.string()),
        pa.array([pair.scaling for pair in pairs], pa.float64()),
        _column(storage, [pair.A for pair in pairs], where),
        _column(storage, [pair.B for pair in pairs], where),
    ]
    fields = {
        "lora.format": ".".join(map(str, FORMAT_VERSION)),
        "lora.dtype": card.dtype.name,
        **texts_of(card),
        **card.extra,
    }
    batch = pa.record_batch(columns, schema=schema.with_metadata(dict(sorted(fields.items()))))
    return pa.Table.from_batches([batch])


def texts_of(card: LoRACard) -> dict[str, str]:
    """Return the card's fields, except weights and extra, as the texts of a file's metadata."""
    texts = {
        "lora.name": card.name,
        "lora.rank": str(card.rank),
        "lora.alpha": repr(card.alpha),
        "lora.targets": json.dumps(card.target_modules, ensure_ascii=False, separators=(",", ":")),
        "lora.metadata": FrozenJSON(card.metadata).text,
        "lora.base_model": card.base_model,
        "lora.base_fingerprint": card.base_fingerprint,
    }
    return {key: text for key, text in texts.items() if text is not None}


def table_to_card(table: pa.Table | pa.RecordBatch) -> LoRACard:
    """Return the card in a table; its factors are views of the table's buffers.

    Raises:
        CardFileError: The table is not a card.

    Examples:
        >>> card = LoRACard("empty", 1, 1.0, [], {})
        >>> table_to_card(card_to_table(card)) == card
        True
    """
    return _read(one_batch(table))[1]


def one_batch(table: pa.Table | pa.RecordBatch) -> pa.RecordBatch:
    """Return the rows as one batch that Arrow has fully validated."""
    if not isinstance(table, pa.Table | pa.RecordBatch):
        raise ArgumentError("card table", "an Arrow table or record batch", type(table).__name__)
    size, rows = table.get_total_buffer_size(), table.num_rows
    if rows * ROW_BYTES > size:
        raise CardFileError("card table", f"rows that {size} bytes can hold", f"{rows} rows")
    try:
        table.validate(full=True)
        batches = table.combine_chunks().to_batches() if isinstance(table, pa.Table) else [table]
    except pa.ArrowException as error:
        raise CardFileError("card table", "a valid Arrow batch", error) from error
    if rows and len(batches) != 1:
        raise CardFileError("card table", "rows that fit one batch", f"{len(batches)} batches")
    return batches[0] if rows else pa.RecordBatch.from_pylist([], schema=table.schema)


def read_header(batch: pa.RecordBatch) -> Header:
    """Return all that a validated batch says, without reading the factors' elements."""
    version, card = _read(batch)
    modules = {
        name: ModuleInfo(pair.in_features, pair.rank, pair.out_features, pair.scaling or 0.0)
        for name, pair in card.weights.items()
    }
    fields = vars(card) | {
        "modules": MappingProxyType(modules),
        "dtype": card.dtype.name,
        "format_version": version,
        "num_params": card.num_params,
        "nbytes": card.nbytes,
    }
    del fields["weights"]
    return Header(**fields)


@naming("card table")
def _read(batch: pa.RecordBatch) -> tuple[tuple[int, int], LoRACard]:
    try:
        metadata = batch.schema.metadata or {}
        texts = {key.decode(): value.decode() for key, value in metadata.items()}
        version = _version(texts)
        for key in sorted(FIELD_KEYS - texts.keys() - {"lora.base_model", "lora.base_fingerprint"}):
            keys = f"only {shown(sorted(texts))}"
            raise CardFileError("schema metadata", f"the key {key!r}", keys)
        for key, form in (("lora.rank", _INTEGER), ("lora.alpha", _DECIMAL)):
            require(form.fullmatch(texts[key]) is not None, key, "a number", texts[key])
        targets = parse_json(texts["lora.targets"], "lora.targets", list)
        return version, LoRACard(
            name=texts["lora.name"],
            rank=int(texts["lora.rank"]),
            alpha=float(texts["lora.alpha"]),
            target_modules=tuple(targets),
            weights=_pairs_in(batch, texts["lora.dtype"]),
            metadata=parse_json(texts["lora.metadata"], "lora.metadata", dict),
            base_model=texts.get("lora.base_model"),
            base_fingerprint=texts.get("lora.base_fingerprint"),
            extra={key: text for key, text in texts.items() if key not in FIELD_KEYS},
        )
    except UnicodeDecodeError as error:
        raise CardFileError("schema", "UTF-8 text", error) from error


def _version(texts: dict[str, str]) -> tuple[int, int]:
    text = texts.get("lora.format", "")
    version = _VERSION.fullmatch(text)
    if version is None:
        raise CardFileError("lora.format", "a version major.minor", shown(text))
    if int(version[1]) != FORMAT_VERSION[0]:
        expected = f"major version {FORMAT_VERSION[0]}"
        raise CardFileError("lora.format", expected, text, "update lora-cards")
    return int(version[1]), int(version[2])


def _pairs_in(batch: pa.RecordBatch, dtype: str) -> dict[str, LowRank]:
    require(dtype in DTYPES, "lora.dtype", f"one of {', '.join(DTYPES)}", dtype)
    names, scalings, *columns = _columns(batch, dtype)
    factors = (_factors(*column, DTYPES[dtype]) for column in zip(columns, "AB", strict=True))
    weights: dict[str, LowRank] = {}
    rows = zip(names.to_pylist(), *factors, scalings.to_pylist(), strict=True)
    for name, a_factor, b_factor, scaling in rows:
        require(name not in weights, "column 'module'", "each module once", name)
        fit = a_factor.shape[1] == b_factor.shape[0] and math.isfinite(scaling)
        try:  # the constructor names what is wrong
            weights[name] = (checked_pair if fit else LowRank)(a_factor, b_factor, scaling)
        except CardError as error:
            where = f"module {shown(name)}: {error.where}"
            raise CardError(where, error.expected, error.found) from error
    return weights


@lru_cache(len(DTYPES))
def _known_fields(dtype: str) -> tuple[list[pa.Field], list[pa.Field]]:
    """Return the columns of such a card, and the same as this pyarrow reads them from a file."""
    schema = schema_of(dtype)
    return list(schema), list(pa.ipc.read_schema(schema.serialize()))


def _columns(batch: pa.RecordBatch, dtype: str) -> list[pa.Array]:
    """Return the columns' storage; refuse other columns, nulls, and bytes in two buffers."""
    expected, read_back = _known_fields(dtype)
    names, known = batch.schema.names, [field.name for field in expected]
    require(names == known, "columns", str(known), names)
    columns, buffers = [], []
    for ours, read, field, column in zip(
        expected, read_back, batch.schema, batch.columns, strict=True
    ):
        where = f"column {ours.name!r}"
        storage = column.storage if isinstance(column, pa.ExtensionArray) else column
        if not field.equals(read, check_metadata=True) and (
            not _declares(field, ours, read) or _plain(storage.type) != ours.type
        ):
            types = [f"{f.type}, {f.metadata or {}}" for f in (ours, field)]
            raise CardFileError(where, *types)
        lists = storage.flatten() if pa.types.is_struct(storage.type) else []
        if any(part.null_count for part in (storage, *lists, *(part.values for part in lists))):
            raise CardFileError(where, "no nulls", "nulls")
        columns.append(storage)
        buffers += [buffer for buffer in storage.buffers() if buffer]
    spans = sorted((buffer.address, buffer.address + buffer.size) for buffer in buffers)
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise CardFileError("buffers", "separate bytes for each", "two that overlap")
    return columns


def _declares(field: pa.Field, ours: pa.Field, read: pa.Field) -> bool:
    """Tell whether a column declares no extension or ours, as a type or as metadata."""
    if isinstance(field.type, pa.BaseExtensionType):
        return bool(field.type == read.type)
    declared, expected = field.metadata or {}, ours.metadata or {}
    if _NAME not in declared:
        return True
    try:
        parameters = [json.loads(keys.get(_PARAMETERS, b"")) for keys in (declared, expected)]
    except (ValueError, RecursionError):
        return False
    return bool(declared[_NAME] == expected[_NAME] and parameters[0] == parameters[1])


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type without the names and nullability of list items, in which writers differ."""
    if pa.types.is_struct(kind):
        return pa.struct([(part.name, _plain(part.type)) for part in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_type, kind.list_size)
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


def _factors(column: pa.StructArray, name: str, dtype: np.dtype[Any]) -> list[Array]:
    """Return each factor as a read-only view of the column; of a copy if that is not aligned."""
    data, shape = column.field("data"), column.field("shape")
    # Copy first, then check the copy: the file could change between check and use.
    offsets: Any = np.from_dlpack(data.offsets).tolist() if len(column) else [0]
    numbers = shape.values[2 * shape.offset :][: 2 * len(shape)]  # flatten() imports pa.compute
    shapes: Any = np.from_dlpack(numbers).reshape(-1, 2).tolist()
    flat = np.from_dlpack(data.values).view(dtype)
    flat = flat if flat.flags.aligned else flat.copy()
    flat.flags.writeable = False
    factors = []
    for (start, stop), (rows, columns) in zip(pairwise(offsets), shapes, strict=True):
        if rows < 1 or columns < 1 or stop - start != rows * columns:
            expected = "positive shapes, each as long as its data"
            raise CardFileError(f"column {name!r}", expected, "others")
        factors.append(flat[start:stop].reshape(rows, columns))
    return factors


def offsets_of(sizes: list[int], where: str) -> Array:
    """Return the int32 list offsets of consecutive arrays; raise `CardError` if they don't fit."""
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    if offsets[-1] > MAX_ELEMENTS:
        expected = f"at most {MAX_ELEMENTS} elements"
        raise CardError(where, expected, offsets[-1], "split the card by module")
    return offsets.astype(np.int32)


def _column(storage: pa.StructType, factors: list[Array], where: str) -> pa.StructArray:
    def array(kind: pa.DataType, numbers: Array) -> pa.Array:  # pa.array() would import pandas
        return pa.Array.from_buffers(kind, numbers.size, [None, pa.py_buffer(numbers.view("u1"))])

    offsets = offsets_of([factor.size for factor in factors], where)
    flat = np.concatenate(factors, axis=None) if factors else np.empty(0, np.uint8)
    shapes = np.array([factor.shape for factor in factors], np.int32)
    values = array(storage[0].type.value_type, flat)
    data = pa.ListArray.from_arrays(array(pa.int32(), offsets), values)
    shape = pa.FixedSizeListArray.from_arrays(array(pa.int32(), shapes), 2)
    return pa.StructArray.from_arrays([data, shape], fields=list(storage))
