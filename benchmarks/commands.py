"""How long a command takes to answer, and what a whole evolution cycle does.

    OMP_NUM_THREADS=2 python benchmarks/commands.py [--quick] [--json FILE]

Commands run in processes of their own, as a shell starts them, beside ``python -c "import numpy"``.
The cycle is ``lora evolve`` on the docstrings of networkx, which torch brings along: it looks,
trains, judges on held-out data, and would store the card.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from pairs import Row, figure_row, median_with_interval, ratio_row, rounds, run

import lora


def command(*arguments: str) -> Callable[[], str]:
    """A run of this interpreter."""

    def call() -> str:
        done = subprocess.run(  # noqa: S603 - itself
            [sys.executable, *arguments], capture_output=True, text=True, check=True
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
        }
        times = rounds(sides, 2 if quick else 9)
    for name in ("lora --help", "lora inspect"):
        middle, low, high = median_with_interval(times[name])
        yield figure_row("commands", name, middle, "s", below=0.5, interval=[low, high])
        yield ratio_row("commands", name, times, name, "import numpy")


def cycle(*, quick: bool) -> Iterator[Row]:
    """One whole evolution cycle on real data, with where its time goes."""
    found = importlib.util.find_spec("networkx")
    if found is None or found.origin is None:
        return
    library = Path(found.origin).parent
    if quick:
        library /= "classes"
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "--documents",
            str(library),
            "--out",
            folder,
            "--json",
            *(["--dry-run"] if quick else ["--steps", "10"]),
        ]
        start = time.perf_counter()
        told = json.loads(command("-m", "lora.cli", "evolve", *arguments)())
        seconds = time.perf_counter() - start
    yield figure_row(
        "cycle",
        "lora evolve on networkx" + " (dry run)" * quick,
        seconds,
        "s",
        ids=["R6.8"],
        told=told,
    )


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All parts, each run when it is come to."""
    return (part(quick=quick) for part in (answers, cycle))


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
