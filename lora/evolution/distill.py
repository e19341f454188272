"""SkillDistiller: an engine's own learning, from a query that it does not know to a skill that is
kept or thrown away.

What it has seen is one immutable state, replaced in one assignment: observing and logging are pure
functions of it, from any thread. A task is worked on by one caller at a time, outside the lock;
serving is never held up. A skill is trained on one part of the material and judged on another,
drawn afresh for each trial, and never on what only a teacher says where there is anything else to
judge it on: who poisons the lesson must not write the exam.

Requirements: R18.
"""

import hashlib
import json
import logging
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
from torch import nn

import lora
from lora.card import Array, LoRACard
from lora.checks import finite, integer
from lora.errors import ArgumentError, CardNotFoundError, DataError, PeerError, StateError, shown
from lora.evolution.cloud import CloudDistiller, Distilled
from lora.evolution.data import Pairs, docstring_pairs, first_sentence
from lora.evolution.gate import LEAST, Verdict, judge, reciprocal_ranks
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
from lora.evolution.train import LoRATrainer, Progress, Settings
from lora.inference.router import Description, LoRARouter
from lora.rewrite import adapt
from lora.routing import Candidate, Index
from lora.store import PathLike, as_path, replacing, save

log = logging.getLogger(__name__)

TEXT_FILES = (".md", ".rst", ".txt")
"""Endings of the documents that are read as prose."""

FILE_LIMIT = 2**20
"""Bytes of a document that are read."""

SAME = 0.999
"""Cosine of two embeddings of one text by one model, at least: they differ in rounding."""


class Engine(Protocol):
    """What distillation needs of an engine."""

    base: nn.Module
    router: LoRARouter

    def register_lora(self, card: LoRACard, description: Description | None = None) -> None:
        """Know a card by name and let the router choose it."""


