"""Discovery: announces a node by zeroconf, browses for others, and asks each whether it is there.

mDNS trusts everyone on the link, so what it says is a hint of whom to ask
(`lora.federation.peers`), and never proof of who answers. Thread safety: any number of readers; the
state is one `PeerBook`, replaced under a lock.

Requirements: R13.
"""

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self

import ifaddr
import zeroconf

from lora.errors import ArgumentError, LoRAError, StoreError
from lora.federation.access import flight_uri, is_loopback
from lora.federation.peers import Peer, PeerBook
from lora.table import FORMAT_VERSION

log = logging.getLogger(__name__)

SERVICE = "_lora-card._tcp.local."
_MAJOR = str(FORMAT_VERSION[0]).encode()  # of the format that an announcement must name

TICK = 0.1
"""Seconds between two looks for whom to ask."""

ASKERS = 8
"""Peers that are asked at once."""

ADDRESSES = 2
"""Of an announcement, that are tried at a time."""

RESOLVE_MS = 1000
"""Milliseconds that resolving an announcement may take."""


class Discovery:
    """The peers of a node, from the moment it is made until `close`.

    Args:
        node_id: Of this node: up to 63 letters, digits and hyphens. It is not listed.
        ask: Asks a URI for its node id, "" where that is not told; raises a `LoRAError` if nothing
            answers there.
        port: Where this node serves; None to browse only.
        addresses: Where this node serves; the interfaces' own by default. ``0.0.0.0`` stands for
            those and is never announced.
        interfaces: Addresses of the interfaces to speak on; all by default; ``()`` for none: static
            peers alone.
        tls: Whether this node serves with TLS.
        static: URIs of peers that multicast does not reach.
        cap: Peers at most, static ones not counted.
        interval: Seconds until a peer is asked again whether it is there: one that dies in silence
            is gone after two of them.
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
        if not 0 < len(node_id) <= 63 or not all(
            c.isascii() and (c.isalnum() or c == "-") for c in node_id
        ):
            raise ArgumentError(
                "discovery: node_id", "1 to 63 letters, digits and hyphens", repr(node_id)
            )
        self._ask, self._lock, self._closing = ask, threading.Lock(), threading.Event()
        book = PeerBook(node_id, cap, interval)
        for uri in static:
            book = book.with_static(uri)
        self._book = book
        self._local = bool(interfaces) and all(
            map(is_loopback, interfaces or ())
        )  # else loopback is never meant
        self._zeroconf = None if interfaces == () else _zeroconf(interfaces)
        if self._zeroconf is not None:
            if port is not None:
                told = _announcement(node_id, port, addresses or interfaces or (), tls=tls)
                self._zeroconf.register_service(
                    told, cooperating_responders=True
                )  # node ids are unique: no probing
            self._browser = zeroconf.ServiceBrowser(self._zeroconf, SERVICE, handlers=[self._heard])
        self._asking = threading.Thread(target=self._run, name="lora-discovery", daemon=True)
        self._asking.start()

    def peers(self) -> tuple[Peer, ...]:
        """Who answers now."""
        return self._book.live()

    def wait(self, seconds: float, enough: int | None = None) -> None:
        """Wait for peers to answer: for so many seconds, or until there are enough."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (enough is None or len(self.peers()) < enough):
            self._closing.wait(TICK / 2)

    def close(self) -> None:
        """Say goodbye and stop."""
        self._closing.set()
        if self._zeroconf is not None:
            self._zeroconf.close()
        self._asking.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heard(self, *, name: str, state_change: zeroconf.ServiceStateChange, **_: Any) -> None:
        """What zeroconf tells: written down, to be looked into by another thread."""
        key, now = name.removesuffix(f".{SERVICE}"), time.monotonic()
        if state_change is zeroconf.ServiceStateChange.Removed:
            self._change(lambda book: book.goodbye(key, now=now))
        else:
            self._change(lambda book: book.announced(key, now=now))

    def _change(self, event: Callable[[PeerBook], PeerBook]) -> None:
        with self._lock:
            self._book = event(self._book)

    def _run(self) -> None:
        with ThreadPoolExecutor(ASKERS, "lora-asking") as pool:
            asking: set[str] = set()
            while not self._closing.wait(TICK):
                for key in self._book.due(now=time.monotonic()):
                    if key not in asking and len(asking) < ASKERS:
                        asking.add(key)
                        pool.submit(self._look, key).add_done_callback(partial(_done, asking, key))

    def _look(self, key: str) -> None:
        """Ask a peer where it answered last, and if it does not, where it says that it is."""
        peer = self._book.peers.get(key)
        try:
            for uri in [peer.uri] if peer and peer.uri else []:
                if self._answers(key, uri):
                    return
            for uri in [key] if peer and peer.static else self._resolved(key):
                if self._closing.is_set() or self._answers(key, uri):
                    return
            self._change(lambda book: book.missed(key, now=time.monotonic()))
        except Exception:  # a peer must not end the thread
            log.exception("peer %r", key)
            self._change(lambda book: book.missed(key, now=time.monotonic()))

    def _answers(self, key: str, uri: str) -> bool:
        try:
            node_id = self._ask(uri)
        except LoRAError:
            return False
        self._change(lambda book: book.answered(key, uri, node_id, now=time.monotonic()))
        return True

    def _resolved(self, key: str) -> list[str]:
        """The addresses that are announced for a peer, of any format version that this one can
        read.
        """
        if self._zeroconf is None or self._closing.is_set():
            return []
        try:
            info = self._zeroconf.get_service_info(SERVICE, f"{key}.{SERVICE}", RESOLVE_MS)
        except (zeroconf.Error, OSError, ValueError):
            return []
        if (
            info is None
            or not info.port
            or (info.properties.get(b"format") or b"").split(b".")[0] != _MAJOR
        ):
            return []
        tls = info.properties.get(b"tls") == b"1"
        return [
            flight_uri(address, info.port, tls=tls)
            for address in info.parsed_scoped_addresses()
            if self._local or not is_loopback(address)
        ][:ADDRESSES]


