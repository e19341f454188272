"""adapt(model, adapters) -> model': the rewrite at the heart of the library. It never touches its
input.

Every module object is copied once (so aliases stay aliases), with dictionaries of its own; every
parameter is re-wrapped, detached and frozen over the same storage; buffers, which a forward may
write, are copied. Copying only the path to a target is not enough: ``train()``, ``half()`` or a
hook on the result would reach the modules that both share.

Requirements: R1, R2, R3, R5, R7, R8, R17.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lora.card import Adapters, AdapterSet, LoRACard, LowRank
from lora.errors import (
    BaseModelError,
    ConflictError,
    StateError,
    TargetError,
    UnsupportedModelError,
)
from lora.layer import (
    WIDE,
    LoRALinear,
    Own,
    SegmentedLinear,
    TrainableLinear,
    Uncalled,
    check_linear,
    folded,
    shared_copy,
)
from lora.lowrank import initial
from lora.targets import Injection, Site, fingerprint_of, plan, targeted_modules

M = TypeVar("M", bound=nn.Module)

_HOOKS = frozenset(
    {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
)
_KEPT = frozenset(nn.Module().__dict__) - _HOOKS
_PLAIN = frozenset({bool, int, float, str, type(None), Tensor})


def adapt(model: M, adapters: Adapters, *, check_base: bool = True, strict: bool = False) -> M:
    """A model that computes what `model` does plus the adapters' low-rank terms.

    Args:
        model: Any module tree; adapted models too: ``adapt(adapt(m, a), b)`` equals ``adapt(m, a |
            b)``.
        adapters: An `AdapterSet`, a card, a mapping or an iterable of cards.
        check_base: Refuse a card whose base fingerprint is another model's.
        strict: Refuse a card that names anything the model does not have.

    Returns:
        Shares every parameter's storage with `model` and no mutable object; its parameters are
        frozen.

    Raises:
        ShapeError, TargetError, BaseModelError, ConflictError, UnsupportedModelError: Before
            anything is made.

    Examples:
        >>> import numpy as np
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> card = LoRACard("docs", 1, 1.0, ["0"], {"0": LowRank(np.ones((2, 1)), np.ones((1, 2)))})
        >>> adapted = adapt(model, card)
        >>> type(adapted[0]).__name__, type(model[0]).__name__, adapted[0].weight.data_ptr() == model[0].weight.data_ptr()
        ('LoRALinear', 'Linear', True)
    """
    adapters = AdapterSet(adapters)
    sites = linears(model)
    terms = _existing(model)
    for name, (card, weight) in adapters.items():
        injection = plan(sites, card, strict=strict)
        if check_base:
            check_fingerprint(model, card, injection)
        new = {module: (card.weights[key], weight) for module, key in injection.bound.items()}
        if terms.setdefault(name, new) != new:
            raise ConflictError(
                f"adapt: {name!r}", "the card that the model already has under this name", "another"
            )
    layers: dict[int, dict[str, tuple[LowRank, float]]] = {}
    for name, modules in terms.items():
        for module, term in modules.items():
            layers.setdefault(id(_bindable(model, module)), {})[name] = term

    def convert(module: nn.Module, own: Own) -> nn.Module | None:
        if id(module) not in layers or not isinstance(module, nn.Linear):
            return None
        return LoRALinear.around(module, layers[id(module)], own)

    return _rewrite(model, convert)


def fold(model: M) -> M:
    """A model whose float32 and float64 adapted layers are plain Linears holding ``W + ΔW``.

    It costs no time when it runs, and the memory of the touched weights; narrower layers stay
    factored, since rounding ``W + ΔW`` to them would lose most of a small ΔW. The model given, and
    the base beneath it, stay as they are.
    """

    def convert(module: nn.Module, own: Own) -> nn.Module | None:
        return folded(module, own) if isinstance(module, LoRALinear) and _folds(module) else None

    return _rewrite(model, convert)


def folded_bytes(model: nn.Module) -> int:
    """Bytes of the weights that `fold` would form."""
    return sum(
        layer.weight.nbytes
        for layer in model.modules()
        if isinstance(layer, LoRALinear) and _folds(layer)
    )


def _folds(layer: LoRALinear) -> bool:
    return layer.weight.dtype in WIDE


def adapt_rows(model: M, sets: Sequence[AdapterSet], *, check_base: bool = True) -> M:
    """A model whose bound layers hold several adapter sets, one for each segment of rows of a
    batch.

    Args:
        model: A model, adapted or not, whose forward passes `lora.layer.Segments` on to its
            Linears, as `InferenceCore` does.
        sets: The distinct adapter sets; segments name them by position.
    """
    sites, existing = linears(model), _existing(model)
    layers: dict[int, list[dict[str, tuple[LowRank, float]]]] = {}
    for index, adapters in enumerate(sets):
        for name, (card, weight) in adapters.items():
            injection = plan(sites, card)
            if check_base:
                check_fingerprint(model, card, injection)
            new = {module: (card.weights[key], weight) for module, key in injection.bound.items()}
            if existing.get(name, new) != new:
                raise ConflictError(
                    f"adapt_rows: {name!r}",
                    "the card that the model already has under this name",
                    "another",
                )
            for module, term in new.items():
                linear = _bindable(model, module)
                held = linear.terms if isinstance(linear, LoRALinear) else {}
                layers.setdefault(id(linear), [dict(held) for _ in sets])[index][name] = term

    def convert(module: nn.Module, own: Own) -> nn.Module | None:
        found = id(module) in layers and isinstance(module, nn.Linear)
        return SegmentedLinear(module, layers[id(module)], own) if found else None  # type: ignore[arg-type]

    return _rewrite(model, convert)


def fresh(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    seed: int,
) -> LoRACard:
    """An untrained card for a model: A uniform with |A| <= 1/√in, B zero, one pair per targeted
    Linear.

    Raises:
        TargetError: If no module matches.
    """
    sites, rng = linears(model), np.random.default_rng(seed)
    empty = LoRACard(name, rank, alpha, target_modules, {})  # type: ignore[arg-type]
    modules = sorted(targeted_modules(sites, empty.target_modules))
    if not modules:
        raise TargetError(
            f"card {name!r}",
            f"modules that match {list(empty.target_modules)}",
            "none in the model",
        )
    shapes = {module: (sites[module].in_features, sites[module].out_features) for module in modules}
    return replace(
        empty,
        weights={module: initial(*shape, empty.rank, rng) for module, shape in shapes.items()},
    )


def trainable(model: M, card: LoRACard, *, dropout: float = 0.0) -> M:
    """A model whose only trainable parameters are copies of the card's factors."""
    bound = plan(linears(model), card).bound
    if held := [module for module in bound if isinstance(model.get_submodule(module), LoRALinear)]:
        raise UnsupportedModelError(
            f"modules {held}", "plain Linears to train on", "adapted ones", "fold them first"
        )
    pairs = {id(_bindable(model, module)): card.weights[key] for module, key in bound.items()}

    def convert(module: nn.Module, own: Own) -> nn.Module | None:
        if id(module) not in pairs or not isinstance(module, nn.Linear):
            return None
        return TrainableLinear(module, pairs[id(module)], dropout=dropout, own=own)

    return _rewrite(model, convert)


