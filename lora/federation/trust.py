"""Whom to believe and what to refuse: a policy as a value, and one check for each stage of a card's
arrival.

The order is that of R12.3: what is declared → what was received → who signed it → what it says →
what it holds. Every refusal has an error and an opt-out of its own.

Requirements: R12, R14.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from lora.card import Array, LoRACard, LowRank
from lora.checks import is_digest
from lora.errors import (
    AbsurdNormError,
    ArgumentError,
    BaseModelError,
    MismatchError,
    NonFiniteError,
    OlderVersionError,
    SignatureError,
    UnknownSignerError,
    UnsignedError,
    shown,
)
from lora.federation.manifest import (
    Manifest,
    Precedence,
    Signature,
    check_name,
    differences,
    manifest_of,
)


@dataclass(frozen=True)
class Policy:
    """What is accepted from a peer. As it is, only what a trusted key has signed, or what is
    pinned.

    Args:
        trusted: Public keys, 64 hex digits each.
        pins: Digests that are accepted whoever offers them: they need no signature, and no version.
        base_model: The base model that cards must name; None for any.
        max_bytes: Of a card file.
        max_norm: Frobenius norm of one module's ΔW.
        allow_unsigned, allow_unknown_signers, allow_older, allow_any_name, allow_other_base,
            allow_nonfinite, allow_any_norm: One opt-out for each refusal.
        allow_mismatch: Accept other bytes, or another card, than announced; the card is kept under
            the digest that it has.

    Examples:
        >>> Policy(pins=frozenset({"0" * 64})).allow_unsigned
        False
    """

    trusted: frozenset[str] = frozenset()
    pins: frozenset[str] = frozenset()
    base_model: str | None = None
    max_bytes: int = 2**31
    max_norm: float = 1e4
    allow_unsigned: bool = field(default=False, kw_only=True)
    allow_unknown_signers: bool = field(default=False, kw_only=True)
    allow_mismatch: bool = field(default=False, kw_only=True)
    allow_older: bool = field(default=False, kw_only=True)
    allow_any_name: bool = field(default=False, kw_only=True)
    allow_other_base: bool = field(default=False, kw_only=True)
    allow_nonfinite: bool = field(default=False, kw_only=True)
    allow_any_norm: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for where in ("trusted", "pins"):
            given = getattr(self, where)
            if isinstance(given, str) or not all(is_digest(item) for item in given):
                raise ArgumentError(
                    f"policy: {where}", "texts of 64 lower-case hex digits", shown(given)
                )
            object.__setattr__(self, where, frozenset(given))

    def pinned(self, digest: str) -> "Policy":
        """The policy that accepts one digest more."""
        return replace(self, pins=self.pins | {digest})


def waived(policy: Policy, refusals: Iterable[str]) -> Policy:
    """The policy with opt-outs by name, ``unsigned`` for ``allow_unsigned``.

    Raises:
        ArgumentError: If there is none of that name.
    """
    known = [item.name for item in fields(Policy) if item.name.startswith("allow_")]
    wanted = [f"allow_{refusal}" for refusal in refusals]
    if unknown := [name for name in wanted if name not in known]:
        names = ", ".join(name.removeprefix("allow_") for name in known)
        raise ArgumentError(
            "policy: waive", f"one of {names}", shown(unknown[0].removeprefix("allow_"))
        )
    return replace(policy, **dict.fromkeys(wanted, True))  # type: ignore[arg-type]


def public_key(key: Ed25519PrivateKey) -> str:
    """The public part of a key, 64 hex digits."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def sign(manifest: Manifest, key: Ed25519PrivateKey) -> Manifest:
    """The manifest with a signature of all its other fields.

    Examples:
        >>> key = Ed25519PrivateKey.from_private_bytes(bytes(32))
        >>> signed = sign(Manifest("docs", "0" * 64, 4096), key)
        >>> check_signature(signed, Policy(trusted=frozenset({public_key(key)})))
    """
    value = key.sign(manifest.signed_bytes()).hex()
    return replace(manifest, signature=Signature(public_key(key), value))


def check_declared(manifest: Manifest, policy: Policy) -> None:
    """Before a byte is asked for: the name and the size.

    Raises:
        BadNameError, MismatchError:
    """
    if not policy.allow_any_name:
        check_name(manifest.name)
    if not 0 < manifest.size <= policy.max_bytes:
        where = f"card {shown(manifest.name)}: declared size"
        raise MismatchError(
            where,
            f"1 to {policy.max_bytes} bytes",
            manifest.size,
            "max_bytes of the policy sets this",
        )


