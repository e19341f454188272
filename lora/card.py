"""The values that everything else is made of: a factor pair, a card, and a set of weighted cards.

Each is checked where it is made and never changes, so threads and models may share it. Factors
compare bit by bit: two NaNs of one payload are equal, +0 and -0 are not.

Requirements: R1, R7, R8.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lora.checks import finite, is_digest, require
from lora.errors import ArgumentError, CardError, ConflictError, shown

Array: TypeAlias = npt.NDArray[Any]

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        kind.__name__: np.dtype(kind)
        for kind in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    }
)
"""The dtypes that a card may have, by the name in its file."""

_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
).encode

_NATIVE = frozenset(DTYPES.values())

FIELD_KEYS = frozenset(
    {
        "lora.format",
        "lora.name",
        "lora.rank",
        "lora.alpha",
        "lora.targets",
        "lora.dtype",
        "lora.metadata",
        "lora.base_model",
        "lora.base_fingerprint",
    }
)
"""The schema metadata keys of a card's fields; `LoRACard.extra` may have any others."""

MAX_RANK = 2**31 - 1
"""Shapes in a card's file are int32."""

MAX_DEPTH = 64
"""Levels of nesting that metadata may have; every JSON reader can read that many."""


@dataclass(frozen=True, init=False, eq=False, repr=False)
class FrozenJSON(Mapping[str, Any]):
    """A JSON object as a value: every read gives a fresh copy.

    Args:
        values: A mapping of text to JSON values.
        where: Named in errors.

    Examples:
        >>> FrozenJSON({"version": "1.0.0", "tags": ["python"]})["tags"]
        ['python']
    """

    text: str

    def __init__(self, values: Mapping[str, Any], where: str = "metadata") -> None:
        if isinstance(values, FrozenJSON):
            text = values.text
        else:
            require(isinstance(values, Mapping), where, "a JSON object", values)
            _check_nesting(values, where)
            try:
                text = _encode(dict(values)) if values else "{}"
                text.encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise CardError(where, "a JSON object", error) from error
        vars(self)["text"] = text

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


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """A pair of LoRA factors: ΔW = scaling · (A @ B).T.

    Args:
        A: Shape ``(in, r)``, one of `DTYPES`. An array that can still be changed is copied.
        B: Shape ``(r, out)``, of A's dtype.
        scaling: ``None`` becomes ``alpha / rank`` of the pair's card.

    Raises:
        CardError: The factors' shapes or dtypes do not fit, or the scaling is not finite.

    Examples:
        >>> LowRank(np.zeros((384, 8)), np.zeros((8, 384)), scaling=2.0).rank
        8
    """

    A: Array
    B: Array
    scaling: float | None = None

    def __post_init__(self) -> None:
        a, b = _factor(self.A, "A"), _factor(self.B, "B")
        if a.dtype != b.dtype:
            raise CardError("factor B", f"A's dtype {a.dtype}", b.dtype, "a card has one dtype")
        expected = f"shape (r, out) with A's r = {a.shape[1]}"
        require(a.shape[1] == b.shape[0], "factor B", expected, b.shape)
        vars(self).update(A=a, B=b)
        if self.scaling is not None:
            vars(self)["scaling"] = finite(self.scaling, "scaling") + 0.0  # -0.0 becomes 0.0

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return int(self.A.shape[1])

    @property
    def in_features(self) -> int:
        """The Linear's input dimension."""
        return int(self.A.shape[0])

    @property
    def out_features(self) -> int:
        """The Linear's output dimension."""
        return int(self.B.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The factors' dtype."""
        return self.A.dtype

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LowRank):
            return NotImplemented
        return self is other or (
            self.scaling == other.scaling
            and same_bits(self.A, other.A)
            and same_bits(self.B, other.B)
        )

    def __hash__(self) -> int:
        return hash((self.A.shape, self.B.shape, self.dtype, self.scaling))

    def __repr__(self) -> str:
        shape = f"{self.in_features} -> {self.rank} -> {self.out_features}"
        return f"LowRank({shape}, {self.dtype}, scaling={self.scaling})"

    def __reduce__(self) -> tuple[Any, ...]:  # through the constructor: arrays arrive writable
        return type(self), (self.A, self.B, self.scaling)


