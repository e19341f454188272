"""R4: a router ranks candidates by cosine similarity, whatever the order, the scale or the number
of what it is given.
"""

import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lora.card import LoRACard
from lora.errors import ArgumentError, ShapeError
from lora.router import LoRARouter
from lora.routing import (
    EMPTY,
    Candidate,
    calibrate,
    candidate_of,
    rank,
    select,
    shortlist,
    texts_of,
    unit,
)
from lora.testing.domains import has_length, limit
from lora.testing.plugin import requirement
from lora.testing.strategies import ALIKE, names
from lora.testing.tolerance import gamma

WIDTH = 8
QUERY = " What is an Index, étude No. 1? "
"""Routed as it is: neither stripped nor in lower case."""


def wide(vector):
    return tuple(map(float, (*vector, *[0] * (WIDTH - len(vector)))))


# Cosines of these with each other are 4/5, 3/5, 24/25, 7/25, …, ±1 and 0: exact in a few decimals.
WHOLE = [*map(wide, [(3, 4), (4, 3), (0, 0, 5), (0, 6, 8), (7, 24), (-3, -4)])]
# Cosines of these are k / 128 or k / 16: for odd k of the first halfway between two multiples of
# 1e-6.
ODD, ASKED = (0, 0, 0, -2, 7, -1, -7, 5), (-7, 0, 0, -2, 0, -1, -5, -7)
HALFWAY = [*map(wide, [(8, 8), (8, 0, 8), (7, 7, 5, 2, 1), (5, 7, 1, 7, 2), ODD, ASKED])]

coordinates = (
    st.floats(-4, 4, width=32)
    | st.integers(-3, 3).map(float)
    | st.sampled_from([0.0, -0.0, 1e-30, 1e30])
)
vectors = st.one_of(
    st.lists(coordinates, min_size=WIDTH, max_size=WIDTH).map(tuple),
    st.sampled_from(WHOLE),
    st.sampled_from(HALFWAY),
    st.just((0.0,) * WIDTH),
).filter(lambda vector: has_length(vector, *limit("make_router", "lengths", (0.0, math.inf))))
COUNTS = st.integers(1, 9) | st.sampled_from([17, 65, 129, 257])
"""How many of a kind: about the sizes of batches and blocks."""

pools = st.lists(vectors, min_size=1, max_size=4)
"""Few vectors for many texts, so that candidates tie."""


class Meanings(dict):
    """A dictionary text -> vector that embeds texts by looking them up."""

    def __call__(self, texts):
        return np.array([self[text] for text in texts], float).reshape(-1, WIDTH)

    def scaled(self, power):
        return Meanings(
            {text: np.ldexp(np.array(vector, float), power) for text, vector in self.items()}
        )


@st.composite
def registers(draw, *, min_size=0):
    """Candidates with one or several examples, what each text means, and a query."""
    pool, meanings, candidates = draw(pools), Meanings(), {}
    for name in draw(st.lists(names, min_size=min_size, max_size=6, unique=True)):
        candidates[name] = [f"{name}/{index}" for index in range(draw(st.integers(1, 3)))]
        meanings |= {text: draw(st.sampled_from(pool)) for text in candidates[name]}
    meanings[QUERY] = draw(vectors | st.sampled_from(pool))
    return candidates, meanings


def made(impl, candidates, meanings, virtual=frozenset()):
    router = impl.make_router(meanings)
    for name, texts in candidates.items():
        router.register(name, texts, virtual=name in virtual)
    return router


def routed(impl, candidates, meanings, threshold=None, virtual=frozenset()):
    """The routes of the query, as many as there are candidates."""
    router = made(impl, candidates, meanings, virtual)
    return router.select(QUERY, max(1, len(candidates)), threshold)


def cosine(a, b):
    """In extended precision and range, so that no square overflows; 0 for a zero vector."""
    a, b = np.array(a, np.longdouble), np.array(b, np.longdouble)
    lengths = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return float((a * b).sum() / lengths) if lengths else 0.0


# Two unit vectors in float64, each within γ of its length's sum, root and division, their product,
# and the rounding to
# 1e-6: half a step, and the float64 nearest to the decimal.
SCORE_BOUND = 0.5e-6 + gamma(3 * WIDTH + 8, np.dtype(np.float64))