def _done(asking: set[str], key: str, _: Any) -> None:
    asking.discard(key)


def _zeroconf(interfaces: Sequence[str] | None) -> zeroconf.Zeroconf:
    try:
        if interfaces is None:
            return zeroconf.Zeroconf()
        version = (
            zeroconf.IPVersion.V6Only
            if all(":" in address for address in interfaces)
            else zeroconf.IPVersion.All
        )
        if all(":" not in address for address in interfaces):
            version = zeroconf.IPVersion.V4Only
        return zeroconf.Zeroconf(interfaces=list(interfaces), ip_version=version)
    except (OSError, RuntimeError) as error:
        raise StoreError("discovery", "interfaces that can be listened on", error) from error


def _announcement(
    node_id: str, port: int, addresses: Sequence[str], *, tls: bool
) -> zeroconf.ServiceInfo:
    return zeroconf.ServiceInfo(
        SERVICE,
        f"{node_id}.{SERVICE}",
        port=port,
        properties={
            "id": node_id,
            "format": ".".join(map(str, FORMAT_VERSION)),
            "tls": str(int(tls)),
        },
        server=f"{node_id}.local.",
        parsed_addresses=reachable(addresses),
    )


def reachable(addresses: Sequence[str]) -> list[str]:
    """The addresses to announce: those given, with a wildcard replaced by what the interfaces have."""
    given = [ipaddress.ip_address(address.partition("%")[0]) for address in addresses]
    if given and not any(address.is_unspecified for address in given):
        return [str(address) for address in given]
    own = [
        ip.ip if isinstance(ip.ip, str) else ip.ip[0]
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
    ]
    wide = [ip for ip in own if not ipaddress.ip_address(ip).is_loopback]
    return wide or own
