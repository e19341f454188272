"""Damaged and hostile files neither crash the reader nor make it allocate more than they hold."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora
from lora.arrow_format import ROW_BYTES
from lora.errors import CardFileError
from lora.ipc_check import check_envelope
from lora.testing.plugin import requirement

SCRIPT = Path(__file__).with_name("fuzz_child.py")
fuzz = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
SEEDS = [11, 132]


@requirement("R7.9")
def test_thousands_of_damaged_files_are_refused_or_are_well_formed_cards():
    command = [sys.executable, "-W", "error", SCRIPT, *map(str, SEEDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    counts = json.loads(done.stdout)
    assert counts["wrong"] == []
    assert counts["intact"] == {"read": 4, "refused": 0, "loaded": 4}
    assert counts["read"] == counts["refused"] + counts["loaded"]
    assert counts["read"] - counts["false"] > 2000
    assert counts["false"] > 500
    assert counts["loaded"] > 50  # a changed weight is a card too
    assert counts["grown_mb"] < 128


REFUSALS = {
    "nothing": "expected an Arrow IPC file, found 0 bytes that are not one",
    "the magic alone": "expected an Arrow IPC file, found 14 bytes that are not one",
    "no magic at the start": "expected an Arrow IPC file",
    "no magic at the end": "expected an Arrow IPC file",
    "a stream instead of a file": "expected an Arrow IPC file",
    "a footer of -1 bytes": "footer: expected a length within the file, found -1",
    "a footer of 2147483647 bytes": "footer: expected a length within the file, found 2147483647",
    "a byte appended": "expected an Arrow IPC file",
    "a file appended to itself": "record batch: expected a block that ends at the footer",
    "128 bytes between batch and footer": "record batch: expected a block that ends at the footer",
    "a block at -8, 64 + 64": "record batch: expected a block that ends at the footer",
    f"a block at {2**62}, 64 + 64": "record batch: expected a block that ends at the footer",
    "no batch": "expected one record batch and no dictionaries",
    "two batches": "expected one record batch and no dictionaries",
    "a dictionary": "expected one record batch and no dictionaries",
    "lz4": "expected uncompressed buffers, found compressed ones; a card is mapped as it is",
    "zstd": "expected uncompressed buffers",
    "16 MB in a zstd buffer": "expected uncompressed buffers",
    "big-endian": "schema: expected little-endian buffers",
    "another body length in the message": r"expected a body of \d+ bytes, as in the footer",
    "footer root at 4294967295": "expected offsets inside the file",
    "-1 rows": "record batch: expected rows that .* bytes can hold, found -1",
    "2**31 - 1 rows": "record batch: expected rows that .* bytes can hold, found 2147483647",
    "2**31 - 1 rows of nothing": "expected rows that 0 bytes can hold, found 2147483647",
    "the key lora.name twice": "schema metadata: expected each key once, found duplicates",
    "an unknown key twice": "schema metadata: expected each key once, found duplicates",
}


@pytest.fixture(scope="module")
def falsified():
    return dict(fuzz.false_files())


@requirement("R7.9", "R7.8")
@pytest.mark.parametrize("name", REFUSALS)
def test_a_false_frame_is_refused_before_arrow_sees_it(falsified, name):
    with pytest.raises(CardFileError, match=REFUSALS[name]):
        check_envelope(falsified[name], ROW_BYTES)


@requirement("R7.9")
def test_a_file_whose_factors_share_bytes_is_refused(falsified, tmp_path):
    (tmp_path / "x").write_bytes(falsified["B is A"])
    with pytest.raises(CardFileError, match="expected separate bytes for each, found two that"):
        lora.load(tmp_path / "x")


@requirement("R7.9")
def test_a_true_frame_is_taken_as_bytes_or_as_a_view():
    for card in (fuzz.real_card(), lora.LoRACard("empty", 1, 1.0, (), {})):
        data = fuzz.file_bytes(card)
        assert check_envelope(data, ROW_BYTES) is None
        assert check_envelope(memoryview(data), ROW_BYTES) is None


@requirement("R7.9")
def test_every_buffer_lies_in_the_body_and_has_its_own_bytes():
    edit = fuzz.Edit(fuzz.file_bytes(fuzz.real_card()))
    end = int.from_bytes(edit.data[edit.body_length : edit.body_length + 8], "little")
    for at, (start, length) in zip(edit.buffers, edit.spans, strict=True):
        for span in ((start, end - start + 1), (-1, length), (start, -1), (2**63 - 1, length or 1)):
            with pytest.raises(CardFileError, match=r"buffers?: expected"):
                check_envelope(edit.put(at, "<qq", *span), ROW_BYTES)


@requirement("R7.9")
def test_keys_that_share_bytes_are_refused_before_they_are_copied():
    card = fuzz.real_card()
    data = bytearray(fuzz.file_bytes(card))
    for key in fuzz.plain(card).schema.metadata:
        at = data.rindex(key) - 4
        data[at : at + 4] = (len(data) - 14 - at).to_bytes(4, "little")  # on to the footer's end
    with pytest.raises(CardFileError, match="schema metadata: expected each key once"):
        check_envelope(bytes(data), ROW_BYTES)


@requirement("R7.9")
def test_no_position_in_the_sizes_leads_outside_the_file():
    data = fuzz.file_bytes(fuzz.real_card())
    edit = fuzz.Edit(data)
    taken = 0
    for at in [*range(edit.message_at - 8, edit.body, 2), *range(edit.footer_at, len(data) - 8, 2)]:
        for word in (b"\xff\xff", b"\x00\x00", b"\x00\x80", b"\xff\x7f"):
            try:
                check_envelope(data[:at] + word + data[at + 2 :], ROW_BYTES)
            except CardFileError as error:
                assert error.where.startswith("card file")  # noqa: PT017
            else:
                taken += 1
    assert taken > 0


@requirement("R7.9")
def test_the_two_schemas_of_a_file_are_one(falsified, tmp_path):
    for name in ("another name at the start of the file", "another name in the footer"):
        (tmp_path / "card").write_bytes(falsified[name])
        expected = r"schema: expected one at the start of the file and in its footer, found two"
        with pytest.raises(CardFileError, match=expected):
            lora.load(tmp_path / "card")


@requirement("R7.9")
def test_offsets_and_shapes_are_copied_to_the_heap_before_they_are_used(tmp_path):
    child = f"""
import ctypes, runpy, sys
import lora
fuzz = runpy.run_path({str(SCRIPT)!r})
card = fuzz["real_card"]()
edit = fuzz["Edit"](fuzz["file_bytes"](card))
path = sys.argv[1]
open(path, "wb").write(edit.data)
loaded = lora.load(path)
first = loaded.weights["layer.0.query"].A
base = first.ctypes.data - edit.body - edit.spans[fuzz["A_DATA"]][0]
for buffer in (fuzz["A_OFFSETS"], fuzz["A_SHAPES"], fuzz["B_OFFSETS"], fuzz["B_SHAPES"]):
    start, length = edit.spans[buffer]
    ctypes.memset(base + edit.body + start, 0xFF, length)
assert loaded == card
assert [pair.A.shape[0] for pair in loaded.weights.values()] == [5, 6, 7]
print("whole")
"""
    done = subprocess.run(
        [sys.executable, "-c", child, tmp_path / "card"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "whole"), done.stderr
