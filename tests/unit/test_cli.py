"""The command line: facts on stdout, one line of error on stderr, exit codes, help with examples."""

import json
import subprocess
import sys

import numpy as np
import pytest

import lora
from lora.testing.plugin import requirement

COMMANDS = ["inspect", "encode", "route", "train", "demo"]


def run(*arguments, stdin="", code="from lora.cli import main; main()"):
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'lora'; {code}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, check=False, timeout=300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A card file for MiniLM, and its digest."""
    rng = np.random.default_rng(0)
    pair = lora.LowRank(rng.normal(size=(384, 2)).astype("f4"), rng.normal(size=(2, 384)).astype("f4"))
    meta = {"description": "reading and writing files in Python"}
    card = lora.LoRACard("docs", 2, 4.0, ("query",), {"encoder.layer.0.attention.self.query": pair}, meta)
    path = tmp_path_factory.mktemp("cards") / "docs.lora.arrow"
    return path, lora.save(card, path)


@requirement("R25.3", "R1.12")
def test_inspect_tells_a_cards_fields_without_importing_torch(saved):
    path, digest = saved
    code = "from lora.cli import app; app(standalone_mode=False); assert 'torch' not in sys.modules"
    told = json.loads(run("inspect", path, "--verify", digest, "--json", code=code).stdout)
    assert (told["name"], told["rank"], told["digest"], told["parameters"]) == ("docs", 2, digest, 1536)
    shown = run("inspect", path).stdout
    assert digest[:32] in shown
    assert "encoder.layer.0.attention.self.query" in shown


@requirement("R25.3")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["inspect", "nowhere.lora.arrow"], 1, "nowhere"),
        (["inspect", __file__], 1, "Arrow IPC file"),
        (["inspect"], 2, "file"),
        (["nonsense"], 2, "nonsense"),
        (["inspect", "--nonsense"], 2, "nonsense"),
        (["train", "nowhere.jsonl", "--name", "x", "--out", "nowhere/x"], 1, "nowhere"),
    ],
)
def test_an_error_is_one_line_and_a_status(arguments, status, said):
    found = run(*arguments)
    assert (found.returncode, found.stdout) == (status, "")
    assert len(found.stderr.splitlines()) == 1
    assert said in found.stderr


@requirement("R25.3")
def test_a_wrong_digest_and_an_unexpected_failure_are_one_line_too(saved):
    found = run("inspect", saved[0], "--verify", "0" * 64)
    assert (found.returncode, len(found.stderr.splitlines())) == (1, 1)
    assert saved[1] in found.stderr
    broken = "import lora.cli, lora; lora.digest = lambda _: 1 / 0; lora.cli.main()"
    found = run("inspect", saved[0], code=broken)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("lora: internal error: ZeroDivisionError")
    assert len(found.stderr.splitlines()) == 1


@requirement("R25.4")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example(command):
    found = run(command, "--help")
    assert found.returncode == 0
    assert f"Example: lora {command}" in found.stdout


@requirement("R25.4")
def test_the_shell_can_complete_commands():
    script = "import os; os.environ |= {'_LORA_COMPLETE': 'complete_bash', 'COMP_WORDS': 'lora ', 'COMP_CWORD': '1'}; "
    found = run(code=script + "from lora.cli import main; main()")
    assert set(COMMANDS) <= set(found.stdout.split())


@requirement("R25.3")
def test_encode_reads_arguments_or_lines_and_applies_cards(saved, tmp_path):
    plain = run("encode", "read a file", "--json")
    rows = np.array(json.loads(plain.stdout))
    assert rows.shape == (1, 384)
    out = tmp_path / "rows.npy"
    told = json.loads(run("encode", "--card", saved[0], "--out", out, "--json", stdin="read a file\n\n").stdout)
    assert told == {"file": str(out), "shape": [2, 384]}
    assert np.abs(np.load(out)[0] - rows[0]).max() > 1e-3


@requirement("R25.3")
def test_route_names_a_card_or_none(saved):
    chosen = run("route", "how do I open a file?", "--card", saved[0], "--threshold", "0.3", "--json")
    assert [route["name"] for route in json.loads(chosen.stdout)] == ["docs"]
    none = run("route", "the colour of the sea", "--card", saved[0], "--threshold", "0.3")
    assert (none.returncode, none.stdout) == (0, "")
    assert "no card fits" in none.stderr


@requirement("R25.3", "R17.10")
def test_train_writes_a_card_and_a_plot_and_shows_progress_on_stderr_alone(tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"query": f"number {i}", "positive": f"n{i}", "group": str(i % 4)} for i in range(16)]
    data.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    out, plot = tmp_path / "n.lora.arrow", tmp_path / "n.png"
    found = run("train", data, "--name", "n", "--out", out, "--steps", "1", "--rank", "2", "--plot", plot, "--json")
    told = json.loads(found.stdout)
    assert (told["steps"], told["digest"]) == (1, lora.digest(out))
    assert lora.load(out).rank == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "training n" in found.stderr
