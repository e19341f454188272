"""Linears with low-rank terms, made from those of a model.

A base is never changed: a layer is a twin of it, over the same weight. The twin has a class made
for the base's, so that it stays what it was to those who ask, and calls the base's own forward:
quantised Linears, transformers' Conv1D and subclasses are adapted as ``nn.Linear`` is. What needs
the weight itself, as `folded` does, has it dequantised or refuses the layer by name.

Requirements: R2, R3, R5, R7, R8, R26.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lora.card import LowRank
from lora.checks import finite, share
from lora.errors import ArgumentError, UnboundWarning, UnsupportedModelError, shown
from lora.factors import concat
from lora.models.twins import FLOATS, Twins
from lora.targets import Site, check_shape

Terms = dict[str, tuple[LowRank, float]]
"""Card name -> (pair, weight)."""

WIDE = (torch.float32, torch.float64)
"""Dtypes in which ``W + ΔW`` keeps a small ΔW."""

_PACKAGES = ("lora", "torch", "transformers", "sentence_transformers", "safetensors")


class NeverCalled(nn.Module):
    """A module that a model loads and saves but never calls: adapters have no effect in it."""


_PLAIN_FORWARDS = frozenset(
    {
        ("torch.nn.modules.linear", "Linear.forward"),
        ("transformers.pytorch_utils", "Conv1D.forward"),
    }
)
"""Forwards that compute ``x Wᵀ + b`` or ``x W + b`` into new memory, by module and name."""


class _Adapted(nn.Module):
    """A twin of a Linear, of a class that derives from this one and from the Linear's own.

    A state dict leaves factors in buffers out, which it warns of once.
    """

    weight: Tensor
    bias: Tensor | None
    notices: set[str]

    def __init_subclass__(cls) -> None:
        """Leave the base's class, which may want arguments, out of what is derived from both."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        if not arguments and not options:  # a copy is being made
            return object.__new__(cls)
        base: Any = arguments[0] if arguments else options.get("base")
        check_linear(base, "base")
        return _empty(cls, class_of(base))

    def __init__(self, base: nn.Module, memo: Twins | None = None) -> None:
        memo = memo or Twins(base)
        _check_names(type(self), base, memo)
        memo.fill(self, base)
        self.notices = memo.notices

    def __repr__(self) -> str:
        columns, rows = features(self)
        return f"{type(self).__name__}({columns} -> {rows}, {self.extra_repr()})"

    def base_output(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return what the base computes, in memory of its own."""
        out = super().forward(x, *arguments, **options)
        if not isinstance(out, Tensor):
            where = f"a layer of class {type(self).__name__}"
            raise UnsupportedModelError(where, "a forward that gives a tensor", shown(out))
        return out.clone()

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if any(name.startswith("lora_A") and a.numel() for name, a in self.named_buffers()):
            _warn_of_saving(self.notices)
        super()._save_to_state_dict(*arguments)


def _check_names(made: Any, base: nn.Module, memo: Twins) -> None:
    """Refuse a Linear with something of its own where the layer around it keeps its own."""
    own = _own_names(made.__bases__[0])
    if isinstance(base, _Adapted):
        own -= _own_names(type(base).__bases__[0])
    if taken := sorted(name for name in own if hasattr(base, name)):
        expected = f"a Linear with no attribute {taken[0]!r}, which its layer needs"
        hint = f"rename it in {type(base).__name__}"
        raise UnsupportedModelError(memo.name_of(base), expected, "one that has it", hint)


@lru_cache
def _own_names(layer: Any) -> frozenset[str]:
    kinds = [kind for kind in layer.__mro__ if issubclass(kind, _Adapted)]
    names = {name for kind in kinds for name in (*vars(kind), *kind.__annotations__)}
    return frozenset(names - {"weight", "bias"}.union(dir(nn.Linear)))


@lru_cache(256)
def _around(layer: Any, kind: Any) -> Any:
    def reduce(self: _Adapted) -> tuple[Any, ...]:
        return _empty, (layer, kind), self.__getstate__()  # type: ignore[no-untyped-call]

    members = {"__module__": layer.__module__, "__reduce__": reduce}
    if _has_plain_forward(kind):  # without the price of another call
        members["base_output"] = kind.forward
    try:
        return type(layer.__name__.replace("Linear", kind.__name__), (layer, kind), members)
    except Exception as error:  # a metaclass raises what it likes
        where, expected = f"{kind.__module__}.{kind.__qualname__}", "a class to derive another from"
        raise UnsupportedModelError(where, expected, f"{type(error).__name__}: {error}") from error


def _empty(layer: Any, kind: Any) -> Any:
    """Return a layer that is yet to be filled, as pickle and copy need it."""
    return object.__new__(_around(layer, kind))


def class_of(linear: nn.Module) -> Any:
    """Return the class of a Linear; of an adapted one, that of its base."""
    kind = type(linear)
    return kind.__bases__[-1] if isinstance(linear, _Adapted) else kind


def _has_plain_forward(kind: Any) -> bool:
    return (kind.forward.__module__, kind.forward.__qualname__) in _PLAIN_FORWARDS


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a Linear: of ``nn.Linear``'s class or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is a Conv1D of transformers, whose weight is ``(in, out)``."""
    kind: Any = type(module)
    return _is_conv1d(kind)


@lru_cache(256)
def _is_conv1d(kind: type) -> bool:
    names = [(base.__module__, base.__qualname__) for base in kind.__mro__]
    return ("transformers.pytorch_utils", "Conv1D") in names


def features(linear: Any) -> tuple[int, int]:
    """Return the sizes of a Linear's input and output."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return linear.nx, linear.nf


def is_plain(linear: nn.Module) -> bool:
    """Tell whether a Linear computes ``x Wᵀ + b`` with a weight that is stored as it is."""
    weight = linear._parameters.get("weight")
    is_stored = type(weight) is nn.Parameter and weight.dtype in FLOATS
    return is_stored and _has_plain_forward(class_of(linear))


def dense_weight(linear: nn.Module, where: Callable[[], str]) -> Tensor:
    """Return the weight of a Linear as it is stored; a quantised one, dequantised.

    Args:
        where: Names the layer in an error.

    Raises:
        UnsupportedModelError: It can't be dequantised, or something else computes it.
    """
    weight: Any = linear._parameters.get("weight")
    rows = features(linear) if is_conv1d(linear) else features(linear)[::-1]
    dense = weight
    if type(weight).__module__.startswith("bitsandbytes"):
        dense = _dequantised(linear, weight)
    elif isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
        dense = weight.dequantize()
    if isinstance(dense, Tensor) and dense.dtype in FLOATS and tuple(dense.shape) == rows:
        return dense.detach()
    kind = type(weight)
    expected = "a weight that is stored in floating point or that its own library dequantises"
    actual = f"a {kind.__module__}.{kind.__qualname__}" if weight is not None else "a computed one"
    hint = "do this with the model before it is quantised or parametrised"
    raise UnsupportedModelError(where(), expected, actual, hint)


def _dequantised(linear: Any, weight: Any) -> Tensor | None:
    """Return a weight of bitsandbytes as numbers; None if it can't be told what they are."""
    functional = import_module("bitsandbytes.functional")
    if (state := getattr(weight, "quant_state", None)) is not None:
        is_packed = getattr(state, "packing_format_for_cpu", False)  # by its first forward
        return None if is_packed else functional.dequantize_4bit(weight.data, state)
    scales = getattr(weight, "SCB", None)
    if scales is None and hasattr(linear, "state"):  # after its first forward
        scales = linear.state.SCB
    if scales is None:
        return None if weight.dtype == torch.int8 else weight.data
    return functional.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]


