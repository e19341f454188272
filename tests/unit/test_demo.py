"""The demo runs the whole story on the embedded model and real data."""

import json
import subprocess
import sys

import pytest

import lora
from lora.testing.plugin import requirement


@pytest.mark.slow
@requirement("R25.1", "R25.3", "R17.10")
def test_the_demo_trains_saves_maps_routes_and_gives_the_base_back(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, *"-m lora.cli demo --steps 1 --json --out".split(), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    summary = json.loads(run.stdout)
    assert summary["restored"] is True
    assert summary["mapped_equal"] is True
    assert [len(names) for names in summary["routes"].values()] == [1, 1, 1, 0]
    assert 0.2 < summary["base"]["recall_at_1"] < 0.6
    assert summary["card"] != summary["base"]
    card = lora.load(out / "python-docs.lora.arrow", verify=summary["digest"])
    assert card.base_fingerprint is not None
    assert len(card.weights) == 12
    assert sorted(summary["files"]) == sorted(map(str, out.iterdir()))
    assert (out / "history.svg").read_text("utf-8").startswith("<?xml")
    assert "training" in run.stderr
    assert "Traceback" not in run.stderr
