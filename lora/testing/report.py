"""Run the conformance suite, and turn the outcomes of its tests into one verdict a requirement.

Requirements: R24.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lora
from lora.errors import ArgumentError, MissingPackageError
from lora.files import replacing
from lora.testing import folder_of
from lora.testing.requirements import Requirement, read_spec

SCHEMA_VERSION = 1
"""Version of the JSON that `write_report` writes."""


@dataclass(frozen=True)
class Outcome:
    """How one property went.

    Args:
        verdict: "passed", "failed", "skipped" or "expected failure".
        falsified: The failing example, or the reason of a skip.
    """

    test: str
    requirements: tuple[str, ...]
    verdict: str
    examples: int
    falsified: str = ""


@lru_cache(1)
def read_statements() -> Mapping[str, Requirement]:
    """Return the specification by id."""
    return read_spec(folder_of("spec"))


def report_of(
    binding: Any, outcomes: Sequence[Outcome], *, profile: str, seed: str = "random"
) -> dict[str, Any]:
    """Return the report on a binding: for each requirement a verdict and its tests."""
    expected = dict(getattr(binding, "expected_failures", {}))
    requirements = {}
    for name, statement in read_statements().items():
        tests = [outcome for outcome in outcomes if name in outcome.requirements]
        if tests:
            verdict = verdict_of({test.verdict for test in tests}, declared=name in expected)
            requirements[name] = {
                "statement": statement.sentence,
                "revision": statement.revision,
                "verdict": verdict,
                "reason": expected.get(name, tests[0].falsified if verdict == "skipped" else ""),
                "tests": [asdict(test) for test in tests],
            }
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": lora.__version__,
        "binding": {"name": binding.name, "version": binding.version},
        "profile": profile,
        "seed": seed,
        "requirements": requirements,
    }


def verdict_of(verdicts: Collection[str], *, declared: bool) -> str:
    """Return the verdict on a requirement whose tests have these verdicts.

    Args:
        declared: Whether the binding declares that the requirement fails. If it passes all the
            same, that is an "unexpected pass".
    """
    if not declared:
        order = ("failed", "passed", "expected failure", "skipped")
        return next(verdict for verdict in order if verdict in verdicts)
    if {"failed", "expected failure"} & set(verdicts):
        return "expected failure"
    return "skipped" if set(verdicts) == {"skipped"} else "unexpected pass"


def red(report: Mapping[str, Any]) -> list[str]:
    """Return the requirements that failed without being declared to."""
    return [name for name, entry in report["requirements"].items() if entry["verdict"] == "failed"]


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    text = json.dumps(report, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def run_suite(
    binding: str | None,
    *,
    only: str | None = None,
    junit: Path | None = None,
    timeout: float = 300.0,
) -> dict[str, Any]:
    """Run the suite against a binding in a process of its own; pytest's output goes to stderr.

    Args:
        binding: ``package.module:NAME``; None for this library.
        only: A chapter or a requirement.
        junit: Where to write JUnit XML.
        timeout: Seconds that one property may take.

    Raises:
        MissingPackageError: pytest or Hypothesis is not installed.
        ArgumentError: No property is selected, or the suite can't run.
    """
    if only and not any(only in (name, name.partition(".")[0]) for name in read_statements()):
        raise ArgumentError("--only", "a known chapter or requirement", repr(only))
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        hint = "pip install 'lora-cards[test]'"
        raise MissingPackageError("conformance suite", "pytest, hypothesis", "not installed", hint)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        options = ["-c", os.devnull, "--rootdir", folder, "-q", "--tb=no", "-W", "error"]
        options += ["-p", "lora.testing.plugin", "-p", "no:cacheprovider", "--neutral"]
        options += [f"--conformance-json={path}", f"--conformance-timeout={timeout}"]
        options += [f"--binding={binding}"] if binding else []
        options += [f"--only={only}"] if only else []
        options += [f"--junit-xml={junit.absolute()}"] if junit else []
        paths = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
        run = subprocess.run(  # noqa: S603 - this interpreter
            [sys.executable, "-m", "pytest", *options, str(folder_of("tests/properties"))],
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
        if run.returncode not in (0, 1) or not path.is_file():
            status = f"pytest's exit status {run.returncode}"
            last_line = run.stderr.strip().rpartition("\n")[2] or status
            raise ArgumentError("conformance suite", "a run with verdicts", last_line)
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report
