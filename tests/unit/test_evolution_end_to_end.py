"""The real encoder learns networkx: it beats a placebo, is served, and answers what it is for."""

from pathlib import Path

import networkx as nx
import pytest

from lora.engine import ArrowEngine
from lora.evolution.acceptance import MOST
from lora.evolution.exam import Terms
from lora.learning import evolve
from lora.testing.plugin import requirement
from lora.training.data import Pairs


@pytest.mark.slow
@requirement("R18.3", "R18.4", "R17.1")
def test_networkx_is_learned_within_forty_steps_and_routed_to(tmp_path):
    engine, cards = ArrowEngine.from_pretrained(None), tmp_path / "cards"
    terms = Terms(documents_only=True, placebos=tmp_path / "placebos")
    evolved = evolve(engine, Path(nx.__file__).parent, cards, terms=terms)
    assert evolved.facts["live"], evolved.facts["text"]
    assert evolved.facts["name"] == "networkx-graph"
    changes = evolved.lesson.verdict.changes
    assert set(changes) == {"base", "placebo names", "placebo short"}
    assert changes["placebo names"].queries == MOST
    assert changes["placebo names"].mean > 0.02
    engine.follow(cards)
    sample = Pairs.load(evolved.facts["exam"]).queries[:40]
    own = [engine.encode_with_lora([text], intent_query=text).decision for text in sample]
    assert sum(decision.kind == "routes" for decision in own) >= 28  # 80 % are meant
    for text in ("my cat sleeps all day", "boil the pasta for ten minutes"):
        decision = engine.encode_with_lora([text], intent_query=text).decision
        assert decision.kind == "unknown"