@requirement("R4.4", kind="convention")
@given(registers())
def test_every_candidate_scores_the_cosine_of_its_nearest_example(impl, drawn):
    candidates, meanings = drawn
    found = routed(impl, candidates, meanings)
    assert sorted(name for name, _ in found) == sorted(candidates)
    for name, score in found:
        nearest = max(cosine(meanings[text], meanings[QUERY]) for text in candidates[name])
        assert abs(score - nearest) <= SCORE_BOUND
        assert -1 <= score <= 1


@requirement("R4.1", kind="convention")
@given(registers(min_size=1))
def test_a_candidate_scores_as_the_nearest_of_its_examples_does_alone(impl, drawn):
    candidates, meanings = drawn
    apart = {text: [text] for texts in candidates.values() for text in texts}
    alone = dict(routed(impl, apart, meanings))
    for name, score in routed(impl, candidates, meanings):
        assert abs(score - max(alone[text] for text in candidates[name])) < 1.5e-6


@requirement("R4.1", kind="convention")
@given(COUNTS, st.booleans())
def test_the_nearest_of_any_number_of_examples_counts_wherever_it_stands(impl, count, last):
    texts = [str(place) for place in range(count)]
    nearest = texts[-1 if last else count // 2]
    meanings = Meanings({**dict.fromkeys(texts, WHOLE[0]), nearest: WHOLE[1], QUERY: WHOLE[1]})
    alone = [routed(impl, {"docs": [text]}, meanings) for text in {texts[0], nearest}]
    assert routed(impl, {"docs": texts}, meanings) == max(alone, key=lambda routes: routes[0][1])


@requirement("R4.4", kind="convention")
@given(COUNTS, st.booleans())
def test_each_of_any_number_of_candidates_has_its_score(impl, count, last):
    known = [f"{place:03}" for place in range(count)]
    nearest = known[-1 if last else count // 2]
    meanings = Meanings({**dict.fromkeys(known, WHOLE[0]), nearest: WHOLE[1], QUERY: WHOLE[1]})
    routes = routed(impl, {name: [name] for name in known}, meanings)
    assert sorted(routes) == [(name, 1.0 if name == nearest else 0.96) for name in known]


@requirement("R4.6", kind="convention")
@given(registers())
def test_the_best_come_first(impl, drawn):
    scores = [score for _, score in routed(impl, *drawn)]
    assert scores == sorted(scores, reverse=True)


@requirement("R4.9", kind="convention")
@given(registers())
def test_scores_have_six_decimals_and_equal_ones_are_ordered_by_name(impl, drawn):
    routes = routed(impl, *drawn)
    assert routes == sorted(routes, key=lambda route: (-route[1], route[0]))
    assert all(score == round(score, 6) for _, score in routes)


@requirement("R4.9", kind="convention")
@given(
    st.sampled_from(HALFWAY) | vectors,
    st.sampled_from(HALFWAY) | vectors,
    st.sets(names, min_size=2, max_size=9),
)
@example(ODD, ASKED, set("abcdefg"))
def test_candidates_that_mean_the_same_tie_wherever_the_score_falls_and_are_ordered_by_name(
    impl, meant, asked, known
):
    candidates = {name: [name + "?"] for name in known}
    meanings = Meanings({**dict.fromkeys((name + "?" for name in known), meant), QUERY: asked})
    found = routed(impl, candidates, meanings)
    assert [name for name, _ in found] == sorted(known)
    assert len({score for _, score in found}) == 1


@requirement("R4.4", kind="law")
@given(registers(min_size=1), st.none() | st.floats(-1, 1))
def test_fewer_are_the_first_of_more(impl, drawn, threshold):
    candidates, meanings = drawn
    router = made(impl, candidates, meanings)
    everything = router.select(QUERY, len(candidates), threshold)
    for k in [*range(1, len(candidates) + 3), 2**16, 2**31, 2**32 + 1]:
        assert router.select(QUERY, k, threshold) == everything[:k]


@requirement("R4.6", kind="convention")
@given(registers(min_size=1), st.data())
def test_a_threshold_keeps_exactly_the_scores_at_or_above_it(impl, drawn, data):
    candidates, meanings = drawn
    router = made(impl, candidates, meanings)
    everything = router.select(QUERY, len(candidates), None)
    score = data.draw(st.sampled_from([score for _, score in everything]))
    for threshold in (math.nextafter(score, -2), score, math.nextafter(score, 2)):
        kept = [route for route in everything if route[1] >= threshold]
        assert router.select(QUERY, len(candidates), threshold) == kept


@requirement("R4.5", kind="convention")
@given(registers(min_size=1), st.floats(-1, 1) | st.sampled_from([-1.0, 0.0, 1.0, 1.5]))
@example(({"docs": ["text"]}, Meanings({"text": WHOLE[5], QUERY: WHOLE[0]})), 0.0)
def test_a_threshold_drops_what_scores_less_wherever_it_lies(impl, drawn, threshold):
    candidates, meanings = drawn
    router = made(impl, candidates, meanings)
    everything = router.select(QUERY, len(candidates), None)
    kept = [route for route in everything if route[1] >= threshold]
    assert router.select(QUERY, len(candidates), threshold) == kept


@requirement("R4.9", kind="convention")
@given(
    st.sampled_from(WHOLE), st.sampled_from(WHOLE), st.integers(-900, 900), st.integers(-900, 900)
)
def test_a_cosine_that_is_a_short_decimal_is_scored_as_that_decimal(impl, a, b, grown, shrunk):
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))  # whole numbers
    exact = sum(x * y for x, y in zip(a, b, strict=True)) / lengths
    assert exact == round(exact, 4)
    text, query = np.ldexp(np.array(a, float), grown), np.ldexp(np.array(b, float), shrunk)
    meanings = Meanings({"text": text, QUERY: query})
    assert made(impl, {"card": ["text"]}, meanings).select(QUERY, 1, None) == [("card", exact)]


