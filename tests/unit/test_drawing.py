"""The drawing of a card, and the facts it shows."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lora.card import LoRACard, LowRank
from lora.drawing import FORMATS, card_facts, draw_card, place
from lora.errors import ArgumentError
from lora.factors import delta, spectrum
from lora.testing.plugin import requirement

NAMES = ("encoder.layer.0.query", "encoder.layer.1.query", "encoder.layer.10.value", "pooler")


def card_of(rank=3, names=NAMES):
    rng = np.random.default_rng(0)
    shapes = (6, rank), (rank, 5)
    pairs = {n: LowRank(*(rng.normal(size=shape) for shape in shapes), -0.5) for n in names}
    return LoRACard("docs", rank, 1.0, ["query"], pairs)


@pytest.mark.parametrize(("rows", "rank", "columns"), [(6, 3, 5), (2, 4, 7), (7, 4, 1), (3, 3, 3)])
def test_the_spectrum_is_that_of_the_dense_change(rows, rank, columns):
    rng = np.random.default_rng(rank)
    pair = LowRank(rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns)), -0.25)
    values, dense = spectrum(pair), np.linalg.svd(delta(pair), compute_uv=False)
    assert values.shape == (min(rows, rank, columns),)
    # Two backward-stable SVDs.
    assert np.abs(values - dense[: len(values)]).max() <= 100 * np.finfo(np.float64).eps * dense[0]
    assert np.all(np.diff(values) <= 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_change_beyond_float64_has_no_spectrum(bad):
    with pytest.raises(ArgumentError, match="spectrum of a pair"):
        spectrum(LowRank(np.full((2, 1), bad), np.full((1, 2), bad)))


def test_the_effective_rank_is_between_1_and_the_rank_and_0_for_nothing():
    facts = card_facts(card_of())
    assert all(1 <= fact.effective_rank <= 3 for fact in facts.values())
    for module, fact in facts.items():
        assert math.isclose(fact.norm, np.linalg.norm(delta(card_of().weights[module])))
    nothing = LoRACard("zero", 1, 1.0, [], {"m": LowRank(np.zeros((2, 1)), np.ones((1, 2)))})
    assert (card_facts(nothing)["m"].effective_rank, card_facts(nothing)["m"].norm) == (0.0, 0.0)


@requirement("R25.2")
@pytest.mark.parametrize("ending", FORMATS)
def test_a_card_is_drawn_in_the_kind_that_the_path_names(ending, tmp_path):
    draw_card(card_of(), tmp_path / f"card{ending}")
    drawn = (tmp_path / f"card{ending}").read_bytes()
    assert drawn.startswith({".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[ending])


def test_a_drawing_names_every_kind_of_module_and_every_layer(tmp_path):
    draw_card(card_of(), tmp_path / "card.svg")
    comments = (tmp_path / "card.svg").read_text()
    kinds = ["encoder.layer.query", "encoder.layer.value", "pooler"]
    for text in [*kinds, "effective rank", "docs: rank 3, 4 modules"]:
        assert f"<!-- {text} -->" in comments


def test_layers_are_ordered_as_numbers():
    assert [place(f"layer.{i}.query")[1] for i in (2, 10)] == ["2", "10"]
    assert place("") == ("–", "–")
    assert place("3") == ("–", "3")


@pytest.mark.parametrize("name", ["card", "card.exe", "card.txt"])
def test_another_ending_is_refused_and_writes_nothing(name, tmp_path):
    with pytest.raises(ArgumentError, match=r"a file that ends in one of \.svg"):
        draw_card(card_of(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_card_of_no_modules_has_no_drawing(tmp_path):
    with pytest.raises(ArgumentError, match="expected a module to draw, found none"):
        draw_card(LoRACard("empty", 1, 1.0, [], {}), tmp_path / "card.svg")


def test_a_name_is_drawn_as_it_is_and_never_taken_for_a_formula(tmp_path):
    card = replace(card_of(names=("a$^{", "b$_{")), name="x$_{$ docs")
    draw_card(card, tmp_path / "card.SVG")
    drawn = (tmp_path / "card.SVG").read_text()
    for text in ("a$^{", "b$_{", "x$_{$ docs: rank 3, 2 modules"):
        assert f"<!-- {text} -->" in drawn


def test_what_is_no_card_or_no_path_is_refused():
    with pytest.raises(ArgumentError, match="a LoRACard"):
        draw_card(None, "card.svg")
    with pytest.raises(ArgumentError, match="path"):
        draw_card(card_of(), None)
