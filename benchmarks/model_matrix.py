"""Which models work: every operation on some thirty architectures, each beside PEFT.

    OMP_NUM_THREADS=1 python benchmarks/model_matrix.py [--only NAME…] [--json FILE]

The models are tiny, made in place with random weights. A cell is the largest absolute difference
from what PEFT computes with the same factors or, where PEFT can't, from dense arithmetic. It must
stay within the rounding that the sizes of the model allow, and the adapter must change what is
compared by a hundred times as much: else the script fails, as it does where an error is no
`LoRAError`, or where the base has changed. ``docs/models.md`` has a table that is made from the
results.
"""

import argparse
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from code_digests import digests
from pairs import machine, sources
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

import lora
from lora.card import LoRACard, LowRank
from lora.engine import default_model
from lora.errors import LoRAError, UnboundWarning
from lora.factors import delta
from lora.interop.peft import export_peft, import_peft
from lora.interop.weights import SafetensorsWeights

RESULTS = Path(__file__).with_suffix(".json")
RANK, ALPHA = 4, 10
VOCABULARY, NEW_TOKENS = 60, 6
EPSILON = torch.finfo(torch.float32).eps
QUANTISERS = ("torchao", "bitsandbytes")
OWN_SETS = [2, 0, 1]
"""The adapter set of each row."""

Cell = dict[str, Any]
Inputs = Mapping[str, Any]
Rows = list[Tensor]
"""What a model computes for each row."""


class WrongError(Exception):
    """A result differs from the peer's by more than rounding, or shows nothing."""


class UnfeltError(WrongError):
    """A result is the base's, as if there were no adapter."""


class NotApplicableError(Exception):
    """An operation makes no sense for a model."""


def first(model: Any, inputs: Inputs) -> Tensor:
    """Return what a model of transformers computes, without the positions that are padded."""
    outputs = model(**inputs)
    if isinstance(outputs, Tensor):
        return outputs
    result: Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    mask = inputs.get("attention_mask")
    if mask is not None and result.shape[:2] == mask.shape:
        return result * mask[:, :, None]
    return result


@dataclass(frozen=True)
class Architecture:
    """A kind of model, how to make it, and what is adapted in it.

    Args:
        make: Returns a model; its weights are drawn anew.
        targets: The ends of the names of the Linears that get adapters.
        inputs: Keywords of a forward over three rows.
        run: From a model and inputs, a tensor with a row for each.
        quantise: Changes a model with weights, which PEFT then can't merge or save.
        parameters: PEFT's ``target_parameters``.
        has_peer: Whether PEFT's adapter is felt. Else the peer is the base with each term added in
            float64 by a hook.
    """

    make: Callable[[], Any]
    targets: Sequence[str]
    inputs: Callable[[], Inputs]
    run: Callable[[Any, Inputs], Tensor] = first
    quantise: Callable[[Any], Any] | None = None
    parameters: Sequence[str] = ()
    has_peer: bool = True


# ---- the architectures

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}
LONG = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
LONG |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
LONG |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 1, **TOKENS}
PICTURE = {"image_size": 8, "patch_size": 4}


