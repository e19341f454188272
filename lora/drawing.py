"""Drawing: the size, effective rank and singular values of each module's ΔW, as a picture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora.card import Array, LoRACard, check_card
from lora.errors import ArgumentError, MissingPackageError
from lora.factors import spectrum
from lora.files import PathLike, as_path, replacing

FORMATS = (".svg", ".png", ".pdf")
"""The endings of paths that a drawing can be saved to."""


@dataclass(frozen=True, eq=False)
class Facts:
    """Figures of a module's ΔW. Source of the effective rank: Roy and Vetterli 2007.

    Args:
        norm: ‖ΔW‖, Frobenius.
        effective_rank: exp of the entropy of the singular values as shares of their sum: from 1 to
            the rank; 0 for ΔW = 0.
        spectrum: The singular values, largest first.
    """

    norm: float
    effective_rank: float
    spectrum: Array


def card_facts(card: LoRACard) -> Mapping[str, Facts]:
    """Return the figures of each module, computed from the factors alone.

    Examples:
        >>> from lora.card import LowRank
        >>> pair = LowRank(np.eye(3, 2), np.array([[3.0, 0, 0], [0, 3, 0]]), 1.0)
        >>> facts = card_facts(LoRACard("docs", 2, 2.0, ["query"], {"query": pair}))["query"]
        >>> round(facts.norm, 6), round(facts.effective_rank, 6)
        (4.242641, 2.0)
    """
    facts = {}
    for module, pair in card.weights.items():
        values = spectrum(pair)
        shares = values[values > 0] / values.sum()
        entropy = -float((shares * np.log(shares)).sum())
        effective_rank = math.exp(entropy) if len(shares) else 0.0
        facts[module] = Facts(float(np.linalg.norm(values)), effective_rank, values)
    return facts


def draw_card(card: LoRACard, path: PathLike) -> None:
    """Draw ‖ΔW‖ and effective rank by layer and kind of module, and the singular values.

    Args:
        card: A card with at least one module.
        path: Ends in one of `FORMATS`.
    """
    check_card(card)
    ending = as_path(path).suffix.lower()
    if ending not in FORMATS:
        expected = f"a file that ends in one of {', '.join(FORMATS)}"
        raise ArgumentError(f"{path}", expected, ending or "no ending")
    if not card.weights:
        raise ArgumentError(f"card {card.name!r}", "a module to draw", "none")
    facts = [(*place(module), fact) for module, fact in card_facts(card).items()]
    kinds = sorted({kind for kind, _, _ in facts})
    layers = sorted({layer for _, layer, _ in facts}, key=lambda i: (i != "–", len(i), i))
    figure = new_figure(figsize=(4 + len(layers) / 2, 5 + len(kinds) / 2), layout="constrained")
    *maps, spectra = figure.subplots(3, 1, height_ratios=[len(kinds), len(kinds), 5])
    for axis, field in zip(maps, ("norm", "effective_rank"), strict=True):
        grid = np.full((len(kinds), len(layers)), np.nan)
        for kind, layer, fact in facts:
            grid[kinds.index(kind), layers.index(layer)] = getattr(fact, field)
        image = axis.imshow(grid, aspect="auto", vmin=0)
        axis.set(title="‖ΔW‖" if field == "norm" else "effective rank", xlabel="layer")
        axis.set_yticks(range(len(kinds)), map(_plain, kinds))
        axis.set_xticks(range(len(layers)), layers)
        figure.colorbar(image, ax=axis)
    for kind, _, fact in facts:
        indices = range(1, len(fact.spectrum) + 1)
        spectra.plot(indices, fact.spectrum, f"C{kinds.index(kind)}", alpha=0.6, linewidth=1)
    for row, kind in enumerate(kinds[:10]):
        spectra.plot([], [], color=f"C{row}", label=_plain(kind))
    spectra.set(title="singular values of ΔW", xlabel="index", ylim=(0, None))
    spectra.legend(fontsize="small")
    figure.suptitle(f"{_plain(card.name)}: rank {card.rank}, {len(facts)} modules")
    with replacing(path) as file:
        figure.savefig(file, format=ending.lstrip("."))


def new_figure(**options: Any) -> Any:
    """Return an empty matplotlib figure; the ``plot`` extra must be installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package
    except ImportError as error:
        hint = "pip install 'lora-cards[plot]'"
        raise MissingPackageError("plot", "matplotlib", "not installed", hint) from error
    return Figure(**options)


def place(module: str) -> tuple[str, str]:
    """Return a module's kind and layer: its name without its first number, and that number.

    Examples:
        >>> place("encoder.layer.11.attention.self.query"), place("pooler.dense")
        (('encoder.layer.attention.self.query', '11'), ('pooler.dense', '–'))
    """
    parts = module.split(".")
    layer = next((part for part in parts if part.isdecimal()), "–")
    if layer in parts:
        parts.remove(layer)
    return ".".join(parts) or "–", layer


def _plain(text: str) -> str:
    """Escape dollar signs; matplotlib takes text between them for a formula."""
    return text.replace("$", r"\$")
