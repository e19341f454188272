"""The other side in the federation's tests: cards, certificates, a lying server, a bad line."""

import contextlib
import datetime as dt
import socket
import subprocess
import sys
import threading
import time

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from pyarrow import flight

import lora
from lora.card import LoRACard, LowRank
from lora.federation.credentials import Credentials
from lora.federation.manifest import manifest_of
from lora.federation.trust import Policy, public_key, sign

AUTHOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
ANY = Policy(allow_unsigned=True)
TRUSTING = Policy(frozenset({public_key(AUTHOR)}))


def made(name="docs", size=64, rank=2, base_model=None, modules=1, **metadata):
    """A card of about ``8 * size * rank * modules`` bytes."""
    rng = np.random.default_rng(len(name))
    weights = {
        f"layer.{i}.query": LowRank(
            rng.normal(0, size**-0.5, (size, rank)).astype(np.float32),
            rng.normal(0, size**-0.5, (rank, size)).astype(np.float32),
        )
        for i in range(modules)
    }
    return LoRACard(name, rank, 2.0 * rank, ("query",), weights, metadata, base_model)


def saved(card, folder):
    """The digest of the card, saved under its name."""
    return lora.save(card, folder / f"{card.name}.lora.arrow")


def announced(card, path, key=None):
    """The manifest of a card's file, signed if there is a key."""
    manifest = manifest_of(card, lora.save(card, path), path.stat().st_size)
    return manifest if key is None else sign(manifest, key)


def emptied(cache):
    """Delete the cards in a cache, as its user may at any moment."""
    for digest in cache.digests():
        cache.path(digest).unlink()


def until(holds, seconds=30):
    """Wait until this holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


SERVER = """
import sys, threading
from lora.federation.server import LoRAFlightServer
with LoRAFlightServer(sys.argv[1]) as server:
    print(server.uri, flush=True)
    threading.Event().wait()
"""


@contextlib.contextmanager
def serving_process(folder):
    """A process that serves a folder, and its URI."""
    command = [sys.executable, "-c", SERVER, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


class Liar(flight.FlightServerBase):
    """A server that sends what it is told: bytes, or a function that yields pieces."""

    def __init__(self, manifests=(), data=b"", location="grpc://127.0.0.1:0"):
        super().__init__(location)
        self.manifests, self.data, self.uri = list(manifests), data, f"grpc://127.0.0.1:{self.port}"
        self.version = [b"{}"]

    def do_action(self, context, action):
        if action.type == "list":
            return (item if isinstance(item, bytes) else item.to_json() for item in self.manifests)
        if action.type == "version":
            return iter(self.version)
        data = self.data
        if isinstance(data, dict):
            data = data[action.body.to_pybytes().decode()]
        if callable(data):
            return data()
        return (data[at : at + 2**20] for at in range(0, len(data), 2**20))


class Line:
    """A TCP proxy in front of a server that can be cut, silenced, or limited to some bytes.

    With `connect` it first answers a request to CONNECT, as the proxies that `http_proxy` names.
    """

    def __init__(self, port, *, connect=False):
        self.target, self.silent, self.ended, self.limit, self.pairs = port, False, False, None, []
        self.connect, self.seen = connect, bytearray()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.uri = f"grpc://127.0.0.1:{self.port}"
        self.threads = []
        self._start(self._accept)

    def _start(self, work, *args):
        self.threads.append(threading.Thread(target=work, args=args, daemon=True))
        self.threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                if self.connect:
                    self.seen += near.recv(65536)
                    near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                self.pairs.append((near, far))
                for source, sink in ((near, far), (far, near)):
                    self._start(self._pump, source, sink, sink is near)

    def _pump(self, source, sink, back):
        sent = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while self.silent and source.fileno() >= 0 and not self.ended:
                    time.sleep(0.02)
                if back and self.limit is not None and sent + len(data) > self.limit:
                    break
                sink.sendall(data)
                self.seen += data
                sent += len(data) if back else 0
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """End every connection."""
        for pair in self.pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended = True
        self.listener.shutdown(socket.SHUT_RDWR)
        self.threads[0].join()
        self.listener.close()
        self.cut()
        for thread in self.threads:
            thread.join()
        for pair in self.pairs:
            for end in pair:
                end.close()


@contextlib.contextmanager
def listening(answer=b""):
    """A port where each caller gets these bytes, and then silence."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    connection.sendall(answer)

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield f"grpc://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        for connection in connections:
            connection.close()


class Authority:
    """A certificate authority, and what it issues."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.pem = self._issued(self.name, self.key, authority=True).public_bytes(Encoding.PEM)

    def credentials(self, *, days=(-1, 1), hosts=("localhost",), **options):
        """Credentials with a certificate for these hosts, valid between two days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        certificate = self._issued(name, key, authority=False, days=days, hosts=hosts)
        certificate = certificate.public_bytes(Encoding.PEM)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Credentials(certificate=certificate, key=private, **{"ca": self.pem, **options})

    def _issued(self, name, key, *, authority, days=(-1, 1), hosts=()):
        now = dt.datetime.now(dt.UTC)
        start, end = (now + dt.timedelta(days=day) for day in days)
        constraints = x509.BasicConstraints(ca=authority, path_length=None)
        builder = x509.CertificateBuilder(self.name, name, key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(start).not_valid_after(end)
        names = x509.SubjectAlternativeName(map(x509.DNSName, hosts))
        builder = builder.add_extension(names, critical=False)
        return builder.add_extension(constraints, critical=True).sign(self.key, hashes.SHA256())