class LoRALinear(_Adapted):
    """``base(x) + Σ weight · scaling · (x @ A @ B)`` over any number of named terms, for inference.

    The terms are stacked into two buffers that the state dict leaves out.

    Args:
        base: Any Linear, whose output is used as it is. With the plain weight of an ``nn.Linear``
            or a Conv1D, large inputs may take another order of products.
        terms: Name -> (pair, weight).
        memo: Shared by all copies of one model.

    Attributes:
        weight_side_threshold: Inputs with more elements use ``W + ΔW``, formed for that call.

    Examples:
        >>> base = nn.Linear(2, 2, bias=False).requires_grad_(False)
        >>> ones = LowRank(np.ones((2, 1), np.float32), np.ones((1, 2), np.float32), 0.5)
        >>> layer = LoRALinear(base, {"docs": (ones, 1.0)})
        >>> (layer(torch.ones(2)) - base(torch.ones(2))).round(decimals=4)
        tensor([1., 1.])
    """

    lora_A: Tensor
    lora_B: Tensor
    terms: Terms
    weight_side_threshold: float

    def __init__(
        self, base: nn.Module, terms: Terms | None = None, memo: Twins | None = None
    ) -> None:
        super().__init__(base, memo)
        self._set(terms or {})

    def load_weights(self, pair: LowRank, *, name: str = "default", weight: float = 1.0) -> None:
        """Set the term called `name`, in place of an earlier one of that name."""
        self._set({**self.terms, name: (pair, weight)})

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:  # noqa: D102
        if x.numel() > self.weight_side_threshold and self.weight.dtype in WIDE:
            # Autocast would round W + ΔW, and training would form it again in the backward pass.
            inference = torch.is_inference_mode_enabled() and not is_autocast(x)
            if inference and is_plain(self):
                weight = torch.addmm(_by_output(self), self.lora_B.T, self.lora_A.T)
                return F.linear(x, weight, self.bias)
        out = self.base_output(x, *arguments, **options)
        a = self.lora_A
        return add_low_rank(out, x, a, self.lora_B) if a.numel() else out

    def extra_repr(self) -> str:
        """Name the terms with their ranks and weights."""
        terms = (f"{name!r}: rank {pair.rank} x {w:g}" for name, (pair, w) in self.terms.items())
        return ", ".join(terms) or "no adapters"

    def _set(self, terms: Terms) -> None:
        for name, term in terms.items():
            if not isinstance(term, tuple) or len(term) != 2 or not isinstance(term[0], LowRank):
                where = f"term {name!r} of a layer"
                raise ArgumentError(where, "a LowRank and its weight", shown(term))
            finite(term[1], f"weight of term {name!r} of a layer", ArgumentError)
            check_shape(_site(self), term[0], f"factors {name!r} of a layer")
        a, b = stacked(terms, self)
        self.terms = dict(sorted(terms.items()))
        # Measured: forming W + ΔW is cheaper once x and y have about twice as many elements as W.
        columns, rows = features(self)
        threshold = 2 * rows * columns**2 / (rows + columns) if is_plain(self) else math.inf
        self.weight_side_threshold = threshold if a.numel() else math.inf
        self.register_buffer("lora_A", a, persistent=False)
        self.register_buffer("lora_B", b, persistent=False)


