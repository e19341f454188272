"""Novelty by example: real foreign text against a known skill, calibration that holds on new sources, odd input."""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lora.engine import ArrowEngine
from lora.errors import ArgumentError, ShapeError, StateError
from lora.evolution.data import docstring_pairs
from lora.evolution.novelty import Alarm, Detector, Novelty, Signals, fit, signals_of, topics
from lora.routing import EMPTY, Calibration, candidate_of
from lora.testing.plugin import requirement

PACKAGES = Path(sysconfig.get_paths()["purelib"])
FLAT = Calibration(-1.0, 1, 0.5, (0.0, 1.0))


@pytest.fixture(scope="module")
def engine():
    return ArrowEngine.from_pretrained(None)


def licence_sentences():
    """First sentences of the paragraphs of the licences of what is installed, no two alike."""
    found = {
        " ".join(paragraph.split()).split(". ")[0]
        for path in sorted(PACKAGES.rglob("LICENSE*"))
        if path.is_file()
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="ignore"))
    }
    return sorted(text for text in found if 40 <= len(text) <= 300)


@pytest.fixture(scope="module")
def scores(engine):
    """Signals against the standard library's large modules: of other queries about them, of another library, of licences."""
    rng = np.random.default_rng(0)
    pairs = docstring_pairs()
    sizes = Counter(pairs.table["group"].to_pylist())
    known = [
        query
        for query, group in zip(pairs.queries, pairs.table["group"].to_pylist(), strict=True)
        if sizes[group] >= 100
    ]
    known = [known[i] for i in rng.permutation(len(known))]
    foreign = docstring_pairs(PACKAGES / "networkx").queries  # which torch brings along
    licences = licence_sentences()
    sentences = {
        "exemplars": known[:450],
        "known": known[450:520],
        "library": [foreign[i] for i in rng.permutation(len(foreign))[:70]],
        "licences": [licences[i] for i in rng.permutation(len(licences))[:70]],
    }
    vectors = {name: engine.encode(texts) for name, texts in sentences.items()}
    index = EMPTY.with_candidate(candidate_of("python", vectors.pop("exemplars")))
    return {name: signals_of(rows, index) for name, rows in vectors.items()}


@requirement("R18.1")
@pytest.mark.parametrize("foreign", ["library", "licences"])
def test_real_foreign_text_is_told_from_text_of_a_known_skill(scores, foreign):
    detector = fit({f"query {i}": [signals] for i, signals in enumerate(scores["known"][:40])})
    found, familiar = ([detector.score(s) for s in scores[side]] for side in (foreign, "known"))
    # The chance that a foreign query scores below a known one: the area under the ROC curve.
    assert np.less.outer(found, familiar).mean() >= 0.90


@requirement("R18.1")
def test_at_most_the_rate_that_was_asked_for_is_falsely_novel_on_new_sources():
    rng = np.random.default_rng(0)

    def source():
        """Queries of one source resemble each other: most of the spread is between sources."""
        centre = rng.normal(0.6, 0.1, 2)
        return [Signals(*(centre + rng.normal(0, 0.02, 2)).tolist()) for _ in range(8)]

    rates = []
    for _ in range(60):
        detector = fit({f"{i}": source() for i in range(50)}, rate=0.1, doubt=0.3)
        fresh = [detector.judge(signals).kind for _ in range(40) for signals in source()]
        rates.append(
            [
                np.mean([kind == "novel" for kind in fresh]),
                np.mean([kind != "known" for kind in fresh]),
            ]
        )
    for share, asked in zip(np.mean(rates, axis=0), (0.1, 0.3), strict=True):
        error = np.sqrt(
            asked * (1 - asked) * (1 / 30 + 1 / 40) / 60
        )  # of the threshold, and of the fresh sources
        assert asked / 2 < share < asked + 4 * error


