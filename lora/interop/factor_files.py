"""Factors in the safetensors files of any form, and what stands beside them.

Requirements: R7, R23, R26.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from lora.arrow_format import texts_of
from lora.card import Array, FrozenJSON, LoRACard, LowRank
from lora.checks import naming, parse_json, require
from lora.errors import CardFileError, shown
from lora.files import os_errors
from lora.interop.weights import open_safetensors

CONFIG = "adapter_config.json"
"""Beside the tensors in the folders of PEFT and mlx-lm."""

MAX_CONFIG_BYTES = 2**24
"""A larger configuration is not read."""

Pairs = dict[str, tuple[Array, Array]]
Header = Mapping[str, str]

SAY = "say it to load_safetensors or lora convert:"
"""Before what an error asks for."""

CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}
"""What safetensors calls the dtypes of factors."""

KEY = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<factor>[ab])(?:\.weight)?")
"""Matches a tensor of the form."""

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


def read_pairs(
    path: Path,
    key: re.Pattern[str],
    advice: Header = MappingProxyType({}),
    renamed: Mapping[str, str | None] = MappingProxyType({}),
) -> tuple[Pairs, Header]:
    """Read the factors in a file, paired by module, and the header's metadata.

    Args:
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
        "metadata": json_field(header, "lora.metadata", {}),
        "extra": json_field(header, "lora.extra", {}),
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


def json_field(header: Header, key: str, default: Any) -> Any:
    """Return a header field that is JSON of the default's type; the default if it is missing."""
    if key not in header:
        return default
    return parse_json(header[key], f"header: {key}", type(default))
