"""A binding that is another process, in any language: ``lora conformance --command``.

The process is spoken to in lines of JSON, see `lora.testing.serve`. It is started once, and again
only after it broke. Its death, its silence, and text that is no message raise `NoAnswer`: the
property fails, and the next one starts the process anew.

Requirements: R24.7.
"""

import contextlib
import inspect
import json
import os
import queue
import shlex
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import IO, Any, NoReturn, cast

import numpy as np

from lora.testing.binding import Binding, Lacks, PlainCard, Router
from lora.testing.serve import PROTOCOL, decode, encode

LONGEST_LINE = 1 << 26
"""Bytes; a process that says more in one message is stopped."""

EVIDENCE = 1500
"""How many of the last bytes on its standard error are told with the cause."""

STARTS = 3
"""A process that fails to say hello so many times in a row is not started again."""

ANSWERS: dict[str, type] = dict.fromkeys(("read_card", "extract", "merge"), PlainCard)
ANSWERS |= {"write_card": bytes, "forward": np.ndarray, "match_targets": list, "bind": dict}


class NoAnswer(BaseException):
    """The binding gave no answer. Not an `Exception`, so that nothing takes it for a refusal."""


class RefusalError(Exception):
    """The implementation refused the call."""

    def __init__(self, text: str, place: str | None) -> None:
        super().__init__(text or "refused")
        self.add_note(f"refused at {place}")


