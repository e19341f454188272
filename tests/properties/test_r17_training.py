"""R17: the loss, the metric, batches without false negatives, and interruptions."""

import contextlib
import math
import tempfile
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tokenizers import Tokenizer, models, pre_tokenizers

from lora.engine import ArrowEngine
from lora.errors import DataError, StateError
from lora.models.encoder import EncoderConfig, InferenceCore
from lora.testing.plugin import requirement
from lora.testing.tolerance import gamma
from lora.training.data import Pairs
from lora.training.losses import contrastive
from lora.training.schedules import SCHEDULES
from lora.training.train import LoRATrainer, Settings, batches_of, evaluate

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
TOPICS = 5
STEPS = 8


def core(seed=0, topics=8, shape=(32, 2, 2, 64, 8), **options):
    """A tiny random encoder over a vocabulary of ``a0 … d7``."""
    names = [f"{letter}{i}" for letter in "abcd" for i in range(topics)]
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = InferenceCore(EncoderConfig(len(vocabulary), *shape, **options), tokenizer)
    return encoder.requires_grad_(requires_grad=False).eval()


def toy_pairs(topics=8):
    """Pairs in which ``a<i> c<j>`` asks for ``b<i> d<j>``."""
    places = [(i, j) for i in range(topics) for j in range(topics)]
    return Pairs.of(
        {"query": f"a{i} c{j}", "positive": f"b{i} d{j}", "group": f"{i}{j}"} for i, j in places
    )


def bits(result):
    """All that a training gave, for comparing bit for bit."""
    factors = sorted(result.card.weights.items())
    card = [(key, pair.A.tobytes(), pair.B.tobytes(), pair.scaling) for key, pair in factors]
    return card, result.history.to_pydict(), result.metrics


class StopError(Exception):
    """Raised to end a run."""


def stop_at(stop):
    def progress(step, _total, _loss):
        torch.rand(stop)  # others draw from the global generator too
        if step == stop:
            raise StopError

    return progress


vectors = st.floats(-4, 4, width=16) | st.sampled_from([0.0, -0.0, 1.0, 1e-7])
scales = st.sampled_from([0.5, 1.0, 20.0])
LETTERS = "abcdefghijklmnop"
words = st.sampled_from(LETTERS)


@st.composite
def batches(draw, elements=vectors, least=1):
    """Two float64 arrays ``(n, d)``: queries and positives."""
    shape = draw(st.tuples(st.integers(least, 6), st.integers(1, 7)))
    return tuple(draw(hnp.arrays(np.float64, shape, elements=elements)) for _ in range(2))


def loss_of(queries, positives, scale, dtype=torch.float64):
    return mean_loss(*(torch.as_tensor(side, dtype=dtype) for side in (queries, positives)), scale)


def mean_loss(queries, positives, scale):
    """The mean over pairs of quality 1, without negatives."""
    qualities = queries.new_ones(len(queries))
    return contrastive(queries, positives, None, qualities, scale=scale).mean()


def exact_loss(queries, positives, scale):
    """The loss by its definition, one entry after another."""
    sides = [side.astype(np.longdouble) for side in (queries, positives)]
    unit = [[row / max(np.sqrt(np.sum(row * row)), 1e-12) for row in side] for side in sides]
    n, total = len(queries), np.longdouble(0)
    for i in range(n):
        for rows, others in (unit, unit[::-1]):
            logits = np.array([scale * np.sum(rows[i] * other) for other in others])
            largest = max(logits)
            total += np.log(np.sum(np.exp(logits - largest))) + largest - logits[i]
    return float(total / (2 * n))


def bound(n, d, scale, dtype):
    """Rounding of the logits (norms, quotients, products), of their softmax, and of the mean."""
    logits = 2 * scale * gamma(3 * d + 12, dtype)
    return logits + gamma(6 * n + 20, dtype) * (2 * scale + math.log(n) + 1)


@requirement("R17.1")
@given(batches(), scales, st.sampled_from([(torch.float64, F64), (torch.float32, F32)]))
def test_the_loss_is_the_mean_of_both_cross_entropies(batch, scale, types):
    dtype, precision = types
    queries, positives = (side.astype(precision).astype(np.float64) for side in batch)
    result = loss_of(queries, positives, scale, dtype)
    assert result.shape == ()
    error = bound(*batch[0].shape, scale, precision)
    assert float(result) == pytest.approx(exact_loss(queries, positives, scale), rel=0, abs=error)


