"""What to train and for what: `LoRAConfig`, five task presets fitted to a model's real modules, and
`CardInfo`.

A preset names roles (query, gate …); `fit` finds the modules that play them, by the names that BERT
and Llama and their kin give them, and states the cost.

Requirements: R21.
"""

import re
from calendar import monthrange
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Self

from lora.card import DTYPES, LoRACard
from lora.checks import finite, integer
from lora.errors import ArgumentError, TargetError, shown
from lora.targets import match_targets, matches

ROLES: Mapping[str, str] = MappingProxyType(
    {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "output",
        "crossattention.self.query": "query",
        "crossattention.self.key": "key",
        "crossattention.self.value": "value",
        "crossattention.output.dense": "output",
        "intermediate.dense": "up",
        "output.dense": "down",
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "output",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    }
)
"""Suffix of a module's name -> its role; the longest that matches counts. An encoder's feed-forward has no gate."""


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is to be like, as a value.

    Args:
        rank: Integer >= 1.
        alpha: Finite and > 0; ΔW is scaled by alpha / rank.
        dropout: On the low-rank path in training, in [0, 1).
        target_modules: As a card's.
        task_type: What the adapter is for; may be empty.
        tags: Each once.

    Raises:
        CardError, ArgumentError: Naming the field.

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
        card = LoRACard(
            "config", self.rank, self.alpha, self.target_modules, {}
        )  # one rule for both
        for field in ("rank", "alpha", "target_modules"):
            object.__setattr__(self, field, getattr(card, field))
        dropout = finite(self.dropout, "config: dropout", ArgumentError)
        if not 0 <= dropout < 1:
            raise ArgumentError("config: dropout", "a number in [0, 1)", dropout)
        object.__setattr__(self, "dropout", dropout)
        object.__setattr__(self, "task_type", _text(self.task_type, "config: task_type"))
        object.__setattr__(self, "tags", _texts(self.tags, "config: tags"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config of these fields; what is missing has its default.

        Raises:
            ArgumentError: If a key is no field.
        """
        if not isinstance(values, Mapping):
            raise ArgumentError("config", "a mapping of fields", type(values).__name__)
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ArgumentError("config", f"only the fields {', '.join(known)}", shown(unknown))
        return cls(**values)


@dataclass(frozen=True)
class Preset:
    """A task's adapter before it meets a model: roles in place of module names."""

    task: str
    rank: int
    alpha: float
    dropout: float
    roles: tuple[str, ...]
    tags: tuple[str, ...]


_ATTENTION = ("query", "key", "value", "output")
_FEED_FORWARD = ("gate", "up", "down")

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.task: preset
        for preset in (
            Preset("coder", 16, 32.0, 0.05, _ATTENTION, ("code-gen", "refactoring", "syntax")),
            Preset(
                "researcher",
                8,
                16.0,
                0.1,
                ("query", "key", "value"),
                ("analysis", "research", "synthesis"),
            ),
            Preset(
                "security",
                16,
                32.0,
                0.05,
                (*_ATTENTION, *_FEED_FORWARD),
                ("security", "vulnerabilities", "audit"),
            ),
            Preset(
                "architect",
                12,
                24.0,
                0.05,
                ("query", "value", "gate", "up"),
                ("architecture", "design", "patterns"),
            ),
            Preset(
                "reviewer",
                8,
                16.0,
                0.1,
                ("query", "value"),
                ("review", "quality", "best-practices"),
            ),
        )
    }
)
"""The five task adapters, by name."""


@dataclass(frozen=True)
class Fitted:
    """A preset on one model.

    Args:
        config: With targets that match exactly the modules of the preset's roles.
        modules: Name -> number of parameters of its factors, r · (in + out), sorted.
        nbytes: Of all factors in the dtype asked for.
    """

    config: LoRAConfig
    modules: Mapping[str, int]
    nbytes: int

    @property
    def num_params(self) -> int:
        """Elements of all factors."""
        return sum(self.modules.values())


