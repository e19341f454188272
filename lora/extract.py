"""A card from full weights: the best low-rank approximation of ΔW, module by module.

`extract_delta` makes a card of what separates a tuned model from its base. `extract_direct`
approximates one model's own weights. Both read weights one module at a time, so that a model need
never be in memory as a whole. Source: Eckart and Young 1936; for the randomised method Halko,
Martinsson and Tropp 2011, algorithm 4.4.

Requirements: R16.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from lora.card import DTYPES, Array, LoRACard, LowRank
from lora.checks import finite, integer
from lora.errors import ArgumentError, ShapeError, TargetError, shown
from lora.lowrank import thin_qr
from lora.targets import ALL_LINEAR, fingerprint_of, match_targets, matches

METHODS = ("full", "randomized")
"""How singular values may be computed."""

POWER_ITERATIONS = 3
"""Of the randomised method: about 0.2 % above the least error where no direction stands out, less elsewhere."""

_EMBEDDING = re.compile(r"(.*_)?embed(ding)?s?|embed_.*|wte|wpe|shared|relative_attention_bias")


@runtime_checkable
class Model(Protocol):
    """What has weights by name: a ``torch.nn.Module`` is one."""

    def state_dict(self) -> Mapping[str, Any]:
        """Name -> tensor."""
        ...


Weights: TypeAlias = Mapping[str, Array] | Model
"""Weights ``(out, in)`` under ``"<module>.weight"``; a mapping may read each of them when asked for it."""

OnModule: TypeAlias = Callable[[str, int, int], None]
"""Called after each module with its name, its position from 1, and the number of modules."""


@dataclass(frozen=True)
class Energy:
    """As a rank: for each module the smallest one that holds this share of ΔW's energy, the sum of
    its squares.

    Args:
        share: In (0, 1].

    Examples:
        >>> Energy(1.5)
        Traceback (most recent call last):
        lora.errors.ArgumentError: Energy: share: expected a number in (0, 1], found 1.5
    """

    share: float

    def __post_init__(self) -> None:
        share = finite(self.share, "Energy: share", ArgumentError)
        if not 0 < share <= 1:
            raise ArgumentError("Energy: share", "a number in (0, 1]", share)
        object.__setattr__(self, "share", share)


@dataclass(frozen=True)
class Error:
    """As a rank: for each module the smallest one whose relative Frobenius error is within a bound.

    The bound is on the approximation; rounding the factors to the card's dtype comes on top and is
    part of what the card records.

    Args:
        bound: In [0, 1).

    Examples:
        >>> Error(0.05).bound
        0.05
    """

    bound: float

    def __post_init__(self) -> None:
        bound = finite(self.bound, "Error: bound", ArgumentError)
        if not 0 <= bound < 1:
            raise ArgumentError("Error: bound", "a number in [0, 1)", bound)
        object.__setattr__(self, "bound", bound)


Rank: TypeAlias = int | Energy | Error
"""A rank for every module, or the rule by which each gets its own."""


def extract_delta(
    base: Weights,
    tuned: Weights,
    rank: Rank = 8,
    *,
    name: str = "delta",
    target_modules: Iterable[str] | str = ALL_LINEAR,
    method: str = "full",
    seed: int = 0,
    oversampling: int = 2,
    dtype: str | None = None,
    on_module: OnModule | None = None,
) -> LoRACard:
    """A card that turns a base model into a tuned one, as nearly as its rank allows.

    Only weights of Linears are extracted: what tuning did to biases, norms and embeddings is not in
    the card. Of adapted models, extract from their `fold`.

    Args:
        base, tuned: Weights ``(out, in)`` of both under ``"<module>.weight"``: mappings, which may
            be lazy, or torch modules.
        rank: A number, or `Energy` or `Error` for a rank of each module's own. None ever exceeds
            min(in, out), nor the rank that ΔW numerically has.
        name: Of the card.
        target_modules: Which modules, by the rule that cards bind by. Names alone don't tell a
            Linear from an embedding, so ``"all-linear"`` leaves out, besides output heads, names
            such as ``word_embeddings``, ``embed_tokens`` and ``wte``, and what is not
            two-dimensional. What is named explicitly has to be.
        method: ``"full"``: the exact singular value decomposition in float64. ``"randomized"``: a
            seeded subspace iteration in the weights' precision (at least float32), over 20 times as
            fast for 3072 × 768 at rank 16.
        seed: Of the randomised method. Each module's random numbers depend on it and on the
            module's name alone.
        oversampling: Width of the randomised method's subspace over the rank, >= 1; accuracy and
            time grow with it.
        dtype: Of the factors, by name; by default float32, or float64 if any of the weights is.
        on_module: Called after each module, for a progress bar.

    Returns:
        Every scaling is 1. A module whose weights are equal in both gets no row. The base
        fingerprint is that of the base's weights with a row, in the dtype that they were given in:
        a model that lacks one is another base. Under ``"extract"`` the metadata hold the method
        and, per module, rank, relative Frobenius error and explained energy, measured on the
        factors as they are in the card.

    Raises:
        TargetError: If no module matches, or one model lacks a weight of the other.
        ShapeError: If weights differ in shape, or an explicitly named one is not a matrix.
        ArgumentError: If the models don't differ, a weight is not finite, or an argument is out of
            range.

    Examples:
        >>> import numpy as np
        >>> base = {"query.weight": np.zeros((2, 3)), "key.weight": np.zeros((2, 3))}
        >>> card = extract_delta(base, {**base, "query.weight": np.diag([4.0, 3.0, 0.0])[:2]}, rank=1)
        >>> card.metadata["extract"]["modules"]
        {'query': {'energy': 0.64, 'error': 0.6, 'rank': 1}}
    """
    models = (_mapping(base, "base"), _mapping(tuned, "tuned"))
    how = _How(rank, method, seed, oversampling, dtype)
    return _extract(models, how, name, target_modules, on_module)


def extract_direct(
    model: Weights,
    rank: Rank = 8,
    *,
    name: str = "direct",
    target_modules: Iterable[str] | str = ALL_LINEAR,
    method: str = "full",
    seed: int = 0,
    oversampling: int = 2,
    dtype: str | None = None,
    on_module: OnModule | None = None,
) -> LoRACard:
    """A card whose ΔW approximates a model's own weights: compression, not a skill.

    Weights of trained models are far from low rank (of MiniLM's, the top 8 directions hold 13-20 %
    of the energy), and applying the card to the model it came from adds that share once more. See
    the recorded ``energy`` before using it.

    Args:
        model, rank, name, target_modules, method, seed, oversampling, dtype, on_module: As in
            `extract_delta`, of which this is the case of a base whose weights are zero.

    Raises:
        TargetError, ShapeError, ArgumentError: As `extract_delta`.

    Examples:
        >>> import numpy as np
        >>> card = extract_direct({"query.weight": np.diag([2.0, 1.0, 1.0])}, rank=1)
        >>> round(card.metadata["extract"]["modules"]["query"]["energy"], 3)
        0.667
    """
    how = _How(rank, method, seed, oversampling, dtype)
    return _extract((_mapping(model, "model"),), how, name, target_modules, on_module)


@dataclass(frozen=True)
class _How:
    """The arguments that say how one module is extracted, checked."""

    rank: Rank
    method: str
    seed: int
    oversampling: int
    dtype: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, Energy | Error):
            hint = "Energy(share) or Error(bound) choose one for each module"
            object.__setattr__(self, "rank", integer(self.rank, "extract: rank", 1, hint))
        if self.method not in METHODS:
            raise ArgumentError("extract: method", " or ".join(METHODS), shown(self.method))
        object.__setattr__(self, "seed", integer(self.seed, "extract: seed", 0))
        object.__setattr__(
            self, "oversampling", integer(self.oversampling, "extract: oversampling", 1)
        )
        if self.dtype is not None and self.dtype not in tuple(DTYPES):
            raise ArgumentError("extract: dtype", f"one of {', '.join(DTYPES)}", shown(self.dtype))


class _SVD(NamedTuple):
    """``u @ diag(s) @ v``, the largest singular value first: a matrix, or its part within a
    subspace.
    """

    u: Array
    s: Array
    v: Array


def _extract(
    models: tuple[Mapping[str, Any], ...],
    how: _How,
    name: str,
    target_modules: Iterable[str] | str,
    on_module: OnModule | None,
) -> LoRACard:
    targets = LoRACard(name, 1, 1.0, target_modules, {}).target_modules  # type: ignore[arg-type] # checked before any work
    modules = _targeted(models, targets)
    pairs: dict[str, LowRank] = {}
    records: dict[str, dict[str, float]] = {}
    for position, module in enumerate(modules, 1):
        found = _one(models, module, how, explicit=_explicit(module, targets))
        if found is not None:
            pairs[module], records[module] = found
        if on_module is not None:
            on_module(module, position, len(modules))
    if not pairs:
        raise ArgumentError(
            f"extract: card {name!r}",
            "weights of Linears that differ"
            if len(models) > 1
            else "weights of Linears that are not zero",
            f"none among the {len(modules)} targeted modules",
            "there is nothing to put into a card: see that the right models and target_modules were given",
        )
    widest = max((pair.dtype for pair in pairs.values()), key=lambda dtype: dtype.itemsize)
    weights = {
        module: LowRank(p.A.astype(widest), p.B.astype(widest), 1.0) for module, p in pairs.items()
    }
    rank = max(pair.rank for pair in weights.values())
    record: dict[str, Any] = {
        "kind": "delta" if len(models) > 1 else "direct",
        "method": how.method,
    }
    if how.method == "randomized":
        record |= {"seed": how.seed, "oversampling": how.oversampling}
    fingerprint = _fingerprint(models[0], pairs) if len(models) > 1 else None
    metadata = {"extract": {**record, "modules": records}}
    return LoRACard(
        name, rank, float(rank), targets, weights, metadata, base_fingerprint=fingerprint
    )


def _fingerprint(base: Mapping[str, Any], modules: Iterable[str]) -> str:
    """What `lora.fingerprint` says of a model with these weights: SHA-256 over sorted key, dtype,
    shape and bytes.
    """

    def entry(module: str) -> tuple[str, str, tuple[int, ...], Any]:
        weight = _array(base[_key(module)], _key(module))
        weight = np.ascontiguousarray(weight, weight.dtype.newbyteorder("="))
        return module, weight.dtype.name, weight.shape, weight.view(np.uint8).data

    return fingerprint_of(map(entry, sorted(modules)))


# ---- which modules, and their ΔW


def _mapping(weights: Weights, role: str) -> Mapping[str, Any]:
    if isinstance(weights, Mapping):
        return weights
    if not isinstance(weights, Model):
        raise ArgumentError(
            f"extract: {role}", "a mapping of weights or a model", type(weights).__name__
        )
    return weights.state_dict()


def _key(module: str) -> str:
    return f"{module}.weight" if module else "weight"


def _targeted(models: tuple[Mapping[str, Any], ...], targets: tuple[str, ...]) -> list[str]:
    """The sorted names of the modules that the targets match; every model has to have them."""
    keys = sorted({key for model in models for key in model if matches(str(key), "weight")})
    names = match_targets([key.removesuffix("weight").removesuffix(".") for key in keys], targets)
    modules = [name for name in names if _explicit(name, targets) or not _is_embedding(name)]
    if not modules:
        hint = "weights are looked for under '<module>.weight'"
        raise TargetError("extract", f"weights of modules that match {list(targets)}", "none", hint)
    for role, model in zip(("base", "tuned"), models, strict=False):
        missing = [_key(module) for module in modules if _key(module) not in model]
        if missing:
            hint = "give both models one naming, or leave these modules out of target_modules"
            raise TargetError(
                f"extract: {role}",
                "every weight that the other model has",
                f"no {missing[:5]}",
                hint,
            )
    return modules


def _explicit(module: str, targets: tuple[str, ...]) -> bool:
    return bool(match_targets([module], set(targets) - {ALL_LINEAR}))


def _is_embedding(module: str) -> bool:
    return _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None


def _matrices(models: tuple[Mapping[str, Any], ...], key: str, *, explicit: bool) -> list[Array]:
    """A module's weight ``(out, in)`` in each model; none where ``"all-linear"`` met what is not a
    Linear's.
    """
    arrays = [_array(model[key], key) for model in models]
    if len({array.shape for array in arrays}) > 1:
        hint = "these are not two versions of one model"
        raise ShapeError(
            f"extract: tuned {key!r}", f"the base's shape {arrays[0].shape}", arrays[1].shape, hint
        )
    if arrays[0].ndim == 2 and 0 not in arrays[0].shape:
        return arrays
    if explicit:
        hint = "a factor pair stands for a Linear's weight: leave this module out of target_modules"
        raise ShapeError(
            f"extract: {key!r}", "a matrix (out, in), not empty", f"shape {arrays[0].shape}", hint
        )
    return []


def _array(weight: Any, key: str) -> Array:
    if not isinstance(weight, np.ndarray):
        try:
            tensor = weight.detach().cpu()
            narrow = str(tensor.dtype) == "torch.bfloat16"  # which NumPy lacks
            weight = tensor.float().numpy().astype(DTYPES["bfloat16"]) if narrow else tensor.numpy()
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ArgumentError(
                f"extract: {key!r}", "a NumPy array or a tensor", type(weight).__name__
            ) from error
    if weight.dtype.newbyteorder("=") not in DTYPES.values():
        hint = "dequantise the model first"
        raise ArgumentError(
            f"extract: {key!r}", f"a dtype of {', '.join(DTYPES)}", weight.dtype, hint
        )
    array: Array = weight
    return array


# ---- one module


def _one(
    models: tuple[Mapping[str, Any], ...], module: str, how: _How, *, explicit: bool
) -> tuple[LowRank, dict[str, float]] | None:
    """The pair for a module's ΔW and what it was measured to hold of it; None where there is no ΔW."""
    arrays = _matrices(models, _key(module), explicit=explicit)
    if not arrays:
        return None
    precise = np.result_type(
        np.float32, *(array.dtype for array in arrays if array.dtype.itemsize > 2)
    )
    work = np.dtype(np.float64) if how.method == "full" else precise
    arrays = [array.astype(work, copy=False) for array in arrays]
    with np.errstate(over="ignore", invalid="ignore"):
        matrix = arrays[0].copy() if len(arrays) == 1 else arrays[1] - arrays[0]
    largest = float(max(matrix.max(), -matrix.min()))  # which NaN and infinities come out of
    if not np.isfinite(largest):
        raise ArgumentError(
            f"extract: {_key(module)!r}", "finite weights and differences", "NaN or infinity"
        )
    half = (int(np.frexp(largest)[1]) + 1) // 2
    scale = matrix.dtype.type(2.0**-half)
    matrix *= scale
    matrix *= scale  # near 1, by a power of 4: no square of it over- or underflows
    return (
        _approximated(matrix, half, module, how, DTYPES[how.dtype or precise.name])
        if largest
        else None
    )


