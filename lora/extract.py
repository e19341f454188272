"""Extraction: make a card from full weights, the best low-rank approximation of ΔW of each module.

Weights are read one module at a time, so a model never needs to be in memory as a whole. Sources:
Eckart and Young 1936; for the randomised method Halko, Martinsson and Tropp 2011, algorithm 4.4.

Requirements: R16, R26.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from lora.card import DTYPES, Array, LoRACard, LowRank
from lora.checks import choice, integer, share
from lora.errors import ArgumentError, ShapeError, TargetError
from lora.factors import leading_svd
from lora.targets import ALL_LINEAR, fingerprint_of, match_targets, matches

METHODS = ("full", "randomized")
"""How the singular values may be computed."""

TOLERANCE = 1e-3
"""The randomised method stops where a step would lower the error by less than this share of it.

Of noise alone, the hardest case, its error is 0.3 % above the least one.
"""

OVERSAMPLING = 2
"""Of the randomised method: the width of its subspace divided by the rank."""

CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""Names of modules that are transformers' Conv1D in some models and Linears in others."""

_BLOCK = 1 << 20  # elements that are compared at a time
EMBEDDING = re.compile(r"(.*_)?embed(ding)?s?|embed_.*|wte|wpe|shared|relative_attention_bias")
"""Names of modules whose weight is looked up by rows, and multiplies nothing."""


def __getattr__(name: str) -> Any:
    renamed = {"Energy": MinEnergy, "Error": MaxError}.get(name)
    if renamed is None:
        raise AttributeError(f"module 'lora.extract' has no attribute {name!r}")
    message = f"lora.extract.{name} is {renamed.__name__} now; the old name ends with version 1.0"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return renamed


@runtime_checkable
class Model(Protocol):
    """An object with weights by name, such as a ``torch.nn.Module``."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return name -> tensor."""
        ...


Weights: TypeAlias = Mapping[str, Array] | Model
"""Weights ``(out, in)`` under ``"<module>.weight"``; a mapping may read each on access.

Those of a Conv1D are ``(in, out)``: a torch module tells them by its class, a mapping by an
attribute ``conv1d``, the names of such modules (None: it does not know).
"""

OnModule: TypeAlias = Callable[[str, int, int], None]
"""Called after each module with its name, its position from 1, and the number of modules."""


@dataclass(frozen=True)
class MinEnergy:
    """Rank rule: for each module the smallest rank that holds this share of ΔW's squared norm.

    Args:
        share: In (0, 1].

    Examples:
        >>> extract_direct({"query.weight": np.diag([4.0, 3.0])}, MinEnergy(0.6)).rank
        1
    """

    share: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", share(self.share, "MinEnergy: share", "(0, 1]"))


@dataclass(frozen=True)
class MaxError:
    """Rank rule: for each module the smallest rank with at most this relative Frobenius error.

    Unlike the recorded error, the bound excludes the rounding of the factors to the card's dtype.

    Args:
        bound: In [0, 1).

    Examples:
        >>> extract_direct({"query.weight": np.diag([4.0, 3.0])}, MaxError(0.5)).rank
        2
    """

    bound: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", share(self.bound, "MaxError: bound", "[0, 1)"))


Rank: TypeAlias = int | MinEnergy | MaxError
"""The rank of every module, or the rule that chooses one for each."""


