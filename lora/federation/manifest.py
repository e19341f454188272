"""What a server says of a card before it sends it: a small JSON value, part of which its author can
sign.

A manifest names a card's bytes by digest and size. The signature covers all of it; and all that it
says of the card is compared with the card once that is there.

Requirements: R11, R12, R14.
"""

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import total_ordering
from typing import Any

from lora.card import LoRACard
from lora.checks import is_digest
from lora.errors import BadNameError, ManifestError, shown
from lora.table import Header

MAX_MANIFEST_BYTES = 65536
"""Of a manifest as JSON: a longer one is refused before it is parsed."""

MAX_NAME = 128
"""Characters of a name from outside."""

MAX_DESCRIPTION = 4096
"""Characters of a description that a manifest carries; the card may hold more."""

_PREFIX = b"lora-card-manifest 1\n"
_SEMVER = re.compile(
    r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?:-([0-9A-Za-z.-]{1,64}))?(?:\+[0-9A-Za-z.-]{1,64})?"
)


@dataclass(frozen=True)
class Signature:
    """An Ed25519 signature and the public key that it is checked with, both as lower-case hex."""

    public_key: str
    value: str

    def __post_init__(self) -> None:
        for text, length in ((self.public_key, 64), (self.value, 128)):
            if not isinstance(text, str) or not re.fullmatch(f"[0-9a-f]{{{length}}}", text):
                raise ManifestError("signature", f"{length} lower-case hex digits", shown(text))


@dataclass(frozen=True)
class Manifest:
    """A card's announcement.

    Args:
        name: The card's name.
        digest: SHA-256 of the file, 64 hex digits.
        size: Bytes of the file.
        version: The metadata's semantic version; empty where it has none.
        rank, alpha, targets, modules: The card's rank, alpha, target modules, and number of adapted
            modules.
        description: The metadata's description, cut at `MAX_DESCRIPTION` characters; routers embed
            it.
        base_model, base_fingerprint: What the card was made for.
        signature: Of all the other fields, or None.

    Raises:
        ManifestError: Naming the field.
    """

    name: str
    digest: str
    size: int
    version: str = ""
    rank: int = 1
    alpha: float = 1.0
    targets: tuple[str, ...] = ()
    modules: int = 0
    description: str = ""
    base_model: str | None = None
    base_fingerprint: str | None = None
    signature: Signature | None = None

    def __post_init__(self) -> None:
        targets = tuple(self.targets) if isinstance(self.targets, list) else self.targets
        object.__setattr__(self, "targets", targets)
        rules = {
            "name": _is_text(self.name),
            "digest": is_digest(self.digest),
            "size": _is_count(self.size),
            "version": self.version == ""
            or (isinstance(self.version, str) and bool(_SEMVER.fullmatch(self.version))),
            "rank": _is_count(self.rank),
            "alpha": type(self.alpha) in (int, float),
            "targets": isinstance(targets, tuple) and all(map(_is_text, targets)),
            "modules": _is_count(self.modules),
            "description": _is_text(self.description),
            "base_model": self.base_model is None or _is_text(self.base_model),
            "base_fingerprint": self.base_fingerprint is None or _is_text(self.base_fingerprint),
            "signature": isinstance(self.signature, Signature | None),
        }
        for field, holds in rules.items():
            if not holds:
                raise ManifestError(
                    f"manifest: {field}", "a value of its kind", shown(getattr(self, field))
                )

    def to_json(self) -> bytes:
        """The manifest as UTF-8 JSON, keys sorted."""
        return json.dumps(
            asdict(self), sort_keys=True, ensure_ascii=False, separators=(",", ":")
        ).encode()

    def signed_bytes(self) -> bytes:
        """What a signature covers: a line that says so, and all other fields as JSON in ASCII, keys
        sorted.
        """
        told = {key: value for key, value in asdict(self).items() if key != "signature"}
        return _PREFIX + json.dumps(told, sort_keys=True, separators=(",", ":")).encode()


