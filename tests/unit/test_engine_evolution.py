"""The engine that evolves: what it is asked is observed, what is answered is remembered."""

import pytest

from lora.engine import ArrowEngine
from lora.errors import StateError
from lora.evolution.data import docstring_pairs
from lora.testing.plugin import requirement


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
<<<<<<< HEAD


@pytest.mark.slow
@requirement("R19.1", "R18.3", "R18.4")
def test_a_folder_is_learned_by_a_job_or_told_to_be_no_help(tmp_path, monkeypatch):
    """Of a made-up craft, by one step of training: the job says the same as the gate."""
    documents = str(craft(tmp_path / "docs", 5))
    parameters = {"name": "craft", "documents": documents, "model": str(default_model())}
    parameters |= {"steps": 1, "rank": 2}
    seen = []

    def watched(*args, **options):
        seen.append(watching(*args, **options))
        return seen[-1]

    monkeypatch.setattr(evolving, "watching", watched)
    path = evolving.distil("distil", parameters, tmp_path)
    (distiller,) = seen
    assert {task.state for task in distiller.tasks} <= {"accepted", "discarded"}
    assert distiller.tasks
    assert (path is not None) == any(task.state == "accepted" for task in distiller.tasks)
    assert path is None or load(path).name == "craft"
=======
>>>>>>> 33ae307 (A job is a command line: the factory stores and runs train, extract, merge and distil as they are typed; lora distil; exit status 3)
