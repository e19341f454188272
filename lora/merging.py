"""Merging: several cards become one, by strategies that act on ΔW and never on A and B apart.

Linear strategies never form ΔW: a QR decomposition of the stacked factors leaves small cores, whose
SVD gives the best approximation in O((in + out)·R²). TIES and DARE form ΔW of one module at a time
and truncate it, a large one by a randomised SVD. Everything is computed in float64 and rounded
once. Cards are sorted by name first, so the order in which they are passed changes no bit of the
result.

Sources: Ilharco et al. 2023 (task arithmetic), Yadav et al. 2023 (TIES), Yu et al. 2024 (DARE),
Shoemake 1985 (SLERP).

Requirements: R20.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from lora.blas import one_thread
from lora.card import DTYPES, Array, LoRACard, LowRank, check_card
from lora.checks import choice, finite, integer, share
from lora.errors import ArgumentError, BaseModelError, ConflictError, ShapeError, TargetError, shown
from lora.factors import check_finite, delta, leading_svd, spectrum, thin_qr
from lora.targets import suffixes

EPSILON = float(np.finfo(np.float64).eps)

OPPOSITE = 1e-3
"""SLERP refuses directions within so many radians of opposite: the plane of the arc is noise."""

PARALLEL = 1e-6
"""SLERP is linear within so many radians; the difference is of the order of their square."""

SAME_BASE = "merge cards of one base model"

Terms: TypeAlias = list[tuple[str, LowRank, float]]
"""For one module: the name of each card, its pair (in a card every scaling is set), its weight."""

Spectrum: TypeAlias = tuple[Array, float]
"""Singular values, largest first, and the root of the squares of all others."""

Row: TypeAlias = tuple[Array, Array, float, Spectrum | None]
"""A merged module: A, B, scaling, and the spectrum of ΔW if A and B may lack some of it."""

BLOCK = 1 << 13
"""Entries that TIES and DARE work on at a time: so many stay in a core's cache."""

LARGE = 512
"""Of a ΔW with fewer rows or columns all singular values are computed."""

OVERSAMPLING = 32
"""Directions of the randomised SVD beyond the rank."""

TOLERANCE = 1e-5
"""The randomised SVD stops where a step would lower the rest by less than this share of it."""

SVD_SEED = 0
"""Seed of the randomised SVD."""

SMALL = 1e-4
"""A rest of the randomised SVD below this share of ΔW is computed from its entries."""

OF_ONE_CARD = frozenset({"created", "modified", "version", "quality", "extract", "merge"})
"""Metadata that a merged card does not take over: they tell of the making of one card."""


@dataclass(frozen=True, slots=True)
class Average:
    """The mean Σ ΔWᵢ / n; takes no weights.

    Examples:
        >>> card = LoRACard("docs", 1, 1.0, [], {})
        >>> merge([card, card], Average()).metadata["merge"]["parents"][0]["weight"]
        0.5
    """


@dataclass(frozen=True, slots=True)
class Weighted:
    """Σ wᵢ ΔWᵢ; with `normalize` the weights are divided by their sum.

    Examples:
        >>> card = LoRACard("docs", 1, 1.0, [], {})
        >>> merged = merge([card, card], Weighted(normalize=True), [1, 3])
        >>> [parent["weight"] for parent in merged.metadata["merge"]["parents"]]
        [0.25, 0.75]
    """

    normalize: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.normalize, bool):
            raise ArgumentError("weighted: normalize", "True or False", shown(self.normalize))


@dataclass(frozen=True, slots=True)
class Slerp:
    """A fraction `t` of the way from one card to another along the arc between them.

    A card is one point: its ΔW of all modules. The direction moves at constant angular speed and
    the length linearly. Takes no weights.

    Examples:
        >>> pairs = [LowRank(np.ones((1, 1)), row[None], 1.0) for row in np.eye(2)]
        >>> cards = [LoRACard("docs", 1, 1.0, ["q"], {"q": pair}) for pair in pairs]
        >>> abs(delta(merge(cards, Slerp(0.5)).weights["q"]).T.round(3))
        array([[0.707, 0.707]])
    """

    t: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", share(self.t, "slerp: t"))


