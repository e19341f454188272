"""Online adaptation: one bounded step on a small card for each learning event, undone if a guard
set worsens.

Requirements: R17.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lora.card import LoRACard
from lora.errors import ArgumentError, DataError, UnsupportedModelError, shown
from lora.evolution.data import Pairs
from lora.evolution.train import Engine, evaluate
from lora.inference.encoder import InferenceCore
from lora.layer import TrainableLinear
from lora.rewrite import fingerprint, fresh, trainable, trained

ROUGE, ENTROPY_CHANGE = 0.7, -0.1
"""A breakthrough's overlap is above the one, and its change of entropy below the other."""


@dataclass(frozen=True)
class LearningEvent:
    """That a query was answered, and how well.

    Args:
        query, answer: Texts, not empty.
        reward: In [-1, 1]: how much nearer, or with a minus how much farther, the two should be.
        rouge: Overlap of the answer with a reference, in [0, 1].
        entropy_change: Of whatever answered, in nats: negative where it became surer.

    Raises:
        DataError: Naming the field.

    Examples:
        >>> LearningEvent("open a file", "builtins.open", 1.0, rouge=0.8, entropy_change=-0.2).check_breakthrough()
        True
    """

    query: str
    answer: str
    reward: float
    rouge: float = 0.0
    entropy_change: float = 0.0

    def __post_init__(self) -> None:
        for name in ("query", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"learning event: {name}", "text", shown(value))
        for name, least, most in (
            ("reward", -1, 1),
            ("rouge", 0, 1),
            ("entropy_change", -math.inf, math.inf),
        ):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not least <= value <= most
            ):
                raise DataError(
                    f"learning event: {name}", f"a number in [{least}, {most}]", shown(value)
                )

    def check_breakthrough(self) -> bool:
        """Whether the answer was right and gave certainty."""
        return self.rouge > ROUGE and self.entropy_change < ENTROPY_CHANGE


@dataclass(frozen=True)
class Adaptation:
    """Where an online adaptation stands: its card, the steps that it took, and those that it undid
    among them.
    """

    card: LoRACard
    steps: int = 0
    undone: int = 0


class OnlineAdapter:
    """Adapts a small card to learning events.

    Thread safety: one writer. The state is one `Adaptation`, replaced after each event.

    Args:
        engine: An engine over an `InferenceCore`.
        guard: Pairs whose MRR must not fall by more than `tolerance`.
        name, rank, alpha, target_modules, seed: Of the card.
        step_size: Length that a step has in the space of all factors at a reward of 1; none is
            longer.
        tolerance: Of the guard's MRR, below its value before the first event.
        publish: Called with the card after each step that stays, to put it into service.
    """

    def __init__(
        self,
        engine: Engine,
        guard: Pairs,
        *,
        name: str = "online",
        rank: int = 4,
        alpha: float = 8.0,
        target_modules: tuple[str, ...] = ("query", "value"),
        step_size: float = 0.05,
        tolerance: float = 0.01,
        seed: int = 0,
        publish: Callable[[LoRACard], None] | None = None,
    ) -> None:
        if not isinstance(engine.base, InferenceCore):
            raise UnsupportedModelError(
                "OnlineAdapter", "an engine over an InferenceCore", type(engine.base).__name__
            )
        if not (math.isfinite(step_size) and step_size > 0):
            raise ArgumentError("step_size", "a finite number > 0", shown(step_size))
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ArgumentError("tolerance", "a finite number >= 0", shown(tolerance))
        self.core, self.guard, self.step_size, self.publish = engine.base, guard, step_size, publish
        card = fresh(
            self.core, name, rank=rank, alpha=alpha, target_modules=target_modules, seed=seed
        )
        self.state = Adaptation(replace(card, base_fingerprint=fingerprint(self.core, card)))
        self.least_mrr = evaluate(self.core, guard).mrr - tolerance

    def process_learning_event(self, event: LearningEvent) -> Adaptation:
        """Take one step in the direction of the event's reward; opposite rewards move oppositely.

        Returns:
            The new state, also `state`. A step after which the guard set is too bad is counted and
            undone.
        """
        state = self.state
        card, mrr = stepped(self.core, state.card, event, self.step_size, self.guard)
        kept = mrr >= self.least_mrr
        self.state = Adaptation(
            card if kept else state.card, state.steps + 1, state.undone + (not kept)
        )
        if kept and self.publish is not None:
            self.publish(card)
        return self.state


def stepped(
    core: InferenceCore, card: LoRACard, event: LearningEvent, size: float, guard: Pairs
) -> tuple[LoRACard, float]:
    """The card after a step of length ``size · |reward|`` along the gradient of the pair's
    similarity, and the guard's MRR.
    """
    model = trainable(core, card).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, TrainableLinear)]
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    with torch.enable_grad():
        query, answer = model.embed([event.query]), model.embed([event.answer])
        gradients = torch.autograd.grad(
            F.cosine_similarity(query, answer).sum(), factors, allow_unused=True
        )
    length = math.sqrt(
        sum(float((gradient.double() ** 2).sum()) for gradient in gradients if gradient is not None)
    )
    with torch.no_grad():
        for factor, gradient in zip(factors, gradients, strict=True):
            if gradient is not None and length > 0:
                factor.add_(gradient, alpha=event.reward * size / length)
    return trained(model, card), evaluate(model, guard).mrr
