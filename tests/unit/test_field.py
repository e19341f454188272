"""The field: its rows are declared in full, its page is of its results, and small rows run."""

import json
import re
import sys
from pathlib import Path

import pytest

from lora.testing.plugin import requirement
from lora.testing.requirements import read_spec
from tests.field import __main__ as field

ROOT = Path(__file__).parents[2]
OURS = {"reference", "numpy-only", "faulty", "javascript"}
RESULTS = {path.stem: json.loads(path.read_text("utf-8")) for path in field.RESULTS.glob("*.json")}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import field_table

    return field_table


def environment_of(name):
    return field.ROWS[name].get("environment", name)


@requirement("R24.8")
def test_each_row_that_others_wrote_has_exact_pins_and_no_host():
    for name in field.ROWS.keys() - OURS:
        pins = (field.HERE / "pins" / f"{environment_of(name)}.txt").read_text("utf-8").split()
        assert pins, name
        for pin in pins:
            assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin), (name, pin)


@requirement("R24.8")
def test_it_is_built_once_nine_that_others_wrote_are_measured_and_each_deviation_has_a_reason():
    assert RESULTS.keys() <= field.ROWS.keys()
    measured = {name for name, result in RESULTS.items() if result["state"] != "not run"}
    has_nine = len({environment_of(name) for name in measured - OURS}) >= 9
    assert has_nine == (read_spec(ROOT / "spec")["R24.8"].status == "built")
    for name in measured:
        result = RESULTS[name]
        assert (result["state"] == "red") == ("red" in field.ROWS[name]), name
        for deviation in result["deviations"]:
            assert deviation["reason"], (name, deviation)
            assert deviation["place"] or "red" in field.ROWS[name], (name, deviation)
    assert not [name for name in RESULTS.keys() - measured if not RESULTS[name]["reason"]]


@requirement("R24.8", "R10.6")
def test_the_page_is_of_the_results_and_says_in_words_what_differs(table):
    results = table.read()
    page = table.page(results)
    assert [result["row"] for result in results] == list(field.ROWS)
    for result in results:
        if result["state"] == "not run":
            assert f"- *{result['row']}* was not run: " in page
            continue
        assert f"| {result['row']} | {result['version']} |" in page
        for deviation in result["deviations"]:
            assert f"**{result['row']}**: {table.escaped(deviation['reason'])}" in page
    assert '--8<-- "docs/generated/field.md"' in (ROOT / "docs/field.md").read_text("utf-8")


def result_with(name, verdicts, deviations=()):
    about = {"version": "1", "date": "2026-01-02", "suite": "0", "specification": "3b7e"}
    return {"row": name, **about, "state": "as declared", "profile": "quick",
            "verdicts": verdicts, "deviations": list(deviations)}  # fmt: skip


@requirement("R24.8")
def test_a_law_is_broken_a_convention_different_a_refusal_accepted_each_with_its_colour(table):
    verdicts = {"R4.1": {"law": "expected failure", "convention": "passed"}}
    verdicts["R4.4"] = {"convention": "expected failure", "refusal": "failed"}
    why = {"requirement": "R4.1", "class": "law", "reason": "it_rounds", "place": "a.py:3"}
    idle = {"row": "idle", "state": "not run", "reason": "no module"}
    page = table.page([result_with("one", verdicts, [why]), idle])
    assert (
        '| one | 1 | <span class="broken">1 broken</span> | 1 alike, <span class="different">1 '
        'different</span> | <span class="accepted">1 accepted</span> | – | 1 not yet |' in page
    )
    assert '| [R4.1](generated/R4.md#R4.1) | <span class="broken">✗</span> ✓ <sup>1</sup>' in page
    assert '<span class="different">≠</span> <span class="accepted">○</span> |' in page
    assert "1. **one**: it\\_rounds (a.py:3)" in page
    assert "- *idle* was not run: no module" in page
    assert "## Layers" not in page
    for seen, colour in (("choice", "different"), ("fault", "broken")):
        again = table.page([result_with("one", verdicts, [{**why, "class": "law", "seen": seen}])])
        assert f'| one | 1 | <span class="{colour}">1 {colour}</span> |' in again
        assert f"1. **one**: it\\_rounds (a.py:3; {seen})" in again


@requirement("R24.8")
def test_each_deviation_was_read_again_in_the_library_and_each_fault_has_a_page():
    pages = {path.stem for path in (ROOT / "docs" / "field").glob("*.md")}
    for name in field.ROWS.keys() - OURS:
        row, result = field.ROWS[name], RESULTS[name]
        places = {deviation["place"] for deviation in result["deviations"]}
        places |= set(re.findall(r"[\w/]+\.py:\d+", row.get("outside", "")))
        reading = field.READINGS.get(environment_of(name), {"places": {}})
        assert places <= reading["places"].keys(), name
        assert not places or reading["version"] == result["version"], name
        found = {reading["places"][place]["is"] for place in places}
        assert found <= {"fault", "choice", "precision", "unchecked"}
        assert "fault" not in found or environment_of(name) in pages, name
    listed = re.findall(r"\(field/([\w-]+)\.md\)", (ROOT / "docs/field.md").read_text("utf-8"))
    assert set(listed) == pages


@requirement("R24.8")
def test_a_reading_of_a_line_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n", "utf-8")
    field.check_places({"a.py:2": {"line": "y = 2"}}, tmp_path)
    for place, line in (("a.py:1", "y = 2"), ("a.py:3", "y = 2"), ("b.py:2", "y = 2")):
        with pytest.raises(field.NotRunError, match=re.escape(place)):
            field.check_places({place: {"line": line}}, tmp_path)


@requirement("R24.8")
@pytest.mark.foreign  # it installs
@pytest.mark.parametrize("name", ["loralib", "lora-pytorch"])
def test_two_small_rows_give_what_is_committed(name, tmp_path):
    result = field.measure(name, field.ROWS[name], tmp_path, patience=5)
    for key in ("state", "version", "verdicts", "deviations"):
        assert result.get(key) == RESULTS[name][key], result


@requirement("R24.8")
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"command": f"{sys.executable} -c 'import nothing_of_the_kind'"}, "nothing_of_the_kind"),
        ({"command": f"{sys.executable} -c 'input()'"}, "more than 1 seconds"),
        ({"binding": "x.py", "environment": "absent"}, "absent"),
    ],
)
def test_a_row_that_cannot_be_installed_or_started_is_not_run(row, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(field, "HERE", tmp_path)
    (tmp_path / "pins").mkdir()
    (tmp_path / "pins" / "absent.txt").write_text("--no-index\nabsent==1\n", "utf-8")
    monkeypatch.setattr(field, "RUN_SECONDS", 1 if "seconds" in reason else 60)
    result = field.measure("row", row, tmp_path)
    assert result["state"] == "not run"
    assert reason in result["reason"]
    assert "/" not in result["reason"].replace("…/", "")
