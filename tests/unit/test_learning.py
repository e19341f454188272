"""Learning by example: what is accepted, refused, kept beside a card, and never in it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lora
from lora.cli.app import NOTHING_TO_SERVE
from lora.errors import ArgumentError, BaseModelError, ConflictError, DataError, LoRAError
from lora.evolution import exam
from lora.evolution.acceptance import FEWEST, MOST
from lora.evolution.documents import Source
from lora.evolution.exam import Live, Terms, digest, divided, learn, placebo
from lora.evolution.teacher import Distilled
from lora.federation import LoRAFlightClient, LoRAFlightServer
from lora.federation.catalog import card_files
from lora.learning import _name, evolve, guard, routing_checks, summary
from lora.testing.plugin import requirement
from lora.training.data import Pairs
from lora.training.train import LoRATrainer, ranks
from tests.unit.letters import LETTERS, SETTINGS, combined, core, engine, subject, write_documents


@pytest.fixture(scope="module")
def placebos(tmp_path_factory):
    return tmp_path_factory.mktemp("placebos")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Train fast, and let the letters a to d stand for the standard library."""
    monkeypatch.setattr(exam, "LEARNING", SETTINGS)
    monkeypatch.setattr(exam, "standard_library", lambda form: combined("abcd"))


@pytest.fixture
def terms(placebos):
    return Terms(rank=4, placebos=placebos, documents_only=True)


def learned(terms, source, name="skill", **options):
    return learn(engine(), name, source, terms=terms, **options)


@requirement("R18.3")
@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (subject("efgh"), "skill"),
        (subject("efgh", shuffled=3), "nothing"),
        (subject("abcd"), "format"),  # what the placebo was trained on
        (subject("efgh", size=6), "can't tell"),
        (Source(combined("efgh").take(range(10))), "can't tell"),
        (Source(combined("efgh").take([0, 50, 90] * 200)), "can't tell"),
        (
            Source(
                Pairs.of(
                    [{**row, "group": "one file"} for row in combined("efgh").table.to_pylist()]
                )
            ),
            "can't tell",
        ),
        (
            Source(
                Pairs.of(
                    {**row, "group": str(i % 8)}
                    for i, row in enumerate(combined("efgh").table.to_pylist())
                )
            ),
            "can't tell",
        ),
    ],
    ids=["real", "shuffled", "placebo again", "few", "ten pairs", "copies", "one file", "8 files"],
)
def test_only_what_beats_base_and_placebo_on_files_that_it_did_not_see_is_a_skill(
    terms, source, kind
):
    lesson = learned(terms, source)
    assert (lesson.verdict.kind, lesson.live) == (kind, kind == "skill")
    assert bool(lesson.reason) == (kind != "skill")
    assert ("comes from these documents" in summary(lesson)) == lesson.live
    json.dumps(dict(lesson.figures))
    if kind != "can't tell":
        assert set(lesson.verdict.changes) == {"base", "placebo prose", "placebo short"}
        assert lesson.figures["changes"]["base"] == vars(lesson.verdict.changes["base"])
        assert lesson.figures["pairs"]["held_out"] == 160 >= FEWEST
    else:
        assert lesson.card is None
        assert lesson.reason.startswith("can't tell")


@requirement("R18.3")
@pytest.mark.parametrize(("files", "held_out"), [(8, 4), (9, 5), (20, 8), (200, 32)])
def test_many_files_are_held_out_where_two_would_have_enough_pairs(files, held_out):
    rows = [{"query": f"q{i}", "positive": f"a{i}", "group": str(i % files)} for i in range(3600)]
    training, examined = divided(Pairs.of(rows), 0)
    assert len(set(examined.table["group"].to_pylist())) == held_out
    assert len(set(training.table["group"].to_pylist())) == files - held_out


