"""What the documentation states of figures and pages is so."""

import ast
import dataclasses
import importlib.util
import io
import json
import os
import pkgutil
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import typer
from pyarrow import parquet
from safetensors.numpy import save_file

import lora
from docs import outputs, terminal
from lora.cli.app import app, main
from lora.errors import ManifestError, RefusedError
from lora.federation.trust import Policy
from lora.interop.peft import export_peft
from lora.testing.bench import SCRIPTS, shown
from lora.testing.plugin import requirement
from lora.testing.report import Outcome, report_of, write_report
from lora.testing.requirements import read_spec
from lora.training.data import Pairs
from tests.sharp.__main__ import last_run
from tests.unit.test_cli_federation import Serving, ran

ROOT = Path(__file__).parents[2]


def read(name):
    return (ROOT / name).read_text("utf-8")


PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "generated" not in path.parts)


class Block(NamedTuple):
    """A fenced block: its page, what stands behind the fence, its text."""

    page: str
    info: str
    text: str


def blocks_of(path):
    examples = outputs.examples(path.read_text("utf-8"))
    return [Block(path.relative_to(ROOT).as_posix(), one.info, one.code) for one in examples]


BLOCKS = [block for path in [*PAGES, ROOT / "README.md"] for block in blocks_of(path)]


def execute(block, names=None):
    """Run a block of one of our own pages; return its names."""
    names = {} if names is None else names
    exec(compile(block.text, block.page, "exec"), names)  # noqa: S102
    return names


def named(block):
    return f"{block.page}: {block.text.strip().splitlines()[0]}"


@pytest.fixture(scope="module")
def generate():
    """The page generator."""
    place = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(place)
    sys.modules["generate"] = module
    place.loader.exec_module(module)
    return module


@requirement("R4.11")
def test_the_interval_that_so_many_groups_allow_is_the_one_stated():
    row = r"^\| (\d+) \| (\S+) % \| (\S+) % \| (\S+) % … (\S+) % \|$"
    rows = re.findall(row, read("docs/routing.md"), re.MULTILINE)
    assert len(rows) == 3
    for groups, asked, *stated in rows:
        scores = {str(group): [group / 1e4] for group in range(int(groups))}
        result = lora.calibrate(scores, float(asked) / 100)
        shares = [round(100 * share, 1) for share in (result.rate, *result.interval)]
        assert shares == [float(text) for text in stated]


