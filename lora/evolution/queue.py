"""The skill factory's jobs, versions and history: a SQLite file in which a change is a transaction.

A job runs at least once and takes effect once: its card is entered in the transaction that ends it.
No clock is read here: `now` is passed in, as seconds since 1970.

Requirements: R19.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import date
from types import MappingProxyType
from typing import Any, Self

import pyarrow as pa

from lora.checks import finite, integer, version_order
from lora.errors import ArgumentError, StateError, UnknownCardError, shown
from lora.evolution.database import transaction
from lora.federation.manifest import check_name
from lora.files import PathLike, as_path

VERSION = 3
"""Version of the file's layout."""

LONGEST = 1e6
"""Seconds that an attempt may take at most; SQLite's waits have 32 bits of milliseconds."""

MAX_NAME_BYTES = 200
"""Bytes of a skill's name, which is a file's name, too."""

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

`done`, `rejected` and `dead` are ends.
"""

_TABLES = (
    """CREATE TABLE jobs (
        age INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, state TEXT NOT NULL,
        data TEXT NOT NULL)""",
    "CREATE INDEX jobs_state ON jobs (state)",
    "CREATE TABLE events (event INTEGER PRIMARY KEY AUTOINCREMENT, data TEXT NOT NULL)",
    "CREATE TABLE nights (only INTEGER PRIMARY KEY CHECK (only = 1), data TEXT NOT NULL)",
    f"PRAGMA user_version = {VERSION}",
)
"""The tables; `data` is a `Job`, an event or a date as JSON."""

_TYPES = {"count": pa.int64(), "flag": pa.bool_(), "time": pa.timestamp("us", tz="UTC")}
_JOBS = (
    "id kind name base priority:count state attempts:count failures:count max_failures:count "
    "created:time started:time ended:time digest version live:flag error"
)
_EVENTS = "event:count at:time what name job kind attempt:count state note"
_VERSIONS = "name version digest id kind ended:time live:flag"
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
        digest: Of the card that it made.
        version: Of that card, while it is kept.
        live: Whether that card is the one that is served.
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
    version: str | None = None
    live: bool = False
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
        check_skill_name(name)
        if not -(2**31) <= integer(job.priority, "job: priority") < 2**31:
            raise ArgumentError("job: priority", "an integer of 32 bits", job.priority)
        integer(job.max_failures, "job: max_failures", 1)
        if not 0 < finite(job.seconds, "job: seconds", ArgumentError) <= LONGEST:
            raise ArgumentError("job: seconds", f"a number > 0 and <= {LONGEST:g}", job.seconds)
        if job.memory is not None:
            integer(job.memory, "job: memory", 1)
        return job


class JobQueue:
    """A queue in a file, for any number of threads and processes; one coordinator at a time claims.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     queue = JobQueue(f"{folder}/q.sqlite")
        ...     _ = queue.add(Job.of(["merge"], "both"), now=0.0)
        ...     job = queue.claim(now=1.0)
        ...     ended = queue.accept(job, "0" * 64, "0.1.0", now=2.0)
        ...     again = queue.accept(job, "1" * 64, "0.2.0", now=3.0)
        >>> ended.state, again
        ('done', None)
    """

    def __init__(self, path: PathLike) -> None:
        self.path = as_path(path)
        with self.transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            for statement in _TABLES if version == 0 else ():
                db.execute(statement)
        if version not in (0, VERSION):
            expected, present = f"a queue of version {VERSION}", f"version {version}"
            raise StateError(str(self.path), expected, present, "begin in another folder")

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """Open the file for one change, which nobody else's can come between."""
        return transaction(self.path, "a job queue that can be read and written")

    def job(self, job_id: str) -> Job | None:
        """Return the job of an id."""
        with self.transaction() as db:
            return _job(db, job_id)

    def jobs(self, state: str | None = None) -> list[Job]:
        """List jobs in the order in which they run or ran: by priority, then by age."""
        with self.transaction() as db:
            return _jobs(db, state)

    def versions(self, name: str | None = None) -> list[Job]:
        """List the jobs whose cards are kept, by name and version."""
        with self.transaction() as db:
            return versions(db, name)

    def status(self) -> pa.Table:
        """Return every job, in the order of `jobs`."""
        return _table(map(vars, self.jobs()), _JOBS)

    def history(self) -> pa.Table:
        """Return every event, the oldest first."""
        with self.transaction() as db:
            rows = enumerate(_rows(db, "events ORDER BY event"), 1)
            return _table([{"event": number, **row} for number, row in rows], _EVENTS)

    def skills(self) -> pa.Table:
        """Return every version that is kept."""
        return _table(map(vars, self.versions()), _VERSIONS)

    def add(self, job: Job, now: float) -> Job:
        """Put a job at the end of the queue; a job that is there already stays as it is."""
        with self.transaction() as db:
            return _job(db, job.id) or _store(db, "add", replace(job, created=now), now)

    def claim(self, now: float) -> Job | None:
        """Take the oldest job of the highest priority, unless a job of another base model runs.

        A job that waits for its base model holds back the others.
        """
        with self.transaction() as db:
            job = next(iter(_jobs(db, "queued")), None)
            bases = {other.base for other in _jobs(db, "running")}
            if job is None or bases - {job.base}:
                return None
            started = replace(job, attempts=job.attempts + 1, started=now, ended=None, error=None)
            return _store(db, "claim", replace(started, state="running"), now)

    def accept(
        self,
        job: Job,
        digest: str,
        version: str,
        now: float,
        *,
        keep: int = 3,
        note: str | None = None,
    ) -> Job | None:
        """End a job with its card, which becomes the live version of its name.

        Keeps the last `keep` versions and the one that was live. Returns None if this attempt no
        longer holds the job.
        """
        with self.transaction() as db:
            changes = {"ended": now, "digest": digest, "version": version, "live": True}
            ended = _move(db, "accept", job, now, note, **changes)
            if ended is not None:
                earlier = [each for each in versions(db, job.name) if each.id != job.id]
                kept = earlier[max(0, len(earlier) + 1 - keep) :]
                for each in earlier:
                    is_kept = each.live or each in kept
                    number = each.version if is_kept else None
                    _write(db, replace(each, live=False, version=number))
            return ended

    def reject(
        self, job: Job, now: float, reason: str | None = None, note: str | None = None
    ) -> Job | None:
        """End a job that made nothing worth serving; returns None as `accept`."""
        return self._moved("reject", job, now, note, ended=now, error=reason)

    def fail(self, job: Job, error: str, now: float, *, final: bool = False) -> Job | None:
        """Queue a failed job again, or bury it after its last or a `final` failure; as `accept`."""
        with self.transaction() as db:
            return _fail(db, job, error, now, final=final)

    def release(self, job: Job, now: float) -> Job | None:
        """Queue a job again that was stopped, not failed; returns None as `accept`."""
        return self._moved("release", job, now)

    def recover(self, now: float) -> list[Job]:
        """Fail the jobs that a dead coordinator left running; only the coordinator calls it."""
        with self.transaction() as db:
            left = [_fail(db, job, "the coordinator died", now) for job in _jobs(db, "running")]
            return [job for job in left if job is not None]

    def retry(self, job_id: str, now: float, **limits: Any) -> Job:
        """Queue a dead job again, in its old place, with no failures counted."""
        with self.transaction() as db:
            job = _job(db, job_id)
            again = job and _move(db, "retry", job, now, failures=0, **limits)
            if again is None:
                state = f"one {job.state}" if job else "none"
                raise StateError(f"retry {shown(job_id)}", "a dead job", state)
            return again

    def earlier(self, name: str, version: str | None = None) -> Job:
        """Return what made a version that is kept; by default the one before the live one."""
        where, kept = f"roll back {shown(name)}", self.versions(name)
        if not kept:
            raise UnknownCardError(where, "a skill that was accepted", "none of that name")
        if version is None:
            live = next(place for place, each in enumerate(kept) if each.live)
            if not live:
                raise StateError(where, "a version before the live one", "none that is kept")
            return kept[live - 1]
        for each in kept:
            if each.version == version:
                return each
        expected = f"one of {[each.version for each in kept]}"
        raise UnknownCardError(f"{where}: version", expected, shown(version))

    def put_live(self, job: Job, now: float) -> Job:
        """Make the card that a job made, and that is kept, the live one of its name."""
        with self.transaction() as db:
            kept = versions(db, job.name)
            if job.id not in [each.id for each in kept]:
                where = f"roll back {shown(job.name)}"
                raise StateError(where, f"version {job.version}", "one that is no longer kept")
            for each in kept:
                _write(db, replace(each, live=each.id == job.id))
            _log(db, "roll back", job, now, f"version {job.version}")
            return replace(job, live=True)

    def night(self) -> date | None:
        """Return the last night that was run, or when nights began."""
        with self.transaction() as db:
            return next((date.fromisoformat(night) for night in _rows(db, "nights")), None)

    def set_night(self, night: date) -> None:
        """Note the last night that was run."""
        with self.transaction() as db:
            row = (json.dumps(night.isoformat()),)
            db.execute("INSERT OR REPLACE INTO nights VALUES (1, ?)", row)

    def _moved(self, *move: Any, **changes: Any) -> Job | None:
        with self.transaction() as db:
            return _move(db, *move, **changes)


