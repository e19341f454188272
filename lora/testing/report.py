"""Run the conformance suite, and turn the outcomes of its tests into one verdict a requirement.

Requirements: R24.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any

import lora
from lora.errors import ArgumentError, MissingPackageError, shown
from lora.files import replacing
from lora.testing import folder_of
from lora.testing.domains import check_domains
from lora.testing.requirements import Requirement, read_spec

SCHEMA_VERSION = 1
"""Version of the JSON that `write_report` writes."""

VERDICTS = ("failed", "broken", "unexpected pass", "expected failure", "passed", "skipped")
"""What a requirement or a property may be; a requirement is the first that one of its tests is."""

BROKEN = "binding broken: "
"""How the cause begins where the binding does not take the simplest legal input."""

_COUNT = re.compile(r"\[ *(\d+)/(\d+)\]$")

CLASSES = ("law", "convention", "refusal", "format")
"""What a property may be: a law, which mathematics demands of anyone; a convention, which is a
choice of the specification; a refusal of what is wrong; a rule of the file format.
"""


@dataclass(frozen=True)
class Outcome:
    """How one property went.

    Args:
        verdict: "passed", "failed", "broken" or "skipped".
        falsified: The failing example, or the reason of a skip.
        kind: One of `CLASSES`.
    """

    test: str
    requirements: tuple[str, ...]
    verdict: str
    examples: int
    falsified: str = ""
    kind: str = ""


@lru_cache(1)
def read_statements() -> Mapping[str, Requirement]:
    """Return the specification by id."""
    return read_spec(folder_of("spec"))


def lock_digest() -> str:
    """Return 12 digits of the SHA-256 of ``spec/lock.toml``: which sentences were held."""
    return hashlib.sha256((folder_of("spec") / "lock.toml").read_bytes()).hexdigest()[:12]


@lru_cache(1)
def read_properties() -> frozenset[str]:
    """Return the names of the properties, such as "test_r04_router.py::test_a_query_is_routed"."""
    return frozenset(
        f"{path.name}::{name}"
        for path in folder_of("tests/properties").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(\s*impl\b", path.read_text("utf-8"), re.MULTILINE)
    )


def check_declared(binding: Any, where: str) -> None:
    """Refuse a binding that declares unknown domains, or failures of unknown properties."""
    check_domains(getattr(binding, "domains", {}), f"{where}: domains")
    for name, failures in getattr(binding, "expected_failures", {}).items():
        expected = "a known requirement, and its properties with (reason, place)"
        if name not in read_statements() or not isinstance(failures, Mapping):
            raise ArgumentError(f"{where}: expected_failures", expected, shown({name: failures}))
        for test, why in failures.items():
            is_known = str(test).partition("[")[0] in read_properties()
            is_reasoned = isinstance(why, tuple) and len(why) == 2
            if not (is_known and is_reasoned and all(str(text).strip() for text in why)):
                raise ArgumentError(f"{where}: {name}", expected, shown({test: why}))


def report_of(
    binding: Any, outcomes: Sequence[Outcome], *, profile: str, seed: str = "random"
) -> dict[str, Any]:
    """Return the report on a binding: for each requirement and class a verdict, and its tests."""
    expected = getattr(binding, "expected_failures", {})
    requirements = {}
    for name, statement in read_statements().items():
        declared = expected.get(name, {})
        tests = [
            _judged(outcome, *declared.get(outcome.test, ()))
            for outcome in outcomes
            if name in outcome.requirements
        ]
        if tests:
            verdict = verdict_of([test["verdict"] for test in tests])
            reasons = [test["reason"] for test in tests if test["verdict"] == verdict]
            requirements[name] = {
                "statement": statement.sentence,
                "revision": statement.revision,
                "verdict": verdict,
                "reason": "; ".join(dict.fromkeys(filter(None, reasons))),
                "classes": {
                    kind: verdict_of([test["verdict"] for test in tests if test["class"] == kind])
                    for kind in CLASSES
                    if any(test["class"] == kind for test in tests)
                },
                "tests": tests,
            }
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": lora.__version__,
        "specification": lock_digest(),
        "binding": {"name": binding.name, "version": binding.version},
        "profile": profile,
        "seed": seed,
        "requirements": requirements,
    }


def _judged(outcome: Outcome, reason: str = "", place: str = "") -> dict[str, Any]:
    verdict = outcome.verdict
    if reason and verdict in ("passed", "failed"):
        verdict = "unexpected pass" if verdict == "passed" else "expected failure"
    return {
        "test": outcome.test,
        "class": outcome.kind,
        "verdict": verdict,
        "examples": outcome.examples,
        "falsified": outcome.falsified,
        "reason": outcome.falsified if verdict in ("skipped", "broken") else reason,
        "place": place,
    }


def verdict_of(verdicts: Collection[str]) -> str:
    """Return the verdict on a requirement whose tests have these: no test hides another."""
    return next(verdict for verdict in VERDICTS if verdict in verdicts)


def red(report: Mapping[str, Any]) -> list[str]:
    """Return the requirements that failed without being declared to, or could not be tested."""
    entries = report["requirements"].items()
    return [name for name, entry in entries if entry["verdict"] in VERDICTS[:2]]


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a report as text, failures first, each with what to paste to see it again."""
    entries, seen = report["requirements"], set[str]()
    broken = [
        (test["reason"], name)
        for name, entry in entries.items()
        for test in entry["tests"]
        if test["verdict"] == "broken"
    ]
    for reason in dict.fromkeys(reason for reason, _ in broken):
        ids = dict.fromkeys(name for cause, name in broken if cause == reason)
        yield f"{reason}\n  not tested: {', '.join(ids)}"
    for verdict in ("failed", *VERDICTS[2:4]):
        for name, entry in entries.items():
            if entry["verdict"] == verdict:
                yield f"{name} {verdict}: {entry['statement']}"
                yield from _evidence(entry, seen)
    reasons: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if entry["verdict"] in VERDICTS[4:]:
            reasons.setdefault(f"{entry['verdict']} {entry['reason']}".strip(), []).append(name)
    for reason, names in sorted(reasons.items()):
        yield f"{reason}: {', '.join(names)}"
    for kind in CLASSES:
        verdicts = [e["classes"][kind] for e in entries.values() if kind in e["classes"]]
        if verdicts:
            yield f"{kind}: {_counted(verdicts)}"
    tests = {test["test"]: test["examples"] for e in entries.values() for test in e["tests"]}
    numbers = _counted([entry["verdict"] for entry in entries.values()])
    yield (
        f"{len(entries)} requirements: {numbers}; {sum(tests.values())} examples, "
        f"profile {report['profile']}, seed {report['seed']}, suite {report['suite']}, "
        f"specification {report['specification']}"
    )


