"""InferenceCore: a complete BERT encoder whose module names and state dict are Hugging Face's.

Loaded from ``config.json``, ``model.safetensors`` and ``tokenizer.json`` without copying the
weights; pooling and normalisation come from the sentence-transformers files beside them. A text's
embedding is the pooled last hidden state. Source of the architecture: Devlin et al. 2018; of the
file names: ``BertModel`` and ``SentenceTransformer``.

Requirements: R5, R17.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.utils.checkpoint import checkpoint

from lora.card import Array
from lora.errors import ArgumentError, CardNotFoundError, ShapeError, UnsupportedModelError, shown
from lora.layer import SegmentedLinear, Segments, Uncalled
from lora.routing import texts_of
from lora.store import PathLike, as_path

TOKEN_BUDGET = 2048
"""Tokens of one batch, padding included: about 1.5 times the throughput of fixed batches of 32 on two cores."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


class Encoder(Protocol):
    """What an engine can run: a module that turns texts into embeddings. A `SentenceTransformer` is
    one.
    """

    def encode(self, texts: Sequence[str]) -> Any:
        """Embeddings of the texts, shape ``(n, d)``."""
        ...


@dataclass(frozen=True)
class EncoderConfig:
    """The part of a Hugging Face ``config.json``, and of sentence-transformers' files, that the
    computation depends on.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pad_token_id: int = 0
    max_seq_length: int = 512
    pooling: str = "mean"
    normalize: bool = False
    pooler: bool = False


class Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``(rows, tokens)`` to ``(rows, tokens, hidden)``; every token is of type 0."""
        positions = self.position_embeddings.weight[: ids.shape[1]]
        summed = self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + positions
        normed: Tensor = self.LayerNorm(summed)
        return normed


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, segments: Segments) -> Tensor:
        """``(rows, tokens, hidden)`` to the same; `mask` ``(rows, 1, 1, tokens)`` is True where a
        token may be seen.
        """
        parts = [_project(linear, x, segments) for linear in (self.query, self.key, self.value)]
        q, k, v = (part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """A projection added to its block's input, normalised."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, block_input: Tensor, segments: Segments) -> Tensor:
        """``(rows, tokens, width)`` and ``(rows, tokens, hidden)`` to the latter."""
        normed: Tensor = self.LayerNorm(_project(self.dense, x, segments) + block_input)
        return normed


class Attention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Residual(config.hidden_size, config)

    def forward(self, x: Tensor, mask: Tensor | None, segments: Segments) -> Tensor:  # noqa: D102
        attended: Tensor = self.output(self.self(x, mask, segments), x, segments)
        return attended


class Intermediate(nn.Module):
    """The first half of the feed-forward block."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = config.hidden_act

    def forward(self, x: Tensor, segments: Segments) -> Tensor:  # noqa: D102
        activated: Tensor = ACTIVATIONS[self.activation](_project(self.dense, x, segments))
        return activated


class Layer(nn.Module):
    """One transformer block."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Residual(config.intermediate_size, config)

    def forward(self, x: Tensor, mask: Tensor | None, segments: Segments) -> Tensor:  # noqa: D102
        x = self.attention(x, mask, segments)
        result: Tensor = self.output(self.intermediate(x, segments), x, segments)
        return result


class Blocks(nn.Module):
    """The stack of transformer blocks."""

    checkpointing = False
    """Whether a forward with gradients keeps no block's insides, and computes them again when it goes back."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None, segments: Segments) -> Tensor:  # noqa: D102
        for layer in self.layer:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, segments, use_reentrant=False)
            else:
                x = layer(x, mask, segments)
        return x


