"""SkillDistiller: an engine that learns what it does not know.

Queries that no skill knows wait until ten of one topic have come. They are a task, unless the known
skills' own groups score as low. Work on a task trains a card on the material that fits it, and the
exam decides whether the engine may use the card.

Requirements: R18.
"""

import hashlib
import json
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc

from lora.card import Array, LoRACard
from lora.errors import PeerError, StateError
from lora.evolution.documents import Source
from lora.evolution.exam import Lesson, Live, Terms, learn, sample_path
from lora.evolution.novelty import LINK, NOVEL, TOPIC, novelty, similarities, topics
from lora.evolution.teacher import CloudDistiller, Distilled
from lora.files import SUFFIX, PathLike, as_path, os_errors, save
from lora.metrics import Metrics
from lora.router import Description, LoRARouter
from lora.routing import Decision, Index, decide, nearest, unit
from lora.training.data import Pairs
from lora.training.train import Progress

log = logging.getLogger(__name__)

REMEMBERED = 256
"""Unknown queries that are remembered, waiting and of each task."""

LOGGED = 10_000
"""Question-answer pairs that are remembered."""

QUALITY = 0.5
"""Least quality of a pair that is learned from."""


class Engine(Protocol):
    """What distillation needs of an engine."""

    base: Any  # an encoder that can be trained
    base_model: str | None
    router: LoRARouter
    metrics: Metrics
    threshold: float | None

    def register_lora(self, card: LoRACard, description: Description | None = None) -> None:
        """Add a card that the router may choose."""


@dataclass(frozen=True, eq=False)
class Task:
    """A topic to learn.

    Args:
        name: Name of the skill that it will become.
        texts: Its last unknown queries, with embeddings by the base model.
        novelty: Share of the known groups that score as low; None if that can't be told.
        state: ``"open"``, ``"working"``, ``"accepted"`` or ``"discarded"``.
        seen, tried: How many queries it has had, and had at its last trial.
    """

    name: str
    texts: Mapping[str, Array]
    novelty: float | None = None
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
class Material:
    """What was gathered for a task, with the number of pairs by origin."""

    source: Source
    answers: Pairs
    taught: Distilled
    pairs: Mapping[str, int] = field(default_factory=dict)


