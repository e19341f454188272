"""Trust: a policy says what to accept from peers, and each stage of a card's arrival has a check.

Requirements: R12, R14.
"""

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lora.card import LoRACard, LowRank
from lora.checks import base_name, is_digest, version_order
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
from lora.factors import is_finite
from lora.federation.manifest import Manifest, Signature, check_name, manifest_of


@dataclass(frozen=True)
class Policy:
    """Decides which cards of peers are accepted.

    By default: what a trusted key has signed, or what is pinned.

    Args:
        trusted: Public keys, 64 hex digits each.
        pins: Digests to accept without a signature and in any version.
        base_model: The base model that cards must name, in any spelling; None for any.
        max_bytes: Size of the largest file.
        max_norm: Largest Frobenius norm of one module's ΔW.
        allow_unsigned: Accept cards without a signature.
        allow_unknown_signers: Accept the signatures of keys that are not trusted.
        allow_mismatch: Keep a card that is not the announced one, under its own digest.
        allow_older: Accept a version below the highest seen of this name and signer.
        allow_any_name: Accept names that look like a path, or could harm a terminal.
        allow_other_base: Accept cards that name another base model, or none.
        allow_nonfinite, allow_any_norm: Accept NaN and infinities, or norms above `max_norm`.

    Raises:
        ArgumentError: A key or pin is not 64 lower-case hex digits.

    Examples:
        >>> Policy(trusted={"0" * 64}, max_bytes=10**6).allow_unsigned
        False
    """

    trusted: frozenset[str] = frozenset()
    pins: frozenset[str] = frozenset()
    base_model: str | None = None
    max_bytes: int = 2**31
    max_norm: float = 1e4
    _: KW_ONLY  # each reason to refuse has an error, and an option here
    allow_unsigned: bool = False
    allow_unknown_signers: bool = False
    allow_mismatch: bool = False
    allow_older: bool = False
    allow_any_name: bool = False
    allow_other_base: bool = False
    allow_nonfinite: bool = False
    allow_any_norm: bool = False

    def __post_init__(self) -> None:
        for name, items in (("trusted", self.trusted), ("pins", self.pins)):
            wrong = [items] if isinstance(items, str) else [i for i in items if not is_digest(i)]
            if wrong:
                expected = "a set of texts of 64 lower-case hex digits"
                raise ArgumentError(f"policy: {name}", expected, shown(wrong[0]))
            vars(self)[name] = frozenset(items)

    def pinned(self, digest: str) -> "Policy":
        """Return the policy with one more pin."""
        return replace(self, pins=self.pins | {digest})


def waived(policy: Policy, refusals: Iterable[str]) -> Policy:
    """Return the policy with options set by name: ``unsigned`` for ``allow_unsigned``."""
    options = [name for name in Policy.__dataclass_fields__ if name.startswith("allow_")]
    for refusal in refusals:
        if f"allow_{refusal}" not in options:
            expected = f"one of {', '.join(options).replace('allow_', '')}"
            raise ArgumentError("policy: waive", expected, shown(refusal))
        policy = replace(policy, **{f"allow_{refusal}": True})  # type: ignore[arg-type]
    return policy


def public_key(key: Ed25519PrivateKey) -> str:
    """Return the public part of a key, 64 hex digits."""
    return key.public_key().public_bytes_raw().hex()


def sign(manifest: Manifest, key: Ed25519PrivateKey) -> Manifest:
    """Return the manifest with a signature of all its other fields.

    Examples:
        >>> key = Ed25519PrivateKey.from_private_bytes(bytes(32))
        >>> signed = sign(Manifest("docs", "0" * 64, 4096), key)
        >>> check_signature(signed, Policy(trusted=frozenset({public_key(key)})))
    """
    value = key.sign(manifest.signed_bytes()).hex()
    return replace(manifest, signature=Signature(public_key(key), value))


def check_declared(manifest: Manifest, policy: Policy) -> None:
    """Check the announced name and size, before a byte is requested."""
    if not policy.allow_any_name:
        check_name(manifest.name)
    if not 0 < manifest.size <= policy.max_bytes:
        where, expected = f"card {shown(manifest.name)}: declared size", f"1 to {policy.max_bytes}"
        raise MismatchError(where, expected, manifest.size, "max_bytes of the policy is the limit")


def check_received(manifest: Manifest, size: int, digest: str, policy: Policy) -> None:
    """Check how many bytes came, then their digest."""
    announced = {"bytes received": (manifest.size, size), "SHA-256": (manifest.digest, digest)}
    for what, (expected, received) in announced.items():
        if received != expected and not policy.allow_mismatch:
            where, hint = f"card {manifest.name!r}: {what}", "`allow_mismatch` waives this"
            raise MismatchError(where, expected, received, hint)


