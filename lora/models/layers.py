"""Linears with low-rank terms, made from plain ones.

A base is never changed: a layer is a twin of it, over the same weight.

Requirements: R2, R3, R5, R7, R8.
"""

import inspect
import math
import warnings
from collections.abc import Iterator
from functools import partial
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
from lora.models.twins import Twins, check_own
from lora.targets import check_shape

Terms = dict[str, tuple[LowRank, float]]
"""Card name -> (pair, weight)."""

WIDE = (torch.float32, torch.float64)
"""Dtypes in which ``W + ΔW`` keeps a small ΔW."""

_PACKAGES = ("lora", "torch", "transformers", "sentence_transformers", "safetensors")


class NeverCalled(nn.Module):
    """A module that a model loads and saves but never calls: adapters have no effect in it."""


class _Adapted(nn.Linear):
    """A twin of a Linear; a state dict leaves factors in buffers out, which it warns of once."""

    def __init__(self, base: nn.Linear, memo: Twins | None = None) -> None:
        check_linear(base, "base")
        memo = memo or Twins(base)
        memo.fill(self, base)
        self.notices = memo.notices

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if any(name.startswith("lora_A") and a.numel() for name, a in self.named_buffers()):
            _warn_of_saving(self.notices)
        super()._save_to_state_dict(*arguments)


class LoRALinear(_Adapted):
    """``base(x) + Σ weight · scaling · (x @ A @ B)`` over any number of named terms, for inference.

    The terms are stacked into two buffers that the state dict leaves out.

    Args:
        base: A Linear with the forward of ``nn.Linear``.
        terms: Name -> (pair, weight).
        memo: Shared by all copies of one model.

    Attributes:
        weight_side_threshold: Inputs with more elements use ``W + ΔW``, formed for that call.

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
    terms: Terms

    def __init__(
        self, base: nn.Linear, terms: Terms | None = None, memo: Twins | None = None
    ) -> None:
        super().__init__(base, memo)
        self._set(terms or {})

    def load_weights(self, pair: LowRank, *, name: str = "default", weight: float = 1.0) -> None:
        """Set the term called `name`, in place of an earlier one of that name."""
        self._set({**self.terms, name: (pair, weight)})

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if x.numel() > self.weight_side_threshold and self.weight.dtype in WIDE:
            # Autocast would round W + ΔW, and training would form it again in the backward pass.
            autocast = torch.is_autocast_enabled(x.device.type)
            if torch.is_inference_mode_enabled() and not autocast:
                weight = torch.addmm(self.weight, self.lora_B.T, self.lora_A.T)
                return F.linear(x, weight, self.bias)
        out = F.linear(x, self.weight, self.bias)
        return add_low_rank(out, x, self.lora_A, self.lora_B) if self.lora_A.numel() else out

    def _set(self, terms: Terms) -> None:
        for name, term in terms.items():
            if not isinstance(term, tuple) or len(term) != 2 or not isinstance(term[0], LowRank):
                where = f"term {name!r} of a layer"
                raise ArgumentError(where, "a LowRank and its weight", shown(term))
            finite(term[1], f"weight of term {name!r} of a layer", ArgumentError)
            check_shape(self, term[0], f"factors {name!r} of a layer")
        a, b = stacked(terms, self.weight)
        self.terms = dict(sorted(terms.items()))
        # Measured: forming W + ΔW is cheaper once x and y have about twice as many elements as W.
        rows, columns = self.weight.shape
        threshold = 2 * rows * columns**2 / (rows + columns)
        self.weight_side_threshold = threshold if a.numel() else math.inf
        self.register_buffer("lora_A", a, persistent=False)
        self.register_buffer("lora_B", b, persistent=False)


class TrainableLinear(_Adapted):
    """A Linear with one pair of trainable float32 factors; gradients reach only these.

    The factors are cast to the input's dtype, so that a narrow base and autocast both work.
    `dropout` is the probability of zeroing an input of the low-rank path in training mode.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, base: nn.Linear, pair: LowRank, *, dropout: float = 0.0, memo: Twins | None = None
    ) -> None:
        super().__init__(base, memo)
        check_shape(base, pair, "factors of a layer")
        self.scaling = 1.0 if pair.scaling is None else pair.scaling
        self.dropout = share(dropout, "dropout", "[0, 1)")
        for name, factor in (("lora_A", pair.A), ("lora_B", pair.B)):
            values = torch.tensor(factor.astype(np.float32), device=self.weight.device)
            setattr(self, name, nn.Parameter(values))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = F.linear(x, self.weight, self.bias)
        dropped = F.dropout(x, self.dropout, training=self.training)
        return out + (dropped @ self.lora_A.to(x.dtype) @ self.lora_B.to(x.dtype)) * self.scaling

    def learned(self) -> LowRank:
        """Return a copy of the factors as they are now."""
        a, b = (factor.detach().cpu().numpy().copy() for factor in (self.lora_A, self.lora_B))
        return LowRank(a, b, self.scaling)


