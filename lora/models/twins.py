"""The twin of a model: a copy that shares the storage of parameters and nothing else that changes.

`Twins` walks the objects that `copy.deepcopy` would, with other rules for some kinds. A module is
copied by its dictionaries, whatever ``__deepcopy__`` it has. A parameter is wrapped again over the
same storage, detached and frozen. References between the parts lead to the twins: bound methods,
closures, handles of hooks, modules in lists, and so what accelerate and `torch.compile` set on
instances. What is shared on purpose is listed in `docs/idea.md`; what can be neither copied nor
shared is refused by the name of its module.

Requirements: R2, R3, R7, R26.
"""

import copyreg
import gc
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from copy import _reconstruct, deepcopy  # type: ignore[attr-defined]
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora.card import AdapterSet, LoRACard, LowRank
from lora.errors import UnsupportedModelError

M = TypeVar("M", bound=nn.Module)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Dtypes of numbers that are stored as they are."""

_ATOMS = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, range, type, type(...)),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
        *(ModuleType, CodeType),
    }
)
"""Classes of values that can't change, which lead to nothing that can."""

_SHARED = (type, Enum, LowRank, LoRACard, AdapterSet)
_SHARED_MODULES = ("_thread", "threading", "concurrent", "multiprocessing", "queue", "logging")
_EMPTY = frozenset({dict, OrderedDict, set, list})
_TORCHS_OWN = frozenset(nn.Module().__dict__)


class _UnsoundError(Exception):
    """A copy would not be independent: what was expected, what was found, and the way out."""


