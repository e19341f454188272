"""Merging: several cards become one, by strategies that are values and act on ΔW, never on A and B
apart.

Linear strategies (average, weighted, task arithmetic, SLERP) work in small cores: QR of the stacked
factors, SVD of the core, the best approximation at O((in + out)·R²). TIES and DARE form ΔW of one
module at a time and truncate it. Everything is computed in float64 and rounded once, to the dtype
that the cards' dtypes promote to. Cards are put in the order of their names first, so that the
order they are given in changes nothing, bit for bit.

Sources: Ilharco et al. 2023 (task arithmetic), Yadav et al. 2023 (TIES), Yu et al. 2024 (DARE),
Shoemake 1985 (SLERP).

Requirements: R20.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lora.card import DTYPES, Array, LoRACard, LowRank, check_card
from lora.checks import finite, integer
from lora.errors import (
    ArgumentError,
    BaseModelError,
    CardError,
    ConflictError,
    ShapeError,
    TargetError,
    shown,
)
from lora.lowrank import delta, thin_qr

EPSILON = float(np.finfo(np.float64).eps)

OPPOSITE = 1e-3
"""Radians from opposite within which SLERP refuses: there the arc's plane is noise."""

PARALLEL = 1e-6
"""Radians within which SLERP's arc is taken for a line: what that changes is of the order of the square."""