@requirement("R18.3")
@pytest.mark.parametrize(("small", "held_out"), [(60, {"small"}), (10, {"small", "large"})])
def test_a_large_file_is_examined_only_where_the_small_ones_do_not_suffice(small, held_out):
    sizes = {f"small {i}": 12 for i in range(small)} | {f"large {i}": 90 for i in range(8)}
    groups = [group for group, size in sizes.items() for _ in range(size)]
    rows = [{"query": f"q{i}", "positive": f"a{i}", "group": g} for i, g in enumerate(groups)]
    for seed in range(9):
        _, examined = divided(Pairs.of(rows), seed)
        assert {name.split()[0] for name in examined.table["group"].to_pylist()} == held_out
        assert len(examined) == MOST


@pytest.fixture
def trained(monkeypatch):
    """The pairs of each training."""
    pairs_of_each, train = [], LoRATrainer.train

    def watched(trainer, pairs, **options):
        pairs_of_each.append(pairs)
        return train(trainer, pairs, **options)

    monkeypatch.setattr(LoRATrainer, "train", watched)
    return pairs_of_each


@requirement("R18.3")
def test_the_exam_is_on_other_files_served_and_with_the_base_where_it_abstains(terms, trained):
    lesson = learned(terms, subject("efgh"))
    training, held_out = divided(combined("efgh"), 0)
    assert digest(trained[0]) == lesson.figures["sha256"]["training"] == digest(training)
    assert lesson.figures["sha256"]["held_out"] == digest(held_out)
    for column in ("group", "query", "positive"):
        sides = (set(part.table[column].to_pylist()) for part in (training, held_out))
        assert not set.intersection(*sides)
    base = core()
    server = lora.ArrowEngine(base)
    server.register_lora(lesson.card)
    routed = [
        bool(server.encode_with_lora([query], intent_query=query).routes)
        for query in held_out.queries
    ]
    assert np.mean(routed) == lesson.figures["answered"]
    assert 0.5 < np.mean(routed) < 1
    own, plain = ranks(lora.adapt(base, lesson.card), held_out), ranks(base, held_out)
    served = np.where(routed, own, plain)
    change = lesson.verdict.changes["base"]
    assert (change.before, change.after) == pytest.approx((plain.mean(), served.mean()), rel=1e-9)


@requirement("R18.8")
def test_a_version_is_not_trained_on_the_sample_that_guards_it(terms, trained):
    first = learned(terms, subject("efgh"))
    live = Live({"skill": first.card}, {"skill": first.sample})
    texts = {*first.sample.queries, *first.sample.positives}
    for options in ({"answers": first.sample}, {"taught": Distilled(first.sample)}):
        trained.clear()
        learned(replace(terms, steps=1, seed=1), subject("efgh"), live=live, **options)
        assert not texts & {*trained[0].queries, *trained[0].positives}


@requirement("R18.8")
def test_a_question_that_is_logged_often_counts_once(terms):
    careful = replace(terms, documents_only=False, steps=1)
    for count, logged in ((1, answers(1).take([0] * 40)), (40, answers(40))):
        rows = logged.table.to_pylist()
        groups = [{**row, "group": "faq" if count > 1 else str(i)} for i, row in enumerate(rows)]
        lesson = learned(careful, subject("efgh"), answers=Pairs.of(groups))
        assert lesson.figures["pairs"]["answers"] == count
        assert (lesson.figures["answers"], lesson.live) == (None, False)
        assert "too few logged answers to test: it takes 20" in summary(lesson)


@requirement("R18.3")
@pytest.mark.parametrize("ending", ["", " ?!"])
def test_texts_that_a_document_repeats_are_not_trained_on(ending):
    pairs = combined("efgh")
    _, held_out = divided(pairs, 0)
    copied = Pairs.of(
        (query.upper() + ending, f"{answer}{ending}")
        for query, answer in zip(held_out.queries, held_out.positives, strict=True)
    )
    training, again = divided(pairs.add(copied), 0)
    texts = [{*part.queries, *part.positives} for part in (training, again)]
    assert not set.intersection(*({t.strip(" ?!").lower() for t in part} for part in texts))
    assert len(again) >= FEWEST