@requirement("R4.5", kind="convention")
@given(st.sampled_from(WHOLE + HALFWAY), st.sampled_from(WHOLE + HALFWAY))
@example(ODD, ASKED)
@example(ASKED, HALFWAY[3])
def test_a_threshold_is_compared_with_the_score_that_is_told(impl, a, b):
    router = made(impl, {"card": ["text"]}, Meanings({"text": a, QUERY: b}))
    routes = router.select(QUERY, 1, None)
    score = routes[0][1]
    assert router.select(QUERY, 1, score) == routes
    assert router.select(QUERY, 1, math.nextafter(score, 2)) == []


ONE = {"docs": ["text"]}, Meanings({"text": WHOLE[0], QUERY: WHOLE[1]})


@requirement("R4.8", kind="law")
@given(registers(min_size=1), st.integers(-1000, 800), st.integers(-1000, 800))
@example(ONE, -60, 0)
@example(ONE, 0, -60)
@example(ONE, -600, -600)
@example(ONE, 600, 600)
def test_scaling_by_powers_of_two_changes_no_bit(impl, drawn, power, asked):
    candidates, meanings = drawn
    scaled = meanings.scaled(power)
    scaled[QUERY] = meanings.scaled(asked)[QUERY]
    for text, meaning in meanings.items():  # nothing over- or underflowed
        back = np.ldexp(scaled[text], -asked if text == QUERY else -power)
        assume(np.array_equal(back, meaning))
    assert routed(impl, candidates, meanings) == routed(impl, candidates, scaled)


@requirement("R4.8", kind="convention")
@given(registers(min_size=1), st.data())
def test_a_zero_vector_scores_zero_on_either_side(impl, drawn, data):
    candidates, meanings = drawn
    zero = data.draw(st.sampled_from([(0.0,) * WIDTH, (-0.0,) * WIDTH]))
    nothing = data.draw(st.sampled_from(sorted(candidates)))
    meanings |= dict.fromkeys(candidates[nothing], zero)
    assert dict(routed(impl, candidates, meanings))[nothing] == 0
    asked = routed(impl, candidates, Meanings({**meanings, QUERY: zero}), 0.0)
    assert asked == [(name, 0.0) for name in sorted(candidates)]


@requirement("R4.1", kind="convention")  # of ties and of last digits, as the next two
@given(registers(min_size=1), st.data())
def test_the_order_and_repetition_of_a_candidates_examples_change_nothing(impl, drawn, data):
    candidates, meanings = drawn
    repeated = {}
    for name, texts in candidates.items():
        more = data.draw(st.lists(st.sampled_from(texts), max_size=2))
        repeated[name] = data.draw(st.permutations([*texts, *more]))
    assert routed(impl, candidates, meanings) == routed(impl, repeated, meanings)


