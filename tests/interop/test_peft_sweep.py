"""Odd and bad PEFT folders: each gives what PEFT makes of it, or an error that names the folder."""

import ast
import dataclasses
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.numpy import load_file, save_file
from torch import nn

from lora.card import LoRACard, LowRank
from lora.errors import CardFileError
from lora.interop.peft import CONFIG, WEIGHTS, export_peft, import_peft
from lora.testing.plugin import requirement

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT says in warnings what it leaves out

AGREEMENT = 1e-6
NAMES = [f"m.{layer}.{name}" for layer in ("0", "1", "01") for name in "qk"] + ["top.q"]
X = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3)))


class Tiny(nn.Module):
    """A model of the modules in NAMES, each of which changes the output."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            parent, _, last = name.rpartition(".")
            owner = self
            for part in parent.split("."):
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(last, nn.Linear(3, 4))
        self.double().requires_grad_(requires_grad=False)

    def forward(self, x):
        return torch.stack([self.get_submodule(name)(x) for name in NAMES])


BASE = Tiny()
STATE = BASE.state_dict()


def theirs(folder, adapter="default"):
    """What PEFT's model gives, or None if it refuses the folder."""
    model = Tiny()
    model.load_state_dict(STATE)
    config = json.loads((folder / CONFIG).read_text())
    if config["target_modules"] is None:  # PEFT goes by the model's type, and knows none here
        modules = {key[17:].partition(".lora_")[0] for key in load_file(folder / WEIGHTS)}
        (folder / CONFIG).write_text(json.dumps({**config, "target_modules": sorted(modules)}))
    try:
        return PeftModel.from_pretrained(model, folder, adapter_name=adapter).eval()(X)
    except Exception:  # noqa: BLE001 - whatever PEFT raises
        return None


def ours(folder):
    """What the card gives, or None if it is refused by name."""
    try:
        return dense(import_peft(folder))
    except CardFileError as error:
        assert str(folder) in str(error)  # noqa: PT017 - either may happen
        return None


def dense(card):
    """What a card gives in dense float64 arithmetic."""
    outputs = BASE(X).clone()
    for name, pair in card.weights.items():
        a, b = torch.from_numpy(pair.A.astype("f8")), torch.from_numpy(pair.B.astype("f8"))
        outputs[NAMES.index(name)] += pair.scaling * (X @ a @ b)
    return outputs


def difference(folder, adapter="default"):
    """The largest relative difference; None if refused here, infinite if PEFT alone refuses."""
    result = ours(folder)
    if result is None:
        return None
    peer = theirs(folder, adapter)
    return np.inf if peer is None else float((result - peer).abs().max() / peer.abs().max())


def write(folder, config, ranks, dtype="f4", adapters=("",)):
    """Write a folder with factors of these ranks by module."""
    rng, tensors = np.random.default_rng(1), {}
    for index, (name, rank) in enumerate(ranks.items()):
        adapter = adapters[index % len(adapters)]
        for factor, shape in (("A", (rank, 3)), ("B", (4, rank))):
            key = f"base_model.model.{name}.lora_{factor}{adapter}.weight"
            tensors[key] = rng.normal(size=shape).astype(dtype)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
ODD = [None, True, False, 0, 1, 2, 2.0, 2.5, -2, "2", "q", "", "none", [], ["q"], [1], [None]]
ODD += [[True], ["q", 1], {}, *({"q": value} for value in (0, 2, 2.0, "2", None, True, [1]))]
ODD += [{"k": value} for value in (None, "x", 0)]


@requirement("R23.1")
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LoraConfig)])
def test_every_field_of_peft_with_odd_values_gives_its_result_or_is_refused(tmp_path, field):
    ranks = {name: 2 for name in NAMES if name.endswith("q")}
    results = {
        repr(value): difference(write(tmp_path / "docs", {**PLAIN, field: value}, ranks))
        for value in ODD
    }
    assert all(result is None or result <= AGREEMENT for result in results.values()), results
    default = LoraConfig().to_dict().get(field)
    if field not in PLAIN and repr(default) in results:
        assert results[repr(default)] is not None  # neutral values pass


METHODS = {
    "LOHA": LoHaConfig(target_modules=["q"]),
    "LOKR": LoKrConfig(target_modules=["q"]),
    "IA3": IA3Config(target_modules=["q"], feedforward_modules=[]),
    "VERA": VeraConfig(target_modules=["q"]),
    "OFT": OFTConfig(target_modules=["q"], r=1, oft_block_size=0),
    "ADALORA": AdaLoraConfig(target_modules=["q"], total_step=10),
    "use_dora": LoraConfig(target_modules=["q"], use_dora=True),
    "bias": LoraConfig(target_modules=["q"], bias="lora_only"),
    "modules_to_save": LoraConfig(target_modules=["k"], modules_to_save=["top"]),
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=2, token_dim=4),
    "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=2, token_dim=4),
    "P_TUNING": PromptEncoderConfig(num_virtual_tokens=2, token_dim=4),
}


@requirement("R23.1")
@pytest.mark.parametrize("name", METHODS)
def test_what_peft_saves_of_another_method_is_refused_by_its_name(tmp_path, name):
    """A whole folder where the method adapts Linears, the configuration where it adds tokens."""
    if name.endswith("TUNING"):
        METHODS[name].save_pretrained(tmp_path)
    else:
        get_peft_model(Tiny(), METHODS[name]).save_pretrained(tmp_path)
    with pytest.raises(CardFileError, match=rf"{name}\b.*;") as caught:
        import_peft(tmp_path)
    assert caught.value.hint