@dataclass(frozen=True, repr=False)
class LoRACard:
    """A LoRA adapter as an immutable value.

    Args:
        name: Non-empty and printable.
        rank: The largest rank of any module.
        alpha: Above 0. A pair without a scaling gets ``alpha / rank``.
        target_modules: Each matches the modules whose dotted name equals it or ends with
            ``"." + target``; ``"all-linear"`` matches every Linear except output heads.
        weights: Pairs of one dtype, by module name or a dotted suffix of it.
        metadata: Any JSON object, such as version and author.
        base_model: The name of the model that it is for.
        base_fingerprint: The SHA-256 of that model's targeted weights, in hex.
        extra: Unknown schema metadata of a file; a round trip keeps them.

    Raises:
        CardError: A field is not as described here.

    Examples:
        >>> pair = LowRank(np.ones((4, 2), np.float32), np.ones((2, 3), np.float32))
        >>> card = LoRACard("docs", 2, 4.0, ["query"], {"layer.0.query": pair}, {"author": "me"})
        >>> card.weights["layer.0.query"].scaling, card.num_params, card.nbytes
        (2.0, 14, 56)
    """

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    weights: Mapping[str, LowRank] = field(hash=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    base_fingerprint: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name, rank, base, digest = self.name, self.rank, self.base_model, self.base_fingerprint
        require(_printable(name) and name != "", "card name", "non-empty printable text", name)
        where = f"card {shown(name)}"
        is_integer = isinstance(rank, Integral) and not isinstance(rank, bool)
        is_rank = is_integer and 1 <= rank <= MAX_RANK
        require(is_rank, f"{where}: rank", f"an integer >= 1 and <= {MAX_RANK}", rank)
        alpha = finite(self.alpha, f"{where}: alpha")
        require(alpha > 0, f"{where}: alpha", "a finite number > 0", self.alpha)
        is_base = base is None or _printable(base)
        require(is_base, f"{where}: base_model", "printable text or None", base)
        is_fingerprint, expected = digest is None or is_digest(digest), "64 lower-case hex digits"
        require(is_fingerprint, f"{where}: base_fingerprint", f"{expected} or None", digest)
        extra = FrozenJSON(self.extra, f"{where}: extra")
        for key, value in json.loads(extra.text).items():
            expected = "text values, under keys that are not the card's own fields"
            is_extra = isinstance(value, str) and key not in FIELD_KEYS
            require(is_extra, f"{where}: extra", expected, {key: value})
        vars(self).update(
            rank=int(rank),
            alpha=alpha,
            target_modules=_targets(self.target_modules, f"{where}: target_modules"),
            weights=_scaled_pairs(self.weights, int(rank), alpha, where),
            metadata=FrozenJSON(self.metadata, f"{where}: metadata"),
            extra=extra,
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of all factors; float32 for a card without weights."""
        return next((pair.dtype for pair in self.weights.values()), DTYPES["float32"])

    @property
    def num_params(self) -> int:
        """Number of elements in all factors."""
        return sum(pair.A.size + pair.B.size for pair in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return self.num_params * self.dtype.itemsize

    def __repr__(self) -> str:
        return (
            f"LoRACard({self.name!r}, rank={self.rank}, alpha={self.alpha}, "
            f"target_modules={self.target_modules}, {len(self.weights)} modules, "
            f"{self.num_params} parameters, {self.dtype})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {**vars(self), "weights": dict(self.weights)}  # in the order of the constructor
        return type(self), tuple(fields.values())


Adapters: TypeAlias = (
    "AdapterSet | LoRACard | Mapping[str, LoRACard | tuple[LoRACard, float]] | Iterable[LoRACard]"
)
"""What is accepted wherever a set of cards is asked for."""

_READERS = "lora.load(path) or import_peft(path) reads one"


@dataclass(frozen=True, init=False, repr=False)
class AdapterSet(Mapping[str, tuple[LoRACard, float]]):
    """An immutable set of weighted cards: a mapping of name to ``(card, weight)``.

    ``a | b`` joins two sets, ``a + b`` adds weights, ``a * s`` scales them.

    Args:
        adapters: A set, a card, an iterable of cards, or a mapping of name to card or
            ``(card, weight)``. The default weight is 1.

    Raises:
        ConflictError: Two different cards have one name.

    Examples:
        >>> card = LoRACard("docs", 1, 1.0, ["q"], {"q": LowRank(np.ones((2, 1)), np.ones((1, 2)))})
        >>> (AdapterSet(card) * 0.5 + card).weight("docs")
        1.5
    """

    _entries: Mapping[str, tuple[LoRACard, float]]

    def __init__(self, adapters: Adapters = ()) -> None:
        if isinstance(adapters, LoRACard):
            adapters = (adapters,)
        if isinstance(adapters, Mapping):
            items: Iterable[tuple[Any, Any]] = adapters.items()
        elif isinstance(adapters, Iterable) and not isinstance(adapters, str):
            items = ((getattr(card, "name", ""), card) for card in adapters)
        else:
            expected = "a card, a mapping or an iterable of cards"
            raise ArgumentError("adapter set", expected, shown(adapters), _READERS)
        entries: dict[str, tuple[LoRACard, float]] = {}
        for name, entry in items:
            is_pair = isinstance(entry, tuple) and len(entry) == 2
            card, weight = entry if is_pair else (entry, 1.0)
            if not isinstance(card, LoRACard):
                where = f"adapter set: {shown(name)}" if name else "adapter set"
                raise ArgumentError(where, "a card or (card, weight)", shown(entry), _READERS)
            if name != card.name:
                where = f"adapter set: key {shown(name)}"
                raise ArgumentError(where, "the card's own name", repr(card.name))
            if name in entries and entries[name][0] != card:
                where = f"adapter set: {name!r}"
                raise ConflictError(where, "one card per name", "two different cards")
            entries[name] = (card, finite(weight, f"weight of {name!r}", ArgumentError))
        vars(self)["_entries"] = MappingProxyType(dict(sorted(entries.items())))

    def weight(self, name: str) -> float:
        """Return a card's weight; 0 if it is not in the set."""
        return self[name][1] if name in self else 0.0

    def without(self, name: str) -> "AdapterSet":
        """Return the set without a card."""
        return AdapterSet({key: entry for key, entry in self.items() if key != name})

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
                where, both = f"union of adapter sets: {name!r}", (self[name], other[name])
                raise ConflictError(where, "the same card and weight on both sides", both)
        return AdapterSet({**self, **other})

    def __add__(self, other: Adapters) -> "AdapterSet":
        other = AdapterSet(other)
        cards = AdapterSet(card for terms in (self, other) for card, _ in terms.values())
        return AdapterSet(
            {n: (card, self.weight(n) + other.weight(n)) for n, (card, _) in cards.items()}
        )

    def __mul__(self, factor: float) -> "AdapterSet":
        factor = finite(factor, "factor of an adapter set", ArgumentError)
        return AdapterSet({name: (card, weight * factor) for name, (card, weight) in self.items()})

    __rmul__ = __mul__

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        terms = ", ".join(f"{name!r}: {weight}" for name, (_, weight) in self.items())
        return f"AdapterSet({terms})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def interpolate(a: AdapterSet, b: AdapterSet, t: float) -> AdapterSet:
    """Mix two adapter sets: return ``(1 - t) · a + t · b``, for any finite `t`.

    Raises:
        ArgumentError: `t` is not finite.
        ConflictError: Two different cards have one name.

    Examples:
        >>> docs = AdapterSet(LoRACard("docs", 1, 1.0, [], {}))
        >>> interpolate(docs, AdapterSet(), 0.25).weight("docs")
        0.75
    """
    t = finite(t, "t", ArgumentError)
    return AdapterSet(a) * (1 - t) + AdapterSet(b) * t


def checked_pair(a: Array, b: Array, scaling: float) -> LowRank:
    """Return a pair of what its constructor would take as it is, without asking again."""
    pair = object.__new__(LowRank)
    vars(pair).update(A=a, B=b, scaling=scaling + 0.0)  # as there: -0.0 becomes 0.0
    return pair


def check_card(card: object) -> None:
    """Raise `ArgumentError` unless `card` is a card."""
    if not isinstance(card, LoRACard):
        raise ArgumentError("card", "a LoRACard", type(card).__name__)


def same_bits(a: Array, b: Array) -> bool:
    """Tell whether two arrays have the same shape, dtype and bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = f"u{a.dtype.itemsize}"
    return np.array_equal(a.view(bits), b.view(bits))


def _factor(array: Array, which: str) -> Array:
    """Return the array, or a copy, in native byte order, contiguous and read-only."""
    is_array = isinstance(array, np.ndarray)
    if not is_array or array.ndim != 2 or 0 in array.shape:
        what = f"shape {array.shape}" if is_array else type(array).__name__
        raise CardError(f"factor {which}", "a two-dimensional, non-empty NumPy array", what)
    # An array can't change if neither it nor any array that it is a view of is writable.
    owner: object = array
    while isinstance(owner, np.ndarray) and not owner.flags.writeable:
        owner = owner.base
    is_frozen = type(array) is np.ndarray and not isinstance(owner, np.ndarray)
    if is_frozen and array.flags.c_contiguous and array.dtype in _NATIVE:
        return array
    native = array.dtype.newbyteorder("=")
    if native not in _NATIVE:
        raise CardError(f"factor {which}", f"a dtype of {', '.join(DTYPES)}", array.dtype)
    array = np.array(array, native, order="C")
    array.flags.writeable = False
    return array


def _printable(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _targets(targets: Iterable[str] | str, where: str) -> tuple[str, ...]:
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        targets = (targets,)
    names = tuple(targets)
    require(all(map(_printable, names)), where, "printable names", names)
    require(len(set(names)) == len(names), where, "each target once", names)
    return tuple(sorted(names)) if isinstance(targets, set | frozenset) else names


def _scaled_pairs(
    weights: Mapping[str, LowRank], rank: int, alpha: float, where: str
) -> Mapping[str, LowRank]:
    expected = "a mapping of module name to LowRank"
    require(isinstance(weights, Mapping), f"{where}: weights", expected, weights)
    pairs: dict[str, LowRank] = {}
    for module, pair in weights.items():
        is_pair = _printable(module) and isinstance(pair, LowRank)
        if not is_pair or (pair.scaling is None and pair.rank != rank):
            place = f"{where}: module {shown(module)}"
            require(is_pair, place, "a printable name and a LowRank", pair)
            expected = f"the card's rank {rank}, or an explicit scaling"
            raise CardError(place, expected, f"rank {pair.rank} without a scaling")
        pairs[module] = replace(pair, scaling=alpha / rank) if pair.scaling is None else pair
    dtypes = {pair.dtype for pair in pairs.values()}
    if len(dtypes) > 1:
        raise CardError(f"{where}: weights", "one dtype", " and ".join(sorted(map(str, dtypes))))
    largest = max((pair.rank for pair in pairs.values()), default=rank)
    expected = f"the largest rank of its modules, {largest}"
    require(largest == rank, f"{where}: rank", expected, rank)
    return MappingProxyType(dict(sorted(pairs.items())))


def _check_nesting(value: object, where: str, level: int = 1) -> None:
    """Refuse keys that JSON would turn into text, and containers nested too deep."""
    if not isinstance(value, Mapping | list | tuple):
        return
    if level > MAX_DEPTH:
        raise CardError(where, f"at most {MAX_DEPTH} levels of nesting", "more")
    if isinstance(value, Mapping):
        for key in value:
            require(isinstance(key, str), where, "a JSON object with text keys", key)
        value = value.values()
    for item in value:
        _check_nesting(item, where, level + 1)