def fit(
    preset: Preset | str, shapes: Mapping[str, tuple[int, int]], *, dtype: str = "float32"
) -> Fitted:
    """Map a preset onto a model's Linears.

    A decoder's ``gate_proj`` and ``up_proj`` play gate and up; on an encoder, whose feed-forward
    has no gate, "gate/up" is ``intermediate.dense`` alone.

    Args:
        preset: One of `PRESETS` or its name, or another.
        shapes: Name of every Linear of the model -> ``(in, out)``.
        dtype: Of the factors, for the bytes.

    Raises:
        ArgumentError: If there is no preset or dtype of that name, or `shapes` are none.
        TargetError: If a role other than the gate is played by no module, or no targets match
            exactly the modules that are wanted.

    Examples:
        >>> names = ["layer.0.attention.output.dense", "layer.0.output.dense", "layer.0.intermediate.dense"]
        >>> names += [f"layer.0.attention.self.{part}" for part in ("query", "key", "value")]
        >>> fitted = fit("coder", dict.fromkeys(names, (384, 384)))
        >>> fitted.config.target_modules, fitted.num_params
        (('attention.output.dense', 'key', 'query', 'value'), 49152)
    """
    if not isinstance(preset, Preset):
        if preset not in tuple(PRESETS):
            raise ArgumentError("preset", f"one of {', '.join(PRESETS)}", shown(preset))
        preset = PRESETS[preset]
    if dtype not in tuple(DTYPES):
        raise ArgumentError("dtype", f"one of {', '.join(DTYPES)}", shown(dtype))
    _check_shapes(shapes)
    played = {name: role_of(name) for name in shapes}
    if missing := set(preset.roles) - {"gate"} - set(played.values()):
        hint = "name the target modules in a LoRAConfig of your own"
        known = (
            f"modules such as {', '.join(key for key, role in ROLES.items() if role in missing)}"
        )
        raise TargetError(
            f"preset {preset.task!r}", known, f"none that is a {' or '.join(sorted(missing))}", hint
        )
    chosen = sorted(name for name, role in played.items() if role in preset.roles)
    modules = {name: preset.rank * sum(shapes[name]) for name in chosen}
    config = LoRAConfig(
        preset.rank,
        preset.alpha,
        preset.dropout,
        _targets(chosen, list(shapes)),
        preset.task,
        preset.tags,
    )
    return Fitted(config, MappingProxyType(modules), sum(modules.values()) * DTYPES[dtype].itemsize)