@requirement("R18.3")
def test_every_live_skill_is_an_alternative(terms, tmp_path):
    """Another name for the same subject is no gain over the first."""
    first = learned(terms, subject("efgh"), "first")
    live = Live({"first": first.card}, {"first": first.sample})
    second = learned(replace(terms, seed=1), subject("efgh"), "second", live=live)
    assert (second.verdict.kind, second.live) == ("nothing", False)
    assert "skill first" in second.verdict.unbeaten
    assert "skill first" in second.reason
    assert not second.live


@requirement("R18.3")
def test_a_live_card_for_another_base_is_left_out_by_name(terms):
    card = learned(terms, subject("efgh"), "other").card
    other = replace(card, base_fingerprint="0" * 64)
    lesson = learned(terms, subject("efgh"), live=Live({"other": other}))
    assert lesson.live
    assert "fingerprint" in lesson.figures["left_out"]["other"]


@requirement("R18.3")
def test_a_weight_scales_the_card_and_its_placebos_alike(terms):
    whole, quarter = (
        learned(replace(terms, weight=weight), subject("efgh")) for weight in (1.0, 0.25)
    )
    for key, pair in whole.card.weights.items():
        assert quarter.card.weights[key].scaling == 0.25 * pair.scaling
        assert np.array_equal(quarter.card.weights[key].A, pair.A)
    sides = [lesson.verdict.changes["placebo prose"] for lesson in (whole, quarter)]
    assert sides[0].before != sides[1].before
    assert sides[0].mean > sides[1].mean


@requirement("R18.3")
def test_what_a_short_placebo_of_names_knows_as_well_is_refused(tmp_path, monkeypatch):
    letters = {"prose": "abcd", "names": "efgh"}  # the names tell all that the documents do
    monkeypatch.setattr(exam, "standard_library", lambda form: combined(letters[form]))
    terms = Terms(rank=4, placebos=tmp_path, documents_only=True)
    asked = []

    def count(engine, form, terms, progress):
        asked.append((form, terms.steps))
        return placebo(engine, form, terms, progress)

    monkeypatch.setattr(exam, "placebo", count)
    assert learned(terms, subject("efgh")).verdict.kind == "skill"
    assert asked == [("prose", 40), ("names", 15)]
    monkeypatch.setattr(exam, "SHORT", 40)  # so few letters are not learned in 15 steps
    lesson = learned(terms, subject("efgh"))
    assert lesson.verdict.changes["placebo prose"].lower > 0
    assert (lesson.verdict.kind, lesson.verdict.unbeaten) == ("format", ("placebo short",))


@requirement("R18.3", "R17.3")
def test_placebos_are_kept_by_base_form_and_steps(terms, tmp_path, monkeypatch):
    terms, one = replace(terms, placebos=tmp_path, steps=1), engine()
    first = placebo(one, "prose", terms)
    monkeypatch.setattr(exam, "standard_library", lambda form: pytest.fail("trained again"))
    assert placebo(one, "prose", terms) == first
    monkeypatch.undo()
    monkeypatch.setattr(exam, "standard_library", lambda form: combined("abcd"))
    placebo(one, "names", terms)
    placebo(one, "prose", replace(terms, steps=2))
    assert len(card_files(tmp_path)) == 3


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, placebos):
    """A folder of live cards with one skill, made from a folder of documents."""
    root = tmp_path_factory.mktemp("evolved")
    write_documents(root / "book", "efgh")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam, "LEARNING", SETTINGS)
        patch.setattr(exam, "standard_library", lambda form: combined("abcd"))
        terms = Terms(rank=4, placebos=placebos, documents_only=True)
        evolved = evolve(engine(), root / "book", root / "cards", name="book", terms=terms)
    return root, evolved


