"""Linears of other classes: Conv1D, forwards of their own, computed and quantised weights.

The oracle is what the base itself computes, plus the term in float64.
"""

import copy
import hashlib
import pickle
from typing import ClassVar

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from lora.card import LoRACard, LowRank
from lora.errors import UnsupportedModelError
from lora.extract import extract_delta
from lora.interop.peft import export_peft, import_peft
from lora.models.adapt import adapt, fingerprint, fold, init_card, linears, trainable, trained_card
from lora.testing.plugin import requirement

pytestmark = [
    pytest.mark.filterwarnings("ignore:a state dict"),  # tested on its own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
IN, OUT, RANK = 64, 48, 4


class FalconLinear(nn.Linear):
    """A Linear with a forward of its own, as Falcon's."""

    def forward(self, x):
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class Doubled(nn.Linear):
    """A Linear that does not compute ``x Wᵀ + b``."""

    def forward(self, x):
        return 2 * super().forward(x)


class Cached(nn.Linear):
    """A Linear that gives the same memory again."""

    def forward(self, x):
        if not hasattr(self, "last"):
            self.last = super().forward(x).detach()
        return self.last


class Registered(nn.Linear):
    """A Linear whose subclasses say a key."""

    keys: ClassVar = []

    def __init_subclass__(cls, *, key):
        cls.keys.append(key)


class Keyed(Registered, key="keyed"):
    """A Linear of that family."""


def weight_normed():
    return parametrizations.weight_norm(nn.Linear(IN, OUT))


def torchao(config):
    def make(dtype):
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(nn.Linear(IN, OUT).to(dtype))
        quantization.quantize_(model, getattr(quantization, config)())
        return model[0]

    return make


def bitsandbytes(kind, **options):
    def make(dtype):
        library = pytest.importorskip("bitsandbytes")
        plain, made = nn.Linear(IN, OUT), getattr(library.nn, kind)(IN, OUT, **options)
        made.load_state_dict(plain.state_dict(), strict=False)
        return made.to("cpu")

    return make


slow = pytest.mark.slow
QUANTISED = {
    "torchao, weights": torchao("Int8WeightOnlyConfig"),
    "torchao, dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes, 8 bit": bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes, 4 bit": bitsandbytes(
        "Linear4bit", quant_type="nf4", compute_dtype=torch.float32
    ),
}
PLAIN = {
    "nn.Linear": lambda dtype: nn.Linear(IN, OUT).to(dtype),
    "FalconLinear": lambda dtype: FalconLinear(IN, OUT).to(dtype),
    "Conv1D": lambda dtype: Conv1D(OUT, IN).to(dtype),
    "Keyed": lambda dtype: Keyed(IN, OUT).to(dtype),
    "weight norm": lambda dtype: weight_normed().to(dtype),
    "Doubled": lambda dtype: Doubled(IN, OUT).to(dtype),
    "Cached": lambda dtype: Cached(IN, OUT).to(dtype),
}
ALL = [pytest.param(make, id=name) for name, make in PLAIN.items()]
ALL += [pytest.param(make, id=name, marks=slow) for name, make in QUANTISED.items()]


def layer_card(name="0"):
    rng = np.random.default_rng(0)
    pair = LowRank(
        rng.normal(0, 0.3, (IN, RANK)).astype("f4"), rng.normal(0, 0.3, (RANK, OUT)).astype("f4")
    )
    return LoRACard("docs", RANK, 2.0, [name], {name: pair})


def term(card, x):
    (pair,) = card.weights.values()
    a, b = (torch.from_numpy(factor.astype(np.float64)) for factor in (pair.A, pair.B))
    return x.double() @ a @ b * pair.scaling, x.double().abs() @ a.abs() @ b.abs() * pair.scaling


@requirement("R26.2", "R26.1", "R2.1")
@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 256])  # more than 100: the weight side, where there is one
def test_a_layer_adds_its_term_to_what_its_base_computes(make, dtype, rows):
    """Rounding: of factors and each product to the dtype that they have, then of the sum."""
    torch.manual_seed(0)
    model, card = nn.Sequential(make(dtype)).requires_grad_(requires_grad=False), layer_card()
    x = torch.randn(2, rows, IN).to(dtype)
    base = model(x)
    wanted, size = term(card, x)
    digits = torch.finfo(dtype).eps
    allowed = (8 + IN * torch.finfo(torch.float32).eps / digits) * digits * size
    allowed += 2 * digits * (base.double().abs() + wanted.abs()) + 2 * IN * 1.2e-7
    adapted = adapt(model, card)
    assert isinstance(adapted[0], type(model[0]))
    assert adapted.state_dict().keys() == model.state_dict().keys()
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            for _ in range(2):
                out = adapted(x)
                assert out.dtype == base.dtype
                assert ((out.double() - base.double() - wanted).abs() <= allowed).all()
    assert torch.equal(model(x), base)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(adapted)(x), out) or rows > 2
    kind = f"{type(model[0]).__name__} {type(getattr(model[0], 'weight', None)).__name__}"
    if "Parametrized" not in kind and "Int8Tensor" not in kind:  # which do not pickle themselves
        again = pickle.loads(pickle.dumps(adapted))  # noqa: S301 - our own bytes
        assert type(again[0]) is type(adapted[0])
        assert torch.equal(again(x), adapted(x))
    assert Registered.keys == ["keyed"]