@dataclass(frozen=True, slots=True)
class TaskArithmetic:
    """Σ wᵢ ΔWᵢ; a negative weight subtracts a skill.

    Examples:
        >>> pair = LowRank(np.ones((1, 1)), np.array([[2.0, 1.0]]), 1.0)
        >>> card = LoRACard("docs", 1, 1.0, ["q"], {"q": pair})
        >>> delta(merge([card], TaskArithmetic(), [-1]).weights["q"]).T
        array([[-2., -1.]])
    """


@dataclass(frozen=True, slots=True)
class Cat:
    """Σ wᵢ ΔWᵢ by concatenation: ``[A₁ … Aₙ]`` unchanged, and Bs that carry the weights.

    Takes no rank. A pair that several cards share occurs once.

    Examples:
        >>> pairs = [LowRank(np.array([[x]]), np.ones((1, 2)), 1.0) for x in (1.0, 2.0)]
        >>> cards = [LoRACard("docs", 1, 1.0, ["q"], {"q": pair}) for pair in pairs]
        >>> merge(cards, Cat()).weights["q"].A
        array([[1., 2.]])
    """


@dataclass(frozen=True, slots=True)
class Ties:
    """Trim, elect signs, merge: the weighted mean of the entries that have the elected sign.

    Of each ΔW the ``max(1, round(density · size))`` largest entries are kept (of equal ones the
    first in row-major order of ``(out, in)``). Then weights are applied, and `elect` gives each
    entry its sign; a sum of 0 gives 0. The mean is Σ wᵢxᵢ / Σ |wᵢ|.

    Args:
        density: Share of the entries that are kept, in (0, 1].
        elect: ``"mass"``: the sign of the sum; ``"count"``: the sign of the sum of the signs.

    Examples:
        >>> pair = LowRank(np.ones((1, 1)), np.array([[2.0, 1.0]]), 1.0)
        >>> card = LoRACard("docs", 1, 1.0, ["q"], {"q": pair})
        >>> delta(merge([card], Ties(density=0.5)).weights["q"]).T
        array([[2., 0.]])
    """

    density: float = 0.5
    elect: str = "mass"

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", share(self.density, "ties: density", "(0, 1]"))
        choice(self.elect, "ties: elect", ("mass", "count"))

    def dense(self, module: str, terms: Terms) -> Array:
        """Return the merged ΔW ``(out, in)`` of a module."""
        # A common factor of the weights cancels in the mean; without it no entry overflows.
        exponent = math.frexp(max(abs(weight) for *_, weight in terms))[1]
        weights = np.ldexp([weight for *_, weight in terms], -exponent)[:, None]
        changes = [_change(pair, module) for _, pair, _ in terms]
        merged = np.empty_like(changes[0])
        least = np.array([[self._trim(change, merged)] for change in changes])
        for start in range(0, merged.size, BLOCK):
            block = slice(start, start + BLOCK)
            parts = np.stack([change.reshape(-1)[block] for change in changes])
            parts *= abs(parts) >= least
            parts *= weights
            votes = np.sign(parts) if self.elect == "count" else parts
            elected = np.sign(votes.sum(0))
            agreeing = np.maximum(parts * elected, 0.0)
            shares = (abs(weights) * (agreeing > 0)).sum(0)
            sums = agreeing.sum(0) * elected
            merged.reshape(-1)[block] = sums / np.where(shares == 0, 1.0, shares)
        return merged.T

    def _trim(self, change: Array, size: Array) -> float:
        """Set surplus equal entries of `change` to 0; return the least size that is kept."""
        np.abs(change, out=size)  # the caller's buffer: no memory is asked for
        count = max(1, round(self.density * size.size))
        least = _largest(size.reshape(-1), count)
        surplus = int(np.count_nonzero(size >= least)) - count
        if surplus and least:
            equal = np.argwhere(least == size.T)  # in row-major order of (out, in)
            change.T[tuple(equal[len(equal) - surplus :].T)] = 0.0
        return least


