"""LoRAFlightServer: the cards of a folder over Arrow Flight, read-only, by digest.

A flight is a card. Its descriptor is a path of one element, the name, or a command, the digest; its
ticket is the digest, for the card's table, or the digest and ``/file``, for the bytes of its file.
The action ``card`` gives the file's bytes too, outside Arrow's own format: a client that has yet to
trust them must not have Arrow decode them first.

Thread safety: any number of clients. The state is one `Catalog`, replaced when the folder has
changed.

Requirements: R11.
"""

import functools
import hmac
import json
import logging
import os
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import flight

from lora.errors import (
    ArgumentError,
    LoRAError,
    ManifestError,
    StateError,
    StoreError,
    UnknownCardError,
    shown,
)
from lora.federation.access import Credentials, check_location, flight_uri
from lora.federation.catalog import Catalog, Served, mapped, scan
from lora.federation.manifest import json_object
from lora.federation.streams import Limits, Streams
from lora.metrics import Metrics
from lora.store import PathLike, as_path
from lora.table import FORMAT_VERSION

log = logging.getLogger(__name__)

CHUNK = 2**20
"""Bytes of a file in one batch of a flight."""

PIECE = 2**18
"""Bytes of a file in one result of the action ``card``: as fast, and a quarter of the memory for each client."""

MAX_BATCH = 4 * 2**20
"""Bytes of rows in one batch of a table, unless a single row is larger."""

MAX_REQUEST = 4096
"""Bytes of a ticket, descriptor, criteria or action."""

SHUTDOWN = 4.0
"""Seconds that a shutdown waits for clients that it has cut off."""

FILE_SCHEMA = pa.schema([pa.field("bytes", pa.binary(), nullable=False)])
"""Of a card's file as a flight: its bytes, in pieces."""

ACTIONS = {
    "card": "The bytes of a card's file, in pieces; the body is its digest.",
    "list": "The manifest of each card, as JSON; the body is criteria, or empty.",
    "health": "Whether this server is well, as JSON.",
    "version": "Of this server, of the format, and the node's id, as JSON.",
}

F = TypeVar("F", bound=Callable[..., Any])


def _answering(method: F) -> F:
    """Answer every error of a handler with a Flight error of fixed text: no traceback, no path."""

    @functools.wraps(method)
    def answered(self: "LoRAFlightServer", *args: Any) -> Any:
        self.metrics.add(f"requests_{method.__name__}")
        try:
            return method(self, *args)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told a fixed text
            raise self._error(error) from None

    return answered  # type: ignore[return-value]


class LoRAFlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """Serves the cards of a folder from the moment it is made, until `shutdown`.

    Args:
        root: The folder; its ``*.lora.arrow`` files are served, and those beside them that end in
            ``.sig.json`` are their signatures. What changes in it shows at the next request.
        location: A Flight URI: ``grpc://host:port`` or ``grpc+tls://host:port``; port 0 takes a
            free one, see `port`.
        credentials: With a token, which clients must send; with a certificate, for ``grpc+tls``;
            with an authority, for mutual TLS.
        limits: What clients may cost.
        node_id: What the action ``version`` calls this server.

    Raises:
        ArgumentError: If the parts do not fit together.
        CardNotFoundError, StoreError: If there is no folder, or the port is taken.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, LoRAFlightServer(folder) as server:
        ...     client = flight.connect(server.uri)
        ...     list(client.list_flights())
        ...     client.close()
        []
    """

    def __init__(
        self,
        root: PathLike,
        location: str = "grpc://127.0.0.1:0",
        *,
        credentials: Credentials = Credentials(),  # noqa: B008 - a frozen value
        limits: Limits = Limits(),  # noqa: B008 - a frozen value
        node_id: str = "",
        metrics: Metrics | None = None,
    ) -> None:
        self.root, self.limits, self.node_id, self.metrics = (
            as_path(root),
            limits,
            node_id,
            metrics or Metrics(),
        )
        tls = check_location(location, credentials)
        if tls != (credentials.certificate is not None) or (credentials.ca is not None and not tls):
            raise ArgumentError(
                "server",
                "a certificate with grpc+tls, neither that nor an authority without",
                location,
            )
        self._catalog, self._scanning = scan(self.root, Catalog()), threading.Lock()
        try:
            super().__init__(
                location,
                tls_certificates=[(credentials.certificate, credentials.key)] if tls else None,
                verify_client=credentials.ca is not None,
                root_certificates=credentials.ca,
                middleware={"token": _Token(credentials.token)} if credentials.token else None,
            )
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"server: {location}", "an address that is free", error) from error
        self._streams = Streams(self.port, limits, self.metrics)
        self.uri = flight_uri(urllib.parse.urlsplit(location).hostname or "", self.port, tls=tls)

    @property
    def catalog(self) -> Catalog:
        """What the folder holds now."""
        with self._scanning:
            self._catalog = scan(self.root, self._catalog)
            return self._catalog

    def shutdown(self) -> None:
        """Stop serving, within 5 seconds whatever clients do."""
        stopping = threading.Thread(target=super().shutdown, name="lora-shutdown", daemon=True)
        stopping.start()
        self._streams.close()
        for _ in range(int(SHUTDOWN / 0.05)):
            stopping.join(0.05)
            if not stopping.is_alive():
                break
            self._streams.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @_answering
    def list_flights(self, context: Any, criteria: bytes) -> Iterator[Any]:  # noqa: ARG002 - Flight's protocol
        """A FlightInfo for each card; criteria are JSON with ``name_prefix`` or ``base_model``, or
        empty.
        """
        return iter([self._info(card) for card in self._matching(criteria)])

    @_answering
    def get_flight_info(self, context: Any, descriptor: Any) -> Any:  # noqa: ARG002 - Flight's protocol
        """The FlightInfo of the card that a name or a digest stands for."""
        return self._info(self._described(descriptor))

    @_answering
    def get_schema(self, context: Any, descriptor: Any) -> Any:  # noqa: ARG002 - Flight's protocol
        """The schema of a card's table, with its fields as metadata."""
        return flight.SchemaResult(self._described(descriptor).schema)

    @_answering
    def do_get(self, context: Any, ticket: Any) -> Any:
        """A card's table, or with ``/file`` after the digest its file."""
        _check_size(ticket.ticket)
        sha, _, form = ticket.ticket.decode().partition("/")
        if form not in ("", "file"):
            raise UnknownCardError("ticket", "a digest, or one and /file", "another")
        card = self._digest(sha)
        schema, pieces = (
            (FILE_SCHEMA, map(_row, file_pieces(card, CHUNK)))
            if form
            else (card.schema, table_pieces(card))
        )
        return flight.GeneratorStream(
            schema, self._sent(context, pieces, lambda batch: int(batch.nbytes))
        )

    @_answering
    def do_action(self, context: Any, action: Any) -> Iterator[Any]:
        """One of `ACTIONS`."""
        _check_size(action.body)
        if action.type == "card":
            return self._sent(
                context, file_pieces(self._digest(action.body.to_pybytes().decode()), PIECE), len
            )
        if action.type == "list":
            told = [card.manifest.to_json() for card in self._matching(action.body.to_pybytes())]
            return self._sent(context, iter(told), len)
        if action.type == "health":
            about: dict[str, Any] = {
                "status": "ok",
                "cards": len(self.catalog.cards),
                "streams": len(self._streams),
            }
        elif action.type == "version":
            about = {"server": "lora", "format": list(FORMAT_VERSION), "node_id": self.node_id}
        else:
            raise UnknownCardError("action", "one that is listed", "another")
        return iter([json.dumps(about).encode()])

    def list_actions(self, context: Any) -> list[Any]:  # noqa: ARG002 - Flight's protocol
        """What `do_action` offers."""
        return list(ACTIONS.items())

    def do_put(self, *_: Any) -> None:
        """Refused: serving is read-only."""
        raise flight.FlightUnauthorizedError("read-only")

    def do_exchange(self, *_: Any) -> None:
        """Refused: serving is read-only."""
        raise flight.FlightUnauthorizedError("read-only")

    def _matching(self, criteria: bytes) -> list[Served]:
        """The cards that criteria ask for, by digest."""
        _check_size(criteria)
        wanted = json_object(criteria, "criteria") if criteria else {}
        if set(wanted) - {"name_prefix", "base_model"} or not all(
            isinstance(text, str) for text in wanted.values()
        ):
            raise ManifestError("criteria", "texts for name_prefix or base_model", shown(wanted))
        prefix, base = wanted.get("name_prefix", ""), wanted.get("base_model")
        return [
            card
            for _, card in sorted(self.catalog.cards.items())
            if card.manifest.name.startswith(prefix) and base in (None, card.manifest.base_model)
        ]

    def _described(self, descriptor: Any) -> Served:
        if descriptor.descriptor_type == flight.DescriptorType.CMD:
            _check_size(descriptor.command)
            return self._digest(descriptor.command.decode())
        if len(descriptor.path) != 1:
            raise UnknownCardError("descriptor", "a path of one element", len(descriptor.path))
        return self.catalog.find(descriptor.path[0].decode())

    def _digest(self, sha: str) -> Served:
        card = self.catalog.cards.get(sha)
        if card is None:
            raise UnknownCardError("card", "a digest that is served here", "another")
        return card

    def _info(self, card: Served) -> Any:
        endpoint = flight.FlightEndpoint(
            card.manifest.digest.encode(), []
        )  # no location: where it was asked for
        return flight.FlightInfo(
            card.schema,
            flight.FlightDescriptor.for_path(card.manifest.name.encode(errors="surrogatepass")),
            [endpoint],
            total_records=card.manifest.modules,
            total_bytes=card.manifest.size,
            app_metadata=card.manifest.to_json(),
        )

    def _sent(
        self, context: Any, pieces: Iterator[Any], size: Callable[[Any], int]
    ) -> Iterator[Any]:
        """The pieces, as long as there is a place for one stream more and the client takes them."""
        try:
            with self._streams.opened(context.peer()) as stream:
                for piece in pieces:
                    yield piece
                    stream.went_on()
                    self.metrics.add("sent_bytes", size(piece))
        except Exception as error:  # noqa: BLE001 - as `_answering`
            raise self._error(error) from None

    def _error(self, error: Exception) -> Any:
        """What a client is told."""
        if isinstance(error, flight.FlightError):
            return error
        self.metrics.add("requests_refused")
        if isinstance(error, StateError):
            return flight.FlightUnavailableError("busy")
        if isinstance(error, UnknownCardError):
            return flight.FlightServerError("no such card")
        if isinstance(error, ManifestError | UnicodeDecodeError):
            return flight.FlightServerError("bad request")
        log.log(
            logging.WARNING if isinstance(error, LoRAError) else logging.ERROR,
            "request failed: %r",
            error,
        )
        return flight.FlightInternalError("internal error")


