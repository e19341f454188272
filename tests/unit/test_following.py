"""An engine and its router follow a folder of cards, as a skill factory leaves it."""

import logging
import os
import re
import time
from dataclasses import replace

import numpy as np
import pytest

import lora
from lora.engine import ArrowEngine
from lora.errors import CardNotFoundError, ConflictError, StoreError
from lora.federation import catalog, follow
from lora.testing.plugin import requirement
from tests.unit.test_engine import Words, words_card


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "live"
    path.mkdir()
    put(path)
    return path


def put(folder, size=1.0, version="0.1.0", name="docs", file=None, **changes):
    """Put a card into the folder, by a rename."""
    card = words_card(name, size, version=version, description="open a file")
    lora.save(replace(card, **changes), folder / f"{file or name}.lora.arrow")


def following(folder):
    engine = ArrowEngine(Words())
    engine.follow(folder)
    return engine


def answers(engine):
    """The size of the card that answers: by name, by intent, and as the router has it."""
    by_name = engine.encode_with_lora(["ab"], "docs").adapters[0]
    by_intent = engine.encode_with_lora(["ab"], intent_query="open a file").adapters[0]
    assert by_intent == by_name
    assert [route.name for route in engine.router.select("open a file")] == ["docs"]
    (card, _) = by_name["docs"]
    return float(card.weights["dense"].A[0, 0])


def difference(engine):
    """How far what is active moves an embedding."""
    return np.abs(engine.encode("ab") - engine.encode_with_lora(["ab"], {}).embeddings[0]).max()


@requirement("R19.5", "R18.4")
def test_the_next_request_has_the_version_that_is_live_and_after_a_roll_back_the_earlier(folder):
    engine = following(folder)
    first = answers(engine)
    earlier = (folder / "docs.lora.arrow").rename(folder / "kept")
    put(folder, 2.0, "0.2.0")
    assert answers(engine) == 2 * first
    os.link(earlier, folder / "arriving")
    (folder / "arriving").replace(folder / "docs.lora.arrow")
    assert answers(engine) == first
    assert difference(engine) == 0  # it is known and not active
    put(folder, name="law")
    assert set(engine.router.candidates) == {"docs", "law"}
    (folder / "law.lora.arrow").unlink()
    assert set(engine.router.candidates) == {"docs"}
    assert list(engine.manager.list_cards()) == ["docs"]


@requirement("R19.5")
@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.encode("ab"),
        lambda engine: engine.encode_with_lora(["ab"], "law"),
        lambda engine: engine.encode_with_lora(["ab"], intent_query="open a file"),
        lambda engine: engine.router.select("open a file"),
        lambda engine: engine.router.candidates,
    ],
)
def test_every_kind_of_request_looks_first(folder, ask):
    engine = following(folder)
    put(folder, name="law")
    ask(engine)
    assert set(engine.reference.value.cards) == {"docs", "law"}


@requirement("R19.5")
def test_an_active_card_is_replaced_where_it_is_active(folder):
    engine = following(folder)
    engine.load_lora(folder / "docs.lora.arrow", weight=0.5)
    before = difference(engine)
    put(folder, 2.0, "0.2.0")
    assert difference(engine) == pytest.approx(2 * before, rel=1e-5)
    assert engine.manager.active["docs"][1] == 0.5
    (folder / "docs.lora.arrow").unlink()
    assert difference(engine) == 0


