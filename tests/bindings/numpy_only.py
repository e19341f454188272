"""The specification in NumPy: cards, layers, targets and routing in their plainest form, without the library's code."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa

from lora.testing.binding import PlainCard, PlainPair, Term

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
STORED = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64(), "bfloat16": pa.uint16()}
FIELDS = [f"lora.{field}" for field in ("format", "name", "rank", "alpha", "targets", "dtype", "metadata")]
TENSOR = "arrow.variable_shape_tensor"
LARGEST = 2**31 - 1


def need(holds: object, where: str, expected: object, found: object) -> None:
    """Refuse what does not hold, with what was expected, what was found, and where."""
    if not holds:
        raise ValueError(f"{where}: expected {expected}, found {found!r}")


# --- cards: R1, R7.2, R7.6 ---------------------------------------------------------------------------------------------


def check(card: PlainCard) -> None:
    """Refuse a card that breaks a rule; its scalings are resolved."""
    need(isinstance(card.name, str) and card.name, "name", "a string, not empty", card.name)
    need(type(card.rank) is int and card.rank >= 1, "rank", "an integer >= 1", card.rank)
    finite = isinstance(card.alpha, int | float) and 0 < card.alpha <= float(np.finfo(np.float64).max)
    need(finite, "alpha", "a finite number > 0", card.alpha)
    need(all(isinstance(target, str) for target in card.target_modules), "targets", "strings", card.target_modules)
    ranks, dtypes = set(), set()
    for module, (a, b, scaling) in card.weights.items():
        where = f"module {module!r}"
        need(a.ndim == b.ndim == 2, where, "A (in, rank) and B (rank, out)", (a.shape, b.shape))
        need(a.shape[1] == b.shape[0], where, f"B with {a.shape[1]} rows, the rank of A {a.shape}", b.shape)
        need(1 <= a.shape[1] <= card.rank, where, f"a rank from 1 to {card.rank}", a.shape[1])
        need(scaling is not None and np.isfinite(scaling), where, "a finite scaling, stated if ranks differ", scaling)
        ranks.add(a.shape[1])
        dtypes |= {a.dtype, b.dtype}
    need(not ranks or max(ranks) == card.rank, "rank", f"the largest one, {max(ranks, default=0)}", card.rank)
    need(len(dtypes) <= 1 and dtypes <= set(DTYPES.values()), "dtype", f"one of {', '.join(DTYPES)}", dtypes)


def checked(card: PlainCard) -> PlainCard:
    """The card in sorted order, each scaling stated: alpha / rank where it was not and the module's rank is the card's."""
    weights = {}
    for module, pair in sorted(card.weights.items(), key=lambda item: item[0]):
        stated = pair.scaling is not None or pair.A.shape[1:] != (card.rank,)
        weights[module] = pair if stated else pair._replace(scaling=card.alpha / card.rank)
    card = card._replace(weights=weights)
    check(card)
    return card


def write(card: PlainCard) -> bytes:
    """The card's file: modules and keys in sorted order, so that equal cards give equal bytes."""
    card = checked(card)
    metadata = json.dumps(card.metadata, sort_keys=True, allow_nan=False)
    need(json.loads(metadata) == card.metadata, "metadata", "a JSON object", card.metadata)
    pairs = card.weights.values()
    dtype = next((pair.A.dtype.name for pair in pairs), "float32")
    header = {
        "lora.format": "1.0",
        "lora.name": card.name,
        "lora.rank": str(card.rank),
        "lora.alpha": repr(float(card.alpha)),
        "lora.targets": json.dumps(card.target_modules),
        "lora.dtype": dtype,
        "lora.metadata": metadata,
    }
    taken = set(header) & set(card.extra)
    need(not taken, "extra", "no key of a card's own field", taken)
    header |= dict(sorted(card.extra.items()))
    columns = {
        "module": pa.array(list(card.weights), pa.string()),
        "scaling": pa.array([pair.scaling for pair in pairs], pa.float64()),
        "A": tensors("A", [pair.A for pair in pairs], STORED[dtype]),
        "B": tensors("B", [pair.B for pair in pairs], STORED[dtype]),
    }
    extension = {"ARROW:extension:name": TENSOR, "ARROW:extension:metadata": "{}"}
    fields = [
        pa.field(name, column.type, nullable=False, metadata=extension if name in {"A", "B"} else None)
        for name, column in columns.items()
    ]
    schema, out = pa.schema(fields, metadata=header), io.BytesIO()
    with pa.ipc.new_file(out, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    return out.getvalue()


def tensors(column: str, factors: Sequence[Array], stored: pa.DataType) -> pa.Array:
    """Storage of the canonical tensor type: struct<data: list<T>, shape: fixed_size_list<int32>[2]>."""
    offsets = np.cumsum([0, *(factor.size for factor in factors)])
    need(offsets[-1] <= LARGEST, f"column {column}", f"at most {LARGEST} elements", int(offsets[-1]))
    raw = b"".join(factor.tobytes() for factor in factors)  # row-major, every bit as it is
    data = pa.Array.from_buffers(stored, int(offsets[-1]), [None, pa.py_buffer(raw)])
    shapes = np.array([factor.shape for factor in factors], np.int32).ravel()
    parts = [
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), data),
        pa.FixedSizeListArray.from_arrays(pa.array(shapes, pa.int32()), 2),
    ]
    return pa.StructArray.from_arrays(parts, ["data", "shape"])


