"""The registry: few descriptors for many cards, what is in use, files that are gone or changed."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from torch import nn

from lora.arrow_format import card_to_table
from lora.card import LoRACard, LowRank
from lora.errors import (
    ArgumentError,
    CardFileError,
    CardNotFoundError,
    ConflictError,
    RegistryFull,
    StateError,
    StoreError,
    UnknownCardError,
)
from lora.files import digest, save
from lora.models import registry as registry_module
from lora.models.manager import LoRAManager
from lora.models.registry import AdapterRegistry
from lora.presets import CardInfo
from lora.testing.plugin import requirement
from tests.properties.test_r22_registry import descriptors


def card_of(name="docs", value=1, size=4, **metadata):
    pair = LowRank(np.full((size, 1), value, np.float32), np.ones((1, size), np.float32))
    return LoRACard(name, 1, 1.0, ["0"], {"0": pair}, metadata)


@pytest.fixture
def written(tmp_path):
    """A function that writes a card and returns its path."""

    def write(card, stem=None):
        path = tmp_path / f"{stem or card.name}.lora.arrow"
        save(card, path)
        return path

    return write


@pytest.fixture
def registry_of(written):
    """A function that makes a registry of cards with these names."""

    def make(names, **bounds):
        registry = AdapterRegistry(**bounds)
        for value, name in enumerate(names):
            registry.register(written(card_of(name, value)))
        return registry

    return make


def maps_of(folder):
    return sum(f" {folder}" in line for line in Path("/proc/self/maps").read_text().splitlines())


# ---- bounds


@requirement("R22.3")
def test_a_thousand_cards_are_registered_by_header_and_few_descriptors_are_open(tmp_path):
    registry = AdapterRegistry(max_cards=20)
    for index in range(1000):
        path, table = tmp_path / f"{index}", card_to_table(card_of(f"card {index}", index))
        with path.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)  # `save` would wait for the disk
        registry.register(path)
    assert len(registry.entries) == 1000
    assert (registry.mapped, descriptors(tmp_path), maps_of(tmp_path)) == ((), 0, 0)
    cards = [registry.get(f"card {index}") for index in range(5)]
    for index in range(1000):
        assert registry.get(f"card {index}").weights["0"].A[0, 0] == index
        assert len(registry.mapped) == min(20, max(5, index + 1))
        if index % 50 == 0:
            assert descriptors(tmp_path) == maps_of(tmp_path) == len(registry.mapped)
    assert all(registry.get(f"card {index}") is cards[index] for index in range(5))
    del registry, cards
    assert descriptors(tmp_path) == maps_of(tmp_path) == 0


@requirement("R22.3")
def test_a_registry_that_is_full_of_what_is_in_use_says_so_and_what_to_do(registry_of):
    registry = registry_of("abc", max_cards=2, max_bytes=2**20)
    cards = [registry.get("a"), registry.get("b")]
    message = r"get 'c' 0.1.0: .* max_cards=2, max_bytes=1048576, found 2 cards .*; deactivate"
    with pytest.raises(RegistryFull, match=message) as caught:
        registry.get("c")
    assert isinstance(caught.value, StateError)
    assert cards == [registry.get("a"), registry.get("b")]
    del cards[0]
    assert registry.get("c").name == "c"
    assert [name for name, _ in registry.mapped] == ["b", "c"]


@requirement("R22.3")
def test_a_file_that_can_never_fit_is_refused_at_once(written):
    path = written(card_of())
    size = path.stat().st_size
    assert AdapterRegistry(max_bytes=size).register(path).nbytes == size
    with pytest.raises(RegistryFull, match=f"at most {size - 1} bytes, found {size}; raise"):
        AdapterRegistry(max_bytes=size - 1).register(path)


@requirement("R22.3")
@pytest.mark.parametrize("bound", [0, -1, 1.5, "8", None, True])
def test_bounds_are_positive_integers(bound):
    for name in ("max_cards", "max_bytes"):
        with pytest.raises(ArgumentError, match=f"{name}: expected an integer >= 1"):
            AdapterRegistry(**{name: bound})


# ---- what is in use


@requirement("R22.3")
def test_an_active_card_is_in_use_and_a_cycle_of_garbage_is_not(registry_of):
    registry = registry_of(["docs", "law"], max_cards=1)
    manager = LoRAManager(nn.Sequential(nn.Linear(4, 4)))
    manager.apply_card(registry.get("docs"))
    with pytest.raises(RegistryFull):
        registry.get("law")
    manager.remove_card("docs")
    cycle = [registry.get("law")]
    cycle.append(cycle)
    del cycle
    assert registry.get("docs").name == "docs"


@requirement("R22.3")
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_card_of_which_one_factor_is_held_is_in_use(registry_of, factor):
    registry = registry_of(["docs", "law"], max_cards=1)
    (pair,) = registry.get("docs").weights.values()
    array = getattr(pair, factor)
    del pair
    with pytest.raises(RegistryFull):
        registry.get("law")
    del array
    assert registry.get("law").name == "law"


@requirement("R22.3")
def test_a_snapshot_never_changes_and_keeps_nothing_mapped(registry_of, written, tmp_path):
    registry = registry_of(["docs"])
    registry.get("docs")
    before = registry.entries
    registry.register(written(card_of("law")))
    assert (list(before), list(registry.entries)) == (["docs"], ["docs", "law"])
    with pytest.raises(TypeError):
        before["docs"] = ()
    del registry
    assert descriptors(tmp_path) == 0


# ---- names and versions


@requirement("R22.3")
def test_a_card_without_a_version_has_the_default_one_and_a_version_can_be_given(written):
    registry = AdapterRegistry()
    first, second = written(card_of()), written(card_of(value=2, version="as of May"), "second")
    assert registry.register(first).version == CardInfo().version
    message = r"second.*version: expected a semantic version .* 'as of May'; pass version="
    with pytest.raises(ArgumentError, match=message):
        registry.register(second)
    assert registry.register(second, version="1.0.0").key == ("docs", "1.0.0")
    assert registry.get("docs").weights["0"].A[0, 0] == 2
    for version in ("1.0", "01.0.0", 3, ""):
        with pytest.raises(ArgumentError, match="semantic"):
            registry.register(second, version=version)


@requirement("R22.3")
@pytest.mark.parametrize("order", [("1.0.0+1", "1.0.0+2"), ("1.0.0+2", "1.0.0+1")])
def test_of_versions_that_differ_in_build_metadata_the_last_by_text_is_newest(written, order):
    registry = AdapterRegistry()
    for version in order:
        registry.register(written(card_of(value=int(version[-1]), version=version), version))
    assert registry.get("docs").weights["0"].A[0, 0] == 2
    assert registry.get("docs", "1.0.0+1").weights["0"].A[0, 0] == 1


@requirement("R22.3")
def test_an_unknown_card_or_version_is_named(registry_of):
    registry = registry_of(["docs"])
    with pytest.raises(UnknownCardError, match="'law': expected a registered card, found none"):
        registry.get("law")
    with pytest.raises(UnknownCardError, match=r"'docs' '3.0.0': .*, found only .*0\.1\.0"):
        registry.get("docs", "3.0.0")
    for operation in (registry.get, registry.entry, registry.unregister):
        with pytest.raises(ArgumentError, match="text"):
            operation(["docs"])


@requirement("R22.3")
def test_the_same_content_registers_twice_and_other_content_is_a_conflict(written):
    registry = AdapterRegistry()
    first = written(card_of())
    entry = registry.register(first)
    copy, other = written(card_of(), "copy"), written(card_of(value=2), "other")
    assert registry.register(first) is registry.register(copy) is entry
    assert registry.register(copy, digest=digest(first)) is entry
    for path, known in ((other, None), (other, digest(other)), (first, digest(other))):
        with pytest.raises(ConflictError, match=r"'docs' 0\.1\.0: .*pass version=, or unregister"):
            registry.register(path, digest=known)
    first.unlink()  # what it was can no longer be compared
    with pytest.raises(CardNotFoundError, match=str(first)):
        registry.register(copy)
    registry.unregister("docs")
    assert registry.register(copy).path == copy


# ---- files


@requirement("R22.3")
def test_a_file_that_is_gone_or_changed_since_it_was_registered_is_a_named_error(written):
    registry = AdapterRegistry()
    path = written(card_of())
    registry.register(path)
    written(card_of(value=2))
    message = r"docs\.lora\.arrow: expected the registered file.*register it again"
    with pytest.raises(CardFileError, match=message):
        registry.get("docs")
    path.unlink()
    with pytest.raises(CardNotFoundError, match=r"docs\.lora\.arrow"):
        registry.get("docs")
    assert registry.mapped == ()


@requirement("R22.3")
@pytest.mark.parametrize("change", [{}, {"value": 2}, {"value": 2, "version": "0.0.9"}])
def test_a_changed_file_that_is_registered_again_is_had_by_the_same_path(written, change):
    warm, cold, digested = AdapterRegistry(), AdapterRegistry(), AdapterRegistry()
    path = written(card_of())
    digested.register(path, digest=digest(path))
    for registry in (warm, cold):
        registry.register(path)
    old = warm.get("docs")
    written(card_of(**change))
    for registry in (warm, cold):
        entry = registry.register(path)
        assert registry.entries["docs"] == (entry,)
        assert (registry.get("docs"), old) == (card_of(**change), card_of())
        assert registry.register(path) is entry
    if change == {"value": 2}:
        with pytest.raises(ConflictError):
            digested.register(path)


@requirement("R22.3")
def test_a_file_is_not_taken_for_a_registered_one_that_has_changed_since(written):
    registry = AdapterRegistry()
    registry.register(written(card_of()))
    written(card_of(value=2))
    with pytest.raises(CardFileError, match=r"docs\.lora\.arrow.*the registered file"):
        registry.register(written(card_of(value=2), "other"))


@requirement("R22.3")
def test_a_file_with_a_digest_is_known_by_it(written):
    registry = AdapterRegistry()
    path = written(card_of())
    registry.register(path, digest=digest(path))
    written(card_of())  # another file, the same bytes
    assert registry.get("docs") == card_of()
    wrong = written(card_of("law"))
    registry.register(wrong, digest=digest(path))
    with pytest.raises(CardFileError, match="SHA-256"):
        registry.get("law")
    with pytest.raises(ArgumentError, match="64"):
        registry.register(wrong, digest="abc")


@requirement("R22.3")
def test_a_file_that_is_replaced_while_it_is_read_is_refused(written, monkeypatch):
    registry = AdapterRegistry()
    path = written(card_of())

    def replaced_after(read):
        def reads(path, *arguments):
            value = read(path, *arguments)
            written(card_of(value=time.monotonic_ns() % 1000))
            return value

        return reads

    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "inspect", replaced_after(registry_module.inspect))
        with pytest.raises(CardFileError, match="a changed one"):
            registry.register(path)
    assert dict(registry.entries) == {}
    registry.register(path)
    monkeypatch.setattr(registry_module, "load", replaced_after(registry_module.load))
    with pytest.raises(CardFileError, match="a changed one"):
        registry.get("docs")
    assert registry.mapped == ()


@requirement("R22.3")
def test_a_mapped_card_stays_what_it_was_until_another_is_registered_in_its_place(written):
    registry = AdapterRegistry()
    path = written(card_of())
    registry.register(path)
    old = registry.get("docs")
    written(card_of(value=2))
    assert registry.get("docs") is old
    registry.unregister("docs")
    registry.register(path)
    assert registry.get("docs") == card_of(value=2)
    assert old == card_of()
    assert registry.mapped == (("docs", "0.1.0"), ("docs", "0.1.0"))
    del old
    assert registry.mapped == (("docs", "0.1.0"),)


@requirement("R22.3")
def test_what_is_no_card_file_is_not_registered(tmp_path, written):
    registry = AdapterRegistry()
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"no card")
    kinds = {tmp_path / "missing": CardNotFoundError, garbage: CardFileError, tmp_path: StoreError}
    for path, kind in kinds.items():
        with pytest.raises(kind):
            registry.register(path)
    with pytest.raises(ArgumentError, match="path"):
        registry.register(7)
    assert dict(registry.entries) == {}


@requirement("R22.3")
def test_a_relative_path_means_the_same_after_the_folder_changed(written, tmp_path, monkeypatch):
    registry = AdapterRegistry()
    written(card_of())
    monkeypatch.chdir(tmp_path)
    registry.register("docs.lora.arrow")
    monkeypatch.chdir("/")
    assert registry.get("docs") == card_of()


# ---- threads


@requirement("R22.3")
def test_threads_get_what_they_ask_for_and_the_bounds_hold_all_the_while(registry_of, tmp_path):
    registry = registry_of([f"card {index}" for index in range(20)], max_cards=6)

    def read(seed):
        cards = {}  # three threads keep two cards each: there is always room
        for index in np.random.default_rng(seed).integers(20, size=300).tolist():
            cards[index] = registry.get(f"card {index}")
            assert cards[index].weights["0"].A[0, 0] == index
            assert len(registry.mapped) <= 6
            if len(cards) > 1:
                cards.clear()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(3)))
    assert descriptors(tmp_path) == len(registry.mapped) == 6


# ---- the benchmark


@requirement("R22.4")
def test_the_benchmark_reports_what_a_thousand_cards_cost(tmp_path):
    report = tmp_path / "report.json"
    script = Path(__file__).parents[2] / "benchmarks" / "registry.py"
    command = [sys.executable, script, "--quick", "--json", report]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    figures = json.loads(report.read_text())
    assert figures["cards"] == 1000
    assert figures["start_up"]["seconds"] > 0
    descriptors = [figures[key]["descriptors"] for key in ("start_up", "load_all_instead")]
    assert descriptors == [0, 1000]
    assert figures["max_cards_mapped"]["open"] == figures["max_cards"]
    assert 0 < figures["start_up"]["mb"] < 500
    for row in (figures["routing"]["select"], figures["get"]["cold"], figures["get"]["warm"]):
        assert 0 < row["low"] <= row["us"] <= row["high"]
