"""Presets: LoRA configurations for five tasks, and `CardInfo`, a card's description of itself.

A preset names roles (query, gate …); `fit` finds their modules by the names that BERT, Llama and
related models use.

Requirements: R21.
"""

import json
import re
from calendar import monthrange
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Self

from lora.card import DTYPES, LoRACard
from lora.checks import choice, integer, is_semantic_version, share
from lora.errors import ArgumentError, TargetError, shown
from lora.targets import ALL_LINEAR, matches, suffixes

ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "query": (
            *("attention.self.query", "self_attn.q_proj", "attention.attn.q", "attention.q_lin"),
            *("attention.self.query_proj", "attention.query", "SelfAttention.q", "attn.Wqkv"),
        ),
        "key": (
            *("attention.self.key", "self_attn.k_proj", "attention.attn.k", "attention.k_lin"),
            *("attention.self.key_proj", "attention.key", "SelfAttention.k"),
        ),
        "value": (
            *("attention.self.value", "self_attn.v_proj", "attention.attn.v", "attention.v_lin"),
            *("attention.self.value_proj", "attention.value", "SelfAttention.v"),
        ),
        "output": (
            *("attention.output.dense", "self_attn.o_proj", "attention.attn.o"),
            *("attention.out_lin", "SelfAttention.o", "attn.Wo"),
        ),
        "gate": ("mlp.gate_proj",),
        "up": ("intermediate.dense", "mlp.up_proj", "ffn.lin1", "mlp.Wi"),
        "down": ("output.dense", "mlp.down_proj", "ffn.lin2", "mlp.Wo"),
    }
)
"""Role -> suffixes of the modules that have it, in BERT, Llama, MPNet, DistilBERT, DeBERTa, ALBERT,
T5 and ModernBERT (whose fused projection is the query's); the first role that matches.
"""


def _json_values(value: Any) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(value))))


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of an adapter to be trained.

    Args:
        alpha: ΔW is scaled by alpha / rank.
        dropout: On the low-rank path in training, in [0, 1).
        target_modules: As in `LoRACard`.
        tags: Each once.

    Examples:
        >>> LoRAConfig.from_dict({"rank": 4}).to_dict()["alpha"]
        16.0
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("query", "value")
    task_type: str = ""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        card = LoRACard("config", self.rank, self.alpha, self.target_modules, {})  # checks them
        _check_text(self.task_type, "config: task_type")
        vars(self).update(
            rank=card.rank,
            alpha=card.alpha,
            dropout=share(self.dropout, "config: dropout", "[0, 1)"),
            target_modules=card.target_modules,
            tags=_texts(self.tags, "config: tags"),
        )

    to_dict = _json_values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the config of these fields; a missing field has its default."""
        try:
            return cls(**values)
        except TypeError as error:
            known = ", ".join(field.name for field in fields(cls))
            raise ArgumentError("config", f"only the fields {known}", error) from error


@dataclass(frozen=True)
class Preset:
    """The settings of a task's adapter, with roles in place of module names."""

    task: str
    rank: int
    alpha: float
    dropout: float
    roles: tuple[str, ...]
    tags: tuple[str, ...]


_QKV = ("query", "key", "value")
_ROWS = (
    Preset("coder", 16, 32.0, 0.05, (*_QKV, "output"), ("code-gen", "refactoring", "syntax")),
    Preset("researcher", 8, 16.0, 0.1, _QKV, ("analysis", "research", "synthesis")),
    Preset("security", 16, 32.0, 0.05, tuple(ROLES), ("security", "vulnerabilities", "audit")),
    Preset(
        "architect",
        12,
        24.0,
        0.05,
        ("query", "value", "gate", "up"),
        ("architecture", "design", "patterns"),
    ),
    Preset("reviewer", 8, 16.0, 0.1, ("query", "value"), ("review", "quality", "best-practices")),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.task: preset for preset in _ROWS})
"""The presets of the five tasks, by name."""


