"""Node: a server, discovery, a cache, and clients of the peers that are there, joined.

Thread safety: any number of threads. The state is one mapping of what is offered, replaced by
`sync`.

Requirements: R5, R12, R13, R14.
"""

import contextlib
import ipaddress
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Self

from lora.card import LoRACard
from lora.errors import (
    ArgumentError,
    LoRAError,
    PeerError,
    RefusedError,
    StoreError,
    UnknownCardError,
    shown,
)
from lora.federation.access import Credentials, check_location, flight_uri, is_loopback
from lora.federation.cache import CardCache
from lora.federation.client import Fetched, LoRAFlightClient, Progress
from lora.federation.discovery import Discovery
from lora.federation.manifest import Manifest, Precedence
from lora.federation.peers import Peer
from lora.federation.server import LoRAFlightServer
from lora.federation.streams import Limits
from lora.federation.trust import Policy, check_declared, check_signature
from lora.metrics import Metrics
from lora.store import PathLike

ASK_TIMEOUT = 2.0
"""Seconds in which a peer must say that it is there."""


@dataclass(frozen=True)
class Offer:
    """A card that peers announce alike, and where each of them is."""

    manifest: Manifest
    uris: tuple[str, ...]


class Node:
    """A member of a federation.

    Args:
        cache: The folder of the cards that it fetches.
        root: The folder of the cards that it serves; None to serve none.
        host, port: Where it serves: ``0.0.0.0`` for all interfaces, port 0 for a free one.
        peers: URIs of peers that multicast does not reach, or a load balancer's.
        policy: What to accept from peers.
        credentials: Of its server and its clients.
        interfaces: Addresses to announce itself and browse on; None for all, ``()`` for neither.
        interval: As `Discovery`'s.
        timeout, min_rate, check: As `LoRAFlightClient`'s.
        limits: As `LoRAFlightServer`'s.
    """

    def __init__(
        self,
        cache: CardCache | PathLike,
        root: PathLike | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        peers: Sequence[str] = (),
        policy: Policy = Policy(),  # noqa: B008 - a frozen value
        credentials: Credentials = Credentials(),  # noqa: B008 - as above
        interfaces: Sequence[str] | None = None,
        interval: float = 10.0,
        timeout: float = 10.0,
        min_rate: float = 1e6,
        check: Callable[[LoRACard], None] | None = None,
        limits: Limits = Limits(),  # noqa: B008 - as above
        metrics: Metrics | None = None,
    ) -> None:
        for uri in peers:
            check_location(uri, credentials)
        self.node_id, self.policy, self.metrics = uuid.uuid4().hex, policy, metrics or Metrics()
        self.cache = cache if isinstance(cache, CardCache) else CardCache(cache)
        self._offers: Mapping[str, tuple[Offer, ...]] = MappingProxyType({})

        self._clients: dict[str, LoRAFlightClient] = {}
        self._connecting = threading.Lock()
        self._connect = partial(
            LoRAFlightClient,
            cache=self.cache,
            policy=policy,
            credentials=credentials,
            min_rate=min_rate,
            check=check,
            metrics=self.metrics,
        )
        self._timeout = timeout
        with contextlib.ExitStack() as opened:
            self.server: LoRAFlightServer | None = None
            tls = credentials.certificate is not None
            if root is not None:
                self.server = opened.enter_context(
                    LoRAFlightServer(
                        root,
                        flight_uri(host, port, tls=tls),
                        credentials=credentials,
                        limits=limits,
                        node_id=self.node_id,
                        metrics=self.metrics,
                    )
                )
            self.discovery = opened.enter_context(
                Discovery(
                    self.node_id,
                    self._ask,
                    port=self.server.port
                    if self.server and (interfaces or not is_loopback(host))
                    else None,
                    addresses=_addresses(host, interfaces),
                    interfaces=interfaces,
                    interval=interval,
                    tls=tls,
                    static=peers,
                )
            )
            self._opened = opened.pop_all()

    def peers(self) -> tuple[Peer, ...]:
        """The peers that answer now."""
        return self.discovery.peers()

    def sync(self) -> Mapping[str, tuple[Offer, ...]]:
        """Ask every peer what it offers; by name, the best offer first (see `ranked`)."""
        uris = [peer.uri for peer in self.peers()]
        with self._connecting:
            for gone in self._clients.keys() - set(uris):
                self._clients.pop(gone).close()
        with ThreadPoolExecutor(max(1, min(8, len(uris)))) as pool:
            listings = dict(zip(uris, pool.map(self._listed, uris), strict=True))
        self._offers = MappingProxyType(ranked(listings, self.policy))
        return self._offers

    @property
    def offers(self) -> Mapping[str, tuple[Offer, ...]]:
        """What `sync` found last."""
        return self._offers

    def fetch(
        self, name: str, *, digest: str | None = None, progress: Progress | None = None
    ) -> Fetched:
        """A card by name, from the first offer that passes: a peer that dies, stalls, lies or
        truncates is left.

        Args:
            name: A name that `sync` found.
            digest: Accept this digest, and no other.
            progress: As `LoRAFlightClient.fetch_skill`'s.

        Raises:
            UnknownCardError: If nobody offers it.
            PeerError, RefusedError, CardFileError, BaseModelError, ShapeError, TargetError: Of the
                last offer, with what became of the others as notes.
            StoreError: If this side's disk refuses.
        """
        policy = self.policy if digest is None else self.policy.pinned(digest)
        offers = [
            offer for offer in self._offers.get(name, ()) if digest in (None, offer.manifest.digest)
        ]
        failures: list[LoRAError] = []
        for offer in offers:
            for uri in offer.uris:
                try:
                    return self._client(uri).fetch(offer.manifest, policy, progress)
                except StoreError:  # of this side's disk: another peer would not help
                    raise
                except LoRAError as error:
                    self.metrics.add(f"refusals_{type(error).__name__}")
                    failures.append(error)
        if not failures:
            raise UnknownCardError(
                f"card {shown(name, 80)}", f"one of {len(self._offers)} that peers offer", "none"
            )
        for other in failures[:-1]:
            failures[-1].add_note(str(other))
        raise failures[-1]

    def close(self) -> None:
        """Leave: say goodbye, stop serving, close every connection."""
        if self.server is not None:
            self.server.shutdown()  # first: discovery may wait for peers that are asked just now
        self._opened.close()
        with self._connecting:
            for client in self._clients.values():
                client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _client(self, uri: str) -> LoRAFlightClient:
        """The connection to a peer: one for each, made when it is needed."""
        with self._connecting:
            if uri not in self._clients:
                self._clients[uri] = self._connect(uri, timeout=self._timeout)
            return self._clients[uri]

    def _ask(self, uri: str) -> str:
        """The node id of whoever answers at a URI."""
        with self._connect(uri, timeout=ASK_TIMEOUT) as client:
            found = client.health().get("node_id")
        return found if isinstance(found, str) else ""

    def _listed(self, uri: str) -> list[Manifest]:
        try:
            return self._client(uri).list_remote_skills()
        except PeerError:
            self.metrics.add("listings_failed")
            return []


