"""LoRAFlightClient: cards from one peer, each checked in the order of R12.3 before it becomes
visible in the cache.

Thread safety: any number of threads. The state is one mapping of what the peer has announced,
replaced when it grows.

Requirements: R12.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, Self

import pyarrow as pa
from pyarrow import flight

from lora.card import LoRACard
from lora.checks import is_digest
from lora.errors import CardFileError, LoRAError, MismatchError, PeerError, UnknownCardError, shown
from lora.federation.access import Credentials, check_location
from lora.federation.cache import CardCache
from lora.federation.manifest import Manifest, json_object, manifest_from_json
from lora.federation.trust import (
    Policy,
    check_contents,
    check_declared,
    check_received,
    check_signature,
    check_version,
)
from lora.metrics import Metrics
from lora.store import PathLike, load

MAX_MESSAGE = 16 * 2**20
"""Bytes of one message of a peer: gRPC refuses a longer one before it is buffered."""

MAX_CARDS = 10_000
"""Cards that a peer may list."""

Progress = Callable[[int, int], None]
"""Bytes received, and bytes in all."""


class Fetched(NamedTuple):
    """A card that was accepted, and the digest under which the cache has it."""

    card: LoRACard
    digest: str


class LoRAFlightClient:
    """Lists and fetches the cards of one peer.

    Args:
        uri: ``grpc://host:port`` or ``grpc+tls://host:port``.
        cache: A `CardCache`, or the folder of one.
        policy: What to accept; as it is, only what is signed by a trusted key, or pinned.
        credentials: A token, which is sent with every call; the authority that the server is
            checked against; the client's certificate.
        timeout: Seconds for a call, and what a download may take besides its bytes.
        min_rate: Bytes per second that a download must reach on average.
        check: A last check of a card before it is admitted, which raises if it is not wanted: an
            engine's, that it fits its model.

    Examples:
        >>> import tempfile
        >>> import lora
        >>> from lora.federation.server import LoRAFlightServer
        >>> with tempfile.TemporaryDirectory() as cards, tempfile.TemporaryDirectory() as cache:
        ...     sha = lora.save(LoRACard("docs", 1, 1.0, [], {}), f"{cards}/docs.lora.arrow")
        ...     with LoRAFlightServer(cards) as server, LoRAFlightClient(server.uri, cache) as client:
        ...         [skill.name for skill in client.list_remote_skills()], client.fetch_skill("docs", digest=sha).name
        (['docs'], 'docs')
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
        token = credentials.token
        self._check, self._headers = (
            check,
            [(b"authorization", f"Bearer {token}".encode())] if token else [],
        )
        self._known: MappingProxyType[str, Manifest] = MappingProxyType({})
        options = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.enable_retries", 0)]
        with self._talking("connecting"):
            self._flight = flight.connect(
                uri,
                tls_root_certs=credentials.ca,
                cert_chain=credentials.certificate,
                private_key=credentials.key,
                generic_options=options,
            )

    def list_remote_skills(
        self, name_prefix: str = "", base_model: str | None = None
    ) -> list[Manifest]:
        """What the peer offers, by name; what is no well-formed manifest is left out and counted.

        Raises:
            PeerError: If the peer is not there, too slow, or lists more than `MAX_CARDS`.
        """
        wanted = {"name_prefix": name_prefix} if name_prefix else {}
        criteria = json.dumps(
            wanted | ({} if base_model is None else {"base_model": base_model})
        ).encode()
        found: list[Manifest] = []
        with self._talking("list"):
            results = self._flight.do_action(flight.Action("list", criteria), self._options())
            for count, result in enumerate(
                results
            ):  # which come one at a time; of flights Arrow reads all first
                if count == MAX_CARDS:
                    raise PeerError(f"{self.uri}: list", f"at most {MAX_CARDS} cards", "more")
                try:
                    found.append(manifest_from_json(result.body.to_pybytes()))
                except LoRAError:
                    self.metrics.add("manifests_refused")
        return sorted(found, key=lambda manifest: (manifest.name, manifest.digest))

    def manifest(self, name_or_digest: str) -> Manifest:
        """What the peer announces of a card.

        Raises:
            UnknownCardError: If it has none of that name or digest.
            PeerError, ManifestError:
        """
        if is_digest(name_or_digest):
            descriptor = flight.FlightDescriptor.for_command(name_or_digest.encode())
        else:
            descriptor = flight.FlightDescriptor.for_path(
                name_or_digest.encode(errors="surrogatepass")
            )
        with self._talking(f"card {shown(name_or_digest, 80)}"):
            info = self._flight.get_flight_info(descriptor, self._options())
        manifest = manifest_from_json(info.app_metadata)
        if name_or_digest not in (manifest.name, manifest.digest):
            raise MismatchError(
                f"{self.uri}: card", shown(name_or_digest, 80), shown(manifest.name, 80)
            )
        return manifest

    def fetch_skill(
        self,
        name: str,
        *,
        digest: str | None = None,
        refresh: bool = False,
        progress: Progress | None = None,
    ) -> LoRACard:
        """A card by name or digest, from the cache if it is there; a second call does no network
        I/O.

        Args:
            name: A name or a digest that the peer knows.
            digest: Accept this digest, and no other.
            refresh: Ask the peer again what the name stands for.
            progress: Called with the bytes received so far and the bytes in all.

        Raises:
            RefusedError: Of the kind that says why the policy refuses it.
            PeerError, UnknownCardError, CardFileError, StoreError:
        """
        wanted = digest or name
        manifest = None if refresh else self._known.get(wanted)
        if manifest is None:
            manifest = self.manifest(wanted)
        if digest is not None and manifest.digest != digest:
            raise MismatchError(f"card {shown(name, 80)}: digest", digest, manifest.digest)
        found = self.fetch(
            manifest, self.policy if digest is None else self.policy.pinned(digest), progress
        )
        self._known = MappingProxyType({**self._known, wanted: manifest})
        return found.card

    def fetch(
        self, manifest: Manifest, policy: Policy | None = None, progress: Progress | None = None
    ) -> Fetched:
        """The card of a manifest, from the cache if it is there whole, else from the peer."""
        policy = policy or self.policy
        check_declared(manifest, policy)
        try:
            card = load(self.cache.path(manifest.digest), verify=manifest.digest)
        except FileNotFoundError:
            pass
        except CardFileError:
            self.cache.quarantine(manifest.digest)
        else:
            self._vouch(manifest, policy)
            self._accept(card, manifest, policy)
            self.cache.used(manifest.digest)
            self.metrics.add("cache_hits")
            return Fetched(card, manifest.digest)
        with self.metrics.timed("fetches"):
            return self._download(manifest, policy, progress)

    def health(self) -> dict[str, Any]:
        """What the peer says of itself: its node id, the format's version.

        Raises:
            PeerError, ManifestError:
        """
        with self._talking("version"):
            result = next(
                self._flight.do_action(flight.Action("version", b""), self._options()), None
            )
        if result is None:
            raise PeerError(f"{self.uri}: version", "an answer", "none")
        return json_object(result.body.to_pybytes()[:4096], f"{self.uri}: version")

    def close(self) -> None:
        """Close the connection."""
        self._flight.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _download(self, manifest: Manifest, policy: Policy, progress: Progress | None) -> Fetched:
        """Receive, check, admit: the order of R12.3."""
        with self.cache.arriving() as (path, file):
            with self._talking(f"card {manifest.name!r}"):
                size, sha = received(self._pieces(manifest), file, manifest, policy, progress)
            self.metrics.add("fetched_bytes", size)
            check_received(manifest, size, sha, policy)
            self._vouch(manifest, policy)
            card = load(path)
            self._accept(card, manifest, policy)
            self.cache.admit(path, sha)
        return Fetched(card, sha)

    def _vouch(self, manifest: Manifest, policy: Policy) -> None:
        check_signature(manifest, policy)
        check_version(
            manifest, self.cache.highest_version(manifest.name, _signer(manifest)), policy
        )

    def _accept(self, card: LoRACard, manifest: Manifest, policy: Policy) -> None:
        check_contents(card, manifest, policy)
        if self._check is not None:
            self._check(card)
        self.cache.remember_version(manifest.name, _signer(manifest), manifest.version)

    def _pieces(self, manifest: Manifest) -> Iterator[pa.Buffer]:
        """The bytes of a card's file as they come; the call as a whole has a deadline."""
        options = self._options(self.timeout + manifest.size / self.min_rate)
        for result in self._flight.do_action(
            flight.Action("card", manifest.digest.encode()), options
        ):
            yield result.body

    def _options(self, timeout: float | None = None) -> Any:
        return flight.FlightCallOptions(timeout=timeout or self.timeout, headers=self._headers)

    @contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        """Say in this library's errors what went wrong on the other side."""
        try:
            yield
        except (flight.FlightError, pa.ArrowException, UnicodeDecodeError) as error:
            text = " ".join(str(error).split())[:200]
            if "no such card" in text:
                raise UnknownCardError(
                    f"{self.uri}: {what}", "a card that is served there", "none"
                ) from error
            raise PeerError(
                f"{self.uri}: {what}", "an answer", text or type(error).__name__
            ) from error


