"""Reading and writing PEFT directories: what is refused, and what the error says."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import finfo
from safetensors.numpy import load_file, save_file

from lora.card import DTYPES, LoRACard, LowRank
from lora.errors import ArgumentError, CardError, CardFileError, CardNotFoundError, StoreError
from lora.extract import MinEnergy, extract_delta
from lora.files import save
from lora.interop.factor_files import MAX_CONFIG_BYTES
from lora.interop.peft import CONFIG, PICKLE, WEIGHTS, export_peft, import_peft
from lora.merging import merge
from lora.testing.plugin import requirement

RNG = np.random.default_rng(0)
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
PREFIX = "base_model.model.m.0.q."


def factors(rank=2, dtype=np.float32):
    return {
        f"{PREFIX}lora_A.weight": np.arange(rank * 3, dtype=dtype).reshape(rank, 3),
        f"{PREFIX}lora_B.weight": np.arange(4 * rank, dtype=dtype).reshape(4, rank),
    }


def written(folder, tensors=None, **config):
    """A PEFT directory; a value of `...` leaves the key out."""
    folder.mkdir(exist_ok=True)
    merged = {key: value for key, value in {**PLAIN, **config}.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(merged))
    save_file(factors() if tensors is None else tensors, folder / WEIGHTS)
    return folder


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(folder, kind=CardFileError):
    with pytest.raises(kind) as caught:
        import_peft(folder)
    return str(caught.value)


@requirement("R23.1")
def test_a_directory_becomes_a_card(tmp_path):
    options = {"base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"}
    folder = written(tmp_path / "docs", lora_dropout=0.1, **options)
    card = import_peft(folder)
    assert (card.name, card.rank, card.alpha) == ("docs", 2, 6.0)
    assert (card.target_modules, card.base_model) == (("q",), "some/base")
    pair = card.weights["m.0.q"]
    assert np.array_equal(pair.A, factors()[f"{PREFIX}lora_A.weight"].T)
    assert np.array_equal(pair.B, factors()[f"{PREFIX}lora_B.weight"].T)
    assert pair.scaling == 3.0
    kept = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    assert card.metadata == {"peft": kept}
    assert import_peft(folder, name="law").name == "law"
    tensors = {key.replace(".weight", ".default.weight"): x for key, x in factors().items()}
    assert import_peft(written(tmp_path / "default", tensors)).weights == card.weights


@requirement("R23.1")
@pytest.mark.parametrize(
    ("config", "targets"),
    [
        ({"target_modules": ["q", "k", "q"]}, ("k", "q")),
        ({"target_modules": r".*\.q"}, ("m.0.q",)),
        ({"target_modules": "All-Linear"}, ("m.0.q",)),
        ({"target_modules": None}, ("m.0.q",)),
        ({"target_modules": ...}, ("m.0.q",)),
        ({"layers_to_transform": 0}, ("q",)),
        ({"layers_to_transform": [0], "layers_pattern": "m"}, ("q",)),
        ({"exclude_modules": ["k"]}, ("q",)),
    ],
)
def test_targets_in_every_form_end_as_names(tmp_path, config, targets):
    plain = "layers_to_transform" not in config or "layers_pattern" in config
    name = "m.0.q" if plain else "a.m.0.q"
    tensors = {key.replace("m.0.q", name): value for key, value in factors().items()}
    assert import_peft(written(tmp_path, tensors, **config)).target_modules == targets


@requirement("R23.1")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["k"]},
        {"target_modules": "all-linear", "exclude_modules": ["0.q"]},
        {"target_modules": ".*q", "layers_to_transform": [0]},
        {"target_modules": ".*q", "layers_to_transform": [0], "layers_pattern": "m"},
        {"target_modules": ".*q", "layers_pattern": []},
    ],
)
def test_weights_that_peft_would_ignore_or_refuse_are_refused(tmp_path, config):
    tensors = {key.replace("m.0.q", "a.m.0.q"): value for key, value in factors().items()}
    assert "target" in refused(written(tmp_path, tensors, **config))


def settings(values):
    """Parametrise by each of the values of each key."""
    pairs = [(key, value) for key, every in values.items() for value in every]
    return pytest.mark.parametrize(("key", "value"), pairs)


NOT_PLAIN = {
    "peft_type": ["LOHA", ...],
    "bias": ["all"],
    **{key: [True] for key in ["use_dora", "lora_bias", "use_qalora", "ensure_weight_tying"]},
    "modules_to_save": [["pooler"]],
    "trainable_token_indices": [[3]],
    "target_parameters": [["experts.weight"]],
    "layer_replication": [[[0, 2]]],
    "alora_invocation_tokens": [[]],
    **{key: [{}] for key in ["megatron_config", "arrow_config", "kasa_config", "use_bdlora"]},
    "something_new": [1],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", 1, []],
}


@requirement("R23.1")
@settings(NOT_PLAIN)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, key, value):
    message = refused(written(tmp_path, **{key: value}))
    assert key in message
    assert str(tmp_path) in message
    assert import_peft(written(tmp_path)).rank == 2


HARMLESS = {
    "init_lora_weights": [True, False, None, "gaussian", "eva", "orthogonal", "mica"],
    "eva_config": [{"rho": 2.0}],
    "modules_to_save": [[]],
    "something_new": [None, False],
    "fan_in_fan_out": [True],
    "megatron_core": ["megatron.core"],
}


@requirement("R23.1")
@settings(HARMLESS)
def test_what_changes_no_output_is_taken(tmp_path, key, value):
    assert import_peft(written(tmp_path, **{key: value})).weights["m.0.q"].scaling == 3.0


MALFORMED = {
    "r": [3, ..., 2.0, True, "2", None, 10**400],
    "rank_pattern": [{"q": 1}, {"q": "2"}, {"k": None}, {"q": True}, None, "q", ["q"]],
    "lora_alpha": ["6", 0, ..., True, float("nan"), 10**400],
    "alpha_pattern": [
        *({key: 1} for key in ("(", "q{99999999999}")),
        *({"q": value} for value in (float("inf"), "3", None, True)),
        *({"k": None}, [1], None),
    ],
    "use_rslora": [1, None, "yes", [], {}],
    "target_modules": [1, ["q", 1], "(", {}, {"q": 1}, [], ""],
    "exclude_modules": [{"q": 1}, [1], True],
    "layers_to_transform": [[True], "0", True, {}],
    "layers_pattern": ["m", 0],
    "lora_dropout": [2, "0", None],
    "bias": [None],
    "task_type": ["OTHER", 5],
    "base_model_name_or_path": [5],
}


@requirement("R23.1")
@settings(MALFORMED)
def test_a_config_that_is_malformed_or_contradicts_the_weights_is_refused(tmp_path, key, value):
    assert str(tmp_path) in refused(written(tmp_path, **{key: value}))


A, B = factors().values()
OTHER = {"base_model.model.q.lora_B.weight": B.astype("f8")}


@requirement("R23.1")
@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "at least one pair"),
        ({f"{PREFIX}lora_A.weight": A}, "found ['A']"),
        ({f"{PREFIX}lora_B.weight": B}, "found ['B']"),
        ({**factors(), f"{PREFIX}lora_magnitude_vector": A[0]}, "DoRA"),
        ({**factors(), f"{PREFIX}lora_B.bias": A[0]}, "lora_bias"),
        ({**factors(), f"{PREFIX}base_layer.bias": A[0]}, "biases"),
        ({**factors(), "base_model.model.e.lora_embedding_A": A}, "embedding"),
        ({**factors(), "base_model.model.unet.media3.lora_B.bias": A[0]}, "lora_bias"),
        ({**factors(), "base_model.model.pooler.weight": A}, "something else"),
        ({"m.0.q.lora_A.weight": A, "m.0.q.lora_B.weight": B}, "base_model.model."),
        ({**factors(), f"{PREFIX}lora_A.default.weight": A}, "two"),
        ({f"{PREFIX}lora_A.a.weight": A, f"{PREFIX}lora_B.b.weight": B}, "one adapter"),
        ({**factors(), f"{PREFIX}lora_B.weight": B[:, :1]}, "module 'm.0.q': factor B"),
        ({**factors(), f"{PREFIX}lora_A.weight": A[..., None]}, "two dimensions"),
        ({**factors(), f"{PREFIX}lora_A.weight": A[:, :0]}, "non-empty"),
        ({**factors(), f"{PREFIX}lora_A.weight": A.astype(np.int32)}, "dtype"),
        ({**factors(), f"{PREFIX}lora_A.weight": A.astype(np.float16)}, "dtype"),
        ({**factors(), "base_model.model.q.lora_A.weight": A.astype("f8"), **OTHER}, "one dtype"),
    ],
)
def test_tensors_that_are_no_pairs_of_factors_are_refused(tmp_path, tensors, says):
    message = refused(written(tmp_path, tensors))
    assert says in message
    assert str(tmp_path) in message


@requirement("R23.1")
def test_a_pickle_is_never_read(tmp_path):
    folder = written(tmp_path / "docs")
    (folder / WEIGHTS).rename(folder / PICKLE)
    trap = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    (folder / PICKLE).write_bytes(b"c__builtin__\neval\n(V" + trap.encode() + b"\ntR.")
    assert f"{PICKLE}; reading a pickle runs code" in refused(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder / PICKLE).read_bytes())  # noqa: S301 - the trap does work
    assert (tmp_path / "ran").exists()


@requirement("R23.1")
def test_missing_and_malformed_files_are_named(tmp_path):
    assert CONFIG in refused(tmp_path, CardNotFoundError)
    folder = written(tmp_path / "docs")
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in refused(folder, CardNotFoundError)
    (folder / WEIGHTS).mkdir()
    assert WEIGHTS in refused(folder, CardNotFoundError)
    for content in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"r": ' + b"1" * 5000 + b"}"):
        (folder / CONFIG).write_bytes(content)
        assert CONFIG in refused(folder)
    with (folder / CONFIG).open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    assert str(MAX_CONFIG_BYTES) in refused(folder)


def card(scaling=0.1, **fields):
    pair = LowRank(np.ones((3, 2), np.float32), np.ones((2, 4), np.float32), scaling)
    return replace(LoRACard("docs", 2, 6.0, ["q"], {"m.0.q": pair}), **fields)


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


@requirement("R23.2")
def test_a_card_becomes_a_directory(tmp_path):
    plain = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    kept = {"peft": {**plain, "use_rslora": True, "peft_version": "9"}}
    export_peft(card(metadata=kept, base_model="some/base"), tmp_path / "docs", exact=True)
    assert files_in(tmp_path) == ["docs"]
    assert files_in(tmp_path / "docs") == [CONFIG, WEIGHTS]
    config = config_of(tmp_path / "docs")
    assert config["alpha_pattern"] == {r"^m\.0\.q": 0.2}
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 6, {})
    assert isinstance(config["lora_alpha"], int)
    assert plain.items() <= config.items()
    assert config["use_rslora"] is False
    assert config["base_model_name_or_path"] == "some/base"
    assert "peft_version" not in config
    for index, metadata in enumerate([{"peft": 5}, {"peft": None}, {"peft": ["task_type"]}, {}]):
        export_peft(card(scaling=None, metadata=metadata), tmp_path / str(index))
        config = config_of(tmp_path / str(index))
        assert (config["alpha_pattern"], "task_type" in config) == ({}, False)


@requirement("R23.2", "R23.4")
@pytest.mark.parametrize(
    ("unsayable", "says"),
    [
        (LoRACard("docs", 2, 6.0, ["q"], {}), "at least one module"),
        (LoRACard("docs", 2, 6.0, [""], {"": card().weights["m.0.q"]}), "root"),
        (card(target_modules=()), "target_modules"),
        (card(target_modules=("k",)), "m.0.q"),
        (card(scaling=1e308), "scaling · rank"),
    ],
)
def test_what_peft_has_no_words_for_is_refused(tmp_path, unsayable, says):
    with pytest.raises(CardError, match="docs") as caught:
        export_peft(unsayable, tmp_path / "docs")
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


@requirement("R23.2")
def test_a_folder_that_holds_something_is_kept_unless_it_may_be_overwritten(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    export_peft(card(), folder)
    before = (folder / CONFIG).read_bytes()
    with pytest.raises(ArgumentError, match="overwrite=True"):
        export_peft(card(scaling=3.0), folder)
    assert (folder / CONFIG).read_bytes() == before
    export_peft(card(scaling=7.0), folder, overwrite=True)
    assert import_peft(folder).weights["m.0.q"].scaling == 7.0
    other = tmp_path / "home"
    other.mkdir()
    (other / "letter").write_text("dear")
    for place, overwrite, problem in (
        (other, True, CONFIG),
        (other / "letter", True, "found a file"),
        (other / "letter", False, "found a file"),
    ):
        with pytest.raises(ArgumentError, match=problem):
            export_peft(card(), place, overwrite=overwrite)
    assert (other / "letter").read_text() == "dear"
    assert files_in(tmp_path) == ["docs", "home"]


@requirement("R23.2")
def test_a_link_to_a_folder_is_followed(tmp_path):
    export_peft(card(), tmp_path / "docs")
    (tmp_path / "link").symlink_to(tmp_path / "docs")
    export_peft(card(scaling=7.0), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert import_peft(tmp_path / "docs").weights["m.0.q"].scaling == 7.0


def random_card(seed, modules=("a.q", "a.v"), rank=4, scaling=None, dtype="float32"):
    rng = np.random.default_rng(seed)
    weights = {}
    for index, module in enumerate(modules):
        r = rank if isinstance(rank, int) else rank[index]
        factors = (rng.normal(size=shape).astype(DTYPES[dtype]) for shape in ((6, r), (r, 5)))
        value = scaling if scaling is None or isinstance(scaling, float) else scaling[index]
        weights[module] = LowRank(*factors, value)
    return LoRACard(f"c{seed}", max(p.rank for p in weights.values()), 8.0, modules, weights)


ONE, TWO, OTHER = random_card(1), random_card(2), random_card(3, ("a.q", "b.up"))
BASE = {f"a.{name}.weight": RNG.normal(size=(5, 6)) for name in "qv"}
TUNED = {key: weight + RNG.normal(size=(5, 6)) * 0.1 for key, weight in BASE.items()}
CARDS = {
    "plain": ONE,
    "rsLoRA": random_card(4, scaling=8 / np.sqrt(4)),
    "PEFT's rank_pattern": random_card(5, rank=(2, 4), scaling=(4.0, 2.0)),
    "an alpha that no number says": random_card(6, rank=3, scaling=0.1),
    "any scalings": random_card(7, rank=(1, 4), scaling=(-0.3, 1e-9)),
    "zero": random_card(8, scaling=0.0),
    "float64": random_card(9, rank=(3, 4), scaling=(0.3, 7.0), dtype="float64"),
    "float16": random_card(10, rank=(3, 4), scaling=(0.3, 7.0), dtype="float16"),
    "bfloat16": random_card(11, rank=(3, 4), scaling=(300.0, 0.007), dtype="bfloat16"),
    "average": merge([ONE, TWO]),
    "average, rank 4": merge([ONE, TWO], rank=4),
    "weighted": merge([ONE, TWO], "weighted", [0.7, 0.3]),
    "cat": merge([ONE, TWO], "cat", [0.7, 0.3]),
    "ties": merge([ONE, TWO], "ties"),
    "other modules": merge([ONE, OTHER]),
    "extracted": extract_delta(BASE, TUNED, 3),
    "extracted by energy": extract_delta(BASE, TUNED, MinEnergy(0.9)),
}


def read_by(folder, rank_of):
    """ΔW by module for a reader that knows only r, lora_alpha and use_rslora."""
    config, tensors = config_of(folder), load_file(folder / WEIGHTS)
    changes = {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            rank = rank_of(config, a)
            scaling = config["lora_alpha"] / (np.sqrt(rank) if config["use_rslora"] else rank)
            b = tensors[key.replace("lora_A", "lora_B")]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            changes[module] = scaling * (b.astype("f8") @ a.astype("f8"))
    return changes


@requirement("R26.7", "R23.4")
@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize(
    "rank_of", [lambda config, _: config["r"], lambda _, a: len(a)], ids=["r", "shape"]
)
def test_readers_that_know_one_alpha_and_one_rank_read_the_right_scale(tmp_path, name, rank_of):
    """One such as vLLM divides by r, one such as llama.cpp by the rank of the tensor."""
    exported = CARDS[name]
    export_peft(exported, tmp_path / "docs")
    assert config_of(tmp_path / "docs")["alpha_pattern"] == {}
    assert config_of(tmp_path / "docs")["rank_pattern"] == {}
    changes = read_by(tmp_path / "docs", rank_of)
    assert changes.keys() == exported.weights.keys()
    for module, pair in exported.weights.items():
        a, b = pair.A.astype("f8"), pair.B.astype("f8")
        error = np.abs(changes[module] - pair.scaling * (a @ b).T)
        unit = float(finfo(pair.dtype).eps)
        assert (error <= unit * abs(pair.scaling) * (np.abs(a) @ np.abs(b)).T).all()


@requirement("R23.4")
@pytest.mark.parametrize(
    ("dtype", "scalings"),
    [("float16", (1e5, 1e-5)), ("float32", (1e40, 1e-3)), ("float16", (1e-12, 1.0))],
)
def test_patterns_are_written_where_b_cannot_hold_the_scaling(tmp_path, dtype, scalings):
    exported = random_card(1, scaling=scalings, dtype=dtype)
    export_peft(exported, tmp_path / "docs")
    assert len(config_of(tmp_path / "docs")["alpha_pattern"]) == 2
    assert import_peft(tmp_path / "docs").weights == exported.weights


@requirement("R23.4", "R26.7")
def test_the_command_line_writes_patterns_only_if_it_is_told_to(tmp_path, here):
    save(CARDS["any scalings"], tmp_path / "a.arrow")
    for name, options, count in (("plain", (), 0), ("exact", ("--exact",), 2)):
        assert here("convert", tmp_path / "a.arrow", "-o", tmp_path / name, *options)[0] == 0
        assert len(config_of(tmp_path / name)["alpha_pattern"]) == count
    assert import_peft(tmp_path / "exact").weights == CARDS["any scalings"].weights


@requirement("R26.7")
def test_task_type_and_base_name_come_along_and_must_be_ones_that_peft_knows(tmp_path):
    names = {"base_model_name_or_path": "some/base", "task_type": "SEQ_CLS", "revision": "v2"}
    export_peft(import_peft(written(tmp_path / "docs", **names)), tmp_path / "back")
    assert names.items() <= config_of(tmp_path / "back").items()
    for field, value in (("task_type", "MADE_UP"), ("fan_in_fan_out", "yes")):
        with pytest.raises(CardError, match=rf"metadata: peft: {field}"):
            export_peft(card(metadata={"peft": {field: value}}), tmp_path / "bad")


def fail(*_):
    raise OSError("disk full")


def replace_but_for(name):
    """Refuse to give a new file its name."""

    def replace_file(path, to, rename=Path.rename):
        return fail() if to.name == name else rename(path, to)

    return replace_file


@requirement("R23.2")
@pytest.mark.parametrize("step", ["lora.interop.peft.write_tensors", "os.fsync"])
def test_a_failure_to_write_leaves_the_old_files_or_a_new_folder_empty(tmp_path, monkeypatch, step):
    folder = tmp_path / "docs"
    export_peft(card(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(step, fail)
    for place in (folder, tmp_path / "new"):
        with pytest.raises(StoreError, match="disk full"):
            export_peft(card(scaling=7.0), place, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert files_in(tmp_path / "new") == []


@requirement("R23.2")
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_failure_to_replace_leaves_no_adapter_and_is_repeated(tmp_path, name):
    folder = tmp_path / "docs"
    export_peft(card(), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace_but_for(name))
        with pytest.raises(StoreError, match="disk full"):
            export_peft(card(scaling=7.0), folder, overwrite=True)
    assert pair_in(folder) is None
    export_peft(card(scaling=7.0), folder, overwrite=True)
    assert import_peft(folder).weights["m.0.q"].scaling == 7.0


STEPS = frozenset(("os.rename", "os.remove", "os.mkdir", "open"))
"""What a process does to a folder, as Python's audit hooks call it."""


