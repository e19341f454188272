"""Extraction: memory, kinds of models, names, messages."""

import re
import tracemalloc
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import lora
from lora.errors import ArgumentError, BaseModelError, CardError, ShapeError, TargetError
from lora.extract import MaxError, MinEnergy, extract_delta, extract_direct
from lora.testing.plugin import requirement


def weights(count=1, shape=(4, 6), *, seed=0, dtype=np.float32, part="query"):
    rng = np.random.default_rng(seed)
    names = [f"layer.{index}.{part}.weight" for index in range(count)]
    return {name: rng.standard_normal(shape).astype(dtype) for name in names}


def noise(*shape):
    return {"q.weight": np.random.default_rng(1).standard_normal(shape)}


def ranks(card):
    return {module: pair.rank for module, pair in card.weights.items()}


def record(card, module="q"):
    return card.metadata["extract"]["modules"][module]


def randomized(model, rank, **options):
    return extract_direct(model, rank, method="randomized", **options)


class Lazy(Mapping):
    """Weights of many layers, each made when it is accessed."""

    def __init__(self, count, seed):
        self.names, self.seed = [f"layer.{index:02}.query.weight" for index in range(count)], seed

    def __getitem__(self, key):
        rng = np.random.default_rng([self.seed, int(key.split(".")[1])])
        return rng.standard_normal((200, 300)).astype(np.float32)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


@requirement("R16.9")
@pytest.mark.parametrize("method", ["full", "randomized"])
def test_memory_does_not_grow_with_the_number_of_layers(method):
    """NumPy reports its arrays to tracemalloc; the factors kept are a hundredth of a layer."""

    def peak(count):
        tracemalloc.start()
        assert len(extract_delta(Lazy(count, 0), Lazy(count, 1), 1, method=method).weights) == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    few, many, layer = peak(2), peak(16), 200 * 300 * 8
    assert many - few < layer
    assert many < 8 * layer


@requirement("R16.3", "R16.6")
def test_a_tuned_torch_model_is_reproduced_by_its_card_on_the_base():
    torch.manual_seed(0)
    base, tuned = (
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double() for _ in range(2)
    )
    biases = {key: value for key, value in base.state_dict().items() if "bias" in key}
    tuned.load_state_dict({**tuned.state_dict(), **biases})
    card = extract_delta(base, tuned, 8, name="tuned")
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(lora.adapt(base, card)(x), tuned(x), rtol=1e-12, atol=1e-12)
    assert (card.name, card.rank, ranks(card)) == ("tuned", 5, {"0": 5, "2": 4})


@requirement("R16.6")
def test_a_single_linear_is_a_model_whose_module_has_no_name():
    linear = nn.Linear(3, 2)
    card = extract_direct(linear, 1)
    assert list(card.weights) == [""]
    assert lora.adapt(linear, card) is not linear


@requirement("R16.6")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_and_arrays_of_every_dtype_are_read_exactly(kind):
    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]], dtype=kind)
    card = extract_direct({"q.weight": values}, 2)
    wide = values.double().numpy()
    assert card == extract_direct({"q.weight": wide}, 2, dtype=card.dtype.name)
    narrow = ml_dtypes.bfloat16 if kind == torch.bfloat16 else str(kind).removeprefix("torch.")
    assert card == extract_direct({"q.weight": wide.astype(narrow)}, 2)
    assert card.dtype == (np.float64 if kind == torch.float64 else np.float32)


@requirement("R16.5")
@pytest.mark.parametrize("rank", [8, MinEnergy(1.0), MaxError(0.0)])
def test_directions_that_are_only_rounding_are_not_kept(rank):
    left, right = np.random.default_rng(0).standard_normal((2, 40, 3))
    assert ranks(extract_direct({"q.weight": left @ right.T}, rank)) == {"q": 3}


@requirement("R16.7")
def test_the_randomized_method_comes_near_the_least_error():
    """Of noise, where no direction stands out, which is the hardest case."""
    model = noise(300, 200)
    near = randomized(model, 16)
    least = record(extract_direct(model, 16))["error"]
    assert least < record(near)["error"] < 1.005 * least
    told = {key: value for key, value in near.metadata["extract"].items() if key != "modules"}
    assert told == {"kind": "direct", "method": "randomized", "seed": 0}