class _Process:
    def __init__(self, command: list[str]) -> None:
        self.unneeded: list[int] = []
        """Handles of routers that are gone."""
        self._lines, pipe = queue.Queue[bytes](maxsize=2), subprocess.PIPE
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed where the process ends
        options: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": self._errors}
        try:
            # In a group of its own, so that a wrapper such as `uv run` ends with what it started.
            self._popen = subprocess.Popen(command, start_new_session=True, **options)  # noqa: S603 - the user's own
        except OSError as error:
            self._errors.close()
            raise NoAnswer(f"{command[0]} can't be started: {error.strerror}") from error
        self._in, self._out = cast("list[IO[bytes]]", [self._popen.stdin, self._popen.stdout])
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while (line := self._out.readline(LONGEST_LINE)).endswith(b"\n"):
            self._lines.put(line)
        self._lines.put(line)  # the last, or one that is too long

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a message; where the process has ended, what it says next tells how."""
        if not self._lines.empty() and (line := self._lines.get()):
            self.give_up(f"said what nobody had asked for: {_start_of(line)}")
        with contextlib.suppress(BrokenPipeError):
            self._in.write(json.dumps(message, allow_nan=False).encode() + b"\n")
            self._in.flush()

    def hear(self, seconds: float, number: int | None = None) -> dict[str, Any]:
        """Return its next message, the answer to call `number` or a callback."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.give_up(f"gave no answer in {seconds:g} seconds")
        if not line.endswith(b"\n"):
            self.give_up(self._how_it_ended(line))
        try:
            answer: dict[str, Any] = json.loads(line.decode(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            self.give_up(f"said what is no JSON ({error}): {_start_of(line)}")
        is_message = isinstance(answer, dict)
        if not is_message or ("callback" not in answer and answer.get("id") != number):
            self.give_up(f"said what is no answer to call {number}: {_start_of(line)}")
        return answer

    def _how_it_ended(self, line: bytes) -> str:
        if len(line) == LONGEST_LINE:
            return f"said a line of more than {LONGEST_LINE >> 20} MiB"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(2)
        status = self._popen.returncode
        how = "closed its standard output" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        return f"{how}, in the middle of the line {_start_of(line)}" if line else how

    def give_up(self, cause: str) -> NoReturn:
        """Stop the process, and raise the cause with the last that it wrote to standard error."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - EVIDENCE))
        errors = self._errors.read().decode("utf-8", "replace").strip()
        self.stop()
        raise NoAnswer(f"the process {cause}" + (f"; it wrote: {errors}" if errors else ""))

    def stop(self, seconds: float = 0.0) -> None:
        """End the process, and what it started, which may end by itself in so many seconds."""
        if self._errors.closed:
            return
        if seconds:
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                self._in.close()
                self._popen.wait(seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        with contextlib.suppress(queue.Empty):
            while self._reader.is_alive():  # it may wait for room
                self._lines.get(timeout=1.0)
        if not self._reader.is_alive():  # else somebody out of reach has the other end
            self._out.close()
        self._errors.close()


class RemoteBinding:
    """`lora.testing.binding.Binding` over the process of a command.

    Args:
        command: Program and arguments, quoted as in a shell; no shell runs it.
        start_seconds: How long it may take to say hello.
        call_seconds: How long it may take to answer.

    Raises:
        NoAnswer: It names no program, can't be started, or does not say hello in this protocol.
    """

    def __init__(
        self, command: str, *, start_seconds: float = 120.0, call_seconds: float = 60.0
    ) -> None:
        self._command = shlex.split(command)
        if not any(self._command[:1]):
            raise NoAnswer("it names no program")
        self._start_seconds, self._call_seconds = start_seconds, call_seconds
        self._number = self._failed_starts = 0
        self._callbacks = weakref.WeakValueDictionary[int, Callable[..., Any]]()
        self._process: _Process | None = None
        self._outside: Lacks | None = None
        """What a function of the suite says to the call in place of any answer."""
        self._is_busy = False
        """Whether its last call was not answered; nobody knows then what it will say next."""
        self._ready()

    def __getattr__(self, member: str) -> Callable[..., Any]:
        if member.startswith("_") or member in self.missing or member not in self._members:
            raise AttributeError(member)
        return lambda *args, **kwargs: self.call(None, member, args, kwargs)

    def close(self) -> None:
        """End the process, which its input's end tells to."""
        if self._process is not None:
            self._process.stop(seconds=0.0 if self._is_busy else 5.0)

    def _ready(self) -> _Process:
        if self._process is not None and not self._is_busy:
            return self._process
        if self._process is not None:
            self._process.stop()
        if self._failed_starts == STARTS:
            raise NoAnswer(f"the process failed to start {STARTS} times")
        self._failed_starts, self._is_busy = self._failed_starts + 1, True
        self._process = process = _Process(self._command)
        message = process.hear(self._start_seconds)
        try:
            hello = {"missing": {}, "domains": {}, "expected_failures": {}, **message["hello"]}
            if hello["protocol"] != PROTOCOL:
                process.give_up(f"speaks protocol {hello['protocol']!r}, not {PROTOCOL}")
            self.name, self.version = str(hello["name"]), str(hello["version"])
            self._members = frozenset(hello["members"])
            self.missing, self.domains = dict(hello["missing"]), dict(hello["domains"])
            self.expected_failures = {
                requirement: {test: tuple(why) for test, why in tests.items()}
                for requirement, tests in hello["expected_failures"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            process.give_up(f"said no hello of protocol {PROTOCOL}: {error!r}")
        self._failed_starts, self._is_busy = 0, False
        return process

    def call(
        self, router: "RemoteRouter | None", member: str, args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """Call a member of the binding or of a router; return the answer, or raise the refusal."""
        process, functions = self._ready(), list[Callable[..., Any]]()
        if router is not None and router.process is not process:
            raise NoAnswer("the process that had this router has ended")
        kind, handle = (Binding, 0) if router is None else (Router, router.handle)
        bound = inspect.signature(getattr(kind, member)).bind(None, *args, **kwargs)
        bound.apply_defaults()

        def refer(value: Any) -> dict[str, int]:
            if not callable(value):
                raise Lacks(f"a {type(value).__name__} can't be sent to another process")
            self._number += 1
            self._callbacks[self._number] = value
            functions.append(value)
            return {"callback": self._number}

        def resolve(number: int) -> RemoteRouter:
            if member != "make_router":
                raise ValueError("an object that stays in the process")
            return RemoteRouter(self, process, number, functions)

        sent = {name: encode(value, refer) for name, value in bound.arguments.items()}
        del sent["self"]
        self._number += 1
        number, self._is_busy = self._number, True
        free, process.unneeded[:] = process.unneeded[:], []
        process.say({"id": number, "call": member, "args": sent, "free": free, "on": handle})
        answer = process.hear(self._call_seconds, number)
        try:
            while "callback" in answer:
                process.say(self._called_back(answer))
                answer = process.hear(self._call_seconds, number)
            outcome = _outcome_of(member, answer, resolve)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            process.give_up(f"answered {member} wrongly: {error!r}"[:300])
        self._is_busy = False
        if self._outside is not None:
            outcome, self._outside = self._outside, None
        if isinstance(outcome, Lacks | RefusalError):
            raise outcome
        return outcome

    def _called_back(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        function = self._callbacks[answer["callback"]]
        arguments = decode(answer["args"], dict[int, Any]().__getitem__)
        try:
            return {"ok": encode(function(*arguments), dict[int, Any]().__getitem__)}
        except (Exception, Lacks) as error:  # noqa: BLE001 - the process has to know, whatever it is
            self._outside = error if isinstance(error, Lacks) else None
            return {"refused": f"{type(error).__name__}: {error}"}


class RemoteRouter:
    """`lora.testing.binding.Router` in the process, which is told when this one is gone."""

    def __init__(
        self, binding: RemoteBinding, process: _Process, handle: int, functions: list[Any]
    ) -> None:
        self._binding, self.process, self.handle = binding, process, handle
        self._functions = functions  # which the process may call as long as there is the router
        weakref.finalize(self, process.unneeded.append, handle)  # sent with the next call

    def __getattr__(self, member: str) -> Callable[..., Any]:
        if member.startswith("_") or not hasattr(Router, member):
            raise AttributeError(member)
        return lambda *args, **kwargs: self._binding.call(self, member, args, kwargs)


def _outcome_of(member: str, answer: Mapping[str, Any], resolve: Callable[[int], Any]) -> Any:
    if "lacks" in answer:
        return Lacks(str(answer["lacks"]))
    if "refused" in answer:
        return RefusalError(str(answer["refused"]), answer.get("place"))
    value = decode(answer["ok"], resolve)
    if member == "select":
        return [tuple(route) for route in value]
    if member == "select_many":
        return [[tuple(route) for route in routes] for routes in value]
    if not isinstance(value, ANSWERS.get(member, object)):
        raise TypeError(f"a {type(value).__name__}")
    return value


def _start_of(text: bytes) -> str:
    start = text[:80].decode("utf-8", "replace").strip()
    return repr(start) + (" …" if len(text) > 80 else "")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