@dataclass(frozen=True)
class Policy:
    """How a distiller decides.

    Args:
        alarm: When dissonance is more than noise.
        link: Cosine at which two queries are of one topic.
        topic_size: Dissonant queries that make a topic a task, and a discarded task worth another
            trial.
        pending: Dissonant queries that are remembered.
        logged: Question-answer pairs that are remembered.
        quality: The least that a pair needs, in [0, 1].
        share: Of the material's groups to train on; the rest judges.
        sample: Pairs at most that are embedded to judge, to guard and to tell whether a source is
            about a topic.
        examples: Sentences at most that the router knows a skill by.
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
        for name in ("topic_size", "pending", "logged", "sample", "examples"):
            integer(getattr(self, name), f"policy: {name}", least=1)
        for name in ("link", "quality", "share"):
            if not 0 <= finite(getattr(self, name), f"policy: {name}", ArgumentError) <= 1:
                raise ArgumentError(
                    f"policy: {name}", "a number in [0, 1]", shown(getattr(self, name))
                )


@dataclass(frozen=True, eq=False)
class Source:
    """Something to learn from.

    Args:
        pairs: Pairs of queries and answers.
        texts: Documents by name, for a teacher to be asked about.
    """

    pairs: Pairs
    texts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: PathLike) -> Self:
        """The documents of a folder.

        Python files give docstring sentence → qualified name. Prose (`TEXT_FILES`) gives first
        sentence → rest of each paragraph of two sentences or more, and is what a teacher may be
        asked about. A file is a group.

        Raises:
            CardNotFoundError: If there is no such folder.
            DataError: If it holds neither.
        """
        root = as_path(folder)
        if not root.is_dir():
            raise CardNotFoundError(str(root), "a folder of documents", "none")
        texts: dict[str, str] = {}
        rows: list[dict[str, str]] = []
        for path in sorted(
            path for path in root.rglob("*") if path.suffix in TEXT_FILES and path.is_file()
        ):
            name = str(path.relative_to(root))
            with path.open("rb") as file:
                texts[name] = file.read(FILE_LIMIT).decode("utf-8", "replace")
            for paragraph in (" ".join(part.split()) for part in texts[name].split("\n\n")):
                head = first_sentence(paragraph)
                rest = paragraph[len(head) :].strip()
                if len(head.split()) >= 3 and rest:
                    rows.append({"query": head, "positive": rest, "group": name})
        pairs = Pairs.of(rows)
        try:
            pairs = pairs.add(docstring_pairs(root))
        except DataError:
            if not texts:
                raise DataError(
                    str(root), f"Python files with docstrings or {TEXT_FILES}", "none"
                ) from None
        return cls(pairs.unique(), MappingProxyType(texts))


@dataclass(frozen=True, eq=False)
class Task:
    """A topic to learn.

    Args:
        name: Of the skill that it will become; worked out from its first queries.
        queries: Its last dissonant queries, oldest first; at most `Policy.pending`.
        vectors: Their embeddings by the base model.
        state: ``"open"``, ``"working"``, ``"accepted"`` or ``"discarded"``.
        trials: How often it was tried.
        seen: How many dissonant queries it has had.
        tried: How many of them at its last trial.
    """

    name: str
    queries: tuple[str, ...]
    vectors: Array
    state: str = "open"
    trials: int = 0
    seen: int = 0
    tried: int = 0


@dataclass(frozen=True, eq=False)
class Memory:
    """All that a distiller has seen: one value, that can be saved and handed to the next one."""

    alarm: Alarm
    pending: Mapping[str, Array] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    logged: tuple[Mapping[str, Any], ...] = ()

    def to_table(self) -> pa.Table:
        """A row for each text: one that waits, one of a task, or an answer; the numbers are in the
        schema's metadata.
        """
        rows = [{"query": text, "vector": vector.tolist()} for text, vector in self.pending.items()]
        for task in self.tasks.values():
            vectors = zip(task.queries, task.vectors.tolist(), strict=True)
            rows += [
                {"task": task.name, "query": query, "vector": vector} for query, vector in vectors
            ]
        numbers = [{key: getattr(task, key) for key in _NUMBERS} for task in self.tasks.values()]
        told = json.dumps({"alarm": asdict(self.alarm), "tasks": numbers})
        return pa.Table.from_pylist(
            [*rows, *self.logged], _MEMORY.with_metadata({"lora.memory": told})
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """The memory that `to_table` gave; a task that was being worked on is open.

        Raises:
            DataError: If it is none.
        """
        try:
            told, rows = (
                json.loads(table.schema.metadata[b"lora.memory"]),
                table.cast(_MEMORY).to_pylist(),
            )
            alarm = Alarm(**{**told["alarm"], "recent": tuple(told["alarm"]["recent"])})
            logged = tuple(
                {key: row[key] for key in _LOGGED} for row in rows if row["positive"] is not None
            )
            texts: dict[str | None, dict[str, Array]] = {}
            for row in rows:
                if row["positive"] is None:
                    texts.setdefault(row["task"], {})[row["query"]] = np.array(
                        row["vector"], np.float64
                    )
            tasks = {}
            for numbers in told["tasks"]:
                found, state = texts[numbers["name"]], numbers["state"].replace("working", "open")
                vectors = np.array(list(found.values()))
                tasks[numbers["name"]] = Task(
                    **{**numbers, "queries": tuple(found), "vectors": vectors, "state": state}
                )
        except (
            ArgumentError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # pyarrow's are ValueErrors
            raise DataError("memory", "a table of a distiller's memory", error) from error
        return cls(alarm, MappingProxyType(texts.get(None, {})), MappingProxyType(tasks), logged)

    def save(self, path: PathLike) -> None:
        """Write it as an Arrow file, atomically."""
        table = self.to_table()
        with replacing(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read what `save` wrote.

        Raises:
            CardNotFoundError, DataError: If there is no such file, or it is no memory.
        """
        path = as_path(path)
        if not path.is_file():
            raise CardNotFoundError(str(path), "a distiller's memory", "nothing there")
        try:
            table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DataError(str(path), "a distiller's memory", error) from error
        return cls.from_table(table)


_TEXTS = {"task": pa.string(), "query": pa.string(), "positive": pa.string()}
_MEMORY = pa.schema(_TEXTS | {"quality": pa.float64(), "vector": pa.list_(pa.float64())})
_LOGGED = ("query", "positive", "quality")
_NUMBERS = ("name", "state", "trials", "seen", "tried")


