"""Ed25519 keys and signatures in files: PEM for keys, the signed manifest as JSON beside the card.

Requirements: R14.
"""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lora.errors import ArgumentError, StoreError
from lora.federation.manifest import MAX_MANIFEST_BYTES, Manifest, manifest_from_json, manifest_of
from lora.federation.trust import public_key, sign
from lora.store import PathLike, as_path, digest, inspect, os_errors, replacing

SUFFIX = ".sig.json"
"""Of the file beside a card that holds its signed manifest."""

MAX_KEY_BYTES = 16384


def generate_key(path: PathLike) -> str:
    """Make a private key that only its owner can read, in a new file, and ``PATH.pub``; returns the
    public key as hex.

    Raises:
        StoreError: If there is a file already: a key is never replaced.
    """
    path, key = as_path(path), Ed25519PrivateKey.generate()
    text = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    with os_errors(path):
        path.touch(0o600, exist_ok=False)
        path.write_bytes(text)
        shared = key.public_key().public_bytes(
            pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo
        )
        path.with_name(f"{path.name}.pub").write_bytes(shared)
    return public_key(key)


def load_private_key(path: PathLike) -> Ed25519PrivateKey:
    """The private key in a PEM file.

    Raises:
        ArgumentError: If the file holds no Ed25519 private key without a passphrase.
    """
    try:
        key = pem.load_pem_private_key(read_small(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # which could quote the key: not chained
        raise ArgumentError(
            str(path), "an Ed25519 private key as PEM, without a passphrase", "none"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ArgumentError(str(path), "an Ed25519 private key", type(key).__name__)
    return key


def load_public_key(path: PathLike) -> str:
    """The public key in a PEM file, public or private, as hex."""
    data = read_small(path)
    if b"PRIVATE" in data:
        return public_key(load_private_key(path))
    try:
        key = pem.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ArgumentError(str(path), "an Ed25519 public key as PEM", "none") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ArgumentError(str(path), "an Ed25519 public key", type(key).__name__)
    return key.public_bytes(pem.Encoding.Raw, pem.PublicFormat.Raw).hex()


def sign_file(card: PathLike, key: PathLike) -> Manifest:
    """Sign a card file: write its signed manifest beside it, and return that."""
    path = as_path(card)
    signed = sign(
        manifest_of(inspect(path), digest(path), path.stat().st_size), load_private_key(key)
    )
    with replacing(signature_path(path)) as file:
        file.write(signed.to_json())
    return signed


def signature_path(card: Path) -> Path:
    """Where a card's signed manifest lies."""
    return card.with_name(card.name + SUFFIX)


def read_signed(path: Path) -> Manifest:
    """The signed manifest in a file.

    Raises:
        ManifestError, StoreError, CardNotFoundError:
    """
    return manifest_from_json(read_small(path, MAX_MANIFEST_BYTES))


def read_small(path: PathLike, limit: int = MAX_KEY_BYTES) -> bytes:
    """The bytes of a file that holds a key, a certificate or a manifest.

    Raises:
        StoreError: If it is longer than `limit`.
    """
    path = as_path(path)
    with os_errors(path), path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise StoreError(str(path), f"at most {limit} bytes", "more")
    return data