@requirement("R18.1")
def test_scores_between_the_thresholds_have_a_name():
    detector = Detector((0.5, 0.5), (0.1, 0.1), FLAT, Calibration(0.0, 1, 0.5, (0.0, 1.0)))
    kinds = [detector.judge(Signals(x, 1.0)).kind for x in (0.39, 0.41, 0.49, 0.5, 0.9)]
    assert kinds == ["novel", "unsure", "unsure", "known", "known"]
    assert [detector.judge(Signals(0.9, m)).kind for m in (0.39, 0.41, 0.51)] == [
        "novel",
        "unsure",
        "known",
    ]
    told = detector.judge(Signals(0.45, 1.0, "python"))
    assert isinstance(told, Novelty)
    assert told.score == pytest.approx(-0.5)
    assert told.signals.nearest == "python"


@requirement("R18.1")
def test_known_queries_that_are_all_alike_are_no_division_by_zero():
    detector = fit({f"{i}": [Signals(1.0, 2.0)] for i in range(10)}, rate=0.2, doubt=0.4)
    assert detector.judge(Signals(1.0, 2.0)).kind == "known"
    assert detector.judge(Signals(0.99, 2.0)).kind == "novel"


@requirement("R18.1")
def test_an_engine_that_knows_nothing_is_told_so():
    with pytest.raises(StateError, match="at least one known skill"):
        signals_of(np.eye(2), EMPTY)


@requirement("R18.1")
def test_queries_of_another_width_are_refused():
    with pytest.raises(ShapeError, match="width 3, found width 2"):
        signals_of(np.eye(3), EMPTY.with_candidate(candidate_of("a", np.eye(2))))


@requirement("R18.1")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5"])
def test_signals_that_are_no_numbers_are_refused(value):
    for values in ((value, 0.5), (0.5, value)):
        with pytest.raises(ArgumentError, match="a finite number"):
            Signals(*values)


@requirement("R18.1")
@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.0},
        {"rate": 0.5, "doubt": 0.4},
        {"doubt": 1.0},
        {"rate": "x"},
        {"seed": -1},
        {"seed": 0.5},
    ],
)
def test_calibration_checks_its_numbers(options):
    with pytest.raises(ArgumentError):
        fit({f"{i}": [Signals(0.5, 0.5)] for i in range(50)}, **options)


@requirement("R18.1")
@pytest.mark.parametrize("known", [{}, {"a": []}, {"a": [Signals(0.5, 0.5)]}])
def test_calibration_needs_sources(known):
    with pytest.raises(ArgumentError):
        fit(known)


@requirement("R18.1")
def test_a_detector_is_consistent():
    high = Calibration(0.0, 1, 0.5, (0.0, 1.0))
    with pytest.raises(ArgumentError, match="novel's threshold"):
        Detector((0.5, 0.5), (0.1, 0.1), high, FLAT)
    with pytest.raises(ArgumentError, match="step"):
        Detector((0.5, 0.5), (0.1, 0.0), FLAT, FLAT)


@requirement("R18.2")
@pytest.mark.parametrize(
    "numbers", [(0, 3, 0), (2, 1, 0), (2, 3, 2), (2, 3, -1), (1.0, 3, 0), (True, 3, 0)]
)
def test_an_alarm_checks_its_numbers(numbers):
    with pytest.raises(ArgumentError, match="release < k <= n"):
        Alarm(*numbers)


@requirement("R18.2")
def test_noise_does_not_ring_and_a_new_topic_does():
    rng = np.random.default_rng(0)
    noise, topic = Alarm(), Alarm()
    rang = 0
    for _ in range(2000):
        noise = noise.after("novel" if rng.random() < 0.05 else "known")
        rang += noise.ringing
    for _ in range(20):
        topic = topic.after("novel" if rng.random() < 0.5 else "known")
    assert rang / 2000 < 0.05
    assert topic.ringing


@requirement("R18.2")
def test_topics_check_what_they_are_given():
    assert topics(np.empty((0, 3))) == ()
    for threshold in (1.1, float("nan"), True, "x"):
        with pytest.raises(ArgumentError, match="threshold"):
            topics(np.eye(2), threshold)
    with pytest.raises(ArgumentError, match="finite"):
        topics([[np.nan, 1.0]])
