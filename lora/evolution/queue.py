"""The skill factory's jobs, history and versions: a SQLite file in which a change is a transaction.

A job runs at least once and takes effect once: its card is entered in the transaction that ends it.
No clock is read here: `now` is passed in, as seconds since 1970.

Requirements: R19.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import pyarrow as pa

from lora.checks import finite, integer
from lora.errors import ArgumentError, StateError, StoreError, UnknownCardError, shown
from lora.files import PathLike, as_path

VERSION = 2
"""Version of the file's layout."""

PATIENCE = 30.0
"""Seconds to wait for another process's transaction."""

LONGEST = 1e6
"""Seconds that an attempt may take at most; SQLite's waits have 32 bits of milliseconds."""

NIGHT = 8 * 3600.0
"""Seconds that an attempt may take if the job does not say: there is always a limit."""


MOVES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "claim": ("queued", "running"),
        "accept": ("running", "done"),
        "reject": ("running", "rejected"),
        "fail": ("running", "queued"),
        "bury": ("running", "dead"),
        "release": ("running", "queued"),
        "retry": ("dead", "queued"),
    }
)
"""Everything that can happen to a job: the state before and the state after, by name."""

STATES = tuple(dict.fromkeys(state for move in MOVES.values() for state in move))
"""Every state; `done`, `rejected` and `dead` are ends."""

_TABLES = (
    """CREATE TABLE jobs (
        age INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, state TEXT NOT NULL,
        data TEXT NOT NULL)""",
    "CREATE INDEX jobs_state ON jobs (state)",
    "CREATE TABLE events (event INTEGER PRIMARY KEY AUTOINCREMENT, data TEXT NOT NULL)",
    """CREATE TABLE versions (
        name TEXT NOT NULL, version INTEGER NOT NULL, data TEXT NOT NULL,
        PRIMARY KEY (name, version))""",
    "CREATE TABLE nights (only INTEGER PRIMARY KEY CHECK (only = 1), data TEXT NOT NULL)",
    f"PRAGMA user_version = {VERSION}",
)
"""The tables; `data` is a `Job`, an event or a `Version` as JSON."""

_TYPES = {"count": pa.int64(), "flag": pa.bool_(), "time": pa.timestamp("us", tz="UTC")}
_JOBS = (
    "id kind name base priority:count state attempts:count failures:count max_failures:count "
    "created:time started:time ended:time digest error"
)
_EVENTS = "event:count at:time what name job kind attempt:count state note"
_VERSIONS = "name version:count digest job accepted:time live:flag refused"
"""The columns of the tables that are shown; text where there is no type."""


@dataclass(frozen=True)
class Job:
    """A job and how far it has come; make one with `Job.of`.

    Args:
        kind, name: The command, and the skill that it makes.
        inputs: Path -> digest of what it reads.
        base: The base model that it is for; jobs of two base models never run at once.
        seconds, memory: Limits of one attempt; memory in bytes.
        attempts: Begun so far; only the last one may end the job.
        error: Why the last attempt failed or was rejected.
    """

    id: str
    kind: str
    name: str
    arguments: tuple[str, ...]
    inputs: Mapping[str, str]
    base: str = ""
    priority: int = 0
    max_failures: int = 3
    seconds: float = NIGHT
    memory: int | None = None
    state: str = "queued"
    attempts: int = 0
    failures: int = 0
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    digest: str | None = None
    error: str | None = None

    @classmethod
    def of(
        cls,
        arguments: Sequence[str],
        name: str,
        inputs: Mapping[str, str] = MappingProxyType({}),
        **limits: Any,
    ) -> Self:
        """Make a new job; its id is the hash of its words and inputs; `limits` are the class's."""
        text = json.dumps([list(arguments), dict(inputs)], sort_keys=True)
        sha = hashlib.sha256(text.encode()).hexdigest()
        job = cls(sha, arguments[0], name, tuple(arguments), dict(inputs), **limits)
        if not name or not name.isprintable():
            raise ArgumentError("job: name", "the name of the skill to make", shown(name))
        if not -(2**31) <= integer(job.priority, "job: priority") < 2**31:
            raise ArgumentError("job: priority", "an integer of 32 bits", job.priority)
        integer(job.max_failures, "job: max_failures", 1)
        if not 0 < finite(job.seconds, "job: seconds", ArgumentError) <= LONGEST:
            raise ArgumentError("job: seconds", f"a number > 0 and <= {LONGEST:g}", job.seconds)
        if job.memory is not None:
            integer(job.memory, "job: memory", 1)
        return job


@dataclass(frozen=True)
class Version:
    """An accepted card: the n-th of its name; `refused` tells why the engine refused it."""

    name: str
    version: int
    digest: str
    job: str
    accepted: float
    live: bool
    refused: str | None


