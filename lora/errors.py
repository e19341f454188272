"""Every error that this library raises on purpose, and its one warning.

Each error is also the built-in exception that a caller would guess.

Requirements: R7.
"""

from typing import Any


class LoRAError(Exception):
    """Base of every error raised on purpose.

    Args:
        where: A card and field, a module, or a file.
        expected: What the rule asks for.
        found: What was there instead; an error of the operating system is told in its own words.
        hint: What to do about it.

    Examples:
        >>> print(CardError("card 'docs': rank", "an integer >= 1", -1))
        card 'docs': rank: expected an integer >= 1, found -1
    """

    def __init__(self, where: str, expected: object, found: object, hint: str = "") -> None:
        self.where, self.hint = where, hint
        words = found.strerror if isinstance(found, OSError) else None
        self._is_os_error = bool(words)
        if words:
            found = words.lower()
        self.expected, self.found = (str(value) or repr(value) for value in (expected, found))
        super().__init__(str(self))

    def __str__(self) -> str:
        tail = f"; {self.hint}" if self.hint else ""
        if self._is_os_error:
            return f"{self.where}: {self.found} (expected {self.expected}){tail}"
        return f"{self.where}: expected {self.expected}, found {self.found}{tail}"

    def __reduce__(self) -> tuple[Any, ...]:
        problem = OSError(0, self.found) if self._is_os_error else self.found
        return type(self), (self.where, self.expected, problem, self.hint)


def shown(value: object, limit: int = 200) -> str:
    """Return the repr of a value for an error message, cut to `limit` characters.

    Examples:
        >>> shown(10**5000), shown("docs"), shown("x" * 9, limit=4)
        ('an int without a repr', "'docs'", "'xxx…")
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the error must be raised whatever the value does
        kind = type(value).__name__
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} without a repr"
    return text if len(text) <= limit else f"{text[:limit]}…"


class CardError(LoRAError, ValueError):
    """A card breaks a rule."""


class CardFileError(CardError):
    """A file is not a well-formed card, or not the requested one."""


class CardNotFoundError(LoRAError, FileNotFoundError):
    """The card file or folder does not exist."""


class StoreError(LoRAError, OSError):
    """The operating system refused to read or write a file."""


class ShapeError(LoRAError, ValueError):
    """The shapes of factors, inputs or models do not fit."""


class TargetError(LoRAError, LookupError):
    """A card names modules that are missing or ambiguous."""


class BaseModelError(LoRAError, ValueError):
    """A card was made for another base model."""


class UnboundWarning(UserWarning):
    """A card binds only in part, or a file that is being written would leave adapters out."""


class UnsupportedModelError(LoRAError, TypeError):
    """The model can't be adapted or loaded soundly."""


class ConflictError(LoRAError, ValueError):
    """Two different cards have one name."""


class UnknownCardError(LoRAError, KeyError):
    """No card has that name."""


class ArgumentError(LoRAError, ValueError):
    """An argument has a wrong value or type."""


class StateError(LoRAError, RuntimeError):
    """The call is not possible now."""


class RegistryFull(StateError):  # noqa: N818 - named in the specification
    """All cards that a registry maps are in use."""


class DataError(LoRAError, ValueError):
    """Training data is empty, malformed or too small."""


class MissingPackageError(LoRAError, ImportError):
    """An optional package is not installed."""


class PeerError(LoRAError, ConnectionError):
    """A peer is unreachable, slow or wrong."""


class RefusedError(LoRAError, ValueError):
    """Base of every reason to refuse a peer's card."""


class ManifestError(RefusedError):
    """A manifest is malformed."""


class BadNameError(RefusedError):
    """A card's name is not acceptable from a peer."""


class MismatchError(RefusedError):
    """The card is not the announced one."""


class UnsignedError(RefusedError):
    """A card is neither signed nor pinned."""


class SignatureError(RefusedError):
    """A signature is invalid."""


class UnknownSignerError(RefusedError):
    """A card's signer is not trusted."""


class OlderVersionError(RefusedError):
    """A later version of the card was accepted before."""


class NonFiniteError(RefusedError):
    """A card contains NaN or an infinity."""


class AbsurdNormError(RefusedError):
    """A card's ΔW is absurdly large."""