@dataclass(frozen=True, slots=True)
class Average:
    """The mean of all cards: Σ ΔWᵢ / n; a module that a card lacks counts as 0. Takes no weights."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """Σ wᵢ ΔWᵢ, with weights divided by their sum if `normalize`."""

    normalize: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.normalize, bool):
            raise ArgumentError("weighted: normalize", "True or False", shown(self.normalize))


@dataclass(frozen=True, slots=True)
class Slerp:
    """A fraction `t` of the way from one card to another, along the arc between them.

    A card is one point: its ΔW of all modules, flattened. The direction moves at constant angular
    speed, the length linearly. Within `PARALLEL` radians this is linear interpolation; within
    `OPPOSITE` radians of opposite it is an error.
    """

    t: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "t", _between(self.t, "slerp: t", "a number from 0 to 1", closed=True)
        )


@dataclass(frozen=True, slots=True)
class Ties:
    """Trim, elect signs, merge: per entry of ΔW, the weighted mean of the cards that agree with the
    elected sign.

    Of each card's ΔW the ``max(1, round(density · size))`` largest entries are kept (halves round
    to even; of equal magnitudes the first in row-major order of ``(out, in)``). Weights are applied
    before signs are elected: by the sign of the sum (``"mass"``), or of the sum of signs
    (``"count"``); a sum of 0 elects nothing. The mean is Σ wᵢxᵢ / Σ |wᵢ| over the entries of the
    elected sign.
    """

    density: float = 0.5
    elect: str = "mass"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "density", _between(self.density, "ties: density", "the share kept, > 0 and <= 1")
        )
        if self.elect not in ("mass", "count"):
            raise ArgumentError("ties: elect", "'mass' or 'count'", shown(self.elect))


@dataclass(frozen=True, slots=True)
class Dare:
    """Σ wᵢ · maskᵢ · ΔWᵢ / density: each entry is kept with probability `density`, so the
    expectation is Σ wᵢ ΔWᵢ.

    A mask depends on `seed`, the module's and the card's name and the shape alone: neither on the
    order of the cards nor on which others there are.
    """

    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "density", _between(self.density, "dare: density", "the share kept, > 0 and <= 1")
        )
        object.__setattr__(self, "seed", integer(self.seed, "dare: seed"))


@dataclass(frozen=True, slots=True)
class TaskArithmetic:
    """Σ wᵢ ΔWᵢ, where a negative weight takes a skill away."""


@dataclass(frozen=True, slots=True)
class Cat:
    """Σ wᵢ ΔWᵢ by concatenation: ``[A₁ … Aₙ]`` as they are, and Bs that carry the weights. Takes no
    rank.

    A pair that several cards share stands there once, with the sum of their weights.
    """


Strategy: TypeAlias = Average | Weighted | Slerp | Ties | Dare | TaskArithmetic | Cat

STRATEGIES: Mapping[str, type[Strategy]] = MappingProxyType(
    {
        "average": Average,
        "weighted": Weighted,
        "slerp": Slerp,
        "ties": Ties,
        "dare": Dare,
        "task_arithmetic": TaskArithmetic,
        "cat": Cat,
    }
)
"""The strategies by the names that stand for them."""


def merge(
    cards: Iterable[LoRACard],
    strategy: Strategy | str = Average(),
    weights: Iterable[float] | None = None,
    rank: int | None = None,
    name: str = "merged",
) -> LoRACard:
    """Merge cards into one, by their ΔW.

    Args:
        cards: At least one; for `Slerp` exactly two. They may differ in rank, dtype and modules (a
            module that a card lacks counts as 0).
        strategy: A strategy or the name of one.
        weights: One finite number per card, in their order; 1 each by default. `Average` and
            `Slerp` take none.
        rank: The largest rank of a module. By default what is needed to be exact; for TIES and
            DARE, whose ΔW has full rank, the largest of the parents' ranks at that module.
        name: Of the merged card.

    Returns:
        Balanced factors (‖A‖ = ‖B‖) with explicit scalings, or a parent's own where a module comes
        from it alone. A module of which nothing is left (ΔW = 0) has no row. Targets are those of
        all parents; the base fingerprint is kept where it still covers the same modules. Its
        metadata tell of the merge: ``{"merge": {"strategy", "options", "parents": [{"name",
        "digest", "weight"}], "error": {module: ‖lost‖/‖ΔW‖}}}``, with `content_digest` of each
        parent, the weight that was applied to it, and each module's truncation error.

    Raises:
        ArgumentError: If an argument is out of range, or SLERP's cards are zero or point opposite
            ways.
        BaseModelError: If cards that adapt the same modules were made for different weights, or for
            models of different names.
        CardError: If a factor is not finite.
        ConflictError: If two cards have one name and `Dare` would give them one mask.
        ShapeError: If cards disagree on a module's shape.
        TargetError: If a module's name in one card ends in that of another card's module, so that
            both may be one.

    Examples:
        >>> import numpy as np
        >>> one = LowRank(np.array([[2.0], [0.0]]), np.array([[3.0, 0.0]]), 1.0)
        >>> two = LowRank(np.array([[0.0], [2.0]]), np.array([[0.0, 1.0]]), 1.0)
        >>> docs = LoRACard("docs", 1, 1.0, ["query"], {"query": one})
        >>> law = LoRACard("law", 1, 1.0, ["query"], {"query": two})
        >>> both = merge([docs, law], "weighted", [1.0, 2.0])
        >>> both.rank, np.abs(delta(both.weights["query"]).round(9))
        (2, array([[6., 0.],
               [0., 4.]]))
        >>> merge([docs, law], rank=1).metadata["merge"]["error"]["query"].__round__(3)
        0.316
        >>> merge([docs, docs], "task_arithmetic", [1, -1]).weights
        mappingproxy({})
    """
    given = _cards(cards)
    strategy = _strategy(strategy)
    limit = _limit(rank, strategy)
    applied = _applied(given, strategy, weights)
    keyed = sorted(
        (card.name, content_digest(card), weight, index)
        for index, (card, weight) in enumerate(zip(given, applied, strict=True))
    )
    parents = [(given[index], weight) for _, _, weight, index in keyed]
    dtype = _promoted({card.dtype for card in given if card.weights})
    rows: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for module in sorted({module for card in given for module in card.weights}):
        terms = [
            _Term(card.name, card.weights[module], weight)
            for card, weight in parents
            if module in card.weights
        ]
        row, errors[module] = _merged(strategy, module, terms, limit, dtype)
        if row is not None:
            rows[module] = row
    targets = sorted({target for card in given for target in card.target_modules})
    told = {
        "strategy": next(key for key, kind in STRATEGIES.items() if isinstance(strategy, kind)),
        "options": asdict(strategy),
        "parents": [
            {"name": name, "digest": sha, "weight": weight} for name, sha, weight, _ in keyed
        ],
        "error": errors,
    }
    largest = max((row.rank for row in rows.values()), default=1)
    base_model, fingerprint = _base(given, rows.keys(), targets)
    return LoRACard(
        name,
        largest,
        float(largest),
        tuple(targets),
        rows,
        {"merge": told},
        base_model,
        fingerprint,
    )


def content_digest(card: LoRACard) -> str:
    """SHA-256 of what a card holds, 64 hex digits: equal for equal cards, whatever file they come
    from.

    It covers the fields in their order as JSON, a line feed, and each module's A and B, row-major.
    A file's digest covers its layout too, so it is another.

    Examples:
        >>> content_digest(LoRACard("empty", 1, 1.0, [], {})) == content_digest(LoRACard("empty", 1, 1.0, [], {}))
        True
    """
    modules = [
        [module, pair.scaling, pair.dtype.name, pair.A.shape, pair.B.shape]
        for module, pair in card.weights.items()
    ]
    fields = [card.name, card.rank, card.alpha, card.target_modules, modules, dict(card.metadata)]
    header = json.dumps(
        [*fields, card.base_model, card.base_fingerprint, dict(card.extra)], sort_keys=True
    )
    sha = hashlib.sha256(f"{header}\n".encode())
    for pair in card.weights.values():
        sha.update(pair.A.view(np.uint8).data)
        sha.update(pair.B.view(np.uint8).data)
    return sha.hexdigest()


class _Term(NamedTuple):
    """One card's part in a module."""

    name: str
    pair: LowRank
    weight: float


