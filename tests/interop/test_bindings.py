"""Other implementations under the suite: what one does otherwise is declared with its reason."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from lora.testing import serve
from lora.testing.plugin import requirement
from lora.testing.report import run_suite
from tests.bindings import numpy_only

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


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


def served_alone(folder):
    """A command that serves the binding where there is neither this library nor torch."""
    shutil.copy(serve.__file__, folder / "serve.py")
    text = Path(numpy_only.__file__).read_text("utf-8")
    (folder / "own.py").write_text(text.replace("lora.testing.binding", "serve"))
    start = "import runpy, sys; sys.modules.update(dict.fromkeys(['lora', 'torch']));"
    start += "sys.argv = ['', 'own.py']; runpy.run_path('serve.py', run_name='__main__')"
    return shlex.join([sys.executable, "-c", start])


@requirement("R24.1", "R24.2", "R24.7")
@pytest.mark.parametrize("is_process", [False, True], ids=["here", "in a process"])
def test_an_implementation_of_numpy_alone_passes_whatever_any_implementation_is_held_to(
    monkeypatch, tmp_path, is_process
):
    monkeypatch.setenv("LORA_PROFILE", "quick")
    if is_process:
        command = served_alone(tmp_path)
        monkeypatch.chdir(tmp_path)
        report = run_suite(None, command=command)
    else:
        report = run_suite("tests.bindings.numpy_only:BINDING")
    assert report["binding"] == {"name": "numpy-only", "version": "1"}
    entries = report["requirements"]
    assert {i: e["verdict"] for i, e in entries.items() if e["verdict"] != "passed"} == {}
    tests = {test["test"]: test["examples"] for e in entries.values() for test in e["tests"]}
    assert sum(tests.values()) > 4000


@requirement("R24.7")
@pytest.mark.foreign
def test_an_implementation_in_javascript_passes_what_it_has(monkeypatch):
    monkeypatch.setenv("LORA_PROFILE", "quick")
    monkeypatch.chdir(ROOT / "docs/examples")
    report = run_suite(None, command="node binding.mjs")
    entries = report["requirements"]
    verdicts = {i: entry["verdict"] for i, entry in entries.items()}
    assert {i for i in verdicts if i.startswith(("R2.", "R4.", "R8.", "R9."))} | {"R3.11"} == {
        i for i, verdict in verdicts.items() if verdict == "passed"
    }
    assert {v for v in verdicts.values() if v != "passed"} == {"skipped"}
    tests = {test["test"]: test for entry in entries.values() for test in entry["tests"]}
    narrow = tests["test_r02_adapted_layer.py::test_sums_are_accumulated_in_float32_or_better"]
    assert narrow["verdict"] == "skipped"
    assert re.fullmatch(r"forward is declared without b?float16", narrow["reason"])