def check_received(manifest: Manifest, size: int, digest: str, policy: Policy) -> None:
    """The bytes that came: how many, then which.

    Raises:
        MismatchError:
    """
    if policy.allow_mismatch:
        return
    where, hint = f"card {manifest.name!r}", "allow_mismatch waives this"
    if size != manifest.size:
        raise MismatchError(f"{where}: bytes received", manifest.size, size, hint)
    if digest != manifest.digest:
        raise MismatchError(f"{where}: SHA-256", manifest.digest, digest, hint)


def check_signature(manifest: Manifest, policy: Policy) -> None:
    """Who vouches for the manifest: a pin, or a signature by a trusted key. A signature that is
    there must hold.

    Raises:
        UnsignedError, SignatureError, UnknownSignerError:
    """
    signature, where = manifest.signature, f"card {manifest.name!r}: signature"
    if signature is not None:
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.public_key))
            key.verify(bytes.fromhex(signature.value), manifest.signed_bytes())
        except (InvalidSignature, ValueError) as error:
            raise SignatureError(
                where, f"one by {signature.public_key} of this manifest", "another"
            ) from error
    if manifest.digest in policy.pins:
        return
    if signature is None and not policy.allow_unsigned:
        hint = f"pin {manifest.digest}, or allow_unsigned waives this"
        raise UnsignedError(where, "a signature or a pinned digest", "neither", hint)
    if (
        signature is not None
        and signature.public_key not in policy.trusted
        and not policy.allow_unknown_signers
    ):
        hint = "trust that key, or allow_unknown_signers waives this"
        raise UnknownSignerError(
            where, "one by a trusted key", f"one by {signature.public_key}", hint
        )


def check_version(manifest: Manifest, seen: str, policy: Policy) -> None:
    """Whether the version is at least the highest that was seen of this name and signer; a pin
    needs none.

    Raises:
        OlderVersionError:
    """
    waived = policy.allow_older or manifest.digest in policy.pins
    if Precedence(manifest.version) < Precedence(seen) and not waived:
        hint = "pin its digest, or allow_older waives this"
        where = f"card {manifest.name!r}: version"
        raise OlderVersionError(where, f"{seen} or newer", manifest.version or "none", hint)


def check_contents(card: LoRACard, manifest: Manifest, policy: Policy) -> None:
    """The parsed card: that it is the one announced, its base model, its values.

    Raises:
        MismatchError, BaseModelError, NonFiniteError, AbsurdNormError:
    """
    where = f"card {manifest.name!r}"
    found = manifest_of(card, manifest.digest, manifest.size)
    if (other := differences(manifest, found)) and not policy.allow_mismatch:
        told, is_ = getattr(manifest, other[0]), getattr(found, other[0])
        raise MismatchError(
            f"{where}: {other[0]}",
            f"as announced, {shown(told)}",
            shown(is_),
            "allow_mismatch waives this",
        )
    if policy.base_model not in (None, card.base_model) and not policy.allow_other_base:
        hint = "allow_other_base waives this"
        raise BaseModelError(
            f"{where}: base model", policy.base_model, card.base_model or "none", hint
        )
    for module, pair in card.weights.items():
        norm = norm_of(pair)
        if not math.isfinite(norm) and not _finite(pair):
            if not policy.allow_nonfinite:
                raise NonFiniteError(
                    f"{where}: module {module!r}",
                    "finite values",
                    "NaN or an infinity",
                    "allow_nonfinite waives this",
                )
        elif not norm <= policy.max_norm and not policy.allow_any_norm:
            raise AbsurdNormError(
                f"{where}: module {module!r}",
                f"a ΔW of norm <= {policy.max_norm:g}",
                f"{norm:g}",
                "allow_any_norm waives this",
            )


def norm_of(pair: LowRank) -> float:
    """The Frobenius norm of ΔW, from the Gram matrices of the factors; NaN or infinite if a factor
    is.
    """
    scaling = 1.0 if pair.scaling is None else abs(pair.scaling)
    squared = math.inf
    for wide in (np.float32, np.float64):  # float64 where float32 overflows: it takes twice as long
        a: Array = pair.A.astype(wide, copy=False)
        b: Array = pair.B.astype(wide, copy=False)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            if pair.rank > min(
                pair.in_features, pair.out_features
            ):  # then ΔW itself is the smaller
                squared = float(np.sum((a @ b).astype(np.float64) ** 2))
            else:
                squared = float(np.sum((a.T @ a).astype(np.float64) * (b @ b.T).astype(np.float64)))
        if math.isfinite(squared):
            return math.sqrt(max(squared, 0.0)) * scaling
    return math.inf


def _finite(pair: LowRank) -> bool:
    return bool(np.isfinite(pair.A).all() and np.isfinite(pair.B).all())
