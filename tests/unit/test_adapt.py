"""adapt and its kin: one test for each way in which a copy could reach back to its original."""

import copy
import pickle
from collections import Counter, OrderedDict, deque
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from lora.card import AdapterSet, LoRACard, LowRank
from lora.errors import (
    BaseModelError,
    StateError,
    TargetError,
    UnboundWarning,
    UnsupportedModelError,
)
from lora.models.adapt import (
    adapt,
    adapt_rows,
    fingerprint,
    fold,
    folded_bytes,
    init_card,
    injections,
    linears,
    trainable,
    trained_card,
    uncalled,
)
from lora.models.layers import LoRALinear, TrainableLinear
from lora.testing.plugin import requirement

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
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = [(name, p.requires_grad, p.dtype, p.data_ptr()) for name, p in model.named_parameters()]
    out = model(X).detach()

    def check():
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert [
            (name, p.requires_grad, p.dtype, p.data_ptr()) for name, p in model.named_parameters()
        ] == flags
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
def test_hooks_of_the_original_fire_on_the_copy_and_a_removed_one_only_on_what_it_was_removed_from(
    model,
):
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
    second.load_state_dict(
        {key: torch.full_like(tensor, 7) for key, tensor in second.state_dict().items()}
    )
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
    assert (type(twin["named"]), twin["queue"].maxlen, type(twin["ordered"])) == (
        Point,
        3,
        OrderedDict,
    )
    assert twin["tuple"][1] is twin["named"][1] is not tensor
    for key, value in (
        ("tuple", twin["tuple"][0]),
        ("named", twin["named"].x),
        ("queue", twin["queue"][0]),
    ):
        value.append(key)
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
    assert (
        folded["b"].weight.data_ptr()
        == model["b"].weight.data_ptr()
        != folded["a"].weight.data_ptr()
    )


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
    assert all(
        a is b and a.dtype == torch.float32
        for a, b in zip(model.rnn._flat_weights, flat, strict=True)
    )
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
    twin.load_state_dict(
        {key: torch.zeros_like(tensor) for key, tensor in twin.state_dict().items()}
    )
    assert adapted.out.weight.any()
    unchanged()


# ---- what is refused


class Outside(nn.Module):
    """Runs whatever it was given, and has a method."""

    def __init__(self, value=None):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kept = value

    def forward(self, x):
        return self.linear(x)

    def method(self, x):
        return x


def instance_forward():
    model = Outside()
    model.forward = lambda x: x
    return model


def own_method():
    model = Outside()
    model.kept = model.method
    return model


def closure():
    model = Outside()
    model.kept = lambda x: model.linear(x) + 1
    return model


def default():
    linear = nn.Linear(4, 4)
    return Outside(lambda x, run=linear: run(x))


def bound_hook():
    model = Outside()
    model.linear.register_forward_hook(model.method)
    return model


REFUSED = {
    "a forward on the instance": (instance_forward, "a forward set on the instance"),
    "a list": (lambda: Outside([nn.Linear(4, 4)]), "'kept'"),
    "a list of lists": (lambda: Outside([[nn.Linear(4, 4)]]), "'kept'"),
    "a dictionary of tuples": (lambda: Outside({"a": (1, nn.Linear(4, 4))}), "'kept'"),
    "a set": (lambda: Outside({nn.Linear(4, 4)}), "'kept'"),
    "a dictionary's keys": (lambda: Outside({nn.Linear(4, 4): 1}), "'kept'"),
    "a bound method": (own_method, "'kept'"),
    "a partial of a bound method": (lambda: Outside(partial(Outside().method)), "'kept'"),
    "an argument of a partial": (lambda: Outside(partial(print, nn.Linear(4, 4))), "'kept'"),
    "a closure": (closure, "'kept'"),
    "a default of a function": (default, "'kept'"),
    "a hook that is a bound method": (bound_hook, "'_forward_hooks'"),
}


@requirement("R3.14")
@pytest.mark.parametrize(("make", "found"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_copy_could_not_make_independent_is_refused_by_name(make, found, nested):
    model = nn.Sequential(make()) if nested else make()
    with pytest.raises(UnsupportedModelError, match=found) as caught:
        adapt(model, card("linear"))
    assert not nested or "module '0" in str(caught.value)


@requirement("R3.14")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_script_module_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"module '1' .*ScriptModule"):
        adapt(nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))), card("0"))


