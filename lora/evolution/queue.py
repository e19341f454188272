"""The skill factory's jobs, history and versions: a SQLite file in which a change is a transaction.

A job is a command line of `lora`. Its id is the hash of the command line and of the inputs, so a job
that is added twice is done once. A job runs at least once and takes effect once: its card is entered
in the transaction that ends it, and only by the attempt that holds the job. No clock is read here:
`now` is passed in, as seconds since 1970. A job's age is its place in the queue.

Requirements: R19.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from types import MappingProxyType
from typing import Any, Self

import pyarrow as pa

from lora.checks import finite, integer
from lora.errors import ArgumentError, StateError, StoreError, UnknownCardError, shown
from lora.store import PathLike, as_path

VERSION = 2
"""Version of the file's layout."""

PATIENCE = 30.0
"""Seconds to wait for another process's transaction."""

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
"""Everything that can happen to a job: the state before and the state after, by name.

`accept`: it made a card. `reject`: it made nothing worth serving. `fail`: it will be tried again.
`bury`: it failed for good. `release`: it was stopped, which does not count as a failure. `retry`: a
dead job was asked for again.
"""

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
    "CREATE TABLE nights (only INTEGER PRIMARY KEY CHECK (only = 1), night TEXT NOT NULL)",
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
        id: SHA-256 of arguments and inputs.
        kind, name: The command, and the skill that it makes.
        arguments: The command line, without `lora`.
        inputs: Path -> digest of what it reads.
        base: The base model that it loads; empty if it needs none.
        priority: Higher runs first.
        max_failures: The job is dead after so many failed attempts.
        seconds, memory: Limits of one attempt; memory in bytes.
        attempts: Begun so far; only the current attempt may end the job.
        failures: Failed attempts since the job was last asked for.
        digest: Of the card that it made.
        error: Why the last attempt failed, or why the result was rejected.
        age: Its place in the queue.
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
    age: int = field(default=0, compare=False)

    @classmethod
    def of(
        cls,
        arguments: Sequence[str],
        name: str,
        inputs: Mapping[str, str] = MappingProxyType({}),
        **limits: Any,
    ) -> Self:
        """Make a new job; `limits` are `base` to `memory` of the class.

        Raises:
            ArgumentError: The name or a limit is out of range.

        Examples:
            >>> job = Job.of(["merge", "a.lora.arrow", "--name", "both"], "both")
            >>> job.id == Job.of(job.arguments, "both", priority=7).id, job.kind
            (True, 'merge')
        """
        text = json.dumps([list(arguments), dict(inputs)], sort_keys=True)
        sha = hashlib.sha256(text.encode()).hexdigest()
        job = cls(sha, arguments[0], name, tuple(arguments), dict(inputs), **limits)
        if not name or not name.isprintable():
            raise ArgumentError("job: name", "the name of the skill to make", shown(name))
        if not -(2**31) <= integer(job.priority, "job: priority") < 2**31:
            raise ArgumentError("job: priority", "an integer of 32 bits", job.priority)
        integer(job.max_failures, "job: max_failures", 1)
        if finite(job.seconds, "job: seconds", ArgumentError) <= 0:
            raise ArgumentError("job: seconds", "a number > 0", job.seconds)
        if job.memory is not None:
            integer(job.memory, "job: memory", 1)
        return job


@dataclass(frozen=True)
class Version:
    """An accepted card: the n-th of its name, counted from 1.

    Args:
        digest: Of the card.
        job: The id of the job that made it.
        accepted: Seconds since 1970.
        live: Whether it is the version to be served.
        refused: Why the engine refused it; None if it did not.
    """

    name: str
    version: int
    digest: str
    job: str
    accepted: float
    live: bool
    refused: str | None


