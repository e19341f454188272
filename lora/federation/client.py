"""LoRAFlightClient: lists and fetches the cards of one peer.

Each card passes the checks of `lora.federation.trust` before it becomes visible in the cache.

Thread safety: any number of threads.

Requirements: R12.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, NamedTuple, Self

import pyarrow as pa
from pyarrow import flight

from lora.card import LoRACard
from lora.checks import is_digest, parse_json
from lora.errors import LoRAError, ManifestError, MismatchError, PeerError, UnknownCardError, shown
from lora.federation.cache import CardCache
from lora.federation.credentials import Credentials, check_location
from lora.federation.manifest import Manifest, manifest_from_json
from lora.federation.trust import (
    Policy,
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

Progress = Callable[[int, int], None]  # takes the bytes received so far and the bytes in all


class Fetched(NamedTuple):
    """A card that was accepted, and its digest in the cache."""

    card: LoRACard
    digest: str


class LoRAFlightClient:
    """Lists and fetches the cards of one peer.

    Args:
        uri: ``grpc://host:port`` or ``grpc+tls://host:port``.
        cache: A `CardCache`, or its folder.
        timeout: Seconds for a call; a download has more, for its bytes at `min_rate`.
        min_rate: Bytes per second.
        check: Called with a card before it is admitted; raises to refuse it.

    Examples:
        >>> import tempfile
        >>> import lora
        >>> from lora.federation.server import LoRAFlightServer
        >>> with tempfile.TemporaryDirectory() as cards, tempfile.TemporaryDirectory() as cache:
        ...     sha = lora.save(LoRACard("docs", 1, 1.0, [], {}), f"{cards}/docs.lora.arrow")
        ...     with LoRAFlightServer(cards) as server:
        ...         with LoRAFlightClient(server.uri, cache) as client:
        ...             [skill.name for skill in client.list_remote_skills()]
        ...             client.fetch_skill("docs", digest=sha).name
        ['docs']
        'docs'
    """

    def __init__(
        self,
        uri: str,
        cache: CardCache | PathLike,
        policy: Policy = Policy(),  # noqa: B008 - a frozen value
        *,
        credentials: Credentials = Credentials(),  # noqa: B008 - as above
        timeout: float = 10.0,
        min_rate: float = 1e6,
        check: Callable[[LoRACard], None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        check_location(uri, credentials)
        self.uri, self.policy, self.timeout, self.min_rate = uri, policy, timeout, min_rate
        self.cache = cache if isinstance(cache, CardCache) else CardCache(cache)
        self.metrics = metrics or Metrics()
        self._check, token = check, credentials.token
        self._headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
        self._known: dict[str, Manifest] = {}
        with self._talking("connecting"):
            self._flight = flight.connect(
                uri,
                tls_root_certs=credentials.ca,
                cert_chain=credentials.certificate,
                private_key=credentials.key,
                generic_options=[
                    ("grpc.max_receive_message_length", MAX_MESSAGE),
                    ("grpc.enable_retries", 0),
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
            name: A name or a digest that the peer knows.
            digest: Accept this digest, and no other.
            refresh: Ask the peer again which card the name stands for.

        Raises:
            RefusedError: The policy refuses the card.
            PeerError: The peer is not there, too slow, or breaks off.
        """
        policy = self.policy if digest is None else self.policy.pinned(digest)
        requested = digest or name
        manifest = self._known.get(requested)
        if manifest is None or refresh:
            manifest = self._announced(requested)
        card = self.fetch(manifest, policy, progress).card
        self._known[requested] = manifest
        return card

    def fetch(
        self, manifest: Manifest, policy: Policy | None = None, progress: Progress | None = None
    ) -> Fetched:
        """Return the card of a manifest, from the cache or peer, after all checks."""
        policy = policy or self.policy
        check_declared(manifest, policy)
        path, sha = self.cache.path(manifest.digest), manifest.digest
        with ExitStack() as opened:
            cached = self.cache.holds(sha)
            if cached:
                self.metrics.add("cache_hits")
            else:
                opened.enter_context(self.metrics.timed("fetches"))
                path, file = opened.enter_context(self.cache.arriving())
                sha = self._download(manifest, policy, file, progress)
            check_signature(manifest, policy)
            highest = self.cache.highest_version(manifest.name, manifest.signer)
            check_version(manifest, highest, policy)
            card = load(path, verify=sha if cached else None)
            check_contents(card, manifest, policy)
            if self._check is not None:
                self._check(card)
            if not cached:
                self.cache.admit(path, sha)
            self.cache.remember_version(manifest.name, manifest.signer, manifest.version)
        return Fetched(card, sha)

    def health(self) -> dict[str, Any]:
        """Ask the peer for its node id and format version."""
        answer = next(self._call("version", "version"), pa.py_buffer(b"")).to_pybytes()
        return parse_json(answer[:4096], f"{self.uri}: version", dict, ManifestError)

    def close(self) -> None:
        """Close the connection."""
        self._flight.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _announced(self, requested: str) -> Manifest:
        by_digest, kinds = is_digest(requested), flight.FlightDescriptor
        describe = kinds.for_command if by_digest else kinds.for_path
        with self._talking(f"card {shown(requested, 80)}"):
            descriptor = describe(requested.encode(errors="surrogatepass"))
            options = flight.FlightCallOptions(timeout=self.timeout, headers=self._headers)
            info = self._flight.get_flight_info(descriptor, options)
        manifest = manifest_from_json(info.app_metadata)
        announced = manifest.digest if by_digest else manifest.name
        if announced != requested:
            raise MismatchError(f"{self.uri}: card", shown(requested, 80), shown(announced, 80))
        return manifest

    def _download(
        self, manifest: Manifest, policy: Policy, file: BinaryIO, progress: Progress | None
    ) -> str:
        """Receive a card's file, while a thread hashes and writes; return the digest."""
        size, sha, where = 0, hashlib.sha256(), f"card {manifest.name!r}"
        limit = policy.max_bytes if policy.allow_mismatch else manifest.size
        timeout = self.timeout + manifest.size / self.min_rate

        def write(piece: pa.Buffer) -> None:
            sha.update(piece)
            _write_all(file, memoryview(piece))

        pending: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1, "lora-writer") as writer:
            for piece in self._call(where, "card", manifest.digest, timeout):
                size += piece.size
                if size > limit:
                    raise MismatchError(f"{where}: bytes received", limit, f"{size} or more")
                pending.append(writer.submit(write, piece))
                if len(pending) > MAX_PENDING:
                    pending.popleft().result()
                if progress is not None:
                    progress(size, manifest.size)
            for writing in pending:
                writing.result()
        self.metrics.add("fetched_bytes", size)
        check_received(manifest, size, sha.hexdigest(), policy)
        return sha.hexdigest()

    def _call(
        self, what: str, action: str, body: str = "", timeout: float | None = None
    ) -> Iterator[pa.Buffer]:
        """Call an action under a deadline, and yield its results, which Arrow does not decode."""
        timeout = timeout or self.timeout
        with self._talking(what):
            options = flight.FlightCallOptions(timeout=timeout, headers=self._headers)
            for result in self._flight.do_action(flight.Action(action, body.encode()), options):
                yield result.body

    @contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        where = f"{self.uri}: {what}"
        try:
            yield
        except (flight.FlightError, pa.ArrowException, UnicodeDecodeError) as error:
            text = " ".join(str(error).split())[:200] or type(error).__name__
            if "no such card" in text:
                raise UnknownCardError(where, "a card that is served there", "none") from error
            raise PeerError(where, "an answer", text) from error


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
