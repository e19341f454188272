"""The factory's memory: a SQLite file in which every change is one transaction, and the moves a job
may make are a table.

A job is known by the hash of what goes into it, so that what is asked for twice is done once. It
runs at least once and takes effect once: what it made is entered in the transaction that ends it,
and only by the attempt that holds it. Nothing here reads a clock: `now` is passed in, seconds since
1970, and is only ever shown. A job's age is its place in the queue.

Requirements: R19.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import date
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import pyarrow as pa

from lora.checks import finite, integer
from lora.errors import ArgumentError, StateError, StoreError, UnknownCardError, shown
from lora.store import PathLike, as_path

VERSION = 1
"""Of the queue file's layout."""

PATIENCE = 30.0
"""Seconds to wait for another process's transaction."""

NIGHT = 8 * 3600.0
"""Seconds that a job may take, if nothing else is said: there is always a limit."""


class Move(NamedTuple):
    """The state that a job must be in, and the one it is in afterwards."""

    before: str
    after: str


MOVES: Mapping[str, Move] = MappingProxyType(
    {
        "claim": Move("queued", "running"),
        "accept": Move("running", "done"),
        "reject": Move("running", "rejected"),
        "fail": Move("running", "queued"),
        "bury": Move("running", "dead"),
        "release": Move("running", "queued"),
        "retry": Move("dead", "queued"),
    }
)
"""Everything that can happen to a job, by name.

``accept``: it made a card. ``reject``: it made none that is worth serving. ``fail``: it will be tried again. ``bury``: it
will not, and is on the dead-letter list. ``release``: it was stopped through no fault of its own. ``retry``: it was asked
for again.
"""

STATES = tuple(dict.fromkeys(state for move in MOVES.values() for state in move))
"""Every state; ``done``, ``rejected`` and ``dead`` are ends."""

_TABLES = (
    """CREATE TABLE jobs (
        age INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
        parameters TEXT NOT NULL, inputs TEXT NOT NULL, base TEXT NOT NULL, priority INTEGER NOT NULL,
        max_failures INTEGER NOT NULL, seconds REAL NOT NULL, memory INTEGER, state TEXT NOT NULL,
        attempts INTEGER NOT NULL, failures INTEGER NOT NULL,
        created REAL NOT NULL, started REAL, ended REAL, digest TEXT, error TEXT)""",
    "CREATE INDEX jobs_order ON jobs (state, priority DESC, age)",
    """CREATE TABLE events (
        event INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, what TEXT NOT NULL, name TEXT NOT NULL,
        job TEXT, kind TEXT, attempt INTEGER, state TEXT, note TEXT)""",
    """CREATE TABLE versions (
        name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, job TEXT NOT NULL, accepted REAL NOT NULL,
        live INTEGER NOT NULL, refused TEXT, PRIMARY KEY (name, version))""",
    "CREATE TABLE nights (only INTEGER PRIMARY KEY CHECK (only = 1), night TEXT NOT NULL)",
    f"PRAGMA user_version = {VERSION}",
)

_TIME = pa.timestamp("us", tz="UTC")
_JOBS = pa.schema(
    {
        "id": pa.string(),
        "kind": pa.string(),
        "name": pa.string(),
        "base": pa.string(),
        "priority": pa.int64(),
    }
    | {
        "state": pa.string(),
        "attempts": pa.int64(),
        "failures": pa.int64(),
        "max_failures": pa.int64(),
    }
    | {
        "created": _TIME,
        "started": _TIME,
        "ended": _TIME,
        "digest": pa.string(),
        "error": pa.string(),
    }
)
_EVENTS = pa.schema(
    {"event": pa.int64(), "at": _TIME, "what": pa.string(), "name": pa.string(), "job": pa.string()}
    | {"kind": pa.string(), "attempt": pa.int64(), "state": pa.string(), "note": pa.string()}
)
_VERSIONS = pa.schema(
    {"name": pa.string(), "version": pa.int64(), "digest": pa.string(), "job": pa.string()}
    | {"accepted": _TIME, "live": pa.bool_(), "refused": pa.string()}
)


