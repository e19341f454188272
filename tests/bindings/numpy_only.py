"""The specification in NumPy: plain formulas, without the library's code."""

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
STORED = {name: pa.from_numpy_dtype(dtype) for name, dtype in DTYPES.items()}
DTYPES["bfloat16"], STORED["bfloat16"] = np.dtype(ml_dtypes.bfloat16), pa.uint16()
FIELDS = [f"lora.{key}" for key in "format name rank alpha targets dtype metadata".split()]
TENSOR = "arrow.variable_shape_tensor"
LARGEST = 2**31 - 1


def need(holds: object, where: str, expected: object) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}")


# --- cards: R1, R7.2, R7.6


def check(card: PlainCard) -> None:
    """Refuse a card that breaks a rule; its scalings are resolved."""
    need(isinstance(card.name, str) and card.name, "name", "a string, not empty")
    need(type(card.rank) is int and card.rank >= 1, "rank", "an integer >= 1")
    finite = isinstance(card.alpha, int | float) and 0 < card.alpha <= np.finfo("f8").max
    need(finite, "alpha", "a finite number > 0")
    need(all(isinstance(target, str) for target in card.target_modules), "targets", "strings")
    ranks, dtypes = set(), set()
    for module, (a, b, scaling) in card.weights.items():
        where = f"module {module!r}"
        need(a.ndim == b.ndim == 2, where, "A (in, rank) and B (rank, out)")
        need(a.shape[1] == b.shape[0], where, f"B with {a.shape[1]} rows, the rank of A {a.shape}")
        need(1 <= a.shape[1] <= card.rank, where, f"a rank from 1 to {card.rank}")
        stated = scaling is not None and np.isfinite(scaling)
        need(stated, where, "a finite scaling, stated if ranks differ")
        ranks.add(a.shape[1])
        dtypes |= {a.dtype, b.dtype}
    need(not ranks or max(ranks) == card.rank, "rank", f"the largest one, {max(ranks, default=0)}")
    need(len(dtypes) <= 1 and dtypes <= {*DTYPES.values()}, "dtype", f"one of {', '.join(DTYPES)}")
    need(levels(card.metadata) <= 64, "metadata", "at most 64 levels")


def levels(value: object) -> int:
    """How deep lists and objects are nested in each other."""
    items = value.values() if isinstance(value, dict) else value
    return 1 + max(map(levels, items), default=0) if isinstance(value, dict | list) else 0


def checked(card: PlainCard) -> PlainCard:
    """The card in sorted order, with alpha / rank for a scaling that is not stated."""
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
    metadata = json.dumps(card.metadata, sort_keys=True, allow_nan=False, ensure_ascii=False)
    need(json.loads(metadata) == card.metadata, "metadata", "a JSON object")
    pairs = card.weights.values()
    dtype = next((pair.A.dtype.name for pair in pairs), "float32")
    values = ["1.0", card.name, str(card.rank), repr(float(card.alpha))]
    values += [json.dumps(card.target_modules), dtype, metadata]
    header = dict(zip(FIELDS, values, strict=True))
    taken = set(header) & set(card.extra)
    need(not taken, "extra", "no key of a card's own field")
    header |= dict(sorted(card.extra.items()))
    columns = {
        "module": pa.array(list(card.weights), pa.string()),
        "scaling": pa.array([pair.scaling for pair in pairs], pa.float64()),
        "A": tensors("A", [pair.A for pair in pairs], STORED[dtype]),
        "B": tensors("B", [pair.B for pair in pairs], STORED[dtype]),
    }
    dims = {"A": '["in","rank"]', "B": '["rank","out"]'}
    fields = []
    for name, column in columns.items():
        metadata = {"ARROW:extension:name": TENSOR} if name in dims else {}
        if metadata:
            metadata["ARROW:extension:metadata"] = f'{{"dim_names":{dims[name]}}}'
        fields.append(pa.field(name, column.type, nullable=False, metadata=metadata))
    schema, out = pa.schema(fields, metadata=header), io.BytesIO()
    with pa.ipc.new_file(out, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    return out.getvalue()


def tensors(column: str, factors: Sequence[Array], stored: pa.DataType) -> pa.Array:
    """Storage of the canonical tensor type."""
    offsets = np.cumsum([0, *(factor.size for factor in factors)])
    need(offsets[-1] <= LARGEST, f"column {column}", f"at most {LARGEST} elements")
    raw = b"".join(factor.tobytes() for factor in factors)  # row-major, every bit as it is
    data = pa.Array.from_buffers(stored, int(offsets[-1]), [None, pa.py_buffer(raw)])
    shapes = np.array([factor.shape for factor in factors], np.int32).ravel()
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), data)
    pairs = pa.FixedSizeListArray.from_arrays(pa.array(shapes, pa.int32()), 2)
    return pa.StructArray.from_arrays([lists, pairs], ["data", "shape"])


