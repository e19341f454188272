"""The distiller by example: what opens a task, what it is learned from, what is kept, and what is thrown away."""

import json
import socket
import threading
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
from lora.evolution.cloud import CloudDistiller, Consent, MockTeacher
from lora.evolution.data import Pairs
from lora.evolution.distill import (
    Memory,
    Policy,
    SkillDistiller,
    Source,
    digest,
    divided,
    ranks,
    trial_seed,
)
from lora.evolution.novelty import Alarm, Detector
from lora.evolution.train import LoRATrainer, Settings, evaluate
from lora.inference.encoder import EncoderConfig, InferenceCore
from lora.inference.router import LoRARouter
from lora.routing import Calibration
from lora.testing.plugin import requirement

WORDS = ["python", "law", "pasta", "tax"]
SIZE = 6


class Words:
    """An encoder that counts words of four subjects, and the letters of all others a little."""

    def encode(self, texts):
        rows = [
            [
                *(text.count(word) for word in WORDS),
                *(0.05 * text.count(letter) for letter in "xyz"),
            ]
            for text in texts
        ]
        return np.array(rows, np.float32).reshape(len(rows), 7)


class Stub:
    """What a distiller needs of an engine, without a model that could be trained."""

    def __init__(self):
        self.base, self.registered = Words(), []
        self.router = LoRARouter(self.base.encode)
        self.router.register_virtual_candidate("python", ["python", "python x", "python z"])

    def register_lora(self, card, description=None):
        self.registered.append((card, description))


GUARD = Pairs.of(
    {"query": f"python {'xyz'[i % 3] * (i % 4)}", "positive": f"x{i}", "group": f"g{i}"}
    for i in range(40)
)
SMALL = Policy(alarm=Alarm(k=3, n=6, release=1), link=0.8, topic_size=3)


def watching(engine=None, **options):
    return SkillDistiller(engine or Stub(), GUARD, **{"policy": SMALL, **options})


@requirement("R18.1")
def test_known_queries_open_no_task_however_many():
    distiller = watching()
    kinds = {distiller.observe(f"python {'x' * (i % 4)}").kind for i in range(50)}
    assert kinds <= {"known", "unsure"}
    assert distiller.tasks == ()
    assert not distiller.alarm.ringing


@requirement("R18.1", "R18.2")
def test_many_dissonant_queries_of_one_topic_open_one_task():
    distiller = watching()
    told = [distiller.observe(f"law number {i}") for i in range(20)]
    assert {novelty.kind for novelty in told} == {"novel"}
    (task,) = distiller.tasks
    assert task.queries == tuple(f"law number {i}" for i in range(20))
    assert (task.state, task.seen) == ("open", 20)


@requirement("R18.2")
def test_the_same_query_again_and_again_is_no_topic():
    distiller = watching()
    for _ in range(20):
        distiller.observe("law")
    assert distiller.alarm.ringing
    assert distiller.tasks == ()


@requirement("R18.2")
def test_two_topics_open_two_tasks_in_whatever_order_their_queries_come():
    texts = [f"{subject} number {i}" for i in range(6) for subject in ("law", "pasta")]
    seen = []
    for order in (range(12), np.random.default_rng(0).permutation(12)):
        distiller = watching()
        for i in order:
            distiller.observe(texts[i])
        seen.append({frozenset(task.queries) for task in distiller.tasks})
    assert seen[0] == seen[1] == {frozenset(texts[::2]), frozenset(texts[1::2])}


@requirement("R18.2")
def test_a_stray_query_now_and_then_opens_no_task():
    distiller = watching()
    for i in range(40):
        distiller.observe(f"law number {i}" if i % 8 == 0 else "python x")
    assert distiller.tasks == ()