class Twins:
    """Maps every object of a model to its twin; an object that is shared has one shared twin.

    Args:
        root: The model, whose names errors tell.
        replacements: Module -> what makes, from the keyword `memo`, its twin of another class.

    Attributes:
        notices: What the user has been told about the copy; its adapted layers share it.
    """

    def __init__(
        self,
        root: nn.Module,
        replacements: Mapping[nn.Module, Callable[..., nn.Module]] | None = None,
    ) -> None:
        self._root, self._replacements = root, replacements or {}
        self._originals: list[Any] = []  # so that no id is taken again
        self._memo: dict[int, Any] = {}  # the form that deepcopy knows, for `__deepcopy__` methods
        self._memo[id(self._memo)] = self._originals
        self._classes: set[type] = {object, nn.Module}
        self.notices: set[str] = set()

    @property
    def dtype(self) -> torch.dtype:
        """The model's: that of its first parameter which is stored as numbers."""
        dtypes = (parameter.dtype for parameter in self._root.parameters())
        return next((dtype for dtype in dtypes if dtype in FLOATS), torch.float32)

    def name_of(self, module: nn.Module) -> str:
        """Return what errors call a module; empty, if only another one's attribute leads to it."""
        names = [name for name, other in self._root.named_modules() if other is module]
        return f"module {names[0]!r} ({type(module).__name__})" if names else ""

    def __call__(self, value: Any) -> Any:
        """Return the twin of a value."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if copier := _COPIERS.get(kind):
            return copier(self, value)
        for family, copier in _FAMILIES.items():
            if isinstance(value, family):
                return copier(self, value)
        return self._object(value)

    def fill(self, twin: M, module: nn.Module) -> M:
        """Fill a new module with the twins of all that another one holds.

        Loading a state dict, which writes in place, first gives the twin storage of its own.
        """
        self._put(module, twin)
        place = ""
        try:
            self._check_class(type(module))
            if hook := module.__dict__.get("_hf_hook"):
                _check_offload(hook)
            for place, value in module.__dict__.items():
                kind = type(value)
                if kind in _EMPTY and not value and place in _TORCHS_OWN:
                    twin.__dict__[place] = kind()
                else:
                    twin.__dict__[place] = value if kind in _ATOMS else self(value)
            if type(twin) is not type(module) and "forward" in twin.__dict__:
                place = "forward"
                _check_forward(twin)
        except _UnsoundError as fault:
            where = self.name_of(module)
            if not where:  # it is held by one that has a name
                raise
            attribute = f": attribute {place!r}" if place else ""
            raise UnsupportedModelError(where + attribute, *fault.args) from None
        hooks: dict[int, Any] = twin._load_state_dict_pre_hooks
        is_new = all(hook.hook is not _unshare for hook in hooks.values())
        if is_new and (twin._parameters or twin._buffers):
            twin.register_load_state_dict_pre_hook(_unshare)  # type: ignore[no-untyped-call]
        return twin

    def _put(self, value: Any, twin: Any) -> Any:
        self._memo[id(value)] = twin
        self._originals.append(value)
        return twin

    def _dictionary(self, value: dict[Any, Any]) -> Any:
        if len(value) > 32 and all(
            _ATOMS.issuperset(map(type, x)) for x in (value, value.values())
        ):
            return self._put(value, value.copy())
        twin = self._put(value, type(value)())
        for key, item in value.items():
            known = key if type(key) in _ATOMS else self(key)
            twin[known] = item if type(item) in _ATOMS else self(item)
        return twin

    def _collection(self, value: list[Any] | set[Any]) -> Any:
        twin = self._put(value, type(value)())
        (twin.extend if isinstance(twin, list) else twin.update)([self(item) for item in value])
        return twin

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        items = tuple([self(item) for item in value])
        if id(value) in self._memo:  # an item has led back here
            return self._memo[id(value)]
        return self._put(value, items)

    def _tensor(self, value: Tensor) -> Tensor:
        kind = type(value)
        if kind is not nn.Parameter and is_lazy(value):
            raise _UnsoundError("parameters with values", f"an {kind.__name__}", "run it once")
        if kind is not nn.Parameter and not isinstance(value, nn.Parameter):
            if value.dtype == torch.int8 and self._is_weight(value):
                return self._put(value, value.detach())  # type: ignore[no-any-return]
            return self._put(value, value.detach().clone())  # type: ignore[no-any-return]
        if issubclass(kind, nn.Parameter):  # detach loses the class
            twin = Tensor._make_subclass(kind, value.detach(), False)
        else:
            twin = nn.Parameter(value.detach(), requires_grad=False)
        self._put(value, twin)
        if attributes := value.__dict__:  # a tensor of tensors, as torchao's, has its own already
            missing = {key: item for key, item in attributes.items() if key not in twin.__dict__}
            twin.__dict__.update(self(missing))
        return twin

    def _is_weight(self, value: Tensor) -> bool:
        """Tell whether a tensor is a parameter too, as bitsandbytes keeps it in two places."""
        pointers = {p.data_ptr() for p in self._root.parameters() if p.dtype == value.dtype}
        return value.data_ptr() in pointers

    def _module(self, module: nn.Module) -> nn.Module:
        if make := self._replacements.get(module):
            return make(memo=self)
        return self.fill(object.__new__(type(module)), module)

    def _function(self, value: FunctionType) -> Any:
        """Return the function itself, or one of the same code that leads to the twins."""
        for name in _names_in(value.__code__):
            module = value.__globals__.get(name)
            if isinstance(module, nn.Module) and any(module is m for m in self._root.modules()):
                raise _UnsoundError("a function that is given its modules", f"the global {name!r}")
        if not leads_to_module(value):
            return self._put(value, value)
        if original := value.__dict__.get("_torchdynamo_orig_callable"):  # it was compiled
            compiler = inspect.getclosurevars(value).nonlocals["self"]
            return self._put(value, compiler(self(original)))
        closure = value.__closure__ or ()
        new = [cell for cell in closure if id(cell) not in self._memo]
        cells = tuple([self._memo.get(id(cell)) or self._put(cell, CellType()) for cell in closure])
        twin = FunctionType(value.__code__, value.__globals__, value.__name__, closure=cells)
        self._put(value, twin)
        for cell in new:
            for content in gc.get_referents(cell):  # nothing, if the cell is empty
                is_carried = leads_to_module(content)
                self._memo[id(cell)].cell_contents = self(content) if is_carried else content
        twin.__defaults__ = self(value.__defaults__)
        twin.__kwdefaults__ = self(value.__kwdefaults__)
        twin.__qualname__ = value.__qualname__
        twin.__dict__.update(self(value.__dict__))
        return twin

    def _method(self, value: MethodType) -> Any:
        """Return the method of the twin; where this has another class, by its name there."""
        owner, function = self(value.__self__), value.__func__
        name = getattr(function, "__name__", "")
        if getattr(type(value.__self__), name, None) is function:
            function = getattr(type(owner), name)
        return self._put(value, MethodType(self(function), owner))

    def _builtin(self, value: BuiltinFunctionType) -> Any:
        owner = self(value.__self__)
        return value if owner is value.__self__ else getattr(owner, value.__name__)

    def _weak_reference(self, value: weakref.ref[Any]) -> Any:
        target = value()
        if isinstance(target, nn.Module):
            raise _UnsoundError("modules that are held", "a weak reference to one")
        if isinstance(target, Tensor):  # torch's recurrent layers have them to their parameters
            return self._put(value, weakref.ref(self(target)))
        return self._put(value, value)

    def _object(self, value: Any) -> Any:
        kind = type(value)
        if kind.__module__.startswith("torch._dynamo"):
            return self._put(value, value)
        self._check_class(kind)
        if isinstance(value, _SHARED) or kind.__module__.partition(".")[0] in _SHARED_MODULES:
            return self._share(value)
        try:
            if hasattr(kind, "__deepcopy__") and not leads_to_module(value):
                twin = value.__deepcopy__(self._memo)
            else:
                reducer = copyreg.dispatch_table.get(kind)
                parts = reducer(value) if reducer else value.__reduce_ex__(4)
                copier = partial(_reconstruct, deepcopy=lambda part, _: self(part))
                twin = value if isinstance(parts, str) else copier(value, self._memo, *parts)
        except (_UnsoundError, UnsupportedModelError, RecursionError):
            raise
        except Exception:  # noqa: BLE001 - whatever a class raises that does not want to be copied
            return self._share(value)
        return self._share(value) if twin is value else self._put(value, twin)

    def _tokenizer(self, value: Tokenizer) -> Tokenizer:
        """Return a tokenizer of the same vocabulary, with settings and added tokens of its own."""
        twin = Tokenizer(value.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if (original := getattr(value, part)) is not None:
                setattr(twin, part, deepcopy(original))
        for _, token in sorted(value.get_added_tokens_decoder().items()):
            (twin.add_special_tokens if token.special else twin.add_tokens)([token])
        twin.encode_special_tokens = value.encode_special_tokens
        if value.truncation:
            twin.enable_truncation(**value.truncation)
        if value.padding:
            twin.enable_padding(**value.padding)
        return self._put(value, twin)  # type: ignore[no-any-return]

    def _share(self, value: Any) -> Any:
        """Keep an object that can't be copied, unless a module is reached through it."""
        if leads_to_module(value):
            kind = f"one in an object that can't be copied ({type(value).__qualname__})"
            raise _UnsoundError("modules where a copy can replace them", kind)
        return self._put(value, value)

    def _check_class(self, kind: type) -> None:
        """Refuse a class that itself holds a module, which all its objects would share."""
        if kind in self._classes:
            return
        for base in set(kind.__mro__) - self._classes:
            if wrapper := _WRAPPERS.get(f"{base.__module__}.{base.__qualname__}"):
                raise _UnsoundError("a module in Python", *wrapper)
            for key, value in vars(base).items():
                if type(value) not in _OF_CLASSES and key[:2] != "__" and leads_to_module(value):
                    what = f"one in class attribute {key!r} of {base.__qualname__}"
                    raise _UnsoundError("modules that objects hold", what)
        self._classes.update(kind.__mro__)


