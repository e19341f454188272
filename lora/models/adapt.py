"""adapt(model, adapters) -> model': a rewrite that never touches its input.

First the cards are bound to the model's Linears (one walk over the module tree), then the whole
model is copied (`lora.models.twins`). Copying only the changed path is not enough: hooks and
``train()`` on the result would still reach the original.

Requirements: R1, R2, R3, R5, R7, R8, R17.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lora.card import Adapters, AdapterSet, LoRACard
from lora.checks import integer
from lora.errors import (
    ArgumentError,
    ConflictError,
    StateError,
    TargetError,
    UnsupportedModelError,
    shown,
)
from lora.factors import initial
from lora.models.folding import FusedExperts, Update, fold_experts, updates_of
from lora.models.layers import (
    WIDE,
    LoRALinear,
    NeverCalled,
    Terms,
    TrainableLinear,
    check_linear,
    dense_weight,
    features,
    folded,
    is_linear,
    is_plain,
    warn_unbound,
)
from lora.models.rows import Probe, RowLinear, carrying, check_rows, probe_terms
from lora.models.twins import Twins
from lora.targets import (
    Injection,
    Site,
    check_fingerprint,
    fingerprint_of,
    listed,
    not_all_bound,
    plan,
    require_bound,
    targeted_modules,
)

M = TypeVar("M", bound=nn.Module)

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def adapt(model: M, adapters: Adapters, *, check_base: bool = True, strict: bool = False) -> M:
    """Return a model that computes what `model` does plus the adapters' low-rank terms.

    The result shares the storage of every parameter with `model`, and no other mutable object.
    Experts fused in one parameter are folded in a copy; `lora.models.adapt.injections` tells its
    bytes.

    Args:
        model: Any module tree. ``adapt(adapt(m, a), b)`` equals ``adapt(m, a | b)``.
        adapters: An `AdapterSet`, a card, a mapping or an iterable of cards.
        check_base: Refuse a card whose base fingerprint is another model's.
        strict: Refuse a card that names anything the model does not have.

    Warns:
        UnboundWarning: A card takes effect only in part; the warning names what is left out.

    Raises:
        TargetError: A card binds to no module.
        ShapeError, BaseModelError, ConflictError, UnsupportedModelError: The adapters do not fit
            the model, or it can't be adapted correctly.

    Examples:
        >>> from lora.card import LowRank
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> card = LoRACard("docs", 1, 1.0, ["0"], {"0": LowRank(np.ones((2, 1)), np.ones((1, 2)))})
        >>> adapted = adapt(model, card)
        >>> type(adapted[0]).__name__, adapted[0].weight.data_ptr() == model[0].weight.data_ptr()
        ('LoRALinear', True)
    """
    adapters = AdapterSet(adapters)
    (bound,) = bindings(model, [adapters], check_base=check_base, strict=strict)
    return build(model, adapters, bound)


def bindings(
    model: nn.Module,
    sets: Iterable[Mapping[str, tuple[LoRACard, float]]],
    *,
    check_base: bool = True,
    strict: bool = False,
    with_experts: bool = True,
) -> list[dict[str, Injection]]:
    """Decide what each card of each set binds to in a model; raise and warn as `adapt` does."""
    sites, modules, experts = _survey(model)
    experts = experts if with_experts else FusedExperts([])
    sites = {**experts.sites, **sites}

    def bind(card: LoRACard, weight: float) -> Injection:
        injection = _plan(sites, experts, card, strict=strict)
        bound = injection.bound
        for name in bound:
            if name in modules:
                check_linear(modules[name], name)
                _check_loaded(modules[name], name)
            else:
                experts.check(model, name)
        if check_base and bound and card.base_fingerprint is not None:
            check_fingerprint(card, injection, _fingerprint(modules, experts, bound))
        terms = {
            name: (card.weights[key], weight) for name, key in bound.items() if name in modules
        }
        existing = {
            name: layer.terms[card.name]
            for name, layer in modules.items()
            if isinstance(layer, LoRALinear) and card.name in layer.terms
        }
        if existing not in ({}, terms):
            expected = "the card that the model already has under this name"
            raise ConflictError(f"adapt: {card.name!r}", expected, "another")
        plans[id(card)] = card, injection
        return injection

    plans: dict[int, tuple[LoRACard, Injection]] = {}
    results = [{name: bind(*entry) for name, entry in adapters.items()} for adapters in sets]
    for card, injection in plans.values():
        require_bound(sites, card, injection)
    for card, injection in plans.values():  # only now, so that a call which fails warns not
        parts = [injection.unbound] if injection.unbound else []
        if bypassed := [module for module in injection.bypassed if not sites[module].unused]:
            what = "layers that may never be called (lora.uncalled tells, fold helps)"
            parts.append(f"{what}: {listed(bypassed)}")
        if parts:
            warn_unbound(f"card {card.name!r} takes effect in part: {'; '.join(parts)}")
    return results


def _check_loaded(linear: nn.Module, name: str) -> None:
    """Refuse a Linear whose weight is not there, so that factors could not be put beside it."""
    if any(weight is not None and weight.is_meta for weight in linear._parameters.values()):
        hook = vars(linear).get("_hf_hook")
        actual = f"a meta tensor (offloaded by {type(hook).__name__})" if hook else "a meta tensor"
        hint = "load the model with its weights, without offloading, and adapt it then"
        raise UnsupportedModelError(f"module {name!r}", "a weight in memory", actual, hint)


def build(
    model: M, adapters: AdapterSet, bound: Mapping[str, Injection], *, fold_up_to: float = -1
) -> M:
    """Return the model that `adapt` describes, from what its cards are bound to already.

    Float32 and float64 layers are folded if their weights have at most `fold_up_to` bytes; fused
    experts always are.
    """
    is_fused = any(injection.folded_bytes for injection in bound.values())
    places = FusedExperts(model.named_modules()).places if is_fused else {}
    experts: dict[nn.Module, dict[str, list[Update]]] = {}
    for tensor, updates in updates_of(places, adapters, bound).items():
        owner, _, leaf = tensor.rpartition(".")
        experts.setdefault(model.get_submodule(owner), {})[leaf] = updates
    layers = _layers(model, [adapters], [bound], without=places)
    weights = [layer.get_parameter("weight") for layer in layers if is_plain(layer)]
    folds = sum(weight.nbytes for weight in weights if weight.dtype in WIDE) <= fold_up_to

    def make(module: nn.Module, argument: Any, *, memo: Twins) -> nn.Module:
        if module in experts:
            return fold_experts(module, argument, memo)
        return (folded if folds and is_plain(module) else LoRALinear)(module, argument, memo=memo)

    return _rewrite(model, make, experts | {layer: terms for layer, (terms,) in layers.items()})


def fold(model: M, *, narrow: bool = False) -> M:
    """Return a model whose adapted layers are Linears of ``W + ΔW``.

    A forward has no overhead; a copy of the touched weights takes memory. Quantised weights are
    dequantised.

    Args:
        model: A model that `adapt` returned.
        narrow: Fold float16 and bfloat16 layers too. The sum is formed in float32 and rounded once,
            which loses the parts of ΔW that are smaller than the weight's rounding. Without
            `narrow` these layers keep their factors.

    Warns:
        UnboundWarning: Some layers kept their factors, which a saved state dict lacks.

    Raises:
        UnsupportedModelError: A layer does not compute ``x Wᵀ + b``, or its weight is quantised
            and can't be dequantised.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
        >>> card = init_card(model, "docs", rank=1, alpha=1, target_modules="0", seed=0)
        >>> fold(adapt(model, card))
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    layers = _adapted(model)
    result = _rewrite(model, partial(folded, narrow=narrow), layers)
    if kept := len(_adapted(result)):
        what = "layers of float16 or bfloat16 stay factored; fold(model, narrow=True) folds them"
        warn_unbound(f"fold: {kept} of {len(layers)} adapted {what}")
    return result


