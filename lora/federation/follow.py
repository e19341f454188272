"""Follows a folder of cards that others change: what is new, changed or gone is handed over.

Requirements: R19.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from lora.card import LoRACard
from lora.checks import version_order
from lora.errors import ConflictError, LoRAError
from lora.federation.catalog import UNREAD, Catalog, Served, card_files, scan
from lora.files import PathLike, as_path, load

log = logging.getLogger(__name__)

TICK = 10**9
"""Nanoseconds after which a folder that changes again has another time of change."""


class Followed:
    """The cards of a folder: of each name the highest version, as it is at each `refresh`.

    Args:
        folder: A folder of card files, which are replaced by renames.
        take: Called with a card that is new or has changed; an error leaves what was there.
        forget: Called with the name of a card that is gone.
    """

    def __init__(
        self, folder: PathLike, take: Callable[[LoRACard], None], forget: Callable[[str], None]
    ) -> None:
        self._folder, self._take, self._forget = as_path(folder).absolute(), take, forget
        self._catalog, self._time = Catalog(), 0
        self._seen, self._again = dict[str, Served](), set[str]()
        self._lock = threading.Lock()
        self._catalog = scan(card_files(self._folder), self._catalog)
        self._hand_over(refused=ConflictError)

    def refresh(self) -> None:
        """Hand over what has changed since the last look. The reasons of what fails are logged."""
        with self._lock:
            try:
                changed = self._folder.stat().st_mtime_ns
                if changed == self._time:
                    return
                # A folder's clock may tick slower than two changes follow each other.
                is_settled = time.time_ns() - changed > TICK
                self._time = 0  # until all is handed over
                self._catalog = scan(card_files(self._folder), self._catalog)
            except OSError as error:
                log.warning("not followed: %s", error)
                return
            if self._hand_over() and is_settled:
                self._time = changed

    def _hand_over(self, refused: type[LoRAError] | tuple[()] = ()) -> bool:
        """Return whether no file and no card is to be tried again at the next look."""
        names = by_name(self._catalog)
        for name, cards in names.items():
            try:
                card = newest(cards)
                old, self._seen[name] = self._seen.get(name), card
                if old is None or old.manifest != card.manifest or name in self._again:
                    self._again.discard(name)
                    self._take(load(card.path, verify=card.manifest.digest))
            except refused:
                raise
            except Exception as error:  # noqa: BLE001 - of an encoder, or a warning made an error
                log.warning("card %r stays as it was: %s", name, error)
                if isinstance(error, OSError) or not isinstance(error, LoRAError):
                    self._again.add(name)  # it is not the card's own fault
        unread = {path for (path, *_), card in self._catalog.files.items() if card is None}
        for name in self._seen.keys() - names.keys():
            if self._seen[name].path not in unread:
                del self._seen[name]
                self._again.discard(name)
                self._forget(name)
        return not self._again and all(stamp != UNREAD for _, stamp, _ in self._catalog.files)


def by_name(catalog: Catalog) -> dict[str, list[Served]]:
    """Return the cards of each name, the lowest version first."""
    names = dict[str, list[Served]]()
    for card in catalog.cards.values():
        names.setdefault(card.manifest.name, []).append(card)
    return names


def newest(cards: Sequence[Served]) -> Served:
    """Return the last card of one name, of which the lowest version comes first.

    Raises:
        ConflictError: Another one has the highest version, too.
    """
    *others, card = cards
    version = card.manifest.version
    if others and version_order(others[-1].manifest.version) == version_order(version):
        where = f"{card.path}: {card.manifest.name!r} {version}"
        problem = f"other content in {others[-1].path.name!r}"
        raise ConflictError(where, "one card per name and version", problem, "remove one")
    return card