@dataclass(frozen=True, eq=False)
class Material:
    """What was gathered for a task.

    Args:
        own: From documents and logged answers.
        taught: From the teacher.
        figures: How many pairs came from where, what the teacher's answers lost, and why it was not
            asked.
    """

    own: Pairs
    taught: Pairs
    figures: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a task.

    Args:
        task: Its name.
        card: The skill, registered; None if it was discarded.
        verdict: The gate's; None if there was too little material to train or to judge.
        figures: All of it as JSON values: the gate's figures or ``reason``, material, seed and
            trial, digests, versions.
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
    """Watches queries, and turns what an engine does not know into skills that measurably help.

    Thread safety: `observe`, `log_qa` and `tasks` from any thread, at any time; `work` from
    several, each on another task.

    Args:
        engine: Over an `InferenceCore`, with at least one card registered.
        guard: What is known and may not get worse: pairs of three dozen source groups or more, none
            of them among the router's examples. They also calibrate the detector, anew whenever the
            router's candidates change. What a skill was judged on is guarded, too, once the skill
            is accepted. Or several sets, as an earlier distiller's `guards`.
        sources: Folders' worth of material, by name.
        teacher: To be asked about the documents that fit a topic, or about the topic where none
            does.
        policy: How it decides.
        detector: Tells known from novel, instead of one that is calibrated.
        settings, rank, alpha, target_modules, max_steps: Of the training.
        seed: Of everything; a trial's own is drawn from it and the trial's number.
        store: Folder to save accepted cards in; None to register them only.
        memory: Of an earlier distiller over the same base model, to go on from.

    Raises:
        DataError, ArgumentError, StateError: If the guard set can't judge or calibrate, the engine
            knows nothing yet, or the memory is of another base model.
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
        settings: Settings | str | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: Sequence[str] | str = ("query", "value"),
        max_steps: int | None = None,
        seed: int = 0,
        store: PathLike | None = None,
        memory: Memory | None = None,
    ) -> None:
        guards = (guard,) if isinstance(guard, Pairs) else tuple(guard)
        if not guards or min(map(len, guards)) < LEAST:
            raise DataError("guard", f"at least {LEAST} pairs", min(map(len, guards), default=0))
        self.seed = integer(seed, "seed", least=0)
        self.engine, self.policy, self.sources = engine, policy, dict(sources or {})
        self._fixed, self._calibrated = detector, _Calibrated()
        self._guards = tuple(self._guarded(pairs.sample(policy.sample, seed)) for pairs in guards)
        self._detector(
            engine.router.candidates
        )  # whatever is wrong with the guard set is told here
        self._teacher, self._store, self._max_steps = (
            teacher,
            None if store is None else as_path(store),
            max_steps,
        )
        self._trainer: Callable[[int], LoRATrainer] = lambda seed: LoRATrainer(
            engine,
            rank=rank,
            alpha=alpha,
            target_modules=target_modules,
            seed=seed,
            settings=settings,
        )
        self._memory = Memory(policy.alarm) if memory is None else self._recalled(memory)
        self._write = threading.Lock()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, those with most queries first."""
        return tuple(
            sorted(self._memory.tasks.values(), key=lambda task: (-len(task.queries), task.name))
        )

    @property
    def guards(self) -> tuple[Pairs, ...]:
        """What may not get worse: the guard set, and what each accepted skill was judged on."""
        return tuple(guard.pairs for guard in self._guards)

    @property
    def memory(self) -> Memory:
        """All that was seen so far."""
        return self._memory

    @property
    def alarm(self) -> Alarm:
        """Whether there was much dissonance lately."""
        return self._memory.alarm

    def observe(self, text: str) -> Novelty:
        """See a query: known, unsure or novel; what is novel may open a task."""
        vector = _embedded(self.engine, [text])
        (novelty,) = self._judged(vector)
        with self._write:
            self._memory = remembered(self._memory, text, vector[0], novelty, self.policy)
        return novelty

    def log_qa(self, question: str, answer: str, *, quality: float = 1.0) -> None:
        """Remember an answer that was given, to learn from if its question is of a topic that is
        learned.

        Raises:
            DataError: If one is empty or the quality is not in [0, 1].
        """
        row = {"query": question, "positive": answer, "quality": quality}
        Pairs.of([row])
        with self._write:
            logged = (*self._memory.logged, row)[-self.policy.logged :]
            self._memory = replace(self._memory, logged=logged)

    def gather(self, name: str, *, send: bool = False) -> Material:
        """What there is to learn a task from.

        A source fits if its pairs are nearer to the topic's queries, on average, than what is known
        already. Logged answers fit if their question is of the topic.

        Args:
            name: The task's.
            send: Ask the teacher, too.
        """
        task = self._task(name)
        known = np.mean(
            [s.similarity for s in signals_of(task.vectors, Index(self.engine.router.candidates))]
        )
        counts: dict[str, int] = {}
        own, texts = Pairs.of([]), dict[str, str]()
        for source_name, source in sorted(self.sources.items()):
            shown_to = source.pairs.sample(self.policy.sample, self.seed)
            if not len(shown_to) or self._nearness(task, shown_to.queries) <= known:
                continue
            good = _good(source.pairs, self.policy.quality)
            counts[f"source {source_name}"] = len(good)
            own, texts = own.add(good), {**texts, **source.texts}
        logged = Pairs.of(
            {**row, "group": f"logged {i}"} for i, row in enumerate(self._memory.logged)
        )
        logged = _good(logged, self.policy.quality)
        if len(logged):
            near = (
                similarities(_embedded(self.engine, logged.queries), task.vectors).max(axis=1)
                >= self.policy.link
            )
            logged = logged.take(np.flatnonzero(near).tolist())
        counts["logged"] = len(logged)
        taught = Distilled(Pairs.of([]))
        refusal = ""
        if send and self._teacher is not None:
            try:
                taught = (
                    self._teacher.from_documents(texts)
                    if texts
                    else self._teacher.from_queries(task.name, list(task.queries))
                )
            except (PeerError, StateError) as error:
                log.warning("the teacher was not asked or did not answer: %s", error)
                refusal = str(error)
        counts["taught"] = len(taught.pairs)
        figures = {
            "pairs": counts,
            "dropped": dict(taught.dropped),
            "failures": [*taught.failures, *[refusal] * bool(refusal)],
        }
        return Material(own.add(logged).unique(), taught.pairs, MappingProxyType(figures))

    def work(self, name: str | None = None, *, progress: Progress | None = None) -> Outcome:
        """Gather, train and judge; register the skill if it is accepted, else discard it.

        Args:
            name: Of an open task; by default that with most queries.
            progress: As `LoRATrainer.train`'s.

        Raises:
            StateError: If there is no such open task. Whatever else goes wrong leaves it open.
        """
        task = self._claim(name)
        try:
            outcome = self._worked(task, progress)
        except BaseException:
            self._move(task.name, "open")
            raise
        self._move(task.name, "accepted" if outcome.accepted else "discarded")
        log.info("task %s: %s", task.name, "accepted" if outcome.accepted else "discarded")
        return outcome

    def _worked(self, task: Task, progress: Progress | None) -> Outcome:
        seed, guards = trial_seed(self.seed, task.trials), self._guards
        still = sum(novelty.kind == "novel" for novelty in self._judged(task.vectors))
        if 2 * still < len(task.queries):
            reason = f"known by now: {still} of {len(task.queries)} queries are novel"
            return Outcome(
                task.name, None, None, MappingProxyType({"trial": task.trials, "reason": reason})
            )
        material = self.gather(task.name, send=True)
        figures: dict[str, Any] = {
            "trial": task.trials,
            "seed": seed,
            "queries": task.seen,
            **material.figures,
        }
        try:
            training, held_out, judged_on = divided(material, self.policy.share, seed)
            held_out = held_out.sample(self.policy.sample, seed)
            figures |= {
                "judged_on": judged_on,
                "sizes": {
                    "training": len(training),
                    "held_out": len(held_out),
                    "guards": [len(guard.pairs) for guard in guards],
                },
                "sha256": {
                    "training": digest(training),
                    "held_out": digest(held_out),
                    "guards": [digest(guard.pairs) for guard in guards],
                },
                "versions": {"lora": lora.__version__, "python": platform.python_version()}
                | {package: version(package) for package in ("numpy", "pyarrow", "torch")},
            }
            trained = self._trainer(seed).train(
                training, name=task.name, max_steps=self._max_steps, progress=progress
            )
            tuned = adapt(self.engine.base, trained.card)
            gain = ranks(self.engine.base, held_out), ranks(tuned, held_out)
            sides = [
                (ranks(self.engine.base, guard.pairs), ranks(tuned, guard.pairs))
                for guard in guards
            ]
            verdict = min(
                (judge(gain, side, seed=seed) for side in sides),
                key=lambda found: found.guard.lower,
            )
        except DataError as error:  # too little, or nothing that could be learned
            return Outcome(
                task.name, None, None, MappingProxyType({**figures, "reason": str(error)})
            )
        figures |= verdict.figures()
        if not verdict.accepted:
            return Outcome(task.name, None, verdict, MappingProxyType(figures))
        judged = set(held_out.queries)  # not among the examples: it shall tell what is known
        examples = [*task.queries, *training.sample(self.policy.examples, seed).queries]
        examples = [text for text in dict.fromkeys(examples) if text not in judged][
            : self.policy.examples
        ]
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
        guarded = self._guarded(held_out)
        self.engine.register_lora(card, examples)
        with self._write:
            self._guards = (*self._guards, guarded)
        return Outcome(task.name, card, verdict, MappingProxyType(figures))

    def _recalled(self, memory: Memory) -> Memory:
        """A memory under this policy's alarm, if its embeddings are by this base model, as its
        first one tells.
        """
        seen = {
            text: vector
            for task in memory.tasks.values()
            for text, vector in zip(task.queries, task.vectors, strict=True)
        }
        for text, vector in [*memory.pending.items(), *seen.items()][:1]:
            (found,) = _embedded(self.engine, [text])
            if found.shape != vector.shape or similarities([found], [vector]).item() < SAME:
                raise ArgumentError("memory", "embeddings by this base model", "others")
        alarm = replace(self.policy.alarm, recent=memory.alarm.recent[-self.policy.alarm.n :])
        return replace(memory, alarm=replace(alarm, ringing=memory.alarm.ringing))

    def _guarded(self, pairs: Pairs) -> "_Guard":
        return _Guard(pairs, _embedded(self.engine, pairs.queries))

    def _judged(self, vectors: Array) -> list[Novelty]:
        """What these queries are taken for, by what the router knows now."""
        candidates = self.engine.router.candidates
        detector = self._detector(candidates)
        return [detector.judge(signals) for signals in signals_of(vectors, Index(candidates))]

    def _detector(self, candidates: Mapping[str, Candidate]) -> Detector:
        """The detector for these candidates: a new skill changes every query's margin."""
        made, guards = self._calibrated, self._guards
        if self._fixed is None and (made.candidates is not candidates or made.guards is not guards):
            made = _Calibrated(candidates, guards, calibrated(guards, Index(candidates), self.seed))
            self._calibrated = made
        return self._fixed or made.detector  # type: ignore[return-value]

    def _nearness(self, task: Task, queries: Sequence[str]) -> float:
        """The mean over the topic's queries of the similarity to the nearest of others."""
        return float(similarities(task.vectors, _embedded(self.engine, queries)).max(axis=1).mean())

    def _task(self, name: str) -> Task:
        found = self._memory.tasks.get(name)
        if found is None:
            raise StateError(
                f"task {name!r}", f"one of {sorted(self._memory.tasks)}", "none of that name"
            )
        return found

    def _claim(self, name: str | None) -> Task:
        """An open task, from now on this caller's."""
        with self._write:
            waiting = [
                task for task in self.tasks if task.state == "open" and name in (None, task.name)
            ]
            if not waiting:
                found = {task.name: task.state for task in self.tasks}
                raise StateError(
                    "work", "an open task" if name is None else f"an open task {name!r}", found
                )
            task = replace(
                waiting[0], state="working", trials=waiting[0].trials + 1, tried=waiting[0].seen
            )
            self._memory = replace(self._memory, tasks=_with(self._memory.tasks, task))
        return task

    def _move(self, name: str, state: str) -> None:
        with self._write:
            task = replace(self._memory.tasks[name], state=state)
            self._memory = replace(self._memory, tasks=_with(self._memory.tasks, task))


