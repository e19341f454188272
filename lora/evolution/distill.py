"""SkillDistiller: an engine that learns what it does not know.

All queries that were seen form one immutable `Memory`. Novel queries become tasks, one for each
topic. Work on a task trains a card on one part of its material and judges it on another, drawn
afresh for each trial. A teacher's pairs judge only where there are no others: a bad teacher
must not supply the test data as well.

Requirements: R18.
"""

import hashlib
import json
import logging
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import lora
from lora.card import Array, LoRACard
from lora.checks import integer, share
from lora.errors import CardNotFoundError, DataError, PeerError, StateError
from lora.evolution.acceptance import LEAST, Verdict, judge
from lora.evolution.novelty import (
    LINK,
    Alarm,
    Detector,
    Novelty,
    Signals,
    fit,
    signals_of,
    similarities,
    topics,
)
from lora.evolution.teacher import CloudDistiller, Distilled
from lora.files import PathLike, as_path, save
from lora.metrics import Metrics
from lora.models.adapt import adapt
from lora.router import Description, LoRARouter
from lora.routing import Index
from lora.training.data import Pairs, docstring_pairs, first_sentence
from lora.training.train import LoRATrainer, Progress, ranks

log = logging.getLogger(__name__)

TEXT_FILES = (".md", ".rst", ".txt")
"""Endings of the documents that are read as prose."""

FILE_LIMIT = 2**20
"""Bytes of a document that are read."""


class Engine(Protocol):
    """What distillation needs of an engine."""

    base: Any  # a module with encode(texts)
    router: LoRARouter
    metrics: Metrics

    def register_lora(self, card: LoRACard, description: Description | None = None) -> None:
        """Add a card that the router may choose."""


@dataclass(frozen=True)
class Policy:
    """The numbers that a distiller decides by.

    Args:
        link: Cosine from which two queries are of one topic.
        topic_size: Novel queries that make a task of a topic, or reopen a discarded one.
        pending, logged: Novel queries and question-answer pairs to remember.
        quality: Least quality of a pair.
        share: Share of the material's groups to train on; the rest judges.
        sample: Most pairs to embed of a guard set, a held-out set or a source.
        examples: Most sentences that the router knows a skill by.
    """

    alarm: Alarm = Alarm()  # noqa: RUF009 - a frozen value
    link: float = LINK
    topic_size: int = 5
    pending: int = 256
    logged: int = 10_000
    quality: float = 0.5
    share: float = 0.7
    sample: int = 512
    examples: int = 128

    def __post_init__(self) -> None:
        for item in fields(self)[1:]:
            value, where = getattr(self, item.name), f"policy: {item.name}"
            if isinstance(item.default, int):
                integer(value, where, least=1)
            else:
                share(value, where)


@dataclass(frozen=True, eq=False)
class Source:
    """Material to learn from: pairs, and documents by name that a teacher may be asked about."""

    pairs: Pairs
    texts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: PathLike) -> Self:
        """Read a folder of documents; each file is a group.

        Python files give docstring sentence → qualified name. Prose (`TEXT_FILES`) gives first
        sentence → rest of a paragraph, and is what a teacher may be asked about.
        """
        root = as_path(folder)
        if not root.is_dir():
            raise CardNotFoundError(str(root), "a folder of documents", "none")
        texts: dict[str, str] = {}
        rows: list[dict[str, str]] = []
        for path in sorted(root.rglob("*")):
            if path.suffix not in TEXT_FILES or not path.is_file():
                continue
            name = str(path.relative_to(root))
            with path.open("rb") as file:
                texts[name] = file.read(FILE_LIMIT).decode("utf-8", "replace")
            for paragraph in texts[name].split("\n\n"):
                text = " ".join(paragraph.split())
                head = first_sentence(text)
                rest = text[len(head) :].strip()
                if len(head.split()) >= 3 and rest:
                    rows.append({"query": head, "positive": rest, "group": name})
        pairs = Pairs.of(rows)
        try:
            pairs = pairs.add(docstring_pairs(root))
        except DataError:
            if not texts:
                expected = f"Python files with docstrings or {TEXT_FILES}"
                raise DataError(str(root), expected, "none") from None
        return cls(pairs.unique(), texts)