@requirement("R16.7")
def test_seed_and_module_change_the_randomized_result():
    model = noise(120, 100)
    assert randomized(model, 8, seed=1).weights != randomized(model, 8, seed=2).weights
    twins = randomized({"a.weight": model["q.weight"], "b.weight": model["q.weight"]}, 4)
    assert twins.weights["a"] != twins.weights["b"]


@requirement("R16.7", "R16.5")
@pytest.mark.parametrize("rule", [MinEnergy(0.9), MaxError(0.3)])
def test_the_randomized_method_widens_until_the_rule_is_met(rule):
    model = {"q.weight": np.diag(0.97 ** np.arange(200.0))}
    full, near = extract_direct(model, rule), randomized(model, rule)
    assert full.rank > 16
    assert full.rank <= near.rank <= full.rank + 2


@requirement("R16.4", "R7.8")
@pytest.mark.parametrize("largest", [1e-320, 1e-200, 1e300])
def test_tiny_and_huge_weights_are_neither_lost_nor_overflow(largest):
    card = extract_direct({"q.weight": np.full((3, 2), largest)}, 1)
    pair = card.weights["q"]
    assert np.allclose(np.linalg.norm(pair.A), np.linalg.norm(pair.B), rtol=1e-3)
    assert np.allclose(pair.A @ pair.B, largest, rtol=1e-2)
    assert record(card)["error"] < 1e-2
    message = "factors within the range of float16, found larger ones; choose a wider dtype"
    with pytest.raises(ArgumentError, match=message):
        extract_direct({"q.weight": np.full((2, 2), 1e12)}, dtype="float16")