class Pooler(Uncalled):
    """BERT's next-sentence head: part of its state dict and of what adapters bind to, no part of an
    embedding.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)


Core = TypeVar("Core", bound="InferenceCore")


class InferenceCore(nn.Module):
    """A BERT encoder of sentences.

    Args:
        config: Sizes, pooling, normalisation.
        tokenizer: A ``tokenizers.Tokenizer``; needed to encode texts, not to run on ids.

    Examples:
        >>> config = EncoderConfig(30, 8, 1, 2, 16, 10)
        >>> InferenceCore(config)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 8])
    """

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        if config.hidden_act not in ACTIVATIONS or config.pooling not in ("mean", "cls"):
            found = f"{config.hidden_act}, {config.pooling}"
            raise UnsupportedModelError(
                "encoder config", f"one of {list(ACTIVATIONS)}; mean or cls pooling", found
            )
        self.config = config
        self.tokenizer = tokenizer
        self.embeddings = Embeddings(config)
        self.encoder = Blocks(config)
        if config.pooler:
            self.pooler = Pooler(config)

    @classmethod
    def from_pretrained(cls, folder: PathLike) -> Self:
        """Load a Hugging Face or sentence-transformers directory; the weights stay mapped.

        Raises:
            CardNotFoundError: If a file is missing.
            UnsupportedModelError: If the model is not BERT, or not this BERT.
        """
        folder = as_path(folder)
        config, tensors = read_config(folder), _tensors(folder / "model.safetensors")
        config = replace(config, pooler="pooler.dense.weight" in tensors)
        with torch.device("meta"):
            core = cls(config, _tokenizer(folder, config))
        core.load_state_dict(_state_dict(tensors, core, folder), strict=True, assign=True)
        return core.requires_grad_(requires_grad=False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.word_embeddings.weight.device

    def forward(self, ids: Tensor, mask: Tensor | None = None, segments: Segments = ()) -> Tensor:
        """Embed rows of token ids.

        Args:
            ids: Shape ``(rows, tokens)``.
            mask: Shape ``(rows, tokens)``, True at tokens, False at padding; None if there is no
                padding.
            segments: Which adapter set each run of rows gets, for a model made by
                `lora.rewrite.adapt_rows`.

        Returns:
            Shape ``(rows, hidden)``.
        """
        seen = None if mask is None else mask[:, None, None, :]
        hidden = self.encoder(self.embeddings(ids), seen, segments)
        pooled = hidden[:, 0] if self.config.pooling == "cls" else _mean(hidden, mask)
        return F.normalize(pooled, dim=-1) if self.config.normalize else pooled

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, truncated to ``max_seq_length``.

        Raises:
            ArgumentError: If `texts` is not a sequence of str.
        """
        texts = texts_of(texts)
        if self.tokenizer is None:
            raise UnsupportedModelError("encoder", "a tokenizer", "none")
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts as one padded batch that gradients flow through: shape ``(n,
        hidden)``.
        """
        rows = self.tokenize(texts)
        if not rows or not all(rows):
            raise ArgumentError("texts", "one or several, each of at least one token", shown(texts))
        ids, mask = pad(rows, self.config.pad_token_id, self.device)
        embedded: Tensor = self(ids, mask)
        return embedded

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], *, sets: Sequence[int] | None = None) -> Array:
        """Embeddings of texts: float32, shape ``(n, hidden)``.

        Texts are run in batches of similar length under `TOKEN_BUDGET`.

        Args:
            texts: Any number, empty ones included; a text without a token gets the zero vector.
            sets: Index of each text's adapter set, for a model made by `lora.rewrite.adapt_rows`.
        """
        ids = self.tokenize(texts)
        if sets is not None and len(sets) != len(ids):
            raise ShapeError("sets", f"one index for each of {len(ids)} texts", len(sets))
        result = np.zeros((len(ids), self.config.hidden_size), np.float32)
        for batch in batches([len(row) for row in ids]):
            rows, segments = by_set(batch, sets)
            padded, mask = pad([ids[row] for row in rows], self.config.pad_token_id, self.device)
            result[rows] = self(padded, mask, segments).float().cpu().numpy()
        return result


def batches(lengths: Sequence[int], budget: int = TOKEN_BUDGET) -> Iterable[list[int]]:
    """Positions in batches of similar length, so that rows × longest stays within `budget` (or is
    one row).

    Those of length 0 are in none.

    Examples:
        >>> list(batches([3, 1, 2, 0, 9], budget=6))
        [[4], [0, 2], [1]]
    """
    batch: list[int] = []
    for row in sorted(np.flatnonzero(lengths).tolist(), key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def by_set(rows: list[int], sets: Sequence[int] | None) -> tuple[list[int], Segments]:
    """Rows ordered so that those of one adapter set are neighbours, and where each run of them
    lies.

    Examples:
        >>> by_set([4, 5, 6], [0, 0, 0, 0, 1, 0, 1])
        ([5, 4, 6], ((0, 1, 0), (1, 3, 1)))
    """
    if sets is None:
        return rows, ()
    rows = sorted(rows, key=lambda row: sets[row])
    bounds = [i for i, row in enumerate(rows) if i == 0 or sets[row] != sets[rows[i - 1]]]
    segments = zip(bounds, [*bounds[1:], len(rows)], strict=True)
    return rows, tuple((start, stop, sets[rows[start]]) for start, stop in segments)


def pad(
    rows: Sequence[Sequence[int]], token: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Ids as one tensor, and where its tokens are: None if all rows are equally long."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[token] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    even = all(len(row) == longest for row in rows)
    return ids, None if even else torch.arange(longest, device=device) < lengths[:, None]


def read_config(folder: Path) -> EncoderConfig:
    """The configuration of a Hugging Face directory, with sentence-transformers' files where they
    are.

    Raises:
        UnsupportedModelError: If the model type, activation, position embeddings or pooling are not
            supported.
    """
    config = _json(folder / "config.json")
    if (
        config.get("model_type") != "bert"
        or config.get("position_embedding_type", "absolute") != "absolute"
    ):
        raise UnsupportedModelError(
            f"{folder / 'config.json'}: model_type",
            "'bert' with absolute positions",
            f"{config.get('model_type')!r}, {config.get('position_embedding_type', 'absolute')!r}",
            "pass a module of your own with an encode method to ArrowEngine instead",
        )
    known = {
        field.name: config[field.name] for field in fields(EncoderConfig) if field.name in config
    }
    missing = [
        field.name
        for field in fields(EncoderConfig)
        if field.default is MISSING and field.name not in known
    ]
    if missing:
        raise UnsupportedModelError(
            str(folder / "config.json"), "the fields of a BERT model", f"none called {missing}"
        )
    limit = int(config["max_position_embeddings"])
    sentence = _json(folder / "sentence_bert_config.json", {})
    known["max_seq_length"] = min(limit, sentence.get("max_seq_length") or limit)
    modules = _json(folder / "modules.json", [])
    for module in modules:
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            known["pooling"] = _pooling(folder / module["path"] / "config.json")
        elif kind == "Normalize":
            known["normalize"] = True
        elif kind != "Transformer":
            raise UnsupportedModelError(
                f"{folder / 'modules.json'}", "Transformer, Pooling, Normalize", kind
            )
    return EncoderConfig(**known)


def _pooling(path: Path) -> str:
    config = _json(path)
    if isinstance(config.get("pooling_mode"), str):
        return str(config["pooling_mode"])
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in names:
        raise UnsupportedModelError(str(path), "mean or cls pooling", chosen)
    return names[chosen[0]]


def _json(path: Path, default: Any = None) -> Any:
    if not path.is_file() and default is not None:
        return default
    kind = dict if default is None else type(default)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CardNotFoundError(str(path), "a model file", "none") from error
    except ValueError as error:
        raise UnsupportedModelError(str(path), "JSON", error) from error
    if not isinstance(value, kind):
        raise UnsupportedModelError(str(path), f"a JSON {kind.__name__}", type(value).__name__)
    return value


def _tokenizer(folder: Path, config: EncoderConfig) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CardNotFoundError(str(path), "a tokenizer", "none")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UnsupportedModelError(str(path), "a tokenizer", error) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_seq_length)
    return tokenizer


def _tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors, mapped, by their name in a BertModel."""
    if not path.is_file():
        raise CardNotFoundError(str(path), "the weights", "none")
    try:
        return {name.removeprefix("bert."): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UnsupportedModelError(str(path), "a safetensors file", error) from error


def _state_dict(tensors: dict[str, Tensor], core: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors that the core has; heads and position buffers are left out."""
    wanted = core.state_dict()
    for name, tensor in wanted.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise UnsupportedModelError(
                f"{folder}: weight {name!r}", f"shape {tuple(tensor.shape)}", found
            )
    return {name: tensors[name] for name in wanted}


def _project(linear: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """Call a Linear, telling it the segments if it has adapters of its own for each."""
    out: Tensor = linear(x, segments) if isinstance(linear, SegmentedLinear) else linear(x)
    return out


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens, ``(rows, tokens, hidden)`` to ``(rows, hidden)``."""
    if mask is None:
        return hidden.mean(1)
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
