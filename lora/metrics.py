"""Counters and timings: added to from any thread, read as a snapshot or as Prometheus text.

Requirements: R5.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from lora.errors import LoRAError, StoreError


class Metrics(Collector):
    """Named sums that only grow.

    Thread safety: any number of writers and readers.

    Examples:
        >>> metrics = Metrics()
        >>> metrics.add("fetches")
        >>> metrics.add("fetched_bytes", 4096)
        >>> dict(metrics.snapshot())
        {'fetched_bytes': 4096, 'fetches': 1}
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a sum."""
        with self._lock:
            self._sums[name] += amount  # type: ignore[assignment]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count a block as `name`, ``name_seconds`` and, if it raises, ``name_failed``."""
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self.add(f"{name}_failed")
            raise
        finally:
            self.add(name)
            self.add(f"{name}_seconds", time.perf_counter() - start)

    @contextmanager
    def judged(self, name: str) -> Iterator[None]:
        """Do as `timed`, and count an error of this package as ``refusals_`` with its type."""
        with self.timed(name):
            try:
                yield
            except LoRAError as error:
                self.add(f"refusals_{type(error).__name__}")
                raise

    def snapshot(self) -> Mapping[str, float]:
        """Return all sums at one moment, sorted by name."""
        with self._lock:
            return MappingProxyType(dict(sorted(self._sums.items())))

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the sums as Prometheus counters."""
        for name, value in self.snapshot().items():
            yield CounterMetricFamily(f"lora_{name}", name.replace("_", " "), value=value)


def prometheus_text(metrics: Metrics) -> str:
    """Return the sums as Prometheus text, each as ``lora_…_total``."""
    return generate_latest(metrics).decode()


@contextmanager
def serving(
    metrics: Metrics,
    port: int,
    host: str = "127.0.0.1",
    health: Callable[[], Mapping[str, Any]] = dict,
) -> Iterator[int]:
    """Serve ``/metrics`` and ``/healthz`` over HTTP while the block runs; yield the port.

    Args:
        health: What ``/healthz`` says as JSON; its status is 503 while this raises.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = 404, "text/plain", ""
            try:
                match self.path.partition("?")[0]:
                    case "/metrics":
                        status, body = 200, prometheus_text(metrics)
                        kind = "text/plain; version=0.0.4; charset=utf-8"
                    case "/healthz":
                        status, kind, body = 200, "application/json", json.dumps(dict(health()))
            except Exception:  # noqa: BLE001 - whatever it is, the service is not well
                status = 503
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        problem = error.strerror or str(error)
        raise StoreError(f"metrics: {host}:{port}", "an address that is free", problem) from error
    thread = threading.Thread(target=server.serve_forever, name="lora-metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