def of(kind: str, name: str = "Model", **options: Any) -> Callable[[], Any]:
    """Return what makes a model of transformers from its configuration."""

    def make() -> Any:
        config = getattr(transformers, f"{kind}Config")(**options)
        return getattr(transformers, f"{kind}{name}")(config)

    return make


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers of a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(*, left: bool = False) -> Inputs:
    """Return three rows of token ids of unequal length, padded at the right or at the left."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    places = torch.arange(9).flip(0) if left else torch.arange(9)
    mask = (places < torch.tensor([[9], [6], [7]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def encoded() -> Inputs:
    """Return rows for an encoder with a decoder."""
    return {**text(), "decoder_input_ids": text()["input_ids"][:, :4].clamp(min=3)}


def pictures(size: int = 8) -> Inputs:
    """Return three pictures."""
    return {"pixel_values": draw(3, 3, size, size)}


def vectors() -> Inputs:
    """Return three rows of five vectors."""
    return {"src": draw(3, 5, 32)}


LEFT = partial(text, left=True)
ATTENTION = ("q_proj", "v_proj")
LLAMA = of("Llama", "ForCausalLM", **GROUPED)


def llava() -> Any:
    """Make a vision tower, a projector and a language model that reads pictures among tokens."""
    vision = transformers.CLIPVisionConfig(**{**SIZES, **PICTURE})
    words = transformers.LlamaConfig(**GROUPED)
    options = {"image_token_index": 2, "vision_feature_layer": -1}
    config = transformers.LlavaConfig(vision_config=vision, text_config=words, **options)
    return transformers.LlavaForConditionalGeneration(config)


def seen_and_read() -> Inputs:
    """Return rows of four places for a picture and five tokens."""
    ids = text()["input_ids"].clamp(min=3)
    ids[:, 1:5] = 2
    return {"input_ids": ids, **pictures()}


def clip() -> Any:
    """Make a model with a tower for texts and one for pictures."""
    options = {"text_config": {**SIZES, **TOKENS}, "vision_config": {**SIZES, **PICTURE}}
    return transformers.CLIPModel(transformers.CLIPConfig(projection_dim=16, **options))


def both_embeddings(model: Any, inputs: Inputs) -> Tensor:
    """Return a picture's embedding and a text's in one row."""
    outputs = model(**inputs)
    return torch.cat([outputs["image_embeds"], outputs["text_embeds"]], 1)


class WeightNormed(nn.Module):
    """Two Linears, the weight of one of which is computed from others at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = parametrizations.weight_norm(nn.Linear(32, 48))
        self.last = nn.Linear(48, 16)

    def forward(self, src: Tensor) -> Tensor:
        """Return the last layer's output."""
        result: Tensor = self.last(torch.tanh(self.dense(src)))
        return result


def transformer(*, batch_first: bool) -> nn.Module:
    """Make torch's own encoder."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def time_major(model: Any, inputs: Inputs) -> Tensor:
    """Run a model whose first dimension is a position."""
    result: Tensor = model(inputs["src"].transpose(0, 1)).transpose(0, 1)
    return result


def embedded(model: Any, inputs: Inputs) -> Tensor:
    """Return the embeddings of texts."""
    return torch.as_tensor(model.encode(inputs["sentences"]))


def to_bits(kind: Any, mark: str, **options: Any) -> Callable[[Any], Any]:
    """Return what puts bitsandbytes' layers in the place of all Linears but the head."""

    def quantise(model: Any) -> Any:
        setattr(model, mark, True)  # transformers' own, by which PEFT knows it
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and name != "lm_head":
                layer = kind(linear.in_features, linear.out_features, bias=False, **options)
                layer.load_state_dict(linear.state_dict(), strict=False)
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, layer)
        return model.to("cpu")

    return quantise


def to_torchao(model: Any) -> Any:
    """Have torchao store all weights but the head's in 8 bits."""

    def is_inner(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_inner)
    return model


WIDE = of(
    "Llama",
    "ForCausalLM",
    **{**GROUPED, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128},
)
LAST = ("layers.1.mlp.down_proj",)
"""Layers of bitsandbytes round their inputs to few bits, so that a difference of 1e-7 in an earlier
layer becomes one of 1e-2 behind a later one. Behind this layer there is none.
"""

BITS_8 = to_bits(bitsandbytes.nn.Linear8bitLt, "is_loaded_in_8bit", has_fp16_weights=False)
BITS_4 = to_bits(
    bitsandbytes.nn.Linear4bit,
    "is_loaded_in_4bit",
    quant_type="nf4",
    compute_dtype=torch.float32,
)

BERT = {**SIZES, "pad_token_id": 0}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SWITCH = {**T5, "num_decoder_layers": 2, "num_experts": 3}
SWITCH |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
MAMBA = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
SOUNDS = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 24}

