"""The commands that make cards of cards and of weights: merge, extract, convert; and the drawing of
inspect.
"""

import ast
import json
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file

import lora
from lora.card import LoRACard, LowRank
from lora.cli.app import app, in_options
from lora.factors import delta
from lora.interop.peft import import_peft
from lora.testing.plugin import requirement

EXTRACT = "extract tuned.safetensors -o x.lora.arrow"


def card_of(name, seed, **options):
    rng = np.random.default_rng(seed)
    pairs = {
        f"layer.{i}.query": LowRank(rng.normal(size=(4, 2)), rng.normal(size=(2, 4)))
        for i in range(2)
    }
    return LoRACard(name, 2, 4.0, ["query"], pairs, **options)


@pytest.fixture
def folder(tmp_path):
    lora.save(card_of("docs", 1), tmp_path / "docs.lora.arrow")
    lora.save(card_of("law", 2), tmp_path / "law.lora.arrow")
    rng = np.random.default_rng(3)
    base = {f"layer.{i}.query.weight": rng.normal(size=(4, 4)) for i in range(2)}
    save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    save_file(base, tmp_path / "base/model.safetensors")
    tuned = {
        key: w + delta(card_of("docs", 1).weights[key.removesuffix(".weight")])
        for key, w in base.items()
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path


Done = namedtuple("Done", "returncode stdout stderr")  # noqa: PYI024 - of a test


@pytest.fixture
def shell(folder, here, monkeypatch):
    """A command in the folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv):
        return Done(*here(*argv))

    return run


def change(card, module="layer.0.query"):
    return delta(card.weights[module], dtype=np.float64)


@requirement("R25.3")
@pytest.mark.parametrize(
    ("line", "bar"),
    {
        "merge docs.lora.arrow law.lora.arrow -o both.lora.arrow": "merging .* 2/2",
        "convert docs.lora.arrow -o docs.safetensors": "converting docs.lora.arrow .* 2/2",
        f"{EXTRACT} --base base.safetensors": "extracting tuned.safetensors .* 2/2",
        "fold base docs.lora.arrow -o merged": "folding into base .* 1/1",
        "probe --base base.safetensors --tuned tuned.safetensors": "comparing .* 2/2",
    }.items(),
)
def test_long_work_shows_how_far_it_is_on_stderr(shell, line, bar):
    done = shell(*line.split())
    assert re.search(bar, done.stderr)
    assert not re.search(bar, done.stdout)


def near(a, b):
    """Equal up to the arithmetic of products and decompositions of 4 x 4 float64 matrices."""
    return np.abs(a - b).max() <= 200 * np.finfo(np.float64).eps * np.abs(b).max()


@requirement("R25.2", "R20.1")
def test_merge_writes_the_card_that_the_library_merges(shell, folder):
    options = "-o both.lora.arrow --strategy weighted --weight 2 --weight -1 --name both --json"
    done = shell("merge", "docs.lora.arrow", "law.lora.arrow", *options.split())
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    both = lora.load(folder / "both.lora.arrow", verify=facts["digest"])
    assert (both.name, facts["modules"], set(facts["error"].values())) == ("both", 2, {0.0})
    assert near(change(both), 2 * change(card_of("docs", 1)) - change(card_of("law", 2)))


@requirement("R25.2", "R25.3")
@pytest.mark.parametrize(
    ("options", "said"),
    {
        "--strategy mean": "--strategy: expected one of average, weighted",
        "--density 0.5": "--density: expected none for average, found 0.5; it is for ties, dare\n",
        "--strategy ties --density 2": "ties: density: expected",
        "--strategy weighted --weight 1": "--weight: expected one for each of 2 cards, found 1",
        "--rank 0": "--rank: expected an integer >= 1",
    }.items(),
)
def test_a_merge_that_can_not_be_is_one_line_and_writes_nothing(shell, folder, options, said):
    cards = ("docs.lora.arrow", "law.lora.arrow")
    done = shell("merge", *cards, "-o", "both.lora.arrow", *options.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lora: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (folder / "both.lora.arrow").exists()


@requirement("R25.3", "R3.12")
def test_a_card_that_binds_in_part_is_one_line_of_warning(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file({"q.weight": np.eye(2, dtype=np.float32)}, tmp_path / "base" / "model.safetensors")
    pair = LowRank(np.ones((2, 1), np.float32), np.ones((1, 2), np.float32), 1.0)
    card = lora.LoRACard("docs", 1, 1.0, ["q", "v"], {"q": pair, "v": pair})
    lora.save(card, tmp_path / "docs.lora.arrow")
    command = [sys.executable, "-m", "lora.cli", "fold", "base", "docs.lora.arrow", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    warned = [line for line in done.stderr.splitlines() if line.startswith("lora: ")]
    assert len(warned) == 1
    assert "takes effect in part" in warned[0]
    assert "callback" not in done.stderr


@requirement("R26.8")
def test_a_folder_with_two_adapters_is_refused(shell, folder):
    (folder / "two").mkdir()
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        (folder / "two" / name).write_bytes(b"")
    done = shell("convert", "two", "-o", "x.lora.arrow")
    assert done.returncode == 1
    assert "expected a folder with one adapter" in done.stderr
    assert "name the file" in done.stderr


@requirement("R25.2", "R26.6")
def test_fold_writes_the_merged_checkpoint_and_says_what_it_left_out(shell, folder):
    (folder / "base/pytorch_model.bin").write_bytes(b"x")
    line = "fold base docs.lora.arrow law.lora.arrow --weight 2 --weight -1 -o merged"
    done = shell(*line.split(), "--json")
    assert done.returncode == 0, done.stderr
    facts = {"folder": "merged", "tensors": 2, "cards": {"docs": 2, "law": 2}}
    assert json.loads(done.stdout) == {**facts, "left_out": ["pytorch_model.bin"]}
    base = load_file(folder / "base.safetensors")
    merged = load_file(folder / "merged/model.safetensors")
    for module in card_of("docs", 1).weights:
        changes = 2 * change(card_of("docs", 1), module) - change(card_of("law", 2), module)
        key = f"{module}.weight"
        assert near(merged[key] - base[key], changes)
    again = shell(*line.split())
    assert (again.returncode, again.stdout) == (1, "")
    assert "--overwrite" in again.stderr
    lora.save(replace(card_of("law", 2), base_fingerprint="0" * 64), folder / "law.lora.arrow")
    again = shell(*line.split(), "--overwrite", "--allow", "other_base")
    assert "2 tensors changed\nleft out: pytorch" in again.stdout


@requirement("R25.2", "R16.5", "R16.6")
def test_extract_finds_the_card_that_was_written_into_the_weights(shell, folder):
    line = "extract tuned.safetensors --base base.safetensors -o found.lora.arrow --error 1e-9"
    done = shell(*line.split(), "--target", "query", "--json")
    assert done.returncode == 0, done.stderr
    found = lora.load(folder / "found.lora.arrow", verify=json.loads(done.stdout)["digest"])
    assert (found.name, found.rank, found.target_modules) == ("found", 2, ("query",))
    assert near(change(found), change(card_of("docs", 1)))
    direct = shell("extract", "tuned.safetensors", "-o", "whole.lora.arrow", "--energy", 1)
    assert direct.returncode == 0, direct.stderr
    weights = load_file(folder / "tuned.safetensors")
    assert near(change(lora.load(folder / "whole.lora.arrow")), weights["layer.0.query.weight"])


@requirement("R25.2", "R16.5", "R16.7")
@pytest.mark.parametrize(
    ("options", "rule", "keywords"),
    [
        ("--rank 1", 1, {}),
        ("--energy 0.6", lora.MinEnergy(0.6), {}),
        ("--error 0.3", lora.MaxError(0.3), {}),
        ("--method randomized --seed 5", 8, {"method": "randomized", "seed": 5}),
    ],
)
def test_extract_does_what_the_library_does_with_these_options(
    shell, folder, options, rule, keywords
):
    done = shell("extract", "tuned.safetensors", "-o", "x.lora.arrow", *options.split())
    assert done.returncode == 0, done.stderr
    expected = lora.extract_direct(load_file(folder / "tuned.safetensors"), rule, **keywords)
    card = lora.load(folder / "x.lora.arrow")
    assert card.metadata["extract"] == expected.metadata["extract"]
    assert card.weights == expected.weights


@requirement("R25.2", "R23.4", "R23.5")
def test_convert_goes_to_peft_and_to_safetensors_and_back(shell, folder):
    for there in ("peft-docs", "docs.safetensors"):
        for source, target in (("docs.lora.arrow", there), (there, "back.lora.arrow")):
            done = shell("convert", source, "-o", target)
            assert done.returncode == 0, done.stderr
            shown = f"{target}/" if target == "peft-docs" else target
            assert done.stdout.startswith(f"{shown}: card docs, ")
        back, card = lora.load(folder / "back.lora.arrow"), card_of("docs", 1)
        assert back.name == "docs"
        assert all(np.array_equal(back.weights[m].A, card.weights[m].A) for m in card.weights)
        assert all(np.array_equal(back.weights[m].B, card.weights[m].B) for m in card.weights)
    refused = shell("convert", "docs.lora.arrow", "-o", "peft-docs")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert shell("convert", "docs.lora.arrow", "-o", "peft-docs", "--overwrite").returncode == 0


@requirement("R25.2", "R15.5")
def test_probe_ranks_what_moved_between_two_models(shell):
    done = shell(
        "probe", "--base", "base.safetensors", "--tuned", "tuned.safetensors", "--rank", 1, "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["name"] for row in rows} == {"layer.0.query", "layer.1.query"}
    assert rows[0]["change"] >= rows[1]["change"]
    for row in rows:
        squares = np.linalg.svd(change(card_of("docs", 1), row["name"]), compute_uv=False) ** 2
        assert row["held"] == pytest.approx(squares[0] / squares.sum())


@requirement("R25.2", "R15.3", "R15.4")
def test_probe_ranks_the_blocks_of_the_encoder_that_is_named(shell, folder, monkeypatch):
    models, engine = [], lora.ArrowEngine.from_pretrained(None)
    monkeypatch.setattr(
        lora.ArrowEngine, "from_pretrained", lambda model: models.append(model) or engine
    )
    (folder / "texts.txt").write_text(
        "a card is a value\n\nadapting is a function\nstate is one reference\n"
    )
    done = shell("probe", "texts.txt", "--share", 0.9, "--model", "minilm", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert sum(row["kind"] == "block" for row in facts["rows"]) == 6
    assert set(facts["correlations"]) == {"magnitude", "wanda", "influence"}
    assert models == [Path("minilm")]
    mass = {row["name"]: row["influence"] for row in facts["rows"] if row["kind"] == "block"}
    *most, last = (mass[name] for name in facts["hot"])
    assert sum(most) < 0.9 * sum(mass.values()) <= sum(most) + last


@requirement("R25.2")
def test_inspect_draws_where_it_is_told_to(shell, folder):
    done = shell("inspect", "docs.lora.arrow", "--plot", "docs.svg", "--json")
    assert done.returncode == 0, done.stderr
    assert "effective rank" in (folder / "docs.svg").read_text()
    assert shell("inspect", "docs.lora.arrow", "--plot", "docs.exe").returncode == 2


@requirement("R25.2", "R23.1")
def test_merge_reads_peft_directories_and_safetensors_beside_cards(shell, folder):
    assert shell("convert", "docs.lora.arrow", "-o", "peft-docs").returncode == 0
    assert shell("convert", "law.lora.arrow", "-o", "law.safetensors").returncode == 0
    done = shell("merge", "peft-docs", "law.safetensors", "docs.lora.arrow", "-o", "all.lora.arrow")
    assert done.returncode == 0, done.stderr
    expected = (2 * change(card_of("docs", 1)) + change(card_of("law", 2))) / 3
    assert near(change(lora.load(folder / "all.lora.arrow")), expected)
    assert shell("convert", "all.lora.arrow", "-o", "peft-all").returncode == 0
    assert near(change(import_peft(folder / "peft-all")), expected)


@requirement("R25.2", "R23.5")
def test_convert_does_what_its_options_say_or_refuses_them(shell, folder):
    done = shell("convert", "docs.lora.arrow", "-o", "named.ARROW", "--name", "named")
    assert done.returncode == 0, done.stderr
    assert lora.load(folder / "named.ARROW").name == "named"


@requirement("R25.3")
@pytest.mark.parametrize(
    ("command", "said"),
    {
        "extract tuned.safetensors -o none/x.lora.arrow": "found no folder none",
        "extract tuned.safetensors -o .": "expected a file in an existing folder, found a folder",
        f"{EXTRACT} --rank 0": "--rank: expected an integer >= 1, found 0",
        f"{EXTRACT} --name=": "card name: expected non-empty",
        f"{EXTRACT} --rank 2 --energy 0.5": "one of --rank, --energy, --error, found 2 of them",
        "merge docs.lora.arrow -o none/x.lora.arrow": "found no folder none",
        "merge docs.lora.arrow -o x.safetensors": "expected a file that ends in .arrow, found "
        ".safetensors; lora convert makes PEFT folders of cards\n",
        "merge docs.lora.arrow -o peft-out/": "--out peft-out: expected a file that ends in "
        ".arrow, found no ending; lora convert",
        "convert docs.lora.arrow -o model.bin": "--out model.bin: expected *.arrow, *.safetensors "
        "or a folder's name, found .bin\n",
        "convert docs.lora.arrow -o x.lora.arow": "or a folder's name, found .arow\n",
        **{
            f"{line} -o {out}": f"--out {out}: expected another place than the inputs', found "
            "the place of an input; it would be overwritten\n"
            for line, out in {
                "merge docs.lora.arrow law.lora.arrow": "base/../law.lora.arrow",
                "convert docs.lora.arrow": "docs.lora.arrow",
                "convert base": "base",
                "extract base --base docs.lora.arrow": "docs.lora.arrow",
                "fold base docs.lora.arrow --overwrite": "base",
                "train law.lora.arrow --name a": "law.lora.arrow",
                "encode --parquet law.parquet": "law.parquet",
            }.items()
        },
        "conformance --only R4.4 --json-file none/x.json": "found no folder none",
        "probe latin.txt": "latin.txt: expected text in UTF-8",
        "probe none.txt": "lora: none.txt: no such file or directory (expected text in UTF-8)\n",
        "probe latin.txt --share 2": "share: expected a number in (0, 1], found 2.0",
        "probe latin.txt --base base.safetensors --tuned tuned.safetensors": "found both",
        "probe --base base.safetensors": "--base and --tuned together",
        "convert docs.lora.arrow -o x.lora.arrow --alpha 3": "a .safetensors file as the source",
    }.items(),
)
def test_what_can_not_be_done_is_refused_in_one_line_before_the_work(shell, folder, command, said):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    before = {path: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    done = shell(*command.split())
    needs_files = re.search("folder( |$)|UTF-8|card name|source|an input", said)
    assert (done.returncode, done.stdout) == (1 if needs_files else 2, "")
    assert (done.stderr.count("\n"), said in done.stderr) == (1, True), done.stderr
    assert {path: path.is_file() and path.read_bytes() for path in folder.iterdir()} == before


@requirement("R25.2", "R20.10", "R26.7")
def test_what_cards_say_of_themselves_is_kept_or_set_by_options(shell, folder):
    peft = {"peft": {"task_type": "CAUSAL_LM"}, "tags": ["code"]}
    for name, base in (("docs", "unsloth/Tiny-bnb-4bit"), ("law", "models/Tiny")):
        own = {"base_model": base, "metadata": {**peft, "description": f"about {name}"}}
        lora.save(card_of(name, len(name), **own), folder / f"{name}.lora.arrow")
    merge = ("merge", "docs.lora.arrow", "law.lora.arrow", "-o", "both.lora.arrow")
    refused = shell(*merge)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.endswith("if all are one, name it: --base-model\n")
    done = shell(*merge, "--base-model", "Tiny")
    assert done.returncode == 0, done.stderr
    assert "no description, since the cards' differ: --description sets one" in done.stdout
    both = lora.inspect(folder / "both.lora.arrow")
    assert (both.base_model, both.metadata["tags"]) == ("Tiny", ["code"])
    assert "description" not in both.metadata
    shell("convert", "both.lora.arrow", "-o", "peft-both")
    config = json.loads((folder / "peft-both" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "Tiny")
    words = ["--base-model", "Other", "--description", "All of it", "--tag", "a", "--tag", "b"]
    sources = (merge[:-2], ("convert", "docs.lora.arrow"))
    extract = ("extract", "tuned.safetensors", "--base", "base.safetensors")
    for line in (*sources, extract):
        done = shell(*line, "-o", "told.lora.arrow", *words)
        assert done.returncode == 0, done.stderr
        assert "no description" not in done.stdout
        header = lora.inspect(folder / "told.lora.arrow")
        told = (header.base_model, header.metadata["description"], header.metadata["tags"])
        assert told == ("Other", "All of it", ["a", "b"])
        assert ("peft" in header.metadata) == (line is not extract)


@requirement("R25.2", "R20.10")
def test_a_merge_tells_what_truncation_costs_and_the_rank_that_would_do(shell, folder):
    merge = ("merge", "docs.lora.arrow", "law.lora.arrow", "-o", "both.lora.arrow")
    assert shell(*merge).stdout == "both.lora.arrow: 2 modules, rank 4, exact\n"
    exact = lora.load(folder / "both.lora.arrow")
    squares = np.stack(
        [np.linalg.svd(change(exact, m), compute_uv=False) ** 2 for m in exact.weights]
    )
    share = squares.sum(0).cumsum() / squares.sum()
    enough = next(rank for rank, part in enumerate(share, 1) if part >= 0.9)
    assert share[0] < 0.9
    text = shell(*merge, "--rank", 1).stdout
    kept, advice = f"which keeps {share[0]:.1%} of ΔW's squares", f"take --rank {enough}"
    assert text == f"both.lora.arrow: 2 modules, rank 1, {kept} (90 % would {advice})\n"
    facts = json.loads(shell(*merge, "--rank", enough, "--json").stdout)
    assert facts["kept"] >= 0.9
    assert facts["rank_90"] == enough


@requirement("R26.9", "R25.2")
def test_extract_names_what_changed_and_is_not_in_the_card(shell, folder):
    for name, value in (("base", 0.0), ("tuned", 3.0)):
        file = folder / f"{name}.safetensors"
        norm = {"norm.weight": np.full(4, value), "same": np.ones(2)}
        save_file({**load_file(file), **norm, f"only.{name}": np.full(4, 0.5)}, file)
    line = "extract tuned.safetensors --base base.safetensors -o x.lora.arrow"
    card = card_of("docs", 1)
    squares = sum(float(np.sum(change(card, module) ** 2)) for module in card.weights)
    whole = squares + 36 + 1 + 1
    text = shell(*line.split()).stdout.splitlines()
    held = f"The card holds {squares / whole:.1%} of the squares of the change."
    assert text[1] == f"{held} Not in it are:"
    assert text[2] == f"  norm.weight: norm 6, {36 / whole:.1%}"
    assert sorted(text[3:]) == [
        f"  only.{name}: norm 1, {1 / whole:.1%}" for name in ("base", "tuned")
    ]
    facts = json.loads(shell(*line.split(), "--json").stdout)
    assert set(facts["left_out"]) == {"norm.weight", "only.base", "only.tuned"}
    assert facts["left_out"]["norm.weight"]["norm"] == 6
    assert facts["held"] == pytest.approx(squares / whole)
    assert set(facts["modules"]["layer.0.query"]) == {"rank", "error", "energy"}


@requirement("R25.3")
@pytest.mark.parametrize(
    ("command", "title", "steps"),
    [
        ("merge docs.lora.arrow law.lora.arrow -o x.lora.arrow", "merging", "2/2"),
        ("convert docs.lora.arrow -o x.safetensors", "converting docs.lora.arrow", "2/2"),
        ("extract tuned.safetensors -o x.lora.arrow", "extracting tuned.safetensors", "2/2"),
        ("encode" + 300 * " a", "encoding", "300/300"),
    ],
)
def test_long_work_shows_how_far_it_is(shell, command, title, steps):
    done = shell(*command.split())
    assert done.returncode == 0, done.stderr
    assert title in done.stderr
    assert steps in done.stderr


@requirement("R7.10")
@pytest.mark.parametrize(
    ("command", "message"),
    {
        "inspect none/x.lora.arrow": "none",
        "encode a --card docs.lora.arrow": "if the base is another one, name it by --model",
        "route a --card plain.lora.arrow": "lora convert CARD -o FILE --description TEXT sets one",
        "merge docs.lora.arrow docs.lora.arrow -o x.lora.arrow --strategy dare": "rename one by "
        "lora convert CARD -o FILE --name NAME",
        "convert docs.lora.arrow -o full": "or with --overwrite one that holds",
        "convert docs.lora.arrow -o x.lora.arrow --overwrite": "--overwrite: expected a PEFT",
        "convert docs.lora.arrow -o x.safetensors --exact": "--exact: expected a PEFT folder",
        "fold base law.lora.arrow -o x": "--allow other_base waives this\n",
        "fold base docs.lora.arrow -o x --allow all": "--allow: expected one of other_base",
        "encode a --card shape.lora.arrow": "for another encoder, name it by --model\n",
        "encode a --card target.lora.arrow": "for another encoder, name it by --model\n",
        "eval target.lora.arrow --pairs pairs.jsonl": "encoder, name it by --model\n",
        "probe none.txt": "lora: none.txt: no such file or directory (",
        "encode --parquet none.parquet --out x.parquet": "none.parquet",
        "convert docs.lora.arrow -o base.safetensors/x.lora.arrow": "x.lora.arrow: not a directory",
        "merge docs.lora.arrow -o x.lora.arrow --rank 0": "--rank: expected an integer >= 1",
        "merge x.safetensors -o y.lora.arrow": "none; say it by lora convert --alpha\n",
        "inspect x.safetensors": "found a safetensors file; lora convert makes a card of it\n",
        "merge docs.lora.arrow other.lora.arrow -o y.lora.arrow": "set it to None in Python\n",
    }.items(),
)
def test_an_error_says_what_to_do_in_the_words_of_the_command_line(shell, folder, command, message):
    module = "encoder.layer.0.attention.self.query"
    pair = LowRank(np.ones((384, 1)), np.ones((1, 384)))
    card = LoRACard("docs", 1, 1.0, ["query"], {module: pair}, base_fingerprint="0" * 64)
    lora.save(card, folder / "docs.lora.arrow")
    lora.save(replace(card, base_fingerprint=None), folder / "plain.lora.arrow")
    lora.save(replace(card, name="other", base_fingerprint="1" * 64), folder / "other.lora.arrow")
    save_file({"q.lora_a": pair.A.T, "q.lora_b": pair.B.T}, folder / "x.safetensors")
    fingerprint = {"base_fingerprint": "0" * 64}
    lora.save(replace(card_of("law", 2), **fingerprint), folder / "law.lora.arrow")
    narrow = {module: LowRank(np.ones((3, 1)), np.ones((1, 384)))}
    lora.save(replace(card, weights=narrow), folder / "shape.lora.arrow")
    lora.save(replace(card, target_modules=["q"]), folder / "target.lora.arrow")
    (folder / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 12)
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    done = shell(*command.split())
    is_usage = command.endswith(("--overwrite", "--exact", "--rank 0", "--allow all"))
    assert (done.returncode, done.stdout) == (2 if is_usage else 1, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not re.search(r"Errno|\w=\w|\w=\.\.\.|\w\(|`", done.stderr), done.stderr


@requirement("R7.10")
def test_every_advice_in_python_has_words_of_the_command_line():
    """Of every text in the package that sets a keyword, some command has it as an option."""
    commands = typer.main.get_command(app).commands
    commands = [*commands.values(), *commands["factory"].commands.values()]
    options = [option for command in commands for option in command.params]
    flags = {"--help", *(flag for option in options for flag in option.opts)}
    elsewhere = {"safe_serialization", "max_cards", "max_bytes", "narrow", "probe", "recurse"}
    elsewhere |= {"share"}
    for path in sorted(Path(lora.__file__).parent.rglob("*.py")):
        if path.parent.name == "testing":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and id(node) not in docstrings:
                text = in_options(node.value)
                keywords = re.findall(r"\b([a-z_]+)=(?:True|False|\.\.\.)(?!\w)", text)
                assert set(keywords) <= elsewhere, (path, text)
                named = re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", text)
                assert set(named) <= flags, (path, text)


@requirement("R25.3", "R24.5")
@pytest.mark.parametrize(
    "words", ["--json v.json", "--json=v.json", "--json-file v.json", "--json"]
)
def test_conformance_prints_json_or_writes_it_and_takes_the_old_option(
    shell, folder, monkeypatch, words
):
    entry = {"verdict": "passed", "reason": "", "statement": "It holds.", "tests": []}
    report = {"requirements": {"R16.2": {**entry, "classes": {"law": "passed"}}}}
    report |= {"profile": "dev", "seed": "1", "suite": "0.1.0", "specification": "f16fe6128cc3"}
    monkeypatch.setattr("lora.testing.report.run_suite", lambda *_, **__: report)
    done = shell("conformance", "--only", "R16.2", *words.split())
    assert done.returncode == 0, done.stderr
    warned = "--json FILE is --json-file FILE now" in done.stderr
    assert warned == (words in ("--json v.json", "--json=v.json"))
    where = done.stdout if words == "--json" else (folder / "v.json").read_text()
    assert json.loads(where) == report
    assert done.stdout.startswith("{") == (words == "--json")
