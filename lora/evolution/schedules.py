"""Learning-rate schedules: torch's own, after a linear warm-up that always ends.

Requirements: R17.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from lora.errors import ArgumentError

LAST = 0.01
"""Share of the peak that the exponential schedule comes down to."""

Make: TypeAlias = Callable[[Optimizer, int], LRScheduler]

SCHEDULES: Mapping[str, Make] = MappingProxyType(
    {
        "constant": lambda optimizer, _: ConstantLR(optimizer, factor=1.0),
        "linear": lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.0, total_iters=steps),
        "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps),
        "exponential": lambda optimizer, steps: ExponentialLR(optimizer, gamma=LAST ** (1 / steps)),
        "step": lambda optimizer, steps: StepLR(optimizer, step_size=-(-steps // 3), gamma=0.1),
        "one-cycle": lambda optimizer, steps: OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=steps + 1,
            cycle_momentum=False,
        ),
    }
)
"""What makes a schedule of so many steps, by its name; one-cycle has a warm-up of its own."""


def warmup_steps(share: float, steps: int) -> int:
    """Steps of a warm-up that takes a share of all: at least one less than there are, so that the
    peak is reached.

    >>> warmup_steps(0.1, 50), warmup_steps(0.1, 3), warmup_steps(0.9, 1)
    (5, 0, 0)
    """
    return min(round(share * steps), steps - 1)


def schedule_of(optimizer: Optimizer, kind: str, steps: int, *, warmup: float = 0.0) -> LRScheduler:
    """A schedule over `steps` steps, each group of the optimiser from its own peak.

    Args:
        optimizer: Its groups' learning rates are the peaks.
        kind: One of `SCHEDULES`.
        steps: Of the whole training, the warm-up among them.
        warmup: Share of the steps, in [0, 1), over which the rate rises linearly to its peak.

    Raises:
        ArgumentError: If the kind is not known.
    """
    if kind not in SCHEDULES:
        raise ArgumentError("schedule", f"one of {', '.join(SCHEDULES)}", repr(kind))
    warm = warmup_steps(warmup, steps)
    if not warm or kind == "one-cycle":
        return SCHEDULES[kind](optimizer, steps)
    rising = LinearLR(optimizer, 1 / (warm + 1), 1.0, total_iters=warm)
    return SequentialLR(optimizer, [rising, SCHEDULES[kind](optimizer, steps - warm)], [warm])