@requirement("R18.2")
def test_what_is_remembered_is_bounded():
    policy = replace(SMALL, alarm=Alarm(k=6, n=6, release=1), pending=4, logged=3)
    distiller = watching(policy=policy)
    for i in range(50):
        distiller.observe(f"law number {i}" if i % 2 else "python x")  # never rings
        distiller.log_qa(f"law {i}", "yes")
    for _ in range(9):
        distiller.observe("law number 49")  # nor does it push out others
    assert list(distiller.memory.pending) == [f"law number {i}" for i in (43, 45, 47, 49)]
    assert len(distiller.memory.logged) == 3
    distiller = watching(policy=replace(SMALL, pending=4))
    for i in range(50):
        distiller.observe(f"law number {i}")
    (task,) = distiller.tasks
    assert (len(task.queries), task.vectors.shape, task.seen) == (4, (4, 7), 50)


def remembering(steps, **options):
    """A distiller that has seen so many queries of two topics, and answers."""
    distiller = watching(**options)
    for i in range(steps):
        distiller.observe(f"{('law', 'pasta', 'python')[i % 3]} number {i}")
        distiller.log_qa(f"law {i}", "yes", quality=0.5)
    return distiller


def saved(distiller, path):
    """The bytes of a distiller's memory."""
    distiller.memory.save(path)
    return path.read_bytes()


@requirement("R18.2")
@pytest.mark.parametrize("steps", [0, 1, 5, 12])
def test_a_distiller_that_was_restarted_goes_on_where_it_was(tmp_path, steps):
    before = remembering(steps)
    saved(before, tmp_path / "memory")
    after = watching(memory=Memory.load(tmp_path / "memory"))
    assert saved(after, tmp_path / "after") == saved(before, tmp_path / "before")
    for text in [f"law case {i}" for i in range(9)] + ["pasta al forno", "tax", "python x"]:
        assert after.observe(text) == before.observe(text)
    assert saved(after, tmp_path / "after") == saved(before, tmp_path / "before")
    assert before.tasks
    assert after.gather(after.tasks[0].name).own == before.gather(before.tasks[0].name).own


@requirement("R18.2")
def test_a_task_that_was_worked_on_when_the_power_went_is_open_again(tmp_path):
    memory = remembering(12).memory
    tasks = {name: replace(task, state="working") for name, task in memory.tasks.items()}
    replace(memory, tasks=tasks).save(tmp_path / "memory")
    again = watching(memory=Memory.load(tmp_path / "memory")).tasks
    assert {task.state for task in again} == {"open"}


@requirement("R18.2")
def test_a_memory_serves_under_the_policy_of_the_distiller_that_has_it():
    distiller = watching(
        memory=remembering(9).memory, policy=replace(SMALL, alarm=Alarm(k=2, n=4, release=0))
    )
    assert (distiller.alarm.k, len(distiller.alarm.recent), distiller.alarm.ringing) == (2, 4, True)


@requirement("R18.2")
def test_what_is_no_memory_of_this_model_is_refused(tmp_path):
    with pytest.raises(CardNotFoundError, match="nowhere"):
        Memory.load(tmp_path / "nowhere")
    memory = remembering(9).memory
    memory.save(tmp_path / "memory")
    whole = json.loads((tmp_path / "memory").read_text())
    for value in ({}, [], {**whole, "alarm": {"k": 0}}, {**whole, "tasks": {"a": {}}}):
        (tmp_path / "memory").write_text(json.dumps(value))
        with pytest.raises(DataError, match="memory"):
            Memory.load(tmp_path / "memory")
    task = next(iter(memory.tasks.values()))
    for factor in (np.ones((3, 7)), -1):
        texts = {text: vector * factor for text, vector in task.texts.items()}
        strange = replace(memory, pending={}, tasks={task.name: replace(task, texts=texts)})
        with pytest.raises(ArgumentError, match="embeddings by this base model"):
            watching(memory=strange)


@requirement("R18.3")
def test_only_sources_and_answers_about_the_topic_are_gathered_and_bad_ones_dropped():
    rows = [
        {"query": f"{{}} {i}", "positive": f"{{}} answer {i}", "quality": 0.4 if i < 3 else 0.9}
        for i in range(8)
    ]
    sources = {
        subject: Source(Pairs.of({**row, "query": row["query"].format(subject)} for row in rows))
        for subject in ("law", "pasta", "python")
    }
    distiller = watching(sources=sources)
    for i in range(5):
        distiller.observe(f"law number {i}")
    distiller.log_qa("law one", "of the log")
    distiller.log_qa("law two", "bad", quality=0.1)
    distiller.log_qa("pasta", "of another topic")
    material = distiller.gather(distiller.tasks[0].name)
    assert material.figures["pairs"] == {"source law": 5, "logged": 1, "taught": 0}
    assert {query.split()[0] for query in material.own.queries} == {"law"}
    assert "of the log" in material.own.positives
    assert min(material.own.table["quality"].to_pylist()) >= 0.5