_Copier = Callable[[Twins, Any], Any]
_COPIERS: dict[type, _Copier] = {
    dict: Twins._dictionary,
    OrderedDict: Twins._dictionary,
    list: Twins._collection,
    set: Twins._collection,
    tuple: Twins._tuple,
    FunctionType: Twins._function,
    MethodType: Twins._method,
    BuiltinFunctionType: Twins._builtin,
}
_FAMILIES: dict[type, _Copier] = {
    Tensor: Twins._tensor,
    nn.Module: Twins._module,
    weakref.ref: Twins._weak_reference,
    Tokenizer: Twins._tokenizer,
}
_OF_CLASSES = _ATOMS | {FunctionType, property, staticmethod, classmethod}
"""Classes of what a class usually holds that is no module."""


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the names that a function's code reads, with those of the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def leads_to_module(value: Any) -> bool:
    """Tell whether a module is reached from a value, by strong references."""
    return any(isinstance(item, nn.Module) for item in _reachable(value))


def _reachable(value: Any) -> Iterator[Any]:
    """Yield what is reached from a value by strong references that do not lead through a module."""
    waiting, seen = [value], dict[int, Any]()  # keeps objects, so that no id is taken again
    while waiting:
        item = waiting.pop()
        kind = type(item)
        if kind in _ATOMS or isinstance(item, type | Tensor) or id(item) in seen:
            continue
        if kind.__module__ == "logging":  # a logger leads to all others
            continue
        seen[id(item)] = item
        yield item
        if isinstance(item, FunctionType):  # not its globals
            waiting += [item.__closure__, item.__defaults__, item.__kwdefaults__, item.__dict__]
        elif not isinstance(item, nn.Module):
            waiting += gc.get_referents(item)


