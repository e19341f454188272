"""Encoders of any kind: opening a folder, and embeddings that gradients flow through.

A folder that `InferenceCore` computes is opened by it. Any other is opened by sentence-transformers
where that is installed: from the files in the folder, by code that is installed, with no request.

Requirements: R5, R17, R26.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.utils.checkpoint import checkpoint

from lora.card import Array
from lora.checks import choice
from lora.errors import MissingPackageError, UnsupportedModelError, shown
from lora.files import PathLike, as_path
from lora.models.encoder import UNPADDED, InferenceCore, batches, pool
from lora.models.encoder_folder import HINT, POOLINGS, read_json
from lora.routing import texts_of
from lora.targets import listed

_KIND = "SentenceTransformer"
"""The kind of model that gives a vector a text, as a folder's configuration names it."""


def open_encoder(folder: PathLike) -> nn.Module:
    """Open an encoder's folder: a frozen module with ``encode(texts)``.

    Raises:
        MissingPackageError: It takes sentence-transformers, which is not installed.
        UnsupportedModelError: The folder brings code of its own, lacks weights, or is broken.
    """
    folder = as_path(folder)
    try:
        return InferenceCore.from_pretrained(folder)
    except UnsupportedModelError as error:
        if error.hint != HINT:  # what is broken is not opened in another way
            raise
        refused = error
    try:
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - an optional package
    except ImportError as error:
        hint = "pip install 'lora-cards[st]' opens it through sentence-transformers"
        raise MissingPackageError(refused.where, refused.expected, refused.found, hint) from error
    _check_files(folder)
    with _silent_loading():
        try:
            model = SentenceTransformer(
                str(folder),
                device="cpu",
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            ).eval()
            width = len(model.encode(["a"])[0])
            _check_vocabulary(folder, model)
            _check_weights(folder, model)
        except UnsupportedModelError:
            raise
        except Exception as error:  # it raises whatever the folder's modules raise
            expected = "a folder that sentence-transformers opens, with weights as safetensors"
            problem = shown(f"{type(error).__name__}: {error}", 400)
            raise UnsupportedModelError(str(folder), expected, problem) from error
    if not width:
        raise UnsupportedModelError(str(folder), "a truncate_dim of at least 1", model.truncate_dim)
    return model.requires_grad_(requires_grad=False)


def _check_files(folder: Path) -> None:
    """Refuse other kinds of models, pickles, and code that is neither installed nor torch's."""
    path = folder / "config_sentence_transformers.json"
    kind = read_json(path, dict).get("model_type") if path.is_file() else None
    if kind not in (None, _KIND):
        raise UnsupportedModelError(f"{path}: model_type", _KIND, shown(kind))
    for path in sorted(folder.rglob("pytorch_model*.bin")):
        if not any(path.parent.glob("*.safetensors")):
            raise UnsupportedModelError(str(path.parent), "weights as safetensors", path.name)
    for path in sorted(folder.rglob("*config.json")):
        config, key = read_json(path, object), "auto_map"
        if not isinstance(config, dict):  # which none of them is that is read
            continue
        if "in_features" in config:  # of a Dense, in which any other gives way to Tanh
            key = "activation_function"
            if str(config.get(key, "torch.")).startswith("torch."):
                continue
        if code := config.get(key):
            expected = "a model that installed code computes"
            hint = (
                "if you trust its code, open it in Python by sentence-transformers, which has a"
                " keyword for that, and pass the result to ArrowEngine"
            )
            raise UnsupportedModelError(f"{path}: {key}", expected, shown(code), hint)


def _check_vocabulary(folder: Path, model: Any) -> None:
    """Refuse a model for which transformers made a tokenizer that knows no word."""
    tokenizer = getattr(model, "tokenizer", None)
    names = sorted(set(getattr(tokenizer, "vocab_files_names", {}).values()))
    if names and not any(path for name in [*names, "*.model"] for path in folder.rglob(name)):
        expected = f"the vocabulary of its tokenizer, in {listed(names, 3)}"
        raise UnsupportedModelError(str(folder), expected, "none")


def _check_weights(folder: Path, model: Any) -> None:
    """Refuse a model for which transformers drew weights that an embedding depends on."""
    inner = model.transformers_model
    drawn = {
        name: parameter
        for name, parameter in (inner.named_parameters() if inner is not None else ())
        if not getattr(parameter, "_is_hf_initialized", False)  # those that were in a file
    }
    if drawn:
        with torch.enable_grad():
            total = embed(model, ["a"]).sum()
            slopes = torch.autograd.grad(total, list(drawn.values()), allow_unused=True)
        used = [name for name, slope in zip(drawn, slopes, strict=True) if slope is not None]
        if used:
            expected = "weights of every part of the encoder"
            raise UnsupportedModelError(str(folder), expected, f"none of {listed(used, 3)}")