@requirement("R4.4", "R4.6", "R4.9")
@given(
    st.tuples(st.integers(1, 700), st.integers(1, 30), st.integers(1, 12)),
    st.sampled_from([0.0, 1e-9, 3e-8, 1e-7, 1e-6, 1e-5, 1.0]),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_ranking_the_short_list_is_ranking_all(sizes, spread, seed, data):
    """Of candidates so alike that float32 can't tell them apart, too, and of a threshold that is
    one of the scores.
    """
    width, count, top_k = sizes
    rng = np.random.default_rng(seed)
    centre, asked = rng.standard_normal((2, width))
    index = EMPTY
    for i in range(count):
        rows = centre + spread * rng.standard_normal((rng.integers(1, 4), width))
        index = index.with_candidate(candidate_of(str(i), rows))
    query = unit(asked[None])[0]
    everything = rank(query, index, range(count), count, None)
    threshold = data.draw(st.none() | st.sampled_from(everything).map(lambda route: route.score))
    short = shortlist(query, index, top_k, threshold)
    expected = rank(query, index, range(count), top_k, threshold)
    assert rank(query, index, short, top_k, threshold) == expected
    assert select(query, index, top_k=top_k, threshold=threshold) == expected
    best = [max(each.exemplars @ query) for each in index.listed]
    least = max(
        [-2.0, *([sorted(best)[-top_k]] if count > top_k else []), *([threshold] * bool(threshold))]
    )
    unsure = (width + 3) * 2.0**-24 + 1e-6  # float32 products, and scores as they are rounded
    assert all(best[i] >= least - 5 * unsure for i in short)


@requirement("R7.8")
@given(wrong=st.sampled_from(["0.5", float("nan"), True, [0.5]]))
def test_what_is_no_threshold_or_no_sequence_of_texts_is_named(wrong):
    with pytest.raises(ArgumentError, match=r"^threshold: expected a finite number"):
        select(np.ones(1), EMPTY, threshold=wrong)
    for texts in ({"a", "b"}, {"a": 1}, "a", [1], 3):
        with pytest.raises(ArgumentError, match=r"^texts: expected a sequence of str"):
            texts_of(texts)
    assert sorted(texts_of({"a", "b"}, ordered=False)) == ["a", "b"]


@requirement("R4.9", kind="convention")
@given(registers(), st.data())
def test_the_order_of_registration_changes_nothing(impl, drawn, data):
    candidates, meanings = drawn
    shuffled = dict(data.draw(st.permutations(list(candidates.items()))))
    assert routed(impl, candidates, meanings) == routed(impl, shuffled, meanings)


@requirement("R4.12", kind="convention")
@given(st.data(), pools)
def test_a_register_holds_what_was_last_registered_and_not_unregistered_since(impl, data, pool):
    known = data.draw(st.lists(names, min_size=1, max_size=4, unique=True))
    places = [str(index) for index in range(len(pool))]
    meanings = Meanings({**dict(zip(places, pool, strict=True)), QUERY: data.draw(vectors)})
    router, expected = impl.make_router(meanings), {}
    for name in data.draw(st.lists(st.sampled_from([*known, "unknown"]), max_size=8)):
        if name == "unknown" or data.draw(st.booleans()):
            router.unregister(name)
            expected.pop(name, None)
        else:
            texts = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3))
            virtual = data.draw(st.booleans())
            router.register(name, texts, virtual=virtual)
            expected.pop(name, None)
            expected[name] = texts
        assert router.select(QUERY, 9, None) == routed(impl, expected, meanings)


@requirement("R4.12", kind="convention")
@given(names, st.permutations(WHOLE), st.booleans(), st.booleans())
def test_a_name_that_is_registered_again_has_the_new_description_alone(
    impl, name, drawn, virtual, virtual_again
):
    old, new, *_ = drawn
    router, fresh = (impl.make_router(Meanings(old=old, new=new)) for _ in range(2))
    router.register(name, ["old"], virtual=virtual)
    for each in (router, fresh):
        each.register(name, ["new"], virtual=virtual_again)
    for query in ("old", "new"):
        assert router.select(query, 2, None) == fresh.select(query, 2, None)
    router.unregister(name)
    assert router.select("new", 2, None) == []


@requirement("R4.12", kind="convention")
@given(st.permutations(ALIKE), st.booleans())
def test_a_name_stands_for_itself_and_for_none_that_looks_alike(impl, drawn, virtual):
    router = impl.make_router(Meanings(old=WHOLE[0], new=WHOLE[2]))
    for name in drawn:
        router.register(name, ["old"], virtual=virtual)
    router.register(drawn[0], ["new"])
    for gone, name in enumerate(drawn, 1):
        scores = dict(router.select("old", len(drawn), None))
        assert set(scores) == set(drawn[gone - 1 :])
        assert {name for name, score in scores.items() if score == 0} == set(drawn[:1][gone - 1 :])
        router.unregister(name)


