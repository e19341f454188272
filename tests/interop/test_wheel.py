"""The wheel holds all that its users need: outside a checkout the command line and the conformance suite run from it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lora.testing.plugin import requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(ROOT)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@requirement("R24.1")
def test_a_wheel_holds_the_package_the_suite_and_the_specification(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"lora/py.typed", "lora/testing/properties/test_r04_router.py", "lora/testing/spec/R04-router.md"} <= names
    assert "lora/testing/spec/vectors/1/manifest.toml" in names
    assert not [name for name in names if not name.startswith(("lora/", "lora_cards-"))]
    assert wheel.stat().st_size < 2**20


@requirement("R24.1")
def test_the_suite_runs_from_a_wheel_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    unmeasured = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    environment = {**unmeasured, "PYTHONPATH": str(tmp_path / "site"), "LORA_PROFILE": "quick"}
    command = [sys.executable, "-m", "lora.cli", "conformance", "--only", "R3.11"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    where = [sys.executable, "-c", "from lora.testing.report import suite_folder; print(suite_folder())"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()) == tmp_path / "site" / "lora" / "testing" / "properties"