@dataclass(frozen=True, eq=False)
class Task:
    """A topic to learn.

    Args:
        name: Name of the skill that it will become.
        texts: Its last novel queries, with embeddings by the base model.
        state: ``"open"``, ``"working"``, ``"accepted"`` or ``"discarded"``.
        seen, tried: How many novel queries it has had, and had at its last trial.
    """

    name: str
    texts: Mapping[str, Array]
    state: str = "open"
    trials: int = 0
    seen: int = 0
    tried: int = 0

    @property
    def queries(self) -> tuple[str, ...]:
        """The queries alone."""
        return tuple(self.texts)

    @property
    def vectors(self) -> Array:
        """The embeddings alone, shape ``(n, d)``."""
        return np.array(list(self.texts.values()))


@dataclass(frozen=True, eq=False)
class Memory:
    """All that a distiller has seen."""

    alarm: Alarm
    pending: Mapping[str, Array] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    logged: tuple[Mapping[str, Any], ...] = ()

    @property
    def texts(self) -> dict[str, Array]:
        """All novel queries with their embeddings, waiting or in a task."""
        topics = (self.pending, *(task.texts for task in self.tasks.values()))
        return {text: vector for texts in topics for text, vector in texts.items()}


@dataclass(frozen=True, eq=False)
class Material:
    """What was gathered for a task: own pairs and a teacher's, with numbers by origin."""

    own: Pairs
    taught: Pairs
    figures: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of work on a task.

    Args:
        card: The skill, registered; None if it was discarded.
        verdict: None if there was too little material.
        figures: JSON values: all that the card's provenance holds, or a ``reason``.
    """

    task: str
    card: LoRACard | None
    verdict: Verdict | None
    figures: Mapping[str, Any]

    @property
    def accepted(self) -> bool:
        """Whether there is a skill."""
        return self.card is not None


class SkillDistiller:
    """Turns what an engine does not know into skills that measurably help.

    `observe` and `log_qa` may be called from any thread, `work` from several on different tasks.

    Args:
        engine: Over an `InferenceCore`, with at least one card registered.
        guard: Pairs, or sets of pairs, that are known and may not get worse, none of them among the
            router's examples. Three dozen source groups are needed: they calibrate the detector.
        teacher: Is asked about the documents that fit a topic, or about the topic without any.
        detector: Replaces the calibrated one.
        store: Folder for accepted cards.
        training: Options of `LoRATrainer`: settings, rank, alpha, target_modules.

    Raises:
        DataError, ArgumentError, StateError: If the guard set can't judge or calibrate, or the
            engine knows nothing yet.
    """

    def __init__(
        self,
        engine: Engine,
        guard: Pairs | Sequence[Pairs],
        *,
        sources: Mapping[str, Source] | None = None,
        teacher: CloudDistiller | None = None,
        policy: Policy = Policy(),
        detector: Detector | None = None,
        max_steps: int | None = None,
        seed: int = 0,
        store: PathLike | None = None,
        **training: Any,
    ) -> None:
        guards = (guard,) if isinstance(guard, Pairs) else tuple(guard)
        smallest = min(map(len, guards), default=0)
        if smallest < LEAST:
            raise DataError("guard", f"at least {LEAST} pairs", smallest)
        self.seed = integer(seed, "seed", least=0)
        self.engine, self.policy, self.sources = engine, policy, dict(sources or {})
        self._teacher, self._store = teacher, None if store is None else as_path(store)
        self._trainer: Callable[..., LoRATrainer] = partial(LoRATrainer, engine, **training)
        self._max_steps, self._fixed = max_steps, detector is not None
        self._calibrated: tuple[Any, Any, Any] = (None, None, detector)
        samples = [pairs.sample(policy.sample, seed) for pairs in guards]
        self._guards = tuple((pairs, self._embedded(pairs.queries)) for pairs in samples)
        self._judged(self._guards[0][1][:1])  # calibrates, so that a bad guard set is refused here
        self.memory = Memory(policy.alarm)
        self._write = threading.RLock()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, those with most queries first."""
        tasks = self.memory.tasks.values()
        return tuple(sorted(tasks, key=lambda task: (-len(task.texts), task.name)))

    @property
    def guards(self) -> tuple[Pairs, ...]:
        """Pairs that may not get worse: the guard sets, and what judged accepted skills."""
        return tuple(pairs for pairs, _ in self._guards)

    def observe(self, text: str) -> Novelty:
        """Judge a query as known, unsure or novel; a novel one may open a task."""
        vector = self._embedded([text])
        (novelty,) = self._judged(vector)
        with self._write:
            self.memory = remembered(self.memory, text, vector[0], novelty, self.policy)
        return novelty

    def log_qa(self, question: str, answer: str, *, quality: float = 1.0) -> None:
        """Remember an answer of enough quality, as material for later tasks."""
        row = {"query": question, "positive": answer, "quality": quality}
        Pairs.of([row])
        if quality >= self.policy.quality:
            with self._write:
                logged = (*self.memory.logged, row)[-self.policy.logged :]
                self.memory = replace(self.memory, logged=logged)

    def gather(self, name: str, *, send: bool = False) -> Material:
        """Gather what there is to learn a task from; ask the teacher only if `send` is true.

        A source fits if it is nearer to the topic's queries, on average, than what is known.
        """
        task, policy, teacher = self.memory.tasks.get(name), self.policy, self._teacher
        if task is None:
            expected = f"one of {sorted(self.memory.tasks)}"
            raise StateError(f"task {name!r}", expected, "none of that name")
        vectors = task.vectors
        known = similarities(vectors, Index(self.engine.router.candidates).rows).max(axis=1)
        counts: dict[str, int] = {}
        own, texts = Pairs.of([]), dict[str, str]()
        for source_name, source in sorted(self.sources.items()):
            good = pc.greater_equal(source.pairs.table["quality"], policy.quality)
            pairs = Pairs(source.pairs.table.filter(good))
            queries = pairs.sample(policy.sample, self.seed).queries
            if queries:
                near = similarities(vectors, self._embedded(queries)).max(axis=1)
                if near.mean() > known.mean():
                    counts[f"source {source_name}"] = len(pairs)
                    own, texts = own.add(pairs), {**texts, **source.texts}
        rows = [{**row, "group": f"logged {i}"} for i, row in enumerate(self.memory.logged)]
        if rows:
            questions = self._embedded([row["query"] for row in rows])
            near = similarities(questions, vectors).max(axis=1) >= policy.link
            rows = [rows[place] for place in np.flatnonzero(near)]
        taught = Distilled(Pairs.of([]))
        try:
            if send and teacher and texts:
                taught = teacher.from_documents(texts)
            elif send and teacher:
                taught = teacher.from_queries(name, task.queries)
        except (PeerError, StateError) as error:
            log.warning("the teacher was not asked or did not answer: %s", error)
            taught = replace(taught, failures=(str(error),))
        figures = {
            "pairs": {**counts, "logged": len(rows), "taught": len(taught.pairs)},
            "dropped": dict(taught.dropped),
            "failures": list(taught.failures),
        }
        return Material(own.add(rows).unique(), taught.pairs, figures)

    def work(self, name: str | None = None, *, progress: Progress | None = None) -> Outcome:
        """Gather, train and judge; register the skill if it is accepted, else discard it.

        Args:
            name: Of an open task; by default the one with most queries. After an error it is open.
        """
        with self._write:
            waiting = (task for task in self.tasks if task.state == "open")
            task = next((task for task in waiting if name in (None, task.name)), None)
            if task is None:
                expected = "an open task" if name is None else f"an open task {name!r}"
                raise StateError("work", expected, {task.name: task.state for task in self.tasks})
            task = self._change(task, state="working", trials=task.trials + 1, tried=task.seen)
        state = "open"
        try:
            with self.engine.metrics.judged("jobs"):
                card, verdict, figures = self._worked(task, progress)
            state = "discarded" if card is None else "accepted"
        finally:
            self._change(task, state=state)
        log.info("task %s: %s", task.name, state)
        return Outcome(task.name, card, verdict, MappingProxyType(figures))

    def _worked(
        self, task: Task, progress: Progress | None
    ) -> tuple[LoRACard | None, Verdict | None, dict[str, Any]]:
        seed, guards, base = trial_seed(self.seed, task.trials), self.guards, self.engine.base
        figures: dict[str, Any] = {"trial": task.trials}
        novel = sum(novelty.kind == "novel" for novelty in self._judged(task.vectors))
        if 2 * novel < len(task.texts):
            reason = f"known by now: {novel} of {len(task.texts)} queries are novel"
            return None, None, {**figures, "reason": reason}
        material = self.gather(task.name, send=True)
        figures |= {"seed": seed, "queries": task.seen, **material.figures}
        try:
            training, held_out, figures["judged_on"] = divided(material, self.policy.share, seed)
            held_out = held_out.sample(self.policy.sample, seed)
            for figure, measure in (("sizes", len), ("sha256", digest)):
                figures[figure] = {
                    "training": measure(training),
                    "held_out": measure(held_out),
                    "guards": list(map(measure, guards)),
                }
            figures["versions"] = {
                "lora": lora.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("numpy", "pyarrow", "torch")},
            }
            trained = self._trainer(seed=seed).train(
                training, name=task.name, max_steps=self._max_steps, progress=progress
            )
            tuned = adapt(base, trained.card)
            sides = [(ranks(base, pairs), ranks(tuned, pairs)) for pairs in (held_out, *guards)]
            verdicts = [judge(sides[0], loss, seed=seed) for loss in sides[1:]]
        except DataError as error:  # too little material, or nothing that could be learned
            return None, None, {**figures, "reason": str(error)}
        verdict = min(verdicts, key=lambda verdict: verdict.guard.lower)
        figures |= verdict.figures()
        if not verdict.accepted:
            return None, verdict, figures
        # The held-out queries become a guard set and calibrate the detector: not examples.
        most, judged = self.policy.examples, set(held_out.queries)
        queries = dict.fromkeys([*task.queries, *training.sample(most, seed).queries])
        examples = [text for text in queries if text not in judged][:most]
        metadata = {
            "description": " / ".join(task.queries[:3]),
            "examples": examples,
            "version": f"0.{task.trials}.0",
            "tags": ["distilled"],
            "provenance": figures,
        }
        card = replace(trained.card, metadata=metadata)
        if self._store is not None:
            self._store.mkdir(parents=True, exist_ok=True)
            save(card, self._store / f"{card.name}.arrow")
        guarded = held_out, self._embedded(held_out.queries)
        self.engine.register_lora(card, examples)
        with self._write:
            self._guards = (*self._guards, guarded)
        return card, verdict, figures

    def _embedded(self, texts: Sequence[str]) -> Array:
        """Embed by the base model, so that active skills never move what is known."""
        return np.asarray(self.engine.base.encode(list(texts)), np.float64)

    def _judged(self, vectors: Array) -> list[Novelty]:
        """Judge queries by what the router knows now; new candidates need a new calibration."""
        candidates, guards = self.engine.router.candidates, self._guards
        index, (seen, guarded, detector) = Index(candidates), self._calibrated
        if not self._fixed and (seen is not candidates or guarded is not guards):
            groups: dict[str, list[Signals]] = {}
            for number, (pairs, embeddings) in enumerate(guards):
                names = pairs.table["group"].to_pylist()
                for name, signals in zip(names, signals_of(embeddings, index), strict=True):
                    groups.setdefault(f"{number} {name}", []).append(signals)
            detector = fit(groups, seed=self.seed)
            self._calibrated = candidates, guards, detector
        return [detector.judge(signals) for signals in signals_of(vectors, index)]

    def _change(self, task: Task, **changes: Any) -> Task:
        """Change a task, which may have more queries by now."""
        with self._write:
            task = replace(self.memory.tasks[task.name], **changes)
            self.memory = replace(self.memory, tasks={**self.memory.tasks, task.name: task})
        return task


