"""The engine that evolves: what it is asked is observed, what is answered is remembered."""

import numpy as np
import pytest

from lora.errors import StateError
from lora.testing.plugin import requirement
from tests.unit.letters import combined, engine


@requirement("R5.14")
def test_an_engine_that_evolves_observes_what_it_is_asked_and_remembers_what_is_answered():
    one = engine()
    with pytest.raises(StateError, match="enable_evolution"):
        one.log_qa("a", "b")
    distiller = one.enable_evolution()
    assert one.evolution is distiller
    one.log_qa("how hot is a kiln", "about 1200 degrees", quality=0.9)
    (row,) = distiller.logged
    assert (row["query"], row["quality"]) == ("how hot is a kiln", 0.9)
    queries = combined("efgh").queries[:12]
    for query in queries:
        one.encode_with_lora([query], {})
    assert distiller.tasks == ()
    for query in queries:  # without a card, the base answers
        answer = one.encode_with_lora([query], intent_query=query)
        assert (answer.routes, answer.decision) == ((), None)
        assert np.array_equal(answer.embeddings, one.encode([query]))
    assert set(distiller.tasks[0].queries) <= set(queries)
    with pytest.raises(StateError):
        one.evolution.work("nothing")
