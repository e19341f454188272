"""PEFT's adapter folders: ``adapter_config.json`` beside ``adapter_model.safetensors``.

A card computes what PEFT would compute from the folder; PEFT itself is not needed. PEFT stores
``lora_A (r, in)`` and ``lora_B (out, r)`` for every base layer, ``Conv1D`` included, so a card's
factors are their transposes. The rules follow PEFT 0.21.2: ``check_target_module_exists``,
``get_pattern_key``, ``LoraLayer.update_layer``.

Requirements: R23, R26.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from lora.card import LoRACard, check_card
from lora.checks import JSON_NAMES, finite, naming, require
from lora.errors import ArgumentError, CardError, CardFileError, CardNotFoundError, shown
from lora.experts import by_expert
from lora.files import PathLike, as_path, os_errors, replacing
from lora.interop.factor_files import (
    CONFIG,
    Pairs,
    fields_of,
    header_of,
    pair_of,
    read_config,
    read_pairs,
    write_tensors,
)
from lora.targets import ALL_LINEAR, match_targets, matches

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_UNFINISHED = f".{CONFIG}.tmp"
"""The configuration, while an export writes; one that is killed leaves it."""

Config: TypeAlias = Mapping[str, Any]

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)

_FUSED_EXPERT = re.compile(r"(^|\.)experts\.\d+\.gate_up_proj$")
"""A name that only a fused parameter gives: PEFT would leave these factors out without a word."""

_MERGE = "merge it into the base with PEFT's merge_and_unload and use lora extract on the result"
_WHOLE = "what was trained whole can't be a card: train without it, or " + _MERGE

_ADVICE = {
    "lora_embedding_": "LoRA on an embedding can't be a card: train on Linears only",
    "lora_B.bias": "a bias on B (lora_bias) can't be a card",
    ".bias": "trained biases (bias) can't be a card",
    "modules_to_save": _WHOLE,
    "": "PEFT's own keys are base_model.model.<module>.lora_A.weight",
}
"""What to do about a tensor that is no factor of a Linear, by a part of its name."""

_MLX = ("mlx-lm's form", "convert its adapters.safetensors instead of the folder")
_HUB = (
    "AdapterHub's form",
    "it can't be a card: merge it there, and use lora extract on the model",
)

_FORMATS = {
    "lora_parameters": _MLX,
    "fine_tune_type": _MLX,
    "adapters.*": _MLX,
    "model_class": _HUB,
    "pytorch_adapter.bin": _HUB,
    "head_config.json": _HUB,
    "pytorch_lora_weights.*": ("diffusers' form", "convert its .safetensors file instead"),
    "*.gguf": ("GGUF", "use the PEFT folder that it was converted from"),
    _UNFINISHED: ("an export that was killed", "export again, with `overwrite=True`"),
    f"*/{CONFIG}": ("adapters in subfolders", "name one of the subfolders"),
    "config.json": ("the folder of a model", "lora extract makes a card of it and of its base"),
}
"""A key of a configuration, or the name of a file -> (what the folder holds, the way to go)."""

_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_KINDS: Mapping[str, tuple[Any, ...]] = {
    "r": (int,),
    "lora_alpha lora_dropout": (int, float),
    "rank_pattern": ((dict, int),),
    "alpha_pattern": ((dict, int, float),),
    "use_rslora fan_in_fan_out": (True, False),
    "target_modules exclude_modules layers_pattern": (None, str, (list, str)),
    "layers_to_transform": (None, int, (list, int)),
    "peft_type": ("LORA",),
    "task_type": (None, *_TASKS),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "modules_to_save layer_replication": (None, []),
    "target_parameters": (None, (list, str)),
    "trainable_token_indices": (None, {}),
    # variants of LoRA
    "velora_config monteclora_config use_bdlora arrow_config kasa_config": (None,),
    # read where an adapter is made, not where it is applied
    "loftq_config eva_config corda_config lora_ga_config": (None, dict),
    # not read, or of no effect on what is computed
    "auto_mapping base_model_name_or_path inference_mode revision peft_version": (...,),
    "megatron_core qalora_group_size runtime_config": (...,),
}
"""Fields -> what each may be in plain LoRA: a value, a type, a container with the types of its
items, or anything. A field that is not listed, known to PEFT today or not, must be null or false.
"""

_FIELDS = {field: kinds for fields, kinds in _KINDS.items() for field in fields.split()}

_HINTS = {
    "peft_type": "no other method can be a card: if it can be merged, " + _MERGE,
    **dict.fromkeys(["r", "lora_alpha"], "PEFT writes this number into every configuration"),
    "bias": "trained biases can't be a card",
    "init_lora_weights": "it changed the base: to get plain LoRA, save with "
    "path_initial_model_for_weight_conversion",
    "use_dora": "DoRA can't be a card: " + _MERGE,
    "modules_to_save": _WHOLE,
}

_CARD_FIELDS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("target_modules", "base_model_name_or_path"),
)
"""Fields that a card has, too; it keeps the others in ``metadata["peft"]``."""

_CARRIED = ("auto_mapping", "fan_in_fan_out", "lora_dropout", "revision", "task_type")
"""Fields that change no output: an export takes them over from ``metadata["peft"]``."""


def import_peft(folder: PathLike, *, name: str | None = None) -> LoRACard:
    """Read a card from a PEFT adapter folder, without PEFT and without torch.

    A module's scaling is ``alpha / r``, or ``alpha / √r`` with ``use_rslora``; the first pattern in
    the file that matches its name gives r and alpha. Targets are the configuration's list; if it
    has none, the modules with weights. Other settings go to ``metadata["peft"]``.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``. Its patterns are
            regular expressions and run as PEFT runs them: a slow one is slow here, too.
        name: The card's name. Default: the one that `export_peft` wrote, else the folder's.

    Raises:
        CardFileError: The files are malformed, contradict each other or are more than plain LoRA,
            or the weights are a pickle, which is never read.
        CardNotFoundError: There is no ``adapter_config.json``, also in a folder of another format.

    Examples:
        >>> import tempfile
        >>> from lora import LowRank
        >>> card = LoRACard("docs", 2, 2.0, ["q"], {"q": LowRank(np.eye(2), np.eye(2))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_peft(card, folder)
        ...     import_peft(folder, name="mine").name
        'mine'
    """
    folder = as_path(folder).absolute()
    with os_errors(folder):
        config = read_config(folder) if (folder / CONFIG).is_file() else {}
        files = [marker for marker in _FORMATS if marker in config or any(folder.glob(marker))]
        is_pickle = not (folder / WEIGHTS).exists() and (folder / PICKLE).exists()
    if "peft_type" not in config:
        kind, contents = (CardFileError, "no peft_type") if config else (CardNotFoundError, "none")
        default = (
            contents,
            "PEFT's save_pretrained writes it" if folder.exists() else "no such folder",
        )
        contents, hint = next(map(_FORMATS.__getitem__, files), default)
        raise kind(str(folder / CONFIG), "a PEFT configuration", contents, hint)
    with naming(folder / CONFIG):
        check_plain(config)
    if is_pickle:
        hint = "reading a pickle runs code: load it with PEFT, save it with safe_serialization=True"
        raise CardFileError(str(folder), WEIGHTS, PICKLE, hint)
    pairs, header = read_pairs(folder / WEIGHTS, _KEY, _ADVICE)
    with naming(folder):
        require(bool(pairs), WEIGHTS, "at least one pair of factors", pairs)
        targets: Any = config.get("target_modules")
        targets = set(targets) if isinstance(targets, list) else None
        weights = {}
        parameters = _parameters(config, pairs)
        for module, (a, b) in pairs.items():
            parameter = parameters.get(module)
            if parameter is None:
                weights[module] = pair_of(module, a.T, b.T, scaling_of(config, module, len(a)))
                continue
            with _reading_patterns():
                rank = _by_pattern(config, "rank_pattern", parameter, "r")
            scaling = scaling_of(config, parameter, rank)
            for key, factors in by_expert(parameter, rank, a, b).items():
                weights[key] = pair_of(key, *factors, scaling)
                if targets is not None:
                    targets.add(key.rpartition(".")[2])
        fields = fields_of(header)
        fields["metadata"]["peft"] = {
            key: value
            for key, value in config.items()
            if key not in _CARD_FIELDS and value is not None
        }
        return LoRACard(
            name=name or header.get("lora.name") or folder.name,
            rank=max(pair.rank for pair in weights.values()),
            alpha=config["lora_alpha"],
            target_modules=tuple(weights if targets is None else sorted(targets)),
            weights=weights,
            base_model=config.get("base_model_name_or_path"),
            **fields,
        )


def export_peft(
    card: LoRACard, folder: PathLike, *, overwrite: bool = False, exact: bool = False
) -> None:
    """Write a card as a folder that PEFT loads, for a model whose module names are the card's keys.

    Readers other than PEFT know one rank and one alpha for all modules. So all modules are padded
    with zeros to the card's rank. Scalings that differ are multiplied into B, which is rounded
    once; ``alpha_pattern`` and ``rank_pattern`` are written only where a product would leave the
    range of B's dtype. While files are replaced, the folder has no configuration. If the process is
    killed then, export again with ``overwrite=True``.

    Args:
        card: Has weights, all of them targeted.
        folder: A path where there is nothing yet, or an empty folder.
        overwrite: Replace the adapter in a PEFT folder, or what a killed export left.
        exact: Keep every bit of the factors, and the scalings to one ulp, by patterns if needed.

    Raises:
        CardError: PEFT has no way to express the card.
        ArgumentError: The folder holds files that may not be replaced.

    Examples:
        >>> import tempfile
        >>> from lora.card import LowRank
        >>> card = LoRACard("docs", 2, 2.0, ["q"], {"q": LowRank(np.eye(2), np.eye(2))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_peft(card, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_card(card)
    config, weights = _config(card, exact)
    tensors = {}
    for module, (a, b) in weights.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.T
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.T
    folder = as_path(folder)
    with os_errors(folder):
        files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        ours = not files.isdisjoint((CONFIG, _UNFINISHED)) or files <= {WEIGHTS}
        if (files and not (overwrite and ours)) or (folder.exists() and not folder.is_dir()):
            expected = f"a new or empty folder, or with `overwrite=True` one that holds {CONFIG}"
            contents = "a folder with files" if files else "a file"
            raise ArgumentError(str(folder), expected, contents)
        folder.mkdir(exist_ok=True)
        with replacing(folder / CONFIG, _UNFINISHED) as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode())
            with replacing(folder / WEIGHTS, f".{WEIGHTS}.tmp") as weights_file:
                write_tensors(weights_file, tensors, {"format": "pt", **header_of(card)})
                for each in (file, weights_file):  # what can fail, before the old ones go
                    each.flush()
                    os.fsync(each.fileno())
                for name in (CONFIG, PICKLE):
                    (folder / name).unlink(missing_ok=True)


def check_plain(config: Config) -> None:
    """Refuse what is not plain LoRA, and fields of another kind than PEFT's."""
    for key, value in {"peft_type": None, "r": None, "lora_alpha": None, **config}.items():
        allowed = _FIELDS.get(key, (None, False))
        if not any(_is_a(value, alternative) for alternative in allowed):
            hint = _HINTS.get(key, "only plain LoRA can be a card")
            expected = " or ".join(map(_called, allowed))
            raise CardFileError(key, expected, shown(value), hint)
    dropout = config.get("lora_dropout", 0)
    require(dropout <= 1, "lora_dropout", "a number <= 1", dropout)
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    pattern = config.get("layers_pattern")
    is_pattern = isinstance(targets, str)
    lone = (layers is None and pattern) or (is_pattern and (layers, pattern) != (None, None))
    expected = "a list of target_modules where layers_to_transform chooses layers"
    require(not lone, "layers", expected, (targets, layers, pattern))


def _is_a(value: Any, alternative: Any) -> bool:
    if isinstance(alternative, tuple):
        container, *types = alternative
        parts = list(value.values()) if isinstance(value, dict) else value
        return type(value) is container and all(type(part) in types for part in parts)
    is_type = isinstance(alternative, type) and type(value) is alternative
    return is_type or alternative is ... or shown(value) == shown(alternative)


def _called(alternative: Any) -> str:
    if isinstance(alternative, tuple):
        return f"{JSON_NAMES[alternative[0]]} of {_called(alternative[-1])}s"
    return JSON_NAMES[alternative] if isinstance(alternative, type) else json.dumps(alternative)


def scaling_of(config: Config, module: str, rank: int) -> float:
    """Return a module's scaling; the configuration must target it and give it its rank."""
    expected = "no weights, as the configuration targets other modules"
    with _reading_patterns():
        if _targeted(config, module):
            expected = f"rank {_by_pattern(config, 'rank_pattern', module, 'r')!r}"
        alpha = _by_pattern(config, "alpha_pattern", module, "lora_alpha")
    if expected != f"rank {rank}":
        hint = "PEFT would ignore or refuse it: correct r, rank_pattern or the targets"
        raise CardFileError(f"module {shown(module)}", expected, f"rank {rank}", hint)
    return finite(alpha, "alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)


@contextmanager
def _reading_patterns() -> Iterator[None]:
    """Re-raise whatever a pattern from outside fails with."""
    try:
        yield
    except Exception as error:
        raise CardFileError(f"{CONFIG}: a target or pattern", "as PEFT has it", error) from error


def _by_pattern(config: Config, patterns: str, module: str, default: str) -> Any:
    """Return the value of the first pattern that matches the whole name or its end after a dot."""
    for key, value in config.get(patterns, {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config[default]


def _parameters(config: Config, modules: Iterable[str]) -> dict[str, str]:
    """Return the parameter of `target_parameters` that the factors of some modules are for.

    PEFT wraps a module once for each of its parameters, the first one innermost, and names what is
    wrapped ``base_layer``.
    """
    targets = set(config.get("target_parameters") or ())
    if not targets:
        return {}
    nested: dict[str, list[str]] = {}
    for module in sorted(modules):  # the outermost first
        nested.setdefault(re.sub(r"(\.base_layer)+$", "", module), []).append(module)
    parameters, matched = dict[str, str](), set[str]()
    for owner, wrapped in nested.items():
        own = {t for t in targets if matches(owner, t.rpartition(".")[0] or "experts")}
        leaves = sorted({target.rpartition(".")[2] for target in own})
        is_known = len(leaves) < 2 or leaves == ["down_proj", "gate_up_proj"]
        where = f"module {shown(owner)}"
        expected = f"the factors of each of {leaves}"
        require(not own or (is_known and len(leaves) == len(wrapped)), where, expected, wrapped)
        parameters |= {m: f"{owner}.{leaf}" for m, leaf in zip(wrapped, leaves, strict=False)}
        matched |= own
    require(matched == targets, "target_parameters", "factors of each", sorted(targets - matched))
    return parameters


def _targeted(config: Config, module: str) -> bool:
    if _named(config.get("target_parameters") or [], module):
        return True
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _named(excluded, module):
        return False
    if targets is None:
        targets = [module.rpartition(".")[2]]  # by the model's type, as the adapter was made
    if str(targets).lower() == ALL_LINEAR:
        return True
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
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return True in [matches(module, key) for key in rule]


def _config(card: LoRACard, exact: bool) -> tuple[dict[str, Any], Pairs]:  # noqa: FBT001
    where = f"card {card.name!r}"
    if not card.weights or "" in card.weights:
        expected = "at least one module, each with a name"
        hint = "PEFT has no empty adapters and can't adapt the root"
        raise CardError(f"{where}: weights", expected, sorted(card.weights), hint)
    if unused := sorted(set(card.weights) - set(match_targets(card.weights, card.target_modules))):
        expected = f"targets that match {shown(unused)}"
        hint = "target them, or drop them: the card does not apply them, PEFT would"
        raise CardError(f"{where}: target_modules", expected, card.target_modules, hint)
    carried = card.metadata.get("peft")
    carried = carried if isinstance(carried, dict) else {}
    if any(map(_FUSED_EXPERT.search, card.weights)) or carried.get("target_parameters"):
        expected, hint = "modules that PEFT has", "merge the card into a checkpoint with lora fold"
        raise CardError(f"{where}: weights", expected, "single experts of fused parameters", hint)
    settings, weights = (None if exact else _common_scaling(card)) or _patterns(card, where)
    config = {
        **{key: carried[key] for key in _CARRIED if key in carried},
        "peft_type": "LORA",
        "base_model_name_or_path": card.base_model,
        "inference_mode": True,
        "bias": "none",
        "use_rslora": False,
        "r": card.rank,
        "lora_alpha": _whole(card.alpha),
        "target_modules": list(card.weights),
        "rank_pattern": {},
        "alpha_pattern": {},
        **settings,
    }
    with naming(f"{where}: metadata: peft"):
        check_plain(config)
    return config, weights


def _patterns(card: LoRACard, where: str) -> tuple[dict[str, Any], Pairs]:
    """Return settings of a rank and a scaling for each module, and the factors as they are."""
    ranks, alphas = {}, {}
    for module, pair in card.weights.items():
        pattern = f"^{re.escape(module)}"  # of this module, and of none whose name ends like it
        if pair.rank != card.rank:
            ranks[pattern] = pair.rank
        if card.alpha / pair.rank != pair.scaling:
            product = (pair.scaling or 0.0) * pair.rank  # a card's pairs have a scaling
            alphas[pattern] = _whole(finite(product, f"{where}: {module!r}: scaling · rank"))
    weights = {module: (pair.A, pair.B) for module, pair in card.weights.items()}
    return {"rank_pattern": ranks, "alpha_pattern": alphas}, weights


def _common_scaling(card: LoRACard) -> tuple[dict[str, Any], Pairs] | None:
    """Return settings of one rank and one scaling, and the factors that go with them.

    Where the scalings differ, the common one is a power of two, so that B is rounded only once.
    None says that a product would leave the range of B's dtype.
    """
    scalings = {pair.scaling or 0.0 for pair in card.weights.values()}
    common = max(map(abs, scalings))
    if scalings != {common} or common == 0:
        common = math.ldexp(0.5, math.frexp(common)[1])
    weights: Pairs = {}
    for module, pair in card.weights.items():
        b, factor = pair.B, (pair.scaling or 0.0) / common
        if factor != 1:
            with np.errstate(all="ignore"):
                product = b.astype(np.float64) * factor
                b = product.astype(pair.dtype)
                error = np.abs(b.astype(np.float64) - product).max()
                largest = np.abs(product).max()
                bound = float(np.spacing(np.ones((), pair.dtype))) * largest
                is_lost = factor != 0 and pair.B.any() and largest < np.finfo(np.float64).tiny
            if is_lost or not error <= bound or factor * common != pair.scaling:
                return None
        zeros = (0, card.rank - pair.rank)
        weights[module] = np.pad(pair.A, ((0, 0), zeros)), np.pad(b, (zeros, (0, 0)))
    is_rslora = card.alpha / card.rank != common == card.alpha / math.sqrt(card.rank)
    is_alpha = is_rslora or card.alpha / card.rank == common
    alpha = card.alpha if is_alpha else common * card.rank
    if not math.isfinite(alpha):
        return None
    return {"use_rslora": is_rslora, "lora_alpha": _whole(alpha)}, weights


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
