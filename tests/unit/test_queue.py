"""The queue by example: what it refuses, what it tells, versions and roll-back, many at once."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime

import pyarrow as pa
import pytest

from lora.errors import ArgumentError, BadNameError, StateError, StoreError, UnknownCardError
from lora.evolution.nights import due, parse_at
from lora.evolution.queue import MOVES, NIGHT, Job, JobQueue
from lora.testing.plugin import requirement


@pytest.fixture
def queue(tmp_path):
    return JobQueue(tmp_path / "queue.sqlite")


def order(number=0, name="docs", **options):
    return Job.of(["toy", str(number)], name, **options)


def accepted(queue, *numbers, keep=3, name="docs"):
    """Versions of a skill, made by jobs one after another."""
    for number in numbers:
        queue.add(order(number, name), float(number))
        sha, version = f"{number:064x}", f"0.{number}.0"
        queue.accept(queue.claim(float(number)), sha, version, float(number), keep=keep)


def kept(queue):
    """The minor version of each card that is kept, and the live ones."""
    numbers = [int(version.version.split(".")[1]) for version in queue.versions()]
    versions = zip(numbers, queue.versions(), strict=True)
    return numbers, [number for number, version in versions if version.live]


def roll_back(queue, name="docs", version=None):
    return queue.put_live(queue.earlier(name, version), 9.0).version


@requirement("R19.2")
def test_the_moves_are_a_table_that_leads_every_job_to_an_end():
    states = {state for move in MOVES.values() for state in move}
    assert states == {"queued", "running", "done", "rejected", "dead"}
    ends = {after for before, after in MOVES.values() if before == "running"}
    assert ends == {"queued", "done", "rejected", "dead"}
    assert not {"done", "rejected"} & {before for before, _ in MOVES.values()}
    assert [what for what, (_, after) in MOVES.items() if after == "running"] == ["claim"]
    with pytest.raises(TypeError):
        MOVES["claim"] = MOVES["retry"]


@requirement("R19.2")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, "card name: expected 1 to 128 printable characters, no slash"),
        ("a\nb", {}, "name"),
        ("a/b", {}, "no slash"),
        (".a", {}, "no dot in front"),
        ("\U0001f600" * 51, {}, "skill name: expected at most 200 bytes"),
        ("\ud800", {}, "name"),
        ("a", {"priority": 1.5}, "priority"),
        ("a", {"priority": 2**31}, "priority"),
        ("a", {"max_failures": 0}, "max_failures"),
        ("a", {"seconds": 0}, "seconds"),
        ("a", {"seconds": float("inf")}, "seconds"),
        ("a", {"seconds": 1e300}, "seconds"),
        ("a", {"memory": 0}, "memory"),
    ],
)
def test_a_job_that_means_nothing_is_refused_by_name(name, options, message):
    with pytest.raises((ArgumentError, BadNameError), match=message):
        Job.of(["merge"], name, **options)


@requirement("R19.2", "R19.6")
def test_there_is_always_a_limit_of_time_and_of_attempts():
    job = order()
    assert (job.seconds, job.max_failures) == (NIGHT, 3)
    assert 0 < NIGHT < 24 * 3600


@requirement("R19.2")
def test_what_is_asked_for_twice_is_there_once_and_stays_as_it_is(queue):
    first = queue.add(order(), 1.0)
    running = queue.claim(2.0)
    assert running.id == first.id
    assert queue.add(order(), 3.0) == running
    assert queue.accept(running, "0" * 64, "0.1.0", 4.0).state == "done"
    assert queue.add(order(), 5.0).state == "done"
    assert queue.claim(6.0) is None


@requirement("R19.2")
def test_a_job_fails_thrice_and_is_dead_until_it_is_asked_for_again(queue):
    queue.add(order(), 0.0)
    states = [queue.fail(queue.claim(1.0), f"no luck {n}", 2.0).state for n in range(3)]
    assert states == ["queued", "queued", "dead"]
    assert queue.claim(3.0) is None
    (dead,) = queue.jobs("dead")
    assert (dead.attempts, dead.failures, dead.error) == (3, 3, "no luck 2")
    again = queue.retry(dead.id, 4.0)
    assert (again.state, again.attempts, again.failures) == ("queued", 3, 0)
    with pytest.raises(StateError, match="expected a dead job, found one queued"):
        queue.retry(dead.id, 5.0)
    with pytest.raises(StateError, match="expected a dead job, found none"):
        queue.retry("strange", 5.0)


@requirement("R19.2")
def test_a_final_failure_is_not_tried_again_and_a_release_is_held_against_nobody(queue):
    queue.add(order(), 0.0)
    for _ in range(5):
        assert queue.release(queue.claim(0.0), 0.0).failures == 0
    assert queue.fail(queue.claim(0.0), "bad data", 1.0, final=True).state == "dead"


@requirement("R19.2", "R19.7")
def test_a_rejected_job_has_its_reason_and_the_history_its_figures(queue):
    queue.add(order(), 0.0)
    ended = queue.reject(queue.claim(0.0), 1.0, "no better", '{"mrr": 0.5}')
    assert (ended.state, ended.error) == ("rejected", "no better")
    assert queue.history()["note"].to_pylist()[-1] == '{"mrr": 0.5}'


@requirement("R19.2")
def test_the_result_of_an_attempt_that_lost_its_job_is_not_taken(queue):
    queue.add(order(), 0.0)
    lost = queue.claim(0.0)
    assert [job.state for job in queue.recover(1.0)] == ["queued"]
    assert queue.accept(lost, "1" * 64, "0.1.0", 2.0) is None
    held = queue.claim(3.0)
    assert queue.accept(lost, "1" * 64, "0.1.0", 4.0) is None
    assert queue.fail(lost, "late", 4.0) is None
    assert queue.reject(lost, 4.0) is None
    assert queue.release(lost, 4.0) is None
    assert queue.accept(held, "2" * 64, "0.1.0", 5.0).digest == "2" * 64
    assert [version.digest for version in queue.versions()] == ["2" * 64]


@requirement("R19.2")
def test_a_job_that_takes_every_coordinator_with_it_ends_on_the_dead_letter_list(queue):
    queue.add(order(), 0.0)
    for _ in range(3):
        assert queue.claim(0.0) is not None
        queue.recover(1.0)
    (dead,) = queue.jobs()
    assert (dead.state, dead.error) == ("dead", "the coordinator died")


@requirement("R19.1")
def test_a_job_of_another_base_model_waits_and_lets_nobody_past(queue):
    for number, (base, priority) in enumerate([("a", 0), ("b", 0), ("a", 0), ("", 0), ("b", 5)]):
        queue.add(order(number, base=base, priority=priority), 0.0)
    first = queue.claim(0.0)
    assert (first.base, first.priority) == ("b", 5)
    assert queue.claim(0.0) is None
    queue.reject(first, 0.0)
    assert queue.claim(0.0).arguments == ("toy", "0")
    # Job 2 is of the base that runs, job 3 of none; but job 1 is older.
    assert queue.claim(0.0) is None


@requirement("R19.1", "R19.2")
def test_many_open_add_and_claim_at_once_and_each_job_is_claimed_once(tmp_path):
    path = tmp_path / "queue.sqlite"

    def add(worker):
        own = JobQueue(path)
        return [own.add(order(number), 0.0).id for number in range(worker, worker + 4)]

    def claim(_):
        own = JobQueue(path)
        return [job.id for _ in range(3) if (job := own.claim(1.0)) is not None]

    with ThreadPoolExecutor(8) as threads:
        added = {job for jobs in threads.map(add, range(8)) for job in jobs}
        claimed = [job for jobs in threads.map(claim, range(8)) for job in jobs]
    assert len(added) == 11
    assert sorted(claimed) == sorted(added)


@requirement("R19.5")
def test_the_last_versions_are_kept_and_the_live_one_whatever_its_age(queue):
    accepted(queue, 1, 2, 3, 4, keep=2)
    assert kept(queue) == ([3, 4], [4])
    assert roll_back(queue) == "0.3.0"
    assert kept(queue) == ([3, 4], [3])
    accepted(queue, 5, keep=1)
    assert kept(queue) == ([3, 5], [5])
    accepted(queue, 6, 7, keep=2)
    assert kept(queue) == ([6, 7], [7])


@requirement("R19.5")
def test_versions_are_ordered_as_versions_not_as_text(queue):
    accepted(queue, 9, 10, 11, keep=2)
    assert kept(queue) == ([10, 11], [11])
    accepted(queue, 12, 100, keep=3)
    assert kept(queue) == ([11, 12, 100], [100])


@requirement("R19.5")
def test_rolling_back_takes_the_version_before_or_the_one_that_is_named(queue):
    accepted(queue, 1, 2, 3)
    accepted(queue, 4, name="law")
    assert [roll_back(queue), roll_back(queue)] == ["0.2.0", "0.1.0"]
    expected = "roll back 'docs': expected a version before the live one"
    with pytest.raises(StateError, match=expected):
        queue.earlier("docs")
    last = queue.earlier("docs", "0.3.0")
    assert queue.put_live(last, 5.0).live
    assert kept(queue) == ([1, 2, 3, 4], [3, 4])
    assert queue.history()["what"].to_pylist()[-1] == "roll back"
    with pytest.raises(UnknownCardError, match=r"one of \['0.1.0', '0.2.0', '0.3.0'\], found '9'"):
        queue.earlier("docs", "9")
    with pytest.raises(UnknownCardError, match="none of that name"):
        queue.earlier("nothing")
    accepted(queue, 5, keep=1)
    gone = replace(last, id=queue.jobs("done")[0].id, version="0.1.0")
    with pytest.raises(StateError, match=r"version 0\.1\.0, found one that is no longer kept"):
        queue.put_live(gone, 6.0)


@requirement("R19.7")
def test_status_history_and_skills_are_arrow_tables(queue):
    accepted(queue, 1)
    queue.add(order(2, priority=3, base="model"), 2.5)
    queue.fail(queue.claim(3.0), "no luck", 4.0)
    status = queue.status()
    assert status.schema.field("created").type == pa.timestamp("us", tz="UTC")
    waiting, done = status.to_pylist()
    assert done | {"state": "done", "digest": f"{1:064x}", "error": None, "attempts": 1} == done
    assert waiting["created"] == datetime(1970, 1, 1, 0, 0, 2, 500000, UTC)
    expected = {"state": "queued", "failures": 1, "error": "no luck", "base": "model"}
    assert waiting | expected == waiting
    assert queue.history()["what"].to_pylist() == ["add", "claim", "accept", "add", "claim", "fail"]
    assert queue.history()["note"].to_pylist()[-1] == "no luck"
    (version,) = queue.skills().to_pylist()
    assert version | {"name": "docs", "version": "0.1.0", "live": True, "kind": "toy"} == version


@requirement("R19.7")
def test_the_tables_of_an_empty_queue_have_their_columns(queue):
    for table in (queue.status(), queue.history(), queue.skills()):
        assert len(table) == 0
        assert {"name", "job"} & set(table.column_names)


@requirement("R19.2")
def test_what_is_no_queue_or_one_of_another_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "queue.sqlite"
    path.write_bytes(b"something else entirely" * 99)
    expected = r"queue\.sqlite: expected a job queue that can be read and written"
    with pytest.raises(StoreError, match=expected):
        JobQueue(path)
    assert path.read_bytes() == b"something else entirely" * 99
    with pytest.raises(StoreError, match="unable to open"):
        JobQueue(tmp_path / "nowhere" / "queue.sqlite")
    newer = tmp_path / "newer.sqlite"
    db = sqlite3.connect(newer, isolation_level=None)
    db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(StateError, match="a queue of version 3, found version 7"):
        JobQueue(newer)


@requirement("R19.2")
def test_an_error_of_the_file_is_named_and_changes_nothing(queue):
    queue.add(order(), 0.0)
    job = queue.claim(0.0)
    with queue.transaction() as db:
        full = "BEFORE INSERT ON events BEGIN SELECT RAISE(FAIL, 'disk full'); END"
        db.execute(f"CREATE TRIGGER full {full}")
    with pytest.raises(StoreError, match="disk full"):
        queue.accept(job, "0" * 64, "0.1.0", 1.0)
    assert [one.state for one in queue.jobs()] == ["running"]
    assert queue.versions() == []


@requirement("R19.4")
def test_nights_are_remembered(queue):
    assert queue.night() is None
    queue.set_night(date(2026, 3, 1))
    queue.set_night(date(2026, 3, 2))
    other = JobQueue(queue.path)
    assert other.night() == date(2026, 3, 2)


@requirement("R19.4")
@pytest.mark.parametrize("at", ["", "2", "24:00", "02:60", "2 am", "02:00:00", None, 2])
def test_what_is_no_time_of_day_is_refused(at):
    with pytest.raises(ArgumentError, match=r"at: expected a time of day such as 02:00, found"):
        parse_at(at)


@requirement("R19.4")
def test_a_missed_night_is_due_at_once():
    at = parse_at("02:00")
    noon = datetime(2026, 3, 5, 12)  # noqa: DTZ001 - a wall clock
    assert due(at, date(2026, 3, 4), noon) == date(2026, 3, 5)
