"""What the documentation states of figures and pages is so."""

import re
from pathlib import Path

import lora
from lora.testing.plugin import requirement

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
