"""Verdicts of the conformance suite: one for each requirement, whatever a binding does."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace

import pytest

import lora
from lora.cli.suite import conformance
from lora.errors import ArgumentError
from lora.testing.plugin import Subject, load_binding, requirement
from lora.testing.remote import NoAnswer
from lora.testing.report import (
    SCHEMA_VERSION,
    Outcome,
    lines_of,
    read_statements,
    red,
    report_of,
    run_suite,
)

FAILED = "failed"
SPEC = Path(__file__).parents[2] / "spec"
LOCK = hashlib.sha256((SPEC / "lock.toml").read_bytes()).hexdigest()[:12]


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch):
    """No coverage: an alarm that goes off while coverage holds its lock would stop it for good."""
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)


COSINE = "test_r04_router.py::test_every_candidate_scores_the_cosine_of_its_nearest_example"
ZERO = "test_r04_router.py::test_a_zero_vector_scores_zero_on_either_side"
BOTH = ("R4.4", "R4.8")


def declaring(*ids, test=COSINE):
    """A binding that declares a property's failure for these requirements."""
    failures = {i: {test: ("it turns queries round", "router.py: select")} for i in ids}
    return SimpleNamespace(name="mine", version="1", expected_failures=failures)


@requirement("R24.2")
@pytest.mark.parametrize(
    ("declared", "verdicts", "expected"),
    [
        ((), ("failed", "passed"), ("failed", "failed")),
        (("R4.8",), ("failed", "passed"), ("failed", "expected failure")),
        (BOTH, ("failed", "passed"), ("expected failure", "expected failure")),
        (BOTH, ("failed", "failed"), ("expected failure", "failed")),
        (("R4.8",), ("passed", "failed"), ("passed", "failed")),
        (("R4.8",), ("passed", "passed"), ("passed", "unexpected pass")),
        (("R4.8",), ("skipped", "passed"), ("skipped", "passed")),
    ],
)
def test_a_declared_failure_excuses_itself_and_no_other(declared, verdicts, expected):
    """Of two properties the first names both requirements, and the second R4.8 alone."""
    outcomes = [Outcome(COSINE, BOTH, verdicts[0], 1), Outcome(ZERO, BOTH[1:], verdicts[1], 1)]
    report = report_of(declaring(*declared), outcomes, profile="dev")
    assert tuple(report["requirements"][i]["verdict"] for i in BOTH) == expected
    assert red(report) == [
        i for i, verdict in zip(BOTH, expected, strict=True) if verdict == FAILED
    ]


@requirement("R24.1", "R24.2", "R24.9")
@pytest.mark.parametrize(("declared", "status"), [((), 1), (("R4.8",), 1), (BOTH, 0)])
def test_in_pytest_a_failure_is_excused_if_it_is_declared_for_all_that_it_names(
    tmp_path, declared, status
):
    file, _, name = COSINE.partition("::")
    test = f"@pytest.mark.requirement(*{BOTH})\ndef {name}(impl):\n    assert False\n"
    alone = "def test_of_this_library_alone():\n    assert False\n"
    (tmp_path / file).write_text(f"import pytest\n\n\n{test}\n\n{alone}")
    binding = "class BINDING:\n    name, version = 'mine', '1'\n    expected_failures = "
    binding += repr(declaring(*declared).expected_failures)
    (tmp_path / "own_binding.py").write_text(binding)
    command = [Path(sys.executable).parent / "pytest", "-p", "lora.testing.plugin"]
    command += ["--binding", "own_binding:BINDING", "-c", os.devnull, "--rootdir", ".", file]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr


