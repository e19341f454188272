"""Run the mutants of the pure core, or of some of its modules, and print the share that is killed.

    python -m tests.mutants                    the modules that pyproject.toml lists
    python -m tests.mutants lora/factors.py    one module
    SECONDS=60 python -m tests.mutants         what lives runs again, for that long

mutmut makes the mutants: all those of a module stand in one file, which chooses one at each call.
So the properties are imported and collected once. They run once on the unchanged code, which tells
which of them reach which function. For each mutant the process is forked, and the fork runs the
properties that reach its function until one fails: first those of the requirements that its module
names, and of these those that kill most for their time.

``mutants/`` keeps the verdicts, so that a run that was stopped goes on where it was. A mutant is
run again if what it does has changed, or the property that killed it, or, if it lives, any, or the
time that it is given.
"""

import ast
import functools
import gc
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import time
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.sharp.forked import wait

KILLED = {1, 3}
"""Exit statuses of pytest by which a mutant is noticed; a time-out is none of them."""

SURVIVED, FAILED, UNREACHED, TIMED_OUT = 0, 1, 33, 36
CHECKS = {"require", "finite", "positive", "integer", "share", "choice", "texts_of"}
"""Functions whose second argument says where a value stands; all the others of `require` too."""

SECONDS = float(os.environ.get("SECONDS", "12"))
"""Processor time after which no further property is run: the mutant counts as alive."""

QUICK = 0.1
"""Properties that take fewer seconds load what is loaded late, before the first fork."""

TREE = Path("mutants/tree").absolute()
OPTIONS = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=native"]
"""Other tracebacks would parse a module with all its mutants for each failure."""


def shares(folder: Path) -> list[str]:
    """Return for each module how many of its mutants are killed, and those that live by name."""
    lines = []
    for path in sorted(folder.rglob("*.py.meta")):
        codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        run = {name: code for name, code in codes.items() if code is not None}
        alive = [name for name, code in run.items() if code not in KILLED]
        if run:
            killed = len(run) - len(alive)
            module = path.relative_to(folder).as_posix().removesuffix(".meta")
            share = f"{killed} of {len(run)} killed, {100 * killed / len(run):.1f} %"
            left = len(codes) - len(run)
            lines += [f"{module}: {share}" + (f"; {left} not run" if left else "")]
            lines += [f"    alive: {name}" for name in sorted(alive)]
    return lines