class Doubled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@requirement("R3.14")
def test_a_linear_that_is_more_than_a_linear_is_refused_where_a_card_binds_and_kept_elsewhere():
    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4))
    expected = r"module '0': expected a Linear with nn\.Linear's own forward"
    with pytest.raises(UnsupportedModelError, match=expected):
        adapt(model, card("0"))
    assert torch.equal(adapt(model, card("1"))[0](X), model[0](X))


@requirement("R3.14")
def test_functions_and_values_that_lead_to_no_module_are_fine(model):
    model.plain = [
        print,
        partial(sorted, key=len),
        lambda x, y=3: (x, y, X),
        {"a": (1, "b")},
        "text".upper,
    ]
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
def test_a_card_that_binds_nothing_is_refused_by_name_and_nothing_is_adapted(
    model, unchanged, apply, strict
):
    with pytest.raises(TargetError, match=r"card 'lost': .*'model\.out'") as caught:
        apply(model, card("model.out", name="lost"), strict=strict)
    assert strict or "the Linears of the model are 'inner.linear', 'out'" in str(caught.value)
    unchanged()


PRESENT = card("out")


@requirement("R3.12")
def test_what_can_not_be_applied_can_not_be_trained_or_run_for_rows_but_be_reported(model):
    for lost in (card("model.out"), LoRACard("docs", 1, 1.0, [], {"out": PAIR})):
        for use in (lambda lost: trainable(model, lost), lambda lost: rows_of(model, lost)):
            with pytest.raises(TargetError, match="card 'docs': expected a Linear of the model"):
                use(lost)
        report = injections(model, lost)["docs"]
        assert (dict(report.bound), report.weights_not_used) == ({}, tuple(lost.weights))


def rows_of(model, *adapters):
    return adapt_rows(model, [AdapterSet(cards) for cards in adapters])


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
        adapt(model, [half, card("model.out", name="lost")])
    with pytest.warns(UnboundWarning) as caught:
        rows_of(model, half, half, PRESENT)
    assert len(caught) == 1


@requirement("R1.13", "R7.10")
def test_a_fingerprint_of_modules_that_the_model_lacks_names_these_and_not_the_base(model):
    whole = nn.ModuleDict({"net": model, "expert": nn.Linear(4, 4)})
    mine = card("out", "expert")
    marked = card("out", "expert", base_fingerprint=fingerprint(whole, mine))
    adapt(whole, marked)
    with pytest.raises(TargetError, match=r"none for 1: 'expert'; check_base=False") as caught:
        adapt(model, marked)
    assert "base model" not in str(caught.value)
    with pytest.warns(UnboundWarning, match="'expert'"):
        adapt(model, marked, check_base=False)


# ---- bases, conflicts, rows, training


@requirement("R1.13")
def test_a_card_for_other_weights_is_refused_unless_that_is_waived(model):
    mine = card("out")
    marked = card("out", base_model="net", base_fingerprint=fingerprint(model, mine))
    assert isinstance(adapt(model, marked).out, LoRALinear)
    model.out.weight.data[0, 0] += 1
    with pytest.raises(
        BaseModelError,
        match=r"card 'docs': base model net: expected weights with fingerprint .* check_base=False",
    ):
        adapt(model, marked)
    assert isinstance(adapt(model, marked, check_base=False).out, LoRALinear)


@requirement("R1.13")
def test_an_adapted_model_has_the_fingerprint_of_its_base_and_a_folded_one_has_not(model, adapted):
    mine = card("out")
    assert (
        fingerprint(adapted, mine) == fingerprint(model, mine) != fingerprint(fold(adapted), mine)
    )


@requirement("R2.10")
def test_an_untrained_card_is_decided_by_its_seed(model):
    shape = {"rank": 2, "alpha": 4.0, "target_modules": ["out"]}
    one, again, other = (init_card(model, "docs", **shape, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    assert not one.weights["out"].B.any()
    with pytest.raises(TargetError, match=r"modules that match \['nowhere'\], found none"):
        init_card(model, "docs", rank=2, alpha=4.0, target_modules=["nowhere"], seed=0)


@requirement("R2.12")
def test_the_bytes_of_a_folded_model_are_those_of_its_touched_weights(model, adapted):
    assert folded_bytes(model) == 0
    assert folded_bytes(adapted) == 2 * 4 * 4 * 4
    assert folded_bytes(adapt(model.half(), card("out"))) == 0


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
    with pytest.raises(
        StateError, match="expected a layer made trainable from this card, found LoRALinear"
    ):
        trained_card(adapted, card("out"))
