"""The one reference by which a manager, a router or an engine has its immutable state.

An engine shares its reference with its manager and its router.

Requirements: R3, R5, R22.
"""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, NoReturn, TypeVar

from lora.errors import StateError

S_co = TypeVar("S_co", covariant=True)


class Uncopied:
    """Refuses to be pickled or copied: locks, sockets and mapped files stay in their process."""

    def __reduce__(self) -> NoReturn:
        hint = "pass the model's folder and the card files, and make another one there"
        where, expected = type(self).__name__, "use in the process that made it"
        raise StateError(where, expected, "a request to copy or pickle it", hint)


class StateReference(Generic[S_co]):
    """A reference to a frozen dataclass.

    Readers take `value` once and work on that snapshot. Writers hold `lock`, do all that can fail,
    and then call `replace` once.
    """

    def __init__(self, value: S_co) -> None:
        self.value = value
        self.lock = threading.RLock()

    def replace(self, **changes: Any) -> None:
        """Replace the value by one with these fields changed, in one assignment."""
        with self.lock:
            if any(getattr(self.value, name) is not new for name, new in changes.items()):
                self.value = replace(self.value, **changes)  # type: ignore[type-var]


def log_safely(write: Callable[..., None], message: str, *args: object) -> None:
    """Log what was done; a logging filter or handler that fails can't undo it."""
    with contextlib.suppress(Exception):
        write(message, *args, stacklevel=2)
