"""Arrow implementations that share no code with the one that wrote the vectors find the same numbers in them.

arrow-rs is reached through arro3 in a process that can import neither pyarrow nor this library, Apache Arrow JS in a node
process. Both belong to ``make test-all``: there, one that is not installed is a failure.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lora.testing.plugin import requirement
from lora.testing.vectors import vectors_folder

pytestmark = pytest.mark.foreign

READERS = Path(__file__).parent / "readers"
FOLDER = vectors_folder() / "1"
MANIFEST = tomllib.loads((FOLDER / "manifest.toml").read_text("utf-8"))["vector"]
VALID = [vector["path"] for vector in MANIFEST if vector["valid"]]


def printed_by(*command, folder):
    run = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def arrow_rs(_folder):
    return [sys.executable, str(READERS / "arrow_rs.py")]


def arrow_js(folder):
    """What runs the reader, in a folder with the packages that it needs: node looks for them beside the script."""
    shutil.copytree(
        READERS / "arrow_js",
        folder,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("node_modules"),
    )
    quiet = ("--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--loglevel=error")
    printed_by("npm", "install", *quiet, folder=folder)
    return ["node", "read.mjs"]


@pytest.fixture(scope="module", params=[arrow_rs, arrow_js], ids=lambda reader: reader.__name__)
def found(request, tmp_path_factory):
    """What a reader finds in each valid vector, by its path."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    out = printed_by(*request.param(folder), *(str(FOLDER / path) for path in VALID), folder=folder)
    return dict(zip(VALID, json.loads(out), strict=True))


@requirement("R1.9", "R24.4")
@pytest.mark.parametrize("path", VALID)
def test_another_implementation_finds_what_the_expectation_says(found, path):
    told = json.loads((FOLDER / path.replace(".lora.arrow", ".json")).read_text("utf-8"))
    stored = "uint16" if told["dtype"] == "bfloat16" else told["dtype"]
    assert found[path] == {
        **told,
        "extensions": ["arrow.variable_shape_tensor"] * 2,
        "stored": [stored] * 2,
    }