def read(data: bytes) -> PlainCard:
    """The card in a file; its factors are read-only views into the file's bytes."""
    buffer = pa.py_buffer(data)
    try:
        file = pa.ipc.open_file(buffer)
        need(file.num_record_batches == 1, "file", "one record batch")
        batch = file.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"file: expected an Arrow IPC file, found {error}") from error
    fields, extra = header_of(batch.schema)
    dtype = fields["lora.dtype"]
    need(dtype in DTYPES, "lora.dtype", f"one of {', '.join(DTYPES)}")
    check_columns(batch, STORED[dtype], buffer)
    modules, scalings = batch["module"].to_pylist(), batch["scaling"].to_pylist()
    need(len(set(modules)) == len(modules), "column module", "each module once")
    a, b = (factors_of(batch, column, DTYPES[dtype]) for column in ("A", "B"))
    pairs = map(PlainPair, a, b, scalings)
    card = PlainCard(
        name=fields["lora.name"],
        rank=int(decimal(fields, "lora.rank", "0123456789")),
        alpha=float(decimal(fields, "lora.alpha", "0123456789.+-eE")),
        target_modules=tuple(parsed(fields, "lora.targets", list)),
        weights=dict(zip(modules, pairs, strict=True)),
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
    need(major == "1" and dot and minor.isdecimal(), f"lora.format {version}", "version 1.x")
    own = {key: texts.pop(key, None) for key in FIELDS}
    for key, value in own.items():
        need(value is not None, "schema metadata", f"the key {key}")
    fingerprint = texts.get("lora.base_fingerprint", "0" * 64)
    is_hash = len(fingerprint) == 64 and set(fingerprint.lower()) <= set("0123456789abcdef")
    need(is_hash, "lora.base_fingerprint", "64 hex digits")
    return own, texts


def decimal(fields: Mapping[str, str], key: str, characters: str) -> str:
    """A field that is a number in these characters (`float` alone would read 'nan' and more)."""
    need(fields[key] and set(fields[key]) <= set(characters), key, "a decimal number")
    return fields[key]


def parsed(fields: Mapping[str, str], key: str, kind: type) -> Any:
    try:
        value = json.loads(fields[key])
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: expected JSON, found {fields[key]!r}") from error
    need(isinstance(value, kind), key, f"a JSON {kind.__name__}")
    return value


def layout(kind: pa.DataType) -> str:
    """A type's layout, without nullability and the names of items."""
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {layout(field.type)}' for field in kind)}>"
    if pa.types.is_list(kind):
        return f"list<{layout(kind.value_type)}>"
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<{layout(kind.value_type)}>[{kind.list_size}]"
    return str(kind)


def check_columns(batch: pa.RecordBatch, stored: pa.DataType, file: pa.Buffer) -> None:
    """Refuse other columns, types, nulls, and buffers that are compressed or shared."""
    tensor = f"struct<data: list<{stored}>, shape: fixed_size_list<int32>[2]>"
    expected = {"module": "string", "scaling": "double", "A": tensor, "B": tensor}
    need(batch.schema.names == list(expected), "columns", list(expected))
    spans = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        where, kind = f"column {field.name}", field.type
        if field.name in {"A", "B"}:
            known = isinstance(kind, pa.BaseExtensionType)
            metadata = field.metadata or {}
            name = metadata.get(b"ARROW:extension:name", b"").decode()
            extension = kind.extension_name if known else name
            need(extension == TENSOR, where, TENSOR)
            need("permutation" not in f"{kind} {metadata}", where, "row-major factors")
            kind = kind.storage_type if known else kind
        need(layout(kind) == expected[field.name], where, expected[field.name])
        need(column.null_count == 0, where, "no nulls")
        buffers = [part for part in column.buffers() if part is not None and part.size]
        spans += [(part.address, part.address + part.size) for part in buffers]
    inner = [edge for span in sorted(spans) for edge in span]
    edges = [file.address, *inner, file.address + file.size]
    need(edges == sorted(edges), "buffers", "each in its own bytes of the file")


def factors_of(batch: pa.RecordBatch, column: str, dtype: np.dtype[Any]) -> list[Array]:
    # Only some versions of pyarrow know the extension type.
    storage = getattr(batch[column], "storage", batch[column])
    data, shapes = storage.field("data"), storage.field("shape")
    nulls = sum(part.null_count for part in (data, data.values, shapes, shapes.values))
    need(nulls == 0, f"column {column}", "no nulls")
    values, offsets = data.values.to_numpy().view(dtype), data.offsets.to_pylist()
    factors = []
    spans = zip(offsets[:-1], offsets[1:], shapes.to_pylist(), strict=True)
    for module, (start, end, shape) in zip(batch["module"].to_pylist(), spans, strict=True):
        fits = min(shape) >= 0 and shape[0] * shape[1] == end - start
        need(fits, f"factor {column} of module {module!r}", f"a shape of {end - start} elements")
        factors.append(values[start:end].reshape(shape))
    return factors


# --- targets: R3.11


def matches(module: str, suffix: str) -> bool:
    """Whether a dotted name equals a suffix or ends with it after a dot."""
    return module == suffix or module.endswith("." + suffix)


HEADS = {"lm_head", "embed_out", "output_projection", "cls", "classifier", "score", "qa_outputs"}
HEADS |= {"logits", "head"}


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Whether a Linear of this name is a target; "all-linear" leaves out output heads."""
    every = "all-linear" in targets and HEADS.isdisjoint(module.split("."))
    return every or any(matches(module, target) for target in targets)


# --- routing: R4


class Router:
    """Candidates by name, each with the unit vectors of its texts."""

    def __init__(self, embed: Callable[[Sequence[str]], Array]) -> None:
        self.embed, self.candidates = embed, {}

    def units(self, texts: Sequence[str]) -> Array:
        """Embeddings of length 1, or 0; squares of entries of at most 1 can't overflow."""
        vectors = np.asarray(self.embed(texts)).astype(np.float64)
        need(vectors.ndim == 2 and len(vectors) == len(texts), "embed", f"{len(texts)} vectors")
        need(np.isfinite(vectors).all(), "embed", "finite numbers")
        largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0.0)
        vectors = vectors / np.where(largest == 0, 1.0, largest)
        length = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
        return vectors / np.where(length == 0, 1.0, length)

    def register(self, name: str, texts: Sequence[str], *, virtual: bool = False) -> None:
        """Put a candidate, virtual or not, in place of any of its name."""
        several = len(texts) >= 1 and not isinstance(texts, str)
        need(several, f"candidate {name!r}", "one or several texts")
        self.candidates[name] = self.units(list(texts))

    def unregister(self, name: str) -> None:
        self.candidates.pop(name, None)

    def select(self, query: str, top_k: int, threshold: float | None) -> list[tuple[str, float]]:
        """The best candidates at or above the threshold: by rounded score, ties by name."""
        need(top_k >= 0, "top_k", "a number >= 0")
        unit = self.units([query])[0]
        ranked = []
        for name, rows in self.candidates.items():
            score = round(float((rows * unit).sum(axis=1).max()), 6) + 0.0
            if threshold is None or score >= threshold:
                ranked.append((name, score))
        return sorted(ranked, key=lambda item: (-item[1], item[0]))[:top_k]

    def select_many(self, queries, top_k, threshold):
        return [self.select(query, top_k, threshold) for query in queries]


