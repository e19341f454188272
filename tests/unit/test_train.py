"""The trainer by example: presets, stopping, killed processes, what is learned and what is not."""

import math
import os
import signal
import subprocess
import sys
import time
from functools import lru_cache
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora.engine import ArrowEngine
from lora.errors import (
    ArgumentError,
    BaseModelError,
    DataError,
    LoRAError,
    MissingPackageError,
    StateError,
    TargetError,
    UnsupportedModelError,
)
from lora.interop.peft import export_peft
from lora.models.adapt import adapt
from lora.models.encoder import InferenceCore, pad
from lora.testing.plugin import requirement
from lora.testing.tolerance import gamma
from lora.training.data import Pairs, docstring_pairs
from lora.training.train import PRESETS, LoRATrainer, Settings, batches_of, evaluate
from tests.properties.test_r17_training import StopError, bits, core, stop_at
from tests.properties.test_r17_training import toy_pairs as pairs

TOPICS = 8
F64 = np.dtype(np.float64)


@lru_cache
def engine():
    return ArrowEngine(core())


def shuffled(data, seed):
    """The same queries with the positives of others."""
    rows, order = data.table.to_pylist(), np.random.default_rng(seed).permutation(len(data))
    positives = [rows[other]["positive"] for other in order]
    return Pairs.of({**row, "positive": text} for row, text in zip(rows, positives, strict=True))


DEFAULTS = {"epochs": 100, "batch_size": 8, "lr": 1e-2, "validate_every": 5, "patience": 99}


def train(data=None, *, seed=0, targets=("query", "value"), steps=30, name="toy", **options):
    run = {key: options.pop(key, None) for key in ("checkpoint", "progress")}
    settings = Settings(**DEFAULTS | options)
    trainer = LoRATrainer(engine(), rank=4, seed=seed, target_modules=targets, settings=settings)
    return trainer.train(pairs() if data is None else data, name=name, max_steps=steps, **run)


def measured(result):
    return [value for value in result.history["val_mrr"].to_pylist() if value is not None]


# R17.3: settings, presets, stopping, the best


@requirement("R17.3")
def test_the_presets_are_what_they_are_called():
    figures = {name: (each.epochs, each.lr, each.schedule) for name, each in PRESETS.items()}
    assert figures == {"quick": (1, 0.005, "constant"), "stable": (5, 0.0005, "cosine")}
    assert all(preset.share == Settings().share == 0.8 for preset in PRESETS.values())
    assert LoRATrainer(engine(), settings="quick").settings == PRESETS["quick"]
    assert LoRATrainer(engine()).settings == Settings()
    with pytest.raises(TypeError):
        PRESETS["quick"] = Settings()


BAD = {
    "epochs": (0, True, 1.5),
    "batch_size": (1,),
    "accumulate": (0,),
    "validate_every": (0,),
    "patience": (0,),
    "validation_size": (0,),
    "lr": (0.0, -1e-3, math.nan, math.inf),
    "lora_plus": (0.0,),
    "clip": (0.0,),
    "warmup": (1.0, -0.1),
    "schedule": ("polynomial",),
    "loss": ("mse",),
    "autocast": ("int8",),
}


@requirement("R17.3", "R17.4", "R7.8")
@pytest.mark.parametrize(("name", "value"), [(n, value) for n in BAD for value in BAD[n]])
def test_settings_that_mean_nothing_are_refused_by_name(name, value):
    with pytest.raises(ArgumentError, match=f"settings: {name}"):
        Settings(**{name: value})


@requirement("R17.1", "R17.3")
def test_a_trainer_that_cannot_train_is_refused_when_it_is_made():
    class Other(nn.Module):
        def encode(self, texts):
            return np.zeros((len(texts), 2), np.float32)

    with pytest.raises(UnsupportedModelError, match=r"SentenceTransformer, or .*, found Other"):
        LoRATrainer(ArrowEngine(Other()))
    with pytest.raises(ArgumentError, match="'stable'\\] or a Settings, found 'fast'"):
        LoRATrainer(engine(), settings="fast")
    with pytest.raises(TargetError, match="nothing_here"):
        LoRATrainer(engine(), target_modules=("nothing_here",))
    for seed in (-1, 1.5, True, None):
        with pytest.raises(ArgumentError, match="seed"):
            LoRATrainer(engine(), seed=seed)