def file_pieces(card: Served, size: int) -> Iterator[bytes]:
    """The bytes of a card's file in pieces of that size, read as they are sent."""
    with open(card.path, "rb", buffering=0, opener=_no_links) as file:
        for offset in range(0, card.manifest.size, size):
            yield os.pread(file.fileno(), size, offset)


def table_pieces(card: Served) -> Iterator[pa.RecordBatch]:
    """A card's rows, views of its mapped file, as many in a batch as `MAX_BATCH` holds."""
    with mapped(card) as buffer:
        batch = pa.ipc.open_file(buffer).get_batch(0)
        start, size = 0, 0
        for row in range(batch.num_rows):
            mine = batch.slice(row, 1).nbytes
            if row > start and size + mine > MAX_BATCH:
                yield batch.slice(start, row - start)
                start, size = row, 0
            size += mine
        yield batch.slice(start)


def _row(piece: bytes) -> pa.RecordBatch:
    """A batch of one row of `FILE_SCHEMA`, without a copy."""
    offsets = pa.py_buffer(np.array([0, len(piece)], np.int32))
    return pa.record_batch(
        [pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(piece)])], FILE_SCHEMA
    )


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _check_size(request: Any) -> None:
    if len(request) > MAX_REQUEST:
        raise ManifestError("request", f"at most {MAX_REQUEST} bytes", len(request))


class _Token(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Lets in calls with the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def start_call(self, info: Any, headers: Any) -> None:  # noqa: ARG002 - Flight's protocol
        """Check a call's headers."""
        found = [
            value
            for key, values in headers.items()
            if key.lower() == "authorization"
            for value in values
        ]
        if len(found) != 1 or not hmac.compare_digest(_as_bytes(found[0]), self._expected):
            raise flight.FlightUnauthenticatedError("unauthenticated")


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode(errors="surrogateescape")
