"""Trains a card on one part of some material and examines it on another, against all alternatives.

Alternatives are the base model, every live skill, and placebos: cards that were trained as long on
pairs of the same form from the standard library, and a short one, which is often the strongest.
They answer in the new card's place, where the router would choose it; the base model answers where
it abstains.

Requirements: R18.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

import lora
from lora.card import Array, LoRACard
from lora.checks import integer, is_semantic_version, risen_version, share
from lora.errors import ArgumentError, BaseModelError, DataError, ShapeError, TargetError
from lora.evolution.acceptance import (
    FEWEST,
    MAX_FALL,
    MAX_TAKEN,
    MOST,
    Guard,
    Verdict,
    change,
    judge,
)
from lora.evolution.documents import Source, medoids, standard_library
from lora.evolution.novelty import novelty
from lora.evolution.teacher import Distilled
from lora.federation.cache import default_cache
from lora.federation.catalog import Catalog, card_files, scan
from lora.federation.follow import by_name, newest
from lora.files import SUFFIX, PathLike, as_path, load, os_errors, save
from lora.models.adapt import adapt
from lora.router import LoRARouter
from lora.routing import Index
from lora.training.data import Pairs
from lora.training.train import LoRATrainer, Progress, Settings, ranks

SHARE = 0.4
"""Share of the pairs that is held out, where that is no more than an exam needs."""

FEWEST_GROUPS = 5
"""Held-out groups of an exam: the bounds over fewer are not those of 95 %."""

MANY_GROUPS = 32
"""Held-out groups from which on more do not make the bounds much narrower."""

LARGE = 32
"""Pairs of a group from which on it would sway an exam: it is held out if others do not suffice."""

EXAMPLES = 256
"""Sentences of its documents that a learned card is routed by."""

SAMPLE = FEWEST
"""Held-out pairs that are kept beside a skill, to hold later learning to it."""

SHORT = 15
"""Steps at most of the placebo that only learned to ask for names (benchmarks/exam_table.py)."""

LEARNING = Settings(share=0.9, validation_size=64)
"""How cards and placebos are trained."""


class Engine(Protocol):
    """What an exam needs of an engine."""

    base: Any  # an encoder that can be trained
    base_model: str | None


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a learned skill has to satisfy, and how it is trained.

    Args:
        max_taken: Share of another live skill's sample that it may take over.
        documents_only: It may go live though it was not shown on real questions.
        share_exam: Its sample travels in the card.
        share_questions: Logged questions may be among its examples.
        weight: What the card's change of the model is multiplied by, and that of placebos.
        placebos: Folder of placebos; the user's cache by default.
    """

    steps: int = 40
    rank: int = 8
    alpha: float = 16.0
    seed: int = 0
    max_taken: float = MAX_TAKEN
    documents_only: bool = False
    share_exam: bool = False
    share_questions: bool = False
    weight: float = 1.0
    placebos: PathLike | None = None

    def __post_init__(self) -> None:
        integer(self.steps, "steps", 1)
        integer(self.seed, "seed", 0)
        share(self.max_taken, "max_taken", "[0, 1]")
        share(self.weight, "weight", "(0, 1]")

    def trainer(self, engine: Engine) -> LoRATrainer:
        """Return what trains the card, and its placebos alike."""
        settings = replace(LEARNING, epochs=self.steps)
        return LoRATrainer(
            engine,
            rank=self.rank,
            alpha=self.alpha,
            seed=self.seed,
            settings=settings,
            base_model=engine.base_model,
        )