class _Cores(NamedTuple):
    """Pairs in common orthonormal bases: ``scalingᵢ · Aᵢ Bᵢ = P coreᵢ Qᵀ``; no ‖Aᵢ‖ ‖Bᵢ‖ |scalingᵢ|
    exceeds its size.
    """

    P: Array
    Q: Array
    cores: list[Array]
    sizes: list[float]


def _merged(
    strategy: Strategy, module: str, terms: list[_Term], limit: int | None, dtype: np.dtype[Any]
) -> tuple[LowRank | None, float]:
    """The merged pair of a module, None for 0, and its relative truncation error."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        match strategy:
            case Cat():
                return _concatenated(module, terms, dtype), 0.0
            case Ties() | Dare():
                dense = (
                    _ties(strategy, terms)
                    if isinstance(strategy, Ties)
                    else _dare(strategy, module, terms)
                )
                left, sigma, right = np.linalg.svd(
                    _representable(dense, module).T, full_matrices=False
                )
                floor = EPSILON * max(dense.shape) * sigma[0]
                limit = limit or max(term.pair.rank for term in terms)
                return _kept(left, sigma, right, floor=floor, limit=limit, dtype=dtype)
            case _:
                return _linear(module, terms, limit, dtype)


def _live(module: str, terms: list[_Term]) -> list[tuple[LowRank, float]]:
    """Each different pair with the sum of its weights, exactly rounded; without those that cancel
    or are 0.
    """
    weights: dict[LowRank, list[float]] = {}
    for _, pair, weight in terms:
        weights.setdefault(pair, []).append(weight)
    sums = [(pair, _representable(_sum(parts), module)) for pair, parts in weights.items()]
    return [
        (pair, weight)
        for pair, weight in sums
        if weight * _scaling(pair) and pair.A.any() and pair.B.any()
    ]


def _linear(
    module: str, terms: list[_Term], limit: int | None, dtype: np.dtype[Any]
) -> tuple[LowRank | None, float]:
    """Σ weight · ΔW, at the rank that it has or the best approximation at `limit`."""
    live = _live(module, terms)
    if len(live) == 1 and live[0][0].rank <= (limit or live[0][0].rank):
        return _concatenated(module, terms, dtype), 0.0
    if not live:
        return None, 0.0
    p, q, cores, sizes = _cores(module, [pair for pair, _ in live])
    core = sum(weight * core for (_, weight), core in zip(live, cores, strict=True))
    bound = _sum(abs(weight) * size for (_, weight), size in zip(live, sizes, strict=True))
    left, sigma, right = np.linalg.svd(_representable(core, module), full_matrices=False)
    floor = _representable(EPSILON * max(len(p), len(q)) * bound, module)
    kept = min(limit or len(sigma), len(sigma))
    return _kept(
        p @ left[:, :kept], sigma, right[:kept] @ q.T, floor=floor, limit=kept, dtype=dtype
    )


def _concatenated(module: str, terms: list[_Term], dtype: np.dtype[Any]) -> LowRank | None:
    """The pairs side by side, Bs times what their factor differs by from the largest, which is the
    scaling.
    """
    live = _live(module, terms)
    if not live:
        return None
    factors = [_representable(weight * _scaling(pair), module) for pair, weight in live]
    scaling = max(factors, key=lambda factor: (abs(factor), factor))
    a = np.concatenate([pair.A.astype(dtype) for pair, _ in live], axis=1)
    b = [
        (pair.B.astype(np.float64) * (factor / scaling)).astype(dtype)
        for (pair, _), factor in zip(live, factors, strict=True)
    ]
    return LowRank(a, np.concatenate(b), scaling)


def _cores(module: str, pairs: Sequence[LowRank]) -> _Cores:
    """QR of the stacked As and of the stacked Bs: all that is left to do happens in the small
    triangles.
    """
    p, left = thin_qr(np.concatenate([pair.A.astype(np.float64) for pair in pairs], axis=1))
    q, right = thin_qr(np.concatenate([pair.B.T.astype(np.float64) for pair in pairs], axis=1))
    ends = np.cumsum([pair.rank for pair in pairs])[:-1]
    lefts, rights = np.split(left, ends, axis=1), np.split(right, ends, axis=1)
    cores = [a @ b.T * _scaling(pair) for a, b, pair in zip(lefts, rights, pairs, strict=True)]
    sizes = [
        float(np.linalg.norm(a) * np.linalg.norm(b)) * abs(_scaling(pair))
        for a, b, pair in zip(lefts, rights, pairs, strict=True)
    ]
    return _Cores(p, q, [_representable(core, module) for core in cores], sizes)


def _kept(
    left: Array, sigma: Array, right: Array, *, floor: float, limit: int, dtype: np.dtype[Any]
) -> tuple[LowRank | None, float]:
    """The balanced pair of an SVD cut at `limit` and at the noise `floor`, and the share of the
    norm that `limit` cost.

    The scaling is a power of two near the largest singular value: the factors' entries stay near 1,
    where every dtype is at its best, and what is doubled comes out doubled.
    """
    real = int((sigma > floor).sum())
    kept = min(limit, real)
    if kept == 0:
        return None, 0.0
    scaling = math.ldexp(1.0, math.frexp(sigma[0])[1] - 1)
    root = np.sqrt(sigma[:kept] / scaling)
    pair = LowRank(
        (left[:, :kept] * root).astype(dtype), (root[:, None] * right[:kept]).astype(dtype), scaling
    )
    whole = sigma[:real] / scaling
    return pair, float(np.linalg.norm(whole[kept:]) / np.linalg.norm(whole))


def _ties(strategy: Ties, terms: list[_Term]) -> Array:
    """ΔW ``(out, in)``: each entry the weighted mean of those that have the elected sign."""
    _, exponent = math.frexp(max(abs(term.weight) for term in terms))
    weights = [
        math.ldexp(term.weight, -exponent) for term in terms
    ]  # a mean: what scales all of them cancels
    parts = [
        _trimmed(delta(term.pair, dtype=np.float64), strategy.density) * weight
        for term, weight in zip(terms, weights, strict=True)
    ]
    elected = np.sign(sum(np.sign(part) if strategy.elect == "count" else part for part in parts))
    total, shares = np.zeros_like(elected), np.zeros_like(elected)
    for part, weight in zip(parts, weights, strict=True):
        agrees = (np.sign(part) == elected) & (elected != 0)
        total += np.where(agrees, part, 0.0)
        shares += abs(weight) * agrees
    merged: Array = total / np.where(shares == 0, 1.0, shares)
    return merged


def _trimmed(dense: Array, density: float) -> Array:
    """The entries of largest magnitude, the rest 0; of equal ones the first in row-major order."""
    size = abs(dense).ravel()
    count = max(1, round(density * size.size))
    least = np.partition(size, size.size - count)[size.size - count]
    keep = size > least
    keep[np.flatnonzero(size == least)[: count - int(keep.sum())]] = True
    return np.where(keep.reshape(dense.shape), dense, 0.0)


def _dare(strategy: Dare, module: str, terms: list[_Term]) -> Array:
    """ΔW ``(out, in)``: entries kept by chance and rescaled."""
    parts = []
    for name, pair, weight in terms:
        dense = delta(pair, dtype=np.float64)
        parts.append(
            np.where(_mask(strategy, module, name, dense.shape), dense, 0.0)
            * (weight / strategy.density)
        )
    total: Array = sum(parts, np.zeros_like(parts[0]))
    return total


def _mask(strategy: Dare, module: str, name: str, shape: tuple[int, ...]) -> Array:
    """Which entries are kept: those whose number in [0, 1), 53 bits of a keyed counter-based
    stream, is below density.
    """
    key = hashlib.sha256(json.dumps([strategy.seed, module, name]).encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(math.prod(shape))
    kept: Array = ((raw >> np.uint64(11)) * 2.0**-53 < strategy.density).reshape(shape)
    return kept


def _arc(a: LoRACard, b: LoRACard, t: float) -> list[float]:
    """The weights of two cards at `t` on the arc between them."""
    points: list[list[Array]] = [[], []]
    noise = [0.0, 0.0]
    for module in sorted({*a.weights, *b.weights}):
        sides = [side for side, card in enumerate((a, b)) if module in card.weights]
        found = _cores(module, [(a, b)[side].weights[module] for side in sides])
        for side in (0, 1):
            held = side in sides
            points[side].append(
                (found.cores[sides.index(side)] if held else np.zeros_like(found.cores[0])).ravel()
            )
            size = found.sizes[sides.index(side)] if held else 0.0
            noise[side] += EPSILON * max(len(found.P), len(found.Q)) * size
    flat = [np.concatenate(parts or [np.zeros(1)]) for parts in points]
    lengths = [_representable(float(np.linalg.norm(point)), "all") for point in flat]
    for card, length, floor in zip((a, b), lengths, noise, strict=True):
        if length <= floor:
            raise ArgumentError(
                f"slerp: card {card.name!r}", "a ΔW that is not 0", "0", "use 'weighted' instead"
            )
    x, y = (point / length for point, length in zip(flat, lengths, strict=True))
    angle = 2 * math.atan2(float(np.linalg.norm(x - y)), float(np.linalg.norm(x + y)))
    if math.pi - angle < OPPOSITE:
        raise ArgumentError(
            f"slerp: cards {a.name!r} and {b.name!r}",
            "directions that are not opposite",
            f"{angle} radians between them",
            "no arc is the shortest: use 'weighted' instead",
        )
    shares = (
        [1 - t, t]
        if angle < PARALLEL
        else [math.sin(part * angle) / math.sin(angle) for part in (1 - t, t)]
    )
    reach = (1 - t) * lengths[0] + t * lengths[1]
    return [reach / length * share for share, length in zip(shares, lengths, strict=True)]


def _cards(cards: Iterable[LoRACard]) -> tuple[LoRACard, ...]:
    if isinstance(cards, LoRACard) or not isinstance(cards, Iterable):
        raise ArgumentError("merge: cards", "a list of cards", shown(cards))
    found = tuple(cards)
    if not found:
        raise ArgumentError("merge: cards", "at least one card", "none")
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for card in found:
        check_card(card)
        for module, pair in card.weights.items():
            where, shape = (
                f"card {card.name!r}: module {module!r}",
                (pair.in_features, pair.out_features),
            )
            if not (np.isfinite(pair.A).all() and np.isfinite(pair.B).all()):
                raise CardError(
                    where,
                    "finite factors",
                    "NaN or an infinity",
                    "leave the card out, or make it anew",
                )
            other, expected = shapes.setdefault(module, (card.name, shape))
            if shape != expected:
                hint = "merge cards of one base model"
                raise ShapeError(where, f"in, out = {expected} as in card {other!r}", shape, hint)
    _check_names(found)
    return found


def _check_names(cards: Sequence[LoRACard]) -> None:
    """Refuse two cards' names of which one may mean the other: a model would take one, or neither."""
    held = {module: card for card in cards for module in card.weights}
    for module, card in held.items():
        parts = module.split(".")
        for other in (".".join(parts[start:]) for start in range(1, len(parts))):
            if other in held and not any({module, other} <= one.weights.keys() for one in cards):
                where, found = (
                    f"card {card.name!r}: module {module!r}",
                    f"{other!r} in card {held[other].name!r}",
                )
                hint = "rename by dataclasses.replace(card, weights=...): both may mean one module"
                raise TargetError(where, "names of one form in all cards", found, hint)


