"""The whole story in one function, from a data set to a removed card, with the public API alone.

Requirements: R25.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import lora
from lora.training.data import docstring_pairs
from lora.training.train import LoRATrainer, Settings, evaluate

QUERIES = [
    "Return the absolute path of a file.",
    "Which function parses command line arguments?",
    "Wait until the thread terminates.",
    "How long should pasta boil?",  # the card knows nothing of this: the router should abstain
]


def run(
    out: Path, *, steps: int, console: Console, progress_bar: Callable[[str], Any]
) -> dict[str, Any]:
    """Train, save, map, apply, route to and remove a card; return what was measured.

    Args:
        out: Folder for the files; it is made if it does not exist.
        steps: Training steps, >= 1.
        console, progress_bar: Show the story and how far the training is.
    """
    out.mkdir(parents=True, exist_ok=True)

    console.rule("1  a base model and real data")
    engine = lora.ArrowEngine.from_pretrained()
    waiting = Console(stderr=True).status
    with waiting("reading and measuring"):
        pairs = docstring_pairs()
        known, held_out = pairs.split(0.8, seed=0)
        pairs.save(out / "pairs.arrow")
        base = evaluate(engine, held_out)
    console.print(f"{len(pairs)} docstring sentences, of which {len(held_out)} are held out")

    console.rule("2  train a card")
    base_model = "sentence-transformers/all-MiniLM-L6-v2"
    trainer = LoRATrainer(engine, settings=Settings(epochs=1000), base_model=base_model)
    examples = known.queries[:: max(1, len(known) // 64)]
    description = "Python documentation: what a function or class does"
    metadata = {"description": description, "examples": examples}
    with progress_bar("training") as progress:
        training = trainer.train(
            known, name="python-docs", metadata=metadata, max_steps=steps, progress=progress
        )
    training.plot(out / "history.svg")

    console.rule("3  save it, look at it, map it")
    path = out / "python-docs.lora.arrow"
    digest = lora.save(training.card, path)
    console.print(f"{path}: {lora.inspect(path).num_params:,} parameters, SHA-256")
    console.print(digest)
    card = lora.load(path, verify=digest)

    console.rule("4  apply it")
    before = engine.encode(QUERIES)
    name = engine.load_lora(path)
    with waiting("measuring"):
        tuned = evaluate(engine, held_out)
    console.print(f"MRR {base.mrr:.3f} of the base model, {tuned.mrr:.3f} with the card")

    console.rule("5  route to it, or abstain")
    routes = {query: engine.router.select(query, 1, 0.3) for query in QUERIES}
    for query, best in routes.items():
        choice = f"{best[0].score:.3f}  {best[0].name}" if best else f"{'abstains':18}"
        console.print(f"{choice}  {query}")

    console.rule("6  a batch in which each text has its own adapters")
    choices: list[Any] = [name, {name: 0.5}, {}, name]
    mixed = engine.encode_with_lora(QUERIES, choices).embeddings
    for moved, choice in zip(np.abs(mixed - before).max(1), choices, strict=True):
        console.print(f"moved by {moved:.3f} with {choice}")

    console.rule("7  remove it")
    engine.remove_lora(name)
    restored = np.array_equal(engine.encode(QUERIES), before)
    console.print(f"the base model answers bit for bit as before: {restored}")
    files = sorted(map(str, out.iterdir()))
    console.print(*files, sep="\n")
    return {
        "base": vars(base),
        "card": vars(tuned),
        "digest": digest,
        "mapped_equal": card == training.card,
        "routes": {query: [route.name for route in best] for query, best in routes.items()},
        "restored": restored,
        "files": files,
    }
