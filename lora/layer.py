"""LoRALinear: a Linear that adds low-rank terms to what its base computes, and shares the base's
storage.

The base module is never touched: the layer is a copy with dictionaries of its own, whose parameters
are detached, frozen views of the same storage.

Requirements: R2, R3, R5, R7, R8.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lora.card import LowRank
from lora.checks import finite
from lora.errors import ArgumentError, ShapeError, UnsupportedModelError, shown
from lora.lowrank import concat

M = TypeVar("M", bound=nn.Module)

Terms = Mapping[str, tuple[LowRank, float]]
"""Card name -> (pair, weight)."""

WIDE = (torch.float32, torch.float64)
"""Dtypes in which ``W + ΔW`` keeps a small ΔW."""

Segments = tuple[tuple[int, int, int], ...]
"""Runs of rows of one batch, ``(start, stop, index of the adapter set)``."""


class Uncalled(nn.Module):
    """A module whose weights a model loads and saves, but never calls: an adapter has no effect
    there.
    """


_SCALARS = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = frozenset(
    {dict, OrderedDict, list, set}
)  # the usual ones, told and copied four times faster
_HELD = (Tensor, np.ndarray, dict, list, deque, set, tuple)


class Own:
    """Maps what a module holds to its twin, one twin an object, so that what modules share, their
    copies share too.

    A parameter's twin is detached, over the same storage; any other tensor's or array's, which a
    forward may write, is a copy; a container's is a copy that holds the items' twins; anything else
    is its own twin.
    """

    def __init__(self) -> None:
        self._twins: dict[
            int, tuple[Any, Any]
        ] = {}  # id -> (original, which keeps the id taken; twin)

    def __call__(self, value: Any) -> Any:  # noqa: D102
        if type(value) in _SCALARS:
            return value
        if (known := self._twins.get(id(value))) is not None:
            return known[1]
        if type(value) not in _CONTAINERS and not isinstance(value, _HELD):
            return value
        twin = _shallow(value)
        self._twins[id(value)] = value, twin
        if isinstance(value, Tensor | np.ndarray) or not value:
            return twin
        self._fill(value)
        return self._twins[id(value)][1]  # a tuple has another one now

    def _fill(self, value: Any) -> None:
        """Put twins of the items in the place of the items; the container is known by then, so it
        may hold itself.
        """
        twin = self._twins[id(value)][1]
        if isinstance(value, dict):
            for key, item in value.items():
                twin[key] = self(item)
        elif isinstance(value, list | deque | set):
            twin.clear()
            (twin.update if isinstance(value, set) else twin.extend)([self(item) for item in value])
        elif isinstance(value, tuple):
            items = [self(item) for item in value]
            if any(item is not own for item, own in zip(value, items, strict=True)):
                named = getattr(type(value), "_make", type(value))
                self._twins[id(value)] = value, named(items)


class LoRALinear(nn.Linear):
    """``base(x) + Σ weight · scaling · (x @ A @ B)`` over any number of named terms.

    For inference: the terms are stacked into one pair of matrices in the layer's dtype and on its
    device, kept as buffers outside the state dict, whose names stay the base's. Terms of weight 0
    cost nothing and change no bit.

    Args:
        base: A Linear with the forward of ``nn.Linear``. It is not changed.
        terms: Name -> ``(pair, weight)``; the order is irrelevant.

    Attributes:
        many: Elements of an input above which the weight is formed for the call, see
            `weight_side_from`.

    Raises:
        UnsupportedModelError: If the base computes something else than ``nn.Linear``.
        ShapeError: If a pair does not fit the base.

    Examples:
        >>> import numpy as np
        >>> base = nn.Linear(2, 2, bias=False).requires_grad_(False)
        >>> ones = LowRank(np.ones((2, 1), np.float32), np.ones((1, 2), np.float32), 0.5)
        >>> layer = LoRALinear(base, {"docs": (ones, 1.0)})
        >>> (layer(torch.ones(2)) - base(torch.ones(2))).round(decimals=4)
        tensor([1., 1.])
    """

    lora_A: Tensor
    lora_B: Tensor
    terms: dict[str, tuple[LowRank, float]]
    many: float

    def __init__(self, base: nn.Linear, terms: Terms | None = None) -> None:
        check_linear(base, "base")
        _take_over(self, base, Own())
        self._set(dict(terms or {}))

    @classmethod
    def around(cls, base: nn.Linear, terms: Terms, own: Own) -> "LoRALinear":
        """As the constructor, with twins of the base's tensors that the caller keeps track of."""
        check_linear(base, "base")
        layer = shared_copy(base, cls, own)
        layer._set(dict(terms))
        return layer

    def load_weights(self, pair: LowRank, *, name: str = "default", weight: float = 1.0) -> None:
        """Set the term called `name`, in place of an earlier one of that name."""
        self._set({**self.terms, name: (pair, weight)})

    def remove(self, name: str) -> None:
        """Take one term away; the others stay as they are."""
        self._set({key: term for key, term in self.terms.items() if key != name})

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if x.numel() > self.many and exact_weight_side(self.weight):
            return F.linear(x, added(self.weight, self.lora_A, self.lora_B), self.bias)
        out = F.linear(x, self.weight, self.bias)
        return add_low_rank(out, x, self.lora_A, self.lora_B) if self.lora_A.numel() else out

    def _set(self, terms: dict[str, tuple[LowRank, float]]) -> None:
        """Stack the terms, sorted by name; nothing changes if one does not fit."""
        for name, term in terms.items():
            check_fit(self, _pair(term, name), name)
        a, b = stacked(terms, self.weight)
        self.terms = dict(sorted(terms.items()))
        self.many = weight_side_from(self.weight) if a.numel() else math.inf
        self.register_buffer("lora_A", a, persistent=False)
        self.register_buffer("lora_B", b, persistent=False)