@requirement("R18.3")
@pytest.mark.parametrize(
    ("question", "answer", "quality"),
    [("", "a", 1.0), ("q", " ", 1.0), ("q", "a", 1.5), ("q", None, 1)],
)
def test_an_empty_answer_is_not_logged(question, answer, quality):
    distiller = watching()
    with pytest.raises(DataError):
        distiller.log_qa(question, answer, quality=quality)
    assert distiller.memory.logged == ()


@requirement("R18.3", "R18.5")
def test_a_teacher_is_asked_about_the_fitting_documents_or_else_about_the_topic():
    text = "law is what binds us all. pasta is something else entirely."
    sources = {"law": Source(Pairs.of([("law of x", "a"), ("law of y", "b")]), {"code": text})}
    for given, group in ((sources, "code"), ({}, None)):
        distiller = watching(sources=given, teacher=CloudDistiller(MockTeacher()))
        for i in range(5):
            distiller.observe(f"law number {i} is long enough")
        name = distiller.tasks[0].name
        assert len(distiller.gather(name).taught) == 0  # nothing is sent unless it is said
        taught = distiller.gather(name, send=True).taught
        assert len(taught) >= 1
        assert set(taught.table["group"].to_pylist()) == {group or name}


class Abroad(MockTeacher):
    """A teacher whose host is elsewhere."""

    def __init__(self):
        super().__init__("example.org")


@requirement("R18.6")
@pytest.mark.parametrize(
    "consent", [None, Consent("example.org", ["queries"]), Consent("example.com", ["documents"])]
)
def test_without_consent_the_teacher_is_left_out_and_the_reason_told(monkeypatch, consent):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a socket was opened"))
    sources = {
        "law": Source(
            Pairs.of([("law of x", "a"), ("law of y", "b")]), {"code": "law is secret here."}
        )
    }
    distiller = watching(sources=sources, teacher=CloudDistiller(Abroad(), consent=consent))
    for i in range(5):
        distiller.observe(f"law number {i}")
    material = distiller.gather(distiller.tasks[0].name, send=True)
    assert len(material.taught) == 0
    assert len(material.own) == 2
    assert "nothing was sent" in material.figures["failures"][0]


@requirement("R18.3")
def test_a_teacher_does_not_judge_its_own_lesson_where_there_is_anything_else():
    own = Pairs.of(
        {"query": f"law {i}", "positive": f"a{i}", "group": f"book {i % 8}"} for i in range(80)
    )
    poisoned = Pairs.of(
        {"query": f"bad {i}", "positive": f"b{i}", "group": f"book {i % 8}"} for i in range(80)
    )
    material = SimpleNamespace(own=own, taught=poisoned, figures={})
    training, held_out, judged_on = divided(material, 0.7, 1)
    assert judged_on == "own material"
    assert all(query.startswith("law") for query in held_out.queries)
    assert any(query.startswith("bad") for query in training.queries)
    assert not set(training.table["group"].to_pylist()) & set(held_out.table["group"].to_pylist())
    assert (
        divided(SimpleNamespace(own=Pairs.of([]), taught=poisoned), 0.7, 1)[2]
        == "own and taught material"
    )
    with pytest.raises(DataError, match="at least two groups"):
        divided(SimpleNamespace(own=Pairs.of([]), taught=Pairs.of([])), 0.7, 1)


@requirement("R18.3")
def test_every_trial_is_judged_on_another_split():
    own = Pairs.of(
        {"query": f"law {i}", "positive": f"a{i}", "group": f"book {i}"} for i in range(60)
    )
    material = SimpleNamespace(own=own, taught=Pairs.of([]))
    held_out = [divided(material, 0.7, trial_seed(0, trial))[1] for trial in (1, 2, 3)]
    assert len({digest(pairs) for pairs in held_out}) == 3
    assert held_out[0] == divided(material, 0.7, trial_seed(0, 1))[1]


