"""R22: a registry knows many versions of many cards, and maps few of them at a time."""

import atexit
import gc
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora.card import LoRACard, LowRank
from lora.checks import version_order
from lora.errors import ConflictError, RegistryFull, UnknownCardError
from lora.files import digest, save
from lora.models.registry import AdapterRegistry
from lora.testing.plugin import requirement

# ---- versions

numbers = st.one_of(st.integers(0, 12), st.sampled_from([99, 100, 10**30]))
words = st.sampled_from(["alpha", "beta", "rc", "rc1", "A", "-", "x-9", "0a"])
prereleases = st.lists(st.one_of(numbers, words), max_size=3)
builds = st.sampled_from(["", "+1", "+linux.x86-64", "+0"])
versions = st.tuples(st.tuples(numbers, numbers, numbers), prereleases, builds)


def text_of(version):
    release, before, build = version
    tail = f"-{'.'.join(map(str, before))}" if before else ""
    return f"{'.'.join(map(str, release))}{tail}{build}"


def is_older(a, b):
    """The standard's rule, clause by clause."""
    if a[0] != b[0]:
        return a[0] < b[0]
    if not a[1] or not b[1]:
        return bool(a[1]) and not b[1]
    for left, right in zip(a[1], b[1], strict=False):
        if left != right:
            if type(left) is type(right):
                return left < right
            return isinstance(left, int)
    return len(a[1]) < len(b[1])


@requirement("R22.3")
@given(a=versions, b=versions, alike=st.integers(0, 3))
def test_versions_come_in_the_order_that_semantic_versioning_gives_them(a, b, alike):
    b = (*a[:alike], *b[alike:])
    assert (version_order(text_of(a)) < version_order(text_of(b))) == is_older(a, b)


# ---- the registry as a state machine

OLDEST_FIRST = ["0.9.0", "1.0.0-rc.9", "1.0.0-rc.10", "1.0.0", "1.10.0", "2.0.0"]


def card_of(name, version, size, value):
    """A card of one module, or of none where size is 0."""
    factors = np.full((size, 1), value, np.float32), np.ones((1, size), np.float32)
    weights = {"q": LowRank(*factors)} if size else {}
    return LoRACard(name, 1, 1.0, ["q"], weights, {"version": version})


POOL = [card_of("a", version, 4, index) for index, version in enumerate(OLDEST_FIRST[:-1])]
POOL += [card_of("b", version, 300, len(version)) for version in ("1.0.0", "2.0.0")]
POOL += [card_of("c", "1.0.0", 0, 0), card_of("d", "1.0.0", 4, 9)]
CARDS = {(card.name, card.metadata["version"]): card for card in POOL}
KEYS = list(CARDS)
OTHER = card_of("a", "1.0.0", 4, 77)


@cache
def folder():
    """Where the cards lie."""
    path = mkdtemp()
    atexit.register(rmtree, path, ignore_errors=True)
    return Path(path).resolve()


@cache
def path_of(card, stem=""):
    path = folder() / f"{stem}{card.name}-{card.metadata['version']}.lora.arrow"
    save(card, path)
    return path


def size_of(key):
    return path_of(CARDS[key]).stat().st_size


HOLDS = {
    "the card": lambda card: card,
    "a view of a factor": lambda card: card.weights["q"].A[1:] if card.weights else card,
    "a card with its factors": lambda card: replace(card, name="x") if card.weights else card,
}
keys = st.sampled_from([*KEYS, ("a", "2.0.0"), ("nobody", "1.0.0")])
sizes = st.sampled_from([1, 2, 10**6])


def descriptors(folder):
    """Count the open files in a folder."""
    count = 0
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            count += handle.readlink().is_relative_to(folder)
    return count


