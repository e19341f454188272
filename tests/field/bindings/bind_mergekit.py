"""mergekit's merge methods on ΔW over a base of zeros, a tensor a module, and its extraction."""

from importlib.metadata import version

import numpy as np
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from mergekit.scripts.extract_lora import TaskVectorDecompositionTask
from serve import PlainCard, PlainPair
from torched import all_but, array_of, tensor_of

METHODS = {"average": "linear", "weighted": "linear", "slerp": "slerp", "ties": "ties"}
METHODS |= {"task_arithmetic": "task_arithmetic", "dare": "dare_linear"}
OVER_A_BASE = ("task_arithmetic", "ties", "dare")
TRUNCATED = ("ties", "dare")
ELECT = {"ties": {"elect": ["mass"]}}


def change_of(card, module, shape):
    """ΔW (out, in) in float64, 0 where the card has no such module."""
    if module not in card.weights:
        return torch.zeros(shape, dtype=torch.float64)
    a, b, scaling = card.weights[module]
    factor = card.alpha / card.rank if scaling is None else scaling
    return (tensor_of(a).double() @ tensor_of(b).double()).T * factor


def parameters_of(strategy, options, weights, count):
    """Mergekit's parameters; an option that is left over is refused there."""
    options = dict(options)
    if strategy in ("average", "slerp") and weights is not None:
        raise ValueError("this method takes no weights")
    parameters = {"weight": [1.0] * count if weights is None else list(weights)}
    match strategy:
        case "average":
            parameters["normalize"] = True
        case "weighted":
            parameters["normalize"] = bool(options.pop("normalize", False))
        case "slerp":
            parameters = {"t": options.pop("t", 0.5)}
        case "ties":
            if (elect := options.pop("elect", "mass")) != "mass":
                raise ValueError(f"no election by {elect}")
            parameters["density"] = [options.pop("density", 0.5)] * count
        case "dare":
            torch.manual_seed(options.pop("seed", 0))
            parameters["density"] = [options.pop("density", 0.5)] * count
    return parameters | options


class Mergekit:
    """A merged ΔW is factored by torch's SVD, as mergekit merges whole weights."""

    name, version = "mergekit", version("mergekit")
    missing = all_but("extract merge", "no such function")
    domains = {
        "extract": {"rules": ["rank"]},
        "merge": {"strategies": {strategy: ELECT.get(strategy, {}) for strategy in METHODS}},
    }

    def merge(self, cards, strategy, options, weights, rank):
        """One group of tensors for each module."""
        if strategy not in METHODS:
            raise ValueError(f"no method {strategy!r}")
        parameters = parameters_of(strategy, options, weights, len(cards))
        shapes = {}
        for card in cards:
            for module, (a, b, _) in card.weights.items():
                shapes.setdefault(module, (b.shape[1], a.shape[0]))
        groups = []
        for module in sorted(shapes):
            changes = [change_of(card, module, shapes[module]) for card in cards]
            if strategy in OVER_A_BASE:
                changes = [torch.zeros_like(changes[0]), *changes]
            base = None if METHODS[strategy] == "linear" else 0
            groups.append(TensorGroup.from_tensors(changes, base_index=base, name=module))
        results = registry.get(METHODS[strategy])(groups, parameters=parameters)
        dtypes = {pair.A.dtype for card in cards for pair in card.weights.values()}
        wide = np.dtype("f8") if np.dtype("f8") in dtypes else np.dtype("f4")
        dtype = dtypes.pop() if len(dtypes) == 1 else wide
        merged = {}
        for module, change in zip(sorted(shapes), results, strict=True):
            ranks = [card.weights[module].A.shape[1] for card in cards if module in card.weights]
            largest = rank or (max(ranks) if strategy in TRUNCATED else min(change.shape))
            if pair := factored(change, largest, dtype):
                merged[module] = pair
        targets = tuple(sorted({target for card in cards for target in card.target_modules}))
        return card_of("merged", targets, merged)

    def extract(self, base, tuned, rank, energy, error):
        """By `mergekit-extract-lora`'s decomposition, which takes a rank alone."""
        weights = {}
        for key in sorted(base):
            change = tensor_of(tuned[key]) - tensor_of(base[key])
            if change.any():
                task = TaskVectorDecompositionTask.model_construct(
                    max_rank=rank, distribute_scale=True, transpose=False, sv_epsilon=0
                )
                a, b = task.execute(change)
                module = key.removesuffix("weight").removesuffix(".")
                weights[module] = PlainPair(array_of(a.T), array_of(b.T), 1.0)
        return card_of("extracted", tuple(sorted(weights)), weights)


def factored(change, rank, dtype):
    """The pair of this rank nearest to ΔW, none if that is 0."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    rank = min(rank, int((s > 1e-13 * s[0]).sum()))
    root = s[:rank].sqrt()
    a, b = array_of(v[:rank].T * root), array_of((u[:, :rank] * root).T)
    return PlainPair(a.astype(dtype), b.astype(dtype), 1.0) if rank else None


def card_of(name, targets, weights):
    """A card whose scalings are stated."""
    largest = max((pair.A.shape[1] for pair in weights.values()), default=1)
    return PlainCard(name, largest, float(largest), targets, weights, {}, {})


BINDING = Mergekit()
