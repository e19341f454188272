"""InferenceCore: a BERT encoder of sentences with Hugging Face's module names and state dict.

It loads a model's folder without copying the weights, and takes pooling and normalisation from the
sentence-transformers files in it. The embedding of a text is the pooled last hidden state.
Architecture: Devlin et al. 2018; names: ``BertModel``.

Requirements: R5, R17.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lora.card import Array
from lora.checks import parse_json
from lora.errors import ArgumentError, ShapeError, UnsupportedModelError, shown
from lora.files import PathLike, as_path, os_errors
from lora.interop.weights import open_safetensors
from lora.models.layers import NeverCalled, SegmentedLinear, Segments
from lora.routing import texts_of

TOKEN_BUDGET = 2048
"""Tokens of a batch, padding included: 1.5 times the throughput of batches of 32 on two cores."""

ACTIVATIONS: Mapping[str, Any] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}

POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
"""Flags of sentence-transformers' older files."""


@dataclass(frozen=True)
class EncoderConfig:
    """The settings in ``config.json`` and sentence-transformers' files that change the result."""

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


class Layer(nn.Module):
    """A transformer block: self-attention, then a feed-forward of two Linears."""

    attention: Any
    output: Any

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        projections = {name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"self": nn.ModuleDict(projections), "output": _output(hidden, config)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, inner)})
        self.output = _output(inner, config)
        self.heads, self.activation = config.num_attention_heads, config.hidden_act

    def forward(self, x: Tensor, mask: Tensor | None, segments: Segments) -> Tensor:
        """``(rows, tokens, hidden)`` to the same; `mask` is ``(rows, 1, 1, tokens)``."""
        q, k, v = (
            _project(linear, x, segments).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in self.attention["self"].values()
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        output = self.attention.output
        x = output.LayerNorm(_project(output.dense, mixed, segments) + x)
        inner = ACTIVATIONS[self.activation](_project(self.intermediate.dense, x, segments))
        normed: Tensor = self.output.LayerNorm(_project(self.output.dense, inner, segments) + x)
        return normed


def _output(width: int, config: EncoderConfig) -> nn.ModuleDict:
    """Make a projection that is added to its block's input and normalised."""
    norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
    return nn.ModuleDict({"dense": nn.Linear(width, config.hidden_size), "LayerNorm": norm})


def _project(linear: Any, x: Tensor, segments: Segments) -> Any:
    """Call a Linear; it gets the segments if it has adapters of its own for each."""
    return linear(x, segments) if isinstance(linear, SegmentedLinear) else linear(x)


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

    embeddings: Any
    encoder: Any

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        if config.hidden_act not in ACTIVATIONS or config.pooling not in ("mean", "cls"):
            expected = f"one of {list(ACTIVATIONS)}; mean or cls pooling"
            setting = f"{config.hidden_act}, {config.pooling}"
            raise UnsupportedModelError("encoder config", expected, setting)
        self.config = config
        self.tokenizer = tokenizer
        hidden = config.hidden_size
        sizes = {
            "word_embeddings": config.vocab_size,
            "position_embeddings": config.max_position_embeddings,
            "token_type_embeddings": config.type_vocab_size,
        }
        tables = {name: nn.Embedding(size, hidden) for name, size in sizes.items()}
        norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.embeddings = nn.ModuleDict({**tables, "LayerNorm": norm})
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.encoder.checkpointing = False  # True: compute each layer again on the way back
        if config.pooler:
            self.pooler: nn.Module = NeverCalled()  # in the state dict, but no part of an embedding
            self.pooler.dense = nn.Linear(hidden, hidden)

    @classmethod
    def from_pretrained(cls, folder: PathLike) -> Self:
        """Load a Hugging Face or sentence-transformers folder; the weights stay mapped.

        Raises:
            UnsupportedModelError: The model is not BERT, or its files do not fit each other.
        """
        folder = as_path(folder)
        config = read_config(folder)
        with open_safetensors(folder / "model.safetensors", framework="pt") as file:
            names = file.keys()
            tensors = {name.removeprefix("bert."): file.get_tensor(name) for name in names}
        config = replace(config, pooler="pooler.dense.weight" in tensors)
        with torch.device("meta"):
            core = cls(config, _tokenizer(folder / "tokenizer.json", config))
        needed = {name: tensors[name] for name in core.state_dict() if name in tensors}
        try:
            core.load_state_dict(needed, assign=True)
        except RuntimeError as error:
            raise UnsupportedModelError(
                str(folder), "the weights that config.json describes", shown(str(error), 500)
            ) from error
        return core.requires_grad_(requires_grad=False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.word_embeddings.weight.device  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, mask: Tensor | None = None, segments: Segments = ()) -> Tensor:
        """Embed rows of token ids; the result has the shape ``(rows, hidden)``.

        Args:
            ids: Shape ``(rows, tokens)``.
            mask: Shape ``(rows, tokens)``, True at tokens, False at padding; None without padding.
            segments: The adapter set of each run of rows, for a model of `adapt_rows`.
        """
        embeddings, seen = self.embeddings, None if mask is None else mask[:, None, None, :]
        positions = embeddings.position_embeddings.weight[: ids.shape[1]]
        token_type = embeddings.token_type_embeddings.weight[0]
        x = embeddings.LayerNorm(embeddings.word_embeddings(ids) + token_type + positions)
        for layer in self.encoder.layer:
            if self.encoder.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, seen, segments, use_reentrant=False)
            else:
                x = layer(x, seen, segments)
        if self.config.pooling == "cls":
            pooled = x[:, 0]
        elif mask is None:
            pooled = x.mean(1)
        else:
            weights = mask[..., None].to(x.dtype)
            pooled = (x * weights).sum(1) / weights.sum(1)
        return F.normalize(pooled, dim=-1) if self.config.normalize else pooled

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, cut at ``max_seq_length``."""
        texts = texts_of(texts)
        if self.tokenizer is None:
            raise UnsupportedModelError("encoder", "a tokenizer", "none")
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as one padded batch ``(n, hidden)`` that gradients flow through."""
        rows = self.tokenize(texts)
        if not rows or not all(rows):
            raise ArgumentError("texts", "one or several, each of at least one token", shown(texts))
        embedded: Tensor = self(*pad(rows, self.config.pad_token_id, self.device))
        return embedded

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], *, sets: Sequence[int] | None = None) -> Array:
        """Embed texts in batches of similar length: float32, shape ``(n, hidden)``.

        Args:
            texts: Any number, empty ones included; a text without a token gets the zero vector.
            sets: Index of each text's adapter set, for a model of `lora.models.adapt.adapt_rows`.
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
    """Group positions by similar length: rows × longest is at most `budget`, or there is one row.

    Positions of length 0 are left out.

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
    """Order rows so that those of an adapter set are neighbours; return each run of them, too.

    Examples:
        >>> by_set([4, 5, 6], [0, 0, 0, 0, 1, 0, 1])
        ([5, 4, 6], ((0, 1, 0), (1, 3, 1)))
    """
    if sets is None:
        return rows, ()
    rows = sorted(rows, key=lambda row: sets[row])
    counts = Counter(sets[row] for row in rows)
    stops = list(accumulate(counts.values()))
    return rows, tuple(zip([0, *stops[:-1]], stops, counts, strict=True))


