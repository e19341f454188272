"""A card at a glance: for each module the size and effective rank of its ΔW, and the singular
values, as a drawing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora.card import Array, LoRACard, check_card
from lora.errors import ArgumentError, MissingPackageError
from lora.lowrank import spectrum
from lora.store import PathLike, as_path, replacing

FORMATS = (".svg", ".png", ".pdf")
"""What a drawing can be saved as, by its path's ending."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What a module's ΔW is like.

    Source: the effective rank of Roy and Vetterli 2007.

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
    """Module -> what its ΔW is like, from the factors alone.

    Examples:
        >>> from lora.card import LowRank
        >>> pair = LowRank(np.eye(3, 2), np.array([[3.0, 0, 0], [0, 3, 0]]), 1.0)
        >>> facts = card_facts(LoRACard("docs", 2, 2.0, ["query"], {"query": pair}))["query"]
        >>> round(facts.norm, 6), round(facts.effective_rank, 6)
        (4.242641, 2.0)
    """
    return {module: _facts(spectrum(pair)) for module, pair in card.weights.items()}


def draw_card(card: LoRACard, path: PathLike) -> None:
    """Draw a card: ‖ΔW‖ and effective rank by layer and kind of module, and the singular values of
    each.

    Args:
        card: With at least one module.
        path: Ends in one of `FORMATS`.

    Raises:
        ArgumentError: If the path ends otherwise, or the card has no module.
        MissingPackageError: If the ``plot`` extra is not installed.
    """
    check_card(card)
    kind = as_path(path).suffix.lower()
    if kind not in FORMATS:
        raise ArgumentError(
            f"{path}", f"a file that ends in one of {', '.join(FORMATS)}", kind or "no ending"
        )
    if not card.weights:
        raise ArgumentError(f"card {card.name!r}", "a module to draw", "none")
    facts = card_facts(card)
    kinds, layers = (
        sorted(set(places), key=_in_order) for places in zip(*map(place, facts), strict=True)
    )
    figure = new_figure(figsize=(4 + len(layers) / 2, 5 + len(kinds) / 2), layout="constrained")
    axes = figure.subplots(3, 1, height_ratios=[len(kinds), len(kinds), 5])
    for axis, title, field in (
        (axes[0], "‖ΔW‖", "norm"),
        (axes[1], "effective rank", "effective_rank"),
    ):
        grid = np.full((len(kinds), len(layers)), np.nan)
        for module, found in facts.items():
            row, column = place(module)
            grid[kinds.index(row), layers.index(column)] = getattr(found, field)
        image = axis.imshow(grid, aspect="auto", vmin=0)
        axis.set(title=title, xlabel="layer", yticks=range(len(kinds)), xticks=range(len(layers)))
        axis.set_yticklabels(map(_plain, kinds))
        axis.set_xticklabels(layers)
        figure.colorbar(image, ax=axis)
    _draw_spectra(axes[2], facts, kinds)
    figure.suptitle(f"{_plain(card.name)}: rank {card.rank}, {len(facts)} modules")
    with replacing(path) as file:
        figure.savefig(file, format=kind.lstrip("."))


def new_figure(**options: Any) -> Any:
    """An empty matplotlib figure.

    Raises:
        MissingPackageError: If the ``plot`` extra is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise MissingPackageError(
            "plot", "matplotlib", "not installed", "pip install 'lora-cards[plot]'"
        ) from error
    return Figure(**options)


def place(module: str) -> tuple[str, str]:
    """A module's kind and layer: its name with the first number left out, and that number.

    Examples:
        >>> place("encoder.layer.11.attention.self.query"), place("pooler.dense")
        (('encoder.layer.attention.self.query', '11'), ('pooler.dense', '–'))
    """
    parts = module.split(".")
    layer = next((part for part in parts if part.isdecimal()), "–")
    if layer in parts:
        parts.remove(layer)
    return ".".join(parts) or "–", layer


def _draw_spectra(axis: Any, facts: Mapping[str, Facts], kinds: list[str]) -> None:
    for module, found in facts.items():
        color = f"C{kinds.index(place(module)[0])}"
        axis.plot(
            range(1, len(found.spectrum) + 1), found.spectrum, color=color, alpha=0.6, linewidth=1
        )
    for row, name in enumerate(kinds[:10]):
        axis.plot([], [], color=f"C{row}", label=_plain(name))
    axis.set(title="singular values of ΔW", xlabel="index", ylim=(0, None))
    axis.legend(fontsize="small")


def _facts(values: Array) -> Facts:
    total = float(values.sum())
    shares = values[values > 0] / total if total > 0 else values[:0]
    entropy = -float((shares * np.log(shares)).sum())
    return Facts(float(np.linalg.norm(values)), math.exp(entropy) if len(shares) else 0.0, values)


def _plain(text: str) -> str:
    """The text as it is: matplotlib takes what stands between dollars for a formula."""
    return text.replace("$", r"\$")


def _in_order(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (-1, text)