@requirement("R18.3", "R18.8")
@pytest.mark.parametrize("script", ["questions", "exam_table"])
def test_a_table_about_learning_is_made_of_its_results(script, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module, text = importlib.import_module(script), read("docs/learning.md")
    assert module.page(json.loads(module.RESULTS.read_text("utf-8")), text) == text


@requirement("R2.12")
def test_the_memory_that_folding_costs_is_stated():
    """MiniLM has six layers of four Linears of 384 x 384 and two of 384 x 1536, in float32."""
    cost = 4 * 6 * (4 * 384 * 384 + 2 * 384 * 1536) / 2**20
    stated = f"the price is a copy of the touched weights, {cost:g} MiB"
    assert stated in read("docs/performance.md")


@requirement("R9.9")
def test_there_is_a_test_strategy_page_and_a_coverage_floor():
    """Of all that is in lora/."""
    assert "Test strategy: testing.md" in read("mkdocs.yml")
    page = read("docs/testing.md")
    for word in ("Tolerances", "Properties", "Violations", "Profiles", "at least 90 %"):
        assert word in page
    assert "$(BIN)/coverage report --skip-covered --fail-under=90\n" in read("Makefile")
    assert 'coverage run -m pytest -n 2 -m "not foreign"\n' in read("Makefile")
    assert "run: make coverage\n" in read(".github/workflows/nightly.yml")
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["coverage"]
    assert settings == {
        "run": {"source_pkgs": ["lora"], "parallel": True, "patch": ["subprocess"]},
        "report": {"exclude_also": ["if TYPE_CHECKING:", "@overload", r"^\s*\.\.\.$"]},
    }
    code = "".join(path.read_text("utf-8") for path in Path(lora.__file__).parent.rglob("*.py"))
    assert not re.search(r"# pragma: no (cover|branch)", code)


@requirement("R10.9")
def test_the_names_of_earlier_systems_are_told_with_what_was_changed_or_dropped():
    page = read("docs/names.md")
    words = "LoRAFormat LoRAExtractor AdapterMerger MergeConfig HotSwapManager AdapterPool".split()
    words += ["Fuzzy matching", "In-place merging", "DoRA", "GGUF", "4-bit", "Routing *networks*"]
    assert [word for word in words if word not in page] == []
    assert set(re.findall(r"`lora\.(\w+)`", page)) <= set(lora.__all__)


@requirement("R14.3")
def test_the_docs_say_what_a_signature_does_not_prove_and_name_every_refusal_with_its_opt_out():
    page = read("docs/federation.md")
    section = page.split("## What a signature does not prove")[1].split("\n## ")[0]
    for words in "good,harmless,who the signer is,stolen,when it was signed".split(","):
        assert words in section
    assert "It does\nnot say\n" in section
    assert "- **anything about the peer** that sent it." in section
    for field in dataclasses.fields(Policy):
        assert not field.name.startswith("allow_") or f"`{field.name}`" in page
    for kind in RefusedError.__subclasses__():
        assert kind is ManifestError or f"`{kind.__name__}`" in page


@pytest.fixture
def pages(tmp_path, monkeypatch, generate):
    """The page generator, over reports on a binding that passes and on one that does not."""
    monkeypatch.setattr(generate.chapters, "REPORTS", tmp_path)
    good = SimpleNamespace(name="lora-cards", version="1")
    expected = {"R4.5": {"test_r04.py::b": ("it has no threshold", "router.py")}}
    bad = SimpleNamespace(name="faulty", version="2", expected_failures=expected)
    kinds = {"passed": [("law", "passed")]}
    kinds["failed"] = [*kinds["passed"], ("refusal", "failed")]
    for binding, verdict in ((good, "passed"), (bad, "failed")):
        tests = {"a": ("R4.4", 50), "b": ("R4.5", 30)}
        outcomes = [Outcome(f"test_r04.py::{t}", (i,), verdict, n) for t, (i, n) in tests.items()]
        outcomes += [Outcome("c", ("R4.6",), kind[1], 1, "", kind[0]) for kind in kinds[verdict]]
        write_report(report_of(binding, outcomes, profile="dev"), tmp_path / f"{binding.name}.json")
    return generate


@requirement("R10.8", "R24.5")
def test_the_page_of_a_chapter_has_each_requirements_tests_examples_and_faults(pages):
    trace = pages.chapters.read()
    texts, navigation = pages.chapters.pages(trace), read("mkdocs.yml")
    rows = [row for row in texts["traceability.md"].splitlines() if row.startswith('| <span id="R')]
    assert [row.split('"')[1] for row in rows] == list(trace.spec)
    for number, chapter in trace.chapters().items():
        assert f": generated/{number}.md\n" in navigation
        parts = re.split(r"^## (\S+) \{#\1\}$", texts[f"{number}.md"], flags=re.MULTILINE)[1:]
        assert parts[::2] == [entry.id for entry in chapter]
        for entry, part in zip(chapter, parts[1::2], strict=True):
            assert pages.reference.escaped(entry.sentence) in part
            tests = [evidence.test for evidence in trace.evidence(entry.id)]
            assert re.findall(r"^- `(\S+)`", part, re.MULTILINE) == tests
            (row,) = [row for row in rows if f'"{entry.id}"' in row]
            assert f"[{entry.id}]({number}.md#{entry.id})</span> | " in row
            assert row.split(" | ")[2] == f"{len(tests)}"
    (part,) = re.findall(r"(?s)^## R4.4 .*?(?=^## )", texts["R4.md"], re.MULTILINE)
    assert "; 50 examples; faults found: " in part
    assert "`OneTooMany`" in part
    assert "test_r04_router.py::" in part
    assert "Code: [lora.engine](reference-engine.md#loraengine), " in texts["R4.md"]


@requirement("R24.10")
def test_the_traceability_page_tells_the_last_run_of_all_violations(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(pages.chapters, "LAST", tmp_path / "last")
    trace = pages.chapters.read()
    assert "`make sharp` at" not in pages.chapters.traceability(trace)
    (tmp_path / "last").write_text(last_run(7, 9, 3605))
    last = json.loads((tmp_path / "last").read_text())
    text = " ".join(pages.chapters.traceability(trace).split())
    assert "7 of 9 violations turned a test of their requirement red" in text
    assert f"(`make sharp` at {last['commit']}, {last['date']}, 60 minutes)" in text


@requirement("R24.5")
def test_the_matrix_has_a_column_for_each_binding_and_can_be_red(pages):
    trace = pages.chapters.read()
    page = pages.chapters.matrix(trace)
    assert page.count('<span class="column">lora-cards</span> | <span class="column">faulty<') == 1
    rows = [re.sub(r"<[^>]*>", "", row) for row in page.splitlines() if row.startswith("| [R4")]
    marks = [["✓", "✗"], ["✓", "(✗)"], ["✓", "✓ ✗"]]
    assert (
        "| lora-cards 1 | 3 | 0 | 0 | 0 | this library |\n| faulty 2 | 0 | 1 | 2 | 0 |  |" in page
    )
    assert [row.split(" | ")[1:-1] for row in rows] == marks
    assert page.count('<span title="refusal: failed"><span class="broken">✗</span></span>') == 1
    assert "- **faulty 2**: it has no threshold ([R4.5](R4.md#R4.5))" in page
    told = [
        re.sub(r"<[^>]*>", " ", row) for row in pages.chapters.pages(trace)["R4.md"].split("\n")
    ]
    assert [row for row in told if row.startswith("| faulty 2 |")] == [
        "| faulty 2 |  ✗  failed |",
        "| faulty 2 |  (✗)  differs, as its binding declares: it has no threshold |",
        "| faulty 2 | ✓  ✗  law: passed, refusal: failed |",
    ]


@requirement("R10.6", "R6.7")
def test_the_figures_of_the_readme_and_of_the_site_are_those_that_were_measured(pages):
    report = pages.figures.read()
    names = "forward lifecycle routing throughput merge_extract training fetching growth commands"
    assert list(report) == list(SCRIPTS) == [*names.split(), "models"]
    compared = [row for row in pages.figures.summary(report).splitlines() if row.startswith("| ")]
    longer = [row for script in report for row in pages.figures.slower(report, script)]
    listed = {(what, side, peer) for _, what, side, peer, _ in pages.figures.COMPARED}
    assert len(compared) == 2 + len(listed.union(longer)) - len(pages.figures.REPEATED)
    assert {what for what, *_ in longer} >= {"lora inspect", "fetch a card of 50 MB"}
    assert all(re.search(r" \| .* to .*\|$", row) for row in compared if "what |" not in row)
    rounds = [row.get("rounds", 99) for part in report.values() for row in part["rows"]]
    assert min(rounds) > 5  # not a quick run
    home = " ".join(read("docs/index.md").split())
    claims = re.findall(r"[\d.]+ × (?:as fast as|the time of) \w+ ?\w*", home)
    assert len(claims) == 2
    assert all(any(f"| {claim}" in row for row in compared) for claim in claims)
    table = pages.figures.summary(report)
    assert table in read("README.md")
    assert '--8<-- "docs/generated/summary.md"' in read("docs/performance.md")
    assert pages.figures.claims.missing(report) == []
    lines = [line for line in pages.figures.page(report).splitlines() if line.startswith("| ")]
    assert len(lines) == sum(len(part["rows"]) + 1 for part in report.values())


@requirement("R10.6")
def test_what_the_site_says_of_questions_is_what_was_measured_on_these_questions(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module("questions")
    results = json.loads(script.RESULTS.read_text("utf-8"))
    assert set(results["ranks"]) == {"base", *script.RECIPES}
    assert all(part["questions"] == script.digest(n) for n, part in results["sources"].items())
    before, after = [[1, 2], [4, 4, 4]], [[1, 1], [2, 2, 4]]  # gains of 1/2, twice 1/4, twice 0
    mean, low, high = script.gain(before, after)
    assert (mean, script.gain(before, before)) == (0.2, [0.0, 0.0, 0.0])
    assert 0 <= low < mean < high <= 0.35


@requirement("R10.6")
def test_the_table_of_models_is_what_was_measured_and_says_in_words_what_is_red(pages):
    results = json.loads(read("benchmarks/model_matrix.json"))
    table, notes = pages.figures.models(results).split("\n\n")[:2]
    reasons = dict(line.split(". ", 1) for line in notes.splitlines())
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert [row[0] for row in rows] == list(results["architectures"])
    for name, *shown_cells in rows:
        cells = results["architectures"][name]
        assert head[1:] == list(cells)
        for text, cell in zip(shown_cells, cells.values(), strict=True):
            kind, figure = cell["kind"], cell.get("difference")
            if kind in ("refused", "warned"):
                assert text.startswith(f'<span class="refused">{kind}</span> <sup>')
            elif figure is not None:
                assert float(text.partition(" ")[0]) == pytest.approx(figure, rel=0.5)
            else:
                assert text.partition(" ")[0] == {"ran": "equal"}.get(kind, "n/a")
            if said := cell.get("reason", cell.get("warning")):
                number = re.search("<sup>(.+)</sup>", text)[1]
                assert reasons[number].replace("\\", "").endswith(said)
    assert '--8<-- "docs/generated/models.md"' in read("docs/models.md")
    assert pages.figures.models(results).count(results["machine"]["date"]) == 1
    styles = read("docs/site.css")
    assert styles.count(".refused { color:") == 2  # on light and on dark
    assert "extra_css: [site.css]" in read("mkdocs.yml")


@requirement("R10.6")
def test_a_page_of_figures_says_what_was_found_and_whether_it_met_its_target(pages):
    row = {"what": "swap", "side": "ours", "beside": "theirs", "kind": "ratio", "value": 0.5}
    row |= {"interval": [0.25, 2.0]}
    machine = {"cpu": "a core", "cores": 2, "threads": 1, "load": [0.5, 1.0, 1.5]}
    machine |= {"versions": {"torch": "2"}}
    rows = [row | {"target": 0.05, "met": False}, row | {"target": None, "met": None}]
    now = pages.figures.digests(["lora/routing.py"])
    machine["sources"] = {**now, "lora/router.py": "0" * 12, "lora/gone.py": "1" * 12}
    report = {"routing": {"machine": machine, "rows": rows}}
    page = pages.figures.page(report, {"routing": "Soon."})
    assert "Changed since it was measured: `lora/router.py`, `lora/gone.py`; the other 1 " in page
    assert pages.figures.changed_since(now, "1a2b3c4").startswith("Unchanged since it was measured")
    assert "\n## How long does it take to choose a card? {#routing}\n" in page
    assert "Measured on a core, 2 cores, 1 threads, with torch 2." in page
    assert "\nSoon. Targets met: 0 of 1.\n" in page
    assert "over 1, 5 and 15 minutes: 0.5, 1, 1.5.</small>" in page
    assert "| swap: ours / theirs | 0.5 × | 0.25 … 2 | <= 0.05 × | no |" in page


def limited(id_, *rows, **wanted):
    return pytest.param(id_, rows or wanted, marks=requirement(id_), id=id_)


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        limited("R6.1", unit="ms"),
        limited("R6.2", unit="ms"),
        limited("R6.5", unit="MiB"),
        limited("R6.6", unit="ms"),
        limited("R6.8", group="fetching", unit="ms"),
        limited("R8.6", unit="x", adapter="r8 q,v"),
    ],
)
def test_what_was_measured_last_keeps_the_limits(pages, limit, wanted):
    report = pages.figures.read()
    rows = [row for part in report for row in pages.figures.rows_of(report, part, **wanted)]
    rows = [row for row in rows if limit in row["ids"] and row["target"] is not None]
    assert rows
    assert all(row["met"] for row in rows)


KINDS = ["r8 q,v", "r16 all Linears"]
REQUIRED = {
    "R6.1": [f"load a card, {kind}" for kind in KINDS],
    "R6.2": ["apply to 12 layers, r8 q,v", "apply to 37 layers, r16 all Linears"],
    "R6.3": [f"one card, {kind}, {n} tokens: folded / base" for kind in KINDS for n in (8, 128)],
    "R6.5": [
        f"memory of the {copy}, {kind}" for kind in KINDS for copy in ("folded copy", "factors")
    ],
    "R6.6": [f"remove, {kind}" for kind in KINDS],
    "R6.7": [
        *(f"load a card, {kind}: lora.load / safetensors" for kind in KINDS),
        *(f"load a card, {kind}: lora.load / PEFT load_adapter" for kind in KINDS),
        *(f"remove, {kind}: remove / PEFT delete_adapter" for kind in KINDS),
        *(f"swap, {kind}: swap / PEFT set_adapter" for kind in KINDS),
        *(f"one card, {kind}, 128 tokens: PEFT / base" for kind in KINDS),
        *(
            f"{call} with {count:,} card{'s' * (count > 1)} present"
            for call in ("load", "apply", "swap")
            for count in (1, 10, 100, 1000)
        ),
    ],
    "R6.8": [
        "route over 1,000 exemplars of 1,000 cards: select / rows @ query",
        "encode 32 sentences with the card that fits: by intent_query / named",
        "fetch a card of 50 MB",
        *(f"lora evolve on networkx, a {which} cycle" for which in ("first", "later")),
    ],
    "R8.6": [f"three cards, {kind}, 128 tokens: overhead, of one's" for kind in KINDS],
}
"""Requirement -> rows that the results must have."""


@pytest.mark.parametrize(("limit", "rows"), [limited(id_, *rows) for id_, rows in REQUIRED.items()])
def test_the_results_have_every_row_that_a_requirement_asks_for(pages, limit, rows):
    report = pages.figures.read()
    measured = [
        shown(row)[0] for part in report.values() for row in part["rows"] if limit in row["ids"]
    ]
    assert set(rows) <= set(measured)


@requirement("R6.3")
def test_an_active_adapter_added_less_than_a_tenth_to_a_forward_when_measured_last(pages):
    """An engine's are folded; rank 16 on all Linears is reported, and costs as little."""
    report = pages.figures.read()
    rows = list(pages.figures.rows_of(report, "forward", side="folded", kind="overhead"))
    assert {row["adapter"] for row in rows} == {"r8 q,v", "r16 all Linears"}
    assert all(row["value"] < 0.1 for row in rows)


@requirement("R10.6")
def test_the_limits_are_stated_with_their_figures():
    section = read("docs/performance.md").split("## Limits")[1]
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", section, re.MULTILINE)
    assert {what: limit for what, limit, _ in rows[1:]} == {
        "elements of one factor column of a card": "2³¹ − 1",
        "nesting of metadata": "64 levels",
        "loaded cards before Python 3.13": "the process's open files, often 1,024",
        "earlier sets kept for `rollback`": "8",
        "folded copies": "50 MiB, the engine's budget",
        "tokens of a text": "the folder's `max_seq_length` (MiniLM: 256)",
        "a card that is fetched": "2 GiB, the policy's `max_bytes`",
        "cards that one peer lists": "10,000",
    }


@requirement("R10.6")
def test_every_chart_of_the_page_on_performance_is_drawn(pages, tmp_path):
    pages.figures.draw_all(tmp_path, pages.figures.read())
    wanted = re.findall(r"generated/([a-z]+-[a-z]+\.svg)", read("docs/performance.md"))
    assert len(wanted) >= 8
    assert {path.name for path in tmp_path.iterdir()} >= set(wanted)


def test_the_readme_names_only_commands_that_exist():
    makefile = read("Makefile")
    for page in ("README.md", "CONTRIBUTING.md"):
        for targets in re.findall(r"^make ([a-z ]+?)\s*(?:#|$)", read(page), re.MULTILINE):
            assert all(f"\n{target}:" in makefile for target in targets.split())


def test_the_versions_agree():
    assert f'version = "{lora.__version__}"' in read("pyproject.toml")
    assert f"## {lora.__version__} " in read("CHANGELOG.md")


def test_no_text_names_this_machine():
    texts = [path for kind in ("md", "toml", "txt", "yml") for path in ROOT.glob(f"*.{kind}")]
    for path in [*texts, *(ROOT / "spec").glob("*.md"), *PAGES, ROOT / "Makefile"]:
        text = path.read_text("utf-8")
        assert not re.search(r"(?<![\w.])/(root|work|home)/", text), path.name


@pytest.mark.parametrize(("repository", "edited"), [("", False), ("https://example.org/r", True)])
def test_pages_written_by_hand_have_links_to_edit_them_and_names_of_tests_break_between_words(
    monkeypatch, repository, edited
):
    monkeypatch.syspath_prepend(ROOT / "docs")
    hooks = importlib.import_module("hooks")
    config = SimpleNamespace(repo_url=repository, edit_uri=None)
    assert hooks.on_config(config).edit_uri == ("edit/main/docs/" if edited else None)
    for source, kept in [("tutorial.md", "a link"), ("generated/R1.md", None)]:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=source), edit_url="a link")
        assert hooks.on_page_context({}, page) == {}
        assert page.edit_url == kept
    assert hooks.on_page_markdown("](../../spec/a.md#R1)", page) == "](../generated/R1.md)"
    links = [(page, re.findall(r"\]\((\.\.[./\w]+)#", page.read_text("utf-8"))) for page in PAGES]
    assert all((page.parent / link).exists() for page, found in links for link in found)
    html = "<code>unit/test_a.py::test_b</code> <code>a_b</code>"
    shown = "unit/<wbr>test_<wbr>a.py::<wbr>test_<wbr>b"
    assert hooks.on_page_content(html) == f"<code>{shown}</code> <code>a_b</code>"
    pair = '<img alt="Time" src="a.svg#only-light"/>\n<img alt="Time" src="b.svg#only-dark"/>'
    figure = f"<figure>{pair}<figcaption>Time</figcaption></figure>"
    assert hooks.on_page_content(f"<p>{pair}</p>") == figure


