"""The table of peers: which were announced, which have answered, and which to ask next.

Anyone can announce a peer or say goodbye for it, so these are only hints. A peer is listed once it
has answered. While it answers, no hint moves or removes it. Times are in seconds.

Requirements: R13.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

PAUSE = 1.0  # seconds between two questions to a peer, whatever is announced
MISSES = 2  # unanswered questions in a row after which a peer is no longer listed


@dataclass(frozen=True)
class Peer:
    """A peer that was announced, or named by the user (static).

    Args:
        key: Its instance name, or the URI of a static peer.
        uri, node_id: Where it answered last, and what it called itself.
        misses: Questions in a row that it did not answer.
        asked, due: When it was asked last, and when to ask it next.
    """

    key: str
    uri: str = ""
    node_id: str = ""
    misses: int = 0
    asked: float = float("-inf")
    due: float = 0.0
    static: bool = False


@dataclass(frozen=True)
class PeerBook:
    """The peers of one node, by key, the oldest first; each event returns a new table.

    Args:
        own: The node's own id and instance name.
        cap: Largest number of peers, static ones not counted.
        interval: Seconds until a peer is asked again.

    Examples:
        >>> book = PeerBook("me").announced("you", now=0.0)
        >>> book.due(now=0.0), book.live()
        (('you',), ())
        >>> book = book.asked("you", "grpc://192.0.2.7:5000", "you", now=0.1)
        >>> [peer.uri for peer in book.live()]
        ['grpc://192.0.2.7:5000']
    """

    own: str
    cap: int = 256
    interval: float = 10.0
    peers: Mapping[str, Peer] = field(default_factory=dict)

    def announced(self, key: str, *, goodbye: bool = False, now: float) -> "PeerBook":
        """Note an announcement, or a goodbye, which adds nobody: ask a known peer soon.

        In a full table a new peer replaces one that has never answered.
        """
        peer = self.peers.get(key)
        if peer is not None:
            return self._with(replace(peer, due=min(peer.due, max(now, peer.asked + PAUSE))))
        others = [peer for peer in self.peers.values() if not peer.static]
        unproven = [peer.key for peer in others if not peer.uri]
        if goodbye or key == self.own or (len(others) >= self.cap and not unproven):
            return self
        book = self._without(unproven[0]) if len(others) >= self.cap else self
        return book._with(Peer(key, due=now))  # noqa: SLF001 - another value of this class

    def asked(self, key: str, uri: str = "", node_id: str = "", *, now: float) -> "PeerBook":
        """Note that a peer was asked, and where it answered; "" for no answer.

        It is no longer listed after `MISSES`, or if it is this node itself.
        """
        peer = self.peers.get(key)
        if peer is None:
            return self
        misses = 0 if uri else peer.misses + 1
        if not uri:
            uri, node_id = peer.uri, peer.node_id
        if misses < MISSES and node_id != self.own:
            due = now + (PAUSE if misses else self.interval)
        elif peer.static:  # not listed, but asked again
            uri, due = "", now + self.interval
        else:
            return self._without(key)
        return self._with(
            replace(peer, uri=uri, node_id=node_id, misses=misses, asked=now, due=due)
        )

    def due(self, *, now: float) -> tuple[str, ...]:
        """Return the keys of the peers to ask now."""
        return tuple(peer.key for peer in self.peers.values() if peer.due <= now)

    def live(self) -> tuple[Peer, ...]:
        """Return the peers that answer, each address once; a node id proves nothing."""
        by_uri = {peer.uri: peer for peer in self.peers.values() if peer.uri}
        return tuple(by_uri.values())

    def _with(self, peer: Peer) -> "PeerBook":
        return replace(self, peers={**self.peers, peer.key: peer})

    def _without(self, key: str) -> "PeerBook":
        return replace(self, peers={k: peer for k, peer in self.peers.items() if k != key})