@dataclass(frozen=True)
class Live:
    """The skills that are live in a folder, with the samples of their exams."""

    cards: Mapping[str, LoRACard] = field(default_factory=dict)
    samples: Mapping[str, Pairs] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: PathLike) -> Self:
        """Read a folder of cards: of each name the highest version. No folder has none."""
        root = as_path(folder)
        catalog = scan(card_files(root) if root.is_dir() else (), Catalog())
        for (path, *_), served in catalog.files.items():
            if served is None:
                load(path)  # says why it can't be served
        live = {name: load(newest(cards).path) for name, cards in by_name(catalog).items()}
        paths = {name: sample_path(root, name) for name in live}
        samples = {name: Pairs.load(path) for name, path in paths.items() if path.is_file()}
        for name, sample in samples.items():
            if not len(sample):
                raise DataError(str(paths[name]), "pairs", "none", "restore or remove the file")
        return cls(live, samples)

    def replaced(self, card: LoRACard, sample: Pairs | None = None) -> "Live":
        """Return the skills with this card in place of one of its name, and with its sample."""
        samples = {**self.samples, card.name: sample} if sample else self.samples
        return Live({**self.cards, card.name: card}, samples)

    def next_version(self, name: str) -> str:
        """Return the version after the live one of this name."""
        return risen_version(None, version(self.cards[name]) if name in self.cards else "")


@dataclass(frozen=True, eq=False)
class Lesson:
    """What came of learning a skill.

    Args:
        card: The card; None if none was trained.
        verdict: What the exam found.
        reason: Why the card may not go live; "" if it may.
        figures: JSON values, which the card's provenance holds.
        sample: Held-out pairs from documents, to hold later versions to.
    """

    name: str
    card: LoRACard | None
    verdict: Verdict
    reason: str
    figures: Mapping[str, Any]
    sample: Pairs

    @property
    def live(self) -> bool:
        """Whether the card may go live."""
        return not self.reason