def cost_table(
    models: Mapping[str, Mapping[str, tuple[int, int]]], *, dtype: str = "float32"
) -> str:
    """What each preset costs on each model, as a Markdown table.

    Args:
        models: Title -> name of every Linear -> ``(in, out)``.
        dtype: Of the factors.

    Examples:
        >>> llama = {f"model.layers.0.self_attn.{part}_proj": (64, 64) for part in "qkvo"}
        >>> llama |= {f"model.layers.0.mlp.{part}_proj": (64, 128) for part in ("gate", "up")}
        >>> llama |= {"model.layers.0.mlp.down_proj": (128, 64)}
        >>> print(cost_table({"tiny": llama}).splitlines()[-1])
        | tiny | reviewer | 8 | 16 | 2 | 2,048 | 8,192 |
    """
    lines = [
        f"| model | preset | rank | alpha | modules | parameters | bytes ({dtype}) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    if not isinstance(models, Mapping):
        raise ArgumentError("models", "a mapping of titles to shapes", shown(models))
    for title, shapes in models.items():
        for preset in PRESETS.values():
            found = fit(preset, shapes, dtype=dtype)
            cells = (title, preset.task, preset.rank, f"{preset.alpha:g}", len(found.modules))
            lines.append(
                f"| {' | '.join(map(str, cells))} | {found.num_params:,} | {found.nbytes:,} |"
            )
    return "\n".join(lines)


def role_of(module: str) -> str | None:
    """The role of a module by its name, if it has one.

    Examples:
        >>> role_of("layer.0.attention.output.dense"), role_of("layer.0.output.dense"), role_of("pooler.dense")
        ('output', 'down', None)
    """
    found = max((key for key in ROLES if matches(module, key)), key=len, default=None)
    return None if found is None else ROLES[found]


_SEMVER = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(-(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?"
    r"(\+[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?",
    re.ASCII,
)
_TIME = re.compile(
    r"(\d{4})-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\dZ",
    re.ASCII,
)


@dataclass(frozen=True)
class CardInfo:
    """What a card says of itself in its metadata.

    Args:
        version: Semantic version 2.0.0.
        description: Any text; routers embed it.
        quality: In [0, 1], or None where it was not measured.
        created, modified: UTC, as ``YYYY-MM-DDThh:mm:ssZ``; given by the caller, and empty where
            unknown.
        training_data: What it was trained on.
        tags: Each once.

    Raises:
        ArgumentError: Naming the field.

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
        for field in ("version", "description", "created", "modified", "training_data"):
            _text(getattr(self, field), f"card info: {field}")
        if _SEMVER.fullmatch(self.version) is None:
            raise ArgumentError(
                "card info: version", "a semantic version such as 1.0.0", shown(self.version)
            )
        for field in ("created", "modified"):
            if (value := getattr(self, field)) and not _is_time(value):
                raise ArgumentError(
                    f"card info: {field}", "a UTC time such as 2026-01-31T12:00:00Z", shown(value)
                )
        if self.modified and self.modified < self.created:
            raise ArgumentError(
                "card info: modified", f"a time not before created, {self.created}", self.modified
            )
        if self.quality is not None:
            quality = finite(self.quality, "card info: quality", ArgumentError)
            if not 0 <= quality <= 1:
                raise ArgumentError("card info: quality", "a number in [0, 1]", quality)
            object.__setattr__(self, "quality", quality)
        object.__setattr__(self, "tags", _texts(self.tags, "card info: tags"))

    def to_metadata(self) -> dict[str, Any]:
        """The fields as JSON values, to be put into a card's metadata beside any others."""
        return _plain(self)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """What a card's metadata say; other keys are left aside, what is missing has its default."""
        if not isinstance(metadata, Mapping):
            raise ArgumentError("card info", "a mapping of metadata", shown(metadata))
        return cls(
            **{field.name: metadata[field.name] for field in fields(cls) if field.name in metadata}
        )


def _check_shapes(shapes: object) -> None:
    if not isinstance(shapes, Mapping):
        raise ArgumentError("shapes", "a mapping of names to (in, out)", shown(shapes))
    for name, shape in shapes.items():
        if not isinstance(name, str) or not isinstance(shape, Sequence) or len(shape) != 2:
            raise ArgumentError(
                "shapes", "a name and (in, out) of each Linear", shown((name, shape))
            )
        for size in shape:
            integer(size, f"shape of {shown(name)}", 1)


def _targets(chosen: list[str], names: list[str]) -> tuple[str, ...]:
    """The shortest suffix of each chosen name that matches none of the others: targets that match
    exactly those chosen.
    """
    rest, targets = set(names) - set(chosen), set()
    for name in chosen:
        parts = name.split(".")
        suffixes = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        found = next((suffix for suffix in suffixes if not match_targets(rest, [suffix])), None)
        if found is None:
            where, other = f"preset: module {name!r}", match_targets(rest, [name])
            raise TargetError(
                where, "a name that ends no other module's", f"{other[0]!r}, which is not wanted"
            )
        targets.add(found)
    return tuple(sorted(targets))


def _is_time(text: str) -> bool:
    found = _TIME.fullmatch(text)
    return found is not None and int(found[3]) <= monthrange(int(found[1]), int(found[2]))[1]


def _plain(value: Any) -> dict[str, Any]:
    return {
        key: list(item) if isinstance(item, tuple) else item for key, item in asdict(value).items()
    }


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ArgumentError(where, "text", shown(value))
    return value


def _texts(values: Iterable[str], where: str) -> tuple[str, ...]:
    if not isinstance(values, Iterable):
        raise ArgumentError(where, "texts", shown(values))
    texts = (values,) if isinstance(values, str) else tuple(_text(value, where) for value in values)
    if len(set(texts)) != len(texts):
        raise ArgumentError(where, "each once", shown(texts))
    return texts