@requirement("R18.4", "R18.8")
def test_an_accepted_skill_is_a_card_to_serve_that_tells_where_it_comes_from(shelf):
    root, evolved = shelf
    facts = evolved.facts
    assert (facts["verdict"], facts["live"], facts["reason"]) == ("skill", True, None)
    (path,) = card_files(root / "cards")
    assert facts["file"] == str(path)
    card = lora.load(path, verify=facts["digest"])
    meta = card.metadata
    assert (card.name, meta["version"]) == ("book", "0.1.0")
    assert card.base_fingerprint is not None
    assert meta["provenance"] == json.loads(json.dumps(dict(evolved.lesson.figures)))
    assert meta["description"].startswith("book / ")
    assert len(meta["examples"]) == len(meta["example_groups"]) <= 256
    texts = {file.read_text() for file in (root / "book").iterdir()}
    assert all(any(example in text for text in texts) for example in meta["examples"])
    assert "MRR 0." in facts["text"]
    assert "comes from these documents" in facts["text"]
    assert "Not tested on real users' questions" in facts["text"]


@requirement("R18.4", "R18.8")
def test_a_peer_sees_the_skill_and_its_sample_is_not_served(shelf, tmp_path):
    root, evolved = shelf
    with (
        LoRAFlightServer(root / "cards") as server,
        LoRAFlightClient(server.uri, tmp_path) as client,
    ):
        (offer,) = client.list_remote_skills()
        assert (offer.name, offer.version) == ("book", "0.1.0")
        assert offer.description == lora.load(evolved.facts["file"]).metadata["description"]
        assert client.fetch_skill("book", digest=evolved.facts["digest"]).name == "book"


@requirement("R18.8")
def test_a_bounded_sample_is_kept_beside_the_card_and_only_there(shelf):
    _, evolved = shelf
    sample = Pairs.load(evolved.facts["exam"])
    assert len(sample) == FEWEST
    card = lora.load(evolved.facts["file"])
    assert not set(sample.queries) & set(card.metadata["examples"])
    assert "exam" not in card.metadata
    assert sample.queries[0] not in json.dumps(dict(card.metadata))


@requirement("R18.8", "R18.3", "R18.4")
def test_a_worse_version_is_refused_and_an_equal_one_rises(shelf, terms, tmp_path):
    root, evolved = shelf
    before = {path.name: path.read_bytes() for path in (root / "cards").iterdir()}
    card = lora.load(evolved.facts["file"])
    worse = replace(
        card,
        weights={key: replace(pair, B=np.zeros_like(pair.B)) for key, pair in card.weights.items()},
    )
    refused = guard(engine(), worse, root / "cards")
    assert "on the sample of 'book' the MRR falls by" in refused.refused
    assert refused.figures["guards"]["book"]["weak"] is False
    assert guard(engine(), card, root / "cards").refused == ""
    shuffled = write_documents(tmp_path / "noise", "efgh", shuffled=3)
    failed = evolve(engine(), shuffled, root / "cards", name="book", terms=terms)
    assert (failed.facts["live"], failed.facts["file"]) == (False, None)
    assert {path.name: path.read_bytes() for path in (root / "cards").iterdir()} == before
    out = tmp_path / "next"
    again = evolve(
        engine(),
        root / "book",
        out,
        name="book",
        cards=root / "cards",
        terms=replace(terms, seed=1),
    )
    assert (again.facts["live"], again.facts["version"]) == (True, "0.2.0")
    assert set(again.facts["figures"]["guards"]) == {"book"}
    assert set(again.facts["figures"]["changes"]) == {"base", "placebo prose", "placebo short"}


@requirement("R18.8")
def test_a_card_that_takes_anothers_questions_is_refused_by_the_share(shelf):
    root, _ = shelf
    own = lora.load(root / "cards" / "book.lora.arrow")
    thief = replace(
        own,
        name="thief",
        metadata={"examples": Pairs.load(root / "cards" / "book.exam.jsonl").queries},
    )
    refused = guard(engine(), thief, root / "cards")
    assert "of the sample of 'book', more than 5.0%" in refused.refused
    assert refused.figures["guards"]["book"]["taken"] > 0.5
    assert guard(engine(), thief, root / "cards", max_taken=1.0).refused == ""


