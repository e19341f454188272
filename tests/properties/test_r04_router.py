"""R4: a router ranks candidates by cosine similarity, whatever the order, the scale or the number of what it is given."""

import math

import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lora.card import LoRACard
from lora.inference.router import LoRARouter
from lora.testing.plugin import requirement
from lora.testing.strategies import names
from lora.testing.tolerance import gamma

WIDTH = 8


def wide(vector):
    return tuple(map(float, (*vector, *[0] * (WIDTH - len(vector)))))


# Cosines of these with each other are 4/5, 3/5, 24/25, 7/25, …, ±1 and 0: exact in a few decimals.
WHOLE = [*map(wide, [(3, 4), (4, 3), (0, 0, 5), (0, 6, 8), (7, 24), (-3, -4)])]
# Cosines of these are k / 128 or k / 16: for odd k of the first halfway between two multiples of 1e-6.
ODD, ASKED = (0, 0, 0, -2, 7, -1, -7, 5), (-7, 0, 0, -2, 0, -1, -5, -7)
HALFWAY = [*map(wide, [(8, 8), (8, 0, 8), (7, 7, 5, 2, 1), (5, 7, 1, 7, 2), ODD, ASKED])]

coordinates = st.floats(-4, 4, width=32) | st.integers(-3, 3).map(float) | st.sampled_from([0.0, -0.0, 1e-30, 1e30])
vectors = st.one_of(
    st.lists(coordinates, min_size=WIDTH, max_size=WIDTH).map(tuple),
    st.sampled_from(WHOLE),
    st.sampled_from(HALFWAY),
    st.just((0.0,) * WIDTH),
)
pools = st.lists(vectors, min_size=1, max_size=4)
"""Few vectors for many texts, so that candidates tie."""


class Meanings(dict):
    """A dictionary text -> vector that embeds texts by looking them up."""

    def __call__(self, texts):
        return np.array([self[text] for text in texts], float).reshape(-1, WIDTH)

    def scaled(self, power):
        return Meanings({text: np.ldexp(np.array(vector, float), power) for text, vector in self.items()})


@st.composite
def registers(draw, *, min_size=0):
    """Candidates with one or several examples, what each text means, and a query."""
    pool, meanings, candidates = draw(pools), Meanings(), {}
    for name in draw(st.lists(names, min_size=min_size, max_size=6, unique=True)):
        candidates[name] = [f"{name}/{index}" for index in range(draw(st.integers(1, 3)))]
        meanings |= {text: draw(st.sampled_from(pool)) for text in candidates[name]}
    meanings["query"] = draw(vectors | st.sampled_from(pool))
    return candidates, meanings


def made(impl, candidates, meanings, virtual=frozenset()):
    router = impl.make_router(meanings)
    for name, texts in candidates.items():
        router.register(name, texts, virtual=name in virtual)
    return router


def cosine(a, b):
    """In extended precision and range, so that no square over- or underflows; 0 for a zero vector."""
    a, b = np.array(a, np.longdouble), np.array(b, np.longdouble)
    lengths = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return float((a * b).sum() / lengths) if lengths else 0.0


# Two unit vectors in float64, each within γ of its length's sum, root and division, their product, and the rounding to
# 1e-6: half a step, and the float64 nearest to the decimal.
SCORE_BOUND = 0.5e-6 + gamma(3 * WIDTH + 8, np.dtype(np.float64))


@requirement("R4.1", "R4.2", "R4.3", "R4.4", "R4.6", "R4.8")
@given(registers())
def test_every_candidate_scores_the_cosine_of_its_nearest_example(impl, drawn):
    candidates, meanings = drawn
    found = made(impl, candidates, meanings).select("query", max(1, len(candidates)), None)
    assert sorted(name for name, _ in found) == sorted(candidates)
    for name, score in found:
        nearest = max(cosine(meanings[text], meanings["query"]) for text in candidates[name])
        assert abs(score - nearest) <= SCORE_BOUND
        assert score == round(score, 6)
        assert -1 <= score <= 1


@requirement("R4.6", "R4.9")
@given(registers())
def test_the_best_come_first_and_equal_scores_by_name(impl, drawn):
    candidates, meanings = drawn
    found = made(impl, candidates, meanings).select("query", max(1, len(candidates)), None)
    assert found == sorted(found, key=lambda route: (-route[1], route[0]))