@requirement("R17.1", "R17.3")
def test_data_that_cannot_be_trained_on_are_refused():
    one_group = [{"query": f"a{i}", "positive": "b0", "group": "g"} for i in range(8)]
    for few in ([], [("a0 c0", "b0 d0")], one_group):
        with pytest.raises(DataError, match="at least two groups"):
            train(Pairs.of(few))
    with pytest.raises(DataError, match="at least two different pairs, found 1"):
        train(Pairs.of([("a0", "b0"), ("a1", "b1")]))
    for steps in (0, -1, 1.5, True):
        with pytest.raises(ArgumentError, match="max_steps"):
            train(steps=steps)
    with pytest.raises(ArgumentError, match="dropout"):
        train(dropout=1.0)
    with pytest.raises(ArgumentError, match="share"):
        train(share=1.0)
    with pytest.raises(DataError, match="at least one pair"):
        evaluate(engine(), Pairs.of([]))


@requirement("R17.3")
def test_validations_come_at_their_interval_and_at_the_end():
    history = train(steps=13, validate_every=5).history
    steps, scores, recalls = (history[k] for k in ("step", "val_mrr", "val_recall_at_1"))
    assert steps.filter(scores.is_valid()).to_pylist() == [5, 10, 13]
    assert recalls.is_valid() == scores.is_valid()
    for size, queries in ((256, 13), (4, 4)):  # at most `validation_size` of the 13 pairs
        assert train(steps=1, validation_size=size).metrics["after"].queries == queries


@requirement("R17.3")
def test_training_stops_when_patience_validations_in_a_row_were_no_better():
    frozen = train(steps=99, lr=1e-30, validate_every=3, patience=4)
    assert len(frozen.history) == 3 * (1 + 4)
    options = {"steps": 60, "targets": "all-linear", "lr": 2e-2, "seed": 1}
    scores = measured(train(**options))  # goes up and down
    for patience in (1, 2, 3):
        best, worse, expected = -1.0, 0, 0
        while worse < patience and expected < len(scores):
            worse = 0 if scores[expected] > best else worse + 1
            best = max(best, scores[expected])
            expected += 1
        assert measured(train(**options, patience=patience)) == scores[:expected]


@requirement("R17.3")
def test_the_card_is_the_best_one_seen_and_not_the_last():
    result = train(steps=60, targets="all-linear", lr=3e-2)  # too much: it learns, then collapses
    scores = measured(result)
    assert scores[-1] < max(scores)
    assert result.metrics["after"].mrr == max(scores)
    upto = 5 * (scores.index(max(scores)) + 1)
    assert bits(train(steps=upto, targets="all-linear", lr=3e-2))[0] == bits(result)[0]
    validation = pairs().split(0.8, seed=0)[1]
    learned = evaluate(adapt(engine().base, result.card), validation)
    assert learned == result.metrics["after"]


@requirement("R17.3")
def test_the_learning_rate_is_constant_or_falls_along_a_cosine():
    assert train(steps=9).history["lr"].to_pylist() == [1e-2] * 9
    cosine = train(steps=9, schedule="cosine").history["lr"].to_pylist()
    expected = [1e-2 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    assert cosine == pytest.approx(expected, rel=gamma(50, F64), abs=0)


@requirement("R17.2")
def test_the_learning_rate_rises_first_and_falls_over_the_steps_that_are_left():
    rates = train(steps=4, schedule="linear", warmup=0.5, lr=0.3).history["lr"].to_pylist()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.15], rel=gamma(50, F64), abs=0)


