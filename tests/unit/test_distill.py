"""The distiller by example: what opens a task, what it learns from, what is kept or discarded."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import lora
from lora.engine import ArrowEngine
from lora.errors import ArgumentError, CardNotFoundError, DataError, StateError
from lora.evolution.distill import (
    Policy,
    SkillDistiller,
    Source,
    digest,
    divided,
    ranks,
    trial_seed,
)
from lora.evolution.novelty import Alarm, Detector
from lora.evolution.teacher import CloudDistiller, Consent, MockTeacher
from lora.metrics import Metrics
from lora.models.encoder import EncoderConfig, InferenceCore
from lora.router import LoRARouter
from lora.routing import Calibration
from lora.testing.plugin import requirement
from lora.training.data import Pairs
from lora.training.train import LoRATrainer, Settings, evaluate

WORDS = ["python", "law", "pasta", "tax"]
SIZE = 6


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

    def __init__(self):
        self.base, self.registered, self.metrics = Words(), [], Metrics()
        self.router = LoRARouter(self.base.encode)
        self.router.register_virtual_candidate("python", ["python", "python x", "python z"])

    def register_lora(self, card, description=None):
        self.registered.append((card, description))


GUARD = Pairs.of(
    {"query": f"python {'xyz'[i % 3] * (i % 4)}", "positive": f"x{i}", "group": f"g{i}"}
    for i in range(40)
)
SMALL = Policy(alarm=Alarm(k=3, n=6, release=1), link=0.8, topic_size=3)


def watching(engine=None, *, observed=(), **options):
    distiller = SkillDistiller(engine or Stub(), GUARD, **{"policy": SMALL, **options})
    for text in observed:
        distiller.observe(text)
    return distiller


def laws(count, start=0):
    return [f"law number {i}" for i in range(start, count)]


@requirement("R18.1", "R18.2")
@pytest.mark.parametrize(
    ("texts", "novel", "rings"),
    [
        ([f"python {'x' * (i % 4)}" for i in range(50)], 0, False),
        (["law"] * 20, 20, True),
        ([f"law number {i}" if i % 8 == 0 else "python x" for i in range(40)], 5, False),
    ],
)
def test_known_repeated_and_stray_queries_open_no_task(texts, novel, rings):
    distiller = watching()
    kinds = [distiller.observe(text).kind for text in texts]
    assert (kinds.count("novel"), distiller.memory.alarm.ringing) == (novel, rings)
    assert distiller.tasks == ()


@requirement("R18.1", "R18.2")
def test_queries_of_a_topic_open_one_task_in_whatever_order_they_come():
    distiller = watching()
    assert {distiller.observe(text).kind for text in laws(20)} == {"novel"}
    (task,) = distiller.tasks
    assert (task.queries, task.state, task.seen) == (tuple(laws(20)), "open", 20)
    texts = [f"{subject} number {i}" for i in range(6) for subject in ("law", "pasta")]
    for order in (range(12), np.random.default_rng(0).permutation(12)):
        tasks = watching(observed=[texts[i] for i in order]).tasks
        topics = {frozenset(task.queries) for task in tasks}
        assert topics == {frozenset(texts[::2]), frozenset(texts[1::2])}


@requirement("R18.2")
def test_what_is_remembered_is_bounded():
    policy = replace(SMALL, alarm=Alarm(k=6, n=6, release=1), pending=4, logged=3)
    texts = [f"law number {i}" if i % 2 else "python x" for i in range(50)]  # never rings
    distiller = watching(policy=policy, observed=[*texts, *["law number 49"] * 9])
    for i in range(50):
        distiller.log_qa(f"law {i}", "yes")
    assert list(distiller.memory.pending) == [f"law number {i}" for i in (43, 45, 47, 49)]
    assert len(distiller.memory.logged) == 3
    (task,) = watching(policy=replace(SMALL, pending=4), observed=laws(50)).tasks
    assert (len(task.queries), task.vectors.shape, task.seen) == (4, (4, 7), 50)


@requirement("R18.3")
def test_only_sources_and_answers_about_the_topic_are_gathered_and_bad_ones_dropped():
    qualities = [0.4] * 3 + [0.9] * 5
    sources = {}
    for subject in ("law", "pasta", "python"):
        rows = [(f"{subject} {i}", f"answer {i}", quality) for i, quality in enumerate(qualities)]
        keys = ("query", "positive", "quality")
        sources[subject] = Source(Pairs.of(dict(zip(keys, row, strict=True)) for row in rows))
    distiller = watching(sources=sources, observed=laws(5))
    distiller.log_qa("law one", "of the log")
    distiller.log_qa("law two", "bad", quality=0.1)
    distiller.log_qa("pasta", "of another topic")
    material = distiller.gather(distiller.tasks[0].name)
    assert material.figures["pairs"] == {"source law": 5, "logged": 1, "taught": 0}
    assert {query.split()[0] for query in material.own.queries} == {"law"}
    assert "of the log" in material.own.positives
    assert min(material.own.table["quality"].to_pylist()) >= 0.5


@requirement("R18.3")
@pytest.mark.parametrize("row", [("", "a", 1.0), ("q", " ", 1), ("q", "a", 1.5), ("q", None, 1)])
def test_an_answer_that_is_no_pair_is_not_logged(row):
    distiller = watching()
    with pytest.raises(DataError):
        distiller.log_qa(*row[:2], quality=row[2])
    assert distiller.memory.logged == ()


def law_source(text):
    return {"law": Source(Pairs.of([("law of x", "a"), ("law of y", "b")]), {"code": text})}


@requirement("R18.3", "R18.5")
def test_a_teacher_is_asked_about_the_fitting_documents_or_else_about_the_topic():
    sources = law_source("law is what binds us all. pasta is something else entirely.")
    queries = [f"{text} is long enough" for text in laws(5)]
    for known, group in ((sources, "code"), ({}, None)):
        teacher = CloudDistiller(MockTeacher())
        distiller = watching(sources=known, teacher=teacher, observed=queries)
        name = distiller.tasks[0].name
        assert len(distiller.gather(name).taught) == 0  # nothing is sent unless it is said
        taught = distiller.gather(name, send=True).taught
        assert set(taught.table["group"].to_pylist()) == {group or name}


@requirement("R18.6")
@pytest.mark.parametrize(
    "consent", [None, Consent("example.org", ["queries"]), Consent("example.com", ["documents"])]
)
def test_without_consent_the_teacher_is_left_out_and_the_reason_told(monkeypatch, consent):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a socket was opened"))
    teacher = CloudDistiller(MockTeacher("example.org"), consent=consent)
    sources = law_source("law is secret here.")
    distiller = watching(sources=sources, teacher=teacher, observed=laws(5))
    material = distiller.gather(distiller.tasks[0].name, send=True)
    assert len(material.taught) == 0
    assert len(material.own) == 2
    assert "nothing was sent" in material.figures["failures"][0]


@requirement("R18.3")
def test_a_teachers_pairs_are_trained_on_and_judge_only_where_there_are_no_others():
    own, taught = (
        Pairs.of(
            {"query": f"{word} {i}", "positive": f"{word}{i}", "group": f"{i % 8}"}
            for i in range(80)
        )
        for word in ("law", "bad")
    )
    none = Pairs.of([])
    training, _, judged_on = divided(SimpleNamespace(own=own, taught=taught), 0.7, 1)
    assert judged_on == "own material"
    assert any(query.startswith("bad") for query in training.queries)
    judged_on = divided(SimpleNamespace(own=none, taught=taught), 0.7, 1)[2]
    assert judged_on == "own and taught material"
    with pytest.raises(DataError, match="at least two groups"):
        divided(SimpleNamespace(own=none, taught=none), 0.7, 1)


def core():
    """A tiny random encoder over a vocabulary of ``a0 … h5``."""
    names = [f"{letter}{i}" for letter in "abcdefgh" for i in range(SIZE)]
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = InferenceCore(EncoderConfig(len(vocabulary), 32, 2, 2, 64, 16), tokenizer)
    return encoder.requires_grad_(requires_grad=False).eval()


def combined(letters, labels=None):
    """``a<i> c<j>`` asks for ``b<i> d<j>``: what some combinations teach holds for the others."""
    places = [(i, j) for i in range(SIZE) for j in range(SIZE)]
    answers = [f"{letters[1]}{i} {letters[3]}{j}" for i, j in places]
    if labels is not None:
        answers = [answers[row] for row in np.random.default_rng(labels).permutation(len(answers))]
    queries = [f"{letters[0]}{i} {letters[2]}{j}" for i, j in places]
    rows = enumerate(zip(queries, answers, strict=True))
    return Pairs.of({"query": q, "positive": a, "group": f"{letters} {i}"} for i, (q, a) in rows)


ALL = Calibration(0.0, 1, 0.5, (0.0, 1.0))
EVERYTHING = Detector((9.0, 9.0), (1.0, 1.0), ALL, ALL)
"""Takes every query for novel."""


def learning(source, *, model=None, observed=4, **options):
    """A distiller over the tiny encoder with one task."""
    engine = ArrowEngine(model or core())
    engine.router.register_virtual_candidate("letters", combined("abcd").queries[:10])
    options = {
        "sources": {"book": Source(source)},
        "policy": Policy(alarm=Alarm(k=1, n=1, release=0), link=0.0, topic_size=3, share=0.6),
        "settings": Settings(epochs=200, batch_size=8, lr=1e-2, validate_every=10, patience=99),
        "detector": EVERYTHING,
        "rank": 4,
        "max_steps": 40,
        **options,
    }
    distiller = SkillDistiller(engine, options.pop("guard", combined("abcd")), **options)
    for query in source.queries[:observed]:
        distiller.observe(query)
    return engine, distiller


@lru_cache
def accepted():
    """A skill that was accepted; its guard is of the same kind, and so gains as well."""
    engine, distiller = learning(combined("efgh"), guard=combined("efgh"), observed=12)
    return engine, distiller, distiller.work()


@requirement("R18.3", "R18.4")
def test_a_skill_that_helps_is_accepted_registered_and_routed_to():
    engine, distiller, outcome = accepted()
    assert outcome.accepted
    assert outcome.verdict.gain.lower > 0
    assert distiller.tasks[0].state == "accepted"
    assert engine.manager.list_cards()[outcome.task] is outcome.card
    query = outcome.card.metadata["examples"][0]
    (route,) = engine.router.select(query)
    assert (route.name, route.virtual) == (outcome.task, False)
    routed = engine.encode_with_lora([query], intent_query=query).embeddings
    assert not np.array_equal(routed, engine.encode([query]))
    assert np.array_equal(routed, engine.encode_with_lora([query], outcome.card).embeddings)


@requirement("R18.4")
def test_an_accepted_card_tells_where_it_comes_from():
    _, _, outcome = accepted()
    figures = outcome.card.metadata["provenance"]
    assert figures == json.loads(json.dumps(dict(outcome.figures)))
    assert figures["gain"] == vars(outcome.verdict.gain)
    assert figures["guard"]["queries"] == SIZE * SIZE
    assert (figures["trial"], figures["seed"]) == (1, trial_seed(0, 1))
    digests = figures["sha256"]
    assert digests["guards"] == [digest(combined("efgh"))]
    assert digests["training"] != digests["held_out"]
    assert set(figures["versions"]) == {"lora", "numpy", "pyarrow", "python", "torch"}
    assert figures["sizes"]["training"] + figures["sizes"]["held_out"] == SIZE * SIZE
    assert set(outcome.card.metadata["examples"]) <= set(combined("efgh").queries)


@requirement("R18.3", "R18.4")
def test_an_accepted_card_can_be_saved_loaded_and_measured_again(tmp_path, monkeypatch):
    store, lesson, trained, train = tmp_path / "skills", combined("efgh"), [], LoRATrainer.train
    engine, distiller = learning(lesson, guard=lesson, store=store)
    material = distiller.gather(distiller.tasks[0].name)

    def watched(trainer, pairs, **options):
        trained.append(pairs)
        return train(trainer, pairs, **options)

    monkeypatch.setattr(LoRATrainer, "train", watched)
    outcome = distiller.work()
    (path,) = store.iterdir()
    card = lora.load(path)
    assert card == outcome.card
    held_out = divided(material, 0.6, outcome.figures["seed"])[1]
    assert digest(held_out) == outcome.figures["sha256"]["held_out"]
    assert digest(trained[0]) == outcome.figures["sha256"]["training"]
    assert not set(held_out.queries) & set(trained[0].queries)
    gain, tuned = outcome.verdict.gain, lora.adapt(engine.base, card)
    assert ranks(tuned, held_out).mean() == pytest.approx(gain.after, rel=1e-12)
    assert ranks(engine.base, held_out).mean() == pytest.approx(gain.before, rel=1e-12)
    assert evaluate(tuned, held_out).mrr == pytest.approx(gain.after, rel=1e-6)


@requirement("R18.3")
def test_what_can_not_be_learned_is_discarded_with_its_figures():
    engine, distiller = learning(combined("efgh", labels=3), guard=combined("efgh"))
    outcome = distiller.work()
    assert not outcome.accepted
    assert outcome.figures["helps"] is False
    assert outcome.figures["gain"]["lower"] <= 0
    assert distiller.tasks[0].state == "discarded"
    assert engine.manager.list_cards() == {}
    assert set(engine.router.candidates) == {"letters"}


@requirement("R18.3")
@pytest.mark.parametrize("order", [1, -1])
def test_a_skill_that_helps_but_harms_what_was_known_is_discarded(order):
    """The lesson contradicts what the model was taught first; one of two guards is not harmed."""
    lesson = combined("efgh").table.to_pylist()
    others = zip(lesson, lesson[SIZE:] + lesson[:SIZE], strict=True)
    contrary = Pairs.of({**row, "positive": other["positive"]} for row, other in others)
    texts = combined("abcd").queries
    unharmed = Pairs.of({"query": text, "positive": text, "group": text} for text in texts)
    engine, distiller = learning(
        contrary,
        guard=[combined("efgh"), unharmed][::order],
        model=lora.fold(lora.adapt(core(), accepted()[2].card)),
    )
    outcome = distiller.work()
    assert [outcome.figures[name] for name in ("accepted", "helps", "harmless")] == [
        False,
        True,
        False,
    ]
    assert -outcome.figures["guard"]["lower"] > 0.01
    assert engine.manager.list_cards() == {}
    assert len(distiller.guards) == 2


@requirement("R18.3")
@pytest.mark.parametrize("rows", [0, 1, 5, 15])
def test_too_little_material_is_discarded_with_the_reason(rows):
    few = {"book": Source(combined("efgh").take(range(rows)))}
    _, distiller = learning(combined("efgh"), sources=few)
    outcome = distiller.work()
    assert outcome.verdict is None
    assert "at least" in outcome.figures["reason"]
    assert distiller.tasks[0].state == "discarded"


@requirement("R18.2", "R18.3", "R5.16")
def test_a_discarded_topic_is_tried_again_when_it_is_asked_for_more_and_on_another_split():
    source = combined("efgh", labels=3)
    _, distiller = learning(source, guard=combined("efgh"), max_steps=2)
    first = distiller.work()
    with pytest.raises(StateError, match="an open task"):
        distiller.work()
    for query, state in zip(source.queries[4:7], ["discarded"] * 2 + ["open"], strict=True):
        distiller.observe(query)
        assert [task.state for task in distiller.tasks] == [state]
    second = distiller.work(first.task)
    jobs = distiller.engine.metrics.snapshot()
    assert (jobs["jobs"], jobs["jobs_seconds"] > 0) == (2, True)
    assert (first.figures["trial"], second.figures["trial"]) == (1, 2)
    assert first.figures["seed"] != second.figures["seed"]
    assert first.figures["sha256"]["held_out"] != second.figures["sha256"]["held_out"]


@requirement("R18.1", "R18.2", "R18.3")
def test_what_judged_an_accepted_skill_is_guarded_from_then_on_and_is_not_among_its_examples():
    _, distiller, outcome = accepted()
    first, second = distiller.guards
    assert first == combined("efgh")
    assert digest(second) == outcome.figures["sha256"]["held_out"]
    assert set(second.queries) & set(combined("efgh").queries[:12])  # of those that opened the task
    assert not set(second.queries) & set(outcome.card.metadata["examples"])
    for query in combined("efgh").queries:
        distiller.observe(query)  # by a detector that takes all for novel
    assert [(task.name, task.state) for task in distiller.tasks] == [(outcome.task, "accepted")]


@requirement("R18.1", "R18.3")
def test_a_new_skill_makes_what_was_known_no_stranger_and_its_topic_is_not_learned():
    engine = Stub()
    distiller = watching(engine, observed=laws(5))
    for subject in ("law", "pasta"):
        engine.router.register_virtual_candidate(subject, [subject, f"{subject} number"])
    texts = [f"python {'xyz'[i % 3]}" for i in range(9)] + laws(9)
    # With a second skill, margins are small.
    assert {distiller.observe(text).kind for text in texts} <= {"known", "unsure"}
    assert "known by now: 0 of 5" in distiller.work().figures["reason"]
    engine.router.unregister("law")
    assert {distiller.observe(text).kind for text in laws(9)} == {"novel"}


@requirement("R18.3")
def test_a_task_is_worked_on_once_at_a_time_and_whatever_goes_wrong_leaves_it_open():
    source = combined("efgh")
    _, distiller = learning(source)
    refused = []

    def attempt():
        with pytest.raises(StateError, match="an open task"):
            distiller.work()
        refused.append(distiller.tasks[0].state)

    def look(step, *_):
        worker = threading.Thread(target=attempt)
        worker.start()
        worker.join()
        distiller.observe(source.queries[10 + step])  # serving goes on meanwhile
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distiller.work(progress=look)
    assert refused == ["working"]
    (task,) = distiller.tasks
    assert (task.state, task.trials, task.seen) == ("open", 1, 5)


@requirement("R18.2")
def test_queries_from_many_threads_are_all_seen():
    distiller, texts = watching(), laws(200)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(distiller.observe, texts))
    (task,) = distiller.tasks
    assert set(task.queries) == set(texts)


@requirement("R18.3")
def test_a_folder_of_documents_is_read_as_pairs_and_texts(tmp_path):
    with pytest.raises(DataError, match="Python files with docstrings"):
        Source.read(tmp_path)
    with pytest.raises(CardNotFoundError, match="a folder of documents"):
        Source.read(tmp_path / "none")
    (tmp_path / "sub").mkdir()
    guide = "# Title\n\nA card is a value. It never changes.\n\nShort.\n"
    (tmp_path / "guide.md").write_text(guide)
    (tmp_path / "sub" / "note.txt").write_bytes(b"Bytes that are \xff not text. Read anyway.")
    (tmp_path / "tool.py").write_text('def run():\n    """Run the whole tool once."""\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    source = Source.read(tmp_path)
    assert sorted(source.texts) == ["guide.md", "sub/note.txt"]
    rows = {row["query"]: (row["positive"], row["group"]) for row in source.pairs.table.to_pylist()}
    assert rows == {
        "A card is a value.": ("It never changes.", "guide.md"),
        "Run the whole tool once.": ("tool.run", "tool"),
        "Bytes that are \ufffd not text.": ("Read anyway.", "sub/note.txt"),
    }


@requirement("R18.1")
def test_a_distiller_needs_a_guard_that_can_judge_and_calibrate():
    for guard in (GUARD.take(range(9)), []):
        with pytest.raises(DataError, match="guard: expected at least 10 pairs"):
            SkillDistiller(Stub(), guard)
    with pytest.raises(ArgumentError, match="source groups"):
        SkillDistiller(Stub(), GUARD.take(range(12)))
    empty = Stub()
    empty.router.unregister("python")
    with pytest.raises(StateError, match="at least one known skill"):
        SkillDistiller(empty, GUARD)


@requirement("R18.2")
def test_a_policy_checks_its_numbers_and_an_unknown_task_is_named():
    wrong = {"topic_size": 0, "link": 2.0, "quality": float("nan"), "pending": 1.5, "share": -1}
    for name, value in wrong.items():
        with pytest.raises(ArgumentError, match=f"policy: {name}"):
            Policy(**{name: value})
    with pytest.raises(StateError, match="'none'"):
        watching().gather("none")
    with pytest.raises(StateError, match="an open task 'none'"):
        watching().work("none")
