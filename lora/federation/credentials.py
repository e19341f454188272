"""The token, certificates and addresses of a node's connections.

Requirements: R11.
"""

import ipaddress
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from lora.errors import ArgumentError


@dataclass(frozen=True, repr=False)
class Credentials:
    """Who a node is, and whom it talks to. No repr, so that none of it is logged.

    Args:
        token: A server asks for it, a client sends it.
        certificate, key: PEM of this node. A server needs them for TLS, a client for mutual TLS.
        ca: PEM of the other side's authority. With it, a server asks for certificates.
        insecure_token: Let the token travel in clear beyond loopback.
    """

    token: str | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    ca: bytes | None = None
    insecure_token: bool = False

    def __post_init__(self) -> None:
        token = "token" if self.token is None else self.token
        if not (token and token.isascii() and token.isprintable()):
            raise ArgumentError("credentials: token", "printable ASCII", "another text")
        if (self.certificate is None) != (self.key is None):
            raise ArgumentError("credentials", "both certificate and key, or neither", "only one")
        try:
            for pem in filter(None, (self.ca, self.certificate)):
                certificates = x509.load_pem_x509_certificates(pem)
            private = self.key and load_pem_private_key(self.key, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # which could quote the key
            expected = "certificates and a private key in PEM, without a passphrase"
            raise ArgumentError("credentials", expected, "other content") from None
        if private and private.public_key() != certificates[0].public_key():
            expected = "the private key of the certificate"
            raise ArgumentError("credentials: key", expected, "that of another one")


def check_location(
    location: str, credentials: Credentials, where: str = "location"
) -> tuple[bool, str, int]:
    """Return whether a Flight URI uses TLS, its host and its port.

    Raises:
        ArgumentError: It is no Flight URI, or the token would travel in clear beyond loopback.
    """
    host, port, tls = "", 0, location.lower().startswith("grpc+tls:")
    with suppress(ValueError):
        parts = urllib.parse.urlsplit(location)
        host, port = parts.hostname or "", parts.port or 0
    # Nothing but these parts: gRPC would ignore a path or a user, and choose a missing port itself.
    if not host or location.lower() != flight_uri(host, port, tls=tls).lower():
        expected = "grpc://host:port or grpc+tls://host:port, with a port below 65536"
        raise ArgumentError(where, expected, repr(location))
    if credentials.token and not (tls or credentials.insecure_token or is_loopback(host)):
        hint = "use grpc+tls://, or let others on the way read it: `insecure_token=True`"
        raise ArgumentError("token", "TLS beyond loopback", location, hint)
    return tls, host, port


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine and nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def flight_uri(host: str, port: int, *, tls: bool) -> str:
    """Return the Flight URI of a host and port.

    >>> flight_uri("::1", 5000, tls=False)
    'grpc://[::1]:5000'
    """
    return f"grpc{'+tls' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
