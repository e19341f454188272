"""Node: a server, discovery, a cache, and clients of the peers that answer.

Requirements: R5, R12, R13, R14.
"""

import socket
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from lora.card import LoRACard
from lora.checks import version_order
from lora.errors import BaseModelError, LoRAError, RefusedError, StoreError, UnknownCardError, shown
from lora.federation.cache import CardCache
from lora.federation.client import Fetched, LoRAFlightClient, Progress
from lora.federation.credentials import Credentials, check_location, flight_uri, is_loopback
from lora.federation.discovery import Discovery
from lora.federation.fork import guard_fork
from lora.federation.manifest import Manifest
from lora.federation.peer_table import Peer
from lora.federation.server import LoRAFlightServer
from lora.federation.stream_limits import Limits
from lora.federation.trust import Policy, check_base, check_declared, check_signature
from lora.files import PathLike
from lora.metrics import Metrics

ASK_TIMEOUT = 2.0  # seconds, or a fifth of `timeout`, in which a peer must say that it is there


class Offer(NamedTuple):
    """A card that one or more peers offer with the same manifest."""

    manifest: Manifest
    uris: tuple[str, ...]


class Node:
    """A member of a federation, for any number of threads.

    Args:
        root: What it serves, as in `LoRAFlightServer`, or None.
        host, port: Where it serves: ``0.0.0.0`` for all interfaces, port 0 for a free one.
        peers: URIs of peers that multicast does not reach.
        interfaces, interval: As in `Discovery`.
        cache, policy, timeout, min_rate, stall, check: As in `LoRAFlightClient`.
        credentials: As in `LoRAFlightServer` and in `LoRAFlightClient`.
        limits, metrics: As in `LoRAFlightServer`.

    Attributes:
        offers: What peers offered when `sync` last asked them, by name, the best first.
        failures: Why a peer did not tell its offers, by URI.

    Examples:
        >>> with Node(interfaces=()) as node:  # serves nothing, and knows no peer
        ...     node.sync()
        {}
    """

    def __init__(
        self,
        cache: CardCache | PathLike | None = None,
        root: PathLike | Callable[[], Iterable[Path]] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        peers: Sequence[str] = (),
        policy: Policy = Policy(),  # noqa: B008 - a frozen value
        credentials: Credentials = Credentials(),  # noqa: B008 - as above
        interfaces: Sequence[str] | None = None,
        interval: float = 10.0,
        timeout: float = 10.0,
        min_rate: float = 1e5,
        stall: float = 10.0,
        check: Callable[[LoRACard], bool | None] | None = None,
        limits: Limits = Limits(),  # noqa: B008 - as above
        metrics: Metrics | None = None,
    ) -> None:
        for uri in peers:
            check_location(uri, credentials, "peers")
        self.node_id, self.policy, self.metrics = uuid.uuid4().hex, policy, metrics or Metrics()
        self.cache = cache if isinstance(cache, CardCache | None) else CardCache(cache)
        self.offers: Mapping[str, tuple[Offer, ...]] = {}
        self.failures: Mapping[str, LoRAError] = {}
        self._ask_timeout = max(ASK_TIMEOUT, timeout / 5)
        self._connect = partial(
            LoRAFlightClient,
            cache=self.cache,
            policy=policy,
            credentials=credentials,
            timeout=timeout,
            min_rate=min_rate,
            stall=stall,
            check=check,
            metrics=self.metrics,
        )
        self.server: LoRAFlightServer | None = None
        tls = credentials.certificate is not None
        announced: dict[str, Any] = {}
        if root is not None:
            self.server = LoRAFlightServer(
                root,
                flight_uri(host, port, tls=tls),
                credentials=credentials,
                limits=limits,
                node_id=self.node_id,
                metrics=self.metrics,
            )
        try:
            if self.server is not None and (interfaces or not is_loopback(host)):
                addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
                announced = {"port": self.server.port, "addresses": sorted(addresses)}
            self.discovery = Discovery(
                self.node_id,
                self._ask,
                interfaces=interfaces,
                interval=interval,
                tls=tls,
                static=peers,
                **announced,
            )
        except BaseException:
            self._stop_serving()
            raise

    def peers(self) -> tuple[Peer, ...]:
        """Return the peers that answer now."""
        return self.discovery.peers()

    def sync(self) -> Mapping[str, tuple[Offer, ...]]:
        """Ask every peer what it offers; return the offers by name, the best first."""
        guard_fork(self)

        failures = dict[str, LoRAError]()

        def listed(uri: str) -> list[Manifest]:
            try:
                with self._connect(uri) as client:
                    return client.list_remote_skills()
            except LoRAError as error:
                self.metrics.add("listings_failed")
                failures[uri] = error
                return []

        uris = [peer.uri for peer in self.peers()]
        with ThreadPoolExecutor(8) as pool:
            listings = dict(zip(uris, pool.map(listed, uris), strict=True))
        self.offers, self.failures = ranked(listings, self.policy), failures
        return self.offers

    def fetch(
        self, name: str, *, digest: str | None = None, progress: Progress | None = None
    ) -> Fetched:
        """Fetch a card in `offers` from the first peer that works.

        Args:
            digest: Accept this digest, and no other.

        Raises:
            UnknownCardError: Nobody offers it.
            LoRAError: Every peer failed. The last peer's error has those of the others as notes.
        """
        policy = self.policy if digest is None else self.policy.pinned(digest)
        failures: list[LoRAError] = []
        for offer in self.offers.get(name, ()):
            for uri in offer.uris if digest in (None, offer.manifest.digest) else ():
                try:
                    with self._connect(uri) as client:
                        return client.fetch(offer.manifest, policy, progress)
                except StoreError:  # of this machine's disk: another peer would not help
                    raise
                except LoRAError as error:
                    self.metrics.add(f"refusals_{type(error).__name__}")
                    failures.append(error)
        if not failures:
            expected = f"one of {len(self.offers)} that peers offer"
            raise UnknownCardError(f"card {shown(name, 80)}", expected, "none")
        for failure in failures[:-1]:
            failures[-1].add_note(str(failure))
        raise failures[-1]

    def close(self) -> None:
        """Stop serving and say goodbye."""
        try:
            self._stop_serving()
        finally:
            self.discovery.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, uri: str) -> str:
        with self._connect(uri, timeout=self._ask_timeout) as client:
            node_id = client.health().get("node_id")
        return node_id if isinstance(node_id, str) else ""

    def _stop_serving(self) -> None:
        if self.server is not None:
            self.server.shutdown()