def adapt_rows(
    model: M,
    sets: Sequence[Adapters],
    *,
    probe: Probe = None,
    check_base: bool = True,
    strict: bool = False,
) -> M:
    """Return a model in which each row of a batch has one of several adapter sets.

    `lora.rows` names the set of each row, by position, around a forward, ``generate`` or
    ``encode``; outside of it the model raises `StateError`.

    Args:
        model: A module whose Linears get the rows of the batch in their first dimension, or each
            row k times in succession, as with beams and flattened tokens.
        probe: Keyword arguments of a forward over rows of unequal length. A copy runs it first, to
            see whether the model mixes rows. Default: texts for an ``encode``, or the
            ``dummy_inputs`` of transformers. False: nothing is tried.
        sets: For each index that `lora.rows` may name, an `AdapterSet` or what makes one.
        check_base, strict: As for `adapt`.

    Raises:
        UnsupportedModelError: The model mixes rows, as time-major and routed layouts do.
        ArgumentError: There is no set, or nothing to probe the model with.
        LoRAError: The other errors are those of `adapt`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> rowwise = adapt_rows(model, [{}, {}], probe=False)  # see `lora.rows`
    """
    if not isinstance(sets, Sequence) or not sets:
        raise ArgumentError("adapt_rows: sets", "a list of adapter sets", shown(sets))
    adapter_sets = [AdapterSet(adapters) for adapters in sets]
    bound = bindings(model, adapter_sets, check_base=check_base, strict=strict)
    return build_rows(model, adapter_sets, bound, probe=probe)