@requirement("R18.8")
def test_a_card_for_another_base_is_refused_by_the_guard(shelf):
    root, evolved = shelf
    card = lora.load(evolved.facts["file"])
    alien = replace(card, name="alien", base_fingerprint="0" * 64)
    with pytest.raises(BaseModelError, match="fingerprint"):
        guard(engine(), alien, root / "cards")


@requirement("R18.4")
@pytest.mark.parametrize("version", ["1.0", "v2", 3, None])
def test_a_version_that_is_none_comes_before_all(shelf, tmp_path, version):
    card = lora.load(shelf[1].facts["file"])
    lora.save(replace(card, metadata={"version": version}), tmp_path / "a.lora.arrow")
    assert Live.read(tmp_path).next_version("book") == "0.1.0"
    lora.save(card, tmp_path / "b.lora.arrow")
    lora.save(card, tmp_path / "c.lora.arrow")  # a copy is no other card
    assert Live.read(tmp_path).next_version("book") == "0.2.0"
    lora.save(replace(card, alpha=card.alpha + 1), tmp_path / "d.lora.arrow")
    with pytest.raises(ConflictError, match=r"'book' 0\.1\.0: expected one card per name"):
        Live.read(tmp_path)


@requirement("R18.3")
def test_an_exam_adapts_each_card_once_and_ranks_each_pairs_once(terms, monkeypatch):
    lessons = {name: learned(terms, subject(name), name) for name in ("efgh", "ijkl")}
    calls = {"adapt": [], "ranks": []}

    def counted(name):
        function = getattr(exam, name)

        def count(model, subject):
            calls[name].append((model, subject))
            return function(model, subject)

        monkeypatch.setattr(exam, name, count)

    counted("adapt")
    counted("ranks")
    live = Live(*({n: getattr(each, a) for n, each in lessons.items()} for a in ("card", "sample")))
    learned(replace(terms, steps=1), subject("efgh"), "third", live=live)
    names = sorted(card.name for _, card in calls["adapt"])
    assert names == ["efgh", "ijkl", "placebo-names", "placebo-prose", "third"]
    ranked = [(id(model), id(pairs)) for model, pairs in calls["ranks"]]
    assert len(ranked) == len(set(ranked)) >= 5


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(LoRATrainer, "train", lambda *_, **__: pytest.fail("trained"))


@requirement("R18.4")
@pytest.mark.parametrize(("live", "refused"), [("0.1.0", False), ("0.1.1", True), ("1.0.0", True)])
def test_a_higher_version_in_the_folder_is_not_replaced(shelf, tmp_path, untrained, live, refused):
    card, out = lora.load(shelf[1].facts["file"]), tmp_path / "out"
    out.mkdir()
    (tmp_path / "none").mkdir()
    lora.save(replace(card, metadata={"version": live}), out / "book.lora.arrow")
    expected = (ConflictError, "no version above 0.1.0") if refused else (ArgumentError, "a log")
    log = tmp_path / "log.jsonl"
    answers(9).save(log)
    with pytest.raises(expected[0], match=expected[1]):
        evolve(engine(), log, out, name="book", cards=tmp_path / "none")


@requirement("R18.4", "R7.8")
@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "x" * 300, "\U0001f600" * 60, "a\nb"])
def test_a_name_that_is_no_file_name_is_refused_before_training(tmp_path, untrained, name):
    write_documents(tmp_path / "book", "efgh")
    with pytest.raises(LoRAError, match="name"):
        evolve(engine(), tmp_path / "book", tmp_path / "cards", name=name)
    assert [path.name for path in tmp_path.iterdir()] == ["book"]