def add_low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``out + x @ A @ B``, by one addmm; in inference mode it may overwrite `out`.

    Shapes: `out` ``(..., out)``, `x` ``(..., in)``, `a` ``(in, r)``, `b` ``(r, out)``.
    """
    inner, flat = x.reshape(-1, x.shape[-1]) @ a, out.reshape(-1, out.shape[-1])
    if torch.is_inference_mode_enabled():
        # Autocast does not convert the arguments of an operation in place.
        return flat.addmm_(inner, b.to(inner.dtype)).reshape(out.shape)
    return torch.addmm(flat, inner, b).reshape(out.shape)


def stacked(terms: Terms, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[A₁ … Aₙ]`` (in, R) and ``[w₁s₁B₁; …; wₙsₙBₙ]`` (R, out), sorted by name.

    They have the weight's dtype and device. Terms of weight 0 are left out.
    """
    live = [terms[name] for name in sorted(terms) if terms[name][1] != 0]
    if not live:
        return weight.new_empty((weight.shape[1], 0)), weight.new_empty((0, weight.shape[0]))
    pair = concat(live, dtype=np.float64 if weight.dtype == torch.float64 else None)
    return torch.tensor(pair.A).to(weight), torch.tensor(pair.B).to(weight)


def folded(
    linear: nn.Linear, terms: Terms, *, narrow: bool = False, memo: Twins | None = None
) -> nn.Linear:
    """Return a plain Linear of ``W + ΔW``.

    A dtype narrower than float32 gives a `LoRALinear`, since rounding could lose ΔW. With `narrow`
    the sum is formed in float32 and rounded once.
    """
    weight = linear.weight
    if weight.dtype not in WIDE:
        if not narrow:
            return LoRALinear(linear, terms, memo)
        weight = weight.float()
    result = (memo or Twins(linear)).fill(object.__new__(nn.Linear), linear)
    if isinstance(linear, LoRALinear):
        del result.terms, result.weight_side_threshold, result.lora_A, result.lora_B, result.notices
    a, b = stacked(terms, weight)
    total = torch.addmm(weight, b.T, a.T).to(linear.weight.dtype)
    result.weight = nn.Parameter(total, requires_grad=False)
    return result


def _warn_of_saving(notices: set[str]) -> None:
    """Warn, once a model, that a state dict which the user asked for lacks the adapters."""
    if "saving" not in notices and _is_asked_by_user():
        notices.add("saving")
        warn_unbound(
            "a state dict or a saved model holds the base alone, without its adapters: "
            "save lora.fold(model), or the cards by lora.save"
        )


def _is_asked_by_user() -> bool:
    """Tell whether a state dict is asked for by the user, or by a function that saves for them.

    What torch, accelerate, a trainer and this package do with one is their own affair.
    """
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
    """Refuse a module that does not compute what ``nn.Linear`` does from a weight of its own."""
    where = f"module {where!r}"
    if isinstance(module, nn.Module):
        check_own(module, partial(UnsupportedModelError, where))
    kind: Any = type(module)
    is_plain = isinstance(module, nn.Linear) and "bias" in module._parameters
    if is_plain and kind.forward in (nn.Linear.forward, LoRALinear.forward):
        kind = type(module._parameters.get("weight"))
    if kind is not nn.Parameter:
        expected = "a Linear with nn.Linear's own forward, weight and bias"
        actual = f"{kind.__module__}.{kind.__qualname__}"
        hint = "adapt and fold the model first, then quantise or wrap its layers"
        raise UnsupportedModelError(where, expected, actual, hint)


Uncalled = NeverCalled  # its earlier name
