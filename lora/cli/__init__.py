"""The command line `lora`: thin commands over the public API, one module for each group of them.

Torch is imported only by commands that run a model; help and completion import no NumPy or Arrow.

Requirements: R25.
"""

import sys

try:
    from lora.cli import cards  # noqa: F401 - adds commands
    from lora.cli.app import main

    if sys.argv[1:2] != ["inspect"]:  # the quick one
        from lora.cli import evolution, federation, models, suite  # noqa: F401 - as above
except KeyboardInterrupt:
    print("lora: interrupted", file=sys.stderr)
    sys.exit(130)

__all__ = ["main"]
