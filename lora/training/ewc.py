"""Elastic weight consolidation (EWC): learn a second task without moving what the first one needs.

Sources: Kirkpatrick et al. 2017; Schwarz et al. 2018 and Chaudhry et al. 2018 (EWC++).

Requirements: R17.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.checks import finite, share
from lora.errors import ArgumentError, ShapeError, shown

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Anchor:
    """The parameters after a task, and how much the task needs each of them to stay.

    `params` are θ*; `fisher` is the diagonal of the Fisher information there.
    """

    params: Tensors
    fisher: Tensors

    def __post_init__(self) -> None:
        params, fisher = _shapes(self.params), _shapes(self.fisher)
        if params != fisher:
            raise ShapeError("anchor: fisher", f"the parameters' shapes {params}", fisher)
        for name, tensor in self.fisher.items():
            if not (tensor.isfinite() & (tensor >= 0)).all():
                raise ArgumentError(f"anchor: fisher {name!r}", "finite values >= 0", "others")


EWC = tuple[Anchor, float]
"""The anchor of an earlier task, and λ."""


def checked_anchor(ewc: EWC, params: Tensors) -> EWC:
    """Return an anchor of these parameters and λ; refuse others, and a λ < 0."""
    if not isinstance(ewc, tuple) or len(ewc) != 2 or not isinstance(ewc[0], Anchor):
        raise ArgumentError("ewc", "an anchor and λ", shown(ewc))
    strength = finite(ewc[1], "ewc: λ", ArgumentError)
    if strength < 0:
        raise ArgumentError("ewc: λ", "a number >= 0", strength)
    if _shapes(ewc[0].params) != _shapes(params):
        raise ShapeError("ewc: anchor", "the parameters of this training", "others")
    return ewc[0], strength


def penalty(params: Tensors, anchor: Anchor, strength: float) -> Tensor:
    """Return λ/2 Σ F (θ − θ*)², where λ is `strength`.

    Examples:
        >>> anchor = Anchor({"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])})
        >>> float(penalty({"w": torch.tensor([3.0])}, anchor, strength=0.5))
        4.0
    """
    terms = (
        (anchor.fisher[name] * (params[name] - start) ** 2).sum()
        for name, start in anchor.params.items()
    )
    return strength / 2 * sum(terms, torch.tensor(0.0))


def fisher_of(losses: Sequence[Tensor] | Tensor, params: Tensors) -> Tensors:
    """Return the diagonal Fisher information: the mean of squared gradients, example by example.

    The squared gradient of a batch's mean would be smaller by the size of the batch.
    """
    if not len(losses):
        raise ArgumentError("fisher_of: losses", "at least one", "none")
    sums = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    for loss in losses:
        gradients = torch.autograd.grad(
            loss, tuple(params.values()), retain_graph=True, materialize_grads=True
        )
        for name, gradient in zip(params, gradients, strict=True):
            sums[name] += gradient**2
    return {name: total / len(losses) for name, total in sums.items()}


def normalized(fisher: Tensors) -> Tensors:
    """Scale a Fisher information to a mean of 1 over all parameters; all zeros stay zeros."""
    mean = torch.cat([tensor.flatten() for tensor in fisher.values()]).double().mean().item()
    # In float64, because the mean of tiny values may be 0 in float32.
    return {name: (tensor.double() / (mean or 1.0)).to(tensor) for name, tensor in fisher.items()}


def online(old: Anchor, new: Anchor, decay: float = 1.0) -> Anchor:
    """Merge the anchors of all tasks so far into one (EWC++): newest θ, ``decay · F_old + F_new``.

    `decay`, in [0, 1], is the share of the older tasks' information that stays.
    """
    share(decay, "online: decay")
    if _shapes(old.params) != _shapes(new.params):
        raise ArgumentError("online", "anchors of the same parameters", "anchors of others")
    fisher = {name: decay * old.fisher[name] + tensor for name, tensor in new.fisher.items()}
    return Anchor(new.params, fisher)


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