def _strategy(strategy: Strategy | str) -> Strategy:
    if isinstance(strategy, str) and strategy in STRATEGIES:
        return STRATEGIES[strategy]()
    if not isinstance(strategy, Strategy):
        raise ArgumentError(
            "merge: strategy",
            f"one of {', '.join(STRATEGIES)}, or a value of theirs",
            shown(strategy),
        )
    return strategy


def _limit(rank: int | None, strategy: Strategy) -> int | None:
    if rank is None:
        return None
    if isinstance(strategy, Cat):
        raise ArgumentError(
            "merge: rank", "none, as 'cat' keeps every column", shown(rank), "'weighted' truncates"
        )
    return integer(rank, "merge: rank", 1)


def _applied(
    cards: Sequence[LoRACard], strategy: Strategy, weights: Iterable[float] | None
) -> list[float]:
    """The weight of each card: as given, normalised, or as the strategy makes it."""
    given = _weights(weights, len(cards))
    if isinstance(strategy, Average | Slerp) and weights is not None:
        hint = "use 'weighted'"
        raise ArgumentError(
            "merge: weights", f"none for {type(strategy).__name__}", shown(weights), hint
        )
    match strategy:
        case Average():
            return [1 / len(cards)] * len(cards)
        case Weighted(normalize=True):
            if (total := finite(_sum(given), "merge: sum of weights", ArgumentError)) == 0:
                raise ArgumentError(
                    "merge: weights", "a sum that is not 0, to divide by", shown(given)
                )
            return [
                finite(weight / total, "merge: weights over their sum", ArgumentError)
                for weight in given
            ]
        case Slerp(t=t):
            if len(cards) != 2:
                raise ArgumentError("merge: cards", "exactly two for slerp", len(cards))
            return _arc(cards[0], cards[1], t)
        case Dare() if len({card.name for card in cards}) < len(cards):
            names = shown([card.name for card in cards])
            hint = "rename one by dataclasses.replace(card, name=...): a mask belongs to a name"
            raise ConflictError("merge: cards", "names that differ for dare", names, hint)
        case _:
            return given


