"""A model in which each row of a batch has adapters of its own.

`rows` names the adapter set of each row, in a context variable that the layers read: what lies
between a model's forward and its Linears passes nothing on. Neighbouring rows of one set are a
segment, to which a layer adds the set's terms. Rows of one token, in many segments, are gathered by
set for one batched product. Segments are found once a batch, for all layers.
Texts that an encoder sorts and batches carry their set (`carrying`). Whether a model keeps its rows
apart is tried out (`check_rows`).

Requirements: R5, R26.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lora.card import LowRank
from lora.checks import integer
from lora.errors import ArgumentError, ShapeError, StateError, UnsupportedModelError, shown
from lora.models.layers import Terms, _Adapted, add_low_rank, features, is_autocast, stacked
from lora.models.twins import Twins

M = TypeVar("M", bound=nn.Module)

Segments = tuple[tuple[int, int, int], ...]
"""Runs of rows of one batch: (start, stop, index of the adapter set)."""

Probe = Mapping[str, Any] | Literal[False] | None
"""Keywords of a forward that shows whether a model keeps rows apart; False: it is not tried."""

_PROBE_TEXTS = ["a query of words", "another, whose length is not the first's", "short"]
_PROBE_TEXTS.append(_PROBE_TEXTS[0])  # an encoder may keep what it has encoded


class Group(NamedTuple):
    """Rows of one token, gathered by set for a batched product.

    Args:
        sets: Indices of the sets.
        gathered: Rows of these sets, as many for each; a set with fewer has its first one again.
        places: Where among those the rows are, each once.
        rows: These rows.
    """

    sets: tuple[int, ...]
    gathered: Tensor
    places: Tensor
    rows: Tensor


def _group(segments: Segments, ranks: Sequence[int], device: torch.device) -> Group | None:
    """Gather rows by set; None where ranks differ, or where segments take less time."""
    sets: dict[int, list[int]] = {}
    for start, stop, index in segments:
        if ranks[index]:
            sets.setdefault(index, []).extend(range(start, stop))
    longest = max(map(len, sets.values()), default=0)
    # A segment takes about as long as four rows of the batched product.
    if len({ranks[index] for index in sets}) != 1 or len(sets) * longest > 4 * len(segments):
        return None
    gathered = [row for own in sets.values() for row in own + own[:1] * (longest - len(own))]
    places = [longest * i + j for i, own in enumerate(sets.values()) for j in range(len(own))]
    rows, taken = (torch.tensor(each, device=device) for each in (gathered, places))
    return Group(tuple(sets), rows, taken, rows[taken])


class Rows:
    """The adapter set of each row of a batch.

    Args:
        texts: Whether texts that carry their set are being encoded, so that batches are known only
            when they are tokenised.
    """

    def __init__(self, sets: Sequence[int], *, texts: bool = False, batch: bool = False) -> None:
        if not isinstance(sets, Iterable):
            raise ArgumentError("rows", "the index of a set for each row", shown(sets))
        self.sets = [integer(index, "rows: a set", least=0) for index in sets]
        self.texts, self.batch = texts, batch
        self._largest = max(self.sets, default=-1)
        self._segments: dict[int, Segments] = {}
        self._groups: dict[tuple[Any, ...], Group | None] = {}
        self._stacks: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def is_used(self) -> bool:
        """Tell whether a layer has asked for the segments."""
        return bool(self._segments)

    def segments(self, size: int, number: int) -> Segments:
        """Return the segments of a first dimension of `size`, for a layer with `number` sets.

        A size of k times the rows is each row k times in its place, as beams are.

        Examples:
            >>> Rows([2, 0, 0]).segments(6, 3)
            ((0, 2, 2), (2, 6, 0))
        """
        segments = self._segments.get(size)
        if segments is None:
            times, left = divmod(size, len(self.sets)) if self.sets else (0, size)
            if left or (self.sets and not times):
                expected = f"{len(self.sets)} rows, as named by lora.rows, or a multiple of them"
                hint = "name each row; a model that mixes rows, or splits a batch, can't be used so"
                raise ShapeError("first dimension of a layer's input", expected, size, hint)
            starts = [
                row for row, own in enumerate(self.sets) if not row or own != self.sets[row - 1]
            ]
            stops = [*starts[1:], len(self.sets)]  # one too many for an empty batch
            segments = tuple(
                (start * times, stop * times, self.sets[start])
                for start, stop in zip(starts, stops, strict=False)
            )
            self._segments[size] = segments
        if self._largest >= number:
            raise ArgumentError("rows", f"sets from 0 to {number - 1}", self._largest)
        return segments

    def group(self, size: int, layer: "RowLinear", device: torch.device) -> Group | None:
        """Return rows of one token by set; None where segments are better."""
        key = size, layer.ranks, device
        if key not in self._groups:
            segments = self.segments(size, len(layer.ranks))
            self._groups[key] = _group(segments, layer.ranks, device)
        return self._groups[key]

    def stacks(self, layer: "RowLinear", sets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the A and the B of sets: ``(sets, in, rank)``, ``(sets, rank, out)``.

        They are kept, for the steps of ``generate``, as long as these rows are named.
        """
        first, stacks = layer.factor("A", sets[0]), self._stacks.get((layer, sets))
        if stacks is None or stacks[0] is not first:  # none yet, or the model was moved
            a, b = (torch.stack([layer.factor(name, index) for index in sets]) for name in "AB")
            stacks = self._stacks[layer, sets] = first, a, b
        return stacks[1:]