def ranked(
    listings: Mapping[str, Iterable[Manifest]], policy: Policy
) -> dict[str, tuple[Offer, ...]]:
    """Group what peers list by name: acceptable cards first, then the highest versions.

    Peers with the same manifest share an offer, whatever their order.

    Examples:
        >>> manifest = Manifest("docs", "0" * 64, 4096)
        >>> ranked({"grpc://b:1": [manifest], "grpc://a:1": [manifest]}, Policy())["docs"][0].uris
        ('grpc://a:1', 'grpc://b:1')
    """
    uris: dict[Manifest, set[str]] = {}
    for uri, manifests in listings.items():
        for manifest in manifests:
            uris.setdefault(manifest, set()).add(uri)

    def merit(manifest: Manifest) -> tuple[Any, ...]:
        return acceptable(manifest, policy), version_order(manifest.version), manifest.to_json()

    offers: dict[str, tuple[Offer, ...]] = {}
    for manifest in sorted(uris, key=merit, reverse=True):
        offer = Offer(manifest, tuple(sorted(uris[manifest])))
        offers[manifest.name] = (*offers.get(manifest.name, ()), offer)
    return offers


def acceptable(manifest: Manifest, policy: Policy) -> bool:
    """Tell whether a policy would accept a card, as far as its manifest shows."""
    try:
        check_declared(manifest, policy)
        check_signature(manifest, policy)
        if manifest.base_model is not None and manifest.base_fingerprint is None:
            check_base(manifest, policy)
    except (RefusedError, BaseModelError):
        return False
    return True


def uri_of(address: str) -> str:
    """Return the URI of a peer that may be given as ``host:port``.

    >>> uri_of("192.0.2.7:5000"), uri_of("grpc+tls://cards.example:443")
    ('grpc://192.0.2.7:5000', 'grpc+tls://cards.example:443')
    """
    return address if "://" in address else f"grpc://{address}"
