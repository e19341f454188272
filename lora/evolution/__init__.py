"""Learn new skills: notice what is unknown, train a card, examine it, and keep what helps."""

from importlib import import_module
from typing import Any

import lazy_loader

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Return a public name; those of `lora.training` are offered here as well."""
    training = import_module("lora.training")
    return getattr(training, name) if name in training.__all__ else _lazy(name)
