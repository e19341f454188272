"""What a second task does to a first one on the same card, with elastic weight consolidation and
without.

    OMP_NUM_THREADS=2 python benchmarks/forgetting.py [--quick] [--json FILE]

The first task is docstring sentence → qualified name, of Python's standard library, on MiniLM. The
second one contradicts it: the same sentences ask for the name of the definition that comes next in
the same top-level module. Every figure is the MRR on held-out modules. How strong the consolidation
is, λ, is chosen on the first seed: of `STRENGTHS`, that with the best mean of both tasks on a
validation part of the modules that are trained on.
"""

import statistics
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from pairs import Row, figure_row, run

import lora
from lora.evolution import LoRATrainer, Pairs
from lora.training.data import docstring_pairs
from lora.training.train import Settings, evaluate

STRENGTHS = (0.1, 1.0, 10.0)
SHARE = 0.8


def neighbours(pairs: Pairs) -> Pairs:
    """The same sentences, each with the positive of the next pair of its group; groups of one are
    left out.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in pairs.table.to_pylist():
        groups.setdefault(row["group"], []).append(row)
    rings = ([*rows, rows[0]] for rows in groups.values() if len(rows) > 1)
    return Pairs.of(
        {**row, "positive": after["positive"]} for ring in rings for row, after in pairwise(ring)
    )


def some(pairs: Pairs, count: int, seed: int) -> Pairs:
    """So many of the pairs, in their order."""
    return pairs.take(sorted(np.random.default_rng(seed).permutation(len(pairs))[:count].tolist()))


class Tasks:
    """Both tasks for one seed: to learn, to choose λ on, and to judge on."""

    def __init__(
        self,
        engine: lora.ArrowEngine,
        pairs: Pairs,
        *,
        size: int,
        steps: int,
        judges: int,
        seed: int,
    ) -> None:
        known, held_out = pairs.split(SHARE, seed=seed)
        self.training, validation = known.split(SHARE, seed=seed)
        self.validation, self.held_out = (
            some(validation, judges, seed),
            some(held_out, judges, seed),
        )
        settings = Settings(
            epochs=99, batch_size=size, share=SHARE, validate_every=steps + 1, validation_size=1
        )
        self.core, self.steps = engine.base, steps
        self.trainer = LoRATrainer(engine, seed=seed, settings=settings)
        self.first = self.trainer.train(self.training, name="tasks", max_steps=steps).card
        self.needed = self.trainer.anchor(self.first, self.training, examples=size)

    def second(self, strength: float | None = None) -> lora.LoRACard:
        """The card after the second task too."""
        ewc = None if strength is None else (self.needed, strength)
        data = neighbours(self.training)
        return self.trainer.train(
            data, name="tasks", start=self.first, max_steps=self.steps, ewc=ewc
        ).card

    def scores(self, card: lora.LoRACard | None, judges: Pairs) -> list[float]:
        """The MRR of both tasks."""
        model = self.core if card is None else lora.adapt(self.core, card)
        return [evaluate(model, part).mrr for part in (judges, neighbours(judges))]


def forgetting(quick: bool) -> Iterator[Row]:  # noqa: FBT001 - of `run`
    """MRR of both tasks at each stage, by seed and on average."""
    engine, pairs = lora.ArrowEngine.from_pretrained(None, device="cpu"), docstring_pairs().unique()
    seeds, size, steps, judges = (1, 16, 2, 50) if quick else (3, 32, 30, 300)
    strength: float | None = None
    found: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        tasks = Tasks(engine, pairs, size=size, steps=steps, judges=judges, seed=seed)
        tried = {} if strength else {value: tasks.second(value) for value in STRENGTHS}
        for value, card in tried.items():
            first, second = tasks.scores(card, tasks.validation)
            yield row(f"validation, lambda {value:g}, seed {seed}", first, second)
        strength = strength or max(
            tried, key=lambda value: sum(tasks.scores(tried[value], tasks.validation))
        )
        kept = tried.get(strength) or tasks.second(strength)
        stages = {
            "base": None,
            "first task": tasks.first,
            "then second, naive": tasks.second(),
            "then second, EWC": kept,
        }
        for stage, card in stages.items():
            scores = tasks.scores(card, tasks.held_out)
            found.setdefault(stage, []).append(scores)
            yield row(f"{stage}, seed {seed}", *scores)
    for stage, scores in found.items():
        yield row(
            f"{stage}, mean of {seeds} seeds", *np.mean(scores, axis=0).tolist(), strength=strength
        )
    kept, naive = ([first for first, _ in found[f"then second, {how}"]] for how in ("EWC", "naive"))
    gain = [a - b for a, b in zip(kept, naive, strict=True)]
    yield figure_row(
        "forgetting",
        f"first task, kept by EWC (lambda {strength:g})",
        statistics.mean(gain),
        "MRR",
        above=0.0,
        ids=["R17.7"],
        least=min(gain),
    )


def row(what: str, first: float, second: float, **more: Any) -> Row:
    """Both tasks' figures."""
    return figure_row(
        "forgetting",
        what,
        first,
        f"MRR; second task {second:.3f}",
        ids=["R17.7"],
        first=first,
        second=second,
        **more,
    )


def groups(quick: bool) -> Iterable[Iterable[Row]]:  # noqa: FBT001 - of `run`
    """All rows."""
    yield forgetting(quick)


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0])
