"""The engine that evolves: what it is asked is observed, what is answered is remembered."""

import pytest

from lora.engine import ArrowEngine
from lora.errors import StateError
from lora.testing.plugin import requirement
from lora.training.data import docstring_pairs


@requirement("R5.14")
def test_an_engine_that_evolves_observes_what_it_is_asked_and_remembers_what_is_answered():
    engine = ArrowEngine.from_pretrained()
    with pytest.raises(StateError, match="enable_evolution"):
        engine.log_qa("a", "b")
    known, guard = docstring_pairs().split(0.5, seed=0)
    engine.router.register_virtual_candidate("python", known.queries[:200])
    distiller = engine.enable_evolution(guard)
    assert engine.evolution is distiller
    engine.log_qa("how hot is a kiln", "about 1200 degrees", quality=0.9)
    assert [row["query"] for row in distiller.memory.logged] == ["how hot is a kiln"]
    engine.router.unregister("python")
    engine.router.register_virtual_candidate("python", known.queries[:200])
    before = distiller.memory
    engine.encode_with_lora(["kilns"], {})
    assert distiller.memory is before
    with pytest.raises(StateError):
        engine.evolution.work("nothing")