@dataclass(frozen=True)
class Job:
    """A job and how far it has come; make one with `Job.of`.

    Args:
        id: SHA-256 of kind, parameters and inputs.
        kind, name: What it does, and the skill that it makes.
        parameters: JSON.
        inputs: Path -> fingerprint of what it reads.
        base: The base model that it loads; empty if it needs none.
        priority: Higher comes first.
        max_failures: After so many failed attempts it is dead.
        seconds, memory: Limits of one attempt; memory in bytes, or None.
        state: One of `STATES`.
        attempts: Begun so far. The number of the one that runs is what a result must name to be
            taken.
        failures: Attempts that failed, since it was last asked for.
        created, started, ended: Seconds since 1970.
        digest: Of the card that it made.
        error: Why its last attempt failed.
    """

    id: str
    kind: str
    name: str
    parameters: Mapping[str, Any]
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
        kind: str,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, str] = MappingProxyType({}),
        *,
        base: str = "",
        priority: int = 0,
        max_failures: int = 3,
        seconds: float = NIGHT,
        memory: int | None = None,
    ) -> Self:
        """A new job.

        Args:
            kind, parameters, inputs, base, priority, max_failures, seconds, memory: As the class's;
                ``parameters["name"]`` is the skill's name.

        Raises:
            ArgumentError: If the parameters are not JSON, have no name, or a limit is out of range.

        Examples:
            >>> one = Job.of("merge", {"name": "both", "cards": ["a", "b"]})
            >>> one.id == Job.of("merge", {"cards": ["a", "b"], "name": "both"}, priority=7).id, one.name
            (True, 'both')
        """
        try:
            text = json.dumps(
                [kind, dict(parameters), dict(inputs), base], sort_keys=True, allow_nan=False
            )
            _, known, read, _ = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ArgumentError(f"job: {shown(kind)}: parameters", "JSON", error) from error
        name = known.get("name")
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ArgumentError(
                f"job: {shown(kind)}: name", "the name of the skill to make", shown(name)
            )
        if not -(2**31) <= integer(priority, "job: priority") < 2**31:
            raise ArgumentError("job: priority", "an integer of 32 bits", priority)
        integer(max_failures, "job: max_failures", 1)
        if finite(seconds, "job: seconds", ArgumentError) <= 0:
            raise ArgumentError("job: seconds", "a number > 0", seconds)
        if memory is not None:
            integer(memory, "job: memory", 1)
        sha = hashlib.sha256(text.encode()).hexdigest()
        return cls(
            sha, kind, name, known, read, base, priority, max_failures, float(seconds), memory
        )


@dataclass(frozen=True)
class Version:
    """A card that was accepted: the n-th of its name.

    Args:
        name, version: Counted from 1, for each name.
        digest: Of the card.
        job: The job that made it.
        accepted: Seconds since 1970.
        live: Whether it is the one to be served.
        refused: Why the engine would not have it; None if it did not say so.
    """

    name: str
    version: int
    digest: str
    job: str
    accepted: float
    live: bool
    refused: str | None