@contextmanager
def _silent_loading() -> Iterator[None]:
    from transformers.utils import logging as module  # noqa: PLC0415 - an optional package

    logging: Any = module
    shows_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


class PooledEncoder(nn.Module):
    """A transformers encoder that pools its last hidden states to one embedding of each text.

    Args:
        model: The encoder, such as transformers' ``AutoModel.from_pretrained(folder)``.
        tokenizer: Its tokenizer, which cuts texts to its ``model_max_length``.
        pooling: ``"mean"``, ``"cls"`` or another of `lora.models.encoder_folder.POOLINGS`; several
            are joined.
        normalize: Divide each embedding by its length.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        pooling: str | Sequence[str] = "mean",
        *,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.pooling = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        for mode in self.pooling or [""]:
            choice(mode, "pooling", POOLINGS.values())
        self.transformers_model: Any = model
        self.tokenizer, self.normalize = tokenizer, normalize

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts."""
        rows: list[list[int]] = self.tokenizer(texts_of(texts), truncation=True)["input_ids"]
        return rows

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts in one padded batch ``(n, d)`` that gradients flow through."""
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        fields = self.tokenizer(texts_of(texts), **options).to(self.transformers_model.device)
        hidden = self.transformers_model(**fields).last_hidden_state
        pooled = pool(hidden, fields["attention_mask"].bool(), self.pooling)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Array:
        """Embed texts in batches of similar length: float32, shape ``(n, d)``."""
        texts = texts_of(texts)
        width = self.transformers_model.config.hidden_size * len(self.pooling)
        result = np.zeros((len(texts), width), np.float32)
        for rows in batches(token_counts(self, texts), unpadded=UNPADDED) if texts else ():
            result[rows] = self.embed([texts[row] for row in rows]).float().cpu().numpy()
        return result


def embed(model: Any, texts: Sequence[str]) -> Tensor:
    """Embed texts as a model's ``encode`` does, in one padded batch that gradients flow through.

    Args:
        model: A ``SentenceTransformer``, or a module with such a method ``embed(texts)``.
        texts: At least one.
    """
    rows: Tensor = embedder(model)(texts)
    if torch.is_grad_enabled() and not rows.requires_grad:
        expected = "embeddings that gradients flow through"
        raise UnsupportedModelError(f"training: {type(model).__name__}", expected, "others")
    return rows


def embedder(model: Any) -> Callable[[Sequence[str]], Tensor]:
    """Return the function that embeds texts with gradients; refuse a model that has none."""
    if callable(getattr(model, "embed", None)):
        return model.embed  # type: ignore[no-any-return]
    if callable(getattr(model, "preprocess", None)):
        return partial(_sentence_embeddings, model)
    expected = "a SentenceTransformer, or a module with embed(texts)"
    hint = "lora.models.any_encoder.PooledEncoder makes one of a transformers encoder"
    raise UnsupportedModelError("training", expected, type(model).__name__, hint)


def _sentence_embeddings(model: Any, texts: Sequence[str]) -> Tensor:
    features = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in _features(model, texts).items()
    }
    rows: Tensor = model(features)["sentence_embedding"]
    return rows[:, : model.truncate_dim]


def token_counts(model: Any, texts: Sequence[str]) -> list[int]:
    """Return how many tokens each text has for a model, at least 1; or its number of letters."""
    counts = [len(text) for text in texts]
    if callable(getattr(model, "preprocess", None)):
        mask = _features(model, texts).get("attention_mask")
        counts = counts if mask is None else mask.sum(1).tolist()
    elif callable(getattr(model, "tokenize", None)):
        counts = [len(row) for row in model.tokenize(texts)]
    return [count or 1 for count in counts]


def _features(model: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Return what sentence-transformers makes of texts, after the prompt that it would take."""
    prompt = model.prompts.get(model.default_prompt_name)
    features: dict[str, Any] = model.preprocess(list(texts), prompt=prompt)
    return features


def name_inside(model: nn.Module, name: str) -> str:
    """Return a module's name in the transformers encoder that a model wraps, if it is inside.

    A card that uses such names fits the encoder in whatever it is wrapped.
    """
    inner = getattr(model, "transformers_model", None)
    wrappers = [f"{path}." for path, module in model.named_modules() if path and module is inner]
    return name.removeprefix(wrappers[0]) if wrappers else name


def checkpoint_blocks(model: nn.Module) -> None:
    """Let each block, a member of the longest ModuleList, be computed again on the way back."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in max(lists, key=len, default=()):
        block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(forward, *arguments, use_reentrant=False, **options)
    return forward(*arguments, **options)