def read(data: bytes) -> PlainCard:
    """The card in a file; its factors are read-only views into the file's bytes."""
    buffer = pa.py_buffer(data)
    try:
        file = pa.ipc.open_file(buffer)
        need(file.num_record_batches == 1, "file", "one record batch", file.num_record_batches)
        batch = file.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"file: expected an Arrow IPC file, found {error}") from error
    fields, extra = header_of(batch.schema)
    dtype = fields["lora.dtype"]
    need(dtype in DTYPES, "lora.dtype", f"one of {', '.join(DTYPES)}", dtype)
    check_columns(batch, STORED[dtype], buffer)
    modules, scalings = batch["module"].to_pylist(), batch["scaling"].to_pylist()
    need(len(set(modules)) == len(modules), "column module", "each module once", modules)
    a, b = (factors_of(batch, column, DTYPES[dtype]) for column in ("A", "B"))
    card = PlainCard(
        name=fields["lora.name"],
        rank=int(decimal(fields, "lora.rank", "0123456789")),
        alpha=float(decimal(fields, "lora.alpha", "0123456789.+-eE")),
        target_modules=tuple(parsed(fields, "lora.targets", list)),
        weights={name: PlainPair(*pair) for name, *pair in zip(modules, a, b, scalings, strict=True)},
        metadata=parsed(fields, "lora.metadata", dict),
        extra=extra,
    )
    check(card)
    return card


def header_of(schema: pa.Schema) -> tuple[dict[str, str], dict[str, str]]:
    """A card's own fields, and all other keys."""
    texts = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    version = texts.get("lora.format", "")
    major, dot, minor = version.partition(".")
    need(major == "1" and dot and minor.isdecimal(), "lora.format", "version 1.x", version)
    own = {key: texts.pop(key, None) for key in FIELDS}
    for key, value in own.items():
        need(value is not None, "schema metadata", f"the key {key}", sorted(texts))
    fingerprint = texts.get("lora.base_fingerprint", "0" * 64)
    is_hash = len(fingerprint) == 64 and set(fingerprint.lower()) <= set("0123456789abcdef")
    need(is_hash, "lora.base_fingerprint", "64 hex digits", fingerprint)
    return own, texts


def decimal(fields: Mapping[str, str], key: str, characters: str) -> str:
    """A field that is a number in these characters (`int` and `float` alone would read ' 1_0', 'nan' and more)."""
    need(fields[key] and set(fields[key]) <= set(characters), key, "a decimal number", fields[key])
    return fields[key]