@requirement("R4.9")
@given(st.sampled_from(HALFWAY) | vectors, st.sampled_from(HALFWAY) | vectors, st.sets(names, min_size=2, max_size=9))
@example(ODD, ASKED, set("abcdefg"))
def test_candidates_that_mean_the_same_tie_wherever_the_score_falls_and_are_ordered_by_name(impl, meant, asked, known):
    candidates = {name: [name + "?"] for name in known}
    meanings = Meanings(dict.fromkeys((name + "?" for name in known), meant), query=asked)
    found = made(impl, candidates, meanings).select("query", len(known), None)
    assert [name for name, _ in found] == sorted(known)
    assert len({score for _, score in found}) == 1


@requirement("R4.4")
@given(registers(min_size=1), st.none() | st.floats(-1, 1))
def test_fewer_are_the_first_of_more(impl, drawn, threshold):
    candidates, meanings = drawn
    router = made(impl, candidates, meanings)
    everything = router.select("query", len(candidates), threshold)
    for k in range(1, len(candidates) + 3):
        assert router.select("query", k, threshold) == everything[:k]


@requirement("R4.5", "R4.6")
@given(registers(min_size=1), st.floats(-1, 1), st.data())
def test_a_threshold_keeps_exactly_the_scores_at_or_above_it(impl, drawn, anywhere, data):
    candidates, meanings = drawn
    router = made(impl, candidates, meanings)
    everything = router.select("query", len(candidates), None)
    score = data.draw(st.sampled_from([score for _, score in everything]))
    for threshold in (score, math.nextafter(score, -2), math.nextafter(score, 2), anywhere, -1.0, 0.0, 1.0, 1.5):
        kept = [route for route in everything if route[1] >= threshold]
        assert router.select("query", len(candidates), threshold) == kept


@requirement("R4.5", "R4.6", "R4.8")
@given(st.sampled_from(WHOLE), st.sampled_from(WHOLE), st.integers(-900, 900), st.integers(-900, 900))
def test_a_cosine_that_is_a_short_decimal_is_scored_as_that_decimal(impl, a, b, grown, shrunk):
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))  # whole numbers
    exact = sum(x * y for x, y in zip(a, b, strict=True)) / lengths
    assert exact == round(exact, 4)
    meanings = Meanings(text=np.ldexp(np.array(a, float), grown), query=np.ldexp(np.array(b, float), shrunk))
    router = made(impl, {"card": ["text"]}, meanings)
    assert router.select("query", 1, exact) == [("card", exact)]
    assert router.select("query", 1, math.nextafter(exact, 2)) == []


@requirement("R4.8")
@given(registers(), st.integers(-1000, 800), st.integers(-1000, 800))
def test_scaling_by_powers_of_two_changes_no_bit(impl, drawn, power, asked):
    candidates, meanings = drawn
    scaled = meanings.scaled(power)
    scaled["query"] = meanings.scaled(asked)["query"]
    for text, by in [*((text, power) for text in meanings if text != "query"), ("query", asked)]:
        assume(np.array_equal(np.ldexp(scaled[text], -by), meanings[text]))  # nothing over- or underflowed
    k = max(1, len(candidates))
    before, after = (made(impl, candidates, embed).select("query", k, None) for embed in (meanings, scaled))
    assert before == after


@requirement("R4.8")
@given(registers(min_size=1), st.data())
def test_a_zero_vector_scores_zero_on_either_side(impl, drawn, data):
    candidates, meanings = drawn
    zero = data.draw(st.sampled_from([(0.0,) * WIDTH, (-0.0,) * WIDTH]))
    nothing = data.draw(st.sampled_from(sorted(candidates)))
    meanings |= dict.fromkeys(candidates[nothing], zero)
    assert dict(made(impl, candidates, meanings).select("query", len(candidates), None))[nothing] == 0
    asked = made(impl, candidates, Meanings(meanings, query=zero)).select("query", len(candidates), 0.0)
    assert asked == [(name, 0.0) for name in sorted(candidates)]


@requirement("R4.1", "R4.4")
@given(registers(min_size=1), st.data())
def test_the_order_and_repetition_of_a_candidates_examples_change_nothing(impl, drawn, data):
    candidates, meanings = drawn
    repeated = {
        name: data.draw(st.permutations([*texts, *data.draw(st.lists(st.sampled_from(texts), max_size=2))]))
        for name, texts in candidates.items()
    }
    found = [made(impl, each, meanings).select("query", len(candidates), None) for each in (candidates, repeated)]
    assert found[0] == found[1]


