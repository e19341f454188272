"""LoRAFlightClient: lists and fetches the cards of one peer.

Each card passes the checks of `lora.federation.trust` before it becomes visible in the cache.

Requirements: R12.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from queue import Empty, Queue
from typing import Any, BinaryIO, NamedTuple, Self

import pyarrow as pa
from pyarrow import flight

from lora.card import LoRACard
from lora.checks import is_digest, parse_json, version_order
from lora.errors import LoRAError, MismatchError, PeerError, StateError, UnknownCardError, shown
from lora.federation.cache import CardCache
from lora.federation.credentials import Credentials, check_location
from lora.federation.fork import guard_fork, was_forked
from lora.federation.manifest import Manifest, manifest_from_json
from lora.federation.trust import (
    Policy,
    check_base,
    check_contents,
    check_declared,
    check_received,
    check_signature,
    check_version,
)
from lora.files import PathLike, load
from lora.metrics import Metrics

MAX_MESSAGE = 16 * 2**20  # bytes; gRPC refuses a longer message before it is buffered
MAX_CARDS = 10_000  # that a peer may list
MAX_PENDING = 8  # pieces of a card that wait to be hashed and written

HINTS = {
    "unauthenticated": "the peer asks for a token, and for its own",
    "not in peer certificate": "the peer's certificate must name the host of its address",
    "certificate": "the peer's must be valid, and signed by the authority in `ca`",
    "wrong version number": "the peer serves without TLS, as grpc://",
    "socket closed": "the peer may serve grpc+tls:// alone, or ask for a certificate",
    "connection refused": "nothing serves at that port",
    "domain name not found": "no machine has that name",
    "no such card": "the peer serves others now: list them again",
    "deadline exceeded": "`timeout` and `min_rate` say how long it may take",
}
"""Part of what gRPC says, in lower case -> what is likely wrong."""

Progress = Callable[[int, int], None]  # takes the bytes received so far and the bytes in all


class Fetched(NamedTuple):
    """A card that was accepted, and its digest in the cache."""

    card: LoRACard
    digest: str


class LoRAFlightClient:
    """Lists and fetches the cards of one peer, from any number of threads.

    Args:
        uri: ``grpc://host:port`` or ``grpc+tls://host:port``.
        cache: A `CardCache`, or its folder; None to list only.
        policy: Decides which cards are kept; others are refused.
        credentials: The token and the certificates to show.
        timeout: Seconds for a call; a download gets more, by its size and `min_rate`.
        min_rate: Least bytes per second of a download.
        stall: Seconds after which a download that receives nothing is cut.
        check: Called with a card before it is accepted. It raises an error to refuse the card, and
            returns True if it compared the base models, whose names then do not matter.
        metrics: Counters of fetches and bytes; default: new ones.

    Examples:
        >>> import tempfile
        >>> from lora import federation, save
        >>> with tempfile.TemporaryDirectory() as cards, tempfile.TemporaryDirectory() as cache:
        ...     sha = save(LoRACard("docs", 1, 1.0, [], {}), f"{cards}/docs.lora.arrow")
        ...     with federation.LoRAFlightServer(cards) as server:
        ...         with LoRAFlightClient(server.uri, cache) as client:
        ...             [skill.name for skill in client.list_remote_skills()]
        ...             client.fetch_skill("docs", digest=sha).name
        ['docs']
        'docs'
    """

    def __init__(
        self,
        uri: str,
        cache: CardCache | PathLike | None = None,
        policy: Policy = Policy(),  # noqa: B008 - a frozen value
        *,
        credentials: Credentials = Credentials(),  # noqa: B008 - as above
        timeout: float = 10.0,
        min_rate: float = 1e5,
        stall: float = 10.0,
        check: Callable[[LoRACard], bool | None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        check_location(uri, credentials)
        self.uri, self.policy, self.timeout, self.min_rate = uri, policy, timeout, min_rate
        self.stall, self.metrics = stall, metrics or Metrics()
        self.cache = cache if isinstance(cache, CardCache | None) else CardCache(cache)
        self._check, token = check, credentials.token
        self._headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
        self._known: dict[tuple[str, str | None], Manifest] = {}
        guard_fork(self)
        self._flight = flight.connect(
            uri,
            tls_root_certs=credentials.ca,
            cert_chain=credentials.certificate,
            private_key=credentials.key,
            generic_options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.enable_retries", 0),
                ("grpc.enable_http_proxy", 0),  # it would read the token
            ],
        )

    def list_remote_skills(
        self, name_prefix: str = "", base_model: str | None = None
    ) -> list[Manifest]:
        """List what the peer offers, by name; malformed manifests are left out and counted."""
        criteria = json.dumps({"name_prefix": name_prefix, "base_model": base_model})
        manifests = []
        for count, body in enumerate(self._call("list", "list", criteria)):
            if count == MAX_CARDS:
                raise PeerError(f"{self.uri}: list", f"at most {MAX_CARDS} cards", "more")
            try:
                manifests.append(manifest_from_json(body.to_pybytes()))
            except LoRAError:
                self.metrics.add("manifests_refused")
        return sorted(manifests, key=lambda manifest: (manifest.name, manifest.digest))

    def fetch_skill(
        self,
        name: str,
        *,
        digest: str | None = None,
        refresh: bool = False,
        progress: Progress | None = None,
    ) -> LoRACard:
        """Return a card from the cache or the peer; a second call does no network I/O.

        Args:
            name: A name or a digest.
            digest: Accept this digest, and no other.
            refresh: Ask the peer again which card the name stands for.

        Raises:
            RefusedError: The policy refuses the card.
            PeerError: The peer is not there, too slow, or breaks off.
        """
        policy = self.policy if digest is None else self.policy.pinned(digest)
        manifest = self._known.get((name, digest))
        if manifest is None or refresh:
            manifest = self._ask_manifest(name, digest)
        card = self.fetch(manifest, policy, progress).card
        self._known[name, digest] = manifest
        return card

    def fetch(
        self, manifest: Manifest, policy: Policy | None = None, progress: Progress | None = None
    ) -> Fetched:
        """Return the card of a manifest, from the cache or peer, after all checks."""
        policy, sha, cache = policy or self.policy, manifest.digest, self.cache
        if cache is None:
            raise StateError("fetch", "a client with a cache", "one without")
        check_declared(manifest, policy)
        cached = cache.load(sha)
        with ExitStack() as opened:
            if cached is None:
                opened.enter_context(self.metrics.timed("fetches"))
                arrived, file = opened.enter_context(cache.arriving())
                sha = self._download(manifest, policy, file, progress)
            check_signature(manifest, policy)
            highest = cache.highest_version(manifest.name, manifest.signer)
            check_version(manifest, highest, policy)
            card = load(arrived) if cached is None else cached
            check_contents(card, manifest, policy)
            if self._check is None or not self._check(card):
                check_base(card, policy)
            is_new = cached is None and cache.admit(arrived, sha)
            try:
                cache.remember_version(manifest.name, manifest.signer, manifest.version)
            except LoRAError:
                if is_new:  # a card and its version are kept together
                    cache.path(sha).unlink(missing_ok=True)
                raise
        if cached is not None:
            self.metrics.add("cache_hits")
        return Fetched(card, sha)

    def health(self) -> dict[str, Any]:
        """Ask the peer for its node id and format version."""
        answer = next(self._call("version", "version"), pa.py_buffer(b"")).to_pybytes()
        return parse_json(answer[:4096], f"{self.uri}: version", dict, PeerError)

    def close(self) -> None:
        """Close the connection."""
        if not was_forked():  # it is the parent's
            self._flight.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask_manifest(self, name: str, digest: str | None) -> Manifest:
        offered = [
            manifest
            for manifest in self.list_remote_skills("" if is_digest(name) else name)
            if name in (manifest.name, manifest.digest) and digest in (None, manifest.digest)
        ]
        if not offered:
            where = f"{self.uri}: card {shown(name, 80)}"
            raise UnknownCardError(where, "a card that is served there", "none")
        return max(offered, key=lambda each: (version_order(each.version), each.digest))

    def _download(
        self, manifest: Manifest, policy: Policy, file: BinaryIO, progress: Progress | None
    ) -> str:
        size, sha, where = 0, hashlib.sha256(), f"card {manifest.name!r}"
        limit = policy.max_bytes if policy.allow_mismatch else manifest.size
        for piece in self._pieces(where, manifest):
            size += piece.size
            if size > limit:
                raise MismatchError(f"{where}: bytes received", limit, f"{size} or more")
            sha.update(piece)
            file.write(piece)
            if progress is not None:
                progress(size, manifest.size)
        file.flush()
        self.metrics.add("fetched_bytes", size)
        check_received(manifest, size, sha.hexdigest(), policy)
        return sha.hexdigest()

    def _pieces(self, where: str, manifest: Manifest) -> Iterator[pa.Buffer]:
        """Yield the pieces that a thread receives; gRPC can't cancel a read that stalls."""
        pieces: Queue[pa.Buffer | Exception | None] = Queue(MAX_PENDING)
        left, timeout = threading.Event(), self.timeout + manifest.size / self.min_rate

        def receive() -> None:
            end: Exception | None = None
            try:
                for piece in self._call(where, "card", manifest.digest, timeout):
                    pieces.put(piece)
                    if left.is_set():
                        return
            except Exception as error:  # noqa: BLE001 - raised where the pieces are taken
                end = error
            pieces.put(end)

        threading.Thread(target=receive, name="lora-receiver", daemon=True).start()
        try:
            while (piece := pieces.get(timeout=self.stall)) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        except Empty:
            hint = "`stall` says how long that may take"
            expected = f"some bytes in {self.stall:g} s"
            raise PeerError(f"{self.uri}: {where}", expected, "none", hint) from None
        finally:
            left.set()
            with suppress(Empty):
                while True:  # so that the thread's last `put` ends
                    pieces.get_nowait()

    def _call(
        self, what: str, action: str, body: str = "", timeout: float | None = None
    ) -> Iterator[pa.Buffer]:
        """Call an action under a deadline, and yield its results, which Arrow does not decode."""
        guard_fork(self)
        timeout = timeout or self.timeout
        options = flight.FlightCallOptions(timeout=timeout, headers=self._headers)
        try:
            for result in self._flight.do_action(flight.Action(action, body.encode()), options):
                yield result.body
        except (flight.FlightError, pa.ArrowException, UnicodeDecodeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            noise = r".*(last error: [A-Z]+: |with message: |routines:[^:]*:)|\. Detail: .*"
            text = re.sub(noise, "", text)[:200]
            hint = next((hint for part, hint in HINTS.items() if part in text.lower()), "")
            raise PeerError(f"{self.uri}: {what}", "an answer", text, hint) from error
