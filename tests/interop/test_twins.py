"""Models of transformers and sentence-transformers: what is done to an adapted one stays there."""

import copy
import gc
import warnings
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import save_model
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import (
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5Model,
    Trainer,
    TrainingArguments,
)

from lora.card import LoRACard, LowRank
from lora.errors import TargetError, UnboundWarning, UnsupportedModelError
from lora.interop.peft import export_peft
from lora.models.adapt import adapt, fold, init_card
from lora.models.encoder import InferenceCore
from lora.testing.plugin import requirement

# Reading the state dict of an adapted model warns, which is tested on its own.
pytestmark = pytest.mark.filterwarnings("ignore:a state dict")

IDS = torch.arange(3, 19).reshape(2, 8)
TEXTS = ["A text.", "Another one, which is longer than the first."]


def llama(_=None):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **small, **heads)).eval()


def t5(_):
    torch.manual_seed(0)
    return T5Model(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2)).eval()


def st_of(folder):
    return SentenceTransformer(str(folder), device="cpu")


def tokens(model, **more):
    return model(input_ids=IDS, **more)[0].detach()


MODELS = {
    "BertModel": (lambda folder: BertModel.from_pretrained(folder).eval(), tokens),
    "LlamaForCausalLM": (llama, tokens),
    "T5Model": (t5, lambda model: tokens(model, decoder_input_ids=IDS)),
    "SentenceTransformer": (st_of, lambda model: torch.tensor(model.encode(TEXTS))),
    "InferenceCore": (
        InferenceCore.from_pretrained,
        lambda model: torch.tensor(model.encode(TEXTS)),
    ),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def original(request, model_folder):
    """A model, and what it computes."""
    make, outputs = request.param
    return make(model_folder), outputs


def any_card(model):
    card = init_card(model, "docs", rank=2, alpha=4.0, target_modules=["all-linear"], seed=0)
    rng = np.random.default_rng(0)
    weights = {
        key: LowRank(pair.A, rng.normal(size=pair.B.shape).astype("f4") * 0.1, pair.scaling)
        for key, pair in card.weights.items()
    }
    return LoRACard("docs", 2, 4.0, ["all-linear"], weights)


def picture(folder):
    """The bytes of every file of a folder, by its path."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


IMMUTABLE = (str, bytes, int, float, complex, tuple, frozenset, range, type(None), type(...))
IMMUTABLE += (torch.dtype, torch.device, torch.Size, torch.layout, type, Enum)
# The kinds that docs/idea.md lists.
SHARED = (FunctionType, BuiltinFunctionType, ModuleType, CodeType, LowRank, LoRACard)


def reachable(model):
    """Every object that an object leads to, by id, without what `SHARED` lists."""
    objects, waiting = {}, [model]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (type, Enum, *SHARED)) or id(item) in objects:
            continue
        objects[id(item)] = item
        waiting += gc.get_referents(item)
        if isinstance(item, Tensor):
            waiting.append(item.__dict__)
    return objects


@requirement("R3.7", "R3.9")
def test_the_result_leads_to_no_mutable_object_of_the_original(original):
    model, outputs = original
    outputs(model)
    result = adapt(model, any_card(model))
    theirs, its = reachable(model), reachable(result)
    both = [theirs[key] for key in theirs.keys() & its.keys()]
    shared = {type(item).__qualname__ for item in both if not isinstance(item, IMMUTABLE)}
    assert shared <= {"lock", "RLock", "getset_descriptor"}


def change_everything(value, seen):
    """Change every plain value that an object leads to, in place."""
    if isinstance(value, (type, FunctionType, ModuleType, Enum, Tensor)) or id(value) in seen:
        return
    seen[id(value)] = value
    content = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    for key, item in list((content or {}).items()):
        change_everything(item, seen)
        if isinstance(item, bool | int | float | str | type(None) | torch.dtype | torch.device):
            content[key] = "spoilt"
    if isinstance(value, list | tuple | set | frozenset):
        for item in value:
            change_everything(item, seen)
    if isinstance(value, list | set):
        value.clear()


def spoil_tokenizer(model):
    tokenizer = model.tokenizer
    getattr(tokenizer, "_tokenizer", tokenizer).add_tokens(["text", "another"])
    backend = getattr(tokenizer, "_tokenizer", tokenizer)
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.normalizer.lowercase = False
    backend.decoder.prefix = "@@"
    backend.encode_special_tokens = True


def resize(model):
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.tie_weights()


def configure(model):
    for config in (model.config, getattr(model, "generation_config", None)):
        for key, item in vars(config).items() if config else ():
            if isinstance(item, bool | int | float | str):
                vars(config)[key] = type(item)(3)


SETTERS = {
    "a dtype": lambda model: model.half(),
    "training": lambda model: model.train().requires_grad_(),
    "hooks": lambda model: [m.register_forward_hook(lambda *_: None) for m in model.modules()],
    "new parts": lambda model: model.register_module("more", nn.Linear(1, 1)),
    "other numbers": lambda model: model.load_state_dict(
        {key: torch.full_like(tensor, 7) for key, tensor in model.state_dict().items()}
    ),
    "a configuration": configure,
    "the size of the vocabulary": resize,
    "attention": lambda model: model.set_attn_implementation("eager"),
    "checkpointing": lambda model: model.activation_checkpointing_enable(),
    "pruned heads": lambda model: model.config.update({"pruned_heads": {0: [1]}}),
    "its length": lambda model: setattr(model, "max_seq_length", 3),
    "its prompts": lambda model: model.prompts.update({"query": "Ask: "}),
    "a dimension": lambda model: setattr(model, "truncate_dim", 5),
    "the tokenizer": spoil_tokenizer,
    "the tokenizer's limit": lambda model: setattr(model.tokenizer, "model_max_length", 4),
    "its modules": lambda model: model.append(nn.Identity()),
    "everything": lambda model: change_everything(model, {}),
}


@requirement("R3.7", "R3.9")
def test_no_setter_of_the_result_reaches_the_original_or_what_it_saves(original, tmp_path):
    model, outputs = original
    before = outputs(model)
    save = getattr(model, "save_pretrained", lambda folder: None)
    save(str(tmp_path / "before"))
    card, done = any_card(model), []
    assert not torch.allclose(outputs(adapt(model, card)), before)
    for name, change in SETTERS.items():
        try:
            change(adapt(model, card))
        except (AttributeError, TypeError, KeyError):
            continue  # this model has no such setter
        done.append(name)
        assert torch.equal(outputs(model), before), name
    assert len(done) >= 8
    assert {
        "SentenceTransformer": "the tokenizer",
        "LlamaForCausalLM": "the size of the vocabulary",
    }.get(type(model).__name__, "everything") in done
    save(str(tmp_path / "after"))
    assert picture(tmp_path / "after") == picture(tmp_path / "before")


class Counting(accelerate.hooks.ModelHook):
    """Counts the forwards of its module, by id."""

    def __init__(self):
        self.calls = []

    def pre_forward(self, module, *arguments, **options):
        self.calls.append(id(module))
        return arguments, options


def dispatched():
    places = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {**{f"model.{place}": "cpu" for place in places}, "lm_head": "cpu"}
    return accelerate.dispatch_model(llama(), places, force_hooks=True)


def hooked():
    model = llama()
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, Counting())
        accelerate.hooks.add_hook_to_module(module, Counting(), append=True)
    return model


def unhooked(model):
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    return model


def prepared(**options):
    AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, **options).prepare(llama())


def unwrapped(model):
    return accelerate.Accelerator(cpu=True).unwrap_model(model, keep_fp32_wrapper=False)


SET_ON_INSTANCES = {
    "accelerate.dispatch_model": (dispatched, unhooked),
    "add_hook_to_module": (hooked, unhooked),
    "Accelerator.prepare": (prepared, unwrapped),
    "Accelerator.prepare, bf16": (lambda: prepared(mixed_precision="bf16"), unwrapped),
}


@requirement("R26.3", "R3.9")
@pytest.mark.parametrize(("make", "undo"), SET_ON_INSTANCES.values(), ids=SET_ON_INSTANCES)
def test_what_others_set_on_instances_is_carried_over_to_the_copy(make, undo):
    """The oracle is the same model without it, adapted; in bf16, under torch's own autocast."""
    card, plain = any_card(llama()), llama()
    model = make().requires_grad_(requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=hasattr(model, "_original_forward")):
        before, expected = tokens(plain).float(), tokens(adapt(plain, card)).float()
    adapted = adapt(model, card, strict=True)
    assert torch.equal(tokens(adapted), expected)
    assert torch.equal(tokens(model), before)
    assert not torch.allclose(before, expected, atol=1e-2)
    calls = []
    for one in (adapted, model):
        linear = one.model.layers[0].self_attn.q_proj
        linear.register_forward_hook(lambda *_, one=one: calls.append(one))
    tokens(adapted)
    assert calls == [adapted]
    assert torch.equal(tokens(undo(adapted)), tokens(adapt(plain, card)))
    assert torch.equal(tokens(model), before)
    AcceleratorState._reset_state(reset_partial_state=True)


@requirement("R26.3", "R3.9")
def test_accelerates_hooks_on_the_copy_count_its_own_forwards():
    model = hooked()
    adapted = adapt(model, any_card(model))
    tokens(adapted)
    for module, other in zip(adapted.modules(), model.modules(), strict=True):
        for hook, original in zip(module._hf_hook.hooks, other._hf_hook.hooks, strict=True):
            assert set(hook.calls) <= {id(module)}
            assert original.calls == []
    assert adapted.lm_head._hf_hook.hooks[1].calls == [id(adapted.lm_head)]


def set_on(linear):
    linear.forward = lambda x: x
    return linear


NOT_CARRIED = {
    "offloaded": (
        lambda: accelerate.cpu_offload(llama(), execution_device="cpu"),
        r"'model\.layers\.0\..*in memory, found a meta tensor \(offloaded by AlignDevicesHook\)",
    ),
    "offloaded elsewhere": (
        lambda: accelerate.cpu_offload(llama(), execution_device="cpu").model.embed_tokens,
        r"module '' .*accelerate's AlignDevicesHook.*; load the model without offloading",
    ),
    "a prepared Linear": (
        lambda: accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(nn.Linear(32, 32)),
        r"'forward': expected a forward set .* class, found torch\.nn\.\S*Linear\.forward; ",
    ),
    "a function": (
        lambda: set_on(nn.Linear(32, 32)),
        r"found test_twins\.set_on\.<locals>\.<lambda>; delete it",
    ),
}


@requirement("R26.3", "R3.14")
@pytest.mark.parametrize(("make", "found"), NOT_CARRIED.values(), ids=NOT_CARRIED)
def test_what_can_not_be_carried_over_is_refused_by_the_name_of_what_set_it(make, found):
    AcceleratorState._reset_state(reset_partial_state=True)
    model = make()
    card = () if isinstance(model, nn.Embedding) else any_card(model)
    state = {key: id(value) for key, value in vars(model).items()}
    with pytest.raises(UnsupportedModelError, match=found):
        adapt(model, card)
    assert {key: id(value) for key, value in vars(model).items()} == state
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- saving


SAVING = {
    "save_pretrained": (llama, lambda model, path: model.save_pretrained(path)),
    "SentenceTransformer.save": (st_of, lambda model, path: model.save(str(path))),
    "SentenceTransformer.save_pretrained": (st_of, lambda model, path: model.save_pretrained(path)),
    "torch.save": (llama, lambda model, path: torch.save(model.state_dict(), path)),
    "a part": (llama, lambda model, path: torch.save(model.model.layers[0].state_dict(), path)),
    "safetensors": (llama, save_model),
}


@requirement("R3.16")
@pytest.mark.parametrize(("make", "save"), SAVING.values(), ids=SAVING)
def test_saving_an_adapted_model_warns_once_that_the_adapters_are_left_out(
    make, save, model_folder, tmp_path
):
    model = make(model_folder)
    adapted = adapt(model, any_card(model))
    for one in (adapted, adapt(adapted, ())):  # a model made from it warns on its own
        with pytest.warns(UnboundWarning, match=r"base alone.*lora\.fold.*lora\.save") as caught:
            save(one, str(tmp_path / "saved"))
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save(one, str(tmp_path / "saved"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plain in (model, adapt(model, ()), fold(adapted)):
            save(plain, str(tmp_path / "plain"))


@requirement("R3.16")
def test_what_libraries_do_with_a_state_dict_warns_not(tmp_path):
    model = llama()
    adapted = adapt(model, any_card(model))
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnboundWarning)
        accelerate.Accelerator(cpu=True).get_state_dict(adapted)
        get_model_state_dict(adapted)
        Trainer(adapted, arguments).save_model(str(tmp_path / "checkpoint"))
        copy.deepcopy(adapted).load_state_dict(model.state_dict())
        torch.save(adapted, tmp_path / "whole")


@requirement("R2.12", "R3.16")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_that_is_folded_and_saved_computes_what_pefts_merge_does(dtype, tmp_path):
    model = llama().to(dtype)
    card = any_card(model)
    export_peft(card, tmp_path / "card")
    folded = fold(adapt(model, card), narrow=True)
    folded.save_pretrained(tmp_path / "folded")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "folded", dtype=dtype)
    merged = PeftModel.from_pretrained(llama().to(dtype), tmp_path / "card").merge_and_unload()
    digits = torch.finfo(dtype).eps
    for name, parameter in merged.named_parameters():
        own = loaded.get_parameter(name)
        assert ((own - parameter).abs() <= digits * parameter.abs() + 1e-4 * digits).all(), name
    assert not torch.equal(tokens(loaded), tokens(model))


def with_delta(model, card, prefix=""):
    """The model with ΔW added to its own weights, by dense arithmetic."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for key, pair in card.weights.items():
            change = pair.scaling * (pair.A.astype(np.float64) @ pair.B.astype(np.float64)).T
            weight = model.get_submodule(prefix + key).weight
            weight += torch.from_numpy(change).to(weight.dtype)
    return model


def card_on(names, linear):
    rng = np.random.default_rng(0)
    shapes = (linear.in_features, 2), (2, linear.out_features)
    pairs = {name: LowRank(*(rng.normal(0, 0.3, shape) for shape in shapes)) for name in names}
    return LoRACard("docs", 2, 4.0, ["q_proj"], pairs)


@requirement("R3.15", "R3.11")
def test_a_text_models_card_binds_on_its_multimodal_wrapper_if_one_change_of_names_binds_it():
    text = llama().double()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    config = LlavaConfig(
        text_config=text.config, vision_config=CLIPVisionConfig(**vision), image_token_id=90
    )
    wrapper = LlavaForConditionalGeneration(config).double().eval()
    names = [f"layers.{index}.self_attn.q_proj" for index in range(2)]
    linear = text.model.layers[0].self_attn.q_proj
    with pytest.raises(TargetError, match=r"vision_tower.encoder.layers.0"):
        adapt(wrapper, card_on(names, linear))
    card = card_on([f"language_model.{name}" for name in names], linear)
    expected = with_delta(wrapper, card, "model.")(input_ids=IDS).logits
    assert (wrapper(input_ids=IDS).logits - expected).abs().max() > 1e-3
    of_text = card_on([f"model.{name}" for name in names], linear)
    for adapted in (adapt(wrapper, card, strict=True), adapt(wrapper, of_text, strict=True)):
        assert torch.allclose(adapted(input_ids=IDS).logits, expected, rtol=0, atol=1e-12)


@requirement("R2.12", "R3.9")
def test_an_adapted_model_generates_and_runs_in_a_parallel_wrapper_as_the_weights_plus_delta_do():
    model = llama().double()
    linear = model.model.layers[0].self_attn.q_proj
    card = card_on([f"model.layers.{index}.self_attn.q_proj" for index in range(2)], linear)
    expected, adapted = with_delta(model, card), adapt(model, card)
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(adapted.generate(IDS, **options), expected.generate(IDS, **options))
    logits = expected(input_ids=IDS).logits
    for wrapped in (nn.DataParallel(adapted), adapt(nn.DataParallel(model), card)):
        assert torch.allclose(wrapped(input_ids=IDS).logits, logits, rtol=0, atol=1e-12)
