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
from tests.field.bindings.declared import failures

COMBINATIONS = dict.fromkeys(["average", "weighted", "task_arithmetic"], "svd")
COMBINATIONS |= {"cat": "cat", "ties": "ties_svd", "dare": "dare_linear_svd"}
"""PEFT's ways of merging ΔW; its "linear", "ties" and "dare_linear" merge A and B apart."""

OWN_FORMAT = "PEFT stores adapters as a directory of safetensors and JSON"
FAILURES = failures(
    "test_r03_manager.py",
    (
        "all-linear leaves out a Hugging Face model's output embedding, whatever its name",
        "tuners/tuners_utils.py:2465",
        """
        R3.11 a_target_matches_the_names_that_end_with_it_at_a_dot
        R3.11 all_linear_leaves_out_what_has_an_output_head_anywhere_in_its_name
        """,
    ),
)
FAILURES |= failures(
    "test_r20_merging.py",
    (
        "weights are float32, so a merge in float64 is exact to 1e-7 only",
        "tuners/lora/model.py:965",
        """
        R20.1 normalised_weights_are_divided_by_their_sum
        R20.3 the_average_of_equal_cards_is_that_card
        R20.4 a_linear_merge_is_exact_at_the_sum_of_ranks average weighted task_arithmetic
        R20.4 a_truncated_linear_merge_is_the_best_approximation_of_its_rank average weighted
        R20.9 cards_of_two_dtypes_merge_into_the_one_that_holds_both weighted
        """,
    ),
    (
        "neither factors nor the number of weights nor options of other methods are checked",
        "tuners/lora/model.py:955",
        """
        R20.1 factors_that_are_not_finite_are_refused average weighted task_arithmetic cat ties dare
        R20.1 what_is_no_strategy_no_option_or_no_weight_is_refused average weighted
        """,
    ),
    (
        "cat gives each module the sum of all cards' ranks, filled up with zeros",
        "tuners/lora/model.py:759",
        "R20.4 a_linear_merge_is_exact_at_the_sum_of_ranks cat",
    ),
    (
        "a density above 1 is taken for 1, and TIES takes 0",
        "utils/merge_utils.py:90",
        "R20.1 what_is_no_strategy_no_option_or_no_weight_is_refused ties dare",
    ),
    (
        "one card alone is merged as 'linear', by float32 roots, whatever svd_rank and density",
        "tuners/lora/model.py:740",
        """
        R20.3 the_merge_of_one_card_is_that_card average weighted task_arithmetic cat ties dare
        R20.4 a_truncated_linear_merge_is_the_best_approximation_of_its_rank task_arithmetic
        R20.7 an_entry_is_dropped_or_rescaled_by_one_over_density
        R20.7 density_is_the_share_that_ties_keeps
        R20.7 names_that_read_alike_when_put_together_have_masks_of_their_own
        R20.7 over_seeds_each_entry_is_kept_as_often_as_density_says_so_that_its_mean_is_unbiased
        R20.7 seeds_of_any_width_have_masks_of_their_own
        R20.7 the_share_kept_is_density
        R20.8 task_arithmetic_takes_skills_away_by_negative_weights
        R20.9 a_module_that_a_card_lacks_counts_as_zero weighted ties
        """,
    ),
    (
        "TIES keeps int(density * n) entries of each of several cards, by topk",
        "utils/merge_utils.py:50",
        """
        R20.6 ties_keeps_exactly_the_stated_count_of_entries
        R20.6 a_density_half_way_between_two_counts_keeps_the_nearer_one
        R20.6 among_entries_of_one_magnitude_ties_keeps_the_first
        """,
    ),
    (
        "TIES elects signs before it applies weights, and divides by the number that agrees",
        "utils/merge_utils.py:140",
        """
        R20.3 weights_scaled_alike_scale_a_sum_and_leave_a_mean_as_it_is ties
        R20.6 ties_is_the_weighted_mean_of_what_agrees_after_trimming
        """,
    ),
    (
        "a sum of 0 elects plus",
        "utils/merge_utils.py:124",
        """
        R20.6 where_signs_balance_ties_elects_nothing
        R20.6 where_some_signs_balance_ties_elects_nothing_there
        """,
    ),
    (
        "DARE draws masks one after the other from torch's generator, by 32 bits of a seed",
        "utils/merge_utils.py:68",
        """
        R20.3 the_order_in_which_cards_are_given_changes_nothing dare
        R20.7 a_mask_depends_on_seed_module_and_card_name_and_on_nothing_else
        R20.7 dare_refuses_two_cards_of_one_name_as_they_would_share_a_mask
        R20.7 what_dare_makes_of_several_cards_is_the_sum_of_what_it_makes_of_each
        R20.9 a_module_that_a_card_lacks_counts_as_zero dare
        """,
    ),
)
"""What PEFT does otherwise, and where in its source."""


class Peft:
    """Layers, target matching and merging by PEFT; it has no such file and no router of texts."""

    name = "PEFT"
    version = peft.__version__
    missing: ClassVar = {
        "write_card": OWN_FORMAT,
        "read_card": OWN_FORMAT,
        "bind": "PEFT does not tell what the weights of an adapter bind to",
        "make_router": "PEFT chooses no adapter by a text; its Arrow weighs them for each token",
        "extract": "PEFT makes no adapter of two models' weights",
    }
    domains: ClassVar = {"merge": {"strategies": {strategy: {} for strategy in COMBINATIONS}}}
    expected_failures: ClassVar = FAILURES

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
        if strategy not in COMBINATIONS or not cards:
            raise ValueError(f"no {strategy!r} or no cards")  # as PEFT, model.py:764 and 768
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
                [weight for weight, card in zip(weights, cards, strict=False) if card.weights],
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
