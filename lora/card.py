"""The values everything else is made of: a factor pair, a card, and a set of weighted cards.

All three are checked where they are made and never change afterwards, so they may be shared by any
number of threads, models and processes. They compare and hash by content, bit for bit: two NaNs
with one payload are the same factor, ``+0`` and ``-0`` are not.

Requirements: R1, R7, R8.
"""

import json
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lora.checks import finite, integer, is_digest
from lora.errors import ArgumentError, CardError, ConflictError, shown

Array: TypeAlias = npt.NDArray[Any]

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "float16": np.dtype(np.float16),
        "float32": np.dtype(np.float32),
        "float64": np.dtype(np.float64),
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
    }
)
"""The dtypes a card may have, by the name that the file declares."""

FIELD_KEYS = frozenset(
    f"lora.{field}"
    for field in (
        "format",
        "name",
        "rank",
        "alpha",
        "targets",
        "dtype",
        "metadata",
        "base_model",
        "base_fingerprint",
    )
)
"""The schema metadata keys that carry a card's fields; `LoRACard.extra` may hold any others."""

MAX_RANK = 2**31 - 1
"""Shapes in a card's file are int32."""

MAX_DEPTH = 64
"""Levels of nesting that metadata may have: every JSON reader takes that many, whatever called it."""

_NATIVE = frozenset(DTYPES.values())

_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class FrozenJSON(Mapping[str, Any]):
    """A JSON object as a value: every read gives a fresh copy, so nothing can be changed through
    it.

    Args:
        values: A mapping with string keys and JSON values, nested at most `MAX_DEPTH` deep; NaN and
            infinities are not JSON.
        where: Named in the error when `values` is not JSON.

    Examples:
        >>> FrozenJSON({"version": "1.0.0", "tags": ["python"]})["tags"]
        ['python']
    """

    __slots__ = ("text",)
    text: str

    def __init__(self, values: Mapping[str, Any], where: str = "metadata") -> None:
        text = values.text if isinstance(values, FrozenJSON) else _json_text(values, where)
        object.__setattr__(self, "text", text)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"FrozenJSON is immutable: {name!r} can't be set")

    def __getitem__(self, key: str) -> Any:
        return json.loads(self.text)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(json.loads(self.text))

    def __len__(self) -> int:
        return len(json.loads(self.text))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenJSON):
            return self.text == other.text
        return isinstance(other, Mapping) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (json.loads(self.text),)


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """One pair of LoRA factors: ΔW = scaling · (A @ B).T for a Linear whose weight is ``(out,
    in)``.

    Args:
        A: Shape ``(in, r)``. A read-only array is kept as it is; one that can be written to, itself
            or as what it is a view of, is copied.
        B: Shape ``(r, out)``, of A's dtype.
        scaling: What A @ B is multiplied with. ``None`` takes ``alpha / rank`` of the card that the
            pair is put into.

    Raises:
        CardError: If a factor is not a two-dimensional, non-empty array of one of `DTYPES`, if the
            two disagree in rank or dtype, or if `scaling` is not finite.

    Examples:
        >>> import numpy as np
        >>> pair = LowRank(np.zeros((384, 8), np.float32), np.zeros((8, 384), np.float32), scaling=2.0)
        >>> pair.rank, pair.in_features, pair.out_features
        (8, 384, 384)
    """

    A: Array
    B: Array
    scaling: float | None = None

    def __post_init__(self) -> None:
        a, b = _factor(self.A, "A"), _factor(self.B, "B")
        if a.dtype != b.dtype:
            raise CardError("factor B", f"A's dtype {a.dtype}", b.dtype, "a card has one dtype")
        if a.shape[1] != b.shape[0]:
            raise CardError("factor B", f"shape (r, out) with A's r = {a.shape[1]}", b.shape)
        put = object.__setattr__
        if a is not self.A:
            put(self, "A", a)
        if b is not self.B:
            put(self, "B", b)
        if self.scaling is not None:
            put(self, "scaling", finite(self.scaling, "scaling") + 0.0)

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return int(self.A.shape[1])

    @property
    def in_features(self) -> int:
        """Rows of A: the input dimension of the Linear."""
        return int(self.A.shape[0])

    @property
    def out_features(self) -> int:
        """Columns of B: the output dimension of the Linear."""
        return int(self.B.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The factors' dtype."""
        return self.A.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return int(self.A.nbytes + self.B.nbytes)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, LowRank):
            return NotImplemented
        return (
            self.scaling == other.scaling
            and same_bits(self.A, other.A)
            and same_bits(self.B, other.B)
        )

    def __hash__(self) -> int:
        return hash((self.A.shape, self.B.shape, self.dtype, self.scaling))

    def __repr__(self) -> str:
        return f"LowRank({self.in_features} -> {self.rank} -> {self.out_features}, {self.dtype}, scaling={self.scaling})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.A, self.B, self.scaling)


