"""Ed25519 keys in PEM files, and signed manifests in JSON files beside the cards.

Requirements: R14.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lora.errors import ArgumentError, StoreError
from lora.federation.manifest import MAX_MANIFEST_BYTES, Manifest, manifest_from_json, manifest_of
from lora.federation.trust import public_key, sign
from lora.files import PathLike, as_path, digest, inspect, os_errors, replacing

SUFFIX = ".sig.json"  # after the name of a card file: its signed manifest


def generate_key(path: PathLike) -> str:
    """Write a new private key, and ``PATH.pub`` in place of an older one; return the public key.

    Raises:
        StoreError: There is a file at the path already.
        CardNotFoundError: There is no such folder.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     len(generate_key(f"{folder}/key"))  # hex digits
        64
    """
    path, key = as_path(path), Ed25519PrivateKey.generate()
    with os_errors(path):
        path.touch(0o600, exist_ok=False)
        path.write_bytes(
            key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
        )
        path.with_name(f"{path.name}.pub").write_bytes(
            key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
        )
    return public_key(key)


def load_private_key(path: PathLike) -> Ed25519PrivateKey:
    """Read the private key in a PEM file."""
    key: Ed25519PrivateKey = _load_key(path, Ed25519PrivateKey)
    return key


def load_public_key(path: PathLike) -> str:
    """Return the public key in a PEM file, public or private, in hex."""
    key = _load_key(path, Ed25519PublicKey | Ed25519PrivateKey)
    return key.public_bytes_raw().hex() if isinstance(key, Ed25519PublicKey) else public_key(key)


def sign_file(card: PathLike, key: PathLike) -> Manifest:
    """Sign a card file: write its signed manifest beside it, and return the manifest.

    Raises:
        CardFileError: The file is no card.
        ArgumentError: The key is no private Ed25519 key.

    Examples:
        >>> import tempfile
        >>> from lora import LoRACard, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     card, key = f"{folder}/docs.lora.arrow", f"{folder}/key"
        ...     _ = save(LoRACard("docs", 1, 1.0, [], {}), card)
        ...     generate_key(key) == sign_file(card, key).signer
        True
    """
    path = as_path(card)
    manifest = manifest_of(inspect(path), digest(path), path.stat().st_size)
    signed = sign(manifest, load_private_key(key))
    with replacing(signature_path(path)) as file:
        file.write(signed.to_json())
    return signed


def signature_path(card: Path) -> Path:
    """Return where a card's signed manifest lies."""
    return card.with_name(card.name + SUFFIX)


def read_signed(path: Path) -> Manifest:
    """Read a signed manifest from its file."""
    return manifest_from_json(read_small(path))


def read_small(path: PathLike) -> bytes:
    """Read a key, a certificate or a manifest, of at most `MAX_MANIFEST_BYTES`."""
    path = as_path(path)
    with os_errors(path), path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise StoreError(str(path), f"at most {MAX_MANIFEST_BYTES} bytes", "more")
    return data


def _load_key(path: PathLike, kind: Any) -> Any:
    data, key = read_small(path), None
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):  # which could quote the key
        private = b"PRIVATE" in data
        key = pem.load_pem_private_key(data, None) if private else pem.load_pem_public_key(data)
    if not isinstance(key, kind):
        expected = "an Ed25519 key in PEM, without a passphrase; private to sign with"
        raise ArgumentError(str(path), expected, "another content")
    return key