# --- merging: R20

OPTIONS = {"weighted": {"normalize"}, "slerp": {"t"}}
OPTIONS |= {"ties": {"density", "elect"}, "dare": {"density", "seed"}}
STRATEGIES = {"average", "task_arithmetic", "cat", *OPTIONS}


def merged(cards, strategy, options, weights, rank) -> PlainCard:
    """The cards' ΔW combined module by module, each cut by SVD to its rank."""
    need(strategy in STRATEGIES, "strategy", f"one of {sorted(STRATEGIES)}")
    need(set(options) <= OPTIONS.get(strategy, set()), strategy, f"options {OPTIONS.get(strategy)}")
    need(cards and (rank is None or rank >= 1), "merge", "cards, and a rank >= 1")
    need(strategy not in {"average", "slerp"} or weights is None, strategy, "no weights")
    need(strategy != "cat" or rank is None, strategy, "no rank")
    weights = [1.0] * len(cards) if weights is None else list(weights)
    finite = len(weights) == len(cards) and np.isfinite(weights).all()
    need(finite, "weights", "a finite one per card")
    cards, shapes, dtypes = [checked(card) for card in cards], {}, set()
    for card in cards:
        for module, (a, b, _) in card.weights.items():
            shape = (b.shape[1], a.shape[0])
            need(shapes.setdefault(module, shape) == shape, f"module {module!r}", shapes[module])
            finite = np.isfinite(a.astype("f8")).all() and np.isfinite(b.astype("f8")).all()
            need(finite, f"module {module!r}", "finite factors")
            dtypes.add(a.dtype)
    wide = np.dtype("f8") if np.dtype("f8") in dtypes else np.dtype("f4")
    dtype = dtypes.pop() if len(dtypes) == 1 else wide
    whole = [{name: change(card, name, shape) for name, shape in shapes.items()} for card in cards]
    if strategy == "average":
        weights = [1 / len(cards)] * len(cards)
    if strategy == "slerp":
        need(len(cards) == 2, "slerp", "two cards")
        weights = arc(*whole, options.get("t", 0.5))
    if options.get("normalize", False):
        need(sum(weights) != 0, "weights", "a sum to divide by")
        weights = [weight / sum(weights) for weight in weights]
    results = {}
    for module in sorted(shapes):
        parts = [changes[module] for changes in whole]
        scaled = [part * weight for part, weight in zip(parts, weights, strict=True)]
        largest = max(card.weights[module].A.shape[1] for card in cards if module in card.weights)
        if strategy == "ties":
            total = ties(parts, weights, options.get("density", 0.5), options.get("elect", "mass"))
        elif strategy == "dare":
            names = [card.name for card in cards]
            need(len(set(names)) == len(names), "dare", "names that differ")
            keys = [f"{options.get('seed', 0)}|{len(module)}|{module}|{name}" for name in names]
            total = dare(parts, weights, options.get("density", 0.5), keys)
        else:
            total, largest = sum(scaled), None
        noise = sum(abs(part).max() for part in scaled) * 1e-13
        if abs(total).max() > noise:
            results[module] = cut(total, rank or largest, dtype)
    top = max((pair.A.shape[1] for pair in results.values()), default=1)
    targets = tuple(sorted({target for card in cards for target in card.target_modules}))
    metadata = {"merged from": [card.name for card in cards]}
    return PlainCard("merged", top, float(top), targets, results, metadata, {})


