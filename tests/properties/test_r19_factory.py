"""R19: whatever happens to the queue, wherever it is killed, no job is lost, none takes effect
twice, none runs for ever.
"""

import sqlite3
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora.evolution.nights import due, night_of
from lora.evolution.queue import MOVES, Job, JobQueue
from lora.testing.plugin import requirement

ENDS = ("done", "rejected", "dead")
KEEP_ALL = 1000


class Killed(BaseException):
    """What a process that was killed does next: nothing."""


class Mortal(sqlite3.Connection):
    """A connection whose process is killed right before its k-th statement."""

    left = None

    def execute(self, *args):
        if self.left == 0:
            raise Killed
        if self.left is not None:
            self.left -= 1
        return super().execute(*args)


def connect(left):
    """What `sqlite3.connect` is for a process that will be killed."""

    def connected(*args, **options):
        db = Mortal(*args, **options)
        db.left = left
        return db

    return connected


@dataclass(frozen=True)
class Known:
    """A job as the model has it."""

    state: str = "queued"
    attempts: int = 0
    failures: int = 0


def seen(queue):
    """Everything that a queue says of its jobs and versions."""
    jobs = {job.id: Known(job.state, job.attempts, job.failures) for job in queue.jobs()}
    return jobs, sorted(version.id for version in queue.versions())