def core():
    """A tiny random encoder over a vocabulary of ``a0 … h5``."""
    names = [f"{letter}{i}" for letter in "abcdefgh" for i in range(SIZE)]
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = InferenceCore(EncoderConfig(len(vocabulary), 32, 2, 2, 64, 16), tokenizer)
    return made.requires_grad_(requires_grad=False).eval()


def combined(letters, labels=None):
    """``a<i> c<j>`` asks for ``b<i> d<j>``: what is learned of some combinations holds for the others."""
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
    told = engine.encode_with_lora([query], intent_query=query)
    assert not np.array_equal(told.embeddings, engine.encode([query]))
    assert np.array_equal(
        told.embeddings, engine.encode_with_lora([query], outcome.card).embeddings
    )


@requirement("R18.4")
def test_an_accepted_card_tells_where_it_comes_from():
    _, _, outcome = accepted()
    told = outcome.card.metadata["provenance"]
    assert told == json.loads(json.dumps(dict(outcome.figures)))
    assert told["gain"] == vars(outcome.verdict.gain)
    assert told["guard"]["queries"] == SIZE * SIZE
    assert (told["trial"], told["seed"]) == (1, trial_seed(0, 1))
    assert told["sha256"]["guards"] == [digest(combined("efgh"))]
    digests = [told["sha256"]["training"], told["sha256"]["held_out"], *told["sha256"]["guards"]]
    assert {len(value) for value in digests} == {64}
    assert len(set(digests)) == 3
    assert set(told["versions"]) == {"lora", "numpy", "pyarrow", "python", "torch"}
    assert told["sizes"]["training"] + told["sizes"]["held_out"] == SIZE * SIZE
    assert set(outcome.card.metadata["examples"]) <= set(combined("efgh").queries)


@requirement("R18.3")
def test_no_pair_that_judges_is_trained_on(monkeypatch):
    trained = []

    def train(_, pairs, **__):
        trained.append(pairs)
        raise DataError("training", "nothing", "nothing")

    monkeypatch.setattr(LoRATrainer, "train", train)
    _, distiller = learning(combined("efgh"))
    figures = distiller.work().figures
    (pairs,) = trained
    assert digest(pairs) == figures["sha256"]["training"]
    material = distiller.gather(distiller.tasks[0].name)
    assert not set(divided(material, 0.6, figures["seed"])[1].queries) & set(pairs.queries)


@requirement("R18.4")
def test_an_accepted_card_can_be_saved_loaded_and_measured_again(tmp_path):
    engine, distiller = learning(
        combined("efgh"), guard=combined("efgh"), store=tmp_path / "skills"
    )
    material = distiller.gather(distiller.tasks[0].name)
    outcome = distiller.work()
    (path,) = (tmp_path / "skills").iterdir()
    card = lora.load(path)
    assert card == outcome.card
    held_out = divided(material, 0.6, outcome.figures["seed"])[1]
    assert digest(held_out) == outcome.figures["sha256"]["held_out"]
    tuned = lora.adapt(engine.base, card)
    assert ranks(tuned, held_out).mean() == pytest.approx(outcome.verdict.gain.after, rel=1e-12)
    assert ranks(engine.base, held_out).mean() == pytest.approx(
        outcome.verdict.gain.before, rel=1e-12
    )
    assert evaluate(tuned, held_out).mrr == pytest.approx(outcome.verdict.gain.after, rel=1e-6)


@requirement("R18.3")
def test_what_can_not_be_learned_is_discarded_with_its_figures():
    engine, distiller = learning(combined("efgh", labels=3), guard=combined("efgh"))
    outcome = distiller.work()
    assert not outcome.accepted
    assert outcome.card is None
    assert outcome.figures["helps"] is False
    assert outcome.figures["gain"]["lower"] <= 0
    assert distiller.tasks[0].state == "discarded"
    assert engine.manager.list_cards() == {}
    assert set(engine.router.candidates) == {"letters"}