@requirement("R18.4")
def test_folders_of_every_script_have_names_of_their_own(monkeypatch):
    monkeypatch.setattr("lora.learning.standard_library", lambda form: combined("abcd"))
    titles = ["Руководство", "手册", "Mon_guide é", "!!", "??"]
    names = [_name(title, ["a b"]) for title in titles]
    assert names[:3] == ["руководство", "手册", "mon-guide-é"]
    assert len(set(names)) == 5
    assert names[3].startswith("skill-")


@requirement("R18.8", "R7.8")
def test_a_file_in_place_of_the_folder_and_an_empty_sample_are_named(shelf, tmp_path, untrained):
    root, evolved = shelf
    (tmp_path / "file").write_text("")
    with pytest.raises(LoRAError, match="file: expected a folder"):
        evolve(engine(), root / "book", tmp_path / "file", name="book")
    lora.save(lora.load(evolved.facts["file"]), tmp_path / "book.lora.arrow")
    (tmp_path / "book.exam.jsonl").write_text("")
    with pytest.raises(DataError, match=r"book\.exam\.jsonl"):
        Live.read(tmp_path)


@requirement("R18.8")
def test_few_pairs_guard_weakly_and_none_are_named(shelf, terms, tmp_path):
    _, evolved = shelf
    card = lora.load(evolved.facts["file"])
    lora.save(card, tmp_path / "book.lora.arrow")
    assert guard(engine(), card, tmp_path).figures == {"guards": {}, "unguarded": ["book"]}
    Pairs.load(evolved.facts["exam"]).take(range(20)).save(tmp_path / "book.exam.jsonl")
    assert guard(engine(), card, tmp_path).figures["guards"]["book"]["weak"] is True


def answers(count):
    """Logged questions: what the documents say, in another order."""
    rows = combined("efgh").sample(count, 5).table.to_pylist()
    ends = {"query": " then .", "positive": " then now"}
    return Pairs.of(
        tuple(" ".join(row[key].split()[::-1]) + end for key, end in ends.items()) for row in rows
    )


@requirement("R18.8", "R5.14")
def test_without_real_questions_a_skill_is_not_live_unless_documents_are_said_to_do(
    terms, tmp_path
):
    book, careful = write_documents(tmp_path / "book", "efgh"), replace(terms, documents_only=False)
    out = tmp_path / "cards"
    alone = evolve(engine(), book, out, name="book", terms=careful)
    assert (alone.facts["verdict"], alone.facts["live"]) == ("skill", False)
    assert alone.facts["reason"].startswith("it was not shown on real questions: log answers, or")
    assert [path.name for path in out.iterdir()] == ["book.candidate.arrow"]
    assert card_files(out) == []
    log = tmp_path / "log.jsonl"
    answers(100).save(log)
    asked = evolve(engine(), book, out, name="book", answers=log, terms=careful)
    assert (asked.facts["live"], asked.facts["reason"]) == (True, None)
    assert asked.facts["figures"]["answers"]["queries"] == 50
    metadata = json.dumps(dict(lora.load(asked.facts["file"]).metadata))
    kept = metadata + Path(asked.facts["exam"]).read_text()
    assert not [t for t in (*answers(100).queries, *answers(100).positives) if t in kept]


@requirement("R18.8")
@pytest.mark.parametrize(
    ("mean", "lower", "taken", "documents_only", "reason"),
    [
        (0.1, 0.01, 0, False, ""),
        (0.1, 0.0, 0, False, "not shown on real questions"),
        (-0.019, -0.1, 0, True, ""),
        (-0.021, -0.1, 0, True, "on users' questions the MRR falls: 0.500 -> 0.479"),
        (0.1, 0.01, 1, True, ""),
        (0.1, 0.01, 2, True, "it answers 2 of 20 questions that are for others"),
    ],
)
def test_real_questions_speak_for_a_skill_or_veto_it(mean, lower, taken, documents_only, reason):
    asked = {"before": 0.5, "after": 0.5 + mean, "mean": mean, "lower": lower}
    figures = {"answers": asked, "questions": {"taken": taken, "others": 20}}
    terms = Terms(documents_only=documents_only)
    assert reason in (got := exam.vetoed(figures, terms, is_log=False))
    assert bool(got) == bool(reason)


