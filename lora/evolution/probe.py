"""WeightMapProbe: which layers of a model matter, by three scores that need no gradients, and by
ablation to judge them.

Each score is a mean, so that no layer is hot for its size alone: ``|W|``; ``|W_ij|`` times the root
mean square of input channel j (Wanda's norm over √tokens); ``1 − cos`` of a block's input and
output. On MiniLM the first two run against what ablation shows and only the last one with it, so a
report holds them all. Sources: Wanda, Sun et al. 2023; block influence, Men et al. 2024 (ShortGPT).

Requirements: R15.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from math import fsum, isfinite
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from lora.card import Array
from lora.checks import finite
from lora.errors import ArgumentError, ShapeError, TargetError, UnsupportedModelError, shown
from lora.extract import Model, Weights, extract_delta
from lora.rewrite import adapt, fold
from lora.routing import texts_of
from lora.targets import ALL_LINEAR

SCORES = ("magnitude", "wanda", "influence", "ablation")
"""What a layer may be ranked by."""

OnStep: TypeAlias = Callable[[str, int, int], None]
"""Called after each text, ablated block or compared layer: what it was, its position from 1, how many there are."""


@dataclass(frozen=True, eq=False)
class Tally:
    """A mean over tokens, taken batch by batch: the tallies of any split add up to the whole's,
    within γₙ of float64.

    Examples:
        >>> (squares(np.array([[1.0, 2.0]])) + squares(np.array([[3.0, 2.0]]))).mean
        array([5., 4.])
    """

    total: Array
    count: int

    def __add__(self, other: "Tally") -> "Tally":
        if self.total.shape != other.total.shape:
            raise ShapeError("tally", f"totals of shape {self.total.shape}", other.total.shape)
        return Tally(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> Array:
        """The total over the count; an ArgumentError if there was no token."""
        if not self.count:
            raise ArgumentError("tally", "at least one token", "none")
        result: Array = self.total / self.count
        return result


def squares(x: Array) -> Tally:
    """Squares of activations ``(..., in)`` by channel, tallied over tokens: the root of the mean is
    what `wanda` takes.
    """
    rows = _rows(x)
    with np.errstate(over="ignore"):
        return Tally((rows * rows).sum(0), len(rows))


def turns(x: Array, y: Array, *, where: str = "block") -> Tally:
    """``1 − cos`` of each token's vector before and after a block, ``(..., d)`` both, tallied over
    tokens.

    Computed as ``|x̂ − ŷ|² / 2``: exactly 0 where nothing turns. A zero vector is orthogonal to all
    but another. A ShapeError that names `where` if the shapes differ.

    Examples:
        >>> turns(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[5.0, 0.0], [1.0, 0.0]])).mean
        np.float64(0.5)
    """
    if x.shape != y.shape:
        raise ShapeError(where, f"an output of the input's shape {x.shape}", y.shape)
    before, after = _directions(_rows(x)), _directions(_rows(y))
    alive = before.any(-1).astype(int) + after.any(-1)
    apart = ((before - after) ** 2).sum(-1) / np.maximum(alive, 1)
    return Tally(apart.sum(), len(apart))


def wanda(weight: Array, norms: Array | float = 1.0, *, where: str = "weight") -> float:
    """Mean ``|W_ij| · norms_j`` of a weight ``(out, in)`` and its input channels' norms ``(in,)``;
    mean ``|W|`` without.

    Raises:
        ShapeError, ArgumentError: If the weight is no matrix, or empty, or has other channels; if a
            number is not finite. `where` names the weight.

    Examples:
        >>> wanda(np.array([[1.0, -3.0]])), wanda(np.array([[1.0, -3.0]]), np.array([4.0, 0.0]))
        (2.0, 2.0)
    """
    if weight.ndim != 2 or not weight.size or np.shape(norms) not in ((), weight.shape[1:]):
        found = f"shapes {weight.shape} and {np.shape(norms)}"
        raise ShapeError(where, "a matrix (out, in), not empty, and norms (in,)", found)
    with np.errstate(over="ignore", invalid="ignore"):
        return _score((np.abs(weight.astype(np.float64)).mean(0) * norms).mean(), where)


def ranking(scores: Mapping[str, float]) -> tuple[str, ...]:
    """Names from the highest score to the lowest; equal scores by name."""
    return tuple(sorted(scores, key=lambda name: (-scores[name], name)))


def hot_zones(scores: Mapping[str, float], share: float = 0.5) -> tuple[str, ...]:
    """The fewest layers that hold at least a share of the scores' sum, the hottest first, equal
    scores by name.

    Args:
        scores: Layer -> score, finite, >= 0; they are summed exactly. If all are 0, no layer is
            needed.
        share: In (0, 1], taken as the decimal number that it prints as.

    Raises:
        ArgumentError: If the share or a score is out of range.

    Examples:
        >>> hot_zones({"c": 1.0, "b": 2.0, "a": 1.0}, 0.75)
        ('b', 'a')
    """
    share = finite(share, "hot_zones: share", ArgumentError)
    if not 0 < share <= 1:
        raise ArgumentError("hot_zones: share", "a number in (0, 1]", share)
    mass = {
        name: Fraction(finite(score, f"score of {name!r}", ArgumentError))
        for name, score in scores.items()
    }
    if min(mass.values(), default=0) < 0:
        raise ArgumentError("hot_zones: scores", "numbers >= 0", min(scores.values()))
    missing, zones = Fraction(repr(share)) * sum(mass.values()), []
    for name in ranking(scores):
        if missing <= 0:
            break
        zones.append(name)
        missing -= mass[name]
    return tuple(zones)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's coefficient of two scores of the same layers, ties sharing their mean rank; None
    if one is constant.

    Examples:
        >>> rank_correlation([1.0, 2.0, 3.0], [7.0, 5.0, 0.0])
        -1.0
    """
    if len(a) != len(b):
        raise ShapeError("rank_correlation", f"two scores of {len(a)} layers", len(b))
    left, right = (
        np.sign(np.subtract.outer(scores, scores)).sum(1) for scores in (a, b)
    )  # ranks, centred and doubled
    spread = (left @ left) * (right @ right)
    return float(left @ right / np.sqrt(spread)) if spread else None