@dataclass(frozen=True, slots=True)
class Dare:
    """Σ wᵢ · maskᵢ · ΔWᵢ / density: each entry is kept with probability `density`, in (0, 1].

    A mask depends only on `seed`, the names of module and card, and the shape.

    Examples:
        >>> pair = LowRank(np.ones((1, 1)), np.ones((1, 4)), 1.0)
        >>> card = LoRACard("docs", 1, 1.0, ["q"], {"q": pair})
        >>> delta(merge([card], Dare(density=0.5)).weights["q"]).T
        array([[0., 0., 2., 0.]])
    """

    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", share(self.density, "dare: density", "(0, 1]"))
        object.__setattr__(self, "seed", integer(self.seed, "dare: seed"))

    def dense(self, module: str, terms: Terms) -> Array:
        """Return the merged ΔW ``(out, in)`` of a module."""
        bound = np.uint64(math.ceil(self.density * 2.0**53))
        total = np.zeros((terms[0][1].in_features, terms[0][1].out_features))
        for card, pair, weight in terms:
            change = _change(pair, module)
            # 53 random bits for each entry, of a counter-based generator: equal on every machine.
            key = hashlib.sha256(json.dumps([self.seed, module, card]).encode()).digest()
            generator = np.random.Philox(key=int.from_bytes(key[:16], "little"))
            kept = np.empty(change.size, bool)
            for start in range(0, kept.size, BLOCK):
                block = kept[start : start + BLOCK]
                np.less(generator.random_raw(block.size) >> np.uint64(11), bound, out=block)
            change *= np.ascontiguousarray(kept.reshape(change.T.shape).T)
            change *= weight / self.density
            total += change
        return total.T


Strategy: TypeAlias = Average | Weighted | Slerp | Ties | Dare | TaskArithmetic | Cat
"""How cards are merged: a value of one of these classes, each of which says what it computes."""

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
"""The strategies by name."""