def extract_delta(
    base: Weights,
    tuned: Weights,
    rank: Rank = 8,
    *,
    name: str = "delta",
    target_modules: Iterable[str] | str = ALL_LINEAR,
    method: str = "full",
    seed: int = 0,
    dtype: str | None = None,
    on_module: OnModule | None = None,
) -> LoRACard:
    """Make a card that turns a base model into a tuned one, as nearly as its rank allows.

    Only weights of Linears and of transformers' Conv1D are extracted; the metadata name whatever
    else changed. Of adapted models, extract from their `fold`.

    Args:
        base, tuned: Weights ``(out, in)`` under ``"<module>.weight"``: a mapping, which may be
            lazy, or a torch module.
        rank: A number, `MinEnergy` or `MaxError`; never above the numerical rank of ΔW.
        name: Name of the new card.
        target_modules: As a card's. ``"all-linear"`` leaves out output heads, embeddings (by name)
            and weights that are not two-dimensional; a module that is named must be a matrix.
        method: ``"full"`` is exact, in float64. ``"randomized"`` is a subspace iteration in the
            precision of the weights (at least float32), over 20 times as fast for 3072 × 768.
        seed: For the randomised method, together with the name of the module.
        dtype: Of the factors; default float32, or float64 if any weight is.
        on_module: See `OnModule`.

    Returns:
        A card with scalings of 1, without the modules that are equal in both models. Its
        fingerprint covers the base's weights of its modules. ``metadata["extract"]`` records:

        - ``"method"``; and ``"modules"``: for each module the ``"rank"``, the relative Frobenius
          ``"error"`` and the explained ``"energy"`` of the rounded factors.
        - ``"left_out"``: every other tensor that changed, with the ``"norm"`` of its change and its
          ``"share"`` of the squares of all changes; what one model lacks counts as 0.
        - ``"held"``: the share that is in the card.

    Raises:
        TargetError: No module matches, or one model lacks a weight of the other.
        ShapeError: The models disagree on a shape, or a named module is no matrix.
        ArgumentError: No Linear differs, a weight is not finite, or a mapping of weights has names
            of a Conv1D and no attribute that tells whether they are.

    Examples:
        >>> base = {"query.weight": np.zeros((2, 3)), "key.weight": np.zeros((2, 3))}
        >>> tuned = {**base, "query.weight": np.diag([4.0, 3.0, 0.0])[:2]}
        >>> extract_delta(base, tuned, rank=1).metadata["extract"]["modules"]
        {'query': {'energy': 0.64, 'error': 0.6, 'rank': 1}}
    """
    how = _How(rank, method, seed, dtype)
    return _extract({"base": base, "tuned": tuned}, how, name, target_modules, on_module)


def extract_direct(
    model: Weights,
    rank: Rank = 8,
    *,
    name: str = "direct",
    target_modules: Iterable[str] | str = ALL_LINEAR,
    method: str = "full",
    seed: int = 0,
    dtype: str | None = None,
    on_module: OnModule | None = None,
) -> LoRACard:
    """Make a card whose ΔW approximates a model's own weights.

    Its arguments are those of `extract_delta`. This is compression, not a skill: trained weights
    are far from low rank (the top 8 directions of MiniLM's hold 13-20 % of the energy). Check the
    recorded ``energy``.

    Raises:
        TargetError, ShapeError: No module matches, or a named one is no matrix.
        ArgumentError: All weights are zero, one is not finite, or it may be a Conv1D's.

    Examples:
        >>> card = extract_direct({"query.weight": np.diag([2.0, 1.0, 1.0])}, rank=1)
        >>> round(card.metadata["extract"]["modules"]["query"]["energy"], 3)
        0.667
    """
    how = _How(rank, method, seed, dtype)
    return _extract({"model": model}, how, name, target_modules, on_module)


@dataclass(frozen=True)
class _How:
    rank: Rank
    method: str
    seed: int
    dtype: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, MinEnergy | MaxError):
            hint = "MinEnergy(share) or MaxError(bound) choose one for each module"
            vars(self)["rank"] = integer(self.rank, "extract: rank", 1, hint)
        vars(self)["seed"] = integer(self.seed, "extract: seed", 0)
        choice(self.method, "extract: method", METHODS)
        if self.dtype is not None:
            choice(self.dtype, "extract: dtype", DTYPES)