def _approximated(
    matrix: Array, half: int, module: str, how: _How, dtype: np.dtype[Any]
) -> tuple[LowRank, dict[str, float]]:
    """The pair for ``matrix · 4**half``."""
    svd, rank = (_exact if how.method == "full" else _randomized)(matrix, module, how)
    root, wide = np.sqrt(svd.s[:rank]), matrix.dtype
    with np.errstate(over="ignore"):
        a = np.ldexp(svd.v[:rank].T * root, half).astype(dtype)
        b = np.ldexp(root[:, None] * svd.u[:, :rank].T, half).astype(dtype)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        hint = "choose a wider dtype"
        raise ArgumentError(
            f"extract: module {module!r}",
            f"factors within the range of {dtype}",
            "larger ones",
            hint,
        )
    residual = np.ldexp(b.astype(wide), -half).T @ np.ldexp(a.astype(wide), -half).T
    residual -= matrix
    error = float(np.linalg.norm(residual) / np.linalg.norm(matrix))
    return LowRank(a, b, 1.0), {"rank": rank, "error": error, "energy": 1 - error * error}


def _exact(matrix: Array, module: str, how: _How) -> tuple[_SVD, int]:  # noqa: ARG001 - the same for any module
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = np.where(
        s > s[0] * max(matrix.shape) * np.finfo(np.float64).eps, s, 0.0
    )  # what is less is rounding
    svd = _SVD(u, s, v)
    return svd, _rank(svd, how.rank) or len(s)


