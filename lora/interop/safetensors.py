"""The form that Rust code reads and writes: ``lora_a`` and ``lora_b`` of each module in one file.

A tensor is called ``<module>.lora_a`` (or ``.lora_a.weight``) and its partner ``lora_b``. Two
layouts are in use, and the tensors do not say which: ``"linear"`` holds the weights of two Linears,
like candle and PEFT; ``"matrix"`` holds the factors as a card does.

Requirements: R7, R23, R26.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from lora.arrow_format import texts_of
from lora.card import Array, FrozenJSON, LoRACard, LowRank, check_card
from lora.checks import choice, finite, naming, parse_json, require
from lora.errors import ArgumentError, CardFileError, shown
from lora.files import PathLike, as_path, digest, os_errors, replacing
from lora.interop.weights import open_safetensors

CONFIG = "adapter_config.json"
"""Beside the tensors in the folders of PEFT and mlx-lm."""

MAX_CONFIG_BYTES = 2**24
"""A larger configuration is not read."""

LAYOUTS = ("linear", "matrix")
"""``lora_a (r, in)``, ``lora_b (out, r)``; and ``lora_a (in, r)``, ``lora_b (r, out)``."""

Pairs = dict[str, tuple[Array, Array]]
Header = Mapping[str, str]

SAY = "say it to load_safetensors or lora convert:"
"""Before what an error asks for."""

CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}
"""What safetensors calls the dtypes of factors."""

KEY = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<factor>[ab])(?:\.weight)?")
"""Matches a tensor of the form."""

_EMBEDDINGS = re.compile(r"(.+\.)?(embed_tokens|embed_in|w[tp]e|(\w*_)?embeddings?)")
"""Matches modules of mlx-lm that are an embedding, whose factors look like those of a Linear."""

_FOREIGN = {
    r"lora_magnitude_vector|dora_scale|\.m$": "DoRA",
    r"\.hada_w": "LoHa",
    r"\.lokr_w": "LoKr",
    r"\.lora_mid\.": "LoCon",
    r"\bvera_": "VeRA",
    r"\.ia3_l": "IA³",
    r"^prompt_embeddings": "prompt tuning",
    r"^lora_(unet|te)|\.lora_(up|down)\.": "kohya's form",
    r"^(unet|text_encoder\w*)\.|^transformer\.\w*blocks\.|\.lora\.(up|down)\.": "diffusers' form",
}
"""What a tensor belongs to that is no factor of a card, by a pattern in its name."""


def save_safetensors(card: LoRACard, path: PathLike, *, layout: str = "linear") -> str:
    """Write a card as a safetensors file, atomically, and return the file's SHA-256.

    What a card holds beside its factors goes into the header's metadata, under ``lora.…`` keys.
    The same card always gives the same bytes.

    Args:
        card: Any card.
        path: By convention ``*.safetensors``.
        layout: One of `LAYOUTS`.

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
    choice(layout, "layout", LAYOUTS)
    tensors = {}
    for module, pair in card.weights.items():
        prefix = f"{module}." if module else ""
        for factor, array in (("a", pair.A), ("b", pair.B)):
            tensors[f"{prefix}lora_{factor}"] = array.T if layout == "linear" else array
    scalings = {module: pair.scaling for module, pair in card.weights.items()}
    header = {
        **header_of(card),
        "lora.scalings": json.dumps(scalings),
        "lora.layout": layout,
    }
    with replacing(path) as file:
        write_tensors(file, tensors, header)
        file.flush()
        return digest(file.name)


