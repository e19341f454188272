"""Counters and timings: added to from any thread, read as a snapshot or as Prometheus text.

Requirements: R5.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import generate_latest, start_http_server
from prometheus_client.registry import Collector


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
def serving(metrics: Metrics, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """Serve the sums over HTTP while the block runs; yield the port."""
    registry = CollectorRegistry()
    registry.register(metrics)
    server, thread = start_http_server(port, host, registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