_rows: ContextVar[Rows | None] = ContextVar("lora_rows", default=None)


@contextmanager
def rows(sets: Sequence[int]) -> Iterator[None]:
    """Name the adapter set of each row for the forwards, in this block, of an `adapt_rows` model.

    This covers ``generate`` and the ``encode`` of a `SentenceTransformer`, in this thread only.

    Args:
        sets: Index of a set for each row of the batch, or for each text.

    Raises:
        ArgumentError: An index is negative or, in a forward, above the last set's.
        ShapeError: The rows of a forward are no multiple of the named ones.

    Examples:
        >>> from lora import LoRACard, LowRank, adapt_rows
        >>> card = LoRACard("docs", 1, 1.0, ["0"], {"0": LowRank(np.ones((2, 1)), np.ones((1, 2)))})
        >>> model = adapt_rows(nn.Sequential(nn.Linear(2, 2)), [{}, card], probe=False)
        >>> with rows([0, 1]), torch.inference_mode():
        ...     change = model(torch.ones(2, 2)).diff(dim=0)
        >>> change.round()
        tensor([[2., 2.]])
    """
    with _named(Rows(sets)):
        yield


@contextmanager
def _named(named: Rows) -> Iterator[None]:
    token = _rows.set(named)
    try:
        yield
    finally:
        _rows.reset(token)


