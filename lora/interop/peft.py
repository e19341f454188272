"""PEFT's adapter directories: ``adapter_config.json`` beside ``adapter_model.safetensors``. PEFT
itself is not needed.

What PEFT would compute from a directory is what the card computes; what is not plain LoRA on
Linears is refused by name. PEFT stores ``lora_A (r, in)`` and ``lora_B (out, r)`` for every kind of
base layer, the transposed weight of a ``Conv1D`` (``fan_in_fan_out``) included, so a card's factors
are their transposes. Rules read in PEFT 0.21.2: ``LoraConfig``, ``check_target_module_exists``,
``get_pattern_key``, ``LoraLayer.update_layer``.

Requirements: R23.
"""

import json
import math
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora.card import LoRACard, check_card
from lora.checks import finite
from lora.errors import ArgumentError, CardError, CardFileError, CardNotFoundError, shown
from lora.interop.safetensors import (
    common_fields,
    json_field,
    naming,
    pair_of,
    read_pairs,
    write_tensors,
)
from lora.store import PathLike, as_path, os_errors, replacing
from lora.targets import ALL_LINEAR, match_targets, matches

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

MAX_CONFIG_BYTES = 2**24
"""A configuration that is larger is not read."""

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)

_ADVICE = {
    "lora_magnitude_vector": "DoRA is not plain LoRA",
    "lora_embedding_": "LoRA on an embedding can't be a card: train on Linears only",
    "lora_B.bias": "a bias on B (lora_bias) can't be a card",
    ".bias": "trained biases (bias) can't be a card",
    "modules_to_save": "modules that were trained whole can't be a card",
}

_HELD = frozenset(
    {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "base_model_name_or_path",
    }
)
"""What a card has fields for; the rest is kept in its metadata, under ``peft``."""

_CARRIED = ("auto_mapping", "fan_in_fan_out", "lora_dropout", "revision", "task_type")
"""What an export takes over from there: it changes no output."""

_PLAIN = _HELD.union(
    _CARRIED,
    (
        "peft_type",
        "peft_version",
        "inference_mode",
        "runtime_config",
        "bias",
        "use_rslora",
        "init_lora_weights",
    ),
    (
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
    ),
    (
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
    ),  # read by an initialisation only
)
"""Keys that plain LoRA may set; any other, known to PEFT today or not, must be unset."""

_MAY_BE_EMPTY = frozenset(
    {"modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"}
)

