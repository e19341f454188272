"""Card files on a real disk: they are mapped and not copied, and replaced whole or not at all."""

import errno
import gc
import json
import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import lora
from lora.errors import ArgumentError, CardError, CardFileError, CardNotFoundError, StoreError
from lora.files import replacing
from lora.interop.peft import export_peft, import_peft
from lora.interop.safetensors import load_safetensors, save_safetensors
from lora.interop.weights import SafetensorsWeights
from lora.testing.plugin import requirement


def a_card(name="docs", rows=16, columns=16, rank=4, modules=3, **fields):
    rng = np.random.default_rng(7)
    weights = {
        f"layer.{i}.query": lora.LowRank(
            rng.standard_normal((rows, rank), np.float32),
            rng.standard_normal((rank, columns), np.float32),
        )
        for i in range(modules)
    }
    return lora.LoRACard(name, rank, 8.0, ("query",), weights, {"description": "text"}, **fields)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "card.lora.arrow"


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A card of 40 MB, and its digest."""
    path = tmp_path_factory.mktemp("large") / "large.lora.arrow"
    digest = lora.save(a_card(rows=20_000, columns=20_000, rank=32, modules=8), path)
    assert path.stat().st_size > 40e6
    return path, digest


def child(script, *arguments):
    """What a Python process of its own prints as JSON; warnings are errors there too."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout)


def spans(path):
    """Where a file is mapped in this process: address ranges with their permissions."""
    result = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(path):
            start, stop = (int(part, 16) for part in fields[0].split("-"))
            result.append((start, stop, fields[1]))
    return result


@requirement("R1.5", "R1.6", "R6.4")
def test_every_factor_lies_in_a_private_map_of_the_file(path):
    lora.save(a_card(), path)
    card = lora.load(path)
    mapped = spans(path)
    assert {permissions for *_, permissions in mapped} == {"rw-p"}  # private: no write reaches it
    for pair in card.weights.values():
        for factor in (pair.A, pair.B):
            first = factor.__array_interface__["data"][0]
            last = first + factor.nbytes
            assert any(start <= first and last <= stop for start, stop, _ in mapped)
            assert not factor.flags.writeable
            assert not factor.flags.owndata
    del card, pair, factor
    assert spans(path) == []


def descriptors():
    gc.collect()  # what earlier tests left open
    return len(list(Path("/proc/self/fd").iterdir()))


def resident(path):
    """Bytes of a file's maps that this process has in memory."""
    result, ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":")
        if " " in name:  # the head of a map
            ours = line.endswith(str(path))
        elif ours and name == "Rss":
            result += int(rest.split()[0]) * 1024
    return result


@requirement("R1.5", "R6.4", "R6.7")
@pytest.mark.parametrize("verified", [False, True])
def test_no_page_of_a_loaded_card_is_resident_until_it_is_used(large, verified):
    path, digest = large
    card = lora.load(path, verify=digest if verified else None)
    assert resident(path) < 0.01 * path.stat().st_size
    assert all(np.isfinite(pair.A.sum() + pair.B.sum()) for pair in card.weights.values())
    assert resident(path) > 0.9 * card.nbytes