def merge(
    cards: Iterable[LoRACard],
    strategy: Strategy | str = Average(),
    weights: Iterable[float] | None = None,
    rank: int | None = None,
    name: str = "merged",
    *,
    base_model: str | None = None,
    on_module: Callable[[str, int, int], None] | None = None,
) -> LoRACard:
    """Merge cards into one card by combining their weight changes ΔW.

    Args:
        cards: At least one card; exactly two for `Slerp`. Ranks, dtypes and modules may differ.
        strategy: A `Strategy`, such as ``Ties(density=0.2)``, or its name in `STRATEGIES`:
            ``"average"``, ``"weighted"``, ``"slerp"``, ``"ties"``, ``"dare"``,
            ``"task_arithmetic"``, ``"cat"``.
        weights: One number per card, default 1. `Average` and `Slerp` take none.
        rank: Largest rank of a merged module. Default: exact, or for `Ties` and `Dare` the parents'
            largest.
        name: Merged card's name.
        base_model: Name of the base model, where the cards spell it in several ways or name several
            revisions.
        on_module: Called after each module with its name, its position from 1, and their number.

    Returns:
        A card with balanced factors. But for `Ties` and `Dare`, a module of one parent keeps its
        factors if `rank` allows. A module whose merged ΔW is 0 is left out.

        The card keeps the metadata that all parents share: equal entries of objects, common items
        of lists. It drops what tells of one parent's making: ``"created"``, ``"modified"``,
        ``"version"``, ``"quality"``, ``"extract"``, ``"merge"``.

        ``metadata["merge"]`` records how the card was made:

        - ``"strategy"`` and ``"options"``: the name of the strategy, and its fields.
        - ``"parents"``: of each its ``"name"``, its ``"digest"`` (`content_digest`) and the
          applied ``"weight"``.
        - ``"error"``: for each module the share of ΔW that was cut off, ‖lost‖/‖ΔW‖; 0 if exact.
        - ``"kept"``, if anything was cut off: the share of ΔW's squares that remains.
        - ``"rank_90"``, beside it: the rank that would keep 90 %.
        - ``"svd_seed"``, instead of ``"rank_90"`` if randomised SVD cut a large ΔW: its seed.

    Raises:
        ArgumentError: The cards, strategy, weights or rank are not valid, or ΔW is beyond float64.
        CardError: A factor is not finite, or the name is not valid.
        BaseModelError: The cards were made for different base models, or revisions of one.
        ConflictError: Two cards have one name and the strategy is `Dare`.
        ShapeError: The cards disagree on the shape of a module.
        TargetError: A module's name in one card ends in that of another card's module.

    Examples:
        >>> import numpy as np
        >>> import lora
        >>> from lora.factors import delta
        >>> first = lora.LowRank(np.array([[2.0], [0.0]]), np.array([[3.0, 0.0]]), 1.0)
        >>> second = lora.LowRank(np.array([[0.0], [2.0]]), np.array([[0.0, 1.0]]), 1.0)
        >>> docs = lora.LoRACard("docs", 1, 1.0, ["query"], {"query": first})
        >>> law = lora.LoRACard("law", 1, 1.0, ["query"], {"query": second})
        >>> both = lora.merge([docs, law], "weighted", [1.0, 2.0])
        >>> both.rank
        2
        >>> abs(delta(both.weights["query"]).round(9))
        array([[6., 0.],
               [0., 4.]])
        >>> cut = lora.merge([docs, law], rank=1)
        >>> round(cut.metadata["merge"]["error"]["query"], 3)
        0.316
    """
    parents = _checked_cards(cards)
    if isinstance(strategy, str) and strategy in STRATEGIES:
        strategy = STRATEGIES[strategy]()
    if not isinstance(strategy, Strategy):
        expected = f"one of {', '.join(STRATEGIES)}, or a value of its class"
        raise ArgumentError("merge: strategy", expected, shown(strategy))
    if rank is not None and isinstance(strategy, Cat):
        raise ArgumentError("merge: rank", "none for 'cat'", shown(rank), "'weighted' truncates")
    rank = None if rank is None else integer(rank, "merge: rank", 1)
    applied = _applied(parents, strategy, weights)
    rows = zip(parents, map(content_digest, parents), applied, strict=True)
    order = sorted(rows, key=lambda row: (row[0].name, *row[1:]))
    dtypes = {card.dtype for card in parents if card.weights}
    if len(dtypes) != 1:
        dtypes.add(DTYPES["float32"])
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    pairs: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    spectra: dict[str, Spectrum] = {}
    modules = sorted({module for card in parents for module in card.weights})
    for position, module in enumerate(modules, 1):
        terms = [
            (c.name, c.weights[module], weight) for c, _, weight in order if module in c.weights
        ]
        with np.errstate(all="ignore"):
            row = _merged(strategy, module, terms, rank)
        errors[module] = 0.0
        if row:
            a, b, scaling, found = row
            pairs[module] = LowRank(a.astype(dtype), b.astype(dtype), scaling)
            if found is not None:
                spectra[module] = found
                sigma = np.append(*found) / found[0][0]
                lost = np.linalg.norm(sigma[pairs[module].rank :])
                errors[module] = float(lost / np.linalg.norm(sigma))
        if on_module:
            on_module(module, position, len(modules))
    targets = sorted({target for card in parents for target in card.target_modules})
    record = {
        "strategy": next(key for key, kind in STRATEGIES.items() if isinstance(strategy, kind)),
        "options": asdict(strategy),
        "parents": [{"name": c.name, "digest": digest, "weight": w} for c, digest, w in order],
        "error": errors,
    }
    if any(errors.values()):
        record |= _kept(pairs, spectra)
    own = [{k: v for k, v in c.metadata.items() if k not in OF_ONE_CARD} for c, *_ in order]
    metadata = {**_alike(own), "merge": record}
    largest = max((pair.rank for pair in pairs.values()), default=1)
    base = _base(parents, pairs, targets, base_model)
    return LoRACard(name, largest, float(largest), tuple(targets), pairs, metadata, *base)


