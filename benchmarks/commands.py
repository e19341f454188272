"""How long a command takes to answer, and what a whole evolution cycle does.

    OMP_NUM_THREADS=2 python benchmarks/commands.py [--quick] [--json FILE]

Commands run in processes of their own, as a shell starts them, beside ``python -c "import numpy"``
and beside the imports that ``lora inspect`` cannot do without: its floor.
The cycle is ``lora evolve`` on the docstrings of networkx, which torch brings along: it reads,
trains, examines on held-out files, and stores the card. The first cycle trains the placebo as well;
a later one, of a new version of the skill, finds it in its folder.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from pairs import Row, figure_row, median_with_interval, ratio_row, rounds, run

import lora

FLOOR = """
import ml_dtypes, numpy, pyarrow, rich.console, rich.table, typer
try:
    import typer._adapters, pydantic.plugin._loader  # for each command's arguments
except ImportError:  # before typer 0.29
    pass
"""


def command(*arguments: str) -> Callable[[], str]:
    """A run of this interpreter."""
    # What is installed has its bytecode.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def call() -> str:
        done = subprocess.run(  # noqa: S603 - itself
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return done.stdout

    return call


def answers(*, quick: bool) -> Iterator[Row]:
    """``lora --help`` and ``lora inspect``."""
    with tempfile.TemporaryDirectory() as folder:
        pair = lora.LowRank(np.ones((384, 8), np.float32), np.ones((8, 384), np.float32))
        lora.save(
            lora.LoRACard("docs", 8, 16.0, ["query"], {"0.query": pair}),
            f"{folder}/docs.lora.arrow",
        )
        sides = {
            "lora --help": command("-m", "lora.cli", "--help"),
            "lora inspect": command("-m", "lora.cli", "inspect", f"{folder}/docs.lora.arrow"),
            "import numpy": command("-c", "import numpy"),
            "its imports": command("-c", FLOOR),
        }
        times = rounds(sides, 2 if quick else 9)
    for name, below in (("lora --help", 0.15), ("lora inspect", 0.28)):
        middle, low, high = median_with_interval(times[name])
        yield figure_row("commands", name, middle, "s", below=below, interval=[low, high])
        yield ratio_row("commands", name, times, name, "import numpy")
    yield ratio_row("commands", "lora inspect", times, "lora inspect", "its imports")


def cycle(*, quick: bool) -> Iterator[Row]:
    """A first evolution cycle on real data, and a later one."""
    package = importlib.util.find_spec("networkx")
    if package is None or package.origin is None:
        return
    library = Path(package.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--documents-only", "--name", "networkx", "--out", f"{folder}/skills"]
        arguments += ["--placebos", f"{folder}/placebos", "--json", *["--dry-run"] * quick]
        for which, seconds_at_most in (("first", 120), ("later", 75)):
            start = time.perf_counter()
            evolve = command("-m", "lora.cli", "evolve", str(library), *arguments)
            answer = json.loads(evolve())
            keys = ("rows", "held_out") if quick else ("verdict", "version", "digest", "figures")
            outcome = {key: answer[key] for key in keys}
            yield figure_row(
                "cycle",
                f"lora evolve on networkx, a {which} cycle" + " (dry run)" * quick,
                time.perf_counter() - start,
                "s",
                below=seconds_at_most,
                ids=["R6.8"],
                outcome=outcome,
            )


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All parts, each run when it is come to."""
    return (part(quick=quick) for part in (answers, cycle))


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