class JobQueue:
    """A queue in a file, for any number of threads and processes; one coordinator at a time claims.

    Every method that changes something is one transaction: a process that is killed anywhere leaves
    the whole change or nothing of it.

    Args:
        path: Of the file; it is made if it does not exist, in a folder that does.

    Raises:
        StoreError: The file cannot be read or written, or is no queue.
        StateError: The file has another version of the layout.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, JobQueue(f"{folder}/queue.sqlite") as queue:
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
        with self._sql_errors():
            self._db = sqlite3.connect(
                self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

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
        return next(iter(self._jobs("id = ?", job_id)), None)

    def jobs(self, state: str | None = None) -> list[Job]:
        """List jobs in the order in which they run or ran: by priority, then by age."""
        return self._jobs("?1 IS NULL OR state = ?1", state)

    def versions(self, name: str | None = None) -> list[Version]:
        """List the versions that are kept, by name and number."""
        rows = self._rows("SELECT data FROM versions ORDER BY name, version")
        return [Version(**row) for row in rows if name in (None, row["name"])]

    def status(self) -> pa.Table:
        """Return every job, in the order of `jobs`."""
        return _table([vars(job) for job in self.jobs()], _JOBS)

    def history(self) -> pa.Table:
        """Return every event, the oldest first."""
        return _table(self._rows("SELECT data, event FROM events ORDER BY event"), _EVENTS)

    def skills(self) -> pa.Table:
        """Return every version that is kept."""
        return _table([vars(version) for version in self.versions()], _VERSIONS)

    def add(self, job: Job, now: float) -> Job:
        """Put a job at the end of the queue; a job that is known already stays as it is."""
        with self._transaction():
            known = self.job(job.id)
            if known is None:
                self._store(replace(job, created=now))
                self._log("add", job, now)
            return known or self._jobs("id = ?", job.id)[0]

    def claim(self, now: float) -> Job | None:
        """Take the oldest job of the highest priority, unless a job of another base model runs.

        A job that waits for its base model holds back the others, so that no job waits for ever.
        """
        with self._transaction():
            job = next(iter(self.jobs("queued")), None)
            bases = {other.base for other in self.jobs("running")} - {""}
            if job is None or (job.base and bases - {job.base}):
                return None
            changes: dict[str, Any] = {"attempts": job.attempts + 1, "started": now}
            return self._move("claim", job, now, ended=None, error=None, **changes)

    def accept(
        self, job: Job, digest: str, now: float, keep: int = 3, note: str | None = None
    ) -> Job | None:
        """End a job with its card, which becomes the live version of its name.

        Args:
            job: As it was claimed.
            digest: Of the card, which must be on disk already.
            now: The time.
            keep: How many versions of the name to keep: the last that were not refused. The version
                that was live is kept as well, in case the engine refuses this one.
            note: What the command printed.

        Returns:
            None if this attempt no longer holds the job; then nothing is changed.
        """
        with self._transaction():
            ended = self._move("accept", job, now, note, ended=now, digest=digest)
            if ended is not None:
                known = self.versions(job.name)
                number = 1 + max((version.version for version in known), default=0)
                good = [version.version for version in known if version.refused is None]
                kept = {*[*good, number][-keep:], *(v.version for v in known if v.live)}
                new = Version(job.name, number, digest, job.id, now, live=True, refused=None)
                kept_versions = [version for version in known if version.version in kept]
                self._put_live([*kept_versions, new], number)
            return ended

    def reject(
        self, job: Job, now: float, reason: str | None = None, note: str | None = None
    ) -> Job | None:
        """End a job that made nothing worth serving; returns None as `accept`."""
        with self._transaction():
            return self._move("reject", job, now, note or reason, ended=now, error=reason)

    def fail(self, job: Job, error: str, now: float, *, final: bool = False) -> Job | None:
        """Queue a failed job again, or bury it after its last attempt; returns None as `accept`.

        Args:
            final: Another attempt would fail alike: bury the job now.
        """
        failures = job.failures + 1
        what = "bury" if final or failures >= job.max_failures else "fail"
        with self._transaction():
            return self._move(what, job, now, error, ended=now, error=error, failures=failures)

    def release(self, job: Job, now: float) -> Job | None:
        """Queue a job again that was stopped, not failed; returns None as `accept`."""
        with self._transaction():
            return self._move("release", job, now)

    def recover(self, now: float) -> list[Job]:
        """Fail the jobs that a dead coordinator left running; only the one coordinator may call it."""
        with self._transaction():
            left = [self.fail(job, "the coordinator died", now) for job in self.jobs("running")]
            return [job for job in left if job is not None]

    def retry(self, job_id: str, now: float) -> Job:
        """Queue a dead job again, in its old place, with no failures counted.

        Raises:
            StateError: The job is not dead.
        """
        with self._transaction():
            job = self.job(job_id)
            again = None if job is None else self._move("retry", job, now, failures=0)
            if again is None:
                state = "none" if job is None else f"one {job.state}"
                raise StateError(f"retry {shown(job_id)}", "a dead job", state)
            return again

    def roll_back(self, name: str, version: int | None, now: float) -> Version:
        """Make an earlier version live; by default the one before the live one.

        Raises:
            UnknownCardError: No such name or version is kept.
            StateError: There is no earlier version.
        """
        where = f"roll back {shown(name)}"
        with self._transaction():
            known = {kept.version: kept for kept in self.versions(name)}
            if not known:
                raise UnknownCardError(where, "a skill that was accepted", "none of that name")
            if version is None:
                version = _previous([*known.values()])
                if version is None:
                    raise StateError(where, "a version before the live one", "none that is kept")
            if version not in known:
                expected = f"one of {list(known)}"
                raise UnknownCardError(f"{where}: version", expected, shown(version))
            known[version] = replace(known[version], refused=None)
            self._put_live([*known.values()], version)
            self._log("roll back", known[version], now, f"version {version}")
            return replace(known[version], live=True)

    def refuse(self, version: Version, reason: str, now: float) -> None:
        """Note that the engine refused a version; if it was live, the one before it becomes live."""
        number = version.version
        with self._transaction():
            known = self.versions(version.name)
            live = next((kept.version for kept in known if kept.live), None)
            known = [replace(v, refused=reason) if v.version == number else v for v in known]
            self._put_live(known, _previous(known) if live == number else live)
            self._log("refuse", version, now, f"version {number}: {reason}")

    def night(self) -> date | None:
        """Return the last night that was run, or when nights began."""
        with self._transaction() as db:
            row = db.execute("SELECT night FROM nights").fetchone()
            return None if row is None else date.fromisoformat(row[0])

    def set_night(self, night: date) -> None:
        """Note the last night that was run."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO nights VALUES (1, ?)", (night.isoformat(),))

    def _prepare(self) -> None:
        """Make the tables of a new file; refuse a file of another version."""
        with self._sql_errors():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        with self._transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            for statement in _TABLES if version == 0 else ():
                db.execute(statement)
            if version not in (0, VERSION):
                expected = f"a queue of version {VERSION}"
                raise StateError(str(self.path), expected, f"version {version}")

    @contextmanager
    def _sql_errors(self) -> Iterator[None]:
        """Re-raise SQLite's errors as a `StoreError`."""
        try:
            yield
        except sqlite3.Error as error:
            expected = "a job queue that can be read and written"
            raise StoreError(str(self.path), expected, error) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction; a block inside another is part of it."""
        with self._write, self._sql_errors():
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

    def _rows(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """Select `data` and at most one column more; returns the data with that column."""
        with self._write, self._sql_errors():
            cursor = self._db.execute(statement, values)
            names = [column[0] for column in cursor.description]
            return [
                json.loads(row[0]) | dict(zip(names[1:], row[1:], strict=True)) for row in cursor
            ]

    def _jobs(self, where: str, *values: Any) -> list[Job]:
        rows = self._rows(f"SELECT data, age FROM jobs WHERE {where} ORDER BY age", *values)  # noqa: S608 - own text
        jobs = [Job(**{**row, "arguments": tuple(row["arguments"])}) for row in rows]
        return sorted(jobs, key=lambda job: -job.priority)

    def _store(self, job: Job) -> None:
        data = {key: value for key, value in vars(job).items() if key != "age"}
        self._db.execute(
            "INSERT INTO jobs (id, state, data) VALUES (?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET state = excluded.state, data = excluded.data",
            (job.id, job.state, json.dumps(data)),
        )

    def _move(
        self, what: str, job: Job, now: float, note: str | None = None, **changes: Any
    ) -> Job | None:
        """Move a job that this attempt holds."""
        known = self.job(job.id)
        if known is None or (known.state, known.attempts) != (MOVES[what][0], job.attempts):
            return None
        moved = replace(known, state=MOVES[what][1], **changes)
        self._store(moved)
        self._log(what, moved, now, note)
        return moved

    def _put_live(self, versions: Sequence[Version], live: int | None) -> None:
        """Replace the versions of a name, of which one is live."""
        self._db.execute("DELETE FROM versions WHERE name = ?", (versions[0].name,))
        for version in versions:
            data = json.dumps(vars(version) | {"live": version.version == live})
            row = (version.name, version.version, data)
            self._db.execute("INSERT INTO versions VALUES (?, ?, ?)", row)

    def _log(self, what: str, about: Job | Version, now: float, note: str | None = None) -> None:
        """Add an event about a job or a version."""
        event = {"at": now, "what": what, "name": about.name, "note": note}
        if isinstance(about, Job):
            event |= {"job": about.id, "kind": about.kind, "state": about.state}
            event["attempt"] = about.attempts
        else:
            event["job"] = about.job
        self._db.execute("INSERT INTO events (data) VALUES (?)", (json.dumps(event),))


def _previous(versions: Sequence[Version]) -> int | None:
    """Find the newest version before the live one that no engine refused."""
    live = next((version.version for version in versions if version.live), 0)
    good = (version.version for version in versions if version.refused is None)
    return max((number for number in good if number < live), default=None)


def _table(rows: Sequence[Mapping[str, Any]], columns: str) -> pa.Table:
    """Make a table of rows whose times are seconds."""
    arrays = {}
    for column in columns.split():
        name, _, kind = column.partition(":")
        cells = [row.get(name) for row in rows]
        if kind == "time":
            cells = [None if cell is None else round(cell * 1e6) for cell in cells]
        arrays[name] = pa.array(cells, _TYPES.get(kind, pa.string()))
    return pa.table(arrays)
