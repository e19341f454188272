"""The factory with real processes: executors, limits, what is killed, nights, versions that an
engine serves.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from datetime import date, datetime
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from lora import load, save
from lora.card import LoRACard, LowRank
from lora.cli.jobs import harm, job_of
from lora.engine import ArrowEngine
from lora.errors import (
    ArgumentError,
    CardFileError,
    CardNotFoundError,
    DataError,
    LoRAError,
    MissingPackageError,
    PeerError,
    StateError,
    StoreError,
    UnknownCardError,
)
from lora.evolution.factory import WATCH, SkillFactory, cluster
from lora.evolution.worker import supervise
from lora.models.encoder import InferenceCore
from lora.testing.plugin import requirement
from lora.training.data import Pairs
from tests.unit.test_engine import Words, strong, words_card

TOYS = '''
"""Loaded by every interpreter: in a job, `merge` first does what its first card asks for."""
import sys

if "lora.evolution.worker" in sys.orig_argv:
    import json, os, signal, time
    from dataclasses import replace
    from pathlib import Path

    import lora.merging
    from lora.errors import DataError

    real = lora.merging.merge

    def toy(cards, *args, **options):
        asked = dict(cards[0].metadata["toy"])
        with open(asked["log"], "a") as file:
            row = [asked["do"], asked["number"], os.getpid(), os.getppid()]
            file.write(json.dumps(row) + "\\n")
        seen = Path("seen").exists()
        Path("seen").touch()
        card = replace(cards[0], name=asked.get("renamed", cards[0].name))
        match asked["do"], seen:
            case "copy", _:
                time.sleep(asked.get("sleep", 0))
            case "nothing", _:
                print(json.dumps({"reason": "no better", "mrr": 0.5}))
                raise SystemExit(3)
            case "missing", _:
                print(json.dumps({"file": "nothing.lora.arrow"}))
                raise SystemExit(0)
            case "crash", _:
                os.abort()
            case "leave", _:
                os._exit(5)
            case "hang", _:
                time.sleep(600)
            case "hog", _:
                bytearray(1 << 30)
            case "wrong", _:
                raise DataError("pairs", "at least two", 0)
            case "flaky", False:
                raise OSError("the network is down")
            case "patricide", False:  # kills its supervisor; then it must be gone itself
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(600)
        made = real(cards, "average")
        return replace(card, metadata={**made.metadata, **asked.get("metadata", {})})

    lora.merging.merge = toy
'''

CHILD = """
import os, signal, sys
from pathlib import Path
from lora.evolution import queue
from lora.evolution.factory import SkillFactory
from lora.evolution.queue import JobQueue

root, moment = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name):
    setattr(owner, name, die)

def after(owner, name):
    old = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: die(old(*args, **options)))

def where(owner, name, is_there):
    old = getattr(owner, name)
    setattr(owner, name, lambda *args: die() if is_there(*args) else old(*args))

{
    "before a claim": lambda: before(JobQueue, "claim"),
    "after a claim": lambda: after(JobQueue, "claim"),
    "during the job": lambda: None,
    "before the result is looked at": lambda: before(SkillFactory, "_settle"),
    "before the commit": lambda: before(JobQueue, "accept"),
    "within the commit": lambda: where(queue, "_log", lambda db, what, *_: what == "accept"),
    "after the commit": lambda: after(JobQueue, "accept"),
    "before its file is live": lambda: where(Path, "replace", lambda _, to: to.parts[-2] == "live"),
}[moment]()
factory = SkillFactory(root)
factory.run()
"""


RUN = [sys.executable, "-m", "lora.cli", "factory", "run"]
CLUSTER = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "silence_logs": 50}


@pytest.fixture(scope="module", autouse=True)
def _toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    (folder / "sitecustomize.py").write_text(TOYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


class Bench:
    """A folder with cards, jobs that merge one card and do what it asks for, and their log."""

    def __init__(self, folder):
        self.folder, self.root, self.log = folder, folder / "factory", folder / "log"
        self.number = 0

    def factory(self, **options):
        return SkillFactory(self.root, **options)

    def card(self, name="docs", number=0, **toy):
        path = self.folder / f"{name}-{number}.lora.arrow"
        weights = {"0": LowRank(np.full((2, 1), float(number + 1)), np.ones((1, 2)))}
        asked = {"do": "copy", "number": number, "log": str(self.log), **toy}
        save(LoRACard(name, 1, 1.0, ["0"], weights, {"toy": asked}), path)
        return path

    def line(self, do="copy", name="docs", **toy):
        self.number += 1
        path = self.card(name, self.number, do=do, **toy)
        return ["merge", str(path), "--name", name]

    def add(self, factory, do="copy", name="docs", toy=(), **limits):
        return factory.add(self.line(do, name, **dict(toy)), **limits)

    def told(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def done(self):
        """Numbers of the jobs that ran, in order."""
        return [number for _, number, _, _ in self.told()]


def number_of(job):
    return int(Path(job.arguments[1]).name.split("-")[1].split(".")[0])


def gone(pid, seconds=10.0):
    """Whether a process ends; one that nobody has waited for yet has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


# R19.1, R19.3: what runs where


class Inline(contextlib.nullcontext):
    """An executor that does at once what it is given."""

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:  # noqa: BLE001 - as executors do
            future.set_exception(error)
        return future


