"""One cycle of learning: from documents or a log to a skill in a folder of live cards.

Requirements: R5, R18.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora.card import LoRACard
from lora.checks import version_order
from lora.engine import ArrowEngine
from lora.errors import CardNotFoundError, ConflictError, DataError, StoreError
from lora.evolution.distill import asked, keep
from lora.evolution.documents import Source, keywords, standard_library
from lora.evolution.exam import (
    Base,
    Lesson,
    Live,
    Terms,
    guards,
    learn,
    refusal,
    sample_path,
    version,
)
from lora.evolution.queue import check_skill_name
from lora.evolution.teacher import CloudDistiller
from lora.files import SUFFIX, PathLike, as_path, digest, os_errors, save
from lora.training.data import Pairs, is_text, json_lines
from lora.training.train import Progress


@dataclass(frozen=True)
class Evolved:
    """What a cycle left in its folder; ``facts["text"]`` tells it in a paragraph."""

    lesson: Lesson
    facts: Mapping[str, Any]


def evolve(
    engine: ArrowEngine,
    documents: PathLike,
    out: PathLike,
    *,
    name: str | None = None,
    cards: PathLike | None = None,
    questions: PathLike | None = None,
    answers: PathLike | None = None,
    teacher: CloudDistiller | None = None,
    terms: Terms | None = None,
    progress: Progress | None = None,
) -> Evolved:
    """Make one skill of a folder of documents, or of a file of logged pairs.

    Args:
        out: Folder of live cards, where the skill is written if it passes.
        name: Of the skill; by default the folder's, and the word that tells its texts best.
        cards: Folder of the skills that are live; by default `out`.
        questions: A file of routing checks: on each line a JSON object with ``query`` and, if it is
            for another, ``skill``, which may be null.
        answers: A file of what users asked and were answered; see `Pairs.load`.
    """
    if cards is not None and not as_path(cards).is_dir():
        raise CardNotFoundError(str(cards), "a folder of live cards", "none")
    root, live = as_path(out), Live.read(out if cards is None else cards)
    if root.exists() and not root.is_dir():
        raise StoreError(str(root), "a folder", "a file")
    source, title = material(documents), as_path(documents).resolve().stem
    name = name or _name(title, source.pairs.queries)
    check_skill_name(name)
    there = live if cards is None else Live.read(root)
    replaced, next_version = there.cards.get(name), live.next_version(name)
    if replaced and version_order(version(replaced)) > version_order(next_version):
        hint = "learn it with this folder as --cards"
        raise ConflictError(
            f"{name!r} in {root}", f"no version above {next_version}", version(replaced), hint
        )
    checks = [] if questions is None else routing_checks(questions, name)
    taught = asked(teacher, title, source.texts, [row["query"] for row in checks])
    lesson = learn(
        engine,
        name,
        source,
        live=live,
        answers=None if answers is None else Pairs.load(answers),
        taught=taught,
        questions=checks,
        terms=terms or Terms(),
        about="" if source.private else title,
        progress=progress,
    )
    path, candidate = root / f"{name}{SUFFIX}", None
    with os_errors(root):
        if lesson.live:
            keep(lesson, root)
        elif lesson.card is not None and lesson.verdict.kind == "skill":
            root.mkdir(parents=True, exist_ok=True)
            candidate = str(root / f"{name}.candidate.arrow")
            save(lesson.card, candidate)
    sample = sample_path(root, name)
    facts = {
        "name": name,
        "verdict": lesson.verdict.kind,
        "live": lesson.live,
        "reason": lesson.reason or None,
        "file": str(path) if lesson.live else None,
        "exam": str(sample) if lesson.live and len(lesson.sample) else None,
        "candidate": candidate,
        "digest": digest(path) if lesson.live else None,
        "version": lesson.card and lesson.card.metadata["version"],
        "figures": dict(lesson.figures),
        "text": summary(lesson, is_log=source.private),
    }
    return Evolved(lesson, facts)


@dataclass(frozen=True)
class Guarded:
    """Why a card may not take its place among the live ones ("" if it may), with figures."""

    refused: str
    figures: Mapping[str, Any]


def guard(
    engine: ArrowEngine, card: LoRACard, cards: PathLike, max_taken: float = Terms.max_taken
) -> Guarded:
    """Hold a card to the samples of the skills in a folder, wherever the card comes from."""
    live = Live.read(cards)
    changes = guards(Base(engine.base), card, live)
    figures = {name: change.figures() for name, change in changes.items()}
    unguarded = sorted(live.cards.keys() - live.samples.keys())
    return Guarded(refusal(changes, max_taken), {"guards": figures, "unguarded": unguarded})


def material(path: PathLike) -> Source:
    """Read a folder of documents, or a file of pairs that users asked and were answered."""
    if as_path(path).is_file():
        return Source(Pairs.load(path).unique(), private=True)
    return Source.read(path)


def routing_checks(path: PathLike, name: str) -> list[dict[str, Any]]:
    """Read questions with the skill that each is for; by default `name`."""
    checks = []
    for where, row in json_lines(as_path(path)):
        check = {"skill": name, **row} if isinstance(row, Mapping) else {}
        if not is_text(check.get("query")) or not isinstance(check["skill"], str | None):
            expected = "an object with a query and, if another should answer, a skill or null"
            raise DataError(where, expected, json.dumps(row)[:80])
        checks.append(check)
    return checks


def summary(lesson: Lesson, *, is_log: bool = False) -> str:
    """Say in a paragraph what was learned, and what was not shown."""
    figures, changes = lesson.figures, lesson.verdict.changes
    outcome = "live" if lesson.live else f"not live: {lesson.reason}"
    if not changes:
        return f"{lesson.name}: {outcome}."
    base = changes["base"]
    gain = f"MRR {base.before:.3f} -> {base.after:.3f}"
    count = figures["pairs"]["held_out"]
    parts = [f"{lesson.name}: {outcome}.", f"{gain} on {count} questions not seen in training."]
    placebos = [key for key in changes if key.startswith("placebo")]
    strongest = min(placebos, key=lambda key: changes[key].lower, default=None)
    for key, change in changes.items():
        kind, _, other = key.partition(" ")
        gain = f"{change.mean:+.3f} [{change.lower:+.3f}, {change.upper:+.3f}]"
        if key == strongest:
            origin = "comes from these documents" if change.lower > 0 else "is not sure"
            parts.append(
                "The strongest card trained on Python's own documentation instead"
                f" ({other}) reaches {change.before:.3f}, so {gain} {origin}."
            )
        elif kind == "skill":
            parts.append(f"The live skill {other!r} reaches {change.before:.3f}: {gain}.")
    guarded = figures["guards"]
    takes = max((guard["taken"] for guard in guarded.values()), default=0.0)
    parts.append(
        f"It answers {figures['answered']:.0%} of such questions and takes {takes:.1%} of others'."
    )
    weak = [key for key, guard in guarded.items() if guard["weak"]] + figures["unguarded"]
    if weak:
        parts.append(f"Weakly guarded, for lack of held-out pairs: {', '.join(weak)}.")
    checks, real = figures["questions"], figures["answers"]
    if checks["own"]:
        parts.append(f"Of {checks['own']} real questions it answers {checks['answered']}.")
    if real:
        mrr = f"MRR {real['before']:.3f} -> {real['after']:.3f}"
        parts.append(f"On {real['queries']} questions that users asked, {mrr}.")
    elif figures["pairs"]["answers"]:
        parts.append("There are too few logged answers to test: it takes 20.")
    elif not is_log:
        parts.append("Not tested on real users' questions: log answers to do so.")
    return " ".join(parts)


def _name(title: str, queries: Sequence[str]) -> str:
    """Name a skill by its folder and the word that tells its texts best."""
    words = keywords(queries, standard_library("names").queries, 4)
    word = next((word for word in words if word not in title.lower()), "")
    name = re.sub(r"[\W_]+", "-", f"{title} {word}".lower()).strip("-")
    return name or f"skill-{hashlib.sha256(title.encode()).hexdigest()[:8]}"