def remembered(
    memory: Memory, text: str, vector: Array, novelty: Novelty, policy: Policy
) -> Memory:
    """What a distiller knows after one more query.

    A novel query joins the task whose topic it is of; a discarded task is opened again when it has
    `Policy.topic_size` more. Otherwise it waits; when the alarm rings, topics of that many queries
    become tasks.
    """
    memory = replace(memory, alarm=memory.alarm.after(novelty.kind))
    if (
        novelty.kind != "novel"
        or text in memory.pending
        or any(text in task.queries for task in memory.tasks.values())
    ):
        return memory
    near = [
        (similarities([vector], task.vectors).max(), task.name) for task in memory.tasks.values()
    ]
    best, name = max(near, default=(-1.0, ""))
    if best >= policy.link:
        task = memory.tasks[name]
        reopened = task.state == "discarded" and task.seen + 1 >= task.tried + policy.topic_size
        task = replace(
            task,
            queries=(*task.queries, text)[-policy.pending :],
            vectors=np.concatenate([task.vectors, [vector]])[-policy.pending :],
            state="open" if reopened else task.state,
            seen=task.seen + 1,
        )
        return replace(memory, tasks=_with(memory.tasks, task))
    pending = dict([*memory.pending.items(), (text, vector)][-policy.pending :])
    tasks = memory.tasks
    if memory.alarm.ringing:
        texts, vectors = list(pending), np.array(list(pending.values()))
        for topic in topics(vectors, policy.link):
            if len(topic) >= policy.topic_size:
                queries = tuple(texts[i] for i in topic)
                name = (
                    f"skill-{hashlib.sha256(json.dumps(sorted(queries)).encode()).hexdigest()[:8]}"
                )
                tasks = _with(tasks, Task(name, queries, vectors[list(topic)], seen=len(topic)))
                pending = {key: value for key, value in pending.items() if key not in queries}
    return replace(memory, pending=MappingProxyType(pending), tasks=tasks)