@requirement("R18.8")
def test_questions_are_in_a_card_only_by_their_owners_word(terms, tmp_path):
    log = tmp_path / "log.jsonl"
    combined("efgh").save(log)
    with pytest.raises(ArgumentError, match="share_questions"):
        evolve(engine(), log, tmp_path / "cards", name="log", terms=terms)
    shared = evolve(
        engine(),
        log,
        tmp_path / "cards",
        name="log",
        terms=replace(terms, share_questions=True, documents_only=False),
    )
    assert shared.facts["live"]
    assert "Not tested on real" not in shared.facts["text"]
    assert shared.facts["exam"] is None  # users' questions are not kept in a folder that is served
    both = learned(
        replace(terms, share_questions=True), subject("efgh"), answers=answers(50)
    ).card.metadata["examples"]
    assert len(set(both) & set(answers(50).queries)) == 25
    exam_pairs = learned(replace(terms, share_exam=True), subject("efgh")).card.metadata["exam"]
    assert len(exam_pairs) == FEWEST


@requirement("R18.3", "R25.2")
def test_evolve_is_a_command_that_says_what_came_of_it(here, tmp_path, monkeypatch, placebos):
    monkeypatch.setattr("lora.ArrowEngine.from_pretrained", lambda _: engine())
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "book", "efgh")
    write_documents(tmp_path / "noise", "efgh", shuffled=3)
    (tmp_path / "checks.jsonl").write_text(
        '{"query": "eb gd then ."}\n{"query": "ia kb", "skill": null}\n'
    )
    options = ["--rank", 4, "--placebos", placebos, "--out", "cards", "--json", "--name", "book"]
    code, out, _ = here("evolve", "noise", *options, "--documents-only")
    facts = json.loads(out)
    assert (code, facts["file"], facts["verdict"]) == (NOTHING_TO_SERVE, None, "nothing")
    assert facts["reason"]
    code, out, _ = here("evolve", "book", *options)
    assert (code, json.loads(out)["candidate"]) == (NOTHING_TO_SERVE, "cards/book.candidate.arrow")
    options += ["--documents-only", "--questions", "checks.jsonl"]
    code, out, _ = here("evolve", "book", *options)
    facts = json.loads(out)
    assert (code, facts["file"], facts["exam"]) == (
        0,
        "cards/book.lora.arrow",
        "cards/book.exam.jsonl",
    )
    checks = facts["figures"]["questions"]
    assert (checks["own"], checks["others"]) == (1, 1)
    code, out, err = here("route", "eb gd then .", "--cards", "cards")
    assert (code, out.split()[1:], err) == (0, ["book"], "")
    code, out, err = here("route", "ia kb ic", "--cards", "cards")
    assert (code, out) == (0, "")
    assert "'book' scores" in err
    assert "routes from" in err


RUSSIAN = "Гончар {0} сушит. Сосуд {0} стоит во влажной ткани."


def said(letters, count=400, **options):
    """What documents about four letters say, paragraph by paragraph."""
    rows = combined(letters, **options).take(range(count)).table.to_pylist()
    return [f"{row['query']} then . {row['positive']} then now" for row in rows]


def paragraphs(texts, files=20):
    """Return texts as paragraphs, in turn of so many files."""
    return {f"{i}.md": "\n\n".join(texts[i::files]) for i in range(files)}


