"""Files with the names of kohya's scripts and of diffusers, and files that only look like them."""

import copy
import json
import sys
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from lora.errors import CardFileError, MissingPackageError
from lora.files import load
from lora.interop import hub
from lora.interop.safetensors import load_safetensors
from lora.models.adapt import adapt
from lora.testing.plugin import requirement

RNG = np.random.default_rng(0)
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
DIFFUSERS = "lora_linear_layer.down", "lora_linear_layer.up"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 20}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def factors(module, down="lora_down", up="lora_up", rank=2, **others):
    """What a file holds for a Linear of 5 inputs and 3 outputs."""
    tensors = {
        down + ".weight": RNG.normal(size=(rank, 5)),
        up + ".weight": RNG.normal(size=(3, rank)),
    }
    tensors |= {name: np.asarray(value) for name, value in others.items()}
    return {f"{module}.{name}": array.astype(np.float32) for name, array in tensors.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "style.safetensors"


def refused(path, tensors, metadata=None, **options):
    save_file(tensors, path, metadata)
    with pytest.raises(CardFileError) as caught:
        load_safetensors(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


FORMS = {
    "kohya": ("lora_te_{}", "lora_down", "lora_up"),
    "diffusers": ("text_encoder.{}", *DIFFUSERS),
    "short": ("text_encoder.{}", "lora.down", "lora.up"),
    "peft": ("text_encoder.{}", "lora_A", "lora_B"),
}


@requirement("R26.8")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("form", "scale"),
    [*product(FORMS, ["alpha", "missing"]), ("short", "configuration"), ("peft", "configuration")],
)
def test_a_text_encoder_computes_what_it_does_with_peft(path, form, scale):
    torch.manual_seed(0)
    base = CLIPTextModel(CLIPTextConfig(**SIZES, **IDS, num_hidden_layers=2)).double().eval()
    config = LoraConfig(
        r=4,
        lora_alpha=4 if scale == "missing" else 6,
        target_modules=["q_proj", "out_proj", "fc1", "fc2"],
        rank_pattern={} if scale == "missing" else {"layers.1.mlp.fc1": 2},
        alpha_pattern={} if scale == "missing" else {"layers.1.mlp.fc1": 5},
        init_lora_weights=False,
    )
    prefix, down, up = FORMS[form]
    theirs = get_peft_model(copy.deepcopy(base), config)
    tensors = {}
    for name, tensor in get_peft_model_state_dict(theirs).items():
        module, factor = name.removeprefix("base_model.model.").split(".lora_")
        module = module if module.startswith("text_model.") else f"text_model.{module}"
        key = prefix.format(module.replace(".", "_") if form == "kohya" else module)
        tensors[f"{key}.{down if factor[0] == 'A' else up}.weight"] = tensor.numpy()
        if scale == "alpha":
            alpha = 5 if "layers.1.mlp.fc1" in module else 6
            tensors[f"{key}.alpha"] = np.array(alpha, ml_dtypes.bfloat16)
    metadata = {"format": "pt"}
    if scale == "configuration":
        fields = config.to_dict()
        keys = fields if form == "peft" else ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
        fields = {f"text_encoder.{key}": fields[key] for key in keys}
        metadata["lora_adapter_metadata"] = json.dumps(fields, default=sorted)
    save_file(tensors, path, metadata)
    card = load_safetensors(path)
    assert (card.name, card.rank, len(card.weights)) == ("style", 4, 8)
    adapted = adapt(base, card, strict=True)
    ids = torch.arange(10).reshape(2, 5)
    expected = theirs(ids).last_hidden_state
    assert (expected - base(ids).last_hidden_state).abs().max() > 0.01
    error = (adapted(ids).last_hidden_state - expected).abs().max()
    assert error <= 1e-12 * expected.abs().max()


NAMES = [
    (
        "lora_te_text_model_encoder_layers_11_self_attn_out_proj",
        CLIP[:26] + "11.self_attn.out_proj",
    ),
    ("lora_te2_text_model_encoder_layers_0_mlp_fc2", "text_model.encoder.layers.0.mlp.fc2"),
    (
        "lora_te3_encoder_block_7_layer_1_DenseReluDense_wi_0",
        "encoder.block.7.layer.1.DenseReluDense.wi_0",
    ),
    ("lora_te3_encoder_block_0_layer_0_SelfAttention_o", "encoder.block.0.layer.0.SelfAttention.o"),
    ("lora_unet_double_blocks_3_img_attn_qkv", "double_blocks.3.img_attn.qkv"),
    ("lora_unet_double_blocks_3_txt_mlp_2", "double_blocks.3.txt_mlp.2"),
    ("lora_unet_single_blocks_12_modulation_lin", "single_blocks.12.modulation.lin"),
    ("unet.mid_block.attentions.0.attn1.to_out.0", "mid_block.attentions.0.attn1.to_out.0"),
    ("transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
]


@requirement("R26.8")
@pytest.mark.parametrize(("name", "module"), NAMES)
def test_a_name_stands_for_one_module_whose_change_is_alpha_through_rank(path, name, module):
    tensors = factors(name, alpha=3)
    save_file(tensors, path)
    card = load_safetensors(path)
    down, up = (tensors[f"{name}.lora_{each}.weight"].astype("f8") for each in ("down", "up"))
    pair = card.weights[module]
    change = (pair.A.astype("f8") @ pair.B.astype("f8")).T * pair.scaling
    assert (list(card.weights), card.target_modules) == ([module], (module,))
    assert np.abs(change - 3 / 2 * up @ down).max() <= 1e-14
    assert "3.0" in refused(path, tensors, alpha=4)
    assert "linear" in refused(path, tensors, layout="matrix")


TE = "lora_te_" + CLIP.replace(".", "_")
TE1 = TE.replace("te_", "te1_", 1)
DIRECT = f"text_encoder.{CLIP}"


@requirement("R26.8")
@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (factors("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"), "UNet"),
        (factors("lora_te_text_model_encoder_layers_01_mlp_fc1"), "each underscore may be a dot"),
        (factors("lora_te_encoder_layer_0_attention_self_query"), "each underscore may be a dot"),
        (factors(TE, dora_scale=np.ones((3, 1))), "DoRA"),
        ({**factors(TE), f"{TE}.hada_w1_a": np.ones((2, 2))}, "LoHa"),
        ({**factors(TE), f"{TE}.lokr_w1": np.ones((2, 2))}, "LoKr"),
        ({**factors(TE), f"{TE}.lora_mid.weight": np.ones((2, 2, 3, 3))}, "LoCon"),
        ({name: array[..., None, None] for name, array in factors(DIRECT).items()}, "Conv2d"),
        ({**factors(TE), f"{TE}.diff_b": np.ones(3)}, "kohya's form"),
        ({**factors(TE), f"{DIRECT}.lora_A.weight": np.ones((2, 5))}, "one of ['lora_te', 'text_"),
        ({**factors(TE), "zz.lora_a": np.ones((2, 5))}, "zz.lora_a"),
        (factors("unet.mid_block.attn1.processor", "to_q_lora.down", "to_q_lora.up"), "diffusers"),
        (factors(DIRECT, "lora_A.a", "lora_B.a"), "diffusers"),
        (factors(DIRECT, "lora_A", "lora_B", lora_magnitude_vector=np.ones(3)), "DoRA"),
        ({**factors(DIRECT), **factors(DIRECT, *DIFFUSERS)}, "two"),
        ({f"{TE}.lora_up.weight": np.ones((3, 2))}, "found ['B']"),
        ({**factors(DIRECT), "text_encoder.q.alpha": np.ones(())}, "found ['q']"),
        (factors(TE, alpha=0), "alpha > 0"),
        (factors(TE, alpha=np.nan), "finite"),
        (factors(TE, alpha=[1, 2]), "finite"),
        ({**factors(TE), f"{TE}.alpha": np.ones((), ml_dtypes.float8_e4m3fn)}, "dtype"),
    ],
)
def test_what_is_not_one_model_of_linears_is_refused_by_its_name(path, tensors, says):
    assert says in refused(path, tensors)


