"""Elastic weight consolidation: learn a second task without moving what the first one needs.

Sources: Kirkpatrick et al. 2017 (the penalty); Schwarz et al. 2018 and Chaudhry et al. 2018 (the
online Fisher, EWC++).

Requirements: R17.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lora.errors import ArgumentError, ShapeError

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Anchor:
    """Where the parameters were after a task, and how much it needs each to stay.

    Args:
        params: θ*, by name.
        fisher: The diagonal of the Fisher information there, >= 0, by the same names and shapes.
    """

    params: Tensors
    fisher: Tensors

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.params.items()}
        found = {name: tuple(tensor.shape) for name, tensor in self.fisher.items()}
        if shapes != found:
            raise ShapeError("anchor: fisher", f"the parameters' {shapes}", found)
        for name, tensor in self.fisher.items():
            if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
                raise ArgumentError(f"anchor: fisher {name!r}", "finite values >= 0", "others")


def penalty(params: Tensors, anchor: Anchor, strength: float) -> Tensor:
    """λ/2 Σ F (θ − θ*)².

    Examples:
        >>> anchor = Anchor({"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])})
        >>> float(penalty({"w": torch.tensor([3.0])}, anchor, strength=0.5))
        4.0
    """
    terms = [
        (anchor.fisher[name] * (params[name] - theta) ** 2).sum()
        for name, theta in anchor.params.items()
    ]
    return strength / 2 * torch.stack(terms).sum()


def fisher_of(losses: Iterable[Tensor], params: Tensors) -> Tensors:
    """The diagonal Fisher information, from the gradients of one example's negative log-likelihood
    at a time.

    Squaring the gradient of a batch's mean instead would shrink it by the batch's size.

    Args:
        losses: A scalar for each example, all of graphs over `params`.
        params: By name; one that no loss depends on has 0.

    Returns:
        The mean of the squared gradients.
    """
    sums, count = {name: torch.zeros_like(tensor) for name, tensor in params.items()}, 0
    for loss in losses:
        gradients = torch.autograd.grad(
            loss, list(params.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(params, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.detach() ** 2
        count += 1
    if not count:
        raise ArgumentError("fisher_of: losses", "at least one", "none")
    return MappingProxyType({name: total / count for name, total in sums.items()})


def normalized(fisher: Tensors) -> Tensors:
    """A Fisher information with a mean of 1 over all parameters, so that one λ suits any task; all
    zeros stay zeros.
    """
    count = sum(tensor.numel() for tensor in fisher.values())
    mean = float(sum(float(tensor.double().sum()) for tensor in fisher.values())) / max(count, 1)
    return MappingProxyType(
        {name: tensor / mean if mean else tensor for name, tensor in fisher.items()}
    )


def online(old: Anchor, new: Anchor, decay: float = 1.0) -> Anchor:
    """EWC++: one anchor for all tasks so far, at the newest parameters, with ``decay · F_old +
    F_new``.

    Args:
        decay: In [0, 1]: how much of the older tasks' information stays.
    """
    if not 0 <= decay <= 1:
        raise ArgumentError("online: decay", "a number in [0, 1]", decay)
    if old.params.keys() != new.params.keys():
        raise ArgumentError("online", "anchors of the same parameters", "others")
    return Anchor(
        new.params, {name: decay * old.fisher[name] + fisher for name, fisher in new.fisher.items()}
    )