class JobQueue:
    """A queue in a file, for any number of threads and processes; one coordinator at a time claims.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, JobQueue(f"{folder}/q.sqlite") as queue:
        ...     _ = queue.add(Job.of(["merge"], "both"), now=0.0)
        ...     job = queue.claim(now=1.0)
        ...     ended = queue.accept(job, "0" * 64, now=2.0)
        ...     again = queue.accept(job, "1" * 64, now=3.0)
        >>> ended.state, again
        ('done', None)
    """

    def __init__(self, path: PathLike) -> None:
        self.path = as_path(path)
        self._write = threading.RLock()
        with _sql_errors(self.path), ExitStack() as after_error:
            self._db = sqlite3.connect(
                self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
            after_error.callback(self._db.close)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            with self._transaction() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                for statement in _TABLES if version == 0 else ():
                    db.execute(statement)
            if version not in (0, VERSION):
                expected, present = f"a queue of version {VERSION}", f"version {version}"
                raise StateError(str(self.path), expected, present)
            after_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._write:
            self._db.close()

    def job(self, job_id: str) -> Job | None:
        """Return the job of an id."""
        return next((_job(row) for row in self._rows("jobs WHERE id = ?", job_id)), None)

    def jobs(self, state: str | None = None) -> list[Job]:
        """List jobs in the order in which they run or ran: by priority, then by age."""
        rows = self._rows("jobs WHERE ?1 IS NULL OR state = ?1 ORDER BY age", state)
        return sorted(map(_job, rows), key=lambda job: -job.priority)

    def versions(self, name: str | None = None) -> list[Version]:
        """List the versions that are kept, by name and number."""
        rows = self._rows("versions ORDER BY name, version")
        return [Version(**row) for row in rows if name in (None, row["name"])]

    def status(self) -> pa.Table:
        """Return every job, in the order of `jobs`."""
        return _table(map(vars, self.jobs()), _JOBS)

    def history(self) -> pa.Table:
        """Return every event, the oldest first."""
        rows = enumerate(self._rows("events ORDER BY event"), 1)
        return _table([{"event": number, **row} for number, row in rows], _EVENTS)

    def skills(self) -> pa.Table:
        """Return every version that is kept."""
        return _table(map(vars, self.versions()), _VERSIONS)

    def add(self, job: Job, now: float) -> Job:
        """Put a job at the end of the queue; a job that is there already stays as it is."""
        with self._transaction():
            return self.job(job.id) or self._store("add", replace(job, created=now), now)

    def claim(self, now: float) -> Job | None:
        """Take the oldest job of the highest priority, unless a job of another base model runs.

        A job that waits for its base model holds back the others.
        """
        with self._transaction():
            job = next(iter(self.jobs("queued")), None)
            bases = {other.base for other in self.jobs("running")}
            if job is None or bases - {job.base}:
                return None
            started = replace(job, attempts=job.attempts + 1, started=now, ended=None, error=None)
            return self._store("claim", replace(started, state="running"), now)

    def accept(
        self, job: Job, digest: str, now: float, keep: int = 3, note: str | None = None
    ) -> Job | None:
        """End a job with its card, which becomes the live version of its name.

        Keeps the last `keep` good versions and the one that was live. Returns None if this attempt
        no longer holds the job.
        """
        with self._transaction():
            ended = self._move("accept", job, now, note, ended=now, digest=digest)
            if ended is not None:
                kept = self.versions(job.name)
                number = 1 + max((version.version for version in kept), default=0)
                kept.append(Version(job.name, number, digest, job.id, now, False, None))
                good = [version for version in kept if version.refused is None][-keep:]
                self._put_live([v for v in kept if v.live or v in good or v is kept[-1]], number)
            return ended

    def reject(
        self, job: Job, now: float, reason: str | None = None, note: str | None = None
    ) -> Job | None:
        """End a job that made nothing worth serving; returns None as `accept`."""
        return self._move("reject", job, now, note, ended=now, error=reason)

    def fail(self, job: Job, error: str, now: float, *, final: bool = False) -> Job | None:
        """Queue a failed job again, or bury it after its last or a `final` failure; as `accept`."""
        failures = job.failures + 1
        what = "bury" if final or failures >= job.max_failures else "fail"
        return self._move(what, job, now, error, ended=now, error=error, failures=failures)

    def release(self, job: Job, now: float) -> Job | None:
        """Queue a job again that was stopped, not failed; returns None as `accept`."""
        return self._move("release", job, now)

    def recover(self, now: float) -> list[Job]:
        """Fail the jobs that a dead coordinator left running; only the coordinator calls it."""
        with self._transaction():
            left = [self.fail(job, "the coordinator died", now) for job in self.jobs("running")]
            return [job for job in left if job is not None]

    def retry(self, job_id: str, now: float) -> Job:
        """Queue a dead job again, in its old place, with no failures counted."""
        with self._transaction():
            job = self.job(job_id)
            again = job and self._move("retry", job, now, failures=0)
            if again is None:
                state = f"one {job.state}" if job else "none"
                raise StateError(f"retry {shown(job_id)}", "a dead job", state)
            return again

    def roll_back(self, name: str, version: int | None, now: float) -> Version:
        """Make an earlier version live; by default the one before the live one."""
        where = f"roll back {shown(name)}"
        with self._transaction():
            kept = {each.version: each for each in self.versions(name)}
            if not kept:
                raise UnknownCardError(where, "a skill that was accepted", "none of that name")
            number = _previous(kept.values()) if version is None else version
            if number is None:
                raise StateError(where, "a version before the live one", "none that is kept")
            if number not in kept:
                expected = f"one of {list(kept)}"
                raise UnknownCardError(f"{where}: version", expected, shown(version))
            kept[number] = replace(kept[number], refused=None, live=True)
            self._put_live(kept.values(), number)
            self._log("roll back", self.job(kept[number].job), now, f"version {number}")
            return kept[number]

    def refuse(self, version: Version, reason: str, now: float) -> None:
        """Note that the engine refused a version; the one before a live one becomes live."""
        number = version.version
        with self._transaction():
            kept = self.versions(version.name)
            live = next((each.version for each in kept if each.live), None)
            if live == number:
                live = _previous(kept)
            kept = [replace(v, refused=reason) if v.version == number else v for v in kept]
            self._put_live(kept, live)
            self._log("refuse", self.job(version.job), now, f"version {number}: {reason}")

    def night(self) -> date | None:
        """Return the last night that was run, or when nights began."""
        return next((date.fromisoformat(night) for night in self._rows("nights")), None)

    def set_night(self, night: date) -> None:
        """Note the last night that was run."""
        with self._transaction() as db:
            row = (json.dumps(night.isoformat()),)
            db.execute("INSERT OR REPLACE INTO nights VALUES (1, ?)", row)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction; a block inside another is part of it."""
        with self._write, _sql_errors(self.path):
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _rows(self, where: str, *values: Any) -> list[Any]:
        """Read the `data` of a table's rows."""
        with self._write, _sql_errors(self.path):
            rows = self._db.execute(f"SELECT data FROM {where}", values)  # noqa: S608 - own text
            return [json.loads(data) for (data,) in rows]

    def _move(
        self, what: str, job: Job, now: float, note: str | None = None, **changes: Any
    ) -> Job | None:
        """Move a job that this attempt holds."""
        before, after = MOVES[what]
        with self._transaction():
            stored = self.job(job.id)
            if stored is None or (stored.state, stored.attempts) != (before, job.attempts):
                return None
            return self._store(what, replace(stored, state=after, **changes), now, note)

    def _store(self, what: str, job: Job, now: float, note: str | None = None) -> Job:
        """Write a job and an event about it."""
        self._db.execute(
            "INSERT INTO jobs (id, state, data) VALUES (?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET state = excluded.state, data = excluded.data",
            (job.id, job.state, json.dumps(vars(job))),
        )
        self._log(what, job, now, note)
        return job

    def _put_live(self, versions: Iterable[Version], live: int | None) -> None:
        """Replace the versions of a name, of which one is live."""
        versions = list(versions)
        self._db.execute("DELETE FROM versions WHERE name = ?", (versions[0].name,))
        for version in versions:
            data = json.dumps(vars(replace(version, live=version.version == live)))
            row = (version.name, version.version, data)
            self._db.execute("INSERT INTO versions VALUES (?, ?, ?)", row)

    def _log(self, what: str, job: Any, now: float, note: str | None) -> None:
        """Write an event about a job."""
        event = {key: getattr(job, key) for key in ("name", "kind", "state")}
        event |= {"at": now, "what": what, "job": job.id, "attempt": job.attempts, "note": note}
        self._db.execute("INSERT INTO events (data) VALUES (?)", (json.dumps(event),))


@contextmanager
def _sql_errors(path: Path) -> Iterator[None]:
    """Re-raise SQLite's errors as a `StoreError`."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(str(path), "a job queue that can be read and written", error) from error


def _previous(versions: Iterable[Version]) -> int | None:
    """Find the newest version before the live one that no engine refused."""
    versions = list(versions)
    live = next((version.version for version in versions if version.live), 0)
    good = (version.version for version in versions if version.refused is None)
    return max((number for number in good if number < live), default=None)


def _job(row: dict[str, Any]) -> Job:
    return Job(**{**row, "arguments": tuple(row["arguments"])})


def _table(rows: Iterable[Mapping[str, Any]], columns: str) -> pa.Table:
    """Make a table of rows whose times are seconds."""
    rows, arrays = list(rows), {}
    for column in columns.split():
        name, _, kind = column.partition(":")
        cells = [row[name] for row in rows]
        if kind == "time":
            cells = [None if cell is None else round(cell * 1e6) for cell in cells]
        arrays[name] = pa.array(cells, _TYPES.get(kind, pa.string()))
    return pa.table(arrays)