class TrainableLinear(_Adapted):
    """A Linear with one pair of trainable float32 factors; gradients reach only these.

    The factors are cast to the input's dtype, so that a narrow base and autocast both work; the
    base's own forward has to be differentiable in its input.
    `dropout` is the probability of zeroing an input of the low-rank path in training mode.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    dropout: float

    def __init__(
        self, base: nn.Module, pair: LowRank, *, dropout: float = 0.0, memo: Twins | None = None
    ) -> None:
        super().__init__(base, memo)
        check_shape(_site(base), pair, "factors of a layer")
        self.scaling = 1.0 if pair.scaling is None else pair.scaling
        self.dropout = share(dropout, "dropout", "[0, 1)")
        for name, factor in (("lora_A", pair.A), ("lora_B", pair.B)):
            values = torch.tensor(factor.astype(np.float32), device=self.weight.device)
            setattr(self, name, nn.Parameter(values))

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:  # noqa: D102
        out = self.base_output(x, *arguments, **options)
        if x.requires_grad and torch.is_grad_enabled() and not out.requires_grad:
            where = f"a layer of class {type(self).__name__}"
            expected = "a forward that passes gradients on to its input"
            hint = "train on the model before it is quantised, or with weight-only quantisation"
            raise UnsupportedModelError(where, expected, "one that does not", hint)
        dropped = F.dropout(x, self.dropout, training=self.training)
        term = (dropped @ self.lora_A.to(x.dtype) @ self.lora_B.to(x.dtype)) * self.scaling
        return out + term.to(out.dtype)

    def extra_repr(self) -> str:
        """Name the rank."""
        return f"rank {self.lora_A.shape[1]}, in training"

    def learned(self) -> LowRank:
        """Return a copy of the factors as they are now."""
        a, b = (factor.detach().cpu().numpy().copy() for factor in (self.lora_A, self.lora_B))
        return LowRank(a, b, self.scaling)


def is_autocast(x: Tensor) -> bool:
    """Tell whether autocast is on for the device of a tensor; ``meta`` has none."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def add_low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``out + x @ A @ B``, by one addmm; in inference mode it may overwrite `out`.

    Shapes: `out` ``(..., out)``, `x` ``(..., in)``, `a` ``(in, r)``, `b` ``(r, out)``. An input of
    another dtype than the factors' is cast to theirs, and the product to that of `out`.
    """
    if x.dtype != a.dtype and not is_autocast(x):
        x = x.to(a.dtype)
    inner, flat = x.reshape(-1, x.shape[-1]) @ a, out.reshape(-1, out.shape[-1])
    if inner.dtype != out.dtype:
        return out + (inner @ b).to(out.dtype).reshape(out.shape)
    if torch.is_inference_mode_enabled():
        # Autocast does not convert the arguments of an operation in place.
        return flat.addmm_(inner, b.to(inner.dtype)).reshape(out.shape)
    return torch.addmm(flat, inner, b).reshape(out.shape)


def stacked(
    terms: Terms, linear: nn.Module, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``[A₁ … Aₙ]`` (in, R) and ``[w₁s₁B₁; …; wₙsₙBₙ]`` (R, out), sorted by name.

    They have the weight's device, and its dtype if that is one of `FLOATS`, else float32. Terms of
    weight 0 are left out.
    """
    weight: Any = linear.weight
    if dtype is None:
        dtype = weight.dtype if weight.dtype in FLOATS else torch.float32
    inner, outer = features(linear)
    live = [terms[name] for name in sorted(terms) if terms[name][1] != 0]
    if not live:
        nothing = torch.empty(0, dtype=dtype, device=weight.device)
        return nothing.reshape(inner, 0), nothing.reshape(0, outer)
    pair = concat(live, dtype=np.float64 if dtype == torch.float64 else None)
    a, b = (torch.tensor(factor).to(weight.device, dtype) for factor in (pair.A, pair.B))
    return a, b


