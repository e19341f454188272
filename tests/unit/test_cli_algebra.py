"""The commands that make cards of cards and of weights: merge, extract, convert; and the drawing of
inspect.
"""

import json
from collections import namedtuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora
from lora.card import LoRACard, LowRank
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
        "--density 0.5": "--density: expected an option of average",
        "--strategy ties --density 2": "ties: density: expected",
        "--strategy weighted --weight 1": "weights: expected one for each of 2 cards, found 1",
        "--rank 0": "merge: rank: expected an integer >= 1",
    }.items(),
)
def test_a_merge_that_can_not_be_is_one_line_and_writes_nothing(shell, folder, options, said):
    cards = ("docs.lora.arrow", "law.lora.arrow")
    done = shell("merge", *cards, "-o", "both.lora.arrow", *options.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("lora: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (folder / "both.lora.arrow").exists()


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


@requirement("R25.2", "R23.4", "R23.5")
def test_convert_goes_to_peft_and_to_safetensors_and_back(shell, folder):
    for there in ("peft-docs", "docs.safetensors"):
        for source, target in (("docs.lora.arrow", there), (there, "back.lora.arrow")):
            done = shell("convert", source, "-o", target)
            assert done.returncode == 0, done.stderr
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
        "probe", "--base", "base.safetensors", "--tuned", "tuned.safetensors", "--rank", 2, "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["name"] for row in rows} == {"layer.0.query", "layer.1.query"}
    assert rows[0]["change"] >= rows[1]["change"]
    assert all(0.999 < row["held"] <= 1 for row in rows)  # the change is of rank 2


@requirement("R25.2", "R15.4")
def test_probe_ranks_the_blocks_of_the_real_encoder(shell, folder):
    (folder / "texts.txt").write_text(
        "a card is a value\n\nadapting is a function\nstate is one reference\n"
    )
    done = shell("probe", "texts.txt", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert sum(row["kind"] == "block" for row in facts["rows"]) == 6
    assert set(facts["correlations"]) == {"magnitude", "wanda", "influence"}
    assert set(facts["hot"]) <= {f"encoder.layer.{i}" for i in range(6)}


@requirement("R25.2")
def test_inspect_draws_where_it_is_told_to(shell, folder):
    done = shell("inspect", "docs.lora.arrow", "--plot", "docs.svg", "--json")
    assert done.returncode == 0, done.stderr
    assert "effective rank" in (folder / "docs.svg").read_text()
    assert shell("inspect", "docs.lora.arrow", "--plot", "docs.exe").returncode == 1


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
        f"{EXTRACT} --rank 0": "rank: expected an integer >= 1, found 0",
        f"{EXTRACT} --name=": "card name: expected non-empty",
        f"{EXTRACT} --rank 2 --energy 0.5": "one of --rank, --energy, --error, found 2 of them",
        "merge docs.lora.arrow -o none/x.lora.arrow": "found no folder none",
        "merge docs.lora.arrow -o x.safetensors": "expected another ending, found .safetensors",
        "conformance --only R4.4 --json none/x.json": "found no folder none",
        "probe latin.txt": "latin.txt: expected text in UTF-8",
        "probe none.txt": "none.txt: expected text in UTF-8",
        "probe latin.txt --share 2": "share: expected a number in (0, 1], found 2.0",
        "probe latin.txt --base base.safetensors --tuned tuned.safetensors": "found both",
        "probe --base base.safetensors": "--base and --tuned together",
        "convert docs.lora.arrow -o x.lora.arrow --alpha 3": "a .safetensors file as the source",
    }.items(),
)
def test_what_can_not_be_done_is_refused_in_one_line_before_the_work(shell, folder, command, said):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    before = set(folder.iterdir())
    done = shell(*command.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert (done.stderr.count("\n"), said in done.stderr) == (1, True), done.stderr
    assert set(folder.iterdir()) == before
