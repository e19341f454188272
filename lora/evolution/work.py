"""One job in a process of its own, held to its limits, and the table of what kinds of jobs there
are.

`supervise` is what an executor carries, wherever it takes it: it starts a fresh process, waits for
it no longer than the job may take, and says what came of it. So a job that crashes, hangs or eats
up its memory harms neither the executor's workers nor another job. The process ends with its
supervisor: it holds the read end of a pipe that nobody writes to.

A job works in a folder of its own, one process at a time. A result that is whole is found again by
the next attempt, so that what was finished when a coordinator died is not done twice.

Requirements: R19.
"""

import hashlib
import importlib
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeAlias

from lora.errors import (
    ArgumentError,
    CardNotFoundError,
    DataError,
    LoRAError,
    StateError,
    StoreError,
    shown,
)

Function: TypeAlias = Callable[[str, dict[str, Any], Path], Path | None]
"""What does a job: kind, JSON parameters and its folder -> the card file it made, or None if none is worth serving."""


@dataclass(frozen=True)
class Kind:
    """A kind of job.

    Args:
        function: ``"package.module:name"`` of a `Function`; it is imported in the job's process
            alone.
        inputs: The parameters that are paths, or lists of paths, of what it reads: they must be
            there, and stay as they are. ``"model"`` is the base model.
        needed: The parameters that a job must have.
        optional: Those that it may have besides; None for any.
    """

    function: str
    inputs: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        module, colon, name = self.function.partition(":")
        if not (
            colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))
        ):
            raise ArgumentError("job kind: function", "package.module:name", repr(self.function))


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "train": Kind(
            "lora.evolution.work:train",
            inputs=("data", "model"),
            needed=("name", "data", "model"),
            optional=(
                "rank",
                "alpha",
                "target_modules",
                "seed",
                "base_model",
                "preset",
                "steps",
                "metadata",
            ),
        ),
        "extract": Kind(
            "lora.evolution.work:extract",
            inputs=("tuned", "base"),
            needed=("name", "tuned", "base"),
            optional=("rank", "energy", "error", "target_modules", "method", "seed"),
        ),
        "merge": Kind(
            "lora.evolution.work:merge",
            inputs=("cards",),
            needed=("name", "cards"),
            optional=("strategy", "options", "weights", "rank"),
        ),
        "distil": Kind(
            "lora.evolving:distil",
            inputs=("documents", "model"),
            needed=("name", "documents", "model"),
            optional=("steps", "rank", "alpha", "seed"),
        ),
    }
)
"""The kinds that are built in; a factory takes more, in a table of its own."""

VALUES: Mapping[str, tuple[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("rank", "steps"), ("an integer >= 1", lambda value: type(value) is int and value >= 1)
        ),
        "seed": ("an integer >= 0", lambda value: type(value) is int and value >= 0),
        "alpha": (
            "a finite number > 0",
            lambda value: type(value) in (int, float) and 0 < value < math.inf,
        ),
        "energy": (
            "a number in (0, 1]",
            lambda value: type(value) in (int, float) and 0 < value <= 1,
        ),
        "error": (
            "a number in [0, 1)",
            lambda value: type(value) in (int, float) and 0 <= value < 1,
        ),
        "metadata": ("an object", lambda value: isinstance(value, dict)),
    }
)
"""What a parameter of a built-in kind must be, where that can be told without doing the job."""

OUTCOME = "outcome.json"
LOG = "log"
_RUNNING: set[tuple[str, "subprocess.Popen[bytes]"]] = set()


