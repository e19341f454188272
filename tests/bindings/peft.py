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
FLOAT32 = "weights are float32, so a merge in float64 is exact to 1e-7 only"


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
        "R3.11": "all-linear leaves out the output embedding of a Hugging Face model only: by what "
        "it is, not by its name",
        "R20.1": "there is no SLERP; factors, weights and options are not checked",
        "R20.3": "weights are float32; one card alone is merged as 'linear' at any density; TIES "
        "divides by the number of cards, not by their weights; DARE's masks follow the order of "
        "the cards",
        "R20.4": FLOAT32,
        "R20.5": "there is no SLERP",
        "R20.6": "TIES elects signs before it applies weights, and divides by the number of cards; "
        "a sum of 0 elects plus; one card alone is not trimmed; which of equal entries are kept is "
        "not said",
        "R20.7": "DARE draws all masks from one generator, in order; one card alone loses nothing",
        "R20.8": FLOAT32,
        "R20.9": "DARE's mask for a module depends on which other modules a card has",
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
        torch.manual_seed(options.get("seed", 0))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a density of 1 prunes nothing
            adapted(model, adapters).add_weighted_adapter(
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