def folded(
    linear: nn.Module, terms: Terms, *, narrow: bool = False, memo: Twins | None = None
) -> nn.Module:
    """Return a Linear of ``W + ΔW``, without terms; a quantised one becomes a plain ``nn.Linear``.

    A dtype narrower than float32 gives a `LoRALinear`, since rounding could lose ΔW. With `narrow`
    the sum is formed in float32 and rounded once.

    Raises:
        UnsupportedModelError: The weight can't be had, or the forward does not use it as Linears
            do.
    """
    memo, kind = memo or Twins(linear), class_of(linear)
    where = partial(memo.name_of, linear)
    weight = dense_weight(linear, where)
    own = linear.weight
    dtype = weight.dtype if own.dtype in FLOATS else memo.dtype
    if dtype not in WIDE and not narrow:
        return LoRALinear(linear, terms, memo)
    becomes_plain = kind.__module__.startswith("bitsandbytes") or (
        _has_plain_forward(kind) and not is_conv1d(linear)
    )
    result: Any = memo.fill(object.__new__(nn.Linear if becomes_plain else kind), linear)
    if isinstance(linear, LoRALinear):
        del result.terms, result.weight_side_threshold, result.lora_A, result.lora_B, result.notices
    if kind.__module__.startswith("bitsandbytes"):  # what holds the quantised weight
        vars(result).pop("state", None)
        vars(result).pop("quant_state", None)
    wide = weight.to(torch.promote_types(dtype, torch.float32))
    a, b = stacked(terms, linear, wide.dtype)
    total = torch.addmm(wide, *((a, b) if is_conv1d(linear) else (b.T, a.T))).to(dtype)
    check_sums(total, where)
    result.weight = nn.Parameter(total, requires_grad=False)
    if not _has_plain_forward(type(result)):
        _check_folded(result, linear, terms, where)
    return result  # type: ignore[no-any-return]


