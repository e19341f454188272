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
    command = [
        sys.executable,
        "-m",
        "lora.cli",
        "demo",
        "--steps",
        "1",
        "--out",
        str(out),
        "--json",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    told = json.loads(run.stdout)
    assert told["restored"] is True
    assert told["mapped_equal"] is True
    assert [len(chosen) for chosen in told["routes"].values()] == [1, 1, 1, 0]
    assert 0.2 < told["base"]["recall_at_1"] < 0.6
    assert told["card"] != told["base"]
    card = lora.load(out / "python-docs.lora.arrow", verify=told["digest"])
    assert card.base_fingerprint is not None
    assert len(card.weights) == 12
    assert sorted(told["files"]) == sorted(map(str, out.iterdir()))
    assert (out / "history.svg").read_text("utf-8").startswith("<?xml")
    assert "training" in run.stderr
    assert "Traceback" not in run.stderr
