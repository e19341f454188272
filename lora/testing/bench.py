"""The bench: each script of ``benchmarks/`` in a process of its own, and what they found as one
report.

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

HERE = Path(__file__).parent

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
)
"""In the order in which they run."""


@dataclass(frozen=True)
class Part:
    """What one script found: the machine as it was, and rows of figures."""

    name: str
    machine: dict[str, Any]
    rows: tuple[dict[str, Any], ...]


def bench_folder() -> Path:
    """The scripts: in the wheel beside this file, in a checkout under ``benchmarks``."""
    packed = HERE / "benchmarks"
    return packed if packed.is_dir() else HERE.parents[1] / "benchmarks"


def run_bench(only: Sequence[str] = (), *, quick: bool = False, threads: int = 2) -> Iterator[Part]:
    """Run the scripts one after the other; each takes turns with its peers within one process.

    Args:
        only: Names of `SCRIPTS`; all if empty.
        quick: Fewer rounds and smaller sizes.
        threads: Of each script's process.

    Raises:
        ArgumentError: If a name is none of `SCRIPTS`.
        MissingPackageError: If the ``bench`` extra is not installed.
        StateError: If a script fails.
    """
    for name in only:
        if name not in SCRIPTS:
            raise ArgumentError("bench", f"one of {', '.join(SCRIPTS)}", repr(name))
    for peer in ("peft", "sentence_transformers"):
        if importlib.util.find_spec(peer) is None:
            raise MissingPackageError(
                "bench", peer, "not installed", "pip install 'lora-cards[bench]'"
            )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for name in only or SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "found.json"
            command = [sys.executable, str(bench_folder() / f"{name}.py"), "--json", str(found)]
            done = subprocess.run(  # noqa: S603 - this interpreter, our own script
                [*command, *(["--quick"] if quick else [])],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                raise StateError(
                    f"bench {name}",
                    "a script that ends well",
                    done.stderr.strip().rpartition("\n")[2],
                )
            told = json.loads(found.read_text(encoding="utf-8"))
        yield Part(name, told["machine"], tuple(told["rows"]))


def shown(row: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """A row of figures as cells: what, figure, interval, target, whether it is met.

    Examples:
        >>> row = {"what": "one card", "side": "ours", "beside": "base", "kind": "overhead", "value": 0.021, "target": 0.1}
        >>> shown(row | {"interval": [0.01, 0.03], "met": True})
        ('one card: ours / base', '+2.1 %', '+1.0 % … +3.0 %', '<= +10.0 %', 'yes')
    """
    unit = row.get("unit", "× as fast" if row["kind"] == "times faster" else "×")

    def form(value: float) -> str:
        return f"{100 * value:+.1f} %" if row["kind"] == "overhead" else f"{value:.3g} {unit}"

    what = f"{row['what']}: {row['side']} / {row['beside']}" if "side" in row else str(row["what"])
    interval = " … ".join(form(end).removesuffix(f" {unit}") for end in row.get("interval", ()))
    sign = {"times faster": ">=", "at least": ">=", "below": "<"}.get(row["kind"], "<=")
    target = "" if row["target"] is None else f"{sign} {form(row['target'])}"
    return (
        what,
        form(row["value"]),
        interval,
        target,
        {None: "", True: "yes", False: "no"}[row["met"]],
    )