@requirement("R4.7", kind="convention")
@given(registers(min_size=1), st.data(), st.none() | st.floats(-1, 1))
def test_virtual_candidates_are_ranked_as_any_other(impl, drawn, data, threshold):
    candidates, meanings = drawn
    virtual = data.draw(st.sets(st.sampled_from(sorted(candidates)), min_size=1))
    plain = routed(impl, candidates, meanings, threshold)
    assert routed(impl, candidates, meanings, threshold, virtual) == plain


@requirement("R4.10", kind="convention")
@given(registers(), st.lists(vectors, max_size=5), st.integers(1, 4), st.none() | st.floats(-1, 1))
def test_many_queries_are_routed_as_each_alone(impl, drawn, asked, top_k, threshold):
    candidates, meanings = drawn
    # Of unlike lengths, by which an embedder may sort.
    queries = [f"query {index}{'?' * (3 * index % 5)}" for index in range(len(asked))]
    meanings |= dict(zip(queries, asked, strict=True))
    router = made(impl, candidates, meanings)
    alone = [router.select(query, top_k, threshold) for query in queries]
    many, first = [*queries * 26, *queries[:1]], alone[:1]  # more than a batch, each of them again
    assert router.select_many(many, top_k, threshold) == [*alone * 26, *first]


@requirement("R4.2", kind="convention")
@given(registers(min_size=1), vectors)
def test_descriptions_are_embedded_when_they_are_registered(impl, drawn, later):
    candidates, meanings = drawn
    expected = routed(impl, candidates, Meanings(meanings))
    router = made(impl, candidates, meanings)
    meanings.update(dict.fromkeys(set(meanings) - {QUERY}, later))
    assert router.select(QUERY, 9, None) == expected


@requirement("R4.3", kind="convention")
@given(registers(min_size=1), vectors)
def test_a_query_is_embedded_each_time_that_it_is_asked(impl, drawn, asked):
    candidates, meanings = drawn
    expected = routed(impl, candidates, Meanings({**meanings, QUERY: asked}))
    router = made(impl, candidates, meanings)
    router.select(QUERY, 9, None)
    meanings[QUERY] = asked
    assert router.select(QUERY, 9, None) == expected


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
                metadata = {"description": texts[0], "examples": texts[1:], **task}
                metadata["tags"] = sorted(has - {"task"})
                router.register_card(LoRACard(name, 1, 1.0, (), {}, metadata))
    for top_k in (1, 9):
        expected = tagged.select(QUERY, top_k)
        assert everyone.select(QUERY, top_k, tags=wanted) == expected
        assert everyone.select_many([QUERY] * 2, top_k, tags=list(wanted)) == [expected] * 2


# ---- this library's own: rows, routes, thresholds


@requirement("R4.8")
@given(
    st.lists(st.tuples(vectors, st.integers(-900, 900)), min_size=1, max_size=4),
    st.sampled_from("fdgil"),
)
def test_every_row_is_normalised_by_itself_in_float64_whatever_its_size_and_dtype(sized, kind):
    sized = (
        sized if kind in "dg" else [(vector, 0) for vector, _ in sized]
    )  # other types have no room for large powers
    rows = np.array([np.ldexp(np.array(vector, float), power) for vector, power in sized])
    rows = (np.round(rows.clip(-99, 99)) if kind in "il" else rows).astype(kind)
    found = unit(rows)
    assert found.dtype == np.float64
    each = [unit(row[None].astype(np.float64)) for row in rows]
    assert np.array_equal(found, np.concatenate(each))
    lengths = np.sqrt((found * found).sum(axis=1))
    live = rows.any(axis=1)
    assert (abs(lengths[live] - 1) <= gamma(2 * WIDTH + 4, np.dtype(np.float64))).all()
    assert not found[~live].any()


