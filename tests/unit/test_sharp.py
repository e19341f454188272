"""Violations on record can still be made, and the runner tells a red test from a green one."""

import json
import subprocess
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import tests.sharp.__main__ as runner
from lora.testing.plugin import requirement
from tests.sharp.__main__ import COUNTS, Violation, faults, key_of, open_ids, read_violations, run
from tests.sharp.workspace import Workspace

VIOLATION = Violation("R1.1", "sums.py", "a + b", "a - b", "Sums are differences.")

PLUGIN = ("hypothesis",)
"""What the plugin alone imports."""

TEST = """
import pytest
from sums import add

@pytest.mark.requirement("R1.1")
def test_sum():
    assert add({numbers}) == sum([{numbers}])
"""


@requirement("R9.8")
def test_every_violation_on_record_can_still_be_made():
    violations = read_violations()
    assert list(faults(violations)) == []
    assert len(set(violations)) == len(violations)


@requirement("R9.8", "R24.10")
def test_every_built_requirement_has_a_violation_and_no_fewer_than_before():
    """Those that have none yet are listed; `python -m tests.sharp --count` writes the record."""
    violations, record = read_violations(), json.loads(COUNTS.read_text())
    assert set(open_ids(violations)) <= set(record["open"])
    assert not Counter(record["counts"]) - Counter(violation.id for violation in violations)


@requirement("R24.10")
def test_a_whole_run_is_noted_with_its_commit_and_a_part_of_one_is_not(tmp_path, monkeypatch):
    note = tmp_path / "last.json"
    monkeypatch.setattr(runner, "LAST", note)
    monkeypatch.setattr(runner, "VERDICTS", tmp_path / "sharp.json")
    monkeypatch.setattr(runner, "read_violations", lambda: [VIOLATION, VIOLATION])
    monkeypatch.setattr(runner, "faults", lambda _: [])
    monkeypatch.setattr(runner, "key_of", lambda *_: "key")
    monkeypatch.setattr(runner, "run", lambda *_, **__: "green")
    monkeypatch.setattr(runner, "Workspace", lambda root: nullcontext(SimpleNamespace(folder=root)))
    for options in (["--only", "R1"], ["--seconds", "9"]):
        monkeypatch.setattr("sys.argv", ["sharp", *options])
        assert runner.main() == 1
        assert not note.exists()
    (tmp_path / "sharp.json").write_text('{"seconds": 100}')
    monkeypatch.setattr("sys.argv", ["sharp"])
    assert runner.main() == 1
    last = json.loads(note.read_text())
    assert (last["red"], last["all"], last["seconds"]) == (0, 2, 100)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert head.stdout.startswith(last["commit"])


@pytest.fixture
def project(tmp_path):
    def build(numbers):
        (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n")
        (tmp_path / "tests").mkdir()
        (tmp_path / "tests" / "test_sums.py").write_text(TEST.format(numbers=numbers))
        options = '[tool.pytest.ini_options]\naddopts = ["-p", "lora.testing.plugin"]\n'
        markers = 'markers = ["slow: long", "foreign: elsewhere"]\n'
        (tmp_path / "pyproject.toml").write_text(options + markers)
        subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
        return tmp_path

    return build


@requirement("R24.10")
@pytest.mark.parametrize(("numbers", "verdict"), [("2, 1", "red"), ("2, 0", "green")])
def test_a_violation_is_red_where_a_test_of_its_requirement_fails(project, numbers, verdict):
    root = project(numbers)
    assert list(faults([VIOLATION], root)) == []
    with Workspace(root, PLUGIN) as workspace:
        assert run(VIOLATION, workspace) == verdict
    assert "a + b" in (root / "sums.py").read_text()


@requirement("R24.10")
def test_nothing_of_one_violation_is_there_for_the_next(project):
    """Both texts have the same length and are written in one second; what was compiled of the
    first would pass for the second. The copy is the project again, whatever the tests did to it.
    """
    root = project("2, 1")
    mess = "\nfrom pathlib import Path\n"
    mess += 'for name in ("new/file.py", "sums.py", "tests/test_sums.py"):\n'
    mess += "    Path(name).parent.mkdir(exist_ok=True)\n    Path(name).write_text('')\n"
    mess += "Path('pyproject.toml').unlink()\n"
    red, green = replace(VIOLATION, new="a - b"), replace(VIOLATION, new="b + a")
    untidy = replace(VIOLATION, old="a + b\n", new="a + b\n" + mess)
    with Workspace(root, PLUGIN) as workspace:
        verdicts = [run(each, workspace) for each in (red, green, untidy, red)]
        copied = {
            path.relative_to(workspace.folder): path.read_bytes()
            for path in workspace.folder.rglob("*")
            if path.is_file() and path.parent.name != "__pycache__"
        }
        assert not (workspace.folder / "new").exists()
    assert [*verdicts[:2], verdicts[3]] == ["red", "green", "red"]
    names = ("sums.py", "tests/test_sums.py", "pyproject.toml")
    assert copied == {Path(name): (root / name).read_bytes() for name in names}


def test_tests_that_take_longer_than_the_limit_give_no_verdict(project):
    with Workspace(project("2, 1"), PLUGIN) as workspace:
        assert run(VIOLATION, workspace, limit=0.01) == "no verdict within 0 s"


def test_a_run_without_a_test_is_no_verdict(project):
    other = replace(VIOLATION, id="R1.2", tests=("tests/test_sums.py",))
    with Workspace(project("2, 1"), PLUGIN) as workspace:
        assert run(other, workspace) == "no verdict: no test of R1.2 was run"


def test_a_violation_that_can_not_be_made_is_told(project):
    root = project("2, 1")
    changes = {"old": "a * b"}, {"new": "a + b"}, {"id": "R1.2"}
    wrong = [replace(VIOLATION, **change) for change in changes]
    assert [line.partition(": ")[2] for line in faults(wrong, root)] == [
        "Sums are differences.: its old text occurs 0 times in sums.py",
        "Sums are differences.: it changes nothing",
        "Sums are differences.: no test names R1.2",
    ]


def test_a_verdict_ages_with_the_file_and_its_tests(project):
    root = project("2, 1")
    keys = {key_of(VIOLATION, root)}
    for name in ("sums.py", "tests/test_sums.py"):
        path = root / name
        path.write_text(path.read_text() + "\n")
        keys.add(key_of(VIOLATION, root))
    keys.add(key_of(replace(VIOLATION, new="b - a"), root))
    assert len(keys) == 4
