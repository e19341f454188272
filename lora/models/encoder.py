"""InferenceCore: a BERT encoder of sentences with Hugging Face's module names and state dict.

It loads a model's folder without copying the weights, and takes pooling and normalisation from the
sentence-transformers files in it. The embedding of a text is the pooled last hidden state.
Architecture: Devlin et al. 2018; names: ``BertModel``.

Requirements: R5, R17.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.nn.utils.rnn import pad_sequence

from lora.card import Array
from lora.checks import integer
from lora.errors import ArgumentError, UnsupportedModelError, shown
from lora.files import PathLike, as_path
from lora.interop.weights import open_safetensors
from lora.models.encoder_folder import POOLINGS, EncoderConfig, read_folder, refusal
from lora.models.layers import NeverCalled
from lora.models.rows import carried_sets, rows
from lora.routing import texts_of

TOKEN_BUDGET = 2048
"""Tokens of a batch, padding included: 1.5 times the throughput of batches of 32 on two cores."""

UNPADDED = 512
"""Tokens of a batch that is not padded further: what comes next has fewer tokens a text."""

ACTIVATIONS: Mapping[str, Any] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}

DENSE_ACTIVATIONS = ["Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU"]
"""Names in ``torch.nn``, for the Dense modules of sentence-transformers."""


class Layer(nn.Module):
    """A transformer block: self-attention, then a feed-forward of two Linears."""

    attention: Any
    intermediate: Any
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

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``(rows, tokens, hidden)`` to the same; `mask` is ``(rows, 1, 1, tokens)``."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in self.attention["self"].values()
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        output = self.attention.output
        x = output.LayerNorm(output.dense(mixed) + x)
        inner = ACTIVATIONS[self.activation](self.intermediate.dense(x))
        normed: Tensor = self.output.LayerNorm(self.output.dense(inner) + x)
        return normed


def _check_names(key: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in list(known):
            raise refusal(f"encoder config, {key}", f"one of {list(known)}", name)


def _output(width: int, config: EncoderConfig) -> nn.ModuleDict:
    norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
    return nn.ModuleDict({"dense": nn.Linear(width, config.hidden_size), "LayerNorm": norm})


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
        pooling = config.pooling
        self.pooling = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        _check_names("hidden_act", [config.hidden_act], ACTIVATIONS)
        _check_names("pooling_mode", self.pooling or [""], POOLINGS.values())
        activations = [layer.activation for layer in config.dense]
        _check_names("activation_function", activations, DENSE_ACTIVATIONS)
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
        self.dense = nn.ModuleList(
            nn.Linear(layer.in_features, layer.out_features, bias=layer.bias)
            for layer in config.dense
        )
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
        config, tokenizer = read_folder(folder)
        names = _weights(folder / config.path)
        tensors = {name.removeprefix("bert."): tensor for name, tensor in names.items()}
        for index, layer in enumerate(config.dense):
            for name, tensor in _weights(folder / layer.path).items():
                tensors[name.replace("linear", f"dense.{index}")] = tensor
        config = replace(config, pooler="pooler.dense.weight" in tensors)
        with torch.device("meta"):
            core = cls(config, tokenizer)
        needed = {name: tensors[name] for name in core.state_dict() if name in tensors}
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in needed.values()}
        if len(dtypes | ({config.dtype} - {None})) > 1:
            raise refusal(folder, f"weights of one dtype, {config.dtype} in config.json", dtypes)
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

    @property
    def width(self) -> int:
        """The number of values of an embedding."""
        dense, limit = self.config.dense, self.config.truncate_dim
        width = dense[-1].out_features if dense else self.config.hidden_size * len(self.pooling)
        return min(width, limit or width)

    def forward(self, ids: Tensor, mask: Tensor | None = None, skipped: int = 0) -> Tensor:
        """Embed rows of token ids; the result has the shape ``(rows, width)``.

        Args:
            ids: Shape ``(rows, tokens)``.
            mask: Shape ``(rows, tokens)``, True at tokens, False at padding; None without padding.
            skipped: Tokens at the start, those of a prompt, that the pooling leaves out.
        """
        embeddings, seen = self.embeddings, None if mask is None else mask[:, None, None, :]
        positions = embeddings.position_embeddings.weight[: ids.shape[1]]
        token_type = embeddings.token_type_embeddings.weight[0]
        x = embeddings.LayerNorm(embeddings.word_embeddings(ids) + token_type + positions)
        for layer in self.encoder.layer:
            x = layer(x, seen)
        pooled = pool(x, mask, self.pooling, skipped)
        for linear, layer in zip(self.dense, self.config.dense, strict=True):
            pooled = getattr(nn, layer.activation)()(linear(pooled))
        pooled = F.normalize(pooled, dim=-1) if self.config.normalize else pooled
        return pooled[:, : self.config.truncate_dim]

    def tokenize(self, texts: Sequence[str], prompt: str | None = None) -> list[list[int]]:
        """Return the token ids of texts after a prompt; default: the one that the folder names."""
        texts, (before,) = texts_of(texts), texts_of([self._prompt(prompt)], "prompt")
        if self.tokenizer is None:
            raise UnsupportedModelError("encoder", "a tokenizer", "none")
        encodings = self.tokenizer.encode_batch_fast([before + text for text in texts])
        positions = self.config.max_position_embeddings
        if any(len(encoding.ids) > positions for encoding in encodings):
            hint = "shorten them, or lower max_seq_length in sentence_bert_config.json"
            expected = f"at most {positions} tokens each, as many as the model has positions"
            raise ArgumentError("texts", expected, "a longer one", hint)
        return [encoding.ids for encoding in encodings]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as `encode` does, in one padded batch ``(n, d)`` that gradients flow through.

        Each text must have a token.
        """
        rows = self.tokenize(texts)
        if not rows or not all(rows):
            raise ArgumentError("texts", "one or several, each of at least one token", shown(texts))
        embedded: Tensor = self(*pad(rows, self.device), skipped=self._skipped(self._prompt()))
        return embedded

    @torch.inference_mode()
    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize_embeddings: bool = False,
        batch_size: int | None = None,
    ) -> Array:
        """Embed texts in batches of similar length: float32, shape ``(n, d)``, or ``(d,)`` for one.

        Args:
            texts: As many as you like, even none; a text without a token gets the zero vector.
            prompt: What stands before each text; it counts more than `prompt_name`.
            prompt_name: A prompt of the model's folder; default: the one that the folder names.
            normalize_embeddings: Divide each vector by its length.
            batch_size: Texts in a batch; default: as many as `TOKEN_BUDGET` allows.
        """
        if batch_size is not None:
            integer(batch_size, "batch_size", least=1)
        before = self._prompt(prompt, prompt_name)
        several = [texts] if isinstance(texts, str) else texts
        ids, sets = self.tokenize(several, before), carried_sets(several)
        skipped = self._skipped(before)
        result = np.zeros((len(ids), self.width), np.float32)
        for batch in batches([len(row) for row in ids], rows=batch_size, unpadded=UNPADDED):
            if sets:  # rows of one set become neighbours
                batch.sort(key=sets.__getitem__)
            padded, mask = pad([ids[row] for row in batch], self.device)
            with rows([sets[row] for row in batch]) if sets else nullcontext():
                result[batch] = self(padded, mask, skipped).float().cpu().numpy()
        if normalize_embeddings:
            result = F.normalize(torch.from_numpy(result), dim=-1).numpy()
        return result[0] if isinstance(texts, str) else result

    def _prompt(self, prompt: str | None = None, name: str | None = None) -> str:
        if prompt is None:
            prompts = self.config.prompts
            name = self.config.default_prompt_name if name is None else name
            if name is not None and name not in list(prompts):
                raise ArgumentError("prompt_name", f"one of {sorted(prompts)}", shown(name))
            prompt = "" if name is None else prompts[name]
        if not isinstance(prompt, str):
            raise ArgumentError("prompt", "a str", shown(prompt))
        return prompt

    def _skipped(self, prompt: str) -> int:
        """Return how many tokens the pooling leaves out: those of the prompt, without the end."""
        if not prompt or self.config.include_prompt or self.tokenizer is None:
            return 0
        (tokens,) = self.tokenize([""], prompt)
        special = self.tokenizer.get_added_tokens_decoder().get(tokens[-1]) if tokens else None
        return len(tokens) - bool(special and special.special)