@requirement("R19.5", "R19.1")
@pytest.mark.parametrize(
    ("bad", "reason"),
    {
        "no card": "not served: .*docs",
        "another model": "card 'docs' stays as it was: .*2 -> 3, found 5",
        "another base": "card 'docs' stays as it was: .*base",
        "one version twice": r"docs' 0\.1\.0: expected one card per name and version, found",
    }.items(),
)
def test_a_card_that_is_bad_on_arrival_leaves_the_last_good_one(folder, caplog, bad, reason):
    engine = following(folder)
    first = answers(engine)
    with caplog.at_level(logging.WARNING):
        match bad:
            case "no card":
                (folder / "new").write_bytes(b"ARROW1\0\0 and no more")
                (folder / "new").replace(folder / "docs.lora.arrow")
            case "another model":
                wide = lora.LowRank(np.ones((5, 1)), np.ones((1, 3)))
                put(folder, 2.0, "0.2.0", weights={"dense": wide})
            case "another base":
                put(folder, 2.0, "0.2.0", base_fingerprint="0" * 64)
            case "one version twice":
                put(folder, 2.0, file="other")
        assert answers(engine) == first
    assert re.search(reason, caplog.text), caplog.text
    (folder / "other.lora.arrow").unlink(missing_ok=True)
    put(folder, 3.0, "0.3.0")
    assert answers(engine) == 3 * first


@requirement("R19.1")
def test_a_folder_with_two_contents_of_one_version_is_refused_at_the_start(folder):
    put(folder, 2.0, file="other")
    with pytest.raises(ConflictError, match=r"0\.1\.0: expected one card per name and version"):
        following(folder)
    put(folder, 1.0, file="other")  # the same content is no conflict
    assert answers(following(folder)) == 1.0


@requirement("R19.1")
def test_of_several_versions_of_a_name_the_highest_is_followed(folder):
    engine = following(folder)
    first = answers(engine)
    put(folder, 3.0, "0.10.0", file="ten")
    put(folder, 2.0, "0.9.0", file="nine")
    assert answers(engine) == 3 * first
    (folder / "ten.lora.arrow").unlink()
    assert answers(engine) == 2 * first


@requirement("R19.5")
def test_a_second_change_at_the_same_time_by_a_folders_clock_is_seen(folder):
    engine = following(folder)
    now = time.time_ns()
    os.utime(folder, ns=(now, now))
    first = answers(engine)
    put(folder, 2.0, "0.2.0")
    os.utime(folder, ns=(now, now))
    assert answers(engine) == 2 * first


@requirement("R19.5")
def test_a_folder_that_has_not_changed_is_not_read(folder, monkeypatch):
    engine, looks = following(folder), []
    os.utime(folder, (1e9, 1e9))
    answers(engine)
    monkeypatch.setattr(follow, "card_files", looks.append)
    answers(engine)
    assert looks == []


@requirement("R19.5")
@pytest.mark.parametrize("place", ["card_files", "inspect", "load", "encoder"])
def test_what_failed_for_a_while_is_tried_again(folder, monkeypatch, caplog, place):
    engine = following(folder)
    first = answers(engine)
    put(folder, 2.0, "0.2.0")
    os.utime(folder, (1e9, 1e9))

    def fail(*_, **__):
        raise (RuntimeError if place == "encoder" else StoreError)("a", "file", "too many")

    with monkeypatch.context() as patch:
        owner = {"encoder": engine.router, "inspect": catalog}.get(place, follow)
        patch.setattr(owner, "candidate" if place == "encoder" else place, fail)
        engine.encode("ab")
    assert "too many" in caplog.text
    assert answers(engine) == 2 * first


@requirement("R19.5")
def test_a_name_whose_file_now_holds_another_is_forgotten(folder):
    engine = following(folder)
    put(folder, name="law", file="docs")
    assert set(engine.router.candidates) == {"law"}
    assert list(engine.manager.list_cards()) == ["law"]


@requirement("R19.5")
def test_a_folder_that_is_not_there_is_refused_and_one_that_goes_leaves_its_cards(folder, caplog):
    engine = following(folder)
    first = answers(engine)
    folder.rename(folder.with_name("away"))
    assert answers(engine) == first
    assert "not followed" in caplog.text
    with pytest.raises(CardNotFoundError, match="live"):
        engine.follow(folder)
    folder.with_name("away").rename(folder)
    put(folder, 2.0, "0.2.0")
    assert answers(engine) == 2 * first