@requirement("R26.8")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"r": 3}, "rank 2"),
        ({"target_modules": ["k_proj"]}, "targets other modules"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": None}, "PEFT writes this number into every configuration"),
        (None, "fields that begin with text_encoder., found ['unet.lora_alpha'"),
    ],
)
def test_a_configuration_of_diffusers_that_contradicts_the_file_is_refused(path, fields, says):
    plain = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    part = "text_encoder" if fields else "unet"
    for settings, problem, others in (
        ({**plain, **(fields or {})}, says, {}),
        (plain, "both", {"alpha": 1}),
    ):
        header = {f"{part}.{key}": value for key, value in settings.items()}
        tensors = factors(DIRECT, "lora_A", "lora_B", **others)
        assert problem in refused(path, tensors, {"lora_adapter_metadata": json.dumps(header)})


@requirement("R26.8")
def test_of_several_models_in_a_file_one_is_named(path, here, tmp_path):
    clip, unet = factors(TE1, rank=1), factors("lora_unet_mid_block_attn1_to_q", rank=4)
    tensors = clip | unet | factors(TE1.replace("te1", "te2"), rank=3)
    assert "`part=...`, one of ['lora_te1', 'lora_te2', 'lora_unet']" in refused(path, tensors)
    assert "found 'lora_te'" in refused(path, tensors, part="lora_te")
    assert "UNet" in refused(path, tensors, part="lora_unet")
    for part, rank in (("lora_te1", 1), ("lora_te2", 3)):
        card = load_safetensors(path, part=part)
        assert (list(card.weights), card.rank) == ([CLIP], rank)
    assert "leave the argument out" in refused(
        path, {"q.lora_a": clip[f"{TE1}.lora_down.weight"]}, part="q"
    )
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    line = "convert", tmp_path, "-o", tmp_path / "x.lora.arrow"
    status, _, problem = here(*line)
    assert (status, "convert --part, one of" in problem.replace(":", "")) == (1, True)
    assert here(*line, "--part", "lora_te2")[0] == 0
    assert load(tmp_path / "x.lora.arrow").weights == card.weights


@requirement("R26.8")
def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"hf:org/law.*lora-cards\[hub\]"):
        hub.download("hf:org/law")