# ---- the reference

CLI = "__main__ app cards evolution federation jobs models suite".split()
UNLISTED = {
    "_renamed",
    "demo",
    *(f"cli.{name}" for name in CLI),
}  # commands have pages of their own


@requirement("R10.1")
def test_the_reference_has_every_module_and_each_documented_name_once(generate):
    reference = generate.reference
    listed = {name for part in reference.REFERENCE.values() for name in part}
    packages = pkgutil.walk_packages(lora.__path__, "lora.")
    modules = {module.name for module in packages if not module.ispkg}
    assert {f"lora.{name}" for name in listed | UNLISTED} == modules
    trace = generate.chapters.Trace(read_spec(ROOT / "spec"), [], {}, [])
    navigation = read("mkdocs.yml")
    pages = generate.reference_pages(trace)
    assert all(f": generated/{file}\n" in navigation for file in pages)
    apart = {entry.defined: entry for entry in reference.names()}
    for title, part in reference.REFERENCE.items():
        blocks = r"^::: lora\.(.*)\n    options:\n      members: (.*)$"
        members = dict(re.findall(blocks, pages[reference.page_of(title)], re.MULTILINE))
        assert list(members) == part
        for module in part:
            own = [e.path.rpartition(".")[2] for e in apart.values() if e.home == f"lora.{module}"]
            named = [*ast.literal_eval(members[module]), *own]
            assert sorted(named) == sorted(reference.documented(f"lora.{module}"))


