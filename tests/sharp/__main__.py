"""Break each requirement on purpose, and see that a test which names it fails.

A violation is a small change of the source that makes the sentence of one requirement false. The
files beside this one list them: requirement, file, the old text and the new one, and what the
change breaks. For each, this program makes the change in a copy of the project, and runs the tests
that name the requirement. They must fail: a violation that they let pass shows a hole in the tests.

    python -m tests.sharp                  all that were not run since their files last changed
    python -m tests.sharp --only R1 R4.9   those of a chapter and of one requirement
    python -m tests.sharp --seconds 180    a sample, drawn anew on each day, for three minutes
    python -m tests.sharp --count          note in ``counts.json`` how many each requirement has

Verdicts are kept in ``sharp.json``, so that a run that was stopped goes on where it was. A run of
all is noted in ``last.json``, with the time of its parts, for the page on traceability. The counts
never fall: a violation follows the code that it changes, and is not dropped.
"""

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from queue import SimpleQueue

from lora.testing.requirements import read_spec
from tests.sharp.workspace import Workspace

ROOT = Path(__file__).parents[2]
VERDICTS = ROOT / "sharp.json"
COUNTS = Path(__file__).parent / "counts.json"
LAST = Path(__file__).parent / "last.json"
LIMIT = 900
"""Seconds that the tests of one violation may take."""

NO_TIME = "no verdict within"
"""How the verdict on a violation begins whose tests took too long."""

PASSED, FAILED, NO_TESTS = 0, 1, 5
"""Exit statuses of pytest; any other says that the tests were not run to their end."""


@dataclass(frozen=True)
class Violation:
    """A change of the source that makes the sentence of a requirement false.

    Args:
        id: The requirement.
        file: The file to change, from the project's root.
        old: A text that occurs once in the file.
        new: What stands there instead.
        breaks: What is false then, in one sentence.
        tests: The test files to run; by default all that name the requirement.
    """

    id: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...] = ()


def read_violations(folder: Path = Path(__file__).parent) -> list[Violation]:
    """Return the violations that the TOML files in a folder list."""
    return [
        Violation(**{**entry, "tests": tuple(entry.get("tests", ()))})
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["violation"]
    ]


def faults(violations: list[Violation], root: Path = ROOT) -> Iterator[str]:
    """Yield what is wrong with a list of violations: they age when the code moves."""
    for violation in violations:
        where = f"{violation.id}: {violation.breaks}"
        text = (root / violation.file).read_text(encoding="utf-8")
        if (times := text.count(violation.old)) != 1:
            yield f"{where}: its old text occurs {times} times in {violation.file}"
        if violation.old == violation.new:
            yield f"{where}: it changes nothing"
        if not tests_of(violation, root):
            yield f"{where}: no test names {violation.id}"


def tests_of(violation: Violation, root: Path) -> list[str]:
    """Return the test files that name the requirement of a violation, or those that it states."""
    if violation.tests:
        return list(violation.tests)
    return [
        path.relative_to(root).as_posix()
        for path in sorted((root / "tests").rglob("test_*.py"))
        if violation.id in ids_named(path, path.stat().st_mtime_ns)
    ]


@cache
def ids_named(path: Path, _time: int) -> frozenset[str]:
    """Return the requirements that a file names, which is read once until its time changes."""
    return frozenset(re.findall(r"\bR\d+\.\d+\b", path.read_text(encoding="utf-8")))


def key_of(violation: Violation, root: Path = ROOT) -> str:
    """Return a digest of all that a verdict depends on: the change, its file and its tests."""
    digest = hashlib.sha256(repr(violation).encode())
    for name in [violation.file, *tests_of(violation, root)]:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def open_ids(violations: list[Violation]) -> list[str]:
    """Return the built requirements without a violation."""
    covered = {violation.id for violation in violations}
    spec = read_spec(ROOT / "spec").values()
    return [entry.id for entry in spec if entry.status == "built" and entry.id not in covered]


