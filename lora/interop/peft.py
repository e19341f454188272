"""PEFT's adapter folders: ``adapter_config.json`` beside ``adapter_model.safetensors``.

A card computes what PEFT would compute from the folder; PEFT itself is not needed. PEFT stores
``lora_A (r, in)`` and ``lora_B (out, r)`` for every base layer, ``Conv1D`` included, so a card's
factors are their transposes. The rules follow PEFT 0.21.2: ``check_target_module_exists``,
``get_pattern_key``, ``LoraLayer.update_layer``.

Requirements: R23.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from lora.card import LoRACard, check_card
from lora.checks import finite, parse_json
from lora.errors import ArgumentError, CardError, CardFileError, CardNotFoundError, shown
from lora.files import PathLike, as_path, naming, os_errors, replacing
from lora.interop.safetensors import (
    fields_of,
    header_of,
    pair_of,
    read_pairs,
    write_tensors,
)
from lora.targets import ALL_LINEAR, match_targets, matches

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

MAX_CONFIG_BYTES = 2**24
"""A larger configuration is not read."""

Config: TypeAlias = Mapping[str, Any]

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")

_ADVICE = {
    "lora_magnitude_vector": "DoRA is not plain LoRA",
    "lora_embedding_": "LoRA on an embedding can't be a card: train on Linears only",
    "lora_B.bias": "a bias on B (lora_bias) can't be a card",
    ".bias": "trained biases (bias) can't be a card",
    "modules_to_save": "modules that were trained whole can't be a card",
    "": "PEFT's own keys are base_model.model.<module>.lora_A.weight",
}
"""What to do about a tensor that is no factor of a Linear, by a part of its name."""

_ALLOWED: Mapping[str, tuple[list[Any], str]] = {
    "peft_type": (["LORA"], "no other method can be a card"),
    "bias": (["none", None], "trained biases can't be a card"),
    "use_rslora": ([True, False, None], ""),
    "init_lora_weights": (
        [True, False, None, "gaussian", "eva", "orthogonal", "mica"],
        "it changed the base: save with path_initial_model_for_weight_conversion to get plain LoRA",
    ),
}
"""Field -> (the values that plain LoRA has there, what to do about another)."""

_CARD_FIELDS = frozenset(("r", "lora_alpha", "rank_pattern", "alpha_pattern")).union(
    ("target_modules", "base_model_name_or_path")
)
"""Fields that a card has, too; it keeps the others in ``metadata["peft"]``."""

_CARRIED = ("auto_mapping", "fan_in_fan_out", "lora_dropout", "revision", "task_type")
"""Fields that change no output: an export takes them over from ``metadata["peft"]``."""

_PLAIN = _CARD_FIELDS.union(
    _ALLOWED,
    _CARRIED,
    ("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    ("peft_version", "inference_mode", "runtime_config", "qalora_group_size"),
    ("eva_config", "corda_config", "lora_ga_config", "loftq_config"),  # read by initialisations
)
"""Fields that plain LoRA may set; any other, known to PEFT today or not, must be unset."""

_MAY_BE_EMPTY = frozenset(
    ["modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"]
)


def import_peft(folder: PathLike, *, name: str | None = None) -> LoRACard:
    """Read a card from a PEFT adapter folder, without PEFT and without torch.

    Each module gets its scaling, ``alpha / r`` or ``alpha / √r`` (``use_rslora``), with rank and
    alpha of the first pattern in the file that matches. Targets are the configuration's list, or if
    it has another form, the modules with weights. Other settings go to ``metadata["peft"]``.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``. Its patterns are
            regular expressions and run as PEFT runs them: a slow one is slow here, too.
        name: The card's name. Default: the one that `export_peft` wrote, else the folder's.

    Raises:
        CardFileError: The files are malformed, contradict each other, are more than plain LoRA, or
            the weights are a pickle, which is never read.
    """
    folder = as_path(folder).absolute()
    path = folder / CONFIG
    with naming(path):
        if not path.is_file():
            raise CardNotFoundError(str(path), "a PEFT configuration", "none")
        with os_errors(path), path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise CardFileError("size", f"at most {MAX_CONFIG_BYTES} bytes", "more")
        config = parse_json(text, "configuration", dict)
        _check_plain(config)
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        hint = "reading a pickle runs code: load it with PEFT, save it with safe_serialization=True"
        raise CardFileError(str(folder), WEIGHTS, PICKLE, hint)
    pairs, header = read_pairs(folder / WEIGHTS, _KEY, _ADVICE)
    with naming(folder):
        if not pairs:
            raise CardFileError(WEIGHTS, "at least one pair of factors", "none")
        weights = {
            m: pair_of(m, a.T, b.T, _scaling(config, m, len(a))) for m, (a, b) in pairs.items()
        }
        targets: Any = config.get("target_modules")
        targets = sorted(set(targets)) if isinstance(targets, list) else tuple(weights)
        fields = fields_of(header)
        fields["metadata"]["peft"] = {
            key: value
            for key, value in config.items()
            if key not in _CARD_FIELDS and value is not None
        }
        return LoRACard(
            name=name or header.get("lora.name") or folder.name,
            rank=max(pair.rank for pair in weights.values()),
            alpha=config.get("lora_alpha"),  # type: ignore[arg-type] # the card refuses None
            target_modules=targets,
            weights=weights,
            base_model=config.get("base_model_name_or_path"),
            **fields,
        )


def export_peft(card: LoRACard, folder: PathLike, *, overwrite: bool = False) -> None:
    """Write a card as a folder that PEFT loads, for a model whose module names are the card's keys.

    The two files are complete before they take their places, and a folder that is overwritten has
    no configuration meanwhile: a reader never sees one file without the other. If replacing fails,
    the old adapter is put back.

    Args:
        card: Has weights, all of them targeted. A scaling other than ``alpha / r`` becomes an
            ``alpha_pattern`` of scaling · r, which gives it back to one ulp.
        folder: New or empty.
        overwrite: Replace the adapter in a PEFT folder.

    Raises:
        CardError: PEFT has no way to express the card.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from lora.card import LowRank
        >>> pair = LowRank(np.ones((4, 1)), np.ones((1, 3)), 0.3)
        >>> card = LoRACard("docs", 1, 2.0, ["q"], {"q": pair})
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
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not empty and not (overwrite and (folder / CONFIG).is_file()):
            expected = f"a new or empty folder, or with overwrite=True one that holds {CONFIG}"
            contents = "a folder with files" if folder.is_dir() else "a file"
            raise ArgumentError(str(folder), expected, contents)
        folder.mkdir(exist_ok=True)
        backups = {}
        try:
            with replacing(folder / CONFIG) as file:
                file.write(json.dumps(config, indent=2, sort_keys=True).encode())
                with replacing(folder / WEIGHTS) as weights_file:
                    write_tensors(weights_file, tensors, {"format": "pt", **header_of(card)})
                    for path in folder / CONFIG, folder / WEIGHTS:
                        if path.exists():
                            backups[path] = path.rename(folder / f".{path.name}.old")
        except BaseException:
            for path, backup in reversed(backups.items()):
                backup.replace(path)
            raise
        for backup in backups.values():
            backup.unlink()


