"""mergekit's merge methods on ΔW over a base of zeros, a tensor a module, and its extraction."""

from importlib.metadata import version

import numpy as np
import torch
from declared import failures
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
FAILURES = failures(
    "test_r20_merging.py",
    (
        "masks are drawn one after the other from torch's generator, which takes 32 bits of a seed",
        "sparsify.py:130",
        """
        R20.3 the_order_in_which_cards_are_given_changes_nothing dare
        R20.7 what_dare_makes_of_several_cards_is_the_sum_of_what_it_makes_of_each
        R20.7 a_mask_depends_on_seed_module_and_card_name_and_on_nothing_else
        R20.7 names_that_read_alike_when_put_together_have_masks_of_their_own
        R20.7 seeds_of_any_width_have_masks_of_their_own
        R20.7 dare_refuses_two_cards_of_one_name_as_they_would_share_a_mask
        """,
    ),
    (
        "what DARE keeps is scaled to the L1 norm from before, not by 1 / density, and in float32",
        "sparsify.py:41",
        "R20.7 an_entry_is_dropped_or_rescaled_by_one_over_density",
    ),
    (
        "TIES keeps int(density * n) entries, by an argsort in float32 that is not stable",
        "sparsify.py:68",
        """
        R20.6 ties_keeps_exactly_the_stated_count_of_entries
        R20.6 a_density_half_way_between_two_counts_keeps_the_nearer_one
        R20.6 among_entries_of_one_magnitude_ties_keeps_the_first
        """,
    ),
    (
        "TIES divides by the sum of the weights with their signs",
        "merge_methods/generalized_task_arithmetic.py:134",
        "R20.6 ties_is_the_weighted_mean_of_what_agrees_after_trimming",
    ),
    (
        "a sum of 0 elects plus",
        "merge_methods/generalized_task_arithmetic.py:165",
        "R20.6 where_signs_balance_ties_elects_nothing",
    ),
    (
        "SLERP goes tensor by tensor, keeps no length, and is linear above a cosine of 0.9995",
        "merge_methods/slerp.py:64",
        """
        R20.5 slerp_turns_at_constant_angular_speed_while_the_length_goes_linearly
        R20.5 slerp_of_opposite_cards_or_of_nothing_is_refused
        """,
    ),
    (
        "of tensors and numbers no values are looked at",
        "merge_methods/batching.py:121",
        """
        R20.1 factors_that_are_not_finite_are_refused average weighted task_arithmetic ties dare
        R20.1 what_is_no_strategy_no_option_or_no_weight_is_refused weighted slerp
        """,
    ),
    (
        "a density above 1 is taken for 1, and 0 is taken",
        "sparsify.py:63",
        "R20.1 what_is_no_strategy_no_option_or_no_weight_is_refused ties dare",
    ),
)
FAILURES |= failures(
    "test_r16_extraction.py",
    (
        "the difference is factored in float32, whatever its dtype",
        "scripts/extract_lora.py:237",
        """
        R16.1 the_error_is_that_of_the_tail_singular_values
        R16.1 what_is_left_is_orthogonal_to_what_was_taken
        R16.2 a_difference_of_no_higher_rank_is_extracted_exactly
        R16.2 at_full_rank_nothing_is_lost
        R16.3 the_base_with_the_card_gives_what_the_tuned_model_gives
        R16.3 extracting_from_the_base_with_the_card_gives_the_card_again
        """,
    ),
)


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
    expected_failures = FAILURES
    domains = {
        "extract": {"rules": ["rank"]},
        "merge": {"strategies": {strategy: ELECT.get(strategy, {}) for strategy in METHODS}},
    }

    def merge(self, cards, strategy, options, weights, rank):
        """One group of tensors for each module."""
        if strategy not in METHODS or not cards or (rank is not None and rank < 1):
            raise ValueError(f"no method {strategy!r}, no models or no rank")
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
    """The pair of this rank nearest to ΔW, none if that is 0; what is not finite is kept whole."""
    if not change.isfinite().all():
        return PlainPair(array_of(change.T).astype(dtype), np.eye(len(change), dtype=dtype), 1.0)
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