class RowLinear(_Adapted):
    """A Linear in which each row of a batch has the terms of one of several sets; see `rows`."""

    ranks: tuple[int, ...]

    def __init__(self, base: nn.Module, sets: Sequence[Terms], memo: Twins | None = None) -> None:
        super().__init__(base, memo)
        pairs = [stacked(terms, self) for terms in sets]
        self.ranks = tuple(len(b) for _, b in pairs)
        for index, pair in enumerate(pairs):
            for name, factor in zip("AB", pair, strict=True):
                self.register_buffer(f"lora_{name}{index}", factor, persistent=False)

    def factor(self, name: str, index: int) -> Any:
        """Return the A or the B of a set."""
        return self._buffers[f"lora_{name}{index}"]

    def extra_repr(self) -> str:
        """Tell how many sets there are."""
        return f"{len(self.ranks)} sets of adapters"

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:  # noqa: D102
        named = _rows.get()
        if named is None:
            where, expected = "a layer with adapters for each row", "the set of each row"
            hint = "call the model within `with lora.rows([...]):`, in the same thread"
            raise StateError(where, expected, "none", hint)
        if x.ndim < 2:
            expected, hint = "rows, as named by lora.rows", "add the row's dimension: x[None]"
            raise ShapeError("a layer's input", expected, f"a vector of {x.numel()}", hint)
        out = self.base_output(x, *arguments, **options)
        factors: Mapping[str, Any] = self._buffers
        size = len(x)
        segments = named.segments(size, len(self.ranks))
        inputs, flat = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        tokens = len(flat) // max(1, size)
        in_place = not torch.is_grad_enabled() and x.dtype == out.dtype == self.factor("A", 0).dtype
        in_place = in_place and not is_autocast(x)
        group = named.group(size, self, x.device) if in_place and tokens == 1 else None
        if group:
            a, b = named.stacks(self, group.sets)
            shape = len(group.sets), -1
            sums = flat[group.gathered].reshape(*shape, flat.shape[1])
            sums.baddbmm_(inputs[group.gathered].reshape(*shape, inputs.shape[1]) @ a, b)
            flat[group.rows] = sums.reshape(-1, flat.shape[1])[group.places]
            segments = ()
        for start, stop, index in segments:
            a, b = factors[f"lora_A{index}"], factors[f"lora_B{index}"]
            if a.numel():
                part = slice(start * tokens, stop * tokens)
                if in_place:  # many segments make each call count
                    flat[part].addmm_(inputs[part] @ a, b)
                else:
                    flat[part] = add_low_rank(flat[part], inputs[part], a, b)
        return flat.reshape(out.shape)


# ---- texts


class TextOfSet(str):
    """A text that carries the index of its adapter set through an encoder's sorting."""

    __slots__ = ("adapter_set",)
    adapter_set: int


def carried_sets(texts: Sequence[str]) -> list[int]:
    """Return the index of the set that each text carries, or nothing if any of them has none."""
    sets = [text.adapter_set for text in texts if isinstance(text, TextOfSet)]
    return sets if len(sets) == len(texts) else []


def carrying(model: M) -> M:
    """Let the texts of an encoder carry their sets from `rows` to where a batch is tokenised."""
    for name, wrapper in (("encode", _encode), ("preprocess", _tokenise), ("tokenize", _tokenise)):
        method = getattr(model, name, None)
        if callable(method) and not (name == "tokenize" and hasattr(model, "preprocess")):
            setattr(model, name, wraps(method)(partial(wrapper, method)))
    return model


def _encode(method: Any, *arguments: Any, **options: Any) -> Any:
    named = _rows.get()
    if named is None or named.texts:
        return method(*arguments, **options)
    call = inspect.signature(method).bind(*arguments, **options)
    name, texts = next(iter(call.arguments.items()))
    each = [texts] if isinstance(texts, str) else list(texts)
    if len(each) != len(named.sets) or not all(isinstance(text, str) for text in each):
        raise ShapeError("encode", f"{len(named.sets)} texts, as named by lora.rows", shown(texts))
    texts_of_sets = [TextOfSet(text) for text in each]
    for text, index in zip(texts_of_sets, named.sets, strict=True):
        text.adapter_set = index
    call.arguments[name] = texts_of_sets[0] if isinstance(texts, str) else texts_of_sets
    with _named(Rows(named.sets, texts=True)):
        return method(*call.args, **call.kwargs)


def _tokenise(method: Any, *arguments: Any, **options: Any) -> Any:
    """Take the rows of the forward that follows from the texts that it will be for."""
    named = _rows.get()
    if named is not None and named.texts:
        call = inspect.signature(method).bind(*arguments, **options)
        sets = carried_sets(next(iter(call.arguments.values())))
        if named.batch and not named.is_used:
            expected = "a forward for each batch that is tokenised"
            raise StateError("encode", expected, "another batch before it")
        _rows.set(Rows(sets, texts=True, batch=True) if sets else None)
    return method(*arguments, **options)


