"""A job in a process of its own: a command line of `lora`, run under limits.

`supervise` is the function that is submitted to an executor. The process watches a pipe
and ends with its supervisor. It works in the job's folder, where the next attempt finds a whole
result.

Requirements: R19.
"""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from lora.errors import CardNotFoundError, StateError, StoreError
from lora.files import replacing

COMMAND_LINE, JOBS = "lora.cli.app", "lora.cli.jobs"
"""What runs a job's command line, and checks it; they stand above, so are imported by name."""

ORDER, OUTCOME, LOG, PRINTED = "order.json", "outcome.json", "log", "printed.json"
"""Files in a job's folder: what is to be done, what came of it, its stderr, its stdout."""

FINAL = 2
"""Exit status of a wrong command line: the job need not be tried again."""

_RUNNING: set[tuple[str, "subprocess.Popen[bytes]"]] = set()


def content_id(path: str) -> str:
    """Identify an input: a file's SHA-256; of a folder, that of names, sizes and times."""
    try:
        if not Path(path).is_dir():
            with Path(path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        files = [(file, file.stat()) for file in sorted(Path(path).rglob("*")) if file.is_file()]
    except FileNotFoundError as error:
        raise CardNotFoundError(path, "a file or folder that the job reads", "none") from error
    except (OSError, ValueError) as error:  # a value error: a path with a null byte
        raise StoreError(path, "a path that can be read", error) from error
    rows = [[str(file.relative_to(path)), st.st_size, st.st_mtime_ns] for file, st in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def supervise(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job in a fresh process and return its outcome; all of it is JSON, for any executor.

    It is `{"card": path or None, "exam": path or None, "printed": facts}` or
    `{"error": text, "final": bool}`.
    """
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / ORDER) as file:
        file.write(json.dumps(dict(order)).encode())
    with (
        (folder / LOG).open("a+b") as log,
        subprocess.Popen(  # noqa: S603 - this very interpreter
            [sys.executable, "-m", "lora.evolution.worker", str(folder / ORDER)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={"OMP_NUM_THREADS": str(order["threads"]), **os.environ},
            start_new_session=True,
        ) as process,
    ):
        before = log.seek(0, os.SEEK_END)
        _RUNNING.add(running := (str(folder), process))
        try:
            status = process.wait(order["seconds"])
        except subprocess.TimeoutExpired:
            _kill(process)
            return {"error": f"hit its time limit of {order['seconds']:g} s", "final": False}
        finally:
            _RUNNING.remove(running)
        log.seek(before)
        lines = log.read().decode(errors="replace").split("\n")
    outcome = finished(folder)
    return outcome or {"error": _reason(order, status, lines), "final": status == FINAL}


def _reason(order: Mapping[str, Any], status: int, lines: list[str]) -> str:
    see = f"; see {Path(order['folder']) / LOG}"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}{see}"
    if status == 0:
        return "exit status 0, but no card"
    errors = [line.removeprefix("lora: ") for line in lines if line.startswith("lora: ")]
    # Of a traceback, the last line is the error.
    last = next((f": {line}" for line in reversed(lines) if line.strip()), "")
    error = errors[-1] if errors else f"exit status {status}{last}{see}"
    if order["memory"] is not None and "MemoryError" in error:
        return f"hit its memory limit of {order['memory']} bytes"
    return error


def halt(folder: str) -> None:
    """Kill what works in a folder, if this process supervises it."""
    for place, process in list(_RUNNING):
        if place == folder:
            _kill(process)


def main() -> None:
    """Be a job's process: read an order, leave an outcome in the job's folder."""
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    order = json.loads(Path(sys.argv[1]).read_bytes())
    folder = Path(order["folder"])
    with locked(folder / "lock", order["seconds"], "one process of a job"):
        if finished(folder):
            return
        outcome = _attempt(order, folder)
        with replacing(folder / OUTCOME) as file:
            file.write(json.dumps(outcome).encode())


def _attempt(order: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    for path, content in order["inputs"].items():
        try:
            is_changed = content_id(path) != content
        except (CardNotFoundError, StoreError) as problem:  # it may be there again later
            sys.exit(f"lora: {problem}")
        if is_changed:
            expected = "expected what it was when the job was added"
            sys.stderr.write(f"lora: {path}: {expected}, found it changed\n")
            sys.exit(FINAL)
    if order["memory"] is not None:
        import resource  # noqa: PLC0415 - POSIX only

        # Private memory; what is mapped for reading does not count.
        resource.setrlimit(resource.RLIMIT_DATA, (order["memory"], order["memory"]))
    os.chdir(folder)
    with Path(PRINTED).open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
    sys.argv = ["lora", *order["arguments"]]
    program = import_module(COMMAND_LINE)
    try:
        program.main()
    except SystemExit as ended:
        status = ended.code
    printed: dict[str, Any] = {}
    with suppress(OSError, TypeError, ValueError):
        printed = dict(json.loads(Path(PRINTED).read_text("utf-8")))
    card, exam = folder / str(printed.get("file")), printed.get("exam")
    if status == 0 and card.is_file():
        refused, guard = import_module(JOBS).harm(order["arguments"], card, Path(order["live"]))
        printed |= guard
        if not refused:
            return {"card": str(card), "exam": exam and str(folder / exam), "printed": printed}
        status, printed["reason"] = program.NOTHING_TO_SERVE, refused
    if status == program.NOTHING_TO_SERVE:
        return {"card": None, "printed": printed}
    sys.exit(status)


def finished(folder: Path) -> dict[str, Any]:
    """Read what an attempt made, or that it made nothing; {} if none ended, or the card is gone."""
    try:
        outcome: dict[str, Any] = json.loads((folder / OUTCOME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return outcome if outcome["card"] is None or Path(outcome["card"]).is_file() else {}


@contextmanager
def locked(path: Path, seconds: float, expected: str) -> Iterator[None]:
    """Hold a lock, which the system releases however this process ends; wait for it so long."""
    with ExitStack() as stack:
        try:
            lock = sqlite3.connect(path, timeout=seconds, isolation_level=None)
            stack.callback(lock.close)
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise StateError(str(path), expected, "another that runs") from error
            raise StoreError(str(path), "a file that can be locked", error) from error
        yield


def _end_with_supervisor() -> None:
    """Kill this process group once the supervisor is gone: nobody else closes the pipe."""
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