def parsed(fields: Mapping[str, str], key: str, kind: type) -> Any:
    """A field that is JSON."""
    try:
        value = json.loads(fields[key])
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: expected JSON, found {fields[key]!r}") from error
    need(isinstance(value, kind), key, f"a JSON {kind.__name__}", value)
    return value


def layout(kind: pa.DataType) -> str:
    """A type's layout: what a field may be null, or a list's items are called, is left out."""
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {layout(field.type)}' for field in kind)}>"
    if pa.types.is_list(kind):
        return f"list<{layout(kind.value_type)}>"
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<{layout(kind.value_type)}>[{kind.list_size}]"
    return str(kind)


def check_columns(batch: pa.RecordBatch, stored: pa.DataType, file: pa.Buffer) -> None:
    """Refuse other columns, types, nulls, and buffers that are compressed (hence elsewhere) or shared."""
    tensor = f"struct<data: list<{stored}>, shape: fixed_size_list<int32>[2]>"
    expected = {"module": "string", "scaling": "double", "A": tensor, "B": tensor}
    need(batch.schema.names == list(expected), "columns", list(expected), batch.schema.names)
    spans = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        where, kind = f"column {field.name}", field.type
        if field.name in {"A", "B"}:
            known = isinstance(kind, pa.BaseExtensionType)
            metadata = field.metadata or {}
            extension = kind.extension_name if known else metadata.get(b"ARROW:extension:name", b"").decode()
            need(extension == TENSOR, where, TENSOR, extension)
            need("permutation" not in f"{kind} {metadata}", where, "row-major factors", f"{kind} {metadata}")
            kind = kind.storage_type if known else kind
        need(layout(kind) == expected[field.name], where, expected[field.name], layout(kind))
        need(column.null_count == 0, where, "no nulls", column.null_count)
        spans += [
            (held.address, held.address + held.size) for held in column.buffers() if held is not None and held.size
        ]
    edges = [file.address, *(edge for span in sorted(spans) for edge in span), file.address + file.size]
    apart = edges == sorted(edges)
    need(apart, "buffers", "each in its own bytes of the file", "compressed or shared bytes")


def factors_of(batch: pa.RecordBatch, column: str, dtype: np.dtype[Any]) -> list[Array]:
    """The factors of a column."""
    storage = getattr(batch[column], "storage", batch[column])  # of a pyarrow that knows the extension type, or not
    data, shapes = storage.field("data"), storage.field("shape")
    nulls = sum(part.null_count for part in (data, data.values, shapes, shapes.values))
    need(nulls == 0, f"column {column}", "no nulls", nulls)
    values, offsets = data.values.to_numpy().view(dtype), data.offsets.to_pylist()
    factors = []
    for module, start, end, shape in zip(
        batch["module"].to_pylist(), offsets[:-1], offsets[1:], shapes.to_pylist(), strict=True
    ):
        fits = min(shape) >= 0 and shape[0] * shape[1] == end - start
        need(fits, f"factor {column} of module {module!r}", f"a shape of {end - start} elements", shape)
        factors.append(values[start:end].reshape(shape))
    return factors


# --- targets: R3.11 ----------------------------------------------------------------------------------------------------