@requirement("R19.1", "R19.3", "R19.7")
def test_jobs_run_by_priority_then_age_each_in_a_process_of_its_own(bench):
    seen = []
    factory = bench.factory(on_event=lambda job: seen.append((number_of(job), job.state)))
    for priority in (0, 0, 7, -1):
        bench.add(factory, priority=priority)
    table = factory.run()
    assert bench.done() == [3, 1, 2, 4]
    assert table["state"].to_pylist() == ["done"] * 4
    assert seen == [(n, state) for n in (3, 1, 2, 4) for state in ("running", "done")]
    assert factory.status() == table
    processes = [pid for _, _, pid, _ in bench.told()]
    assert len({os.getpid(), *processes}) == 5
    assert all(gone(pid) for pid in processes)


@requirement("R19.3", "R19.7")
@pytest.mark.parametrize("kind", ["inline", "threads", "spawned processes"])
def test_any_executor_carries_the_jobs_to_the_same_end(bench, kind):
    executor = {
        "inline": Inline,
        "threads": lambda: ThreadPoolExecutor(2),
        "spawned processes": lambda: ProcessPoolExecutor(2, mp_context=get_context("spawn")),
    }[kind]()
    with executor:
        factory = bench.factory(executor=executor, workers=2)
        jobs = [bench.add(factory, do) for do in ("copy", "nothing", "wrong", "copy")]
        factory.run()
        ended = [factory.queue.job(job.id) for job in jobs]
    assert [job.state for job in ended] == ["done", "rejected", "dead", "done"]
    assert ended[2].error == "pairs: expected at least two, found 0"
    assert (ended[1].error, ended[2].attempts) == ("no better", 3)
    (note,) = [row["note"] for row in factory.history().to_pylist() if row["what"] == "reject"]
    assert json.loads(note) == {"reason": "no better", "mrr": 0.5}
    assert sorted(set(bench.done())) == [1, 2, 3, 4]


@requirement("R19.1")
def test_two_workers_work_at_once_and_never_for_two_base_models(bench):
    """Whatever the kind of job: a base is what its --model or --base names."""
    at_once = set()
    factory = bench.factory(workers=2)
    factory._on_event = lambda _: at_once.add(
        tuple(job.base[-1:] for job in factory.queue.jobs("running"))
    )
    for base in ("a", "a", "b", "b"):
        factory.queue.add(replace(job_of(bench.line(sleep=0.5), bench.root), base=base), 0.0)
    factory.run()
    assert factory.status()["state"].to_pylist() == ["done"] * 4
    assert {("a", "a"), ("b", "b")} <= at_once
    assert all({"a", "b"} - set(bases) for bases in at_once)


@requirement("R19.1")
def test_no_two_jobs_of_any_kind_for_two_base_models_run_at_once(bench, model_folder):
    """The base of a job is its --model or --base; a merge's is that of its cards."""
    data = pairs(bench.folder / "pairs.jsonl", lambda i, j: f"re{i} tu{j}")
    first, second, third = (str(bench.card(number=number)) for number in range(3))
    save(replace(load(third), base_model="their base"), third)
    lines = {
        "embedded": ["evolve", str(bench.folder), "--name", "a"],
        str(model_folder.resolve()): ["train", data, "--name", "a", "--model", str(model_folder)],
        first: ["extract", second, "--base", first, "--name", "a"],
        second: ["extract", second, "--name", "a"],
        "their base": ["merge", third, first, "--name", "a"],
        "": ["merge", str(bench.card(number=3)), "--name", "a"],
    }
    factory = bench.factory()
    assert [factory.add(line).base for line in lines.values()] == list(lines)
    for job in factory.queue.jobs():
        assert factory.queue.claim(0.0) == replace(job, state="running", attempts=1, started=0.0)
        assert factory.queue.claim(0.0) is None
        again = replace(job, id=f"{job.id} again", kind="merge", priority=9)
        factory.queue.add(again, 0.0)  # of the same base, it may run beside
        assert factory.queue.claim(0.0).id == again.id
        for running in factory.queue.jobs("running"):
            factory.queue.reject(running, 0.0)


@requirement("R19.2", "R19.3")
def test_a_pool_whose_worker_is_killed_ends_the_run_and_loses_no_job(bench):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        factory = bench.factory(executor=pool)
        job = bench.add(factory, "patricide")
        other = bench.add(factory)
        with pytest.raises(StateError, match="executor: expected one that takes jobs"):
            factory.run()
        assert {factory.queue.job(one.id).state for one in (job, other)} == {"queued"}
        assert all(gone(pid) for _, _, pid, _ in bench.told())
    factory = bench.factory()
    assert factory.run()["state"].to_pylist() == ["done", "done"]


class Failing(Inline):
    """An executor that fails after it has done what it is given."""

    def submit(self, function, *args):
        super().submit(function, *args)
        future = Future()
        future.set_exception(OSError("the executor is gone"))
        return future


@requirement("R19.2", "R19.3", "R19.6")
def test_what_a_job_had_made_when_its_executor_failed_is_taken_and_else_the_reason_is_told(bench):
    factory = bench.factory(executor=Failing())
    done = bench.add(factory)
    rejected = bench.add(factory, "nothing")
    failed = bench.add(factory, "leave", max_failures=1)
    factory.run()
    ended = [factory.queue.job(job.id) for job in (done, rejected, failed)]
    assert [job.state for job in ended] == ["done", "rejected", "dead"]
    assert [job.attempts for job in ended] == [1, 1, 1]
    assert [job.error for job in ended] == [None, "no better", "OSError: the executor is gone"]