@requirement("R17.3")
def test_an_epoch_takes_each_pair_at_most_once_and_the_next_one_in_another_order():
    history = train(steps=None, epochs=2, batch_size=10).history
    assert history["epoch"].to_pylist() == [1] * 5 + [2] * 5  # 51 pairs to train on
    data = Pairs.of([(f"q{i}", f"p{i}") for i in range(50)])
    batches = [batches_of(data, 10, *key) for key in ((0, 0), (0, 1), (1, 0))]
    orders = {tuple(row for batch in epoch for row in batch) for epoch in batches}
    assert len(orders) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


# R17.1, R17.9: what is learned


@requirement("R17.1")
def test_one_epoch_trains_and_the_loss_told_is_the_one_before_the_update():
    one = train(steps=None, epochs=1, batch_size=30)
    assert len(one.history) == 1
    assert all(np.any(pair.B != 0) for pair in one.card.weights.values())
    frozen = train(steps=1, batch_size=30, lr=1e-30)
    assert one.history["loss"].to_pylist() == frozen.history["loss"].to_pylist()


@requirement("R17.1")
def test_the_first_step_moves_b_alone_and_by_the_learning_rate():
    start = LoRATrainer(engine(), rank=4).initial
    result = train(steps=1)
    for module, pair in result.card.weights.items():
        assert np.array_equal(pair.B, np.clip(pair.B, -1.0001e-2, 1.0001e-2))
        # Adam's first step is the sign of the gradient, and A's gradient is zero while B is.
        assert np.abs(pair.B).max() == pytest.approx(1e-2, rel=1e-4)
        assert np.array_equal(pair.A, start.weights[module].A)


@requirement("R17.1", "R17.9")
def test_the_base_model_the_generator_and_the_engine_are_as_before():
    encoder = core()
    encoder.train()
    own_engine, state = ArrowEngine(encoder), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    settings = Settings(batch_size=8, dropout=0.5)
    LoRATrainer(own_engine, settings=settings).train(pairs(), name="toy", max_steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())
    assert all(module.training for module in encoder.modules())
    assert own_engine.manager.list_cards() == {}


@requirement("R17.1")
def test_the_card_says_what_it_is_and_fits_the_base_it_was_trained_on():
    settings = Settings(batch_size=8)
    trainer = LoRATrainer(engine(), rank=4, alpha=2.0, settings=settings, base_model="toy/base")
    options = {"name": "docs", "metadata": {"description": "d"}, "max_steps": 2}
    card = trainer.train(pairs(), **options).card
    assert (card.name, card.rank, card.alpha) == ("docs", 4, 2.0)
    assert card.target_modules == ("query", "value")
    assert (card.metadata, card.base_model) == ({"description": "d"}, "toy/base")
    assert {pair.scaling for pair in card.weights.values()} == {0.5}
    assert len(card.weights) == 4
    texts = ["a0 c0", "b1 d1"]
    adapted = engine().encode_with_lora(texts, card).embeddings
    assert not np.array_equal(adapted, engine().encode(texts))
    with pytest.raises(BaseModelError, match="toy/base"):
        adapt(core(seed=1), card)
    assert trainer.train(pairs(), **options).card == card  # it starts anew, not from the first


@requirement("R17.9")
def test_true_labels_teach_what_holds_for_held_out_data_and_shuffled_ones_do_not():
    known, held_out = pairs().split(0.8, seed=7)
    base = evaluate(engine(), held_out)
    right, misled = (
        evaluate(adapt(engine().base, card), held_out)
        for card in (
            train(data, steps=100, validate_every=100).card for data in (known, shuffled(known, 1))
        )
    )
    assert base.mrr < 0.5
    assert right.mrr > 0.9
    assert misled.mrr < 0.5


@requirement("R17.9")
def test_the_loss_is_a_function_of_the_model():
    data = Pairs.of({"query": f"a{i}", "positive": f"b{i}", "group": f"{i // 4}"} for i in range(8))
    options = {"share": 0.5, "batch_size": 4, "steps": 20}
    frozen, learning = (
        train(data, **options, lr=lr).history["loss"].to_pylist() for lr in (1e-30, 1e-2)
    )
    # One batch, in any order.
    assert frozen == pytest.approx([frozen[0]] * 20, rel=gamma(1000, np.dtype(np.float32)))
    assert learning[0] == frozen[0]
    assert learning[-1] < frozen[0] / 2


