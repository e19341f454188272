"""How everything here is timed: sides take turns in shuffled rounds, and what counts is the median
of the rounds' ratios.

A script here makes rows by `ratio_row` and hands its groups of them to `run`, which prints a table
and writes JSON.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import torch
from code_digests import digests
from torch import nn

from lora.models.layers import WIDE, LoRALinear
from lora.testing import CHECKOUT
from lora.testing.bench import shown

Row = dict[str, Any]
Work = Callable[[], Any]
Times = dict[str, list[float]]

LIBC = ctypes.CDLL(None)  # glibc's, for what is known of memory

REST = 0.03
"""Seconds before a timing that sides of two thread pools need: threads that have worked go on
spinning for a while.
"""

SLICE = 0.02
"""Seconds that one timing of fast work lasts at least, by repeating it."""


def timed(work: Work, repeats: int = 1) -> float:
    """Seconds that one call takes, the mean of `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def rounds(
    sides: Mapping[str, Work],
    count: int,
    resets: Mapping[str, Work] | None = None,
    *,
    rest: float = 0.0,
) -> Times:
    """Seconds of each side in each of `count` rounds, in every one in another order.

    Work is repeated to last `SLICE`; where a side has a reset, which is not timed, every side is
    called once a round. Before each timing there are `rest` seconds of nothing.
    """
    resets = resets or {}
    repeats = {}
    for name, work in sides.items():
        first = timed(work)  # with what is made or loaded once
        resets.get(name, lambda: None)()
        if first < 1:
            first = timed(work)
            resets.get(name, lambda: None)()
        repeats[name] = 1 if resets else max(1, min(1000, round(SLICE / first)))

    def seconds_of(name: str) -> float:
        time.sleep(rest)
        seconds = timed(sides[name], repeats[name])
        resets.get(name, lambda: None)()
        return seconds

    return reported_seconds({name: partial(seconds_of, name) for name in sides}, count)


def reported_seconds(sides: Mapping[str, Callable[[], float]], count: int) -> Times:
    """What each side says that it took in each of `count` rounds, in every one in another order."""
    shuffled = random.Random(0)  # noqa: S311 - an order, not a secret
    times: Times = {name: [] for name in sides}
    gc.collect()
    for _ in range(count):
        for name in shuffled.sample(list(sides), len(sides)):
            times[name].append(sides[name]())
    return times


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % confidence interval, from order statistics; the whole range of fewer
    than 6 values.
    """
    ordered, count = sorted(values), len(values)
    below = 0  # values cut off at each end
    while 2 * sum(comb(count, i) for i in range(below + 1)) <= 0.05 * 2**count:
        below += 1
    cut = max(0, below - 1)
    return statistics.median(ordered), ordered[cut], ordered[count - 1 - cut]


def ratio_row(
    group: str,
    what: str,
    times: Times,
    side: str,
    beside: str,
    *,
    target: float | None = None,
    at_least: bool = False,
    overhead: bool = False,
    of: str = "",
    ids: Sequence[str] = (),
    **more: Any,
) -> Row:
    """One figure: side / beside, or as `overhead` that less 1, or with `at_least` beside / side
    (how many times faster).
    """
    pairs = zip(times[side], times[beside], strict=True)
    ratios = [(b / a if at_least else a / b) - overhead for a, b in pairs]
    middle, low, high = median_with_interval(ratios)
    met = None if target is None else bool(middle >= target if at_least else middle <= target)
    return {
        "group": group,
        "what": what,
        "side": side,
        "beside": beside,
        "kind": "overhead" if overhead else "times faster" if at_least else "ratio",
        "of": of,
        "value": middle,
        "interval": [low, high],
        "rounds": len(ratios),
        "side_ms": statistics.median(times[side]) * 1e3,
        "beside_ms": statistics.median(times[beside]) * 1e3,
        "target": target,
        "met": met,
        "ids": list(ids),
        **more,
    }


def figure_row(
    group: str,
    what: str,
    value: float,
    unit: str,
    *,
    below: float | None = None,
    above: float | None = None,
    ids: Sequence[str] = (),
    **more: Any,
) -> Row:
    """One figure that is no ratio, with its unit and the bound that it should keep, if there is
    one.
    """
    bound = below if above is None else above
    met = None if bound is None else bool(value < bound if above is None else value >= bound)
    kind = {"kind": "at least" if above is not None else "below", "unit": unit}
    return {
        "group": group,
        "what": what,
        **kind,
        "value": value,
        "target": bound,
        "met": met,
        "ids": list(ids),
        **more,
    }


def resident(kind: str = "VmRSS") -> int:
    """Bytes of this process, of a kind that ``/proc/self/status`` knows."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) * 1024


def settled() -> int:
    """Resident bytes once all that is free is given back, so that what comes next does not fill it
    unseen.
    """
    gc.collect()
    LIBC.malloc_trim(0)
    return resident()


def sources() -> list[str]:
    """The files that the figures are of: the script, and the modules that it loaded of the library
    but not of its tests.
    """
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("lora.") and not name.startswith("lora.testing")
    ]
    files = [Path(file).resolve() for file in (sys.argv[0], *(m.__file__ for m in modules))]
    return sorted(file.relative_to(CHECKOUT).as_posix() for file in files)


def commit() -> str:
    """The commit that is checked out, and whether files differ from it; empty without git."""
    git = shutil.which("git") or "true"
    command = [git, "describe", "--always", "--exclude=*", "--dirty=, edited"]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)  # noqa: S603 - git
    return run.stdout.strip()


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    packages = (
        "lora-cards",
        "torch",
        "numpy",
        "pyarrow",
        "peft",
        "sentence-transformers",
        "safetensors",
    )
    versions = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }
    return {
        "cpu": cpu,
        "commit": commit(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "versions": versions,
    }


def folded_bytes(model: nn.Module) -> int:
    """The bytes of the weights that `lora.fold` forms."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, LoRALinear)]
    return sum(weight.nbytes for weight in weights if weight.dtype in WIDE)


def run(groups: Callable[[bool], Iterable[Iterable[Row]]], summary: str) -> None:
    """Run a script's groups of rows, print each row as it comes, and write them as JSON where
    asked.
    """
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and smaller sizes: it works, no more"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    report: dict[str, Any] = {"machine": machine(), "rows": []}
    for rows in groups(options.quick):
        for row in rows:
            print(*shown(row), sep=" | ", flush=True)
            report["rows"].append(row)
    report["machine"]["sources"] = digests(sources())
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
