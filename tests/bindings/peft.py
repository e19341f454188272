"""PEFT behind the binding: a real peer, with what it does otherwise declared and explained."""

import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar

import ml_dtypes
import numpy as np
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.tuners import tuners_utils

from lora.testing.binding import Array, PlainCard, PlainPair, Term
from lora.testing.reference import array_of, tensor_of

COMBINATIONS = dict.fromkeys(["average", "weighted", "task_arithmetic"], "svd")
COMBINATIONS |= {"cat": "cat", "ties": "ties_svd", "dare": "dare_linear_svd"}
"""PEFT's ways of merging ΔW; its "linear", "ties" and "dare_linear" merge A and B apart."""

OWN_FORMAT = "PEFT stores adapters as a directory of safetensors and JSON"
LINEAR = ["average", "weighted", "task_arithmetic", "cat"]
MERGING = "test_r20_merging.py::"

ADD = "tuners/lora/model.py: add_weighted_adapter"
FLOAT32 = ("weights are float32, so a merge in float64 is exact to 1e-7 only", ADD)
UNCHECKED = ("there is no SLERP; factors, weights and options are not checked", ADD)
NO_SLERP = ("there is no SLERP", ADD)
ALONE = ("one card alone is merged as 'linear', whatever the strategy and the density", ADD)
BY_COUNT = (
    "TIES elects signs before it applies weights, and divides by the number of cards",
    "utils/merge_utils.py: disjoint_merge",
)
MASKS = (
    "DARE draws all masks from one generator, in the order of cards and modules",
    "utils/merge_utils.py: random_pruning",
)
HEADS = (
    "all-linear leaves out a Hugging Face model's output embedding, whatever its name",
    "tuners/tuners_utils.py: _maybe_include_all_linear_layers",
)
"""What PEFT does otherwise, and where in its source."""


def of(name, strategies, why):
    """A property of these strategies, each with this reason."""
    return {f"{MERGING}test_{name}[{strategy}]": why for strategy in strategies}