_WRAPPERS = {
    "torch.jit._script.ScriptModule": ("a ScriptModule", "adapt what it was made from"),
    "torch.fx.graph_module.GraphModule": ("a GraphModule", "adapt what it was made from"),
}
"""Classes of modules that can't be copied -> what they are, and the way out."""


def _check_offload(hook: Any) -> None:
    """Refuse a module whose weights accelerate brings only while it runs."""
    if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
        hint = "load the model without offloading, with a device_map that names no disk or cpu"
        actual = "accelerate's AlignDevicesHook, which keeps them elsewhere"
        raise _UnsoundError("weights that are in memory", actual, hint)


def _check_forward(twin: nn.Module) -> None:
    """Refuse a layer with factors whose own forward, as it was set, does not call the class's."""
    forward = type(twin).forward
    for item in _reachable([twin.__dict__["forward"], twin.__dict__.get("_old_forward")]):
        if isinstance(item, MethodType) and item.__self__ is twin and item.__func__ is forward:
            return
    function = inspect.unwrap(twin.__dict__["forward"])
    name = getattr(function, "__qualname__", type(function).__qualname__)
    expected = "a forward set on the instance that calls the bound method of its class"
    hint = "delete it and adapt, then set it; or put it into a subclass"
    raise _UnsoundError(expected, f"{function.__module__}.{name}", hint)


def is_quantised(parameter: Tensor) -> bool:
    """Tell whether a parameter's stored numbers are not those that it stands for."""
    kind = type(parameter)
    stands_for_others = kind.dequantize is not Tensor.dequantize or parameter.dtype not in FLOATS
    return kind not in (Tensor, nn.Parameter) and stands_for_others


def _unshare(module: nn.Module, *_: object) -> None:
    """Give a module's tensors storage of their own; tensors that are tied stay tied."""
    for name, parameter in module.named_parameters(recurse=False):
        if is_quantised(parameter):
            where = f"{name!r} of a {type(module).__name__}"
            hint = "load the state dict into the model before it is adapted"
            raise UnsupportedModelError(
                where, "a parameter that is no copy", "a quantised one", hint
            )
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.detach().clone()
