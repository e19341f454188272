"""Adapters on the Hugging Face Hub, named ``hf:org/name`` or ``hf:org/name@revision``.

huggingface_hub downloads them into its cache, by its own settings: ``HF_ENDPOINT``, ``HF_HOME``,
``HF_HUB_OFFLINE`` and the token of its login. Only the files that the library reads are asked for,
so never a pickle.

Requirements: R26.
"""

from pathlib import Path

from lora.errors import ArgumentError, CardNotFoundError, MissingPackageError, PeerError, shown

PREFIX = "hf:"

SINGLES = ("adapters.safetensors", "pytorch_lora_weights.safetensors")
"""The file that the folders of mlx-lm and of diffusers hold."""

FILES = ("adapter_config.json", "adapter_model.safetensors", *SINGLES)
"""What the folders of PEFT, mlx-lm and diffusers hold that is read."""


def download(source: str) -> Path:
    """Return the folder in huggingface_hub's cache that holds an adapter, downloaded if need be.

    Args:
        source: ``hf:org/name`` or ``hf:org/name@revision``, a branch, tag or commit.

    Raises:
        ArgumentError: It is no such name.
        CardNotFoundError: There is no such name or revision, or it needs a login.
        PeerError: The Hub can't be reached, and the cache lacks the adapter.
    """
    try:
        from huggingface_hub import errors, snapshot_download  # noqa: PLC0415 - an extra
    except ImportError as error:
        hint = "pip install 'lora-cards[hub]'"
        raise MissingPackageError(source, "huggingface_hub", "not installed", hint) from error
    name, _, revision = source.removeprefix(PREFIX).partition("@")
    absent = errors.RepositoryNotFoundError, errors.RevisionNotFoundError
    try:
        files = list(FILES)
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except errors.HFValidationError as error:
        expected = f"{PREFIX}org/name or {PREFIX}org/name@revision"
        hint = "of a folder in it: hf download org/name prints the folder around it"
        raise ArgumentError(source, expected, shown(name), hint) from error
    except absent as error:
        expected = "an adapter's name on the Hub, and a revision of it"
        hint = "if it is private or gated, log in with huggingface_hub"
        raise CardNotFoundError(source, expected, type(error).__name__, hint) from error
    except Exception as error:  # of the client, and of the libraries beneath it
        expected = "an answer of the Hub, or the adapter in the cache"
        raise PeerError(source, expected, type(error).__name__) from error