@dataclass(frozen=True)
class Fitted:
    """A preset on one model.

    Args:
        config: Its targets match exactly the modules with the preset's roles.
        modules: Name -> number of parameters of the factors, r · (in + out); sorted.
        nbytes: Bytes of all factors in the requested dtype.
    """

    config: LoRAConfig
    modules: Mapping[str, int]
    nbytes: int

    @property
    def num_params(self) -> int:
        """Number of elements of all factors."""
        return sum(self.modules.values())


def fit(
    preset: Preset | str, shapes: Mapping[str, tuple[int, int]], *, dtype: str = "float32"
) -> Fitted:
    """Map a preset onto the Linears of a model.

    An encoder's feed-forward block has no gate, so there "gate/up" is ``intermediate.dense`` alone.

    Args:
        preset: A preset, or the name of one of `PRESETS`.
        shapes: Name of every Linear of the model -> ``(in, out)``.
        dtype: Of the factors, for the number of bytes.

    Examples:
        >>> names = [f"layer.0.attention.self.{part}" for part in ("query", "key", "value")]
        >>> names += ["layer.0.attention.output.dense", "layer.0.output.dense"]
        >>> fitted = fit("coder", dict.fromkeys(names, (384, 384)))
        >>> fitted.config.target_modules, fitted.num_params
        (('attention.output.dense', 'key', 'query', 'value'), 49152)
    """
    if not isinstance(preset, Preset):
        choice(preset, "preset", PRESETS)
        preset = PRESETS[preset]
    choice(dtype, "dtype", DTYPES)
    if not isinstance(shapes, Mapping):
        raise ArgumentError("shapes", "a mapping of names to (in, out)", shown(shapes))
    sizes = {}
    for name, shape in shapes.items():
        if not (isinstance(name, str) and isinstance(shape, Sequence) and len(shape) == 2):
            expected = "a name and (in, out) of each Linear"
            raise ArgumentError("shapes", expected, shown((name, shape)))
        sizes[name] = sum(integer(size, f"shapes: {shown(name)}", 1) for size in shape)
    roles = {name: role_of(name) for name in sizes}
    if missing := set(preset.roles) - {"gate"} - set(roles.values()):
        known = ", ".join(suffix for role in sorted(missing) for suffix in ROLES[role])
        none = f"none that is a {' or '.join(sorted(missing))}"
        hint = "name the target modules in a LoRAConfig of your own"
        raise TargetError(f"preset {preset.task!r}", f"modules such as {known}", none, hint)
    names = sorted(name for name, role in roles.items() if role in preset.roles)
    modules = {name: preset.rank * sizes[name] for name in names}
    targets = _targets(names, sizes.keys() - names)
    settings = (preset.rank, preset.alpha, preset.dropout, targets, preset.task, preset.tags)
    nbytes = sum(modules.values()) * DTYPES[dtype].itemsize
    return Fitted(LoRAConfig(*settings), MappingProxyType(modules), nbytes)


