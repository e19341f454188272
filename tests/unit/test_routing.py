"""lora.routing: unit vectors, the index as a value, what `select` refuses, and a threshold that
keeps its promise.
"""

import math
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import scipy.stats

from lora.errors import ArgumentError, ShapeError
from lora.router import LoRARouter
from lora.routing import EMPTY, Route, calibrate, candidate_of, select, unit
from lora.testing.plugin import requirement
from lora.testing.tolerance import gamma


def index_of(**exemplars):
    index = EMPTY
    for name, rows in exemplars.items():
        index = index.with_candidate(candidate_of(name, np.atleast_2d(np.array(rows, float))))
    return index


def likely(trials, share, tail=1e-6):
    """The counts that a binomial variable keeps to, but for `tail` on either side."""
    law = scipy.stats.binom(trials, share)
    return range(int(law.ppf(tail)), int(law.isf(tail)) + 1)


@requirement("R4.8")
def test_unit_vectors_keep_their_direction_at_the_ends_of_the_range():
    rows = unit(np.array([[3e-320, 4e-320], [3e307, -4e307], [5e-324, 0], [0, 0], [-0.0, 0]]))
    assert np.allclose(rows[0], [0.6, 0.8], rtol=0, atol=5e-4)  # 3e-320 has 13 significant bits
    assert np.allclose(rows[1], [0.6, -0.8], rtol=0, atol=gamma(8, rows.dtype))
    assert rows[2:].tolist() == [[1, 0], [0, 0], [0, 0]]


@requirement("R4.8")
def test_unit_vectors_are_the_same_whatever_the_memory_order():
    rows = np.random.default_rng(0).standard_normal((40, 33))
    expected = unit(rows)
    assert np.array_equal(unit(np.asfortranarray(rows)), expected)
    assert np.array_equal(unit(rows[::2]), expected[::2])


@requirement("R4.9", "R4.12")
def test_an_index_is_a_value():
    one = index_of(a=[1, 0])
    two = one.with_candidate(candidate_of("b", np.array([[0.0, 1]])))
    assert [*map(list, (one.candidates, two.candidates))] == [["a"], ["a", "b"]]
    assert list(two.without("a").candidates) == ["b"]
    with pytest.raises(TypeError):
        two.candidates["c"] = None
    assert two.without("unknown").candidates == two.candidates


@requirement("R4.9")
def test_an_index_keeps_each_candidates_rows_together():
    index = index_of(b=[[1, 0], [0, 1]], a=[[2, 0]], c=[[0, 3], [0, -1], [5, 0]])
    assert index.rows.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1], [0, -1], [1, 0]]
    assert index.starts.tolist() == [0, 1, 3]


ONE, ZEROS = index_of(a=[1, 0]), np.zeros(2)
SHAPE = r"embeddings: expected shape \(n, d\), found shape"
FINITE = "embeddings: expected finite numbers, found NaN or an infinity"
TOP_K = "top_k: expected an integer >= 1, found"
WIDTH = r"query .* shape \(2,\), found shape \(3,\)"
TAGS = "tags: expected a collection of str, found"