@requirement("R17.1")
@given(batches(), scales, st.randoms())
def test_neither_order_nor_direction_nor_length_changes_the_loss(batch, scale, random):
    queries, positives = batch
    order = random.sample(range(len(queries)), len(queries))
    stretched = queries * [[2.0 ** random.randint(0, 9)] for _ in queries]
    error = 2 * bound(*queries.shape, scale, F64)
    loss = pytest.approx(float(loss_of(queries, positives, scale)), rel=0, abs=error)
    assert float(loss_of(queries[order], positives[order], scale)) == loss
    assert float(loss_of(positives, queries, scale)) == loss
    # Below, the smallest norm that is divided by matters.
    if np.abs(queries)[queries != 0].min(initial=1.0) > 1e-3:
        assert float(loss_of(stretched, positives, scale)) == loss


@requirement("R17.1")
@given(batches(), scales)
def test_the_loss_lies_between_perfect_separation_and_perfect_confusion(batch, scale):
    n, d = batch[0].shape
    loss, error = float(loss_of(*batch, scale)), bound(n, d, scale, F64)
    assert math.log1p((n - 1) * math.exp(-2 * scale)) - error <= loss
    assert loss <= math.log1p((n - 1) * math.exp(2 * scale)) + error


@requirement("R17.1")
@given(st.integers(1, 6), scales, st.integers(0, 4))
def test_orthogonal_pairs_reach_the_minimum_and_equal_texts_the_log_of_the_batch(n, scale, more):
    unit = np.eye(n, n + more)
    error = bound(n, n + more, scale, F64)
    best = math.log1p((n - 1) * math.exp(-scale))
    assert float(loss_of(unit, unit, scale)) == pytest.approx(best, rel=0, abs=error)
    assert float(loss_of(unit, unit, 2 * scale)) <= best + error  # a larger scale, a lower minimum
    same = np.ones((n, 3))
    assert float(loss_of(same, same, scale)) == pytest.approx(math.log(n), rel=0, abs=error)


@requirement("R17.1")
@given(batches(st.sampled_from([-2.0, -1.0, 1.0, 2.0]), least=2), st.data())
def test_the_gradient_is_the_slope_of_the_loss(batch, data):
    queries, positives = (torch.tensor(side, requires_grad=True) for side in batch)
    steps = st.sampled_from([-1.0, 0.0, 1.0])
    towards = data.draw(hnp.arrays(np.float64, batch[0].shape, elements=steps))
    mean_loss(queries, positives, 2.0).backward()
    h = gamma(1, F64) ** (1 / 3)
    for side, tensor in enumerate((queries, positives)):
        ahead, behind = ([*batch], [*batch])
        ahead[side], behind[side] = batch[side] + h * towards, batch[side] - h * towards
        slope = (exact_loss(*ahead, 2.0) - exact_loss(*behind, 2.0)) / (2 * h)
        # Of third order, for rows of length >= 1.
        error = (4 * 2.0 * math.sqrt(batch[0].size)) ** 3 * h**2
        result = float((tensor.grad * torch.tensor(towards)).sum())
        assert result == pytest.approx(slope, rel=0, abs=error)


class Lookup:
    """An encoder of known vectors."""

    def __init__(self, known):
        self.known = known

    def encode(self, texts):
        return np.array([self.known[text] for text in texts], np.float32)


signs = hnp.arrays(F32, 4, elements=st.sampled_from([-1.0, 1.0])) | st.just(np.zeros(4, F32))
"""Vectors of equal length (or none), so that every score is exact and ties abound."""


