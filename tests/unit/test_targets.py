"""Names and shapes in, a binding plan out: examples and messages."""

import numpy as np
import pytest
from torch import nn

from lora.card import LoRACard, LowRank
from lora.errors import TargetError
from lora.models.adapt import linears
from lora.targets import Site, match_targets, matches, plan
from lora.testing.plugin import requirement

HEADS = "lm_head embed_out output_projection cls classifier score qa_outputs logits head"


def pair(rows=4, columns=4):
    return LowRank(np.ones((rows, 1)), np.ones((1, columns)), 1.0)


def card(targets, *keys, **shapes):
    weights = {key: pair() for key in keys} | {key: pair(*shape) for key, shape in shapes.items()}
    return LoRACard("docs", 1, 1.0, targets, weights)


def sites(*names):
    return {name: Site(4, 4, name) for name in names}


@requirement("R3.11")
@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("layer.1.query", "query", True),
        ("layer.1.query", "1.query", True),
        ("layer.11.query", "1.query", False),
        ("layer.1.query", "layer.1.query", True),
        ("layer.1.xquery", "query", False),
        ("layer.1.query", "layer", False),
        ("query", "layer.1.query", False),
        ("query", "query.weight", False),
        ("layer.1", "", False),
        ("", "", True),
        ("a,b.größe", "größe", True),
    ],
)
def test_a_key_matches_at_dots_only(name, key, expected):
    assert matches(name, key) is expected
    assert bool(match_targets([name], [key])) is expected


@requirement("R3.11")
@pytest.mark.parametrize("head", HEADS.split())
def test_all_linear_leaves_output_heads_out_unless_they_are_named(head):
    names = ["encoder.dense", head, f"{head}.dense", f"not_{head}"]
    assert match_targets(names, ["all-linear"]) == ["encoder.dense", f"not_{head}"]
    assert match_targets(names, ["all-linear", head]) == ["encoder.dense", head, f"not_{head}"]


@requirement("R3.11")
def test_a_linear_tied_to_an_embedding_is_an_output_head_whatever_its_name():
    layers = {"inner": nn.Linear(4, 4), "decode": nn.Linear(4, 7, bias=False)}
    model = nn.ModuleDict({"words": nn.Embedding(7, 4), **layers})
    model["decode"].weight = model["words"].weight
    weights = {"inner": pair(), "decode": pair(4, 7)}
    report = plan(linears(model), LoRACard("docs", 1, 1.0, ["all-linear"], weights))
    assert (dict(report.bound), report.weights_not_used) == ({"inner": "inner"}, ("decode",))
    assert "decode" in plan(linears(model), LoRACard("docs", 1, 1.0, ["decode"], weights)).bound


@requirement("R3.11", "R3.12")
def test_no_targets_bind_nothing():
    report = plan(sites("a.query", "query"), card([], "query", "a.query"))
    assert (dict(report.bound), report.weights_not_used) == ({}, ("a.query", "query"))


@requirement("R3.11")
def test_a_weight_that_fits_two_targeted_modules_is_ambiguous():
    expected = r"card 'docs': weight 'query': expected one module .* found \['0.query', '1.query'\]"
    with pytest.raises(TargetError, match=expected):
        plan(sites("0.query", "1.query"), card(["query"], "query"))


@requirement("R3.11")
def test_a_weight_that_fits_one_module_where_a_target_matches_is_not_ambiguous():
    planned = plan(sites("0.query", "1.query"), card(["1.query"], "query"))
    assert dict(planned.bound) == {"1.query": "query"}


@requirement("R3.11")
def test_two_weights_for_one_module_are_an_error():
    expected = r"card 'docs': module '0.query': expected one weight .*'0.query', 'query'"
    with pytest.raises(TargetError, match=expected):
        plan(sites("0.query"), card(["query"], "query", "0.query"))


@requirement("R3.11")
def test_keys_with_the_name_of_the_parameter_do_not_bind_and_are_reported():
    report = plan(sites("0.query"), card(["query"], "0.query.weight"))
    assert (dict(report.bound), report.weights_not_used) == ({}, ("0.query.weight",))


@requirement("R7.7")
def test_a_pair_for_a_module_that_is_not_targeted_may_have_any_shape():
    assert not plan(sites("0.query"), card(["value"], query=(9, 9))).bound


@requirement("R7.3", "R3.12")
def test_strict_names_everything_that_is_not_there():
    lacking = card(["query", "value"], "0.query", "elsewhere")
    report = plan(sites("0.query"), lacking)
    assert (report.targets_not_found, report.weights_not_used) == (("value",), ("elsewhere",))
    expected = r"found targets not found: 'value'; weights not used: 'elsewhere'"
    with pytest.raises(TargetError, match=expected):
        plan(sites("0.query"), lacking, strict=True)


@requirement("R3.6")
def test_a_targets_matches_without_factors_are_in_the_report_and_no_fault():
    report = plan(sites("a.q", "b.q", "c.v"), card(["q"], "a.q"), strict=True)
    assert (dict(report.bound), report.without_factors) == ({"a.q": "a.q"}, ("b.q",))
    others = tuple(sorted(f"{layer}.q" for layer in range(30)))
    assert plan(sites("a.q", *others), card(["q"], "a.q")).without_factors == others


@requirement("R3.11")
def test_a_module_with_two_names_binds_by_either_and_once():
    both = {"a.query": Site(4, 4, "a.query"), "b.query": Site(4, 4, "a.query")}
    for targets, key in ((["a.query"], "b.query"), (["b.query"], "a.query"), (["query"], "query")):
        assert dict(plan(both, card(targets, key)).bound) == {"a.query": key}


@requirement("R3.15")
@pytest.mark.parametrize(
    ("names", "targets", "key", "expected"),
    [
        (["layers.1.query"], ["query"], "model.layers.1.query", ("model.", "")),
        (["layers.1.query"], ["model.layers.1.query"], "model.layers.1.query", ("model.", "")),
        (["a.layers.1.query"], ["query"], "model.layers.1.query", ("model.", "a.")),
        (["0.a.query"], ["query"], "model.query", ("model.", "0.a.")),
        (["query"], ["query"], "0.a.query", ("0.a.", "")),
        # the fewest components are replaced: the other one would take two
        (["layers.1.query", "h.1.query"], ["query"], "model.layers.1.query", ("model.", "")),
        # another layer is none of the card's; a module that no target matches is none, either
        (["layers.0.query"], ["query"], "model.layers.1.query", None),
        (["a.query", "b.query"], ["b.query"], "a.query", None),
        (["b.query"], ["value"], "a.query", None),
        (["a.value"], ["query", "value"], "model.query", None),
    ],
)
def test_a_key_that_fits_nothing_binds_with_another_leading_part(names, targets, key, expected):
    report = plan(sites(*names), card(targets, key))
    bound = {names[0]: key} if expected else {}
    assert (report.leading, dict(report.bound)) == (expected, bound)
    if expected:
        assert not report.unbound