@requirement("R4.9")
@given(registers(), st.data())
def test_the_order_of_registration_changes_nothing(impl, drawn, data):
    candidates, meanings = drawn
    shuffled = dict(data.draw(st.permutations(list(candidates.items()))))
    k = max(1, len(candidates))
    found = [made(impl, each, meanings).select("query", k, None) for each in (candidates, shuffled)]
    assert found[0] == found[1]


@requirement("R4.12", "R4.9")
@given(st.data(), pools)
def test_a_register_holds_what_was_last_registered_and_not_unregistered_since(impl, data, pool):
    known = data.draw(st.lists(names, min_size=1, max_size=4, unique=True))
    meanings = Meanings({str(index): vector for index, vector in enumerate(pool)}, query=data.draw(vectors))
    router, expected = impl.make_router(meanings), {}
    for name in data.draw(st.lists(st.sampled_from([*known, "unknown"]), max_size=8)):
        if name == "unknown" or data.draw(st.booleans()):
            router.unregister(name)
            expected.pop(name, None)
        else:
            texts = data.draw(st.lists(st.sampled_from([*map(str, range(len(pool)))]), min_size=1, max_size=3))
            virtual = data.draw(st.booleans())
            router.register(name, texts, virtual=virtual)
            expected.pop(name, None)
            expected[name] = texts
        assert router.select("query", 9, None) == made(impl, expected, meanings).select("query", 9, None)


@requirement("R4.7")
@given(registers(min_size=1), st.data(), st.none() | st.floats(-1, 1))
def test_virtual_candidates_are_ranked_as_any_other(impl, drawn, data, threshold):
    candidates, meanings = drawn
    virtual = data.draw(st.sets(st.sampled_from(sorted(candidates)), min_size=1))
    found = [made(impl, candidates, meanings, each).select("query", 9, threshold) for each in (set(), virtual)]
    assert found[0] == found[1]


@requirement("R4.10")
@given(registers(), st.lists(vectors, max_size=5), st.integers(1, 4), st.none() | st.floats(-1, 1))
def test_many_queries_are_routed_as_each_alone(impl, drawn, asked, top_k, threshold):
    candidates, meanings = drawn
    queries = [f"query {index}" for index in range(len(asked))]
    meanings |= dict(zip(queries, asked, strict=True))
    router = made(impl, candidates, meanings)
    alone = [router.select(query, top_k, threshold) for query in queries]
    assert router.select_many(queries, top_k, threshold) == alone


@requirement("R4.2", "R4.3")
@given(registers(min_size=1), vectors, vectors)
def test_descriptions_are_embedded_when_registered_and_queries_when_asked(impl, drawn, later, asked):
    candidates, meanings = drawn
    expected = made(impl, candidates, Meanings(meanings, query=asked)).select("query", 9, None)
    router = made(impl, candidates, meanings)
    meanings.update(dict.fromkeys(meanings, later), query=asked)
    assert router.select("query", 9, None) == expected


@requirement("R4.13")
@given(
    registers(min_size=1),
    st.lists(st.sets(st.sampled_from(["python", "law", "task"])), min_size=6, max_size=6),
    st.sets(st.sampled_from(["python", "law", "task", "none has this"]), max_size=2),
    st.booleans(),
)
def test_asking_by_tags_is_asking_a_register_of_the_tagged(drawn, tags, wanted, virtual):
    candidates, meanings = drawn
    everyone, tagged = LoRARouter(meanings), LoRARouter(meanings)
    for (name, texts), has in zip(candidates.items(), tags, strict=False):
        for router in (everyone, tagged) if has >= wanted else (everyone,):
            if virtual:
                router.register_virtual_candidate(name, texts, tags=has)
            else:
                task = {"task_type": "task"} if "task" in has else {}
                metadata = {"description": texts[0], "examples": texts[1:], "tags": sorted(has - {"task"}), **task}
                router.register_card(LoRACard(name, 1, 1.0, (), {}, metadata))
    expected = tagged.select("query", 9)
    assert everyone.select("query", 9, tags=wanted) == expected
    assert everyone.select_many(["query"] * 2, 9, tags=list(wanted)) == [expected] * 2
