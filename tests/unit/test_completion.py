"""The command line at a terminal: completion, colour only where it is seen, an interrupt, a closed
pipe.
"""

import contextlib
import os
import pty
import re
import subprocess
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path

import pytest
import typer

from lora.cli.app import app
from lora.merging import Dare, Slerp, Ties
from lora.presets import LoRAConfig
from lora.testing.plugin import requirement
from lora.training.train import Settings

CARD = Path(__file__).parents[2] / "spec" / "vectors" / "1" / "R1.4" / "valid" / "basic.lora.arrow"
SCRIPTS = sysconfig.get_path("scripts")
PLAIN = {
    k: v
    for k, v in os.environ.items()
    if not k.startswith(("COV_", "LORA_", "PYTHON")) and "COLOR" not in k
}
ENVIRONMENT = {
    **PLAIN,
    "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "TERM": "xterm",
}
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-8]|4[0-8]|9[0-7])[0-9;]*m")
COMMANDS = typer.main.get_command(app).commands


def drawn(*argv, program=("-m", "lora.cli"), **environment):
    """What a command, or another program in Python, draws on a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, *program, *map(str, argv)]
    with subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env={**ENVIRONMENT, **environment}
    ) as child:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(ours, 4096):
                text += piece
        os.close(ours)
    assert child.returncode == 0
    return text.decode()


def piped(*argv, **environment):
    """What a command prints into a pipe."""
    command = [sys.executable, "-m", "lora.cli", *map(str, argv)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, check=True
    )


@requirement("R25.4")
def test_completion_is_installed_once_and_a_new_shell_has_it(tmp_path):
    home = {**ENVIRONMENT, "HOME": str(tmp_path)}
    script = "lora --install-completion; true"  # typer asks which shell its parent is
    install = ["bash", "-c", script]
    for _ in range(2):
        done = subprocess.run(install, env=home, capture_output=True, text=True, check=True)
        assert "bash completion installed" in done.stdout + done.stderr
    assert (tmp_path / ".bashrc").read_text().count("lora.sh") == 1
    asked = ["bash", "-c", f"source {tmp_path}/.bashrc; complete -p lora"]
    told = subprocess.run(asked, env=home, capture_output=True, text=True, check=True)
    assert told.stdout.split()[-1] == "lora"


@requirement("R25.4")
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_is_offered_all_commands(shell):
    """What each shell's script asks the command, asked here."""
    words = {"bash": {"COMP_WORDS": "lora ", "COMP_CWORD": "1"}}
    others = {"_TYPER_COMPLETE_ARGS": "lora ", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    asked = {"_LORA_COMPLETE": f"complete_{shell}", **words.get(shell, others)}
    command, env = [Path(SCRIPTS) / "lora"], {**ENVIRONMENT, **asked}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert not [name for name in COMMANDS if not re.search(rf"\b{name}\b", done.stdout)]


@requirement("R25.3")
def test_a_pipe_gets_neither_escapes_nor_a_terminal_s_width():
    told = piped("inspect", CARD)
    assert "\x1b" not in told.stdout + told.stderr
    assert "\x1b" not in piped("--help").stdout


@requirement("R25.3")
def test_a_terminal_gets_emphasis_and_no_color_is_honoured():
    assert "\x1b[1m" in drawn("inspect", CARD)
    assert not COLOUR.search(drawn("inspect", CARD, NO_COLOR="1"))
    assert "\x1b" not in drawn("inspect", CARD, TERM="dumb")


@requirement("R25.3")
def test_what_is_shown_on_a_terminal_is_what_is_piped_but_for_emphasis():
    shown = re.sub(r"\x1b\[[0-9;]*m", "", drawn("inspect", CARD, COLUMNS="120")).replace(
        "\r\n", "\n"
    )
    assert shown == piped("inspect", CARD, COLUMNS="120").stdout


@requirement("R25.3")
@pytest.mark.parametrize("argv", [["encode"], ["list", "--wait", "60"]], ids=" ".join)
def test_an_interrupt_while_it_works_is_one_line_and_exit_130(argv):
    script = f"""
import os, signal, sys, threading
from lora.cli import main
sys.argv = ["lora", *{argv}]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is begun without it
import lora.engine, lora.federation.node  # as if the command were well under way
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
main()
"""
    ours, theirs = os.pipe()  # a standard input that says nothing
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdin=ours,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "lora: interrupted\n")


@requirement("R25.3")
@pytest.mark.parametrize(
    "argv", [["--help"], ["inspect", CARD], ["inspect", CARD, "--json"]], ids=len
)
def test_a_reader_that_stops_after_a_line_sees_no_complaint(argv):
    command = " ".join([sys.executable, "-m", "lora.cli", *map(str, argv)])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -c 1"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (len(done.stdout), done.stderr) == (1, "")


# the help


@requirement("R25.4")
def test_the_list_of_commands_is_whole_sentences():
    lines = re.findall(
        r"^  (\w+)  +(.*)$", piped("--help").stdout.partition("Commands:")[2], re.MULTILINE
    )
    assert [name for name, _ in lines] == list(COMMANDS)
    assert all(said.endswith(".") and not said.endswith("...") for _, said in lines)


@requirement("R25.4")
def test_help_speaks_of_what_a_user_can_know():
    for name, command in {**COMMANDS, **COMMANDS["factory"].commands}.items():
        assert not re.search(r"Requirements|\bR\d+\.\d+|``", command.help), name


@requirement("R25.4")
def test_what_is_called_alike_is_meant_alike():
    every = COMMANDS | {f"factory {n}": part for n, part in COMMANDS["factory"].commands.items()}
    for name, command in every.items():
        for param in command.params:
            assert ("-o" in param.opts) == ("--out" in param.opts), name
            if not param.default and param.secondary_opts:  # --no-… is for what is on
                assert param.default is None, f"{name} {param.name}"
            for default in re.findall(r"\[default: (.+)\]", param.help or ""):  # a field's
                owners = Ties(), Dare(), Slerp(), LoRAConfig(), Settings()
                fields = {key: v for owner in owners for key, v in asdict(owner).items()}
                assert f"{fields[param.name]}" == default, f"{name} {param.name}"
        assert ("--json" in [opt for p in command.params for opt in p.opts]) == (name != "factory")
