"""LoRATrainer: a card learned from pairs, by one of three losses through the real encoder.

Every random choice is a function of (seed, epoch or step), so that a run is reproducible bit for
bit for a seed and a thread count, and one that was killed goes on from its checkpoint to the same
result.

Requirements: R17.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from lora.card import LoRACard, LowRank
from lora.checks import integer
from lora.drawing import new_figure
from lora.errors import (
    ArgumentError,
    DataError,
    ShapeError,
    StateError,
    UnsupportedModelError,
    shown,
)
from lora.evolution.data import Pairs
from lora.evolution.ewc import Anchor, fisher_of, normalized, penalty
from lora.evolution.losses import LOSSES
from lora.evolution.schedules import SCHEDULES, schedule_of
from lora.inference.encoder import InferenceCore, batches
from lora.layer import TrainableLinear
from lora.rewrite import fingerprint, fresh, trainable, trained
from lora.store import PathLike, replacing

log = logging.getLogger(__name__)

AUTOCAST: Mapping[str, torch.dtype] = MappingProxyType(
    {"bf16": torch.bfloat16, "fp16": torch.float16}
)
"""What the encoder may compute in, by name."""

GROUP = 384
"""Tokens of one group of a batch, padding included, where the encoder runs on a CPU."""

Progress = Callable[[int, int, float], None]
"""Called after each step with the step, the number of steps, and the loss."""


class Engine(Protocol):
    """What training needs of an engine."""

    base: nn.Module


@dataclass(frozen=True)
class Settings:
    """How a training runs.

    Args:
        epochs: Passes over the training pairs, >= 1.
        batch_size: Pairs of one step, >= 2: the others' positives are each query's negatives.
        lr: Peak learning rate of AdamW, > 0.
        schedule: One of `lora.evolution.schedules.SCHEDULES`.
        warmup: Share of the steps, in [0, 1), over which the learning rate rises to its peak.
        loss: One of `lora.evolution.losses.LOSSES`.
        accumulate: Parts that a batch goes through the encoder in. The update is that of the whole
            batch, other pairs' positives included, at the memory of one part and the time of a
            second forward (Gao et al. 2021).
        clip: Norm that the gradient of all factors is cut to; None for none.
        autocast: ``"bf16"`` or ``"fp16"`` (with loss scaling): what the encoder computes in; None
            for its own dtype.
        checkpointing: Compute each block again on the way back, in place of keeping what is inside
            it: less memory, more time.
        lora_plus: Learning rate of B over that of A (LoRA+, Hayou et al. 2024); 1 for the same.
        rslora: Scale by alpha / √rank in place of alpha / rank (Kalajdzievski 2023).
        dropout: On the low-rank path.
        validate_every: Steps between validations.
        patience: Validations without a better MRR after which training stops.
        share: Share of the groups to train on; the rest validates.
        validation_size: Validation pairs at most, so that validating stays cheap.
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
        least = {
            "epochs": 1,
            "batch_size": 2,
            "validate_every": 1,
            "patience": 1,
            "validation_size": 1,
            "accumulate": 1,
        }
        for name, lowest in least.items():
            integer(getattr(self, name), f"settings: {name}", lowest)
        for name in ("lr", "lora_plus", *(["clip"] if self.clip is not None else [])):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ArgumentError(f"settings: {name}", "a finite number > 0", shown(value))
        if not (isinstance(self.warmup, int | float) and 0 <= self.warmup < 1):
            raise ArgumentError("settings: warmup", "a share in [0, 1)", shown(self.warmup))
        choices = {
            "schedule": tuple(SCHEDULES),
            "loss": tuple(LOSSES),
            "autocast": (None, *AUTOCAST),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ArgumentError(
                    f"settings: {name}", f"one of {known}", shown(getattr(self, name))
                )


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
    """What a training gave.

    Args:
        card: The best card seen.
        history: Columns step, epoch, loss, lr, and on validation steps val_mrr and val_recall_at_1
            (else null).
        metrics: ``before`` and ``after`` on the validation pairs.
    """

    card: LoRACard
    history: pa.Table
    metrics: Mapping[str, Retrieval]

    def plot(self, path: PathLike) -> None:
        """Draw loss and validation MRR over steps, as SVG or PNG by the path's ending.

        Raises:
            MissingPackageError: If the ``plot`` extra is not installed.
        """
        steps, losses, scores = (
            self.history[name].to_pylist() for name in ("step", "loss", "val_mrr")
        )
        figure = new_figure(figsize=(7, 4), layout="constrained")
        left = figure.subplots()
        right = left.twinx()
        left.plot(steps, losses, color="tab:blue", label="loss")
        validated = [
            (step, score) for step, score in zip(steps, scores, strict=True) if score is not None
        ]
        right.plot(*zip(*validated, strict=True), "o-", color="tab:orange") if validated else None
        left.set(xlabel="step", ylabel="loss", title=self.card.name)
        right.set_ylabel("validation MRR")
        with replacing(path) as file:
            figure.savefig(file, format=Path(path).suffix.lstrip(".") or "svg")


@dataclass(frozen=True)
class _Run:
    """All that a run's future depends on, besides its inputs."""

    step: int = 0
    best_mrr: float = -1.0
    worse: int = 0
    rows: tuple[Mapping[str, Any], ...] = ()
    best: Mapping[str, Tensor] = field(default_factory=dict)


class LoRATrainer:
    """Trains cards for an engine's base model, which is not changed.

    Args:
        engine: An engine over an `InferenceCore`.
        rank, alpha, target_modules: Of the cards to make.
        seed: Of the initial factors, the split, the batches and dropout.
        settings: A `Settings`, or the name of one of `PRESETS`.
        base_model: The base model's name, to be written on the card.

    Examples:
        >>> from lora import ArrowEngine
        >>> trainer = LoRATrainer(ArrowEngine.from_pretrained(None), rank=4, settings="quick")
        >>> pairs = Pairs.of([{"query": f"number {i}", "positive": f"n{i}", "group": f"{i % 4}"} for i in range(16)])
        >>> trainer.train(pairs, name="numbers", max_steps=1).card.rank
        4
    """

    def __init__(
        self,
        engine: Engine,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: Sequence[str] | str = ("query", "value"),
        seed: int = 0,
        settings: Settings | str | None = None,
        base_model: str | None = None,
    ) -> None:
        if not isinstance(engine.base, InferenceCore):
            raise UnsupportedModelError(
                "LoRATrainer", "an engine over an InferenceCore", type(engine.base).__name__
            )
        if isinstance(settings, str) and settings not in PRESETS:
            raise ArgumentError("settings", f"one of {list(PRESETS)} or a Settings", repr(settings))
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ArgumentError("seed", "an integer >= 0", repr(seed))
        self.core = engine.base
        self.settings = PRESETS[settings] if isinstance(settings, str) else settings or Settings()
        self.seed = seed
        self.base_model = base_model
        card = fresh(
            self.core, "untrained", rank=rank, alpha=alpha, target_modules=target_modules, seed=seed
        )
        self._card = rank_stabilized(card) if self.settings.rslora else card

    def train(
        self,
        pairs: Pairs,
        *,
        name: str,
        metadata: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
        checkpoint: PathLike | None = None,
        progress: Progress | None = None,
        start: LoRACard | None = None,
        ewc: tuple[Anchor, float] | None = None,
    ) -> Training:
        """Learn a card from pairs.

        Args:
            pairs: At least two groups; some are held out to validate, by `Settings.share`.
                Negatives are used if every pair has one; a quality that is missing is 1.
            name, metadata: Of the card.
            max_steps: Ends the training early (and the schedule with it).
            checkpoint: A file to go on from if it is there, written at every validation and removed
                at the end.
            progress: Called after each step.
            start: A card of this trainer's shape to go on from.
            ewc: What an earlier task needs, from `anchor`, and λ: the penalty is added to the loss.

        Raises:
            DataError: If there are too few pairs or groups, or the loss is not finite.
            StateError: If the checkpoint is of another run.
        """
        card = self._named(name, metadata or {}, start)
        training, validation = pairs.unique().split(self.settings.share, seed=self.seed)
        validation = validation.sample(self.settings.validation_size, self.seed)
        schedule = _schedule(training, self.settings, self.seed, max_steps)
        session = _Session(
            self.core,
            card,
            self.settings,
            steps=len(schedule),
            seed=self.seed,
            identity=_identity(self, card, pairs, max_steps, ewc),
            ewc=ewc,
        )
        run = session.restore(checkpoint)
        before = evaluate(self.core, validation)
        for step, epoch, rows in schedule[run.step :]:
            if (
                run.worse >= self.settings.patience
            ):  # here, so that a run killed at this very point stops too
                log.info("stopped early after step %d", step)
                break
            loss = session.step(training.take(rows), step)
            entry = {"step": step + 1, "epoch": epoch + 1, "loss": loss, "lr": session.last_lr}
            run = replace(run, step=step + 1, rows=(*run.rows, entry))
            if (step + 1) % self.settings.validate_every == 0 or step + 1 == len(schedule):
                run = session.validate(run, validation)
                session.store(checkpoint, run)
            if progress is not None:
                progress(step + 1, len(schedule), loss)
        session.put(run.best)
        after = evaluate(session.model, validation)
        if checkpoint is not None:
            Path(checkpoint).unlink(missing_ok=True)
        learned = trained(session.model, card)
        return Training(
            learned, _history(run.rows), MappingProxyType({"before": before, "after": after})
        )

    def anchor(self, card: LoRACard, pairs: Pairs, *, examples: int = 64) -> Anchor:
        """Where a card's factors are, and how much its task, as these pairs show it, needs each to
        stay.

        The Fisher information is from per-example gradients, normalised to a mean of 1.

        Args:
            card: A card of this trainer's shape.
            pairs: Of its task.
            examples: Pairs to go by at most.
        """
        session = _Session(self.core, card, self.settings, steps=1, seed=self.seed, identity="")
        batch = pairs.unique().sample(examples, self.seed)
        with torch.enable_grad():
            losses = session.losses(session.embedded(_texts(batch)), batch)
        fisher = normalized(fisher_of(losses, session.params))
        return Anchor(
            {name: tensor.detach().clone() for name, tensor in session.params.items()}, fisher
        )

    def _named(self, name: str, metadata: Mapping[str, Any], start: LoRACard | None) -> LoRACard:
        """The card that a training starts from."""
        card = self._card
        if start is not None:
            if {key: (pair.A.shape, pair.B.shape) for key, pair in start.weights.items()} != {
                key: (pair.A.shape, pair.B.shape) for key, pair in card.weights.items()
            }:
                raise ShapeError(
                    f"start: card {start.name!r}", "modules and shapes as this trainer's", "others"
                )
            card = start
        card = replace(
            card, name=name, metadata=metadata, base_model=self.base_model, base_fingerprint=None
        )
        return replace(card, base_fingerprint=fingerprint(self.core, card))


class _Session:
    """One run's model, optimiser and schedule: the mutable part, dropped when the run ends."""

    def __init__(
        self,
        core: InferenceCore,
        card: LoRACard,
        settings: Settings,
        *,
        steps: int,
        seed: int,
        identity: str,
        ewc: tuple[Anchor, float] | None = None,
    ) -> None:
        self.model = trainable(
            core, card, dropout=settings.dropout
        ).eval()  # but for steps: validation has no dropout
        self.model.encoder.checkpointing = settings.checkpointing
        self.settings, self.seed, self.identity, self.ewc = settings, seed, identity, ewc
        self.layers = {
            n: m for n, m in self.model.named_modules() if isinstance(m, TrainableLinear)
        }
        self.params = {
            f"{name}.{factor}": getattr(layer, factor)
            for name, layer in self.layers.items()
            for factor in ("lora_A", "lora_B")
        }
        rates = {".lora_A": settings.lr, ".lora_B": settings.lr * settings.lora_plus}
        groups = [
            {
                "params": [param for name, param in self.params.items() if name.endswith(factor)],
                "lr": lr,
            }
            for factor, lr in rates.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)
        self.schedule = schedule_of(
            self.optimizer, settings.schedule, steps, warmup=settings.warmup
        )
        self.scaler = torch.amp.GradScaler(core.device.type, enabled=settings.autocast == "fp16")
        self.last_lr = settings.lr

    def step(self, batch: Pairs, step: int) -> float:
        """One update; returns the loss of the batch."""
        self.optimizer.zero_grad()
        self.model.train()
        loss = self._backward(batch, step)
        self.model.eval()
        if not math.isfinite(loss):
            raise DataError(
                f"training: step {step + 1}", "a finite loss", loss, "lower the learning rate"
            )
        self.scaler.unscale_(self.optimizer)
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params.values(), self.settings.clip)
        self.last_lr = float(self.schedule.get_last_lr()[0])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return loss

    def losses(self, embeddings: Sequence[Tensor], batch: Pairs) -> Tensor:
        """The loss of each pair, from the embeddings of queries, positives and, where there are
        any, negatives.
        """
        queries, positives, *negatives = (column.float() for column in embeddings)
        qualities = torch.tensor(
            batch.table["quality"].fill_null(1.0).to_pylist(), device=self.model.device
        )
        loss = LOSSES[self.settings.loss]
        return loss(queries, positives, negatives[0] if negatives else None, qualities)

    def embedded(self, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        """The embeddings of each list of texts; on a CPU in groups of similar length, since padding
        costs what text does.
        """
        flat = [text for column in texts for text in column]
        groups = [list(range(len(flat)))]
        if self.model.device.type == "cpu":
            groups = list(batches([len(row) or 1 for row in self.model.tokenize(flat)], GROUP))
        kind = AUTOCAST.get(self.settings.autocast or "")
        with torch.autocast(self.model.device.type, dtype=kind, enabled=kind is not None):
            rows = torch.cat([self.model.embed([flat[row] for row in group]) for group in groups])
        order = np.argsort([row for group in groups for row in group]).tolist()
        return list(torch.split(rows[order], [len(column) for column in texts]))

    def _backward(self, batch: Pairs, step: int) -> float:
        """Add the gradient of the batch's mean loss, and of the penalty, to the factors; returns
        that loss.
        """
        texts = _texts(batch)
        size = -(-len(batch) // self.settings.accumulate)
        parts = [[column[at : at + size] for column in texts] for at in range(0, len(batch), size)]
        if len(parts) == 1:
            loss = self.losses(self._seeded(parts[0], step, 0), batch).mean()
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        else:  # the loss of all embeddings first, then each part's factors from its share of that
            with torch.no_grad():
                found = [self._seeded(part, step, index) for index, part in enumerate(parts)]
            whole = [torch.cat(columns).requires_grad_() for columns in zip(*found, strict=True)]
            loss = self.losses(whole, batch).mean()
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            for index, part in enumerate(parts):
                slope = [column.grad[index * size :][: len(part[0])] for column in whole]  # type: ignore[index]
                torch.autograd.backward(self._seeded(part, step, index), slope)
        if self.ewc is not None:
            kept = penalty(self.params, *self.ewc)
            self.scaler.scale(kept).backward()  # type: ignore[no-untyped-call]
            loss = loss + kept
        return float(loss.detach())

    def _seeded(self, part: Sequence[Sequence[str]], step: int, index: int) -> list[Tensor]:
        """The embeddings of a part, with a dropout that is a function of seed, step and part."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(_mixed(self.seed, step, index))
            return self.embedded(part)

    def validate(self, run: _Run, validation: Pairs) -> _Run:
        """The run with a validation in its last row, and the factors if they are the best so far."""
        found = evaluate(self.model, validation)
        rows = (
            *run.rows[:-1],
            {**run.rows[-1], "val_mrr": found.mrr, "val_recall_at_1": found.recall_at_1},
        )
        if found.mrr <= run.best_mrr:
            return replace(run, rows=rows, worse=run.worse + 1)
        best = {name: tensor.detach().clone() for name, tensor in self.params.items()}
        return replace(run, rows=rows, worse=0, best_mrr=found.mrr, best=best)

    def put(self, factors: Mapping[str, Tensor]) -> None:
        """Set the factors."""
        with torch.no_grad():
            for name, tensor in factors.items():
                self.params[name].copy_(tensor)

    def store(self, path: PathLike | None, run: _Run) -> None:
        """Write the run's state: factors, best factors, optimiser moments as tensors, the rest as
        JSON.
        """
        if path is None:
            return
        tensors = {f"best.{name}": tensor for name, tensor in run.best.items()}
        for name, parameter in self.params.items():
            tensors[f"now.{name}"] = parameter.detach()
            state = self.optimizer.state.get(
                parameter, {}
            )  # none for a layer that the forward never calls
            tensors |= {f"{key}.{name}": tensor for key, tensor in state.items()}
        notes = {
            key: value for key, value in asdict(replace(run, best={})).items() if key != "best"
        }
        notes |= {"identity": self.identity, "schedule": _plain(self.schedule.state_dict())}
        notes |= {"scaler": self.scaler.state_dict()}
        with replacing(path) as file:
            file.write(
                save_tensors(
                    {k: t.contiguous() for k, t in tensors.items()}, {"run": json.dumps(notes)}
                )
            )

    def restore(self, path: PathLike | None) -> _Run:
        """The run that a checkpoint holds, or a new one where there is none."""
        if path is None or not Path(path).is_file():
            return _Run()
        try:
            with safe_open(str(path), framework="pt") as file:
                notes = json.loads(file.metadata()["run"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            identity = notes["identity"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateError(str(path), "a checkpoint", error, "remove it to start anew") from error
        if identity != self.identity:
            raise StateError(
                str(path),
                "a checkpoint of this very run",
                "one of another",
                "remove it to start anew",
            )
        self.schedule.load_state_dict(notes.pop("schedule"))
        if scaled := notes.pop("scaler"):
            self.scaler.load_state_dict(scaled)
        self.put({name: tensors[f"now.{name}"] for name in self.params})
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        for name, parameter in self.params.items():
            moments = {
                key: tensors.get(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq", "step")
            }
            self.optimizer.state[parameter] = {
                key: found for key, found in moments.items() if found is not None
            }
        best = {name: tensors[f"best.{name}"] for name in self.params}
        del notes["identity"]
        return _Run(**{**notes, "rows": tuple(notes["rows"]), "best": best})


def rank_stabilized(card: LoRACard) -> LoRACard:
    """The card with a scaling of alpha / √rank on every module.

    Source: Kalajdzievski 2023 (rsLoRA).
    """
    weights = {
        key: LowRank(pair.A, pair.B, card.alpha / math.sqrt(pair.rank))
        for key, pair in card.weights.items()
    }
    return replace(card, weights=weights)


def evaluate(model: Any, pairs: Pairs) -> Retrieval:
    """Rank all distinct positives for every query by cosine similarity.

    A positive's rank counts all that score at least as high: a model that embeds everything alike
    finds nothing.

    Args:
        model: Anything with ``encode(texts)``.
        pairs: At least one.

    Raises:
        DataError: If there is no pair, or an embedding is not finite.
    """
    if not len(pairs):
        raise DataError("evaluate", "at least one pair", "none")
    candidates = sorted(set(pairs.positives))
    place = {text: index for index, text in enumerate(candidates)}
    queries, targets = (
        np.asarray(model.encode(texts), np.float64) for texts in (pairs.queries, candidates)
    )
    if not (
        np.isfinite(queries).all() and np.isfinite(targets).all()
    ):  # NaN is not less than anything: rank 1
        raise DataError(
            "evaluate", "finite embeddings", "NaN or infinity", "lower the learning rate"
        )
    targets /= np.maximum(np.linalg.norm(targets, axis=1, keepdims=True), 1e-300)
    scores = queries @ targets.T
    own = scores[np.arange(len(scores)), [place[text] for text in pairs.positives]]
    ranks = (scores >= own[:, None]).sum(1)
    return Retrieval(
        float((ranks == 1).mean()),
        float((ranks <= 10).mean()),
        float((1 / ranks).mean()),
        len(ranks),
    )


def batches_of(pairs: Pairs, size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Positions of an epoch's batches in seeded order; no text occurs twice in a batch, where it
    would be a false negative.

    A pair that has to wait goes into a later batch. An incomplete batch, the largest, is only
    yielded where there is no full one.
    """
    waiting = np.random.default_rng([seed, epoch]).permutation(len(pairs)).tolist()
    queries, positives = pairs.queries, pairs.positives
    spare: list[int] = []
    full = False
    while waiting:
        batch: list[int] = []
        texts: set[str] = set()
        later: list[int] = []
        for index, row in enumerate(waiting):
            if len(batch) == size:
                later += waiting[index:]
                break
            mine = {queries[row], positives[row]}
            if texts & mine:
                later.append(row)
            else:
                batch.append(row)
                texts |= mine
        waiting = later
        if len(batch) == size:
            full = True
            yield batch
        spare = max(spare, batch, key=len)
    if len(spare) > 1 and not full:
        yield spare


def _schedule(
    pairs: Pairs, settings: Settings, seed: int, max_steps: int | None
) -> list[tuple[int, int, list[int]]]:
    """Step, epoch and rows of every step."""
    if max_steps is not None and (
        isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1
    ):
        raise ArgumentError("max_steps", "an integer >= 1 or None", repr(max_steps))
    epochs = range(settings.epochs)
    batches = (
        (epoch, rows)
        for epoch in epochs
        for rows in batches_of(pairs, settings.batch_size, seed, epoch)
    )
    steps = [(step, epoch, rows) for step, (epoch, rows) in enumerate(islice(batches, max_steps))]
    if not steps:
        raise DataError("training pairs", "at least two different pairs", len(pairs))
    return steps


def _texts(batch: Pairs) -> list[list[str]]:
    """Queries, positives, and negatives if every pair has one."""
    negatives = batch.table["negative"].to_pylist()
    return [batch.queries, batch.positives, *([negatives] if None not in negatives else [])]


def _identity(
    trainer: LoRATrainer,
    card: LoRACard,
    pairs: Pairs,
    max_steps: int | None,
    ewc: tuple[Anchor, float] | None,
) -> str:
    """SHA-256 of all that a run's result depends on."""
    told = [
        asdict(trainer.settings),
        trainer.seed,
        max_steps,
        card.rank,
        card.alpha,
        card.target_modules,
    ]
    sha = hashlib.sha256(json.dumps([*told, card.base_fingerprint]).encode())
    for column in pairs.table.columns:
        sha.update(json.dumps(column.to_pylist()).encode())
    for pair in card.weights.values():
        sha.update(pair.A.tobytes() + pair.B.tobytes())
    if ewc is not None:
        sha.update(repr(ewc[1]).encode())
        for tensor in (*ewc[0].params.values(), *ewc[0].fisher.values()):
            sha.update(tensor.numpy(force=True).tobytes())
    return sha.hexdigest()


def _mixed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _plain(state: Any) -> Any:
    """A scheduler's state as JSON can hold it: without what is made anew with the scheduler."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items() if not callable(value)}
    return [_plain(value) for value in state] if isinstance(state, list | tuple) else state


def _history(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    schema = pa.schema(
        [
            ("step", pa.int64()),
            ("epoch", pa.int64()),
            ("loss", pa.float64()),
            ("lr", pa.float64()),
            ("val_mrr", pa.float64()),
            ("val_recall_at_1", pa.float64()),
        ]
    )
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