def check(name: str, kind: Kind, parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that are missing, unknown to the kind, or impossible: when a job is added,
    and when it runs.

    Args:
        name: Of the kind.

    Raises:
        ArgumentError: Naming them.
    """
    if missing := [key for key in kind.needed if key not in parameters]:
        raise ArgumentError(
            f"{name}: parameters", ", ".join(kind.needed), f"no {', '.join(missing)}"
        )
    known = (*kind.needed, *(parameters if kind.optional is None else kind.optional))
    if strange := sorted(str(key) for key in parameters if key not in known):
        raise ArgumentError(f"{name}: parameters", f"only {', '.join(known)}", ", ".join(strange))
    for key, (expected, fits) in (VALUES if kind == KINDS.get(name) else {}).items():
        if parameters.get(key) is not None and not fits(parameters[key]):
            raise ArgumentError(f"{name}: {key}", expected, shown(parameters[key]))


def paths_in(kind: Kind, parameters: Mapping[str, Any]) -> dict[str, list[str]]:
    """The paths among a job's parameters, by parameter.

    Raises:
        ArgumentError: If a parameter that must be a path, or a list of them, is something else.
    """
    found = {}
    for key in kind.inputs:
        value = parameters.get(key)
        if value is None:
            continue
        paths = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(path, str | os.PathLike) for path in paths):
            raise ArgumentError(f"job: {key}", "a path or a list of paths", repr(value))
        found[key] = [str(Path(path).absolute()) for path in paths]
    return found


def content_id(path: str) -> str:
    """What tells an input from a changed one: a file's SHA-256; of a folder, that of its files'
    names, sizes and times.

    Raises:
        CardNotFoundError, StoreError: If it is not there, or can't be read.
    """
    try:
        if Path(path).is_dir():
            files = [
                (file, file.stat()) for file in sorted(Path(path).rglob("*")) if file.is_file()
            ]
            told = [
                [str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns]
                for file, stat in files
            ]
            return hashlib.sha256(json.dumps(told).encode()).hexdigest()
        with Path(path).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CardNotFoundError(path, "what the job is to read", "nothing there") from error
    except OSError as error:
        raise StoreError(path, "a file or folder that can be read", error) from error


def supervise(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job in a fresh process and say what came of it; for any executor, as all of it is JSON.

    Args:
        order: ``kind``, ``function``, ``parameters``, ``inputs``, ``folder``, ``attempt``,
            ``seconds``, ``memory`` and ``threads``.

    Returns:
        ``{"card": path or None}``, or ``{"error": text, "final": bool}``, final if another attempt
        would fail alike.
    """
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps(dict(order)).encode() + b"\n"
    command = [sys.executable, "-m", "lora.evolution.work"]
    environment = {"OMP_NUM_THREADS": str(order["threads"]), **os.environ}
    with (
        (folder / LOG).open("ab") as log,
        subprocess.Popen(  # noqa: S603 - this very interpreter
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None  # noqa: S101 - a pipe
        _RUNNING.add(running := (str(folder), process))
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(told)
                process.stdin.flush()
            code = process.wait(order["seconds"])
        except subprocess.TimeoutExpired:
            _kill(process)
            return {"error": f"hit its time limit of {order['seconds']:g} s", "final": False}
        finally:
            _RUNNING.remove(running)
    outcome = _outcome(folder)
    if "card" in outcome or outcome.get("attempt") == order["attempt"]:
        return outcome
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return {"error": f"{ended}; see {folder / LOG}", "final": False}


def halt(folder: str) -> None:
    """Kill what works in a folder, as far as this process supervises it."""
    for place, process in list(_RUNNING):
        if place == folder:
            _kill(process)


def forget(folder: Path) -> None:
    """Make the next attempt start anew: the result that was found here is of no use."""
    (folder / OUTCOME).unlink(missing_ok=True)


def main() -> None:
    """The job's process: an order on standard input, an outcome in the job's folder."""
    order = json.loads(_line(sys.stdin.fileno()))
    threading.Thread(target=_end_with_supervisor, args=(sys.stdin.fileno(),), daemon=True).start()
    folder = Path(order["folder"])
    try:
        _limit(order["memory"])
        with _alone(folder, order["seconds"]):
            if "card" not in _outcome(folder):
                _record(folder, {"card": _perform(order, folder)})
    except MemoryError:
        traceback.print_exc()
        _record(folder, _failure(order, f"hit its memory limit of {order['memory']} bytes"))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        traceback.print_exc()
        wrong = isinstance(error, LoRAError) and not isinstance(error, OSError | RuntimeError)
        _record(folder, _failure(order, f"{type(error).__name__}: {error}", final=wrong))


def _perform(order: Mapping[str, Any], folder: Path) -> str | None:
    for path, known in order["inputs"].items():
        if (found := content_id(path)) != known:
            raise DataError(
                path, f"what it was when the job was added ({known[:12]}…)", f"{found[:12]}…"
            )
    module, _, name = order["function"].partition(":")
    function: Function = getattr(importlib.import_module(module), name)
    made = function(order["kind"], order["parameters"], folder)
    if made is not None and not Path(made).is_file():
        raise CardNotFoundError(
            str(made), f"the card that {order['function']} made", "nothing there"
        )
    return None if made is None else str(Path(made).absolute())


def _failure(order: Mapping[str, Any], error: str, *, final: bool = False) -> dict[str, Any]:
    return {"error": error, "final": final, "attempt": order["attempt"]}


def _record(folder: Path, outcome: Mapping[str, Any]) -> None:
    temporary = folder / f".{OUTCOME}.{os.getpid()}"
    temporary.write_text(json.dumps(outcome), "utf-8")
    temporary.replace(folder / OUTCOME)


def _outcome(folder: Path) -> dict[str, Any]:
    """What was recorded; nothing where a card that it names is gone."""
    try:
        found: dict[str, Any] = json.loads((folder / OUTCOME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    card = found.get("card")
    return found if card is None or Path(card).is_file() else {}


@contextmanager
def _alone(folder: Path, seconds: float) -> Iterator[None]:
    """Be the one process that works in a folder; the system frees it however a process ends."""
    lock = sqlite3.connect(folder / "lock", timeout=seconds, isolation_level=None)
    try:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise StateError(str(folder), "a job that runs in one place", error) from error
        yield
    finally:
        lock.close()


def _limit(memory: int | None) -> None:
    """Let this process have no more private memory than that; what it maps of files for reading is
    not counted.
    """
    if memory is not None:
        import resource  # noqa: PLC0415 - POSIX only

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _line(handle: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(handle, 65536)
        if not more:
            sys.exit("no order")
        line += more
    return line


def _end_with_supervisor(handle: int) -> None:
    while os.read(handle, 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def train(kind: str, parameters: dict[str, Any], folder: Path) -> Path | None:
    """Learn a card from pairs; None if its validation MRR is no better than the base model's.

    Goes on from where an earlier attempt was killed.

    Args:
        kind: ``"train"``.
        parameters: ``name``, ``data`` (a file of pairs) and ``model`` (the base model's folder);
            optionally ``preset``, ``steps``, ``rank``, ``alpha``, ``target_modules``, ``seed``,
            ``base_model`` and ``metadata``.
        folder: The job's.
    """
    from dataclasses import asdict  # noqa: PLC0415 - this and the rest only in the job's process

    from lora.evolution.data import Pairs  # noqa: PLC0415
    from lora.evolution.train import LoRATrainer  # noqa: PLC0415
    from lora.inference.encoder import InferenceCore  # noqa: PLC0415
    from lora.store import save  # noqa: PLC0415

    check(kind, KINDS["train"], parameters)
    engine = SimpleNamespace(base=InferenceCore.from_pretrained(parameters["model"]))
    of_trainer = ("rank", "alpha", "target_modules", "seed", "base_model")
    options = {key: parameters[key] for key in of_trainer if key in parameters}
    trainer = LoRATrainer(engine, settings=parameters.get("preset"), **options)
    learned = trainer.train(
        Pairs.load(parameters["data"]),
        name=parameters["name"],
        metadata=parameters.get("metadata"),
        max_steps=parameters.get("steps"),
        checkpoint=folder / "checkpoint.safetensors",
    )
    told = {when: asdict(found) for when, found in learned.metrics.items()}
    print(json.dumps(told))  # noqa: T201 - into the job's log
    if told["after"]["mrr"] <= told["before"]["mrr"]:
        return None
    path = folder / "card.lora.arrow"
    save(learned.card, path)
    return path


def extract(kind: str, parameters: dict[str, Any], folder: Path) -> Path:
    """Make a card of what separates a tuned model from its base.

    Args:
        kind: ``"extract"``.
        parameters: ``name``, ``tuned`` and ``base`` (weights, as `SafetensorsWeights` takes them);
            optionally one of ``rank``, ``energy`` and ``error``, and ``target_modules``, ``method``
            and ``seed``.
        folder: The job's.
    """
    from lora.extract import MaxError, MinEnergy, extract_delta  # noqa: PLC0415 - only in the job's process
    from lora.store import save  # noqa: PLC0415
    from lora.weights import SafetensorsWeights  # noqa: PLC0415

    check(kind, KINDS["extract"], parameters)
    rules: dict[str, Callable[[Any], Any]] = {
        "rank": lambda rank: rank,
        "energy": MinEnergy,
        "error": MaxError,
    }
    given = [rules[key](parameters[key]) for key in rules if key in parameters]
    if len(given) > 1:
        raise ArgumentError(
            "extract: parameters", "one of rank, energy, error", f"{len(given)} of them"
        )
    base, tuned = SafetensorsWeights(parameters["base"]), SafetensorsWeights(parameters["tuned"])
    chosen = {
        key: parameters[key]
        for key in ("name", "target_modules", "method", "seed")
        if key in parameters
    }
    path = folder / "card.lora.arrow"
    save(extract_delta(base, tuned, *given, **chosen), path)
    return path


def merge(kind: str, parameters: dict[str, Any], folder: Path) -> Path:
    """Merge cards.

    Args:
        kind: ``"merge"``.
        parameters: ``name`` and ``cards`` (files); optionally ``strategy`` (by name), ``options``
            (its own), ``weights`` and ``rank``.
        folder: The job's.
    """
    from lora.merging import STRATEGIES  # noqa: PLC0415 - only in the job's process
    from lora.merging import merge as merged  # noqa: PLC0415
    from lora.store import load, save  # noqa: PLC0415

    check(kind, KINDS["merge"], parameters)
    name = parameters.get("strategy", "average")
    if name not in STRATEGIES:
        raise ArgumentError("merge: strategy", f"one of {', '.join(STRATEGIES)}", repr(name))
    try:
        strategy = STRATEGIES[name](**parameters.get("options", {}))
    except TypeError as error:
        raise ArgumentError("merge: options", f"options of {name}", error) from error
    cards = [load(path) for path in parameters["cards"]]
    card = merged(
        cards, strategy, parameters.get("weights"), parameters.get("rank"), parameters["name"]
    )
    path = folder / "card.lora.arrow"
    save(card, path)
    return path


if __name__ == "__main__":
    main()