@requirement("R16.8")
def test_rounding_the_factors_is_part_of_the_recorded_error():
    errors = [
        record(extract_direct(noise(30, 30), 30, dtype=dtype))["error"]
        for dtype in ("float64", "float32", "float16", "bfloat16")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-14 < errors[1] < 1e-6
    assert 1e-5 < errors[2] < errors[3] < 1e-2


def test_all_linear_leaves_out_heads_embeddings_and_what_is_no_matrix():
    names = ["query", "dense", "lm_head", "embeddings.word_embeddings", "embed_tokens", "wte"]
    model = {f"{name}.weight": np.eye(3) for name in [*names, "embeddings_project"]}
    model |= {"norm.weight": np.ones(3), "query.bias": np.ones(3)}
    model["conv.weight"] = np.ones((3, 3, 2))
    assert sorted(extract_direct(model).weights) == ["dense", "embeddings_project", "query"]
    named = extract_direct(model, target_modules=["wte", "query"])
    assert sorted(named.weights) == ["query", "wte"]


def test_progress_is_told_after_each_module():
    calls = []
    extract_direct(weights(3), 1, on_module=lambda *args: calls.append(args))
    assert calls == [(f"layer.{index}.query", index + 1, 3) for index in range(3)]


@requirement("R16.2")
def test_the_cards_dtype_is_that_of_the_widest_weights():
    double = weights(1, dtype=np.float64, part="key")
    mixed = {**weights(1), **double, **weights(1, dtype=np.float16, part="value")}
    assert extract_direct(mixed, 1).dtype == np.float64
    assert extract_direct(weights(1, dtype=np.float16), 1).dtype == np.float32
    assert extract_direct(mixed, 1, dtype="bfloat16").dtype == ml_dtypes.bfloat16


@requirement("R16.2")
def test_a_direction_a_billion_times_smaller_than_the_largest_is_extracted_too():
    change = np.array([[1.0, 0.0], [0.0, 1e-9], [0.0, 0.0]])
    card = extract_delta({"q.weight": np.zeros((3, 2))}, {"q.weight": change}, 2)
    pair = card.weights["q"]
    assert np.allclose((pair.A @ pair.B).T * pair.scaling, change, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("method", ["full", "randomized"])
def test_models_that_are_given_stay_as_they_are(method):
    base, tuned = weights(2), weights(2, seed=1)
    extract_delta(base, tuned, 1, method=method)
    extract_direct(base, 1, method=method)
    for model, copy in ((base, weights(2)), (tuned, weights(2, seed=1))):
        assert all(np.array_equal(model[key], copy[key]) for key in model)


GOOD, OTHER, KEY = weights(2), weights(2, seed=1), "layer.0.query.weight"
WRONG = "finite weights and differences"
NO_MODEL = "expected a mapping of weights or a model, found"


@requirement("R7.8")
@pytest.mark.parametrize(
    ("base", "tuned", "kind", "message"),
    [
        (
            GOOD,
            {**OTHER, KEY: np.ones((4, 5))},
            ShapeError,
            rf"'{KEY}': .*\(4, 6\), found \(4, 5\)",
        ),
        (GOOD, {KEY: OTHER[KEY]}, TargetError, r"tuned: .*no \['layer.1.*'\]; give both models"),
        ({KEY: GOOD[KEY]}, OTHER, TargetError, r"extract: base: .*no \['layer.1.query.weight'\]"),
        (GOOD, {**OTHER, KEY: np.full((4, 6), np.nan)}, ArgumentError, WRONG),
        ({**GOOD, KEY: np.full((4, 6), np.inf)}, OTHER, ArgumentError, WRONG),
        ({KEY: np.full((1, 1), -1.7e308)}, {KEY: np.full((1, 1), 1.7e308)}, ArgumentError, WRONG),
        (GOOD, dict(GOOD), ArgumentError, "that differ, found none among the 2 targeted modules"),
        ({}, {}, TargetError, r"\['all-linear'\], found none; .* under '<module>.weight'"),
        ({"a": np.eye(2)}, {"a": np.eye(2)}, TargetError, "found none"),
        ({KEY: np.eye(2, dtype=int)}, {KEY: np.eye(2)}, ArgumentError, "found int64; dequantise"),
        ({KEY: [[1.0]]}, {KEY: np.eye(1)}, ArgumentError, "or a tensor of .*, found list"),
        (None, GOOD, ArgumentError, f"extract: base: {NO_MODEL} NoneType"),
        (GOOD, 3, ArgumentError, f"extract: tuned: {NO_MODEL} int"),
    ],
)
def test_bad_models_are_refused_with_what_is_wrong(base, tuned, kind, message):
    with pytest.raises(kind, match=message):
        extract_delta(base, tuned)


@requirement("R7.8", "R16.5")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, r">= 1, found 0; MinEnergy\(share\) or MaxError\(bound\)"),
        ("rank", 1.5, "extract: rank: expected an integer >= 1, found 1.5"),
        ("rank", True, "found True"),
        ("rank", None, "found None"),
        ("method", "svd", "method: expected one of full, randomized, found 'svd'"),
        ("seed", -1, "seed: expected an integer >= 0, found -1"),
        ("dtype", "int8", "one of float16, .*, bfloat16, found 'int8'"),
        ("dtype", ["float32"], "dtype: expected one of"),
        ("target_modules", ["nothing"], r"match \['nothing'\], found none"),
        ("target_modules", [], r"match \[\], found none"),
        ("target_modules", [3], "target_modules"),
        ("name", "", "card name"),
    ],
)
def test_bad_arguments_are_refused_before_any_weight_is_read(field, value, message):
    class Unread(dict):
        def __getitem__(self, key):
            raise AssertionError(key)

    kinds = {"name": CardError, "target_modules": CardError if value == [3] else TargetError}
    with pytest.raises(kinds.get(field, ArgumentError), match=message):
        extract_direct(Unread(GOOD), **{field: value})


@requirement("R7.8")
@pytest.mark.parametrize("weight", [np.ones(3), np.ones((2, 2, 3)), np.ones((0, 3)), np.array(1.0)])
def test_what_is_named_and_no_matrix_is_refused(weight):
    message = re.escape(f"shape {weight.shape}; a factor pair stands for a Linear's weight")
    with pytest.raises(ShapeError, match=message):
        extract_direct({"conv.weight": weight}, target_modules="conv")
    with pytest.raises(ArgumentError, match="not zero, found none among the 1 targeted modules"):
        extract_direct({"conv.weight": weight})


