"""Verdicts of the conformance suite: one for each requirement, whatever a binding does."""

import json
import os
import subprocess
import sys

import pytest

from lora.errors import ArgumentError
from lora.testing.plugin import Subject, load_binding, requirement
from lora.testing.report import SCHEMA_VERSION, red, run_suite, verdict_of


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch):
    """No coverage: an alarm that goes off while coverage holds its lock would stop it for good."""
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("verdicts", "declared", "verdict"),
    [
        (["passed", "passed"], False, "passed"),
        (["passed", "failed"], False, "failed"),
        (["skipped", "passed"], False, "passed"),
        (["skipped"], False, "skipped"),
        (["expected failure", "passed"], True, "expected failure"),
        (["passed"], True, "unexpected pass"),
        (["expected failure", "passed"], False, "passed"),
        (["expected failure", "skipped"], False, "expected failure"),
        (["expected failure", "failed"], False, "failed"),
        (["skipped"], True, "skipped"),
    ],
)
def test_a_requirement_has_one_verdict(verdicts, declared, verdict):
    assert verdict_of(verdicts, declared=declared) == verdict


@requirement("R24.1", "R24.5")
def test_a_run_says_what_failed_and_on_which_example():
    report = run_suite("tests.faults.targets:Substring", only="R3.11")
    assert list(report["requirements"]) == ["R3.11"]
    entry = report["requirements"]["R3.11"]
    assert entry["verdict"] == "failed"
    assert sum(test["examples"] for test in entry["tests"]) > 10
    assert any("test_" in test["falsified"] for test in entry["tests"])
    good = run_suite("tests.bindings.numpy_only:BINDING", only="R4.4")["requirements"]["R4.4"]
    assert (good["verdict"], good["reason"]) == ("passed", "")


@requirement("R24.1", "R24.5")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param("Raising", "RuntimeError: out of order", marks=pytest.mark.slow),
        pytest.param("Hanging", "no verdict after 20", marks=pytest.mark.slow),
        pytest.param("Mute", "AssertionError", marks=pytest.mark.slow),
    ],
)
def test_a_binding_that_does_not_answer_has_its_verdict_and_the_rest_runs(kind, said, tmp_path):
    junit = tmp_path / "junit.xml"
    report = run_suite(f"tests.bindings.broken:{kind}", only="R4", timeout=20, junit=junit)
    entries = report["requirements"]
    assert entries["R4.10"]["verdict"] == "failed"
    assert "R4.10" in red(report)
    assert {entry["verdict"] for entry in entries.values()} == {"failed", "passed"}
    assert any(said in test["falsified"] for test in entries["R4.10"]["tests"])
    assert report["seed"] in ("random", "derandomized")
    tests = {test["test"] for entry in entries.values() for test in entry["tests"]}
    assert junit.read_text().count("<testcase") == len(tests)


@requirement("R24.1")
def test_the_command_prints_every_verdict_and_fails_with_an_undeclared_one(tmp_path):
    def conformance(*options):
        command = [sys.executable, "-m", "lora.cli", "conformance", "--only", "R3.11", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr.splitlines()[-1:]

    code, out, _ = conformance()
    assert (code, "R3.11" in out, "passed" in out) == (0, True, True)
    path = tmp_path / "verdicts.json"
    code, _, error = conformance(
        "--binding", "tests.faults.targets:Substring", "--json-file", str(path)
    )
    assert (code, error) == (1, ["lora: 1 of 1 requirements failed: R3.11"])
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION
    for option, value, said in (
        ("--binding", "nowhere:NOTHING", "binding 'nowhere:NOTHING': expected package.module:NAME"),
        ("--only", "R99", "expected a known chapter or requirement, found 'R99'"),
    ):
        code, _, (error,) = conformance(option, value)
        assert (code, said in error) == (1, True)


@requirement("R24.2")
def test_what_a_binding_declares_missing_skips_and_what_it_lacks_fails_when_used():
    class Partial:
        name, version, missing = "partial", "1", {"make_router": "it has none"}

    subject = Subject(Partial())
    with pytest.raises(pytest.skip.Exception, match="it has none"):
        subject.make_router(len)
    with pytest.raises(NotImplementedError, match="forward"):
        subject.forward()


@requirement("R24.2")
def test_a_binding_that_is_not_there_or_expects_unknown_ids_is_refused(monkeypatch):
    for path in ("nowhere:BINDING", "lora.testing.reference:NOTHING"):
        with pytest.raises(ArgumentError, match="binding"):
            load_binding(path)
    failures = "lora.testing.reference.Reference.expected_failures"
    monkeypatch.setattr(failures, {"R99.1": "?"}, raising=False)
    with pytest.raises(ArgumentError, match=r"R99\.1"):
        load_binding(None)