@requirement("R19.2", "R19.3")
def test_a_dask_cluster_carries_the_jobs_and_a_worker_that_is_killed_costs_none(bench):
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, **CLUSTER) as local:
        with cluster(local.scheduler_address) as executor:
            factory = bench.factory(executor=executor, workers=2)
            killed = bench.add(factory, "patricide")
            others = [bench.add(factory, do, "law") for do in ("copy", "wrong", "copy")]
            factory.run()
            ended = [factory.queue.job(job.id) for job in (killed, *others)]
            live = factory.live()
            equal = [executor.submit(time.time_ns) for _ in range(2)]
            assert len({future.result(timeout=60) for future in equal}) == 2
    assert [job.state for job in ended] == ["done", "done", "dead", "done"]
    assert [number for word, number, *_ in bench.told() if word == "patricide"] == [1, 1]
    workers = {parent for *_, parent in bench.told()}
    assert os.getpid() not in workers
    assert all(gone(pid) for _, _, pid, _ in bench.told())
    assert sorted(live) == ["docs", "law"]


@requirement("R19.3")
def test_a_cluster_that_is_not_there_is_an_error_that_names_it(monkeypatch):
    import dask
    import distributed  # noqa: F401 - first, or it would find its configuration half there

    with dask.config.set({"distributed.comm.timeouts.connect": "200ms"}):
        expected = r"cluster tcp://127\.0\.0\.1:9: expected a Dask scheduler"
        with pytest.raises(PeerError, match=expected), cluster("tcp://127.0.0.1:9"):
            pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    expected = r"the package distributed.*install \[cluster\]"
    with pytest.raises(MissingPackageError, match=expected), cluster("tcp://x"):
        pass


@requirement("R19.7")
def test_looking_at_a_factory_imports_no_torch(bench):
    factory = bench.factory()
    bench.add(factory)
    script = """
import sys
from lora.evolution import SkillFactory
factory = SkillFactory(sys.argv[1])
assert [len(t) for t in (factory.status(), factory.history(), factory.skills())] == [1, 1, 0]
assert not {"torch", "distributed"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, bench.root], check=True, timeout=60)


# R19.6: limits and failures


@requirement("R19.6")
def test_a_job_that_fails_hangs_or_eats_too_much_ends_with_its_reason_and_stops_no_other(bench):
    factory = bench.factory(workers=2)
    bad = {
        "crash": bench.add(factory, "crash", max_failures=1),
        "leave": bench.add(factory, "leave", max_failures=1),
        "hang": bench.add(factory, "hang", max_failures=1, seconds=1.0),
        "hog": bench.add(factory, "hog", max_failures=1, memory=400 * 2**20),
        "wrong": bench.add(factory, "wrong", max_failures=2),
        "missing": bench.add(factory, "missing", max_failures=1),
        "misnamed": bench.add(factory, toy={"renamed": "other"}, max_failures=1),
    }
    good = [bench.add(factory, priority=-1) for _ in range(2)]
    factory.run()
    errors = {name: factory.queue.job(job.id) for name, job in bad.items()}
    assert {job.state for job in errors.values()} == {"dead"}
    assert [factory.queue.job(job.id).state for job in good] == ["done", "done"]
    assert errors["crash"].error.startswith("killed by SIGABRT; see ")
    assert errors["leave"].error.startswith("exit status 5; see ")
    assert errors["hang"].error == "hit its time limit of 1 s"
    assert errors["hog"].error == f"hit its memory limit of {400 * 2**20} bytes"
    assert errors["wrong"].error == "pairs: expected at least two, found 0"
    assert errors["wrong"].attempts == 2
    assert errors["missing"].error == "exit status 0, but no card"
    assert "one named 'docs', found 'other'" in errors["misnamed"].error
    assert all(gone(pid) for _, _, pid, _ in bench.told())
    log = (bench.root / "work" / bad["wrong"].id / "log").read_text()
    assert "lora: pairs: expected at least two" in log
    assert len(factory.skills()) == 2


@requirement("R19.6", "R19.7")
@pytest.mark.parametrize(
    ("raised", "memory", "error"),
    [
        ("MemoryError", 2**31, f"hit its memory limit of {2**31} bytes"),
        ("ImportError('a library')", None, "exit status 1: ImportError: a library; see "),
        ("KeyboardInterrupt", None, "interrupted"),
        ("SystemExit('lora: no home')", None, "no home"),
        ("SystemExit", None, "exit status 0, but no card"),
    ],
)
def test_whatever_ends_a_process_before_its_command_begins_is_a_failure_with_its_reason(
    bench, monkeypatch, raised, memory, error
):
    """As the command line is imported, which is where a tight limit of memory is hit first."""
    toys = bench.folder / "toys"
    toys.mkdir()
    (toys / "sitecustomize.py").write_text(f"""
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "lora.cli.app" and "lora.evolution.worker" in sys.orig_argv:
            raise {raised}