@requirement("R10.1")
def test_each_name_that_users_import_has_a_page_and_a_sentence_in_the_table(generate):
    entries = generate.reference.names()
    code = generate.chapters.read_code(ROOT / "lora")
    pages = generate.reference_pages(
        generate.chapters.Trace(read_spec(ROOT / "spec"), [], code, [])
    )
    for entry in entries:
        assert f"\n::: {entry.path}\n" in pages[f"{entry.path}.md"]
        assert f"| [`{entry.path}`]({entry.path}.md) | " in pages["reference.md"]
        assert entry.sentence.endswith("."), entry
    adapt = pages["lora.adapt.md"]
    assert "defined in [lora.models.adapt](reference-models.md#loramodelsadapt)" in adapt
    assert "[R2 Adapted layer](R2.md)" in adapt
    named = {id(value_of(entry.path)) for entry in entries} | {
        id(value) for value in vars(lora.errors).values()
    }
    for package in (lora, lora.training, lora.federation, lora.evolution):
        offered = [getattr(package, name) for name in package.__all__]
        assert {id(value) for value in offered if not isinstance(value, ModuleType)} <= named
    for block in BLOCKS:
        if "python" in block.info:
            imports = [n for n in ast.walk(ast.parse(block.text)) if isinstance(n, ast.ImportFrom)]
            for path in (f"{n.module}.{a.name}" for n in imports for a in n.names):
                value = value_of(path) if path.startswith("lora.") else lora
                assert isinstance(value, ModuleType) or id(value) in named, (named, path)


def value_of(path):
    package, _, name = path.rpartition(".")
    return getattr(importlib.import_module(package), name)


@requirement("R10.1", "R25.4")
def test_each_command_has_a_page_with_its_options_an_example_a_run_statuses_and_guides(generate):
    module, tree = generate.command_pages, dict(generate.command_pages.commands())
    assert {"lora merge", "lora factory run", "lora sign"} <= set(tree)
    assert set(module.MORE_STATUSES) <= set(tree)
    pages = module.pages()
    table = pages["reference-command-line.md"]
    files = {name: module.file_of(name) for name in tree} | {"lora": "reference-command-line.md"}
    assert sorted(files.values()) == sorted(pages)
    for name, command in tree.items():
        page, anchor = pages[files[name]], name.replace(" ", "-")
        assert f": generated/{files[name]}\n" in read("mkdocs.yml")
        row = f'| <span id="{anchor}">[`{name}`]({files[name]})</span> |'
        assert name == "lora" or row in table
        options = [option for parameter in command.params for option in parameter.opts]
        assert [option for option in options if f"`{option}`" not in page] == []
        if not hasattr(command, "commands"):  # and a run that a page shows, held by its test
            shown = r"\nA run, from \[.+\]\(\.\./(.+)\):\n\n((?s:.+))## Exit"
            ((source, run),) = re.findall(shown, page)
            pairs = re.findall(r"```sh\n((?s:.+?))```\n\n```text\n((?s:.+?))```\n", run)
            assert any(f"\n{name}" in f"\n{code}" for code, _ in pairs)
            assert all(part in read(f"docs/{source}") for pair in pairs for part in pair)
            assert page.count("```sh") == len(pairs)  # each command has its output below it
            assert f"](../{source})" in page.partition("## Guides that use it")[2]
            statuses = re.findall(r"^\| (\d+) \| .*$", page, re.MULTILINE)
            own = {"lora train": ["3", "130"], "lora evolve": ["3", "130"], "lora serve": []}
            assert statuses == ["0", "1", "2", *own.get(name, ["130"])]


@requirement("R10.8")
def test_the_page_of_requirements_has_every_sentence(generate):
    spec = read_spec(ROOT / "spec")
    page = generate.chapters.specification(generate.chapters.Trace(spec, [], {}, []))
    for entry in spec.values():
        place = f"| {generate.chapters.link(entry.id)} | "
        assert f"{place}{generate.reference.escaped(entry.sentence)}<br>*" in page


# ---- the examples


@requirement("R10.2", "R10.3")
def test_the_home_page_makes_a_card_saves_it_loads_it_and_applies_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks_of(ROOT / "docs/index.md") if "lora.save(" in block.text]
    assert block.info == "python"
    left = execute(block)
    assert lora.load("docs.lora.arrow", verify=left["digest"]) == left["card"]
    x = np.ones((1, 4), np.float32)
    change = left["adapted"]["proj"](left["x"]) - left["model"]["proj"](left["x"])
    pair = left["card"].weights["proj"]
    assert np.allclose(change.detach().numpy(), 2 * x @ pair.A @ pair.B, atol=1e-5)