@requirement("R17.3", "R17.9")
@given(
    st.lists(st.tuples(words, words), min_size=1, max_size=12)
    | st.just([("a", letter) for letter in LETTERS]),
    st.fixed_dictionaries(dict.fromkeys(LETTERS, signs)),
    st.integers(-3, 3),
)
def test_a_rank_counts_the_distinct_positives_that_score_at_least_as_high(rows, known, power):
    result = evaluate(Lookup(known), Pairs.of(rows))
    candidates = {positive for _, positive in rows}
    ranks = []
    for query, positive in rows:
        scores = {text: known[query] @ known[text] for text in candidates}
        ranks.append(sum(score >= scores[positive] for score in scores.values()))
    n = len(rows)
    assert result.queries == n
    assert result.recall_at_1 == sum(rank == 1 for rank in ranks) / n
    assert result.recall_at_10 == sum(rank <= 10 for rank in ranks) / n
    assert result.mrr == pytest.approx(sum(1 / rank for rank in ranks) / n, rel=gamma(2 * n, F64))
    assert result.recall_at_1 <= result.mrr <= 1
    scaled = {text: vector * 2.0 ** (power * ord(text) % 3) for text, vector in known.items()}
    assert evaluate(Lookup(scaled), Pairs.of(rows)) == result  # only directions count


@requirement("R17.9")
@given(
    st.lists(st.tuples(words, words), min_size=1, max_size=5),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.data(),
)
def test_a_model_that_has_diverged_has_no_metric(rows, value, data):
    known = {word: np.ones(4, np.float32) for word in LETTERS}
    broken = data.draw(st.sampled_from([text for row in rows for text in row]))
    known[broken] = np.array([1, value, 1, 1], np.float32)
    with pytest.raises(DataError, match="finite embeddings"):
        evaluate(Lookup(known), Pairs.of(rows))