def check_skill_name(name: str) -> None:
    """Refuse a name that is no name of a card, or too long for a file."""
    check_name(name)
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ArgumentError("skill name", f"at most {MAX_NAME_BYTES} bytes", shown(name))


def versions(db: sqlite3.Connection, name: str | None = None) -> list[Job]:
    """List the jobs whose cards are kept, by name and version."""
    kept = [job for job in _jobs(db, "done") if job.version and name in (None, job.name)]
    return sorted(kept, key=lambda job: (job.name, version_order(job.version or "")))


def _rows(db: sqlite3.Connection, where: str, *values: Any) -> list[Any]:
    rows = db.execute(f"SELECT data FROM {where}", values)  # noqa: S608 - own text
    return [json.loads(data) for (data,) in rows]


def _job(db: sqlite3.Connection, job_id: str) -> Job | None:
    return next(map(_read, _rows(db, "jobs WHERE id = ?", job_id)), None)


def _jobs(db: sqlite3.Connection, state: str | None) -> list[Job]:
    rows = _rows(db, "jobs WHERE ?1 IS NULL OR state = ?1 ORDER BY age", state)
    return sorted(map(_read, rows), key=lambda job: -job.priority)


def _read(row: dict[str, Any]) -> Job:
    return Job(**{**row, "arguments": tuple(row["arguments"])})