@requirement("R17.1", "R17.9")
@pytest.mark.parametrize(
    ("steps", "message"),
    [(1, "evaluate: expected finite embeddings"), (9, r"step \d: expected a finite loss")],
)
def test_a_training_that_diverges_says_so_without_a_warning(steps, message):
    with pytest.raises(DataError, match=f"{message}.* lower the learning rate"):
        train(steps=steps, lr=1e10, targets="all-linear", validate_every=99)


@pytest.fixture(scope="module")
def real(model_folder):
    """MiniLM, held-out pairs, and two short trainings, with true and with shuffled labels."""
    mini = ArrowEngine.from_pretrained(model_folder, device="cpu")
    rng = np.random.default_rng(0)
    known, held_out = (
        part.take(sorted(rng.permutation(len(part))[:size].tolist()))
        for part, size in zip(docstring_pairs().split(0.8, seed=0), (400, 120), strict=True)
    )
    settings = Settings(epochs=9, batch_size=16, lr=4e-3, validation_size=16)
    results = {
        label: LoRATrainer(mini, settings=settings).train(data, name=label, max_steps=steps)
        for label, data, steps in (("true", known, 12), ("shuffled", shuffled(known, 0), 6))
    }
    return mini, held_out, results


@pytest.mark.slow
@requirement("R17.1", "R17.9")
def test_minilm_learns_from_true_labels_and_not_from_shuffled_ones(real):
    mini, held_out, results = real
    base = evaluate(mini, held_out)
    true, shuffled = (
        evaluate(adapt(mini.base, results[label].card), held_out) for label in ("true", "shuffled")
    )
    assert true.mrr > base.mrr + 0.01
    assert shuffled.mrr < base.mrr
    card, modules = results["true"].card, [f"encoder.layer.{i}.attention.self" for i in range(6)]
    assert set(card.weights) == {f"{m}.{part}" for m in modules for part in ("query", "value")}
    assert card.num_params == 12 * 2 * 384 * 8


@pytest.mark.slow
# PEFT reads the one, and leaves adapter_config.json open.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@requirement("R17.1", "R23.2")
def test_a_trained_card_gives_in_peft_on_the_hugging_face_model_what_it_gives_here(
    real, tmp_path, model_folder
):
    from peft import PeftModel
    from transformers import BertModel

    card = real[2]["true"].card
    export_peft(card, tmp_path / "peft")
    model = BertModel.from_pretrained(model_folder).double()
    theirs = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    core = InferenceCore.from_pretrained(model_folder).double()  # only computations differ
    texts = ["Open a file.", "Return the sum of a list of numbers."]
    ids, mask = pad(core.tokenize(texts), core.device)
    with torch.no_grad():
        hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        expected = nn.functional.normalize(pooled, dim=1)
        result, plain = adapt(core, card, check_base=False)(ids, mask), core(ids, mask)
    assert float((result - expected).abs().max() / expected.abs().max()) <= 1e-6
    assert float((result - plain).abs().max()) > 0.01


# R17.8: bit for bit


@requirement("R17.8")
def test_a_run_is_a_function_of_its_seed():
    options = {"dropout": 0.2, "schedule": "cosine"}
    first = bits(train(**options))
    torch.rand(3)
    assert bits(train(**options)) == first
    assert bits(train(seed=1, **options)) != first
    assert bits(train(**{**options, "dropout": 0.0}))[1]["loss"] != first[1]["loss"]


def run_in_child(checkpoint):
    """A run in a process of its own, which says each step that it has done."""
    torch.set_num_threads(1)

    def say(step, _total, _loss):
        print(step, flush=True)  # noqa: T201
        time.sleep(0.02)

    train(steps=40, dropout=0.3, schedule="cosine", lr=5e-3, checkpoint=checkpoint, progress=say)