class JobQueue:
    """A queue in a file, for any number of threads and processes; `claim` is for one coordinator at
    a time.

    Every method that changes something is one transaction: killed anywhere, it happened or it did
    not.

    Args:
        path: Of the file; it is made if it is not there, in a folder that is.

    Raises:
        StoreError: If the file can't be read or written, or is something else.
        StateError: If it is of another version.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, JobQueue(f"{folder}/queue.sqlite") as queue:
        ...     _ = queue.add(Job.of("merge", {"name": "both"}), now=0.0)
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
            self._db.row_factory = sqlite3.Row
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        with self._write:
            self._db.close()

    # What is there

    def job(self, job_id: str) -> Job | None:
        """The job of an id."""
        return next(iter(self._select(Job, "SELECT * FROM jobs WHERE id = ?", job_id)), None)

    def jobs(self, state: str | None = None) -> list[Job]:
        """Jobs in the order in which they run or ran: by priority, then by age."""
        return self._select(
            Job,
            "SELECT * FROM jobs WHERE ?1 IS NULL OR state = ?1 ORDER BY priority DESC, age",
            state,
        )

    def versions(self, name: str | None = None) -> list[Version]:
        """The versions that are kept, by name and number."""
        return self._select(
            Version,
            "SELECT * FROM versions WHERE ?1 IS NULL OR name = ?1 ORDER BY name, version",
            name,
        )

    def status(self) -> pa.Table:
        """Every job, in the order of `jobs`."""
        return _table([vars(job) for job in self.jobs()], _JOBS)

    def history(self) -> pa.Table:
        """Everything that ever happened, the oldest first."""
        with self._reading() as db:
            return _table(
                [dict(row) for row in db.execute("SELECT * FROM events ORDER BY event")], _EVENTS
            )

    def skills(self) -> pa.Table:
        """Every version that is kept."""
        return _table([vars(version) for version in self.versions()], _VERSIONS)

    # A job's life

    def add(self, job: Job, now: float) -> Job:
        """Put a job at the end of the queue; one that is there already, in whatever state, stays as
        it is.
        """
        row = {one.name: getattr(job, one.name) for one in fields(Job) if one.name != "age"}
        row |= {key: json.dumps(row[key], sort_keys=True) for key in ("parameters", "inputs")}
        row |= {"state": "queued", "attempts": 0, "failures": 0, "created": now}
        names, places = ", ".join(row), ", ".join(f":{name}" for name in row)
        with self._transaction() as db:
            added = db.execute(
                f"INSERT INTO jobs ({names}) VALUES ({places}) ON CONFLICT DO NOTHING",  # noqa: S608
                row,
            )
            if added.rowcount:
                self._tell(
                    "add", job.name, now, job=job.id, kind=job.kind, attempt=0, state="queued"
                )
            known: Job = _read(
                Job, db.execute("SELECT * FROM jobs WHERE id = ?", (job.id,)).fetchone()
            )
            return known

    def claim(self, now: float) -> Job | None:
        """Take the next job: the oldest of the highest priority, unless one of another base model
        runs.

        A job that has to wait for its base model holds the others back, so that none waits for
        ever.
        """
        with self._transaction() as db:
            row = db.execute(
                """UPDATE jobs SET state = 'running', attempts = attempts + 1, started = ?, ended = NULL, error = NULL
                WHERE id = (SELECT id FROM jobs WHERE state = 'queued' ORDER BY priority DESC, age LIMIT 1)
                AND (base = '' OR NOT EXISTS (
                    SELECT 1 FROM jobs AS other WHERE other.state = 'running' AND other.base NOT IN ('', jobs.base)))
                RETURNING *""",
                (now,),
            ).fetchone()
            return None if row is None else self._moved("claim", row, now)

    def accept(self, job: Job, digest: str, now: float, keep: int = 3) -> Job | None:
        """End a job with the card it made, which becomes the live version of its name.

        Args:
            job: As it was claimed.
            digest: Of the card, which must be on disk by now.
            now: The time.
            keep: Versions of the name to keep: the last that were not refused, and the one that was
                live, which is still the good one if the engine refuses this.

        Returns:
            None if this attempt no longer holds the job: then nothing is changed.
        """
        with self._transaction() as db:
            ended = self._move("accept", job, now, ended=now, digest=digest)
            if ended is not None:
                name, known = job.name, self.versions(job.name)
                was = next((version.version for version in known if version.live), None)
                row = (
                    name,
                    max((version.version for version in known), default=0) + 1,
                    digest,
                    job.id,
                    now,
                )
                db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, 0, NULL)", row)
                self._put_live(name, row[1])
                db.execute(
                    """DELETE FROM versions WHERE name = ?1 AND version IS NOT ?2 AND version NOT IN (
                    SELECT version FROM versions WHERE name = ?1 AND refused IS NULL ORDER BY version DESC LIMIT ?3)""",
                    (name, was, keep),
                )
            return ended

    def reject(self, job: Job, now: float) -> Job | None:
        """End a job that made nothing worth serving; None as `accept`."""
        with self._transaction():
            return self._move("reject", job, now, ended=now)

    def fail(self, job: Job, error: str, now: float, *, final: bool = False) -> Job | None:
        """Note that an attempt failed: the job is queued again, or dead if that was the last or is
        `final`; as `accept`.
        """
        failures = job.failures + 1
        what = "bury" if final or failures >= job.max_failures else "fail"
        with self._transaction():
            return self._move(what, job, now, note=error, ended=now, error=error, failures=failures)

    def release(self, job: Job, now: float) -> Job | None:
        """Give a job back that was stopped through no fault of its own; None as `accept`."""
        with self._transaction():
            return self._move("release", job, now)

    def recover(self, now: float) -> list[Job]:
        """What a coordinator that is no more left running is queued again, or dead if that was its
        last attempt.

        Call it only as the one coordinator.
        """
        with self._transaction():
            left = (self.fail(job, "the coordinator died", now) for job in self.jobs("running"))
            return [job for job in left if job is not None]

    def retry(self, job_id: str, now: float) -> Job:
        """Queue a dead job again, in its old place, with no failures held against it.

        Raises:
            StateError: If it is not dead.
        """
        with self._transaction():
            job = self.job(job_id)
            if job is None or job.state != "dead":
                raise StateError(
                    f"retry {shown(job_id)}",
                    "a dead job",
                    "none" if job is None else f"one {job.state}",
                )
            again = self._move("retry", job, now, failures=0)
            assert again is not None  # noqa: S101 - the transaction holds the file
            return again

    # What is served

    def roll_back(
        self, name: str, version: int | None, now: float, *, dry_run: bool = False
    ) -> Version:
        """Make an earlier version live; by default the one before the live one.

        Raises:
            UnknownCardError: If no such name or version is kept.
            StateError: If there is no earlier one.
        """
        with self._transaction() as db:
            known = self.versions(name)
            where = f"roll back {shown(name)}"
            if not known:
                raise UnknownCardError(where, "a skill that was accepted", "none of that name")
            chosen = (
                _previous(known)
                if version is None
                else next((v for v in known if v.version == version), None)
            )
            if chosen is None and version is None:
                raise StateError(where, "a version before the live one", "none that is kept")
            if chosen is None:
                raise UnknownCardError(
                    f"{where}: version", f"one of {[v.version for v in known]}", shown(version)
                )
            if not dry_run:
                self._put_live(name, chosen.version)
                db.execute("UPDATE versions SET refused = NULL WHERE name = ? AND live", (name,))
                self._tell("roll back", name, now, job=chosen.job, note=f"version {chosen.version}")
            return chosen

    def refuse(self, version: Version, reason: str, now: float) -> None:
        """Note that the engine would not have a version; if it was live, the one before it is."""
        with self._transaction() as db:
            known = self.versions(version.name)
            key = (version.name, version.version)
            if version.live and any((v.name, v.version) == key and v.live for v in known):
                earlier = _previous(known)
                self._put_live(version.name, None if earlier is None else earlier.version)
            db.execute(
                "UPDATE versions SET refused = ? WHERE name = ? AND version = ?", (reason, *key)
            )
            self._tell(
                "refuse",
                version.name,
                now,
                job=version.job,
                note=f"version {version.version}: {reason}",
            )

    # Nights

    def night(self) -> date | None:
        """The last night that was run, or when nights began."""
        with self._reading() as db:
            row = db.execute("SELECT night FROM nights").fetchone()
            return None if row is None else date.fromisoformat(row["night"])

    def set_night(self, night: date) -> None:
        """Note the last night that was run."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO nights VALUES (1, ?)", (night.isoformat(),))

    def _prepare(self) -> None:
        with self._sql_errors():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        with self._transaction() as db:
            (found,) = db.execute("PRAGMA user_version").fetchone()
            if found == 0:
                for statement in _TABLES:
                    db.execute(statement)
            elif found != VERSION:
                raise StateError(
                    str(self.path), f"a queue of version {VERSION}", f"version {found}"
                )

    @contextmanager
    def _sql_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(
                str(self.path), "a job queue that can be read and written", error
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._write, self._sql_errors():
            yield self._db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction; a block within another is part of it."""
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

    def _select(self, kind: type[Any], statement: str, *values: Any) -> list[Any]:
        with self._reading() as db:
            return [_read(kind, row) for row in db.execute(statement, values)]

    def _move(
        self, what: str, job: Job, now: float, note: str | None = None, **changes: Any
    ) -> Job | None:
        """Move a job that this attempt holds."""
        changes["state"] = MOVES[what].after
        assigned = ", ".join(f"{name} = :{name}" for name in changes)
        statement = f"UPDATE jobs SET {assigned} WHERE id = :id AND state = :before AND attempts = :attempts RETURNING *"  # noqa: S608 - own names
        held = {"id": job.id, "before": MOVES[what].before, "attempts": job.attempts}
        row = self._db.execute(statement, {**changes, **held}).fetchone()
        return None if row is None else self._moved(what, row, now, note)

    def _moved(self, what: str, row: sqlite3.Row, now: float, note: str | None = None) -> Job:
        job: Job = _read(Job, row)
        held = {"job": job.id, "kind": job.kind, "attempt": job.attempts, "state": job.state}
        self._tell(what, job.name, now, note=note, **held)
        return job

    def _put_live(self, name: str, version: int | None) -> None:
        self._db.execute(
            "UPDATE versions SET live = (version IS ?) WHERE name = ?", (version, name)
        )

    def _tell(self, what: str, name: str, now: float, **more: Any) -> None:
        row = {"at": now, "what": what, "name": name, **more}
        names, places = ", ".join(row), ", ".join(f":{name}" for name in row)
        self._db.execute(f"INSERT INTO events ({names}) VALUES ({places})", row)  # noqa: S608 - own names


def _previous(versions: list[Version]) -> Version | None:
    """The newest version before the live one that no engine refused."""
    live = next((v.version for v in versions if v.live), 0)
    return max(
        (v for v in versions if v.version < live and v.refused is None),
        key=lambda v: v.version,
        default=None,
    )


def _read(kind: type[Any], row: sqlite3.Row) -> Any:
    values = dict(row)
    if kind is Version:
        return Version(**{**values, "live": bool(values["live"])})
    return Job(**{**values, **{key: json.loads(values[key]) for key in ("parameters", "inputs")}})


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = []
    for one in schema:
        cells = [row[one.name] for row in rows]
        if one.type == _TIME:
            cells = [None if cell is None else round(cell * 1e6) for cell in cells]
        columns.append(pa.array(cells, one.type))
    return pa.Table.from_arrays(columns, schema=schema)
