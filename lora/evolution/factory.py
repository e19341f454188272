"""SkillFactory: runs queued jobs unattended, by night if told so, and puts what they make into
service.

What it knows is in its folder and nowhere else: ``queue.sqlite`` (jobs, events, versions),
``cards/`` (accepted cards by digest), ``work/`` (a folder for each job that is not done). One
coordinator at a time runs jobs, held to that by a lock that the system lets go of when its process
dies; any number of processes may add jobs, look and roll back.

Thread safety: one thread runs; any thread may call the rest.

Requirements: R19.
"""

import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import pyarrow as pa

from lora.checks import integer
from lora.errors import (
    ArgumentError,
    LoRAError,
    MismatchError,
    MissingPackageError,
    PeerError,
    StateError,
    shown,
)
from lora.evolution.nights import due, next_night, night_of, parse_at
from lora.evolution.queue import Job, JobQueue, Version
from lora.evolution.work import KINDS, Kind, check, content_id, forget, halt, paths_in, supervise
from lora.federation.cache import CardCache
from lora.store import PathLike, as_path, digest, load, os_errors

log = logging.getLogger(__name__)

TICK = 1.0
"""Seconds between looks at the queue, and at what is live, while jobs run."""

WATCH = 30.0
"""Seconds between looks at the clock, while it waits for the night."""


class Service(Protocol):
    """How an engine puts a card into service: load it, build the model with it, swap; raise if it
    won't do.
    """

    def __call__(self, name: str, path: Path) -> None:
        """Serve this card in place of the one of that name."""


class Stop(Protocol):
    """What ends a run: a ``threading.Event`` is one."""

    def is_set(self) -> bool:
        """Whether to stop."""
        ...

    def wait(self, timeout: float) -> bool:
        """Sleep, but not on when it is set."""
        ...


class _Never:
    def is_set(self) -> bool:
        return False

    def wait(self, timeout: float) -> bool:
        time.sleep(timeout)
        return False


