"""ArrowEngine: adapters for one call, what it refuses, the router's choice, and snapshots under
concurrent writers.
"""

import copy
import logging
import pickle
import re
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora
from lora import engine as engine_module
from lora.card import AdapterSet, LoRACard, LowRank
from lora.engine import ArrowEngine, Encoding
from lora.errors import (
    ArgumentError,
    BaseModelError,
    CardNotFoundError,
    LoRAError,
    ShapeError,
    StateError,
    TargetError,
    UnboundWarning,
    UnknownCardError,
    UnsupportedModelError,
)
from lora.federation import Policy
from lora.files import save
from lora.models import adapt as adapt_module
from lora.models import manager as manager_module
from lora.models.adapt import adapt, fingerprint
from lora.models.encoder import InferenceCore
from lora.models.layers import LoRALinear
from lora.models.manager import LoRAManager
from lora.models.registry import AdapterRegistry
from lora.models.rows import Rows
from lora.models.twins import Twins
from lora.router import LoRARouter
from lora.routing import Route
from lora.testing.plugin import requirement
from lora.testing.strategies import names
from lora.testing.tolerance import gamma

TEXTS = ["open a file for reading", "", "the quick brown fox", "sort a list of numbers in place"]

TOLERANCE = 1e-5
"""What R5.7 grants two computations with the same weights; between batches of other shapes, or
folded and factored, about 1e-6 is seen on unit vectors.
"""


def strong(core, name, seed, size=0.15, **metadata):
    """A card that turns embeddings far round: rank 4 on every query and value."""
    rng = np.random.default_rng(seed)
    weights = {
        key: LowRank(
            rng.normal(0, size, (module.in_features, 4)).astype(np.float32),
            rng.normal(0, size, (4, module.out_features)).astype(np.float32),
        )
        for key, module in core.named_modules()
        if key.endswith(("query", "value"))
    }
    return LoRACard(name, 4, 8.0, ["query", "value"], weights, metadata)


@pytest.fixture(scope="session")
def core(model_folder):
    return InferenceCore.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def cards(core):
    described = {
        "files": "reading and writing files on disk",
        "sorting": "sorting lists and ordering numbers",
        "foxes": "animals in the forest",
    }
    rows = enumerate(described.items())
    return {name: strong(core, name, seed, description=text) for seed, (name, text) in rows}


@pytest.fixture
def engine(core):
    return ArrowEngine(core)