def _extract(
    sources: Mapping[str, Weights],
    how: _How,
    name: str,
    target_modules: Iterable[str] | str,
    on_module: OnModule | None,
) -> LoRACard:
    models = {role: _tensors(source, role) for role, source in sources.items()}
    targets = LoRACard(name, 1, 1.0, target_modules, {}).target_modules  # type: ignore[arg-type]
    modules = _targeted(models, targets)
    conv1d = _conv1d(sources.values(), modules)
    pairs: dict[str, LowRank] = {}
    records: dict[str, dict[str, float]] = {}
    norms: dict[str, float] = {}
    for position, (module, named) in enumerate(sorted(modules.items()), 1):
        arrays = [_array(model, module) for model in models.values()]
        if module in conv1d:
            arrays = [array.T for array in arrays]
        if row := _approximated(arrays, module, how, named=named):
            pairs[module], records[module], norms[module] = row
        if on_module:
            on_module(module, position, len(modules))
    direct = len(models) == 1
    left_out = {} if direct else _other_changes(models, {_key(module) for module in pairs})
    if not pairs:
        expected = f"weights of Linears that {'are not zero' if direct else 'differ'}"
        hint = "check the models and the targets"
        if left_out:
            hint = f"what differs is no target: {', '.join(left_out)}"
        none = f"none among the {len(modules)} targeted modules"
        raise ArgumentError(f"extract: card {name!r}", expected, none, hint)
    widest = max((pair.dtype for pair in pairs.values()), key=lambda dtype: dtype.itemsize)
    weights = {
        module: LowRank(pair.A.astype(widest), pair.B.astype(widest), 1.0)
        for module, pair in pairs.items()
    }
    record: dict[str, Any] = {"kind": "direct" if direct else "delta", "method": how.method}
    record["modules"] = records
    if how.method == "randomized":
        record["seed"] = how.seed
    rank = max(pair.rank for pair in weights.values())
    fingerprint = None
    if not direct:
        whole = math.hypot(*norms.values(), *left_out.values())
        record["held"] = sum(
            records[module]["energy"] * (norm / whole) ** 2 for module, norm in norms.items()
        )
        record["left_out"] = {
            key: {"norm": norm, "share": (norm / whole) ** 2} for key, norm in left_out.items()
        }
        fingerprint = fingerprint_of(_stored(models["base"], pairs))
    metadata = {"extract": record}
    return LoRACard(name, rank, float(rank), targets, weights, metadata, None, fingerprint)


def _tensors(source: Weights, role: str) -> Mapping[str, Any]:
    tensors = source.state_dict() if isinstance(source, Model) else source
    if not isinstance(tensors, Mapping):
        expected = "a mapping of weights or a model"
        raise ArgumentError(f"extract: {role}", expected, type(source).__name__)
    return tensors


def _stored(
    model: Mapping[str, Any], modules: Iterable[str]
) -> Iterator[tuple[str, str, tuple[int, ...], list[memoryview]]]:
    """Yield what a fingerprint covers of each weight, as it is stored, a Conv1D's too."""
    for module in modules:
        array = _array(model, module)
        yield module, array.dtype.name, array.shape, [array.view(np.uint8).data]


def _conv1d(sources: Iterable[Any], modules: Iterable[str]) -> Collection[str]:
    for source in sources:
        if isinstance(source, Model) and hasattr(source, "named_modules"):
            return {
                name
                for name, module in source.named_modules(remove_duplicate=False)
                if "Conv1D" in (kind.__name__ for kind in type(module).__mro__)
            }
        names: Collection[str] | None = getattr(source, "conv1d", None)
        if names is not None:
            return names
    for module in modules:
        if (part := module.rpartition(".")[2]) in CONV1D:
            expected = "the model or its folder, whose config.json tells a Conv1D from a Linear"
            hint = f"{part} is a Conv1D in GPT-2, with a weight (in, out)"
            raise ArgumentError(f"extract: {module!r}", expected, "weights alone", hint)
    return ()


def _other_changes(
    models: Mapping[str, Mapping[str, Any]], extracted: set[str]
) -> dict[str, float]:
    norms = {}
    for key in sorted({key for model in models.values() for key in model} - extracted, key=str):
        arrays = [_read(model, key) for model in models.values() if key in model]
        if norm := _distance(*arrays):
            if not math.isfinite(norm):
                expected = "finite weights and differences"
                raise ArgumentError(f"extract: {key!r}", expected, "NaN or infinity")
            norms[str(key)] = norm
    return norms


