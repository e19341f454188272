"""The bench runs, reports what it promises, and compares like with like.

One test checks times: they are a fiftieth of their limits, so that a busy machine can't fail it.
"""

import importlib
import json
import math
import time

import pytest

from lora.engine import ArrowEngine
from lora.errors import ArgumentError, MissingPackageError, StateError
from lora.files import load, save
from lora.models.adapt import init_card
from lora.testing import bench
from lora.testing.plugin import requirement
from tests.unit.test_cli import shell


@requirement("R6.7", "R6.8", "R25.2")
def test_a_quick_bench_reports_figures_with_their_interval_and_the_machine(tmp_path, monkeypatch):
    out = tmp_path / "figures.json"
    options = ["--quick", "--only", "routing", "--threads", "1", "--out", str(out), "--json"]
    done = shell("bench", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text("utf-8"))
    assert report == json.loads(done.stdout)
    (part,) = report.values()
    assert part["machine"]["threads"] == 1
    assert {"torch", "numpy", "lora-cards"} <= part["machine"]["versions"].keys()
    measured = {"benchmarks/routing.py", "lora/routing.py", "lora/router.py"}
    sources = part["machine"]["sources"]
    assert measured <= set(sources)
    monkeypatch.syspath_prepend(bench.folder_of("benchmarks"))
    assert sources == importlib.import_module("code_digests").digests(sources)
    for row in part["rows"]:
        low, high = row["interval"]
        assert low <= row["value"] <= high
        assert math.isfinite(row["value"])
    assert {row["side"] for row in part["rows"] if "side" in row} == {"select", "by intent_query"}


def measured(name):
    """The rows of a quick run of a part, and the requirements that they measure."""
    (part,) = bench.run_bench([name], quick=True, threads=1)
    return part.rows, {requirement for row in part.rows for requirement in row["ids"]}


def values_of(rows, key):
    return {row[key] for row in rows if key in row}


@requirement("R6.1", "R6.2", "R6.5", "R6.6")
@pytest.mark.parametrize(("rank", "targets"), [(8, ["query", "value"]), (16, ["all-linear"])])
def test_a_card_is_loaded_applied_and_removed_within_the_limits(tmp_path, rank, targets):
    engine = ArrowEngine.from_pretrained(None, device="cpu")
    options = {"alpha": 1.0, "target_modules": targets, "seed": 0}
    path = tmp_path / "docs.lora.arrow"
    save(init_card(engine.base, "docs", rank=rank, **options), path)
    times = {"load": [], "apply": [], "remove": []}
    for _ in range(5):
        start = time.perf_counter()
        card = load(path)
        loaded = time.perf_counter()
        engine.manager.apply_card(card)
        applied = time.perf_counter()
        tensors = engine.manager.model.state_dict().values()
        engine.manager.remove_card("docs")
        removed = time.perf_counter()
        spans = {"load": loaded - start, "apply": applied - loaded, "remove": removed - applied}
        for name, seconds in spans.items():
            times[name].append(seconds)
    best = {name: min(seconds) for name, seconds in times.items()}
    assert best["load"] < 0.1
    assert best["apply"] < 0.5
    assert best["remove"] < 0.1
    own = {tensor.data_ptr() for tensor in engine.base.state_dict().values()}
    assert 0 < sum(t.nbytes for t in tensors if t.data_ptr() not in own) < 50e6


@requirement("R6.1", "R6.2", "R6.6", "R6.7")
@pytest.mark.slow
def test_loading_applying_and_removing_are_measured_beside_safetensors_and_peft(monkeypatch):
    rows, ids = measured("lifecycle")
    assert {"R6.1", "R6.2", "R6.6", "R6.7"} <= ids
    limits = {(row["what"], row["target"]) for row in rows if "R6.1" in row["ids"]}
    assert limits == {("load a card, r8 q,v", 100), ("load a card, r16 all Linears", 100)}
    calls = ["load_adapter", "inject", "set_adapter", "delete_adapter"]
    assert values_of(rows, "beside") == {"safetensors", *(f"PEFT {call}" for call in calls)}
    of_apply = [row for row in rows if row["group"] == "present" and row.get("of") == "apply"]
    assert values_of(of_apply, "present") == {1, 10}
    monkeypatch.syspath_prepend(bench.folder_of("benchmarks"))
    assert importlib.import_module("lifecycle").PRESENT == (1, 10, 100, 1000)


@requirement("R2.13", "R6.3", "R6.5", "R8.6")
@pytest.mark.slow
def test_forwards_are_compared_with_peft_only_if_both_compute_the_same():
    """The script refuses to time outputs that differ."""
    rows, ids = measured("forward")
    assert {"R6.3", "R6.5", "R8.6"} <= ids
    sides = {"folded", "LoRALinear", "PEFT", "weight-side order", "three", "ours"}
    assert sides <= values_of(rows, "side")
    folded = [row for row in rows if row.get("side") == "folded"]
    assert values_of(folded, "adapter") == {"r8 q,v", "r16 all Linears"}
    assert all(row["target"] <= 0.1 for row in folded)  # what counts as met


@requirement("R25.2")
def test_a_peer_that_is_not_installed_is_named_with_what_installs_it(monkeypatch):
    without_peft = lambda name: None if name == "peft" else name  # noqa: E731
    monkeypatch.setattr(bench.importlib.util, "find_spec", without_peft)
    message = r"bench: expected peft, found not installed; .*lora-cards\[bench\]"
    with pytest.raises(MissingPackageError, match=message):
        next(bench.run_bench(["routing"]))


@requirement("R25.2")
def test_a_part_that_is_none_and_a_script_that_fails_are_named(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match=r"expected one of forward, .*, found 'magic'"):
        next(bench.run_bench(["magic"]))
    monkeypatch.setattr(bench, "folder_of", lambda _: tmp_path)
    (tmp_path / "growth.py").write_text("raise SystemExit('no more cores')")
    message = "bench growth: expected a script that ends well, found no more cores"
    with pytest.raises(StateError, match=message):
        next(bench.run_bench(["growth"]))


BELOW = {"kind": "below", "unit": "ms", "value": 0.5, "target": 100, "met": True}
FASTER = {"kind": "times faster", "value": 2, "interval": [1, 3], "target": 1.5, "met": True}
RATIO = {"kind": "ratio", "value": 2, "target": None, "met": None}


@requirement("R6.7")
@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (BELOW, ("x", "0.5 ms", "", "< 100 ms", "yes")),
        (FASTER, ("x", "2 × as fast", "1 … 3", ">= 1.5 × as fast", "yes")),
        (RATIO, ("x", "2 ×", "", "", "")),
    ],
)
def test_a_row_says_its_target_and_whether_it_is_met(row, cells):
    assert bench.shown({"what": "x", **row}) == cells
