"""R3: which modules a card reaches, a rewrite that never touches its input, a manager in a known
state at any time.
"""

import contextlib
import itertools
import warnings
from collections import OrderedDict, deque
from types import MappingProxyType
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

from lora.card import AdapterSet, LoRACard, LowRank
from lora.errors import (
    ConflictError,
    LoRAError,
    ShapeError,
    StateError,
    TargetError,
    UnboundWarning,
    UnknownCardError,
)
from lora.models import manager as manager_module
from lora.models.adapt import adapt, fold
from lora.models.layers import LoRALinear
from lora.models.manager import HISTORY, LoRAManager
from lora.targets import Site, match_targets, matches, plan, targeted_modules
from lora.testing.binding import PlainCard, PlainPair
from lora.testing.plugin import requirement

# Reading the state dict of an adapted model warns, which is tested on its own.
pytestmark = pytest.mark.filterwarnings("ignore:a state dict")

WIDTH = 3

# ---- through the binding: which modules a card reaches

words = st.sampled_from(
    ["1", "11", "query", "xquery", "1-query", "q|y", "que*", "value", "layer", "Query", "lm_head"]
)
dotted = st.lists(words, min_size=1, max_size=3).map(".".join)
module_lists = st.lists(dotted, min_size=1, max_size=6, unique=True)


def fits(name, key):
    """The rule, read component by component."""
    parts, wanted = name.split("."), key.split(".")
    return parts[-len(wanted) :] == wanted


def targeted(name, targets):
    return any(
        fits(name, target) or (target == "all-linear" and "lm_head" not in name.split("."))
        for target in targets
    )


@st.composite
def names_and_keys(draw, extra=()):
    """Module names, and keys that are names, suffixes of names, or names of nothing."""
    names = draw(module_lists)
    suffixes = [
        ".".join(name.split(".")[start:]) for name in names for start in range(name.count(".") + 1)
    ]
    return names, draw(
        st.lists(st.sampled_from([*suffixes, *extra]) | dotted, max_size=4, unique=True)
    )


@requirement("R3.11", kind="convention")
@given(drawn=names_and_keys(extra=["all-linear", "uery", ""]))
def test_a_target_matches_the_names_that_end_with_it_at_a_dot(impl, drawn):
    names, targets = drawn
    assert impl.match_targets(names, targets) == [name for name in names if targeted(name, targets)]
    assert impl.match_targets(names, []) == []


HEADS = "lm_head embed_out output_projection cls classifier score qa_outputs logits head".split()
"""Output heads, as the specification's note on R3.11 lists them."""


