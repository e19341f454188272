"""The commands of evolution: a factory's jobs, and what an engine would learn of documents."""

import json

import pytest

import lora
from lora.card import LoRACard
from lora.evolution.factory import SkillFactory
from lora.evolution.queue import Job, JobQueue
from lora.evolution.teacher import Ledger
from lora.testing.plugin import requirement
from lora.training import train as training
from lora.training.data import Pairs
from tests.unit.hostile import made
from tests.unit.letters import engine
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
    limits = ["--seconds", 5, "--priority", 2, "--max-failures", 1, "--memory", 1 << 30]
    assert told("add", "--again", *limits, *bad)["state"] == "queued"
    (again,) = SkillFactory("factory").queue.jobs()
    assert (again.seconds, again.priority) == (5.0, 2)
    assert (again.max_failures, again.memory) == (1, 1 << 30)


@requirement("R19.7")
def test_a_terminal_shows_why_a_job_was_rejected_with_its_figures(shop):
    queue = SkillFactory("factory").queue
    queue.add(Job.of(["merge"], "both"), 0.0)
    queue.reject(queue.claim(1.0), 2.0, "no better", '{"mrr": 0.5}')
    wide = {"COLUMNS": "300"}
    assert "no better" in ran("factory", "status", env=wide)
    assert '{"mrr": 0.5}' in ran("factory", "status", "--history", env=wide)


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
        "evolve nowhere": "nowhere",
        "evolve . --rank 0": "rank",
        "evolve . --cards nowhere": "nowhere: expected a folder of live cards",
        "evolve . --max-taken 2": "max_taken: expected a number in [0, 1]",
        "evolve . --ask localhost:documents": "--teacher-model",
        f"evolve . --ask x {KEYED}": "--ask: expected HOST:documents or HOST:queries",
        f"evolve . --ask x:keys {KEYED}": "found x:keys",
        f"evolve . --ask x:queries {KEYED} --teacher-url http://x/": "--insecure-http",
        "factory add train a.lora.arrow --name x --preset fast": "--preset: expected one of quick",
        "factory add train nowhere.jsonl --name x": "nowhere.jsonl",
        "factory add merge a.lora.arrow --help": "No such option: --help",
        "factory add --seconds inf merge a.lora.arrow": "seconds",
    }.items(),
)
def test_errors_are_one_line(shop, here, line, message):
    code, out, err = here(*line.split())
    status = 1 if "nowhere" in line or line.endswith("back x") else 2
    assert (code, out, err.count("lora: "), message in err) == (status, "", 1, True)


@requirement("R18.3", "R18.6", "R25.2")
def test_a_dry_run_says_what_there_is_and_keeps_and_sends_nothing(shop, here, monkeypatch):
    monkeypatch.setattr("lora.cli.evolution._teacher", lambda *_, **__: pytest.fail("a teacher"))
    folder = craft(shop / "docs", 3)
    ask = ["--ask", "127.0.0.1:documents", "--teacher-model", "m", "--key-file", "key"]
    ask += ["--teacher-url", "http://127.0.0.1:1"]
    code, out, _ = here("evolve", folder, "--out", "skills", "--dry-run", "--json", *ask)
    row = json.loads(out)
    assert (code, row["rows"], row["groups"]) == (0, 36, 12)
    assert row["training"] + row["held_out"] == 36
    assert not (shop / "skills").exists()


@requirement("R18.3", "R18.5", "R18.6", "R25.2")
def test_evolve_sends_a_teacher_what_is_allowed_and_nothing_else(
    shop,
    here,
    server,  # noqa: F811
    monkeypatch,
):
    """The whole command: what reaches the server, what it may cost, and what is told."""
    monkeypatch.setattr("lora.ArrowEngine.from_pretrained", lambda _: engine())
    documents = craft(shop / "docs", 3)
    (shop / "asked.jsonl").write_text('{"query": "what is a secret kiln"}')
    evolve = ["evolve", documents, "--json", "--out", "taught", "--questions", "asked.jsonl"]
    assert here(*evolve)[0] == 3
    assert server.requests == []
    asked = ["--teacher-model", "m", "--key-file", "key", "--teacher-url", server.url]
    allowed = ["--ask", "127.0.0.1:documents", "--max-tokens", 99]
    code, out, err = here(*evolve, *asked, *allowed)
    assert (code, err.count("lora: ")) == (3, 0)
    facts = json.loads(out)
    assert facts["figures"]["pairs"]["taught"] >= 1
    assert facts["reason"].startswith("can't tell")
    assert "secret" not in json.dumps(server.bodies)
    materials = [json.loads(body["messages"][1]["content"]) for body in server.bodies]
    assert {material["kind"] for material in materials} == {"documents"}
    assert {material["title"] for material in materials} <= {p.name for p in documents.iterdir()}
    assert {body["max_tokens"] for body in server.bodies} == {99}
    kept = shop / "taught.teacher"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert not (shop / "taught").exists()  # nothing that was sent or answered is served
    ledger = Ledger(kept / "ledger.sqlite", 0).table()
    assert [json.loads(body) for body in ledger["body"].to_pylist()] == server.bodies
    sent = len(server.bodies)
    code, out, _ = here(*evolve, *asked, "--ask", "127.0.0.1:queries", "--out", "other")
    assert "nothing was sent" in json.loads(out)["figures"]["failures"][0]
    assert len(server.bodies) == sent
    code, out, _ = here(*evolve, *asked, *allowed, "--budget", 1, "--out", "poor")
    failures = json.loads(out)["figures"]["failures"]
    assert "at most 1 tokens" in failures[0]
    assert len(server.bodies) == sent


@requirement("R17.1", "R17.2", "R21.1", "R25.2")
def test_a_task_is_a_preset_of_training_that_options_can_override(shop, here, monkeypatch):
    trainers, trainer = [], training.LoRATrainer
    monkeypatch.setattr(
        training, "LoRATrainer", lambda *a, **k: trainers.append(trainer(*a, **k)) or trainers[0]
    )
    rows = [{"query": f"number {i}", "positive": f"n{i}", "group": str(i % 4)} for i in range(16)]
    Pairs.of(rows).save(shop / "pairs.jsonl")
    options = "--preset reviewer --loss triplet --schedule linear --warmup 0.1 --steps 1".split()
    line = "train pairs.jsonl --name x -o x.lora.arrow --rank 4"
    assert here(*line.split(), *options)[0] in (0, 3)
    settings = trainers[0].settings
    assert (settings.loss, settings.schedule, settings.warmup) == ("triplet", "linear", 0.1)
    assert settings.dropout == 0.1
    card = lora.load(shop / "x.lora.arrow")
    assert (card.rank, card.alpha, card.target_modules) == (4, 16.0, ("query", "value"))
    assert card.metadata["task_type"] == "reviewer"
    assert "review" in card.metadata["tags"]
