"""Learning-rate schedules: torch's own, after a linear warm-up.

Requirements: R17.
"""

from collections.abc import Callable, Mapping

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

LAST = 0.01
"""Share of the peak at which the exponential schedule ends."""

SCHEDULES: Mapping[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, _: ConstantLR(optimizer, factor=1.0),
    "linear": lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.0, total_iters=steps),
    "cosine": CosineAnnealingLR,
    "exponential": lambda optimizer, steps: ExponentialLR(optimizer, gamma=LAST ** (1 / steps)),
    "step": lambda optimizer, steps: StepLR(optimizer, step_size=-(-steps // 3), gamma=0.1),
    "one-cycle": lambda optimizer, steps: OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=steps + 1,
        cycle_momentum=False,
    ),
}
"""Makes a schedule of so many steps, by name."""


def schedule_of(optimizer: Optimizer, kind: str, steps: int, *, warmup: float = 0.0) -> LRScheduler:
    """Make a schedule that starts from each parameter group's own peak.

    Args:
        optimizer: The learning rates of its groups are the peaks.
        kind: One of `SCHEDULES`; one-cycle has a warm-up of its own.
        steps: Of the whole training, warm-up included.
        warmup: Share of the steps in which the rate rises; it reaches its peak in any case.
    """
    rising = min(round(warmup * steps), steps - 1)
    if not rising or kind == "one-cycle":
        return SCHEDULES[kind](optimizer, steps)
    first = LinearLR(optimizer, 1 / (rising + 1), 1.0, total_iters=rising)
    return SequentialLR(optimizer, [first, SCHEDULES[kind](optimizer, steps - rising)], [rising])
