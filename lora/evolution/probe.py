"""WeightMapProbe: which layers of a model matter, by three scores that need no gradients.

Each score is a mean, whatever a layer's size: ``|W|``; ``|W_ij|`` times the root mean square of
input channel j (Wanda, Sun et al. 2023); ``1 − cos`` of a block's input and output (block
influence, Men et al. 2024). Ablation tells which one to believe.

Requirements: R15.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from lora import checks
from lora.card import Array
from lora.checks import finite
from lora.errors import ArgumentError, ShapeError, TargetError, UnsupportedModelError
from lora.extract import Model, Weights, extract_delta
from lora.models.adapt import adapt, fold
from lora.routing import texts_of, unit
from lora.targets import ALL_LINEAR

SCORES = ("magnitude", "wanda", "influence", "ablation")
"""What a layer may be ranked by."""

OnStep: TypeAlias = Callable[[str, int, int], None]
"""Called after each text, ablated block or compared layer: its name, its position, their number."""


@dataclass(frozen=True, eq=False)
class Tally:
    """A sum over tokens and their number; the tallies of a batch's parts add up to the whole's."""

    total: Any = 0.0
    count: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        shapes = np.shape(self.total), np.shape(other.total)
        if self.count and other.count and shapes[0] != shapes[1]:
            raise ShapeError("tally", f"totals of shape {shapes[0]}", shapes[1])
        return Tally(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> Any:
        """The mean over tokens."""
        if not self.count:
            raise ArgumentError("tally", "at least one token", "none")
        return self.total / self.count


def squares(x: Array) -> Tally:
    """Tally the squares of activations ``(..., in)`` by channel; `wanda` takes the mean's root."""
    rows = _rows(x)
    with np.errstate(over="ignore"):
        return Tally((rows * rows).sum(0), len(rows))


def turns(x: Array, y: Array, *, where: str = "block") -> Tally:
    """Tally ``1 − cos`` of each token's vector before and after a block, ``(..., d)`` both.

    It is exactly 0 where nothing turns. A zero vector is orthogonal to all but another zero vector.

    Examples:
        >>> turns(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[5.0, 0.0], [1.0, 0.0]])).mean
        np.float64(0.5)
    """
    if x.shape != y.shape:
        raise ShapeError(where, f"an output of the input's shape {x.shape}", y.shape)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ArgumentError(where, "finite activations", "NaN or infinity")
    before, after = unit(_rows(x)), unit(_rows(y))
    alive = before.any(1).astype(int) + after.any(1)
    distances = ((before - after) ** 2).sum(1) / np.maximum(alive, 1)
    return Tally(distances.sum(), len(distances))


def wanda(weight: Array, norms: Array | float = 1.0, *, where: str = "weight") -> float:
    """Return the mean of ``|W_ij| · norms_j``, W of shape ``(out, in)``; or of ``|W|`` alone.

    Examples:
        >>> wanda(np.array([[1.0, -3.0]])), wanda(np.array([[1.0, -3.0]]), np.array([4.0, 0.0]))
        (2.0, 2.0)
    """
    if weight.ndim != 2 or not weight.size or np.shape(norms) not in ((), weight.shape[1:]):
        shapes = f"shapes {weight.shape} and {np.shape(norms)}"
        raise ShapeError(where, "a matrix (out, in), not empty, and norms (in,)", shapes)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = (np.abs(weight.astype(np.float64)).mean(0) * norms).mean()
    return finite(mean, where, ArgumentError)


def ranking(scores: Mapping[str, float]) -> tuple[str, ...]:
    """Sort names from the highest score to the lowest; equal scores by name."""
    return tuple(sorted(scores, key=lambda name: (-scores[name], name)))