def silent(source: str) -> dict[str, str]:
    """Return what each function of a module does, without the texts in its checks, and without the
    ``strict`` of `zip`, which asks of sequences what is so.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in CHECKS:
            del node.args[1 : 2 if name != "require" else None]
        if isinstance(node, ast.Call) and name == "zip":
            node.keywords = []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {node.name: "".join(map(ast.dump, [node.args, *node.body])) for node in functions}


def make(module: str) -> dict[str, str]:
    """Write mutants into the copy of a module; return a digest of what each does."""
    from mutmut.mutation.file_mutation import mutate_file_contents  # installed by make mutants

    mutated = mutate_file_contents(module, Path(module).read_text(encoding="utf-8"))
    (TREE / module).write_text(mutated.code, encoding="utf-8")
    package, said = module.removesuffix(".py").replace("/", "."), silent(mutated.code)
    return {
        f"{package}.{name}": _digest(said[name])
        for name in mutated.mutant_names
        if said[name] != said[f"{_function(name)}__mutmut_orig"]
    }


class Runner:
    """The pytest plugin that runs the mutants in place of the tests.

    Args:
        mutants: For each module its mutants, with a digest of what each does.
    """

    def __init__(self, mutants: dict[str, dict[str, str]]) -> None:
        self.mutants = mutants
        self.kills: dict[str, Counter[str]] = defaultdict(Counter)
        self.own: tuple[str, ...] = ()
        """How the files begin that hold the requirements which the module names."""
        self.pipe: int | None = None
        """Where a fork says which property failed."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """End a fork with the first failure."""
        if report.failed and self.pipe is None:
            raise pytest.UsageError(f"fails on the unchanged code: {report.longreprtext}")
        if report.failed and self.pipe is not None:
            os.write(self.pipe, report.nodeid.encode())
            os._exit(FAILED)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run what has no verdict that still holds."""
        self.items = {item.nodeid: item for item in session.items}
        sources = {name: inspect.getsource(item.function) for name, item in self.items.items()}
        self.digests = {name: _digest(source) for name, source in sources.items()}
        self.digests[""] = _digest(json.dumps([sources, SECONDS]))
        self.run_unchanged()
        for module in self.mutants:
            source = (TREE / module).read_text(encoding="utf-8")
            named = re.search(r"^Requirements: (.*)\.$", source, re.MULTILINE)
            chapters = named[1].split(", ") if named else []
            self.own = tuple(f"test_r{int(chapter[1:]):02}" for chapter in chapters)
            self.run_module(TREE.parent / f"{module}.meta", self.mutants[module])
        return True

    def run_unchanged(self) -> None:
        """Note how long each property takes and which functions it reaches, and keep that."""
        from mutmut.mutation import trampoline

        path = TREE.parent / "unchanged.json"
        digest = _digest(json.dumps([self.digests, self.mutants]))
        noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        noted = noted if noted.get("digest") == digest else {"digest": digest, "tests": {}}
        self.noted: dict[str, tuple[float, list[str]]] = noted["tests"]
        todo = [each for name, each in self.items.items() if self.noted.get(name, [0])[0] < QUICK]
        hits: set[str] = set()
        trampoline.record_trampoline_hit = lambda name, **_: hits.add(name)
        os.environ["MUTANT_UNDER_TEST"] = "stats"
        for item, following in zip(todo, [*todo[1:], None], strict=True):
            hits.clear()
            start = time.process_time()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            self.noted[item.nodeid] = time.process_time() - start, sorted(hits)
        path.write_text(json.dumps(noted), encoding="utf-8")
        for cached in gc.get_objects():  # what the unchanged code has computed
            if type(cached) is functools._lru_cache_wrapper and str(cached.__module__).startswith(
                ("lora", "tests", "properties")
            ):
                cached.cache_clear()
        gc.freeze()  # no fork copies the memory of what all share

    def run_module(self, path: Path, mutants: dict[str, str]) -> None:
        """Run the mutants of a module, and keep each verdict in a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        verdicts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        codes, proofs = verdicts.get("exit_code_by_key", {}), verdicts.get("proofs", {})
        for name, digest in mutants.items():
            function, killer, proof = proofs.get(name, (None, None, None))
            if function != digest or self.digests.get(killer) != proof:
                codes[name] = None
            elif killer:
                self.kills[_function(name)][killer] += 1
        for name, digest in mutants.items():
            if codes[name] is None:
                codes[name], killer = self.run_mutant(name)
                proofs[name] = digest, killer, self.digests[killer]
                sys.stderr.write(f"{name} {codes[name]} {killer}\n")
            kept = {"exit_code_by_key": {key: codes[key] for key in mutants}, "proofs": proofs}
            path.write_text(json.dumps(kept), encoding="utf-8")

    def run_mutant(self, name: str) -> tuple[int, str]:
        """Return the exit status of the properties on a mutant, and the property that failed."""
        here, everywhere = self.kills[_function(name)], sum(self.kills.values(), Counter())

        def worth(test: str) -> tuple[bool, float, float]:
            seconds, own = self.noted[test][0], Path(test).name.startswith(self.own)
            return own, (20 * here[test] + everywhere[test]) / (0.1 + seconds), -seconds

        tests = [test for test, (_, reached) in self.noted.items() if _function(name) in reached]
        tests.sort(key=worth, reverse=True)
        reading, writing = os.pipe()
        if not (child := os.fork()):
            try:
                self.pipe = writing
                self.run_fork(name, tests)
            finally:
                os._exit(SURVIVED)
        os.close(writing)
        code = wait(child, 300.0)
        with os.fdopen(reading, encoding="utf-8") as pipe:
            killer = pipe.read()
        if killer:
            here[killer] += 1
        return (TIMED_OUT if code is None else code) if tests else UNREACHED, killer

    def run_fork(self, mutant: str, tests: list[str]) -> None:
        """Run these properties on a mutant, as long as there is time."""
        os.setsid()
        gc.disable()
        os.environ["MUTANT_UNDER_TEST"] = mutant
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        end, items = time.process_time() + SECONDS, [self.items[test] for test in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            if time.process_time() < end:  # the conformance plugin stops what takes too long
                item.config.option.conformance_timeout = 15 + 20 * self.noted[item.nodeid][0]
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)


def _function(mutant: str) -> str:
    return mutant.partition("__mutmut_")[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def main(modules: list[str]) -> None:
    """Run the mutants of these modules and print the share of each that was ever run."""
    settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    shutil.rmtree(TREE, ignore_errors=True)
    for folder in ("lora", "tests", "spec"):
        shutil.copytree(folder, TREE / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("conftest.py", "pyproject.toml"):
        shutil.copyfile(file, TREE / file)
    mutants = {module: make(module) for module in modules or settings["only_mutate"]}
    os.chdir(TREE)
    sys.path[0] = str(TREE)
    tests = settings["pytest_add_cli_args_test_selection"]
    pytest.main([*OPTIONS, *tests], plugins=[Runner(mutants)])
    sys.stdout.write("\n".join(shares(TREE.parent)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