@requirement("R1.5")
def test_a_card_is_loaded_where_the_system_does_not_take_its_pages_back(path, monkeypatch):
    class Locked(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")  # as Linux says of locked pages

    lora.save(a_card(), path)
    monkeypatch.setattr(mmap, "mmap", Locked)
    assert lora.load(path) == a_card()


@requirement("R1.5")
def test_a_loaded_card_keeps_a_descriptor_only_where_python_must(path):
    lora.save(a_card(), path)
    before = descriptors()
    cards = [lora.load(path) for _ in range(5)]
    assert descriptors() - before == (0 if sys.version_info >= (3, 13) else len(cards))


@requirement("R1.6", "R1.5", "R6.4")
def test_anonymous_memory_does_not_grow_with_the_weights(large):
    script = """
import json, sys
from pathlib import Path
import lora

def kilobytes(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))

small, large = sys.argv[1:]
lora.load(small)
before = {kind: kilobytes(kind) for kind in ("RssAnon", "RssFile")}
card = lora.load(large)
loaded = {kind: kilobytes(kind) - before[kind] for kind in before}
total = sum(float(pair.A.sum()) + float(pair.B.sum()) for pair in card.weights.values())
read = {kind: kilobytes(kind) - before[kind] for kind in before}
print(json.dumps({"loaded": loaded, "read": read, "nbytes": card.nbytes}))
"""
    path, _ = large
    small = path.with_name("small.lora.arrow")
    lora.save(a_card(), small)
    result = child(script, small, path)
    weights = result["nbytes"] // 1024
    assert weights >= 40_000
    assert result["loaded"]["RssAnon"] < 2_000
    assert result["loaded"]["RssFile"] < 4_000  # nothing of the weights is even read
    assert result["read"]["RssFile"] > weights * 0.9
    assert result["read"]["RssAnon"] < 2_000


@requirement("R1.6")
def test_a_stray_write_neither_crashes_nor_reaches_the_file(large):
    script = """
import ctypes, json, sys
import lora
path = sys.argv[1]
card = lora.load(path)
for pair in card.weights.values():
    for factor in (pair.A, pair.B):
        ctypes.memset(factor.ctypes.data, 0xFF, factor.nbytes)
        ctypes.memmove(factor.ctypes.data, b"x" * 64, 64)
again = lora.load(path)
changed = all(bytes(pair.A.view("u1").ravel()[:64]) == b"x" * 64 for pair in card.weights.values())
print(json.dumps({"digest": lora.digest(path), "changed": changed, "same": card == again}))
"""
    path, digest = large
    assert child(script, path) == {"digest": digest, "changed": True, "same": False}
    assert lora.digest(path) == digest


@requirement("R1.12")
def test_a_header_is_read_without_torch_and_without_the_weights(large):
    script = """
import json, sys
from pathlib import Path
import lora
from lora import files as files_module

def kilobytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssAnon")))

small, large = sys.argv[1:]
lora.inspect(small)
kept, mapped = [], files_module._map
files_module._map = lambda path: kept.append(mapped(path)) or kept[-1]  # keeps the pages
before = kilobytes()
header = lora.inspect(large)
inspecting = kilobytes() - before
card = lora.load(large)
total = [(pair.A.sum(), pair.B.sum()) for pair in card.weights.values()]
reading = kilobytes() - before - inspecting
assert len(kept) == 2
assert "torch" not in sys.modules, "torch was imported"
print(json.dumps({"inspecting": inspecting, "reading": reading, "modules": len(header.modules)}))
"""
    path, _ = large
    small = path.with_name("small.lora.arrow")
    lora.save(a_card(), small)
    kilobytes = child(script, small, path)
    assert kilobytes["reading"] > 36_000
    assert kilobytes["inspecting"] < 4_000
    assert kilobytes["modules"] == 8


@requirement("R1.6")
def test_a_loaded_card_outlives_its_path_and_its_descriptor(path):
    lora.save(card := a_card(), path)
    before = descriptors()
    loaded = lora.load(path)
    lora.save(a_card("another"), path)  # a new file takes the name: the map keeps the old
    assert loaded == card
    path.unlink()
    assert loaded == card
    del loaded
    assert descriptors() == before


@requirement("R1.11")
def test_a_save_flushes_the_file_then_renames_it_then_flushes_the_folder(path, monkeypatch):
    steps, fsync, replace = [], os.fsync, Path.replace

    def flushed(handle):
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def renamed(source, target):
        assert source.parent == target.parent
        assert source.stat().st_size > 0
        steps.append("rename")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    lora.save(a_card(), path)
    assert steps == ["file", "rename", "folder"]


@requirement("R1.11")
@pytest.mark.parametrize("step", ["os.fsync", "Path.replace", "pa.ipc.new_file"])
def test_a_killed_save_leaves_the_old_file_whole(path, step):
    script = """
import os, signal, sys
from pathlib import Path
import pyarrow as pa
import lora
old, new = lora.load(sys.argv[1]), lora.load(sys.argv[2])
owner, _, name = sys.argv[3].rpartition(".")
setattr(eval(owner), name, lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL))
lora.save(new, sys.argv[1])
"""
    digest = lora.save(a_card("old"), path)
    other = path.with_name("other.lora.arrow")
    lora.save(a_card("new", rows=2000), other)
    command = [sys.executable, "-c", script, path, other, step]
    done = subprocess.run(command, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert lora.load(path, verify=digest).name == "old"
    assert set(path.parent.glob("*.lora.arrow")) == {path, other}
    lora.save(a_card("new"), path)
    assert lora.load(path).name == "new"


@requirement("R1.11")
def test_readers_see_one_card_or_the_other_while_a_writer_replaces_them(path):
    cards = [a_card("one"), a_card("two", rows=64)]
    lora.save(cards[0], path)
    written = threading.Event()

    def write():
        for turn in range(60):
            lora.save(cards[turn % 2], path)
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not written.is_set():
        card = lora.load(path)
        assert card in cards
        seen.add(card.name)
    writer.join()
    assert seen == {"one", "two"}


@requirement("R1.11")
def test_a_new_file_has_the_mode_that_the_umask_leaves(path):
    for mask in (0o077, 0o022, 0o027):
        old = os.umask(mask)
        try:
            lora.save(a_card(), path)
        finally:
            os.umask(old)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@requirement("R1.11")
def test_any_name_that_the_file_system_takes_is_taken(tmp_path):
    for name in ("a" * 244 + ".lora.arrow", "注" * 81 + ".lora.arrow", ".hidden", "a b\nc", "-"):
        digest = lora.save(a_card(), tmp_path / name)
        assert lora.load(tmp_path / name, verify=digest) == a_card()
    assert len(list(tmp_path.iterdir())) == 5


@requirement("R1.11")
def test_a_link_is_replaced_and_what_it_led_to_is_kept(tmp_path):
    lora.save(a_card("old"), tmp_path / "old.lora.arrow")
    (tmp_path / "link").symlink_to(tmp_path / "old.lora.arrow")
    assert lora.load(tmp_path / "link").name == "old"
    lora.save(a_card("new"), tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert lora.load(tmp_path / "old.lora.arrow").name == "old"


@requirement("R1.11")
def test_an_error_of_the_writer_is_passed_on_as_it_is(path):
    error = CardError("here", "this", "that")
    with pytest.raises(CardError) as caught, replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert caught.value is error
    assert list(path.parent.iterdir()) == []
    with replacing(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"


@requirement("R1.11", "R1.14")
def test_one_card_is_one_byte_string_in_every_process(path):
    script = """
import json, sys
import lora
print(json.dumps(lora.save(lora.load(sys.argv[1]), sys.argv[2])))
"""
    digest = lora.save(a_card(extra={"b": "1", "a": "2"}, base_model="tiny"), path)
    assert child(script, path, path.with_name("again.lora.arrow")) == digest


@requirement("R7.1")
def test_a_missing_file_is_named(tmp_path, path):
    message = "expected an existing path, found none$"
    for read in (lora.load, lora.inspect, lora.digest):
        with pytest.raises(CardNotFoundError, match=message) as caught:
            read(path)
        assert caught.value.where == str(path)
        with pytest.raises(CardNotFoundError) as caught:
            read(tmp_path / "gone" / "card.lora.arrow")
        assert caught.value.found == f"no folder {tmp_path / 'gone'}"
    with pytest.raises(CardNotFoundError, match="gone"):
        lora.save(a_card(), tmp_path / "gone" / "card.lora.arrow")


@requirement("R7.8")
def test_only_a_regular_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (lora.load, lora.inspect, lora.digest):
        for wrong in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
            with pytest.raises(StoreError) as caught:
                read(wrong)
            assert caught.value.where == str(wrong)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(CardFileError, match="0 bytes"):
        lora.load(tmp_path / "empty")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StoreError):
        lora.load(tmp_path / "loop")


class Pathological:
    """A path-like object whose path is any value, or an error that it raises."""

    def __init__(self, value):
        self.value = value

    def __fspath__(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


PATHS = [b"x", 5, None, ["x"], Pathological(b"x"), Pathological(5), Pathological(OSError("no"))]
PATHS += [Pathological(ValueError("no")), Pathological(RuntimeError("no")), object()]
TAKERS = {
    "load": lora.load,
    "load, verified": lambda path: lora.load(path, verify="0" * 64),
    "inspect": lora.inspect,
    "digest": lora.digest,
    "save": lambda path: lora.save(a_card(), path),
    "save_safetensors": lambda path: save_safetensors(a_card(), path),
    "load_safetensors": load_safetensors,
    "import_peft": import_peft,
    "export_peft": lambda path: export_peft(a_card(), path),
    "SafetensorsWeights": SafetensorsWeights,
}


@requirement("R7.8")
@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_what_is_no_path_is_an_argument_error(taker, path):
    with pytest.raises(ArgumentError, match=r"path: expected a str or os\.PathLike"):
        TAKERS[taker](path)


@requirement("R7.8")
@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y", "a\0b", "\ud800"])
def test_a_name_that_the_operating_system_does_not_take_is_a_lora_error(tmp_path, taker, name):
    with pytest.raises((StoreError, CardNotFoundError)):
        TAKERS[taker](str(tmp_path / name))


@requirement("R7.8")
def test_what_may_not_be_read_or_written_is_a_store_error(tmp_path, path):
    script = """
import json, os, sys
import lora
from lora.errors import StoreError
card = lora.load(sys.argv[1])
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
said = []
for call in (lora.load, lora.digest, lambda path: lora.save(card, path)):
    try:
        call(sys.argv[1])
    except StoreError as error:
        said.append("permission denied" in str(error) and sys.argv[1] in str(error))
print(json.dumps(said))
"""
    lora.save(a_card(), path)
    path.chmod(0o400)
    tmp_path.chmod(0o555)
    try:
        readable = os.geteuid() != 0  # an owner may read what others may not
        assert child(script, path) == [True] * (1 if readable else 3)
    finally:
        tmp_path.chmod(0o755)
    assert [result.name for result in tmp_path.iterdir()] == [path.name]


@requirement("R1.11", "R7.8")
@pytest.mark.parametrize("write", [lora.save, save_safetensors, export_peft])
def test_a_disk_that_fills_is_a_store_error_and_leaves_what_was_there(write, tmp_path):
    write(a_card(), tmp_path / "file")
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"overwrite": True} if write is export_peft else {}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StoreError, match="too large"):
            write(a_card(rank=5), tmp_path / "file", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before


@requirement("R1.3", "R1.10")
def test_text_of_every_script_and_keys_of_every_kind_come_back(path):
    extra = {"": "", "pandas": "{}", "ARROW:schema": "x", "a\0b": "c\0d", "größe": "注意"}
    card = a_card("größe, 注意", extra={**extra, "lora.later": "1"}, base_model="")
    lora.save(card, path)
    assert lora.load(path) == card
    assert lora.inspect(path).extra == card.extra
