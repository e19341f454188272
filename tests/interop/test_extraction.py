"""Extraction from real transformers models: Conv1D, fused experts, and what is not in the card."""

import hashlib

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from lora.errors import ArgumentError
from lora.extract import extract_delta, extract_direct
from lora.factors import delta
from lora.interop.peft import export_peft
from lora.interop.weights import SafetensorsWeights
from lora.models.adapt import adapt, fingerprint
from lora.testing.plugin import requirement

SIZES = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **TOKENS)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None]).logits.double().numpy()


def moved(model, *parts):
    """The model, changed where a name contains a part: matrices by rank 2, others anyhow."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in parts):
                change = torch.randn(weight.shape, generator=generator)
                if weight.ndim == 2 and "wte" not in name:
                    change = change[:, :2] @ change[:2]
                weight.add_(change, alpha=0.1)
    return model


@requirement("R26.1", "R26.9")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT sets it
@pytest.mark.parametrize("part", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
@pytest.mark.parametrize("source", ["modules", "folders"])
def test_a_conv1d_is_read_as_the_linear_that_it_is(part, source, tmp_path):
    """The oracle is the tuned model's own output, through PEFT, which knows Conv1D."""
    base, tuned = gpt2(), moved(gpt2(), f"{part}.weight")
    models = (base, tuned)
    if source == "folders":
        for name, model in zip(("base", "tuned"), models, strict=True):
            model.save_pretrained(tmp_path / name)
        models = tuple(SafetensorsWeights(tmp_path / name) for name in ("base", "tuned"))
    card = extract_delta(*models, 2, target_modules=[part])
    name = f"transformer.h.1.{part}"
    change = (tuned.get_submodule(name).weight - base.get_submodule(name).weight).detach().numpy()
    np.testing.assert_allclose(delta(card.weights[name]), change.T, atol=1e-5)
    export_peft(card, tmp_path / "peft")
    adapted = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "peft").eval()
    np.testing.assert_allclose(logits(adapted), logits(tuned), atol=1e-5)
    assert abs(logits(base) - logits(tuned)).max() > 0.01


@requirement("R26.1", "R1.13")
@pytest.mark.parametrize("source", ["modules", "folders"])
def test_the_fingerprint_covers_the_weights_of_a_conv1d_as_they_are_stored(source, tmp_path):
    """As of a Linear: sorted keys, dtypes, shapes and bytes of the base, here hashed by hand."""
    base, tuned = gpt2(), moved(gpt2(), "c_attn.weight", "c_fc.weight")
    sha = hashlib.sha256()
    for name, weight in sorted(base.state_dict().items()):
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            shape = tuple(weight.shape)
            sha.update(f"{name.removesuffix('.weight')}\0float32\0{shape}\0".encode())
            sha.update(weight.numpy().tobytes())
    models = (base, tuned)
    if source == "folders":
        for name, model in zip(("base", "tuned"), models, strict=True):
            model.save_pretrained(tmp_path / name)
        models = tuple(SafetensorsWeights(tmp_path / name) for name in ("base", "tuned"))
    card = extract_delta(*models, 2, target_modules=["c_attn", "c_fc"])
    assert card.base_fingerprint == sha.hexdigest()
    assert fingerprint(base, card) == sha.hexdigest()
    np.testing.assert_allclose(logits(adapt(base, card)), logits(tuned), atol=1e-5)


@requirement("R26.1", "R7.8")
def test_weights_that_do_not_tell_whether_they_are_a_conv1d_are_refused(tmp_path):
    base, tuned = gpt2().state_dict(), moved(gpt2(), "c_proj").state_dict()
    with pytest.raises(ArgumentError, match=r"c_\w+ is a Conv1D in GPT-2"):
        extract_delta(base, tuned)
    linear = nn.ModuleDict({"c_proj": nn.Linear(3, 2)})
    assert extract_direct(linear, 1).weights["c_proj"].in_features == 3


@requirement("R26.9")
@pytest.mark.parametrize("source", ["modules", "folders"])
def test_whatever_changed_and_is_not_in_the_card_is_named(source, tmp_path):
    """Embeddings, norms, biases, more words, fused experts; the oracle is float64 arithmetic."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, **experts, attention_bias=True)

    def model():
        torch.manual_seed(0)
        return transformers.Qwen3MoeForCausalLM(config)

    base = model()
    tuned = moved(model(), "q_proj", "embed_tokens", "norm", "experts", "lm_head")
    tuned.resize_token_embeddings(42, mean_resizing=False)
    before, after = (
        {key: value.double().numpy() for key, value in m.state_dict().items()}
        for m in (base, tuned)
    )
    models = (base, tuned)
    if source == "folders":  # where transformers writes each expert as a Linear of its own
        for name, m in zip(("base", "tuned"), models, strict=True):
            m.save_pretrained(tmp_path / name)
        models = tuple(SafetensorsWeights(tmp_path / name) for name in ("base", "tuned"))
    card = extract_delta(*models, 16)
    norms = {}
    for key, new in after.items():
        old = np.zeros(new.shape)
        old[tuple(map(slice, before[key].shape))] = before[key]
        if norm := np.linalg.norm(new - old):
            norms[key] = norm
    whole = sum(norm**2 for norm in norms.values())
    facts = card.metadata["extract"]
    named = {
        key: norm
        for key, norm in norms.items()
        if key.removesuffix(".weight") not in card.weights
        and not (source == "folders" and "experts" in key)
    }
    assert set(facts["left_out"]) == set(named)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(named)
    assert "lm_head.weight" in named
    assert any(key.endswith("q_proj.bias") for key in named)
    assert any("experts" in key for key in named) == (source == "modules")
    for key, norm in named.items():
        figures = facts["left_out"][key]
        assert figures["norm"] == pytest.approx(norm, rel=1e-6)
        assert figures["share"] == pytest.approx(norm**2 / whole, rel=1e-6)
    rest = sum(norm**2 for norm in named.values())
    assert facts["held"] == pytest.approx(1 - rest / whole, rel=1e-5)
