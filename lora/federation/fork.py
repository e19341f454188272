"""A guard against forks: gRPC's threads do not survive one, so that a child would wait for ever.

Requirements: R12.
"""

import ctypes
import os
import weakref

from lora.errors import StateError

_users = weakref.WeakSet[object]()  # what uses gRPC: clients and servers, also the parent's
_processes: set[int] = set()  # that used gRPC: this one, and those that were forked into it


def guard_fork(user: object) -> None:
    """Note what uses gRPC; raise `StateError` in a fork of a process that used it."""
    if was_forked():
        expected = "a process that was not forked from one that uses Arrow Flight"
        hint = "start it by spawn or forkserver, or use Flight in the child alone"
        raise StateError("federation", expected, "its fork", hint)
    _processes.add(os.getpid())
    _users.add(user)


def was_forked() -> bool:
    """Tell whether this process is a fork of one that used gRPC."""
    return not _processes <= {os.getpid()}


def _keep_users() -> None:
    """Let a child never free what uses gRPC: that would wait for threads that it lacks."""
    for user in _users:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(user))
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined] # noqa: SLF001
        alive = finalizer.peek()
        if alive is not None and alive[0] in _users:  # pyarrow's, which shuts a server down
            finalizer.detach()


os.register_at_fork(after_in_child=_keep_users)
