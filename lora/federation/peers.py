"""Who might be a peer, who has proved to be one, and whom to ask next: a value, and what each event
makes of it.

Announcements, goodbyes and new addresses are hints from anyone on the network. A peer is listed
once it has answered at an address; while it answers there, nothing that is announced moves or
removes it. The book never outgrows its cap, and what is unproven makes room for what is newer.
Times are seconds of any one clock.

Requirements: R13.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

PAUSE = 1.0
"""Seconds for which a peer that was just asked is not asked again, whatever is announced."""

MISSES = 2
"""Answers in a row that a peer may fail to give."""


@dataclass(frozen=True)
class Peer:
    """Something that was announced, or named by the user.

    Args:
        key: Its instance name, or for a static peer its URI.
        uri: Where it answered last; empty before it has.
        node_id: What it called itself then.
        misses: How many times in a row it did not answer.
        asked, due: When it was asked last, and when it is to be asked next.
        static: Whether the user named it: it stays in the book.
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
    """The peers of one node.

    Args:
        own: The node's own id, and the instance name under which it announces itself.
        cap: Peers at most, static ones not counted.
        interval: Seconds until a peer is asked again.
        peers: By key, the oldest first.

    Examples:
        >>> book = PeerBook("me").announced("you", now=0.0)
        >>> book.due(now=0.0), book.live()
        (('you',), ())
        >>> [peer.uri for peer in book.answered("you", "grpc://192.0.2.7:5000", "you", now=0.1).live()]
        ['grpc://192.0.2.7:5000']
    """

    own: str
    cap: int = 256
    interval: float = 10.0
    peers: Mapping[str, Peer] = field(default_factory=dict)

    def with_static(self, uri: str) -> "PeerBook":
        """The book with a peer that the user names."""
        return self._with(Peer(uri, static=True))

    def announced(self, key: str, *, now: float) -> "PeerBook":
        """An announcement or a change: who is known is asked soon, who is new is written down."""
        if key == self.own:
            return self
        if (known := self.peers.get(key)) is not None:
            return self._with(replace(known, due=min(known.due, max(now, known.asked + PAUSE))))
        book = self
        if sum(not peer.static for peer in self.peers.values()) >= self.cap:
            unproven = next(
                (peer for peer in self.peers.values() if not peer.static and not peer.uri), None
            )
            if unproven is None:
                return self
            book = self._without(unproven.key)
        return book._with(Peer(key, due=now))  # noqa: SLF001 - another value of this class

    def goodbye(self, key: str, *, now: float) -> "PeerBook":
        """A goodbye: it is asked soon whether that is so."""
        return self.announced(key, now=now) if key in self.peers else self

    def answered(self, key: str, uri: str, node_id: str, *, now: float) -> "PeerBook":
        """An answer from an address. One from this node itself removes the peer, or only unlists
        one that is static.
        """
        known = self.peers.get(key)
        if known is None:
            return self
        if node_id and node_id == self.own:
            unlisted = replace(known, uri="", asked=now, due=now + self.interval)
            return self._with(unlisted) if known.static else self._without(key)
        return self._with(
            replace(known, uri=uri, node_id=node_id, misses=0, asked=now, due=now + self.interval)
        )

    def missed(self, key: str, *, now: float) -> "PeerBook":
        """No answer: after `MISSES` of them the peer is no longer listed; only static ones are then
        asked again.
        """
        known = self.peers.get(key)
        if known is None:
            return self
        known = replace(
            known, misses=known.misses + 1, asked=now, due=now + PAUSE * 2**known.misses
        )
        if known.misses < MISSES:
            return self._with(known)
        return (
            self._with(replace(known, uri="", due=now + self.interval))
            if known.static
            else self._without(key)
        )

    def due(self, *, now: float) -> tuple[str, ...]:
        """Whom to ask now."""
        return tuple(peer.key for peer in self.peers.values() if peer.due <= now)

    def live(self) -> tuple[Peer, ...]:
        """Who answers, each address once; what a peer calls itself is no proof, and hides no other."""
        found = {peer.uri: peer for peer in reversed([*self.peers.values()]) if peer.uri}
        return tuple(reversed(found.values()))

    def _with(self, peer: Peer) -> "PeerBook":
        return replace(self, peers=MappingProxyType({**self.peers, peer.key: peer}))

    def _without(self, key: str) -> "PeerBook":
        rest = {other: peer for other, peer in self.peers.items() if other != key}
        return replace(self, peers=MappingProxyType(rest))