@requirement("R10.4")
def test_the_page_on_routing_routes_a_query_and_abstains_on_another():
    (block,) = [block for block in blocks_of(ROOT / "docs/routing.md") if block.info == "python"]
    left = execute(block)
    routes = left["router"].select("which file?", threshold=0.5)
    assert [route.name for route in routes] == ["python-docs"]


@requirement("R10.10", "R10.11", "R10.2", "R10.3", "R10.4")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/how-to/generate.md"])
def test_the_steps_of_a_page_run_in_order_and_print_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs/examples", tmp_path / "docs/examples")
    left = {}
    for block in [block for block in BLOCKS if block.page == page and "step" in block.info]:
        with redirect_stdout(io.StringIO()) as printed:
            execute(block, left)
        outputs.compare(ROOT / page, block.text, printed.getvalue())
    if page == "docs/tutorial.md":
        assert (tmp_path / f"cache/{left['digest']}.lora.arrow").is_file()
        assert left["training"].metrics["after"].mrr > left["training"].metrics["before"].mrr + 0.01


UNPRINTED = ("sh", "text", "{.python .app}", "{.python .spark}")
# What they write is run by the command below it, and by tests/unit/test_remote.py.
SILENT = {"docs/how-to/conformance.md", "docs/how-to/foreign-binding.md"}


@requirement("R10.11")
def test_every_example_fits_and_what_it_prints_stands_below_it():
    for path in [*PAGES, ROOT / "README.md"]:
        page = path.relative_to(ROOT).as_posix()
        for one in outputs.examples(path.read_text("utf-8")):
            lines = [*one.code.splitlines(), *one.output.splitlines()]
            assert max(map(len, lines)) <= outputs.WIDTH, (page, max(lines, key=len))
            if page not in SILENT and one.info not in UNPRINTED:
                assert one.output or "import ray" in one.code, (page, one.code)
            left_out = [is_left_out(words) for words in lines_of(one.code)]
            if one.output and left_out and all(left_out):  # recorded by docs/outputs.py
                assert one.digest == outputs.digest(one.code, one.output), (page, one.code)


@requirement("R10.11")
@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("rank 4, error 0.187", "rank 4, error 0.186"),
        (f"{'5' * 64}, {'6' * 64}, {'5' * 64}\n", "3b7e…, c902…, 3b7e…"),
        ("at grpc://127.0.0.1:41234 after 12.3 ms", "at grpc://127.0.0.1:8815 after 0.1 ms"),
        ("peers grpc://[fd00::2]:45941", "peers grpc://192.0.2.7:8815"),
        (f"{'5' * 12}, {'6' * 12}, {'5' * 12}", "3b7e51c09a2f, c902d4a61e83, 3b7e51c09a2f"),
        ("rank 5, error 0.187", None),
        ("rank 4, error 0.197", None),
        ("rank 4, error 0.187\nand more", None),
        ("", None),
    ],
)
def test_what_an_example_prints_is_held_against_its_page(tmp_path, monkeypatch, printed, shown):
    page = tmp_path / "page.md"
    text = "A\n\n```python\nprint(1)\n```\n\n```text\n{}\n```\n\nB\n"
    page.write_text(text.format(shown or "rank 4, error 0.187"), "utf-8")
    monkeypatch.delenv("LORA_OUTPUTS", raising=False)
    if shown:
        outputs.compare(page, "print(1)", printed)
        return
    with pytest.raises(AssertionError, match=r"`make outputs` changes page\.md"):
        outputs.compare(page, "print(1)", printed)
    monkeypatch.setenv("LORA_OUTPUTS", "write")
    outputs.compare(page, "print(1)", printed)
    monkeypatch.delenv("LORA_OUTPUTS")
    outputs.compare(page, "print(1)", printed)
    kept = text.format(printed) if printed else "A\n\n```python\nprint(1)\n```\n\nB\n"
    assert page.read_text("utf-8") == kept


@requirement("R10.11")
def test_each_error_of_the_page_on_troubleshooting_has_its_words_for_a_heading():
    sections = read("docs/how-to/troubleshooting.md").split("\n### ")[1:]
    assert len(sections) == 26
    for section in sections:
        heading = section.partition("\n")[0].strip("`")
        (one,) = outputs.examples(section)
        (said,) = re.split("^lora: |lora.errors.", " ".join(one.output.split()), maxsplit=1)[1:]
        assert heading in said


GUIDES = [
    ("index.md", "Home", "What it does, and what it does not", "Install", "A card made by hand"),
    ("tutorial.md", "Tutorial", "1. From a PEFT folder to a card", "2. Use it, and take it away"),
    ("federation.md", "Federation, the guide", "Two machines, nothing configured", "From Python"),
    ("evolution.md", "Evolution, the guide", "How do I start? {#one-command}"),
]
"""Page, title in the navigation, and the sections that it begins with."""


@requirement("R10.10")
def test_a_quickstart_and_the_guides_are_in_the_navigation():
    navigation = read("mkdocs.yml")
    for page in (path.relative_to(ROOT / "docs").as_posix() for path in PAGES):
        assert f": {page}\n" in navigation, page
    for page, title, *sections in GUIDES:
        assert f"{title}: {page}\n" in navigation
        headings = re.findall("^## (.*)$", read(f"docs/{page}"), re.MULTILINE)
        assert headings[: len(sections)] == sections
        assert f"docs/{page}" in {block.page for block in BLOCKS}


KINDS = {"python", "sh", "text", "{.js .card}"}
KINDS |= {f"{{.python .{kind}}}" for kind in "app client step foreign spark field".split()}


@requirement("R10.7")
def test_every_block_is_of_a_kind_that_some_test_runs():
    settings = read("pyproject.toml")
    assert 'testpaths = ["tests", "README.md", "docs"]' in settings
    assert '"--markdown-docs"' in settings
    assert 'pytest -n 2 -m ""\n' in read("Makefile").split("test-all:")[1]
    assert "run: make docs test-all\n" in read(".github/workflows/tests.yml")
    for block in BLOCKS:
        assert block.info in KINDS, named(block)
        if "python" in block.info:
            ast.parse(block.text)
    assert "run: make field\n" in read(".github/workflows/nightly.yml")
    fields = {block.page for block in BLOCKS if block.info == "{.python .field}"}
    assert fields == {f"docs/field/{path.name}" for path in PAGES if path.parent.name == "field"}
    steps = {block.page for block in BLOCKS if "step" in block.info}
    assert steps == {"docs/tutorial.md", "docs/how-to/generate.md"}


@requirement("R10.7", "R5.12")
def test_what_the_page_gives_to_spark_gives_back_batches_of_the_schema_that_it_names():
    """Spark hands over an iterator of batches and takes one; 4.3 refuses lists of a fixed size."""
    (block,) = [block for block in BLOCKS if block.info == "{.python .spark}"]
    seen = []

    def map_in_arrow(work, schema):
        seen.extend([schema, *work(iter([pa.record_batch({"text": ["open a file", None]})]))])

    execute(block, {"frame": SimpleNamespace(mapInArrow=map_in_arrow)})
    schema, batch = seen
    types = {"string": pa.string(), "array<float>": pa.list_(pa.float32())}
    fields = [(name, types[kind]) for name, kind in map(str.split, schema.split(", "))]
    assert [(field.name, field.type) for field in batch.schema] == fields
    assert [row and len(row) for row in batch["embedding"].to_pylist()] == [384, None]


