"""adapt and its kin: one test for each way in which a copy could reach back to its original."""

import copy
import gc
import hashlib
import pickle
import threading
import weakref
from collections import Counter, OrderedDict, deque
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import lora
from lora.card import LoRACard, LowRank
from lora.errors import (
    ArgumentError,
    BaseModelError,
    StateError,
    TargetError,
    UnboundWarning,
    UnsupportedModelError,
)
from lora.models.adapt import (
    adapt,
    fingerprint,
    fold,
    init_card,
    injections,
    linears,
    trainable,
    trained_card,
    uncalled,
)
from lora.models.layers import LoRALinear, TrainableLinear
from lora.models.rows import RowLinear
from lora.testing.plugin import requirement

# Reading the state dict of an adapted model warns, which is tested on its own.
pytestmark = pytest.mark.filterwarnings("ignore:a state dict")

X = torch.arange(12.0).reshape(3, 4) / 10
PAIR = LowRank(np.full((4, 1), 0.5, np.float32), np.ones((1, 4), np.float32), 1.0)


def card(*modules, name="docs", pair=PAIR, **options):
    return LoRACard(name, pair.rank, 1.0, modules, dict.fromkeys(modules, pair), **options)


class Net(nn.Module):
    """A Linear, a norm with running statistics, dropout, and another Linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(OrderedDict(linear=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)))
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.drop(self.inner(x)))


@pytest.fixture
def model():
    return Net().eval()


@pytest.fixture
def adapted(model):
    return adapt(model, card("linear", "out"))


@pytest.fixture
def unchanged(model):
    """A call that checks that the model computes, holds and is what it was."""

    def flags_of():
        return [(n, p.requires_grad, p.dtype, p.data_ptr()) for n, p in model.named_parameters()]

    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags, out = flags_of(), model(X).detach()

    def check():
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert flags_of() == flags
        assert all(p.grad is None for p in model.parameters())
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(X), out)

    return check


class Scribe(nn.Module):
    """Writes a buffer, a tensor and an array of its own in each forward, and reads a buffer that
    another one shares.
    """

    def __init__(self, shared):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("shared", shared)
        self.last, self.sums, self.linear = torch.zeros(4), np.zeros(1), nn.Linear(4, 4)

    def forward(self, x):
        self.calls += 1
        self.shared += 1
        self.last.copy_(x[0])
        self.sums += 1
        return self.linear(x)


@requirement("R3.7", "R3.9")
def test_what_a_forward_writes_stays_in_the_copy():
    shared = torch.zeros(1)
    model = nn.Sequential(Scribe(shared), Scribe(shared))
    result = adapt(model, card("0.linear", "1.linear"))
    result(X)
    assert [int(part.calls) for part in result] == [1, 1]
    assert result[0].shared is result[1].shared
    assert int(result[0].shared) == 2
    for part in model:
        assert not any(held.any() for held in (part.calls, part.shared, part.last, part.sums))


@requirement("R3.9")
def test_hooks_of_the_original_fire_on_the_copy_and_are_removed_from_one(model):
    fired = []
    handle = model.out.register_forward_hook(lambda *_: fired.append(1))
    adapted = adapt(model, card("out"))
    handle.remove()
    model(X)
    assert fired == []
    adapted(X)
    assert fired == [1]


@requirement("R3.9", "R3.7")
def test_loading_into_a_copy_of_a_copy_reaches_neither(adapted, unchanged):
    before = adapted(X)
    second = adapt(adapted, card("out", name="law"))
    state = second.state_dict()
    second.load_state_dict({key: torch.full_like(tensor, 7) for key, tensor in state.items()})
    assert list(adapted.out.terms) == ["docs"]
    assert list(second.out.terms) == ["docs", "law"]
    assert torch.equal(adapted(X), before)
    unchanged()


@requirement("R3.9")
def test_hooks_that_are_given_their_module_are_given_the_copy(model):
    given = []
    model.out.register_load_state_dict_pre_hook(lambda module, *_: given.append(module))
    adapted = adapt(model, card("out"))
    adapted.load_state_dict(adapted.state_dict())
    assert given == [adapted.out]


class Point(NamedTuple):
    """A tuple with named fields."""

    x: list
    y: torch.Tensor


@requirement("R3.9")
def test_containers_of_every_kind_are_copied_and_keep_their_kind(model):
    tensor = torch.zeros(2)
    model.things = {
        "tuple": ([1], tensor),
        "named": Point([1], tensor),
        "counter": Counter(a=2),
        "queue": deque([[1]], maxlen=3),
        "set": {1},
        "ordered": OrderedDict(a=[1]),
    }
    twin = adapt(model, card("out")).things
    assert twin["counter"] == Counter(a=2)
    assert (type(twin["named"]), type(twin["ordered"])) == (Point, OrderedDict)
    assert twin["queue"].maxlen == 3
    assert twin["tuple"][1] is twin["named"][1] is not tensor
    for values in (twin["tuple"][0], twin["named"].x, twin["queue"][0]):
        values.append(2)
    twin["set"].add(2)
    twin["counter"]["a"] += 1
    assert model.things["tuple"][0] == model.things["named"].x == model.things["queue"][0] == [1]
    assert (model.things["set"], model.things["counter"]) == ({1}, Counter(a=2))


@requirement("R3.9")
def test_a_container_that_holds_itself_does_too_in_the_copy(model):
    model.loop = [1]
    model.loop.append(model.loop)
    twin = adapt(model, card("out")).loop
    assert twin[1] is twin is not model.loop


class Writer(nn.Module):
    """Leaves a number where others can read it."""

    def __init__(self, board):
        super().__init__()
        self.board = board

    def forward(self, x):
        self.board["seen"] = x.sum()
        return x


class Reader(Writer):
    """Adds the number that it finds."""

    def forward(self, x):
        return x + self.board["seen"]


@requirement("R3.9")
def test_modules_that_talk_through_one_dictionary_still_do_in_the_copy():
    board = {}
    model = nn.Sequential(Writer(board), nn.Linear(4, 4), Reader(board))
    adapted = adapt(model, card("1"))
    adapted(X)
    assert board == {}
    assert adapted[0].board is adapted[2].board


@requirement("R3.9")
def test_one_module_under_two_names_stays_one_and_binds_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    adapted = adapt(model, LoRACard("docs", 1, 1.0, ["b.0"], {"a": PAIR}))
    assert adapted["a"] is adapted["b"][0]
    assert isinstance(adapted["a"], LoRALinear)
    assert list(linears(model)) == ["a", "b.0"]


@requirement("R3.9")
def test_one_parameter_in_two_modules_stays_one():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    adapted = adapt(model, card("a"))
    assert adapted["a"].weight is adapted["b"].weight
    folded = fold(adapted)
    assert folded["b"].weight.data_ptr() == model["b"].weight.data_ptr()
    assert folded["a"].weight.data_ptr() != model["b"].weight.data_ptr()


@requirement("R3.9")
def test_a_root_that_is_itself_a_linear_is_adapted():
    root = nn.Linear(4, 4)
    for targets in ([""], ["all-linear"]):
        adapted = adapt(root, LoRACard("docs", 1, 1.0, targets, {"": PAIR}))
        assert isinstance(adapted, LoRALinear)
        assert torch.equal(adapted(X), LoRALinear(root, {"docs": (PAIR, 1.0)})(X))
    assert type(root) is nn.Linear


@requirement("R3.9")
def test_an_lstm_computes_the_same_and_keeps_its_weights():
    model = nn.Sequential(OrderedDict(rnn=nn.LSTM(4, 4, batch_first=True)))
    want, flat = model(X[None])[0], list(model.rnn._flat_weights)
    adapted = adapt(model, ())
    assert torch.equal(adapted(X[None])[0], want)
    assert all(any(w is p for p in adapted.parameters()) for w in adapted.rnn._flat_weights)
    adapted.double()
    adapted(X[None].double())
    assert list(map(id, model.rnn._flat_weights)) == list(map(id, flat))
    assert {weight.dtype for weight in flat} == {torch.float32}
    assert torch.equal(model(X[None])[0], want)


@requirement("R3.9")
@pytest.mark.parametrize("filled", [True, False])
def test_lists_and_dictionaries_of_parameters_are_the_copys_own(filled):
    model = nn.Module()
    model.items = nn.ParameterList([torch.ones(2)] if filled else [])
    model.named = nn.ParameterDict({"a": torch.ones(2)} if filled else {})
    adapted = adapt(model, ())
    adapted.items.append(torch.zeros(1))
    adapted.named["b"] = torch.zeros(1)
    assert (len(model.items), list(model.named)) == (int(filled), ["a"] if filled else [])
    if filled:
        assert adapted.items[0].data_ptr() == model.items[0].data_ptr()
        assert adapted.items[0] is not model.items[0]


@requirement("R3.9")
@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],  # noqa: S301
    ids=["deepcopy", "pickle"],
)
def test_an_adapted_model_can_be_copied_whole(adapted, unchanged, way):
    twin = way(adapted)
    assert torch.equal(twin(X), adapted(X))
    state = twin.state_dict()
    twin.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in state.items()})
    assert adapted.out.weight.any()
    unchanged()


# ---- what is refused


class Outside(nn.Module):
    """Runs whatever it was given, and has a method."""

    def __init__(self, value=None):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kept, self.call = value, None

    def forward(self, x):
        return self.call(self.kept, x) if self.call else self.linear(x)

    def method(self, x):
        return self.linear(x)

    def hook(self, module, inputs, output):
        self.kept.append(output)


def own_method():
    model = Outside()
    model.kept = model.method
    return model


def bound_forward():
    model = Outside()
    model.kept = model.linear.forward
    return model


def closure():
    model = Outside()
    again = [model.linear]

    def run(x, times=1):
        return again[0](x) if times == 0 else run(x, times - 1)

    model.kept = run
    return model


def slots():
    model = Outside(Slotted())
    model.kept.inside = model.linear
    return model


def by(wrap):
    """A model that keeps something made from its Linear, and calls it."""
    model = Outside()
    model.kept = wrap(model.linear)
    return model


def first(kept, x):
    return next(iter(kept))(x)


CARRIED = {
    "a list": (lambda: by(lambda m: [m]), first),
    "a list of lists": (lambda: by(lambda m: [[m]]), lambda kept, x: kept[0][0](x)),
    "a tuple in a dictionary": (lambda: by(lambda m: {"a": (1, m)}), lambda k, x: k["a"][1](x)),
    "a set": (lambda: by(lambda m: {m}), first),
    "a frozen set": (lambda: by(lambda m: frozenset([m])), first),
    "a dictionary's keys": (lambda: by(lambda m: {m: 1}), first),
    "a queue": (lambda: by(lambda m: deque([m], maxlen=2)), first),
    "a method of the model": (own_method, lambda kept, x: kept(x)),
    "the forward of an adapted layer": (bound_forward, lambda kept, x: kept(x)),
    "an argument of a partial": (lambda: by(partial(partial, run_it)), lambda kept, x: kept(x)),
    "a closure": (closure, lambda kept, x: kept(x)),
    "a default of a function": (
        lambda: by(lambda m: lambda x, run=m: run(x)),
        lambda kept, x: kept(x),
    ),
    "a method of a list": (lambda: by(lambda m: [m].__getitem__), lambda kept, x: kept(0)(x)),
    "an object": (lambda: by(lambda m: SimpleNamespace(a=m)), lambda kept, x: kept.a(x)),
    "an object with slots": (slots, lambda kept, x: kept.inside(x)),
    "an object with a deepcopy of its own": (
        lambda: by(CopiedItsWay),
        lambda kept, x: kept.inside(x),
    ),
}


def run_it(linear, x):
    return linear(x)


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("inside",)


class CopiedItsWay:
    """An object whose copies share what it holds."""

    def __init__(self, inside):
        self.inside = inside

    def __deepcopy__(self, memo):
        return CopiedItsWay(self.inside)


@requirement("R3.9", "R3.14")
@pytest.mark.parametrize(("make", "call"), CARRIED.values(), ids=CARRIED)
def test_what_leads_to_a_module_leads_to_its_twin_in_the_result(make, call):
    model = make()
    model.call = call
    before = model(X)
    result = adapt(model, card("linear"))
    want = before + X @ torch.tensor(PAIR.A) @ torch.tensor(PAIR.B)
    assert torch.allclose(result(X), want)
    assert uncalled(result, X) == ()
    result.linear.bias = nn.Parameter(torch.ones(4))
    assert torch.equal(result(X), result.linear(X))
    assert torch.equal(model(X), before)


@requirement("R3.9")
def test_a_hook_that_is_a_method_is_the_twins_and_its_handle_removes_it_there():
    model = Outside([])
    model.handle = model.linear.register_forward_hook(model.hook)
    result = adapt(model, card("linear"))
    result(X)
    assert (len(model.kept), len(result.kept)) == (0, 1)
    result.handle.remove()
    result(X)
    model(X)
    assert (len(model.kept), len(result.kept)) == (1, 1)


@requirement("R3.9")
def test_an_own_deepcopy_of_a_module_is_not_asked():
    class Itself(Outside):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(Itself())
    assert adapt(model, card("linear"))[0] is not model[0]


class Marked(nn.Parameter):
    """A class of parameters, as libraries for quantised weights have them."""


@requirement("R3.9", "R3.14")
def test_the_class_and_the_attributes_of_parameters_are_carried_over(model):
    model.out.weight = Marked(model.out.weight.detach())
    model.out.weight.note = ["made by hand"]
    twin = adapt(model, card("linear")).out.weight
    assert (type(twin), twin.data_ptr()) == (Marked, model.out.weight.data_ptr())
    assert (twin.note, twin.requires_grad) == (["made by hand"], False)
    assert twin.note is not model.out.weight.note
    adapted = adapt(model, card("out"))
    assert (type(adapted.out.weight), type(fold(adapted).out.weight)) == (Marked, nn.Parameter)
    assert torch.allclose(fold(adapted)(X), adapted(X))


def class_attribute(holder=object):
    return type("Holder", (holder,), {"shared": [nn.Linear(4, 4)]})


def weakly_held():
    model = Outside()
    model.kept = [weakref.ref(model.linear)]
    return model


class Uncopyable:
    """An object that refuses to be copied, and holds something."""

    def __init__(self, inside):
        self.inside = inside

    def __reduce_ex__(self, protocol):
        raise TypeError


class Single(Uncopyable):
    """An object that copies itself as the one of its name, as an enumeration does."""

    def __reduce_ex__(self, protocol):
        return "SINGLE"


def through_a_global(run):
    GLOBAL_MODEL.kept = run
    return GLOBAL_MODEL


GLOBAL_MODEL = Outside()
GLOBAL = GLOBAL_MODEL.linear
REFUSED = {
    "a weak reference": (weakly_held, "'kept'.* a weak reference"),
    "an iterator": (lambda: Outside(m for m in [GLOBAL]), "'kept'.*can't be copied .generator"),
    "an uncopyable object": (lambda: Outside(Uncopyable(GLOBAL)), "'kept'.*Uncopyable"),
    "a singleton": (lambda: Outside({"a": Single([GLOBAL])}), "'kept'.*Single"),
    "the class of an object": (lambda: Outside(class_attribute()()), "'kept'.*'shared' of Holder"),
    "its own class": (class_attribute(Outside), "Holder.*'shared' of Holder"),
    "a global of a function": (
        lambda: through_a_global(lambda x: 2 * GLOBAL(x)),
        "'kept'.*global 'GLOBAL'",
    ),
    "a global of a function within": (
        lambda: through_a_global(lambda x: sum(GLOBAL(row) for row in x)),
        "'kept'.*global 'GLOBAL'",
    ),
    "a lazy layer": (lambda: Outside(nn.LazyLinear(4)), "kept.*run it once"),
}


@requirement("R3.14")
@pytest.mark.parametrize(("make", "found"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_copy_could_not_make_independent_is_refused_by_name(make, found, nested):
    model = nn.Sequential(make()) if nested else make()
    with pytest.raises(UnsupportedModelError, match=found) as caught:
        adapt(model, ())
    assert not nested or "module '0" in str(caught.value)


@requirement("R3.9")
def test_what_can_not_be_copied_and_leads_to_no_module_is_shared(model):
    model.lock, model.counter = threading.Lock(), Uncopyable(3)
    adapted = adapt(model, card("out"))
    assert (adapted.lock, adapted.counter) == (model.lock, model.counter)


@requirement("R3.14")
def test_objects_that_are_nested_too_deeply_are_refused(model):
    for _ in range(3000):
        model.chain = [getattr(model, "chain", None)]
    with pytest.raises(UnsupportedModelError, match="nested less deeply"):
        adapt(model, ())


COMPILED = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "compile": lambda model: model.compile(backend="eager") or model,
    "a layer": lambda model: model.out.compile(backend="eager") or model,
    "a forward": lambda model: (
        vars(model.out).update(forward=torch.compile(model.out.forward, backend="eager")) or model
    ),
}


@requirement("R26.3", "R3.9")
@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_what_was_compiled_is_compiled_again_for_the_copy(model, adapted, compiled):
    want, before = adapted(X), model(X)
    model = compiled(model.requires_grad_(requires_grad=False))
    result = adapt(model, card("linear", "out"))
    assert type(result) is type(model)
    result.register_forward_hook(lambda module, inputs, output: output + 1)
    for _ in range(2):
        assert torch.allclose(result(X), want + 1)
        assert torch.allclose(model(X), before)


@requirement("R3.14")
def test_a_traced_model_is_refused_by_its_name(model):
    with pytest.raises(UnsupportedModelError, match="GraphModule"):
        adapt(torch.fx.symbolic_trace(model), card("out"))


@requirement("R3.14")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_script_module_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"module '1' .*ScriptModule"):
        adapt(nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))), card("0"))


@requirement("R3.14")
def test_functions_and_values_that_lead_to_no_module_are_fine(model):
    model.plain = [print, partial(sorted, key=len), lambda x, y=3: (x, y, X)]
    model.plain += [{"a": (1, "b")}, "text".upper]
    assert torch.equal(adapt(model, ())(X), model(X))


# ---- layers that a forward never calls


@requirement("R3.14", "R3.12")
def test_the_output_projection_of_torchs_attention_is_reported():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.out = nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.attention(x, x, x)[0])

    model = Attending().eval()
    both = card("out_proj", "out")
    assert injections(model, both)["docs"].bypassed == ("attention.out_proj",)
    with pytest.warns(UnboundWarning, match=r"may never be called .* 'attention\.out_proj'"):
        adapted = adapt(model, both, strict=True)
    assert uncalled(adapted, X[None]) == ("attention.out_proj",)
    assert not any(module._forward_hooks for module in adapted.modules())


@requirement("R3.14")
def test_the_linears_of_torchs_fused_encoder_layer_are_reported():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=4, batch_first=True).eval()
    model = nn.Sequential(OrderedDict(block=layer, out=nn.Linear(4, 4))).requires_grad_(False)
    all_three = card("linear1", "linear2", "out")
    assert injections(model, all_three)["docs"].bypassed == ("block.linear1", "block.linear2")
    with pytest.warns(UnboundWarning, match=r"'block\.linear1', 'block\.linear2'$"):
        adapted = adapt(model, all_three)
    assert uncalled(adapted, X[None]) == ("block.linear1", "block.linear2")
    assert uncalled(adapted.train(), X[None]) == ()
    assert torch.equal(adapted.eval().block(X[None]), model.block(X[None]))


@requirement("R3.14")
def test_a_linear_deep_inside_torchs_attention_is_reported_too():
    attention = nn.MultiheadAttention(4, 2)
    attention.extra = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    model = nn.ModuleDict({"attention": attention, "beside": nn.Sequential(nn.Linear(4, 4))})
    reached = card("attention.extra.0.0", "beside.0")
    assert injections(model, reached)["docs"].bypassed == ("attention.extra.0.0",)


@requirement("R3.14")
def test_layers_that_are_called_are_not_reported(model, adapted):
    assert injections(model, card("linear", "out"))["docs"].bypassed == ()
    assert uncalled(adapted, X) == ()


# ---- cards that bind nothing, or in part


@requirement("R3.12", "R7.3")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "apply",
    [adapt, lambda model, card, **options: adapt(model, [PRESENT, card], **options)],
    ids=["alone", "beside another"],
)
def test_a_card_that_binds_nothing_is_refused_by_name(model, unchanged, apply, strict):
    with pytest.raises(TargetError, match=r"card 'lost': .*'model\.query'") as caught:
        apply(model, card("model.query", name="lost"), strict=strict)
    assert strict or "the Linears of the model are 'inner.linear', 'out'" in str(caught.value)
    unchanged()


PRESENT = card("out")


@requirement("R3.12")
def test_what_can_not_be_applied_can_not_be_trained_or_run_for_rows_but_be_reported(model):
    for lost in (card("model.query"), LoRACard("docs", 1, 1.0, [], {"out": PAIR})):
        for use in (lambda lost: trainable(model, lost), lambda lost: rows_of(model, lost)):
            with pytest.raises(TargetError, match="card 'docs': expected a Linear of the model"):
                use(lost)
        report = injections(model, lost)["docs"]
        assert (dict(report.bound), report.weights_not_used) == ({}, tuple(lost.weights))


@requirement("R2.8", "R5.8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 400])  # rows side by side; W + ΔW for the call
@pytest.mark.parametrize("way", ["factored", "folded", "rows"])
def test_a_forward_stays_on_the_device_of_its_input(dtype, tokens, way):
    """On meta, which computes nothing, whatever mixes devices or asks for a value raises."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).to(dtype).eval()
    skill = card("0", "2")
    adapted = rows_of(model, skill, {}, skill) if way == "rows" else adapt(model, skill)
    adapted = (fold(adapted, narrow=True) if way == "folded" else adapted).to("meta")
    x = torch.zeros(3, tokens, 4, device="meta", dtype=dtype)
    with torch.inference_mode(), lora.rows([0, 1, 2] if way == "rows" else []):
        out = adapted(x)
    assert (out.device.type, out.dtype, out.shape) == ("meta", dtype, x.shape)


