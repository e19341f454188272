"""The streams that a server has open, how many there may be, and a watchdog that cuts off those
that stall.

gRPC gives a handler no way out of a write that the client does not take: what can be ended is its
connection. The watchdog finds that among this process's own sockets, by the address at its other
end, and shuts it down.

Requirements: R11.
"""

import ipaddress
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora.errors import StateError
from lora.metrics import Metrics

TICK = 0.2
"""Seconds between two looks of the watchdog."""


@dataclass(frozen=True)
class Limits:
    """What clients may cost.

    Args:
        streams: Open at once; one more is refused.
        stall: Seconds that a client may take for one message.
        duration: Seconds that a stream may take.
    """

    streams: int = 64
    stall: float = 30.0
    duration: float = 900.0


class Stream:
    """One stream: where it goes, since when, and when it last went on. Written by its own thread
    alone.
    """

    def __init__(self, peer: str) -> None:
        self.peer, self.start = peer, time.monotonic()
        self.last = self.start

    def went_on(self) -> None:
        """Say that the client has taken a message."""
        self.last = time.monotonic()


class Streams:
    """The open streams of the server at a port.

    Thread safety: any.
    """

    def __init__(self, port: int, limits: Limits, metrics: Metrics) -> None:
        self.port, self.limits, self.metrics = port, limits, metrics
        self._open: frozenset[Stream] = frozenset()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="lora-streams", daemon=True).start()

    @contextmanager
    def opened(self, peer: str) -> Iterator[Stream]:
        """A place for a stream to a peer.

        Raises:
            StateError: If there is none left, or the server is closing.
        """
        stream = Stream(peer)
        with self._lock:
            if len(self._open) >= self.limits.streams or self._closing.is_set():
                raise StateError("server", f"at most {self.limits.streams} streams", "one more")
            self._open |= {stream}
        try:
            yield stream
        finally:
            with self._lock:
                self._open -= {stream}

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Cut every connection to the port and open no stream any more."""
        self._closing.set()
        with suppress(OSError):  # no descriptor is left to look with
            shut_down(self.port, None)

    def _watch(self) -> None:
        while not self._closing.wait(TICK):
            now = time.monotonic()
            for stream in self._open:
                if (
                    now - stream.last > self.limits.stall
                    or now - stream.start > self.limits.duration
                ):
                    with suppress(OSError):  # as above; it is tried again at the next tick
                        self.metrics.add("streams_cut", shut_down(self.port, stream.peer))


def shut_down(port: int, peer: str | None) -> int:
    """Shut down this process's connections between a local port and a peer, named as gRPC does, or
    all of them.

    Returns how many there were.

    >>> shut_down(1, "ipv4:192.0.2.1:9")
    0
    """
    wanted = None if peer is None else _address(peer)
    if peer is not None and wanted is None:
        return 0
    count = 0
    for handle in Path("/dev/fd").iterdir():
        with suppress(OSError, ValueError, TypeError), _socket(int(handle.name)) as connection:
            host, from_port = connection.getpeername()[:2]
            if (wanted is None or (_plain(host), from_port) == wanted) and connection.getsockname()[
                1
            ] == port:
                connection.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def _socket(handle: int) -> socket.socket:
    """A second handle on a socket of this process."""
    mine = os.dup(handle)
    try:
        return socket.socket(fileno=mine)
    except OSError:
        os.close(mine)
        raise


def _address(peer: str) -> tuple[str, int] | None:
    """The host and port in what gRPC calls a peer: ``ipv4:127.0.0.1:5000`` or
    ``ipv6:%5B::1%5D:5000``.
    """
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    return (
        (_plain(host.strip("[]")), int(port))
        if kind in ("ipv4", "ipv6") and port.isdecimal()
        else None
    )


def _plain(host: str) -> str:
    """An address in its plainest form: IPv4 where IPv6 only wraps it."""
    address = ipaddress.ip_address(host)
    return str(getattr(address, "ipv4_mapped", None) or address)