def ranked(
    listings: Mapping[str, Iterable[Manifest]], policy: Policy
) -> dict[str, tuple[Offer, ...]]:
    """What peers offer, by name: what the policy vouches for first, then the highest version, then
    by digest.

    Peers that announce the same are alternatives of one offer. The order that the peers are given
    in changes nothing.

    Examples:
        >>> manifest = Manifest("docs", "0" * 64, 4096)
        >>> ranked({"grpc://b:1": [manifest], "grpc://a:1": [manifest]}, Policy())["docs"][0].uris
        ('grpc://a:1', 'grpc://b:1')
    """
    where: dict[Manifest, set[str]] = {}
    for uri, manifests in listings.items():
        for manifest in manifests:
            where.setdefault(manifest, set()).add(uri)
    best = sorted(where, key=lambda m: (m.digest, m.to_json()))
    best.sort(key=lambda manifest: Precedence(manifest.version), reverse=True)
    best.sort(key=lambda manifest: not _vouched(manifest, policy))
    names: dict[str, tuple[Offer, ...]] = {}
    for manifest in best:
        names[manifest.name] = (
            *names.get(manifest.name, ()),
            Offer(manifest, tuple(sorted(where[manifest]))),
        )
    return names


def acceptable(manifest: Manifest, policy: Policy) -> bool:
    """Whether a policy would have a card fetched, by all that its manifest shows."""
    try:
        check_declared(manifest, policy)
    except RefusedError:
        return False
    return _vouched(manifest, policy)


def _vouched(manifest: Manifest, policy: Policy) -> bool:
    try:
        check_signature(manifest, policy)
    except RefusedError:
        return False
    return True


def _addresses(host: str, interfaces: Sequence[str] | None) -> list[str]:
    """Where a server on a host is to be found: on the chosen interfaces, if it is on all."""
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
    except OSError as error:
        raise ArgumentError("host", "an address or a name of this machine", shown(host)) from error
    wild = any(ipaddress.ip_address(address.partition("%")[0]).is_unspecified for address in found)
    return list(interfaces) if wild and interfaces else found


def uri_of(address: str) -> str:
    """The URI of a peer that may be given as ``host:port``.

    >>> uri_of("192.0.2.7:5000"), uri_of("grpc+tls://cards.example:443")
    ('grpc://192.0.2.7:5000', 'grpc+tls://cards.example:443')
    """
    return address if "://" in address else f"grpc://{address}"
