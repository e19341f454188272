"""Cards, pairs and sets of cards by example: what they keep and refuse, in which words."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

import lora
from lora.card import DTYPES, FIELD_KEYS, check_card
from lora.errors import ArgumentError, CardError, ConflictError
from lora.testing.plugin import requirement

ONES = lora.LowRank(np.ones((4, 2), np.float32), np.ones((2, 3), np.float32))


WEIGHTS = {"query": ONES}


def card(name="docs", rank=2, alpha=4.0, weights=WEIGHTS, **fields):
    return lora.LoRACard(name, rank, alpha, ("query",), weights, **fields)


@requirement("R1.8")
def test_the_scaling_is_resolved_once_and_stays():
    new_card = card(alpha=5)
    assert new_card.weights["query"].scaling == 2.5
    assert replace(new_card, alpha=50.0).weights["query"].scaling == 2.5
    explicit = card(weights={"query": replace(ONES, scaling=0.25)})
    assert explicit.weights["query"].scaling == 0.25


@requirement("R1.15")
def test_nothing_about_a_card_can_be_set_or_changed_through_what_it_gives():
    metadata = {"tags": ["python"]}
    new_card = card(metadata=metadata)
    metadata["tags"].append("java")
    new_card.metadata["tags"].append("rust")
    assert new_card.metadata["tags"] == ["python"]
    for value in (new_card, new_card.weights["query"], lora.AdapterSet(new_card)):
        with pytest.raises(FrozenInstanceError):
            value.scaling = 1
    with pytest.raises(AttributeError):
        new_card.metadata.text = "{}"
    with pytest.raises(TypeError):
        new_card.weights["query"] = ONES
    with pytest.raises(ValueError, match="read-only"):
        new_card.weights["query"].A[0, 0] = 5


@requirement("R1.10")
@pytest.mark.parametrize("key", sorted(FIELD_KEYS))
def test_what_is_kept_for_later_versions_is_no_field_of_this_one(key):
    message = "extra: expected text values, under keys that are not the card's own"
    with pytest.raises(CardError, match=message):
        card(extra={key: "x"})


@requirement("R1.15")
def test_cards_and_pairs_print_what_they_are_and_not_their_numbers():
    text = (
        "LoRACard('docs', rank=2, alpha=4.0, target_modules=('query',), 1 modules, 14 parameters, "
    )
    assert repr(card()) == text + "float32)"
    assert repr(card().weights["query"]) == "LowRank(4 -> 2 -> 3, float32, scaling=2.0)"
    assert repr(lora.AdapterSet({"docs": (card(), 0.5)})) == "AdapterSet('docs': 0.5)"


def returned(sent):
    """Return the card as a process receives it, whether it is writable, its repr, and equality."""
    factors = [factor for pair in sent.weights.values() for factor in (pair.A, pair.B)]
    flags = [factor.flags.writeable for factor in factors]
    return sent, flags, repr(sent), sent == pickled_twin(sent)


def pickled_twin(sent):
    return replace(sent, weights=dict(sent.weights), metadata=dict(sent.metadata))


@requirement("R1.15", "R1.7")
def test_a_card_sent_to_another_process_arrives_equal_and_read_only(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    cards = []
    for name, dtype in DTYPES.items():
        every = np.arange(6 * dtype.itemsize, dtype=np.uint8).view(dtype)
        nan = np.frombuffer(b"\xff" * 2 * dtype.itemsize, dtype)
        pair = lora.LowRank(every.reshape(3, 2), nan.reshape(2, 1), -0.5)
        fields = {"metadata": {"tags": ["a"]}, "extra": {"x": "y"}, "base_model": "b"}
        cards.append(card(name=name, weights={"q": pair}, **fields))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for sent, (back, flags, text, equal) in zip(cards, pool.map(returned, cards), strict=True):
            assert back == sent
            assert hash(back) == hash(sent)
            assert flags == [False, False]
            assert text == repr(sent)
            assert equal
            assert not back.weights["q"].A.flags.writeable


@requirement("R8.9")
def test_a_set_takes_cards_pairs_mappings_and_sets():
    docs, law = card(), card(name="law")
    expected = lora.AdapterSet({"docs": docs, "law": (law, 1.0)})
    assert lora.AdapterSet([law, docs]) == expected == lora.AdapterSet(expected)
    assert lora.AdapterSet(docs) | law == expected
    assert list(expected) == ["docs", "law"]
    assert expected.without("law") == lora.AdapterSet(docs)
    assert (expected.weight("law"), expected.weight("none")) == (1.0, 0.0)
    assert hash(lora.AdapterSet([law, docs])) == hash(expected)
    assert not lora.AdapterSet()


@requirement("R7.8")
def test_what_is_no_card_is_named_by_its_type():
    assert check_card(card()) is None
    with pytest.raises(ArgumentError, match=r"card: expected a LoRACard, found dict"):
        check_card({})


PAIRS = {
    "factor A: expected a dtype of float16, float32, float64, bfloat16, found int8": (
        np.ones((4, 2), np.int8),
        ONES.B,
    ),
    "factor B: expected A's dtype float32, found float64; a card has one dtype": (
        ONES.A,
        np.ones((2, 3)),
    ),
    r"factor B: expected shape \(r, out\) with A's r = 2, found \(3, 2\)": (ONES.A, ONES.A[:3]),
    r"factor A: .* two-dimensional, non-empty NumPy array, found shape \(2,\)": (ONES.A[0], ONES.B),
}


@requirement("R1.7", "R7.2")
@pytest.mark.parametrize("message", PAIRS)
def test_a_pair_says_which_factor_is_wrong(message):
    with pytest.raises(CardError, match=message):
        lora.LowRank(*PAIRS[message])


@requirement("R1.3", "R1.15")
def test_frozen_json_prints_its_text_and_has_no_other_key():
    frozen = lora.FrozenJSON({"b": [1, 2], "a": None})
    assert repr(frozen) == '{"a":null,"b":[1,2]}'
    assert hash(frozen) == hash(lora.FrozenJSON({"a": None, "b": [1, 2]}))
    with pytest.raises(KeyError):
        frozen["c"]


@requirement("R1.3", "R7.8")
@pytest.mark.parametrize("metadata", [{"a": "\ud800"}, {"\udfff": 1}, {"a": [{"b": "x\ud83d"}]}])
def test_metadata_that_unicode_does_not_have_are_refused(metadata):
    with pytest.raises(CardError, match=r"metadata: expected a JSON object, found .* surrogates"):
        card(metadata=metadata)


SETS = {
    "key 'law': expected the card's own name, found 'docs'": {"law": card()},
    "weight of 'docs': expected a finite number, found nan": {"docs": (card(), float("nan"))},
    r"expected a card or \(card, weight\)": {"docs": (card(), 1.0, 2.0)},
    "expected a card, a mapping or an iterable of cards, found 5": 5,
    r"^adapter set: expected a card, .* found 'docs'; lora.load\(path\) or import_peft": "docs",
    r"^adapter set: expected .* found 'a'; lora.load\(path\) or import_peft\(path\) reads one$": [
        "a"
    ],
    "'docs': expected one card per name": [card(), card(alpha=8.0)],
}


@requirement("R8.9", "R7.8")
@pytest.mark.parametrize("message", SETS)
def test_a_set_refuses_what_it_can_not_hold_by_name(message):
    with pytest.raises((ArgumentError, ConflictError), match=message):
        lora.AdapterSet(SETS[message])


@requirement("R8.9")
def test_a_union_names_what_two_sets_disagree_about():
    docs = lora.AdapterSet(card())
    for other, message in (
        ({"docs": (card(), 0.5)}, r"found .*, 1.0\), .*, 0.5\)"),
        (card(alpha=8.0), "found .*alpha=4.0.*alpha=8.0"),
    ):
        with pytest.raises(ConflictError, match=message):
            docs | other
    assert docs != dict(docs)
