"""Adapters that PEFT made compute here what they compute there, and the other way round."""

import copy
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

from lora.card import DTYPES, LoRACard, LowRank
from lora.errors import CardFileError
from lora.factors import delta
from lora.files import load, save
from lora.interop.peft import _by_pattern, _targeted, export_peft, import_peft
from lora.merging import merge
from lora.models.adapt import adapt, injections
from lora.testing.plugin import requirement

AGREEMENT = 1e-6
"""Relative, as R23.2 asks."""

pytestmark = [  # what PEFT reads, takes a bias on B for, and leaves open
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor:Warning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]

NARROW = ("pissa", "olora")
"""Initialisations that PEFT does in float32 at most."""

IDS = torch.arange(12).reshape(2, 6)

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
SIZES |= {"vocab_size": 20, "max_position_embeddings": 8, "num_hidden_layers": 3}


def bert():
    return BertModel(BertConfig(**SIZES))


def llama():
    special = {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **special))


def gpt2():
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 2}
    return GPT2Model(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def small(make):
    """A model in float64 with large weights, so that every difference of computation shows."""
    torch.manual_seed(0)
    model = make().double().eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def gap(found, expected):
    """The largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def made(make, folder, **options):
    """Have PEFT make and save an adapter, large enough that it shows."""
    torch.manual_seed(1)
    base = small(make)
    if str(options.get("init_lora_weights")) in NARROW:
        base = base.float()
    config = LoraConfig(**{"init_lora_weights": False, "r": 4, **options})
    model = get_peft_model(base, config).eval()
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.lora_A:
            layer.lora_A["default"].weight.data.normal_()
            layer.lora_B["default"].weight.data.normal_()
    model.save_pretrained(folder)


def loaded(make, folder):
    """The model with an adapter as PEFT loads it; saving has sorted the patterns."""
    return PeftModel.from_pretrained(small(make), folder).eval()


def scalings(model):
    layers = model.get_base_model().named_modules()
    return {name: part.scaling["default"] for name, part in layers if isinstance(part, LoraLayer)}


RSLORA = {"use_rslora": True, "lora_alpha": 3, "r": 5}
ALL_PATTERNS = {
    "use_rslora": True,
    "alpha_pattern": {"output.dense": 7, "(encoder.)?layer.1.attention.self.query": 1},
    "rank_pattern": {"attention.output.dense": 1, "dense": 3},
}
EXCLUDED = {"exclude_modules": ["layer.1.output.dense", "pooler.dense"]}
BLOCKS = {"layers_to_transform": [0, 2], "layers_pattern": ["blocks", "layers"]}
CASES = {
    "one list": (bert, ["query", "value"], {}),
    "alpha and rank": (bert, ["query"], {"lora_alpha": 3, "r": 5}),
    "rsLoRA": (bert, ["query", "dense"], RSLORA),
    "ranks": (bert, ["query", "key"], {"rank_pattern": {"key": 2, r"layer\.1\..*query": 7}}),
    "alphas": (bert, ["query", "key"], {"alpha_pattern": {"key": 5, "^encoder.*": 3}}),
    "all patterns, rsLoRA": (bert, ["query", "dense"], ALL_PATTERNS),
    "all-linear": (bert, "all-linear", {}),
    "all-linear with a head": (llama, "all-linear", {}),
    "a pattern": (llama, r".*\.[02]\..*\.(q|v)_proj", {}),
    "a full name": (bert, ["encoder.layer.2.intermediate.dense"], {}),
    "left to the model": (llama, None, {}),
    "excluded": (bert, ["query", "dense"], EXCLUDED),
    "excluded by pattern": (llama, ["q_proj"], {"exclude_modules": r".*layers\.1\..*"}),
    "one layer": (bert, ["query"], {"layers_to_transform": 1}),
    "layers": (llama, ["q_proj", "up_proj"], {"layers_to_transform": [0, 2]}),
    "layers by pattern": (llama, ["q_proj"], BLOCKS),
    "negative": (bert, ["query", "key"], {"alpha_pattern": {"key": -3, "query": 0}}),
}


@requirement("R23.1", "R23.2")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_one_side_saves_computes_the_same_on_the_other(case, tmp_path):
    make, targets, options = CASES[case]
    made(make, tmp_path / "docs", target_modules=targets, **options)
    theirs, base = loaded(make, tmp_path / "docs"), small(make)
    card = import_peft(tmp_path / "docs")
    expected = output(theirs)
    assert {name: pair.scaling for name, pair in card.weights.items()} == scalings(theirs)
    assert sorted(injections(base, card, strict=True)["docs"].bound) == sorted(scalings(theirs))
    assert gap(output(adapt(base, card)), expected) <= AGREEMENT
    assert gap(output(base), expected) > 1e3 * AGREEMENT
    export_peft(card, tmp_path / "exact", exact=True)
    export_peft(card, tmp_path / "back")
    again = loaded(make, tmp_path / "exact")
    assert scalings(again) == pytest.approx(scalings(theirs), rel=np.finfo(float).eps, abs=0)
    assert len(set(scalings(loaded(make, tmp_path / "back")).values())) == 1
    for folder in ("exact", "back"):
        assert gap(output(loaded(make, tmp_path / folder)), expected) <= AGREEMENT


@requirement("R23.1", "R23.2")
def test_an_adapter_over_conv1d_has_the_factors_of_any_other(tmp_path):
    """GPT-2's Conv1D holds its weight as (in, out), but PEFT's factors are those of any Linear."""
    options = {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}}
    options["fan_in_fan_out"] = True
    made(gpt2, tmp_path / "docs", **options)
    theirs, card = loaded(gpt2, tmp_path / "docs"), import_peft(tmp_path / "docs")
    expected = output(theirs)
    assert len(card.weights) == 4
    assert card.weights["h.0.attn.c_attn"].A.shape == (4, 4)
    assert card.weights["h.1.mlp.c_fc"].B.shape == (2, 16)
    written = small(gpt2)
    for name, pair in card.weights.items():
        change = torch.from_numpy(delta(pair, dtype=np.float64)).T  # a Conv1D's weight is (in, out)
        layer = theirs.get_base_model().get_submodule(name)
        assert gap(change, layer.get_delta_weight("default").detach()) <= AGREEMENT
        written.get_submodule(name).weight += change
    assert gap(output(written), expected) <= AGREEMENT
    assert gap(output(small(gpt2)), expected) > 1e3 * AGREEMENT
    export_peft(card, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert gap(output(loaded(gpt2, tmp_path / "back")), expected) <= AGREEMENT


def by_hand(model, dtype="float64"):
    """A card for every Linear, with unequal ranks and scalings that no single alpha gives."""
    rng, weights = np.random.default_rng(0), {}
    linears = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)]
    for index, (name, module) in enumerate(linears):
        rank = 1 + index % 3
        shapes = (module.in_features, rank), (rank, module.out_features)
        factors = (rng.normal(size=shape).astype(DTYPES[dtype]) for shape in shapes)
        weights[name] = LowRank(*factors, [0.1, -0.7, 1 / 3, 0.0][index % 4])
    return LoRACard("docs", 3, 2.0, ["all-linear"], weights)


class Alike(nn.Module):
    """Modules whose names end alike, and one whose name is no name in a pattern."""

    def __init__(self):
        super().__init__()
        self.q, self.outer = nn.Linear(8, 8), nn.Module()
        self.outer.q, self.outer.xq = nn.Linear(8, 8), nn.Linear(8, 8)
        self.add_module("a+b(c", nn.Linear(8, 8))

    def forward(self, x):
        mixed = self.q(x).tanh() + self.outer.q(x).tanh() * self.outer.xq(x)
        return self.get_submodule("a+b(c")(mixed)


def alike():
    torch.manual_seed(0)
    return Alike().double().requires_grad_(requires_grad=False), torch.randn(5, 8).double()


def written(model, card):
    """The model with every ΔW in its weights, as ambiguous keys can't be adapted by."""
    model = copy.deepcopy(model)
    for name, pair in card.weights.items():
        model.get_submodule(name).weight += torch.from_numpy(delta(pair, dtype=np.float64))
    return model


def rounded(card):
    """The card with each scaling in its B, rounded once."""
    weights = {
        name: LowRank(pair.A, (pair.scaling * pair.B.astype("f8")).astype(pair.dtype), 1.0)
        for name, pair in card.weights.items()
    }
    return replace(card, weights=weights)


@requirement("R23.2", "R23.4")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unequal_ranks_and_any_scaling_mean_the_same_to_peft(tmp_path, dtype, exact):
    base, x = alike()
    card = by_hand(base, dtype)
    assert {pair.rank for pair in card.weights.values()} == {1, 2, 3}
    expected = written(base, card if exact else rounded(card))(x)
    export_peft(card, tmp_path / "docs", exact=exact)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "docs").eval()
    values = {name: pair.scaling if exact else 0.5 for name, pair in card.weights.items()}
    assert scalings(theirs) == pytest.approx(values, rel=np.finfo(float).eps, abs=0)
    assert gap(theirs(x), expected) <= AGREEMENT
    assert gap(base(x), expected) > 1e3 * AGREEMENT