def build_rows(
    model: M,
    sets: Sequence[AdapterSet],
    bound: Sequence[Mapping[str, Injection]],
    *,
    probe: Probe = None,
) -> M:
    """Return the model that `adapt_rows` describes, from what its cards are bound to already."""
    try:
        layers = _layers(model, sets, bound)
    except AttributeError as error:  # no module of that name
        expected, problem = "cards for Linears", "one for fused experts"
        hint = "adapt a model with this card, which folds its experts"
        raise UnsupportedModelError("rows", expected, problem, hint) from error
    if layers and probe is not False:
        copy = _rewrite(model, RowLinear, {layer: probe_terms(layer) for layer in layers})
        check_rows(carrying(copy).eval(), probe)
    return carrying(_rewrite(model, RowLinear, layers))


def init_card(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    seed: int,
) -> LoRACard:
    """Return an untrained card: for each targeted Linear, A is uniform in ±1/√in and B is zero.

    Args:
        rank: Of every module, even one with smaller dimensions.
        alpha: ΔW is scaled by alpha / rank.
        target_modules: As in `LoRACard`.
        seed: The same seed gives the same card.

    Raises:
        ArgumentError: The seed is no integer of at least 0.
        TargetError: No module matches.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> init_card(model, "docs", rank=1, alpha=1, target_modules="0", seed=0).weights
        mappingproxy({'0': LowRank(4 -> 1 -> 2, float32, scaling=1.0)})
    """
    rng = np.random.default_rng(integer(seed, "init_card: seed", 0))
    sites = linears(model)
    empty = LoRACard(name, rank, alpha, target_modules, {})  # type: ignore[arg-type]
    targeted = sorted(targeted_modules(sites, empty.target_modules))
    if not targeted:
        expected = f"modules that match {list(empty.target_modules)}"
        raise TargetError(f"card {name!r}", expected, "none in the model")
    weights = {
        module: initial(sites[module].in_features, sites[module].out_features, empty.rank, rng)
        for module in targeted
    }
    return replace(empty, weights=weights)