class RegistryMachine(RuleBasedStateMachine):
    """Every operation of a registry against lists of what should be."""

    def __init__(self):
        super().__init__()
        # A folder of its own: what another example left open is not counted.
        self.folder = Path(mkdtemp(dir=folder()))

    def path(self, card, stem=""):
        path = self.folder / f"{stem}{path_of(card, stem).name}"
        if not path.exists():
            path.hardlink_to(path_of(card, stem))
        return path

    @initialize(max_cards=st.integers(1, 4), times=sizes, keys=st.sets(st.sampled_from(KEYS)))
    def start(self, max_cards, times, keys):
        gc.freeze()  # so that only the registry's garbage is collected before it gives up
        self.bounds = max_cards, times * size_of(("b", "2.0.0"))
        self.registry = AdapterRegistry(max_cards=max_cards, max_bytes=self.bounds[1])
        self.registered = {key: self.path(CARDS[key]) for key in KEYS if key not in keys}
        for path in self.registered.values():
            self.registry.register(path)
        self.maps = {}  # a number each -> (name, version), as mapped
        self.kept = {}  # (name, version) -> the number of its map, the least recently used first
        self.held = []  # (the number of a map, whether its card is held itself, what is held)
        self.count = 0

    def teardown(self):
        gc.unfreeze()
        rmtree(self.folder)

    def newest(self, name):
        known = [version for version in OLDEST_FIRST if (name, version) in self.registered]
        return known[-1] if known else None

    def fits(self, key):
        sizes = [size_of(other) for other in [*self.maps.values(), key]]
        return len(sizes) <= self.bounds[0] and sum(sizes) <= self.bounds[1]

    def has_room(self, key):
        """Let go of what nobody holds, the least recently asked for first, until the card fits."""
        for other, number in list(self.kept.items()):
            if self.fits(key):
                break
            holds = [itself for held, itself, _ in self.held if held == number]
            if True not in holds:
                del self.kept[other]
            if not holds:
                del self.maps[number]
        return self.fits(key)

    @rule(key=st.sampled_from(KEYS), known=st.booleans())
    def register(self, key, known):
        path = self.path(CARDS[key])
        entry = self.registry.register(path, digest=digest(path) if known else None)
        assert (entry.key, entry.path) == (key, self.registered.setdefault(key, path))

    @rule()
    def register_equal_content(self):
        key = ("a", "1.0.0")
        path = self.path(CARDS[key], "copy-")
        assert self.registry.register(path).path == self.registered.setdefault(key, path)

    @precondition(lambda self: ("a", "1.0.0") in self.registered)
    @rule()
    def register_other_content(self):
        before = self.registry.entries
        with pytest.raises(ConflictError, match="unregister"):
            self.registry.register(self.path(OTHER, "other-"))
        assert self.registry.entries is before

    @rule(key=keys, all_versions=st.booleans())
    def unregister(self, key, all_versions):
        name, version = key[0], None if all_versions else key[1]
        self.registry.unregister(name, version)
        for other in list(self.registered):
            if other[0] == name and version in (None, other[1]):
                del self.registered[other]
                number = self.kept.pop(other, None)
                if number is not None and all(held != number for held, _, _ in self.held):
                    del self.maps[number]

    @rule(key=keys, newest=st.booleans(), hold=st.none() | st.sampled_from(list(HOLDS)))
    def get(self, key, newest, hold):
        name, version = key[0], None if newest else key[1]
        key = (name, version or self.newest(name))
        if key not in self.registered:
            with pytest.raises(UnknownCardError):
                self.registry.get(name, version)
            return
        if key not in self.kept:
            if not self.has_room(key):
                before = self.registry.mapped
                with pytest.raises(RegistryFull, match="all in use"):
                    self.registry.get(name, version)
                assert set(self.registry.mapped) <= set(before)
                return
            self.count += 1
            self.maps[self.count] = key
            self.kept[key] = self.count
        self.kept[key] = self.kept.pop(key)
        card = self.registry.get(name, version)
        assert card == CARDS[key]
        if hold is not None:
            thing = HOLDS[hold](card)
            self.held.append((self.kept[key], thing is card, thing))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9))
    def give_back(self, index):
        number, _, _ = self.held.pop(index % len(self.held))
        if number not in self.kept.values() and all(held != number for held, _, _ in self.held):
            del self.maps[number]

    @invariant()
    def what_is_mapped_is_within_bounds_and_so_are_descriptors(self):
        mapped = self.registry.mapped
        assert mapped == tuple(self.maps.values())
        assert len(mapped) <= self.bounds[0]
        assert sum(size_of(key) for key in mapped) <= self.bounds[1]
        assert descriptors(self.folder) == sum(bool(CARDS[key].weights) for key in mapped)

    @invariant()
    def what_is_held_is_mapped_and_unharmed(self):
        for number, itself, thing in self.held:
            assert not itself or thing == CARDS[self.maps[number]]

    @invariant()
    def it_knows_what_is_registered_from_the_oldest_to_the_newest(self):
        entries = [entry for known in self.registry.entries.values() for entry in known]
        assert {entry.key: entry.path for entry in entries} == self.registered
        for name, known in self.registry.entries.items():
            order = [version for version in OLDEST_FIRST if (name, version) in self.registered]
            assert [entry.version for entry in known] == order


RegistryMachine.TestCase.settings = settings(stateful_step_count=30)
TestRegistry = requirement("R22.3")(RegistryMachine.TestCase)