@dataclass(frozen=True, eq=False)
class _Guard:
    """Pairs that are known, with the embeddings of their queries by the base model."""

    pairs: Pairs
    vectors: Array


@dataclass(frozen=True, eq=False)
class _Calibrated:
    """A detector, and what it was calibrated for."""

    candidates: Mapping[str, Candidate] | None = None
    guards: tuple[_Guard, ...] = ()
    detector: Detector | None = None


def calibrated(guards: Sequence[_Guard], index: Index, seed: int) -> Detector:
    """A detector for what an index knows, from queries that should be known, grouped by source."""
    groups: dict[str, list[Signals]] = {}
    for number, guard in enumerate(guards):
        found = zip(
            guard.pairs.table["group"].to_pylist(), signals_of(guard.vectors, index), strict=True
        )
        for group, signals in found:
            groups.setdefault(f"{number} {group}", []).append(signals)
    return fit(groups, seed=seed)


def divided(material: Material, share: float, seed: int) -> tuple[Pairs, Pairs, str]:
    """Pairs to train on, pairs to judge on, and whether these are the engine's own or only a
    teacher's.

    The parts have no group and no text in common. Where the own material has `LEAST` pairs to
    spare, a teacher's are only trained on.

    Raises:
        DataError: If there are fewer than two groups.
    """
    try:
        training, held_out = material.own.split(share, seed=seed)
    except DataError:
        training, held_out = material.own, Pairs.of([])
    judged_on = "own material"
    if len(held_out) >= LEAST:
        training = training.add(material.taught)
    else:
        judged_on = "own and taught material"
        training, held_out = material.own.add(material.taught).split(share, seed=seed)
    groups = set(held_out.table["group"].to_pylist())
    texts = {*held_out.queries, *held_out.positives}
    rows = zip(
        training.table["group"].to_pylist(), training.queries, training.positives, strict=True
    )
    kept = [
        i
        for i, (group, query, told) in enumerate(rows)
        if group not in groups and not {query, told} & texts
    ]
    return training.take(kept).unique(), held_out.unique(), judged_on


