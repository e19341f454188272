"""What is released holds all that its users need, and is the same bytes wherever it is built."""

import email
import json
import os
import re
import site
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.specifiers import SpecifierSet
from trove_classifiers import classifiers

import lora
from lora.testing.plugin import requirement
from lora.testing.report import lock_digest

ROOT = Path(__file__).parents[2]
EPOCH = "1577836800"  # any fixed moment will do
OURS = ("COVERAGE_", "PYTHON", "LORA_")
UNMEASURED = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
MADE = "site .venv .ci dist conformance demo-output mutants docs/generated node_modules".split()
"""What a checkout may hold that belongs in no release."""


def build(source, folder):
    """The sdist and the wheel of a source tree."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    environment = {**UNMEASURED, "SOURCE_DATE_EPOCH": EPOCH}
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def environment(folder):
    """An empty virtual environment, and the command with which pip changes it."""
    venv.create(folder, symlinks=True)
    pip = ["-m", "pip", "--python", str(folder), "--disable-pip-version-check"]
    return folder, [sys.executable, *pip]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def sdist(built):
    return built[0]


@pytest.fixture(scope="module")
def wheel(built):
    return built[1]


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere") / "a folder"
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(name)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment with the wheel, and with this one's packages behind it."""
    folder, pip = environment(tmp_path_factory.mktemp("installed") / "env")
    command = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, env=UNMEASURED)
    here = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    behind = "\n".join(dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("purelib")]))
    (Path(here) / "behind.pth").write_text(behind)
    return folder


def run(folder, *argv, cwd):
    """A program of an environment, outside the checkout."""
    options = {"cwd": cwd, "env": {**UNMEASURED, "LORA_PROFILE": "quick", "OMP_NUM_THREADS": "1"}}
    command = [str(folder / "bin" / argv[0]), *map(str, argv[1:])]
    done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@requirement("R24.1")
def test_a_wheel_holds_the_package_the_suite_and_the_specification(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    suite = ["properties/test_r04_router.py", "spec/R04-router.md", "spec/vectors/1/manifest.toml"]
    assert {"lora/py.typed", *(f"lora/testing/{file}" for file in suite)} <= names
    assert not [name for name in names if not name.startswith(("lora/", "lora_cards-"))]
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "lora").rglob("*.py")}
    assert tracked <= names
    assert wheel.stat().st_size < 2**20


def test_an_sdist_holds_what_the_tests_and_the_site_are_made_of_and_nothing_that_is_made(unpacked):
    folders = "tests/unit tests/properties tests/faults tests/bindings spec/vectors/1 benchmarks"
    assert all(any((unpacked / folder).iterdir()) for folder in folders.split())
    files = "LICENSE README.md CHANGELOG.md Makefile constraints.txt mkdocs.yml docs/generate.py"
    for file in files.split():
        assert (unpacked / file).read_bytes() == (ROOT / file).read_bytes()
    assert not [name for name in MADE if (unpacked / name).exists()]
    assert not list(unpacked.rglob("__pycache__"))


def test_a_build_of_the_unpacked_sdist_is_the_same_bytes(built, unpacked, tmp_path):
    for first, second in zip(built, build(unpacked, tmp_path), strict=True):
        assert (first.name, first.read_bytes()) == (second.name, second.read_bytes())


def test_the_metadata_are_complete_and_valid(metadata):
    parsed = Metadata.from_email(metadata, validate=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (parsed.name, str(parsed.version)) == ("lora-cards", lora.__version__)
    assert parsed.summary == project["description"]
    assert "\n" not in parsed.summary
    assert (parsed.license_expression, parsed.license_files) == ("MIT", ["LICENSE"])
    assert set(parsed.classifiers) <= classifiers
    text = "\n".join(parsed.classifiers)
    assert "License ::" not in text  # the expression says it
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)", text)
    assert all(python in parsed.requires_python for python in pythons)
    assert parsed.requires_python == SpecifierSet(">=3.11")
    assert set(parsed.provides_extra) == set(project["optional-dependencies"])
    message = email.message_from_bytes(metadata)
    assert message["Description-Content-Type"] == "text/markdown"
    assert message.get_payload(decode=True).decode() == (ROOT / "README.md").read_text("utf-8")


@requirement("R24.1")
def test_the_command_and_the_suite_run_from_an_installed_wheel_elsewhere(installed, tmp_path):
    script = "import lora; from lora.testing import folder_of; "
    script += "print(lora.__file__, folder_of('tests/properties'), sep='\\n')"
    lines = run(installed, "python", "-c", script, cwd=tmp_path).splitlines()
    package, suite = map(Path, lines)
    assert package.is_relative_to(installed)
    assert suite == package.parent / "testing" / "properties"
    version = run(installed, "lora", "--version", cwd=tmp_path)
    assert version == f"lora-cards {lora.__version__}\n"
    card = package.parent / "testing/spec/vectors/1/R1.4/valid/basic.lora.arrow"
    run(installed, "lora", "inspect", card, cwd=tmp_path)
    assert "passed" in run(installed, "lora", "conformance", "--only", "R3.11", cwd=tmp_path)


BINDING = """
class Mine:
    name, version = "mine", "1"
    lacks = "write_card read_card forward bind extract make_router merge"
    missing = dict.fromkeys(lacks.split(), "it has none")

    def match_targets(self, names, targets):
        heads = "lm_head embed_out output_projection cls classifier score qa_outputs logits head"
        named = [n for n in names if any(n == t or n.endswith("." + t) for t in targets)]
        rest = [n for n in names if not set(n.split(".")) & set(heads.split())]
        return [n for n in names if n in named or ("all-linear" in targets and n in rest)]

BINDING = Mine()
"""


@requirement("R24.9")
def test_pytest_holds_a_binding_in_the_folder_where_it_runs_to_the_suite_of_a_wheel(
    installed, tmp_path
):
    (tmp_path / "own_binding.py").write_text(BINDING)
    options = ["--pyargs", "lora.testing.properties", "--binding", "own_binding:BINDING", "-q"]
    options += ["--conformance-json", "verdicts.json", "-p", "no:randomly"]
    pytest_alone = ["python", "-P", "-m", "pytest", "-p", "lora.testing.plugin"]
    run(installed, *pytest_alone, *options, cwd=tmp_path)
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    entries = verdicts["requirements"].items()
    assert [i for i, entry in entries if entry["verdict"] == "passed"] == ["R3.11"]
    assert {entry["verdict"] for _, entry in entries} == {"passed", "skipped"}
    assert verdicts["specification"] == lock_digest()


@pytest.mark.foreign
@requirement("R24.1", "R25.1")
def test_in_an_empty_environment_pip_installs_the_wheel_and_the_demo_runs(wheel, tmp_path):
    folder, pip = environment(tmp_path / "env")
    pinned = ["--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "install", *pinned, f"{wheel}[test]"], check=True, env=UNMEASURED)
    subprocess.run([*pip, "check"], check=True, env=UNMEASURED)
    run(folder, "lora", "demo", "--steps", "5", "--out", "made", cwd=tmp_path)
    assert list((tmp_path / "made").glob("*.lora.arrow"))
    options = ["--only", "R1", "--json-file", "verdicts.json"]
    run(folder, "lora", "conformance", *options, cwd=tmp_path)
    assert (tmp_path / "verdicts.json").exists()
