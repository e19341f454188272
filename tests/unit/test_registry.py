"""The registry: a thousand cards, few descriptors; what is in use stays; files that are gone, changed or too large."""

import io
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from torch import nn

from lora.card import LoRACard, LowRank
from lora.errors import (
    ArgumentError,
    CardFileError,
    CardNotFoundError,
    ConflictError,
    LoRAError,
    RegistryFull,
    StateError,
    StoreError,
    UnknownCardError,
)
from lora.inference import registry as registry_module
from lora.inference.manager import LoRAManager
from lora.inference.registry import AdapterRegistry
from lora.presets import CardInfo
from lora.store import digest, save
from lora.table import card_to_table
from lora.testing.plugin import requirement


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


def open_files(folder):
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        try:
            found.append(handle.readlink())
        except FileNotFoundError:
            continue
    return sum(path.is_relative_to(folder) for path in found)


def maps_of(folder):
    return sum(f" {folder}" in line for line in Path("/proc/self/maps").read_text().splitlines())


# ---- bounds


@requirement("R22.3")
def test_a_thousand_cards_are_registered_by_header_and_few_descriptors_are_open_whatever_is_asked_for(
    tmp_path,
):
    registry = AdapterRegistry(max_cards=20)
    for index in range(1000):
        path, table, sink = (
            tmp_path / f"{index}",
            card_to_table(card_of(f"card {index}", index)),
            io.BytesIO(),
        )
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        path.write_bytes(sink.getvalue())  # `save` would wait for the disk each time
        registry.register(path)
    assert len(registry.entries) == 1000
    assert (registry.mapped, open_files(tmp_path), maps_of(tmp_path)) == ((), 0, 0)
    held = [registry.get(f"card {index}") for index in range(5)]
    for index in range(1000):
        assert registry.get(f"card {index}").weights["0"].A[0, 0] == index
        assert len(registry.mapped) == min(20, max(5, index + 1))
        if index % 50 == 0:
            assert open_files(tmp_path) == maps_of(tmp_path) == len(registry.mapped)
    assert [registry.get(f"card {index}") is held[index] for index in range(5)] == [True] * 5
    del registry, held
    assert open_files(tmp_path) == maps_of(tmp_path) == 0


@requirement("R22.3")
def test_the_least_recently_asked_for_is_let_go_of_first_and_what_is_asked_for_again_is_not_mapped_again(
    written,
):
    registry = AdapterRegistry(max_cards=2)
    for name in "abc":
        registry.register(written(card_of(name)))
    for name in "aba":
        registry.get(name)
    assert [name for name, _ in registry.mapped] == ["a", "b"]
    registry.get("c")
    assert [name for name, _ in registry.mapped] == ["a", "c"]
    assert registry.get("a") is registry.get("a")


@requirement("R22.3")
def test_what_was_passed_over_as_in_use_is_the_first_to_go_once_it_is_not(written):
    registry = AdapterRegistry(max_cards=3)
    for name in "abcde":
        registry.register(written(card_of(name)))
    held = registry.get("a")
    for name in "bcd":
        registry.get(name)
    assert [name for name, _ in registry.mapped] == ["a", "c", "d"]
    del held
    registry.get("e")
    assert [name for name, _ in registry.mapped] == ["c", "d", "e"]


@requirement("R22.3")
def test_a_registry_that_is_full_of_what_is_in_use_says_so_and_what_to_do(written):
    registry = AdapterRegistry(max_cards=2, max_bytes=2**20)
    for name in "abc":
        registry.register(written(card_of(name)))
    held = [registry.get("a"), registry.get("b")]
    with pytest.raises(
        RegistryFull,
        match=r"get 'c' 0.1.0: .* max_cards=2, max_bytes=1048576, found 2 cards .* in use",
    ):
        registry.get("c")
    with pytest.raises(StateError, match="deactivate cards"):
        registry.get("c")
    assert held == [registry.get("a"), registry.get("b")]
    del held[0]
    assert registry.get("c").name == "c"
    assert [name for name, _ in registry.mapped] == ["b", "c"]