def killed_at(step, new, folder):
    """Export in a child that kills itself before its n-th step; tell whether it did."""
    pid = os.fork()
    if pid == 0:
        steps = itertools.count(1)

        def hook(event, _):
            if event in STEPS and next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        export_peft(new, folder, overwrite=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def pair_in(folder):
    """What a reader takes: configuration and weights, the pickle where there are no others."""
    if not (folder / CONFIG).exists():
        return None
    files = [folder / WEIGHTS, folder / PICKLE]
    weights = next((path.read_bytes() for path in files if path.exists()), None)
    return weights and ((folder / CONFIG).read_bytes(), weights)


def folder_of(case, place):
    """A folder to export to: new, or an adapter in safetensors, in a pickle or in both."""
    if case != "new":
        export_peft(card(scaling=3.0), place)
        (place / "README.md").write_text("mine")
    if case == "pickle":
        (place / WEIGHTS).rename(place / PICKLE)
    if case == "both":
        (place / PICKLE).write_bytes(b"older")
    return place


@requirement("R23.2")
@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["new", "safetensors", "pickle", "both"])
def test_an_export_killed_at_any_step_leaves_one_adapter_or_none(tmp_path, case, twice):
    """Killed at each step; and where `twice`, each repetition is killed at each step, too."""
    before = None if case == "new" else pair_in(folder_of(case, tmp_path / "old"))
    new = ONE
    export_peft(new, tmp_path / "new")
    after, kills = pair_in(tmp_path / "new"), 0
    kept = [] if case == "new" else ["README.md"]
    for first in itertools.count(1):
        for second in itertools.count(1):
            place = folder_of(case, tmp_path / f"{first}.{second}")
            was_killed = killed_at(first, new, place)
            assert pair_in(place) in (before, None, after)
            again = was_killed and twice and killed_at(second, new, place)
            assert pair_in(place) in (before, None, after)
            kills += was_killed + again
            export_peft(new, place, overwrite=True)
            assert pair_in(place) == after
            assert files_in(place) == sorted([*kept, CONFIG, WEIGHTS])
            if not again:
                break
        if not was_killed:
            break
    assert kills >= (200 if twice else 10)