def pool(x: Tensor, mask: Tensor | None, modes: Sequence[str], skipped: int = 0) -> Tensor:
    """Join the poolings of token vectors ``(rows, tokens, hidden)``, as sentence-transformers does.

    Examples:
        >>> pool(torch.tensor([[[1.0], [3.0]]]), None, ["mean", "max"])
        tensor([[2., 3.]])
    """
    places = torch.arange(x.shape[1], device=x.device)
    seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    seen = seen & (places >= skipped)
    weights, rows = seen[..., None].to(x.dtype), torch.arange(len(x), device=x.device)
    pooled: list[Tensor] = []
    for mode in modes:
        if mode == "cls":
            pooled.append(x[rows, seen.int().argmax(1)])
        elif mode == "max":
            pooled.append(x.masked_fill(~seen[..., None], float("-inf")).amax(1))
        elif mode == "lasttoken":
            pooled.append((x * weights)[rows, x.shape[1] - 1 - seen.flip(1).int().argmax(1)])
        else:
            scaled = weights * (places + 1)[:, None] if mode == "weightedmean" else weights
            count = scaled.sum(1).clamp(min=1e-9)
            root = mode == "mean_sqrt_len_tokens"
            pooled.append((x * scaled).sum(1) / (count.sqrt() if root else count))
    return torch.cat(pooled, -1)


def batches(
    lengths: Sequence[int],
    budget: int = TOKEN_BUDGET,
    rows: int | None = None,
    *,
    unpadded: float = math.inf,
) -> Iterable[list[int]]:
    """Group positions by similar length: rows × longest is at most `budget`, or there is one row.

    With `rows` each group has that many instead. Positions of length 0 are left out. A group of
    `unpadded` tokens takes no shorter row, which would be padded.

    Examples:
        >>> list(batches([3, 1, 2, 0, 9], budget=6))
        [[4], [0, 2], [1]]
    """
    batch: list[int] = []
    for row in sorted(np.flatnonzero(lengths).tolist(), key=lambda row: (-lengths[row], row)):
        if batch:
            count, longest = len(batch), lengths[batch[0]]
            is_padded = count * longest >= unpadded and lengths[row] < longest
            if count == rows if rows else is_padded or (count + 1) * longest > budget:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return ids as one tensor and a mask that is True at tokens, or None without padding."""
    ids = pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return ids, None if mask.all() else mask


def _weights(folder: Path) -> dict[str, Tensor]:
    """Map the weights of a folder; name the way out where they are in another format."""
    path = folder / "model.safetensors"
    others = [folder / "pytorch_model.bin", folder / "model.safetensors.index.json"]
    if not path.is_file() and any(other.is_file() for other in others):
        raise refusal(folder, "the weights in one file, model.safetensors", "another format")
    with open_safetensors(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
