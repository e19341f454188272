"""A thousand registered cards: what start-up, memory, descriptors, getting a card and routing cost.

    OMP_NUM_THREADS=2 python benchmarks/registry.py [--quick] [--json FILE]

The cards have MiniLM's shapes, rank 8 on query and value. Their files are in the page cache: a cold
card is one that is not mapped. Embeddings are synthetic, of width 384, and cost nothing: what is
timed is the routing alone.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before NumPy

import argparse
import gc
import io
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pairs import machine, timed

from lora.arrow_format import card_to_table
from lora.card import Array, LoRACard, LowRank
from lora.files import load
from lora.models.registry import AdapterRegistry
from lora.router import LoRARouter

COUNT, BOUND = 1000, 64
WIDTH, RANK = 384, 8


def card_of(index: int, layers: int) -> LoRACard:
    """A card of random factors."""
    generator = np.random.default_rng(index)
    modules = [
        f"encoder.layer.{layer}.attention.self.{name}"
        for layer in range(layers)
        for name in ("query", "value")
    ]
    weights = {
        module: LowRank(
            generator.standard_normal((WIDTH, RANK), np.float32),
            generator.standard_normal((RANK, WIDTH), np.float32),
        )
        for module in modules
    }
    metadata = {"version": "1.0.0", "description": f"topic {index}", "tags": ["synthetic"]}
    return LoRACard(f"card-{index:04}", RANK, 16.0, ["query", "value"], weights, metadata)


def write(folder: Path, layers: int) -> list[Path]:
    """Cards on disk; `lora.save` would wait for the disk at each."""
    paths = []
    for index in range(COUNT):
        table, sink = card_to_table(card_of(index, layers)), io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        paths.append(folder / f"{index:04}.lora.arrow")
        paths[-1].write_bytes(sink.getvalue())
    return paths


def descriptors() -> int:
    """Open file descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def resident() -> float:
    """MB of memory that this process has in RAM, mapped files included."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 1e6


def cost(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, MB and descriptors that some work takes, whose result is kept meanwhile."""
    memory, handles, start = resident(), descriptors(), time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "mb": resident() - memory, "descriptors": descriptors() - handles}
    del kept
    return found


def median_us(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in microseconds."""
    low, middle, high = statistics.quantiles(
        [value * 1e6 for value in times], n=4, method="inclusive"
    )
    return {"us": middle, "low": low, "high": high}


def registered(paths: Sequence[Path], **bounds: int) -> AdapterRegistry:
    """A registry of all of them."""
    registry = AdapterRegistry(**bounds)
    for path in paths:
        registry.register(path)
    return registry


def getting(registry: AdapterRegistry, rounds: int) -> dict[str, Any]:
    """A card that is not mapped, then the same again: pairs, of cards in random order, each cold
    one evicting another.
    """
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    names = list(registry.entries)
    for name in names[:BOUND]:
        registry.get(name)
    cold, warm = [], []
    for _ in range(rounds):
        unmapped = set(names) - {name for name, _ in registry.mapped}
        name = order.choice(sorted(unmapped))
        cold.append(timed(lambda name=name: registry.get(name)))
        warm.append(timed(lambda name=name: registry.get(name)))
    ratios = [a / b for a, b in zip(cold, warm, strict=True)]
    return {
        "cold": median_us(cold),
        "warm": median_us(warm),
        "cold/warm": statistics.median(ratios),
    }


def routing(paths: Sequence[Path], rounds: int) -> dict[str, Any]:
    """Registering all cards with a router, and routing one query and 32 over them."""
    generator = np.random.default_rng(1)
    table = {
        f"topic {index}": row
        for index, row in enumerate(generator.standard_normal((len(paths), WIDTH)))
    }
    queries = {
        f"query {index}": row for index, row in enumerate(generator.standard_normal((32, WIDTH)))
    }
    known: dict[str, Array] = {**table, **queries}
    router = LoRARouter(lambda texts: np.stack([known[text] for text in texts]))
    candidates = [router.candidate(load(path)) for path in paths]
    start = time.perf_counter()
    for candidate in candidates:
        router.register(candidate)
    seconds = time.perf_counter() - start
    texts = list(queries)
    first = timed(lambda: router.select(texts[0], 3))
    one = [
        timed(lambda index=index: router.select(texts[index % 32], 3)) for index in range(rounds)
    ]
    many = [timed(lambda: router.select_many(texts, 3)) for _ in range(max(3, rounds // 10))]
    return {
        "register_seconds": seconds,
        "first_select_us": first * 1e6,
        "select": median_us(one),
        "select_many_32": median_us(many),
    }


def main() -> None:
    """Run all and print a table; as JSON too where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="cards for one layer instead of 6, and fewer rounds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    layers, rounds = (1, 30) if options.quick else (6, 300)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (hard, hard)
    )  # to load them all, which the usual limit does not allow
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), layers)
        size = sum(path.stat().st_size for path in paths) / 1e6
        registered(paths[:5]).get("card-0000")  # what is imported or made once
        start_up = cost(lambda: registered(paths, max_cards=BOUND))
        everything = cost(lambda: [load(path) for path in paths])
        registry = registered(paths, max_cards=BOUND)
        get = getting(registry, rounds)
        in_use = cost(lambda: [registry.get(name) for name in list(registry.entries)[-BOUND:]])
        again = cost(lambda: [registry.register(path) for path in paths])
        route = routing(paths, rounds)
    found = {
        "machine": machine(),
        "cards": COUNT,
        "max_cards": BOUND,
        "mb_on_disk": size,
        "start_up": start_up,
        "load_all_instead": everything,
        "get": get,
        "max_cards_mapped": in_use | {"open": len(registry.mapped)},
        "register_again": again,
        "routing": route,
    }
    print(json.dumps(found["machine"]))
    print(f"{COUNT} cards, {size:.0f} MB on disk, at most {BOUND} mapped")
    for name, row in (
        ("register all (start-up)", start_up),
        ("load and hold all, instead", everything),
    ):
        print(
            f"{name:<34} {row['seconds']:8.3f} s {row['mb']:8.1f} "
            f"MB {row['descriptors']:5.0f} descriptors"
        )
    print(f"{'register all again (no change)':<34} {again['seconds']:8.3f} s")
    for name, row in (
        ("get, not mapped (evicting one)", get["cold"]),
        ("get, mapped", get["warm"]),
        (f"route one query over {COUNT}", route["select"]),
        (f"route 32 queries over {COUNT}", route["select_many_32"]),
    ):
        print(f"{name:<34} {row['us']:8.1f} us ({row['low']:.1f}-{row['high']:.1f})")
    print(
        f"{'router: register all':<34} {route['register_seconds']:8.3f} "
        f"s; first query {route['first_select_us']:.0f} us"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