def change(card: PlainCard, module: str, shape: tuple[int, int]) -> Array:
    """ΔW = scaling · (A @ B).T in float64, 0 where the card has no such module."""
    if module not in card.weights:
        return np.zeros(shape)
    a, b, scaling = card.weights[module]
    return (a.astype("f8") @ b.astype("f8")).T * scaling


def cut(total: Array, rank: int | None, dtype: np.dtype[Any]) -> PlainPair:
    """Factors of the best approximation, half of each singular value on either side."""
    u, s, v = np.linalg.svd(total, full_matrices=False)
    kept = min(rank or len(s), int((s > s[0] * 1e-13).sum()))
    root = np.sqrt(s[:kept])
    return PlainPair((v[:kept].T * root).astype(dtype), (u[:, :kept] * root).T.astype(dtype), 1.0)


def arc(one: Mapping[str, Array], two: Mapping[str, Array], t: float) -> list[float]:
    """Weights of two cards: the direction turns evenly, the length goes linearly."""
    need(0 <= t <= 1, "t", "from 0 to 1")
    flat = [[part.ravel() for part in card.values()] for card in (one, two)]
    x, y = (np.concatenate([np.zeros(1), *parts]) for parts in flat)
    lengths = [float(np.sqrt((point * point).sum())) for point in (x, y)]
    need(min(lengths) > 0, "slerp", "cards that are not 0")
    x, y = x / lengths[0], y / lengths[1]
    apart, together = (float(np.sqrt((point * point).sum())) for point in (x - y, x + y))
    angle = 2 * np.arctan2(apart, together)
    need(np.pi - angle >= 1e-3, "slerp", "directions that are not opposite")
    length = (1 - t) * lengths[0] + t * lengths[1]
    first, second = 1 - t, t
    if angle > 1e-6:
        first, second = (float(np.sin(share * angle) / np.sin(angle)) for share in (1 - t, t))
    return [length * first / lengths[0], length * second / lengths[1]]