@dataclass(frozen=True, eq=False, repr=False)
class LoRACard:
    """A LoRA adapter as an immutable value.

    Args:
        name: Non-empty and printable.
        rank: Integer >= 1: the largest rank of any module.
        alpha: Finite and > 0. A pair without a scaling gets ``alpha / rank``.
        target_modules: Names of the modules to adapt: a module matches if its dotted name equals a
            target or ends with ``"." + target``; ``"all-linear"`` matches every Linear except an
            output head. A single string is one target.
        weights: One `LowRank` per module, keyed by (a dotted suffix of) the module's name. All of
            one dtype.
        metadata: Any JSON object: version, author, description …
        base_model, base_fingerprint: Name of the model that the card was made for, and the SHA-256
            of its targeted weights (64 hex digits).
        extra: Schema metadata of a file that this version of the format does not know; kept on a
            round trip.

    Raises:
        CardError: Naming the field, what it should be, and what it was.

    Examples:
        >>> import numpy as np
        >>> pair = LowRank(np.ones((4, 2), np.float32), np.ones((2, 3), np.float32))
        >>> card = LoRACard("docs", 2, 4.0, ["query"], {"layer.0.query": pair}, {"description": "Python documentation"})
        >>> card.weights["layer.0.query"].scaling, card.num_params, card.nbytes
        (2.0, 14, 56)
    """

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    weights: Mapping[str, LowRank]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    base_fingerprint: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable():
            raise CardError("card name", "non-empty printable text", shown(self.name))
        where = f"card {shown(self.name)}"
        put(self, "rank", _rank(self.rank, f"{where}: rank"))
        put(self, "alpha", _alpha(self.alpha, f"{where}: alpha"))
        put(self, "target_modules", _targets(self.target_modules, f"{where}: target_modules"))
        put(self, "weights", _weights(self.weights, self.rank, self.alpha, where))
        put(self, "metadata", FrozenJSON(self.metadata, f"{where}: metadata"))
        put(self, "extra", _extra(self.extra, f"{where}: extra"))
        if self.base_model is not None and not (
            isinstance(self.base_model, str) and self.base_model.isprintable()
        ):
            raise CardError(
                f"{where}: base_model", "printable text or None", shown(self.base_model)
            )
        if self.base_fingerprint is not None and not is_digest(self.base_fingerprint):
            raise CardError(
                f"{where}: base_fingerprint",
                "64 lower-case hex digits or None",
                shown(self.base_fingerprint),
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The one dtype of all factors; float32 for a card without weights."""
        return next((pair.dtype for pair in self.weights.values()), DTYPES["float32"])

    @property
    def num_params(self) -> int:
        """Number of elements in all factors."""
        return sum(pair.A.size + pair.B.size for pair in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(pair.nbytes for pair in self.weights.values())

    @cached_property
    def _values(self) -> tuple[Any, ...]:
        return (
            self.name,
            self.rank,
            self.alpha,
            self.target_modules,
            tuple(self.weights.items()),
            self.metadata,
            self.base_model,
            self.base_fingerprint,
            self.extra,
        )

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return self._values == other._values if isinstance(other, LoRACard) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values)

    def __repr__(self) -> str:
        return (
            f"LoRACard({self.name!r}, rank={self.rank}, alpha={self.alpha}, target_modules={self.target_modules}, "
            f"{len(self.weights)} modules, {self.num_params} parameters, {self.dtype})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        name, rank, alpha, targets, weights, metadata, base, fingerprint, extra = self._values
        return type(self), (
            name,
            rank,
            alpha,
            targets,
            dict(weights),
            metadata,
            base,
            fingerprint,
            extra,
        )


Adapters: TypeAlias = (
    "AdapterSet | LoRACard | Mapping[str, LoRACard | tuple[LoRACard, float]] | Iterable[LoRACard]"
)
"""What is accepted wherever a set of cards is asked for."""


class AdapterSet(Mapping[str, tuple[LoRACard, float]]):
    """An immutable set of cards with weights: what is active, prepared, rolled back to, or asked
    for by one text.

    A mapping from card name to ``(card, weight)``, sorted by name. A layer computes ``base(x) + Σ
    weight · scaling · (x @ A @ B)``.

    ``a | b`` joins two sets (what both hold must be equal), ``a + b`` adds weights, ``a * s``
    scales them.

    Args:
        adapters: A mapping ``name -> card`` or ``name -> (card, weight)``, one card, an iterable of
            cards, or a set.

    Raises:
        ConflictError: If one name stands for two different cards.
        ArgumentError: If a key is not its card's name, or a weight is not finite.

    Examples:
        >>> import numpy as np
        >>> card = LoRACard("docs", 1, 1.0, ["q"], {"q": LowRank(np.ones((2, 1)), np.ones((1, 2)))})
        >>> (AdapterSet(card) * 0.5 + AdapterSet(card)).weight("docs")
        1.5
    """

    __slots__ = ("_entries", "_hash")
    _entries: Mapping[str, tuple[LoRACard, float]]
    _hash: int

    def __init__(self, adapters: Adapters = ()) -> None:
        entries: dict[str, tuple[LoRACard, float]] = {}
        for name, card, weight in _entries(adapters):
            if not isinstance(card, LoRACard):
                raise ArgumentError("adapter set", "LoRACard values", type(card).__name__)
            if name != card.name:
                raise ArgumentError(
                    f"adapter set: key {shown(name)}", "the card's own name", repr(card.name)
                )
            if name in entries and entries[name][0] != card:
                raise ConflictError(
                    f"adapter set: {name!r}", "one card per name", "two different cards"
                )
            entries[name] = (card, finite(weight, f"weight of {name!r}", ArgumentError))
        object.__setattr__(self, "_entries", MappingProxyType(dict(sorted(entries.items()))))
        object.__setattr__(self, "_hash", hash(tuple(self._entries.items())))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"AdapterSet is immutable: {name!r} can't be set")

    def weight(self, name: str) -> float:
        """Weight of the card called `name`; 0 if it is not in the set."""
        return self._entries[name][1] if name in self._entries else 0.0

    def without(self, name: str) -> "AdapterSet":
        """The set less the card called `name`."""
        return AdapterSet({key: entry for key, entry in self._entries.items() if key != name})

    def __getitem__(self, name: str) -> tuple[LoRACard, float]:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __or__(self, other: Adapters) -> "AdapterSet":
        other = AdapterSet(other)
        for name in self.keys() & other.keys():
            if self[name] != other[name]:
                raise ConflictError(
                    f"union of adapter sets: {name!r}",
                    "the same card and weight on both sides",
                    f"weights {self.weight(name)} and {other.weight(name)}"
                    if self[name][0] == other[name][0]
                    else "two different cards",
                )
        return AdapterSet({**self._entries, **other._entries})

    def __add__(self, other: Adapters) -> "AdapterSet":
        other = AdapterSet(other)
        joined = AdapterSet(
            [*(card for card, _ in self.values()), *(card for card, _ in other.values())]
        )
        return AdapterSet(
            {n: (card, self.weight(n) + other.weight(n)) for n, (card, _) in joined.items()}
        )

    def __mul__(self, factor: float) -> "AdapterSet":
        factor = finite(factor, "factor of an adapter set", ArgumentError)
        return AdapterSet({name: (card, weight * factor) for name, (card, weight) in self.items()})

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return self._entries == other._entries if isinstance(other, AdapterSet) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return (
            f"AdapterSet({', '.join(f'{name!r}: {weight}' for name, (_, weight) in self.items())})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self._entries),)


def interpolate(a: AdapterSet, b: AdapterSet, t: float) -> AdapterSet:
    """``(1 - t) · a + t · b``: the set a fraction `t` of the way from `a` to `b`."""
    t = finite(t, "t", ArgumentError)
    return AdapterSet(a) * (1 - t) + AdapterSet(b) * t


def check_card(card: object) -> None:
    """Refuse what is not a card.

    Raises:
        ArgumentError: Naming the type that it is of.
    """
    if not isinstance(card, LoRACard):
        raise ArgumentError("card", "a LoRACard", type(card).__name__)


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have one shape, one dtype and the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = _BITS[a.dtype.itemsize]
    return bool(np.array_equal(a.view(bits), b.view(bits)))


def _factor(array: Array, which: str) -> Array:
    if not isinstance(array, np.ndarray) or array.ndim != 2 or 0 in array.shape:
        found = f"shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise CardError(f"factor {which}", "a two-dimensional, non-empty NumPy array", found)
    if (
        type(array) is np.ndarray
        and array.dtype in _NATIVE
        and array.flags.c_contiguous
        and _frozen(array)
    ):
        return array
    native = array.dtype.newbyteorder("=")
    if native not in _NATIVE:
        raise CardError(f"factor {which}", f"a dtype of {', '.join(DTYPES)}", array.dtype)
    array = np.array(array, dtype=native, order="C", copy=True, subok=False)
    array.flags.writeable = False
    return array


def _frozen(array: Array) -> bool:
    """Whether neither the array nor one that it is a view of can be written to."""
    base: object = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return False
        base = base.base
    return True


def _rank(value: object, where: str) -> int:
    try:
        rank = integer(value, where)
    except ArgumentError:
        rank = 0
    if not 1 <= rank <= MAX_RANK:
        raise CardError(where, f"an integer >= 1 and <= {MAX_RANK}", shown(value))
    return rank


def _alpha(value: object, where: str) -> float:
    try:
        alpha = finite(value, where)
    except CardError:
        alpha = 0.0
    if alpha <= 0:
        raise CardError(where, "a finite number > 0", shown(value))
    return alpha


def _targets(targets: Iterable[str] | str, where: str) -> tuple[str, ...]:
    if not isinstance(targets, Iterable):
        raise CardError(where, "printable names", shown(targets))
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    for target in names:
        if not isinstance(target, str) or not target.isprintable():
            raise CardError(where, "printable names", shown(target))
    if len(set(names)) != len(names):
        raise CardError(where, "each target once", shown(names))
    return tuple(sorted(names)) if isinstance(targets, set | frozenset) else names


def _weights(
    weights: Mapping[str, LowRank], rank: int, alpha: float, where: str
) -> Mapping[str, LowRank]:
    if not isinstance(weights, Mapping):
        raise CardError(
            f"{where}: weights", "a mapping of module name to LowRank", type(weights).__name__
        )
    for entry in weights.items():
        if (
            not isinstance(entry[0], str)
            or not entry[0].isprintable()
            or not isinstance(entry[1], LowRank)
        ):
            raise CardError(
                f"{where}: weights", "printable module names and LowRank values", shown(entry)
            )
    resolved: dict[str, LowRank] = {}
    for module, pair in sorted(weights.items(), key=operator.itemgetter(0)):
        if pair.scaling is None and pair.rank != rank:
            raise CardError(
                f"{where}: module {module!r}",
                f"the card's rank {rank}, or an explicit scaling",
                f"rank {pair.rank} without a scaling",
            )
        resolved[module] = LowRank(pair.A, pair.B, alpha / rank) if pair.scaling is None else pair
    dtypes = {pair.dtype for pair in resolved.values()}
    if len(dtypes) > 1:
        raise CardError(f"{where}: weights", "one dtype", " and ".join(sorted(map(str, dtypes))))
    if resolved and (largest := max(pair.rank for pair in resolved.values())) != rank:
        raise CardError(f"{where}: rank", f"the largest rank of its modules, {largest}", rank)
    return MappingProxyType(resolved)


def _extra(extra: Mapping[str, str], where: str) -> FrozenJSON:
    if not isinstance(extra, Mapping):
        raise CardError(where, "a mapping of text to text", shown(extra))
    for key, value in extra.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CardError(where, "text keys and text values", shown((key, value)))
        if key in FIELD_KEYS:
            raise CardError(where, "keys that are not the card's own fields", repr(key))
    return FrozenJSON(extra, where)


def _json_text(values: Mapping[str, Any], where: str) -> str:
    if not isinstance(values, Mapping):
        raise CardError(where, "a JSON object", shown(values))
    _check_keys(values, where)
    try:
        text = json.dumps(
            dict(values), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
        )
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CardError(where, "a JSON object", error) from error
    return text


def _check_keys(value: object, where: str, depth: int = 0) -> None:
    """Refuse keys that JSON would silently turn into text, and what is nested too deep."""
    if depth > MAX_DEPTH:
        raise CardError(where, f"at most {MAX_DEPTH} levels of nesting", "more")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CardError(where, "a JSON object with text keys", shown(key))
            _check_keys(item, where, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item, where, depth + 1)


def _entries(adapters: Adapters) -> Iterator[tuple[str, LoRACard, float]]:
    if isinstance(adapters, LoRACard):
        adapters = (adapters,)
    if isinstance(adapters, Mapping):
        for name, entry in adapters.items():
            if isinstance(entry, tuple) and len(entry) != 2:
                raise ArgumentError(
                    f"adapter set: {shown(name)}", "a card or (card, weight)", shown(entry)
                )
            card, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
            yield name, card, weight
    elif isinstance(adapters, Iterable):
        for card in adapters:
            yield getattr(card, "name", ""), card, 1.0
    else:
        raise ArgumentError(
            "adapter set", "a card, a mapping or an iterable of cards", shown(adapters)
        )
