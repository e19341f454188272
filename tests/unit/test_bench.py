"""The bench runs, reports what it promises, and compares like with like; no test looks at a time."""

import json
import math

import pytest

from lora.errors import ArgumentError, MissingPackageError, StateError
from lora.testing import bench
from lora.testing.plugin import requirement
from tests.unit.test_cli import shell


@requirement("R6.7", "R6.8", "R25.2")
def test_a_quick_bench_reports_figures_with_their_interval_and_the_machine(tmp_path):
    out = tmp_path / "figures.json"
    done = shell(
        "bench", "--quick", "--only", "routing", "--threads", "1", "--out", str(out), "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text("utf-8"))
    assert report == json.loads(done.stdout)
    (found,) = report.values()
    assert found["machine"]["threads"] == 1
    assert {"torch", "numpy", "lora-cards"} <= found["machine"]["versions"].keys()
    for row in found["rows"]:
        low, high = row["interval"]
        assert low <= row["value"] <= high
        assert math.isfinite(row["value"])
    assert {row["side"] for row in found["rows"] if "side" in row} == {"select", "by intent_query"}


@requirement("R6.1", "R6.2", "R6.6", "R6.7")
def test_loading_applying_and_removing_are_measured_beside_safetensors_and_peft():
    (part,) = bench.run_bench(["lifecycle"], quick=True, threads=1)
    measured = {requirement for row in part.rows for requirement in row["ids"]}
    assert {"R6.1", "R6.2", "R6.6", "R6.7"} <= measured
    beside = {row["beside"] for row in part.rows if "beside" in row}
    assert beside == {
        "safetensors",
        "PEFT load_adapter",
        "PEFT inject",
        "PEFT set_adapter",
        "PEFT delete_adapter",
    }
    present = {
        row["present"]
        for row in part.rows
        if row["group"] == "present" and row.get("of") == "apply"
    }
    assert present == {1, 10}


@requirement("R2.13", "R6.3", "R6.5", "R8.6")
def test_forwards_are_compared_with_peft_only_if_both_compute_the_same():
    """The script refuses to time outputs that differ."""
    (part,) = bench.run_bench(["forward"], quick=True, threads=1)
    assert {"R6.3", "R6.5", "R8.6"} <= {
        requirement for row in part.rows for requirement in row["ids"]
    }
    assert {row["side"] for row in part.rows if "side" in row} >= {
        "folded",
        "LoRALinear",
        "PEFT",
        "weight-side order",
        "three",
        "ours",
    }


@requirement("R25.2")
def test_a_peer_that_is_not_installed_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: None if name == "peft" else name
    )
    with pytest.raises(
        MissingPackageError,
        match=r"bench: expected peft, found not installed; .*lora-cards\[bench\]",
    ):
        next(bench.run_bench(["routing"]))


@requirement("R25.2")
def test_a_part_that_is_none_and_a_script_that_fails_are_named(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match=r"expected one of forward, .*, found 'magic'"):
        next(bench.run_bench(["magic"]))
    monkeypatch.setattr(bench, "folder_of", lambda _: tmp_path)
    (tmp_path / "growth.py").write_text("raise SystemExit('no more cores')")
    with pytest.raises(
        StateError, match="bench growth: expected a script that ends well, found no more cores"
    ):
        next(bench.run_bench(["growth"]))


@requirement("R6.7")
@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (
            {
                "what": "load",
                "kind": "below",
                "unit": "ms",
                "value": 0.5,
                "target": 100,
                "met": True,
            },
            ("load", "0.5 ms", "", "< 100 ms", "yes"),
        ),
        (
            {
                "what": "x",
                "kind": "times faster",
                "value": 2,
                "interval": [1, 3],
                "target": 1.5,
                "met": True,
            },
            ("x", "2 × as fast", "1 … 3", ">= 1.5 × as fast", "yes"),
        ),
        (
            {"what": "x", "kind": "ratio", "value": 2, "target": None, "met": None},
            ("x", "2 ×", "", "", ""),
        ),
    ],
)
def test_a_row_says_its_target_and_whether_it_is_met(row, cells):
    assert bench.shown(row) == cells