def _fail(
    db: sqlite3.Connection, job: Job, error: str, now: float, *, final: bool = False
) -> Job | None:
    failures = job.failures + 1
    what = "bury" if final or failures >= job.max_failures else "fail"
    return _move(db, what, job, now, error, ended=now, error=error, failures=failures)


def _move(
    db: sqlite3.Connection, what: str, job: Job, now: float, note: str | None = None, **changes: Any
) -> Job | None:
    before, after = MOVES[what]
    stored = _job(db, job.id)
    if stored is None or (stored.state, stored.attempts) != (before, job.attempts):
        return None  # it has ended, or another attempt has it by now
    return _store(db, what, replace(stored, state=after, **changes), now, note)


def _store(db: sqlite3.Connection, what: str, job: Job, now: float, note: str | None = None) -> Job:
    _write(db, job)
    _log(db, what, job, now, note)
    return job


def _write(db: sqlite3.Connection, job: Job) -> None:
    db.execute(
        "INSERT INTO jobs (id, state, data) VALUES (?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET state = excluded.state, data = excluded.data",
        (job.id, job.state, json.dumps(vars(job))),
    )


def _log(db: sqlite3.Connection, what: str, job: Job, now: float, note: str | None) -> None:
    event = {key: getattr(job, key) for key in ("name", "kind", "state")}
    event |= {"at": now, "what": what, "job": job.id, "attempt": job.attempts, "note": note}
    db.execute("INSERT INTO events (data) VALUES (?)", (json.dumps(event),))


def _table(rows: Iterable[Mapping[str, Any]], columns: str) -> pa.Table:
    rows, arrays = list(rows), {}
    for column in columns.split():
        name, _, kind = column.partition(":")
        cells = [row[name] for row in rows]
        if kind == "time":
            cells = [None if cell is None else round(cell * 1e6) for cell in cells]
        arrays[name] = pa.array(cells, _TYPES.get(kind, pa.string()))
    return pa.table(arrays)
