"""A merged checkpoint is what PEFT's merge_and_unload makes, and transformers loads it."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora
from lora.card import AdapterSet, LowRank
from lora.errors import CardFileError, TargetError, UnsupportedModelError
from lora.interop.peft import import_peft
from lora.models.adapt import adapt_rows, init_card, trainable
from lora.testing.plugin import requirement

pytestmark = [  # what PEFT reads and leaves open
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:target_modules=.* were set but no module:RuntimeWarning"),
]

IDS = {"bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, **IDS}
QWEN = {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 32}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **IDS)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "qwen": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **QWEN)),
}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": FUSED}
NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
NAMES["qwen"] = ("mlp", "gate_proj", "up_proj", "down_proj")


def made(kind, folder, dtype=torch.float32, **options):
    """A small model, saved, with weights large enough that each rounding shows."""
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder, **options)
    return model


def adapter(model, folder, **options):
    """Have PEFT put an adapter on a model and save it."""
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **options))
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.weight.data.normal_()
    wrapped.save_pretrained(folder)
    return wrapped


def old_adapter(kind, folder):
    """An adapter for each single expert, as releases before fused experts saved it."""
    block, *leaves = NAMES[kind]
    tensors = {}
    for layer in range(2):
        for expert in range(3):
            for leaf in leaves:
                middle = 24 if kind == "mixtral" else 12
                size = (middle, 16) if leaf == leaves[2] else (16, middle)
                name = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{leaf}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(2, size[0])
                tensors[f"{name}.lora_B.weight"] = torch.randn(size[1], 2)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def gap(merged, expected, base):
    """The largest difference in roundings of the largest thing that was added."""
    worst = 0.0
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        change = (tensor.double() - base[key].double()).abs()
        if not change.any():
            assert torch.equal(merged[key], tensor), key
            continue
        unit = torch.finfo(tensor.dtype).eps * (base[key].double().abs() + change.max())
        worst = max(worst, float(((merged[key].double() - tensor.double()).abs() / unit).max()))
    return worst


CASES = {
    f"{kind} {dtype}": (kind, dtype, {"target_modules": "all-linear"}, {})
    for kind in ("llama", "gpt2")
    for dtype in ("float32", "bfloat16", "float16", "float64")
}
SHARDS = {"max_shard_size": "4KB"}
CASES["tied, in shards"] = ("tied", "bfloat16", {"target_modules": ["q_proj", "o_proj"]}, SHARDS)
for kind in NAMES:
    for saved in (True, False):
        form = {"save_original_format": saved}
        CASES[f"{kind}, {saved}"] = (kind, "bfloat16", EXPERTS, {**form, **SHARDS})


@requirement("R26.6", "R26.5")
@pytest.mark.parametrize("case", CASES)
def test_a_merged_checkpoint_is_pefts_merge_within_one_rounding(case, tmp_path):
    kind, dtype, options, saving = CASES[case]
    dtype = getattr(torch, dtype)
    model = made(kind, tmp_path / "base", dtype, **saving)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    options = {**options, "fan_in_fan_out": kind == "gpt2"}
    wrapped = adapter(model, tmp_path / "adapter", **options)
    card = import_peft(tmp_path / "adapter")
    lora.fold_checkpoint(tmp_path / "base", card, tmp_path / "merged", strict=True)
    expected = wrapped.merge_and_unload().state_dict()
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=dtype).state_dict()
    assert any(not torch.equal(base[key], expected[key]) for key in base)
    # In a dtype as wide as the sum's, the products are rounded too, and in another order.
    assert gap(merged, expected, base) <= (1 if dtype.itemsize == 2 else 2)
    for file in (tmp_path / "base").iterdir():
        same = file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes()
        assert same or file.suffix == ".safetensors", file


FUSED_KEY = "model.layers.1.mlp.experts.down_proj"


def kept(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@requirement("R26.5")
@pytest.mark.parametrize("source", ["single experts", "target_parameters"])
@pytest.mark.parametrize("kind", NAMES)
def test_experts_are_merged_as_peft_merges_them_in_files_and_in_memory(kind, source, tmp_path):
    model = made(kind, tmp_path / "fused", save_original_format=False)
    base = kept(model)
    model.save_pretrained(tmp_path / "single")
    if source == "single experts":
        old_adapter(kind, tmp_path / "adapter")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    else:
        options = {**EXPERTS, "target_parameters": FUSED[:2]}
        wrapped = adapter(copy.deepcopy(model), tmp_path / "adapter", **options)
    card = import_peft(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().eval()
    weights = expected.state_dict()
    assert not torch.equal(base[FUSED_KEY], weights[FUSED_KEY])
    for form in ("fused", "single"):
        lora.fold_checkpoint(tmp_path / form, card, tmp_path / f"{form}-merged", strict=True)
        merged = type(model).from_pretrained(tmp_path / f"{form}-merged").state_dict()
        assert gap(merged, weights, base) <= 2
    adapted = lora.adapt(model, card, strict=True)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        difference = (adapted(ids).logits - expected(ids).logits).abs().max()
        assert difference <= 1e-4 * expected(ids).logits.abs().max()
    assert gap(lora.fold(adapted).state_dict(), weights, base) <= 2
    assert all(torch.equal(base[key], tensor) for key, tensor in model.state_dict().items())
    experts = [key for key in base if "experts" in key]
    injection = lora.models.adapt.injections(model, card)[card.name]
    assert injection.folded_bytes == sum(base[key].nbytes for key in experts)
    fingerprinted = replace(card, base_fingerprint=lora.fingerprint(model, card))
    for form in ("fused", "single"):
        lora.fold_checkpoint(tmp_path / form, fingerprinted, tmp_path / f"{form}-again")
    with pytest.raises(UnsupportedModelError, match="all cards at once"):
        lora.adapt(adapted, replace(card, name="second"))


@requirement("R26.5")
def test_a_manager_swaps_experts_and_rows_and_training_refuse_them(tmp_path):
    model = made("mixtral", tmp_path / "base", torch.bfloat16)
    base = kept(model)
    wrapped = adapter(copy.deepcopy(model), tmp_path / "adapter", target_parameters=FUSED[:2])
    card = import_peft(tmp_path / "adapter")
    manager = lora.LoRAManager(model)
    manager.apply_card(card)
    assert gap(manager.model.state_dict(), wrapped.merge_and_unload().state_dict(), base) <= 1
    manager.remove_card(card.name)
    assert all(torch.equal(base[key], each) for key, each in manager.model.state_dict().items())
    with pytest.raises(TargetError):
        trainable(model, card)
    with pytest.raises(UnsupportedModelError, match="adapt a model with this card, which folds"):
        adapt_rows(model, [AdapterSet(card)])


@requirement("R26.5")
@pytest.mark.parametrize("change", ["shape", "one", "names"])
def test_factors_that_fit_no_parameter_are_refused(change, tmp_path):
    adapter(made("mixtral", tmp_path / "base"), tmp_path / "adapter", **EXPERTS)
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    if change == "shape":
        tensors[key] = tensors[key][:-1].clone()
    elif change == "one":
        tensors = {name: tensor for name, tensor in tensors.items() if "base_layer" not in name}
    else:
        config["target_parameters"] = ["mlp.experts.other", "mlp.experts.gate_up_proj"]
    save_file(tensors, path)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CardFileError, match="experts"):
        import_peft(tmp_path / "adapter")


@requirement("R26.6")
def test_a_folder_of_sentence_transformers_embeds_as_the_adapted_model(model_folder, tmp_path):
    model = SentenceTransformer(str(model_folder), device="cpu")
    model.save(str(tmp_path / "base"))
    options = {"rank": 2, "alpha": 4.0, "target_modules": ["query", "value"], "seed": 0}
    card = init_card(model, "docs", **options)
    rng = np.random.default_rng(0)
    weights = {
        key[key.index("encoder.") :]: LowRank(pair.A, rng.normal(size=pair.B.shape).astype("f4"))
        for key, pair in card.weights.items()
    }
    card = replace(card, weights=weights)
    lora.fold_checkpoint(tmp_path / "base", card, tmp_path / "merged", strict=True)
    merged = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    texts = ["how do I open a file", "a court of law"]
    expected = lora.adapt(model, card).encode(texts)
    assert np.abs(merged.encode(texts) - expected).max() <= 1e-5
    assert np.abs(model.encode(texts) - expected).max() >= 1e-3