class SegmentedLinear(nn.Linear):
    """A Linear whose low-rank term depends on the row: each run of rows of a batch has its own set
    of terms.

    Args:
        base: As for `LoRALinear`.
        sets: One set of terms per adapter set; an empty one leaves its rows to the base.
    """

    def __init__(self, base: nn.Linear, sets: Sequence[Terms], own: Own | None = None) -> None:
        check_linear(base, "base")
        _take_over(self, base, own or Own())
        for index, terms in enumerate(sets):
            a, b = stacked(terms, self.weight)
            self.register_buffer(f"lora_A{index}", a, persistent=False)
            self.register_buffer(f"lora_B{index}", b, persistent=False)

    def forward(self, x: Tensor, segments: Segments = ()) -> Tensor:
        """Rows ``[start, stop)`` of x, counted in its first dimension, get the terms of their
        segment's set.
        """
        out = F.linear(x, self.weight, self.bias)
        for start, stop, index in segments:
            a, b = getattr(self, f"lora_A{index}"), getattr(self, f"lora_B{index}")
            if a.numel():
                out[start:stop] = add_low_rank(out[start:stop], x[start:stop], a, b)
        return out


class TrainableLinear(nn.Linear):
    """A Linear with one pair of trainable float32 master factors, and dropout on the low-rank path
    in training.

    Gradients reach ``lora_A`` and ``lora_B`` only. The factors are cast to the input's dtype on the
    way, so that a narrow base and autocast both work.

    Args:
        base: As for `LoRALinear`.
        pair: Where training starts; its scaling stays fixed.
        dropout: Probability in [0, 1) of zeroing an input of the low-rank path, only in training
            mode.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, base: nn.Linear, pair: LowRank, *, dropout: float = 0.0, own: Own | None = None
    ) -> None:
        check_linear(base, "base")
        check_fit(base, pair, "pair")
        if not 0 <= dropout < 1:
            raise ArgumentError("dropout", "a probability in [0, 1)", dropout)
        _take_over(self, base, own or Own())
        self.scaling = 1.0 if pair.scaling is None else pair.scaling
        self.dropout = dropout
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.tensor(pair.A.astype(np.float32), device=device))
        self.lora_B = nn.Parameter(torch.tensor(pair.B.astype(np.float32), device=device))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = F.linear(x, self.weight, self.bias)
        dropped = F.dropout(x, self.dropout, training=self.training)
        return out + (dropped @ self.lora_A.to(x.dtype) @ self.lora_B.to(x.dtype)) * self.scaling

    def learned(self) -> LowRank:
        """The factors as they are now, float32, with their scaling."""
        a, b = (factor.detach().cpu().numpy().copy() for factor in (self.lora_A, self.lora_B))
        return LowRank(a, b, self.scaling)


def add_low_rank_plain(out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out + x @ A @ B``, as the formula says."""
    return out + x @ a @ b


def add_low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`add_low_rank_plain` with the last product added by the matrix multiplication itself (addmm).

    Args:
        out, x: Shapes ``(..., out)`` and ``(..., in)`` with the same leading dimensions; in
            inference mode, the result takes the place of `out`.
        a, b: Shapes ``(in, r)`` and ``(r, out)``.
    """
    inner, flat = x.reshape(-1, x.shape[-1]) @ a, out.reshape(-1, out.shape[-1])
    if torch.is_inference_mode_enabled():
        return flat.addmm_(inner, b.to(inner.dtype)).reshape(
            out.shape
        )  # autocast leaves what is in place alone
    return torch.addmm(flat, inner, b).reshape(out.shape)


def added(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``W + ΔW``, shape ``(out, in)``, in the weight's dtype."""
    return torch.addmm(weight, b.T, a.T)


def weight_side_from(weight: Tensor) -> float:
    """Elements of an input above which ``x (W + ΔW)ᵀ`` is cheaper than the factored order, ΔW being
    formed for the call.

    Measured: where the input's and the output's elements together are about twice the weight's.
    """
    rows, columns = weight.shape
    return 2 * weight.numel() * columns / (rows + columns)