ARCHITECTURES = {
    "BERT": Architecture(of("Bert", **BERT), ("query", "value", "dense"), text),
    "XLM-RoBERTa": Architecture(of("XLMRoberta", **BERT), ("query", "value"), text),
    "MPNet": Architecture(of("MPNet", **BERT), ("q", "v", "o"), text),
    "ModernBERT": Architecture(
        of("ModernBert", **BERT, local_attention=8, cls_token_id=1, sep_token_id=2),
        ("Wqkv", "Wo", "Wi"),
        text,
    ),
    "DistilBERT": Architecture(of("DistilBert", **DISTIL), ("q_lin", "v_lin", "lin1"), text),
    "DeBERTa-v2": Architecture(
        of("DebertaV2", **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        ("query_proj", "value_proj"),
        text,
    ),
    "SentenceTransformer": Architecture(
        lambda: SentenceTransformer(str(default_model()), device="cpu"),
        ("query", "value"),
        lambda: {"sentences": ["open a file", "a court of law, and its rules", "short"]},
        embedded,
    ),
    "T5": Architecture(of("T5", "ForConditionalGeneration", **T5), ("q", "v", "wo"), encoded),
    "BART": Architecture(
        of("Bart", "ForConditionalGeneration", **LONG), (*ATTENTION, "fc1"), encoded
    ),
    "Whisper": Architecture(
        of("Whisper", "ForConditionalGeneration", **LONG, **SOUNDS),
        (*ATTENTION, "fc2"),
        lambda: {"input_features": draw(3, 8, 20), "decoder_input_ids": torch.ones(3, 2).long()},
    ),
    "GPT-2 (Conv1D)": Architecture(
        of("GPT2", "LMHeadModel", **GPT2, **TOKENS), ("c_attn", "c_proj", "c_fc"), LEFT
    ),
    "GPT-NeoX": Architecture(
        of("GPTNeoX", "ForCausalLM", **SIZES, **TOKENS), ("query_key_value", "dense"), LEFT
    ),
    "OPT": Architecture(
        of("OPT", "ForCausalLM", **SIZES, **TOKENS, ffn_dim=48, word_embed_proj_dim=32),
        (*ATTENTION, "fc1"),
        LEFT,
    ),
    "Falcon (FalconLinear)": Architecture(
        of("Falcon", "ForCausalLM", **SIZES, **TOKENS),
        ("query_key_value", "dense", "dense_h_to_4h"),
        LEFT,
    ),
    "Phi": Architecture(of("Phi", "ForCausalLM", **SIZES, **TOKENS), (*ATTENTION, "fc1"), LEFT),
    "Llama": Architecture(LLAMA, (*ATTENTION, "down_proj"), LEFT),
    "Mistral": Architecture(
        of("Mistral", "ForCausalLM", **GROUPED, sliding_window=4), ATTENTION, LEFT
    ),
    "Qwen3": Architecture(of("Qwen3", "ForCausalLM", **GROUPED), (*ATTENTION, "up_proj"), LEFT),
    "Gemma 2": Architecture(of("Gemma2", "ForCausalLM", **GROUPED), (*ATTENTION, "o_proj"), LEFT),
    "Mixtral, attention": Architecture(
        of("Mixtral", "ForCausalLM", **GROUPED, **EXPERTS), ATTENTION, LEFT
    ),
    "Mixtral, experts": Architecture(
        of("Mixtral", "ForCausalLM", **GROUPED, **EXPERTS), ("q_proj",), LEFT, parameters=FUSED
    ),
    "Switch, experts": Architecture(
        of("SwitchTransformers", "ForConditionalGeneration", **SWITCH), ("wi", "wo"), encoded
    ),
    "Mamba": Architecture(
        of("Mamba", "ForCausalLM", **MAMBA, **TOKENS),
        ("in_proj", "x_proj"),
        LEFT,
    ),
    "Llava": Architecture(llava, (*ATTENTION, "linear_1"), seen_and_read),
    "ViT": Architecture(of("ViT", **{**SIZES, **PICTURE}), ATTENTION, pictures),
    "CLIP": Architecture(
        clip, (*ATTENTION, "visual_projection"), lambda: {**text(), **pictures()}, both_embeddings
    ),
    "torch, TransformerEncoder": Architecture(
        lambda: transformer(batch_first=True), ("linear1", "linear2"), vectors, has_peer=False
    ),
    "torch, time-major": Architecture(
        lambda: transformer(batch_first=False), ("linear1", "linear2"), vectors, time_major
    ),
    "torch, weight norm": Architecture(WeightNormed, ("dense",), vectors),
    "Llama, torchao 8 bit": Architecture(LLAMA, ATTENTION, LEFT, quantise=to_torchao),
    "Llama, bitsandbytes 8 bit": Architecture(WIDE, LAST, LEFT, quantise=BITS_8),
    "Llama, bitsandbytes 4 bit": Architecture(WIDE, LAST, LEFT, quantise=BITS_4),
}
"""Name -> architecture, as the table has them."""


# ---- a model with weights, its peers, and what they compute


def draw_weights(model: nn.Module) -> None:
    """Draw the matrices anew, so that what enters a layer and what leaves it are of one size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if name in ("weight", "gate_up_proj", "down_proj") and weight.dim() > 1:
                    inner = weight.shape[0 if isinstance(module, Conv1D) else -1]
                    weight.normal_(0, inner**-0.5, generator=generator)


class Subject:
    """An architecture under test: its models, its peers and their outputs, each made once.

    Args:
        architecture: What is tested.
        folder: Empty, for what PEFT and the library save.
    """

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.kind, self.folder = architecture, folder
        self.inputs = architecture.inputs()
        self.peer = cache(self._peer)
        self.expected = cache(lambda seed: self.rows_of(self.peer(seed)[0]))

    def model(self, changes: Mapping[str, Tensor] | None = None, *, quantised: bool = True) -> Any:
        """Make the base, or the same with a ΔW (out, in) in some of its layers."""
        torch.manual_seed(0)
        model = self.kind.make().eval().requires_grad_(requires_grad=False)
        if not isinstance(model, SentenceTransformer):  # whose weights are real ones
            draw_weights(model)
        for name, change in (changes or {}).items():
            layer = model.get_submodule(name)
            update = change.T if isinstance(layer, Conv1D) else change
            changed = layer.weight + update.float()
            is_computed = not isinstance(layer.weight, nn.Parameter)
            layer.weight = changed if is_computed else nn.Parameter(changed, requires_grad=False)
        return self.kind.quantise(model).eval() if quantised and self.kind.quantise else model

    @cached_property
    def base(self) -> Any:
        """The base model, which no operation may change."""
        return self.model()

    @cached_property
    def widths(self) -> list[int]:
        """The larger size of each Linear."""
        layers = self.model(quantised=False).modules()
        return [max(m.weight.shape) for m in layers if isinstance(m, nn.Linear | Conv1D)]

    @cached_property
    def base_rows(self) -> Rows:
        """What the base computes."""
        return self.rows_of(self.base)

    def rows_of(self, model: Any, inputs: Inputs | None = None) -> Rows:
        """Run a model and return what it computes for each row."""
        with torch.inference_mode():
            return list(self.kind.run(model, inputs or self.inputs).float().clone())

    def row(self, index: int) -> Inputs:
        """Return the inputs of one row alone."""
        return {name: value[index : index + 1] for name, value in self.inputs.items()}

    def with_peft(self, seed: int, *, quantised: bool = True) -> tuple[Any, Any]:
        """Return a base into which PEFT has put an adapter, and PEFT's own object around it."""
        options: dict[str, Any] = {"target_modules": list(self.kind.targets)}
        if self.kind.parameters:
            options["target_parameters"] = list(self.kind.parameters)
        model = self.model(quantised=quantised)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options)
        wrapped = peft.get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(seed)
        for layer in wrapped.modules():
            if isinstance(layer, LoraLayer):
                for factor, size in ((layer.lora_A, 1.0), (layer.lora_B, 0.5)):
                    weight = factor["default"].weight.data
                    weight.normal_(0, size * weight.shape[-1] ** -0.5, generator=generator)
        return model, wrapped.requires_grad_(requires_grad=False)

    def saved(self, seed: int) -> Path:
        """Return a folder to which PEFT has saved an adapter."""
        path = self.folder / f"peft-{seed}"
        if not path.exists():
            self.with_peft(seed, quantised=False)[1].save_pretrained(path)
        return path

    def _peer(self, seed: int) -> tuple[Any, LoRACard]:
        """Return a model that computes what a card should, and the card.

        The card is made from PEFT's modules. Where PEFT has factors for parameters it is imported.
        """
        model, _ = self.with_peft(seed, quantised=self.kind.has_peer)
        name = f"card {seed}"
        if self.kind.parameters:
            return model, import_peft(self.saved(seed), name=name)
        weights = {}
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                a, b = (each["default"].weight for each in (layer.lora_A, layer.lora_B))
                weights[path] = LowRank(a.T.numpy().copy(), b.T.numpy().copy(), ALPHA / RANK)
        card = LoRACard(name, RANK, ALPHA, self.kind.targets, weights)
        if self.kind.has_peer:
            return model, card
        model = self.model()
        for path, change in changes_of(card).items():
            model.get_submodule(path).register_forward_hook(partial(add_term, change))
        return model, card

    @property
    def beside(self) -> str:
        """What the outputs are compared with."""
        return "PEFT" if self.kind.has_peer else "float64"

    def checked(self, results: Rows, expected: Rows, beside: str) -> Cell:
        """Return a cell, if results are right within rounding and differ from the base's.

        Each of the model's layers rounds sums of at most so many products as it is wide, of which
        errors add up as the root of their number.
        """
        size = max(float(row.abs().max()) for row in expected)
        allowed = EPSILON * math.sqrt(max(self.widths)) * len(self.widths) * size
        effect = gap(expected, self.base_rows)
        if effect > allowed >= gap(results, self.base_rows):
            raise UnfeltError("a card without an effect")
        return figure(gap(results, expected), allowed, effect, beside)