def _distance(*arrays: Array) -> float:
    """Return the norm of one array, or of the difference of two; what one lacks counts as 0."""
    if len({array.ndim for array in arrays}) > 1:
        return math.hypot(*map(_distance, arrays))  # they share no element
    shape = tuple(map(max, zip(*(array.shape for array in arrays), strict=True)))
    flat = [_padded(array, shape).ravel() for array in arrays]
    wide = np.complex128 if any(array.dtype.kind == "c" for array in arrays) else np.float64
    norms = []
    for start in range(0, flat[0].size, _BLOCK):
        part, *others = [array[start : start + _BLOCK].astype(wide) for array in flat]
        with np.errstate(all="ignore"):
            for other in others:
                equal = (part == other) | (np.isnan(part) & np.isnan(other))  # infinities, too
                part = np.where(equal, 0, part - other)
            largest = float(abs(part).max())  # so that no square over- or underflows
            norms.append(largest and largest * float(np.linalg.norm(part / largest)))
    return math.hypot(*norms)


def _padded(array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape == shape:
        return array
    return np.pad(array, [(0, more - size) for size, more in zip(array.shape, shape, strict=True)])


def _key(module: str) -> str:
    return f"{module}.weight" if module else "weight"


def _targeted(models: Mapping[str, Mapping[str, Any]], targets: tuple[str, ...]) -> dict[str, bool]:
    keys = {key for model in models.values() for key in model if matches(str(key), "weight")}
    names = match_targets([key.removesuffix("weight").removesuffix(".") for key in keys], targets)
    named = set(match_targets(names, set(targets) - {ALL_LINEAR}))
    modules = {
        name: name in named
        for name in names
        if name in named or not EMBEDDING.fullmatch(name.rpartition(".")[2])
    }
    if not modules:
        hint = "weights are looked for under '<module>.weight'"
        raise TargetError("extract", f"weights of modules that match {list(targets)}", "none", hint)
    for role, model in models.items():
        missing = [_key(module) for module in sorted(modules) if _key(module) not in model]
        if missing:
            expected = "every weight that the other model has"
            hint = "give both models one naming, or leave these modules out of the targets"
            raise TargetError(f"extract: {role}", expected, f"no {missing[:5]}", hint)
    return modules


def _array(model: Mapping[str, Any], module: str) -> Array:
    key = _key(module)
    weight = _read(model, key)
    native = weight.dtype.newbyteorder("=")
    if native not in DTYPES.values():
        expected, hint = f"a dtype of {', '.join(DTYPES)}", "dequantise the model first"
        raise ArgumentError(f"extract: {key!r}", expected, weight.dtype, hint)
    return np.asarray(weight, native, order="C")


def _read(model: Mapping[str, Any], key: str) -> Array:
    weight: Any = model[key]
    if not isinstance(weight, np.ndarray):
        try:
            tensor = weight.detach().cpu()
            # NumPy itself has no bfloat16.
            narrow = str(tensor.dtype) == "torch.bfloat16"
            weight = tensor.float().numpy().astype(DTYPES["bfloat16"]) if narrow else tensor.numpy()
        except (AttributeError, TypeError, RuntimeError) as error:
            expected = "a NumPy array or a tensor of a dtype that NumPy has"
            kind, dtype = type(weight).__name__, getattr(weight, "dtype", None)
            actual, hint = (
                (f"{kind} of {dtype}", "dequantise the model first") if dtype else (kind, "")
            )
            raise ArgumentError(f"extract: {key!r}", expected, actual, hint) from error
    return np.asarray(weight)


def _approximated(
    arrays: list[Array], module: str, how: _How, *, named: bool
) -> tuple[LowRank, dict[str, float], float] | None:
    """Return the pair for a module's ΔW, its measured figures and ‖ΔW‖; None if there is no ΔW."""
    key, shape = _key(module), arrays[0].shape
    if arrays[-1].shape != shape:
        expected, hint = f"the base's shape {shape}", "these are not two versions of one model"
        raise ShapeError(f"extract: tuned {key!r}", expected, arrays[-1].shape, hint)
    if len(shape) != 2 or 0 in shape:
        if named:
            hint = "a factor pair stands for a Linear's weight: leave it out of the targets"
            expected = "a matrix (out, in), not empty"
            raise ShapeError(f"extract: {key!r}", expected, f"shape {shape}", hint)
        return None
    wide = [array.dtype for array in arrays if array.dtype.itemsize > 2]
    precise = np.result_type(np.float32, *wide)
    work = np.dtype(np.float64) if how.method == "full" else precise
    arrays = [array.astype(work, copy=False) for array in arrays]
    with np.errstate(all="ignore"):
        matrix = arrays[0] if len(arrays) == 1 else arrays[1] - arrays[0]
    largest = float(max(matrix.max(), -matrix.min()))  # NaN and infinities get here
    if not np.isfinite(largest):
        expected = "finite weights and differences"
        raise ArgumentError(f"extract: {key!r}", expected, "NaN or infinity")
    if largest == 0:
        return None
    # Scaled by a power of 4 to be near 1: exact, and no square over- or underflows.
    half = (int(np.frexp(largest)[1]) + 1) // 2
    scale = work.type(2.0**-half)
    matrix = matrix * scale
    matrix *= scale
    u, s, v, rank = _decomposed(matrix, module, how)
    dtype, root = DTYPES[how.dtype or precise.name], np.sqrt(s[:rank])
    with np.errstate(all="ignore"):
        a = np.ldexp(v[:rank].T * root, half).astype(dtype)
        b = np.ldexp(root[:, None] * u[:, :rank].T, half).astype(dtype)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        where, expected = f"extract: module {module!r}", f"factors within the range of {dtype}"
        raise ArgumentError(where, expected, "larger ones", "choose a wider dtype")
    residual = np.ldexp(b.astype(work), -half).T @ np.ldexp(a.astype(work), -half).T
    residual -= matrix
    norm = float(np.linalg.norm(matrix))
    error = float(np.linalg.norm(residual)) / norm
    figures = {"rank": rank, "error": error, "energy": 1 - error * error}
    return LowRank(a, b, 1.0), figures, float(np.ldexp(norm, 2 * half))


def _decomposed(matrix: Array, module: str, how: _How) -> tuple[Array, Array, Array, int]:
    """Return U, the singular values, Vᵀ, and the rank that the rule asks for.

    The randomised method widens its subspace until the rank suffices or it spans the matrix.
    """
    if how.method == "randomized":
        name = hashlib.sha256(module.encode(errors="surrogatepass")).digest()
        rng = np.random.default_rng([how.seed, *name])
        guess = how.rank if isinstance(how.rank, int) else 8
        while (width := OVERSAMPLING * guess) < min(matrix.shape):
            u, s, v = leading_svd(matrix, guess, width, rng, TOLERANCE)
            rest = matrix - (u * s) @ v if not isinstance(how.rank, int) else np.zeros(1)
            rank = _rank(s, how.rank, float(np.linalg.norm(rest)) ** 2)
            if rank is not None and rank <= guess:
                return u, s, v, rank
            guess *= 2
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    # Smaller values are rounding errors.
    s = np.where(s > s[0] * max(matrix.shape) * np.finfo(np.float64).eps, s, 0.0)
    return u, s, v, _rank(s, how.rank, 0.0) or len(s)


def _rank(s: Array, rule: Rank, rest: float) -> int | None:
    """Return the smallest rank that satisfies the rule, or None; `s` leaves out `rest` squares."""
    if isinstance(rule, int):
        return min(rule, int(np.count_nonzero(s)))
    # The energy outside the first 0, 1, … directions.
    tails = np.cumsum(np.append(s.astype(np.float64) ** 2, rest)[::-1])[::-1]
    allowed = tails[0] * (1 - rule.share if isinstance(rule, MinEnergy) else rule.bound**2)
    enough = np.flatnonzero(tails[1:] <= allowed)
    return int(enough[0]) + 1 if enough.size else None
