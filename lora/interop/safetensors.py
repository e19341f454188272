"""The form that Rust code reads and writes: ``lora_a`` and ``lora_b`` of each module in one file.

A tensor is called ``<module>.lora_a`` (or ``.lora_a.weight``) and its partner ``lora_b``. Two
layouts are in use, and the tensors do not say which: ``"linear"`` holds the weights of two Linears,
like candle and PEFT; ``"matrix"`` holds the factors as a card does.

Requirements: R7, R23, R26.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lora.card import LoRACard, check_card
from lora.checks import choice, finite, naming, require
from lora.errors import ArgumentError, CardFileError, shown
from lora.files import PathLike, as_path, digest, replacing
from lora.interop.factor_files import (
    CONFIG,
    KEY,
    SAY,
    Header,
    Pairs,
    fields_of,
    header_of,
    json_field,
    pair_of,
    read_config,
    read_pairs,
    write_tensors,
)
from lora.interop.foreign_names import read_foreign

LAYOUTS = ("linear", "matrix")
"""``lora_a (r, in)``, ``lora_b (out, r)``; and ``lora_a (in, r)``, ``lora_b (r, out)``."""

_EMBEDDINGS = re.compile(r"(.+\.)?(embed_tokens|embed_in|w[tp]e|(\w*_)?embeddings?)")
"""Matches modules of mlx-lm that are an embedding, whose factors look like those of a Linear."""


def save_safetensors(card: LoRACard, path: PathLike, *, layout: str = "linear") -> str:
    """Write a card as a safetensors file, atomically, and return the file's SHA-256.

    What a card holds beside its factors goes into the header's metadata, under ``lora.…`` keys.
    The same card always gives the same bytes.

    Args:
        path: By convention ``*.safetensors``.
        layout: One of `LAYOUTS`.

    Examples:
        >>> import tempfile
        >>> from lora.card import LowRank
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
    header = {**header_of(card), "lora.scalings": json.dumps(scalings), "lora.layout": layout}
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
        layout: One of `LAYOUTS`. Default: the header's; else the one in which A and B have the same
            rank, and the header's largest one. If both fit, the one in which no rank exceeds a
            dimension.
        part: Of a file of kohya or diffusers for several models: how the names of the tensors to
            read begin, such as ``"lora_te1"`` or ``"text_encoder"``.

    Raises:
        CardFileError: The file is malformed, contradicts itself or alpha, or fits both layouts; or
            it is kohya's, with a name that may stand for several modules.
        CardNotFoundError: Nothing is at the path.

    Examples:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> factors = {"q.lora_a": np.ones((4, 2)), "q.lora_b": np.ones((2, 3))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(factors, f"{folder}/docs.safetensors")
        ...     load_safetensors(f"{folder}/docs.safetensors", alpha=4.0).rank
        2
    """
    path = as_path(path)
    if alpha is not None:
        finite(alpha, "alpha", ArgumentError)
    if layout is not None:
        choice(layout, "layout", LAYOUTS)
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
        scalings = json_field(header, "lora.scalings", {})
        weights = {m: pair_of(m, a, b, scalings.get(m)) for m, (a, b) in pairs.items()}
        return LoRACard(
            name=name or header.get("lora.name") or path.stem,
            rank=rank or max((pair.rank for pair in weights.values()), default=1),
            alpha=alpha,
            target_modules=tuple(json_field(header, "lora.targets", list(weights))),
            weights=weights,
            base_model=header.get("lora.base_model"),
            **fields_of(header),
        )


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


def _stated(header: Header, key: str, kind: type, argument: Any = None) -> Any:
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
