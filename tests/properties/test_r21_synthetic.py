"""R21.4: synthetic data are seeded, and an answer depends on its question."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import ArgumentError
from lora.testing.plugin import requirement
from lora.training.synthetic import TASKS, synthetic_pairs

tasks, seeds = st.sampled_from(TASKS), st.integers(0, 2**32)


def words(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def found(queries, answers):
    """Share of queries of which the own answer shares at least as many words as any other."""
    shared = np.array([[len(words(q) & words(a)) for a in answers] for q in queries])
    return float((shared.diagonal() == shared.max(axis=1)).mean())


@requirement("R21.4")
@given(task=tasks, seed=seeds, count=st.integers(1, 300), fewer=st.integers(1, 300))
def test_a_seed_decides_on_the_pairs_and_fewer_are_the_first_of_more(task, seed, count, fewer):
    fewer, count = sorted((fewer, count))
    pairs, again = (synthetic_pairs(task, count, seed=seed) for _ in range(2))
    assert pairs == again
    assert pairs.take(range(fewer)) == synthetic_pairs(task, fewer, seed=seed)
    assert len(set(pairs.queries)) == count


@requirement("R21.4")
@given(task=tasks, first=seeds, second=seeds)
def test_an_answer_is_a_function_of_its_question_whatever_the_seed(task, first, second):
    rule = {}
    for seed in (first, second):
        pairs = synthetic_pairs(task, 300, seed=seed)
        for query, answer in zip(pairs.queries, pairs.positives, strict=True):
            assert rule.setdefault(query, answer) == answer
    assert len(set(rule.values())) == len(rule)  # and no two questions have one answer


@requirement("R21.4")
@given(task=tasks, seed=seeds)
def test_what_an_answer_shares_with_its_question_finds_it_and_shuffled_answers_are_not_found(
    task, seed
):
    pairs = synthetic_pairs(task, 80, seed=seed)
    shuffled = np.random.default_rng(seed).permutation(pairs.positives).tolist()
    assert found(pairs.queries, pairs.positives) > 2 * found(pairs.queries, shuffled)


@requirement("R21.4")
@given(task=tasks, seed=seeds)
def test_a_split_asks_about_things_that_were_not_trained_on(task, seed):
    train, held_out = synthetic_pairs(task, 200, seed=seed).split(0.8, seed=seed)
    assert not set(train.table["group"].to_pylist()) & set(held_out.table["group"].to_pylist())


@requirement("R21.4", "R7.8")
@pytest.mark.parametrize(
    ("task", "count", "seed"),
    [("poet", 1, 0), ("coder", 0, 0), ("coder", 10**6, 0), ("coder", 1, -1)],
)
def test_what_can_not_be_drawn_is_refused(task, count, seed):
    with pytest.raises(ArgumentError, match="expected"):
        synthetic_pairs(task, count, seed=seed)
