"""What is said of versions, and what may publish one, is so."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import lora
from lora.arrow_format import FORMAT_VERSION
from lora.evolution import queue
from lora.testing.plugin import requirement
from lora.testing.report import SCHEMA_VERSION, read_statements
from tests.trace import read_lock

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
GRANTED = {
    ("docs", "deploy"): {"pages": "write", "id-token": "write"},
    ("release", "publish"): {"id-token": "write"},
}
"""What a job may do besides reading the repository."""


class _Loader(yaml.SafeLoader):
    """YAML in which `on` is a word, as in a workflow."""

    yaml_implicit_resolvers = yaml.SafeLoader.yaml_implicit_resolvers | {"o": [], "O": []}


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def path(request):
    return request.param


def read(path):
    return yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 - a safe one


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def read_text(name):
    return (ROOT / name).read_text("utf-8")


def page():
    return (ROOT / "docs" / "versioning.md").read_text("utf-8")


# workflows


def test_there_is_a_workflow_for_tests_for_each_night_for_the_site_and_for_a_release():
    assert [path.stem for path in WORKFLOWS] == ["docs", "nightly", "release", "tests"]


def test_all_violations_are_made_at_night():
    nightly = read(ROOT / ".github" / "workflows" / "nightly.yml")
    assert "cron" in nightly["on"]["schedule"][0]
    assert "make sharp" in [step.get("run") for step in steps(nightly)]


def test_a_job_may_do_no_more_than_it_needs(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job.get("permissions") == GRANTED.get((path.stem, name))
        assert job["timeout-minutes"] <= (180 if path.stem == "nightly" else 90)


def test_a_job_that_may_write_runs_no_code_of_this_repository():
    for file, name in GRANTED:
        job = read(ROOT / ".github" / "workflows" / f"{file}.yml")["jobs"][name]
        assert not [step for step in job["steps"] if "run" in step or "checkout" in step["uses"]]
        assert job["needs"] == "build"
        assert job["environment"]["name"] in ("github-pages", "pypi")


def test_no_workflow_has_a_secret_or_runs_text_that_a_stranger_wrote(path):
    text = path.read_text("utf-8")
    assert not [word for word in ("secrets", "GITHUB_TOKEN", "pull_request_target") if word in text]
    for step in steps(read(path)):
        assert "${{" not in step.get("run", "")
        if "actions/checkout@" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def uses_of(path):
    return re.findall(r"uses: (.*)$", path.read_text("utf-8"), re.MULTILINE)


def test_an_action_is_pinned_by_its_commit_and_says_which_version_that_is(path):
    uses = uses_of(path)
    assert uses
    assert len(uses) == len([step for step in steps(read(path)) if "uses" in step])
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use) for use in uses)


def test_an_action_is_pinned_to_one_commit_everywhere():
    pins = {use for path in WORKFLOWS for use in uses_of(path)}
    assert len(pins) == len({pin.partition("@")[0] for pin in pins})


def test_what_a_workflow_makes_exists(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    runs = [step["run"].split() for step in steps(read(path)) if "run" in step]
    makes = [words[1:] for words in runs if words[0] == "make"]
    assert makes
    assert {target for words in makes for target in words} <= targets


def test_only_a_tag_of_a_version_releases_and_only_after_the_tests():
    workflow = read(ROOT / ".github" / "workflows" / "release.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    runs = [step["run"] for step in workflow["jobs"]["build"]["steps"] if "run" in step]
    checked, tested, built = runs
    assert (tested, "hatchling build" in built) == ("make test test-slow lint types", True)
    for tag, code in ((f"v{lora.__version__}", 0), (f"v{lora.__version__}1", 1), ("v", 1)):
        options = {"env": {"GITHUB_REF_NAME": tag, "PATH": os.environ["PATH"]}, "cwd": ROOT}
        done = subprocess.run(["bash", "-c", checked], **options, check=False, capture_output=True)
        assert done.returncode == code
    url = workflow["jobs"]["publish"]["environment"]["url"]
    assert url == f"https://pypi.org/project/{PROJECT['name']}/"


def test_the_pythons_that_are_tested_are_those_that_are_promised():
    job = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["test"]
    language = "Programming Language :: Python :: 3."
    classifiers = [name for name in PROJECT["classifiers"] if name.startswith(language)]
    named = [name.rpartition(" ")[2] for name in classifiers]
    assert job["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert f"Python {', '.join(named[:-1])} and {named[-1]}, on Linux and macOS" in page()


# versions


@requirement("R24.9")
def test_the_changelog_names_each_revision_by_which_a_verdict_may_change():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    sections = re.findall(r"^### Verdicts\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    spec = read_statements().values()
    revised = {f"{r.id}@{r.revision}" for r in spec if r.evidence == "P*" and r.revision > 1}
    assert revised
    assert revised <= set(re.findall(r"R\d+\.\d+@\d+", "".join(sections)))


def test_the_versions_stated_are_those_in_the_code():
    rows = dict(re.findall(r"^\| the ([\w ]+) \| ([\d.]+) \|", page(), re.MULTILINE))
    assert rows == {
        "package": lora.__version__,
        "file format": ".".join(map(str, FORMAT_VERSION)),
        "test vectors": str(FORMAT_VERSION[0]),
    }
    assert f"(`schema_version` {SCHEMA_VERSION})" in page()
    assert f"(version {queue.VERSION}; " in page()
    assert f"minor version of major version {FORMAT_VERSION[0]} " in page()
    assert f"v{lora.__version__} -m {lora.__version__}`" in page()
    assert f"\nversion: {lora.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert PROJECT["version"] == lora.__version__


@requirement("R24.4")
def test_the_folder_of_vectors_stated_is_the_one_there_is():
    paths = (ROOT / "spec" / "vectors").iterdir()
    folders = [path.name for path in paths if path.is_dir() and path.name.isdecimal()]
    assert folders == [str(FORMAT_VERSION[0])]
    assert f"`spec/vectors/{folders[0]}/`" in page()


def test_the_id_that_stands_for_all_has_a_revision():
    assert "R3.9" in page()
    assert "R3.9" in read_lock(ROOT / "spec" / "lock.toml")


# what an import costs


def imported(*argv):
    """Third-party modules' top names, and lora's own modules, that a fresh interpreter imports."""
    command = [sys.executable, "-X", "importtime", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip() for line in lines}
    ours = {name for name in names if name.split(".")[0] == "lora"}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lora"}, ours


@requirement("R1.12")
def test_importing_the_package_imports_nothing_else():
    site, _ = imported("-c", "pass")
    outside, ours = imported("-c", "import lora")
    assert (outside - site, ours) == ({"lazy_loader"}, {"lora", "lora._renamed"})


@requirement("R25.4")
@pytest.mark.parametrize("argv", ["--help", "--version", "train --help", "factory add --help"])
def test_help_costs_no_numpy_no_arrow_and_no_torch(argv):
    outside, ours = imported("-m", "lora.cli", *argv.split())
    assert {"typer", "rich"} <= outside
    heavy = "numpy pyarrow ml_dtypes torch tokenizers safetensors cryptography"
    assert not outside & set(heavy.split())
    others = {name for name in ours if not name.startswith("lora.cli")}
    assert others <= {"lora", "lora._renamed", "lora.errors", "lora.progress"}


@requirement("R1.12", "R25.3")
def test_inspecting_a_card_costs_no_torch_and_no_model():
    card = ROOT / "spec" / "vectors" / "1" / "R1.4" / "valid" / "basic.lora.arrow"
    outside, ours = imported("-m", "lora.cli", "inspect", str(card))
    assert {"numpy", "pyarrow"} <= outside
    heavy = "torch tokenizers safetensors cryptography zeroconf matplotlib transformers pandas"
    assert not outside & set(heavy.split())
    packages = ("lora.evolution", "lora.federation", "lora.models", "lora.training")
    assert not [name for name in ours if name.startswith(packages)]


# results of other sources


@pytest.fixture
def check():
    """The script of ``make release-check``."""
    path = ROOT / "docs" / "release_check.py"
    spec = importlib.util.spec_from_file_location("release_check", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture
def checkout(tmp_path, monkeypatch, check):
    """A project whose results are all of its sources, under version control."""
    digests = check.figures.digests
    monkeypatch.setitem(digests.__globals__, "CHECKOUT", tmp_path)
    files = {"lora/sums.py": "a + b\n", "tests/test_sums.py": "", "spec/R01.md": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    sources = digests(["lora/sums.py"])
    results = {
        "benchmarks/results.json": {"forward": {"machine": {"sources": sources}, "rows": []}},
        "benchmarks/questions/exams.json": {"exams": {}, "measured": sources},
        "benchmarks/table.json": {"machine": {"sources": sources}, "names": {}},
    }
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for *command, last in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *command, last], cwd=tmp_path, check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.strip()
    results["tests/sharp/last.json"] = {"commit": commit, "red": 9, "all": 9}
    for name, content in results.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    score = f"| `sums` | 20 | 19 | 1 | 95.0 % | `{sources['lora/sums.py']}` | unchanged |\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/mutation.md").write_text(score)
    for page in ("README.md", "docs/learning.md"):
        shutil.copyfile(ROOT / page, tmp_path / page)
    return tmp_path


AGED = [
    "benchmarks/questions/exams.json: all: Changed since it was measured: `lora/sums.py`.",
    "benchmarks/results.json: forward: Changed since it was measured: `lora/sums.py`.",
    "benchmarks/table.json: all: Changed since it was measured: `lora/sums.py`.",
    "docs/mutation.md: sums: changed since; make mutants MODULE=lora/sums.py",
]


def edited(path, old, new):
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


@requirement("R10.6", "R24.6", "R24.10")
def test_the_release_check_fails_only_where_results_are_of_other_sources(check, checkout, capsys):
    assert check.main(checkout) == 0
    assert capsys.readouterr().out.startswith("Every result is of these sources")
    edited(checkout / "lora/sums.py", "a + b", "a - b")
    assert check.main(checkout) == 1
    *aged, violations = capsys.readouterr().out.splitlines()
    assert aged == AGED
    expected = "tests/sharp/last.json: changed since [0-9a-f]{40}: lora/sums.py"
    assert re.fullmatch(expected, violations)
    edited(checkout / "lora/sums.py", "a - b", "a + b")
    edited(checkout / "README.md", ", PEFT +", ", PEFT -")
    edited(checkout / "docs/learning.md", "| candidate | accepted |", "| candidate | passed |")
    assert check.main(checkout) == 1
    tables = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in tables] == ["README.md", "docs/learning.md"]


@requirement("R10.6", "R24.10")
@pytest.mark.parametrize(
    "aged",
    [
        ("benchmarks/results.json", ("sources", "other"), "was not noted."),
        ("benchmarks/questions/exams.json", ("measured", "other"), "was not noted."),
        ("tests/sharp/last.json", ('"red": 9', '"red": 8'), "8 of 9 turned a test red"),
        ("tests/sharp/last.json", ('"commit": "', '"commit": "0'), "fatal"),
        ("tests/test_sums.py", ("", "pass"), ": tests/test_sums.py"),
    ],
)
def test_what_names_no_sources_fails_the_release_check(check, checkout, capsys, aged):
    file, change, line = aged
    edited(checkout / file, *change)
    assert check.main(checkout) == 1
    assert line in capsys.readouterr().out


def test_without_a_whole_run_of_violations_the_release_check_fails(check, checkout, capsys):
    (checkout / "tests/sharp/last.json").unlink()
    assert check.main(checkout) == 1
    assert capsys.readouterr().out == "tests/sharp/last.json: no whole run is noted; make sharp\n"


def test_no_other_target_and_no_step_before_a_landing_runs_the_release_check():
    rules = re.findall(
        r"^([^\s#:.][^:=]*):(?!=)(.*(?:\n\t.*)*)", read_text("Makefile"), re.MULTILINE
    )
    runs = [name for name, rule in rules if "release-check" in rule or "release_check" in rule]
    assert runs == ["release-check"]
    assert "release" not in read_text(".ci/run")
