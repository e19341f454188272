"""Every error this library raises on purpose: it names where, what was expected and what was found.

Each kind is also the built-in exception that a caller would guess, so ``except ValueError`` works
as well as ``except LoRAError``.

Requirements: R7.
"""

from typing import Any


class LoRAError(Exception):
    """Base of every error raised on purpose.

    Args:
        where: The thing at fault: a card and field, a module, a file.
        expected, found: What the rule asks for, and what was there instead.
        hint: What to do about it, where there is something to do.

    Examples:
        >>> print(CardError("card 'docs': rank", "an integer >= 1", -1))
        card 'docs': rank: expected an integer >= 1, found -1
    """

    def __init__(self, where: str, expected: object, found: object, hint: str = "") -> None:
        self.where, self.expected, self.found, self.hint = (
            where,
            _text(expected),
            _text(found),
            hint,
        )
        super().__init__(str(self))

    def __str__(self) -> str:
        tail = f"; {self.hint}" if self.hint else ""
        return f"{self.where}: expected {self.expected}, found {self.found}{tail}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where, self.expected, self.found, self.hint)


def shown(value: object, limit: int = 200) -> str:
    """The repr of a value for an error message, whatever that repr does and however long it is.

    Examples:
        >>> shown(10**5000), shown("docs"), shown("x" * 9, limit=4)
        ('an int without a repr', "'docs'", "'xxx…")
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - an integer of 5,000 digits, a cycle, a foreign class: the error must still be raised
        kind = type(value).__name__
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} without a repr"
    return text if len(text) <= limit else f"{text[:limit]}…"


def _text(value: object) -> str:
    return str(value) or repr(value)


class CardError(LoRAError, ValueError):
    """A card's contents break a rule of the card."""


class CardFileError(CardError):
    """A file is not a well-formed card, or not the card that was asked for."""


class CardNotFoundError(LoRAError, FileNotFoundError):
    """There is no card file (or folder) at the path."""


class StoreError(LoRAError, OSError):
    """The operating system refused to read or write a file."""


class ShapeError(LoRAError, ValueError):
    """Factors, inputs or models do not fit each other's shapes."""


class TargetError(LoRAError, LookupError):
    """A card names modules that the model does not have, or names them ambiguously."""


class BaseModelError(LoRAError, ValueError):
    """A card was made for another base model."""


class UnsupportedModelError(LoRAError, TypeError):
    """The model can't be adapted or loaded soundly."""


class ConflictError(LoRAError, ValueError):
    """Two different cards carry one name."""


class UnknownCardError(LoRAError, KeyError):
    """No card of that name is known here."""


class ArgumentError(LoRAError, ValueError):
    """An argument is outside its range or of the wrong kind."""


class StateError(LoRAError, RuntimeError):
    """The call is not possible in the present state."""


class RegistryFull(StateError):  # noqa: N818 - named in the specification
    """A registry may map no further card: all that it has mapped are in use."""


class DataError(LoRAError, ValueError):
    """Training data is empty, malformed or too small."""


class MissingPackageError(LoRAError, ImportError):
    """An optional package is not installed."""


class PeerError(LoRAError, ConnectionError):
    """A peer is not there, too slow, broke off, or does not speak as it should."""


class RefusedError(LoRAError, ValueError):
    """Base of every reason not to accept a card from a peer."""


class ManifestError(RefusedError):
    """What a peer announces is not a well-formed manifest."""


class BadNameError(RefusedError):
    """A card's name is none that is accepted from outside."""


class MismatchError(RefusedError):
    """The bytes, or the card in them, are not what was announced."""


class UnsignedError(RefusedError):
    """A card is neither signed nor pinned."""


class SignatureError(RefusedError):
    """A signature does not hold."""


class UnknownSignerError(RefusedError):
    """A card is signed by a key that is not trusted."""


class OlderVersionError(RefusedError):
    """A card is older than one of its name and signer that was accepted before."""


class NonFiniteError(RefusedError):
    """A card holds NaN or an infinity."""


class AbsurdNormError(RefusedError):
    """A card's ΔW is larger than any skill is."""