def rows_of(model, *adapters):
    return lora.adapt_rows(model, adapters, probe=False)


@requirement("R3.12", "R7.3")
def test_a_card_that_binds_in_part_gives_one_warning_that_names_what_is_left(model):
    half = LoRACard("half", 1, 1.0, ["out", "value"], {"out": PAIR, "elsewhere": PAIR})
    with pytest.warns(UnboundWarning) as caught:
        adapted = adapt(model, [half, PRESENT])
    (warning,) = caught
    assert str(warning.message) == (
        "card 'half' takes effect in part: targets not found: 'value'; "
        "weights not used: 'elsewhere'"
    )
    assert warning.filename == __file__
    assert list(adapted.out.terms) == ["docs", "half"]
    with pytest.raises(TargetError, match=r"'half'.*'value'.*'elsewhere'"):
        adapt(model, half, strict=True)
    with pytest.raises(TargetError, match="'lost'"):  # and no warning, which would be an error here
        adapt(model, [half, card("model.query", name="lost")])
    with pytest.warns(UnboundWarning) as caught:
        rows_of(model, half, half, PRESENT)
    assert len(caught) == 1


@requirement("R1.13")
def test_a_fingerprint_of_modules_that_the_model_lacks_names_these_and_not_the_base(model):
    whole = nn.ModuleDict({"net": model, "expert": nn.Linear(4, 4)})
    made_for = fingerprint(whole, card("out", "expert"))
    marked = card("out", "expert", base_fingerprint=made_for)
    adapt(whole, marked)
    with pytest.raises(TargetError, match=r"none for 1: 'expert'; check_base=False") as caught:
        adapt(model, marked)
    assert "base model" not in str(caught.value)
    with pytest.warns(UnboundWarning, match="'expert'"):
        adapt(model, marked, check_base=False)