def matches(module: str, suffix: str) -> bool:
    """Whether a dotted name equals a suffix or ends with it after a dot."""
    return module == suffix or module.endswith("." + suffix)


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Whether a Linear of this name is a target; "all-linear" stands for every one but an output head."""
    head = module.rpartition(".")[2] == "lm_head"
    return any(matches(module, target) or (target == "all-linear" and not head) for target in targets)


# --- routing: R4 -------------------------------------------------------------------------------------------------------


class Router:
    """Candidates by name, each with the unit vectors of its texts."""

    def __init__(self, embed: Callable[[Sequence[str]], Array]) -> None:
        self.embed, self.candidates = embed, {}

    def units(self, texts: Sequence[str]) -> Array:
        """Embeddings of length 1, or 0; dividing by the largest entry first keeps squares from over- or underflow."""
        vectors = np.asarray(self.embed(texts)).astype(np.float64)
        need(vectors.ndim == 2 and len(vectors) == len(texts), "embed", f"{len(texts)} vectors", vectors.shape)
        need(np.isfinite(vectors).all(), "embed", "finite numbers", vectors)
        largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0.0)
        vectors = vectors / np.where(largest == 0, 1.0, largest)
        length = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
        return vectors / np.where(length == 0, 1.0, length)

    def register(self, name: str, texts: Sequence[str], *, virtual: bool = False) -> None:
        """Put a candidate, virtual or not, in place of any of its name."""
        need(len(texts) >= 1 and not isinstance(texts, str), f"candidate {name!r}", "one or several texts", texts)
        self.candidates[name] = self.units(list(texts))

    def unregister(self, name: str) -> None:
        """Forget a candidate."""
        self.candidates.pop(name, None)

    def select(self, query: str, top_k: int, threshold: float | None) -> list[tuple[str, float]]:
        """The best candidates at or above the threshold: by rounded score, ties by name."""
        need(top_k >= 0, "top_k", "a number >= 0", top_k)
        unit = self.units([query])[0]
        scores = {
            name: round(float((rows * unit).sum(axis=1).max()), 6) + 0.0 for name, rows in self.candidates.items()
        }
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        return [(name, score) for name, score in ranked if threshold is None or score >= threshold][:top_k]

    def select_many(self, queries: Sequence[str], top_k: int, threshold: float | None) -> list[list[tuple[str, float]]]:
        """As `select`, for each query."""
        return [self.select(query, top_k, threshold) for query in queries]


# --- the border, and layers: R2, R8 ------------------------------------------------------------------------------------


class NumpyOnly:
    """The binding."""

    name, version = "numpy-only", "1"

    def write_card(self, card: PlainCard) -> bytes:
        """The card's file."""
        return write(card)

    def read_card(self, data: bytes) -> PlainCard:
        """The card in a file."""
        return read(data)

    @np.errstate(all="ignore")
    def forward(self, x: Array, weight: Array, bias: Array | None, terms: Mapping[str, Term]) -> Array:
        """``x Wᵀ + b + Σ (x @ A @ B) · scaling · weight``, summed in float32 or better, each stage rounded once."""
        wide = np.float64 if x.dtype == np.float64 else np.float32

        def rounded(array: Array) -> Array:
            return array.astype(x.dtype).astype(wide)

        rows = x.astype(wide)
        out = rounded(rows @ weight.T.astype(wide) + (0 if bias is None else bias.astype(wide)))
        for _, term in sorted(terms.items()):  # by name: the order they are given in changes nothing
            hidden = rounded(rows @ term.A.astype(wide))
            low = rounded(hidden @ term.B.astype(wide))
            out = rounded(out + rounded(low * wide(term.scaling * term.weight)))
        return out.astype(x.dtype)

    def match_targets(self, names: Sequence[str], targets: Sequence[str]) -> list[str]:
        """The names of Linears that these targets match."""
        return [name for name in names if is_target(name, targets)]

    def bind(self, card: PlainCard, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """Each targeted module's weight key, where it has one; a key of two modules, or two keys of one, are refused."""
        bound: dict[str, str] = {}
        for key, pair in checked(card).weights.items():
            modules = [
                module for module in self.match_targets(list(shapes), card.target_modules) if matches(module, key)
            ]
            need(len(modules) <= 1, f"weight key {key!r}", "one module", modules)
            for module in modules:
                need(module not in bound, f"module {module!r}", "one weight key", [bound.get(module), key])
                found = (pair.A.shape[0], pair.B.shape[1])
                need(found == tuple(shapes[module]), f"module {module!r}", f"(in, out) = {shapes[module]}", found)
                bound[module] = key
        return bound

    def make_router(self, embed: Callable[[Sequence[str]], Array]) -> Router:
        """An empty router."""
        return Router(embed)


BINDING = NumpyOnly()