_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it was: the others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) change its weights."""


def import_peft(folder: PathLike, *, name: str | None = None) -> LoRACard:
    """Read a card from a PEFT adapter directory, without PEFT and without torch.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``. Its patterns are
            regular expressions that are run as PEFT runs them: one made to be slow is slow here
            too.
        name: Of the card; the one that `export_peft` wrote if not given, else the folder's.

    Returns:
        With one explicit scaling per module: ``alpha / r``, or ``alpha / √r`` where ``use_rslora``
        is set, with rank and alpha from the first pattern in the file that matches (PEFT sorts them
        when it saves). Targets are the list in the configuration, or where that is a pattern,
        ``all-linear`` or left to the model's type, the modules that have weights. What else the
        configuration says is in ``metadata["peft"]``.

    Raises:
        CardNotFoundError: If a file is missing.
        CardFileError: If the two files are malformed, contradict each other or are more than plain
            LoRA; weights in pickle are never read.
    """
    folder = as_path(folder).absolute()
    with naming(folder / CONFIG):
        config = _read_config(folder)
        _check_plain(config)
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        hint = "a pickle runs code when it is read: load it with PEFT and save it with safe_serialization=True"
        raise CardFileError(str(folder), WEIGHTS, PICKLE, hint)
    pairs, header = read_pairs(folder / WEIGHTS, _KEY, _advice)
    with naming(folder):
        if not pairs:
            raise CardFileError(WEIGHTS, "at least one pair of factors", "none")
        weights = {
            m: pair_of(m, a.T, b.T, _scaling(config, m, a.shape[0])) for m, (a, b) in pairs.items()
        }
        targets = config.get("target_modules")
        base = config.get("base_model_name_or_path")
        rest = {
            key: value for key, value in config.items() if key not in _HELD and value is not None
        }
        return LoRACard(
            name=name or header.get("lora.name") or folder.name,
            rank=max(pair.rank for pair in weights.values()),
            alpha=config["lora_alpha"],
            target_modules=sorted(set(targets)) if isinstance(targets, list) else tuple(weights),  # type: ignore[arg-type]
            weights=weights,
            metadata={**json_field(header, "lora.metadata", dict), "peft": rest},
            base_model=base,
            base_fingerprint=header.get("lora.base_fingerprint"),
            extra=json_field(header, "lora.extra", dict),
        )


def export_peft(card: LoRACard, folder: PathLike, *, overwrite: bool = False) -> None:
    """Write a card as a directory that PEFT loads, for a model in which the card's keys are the
    modules' full names.

    The files are written beside `folder`, which is then renamed into place: a reader sees all or
    nothing. (Where a folder is overwritten, nothing is there between two renames.)

    Args:
        card: Has weights, all of them targeted. A scaling other than ``alpha / r`` becomes an
            ``alpha_pattern`` of scaling · r, which divided by r gives it back to one ulp.
        folder: Is made; an empty one is filled.
        overwrite: Replace a PEFT directory that is there already.

    Raises:
        CardError: If PEFT could not say what the card says.
        ArgumentError: If `folder` is not empty, or, with `overwrite`, no PEFT directory.
        CardNotFoundError, StoreError: If the folder to put it in does not exist, or the operating
            system refuses.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from lora.card import LowRank
        >>> card = LoRACard("docs", 1, 2.0, ["q"], {"q": LowRank(np.ones((4, 1)), np.ones((1, 3)), 0.3)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_peft(card, f"{folder}/docs")
        ...     import_peft(f"{folder}/docs").weights == card.weights
        True
    """
    check_card(card)
    config = _config(card)
    tensors = {}
    for module, pair in card.weights.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.A.T
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.B.T
    folder = as_path(folder)
    with os_errors(folder):
        folder = folder.resolve()
        _check_free(folder, overwrite=overwrite)
        temporary, old = (folder.with_name(f".{secrets.token_hex(8)}.tmp") for _ in range(2))
        try:
            temporary.mkdir()
            with replacing(temporary / CONFIG) as file:
                file.write(json.dumps(config, indent=2, sort_keys=True).encode())
            with replacing(temporary / WEIGHTS) as file:
                write_tensors(file, tensors, {"format": "pt", **common_fields(card)})
            _swap(temporary, folder, old)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CardNotFoundError(
            str(path), "a PEFT configuration", "nothing", "give the folder that holds it"
        )
    with os_errors(path):
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise CardFileError("size", f"at most {MAX_CONFIG_BYTES} bytes", size)
        data = path.read_bytes()
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CardFileError("configuration", "JSON", error) from error
    if not isinstance(config, dict):
        raise CardFileError("configuration", "a JSON object", shown(config))
    return config


def _check_plain(config: Mapping[str, Any]) -> None:
    """Refuse what is not plain LoRA, and fields that are not of the kind that PEFT writes."""
    if config.get("peft_type") != "LORA":
        raise CardFileError(
            "peft_type", "'LORA'", shown(config.get("peft_type")), "no other method can be a card"
        )
    for key, value in sorted(config.items()):
        unset = value is None or value is False or (key in _MAY_BE_EMPTY and value in ([], {}))
        if key not in _PLAIN and not unset:
            raise CardFileError(key, "unset", shown(value), "only plain LoRA can be a card")
    if config.get("bias", "none") != "none":
        raise CardFileError(
            "bias", "'none'", shown(config["bias"]), "trained biases can't be a card"
        )
    if not any(config.get("init_lora_weights", True) is each for each in _INITS[:3]) and (
        config["init_lora_weights"] not in _INITS[3:]
    ):
        hint = "it changed the base: save with path_initial_model_for_weight_conversion to get plain LoRA"
        raise CardFileError(
            "init_lora_weights", f"one of {_INITS}", shown(config["init_lora_weights"]), hint
        )
    names = (
        "text, a list of text or unset",
        lambda v: v is None or isinstance(v, str) or _all(v, str),
    )
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "r": ("an integer", _is_int),
        "lora_alpha": ("a number", _is_number),
        "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
        "rank_pattern": (
            "integers by pattern",
            lambda v: isinstance(v, dict) and all(map(_is_int, v.values())),
        ),
        "alpha_pattern": (
            "numbers by pattern",
            lambda v: isinstance(v, dict) and all(map(_is_number, v.values())),
        ),
        "target_modules": names,
        "exclude_modules": names,
        "layers_pattern": names,
        "layers_to_transform": (
            "integers or unset",
            lambda v: v is None or _is_int(v) or _all(v, int),
        ),
    }
    defaults = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    for key, (expected, fits) in kinds.items():
        if not fits(value := config.get(key, defaults.get(key))):
            raise CardFileError(key, expected, shown(value))
    chosen = config.get("layers_to_transform") is not None
    if isinstance(config.get("target_modules"), str) and (
        chosen or config.get("layers_pattern") is not None
    ):
        raise CardFileError(
            "target_modules", "a list where layers are chosen", shown(config["target_modules"])
        )
    if config.get("layers_pattern") and not chosen:
        raise CardFileError("layers_to_transform", "the layers that layers_pattern finds", "none")


def _scaling(config: Mapping[str, Any], module: str, found: int) -> float:
    """The module's scaling, once the configuration is seen to give it this adapter and this rank."""
    try:
        if not _targeted(config, module):
            hint = "PEFT would ignore it: remove the tensors, or correct target_modules, exclude_modules, layers_…"
            raise CardFileError(
                f"module {shown(module)}",
                "a module that the configuration targets",
                "another",
                hint,
            )
        rank = _by_pattern(config.get("rank_pattern", {}), module, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern", {}), module, config["lora_alpha"])
    except (re.error, OverflowError, RecursionError) as error:
        raise CardFileError(f"{CONFIG}: a pattern", "a regular expression", error) from error
    if rank != found:
        hint = "correct r or rank_pattern"
        raise CardFileError(
            f"module {shown(module)}", f"rank {rank}, as the configuration says", found, hint
        )
    return finite(alpha, "alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's whole name, or what follows a dot in
    it.
    """
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _named(excluded, module):
        return False
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return True  # the model decided when the adapter was made
    layers = config.get("layers_to_transform")
    if not _named(targets, module) or layers is None or layers == [] or module in targets:
        return _named(targets, module)
    return _layer(module, config.get("layers_pattern")) in (
        layers if isinstance(layers, list) else [layers]
    )


def _named(rule: str | list[str], module: str) -> bool:
    """Whether a pattern matches the whole name, or a list has it or what follows a dot in it."""
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return any(matches(module, key) for key in rule)


def _layer(module: str, patterns: str | list[str] | None) -> int | None:
    """The number after the first component that a pattern matches; without patterns, after any
    component but the first.
    """
    listed = [patterns] if isinstance(patterns, str) and patterns else patterns or ()
    texts = [rf"(?:|.*?\.){pattern}" for pattern in listed] or [r".*?\.[^.]*"]
    matched = (re.match(rf"{text}\.(?P<index>\d{{1,9}})\.", module) for text in texts)
    match = next((each for each in matched if each), None)
    return int(match["index"]) if match and match["index"] else None


def _config(card: LoRACard) -> dict[str, Any]:
    """The configuration under which PEFT computes what the card does."""
    where = f"card {card.name!r}"
    if not card.weights:
        raise CardError(
            f"{where}: weights", "at least one module", "none", "PEFT has no empty adapters"
        )
    if "" in card.weights:
        raise CardError(
            f"{where}: module ''", "a name", "the root", "PEFT can't adapt a bare Linear"
        )
    if unused := sorted(
        card.weights.keys() - set(match_targets(card.weights, card.target_modules))
    ):
        hint = "target them, or drop them: the card does not apply them, PEFT would"
        raise CardError(
            f"{where}: target_modules",
            f"targets that match {shown(unused)}",
            card.target_modules,
            hint,
        )
    alphas = {}
    for module, pair in card.weights.items():
        scaling = finite(pair.scaling, f"{where}: scaling")
        if card.alpha / pair.rank != scaling:
            alphas[_exactly(module)] = _whole(
                finite(scaling * pair.rank, f"{where}: module {module!r}: scaling · rank")
            )
    kept = card.metadata.get("peft")
    carried = kept if isinstance(kept, Mapping) else {}
    return {
        **{key: carried[key] for key in _CARRIED if key in carried},
        "peft_type": "LORA",
        "base_model_name_or_path": card.base_model,
        "inference_mode": True,
        "bias": "none",
        "use_rslora": False,
        "r": card.rank,
        "lora_alpha": _whole(card.alpha),
        "target_modules": list(card.weights),
        "rank_pattern": {
            _exactly(m): pair.rank for m, pair in card.weights.items() if pair.rank != card.rank
        },
        "alpha_pattern": alphas,
    }


def _exactly(module: str) -> str:
    """The pattern that PEFT matches to this module and to none whose name ends like it."""
    return f"^{re.escape(module)}"


def _whole(number: float) -> int | float:
    """An integer where that is what it is: other readers of the format expect one."""
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _check_free(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        found = "one with files" if folder.is_dir() else "a file"
        raise ArgumentError(
            str(folder),
            "a folder that is new or empty",
            found,
            "overwrite=True replaces a PEFT one",
        )
    if not (folder / CONFIG).is_file():
        raise ArgumentError(str(folder), "a PEFT directory to replace", f"no {CONFIG} in it")


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Rename `new` to `folder`; what was there comes back if that fails, and is removed if it does
    not.
    """
    if not folder.exists():
        new.rename(folder)
        return
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _advice(key: str) -> str:
    """What to do about a tensor that is no factor of a Linear."""
    return next(
        (hint for part, hint in _ADVICE.items() if part in key),
        "PEFT's own keys are base_model.model.<module>.lora_A.weight",
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _all(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )
