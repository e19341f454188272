"""LoRARouter: what a card says of itself, what is refused, and one state per call."""

import numpy as np
import pytest

from lora.card import LoRACard
from lora.errors import ArgumentError, ShapeError
from lora.router import LoRARouter
from lora.routing import Route
from lora.testing.plugin import requirement


def counts(texts):
    """Texts by how often the letters a to d occur in them."""
    return np.array([[text.count(letter) for letter in "abcd"] for text in texts], float)


def card(name="docs", **metadata):
    return LoRACard(name, 1, 1.0, (), {}, metadata)


@requirement("R4.1", "R4.2")
@pytest.mark.parametrize(
    "metadata",
    [
        {"description": "b"},
        {"examples": ["a", "b"]},
        {"description": "a", "examples": "b"},
        {"description": "b", "examples": ["a", "c"]},
        {"examples": [None, "b"]},
    ],
)
def test_a_card_is_registered_by_what_it_says_of_itself(metadata):
    router = LoRARouter(counts)
    router.register_card(card(**metadata))
    assert router.select("b", threshold=1.0) == [Route("docs", 1.0)]


@requirement("R4.1")
def test_a_description_that_is_given_stands_in_place_of_the_cards_own():
    router = LoRARouter(counts)
    router.register_card(card(description="a"), "b")
    assert router.select("a") == [Route("docs", 0.0)]
    router.register_card(card(description="a"), ["c", "d"])
    assert [router.select(query)[0].score for query in "abcd"] == [0, 0, 1, 1]


@requirement("R4.13")
@pytest.mark.parametrize(
    "metadata",
    [{"tags": ["law"]}, {"tags": "law"}, {"task_type": "law"}, {"tags": ["x", "law", None]}],
)
def test_a_card_is_tagged_by_what_it_says_of_itself(metadata):
    router = LoRARouter(counts)
    router.register_card(card(description="a", **metadata))
    assert router.select("a", tags=["law"]) == [Route("docs", 1.0)]
    assert router.select("a", tags=["l"]) == []


@requirement("R4.13")
def test_tags_that_are_given_stand_in_place_of_the_cards_own():
    router = LoRARouter(counts)
    router.register_card(card(description="a", tags=["law"]), tags=["other"])
    assert router.candidates["docs"].tags == {"other"}


@requirement("R4.13")
def test_tags_restrict_the_candidates_before_any_is_chosen():
    router = LoRARouter(counts)
    router.register_card(card("near"), "a")
    router.register_card(card("tagged"), "ab", tags=["law"])
    assert [route.name for route in router.select("a", 1, tags=["law"])] == ["tagged"]


@requirement("R4.7")
def test_a_route_says_whether_its_card_is_elsewhere():
    router = LoRARouter(counts)
    router.register_virtual_candidate("far", ["a", "ab"], tags=["x"])
    router.register_card(card("near"), "a")
    assert router.select("a", 2) == [Route("far", 1.0, virtual=True), Route("near", 1.0)]
    assert router.select("a", 2, tags=["x"]) == [Route("far", 1.0, virtual=True)]
    router.register_card(card("far"), "a")
    assert router.select("a", 2) == [Route("far", 1.0), Route("near", 1.0)]


@requirement("R4.1", "R7.8")
@pytest.mark.parametrize("description", [None, []])
def test_a_card_that_says_nothing_of_itself_is_refused_by_name(description):
    router = LoRARouter(counts)
    expected = "candidate 'docs': expected a description, found none; pass description="
    with pytest.raises(ArgumentError, match=expected):
        router.register_card(card(), description)
    assert not router.candidates


@requirement("R4.1", "R7.8")
@pytest.mark.parametrize(
    "metadata", [{"description": 5}, {"examples": {"a": 1}}, {"examples": ["a", 5]}]
)
def test_a_card_that_describes_itself_by_no_text_is_refused(metadata):
    router = LoRARouter(counts)
    with pytest.raises(ArgumentError, match="texts: expected a sequence of str"):
        router.register_card(card(**metadata))
    assert not router.candidates


@requirement("R4.10", "R7.8")
@pytest.mark.parametrize("queries", ["a query", ["a", 1], [None]])
def test_queries_that_are_no_texts_are_refused(queries):
    router = LoRARouter(counts)
    with pytest.raises(ArgumentError, match="texts: expected a sequence of str, found"):
        router.select_many(queries)


@requirement("R4.10")
def test_no_query_has_no_route_and_asks_nothing_of_the_encoder():
    router = LoRARouter(lambda texts: pytest.fail("embedded"))
    assert router.select_many([]) == []


@requirement("R4.2", "R4.3", "R7.8")
@pytest.mark.parametrize(
    "wrong",
    [lambda texts: np.zeros((len(texts) + 1, 3)), lambda texts: np.zeros(3), lambda texts: 0.0],
)
def test_an_encoder_that_gives_no_row_for_each_text_is_refused(wrong):
    with pytest.raises(ShapeError, match=r"embed: expected shape \(1, d\), found shape"):
        LoRARouter(wrong).register_virtual_candidate("x", "text")
    with pytest.raises(ShapeError, match=r"embed: expected shape \(2, d\), found shape"):
        LoRARouter(wrong).select_many(["one", "two"])


@requirement("R4.2", "R4.12")
def test_a_registration_that_fails_leaves_the_register_as_it_was():
    widths = {"wide": 3}
    router = LoRARouter(lambda texts: np.array([[1.0] * widths.get(text, 2) for text in texts]))
    router.register_virtual_candidate("docs", "text")
    router.register_virtual_candidate("law", "text")
    before = router.candidates
    with pytest.raises(ShapeError, match="candidate 'docs'"):
        router.register_virtual_candidate("docs", "wide")
    assert router.candidates is before


@requirement("R4.12")
def test_a_snapshot_of_the_register_never_changes():
    router = LoRARouter(counts)
    router.register_virtual_candidate("docs", "a")
    before = router.candidates
    router.register_virtual_candidate("law", "b")
    router.unregister("docs")
    router.unregister("unknown")
    assert (list(before), list(router.candidates)) == (["docs"], ["law"])
    with pytest.raises(TypeError):
        before["law"] = None


@requirement("R4.10", "R4.12")
def test_all_queries_of_one_call_see_one_state_of_the_register():
    def embed(texts):  # another card comes while the queries are embedded
        if "query a" in texts:
            router.register_virtual_candidate("late", "a")
        return counts(texts)

    router = LoRARouter(embed)
    router.register_virtual_candidate("early", "a")
    assert router.select_many(["query a"] * 3, 2) == [[Route("early", 1.0, virtual=True)]] * 3
    assert [route.name for route in router.select("a", 2)] == ["early", "late"]
