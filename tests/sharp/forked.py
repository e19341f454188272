"""Run pytest in forks of a process that has imported what takes long, and nothing of the project.

The arguments are the modules to import first.
Each line of standard input is a JSON object: the arguments for pytest, the Hypothesis profile, a
limit in seconds, and the file that the output goes to. The answer is a line with pytest's exit
status, or with ``null`` where the tests took too long.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest


def run_tests(arguments: list[str], profile: str, output: str) -> int:
    """Run pytest in this process as ``python -m pytest`` would, with the working folder's code."""
    streams = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT), 1
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.environ["LORA_PROFILE"] = profile
    sys.argv = ["pytest", *arguments]
    sys.modules["__main__"] = importlib.import_module("pytest.__main__")
    importlib.invalidate_caches()
    return pytest.main(arguments)


def wait(child: int, seconds: float) -> int | None:
    """Return the exit status of a process, or None after a time; whatever it started is killed."""
    end = time.monotonic() + seconds
    ended, status = 0, 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0 if ended else 0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.kill(child, signal.SIGKILL)  # it may have had no group yet
        os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def main() -> None:
    """Answer until standard input ends."""
    sys.path[0] = str(Path.cwd())
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = request.pop("seconds")
        if not (child := os.fork()):
            os.setsid()
            sys.exit(run_tests(**request))
        sys.stdout.write(json.dumps(wait(child, seconds)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
