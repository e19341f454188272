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
    """The suite is not measured: an alarm that goes off while coverage holds its lock would stop it for good."""
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
    found = report["requirements"]["R3.11"]
    assert found["verdict"] == "failed"
    assert sum(test["examples"] for test in found["tests"]) > 10
    assert any("test_" in test["falsified"] for test in found["tests"])
    good = run_suite("tests.bindings.numpy_only:BINDING", only="R4.4")["requirements"]["R4.4"]
    assert (good["verdict"], good["reason"]) == ("passed", "")


@requirement("R24.1", "R24.5")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Raising", "RuntimeError: out of order"),
        pytest.param("Hanging", "no verdict after 20", marks=pytest.mark.slow),
        pytest.param("Mute", "AssertionError", marks=pytest.mark.slow),
    ],
)
def test_a_binding_that_does_not_answer_has_its_verdict_and_the_rest_still_runs(
    kind, said, tmp_path
):
    report = run_suite(
        f"tests.bindings.broken:{kind}", only="R4", timeout=20, junit=tmp_path / "junit.xml"
    )
    verdicts = {name: entry["verdict"] for name, entry in report["requirements"].items()}
    assert verdicts["R4.10"] == "failed"
    assert "R4.10" in red(report)
    assert set(verdicts.values()) == {"failed", "passed"}
    assert any(said in test["falsified"] for test in report["requirements"]["R4.10"]["tests"])
    assert report["seed"] in ("random", "derandomized")
    assert (tmp_path / "junit.xml").read_text().count("<testcase") == len(
        {test["test"] for entry in report["requirements"].values() for test in entry["tests"]}
    )


@requirement("R24.1")
def test_the_command_prints_every_verdict_and_fails_with_an_undeclared_one(tmp_path):
    command = [sys.executable, "-m", "lora.cli", "conformance", "--only", "R3.11"]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (good.returncode, "R3.11" in good.stdout, "passed" in good.stdout) == (0, True, True)
    bad = subprocess.run(
        [
            *command,
            "--binding",
            "tests.faults.targets:Substring",
            "--json",
            str(tmp_path / "verdicts.json"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (bad.returncode, bad.stderr.splitlines()[-1]) == (
        1,
        "lora: 1 of 1 requirements failed: R3.11",
    )
    assert json.loads((tmp_path / "verdicts.json").read_text())["schema_version"] == SCHEMA_VERSION
    for options, said in (
        (
            ["--binding", "nowhere:NOTHING"],
            "binding 'nowhere:NOTHING': expected package.module:NAME",
        ),
        (["--only", "R99"], "expected a known chapter or requirement, found 'R99'"),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stderr.splitlines()[-1]) == (1, True)


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
    monkeypatch.setattr(
        "lora.testing.reference.Reference.expected_failures", {"R99.1": "?"}, raising=False
    )
    with pytest.raises(ArgumentError, match=r"R99\.1"):
        load_binding(None)
