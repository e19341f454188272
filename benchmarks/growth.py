"""How cost grows: time against rank, layers, parameters, adapters, batch and cards, and memory
against each.

    OMP_NUM_THREADS=2 python benchmarks/growth.py [--quick] [--json FILE]

Every point is a median beside the first point of its line, in shuffled rounds of one process. The
slope is that of log cost over log size between the last two points: 1 is linear, less is sublinear
(a fixed cost dominates), more would be worse.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import (
    LIBC,
    Row,
    figure_row,
    folded_bytes,
    median_with_interval,
    ratio_row,
    resident,
    rounds,
    run,
    settled,
)
from torch import nn

import lora
from lora.card import AdapterSet, LoRACard, LowRank
from lora.models.adapt import init_card
from lora.models.encoder import EncoderConfig, InferenceCore
from lora.routing import Index, candidate_of, select, unit

TOKENS = 512


def core(layers: int = 6, width: int = 384) -> InferenceCore:
    """An encoder with random weights; the width is MiniLM's unless it is told."""
    torch.manual_seed(0)
    model = InferenceCore(EncoderConfig(1000, width, layers, width // 32, 4 * width, 512))
    return model.requires_grad_(requires_grad=False).eval()


def card(model: InferenceCore, rank: int, name: str = "docs") -> LoRACard:
    """All Linears of the encoder."""
    untrained = init_card(
        model, name, rank=rank, alpha=2.0 * rank, target_modules=["all-linear"], seed=rank
    )
    rng = np.random.default_rng(0)
    pairs = {
        module: LowRank(pair.A, rng.standard_normal(pair.B.shape, np.float32) * np.float32(0.01))
        for module, pair in untrained.weights.items()
    }
    return LoRACard(name, rank, 2.0 * rank, untrained.target_modules, pairs)


def line(
    name: str, against: str, works: dict[int, Callable[[], Any]], count: int, why: str
) -> Iterator[Row]:
    """Points of one line of a chart, and its slope at the end."""
    times = rounds({str(size): work for size, work in works.items()}, count)
    medians = {size: median_with_interval(times[str(size)]) for size in works}
    for size, (middle, low, high) in medians.items():
        more = {"interval": [low * 1e3, high * 1e3], "line": name, "against": against, "size": size}
        yield figure_row("growth", f"{name}, {against} {size:,}", middle * 1e3, "ms", **more)
    *_, before, last = works
    slope = math.log(medians[last][0] / medians[before][0]) / math.log(last / before)
    what = f"{name}: slope against {against} ({why})"
    yield figure_row("growth", what, slope, "", line=name, against=against)


def encoding(model: Any, ids: torch.Tensor, own: Sequence[int] = ()) -> Callable[[], Any]:
    """A forward without gradients; `own` is the adapter set of each row."""

    def call() -> Any:
        with torch.inference_mode(), lora.rows(own):
            return model(ids)

    return call


def forwards(*, quick: bool) -> Iterator[Row]:
    """A forward against each of the four."""
    count, model = (3 if quick else 12), core()
    ids = torch.randint(0, 1000, (4, TOKENS // 4), generator=torch.Generator().manual_seed(0))
    ranks = (4, 64) if quick else (1, 4, 16, 64, 256, 512)
    why = "the base dominates until the rank nears the width"
    works = {rank: encoding(lora.adapt(model, card(model, rank)), ids) for rank in ranks}
    yield from line("factored forward", "rank", works, count, why)
    works = {}
    for layers in (2, 4) if quick else (1, 2, 4, 8):
        deep = core(layers)
        works[layers] = encoding(lora.adapt(deep, card(deep, 8)), ids)
    yield from line("factored forward", "layers", works, count, "linear: each layer costs the same")
    works = {}
    rows = torch.randint(0, 1000, (256, 8), generator=torch.Generator().manual_seed(0))
    for number in (1, 8) if quick else (1, 4, 16, 64, 256):
        sets = [AdapterSet(card(model, 8, f"skill-{i}")) for i in range(number)]
        each = 256 // number
        own = [row // each for row in range(256)]
        works[number] = encoding(lora.adapt_rows(model, sets, probe=False), rows, own)
    yield from line(
        "256 rows of 8 tokens", "adapters", works, count, "a fixed cost per adapter and layer"
    )
    adapted = lora.adapt(model, card(model, 8))
    works = {}
    for batch in (1, 4) if quick else (1, 4, 16, 64):
        ids = torch.randint(0, 1000, (batch, 64), generator=torch.Generator().manual_seed(0))
        works[batch] = encoding(adapted, ids)
    yield from line(
        "factored forward of 64 tokens a row",
        "rows",
        works,
        count,
        "linear once a row fills the cores",
    )


def cards(*, quick: bool) -> Iterator[Row]:
    """Loading and applying against rank and layers."""
    count = 3 if quick else 12
    load, apply = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for layers in (2, 4) if quick else (2, 4, 8, 16):
            model = core(layers)
            docs = card(model, 8)
            path = f"{folder}/{layers}.lora.arrow"
            lora.save(docs, path)
            load[layers] = lambda path=path: lora.load(path)
            apply[layers] = lambda model=model, docs=docs: lora.adapt(model, docs)
        yield from line("load", "layers", load, count, "a fixed cost, then one per module")
        yield from line("adapt", "layers", apply, count, "one copy per module object")
        ranks = (8, 64) if quick else (4, 16, 64, 256, 512)
        model, load = core(2), {}
        for rank in ranks:
            path = f"{folder}/r{rank}.lora.arrow"
            lora.save(card(model, rank), path)
            load[rank] = lambda path=path: lora.load(path)
        yield from line("load", "rank", load, count, "flat: bytes are mapped, not read")


def parameters(*, quick: bool) -> Iterator[Row]:
    """Encoders of up to a billion parameters, which all share their rank and tokens."""
    shapes = ((2, 384), (6, 384)) if quick else ((6, 384), (12, 768), (24, 1024), (20, 2048))
    apply, forward, base, factors = {}, {}, {}, {}
    ids = torch.randint(0, 1000, (1, 128), generator=torch.Generator().manual_seed(0))
    for layers, width in shapes:
        model = core(layers, width)
        docs = card(model, 16)
        adapted = lora.adapt(model, docs)
        millions = round(sum(weight.numel() for weight in model.parameters()) / 1e6)
        apply[millions] = lambda model=model, docs=docs: lora.adapt(model, docs)
        forward[millions], base[millions] = encoding(adapted, ids), encoding(model, ids)
        factors[millions] = factors_of(adapted)
    count, against = 3 if quick else 7, "million parameters"
    yield from line("adapt", against, apply, count, "one copy per module object, none of a weight")
    yield from line("factored forward", against, forward, count, "the base dominates")
    for millions, call in forward.items():
        times = rounds({"factored": call, "base": base[millions]}, count)
        what = f"factored forward of 128 tokens, {millions:,} million parameters"
        yield ratio_row("growth", what, times, "factored", "base", overhead=True)
    for millions, mib in factors.items():
        more = {"line": "factors", "against": against, "size": millions}
        yield figure_row("growth", f"memory: factors, {against} {millions:,}", mib, "MiB", **more)


def known(*, quick: bool) -> Iterator[Row]:
    """Routing against cards that are known, of one exemplar each."""
    rng, works = np.random.default_rng(0), {}
    query = unit(rng.standard_normal((1, 384)))[0]
    for count in (10, 100) if quick else (10, 100, 1000, 10_000, 100_000):
        rows = rng.standard_normal((count, 384))
        named = {f"card-{i:06}": row[None] for i, row in enumerate(rows)}
        index = Index({name: candidate_of(name, row) for name, row in named.items()})
        works[count] = lambda index=index: select(query, index, top_k=3, threshold=0.1)
    why = "a fixed cost until the exemplars fill a cache, linear beyond"
    yield from line("select", "cards", works, 3 if quick else 12, why)


def peak(work: Callable[[], Any]) -> float:
    """MiB that this process has at most while it works, over what it has before."""
    work()
    before = settled()
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # the peak is what is resident now
    work()
    return (resident("VmHWM") - before) / 2**20


def factors_of(model: nn.Module) -> float:
    """MiB of an adapted model's factors."""
    return sum(tensor.nbytes for name, tensor in model.named_buffers() if "lora_" in name) / 2**20


def memory(*, quick: bool) -> Iterator[Row]:
    """Factors against rank, layers and adapters; what a forward needs besides, against rows."""
    model = core(2)
    sizes = {
        ("factors", "rank"): {
            rank: factors_of(lora.adapt(model, card(model, rank))) for rank in (4, 16, 64, 256, 512)
        },
        ("folded copy", "rank"): {
            rank: folded_bytes(lora.adapt(model, card(model, rank))) / 2**20
            for rank in (4, 16, 64, 256, 512)
        },
        ("factors", "layers"): {
            layers: factors_of(lora.adapt(deep := core(layers), card(deep, 8)))
            for layers in (2, 4, 8, 16)
        },
        ("factors", "adapters"): {
            number: factors_of(
                lora.adapt_rows(
                    model, [card(model, 8, f"skill-{i}") for i in range(number)], probe=False
                )
            )
            for number in (1, 4, 16, 64, 256)
        },
    }
    LIBC.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what a tensor gives back is given back
    adapted, rows = lora.adapt(model, card(model, 8)), (1, 4) if quick else (1, 4, 16, 64)
    ids = torch.randint(0, 1000, (max(rows), 64), generator=torch.Generator().manual_seed(0))
    sizes["a factored forward of 64 tokens a row", "rows"] = {
        count: peak(encoding(adapted, ids[:count])) for count in rows
    }
    for (name, against), memories in sizes.items():
        for size, mib in memories.items():
            more = {"line": name, "against": against, "size": size}
            yield figure_row("growth", f"memory: {name}, {against} {size:,}", mib, "MiB", **more)


def kept(*, quick: bool) -> Iterator[Row]:
    """What loaded cards and requests with adapters of their own leave in memory."""
    model, count, words = core(2), 50 if quick else 900, ["two words"] * 4
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.lora.arrow" for i in range(count + 1)]
        for i, path in enumerate(paths):
            lora.save(card(model, 8, f"skill-{i}"), path)
        in_use = [lora.load(paths[-1])]
        before = settled()
        in_use += map(lora.load, paths[:-1])
        each = (settled() - before) / count / 1000
        what = f"memory: each of {len(in_use) - 1} loaded cards"
        yield figure_row("growth", what, each, "kB", below=10)
    engine = lora.ArrowEngine.from_pretrained()
    sets = [card(engine.base, 8, f"skill-{i}") for i in range(64)]

    def requests(start: int, stop: int) -> None:
        for first in range(start, stop, 4):
            engine.encode_with_lora(words, sets[first : first + 4])

    requests(0, 16)
    before = settled()
    requests(16, 64)
    what = "memory: 64 request sets after 16 of an engine"
    yield figure_row("growth", what, (settled() - before) / 2**20, "MiB", below=8)


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All parts, each run when it is come to."""
    return (part(quick=quick) for part in (forwards, cards, parameters, known, memory, kept))


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