def pad(
    rows: Sequence[Sequence[int]], token: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return ids as one tensor and a mask that is True at tokens, or None without padding."""
    ids = pad_sequence([torch.tensor(row, device=device) for row in rows], True, token)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return ids, None if mask.all() else mask


def read_config(folder: Path) -> EncoderConfig:
    """Read the configuration of a model's folder, with sentence-transformers' files if any."""
    path = folder / "config.json"
    values = _json(path, dict)
    model = values.get("model_type"), values.get("position_embedding_type", "absolute")
    if model != ("bert", "absolute"):
        hint = "pass a module of your own with an encode method to ArrowEngine instead"
        raise UnsupportedModelError(str(path), "'bert' with absolute positions", model, hint)
    settings = {name: values[name] for name in EncoderConfig.__dataclass_fields__ if name in values}
    limit = settings.get("max_position_embeddings", 0)
    sentence = _json(folder / "sentence_bert_config.json", dict, optional=True)
    settings["max_seq_length"] = min(limit, sentence.get("max_seq_length") or limit)
    modules = _json(folder / "modules.json", list, optional=True)
    folders = {str(module["type"]).rpartition(".")[2]: module.get("path", "") for module in modules}
    if unknown := sorted(folders.keys() - {"Transformer", "Pooling", "Normalize"}):
        expected = "Transformer, Pooling, Normalize"
        raise UnsupportedModelError(str(folder / "modules.json"), expected, unknown)
    settings["normalize"] = "Normalize" in folders
    if "Pooling" in folders:
        pooling = _json(folder / folders["Pooling"] / "config.json", dict)
        flags = " ".join(key for key, on in pooling.items() if on and "pooling_mode_" in key)
        settings["pooling"] = pooling.get("pooling_mode") or POOLINGS.get(flags, flags)
    try:
        return EncoderConfig(**settings)
    except TypeError as error:
        raise UnsupportedModelError(str(path), "the fields of a BERT model", error) from error


def _json(path: Path, kind: type, *, optional: bool = False) -> Any:
    if optional and not path.is_file():
        return kind()
    with os_errors(path):
        return parse_json(path.read_bytes(), str(path), kind, UnsupportedModelError)


def _tokenizer(path: Path, config: EncoderConfig) -> Tokenizer:
    with os_errors(path):
        data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UnsupportedModelError(str(path), "a tokenizer", error) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_seq_length)
    return tokenizer