def content_digest(card: LoRACard) -> str:
    """Return the SHA-256 of a card's fields as JSON, a line feed, and A and B of each module.

    Examples:
        >>> content_digest(LoRACard("empty", 1, 1.0, [], {}))[:16]
        '90781e0724a95af3'
    """
    modules = [
        [module, pair.scaling, pair.dtype.name, pair.A.shape, pair.B.shape]
        for module, pair in card.weights.items()
    ]
    fields = [card.name, card.rank, card.alpha, card.target_modules, modules, dict(card.metadata)]
    fields += [card.base_model, card.base_fingerprint, dict(card.extra)]
    sha = hashlib.sha256(f"{json.dumps(fields, sort_keys=True)}\n".encode())
    for pair in card.weights.values():
        sha.update(pair.A.view(np.uint8).data)
        sha.update(pair.B.view(np.uint8).data)
    return sha.hexdigest()


def _merged(strategy: Strategy, module: str, terms: Terms, rank: int | None) -> Row | None:
    if isinstance(strategy, Ties | Dare):
        dense = _finite(strategy.dense(module, terms), module)
        rank = rank or max(pair.rank for _, pair, _ in terms)
        left, (sigma, rest), right = _svd(dense.T, rank)
        floor = EPSILON * max(dense.shape) * sigma[0]
        return _truncated(left, (sigma, rest), right, floor, rank)
    # Equal pairs count once, with the exact sum of their weights, so that opposite ones cancel.
    weights: dict[LowRank, list[float]] = {}
    for _, pair, weight in terms:
        weights.setdefault(pair, []).append(weight)
    sums = [(pair, _sum(parts)) for pair, parts in weights.items()]
    live = [(p, w) for p, w in sums if w * (p.scaling or 0.0) and p.A.any() and p.B.any()]
    if not live:
        return None
    if isinstance(strategy, Cat) or (len(live) == 1 and live[0][0].rank <= (rank or math.inf)):
        factors = _finite([weight * (pair.scaling or 0.0) for pair, weight in live], module)
        scaling = max(factors, key=lambda factor: (abs(factor), factor))
        a = np.hstack([pair.A for pair, _ in live], dtype=np.float64)
        parts = zip(live, factors, strict=True)
        b = [pair.B * np.float64(factor / scaling) for (pair, _), factor in parts]
        return a, np.vstack(b), scaling, None
    p, q, cores, noises = _cores([pair for pair, _ in live])
    core = sum(weight * core for (_, weight), core in zip(live, cores, strict=True))
    floor = _sum(abs(weight) * noise for (_, weight), noise in zip(live, noises, strict=True))
    with one_thread():
        left, sigma, right = np.linalg.svd(_finite(core, module), full_matrices=False)
    left, right = p @ left[:, :rank], right[:rank] @ q.T
    return _truncated(left, (sigma, 0.0), right, _finite(floor, module), rank)


def _change(pair: LowRank, module: str) -> Array:
    """Return ΔWᵀ ``(in, out)`` in float64, contiguous."""
    change: Array = _finite(delta(pair, dtype=np.float64), module).T
    return change