# ---- bases, conflicts, rows, training


@requirement("R1.13")
def test_a_card_for_other_weights_is_refused_unless_that_is_waived(model):
    made_for = fingerprint(model, card("out"))
    marked = card("out", base_model="net", base_fingerprint=made_for)
    assert isinstance(adapt(model, marked).out, LoRALinear)
    model.out.weight.data[0, 0] += 1
    expected = r"card 'docs': base model net: expected weights with fingerprint .* check_base=False"
    with pytest.raises(BaseModelError, match=expected):
        adapt(model, marked)
    assert isinstance(adapt(model, marked, check_base=False).out, LoRALinear)


@requirement("R1.13")
def test_a_fingerprint_goes_through_the_weights_by_the_names_that_the_card_has_for_them():
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    model = nn.ModuleDict({"a": nn.ModuleDict({"z": first}), "b": nn.ModuleDict({"y": second})})
    pair = LowRank(np.ones((2, 1), np.float32), np.ones((1, 3), np.float32), 1.0)
    sha = hashlib.sha256()
    for key, linear in (("y", second), ("z", first)):
        sha.update(f"{key}\0float32\0(3, 2)\0".encode() + linear.weight.detach().numpy().tobytes())
    assert fingerprint(model, card("z", "y", pair=pair)) == sha.hexdigest()


