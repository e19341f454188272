"""Load, merge, hot-swap and route LoRA adapters. Reads PEFT folders. Never modifies the base model.

The stub file beside this one lists the public names. Each is imported when it is first used, so
that reading a card does not import torch.
"""

from typing import Any

import lazy_loader

from lora import _renamed

__version__ = "0.2.0"

_renamed.install()

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_RENAMED = {"Energy": "MinEnergy", "Error": "MaxError"}
"""Old names, which warn and end with version 1.0."""


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        import warnings  # noqa: PLC0415 - only for an old name

        message = f"lora.{name} is lora.{_RENAMED[name]} now; the old name ends with version 1.0"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
    return _lazy(_RENAMED.get(name, name))
