"""The manager: what it logs, what it says when it refuses, and what one card's options mean for the
others.
"""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from lora.card import LoRACard, LowRank
from lora.errors import (
    BaseModelError,
    CardFileError,
    CardNotFoundError,
    ConflictError,
    TargetError,
    UnboundWarning,
    UnknownCardError,
)
from lora.files import digest, save
from lora.models.adapt import fingerprint
from lora.models.layers import LoRALinear
from lora.models.manager import LoRAManager
from lora.testing.plugin import requirement

X = torch.ones(2, 4)


def card(name="docs", modules=("0",), *, targets=None, value=1.0, **options):
    pair = LowRank(np.full((4, 1), value, np.float32), np.ones((1, 4), np.float32), 1.0)
    return LoRACard(name, 1, 1.0, targets or modules, dict.fromkeys(modules, pair), **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


@pytest.fixture
def manager(model):
    return LoRAManager(model)


@pytest.fixture
def messages(caplog):
    """What was logged so far, as (level, text); asking again starts anew."""
    caplog.set_level(logging.INFO, logger="lora")

    def read():
        found = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    return read


@requirement("R8.3")
def test_the_cards_of_a_module_are_sorted_in_whatever_order_they_were_applied(manager):
    manager.apply_card(card("law"))
    manager.apply_card(card("docs"))
    assert manager.injected == {"0": ("docs", "law")}


@requirement("R3.3", "R8.3", "R8.7")
def test_a_card_is_listed_at_its_module_and_has_the_weight_that_was_set(model):
    manager = LoRAManager(nn.Sequential(model))
    manager.apply_card(card(modules=("2",)))
    manager.set_weight("docs", -0.5)
    manager.replace_card(card(modules=("2",), value=2.0))
    assert manager.injected == {"0.2": ("docs",)}
    assert manager.model[0][2].terms["docs"][1] == -0.5


@requirement("R3.1", "R3.8")
def test_a_card_is_loaded_from_disk_and_known_but_not_applied(manager, model, tmp_path, messages):
    save(card(), tmp_path / "docs.lora.arrow")
    path = tmp_path / "docs.lora.arrow"
    loaded = manager.load_card(path, verify=digest(path))
    with pytest.raises(CardFileError, match="SHA-256"):
        manager.load_card(tmp_path / "docs.lora.arrow", verify="0" * 64)
    assert loaded == card()
    assert dict(manager.list_cards()) == {"docs": card()}
    assert manager.model is model
    assert messages() == [("INFO", "loaded card 'docs': 1 modules, rank 1")]
    manager.apply_card(loaded)
    assert isinstance(manager.model[0], LoRALinear)
    messages()
    manager.unload_card("docs")
    manager.unload_card("docs")
    assert messages() == [("INFO", "unloaded card 'docs': 1 modules")]
    manager.set_weight("docs", 0.5)
    assert messages() == [("INFO", "weight 0.5 for card 'docs': 1 layers")]
    assert list(manager.list_cards()) == ["docs"]
    manager.remove_card("docs")
    assert not manager.list_cards()


@requirement("R7.1", "R3.1", "R3.10")
def test_a_missing_file_is_named_and_nothing_is_loaded(manager, tmp_path):
    state = manager.state
    with pytest.raises(CardNotFoundError, match=r"nowhere\.lora\.arrow"):
        manager.load_card(tmp_path / "nowhere.lora.arrow")
    assert manager.state is state


@requirement("R3.8")
def test_applications_and_removals_are_logged_with_their_layers(manager, messages):
    manager.apply_card(card(modules=("0", "2")))
    assert messages() == [("INFO", "applied card 'docs': 2 layers")]
    manager.replace_card(card(modules=("2",)))
    assert messages() == [("INFO", "replaced card 'docs': 1 layers")]
    manager.remove_card("docs")
    assert messages() == [("INFO", "removed card 'docs': 1 layers")]


@requirement("R3.15")
def test_another_leading_part_is_reported_and_logged(manager, messages):
    report = manager.apply_card(card(modules=("base.0", "base.2")))
    assert (report.leading, dict(report.bound)) == (("base.", ""), {"0": "base.0", "2": "base.2"})
    change = "card 'docs': its keys begin with 'base.', the names of their layers with ''"
    assert messages() == [("INFO", "applied card 'docs': 2 layers"), ("INFO", change)]


@requirement("R3.8", "R22.1", "R22.2")
def test_swaps_and_rollbacks_are_logged(manager, messages):
    manager.prepare(card())
    manager.swap()
    discarded = "AdapterSet('docs': 1.0, 'law': 1.0), 2 layers"
    manager.apply_card(card("law", ("2",)))
    manager.rollback()
    assert messages() == [
        ("INFO", "prepared card 'docs': 1 layers"),
        ("INFO", "swapped to AdapterSet('docs': 1.0), 1 layers"),
        ("INFO", "applied card 'law': 1 layers"),
        ("INFO", f"rolled back to AdapterSet(), 0 layers; discarded {discarded}"),
    ]


@requirement("R7.3", "R3.12")
def test_targets_that_are_not_there_are_warned_of_and_the_rest_is_injected(manager, messages):
    half = card(modules=("0", "9"), targets=("0", "7", "8"))
    left = "targets not found: '7', '8'; weights not used: '9'"
    with pytest.warns(UnboundWarning, match=left) as caught:
        report = manager.apply_card(half)
    assert len(caught) == 1
    applied = ("INFO", "applied card 'docs': 1 layers")
    assert messages() == [applied, ("WARNING", f"card 'docs': {left}")]
    assert (report.targets_not_found, report.weights_not_used) == (("7", "8"), ("9",))
    assert manager.injected == {"0": ("docs",)}


@requirement("R3.12", "R3.8")
def test_a_card_that_binds_nothing_is_refused_and_changes_nothing(manager, messages):
    manager.apply_card(card())
    manager.add_card(card("law", ("2",)))
    state, lost = manager.state, card(modules=("9",), value=2.0)
    messages()
    for act in (
        lambda: manager.apply_card(card("lost", ("9",))),
        lambda: manager.prepare([card("law", ("2",)), card("lost", ("9",))]),
        lambda: manager.replace_card(lost),
    ):
        with pytest.raises(TargetError, match="expected a Linear of the model"):
            act()
        assert manager.state is state
    assert messages() == []
    assert manager.metrics.snapshot()["refusals_TargetError"] == 3


@requirement("R3.14", "R3.8")
def test_layers_that_may_never_be_called_are_warned_of(messages):
    manager = LoRAManager(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)}))
    with pytest.warns(UnboundWarning, match="never be called .* 'attention.out_proj'"):
        report = manager.apply_card(card(modules=("out_proj",)))
    assert report.bypassed == ("attention.out_proj",)
    assert messages() == [("INFO", "applied card 'docs': 1 layers")]