SOME = {
    "target_modules": "['q'] ['k','q'] ['0.q','k'] ['m.01.k'] ['top.q','1.k'] 'all-linear' 'q' "
    "None '.*[.]q' '.*(q|k)' 'm.0.*' [] {'q':1} '' ['q',1] ['nothing'] '('",
    "rank_pattern": "{} {} {'q':1} {'k':3,'q':1} {'0.q':1,'q':3} {'^m[.]0[.]q':3} {'m':3} "
    "{'q':'2'} {'q':None} None [] {'(':1}",
    "alpha_pattern": "{} {} {'q':3} {'k':.5,'q':-1} {'1.k|top.q':7} {'q':0} {'q':True} "
    "{'q':'3'} None",
    "use_rslora": "False False True True None 1",
    "lora_alpha": "4 6.5 1 9 0 -1 '4' None True",
    "layers_to_transform": "... ... ... None 0 1 [1] [0,1] [] '0' True [True]",
    "layers_pattern": "... ... ... None 'm' ['x','m'] [] '' 'x|m' 'top' 0",
    "exclude_modules": "... ... None ['k'] ['0.q'] 'm[.]0.*' [] '' {'k':1} [1]",
    "init_lora_weights": "... True False 'gaussian' 'pissa' None 'orthogonal'",
    "fan_in_fan_out": "... False True ... None",
    "bias": "... 'none' ... ... None 'all'",
    "future": "... ... None False 1 'x'",
    "use_dora": "... ... ... False True",
}
"""Values of each setting, those of a usual folder first."""

ADAPTERS = [("",), ("",), ("",), (".default",), ("", ".default"), (".law",), ("", ".law")]
ADAPTERS += [(".law", ".docs")]


def folder_by(seed, place):
    """A folder of random settings; mostly with the factors that PEFT expects for them."""
    rng = random.Random(seed)
    odd = rng.random() < 0.5
    config = dict(PLAIN)
    for key, texts in SOME.items():
        values = list(map(ast.literal_eval, texts.split()))
        if (value := rng.choice(values if odd else values[:4])) is not ...:
            config[key] = value
    try:
        parsed = LoraConfig.from_peft_type(**config)
        ranks = {
            name: parsed.rank_pattern.get(get_pattern_key(parsed.rank_pattern, name), parsed.r)
            for name in NAMES
            if parsed.target_modules == "all-linear" or check_target_module_exists(parsed, name)
        }
    except Exception:  # noqa: BLE001 - whatever PEFT raises
        ranks = {name: 2 for name in NAMES if name.endswith("q")}
    ranks = {name: rank if type(rank) is int and rank > 0 else 2 for name, rank in ranks.items()}
    if rng.random() < 0.1:
        ranks[rng.choice(NAMES)] = rng.choice([1, 2, 3])
    if rng.random() < 0.05 and ranks and config.get("init_lora_weights", True):
        ranks.pop(rng.choice(sorted(ranks)))
    adapters = rng.choice(ADAPTERS)
    write(place, config, ranks, rng.choice(["f2", "f4", "f8"]), adapters)
    used = {adapter for adapter, _ in zip(adapters, ranks, strict=False) if adapter}
    return place, config, (used or {".default"}).pop().removeprefix(".")


@requirement("R23.1")
@pytest.mark.parametrize(
    ("seeds", "least"), [(600, 150), pytest.param(6000, 1500, marks=pytest.mark.slow)]
)
def test_folders_of_random_settings_give_what_peft_gives_or_are_refused(tmp_path, seeds, least):
    counts = Counter()
    for seed in range(seeds):
        folder, config, adapter = folder_by(seed, tmp_path / "docs")
        result = difference(folder, adapter)
        assert result is None or result <= AGREEMENT, (seed, config, result)
        counts["refused" if result is None else "equal"] += 1
    assert counts["equal"] >= least


@requirement("R23.2", "R26.7")
@pytest.mark.parametrize("cards", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_peft_computes_from_any_exported_card_what_the_card_does(tmp_path, cards):
    for seed in range(cards):
        rng = np.random.default_rng(seed)
        dtype, weights = rng.choice(["f4", "f8"]), {}
        scales = [[0.7], [0.7, -3.0], [1e-4, 1e3, 0.0], [2.0, 8 / np.sqrt(3)]][seed % 4]
        for name in rng.permutation(NAMES)[: rng.integers(1, 6)]:
            rank = int(rng.integers(1, 4))
            a, b = rng.normal(size=(3, rank)), rng.normal(size=(rank, 4))
            weights[str(name)] = LowRank(a.astype(dtype), b.astype(dtype), rng.choice(scales))
        largest = max(pair.rank for pair in weights.values())
        card = LoRACard("docs", largest, 8.0, tuple(weights), weights)
        expected = dense(card)
        for exact in (False, True):
            export_peft(card, tmp_path / "docs", overwrite=True, exact=exact)
            gap = (theirs(tmp_path / "docs") - expected).abs().max() / expected.abs().max()
            assert gap <= AGREEMENT, (seed, exact)
