"""The distiller by example: what opens a task, what it learns from, what is kept or discarded."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import lora
from lora.card import LoRACard
from lora.errors import ArgumentError, DataError, StateError
from lora.evolution import distill, exam
from lora.evolution.acceptance import Verdict
from lora.evolution.distill import SkillDistiller, keep
from lora.evolution.documents import Source
from lora.evolution.exam import Lesson
from lora.evolution.novelty import TOPIC
from lora.evolution.teacher import CloudDistiller, Consent, MockTeacher
from lora.federation.catalog import card_files
from lora.metrics import Metrics
from lora.router import LoRARouter
from lora.routing import candidate_of
from lora.testing.plugin import requirement
from lora.training.data import Pairs
from tests.unit.letters import SETTINGS, combined, engine, subject

WORDS = ["python", "law", "pasta", "tax"]


class Words:
    """An encoder that counts words of four subjects, and the letters of all others a little."""

    def encode(self, texts):
        counts = [
            [text.count(word) for word in WORDS] + [0.05 * text.count(letter) for letter in "xyz"]
            for text in texts
        ]
        return np.array(counts, np.float32).reshape(len(counts), 7)


class Stub:
    """What a distiller needs of an engine, without a model that could be trained."""

    threshold = None

    def __init__(self):
        self.base, self.metrics = Words(), Metrics()
        self.router = LoRARouter(self.base.encode)
        texts = [f"python {'xyz'[i % 3] * (i % 5)}" for i in range(120)]
        groups = [f"g{i // 5}" for i in range(120)]
        python = candidate_of("python", self.base.encode(texts), groups=groups)
        self.router.register(python)


def watching(observed=(), **options):
    distiller = SkillDistiller(Stub(), **options)
    for text in observed:
        distiller.observe(text)
    return distiller


def laws(count, subject="law"):
    return [f"{subject} number {i}" for i in range(count)]


@requirement("R18.1", "R18.2")
@pytest.mark.parametrize(
    ("texts", "unknown"),
    [
        ([f"python {'x' * (i % 4)}" for i in range(50)], 0),
        (["law"] * 20, 20),
        (laws(TOPIC - 1), TOPIC - 1),
        (laws(6) + laws(6, "pasta"), 12),
    ],
    ids=["known", "repeated", "few", "two topics"],
)
def test_known_repeated_and_stray_queries_open_no_task(texts, unknown):
    distiller = watching()
    kinds = [distiller.observe(text).kind for text in texts]
    assert (kinds.count("unknown"), distiller.tasks) == (unknown, ())


@requirement("R18.1", "R18.2")
def test_queries_of_a_topic_open_one_task_in_whatever_order_they_come():
    (task,) = watching(laws(20)).tasks
    assert (task.queries, task.state, task.seen) == (tuple(laws(20)), "open", 20)
    assert 0 < task.novelty <= 0.05  # of 24 known groups, none scores as low
    texts = laws(12) + laws(12, "pasta")
    for order in (range(24), np.random.default_rng(0).permutation(24)):
        tasks = watching([texts[i] for i in order]).tasks
        halves = {frozenset(texts[:12]), frozenset(texts[12:])}
        assert {frozenset(task.queries) for task in tasks} == halves


@requirement("R18.1")
def test_an_engine_that_knows_nothing_can_not_tell_and_learns():
    distiller = watching()
    distiller.engine.router.unregister("python")
    assert [distiller.observe(text) for text in laws(TOPIC)] == [None] * TOPIC
    (task,) = distiller.tasks
    assert task.novelty is None


@requirement("R18.2")
def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(distill, "REMEMBERED", 12)
    (task,) = watching(laws(50)).tasks
    assert (len(task.queries), task.vectors.shape, task.seen) == (12, (12, 7), 50)


@requirement("R18.3")
def test_only_sources_and_answers_about_the_topic_are_gathered_and_bad_ones_dropped():
    qualities = [0.4] * 3 + [0.9] * 5
    sources = {}
    for name in ("law", "pasta", "python"):
        rows = [(f"{name} {i}", f"answer {i}", quality) for i, quality in enumerate(qualities)]
        keys = ("query", "positive", "quality")
        sources[name] = Source(Pairs.of(dict(zip(keys, row, strict=True)) for row in rows))
    distiller = watching(laws(TOPIC), sources=sources)
    distiller.log_qa("law one", "of the log")
    distiller.log_qa("law two", "bad", quality=0.1)
    distiller.log_qa("pasta", "of another topic")
    material = distiller.gather(distiller.tasks[0].name)
    assert material.pairs == {"source law": 5, "logged": 1, "taught": 0}
    assert {query.split()[0] for query in material.source.pairs.queries} == {"law"}
    assert min(material.source.pairs.table["quality"].to_pylist()) >= 0.5
    assert material.answers.positives == ["of the log"]


@requirement("R18.3", "R5.14")
@pytest.mark.parametrize("row", [("", "a", 1.0), ("q", " ", 1), ("q", "a", 1.5), ("q", None, 1)])
def test_an_answer_that_is_no_pair_is_not_logged(row):
    distiller = watching()
    with pytest.raises(DataError):
        distiller.log_qa(*row[:2], quality=row[2])
    assert not distiller.logged


def law_source(text):
    return {"law": Source(Pairs.of([("law of x", "a"), ("law of y", "b")]), {"code": text})}


@requirement("R18.3", "R18.5")
def test_a_teacher_is_asked_about_the_fitting_documents_or_else_about_the_topic():
    sources = law_source("law is what binds us all. pasta is something else entirely.")
    queries = [f"{text} is long enough" for text in laws(TOPIC)]
    for known, group in ((sources, "code"), ({}, None)):
        distiller = watching(queries, sources=known, teacher=CloudDistiller(MockTeacher()))
        name = distiller.tasks[0].name
        assert len(distiller.gather(name).taught.pairs) == 0  # nothing is sent unless it is said
        taught = distiller.gather(name, send=True).taught.pairs
        assert set(taught.table["group"].to_pylist()) == {group or name}


@requirement("R18.6")
@pytest.mark.parametrize(
    "consent", [None, Consent("example.org", ["queries"]), Consent("example.com", ["documents"])]
)
def test_without_consent_the_teacher_is_left_out_and_the_reason_told(monkeypatch, consent):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a socket was opened"))
    teacher = CloudDistiller(MockTeacher("example.org"), consent=consent)
    distiller = watching(laws(TOPIC), sources=law_source("law is secret here."), teacher=teacher)
    material = distiller.gather(distiller.tasks[0].name, send=True)
    assert (len(material.taught.pairs), len(material.source.pairs)) == (0, 2)
    assert "nothing was sent" in material.taught.failures[0]


@requirement("R18.2")
def test_queries_from_many_threads_are_all_seen_and_an_unknown_task_is_named():
    distiller, texts = watching(), laws(200)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(distiller.observe, texts))
    (task,) = distiller.tasks
    assert set(task.queries) == set(texts)
    with pytest.raises(StateError, match="'none'"):
        distiller.gather("none")
    with pytest.raises(StateError, match="an open task 'none'"):
        distiller.work("none")


@pytest.fixture
def learning(monkeypatch, tmp_path):
    """Return an engine that evolves over the tiny encoder, with one task, its queries."""
    monkeypatch.setattr(exam, "LEARNING", SETTINGS)
    monkeypatch.setattr(exam, "standard_library", lambda form: combined("abcd"))
    monkeypatch.setattr(distill, "LINK", -0.99)

    def start(source, **options):
        one = engine()
        options = {"rank": 4, "documents_only": True, "placebos": tmp_path / "placebos"} | options
        distiller = one.enable_evolution(sources={"book": source}, **options)
        for query in combined("efgh").queries[:TOPIC]:
            one.encode_with_lora([query], intent_query=query)
        return one, distiller

    return start


@requirement("R18.3", "R18.4", "R5.14", "R5.16")
def test_a_skill_that_beats_all_is_kept_registered_and_routed_to(learning, tmp_path):
    one, distiller = learning(subject("efgh"), store=tmp_path / "cards")
    lesson = distiller.work()
    assert (lesson.live, distiller.tasks[0].state) == (True, "accepted")
    (path,) = card_files(tmp_path / "cards")
    assert lora.load(path) == lesson.card == one.manager.list_cards()[lesson.name]
    query = lesson.card.metadata["examples"][0]
    answer = one.encode_with_lora([query], intent_query=query)
    assert answer.routes[0].name == lesson.name
    assert distiller.live.samples[lesson.name] == lesson.sample
    asked = set(combined("efgh").queries[:TOPIC])
    described = set(lesson.card.metadata["description"].split(" / "))
    assert not asked & described - set(lesson.card.metadata["examples"])
    jobs = one.metrics.snapshot()
    assert (jobs["jobs"], jobs["jobs_seconds"] > 0) == (1, True)


@requirement("R18.2", "R18.3")
def test_what_can_not_be_learned_is_discarded_with_its_figures_and_tried_again_on_more(learning):
    one, distiller = learning(subject("efgh", shuffled=3), steps=5)
    first = distiller.work()
    assert (first.live, first.verdict.kind) == (False, "nothing")
    assert first.figures["changes"]["base"]["lower"] <= 0
    assert one.manager.list_cards() == {}
    with pytest.raises(StateError, match="an open task"):
        distiller.work()
    for query in combined("efgh").queries[TOPIC : 2 * TOPIC]:
        assert [task.state for task in distiller.tasks] == ["discarded"]
        distiller.observe(query)
    second = distiller.work(first.name)
    assert first.figures["sha256"]["held_out"] != second.figures["sha256"]["held_out"]


@requirement("R18.3", "R18.8")
def test_without_answers_of_users_a_skill_is_not_registered(learning):
    one, distiller = learning(subject("efgh"), documents_only=False)
    assert distiller.work().reason.startswith("it was not shown on real questions")
    assert one.manager.list_cards() == {}


@requirement("R18.8")
def test_questions_of_a_private_source_are_learned_only_by_their_owners_word(learning, tmp_path):
    source = replace(subject("efgh"), private=True)
    _, distiller = learning(source, store=tmp_path / "cards")
    with pytest.raises(ArgumentError, match="share_questions"):
        distiller.work()
    assert not (tmp_path / "cards").exists()


@requirement("R18.8")
def test_a_sample_is_never_beside_a_card_that_was_trained_on_it(tmp_path, monkeypatch):
    """A kill between two writes leaves the old sample; a card without one does not delete it."""
    card, old, new = LoRACard("a", 1, 1.0, [], {}), combined("abcd"), combined("efgh")
    lesson = Lesson("a", card, Verdict("skill", {}), "", {}, old)
    keep(lesson, tmp_path)
    keep(replace(lesson, sample=Pairs.of([])), tmp_path)
    sample = tmp_path / "a.exam.jsonl"
    assert Pairs.load(sample).queries == old.queries

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        keep(replace(lesson, sample=new), tmp_path)
    assert Pairs.load(sample).queries == old.queries


@requirement("R18.3")
def test_a_task_is_worked_on_once_at_a_time_and_whatever_goes_wrong_leaves_it_open(learning):
    _, distiller = learning(subject("efgh"))
    refused = []

    def attempt():
        with pytest.raises(StateError, match="an open task"):
            distiller.work()
        refused.append(distiller.tasks[0].state)

    def look(step, *_):
        worker = threading.Thread(target=attempt)
        worker.start()
        worker.join()
        distiller.observe(combined("efgh").queries[50 + step])  # serving goes on meanwhile
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distiller.work(progress=look)
    assert refused == ["working"]
    (task,) = distiller.tasks
    assert (task.state, task.trials, task.seen) == ("open", 1, TOPIC + 1)
