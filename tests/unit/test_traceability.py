"""Every built requirement has evidence of its kind, and nothing names one that does not exist."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from lora.testing.plugin import requirement
from lora.testing.requirements import SpecError, read_spec
from tests.trace import faults, lock_faults, lock_text, read_code, read_lock, read_tests

ROOT = Path(__file__).parents[2]

ENTRY = """# R1 Cards

## R1.1
- revision: 1
- evidence: {evidence}
- status: {status}

The card shall hold
a name.

Note: nothing.
"""


@requirement("R9.4")
def test_a_card_is_followed_from_end_to_end():
    story = [e.ids for e in read_tests(ROOT / "tests") if e.test.startswith("unit/test_end_to_end")]
    assert ("R9.4", "R5.3", "R1.13", "R5.6") in story


@requirement("R9.8")
def test_every_built_requirement_is_traced_to_evidence_of_its_kind():
    tests = read_tests(ROOT / "tests")
    assert len(tests) > 100
    assert faults(read_spec(ROOT / "spec"), tests, read_code(ROOT / "lora")) == []


@requirement("R9.1", "R9.2", "R9.3", "R9.6")
@pytest.mark.parametrize("chapter", ["R1", "R2", "R3", "R7"])
def test_format_layer_manager_and_errors_are_tested_in_full(chapter):
    """By tests of the kind that each requirement needs, none of which may be skipped."""
    spec = read_spec(ROOT / "spec")
    entries = {i: entry for i, entry in spec.items() if i.startswith(f"{chapter}.")}
    assert sum(entry.status == "built" for entry in entries.values()) > 8
    assert faults(entries, [*_of(entries, read_tests(ROOT / "tests"))], {}) == []


def _of(entries, tests):
    for evidence in tests:
        if ids := tuple(i for i in evidence.ids if i in entries):
            yield replace(evidence, ids=ids)


@requirement("R9.1", "R9.2", "R9.3", "R9.6", "R9.7")
def test_no_failure_of_a_test_is_overlooked():
    """All tests run before a change lands; a warning or an unexpected pass is a failure."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests", "README.md", "docs"]
    assert options["addopts"][-2:] == ["-m", "not foreign and not slow"]
    assert (options["xfail_strict"], options["filterwarnings"]) == (True, ["error"])
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert {"make test", "make test-slow"} <= set(lines)
    recipes = (ROOT / "Makefile").read_text()
    assert "$(BIN)/python -m pytest -n 2 --dist worksteal --conformance-json" in recipes
    assert "$(BIN)/python -m pytest -n 2 --dist worksteal -m slow --junit-xml" in recipes
    xfails = "mark." + "xfail"
    assert not [p for p in (ROOT / "tests").rglob("*.py") if xfails in p.read_text()]


def spec_of(folder, evidence="P", status="built", name="R01-cards.md", text=ENTRY):
    (folder / name).write_text(text.format(evidence=evidence, status=status))
    return read_spec(folder)


def evidence_in(folder, text):
    (folder / "test_x.py").write_text(text)
    return read_tests(folder)


@requirement("R9.8")
def test_an_entry_is_read_whole(tmp_path):
    entry = spec_of(tmp_path)["R1.1"]
    assert (entry.chapter, entry.revision) == ("R1 Cards", 1)
    assert (entry.evidence, entry.status) == ("P", "built")
    assert entry.sentence == "The card shall hold a name."


@requirement("R9.8")
@pytest.mark.parametrize(
    ("evidence", "source", "traced"),
    [
        ("P*", "@requirement('R1.1')\n@given(x=y)\ndef test_a(impl, x): ...", True),
        ("P*", "@requirement('R1.1')\n@given(x=y)\ndef test_a(x): ...", False),
        ("P", "@requirement('R1.1')\n@given(x=y)\ndef test_a(x): ...", True),
        ("P", "@requirement('R1.1')\ndef test_a(): ...", False),
        ("P", "TestIt = requirement('R1.1')(Machine.TestCase)", True),
        ("U", "@requirement('R1.1')\nclass TestA:\n    def test_a(self): ...", True),
        ("U", "def test_a(): ...", False),
        ("U", "@requirement('R1.1')\ndef helper(): ...", False),
        ("U", "@requirement('R1.1')\n@pytest.mark.skipif(x)\ndef test_a(): ...", False),
        ("U", "pytestmark = pytest.mark.skip\n@requirement('R1.1')\ndef test_a(): ...", False),
    ],
)
def test_only_evidence_of_the_right_kind_counts(tmp_path, evidence, source, traced):
    spec, tests = spec_of(tmp_path, evidence), evidence_in(tmp_path, source)
    assert (faults(spec, tests, {}) == []) is traced
    assert faults(spec_of(tmp_path, evidence, "planned"), tests, {}) == []


@requirement("R9.8")
def test_unknown_ids_are_faults_in_tests_and_in_code(tmp_path):
    spec = spec_of(tmp_path, status="planned")
    tests = evidence_in(tmp_path, "@requirement('R9.99')\ndef test_a(): ...")
    assert len(faults(spec, tests, {"R88": ["card.py"]})) == 2


@requirement("R9.8")
def test_the_specification_says_what_is_locked():
    assert lock_faults(read_spec(ROOT / "spec"), read_lock(ROOT / "spec" / "lock.toml")) == []


@requirement("R9.8")
def test_a_sentence_that_changes_needs_a_new_revision_and_a_new_lock(tmp_path):
    (tmp_path / "lock.toml").write_text(lock_text(spec_of(tmp_path)))
    lock = read_lock(tmp_path / "lock.toml")
    assert lock_faults(spec_of(tmp_path, text=ENTRY.replace("hold\na", "hold a")), lock) == []
    (unnoticed,) = lock_faults(spec_of(tmp_path, text=ENTRY.replace("a name", "no name")), lock)
    assert "raise the revision" in unnoticed
    raised = ENTRY.replace("a name", "no name").replace("revision: 1", "revision: 2")
    (unlocked,) = lock_faults(spec_of(tmp_path, text=raised), lock)
    assert "run spec/lock.py" in unlocked
    assert len(lock_faults({}, lock)) == len(lock_faults(spec_of(tmp_path), {})) == 1


@requirement("R9.8")
@pytest.mark.parametrize(
    ("pin", "revision", "outdated"),
    [("R1.1@1", 1, False), ("R1.1@2", 1, True), ("R1.1@1", 2, True), ("R1.1", 2, False)],
)
def test_a_test_that_is_pinned_to_another_revision_is_outdated(tmp_path, pin, revision, outdated):
    tests = evidence_in(tmp_path, f"@requirement('{pin}')\n@given(x=y)\ndef test_a(x): ...")
    spec = spec_of(tmp_path, text=ENTRY.replace("revision: 1", f"revision: {revision}"))
    assert any("is outdated" in fault for fault in faults(spec, tests, {})) is outdated


@requirement("R9.8")
def test_malformed_duplicate_and_misplaced_entries_are_refused(tmp_path):
    malformed = ENTRY.replace("- status", "- state")
    for name, text in (("R01", malformed), ("R01", ENTRY + ENTRY), ("R02", ENTRY)):
        with pytest.raises(SpecError):
            spec_of(tmp_path, name=f"{name}-x.md", text=text)
        (tmp_path / f"{name}-x.md").unlink()
    with pytest.raises(SpecError):  # ids are literals
        evidence_in(tmp_path, "@requirement(x)\ndef test_a(): ...")
