"""Verdicts of the conformance suite: one for each requirement, whatever a binding does."""

import pytest

from lora.errors import ArgumentError
from lora.testing.plugin import Subject, load_binding, requirement
from lora.testing.report import run_suite, verdict_of


@pytest.mark.parametrize(
    ("verdicts", "declared", "verdict"),
    [
        (["passed", "passed"], False, "passed"),
        (["passed", "failed"], False, "failed"),
        (["skipped", "passed"], False, "passed"),
        (["skipped"], False, "skipped"),
        (["expected failure", "passed"], True, "expected failure"),
        (["passed"], True, "unexpected pass"),
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
    monkeypatch.setattr("lora.testing.reference.Reference.expected_failures", {"R99.1": "?"}, raising=False)
    with pytest.raises(ArgumentError, match=r"R99\.1"):
        load_binding(None)