def _check_plain(config: Config) -> None:
    """Refuse what is not plain LoRA, and fields that are not of the kind that PEFT writes."""
    for key, value in sorted(config.items()):
        unset = value is None or value is False or (key in _MAY_BE_EMPTY and value in ([], {}))
        if key not in _PLAIN and not unset:
            raise CardFileError(key, "unset", shown(value), "only plain LoRA can be a card")
    for key, (allowed, hint) in _ALLOWED.items():
        value = shown(config.get(key))
        if value not in map(shown, allowed):
            raise CardFileError(key, f"one of {allowed}", value, hint)
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    pattern = config.get("layers_pattern")
    if (pattern and layers is None) or (layers is not None and isinstance(targets, str)):
        expected = "a list of target_modules where layers_to_transform chooses layers"
        raise CardFileError("layers", expected, shown((targets, layers, pattern)))


def _scaling(config: Config, module: str, rank: int) -> float:
    """Return a module's scaling; the configuration must target it and give it its rank."""
    expected = "no weights, as the configuration targets other modules"
    try:
        if _targeted(config, module):
            expected = f"rank {_by_pattern(config, 'rank_pattern', module, 'r')!r}"
        alpha = _by_pattern(config, "alpha_pattern", module, "lora_alpha")
    except Exception as error:  # a pattern from outside may fail in many ways
        raise CardFileError(f"{CONFIG}: a target or pattern", "as PEFT has it", error) from error
    if expected != f"rank {rank}":
        hint = "PEFT would ignore or refuse it: correct r, rank_pattern or the targets"
        raise CardFileError(f"module {shown(module)}", expected, f"rank {rank}", hint)
    return finite(alpha, "alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Config, patterns: str, module: str, default: str) -> Any:
    """Return the value of the first pattern that matches the whole name or its end after a dot."""
    for key, value in config.get(patterns, {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config[default]


def _targeted(config: Config, module: str) -> bool:
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _named(excluded, module):
        return False
    if targets is None or str(targets).lower() == ALL_LINEAR:
        return True  # the model decided when the adapter was made
    layers = config.get("layers_to_transform")
    named = _named(targets, module)
    if layers in (None, []) or module in targets or not named:
        return named
    patterns = config.get("layers_pattern") or []
    prefixes = [
        rf"(?:|.*?\.){key}" for key in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    for prefix in prefixes or [r".*?\.[^.]*"]:  # without patterns, any component but the first
        if match := re.match(rf"{prefix}\.(?P<index>\d{{1,9}})\.", module):
            numbers = layers if isinstance(layers, list) else [layers]
            return match["index"] is not None and int(match["index"]) in numbers
    return False


def _named(rule: str | list[str], module: str) -> bool:
    """Tell whether a pattern matches the whole name, or a list holds it or its end after a dot."""
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return True in [matches(module, key) for key in rule]


def _config(card: LoRACard) -> dict[str, Any]:
    """Return the configuration with which PEFT computes what the card does."""
    where = f"card {card.name!r}"
    if not card.weights or "" in card.weights:
        expected = "at least one module, each with a name"
        hint = "PEFT has no empty adapters and can't adapt the root"
        raise CardError(f"{where}: weights", expected, sorted(card.weights), hint)
    if unused := sorted(set(card.weights) - set(match_targets(card.weights, card.target_modules))):
        expected = f"targets that match {shown(unused)}"
        hint = "target them, or drop them: the card does not apply them, PEFT would"
        raise CardError(f"{where}: target_modules", expected, card.target_modules, hint)
    ranks, alphas = {}, {}
    for module, pair in card.weights.items():
        pattern = f"^{re.escape(module)}"  # of this module, and of none whose name ends like it
        if pair.rank != card.rank:
            ranks[pattern] = pair.rank
        if card.alpha / pair.rank != pair.scaling:
            product = (pair.scaling or 0.0) * pair.rank  # a card's pairs have a scaling
            alphas[pattern] = _whole(finite(product, f"{where}: {module!r}: scaling · rank"))
    carried = card.metadata.get("peft")
    carried = carried if isinstance(carried, dict) else {}
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
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _whole(number: float) -> int | float:
    """Return an integer if the number is one, as other readers of the format expect."""
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
