"""LoRATrainer learns a card from pairs of texts, with the real encoder, of any kind.

Each random choice is a function of seed, epoch and step. So a run is reproducible bit for bit, and
a run that was killed continues from its checkpoint to the same result.

Requirements: R17.
"""

import hashlib
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from lora.card import Array, LoRACard, check_card
from lora.checks import choice, integer, positive, share
from lora.drawing import new_figure
from lora.errors import ArgumentError, BaseModelError, DataError, ShapeError, StateError, shown
from lora.files import PathLike, as_path, replacing
from lora.models.adapt import fingerprint, init_card, linears, trainable, trained_card
from lora.models.any_encoder import checkpoint_blocks, embed, embedder, name_inside, token_counts
from lora.models.encoder import batches
from lora.models.layers import TrainableLinear
from lora.presets import default_targets
from lora.progress import progress_bar
from lora.training.data import AnyPairs, Pairs
from lora.training.ewc import EWC, Anchor, checked_anchor, fisher_of, normalized, penalty
from lora.training.losses import LOSSES
from lora.training.retrieval import reciprocal_ranks
from lora.training.schedules import SCHEDULES, schedule_of

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What the encoder may compute in instead of its own type, by name."""

GROUP = 384
"""Tokens, padding included, that go through the encoder at once on a CPU."""

Progress = Callable[[int, int, float], None]
"""Called after each step with the step, the number of steps, and the loss."""


@dataclass(frozen=True)
class Settings:
    """How a training runs.

    Args:
        epochs: Passes over the pairs.
        batch_size: Pairs of a step, at least 2.
        lr: The highest learning rate.
        schedule: ``"constant"``, ``"linear"``, ``"cosine"`` or another of `SCHEDULES`.
        warmup: Share of the steps, in [0, 1), in which the learning rate rises to `lr`.
        loss: ``"contrastive"``, ``"cosine"`` or ``"triplet"``; see `lora.training.losses`.
        accumulate: Parts of a batch that has one update: less memory, two forwards (Gao et al.
            2021).
        clip: Largest norm of a step's gradient; None for any.
        autocast: ``"bf16"`` or ``"fp16"``: what the encoder computes in.
        checkpointing: Compute each block again in the backward pass: less memory.
        lora_plus: Learning rate of B divided by that of A (LoRA+, Hayou et al. 2024).
        rslora: Scale by alpha / √rank (Kalajdzievski 2023).
        dropout: On the low-rank path. The encoder's own dropout stays off.
        validate_every: Steps from one validation to the next.
        patience: Validations without a better MRR after which training stops.
        share: Share of the groups, in (0, 1), to train on; the others are for validation.
        validation_size: Largest number of pairs to validate on.

    Examples:
        >>> Settings(epochs=3, schedule="cosine", warmup=0.1).batch_size
        64
    """

    epochs: int = 1
    batch_size: int = 64
    lr: float = 2e-3
    schedule: str = "constant"
    warmup: float = 0.0
    loss: str = "contrastive"
    accumulate: int = 1
    clip: float | None = None
    autocast: str | None = None
    checkpointing: bool = False
    lora_plus: float = 1.0
    rslora: bool = False
    dropout: float = 0.0
    validate_every: int = 20
    patience: int = 5
    share: float = 0.8
    validation_size: int = 256

    def __post_init__(self) -> None:
        choices = {"schedule": SCHEDULES, "loss": LOSSES, "autocast": AUTOCAST}
        shares = {"warmup": "[0, 1)", "dropout": "[0, 1)", "share": "(0, 1)"}
        for item in fields(self):
            name, value, where = item.name, getattr(self, item.name), f"settings: {item.name}"
            if value is None and item.default is None:
                continue
            if name in choices:
                choice(value, where, choices[name])
            elif isinstance(item.default, bool):
                if not isinstance(value, bool):
                    raise ArgumentError(where, "a bool", shown(value))
            elif isinstance(item.default, int):
                integer(value, where, 2 if name == "batch_size" else 1)
            else:
                in_range = name in shares
                number = share(value, where, shares[name]) if in_range else positive(value, where)
                object.__setattr__(self, name, number)


PRESETS: Mapping[str, Settings] = MappingProxyType(
    {
        "quick": Settings(epochs=1, lr=0.005, schedule="constant"),
        "stable": Settings(epochs=5, lr=0.0005, schedule="cosine"),
    }
)
"""Settings by name."""


@dataclass(frozen=True)
class Retrieval:
    """How well queries find their positives among all positives: shares in [0, 1]."""

    recall_at_1: float
    recall_at_10: float
    mrr: float
    queries: int


@dataclass(frozen=True, eq=False)
class Training:
    """Result: the best card, a history with a row for each step, and metrics before and after."""

    card: LoRACard
    history: pa.Table
    metrics: Mapping[str, Retrieval]

    def plot(self, path: PathLike) -> None:
        """Draw loss and validation MRR over steps, as SVG or PNG by the path's ending."""
        figure = new_figure(layout="constrained")
        left = figure.subplots()
        for axis, name, line in ((left, "loss", "C0-"), (left.twinx(), "val_mrr", "C1o-")):
            rows = self.history.select(["step", name]).drop_null()
            axis.plot(rows["step"], rows[name], line)
            axis.set(xlabel="step", ylabel=name, title=self.card.name)
        with replacing(path) as file:
            figure.savefig(file, format=Path(path).suffix.lstrip(".") or "svg")


