"""The manifest of a card: a small JSON object that announces the card's file by digest and size.

A signature covers all other fields, and a client compares them with the card that arrives.

Requirements: R11, R12, R14.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lora.arrow_format import Header
from lora.card import LoRACard
from lora.checks import is_digest, is_semantic_version, parse_json
from lora.errors import BadNameError, ManifestError, shown

MAX_MANIFEST_BYTES = 65536  # a longer manifest is refused before it is parsed
MAX_NAME = 128  # characters of a name or a version
MAX_DESCRIPTION = 4096  # characters of a description in a manifest; the card may hold more


@dataclass(frozen=True)
class Signature:
    """An Ed25519 signature and the public key to check it with, both in lower-case hex."""

    public_key: str
    value: str

    def __post_init__(self) -> None:
        if not is_digest(self.public_key) or not re.fullmatch("[0-9a-f]{128}", self.value):
            raise ManifestError("manifest: signature", "64 and 128 hex digits", shown(vars(self)))


@dataclass(frozen=True)
class Manifest:
    """What a server announces of one card.

    Args:
        digest: SHA-256 of the file, 64 hex digits.
        size: Bytes of the file.
        version: The semantic version in the card's metadata, or "".
        modules: Number of adapted modules.
        description: From the card's metadata, cut at `MAX_DESCRIPTION` characters.
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
        for field, is_valid in _RULES.items():
            value = getattr(self, field)
            if not is_valid(value):
                raise ManifestError(f"manifest: {field}", "a value of its kind", shown(value))
        vars(self)["targets"] = tuple(self.targets)  # JSON has a list

    @property
    def signer(self) -> str:
        """The public key that signed the manifest, or "" if there is no signature."""
        return "" if self.signature is None else self.signature.public_key

    def to_json(self) -> bytes:
        """Return the manifest as JSON with sorted keys."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return text.encode()

    def signed_bytes(self) -> bytes:
        """Return what a signature covers: a fixed line, then all other fields as JSON."""
        covered = asdict(self)
        del covered["signature"]
        text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
        return b"lora-card-manifest 1\n" + text.encode()


def manifest_of(
    card: Header | LoRACard, digest: str, size: int, signature: Signature | None = None
) -> Manifest:
    """Make the manifest of a card whose file has this digest and size."""
    version, description = card.metadata.get("version"), card.metadata.get("description")
    return Manifest(
        card.name,
        digest,
        size,
        version=str(version) if _is_version(version) else "",
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
    """Parse a manifest from outside; unknown keys are ignored.

    Examples:
        >>> manifest = Manifest("docs", "0" * 64, 4096, targets=("query",))
        >>> manifest_from_json(manifest.to_json()) == manifest
        True
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError("manifest", f"at most {MAX_MANIFEST_BYTES} bytes", len(data))
    value = parse_json(data, "manifest", dict, ManifestError)
    known = {key: value[key] for key in Manifest.__dataclass_fields__ if key in value}
    try:
        if known.get("signature") is not None:
            known["signature"] = Signature(**known["signature"])
        return Manifest(**known)
    except TypeError as error:  # a field is missing, or the signature has other fields
        expected = "name, digest and size, and a signature of public_key and value"
        raise ManifestError("manifest", expected, error) from error


def check_name(name: str) -> None:
    """Refuse a name from outside that could harm a log or a terminal, or look like a path."""
    printable = 0 < len(name) <= MAX_NAME and name.isprintable()
    if not printable or set(name) & set("/\\") or name[0] == ".":
        rule = f"1 to {MAX_NAME} printable characters, no slash, no dot in front"
        raise BadNameError("card name", rule, shown(name, 80))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_version(value: object) -> bool:
    return is_semantic_version(value) and len(str(value)) <= MAX_NAME


_RULES: dict[str, Callable[[Any], bool]] = {
    "name": _is_text,
    "digest": is_digest,
    "size": _is_count,
    "version": lambda value: value == "" or _is_version(value),
    "rank": _is_count,
    "alpha": lambda value: type(value) in (int, float),
    "targets": lambda value: isinstance(value, list | tuple) and all(map(_is_text, value)),
    "modules": _is_count,
    "description": _is_text,
    "base_model": lambda value: value is None or _is_text(value),
    "base_fingerprint": lambda value: value is None or _is_text(value),
    "signature": lambda value: isinstance(value, Signature | None),
}