FOREIGN = [block for block in BLOCKS if block.info in ("{.python .foreign}", "{.js .card}")]


@requirement("R10.7", "R10.11", "R1.9")
@pytest.mark.foreign
@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", FOREIGN, ids=named)
def test_the_block_runs_where_its_language_or_package_is(block, tmp_path):
    """With the page's card beside it, in a process and a home of its own."""
    lora.save(skill("docs", 1, size=8), tmp_path / "docs.lora.arrow")
    script = tmp_path / ("block.mjs" if "js" in block.info else "block.py")
    script.write_text(block.text, encoding="utf-8")
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    if "js" in block.info:
        package = ROOT / "tests/interop/readers/arrow_js/package.json"
        shutil.copy(package, tmp_path / "package.json")
        quiet = "--no-audit --no-fund --ignore-scripts --prefer-offline --loglevel=error".split()
        subprocess.run(["npm", "install", *quiet], cwd=tmp_path, check=True, timeout=300)
        command = ["node", script.name]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    run = subprocess.run(command, **options, check=False)
    assert run.returncode == 0, run.stderr
    if "import ray" not in block.text:  # which prints of its own
        outputs.compare(ROOT / block.page, block.text, run.stdout)


# ---- the commands

COMMANDS = typer.main.get_command(app)

LEARNED = "test_learned_and_served.py::"
LEARNED += "test_a_folder_becomes_a_skill_that_is_served_routed_to_replaced_and_rolled_back"

IN_SESSIONS = (
    "lora serve",
    "lora list",
    "lora fetch",
    "lora factory run --at",
    "lora factory rollback",
    "lora conformance --binding my_binding:BINDING --only R3 ",
    *(f"lora {name} architect" for name in ("train", "merge", "eval")),
    "lora train reviewer",
)
"""What a slow test runs, since it needs a process that serves, two versions, or a minute."""

ELSEWHERE = {
    "lora demo": "test_demo.py::test_the_demo_trains_saves_maps_routes_and_gives_the_base_back",
    "lora bench --quick": "test_bench.py::"
    "test_a_quick_bench_reports_figures_with_their_interval_and_the_machine",
    "lora conformance --binding my_package": "test_report.py::"
    "test_the_command_prints_every_verdict_and_fails_with_an_undeclared_one",
    "lora conformance --command /other": "../interop/test_bindings.py::"
    "test_an_implementation_of_numpy_alone_passes_whatever_any_implementation_is_held_to",
    "lora conformance --command node": "../interop/test_bindings.py::"
    "test_an_implementation_in_javascript_passes_what_it_has",
    "lora conformance --writer": "test_pairs.py::test_a_process_writes_what_this_library_reads",
    "lora evolve ./handbook --ask": "test_cli_evolution.py::"
    "test_evolve_sends_a_teacher_what_is_allowed_and_nothing_else",
    "lora evolve ./handbook --name": LEARNED,
    "lora evolve ./handbook --out": LEARNED,
    "lora route how do": LEARNED,
    "lora factory run --scheduler": "test_factory.py::"
    "test_the_command_line_runs_jobs_on_the_cluster_that_it_is_given",
}
"""What takes minutes or a cluster, and the test that runs a line of its kind."""


def lines_of(text):
    """The commands of ours in a block for a shell, as lists of words."""
    joined = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in joined if line.startswith("lora ")]


def skill(name, seed, size=384):
    rng = np.random.default_rng(seed)
    weights = {}
    for part in ("query", "value"):
        factors = [rng.normal(0, 0.1, shape).astype("f4") for shape in ((size, 2), (2, size))]
        weights[f"encoder.layer.0.attention.self.{part}"] = lora.LowRank(*factors)
    about = "how to open and read files" if name == "docs" else "what a contract says"
    return lora.LoRACard(name, 2, 4.0, ("query", "value"), weights, {"description": about})


def write_handbook(folder):
    """Write 384 paragraphs that say whom to ask for what, and with which form, in 16 files."""
    things = "leave,a laptop,a desk,a badge,a phone,a training,a bonus,a car,a visa,a raise"
    things = f"{things},a key,a refund,an advance,a transfer,a sabbatical,parental leave".split(",")
    towns = "Lisbon Oslo Turin Ghent Porto Basel Graz Cork Lyon Bergen Malmo Leeds Split Varna"
    towns = f"{towns} Tartu Brno Delft Essen Nantes Pisa Riga Sofia Turku Zadar".split()
    people = "Mara Tomas Ines Olaf Petra Yusuf Klara Dario Nadia Emil Rosa Viktor Hanna Luca Sonja"
    people = f"{people} Jonas".split()
    forms = "amber birch cedar delta ember flint grove heron indigo juniper kestrel lotus maple"
    forms = (
        f"{forms} nectar onyx pearl quartz raven sienna topaz umber violet willow zephyr".split()
    )
    asked = [(i, j) for i in range(len(things)) for j in range(len(towns))]
    random.Random(0).shuffle(asked)
    folder.mkdir()
    for file in range(16):
        text = "\n\n".join(
            f"Here is how you ask for {things[i]} if you work in {towns[j]}. Write to {people[i]} "
            f"in time, and do not forget to take the {forms[j]} form with you."
            for i, j in asked[24 * file : 24 * (file + 1)]
        )
        (folder / f"part {file + 1}.md").write_text(text, encoding="utf-8")


def prepared(folder):
    """What the examples name, in a folder."""
    (folder / "cards").mkdir(parents=True)
    for name, seed in (("docs", 1), ("law", 2)):
        lora.save(skill(name, seed), folder / f"{name}.lora.arrow")
        export_peft(skill(name, seed), folder / f"peft-{name}")
    shutil.copy(folder / "docs.lora.arrow", folder / "cards")
    shutil.copytree(ROOT / "docs/examples", folder / "docs/examples")
    shutil.copytree(folder / "peft-docs", folder / "peft-adapter")
    rng = np.random.default_rng(3)
    for name in ("base", "tuned"):
        (folder / name).mkdir()
        names = [f"layer.{i}.query.weight" for i in range(2)]
        weights = {key: rng.normal(size=(16, 16)).astype("f4") for key in names}
        save_file(weights, folder / name / "model.safetensors")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}", encoding="utf-8")
    pairs = skill("docs", 1).weights.items()
    whole = {f"{m}.weight": np.zeros((pair.out_features, pair.in_features)) for m, pair in pairs}
    save_file(whole, folder / "model/model.safetensors")
    rows = [{"query": f"number {i}", "positive": f"n{i}", "group": str(i % 4)} for i in range(16)]
    Pairs.of(rows).save(folder / "pairs.jsonl")
    write_handbook(folder / "handbook")
    texts = ["open a file", "boil pasta", "sign a contract"]
    (folder / "sentences.txt").write_text("\n".join(texts), encoding="utf-8")
    parquet.write_table(pa.table({"text": texts}), folder / "texts.parquet")
    for page, file in (("conformance", "my_binding.py"), ("merge", "held-out.jsonl")):
        for block in blocks_of(ROOT / f"docs/how-to/{page}.md"):
            if block.info == "python" and f'"{file}")' in block.text:  # it writes this file
                with redirect_stdout(io.StringIO()):
                    execute(block)


