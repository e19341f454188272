"""Credentials: the token, certificate and authority that a node shows and asks for.

Requirements: R11.
"""

import ipaddress
import urllib.parse
from dataclasses import dataclass, field

from lora.errors import ArgumentError


@dataclass(frozen=True)
class Credentials:
    """Who a node is, and whom it talks to. None of it is ever logged.

    Args:
        token: A bearer token: a server asks for it, a client sends it.
        certificate, key: PEM of this node. A server with these speaks TLS; a client shows them.
        ca: PEM of the authority that checks the other side. With it a server asks its clients for
            a certificate (mutual TLS). Without it a client uses the system's authorities.
        insecure_token: Let the token travel in clear beyond loopback.
    """

    token: str | None = field(default=None, repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    ca: bytes | None = field(default=None, repr=False)
    insecure_token: bool = False

    def __post_init__(self) -> None:
        token = "token" if self.token is None else self.token
        if not (token and token.isascii() and token.isprintable()):
            raise ArgumentError("credentials: token", "printable ASCII", "another text")
        if (self.certificate is None) != (self.key is None):
            raise ArgumentError("credentials", "both certificate and key, or neither", "only one")


def check_location(location: str, credentials: Credentials) -> bool:
    """Return whether a Flight URI uses TLS.

    Raises:
        ArgumentError: It is no Flight URI, or the token would travel in clear beyond loopback.
    """
    try:
        parts = urllib.parse.urlsplit(location)
        tls = {"grpc": False, "grpc+tls": True}[parts.scheme]
        host, _ = parts.hostname or "", parts.port
    except (ValueError, AttributeError, LookupError):
        host, tls = "", False
    if not host:
        raise ArgumentError("location", "grpc://host:port or grpc+tls://host:port", repr(location))
    if credentials.token and not (tls or credentials.insecure_token or is_loopback(host)):
        hint = "use grpc+tls://, or insecure_token=True to let others on the way read it"
        raise ArgumentError("token", "TLS beyond loopback", location, hint)
    return tls


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