def _evidence(entry: Mapping[str, Any], seen: set[str]) -> Iterator[str]:
    for test in entry["tests"]:
        if test["verdict"] == entry["verdict"]:
            why = f"{test['reason']} ({test['place']})"
            if test["verdict"] == "failed":
                why = "as above" if test["test"] in seen else test["falsified"]
            kind = f" ({test['class']})" if test["class"] else ""
            path = folder_of("tests/properties") / test["test"]
            yield f"  {path}{kind}\n{indent(why, '    ')}"
            seen.add(test["test"])


def _counted(verdicts: Sequence[str]) -> str:
    counts = Counter(verdicts)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    text = json.dumps(report, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def run_suite(
    binding: str | None,
    *,
    command: str | None = None,
    writer: str | None = None,
    only: Sequence[str] = (),
    junit: Path | None = None,
    timeout: float = 300.0,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> dict[str, Any]:
    """Run the suite against a binding in a process of its own.

    Args:
        binding: ``package.module:NAME``; None for this library.
        command: Program and arguments that serve a binding, in place of that.
        writer: Such a name or program, which writes the cards that the binding reads.
        only: Chapters and requirements; default: all.
        junit: Where to write JUnit XML.
        timeout: Seconds that one property may take.
        progress: Called after each property with the number of those done, and of all.

    Raises:
        MissingPackageError: pytest or Hypothesis is not installed.
        ArgumentError: No property is selected, or the suite can't run.
    """
    for name in only:
        named = [s for s in read_statements().values() if name in (s.id, s.id.partition(".")[0])]
        if not named:
            raise ArgumentError("--only", "a known chapter or requirement", repr(name))
        if all(statement.evidence != "P*" for statement in named):
            expected = "a requirement that any implementation can be held to (P*)"
            raise ArgumentError("--only", expected, f"{name!r}, of this library alone")
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        hint = "pip install 'lora-cards[test]'"
        raise MissingPackageError("conformance suite", "pytest, hypothesis", "not installed", hint)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        options = ["-c", os.devnull, "--rootdir", folder, "-v", "--tb=no", "-W", "error"]
        options += ["-o", "console_output_style=count"]
        options += ["-p", "lora.testing.plugin", "-p", "no:cacheprovider", "--neutral"]
        options += [f"--conformance-json={path}", f"--conformance-timeout={timeout}"]
        options += [f"--binding={binding}"] if binding is not None else []
        options += [f"--binding-command={command}"] if command is not None else []
        options += [f"--binding-writer={writer}"] if writer is not None else []
        options += [f"--only={name}" for name in only]
        options += [f"--junit-xml={junit.absolute()}"] if junit else []
        options += [str(folder_of("tests/properties"))]
        pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True}
        with (Path(folder) / "errors").open("w+", encoding="utf-8") as errors:
            pytest = [sys.executable, "-m", "pytest", *options]
            with subprocess.Popen(pytest, stderr=errors, **pipe) as run:  # noqa: S603 - this interpreter
                for line in run.stdout or ():
                    if count := _COUNT.search(line):
                        progress(int(count[1]), int(count[2]))
            errors.seek(0)
            last_line = errors.read().strip().rpartition("\n")[2]
        if refusal := re.fullmatch("ERROR: (.*?): expected (.*?), found (.*)", last_line):
            raise ArgumentError(*refusal.groups())
        if run.returncode not in (0, 1) or not path.is_file():
            status = f"pytest's exit status {run.returncode}"
            raise ArgumentError("conformance suite", "a run with verdicts", last_line or status)
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report