class Words(nn.Module):
    """An encoder of one's own: the first word's length and the text's, through a Linear. It chokes
    on bombs.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(2, 3)
        self.calls = calls = []
        self.note = lambda texts: calls.append(list(texts))  # an adapted copy has its own list

    def encode(self, texts):
        self.note(texts)
        rows = []
        for text in texts:
            if text == "bomb":
                raise RuntimeError("it went off")
            lengths = [float(len(text.split(" ")[0])), float(len(text))]
            rows.append(self.dense(torch.tensor(lengths)))
        return torch.stack(rows).detach().numpy()


def words_card(name="w", size=1.0, **metadata):
    pair = LowRank(np.full((2, 1), size, np.float32), np.ones((1, 3), np.float32))
    return LoRACard(name, 1, 1.0, ["dense"], {"dense": pair}, metadata)


def state_of(engine):
    """All that a call must leave alone."""
    bits = {name: tensor.clone() for name, tensor in engine.base.state_dict().items()}
    return engine.manager.state, engine.router.candidates, engine.threshold, bits


def assert_unchanged(engine, before):
    state, candidates, threshold, bits = before
    assert engine.manager.state is state
    assert engine.router.candidates is candidates
    assert engine.threshold == threshold
    assert all(torch.equal(bits[name], tensor) for name, tensor in engine.base.state_dict().items())


@requirement("R5.2")
def test_the_engine_owns_a_manager_and_a_router_over_any_encoder(core):
    for encoder in (core, Words()):
        engine = ArrowEngine(encoder)
        assert isinstance(engine.manager, LoRAManager)
        assert isinstance(engine.router, LoRARouter)
        assert engine.base is engine.manager.base is engine.manager.model is encoder


@requirement("R5.4", "R5.6")
def test_without_adapters_the_engine_answers_as_the_encoder_bit_for_bit(core, engine):
    expected = core.encode(TEXTS)
    assert np.array_equal(engine.encode(TEXTS), expected)
    assert np.array_equal(engine.encode_with_lora(TEXTS), expected)
    assert np.array_equal(engine.encode_with_lora(TEXTS, {}), expected)
    assert np.array_equal(engine.encode_with_lora(TEXTS, intent_query="anything"), expected)


@requirement("R5.5")
@pytest.mark.parametrize("fold", [False, True])
def test_with_an_active_card_the_engine_answers_as_the_weights_plus_delta_do(core, cards, fold):
    engine, written = ArrowEngine(core, fold=fold), copy.deepcopy(core)
    engine.manager.apply_card(cards["files"], weight=0.5)
    for name, pair in cards["files"].weights.items():
        linear = written.get_submodule(name)
        delta = 0.5 * pair.scaling * (pair.A.astype(np.float64) @ pair.B).T
        linear.weight.data = (linear.weight.double() + torch.tensor(delta)).float()
    assert np.abs(engine.encode(TEXTS) - written.encode(TEXTS)).max() <= TOLERANCE
    assert np.abs(engine.encode(TEXTS) - core.encode(TEXTS)).max() > 100 * TOLERANCE


@requirement("R5.1", "R5.4")
def test_an_encoding_is_usable_wherever_an_array_is(core, engine, cards):
    engine.register_lora(cards["files"])
    found = engine.encode_with_lora(TEXTS, "files")
    assert isinstance(found, Encoding)
    assert len(found) == len(TEXTS)
    assert np.array_equal(np.array(found), found.embeddings)
    assert np.asarray(found, np.float64).dtype == np.float64
    assert np.array_equal(np.vstack([found, found])[4:], found.embeddings)
    assert found.adapters == (AdapterSet(cards["files"]),) * len(TEXTS)
    assert found.routes == ()
    assert found.embeddings.dtype == np.float32


@requirement("R5.1", "R5.8")
@pytest.mark.parametrize("fold", [False, True, "auto"])
def test_adapters_of_a_call_replace_what_is_active_for_that_call_alone(core, cards, fold):
    engine = ArrowEngine(core, fold=fold)
    engine.manager.apply_card(cards["files"])
    engine.register_lora(cards["sorting"])
    before, active = state_of(engine), engine.encode(TEXTS)
    only = adapt(core, cards["sorting"]).encode(TEXTS)
    both = adapt(core, [cards["files"], cards["sorting"]]).encode(TEXTS)
    half = adapt(core, AdapterSet({"sorting": (cards["sorting"], 0.5)})).encode(TEXTS)
    unknown = strong(core, "never registered", 9)
    for choice, expected in [
        ("sorting", only),
        (("sorting",), only),
        ({"files", "sorting"}, both),
        ({"sorting": 0.5}, half),
        (AdapterSet(cards["sorting"]), only),
        (cards["sorting"], only),
        (unknown, adapt(core, unknown).encode(TEXTS)),
        ({}, core.encode(TEXTS)),
        ((), core.encode(TEXTS)),
        (None, active),
    ]:
        found = engine.encode_with_lora(TEXTS, choice)
        assert np.abs(found.embeddings - expected).max() <= TOLERANCE
        assert_unchanged(engine, before)
    assert np.array_equal(engine.encode(TEXTS), active)
    assert np.abs(only - active).max() > 100 * TOLERANCE


@requirement("R5.8")
def test_each_text_of_a_call_gets_its_own_adapters(core, engine, cards):
    for card in cards.values():
        engine.register_lora(card)
    engine.manager.apply_card(cards["files"])
    choices = ["sorting", None, {}, {"files": 0.5, "foxes": -1}]
    choices += ["sorting", cards["foxes"], ["files", "sorting"], {}]
    texts = [*TEXTS, *TEXTS[::-1]]
    before = state_of(engine)
    found = engine.encode_with_lora(texts, choices)
    assert_unchanged(engine, before)
    for row, (text, choice) in enumerate(zip(texts, choices, strict=True)):
        alone_choice = tuple(choice) if isinstance(choice, list) else choice
        alone = engine.encode_with_lora([text], alone_choice)
        assert np.abs(found.embeddings[row] - alone.embeddings[0]).max() <= TOLERANCE
        assert found.adapters[row] == alone.adapters[0]
    assert engine.encode_with_lora([], []).embeddings.shape == (0, 384)


@requirement("R5.8", "R5.10")
def test_an_encoder_without_rows_runs_once_for_each_distinct_set(caplog):
    words = Words()
    engine = ArrowEngine(words)
    engine.register_lora(words_card("w", description="words"))
    words.calls.clear()
    texts = ["a", "bb c", "ccc", "a", "eeeee f"]
    found = engine.encode_with_lora(texts, ["w", {}, {"w": 1.0}, None, {"w": 2.0}])
    assert words.calls[-3:] == [["a", "ccc"], ["bb c", "a"], ["eeeee f"]]
    assert "Words runs once for each adapter set" in caplog.text
    tried, _ = len(words.calls), engine.encode_with_lora(texts, [{"w": 3.0}, *"www", {}])
    assert len(words.calls) == tried + 3  # and is tried once
    for row, choice in enumerate(["w", {}, "w", {}, {"w": 2.0}]):
        alone = engine.encode_with_lora([texts[row]], choice)
        assert np.allclose(found.embeddings[row], alone, rtol=0, atol=TOLERANCE)
    assert len(engine.encode_with_lora([], [])) == 0


@requirement("R5.1")
@pytest.mark.parametrize(
    ("adapters", "options", "error"),
    [
        ("nobody", {}, UnknownCardError),
        (["w", "nobody"], {}, UnknownCardError),
        ({"w": float("nan")}, {}, LoRAError),
        (["w"], {}, ShapeError),
        (["w"] * 3, {}, ShapeError),
        (5, {}, ArgumentError),
        ([["w"], 5], {}, ArgumentError),
        ([["w"], [["w"]]], {}, ArgumentError),
        ("w", {"intent_query": "words"}, ArgumentError),
        ({}, {"intent_query": "words"}, ArgumentError),
        (None, {"intent_query": 5}, ArgumentError),
        (None, {"intent_query": "words", "top_k": 0}, ArgumentError),
        (None, {"intent_query": "words", "tags": "words"}, ArgumentError),
        (
            LoRACard(
                "wide", 1, 1.0, ["dense"], {"dense": LowRank(np.ones((9, 1)), np.ones((1, 3)))}
            ),
            {},
            ShapeError,
        ),
    ],
)
def test_a_call_that_is_refused_leaves_the_engine_as_it_was(adapters, options, error):
    engine = ArrowEngine(Words())
    engine.manager.apply_card(words_card("active", 0.5))
    engine.register_lora(words_card("w", description="words"))
    before = state_of(engine)
    with pytest.raises(error) as caught:
        engine.encode_with_lora(["a b", "c"], adapters, **options)
    assert isinstance(caught.value, LoRAError)
    assert_unchanged(engine, before)


@requirement("R5.1")
@pytest.mark.parametrize("adapters", [None, {}, "w", ["w", "w"], ["w", {}], [{}, "w"]])
@pytest.mark.parametrize("texts", [["a", "bomb"], ["bomb", "a"]])
def test_an_encoder_that_fails_half_way_leaves_the_engine_as_it_was(adapters, texts):
    engine = ArrowEngine(Words())
    engine.manager.apply_card(words_card("active", 0.5))
    engine.register_lora(words_card("w"), "words")
    before, expected = state_of(engine), engine.encode(["a", "b"])
    with pytest.raises(RuntimeError, match="it went off"):
        engine.encode_with_lora(texts, adapters)
    assert_unchanged(engine, before)
    assert np.array_equal(engine.encode(["a", "b"]), expected)


@requirement("R5.1")
def test_an_adapter_that_is_not_known_is_named_with_those_that_are(engine, cards):
    engine.register_lora(cards["files"])
    expected = r"adapter 'nobody': expected one of \['files'\], found none"
    with pytest.raises(UnknownCardError, match=expected) as caught:
        engine.encode_with_lora(TEXTS, ["files", {}, {"nobody": 1.0}, None])
    assert isinstance(caught.value, KeyError)


@requirement("R5.1")
@pytest.mark.parametrize("texts", [["a", 1], [None], 5, None, {"a", "b"}, {"a": 1}, iter(["a"])])
def test_what_is_no_sequence_of_texts_is_refused(engine, texts):
    each = lambda texts: engine.encode_with_lora(texts, [{}, {}])  # noqa: E731
    for call in (engine.encode, engine.encode_with_lora, each):
        with pytest.raises(ArgumentError, match="texts: expected a sequence of str, found"):
            call(texts)


@requirement("R5.15", "R5.11")
@pytest.mark.parametrize(
    ("option", "value"),
    [("fold", "x"), ("fold", None), *(("threshold", bad) for bad in ("high", float("nan")))],
)
def test_an_option_out_of_range_is_refused_at_once(core, engine, option, value):
    with pytest.raises(ArgumentError, match=f"{option}: expected"):
        ArrowEngine(core, **{option: value})
    if option == "threshold":
        with pytest.raises(ArgumentError, match="threshold: expected"):
            engine.threshold = value
        assert engine.threshold is None


@pytest.fixture
def words_file(tmp_path):
    save(words_card(description="words"), tmp_path / "w.lora.arrow")
    return tmp_path / "w.lora.arrow"


def writes(engine, path):
    """Every change of an engine, with how often it replaces the state, in an order that can be."""
    manager, router = engine.manager, engine.router
    other, twice = words_card("other"), words_card("w", 2.0)
    yield "load_lora", lambda: engine.load_lora(path)
    yield "replace_card", lambda: manager.replace_card(twice)
    yield "set_weight", lambda: manager.set_weight("w", 0.5)
    yield "remove_lora", lambda: engine.remove_lora("w")
    yield "register_lora", lambda: engine.register_lora(twice, "words")
    yield "unregister", lambda: router.unregister("w")
    yield "register_card", lambda: router.register_card(twice, "words")
    yield "apply_card", lambda: manager.apply_card(other)
    yield "remove_card", lambda: manager.remove_card("other")
    yield "add_card", lambda: manager.add_card(other)
    yield "unload_card", lambda: manager.unload_card("other")
    yield "prepare", lambda: manager.prepare(other)
    yield "swap", manager.swap
    yield "rollback", manager.rollback
    yield "threshold", lambda: setattr(engine, "threshold", 0.5)


@requirement("R3.10", "R5.3", "R22.1")
def test_every_change_of_an_engine_is_one_assignment(words_file, assignments):
    engine = ArrowEngine(Words())
    for name, write in writes(engine, words_file):
        with assignments() as assigned:
            write()
        assert assigned == [engine.state], name
    assert engine.manager.reference is engine.router.reference is engine.reference


@requirement("R3.10", "R5.3")
@pytest.mark.parametrize("kind", ["Filter", "Handler"])
def test_a_logging_filter_or_handler_that_raises_changes_nothing(words_file, caplog, kind):
    caplog.set_level(logging.INFO, "lora")
    quiet, noisy = ArrowEngine(Words()), ArrowEngine(Words())
    loggers = [logging.getLogger(name) for name in ("lora.engine", "lora.models.manager")]

    class Handler(logging.Handler):
        def handle(self, record):
            raise RuntimeError(record.getMessage())

    refuse = {"Handler": Handler(), "Filter": Handler().handle}[kind]

    pairs = zip(writes(quiet, words_file), writes(noisy, words_file), strict=True)
    for (name, write), (_, write_noisily) in pairs:
        write()
        for logger in loggers:
            getattr(logger, f"add{kind}")(refuse)
        try:
            write_noisily()
        finally:
            for logger in loggers:
                getattr(logger, f"remove{kind}")(refuse)
        assert noisy.manager.active == quiet.manager.active, name
        assert noisy.manager.list_cards() == quiet.manager.list_cards(), name
        assert noisy.router.candidates.keys() == quiet.router.candidates.keys(), name


@requirement("R3.10", "R3.12")
@pytest.mark.parametrize("fold", [False, True])
def test_loading_plans_once_and_walks_the_model_twice(core, cards, fold, tmp_path, monkeypatch):
    """Once to bind the card, once to build the model; one set, and one copy of each module."""
    save(cards["files"], tmp_path / "f.lora.arrow")
    engine, calls = ArrowEngine(core, fold=fold), Counter()

    def counted(owner, name, walk=None):
        function = getattr(owner, name)

        def call(*arguments, **options):
            calls[name] += walk is None or walk(*arguments, **options)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    outermost = lambda module, memo=None, *_, **options: memo is None  # noqa: E731
    counted(nn.Module, "named_modules", outermost)
    for name in ("_rewrite", "plan", "build"):
        counted(adapt_module, name)
    counted(Twins, "fill")
    counted(AdapterSet, "__init__")
    monkeypatch.setattr(manager_module, "build", adapt_module.build)
    engine.load_lora(tmp_path / "f.lora.arrow")
    modules = calls.pop("fill")
    assert calls == {"named_modules": 1, "_rewrite": 1, "plan": 1, "build": 1, "__init__": 1}
    assert modules == len(list(core.modules()))


@requirement("R5.3")
def test_a_card_file_is_loaded_applied_described_and_removed(core, engine, cards, tmp_path):
    save(cards["files"], tmp_path / "f.lora.arrow")
    expected = core.encode(TEXTS)
    assert engine.load_lora(str(tmp_path / "f.lora.arrow"), weight=0.5) == "files"
    assert engine.manager.active.weight("files") == 0.5
    engine.remove_lora("files")
    assert engine.load_lora(tmp_path / "f.lora.arrow") == "files"
    assert engine.manager.active == AdapterSet(cards["files"])
    assert list(engine.router.candidates) == ["files"]
    adapted = adapt(core, cards["files"]).encode(TEXTS)
    assert np.abs(engine.encode(TEXTS) - adapted).max() <= TOLERANCE
    engine.remove_lora("files")
    engine.remove_lora("files")
    assert not engine.manager.active
    assert not engine.manager.list_cards()
    assert not engine.router.candidates
    assert np.array_equal(engine.encode(TEXTS), expected)


@requirement("R5.3")
def test_a_card_that_says_nothing_of_itself_is_not_routed_to(core, engine, tmp_path):
    save(strong(core, "silent", 5), tmp_path / "s.lora.arrow")
    engine.load_lora(tmp_path / "s.lora.arrow")
    assert not engine.router.candidates
    assert list(engine.manager.active) == ["silent"]


@requirement("R5.3", "R5.1")
def test_a_load_that_fails_leaves_the_engine_as_it_was(tmp_path):
    engine = ArrowEngine(Words())
    engine.manager.apply_card(words_card("active", 0.5))
    engine.register_lora(words_card("known"), "a known card")
    wide = LowRank(np.ones((9, 1)), np.ones((1, 3)))
    files = {
        "a new one of the wrong shape": LoRACard("new", 1, 1.0, ["dense"], {"dense": wide}),
        "a known one of the wrong shape": LoRACard("known", 1, 1.0, ["dense"], {"dense": wide}),
        "an active one with other content": words_card("active", 0.75),
        "a new one that is described by a number": words_card("new", description=5),
        "a known one that is described by a number": words_card("known", 2, description=5),
        "one for another base": LoRACard(
            "new", 1, 1.0, ["dense"], words_card().weights, {}, base_fingerprint="0" * 64
        ),
    }
    for what, card in files.items():
        path = tmp_path / f"{what}.lora.arrow"
        save(card, path)
        active, known = engine.manager.state.active, engine.manager.list_cards()
        candidates, expected = engine.router.candidates, engine.encode(["a b"])
        with pytest.raises(LoRAError):
            engine.load_lora(path)
        assert engine.manager.active == active.adapters, what
        assert engine.manager.list_cards() == known, what
        assert engine.router.candidates == candidates, what
        assert np.array_equal(engine.encode(["a b"]), expected), what
    with pytest.raises(CardNotFoundError, match="missing"):
        engine.load_lora(tmp_path / "missing.lora.arrow")


@requirement("R5.3")
def test_a_card_for_another_base_is_refused_unless_waived(core, cards):
    card = LoRACard("card", 4, 8.0, ["query", "value"], cards["files"].weights)
    other = replace(card, name="other", base_fingerprint="0" * 64)
    right = replace(card, name="right", base_fingerprint=fingerprint(core, cards["files"]))
    engine, waiving = ArrowEngine(core), ArrowEngine(core, check_base=False)
    waived = waiving.encode_with_lora(TEXTS, other)
    assert np.array_equal(engine.encode_with_lora(TEXTS, right), waived)
    for choice in (other, [{}, other, None, {}]):
        waiving.encode_with_lora(TEXTS, choice)
        with pytest.raises(BaseModelError):
            engine.encode_with_lora(TEXTS, choice)


@requirement("R5.8", "R1.13")
@pytest.mark.parametrize("choices", [[None, "foxes"], ["other", "foxes"], ["other", {"other": 2}]])
def test_a_waived_card_stays_waived_beside_other_sets_while_it_is_active(core, cards, choices):
    other = replace(cards["files"], name="other", base_fingerprint="0" * 64)
    engine, waiving = ArrowEngine(core), ArrowEngine(core, check_base=False)
    for each in (engine, waiving):
        each.register_lora(cards["foxes"])
        each.manager.apply_card(other, check_base=False)
    expected = waiving.encode_with_lora(TEXTS[:2], choices)
    assert np.array_equal(engine.encode_with_lora(TEXTS[:2], choices), expected)
    engine.remove_lora("other")
    with pytest.raises(BaseModelError):
        engine.encode_with_lora(TEXTS[:2], [other, "foxes"])


@requirement("R5.11")
def test_the_router_picks_adapters_that_fit_and_the_result_says_so(core, engine, cards):
    for card in cards.values():
        engine.register_lora(card)
    engine.manager.apply_card(cards["foxes"])
    before = state_of(engine)
    found = engine.encode_with_lora(TEXTS, intent_query="how do I read a file from the disk?")
    assert [route.name for route in found.routes] == ["files"]
    assert found.routes[0].score >= found.threshold == 0.3
    assert found.adapters == (AdapterSet(cards["files"]),) * len(TEXTS)
    assert np.abs(found.embeddings - adapt(core, cards["files"]).encode(TEXTS)).max() <= TOLERANCE
    assert_unchanged(engine, before)


@requirement("R5.11")
def test_the_router_may_pick_several_and_by_tags(core, cards):
    engine = ArrowEngine(core, threshold=-1.0)
    for card in cards.values():
        engine.register_lora(card)
    query = "read numbers from a file and sort them"
    found = engine.encode_with_lora(TEXTS, intent_query=query, top_k=2)
    assert list(found.routes) == engine.router.select(query, 2, -1.0)
    assert {route.name for route in found.routes} == {"files", "sorting"}
    assert found.adapters[0] == AdapterSet([cards["files"], cards["sorting"]])
    engine.router.register_card(cards["foxes"], tags=["animals"])
    tagged = engine.encode_with_lora(TEXTS, intent_query=query, tags=["animals"])
    assert tagged.adapters[0] == AdapterSet(cards["foxes"])


@requirement("R5.11")
def test_the_base_answers_when_the_router_abstains(core, engine, cards):
    for card in cards.values():
        engine.register_lora(card)
    engine.manager.apply_card(cards["foxes"])
    found = engine.encode_with_lora(TEXTS, intent_query="the price of tea in medieval Lisbon")
    assert found.routes == ()
    assert found.adapters == (AdapterSet(),) * len(TEXTS)
    assert np.array_equal(found.embeddings, core.encode(TEXTS))
    (best,) = engine.router.select("the price of tea in medieval Lisbon")
    assert (found.best, found.threshold) == (best, 0.3)
    assert best.score < found.threshold
    assert engine.metrics.snapshot()["abstentions"] == 1


@requirement("R5.11")
def test_a_card_of_which_only_the_description_is_here_is_refused_by_name(engine):
    engine.router.register_virtual_candidate("far", "reading files")
    expected = r"candidate 'far': .* loaded here, found a virtual one; load it"
    with pytest.raises(UnknownCardError, match=expected):
        engine.encode_with_lora(TEXTS, intent_query="reading files")


@requirement("R4.14")
@pytest.mark.parametrize("fold", [False, True])
def test_active_cards_move_no_score_and_no_threshold(core, cards, fold):
    engine = ArrowEngine(core, fold=fold)
    for card in cards.values():
        engine.register_lora(card)
    queries = ["read a file", "sort numbers", "a fox in the woods", ""]
    before = engine.router.select_many(queries, 3)
    embedded = engine.encode(queries)
    for card in cards.values():
        engine.manager.apply_card(card)
    assert np.abs(engine.encode(queries) - embedded).max() > 100 * TOLERANCE
    assert engine.router.select_many(queries, 3) == before
    for card in cards.values():  # described again while all are active
        engine.router.register_card(card)
    assert engine.router.select_many(queries, 3) == before
    assert all(isinstance(route, Route) for routes in before for route in routes)


@requirement("R5.10")
def test_any_module_with_an_encode_method_runs():
    words = Words()
    engine = ArrowEngine(words)
    expected = words.encode(["a b", "ccc"])
    assert np.array_equal(engine.encode(["a b", "ccc"]), expected)
    engine.manager.apply_card(words_card(size=2.0))
    x = np.array([[1, 3], [3, 3]], np.float32)
    adapted = expected + 2 * x.sum(1, keepdims=True)
    assert np.allclose(engine.encode(["a b", "ccc"]), adapted, rtol=gamma(8, x.dtype))
    assert np.array_equal(words.encode(["a b", "ccc"]), expected)


class Returning(nn.Module):
    """An encoder that gives what it is told to."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def encode(self, texts):
        return self.rows


