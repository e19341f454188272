"""R17.2 and R17.6: schedules rise, fall and end; EWC with the exact Fisher is joint training."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lora.testing.plugin import requirement
from lora.training.ewc import Anchor, fisher_of, normalized, online, penalty
from lora.training.losses import LOSSES
from lora.training.schedules import SCHEDULES, schedule_of

KINDS = st.sampled_from(sorted(SCHEDULES))
WARMUPS = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999])


def rates(kind, steps, warmup, lr=1.0):
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr}])
    schedule, result = schedule_of(optimizer, kind, steps, warmup=warmup), []
    for _ in range(steps):
        result.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return result


@requirement("R17.2")
@given(KINDS, st.integers(1, 60), WARMUPS)
def test_a_schedule_rises_to_its_peak_then_never_rises_again(kind, steps, warmup):
    result = rates(kind, steps, warmup)
    peak = int(np.argmax(result))
    assert all(0 <= rate <= 1 + 1e-12 for rate in result)
    assert all(a <= b + 1e-12 for a, b in pairwise(result[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(result[peak:]))
    if kind != "one-cycle":
        assert peak == min(round(warmup * steps), steps - 1)
        assert result[peak] == pytest.approx(1.0)


@requirement("R17.2")
@given(KINDS, st.integers(4, 60), WARMUPS, st.floats(1e-6, 10))
def test_a_schedule_scales_with_its_peak(kind, steps, warmup, lr):
    scaled = [lr * rate for rate in rates(kind, steps, warmup)]
    assert rates(kind, steps, warmup, lr) == pytest.approx(scaled, rel=1e-9)


@requirement("R17.2")
@given(st.integers(2, 60))
def test_each_schedule_is_the_one_it_is_called(steps):
    third = -(-steps // 3)
    shapes = {
        "constant": lambda _: 1.0,
        "linear": lambda i: 1 - i / steps,
        "cosine": lambda i: (1 + math.cos(math.pi * i / steps)) / 2,
        "exponential": lambda i: 0.01 ** (i / steps),
        "step": lambda i: 0.1 ** (i // third),
    }
    for kind, shape in shapes.items():
        exact = [shape(i) for i in range(steps)]
        assert rates(kind, steps, 0.0) == pytest.approx(exact, rel=1e-6, abs=1e-9), kind


@st.composite
def regressions(draw):
    """Two linear regressions on orthogonal features: inputs ``(n, d)`` and targets, float64."""
    d = draw(st.integers(1, 4))
    tasks = []
    for _ in range(2):
        scales = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=d, max_size=d))
        x = torch.diag(torch.tensor(scales, dtype=torch.float64))
        y = draw(st.lists(st.floats(-3, 3), min_size=d, max_size=d))
        tasks.append((x, torch.tensor(y, dtype=torch.float64)))
    return tasks


def solved(x, y):
    """A minimiser of ½ Σ (y - x θ)²."""
    return torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]


@requirement("R17.6")
@given(regressions())
def test_with_the_exact_fisher_on_orthogonal_features_ewc_is_joint_training(tasks):
    """Second loss plus penalty, λ = 1, has the gradient of the sum of both losses."""
    (x1, y1), (x2, y2) = tasks
    theta = solved(x1, y1)
    start = theta.clone().requires_grad_()
    # The exact Fisher of a Gaussian of variance 1: residuals of 1 and -1, equally likely.
    predictions = [(row * start).sum() for row in x1]
    examples = [(p - (p.detach() + sign)) ** 2 / 2 for p in predictions for sign in (1.0, -1.0)]
    fisher = {name: tensor * len(x1) for name, tensor in fisher_of(examples, {"w": start}).items()}
    assert torch.allclose(fisher["w"], (x1**2).sum(0))
    anchor = Anchor({"w": theta}, fisher)
    both = solved(torch.cat([x1, x2]), torch.cat([y1, y2]))
    for point in (torch.zeros_like(theta), both, theta + 1.0):
        at = point.clone().requires_grad_()
        first, second = (((y - x @ at) ** 2).sum() / 2 for x, y in tasks)
        (ewc,) = torch.autograd.grad(
            second + penalty({"w": at}, anchor, 1.0), at, retain_graph=True
        )
        (joint,) = torch.autograd.grad(first + second, at)
        assert torch.allclose(ewc, joint, atol=1e-9)


TENSORS = st.lists(st.floats(0, 4, width=32), min_size=3, max_size=3).map(torch.tensor)


@requirement("R17.6")
@given(TENSORS, TENSORS, TENSORS, st.floats(0, 1))
def test_the_online_anchor_is_the_newest_place_and_a_decayed_sum(a, b, theta, decay):
    merged = online(Anchor({"w": a}, {"w": a}), Anchor({"w": theta}, {"w": b}), decay)
    assert torch.equal(merged.params["w"], theta)
    assert torch.allclose(merged.fisher["w"], decay * a + b)
    if decay == 1.0:
        both = penalty({"w": theta + 1}, merged, 2.0)
        assert torch.allclose(both, (a + b).sum())


@requirement("R17.6")
@given(TENSORS, st.sampled_from([0.0, 1e-3, 7.0]))
@example(torch.tensor([0.0, 0.0, 1e-45]), 1e-3)
def test_a_normalised_fisher_forgets_its_scale(fisher, scale):
    one, other = normalized({"w": fisher})["w"], normalized({"w": fisher.double() * scale})["w"]
    assert torch.allclose(one.double(), other, rtol=1e-4) or not scale
    assert not fisher.any() or float(one.mean()) == pytest.approx(1.0, rel=1e-4)


@requirement("R17.6")
@given(st.integers(1, 5))
def test_repeating_the_examples_changes_no_fisher(times):
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = [(w * torch.tensor(row)).sum() ** 2 for row in ([1.0, 0.0], [0.5, -1.0])]
    repeated = fisher_of(losses * times, {"w": w})["w"]
    assert torch.allclose(repeated, fisher_of(losses, {"w": w})["w"])


@requirement("R17.1")
@given(st.sampled_from(sorted(LOSSES)), st.integers(2, 5), st.integers(0, 99), st.booleans())
def test_a_loss_is_of_directions_alone_and_of_pairs_in_any_order(kind, n, seed, negatives):
    rng = torch.Generator().manual_seed(seed)
    q, p, x = (torch.randn(n, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    quality = torch.rand(n, generator=rng, dtype=torch.float64)
    x = x if negatives else None
    result = LOSSES[kind](q, p, x, quality)
    assert result.shape == (n,)
    assert bool((result >= 0).all())
    scaled = LOSSES[kind](q * 3, p * 0.5, None if x is None else x * 7, quality)
    assert torch.allclose(result, scaled, atol=1e-9)
    order = torch.randperm(n, generator=rng)
    if kind != "cosine" or negatives:  # whose stand-in is the next pair's
        moved = LOSSES[kind](q[order], p[order], None if x is None else x[order], quality[order])
        assert torch.allclose(result[order], moved, atol=1e-9)