def gap(left: Rows, right: Rows) -> float:
    """Return the largest absolute difference."""
    pairs = zip(left, right, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


def changes_of(card: LoRACard) -> dict[str, Tensor]:
    """Return each ΔW (out, in) of a card, from its factors in float64."""
    return {
        name: torch.from_numpy(pair.A.astype(float) @ pair.B.astype(float)).T * pair.scaling
        for name, pair in card.weights.items()
    }


def add_term(change: Tensor, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Add what ΔW gives for a layer's input."""
    return output + (inputs[0].double() @ change.T).to(output.dtype)


def figure(difference: float, allowed: float, effect: float, beside: str) -> Cell:
    """Return a cell with a difference, if it is rounding and beside it the adapter is felt."""
    if not difference <= allowed:
        raise WrongError(f"{difference:.2g} from {beside}, and rounding allows {allowed:.2g}")
    if not effect >= 100 * allowed:
        raise WrongError(f"an effect of {effect:.2g} shows nothing beside {allowed:.2g}")
    cell = {"kind": "ran", "difference": difference, "allowed": allowed, "effect": effect}
    return {**cell, "beside": beside}


# ---- the operations


def adapt(subject: Subject) -> Cell:
    """A forward with a card."""
    card = subject.peer(1)[1]
    adapted = lora.adapt(subject.base, card, strict=True)
    return subject.checked(subject.rows_of(adapted), subject.expected(1), subject.beside)


def rows_model(subject: Subject) -> Any:
    """A model with two cards and none, tried with the inputs that it is for."""
    sets = [(), *(subject.peer(seed)[1] for seed in (1, 2))]
    probe = None if "sentences" in subject.inputs else subject.inputs
    return lora.adapt_rows(subject.base, sets, probe=probe, strict=True)


def rows(subject: Subject) -> Cell:
    """Rows with sets of their own in one forward, beside the peer of each for the row alone."""
    rowwise = rows_model(subject)
    with lora.rows(OWN_SETS):
        together = subject.rows_of(rowwise)
    peers = [subject.base, *(subject.peer(seed)[0] for seed in (1, 2))]
    alone = [subject.rows_of(peers[own], subject.row(i))[0] for i, own in enumerate(OWN_SETS)]
    return subject.checked(together, alone, f"{subject.beside}, each row alone")


def fold(subject: Subject) -> Cell:
    """The folded copy beside PEFT's merge, or beside the dequantised weights and ΔW, added."""
    card = subject.peer(1)[1]
    folded = lora.fold(lora.adapt(subject.model(), card, strict=True))
    if subject.kind.quantise:  # PEFT would quantise the sum
        merged, beside = subject.model(), "dequantised weights + ΔW"
        for name, change in changes_of(card).items():
            layer = merged.get_submodule(name)
            weight = dequantised(layer) + change.float()
            plain = nn.Linear(*reversed(weight.shape), bias=False)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            setattr(merged.get_submodule(owner), leaf, plain)
    else:
        merged, beside = subject.with_peft(1)[1].merge_and_unload(), "PEFT's merge"
    return subject.checked(subject.rows_of(folded), subject.rows_of(merged), beside)


def dequantised(layer: Any) -> Tensor:
    """Return a weight as its own library gives it."""
    weight = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        result = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        result = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    else:
        result = weight.dequantize()
    return torch.as_tensor(result)


def extract(subject: Subject) -> Cell:
    """The ΔW of a card from two models, beside the difference of their weights in float64.

    Fused experts are extracted from saved folders, where each is a Linear of its own.
    """
    if subject.kind.parameters:
        models = {"base": subject.base, "tuned": subject.with_peft(1)[1].merge_and_unload()}
        for name, model in models.items():
            model.save_pretrained(subject.folder / name)
        base, tuned = (SafetensorsWeights(subject.folder / name) for name in models)
        weights = [{key: torch.tensor(each[key]) for key in each} for each in (base, tuned)]
    else:
        # Its own: reading the state dict of bitsandbytes' packed 4 bits changes what they compute.
        base, tuned = subject.model(), subject.model(changes_of(subject.peer(1)[1]))
        weights = [base.state_dict(), tuned.state_dict()]
    card = lora.extract_delta(base, tuned, RANK)
    before, after = ({key: each.double() for key, each in part.items()} for part in weights)
    changed = {key: after[key] - old for key, old in before.items() if (after[key] != old).any()}
    ours = {f"{name}.weight": torch.tensor(delta(pair)) for name, pair in card.weights.items()}
    if ours.keys() != changed.keys():
        raise WrongError(f"{sorted(ours)} were extracted, {sorted(changed)} changed")
    is_conv1d = any(isinstance(module, Conv1D) for module in subject.base.modules())
    differences = [
        gap([ours[key].T if is_conv1d else ours[key]], [change]) for key, change in changed.items()
    ]
    effect = max(float(change.abs().max()) for change in changed.values())
    # What the weights' own rounding puts into ΔW is of full rank, and the card leaves it out.
    allowed = EPSILON * max(
        sum(math.sqrt(side) for side in change.shape) * float(after[key].abs().max())
        for key, change in changed.items()
    )
    return figure(max(differences), allowed, effect, "float64")


def import_(subject: Subject) -> Cell:
    """A folder that PEFT saved, imported and applied."""
    adapted = lora.adapt(subject.base, import_peft(subject.saved(1), name="card 1"), strict=True)
    return subject.checked(subject.rows_of(adapted), subject.expected(1), subject.beside)


def export(subject: Subject) -> Cell:
    """A card as a folder that PEFT loads into the base."""
    card, folder = subject.peer(1)[1], subject.folder / "exported"
    export_peft(card, folder)
    adapted, loaded = lora.adapt(subject.base, card, strict=True), subject.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(loaded, folder).eval()
    if not subject.kind.has_peer:
        adapted, loaded = lora.fold(adapted), wrapped.merge_and_unload()
    return subject.checked(subject.rows_of(adapted), subject.rows_of(loaded), "PEFT, loading it")


def generate(subject: Subject) -> Cell:
    """Tokens of greedy search and of two beams, of one card and of rows; none may differ."""
    if not getattr(subject.base, "can_generate", bool)():
        raise NotApplicableError("it generates nothing")
    card = subject.peer(1)[1]
    adapted = lora.adapt(subject.base, card, strict=True)
    compared, changed = 0, False
    try:
        rowwise = rows_model(subject)
    except LoRAError:  # which the cell of rows tells
        rowwise = None
    peers = [subject.base, *(subject.peer(seed)[0] for seed in (1, 2))]
    for beams in (1, 2):
        pairs = [(tokens(adapted, subject.inputs, beams), tokens(peers[1], subject.inputs, beams))]
        changed = changed or not torch.equal(pairs[0][1], tokens(peers[0], subject.inputs, beams))
        if rowwise:
            with lora.rows(OWN_SETS):
                together = tokens(rowwise, subject.inputs, beams)
            alone = [tokens(peers[own], subject.row(i), beams) for i, own in enumerate(OWN_SETS)]
            pairs.append((together, torch.cat(alone)))
        for ours, theirs in pairs:
            if differing := int((ours != theirs).sum()):
                raise WrongError(f"{differing} of {ours.numel()} tokens differ, {beams} beams")
            compared += ours.numel()
    if not changed:
        raise WrongError("the base generates the same tokens")
    return {"kind": "ran", "tokens": compared, "beside": subject.beside, "rows": bool(rowwise)}


def tokens(model: Any, inputs: Inputs, beams: int) -> Tensor:
    """Return the tokens that a model adds to each row, always as many."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    with torch.inference_mode():
        result = model.generate(**inputs, num_beams=beams, do_sample=False, **options)
    return torch.as_tensor(result)[:, -NEW_TOKENS:]


OPERATIONS: Mapping[str, Callable[[Subject], Cell]] = {
    "adapt": adapt,
    "rows": rows,
    "fold": fold,
    "extract": extract,
    "import": import_,
    "export": export,
    "generate": generate,
}


def cell(subject: Subject, operation: str) -> Cell:
    """Return what an operation gives for a model: a figure, a refusal, or that it has no sense.

    Raises:
        WrongError: The result is not the peer's.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UnboundWarning)
        try:
            result = OPERATIONS[operation](subject)
        except LoRAError as error:
            return {"kind": "refused", "error": type(error).__name__, "reason": short(error)}
        except NotApplicableError as reason:
            return {"kind": "not applicable", "reason": str(reason)}
        except UnfeltError:
            if not caught:
                raise
            return {"kind": "warned", "reason": short(caught[0].message)}
    return {**result, "warning": short(caught[0].message)} if caught else result


def short(message: object) -> str:
    """Return a sentence of the library, with the first name alone of each list of them."""
    return re.sub(r"('[^']*')(, '[^']*')+( and \d+ more)?", r"\1, …", str(message))


def run(names: Sequence[str]) -> Iterator[tuple[str, dict[str, Cell]]]:
    """Yield the rows of the table, and print each cell as it comes.

    Raises:
        WrongError: A cell is wrong; with its place.
    """
    for name in names:
        started, row = time.process_time(), {}
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(ARCHITECTURES[name], Path(folder))
            for operation in OPERATIONS:
                try:
                    row[operation] = cell(subject, operation)
                except Exception as error:
                    raise WrongError(f"{name}, {operation}: {error}") from error
                print(f"{name}, {operation}: {told(row[operation])}", flush=True)
            if gap(subject.rows_of(subject.base), subject.rows_of(subject.model())):
                raise WrongError(f"{name}: the base computes something else than before")
        print(f"{name}: {time.process_time() - started:.1f} s", flush=True)
        yield name, row


def told(result: Cell) -> str:
    """Return a cell as a line."""
    if "difference" in result:
        figures = "{difference:.1e}, at most {allowed:.1e}, of {effect:.1g}, beside {beside}"
        return figures.format_map(result)
    if "tokens" in result:
        return "{tokens} tokens as {beside}'s".format_map(result)
    return "{kind}: {reason}".format_map(result)


def main() -> None:
    """Fill the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers.utils.logging.set_verbosity_error()
    started = time.process_time()
    table = dict(run(options.only or list(ARCHITECTURES)))
    print(f"all of it: {time.process_time() - started:.0f} s of processor time")
    about = machine()
    about["versions"] |= {each: version(each) for each in ("transformers", *QUANTISERS)}
    about |= {"date": datetime.now(UTC).date().isoformat(), "sources": digests(sources())}
    if options.json:
        results = {"machine": about, "architectures": table}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