ROWS = [torch.tensor([[1.0, 2.0]]), np.array([[1.0, 2.0]]), [[1, 2]], [torch.tensor([1.0, 2.0])]]


@requirement("R5.10")
@pytest.mark.parametrize("rows", [*ROWS, ROWS[0].bfloat16()])
def test_embeddings_of_any_kind_come_out_as_float32_arrays(rows):
    found = ArrowEngine(Returning(rows)).encode(["a"])
    assert found.dtype == np.float32
    assert found.tolist() == [[1.0, 2.0]]


@requirement("R5.10")
@pytest.mark.parametrize("make", [np.zeros, np.ones, torch.zeros])
@pytest.mark.parametrize("shape", [3, (2, 3), (), (1, 1, 2), (1, 0)])
def test_an_encoder_that_gives_no_row_for_each_text_is_refused(make, shape):
    with pytest.raises(ShapeError, match=r"encoder: expected embeddings \(1, d\), found shape"):
        ArrowEngine(Returning(make(shape))).encode(["a"])


@requirement("R5.10", "R7.8")
@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_embeddings_that_are_no_numbers_are_refused(number):
    with pytest.raises(UnsupportedModelError, match=r"encoder: expected finite .*of a card may be"):
        ArrowEngine(Returning(np.array([[1.0, number]]))).encode(["a"])