class SkillFactory:
    """A queue of long work in a folder, and what runs it.

    Every job runs in a fresh process of its own, within its limits of time and memory, whichever
    executor carries it.

    Args:
        root: Its folder, made if it is not there. Workers on other machines must see it, and what
            jobs read, at the same path.
        kinds: What it can do, by name; add ``"distil"`` and others to `lora.evolution.work.KINDS`.
        executor: Carries the jobs: any `concurrent.futures.Executor`; by default threads, each
            waiting for a job's process. Processes of a pool should be spawned, not forked.
        workers: Jobs at a time.
        service: Called with each version that is to be served, at the start and whenever that
            changes; see `Service`.
        keep: Versions of each skill that are kept, as `JobQueue.accept`'s.
        on_event: Called with a job whenever it moved to another state.
        clock: Seconds since 1970.

    Examples:
        >>> import tempfile
        >>> from lora import LoRACard, save
        >>> with tempfile.TemporaryDirectory() as folder, SkillFactory(f"{folder}/factory") as factory:
        ...     _ = save(LoRACard("a", 1, 1.0, [], {}), f"{folder}/a.lora.arrow")
        ...     _ = factory.add("merge", {"name": "both", "cards": [f"{folder}/a.lora.arrow"]})
        ...     factory.run()["state"].to_pylist()
        ['done']
    """

    def __init__(
        self,
        root: PathLike,
        *,
        kinds: Mapping[str, Kind] = KINDS,
        executor: Executor | None = None,
        workers: int = 1,
        service: Service | None = None,
        keep: int = 3,
        on_event: Callable[[Job], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = as_path(root).absolute()
        self.workers = integer(workers, "factory: workers", 1)
        self.keep = integer(keep, "factory: keep", 1)
        self._kinds, self._executor, self._service = dict(kinds), executor, service
        self._on_event, self._clock = on_event, clock
        self._serving: dict[str, str] = {}
        self._swap = threading.RLock()
        with os_errors(self.root):
            (self.root / "work").mkdir(parents=True, exist_ok=True)
        self.cards = CardCache(self.root / "cards")
        self.queue = JobQueue(self.root / "queue.sqlite")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the queue."""
        self.queue.close()

    def add(
        self, kind: str, parameters: Mapping[str, Any], *, dry_run: bool = False, **options: Any
    ) -> Job:
        """Queue a job; one of the same kind, parameters and inputs that is known already is
        returned as it is.

        Args:
            kind: One of the factory's kinds.
            parameters: What its function takes; ``name`` is the skill's. Paths of what it reads are
                made absolute.
            dry_run: Say what would be queued, and queue nothing.
            options: ``priority`` (higher first), ``max_failures``, ``seconds`` and ``memory``
                (bytes), as `Job.of`'s.

        Raises:
            ArgumentError: If the kind is unknown, or parameters are missing, unknown or won't do.
            CardNotFoundError: If what it is to read is not there.
        """
        if kind not in self._kinds:
            raise ArgumentError("job kind", f"one of {', '.join(self._kinds)}", shown(kind))
        check(kind, self._kinds[kind], parameters)
        paths = paths_in(self._kinds[kind], parameters)
        inputs = {path: content_id(path) for several in paths.values() for path in several}
        absolute = {
            key: several if isinstance(parameters[key], list | tuple) else several[0]
            for key, several in paths.items()
        }
        base = str(absolute.get("model", ""))
        job = Job.of(kind, {**parameters, **absolute}, inputs, base=base, **options)
        if dry_run:
            return self.queue.job(job.id) or job
        return self.queue.add(job, self._clock())

    def retry(self, job_id: str) -> Job:
        """Take a job from the dead-letter list and queue it again.

        Raises:
            StateError: If it is not dead.
        """
        return self.queue.retry(job_id, self._clock())

    def status(self) -> pa.Table:
        """Every job: what it is, its state, attempts, times, and what it made or why it failed."""
        return self.queue.status()

    def history(self) -> pa.Table:
        """Everything that happened, the oldest first."""
        return self.queue.history()

    def skills(self) -> pa.Table:
        """Every version that is kept, and which of each name is live."""
        return self.queue.skills()

    def live(self) -> dict[str, Path]:
        """The card file to serve, of each skill."""
        return {
            version.name: self.cards.path(version.digest)
            for version in self.queue.versions()
            if version.live
        }

    def next_run(self, at: str) -> datetime:
        """When nightly work is due next, on the local wall clock; what is past is due now."""
        return next_night(parse_at(at), self.queue.night(), self._now())

    def rollback(self, name: str, version: int | None = None, *, dry_run: bool = False) -> Version:
        """Serve an earlier version of a skill again, by default the one before; returns that.

        This factory swaps to it at once; another that runs on the folder with a service of its own,
        at its next look.

        Raises:
            UnknownCardError, StateError: As `JobQueue.roll_back`.
        """
        chosen = self.queue.roll_back(name, version, self._clock(), dry_run=dry_run)
        if not dry_run:
            self.sync()
        return chosen

    def sync(self) -> None:
        """Put into service what is live and is not served yet; what the engine refuses gives way to
        the version before.
        """
        with self._swap:
            while self._service is not None:
                wanted = [
                    v
                    for v in self.queue.versions()
                    if v.live and self._serving.get(v.name) != v.digest
                ]
                if not wanted:
                    return
                for version in wanted:
                    self._serve(self._service, version)

    def _serve(self, service: Service, version: Version) -> None:
        try:
            service(version.name, self.cards.path(version.digest))
        except Exception as error:  # noqa: BLE001 - the engine's, and the last good version is still serving
            log.warning("skill %r, version %d: refused: %s", version.name, version.version, error)
            self.queue.refuse(version, f"{type(error).__name__}: {error}", self._clock())
        else:
            self._serving[version.name] = version.digest
            log.info("skill %r: version %d is live", version.name, version.version)

    def run(self, *, at: str | None = None, stop: Stop | None = None) -> pa.Table:
        """Run jobs until none is queued; or every night, for ever.

        Args:
            at: A time of day, ``hh:mm`` on the local wall clock: run each night from then on, and
                at once if a night was missed.
            stop: Set it to end: no further job is begun, and those that run are waited for.

        Returns:
            As `status`.

        Raises:
            StateError: If another coordinator runs, or the executor is broken; jobs that it held
                are queued again.
        """
        begin = None if at is None else parse_at(at)
        stop = stop or _Never()
        with _only_one(self.root / "coordinator.lock"):
            for job in self.queue.recover(self._clock()):
                self._say(job)
            self._sweep()
            if begin is None:
                self._drain(stop)
            while begin is not None and not stop.is_set():
                self.sync()
                last, now = self.queue.night(), self._now()
                night = night_of(begin, now) if last is None else due(begin, last, now)
                if night is not None:
                    if last is not None:  # the first start has missed nothing
                        self._drain(stop)
                    if not stop.is_set():
                        self.queue.set_night(night)
                stop.wait(WATCH)
        return self.status()

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC).astimezone().replace(tzinfo=None)

    def _drain(self, stop: Stop) -> None:
        running: dict[Future[dict[str, Any]], Job] = {}
        with self._carrier() as executor:
            try:
                while True:
                    self.sync()
                    while (
                        len(running) < self.workers
                        and not stop.is_set()
                        and self._begin(executor, running)
                    ):
                        pass
                    if not running:
                        return
                    for future in wait(running, TICK, FIRST_COMPLETED).done:
                        self._settle(running[future], future)
                        del running[future]
            finally:  # nothing is left where all went well
                for future in running:
                    future.cancel()
                while self._executor is None and wait(running, 0.1).not_done:
                    for job in running.values():
                        halt(str(self._folder(job)))
                for job in running.values():
                    self._say(self.queue.release(job, self._clock()))

    @contextmanager
    def _carrier(self) -> Iterator[Executor]:
        if self._executor is not None:
            yield self._executor
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="lora-factory") as threads:
            yield threads

    def _begin(self, executor: Executor, running: dict[Future[dict[str, Any]], Job]) -> bool:
        job = self.queue.claim(self._clock())
        if job is None:
            return False
        try:
            self._say(job)
            if job.kind not in self._kinds:
                error = f"no kind {job.kind!r} here, only {', '.join(self._kinds)}"
                self._say(self.queue.fail(job, error, self._clock(), final=True))
                return True
            running[executor.submit(supervise, self._order(job))] = job
        except BaseException as error:
            self._say(self.queue.release(job, self._clock()))
            if isinstance(error, RuntimeError) and not isinstance(
                error, LoRAError
            ):  # a broken pool, or one shut down
                raise StateError("factory: executor", "one that takes jobs", error) from error
            raise
        return True

    def _order(self, job: Job) -> dict[str, Any]:
        return {
            "kind": job.kind,
            "function": self._kinds[job.kind].function,
            "parameters": dict(job.parameters),
            "inputs": dict(job.inputs),
            "folder": str(self._folder(job)),
            "attempt": job.attempts,
            "seconds": job.seconds,
            "memory": job.memory,
            "threads": max(1, (os.cpu_count() or 1) // self.workers),
        }

    def _settle(self, job: Job, future: Future[dict[str, Any]]) -> None:
        """End an attempt: with its card on disk and entered, or with its error told."""
        try:
            outcome = future.result()
        except Exception as error:  # noqa: BLE001 - the executor's: a worker killed, a pool broken
            outcome = {"error": f"{type(error).__name__}: {error}", "final": False}
        card = outcome.get("card")
        if card is not None:
            try:
                sha = self._keep(job, Path(card))
            except (LoRAError, OSError) as error:
                forget(self._folder(job))
                outcome = {"error": f"{type(error).__name__}: {error}", "final": False}
        now = self._clock()
        if "error" in outcome:
            ended = self.queue.fail(job, outcome["error"], now, final=outcome["final"])
        elif card is None:
            ended = self.queue.reject(job, now)
        else:
            ended = self.queue.accept(job, sha, now, self.keep)
        self._say(ended)
        self._sweep()

    def _keep(self, job: Job, path: Path) -> str:
        """Copy a card to its place by digest, whole and checked."""
        with self.cards.arriving() as (arrived, file), path.open("rb") as made:
            shutil.copyfileobj(made, file)
            found = load(arrived).name
            if found != job.name:
                raise MismatchError(f"{job.kind}: card", f"one named {job.name!r}", repr(found))
            sha = digest(arrived)
            self.cards.admit(arrived, sha)
            return sha

    def _sweep(self) -> None:
        """Remove the cards that no version names and the folders of jobs that are done with."""
        named = {version.digest for version in self.queue.versions()}
        open_jobs = {
            job.id for job in self.queue.jobs() if job.state in ("queued", "running", "dead")
        }
        with os_errors(self.root):
            for sha in self.cards.digests():
                if sha not in named:
                    self.cards.path(sha).unlink(missing_ok=True)
            for folder in (self.root / "work").iterdir():
                if folder.name not in open_jobs:
                    shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, job: Job) -> Path:
        return self.root / "work" / job.id

    def _say(self, job: Job | None) -> None:
        if job is None:  # it is another attempt's by now
            return
        level = logging.WARNING if job.error else logging.INFO
        tail = f": {job.error}" if job.error else ""
        log.log(level, "%s %r, attempt %d: %s%s", job.kind, job.name, job.attempts, job.state, tail)
        if self._on_event is not None:
            self._on_event(job)


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """An executor that carries jobs to the workers of a Dask cluster, for `SkillFactory`.

    Equal jobs stay apart (``pure=False``); by default Dask would run one of them.

    Args:
        address: Of its scheduler, such as ``tcp://192.0.2.7:8786``.

    Raises:
        MissingPackageError: If the ``cluster`` extra is not installed.
        PeerError: If no scheduler answers there.
    """
    try:
        from distributed import Client  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingPackageError(
            "factory: cluster", "the package distributed", error, "install [cluster]"
        ) from error
    try:
        client = Client(address, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise PeerError(f"cluster {address}", "a Dask scheduler", error) from error
    with client:
        yield client.get_executor(pure=False)  # type: ignore[no-untyped-call]


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock that the system lets go of when this process ends, however it does."""
    lock = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise StateError(str(path), "one coordinator at a time", "another that runs") from error
        yield
    finally:
        lock.close()
