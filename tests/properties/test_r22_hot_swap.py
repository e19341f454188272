"""R22: another set of adapters goes live at once and whole, and the one before it comes back."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora.card import AdapterSet, LoRACard, LowRank
from lora.errors import ShapeError, StateError
from lora.models.adapt import adapt
from lora.models.manager import HISTORY, LoRAManager
from lora.testing.plugin import requirement

INPUT = torch.arange(6.0).reshape(2, 3)


def base_model():
    """Three Linears over whole numbers, so that every set has its own exact output."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    for parameter in model.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape).float()
    return model.requires_grad_(False)


def card(name, size=3):
    """A card for all three layers, so that a mixture of two cards would show."""
    factors = (
        np.full((size, 1), len(name), np.float32),
        np.full((1, size), ord(name[0]) - 96, np.float32),
    )
    return LoRACard(
        name, 1, 1.0, ["0", "1", "2"], {str(layer): LowRank(*factors) for layer in range(3)}
    )


SETS = [
    AdapterSet(),
    AdapterSet(card("a")),
    AdapterSet(card("b")),
    AdapterSet([card("a"), card("cc")]),
    AdapterSet(card("b")) * 2,
]
sets = st.sampled_from(SETS)


@requirement("R22.1")
@given(first=sets, second=sets)
def test_a_prepared_set_goes_live_by_one_assignment_and_not_before(assignments, first, second):
    base = base_model()
    manager = LoRAManager(base)
    manager.prepare(first)
    manager.swap()
    live, computed = manager.state, manager.model(INPUT)
    manager.prepare(second)
    assert (manager.active, manager.model) == (first, live.active.model)
    ready = manager.state.prepared.model
    with assignments() as assigned:
        manager.swap()
    assert assigned == [manager.state]
    assert (manager.active, manager.model) == (second, ready)
    assert torch.equal(manager.model(INPUT), adapt(base, second)(INPUT))
    assert manager.state.prepared is None
    assert live.active.adapters == first
    assert torch.equal(live.active.model(INPUT), computed)
    with assignments() as assigned:
        manager.rollback()
    assert assigned == [manager.state]


@requirement("R22.2")
@given(line=st.lists(sets, max_size=HISTORY + 3), back=st.integers(0, HISTORY + 4))
def test_rolling_back_retraces_the_swaps_as_far_as_the_history_goes(line, back):
    base = base_model()
    manager = LoRAManager(base)
    went = [(manager.active, manager.model)]
    for adapters in line:
        manager.prepare(adapters)
        manager.swap()
        went.append((manager.active, manager.model))
    kept = min(len(line), HISTORY)
    for step in range(1, min(back, kept) + 1):
        manager.rollback()
        assert manager.active == went[-1 - step][0]
        assert manager.model is went[-1 - step][1]
    if back > kept:
        state = manager.state
        with pytest.raises(StateError, match="rollback"):
            manager.rollback()
        assert manager.state is state


@requirement("R22.2", "R22.1")
@given(first=sets, second=sets, extra=st.booleans())
def test_rolling_back_undoes_a_swap_whatever_was_applied_since(first, second, extra):
    manager = LoRAManager(base_model())
    for adapters in (first, second):
        manager.prepare(adapters)
        manager.swap()
    if extra:
        manager.apply_card(card("zzz"))
    manager.rollback()
    assert manager.active == first
    manager.prepare(second)
    manager.swap()
    assert manager.active == second


@requirement("R22.1")
def test_there_is_nothing_to_swap_before_something_is_prepared_or_after_it_went_live():
    manager = LoRAManager(base_model())
    with pytest.raises(StateError, match="call prepare first"):
        manager.swap()
    manager.prepare(card("a"))
    manager.swap()
    with pytest.raises(StateError, match="call prepare first"):
        manager.swap()
    assert list(manager.active) == ["a"]


@requirement("R22.1")
def test_a_set_that_does_not_fit_leaves_what_was_prepared_ready():
    manager = LoRAManager(base_model())
    manager.prepare(card("a"))
    state = manager.state
    with pytest.raises(ShapeError, match="module '0'"):
        manager.prepare(card("b", size=4))
    assert manager.state is state
    manager.swap()
    assert list(manager.active) == ["a"]


@requirement("R22.1", "R22.2")
def test_readers_see_one_set_or_another_and_never_a_mixture():
    base = base_model()
    valid = {repr(adapters): adapt(base, adapters)(INPUT) for adapters in SETS}
    outputs = list(valid.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    manager, stop, wrong, seen = LoRAManager(base), threading.Event(), [], set()

    def read():
        while not stop.is_set():
            active = manager.state.active
            key = repr(active.adapters)
            seen.add(key)
            if not torch.equal(active.model(INPUT), valid[key]):
                wrong.append(key)
            loose = manager.model(INPUT)
            if not any(torch.equal(loose, output) for output in outputs):
                wrong.append(loose)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(300):
            manager.prepare(SETS[turn % len(SETS)])
            manager.swap()
            if turn % 3 == 0:
                manager.rollback()
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong
    assert len(seen) > 1
