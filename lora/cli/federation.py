"""Commands that share cards between machines: serve, list, fetch, keygen, sign.

Requirements: R5, R11, R12, R13, R14, R25.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lora.cli.app import (
    Json,
    Result,
    blocks,
    check_output,
    checks_done,
    command,
    in_options,
    printable,
    progress_bar,
    show,
    table_of,
    waiting,
)
from lora.errors import ArgumentError, LoRAError, PeerError

Peer = Annotated[
    list[str] | None,
    typer.Option("--peer", help="A peer's host:port or grpc+tls://…; repeatable; all, if omitted."),
]
Wait = Annotated[float, typer.Option(help="Seconds to look for peers on the network.", min=0)]


def credentials(
    *,
    token_file: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    ca: Path | None = None,
    insecure_token: bool = False,
) -> Any:
    """Read the credentials of a connection.

    Credentials:
        token_file: File with the bearer token.
        cert: PEM certificate of this side.
        key: PEM private key of that certificate.
        ca: PEM authority of the other side's certificate.
        insecure_token: Let the token travel in clear beyond loopback.
    """
    from lora.federation.credentials import Credentials
    from lora.federation.keys import read_small

    files = (token_file, cert, key, ca)
    token, *pem = (None if path is None else read_small(path) for path in files)
    text = None if token is None else token.decode("ascii", "replace").strip()
    return Credentials(text, pem[0], pem[1], pem[2], insecure_token)


def deadlines(
    *,
    timeout: Annotated[float, typer.Option(min=0.01)] = 10.0,
    stall: Annotated[float, typer.Option(min=0.01)] = 10.0,
    min_rate: Annotated[float, typer.Option(min=1)] = 1e5,
) -> dict[str, float]:
    """Say how long a peer may take.

    Deadlines:
        timeout: Seconds for an answer.
        stall: Seconds after which a download that receives nothing is cut.
        min_rate: Bytes per second of a download; its deadline follows from its size.
    """
    return {"timeout": timeout, "stall": stall, "min_rate": min_rate}


@command("serve ./cards --port 8815", credentials=credentials)
def serve(
    folder: Path | None = None,
    *,
    live: Path | None = None,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8815,
    host: str = "0.0.0.0",  # noqa: S104 - the local network is served
    announce: bool = True,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535)] = None,
    metrics_host: str = "127.0.0.1",
    as_json: Json = False,
    credentials: Any,
) -> None:
    """Serve a folder of cards to other nodes. It is read-only, and ends when interrupted.

    Args:
        folder: Folder of *.lora.arrow files.
        live: Instead of a folder: that of a skill factory, of which the live versions are served.
        port: Port; 0 for a free one.
        host: Address to serve on; 127.0.0.1 for this machine alone.
        announce: Announce this server on the network by zeroconf.

    Metrics:
        metrics_port: Serve /metrics (Prometheus) and /healthz over HTTP on this port; neither if
            omitted.
        metrics_host: Address of that port.
    """
    from lora.federation.node import Node
    from lora.metrics import serving

    if (folder is None) == (live is None):
        raise ArgumentError("lora serve", "a folder or --live", "both" if live else "neither")
    root = folder if live is None else live / "live"
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    server_node = Node(
        None,
        root,
        host=host,
        port=port,
        credentials=credentials,
        interfaces=None if announce else (),
    )
    with server_node as node, ExitStack() as stack:
        server: Any = node.server
        count = len(server.catalog.cards)
        facts = {"cards": count, "uri": server.uri}
        text = f"serving {count} {'card' if count == 1 else 'cards'} at {server.uri}"
        if metrics_port is not None:
            page = serving(node.metrics, metrics_port, metrics_host, server.health)
            facts["metrics"] = f"http://{metrics_host}:{stack.enter_context(page)}/metrics"
            text += f"\nmetrics at {facts['metrics']}"
        show(Result(facts, text), as_json=as_json)
        sys.stdout.flush()
        ended.wait()


@command(
    "list --peer 192.0.2.7:8815 --json", name="list", credentials=credentials, deadlines=deadlines
)
def list_cards(
    *,
    peer: Peer = None,
    wait: Wait = 3.0,
    peers: bool = False,
    as_json: Json = False,
    credentials: Any,
    deadlines: Any,
) -> Result:
    """List the cards that peers offer. Those named by --peer, or all that are found on the network.

    Args:
        peers: List the peers instead of their cards.
    """
    with _visiting_node(None, peer, wait, credentials=credentials, **deadlines) as node:
        if peers:
            rows = [{"peer": known.uri, "node": known.node_id} for known in node.peers()]
        else:
            offers = _ask_offers(node)
            rows = [_row(offer) for name in sorted(offers) for offer in offers[name]]
    if not rows and not as_json:
        print("nothing found", file=sys.stderr)
    if peers or not rows:
        return Result(rows, table_of(rows) if rows else None)
    return Result(rows, blocks(rows, "name", "version"))


@command(
    "fetch docs --peer 192.0.2.7:8815 --pin 3b7e…", credentials=credentials, deadlines=deadlines
)
def fetch(
    name: str,
    *,
    out: Path | None = None,
    pin: str | None = None,
    trust: list[Path] | None = None,
    allow: list[str] | None = None,
    base_model: str | None = None,
    peer: Peer = None,
    wait: Wait = 3.0,
    cache: Path | None = None,
    credentials: Any,
    deadlines: Any,
) -> Result:
    """Fetch a card, verify it, and keep it in the cache.

    Args:
        name: Name of a card that a peer offers.
        out: Also write the card here; an existing file is replaced.
        pin: Accept the card of this digest alone; it needs no signature.
        trust: PEM public key to trust; may be repeated.
        allow: Waive one refusal: unsigned, older, other_base …; may be repeated.
        base_model: Refuse cards that do not name this base model, in any spelling.
        cache: Folder for fetched cards; the user's cache if omitted.
    """
    from lora.checks import is_digest
    from lora.federation.cache import default_cache
    from lora.federation.credentials import check_location
    from lora.federation.keys import load_public_key
    from lora.federation.node import uri_of
    from lora.federation.trust import Policy, waived
    from lora.files import replacing

    if pin is not None and not is_digest(pin):
        expected = "a SHA-256 as 64 lower-case hex digits"
        raise ArgumentError("--pin", expected, repr(pin), "lora list shows the digests")
    waived(Policy(), allow or [])  # refuses what is no refusal
    for address in peer or ():
        check_location(uri_of(address), credentials, "peers")
    checks_done()
    keys = frozenset(map(load_public_key, trust or []))
    policy = waived(Policy(keys, base_model=base_model), allow or [])
    check_output("--out", out)
    with _visiting_node(
        cache or default_cache(), peer, wait, policy=policy, credentials=credentials, **deadlines
    ) as node:
        _ask_offers(node)
        with progress_bar(f"fetching {name}") as progress:
            card, digest = node.fetch(name, digest=pin, progress=progress)
        file = node.cache.path(digest)
        if out is not None:
            with replacing(out) as copy:
                copy.write(file.read_bytes())
            file = out
    facts = {"name": card.name, "digest": digest, "file": str(file)}
    return Result(facts, f"{file}: card {card.name}, {digest}")


@command("keygen me.pem")
def keygen(file: Path) -> Result:
    """Make an Ed25519 key to sign cards with.

    Args:
        file: New file for the private key; the public one goes to FILE.pub.
    """
    from lora.federation.keys import generate_key

    public = generate_key(file)
    facts = {"private": str(file), "public": f"{file}.pub", "public_key": public}
    return Result(facts, f"{file} (keep it secret), {file}.pub: {public}")


@command("sign docs.lora.arrow --key me.pem", name="sign")
def sign(card: Path, *, key: Path) -> Result:
    """Sign a card. Its signature is written beside it and served.

    Args:
        card: The card.
        key: PEM private key, of `lora keygen`.
    """
    from lora.federation.keys import sign_file, signature_path

    checks_done()
    manifest, file = sign_file(card, key), str(signature_path(card))
    facts = {"file": file, "name": manifest.name, "digest": manifest.digest}
    return Result(facts, f"{file}: {manifest.name} {manifest.digest}")


def _print(problem: object) -> None:
    print(printable(f"no answer: {in_options(str(problem))}"), file=sys.stderr)


@contextmanager
def _visiting_node(
    cache: Path | None, peers: list[str] | None, wait: float, **options: Any
) -> Iterator[Any]:
    """Open a node that serves nothing, once its peers have answered or `wait` seconds are over."""
    from lora.federation.node import Node, uri_of

    named = list(dict.fromkeys(uri_of(peer) for peer in peers or []))
    with Node(cache, peers=named, interfaces=() if named else None, **options) as node:
        checks_done()
        with waiting("looking for peers"):
            node.discovery.wait(wait, len(named) or None)
        errors = node.discovery.errors()
        for uri in set(named) - {peer.uri for peer in node.peers()} - set(errors):
            errors[uri] = PeerError(uri, f"an answer in {wait:g} s", "none yet", "`wait` longer")
        _report(errors, none_works=bool(named) and not node.peers())
        try:
            yield node
        except LoRAError as error:
            for note in getattr(error, "__notes__", ()):  # what other peers answered
                _print(note)
            raise


def _ask_offers(node: Any) -> Any:
    offers = node.sync()
    _report(dict(node.failures), none_works=not offers)
    return offers


def _report(errors: dict[str, LoRAError], *, none_works: bool) -> None:
    last = errors.popitem()[1] if errors and none_works else None
    for error in errors.values():
        _print(error)
    if last is not None:
        raise last


def _row(offer: Any) -> dict[str, Any]:
    manifest = offer.manifest
    row = {
        key: getattr(manifest, key)
        for key in ("name", "version", "rank", "size", "digest", "description", "base_model")
    }
    return {**row, "signer": manifest.signer or None, "peers": list(offer.uris)}
