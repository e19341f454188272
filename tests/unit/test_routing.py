"""lora.routing: unit vectors, the index as a value, what `select` refuses, and a threshold that keeps its promise."""

import math

import numpy as np
import pytest
import scipy.stats

from lora.errors import ArgumentError, ShapeError
from lora.routing import EMPTY, Route, calibrate, candidate_of, select, unit
from lora.testing.plugin import requirement
from lora.testing.tolerance import gamma


def index_of(**exemplars):
    index = EMPTY
    for name, rows in exemplars.items():
        index = index.with_candidate(candidate_of(name, np.atleast_2d(np.array(rows, float))))
    return index


def likely(trials, share, tail=1e-6):
    """The counts that a binomial variable keeps to, but for a probability of `tail` on either side."""
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


@requirement("R4.8")
@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3)])
def test_embeddings_that_are_no_matrix_are_refused(shape):
    with pytest.raises(ShapeError, match=r"embeddings: expected shape \(n, d\), found shape"):
        unit(np.zeros(shape))


@requirement("R4.8")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused(bad):
    with pytest.raises(ArgumentError, match="expected finite numbers, found NaN or an infinity"):
        unit(np.array([[0, bad]]))


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


@requirement("R4.1")
def test_a_candidate_without_examples_is_refused():
    with pytest.raises(ArgumentError, match="candidate 'none': expected at least one example"):
        candidate_of("none", np.empty((0, 2)))


@requirement("R4.4")
@pytest.mark.parametrize("top_k", [0, -1, 1.0, True, "1", None])
def test_a_top_k_that_is_no_count_is_refused(top_k):
    with pytest.raises(ArgumentError, match="top_k: expected an integer >= 1, found"):
        select(np.zeros(2), index_of(a=[1, 0]), top_k=top_k)


@requirement("R4.5")
@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
def test_a_threshold_that_is_not_finite_is_refused(threshold):
    with pytest.raises(ArgumentError, match="threshold: expected a finite number, found"):
        select(np.zeros(2), index_of(a=[1, 0]), threshold=threshold)


@requirement("R4.3")
def test_a_query_of_another_width_is_refused():
    message = r"query embedding: expected shape \(2,\), found shape \(3,\)"
    with pytest.raises(ShapeError, match=message):
        select(np.zeros(3), index_of(a=[1, 0]))


@requirement("R4.13")
@pytest.mark.parametrize("tags", ["python", [1]])
def test_tags_that_are_no_collection_of_words_are_refused(tags):
    with pytest.raises(ArgumentError, match="tags: expected a collection of str, found"):
        select(np.zeros(2), index_of(a=[1, 0]), tags=tags)
    with pytest.raises(ArgumentError, match="tags: expected a collection of str, found"):
        candidate_of("a", np.ones((1, 2)), tags=tags)


@requirement("R4.13")
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_nearer_candidate_without_the_tag_takes_no_place_among_the_best(threshold):
    index = index_of(near=[1, 0], nearer=[1, 0]).with_candidate(
        candidate_of("far", np.array([[0.6, 0.8]]), tags=["law"])
    )
    query = np.array([1.0, 0.0])
    assert select(query, index, threshold=threshold, tags=["law"]) == [Route("far", 0.6)]


DRAWS = 600


def sources(rng, count, *, spread=1.0):
    """Queries of sources that differ from each other more than their own queries do, as embeddings."""
    centres = np.array([4.0, *[0] * 7]) + rng.normal(0, spread, (count, 8))
    return centres[:, None] + rng.normal(0, 0.3, (count, 6, 8))


def scores_of(groups, known):
    """Source -> scores of its queries against known examples."""
    index = index_of(known=known.reshape(-1, 8))
    return {
        f"source {number}": [select(query, index)[0].score for query in unit(queries)]
        for number, queries in enumerate(groups)
    }


@requirement("R4.11")
def test_queries_of_new_sources_fall_below_the_threshold_at_the_stated_rate_and_no_more():
    rng, triggered = np.random.default_rng(0), 0
    for draw in range(DRAWS):
        # Queries of one source resemble each other, and high scorers are many.
        effects = rng.normal(size=40)
        groups = {
            str(i): effect + rng.normal(0, 0.1, rng.integers(1, 4 + 20 * (effect > 0)))
            for i, effect in enumerate(effects[1:])
        }
        found = calibrate(groups, 0.1, seed=draw)
        assert (found.groups, found.rate) == (39, 4 / 40)
        triggered += effects[0] + rng.normal(0, 0.1) < found.threshold
    assert triggered in likely(DRAWS, 0.1)


@requirement("R4.11")
def test_a_query_a_group_instead_of_a_source_a_group_breaks_the_rate():
    rng, triggered = np.random.default_rng(0), 0
    for draw in range(DRAWS):
        effects = rng.normal(size=40)
        pooled = [effect + rng.normal(0, 0.1, 1 + 20 * (effect > 0)) for effect in effects[1:]]
        singles = {f"{i}": [score] for i, score in enumerate(np.concatenate(pooled))}
        found = calibrate(singles, 0.1, seed=draw)
        triggered += effects[0] + rng.normal(0, 0.1) < found.threshold
    assert triggered > likely(DRAWS, 0.1)[-1]


@requirement("R4.11")
def test_a_split_by_source_keeps_the_rate_of_a_router_and_a_random_split_does_not():
    rng, by_source, at_random = np.random.default_rng(0), 0, 0
    for draw in range(DRAWS // 3):
        groups = sources(rng, 40)
        (new,) = sources(rng, 1)
        whole = calibrate(scores_of(groups[20:], groups[:20]), 0.1, seed=draw)
        mixed = calibrate(scores_of(groups[:, 3:], groups[:, :3]), 0.1, seed=draw)
        by_source += scores_of(new[None, :1], groups[:20])["source 0"][0] < whole.threshold
        at_random += scores_of(new[None, :1], groups[:, :3])["source 0"][0] < mixed.threshold
    assert by_source <= likely(DRAWS // 3, 0.1)[-1]
    assert at_random > likely(DRAWS // 3, 0.1)[-1]


@requirement("R4.11")
@pytest.mark.parametrize(("groups", "rate"), [(9, 0.1), (19, 0.1), (19, 0.5), (200, 0.05)])
def test_nine_calibrations_in_ten_have_their_true_rate_in_the_stated_interval(groups, rate):
    rng, inside = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        found = calibrate({str(i): [score] for i, score in enumerate(rng.random(groups))}, rate)
        # Of uniform scores, the share below a threshold is the threshold.
        inside += found.interval[0] <= found.threshold <= found.interval[1]
    assert inside in likely(DRAWS, 0.9)


@requirement("R4.11")
@pytest.mark.parametrize("groups", [1, 2, 9, 99, 999, 4999])
def test_the_interval_is_the_beta_laws(groups):
    scores = {str(i): [i] for i in range(groups)}
    for k in (1, groups):
        found = calibrate(scores, k / (groups + 1))
        expected = scipy.stats.beta(k, groups + 1 - k).ppf([0.05, 0.95])
        assert found.interval == pytest.approx(expected, rel=0, abs=0.51e-6)


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