class Base:
    """A base model that embeds each text, adapts each card and ranks each pairs once."""

    def __init__(self, model: Any) -> None:
        self.model, self._rows = model, dict[str, Array]()
        # By identity; what it belongs to is kept with it.
        self._adapted: dict[int, tuple[LoRACard, Any]] = {}
        self._ranks: dict[tuple[int, int], tuple[Any, Pairs, Array]] = {}

    def encode(self, texts: Sequence[str]) -> Array:
        """Return the embeddings of texts, shape ``(n, d)``."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        self._rows.update(zip(new, self.model.encode(new) if new else (), strict=True))
        return np.array([self._rows[text] for text in texts])

    def adapted(self, card: LoRACard) -> Any:
        """Return the model with a card."""
        if id(card) not in self._adapted:
            self._adapted[id(card)] = card, adapt(self.model, card)
        return self._adapted[id(card)][1]

    def ranks(self, card: LoRACard | None, pairs: Pairs) -> Array:
        """Return the reciprocal ranks of the pairs with a card, or without any."""
        key = id(card), id(pairs)
        if key not in self._ranks:
            model = self if card is None else self.adapted(card)
            self._ranks[key] = card, pairs, ranks(model, pairs)
        return self._ranks[key][2]


class Service:
    """Cards over a base model as they are served: who answers a query, with what rank."""

    def __init__(self, base: Base, cards: Mapping[str, LoRACard]) -> None:
        self.base, self.cards, self.left_out = base, dict[str, LoRACard](), dict[str, str]()
        self.router = LoRARouter(base.encode)
        for card in cards.values():
            try:
                self.add(card)
            except (BaseModelError, TargetError, ShapeError, ArgumentError) as error:
                self.left_out[card.name] = str(error)

    def add(self, card: LoRACard) -> None:
        """Serve a card as well."""
        self.base.adapted(card)
        self.router.register_card(card)
        self.cards[card.name] = card

    def answering(self, queries: Sequence[str]) -> list[str]:
        """Return the card that answers each query; "" for the base model."""
        decisions = self.router.decide_many(queries)
        return [each.best.name if each and each.kind == "routes" else "" for each in decisions]

    def ranks(self, pairs: Pairs) -> tuple[list[str], Array]:
        """Return who answers each query, and its reciprocal rank then."""
        names = self.answering(pairs.queries)
        ranked = {name: self.base.ranks(self.cards.get(name), pairs) for name in set(names)}
        return names, np.array([ranked[name][row] for row, name in enumerate(names)])


def examined(
    service: Service, name: str, placebos: Mapping[str, LoRACard], held_out: Pairs, seed: int = 0
) -> tuple[Verdict, float]:
    """Examine a card that is served against the base model, the other cards, and placebos.

    Args:
        placebos: By name, such as the form of the pairs that they were trained on.

    Returns:
        What was found, and the share of the queries that the card answers.
    """
    alternatives = {f"placebo {form}": card for form, card in placebos.items()}
    for key in service.cards.keys() - {name}:
        alternatives[f"skill {key}"] = service.cards[key]
    plain, own = (service.base.ranks(card, held_out) for card in (None, service.cards[name]))
    answers_it = np.array(service.answering(held_out.queries)) == name
    served = np.where(answers_it, own, plain)
    files = held_out.table["group"].to_pylist()
    changes = {"base": change(plain, served, files, seed=seed)}
    for key, card in sorted(alternatives.items()):
        other = np.where(answers_it, service.base.ranks(card, held_out), plain)
        changes[key] = change(other, served, files, seed=seed)
    return judge(changes), float(answers_it.mean())


def guards(base: Base, card: LoRACard, live: Live) -> dict[str, Guard]:
    """Return what a card does to the sample of each live skill, in place of one of its name."""
    base.adapted(card)  # a card for another base is refused, not left out
    before, after = Service(base, live.cards), Service(base, live.replaced(card).cards)
    result = {}
    for name, sample in sorted(live.samples.items()):
        (_, old), (answering, new) = before.ranks(sample), after.ranks(sample)
        taken = 0.0 if name == card.name else float(np.mean([n == card.name for n in answering]))
        result[name] = Guard(float(old.mean()), float(new.mean()), taken, len(sample))
    return result


def refusal(changes: Mapping[str, Guard], max_taken: float = MAX_TAKEN) -> str:
    """Say which live skill a card harms, and how; "" if it harms none."""
    reasons = (guard.refusal(name, max_taken) for name, guard in changes.items())
    return next(filter(None, reasons), "")


def divided(pairs: Pairs, seed: int, sample: Pairs | None = None) -> tuple[Pairs, Pairs]:
    """Return pairs to train on and pairs to examine on, with no group and no text in common.

    Whether a file is held out depends on its name and the seed, and less on the other files.

    Args:
        sample: Pairs that an earlier version was held to: they are not trained on either.
    """
    sizes = Counter(pairs.table["group"].to_pylist())
    digests = {name: hashlib.sha256(f"{seed} {name}".encode()).digest() for name in sizes}
    order = sorted(sizes, key=lambda name: (sizes[name] >= LARGE, digests[name]))
    groups: list[str] = []
    count, wanted = 0, min(MOST, SHARE * len(pairs))
    for group in order:
        is_needed = count < wanted or len(groups) < FEWEST_GROUPS
        limit = (1.5 if is_needed else 1) * SHARE * len(pairs)
        if (is_needed or len(groups) < MANY_GROUPS) and count + sizes[group] <= limit:
            groups.append(group)
            count += sizes[group]
    is_held_out = pc.is_in(pairs.table["group"], pa.array(groups, pa.string()))
    held_out = Pairs(pairs.table.filter(is_held_out)).unique().sample(MOST, seed)
    return without(Pairs(pairs.table.filter(pc.invert(is_held_out))), held_out, sample), held_out


def without(pairs: Pairs, *judged: Pairs | None) -> Pairs:
    """Leave out the pairs that have a text in common with others, but for case and punctuation."""
    texts = {t for part in judged if part is not None for t in (*part.queries, *part.positives)}
    judged_words = set(map(_words, texts))
    rows = enumerate(zip(pairs.queries, pairs.positives, strict=True))
    return pairs.take(
        [row for row, both in rows if judged_words.isdisjoint(map(_words, both))]
    ).unique()


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def placebo(engine: Engine, form: str, terms: Terms, progress: Progress | None = None) -> LoRACard:
    """Return a card that was trained on the standard library, from the folder of placebos."""
    folder = default_cache() / "placebos" if terms.placebos is None else as_path(terms.placebos)
    trainer = replace(terms, seed=0).trainer(engine)
    identity = [trainer.initial.base_fingerprint, form, terms.steps, terms.rank, terms.alpha]
    key = hashlib.sha256(json.dumps([*identity, str(LEARNING)]).encode()).hexdigest()[:16]
    path = folder / f"{form}-{key}{SUFFIX}"
    if path.is_file():
        return load(path)
    card = trainer.train(
        standard_library(form), name=f"placebo-{form}", max_steps=terms.steps, progress=progress
    ).card
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    save(card, path)
    return card


def weighted(card: LoRACard, weight: float) -> LoRACard:
    """Return a card whose change of the model is a multiple of this one's."""
    factors = {
        key: replace(pair, scaling=weight * pair.scaling)  # type: ignore[operator] # of a card's
        for key, pair in card.weights.items()
    }
    return replace(card, weights=factors)