@requirement("R16.5", "R7.8")
@pytest.mark.parametrize(
    ("kind", "end", "interval"), [(MinEnergy, 0, "(0, 1]"), (MaxError, 1, "[0, 1)")]
)
def test_a_share_or_bound_out_of_range_makes_no_rule(kind, end, interval):
    for value in (-0.1, 1.5, float("nan"), float("inf"), "x", None, True):
        with pytest.raises(ArgumentError, match=kind.__name__):
            kind(value)
    with pytest.raises(ArgumentError, match=re.escape(f"in {interval}, found {end}")):
        kind(end)
    assert (MinEnergy(1).share, MaxError(0).bound) == (1.0, 0.0)
    assert ranks(extract_direct({"q.weight": np.eye(3)}, MinEnergy(1e-30))) == {"q": 1}


@pytest.mark.parametrize("module", [lora, lora.extract])
@pytest.mark.parametrize(("old", "new"), [("Energy", MinEnergy), ("Error", MaxError)])
def test_a_renamed_rule_is_still_there_and_warns(module, old, new):
    message = f"{module.__name__}.{old} is .*{new.__name__} now"
    with pytest.warns(DeprecationWarning, match=message):
        assert getattr(module, old) is new
    with pytest.raises(AttributeError, match="Rule"):
        module.Rule  # noqa: B018 - the access is what fails


@requirement("R16.3", "R1.13")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_card_knows_the_base_by_the_modules_that_it_changes(kind):
    base = nn.ModuleDict({name: nn.Linear(6, 4) for name in ("a", "a-b", "key")}).to(kind)
    tuned = {name: weight.clone() for name, weight in base.state_dict().items()}
    for name in ("a", "a-b"):
        tuned[f"{name}.weight"] += 1
    card = extract_delta(base, tuned, 2)
    assert card.base_fingerprint == lora.fingerprint(base, card)
    with torch.no_grad():
        base["key"].weight.add_(1)
        lora.adapt(base, card)
        base["a"].weight.add_(1)
    with pytest.raises(BaseModelError, match=card.base_fingerprint):
        lora.adapt(base, card)
    assert extract_direct(tuned).base_fingerprint is None


@requirement("R16.3", "R1.13")
def test_the_fingerprint_is_that_of_the_values_whatever_their_layout():
    base, tuned = weights(), weights(seed=1)
    swapped = {name: np.asfortranarray(weight.astype(">f4")) for name, weight in base.items()}
    assert extract_delta(swapped, tuned) == extract_delta(base, tuned)


@requirement("R26.9")
def test_tensors_of_one_model_and_of_any_kind_are_named():
    base = {"q.weight": np.zeros((2, 2)), "gone": np.array([3.0, 4.0]), "count": np.array(7)}
    base |= {"mask": np.array([[-np.inf, np.nan]]), "turn": np.zeros(1)}
    tuned = {
        "q.weight": np.eye(2),
        "count": np.array(9),
        "huge": np.full(2, 1e200),
        "phase": np.array([3 + 4j]),
        "turn": np.array([3 + 4j]),
        "same": np.zeros((0, 3)),
        "mask": base["mask"],
    }
    told = extract_delta(base, tuned).metadata["extract"]
    norms = {key: figures["norm"] for key, figures in told["left_out"].items()}
    expected = {"gone": 5.0, "count": 2.0, "huge": 2**0.5 * 1e200, "phase": 5.0, "turn": 5.0}
    assert norms == pytest.approx(expected, rel=1e-12)
    assert (told["left_out"]["huge"]["share"], told["held"]) == (1.0, 0.0)
    delta = extract_delta({"q.weight": base["q.weight"]}, {"q.weight": np.eye(2)})
    assert delta.metadata["extract"]["left_out"] == {}
    del tuned["q.weight"], base["q.weight"]
    same = {"q.weight": np.eye(2)}
    with pytest.raises(ArgumentError, match="what differs is no target: count, gone, huge, phase"):
        extract_delta({**base, **same}, {**tuned, **same})
    with pytest.raises(ArgumentError, match="'gone': expected finite weights"):
        extract_delta({"q.weight": np.zeros((2, 2)), "gone": np.array([np.inf])}, same)