@dataclass(frozen=True)
class LayerScores:
    """The scores of one Linear, or of one block over all weights of its Linears; None where a score
    isn't measured.
    """

    name: str
    magnitude: float
    wanda: float
    influence: float | None = None
    ablation: float | None = None


@dataclass(frozen=True)
class WeightMap:
    """What a probe found: the scores of Linears and of blocks, in the model's order."""

    layers: tuple[LayerScores, ...]
    blocks: tuple[LayerScores, ...]

    @property
    def correlations(self) -> dict[str, float | None]:
        """Rank correlation over blocks of each score with ablation; empty if that was not measured."""
        truth = list(scores_of(self.blocks, "ablation").values())
        return {
            s: rank_correlation([*scores_of(self.blocks, s).values()], truth)
            for s in SCORES[:3]
            if truth
        }

    def table(self) -> pa.Table:
        """A row for each Linear and each block: kind (``"layer"`` or ``"block"``), name, and
        `SCORES`.
        """
        kinds = {"layer": self.layers, "block": self.blocks}
        rows = [{"kind": kind, **asdict(row)} for kind, found in kinds.items() for row in found]
        types = {"kind": pa.string(), "name": pa.string(), **dict.fromkeys(SCORES, pa.float64())}
        return pa.Table.from_pylist(rows, schema=pa.schema(types))


def scores_of(rows: Iterable[LayerScores], score: str) -> dict[str, float]:
    """Name -> one of `SCORES`, of the rows that have it.

    Examples:
        >>> scores_of([LayerScores("query", 0.5, 2.0)], "wanda")
        {'query': 2.0}
    """
    if score not in SCORES:
        raise ArgumentError("score", f"one of {', '.join(SCORES)}", repr(score))
    return {row.name: value for row in rows if (value := getattr(row, score)) is not None}


@dataclass(frozen=True)
class LayerChange:
    """How far a layer's weight moved between two models.

    Args:
        name: Of the module.
        change: ``‖ΔW‖ / √(in · out)``, the root mean square of its entries.
        held: Share of ``‖ΔW‖²`` in its first r singular directions: what a rank-r adapter can hold.
    """

    name: str
    change: float
    held: float


