"""From a folder of documents to a skill that is served, replaced and rolled back, by commands."""

import json
import random

import pytest

import lora
from lora.engine import ArrowEngine
from lora.testing.plugin import requirement
from tests.unit.test_cli_federation import LOCAL, Serving, ran

WORDS = 16


def write(folder, seed, shift=0):
    """Write documents in an invented language.

    Each paragraph asks with four words, and answers with the other names of three of them.
    """
    folder.mkdir()
    parts = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    names = random.Random(0).sample([a + b for a in parts for b in parts], 2 * WORDS)
    rng = random.Random(seed)
    for file in range(16):
        paragraphs = []
        for _ in range(24):
            asked = rng.sample(range(WORDS), 4)
            answer = [*((word + shift) % WORDS for word in asked[:3]), rng.randrange(WORDS)]
            sides = [names[word] for word in asked], [names[WORDS + word] for word in answer]
            paragraphs.append(" ".join(f"{' '.join(words).capitalize()}." for words in sides))
        (folder / f"part {file}.md").write_text("\n\n".join(paragraphs), encoding="utf-8")
    return " ".join(names[:4])


@requirement("R18.4", "R18.8", "R19.1", "R19.5", "R11.9", "R25.2")
@pytest.mark.slow
@pytest.mark.timeout(1800)  # three cycles of training, each in a process
def test_a_folder_becomes_a_skill_that_is_served_routed_to_replaced_and_rolled_back(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    query = write(tmp_path / "docs", 1)
    write(tmp_path / "other", 2, shift=5)
    away = {"HOME": str(tmp_path / "away"), "XDG_CACHE_HOME": ""}

    def evolved(documents, steps=8):
        options = ["--name", "zorp", "--documents-only", "--steps", steps]
        ran("factory", "add", "--", "evolve", documents, *options)
        *_, job = json.loads(ran("factory", "run", "--json"))
        return job

    def seen(server, engine):
        """The version that another machine is offered, and the one that the engine answers by."""
        (row,) = json.loads(ran("list", "--peer", server.uri, "--json", env=away))
        assert row["name"] == "zorp"
        assert row["description"]
        encoding = engine.encode_with_lora([query], intent_query=query)
        ((card, _),) = encoding.adapters[0].values()
        assert [route.name for route in engine.router.select(query)] == ["zorp"]
        return row["version"], card.metadata["version"]

    first = evolved("docs")
    assert (first["state"], first["version"], first["live"]) == ("done", "0.1.0", True)
    engine = ArrowEngine.from_pretrained()
    engine.follow("factory/live")
    with Serving("--live", "factory", *LOCAL) as server:
        assert seen(server, engine) == ("0.1.0", "0.1.0")
        assert not engine.encode_with_lora(["x"], intent_query="how do I boil pasta?").routes

        fetched = tmp_path / "fetched"
        fetched.mkdir()
        file = fetched / "zorp.lora.arrow"
        ran("fetch", "zorp", "--peer", server.uri, "--allow", "unsigned", "-o", file, env=away)
        assert lora.digest(file) == first["digest"]
        for text, kind in ((query, "routes"), ("how do I boil pasta?", "unknown")):
            (route,) = json.loads(ran("route", text, "--cards", fetched, "--json", env=away))
            assert (route["best"]["name"], route["kind"]) == ("zorp", kind)

        worse = evolved("other")
        assert worse["state"] == "rejected"
        assert "on the sample of 'zorp' the MRR falls by" in worse["error"]
        status = ran("factory", "status", env={"COLUMNS": "400"})
        assert worse["error"] in status
        figures = json.loads(ran("factory", "status", "--history", "--json"))[-1]["note"]
        assert json.loads(figures)["figures"]["guards"]["zorp"]["pairs"] == 128
        assert seen(server, engine) == ("0.1.0", "0.1.0")

        better = evolved("docs", steps=16)
        assert (better["state"], better["version"]) == ("done", "0.2.0")
        assert seen(server, engine) == ("0.2.0", "0.2.0")

        ran("factory", "rollback", "zorp")
        assert seen(server, engine) == ("0.1.0", "0.1.0")
    # The sample by which the next version will be judged is that of the version that is live.
    sample = tmp_path / "factory" / "live" / "zorp.exam.jsonl"
    assert sample.read_text().count("\n") == 128
    assert sample.samefile(tmp_path / "factory" / "cards" / f"{first['digest']}.exam.jsonl")
