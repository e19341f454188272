"""What a node shows and asks for at the door: token, certificate, authority; one value for its
server and its clients.

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
        certificate, key: PEM, of this node: a server with these speaks TLS, a client shows them
            where a server asks.
        ca: PEM of the authority that the other side's certificate is checked against. A server with
            one lets in only clients that have such a certificate (mutual TLS); a client without one
            goes by the system's authorities.
        insecure_token: Let the token travel in clear beyond loopback.
    """

    token: str | None = field(default=None, repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    ca: bytes | None = field(default=None, repr=False)
    insecure_token: bool = False

    def __post_init__(self) -> None:
        if self.token is not None and not (
            self.token and self.token.isascii() and self.token.isprintable()
        ):
            raise ArgumentError("credentials: token", "printable ASCII", "another text")
        if (self.certificate is None) != (self.key is None):
            raise ArgumentError("credentials", "certificate and key, or neither", "one of them")


def check_location(location: str, credentials: Credentials) -> bool:
    """Whether a location speaks TLS.

    Raises:
        ArgumentError: If it is no Flight URI, or the token would travel in clear beyond loopback.
    """
    try:
        parts = urllib.parse.urlsplit(location)
        host, _ = parts.hostname or "", parts.port
    except (ValueError, AttributeError):
        parts, host = None, ""
    if parts is None or parts.scheme not in ("grpc", "grpc+tls") or not host:
        raise ArgumentError("location", "grpc://host:port or grpc+tls://host:port", repr(location))
    tls = parts.scheme == "grpc+tls"
    if credentials.token and not tls and not credentials.insecure_token and not is_loopback(host):
        hint = "use grpc+tls://, or insecure_token=True to have it read on the way"
        raise ArgumentError("token", "TLS beyond loopback", location, hint)
    return tls


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def flight_uri(host: str, port: int, *, tls: bool) -> str:
    """The Flight URI of a host and port.

    >>> flight_uri("::1", 5000, tls=False)
    'grpc://[::1]:5000'
    """
    return f"grpc{'+tls' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