def check_sums(sums: Tensor, where: Callable[[], str]) -> None:
    """Refuse sums of W and ΔW that are not finite in the dtype that they were rounded to."""
    has_values = sums.numel() and not sums.is_meta
    if has_values and not all(extreme.isfinite() for extreme in sums.aminmax()):
        name = str(sums.dtype).removeprefix("torch.")
        hint = "give the cards less weight or the base a wider dtype; or a weight was NaN before"
        raise UnsupportedModelError(where(), f"sums that {name} holds", "others", hint)


def _check_folded(
    result: nn.Module, linear: nn.Module, terms: Terms, where: Callable[[], str]
) -> None:
    """Refuse a folded layer whose forward gives other values than the factors do."""
    weight: Any = result.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, features(linear)[0], generator=generator).to(weight)
    with torch.inference_mode():
        base, whole = LoRALinear(linear, {})(x), LoRALinear(linear, terms)(x)
        rounding = 16 * torch.finfo(weight.dtype).eps * base.abs().amax()
        error, allowed = result(x) - whole, 1e-3 * (whole - base).abs().amax() + rounding
    if not bool((error.abs() <= allowed).all()):
        expected = "a forward that computes x Wᵀ + b, which takes W + ΔW for W"
        hint = "keep the adapted model as it is, without fold"
        raise UnsupportedModelError(where(), expected, "another one", hint)


def _by_output(linear: nn.Module) -> Tensor:
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(linear) else weight


def _site(linear: nn.Module) -> Site:
    return Site(*features(linear), owner="")


def _warn_of_saving(notices: set[str]) -> None:
    """Warn, once a model, that a state dict which the user asked for lacks the adapters."""
    if "saving" not in notices and _is_asked_by_user():
        notices.add("saving")
        warn_unbound(
            "a state dict or a saved model holds the base alone, without its adapters: "
            "save lora.fold(model), or the cards by lora.save"
        )


def _is_asked_by_user() -> bool:
    """Tell whether the user asks for a state dict, and not torch, a trainer or this package."""
    libraries, saves = 0, False
    for module, function in islice(_callers(), 3, None):  # the first are those of this file
        package, _, rest = module.partition(".")
        if module == "torch.nn.modules.module" or function == "state_dict":
            continue
        if package in ("torch", "accelerate", "lora") or "trainer" in rest:
            return False
        if package not in ("transformers", "sentence_transformers", "safetensors"):
            return saves or not libraries
        libraries, saves = libraries + 1, saves or function.startswith("save")
    return False


def warn_unbound(text: str) -> None:
    """Give an `UnboundWarning` at the line outside this package and those around it."""
    level = 0
    for module, _ in _callers():
        level += 1
        if module.partition(".")[0] not in _PACKAGES:
            break
    warnings.warn(text, UnboundWarning, stacklevel=level)


def _callers() -> Iterator[tuple[str, str]]:
    """Yield the module and the name of each function that is running, from the caller outwards."""
    frame = inspect.currentframe()
    while frame := frame and frame.f_back:
        yield str(frame.f_globals.get("__name__")), frame.f_code.co_name


def check_linear(module: nn.Module, where: str) -> None:
    """Refuse a module that is no Linear, or a Linear with factors to train or for rows."""
    kind = type(module)
    is_other = isinstance(module, _Adapted) and not isinstance(module, LoRALinear)
    if (
        not isinstance(module, nn.Module)
        or not is_linear(module)
        or is_other
        or issubclass(class_of(module), _Adapted)
    ):
        expected = "a Linear (nn.Linear, a subclass of it, or transformers' Conv1D)"
        actual = f"{kind.__module__}.{kind.__qualname__}"
        hint = "adapt the model that this one was made from" if is_other else ""
        raise UnsupportedModelError(f"module {where!r}", expected, actual, hint)


Uncalled = NeverCalled  # its earlier name