@requirement("R23.2")
def test_a_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CardNotFoundError, match="nowhere"):
        export_peft(card(), tmp_path / "nowhere" / "docs")
    for place in (tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(StoreError):
            export_peft(card(), place)
    for wrong in (5, b"docs"):
        with pytest.raises(ArgumentError):
            export_peft(card(), wrong)
        refused(wrong, ArgumentError)
    with pytest.raises(ArgumentError):
        export_peft("docs", tmp_path / "docs")


@requirement("R23.1")
def test_neither_peft_nor_torch_is_needed(tmp_path):
    folder = written(tmp_path / "docs")
    script = f"""import sys; from lora.interop.peft import import_peft, export_peft
export_peft(import_peft({str(folder)!r}), {str(tmp_path / "back")!r})
assert not {{"torch", "peft", "transformers"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert import_peft(tmp_path / "back").weights == import_peft(folder).weights


@requirement("R23.4")
def test_a_scaling_that_would_lose_the_last_bit_of_another_module_is_a_pattern(tmp_path):
    """1 / 8.5e307 times the smallest float32 is 0 in float64, too."""
    least = np.full((1, 1), 1e-45, np.float32)
    large = LowRank(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32), 8.5e307)
    weights = {"a": LowRank(least, least, 1.0), "b": large}
    export_peft(LoRACard("docs", 2, 1.7e308, ["a", "b"], weights), tmp_path / "x")
    assert least == import_peft(tmp_path / "x").weights["a"].B