def kill_at(step, checkpoint):
    """Start `run_in_child` and kill it once it has done a step and there is a checkpoint."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['run_in_child'](sys.argv[2])"
    command = [sys.executable, "-c", code, __file__, checkpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        next(line for line in child.stdout if int(line) >= step and checkpoint.exists())
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL


@requirement("R17.8")
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    kill_at(8, checkpoint)
    steps, options = [], {"steps": 40, "dropout": 0.3, "schedule": "cosine", "lr": 5e-3}
    resumed = train(checkpoint=checkpoint, progress=lambda *step: steps.append(step), **options)
    assert 5 < steps[0][0] < 40  # it did not start anew
    assert bits(resumed) == bits(train(**options))
    assert not list(tmp_path.glob("*checkpoint"))


@requirement("R17.8")
def test_layers_that_the_forward_never_calls_do_not_hinder_a_checkpoint(tmp_path, model_folder):
    mini = ArrowEngine.from_pretrained(model_folder, device="cpu")
    settings = Settings(batch_size=2, validation_size=2, validate_every=1)
    data, targets = pairs().take([0, 9, 18, 27, 36]), ("pooler.dense", "0.attention.self.query")

    def run(progress=None):
        trainer = LoRATrainer(mini, rank=1, settings=settings, target_modules=targets)
        options = {"max_steps": 2, "checkpoint": tmp_path / "run", "progress": progress}
        return trainer.train(data, name="pooler", **options)

    with pytest.raises(StopError):
        run(stop_at(1))
    resumed = run()
    assert set(resumed.card.weights) == {"pooler.dense", "encoder.layer.0.attention.self.query"}
    assert not resumed.card.weights["pooler.dense"].B.any()
    assert resumed.card.weights["encoder.layer.0.attention.self.query"].B.any()


@requirement("R17.8")
def test_a_safetensors_file_of_something_else_is_no_checkpoint(tmp_path):
    path = tmp_path / "run"
    for notes in (None, {}, {"run": "{}"}, {"run": "[]"}, {"run": "5"}, {"run": "no JSON"}):
        save_file({"x": torch.zeros(1)}, path, notes)
        with pytest.raises(StateError, match="remove it to start anew"):
            train(checkpoint=path)
        assert path.exists()


@requirement("R17.8")
def test_a_checkpoint_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(LoRAError, match="nowhere"):
        train(steps=2, checkpoint=tmp_path / "nowhere" / "run")


# R17.10: telling


@requirement("R17.10")
def test_each_step_has_a_row_in_the_history_and_reports_progress():
    steps = []
    history = train(steps=7, validate_every=3, progress=lambda *step: steps.append(step)).history
    losses = history["loss"].to_pylist()
    assert steps == [(step, 7, loss) for step, loss in enumerate(losses, 1)]
    whole, real = ("step", "epoch"), ("loss", "lr", "val_mrr", "val_recall_at_1")
    types = {**dict.fromkeys(whole, "int64"), **dict.fromkeys(real, "float64")}
    assert history.schema == pa.schema(types)
    assert history["step"].to_pylist() == list(range(1, 8))
    assert all(history[name].null_count == 0 for name in ("step", "epoch", "loss", "lr"))
    assert all(math.isfinite(loss) for loss in losses)
    assert history["lr"].to_pylist() == [1e-2] * 7


@requirement("R17.10")
def test_the_plot_is_an_svg_or_a_png_by_its_ending(tmp_path, monkeypatch):
    result = train(steps=7, name="toy & more", validate_every=3)
    result.plot(tmp_path / "history.svg")
    root = ET.parse(tmp_path / "history.svg").getroot()  # noqa: S314 - our own file
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 2
    result.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    result.plot(tmp_path / "history")
    assert ET.parse(tmp_path / "history").getroot().tag == root.tag  # noqa: S314 - our own file
    for bad in ("history.xyz", "nowhere/history.svg"):
        with pytest.raises(LoRAError, match="history"):
            result.plot(tmp_path / bad)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install 'lora-cards\\[plot\\]'"):
        result.plot(tmp_path / "other.svg")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"history", "history.png", "history.svg"}