def trained(model: nn.Module, card: LoRACard) -> LoRACard:
    """The card with the factors that `model`, made by `trainable` from it, holds now."""
    weights = dict(card.weights)
    for module, key in plan(linears(model), card).bound.items():
        layer = model.get_submodule(module)
        if not isinstance(layer, TrainableLinear):
            raise StateError(
                f"module {module!r}", "a layer made trainable from this card", type(layer).__name__
            )
        weights[key] = layer.learned()
    return replace(card, weights=weights)


def injections(
    model: nn.Module, adapters: Adapters, *, strict: bool = False
) -> dict[str, Injection]:
    """What each card would bind to, without doing it."""
    sites = linears(model)
    return {
        name: plan(sites, card, strict=strict) for name, (card, _) in AdapterSet(adapters).items()
    }


def check_module(model: object) -> None:
    """Refuse what is not a torch module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError("model", "a torch module", type(model).__name__)


def linears(model: nn.Module) -> dict[str, Site]:
    """Every name of every Linear in a model, with its shape."""
    check_module(model)
    owners: dict[int, str] = {}
    sites: dict[str, Site] = {}
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    around: dict[
        str, bool
    ] = {}  # name -> whether it may read its children's weights without calling them
    for name, module in model.named_modules(remove_duplicate=False):
        parent = name.rpartition(".")[0] if name else None
        inside = parent is not None and around.get(parent, False)
        around[name] = inside or isinstance(
            module, nn.MultiheadAttention | nn.TransformerEncoderLayer | Uncalled
        )
        if isinstance(module, nn.Linear):
            owner = owners.setdefault(id(module), name)
            head = id(module._parameters.get("weight")) in embeddings
            sites[name] = Site(module.in_features, module.out_features, owner, head, inside)
    return sites


def fingerprint(model: nn.Module, card: LoRACard) -> str:
    """SHA-256 of the base weights that a card binds to: over sorted key, dtype, shape and bytes.

    Keys are the card's, so that one base has one fingerprint whatever model it is wrapped in.
    """
    return _fingerprint(model, plan(linears(model), card))


def check_fingerprint(model: nn.Module, card: LoRACard, injection: Injection) -> None:
    """Refuse a card that was made for other weights than those it binds to."""
    if card.base_fingerprint is None or not injection.bound:
        return
    found = _fingerprint(model, injection)
    if found != card.base_fingerprint:
        raise BaseModelError(
            f"card {card.name!r}: base model {card.base_model or ''}".rstrip(),
            f"weights with fingerprint {card.base_fingerprint}",
            found,
            "check_base=False waives this",
        )


def uncalled(model: nn.Module, *inputs: Any, **options: Any) -> tuple[str, ...]:
    """Adapted layers that a forward of `model` with these inputs never calls, so that their
    adapters have no effect.

    The forward runs on a copy; `model` stays as it is.
    """
    called: set[int] = set()

    def convert(module: nn.Module, own: Own) -> nn.Module | None:
        if not isinstance(module, LoRALinear):
            return None
        witness = shared_copy(module, _Witness, own)
        witness.stands_for, witness.called = id(module), called
        return witness

    with torch.no_grad():
        _rewrite(model, convert)(*inputs, **options)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    return tuple(name for name, module in layers.items() if id(module) not in called)


class _Witness(LoRALinear):
    """Notes that it was called: by its forward, since a hook would switch torch's fused paths off."""

    stands_for: int
    called: set[int]

    def forward(self, x: Tensor) -> Tensor:
        self.called.add(self.stands_for)
        return super().forward(x)


