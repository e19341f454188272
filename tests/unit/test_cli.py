"""The command line: what it prints, where, and how it ends, in this process and through a real
shell.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer

import lora
from lora.card import LoRACard, LowRank
from lora.cli.app import app, main, progress_bar
from lora.testing.plugin import requirement
from lora.training.data import Pairs

ALL = typer.main.get_command(app).commands
COMMANDS = sorted(ALL)
EVERY = ALL | {f"factory {name}": part for name, part in ALL["factory"].commands.items()}
SCRIPTS = sysconfig.get_path("scripts")
QUIET = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("PYTHONUNBUFFERED", "LORA_", "COV_"))
}


def shell(*argv, **options):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "lora.cli", *map(str, argv)]
    environment = {**QUIET, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, text=True, env=environment, check=False, timeout=1200, **pipes)


def pieces(terminal):
    """What is drawn on a terminal, until its other end is closed."""
    with contextlib.suppress(OSError):  # how Linux says that
        while piece := os.read(terminal, 4096):
            yield piece


def made(name, **metadata):
    """A card of MiniLM's shapes."""
    rng = np.random.default_rng(len(name))
    modules = [f"encoder.layer.{i}.attention.self.query" for i in range(6)]
    factors = {m: (rng.normal(0, 0.1, (384, 2)), rng.normal(0, 0.1, (2, 384))) for m in modules}
    weights = {
        m: LowRank(a.astype(np.float32), b.astype(np.float32)) for m, (a, b) in factors.items()
    }
    return LoRACard(name, 2, 4.0, ("query",), weights, metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Cards, a data set, and files that are neither."""
    path = tmp_path_factory.mktemp("cli")
    description = "Python documentation: files, paths, reading and writing"
    lora.save(made("docs", description=description), path / "docs.lora.arrow")
    lora.save(made("food", description="Cooking recipes and food"), path / "food.lora.arrow")
    lora.save(made("odd[/b]{x}", note="[/red] 日本\n"), path / "odd[1].lora.arrow")
    Pairs.of(
        {"query": f"number {i} of {j}", "positive": f"n{i}.{j}", "group": str(i)}
        for i in range(8)
        for j in range(3)
    ).save(path / "pairs.jsonl")
    (path / "garbage.lora.arrow").write_bytes(b"garbage" * 99)
    return path


def one_line(text):
    """Whether a message is one line that says who speaks, and no traceback."""
    return re.fullmatch(r"lora: [^\n]+\n", text) is not None and "Traceback" not in text


INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
sys.meta_path.insert(0, Finder())
package = sys.argv[1].split(".")[0]
for name in [name for name in sys.modules if name.split(".")[0] == package]:
    del sys.modules[name]  # what measures coverage has imported some
runpy.run_module("lora.cli", run_name="__main__")
"""


@requirement("R25.3")
@pytest.mark.parametrize("module", ["typer", "rich.console", "lora.cli.suite", "json.decoder"])
def test_an_interrupt_of_the_first_imports_is_one_line(module):
    command = [sys.executable, "-c", INTERRUPTED, module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "lora: interrupted\n")


# inspect


@requirement("R25.3")
def test_inspect_says_what_the_file_says_of_itself(here, folder):
    path = folder / "docs.lora.arrow"
    code, out, err = here("inspect", path)
    assert (code, err) == (0, "")
    facts = ["docs", "1.0", "float32", "query", "9216", "36864", "layer.0…5.attention", "reading"]
    assert not [fact for fact in facts if fact not in out]
    code, out, err = here("inspect", path, "--json", "--verify", lora.digest(path))
    assert (code, err) == (0, "")
    facts = json.loads(out)
    modules = [f"encoder.layer.{i}.attention.self.query" for i in range(6)]
    assert facts.pop("modules") == {name: [384, 2, 384, 2.0] for name in modules}
    assert facts == {
        "name": "docs",
        "digest": lora.digest(path),
        "format": "1.0",
        "rank": 2,
        "alpha": 4.0,
        "dtype": "float32",
        "target_modules": ["query"],
        "parameters": 9216,
        "bytes": 36864,
        "base_model": None,
        "base_fingerprint": None,
        "metadata": {"description": "Python documentation: files, paths, reading and writing"},
        "extra": {},
    }


@requirement("R25.3")
def test_a_name_that_looks_like_markup_is_shown_as_it_is(here, folder):
    path = folder / "odd[1].lora.arrow"
    code, out, err = here("inspect", path)
    assert (code, err) == (0, "")
    assert "odd[/b]{x}" in out
    assert "[/red] 日本\\n" in out
    assert json.loads(here("inspect", path, "--json")[1])["name"] == "odd[/b]{x}"


@requirement("R25.3", "R1.12")
def test_inspect_imports_no_torch(folder):
    card = folder / "docs.lora.arrow"
    command = [sys.executable, "-X", "importtime", "-m", "lora.cli", "inspect", card, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=QUIET)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pyarrow" in imported
    heavy = {"torch", "lora.engine", "lora.training.train", "tokenizers", "matplotlib"}
    assert not heavy & imported


# errors

TRAIN = "train pairs.jsonl --name a -o a.lora.arrow"


@requirement("R25.3", "R7.1", "R1.14")
@pytest.mark.parametrize(
    ("line", "said"),
    {
        "inspect nothing.lora.arrow": "nothing.lora.arrow: expected",
        "inspect garbage.lora.arrow": "garbage.lora.arrow: card file: expected an Arrow IPC file",
        "inspect .": "`lora convert` makes a card of a PEFT folder",
        "inspect docs.lora.arrow --verify abc": "expected a SHA-256",
        f"inspect docs.lora.arrow --verify {'0' * 64}": f"SHA-256: expected {'0' * 64}",
        "encode a --card nothing": "nothing: expected",
        "encode a --model nowhere": "nowhere",
        "encode a --out nowhere/a.npy": "nowhere",
        "route a --card docs.lora.arrow --threshold nan": "threshold",
        "route a --card docs.lora.arrow --top-k 0": "top_k",
        "route a": "expected --card or --cards",
        "route a --card odd[1].lora.arrow": "expected a description",
        "train pairs.jsonl --name a -o nowhere/a.lora.arrow": "existing folder",
        "train pairs.jsonl --name a -o .": "a file in an existing folder",
        "train nothing.jsonl --name a -o a.lora.arrow": "nothing.jsonl: expected a data set",
        "train garbage.lora.arrow --name a -o a.lora.arrow": "garbage.lora.arrow: expected an Arr",
        f"{TRAIN} --preset fast": "'fast'",
        f"{TRAIN} --seed -1": "seed",
        f"{TRAIN} --target nope": "nope",
        f"{TRAIN} --steps 0": "max_steps",
        f"{TRAIN} --name a[/b]{{c}} --checkpoint pairs.jsonl": "checkpoint",
    }.items(),
)
def test_an_error_is_one_line_and_exit_1_or_2_by_its_kind(here, folder, monkeypatch, line, said):
    monkeypatch.chdir(folder)
    code, out, err = here(*line.split())
    options = ("abc", "nan", "top-k 0", "route a", "fast", "seed -1", "steps 0")
    assert (code, out) == (2 if line.endswith(options) else 1, "")
    assert one_line(err)
    assert said in err
    assert not Path("a.lora.arrow").exists()


@requirement("R25.3")
def test_an_error_about_a_name_with_line_breaks_is_one_line(here):
    code, out, err = here("inspect", "one\ntwo\r\nthree.lora.arrow")
    assert (code, out) == (1, "")
    assert one_line(err)
    assert "one two three" in err


@requirement("R25.3")
@pytest.mark.parametrize(
    ("line", "said"),
    {
        "nonsense": "nonsense",
        "inspect": "file",
        "inspect a --nonsense": "--nonsense",
        "inspect a b": "b",
        "train a --name b": "--out",
        "train a --name b --out c --steps many": "--steps",
        "encode a --out": "--out",
        "demo --steps 0": "--steps",
        "route": "query",
    }.items(),
)
def test_wrong_usage_is_one_line_on_stderr_and_exit_2(here, line, said):
    code, out, err = here(*line.split())
    assert (code, out) == (2, "")
    assert one_line(err)
    assert said in err


@requirement("R25.3")
def test_an_error_about_a_name_of_two_lines_is_one_line(here):
    code, out, err = here("inspect", "no\nsuch.lora.arrow")
    assert (code, out) == (1, "")
    assert one_line(err)


@requirement("R25.3")
def test_a_process_ends_with_the_status_and_its_line(folder):
    for line, status in {"inspect nothing": 1, "inspect": 2}.items():
        done = shell(*line.split(), cwd=folder)
        assert (done.returncode, done.stdout) == (status, "")
        assert one_line(done.stderr)


@requirement("R25.3", "R25.4")
def test_the_command_alone_shows_its_help_and_exits_2(here):
    code, out, err = here()
    assert (code, out) == (2, "")
    assert all(command in err for command in COMMANDS)


@requirement("R25.3")
def test_an_unexpected_error_is_one_line_and_is_raised_for_who_asks(here, monkeypatch, capsys):
    code, out, err = here("encode", stdin=b"\xff")
    assert (code, out) == (1, "")
    assert one_line(err)
    assert "internal error: UnicodeDecodeError" in err
    assert "LORA_DEBUG=1" in err
    monkeypatch.setenv("LORA_DEBUG", "1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    with pytest.raises(UnicodeDecodeError):
        main()
    assert capsys.readouterr() == ("", "")


@requirement("R25.3")
def test_an_interrupt_ends_without_a_traceback(here):
    class Interrupted(io.StringIO):
        def __next__(self):
            raise KeyboardInterrupt

    code, out, err = here("encode", stdin=Interrupted())
    assert (code, out) == (130, "")
    assert err == "" or one_line(err)


@requirement("R25.3")
def test_a_reader_that_goes_away_ends_the_command_quietly(folder):
    reading, writing = os.pipe()
    os.close(reading)
    small = shell("inspect", folder / "docs.lora.arrow", "--json", stdout=writing)
    os.close(writing)
    assert (small.returncode, small.stderr) == (1, "")
    with Path("/dev/full").open("w") as full:
        unwritten = shell("inspect", folder / "docs.lora.arrow", "--json", stdout=full)
    assert unwritten.returncode == 1
    assert one_line(unwritten.stderr)
    assert "No space left" in unwritten.stderr


@requirement("R25.3")
def test_head_can_take_one_byte_of_many_embeddings():
    command = [sys.executable, "-m", "lora.cli", "encode", *(f"text {i}" for i in range(60))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env={**QUIET, "OMP_NUM_THREADS": "1"}) as child:
        first = child.stdout.read(1)
        child.stdout.close()
        err = child.stderr.read()
    assert re.match(rb"[-0]", first)
    assert (child.returncode, err) == (1, b"")


# encode, route, train


@pytest.fixture(scope="module")
def engine(model_folder):
    return lora.ArrowEngine.from_pretrained(model_folder)


TEXTS = ["read a file", "größer 日本", ""]


@requirement("R25.3")
def test_encode_prints_one_line_for_each_text(here, engine):
    expected = engine.encode(TEXTS)
    code, out, err = here("encode", *TEXTS)
    assert (code, err) == (0, "")
    assert out == "".join(" ".join(f"{number:.6f}" for number in row) + "\n" for row in expected)
    assert here("encode", stdin="\n".join(TEXTS).encode() + b"\n") == (code, out, err)


@requirement("R25.3", "R3.12")
def test_encode_warns_once_of_a_card_that_binds_in_part(folder, tmp_path):
    card = lora.load(folder / "docs.lora.arrow")
    lora.save(replace(card, target_modules=("query", "gone")), tmp_path / "part.lora.arrow")
    command = [sys.executable, "-m", "lora.cli", "encode", "a", "--card", "part.lora.arrow"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.fullmatch("lora: card 'docs' takes effect in part: .*'gone'\n", done.stderr)


@requirement("R25.3")
def test_encode_applies_cards_and_gives_json_or_a_file(here, engine, folder, tmp_path):
    cards = [folder / "docs.lora.arrow", folder / "food.lora.arrow"]
    adapters = lora.AdapterSet([lora.load(card) for card in cards])
    expected = engine.encode_with_lora(TEXTS, adapters).embeddings
    code, out, err = here("encode", *TEXTS, "--card", cards[0], "--card", cards[1], "--json")
    assert (code, err) == (0, "")
    found = np.array(json.loads(out), np.float32)
    assert found == pytest.approx(expected, abs=1e-5)  # folded here, factored there
    assert np.abs(found - engine.encode(TEXTS)).max() > 1e-3
    path = tmp_path / "rows.npy"
    code, out, err = here(
        "encode", *TEXTS, "--card", cards[0], "--card", cards[1], "--out", path, "--json"
    )
    assert (code, json.loads(out), err) == (0, {"file": str(path), "shape": [3, 384]}, "")
    assert np.array_equal(np.load(path), found)
    assert here("encode", "a", "--out", path) == (0, f"{path}: 1 × 384\n", "")
    assert here("encode", stdin=b"") == (0, "", "")


@requirement("R25.3")
def test_route_ranks_cards_and_abstains_below_the_threshold(here, engine, folder):
    cards = ["--card", folder / "docs.lora.arrow", "--card", folder / "food.lora.arrow"]
    code, out, err = here("route", "How do I read a file in Python?", *cards, "--json")
    assert (code, err) == (0, "")
    routes = json.loads(out)
    assert [route["name"] for route in routes] == ["docs", "food"]
    assert 1 > routes[0]["score"] > 0.3 > routes[1]["score"]
    code, out, err = here("route", "How do I read a file in Python?", *cards, "--threshold", "0.3")
    assert (code, out, err) == (0, f"{routes[0]['score']:.6f}  docs\n", "")
    assert here("route", "pasta with cheese", *cards, "--top-k", "1")[1].endswith("food\n")
    code, out, err = here("route", "How do I read a file in Python?", *cards, "--threshold", "0.99")
    score = routes[0]["score"]
    assert err == f"no card fits: 'docs' scores {score:.6f}, below the threshold 0.99\n"
    assert (code, out) == (0, "")
    assert here("route", "a", *cards, "--threshold", "0.99", "--json") == (0, "[]\n", "")


@requirement("R25.3", "R17.10")
def test_train_saves_a_card_with_its_bar_on_a_terminal_and_its_json_on_stdout(folder, tmp_path):
    names = "tiny.lora.arrow", "history.svg", "run.checkpoint"
    out, plot, checkpoint = (tmp_path / name for name in names)
    terminal, tty = os.openpty()
    # A full terminal would hold the command up.
    reading = ThreadPoolExecutor(1).submit(lambda: list(pieces(terminal)))
    try:
        line = "--name tiny{0} --description numbers --steps 2 --rank 1 --alpha 2 --json"
        targets = "--target 0.attention.self.query --target 1.attention.self.key"
        files = ("--out", out, "--checkpoint", checkpoint, "--plot", plot)
        done = shell(
            *("train", folder / "pairs.jsonl", *line.split(), *targets.split(), *files),
            stderr=tty,
            env={"TERM": "xterm", "COLUMNS": "100"},
        )
    finally:
        os.close(tty)
        drawn = b"".join(reading.result()).decode(errors="replace")
        os.close(terminal)
    assert done.returncode == 3, drawn  # the base finds everything, so nothing is better
    facts = json.loads(done.stdout)
    card = lora.load(out, verify=facts["digest"])
    assert (card.name, card.rank, card.alpha) == ("tiny{0}", 1, 2.0)
    assert card.metadata == {"description": "numbers"}
    attention = "encoder.layer.{}.attention.self.{}"
    assert set(card.weights) == {attention.format(0, "query"), attention.format(1, "key")}
    assert facts["file"] == str(out)
    assert facts["steps"] == 1  # one epoch of so few pairs is one batch
    names = {"recall_at_1", "recall_at_10", "mrr", "queries"}
    assert set(facts["before"]) == set(facts["after"]) == names
    assert plot.read_text().lstrip().startswith("<?xml")
    assert not checkpoint.exists()
    assert "tiny{0}" in drawn
    assert "loss" in drawn
    assert "\x1b[" in drawn


@requirement("R25.3", "R17.10")
def test_train_tells_a_reader_of_plain_text_the_gain(here, folder, tmp_path):
    out = tmp_path / "tiny.lora.arrow"
    line = "--name tiny --preset stable --steps 2 --rank 1 --out"
    argv = ("train", folder / "pairs.jsonl", *line.split(), out)
    code, said, err = here(*argv)
    gain = r"validation MRR \d\.\d{3} -> \d\.\d{3} in 2 steps"
    assert code == 3
    assert re.fullmatch(rf"{out}: no better than the base model: {gain}\n", said)
    assert re.search(r"training tiny .* 2/2 loss \d", err)
    first = lora.digest(out)
    here(*argv)
    assert lora.digest(out) == first
    here(*argv, "--seed", "1")
    assert lora.digest(out) != first


# the bar, help, completion


@requirement("R17.10", "R25.3")
def test_the_bar_is_on_stderr_and_its_title_is_plain_text(capsys):
    with progress_bar("odd [/b] {x} {task}") as progress:
        for step in range(3):
            progress(step + 1, 3, 0.5 / (step + 1))
    out, err = capsys.readouterr()
    assert out == ""
    assert "odd [/b] {x} {task}" in err
    assert "3/3" in err
    assert "loss 0.167" in err


@requirement("R25.3")
def test_many_texts_are_encoded_under_a_bar(here, monkeypatch):
    monkeypatch.setattr("lora.cli.models.TEXTS", 1)
    code, _, err = here("encode", "a", "b")
    assert code == 0
    assert re.search("encoding .* 2/2", err)


@requirement("R25.3")
def test_a_bar_that_an_error_ends_leaves_nothing_behind(capsys):
    def fail():
        with progress_bar("training") as progress:
            progress(1, 2, 0.5)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert capsys.readouterr() == ("", "")


@requirement("R25.4")
@pytest.mark.parametrize("command", EVERY)
def test_the_help_of_every_command_has_an_example_that_it_understands(here, command):
    code, out, err = here(*command.split(), "--help")
    assert (code, err) == (0, "")
    example = " ".join(out[out.index("Example:") :].split())
    assert example.startswith(f"Example: lora {command} ")
    assert f"\n  {EVERY[command].epilog}\n" in out  # in one line, to be copied
    options = re.findall(r"--[a-z-]+", example.partition(" -- ")[0])  # behind it a job's own
    parameters = {name for p in EVERY[command].params for name in p.opts}
    assert set(options) <= parameters
    assert all(option in out for option in parameters if option.startswith("--"))


@requirement("R25.4")
def test_the_version_and_the_commands_are_told_through_the_installed_script(here):
    done = subprocess.run(
        [Path(SCRIPTS) / "lora", "--version"], capture_output=True, text=True, check=True, env=QUIET
    )
    assert (done.stdout, done.stderr) == (f"lora-cards {lora.__version__}\n", "")
    code, out, _ = here("--help")
    assert code == 0
    assert all(f"\n  {command} " in out for command in COMMANDS)


@requirement("R25.4")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("lora in", ["inspect"]),
        ("lora inspect --v", ["--verify"]),
        ("lora train --ch", ["--checkpoint"]),
        ("lora zz", []),
    ],
)
def test_bash_completes_commands_and_options(typed, completed):
    script = f"""
        eval "$(lora --show-completion bash)"
        COMP_WORDS=({typed})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _lora_completion lora
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**QUIET, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == completed
    assert done.stderr == ""


# What an option says reaches what it is for


class SeenError(Exception):
    """Ends a command once it called what is watched."""


def watched(monkeypatch, place):
    """Arguments of the first call of `place`, which ends the command."""
    calls = []

    def watch(*args, **options):
        calls.append((args, options))
        raise SeenError

    monkeypatch.setattr(place, watch)
    return calls


@requirement("R25.2")
def test_the_subcommands_are_those_that_are_promised():
    promised = """inspect convert merge extract encode route probe train eval serve list fetch
    keygen sign
    evolve factory conformance bench demo"""
    assert set(promised.split()) <= set(COMMANDS)
    assert {"factory add", "factory run", "factory status", "factory rollback"} <= set(EVERY)


@requirement("R21.1", "R25.2")
@pytest.mark.parametrize(
    ("preset", "config"),
    {
        "coder": (16, 32, 0.05),
        "researcher": (8, 16, 0.1),
        "security": (16, 32, 0.05),
        "architect": (12, 24, 0.05),
        "reviewer": (8, 16, 0.1),
        "quick": (8, 16, 0.0),
    }.items(),
)
def test_a_preset_reaches_the_trainer_with_its_dropout(here, folder, monkeypatch, preset, config):
    calls = watched(monkeypatch, "lora.training.train.LoRATrainer")
    out = folder / "never.lora.arrow"
    here("train", folder / "pairs.jsonl", "--name", "x", "-o", out, "--preset", preset)
    ((_, options),) = calls
    assert (options["rank"], options["alpha"], options["settings"].dropout) == config
    assert (options["settings"].lr == 0.005) == (preset == "quick")


@requirement("R19.3", "R25.2")
def test_the_scheduler_of_factory_run_carries_its_jobs(here, folder, tmp_path, monkeypatch):
    carried = []

    class Carrier(ThreadPoolExecutor):
        def submit(self, *args, **options):
            carried.append(args)
            return super().submit(*args, **options)

    @contextlib.contextmanager
    def cluster(address):
        carried.append(address)
        with Carrier(1) as executor:
            yield executor

    monkeypatch.setattr("lora.evolution.factory.cluster", cluster)
    monkeypatch.chdir(tmp_path)
    job = ["merge", folder / "docs.lora.arrow", "--name", "both"]
    assert here("factory", "add", "--", *job)[0] == 0
    code, out, _ = here("factory", "run", "--scheduler", "tcp://192.0.2.7:8786", "--json")
    assert (code, [row["state"] for row in json.loads(out)]) == (0, ["done"])
    assert carried[0] == "tcp://192.0.2.7:8786"
    assert len(carried) == 2


@requirement("R25.2")
def test_a_scheduler_without_a_port_is_refused_as_usage_before_any_work(here, tmp_path):
    code, _, err = here("factory", "run", "--scheduler", "x", "--root", tmp_path / "factory")
    assert (code, "--scheduler: expected tcp://HOST:PORT, found x" in err) == (2, True), err
    assert not (tmp_path / "factory").exists()


@requirement("R19.4", "R25.2")
@pytest.mark.parametrize(("options", "at"), [(["--at", "02:00"], "02:00"), ([], None)])
def test_the_time_of_factory_run_reaches_the_factory(here, tmp_path, monkeypatch, options, at):
    calls = watched(monkeypatch, "lora.evolution.factory.SkillFactory.run")
    here("factory", "run", "--root", tmp_path / "factory", *options)
    ((_, told),) = calls
    assert told["at"] == at