class LoRATrainer:
    """Trains cards for an engine's base model, which is not changed.

    Args:
        engine: An engine, or an encoder: `InferenceCore`, ``SentenceTransformer``, `PooledEncoder`,
            or a torch module with ``encode(texts)`` and, with gradients, ``embed(texts)``.
        rank, alpha: Of the cards; ΔW is scaled by alpha / rank.
        target_modules: Default: queries and values, or all Linears if no name tells these.
        seed: Of the first factors, the split and the batches.
        settings: `Settings`, or the name of one of `PRESETS`.
        base_model: Name of the base model, which the cards state.

    Raises:
        UnsupportedModelError: The encoder has no embeddings that gradients flow through.
        TargetError: No module matches.

    Examples:
        >>> from lora import ArrowEngine
        >>> trainer = LoRATrainer(ArrowEngine.from_pretrained(None), rank=4, settings="quick")
        >>> pairs = Pairs.of((f"number {i}", f"n{i}") for i in range(16))
        >>> trainer.train(pairs, name="numbers", max_steps=1).card.rank
        4
    """

    def __init__(
        self,
        engine: Any,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: Sequence[str] | str | None = None,
        seed: int = 0,
        settings: Settings | str | None = None,
        base_model: str | None = None,
    ) -> None:
        self.core: Any = getattr(engine, "base", engine)
        embedder(self.core)  # refuses what can't be trained
        if isinstance(settings, str) and settings in PRESETS:
            settings = PRESETS[settings]
        if not isinstance(settings, Settings | None):
            expected = f"one of {list(PRESETS)} or a Settings"
            raise ArgumentError("settings", expected, shown(settings))
        self.settings = settings or Settings()
        self.seed = integer(seed, "seed", 0)
        if target_modules is None:
            target_modules = default_targets(linears(self.core))
        card = init_card(
            self.core, "untrained", rank=rank, alpha=alpha, target_modules=target_modules, seed=seed
        )
        scaling = card.alpha / (math.sqrt(card.rank) if self.settings.rslora else card.rank)
        weights = {
            name_inside(self.core, key): replace(pair, scaling=scaling)
            for key, pair in card.weights.items()
        }
        card = replace(card, weights=weights, base_model=base_model)
        self.initial = replace(card, base_fingerprint=fingerprint(self.core, card))

    def train(
        self,
        pairs: AnyPairs,
        *,
        name: str,
        metadata: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
        checkpoint: PathLike | None = None,
        progress: Progress | None = None,
        start: LoRACard | None = None,
        ewc: EWC | None = None,
    ) -> Training:
        """Learn a card from pairs.

        Args:
            pairs: `Pairs`, or what `Pairs.of` takes; of at least two groups. A batch uses negatives
                only if each of its pairs has one.
            max_steps: Ends the training, and the schedule, early.
            checkpoint: A file to continue from if it exists; written at each validation.
            progress: Called after each step. By default, a terminal shows a bar.
            start: A card to continue from, with this trainer's modules and shapes.
            ewc: The `anchor` of an earlier task, and λ of the penalty.

        Raises:
            StateError: The checkpoint is of another run.
            DataError: There are too few pairs or groups.
        """
        pairs, settings = Pairs.of(pairs), self.settings
        if not (progress is None or callable(progress)):
            raise ArgumentError("progress", "a function of step, steps and loss", shown(progress))
        card = replace(
            self.initial if start is None else self._fitting(start, "start"),
            name=name,
            metadata={} if metadata is None else metadata,
            base_model=self.initial.base_model,
            base_fingerprint=self.initial.base_fingerprint,
        )
        training, validation = pairs.unique().split(settings.share, seed=self.seed)
        validation = validation.sample(settings.validation_size, self.seed)
        limit = None if max_steps is None else min(integer(max_steps, "max_steps", 1), sys.maxsize)
        batches = (
            (epoch, rows)
            for epoch in range(settings.epochs)
            for rows in batches_of(training, settings.batch_size, self.seed, epoch)
        )
        plan = list(islice(batches, limit))
        if not plan:
            raise DataError("training pairs", "at least two different pairs", len(training))
        run = _Run(self, card, len(plan), ewc)
        identity = run.identity(pairs, max_steps)
        run.restore(checkpoint, identity)
        before = evaluate(self.core, validation)
        shows_bar = progress is None and sys.stderr.isatty()
        bar = progress_bar(f"training {name}") if shows_bar else nullcontext(progress)
        with bar as report:
            for step, (epoch, rows) in enumerate(plan[len(run.history) :], len(run.history) + 1):
                scores = [row["val_mrr"] for row in run.history if row["val_mrr"] is not None]
                best = max(scores, default=-1.0)
                if scores and len(scores) - 1 - scores.index(best) >= settings.patience:
                    break  # at the start of a step, so that a run killed right before stops too
                loss, lr = run.step(training.take(rows))
                row = {"step": step, "epoch": epoch + 1, "loss": loss, "lr": lr}
                run.history.append(row | {"val_mrr": None, "val_recall_at_1": None})
                if step % settings.validate_every == 0 or step == len(plan):
                    result = evaluate(run.model, validation)
                    run.history[-1] |= {
                        "val_mrr": result.mrr,
                        "val_recall_at_1": result.recall_at_1,
                    }
                    if result.mrr > best:
                        run.best = run.copied()
                    if checkpoint is not None:
                        run.store(checkpoint, identity)
                if report is not None:
                    report(step, len(plan), loss)
        run.model.load_state_dict(run.best, strict=False)
        metrics = {"before": before, "after": evaluate(run.model, validation)}
        if checkpoint is not None:
            Path(checkpoint).unlink(missing_ok=True)
        history = pa.Table.from_pylist(run.history)
        return Training(trained_card(run.model, card), history, metrics)

    def anchor(self, card: LoRACard, pairs: AnyPairs, *, examples: int = 64) -> Anchor:
        """Return a card's factors, and how much its task needs each of them to stay.

        The Fisher information comes from at most `examples` pairs and is scaled to a mean of 1.
        """
        run = _Run(self, self._fitting(card, "anchor"), steps=1)
        batch = Pairs.of(pairs).unique().sample(integer(examples, "examples", 1), self.seed)
        if not len(batch):
            raise DataError("anchor", "at least one pair", "none")
        with torch.enable_grad():
            losses = run.losses(run.embedded(_texts(batch)), batch)
        return Anchor(run.copied(), normalized(fisher_of(losses, run.factors)))

    def _fitting(self, card: LoRACard, where: str) -> LoRACard:
        check_card(card)
        where = f"{where}: card {card.name!r}"
        if _shapes(card) != _shapes(self.initial):
            raise ShapeError(where, "the modules and shapes of this trainer's cards", "others")
        if card.base_fingerprint not in (None, self.initial.base_fingerprint):
            raise BaseModelError(where, "a card for this base model", "one for another")
        return card