@requirement("R22.3")
def test_bytes_are_bounded_as_well_and_a_file_that_can_never_fit_is_refused_at_once(written):
    small, large = written(card_of("small")), written(card_of("large", size=200))
    limit = large.stat().st_size
    registry = AdapterRegistry(max_bytes=limit)
    registry.register(small)
    assert registry.register(large).nbytes == limit
    card = registry.get("small")
    with pytest.raises(RegistryFull, match=f"max_bytes={limit}"):
        registry.get("large")
    del card
    registry.get("large")
    assert registry.mapped == (("large", "0.1.0"),)
    with pytest.raises(
        RegistryFull, match=f"at most {limit - 1} bytes, found {limit}; raise max_bytes"
    ):
        AdapterRegistry(max_bytes=limit - 1).register(large)


@requirement("R22.3")
@pytest.mark.parametrize("bound", [0, -1, 1.5, "8", None, True])
def test_bounds_are_positive_integers(bound):
    for name in ("max_cards", "max_bytes"):
        with pytest.raises(ArgumentError, match=f"{name}: expected an integer >= 1"):
            AdapterRegistry(**{name: bound})


# ---- what is in use


@requirement("R22.3")
def test_a_card_that_a_manager_has_active_is_in_use(written):
    registry = AdapterRegistry(max_cards=1)
    registry.register(written(card_of("docs")))
    registry.register(written(card_of("law")))
    manager = LoRAManager(nn.Sequential(nn.Linear(4, 4)))
    manager.apply_card(registry.get("docs"))
    with pytest.raises(RegistryFull):
        registry.get("law")
    manager.remove_card("docs")
    assert registry.get("law").name == "law"


@requirement("R22.3")
def test_a_view_of_a_factor_and_a_card_made_of_its_factors_keep_a_card_in_use(written):
    registry = AdapterRegistry(max_cards=1)
    registry.register(written(card_of("docs", 3)))
    registry.register(written(card_of("law")))
    for hold in (
        lambda card: card.weights["0"].A[1:, 0].T,
        lambda card: replace(card, name="other").weights,
    ):
        held = hold(registry.get("docs"))
        with pytest.raises(RegistryFull):
            registry.get("law")
        assert registry.mapped == (("docs", "0.1.0"),)
        del held
        registry.get("law")


@requirement("R22.3")
def test_what_lies_in_a_cycle_of_garbage_is_not_in_use(written):
    registry = AdapterRegistry(max_cards=1)
    registry.register(written(card_of("docs")))
    registry.register(written(card_of("law")))
    cycle = [registry.get("docs")]
    cycle.append(cycle)
    del cycle
    assert registry.get("law").name == "law"


@requirement("R22.3")
def test_a_snapshot_of_the_entries_never_changes_and_keeps_nothing_mapped(written, tmp_path):
    registry = AdapterRegistry(max_cards=1)
    registry.register(written(card_of("docs")))
    registry.get("docs")
    before = registry.entries
    registry.register(written(card_of("law")))
    assert (list(before), list(registry.entries)) == (["docs"], ["docs", "law"])
    with pytest.raises(TypeError):
        before["docs"] = ()
    del registry
    assert open_files(tmp_path) == 0


# ---- names and versions


@requirement("R22.3")
def test_the_newest_version_is_had_by_default_and_any_by_its_number(written):
    registry = AdapterRegistry()
    for version in ("1.10.0", "2.0.0-rc.1", "1.9.0", "2.0.0"):
        registry.register(written(card_of(version=version), version))
    assert [entry.version for entry in registry.entries["docs"]] == [
        "1.9.0",
        "1.10.0",
        "2.0.0-rc.1",
        "2.0.0",
    ]
    assert registry.get("docs").metadata["version"] == registry.entry("docs").version == "2.0.0"
    assert registry.get("docs", "1.10.0").metadata["version"] == "1.10.0"
    registry.unregister("docs", "2.0.0")
    assert registry.get("docs").metadata["version"] == "2.0.0-rc.1"
    registry.unregister("docs")
    registry.unregister("docs")
    with pytest.raises(ArgumentError, match="registry: name: expected text"):
        registry.unregister(["docs"])
    assert dict(registry.entries) == {}


