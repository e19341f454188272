"""Options of training: losses, schedules, memory, LoRA+, rsLoRA, EWC, single events."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora.card import LoRACard, LowRank
from lora.engine import ArrowEngine
from lora.errors import (
    ArgumentError,
    BaseModelError,
    DataError,
    ShapeError,
    StateError,
    UnsupportedModelError,
)
from lora.models.adapt import adapt
from lora.testing.plugin import requirement
from lora.training.data import Pairs
from lora.training.ewc import Anchor, fisher_of, online
from lora.training.losses import LOSSES
from lora.training.online_adapter import Adaptation, LearningEvent, OnlineAdapter
from lora.training.train import AUTOCAST, LoRATrainer, Settings, evaluate
from tests.properties.test_r17_training import core
from tests.unit.test_train import DEFAULTS, StopError, bits, engine, pairs, shuffled, stop_at, train


def with_negatives(data):
    """The pairs, each with another's positive as its negative."""
    rows = data.table.to_pylist()
    return Pairs.of({**row, "negative": rows[i - 7]["positive"]} for i, row in enumerate(rows))


@requirement("R17.1")
@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_falls_and_teaches_with_and_without_negatives(loss, negatives):
    data = with_negatives(pairs()) if negatives else pairs()
    result = train(data, loss=loss, steps=60)
    losses = result.history["loss"].to_pylist()
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert result.metrics["after"].mrr > result.metrics["before"].mrr


@requirement("R17.1")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_hands_qualities_and_negatives_to_the_loss_that_is_named(loss, monkeypatch):
    calls = []
    noting = lambda *columns: calls.append(columns) or LOSSES["cosine"](*columns)  # noqa: E731
    monkeypatch.setattr("lora.training.train.LOSSES", {**dict.fromkeys(LOSSES), loss: noting})
    rows = with_negatives(pairs()).table.to_pylist()
    train(Pairs.of({**row, "quality": 0.25} for row in rows), loss=loss, steps=1)
    (queries, positives, negatives, qualities), *_ = calls
    assert queries.shape == positives.shape == negatives.shape
    assert not torch.equal(positives, negatives)
    assert qualities.tolist() == [0.25] * len(queries)


@requirement("R17.1")
@pytest.mark.parametrize("loss", ["contrastive", "triplet"])
def test_a_quality_of_zero_teaches_nothing_by_contrast(loss):
    rows = [{**row, "quality": 0.0} for row in pairs().table.to_pylist()]
    result = train(Pairs.of(rows), steps=3, loss=loss)
    assert result.history["loss"].to_pylist() == [0.0] * 3
    assert all(not pair.B.any() for pair in result.card.weights.values())


@requirement("R17.1")
@pytest.mark.parametrize("negatives", [False, True])
def test_cosine_regression_and_triplet_are_their_formulas(negatives):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 6, 4))
    query, positive, negative = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    quality, tensors = rng.random(6), [torch.tensor(side) for side in rows]
    near, similar = (query * positive).sum(1), query @ positive.T
    far = (query * negative).sum(1)
    other = far if negatives else (query * np.roll(positive, 1, axis=0)).sum(1)
    hardest = far if negatives else (similar - 9 * np.eye(6)).max(1)
    arguments = (*tensors[:2], tensors[2] if negatives else None, torch.tensor(quality))
    expected = (near - quality) ** 2 + other**2
    assert np.allclose(LOSSES["cosine"](*arguments), expected, rtol=1e-12)
    expected = quality * np.maximum(0.3 + hardest - near, 0)
    assert np.allclose(LOSSES["triplet"](*arguments), expected, rtol=1e-12)


@requirement("R17.4")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_in_parts_is_the_same_update(loss):
    whole = train(loss=loss, steps=4, seed=1)
    losses = pytest.approx(whole.history["loss"].to_pylist(), rel=1e-4)
    for accumulate in (2, 3, 8):
        parts = train(loss=loss, steps=4, seed=1, accumulate=accumulate)
        assert parts.history["loss"].to_pylist() == losses
        for key, pair in whole.card.weights.items():
            assert np.allclose(parts.card.weights[key].B, pair.B, rtol=0.02, atol=1e-4)