class _Run:
    """The mutable part of one training."""

    def __init__(
        self, trainer: LoRATrainer, card: LoRACard, steps: int, ewc: EWC | None = None
    ) -> None:
        settings = trainer.settings
        self.card, self.settings, self.seed = card, settings, trainer.seed
        self.model = trainable(trainer.core, card, dropout=settings.dropout).eval()
        if settings.checkpointing:
            checkpoint_blocks(self.model)
        self.factors: dict[str, Tensor] = {
            name: factor for name, factor in self.model.named_parameters() if factor.requires_grad
        }
        self.ewc = (Anchor({}, {}), 0.0) if ewc is None else checked_anchor(ewc, self.factors)
        factors = [*self.factors.values()]  # A and B of a layer by turns
        rates: list[dict[str, Any]] = [
            {"params": factors[::2], "lr": settings.lr},
            {"params": factors[1::2], "lr": settings.lr * settings.lora_plus},
        ]
        self.optimizer = torch.optim.AdamW(rates, weight_decay=0.0)
        self.schedule = schedule_of(
            self.optimizer, settings.schedule, steps, warmup=settings.warmup
        )
        is_fp16 = settings.autocast == "fp16"
        self.device = factors[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_fp16)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}

    def step(self, batch: Pairs) -> tuple[float, float]:
        """Update the factors once; return the loss of the batch and the learning rate."""
        self.optimizer.zero_grad()
        for module in self.model.modules():  # the encoder's own dropout stays off
            module.training = isinstance(module, TrainableLinear)
        loss = self._backward(batch)
        self.model.eval()  # a validation has no dropout
        if not math.isfinite(loss):
            where = f"training: step {len(self.history) + 1}"
            raise DataError(where, "a finite loss", loss, "lower the learning rate")
        self.scaler.unscale_(self.optimizer)
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.factors.values(), self.settings.clip)
        lr = self.schedule.get_last_lr()[0]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return loss, float(lr)

    def _backward(self, batch: Pairs) -> float:
        """Add the gradient of the batch's mean loss and of the penalty; return their sum.

        Texts in parts are embedded twice: without gradients, for the loss over all of them; then
        part by part, with its slope.
        """
        texts = _texts(batch)
        size = -(-len(texts) // self.settings.accumulate)
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        in_parts = len(parts) > 1
        with torch.set_grad_enabled(not in_parts):
            rows = torch.cat([self.embedded(part, index) for index, part in enumerate(parts)])
        rows.requires_grad_()
        loss = self.losses(rows, batch).mean() + penalty(self.factors, *self.ewc)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if in_parts:
            for index, slope in enumerate(rows.grad.split(size)):  # type: ignore[union-attr]
                torch.autograd.backward(self.embedded(parts[index], index), slope)
        return loss.item()

    def losses(self, rows: Tensor, batch: Pairs) -> Tensor:
        columns = rows.float().split(len(batch))  # type: ignore[no-untyped-call]
        queries, positives, *negatives = columns
        qualities = torch.tensor(batch.table["quality"].to_pylist(), device=rows.device)
        loss = LOSSES[self.settings.loss]
        return loss(queries, positives, negatives[0] if negatives else None, qualities)

    def embedded(self, texts: Sequence[str], part: int = 0) -> Tensor:
        """Embed texts, with a dropout that is a function of seed, step and part of the batch.

        On a CPU, groups of similar length save the time that padding costs.
        """
        device, lengths = self.device.type, token_counts(self.model, texts)
        groups = list(batches(lengths, GROUP if device == "cpu" else len(texts) * max(lengths)))
        dtype = AUTOCAST.get(self.settings.autocast or "")
        seed = np.random.SeedSequence((self.seed, len(self.history), part)).generate_state(1)[0]
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            torch.autocast(device, dtype, enabled=dtype is not None),
        ):
            torch.manual_seed(int(seed))
            rows = torch.cat([embed(self.model, [texts[row] for row in group]) for group in groups])
        return rows[np.argsort(np.concatenate(groups))]

    def copied(self) -> dict[str, Tensor]:
        return {name: factor.detach().clone() for name, factor in self.factors.items()}

    def identity(self, pairs: Pairs, max_steps: int | None) -> str:
        """Return the SHA-256 of all that the result depends on, before the first step."""
        (anchor, strength), card = self.ewc, self.card
        inputs = [self.settings, self.seed, max_steps, strength, card.base_fingerprint]
        scalings = [pair.scaling for pair in card.weights.values()]
        sha = hashlib.sha256(repr([inputs, scalings, pairs.table.to_pylist()]).encode())
        for tensors in (self.factors, anchor.params, anchor.fisher):
            for tensor in tensors.values():
                sha.update(tensor.numpy(force=True).tobytes())
        return sha.hexdigest()

    def store(self, path: PathLike, identity: str) -> None:
        """Write a checkpoint: tensors by kind and name, all else as JSON under the identity."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, factor in self.factors.items():
            state = {"now": factor.detach(), **self.optimizer.state[factor]}
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in state.items()}
        notes = json.dumps([self.history, self.scaler.state_dict()])
        with replacing(path) as file:
            file.write(save_tensors(tensors, {identity: notes}))

    def restore(self, path: PathLike | None, identity: str) -> None:
        """Continue from a checkpoint of the same run, if there is one."""
        if path is None or not as_path(path).is_file():
            return
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                self.history, scaler = json.loads(file.metadata()[identity])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            hint = "remove it to start anew"
            raise StateError(str(path), "a checkpoint of this run", "another", hint) from error
        for _ in self.history:  # without gradients, the optimizer changes nothing
            self.optimizer.step()
            self.schedule.step()
        self.scaler.load_state_dict(scaler)
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "best":
                self.best[name] = tensor
            elif kind == "now":
                self.factors[name].data = tensor
            else:
                self.optimizer.state[self.factors[name]][kind] = tensor


def evaluate(model: Any, pairs: AnyPairs) -> Retrieval:
    """Measure how well queries find their positives by `ranks`."""
    shares = ranks(model, pairs)
    first, first_ten = (float((shares >= least).mean()) for least in (1, 1 / 10))
    return Retrieval(first, first_ten, float(shares.mean()), len(shares))


def ranks(model: Any, pairs: AnyPairs) -> Array:
    """Return one over the rank of each query's positive among all distinct positives.

    A rank counts all positives that score at least as high by cosine similarity: a model that
    embeds everything alike finds nothing. The model has ``encode(texts)``.
    """
    pairs = Pairs.of(pairs)
    if not len(pairs):
        raise DataError("evaluate", "at least one pair", "none")
    candidates = sorted(set(pairs.positives))
    place = {text: row for row, text in enumerate(candidates)}
    embeddings = model.encode(pairs.queries), model.encode(candidates)
    try:
        return reciprocal_ranks(*embeddings, [place[text] for text in pairs.positives])
    except ArgumentError as error:
        hint = "lower the learning rate; if the base's are so too, look at its weights"
        raise DataError("evaluate", "finite embeddings", "NaN or infinity", hint) from error


def batches_of(pairs: Pairs, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the positions of an epoch's batches, in seeded order.

    No text occurs twice in a batch, where it would be a false negative. Incomplete batches are left
    out; if there is no full one, the largest is kept.
    """
    waiting = deque(np.random.default_rng([seed, epoch]).permutation(len(pairs)).tolist())
    texts = [set(pair) for pair in zip(pairs.queries, pairs.positives, strict=True)]
    batches: list[list[int]] = []
    while waiting:
        batch: list[int] = []
        used: set[str] = set()
        skipped = []
        while waiting and len(batch) < size:
            row = waiting.popleft()
            if used.isdisjoint(texts[row]):
                batch.append(row)
                used |= texts[row]
            else:
                skipped.append(row)
        waiting.extendleft(reversed(skipped))
        batches.append(batch)
    largest = max(batches, key=len, default=[])
    full = [batch for batch in batches if len(batch) == size]
    return full or ([largest] if len(largest) > 1 else [])


def _shapes(card: LoRACard) -> dict[str, Any]:
    return {module: (pair.A.shape, pair.B.shape) for module, pair in card.weights.items()}


def _texts(batch: Pairs) -> list[str]:
    negatives = batch.table["negative"].to_pylist()
    return [*batch.queries, *batch.positives, *([] if None in negatives else negatives)]