class Factory(RuleBasedStateMachine):
    """A queue beside a model of it; attempts that lost their job try to end it all the same."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "queue.sqlite")
        self.queue = JobQueue(self.path)
        self.jobs, self.effects = {}, []
        self.orders, self.held = {}, []
        self.now = 0.0

    def teardown(self):
        """A new coordinator brings every job to an end, in no more attempts than were allowed."""
        try:
            if seen(self.queue) == (
                self.jobs,
                sorted(self.effects),
            ):  # else a rule has failed already
                self.drain()
        finally:
            self.folder.cleanup()

    def drain(self):
        self.restart()
        steps = sum(3 - known.failures for known in self.jobs.values() if known.state == "queued")
        for _ in range(steps):
            job = self.queue.claim(self.now)
            if job is not None:
                self.queue.fail(job, "no luck", self.now)
        states = {job.id: job.state for job in self.queue.jobs()}
        assert set(states) == set(self.jobs)
        assert set(states.values()) <= set(ENDS)

    def act(self, expected, action, killed_at):
        """Do something to the queue, or be killed before one of its statements: then it happened or
        it did not.
        """
        self.now += 1.0
        before = (self.jobs, sorted(self.effects))
        jobs, effects = expected
        if killed_at is None:
            result = action(self.queue)
            assert seen(self.queue) == (jobs, sorted(effects))
        else:
            result = None
            with suppress(Killed), mock.patch("sqlite3.connect", connect(killed_at)):
                result = action(self.queue)
            found = seen(self.queue)
            assert found in (before, (jobs, sorted(effects)))
            if found == before != (jobs, sorted(effects)):
                jobs, effects = self.jobs, self.effects
        self.jobs, self.effects = jobs, list(effects)
        if killed_at is not None:
            self.recover()
        return result

    def recover(self):
        """What any coordinator does first."""
        jobs = {}
        for key, known in self.jobs.items():
            failures = known.failures + 1
            state = "dead" if failures == 3 else "queued"
            fails = known.state == "running"
            jobs[key] = replace(known, state=state, failures=failures) if fails else known
        self.queue.recover(self.now)
        self.jobs = jobs
        assert seen(self.queue) == (self.jobs, sorted(self.effects))

    kills = st.none() | st.integers(0, 8)

    @rule(number=st.integers(0, 5), killed_at=kills)
    def add(self, number, killed_at):
        options = {"base": "ab"[number % 2], "priority": number % 3}
        job = Job.of(["toy", str(number)], f"skill {number % 2}", **options)
        expected = {job.id: Known()} | self.jobs
        self.act((expected, self.effects), lambda queue: queue.add(job, self.now), killed_at)
        if job.id in self.jobs:  # an addition that was killed in time has no age
            self.orders.setdefault(job.id, job)

    def first(self):
        """The job that may be claimed: the best one, where none of another base runs."""
        ages = list(self.orders)
        order = sorted(
            self.queue.jobs("queued"), key=lambda job: (-job.priority, ages.index(job.id))
        )
        bases = {job.base for job in self.queue.jobs("running")}
        return order[0].id if order and bases <= {order[0].base} else None

    @rule(killed_at=kills)
    def claim(self, killed_at):
        key = self.first()
        expected = self.jobs
        if key is not None:
            known = self.jobs[key]
            running = replace(known, state="running", attempts=known.attempts + 1)
            expected = self.jobs | {key: running}
        job = self.act((expected, self.effects), lambda queue: queue.claim(self.now), killed_at)
        if job is not None:
            assert job.id == key
            self.held.append(job)

    def end(self, job, what, state, killed_at, *, failed=0, effect=()):
        known = self.jobs[job.id]
        holds = known.state == "running" and known.attempts == job.attempts
        if what == "fail" and known.failures + 1 == 3:
            state = "dead"
        changed = replace(known, state=state, failures=known.failures + failed)
        expected = self.jobs, self.effects
        if holds:
            expected = self.jobs | {job.id: changed}, [*self.effects, *effect]
        digest = f"{len(self.effects):064x}"
        actions = {
            "accept": lambda queue: queue.accept(
                job, digest, f"0.{len(self.effects)}.0", self.now, keep=KEEP_ALL
            ),
            "reject": lambda queue: queue.reject(job, self.now),
            "release": lambda queue: queue.release(job, self.now),
            "fail": lambda queue: queue.fail(job, "no luck", self.now),
        }
        ended = self.act(expected, actions[what], killed_at)
        if killed_at is None:
            assert (ended is not None) == holds

    @precondition(lambda self: self.held)
    @rule(data=st.data(), killed_at=kills)
    def accept(self, data, killed_at):
        job = data.draw(st.sampled_from(self.held))
        self.end(job, "accept", "done", killed_at, effect=[job.id])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), killed_at=kills)
    def reject(self, data, killed_at):
        self.end(data.draw(st.sampled_from(self.held)), "reject", "rejected", killed_at)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), killed_at=kills)
    def fail(self, data, killed_at):
        self.end(data.draw(st.sampled_from(self.held)), "fail", "queued", killed_at, failed=1)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), killed_at=kills)
    def release(self, data, killed_at):
        self.end(data.draw(st.sampled_from(self.held)), "release", "queued", killed_at)

    @precondition(lambda self: any(known.state == "dead" for known in self.jobs.values()))
    @rule(data=st.data(), killed_at=kills)
    def retry(self, data, killed_at):
        dead = sorted(key for key, known in self.jobs.items() if known.state == "dead")
        key = data.draw(st.sampled_from(dead))
        expected = self.jobs | {key: replace(self.jobs[key], state="queued", failures=0)}
        self.act((expected, self.effects), lambda queue: queue.retry(key, self.now), killed_at)

    @rule()
    def restart(self):
        self.queue = JobQueue(self.path)
        self.recover()
        assert not self.queue.jobs("running")

    @invariant()
    def no_job_takes_effect_twice(self):
        rows = self.queue.history().to_pylist()
        accepted = [row["job"] for row in rows if row["what"] == "accept"]
        done = sorted(job.id for job in self.queue.jobs("done"))
        assert sorted(accepted) == sorted(self.effects) == done

    @invariant()
    def one_version_of_each_name_is_live_and_it_is_the_last_accepted(self):
        versions = self.queue.versions()
        for name in {version.name for version in versions}:
            of_name = [version for version in versions if version.name == name]
            assert [version.live for version in of_name] == [False] * (len(of_name) - 1) + [True]

    @invariant()
    def no_job_fails_more_often_than_it_may(self):
        assert all(
            known.failures <= 3 and (known.failures < 3 or known.state == "dead")
            for known in self.jobs.values()
        )

    @invariant()
    def history_is_a_walk_along_the_moves(self):
        places = {}
        for row in self.queue.history().to_pylist():
            if row["what"] == "add":
                assert row["job"] not in places
            else:
                assert (places[row["job"]], row["state"]) == MOVES[row["what"]]
            places[row["job"]] = row["state"]
        assert places == {key: known.state for key, known in self.jobs.items()}


TestQueue = requirement("R19.1", "R19.2", "R19.6")(Factory.TestCase)
TestQueue.settings = settings(stateful_step_count=25)


@requirement("R19.1")
@given(
    orders=st.lists(st.tuples(st.integers(-1, 1), st.sampled_from(["", "a", "b"])), max_size=8),
    workers=st.integers(1, 3),
    data=st.data(),
)
def test_jobs_begin_by_priority_then_age_and_never_beside_another_base_model(orders, workers, data):
    with tempfile.TemporaryDirectory() as folder:
        added, queue = [], JobQueue(f"{folder}/queue.sqlite")
        for number, (priority, base) in enumerate(orders):
            job = Job.of(["toy", str(number)], "skill", base=base, priority=priority)
            # A clock that runs backwards makes nobody older.
            added.append(queue.add(job, 10.0 - number))
        running, begun = [], []
        while len(begun) < len(orders) or running:
            job = queue.claim(0.0) if len(running) < workers else None
            if job is not None:
                running.append(job)
                begun.append(job.id)
                assert len({one.base for one in running} - {""}) <= 1
            else:
                assert running  # where nothing runs, the next can begin
                queue.reject(running.pop(data.draw(st.integers(0, len(running) - 1))), 0.0)
        order = sorted(added, key=lambda job: (-job.priority, added.index(job)))
        assert begun == [job.id for job in order]


LINES = st.lists(st.text(max_size=4), min_size=1, max_size=4)
INPUTS = st.dictionaries(st.text(max_size=3), st.text("0123456789abcdef", max_size=3), max_size=3)


@requirement("R19.2")
@given(line=LINES, inputs=INPUTS, other=LINES, others=INPUTS, priority=st.integers(-5, 5))
def test_a_job_is_known_by_its_command_line_and_inputs_and_survives_the_file(
    line, inputs, other, others, priority
):
    job = Job.of(line, "skill", inputs)
    shuffled = dict(reversed(inputs.items()))
    assert Job.of(tuple(line), "skill", shuffled, priority=priority, seconds=5.0).id == job.id
    different = Job.of(other, "skill", others)
    assert (different.id == job.id) == ((other, others) == (line, inputs))
    assert len({job.id, Job.of([*line, ""], "x").id, Job.of(line, "x", {"/new": "1"}).id}) == 3
    with tempfile.TemporaryDirectory() as folder:
        queue = JobQueue(f"{folder}/queue.sqlite")
        queue.add(job, 1.0)
        queue = JobQueue(f"{folder}/queue.sqlite")
        assert queue.jobs() == [replace(job, created=1.0)]
        assert queue.add(replace(job, priority=9), 2.0) == replace(job, created=1.0)
        assert len(queue.jobs()) == 1


MOMENTS = st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31))  # noqa: DTZ001 - a wall clock
MOMENT = timedelta(microseconds=1)
TIMES = st.times().map(lambda at: at.replace(second=0, microsecond=0))


@requirement("R19.4")
@given(
    at=TIMES,
    start=MOMENTS,
    steps=st.lists(st.timedeltas(timedelta(0), timedelta(days=3)), max_size=20),
)
def test_while_the_clock_runs_on_each_night_is_run_once_at_the_first_look_after_it_began(
    at, start, steps
):
    now, last, runs = start, night_of(at, start), []
    for step in steps:
        now += step
        night = due(at, last, now)
        began = datetime.combine(night_of(at, now), at)
        assert began <= now < began + timedelta(days=1)
        if night is not None:
            assert datetime.combine(last, at) < began  # of several missed, the latest
            runs.append(night)
            last = night
        assert last == night_of(at, now)  # nothing that began is left
    assert len(set(runs)) == len(runs)
    assert runs == sorted(runs)


@requirement("R19.4")
@given(at=TIMES, day=st.dates(date(2026, 1, 2), date(2026, 12, 30)))
def test_a_night_begins_at_its_time_and_not_a_moment_before(at, day):
    assert night_of(at, datetime.combine(day, at)) == day
    assert night_of(at, datetime.combine(day, at) - MOMENT) == day - timedelta(days=1)


@requirement("R19.4")
@given(
    at=TIMES,
    now=MOMENTS,
    ahead=st.integers(-3, 3) | st.integers(-2000, 2000),
    back=st.timedeltas(timedelta(0), timedelta(hours=23)),
)
def test_a_clock_that_jumps_runs_no_night_twice_for_less_than_a_day_and_never_stops_the_nights(
    at, now, ahead, back
):
    last = night_of(at, now)
    assert due(at, last, now - back) is None
    told = last + timedelta(
        days=ahead
    )  # the last night that was run, by a clock that may have been wrong
    found = due(at, told, now)
    assert found == (None if ahead in (0, 1) else last)


@requirement("R19.4")
@given(
    at=TIMES,
    day=st.dates(date(2026, 1, 2), date(2026, 12, 30)),
    shift=st.sampled_from([-60, 60]),
    minute=st.integers(0, 1439),
)
def test_summer_time_leaves_out_no_night_and_runs_none_twice(at, day, shift, minute):
    """A day's wall clock, minute by minute, that is put forward or back by an hour somewhere."""
    wall = datetime.combine(day, time())
    looks = [wall + timedelta(minutes=m) for m in range(minute)]
    looks += [wall + timedelta(minutes=m) for m in range(minute + shift, 1440 + 60)]
    last, runs = night_of(at, wall - timedelta(minutes=1)), []
    for now in looks:
        night = due(at, last, now)
        if night is not None:
            runs.append(night)
            last = night
    assert len(set(runs)) == len(runs)
    assert runs[0] == day