@requirement("R18.3")
@pytest.mark.parametrize("order", [1, -1])
def test_a_skill_that_helps_but_harms_what_was_known_is_discarded(order):
    """The lesson contradicts what the model was taught first."""
    lesson = combined("efgh").table.to_pylist()
    contrary = Pairs.of(
        {**row, "positive": lesson[(i + SIZE) % len(lesson)]["positive"]}
        for i, row in enumerate(lesson)
    )
    taught = lora.fold(lora.adapt(core(), accepted()[2].card))
    texts = combined("abcd").queries
    unharmed = Pairs.of({"query": text, "positive": text, "group": text} for text in texts)
    guards = [combined("efgh"), unharmed][::order]
    engine, distiller = learning(contrary, guard=guards, model=taught)
    outcome = distiller.work()
    assert not outcome.accepted
    assert outcome.figures["helps"] is True
    assert outcome.figures["harmless"] is False
    assert -outcome.figures["guard"]["lower"] > 0.01
    assert engine.manager.list_cards() == {}
    assert len(distiller.guards) == 2


@requirement("R18.3")
@pytest.mark.parametrize("rows", [0, 1, 5, 15])
def test_too_little_material_is_discarded_with_the_reason(rows):
    _, distiller = learning(
        combined("efgh"), sources={"book": Source(combined("efgh").take(range(rows)))}
    )
    outcome = distiller.work()
    assert outcome.verdict is None
    assert "at least" in outcome.figures["reason"]
    assert distiller.tasks[0].state == "discarded"


@requirement("R18.2", "R18.3")
def test_a_discarded_topic_is_tried_again_when_it_is_asked_for_more_and_on_another_split():
    source = combined("efgh", labels=3)
    _, distiller = learning(source, guard=combined("efgh"), max_steps=2)
    first = distiller.work()
    with pytest.raises(StateError, match="an open task"):
        distiller.work()
    for query in source.queries[4:6]:
        distiller.observe(query)
    assert distiller.tasks[0].state == "discarded"
    distiller.observe(source.queries[6])
    assert [task.state for task in distiller.tasks] == ["open"]
    second = distiller.work(first.task)
    assert (first.figures["trial"], second.figures["trial"]) == (1, 2)
    assert first.figures["seed"] != second.figures["seed"]
    assert first.figures["sha256"]["held_out"] != second.figures["sha256"]["held_out"]


@requirement("R18.1", "R18.3")
def test_what_an_accepted_skill_was_judged_on_is_guarded_from_then_on_and_is_not_among_its_examples():
    _, distiller, outcome = accepted()
    first, second = distiller.guards
    assert first == combined("efgh")
    assert digest(second) == outcome.figures["sha256"]["held_out"]
    assert set(second.queries) & set(combined("efgh").queries[:12])  # of those that opened the task
    assert not set(second.queries) & set(outcome.card.metadata["examples"])
    after = SkillDistiller(
        distiller.engine, distiller.guards, detector=EVERYTHING, memory=distiller.memory
    )
    assert after.guards == distiller.guards
    assert [task.state for task in after.tasks] == ["accepted"]
    with pytest.raises(DataError, match="guard: expected at least"):
        SkillDistiller(distiller.engine, [])


@requirement("R18.1")
def test_a_new_skill_makes_what_was_known_no_stranger():
    engine = Stub()
    distiller = watching(engine)
    python, law = (
        [f"python {'xyz'[i % 3]}" for i in range(9)],
        [f"law number {i}" for i in range(9)],
    )
    for subject in ("law", "pasta"):
        engine.router.register_virtual_candidate(subject, [subject, f"{subject} number"])
    assert {distiller.observe(text).kind for text in python} <= {
        "known",
        "unsure",
    }  # with a second skill, margins are small
    assert {distiller.observe(text).kind for text in law} <= {"known", "unsure"}
    engine.router.unregister("law")
    assert {distiller.observe(text).kind for text in law} == {"novel"}


