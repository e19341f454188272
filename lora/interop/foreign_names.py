"""The names that kohya's scripts and diffusers give to factors, those of several models in a file.

A name begins with the model that the factor is for, its part of the file. After it diffusers writes
the module's own name: ``text_encoder.layers.0.fc1.lora_A.weight``. kohya writes it with underscores
for dots: ``lora_te_layers_0_fc1.lora_down.weight``. Both compute ``alpha / rank · B(A(x))`` with
weights of Linears, and an alpha that is missing is the rank.

Requirements: R26.
"""

import json
import re
from pathlib import Path

from lora.card import Array
from lora.checks import finite, naming, parse_json, require
from lora.errors import CardFileError, shown
from lora.interop.factor_files import CODES, KEY, SAY, Header, Pairs, foreign_tensor, read_pairs
from lora.interop.peft import check_plain, scaling_of
from lora.interop.weights import open_safetensors

METADATA = "lora_adapter_metadata"
"""The field of a header in which diffusers keeps PEFT's configuration of each part."""

_MARK = re.compile(
    r"lora_(te\d?|unet)_.+\..+|(unet|text_encoder(_\d)?|transformer(_\d)?\.\w*blocks)\..+"
)
"""Matches names of the two forms alone."""

_PART = re.compile(
    r"(?P<part>lora_(?:te\d?|unet)(?=_)|(?:unet|text_encoder(?:_\d)?|transformer(?:_\d)?)(?=\.))"
    r"[._](?P<rest>.+)"
)
_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?:(?:lora_linear_layer\.|lora[._])(?:(?P<a>down|A)|up|B)\.weight|"
    r"(?P<alpha>alpha))"
)

_KNOWN = (
    # CLIP's text encoders
    r"text_model.encoder.layers.N.self_attn.(?:q|k|v|out)_proj",
    r"text_model.encoder.layers.N.mlp.fc[12]",
    # T5's
    r"encoder.block.N.layer.0.SelfAttention.[qkvo]",
    r"encoder.block.N.layer.1.DenseReluDense.(?:wi|wi_0|wi_1|wo)",
    # Flux, as its makers name it
    r"double_blocks.N.(?:img|txt)_(?:attn.(?:qkv|proj)|mlp.[02]|mod.lin)",
    r"single_blocks.N.(?:linear[12]|modulation.lin)",
)
"""Modules that kohya's names stand for, with N for a number; other underscores could be dots."""

_UNDERSCORED = [
    re.compile(name.replace(".", "(_)").replace("N", r"(?:0|[1-9]\d*)")) for name in _KNOWN
]


def read_foreign(path: Path, part: str | None) -> tuple[Pairs, Header] | None:
    """Read the factors of one part of a file, and what it says of scales, as fields of a header.

    Args:
        part: What the names of its tensors begin with; needed where there are several.

    Returns:
        None if the file has another form.
    """
    with open_safetensors(path, CardFileError) as file, naming(path):
        names = sorted(file.keys())
        if not any(_MARK.fullmatch(name) and not KEY.fullmatch(name) for name in names):
            expected = "no part, as this is not kohya's form or diffusers'"
            require(part is None, "part", expected, part, "leave the argument out")
            return None
        tensors = {name: _PART.fullmatch(name) for name in names}
        parts = sorted({match["part"] for match in tensors.values() if match})
        if part not in parts and (part is not None or len(parts) > 1):
            hint = f"{SAY} `part=...`, one of {parts}"
            problem = f"those of {len(parts)}" if part is None else shown(part)
            raise CardFileError("tensors", "the factors of one model", problem, hint)
        renamed, alphas = dict[str, str | None](), dict[str, float]()
        for name, named in tensors.items():
            if named is None:
                raise foreign_tensor(name, "a factor in kohya's form or diffusers'")
            renamed[name] = None
            if part not in (None, named["part"]):
                continue
            if (match := _FACTOR.fullmatch(named["rest"])) is None:
                raise foreign_tensor(name, "a factor A or B of a Linear, or its alpha")
            is_kohya = named["part"].startswith("lora_")
            module = _dotted(match["module"], name) if is_kohya else match["module"]
            if match["alpha"]:
                dtype = file.get_slice(name).get_dtype()
                expected = f"a dtype of {', '.join(CODES)}"
                require(dtype in CODES.values(), f"tensor {shown(name)}", expected, dtype)
                alphas[module] = _alpha(file.get_tensor(name), name)
            else:
                renamed[name] = f"{module}.lora_{'a' if match['a'] else 'b'}"
    pairs, header = read_pairs(path, KEY, renamed=renamed)
    with naming(path):
        unused = sorted(alphas.keys() - pairs.keys())
        require(not unused, "alphas", "factors for each", unused)
        config = parse_json(header.get(METADATA, "{}"), f"header: {METADATA}", dict)
        prefix = f"{part or parts[0]}."
        stated = sorted(config)
        config = {key.removeprefix(prefix): config[key] for key in config if key.startswith(prefix)}
        scalings = {module: alphas.get(module, len(a)) / len(a) for module, (a, _) in pairs.items()}
        if METADATA in header:
            where = f"header: {METADATA}"
            require(not alphas, where, "alphas there or in tensors", "both")
            require(bool(config), where, f"fields that begin with {prefix}", stated)
            with naming(METADATA):
                check_plain({**config, "peft_type": config.get("peft_type") or "LORA"})
                scalings = {key: scaling_of(config, key, len(a)) for key, (a, _) in pairs.items()}
    largest = max(scalings.values(), default=1) * max(
        (len(a) for a, _ in pairs.values()), default=1
    )
    return pairs, {
        "lora.layout": "linear",
        "lora.alpha": repr(largest),
        "lora.scalings": json.dumps(scalings),
    }


def _dotted(module: str, name: str) -> str:
    """Return the one module that a name with underscores for dots can stand for."""
    for pattern in _UNDERSCORED:
        if match := pattern.fullmatch(module):
            dots = {match.start(group) for group in range(1, pattern.groups + 1)}
            return "".join("." if at in dots else each for at, each in enumerate(module))
    expected = "a module of CLIP's or T5's text encoder or of Flux"
    problem = "a name in kohya's form, where each underscore may be a dot, as of a UNet"
    hint = "save it in diffusers' form, or use lora extract on a model it is merged into"
    raise CardFileError(f"tensor {shown(name)}", expected, problem, hint)


def _alpha(tensor: Array, name: str) -> float:
    """Return an alpha; 0 is refused, which kohya's scripts read as the rank and others as 0."""
    alpha = finite(tensor.item() if tensor.size == 1 else tensor, f"tensor {shown(name)}")
    require(alpha > 0, f"tensor {shown(name)}", "an alpha > 0", alpha)
    return alpha