def changes(
    base: Weights,
    tuned: Weights,
    rank: int = 8,
    *,
    target_modules: Iterable[str] | str = ALL_LINEAR,
    on_step: OnStep | None = None,
) -> tuple[LayerChange, ...]:
    """The layers that differ between two models, the most changed first; equal changes by name.

    Args:
        base, tuned, rank, target_modules: As `lora.extract.extract_delta`'s; `held` is the energy
            that its card would have.
        on_step: Called after each layer.

    Raises:
        TargetError, ShapeError, ArgumentError: As `lora.extract.extract_delta`: models that don't
            fit or are equal, weights that aren't finite, a rank < 1.

    Examples:
        >>> changes({"query.weight": np.zeros((2, 2))}, {"query.weight": np.diag([4.0, 3.0])}, rank=1)
        (LayerChange(name='query', change=2.5, held=0.64),)
    """
    before, after = (
        model.state_dict() if isinstance(model, Model) else model for model in (base, tuned)
    )
    card = extract_delta(
        before, after, rank, target_modules=target_modules, dtype="float64", on_module=on_step
    )
    held: Any = card.metadata["extract"]
    moved = {}
    for name in card.weights:
        key = f"{name}.weight".removeprefix(".")
        delta = _array(after[key]) - _array(before[key])
        largest = np.abs(delta).max()  # so that no square over- or underflows
        moved[name] = float(np.sqrt(np.square(delta / largest).mean()) * largest)
    return tuple(
        LayerChange(name, moved[name], held["modules"][name]["energy"]) for name in ranking(moved)
    )


@dataclass(frozen=True, eq=False)
class WeightMapProbe:
    """Scores a model's Linears and blocks on texts; on a copy: the model itself is never touched.

    Args:
        encoder: Any torch module with ``encode(texts)``: an `InferenceCore`, or an engine's
            ``base`` or ``manager.model``. Its adapted float32 and float64 layers count as ``W +
            ΔW``.
        blocks: Names of the blocks; by default the members of the longest ``ModuleList``.
        on_step: Called after each text and each ablated block.

    Examples:
        >>> import lora
        >>> engine = lora.ArrowEngine.from_pretrained(None)
        >>> found = WeightMapProbe(engine.base).probe(["a card is a value", "adapting is a function"])
        >>> len(found.layers), len(found.blocks), hot_zones(scores_of(found.blocks, "influence"), 0.3)
        (36, 6, ('encoder.layer.5',))
    """

    encoder: nn.Module
    blocks: Sequence[str] | None = None
    on_step: OnStep | None = None

    def probe(self, texts: Sequence[str], *, ablation: bool = True) -> WeightMap:
        """Score on texts, each run by itself: no padding is measured, and no batch split can change
        a score.

        Args:
            texts: At least one. Linears that none reaches (a pooler) are left out.
            ablation: Also measure the mean ``1 − cos`` of embeddings with and without a block
                (which then passes its input on): one more run of all texts for each block.

        Raises:
            ArgumentError: If there is no text, or weights or activations are not finite.
            TargetError: If blocks are unknown, none are found, or no text reaches a block and a
                Linear in it.
            ShapeError: If a block's output does not have its input's shape.
            UnsupportedModelError: If the encoder has no ``encode``, or can't be copied soundly.
        """
        if not (texts := texts_of(texts)):
            raise ArgumentError("probe: texts", "at least one", "none")
        model = fold(self.encoder).eval()
        if not callable(getattr(model, "encode", None)):
            raise UnsupportedModelError(
                "probe: encoder", "a module with encode(texts)", type(model).__name__
            )
        blocks = _blocks(model, self.blocks)
        seen, turned = self._tallies(adapt(model, ()), texts, blocks)
        lost = self._lost(model, texts, blocks) if ablation else {}
        layers, sizes = {}, {}
        for name, tally in seen.items():
            weight, where = _array(model.get_submodule(name).weight), f"probe: {name!r}"
            scores = wanda(weight, where=where), wanda(weight, np.sqrt(tally.mean), where=where)
            layers[name], sizes[name] = LayerScores(name, *scores), weight.size
        found = []
        for block, tally in turned.items():
            inner = {name: size for name, size in sizes.items() if _inside(name, block)}
            means = [_pooled(scores_of(layers.values(), score), inner) for score in SCORES[:2]]
            turn = _score(tally.mean, f"probe: {block!r}")
            found.append(LayerScores(block, means[0], means[1], turn, lost.get(block)))
        return WeightMap(tuple(layers.values()), tuple(found))

    def _tallies(
        self, model: nn.Module, texts: list[str], blocks: tuple[str, ...]
    ) -> tuple[dict[str, Tally], dict[str, Tally]]:
        """The squared inputs of each Linear that runs, and the turns of each block."""
        linears = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        seen: dict[str, Tally] = {}
        turned: dict[str, Tally] = {}
        for name, linear in linears.items():
            _watch(linear, name, seen, lambda x, _: squares(x))
        for block in blocks:
            _watch(
                model.get_submodule(block), block, turned, partial(turns, where=f"probe: {block!r}")
            )
        for position, text in enumerate(texts, 1):
            _encoded(model, [text])
            self._report("text", position, len(texts))
        for block in blocks:
            if block not in turned or not any(_inside(name, block) for name in seen):
                raise TargetError(
                    f"probe: block {block!r}",
                    "a block in which a Linear runs",
                    "none that a text reaches",
                )
        return {name: seen[name] for name in linears if name in seen}, {
            block: turned[block] for block in blocks
        }

    def _lost(
        self, model: nn.Module, texts: list[str], blocks: tuple[str, ...]
    ) -> dict[str, float]:
        """How far the embeddings turn where a block passes its input on."""
        whole, lost = _encoded(model, texts), {}
        for position, block in enumerate(blocks, 1):
            handle = model.get_submodule(block).register_forward_hook(_passed_on, with_kwargs=True)
            lost[block] = _score(
                turns(whole, _encoded(model, texts)).mean, f"probe: {block!r} ablated"
            )
            handle.remove()
            self._report(block, position, len(blocks))
        return lost

    def _report(self, what: str, position: int, count: int) -> None:
        if self.on_step is not None:
            self.on_step(what, position, count)