@requirement("R1.13")
def test_an_adapted_model_has_the_fingerprint_of_its_base_and_a_folded_one_has_not(model, adapted):
    out = card("out")
    assert fingerprint(adapted, out) == fingerprint(model, out) != fingerprint(fold(adapted), out)
    with pytest.raises(TargetError, match="none for 1: 'elsewhere'"):
        fingerprint(model, card("out", "elsewhere"))


@requirement("R2.10")
def test_an_untrained_card_is_decided_by_its_seed(model):
    shape = {"rank": 2, "alpha": 4.0, "target_modules": ["out"]}
    one, again, other = (init_card(model, "docs", **shape, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    assert not one.weights["out"].B.any()
    with pytest.raises(TargetError, match=r"modules that match \['nowhere'\], found none"):
        init_card(model, "docs", rank=2, alpha=4.0, target_modules=["nowhere"], seed=0)
    with pytest.raises(ArgumentError, match="init_card: seed: expected an integer >= 0"):
        init_card(model, "docs", **shape, seed=-1)


@requirement("R2.12")
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_a_narrow_layer_folds_on_request_with_one_rounding(dtype, bits):
    """Against float64: half a unit in the last place, and what float32 adds to it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    before = copy.deepcopy(model.state_dict())
    rng = np.random.default_rng(0)
    factors = (rng.normal(size=shape).astype(np.float32) / 10 for shape in ((64, 8), (8, 64)))
    adapted = adapt(model, card("0", pair=LowRank(*factors, 1.5)))
    with pytest.warns(UnboundWarning, match=r"fold: 1 of 1 .* narrow=True"):
        assert isinstance(fold(adapted)[0], LoRALinear)
    folded = fold(adapted, narrow=True)
    assert (type(folded[0]), folded[0].weight.dtype) == (nn.Linear, dtype)
    pair = adapted[0].terms["docs"][0]
    update = torch.tensor(pair.A.astype(np.float64) @ pair.B.astype(np.float64)).T * 1.5
    exact = before["0.weight"].double() + update
    unit = 2.0 ** (exact.abs().log2().floor() - bits + 1)
    assert ((folded[0].weight.double() - exact).abs() <= 0.5001 * unit + 1e-7).all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@requirement("R2.8", "R3.14")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_follow_the_device_and_the_dtype_of_their_layer(dtype):
    base, terms = nn.Linear(4, 4, device="meta", dtype=dtype), {"docs": (PAIR, 1.0)}
    trained, rowwise = TrainableLinear(base, PAIR), RowLinear(base, [terms, {}])
    inference = [*LoRALinear(base, terms).buffers(), *rowwise.buffers()]
    assert {(t.device.type, t.dtype) for t in inference} == {("meta", dtype)}
    factors = trained.lora_A, trained.lora_B
    assert {(t.device.type, t.dtype) for t in factors} == {("meta", torch.float32)}
    for use in (adapt, trainable, rows_of):  # a model's factors would be lost there
        with pytest.raises(UnsupportedModelError, match="'0': expected a weight in memory"):
            use(nn.Sequential(base), card("0"))


@requirement("R2.7")
def test_an_adapted_layer_is_not_trained(adapted):
    with pytest.raises(UnsupportedModelError, match="plain Linears to train on"):
        trainable(adapted, card("out", name="law"))


@requirement("R2.7", "R2.8")
def test_a_trainable_model_has_only_the_cards_factors_to_train(model, unchanged):
    training = trainable(model, card("linear", "out"), dropout=0.1)
    names = [name for name, parameter in training.named_parameters() if parameter.requires_grad]
    assert names == ["inner.linear.lora_A", "inner.linear.lora_B", "out.lora_A", "out.lora_B"]
    assert isinstance(training.out, TrainableLinear)
    assert training.out.dropout == 0.1
    training(X).sum().backward()
    unchanged()
    assert trained_card(training, card("linear", "out")) == card("linear", "out")


@requirement("R2.8", "R7.8")
def test_a_model_that_was_not_made_trainable_has_nothing_to_give_back(adapted):
    expected = "expected a layer made trainable from this card, found LoRALinear"
    with pytest.raises(StateError, match=expected):
        trained_card(adapted, card("out"))


@requirement("R6.6")
def test_a_copy_that_nobody_holds_is_freed_at_once_and_not_by_the_collector():
    gc.disable()
    try:
        adapted = weakref.ref(adapt(Net(), card("inner.linear"), check_base=False))
        assert adapted() is None
    finally:
        gc.enable()