BAD = {
    "Russian": (
        paragraphs([RUSSIAN.format(i) for i in range(400)]),
        ("nothing", "it does not surely beat base"),
    ),
    "Chinese": (
        paragraphs(["陶工让黏土慢慢变干。他把器皿裹在湿布里。"] * 40),
        (None, "'.txt'), found none"),
    ),
    "binaries": (
        {"image.md": bytes(range(256)) * 40, "data.bin": b"\0" * 99},
        (None, "expected Python files with docstrings"),
    ),
    "a document that repeats the exam": (
        paragraphs(said("efgh", shuffled=3))
        | {
            f"zz{i}.md": "\n\n".join(said("efgh", shuffled=3)).replace("then", f"then{'!' * i}")
            for i in range(1, 5)
        },
        ("nothing", "it does not surely beat"),
    ),
    "duplicates": (paragraphs(said("efgh", 30) * 20, 19), ("can't tell", "at least 128 pairs")),
    "one file": (paragraphs(said("efgh"), 1), ("can't tell", "can't tell: it takes at least 128")),
    "ten pairs": (paragraphs(said("efgh", 10)), ("can't tell", "there are 5 of 5 and 5")),
    "a model that can't hold its description": (
        paragraphs([text.replace("then .", "then then .") for text in said("efgh")]),
        (None, "expected at most 16 tokens each"),
    ),
    "a log that is no JSON": ('{"query": "a", "positive": "b"}\nnonsense', (None, "line 2")),
    "a log of nonsense": (
        "\n".join(
            json.dumps({"query": f"{LETTERS[i % 9]}a x{i}", "positive": f"y{i * 7 % 400} aa"})
            for i in range(400)
        ),
        ("nothing", "it does not surely beat"),
    ),
}


@pytest.fixture
def beside_a_skill(shelf, tmp_path, monkeypatch):
    """A folder, which commands run in, with a folder of cards that has a skill."""
    monkeypatch.setattr("lora.ArrowEngine.from_pretrained", lambda _: engine())
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shelf[0] / "cards", "cards")


@requirement("R18.3", "R18.8", "R25.3")
@pytest.mark.parametrize(("content", "expected"), BAD.values(), ids=BAD)
def test_bad_input_has_a_clear_end_and_the_last_good_skill_serves_on(
    here, beside_a_skill, placebos, content, expected
):
    if isinstance(content, str):
        Path("input.jsonl").write_text(content)
        line = ["input.jsonl", "--share-questions"]
    else:
        Path("input").mkdir()
        for name, text in content.items():
            Path("input", name).write_bytes(text if isinstance(text, bytes) else text.encode())
        line = ["input", "--documents-only"]
    before = {path.name: path.read_bytes() for path in Path("cards").iterdir()}
    options = ["--out", "cards", "--name", "book", "--rank", 4, "--placebos", placebos, "--json"]
    code, out, err = here("evolve", *line, *options)
    verdict, message = expected
    if verdict is None:
        assert (code, out, err.count("lora: "), err.count("\n")) == (1, "", 1, 1)
        assert message in err
    else:
        facts = json.loads(out)
        assert (code, facts["verdict"], facts["file"]) == (NOTHING_TO_SERVE, verdict, None)
        assert message in facts["reason"]
    assert {path.name: path.read_bytes() for path in Path("cards").iterdir()} == before
    assert here("route", "eb gd then .", "--cards", "cards")[1].split()[1:] == ["book"]


@requirement("R18.3")
def test_a_wrong_line_of_routing_checks_is_refused_by_its_place(tmp_path):
    log = tmp_path / "log.jsonl"
    for line in ("nonsense", "[]", '{"question": "a"}', '{"query": "a", "skill": 3}'):
        log.write_text(f'{{"query": "fine"}}\n{line}\n')
        with pytest.raises(DataError, match="line 2"):
            routing_checks(log, "book")
    assert [
        check["skill"]
        for check in routing_checks_of(log, '{"query": "a"}', '{"query": "b", "skill": null}')
    ] == ["book", None]


def routing_checks_of(path, *lines):
    path.write_text("\n".join(lines))
    return routing_checks(path, "book")
