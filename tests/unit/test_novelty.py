"""Novelty by example: real foreign text, topics against known groups, odd input."""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lora.engine import ArrowEngine
from lora.errors import ArgumentError, ShapeError
from lora.evolution.novelty import GROUPS, NOVEL, TOPIC, novelty, similarities, topics
from lora.routing import EMPTY, candidate_of, decide, nearest, unit
from lora.testing.plugin import requirement
from lora.training.data import docstring_pairs

PACKAGES = Path(sysconfig.get_paths()["purelib"])


def licence_sentences():
    """First sentences of the paragraphs of the licences of what is installed, no two alike."""
    sentences = {
        " ".join(paragraph.split()).split(". ")[0]
        for path in sorted(PACKAGES.rglob("LICENSE*"))
        if path.is_file()
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="ignore"))
    }
    return sorted(text for text in sentences if 40 <= len(text) <= 300)


@pytest.mark.slow
@requirement("R18.1")
def test_real_text_of_known_files_is_seldom_unknown_and_foreign_topics_are_novel():
    engine, rng = ArrowEngine.from_pretrained(None), np.random.default_rng(0)
    pairs = docstring_pairs(PACKAGES / "networkx", private=True)  # torch needs it
    known, fresh = pairs.split(0.7, seed=0)
    known = known.sample(400, 0)
    licences = licence_sentences()
    texts = {"new files": fresh.sample(100, 0).queries}
    texts["licences"] = [licences[row] for row in rng.permutation(len(licences))[:100]]
    groups = known.table["group"].to_pylist()
    skill = candidate_of("networkx", engine.encode(known.queries), groups=groups)
    index = EMPTY.with_candidate(skill)
    embedded = {name: unit(engine.encode(sentences)) for name, sentences in texts.items()}
    kinds = {
        name: Counter(decide(nearest(row, index)[0], index).kind for row in rows)
        for name, rows in embedded.items()
    }
    assert kinds["new files"]["unknown"] <= 12  # 5 of 100 are meant
    assert kinds["new files"]["routes"] >= 65  # 80 are meant
    assert kinds["licences"]["unknown"] >= 80
    assert kinds["licences"]["routes"] <= 5
    levels = {
        name: [novelty(rows[start : start + TOPIC], index) for start in range(0, 100, TOPIC)]
        for name, rows in embedded.items()
    }
    assert sum(level <= NOVEL for level in levels["licences"]) >= 9
    assert sum(level <= NOVEL for level in levels["new files"]) <= 2


def skill(rng, centre, groups, each=6, name="docs"):
    """A skill whose groups are apart, and their examples near each other."""
    rows, names = [], []
    for group in range(groups):
        middle = centre + rng.normal(0, 0.3, len(centre))
        rows += [middle + rng.normal(0, 0.1, len(centre)) for _ in range(each)]
        names += [f"{group}"] * each
    return candidate_of(name, np.array(rows), groups=names)


@requirement("R18.1")
def test_a_topic_needs_ten_queries_and_twenty_groups_and_is_novel_if_it_is_elsewhere():
    rng, centre = np.random.default_rng(0), np.eye(16)[0] * 2
    index = EMPTY.with_candidate(skill(rng, centre, GROUPS))
    near, far = (at + rng.normal(0, 0.3, (TOPIC, 16)) for at in (centre, np.eye(16)[1] * 2))
    assert novelty(far, index) == 1 / (GROUPS + 1) <= NOVEL
    assert novelty(near, index) > 0.2
    assert novelty(far[:-1], index) is None
    assert novelty(far, EMPTY) is None
    assert novelty(far, EMPTY.with_candidate(skill(rng, centre, GROUPS - 1))) is None
    with_own = index.with_candidate(skill(rng, np.eye(16)[1] * 2, GROUPS, name="law"))
    assert novelty(far, with_own) > 0.2


@requirement("R18.1")
def test_known_topics_are_seldom_novel():
    rng, centre = np.random.default_rng(0), np.eye(16)[0] * 2
    wrong = 0
    for _ in range(200):
        index = EMPTY.with_candidate(skill(rng, centre, 24, each=TOPIC))
        topic = skill(rng, centre, 1, each=TOPIC).exemplars
        wrong += novelty(topic, index) <= NOVEL
    assert wrong <= 0.05 * 200 + 4 * 3.1  # 5 % are meant, and 4 deviations


@requirement("R18.2")
def test_topics_check_their_numbers():
    assert topics(np.empty((0, 3))) == ()
    for threshold in (1.1, float("nan"), True, "x"):
        with pytest.raises(ArgumentError, match="threshold"):
            topics(np.eye(2), threshold)
    with pytest.raises(ArgumentError, match="finite"):
        topics([[np.nan, 1.0]])
    with pytest.raises(ShapeError, match="width 2, found width 3"):
        similarities(np.eye(2), np.eye(3))