# ---- the probe


def probe_terms(linear: nn.Module) -> list[Terms]:
    """Return terms of two sets whose effect on a Linear is about as large as its own output."""
    rng = np.random.default_rng(0)
    inner, outer = features(linear)

    def pair() -> LowRank:
        a, b = rng.normal(0, inner**-0.5, (inner, 2)), rng.normal(0, 0.5, (2, outer))
        return LowRank(a.astype(np.float32), b.astype(np.float32), 1.0)

    return [{"probe": (pair(), 1.0)}, {"probe": (pair(), 1.0)}]


def check_rows(model: nn.Module, probe: Mapping[str, Any] | None = None) -> None:
    """Refuse a model in which the adapters of a row reach another row, or not their own.

    Rows of alternating sets are compared with the same batch under one set for all rows.

    Args:
        model: A model in evaluation, whose layers have `probe_terms`.
        probe: Keywords of its forward; default: texts for its ``encode``, or its ``dummy_inputs``.
    """
    where = f"rows of {type(model).__name__}"
    if not isinstance(probe, Mapping | None):
        expected = "keywords of the model's forward, False or None"
        raise ArgumentError(f"{where}: probe", expected, shown(probe), "such as {'input_ids': ids}")
    hint = "give probe=, keywords of a forward over rows of unequal length; probe=False waives this"
    encode = getattr(model, "encode", None) if probe is None else None
    inputs = _dummy_inputs(model) if probe is None else probe
    if encode is None and not inputs:
        raise ArgumentError(where, "inputs to try the model with", "none", hint)

    def output() -> Tensor:
        if encode is not None:
            return torch.stack([torch.as_tensor(row) for row in encode(_PROBE_TEXTS)])
        outputs = _tensors(model(**inputs))
        return next(tensor for tensor in outputs if tensor.is_floating_point())

    try:
        count = len(_PROBE_TEXTS) if encode is not None else len(_tensors(inputs)[0])
        results = []
        for sets in ([0] * count, [1] * count, [row % 2 for row in range(count)]):
            with torch.inference_mode(), rows(sets):
                results.append(output().double().reshape(count, -1))
    except Exception as error:
        expected, problem = "a forward with adapters for each row", type(error).__name__
        raise UnsupportedModelError(where, expected, f"{problem}: {error}", hint) from error
    first, second, mixed = results
    expected_rows = torch.where(torch.arange(count)[:, None] % 2 == 0, first, second)
    difference, effect = (mixed - expected_rows).abs().amax(1), (second - first).abs().amax(1)
    dtypes = {each.dtype for each in model.parameters() if each.is_floating_point()}
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    if not bool((difference < tolerance * effect).all()):  # without an effect, nothing is known
        expected = "each row as it is with its own adapters on all rows"
        raise UnsupportedModelError(where, expected, "rows that are mixed or not reached", hint)


def _dummy_inputs(model: nn.Module) -> dict[str, Any]:
    """Return the inputs that a model of transformers names, as rows of unequal length."""
    inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(inputs, Mapping) or not _tensors(inputs):
        return {}
    first = _tensors(inputs)[0]
    device = next(model.parameters()).device
    result = {name: value.to(device) for name, value in inputs.items()}
    if "attention_mask" in inspect.signature(model.forward).parameters and first.ndim == 2:
        count, size = first.shape
        shorter = torch.arange(count).cumsum(0)  # 0, 1, 3 tokens: no multiple of rows in all
        mask = torch.arange(size) < (size - shorter)[:, None]
        result["attention_mask"] = mask.long().to(device)
        # A row may begin with padding, whose embedding may be zero: adapters would do nothing.
        name = next(iter(result))
        result[name] = result[name].flip(1)
    return result


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    each = values.values() if isinstance(values, Mapping) else values
    return [value for value in each if isinstance(value, Tensor)]
