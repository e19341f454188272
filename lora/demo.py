"""The whole story in one function, from a data set to a removed card: everything in it is the
public API.

Requirements: R25.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import lora
from lora.evolution.data import docstring_pairs
from lora.evolution.train import LoRATrainer, Retrieval, Settings, evaluate

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

QUERIES = (
    "Return the absolute path of a file.",
    "Which function parses command line arguments?",
    "Wait until the thread terminates.",
    "How long should pasta boil?",  # nothing that the card knows: the router should abstain
)

Bar = Callable[[str], AbstractContextManager[Callable[[int, int, float], None]]]


def run(out: Path, *, steps: int, console: Console, progress_bar: Bar) -> dict[str, Any]:
    """Train, save, map, route, apply and remove a card; returns what was measured.

    Args:
        out: Folder for the files it leaves; made if it is not there.
        steps: Training steps, >= 1.
        console, progress_bar: Where to tell the story.
    """
    out.mkdir(parents=True, exist_ok=True)

    console.rule("1  a base model and real data")
    engine = lora.ArrowEngine.from_pretrained()
    pairs = docstring_pairs()
    known, held_out = pairs.split(0.8, seed=0)
    pairs.save(out / "pairs.arrow")
    console.print(
        f"{len(pairs)} docstring sentences of the standard library, each with the name that it documents;"
    )
    console.print(
        f"{len(held_out)} of them, in {held_out.statistics()['groups']} modules, are held out."
    )
    base = evaluate(engine, held_out)
    console.print(_figures("base model on the held-out modules", base))

    console.rule("2  train a card")
    trainer = LoRATrainer(
        engine, rank=8, alpha=16.0, settings=Settings(epochs=1000), base_model=BASE_MODEL
    )
    examples = known.take(list(range(0, len(known), max(1, len(known) // 64)))).queries
    metadata = {
        "description": "Python documentation: what a function or class does",
        "examples": examples,
    }
    with progress_bar("training") as progress:
        training = trainer.train(
            known, name="python-docs", metadata=metadata, max_steps=steps, progress=progress
        )
    training.plot(out / "history.svg")

    console.rule("3  save it, look at it, map it")
    path = out / "python-docs.lora.arrow"
    digest = lora.save(training.card, path)
    header = lora.inspect(path)
    console.print(
        f"{path}: {path.stat().st_size} bytes, {len(header.modules)} modules, {header.num_params} parameters"
    )
    console.print(f"SHA-256 {digest}")
    card = lora.load(path, verify=digest)
    same = card == training.card

    console.rule("4  apply it")
    before = engine.encode(QUERIES)
    name = engine.load_lora(path)
    tuned = evaluate(engine, held_out)
    console.print(_figures("with the card", tuned))

    console.rule("5  route to it, or abstain")
    engine.threshold = 0.3
    routes = {query: engine.router.select(query, 1, engine.threshold) for query in QUERIES}
    for query, found in routes.items():
        console.print(
            f"{query:50} {f'{found[0].name} ({found[0].score:.3f})' if found else 'abstains'}"
        )

    console.rule("6  a batch in which each text has its own adapters")
    choices: list[Any] = [name, {name: 0.5}, {}, name]
    mixed = engine.encode_with_lora(list(QUERIES), choices)
    for query, choice, row, plain in zip(QUERIES, choices, mixed.embeddings, before, strict=True):
        console.print(f"{query:50} {choice!s:25} moved by {np.abs(row - plain).max():.4f}")

    console.rule("7  remove it")
    engine.remove_lora(name)
    restored = np.array_equal(engine.encode(QUERIES), before)
    console.print(f"the base model answers bit for bit as before: {restored}")

    console.print(_summary(base, tuned))
    files = sorted(str(file) for file in out.iterdir())
    console.print("files:", *files)
    return {
        "base": vars(base),
        "card": vars(tuned),
        "digest": digest,
        "mapped_equal": same,
        "routes": {query: [found.name for found in chosen] for query, chosen in routes.items()},
        "restored": restored,
        "files": files,
    }


def _figures(title: str, found: Retrieval) -> str:
    return f"{title}: recall@1 {found.recall_at_1:.3f}, recall@10 {found.recall_at_10:.3f}, MRR {found.mrr:.3f}"


def _summary(base: Retrieval, tuned: Retrieval) -> Table:
    table = Table("held-out modules", "base", "with the card", "gain")
    for label, field in (
        ("recall@1", "recall_at_1"),
        ("recall@10", "recall_at_10"),
        ("MRR", "mrr"),
    ):
        old, new = getattr(base, field), getattr(tuned, field)
        table.add_row(label, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
    return table