@requirement("R23.2")
def test_a_card_of_one_module_is_not_given_to_those_whose_names_end_alike(tmp_path):
    base, x = alike()
    pair = by_hand(base).weights["outer.xq"]
    card = LoRACard("docs", pair.rank, 1.0, ["q"], {"q": pair})
    export_peft(card, tmp_path / "docs")
    # A list can't say "q, but not outer.q": B is 0 there.
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "docs").eval()
    assert gap(theirs(x), written(base, card)(x)) <= AGREEMENT


RULES = [
    {"target_modules": ["query", "dense"], "layers_to_transform": [1]},
    {"target_modules": ["query", "encoder.layer.2.output.dense"], "layers_to_transform": 0},
    {"target_modules": ["query"], "layers_to_transform": [0, 1], "layers_pattern": "layer"},
    {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": ["h", "layer|x"]},
    {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": []},
    {"target_modules": ["query"], "layers_to_transform": []},
    {"target_modules": ["q.proj", "1"], "layers_to_transform": [3]},
    {"target_modules": r".*\.(query|key)", "exclude_modules": "encoder.layer.1.*"},
    {"target_modules": "query"},
    {"target_modules": ["query", "key"], "exclude_modules": ["1.attention.self.query", "key"]},
    {"target_modules": ["uery", ""]},
]
NAMES = [name for name, _ in small(bert).named_modules() if name]
NAMES += "layer.0.query 0.query h.0.query layer.1.experts.0.query query a.1 b.3.1".split()
NAMES += "x.layer.0.mlp.1.query xlayer.0.query x.1.layer.0.query a.b.3.q.proj".split()
NAMES += ["deep.a.b.3.c.q.proj", "layer.01.query", "a.b.003.q.proj", "layer.00.query"]


@requirement("R23.1")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_which_modules_are_targeted_is_decided_as_peft_decides(rule):
    theirs = [name for name in NAMES if check_target_module_exists(LoraConfig(**rule), name)]
    assert [name for name in NAMES if _targeted(rule, name)] == theirs


KEYS = [["query"], ["uery"], ["a|query"], ["^layer.0.query", "query"], [r".*\.query"], ["."], [""]]
KEYS += [["0.query", "layer.0.query"]]


@requirement("R23.1")
@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_which_pattern_counts_is_decided_as_peft_decides(keys):
    patterns = {key: index for index, key in enumerate(keys)}
    theirs = [patterns.get(get_pattern_key(patterns.keys(), name), -1) for name in NAMES]
    config = {"rank_pattern": patterns, "r": -1}
    assert [_by_pattern(config, "rank_pattern", name, "r") for name in NAMES] == theirs


REFUSED = {
    "DoRA": {"use_dora": True},
    "a bias": {"bias": "lora_only"},
    "a bias on B": {"lora_bias": True, "init_lora_weights": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "modules trained whole": {"modules_to_save": ["pooler"]},
    "embeddings": {"target_modules": ["word_embeddings"]},
    "trained tokens": {"trainable_token_indices": {"word_embeddings": [1, 2]}},
    "copied layers": {"layer_replication": [(0, 2), (1, 3)]},
}


@requirement("R23.1")
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_peft_saves_that_is_not_plain_lora_is_refused(case, tmp_path):
    made(bert, tmp_path, **{"target_modules": ["query"], **REFUSED[case]})
    with pytest.raises(CardFileError) as caught:
        import_peft(tmp_path)
    assert caught.value.hint


@requirement("R23.1", "R23.4")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_comes_from_peft_bit_for_bit(tmp_path, dtype):
    config = LoraConfig(target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(small(bert).to(dtype), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    card = import_peft(tmp_path)
    assert card.dtype.name == str(dtype).removeprefix("torch.")
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        module, factor = name.rsplit(".lora_", 1)
        found = np.ascontiguousarray(getattr(card.weights[module], factor).T)
        assert found.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


@requirement("R23.3")
def test_a_sentence_transformer_adapted_here_embeds_as_with_peft(model_folder, tmp_path):
    texts = ["read a file", "", "naïve café 😀", "a much longer sentence " * 20]
    torch.manual_seed(1)

    def model():
        return SentenceTransformer(str(model_folder), device="cpu")

    options = {"rank_pattern": {"value": 3}, "use_rslora": True, "init_lora_weights": False}
    config = LoraConfig(r=8, target_modules=["query", "value", "dense"], **options)
    get_peft_model(model()[0].auto_model, config).save_pretrained(tmp_path / "theirs")
    peer, card = model().double(), import_peft(tmp_path / "theirs", name="docs")
    before, found = peer.encode(texts), adapt(peer, card).encode(texts)
    assert len(injections(peer, card, strict=True)["docs"].bound) == len(card.weights) == 6 * 5 + 1
    assert np.abs(found - before).max() > 1e3 * AGREEMENT * np.abs(found).max()
    export_peft(card, tmp_path / "back")
    bound = AGREEMENT * np.abs(found).max()
    for place in ("theirs", "back"):
        theirs = model()
        theirs.load_adapter(str(tmp_path / place))
        assert np.abs(theirs.double().encode(texts) - found).max() <= bound
    wrapped, folder = model().double(), tmp_path / "back"
    wrapped[0].auto_model = PeftModel.from_pretrained(wrapped[0].auto_model, folder).eval()
    assert np.abs(wrapped.encode(texts) - found).max() <= bound
    assert np.array_equal(peer.encode(texts), before)


@requirement("R26.7")
def test_the_task_survives_a_merge_so_that_peft_finds_base_and_task(tmp_path):
    small(llama).save_pretrained(tmp_path / "base")
    cards = []
    for name, targets in (("docs", ["q_proj"]), ("law", ["up_proj"])):
        options = {"target_modules": targets, "task_type": "CAUSAL_LM"}
        made(
            lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / name, **options
        )
        cards.append(import_peft(tmp_path / name))
    save(merge(cards), tmp_path / "both.lora.arrow")
    export_peft(load(tmp_path / "both.lora.arrow"), tmp_path / "both")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "both").double().eval()
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").double()
    for card in cards:
        for name, pair in card.weights.items():
            change = torch.from_numpy(delta(pair, dtype=np.float64)) / 2
            base.get_submodule(name).weight.data += change
    assert gap(output(theirs), output(base)) <= AGREEMENT
    with pytest.raises(ValueError, match="PeftModelForCausalLM"):
        AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "both")


@requirement("R23.2")
def test_peft_loads_what_is_exported_without_a_warning(tmp_path):
    base = small(bert)
    export_peft(replace(by_hand(base), base_model="some/base"), tmp_path / "docs")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base, tmp_path / "docs")
    first_words = {str(each.message).split(" ")[0] for each in said}
    assert first_words <= {"`is_gradient_checkpointing`", "unclosed"}
