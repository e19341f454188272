"""Exchange with other LoRA formats: PEFT directories, and safetensors files."""

from importlib import import_module
from typing import Any

__all__ = ["peft", "safetensors"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lora.interop' has no attribute {name!r}")
    return import_module(f"lora.interop.{name}")