@requirement("R7.4", "R3.13")
def test_applying_an_active_card_again_is_logged_and_changes_nothing(manager, messages):
    first = manager.apply_card(card())
    state = manager.state
    messages()
    assert manager.apply_card(card()) == first
    assert manager.state is state
    assert messages() == [("INFO", "active already: card 'docs': 1 layers")]


@requirement("R7.4")
def test_another_card_of_an_active_name_is_refused_with_a_way_out(manager):
    manager.apply_card(card())
    expected = r"apply_card 'docs': .* found a card with other content; use replace_card"
    with pytest.raises(ConflictError, match=expected):
        manager.apply_card(card(value=2.0))
    with pytest.raises(ConflictError, match="found another weight; use set_weight"):
        manager.apply_card(card(), weight=0.5)
    manager.replace_card(card(value=2.0))
    manager.set_weight("docs", 0.5)
    assert manager.active["docs"] == (card(value=2.0), 0.5)


@requirement("R7.4", "R8.7", "R7.8")
def test_replacing_or_weighting_an_unknown_card_names_it_and_those_that_are_active(manager):
    manager.apply_card(card())
    for act in (lambda: manager.replace_card(card("law")), lambda: manager.set_weight("law", 2.0)):
        expected = r"'law': expected an active card, found only \['docs'\]"
        with pytest.raises(UnknownCardError, match=expected):
            act()


@requirement("R7.3", "R3.13")
def test_strictness_is_asked_of_the_new_card_only(manager):
    with pytest.warns(UnboundWarning, match="'nowhere'"):
        manager.apply_card(card("loose", targets=("0", "nowhere")))
    manager.apply_card(card("tight", ("2",)), strict=True)
    manager.replace_card(card("tight", ("2",), value=2.0), strict=True)
    assert list(manager.active) == ["loose", "tight"]
    with pytest.raises(TargetError, match=r"card 'third': .* targets not found: 'nowhere'"):
        manager.apply_card(card("third", ("2",), targets=("2", "nowhere")), strict=True)
    with pytest.raises(TargetError, match=r"card 'loose': .* targets not found: 'nowhere'"):
        manager.apply_card(card("loose", targets=("0", "nowhere")), strict=True)


@requirement("R1.13", "R3.13")
def test_a_base_check_waived_for_one_card_stays_waived_when_others_come_and_go(manager, model):
    foreign = card("foreign", base_fingerprint="0" * 64)
    for act in (lambda: manager.apply_card(foreign), lambda: manager.prepare(foreign)):
        with pytest.raises(BaseModelError, match="card 'foreign'"):
            act()
    manager.apply_card(foreign, check_base=False)
    made_for = fingerprint(model, card("own", ("2",)))
    manager.apply_card(card("own", ("2",), base_fingerprint=made_for))
    manager.set_weight("own", 0.5)
    manager.remove_card("own")
    assert list(manager.active) == ["foreign"]
    with pytest.raises(BaseModelError, match="card 'foreign'"):
        manager.replace_card(card("foreign", value=2.0, base_fingerprint="1" * 64))


@requirement("R3.10", "R3.12")
def test_a_report_cannot_be_used_to_change_the_manager(manager):
    manager.apply_card(card()).bound.clear()
    manager.apply_card(card()).bound.clear()
    prepared = manager.prepare(card("law", ("2",)))
    prepared["law"].bound.clear()
    manager.injected.clear()
    assert manager.injected == {"0": ("docs",)}
    manager.swap()
    assert manager.injected == {"2": ("law",)}
