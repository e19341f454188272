"""Run the scripts of ``benchmarks/``, each in a process of its own, and collect their figures.

Requirements: R6, R25.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.errors import ArgumentError, MissingPackageError, StateError
from lora.testing import folder_of

SCRIPTS = (
    "forward",
    "lifecycle",
    "routing",
    "throughput",
    "merge_extract",
    "training",
    "fetching",
    "growth",
    "commands",
    "models",
)
"""The scripts in the order in which they run."""


@dataclass(frozen=True)
class Part:
    """What one script measured: the machine, and rows of figures."""

    name: str
    machine: dict[str, Any]
    rows: tuple[dict[str, Any], ...]


def run_bench(only: Sequence[str] = (), *, quick: bool = False, threads: int = 2) -> Iterator[Part]:
    """Run the scripts one after the other.

    Args:
        only: Names of `SCRIPTS`; all if empty.
        quick: Fewer rounds and smaller sizes.
        threads: Threads of each script's process.

    Raises:
        ArgumentError: A name is not in `SCRIPTS`.
        MissingPackageError: The ``bench`` extra is not installed.
        StateError: A script fails.
    """
    for name in only:
        if name not in SCRIPTS:
            raise ArgumentError("bench", f"one of {', '.join(SCRIPTS)}", repr(name))
    for peer in ("peft", "sentence_transformers"):
        if importlib.util.find_spec(peer) is None:
            hint = "pip install 'lora-cards[bench]'"
            raise MissingPackageError("bench", peer, "not installed", hint)
    for name in only or SCRIPTS:
        script = str(folder_of("benchmarks") / f"{name}.py")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            run = subprocess.run(  # noqa: S603 - this interpreter, our own script
                [sys.executable, script, "--json", str(path), *(["--quick"] if quick else [])],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            if run.returncode:
                last_line = run.stderr.strip().rpartition("\n")[2]
                raise StateError(f"bench {name}", "a script that ends well", last_line)
            figures = json.loads(path.read_text(encoding="utf-8"))
        yield Part(name, figures["machine"], tuple(figures["rows"]))


def shown(row: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Return a row of figures as cells: what, figure, interval, target, whether it is met.

    Examples:
        >>> row = {"what": "one card", "side": "ours", "beside": "base", "kind": "overhead"}
        >>> shown(row | {"value": 0.021, "target": 0.1, "interval": [0.01, 0.03], "met": True})
        ('one card: ours / base', '+2.1 %', '+1.0 % … +3.0 %', '<= +10.0 %', 'yes')
    """
    unit = row.get("unit", "× as fast" if row["kind"] == "times faster" else "×")

    def form(value: float) -> str:
        if row["kind"] == "overhead":
            return f"{100 * value:+.1f} %"
        return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"

    what = f"{row['what']}: {row['side']} / {row['beside']}" if "side" in row else row["what"]
    interval = " … ".join(form(end).removesuffix(f" {unit}") for end in row.get("interval", ()))
    sign = {"times faster": ">=", "at least": ">=", "below": "<"}.get(row["kind"], "<=")
    target = "" if row["target"] is None else f"{sign} {form(row['target'])}"
    met = {None: "", True: "yes", False: "no"}[row["met"]]
    return what, form(row["value"]), interval, target, met