def _rows(x: Array) -> Array:
    if not x.ndim or not x.shape[-1]:
        raise ShapeError("activations", "(..., channels), at least one channel", x.shape)
    rows: Array = x.astype(np.float64).reshape(-1, x.shape[-1])
    return rows


def _directions(rows: Array) -> Array:
    """Each row at length 1; a zero stays one."""
    alive = rows.any(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        rows = rows / np.where(
            alive, np.abs(rows).max(-1, keepdims=True), 1.0
        )  # so that no square over- or underflows
        result: Array = rows / np.where(alive, np.sqrt((rows * rows).sum(-1, keepdims=True)), 1.0)
    return result


def _pooled(scores: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """The mean over all weights of some Linears, from the mean over each one's."""
    return fsum(scores[name] * size for name, size in sizes.items()) / sum(sizes.values())


def _score(value: Any, where: str) -> float:
    number = float(value)
    if not isfinite(number):
        raise ArgumentError(where, "finite numbers whose mean is one", "NaN or infinity")
    return number


def _blocks(model: nn.Module, wanted: Sequence[str] | None) -> tuple[str, ...]:
    names = dict(model.named_modules(remove_duplicate=False))
    if wanted is None:
        lists = {
            name: len(module) for name, module in names.items() if isinstance(module, nn.ModuleList)
        }
        longest = max(lists, key=lambda name: lists[name], default="")
        wanted = [f"{longest}.{index}".removeprefix(".") for index in range(lists.get(longest, 0))]
    if not isinstance(wanted, Iterable):
        raise ArgumentError("probe: blocks", "names of modules", shown(wanted))
    blocks = tuple(dict.fromkeys([wanted] if isinstance(wanted, str) else wanted))
    unknown = [block for block in blocks if block not in names]
    if unknown or not blocks:
        raise TargetError(
            "probe: blocks",
            "names of modules of the model",
            unknown or "none",
            "name them in `blocks`",
        )
    return blocks


def _inside(name: str, block: str) -> bool:
    return f"{name}.".startswith(f"{block}.")


def _watch(
    module: nn.Module,
    name: str,
    tallies: dict[str, Tally],
    measure: Callable[[Array, Array], Tally],
) -> None:
    """Add a measure of each input and output of a module to its tally."""

    def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        x, y = _stream(args, options), output[0] if isinstance(output, tuple) else output
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise UnsupportedModelError(
                f"probe: {name!r}", "a tensor in and out", f"{type(x)}, {type(y)}"
            )
        tally = measure(_array(x), _array(y))
        tallies[name] = tallies[name] + tally if name in tallies else tally

    module.register_forward_hook(note, with_kwargs=True)


def _passed_on(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
    """A block's input in place of its output."""
    x = _stream(args, options)
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _stream(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a block transforms: its first argument."""
    return next(iter((*args, *options.values())), None)


def _array(weight: Any) -> Array:
    """A tensor or array in float64."""
    if isinstance(weight, Tensor):
        weight = weight.detach().to("cpu", torch.float64).numpy()
    array: Array = np.asarray(weight).astype(np.float64)
    return array


def _encoded(model: nn.Module, texts: list[str]) -> Array:
    with torch.inference_mode():
        return _array(model.encode(texts))  # type: ignore[operator]
