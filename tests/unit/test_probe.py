"""The probe by example: real text, ablation, models of other makes, messages."""

import pickle
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

import lora
from lora.engine import ArrowEngine
from lora.errors import ArgumentError, LoRAError, ShapeError, TargetError, UnsupportedModelError
from lora.evolution.probe import (
    SCORES,
    LayerChange,
    WeightMap,
    WeightMapProbe,
    changes,
    hot_zones,
    rank_correlation,
    ranking,
    scores_of,
    squares,
    turns,
    wanda,
)
from lora.testing.plugin import requirement

TEXTS = """\
The cat slept on the warm windowsill all afternoon.
Interest rates rose by a quarter of a point in March.
How do I reverse a linked list in Python?
Add the flour slowly while stirring the butter.
The treaty was signed after three years of negotiation.
A photon has no rest mass.
She missed the last train and walked home in the rain.
Which vaccines does an infant need in the first year?
The function returns None when the key is missing.
Rust checks the lifetime of every reference when it compiles.
""".splitlines()


class Block(nn.Module):
    """Adds a product to its input; gives a tuple, as older Hugging Face layers do, if asked to."""

    def __init__(self, width, *, pair=False):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.pair = pair

    def forward(self, hidden_states):
        out = hidden_states + self.dense(hidden_states)
        return (out, None) if self.pair else out