class Peft:
    """Layers, target matching and merging by PEFT; it has neither this file format nor a router."""

    name = "PEFT"
    version = peft.__version__
    missing: ClassVar = {
        "write_card": OWN_FORMAT,
        "read_card": OWN_FORMAT,
        "bind": "PEFT does not tell what the weights of an adapter bind to",
        "make_router": "PEFT has no router",
        "extract": "PEFT makes no adapter of two models' weights",
    }
    expected_failures: ClassVar = {
        "R3.11": {
            f"test_r03_manager.py::test_{name}": HEADS
            for name in (
                "a_target_matches_the_names_that_end_with_it_at_a_dot",
                "all_linear_leaves_out_what_has_an_output_head_anywhere_in_its_name",
            )
        },
        "R20.1": {
            f"{MERGING}test_normalised_weights_are_divided_by_their_sum": FLOAT32,
            **of("factors_that_are_not_finite_are_refused", [*LINEAR, "ties", "dare"], UNCHECKED),
            **of(
                "what_is_no_strategy_no_option_or_no_weight_is_refused",
                ["average", "weighted", "ties", "dare"],
                UNCHECKED,
            ),
        },
        "R20.3": {
            **of("the_merge_of_one_card_is_that_card", LINEAR, FLOAT32),
            **of("the_merge_of_one_card_is_that_card", ["ties", "dare"], ALONE),
            **of("the_order_in_which_cards_are_given_changes_nothing", ["dare"], MASKS),
            **of("weights_scaled_alike_scale_a_sum_and_leave_a_mean_as_it_is", ["ties"], BY_COUNT),
            f"{MERGING}test_the_average_of_equal_cards_is_that_card": FLOAT32,
        },
        "R20.4": {
            **of("a_linear_merge_is_exact_at_the_sum_of_ranks", ["average", "weighted"], FLOAT32),
            **of(
                "a_truncated_linear_merge_is_the_best_approximation_of_its_rank",
                ["average", "weighted", "task_arithmetic"],
                ALONE,
            ),
        },
        "R20.5": {
            f"{MERGING}test_slerp_{name}": NO_SLERP
            for name in (
                "from_the_other_end_is_the_same",
                "of_nearly_parallel_cards_is_linear",
                "reaches_its_end_points",
                "turns_at_constant_angular_speed_while_the_length_goes_linearly",
            )
        },
        "R20.6": {
            f"{MERGING}test_among_entries_of_one_magnitude_ties_keeps_the_first": (
                "which of equal entries are kept is not said",
                "utils/merge_utils.py: magnitude_based_pruning",
            ),
            f"{MERGING}test_ties_is_the_weighted_mean_of_what_agrees_after_trimming": BY_COUNT,
            f"{MERGING}test_ties_keeps_exactly_the_stated_count_of_entries": ALONE,
            f"{MERGING}test_a_density_half_way_between_two_counts_keeps_the_nearer_one": ALONE,
            f"{MERGING}test_where_signs_balance_ties_elects_nothing": (
                "a sum of 0 elects plus",
                "utils/merge_utils.py: calculate_majority_sign_mask",
            ),
        },
        "R20.7": {
            f"{MERGING}test_a_mask_depends_on_seed_module_and_card_name_and_on_nothing_else": MASKS,
            f"{MERGING}test_an_entry_is_dropped_or_rescaled_by_one_over_density": ALONE,
            f"{MERGING}test_dare_refuses_two_cards_of_one_name_as_they_would_share_a_mask": MASKS,
            f"{MERGING}test_density_is_the_share_that_ties_keeps": ALONE,
            f"{MERGING}test_names_that_read_alike_when_put_together_have_masks_of_their_own": ALONE,
            f"{MERGING}test_over_seeds_each_entry_is_kept_as_often_as_density_says_so_that_its_mean"
            "_is_unbiased": ALONE,
            f"{MERGING}test_seeds_of_any_width_have_masks_of_their_own": ALONE,
            f"{MERGING}test_the_share_kept_is_density": ALONE,
            f"{MERGING}test_what_dare_makes_of_several_cards_is_the_sum_of_what_it_makes_of_each": (
                MASKS
            ),
        },
        "R20.8": {
            f"{MERGING}test_task_arithmetic_takes_skills_away_by_negative_weights": FLOAT32,
        },
        "R20.9": {
            **of("a_module_that_a_card_lacks_counts_as_zero", ["weighted"], FLOAT32),
            **of("a_module_that_a_card_lacks_counts_as_zero", ["dare"], MASKS),
            **of("a_module_that_a_card_lacks_counts_as_zero", ["ties"], BY_COUNT),
            **of("cards_of_two_dtypes_merge_into_the_one_that_holds_both", ["weighted"], FLOAT32),
        },
    }

    def forward(self, x: Array, weight: Array, bias: Array | None, terms: Mapping[str, Term]):
        """One adapter for each term, all active; PEFT's scaling is set to weight · scaling."""
        dtype = tensor_of(weight).dtype
        layer = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=dtype)
        model = nn.ModuleDict({"layer": layer})
        with torch.no_grad():
            layer.weight.copy_(tensor_of(weight))
            if bias is not None:
                layer.bias.copy_(tensor_of(bias))
            if terms:
                adapters = {}
                for index, term in enumerate(terms.values()):
                    scaling = term.scaling * term.weight
                    adapters[f"a{index}"] = {"layer": (term.A, term.B, scaling)}
                adapted(model, adapters).set_adapter(list(adapters))
            return array_of(model["layer"](tensor_of(x)))

    def match_targets(self, names: Sequence[str], targets: Sequence[str]) -> list[str]:
        """By PEFT's own matching; all-linear over a module tree with these names."""
        config = peft.LoraConfig(target_modules=list(targets))
        if "all-linear" in targets:
            every = peft.LoraConfig(target_modules="all-linear")
            every = tuners_utils._maybe_include_all_linear_layers(every, tree_of(names))
            config.target_modules = {*every.target_modules, *targets} - {"all-linear"}
        return [name for name in names if tuners_utils.check_target_module_exists(config, name)]

    def merge(self, cards: Sequence[PlainCard], strategy, options, weights, rank) -> PlainCard:
        """One adapter for each card, merged by ΔW at the rank that makes it exact."""
        if strategy not in COMBINATIONS:
            raise NotImplementedError(f"PEFT has no {strategy}")
        if strategy == "cat" and rank is not None:
            raise ValueError("PEFT's cat takes no rank")
        if strategy == "average":
            if weights is not None:
                raise ValueError("an average takes no weights")
            weights = [1 / len(cards)] * len(cards)
        weights = [1.0] * len(cards) if weights is None else list(weights)
        if options.get("normalize"):
            weights = [weight / sum(weights) for weight in weights]
        targets = tuple(sorted({target for card in cards for target in card.target_modules}))
        modules = sorted({module for card in cards for module in card.weights})
        pairs = {module: pair for card in cards[::-1] for module, pair in card.weights.items()}
        dtypes = {pair.A.dtype.name for card in cards for pair in card.weights.values()}
        wide = torch.float64 if "float64" in dtypes else torch.float32
        model = nn.ModuleDict()
        for index, module in enumerate(modules):
            shape = len(pairs[module].A), pairs[module].B.shape[1]
            model[f"m{index}"] = nn.Linear(*shape, bias=False, dtype=wide)
        names = {f"a{index}": card for index, card in enumerate(cards) if card.weights}
        adapters = {name: layers_of(card, modules) for name, card in names.items()}
        if not adapters:
            return PlainCard("merged", 1, 1.0, targets, {}, {}, {})
        ranks = [max((p.A.shape[1] for p in card.weights.values()), default=0) for card in cards]
        majority = {"mass": "total", "count": "frequency"}[options.get("elect", "mass")]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a density of 1 prunes nothing
            peft_model = adapted(model, adapters)  # which draws as many numbers as A has
            torch.manual_seed(options.get("seed", 0))
            peft_model.add_weighted_adapter(
                list(adapters),
                [weight for weight, card in zip(weights, cards, strict=True) if card.weights],
                "merged",
                combination_type=COMBINATIONS[strategy],
                svd_rank=rank or (max(ranks) if strategy in {"ties", "dare"} else sum(ranks)),
                svd_full_matrices=False,  # else a rank above min(in, out) is an error
                density=options.get("density", 0.5),
                majority_sign_method=majority,
            )
        dtype = dtypes.pop() if len(dtypes) == 1 else str(wide).removeprefix("torch.")
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        merged = {}
        for module, layer in zip(modules, model.values(), strict=True):
            a, b = (array_of(part["merged"].weight.T) for part in (layer.lora_A, layer.lora_B))
            merged[module] = PlainPair(a.astype(kind), b.astype(kind), layer.scaling["merged"])
        largest = max(pair.A.shape[1] for pair in merged.values())
        return PlainCard("merged", largest, float(largest), targets, merged, {}, {})