def remembered(
    memory: Memory, text: str, vector: Array, novelty: Novelty, policy: Policy
) -> Memory:
    """Return what a distiller knows after one more query.

    A novel query joins the task of its topic, or else waits. When the alarm rings, topics of enough
    waiting queries become tasks.
    """
    memory = replace(memory, alarm=memory.alarm.after(novelty.kind))
    tasks = memory.tasks
    if novelty.kind != "novel" or text in memory.texts:
        return memory
    near = {name: similarities([vector], task.vectors).max() for name, task in tasks.items()}
    name = max(near, key=lambda name: near[name], default="")
    if near.get(name, -1.0) >= policy.link:
        task, queries = tasks[name], {**tasks[name].texts, text: vector}
        count = task.seen + 1
        reopened = task.state == "discarded" and count >= task.tried + policy.topic_size
        state = "open" if reopened else task.state
        task = replace(task, texts=_latest(queries, policy.pending), state=state, seen=count)
        return replace(memory, tasks={**tasks, name: task})
    pending = _latest({**memory.pending, text: vector}, policy.pending)
    if memory.alarm.ringing:
        texts = list(pending)
        for topic in topics(list(pending.values()), policy.link):
            if len(topic) >= policy.topic_size:
                members = {texts[i]: pending.pop(texts[i]) for i in topic}
                checksum = hashlib.sha256(json.dumps(sorted(members)).encode()).hexdigest()
                name = f"skill-{checksum[:8]}"
                tasks = {**tasks, name: Task(name, members, seen=len(topic))}
    return replace(memory, pending=pending, tasks=tasks)


