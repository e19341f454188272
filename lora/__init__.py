"""LoRA adapters as values: a card is a value, adapting is a function, state is one reference that
is replaced.

The public names, imported when first used, so that reading a card never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.batches import encode_batches
    from lora.card import AdapterSet, FrozenJSON, LoRACard, LowRank, interpolate
    from lora.engine import ArrowEngine, Encoding
    from lora.errors import LoRAError
    from lora.extract import Energy, Error, extract_delta, extract_direct
    from lora.inference.encoder import InferenceCore
    from lora.inference.manager import LoRAManager
    from lora.inference.registry import AdapterRegistry
    from lora.inference.router import LoRARouter
    from lora.layer import LoRALinear
    from lora.merging import merge
    from lora.presets import LoRAConfig
    from lora.rewrite import adapt, fingerprint, fold, uncalled
    from lora.routing import Calibration, Route, calibrate
    from lora.store import digest, inspect, load, save
    from lora.table import Header, card_to_table, table_to_card
    from lora.targets import Injection

__version__ = "0.1.0"

_HOMES = {
    "AdapterSet": "card",
    "FrozenJSON": "card",
    "LoRACard": "card",
    "LowRank": "card",
    "interpolate": "card",
    "LoRAError": "errors",
    "Energy": "extract",
    "Error": "extract",
    "extract_delta": "extract",
    "extract_direct": "extract",
    "merge": "merging",
    "LoRAConfig": "presets",
    "Header": "table",
    "card_to_table": "table",
    "table_to_card": "table",
    "Injection": "targets",
    "Calibration": "routing",
    "Route": "routing",
    "calibrate": "routing",
    "digest": "store",
    "inspect": "store",
    "load": "store",
    "save": "store",
    "LoRALinear": "layer",
    "adapt": "rewrite",
    "fingerprint": "rewrite",
    "fold": "rewrite",
    "uncalled": "rewrite",
    "InferenceCore": "inference.encoder",
    "LoRAManager": "inference.manager",
    "AdapterRegistry": "inference.registry",
    "LoRARouter": "inference.router",
    "ArrowEngine": "engine",
    "Encoding": "engine",
    "encode_batches": "batches",
}

_ROOMS = ("evolution", "federation", "inference", "interop", "merging")
"""Subpackages, and a module of values, that are had as attributes without an import of their own."""

__all__ = [
    "AdapterRegistry",
    "AdapterSet",
    "ArrowEngine",
    "Calibration",
    "Encoding",
    "Energy",
    "Error",
    "FrozenJSON",
    "Header",
    "InferenceCore",
    "Injection",
    "LoRACard",
    "LoRAConfig",
    "LoRAError",
    "LoRALinear",
    "LoRAManager",
    "LoRARouter",
    "LowRank",
    "Route",
    "adapt",
    "calibrate",
    "card_to_table",
    "digest",
    "encode_batches",
    "extract_delta",
    "extract_direct",
    "fingerprint",
    "fold",
    "inspect",
    "interpolate",
    "load",
    "merge",
    "save",
    "table_to_card",
    "uncalled",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"lora.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    value = getattr(import_module(f"lora.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