def _weights(weights: Iterable[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if not isinstance(weights, Iterable) or isinstance(weights, str | Mapping):
        raise ArgumentError("merge: weights", "a list of numbers, one per card", shown(weights))
    found = [
        finite(weight, f"merge: weight {index}", ArgumentError) + 0.0
        for index, weight in enumerate(weights)
    ]
    if len(found) != count:
        raise ArgumentError("merge: weights", f"one for each of {count} cards", len(found))
    return found


def _base(
    cards: Sequence[LoRACard], modules: Iterable[str], targets: Iterable[str]
) -> tuple[str | None, str | None]:
    """The base model and fingerprint of the merged card.

    A fingerprint covers the weights that a card adapts, so only those of cards that adapt the same
    can be compared, and only such a one fits the merged card.
    """
    prints: dict[tuple[frozenset[str], frozenset[str]], tuple[str, str]] = {}
    hint = "merge cards of one base model"
    for card in cards:
        if card.base_fingerprint is not None:
            covers = (frozenset(card.weights), frozenset(card.target_modules))
            other, expected = prints.setdefault(covers, (card.name, card.base_fingerprint))
            if card.base_fingerprint != expected:
                where = f"card {card.name!r}: base_fingerprint"
                raise BaseModelError(
                    where, f"{expected} as in card {other!r}", card.base_fingerprint, hint
                )
    names = {card.base_model for card in cards} - {None}
    alike = (
        len({card.base_fingerprint for card in cards}) == 1
        and cards[0].base_fingerprint is not None
    )
    if len(names) > 1 and not alike:
        found = shown(sorted(map(str, names)))
        hint = f"{hint}, or name it alike by dataclasses.replace(card, base_model=...)"
        raise BaseModelError("merge: base models", "one", found, hint)
    _, fingerprint = prints.get((frozenset(modules), frozenset(targets)), ("", None))
    return (names.pop() if len(names) == 1 else None), fingerprint


def _promoted(dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """The dtype that holds all of them: itself for one, else float64 if it is among them, else
    float32.
    """
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return DTYPES["float64"] if DTYPES["float64"] in dtypes else DTYPES["float32"]


def _sum(values: Iterable[float]) -> float:
    """The sum, exactly rounded, so that no order matters; infinite beyond float64."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _representable(value: Any, module: str) -> Any:
    """The value, or an error where it is beyond float64."""
    if not np.isfinite(value).all():
        raise ArgumentError(
            f"merge: module {module!r}", "a ΔW within float64", "an overflow", "use smaller weights"
        )
    return value


def _scaling(pair: LowRank) -> float:
    return 1.0 if pair.scaling is None else pair.scaling


def _between(value: float, where: str, expected: str, *, closed: bool = False) -> float:
    """A number in (0, 1], or in [0, 1] if `closed`."""
    number = finite(value, where, ArgumentError)
    if not (0 < number <= 1 or (closed and number == 0)):
        raise ArgumentError(where, expected, shown(value))
    return number