def ties(parts: Sequence[Array], weights: Sequence[float], density: float, elect: str) -> Array:
    """Trim each, elect a sign for each entry, and average what has it."""
    need(0 < density <= 1, "density", "the share kept, above 0")
    need(elect in {"mass", "count"}, "elect", "mass or count")
    trimmed = []
    for part in parts:
        flat = part.ravel()
        first = sorted(range(flat.size), key=lambda i, flat=flat: (-abs(flat[i]), i))
        kept = first[: max(1, round(density * flat.size))]
        trimmed.append(np.isin(np.arange(flat.size), kept).reshape(part.shape) * part)
    stacked = np.array([part * weight for part, weight in zip(trimmed, weights, strict=True)])
    sign = np.sign((stacked if elect == "mass" else np.sign(stacked)).sum(axis=0))
    agrees = (np.sign(stacked) == sign) & (sign != 0)
    share = (agrees * abs(np.array(weights))[:, None, None]).sum(axis=0)
    return (stacked * agrees).sum(axis=0) / np.where(share > 0, share, 1)


def dare(parts, weights, density, keys) -> Array:
    """Keep entries by chance, with a generator for each card's module, and rescale what is kept."""
    need(0 < density <= 1, "density", "the share kept, above 0")
    total = np.zeros_like(parts[0])
    for part, weight, key in zip(parts, weights, keys, strict=True):
        kept = np.random.default_rng([*key.encode()]).random(part.shape) < density
        total = total + kept * part * weight / density
    return total


# --- extraction: R16