def received(
    pieces: Iterable[pa.Buffer],
    file: BinaryIO,
    manifest: Manifest,
    policy: Policy,
    progress: Progress | None,
) -> tuple[int, str]:
    """Write pieces to a file, hashing them meanwhile on a thread of its own; their size, and their
    SHA-256.

    Raises:
        MismatchError: As soon as there are more bytes than announced.
    """
    size, limit = 0, policy.max_bytes if policy.allow_mismatch else manifest.size
    with _Writer(file) as writer:
        for piece in pieces:
            size += piece.size
            if size > limit:
                raise MismatchError(
                    f"card {manifest.name!r}: bytes received", limit, f"{size} or more"
                )
            writer.put(piece)
            if progress is not None:
                progress(size, manifest.size)
    return size, writer.sha.hexdigest()


class _Writer:
    """Writes and hashes pieces on a thread of its own, at most a few behind."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha, self._file = hashlib.sha256(), file
        self._pieces: queue.Queue[pa.Buffer | None] = queue.Queue(8)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lora-writer", daemon=True)

    def put(self, piece: pa.Buffer) -> None:
        """Hand over a piece."""
        if self._failure is not None:
            raise self._failure
        self._pieces.put(piece)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pieces.put(None)
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._failure is None:
                try:
                    self.sha.update(piece)
                    _write_all(self._file, memoryview(piece))
                except BaseException as error:  # noqa: BLE001 - raised where the pieces come from
                    self._failure = error


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _signer(manifest: Manifest) -> str:
    return "" if manifest.signature is None else manifest.signature.public_key
