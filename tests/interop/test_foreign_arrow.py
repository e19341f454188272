"""Arrow implementations that share no code with this one's read the same numbers in its cards, and
write cards that it reads.

arrow-rs is reached through arro3 in a process that can import neither pyarrow nor this library,
Apache Arrow JS in a node process. polars reads the files itself, DuckDB a table of Arrow's; neither
shows a file's metadata. In ``make test-all``, a missing one is a failure.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pytest

import lora
from lora.arrow_format import schema_of
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


def arrow_rs(_folder, does="read"):
    return [sys.executable, str(READERS / f"arrow_rs_{does}.py")]


def arrow_js(folder, does="read"):
    """Install the reader's packages beside it, where node looks for them."""
    left = shutil.ignore_patterns("node_modules")
    shutil.copytree(READERS / "arrow_js", folder, dirs_exist_ok=True, ignore=left)
    quiet = ("--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--loglevel=error")
    printed_by("npm", "install", *quiet, folder=folder)
    return ["node", f"{does}.mjs"]


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


def by_polars(path):
    import polars as pl

    storage = [pl.col(name).ext.storage() for name in "AB"]
    return pl.read_ipc(path).select("module", "scaling", *storage).to_arrow()


def by_duckdb(path):
    import duckdb

    card = pa.ipc.open_file(path).read_all()  # noqa: F841 - the query names it
    return duckdb.query("FROM card").to_arrow_table()


def assert_same(card, expected):
    assert card == expected
    for name, pair in expected.weights.items():
        found = card.weights[name]
        assert (found.A.tobytes(), found.B.tobytes()) == (pair.A.tobytes(), pair.B.tobytes())


@requirement("R1.9")
@pytest.mark.parametrize("path", VALID)
@pytest.mark.parametrize("reader", [by_polars, by_duckdb])
def test_a_data_frame_or_a_database_finds_every_bit(reader, path):
    expected = lora.load(FOLDER / path)
    if (reader, expected.dtype.name) == (by_duckdb, "float16"):
        with pytest.raises(Exception, match="Unsupported Internal Arrow Type e"):  # it has none
            reader(FOLDER / path)
        return
    metadata = pa.ipc.open_file(FOLDER / path).schema.metadata
    schema = schema_of(expected.dtype.name).with_metadata(metadata)
    assert_same(lora.table_to_card(reader(FOLDER / path).cast(schema)), expected)


@requirement("R1.9")
@pytest.mark.parametrize("program", [arrow_rs, arrow_js])
def test_a_card_that_another_implementation_writes_is_read_bit_for_bit(program, tmp_path):
    sources = [str(FOLDER / path.replace(".lora.arrow", ".json")) for path in VALID]
    printed_by(*program(tmp_path, "write"), str(tmp_path), *sources, folder=tmp_path)
    for index, path in enumerate(VALID):
        assert_same(lora.load(tmp_path / f"{index}.lora.arrow"), lora.load(FOLDER / path))
