"""An engine that knows Python's library meets networkx: it notices, learns, and serves."""

from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

import lora
from lora.engine import ArrowEngine
from lora.evolution.acceptance import MAX_LOSS
from lora.evolution.distill import Policy
from lora.learning import EXAMPLES, watching
from lora.testing.plugin import requirement
from lora.training.data import docstring_pairs
from lora.training.train import LoRATrainer, Settings, evaluate

ASKED = 40
pytestmark = pytest.mark.slow
SETTINGS = Settings(epochs=9, batch_size=32, lr=2e-3, validation_size=32)
LEARNING = {"settings": SETTINGS, "max_steps": 12}


@pytest.fixture(scope="module")
def story():
    """An engine, its distiller, queries of networkx, tasks before and after, the outcome."""
    engine, rng = ArrowEngine.from_pretrained(device="cpu"), np.random.default_rng(0)
    known, _ = docstring_pairs().split(0.5, seed=0)  # as `watching`: the other half is the guard
    sentences = rng.permutation(known.queries).tolist()
    others = sentences[EXAMPLES : EXAMPLES + ASKED]
    trainer = LoRATrainer(engine, seed=0, settings=SETTINGS)
    examples = {"examples": sentences[:EXAMPLES]}
    skill = trainer.train(known, name="python", metadata=examples, max_steps=12).card
    options = {"cards": [skill], "queries": others, "policy": Policy(examples=64), **LEARNING}
    distiller = watching(engine, Path(nx.__file__).parent, **options)
    of_python = distiller.tasks
    before = engine.encode_with_lora(others, adapters="python").embeddings
    queries = rng.permutation(distiller.sources["networkx"].pairs.queries).tolist()
    for query in queries[:ASKED]:
        engine.encode_with_lora([query], intent_query=query)
    of_networkx = distiller.tasks
    outcome = distiller.work()
    after = engine.encode_with_lora(others, adapters="python").embeddings
    return engine, distiller, queries, of_python, of_networkx, outcome, (before, after)


@requirement("R18.1", "R18.2", "R5.14")
def test_what_it_knows_opens_no_task_and_what_it_does_not_know_opens_one(story):
    _, _, queries, of_python, of_networkx, _, _ = story
    assert of_python == ()
    assert len(of_networkx) >= 1
    assert all(set(task.queries) <= set(queries[:ASKED]) for task in of_networkx)


@requirement("R18.3", "R18.4")
def test_what_it_learned_helps_on_held_out_queries_and_harms_nothing_that_it_knew(story):
    engine, distiller, _, _, _, outcome, _ = story
    assert outcome.accepted
    assert outcome.verdict.gain.mean > 0.05
    assert outcome.verdict.guard.lower >= -MAX_LOSS
    _, held_out = distiller.guards
    learned = lora.adapt(engine.base, outcome.card)
    before, after = evaluate(engine.base, held_out), evaluate(learned, held_out)
    assert after.mrr > before.mrr + 0.05
    assert after.recall_at_1 > before.recall_at_1


@requirement("R18.4", "R17.1")
def test_the_skill_that_was_there_before_helps_on_what_it_is_for(story):
    engine, distiller, *_, (before, after) = story
    assert np.array_equal(before, after)
    old = distiller.guards[0]
    skill = engine.manager.list_cards()["python"]
    base, skilled = evaluate(engine.base, old), evaluate(lora.adapt(engine.base, skill), old)
    assert skilled.mrr > base.mrr + 0.02


@requirement("R18.4", "R5.1")
def test_from_then_on_queries_go_to_the_skill_that_they_are_for(story):
    engine, distiller, queries, _, _, outcome, _ = story
    examples = set(outcome.card.metadata["examples"])
    new = [query for query in queries if query not in examples][:ASKED]
    old = distiller.guards[0].queries[:ASKED]

    def chosen(texts):
        routes = [engine.encode_with_lora([text], intent_query=text).routes for text in texts]
        return Counter(route[0].name if route else None for route in routes)

    of_new, of_old = chosen(new), chosen(old)
    assert of_new[outcome.card.name] > of_new["python"]
    assert of_old[outcome.card.name] < of_old["python"]
    asked = engine.encode_with_lora(
        [outcome.task], intent_query=outcome.card.metadata["examples"][0]
    )
    assert list(asked.adapters[0]) == [outcome.card.name]
