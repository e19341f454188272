"""Exit statuses, and what is checked before a model is loaded or a peer is asked."""

import contextlib
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import lora
from lora.cli.app import waiting
from lora.testing.plugin import requirement
from lora.training.data import Pairs

ASK = "--ask x:queries --teacher-model m --key-file texts.txt"

USAGE = {
    "inspect docs.lora.arrow --plot docs.exe": "--plot docs.exe: expected a file that ends in",
    "inspect docs.lora.arrow --verify abc": "a SHA-256",
    "encode a --route": "--parquet",
    "encode --parquet texts.parquet": "no --out",
    "route a": "expected --card or --cards",
    "route a --card docs.lora.arrow --cards .": "found both",
    "route a --card docs.lora.arrow --threshold nan": "threshold",
    "route a --card docs.lora.arrow --top-k 0": "top_k",
    "probe texts.txt --base .": "--tuned",
    "probe texts.txt --share 2": "share",
    "probe --base . --tuned . --rank 0": "--rank",
    "train pairs.jsonl --name a -o a.lora.arrow --preset fast": "'fast'",
    "train pairs.jsonl --name a -o a.lora.arrow --loss fast": "fast",
    "train pairs.jsonl --name a -o a.lora.arrow --plot a.txt": "--plot a.txt",
    "train pairs.jsonl --name a -o a.lora.arrow --steps 0": "max_steps",
    "evolve . --rank 0": "rank",
    "evolve . --ask localhost:documents": "--teacher-model",
    "merge docs.lora.arrow docs.lora.arrow -o a.lora.arrow --weight 1": "--weight: expected one",
    "merge docs.lora.arrow -o a.lora.arrow --strategy best": "--strategy",
    "merge docs.lora.arrow -o a.lora.arrow --density 0.5": "--density",
    "extract . -o a.lora.arrow --rank 1 --error 0.1": "one of --rank, --energy, --error",
    "serve": "found neither",
    "list --peer http://x": "grpc://host:port",
    "fetch a --peer 127.0.0.1:1 --pin abc": "--pin: expected a SHA-256",
    "fetch a --peer 127.0.0.1:1 --allow all": "one of unsigned",
    "factory add bake a": "bake",
    "factory add merge docs.lora.arrow --name a --ranks 1": "No such option: --ranks",
    "factory run --at 25:00": "25:00",
    "bench --only magic": "magic",
    "demo --steps 0": "--steps",
    "train pairs.jsonl --name a": "--out",
    "train pairs.jsonl --name a -o a.lora.arrow --alpha 0": "--alpha: expected a finite number > 0",
    "evolve . --alpha nan": "--alpha: expected a finite number, found nan",
    "evolve . --name x/y": "x/y",
    f"evolve . {ASK} --teacher-url http://x/": "--teacher-url: expected https://",
    f"evolve . {ASK} --teacher-url x": "--teacher-url: expected https://…, or http://… on this "
    "machine, found no host; --insecure-http allows",
    f"evolve . {ASK} --teacher-url https://y": "--ask: expected the host of --teacher-url, y, "
    "found x",
    "merge docs.lora.arrow -o a.lora.arrow --strategy weighted --weight nan": "--weight",
    "merge docs.lora.arrow -o a.lora.arrow --weight 1": "--weight: expected none for average",
    "merge docs.lora.arrow -o a.lora.arrow --strategy slerp": "expected two cards, found 1",
    "extract . -o a.lora.arrow --method fast": "--method: expected one of full, randomized",
    "extract . -o a.lora.arrow --seed -1": "--seed",
    "fold . docs.lora.arrow -o out --weight 1 --weight 2": "--weight: expected one for each of 1",
    "fold . docs.lora.arrow -o out --weight inf": "--weight: expected a finite number",
    "convert docs.lora.arrow -o b.lora.arrow --alpha 0": "--alpha: expected a number > 0",
    "convert docs.lora.arrow -o b.lora.arrow --layout x": "--layout: expected one of linear",
    "route a --card docs.lora.arrow --threshold 2": "--threshold",
    "serve . --metrics-port 65536": "--metrics-port",
    "fetch a --peer localhost:99999": "--peer: expected grpc://host:port",
    "merge a -o a.lora.arrow --rank big": "lora: --rank: expected a whole number, found 'big'\n",
    "merge a -o a.lora.arrow --density x": "lora: --density: expected a number, found 'x'\n",
    "merge a -o a.lora.arrow --weight y": "lora: --weight: expected a number, found 'y'\n",
    "serve . --port x": "lora: --port: expected a whole number, found 'x'\n",
    "serve . --port 65536": "--port: expected a number less than or equal to 65535, found '65536'",
    "factory add merge a --name a --rank x": "takes, found --rank: expected a whole number, found",
}
"""What no file could put right -> words of the error."""