@requirement("R17.4")
def test_blocks_that_are_computed_again_give_the_same_bits():
    again = bits(train(steps=5, dropout=0.1, checkpointing=True))
    assert again == bits(train(steps=5, dropout=0.1))


@requirement("R17.4")
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_autocast_computes_narrow_and_comes_near(kind):
    assert {"bf16": torch.bfloat16, "fp16": torch.float16} == AUTOCAST
    exact, near = train(steps=10), train(steps=10, autocast=kind)
    losses = exact.history["loss"].to_pylist()
    assert near.history["loss"].to_pylist() != losses
    assert near.history["loss"].to_pylist() == pytest.approx(losses, rel=0.05)
    assert {pair.dtype for pair in near.card.weights.values()} == {np.dtype(np.float32)}


@requirement("R17.4")
@pytest.mark.parametrize("kind", [None, "fp16"])
def test_a_clipped_gradient_is_no_longer_than_it_may_be(monkeypatch, kind):
    """As AdamW sees it: with fp16 not the scaled one."""
    norms = []
    plain = torch.optim.AdamW.step

    def watched(self, *args, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        return plain(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(steps=3, autocast=kind)
    free, clip = list(norms), min(norms) / 3
    norms.clear()
    train(steps=3, autocast=kind, clip=clip)
    assert norms == pytest.approx([clip] * 3, rel=1e-4)
    assert min(free) > 2 * clip


CHILD = """
import ast, sys
from lora.engine import ArrowEngine
from lora.training.data import Pairs
from lora.training.train import LoRATrainer, Settings
from tests.unit.test_train import core

encoder = core(shape=(64, 24, 4, 256, 128))
text = " ".join(f"a{i % 8}" for i in range(97))
pairs = Pairs.of([(f"b{i % 8} c{i // 8} {text}", f"{text} b{i % 8} c{i // 8}") for i in range(40)])
settings = Settings(batch_size=32, validation_size=1, **ast.literal_eval(sys.argv[1]))
trainer = LoRATrainer(ArrowEngine(encoder), settings=settings)


def peak():  # getrusage tells the parent's
    lines = open("/proc/self/status").readlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


before = peak()
trainer.train(pairs, name="x", max_steps=1)
print(peak() - before)
"""


@pytest.mark.slow
@requirement("R17.4")
def test_memory_falls_with_checkpointing_and_with_parts():
    def growth(options):
        command = [sys.executable, "-c", CHILD, repr(options)]
        # What a tensor frees is free, however others lie.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(done.stdout)

    plain = growth({})
    assert growth({"checkpointing": True}) < 0.5 * plain
    assert growth({"accumulate": 8}) < 0.5 * plain


@requirement("R17.5")
def test_lora_plus_moves_b_by_its_own_rate():
    same, plus = train(steps=1), train(steps=1, lora_plus=16.0)
    for key, pair in same.card.weights.items():
        moved = np.abs(pair.B) > 1e-6
        assert np.allclose(plus.card.weights[key].B[moved], 16 * pair.B[moved], rtol=1e-3)
        assert np.array_equal(plus.card.weights[key].A, pair.A)


@requirement("R17.5")
def test_rslora_scales_by_the_root_of_the_rank():
    card, plain = train(steps=1, rslora=True).card, train(steps=1).card
    assert {pair.scaling for pair in card.weights.values()} == {card.alpha / math.sqrt(card.rank)}
    assert {pair.scaling for pair in plain.weights.values()} == {card.alpha / card.rank}


@requirement("R2.10", "R17.8")
def test_the_seed_draws_the_factors_that_a_training_starts_from():
    first, again, other = (train(steps=1, lr=1e-30, seed=seed).card for seed in (0, 0, 1))
    for key, pair in first.weights.items():
        assert np.array_equal(pair.A, again.weights[key].A)
        assert not np.array_equal(pair.A, other.weights[key].A)


@requirement("R17.7", "R17.6")
def test_a_second_task_forgets_less_of_the_first_with_what_the_first_needs():
    trainer = LoRATrainer(engine(), rank=4, settings=Settings(**DEFAULTS | {"validate_every": 50}))
    first = trainer.train(pairs(), name="first", max_steps=60).card
    anchor = trainer.anchor(first, pairs())
    fisher = torch.cat([tensor.flatten() for tensor in anchor.fisher.values()])
    assert (fisher >= 0).all()
    assert float(fisher.mean()) == pytest.approx(1.0, rel=1e-4)

    def left(**more):
        options = {"max_steps": 40, "start": first, **more}
        card = trainer.train(shuffled(pairs(), 0), name="second", **options).card
        return evaluate(adapt(engine().base, card), pairs()).mrr

    before, naive = evaluate(adapt(engine().base, first), pairs()).mrr, left()
    kept = left(ewc=(anchor, 100.0))
    assert naive < before
    assert kept > naive + 0.3 * (before - naive)
    assert left(ewc=(anchor, 0.0)) == naive


@requirement("R17.6", "R7.8")
def test_what_is_no_anchor_or_no_start_is_refused():
    one = torch.ones(2)
    with pytest.raises(ShapeError):
        Anchor({"a": one}, {"a": torch.ones(3)})
    for fisher in (-one, one * math.nan):
        with pytest.raises(ArgumentError, match="fisher"):
            Anchor({"a": one}, {"a": fisher})
    with pytest.raises(ArgumentError, match="at least one"):
        fisher_of([], {"a": one})
    with pytest.raises(ArgumentError, match="anchors of the same parameters"):
        online(Anchor({"a": one}, {"a": one}), Anchor({"a": one[:1]}, {"a": one[:1]}))
    trainer, other = LoRATrainer(engine()), LoRATrainer(engine(), rank=4)
    few = LoRACard("x", 1, 1.0, [], {})
    (key, pair), *_ = trainer.initial.weights.items()
    half = {key: LowRank(pair.A[:, :4], pair.B[:4], 2.0)}
    narrower = replace(trainer.initial, weights={**trainer.initial.weights, **half})
    stranger = LoRATrainer(ArrowEngine(core(seed=1))).initial
    for card, kind in ((few, ShapeError), (narrower, ShapeError), (stranger, BaseModelError)):
        with pytest.raises(kind, match="start"):
            trainer.train(pairs(), name="x", start=card)
        with pytest.raises(kind, match="anchor"):
            trainer.anchor(card, pairs())
    anchor = other.anchor(other.initial, pairs(), examples=2)
    with pytest.raises(ShapeError, match="ewc: anchor"):
        trainer.train(pairs(), name="x", ewc=(anchor, 1.0))
    with pytest.raises(ArgumentError, match="ewc: λ"):
        other.train(pairs(), name="x", ewc=(anchor, -1.0))
    with pytest.raises(DataError, match="at least one pair"):
        trainer.anchor(trainer.initial, [])


@requirement("R17.8")
def test_a_checkpoint_of_a_start_with_another_scaling_is_of_another_run(tmp_path):
    trainer = LoRATrainer(engine(), rank=4, settings=Settings(**DEFAULTS))
    weights = trainer.initial.weights
    scaled = {key: LowRank(pair.A, pair.B, 3.0) for key, pair in weights.items()}
    options = {"name": "x", "max_steps": 7, "checkpoint": tmp_path / "run"}
    with pytest.raises(StopError):
        trainer.train(pairs(), progress=stop_at(6), **options)
    with pytest.raises(StateError, match="another"):
        trainer.train(pairs(), start=replace(trainer.initial, weights=scaled), **options)


@requirement("R17.8", "R17.4")
def test_the_scale_of_the_loss_goes_on_where_the_checkpoint_left_it(tmp_path, monkeypatch):
    scales = []

    class Watched(torch.amp.GradScaler):
        def __init__(self, *args, **options):
            super().__init__(*args, growth_interval=2, **options)

        def update(self, *args):
            scales.append(self.get_scale())
            super().update(*args)

    monkeypatch.setattr(torch.amp, "GradScaler", Watched)
    options = {"steps": 12, "autocast": "fp16", "checkpoint": tmp_path / "run"}
    train(**options)
    whole, scales[:] = scales[:], []
    with pytest.raises(StopError):
        train(progress=stop_at(6), **options)
    train(**options)
    assert scales == [*whole[:6], *whole[5:]]  # the checkpoint is of step 5
    assert len(set(whole)) > 1


# R17.11: single events


EVENT = ("a1 c2", "b1 d2")


@requirement("R17.11")
def test_opposite_rewards_move_oppositely_by_a_bounded_step():
    start = LoRATrainer(engine(), rank=4).train(pairs(), name="x", max_steps=2).card
    steps = {}
    for reward in (1.0, -1.0, 0.25, 0.0):
        online = OnlineAdapter(engine(), pairs(), step_size=0.1, tolerance=1.0)
        online.state = Adaptation(start)
        card = online.process_learning_event(LearningEvent(*EVENT, reward)).card
        steps[reward] = [
            (getattr(card.weights[key], factor) - getattr(pair, factor)).astype(np.float64)
            for key, pair in start.weights.items()
            for factor in ("A", "B")
        ]
    for reward, moved in steps.items():
        length = math.sqrt(sum((m**2).sum() for m in moved))
        assert length == pytest.approx(0.1 * abs(reward), rel=1e-3)
        for m, up in zip(moved, steps[1.0], strict=True):
            assert np.allclose(m, reward * up, atol=1e-6)


@requirement("R17.11")
def test_events_bring_a_pair_nearer_and_are_counted():
    online = OnlineAdapter(engine(), pairs(), tolerance=1.0)

    def nearness():
        query, answer = adapt(engine().base, online.state.card).encode(list(EVENT))
        return query @ answer / np.linalg.norm(query) / np.linalg.norm(answer)

    before = nearness()
    for count in range(1, 4):
        assert online.process_learning_event(LearningEvent(*EVENT, 1.0)).steps == count
    assert nearness() > before
    assert online.state.undone == 0


@requirement("R17.11")
def test_a_step_that_worsens_the_guard_set_is_undone():
    guard = [(text, f"{text} {text} b0") for text in pairs().queries]  # the base model finds all
    online = OnlineAdapter(engine(), guard, step_size=50.0, tolerance=0.0)
    start = online.state.card
    for steps, reward in enumerate((1.0, -1.0), 1):
        state = online.process_learning_event(LearningEvent("a0 c0", "b4 d4", reward))
        assert state == online.state == Adaptation(start, steps, undone=steps)
    online.step_size = 1e-6
    state = online.process_learning_event(LearningEvent("a0 c0", "b4 d4", 1.0))
    assert (state.steps, state.undone, state.card == start) == (3, 2, False)


@requirement("R17.11")
def test_a_breakthrough_is_right_and_sure():
    for rouge, change in ((0.7, -0.1), (0.7, -0.11), (0.71, -0.1), (0.71, -0.11)):
        event = LearningEvent(*EVENT, 1.0, rouge, change)
        assert event.check_breakthrough() == ((rouge, change) == (0.71, -0.11))


@requirement("R17.11", "R7.8")
def test_an_event_that_says_nothing_is_refused():
    rewards = [("a", "b", reward) for reward in (1.1, math.nan, True)]
    for wrong in (("", "b", 1.0), ("a", " ", 1.0), *rewards, ("a", "b", 1, 2)):
        with pytest.raises(DataError, match="learning event"):
            LearningEvent(*wrong)
    for options in ({"step_size": 0}, {"tolerance": -1}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            OnlineAdapter(engine(), pairs(), **options)

    class Other:
        base = torch.nn.Linear(1, 1)

    with pytest.raises(UnsupportedModelError):
        OnlineAdapter(Other(), pairs())