@requirement("R4.1", "R4.3", "R4.4", "R4.5", "R4.8", "R4.13")
@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        *((ShapeError, SHAPE, partial(unit, np.zeros(shape))) for shape in [(), (3,), (1, 2, 3)]),
        *(
            (ArgumentError, FINITE, partial(unit, [[0, x]]))
            for x in (math.nan, math.inf, -math.inf)
        ),
        (ArgumentError, "'x': expected at least one", partial(candidate_of, "x", np.empty((0, 2)))),
        *(
            (ArgumentError, TOP_K, partial(select, ZEROS, ONE, top_k=top_k))
            for top_k in (0, -1, 1.0, True, "1", None)
        ),
        *(
            (
                ArgumentError,
                "threshold: .* finite",
                partial(select, ZEROS, ONE, threshold=threshold),
            )
            for threshold in (math.nan, math.inf, -math.inf, 1j, np.complex64(0.5), "0.5")
        ),
        (ShapeError, WIDTH, partial(select, np.zeros(3), ONE)),
        *(
            (ArgumentError, TAGS, partial(call, tags=tags))
            for tags in ("python", [1])
            for call in (partial(select, ZEROS, ONE), partial(candidate_of, "a", np.ones((1, 2))))
        ),
    ],
)
def test_what_is_no_embedding_count_threshold_or_tags_is_refused(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


@requirement("R4.5")
@pytest.mark.parametrize("kind", [Decimal, Fraction, np.float16, np.float32])
def test_a_threshold_of_another_kind_of_number_is_that_number(kind):
    index = index_of(half=[0.5, 0.75**0.5])
    query = np.array([1.0, 0.0])
    assert select(query, index, threshold=kind(0.5)) == [Route("half", 0.5)]
    assert select(query, index, threshold=kind(0.5625)) == []


@requirement("R4.13")
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_nearer_candidate_without_the_tag_takes_no_place_among_the_best(threshold):
    far = candidate_of("far", np.array([[0.6, 0.8]]), tags=["law"])
    index = index_of(near=[1, 0], nearer=[1, 0]).with_candidate(far)
    query = np.array([1.0, 0.0])
    assert select(query, index, threshold=threshold, tags=["law"]) == [Route("far", 0.6)]


DRAWS = 600


@requirement("R4.11")
def test_the_rate_holds_for_new_sources_with_a_group_a_source_and_not_with_a_group_a_query():
    rng, by_source, by_query = np.random.default_rng(0), 0, 0
    for draw in range(DRAWS):
        # Queries of one source resemble each other, and high scorers are many.
        effects = rng.normal(size=40)
        pooled = [effect + rng.normal(0, 0.1, 1 + 20 * (effect > 0)) for effect in effects[1:]]
        new = effects[0] + rng.normal(0, 0.1)
        whole = calibrate({str(i): group for i, group in enumerate(pooled)}, 0.1, seed=draw)
        singles = {str(i): [score] for i, score in enumerate(np.concatenate(pooled))}
        assert (whole.groups, whole.rate) == (39, 4 / 40)
        by_source += new < whole.threshold
        by_query += new < calibrate(singles, 0.1, seed=draw).threshold
    assert by_source in likely(DRAWS, 0.1)
    assert by_query > likely(DRAWS, 0.1)[-1]


def routed_by(known, groups):
    """A router that knows some examples, and by source the names of queries that it embeds."""
    rows = [*known.reshape(-1, 8), *groups.reshape(-1, 8)]
    vectors = {f"{position}": row for position, row in enumerate(rows)}
    texts, (count, each, _), start = [*vectors], groups.shape, known[..., 0].size
    router = LoRARouter(lambda texts: np.array([vectors[text] for text in texts]))
    router.register_virtual_candidate("known", texts[:start])
    queries = texts[start:]
    return router, {f"{i}": queries[i * each : (i + 1) * each] for i in range(count)}


def router_scores(groups, known):
    """Source -> the scores of its queries, as a router gives them that knows some examples."""
    router, sources = routed_by(known, groups)
    return {
        source: [routes[0].score for routes in router.select_many(queries)]
        for source, queries in sources.items()
    }


@requirement("R4.11")
def test_a_split_by_source_keeps_the_rate_of_a_router_and_a_random_split_does_not():
    rng, draws, by_source, at_random = np.random.default_rng(0), DRAWS // 3, 0, 0
    for draw in range(draws):
        # Sources differ from each other by more than the queries of one source.
        centres = np.array([4.0, *[0] * 7]) + rng.normal(size=(41, 1, 8))
        *_, new = groups = centres + rng.normal(0, 0.3, (41, 6, 8))
        known, rest, first, last = groups[:20], groups[20:40], groups[:40, :3], groups[:40, 3:]
        whole = calibrate(router_scores(rest, known), 0.1, seed=draw).threshold
        mixed = calibrate(router_scores(last, first), 0.1, seed=draw).threshold
        by_source += router_scores(new[None, :1], known)["0"][0] < whole
        at_random += router_scores(new[None, :1], first)["0"][0] < mixed
    assert by_source in likely(draws, 0.1)
    assert at_random > likely(draws, 0.1)[-1]


@requirement("R4.11")
def test_a_threshold_keeps_its_rate_under_the_rule_that_its_scores_are_of():
    """Of 39 sources it is the fourth lowest score: three are missed, by another rule's more."""
    rng = np.random.default_rng(0)
    centre = np.array([4.0, *[0] * 7])
    known, rest = (centre + rng.normal(size=(count, 1, 8)) for count in (20, 39))
    router, sources = routed_by(known, rest)
    queries = [query for (query,) in sources.values()]
    best = {
        "select": [routes[0].score for routes in router.select_many(queries)],
        "decide": [decision.best.score for decision in router.decide_many(queries)],
    }
    for rule, scores in best.items():
        threshold = calibrate({q: [s] for q, s in zip(queries, scores, strict=True)}, 0.1).threshold
        missed = {
            "select": sum(not routes for routes in router.select_many(queries, 1, threshold)),
            "decide": sum(d.kind != "routes" for d in router.decide_many(queries, threshold)),
        }
        assert missed[rule] == 3  # the fourth score is the threshold, and routes
        assert missed["decide"] > 3 or rule == "decide"


@requirement("R4.11")
@pytest.mark.parametrize("groups", [1, 2, 9, 99, 999, 4999])
def test_the_interval_is_the_beta_laws(groups):
    scores = {str(i): [i] for i in range(groups)}
    for k in (1, groups):
        calibration = calibrate(scores, k / (groups + 1))
        expected = scipy.stats.beta(k, groups + 1 - k).ppf([0.05, 0.95])
        assert calibration.interval == pytest.approx(expected, rel=0, abs=0.51e-6)


@requirement("R4.11")
def test_a_rate_next_to_one_takes_the_largest_score():
    assert calibrate({"a": [1.0], "b": [2.0]}, math.nextafter(1, 0)).threshold == 2.0


@requirement("R4.11")
@pytest.mark.parametrize(
    ("name", "bad"),
    [("bad", []), ("bad", [math.nan]), ("bad", [0.5, math.inf]), (None, [0.5]), (7, [0.5])],
)
def test_groups_without_finite_scores_or_a_name_are_refused(name, bad):
    message = "scores: expected finite scores in every group, by its name"
    for scores in ({**{str(i): [0.0] for i in range(99)}, name: bad}, dict.fromkeys([name], bad)):
        with pytest.raises(ArgumentError, match=message):
            calibrate(scores, 0.1)