@requirement("R3.11", kind="convention")
@given(
    names=st.lists(
        st.lists(
            st.sampled_from(
                [*HEADS, "0", "query", "heads", "xhead", "q_head", "Score", "lm_head2"]
            ),
            min_size=1,
            max_size=3,
        ).map(".".join),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_all_linear_leaves_out_what_has_an_output_head_anywhere_in_its_name(impl, names):
    plain = [name for name in names if not set(name.split(".")) & set(HEADS)]
    assert impl.match_targets(names, ["all-linear"]) == plain
    assert impl.match_targets(names, [*names, "all-linear"]) == names


@requirement("R3.11", kind="law")
@given(drawn=names_and_keys(extra=["all-linear"]), data=st.data())
def test_the_order_of_names_and_targets_changes_no_match(impl, drawn, data):
    names, targets = drawn
    shuffled = impl.match_targets(
        data.draw(st.permutations(names)), data.draw(st.permutations(targets))
    )
    assert sorted(shuffled) == sorted(impl.match_targets(names, targets))
    apart = {name for target in targets for name in impl.match_targets(names, [target])}
    assert apart == set(shuffled)


@requirement("R3.11", kind="convention")
@given(
    number=st.integers(0, 9),
    digit=st.integers(1, 9),
    leaf=st.sampled_from(["query", "q.lin"]),
    deep=st.booleans(),
)
def test_layer_1_is_never_layer_11(impl, number, digit, leaf, deep):
    prefix = "encoder.layer." if deep else ""
    names = [f"{prefix}{number}.{leaf}", f"{prefix}{digit}{number}.{leaf}"]
    names += [f"{prefix}{number}-{leaf}"]
    assert impl.match_targets(names, [f"{number}.{leaf}"]) == names[:1]


def moved(name, old, new):
    """The name with `new` in place of the components `old`, if it begins with these."""
    parts = name.split(".")
    begins = parts[: len(old)] == old and len(parts) > len(old)
    return ".".join(new + parts[len(old) :]) if begins else name


def ways(names, card):
    """Every binding of all keys that a change of their first components gives, with the change; of
    those changes that replace the fewest components.
    """
    keys = [key.split(".") for key in card.weights]
    starts = [name.split(".")[:count] for name in names for count in range(name.count(".") + 1)]
    for count in range(1, min(map(len, keys), default=0)):
        old, changes = keys[0][:count], {}
        for new in starts if all(key[:count] == old for key in keys) else []:
            targets = [moved(target, old, new) for target in card.target_modules]
            bound = tuple((moved(key, old, new), key) for key in card.weights)
            numbers = [[part for part in parts if part.isdigit()] for parts in (old, new)]
            if all(name in names and targeted(name, targets) for name, _ in bound) and (
                not numbers[0] or not numbers[1] or numbers[0] == numbers[1]
            ):
                changes[bound] = f"{'.'.join(old)}.", ".".join([*new, ""])
        if changes:
            return changes
    return {}


@st.composite
def bindings(draw, *, ambiguous=False):
    """Linears, a card some of whose keys fit some of them, and the pairs of module and key that
    do; whether none of them is in two pairs, which is certain not to hold if `ambiguous`.
    """
    names, targets = draw(names_and_keys(extra=["all-linear"]))
    name = draw(st.sampled_from(names))
    longer = f"{draw(words)}.{name}"
    fit_one = ambiguous and draw(st.booleans())
    if ambiguous:
        names = sorted({*names, longer} - ({name} if fit_one else set()))
        targets = [*targets, name]
    shapes = dict.fromkeys(names, (2, 2))
    suffixes = [
        ".".join(name.split(".")[start:]) for name in names for start in range(name.count(".") + 1)
    ]
    keys = draw(
        st.lists(
            st.sampled_from(suffixes) | st.sampled_from(names) | dotted, max_size=4, unique=True
        )
    )
    if ambiguous:
        keys = [*keys, name, *([longer] if fit_one else [])]
    pair = PlainPair(np.ones((2, 1), np.float32), np.ones((1, 2), np.float32), 1.0)
    targets = tuple(dict.fromkeys(targets))
    card = PlainCard("docs", 1, 1.0, targets, dict.fromkeys(keys, pair), {}, {})
    reached = [name for name in names if targeted(name, targets)]
    pairs = [(name, key) for name in reached for key in keys if fits(name, key)]
    assume(any(fits(name, key) for name in shapes for key in keys) or not ways(shapes, card))
    unique = all(len({pair[side] for pair in pairs}) == len(pairs) for side in (0, 1))
    return card, shapes, dict(pairs), unique


@requirement("R3.11", kind="convention")
@given(drawn=bindings(), data=st.data())
def test_a_weight_binds_to_the_one_targeted_module_that_it_fits(impl, drawn, data):
    card, shapes, pairs, unique = drawn
    assume(unique)
    shuffled = dict(data.draw(st.permutations(list(shapes.items()))))
    assert impl.bind(card, shapes) == impl.bind(card, shuffled) == pairs
    if pairs:  # among keys, "all-linear" is a name like any other, here of no module
        keys = {**card.weights, "all-linear": next(iter(card.weights.values()))}
        assert impl.bind(card._replace(weights=keys), shapes) == pairs


@requirement("R3.11", kind="refusal")
@given(drawn=bindings(ambiguous=True))
def test_a_weight_that_fits_two_targeted_modules_or_a_module_that_two_fit_is_refused(impl, drawn):
    card, shapes, _, unique = drawn
    assert not unique
    with pytest.raises(Exception, match=r".+"):
        impl.bind(card, shapes)


# ---- keys that begin otherwise than the names of the modules

STARTS = ["", "model.", "bert.", "model.language_model.", "vision.", "0.", "0.model.", "1.", "a.b."]
NUMBERED = ["0.", "1.", "0.model.", "1.model.", "model."]
ENDS = ["layer.0.query", "layer.1.query", "layer.1.value", "pooler.query", "query", "lm_head"]


@st.composite
def led_otherwise(draw):
    """Linears under some leading parts, and a card whose keys are names under one of its own."""
    ends = draw(st.lists(st.sampled_from(ENDS), min_size=1, max_size=4, unique=True))
    starts = draw(st.lists(st.sampled_from(STARTS), min_size=1, max_size=3, unique=True))
    names = [start + end for start in starts for end in ends]
    sizes = draw(st.sampled_from([st.just(2), st.sampled_from([2, 2, 3])]))
    sites = {name: Site(2, draw(sizes), name) for name in draw(st.permutations(names))}
    start = draw(st.sampled_from([start for start in STARTS if start not in starts]))
    known = st.lists(st.sampled_from(ends), min_size=1, max_size=3, unique=True)
    anything = st.lists(st.sampled_from([*ends, *ends, *ends, *ENDS]), max_size=3, unique=True)
    keys = [start + end for end in draw(known | anything)]
    targets = draw(
        st.sampled_from([keys, ["all-linear"], ["query", "value", "lm_head"], []])
        | st.lists(st.sampled_from([*names, *keys, "1.query", "nowhere"]), unique=True)
    )
    pair = LowRank(np.ones((2, 1)), np.ones((1, 2)), 1.0)
    return sites, LoRACard("docs", 1, 1.0, targets, dict.fromkeys(keys, pair))


@st.composite
def led_by_numbers(draw):
    """The same, where all fit but for a number in a leading part."""
    ends = draw(st.lists(st.sampled_from(ENDS[:-1]), min_size=1, max_size=2, unique=True))
    start, *starts = draw(st.lists(st.sampled_from(NUMBERED), min_size=2, max_size=4, unique=True))
    sites = {name: Site(2, 2, name) for name in (start + end for start in starts for end in ends)}
    pair = LowRank(np.ones((2, 1)), np.ones((1, 2)), 1.0)
    keys = dict.fromkeys((start + end for end in ends), pair)
    return sites, LoRACard("docs", 1, 1.0, draw(st.sampled_from(["all-linear", [*keys]])), keys)


@requirement("R3.15")
@given(drawn=led_otherwise() | led_by_numbers())
def test_keys_that_fit_nothing_bind_with_the_one_leading_part_with_which_all_do(drawn):
    sites, card = drawn
    if any(fits(name, key) for name in sites for key in card.weights):
        with contextlib.suppress(TargetError, ShapeError):
            assert plan(sites, card).leading is None
        return
    every = ways(sites, card)
    fitting = [bound for bound in every if {sites[name].out_features for name, _ in bound} == {2}]
    if len(fitting or every) > 1:
        with pytest.raises(TargetError, match="one leading part") as caught:
            plan(sites, card)
        assert all(repr(every[bound][1]) in str(caught.value) for bound in fitting or every)
    elif every and not fitting:
        with pytest.raises(ShapeError, match="in -> out of 2 -> 3"):
            plan(sites, card)
    else:
        (bound,) = fitting or [()]
        old, new = change = every.get(bound, ("", ""))
        report = plan(sites, card)
        assert list(report.bound.items()) == sorted(bound)
        assert report.leading == (change if bound else None)
        parts = old.split(".")[:-1], new.split(".")[:-1]
        assert report.targets_not_found == tuple(
            target
            for target in card.target_modules
            if not any(targeted(name, [moved(target, *parts)]) for name in sites)
        )
        targets = [moved(target, *parts) for target in card.target_modules]
        reached = {name for name in sites if targeted(name, targets)}
        assert report.without_factors == tuple(sorted(reached - report.bound.keys()))


# ---- the same rule where modules are known by several names, and in the plan


@st.composite
def linears(draw):
    """Names of Linears, some of them names of one module, with output heads at any place among
    their components.
    """
    heads = st.sampled_from(HEADS) | st.sampled_from(["head_0", "xhead", "lm_head2", "Score"])
    parts = st.lists(words.filter("lm_head".__ne__) | heads, min_size=1, max_size=3).map(".".join)
    sites = {}
    for name in draw(st.lists(parts, min_size=1, max_size=6, unique=True)):
        owner = draw(st.sampled_from([*sites, name]))
        own = Site(2, 2, name, draw(st.sampled_from([False, False, True])), draw(st.booleans()))
        sites[name] = sites[owner] if owner != name and sites[owner].owner == owner else own
    return sites


@requirement("R3.11")
@given(sites=linears(), data=st.data())
def test_all_linear_is_every_module_but_those_whose_name_has_an_output_heads_as_a_component(
    sites, data
):
    names = list(sites)
    suffixes = [
        ".".join(name.split(".")[start:]) for name in names for start in range(name.count(".") + 1)
    ]
    targets = data.draw(
        st.lists(st.sampled_from([*suffixes, "uery", "", "nowhere"]), max_size=2, unique=True)
    )
    plain = [name for name in names if not set(name.split(".")) & set(HEADS)]
    named = [name for name in names if any(fits(name, target) for target in targets)]
    assert [(name, key) for name in names for key in suffixes if matches(name, key)] == [
        (name, key) for name in names for key in suffixes if fits(name, key)
    ]
    assert match_targets(names, targets) == named
    assert match_targets(names, ["all-linear"]) == plain
    reached = {sites[name].owner for name in plain if not sites[name].head}
    assert targeted_modules(sites, targets) == {sites[name].owner for name in named}
    assert targeted_modules(sites, ["all-linear"]) == reached
    both = {sites[name].owner for name in named} | reached
    assert targeted_modules(sites, [*targets, "all-linear"]) == both


@requirement("R3.11", "R3.12", "R3.14")
@given(sites=linears(), data=st.data())
def test_a_plan_binds_a_module_under_its_first_name_and_tells_which_of_them_may_never_be_called(
    sites, data
):
    pair = LowRank(np.ones((2, 1)), np.ones((1, 2)), 1.0)
    keys = data.draw(st.lists(st.sampled_from([*sites]), unique=True))
    targets = data.draw(
        st.sampled_from([("all-linear",), tuple(keys), ("nowhere", *keys, "all-linear")])
    )
    card = LoRACard("docs", 1, 1.0, targets, dict.fromkeys(keys, pair))
    reached = targeted_modules(sites, targets)
    bindings = [
        (owner, key)
        for key in sorted(keys)
        for owner in sorted({sites[name].owner for name in sites if fits(name, key)} & reached)
    ]
    if any(len({binding[side] for binding in bindings}) < len(bindings) for side in (0, 1)):
        with pytest.raises(TargetError, match="'docs'"):
            plan(sites, card)
        return
    found = plan(sites, card)
    assert list(found.bound.items()) == sorted(bindings)
    assert found.bypassed == tuple(sorted(owner for owner, _ in bindings if sites[owner].bypassed))
    assert found.weights_not_used == tuple(
        key for key in card.weights if key not in dict(bindings).values()
    )
    assert found.without_factors == tuple(sorted(reached - dict(bindings).keys()))
    assert found.targets_not_found == tuple(
        target for target in targets if not targeted_modules(sites, [target])
    )


# ---- module trees


class Block(nn.Module):
    """Runs its parts one after the other, and holds plain values beside them."""

    def __init__(self, parts, notes):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.unused = nn.ModuleList()
        self.notes = notes

    def forward(self, x):
        for part in self.parts.values():
            x = part(x)
        self.notes["calls"] = [*self.notes.get("calls", [])[-1:], x.detach()]
        return x


@st.composite
def notes(draw):
    """Plain values as modules keep them: tensors in lists, in tuples, tables, lists in these."""
    tensor = torch.arange(3.0)
    made = {
        "list": [tensor, [1, 2]],
        "tuple": (tensor, {"deep": [3]}),
        "set": {1, 2},
        "queue": deque([tensor], maxlen=2),
        "table": dict.fromkeys(range(40)),
    }
    return {key: made[key] for key in draw(st.lists(st.sampled_from(sorted(made)), unique=True))}


@st.composite
def leaves(draw, made, *, whole):
    """A module without parts; a Linear may share its weight with one that was made before."""
    kinds = (
        ["linear", "relu"]
        if whole
        else ["linear", "linear", "norm", "batch", "dropout", "relu", "empty"]
    )
    others = [module for module in made if isinstance(module, nn.Linear)]
    kind = draw(st.sampled_from(kinds)) if others else "linear"
    if kind != "linear":
        plain = {
            "norm": nn.LayerNorm,
            "batch": nn.BatchNorm1d,
            "dropout": nn.Dropout,
            "relu": nn.ReLU,
            "empty": nn.Sequential,
        }
        return plain[kind](WIDTH) if kind in ("norm", "batch") else plain[kind]()
    linear = nn.Linear(
        WIDTH, WIDTH, bias=draw(st.booleans()), dtype=torch.float64 if whole else None
    )
    if whole:
        for parameter in linear.parameters():
            parameter.data = torch.randint(-2, 3, parameter.shape).double()
    if others and draw(st.booleans()):
        linear.weight = draw(st.sampled_from(others)).weight
    linear.weight.requires_grad_(draw(st.booleans()))
    return linear


@st.composite
def trees(draw, *, whole=False):
    """A random tree of modules of one width, with modules, parameters and dictionaries known under
    several names.

    Names are unique within a tree, so that any Linear can be named without ambiguity. If `whole`,
    the tree is of float64 Linears over whole numbers, and ReLU.
    """
    count, made, shared_notes = itertools.count(), [], draw(notes())
    torch.manual_seed(draw(st.integers(0, 99)))

    def node(depth):
        if made and draw(st.integers(0, 4)) == 0:
            return draw(st.sampled_from(made))
        kinds = ["sequence", "block"] if depth > 1 else ["leaf", "leaf", "sequence", "block"]
        kind = draw(st.sampled_from(kinds)) if depth else "leaf"
        parts = OrderedDict()
        for _ in range(draw(st.integers(1, 3)) if kind != "leaf" else 0):
            parts[f"m{next(count)}"] = node(depth - 1)
        if kind == "leaf":
            module = draw(leaves(made, whole=whole))
        elif kind == "sequence":
            module = nn.Sequential(parts)
        else:
            module = Block(parts, shared_notes if draw(st.booleans()) else draw(notes()))
        module.train(draw(st.booleans()))
        if draw(st.integers(0, 3)) == 0:
            module.register_forward_hook(lambda _module, _inputs, output: output)
        made.append(module)
        return module

    return node(draw(st.sampled_from([2, 1, 3, 0])))


def linear_names(model):
    """The first name of every Linear."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@st.composite
def cards(draw, model, name="docs"):
    """A card for some of a model's Linears, with whole factors."""
    found = linear_names(model)
    chosen = draw(st.lists(st.sampled_from(found), unique=True)) if found else []
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shapes = [(WIDTH, 2), (2, WIDTH)]
    weights = {
        name: LowRank(*(rng.integers(-2, 3, shape).astype(np.float64) for shape in shapes), 2.0)
        for name in chosen
    }
    return LoRACard(name, 2, 1.0, draw(st.sampled_from([tuple(chosen), ("all-linear",)])), weights)


def binding(*cards):
    """The cards that have factors; one without any can't be applied."""
    return [card for card in cards if card.weights]


def run(model, x):
    """What a model computes, with its randomness fixed."""
    torch.manual_seed(0)
    return model(x)


def frozen(value, seen):
    """A deep picture of a value: for a tensor its place, bits, flag and gradient; for other objects
    who they are.
    """
    if isinstance(value, Tensor):
        bits = value.detach().clone().reshape(-1).view(torch.uint8).tolist()
        return (
            id(value),
            value.data_ptr(),
            value.dtype,
            value.shape,
            bits,
            value.requires_grad,
            frozen(value.grad, seen),
        )
    if isinstance(value, int | float | str | None) or id(value) in seen:
        return value if isinstance(value, int | float | str | None) else id(value)
    seen.add(id(value))
    inside = ()
    if isinstance(value, nn.Module):
        inside = (type(value), frozen(value.__dict__, seen))
    elif isinstance(value, dict):
        inside = [(key, frozen(item, seen)) for key, item in value.items()]
    elif isinstance(value, list | tuple | deque):
        inside = [frozen(item, seen) for item in value]
    elif isinstance(value, set):
        inside = sorted(map(repr, value))
    return id(value), inside


def picture(model):
    return frozen(model, set())


def mutable(value, found):
    """Every mutable object that a value leads to, by id."""
    if (
        isinstance(value, nn.Module | dict | list | set | deque | tuple | Tensor)
        and id(value) not in found
    ):
        if not isinstance(value, tuple):
            found[id(value)] = value
        if isinstance(value, nn.Module):
            mutable(value.__dict__, found)
        elif isinstance(value, dict):
            for item in value.values():
                mutable(item, found)
        elif isinstance(value, list | set | deque | tuple):
            for item in value:
                mutable(item, found)
    return found


def aliases(model):
    """Which names stand for one object, for modules, parameters and plain values."""
    groups = {}
    for name, module in model.named_modules(remove_duplicate=False):
        groups.setdefault(id(module), set()).add(name)
        for key, parameter in module._parameters.items():
            groups.setdefault(id(parameter), set()).add(f"{name}:{key}")
        if isinstance(module, Block):
            groups.setdefault(id(module.notes), set()).add(f"{name}:notes")
    return {frozenset(group) for group in groups.values()}


@requirement("R3.9@3")
@given(data=st.data())
def test_the_result_shares_every_parameters_storage_and_no_mutable_object(data):
    model = data.draw(trees())
    before = picture(model)
    result = adapt(model, binding(data.draw(cards(model))))
    assert picture(model) == before
    assert not mutable(model, {}).keys() & mutable(result, {}).keys()
    places = {
        name: tensor.data_ptr() for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    assert {
        name: tensor.data_ptr() for name, tensor in result.named_parameters(remove_duplicate=False)
    } == places
    for parameter in result.parameters():
        assert isinstance(parameter, nn.Parameter)
        assert (parameter.requires_grad, parameter.is_leaf, parameter.grad) == (False, True, None)
    assert list(result.state_dict()) == list(model.state_dict())
    assert [m.training for m in result.modules()] == [m.training for m in model.modules()]


@requirement("R3.9")
@given(data=st.data())
def test_each_module_parameter_and_dictionary_is_copied_once_so_that_aliases_stay_aliases(data):
    model = data.draw(trees())
    assert aliases(adapt(model, binding(data.draw(cards(model))))) == aliases(model)


@requirement("R3.9")
@given(data=st.data())
def test_a_rewrite_with_no_card_computes_what_the_model_does_to_the_last_bit(data):
    model = data.draw(trees())
    x = torch.randn(4, WIDTH)
    assert torch.equal(run(adapt(model, ()), x), run(adapt(adapt(model, ()), ()), x))
    copy = adapt(model, ())
    assert torch.equal(run(copy, x), run(model, x))


def dtypes_of(model):
    return {
        tensor.dtype
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point()
    }


def train_and_step(result):
    """A forward and backward in training mode, where the dtypes allow it."""
    result.train().requires_grad_()
    if dtypes_of(result) in ({torch.float32}, {torch.float64}):
        out = run(result, torch.randn(4, WIDTH, dtype=next(iter(dtypes_of(result)))))
        if out.requires_grad:
            out.sum().backward()


def spoil_dictionaries(result):
    for module in list(result.modules()):
        if isinstance(module, Block):
            for value in module.notes.values():
                if isinstance(value, list | deque):
                    value.append("spoilt")
                elif isinstance(value, set):
                    value.add("spoilt")
                elif isinstance(value, dict):
                    value.clear()
                elif isinstance(value, tuple) and isinstance(value[-1], dict):
                    value[-1]["deep"].append("spoilt")
            module.notes["spoilt"] = True
            module.parts.clear()
            module.unused.append(nn.Identity())
        module.added = nn.Linear(1, 1)
        module.register_buffer("more", torch.zeros(1))


def replace_parameters(result):
    for module in result.modules():
        for name in list(module._parameters):
            setattr(module, name, None)


def load_other_numbers(result):
    result.load_state_dict(
        {key: torch.full_like(tensor, 7) for key, tensor in result.state_dict().items()}
    )


def hook_everything(result):
    for module in result.modules():
        module.register_forward_hook(lambda _module, _inputs, output: output * 2)
        module.register_forward_pre_hook(lambda _module, _inputs: None)
        module._forward_hooks.clear()


OPERATIONS = {
    "train": lambda result: result.train(),
    "eval": lambda result: result.eval(),
    "half": lambda result: result.half(),
    "double": lambda result: result.double(),
    "to": lambda result: result.to(torch.bfloat16),
    "train and step": train_and_step,
    "hooks": hook_everything,
    "load": load_other_numbers,
    "adapt": lambda result: load_other_numbers(adapt(result, ())),
    "fold": lambda result: fold(result, narrow=True).half(),
    "cards": lambda result: result.apply(lambda module: setattr(module, "mark", 1)),
}
LAST = {
    "dictionaries": spoil_dictionaries,
    "parameters": replace_parameters,
    "none": lambda result: None,
}


@requirement("R3.9", "R3.7")
@given(data=st.data())
def test_nothing_done_to_the_result_reaches_the_original(data):
    model = data.draw(trees())
    adapters = binding(data.draw(cards(model)))
    before = picture(model)
    result = adapt(model, adapters)
    for name in data.draw(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=5)):
        OPERATIONS[name](result)
        assert picture(model) == before, name
    LAST[data.draw(st.sampled_from(sorted(LAST)))](result)
    assert picture(model) == before


@requirement("R3.9", "R3.13")
@given(data=st.data())
def test_adapting_twice_is_adapting_to_the_union_and_the_order_is_irrelevant(data):
    model = data.draw(trees()).eval()
    a, b = data.draw(cards(model, "a")), data.draw(cards(model, "b"))
    x = torch.randn(4, WIDTH)
    want = adapt(model, binding(a, b))
    for other in (
        adapt(adapt(model, binding(a)), binding(b)),
        adapt(adapt(model, binding(b)), binding(a)),
        adapt(want, binding(a)),
        adapt(model, binding(b, a)),
    ):
        assert torch.equal(run(other, x), run(want, x))
        assert [type(module) for module in other.modules()] == [
            type(module) for module in want.modules()
        ]
    if a.weights:
        with pytest.raises(ConflictError, match="'a'"):
            adapt(want, AdapterSet({"a": (a, 0.5)}))


@requirement("R3.2", "R3.6", "R3.9")
@given(data=st.data())
def test_every_matching_target_is_injected_and_acts_as_w_plus_delta_w(data):
    """Against a copy of the tree whose weights were changed by hand; on whole numbers, exactly."""
    model = data.draw(trees(whole=True))
    card = data.draw(cards(model))
    weighted = data.draw(st.sampled_from([1.0, -1.0, 2.0]))
    result = adapt(model, AdapterSet({c.name: (c, weighted) for c in binding(card)}))
    injected = [name for name, module in result.named_modules() if isinstance(module, LoRALinear)]
    assert injected == [name for name in linear_names(model) if name in card.weights]
    by_hand = adapt(model, ())
    for name in injected:
        pair, linear = card.weights[name], by_hand.get_submodule(name)
        update = torch.tensor(pair.A @ pair.B).T * pair.scaling * weighted
        linear.weight = nn.Parameter(linear.weight + update, requires_grad=False)
    x = torch.randint(-2, 3, (4, WIDTH)).double()
    assert torch.equal(run(result, x), run(by_hand, x))
    assert torch.equal(run(fold(result), x), run(by_hand, x))


@requirement("R3.12", "R3.6", "R3.3")
@given(data=st.data(), strict=st.booleans())
def test_the_report_says_what_was_bound_and_what_was_not(data, strict):
    model = data.draw(trees())
    found = linear_names(model)
    assume(found)
    pair = LowRank(np.ones((WIDTH, 1)), np.ones((1, WIDTH)))
    keys = data.draw(st.lists(st.sampled_from([*found, "nowhere", "m"]), unique=True))
    near = [name[-1] for name in found if name]  # "3" is the end of "m3" and does not match it
    targets = data.draw(
        st.lists(st.sampled_from([*found, *near, "elsewhere", "all-linear"]), unique=True)
    )
    card = LoRACard("docs", 1, 1.0, targets, dict.fromkeys(keys, pair))
    everywhere = "all-linear" in targets
    bound = sorted(key for key in keys if key in found and (everywhere or key in targets))
    missing = tuple(target for target in targets if target not in (*found, "all-linear"))
    unused = tuple(key for key in card.weights if key not in bound)
    manager = LoRAManager(model)
    if not bound or (strict and (missing or unused)):
        with pytest.raises(TargetError, match="docs"):
            manager.apply_card(card, strict=strict)
        assert manager.model is model
        assert not manager.active
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = manager.apply_card(card, strict=strict)
    assert [warning.category for warning in caught] == [UnboundWarning] * bool(missing or unused)
    assert all(repr(name) in str(caught[0].message) for name in (*missing, *unused))
    assert (report.name, dict(report.bound)) == ("docs", {key: key for key in bound})
    assert (report.targets_not_found, report.weights_not_used) == (missing, unused)
    matched = found if everywhere else [name for name in found if name in targets]
    assert report.without_factors == tuple(sorted(set(matched) - set(bound)))
    assert list(manager.active) == ["docs"]
    assert manager.injected == dict.fromkeys(bound, ("docs",))


# ---- the manager against a model of it in plain dictionaries


def base_model():
    torch.manual_seed(5)
    return nn.Sequential(
        OrderedDict(
            first=nn.Linear(3, 4), act=nn.Tanh(), second=nn.Linear(4, 3), norm=nn.BatchNorm1d(3)
        )
    ).eval()


LAYERS = {"first": (3, 4), "second": (4, 3)}


def make_card(name, version, modules, targets=None):
    rng = np.random.default_rng(version)
    weights = {}
    for module in modules:
        rows, columns = LAYERS.get(module, (9, 9))
        shapes = [(rows, 2), (2, columns)]
        weights[module] = LowRank(
            *(rng.standard_normal(shape).astype(np.float32) for shape in shapes), 0.5
        )
    return LoRACard(name, 2 if modules else 1, 1.0, targets or modules, weights)


FITTING = [
    make_card("a", 1, ["first"]),
    make_card("a", 2, ["second"]),
    make_card("b", 3, ["first", "second"]),
    make_card("b", 4, ["first"], ["all-linear"]),
    make_card("c", 5, ["second"], ["second", "third"]),
]
BINDING_NOTHING = make_card("d", 6, ["third"])
MISFITTING = [
    LoRACard("e", 1, 1.0, ["first"], {"first": LowRank(np.ones((9, 1)), np.ones((1, 9)))}),
    LoRACard("a", 1, 1.0, ["second"], {"second": LowRank(np.ones((4, 1)), np.ones((1, 4)))}),
]
NAMES = st.sampled_from("abcde")
WEIGHTS = st.sampled_from([1.0, 0.5, -2.0, 0.0])
INPUT = torch.linspace(-1, 1, 6).reshape(2, 3)


class CrashError(Exception):
    """Something failed in the middle."""


class ManagerMachine(RuleBasedStateMachine):
    """Every operation of a manager, also failing ones, against dictionaries of what should be."""

    @initialize(folds=st.booleans())
    def start(self, folds):
        self.base = base_model()
        self.before = picture(self.base)
        self.plain = self.base(INPUT)
        self.folds = folds
        self.manager = LoRAManager(self.base, fold=folds)
        self.active, self.prepared, self.earlier, self.loaded = {}, None, [], {}

    def refused(self, kind, operation):
        """An operation that must fail, and leave the very state that was."""
        state = self.manager.state
        with pytest.raises(kind) as caught:
            operation()
        assert kind is CrashError or isinstance(caught.value, LoRAError)
        assert self.manager.state is state

    @rule(card=st.sampled_from(FITTING), weight=WEIGHTS)
    def apply(self, card, weight):
        state = self.manager.state
        if self.active.get(card.name, (card, weight)) != (card, weight):
            self.refused(ConflictError, lambda: self.manager.apply_card(card, weight=weight))
            return
        again = card.name in self.active
        report = self.manager.apply_card(card, weight=weight)
        assert set(report.bound) == set(card.weights)
        assert self.manager.state is state or not again
        self.active[card.name] = (card, weight)

    @rule(card=st.sampled_from(FITTING), weight=WEIGHTS)
    def apply_and_remove(self, card, weight):
        if card.name not in self.active:
            before = self.manager.active, self.manager.injected, self.manager.model(INPUT)
            self.manager.apply_card(card, weight=weight)
            self.manager.remove_card(card.name)
            assert (self.manager.active, self.manager.injected) == before[:2]
            assert torch.equal(self.manager.model(INPUT), before[2])

    @rule()
    def apply_what_binds_nothing(self):
        self.refused(TargetError, lambda: self.manager.apply_card(BINDING_NOTHING))
        self.refused(TargetError, lambda: self.manager.prepare([FITTING[0], BINDING_NOTHING]))

    @rule(card=st.sampled_from(MISFITTING))
    def apply_what_does_not_fit(self, card):
        kind = ConflictError if card.name in self.active else ShapeError
        self.refused(kind, lambda: self.manager.apply_card(card))
        self.refused(ShapeError, lambda: self.manager.prepare([card]))
        if card.name in self.active:
            self.refused(ShapeError, lambda: self.manager.replace_card(card))

    @rule(card=st.sampled_from(FITTING))
    def apply_strictly_what_is_not_all_there(self, card):
        if card.name == "c" and "c" not in self.active:
            self.refused(TargetError, lambda: self.manager.apply_card(card, strict=True))

    @rule(
        card=st.sampled_from(FITTING),
        operation=st.sampled_from(["apply", "remove", "replace", "weight", "prepare"]),
    )
    def crash_in_the_middle(self, card, operation):
        name, inside = card.name, card.name in self.active
        other = inside and self.active[name][0] != card  # what is there already is not built again
        operations = {
            "apply": (not inside, lambda: self.manager.apply_card(card)),
            "remove": (inside and len(self.active) > 1, lambda: self.manager.remove_card(name)),
            "replace": (other, lambda: self.manager.replace_card(card)),
            "weight": (inside, lambda: self.manager.set_weight(name, 3.0)),
            "prepare": (self.active != {name: (card, 1.0)}, lambda: self.manager.prepare([card])),
        }
        possible, act = operations[operation]
        if possible:
            with mock.patch.object(manager_module, "build", side_effect=CrashError):
                self.refused(CrashError, act)

    @rule(name=NAMES)
    def remove(self, name):
        state = self.manager.state
        self.manager.remove_card(name)
        assert self.manager.state is state or name in self.active
        self.active.pop(name, None)

    @rule(card=st.sampled_from(FITTING))
    def replace(self, card):
        if card.name in self.active:
            self.manager.replace_card(card)
            self.active[card.name] = (card, self.active[card.name][1])
            if card.name in self.loaded:
                self.loaded[card.name] = card
        else:
            self.refused(UnknownCardError, lambda: self.manager.replace_card(card))

    @rule(name=NAMES, weight=WEIGHTS | st.just(float("nan")))
    def set_weight(self, name, weight):
        if name not in self.active:
            self.refused(UnknownCardError, lambda: self.manager.set_weight(name, weight))
        elif weight != weight:  # noqa: PLR0124 - NaN
            self.refused(ValueError, lambda: self.manager.set_weight(name, weight))
        else:
            self.manager.set_weight(name, weight)
            self.active[name] = (self.active[name][0], weight)

    @rule(card=st.sampled_from([*FITTING, *MISFITTING, BINDING_NOTHING]))
    def add(self, card):
        self.manager.add_card(card)
        self.loaded[card.name] = card

    @rule(name=NAMES)
    def unload(self, name):
        self.manager.unload_card(name)
        self.loaded.pop(name, None)

    @rule(
        chosen=st.lists(
            st.tuples(st.sampled_from(FITTING), WEIGHTS),
            unique_by=lambda pair: pair[0].name,
        )
    )
    def prepare(self, chosen):
        wanted = {card.name: (card, weight) for card, weight in chosen}
        model = self.manager.model
        assert set(self.manager.prepare(wanted)) == set(wanted)
        assert self.manager.model is model
        self.prepared = wanted
        self.earlier = self.earlier[1 - HISTORY :]  # room for what the swap will replace

    @rule()
    def swap(self):
        if self.prepared is None:
            self.refused(StateError, self.manager.swap)
        else:
            self.manager.swap()
            self.earlier = [*self.earlier, dict(self.active)]
            assert len(self.earlier) <= HISTORY
            self.active, self.prepared = dict(self.prepared), None

    @rule(card=st.sampled_from(FITTING), weight=WEIGHTS, times=st.integers(1, 3))
    def prepare_and_swap(self, card, weight, times):
        for _ in range(times):
            self.prepare([(card, weight)])
            self.swap()

    @rule()
    def rollback(self):
        if self.earlier:
            self.manager.rollback()
            self.active = self.earlier.pop()
        else:
            self.refused(StateError, self.manager.rollback)

    @invariant()
    def it_tracks_what_is_active_and_where(self):
        state = self.manager.state
        assert self.manager.active == AdapterSet(self.active)
        assert [earlier.adapters for earlier in state.earlier] == [
            AdapterSet(entries) for entries in self.earlier
        ]
        assert (state.prepared is None) is (self.prepared is None)
        assert self.prepared is None or state.prepared.adapters == AdapterSet(self.prepared)
        where = {
            layer: sorted(n for n, (card, _) in self.active.items() if layer in card.weights)
            for layer in LAYERS
        }
        assert self.manager.injected == {
            layer: tuple(names) for layer, names in where.items() if names
        }
        known = {**self.loaded, **{name: card for name, (card, _) in self.active.items()}}
        assert dict(self.manager.list_cards()) == dict(sorted(known.items()))
        assert isinstance(state.loaded, MappingProxyType)

    @invariant()
    def its_model_computes_what_the_active_set_means(self):
        want = adapt(self.base, AdapterSet(self.active))
        if self.folds:
            want = fold(want)
        assert torch.equal(self.manager.model(INPUT), want(INPUT))
        layers = [self.manager.model.get_submodule(layer) for layer in self.manager.injected]
        assert all(isinstance(layer, LoRALinear) != self.folds for layer in layers)

    @invariant()
    def the_callers_model_is_what_it_was(self):
        assert self.manager.base is self.base
        assert self.active or self.manager.model is self.base
        assert picture(self.base) == self.before
        assert torch.equal(self.base(INPUT), self.plain)


ManagerMachine.TestCase.settings = settings(stateful_step_count=30)
# Card "c" binds in part.
warned = pytest.mark.filterwarnings("ignore::lora.errors.UnboundWarning")
TestManager = requirement(
    "R3.2",
    "R3.3",
    "R3.4",
    "R3.5",
    "R3.7",
    "R3.10",
    "R3.13",
    "R7.4",
    "R7.5",
    "R8.3",
    "R8.4",
    "R22.1",
    "R22.2",
)(warned(ManagerMachine.TestCase))