@requirement("R4.7")
@given(registers(min_size=1), st.data())
def test_a_route_says_whether_its_candidate_is_virtual_and_one_is_chosen_unless_more_are_asked_for(
    drawn, data
):
    candidates, meanings = drawn
    virtual = data.draw(st.sets(st.sampled_from(sorted(candidates))))
    router = LoRARouter(meanings)
    for name, texts in candidates.items():
        if name in virtual:
            router.register_virtual_candidate(name, texts)
        else:
            router.register(candidate_of(name, meanings(texts)))
    routes = router.select(QUERY, len(candidates))
    assert {route.name for route in routes if route.virtual} == virtual
    assert {route.name for route in routes} == set(candidates)
    query = unit(meanings([QUERY]))[0]
    known = EMPTY
    for candidate in router.candidates.values():
        known = known.with_candidate(candidate)
    assert select(query, known) == select(query, known, top_k=1) == routes[:1]
    assert router.select(QUERY) == routes[:1]


@requirement("R4.9")
@given(st.integers(21, 200), st.sampled_from([1, -1]), st.integers(1, WIDTH - 1))
def test_a_score_that_rounds_to_zero_is_plain_zero_from_either_side(power, sign, place):
    nearly = np.zeros((1, WIDTH))
    nearly[0, place], nearly[0, 0] = 1.0, sign * 2.0**-power
    (route,) = select(np.eye(WIDTH)[0], EMPTY.with_candidate(candidate_of("docs", nearly)))
    assert (route.score, math.copysign(1, route.score)) == (0.0, 1.0)


@requirement("R4.1", "R7.8")
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_a_register_takes_embeddings_of_one_width_only(widths):
    index, taken = EMPTY, []
    for name, width in zip("abcd", widths, strict=False):
        candidate = Candidate(name, np.eye(1, width))
        if width == widths[0]:
            index, taken = index.with_candidate(candidate), [*taken, name]
            continue
        with pytest.raises(ShapeError, match=f"'{name}': .*{widths[0]}, found {width}$"):
            index.with_candidate(candidate)
    assert list(index.candidates) == taken


scores = st.integers(-64, 64).map(lambda n: n / 64)
groups = st.dictionaries(names, st.lists(scores, min_size=1, max_size=3), min_size=1, max_size=24)
"""Source group -> scores; sums and products with small whole numbers are exact."""


@st.composite
def shares(draw, count):
    """A rate in (0, 1), often a whole number of (count + 1)ths, where the k-th score just becomes
    allowed.
    """
    near = draw(st.integers(1, count).map(lambda k: Fraction(k, count + 1)))
    return draw(
        st.just(near) | st.fractions(Fraction(1, 200), Fraction(199, 200), max_denominator=200)
    )


@requirement("R4.11")
@given(groups, st.data())
def test_a_threshold_is_the_kth_smallest_score_for_the_largest_k_that_the_rate_allows(known, data):
    n, rate = len(known), data.draw(shares(len(known)))
    k = math.floor(rate * (n + 1))
    if k < 1:
        with pytest.raises(ArgumentError):
            calibrate(known, float(rate))
        return
    found = calibrate(known, float(rate), seed=data.draw(st.integers(0, 9)))
    assert (found.groups, found.rate) == (n, k / (n + 1))
    assert found.rate <= float(rate)
    lowest, highest = sorted(map(min, known.values())), sorted(map(max, known.values()))
    assert lowest[k - 1] <= found.threshold <= highest[k - 1]
    assert any(found.threshold in group for group in known.values())


@requirement("R4.11")
@given(
    st.integers(2, 40),
    st.fractions(Fraction(1, 40), Fraction(39, 40), max_denominator=40),
    st.booleans(),
)
def test_too_few_groups_are_told_how_many_would_do_and_so_many_do(m, share, whole):
    rate = float(Fraction(1, m) if whole else share)  # 1 / m needs just m - 1 groups
    with pytest.raises(ArgumentError) as caught:
        calibrate({}, rate)
    needed = int(re.search(r"at least (\d+) source groups", caught.value.expected)[1])
    assert needed >= 1
    enough = {str(group): [group] for group in range(needed)}
    assert calibrate(enough, rate).threshold == 0
    del enough["0"]
    with pytest.raises(ArgumentError, match=f"at least {needed} source groups"):
        calibrate(enough, rate)


@requirement("R4.11")
@given(st.lists(scores, min_size=2, max_size=25), st.data())
def test_of_sources_left_out_in_turn_the_stated_share_falls_below_the_others_threshold(known, data):
    """The promise of split conformal prediction, counted out: exactly, where no two scores are
    equal.
    """
    n = len(known) - 1
    rate = float(data.draw(st.integers(1, n))) / (n + 1)
    below = 0
    for index, score in enumerate(known):
        found = calibrate({str(i): [other] for i, other in enumerate(known) if i != index}, rate)
        below += score < found.threshold
    assert below <= round(found.rate * (n + 1))
    assert below == round(found.rate * (n + 1)) or len(set(known)) < len(known)