@requirement("R17.1", "R17.8")
@given(
    st.lists(st.tuples(words, words), max_size=14)
    | st.integers(0, 14).map(lambda n: [(f"q{i}", f"p{i}") for i in range(n)]),
    st.integers(2, 5),
    st.integers(0, 2**31),
    st.integers(0, 3),
)
def test_no_text_occurs_twice_in_a_batch_and_no_pair_twice_in_an_epoch(rows, size, seed, epoch):
    pairs = Pairs.of(rows)
    batches = list(batches_of(pairs, size, seed, epoch))
    places = [row for batch in batches for row in batch]
    assert len(set(places)) == len(places)
    assert set(places) <= set(range(len(rows)))
    for batch in batches:
        for i, row in enumerate(batch):
            assert not {*rows[row]} & {text for other in batch[:i] for text in rows[other]}
    sizes = [len(batch) for batch in batches]
    assert set(sizes) <= {size} or (len(sizes) == 1 and 2 <= sizes[0] < size)
    compatible = len({text for row in rows for text in row}) == sum(len({*row}) for row in rows)
    if compatible:  # nothing has to wait
        assert len(batches) == (len(rows) // size or len(rows) > 1)
    assert batches or not any(not {*a} & {*b} for i, a in enumerate(rows) for b in rows[:i])
    assert batches == list(batches_of(pairs, size, seed, epoch))


@lru_cache
def engine():
    """A tiny random encoder over a vocabulary of ``a0 … d4``."""
    return ArrowEngine(core(topics=TOPICS, shape=(8, 1, 2, 16, 4), pooler=True))


def pairs():
    return toy_pairs(TOPICS)


def trainer(options, seed=0, targets=("query", "value")):
    settings = Settings(**dict(options))
    return LoRATrainer(engine(), rank=2, seed=seed, target_modules=targets, settings=settings)


@lru_cache(64)
def uninterrupted(options, seed, targets):
    return trainer(options, seed, targets).train(pairs(), name="toy", max_steps=STEPS)


options_of_a_run = st.fixed_dictionaries(
    {
        "epochs": st.just(3),
        "batch_size": st.sampled_from([5, 8]),
        "lr": st.sampled_from([1e-30, 1e-2, 0.3]),
        "schedule": st.sampled_from(list(SCHEDULES)),
        "warmup": st.sampled_from([0.0, 0.25]),
        "clip": st.sampled_from([None, 1.0]),
        "lora_plus": st.sampled_from([1.0, 4.0]),
        "dropout": st.sampled_from([0.0, 0.4]),
        "validate_every": st.sampled_from([1, 2, 3, 20]),
        "patience": st.sampled_from([1, 2, 5]),
    }
).map(lambda options: tuple(options.items()))


FROZEN = {"epochs": 3, "batch_size": 8, "lr": 1e-30, "validate_every": 2, "patience": 2}


@requirement("R17.8", "R17.2")
@settings(max_examples=40)
@example(tuple(FROZEN.items()), 0, ("query", "value"), [6])  # killed right after it lost patience
@given(
    options_of_a_run,
    st.integers(0, 3),
    st.sampled_from([("query", "value"), "all-linear"]),
    st.lists(st.integers(1, STEPS), min_size=1, max_size=3),
)
def test_a_run_that_was_interrupted_at_any_steps_ends_with_the_same_bits(
    options, seed, targets, stops
):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "run"

        def run(progress=None):
            options_of_run = {"max_steps": STEPS, "checkpoint": checkpoint, "progress": progress}
            return trainer(options, seed, targets).train(pairs(), name="toy", **options_of_run)

        for stop in stops:
            with contextlib.suppress(StopError):
                run(stop_at(stop))
        result = run()
        assert list(Path(folder).iterdir()) == []
    whole = uninterrupted(options, seed, targets)
    assert bits(result) == bits(whole)
    assert result.card == whole.card


BASE = {"epochs": 3, "batch_size": 5, "lr": 1e-2, "validate_every": 1}


@lru_cache
def checkpoint_of_base():
    """The bytes of a checkpoint after two steps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        with contextlib.suppress(StopError):
            run = trainer(BASE, 0, "all-linear")
            run.train(pairs(), name="toy", checkpoint=path, progress=stop_at(2))
        return path.read_bytes()


@requirement("R17.8")
@given(st.data())
def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused_and_left_alone(data):
    content, options, rows = checkpoint_of_base(), dict(BASE), pairs()
    other_options = {"dropout": 0.1, "schedule": "cosine", **{key: 2 * BASE[key] for key in BASE}}
    changes = ["cut", "garbage", "seed", "rows", "order", "steps", *other_options]
    change = data.draw(st.sampled_from(changes))
    seed = data.draw(st.integers(1, 9)) if change == "seed" else 0
    steps = data.draw(st.integers(1, 99)) if change == "steps" else None
    if change == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif change == "garbage":
        content = data.draw(st.binary(max_size=64)) * data.draw(st.sampled_from([1, 99]))
    elif change == "rows":
        rows = rows.add([("one", "more")])
    elif change == "order":
        rows = rows.take([1, 0, *range(2, len(rows))])
    elif change in other_options:
        options[change] = other_options[change]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        path.write_bytes(content)
        other = trainer(options, seed, "all-linear")
        with pytest.raises(StateError, match="expected a checkpoint"):
            other.train(rows, name="toy", checkpoint=path, max_steps=steps)
        assert path.read_bytes() == content


@requirement("R17.9")
@settings(max_examples=20)
@given(options_of_a_run, st.integers(0, 3), st.sampled_from([("query", "value"), "all-linear"]))
def test_the_metric_of_a_frozen_model_does_not_move(options, seed, targets):
    frozen = tuple({**dict(options), "lr": 1e-30, "patience": 99}.items())
    result = uninterrupted(frozen, seed, targets)
    before, after = (asdict(result.metrics[when]) for when in ("before", "after"))
    assert before == after
    assert set(result.history["val_mrr"].to_pylist()) - {None} == {before["mrr"]}


@requirement("R17.3", "R17.9")
@settings(max_examples=20)
@given(options_of_a_run, st.integers(0, 3), st.randoms())
def test_training_never_learns_from_the_groups_that_validate(options, seed, random):
    blind = {**dict(options), "lr": 1e-2, "validate_every": 99}
    data = pairs()
    held_out = set(data.split(0.8, seed=seed)[1].table["group"].to_pylist())
    rows = data.table.to_pylist()
    others = [row["positive"] for row in rows if row["group"] in held_out]
    random.shuffle(others)
    changed = Pairs.of(
        {**row, "positive": others.pop()} if row["group"] in held_out else row for row in rows
    )
    one, two = (
        trainer(blind, seed).train(each, name="toy", max_steps=STEPS) for each in (data, changed)
    )
    assert one.history["loss"].to_pylist() == two.history["loss"].to_pylist()
    assert replace(one.card, name="x") == replace(two.card, name="x")
