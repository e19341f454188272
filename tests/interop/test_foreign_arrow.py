"""Arrow implementations that share no code with the vectors' writer read the same numbers in them.

arrow-rs is reached through arro3 in a process that can import neither pyarrow nor this library,
Apache Arrow JS in a node process. In ``make test-all``, a missing one is a failure.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lora.testing import folder_of
from lora.testing.plugin import requirement

pytestmark = pytest.mark.foreign

READERS = Path(__file__).parent / "readers"
FOLDER = folder_of("spec") / "vectors" / "1"
MANIFEST = tomllib.loads((FOLDER / "manifest.toml").read_text("utf-8"))["vector"]
VALID = [vector["path"] for vector in MANIFEST if vector["valid"]]


def printed_by(*command, folder):
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 300}
    run = subprocess.run(command, **options, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def arrow_rs(_folder):
    return [sys.executable, str(READERS / "arrow_rs.py")]


def arrow_js(folder):
    """Install the reader's packages beside it, where node looks for them."""
    left = shutil.ignore_patterns("node_modules")
    shutil.copytree(READERS / "arrow_js", folder, dirs_exist_ok=True, ignore=left)
    quiet = ("--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--loglevel=error")
    printed_by("npm", "install", *quiet, folder=folder)
    return ["node", "read.mjs"]


@pytest.fixture(scope="module", params=[arrow_rs, arrow_js], ids=lambda reader: reader.__name__)
def contents(request, tmp_path_factory):
    """What a reader finds in each valid vector, by its path."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    out = printed_by(*request.param(folder), *(str(FOLDER / path) for path in VALID), folder=folder)
    return dict(zip(VALID, json.loads(out), strict=True))


@requirement("R1.9", "R24.4")
@pytest.mark.parametrize("path", VALID)
def test_another_implementation_finds_what_the_expectation_says(contents, path):
    expected = json.loads((FOLDER / path.replace(".lora.arrow", ".json")).read_text("utf-8"))
    stored = "uint16" if expected["dtype"] == "bfloat16" else expected["dtype"]
    columns = {"extensions": ["arrow.variable_shape_tensor"] * 2, "stored": [stored] * 2}
    assert contents[path] == {**expected, **columns}
