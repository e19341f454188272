"""Online adaptation: one bounded step on a small card for each learning event.

Requirements: R17.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lora.card import LoRACard
from lora.checks import positive, share
from lora.errors import ArgumentError, DataError, shown
from lora.models.adapt import trainable, trained_card
from lora.models.any_encoder import embed
from lora.training.data import AnyPairs, Pairs, is_text
from lora.training.train import LoRATrainer, evaluate


@dataclass(frozen=True)
class LearningEvent:
    """A query that was answered, and how good the answer was.

    Args:
        reward: In [-1, 1]; above 0 brings the two nearer together, below 0 moves them apart.
        rouge: Overlap of the answer with a reference, in [0, 1].
        entropy_change: Of the model that answered, in nats.

    Examples:
        >>> LearningEvent("quit", "sys.exit", 1.0, 0.8, -0.2).check_breakthrough()
        True
    """

    query: str
    answer: str
    reward: float
    rouge: float = 0.0
    entropy_change: float = 0.0

    def __post_init__(self) -> None:
        for name in ("query", "answer"):
            text = getattr(self, name)
            if not is_text(text):
                raise DataError(f"learning event: {name}", "text that is not empty", shown(text))
        ranges = {"reward": (-1, 1), "rouge": (0, 1), "entropy_change": (-math.inf, math.inf)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                where, expected = f"learning event: {name}", f"a number in [{low}, {high}]"
                raise DataError(where, expected, shown(value))

    def check_breakthrough(self) -> bool:
        """Tell whether the answer was right and made the model clearly more certain."""
        return self.rouge > 0.7 and self.entropy_change < -0.1


@dataclass(frozen=True)
class Adaptation:
    """State of an online adaptation: its card, the steps taken, those of them undone."""

    card: LoRACard
    steps: int = 0
    undone: int = 0


class OnlineAdapter:
    """Adapts a small card to learning events.

    Thread safety: one writer. The state is one `Adaptation`, replaced after each event.

    Args:
        engine, rank, alpha, target_modules, seed: As for `LoRATrainer`.
        guard: Pairs on which the MRR may be at most `tolerance` below the base model's.
        name: Card name.
        step_size: Length of a step at a reward of 1 or -1, in the space of all factors.

    Raises:
        DataError: There is no guard pair.

    Examples:
        >>> from lora import ArrowEngine
        >>> guard = [("open a file", "builtins.open"), ("quit", "sys.exit")]
        >>> online = OnlineAdapter(ArrowEngine.from_pretrained(None), guard)
        >>> online.process_learning_event(LearningEvent("leave", "sys.exit", 1.0)).steps
        1
    """

    def __init__(
        self,
        engine: Any,
        guard: AnyPairs,
        *,
        name: str = "online",
        rank: int = 4,
        alpha: float = 8.0,
        target_modules: tuple[str, ...] | None = None,
        step_size: float = 0.05,
        tolerance: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.step_size = positive(step_size, "step_size")
        self.guard = Pairs.of(guard)
        trainer = LoRATrainer(
            engine, rank=rank, alpha=alpha, target_modules=target_modules, seed=seed
        )
        self.core, self.state = trainer.core, Adaptation(replace(trainer.initial, name=name))
        self.least_mrr = evaluate(self.core, self.guard).mrr - share(tolerance, "tolerance")

    def process_learning_event(self, event: LearningEvent) -> Adaptation:
        """Take one step in the direction of the event's reward, and return the new state.

        It follows the gradient of the similarity of query and answer. A step after which the
        guard's MRR is too low is undone and counted.
        """
        if not isinstance(event, LearningEvent):
            raise ArgumentError("event", "a LearningEvent", shown(event))
        state = replace(self.state, steps=self.state.steps + 1)
        model = trainable(self.core, state.card).eval()
        factors = [factor for factor in model.parameters() if factor.requires_grad]
        with torch.enable_grad():
            query, answer = embed(model, [event.query]), embed(model, [event.answer])
            similarity = F.cosine_similarity(query, answer)
            gradients = torch.autograd.grad(similarity, factors, materialize_grads=True)
        length = math.hypot(*(gradient.double().norm().item() for gradient in gradients))
        with torch.no_grad():
            for factor, gradient in zip(factors, gradients, strict=True):
                factor.add_(gradient, alpha=event.reward * self.step_size / (length or 1.0))
        if evaluate(model, self.guard).mrr < self.least_mrr:
            self.state = replace(state, undone=state.undone + 1)
        else:
            self.state = replace(state, card=trained_card(model, state.card))
        return self.state
