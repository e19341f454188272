"""The binding of this library itself."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lora
from lora.card import Array, LoRACard, LowRank
from lora.extract import MaxError, MinEnergy, extract_delta
from lora.files import load, save
from lora.merging import STRATEGIES, merge
from lora.models.layers import LoRALinear
from lora.router import LoRARouter
from lora.targets import Site, match_targets, plan
from lora.testing.binding import PlainCard, PlainPair, Term


def card_of(plain: PlainCard) -> LoRACard:
    """The plain values as a card."""
    return LoRACard(
        plain.name,
        plain.rank,
        plain.alpha,
        plain.target_modules,
        {module: LowRank(*pair) for module, pair in plain.weights.items()},
        plain.metadata,
        extra=plain.extra,
    )


def plain_of(card: LoRACard) -> PlainCard:
    """A card as plain values."""
    weights = {
        module: PlainPair(pair.A, pair.B, pair.scaling) for module, pair in card.weights.items()
    }
    metadata, extra = dict(card.metadata), dict(card.extra)
    return PlainCard(
        card.name, card.rank, card.alpha, card.target_modules, weights, metadata, extra
    )


def tensor_of(array: Array) -> torch.Tensor:
    """A tensor of a NumPy array, bfloat16 included; a copy."""
    if array.dtype.name == "bfloat16":
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


def array_of(tensor: torch.Tensor) -> Array:
    """The NumPy array of a tensor, bfloat16 as float32 (exactly)."""
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: Array = wide.detach().numpy()
    return array


def linear_of(weight: Array, bias: Array | None = None) -> nn.Linear:
    """A Linear with this weight ``(out, in)`` and bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(tensor_of(weight))
    if bias is not None:
        linear.bias = nn.Parameter(tensor_of(bias))
    return linear


class _Router:
    def __init__(self, embed: Callable[[Sequence[str]], Array]) -> None:
        self._router = LoRARouter(embed)

    def register(self, name: str, texts: Sequence[str], *, virtual: bool = False) -> None:
        if virtual:
            self._router.register_virtual_candidate(name, texts)
        else:
            self._router.register_card(LoRACard(name, 1, 1.0, (), {}), texts)

    def unregister(self, name: str) -> None:
        self._router.unregister(name)

    def select(self, query: str, top_k: int, threshold: float | None) -> list[tuple[str, float]]:
        routes = self._router.select(query, top_k, threshold)
        return [(route.name, route.score) for route in routes]

    def select_many(
        self, queries: Sequence[str], top_k: int, threshold: float | None
    ) -> list[list[tuple[str, float]]]:
        many = self._router.select_many(queries, top_k, threshold)
        return [[(route.name, route.score) for route in routes] for routes in many]


class Reference:
    """`lora.testing.binding.Binding` over the public functions."""

    name = "lora-cards"
    version = lora.__version__

    def write_card(self, card: PlainCard) -> bytes:  # noqa: D102
        with tempfile.TemporaryDirectory() as folder:
            save(card_of(card), Path(folder) / "card.lora.arrow")
            return (Path(folder) / "card.lora.arrow").read_bytes()

    def read_card(self, data: bytes) -> PlainCard:  # noqa: D102
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "card.lora.arrow"
            path.write_bytes(data)
            return plain_of(load(path))

    def forward(  # noqa: D102
        self, x: Array, weight: Array, bias: Array | None, terms: Mapping[str, Term]
    ) -> Array:
        pairs = {name: (LowRank(t.A, t.B, t.scaling), t.weight) for name, t in terms.items()}
        return array_of(LoRALinear(linear_of(weight, bias), pairs)(tensor_of(x)))

    def match_targets(self, names: Sequence[str], targets: Sequence[str]) -> list[str]:  # noqa: D102
        return match_targets(names, targets)

    def bind(self, card: PlainCard, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:  # noqa: D102
        sites = {name: Site(in_features, out, name) for name, (in_features, out) in shapes.items()}
        return dict(plan(sites, card_of(card)).bound)

    def extract(  # noqa: D102
        self,
        base: Mapping[str, Array],
        tuned: Mapping[str, Array],
        rank: int | None,
        energy: float | None,
        error: float | None,
    ) -> PlainCard:
        rule: Any = rank
        if energy is not None:
            rule = MinEnergy(energy)
        elif error is not None:
            rule = MaxError(error)
        return plain_of(extract_delta(base, tuned, rule))

    def make_router(self, embed: Callable[[Sequence[str]], Array]) -> _Router:  # noqa: D102
        return _Router(embed)

    def merge(  # noqa: D102
        self,
        cards: Sequence[PlainCard],
        strategy: str,
        options: Mapping[str, Any],
        weights: Sequence[float] | None,
        rank: int | None,
    ) -> PlainCard:
        return plain_of(
            merge([card_of(card) for card in cards], STRATEGIES[strategy](**options), weights, rank)
        )


BINDING = Reference()