def hot_zones(scores: Mapping[str, float], share: float = 0.5) -> tuple[str, ...]:
    """Return the fewest layers that hold a share of the sum of scores, the hottest first.

    The share is taken as the decimal number that it prints as.

    Examples:
        >>> hot_zones({"c": 1.0, "b": 2.0, "a": 1.0}, 0.75)
        ('b', 'a')
    """
    share = checks.share(share, "hot_zones: share", "(0, 1]")
    mass = {
        name: Fraction(finite(score, f"score of {name!r}", ArgumentError))
        for name, score in scores.items()
    }
    if min(mass.values(), default=0) < 0:
        raise ArgumentError("hot_zones: scores", "numbers >= 0", min(scores.values()))
    missing, zones = Fraction(repr(share)) * sum(mass.values()), []
    for name in ranking(scores):
        if missing > 0:
            zones.append(name)
            missing -= mass[name]
    return tuple(zones)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's coefficient of two scores of the same layers; None if one is constant.

    Examples:
        >>> rank_correlation([1.0, 2.0, 3.0], [7.0, 5.0, 0.0])
        -1.0
    """
    if len(a) != len(b):
        raise ShapeError("rank_correlation", f"two scores of {len(a)} layers", len(b))
    # Ranks, centred and doubled; equal scores share their mean rank.
    left, right = (np.sign(np.subtract.outer(scores, scores)).sum(1) for scores in (a, b))
    spread = (left @ left) * (right @ right)
    return float(left @ right / np.sqrt(spread)) if spread else None


@dataclass(frozen=True)
class LayerScores:
    """Scores of a Linear, or of a block over all weights of its Linears; None if not measured."""

    name: str
    magnitude: float
    wanda: float
    influence: float | None = None
    ablation: float | None = None


@dataclass(frozen=True)
class WeightMap:
    """Result of a probe: the scores of Linears and of blocks, in the model's order."""

    layers: tuple[LayerScores, ...]
    blocks: tuple[LayerScores, ...]

    @property
    def correlations(self) -> dict[str, float | None]:
        """Rank correlation over blocks of each score with ablation; empty without ablation."""
        columns = {score: [*scores_of(self.blocks, score).values()] for score in SCORES}
        truth = columns.pop("ablation")
        return {name: rank_correlation(column, truth) for name, column in columns.items() if truth}

    def table(self) -> pa.Table:
        """Return a row for each Linear and block: kind ("layer" or "block"), name and `SCORES`."""
        rows = [{"kind": "layer", **asdict(row)} for row in self.layers]
        rows += [{"kind": "block", **asdict(row)} for row in self.blocks]
        types = {"kind": "string", "name": "string", **dict.fromkeys(SCORES, "float64")}
        return pa.Table.from_pylist(rows, schema=pa.schema(types))


