"""How an engine learns: data sets, training, and where a model's layers work."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.evolution.data import Pairs
    from lora.evolution.probe import WeightMapProbe
    from lora.evolution.train import LoRATrainer

_HOMES = {"LoRATrainer": "train", "Pairs": "data", "WeightMapProbe": "probe"}

__all__ = ["LoRATrainer", "Pairs", "WeightMapProbe"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora.evolution' has no attribute {name!r}")
    return getattr(import_module(f"lora.evolution.{_HOMES[name]}"), name)
