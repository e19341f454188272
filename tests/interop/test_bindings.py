"""Other implementations under the suite: what one does otherwise is declared with its reason."""

import pytest

from lora.testing.plugin import requirement
from lora.testing.report import run_suite

pytestmark = pytest.mark.slow


@requirement("R24.1", "R24.2")
def test_peft_does_what_it_does_not_declare_to_do_otherwise(monkeypatch):
    monkeypatch.setenv("LORA_PROFILE", "quick")
    entries = run_suite("tests.bindings.peft:BINDING")["requirements"]
    verdicts = {i: entry["verdict"] for i, entry in entries.items()}
    assert {"failed", "unexpected pass"}.isdisjoint(verdicts.values())
    assert {verdicts[i] for i in ("R2.2", "R8.2", "R20.2")} == {"passed"}
    assert {verdicts[i] for i in ("R3.11", "R20.6")} == {"expected failure"}
    assert {verdicts[i] for i in ("R1.4", "R4.4")} == {"skipped"}
    expected = [entry for entry in entries.values() if entry["verdict"] == "expected failure"]
    assert all(entry["reason"] for entry in expected)


@requirement("R24.1", "R24.2")
def test_an_implementation_of_numpy_alone_passes_whatever_any_implementation_is_held_to(
    monkeypatch,
):
    monkeypatch.setenv("LORA_PROFILE", "quick")
    entries = run_suite("tests.bindings.numpy_only:BINDING")["requirements"]
    assert {i: e["verdict"] for i, e in entries.items() if e["verdict"] != "passed"} == {}