@requirement("R24.1", "R24.2", "R24.5")
def test_all_errors_of_a_fixture_are_told_and_none_is_obeyed(tmp_path, monkeypatch, capsys):
    errors = '[ValueError("zero"), TypeError("\\ud800 \\x1b[2J")]'
    lines = ["import pytest", "@pytest.fixture", "def own(impl):"]
    own = "pytest.param(1, marks=pytest.mark.requirement(kind='convention'))"
    lines += [f"    raise ExceptionGroup('two', {errors})"]
    lines += [
        "@pytest.mark.requirement('R4.4', kind='law')",
        f"@pytest.mark.parametrize('x', [{own}])",
    ]
    lines += ["def test_it(impl, own, x):", "    pass"]
    (tmp_path / "test_own.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pytest", "-p", "lora.testing.plugin", "-c", os.devnull]
    command += ["--rootdir", ".", "--conformance-json", "report.json", "test_own.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert red(report) == ["R4.4"]
    (test,) = report["requirements"]["R4.4"]["tests"]
    assert test["falsified"] == "ValueError: zero\nTypeError: \\ud800 \x1b[2J"
    assert test["class"] == "convention"  # as its parameter says
    monkeypatch.setattr("lora.testing.report.run_suite", lambda *_, **__: report)
    with pytest.raises(SystemExit, match="1"):
        conformance(as_json=False)
    assert "TypeError: \\ud800 \ufffd[2J" in capsys.readouterr().out


@requirement("R24.1", "R24.2", "R24.5")
def test_a_run_says_what_failed_and_on_which_example():
    report = run_suite("tests.faults.targets:Substring", only=["R3.11"])
    assert list(report["requirements"]) == ["R3.11"]
    entry = report["requirements"]["R3.11"]
    assert entry["verdict"] == "failed"
    assert sum(test["examples"] for test in entry["tests"]) > 10
    (digits,) = [test for test in entry["tests"] if test["test"].endswith("never_layer_11")]
    assert "    @example(\n        number=0,\n        digit=1,\n" in indent(
        digits["falsified"], "    "
    )
    assert "@reproduce_failure(" in digits["falsified"]
    good = run_suite("tests.bindings.numpy_only:BINDING", only=["R4.4"])["requirements"]["R4.4"]
    assert (good["verdict"], good["reason"]) == ("passed", "")
    # Whether the law's search meets a name that holds another is left to chance.
    assert (entry["classes"]["convention"], entry["classes"]["refusal"]) == ("failed", "passed")
    assert set(entry["classes"]) == {"law", "convention", "refusal"}


@requirement("R25.3")
def test_a_run_tells_how_many_properties_are_done():
    steps = []
    options = {"only": ["R3.11"], "progress": lambda *step: steps.append(step)}
    run_suite("tests.faults.targets:Substring", **options)
    assert steps == [(n, len(steps)) for n in range(1, len(steps) + 1)]
    assert len(steps) == 6


@requirement("R24.2", "R24.5", "R24.9")
def test_a_report_shows_failures_first_with_their_evidence_and_folds_the_rest():
    spec = read_statements()
    skips = [
        Outcome("test_x.py::test_skip", (i,), "skipped", 0, "mine lacks bind: none")
        for i in ("R1.1", "R1.2")
    ]
    outcomes = [
        *skips,
        Outcome("test_x.py::test_good", ("R2.2",), "passed", 7, kind="law"),
        Outcome(COSINE, BOTH, "failed", 3, "AssertionError: no\n@example(x=1)", "law"),
        Outcome(ZERO, ("R4.8", "R4.9"), "failed", 5, "AssertionError: nil", "convention"),
        Outcome("test_x.py::test_order", ("R4.9",), "passed", 2, kind="law"),
        Outcome("test_x.py::test_good", ("R4.5",), "passed", 7),
    ]
    binding = declaring("R4.9", test=ZERO)
    binding.expected_failures["R4.5"] = {"test_x.py::test_good": ("not yet", "x.py: f")}
    report = report_of(binding, outcomes, profile="dev", seed="3")
    folder = Path(__file__).parents[1] / "properties"
    assert "\n".join(lines_of(report)).splitlines() == [
        f"R4.4 failed: {spec['R4.4'].sentence}",
        f"  {folder}/{COSINE} (law)",
        "    AssertionError: no",
        "    @example(x=1)",
        f"R4.8 failed: {spec['R4.8'].sentence}",
        f"  {folder}/{COSINE} (law)",
        "    as above",
        f"  {folder}/{ZERO} (convention)",
        "    AssertionError: nil",
        f"R4.5 unexpected pass: {spec['R4.5'].sentence}",
        f"  {folder}/test_x.py::test_good",
        "    not yet (x.py: f)",
        f"R4.9 expected failure: {spec['R4.9'].sentence}",
        f"  {folder}/{ZERO} (convention)",
        "    it turns queries round (router.py: select)",
        "passed: R2.2",
        "skipped mine lacks bind: none: R1.1, R1.2",
        "law: 2 failed, 2 passed",
        "convention: 1 failed, 1 expected failure",
        (
            "7 requirements: 2 failed, 1 unexpected pass, 1 expected failure, 1 passed, 2 skipped; "
            f"17 examples, profile dev, seed 3, suite {lora.__version__}, specification {LOCK}"
        ),
    ]
    classes = {i: entry["classes"] for i, entry in report["requirements"].items()}
    assert classes["R4.8"] == {"law": "failed", "convention": "failed"}
    assert classes["R4.9"] == {"law": "passed", "convention": "expected failure"}
    assert classes["R1.1"] == {}


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
    report = run_suite(f"tests.bindings.broken:{kind}", only=["R4"], timeout=20, junit=junit)
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
    assert conformance("--only", "R99")[0] == 2


@requirement("R24.1", "R25.3")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--command", ""], "--command: it is empty"),
        (["--command", "  "], "--command: it is empty"),
        (["--binding", ""], "--binding: it is empty"),
        (["--only", ""], "--only: it is empty"),
        (["--only", "R4", "--only", " "], "--only: it is empty"),
        (["--binding", "a:B", "--command", "b"], "--binding: it can't go with --command"),
    ],
)
def test_an_empty_option_or_two_bindings_are_an_error_of_usage(here, monkeypatch, line, said):
    monkeypatch.setattr("lora.testing.report.run_suite", lambda *_, **__: pytest.fail("it ran"))
    code, out, err = here("conformance", *line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert "--binding-command" not in err


@requirement("R24.1")
def test_several_only_are_all_run_and_one_that_nobody_can_be_held_to_is_refused():
    report = run_suite("tests.bindings.numpy_only:BINDING", only=["R4.4", "R4.8"])
    assert list(report["requirements"]) == ["R4.4", "R4.8"]
    with pytest.raises(ArgumentError, match=r"held to .*, found 'R25.1', of this library alone"):
        run_suite("tests.bindings.numpy_only:BINDING", only=["R4.4", "R25.1"])
    with pytest.raises(ArgumentError, match="known chapter or requirement, found 'R99'"):
        run_suite("tests.bindings.numpy_only:BINDING", only=["R4.4", "R99"])


@requirement("R24.1")
@pytest.mark.parametrize("option", ["--binding=", "--binding-command=", "--binding-command= "])
def test_an_empty_binding_is_not_this_library_in_pytest(tmp_path, option):
    (tmp_path / "test_own.py").write_text("def test_it(impl):\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "lora.testing.plugin", "-c", os.devnull]
    command += ["--rootdir", ".", option, "test_own.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stdout
    assert "ERROR: binding '" in done.stderr


@requirement("R24.1", "R24.5")
@pytest.mark.parametrize(
    ("binding", "only", "profile", "message"),
    [
        (None, "R99", "quick", "--only: expected a known chapter or requirement, found 'R99'"),
        (None, "R25.1", "quick", "can be held to (P*), found 'R25.1', of this library alone"),
        (
            "nowhere:NOTHING",
            "R4",
            "quick",
            "binding 'nowhere:NOTHING': expected package.module:NAME",
        ),
        (None, "R4", "slowly", "LORA_PROFILE: expected ci, dev, nightly or quick, found 'slowly'"),
    ],
)
def test_a_suite_that_can_not_run_says_why_in_one_line(
    monkeypatch, binding, only, profile, message
):
    monkeypatch.setenv("LORA_PROFILE", profile)
    with pytest.raises(ArgumentError) as error:
        run_suite(binding, only=[only])
    assert message in str(error.value)
    assert "a run with verdicts" not in str(error.value)
    assert "\n" not in str(error.value)


@requirement("R24.2")
def test_what_a_binding_declares_missing_skips_and_what_it_lacks_fails_when_used():
    class Partial:
        name, version, missing = "partial", "1", {"make_router": "it has none"}

    subject = Subject(Partial())
    with pytest.raises(pytest.skip.Exception, match="it has none"):
        subject.make_router(len)
    with pytest.raises(NoAnswer, match="forward"):  # which no test takes for a refusal
        subject.forward()


@requirement("R24.2")
def test_a_binding_that_is_not_there_or_expects_unknown_ids_is_refused(monkeypatch):
    for path in ("nowhere:BINDING", "lora.testing.reference:NOTHING", "os:path"):
        with pytest.raises(ArgumentError, match="binding"):
            load_binding(path)
    name = "lora.testing.reference.Reference.expected_failures"
    for failures, found in (
        ({"R99.1": {}}, "R99.1"),
        ({"R4.4": "it is another"}, "it is another"),
        ({"R4.4": {"test_r04_router.py::test_nothing": ("why", "where")}}, "test_nothing"),
        ({"R4.4": {"test_r04_router.py::made": ("no test", "where")}}, "no test"),
        ({"R4.4": {COSINE: ("why", " ")}}, "why"),
        ({"R4.4": {COSINE: "why"}}, "why"),
    ):
        monkeypatch.setattr(name, failures, raising=False)
        with pytest.raises(ArgumentError, match=found):
            load_binding(None)