def exact_weight_side(weight: Tensor) -> bool:
    """Whether ``W + ΔW`` would keep a small ΔW, and be used for nothing but this call: not in
    training, not by autocast.
    """
    autocast = torch.is_autocast_enabled(weight.device.type)
    return weight.dtype in WIDE and torch.is_inference_mode_enabled() and not autocast


def stacked(terms: Terms, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[A₁ … Aₙ]`` and ``[w₁s₁B₁; …]`` of the terms that have a weight, sorted by name, as the
    base weight's kind.

    Shapes ``(in, R)`` and ``(R, out)``; R is 0 if there is none.
    """
    live = [terms[name] for name in sorted(terms) if terms[name][1] != 0]
    if not live:
        return weight.new_empty((weight.shape[1], 0)), weight.new_empty((0, weight.shape[0]))
    pair = concat(live, dtype=np.float64 if weight.dtype == torch.float64 else None)
    return tuple(
        torch.tensor(factor).to(weight.device, weight.dtype) for factor in (pair.A, pair.B)
    )  # type: ignore[return-value]


def folded(layer: LoRALinear, own: Own | None = None) -> nn.Linear:
    """A plain Linear whose weight is ``W + ΔW``, computed in the layer's dtype."""
    linear = shared_copy(layer, nn.Linear, own)
    del linear.terms, linear.lora_A, linear.lora_B, linear.many
    linear.weight = nn.Parameter(
        added(layer.weight, layer.lora_A, layer.lora_B), requires_grad=False
    )
    return linear


def shared_copy(module: nn.Module, kind: type[M], own: Own | None = None) -> M:
    """A copy of one module with dictionaries of its own over the same storage.

    Parameters are re-wrapped, detached and frozen; submodules are still the original's, for the
    caller to replace. Loading a state dict, which writes in place, first gives the copy storage of
    its own.

    Args:
        module: Any module.
        kind: Class of the copy; what it needs beyond the module's state, the caller sets.
        own: Maps what the module holds to its twin; give one to all copies that belong together.
    """
    result: M = object.__new__(kind)
    _take_over(result, module, own or Own())
    return result


def _take_over(result: nn.Module, module: nn.Module, own: Own) -> None:
    """Fill a new module with twins of all that another one holds; hooks that know their module get
    to know the new one.
    """
    for key, value in module.__dict__.items():
        result.__dict__[key] = own(value)
    hooks: dict[int, Any] = result._load_state_dict_pre_hooks
    for handle, hook in hooks.items():
        if hook.with_module:
            hooks[handle] = type(hook)(hook.hook, result)
    if all(hook.hook is not _unshare for hook in hooks.values()):
        result.register_load_state_dict_pre_hook(_unshare)  # type: ignore[no-untyped-call]


def detached(tensor: Tensor) -> Tensor:
    """A parameter of its own over the same storage that needs no gradient."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def check_linear(module: nn.Module, where: str) -> None:
    """Refuse what does not compute what ``nn.Linear`` does from a weight of its own."""
    plain = isinstance(module, nn.Linear) and type(module).forward in (
        nn.Linear.forward,
        LoRALinear.forward,
    )
    if (
        not plain
        or not {"weight", "bias"} <= module._parameters.keys()
        or "forward" in module.__dict__
    ):
        raise UnsupportedModelError(
            f"module {where!r}",
            "a Linear with nn.Linear's own forward, weight and bias",
            type(module).__name__,
        )


def _pair(term: object, name: str) -> LowRank:
    """The pair of a term, if it is one."""
    if not isinstance(term, tuple) or len(term) != 2 or not isinstance(term[0], LowRank):
        raise ArgumentError(f"term {name!r} of a layer", "a LowRank and its weight", shown(term))
    finite(term[1], f"weight of term {name!r} of a layer", ArgumentError)
    return term[0]


def check_fit(linear: nn.Linear, pair: LowRank, name: str) -> None:
    """Refuse a pair whose shape is not the Linear's."""
    if (pair.in_features, pair.out_features) != (linear.in_features, linear.out_features):
        raise ShapeError(
            f"factors {name!r} of a layer",
            f"in -> out of {linear.in_features} -> {linear.out_features}",
            f"{pair.in_features} -> {pair.out_features}",
        )


def _shallow(value: Any) -> Any:
    kind = type(value)
    if kind in _CONTAINERS:
        return value.copy() if value else kind()
    if isinstance(value, Tensor):
        return detached(value) if isinstance(value, nn.Parameter) else value.detach().clone()
    return copy(value)


def _unshare(module: nn.Module, *_: object) -> None:
    """Give a module tensors of its own, in the same tensor objects: what is tied stays tied."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            tensor.data = tensor.detach().clone()