def load_safetensors(
    path: PathLike,
    *,
    name: str | None = None,
    alpha: float | None = None,
    layout: str | None = None,
    part: str | None = None,
) -> LoRACard:
    """Read a card from a safetensors file of ``lora_a`` and ``lora_b``, or of kohya or diffusers.

    Targets are those of the header, else the modules in the file. A configuration of mlx-lm beside
    the file gives its alpha and layout. The names of kohya and diffusers say the rest themselves.

    Args:
        path: A safetensors file.
        name: The card's name. Default: the header's, else the file's stem.
        alpha: Needed if the header has none. Factors are multiplied by ``alpha / rank``.
        layout: One of `LAYOUTS`. Default: the header's, else the only one in which A and B agree in
            rank, with the largest rank of the header. If both fit, the one in which no rank exceeds
            a dimension.
        part: Of a file of kohya or diffusers for several models: what the names of the tensors of
            one begin with, such as ``"lora_te1"`` or ``"text_encoder"``. The others are left out.

    Raises:
        CardFileError: The file is malformed, contradicts itself or alpha, or fits both layouts; or
            it is kohya's, with a name that may stand for several modules.
    """
    path = as_path(path)
    if alpha is not None:
        finite(alpha, "alpha", ArgumentError)
    if layout is not None:
        choice(layout, "layout", LAYOUTS)
    from lora.interop.foreign_names import read_foreign  # noqa: PLC0415 - it builds on this module

    advice = {"lora_": "of PEFT? import its folder instead"}
    pairs, header = read_foreign(path, part) or read_pairs(path, KEY, advice)
    with naming(path):
        if "lora.alpha" not in header:
            header = {**_beside(path.parent, pairs), **header}
        alpha = _stated(header, "alpha", float, alpha)
        if alpha is None:
            raise CardFileError("alpha", "a number in the header", "none", f"{SAY} `alpha=...`")
        rank = _stated(header, "rank", int)
        stated = header.get("lora.layout")
        if layout and stated:
            expected, hint = f"{stated}, as the file states", "do not pass it"
            require(layout == stated, "layout", expected, layout, hint)
        pairs = _oriented(pairs, layout or stated, rank)
        scalings = _json(header, "lora.scalings", {})
        weights = {m: pair_of(m, a, b, scalings.get(m)) for m, (a, b) in pairs.items()}
        return LoRACard(
            name=name or header.get("lora.name") or path.stem,
            rank=rank or max((pair.rank for pair in weights.values()), default=1),
            alpha=alpha,
            target_modules=tuple(_json(header, "lora.targets", list(weights))),
            weights=weights,
            base_model=header.get("lora.base_model"),
            **fields_of(header),
        )


def read_pairs(
    path: Path,
    key: re.Pattern[str],
    advice: Header = MappingProxyType({}),
    renamed: Mapping[str, str | None] = MappingProxyType({}),
) -> tuple[Pairs, Header]:
    """Read the factors in a file, paired by module, and the header's metadata.

    Args:
        path: A safetensors file.
        key: Matches a whole tensor name, with the groups ``module`` and ``factor``.
        advice: What to do about a name that does not match, by a part of the name.
        renamed: Tensors to read under another name, or not at all.
    """
    names: dict[str, dict[str, str]] = {}
    adapters: set[str | None] = set()
    with open_safetensors(path, CardFileError) as file, naming(path):
        for name in sorted(file.keys()):
            if (read_as := renamed.get(name, name)) is None:
                continue
            if (match := key.fullmatch(read_as)) is None:
                raise foreign_tensor(name, "a factor A or B of a Linear", advice)
            adapters.add(match.groupdict().get("adapter"))
            module, factor = match["module"] or "", match["factor"].upper()
            if names.setdefault(module, {}).setdefault(factor, name) != name:
                raise CardFileError(f"module {shown(module)}", f"one factor {factor}", "two")
            tensor = file.get_slice(name)
            dtype, shape = tensor.get_dtype(), tensor.get_shape()
            if dtype not in CODES.values() or len(shape) != 2:
                expected = f"two dimensions and a dtype of {', '.join(CODES)}"
                hint = "a Conv2d (LoCon) can't be adapted by a card" if len(shape) == 4 else ""
                where = f"tensor {shown(name)}"
                raise CardFileError(where, expected, f"shape {shape} of {dtype}", hint)
        require(len(adapters - {None}) < 2, "tensors", "the factors of one adapter", adapters)
        pairs: Pairs = {}
        for module, factors in names.items():
            require(len(factors) == 2, f"module {shown(module)}", "factors A and B", [*factors])
            pairs[module] = file.get_tensor(factors["A"]), file.get_tensor(factors["B"])
        return pairs, file.metadata() or {}


def foreign_tensor(
    name: str, expected: str, advice: Header = MappingProxyType({})
) -> CardFileError:
    """Return the error of a tensor that is no factor of a card; it names the form, if known."""
    form = next((form for part, form in _FOREIGN.items() if re.search(part, name)), "")
    hint = next((text for part, text in advice.items() if part in name), "")
    if form:
        hint = "it can't be a card: use lora extract on a model it is merged into"
    return CardFileError(f"tensor {shown(name)}", expected, form or "something else", hint)


def pair_of(module: str, a: Array, b: Array, scaling: float | None) -> LowRank:
    """Make a pair of the factors ``(in, r)`` and ``(r, out)``; errors name the module."""
    with naming(f"module {shown(module)}"):
        return LowRank(a, b, scaling)


