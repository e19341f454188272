"""Merged checkpoints: what is copied, what is refused, and that nothing is ever half written."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora.card import LoRACard, LowRank
from lora.errors import (
    ArgumentError,
    BaseModelError,
    CardError,
    CardNotFoundError,
    ConflictError,
    LoRAError,
    StateError,
    TargetError,
    UnboundWarning,
    UnsupportedModelError,
)
from lora.extract import extract_delta
from lora.factors import delta
from lora.interop.weights import INDEX, SINGLE, SafetensorsWeights
from lora.models.checkpoint import fold_checkpoint
from lora.testing.plugin import requirement

RNG = np.random.default_rng(0)
NAMES = [f"layer.{i}.{part}" for i in range(2) for part in ("query", "value", "embed_tokens")]
TENSORS = {f"{name}.weight": RNG.normal(size=(6, 4)).astype("f4") for name in NAMES}
TENSORS["layer.0.norm.weight"] = np.ones(4, "f4")


def card_of(name="docs", modules=("layer.0.query", "layer.1.query"), size=(4, 6), **options):
    rng = np.random.default_rng(len(name))
    a, b = (2, size[1]), (size[0], 2)
    pairs = {m: LowRank(rng.normal(size=b), rng.normal(size=a), 0.5) for m in modules}
    return LoRACard(name, 2, 1.0, list(modules), pairs, **options)


@pytest.fixture
def base(tmp_path):
    """A folder with two shards, a configuration and a tokenizer."""
    folder = tmp_path / "base"
    (folder / "vocabulary").mkdir(parents=True)
    files = {name: f"model-{name[6] if name[6] in '01' else 0}.safetensors" for name in TENSORS}
    for file in set(files.values()):
        save_file({name: TENSORS[name] for name in TENSORS if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "vocabulary/merges.txt").write_text("a b")
    return folder


def state(folder):
    """All that a folder holds, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@requirement("R26.6")
def test_shards_get_the_sum_and_all_else_is_copied_byte_for_byte(base, tmp_path):
    docs, law = card_of(), card_of("law", ["layer.0.query", "layer.1.value"])
    before, steps = state(base), []
    options = {"weights": [2, -0.5], "progress": lambda *step: steps.append(step)}
    folded = fold_checkpoint(base, [docs, law], tmp_path / "out", **options)
    assert state(base) == before
    after = state(tmp_path / "out")
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"model-0.safetensors", "model-1.safetensors"}
    weights = SafetensorsWeights(tmp_path / "out")
    for key, tensor in TENSORS.items():
        change = sum(
            weight * delta(card.weights[key[:-7]], dtype=np.float64)
            for card, weight in ((docs, 2), (law, -0.5))
            if key[:-7] in card.weights
        )
        assert np.abs(weights[key] - (tensor + change)).max() <= 1e-6
        assert (key in folded.tensors) == bool(np.any(change))
        assert np.any(change) or weights[key].tobytes() == tensor.tobytes()
    assert steps[-1][0] == steps[-1][1]
    bound = {name: len(each.bound) for name, each in folded.injections.items()}
    assert bound == {"docs": 2, "law": 2}