def _randomized(matrix: Array, module: str, how: _How) -> tuple[_SVD, int]:
    """As `_exact`, from a subspace wide enough for the rank; of all columns once that is no less
    work.
    """
    rng = np.random.default_rng(
        [how.seed, *hashlib.sha256(module.encode(errors="surrogatepass")).digest()]
    )
    guess = how.rank if isinstance(how.rank, int) else 8
    while (width := how.oversampling * guess) < min(matrix.shape):
        svd = _subspace(matrix, width, rng)
        rank = _rank(svd, how.rank, matrix)
        if rank is not None and rank <= guess:
            return svd, rank
        guess *= 2
    return _exact(matrix, module, how)


def _subspace(matrix: Array, width: int, rng: np.random.Generator) -> _SVD:
    """The decomposition of a matrix within the span of its images of random vectors, sharpened by
    power iterations.
    """
    basis = thin_qr(matrix @ rng.standard_normal((matrix.shape[1], width), matrix.dtype))[0]
    for _ in range(POWER_ITERATIONS):
        basis = thin_qr(matrix.T @ basis)[0]
        basis = thin_qr(matrix @ basis)[0]
    long, small = thin_qr(
        matrix.T @ basis
    )  # the SVD of the small triangle takes a fifth of that of the long side
    v, s, u = np.linalg.svd(small, full_matrices=False)
    return _SVD(basis @ u.T, s, (long @ v).T)


def _rank(svd: _SVD, rule: Rank, whole: Array | None = None) -> int | None:
    """The smallest rank that the rule is content with; None if all of the decomposed part of
    `whole` is too little.
    """
    if isinstance(rule, int):
        return min(rule, int(np.count_nonzero(svd.s)))
    rest = 0.0 if whole is None else float(np.linalg.norm(whole - (svd.u * svd.s) @ svd.v)) ** 2
    tails = np.cumsum(np.append(svd.s.astype(np.float64) ** 2, rest)[::-1])[
        ::-1
    ]  # energy outside the first 0, 1, …
    allowed = tails[0] * (1 - rule.share if isinstance(rule, Energy) else rule.bound**2)
    enough = np.flatnonzero(tails[1:] <= allowed)
    return int(enough[0]) + 1 if enough.size else None
