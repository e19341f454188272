"""The commands of evolution: a factory's jobs, and what an engine would learn of documents."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import lora
from lora.card import LoRACard
from lora.cli.app import app
from lora.errors import StateError
from lora.evolution.distill import Outcome
from lora.evolution.queue import JobQueue
from lora.evolution.teacher import Ledger
from lora.testing.plugin import requirement
from lora.training.data import Pairs
from tests.unit.hostile import made
from tests.unit.test_cli import shell
from tests.unit.test_cli_federation import ran
from tests.unit.test_teacher import server  # noqa: F401 - a fixture


def craft(folder, days):
    """A folder of documents about a craft: so many paragraphs in each of twelve files."""
    folder.mkdir()
    day = "How a potter treats the {0} on day {1}. Keep the {0} damp and slow for {1} hours."
    things = "kiln glaze clay wheel bisque slip engobe stoneware porcelain raku sgraffito trimming"
    for thing in things.split():
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
    (tmp_path / "key").write_text("sk-x\n")
    return tmp_path


def told(name, *argv):
    return json.loads(ran("factory", name, "--json", *argv))


@requirement("R19.1", "R19.5", "R19.6", "R19.7", "R25.2")
def test_jobs_are_queued_run_shown_and_rolled_back(shop):
    add = ["add", "--priority", 1, "--seconds", 60, "--memory", 2**31, "--max-failures", 1]
    first = told(*add, "--", "merge", "a.lora.arrow", "--name", "both")
    assert (first["kind"], first["name"], first["state"]) == ("merge", "both", "queued")
    queue = JobQueue(shop / "factory" / "queue.sqlite")
    (job,) = queue.jobs()
    assert (job.priority, job.seconds, job.memory, job.max_failures) == (1, 60.0, 2**31, 1)
    assert [row["state"] for row in told("run", "--keep", 1)] == ["done"]
    told("add", "merge", "b.lora.arrow", "--name", "both")
    told("run")
    skills = told("status", "--skills")
    versions = [(row["version"], row["live"]) for row in skills]
    assert versions == [("0.1.0", False), ("0.2.0", True)]
    assert told("rollback", "both")["version"] == "0.1.0"
    assert [row["live"] for row in told("status", "--skills")] == [True, False]
    assert told("rollback", "both", "--version", "0.2.0")["version"] == "0.2.0"
    told("add", "merge", "a.lora.arrow", "b.lora.arrow", "--name", "both")
    told("run", "--keep", 1)
    kept = [row["version"] for row in told("status", "--skills")]
    assert kept == ["0.2.0", "0.3.0"]  # the last one, and what was live before it
    assert {"add", "claim"} <= {row["what"] for row in told("status", "--history")}
    assert "both" in ran("factory", "status")


@requirement("R19.6", "R25.3")
def test_a_dead_job_is_named_and_can_be_queued_again(shop):
    lora.save(LoRACard("c", 1, 1.0, [], {}, base_model="x"), shop / "c.lora.arrow")
    lora.save(LoRACard("d", 1, 1.0, [], {}, base_model="y"), shop / "d.lora.arrow")
    bad = ["--", "merge", "c.lora.arrow", "d.lora.arrow", "--name", "bad"]
    ran("factory", "add", *bad)
    done = shell("factory", "run")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("lora: dead jobs: ")
    assert "Traceback" not in done.stderr
    assert told("add", *bad)["state"] == "dead"
    assert told("add", "--again", *bad)["state"] == "queued"


KEYED = "--teacher-model m --key-file key"


@requirement("R25.3", "R7.8")
@pytest.mark.parametrize(
    ("line", "message"),
    {
        "factory add bake x": "bake",
        "factory add merge a.lora.arrow --ranks 1": "No such option: --ranks",
        "factory add merge nowhere.lora.arrow": "nowhere.lora.arrow",
        "factory rollback x": "x",
        "factory run --at 25:00": "25:00",
        "evolve --documents nowhere": "nowhere",
        "evolve --documents . --ask localhost:documents": "--teacher-model",
        f"evolve --documents . --ask x {KEYED}": "--ask: expected HOST:documents or HOST:queries",
        f"evolve --documents . --ask x:keys {KEYED}": "found x:keys",
        f"evolve --documents . --ask x:queries {KEYED} --teacher-url http://x/": "--insecure-http",
        "factory add train a.lora.arrow --name x --preset fast": "--preset: expected one of quick",
        "factory add train nowhere.jsonl --name x": "nowhere.jsonl",
        "factory add merge a.lora.arrow --help": "No such option: --help",
        "factory add --seconds inf merge a.lora.arrow": "seconds",
    }.items(),
)
def test_errors_are_one_line(shop, here, line, message):
    code, out, err = here(*line.split())
    assert (code, out, err.count("lora: "), message in err) == (1, "", 1, True)


@requirement("R5.14", "R18.1", "R18.2", "R18.6", "R25.2")
@pytest.mark.slow
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

    monkeypatch.setattr("lora.learning.watching", watching)
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


@requirement("R18.3", "R18.5", "R18.6", "R25.2")
@pytest.mark.slow
def test_evolve_sends_a_teacher_what_is_allowed_and_nothing_else(shop, here, server):  # noqa: F811
    """The whole command, over one training step: what reaches the server, and what is told."""
    documents = craft(shop / "docs", 3)
    evolve = ["evolve", "--documents", documents, "--steps", 1, "--json", "--out", "taught"]
    asked = ["--teacher-model", "m", "--key-file", "key", "--teacher-url", server.url]
    allowed = ["--ask", "127.0.0.1:documents", "--max-tokens", 99]
    code, out, err = here(*evolve, *asked, *allowed)
    assert (code, err.count("lora: ")) == (0, 0)
    figures = json.loads(out)[0]["figures"]
    assert figures["pairs"]["taught"] >= 1
    materials = [json.loads(body["messages"][1]["content"]) for body in server.bodies]
    assert {material["kind"] for material in materials} == {"documents"}
    assert {material["title"] for material in materials} <= {p.name for p in documents.iterdir()}
    assert {body["max_tokens"] for body in server.bodies} == {99}
    ledger = Ledger(shop / "taught" / "ledger.sqlite", 0).table()
    assert [json.loads(body) for body in ledger["body"].to_pylist()] == server.bodies


@requirement("R17.1", "R17.2", "R21.1", "R25.2")
def test_a_task_is_a_preset_of_training_that_options_can_override(shop, here):
    rows = [{"query": f"number {i}", "positive": f"n{i}", "group": str(i % 4)} for i in range(16)]
    Pairs.of(rows).save(shop / "pairs.jsonl")
    options = "--preset reviewer --loss triplet --schedule linear --warmup 0.1 --steps 1".split()
    line = "train pairs.jsonl --name x -o x.lora.arrow --rank 4"
    assert here(*line.split(), *options)[0] in (0, 3)
    card = lora.load(shop / "x.lora.arrow")
    assert (card.rank, card.alpha, card.target_modules) == (4, 16.0, ("query", "value"))
    assert card.metadata["task_type"] == "reviewer"
    assert "review" in card.metadata["tags"]


def outcome(accepted):
    card = made("skill-1", size=8) if accepted else None
    figures = {"trial": 0} if accepted else {"reason": "too little to judge on"}
    return Outcome("skill-1", card, None, figures)


@requirement("R18.3", "R18.4", "R19.1", "R25.2")
@pytest.mark.parametrize("judged", [[False, True, True], [False], []], ids=str)
def test_distil_writes_the_first_card_that_helped_or_exits_3_with_the_reason(
    shop, here, monkeypatch, judged
):
    seen = {}

    def watching(engine, documents, **options):
        seen.update(documents=str(documents), **options)

    outcomes = iter(map(outcome, judged))
    monkeypatch.setattr("lora.learning.watching", watching)
    monkeypatch.setattr("lora.learning.outcomes", lambda *_, **__: outcomes)
    (shop / "asked.txt").write_text("what is a kiln\n\nhow hot\n")
    options = ["--steps", 1, "--rank", 2, "--seed", 1, "--queries", "asked.txt"]
    code, out, _ = here("distil", "docs", "--name", "craft", *options, "-o", "c.arrow", "--json")
    facts = json.loads(out)
    assert seen == {
        "documents": "docs",
        "queries": ["what is a kiln", "how hot"],
        "max_steps": 1,
        "rank": 2,
        "alpha": 16.0,
        "seed": 1,
    }
    if any(judged):
        assert (code, [task["accepted"] for task in facts["tasks"]]) == (0, [False, True])
        assert lora.load(shop / "c.arrow", verify=facts["digest"]).name == "craft"
        assert len([*outcomes]) == 1  # the rest is not worked on
    else:
        reason = "discarded: skill-1: too little to judge on" if judged else "nothing is unknown"
        assert (code, facts["reason"]) == (3, reason)
        assert not (shop / "c.arrow").exists()


@requirement("R18.3", "R18.4", "R19.1")
@pytest.mark.slow
def test_distil_learns_a_folder_or_tells_that_it_is_no_help(shop, here):
    """One step on a made-up craft: whatever the gate says, the command says the same."""
    craft(shop / "docs", 5)
    options = ["--steps", 1, "--rank", 2, "-o", "c.lora.arrow", "--json"]
    code, out, _ = here("distil", "docs", "--name", "craft", *options)
    tasks = json.loads(out)["tasks"]
    assert tasks
    assert (
        (code == 0) == any(task["accepted"] for task in tasks) == (shop / "c.lora.arrow").exists()
    )