TRAINED = [param for param in ALL if param.id != "Cached"]


@requirement("R26.2", "R2.7")
@pytest.mark.parametrize("make", TRAINED)
def test_factors_are_trained_around_any_base_or_it_is_refused(make, request):
    """Gradients against float64: of the factors by hand, of the input by the base's own."""
    torch.manual_seed(0)
    base, card = make(torch.float32).requires_grad_(requires_grad=False), layer_card()
    model, x = nn.Sequential(base), torch.randn(3, IN)
    training, given = trainable(model, card), x.clone().requires_grad_()
    if "dynamic" in request.node.name:
        with pytest.raises(UnsupportedModelError, match="passes gradients on to its input"):
            training(given)
        return
    training(given).sum().backward()
    ours, alone = given.grad, x.clone().requires_grad_()
    base(alone).sum().backward()
    (pair,) = card.weights.values()
    a, b = (torch.tensor(factor).double() for factor in (pair.A, pair.B))
    ones = torch.ones(3, OUT).double()
    layer = training[0]
    for got, want in (
        (layer.lora_A.grad, x.double().T @ ones @ b.T * pair.scaling),
        (layer.lora_B.grad, (x.double() @ a).T @ ones * pair.scaling),
        (ours, alone.grad.double() + ones @ b.T @ a.T * pair.scaling),
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    assert all(p.grad is None for p in training.parameters() if not p.requires_grad)
    assert trained_card(training, card) == card


FOLDED = [param for param in ALL if param.id not in ("weight norm", "Doubled", "Cached")]


@requirement("R26.2", "R2.12")
@pytest.mark.parametrize("make", FOLDED)
def test_a_weight_is_folded_and_fingerprinted_as_the_numbers_that_it_stands_for(make):
    """The numbers are the base's outputs for unit vectors; the fingerprint is hashed by hand."""
    torch.manual_seed(0)
    model, card = nn.Sequential(make(torch.float32)), layer_card()
    is_dynamic = hasattr(model[0].weight, "act_quant_kwargs") and model[0].weight.act_quant_kwargs
    zero = model(torch.zeros(1, IN)).detach()
    dense = (model(torch.eye(IN)).detach() - zero).double()
    want = dense + term(card, torch.eye(IN))[0]
    folded = fold(adapt(model, card))
    assert type(folded[0]) in (nn.Linear, FalconLinear, Conv1D)
    weight = folded[0].weight.double()
    weight = weight if isinstance(folded[0], Conv1D) else weight.T
    scale = dense.abs().max()
    limit = 1e-2 if is_dynamic else 2e-3 if "bitsandbytes" in type(model[0]).__module__ else 1e-5
    assert ((weight - want).abs() <= limit * scale).all()
    torch.testing.assert_close(folded(torch.zeros(1, IN)), zero, rtol=0, atol=1e-6)
    plain = copy.deepcopy(fold(adapt(model, LoRACard("zero", 1, 1.0, ["0"], {"0": ZERO}))))[0]
    stored = plain.weight.detach().contiguous()
    sha = hashlib.sha256(f"0\0float32\0{tuple(stored.shape)}\0".encode())
    sha.update(stored.numpy().tobytes())
    assert fingerprint(model, card) == sha.hexdigest()


ZERO = LowRank(np.zeros((IN, 1), "f4"), np.zeros((1, OUT), "f4"))


@requirement("R26.2", "R7.2")
def test_what_needs_a_weight_that_can_not_be_had_is_refused_by_name():
    card = layer_card()
    for make, found in (
        (weight_normed, r"module '0' \(.*found a computed one; do this with the model before"),
        (lambda: Doubled(IN, OUT), r"module '0' \(.*forward that computes x Wᵀ \+ b"),
    ):
        model = nn.Sequential(make())
        with pytest.raises(UnsupportedModelError, match=found):
            fold(adapt(model, card))
    with pytest.raises(UnsupportedModelError, match=r"module '0': .* a computed one"):
        fingerprint(nn.Sequential(weight_normed()), card)


@requirement("R26.2", "R2.1")
@slow
@pytest.mark.parametrize("make", QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_base_shares_its_weight_and_is_not_loaded_over(make):
    torch.manual_seed(0)
    half = nn.Sequential(make(torch.float32), nn.Linear(OUT, IN), make(torch.float32))
    half(torch.ones(1, IN))
    pairs = dict.fromkeys(["0", "2"], layer_card().weights["0"])
    card = LoRACard("docs", RANK, 2.0, ["0", "2"], pairs)
    before = half(torch.ones(1, IN)).detach()
    adapted = adapt(half, card)
    for index in (0, 2):
        ours, theirs = adapted[index].weight, half[index].weight
        ours, theirs = getattr(ours, "qdata", ours), getattr(theirs, "qdata", theirs)
        assert ours.data_ptr() == theirs.data_ptr()
    adapted(torch.ones(1, IN))
    with pytest.raises(UnsupportedModelError, match="load the state dict into the model before"):
        adapted.load_state_dict(half.state_dict())
    assert torch.equal(half(torch.ones(1, IN)), before)


# ---- transformers' Conv1D


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None]).logits