def sample_path(folder: Path, name: str) -> Path:
    """Return the file of a skill's sample in a folder of cards. It is not served."""
    return folder / f"{name}.exam.jsonl"


def learn(
    engine: Engine,
    name: str,
    source: Source,
    *,
    live: Live = Live(),
    answers: Pairs | None = None,
    taught: Distilled | None = None,
    questions: Sequence[Mapping[str, Any]] = (),
    terms: Terms = Terms(),
    about: str = "",
    progress: Progress | None = None,
) -> Lesson:
    """Train a card on some material and examine it.

    Args:
        answers: Questions that users asked, with answers: one half is trained on, the other may
            veto.
        taught: A teacher's pairs, which are only trained on.
        questions: Routing checks: ``query``, and the ``skill`` that it is for, or None.
        about: What the description begins with.
    """
    base, none = Base(engine.base), Pairs.of([])
    answers, taught = answers or none, taught or Distilled(none)
    if source.private and not terms.share_questions:
        expected = "`share_questions=True`: a card is routed to by questions, its examples"
        raise ArgumentError("a log", expected, "False")
    # A question counts once, with its last answer.
    answers = answers.take(sorted({text: row for row, text in enumerate(answers.queries)}.values()))
    learned, asked = answers, none
    if _groups(answers) > 1:
        learned, asked = answers.split(0.5, seed=terms.seed)
    held_to = live.samples.get(name)
    training, held_out = divided(source.pairs, terms.seed, held_to)
    everything = without(training.add(learned).add(taught.pairs), held_out, asked, held_to)
    figures: dict[str, Any] = {
        "seed": terms.seed,
        "steps": terms.steps,
        "weight": terms.weight,
        "pairs": {
            "documents": len(source.pairs),
            "answers": len(answers),
            "taught": len(taught.pairs),
            "training": len(everything),
            "held_out": len(held_out),
        },
        "files": {"training": _groups(training), "held_out": _groups(held_out)},
        "dropped": dict(taught.dropped),
        "failures": list(taught.failures),
        "sha256": {"training": digest(everything), "held_out": digest(held_out)},
        "versions": {"lora": lora.__version__, "torch": torch.__version__},
    }
    sample = none if source.private else held_out.sample(SAMPLE, terms.seed)
    if len(held_out) < FEWEST or _groups(held_out) < FEWEST_GROUPS or not len(training):
        needed = (
            f"at least {FEWEST} pairs of {FEWEST_GROUPS} files that are not trained on,"
            " and others to train on"
        )
        counts = f"{len(held_out)} of {_groups(held_out)} and {len(training)}"
        reason = f"can't tell: it takes {needed}; there are {counts}"
        return Lesson(name, None, Verdict("can't tell", {}), reason, figures, sample)
    trainer = terms.trainer(engine)
    trained = trainer.train(everything, name=name, max_steps=terms.steps, progress=progress).card
    examples = training.sample(EXAMPLES, terms.seed)
    described = description(base, examples, about) | {"version": live.next_version(name)}
    if terms.share_questions and len(learned):
        described["examples"] += learned.queries
        described["example_groups"] += [f"question {row}" for row in range(len(learned))]
    card = replace(weighted(trained, terms.weight), metadata=described)
    service = Service(base, {key: each for key, each in live.cards.items() if key != name})
    figures["novelty"] = _novelty(service, held_out)
    service.add(card)
    forms = [(form, form, terms.steps) for form in source.forms]
    placebos = {
        key: weighted(placebo(engine, form, replace(terms, steps=steps), progress), terms.weight)
        for key, form, steps in (*forms, ("short", "names", min(SHORT, terms.steps)))
    }
    verdict, answered = examined(service, name, placebos, held_out, terms.seed)
    guarded = guards(base, card, live)
    figures |= {
        "verdict": verdict.kind,
        "changes": {key: vars(each) for key, each in verdict.changes.items()},
        "answered": answered,
        "left_out": service.left_out,
        "guards": {key: guard.figures() for key, guard in guarded.items()},
        "unguarded": sorted(live.cards.keys() - live.samples.keys()),
        "questions": _checked(service, name, questions),
        "answers": _asked(service, name, asked, held_out, terms.seed),
    }
    reason = (
        _unshown(verdict)
        or refusal(guarded, terms.max_taken)
        or vetoed(figures, terms, is_log=source.private)
    )
    metadata = {**described, "provenance": figures}
    if terms.share_exam and len(sample):
        metadata["exam"] = [[row["query"], row["positive"]] for row in sample.table.to_pylist()]
    return Lesson(name, replace(card, metadata=metadata), verdict, reason, figures, sample)


