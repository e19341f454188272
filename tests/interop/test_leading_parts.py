"""An adapter of PEFT on a model in which the same layers have names that begin otherwise."""

import itertools
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from lora.errors import BaseModelError, TargetError
from lora.interop.peft import import_peft
from lora.models.adapt import adapt, fingerprint, fold
from lora.models.manager import LoRAManager
from lora.testing.plugin import requirement

pytestmark = pytest.mark.filterwarnings(  # PEFT reads it
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

IDS = torch.arange(12).reshape(2, 6)

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
TEXT = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8, "num_hidden_layers": 3}


def llama():
    special = {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**TEXT, **special))


def llava(**sizes):
    """Its vision tower has layers of the same names and, unless they are given, the same sizes."""
    picture = {"num_hidden_layers": 3, "image_size": 4, "patch_size": 2}
    vision = CLIPVisionConfig(**{**SIZES, **picture, **sizes})
    config = LlavaConfig(vision_config=vision, text_config=llama().config, image_token_index=19)
    return LlavaForConditionalGeneration(config)


def bert():
    return BertModel(BertConfig(**TEXT))


def wrapped():
    """A bare encoder under the name that it has in sentence-transformers."""
    return nn.Sequential(nn.ModuleDict({"auto_model": bert()}))


MODELS = {
    "causal": (llama, "model."),
    "bare": (lambda: llama().model, ""),
    "pictures": (llava, "model.language_model."),
    "wide pictures": (lambda: llava(hidden_size=16), "model.language_model."),
    "classifier": (lambda: BertForSequenceClassification(BertConfig(**TEXT)), "bert."),
    "encoder": (bert, ""),
    "wrapped encoder": (wrapped, "0.auto_model."),
}
"""What makes a model, and with what the names of its layers for text begin."""

QUERIES = ["self_attn.q_proj"]

CASES = [
    *[
        (QUERIES if here == "wide pictures" else ["q_proj", "v_proj"], there, here)
        for there, here in itertools.permutations([*MODELS][:4], 2)
        if there != "bare" or "pictures" not in here
    ],
    *[
        (["query", "dense"], there, here)
        for there, here in itertools.permutations([*MODELS][4:], 2)
    ],
]


def model_and_text(kind):
    """A model in float64, and its part for text, with the same weights in every model."""
    make, leading = MODELS[kind]
    model = make().double().eval().requires_grad_(requires_grad=False)
    text = model.get_submodule(leading.removesuffix("."))
    torch.manual_seed(0)
    for _, parameter in sorted(text.named_parameters()):
        parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model, text


def made_by_peft(kind, targets, folder):
    """Have PEFT make and save an adapter; return what the adapted part for text computes."""
    model, text = model_and_text(kind)
    torch.manual_seed(1)
    leading = MODELS[kind][1].replace(".", r"\.")
    pattern = rf"{leading}.*\.({'|'.join(targets)})"
    options = {"init_lora_weights": False, "r": 4, "lora_alpha": 6, "target_modules": pattern}
    peft = get_peft_model(model, LoraConfig(**options)).eval()
    peft.save_pretrained(folder)
    with torch.no_grad():
        return text(input_ids=IDS)[0]


def output(model, kind):
    with torch.no_grad():
        return model.get_submodule(MODELS[kind][1].removesuffix("."))(input_ids=IDS)[0]


@requirement("R3.15")
@pytest.mark.parametrize("short", [True, False], ids=["short targets", "full targets"])
@pytest.mark.parametrize(("targets", "there", "here"), CASES)
def test_an_adapter_computes_what_it_does_with_peft_on_the_model_it_was_made_for(
    targets, there, here, short, tmp_path
):
    expected = made_by_peft(there, targets, tmp_path / "docs")
    card = import_peft(tmp_path / "docs")
    card = replace(card, base_fingerprint=fingerprint(model_and_text(there)[0], card))
    if short:
        card = replace(card, target_modules=targets)
    model, _ = model_and_text(here)
    before, after = MODELS[there][1], MODELS[here][1]
    binds_as_it_is = f".{after}".endswith(f".{before}")
    manager = LoRAManager(model)
    report = manager.apply_card(card, strict=True)
    assert report.leading == (None if binds_as_it_is else (before, after))
    assert dict(report.bound) == {after + key.removeprefix(before): key for key in card.weights}
    assert fingerprint(model, card) == card.base_fingerprint
    for adapted in (manager.model, adapt(model, card), fold(adapt(model, card))):
        assert (output(adapted, here) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (output(model, here) - expected).abs().max() > 1e-3 * expected.abs().max()
    with pytest.raises(BaseModelError):
        adapt(model, replace(card, base_fingerprint="0" * 64))


@requirement("R3.15")
def test_an_adapter_that_fits_the_text_and_the_pictures_is_refused_with_both_names(tmp_path):
    made_by_peft("causal", QUERIES, tmp_path / "docs")
    model, _ = model_and_text("pictures")
    names = r"'model\.vision_tower\.encoder\.', 'model\.language_model\.'"
    with pytest.raises(TargetError, match=names):
        adapt(model, import_peft(tmp_path / "docs"))
