"""The open streams of a server, and a watchdog that cuts off those that stall.

gRPC gives a handler no way out of a write that the client does not take. So the watchdog shuts down
the connection, which it finds among this process's sockets by the client's address.

Requirements: R11.
"""

import ipaddress
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pyarrow import flight

from lora.metrics import Metrics

TICK = 0.2  # seconds between two looks of the watchdog


@dataclass(frozen=True)
class Limits:
    """What clients may cost.

    Args:
        streams: Streams that may be open at once.
        stall: Seconds that a client may take for one message.
        duration: Seconds that a stream may take.
    """

    streams: int = 64
    stall: float = 30.0
    duration: float = 900.0


@dataclass(eq=False)
class Stream:
    """The client of a stream, when it began, and when the client last took a message."""

    peer: str
    start: float
    last: float


class Streams:
    """The open streams of the server at a port, from any thread."""

    def __init__(self, port: int, limits: Limits, metrics: Metrics) -> None:
        self.port, self.limits, self.metrics = port, limits, metrics
        self.open: frozenset[Stream] = frozenset()
        self._lock, self._closing = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, name="lora-streams", daemon=True).start()

    @contextmanager
    def opened(self, peer: str) -> Iterator[Stream]:
        """Register a stream to a client, within the limits."""
        now = time.monotonic()
        stream = Stream(peer, now, now)
        with self._lock:
            if len(self.open) >= self.limits.streams or self._closing.is_set():
                raise flight.FlightUnavailableError("busy")
            self.open |= {stream}
        try:
            yield stream
        finally:
            with self._lock:
                self.open -= {stream}

    def close(self) -> None:
        """Cut all connections, and refuse new streams."""
        self._closing.set()
        shut_down(self.port, None)

    def _watch(self) -> None:
        while not self._closing.wait(TICK):
            now, limits = time.monotonic(), self.limits
            for stream in self.open:
                if now - stream.last > limits.stall or now - stream.start > limits.duration:
                    self.metrics.add("streams_cut", shut_down(self.port, stream.peer))


def shut_down(port: int, peer: str | None) -> int:
    """Shut down the connections from a local port to a client, or to all; count them.

    The client is named as gRPC does it, such as ``ipv6:%5B::1%5D:5000``.

    >>> shut_down(1, "ipv4:192.0.2.1:9")
    0
    """
    peer = peer and re.sub("%[^]]*", "", urllib.parse.unquote(peer))
    count = 0
    with suppress(OSError):  # no file descriptor is left to look with
        for path in filter(Path.is_socket, Path("/dev/fd").iterdir()):
            # A socket that is no TCP connection fails in one of these ways.
            with (
                suppress(OSError, ValueError, LookupError),
                socket.fromfd(int(path.name), socket.AF_INET6, socket.SOCK_STREAM) as connection,
            ):
                host, remote_port = connection.getpeername()[:2]
                address = ipaddress.ip_address(host)
                address = getattr(address, "ipv4_mapped", None) or address
                shown = f"[{address}]" if address.version == 6 else address
                remote = f"ipv{address.version}:{shown}:{remote_port}"
                if connection.getsockname()[1] == port and peer in (None, remote):
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count