def description(base: Base, examples: Pairs, about: str = "") -> dict[str, Any]:
    """Return the metadata that describe a card by its documents."""
    queries, groups = examples.queries, examples.table["group"].to_pylist()
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    typical = [queries[row] for row in medoids(base.encode(queries))]
    return {
        "description": " / ".join([about, *typical] if about else typical),
        "examples": queries,
        "example_groups": [str(numbers[group]) for group in groups],
        "tags": ["learned"],
    }


def _novelty(service: Service, held_out: Pairs) -> dict[str, Any]:
    queries = held_out.queries
    answered = sum(map(bool, service.answering(queries)))
    share_of_groups = novelty(service.base.encode(queries), Index(service.router.candidates))
    return {"answered_by_others": answered / len(queries), "groups_as_low": share_of_groups}


def _checked(service: Service, name: str, questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    answering = service.answering([row["query"] for row in questions])
    rows = list(zip(answering, questions, strict=True))
    own = [got == name for got, row in rows if row["skill"] == name]
    others = [got == name for got, row in rows if row["skill"] != name]
    return {"own": len(own), "answered": sum(own), "others": len(others), "taken": sum(others)}


def _asked(service: Service, name: str, asked: Pairs, among: Pairs, seed: int) -> Any:
    if len(asked) < 10:
        return None
    pairs = asked.add(among)  # an answer is to be found among those of the documents
    cards = None, service.cards[name]
    plain, own = (service.base.ranks(card, pairs)[: len(asked)] for card in cards)
    answers_it = np.array(service.answering(asked.queries)) == name
    return vars(change(plain, np.where(answers_it, own, plain), seed=seed))


def _unshown(verdict: Verdict) -> str:
    if verdict.kind == "skill":
        return ""
    if verdict.kind == "format":
        return "it learned the format of the task only: a placebo does as well"
    return f"it does not surely beat {', '.join(verdict.unbeaten)}"


def vetoed(figures: Mapping[str, Any], terms: Terms, *, is_log: bool) -> str:
    """Say what real questions hold against the skill, or that none spoke for it."""
    asked, checks = figures["answers"], figures["questions"]
    if checks["taken"] > terms.max_taken * checks["others"]:
        return f"it answers {checks['taken']} of {checks['others']} questions that are for others"
    if asked and asked["mean"] < -MAX_FALL:
        return f"on users' questions the MRR falls: {asked['before']:.3f} -> {asked['after']:.3f}"
    if is_log or terms.documents_only or (asked and asked["lower"] > 0):
        return ""
    return "it was not shown on real questions: log answers, or say that documents suffice"


def digest(pairs: Pairs) -> str:
    """Return the SHA-256 of the pairs' values."""
    return hashlib.sha256(json.dumps(pairs.table.to_pydict(), sort_keys=True).encode()).hexdigest()


def _groups(pairs: Pairs) -> int:
    return len(pairs.table["group"].unique())


def version(card: LoRACard) -> str:
    """Return a card's semantic version; "" if it has none."""
    text = card.metadata.get("version")
    return str(text) if is_semantic_version(text) else ""
