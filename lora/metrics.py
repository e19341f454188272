"""Counters and timings: added to from any thread, read as a snapshot, written as Prometheus text
where something serves.

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


class Metrics:
    """Sums by name, that only grow.

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
        """Count a block as `name`, its seconds as ``name_seconds``, and as ``name_failed`` if it
        raises.
        """
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
        """All sums at one moment, in order of their names."""
        with self._lock:
            return MappingProxyType(dict(sorted(self._sums.items())))


def prometheus_text(metrics: Metrics) -> str:
    """The sums as Prometheus text, each as ``lora_…_total``."""
    return generate_latest(_registry(metrics)).decode()


@contextmanager
def serving(metrics: Metrics, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """Serve the sums over HTTP while the block runs; yields the port."""
    server, thread = start_http_server(port, host, _registry(metrics))
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Sums(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, value in self.metrics.snapshot().items():
            yield CounterMetricFamily(f"lora_{name}", name.replace("_", " "), value=value)


def _registry(metrics: Metrics) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Sums(metrics))
    return registry
