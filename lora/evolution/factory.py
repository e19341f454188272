"""SkillFactory runs queued command lines unattended and puts the cards they make into service.

One coordinator at a time runs the jobs of a folder; any thread and process may add jobs, look and
roll back. Its folder `live` holds one card file of each skill. It is changed by renames, so that a
server and an engine can follow it.

Requirements: R19.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa

from lora.checks import integer, is_digest, risen_version
from lora.errors import LoRAError, MismatchError, MissingPackageError, PeerError, StateError
from lora.evolution.nights import due, night_of, parse_at
from lora.evolution.queue import Job, JobQueue, versions
from lora.evolution.worker import JOBS, OUTCOME, finished, halt, locked, supervise
from lora.federation.cache import CardCache
from lora.files import SUFFIX, PathLike, as_path, load, os_errors, replacing, save

log = logging.getLogger(__name__)

TICK = 1.0
"""Seconds between looks at the queue while jobs run."""

EXAM = ".exam.jsonl"
"""Suffix of the file beside a card with the sample by which later cards are judged."""

WATCH = 30.0
"""Seconds between looks at the clock while it waits for the night."""


class SkillFactory:
    """A queue of long work in a folder, and what runs it.

    Args:
        root: Its folder; all workers must see it at this path.
        executor: Runs the jobs; threads by default.
        workers: How many jobs run at a time.
        keep: Versions of each skill that are kept.
        on_event: Called with a job whose state changed.

    Examples:
        >>> import tempfile
        >>> from lora import LoRACard, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     factory = SkillFactory(f"{folder}/f")
        ...     _ = save(LoRACard("a", 1, 1.0, [], {}), f"{folder}/a.lora.arrow")
        ...     _ = factory.add(["merge", f"{folder}/a.lora.arrow", "--name", "both"])
        ...     factory.run()["state"].to_pylist(), [path.name for path in factory.live().values()]
        (['done'], ['both.lora.arrow'])
    """

    def __init__(
        self,
        root: PathLike,
        *,
        executor: Executor | None = None,
        workers: int = 1,
        keep: int = 3,
        on_event: Callable[[Job], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = as_path(root).absolute()
        self.workers = integer(workers, "factory: workers", 1)
        self.keep = integer(keep, "factory: keep", 1)
        self._executor, self._on_event, self._clock = executor, on_event, clock
        with os_errors(self.root):
            for folder in ("work", "live"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.cards = CardCache(self.root / "cards")
        self.queue = JobQueue(self.root / "queue.sqlite")

    def add(self, arguments: Sequence[str], **limits: Any) -> Job:
        """Check a command line without outputs and queue it; one that is known stays as it is.

        Args:
            limits: `priority` (higher first), `max_failures`, `seconds` and `memory` (bytes).
        """
        job: Job = import_module(JOBS).job_of(arguments, self.root / "live", **limits)
        return self.queue.add(job, self._clock())

    def retry(self, job_id: str, **limits: Any) -> Job:
        """Queue a dead job again, with other limits if any; a `StateError` if it is not dead."""
        return self.queue.retry(job_id, self._clock(), **limits)

    def status(self) -> pa.Table:
        """Return every job: its state, attempts, times, and what it made or why it failed."""
        return self.queue.status()

    def history(self) -> pa.Table:
        """Return everything that happened, the oldest first."""
        return self.queue.history()

    def skills(self) -> pa.Table:
        """Return every version that is kept, and which of each name is live."""
        return self.queue.skills()

    def live(self) -> dict[str, Path]:
        """Return the card file of each skill that is served."""
        return {job.name: self._live(job) for job in self.queue.versions() if job.live}

    def rollback(self, name: str, version: str | None = None) -> Job:
        """Serve an earlier version of a skill again, by default the one before the live one.

        Returns:
            The job that made it.
        """
        job = self.queue.earlier(name, version)
        load(self._kept(job.digest), verify=job.digest)  # a damaged one never goes live
        job = self.queue.put_live(job, self._clock())
        self.sync()
        return job

    def sync(self) -> None:
        """Put what is live into the folder `live`: a reader sees the old file or the new one."""
        with self.queue.transaction() as db, os_errors(self.root / "live"):
            for job in versions(db):
                for suffix in (EXAM, SUFFIX) if job.live else ():
                    kept, file = self._kept(job.digest, suffix), self._live(job, suffix)
                    if suffix == EXAM and not kept.exists():
                        file.unlink(missing_ok=True)
                    elif not kept.exists():
                        log.error("version %s of %s is lost: %s", job.version, job.name, kept)
                    elif not (file.exists() and file.samefile(kept)):
                        arriving = file.with_name(f".{job.digest}.part")
                        arriving.unlink(missing_ok=True)  # a killed process left it
                        os.link(kept, arriving)
                        arriving.replace(file)
                        log.info("live: version %s of %s", job.version, file.name)

    def run(self, *, at: str | None = None, stop: threading.Event | None = None) -> pa.Table:
        """Run jobs until none is queued, or every night for ever; returns `status`.

        Args:
            at: `hh:mm`, local time: run each night, and at once if one was missed.
            stop: Set it to end when the running jobs have ended.
        """
        begin = None if at is None else parse_at(at)
        stop = stop or threading.Event()
        with locked(self.root / "coordinator.lock", 0, "one coordinator at a time"):
            for job in self.queue.jobs("running"):
                if finished(self._folder(job)):  # its next attempt enters what it made
                    self._report(self.queue.release(job, self._clock()))
            for job in self.queue.recover(self._clock()):
                self._report(job)
            self._sweep()
            self.sync()
            if begin is None:
                self._drain(stop)
            while begin is not None and not stop.is_set():
                last = self.queue.night()
                now = datetime.fromtimestamp(self._clock())  # noqa: DTZ006 - the wall clock
                night = night_of(begin, now) if last is None else due(begin, last, now)
                if night is not None:
                    if last is not None:  # the first start has missed nothing
                        self._drain(stop)
                    if not stop.is_set():
                        self.queue.set_night(night)
                stop.wait(WATCH)
        return self.status()

    def _drain(self, stop: threading.Event) -> None:
        running: dict[Future[dict[str, Any]], Job] = {}
        own = ThreadPoolExecutor(self.workers, thread_name_prefix="lora-factory")
        with own if self._executor is None else nullcontext(self._executor) as executor:
            try:
                while True:
                    while len(running) < self.workers and not stop.is_set():
                        if not self._begin(executor, running):
                            break
                    if not running:
                        return
                    for future in wait(running, TICK, FIRST_COMPLETED).done:
                        self._settle(running[future], future)
                        del running[future]
            finally:  # after an error or an interrupt: stop the jobs and queue them again
                for future in running:
                    future.cancel()
                while self._executor is None and wait(running, 0.1).not_done:
                    for job in running.values():
                        halt(str(self._folder(job)))
                for job in running.values():
                    self._report(self.queue.release(job, self._clock()))

    def _begin(self, executor: Executor, running: dict[Future[dict[str, Any]], Job]) -> bool:
        job = self.queue.claim(self._clock())
        if job is None:
            return False
        order = {
            "arguments": job.arguments,
            "inputs": job.inputs,
            "folder": str(self._folder(job)),
            "seconds": job.seconds,
            "memory": job.memory,
            "live": str(self.root / "live"),
            "threads": max(1, (os.cpu_count() or 1) // self.workers),
        }
        try:
            self._report(job)
            running[executor.submit(supervise, order)] = job
        except BaseException as error:
            self._report(self.queue.release(job, self._clock()))
            if isinstance(error, RuntimeError) and not isinstance(error, LoRAError):
                # The pool is broken or was shut down.
                raise StateError("factory: executor", "one that takes jobs", error) from error
            raise
        return True

    def _settle(self, job: Job, future: Future[dict[str, Any]]) -> None:
        folder = self._folder(job)
        try:
            outcome = future.result()
        except Exception as error:  # noqa: BLE001 - of a killed worker or a broken pool
            # The job itself may have ended before its executor failed.
            outcome = finished(folder) or {"error": _text(error), "final": False}
        accepted = None
        try:
            if outcome.get("card"):
                accepted = self._keep(job, outcome)
        except Exception as error:  # noqa: BLE001 - of a card that is no use
            (folder / OUTCOME).unlink(missing_ok=True)
            outcome = {"error": _text(error), "final": False}
        now, printed = self._clock(), outcome.get("printed", {})
        if "error" in outcome:
            ended = self.queue.fail(job, outcome["error"], now, final=outcome["final"])
        elif accepted is not None:
            note = json.dumps(printed)
            ended = self.queue.accept(job, *accepted, now, keep=self.keep, note=note)
            self.sync()
        else:
            reason = printed.get("reason", "made nothing worth serving")
            printed.pop("candidate", None)  # it is swept with the job's folder
            ended = self.queue.reject(job, now, reason, json.dumps(printed))
        self._report(ended)
        self._sweep()

    def _keep(self, job: Job, outcome: dict[str, Any]) -> tuple[str, str]:
        """Put a card in its place by digest; return its digest, and a version above the last.

        Its sample is kept with it; if it brings none, that of the version that it replaces.
        """
        card, kept = load(outcome["card"]), self.queue.versions(job.name)
        exam = Path(outcome["exam"]) if outcome.get("exam") else self._live(job, EXAM)
        if card.name != job.name:
            raise MismatchError(f"{job.kind}: card", f"one named {job.name!r}", repr(card.name))
        last = kept[-1].version if kept else None
        version = risen_version(card.metadata.get("version"), last or "")
        with self.cards.arriving() as (arrived, _):
            metadata = {**card.metadata, "version": version}
            sha = save(replace(card, metadata=metadata), arrived)
            if exam.is_file():
                with replacing(self._kept(sha, EXAM)) as copy:
                    copy.write(exam.read_bytes())
            self.cards.admit(arrived, sha)
        return sha, version

    def _sweep(self) -> None:
        kept = {job.digest for job in self.queue.versions()}
        states = {job.id: job.state for job in self.queue.jobs()}
        with os_errors(self.root):
            for file in self.cards.root.iterdir():
                sha = file.name.partition(".")[0]
                if is_digest(sha) and sha not in kept:
                    file.unlink(missing_ok=True)
            for folder in (self.root / "work").iterdir():
                if states.get(folder.name) not in ("queued", "running", "dead"):
                    shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, job: Job) -> Path:
        return self.root / "work" / job.id

    def _kept(self, digest: str | None, suffix: str = SUFFIX) -> Path:
        return self.cards.root / f"{digest}{suffix}"

    def _live(self, job: Job, suffix: str = SUFFIX) -> Path:
        return self.root / "live" / f"{job.name}{suffix}"

    def _report(self, job: Job | None) -> None:
        if job is None:
            return
        level = logging.WARNING if job.error else logging.INFO
        about = (job.kind, job.name, job.attempts, job.state, job.error or "")
        log.log(level, "%s %r, attempt %d: %s %s", *about)
        if self._on_event is not None:
            self._on_event(job)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """Open an executor on a Dask cluster by its scheduler's address, `tcp://host:port`."""
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
        # By default Dask merges equal jobs into one.
        yield client.get_executor(pure=False)  # type: ignore[no-untyped-call]