@requirement("R26.1")
@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"], "all-linear"])
def test_a_gpt2_adapter_of_peft_computes_what_peft_does(targets, tmp_path):
    options = {"target_modules": targets, "fan_in_fan_out": True, "init_lora_weights": False}
    theirs = peft.get_peft_model(gpt2(), peft.LoraConfig(r=4, lora_alpha=10, **options)).eval()
    theirs.save_pretrained(tmp_path / "peft")
    model, card = gpt2(), import_peft(tmp_path / "peft")
    adapted = adapt(model, card, strict=True)
    torch.testing.assert_close(logits(adapted), logits(theirs), rtol=0, atol=2e-6)
    assert (logits(adapted) - logits(model)).abs().max() > 0.1
    ids = torch.arange(5)[None]
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(adapted.generate(ids, **greedy), theirs.generate(input_ids=ids, **greedy))
    export_peft(card, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=2e-6)
    merged = theirs.merge_and_unload()
    folded = fold(adapted)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(folded.get_parameter(name), parameter, rtol=0, atol=1e-6)
    exact = extract_delta(model, folded, 4)
    assert set(exact.weights) == set(card.weights)
    torch.testing.assert_close(logits(adapt(model, exact)), logits(theirs), rtol=0, atol=1e-4)


SIZES = st.integers(1, 9)


@requirement("R26.1")
@given(SIZES, SIZES, SIZES, st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_conv1d_does_what_a_linear_of_the_transposed_weight_does(inner, outer, rank, rows, seed):
    """In float64, of which each side rounds each of its few sums otherwise."""
    rng = np.random.default_rng(seed)
    pair = LowRank(rng.normal(size=(inner, rank)), rng.normal(size=(rank, outer)), 0.5)
    card = LoRACard("docs", rank, 1.0, ["0"], {"0": pair})
    conv1d, linear = Conv1D(outer, inner).double(), nn.Linear(inner, outer).double()
    linear.load_state_dict({"weight": conv1d.weight.T, "bias": conv1d.bias})
    adapted = adapt(nn.Sequential(conv1d), card)
    folded = fold(adapted)
    update = torch.tensor(pair.A @ pair.B * 0.5)
    torch.testing.assert_close(folded[0].weight, conv1d.weight + update, rtol=0, atol=1e-12)
    x = torch.tensor(rng.normal(size=(rows, inner)))
    want = linear(x) + x @ update
    with torch.inference_mode():
        for model in (adapted, folded):
            torch.testing.assert_close(model(x), want, rtol=0, atol=1e-11)
    assert [(site.in_features, site.out_features) for site in linears(adapted).values()] == [
        (inner, outer)
    ]


@requirement("R26.1")
def test_a_conv1d_is_listed_trained_and_started_as_a_linear_of_its_sizes():
    model = gpt2()
    sizes = {name.rpartition("h.0.")[2]: site for name, site in linears(model).items()}
    for name, (inner, outer) in {
        "attn.c_attn": (16, 48),
        "mlp.c_fc": (16, 64),
        "mlp.c_proj": (64, 16),
    }.items():
        assert (sizes[name].in_features, sizes[name].out_features) == (inner, outer)
    card = init_card(model, "docs", rank=2, alpha=4.0, target_modules="all-linear", seed=0)
    assert len(card.weights) == 8
    training = trainable(model, card)
    logits_of = training(input_ids=torch.arange(10)[None]).logits
    logits_of.square().sum().backward()
    moved = [name for name, p in training.named_parameters() if p.grad is not None]
    assert len(moved) == 16
    assert torch.equal(logits(adapt(model, card)), logits(model))


@requirement("R26.1", "R2.12")
def test_a_linear_under_two_names_is_adapted_and_folded_once():
    linear = nn.Linear(IN, OUT)
    model = nn.ModuleDict({"first": linear, "second": linear})
    adapted = adapt(model, layer_card("second"))
    assert adapted["first"] is adapted["second"]
    folded = fold(adapted)
    assert folded["first"] is folded["second"]
    x = torch.randn(2, IN)
    want = linear(x).double() + term(layer_card(), x)[0]
    torch.testing.assert_close(folded["first"](x).double(), want, rtol=0, atol=1e-5)