def _rewrite(model: M, convert: Callable[[nn.Module, Own], nn.Module | None]) -> M:
    """Copy a module tree, with `convert` deciding what stands in for a module (None: a copy of it)."""
    _check_sound(model)
    copies: dict[int, nn.Module] = {}
    own = Own()

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in copies:
            copy = convert(module, own) or shared_copy(module, type(module), own)
            copies[id(module)] = copy
            children = (
                module._modules.items()
            )  # an empty container is falsy: only None stays as it is
            copy._modules.update(
                {name: None if child is None else visit(child) for name, child in children}
            )
        return copies[id(module)]

    return visit(model)  # type: ignore[return-value]


def _existing(model: nn.Module) -> dict[str, dict[str, tuple[LowRank, float]]]:
    """Card name -> module -> term, of the adapted layers that a model already has."""
    terms: dict[str, dict[str, tuple[LowRank, float]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            for card, term in module.terms.items():
                terms.setdefault(card, {})[name] = term
    return terms


def _bindable(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    check_linear(module, name)
    return module


def _fingerprint(model: nn.Module, injection: Injection) -> str:
    def entry(key: str, module: str) -> tuple[str, str, tuple[int, ...], Any]:
        weight = model.get_submodule(module).weight.detach().cpu().contiguous()  # type: ignore[operator]
        dtype = str(weight.dtype).removeprefix("torch.")
        return key, dtype, tuple(weight.shape), weight.view(torch.uint8).numpy().data

    bound = sorted((key, module) for module, key in injection.bound.items())
    return fingerprint_of(entry(key, module) for key, module in bound)


def _check_sound(model: nn.Module) -> None:
    """Refuse, by name, what a copy would not make independent."""
    check_module(model)
    for name, module in model.named_modules():
        where = f"module {name!r} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(where, "a module in Python", "a ScriptModule")
        if "forward" in module.__dict__:
            raise UnsupportedModelError(
                where, "the class's forward", "a forward set on the instance"
            )
        for key, value in _attributes(module):
            if _leads_to_a_module(value):
                raise UnsupportedModelError(
                    f"{where}: attribute {key!r}", "submodules registered as such", "one outside"
                )


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What is on the instance beyond what ``nn.Module`` keeps there, and the hooks that a forward
    or backward runs.
    """
    return (
        (key, value)
        for key, value in module.__dict__.items()
        if key not in _KEPT and type(value) not in _PLAIN
    )


def _leads_to_a_module(value: Any) -> bool:
    """Whether containers, bound methods, partial functions or closures lead from a value to a
    module.
    """
    if isinstance(value, dict | list | tuple | set) and not value:  # hooks that nobody registered
        return False
    waiting: list[Any] = [value]
    seen: dict[int, Any] = {}  # the objects too, lest an id be taken again
    while waiting:
        item = waiting.pop()
        if isinstance(item, nn.Module):
            return True
        if id(item) not in seen:
            seen[id(item)] = item
            waiting += _parts(item)
    return False


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return (*value.keys(), *value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, FunctionType):
        cells = [
            cell.cell_contents for cell in value.__closure__ or () if cell != CellType()
        ]  # an empty cell has no contents
        return (*cells, value.__defaults__, value.__kwdefaults__)
    return ()