def manifest_of(
    card: Header | LoRACard, digest: str, size: int, signature: Signature | None = None
) -> Manifest:
    """What there is to announce of a card in a file of that digest and size."""
    version, description = card.metadata.get("version"), card.metadata.get("description")
    return Manifest(
        name=card.name,
        digest=digest,
        size=size,
        version=version if isinstance(version, str) and _SEMVER.fullmatch(version) else "",
        rank=card.rank,
        alpha=card.alpha,
        targets=card.target_modules,
        modules=len(card.modules if isinstance(card, Header) else card.weights),
        description=description[:MAX_DESCRIPTION] if isinstance(description, str) else "",
        base_model=card.base_model,
        base_fingerprint=card.base_fingerprint,
        signature=signature,
    )


def manifest_from_json(data: bytes) -> Manifest:
    """The manifest in bytes from outside; keys that this version does not know are left out.

    Raises:
        ManifestError: If it is too long, no JSON object, or a field is missing or of another kind.

    Examples:
        >>> manifest = Manifest("docs", "0" * 64, 4096, targets=("query",))
        >>> manifest_from_json(manifest.to_json()) == manifest
        True
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError("manifest", f"at most {MAX_MANIFEST_BYTES} bytes", len(data))
    told = json_object(data, "manifest")
    known: dict[str, Any] = {
        field.name: told[field.name] for field in fields(Manifest) if field.name in told
    }
    if missing := [field for field in ("name", "digest", "size") if field not in known]:
        raise ManifestError("manifest", f"a {missing[0]}", "none")
    if known.get("signature") is not None:
        known["signature"] = _signature(known["signature"])
    return Manifest(**known)


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in bytes from outside.

    Raises:
        ManifestError: If it is none, or holds a key twice, NaN, or an infinity.
    """
    try:
        told = json.loads(
            bytes(data).decode(), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise ManifestError(where, "JSON", shown(bytes(data[:80]))) from error
    if not isinstance(told, dict):
        raise ManifestError(where, "a JSON object", shown(told))
    return told


def check_name(name: str) -> None:
    """Refuse a name from outside that is empty, long, hidden, unprintable, or could be taken for a
    path.

    No file is ever named after it; logs, terminals and the tools of others are what it must not
    harm.

    Raises:
        BadNameError: With the rule.
    """
    sound = (
        0 < len(name) <= MAX_NAME
        and name.isprintable()
        and not set(name) & set("/\\")
        and name[0] != "."
    )
    if not sound:
        rule = f"1 to {MAX_NAME} printable characters, no slash, no dot in front"
        raise BadNameError("card name", rule, shown(name, 80))


@total_ordering
@dataclass(frozen=True)
class Precedence:
    """Where a semantic version stands among others; no version stands before all. Source:
    semver.org 2.0.0, item 11.

    Examples:
        >>> Precedence("") < Precedence("1.0.0-rc.1") < Precedence("1.0.0") < Precedence("1.10.0")
        True
    """

    version: str

    def key(self) -> tuple[Any, ...]:
        """What orders versions."""
        match = _SEMVER.fullmatch(self.version)
        if match is None:
            return ()
        major, minor, patch, pre = match.groups()
        parts = [
            (0, int(part), "") if part.isdecimal() else (1, 0, part)
            for part in (pre or "").split(".")
        ]
        return (int(major), int(minor), int(patch), pre is None, parts)

    def __lt__(self, other: "Precedence") -> bool:
        return self.key() < other.key()


def differences(announced: Manifest, found: Manifest) -> list[str]:
    """The fields, apart from the signature, in which two manifests differ."""
    bare = replace(announced, signature=found.signature)
    return [
        field.name
        for field in fields(Manifest)
        if getattr(bare, field.name) != getattr(found, field.name)
    ]


def _signature(told: Any) -> Signature:
    if not isinstance(told, dict) or set(told) != {"public_key", "value"}:
        raise ManifestError("manifest: signature", "a public key and a value", shown(told))
    return Signature(**told)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) != len(pairs):
        raise ValueError("a key twice")
    return told


def _no_constant(text: str) -> None:
    raise ValueError(text)


def _is_text(value: object) -> bool:
    """Whether a value is text that UTF-8 can say."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
