"""The commands of evolution: a factory's jobs, and what an engine would learn of documents."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import lora
from lora.card import LoRACard
from lora.cli import app
from lora.errors import StateError
from lora.evolution.cloud import Ledger
from lora.evolution.data import Pairs
from lora.testing.plugin import requirement
from tests.unit.hostile import made
from tests.unit.test_cli import shell
from tests.unit.test_cli_federation import ran
from tests.unit.test_cloud import server  # noqa: F401 - a fixture


def craft(folder, days):
    """A folder of documents about a craft: so many paragraphs in each of twelve files."""
    folder.mkdir()
    day = "How a potter treats the {0} on day {1}. Keep the {0} damp and slow for {1} hours."
    things = [
        "kiln",
        "glaze",
        "clay",
        "wheel",
        "bisque",
        "slip",
        "engobe",
        "stoneware",
        "porcelain",
        "raku",
    ]
    for thing in [*things, "sgraffito", "trimming"]:
        (folder / f"{thing}.md").write_text(
            "\n\n".join(day.format(thing, i) for i in range(days)), encoding="utf-8"
        )
    return folder


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with two cards, that commands run in."""
    monkeypatch.chdir(tmp_path)
    for name, version in (("a", 1), ("b", 2)):
        lora.save(made(name, size=8, rank=version), tmp_path / f"{name}.lora.arrow")
    return tmp_path


def told(*argv, code=0):
    return json.loads(ran("factory", *argv, "--json", code=code))


@requirement("R19.1", "R19.5", "R19.7", "R25.2")
def test_jobs_are_queued_run_shown_and_rolled_back(shop):
    both = ["add", "merge", "both", "--with", 'cards=["a.lora.arrow"]']
    assert told(*both, "--dry-run")["dry_run"] is True
    assert told("status") == []
    first = told(*both, "--priority", 1)
    assert first["state"] == "queued"
    assert [row["name"] for row in told("run", "--dry-run")] == ["both"]
    assert [row["state"] for row in told("run")] == ["done"]
    told("add", "merge", "both", "--with", 'cards=["b.lora.arrow"]')
    told("run")
    skills = told("status", "--skills")
    assert [(row["version"], row["live"]) for row in skills] == [(1, False), (2, True)]
    assert told("rollback", "both", "--dry-run")["version"] == 1
    assert told("rollback", "both")["version"] == 1
    assert [row["live"] for row in told("status", "--skills")] == [True, False]
    assert {"add", "claim"} <= {row["what"] for row in told("status", "--history")}
    assert "both" in ran("factory", "status")


@requirement("R19.6", "R25.3")
def test_a_dead_job_is_named_and_can_be_queued_again(shop):
    lora.save(LoRACard("c", 1, 1.0, [], {}, base_model="x"), shop / "c.lora.arrow")
    lora.save(LoRACard("d", 1, 1.0, [], {}, base_model="y"), shop / "d.lora.arrow")
    add = ["factory", "add", "merge", "bad", "--with", 'cards=["c.lora.arrow","d.lora.arrow"]']
    ran(*add)
    done = shell("factory", "run")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("lora: dead jobs: ")
    assert "Traceback" not in done.stderr
    assert json.loads(ran(*add, "--json"))["state"] == "dead"
    assert json.loads(ran(*add, "--again", "--json"))["state"] == "queued"


@requirement("R25.3", "R7.8")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["factory", "add", "bake", "x"], "bake"),
        (["factory", "add", "merge", "x", "--with", "cards"], "key=value"),
        (["factory", "add", "merge", "x", "--with", 'cards=["none"]'], "none"),
        (["factory", "rollback", "x"], "x"),
        (["factory", "run", "--at", "25:00"], "25:00"),
        (["evolve", "--documents", "nowhere"], "nowhere"),
        (["evolve", "--documents", ".", "--ask", "localhost:documents"], "--teacher-model"),
    ],
)
def test_errors_are_one_line(shop, argv, message):
    assert message in ran(*argv, code=1)


@requirement("R5.14", "R18.1", "R18.2", "R18.6", "R25.2")
def test_what_is_unknown_is_noticed_and_a_dry_run_keeps_nothing(shop):
    """Of a made-up craft, and of what the engine is taken to know: Python's own documentation."""
    folder = craft(shop / "docs", 3)
    (row,) = json.loads(
        ran("evolve", "--documents", folder, "--out", "skills", "--dry-run", "--json")
    )
    assert (row["source docs"], row["taught"]) == (36, 0)
    assert row["queries"] >= 5
    assert not (shop / "skills").exists()
    (shop / "known.txt").write_text(
        "Return a list of the files in a directory.\nOpen a file and return a stream.\n" * 10
    )
    known = ran("evolve", "--documents", folder, "--queries", "known.txt", "--dry-run", "--json")
    assert json.loads(known) == []


@requirement("R18.5", "R18.6", "R25.2")
def test_evolve_asks_a_teacher_only_as_allowed(shop, server, monkeypatch):  # noqa: F811
    teachers = []

    def watching(*_, teacher, **__):
        teachers.append(teacher)
        return SimpleNamespace(tasks=())

    monkeypatch.setattr("lora.evolving.watching", watching)
    (shop / "key").write_text("sk-x\n")
    evolve = ["evolve", "--documents", craft(shop / "docs", 1), "--out", "skills"]
    server_options = ["--teacher-model", "m", "--teacher-url", server.url, "--key-file", "key"]
    allowed = [*server_options, "--ask", "127.0.0.1:documents", "--budget", "3000"]
    for argv in (evolve, [*evolve, *allowed]):
        assert CliRunner().invoke(app, [str(word) for word in argv]).exit_code == 0
    absent, teacher = teachers
    assert absent is None
    assert len(teacher.from_documents({"cards": "A card holds factors."}).pairs) == 1
    with pytest.raises(StateError, match=r"'queries'.*nothing was sent"):
        teacher.from_queries("cards", ["secret"])
    with pytest.raises(StateError, match="at most 3000 tokens"):
        teacher.from_documents({"long": "word " * 3000})
    assert len(server.requests) == len(Ledger("skills/ledger.sqlite", 0).table()) == 1


@requirement("R17.1", "R17.2", "R21.1", "R25.2")
def test_a_task_is_a_preset_of_training_that_options_can_override(shop):
    rows = [{"query": f"number {i}", "positive": f"n{i}", "group": str(i % 4)} for i in range(16)]
    Pairs.of(rows).save(shop / "pairs.jsonl")
    options = [
        "--preset",
        "reviewer",
        "--loss",
        "triplet",
        "--schedule",
        "linear",
        "--warmup",
        "0.1",
        "--steps",
        "1",
    ]
    done = shell("train", "pairs.jsonl", "--name", "x", "-o", "x.lora.arrow", *options, "--rank", 4)
    assert done.returncode in (0, 3), done.stderr
    card = lora.load(shop / "x.lora.arrow")
    assert (card.rank, card.alpha, card.target_modules) == (4, 16.0, ("query", "value"))
    assert card.metadata["task_type"] == "reviewer"
    assert "review" in card.metadata["tags"]