def write_counts(violations: list[Violation]) -> None:
    """Write down how many violations each requirement has, never fewer than before."""
    old = json.loads(COUNTS.read_text(encoding="utf-8"))["counts"]
    counts = Counter(old) | Counter(violation.id for violation in violations)
    order = {name: place for place, name in enumerate(read_spec(ROOT / "spec"))}
    record = {
        "counts": {name: counts[name] for name in sorted(counts, key=order.__getitem__)},
        "open": open_ids(violations),
    }
    COUNTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def last_run(red: int, total: int, seconds: float) -> str:
    """Return what is noted of a run of all violations, as JSON."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    record = {
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "red": red,
        "all": total,
        "seconds": round(seconds),
    }
    return json.dumps(record, indent=1) + "\n"


def run(violation: Violation, workspace: Workspace, limit: float = LIMIT) -> str:
    """Return "red", "green" or why the tests gave no verdict on a violation."""
    files = tests_of(violation, workspace.folder)
    workspace.change(violation.file, violation.old, violation.new)
    try:
        return verdict_of_tests(workspace, violation.id, files, limit)
    finally:
        workspace.restore()


def verdict_of_tests(workspace: Workspace, name: str, files: list[str], limit: float) -> str:
    """Run the tests of a requirement: more examples and slow tests only where all others passed."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "--only", name]
    end = time.monotonic() + limit
    passed = False
    for profile, marked in (("quick", "not slow"), ("ci", "not slow"), ("quick", "slow")):
        arguments = [*options, "-m", f"{marked} and not foreign", *files]
        status, output = workspace.run_tests(arguments, profile, end - time.monotonic())
        if status is None:
            return f"{NO_TIME} {limit:.0f} s"
        if status == FAILED:
            return "red"
        if status not in (PASSED, NO_TESTS):
            return f"no verdict: {output[-1000:]}"
        passed = passed or status == PASSED
    return "green" if passed else f"no verdict: no test of {name} was run"


def tell(results: list[tuple[Violation, str]]) -> int:
    """Print the violations that turned no test red; return how many did."""
    for violation, verdict in results:
        if verdict != "red":
            print(f"{violation.id}: {verdict}: {violation.breaks} ({violation.file})")
    return sum(verdict == "red" for _, verdict in results)


def main() -> int:
    """Run the violations that are asked for; return 1 if the tests let one pass."""
    parser = argparse.ArgumentParser(prog="python -m tests.sharp")
    parser.add_argument("--only", nargs="*", default=[], help="chapters or requirements")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--seed", help="of the order; default: the day", default=None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", action="store_true", help="write counts.json and run nothing")
    arguments = parser.parse_args()
    violations = [
        violation
        for violation in read_violations()
        if not arguments.only
        or any(f"{violation.id}.".startswith(f"{name}.") for name in arguments.only)
    ]
    if arguments.count:
        write_counts(read_violations())
        return 0
    wrong = list(faults(violations))
    for line in wrong:
        print(line)
    verdicts = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    before, started = verdicts.pop("seconds", 0), time.monotonic()
    if arguments.seconds is not None:
        day = datetime.now(UTC).date().isoformat()
        random.Random(arguments.seed or day).shuffle(violations)

    noting = threading.Lock()

    def note_verdict(violation: Violation) -> tuple[Violation, str] | None:
        workspace = free.get()
        try:
            key = key_of(violation, workspace.folder)
            if verdicts.get(key) != "red":
                left = LIMIT
                if arguments.seconds is not None:
                    left = min(LIMIT, arguments.seconds - (time.monotonic() - started))
                verdict = run(violation, workspace, limit=left) if left > 0 else NO_TIME
                if left < LIMIT and verdict.startswith(NO_TIME):
                    return None  # the sample ends here
                with noting:
                    verdicts[key] = verdict
                    spent = before + time.monotonic() - started
                    VERDICTS.write_text(json.dumps({"seconds": spent, **verdicts}, indent=1))
            return violation, verdicts[key]
        finally:
            free.put(workspace)

    free: SimpleQueue[Workspace] = SimpleQueue()
    with ExitStack() as stack, ThreadPoolExecutor(arguments.workers) as pool:
        for _ in range(arguments.workers):
            free.put(stack.enter_context(Workspace(ROOT)))
        results = [result for result in pool.map(note_verdict, violations) if result]
    red = tell(results)
    seconds = time.monotonic() - started
    if not arguments.only and arguments.seconds is None:
        LAST.write_text(last_run(red, len(results), before + seconds), encoding="utf-8")
    print(f"{red} of {len(results)} violations turn a test red ({seconds:.0f} s)")
    return int(bool(wrong) or red < len(results))


if __name__ == "__main__":
    sys.exit(main())