def divided(material: Material, share: float, seed: int) -> tuple[Pairs, Pairs, str]:
    """Return pairs to train on, pairs to judge on with nothing in common, and their origin."""
    judged_on, everything = "own material", material.own.add(material.taught)
    try:
        training, held_out = material.own.split(share, seed=seed)
    except DataError:
        training, held_out = everything, Pairs.of([])
    if len(held_out) >= LEAST:
        training = training.add(material.taught)
    else:
        judged_on = "own and taught material"
        training, held_out = everything.split(share, seed=seed)
    texts = pa.array([*held_out.queries, *held_out.positives], pa.string())
    table = training.table
    for name, judged in (("group", held_out.table["group"]), ("query", texts), ("positive", texts)):
        table = table.filter(pc.invert(pc.is_in(table[name], judged)))
    return Pairs(table).unique(), held_out.unique(), judged_on


def trial_seed(seed: int, trial: int) -> int:
    """Return the seed of a trial: each trial of a task is judged on another split.

    Examples:
        >>> trial_seed(0, 1) == trial_seed(0, 1), trial_seed(0, 1) == trial_seed(0, 2)
        (True, False)
    """
    return int(np.random.SeedSequence([seed, trial]).generate_state(1)[0])


def digest(pairs: Pairs) -> str:
    """Return the SHA-256 of the pairs' values."""
    return hashlib.sha256(json.dumps(pairs.table.to_pydict(), sort_keys=True).encode()).hexdigest()


def _latest(texts: Mapping[str, Array], count: int) -> dict[str, Array]:
    return dict(list(texts.items())[-count:])
