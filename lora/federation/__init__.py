"""Federation: cards shared between machines, over Arrow Flight, each verified before it is
believed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.federation.cache import CardCache
    from lora.federation.client import LoRAFlightClient
    from lora.federation.discovery import Discovery
    from lora.federation.node import Node
    from lora.federation.server import LoRAFlightServer
    from lora.federation.trust import Policy

_HOMES = {
    "CardCache": "cache",
    "Discovery": "discovery",
    "LoRAFlightClient": "client",
    "LoRAFlightServer": "server",
    "Node": "node",
    "Policy": "trust",
}

__all__ = ["CardCache", "Discovery", "LoRAFlightClient", "LoRAFlightServer", "Node", "Policy"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora.federation' has no attribute {name!r}")
    return getattr(import_module(f"lora.federation.{_HOMES[name]}"), name)