FILES = {
    "inspect none.lora.arrow": "none.lora.arrow",
    "encode a --card none.lora.arrow": "none.lora.arrow",
    "encode a --out none/a.npy": "existing folder",
    "encode --parquet texts.parquet --out a.parquet --card none.lora.arrow": "none.lora.arrow",
    "route a --card none.lora.arrow": "none.lora.arrow",
    "route a --card docs.lora.arrow --card docs.lora.arrow": "expected one card of a name",
    "route a --cards none": "none: expected a folder of live cards",
    "probe none.txt": "none.txt",
    "train none.jsonl --name a -o a.lora.arrow": "none.jsonl",
    "train pairs.jsonl --name a -o none/a.lora.arrow": "existing folder",
    "train pairs.jsonl --name a -o a.lora.arrow --checkpoint none/a": "existing folder",
    "train pairs.jsonl --name a -o a.lora.arrow --plot none/a.svg": "existing folder",
    "eval none.lora.arrow --pairs pairs.jsonl": "none.lora.arrow",
    "eval docs.lora.arrow --pairs none.jsonl": "none.jsonl",
    "eval docs.lora.arrow --pairs pairs.jsonl": "at least 10 pairs, found 4",
    "evolve none": "none: expected a folder of documents",
    "convert empty -o a.lora.arrow": "none; PEFT's save_pretrained writes it\n",
    "convert model -o a.lora.arrow": "found the folder of a model; lora extract makes a card of",
    "convert json -o a.lora.arrow": "expected JSON, found a syntax error at line 2, column 3\n",
    "convert cut.safetensors -o a.lora.arrow": "found one that is broken or cut off; fetch it or",
    "eval docs.lora.arrow --pairs cut.arrow": "found another form, or a broken file\n",
    "eval docs.lora.arrow --pairs texts.parquet": "found another form, or a broken file\n",
    "inspect cut": "lora: cut: expected an existing path, found none\n",
    "evolve . --cards none": "none: expected a folder of live cards",
    "evolve . --answers none.jsonl": "none.jsonl: expected a file of answers",
    "evolve . --questions none.jsonl": "none.jsonl: expected a file of routing checks",
    "fetch a --peer 127.0.0.1:1 -o none/a.lora.arrow": "existing folder",
    "fetch a --peer 127.0.0.1:1 --trust texts.txt": "texts.txt: expected an Ed25519 key",
    "sign docs.lora.arrow --key texts.txt": "texts.txt: expected an Ed25519 key",
    "extract . -o a.lora.arrow --target nowhere": "model.safetensors",
    "conformance --junit none/a.xml": "--junit none/a.xml: expected a file in an existing folder",
    "demo --out texts.txt": "--out texts.txt: expected a folder, found a file",
}
"""What a file could put right -> words of the error."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a card and few pairs, in which no model is loaded and no peer is asked."""
    monkeypatch.chdir(tmp_path)

    def never(*_, **__):
        pytest.fail("it was loaded, or asked, before all was checked")

    monkeypatch.setattr("lora.engine.open_encoder", never)
    monkeypatch.setattr("lora.federation.discovery.Discovery.wait", never)
    ones = lora.LowRank(np.ones((4, 1), "f4"), np.ones((1, 4), "f4"))
    card = lora.LoRACard("docs", 1, 1.0, ["q"], {"q": ones}, {"description": "files"})
    lora.save(card, "docs.lora.arrow")
    Pairs.of({"query": f"q{i}", "positive": f"p{i}"} for i in range(4)).save(Path("pairs.jsonl"))
    Path("texts.txt").write_text("open a file")
    Path("texts.parquet").touch()
    for name in ("empty/a", "model/config.json", "json/adapter_config.json"):
        Path(name).parent.mkdir()
        Path(name).write_text("{\n  oops")
    for name in ("cut.safetensors", "cut.arrow"):
        Path(name).write_text("abcdefgh")
    return tmp_path


@requirement("R25.6", "R25.3")
@pytest.mark.parametrize(
    ("status", "line", "words"),
    [(2, *item) for item in USAGE.items()] + [(1, *item) for item in FILES.items()],
)
def test_what_is_wrong_is_refused_before_a_model_is_loaded(here, folder, status, line, words):
    there = sorted(folder.iterdir())
    code, out, err = here(*line.split())
    assert (code, out) == (status, "")
    assert re.fullmatch(r"lora: [^\n]+\n", err)
    assert words in err
    assert set(folder.iterdir()) - {*there} <= {folder / "factory"}


@requirement("R25.2", "R25.3")
def test_a_plot_says_where_it_is(here, folder):
    code, out, err = here("inspect", "docs.lora.arrow", "--plot", "docs.svg")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "drawn: docs.svg"
    assert Path("docs.svg").read_text().startswith("<?xml")
    assert json.loads(here("inspect", "docs.lora.arrow", "--json", "--plot", "docs.svg")[1])


@requirement("R25.3")
def test_what_is_waited_for_is_shown_on_a_terminal_alone_and_goes_away(capsys, monkeypatch):
    with waiting("loading the model"):
        pass
    assert capsys.readouterr() == ("", "")
    terminal, tty = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(tty, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        with waiting("loading the model"):
            threading.Event().wait(0.3)
    pieces = []
    with contextlib.suppress(OSError):  # Linux: EIO once all that was written has been read
        while piece := os.read(terminal, 10_000):
            pieces.append(piece)
    os.close(terminal)
    drawn = b"".join(pieces).decode()
    assert "loading the model" in drawn
    assert drawn.endswith("\x1b[2K")  # the line is erased