def scores_of(rows: Iterable[LayerScores], score: str) -> dict[str, float]:
    """Map names to one of `SCORES`, for the rows that have it.

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

    `change` is the root mean square of ΔW; `held` the share of ``‖ΔW‖²`` that the rank can hold.
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
    """List the layers that differ between two models, the most changed first.

    Arguments and errors are those of `lora.extract.extract_delta`.

    Examples:
        >>> changes({"q.weight": np.zeros((2, 2))}, {"q.weight": np.diag([4.0, 3.0])}, rank=1)
        (LayerChange(name='q', change=2.5, held=0.64),)
    """
    before, after = (
        model.state_dict() if isinstance(model, Model) else model for model in (base, tuned)
    )
    card = extract_delta(
        base, tuned, rank, target_modules=target_modules, dtype="float64", on_module=on_step
    )
    rows = []
    for name, figures in card.metadata["extract"]["modules"].items():
        key = f"{name}.weight".removeprefix(".")
        delta = _array(after[key]) - _array(before[key])
        largest = np.abs(delta).max()  # so that no square over- or underflows
        change = float(np.sqrt(np.square(delta / largest).mean()) * largest)
        rows.append(LayerChange(name, change, figures["energy"]))
    return tuple(sorted(rows, key=lambda row: (-row.change, row.name)))


@dataclass(frozen=True, eq=False)
class WeightMapProbe:
    """Scores a model's Linears and blocks on texts, on a copy of the model.

    Args:
        encoder: A torch module with ``encode(texts)``, such as an engine's ``base``.
        blocks: Names of the blocks; by default the members of the longest ``ModuleList``.
        on_step: Called after each text and each ablated block.

    Examples:
        >>> import lora
        >>> engine = lora.ArrowEngine.from_pretrained(None)
        >>> result = WeightMapProbe(engine.base).probe(["a card is a value", "a function adapts"])
        >>> len(result.layers), hot_zones(scores_of(result.blocks, "influence"), 0.3)
        (36, ('encoder.layer.5',))
    """

    encoder: nn.Module
    blocks: Sequence[str] | None = None
    on_step: OnStep = lambda *_: None

    def probe(self, texts: Sequence[str], *, ablation: bool = True) -> WeightMap:
        """Score on texts, each run by itself, so that no padding is measured.

        Linears that no text reaches are left out. Ablation runs all texts once more for each block,
        and scores the mean ``1 − cos`` of embeddings with and without it.
        """
        if not (texts := texts_of(texts)):
            raise ArgumentError("probe: texts", "at least one", "none")
        model = fold(self.encoder).eval()
        if not hasattr(model, "encode"):
            kind = type(model).__name__
            raise UnsupportedModelError("probe: encoder", "a module with encode(texts)", kind)
        blocks = _blocks(model, self.blocks)
        inputs, turned = self._measured(adapt(model, ()), texts, blocks)
        layers, figures = [], {}
        for name, tally in inputs.items():
            weight, where = _array(model.get_submodule(name).weight), f"probe: {name!r}"
            rms = np.sqrt(tally.mean)
            scores = wanda(weight, where=where), wanda(weight, rms, where=where)
            layers.append(LayerScores(name, *scores))
            figures[name] = scores, weight.size
        whole = _encoded(model, texts) if ablation else None
        rows = []
        for position, block in enumerate(blocks, 1):
            inner = [row for name, row in figures.items() if f"{name}.".startswith(f"{block}.")]
            if not (inner and turned[block].count):
                expected = "a block in which a Linear runs"
                raise TargetError(f"probe: block {block!r}", expected, "none that a text reaches")
            scores, sizes = zip(*inner, strict=True)
            magnitude, weighted = np.average(scores, axis=0, weights=sizes).tolist()
            lost = None
            if whole is not None:
                lost = _lost(model, texts, block, whole)
                self.on_step(block, position, len(blocks))
            rows.append(LayerScores(block, magnitude, weighted, float(turned[block].mean), lost))
        return WeightMap(tuple(layers), tuple(rows))

    def _measured(
        self, model: nn.Module, texts: list[str], blocks: tuple[str, ...]
    ) -> tuple[dict[str, Tally], dict[str, Tally]]:
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        inputs, turned = dict.fromkeys(linears, Tally()), dict.fromkeys(blocks, Tally())

        def add(name: str, x: Any, output: Any) -> None:
            y, where = output[0] if isinstance(output, tuple) else output, f"probe: {name!r}"
            if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
                kinds = f"{type(x)}, {type(y)}"
                raise UnsupportedModelError(where, "a tensor in and out", kinds)
            if name in inputs:
                inputs[name] += squares(_array(x))
            if name in turned:
                turned[name] += turns(_array(x), _array(y), where=where)

        for name in inputs | turned:
            _on_forward(model.get_submodule(name), partial(add, name))
        for position, text in enumerate(texts, 1):
            _encoded(model, [text])
            self.on_step("text", position, len(texts))
        return {name: tally for name, tally in inputs.items() if tally.count}, turned


def _blocks(model: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if names is None:
        lists = [
            [f"{name}.{index}".removeprefix(".") for index in range(len(module))]
            for name, module in modules.items()
            if isinstance(module, nn.ModuleList)
        ]
        names = max(lists, key=len, default=[])
    names = [names] if isinstance(names, str) else texts_of(names, "probe: blocks")
    blocks = tuple(dict.fromkeys(names))
    unknown = [block for block in blocks if block not in modules]
    if unknown or not blocks:
        expected, hint = "names of modules of the model", "name them in blocks"
        raise TargetError("probe: blocks", expected, unknown or "none", hint)
    return blocks


def _lost(model: nn.Module, texts: list[str], block: str, whole: Array) -> float:
    """Return how far the embeddings turn if a block passes its input on."""

    def skip(x: Any, output: Any) -> Any:
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = _on_forward(model.get_submodule(block), skip)
    without = _encoded(model, texts)
    handle.remove()
    return float(turns(whole, without, where=f"probe: {block!r} ablated").mean)


def _on_forward(module: nn.Module, act: Callable[[Any, Any], Any]) -> Any:
    """Call `act` with first argument and output of each forward; it may replace the output."""
    return module.register_forward_hook(
        lambda _, args, options, output: act(next(iter((*args, *options.values())), None), output),
        with_kwargs=True,
    )


def _rows(x: Array) -> Array:
    if not x.ndim or not x.shape[-1]:
        raise ShapeError("activations", "(..., channels), at least one channel", x.shape)
    rows: Array = x.astype(np.float64).reshape(-1, x.shape[-1])
    return rows


def _array(values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    return np.asarray(values, np.float64)


def _encoded(model: Any, texts: list[str]) -> Array:
    with torch.inference_mode():
        return _array(model.encode(texts))
