"""The form that Rust code reads and writes: ``lora_a`` and ``lora_b`` of every module in one
safetensors file.

A tensor is called ``<module>.lora_a`` (or ``.lora_a.weight``), its partner ``lora_b``; a file for
one bare layer has just the two. Two layouts are in use, and nothing in the tensors says which:
``"linear"`` holds the weights of two Linears, ``lora_a (r, in)`` and ``lora_b (out, r)``, as candle
and PEFT have them; ``"matrix"`` holds ``(in, r)`` and ``(r, out)``.

Requirements: R7, R23.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from lora.card import Array, FrozenJSON, LoRACard, LowRank, check_card
from lora.checks import finite
from lora.errors import (
    ArgumentError,
    CardError,
    CardFileError,
    CardNotFoundError,
    StoreError,
    shown,
)
from lora.store import PathLike, as_path, digest, replacing

LAYOUTS = ("linear", "matrix")
"""``lora_a (r, in)``, ``lora_b (out, r)``; and ``lora_a (in, r)``, ``lora_b (r, out)``."""

Pairs = dict[str, tuple[Array, Array]]

_CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}
_KEY = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<factor>[ab])(?:\.weight)?")


def save_safetensors(card: LoRACard, path: PathLike, *, layout: str = "linear") -> str:
    """Write a card as a safetensors file, atomically, and return the file's SHA-256.

    Everything that a card holds beside its factors goes into the header's metadata, as text under
    ``lora.…`` keys. One card always gives the same bytes.

    Args:
        card: Any card.
        path: Where to; ``*.safetensors`` by convention. The folder must exist.
        layout: One of `LAYOUTS`.

    Raises:
        CardNotFoundError, StoreError: If the folder does not exist, or the operating system
            refuses.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> card = LoRACard("docs", 1, 2.0, ["q"], {"q": LowRank(np.ones((4, 1)), np.ones((1, 3)))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_safetensors(card, f"{folder}/docs.safetensors")
        ...     load_safetensors(f"{folder}/docs.safetensors") == card
        True
    """
    check_card(card)
    _layout(layout, ArgumentError)
    tensors = {}
    for module, pair in card.weights.items():
        prefix = f"{module}." if module else ""
        for factor, array in (("a", pair.A), ("b", pair.B)):
            tensors[f"{prefix}lora_{factor}"] = array.T if layout == "linear" else array
    fields = {
        **common_fields(card),
        "lora.rank": str(card.rank),
        "lora.alpha": repr(card.alpha),
        "lora.targets": json.dumps(card.target_modules, ensure_ascii=False),
        "lora.scalings": json.dumps(
            {module: pair.scaling for module, pair in card.weights.items()}
        ),
        "lora.layout": layout,
    }
    if card.base_model is not None:
        fields["lora.base_model"] = card.base_model
    with replacing(path) as file:
        write_tensors(file, tensors, fields)
        file.flush()
        return digest(file.name)


def load_safetensors(
    path: PathLike,
    *,
    name: str | None = None,
    alpha: float | None = None,
    target_modules: Iterable[str] | str | None = None,
    layout: str | None = None,
) -> LoRACard:
    """Read a card from a safetensors file of ``lora_a`` and ``lora_b``.

    Args:
        path: A safetensors file.
        name: Of the card; the header's if not given, the file's stem if it has none.
        alpha: Needed where the header has neither ``lora.alpha`` nor ``alpha``. Factors are
            multiplied with ``alpha / rank``.
        target_modules: Instead of the header's; the modules in the file if there is neither.
        layout: One of `LAYOUTS`. Where neither it nor the header says, it is the one that fits
            every module: A and B agree in rank, the largest rank is the header's ``rank``, and, if
            both still fit, no rank exceeds a module's dimensions.

    Raises:
        CardNotFoundError: If there is no such file.
        CardFileError: If it is not such a file, contradicts its header or the arguments, or fits
            both layouts.
    """
    path = as_path(path)
    if alpha is not None:
        finite(alpha, "alpha", ArgumentError)
    if layout is not None:
        _layout(layout, ArgumentError)
    pairs, header = read_pairs(path, _KEY)
    with naming(path):
        number = _agreed("alpha", alpha, _text(header, "alpha"), _number)
        if number is None:
            raise CardFileError("alpha", "a number in the header", "none", "pass alpha=")
        text = _text(header, "rank")
        rank = int(text) if text is not None and re.fullmatch("[0-9]{1,10}", text) else None
        if text is not None and rank is None:
            raise CardFileError("header: rank", "an integer", shown(text))
        given = _agreed("layout", layout, header.get("lora.layout"), _layout)
        turned = _oriented(pairs, given, rank)
        scalings = json_field(header, "lora.scalings", dict)
        weights = {
            module: pair_of(module, a, b, scalings.get(module)) for module, (a, b) in turned.items()
        }
        targets = (
            json_field(header, "lora.targets", list) if "lora.targets" in header else tuple(weights)
        )
        return LoRACard(
            name=name or header.get("lora.name") or path.stem,
            rank=max((pair.rank for pair in weights.values()), default=1) if rank is None else rank,
            alpha=number,
            target_modules=targets if target_modules is None else target_modules,  # type: ignore[arg-type] # as a card's
            weights=weights,
            metadata=json_field(header, "lora.metadata", dict),
            base_model=header.get("lora.base_model"),
            base_fingerprint=header.get("lora.base_fingerprint"),
            extra=json_field(header, "lora.extra", dict),
        )


def read_pairs(
    path: PathLike, key: re.Pattern[str], advice: Callable[[str], str] = lambda _: ""
) -> tuple[Pairs, Mapping[str, str]]:
    """The tensors of a file, paired by module, as they are stored, and the header's metadata.

    Names, dtypes and shapes are checked before an element is read; safetensors itself checks them
    against the file's size.

    Args:
        path: A safetensors file.
        key: Matches a whole tensor name, with the groups ``module``, ``factor`` and, if there is
            one, ``adapter``.
        advice: What to do about a name that does not match.

    Raises:
        CardNotFoundError, StoreError, CardFileError: Naming the file and the tensor.
    """
    path, names = as_path(path), dict[str, dict[str, str]]()
    with _opened(path) as file, naming(path):
        adapters = set()
        for name in sorted(file.keys()):
            if (match := key.fullmatch(name)) is None:
                raise CardFileError(
                    f"tensor {shown(name)}",
                    "a factor A or B of a Linear",
                    "something else",
                    advice(name),
                )
            module, factor = match["module"] or "", match["factor"].upper()
            adapters.add(match.groupdict().get("adapter"))
            if names.setdefault(module, {}).setdefault(factor, name) != name:
                raise CardFileError(f"module {shown(module)}", f"one factor {factor}", "two")
            code, shape = file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()
            if code not in _CODES.values() or len(shape) != 2:
                expected = f"two dimensions and a dtype of {', '.join(_CODES)}"
                raise CardFileError(f"tensor {shown(name)}", expected, f"shape {shape} of {code}")
        if len(adapters) > 1:
            raise CardFileError(
                "tensors",
                "one adapter",
                sorted(map(str, adapters)),
                "save each in a folder of its own",
            )
        for module, held in names.items():
            if missing := {"A", "B"} - held.keys():
                raise CardFileError(
                    f"module {shown(module)}", "both factors", f"no factor {missing.pop()}"
                )
        pairs = {
            m: (file.get_tensor(held["A"]), file.get_tensor(held["B"])) for m, held in names.items()
        }
        return pairs, dict(file.metadata() or {})


def pair_of(module: str, a: Array, b: Array, scaling: float | None) -> LowRank:
    """The factors ``(in, r)`` and ``(r, out)`` as a pair, or an error that names the module."""
    with naming(f"module {shown(module)}"):
        return LowRank(a, b, scaling)


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file whose bytes depend on nothing but the arguments (safetensors' own
    order varies).
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, array in sorted(tensors.items()):
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, array in sorted(tensors.items()):
        file.write(array.tobytes())


def common_fields(card: LoRACard) -> dict[str, str]:
    """What a header keeps of a card in every form: name, metadata, extra, the base's fingerprint."""
    fields = {"lora.name": card.name, "lora.metadata": FrozenJSON(card.metadata).text}
    fields["lora.extra"] = FrozenJSON(card.extra).text
    if card.base_fingerprint is not None:
        fields["lora.base_fingerprint"] = card.base_fingerprint
    return fields


def json_field(header: Mapping[str, str], key: str, kind: type) -> Any:
    """A header field that is JSON of one kind; empty if it is not there."""
    try:
        value = json.loads(header[key]) if key in header else kind()
    except (ValueError, RecursionError) as error:
        raise CardFileError(f"header: {key}", "JSON", error) from error
    if not isinstance(value, kind):
        raise CardFileError(f"header: {key}", f"a JSON {kind.__name__}", shown(value))
    return value


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Name the file, or what in it, in every error that its contents cause."""
    try:
        yield
    except CardError as error:
        raise CardFileError(
            f"{path}: {error.where}", error.expected, error.found, error.hint
        ) from error


@contextmanager
def _opened(path: PathLike) -> Iterator[Any]:
    path = as_path(path)
    try:
        _check_regular(path)
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise CardFileError(str(path), "a well-formed safetensors file", error) from error
    except (CardNotFoundError, CardError):
        raise
    except (OSError, ValueError) as error:
        raise StoreError(str(path), "a file that can be read", error) from error


def _check_regular(path: Path) -> None:
    """Refuse what a read would block on or fail at."""
    if not path.is_file():
        raise CardNotFoundError(
            str(path), "a safetensors file", "something else" if path.exists() else "nothing there"
        )


def _oriented(pairs: Pairs, layout: str | None, rank: int | None) -> Pairs:
    """The pairs as ``(in, r)`` and ``(r, out)``, by the one layout that all of them fit."""
    turned = {"linear": {module: (a.T, b.T) for module, (a, b) in pairs.items()}, "matrix": pairs}
    fits = [each for each in LAYOUTS if layout in (None, each) and _chain(turned[each], rank)]
    if not fits:
        shapes = {module: (a.shape, b.shape) for module, (a, b) in pairs.items()}
        expected = (
            "(r, in) and (out, r), or (in, r) and (r, out)"
            if layout is None
            else f"the layout {layout!r}"
        )
        raise CardFileError("factors", f"{expected}, of largest rank {rank or 'r'}", shown(shapes))
    low = [
        each
        for each in fits
        if all(a.shape[1] <= min(a.shape[0], b.shape[1]) for a, b in turned[each].values())
    ]
    if pairs and len(fits) > 1 and len(low) != 1:
        raise CardFileError(
            "factors",
            "shapes that fit one layout",
            "shapes that fit both",
            f"pass layout=, one of {LAYOUTS}",
        )
    return turned[fits[0] if len(fits) == 1 or not pairs else low[0]]


def _chain(pairs: Pairs, rank: int | None) -> bool:
    """Whether every A ends in the rank that its B starts with, and the largest rank is the one
    given.
    """
    ranks = [a.shape[1] for a, b in pairs.values() if a.shape[1] == b.shape[0]]
    return len(ranks) == len(pairs) and (rank is None or not pairs or max(ranks) == rank)


def _layout(value: object, kind: type[CardFileError | ArgumentError] = CardFileError) -> str:
    if value not in LAYOUTS:
        raise kind("layout", f"one of {LAYOUTS}", shown(value))
    return str(value)


def _number(value: object) -> float:
    try:
        return finite(float(value) if isinstance(value, str) else value, "alpha")
    except ValueError as error:
        raise CardFileError("alpha", "a finite number", shown(value)) from error


def _text(header: Mapping[str, str], key: str) -> str | None:
    return header.get(f"lora.{key}", header.get(key))


def _agreed(what: str, given: Any, stored: str | None, read: Callable[[Any], Any]) -> Any:
    """What the caller or the header says, where they do not contradict each other."""
    values = {read(value) for value in (given, stored) if value is not None}
    if len(values) > 1:
        raise CardFileError(
            what, f"the header's {shown(stored)}", shown(given), "leave the argument out"
        )
    return values.pop() if values else None