sys.meta_path.insert(0, Finder())
""")
    monkeypatch.setenv("PYTHONPATH", str(toys), prepend=os.pathsep)
    factory = bench.factory()
    job = bench.add(factory, max_failures=1, memory=memory)
    assert factory.run()["state"].to_pylist() == ["dead"]
    assert factory.queue.job(job.id).error.startswith(error)


@requirement("R19.6")
def test_a_limit_of_memory_that_lets_nothing_be_imported_is_named(bench):
    factory = bench.factory()
    jobs = [bench.add(factory, max_failures=1, memory=size) for size in (1, 2**24, 2**70)]
    factory.run()
    jobs = [factory.queue.job(job.id) for job in jobs]
    assert [job.state for job in jobs] == ["dead"] * 3
    assert all(job.error for job in jobs)
    assert "OverflowError" in jobs[2].error


@requirement("R19.6", "R19.7")
def test_what_passes_is_tried_again_and_what_is_dead_stays_listed_until_it_is_asked_for(bench):
    factory = bench.factory()
    job = bench.add(factory, "flaky", max_failures=1)
    factory.run()
    assert factory.queue.job(job.id).error == "the network is down"
    assert factory.run()["state"].to_pylist() == ["dead"]
    factory.retry(job.id)
    assert factory.run()["state"].to_pylist() == ["done"]
    again = bench.add(factory, "flaky")
    factory.run()
    again = factory.queue.job(again.id)
    assert (again.state, again.attempts) == ("done", 2)
    assert list((bench.root / "work").iterdir()) == []


@requirement("R19.2")
def test_an_input_that_changed_since_the_job_was_added_is_not_worked_on(bench):
    factory = bench.factory()
    job = bench.add(factory)
    path = bench.card("docs", 1, do="nothing")
    other = bench.add(factory)
    bench.card("docs", 2).unlink()
    assert factory.run()["state"].to_pylist() == ["dead", "dead"]
    changed, gone = (factory.queue.job(each.id) for each in (job, other))
    assert "what it was when the job was added, found it changed" in changed.error
    assert "expected a file or folder that the job reads, found none" in gone.error
    assert (changed.attempts, gone.attempts) == (1, 3)  # what is gone may come back
    assert factory.add(["merge", str(path), "--name", "docs"]).id != job.id
    assert bench.done() == []


@requirement("R19.1", "R19.2")
@pytest.mark.parametrize(
    ("line", "message"),
    {
        "": "job: expected one of the commands .*, found ''",
        "bake CARD --name x": "job: expected one of the commands .*, found 'bake'",
        "inspect CARD": "job: expected one of the commands",
        "merge": "lora merge: expected arguments that it takes, found Missing argument",
        "merge CARD --ranks 3": "lora merge: .* found No such option: --ranks",
        "merge CARD --rank 2.5": "found --rank: expected a whole number, found '2.5'",
        "merge CARD --rank 0": "rank: expected an integer >= 1, found 0",
        "merge CARD --strategy magic": "--strategy: expected one of average",
        "merge CARD --strategy ties --density 2": "ties: density",
        "merge CARD -o x.arrow": "expected no output, found --out; leave it out",
        "merge CARD -ox.arrow": "expected no output, found --out",
        "train CARD --name x --checkpoint c": "expected no output, found --checkpoint",
        "train CARD --name x --plot p.svg": "expected no output, found --plot",
        "merge CARD --json": "expected no output, found --json",
        "merge CARD --help": "lora merge: .* found No such option: --help",
        "merge CARD\0": "embedded null byte",
        "train CARD\0 --name x": "expected a path that can be read",
        "merge no.lora.arrow": "no.lora.arrow: expected a file or folder that the job reads",
        "train no.jsonl --name x": "no.jsonl: expected a file or folder that the job reads",
        "train CARD --name x --preset architecture": "--preset: expected one of quick",
        "train CARD --name x preset=architect": "lora train: .*preset=architect",
        "merge CARD --name=": "card name",
        "extract CARD --base CARD": "--name, the name of the skill, found none",
        "extract CARD --name x --energy 0": "found 0",
        "extract CARD --name x --error 1": "found 1",
        "extract CARD --name x --error 0 --rank 1": "found 2 of them",
        "train CARD": "lora train: .*--name",
        "train CARD --name x --rank 0": "--rank: expected a number greater than or equal to 1,",
        "train CARD --name x --steps 0": "steps: expected an integer >= 1",
        "train CARD --name x --alpha inf": "alpha: expected a finite",
        "train CARD --name x --preset fast": "--preset: .*'fast'",
        "train CARD --name x --loss none": "loss: expected one of",
        "train CARD --name x --warmup 1": "warmup",
        "evolve CARD --name x --seed -1": "seed: expected an integer >= 0",
        "evolve CARD --name x --steps 0": "lora evolve: .*--steps",
        "evolve CARD --name x --ask api.openai.com:documents --teacher-model m --key-file CARD": (
            "expected no secret, found --ask"
        ),
    }.items(),
)
def test_what_can_not_be_a_job_is_refused_when_it_is_added(bench, line, message):
    """And so are words that are no text, in one line."""
    card = str(bench.card())
    factory = bench.factory()
    with pytest.raises(LoRAError, match=message):
        factory.add([card if word == "CARD" else word for word in line.split()])
    assert len(factory.status()) == 0


@requirement("R19.1", "R19.2")
def test_an_input_that_is_not_there_is_refused_and_so_is_a_factory_that_can_not_be(bench):
    factory = bench.factory()
    with pytest.raises(CardNotFoundError, match=r"nowhere.*a file or folder that the job reads"):
        factory.add(["merge", "nowhere.lora.arrow", "--name", "docs"])
    assert len(factory.status()) == 0
    for wrong in ("workers", "keep"):
        with pytest.raises(ArgumentError, match=wrong):
            bench.factory(**{wrong: 0})


@requirement("R19.2")
def test_a_job_is_known_by_what_its_command_line_means(bench, monkeypatch):
    """A relative path, the order of options and a default that is spelled out make no other job."""
    monkeypatch.chdir(bench.folder)
    card = bench.card("docs", 0)
    factory = bench.factory()
    job = factory.add(["merge", str(card), "--name", "docs", "--rank", "2"])
    again = ["merge", "--rank=2", "--name", "docs", "--strategy", "average", card.name]
    assert factory.add(again, priority=5) == job
    assert factory.add(["merge", card.name, "--name", "docs"]).id != job.id
    assert job.arguments[:2] == ("merge", str(card))
    assert job.arguments[-3:] == ("--name", "docs", "--json")
    assert set(job.inputs) == {str(card)}


@requirement("R19.2")
def test_no_secret_is_part_of_a_job(bench):
    """A teacher's key is no argument of a job."""
    from typer.main import get_command

    from lora.cli.app import INPUTS, app
    from lora.cli.jobs import REFUSED

    assert set(INPUTS) == {"train", "extract", "merge", "evolve"}
    commands = get_command(app).commands
    options = {
        opt
        for name in INPUTS
        for param in commands[name].params
        for opt in param.opts
        if param.name not in REFUSED
    } - {"--max-tokens"}
    assert not [option for option in options if "key" in option or "token" in option]


