"""What cards add to the rows of tensors, in a checkpoint's files and in the experts of a model.

Requirements: R26.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora.card import AdapterSet, LowRank
from lora.errors import UnsupportedModelError
from lora.experts import Place, expert_places, named
from lora.factors import concat
from lora.models.layers import check_sums
from lora.models.twins import Twins
from lora.targets import Injection, Site

_MARK = "lora_folded"
"""Set on a module of experts that `adapt` folded."""


class Update(NamedTuple):
    """What is added to rows of a tensor: rows, from `first`, of the ΔW of one module."""

    start: int
    stop: int
    first: int
    terms: list[tuple[LowRank, float]]
    transposed: bool

    def factors(self, dtype: torch.dtype) -> tuple[int, int, Tensor, Tensor]:
        """Return the rows, and two matrices whose product is added: (rows, r) and (r, columns)."""
        pair = concat(self.terms, dtype=np.float64 if dtype is torch.float64 else None)
        left, right = (pair.A, pair.B) if self.transposed else (pair.B.T, pair.A.T)
        left = left[self.first : self.first + self.stop - self.start]
        return self.start, self.stop, torch.tensor(left).to(dtype), torch.tensor(right).to(dtype)


def updates_of(
    places: Mapping[str, Place], adapters: AdapterSet, injections: Mapping[str, Injection]
) -> dict[str, list[Update]]:
    """Return what is added to each tensor, for the modules that have a place."""
    terms: dict[str, list[tuple[LowRank, float]]] = {}
    for name, (card, weight) in adapters.items():
        for module, key in injections[name].bound.items() if weight else ():
            if module in places:
                terms.setdefault(module, []).append((card.weights[key], weight))
    updates: dict[str, list[Update]] = {}
    for module, pairs in terms.items():
        place, first = places[module], 0
        for tensor, start, stop in place.parts:
            update = Update(start, stop, first, pairs, place.transposed)
            updates.setdefault(tensor, []).append(update)
            first += stop - start
    return updates


def add_products(
    total: Tensor, low: int, products: Iterable[tuple[int, int, Tensor, Tensor]]
) -> None:
    """Add to some rows of a tensor, of which `low` is the first, their part of each product."""
    for start, stop, left, right in products:
        top, bottom = max(low, start), min(low + len(total), stop)
        if top < bottom:
            rows = total[top - low : bottom - low]
            rows.addmm_(left[top - start : bottom - start].to(total), right.to(total))


class FusedExperts:
    """The fused experts of a model: their sites under each name, their places by the first."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.sites: dict[str, Site] = {}
        self.places: dict[str, Place] = {}
        transposed = []
        for name, module in modules:
            for leaf, parameter in module._parameters.items():
                if parameter is not None and not is_lazy(parameter) and parameter.dim() == 3:
                    self.parameters[f"{name}.{leaf}"] = parameter
                    if getattr(module, "is_transposed", False):
                        transposed.append(f"{name}.{leaf}")
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        for name, place, site in expert_places(shapes, transposed):
            self.places[name] = place
            for alias in named(name):
                self.sites[alias] = site

    def check(self, model: nn.Module, name: str) -> None:
        """Refuse an expert that can't be folded."""
        for tensor, _, _ in self.places[name].parts:
            module = model.get_submodule(tensor.rpartition(".")[0])
            parameter = self.parameters[tensor]
            expected, actual = "experts as the base has them", ""
            hint = "adapt the base with all cards at once"
            if getattr(module, _MARK, False):
                actual = "experts that another card is folded into"
            elif type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                actual, hint = f"{type(parameter).__name__} of {parameter.dtype}", "dequantise them"
            elif parameter.is_meta:
                actual, hint = "a meta tensor", "load the model with its weights"
            if actual:
                raise UnsupportedModelError(f"module {name!r}", expected, actual, hint)

    def weight(self, name: str) -> Tensor:
        """Return the weight of an expert, as it is stored."""
        parts = self.places[name].parts
        flat = (self.parameters[part.tensor].detach().flatten(0, 1) for part in parts)
        return torch.cat([rows[p.start : p.stop] for rows, p in zip(flat, parts, strict=True)])

    def nbytes(self, names: Iterable[str]) -> int:
        """Return the bytes of the parameters that are copied where these experts are folded."""
        tensors = {part.tensor for name in names for part in self.places[name].parts}
        return sum(self.parameters[tensor].nbytes for tensor in tensors)


def fold_experts(module: nn.Module, updates: Mapping[str, list[Update]], memo: Twins) -> nn.Module:
    """Return a twin of a module of experts, with what is added to each of its parameters."""
    twin = memo.fill(object.__new__(type(module)), module)
    for leaf, changes in updates.items():
        parameter = module.get_parameter(leaf)
        wide = torch.float64 if parameter.dtype is torch.float64 else torch.float32
        products = [update.factors(wide) for update in changes]
        result, height = parameter.detach().clone(), parameter.shape[1]
        for index, expert in enumerate(result):  # one at a time is in memory twice
            total = expert.to(wide)
            add_products(total, index * height, products)
            expert.copy_(total)
        check_sums(result, lambda: f"{memo.name_of(module)}: {leaf!r}")  # noqa: B023 - called here
        setattr(twin, leaf, nn.Parameter(result, requires_grad=False))
    setattr(twin, _MARK, True)
    return twin