def check_signature(manifest: Manifest, policy: Policy) -> None:
    """Check that a pin or a trusted key vouches for the manifest, and that a signature holds."""
    signature, where = manifest.signature, f"card {manifest.name!r}: signature"
    if signature is not None:
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.public_key))
            key.verify(bytes.fromhex(signature.value), manifest.signed_bytes())
        except (InvalidSignature, ValueError) as error:
            signer = f"one by {signature.public_key}"
            raise SignatureError(where, signer, "one that does not hold") from error
    if manifest.digest in policy.pins:
        return
    if signature is None:
        if not policy.allow_unsigned:
            hint = f"`pin` {manifest.digest}, or `allow_unsigned` waives this"
            raise UnsignedError(where, "a signature or a pinned digest", "neither", hint)
    elif manifest.signer not in policy.trusted and not policy.allow_unknown_signers:
        hint = "`trust` that key, or `allow_unknown_signers` waives this"
        raise UnknownSignerError(where, "one by a trusted key", f"one by {manifest.signer}", hint)


def check_version(manifest: Manifest, highest: str, policy: Policy) -> None:
    """Check that the version is at least the highest seen of this name and signer, or pinned."""
    waived = policy.allow_older or manifest.digest in policy.pins
    if version_order(manifest.version) < version_order(highest) and not waived:
        where, expected = f"card {manifest.name!r}: version", f"{highest} or newer"
        hint = "`pin` its digest, or `allow_older` waives this"
        raise OlderVersionError(where, expected, manifest.version or "none", hint)


def check_base(card: LoRACard | Manifest, policy: Policy) -> None:
    """Check that the card names the policy's base model, in any spelling."""
    own, named = policy.base_model, card.base_model or ""
    if own is not None and base_name(named) != base_name(own) and not policy.allow_other_base:
        where, hint = f"card {shown(card.name)}: base model", "`allow_other_base` waives this"
        raise BaseModelError(where, own, shown(named) if named else "none", hint)


def check_contents(card: LoRACard, manifest: Manifest, policy: Policy) -> None:
    """Check the parsed card: the announced fields, then the values."""
    where = f"card {manifest.name!r}"
    actual = manifest_of(card, manifest.digest, manifest.size, manifest.signature)
    for name, value in vars(actual).items():
        announced, hint = getattr(manifest, name), "`allow_mismatch` waives this"
        if value != announced and not policy.allow_mismatch:
            raise MismatchError(f"{where}: {name}", shown(announced), shown(value), hint)
    for module, pair in card.weights.items():
        if norm_bound(pair) <= policy.max_norm:  # and so all is finite
            continue
        norm, place = norm_of(pair), f"{where}: module {module!r}"
        if math.isinf(norm) and not is_finite(pair):
            if not policy.allow_nonfinite:
                hint = "`allow_nonfinite` waives this"
                raise NonFiniteError(place, "finite values", "NaN or an infinity", hint)
        elif norm > policy.max_norm and not policy.allow_any_norm:
            expected, hint = f"norm of ΔW <= {policy.max_norm:g}", "`allow_any_norm` waives this"
            raise AbsurdNormError(place, expected, f"{norm:g}", hint)


def norm_bound(pair: LowRank) -> float:
    """Return a number that `norm_of` does not exceed, in a fifth of its time: |A| |B| scaling.

    It is NaN or infinity if a value is not finite, or if there are so many that their sum in
    float32 could be below half of the true one. What squares lose to underflow is added.
    """
    scaling, energy = 1.0 if pair.scaling is None else abs(pair.scaling), 1.0
    for factor in (pair.A, pair.B):
        with np.errstate(all="ignore"):
            wide = factor.astype(np.promote_types(factor.dtype, np.float32), copy=False)
            squares = float(np.vdot(wide, wide))
        energy *= 2 * squares + factor.size * 2.0**-125 if factor.size <= 2**22 else math.inf
    return math.sqrt(energy) * scaling


def norm_of(pair: LowRank) -> float:
    """Return the Frobenius norm of ΔW; infinity if a factor or the norm is not finite."""
    scaling = 1.0 if pair.scaling is None else abs(pair.scaling)
    with np.errstate(all="ignore"):
        a, b = (factor.astype(np.float64, copy=False) for factor in (pair.A, pair.B))
        # The Gram matrices of the factors give the norm, or ΔW if that is smaller.
        wide = pair.rank > min(pair.in_features, pair.out_features)
        squared = float(np.sum((a @ b) ** 2 if wide else (a.T @ a) * (b @ b.T)))
    return math.sqrt(max(squared, 0.0)) * scaling if math.isfinite(squared) else math.inf
