"""Counters and timings: added to from any thread, read as a snapshot or as Prometheus text.

Requirements: R5.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from types import MappingProxyType
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import generate_latest, make_wsgi_app
from prometheus_client.registry import Collector

from lora.errors import StoreError


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
    registry = CollectorRegistry()
    registry.register(metrics)
    metrics_app = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            return metrics_app(environ, start_response)
        status, facts = "200 OK", dict[str, Any]()
        try:
            facts = dict(health())
        except Exception:  # noqa: BLE001 - whatever it is, the service is not well
            status = "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(facts).encode()]

    try:
        server = make_server(host, port, answer, _Server, _Quiet)
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


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Log nothing."""