def cost_table(
    models: Mapping[str, Mapping[str, tuple[int, int]]], *, dtype: str = "float32"
) -> str:
    """Return a Markdown table of what each preset costs on each model.

    Args:
        models: Title -> name of every Linear -> ``(in, out)``.

    Examples:
        >>> llama = {f"model.layers.0.self_attn.{part}_proj": (64, 64) for part in "qkvo"}
        >>> llama |= {f"model.layers.0.mlp.{part}_proj": (64, 128) for part in ("gate", "up")}
        >>> llama |= {"model.layers.0.mlp.down_proj": (128, 64)}
        >>> print(cost_table({"tiny": llama}).splitlines()[-1])
        | tiny | reviewer | 8 | 16 | 2 | 2,048 | 8,192 |
    """
    if not isinstance(models, Mapping):
        raise ArgumentError("models", "a mapping of titles to shapes", shown(models))
    lines = [
        f"| model | preset | rank | alpha | modules | parameters | bytes ({dtype}) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for title, shapes in models.items():
        for task, preset in PRESETS.items():
            fitted = fit(preset, shapes, dtype=dtype)
            cost = f"{len(fitted.modules)} | {fitted.num_params:,} | {fitted.nbytes:,}"
            lines.append(f"| {title} | {task} | {preset.rank} | {preset.alpha:g} | {cost} |")
    return "\n".join(lines)


def role_of(module: str) -> str | None:
    """Return the role of a module by its name; None if it has none.

    Examples:
        >>> names = ("0.attention.output.dense", "0.output.dense", "pooler.dense")
        >>> [role_of(name) for name in names]
        ['output', 'down', None]
    """
    name = module.replace("crossattention.", "attention.")
    return next((role for role, keys in ROLES.items() if any(matches(name, k) for k in keys)), None)


def default_targets(names: Iterable[str]) -> tuple[str, ...]:
    """Return targets that match the queries and values among the Linears; else all of them.

    Examples:
        >>> default_targets(["0.attention.q_lin", "0.attention.k_lin"]), default_targets(["0"])
        (('q_lin',), ('all-linear',))
    """
    names = set(names)
    targeted = sorted(name for name in names if role_of(name) in ("query", "value"))
    return _targets(targeted, names - set(targeted)) if targeted else (ALL_LINEAR,)


_TIME = re.compile(
    r"(\d{4})-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\dZ", re.ASCII
)


@dataclass(frozen=True)
class CardInfo:
    """What a card says about itself in its metadata.

    Args:
        version: Semantic version 2.0.0.
        quality: In [0, 1]; None if it was not measured.
        created, modified: UTC as ``YYYY-MM-DDThh:mm:ssZ``; empty if unknown.

    Examples:
        >>> info = CardInfo("1.2.0", "Python documentation", tags=("python",))
        >>> card = LoRACard("docs", 1, 1.0, [], {}, info.to_metadata())
        >>> CardInfo.from_metadata(card.metadata) == info
        True
    """

    version: str = "0.1.0"
    description: str = ""
    quality: float | None = None
    created: str = ""
    modified: str = ""
    training_data: str = ""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_text(self.description, "card info: description")
        _check_text(self.training_data, "card info: training_data")
        if not is_semantic_version(self.version):
            expected = "a semantic version such as 1.0.0"
            raise ArgumentError("card info: version", expected, shown(self.version))
        for field, time in (("created", self.created), ("modified", self.modified)):
            if time != "" and not _is_time(time):
                expected = "a UTC time such as 2026-01-31T12:00:00Z"
                raise ArgumentError(f"card info: {field}", expected, shown(time))
        if self.modified and self.modified < self.created:
            expected = f"a time not before created, {self.created}"
            raise ArgumentError("card info: modified", expected, self.modified)
        if self.quality is not None:
            object.__setattr__(self, "quality", share(self.quality, "card info: quality"))
        object.__setattr__(self, "tags", _texts(self.tags, "card info: tags"))

    to_metadata = _json_values

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """Read the fields from a card's metadata; other keys are ignored."""
        if not isinstance(metadata, Mapping):
            raise ArgumentError("card info", "a mapping of metadata", shown(metadata))
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in metadata.items() if key in known})


def _targets(names: list[str], others: set[str]) -> tuple[str, ...]:
    """Return targets that match exactly these names: their shortest suffixes that no other has."""
    owners = {suffix: other for other in others for suffix in suffixes(other)}
    for name in names:
        if name in owners:
            other = f"{owners[name]!r}, which has another role"
            expected = "a name that ends no other module's"
            raise TargetError(f"preset: module {name!r}", expected, other)
    shortest = ([key for key in suffixes(name) if key not in owners][-1] for name in names)
    return tuple(sorted(set(shortest)))


def _is_time(text: str) -> bool:
    match = _TIME.fullmatch(text) if isinstance(text, str) else None
    return match is not None and int(match[3]) <= monthrange(int(match[1]), int(match[2]))[1]


def _check_text(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise ArgumentError(where, "text", shown(value))


def _texts(values: Iterable[str], where: str) -> tuple[str, ...]:
    if not isinstance(values, Iterable):
        raise ArgumentError(where, "texts", shown(values))
    texts = (values,) if isinstance(values, str) else tuple(values)
    for text in texts:
        _check_text(text, where)
    if len(set(texts)) < len(texts):
        raise ArgumentError(where, "each once", shown(texts))
    return texts
