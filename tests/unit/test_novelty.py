"""Novelty by example: real foreign text, calibration on new sources, odd input."""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lora.engine import ArrowEngine
from lora.errors import ArgumentError, ShapeError, StateError
from lora.evolution.novelty import Alarm, Detector, Signals, fit, signals_of, topics
from lora.routing import EMPTY, Calibration, candidate_of
from lora.testing.plugin import requirement
from lora.training.data import docstring_pairs

PACKAGES = Path(sysconfig.get_paths()["purelib"])
LOW, HIGH = (Calibration(threshold, 1, 0.5, (0.0, 1.0)) for threshold in (-1.0, 0.0))


def licence_sentences():
    """First sentences of the paragraphs of the licences of what is installed, no two alike."""
    sentences = {
        " ".join(paragraph.split()).split(". ")[0]
        for path in sorted(PACKAGES.rglob("LICENSE*"))
        if path.is_file()
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="ignore"))
    }
    return sorted(text for text in sentences if 40 <= len(text) <= 300)


@pytest.fixture(scope="module")
def scores():
    """Signals against large standard modules: of their own, another library's, licences' text."""
    engine, rng = ArrowEngine.from_pretrained(None), np.random.default_rng(0)
    pairs = docstring_pairs()

    def some(texts, count):
        return [texts[i] for i in rng.permutation(len(texts))[:count]]

    groups = pairs.table["group"].to_pylist()
    sizes = Counter(groups)
    known = [q for q, group in zip(pairs.queries, groups, strict=True) if sizes[group] >= 100]
    known = some(known, 520)
    sentences = {
        "known": known[450:],
        "library": some(docstring_pairs(PACKAGES / "networkx").queries, 70),  # torch needs it
        "licences": some(licence_sentences(), 70),
    }
    index = EMPTY.with_candidate(candidate_of("python", engine.encode(known[:450])))
    return {name: signals_of(engine.encode(texts), index) for name, texts in sentences.items()}


@pytest.mark.slow
@requirement("R18.1")
@pytest.mark.parametrize("foreign", ["library", "licences"])
def test_real_foreign_text_is_told_from_text_of_a_known_skill(scores, foreign):
    detector = fit({f"query {i}": [signals] for i, signals in enumerate(scores["known"][:40])})
    novel, familiar = ([detector.score(s) for s in scores[side]] for side in (foreign, "known"))
    # The chance that a foreign query scores below a known one: the area under the ROC curve.
    assert np.less.outer(novel, familiar).mean() >= 0.90


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
        kinds = np.array([detector.judge(s).kind for _ in range(40) for s in source()])
        rates.append([(kinds == "novel").mean(), (kinds != "known").mean()])
    for share, asked in zip(np.mean(rates, axis=0), (0.1, 0.3), strict=True):
        # Of the threshold, and of the fresh sources.
        error = np.sqrt(asked * (1 - asked) * (1 / 30 + 1 / 40) / 60)
        assert asked / 2 < share < asked + 4 * error


@requirement("R18.1")
def test_scores_between_the_thresholds_have_a_name():
    detector = Detector((0.5, 0.5), (0.1, 0.1), LOW, HIGH)
    kinds = [detector.judge(Signals(x, 1.0)).kind for x in (0.39, 0.41, 0.49, 0.5, 0.9)]
    assert kinds == ["novel", "unsure", "unsure", "known", "known"]
    kinds = [detector.judge(Signals(0.9, margin)).kind for margin in (0.39, 0.41, 0.51)]
    assert kinds == ["novel", "unsure", "known"]
    assert detector.score(Signals(0.45, 1.0)) == pytest.approx(-0.5)


@requirement("R18.1")
def test_known_queries_that_are_all_alike_are_no_division_by_zero():
    detector = fit({f"{i}": [Signals(1.0, 2.0)] for i in range(10)}, rate=0.2, doubt=0.4)
    assert detector.judge(Signals(1.0, 2.0)).kind == "known"
    assert detector.judge(Signals(0.99, 2.0)).kind == "novel"


@requirement("R18.1")
def test_signals_queries_and_detectors_are_checked():
    with pytest.raises(StateError, match="at least one known skill"):
        signals_of(np.eye(2), EMPTY)
    with pytest.raises(ShapeError, match="width 3, found width 2"):
        signals_of(np.eye(3), EMPTY.with_candidate(candidate_of("a", np.eye(2))))
    for value in (float("nan"), float("inf"), None, "0.5"):
        for values in ((value, 0.5), (0.5, value)):
            with pytest.raises(ArgumentError, match="a finite number"):
                Signals(*values)
    with pytest.raises(ArgumentError, match="novel's threshold"):
        Detector((0.5, 0.5), (0.1, 0.1), HIGH, LOW)
    for step in (0.0, float("nan")):
        for steps in ((0.1, step), (step, 0.1)):
            with pytest.raises(ArgumentError, match="step"):
                Detector((0.5, 0.5), steps, LOW, LOW)


ENOUGH = {f"{i}": [Signals(0.5, 0.5)] for i in range(50)}
NUMBERS = [{"rate": 0.0}, {"rate": 0.5, "doubt": 0.4}, {"doubt": 1.0}, {"rate": "x"}]
NUMBERS += [{"seed": -1}, {"seed": 0.5}]


@requirement("R18.1")
@pytest.mark.parametrize(
    ("known", "options"),
    [*((ENOUGH, options) for options in NUMBERS)]
    + [
        (few, {})
        for few in ({}, {"a": []}, {"a": [Signals(0.5, 0.5)]}, {**ENOUGH, "a": []}, [], None)
    ]
    + [(ENOUGH | {"a": []}, {"seed": seed}) for seed in range(9)]
    + [(ENOUGH | odd, {}) for odd in ({1: [Signals(0.5, 0.5)]}, {"a": 5}, {"a": [0.5]})],
)
def test_calibration_checks_its_numbers_and_needs_sources(known, options):
    with pytest.raises(ArgumentError):
        fit(known, **options)


@requirement("R18.1")
def test_the_name_of_a_source_may_be_any_text():
    renamed = {f"{name}\0": signals for name, signals in ENOUGH.items()}
    assert fit(renamed) == fit(ENOUGH)


@requirement("R18.2")
def test_an_alarm_and_topics_check_their_numbers():
    wrong = [(0, 3, 0), (2, 1, 0), (2, 3, 2), (2, 3, -1), (1.0, 3, 0), (True, 3, 0)]
    for numbers in wrong:
        with pytest.raises(ArgumentError, match="release < k <= n"):
            Alarm(*numbers)
    assert topics(np.empty((0, 3))) == ()
    for threshold in (1.1, float("nan"), True, "x"):
        with pytest.raises(ArgumentError, match="threshold"):
            topics(np.eye(2), threshold)
    with pytest.raises(ArgumentError, match="finite"):
        topics([[np.nan, 1.0]])


@requirement("R18.2")
def test_noise_does_not_ring_and_a_new_topic_does():
    rng = np.random.default_rng(0)
    noise, topic, rang = Alarm(), Alarm(), 0
    for _ in range(2000):
        noise = noise.after("novel" if rng.random() < 0.05 else "known")
        rang += noise.ringing
    for _ in range(20):
        topic = topic.after("novel" if rng.random() < 0.5 else "known")
    assert rang / 2000 < 0.05
    assert topic.ringing
