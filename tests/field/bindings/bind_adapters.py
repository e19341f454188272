"""AdapterHub's adapters: its LoRA around a Linear, and `average_adapter` by "lora_delta_w_svd"."""

import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")

import numpy as np
import torch
from adapters.composition import parse_composition
from adapters.configuration import LoRAConfig, ModelAdaptersConfig
from adapters.methods.lora import LoRALinear
from declared import failures
from serve import PlainCard, PlainPair
from torched import LayerBinding, all_but, array_of, linear_of, put, tensor_of

LINEAR = ("average", "weighted", "task_arithmetic")
FAILURES = failures(
    "test_r20_merging.py",
    (
        "a merge by SVD has r = svd_rank and the parents' alpha, so that ΔW is off by r / svd_rank",
        "model_mixin.py:1758",
        """
        R20.1 normalised_weights_are_divided_by_their_sum
        R20.2 every_factorisation_of_one_change_gives_the_same_merge average
        R20.2 every_factorisation_of_one_change_gives_the_same_merge weighted task_arithmetic
        R20.3 the_merge_of_one_card_is_that_card average weighted task_arithmetic
        R20.4 a_linear_merge_is_exact_at_the_sum_of_ranks average weighted task_arithmetic
        R20.4 a_truncated_linear_merge_is_the_best_approximation_of_its_rank average weighted
        R20.4 a_truncated_linear_merge_is_the_best_approximation_of_its_rank task_arithmetic
        R20.8 task_arithmetic_takes_skills_away_by_negative_weights
        """,
    ),
    (
        "neither factors nor weights are checked, and names beyond the weights are left out",
        "model_mixin.py:1775",
        """
        R20.1 factors_that_are_not_finite_are_refused average weighted task_arithmetic
        R20.1 what_is_no_strategy_no_option_or_no_weight_is_refused weighted
        """,
    ),
)


def layer_of(weight, bias, pairs):
    """AdapterHub's Linear with these adapters, name -> (A, B, scaling), and its configuration."""
    config = ModelAdaptersConfig()
    dtype = str(tensor_of(weight[:0]).dtype).removeprefix("torch.")
    layer = LoRALinear.wrap(linear_of(weight, bias), "selfattn", None, config)
    for name, (a, b, scaling) in pairs.items():
        rank = a.shape[1]
        config.add(name, LoRAConfig(r=rank, alpha=scaling * rank, dtype=dtype))
        layer.add_adapter(name, 0)
        put(layer.loras[name].lora_A, a.T)
        put(layer.loras[name].lora_B, b.T)
    return layer, config


class Adapters(LayerBinding):
    """Several adapters are averaged or stacked there, which is no sum."""

    name, version = "adapters", version("adapters")
    missing = all_but("forward merge", "no such function")
    expected_failures = FAILURES
    domains = {
        "forward": {"terms": 1},
        "merge": {"strategies": {strategy: {} for strategy in LINEAR}, "cards": "alike"},
    }

    def layer(self, weight, bias, terms):
        pairs = {}
        for term in terms:
            pairs["a"] = term.A, term.B, term.scaling * term.weight
        layer, config = layer_of(weight, bias, pairs)
        if pairs:
            config.active_setup = parse_composition("a")
        return layer.eval()

    def merge(self, cards, strategy, options, weights, rank):
        """Module by module, as `model.average_adapter` does: alpha is kept, r is `svd_rank`."""
        if strategy not in LINEAR or options.keys() - {"normalize"} or not cards:
            raise ValueError("no such strategy or option, or no adapters")
        modules = sorted({module for card in cards for module in card.weights})
        weights = [1.0] * len(cards) if weights is None else list(weights)
        total = sum(weights) if options.get("normalize", strategy == "average") else 1.0
        shares = {f"a{index}": weight / total for index, weight in enumerate(weights)}
        merged = {}
        for module in modules:
            pairs = {}
            for index, card in enumerate(cards):
                a, b, scaling = card.weights[module]
                own = card.alpha / card.rank if scaling is None else scaling
                pairs[f"a{index}"] = a, b, own
            merged[module] = self.merged(pairs, shares, rank)
        largest = max((pair.A.shape[1] for pair in merged.values()), default=1)
        targets = tuple(sorted({target for card in cards for target in card.target_modules}))
        return PlainCard("merged", largest, float(largest), targets, merged, {}, {})

    def merged(self, pairs, shares, rank):
        """One module's pair; configurations that differ are refused at model_mixin.py:1746."""
        a, b, _ = pairs["a0"]
        shape = b.shape[1], a.shape[0]
        svd_rank = min(len(pairs) * a.shape[1] if rank is None else rank, *shape)
        layer, config = layer_of(np.zeros(shape, a.dtype), None, pairs)
        config.add("merged", config.get("a0").replace(r=svd_rank))  # as model_mixin.py:1758
        with torch.no_grad():
            layer.average_adapter("merged", shares, "lora_delta_w_svd", svd_rank=svd_rank)
        lora = layer.loras["merged"]
        return PlainPair(array_of(lora.lora_A.T), array_of(lora.lora_B.T), float(lora.scaling))


BINDING = Adapters()