@requirement("R19.1", "R7.8")
@pytest.mark.parametrize("words", ["merge a", [1], ["merge", Path("a")], None, 3, b"merge", {}])
def test_what_is_no_list_of_words_is_no_job(bench, words):
    with pytest.raises(ArgumentError, match="job: expected"):
        bench.factory().add(words)


# R19.2: killed at every boundary


MOMENTS = ["before a claim", "after a claim", "during the job", "before the result is looked at"]
MOMENTS += [f"{place} the commit" for place in ("before", "within", "after")]
MOMENTS += ["before its file is live"]


@requirement("R19.2")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_coordinator_killed_anywhere_loses_no_job_and_none_takes_effect_twice(bench, moment):
    factory = bench.factory()
    do, failures = ("patricide", 2) if moment == "during the job" else ("copy", 1)
    job = bench.add(factory, do, max_failures=failures + (moment == "after a claim"))
    second = bench.add(factory)
    command = [sys.executable, "-c", CHILD, bench.root, moment]
    killed = subprocess.run(command, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    factory = bench.factory()
    assert factory.queue.job(job.id).state == {
        "before a claim": "queued",
        "after the commit": "done",
        "before its file is live": "done",
    }.get(moment, "running")
    if factory.live():  # its file is not there yet; any start repairs that
        assert served(factory) == {}
        stop = threading.Event()
        stop.set()
        factory.run(stop=stop)
        assert served(factory) == {"docs": (1, "0.1.0")}
    assert factory.run()["state"].to_pylist() == ["done", "done"]
    events = factory.history().to_pylist()
    accepted = [event["job"] for event in events if event["what"] == "accept"]
    versions = factory.queue.versions()
    assert accepted == [job.id, second.id]
    assert [version.version for version in versions] == ["0.1.0", "0.2.0"]
    assert served(factory) == {"docs": (2, "0.2.0")}
    assert {load(factory.cards.path(v.digest)).name for v in versions} == {"docs"}
    assert len(factory.cards.digests()) == 2
    assert list((bench.root / "work").iterdir()) == []
    assert not list((bench.root / "live").glob(".*"))
    during = moment == "during the job"
    runs = [number for word, number, *_ in bench.told() if word != "copy" or not during]
    assert runs.count(1) == 1 + during  # what was whole when the coordinator died is not done twice
    assert all(gone(pid) for _, _, pid, _ in bench.told())


@requirement("R19.2", "R19.6")
def test_a_job_whose_coordinator_dies_every_time_is_dead_in_the_end(bench):
    factory = bench.factory()
    job = bench.add(factory, max_failures=2)
    for _ in range(2):
        command = [sys.executable, "-c", CHILD, bench.root, "after a claim"]
        subprocess.run(command, check=False, timeout=120)
    factory = bench.factory()
    assert factory.run()["state"].to_pylist() == ["dead"]
    assert factory.queue.job(job.id).error == "the coordinator died"


@requirement("R19.2")
def test_two_coordinators_never_run_at_once_and_others_may_add_and_look_meanwhile(bench):
    refused = []

    def meanwhile(job):
        if job.state == "running" and not refused:
            other = bench.factory()
            assert other.status()["state"].to_pylist() == ["running"]
            expected = r"coordinator\.lock: expected one coordinator at a time"
            with pytest.raises(StateError, match=expected) as error:
                other.run()
            refused.append(error)
            bench.add(other)

    factory = bench.factory(on_event=meanwhile)
    bench.add(factory)
    assert factory.run()["state"].to_pylist() == ["done", "done"]
    assert refused


@requirement("R19.2")
def test_a_lock_that_is_no_file_to_lock_is_named(bench):
    factory = bench.factory()
    (bench.root / "coordinator.lock").write_text("no database " * 100)
    with pytest.raises(StoreError, match=r"coordinator\.lock: expected a file that can be locked"):
        factory.run()


@requirement("R19.2")
def test_an_interrupted_run_kills_its_jobs_and_holds_nothing_against_them(bench):
    class Interrupt:
        def is_set(self):
            if len(bench.told()) == 3:
                raise KeyboardInterrupt
            return False

    factory = bench.factory(workers=4)
    jobs = [bench.add(factory, "hang") for _ in range(3)]
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        factory.run(stop=Interrupt())
    assert time.monotonic() - before < 60
    jobs = [factory.queue.job(job.id) for job in jobs]
    assert [(job.state, job.failures) for job in jobs] == [("queued", 0)] * 3
    assert all(gone(pid) for _, _, pid, _ in bench.told())


@requirement("R19.2")
def test_a_run_that_is_told_to_stop_waits_for_what_runs_and_begins_nothing_more(bench):
    stop = threading.Event()
    factory = bench.factory(on_event=lambda _: stop.set())
    jobs = [bench.add(factory), bench.add(factory)]
    factory.run(stop=stop)
    assert [factory.queue.job(job.id).state for job in jobs] == ["done", "queued"]


@requirement("R19.2")
def test_a_folder_is_worked_in_by_one_process_at_a_time(bench):
    """What a cluster still runs for a dead coordinator is waited for, and what it made is taken."""
    factory = bench.factory()
    job = bench.add(factory, toy={"sleep": 1.0})
    attempt = factory.queue.claim(0.0)
    assert attempt.id == job.id
    order = {"arguments": attempt.arguments, "inputs": attempt.inputs}
    order |= {"attempt": 1, "seconds": 60.0}
    order |= {"folder": str(bench.root / "work" / job.id), "memory": None, "threads": 1}
    order["live"] = str(bench.root / "live")
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(supervise, [order, order | {"attempt": 2}])
    assert first == second
    assert first["card"] == str(bench.root / "work" / job.id / "card.lora.arrow")
    assert bench.done() == [1]


# R19.5: versions that are served


def served(factory):
    """The number and the version of each card in the folder that is served."""
    cards = [load(path) for path in sorted((factory.root / "live").glob("*.lora.arrow"))]
    numbers = [(card.weights["0"].A[0, 0] - 1, card.metadata["version"]) for card in cards]
    return {card.name: number for card, number in zip(cards, numbers, strict=True)}


@requirement("R19.5")
def test_an_accepted_version_is_swapped_in_and_an_earlier_one_comes_back_by_name(bench, caplog):
    factory = bench.factory(keep=2)
    for name in ("docs", "law", "docs", "docs"):
        bench.add(factory, name=name)
    snapshots = []
    factory._on_event = lambda job: snapshots.append((job.state, served(factory)))
    factory.run()
    assert served(factory) == {"docs": (4, "0.3.0"), "law": (2, "0.1.0")}
    assert ("running", {"docs": (1, "0.1.0"), "law": (2, "0.1.0")}) in snapshots
    versions = [(v.name, v.version, v.live) for v in factory.queue.versions()]
    kept = [("docs", "0.2.0", False), ("docs", "0.3.0", True), ("law", "0.1.0", True)]
    assert versions == kept
    assert len(factory.cards.digests()) == 3
    assert factory.rollback("docs").version == "0.2.0"
    assert served(factory) == {"docs": (3, "0.2.0"), "law": (2, "0.1.0")}
    with pytest.raises(StateError):
        factory.rollback("docs")
    with pytest.raises(UnknownCardError):
        factory.rollback("nothing")
    bench.factory().rollback("docs", "0.3.0")
    assert served(factory)["docs"] == (4, "0.3.0")
    assert {path.name for path in factory.live().values()} == {"docs.lora.arrow", "law.lora.arrow"}
    docs, law = factory.live().values()
    for path in (docs, law, factory.cards.path(factory.queue.versions("docs")[-1].digest)):
        path.unlink()
    factory.sync()  # one card that is lost stops no other
    assert served(factory) == {"law": (2, "0.1.0")}
    assert "version 0.3.0 of docs is lost" in caplog.text


@requirement("R19.1", "R19.5")
@pytest.mark.parametrize(
    ("own", "version"), [("0.1.0", "0.3.0"), ("2.0.0", "2.0.0"), ("new", "0.3.0"), (None, "0.3.0")]
)
def test_each_version_is_above_the_last_one_of_its_name(bench, own, version):
    """Rolling back lowers no number: a version that was served is never another card's."""
    factory = bench.factory()
    for _ in range(2):
        bench.add(factory)
    factory.run()
    factory.rollback("docs")
    bench.add(factory, toy={"metadata": {"version": own}})
    factory.run()
    assert [each.version for each in factory.queue.versions()] == ["0.1.0", "0.2.0", version]
    assert served(factory)["docs"] == (3, version)


@requirement("R19.5")
@pytest.mark.parametrize("damage", ["other content", "none"])
def test_a_version_whose_file_is_damaged_does_not_go_live(bench, damage):
    factory = bench.factory()
    for _ in range(2):
        bench.add(factory)
    factory.run()
    path = factory.cards.path(factory.queue.versions()[0].digest)
    path.unlink()
    if damage != "none":
        bench.card("docs", 7).rename(path)
    with pytest.raises((CardFileError, CardNotFoundError)):
        factory.rollback("docs")
    assert served(factory)["docs"] == (2, "0.2.0")
    assert [version.live for version in factory.queue.versions()] == [False, True]


@requirement("R19.1", "R18.8", "R19.5", "R19.7")
@pytest.mark.slow
def test_a_card_that_harms_a_live_skill_is_rejected_whatever_made_it(bench, model_folder):
    """By the sample beside the live card, which goes live with the next version, too."""
    core = InferenceCore.from_pretrained(model_folder)
    factory = bench.factory()
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    units = "one two three four five six seven eight nine".split()
    sample = [
        {"query": f"{ten} {unit}", "positive": f"{10 * i + j}"}
        for i, ten in enumerate(tens, 2)
        for j, unit in enumerate(units, 1)
    ]
    about = {"examples": [row["query"] for row in sample]}
    about["example_groups"] = [row["positive"][0] for row in sample]

    def made(number, size):
        path = bench.card("docs", number, metadata=about)
        toy = dict(load(path).metadata)
        save(replace(strong(core, "docs", number, size), metadata=toy), path)
        job = factory.add(["merge", str(path), "--name", "docs"])
        factory.run()
        return factory.queue.job(job.id)

    first = made(1, 1e-3)
    assert first.state == "done"
    Pairs.of(sample).save(factory.cards.root / f"{first.digest}.exam.jsonl")
    harmful = made(2, 0.3)
    assert harmful.state == "rejected"
    assert "on the sample of 'docs' the MRR falls by" in harmful.error
    assert load(factory.live()["docs"]).metadata["version"] == "0.1.0"
    second = made(3, 1e-3)
    assert (second.state, second.version) == ("done", "0.2.0")
    note = json.loads(factory.history().to_pylist()[-1]["note"])
    assert note["guard"]["guards"]["docs"]["pairs"] == 72
    live = factory.root / "live" / "docs.exam.jsonl"
    assert live.samefile(factory.cards.root / f"{second.digest}.exam.jsonl")
    assert live.read_text().count("\n") == 72
    live.unlink()  # another tool's mistake is repaired, and a version without a sample has none
    factory.cards.root.joinpath(f"{first.digest}.exam.jsonl").unlink()
    factory.sync()
    assert live.exists()
    factory.rollback("docs")
    assert not live.exists()


@requirement("R19.1", "R18.8")
def test_a_card_is_examined_whatever_else_lies_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(ArrowEngine, "from_pretrained", lambda _: ArrowEngine(Words()))
    live, file = tmp_path / "live", tmp_path / "new.lora.arrow"
    live.mkdir()
    Pairs.of([("open a file", "how"), ("read it", "so")]).save(live / "docs.exam.jsonl")
    card = words_card("docs", description="open a file")
    wide = LowRank(np.ones((5, 1)), np.ones((1, 3)))
    save(card, live / "docs.lora.arrow")
    save(replace(card, name="wide", weights={"dense": wide}), live / "wide.lora.arrow")
    save(replace(card, name="law"), file)
    assert list(harm(["merge"], file, live)[1]["guard"]["guards"]) == ["docs"]
    other = replace(card, base_fingerprint="0" * 64)
    for name, is_refused in (("law", False), ("docs", True)):
        save(replace(other, name=name), file)
        refusal, figures = harm(["merge"], file, live)
        assert figures["guard"].startswith("not examined: ")
        assert refusal == (figures["guard"] if is_refused else "")
    save(card, file)
    (live / "docs.exam.jsonl").write_text("{no JSON\n")
    with pytest.raises(DataError, match=r"docs\.exam\.jsonl"):
        harm(["merge"], file, live)


# R19.4: nights


class Nights:
    """A clock that waiting moves, until it reaches an end."""

    def __init__(self, start, hours):
        self.now = start.timestamp()
        self.end = self.now + hours * 3600

    def is_set(self):
        return self.now >= self.end

    def wait(self, timeout):
        assert 0 < timeout <= WATCH
        self.now += 600.0
        return self.is_set()


def nightly(bench, start, hours, added=None):
    """Numbers of the jobs that ran, and when, in a factory that runs by night."""
    clock, begun = Nights(start, hours), []

    def note(job):
        if job.state == "running":
            begun.append((number_of(job), datetime.fromtimestamp(clock.now)))  # noqa: DTZ006 - a wall clock

    factory = bench.factory(clock=lambda: clock.now, on_event=note)
    if added is not None:
        added(factory)
    factory.run(at="02:00", stop=clock)
    return begun, factory.queue.night()


@requirement("R19.4")
def test_it_runs_by_night_at_its_time_and_a_missed_night_at_the_next_start(bench):
    evening = datetime(2026, 6, 1, 20)  # noqa: DTZ001 - a wall clock
    begun, _ = nightly(bench, evening, 29, bench.add)
    assert begun == [(1, datetime(2026, 6, 2, 2))]  # noqa: DTZ001 - as above
    noon = datetime(2026, 6, 9, 12)  # noqa: DTZ001 - as above
    begun, night = nightly(bench, noon, 1, bench.add)
    assert begun == [(2, noon)]
    assert night == date(2026, 6, 9)
    begun, _ = nightly(bench, datetime(2026, 6, 9, 14), 2, bench.add)  # noqa: DTZ001 - as above
    assert begun == []


@requirement("R19.4")
def test_the_first_start_has_missed_nothing(bench):
    begun, _ = nightly(bench, datetime(2026, 6, 1, 20), 1, bench.add)  # noqa: DTZ001 - a wall clock
    assert begun == []
    with pytest.raises(ArgumentError, match="a time of day such as 02:00, found '2 am'"):
        bench.factory().run(at="2 am")


# R19.3, R19.4: the command line


@requirement("R19.3", "R25.2")
def test_the_command_line_runs_jobs_on_the_cluster_that_it_is_given(bench):
    from distributed import LocalCluster

    factory = bench.factory()
    bench.add(factory)
    bench.add(factory, "nothing")
    with LocalCluster(n_workers=1, **CLUSTER) as local:
        done = subprocess.run(
            [*RUN, "--root", bench.root, "--scheduler", local.scheduler_address, "--json"],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        workers = {worker.pid for worker in local.workers.values()}
    assert [job["state"] for job in json.loads(done.stdout)] == ["done", "rejected"]
    assert "rejected: merge docs: no better" in done.stderr
    assert {parent for *_, parent in bench.told()} == workers


@requirement("R19.4", "R25.2")
@pytest.mark.parametrize("missed", [True, False])
def test_the_command_line_stays_and_runs_by_night_until_it_is_told_to_stop(bench, missed):
    """At once if a night was missed; at the first start, which has missed none, not."""
    factory = bench.factory()
    job = bench.add(factory)
    if missed:
        factory.queue.set_night(date(2026, 1, 1))
    command = [*RUN, "--root", bench.root, "--at", "00:00"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while factory.queue.night() in (None, date(2026, 1, 1)) and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0
    assert factory.queue.night() > date(2026, 1, 1)
    assert factory.queue.job(job.id).state == ("done" if missed else "queued")
    assert ("done: merge docs" in told) == missed


# What the commands make


@requirement("R19.1", "R19.2")
def test_merge_and_extract_make_what_the_library_makes(bench):
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    base = generator.normal(size=(6, 6))
    tuned = base + np.outer(generator.normal(size=6), generator.normal(size=6))
    for name, weight in (("base", base), ("tuned", tuned)):
        save_file({"0.weight": weight.astype(np.float32)}, bench.folder / f"{name}.safetensors")
    sources = [str(bench.folder / f"{key}.safetensors") for key in ("tuned", "base")]
    factory = bench.factory()
    bench.add(factory, name="both")
    factory.add(["extract", sources[0], "--base", sources[1], "--name", "step", "--rank", "1"])
    assert factory.run()["state"].to_pylist() == ["done", "done"]
    step = load(factory.live()["step"])
    notes = factory.history().to_pylist()
    pair = step.weights["0"]
    np.testing.assert_allclose(pair.A @ pair.B * pair.scaling, (tuned - base).T, atol=1e-4)
    (figures,) = [json.loads(row["note"]) for row in notes if row["note"] and row["name"] == "step"]
    assert figures["rank"] == 1
    assert figures["modules"]["0"]["error"] < 1e-3


def pairs(path, answer):
    """Pairs of invented words: ``ka<i> mo<j>`` asks for what `answer` says."""
    words = [(i, j) for i in range(8) for j in range(8)]
    rows = [
        {"query": f"ka{i} mo{j}", "positive": answer(i, j), "group": f"{i}{j}"} for i, j in words
    ]
    Pairs.of(rows).save(path)
    return str(path)


@requirement("R19.1")
def test_training_is_a_job_whose_card_is_taken_if_it_is_better_than_its_base(bench, model_folder):
    """A preset of training and one of a task are told apart as on the command line."""
    data = pairs(bench.folder / "pairs.jsonl", lambda i, j: f"re{i} tu{j}")
    found = pairs(bench.folder / "found.jsonl", lambda i, j: f"ka{i} mo{j}")  # by the base, too
    options = ["--name", "words", "--model", str(model_folder), "--rank", "4"]
    factory = bench.factory()
    about = ["--steps", "6", "--description", "invented words", "--preset", "architect"]
    job = factory.add(["train", data, *options, *about])
    assert set(job.inputs) == {str(model_folder), data}
    vain = factory.add(["train", found, *options, "--steps", "1"])
    factory.run()
    assert factory.queue.job(job.id).state == "done", factory.queue.job(job.id).error
    card = load(factory.live()["words"])
    vain = factory.queue.job(vain.id)
    (event,) = [row for row in factory.history().to_pylist() if row["what"] == "reject"]
    assert (card.rank, card.metadata["description"]) == (4, "invented words")
    assert card.base_fingerprint
    assert vain.state == "rejected"
    assert vain.error.startswith("no better than the base model: validation MRR 1.000 -> ")
    assert json.loads(event["note"])["before"]["mrr"] == 1.0


@requirement("R19.2", "R17.8")
def test_training_goes_on_from_its_checkpoint_after_a_kill(bench, model_folder, monkeypatch):
    """The job's process is killed right after a checkpoint, and the next attempt takes no step
    twice.
    """
    toys = bench.folder / "toys"
    toys.mkdir()
    steps = bench.folder / "steps"
    (toys / "sitecustomize.py").write_text(f"""
import sys
if "lora.evolution.worker" in sys.orig_argv:
    import os, signal
    from lora.training import train
    step, store = train._Run.step, train._Run.store
    def counted(self, batch):
        with open({str(steps)!r}, "a") as file:
            file.write(f"{{len(self.history)}} ")
        return step(self, batch)
    def killed(self, *args):
        store(self, *args)
        if not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    train._Run.step, train._Run.store = counted, killed
""")
    monkeypatch.setenv("PYTHONPATH", str(toys), prepend=os.pathsep)
    rows = [{"query": f"a{i}", "positive": f"b{i}", "group": f"{i % 4}"} for i in range(400)]
    data = bench.folder / "many.jsonl"
    Pairs.of(rows).save(data)
    model = ["--model", str(model_folder), "--target", "0.attention.self.query", "--rank", "1"]
    factory = bench.factory()
    job = factory.add(["train", str(data), "--name", "words", *model, "--steps", "3"])
    factory.run()
    ended = factory.queue.job(job.id)
    assert (ended.state in ("done", "rejected"), ended.attempts) == (True, 2)
    assert list(map(int, steps.read_text().split())) == [0, 1, 2]