def commands_of(page):
    """The commands of a page, or of the examples in the help, by block and in order."""
    texts = [block.text for block in BLOCKS if (block.page, block.info) == (page, "sh")]
    if page == "--help":
        texts = map(example, every(COMMANDS))
    return {text: lines_of(text) for text in texts}


def shells():
    pages = dict.fromkeys(block.page for block in BLOCKS)
    return [page for page in [*pages, "--help"] if any(commands_of(page).values())]


def lines(page):
    return [words for block in commands_of(page).values() for words in block]


def every(command):
    parts = getattr(command, "commands", {}).values()
    return [command, *(inner for part in parts for inner in every(part))]


def example(command):
    return (command.epilog or "").removeprefix("Example: ")


def named_in(starts, words):
    line = " ".join(words)
    return any(line.startswith(start) for start in starts)


def is_left_out(words):
    return named_in([*IN_SESSIONS, *ELSEWHERE], words)


def parsed(words):
    """Raise if the command has no such options."""
    command, name, rest = COMMANDS, "lora", words[1:]
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    command.make_context(name, list(rest))


@requirement("R10.7", "R10.11", "R25.4")
@pytest.mark.parametrize("page", shells())
def test_the_commands_of_a_page_run_and_print_what_it_says_or_at_least_exist_with_these_options(
    page, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PROFILE", "quick")
    monkeypatch.setenv("COLUMNS", f"{outputs.WIDTH}")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:randomly")  # for the suite's report
    prepared(tmp_path)
    for text, commands in commands_of(page).items():
        answers = []
        for words in commands:
            parsed(words)
            if not is_left_out(words):
                answers.append(answer(words, monkeypatch, capfd, fails="troubleshooting" in page))
        if page != "--help" and answers:
            outputs.compare(ROOT / page, text, "\n".join(filter(None, answers)))


@requirement("R10.11")
def test_the_picture_of_a_terminal_shows_what_its_commands_print_and_needs_no_other_file(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", f"{terminal.COLUMNS}")
    prepared(tmp_path)
    commands = [lines_of(text) for text in terminal.COMMANDS]
    terminal.compare([answer(words, monkeypatch, capfd) for (words,) in commands])
    drawn = terminal.PICTURE.read_text("utf-8")
    assert re.findall(r"https?://[\w.]+|url\(|@import|href", drawn) == ["http://www.w3.org"]
    for page in ("README.md", "docs/index.md"):
        assert '"docs/terminal.svg"' in read(page)
    monkeypatch.delenv("LORA_OUTPUTS", raising=False)
    with pytest.raises(AssertionError, match="`make outputs` changes"):
        terminal.compare(["1 module"] * 3)


def answer(words, monkeypatch, capfd, *, fails=False):
    """What a command prints, without bars of progress."""
    known = lora.digest("docs.lora.arrow")
    monkeypatch.setattr(sys, "argv", [word.replace("3b7e…", known) for word in words])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capfd.readouterr()
    # So few pairs may teach nothing: status 3.
    codes = (1, 2) if fails else (0, 3) if words[1] == "train" else (0,)
    assert ended.value.code in codes, (words, printed.err)
    notes = [line for line in printed.err.splitlines(keepends=True) if "━" not in line]
    return printed.out + "".join(notes)


@requirement("R10.7", "R10.11")
@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in shells() if any(named_in(IN_SESSIONS, w) for w in lines(page))]
)
def test_what_serves_waits_or_rolls_back_runs_and_prints_what_its_page_says(
    page, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PROFILE", "quick")
    prepared(tmp_path)
    blocks = commands_of(page)

    def is_run(words):
        return named_in(IN_SESSIONS, words) if page == "--help" else not named_in(ELSEWHERE, words)

    for text, printed in outputs.session(tmp_path, blocks, is_run):
        if page != "--help" and all(map(is_left_out, blocks[text])):
            (one,) = [e for e in outputs.examples(read(page)) if e.code == text]
            # Others on this network may be listed beside.
            beside = set(one.output.splitlines()) <= set(printed.splitlines())
            assert outputs.agree(one.output, printed) or beside, printed


@requirement("R10.7")
def test_a_renamed_option_would_be_noticed_and_every_reason_is_needed():
    with pytest.raises(Exception, match="--strategi"):
        parsed(["lora", "merge", "a", "-o", "b", "--strategi", "ties"])
    every_line = [words for page in shells() for words in lines(page)]
    for start in (*IN_SESSIONS, *ELSEWHERE):
        assert any(named_in([start], words) for words in every_line), start
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        assert f"\ndef {name}(" in read(f"tests/unit/{file}"), place


@requirement("R10.10", "R11.6", "R14.1")
def test_the_page_on_sharing_works_on_this_machine_behind_mutual_tls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path)
    signing, _, _, authority, behind_tls = blocks_of(ROOT / "docs/how-to/share.md")
    for words in lines_of(signing.text):
        ran(*words[1:])
    subprocess.run(["bash", "-ec", authority.text], check=True, capture_output=True)
    serve, fetch = (" ".join(words[1:]) for words in lines_of(behind_tls.text))
    with Serving(*shlex.split(serve.replace("8815", "0"))[1:]) as server:
        port = server.uri.rpartition(":")[2]
        cache = ("--cache", str(tmp_path / "cache"))
        words = shlex.split(fetch.replace("8815", port))
        assert lora.digest("cards/docs.lora.arrow") in ran(*words, *cache)
        identity = ("--cert", "reader.pem", "--key", "reader.key")
        stranger = [word for word in words if word not in identity]
        assert "ask for a certificate" in ran(*stranger, *cache, "--wait", "1", code=1)


# ---- the file format


@requirement("R10.5")
def test_the_page_on_the_format_states_each_byte_column_and_key_without_python():
    page = read("docs/format.md")
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", page, re.MULTILINE)
    assert FORMAT.items() <= dict(rows).items()
    order = ["6 + 2", "4 + 4 + n", "4 + 4 + m", "body", "4 + 4", "f", "4", "6"]
    order += ["column", "`module`", "`scaling`", "`A`", "`B`"]
    start = [cell for cell, _ in rows].index(order[0])
    assert [cell for cell, _ in rows[start : start + len(order)]] == order
    for words in (
        "Integers are little-endian",
        "padded with zeros to a multiple of 8 bytes",
        "take f from the 10 bytes at the end",
        "elements `offsets[i]` to `offsets[i + 1]`, of shape\n`shapes[2i] × shapes[2i + 1]`",
        "`struct<data: list<T>, shape: fixed_size_list<int32>[2]>`",
        "List offsets are int32",
    ):
        assert words in page
    assert "```python" not in page