def trainable(model: M, card: LoRACard, *, dropout: float = 0.0) -> M:
    """Return a model whose only trainable parameters are copies of the card's factors."""
    bound = bindings(model, [AdapterSet(card)], with_experts=False)[0][card.name].bound
    layers = {model.get_submodule(name): card.weights[key] for name, key in bound.items()}
    if any(isinstance(layer, LoRALinear) for layer in layers):
        expected = "plain Linears to train on"
        raise UnsupportedModelError(f"card {card.name!r}", expected, "adapted ones", "fold it")
    return _rewrite(model, partial(TrainableLinear, dropout=dropout), layers)


def trained_card(model: nn.Module, card: LoRACard) -> LoRACard:
    """Return the card with the factors that `model`, made by `trainable` from it, has now."""
    (sites, modules, _), weights = _survey(model), dict(card.weights)
    for name, key in plan(sites, card).bound.items():
        layer = modules[name]
        if not isinstance(layer, TrainableLinear):
            expected = "a layer made trainable from this card"
            raise StateError(f"module {name!r}", expected, type(layer).__name__)
        weights[key] = layer.learned()
    return replace(card, weights=weights)


def injections(
    model: nn.Module, adapters: Adapters, *, strict: bool = False
) -> dict[str, Injection]:
    """Report by name what each card would bind to; one that binds to nothing raises no error.

    Raises:
        ShapeError: A card does not fit a module that it names.
        TargetError: A name fits two modules, or with `strict` none.

    Examples:
        >>> card = LoRACard("docs", 1, 1.0, ["query"], {})
        >>> injections(nn.Sequential(nn.Linear(2, 2)), card)["docs"].unbound
        "targets not found: 'query'"
    """
    sites, _, experts = _survey(model)
    sites = {**experts.sites, **sites}
    cards = (card for card, _ in AdapterSet(adapters).values())
    return {card.name: _plan(sites, experts, card, strict=strict) for card in cards}


def _plan(
    sites: Mapping[str, Site], experts: FusedExperts, card: LoRACard, *, strict: bool = False
) -> Injection:
    injection = plan(sites, card, strict=strict)
    if not experts.places:
        return injection
    folded_bytes = experts.nbytes(name for name in injection.bound if name in experts.places)
    return replace(injection, folded_bytes=folded_bytes)