@requirement("R4.11")
@given(groups, st.data(), st.integers(-3, 3), st.integers(-2, 2))
def test_a_threshold_moves_with_the_scores_and_knows_no_order_of_groups(known, data, shift, power):
    rate = data.draw(st.integers(1, len(known))) / (len(known) + 1)
    seed = data.draw(st.integers(0, 9))
    found = calibrate(known, rate, seed=seed)

    def move(score):
        return math.ldexp(score, power) + shift

    moved = [(name, [*map(move, group)]) for name, group in known.items()]
    there = calibrate(dict(data.draw(st.permutations(moved))), rate, seed=seed)
    assert there == replace(found, threshold=move(found.threshold))
    assert calibrate(known, rate, seed=seed) == found
    assert calibrate(known, rate) == calibrate(known, rate, seed=0)


@requirement("R4.11")
@given(groups, st.data())
def test_a_larger_rate_has_no_smaller_threshold_and_no_lower_interval(known, data):
    n = len(known)
    less, more = sorted(data.draw(st.lists(st.integers(1, n), min_size=2, max_size=2)))
    low, high = (calibrate(known, k / (n + 1)) for k in (less, more))
    assert low.threshold <= high.threshold
    assert low.rate <= high.rate
    assert all(a <= b for a, b in zip(low.interval, high.interval, strict=True))
    assert low.interval[0] < low.rate < low.interval[1]


def beta_share(k, n, point):
    """How much of Beta(k, n + 1 - k) lies below a point: the chance of at least k of n, exactly."""
    return sum(math.comb(n, i) * point**i * (1 - point) ** (n - i) for i in range(k, n + 1))


HALF_A_STEP = Fraction(1, 2_000_000)


@requirement("R4.11")
@given(st.integers(1, 40), st.data())
def test_the_interval_holds_nine_in_ten_of_the_rates_that_such_calibrations_have(n, data):
    """Rounded to 1e-6: the exact point lies within half a step of what is said, and 1e-10 for the
    logarithms.
    """
    k, near = data.draw(st.integers(1, n)), HALF_A_STEP + Fraction(1, 10**10)
    found = calibrate({str(group): [group] for group in range(n)}, k / (n + 1))
    for end, share in zip(found.interval, (Fraction(1, 20), Fraction(19, 20)), strict=True):
        assert end == round(end, 6)
        below, above = (beta_share(k, n, Fraction(end) + off) for off in (-near, near))
        assert below <= share <= above


@requirement("R4.11", "R7.8")
@given(
    st.lists(scores, min_size=24, max_size=24),
    st.floats(0.04, 1, exclude_max=True),
    st.integers(0, 2**70),
)
def test_a_rate_is_a_share_and_a_seed_a_whole_number_of_at_least_0(known, rate, seed):
    spread = {str(index): [score, score + 0.5] for index, score in enumerate(known)}
    assert calibrate(spread, rate, seed=seed).rate <= rate
    assert calibrate(spread, rate, seed=0) == calibrate(spread, rate)
    for wrong in (0.0, -0.0, 1.0, 1.5, 2.0, -rate, 1 + rate, math.nan, math.inf, str(rate), None):
        with pytest.raises(ArgumentError, match=r"^rate: "):
            calibrate(spread, wrong, seed=seed)
    for wrong in (-1, -1 - seed, True, False, 0.0, 1.5, str(seed), None):
        with pytest.raises(ArgumentError, match=r"^seed: "):
            calibrate(spread, rate, seed=wrong)


@requirement("R4.11")
@given(
    st.lists(scores, min_size=19, max_size=30),
    st.lists(scores, min_size=2, max_size=3, unique=True),
)
def test_any_score_of_a_group_may_stand_for_it_and_one_in_twenty_is_the_default_rate(known, group):
    drawn = {calibrate({"docs": group}, 0.5, seed=seed).threshold for seed in range(60)}
    assert drawn == set(group)
    many = {str(index): [score] for index, score in enumerate(known)}
    assert calibrate(many) == calibrate(many, 0.05) != calibrate(many, 0.95)