def _largest(size: Array, count: int) -> float:
    """Return the `count`-th largest entry; a sorted sample narrows the search."""
    sample = np.sort(size[:: max(1, len(size) // 8192)])
    share = 1 - count / len(size)
    margin = 4 * math.sqrt(share * (1 - share) / len(sample))
    low = sample[max(0, int((share - margin) * len(sample)))]
    high = sample[min(len(sample) - 1, int((share + margin) * len(sample)) + 1)]
    between = size[(size >= low) & (size <= high)]
    rank = count - int(np.count_nonzero(size > high))
    if not 0 < rank <= len(between):
        between, rank = size, count
    return float(np.partition(between, -rank)[-rank])


def _svd(matrix: Array, rank: int) -> tuple[Array, Spectrum, Array]:
    """Return U, the spectrum and Vᵀ; of a large matrix only the leading ones."""
    width = rank + OVERSAMPLING
    if min(matrix.shape) < max(LARGE, 4 * width):
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        return left, (sigma, 0.0), right
    exponent = min(-math.frexp(float(max(matrix.max(), -matrix.min())))[1], 1000)
    matrix *= math.ldexp(1.0, exponent)  # in its place, so that no square over- or underflows
    rng = np.random.default_rng(SVD_SEED)
    left, sigma, right = leading_svd(matrix, rank, width, rng, TOLERANCE)
    left, sigma, right = left[:, :rank], sigma[:rank], right[:rank]
    whole, held = np.linalg.norm(matrix), np.linalg.norm(sigma)
    rest = math.sqrt(max(0.0, float((whole - held) * (whole + held))))
    if rest < SMALL * whole:  # the difference of squares is rounding
        rest = float(np.linalg.norm(matrix - (left * sigma) @ right))
    return left, (np.ldexp(sigma, -exponent), math.ldexp(rest, -exponent)), right


def _cores(pairs: Sequence[LowRank | None]) -> tuple[Array, Array, list[Array], list[float]]:
    """Return orthonormal P and Q, cores with ``scalingᵢ · AᵢBᵢ = P coreᵢ Qᵀ``, and their noise.

    The noise bounds the rounding error of a core. A pair that is None counts as 0.
    """
    p, left = thin_qr(np.hstack([pair.A for pair in pairs if pair], dtype=np.float64))
    q, right = thin_qr(np.hstack([pair.B.T for pair in pairs if pair], dtype=np.float64))
    cores, noises, start = [], [], 0
    for pair in pairs:
        end = start + (pair.rank if pair else 0)
        a, b, scaling = left[:, start:end], right[:, start:end], (pair and pair.scaling) or 0.0
        cores.append(a @ b.T * scaling)
        size = float(np.linalg.norm(a) * np.linalg.norm(b)) * abs(scaling)
        noises.append(EPSILON * max(len(p), len(q)) * size)
        start = end
    return p, q, cores, noises


def _truncated(
    left: Array, found: Spectrum, right: Array, floor: float, rank: int | None
) -> Row | None:
    """Return the balanced factors of an SVD cut at `rank` and at the noise `floor`.

    The scaling, a power of two, keeps the entries near 1, where every dtype is most precise.
    """
    sigma, rest = found
    real = int((sigma > floor).sum())
    kept = min(rank or real, real)
    if not kept:
        return None
    scaling = math.ldexp(1.0, math.frexp(sigma[0])[1] - 1)
    whole = sigma[:real] / scaling
    root = np.sqrt(whole[:kept])
    return left[:, :kept] * root, root[:, None] * right[:kept], scaling, (sigma[:real], rest)


def _kept(pairs: Mapping[str, LowRank], spectra: Mapping[str, Spectrum]) -> dict[str, Any]:
    """Return the share of ΔW's squares that is kept, and the rank for 90 % or the SVD's seed."""
    rows = [
        (*(spectra[module] if module in spectra else (spectrum(pair), 0.0)), pair.rank)
        for module, pair in pairs.items()
    ]
    unit = max(sigma[0] for sigma, *_ in rows)  # so that no square over- or underflows
    by_rank, kept = np.zeros(max(len(sigma) for sigma, *_ in rows)), 0.0
    for sigma, _, rank in rows:
        squares = (sigma / unit) ** 2
        by_rank[: len(squares)] += squares
        kept += float(squares[:rank].sum())
    sums = np.cumsum(by_rank)
    rest = sum((rest / unit) ** 2 for _, rest, _ in rows)
    if rest:
        return {"kept": kept / float(sums[-1] + rest), "svd_seed": SVD_SEED}
    return {"kept": kept / float(sums[-1]), "rank_90": int((sums < 0.9 * sums[-1]).sum()) + 1}


def _alike(values: Sequence[Any]) -> Any:
    """Return what JSON values have in common; an ellipsis where that is nothing."""
    if len({json.dumps(value, sort_keys=True) for value in values}) == 1:
        return values[0]
    first, *others = values
    if all(isinstance(value, dict) for value in values):
        keys = [key for key in first if all(key in other for other in others)]
        common = {key: _alike([value[key] for value in values]) for key in keys}
        return {key: value for key, value in common.items() if value not in (..., {}, [])}
    if all(isinstance(value, list) for value in values):
        return [item for item in first if all(item in other for other in others)]
    return ...


@np.errstate(over="ignore")
def _arc(a: LoRACard, b: LoRACard, t: float) -> list[float]:
    """Return the weights of two cards at `t` on the arc between them."""
    modules = sorted({*a.weights, *b.weights})
    rows = [_cores([card.weights.get(module) for card in (a, b)]) for module in modules]
    points = np.hstack([np.zeros((2, 0)), *(np.reshape(cores, (2, -1)) for *_, cores, _ in rows)])
    noise = np.sum([noises for *_, noises in rows], axis=0) if rows else (0.0, 0.0)
    lengths = [_finite(float(np.linalg.norm(point)), "all") for point in points]
    for card, length, floor in zip((a, b), lengths, noise, strict=True):
        if length <= floor:
            where = f"slerp: card {card.name!r}"
            raise ArgumentError(where, "a ΔW that is not 0", "0", "use 'weighted' instead")
    x, y = (point / length for point, length in zip(points, lengths, strict=True))
    angle = 2 * math.atan2(float(np.linalg.norm(x - y)), float(np.linalg.norm(x + y)))
    if math.pi - angle < OPPOSITE:
        where = f"slerp: cards {a.name!r} and {b.name!r}"
        hint = "no arc is the shortest: use 'weighted' instead"
        angles = f"{angle} radians between them"
        raise ArgumentError(where, "directions that are not opposite", angles, hint)
    shares = [1 - t, t]
    if angle >= PARALLEL:
        shares = [math.sin(part * angle) / math.sin(angle) for part in shares]
    reach = (1 - t) * lengths[0] + t * lengths[1]
    return [reach / length * part for part, length in zip(shares, lengths, strict=True)]


def _checked_cards(cards: Iterable[LoRACard]) -> tuple[LoRACard, ...]:
    if isinstance(cards, LoRACard) or not isinstance(cards, Iterable):
        raise ArgumentError("merge: cards", "a list of cards", shown(cards))
    cards = tuple(cards)
    if not cards:
        raise ArgumentError("merge: cards", "at least one card", "none")
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for card in cards:
        check_card(card)
        for module, pair in card.weights.items():
            check_finite(card, module)
            shape = (pair.in_features, pair.out_features)
            other, expected = shapes.setdefault(module, (card.name, shape))
            if shape != expected:
                text = f"in, out = {expected} as in card {other!r}"
                where = f"card {card.name!r}: module {module!r}"
                raise ShapeError(where, text, shape, SAME_BASE)
    owners = {module: card for card in cards for module in card.weights}
    for module, card in owners.items():
        for suffix in suffixes(module)[1:]:
            if suffix in owners and not any({module, suffix} <= c.weights.keys() for c in cards):
                where = f"card {card.name!r}: module {module!r}"
                other = f"{suffix!r} in card {owners[suffix].name!r}"
                hint = "rename by dataclasses.replace(card, weights=...): both may mean one module"
                raise TargetError(where, "names of one form in all cards", other, hint)
    return cards


def _applied(
    cards: Sequence[LoRACard], strategy: Strategy, weights: Iterable[float] | None
) -> list[float]:
    if isinstance(strategy, Average | Slerp) and weights is not None:
        expected = f"none for {type(strategy).__name__}"
        raise ArgumentError("merge: weights", expected, shown(weights), "use 'weighted'")
    if isinstance(strategy, Average):
        return [1 / len(cards)] * len(cards)
    if isinstance(strategy, Slerp):
        if len(cards) != 2:
            raise ArgumentError("merge: cards", "exactly two for slerp", len(cards))
        return _arc(cards[0], cards[1], strategy.t)
    weights = [1.0] * len(cards) if weights is None else weights
    if not isinstance(weights, Iterable) or isinstance(weights, Mapping):
        raise ArgumentError("merge: weights", "a list of numbers, one per card", shown(weights))
    numbers = [
        finite(weight, f"merge: weight {index}", ArgumentError) + 0.0
        for index, weight in enumerate(weights)
    ]
    if len(numbers) != len(cards):
        raise ArgumentError("merge: weights", f"one for each of {len(cards)} cards", len(numbers))
    if isinstance(strategy, Weighted) and strategy.normalize:
        total = finite(_sum(numbers), "merge: sum of weights", ArgumentError)
        if total == 0:
            raise ArgumentError("merge: weights", "a sum that is not 0, to divide by", numbers)
        where = "merge: weights over their sum"
        return [finite(number / total, where, ArgumentError) for number in numbers]
    names = [card.name for card in cards]
    if isinstance(strategy, Dare) and len(set(names)) < len(names):
        hint = "rename one by dataclasses.replace(card, name=...): a mask belongs to a name"
        raise ConflictError("merge: cards", "names that differ for dare", shown(names), hint)
    return numbers


def _base(
    cards: Sequence[LoRACard], modules: Iterable[str], targets: Iterable[str], name: str | None
) -> tuple[str | None, str | None]:
    """Return the base model and fingerprint of the merged card; `name` replaces names that differ.

    A fingerprint covers the weights that a card adapts, so only those of cards that adapt the same
    modules can be compared. The revision is what PEFT recorded.
    """
    prints: dict[Any, tuple[str, str]] = {}
    for card in cards:
        if digest := card.base_fingerprint:
            covered = (frozenset(card.weights), frozenset(card.target_modules))
            other, expected = prints.setdefault(covered, (card.name, digest))
            if digest != expected:
                where, text = f"card {card.name!r}: base_fingerprint", f"{expected} as in card"
                hint = f"{SAME_BASE}; of its weights in another dtype the fingerprint differs: "
                hint += "drop it by dataclasses.replace(card, base_fingerprint=None)"
                raise BaseModelError(where, f"{text} {other!r}", digest, hint)
    names = {card.base_model for card in cards} - {None}
    settings = (card.metadata.get("peft") for card in cards)
    revisions = {peft.get("revision") for peft in settings if isinstance(peft, dict)} - {None, ""}
    digests = {card.base_fingerprint for card in cards}
    if name is None and (len(digests) > 1 or None in digests):  # what the names say is not proven
        for kind, values in (("model", names), ("revision", revisions)):
            if len(values) > 1:
                names_found = shown(sorted(map(str, values)))
                hint = f"{SAME_BASE}; if all are one, name it: `base_model=...`"
                raise BaseModelError(f"merge: base {kind}s", "one", names_found, hint)
    name = names.pop() if name is None and len(names) == 1 else name
    _, fingerprint = prints.get((frozenset(modules), frozenset(targets)), ("", None))
    return name, fingerprint


def _sum(values: Iterable[float]) -> float:
    """Return the exactly rounded sum; infinity beyond float64."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _finite(value: Any, module: str) -> Any:
    if not np.isfinite(value).all():
        where = f"merge: module {module!r}"
        raise ArgumentError(where, "a ΔW within float64", "an overflow", "use smaller weights")
    return value