def layers_of(card: PlainCard, modules: Sequence[str]) -> dict[str, tuple[Array, Array, float]]:
    """A card's factors and scalings by the names of the layers that stand for its modules."""
    plain = card.alpha / card.rank
    return {
        f"m{modules.index(module)}": (a, b, plain if scaling is None else scaling)
        for module, (a, b, scaling) in card.weights.items()
    }


def adapted(model: nn.Module, adapters: Mapping[str, Mapping[str, tuple[Array, Array, float]]]):
    """PEFT's model of this one with these adapters: name -> module -> (A, B, scaling)."""
    wrapped = None
    for name, modules in adapters.items():
        rank = max((a.shape[1] for a, _, _ in modules.values()), default=1)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules))
        if wrapped is None:
            wrapped = peft.PeftModel(model, config, name, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
        for module, (a, b, scaling) in modules.items():
            layer = model[module]
            dtype = layer.weight.dtype
            layer.lora_A[name].weight.data = tensor_of(np.ascontiguousarray(a.T)).to(dtype)
            layer.lora_B[name].weight.data = tensor_of(np.ascontiguousarray(b.T)).to(dtype)
            layer.scaling[name] = scaling
    return wrapped.base_model


def tree_of(names: Sequence[str]) -> nn.Module:
    """A module with Linears of these names; one may hold others."""
    root = nn.Module()
    for name in sorted(names, key=lambda name: name.count(".")):
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, nn.Linear(1, 1))
    return root


BINDING = Peft()