@requirement("R22.3")
def test_a_card_without_a_version_has_the_default_one_and_a_version_can_be_given(written):
    registry = AdapterRegistry()
    first, second = written(card_of()), written(card_of(value=2, version="as of May"), "second")
    assert registry.register(first).version == CardInfo().version
    with pytest.raises(
        ArgumentError,
        match=r"second.*version: expected a semantic version .* 'as of May'; pass version=",
    ):
        registry.register(second)
    assert registry.register(second, version="1.0.0").key == ("docs", "1.0.0")
    assert registry.get("docs").weights["0"].A[0, 0] == 2
    for version in ("1.0", "01.0.0", 3, ""):
        with pytest.raises(ArgumentError, match="semantic"):
            registry.register(second, version=version)


@requirement("R22.3")
def test_an_unknown_card_or_version_is_named(written):
    registry = AdapterRegistry()
    registry.register(written(card_of()))
    with pytest.raises(UnknownCardError, match="'law': expected a registered card, found none"):
        registry.get("law")
    with pytest.raises(
        UnknownCardError, match=r"'docs' '3.0.0': expected a registered card, found only .*0\.1\.0"
    ):
        registry.get("docs", "3.0.0")
    for operation in (registry.get, registry.entry):
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
    for path, given in ((other, None), (other, digest(other)), (first, digest(other))):
        with pytest.raises(
            ConflictError, match=r"'docs' 0\.1\.0: expected one card .*pass version="
        ):
            registry.register(path, digest=given)
    first.unlink()  # what it was can no longer be compared
    with pytest.raises(ConflictError, match="unregister"):
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
    with pytest.raises(
        CardFileError,
        match=r"docs\.lora\.arrow: expected the registered file.*register it again",
    ):
        registry.get("docs")
    path.unlink()
    with pytest.raises(CardNotFoundError, match=r"docs\.lora\.arrow"):
        registry.get("docs")
    assert registry.mapped == ()


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
            found = read(path, *arguments)
            written(card_of(value=time.monotonic_ns() % 1000))
            return found

        return reads

    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "inspect", replaced_after(registry_module.inspect))
        with pytest.raises(CardFileError, match="a changed one"):
            registry.register(path)
    assert dict(registry.entries) == {}
    registry.register(path)
    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "load", replaced_after(registry_module.load))
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
    for path, kind in (
        (tmp_path / "missing", CardNotFoundError),
        (garbage, CardFileError),
        (tmp_path, StoreError),
    ):
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
def test_threads_get_what_they_ask_for_and_the_bounds_hold_all_the_while(written, tmp_path):
    registry, wrong = AdapterRegistry(max_cards=6), []
    for index in range(20):
        registry.register(written(card_of(f"card {index}", index)))

    def read(seed):
        random = np.random.default_rng(seed)
        held = {}
        for _ in range(300):
            index = int(random.integers(20))
            try:
                held[index] = registry.get(f"card {index}")
                if held[index].weights["0"].A[0, 0] != index or len(registry.mapped) > 6:
                    wrong.append(index)
            except (
                LoRAError
            ) as error:  # three threads hold two cards each at most: there is always room
                wrong.append(error)
            if len(held) > 1:
                held.clear()

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert open_files(tmp_path) == len(registry.mapped) == 6


# ---- the benchmark


@requirement("R22.4")
def test_the_benchmark_reports_what_a_thousand_cards_cost_at_start_up_in_memory_and_in_routing(
    tmp_path,
):
    report = tmp_path / "report.json"
    script = Path(__file__).parents[2] / "benchmarks" / "registry.py"
    subprocess.run(
        [sys.executable, script, "--quick", "--json", report], check=True, stdout=subprocess.DEVNULL
    )
    found = json.loads(report.read_text())
    assert found["cards"] == 1000
    assert found["start_up"]["seconds"] > 0
    assert (found["start_up"]["descriptors"], found["load_all_instead"]["descriptors"]) == (0, 1000)
    assert found["max_cards_mapped"]["open"] == found["max_cards"]
    assert 0 < found["start_up"]["mb"] < 500
    for figures in (found["routing"]["select"], found["get"]["cold"], found["get"]["warm"]):
        assert 0 < figures["low"] <= figures["us"] <= figures["high"]
