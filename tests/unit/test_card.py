"""Cards, pairs and sets of cards by example: what they keep, what they refuse and how they say so."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

import lora
from lora.card import DTYPES, FIELD_KEYS, MAX_DEPTH, MAX_RANK, check_card, same_bits
from lora.checks import is_digest
from lora.errors import ArgumentError, CardError, ConflictError
from lora.testing.plugin import requirement

ONES = lora.LowRank(np.ones((4, 2), np.float32), np.ones((2, 3), np.float32))


HUGE = pytest.param(10**5000, id="an integer that has no repr")


def card(**fields):
    good = {
        "name": "docs",
        "rank": 2,
        "alpha": 4.0,
        "target_modules": ("query",),
        "weights": {"query": ONES},
    }
    return lora.LoRACard(**{**good, **fields})


@requirement("R1.1", "R1.2", "R1.3")
def test_a_card_holds_its_fields_and_a_pair_per_module():
    made = card(
        metadata={"version": "1.2.3", "author": "someone"}, base_model="tiny", extra={"later": "x"}
    )
    assert (made.name, made.rank, made.alpha, made.target_modules) == ("docs", 2, 4.0, ("query",))
    assert dict(made.metadata) == {"version": "1.2.3", "author": "someone"}
    assert list(made.weights) == ["query"]
    assert made.weights["query"].A is ONES.A
    assert made.weights["query"].B is ONES.B
    assert (made.base_model, made.base_fingerprint, dict(made.extra)) == (
        "tiny",
        None,
        {"later": "x"},
    )
    assert (made.num_params, made.nbytes, made.dtype) == (14, 56, np.float32)


@requirement("R1.8")
def test_the_scaling_is_resolved_once_and_stays():
    made = card(alpha=5)
    assert made.weights["query"].scaling == 2.5
    assert replace(made, alpha=50.0).weights["query"].scaling == 2.5
    explicit = card(weights={"query": replace(ONES, scaling=0.25)})
    assert explicit.weights["query"].scaling == 0.25


@requirement("R1.8")
def test_modules_differ_in_rank_with_explicit_scalings_only():
    small = lora.LowRank(np.ones((4, 1), np.float32), np.ones((1, 3), np.float32))
    with pytest.raises(
        CardError, match=r"module 'value': expected the card's rank 2, or an explicit scaling"
    ):
        card(weights={"query": ONES, "value": small})
    mixed = card(weights={"query": ONES, "value": replace(small, scaling=1.0)})
    assert (mixed.rank, mixed.weights["value"].rank) == (2, 1)
    with pytest.raises(CardError, match="largest rank of its modules, 2, found 3"):
        card(rank=3, weights={"query": replace(ONES, scaling=1.0)})


@requirement("R7.6", "R7.8")
@pytest.mark.parametrize(
    "rank", [0, -1, 1.5, 2.0, True, "2", None, MAX_RANK + 1, HUGE, np.float32(2)]
)
def test_a_rank_is_an_integer_that_a_shape_can_have(rank):
    with pytest.raises(CardError, match=r"card 'docs': rank: expected an integer >= 1"):
        card(rank=rank)


@requirement("R7.6", "R7.8")
@pytest.mark.parametrize(
    "alpha", [0, -1, float("nan"), float("inf"), "1", b"1", True, None, 10**400, HUGE, 1j]
)
def test_an_alpha_is_a_finite_number_above_zero(alpha):
    with pytest.raises(CardError, match=r"card 'docs': alpha: expected a finite number"):
        card(alpha=alpha)


@requirement("R1.1")
def test_numbers_of_numpy_are_numbers():
    made = card(
        rank=np.int64(2),
        alpha=np.float32(4),
        weights={"query": replace(ONES, scaling=np.float64(0.5))},
    )
    assert [type(x) for x in (made.rank, made.alpha, made.weights["query"].scaling)] == [
        int,
        float,
        float,
    ]
    assert made == card(weights={"query": replace(ONES, scaling=0.5)})


@requirement("R1.1", "R1.11")
def test_targets_keep_their_order_and_a_set_of_them_gets_one():
    assert card(target_modules=["v", "a", "q"]).target_modules == ("v", "a", "q")
    assert card(target_modules="query").target_modules == ("query",)
    assert card(target_modules=()).target_modules == ()
    assert card(target_modules={"v", "a", "q", "k"}).target_modules == ("a", "k", "q", "v")


@requirement("R1.3")
def test_metadata_that_python_would_bend_into_json_is_refused():
    for wrong in (
        {1: "x"},
        {"a": {None: 1}},
        {"a": [{True: 1}]},
        {"a": float("nan")},
        {"a": b"x"},
        {"a": "\udc00"},
    ):
        with pytest.raises(CardError, match=r"card 'docs': metadata"):
            card(metadata=wrong)


@requirement("R1.3")
def test_metadata_may_be_nested_as_deep_as_every_reader_can():
    value = 1
    for _ in range(MAX_DEPTH):
        value = {"a": value}
    assert card(metadata=value).metadata == value
    with pytest.raises(CardError, match=f"at most {MAX_DEPTH} levels"):
        card(metadata={"a": value})


@requirement("R1.15")
def test_nothing_about_a_card_can_be_set_or_changed_through_what_it_gives():
    given = {"tags": ["python"]}
    made = card(metadata=given)
    given["tags"].append("java")
    made.metadata["tags"].append("rust")
    assert made.metadata["tags"] == ["python"]
    for thing, name in (
        (made, "name"),
        (made.weights["query"], "scaling"),
        (lora.AdapterSet(made), "x"),
    ):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(thing, name, 1)
    with pytest.raises(AttributeError):
        made.metadata.text = "{}"
    with pytest.raises(TypeError):
        made.weights["query"] = ONES
    with pytest.raises(ValueError, match="read-only"):
        made.weights["query"].A[0, 0] = 5


@requirement("R1.15", "R1.3")
def test_frozen_json_is_a_mapping_that_compares_by_content():
    one, other = (
        lora.FrozenJSON({"b": [1, 2], "a": None}),
        lora.FrozenJSON({"a": None, "b": [1, 2]}),
    )
    assert one == other == {"a": None, "b": [1, 2]}
    assert hash(one) == hash(other)
    assert (list(one), len(one), repr(one)) == (["a", "b"], 2, '{"a":null,"b":[1,2]}')
    assert one != lora.FrozenJSON({})
    assert one != 1
    assert lora.FrozenJSON(one) == one
    with pytest.raises(KeyError):
        one["c"]


@requirement("R1.6", "R1.7")
def test_a_read_only_array_is_kept_and_any_other_is_copied_in_row_order():
    frozen = np.array([[0, 1], [2, 3], [4, 5]], np.float32)
    frozen.flags.writeable = False
    assert lora.LowRank(frozen, np.ones((2, 1), np.float32)).A is frozen
    writable = np.arange(6, dtype=np.float32).reshape(3, 2)
    view = writable.view()
    view.flags.writeable = False
    turned, swapped = np.asfortranarray(frozen), frozen.astype(">f4")
    masked = np.ma.masked_array(np.array(frozen))
    for array in (writable, view, turned, swapped, masked, frozen[:, ::-1][:, ::-1]):
        pair = lora.LowRank(array, np.ones((2, 1), np.float32))
        assert type(pair.A) is np.ndarray
        assert pair.A.flags.c_contiguous
        assert not pair.A.flags.writeable
        assert same_bits(pair.A, frozen)
    seen = lora.LowRank(view, np.ones((2, 1), np.float32))
    writable[0, 0] = 9
    assert (view[0, 0], seen.A[0, 0]) == (9, 0)


@requirement("R1.7")
def test_a_pair_has_one_of_four_dtypes():
    for name, dtype in DTYPES.items():
        assert lora.LowRank(np.zeros((1, 1), dtype), np.zeros((1, 1), dtype)).dtype.name == name
    with pytest.raises(
        CardError,
        match=r"factor A: expected a dtype of float16, float32, float64, bfloat16, found int8",
    ):
        lora.LowRank(np.zeros((1, 1), np.int8), np.zeros((1, 1), np.int8))
    with pytest.raises(
        CardError,
        match=r"factor B: expected A's dtype float32, found float64; a card has one dtype",
    ):
        lora.LowRank(np.zeros((1, 1), np.float32), np.zeros((1, 1)))
    with pytest.raises(CardError, match=r"weights: expected one dtype, found float32 and float64"):
        card(weights={"a": ONES, "b": lora.LowRank(np.ones((4, 2)), np.ones((2, 3)))})


@requirement("R7.2")
def test_a_pair_says_which_factor_is_wrong():
    with pytest.raises(
        CardError, match=r"factor B: expected shape \(r, out\) with A's r = 2, found \(3, 2\)"
    ):
        lora.LowRank(np.ones((4, 2)), np.ones((3, 2)))
    with pytest.raises(
        CardError,
        match=r"factor A: expected a two-dimensional, non-empty NumPy array, found shape \(2,\)",
    ):
        lora.LowRank(np.ones(2), np.ones((3, 2)))
    with pytest.raises(CardError, match=r"factor B: .* found list"):
        lora.LowRank(np.ones((4, 2)), [[1.0]])


@requirement("R1.10")
@pytest.mark.parametrize("key", sorted(FIELD_KEYS))
def test_what_is_kept_for_later_versions_is_no_field_of_this_one(key):
    with pytest.raises(
        CardError, match=r"extra: expected text values, under keys that are not the card's own"
    ):
        card(extra={key: "x"})


@requirement("R1.15")
def test_cards_and_pairs_print_what_they_are_and_not_their_numbers():
    assert (
        repr(card())
        == "LoRACard('docs', rank=2, alpha=4.0, target_modules=('query',), 1 modules, 14 parameters, float32)"
    )
    assert repr(card().weights["query"]) == "LowRank(4 -> 2 -> 3, float32, scaling=2.0)"
    assert repr(lora.AdapterSet({"docs": (card(), 0.5)})) == "AdapterSet('docs': 0.5)"


@requirement("R1.15")
def test_a_card_is_equal_to_nothing_but_a_card():
    assert card() != "docs"
    assert ONES != "docs"
    assert lora.AdapterSet(card()) != {"docs": (card(), 1.0)}
    assert card() == card()
    assert card().weights["query"] == replace(ONES, scaling=2.0)


def returned(sent):
    """What a process makes of the card it is sent: the card, whether it can be written to, its print and hash of name."""
    flags = [
        factor.flags.writeable for pair in sent.weights.values() for factor in (pair.A, pair.B)
    ]
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
        cards.append(
            card(
                name=name,
                weights={"q": pair},
                metadata={"tags": ["a"]},
                extra={"x": "y"},
                base_model="b",
            )
        )
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
    assert (
        lora.AdapterSet([law, docs])
        == expected
        == lora.AdapterSet(expected)
        == lora.AdapterSet(docs) | law
    )
    assert list(expected) == ["docs", "law"]
    assert expected.without("law") == lora.AdapterSet(docs)
    assert (expected.weight("law"), expected.weight("none")) == (1.0, 0.0)
    assert hash(lora.AdapterSet([law, docs])) == hash(expected)
    assert not lora.AdapterSet()


@requirement("R8.9", "R7.8")
def test_a_set_refuses_what_it_can_not_hold_by_name():
    docs = card()
    with pytest.raises(
        ArgumentError, match=r"key 'law': expected the card's own name, found 'docs'"
    ):
        lora.AdapterSet({"law": docs})
    with pytest.raises(
        ArgumentError, match=r"weight of 'docs': expected a finite number, found nan"
    ):
        lora.AdapterSet({"docs": (docs, float("nan"))})
    with pytest.raises(ArgumentError, match=r"expected a card or \(card, weight\)"):
        lora.AdapterSet({"docs": (docs, 1.0, 2.0)})
    with pytest.raises(
        ArgumentError, match=r"expected a card, a mapping or an iterable of cards, found 5"
    ):
        lora.AdapterSet(5)
    with pytest.raises(ConflictError, match=r"'docs': expected one card per name"):
        lora.AdapterSet([docs, card(alpha=8.0)])
    with pytest.raises(ConflictError, match=r"found .*, 1.0\), .*, 0.5\)"):
        lora.AdapterSet(docs) | {"docs": (docs, 0.5)}
    with pytest.raises(ConflictError, match=r"found .*alpha=4.0.*alpha=8.0"):
        lora.AdapterSet(docs) | card(alpha=8.0)


@requirement("R7.8")
def test_what_is_no_card_is_named_by_its_type():
    assert check_card(card()) is None
    with pytest.raises(ArgumentError, match=r"card: expected a LoRACard, found dict"):
        check_card({})


@requirement("R1.13", "R1.14")
def test_a_digest_is_64_lower_case_hex_digits():
    assert is_digest("0123456789abcdef" * 4)
    for wrong in ("", "0" * 63, "0" * 65, "A" * 64, "g" * 64, b"0" * 64, None, 5, "٠" * 64):  # noqa: RUF001
        assert not is_digest(wrong)