def low_rank(delta: Array, rank, energy, error) -> tuple[Array, Array]:
    """A and B of the smallest rank that will do, by singular value decomposition of ΔW."""
    left, values, right = np.linalg.svd(delta.T, full_matrices=False)
    lost = [float(np.sqrt((values[k:] ** 2).sum())) for k in range(1, len(values) + 1)]
    whole = float(np.sqrt((values**2).sum()))
    if energy is not None:
        error = np.sqrt(max(0.0, 1 - energy))
    enough = (k for k, at in enumerate(lost, 1) if error is not None and at <= error * whole)
    k = min(rank, len(values)) if error is None else next(enough)
    root = np.sqrt(values[:k])
    return left[:, :k] * root, root[:, None] * right[:k]


def extracted(base, tuned, rank, energy, error) -> PlainCard:
    """A card with scaling 1 for every module that differs; computed in float64."""
    need(sum(rule is not None for rule in (rank, energy, error)) == 1, "rank", "one rule")
    need(rank is None or (type(rank) is int and rank >= 1), "rank", "an integer >= 1")
    need(energy is None or 0 < energy <= 1, "energy", "a share in (0, 1]")
    need(error is None or 0 <= error < 1, "error", "a bound in [0, 1)")
    need(set(base) == set(tuned), "weights", "the same names in both")
    weights = {}
    for key in sorted(base):
        module = key.removesuffix("weight").removesuffix(".")
        need(base[key].shape == tuned[key].shape, key, f"shape {base[key].shape}")
        delta = tuned[key].astype(np.float64) - base[key].astype(np.float64)
        need(np.isfinite(delta).all(), key, "finite weights")
        if delta.any():
            weights[module] = PlainPair(*low_rank(delta, rank, energy, error), 1.0)
    need(weights, "weights", "some that differ")
    largest = max(pair.A.shape[1] for pair in weights.values())
    return PlainCard("extracted", largest, float(largest), ("all-linear",), weights, {}, {})


# --- the border, and layers: R2, R8


class NumpyOnly:
    """The binding."""

    name, version = "numpy-only", "1"

    write_card, read_card = staticmethod(write), staticmethod(read)
    extract, make_router = staticmethod(extracted), staticmethod(Router)

    @np.errstate(all="ignore")
    def forward(self, x: Array, weight: Array, bias: Array | None, terms: Mapping[str, Term]):
        """``x Wᵀ + b + Σ (x @ A @ B) · scaling · weight``, in float32 or better, stage by stage."""
        wide = np.float64 if x.dtype == np.float64 else np.float32

        def rounded(array: Array) -> Array:
            return array.astype(x.dtype).astype(wide)

        rows = x.astype(wide)
        out = rounded(rows @ weight.T.astype(wide) + (0 if bias is None else bias.astype(wide)))
        for _, term in sorted(terms.items()):  # by name: their order changes nothing
            hidden = rounded(rows @ term.A.astype(wide))
            low = rounded(hidden @ term.B.astype(wide))
            out = rounded(out + rounded(low * wide(term.scaling * term.weight)))
        return out.astype(x.dtype)

    def match_targets(self, names: Sequence[str], targets: Sequence[str]) -> list[str]:
        return [name for name in names if is_target(name, targets)]

    def bind(self, card: PlainCard, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """Each targeted module's weight key, if it has one; ambiguous keys are refused."""
        bound: dict[str, str] = {}
        for key, pair in checked(card).weights.items():
            targeted = self.match_targets(list(shapes), card.target_modules)
            modules = [module for module in targeted if matches(module, key)]
            need(len(modules) <= 1, f"weight key {key!r}", "one module")
            for module in modules:
                need(module not in bound, f"module {module!r}", "one weight key")
                shape = (pair.A.shape[0], pair.B.shape[1])
                need(shape == tuple(shapes[module]), module, f"(in, out) = {shapes[module]}")
                bound[module] = key
        return bound

    def merge(self, cards, strategy, options, weights, rank):
        return merged(list(cards), strategy, dict(options), weights, rank)


BINDING = NumpyOnly()