@requirement("R5.10")
@pytest.mark.parametrize("encoder", [nn.Linear(2, 2), "a name", None, len])
def test_what_can_not_encode_is_refused(encoder):
    expected = r"encoder: expected a torch module with encode\(texts\)"
    with pytest.raises(ArgumentError, match=expected):
        ArrowEngine(encoder)


@requirement("R5.15")
def test_auto_takes_cuda_if_it_is_there_and_says_which(core, caplog):
    with caplog.at_level(logging.INFO, "lora.engine"):
        engine = ArrowEngine(core, device="auto")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"running on {expected}" in caplog.messages
    assert engine.base.device.type == expected
    assert (engine.base is core) == (expected == core.device.type)


@requirement("R5.15")
@pytest.mark.parametrize("there", [False, True])
def test_auto_asks_whether_there_is_cuda(core, monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    stand_ins = {"cuda": torch.zeros(0, device="meta"), "cpu": torch.zeros(0)}
    monkeypatch.setattr(torch, "empty", lambda *_, device: stand_ins[device])
    assert (ArrowEngine(core, device="auto").base is core) != there


@requirement("R2.12")
@pytest.mark.parametrize(("budget", "kind"), [(12 * 384 * 384 * 4, nn.Linear), (2**20, LoRALinear)])
def test_a_set_over_the_budget_is_not_folded(core, cards, monkeypatch, budget, kind):
    monkeypatch.setattr(engine_module, "FOLD_BUDGET", budget)
    engine = ArrowEngine(core)
    engine.manager.apply_card(cards["files"])
    layers = [engine.manager.model.get_submodule(name) for name in engine.manager.injected]
    assert all(isinstance(layer, kind) for layer in layers)
    assert any(isinstance(layer, LoRALinear) for layer in layers) == (kind is LoRALinear)


@requirement("R5.9", "R5.11")
def test_a_request_by_intent_takes_description_and_card_from_one_state():
    """The card and its description are replaced while the query is embedded."""
    words = Words()
    engine, old = ArrowEngine(words), words_card("w", 1.0)
    engine.register_lora(old, "words")

    def note(texts):
        words.note = lambda texts: None
        engine.register_lora(words_card("w", 3.0), "x")

    words.note = note
    found = engine.encode_with_lora(["a"], intent_query="words")
    assert [route.name for route in found.routes] == ["w"]
    assert found.adapters == (AdapterSet(old),)


@requirement("R5.8")
def test_rows_with_adapters_of_their_own_run_in_one_forward(core, engine, cards, monkeypatch):
    forward, segments, runs = InferenceCore.forward, Rows.segments, []

    def noted(*args):
        runs.append("forward")
        return forward(*args)

    monkeypatch.setattr(InferenceCore, "forward", noted)
    monkeypatch.setattr(Rows, "segments", lambda *args: (runs.append(segments(*args)), runs[-1])[1])
    engine.encode_with_lora([*"abcd"], [cards["files"], {}, cards["foxes"], cards["files"]])
    (first, groups), others = runs[:2], runs[2:]
    assert (first, len(groups)) == ("forward", 3)
    assert others
    assert all(other is groups for other in others)  # found once, used by every layer


def tensors(module):
    return [*module.parameters(), *module.buffers()]


@requirement("R5.15")
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_all_tensors_of_a_snapshot_live_on_one_device(core, cards, monkeypatch, device, fold):
    """Every machine has the device meta, which computes nothing."""
    monkeypatch.setattr(adapt_module, "_check_loaded", lambda *_: None)  # it refuses meta tensors
    engine = ArrowEngine(core, device=device, fold=fold)
    assert (engine.base is core) == (device == "cpu")
    engine.manager.apply_card(cards["files"])
    engine.manager.apply_card(cards["sorting"], weight=0.5)
    assert any(isinstance(module, LoRALinear) for module in engine.manager.model.modules()) != fold
    assert {tensor.device.type for tensor in tensors(engine.manager.model)} == {device}
    assert {tensor.device.type for tensor in tensors(core)} == {"cpu"}


@requirement("R5.15")
@pytest.mark.parametrize("device", ["nowhere", 5.5, "cuda:99", "mps"])
def test_a_device_that_is_none_is_refused(core, device):
    with pytest.raises(ArgumentError, match=f"device: .*{re.escape(str(device))}"):
        ArrowEngine(core, device=device)


def nearest(found, states):
    """The one state that a result is within tolerance of, all others being a hundred tolerances
    away; else None.
    """
    distances = {name: float(np.abs(found - expected).max()) for name, expected in states.items()}
    best, *others = sorted(distances, key=distances.get)
    far = all(distances[other] >= 100 * TOLERANCE for other in others)
    return best if far and distances[best] <= TOLERANCE else None


class Readers:
    """Threads that encode until they are stopped, and say which state each result was of."""

    def __init__(self, engine, sets, count):
        self.engine, self.sets, self.texts = engine, sets, ["open a file", "a fox", "sort"]
        self.states = {
            name: (adapt(engine.base, adapters) if adapters else engine.base).encode(self.texts)
            for name, adapters in sets.items()
        }
        self.seen, self.failures, self.stop = [], [], threading.Event()
        reads = [self.active, self.reported, self.mixed]
        reads = [reads[n % len(reads)] for n in range(count)]
        self.threads = [threading.Thread(target=self.run, args=(read,)) for read in reads]

    def run(self, read):
        try:
            while not self.stop.is_set():
                self.seen.append(read())
        except BaseException as error:  # noqa: BLE001 - a thread's failure is the test's
            self.failures.append(error)

    def active(self):
        return nearest(self.engine.encode(self.texts), self.states)

    def reported(self):
        """The report names the state that the embeddings are of."""
        found = self.engine.encode_with_lora(self.texts)
        state = nearest(found.embeddings, self.states)
        return state if state and set(found.adapters) == {self.sets[state]} else None

    def mixed(self):
        """Two rows of what is active and one of the base."""
        found = self.engine.encode_with_lora(self.texts, [None, {}, None]).embeddings
        state = nearest(found[[0, 2]], {name: rows[[0, 2]] for name, rows in self.states.items()})
        return state if np.abs(found[1] - self.states["none"][1]).max() <= TOLERANCE else None

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()


@requirement("R5.9")
def test_every_result_under_a_busy_writer_is_that_of_exactly_one_state(core, cards):
    """Three seconds of one writer that applies, replaces, swaps, rolls back and removes, and eight
    readers.
    """
    files, sorting = cards["files"], cards["sorting"]
    other = strong(core, "files", 77)
    sets = {
        "none": AdapterSet(),
        "files": AdapterSet(files),
        "files and sorting": AdapterSet([files, sorting]),
        "other files and sorting": AdapterSet([other, sorting]),
        "sorting": AdapterSet(sorting),
        "half foxes": AdapterSet({"foxes": (cards["foxes"], 0.5)}),
    }
    engine = ArrowEngine(core, fold=True)
    manager, readers = engine.manager, Readers(engine, sets, 8)
    assert [nearest(rows, readers.states) for rows in readers.states.values()] == list(sets)
    steps = [
        lambda: manager.apply_card(files),
        lambda: manager.apply_card(sorting),
        lambda: manager.replace_card(other),
        lambda: manager.prepare(sets["half foxes"]),
        manager.swap,
        manager.rollback,
        lambda: manager.remove_card("files"),
        lambda: manager.remove_card("sorting"),
    ]
    with readers:
        end, rounds = time.monotonic() + 3, 0
        while (time.monotonic() < end or rounds < 2) and not readers.failures:
            for step in steps:
                step()
                enough = len(readers.seen)
                if rounds % 2:  # every other round takes its time
                    enough += 2 * len(readers.threads)
                while len(readers.seen) < enough and not readers.failures:
                    time.sleep(0.001)
            rounds += 1
    assert not readers.failures
    assert set(readers.seen) == set(sets)  # each state was seen, and nothing but states


@requirement("R5.9", "R5.11")
def test_a_card_that_comes_and_goes_while_requests_are_routed_is_used_or_not_but_never_an_error():
    card = words_card("w")
    encoder = Returning(np.ones((1, 2)))  # quick, so that much happens between two looks
    encoder.dense = nn.Linear(2, 3)
    engine = ArrowEngine(encoder)
    wrong, stop, interval = [], threading.Event(), sys.getswitchinterval()

    def read():
        try:
            while not stop.is_set():
                found = engine.encode_with_lora(["a"], intent_query="words")
                expected = AdapterSet(card) if found.routes else AdapterSet()
                if found.adapters != (expected,):
                    wrong.append(found)
        except BaseException as error:  # noqa: BLE001 - a thread's failure is the test's
            wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for reader in readers:
            reader.start()
        end = time.monotonic() + 1.5
        while time.monotonic() < end and not wrong:
            engine.register_lora(card, "words")
            engine.remove_lora("w")
    finally:
        stop.set()
        for reader in readers:
            reader.join()
        sys.setswitchinterval(interval)
    assert wrong == []


@requirement("R5.9")
def test_one_request_takes_all_its_cards_from_one_state():
    """Cards are replaced while a request is at work: its rows and its report still agree."""
    engine = ArrowEngine(Words())
    old, new = words_card("w", 1.0), words_card("w", 3.0)
    engine.manager.apply_card(old)
    expected = engine.encode_with_lora(["a", "b"], "w").embeddings

    class Swapping(list):
        def __iter__(self):
            for item in super().__iter__():
                yield item
                if engine.manager.active == AdapterSet(old):
                    engine.manager.replace_card(new)

    found = engine.encode_with_lora(["a", "b"], Swapping(["w", "w"]))
    assert found.adapters == (AdapterSet(old),) * 2
    assert np.allclose(found.embeddings, expected, rtol=0, atol=TOLERANCE)
    assert lora.AdapterSet(engine.manager.active) == AdapterSet(new)


def lost_card(name="lost", modules=("elsewhere",), **metadata):
    pair = words_card().weights["dense"]
    return LoRACard(name, 1, 1.0, modules, dict.fromkeys(modules, pair), metadata)


@requirement("R3.12", "R5.1", "R5.11", "R5.3")
def test_a_card_that_binds_nothing_is_refused_wherever_it_is_asked_for(tmp_path):
    engine, lost = ArrowEngine(Words()), lost_card(description="words")
    engine.manager.add_card(lost)
    engine.router.register_card(lost)
    engine.register_lora(words_card("w"), "x")
    save(lost, tmp_path / "lost.lora.arrow")
    state = engine.state
    for call in (
        lambda: engine.encode_with_lora(["a"], lost),
        lambda: engine.encode_with_lora(["a"], "lost"),
        lambda: engine.encode_with_lora(["a", "b"], ["w", "lost"]),
        lambda: engine.encode_with_lora(["a"], ["lost"]),
        lambda: engine.encode_with_lora(["a"], intent_query="words"),
        lambda: engine.load_lora(tmp_path / "lost.lora.arrow"),
        lambda: engine.register_lora(lost),
        lambda: fingerprint(engine.base, lost),
    ):
        with pytest.raises(TargetError, match=r"card 'lost': .* the Linears of the model are"):
            call()
        assert engine.state is state


@requirement("R3.12", "R5.1", "R7.3")
def test_a_card_that_binds_in_part_warns_once_and_each_result_says_so(core, cards, tmp_path):
    half = lost_card("half", ("dense", "elsewhere"))
    left = "targets not found: 'elsewhere'; weights not used: 'elsewhere'"
    engine = ArrowEngine(Words())
    engine.manager.add_card(half)
    results = []
    for choice in ("half", ["half", {}]):  # each has a model of its own
        with pytest.warns(UnboundWarning, match=left) as caught:
            results += [engine.encode_with_lora(["a", "b"], choice) for _ in range(2)]
        assert len(caught) == 1
    save(half, tmp_path / "half.lora.arrow")
    with pytest.raises(TargetError, match=left):
        engine.load_lora(tmp_path / "half.lora.arrow", strict=True)
    with pytest.warns(UnboundWarning, match=left) as caught:
        engine.load_lora(tmp_path / "half.lora.arrow")
    assert len(caught) == 1
    with pytest.raises(TargetError, match=left):  # it is active by now
        engine.load_lora(tmp_path / "half.lora.arrow", strict=True)
    results.append(engine.encode_with_lora(["a", "b"]))
    assert [dict(result.unbound) for result in results] == [{"half": left}] * 5
    assert engine.encode_with_lora(["a"], {}).unbound == {}
    key = "encoder.layer.0.attention.self.query"
    pair = cards["files"].weights[key]
    row = LoRACard("row", 4, 8.0, ["query", "no"], {key: pair})
    with pytest.warns(UnboundWarning, match="'no'"):
        found = ArrowEngine(core).encode_with_lora(["a", "b"], [row, {}])
    assert dict(found.unbound) == {"row": "targets not found: 'no'"}


class Own(Words):
    """An encoder with a keyword of its own."""

    def encode(self, texts, prompt="", normalize_embeddings=False):
        rows = super().encode([prompt + text for text in texts])
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / lengths if normalize_embeddings else rows


@requirement("R5.4")
def test_encode_takes_a_text_and_the_encoders_own_keywords():
    own = Own()
    engine, expected = ArrowEngine(own), own.encode(["q: a", "q: bb"], normalize_embeddings=True)
    options = {"prompt": "q: ", "normalize_embeddings": True}
    assert np.array_equal(engine.encode(["a", "bb"], **options), expected)
    assert np.array_equal(engine.encode("bb", **options), own.encode(["q: bb"], "", True)[0])
    assert engine.encode("bb").shape == (3,)
    with pytest.raises(ArgumentError, match=r"keywords of Own\.encode.*'unknown'"):
        engine.encode(["a"], unknown=1)


@requirement("R5.16")
def test_an_engine_counts_and_times_what_it_does(words_file, tmp_path):
    engine = ArrowEngine(Words())
    engine.load_lora(words_file)
    engine.manager.replace_card(words_card("w", 2.0, description="words"))
    engine.encode_with_lora(["a"], intent_query="words")
    engine.threshold = 1.0
    engine.router.unregister("w")
    engine.encode_with_lora(["a"], intent_query="words")
    for path in (words_file, tmp_path / "none"):
        with pytest.raises(LoRAError):
            engine.load_lora(path)
    figures = engine.metrics.snapshot()
    counts = {name: value for name, value in figures.items() if not name.endswith("_seconds")}
    assert counts == {
        "loads": 3,
        "loads_failed": 1,
        "applies": 3,
        "applies_failed": 1,
        "routes": 2,
        "abstentions": 1,
        "refusals_ConflictError": 1,
        "refusals_CardNotFoundError": 1,
    }
    assert all(figures[f"{name}_seconds"] > 0 for name in ("loads", "applies", "routes"))


@requirement("R3.8", "R5.3")
def test_what_an_engine_loads_and_removes_is_logged_with_numbers(words_file, caplog):
    caplog.set_level(logging.INFO, "lora")
    engine = ArrowEngine(Words())
    engine.load_lora(words_file)
    engine.remove_lora("w")
    engine.register_lora(words_card("v"), "x")
    assert caplog.messages == [
        "applied card 'w': 1 layers",
        "loaded card 'w': 1 modules, rank 1",
        "removed card 'w': 1 layers",
        "card 'w' is forgotten; 0 are known",
        "loaded card 'v': 1 modules, rank 1",
    ]


@requirement("R14.2", "R5.3")
def test_a_card_of_another_base_by_name_is_loaded_with_a_warning(core, cards, tmp_path):
    weights = cards["files"].weights
    engine = ArrowEngine(core, base_model="sentence-transformers/all-MiniLM-L6-v2")

    def load_named(name, **options):
        card = LoRACard("c", 4, 8.0, ["query", "value"], weights, base_model=name, **options)
        engine.remove_lora("c")
        save(card, tmp_path / "c.lora.arrow")
        engine.load_lora(tmp_path / "c.lora.arrow")

    load_named("models/all-MiniLM-L6-v2")  # warnings are errors here
    load_named("another", base_fingerprint=fingerprint(core, cards["files"]))
    with pytest.warns(UserWarning, match=r"card 'c' was made for 'org/another'; this engine runs"):
        load_named("org/another")
    assert list(engine.manager.active) == ["c"]


@requirement("R5.13", "R5.16")
def test_two_engines_share_the_card_files_that_one_has_loaded(words_file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lora.engine")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    giving, taking = ArrowEngine(Words()), ArrowEngine(Words())
    giving.load_lora(words_file)
    giving.register_lora(words_card("in memory"), "a card without a file")
    try:
        giving.start_federation(port, [], share=True, cache=tmp_path / "a")
        trusting = Policy(allow_unsigned=True)
        taking.start_federation(0, [f"127.0.0.1:{port}"], cache=tmp_path / "b", policy=trusting)
        assert giving.node.server.port == port
        assert taking.node.server is None
        assert "federation: only fetches (root= or share=True serves cards)" in caplog.messages
        end = time.monotonic() + 10
        while not taking.node.peers() and time.monotonic() < end:
            time.sleep(0.01)
        assert taking.sync_remote_skills() == ("w",)
        found = taking.encode_with_lora(["a b"], intent_query="words")
        assert [route.name for route in found.routes] == ["w"]
        assert np.allclose(found, giving.encode(["a b"]), rtol=0, atol=TOLERANCE)
        assert taking.metrics.snapshot()["fetches"] == 1
        giving.remove_lora("w")
        assert taking.sync_remote_skills() == ()
    finally:
        for engine in (taking, giving):
            engine.stop_federation()


@requirement("R5.9")
@pytest.mark.parametrize("part", ["engine", "manager", "router"])
@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_engine_is_not_pickled_or_copied_and_says_what_to_do(part, copied):
    engine = ArrowEngine(Words())
    what = engine if part == "engine" else getattr(engine, part)
    with pytest.raises(StateError, match=r"pass the model's folder and the card files"):
        copied(what)


def through_a_registry_of_four(tmp_path, requests):
    """Serve cards one after another; return the engine, which must have kept none in use."""
    registry, engine = AdapterRegistry(max_cards=4), ArrowEngine(Words())
    names = [f"card {number}" for number in range(16)]
    for number, name in enumerate(names):
        save(words_card(name, number), tmp_path / f"{number}.lora.arrow")
        registry.register(tmp_path / f"{number}.lora.arrow")
    for request in range(requests):
        number = request * 7 % 16
        found = engine.encode_with_lora(["a"], registry.get(names[number]))
        assert found.adapters[0].weight(names[number]) == 1.0
        if request % 50 == 0:  # known for a while, and then forgotten
            engine.register_lora(registry.get(names[number]), "words")
            engine.encode_with_lora(["a"], names[number])
            engine.remove_lora(names[number])
    return engine


@requirement("R22.3")
def test_what_an_engine_caches_keeps_no_card_of_a_registry_in_use(tmp_path):
    engine = through_a_registry_of_four(tmp_path, 300)
    assert engine.state.models == {}
    engine.register_lora(words_card("w"), "words")
    engine.encode_with_lora(["a"], "w")
    (kept,) = engine.state.models.values()
    engine.encode_with_lora(["b"], "w")
    assert engine.state.models[AdapterSet(words_card("w")),] is kept


@pytest.mark.slow
@requirement("R22.3")
def test_two_thousand_requests_pass_through_a_registry_of_four(tmp_path):
    through_a_registry_of_four(tmp_path, 2_000)


@pytest.fixture(scope="module")
def routing_engine(core):
    engine = ArrowEngine(core)
    for name in ("reading files", "sorting numbers", "foxes in the forest"):
        engine.router.register_virtual_candidate(name, name)
    return engine


sentences = st.lists(
    st.sampled_from("open read sort a the list file fox forest numbers tea é 注意".split()) | names,
    max_size=30,
).map(" ".join)


@requirement("R4.10")
@given(queries=st.lists(sentences, min_size=2, max_size=5))
def test_the_engines_router_scores_a_query_in_a_batch_as_alone(routing_engine, queries):
    router = routing_engine.router
    for query, together in zip(queries, router.select_many(queries, 3), strict=True):
        alone = {route.name: route.score for route in router.select(query, 3)}
        assert alone == pytest.approx({r.name: r.score for r in together}, rel=0, abs=1.01e-6)
