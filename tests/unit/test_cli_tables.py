"""What commands show a person: in 80 columns, with every name, digest and address whole."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

import lora
from lora.evolution.factory import SkillFactory
from lora.evolution.queue import Job
from lora.testing.plugin import requirement
from lora.training.data import Pairs
from tests.unit.hostile import Liar, announced
from tests.unit.hostile import made as small

NAME = "python-documentation-of-functions-and-classes-by-first-sentence"
ABOUT = "What a function, a class or a module of Python's standard library does, " * 3


def layered(name, places, ranks=None, **metadata):
    """A card with a pair at each of these places."""
    ones = {
        place: lora.LowRank(np.ones((4, rank), "f4"), np.ones((rank, 4), "f4"), 2.0)
        for place, rank in zip(places, ranks or [2] * len(places), strict=True)
    }
    return lora.LoRACard(name, max(ranks or [2]), 4.0, places, ones, metadata)


@pytest.fixture
def shown(here, monkeypatch):
    """What a command prints, in lines that fit and end without blanks."""

    def show(*argv):
        monkeypatch.setenv("COLUMNS", "80")
        code, out, err = here(*argv)
        assert code == 0, err
        assert [line for line in out.splitlines() if len(line) > 80 or line != line.rstrip()] == []
        return out

    return show


@requirement("R25.5")
def test_inspect_has_the_digest_in_one_line_and_a_line_for_modules_that_repeat(shown, tmp_path):
    path = tmp_path / "card.lora.arrow"
    parts = ("attention.self.query", "attention.self.value")
    places = [f"encoder.layer.{i}.{part}" for i in range(12) for part in parts]
    card = layered(NAME, [*places, "pooler.dense"], description=ABOUT, version="1.0.0")
    lora.save(replace(card, base_fingerprint="0" * 64), path)
    out = shown("inspect", path)
    assert re.search(rf"^digest +{lora.digest(path)}$", out, re.MULTILINE)
    assert re.search("^fingerprint +0{64}$", out, re.MULTILINE)
    assert re.search(rf"^name +{NAME}$", out, re.MULTILINE)
    assert (
        " ".join(out.split())
        .partition(" targets ")[2]
        .startswith(
            f"encoder.layer.0…11.{parts[0]}, encoder.layer.0…11.{parts[1]}, pooler.dense parameters"
        )
    )
    assert ABOUT.split() == out.partition("description")[2].partition("  version")[0].split()
    rows = [line.split()[:5] for line in out.splitlines() if line.startswith(("encoder", "pooler"))]
    assert rows == [
        *([f"encoder.layer.0…11.{part}", "12", "4", "2", "4"] for part in parts),
        ["pooler.dense", "1", "4", "2", "4"],
    ]


@requirement("R25.5")
@pytest.mark.parametrize(
    ("places", "ranks", "rows"),
    [
        (["h.0.q", "h.2.q", "h.3.q"], [2, 2, 2], ["h.0,2,3.q 3"]),
        (["h.0.q", "h.1.q", "h.2.q"], [2, 1, 2], ["h.0,2.q 2", "h.1.q 1"]),
        (["0", "1", "q"], [1, 1, 1], ["0,1 2", "q 1"]),
        (
            [f"layer.{i}.experts.{j}.w1" for i in range(3) for j in range(4)],
            [1] * 12,
            ["layer.0…2.experts.0…3.w1 12"],
        ),
    ],
)
def test_inspect_puts_modules_together_that_differ_in_numbers_alone(
    shown, tmp_path, places, ranks, rows
):
    path = tmp_path / "card.lora.arrow"
    lora.save(layered("a", places, ranks), path)
    lines = shown("inspect", path).partition("──\n")[2].splitlines()
    assert [" ".join(line.split()[:2]) for line in lines] == rows


@requirement("R25.5")
def test_a_name_that_is_longer_than_a_line_is_folded_not_cut(shown, tmp_path):
    path, name = tmp_path / "card.lora.arrow", ".".join(["transformer"] * 8)
    lora.save(layered(name, [name]), path)
    facts, _, table = shown("inspect", path).partition("──\n")
    assert name in "".join(facts.split())
    assert "".join(line.split()[0] for line in table.splitlines()) == name


@requirement("R25.5")
def test_inspect_says_where_long_metadata_end_and_what_is_not_text_as_json(shown, tmp_path):
    path = tmp_path / "card.lora.arrow"
    extremes = {"examples": ["how do I open a file"] * 99, "scores": {"mrr": 0.5}}
    extremes["text"] = "many words\n" * 99
    lora.save(layered("a", ["q"], **extremes), path)
    out = shown("inspect", path)
    assert "(whole with --json)" in " ".join(out.split())
    assert '{"mrr": 0.5}' in out
    assert out.count('"') == 4  # a text that is cut has both
    assert len(out.splitlines()) < 30


@requirement("R25.5", "R25.2")
def test_list_shows_names_digests_and_peers_whole(shown, tmp_path):
    card = small(NAME, description=ABOUT, version="1.0.0")
    manifest = announced(card, tmp_path / "a")
    with Liar([manifest], lambda: [b""]) as liar:
        out = shown("list", "--peer", liar.uri)
        assert shown("list", "--peers", "--peer", liar.uri).count(liar.uri) == 1
    assert f"{NAME} 1.0.0\n" in out
    assert re.search(rf"^  digest +{manifest.digest}$", out, re.MULTILINE)
    assert re.search(rf"^  peers +{re.escape(liar.uri)}$", out, re.MULTILINE)
    assert ABOUT.split() == out.partition("description")[2].partition("\n  peers")[0].split()
    assert "None" not in out


@requirement("R25.5", "R19.7")
def test_a_factory_shows_errors_and_digests_whole_and_no_empty_columns(shown, tmp_path):
    root, why = tmp_path / "factory", "it learned the format of the task only, " * 9
    shop = SkillFactory(root)
    shop.queue.add(Job.of(["merge"], NAME[:40]), 0.0)
    out = shown("factory", "status", "--root", root)
    assert out.split()[:4] == ["id", "kind", "name", "state"]  # nothing has another
    assert NAME[:40] in out
    shop.queue.reject(shop.queue.claim(1.0), 2.0, why, '{"mrr": 0.5}')
    assert why.split() == shown("factory", "status", "--root", root).split()[-9 * 8 :]
    history = shown("factory", "status", "--history", "--root", root).splitlines()
    assert history[-1] == f'{datetime.fromtimestamp(2, UTC):%Y-%m-%d %H:%M:%S}  {{"mrr": 0.5}}'
    path = tmp_path / "a.lora.arrow"
    lora.save(small("a"), path)
    shop.add(["merge", str(path), "--name", "both"])
    shop.run()
    (digest,) = [row["digest"] for row in shop.skills().to_pylist()]
    assert shown("factory", "status", "--skills", "--root", root).splitlines()[:3] == [
        "both 0.1.0",
        "  live    yes",
        f"  digest  {digest}",
    ]


@requirement("R25.5", "R25.3")
@pytest.mark.parametrize("option", [(), ("--skills",), ("--history",)])
def test_the_status_of_an_empty_folder_says_so_and_makes_none(here, tmp_path, option):
    root = tmp_path / "factory"
    status = ("factory", "status", "--root", root, *option)
    assert here(*status) == (0, f"no factory in {root}: `lora factory add` makes one\n", "")
    assert here(*status, "--json") == (0, "[]\n", "")
    assert not root.exists()
    SkillFactory(root)
    what = (*option, "jobs")[0].removeprefix("--")
    assert here(*status) == (0, f"no {what} yet\n", "")


@requirement("R25.5", "R25.2")
def test_eval_shows_names_whole_and_each_figure_in_three_digits(shown, folder, tmp_path):
    out = shown("eval", folder / "card.lora.arrow", "--pairs", folder / "pairs.jsonl")
    head, _, base, row = out.splitlines()
    assert head.split() == ["name", "mrr", "recall_at_1", "gain", "lower", "upper"]
    assert re.fullmatch(r"\(base\) +\d\.\d{3} +\d\.\d{3}", base)
    assert re.fullmatch(rf"{NAME[:30]} +\d\.\d{{3}} +\d\.\d{{3}}( +[-+]\d\.\d{{3}}){{3}}", row)


@pytest.fixture
def folder(tmp_path):
    """A card of MiniLM's shapes and pairs."""
    rng = np.random.default_rng(0)
    pair = lora.LowRank(*(rng.normal(0, 0.3, s).astype("f4") for s in ((384, 2), (2, 384))))
    weights = {"encoder.layer.0.attention.self.query": pair}
    lora.save(lora.LoRACard(NAME[:30], 2, 4.0, ["query"], weights), tmp_path / "card.lora.arrow")
    rows = [{"query": f"number {i}", "positive": f"n{i}", "group": str(i % 4)} for i in range(16)]
    Pairs.of(rows).save(tmp_path / "pairs.jsonl")
    return tmp_path


@requirement("R25.3")
def test_json_keeps_what_a_listing_puts_together(here, tmp_path):
    path = tmp_path / "card.lora.arrow"
    places = [f"layer.{i}.query" for i in range(3)]
    lora.save(layered("a", places), path)
    assert list(json.loads(here("inspect", path, "--json")[1])["modules"]) == places
