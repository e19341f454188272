"""LoRAFlightServer: serves card files over Arrow Flight, read-only, by digest.

A flight is a card. Its descriptor is a path, the name, or a command, the digest. Its ticket is the
digest for the card's table, or the digest and ``/file`` for its file. The action ``card`` sends the
file without Arrow's encoding: nobody should decode what is not verified yet.

Requirements: R11.
"""

import hmac
import json
import logging
import mmap
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import flight

from lora.arrow_format import FORMAT_VERSION
from lora.checks import parse_json
from lora.errors import ArgumentError, LoRAError, ManifestError, StoreError
from lora.federation.catalog import Catalog, Served, card_files, opened, scan
from lora.federation.credentials import Credentials, check_location, flight_uri
from lora.federation.fork import guard_fork, was_forked
from lora.federation.stream_limits import Limits, Streams
from lora.files import PathLike, as_path
from lora.metrics import Metrics

log = logging.getLogger(__name__)

MAX_BATCH = 4 * 2**20  # bytes of rows in one batch, unless a single row is larger
CHUNK = MAX_BATCH - 8  # bytes of a file in one batch; its two offsets take the other 8
PIECE = 2**20  # bytes of a file in one result of the action "card"; gRPC is slower with others
MAX_REQUEST = 4096  # bytes of a ticket, descriptor, criteria or action
SHUTDOWN = 4.0  # seconds that a shutdown waits for clients that it has cut off
FILE_SCHEMA = pa.schema([pa.field("bytes", pa.binary(), nullable=False)])

ACTIONS = {
    "card": "The bytes of a card's file, in pieces; the body is its digest.",
    "list": "The manifest of each card, as JSON; the body is criteria, or empty.",
    "health": "Whether this server is well, as JSON.",
    "version": "Of this server, of the format, and the node's id, as JSON.",
}


class LoRAFlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """Serves card files to any number of clients, from its construction until `shutdown`.

    Args:
        root: Folder whose ``*.lora.arrow`` files are served, or a function that returns the card
            files to serve now. A ``.sig.json`` file beside a card is its signature.
        location: ``grpc://host:port`` or ``grpc+tls://host:port``; port 0 takes a free one.
        credentials: The token to ask for, and the certificates of TLS.
        limits: What clients may cost.
        node_id: What the action ``version`` calls this server.
        metrics: Counters of requests and streams; default: new ones.

    Raises:
        CardNotFoundError: There is no such folder.
        StoreError: The address is taken, or not this machine's.
        ArgumentError: The location, certificate and CA do not fit together.

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
        root: PathLike | Callable[[], Iterable[Path]],
        location: str = "grpc://127.0.0.1:0",
        *,
        credentials: Credentials = Credentials(),  # noqa: B008 - a frozen value
        limits: Limits = Limits(),  # noqa: B008 - a frozen value
        node_id: str = "",
        metrics: Metrics | None = None,
    ) -> None:
        guard_fork(self)
        self.node_id, self.metrics = node_id, metrics or Metrics()
        self._files = root if callable(root) else partial(card_files, as_path(root))
        tls, host, port = check_location(location, credentials)
        certificate = credentials.certificate
        if tls != (certificate is not None) or (credentials.ca is not None and not tls):
            expected = "a certificate with grpc+tls; neither that nor an authority without"
            raise ArgumentError("server", expected, location)
        self._catalog, self._scanning = scan(self._files(), Catalog()), threading.Lock()
        try:
            super().__init__(
                location,
                tls_certificates=[(certificate, credentials.key)] if tls else None,
                verify_client=credentials.ca is not None,
                root_certificates=credentials.ca,
                middleware={"token": _Token(credentials.token)} if credentials.token else None,
            )
        except (pa.ArrowException, OSError) as error:
            expected, problem = "a free address of this machine", _bind_problem(host, port)
            raise StoreError(f"server: {location}", expected, problem or error) from error
        self._streams = Streams(self.port, limits, self.metrics)
        self.uri = flight_uri(host, self.port, tls=tls)

    @property
    def catalog(self) -> Catalog:
        """The cards that there are now."""
        with self._scanning:
            self._catalog = scan(self._files(), self._catalog)
            return self._catalog

    def shutdown(self) -> None:
        """Stop serving, within 5 seconds whatever clients do."""
        if was_forked():  # the connections are the parent's
            return
        stopping = threading.Thread(target=super().shutdown, name="lora-shutdown", daemon=True)
        stopping.start()
        end = time.monotonic() + SHUTDOWN
        self._streams.close()
        while stopping.is_alive() and time.monotonic() < end:
            stopping.join(0.05)
            self._streams.close()

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def health(self) -> dict[str, Any]:
        """Return what the action ``health`` says; raise if the card files can't be read."""
        cards = len(self.catalog.cards)
        return {"status": "ok", "cards": cards, "streams": len(self._streams.open)}

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[Any]:  # noqa: ARG002 - Flight
        """Return a FlightInfo for each card that the criteria ask for."""
        with self._answering("requests_list_flights"):
            return iter([_info(card) for card in self._matching(_text(criteria))])

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:  # noqa: ARG002 - Flight's
        """Return the FlightInfo of the card of a name or a digest."""
        with self._answering("requests_get_flight_info"):
            return _info(self._described(descriptor))

    def get_schema(self, context: Any, descriptor: Any) -> Any:  # noqa: ARG002 - Flight's
        """Return the schema of a card's table, with its fields as metadata."""
        with self._answering("requests_get_schema"):
            return flight.SchemaResult(self._described(descriptor).schema)

    def do_get(self, context: Any, ticket: Any) -> Any:
        """Send a card's table, or with ``/file`` after the digest its file."""
        with self._answering("requests_do_get"):
            text = _text(ticket.ticket)
            card = self._card(text.removesuffix("/file"))
            schema, batches = card.schema, table_pieces(card)
            if text.endswith("/file"):
                schema, pieces = FILE_SCHEMA, file_pieces(card, CHUNK)
                batches = (pa.record_batch([[piece]], schema) for piece in pieces)
            return flight.GeneratorStream(schema, self._sent(context, batches))

    def do_action(self, context: Any, action: Any) -> Iterator[Any]:
        """Do one of `ACTIONS`."""
        with self._answering("requests_do_action"):
            body = _text(action.body)
            match action.type:
                case "card":
                    return self._sent(context, file_pieces(self._card(body), PIECE))
                case "list":
                    matching = self._matching(body)
                    return self._sent(context, (card.manifest.to_json() for card in matching))
                case "health":
                    answer = self.health()
                case "version":
                    answer = {"server": "lora", "format": FORMAT_VERSION, "node_id": self.node_id}
                case _:
                    raise flight.FlightServerError("bad request")
            return iter([json.dumps(answer).encode()])

    def list_actions(self, context: Any) -> list[Any]:  # noqa: ARG002 - Flight's protocol
        """Return the names and descriptions of `ACTIONS`."""
        return list(ACTIONS.items())

    def do_put(self, *_: Any) -> None:
        """Refuse: serving is read-only."""
        raise flight.FlightUnauthorizedError("read-only")

    do_exchange = do_put

    def _matching(self, text: str) -> list[Served]:
        """Return the cards that criteria ask for: JSON with a name prefix or a base model."""
        criteria = parse_json(text or "{}", "criteria", dict, ManifestError)
        prefix, base = criteria.pop("name_prefix", ""), criteria.pop("base_model", None)
        if criteria or not isinstance(prefix, str) or not isinstance(base, str | None):
            raise flight.FlightServerError("bad request")
        return [
            card
            for card in self.catalog.cards.values()
            if card.manifest.name.startswith(prefix) and base in (None, card.manifest.base_model)
        ]

    def _described(self, descriptor: Any) -> Served:
        if descriptor.descriptor_type == flight.DescriptorType.CMD:
            return self._card(_text(descriptor.command))
        return self._card(_text(b"/".join(descriptor.path)), by_name=True)

    def _card(self, text: str, *, by_name: bool = False) -> Served:
        catalog = self.catalog
        card = catalog.cards.get(catalog.names.get(text, "") if by_name else text)
        if card is None:
            raise flight.FlightServerError("no such card")
        return card

    def _sent(self, context: Any, pieces: Iterable[Any]) -> Iterator[Any]:
        with self._answering("streams"), self._streams.opened(context.peer()) as stream:
            for piece in pieces:
                yield piece
                stream.last = time.monotonic()
                size = piece.nbytes if isinstance(piece, pa.RecordBatch) else len(piece)
                self.metrics.add("sent_bytes", size)

    @contextmanager
    def _answering(self, counter: str) -> Iterator[None]:
        """Count a request, and answer every error with a fixed text, without traceback or path."""
        self.metrics.add(counter)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a fixed text
            self.metrics.add("requests_refused")
            answer = error
            if isinstance(error, ManifestError | UnicodeDecodeError):
                answer = flight.FlightServerError("bad request")
            elif not isinstance(error, flight.FlightError):
                level = logging.WARNING if isinstance(error, LoRAError) else logging.ERROR
                log.log(level, "request failed: %r", error)
                answer = flight.FlightInternalError("internal error")
            raise answer from None


def file_pieces(card: Served, size: int) -> Iterator[bytes]:
    """Yield a card's file in pieces, read as they are sent."""
    with opened(card) as file:
        while piece := file.read(size):
            yield piece


def table_pieces(card: Served) -> Iterator[pa.RecordBatch]:
    """Yield a card's rows as views of its mapped file, in batches of up to `MAX_BATCH`."""
    with opened(card) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    start = 0
    for row in range(1, batch.num_rows):
        if batch.slice(start, row - start + 1).nbytes > MAX_BATCH:
            yield batch.slice(start, row - start)
            start = row
    yield batch.slice(start)


def _bind_problem(host: str, port: int) -> OSError | None:
    """Return why an address can't be served, which gRPC does not tell."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        return error
    return None


def _info(card: Served) -> Any:
    return flight.FlightInfo(
        card.schema,
        flight.FlightDescriptor.for_path(card.manifest.name),
        [flight.FlightEndpoint(card.manifest.digest.encode(), [])],  # at this server
        total_records=card.manifest.modules,
        total_bytes=card.manifest.size,
        app_metadata=card.manifest.to_json(),
    )


def _text(request: Any) -> str:
    if len(request) > MAX_REQUEST:
        raise flight.FlightServerError("bad request")
    return str(request, "utf-8")


class _Token(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}"

    def start_call(self, info: Any, headers: Any) -> None:  # noqa: ARG002 - Flight's protocol
        """Check the headers of a call."""
        sent = headers.get("authorization", [])
        if len(sent) != 1 or not hmac.compare_digest(sent[0], self._expected):
            raise flight.FlightUnauthenticatedError("unauthenticated")