def check_module(model: object) -> None:
    """Refuse a model that is not a torch module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError("model", "a torch module", type(model).__name__)


def linears(model: nn.Module) -> dict[str, Site]:
    """Return every name of every Linear and Conv1D in a model, with its shape.

    Examples:
        >>> linears(nn.Sequential(nn.Linear(4, 2)))["0"].in_features
        4
    """
    return _survey(model)[0]


def _survey(model: nn.Module) -> tuple[dict[str, Site], dict[str, nn.Module], FusedExperts]:
    """Return the sites by every name, the Linears by their first, and the fused experts."""
    check_module(model)
    walk = list(model.named_modules(remove_duplicate=False))
    linear = [(name, module) for name, module in walk if is_linear(module)]
    first_names = {module: name for name, module in reversed(walk)}
    embeddings = {id(module.weight) for _, module in walk if isinstance(module, nn.Embedding)}
    # Modules below the first may have their weights used without being called.
    fused, unused = (
        tuple(name and f"{name}." for name, module in walk if isinstance(module, kinds))
        for kinds in (_FUSED, NeverCalled)
    )
    sites = {
        name: Site(
            *features(module),
            owner=first_names[module],
            head=id(module._parameters.get("weight")) in embeddings,
            bypassed=name.startswith(fused + unused),
            unused=name.startswith(unused),
        )
        for name, module in linear
    }
    experts = FusedExperts((name, module) for module, name in first_names.items())
    return sites, {first_names[module]: module for _, module in linear}, experts


def fingerprint(model: nn.Module, card: LoRACard) -> str:
    """Return the SHA-256 of the base weights that a card adapts.

    It covers the weights under the card's own keys, so that wrapping the base does not change it.

    Raises:
        TargetError: Not every module of the card binds.
        ShapeError: The card does not fit a module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> card = init_card(model, "docs", rank=1, alpha=1, target_modules="0", seed=0)
        >>> fingerprint(model, card) == fingerprint(adapt(model, card), card)
        True
    """
    sites, modules, experts = _survey(model)
    injection = plan({**experts.sites, **sites}, card)
    require_bound(sites, card, injection)
    if missing := injection.weights_not_used:  # the rest would have another base's fingerprint
        raise not_all_bound(card, missing)
    return _fingerprint(modules, experts, injection.bound)


def _fingerprint(
    modules: Mapping[str, nn.Module], experts: FusedExperts, bound: Mapping[str, str]
) -> str:
    def entry(key: str, name: str) -> tuple[str, str, tuple[int, ...], Any]:
        if name in modules:
            weight = dense_weight(modules[name], lambda: f"module {name!r}")
        else:
            weight = experts.weight(name)
        weight = weight.cpu().contiguous()
        dtype = str(weight.dtype).removeprefix("torch.")
        return key, dtype, tuple(weight.shape), [weight.view(torch.uint8).numpy()]

    keys = sorted((key, name) for name, key in bound.items())
    return fingerprint_of(entry(key, name) for key, name in keys)


def uncalled(model: nn.Module, *inputs: Any, **options: Any) -> tuple[str, ...]:
    """Run a forward with these inputs on a copy; return the adapted layers that it never calls.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> card = init_card(model, "docs", rank=1, alpha=1, target_modules="0", seed=0)
        >>> uncalled(adapt(model, card), torch.ones(1, 2))
        ()
    """
    copy = _rewrite(model, _Witness, _adapted(model))
    with torch.no_grad():
        copy(*inputs, **options)
    return tuple(
        name for name, m in copy.named_modules() if isinstance(m, _Witness) and not m.called
    )


class _Witness(LoRALinear):
    """Notes that its forward was called; a hook would switch torch's fused paths off."""

    called = False

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.called = True
        return super().forward(x, *arguments, **options)


def _adapted(model: nn.Module) -> dict[nn.Module, Terms]:
    """Return the layers that have terms, with these; those of rows have no terms for all rows."""
    check_module(model)
    if any(isinstance(layer, RowLinear) for layer in model.modules()):
        expected, hint = "one set of adapters for all rows", "adapt the base with one of the sets"
        raise UnsupportedModelError("model", expected, "a model of adapt_rows", hint)
    return {layer: layer.terms for layer in model.modules() if isinstance(layer, LoRALinear)}


def _layers(
    model: nn.Module,
    sets: Sequence[AdapterSet],
    bound: Sequence[Mapping[str, Injection]],
    without: Collection[str] = (),
) -> dict[nn.Module, list[Terms]]:
    layers: dict[nn.Module, list[Terms]] = {}
    for index, adapters in enumerate(sets):
        for name, (card, weight) in adapters.items():
            for path, key in bound[index][name].bound.items():
                if path in without:
                    continue
                linear = model.get_submodule(path)
                known = linear.terms if isinstance(linear, LoRALinear) else {}
                terms = layers.setdefault(linear, [dict(known) for _ in sets])
                terms[index][name] = card.weights[key], weight
    return layers


def _rewrite(model: M, make: Callable[..., nn.Module], arguments: Mapping[Any, object]) -> M:
    """Copy a model; `make`, from a module and its argument, makes what takes its place."""
    replacements: dict[nn.Module, Callable[..., nn.Module]] = {
        layer: partial(make, layer, argument) for layer, argument in arguments.items()
    }
    try:
        return Twins(model, replacements)(model)  # type: ignore[no-any-return]
    except RecursionError:
        expected = "objects that are nested less deeply than Python's limit of recursion"
        raise UnsupportedModelError("model", expected, "deeper ones") from None


fresh, trained = init_card, trained_card  # their earlier names