FORMAT = {
    "6 + 2": "`ARROW1`, two zero bytes",
    "4 + 4": "`FF FF FF FF`, `00 00 00 00`: the end of the stream",
    "4": "int32 f",
    "6": "`ARROW1`",
    "`module`": "utf8",
    "`scaling`": "float64",
    "`A`": "`arrow.variable_shape_tensor`",
    "`B`": "`arrow.variable_shape_tensor`",
    "`lora.rank`": "decimal integer ≥ 1, the largest rank of any module",
    "`lora.alpha`": "decimal number > 0",
    "`lora.dtype`": "`float16`, `float32`, `float64` or `bfloat16`",
}
"""Rows of the page's tables."""


def by_hand(data):
    """A card's columns, read from the bytes as docs/format.md tells to, without Arrow."""

    def at(form, place):
        return struct.unpack_from(form, data, place)[0]

    def field(table, number):
        vtable = table - at("<i", table)
        offset = at("<H", vtable + 4 + 2 * number) if 4 + 2 * number < at("<H", vtable) else 0
        return table + offset if offset else None

    def follow(table, number):
        place = field(table, number)
        return place + at("<I", place)

    assert data[:8] == b"ARROW1\0\0"
    assert data[-6:] == b"ARROW1"
    footer = len(data) - 10 - at("<i", len(data) - 10)
    block = follow(footer + at("<I", footer), 3) + 4
    start, length = at("<q", block), at("<i", block + 8)
    batch = follow(start + 8 + at("<I", start + 8), 2)
    rows, vector = at("<q", field(batch, 0)), follow(batch, 2) + 4
    places = [vector + 16 * i for i in range(at("<I", vector - 4))]
    starts = [start + length + at("<q", place) for place in places]
    buffers = [data[s : s + at("<q", p + 8)] for s, p in zip(starts, places, strict=True)]
    _, where, text, _, scaling, *tensors = buffers
    ends = struct.unpack(f"<{rows + 1}i", where)
    names = [text[a:b].decode() for a, b in pairwise(ends)]
    scalings = struct.iter_unpack("<d", scaling)
    columns = {name: [*number] for name, number in zip(names, scalings, strict=True)}
    for _, _, lists, _, elements, _, _, shapes in (tensors[:8], tensors[8:]):
        bounds, flat = struct.unpack(f"<{rows + 1}i", lists), np.frombuffer(elements, "<f4")
        sizes = struct.iter_unpack("<2i", shapes)
        for name, (a, b), shape in zip(names, pairwise(bounds), sizes, strict=True):
            columns[name].append(flat[a:b].reshape(shape))
    return columns


@requirement("R10.5")
def test_a_card_is_read_by_hand_as_the_page_on_the_format_says(tmp_path, generate):
    for card in (generate.tiny(), skill("docs", 1, size=5)):
        lora.save(card, tmp_path / "card.lora.arrow")
        columns = by_hand((tmp_path / "card.lora.arrow").read_bytes())
        assert list(columns) == list(card.weights)
        for name, (scaling, a, b) in columns.items():
            assert scaling == card.weights[name].scaling
            assert np.array_equal(a, card.weights[name].A)
            assert np.array_equal(b, card.weights[name].B)


@requirement("R10.5")
def test_the_hex_dump_covers_every_byte_once_and_names_what_lies_there(tmp_path, generate):
    lora.save(generate.tiny(), tmp_path / "tiny.lora.arrow")
    data = (tmp_path / "tiny.lora.arrow").read_bytes()
    spans = generate.spans(data)
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    assert [starts[0], *ends] == [*starts, len(data)]
    bytes_of = {span.meaning: data[span.start : span.end] for span in spans}
    assert (
        bytes_of.items()
        >= {
            "A.data: float32, row-major, (in, rank)": struct.pack("<2f", 1, 2),
            "B.data: float32, row-major, (rank, out)": struct.pack("<3f", 3, 4, 5),
            "A.shape: int32, in and rank": struct.pack("<2i", 2, 1),
            "B.shape: int32, rank and out": struct.pack("<2i", 1, 3),
            "scaling: float64, alpha / rank": struct.pack("<d", 2.0),
            "A.data: int32 offsets of the lists": struct.pack("<2i", 0, 2),
            "B.data: int32 offsets of the lists": struct.pack("<2i", 0, 3),
            "module: int32 offsets into the text": struct.pack("<2i", 0, 4),
            "module: the names, UTF-8": b"proj",
        }.items()
    )
    page = generate.hexdump()
    whole = page.split("## All of it")[1]
    lines = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+?)  ", whole, re.MULTILINE)
    assert bytes.fromhex("".join(lines)) == data
    assert lora.digest(tmp_path / "tiny.lora.arrow") in page
    keys = re.findall(r"^\| `(lora\.\w+)` \|", read("docs/format.md"), re.MULTILINE)
    schemas = [span for span in spans if span.meaning.startswith("the schema")]
    stored = {entry.meaning for span in schemas for entry in generate.entries(data, span)}
    assert set(keys) - stored == {"lora.base_model", "lora.base_fingerprint"}  # which are optional


# ---- the pictures


def test_the_pictures_are_drawn_from_what_they_show_and_the_same_each_time(tmp_path, generate):
    drawn = generate.diagrams
    graph = drawn.imports(Path(lora.__file__).parent)
    assert {"errors", "card"} <= graph["arrow_format"]
    assert graph["errors"] == set()
    assert list(graph) == sorted(graph)  # what is drawn first does not depend on hashes
    level = drawn.depths(graph)
    assert all(level[other] < level[name] for name, others in graph.items() for other in others)

    def reach(edges, start):
        return edges[start].union(*(reach(edges, other) for other in edges[start]))

    less = drawn.reduced(graph)
    assert all(reach(less, name) == reach(graph, name) for name in graph)
    assert sum(map(len, less.values())) < sum(map(len, graph.values())) / 2
    base, active = (False, False), (True, False)
    steps = drawn.transitions()
    assert steps[base, active] == {"apply_card"}
    assert steps[active, base] == {"remove_card", "rollback"}
    assert steps[(False, True), active] == {"swap"}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        drawn.write(tmp_path / folder, "states", (6.4, 4.4), drawn.draw_states(steps))
        drawn.write(tmp_path / folder, "imports", (6.4, 8), drawn.draw_imports(graph))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert len({path.read_bytes() for path in (tmp_path / "one").iterdir()}) == 4


@requirement("R10.7")
def test_every_picture_on_a_page_is_one_that_is_drawn_in_both_themes(generate):
    source = read("docs/diagrams.py") + read("docs/figures.py")
    names = re.findall(r'write\(folder, "(\w+)"', source)
    for path in PAGES:
        shown = re.findall(r"generated/(\w+)-(\w+)\.svg#only-(\w+)\)", path.read_text("utf-8"))
        themes = [(theme, only) for _, theme, only in shown]
        assert themes == [("light", "light"), ("dark", "dark")] * (len(shown) // 2)
        assert {name for name, _, _ in shown} <= set(names)
    assert len(names) == 12
