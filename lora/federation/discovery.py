"""Discovery: announces a node by zeroconf, browses for others, and asks each whether it is there.

mDNS trusts everyone on the link: it gives hints of whom to ask, and never proof of who answers.

Requirements: R13.
"""

import ipaddress
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any, Self

import ifaddr
import zeroconf

from lora.arrow_format import FORMAT_VERSION
from lora.errors import ArgumentError, LoRAError, PeerError, StoreError
from lora.federation.credentials import flight_uri, is_loopback
from lora.federation.fork import was_forked
from lora.federation.peer_table import Peer, PeerBook

log = logging.getLogger(__name__)

SERVICE = "_lora-card._tcp.local."

TICK = 0.1  # seconds between two looks for peers to ask
ASKERS = 8  # peers that are asked at the same time, and addresses of one peer
ADDRESSES = 64  # addresses of an announcement that are tried: about what a packet holds
RESOLVE_MS = 1000  # milliseconds that resolving an announcement may take


class Discovery:
    """Finds the peers of a node, from its construction until `close`, for any number of threads.

    Args:
        node_id: This node's id: up to 63 letters, digits and hyphens.
        ask: Returns the node id, or "", of whoever answers at a URI; else raises a `LoRAError`.
        port: Where this node serves; None to browse only.
        addresses: Where this node serves; a wildcard, or none, means all `interfaces`.
        interfaces: Addresses of network interfaces; None for all, ``()`` for none.
        tls: What it announces: whether it serves ``grpc+tls://``.
        static: URIs of peers that multicast does not reach.
        cap: Largest number of peers, static ones not counted.
        interval: Seconds until a peer is asked again.

    Examples:
        >>> with Discovery("me", ask=lambda uri: "", interfaces=()) as discovery:
        ...     discovery.peers()
        ()
    """

    def __init__(
        self,
        node_id: str,
        ask: Callable[[str], str],
        *,
        port: int | None = None,
        addresses: Sequence[str] = (),
        interfaces: Sequence[str] | None = None,
        tls: bool = False,
        static: Sequence[str] = (),
        cap: int = 256,
        interval: float = 10.0,
    ) -> None:
        if not re.fullmatch("[A-Za-z0-9-]{1,63}", node_id):
            expected = "1 to 63 letters, digits and hyphens"
            raise ArgumentError("discovery: node_id", expected, repr(node_id))
        self._ask, self._lock, self._closing = ask, threading.Lock(), threading.Event()
        self._asked: set[str] = set()
        self._errors: dict[str, LoRAError] = {}
        peers = {uri: Peer(uri, static=True) for uri in static}
        self._book = PeerBook(node_id, cap, interval, peers)
        # A loopback address in an announcement means another machine, unless all is loopback here.
        self._local = bool(interfaces) and all(map(is_loopback, interfaces or ()))
        self._zeroconf: zeroconf.Zeroconf | None = None
        if interfaces != ():
            choice = zeroconf.InterfaceChoice.All if interfaces is None else list(interfaces)
            try:  # on a thread without an event loop: it would take a running one, and wait for it
                with ThreadPoolExecutor(1) as pool:
                    self._zeroconf = pool.submit(zeroconf.Zeroconf, choice).result()
            except (OSError, RuntimeError) as error:
                expected = "interfaces that can be listened on"
                raise StoreError("discovery", expected, error) from error
            if port is not None:
                version = ".".join(map(str, FORMAT_VERSION))
                record = zeroconf.ServiceInfo(
                    SERVICE,
                    f"{node_id}.{SERVICE}",
                    port=port,
                    properties={"id": node_id, "format": version, "tls": str(int(tls))},
                    server=f"{node_id}.local.",
                    parsed_addresses=reachable(addresses, interfaces or ()),
                )
                # Node ids are unique, so there is no need to probe for conflicts.
                self._zeroconf.register_service(record, cooperating_responders=True)
            self._browser = zeroconf.ServiceBrowser(
                self._zeroconf, SERVICE, handlers=[self._on_announcement]
            )
        self._asking = threading.Thread(
            target=self._ask_due_peers, name="lora-discovery", daemon=True
        )
        self._asking.start()

    def peers(self) -> tuple[Peer, ...]:
        """Return the peers that answer now."""
        return self._book.live()

    def errors(self) -> dict[str, LoRAError]:
        """Return why peers did not answer when they were asked last, by URI or instance name."""
        with self._lock:
            return dict(self._errors)

    def wait(self, seconds: float, enough: int | None = None) -> None:
        """Wait for so many seconds, or until enough peers answer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (enough is None or len(self.peers()) < enough):
            self._closing.wait(TICK / 2)

    def close(self) -> None:
        """Say goodbye and stop."""
        if was_forked():  # its threads are the parent's
            return
        self._closing.set()
        if self._zeroconf is not None:
            self._zeroconf.close()
        self._asking.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_announcement(
        self, *, name: str, state_change: zeroconf.ServiceStateChange, **_: Any
    ) -> None:
        goodbye = state_change is zeroconf.ServiceStateChange.Removed
        key, now = name.removesuffix(f".{SERVICE}"), time.monotonic()
        with self._lock:
            self._book = self._book.announced(key, goodbye=goodbye, now=now)

    def _ask_due_peers(self) -> None:
        with ThreadPoolExecutor(ASKERS, "lora-asking") as pool:
            while not self._closing.wait(TICK):
                for key in self._book.due(now=time.monotonic()):
                    if key not in self._asked and len(self._asked) < ASKERS:
                        self._asked.add(key)
                        pool.submit(self._ask_peer, key)

    def _ask_peer(self, key: str) -> None:
        answer: tuple[str, ...] = ()
        error = None
        peer = self._book.peers.get(key, Peer(key))
        try:
            with suppress(LoRAError):
                answer = self._first_answer([peer.uri] if peer.uri else [])
            if not answer:
                answer = self._first_answer([key] if peer.static else self._resolve(key))
        except LoRAError as problem:
            error = problem
        except Exception:  # a peer must not end the thread
            log.exception("peer %r", key)
        with self._lock:
            self._errors.pop(key, None)
            if error is not None:
                self._errors[key] = error
            if len(self._errors) > self._book.cap:
                del self._errors[next(iter(self._errors))]  # the oldest
            self._book = self._book.asked(key, *answer, now=time.monotonic())
        self._asked.discard(key)

    def _first_answer(self, uris: Sequence[str]) -> tuple[str, ...]:
        """Ask at these addresses at once; return the first that answers, and its node id."""
        error: LoRAError = PeerError("peer", "an address that can be reached from here", "none")
        pool = ThreadPoolExecutor(ASKERS, "lora-asking")
        try:
            asking = {pool.submit(self._ask, uri): uri for uri in uris}
            for future in as_completed(asking):
                try:
                    return asking[future], future.result()
                except LoRAError as problem:
                    error = problem
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        raise error

    def _resolve(self, key: str) -> list[str]:
        info = None
        with suppress(zeroconf.Error, OSError, ValueError):
            if self._zeroconf is not None:
                info = self._zeroconf.get_service_info(SERVICE, f"{key}.{SERVICE}", RESOLVE_MS)
        if info is None or not info.port or self._closing.is_set():
            raise PeerError(f"peer {key!r}", "an announcement with its addresses", "none")
        properties, (major, _) = info.decoded_properties, FORMAT_VERSION
        version = str(properties.get("format"))
        if version.partition(".")[0] != str(major):
            raise PeerError(f"peer {key!r}", f"format {major} of cards", version)
        addresses = info.parsed_scoped_addresses()
        usable = [address for address in addresses if self._local or not is_loopback(address)]
        tls = properties.get("tls") == "1"
        return [flight_uri(address, info.port, tls=tls) for address in usable[:ADDRESSES]]


def reachable(addresses: Sequence[str], interfaces: Sequence[str] = ()) -> list[str]:
    """Return the addresses to announce; a wildcard, or none, stands for the interfaces."""
    for candidates in (addresses, interfaces):
        plain = [ipaddress.ip_address(address.partition("%")[0]) for address in candidates]
        if plain and not any(address.is_unspecified for address in plain):
            return [str(address) for address in plain]
    ips = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    own = [ip if isinstance(ip, str) else ip[0] for ip in ips]
    return [ip for ip in own if not is_loopback(ip)] or own