def ranks(model: Any, pairs: Pairs) -> Array:
    """Each query's reciprocal rank of its positive among all of them, by a model with
    ``encode(texts)``.

    Raises:
        DataError: If an embedding is not finite.
    """
    candidates = sorted(set(pairs.positives))
    place = {text: row for row, text in enumerate(candidates)}
    queries, targets = (
        np.asarray(model.encode(texts), np.float64) for texts in (pairs.queries, candidates)
    )
    if not (np.isfinite(queries).all() and np.isfinite(targets).all()):
        raise DataError("ranks", "finite embeddings", "NaN or infinity", "lower the learning rate")
    return reciprocal_ranks(queries, targets, [place[text] for text in pairs.positives])


def trial_seed(seed: int, trial: int) -> int:
    """A trial's own seed, so that no two trials of a task are judged on the same split.

    Examples:
        >>> trial_seed(0, 1) == trial_seed(0, 1), trial_seed(0, 1) == trial_seed(0, 2)
        (True, False)
    """
    return int(np.random.SeedSequence([seed, trial]).generate_state(1)[0])


def digest(pairs: Pairs) -> str:
    """SHA-256 of the pairs' values, whatever file they came from."""
    return hashlib.sha256(json.dumps(pairs.table.to_pydict(), sort_keys=True).encode()).hexdigest()


def _embedded(engine: Engine, texts: Sequence[str]) -> Array:
    """Embeddings by the base model, so that active skills never move what is known."""
    return np.asarray(engine.base.encode(list(texts)), np.float64)  # type: ignore[operator]


def _good(pairs: Pairs, quality: float) -> Pairs:
    return pairs.take(
        [i for i, found in enumerate(pairs.table["quality"].to_pylist()) if found >= quality]
    )


def _with(tasks: Mapping[str, Task], task: Task) -> Mapping[str, Task]:
    return MappingProxyType({**tasks, task.name: task})