class SkillDistiller:
    """Turns what an engine does not know into skills that beat every alternative.

    `observe` and `log_qa` may be called from any thread, `work` from several on different tasks.

    Args:
        engine: Over an encoder that can be trained.
        sources: Material by name; see `lora.evolution.documents.Source.read`.
        teacher: Asked about the documents that fit a topic or, if none does, about the topic.
        store: Folder of the live cards, to which accepted ones are added.
        terms: Fields of `lora.evolution.exam.Terms`.

    Examples:
        >>> from lora import ArrowEngine
        >>> distiller = SkillDistiller(ArrowEngine.from_pretrained(None))
        >>> distiller.observe("open a file"), distiller.tasks
        (None, ())
    """

    def __init__(
        self,
        engine: Engine,
        *,
        sources: Mapping[str, Source] | None = None,
        teacher: CloudDistiller | None = None,
        store: PathLike | None = None,
        **terms: Any,
    ) -> None:
        self.engine, self.sources, self.terms = engine, dict(sources or {}), Terms(**terms)
        self._teacher, self._store = teacher, None if store is None else as_path(store)
        self.live = Live() if self._store is None else Live.read(self._store)
        self._pending: dict[str, Array] = {}
        self._tasks: dict[str, Task] = {}
        self.logged: deque[Mapping[str, Any]] = deque(maxlen=LOGGED)
        self._write = threading.RLock()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, those with most queries first."""
        return tuple(sorted(self._tasks.values(), key=lambda task: (-len(task.texts), task.name)))

    def observe(self, text: str) -> Decision | None:
        """Decide whether a query is known; an unknown one may open a task.

        Returns:
            The decision; None if the engine knows nothing at all.
        """
        (vector,) = unit(self._embedded([text]))
        index = Index(self.engine.router.candidates)
        routes = nearest(vector, index)
        decision = decide(routes[0], index, self.engine.threshold) if routes else None
        with self._write:
            if decision is None or decision.kind == "unknown":
                self._remember(text, vector, index)
        return decision

    def log_qa(self, question: str, answer: str, *, quality: float = 1.0) -> None:
        """Remember an answer of enough quality, as material for later tasks."""
        row = {"query": question, "positive": answer, "quality": quality}
        Pairs.of([row])
        if quality >= QUALITY:
            self.logged.append(row)

    def gather(self, name: str, *, send: bool = False) -> Material:
        """Gather what there is to learn a task from; ask the teacher only if `send` is true.

        A source fits if it is nearer to the topic's queries, on average, than what is known.
        """
        task = self._tasks.get(name)
        if task is None:
            expected = f"one of {sorted(self._tasks)}"
            raise StateError(f"task {name!r}", expected, "none of that name")
        vectors, index = task.vectors, Index(self.engine.router.candidates)
        known = similarities(vectors, index.rows).max(axis=1).mean() if index.candidates else -1.0
        counts, pairs = dict[str, int](), Pairs.of([])
        texts, forms, private = dict[str, str](), dict[str, None](), False
        for source_name, source in sorted(self.sources.items()):
            good = Pairs(
                source.pairs.table.filter(pc.greater_equal(source.pairs.table["quality"], QUALITY))
            )
            queries = good.sample(2 * REMEMBERED, self.terms.seed).queries
            if queries:
                near = similarities(vectors, self._embedded(queries)).max(axis=1)
                if near.mean() > known:
                    counts[f"source {source_name}"] = len(good)
                    pairs, texts = pairs.add(good), {**texts, **source.texts}
                    forms |= dict.fromkeys(source.forms)
                    private |= source.private
        rows = [{**row, "group": f"logged {i}"} for i, row in enumerate(list(self.logged))]
        if rows:
            questions = self._embedded([row["query"] for row in rows])
            near = similarities(questions, vectors).max(axis=1) >= LINK
            rows = [rows[place] for place in np.flatnonzero(near)]
        gathered = Source(pairs.unique(), texts, tuple(forms) or ("prose",), private)
        taught = asked(self._teacher if send else None, name, texts, task.queries)
        counts |= {"logged": len(rows), "taught": len(taught.pairs)}
        return Material(gathered, Pairs.of(rows), taught, counts)

    def work(self, name: str | None = None, *, progress: Progress | None = None) -> Lesson:
        """Gather, train and examine; register the skill if it may go live, else discard it.

        Args:
            name: Of an open task; by default the one with most queries. After an error it is open
                again.

        Raises:
            StateError: There is no such task.
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
                material = self.gather(task.name, send=True)
                lesson = learn(
                    self.engine,
                    task.name,
                    material.source,
                    live=self.live,
                    answers=material.answers,
                    taught=material.taught,
                    # Each trial holds out other files.
                    terms=replace(self.terms, seed=self.terms.seed + task.trials - 1),
                    progress=progress,
                )
            if lesson.card is not None and lesson.live:
                if self._store is not None:
                    keep(lesson, self._store)
                self.engine.register_lora(lesson.card)
                with self._write:
                    self.live = self.live.replaced(lesson.card, lesson.sample)
            state = "accepted" if lesson.live else "discarded"
        finally:
            self._change(task, state=state)
        log.info("task %s: %s %s", task.name, state, lesson.reason)
        return lesson

    def _embedded(self, texts: Sequence[str]) -> Array:
        """Embed by the base model, so that active skills never move what is known."""
        return np.asarray(self.engine.base.encode(list(texts)), np.float64)

    def _remember(self, text: str, vector: Array, index: Index) -> None:
        """Add an unknown query to the task of its topic, or to what waits for one."""
        near = {
            name: similarities([vector], task.vectors).max() for name, task in self._tasks.items()
        }
        name = max(near, key=lambda name: near[name], default="")
        if name and near[name] >= LINK:
            task = self._tasks[name]
            if text not in task.texts:
                seen = task.seen + 1
                again = task.state == "discarded" and seen >= task.tried + TOPIC
                state = "open" if again else task.state
                texts = _latest({**task.texts, text: vector})
                self._change(task, texts=texts, state=state, seen=seen)
            return
        self._pending = _latest({**self._pending, text: vector})
        if len(self._pending) < TOPIC:
            return
        waiting = list(self._pending.items())
        for topic in topics(list(self._pending.values())):
            members = dict(waiting[place] for place in topic)
            level = novelty(list(members.values()), index) if len(members) >= TOPIC else 1.0
            if level is None or level <= NOVEL:
                checksum = hashlib.sha256(json.dumps(sorted(members)).encode()).hexdigest()
                task = Task(f"skill-{checksum[:8]}", members, level, seen=len(members))
                self._tasks[task.name] = task
                self._pending = {t: v for t, v in self._pending.items() if t not in members}

    def _change(self, task: Task, **changes: Any) -> Task:
        with self._write:
            task = replace(self._tasks[task.name], **changes)
            self._tasks[task.name] = task
        return task


def asked(
    teacher: CloudDistiller | None, topic: str, texts: Mapping[str, str], queries: Sequence[str]
) -> Distilled:
    """Ask a teacher about documents, or without any about queries; it need not answer."""
    if teacher is None:
        return Distilled(Pairs.of([]))
    try:
        return teacher.from_documents(texts) if texts else teacher.from_queries(topic, queries)
    except (PeerError, StateError) as error:
        log.warning("the teacher was not asked or did not answer: %s", error)
        return Distilled(Pairs.of([]), failures=(str(error),))


def keep(lesson: Lesson, folder: PathLike) -> str:
    """Write a lesson's card and sample into a folder of live cards; return the card's digest."""
    root = as_path(folder)
    with os_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    # The card comes first: it was trained on no pair of the old sample, but the old card may know
    # the new one.
    checksum = save(lesson.card, root / f"{lesson.name}{SUFFIX}")  # type: ignore[arg-type]
    if len(lesson.sample):
        lesson.sample.save(sample_path(root, lesson.name))
    return checksum


def _latest(texts: Mapping[str, Array]) -> dict[str, Array]:
    return dict(list(texts.items())[-REMEMBERED:])