@requirement("R26.6")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_sum_is_rounded_once_whatever_the_block(base, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("lora.models.checkpoint.BLOCK", 100)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    weight = RNG.normal(size=(40, 7)).astype(kind)
    for path in base.glob("model*"):
        path.unlink()
    save_file({"query.weight": weight}, base / SINGLE)
    card = card_of(modules=["query"], size=(7, 40))
    fold_checkpoint(base, card, tmp_path / "out")
    exact = weight.astype("f8") + delta(card.weights["query"], dtype=np.float64)
    result = load_file(tmp_path / "out" / SINGLE)["query.weight"]
    expected = exact.astype("f4").astype(kind) if kind.itemsize == 2 else exact.astype(kind)
    near_ties = (result != expected).mean()
    assert near_ties <= (0.02 if kind.itemsize == 2 else 1)
    assert np.abs(result.astype("f8") - exact).max() <= ml_dtypes.finfo(kind).eps * 8


def _config(base, **entries):
    (base / "config.json").write_text(json.dumps(entries))


def _header(base, change):
    """Rewrite the header of the first shard."""
    path = base / "model-0.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _only(base, name, data=b"x"):
    for path in base.glob("model*"):
        path.unlink()
    (base / name).write_bytes(data)


def _overlap(header):
    header["layer.0.query.weight"]["data_offsets"] = header["layer.0.value.weight"]["data_offsets"]


def _cut(base):
    path = base / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _twice(base):
    save_file({**TENSORS}, base / "model-1.safetensors")


def _absent(base):
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["layer.7.query.weight"] = "model-0.safetensors"
    (base / INDEX).write_text(json.dumps(index))


def _integers(base):
    whole = {name: tensor.astype("i4") for name, tensor in TENSORS.items()}
    _only(base, "other.txt")
    save_file(whole, base / SINGLE)


def _large(base):
    _only(base, "other.txt")
    save_file({name: np.full_like(t, 65504, "f2") for name, t in TENSORS.items()}, base / SINGLE)


def _wide(base):
    _only(base, "other.txt")
    save_file({name: np.full_like(t, 3e38) for name, t in TENSORS.items()}, base / SINGLE)


def _empty_experts(base):
    """One parameter without entries: of a trillion experts."""
    _only(base, "other.txt")
    save_file({"experts.gate_up_proj": np.zeros((10**12, 0, 4), "f4")}, base / SINGLE)


def _renamable(base):
    """A name of 30 parts that each have another name in another release."""
    _only(base, "other.txt")
    save_file({f"{'mlp.' * 30}experts.1.w1.weight": np.zeros((6, 4), "f4")}, base / SINGLE)


BAD = {
    "no folder": (lambda b: b.rename(b.with_name("x")), CardNotFoundError, "a model's folder"),
    "a missing shard": (lambda b: (b / "model-1.safetensors").unlink(), LoRAError, "model-1"),
    "an index of absent tensors": (_absent, UnsupportedModelError, "layer.7.query"),
    "a shard that is cut": (_cut, UnsupportedModelError, "model-1"),
    "an overlap": (lambda b: _header(b, _overlap), UnsupportedModelError, "model-0"),
    "a huge header": (
        lambda b: (b / "model-0.safetensors").write_bytes(b"\xff" * 99),
        LoRAError,
        "0",
    ),
    "a tensor in two shards": (_twice, UnsupportedModelError, "one shard"),
    "two forms": (lambda b: save_file(TENSORS, b / SINGLE), UnsupportedModelError, "both"),
    "a pickle": (lambda b: _only(b, "pytorch_model.bin"), UnsupportedModelError, "pytorch_model"),
    "gguf": (lambda b: _only(b, "model.gguf"), UnsupportedModelError, "model.gguf"),
    "quantised": (
        lambda b: _config(b, quantization_config={"bits": 4}),
        UnsupportedModelError,
        "quantization_config",
    ),
    "integers": (_integers, UnsupportedModelError, "I32"),
    "sums that float16 has not": (_large, UnsupportedModelError, "cards: from row 0: .*float16"),
    "sums that float32 has not": (_wide, UnsupportedModelError, "float32"),
    "experts without entries": (_empty_experts, TargetError, "a Linear of the model"),
    "a name of a billion names": (_renamable, TargetError, "a Linear of the model"),
    "no configuration": (lambda b: (b / "config.json").unlink(), CardNotFoundError, "config.json"),
    "a link out": (
        lambda b: (b / "notes.txt").symlink_to("/etc/hostname"),
        UnsupportedModelError,
        "notes.txt",
    ),
    "a link to a folder": (
        lambda b: (b / "more").symlink_to(b / "vocabulary"),
        UnsupportedModelError,
        "more",
    ),
    "a pipe": (lambda b: os.mkfifo(b / "pipe"), UnsupportedModelError, "regular file"),
}


@requirement("R26.6", "R7.8")
@pytest.mark.parametrize("case", BAD)
def test_a_base_that_can_not_be_merged_is_refused_and_nothing_is_written(case, base, tmp_path):
    spoil, error, name = BAD[case]
    spoil(base)
    before = state(tmp_path)
    card = card_of()
    if case.startswith("sums"):
        large = np.full((2, 6), 1e5 if "float16" in case else 1e38)
        pairs = {m: LowRank(np.ones((4, 2)), large, 1.0) for m in card.weights}
        card = replace(card, weights=pairs)
    with pytest.raises(error, match=name):
        fold_checkpoint(base, card, tmp_path / "out")
    assert state(tmp_path) == before
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.lora-tmp").exists()


WRONG = {
    "out in base": (lambda b: {"out_folder": b / "out"}, ArgumentError, "apart from"),
    "out is base": (lambda b: {"out_folder": b, "overwrite": True}, ArgumentError, "apart from"),
    "base in out": (lambda b: {"out_folder": b.parent}, ArgumentError, "apart from"),
    "no parent": (lambda b: {"out_folder": b.parent / "x/y"}, CardNotFoundError, "x"),
    "two of a name": (lambda _: {"cards": [card_of(), card_of()]}, ConflictError, "docs"),
    "no card": (lambda _: {"cards": []}, ArgumentError, "cards"),
    "a weight too many": (lambda _: {"weights": [1, 1]}, ArgumentError, "weights"),
    "nothing binds": (lambda _: {"cards": card_of(modules=["k"])}, TargetError, "'k'"),
    "in part": (
        lambda _: {"cards": card_of(modules=["layer.0.query", "k"]), "strict": True},
        TargetError,
        "'k'",
    ),
    "an embedding": (
        lambda _: {"cards": card_of(modules=["layer.0.embed_tokens"])},
        TargetError,
        "e",
    ),
    "another base": (
        lambda _: {"cards": card_of(base_fingerprint="0" * 64)},
        BaseModelError,
        "0" * 64,
    ),
    "a tied head": (
        lambda _: {"cards": card_of(modules=["layer.0.query", "lm_head"])},
        TargetError,
        "untie",
    ),
    "a file": (lambda b: {"out_folder": b.parent / "file"}, ArgumentError, "a file"),
    "files": (lambda b: {"out_folder": b.parent / "full"}, ArgumentError, "with files"),
    "no checkpoint": (
        lambda b: {"out_folder": b.parent / "full", "overwrite": True},
        ArgumentError,
        "holds a checkpoint",
    ),
}


@requirement("R26.6", "R7.8")
@pytest.mark.parametrize("case", WRONG)
def test_what_was_asked_wrong_is_refused_and_nothing_is_written(case, base, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("dear")
    (tmp_path / "file").write_text("text")
    before = state(tmp_path)
    options, error, name = WRONG[case]
    plain = {"base_folder": base, "cards": card_of(), "out_folder": tmp_path / "out"}
    with pytest.raises(error, match=name):
        fold_checkpoint(**plain | options(base))
    assert state(tmp_path) == before
    assert not (tmp_path / "out").exists()


@requirement("R26.6", "R3.12")
def test_a_card_that_binds_in_part_warns_once(base, tmp_path):
    card = card_of(modules=["layer.0.query", "k"])
    with pytest.warns(UnboundWarning, match="weights not used: 'k'") as warned:
        fold_checkpoint(base, card, tmp_path / "out")
    assert len(warned) == 1
    assert warned[0].filename == __file__


@requirement("R26.6")
def test_the_fingerprint_is_that_of_the_model_and_of_an_extraction(base, tmp_path):
    tuned = {**TENSORS, "layer.1.query.weight": TENSORS["layer.1.query.weight"] + 1}
    card = extract_delta(TENSORS, tuned, 4)
    fold_checkpoint(base, card, tmp_path / "out")
    merged = SafetensorsWeights(tmp_path / "out")
    assert all(np.abs(merged[key] - tuned[key]).max() <= 1e-5 for key in tuned)
    with pytest.raises(BaseModelError, match="check_base=False"):
        fold_checkpoint(tmp_path / "out", card, tmp_path / "again")
    fold_checkpoint(tmp_path / "out", card, tmp_path / "again", check_base=False)


@requirement("R26.6")
def test_names_that_are_tied_in_the_file_are_one_weight(base, tmp_path):
    _only(base, "other.txt")
    tied = {"format": "pt", "decoder.query.weight": "encoder.query.weight"}
    save_file({"encoder.query.weight": TENSORS["layer.0.query.weight"]}, base / SINGLE, tied)
    card = card_of(modules=["decoder.query"])
    folded = fold_checkpoint(base, card, tmp_path / "out", strict=True)
    assert folded.tensors == ("encoder.query.weight",)
    both = card_of(modules=["decoder.query", "encoder.query"])
    with pytest.raises(TargetError, match="one weight that fits it"):
        fold_checkpoint(base, both, tmp_path / "both")


@requirement("R26.6")
def test_weights_in_other_forms_and_hidden_folders_are_left_out_by_name(base, tmp_path):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "onnx/model.onnx"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"x")
    (base / ".git").mkdir()
    (base / ".git/packed").write_bytes(b"x")
    dense = base / "2_Dense"
    dense.mkdir()
    (dense / "pytorch_model.bin").write_bytes(b"dense")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (base / "modules.json").write_text(json.dumps(modules))
    folded = fold_checkpoint(base, card_of(), tmp_path / "out")
    torch_files = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    assert sorted(folded.left_out) == [".git/", "onnx/model.onnx", *torch_files]
    kept = state(base).keys() - {*folded.left_out, ".git/packed"}
    assert state(tmp_path / "out").keys() == kept


@requirement("R26.6")
def test_a_snapshot_of_the_hub_is_links_to_its_blobs(base, tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    (tmp_path / "models--a--b/blobs").mkdir(parents=True)
    (snapshot / "vocabulary").mkdir(parents=True)
    for name in state(base):
        blob = tmp_path / "models--a--b/blobs" / name.replace("/", "-")
        blob.write_bytes((base / name).read_bytes())
        (snapshot / name).symlink_to(blob)
    fold_checkpoint(snapshot, card_of(), tmp_path / "out")
    fold_checkpoint(base, card_of(), tmp_path / "plain")
    assert state(tmp_path / "out") == state(tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@requirement("R26.6")
def test_only_a_checkpoint_is_overwritten_and_only_when_asked(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    fold_checkpoint(base, card_of(), out)
    first = state(out)
    with pytest.raises(ArgumentError, match="`overwrite=True`"):
        fold_checkpoint(base, card_of(), out, weights=[2])
    for name in ("note.txt", "photos/.hidden", "config"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).symlink_to(base) if name == "config" else (out / name).write_text("mine")
        before = state(tmp_path)
        with pytest.raises(ArgumentError, match=f"also '{name}'; move what is not to be lost"):
            fold_checkpoint(base, card_of(), out, weights=[2], overwrite=True)
        assert state(tmp_path) == before
        (out / name).unlink()
    fold_checkpoint(base, card_of(), out, weights=[2], overwrite=True)
    assert state(out).keys() == first.keys()
    assert state(out) != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@requirement("R26.6")
@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "model-0.safetensors",
        "other.safetensors.index.json",
        "sub/model.safetensors",
        f"sub/{INDEX}",
        "deep/er/model-0.safetensors",
    ],
)
def test_weights_that_are_not_of_the_checkpoint_to_replace_are_named_and_kept(base, tmp_path, name):
    """`model-0.safetensors` is a shard of the base; the checkpoint to replace is one file."""
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    save_file(TENSORS, out / SINGLE)
    (out / "config.json").write_text("{}")
    (out / name).write_bytes(b"mine")
    before = state(tmp_path)
    with pytest.raises(ArgumentError, match=f"also '{name}'; move what is not to be lost"):
        fold_checkpoint(base, card_of(), out, overwrite=True)
    assert state(tmp_path) == before


@requirement("R26.6")
def test_the_shards_that_the_old_index_names_are_replaced_wherever_the_weights_lie(base, tmp_path):
    out = tmp_path / "out"
    (base / "0_Transformer").mkdir()
    for name in ("model-0.safetensors", "model-1.safetensors", INDEX, "config.json"):
        (base / name).rename(base / "0_Transformer" / name)
    (base / "modules.json").write_text(json.dumps([{"path": "0_Transformer"}]))
    fold_checkpoint(base, card_of(), out)
    first = state(out)
    index = json.loads((out / "0_Transformer" / INDEX).read_text())
    index["weight_map"] |= {"old": "weights-of-old.dat", "lost": "gone.safetensors"}
    (out / "0_Transformer" / INDEX).write_text(json.dumps(index))
    (out / "0_Transformer" / "weights-of-old.dat").write_bytes(b"old")
    fold_checkpoint(base, card_of(), out, weights=[2], overwrite=True)
    assert state(out).keys() == first.keys()
    assert state(out) != first
    (out / "model-0.safetensors").write_bytes(b"mine")  # where the index names nothing
    with pytest.raises(ArgumentError, match="also 'model-0"):
        fold_checkpoint(base, card_of(), out, overwrite=True)


@requirement("R26.6")
@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": "../base/config.json"}}']
)
def test_an_old_index_that_names_no_file_beside_it_gives_nothing_away(base, tmp_path, index):
    out = tmp_path / "out"
    out.mkdir()
    (out / INDEX).write_text(index)
    (out / "model-9.safetensors").write_bytes(b"mine")
    before = state(tmp_path)
    with pytest.raises(LoRAError, match=f"{INDEX}|'model-9.safetensors'"):
        fold_checkpoint(base, card_of(), out, overwrite=True)
    assert state(tmp_path) == before


@requirement("R26.6", "R7.8")
@pytest.mark.parametrize("target", ["empty", "checkpoint", "nothing"])
def test_a_link_as_the_output_is_refused_as_one_before_anything_is_written(base, tmp_path, target):
    (tmp_path / "empty").mkdir()
    fold_checkpoint(base, card_of(), tmp_path / "checkpoint")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    before, steps = state(tmp_path), []
    refusal = f"link: expected a folder itself, found a link; name {tmp_path / target}"
    for overwrite in (False, True):
        options = {"overwrite": overwrite, "progress": lambda *step: steps.append(step)}
        with pytest.raises(ArgumentError, match=refusal):
            fold_checkpoint(base, card_of(), link, **options)
    assert (state(tmp_path), steps) == (before, [])
    assert link.is_symlink()


@requirement("R26.6", "R7.8")
def test_the_output_may_be_the_working_folder_but_no_mount_point(base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fold_checkpoint(base, card_of(), ".")
    assert state(tmp_path / "here").keys() == state(base).keys()
    with pytest.raises(ArgumentError, match=r"/proc: .*a mount point; name a new folder"):
        fold_checkpoint(base, card_of(), "/proc")


@requirement("R26.6", "R7.8")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_card_that_is_not_finite_is_named_and_not_the_base(base, tmp_path, value):
    pairs = dict(card_of().weights)
    pairs["layer.1.query"] = LowRank(np.full((4, 2), value), np.ones((2, 6)), 0.5)
    card = replace(card_of(), weights=pairs)
    with pytest.raises(CardError, match="finite factors, found NaN or an infinity") as error:
        fold_checkpoint(base, [card_of("law"), card], tmp_path / "out")
    assert str(error.value).startswith("card 'docs': module 'layer.1.query': ")
    assert not (tmp_path / "out").exists()
    unused = replace(card_of(), weights=card_of().weights | {"k": pairs["layer.1.query"]})
    with pytest.warns(UnboundWarning, match="'k'"):
        fold_checkpoint(base, unused, tmp_path / "out")


@requirement("R26.6")
def test_weights_that_are_all_zero_warn_by_the_names_of_the_cards(base, tmp_path):
    cards = [card_of("docs"), card_of("law")]
    with pytest.warns(UnboundWarning, match="'docs', 'law': all weights are 0") as warned:
        folded = fold_checkpoint(base, cards, tmp_path / "out", [0, -0.0])
    assert (len(warned), warned[0].filename, folded.tensors) == (1, __file__, ())
    assert state(tmp_path / "out") == state(base)
    assert fold_checkpoint(base, cards, tmp_path / "one", [0, 1]).tensors


@requirement("R25.3")
def test_progress_counts_whole_mebibytes_of_which_there_is_at_least_one(base, tmp_path):
    steps = []
    fold_checkpoint(base, card_of(), tmp_path / "out", progress=lambda *step: steps.append(step))
    assert {total for _, total in steps} == {1}
    assert steps[-1] == (1, 1)


def _in_child(code, *arguments):
    script = f"""
import os, resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from lora.models import checkpoint
from lora.errors import LoRAError
from test_checkpoint import card_of
base, out = sys.argv[1:]
card = card_of()
{code}
try:
    checkpoint.fold_checkpoint(base, card, out)
except LoRAError as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@requirement("R26.6")
def test_a_disk_that_fills_is_an_error_and_leaves_nothing(base, tmp_path):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))"
    before = state(tmp_path)
    done = _in_child(limit, base, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("StoreError: ")
    assert "file too large" in done.stderr
    assert state(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@requirement("R26.6")
def test_a_kill_leaves_no_folder_and_the_next_run_takes_over(base, tmp_path):
    kill = "checkpoint._sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)"
    before = state(base)
    assert _in_child(kill, base, tmp_path / "out").returncode == -signal.SIGKILL
    assert state(base) == before
    assert not (tmp_path / "out").exists()
    (tmp_path / ".out.lora-tmp/stale").mkdir()
    (tmp_path / ".out.lora-old").mkdir()
    for name in (".out.old", ".out.tmp"):  # a user's
        (tmp_path / name).mkdir()
    fold_checkpoint(base, card_of(), tmp_path / "out")
    assert state(tmp_path / "out").keys() == before.keys()
    fold_checkpoint(base, card_of(), tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.glob(".out.*")) == [".out.old", ".out.tmp"]


@requirement("R26.6")
@pytest.mark.parametrize("name", ["weights", "weights.dat"])
def test_a_shard_may_have_any_name(base, tmp_path, name):
    (base / "model-0.safetensors").rename(base / name)
    index = (base / INDEX).read_text().replace("model-0.safetensors", name)
    (base / INDEX).write_text(index)
    fold_checkpoint(base, card_of(), tmp_path / "out")
    assert state(tmp_path / "out").keys() == state(base).keys()


@requirement("R26.6")
def test_two_runs_at_once_do_not_write_into_one_folder(base, tmp_path):
    def progress(*_):
        with pytest.raises(StateError, match="another one"):
            fold_checkpoint(base, card_of(), tmp_path / "out")
        asked.append(1)

    asked = []
    fold_checkpoint(base, card_of(), tmp_path / "out", progress=progress)
    assert asked
    assert (tmp_path / "out/config.json").exists()


@requirement("R26.6")
def test_memory_is_bounded_by_a_block_and_not_by_a_tensor(base, tmp_path):
    _only(base, "other.txt")
    large = np.zeros((20_000, 2_000), "f4")  # 160 MB
    save_file({"query.weight": large}, base / SINGLE)
    del large
    code = """
card = card_of(modules=["query"], size=(2_000, 20_000))
def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0])
start = peak()
import atexit
atexit.register(lambda: print(peak() - start))
"""
    done = _in_child(code, base, tmp_path / "out")
    assert 0 < int(done.stdout) <= 60_000, done.stderr  # KiB