def write_tensors(file: BinaryIO, tensors: Mapping[str, Array], metadata: Header) -> None:
    """Write a safetensors file with sorted keys; safetensors' own writer shuffles the metadata."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        dtype = CODES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header, ensure_ascii=False, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in tensors.values():
        file.write(array.tobytes())


def header_of(card: LoRACard) -> dict[str, str]:
    """Return what the header of every form holds: the card's fields, but for its weights."""
    return {**texts_of(card), "lora.extra": FrozenJSON(card.extra).text}


def fields_of(header: Header) -> dict[str, Any]:
    """Return those fields of the card that only a header written by `header_of` has."""
    return {
        "metadata": _json(header, "lora.metadata", {}),
        "extra": _json(header, "lora.extra", {}),
        "base_fingerprint": header.get("lora.base_fingerprint"),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration in a folder."""
    path = folder / CONFIG
    with naming(path):
        with os_errors(path), path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise CardFileError("size", f"at most {MAX_CONFIG_BYTES} bytes", "more")
        return parse_json(text, "configuration", dict)


def _beside(folder: Path, modules: Iterable[str]) -> dict[str, str]:
    """Return what mlx-lm's configuration in a file's folder says, as fields of a header.

    mlx-lm computes ``scale · (x @ lora_a) @ lora_b``, so alpha is ``scale · rank``.
    """
    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    if "lora_parameters" not in config:
        return {}
    parameters = config["lora_parameters"]
    numbers = parameters if isinstance(parameters, dict) else {}
    rank, scale = numbers.get("rank"), finite(numbers.get("scale"), f"{CONFIG}: scale")
    if type(rank) is not int or config.get("fine_tune_type", "lora") != "lora":
        expected = "fine_tune_type lora with an integer rank"
        raise CardFileError(f"{CONFIG} of mlx-lm", expected, shown(config))
    for module in filter(_EMBEDDINGS.fullmatch, modules):
        expected, hint = "factors of a Linear", "an embedding can't be a card: train on Linears"
        raise CardFileError(f"module {shown(module)}", expected, "mlx-lm's embedding", hint)
    fields = {"lora.layout": "matrix", "rank": str(rank), "alpha": repr(scale * rank)}
    if "alpha" in numbers:
        del fields["alpha"]  # releases of early 2024 also multiplied by alpha / rank
    return fields


def _json(header: Header, key: str, default: Any) -> Any:
    """Return a header field that is JSON of the default's type; the default if it is missing."""
    if key not in header:
        return default
    return parse_json(header[key], f"header: {key}", type(default))


def _stated(header: Header, key: str, kind: type, argument: Any = None) -> Any:
    """Return what the header or the argument says, unless they contradict each other."""
    text = header.get(f"lora.{key}", header.get(key))
    if text is None:
        return argument
    try:
        value = kind(text)
    except ValueError as error:
        raise CardFileError(f"header: {key}", f"{kind.__name__}", shown(text)) from error
    expected = f"{shown(text)}, as the file or a configuration beside it says"
    require(argument in (None, value), key, expected, argument, "leave the argument out")
    return value


def _oriented(pairs: Pairs, layout: str | None, rank: int | None) -> Pairs:
    """Return the pairs as ``(in, r)`` and ``(r, out)``, by the layout that fits them all best."""
    if not pairs:
        return pairs
    readings = {"linear": {m: (a.T, b.T) for m, (a, b) in pairs.items()}, "matrix": pairs}
    scores = {key: _fit(readings[key], rank) for key in LAYOUTS if layout in (None, key)}
    best = [key for key, score in scores.items() if score and score == max(scores.values())]
    if len(best) != 1:
        shapes = shown({module: (a.shape, b.shape) for module, (a, b) in pairs.items()})
        expected = f"shapes of one layout ({layout or 'either'}), largest rank {rank or 'r'}"
        problem = f"{shapes}, which fit {'both' if best else 'none'}"
        raise CardFileError("factors", expected, problem, f"{SAY} `layout=...`, one of {LAYOUTS}")
    return readings[best[0]]


def _fit(pairs: Pairs, rank: int | None) -> int:
    """Return 0 if A and B contradict this layout, 2 if no rank exceeds a dimension, else 1."""
    shapes = np.array([(*a.shape, *b.shape) for a, b in pairs.values()])
    inputs, ranks, same_ranks, outputs = shapes.T
    if (ranks != same_ranks).any() or rank not in (None, ranks.max()):
        return 0
    return 2 if (ranks <= np.minimum(inputs, outputs)).all() else 1
