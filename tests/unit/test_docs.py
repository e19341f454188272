"""What the documentation states of figures and pages is so."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora
from lora import errors
from lora.errors import ManifestError, RefusedError
from lora.federation.trust import Policy
from lora.testing.plugin import requirement
from lora.testing.report import Outcome, report_of, write_report
from lora.testing.trace import read_spec

ROOT = Path(__file__).parents[2]


@requirement("R4.11")
def test_the_interval_that_so_many_groups_allow_is_the_one_stated():
    rows = re.findall(
        r"^\| (\d+) \| (\S+) % \| (\S+) % \| (\S+) % … (\S+) % \|$",
        (ROOT / "docs/routing.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 3
    for groups, asked, expected, low, high in rows:
        found = lora.calibrate({str(group): [group / 1e4] for group in range(int(groups))}, float(asked) / 100)
        stated = [float(expected), float(low), float(high)]
        assert [round(100 * share, 1) for share in (found.rate, *found.interval)] == stated


@requirement("R9.9")
def test_there_is_a_test_strategy_page_and_a_coverage_floor():
    assert "testing.md" in (ROOT / "mkdocs.yml").read_text("utf-8")
    page = (ROOT / "docs/testing.md").read_text("utf-8")
    for word in ("Tolerances", "Properties", "Profiles", "90 %"):
        assert word in page
    assert "--fail-under=90" in (ROOT / "Makefile").read_text("utf-8")


@requirement("R10.9")
def test_the_names_of_earlier_systems_are_told_with_what_was_changed_or_dropped():
    page = (ROOT / "docs/names.md").read_text("utf-8")
    earlier = ["LoRAFormat", "LoRAExtractor", "AdapterMerger", "MergeConfig", "HotSwapManager", "AdapterPool"]
    dropped = ["Fuzzy matching", "In-place merging", "DoRA", "GGUF", "4-bit", "Routing *networks*"]
    for word in earlier + dropped:
        assert word in page
    for name in re.findall(r"`lora\.(\w+)`", page):
        assert name in lora.__all__


@requirement("R14.3")
def test_the_docs_say_what_a_signature_does_not_prove_and_name_every_refusal_with_its_opt_out():
    page = (ROOT / "docs/federation.md").read_text("utf-8")
    section = page.split("## What a signature does not prove")[1].split("\n## ")[0]
    for word in ("good", "harmless", "who the signer is", "stolen", "when it was signed", "the peer"):
        assert word in section
    for field in dataclasses.fields(Policy):
        assert not field.name.startswith("allow_") or f"`{field.name}`" in page
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RefusedError)]
    for kind in kinds:
        assert kind in (RefusedError, ManifestError) or f"`{kind.__name__}`" in page


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """The page generator, over reports on a binding that passes and on one that does not."""
    place = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    monkeypatch.setattr(module, "REPORTS", tmp_path)
    good = SimpleNamespace(name="lora-cards", version="1")
    bad = SimpleNamespace(name="faulty", version="2", expected_failures={"R4.5": "it has no threshold"})
    for binding, verdict in ((good, "passed"), (bad, "failed")):
        outcomes = [
            Outcome("test_r04.py::a", ("R4.4",), verdict, 50),
            Outcome("test_r04.py::b", ("R4.5",), verdict, 30),
        ]
        write_report(report_of(binding, outcomes, profile="dev"), tmp_path / f"{binding.name}.json")
    return module


@requirement("R10.8", "R24.5")
def test_the_traceability_page_has_a_row_for_each_requirement_with_its_tests_examples_and_faults(pages):
    rows = {row.split(" | ")[0].strip("| "): row for row in pages.traceability().splitlines() if row.startswith("| R")}
    assert list(rows) == list(read_spec(ROOT / "spec"))
    assert "test_r04_router.py::" in rows["R4.4"]
    assert "| 50 |" in rows["R4.4"]
    assert "`OneTooMany`" in rows["R4.4"]


@requirement("R24.5")
def test_the_matrix_has_a_column_for_each_binding_and_can_be_red(pages):
    page = pages.matrix()
    assert "| id | requirement | lora-cards 1 | faulty 2 |" in page
    rows = [row for row in page.splitlines() if row.startswith("| R4")]
    assert [row.split(" | ")[2:] for row in rows] == [
        [":white_check_mark:", ":x: |"],
        [":white_check_mark:", ":warning: |"],
    ]
    assert "- **faulty 2**: it has no threshold (R4.5)" in page


def test_the_readme_names_only_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for page in ("README.md", "CONTRIBUTING.md"):
        for targets in re.findall(r"^make ([a-z ]+?)\s*(?:#|$)", (ROOT / page).read_text("utf-8"), re.MULTILINE):
            assert all(f"\n{target}:" in makefile for target in targets.split())


def test_the_versions_agree():
    assert f'version = "{lora.__version__}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert f"## {lora.__version__} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_no_text_names_this_machine():
    texts = [path for kind in ("md", "toml", "txt", "yml") for path in ROOT.glob(f"*.{kind}")]
    for path in [*texts, *(ROOT / "spec").glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]:
        text = path.read_text("utf-8")
        assert not re.search(r"(?<![\w.])/(root|work|home)/", text), path.name