class Letters(nn.Module):
    """Embeds each letter, runs the blocks, averages; its head is never called."""

    def __init__(self, *, width=4, blocks=3, pair=False, dtype=torch.float32, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Embedding(128, width)
            self.blocks = nn.ModuleList(Block(width, pair=pair) for _ in range(blocks))
            self.few = nn.ModuleList([nn.Dropout(0.5)])
            self.head = nn.Linear(width, width)
            self.to(dtype)

    def encode(self, texts):
        rows = []
        for text in texts:
            x = self.table(torch.tensor([ord(letter) for letter in text], dtype=torch.long))
            for block in self.blocks:
                x = block(hidden_states=x)[0] if block.pair else block(x)
            x = self.few[0](x)
            rows.append(x.mean(0))
        return torch.stack(rows)


@lru_cache
def real(folder):
    """What a probe of MiniLM finds, and what it reported meanwhile."""
    steps, engine = [], ArrowEngine.from_pretrained(folder)
    probe = WeightMapProbe(engine.base, on_step=lambda *step: steps.append(step))
    return engine, probe.probe(TEXTS), steps


# ---- real text


@requirement("R15.4")
def test_on_real_text_the_report_holds_all_scores_and_their_rank_correlations(model_folder):
    _, result, steps = real(model_folder)
    count = len(TEXTS)
    assert steps[:count] == [("text", position, count) for position in range(1, count + 1)]
    assert steps[count:] == [(f"encoder.layer.{index}", index + 1, 6) for index in range(6)]
    assert [row.name for row in result.blocks] == [f"encoder.layer.{index}" for index in range(6)]
    assert all(getattr(row, score) > 0 for row in result.blocks for score in SCORES)
    # On this model only influence tells how much is lost without a block; means of weights mislead.
    correlations = result.correlations
    lost = [row.ablation for row in result.blocks]
    assert correlations == {
        score: rank_correlation([getattr(row, score) for row in result.blocks], lost)
        for score in ("magnitude", "wanda", "influence")
    }
    assert correlations["influence"] > 0.5
    assert max(correlations["magnitude"], correlations["wanda"]) < -0.5
    assert hot_zones(scores_of(result.blocks, "influence"), 0.3) == ("encoder.layer.5",)


@requirement("R15.4")
def test_ablation_is_what_the_embeddings_lose_when_a_block_is_replaced_by_identity(model_folder):
    class Identity(nn.Module):
        def forward(self, x, mask):
            return x

    engine, result, _ = real(model_folder)
    whole = engine.encode(TEXTS).astype(np.float64)
    without = lora.adapt(engine.base, ())
    without.encoder.layer[4] = Identity()
    cut = without.encode(TEXTS).astype(np.float64)
    cosine = (whole * cut).sum(1) / np.linalg.norm(whole, axis=1) / np.linalg.norm(cut, axis=1)
    assert result.blocks[4].ablation == pytest.approx(1 - cosine.mean(), rel=1e-9)


@requirement("R15.1", "R15.4")
def test_every_linear_that_runs_has_its_scores_and_one_that_never_runs_has_none(model_folder):
    engine, result, _ = real(model_folder)
    assert len(result.layers) == 36
    ran = {n: m for n, m in engine.base.named_modules() if isinstance(m, nn.Linear)}
    assert set(ran) - {row.name for row in result.layers} <= {"pooler.dense"}
    for row in result.layers:
        expected = ran[row.name].weight.double().abs().mean().item()
        assert row.magnitude == pytest.approx(expected, rel=1e-12)
        assert row.influence is row.ablation is None
    layers = WeightMapProbe(Letters()).probe(["ab"]).layers
    assert {row.name for row in layers} == {f"blocks.{i}.dense" for i in range(3)}


# ---- the model that is probed


@requirement("R15.1")
@pytest.mark.parametrize("texts", [["ab", "c"], ["ab", "é" * 3]], ids=["works", "fails half way"])
def test_the_model_is_never_touched_and_no_gradient_is_needed(texts):
    model = Letters().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe = WeightMapProbe(model)
    if "c" in texts:  # without dropout, as if it were serving
        assert probe.probe(texts) == WeightMapProbe(Letters().eval()).probe(texts)
    else:
        with pytest.raises(IndexError):
            probe.probe(texts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_an_adapted_model_is_probed_as_it_computes():
    model = Letters()
    pair = lora.LowRank(np.ones((4, 1), np.float32), np.ones((1, 4), np.float32), 5.0)
    adapted = lora.adapt(model, lora.LoRACard("docs", 1, 5.0, ["1.dense"], {"1.dense": pair}))
    result = WeightMapProbe(adapted).probe(["abc", "d"])
    assert result == WeightMapProbe(lora.fold(adapted)).probe(["abc", "d"])
    assert ranking(scores_of(result.blocks, "magnitude"))[0] == "blocks.1"
    assert result.blocks[0] != result.blocks[1]


def test_blocks_that_take_keywords_and_give_tuples_are_measured_and_ablated_alike():
    plain, pairs = (WeightMapProbe(Letters(pair=pair)).probe(["abc", "d"]) for pair in (0, 1))
    assert plain == pairs
    assert all(row.ablation > 0 for row in plain.blocks)


def test_a_bfloat16_model_is_scored_in_float64():
    model = Letters(dtype=torch.bfloat16)
    (row, *_) = WeightMapProbe(model, blocks=["blocks.0"]).probe(["ab"], ablation=False).layers
    expected = model.blocks[0].dense.weight.double().abs().mean().item()
    assert row.magnitude == pytest.approx(expected, rel=1e-12)


def test_blocks_may_be_named_and_a_blocks_scores_are_means_over_all_its_weights():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = (2, 6), (6, 2), (2, 2)
            self.up, self.down, self.mix = (nn.Linear(*size, bias=False) for size in sizes)
            self.up.weight.data.fill_(1.0)
            self.down.weight.data[:] = torch.tensor([[3.0] * 6, [5.0] * 6])
            self.mix.weight.data[:] = torch.tensor([[7.0, 0.0], [0.0, 21.0]])

        def forward(self, x):
            return self.mix(self.down(self.up(x)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.uneven, self.tail = Uneven(), nn.Linear(2, 2)

        def encode(self, texts):
            return self.tail(self.uneven(torch.ones(len(texts), 2)))

    result = WeightMapProbe(Model(), blocks=("uneven", "tail")).probe(["a"])
    up, down, mix, tail = result.layers
    assert (up.magnitude, down.magnitude, mix.magnitude) == (1.0, 4.0, 7.0)
    assert (up.wanda, down.wanda, mix.wanda) == (1.0, 8.0, (7 * 36 + 21 * 60) / 4)
    assert result.blocks[0].magnitude == (12 * 1 + 12 * 4 + 4 * 7) / 28
    assert result.blocks[0].wanda == pytest.approx((12 * 1 + 12 * 8 + 4 * mix.wanda) / 28)
    # (1, 1) becomes (1, 5) · 252.
    assert result.blocks[0].influence == pytest.approx(1 - 6 / 26**0.5 / 2**0.5)
    assert result.blocks[1].magnitude == tail.magnitude


def test_block_1_is_not_block_10():
    result = WeightMapProbe(Letters(blocks=11)).probe(["ab"], ablation=False)
    assert [row.magnitude for row in result.blocks] == [row.magnitude for row in result.layers]


# ---- values


def test_a_report_is_a_value_and_a_table():
    result = WeightMapProbe(Letters()).probe(["abc", "d"])
    assert pickle.loads(pickle.dumps(result)) == result  # noqa: S301 - our own
    assert hash(result) == hash(WeightMapProbe(Letters()).probe(["abc", "d"]))
    table = result.table()
    assert table.column_names == ["kind", "name", *SCORES]
    assert table["kind"].to_pylist() == ["layer"] * 3 + ["block"] * 3
    assert table["influence"].type == pa.float64()
    assert table["influence"].null_count == 3
    assert table["ablation"].to_pylist()[3:] == [row.ablation for row in result.blocks]
    # Without ablation, there is nothing to correlate with.
    result = WeightMapProbe(Letters()).probe(["abc", "d"], ablation=False)
    assert result.correlations == {}
    assert scores_of(result.blocks, "ablation") == {}
    assert result.table()["ablation"].null_count == 6
    assert WeightMap((), ()).table().num_rows == 0


def test_a_zero_vector_is_orthogonal_to_all_but_another():
    x = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    assert turns(x[:1], x[1:2]).mean == 0
    assert turns(x[:1], x[2:]).mean == turns(x[2:], x[:1]).mean == 1
    assert turns(x[2:], -x[2:]).mean == 2


def test_a_share_is_the_decimal_number_that_was_written():
    ten = {f"layer.{index}": 0.1 for index in range(10)}
    assert hot_zones(ten, 0.9) == tuple(f"layer.{index}" for index in range(9))
    assert hot_zones(ten, 1) == tuple(ten)
    assert hot_zones({"a": 0.0, "b": 0.0}, 1.0) == hot_zones({}, 0.5) == ()
    assert hot_zones({"a": 0.0, "b": 1e-300}, 1.0) == ("b",)


def test_layers_of_two_models_are_ranked_as_weights_or_modules_alike():
    model, tuned = Letters(), Letters()
    tuned.blocks[1].dense.weight.data += torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0]))
    steps = []
    (row,) = result = changes(model, tuned, 1, on_step=lambda *step: steps.append(step))
    assert (row.name, row.change) == ("blocks.1.dense", pytest.approx((5 / 16) ** 0.5, rel=1e-6))
    assert row.held == pytest.approx(0.8, rel=1e-5)
    assert steps[-1][1:] == (4, 4)
    arrays = ({n: t.numpy() for n, t in m.state_dict().items()} for m in (model, tuned))
    assert changes(*arrays, 1) == result
    weights = {"weight": np.zeros((1, 2))}, {"weight": np.array([[3.0, 4.0]])}
    expected = LayerChange("", pytest.approx(12.5**0.5), pytest.approx(1.0))
    assert changes(*weights, target_modules=[""]) == (expected,)


# ---- errors


def broken(name, value):
    model = Letters()
    model.get_parameter(name).data.view(-1)[0] = value
    return model


class Odd(nn.Module):
    """A model of one block that changes what it is given into something else."""

    def __init__(self, block, given):
        super().__init__()
        self.blocks, self.given = nn.ModuleList([block]), given

    def encode(self, texts):
        return self.blocks[0](self.given)


class Record(nn.Module):
    """A block that gives a dictionary."""

    def forward(self, x):
        return {"x": x}


def probe(encoder, blocks=None, *, ablation=True):
    return lambda: WeightMapProbe(encoder, blocks).probe(["a"], ablation=ablation)


def weights(after, before=np.eye(2), rank=8, name="q.weight"):  # noqa: B008 - never changed
    return lambda: changes({"q.weight": before}, {name: after}, rank)


NAN, INF = float("nan"), float("inf")
NARROW = Odd(nn.Linear(3, 2), torch.ones(1, 3))
RECORDS = Odd(Record(), torch.ones(1, 3))
ERRORS = {
    ArgumentError: {
        "texts: expected at least one": lambda: WeightMapProbe(Letters()).probe([]),
        "texts: expected a sequence of str": lambda: WeightMapProbe(Letters()).probe("abc"),
        "blocks: expected a sequence of str, found 3": probe(Letters(), 3),
        r"blocks: expected a sequence of str, found \[\[": probe(Letters(), [["blocks.0"]]),
        "'blocks.1": probe(broken("blocks.1.dense.weight", NAN), ablation=False),
        "'blocks.2'.*finite act": probe(broken("blocks.2.dense.bias", INF), ablation=False),
        "'blocks.2'.*found NaN": probe(broken("blocks.2.dense.bias", NAN)),
        "weight: .*finite number": lambda: wanda(np.array([[np.inf, 1]]), np.zeros(2)),
        "at least one token": lambda: squares(np.ones((0, 3))).mean,
        r"\(0, 1\], found 0": lambda: hot_zones({"a": 1.0}, 0),
        r"\(0, 1\], found 1.01": lambda: hot_zones({"a": 1.0}, 1.01),
        "share: .*finite": lambda: hot_zones({"a": 1.0}, NAN),
        "'a'": lambda: hot_zones({"a": NAN}, 0.5),
        "-0.5": lambda: hot_zones({"a": 1.0, "b": -0.5}, 0.5),
        "magnitude": lambda: scores_of([], "name"),
        ">= 1": weights(-np.eye(2), rank=0),
        "q.weight.*finite": weights(np.full((2, 2), NAN)),
        "differ": weights(np.eye(2)),
    },
    UnsupportedModelError: {
        "a torch module": probe("model"),
        "encode": probe(nn.Linear(2, 2)),
        "'blocks.0'.*dict": probe(RECORDS),
    },
    TargetError: {
        r"\['x.1'\]": probe(Letters(), ["blocks.0", "x.1"]),
        "found none": probe(Letters(), []),
        "few.0": probe(Letters(blocks=0), None),
        "'few.0'": probe(Letters(), "few.0"),
        "head": probe(Letters(), ["head"]),
        "weight": weights(np.eye(2), name="k.weight"),
    },
    ShapeError: {
        r"'blocks.0'.*\(1, 3\), found \(1, 2\)": probe(NARROW),
        "weight: .*matrix": lambda: wanda(np.ones(3)),
        "not empty": lambda: wanda(np.ones((0, 3))),
        "query": lambda: wanda(np.ones((2, 3)), np.ones(2), where="query"),
        "input's shape": lambda: turns(np.ones((2, 3)), np.ones((3, 2))),
        r"channel, found \(\)": lambda: squares(np.float64(1)),
        r"channel, found \(3, 0\)": lambda: turns(np.ones((3, 0)), np.ones((3, 0))),
        r"\(1,\), found \(2,\)": lambda: squares(np.ones((1, 1))) + squares(np.ones((1, 2))),
        "1 layers": lambda: rank_correlation([1.0], []),
        "q.weight": weights(np.eye(3)),
    },
}


@requirement("R7.8")
@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [(kind, *case) for kind, cases in ERRORS.items() for case in cases.items()],
)
def test_bad_input_is_named(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert isinstance(caught.value, LoRAError)