@requirement("R18.3")
def test_a_task_whose_topic_is_known_by_now_is_not_learned():
    engine = Stub()
    distiller = watching(engine)
    for i in range(5):
        distiller.observe(f"law number {i}")
    engine.router.register_virtual_candidate("law", ["law", "law number"])
    outcome = distiller.work()
    assert not outcome.accepted
    assert "known by now: 0 of 5" in outcome.figures["reason"]


@requirement("R18.2")
def test_an_accepted_topic_opens_no_second_task():
    _, distiller, outcome = accepted()
    for query in combined("efgh").queries:
        distiller.observe(query)  # by a detector that takes all for novel
    assert [(task.name, task.state) for task in distiller.tasks] == [(outcome.task, "accepted")]


@requirement("R18.3")
def test_a_task_is_worked_on_once_at_a_time_and_whatever_goes_wrong_leaves_it_open():
    source = combined("efgh")
    _, distiller = learning(source)
    refused = []

    def look(step, *_):
        worker = threading.Thread(target=lambda: refused.append(attempt(distiller)))
        worker.start()
        worker.join()
        distiller.observe(source.queries[10 + step])  # serving goes on meanwhile
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distiller.work(progress=look)
    assert refused == ["working"]
    (task,) = distiller.tasks
    assert (task.state, task.trials, task.seen) == ("open", 1, 5)


def attempt(distiller):
    with pytest.raises(StateError, match="an open task"):
        distiller.work()
    return distiller.tasks[0].state


@requirement("R18.2")
def test_queries_from_many_threads_are_all_seen():
    distiller = watching()
    texts = [f"law number {i}" for i in range(200)]
    threads = [
        threading.Thread(
            target=lambda part: [distiller.observe(t) for t in part], args=(texts[i::4],)
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (task,) = distiller.tasks
    assert set(task.queries) == set(texts)


@requirement("R18.3")
def test_a_folder_of_documents_is_read_as_pairs_and_texts(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "guide.md").write_text(
        "# Title\n\nA card is a value. It never changes.\n\nShort.\n"
    )
    (tmp_path / "sub" / "note.txt").write_bytes(
        b"Bytes that are \xff not text. They are read anyway."
    )
    (tmp_path / "tool.py").write_text('def run():\n    """Run the whole tool once."""\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    source = Source.read(tmp_path)
    assert sorted(source.texts) == ["guide.md", "sub/note.txt"]
    rows = {row["query"]: (row["positive"], row["group"]) for row in source.pairs.table.to_pylist()}
    assert rows["A card is a value."] == ("It never changes.", "guide.md")
    assert rows["Run the whole tool once."] == ("tool.run", "tool")
    assert rows["Bytes that are \ufffd not text."][1] == "sub/note.txt"
    assert len(rows) == 3


@requirement("R18.3")
def test_a_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(DataError, match="Python files with docstrings"):
        Source.read(tmp_path)
    with pytest.raises(CardNotFoundError, match="a folder of documents"):
        Source.read(tmp_path / "none")


@requirement("R18.1")
def test_a_distiller_needs_a_guard_that_can_judge_and_calibrate():
    with pytest.raises(DataError, match="at least 10 pairs"):
        SkillDistiller(Stub(), GUARD.take(range(9)))
    with pytest.raises(ArgumentError, match="source groups"):
        SkillDistiller(Stub(), GUARD.take(range(12)))
    empty = Stub()
    empty.router.unregister("python")
    with pytest.raises(StateError, match="at least one known skill"):
        SkillDistiller(empty, GUARD)


@requirement("R18.2")
@pytest.mark.parametrize(
    "options",
    [{"topic_size": 0}, {"link": 2.0}, {"quality": float("nan")}, {"pending": 1.5}, {"share": -1}],
)
def test_a_policy_checks_its_numbers(options):
    with pytest.raises(ArgumentError, match="policy"):
        Policy(**options)


@requirement("R18.2")
def test_an_unknown_task_is_named():
    with pytest.raises(StateError, match="'none'"):
        watching().gather("none")
    with pytest.raises(StateError, match="an open task 'none'"):
        watching().work("none")
    assert Memory(Alarm()).tasks == {}
