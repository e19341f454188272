"""Verdicts of the conformance suite: outcomes of tests in, one verdict for each requirement out, as
JSON or a table.

Requirements: R24.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lora
from lora.errors import ArgumentError, MissingPackageError
from lora.store import replacing
from lora.testing.trace import Requirement, read_spec

SCHEMA_VERSION = 1
"""Of the JSON that `write_report` writes."""

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Outcome:
    """How one property went: passed, failed, skipped, expected failure; on which example, or why it
    was skipped.
    """

    test: str
    requirements: tuple[str, ...]
    verdict: str
    examples: int
    falsified: str = ""


def suite_folder() -> Path:
    """The properties: in the wheel beside this file, in a checkout under ``tests/properties``."""
    packed = HERE / "properties"
    return packed if packed.is_dir() else HERE.parents[1] / "tests" / "properties"


@lru_cache(1)
def read_statements() -> Mapping[str, Requirement]:
    """The specification: in the wheel beside this file, in a checkout under ``spec``."""
    packed = HERE / "spec"
    return read_spec(packed if packed.is_dir() else HERE.parents[1] / "spec")


def report_of(
    binding: Any, outcomes: Sequence[Outcome], *, profile: str, seed: str = "random"
) -> dict[str, Any]:
    """The report on a binding: per requirement a verdict and its tests.

    A requirement is *failed* if any of its tests failed, an *expected failure* if one did and the
    binding says why, *skipped* if all were, *passed* if the rest passed, an *unexpected pass* if it
    was declared to fail and did not.
    """
    expected = dict(getattr(binding, "expected_failures", {}))
    requirements = {}
    for name, statement in read_statements().items():
        mine = [outcome for outcome in outcomes if name in outcome.requirements]
        if mine:
            verdict = verdict_of([outcome.verdict for outcome in mine], declared=name in expected)
            requirements[name] = {
                "statement": statement.sentence,
                "revision": statement.revision,
                "verdict": verdict,
                "reason": expected.get(name, mine[0].falsified if verdict == "skipped" else ""),
                "tests": [asdict(outcome) for outcome in mine],
            }
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": lora.__version__,
        "binding": {"name": binding.name, "version": binding.version},
        "profile": profile,
        "seed": seed,
        "requirements": requirements,
    }


def verdict_of(verdicts: Sequence[str], *, declared: bool) -> str:
    """One requirement's verdict from those of its tests: failed, passed, expected failure, skipped,
    unexpected pass.
    """
    found = set(verdicts)
    if declared:
        red = {"failed", "expected failure"} & found
        return (
            "expected failure" if red else "skipped" if found == {"skipped"} else "unexpected pass"
        )
    return next(
        verdict
        for verdict in ("failed", "passed", "expected failure", "skipped")
        if verdict in found
    )


def red(report: Mapping[str, Any]) -> list[str]:
    """The requirements that failed without being declared to."""
    return [name for name, entry in report["requirements"].items() if entry["verdict"] == "failed"]


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    with replacing(path) as file:
        file.write(
            json.dumps(report, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n"
        )


def run_suite(
    binding: str | None,
    *,
    only: str | None = None,
    junit: Path | None = None,
    timeout: float = 300.0,
) -> dict[str, Any]:
    """Run the suite against a binding in a process of its own; pytest's own output goes to stderr.

    Args:
        binding: ``package.module:NAME``; None for the reference.
        only: A chapter or requirement.
        junit: Where to write JUnit XML.
        timeout: Seconds that one property may take.

    Raises:
        MissingPackageError: If pytest or Hypothesis is not installed.
        ArgumentError: If no property is selected, or the suite can't run.
    """
    if only is not None and not any(
        only in (name, name.partition(".")[0]) for name in read_statements()
    ):
        raise ArgumentError("--only", "a known chapter or requirement", repr(only))
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        hint = "pip install 'lora-cards[test]'"
        raise MissingPackageError(
            "conformance suite", "pytest and hypothesis", "not installed", hint
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            os.devnull,
            "--rootdir",
            folder,
            "-q",
            "--tb=no",
        ]
        command += [
            "-p",
            "lora.testing.plugin",
            "-p",
            "no:cacheprovider",
            "-W",
            "error",
            "--neutral",
        ]
        command += ["--conformance-json", str(path), "--conformance-timeout", str(timeout)]
        command += [
            *(["--binding", binding] if binding else []),
            *(["--only", only] if only else []),
        ]
        command += [*([f"--junit-xml={junit.absolute()}"] if junit else []), str(suite_folder())]
        paths = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": paths}
        run = subprocess.run(  # noqa: S603
            command,
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
        if run.returncode not in (0, 1) or not path.is_file():
            said = (
                run.stderr.strip().rpartition("\n")[2] or f"pytest's exit status {run.returncode}"
            )
            raise ArgumentError("conformance suite", "a run with verdicts", said)
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report
