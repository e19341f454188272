"""encode_batches: alone, on a real Dask cluster that loses a worker, on Ray, and from the command
line.
"""

import os
import signal
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import lora
from lora.batches import encode_batches
from lora.card import LoRACard, LowRank
from lora.errors import ArgumentError, ConflictError, DataError, TargetError, UnknownCardError
from lora.testing.plugin import requirement
from tests.unit.test_cli import shell

TEXTS = ["reading a file", None, "cooking rice", ""]
TEXTS += ["opening a path", "boiling soup", "writing bytes"]


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Two skills that change every embedding, in files."""
    folder = tmp_path_factory.mktemp("cards")
    rng, paths = np.random.default_rng(0), []
    described = {"docs": "reading and writing files", "food": "cooking and recipes"}
    for name, description in described.items():
        shapes = (384, 2), (2, 384)
        pair = LowRank(*(rng.normal(0, 0.2, shape).astype(np.float32) for shape in shapes), 1.0)
        weights = {"encoder.layer.0.attention.self.query": pair}
        card = LoRACard(name, 2, 2.0, ("query",), weights, {"description": description})
        paths.append(str(folder / f"{name}.lora.arrow"))
        lora.save(card, paths[-1])
    return paths


def batches(count=1, **columns):
    ids = list(range(len(TEXTS) * count))
    whole = pa.record_batch({"id": ids, "text": TEXTS * count, **columns})
    return [whole.slice(at, 3) for at in range(0, whole.num_rows, 3)]


def embeddings(found):
    return pa.Table.from_batches(found)["embedding"].to_pylist()


@requirement("R5.12")
def test_every_row_is_what_the_engine_gives_alone_and_a_null_stays_null(cards):
    engine = lora.ArrowEngine.from_pretrained()
    for path in cards:
        engine.load_lora(path)
    for name in (None, "docs", "food"):
        expected = engine.encode_with_lora(["cooking rice"], name or {}).embeddings[0]
        found = list(encode_batches(batches(), cards=cards if name else (), adapter=name))
        assert [batch.num_rows for batch in found] == [3, 3, 1]
        assert pa.Table.from_batches(found)["id"].to_pylist() == list(range(7))
        rows = embeddings(found)
        assert [row is None for row in rows] == [text is None for text in TEXTS]
        assert np.allclose(rows[2], expected, atol=1e-5)
        names = pa.Table.from_batches(found)["adapter"].to_pylist()
        assert names == [name if text is not None else None for text in TEXTS]


@requirement("R5.12")
def test_a_column_may_name_each_rows_card_and_the_router_may_choose_it(cards):
    wanted = ["docs", "docs", None, "food", "docs", "food", None]
    found = list(encode_batches(batches(skill=wanted), cards=cards, adapter_column="skill"))
    names = [name if text is not None else None for name, text in zip(wanted, TEXTS, strict=True)]
    assert pa.Table.from_batches(found)["adapter"].to_pylist() == names
    rows = embeddings(found)
    docs = embeddings(list(encode_batches(batches(), cards=cards, adapter="docs")))
    base = embeddings(list(encode_batches(batches())))
    assert np.allclose(rows[0], docs[0], atol=1e-5)
    assert np.allclose(rows[2], base[2], atol=1e-5)
    assert not np.allclose(rows[0], base[0], atol=1e-3)
    table = pa.Table.from_batches(list(encode_batches(batches(), cards=cards, route=True)))
    routed = table["adapter"].to_pylist()
    assert routed[0] == routed[6] == "docs"
    assert routed[2] == "food"
    assert set(
        pa.Table.from_batches(
            list(encode_batches(batches(), cards=cards, route=True, threshold=1.0))
        )["adapter"].to_pylist()
    ) == {None}


@requirement("R5.12")
def test_no_batch_and_empty_batches_are_no_special_case():
    assert list(encode_batches([])) == []
    (found,) = encode_batches([pa.record_batch({"text": pa.array([], pa.string())})])
    assert (found.num_rows, found.schema.names) == (0, ["text", "embedding", "adapter"])


@requirement("R5.12", "R7.8")
def test_what_does_not_fit_is_named(cards):
    with pytest.raises(ArgumentError, match="one of adapter"):
        list(encode_batches([], adapter="docs", route=True))
    with pytest.raises(UnknownCardError, match="none of that name"):
        list(encode_batches([], cards=cards, adapter="law"))
    with pytest.raises(UnknownCardError):
        list(encode_batches(batches(skill=["law"] * 7), cards=cards, adapter_column="skill"))
    for wrong in ({"column": "body"}, {"column": "id"}, {"adapter_column": "id"}):
        with pytest.raises(DataError, match="of texts"):
            list(encode_batches(batches(), **wrong))
    with pytest.raises(DataError, match="no column called"):
        list(encode_batches(batches(embedding=[1.0] * 7)))


def skill(path, seed, name="docs", module="encoder.layer.0.attention.self.query"):
    rng = np.random.default_rng(seed)
    pair = LowRank(*(rng.normal(0, 0.2, s).astype(np.float32) for s in ((384, 2), (2, 384))), 1.0)
    card = LoRACard(name, 2, 2.0, (module,), {module: pair}, {"description": "files"})
    lora.save(card, path)
    return card


@requirement("R5.12")
def test_a_card_file_that_was_replaced_is_read_again(tmp_path):
    path, engine = tmp_path / "docs.lora.arrow", lora.ArrowEngine.from_pretrained()
    for seed in (1, 2):
        card = skill(path, seed)
        (found,) = encode_batches(pa.record_batch({"text": ["a"]}), cards=[path], adapter="docs")
        expected = engine.encode_with_lora(["a"], card).embeddings
        assert np.abs(np.array(found["embedding"].to_pylist()) - expected).max() < 1e-5


@requirement("R5.12", "R3.12")
def test_cards_that_collide_or_bind_nothing_or_are_not_asked_for_are_refused(tmp_path):
    one, two, lost = (tmp_path / f"{n}.lora.arrow" for n in ("one", "two", "lost"))
    skill(one, 1)
    skill(two, 2)
    skill(lost, 3, "lost", "q_lin")
    batch = pa.record_batch({"text": ["files"], "skill": ["lost"]})
    with pytest.raises(ConflictError, match=r"card 'docs' of .*two\.lora"):
        list(encode_batches(batch, cards=[one, two], adapter="docs"))
    (found,) = encode_batches(batch, cards=[one, one], adapter="docs")
    assert found["adapter"].to_pylist() == ["docs"]
    for choice in ({"adapter": "lost"}, {"adapter_column": "skill"}, {"route": True}):
        with pytest.raises(TargetError, match="card 'lost'"):
            list(encode_batches(batch, cards=[lost], **choice))
    with pytest.raises(ArgumentError, match="found cards and none"):
        list(encode_batches(batch, cards=[one]))
    with pytest.raises(ArgumentError, match="record batches or tables"):
        list(encode_batches([["text"]]))


@requirement("R5.12")
def test_it_takes_what_each_cluster_engine_hands_over_and_gives_back_its_kind(cards):
    work = partial(encode_batches, cards=cards, adapter="docs")
    table = pa.Table.from_batches(batches())
    expected = rows_of([pa.Table.from_batches(list(work(batches())))])
    spark = list(work(iter(batches()), fixed_size=False))  # mapInArrow: an iterator of batches
    assert {str(batch.schema.field("embedding").type) for batch in spark} == {"list<item: float>"}
    ray = list(work(table))  # map_batches: one table, one or more tables back
    dask = list(work([table.slice(0, 4), table.slice(4)]))  # map_partitions: a list
    assert {type(part) for part in spark} == {pa.RecordBatch}
    assert {type(part) for part in (*ray, *dask)} == {pa.Table}
    for parts in ([pa.Table.from_batches(spark)], ray, dask):
        ids, rows = rows_of(parts)
        assert ids == expected[0]
        assert np.allclose(rows, expected[1], atol=1e-5)


def killing(stream, once, **options):
    """`encode_batches` of a partition, in a worker that dies the first time."""
    if not os.path.exists(once):  # noqa: PTH110 - in the worker
        open(once, "x").close()  # noqa: PTH123
        os.kill(os.getpid(), signal.SIGKILL)
    return list(encode_batches(stream, **options))


def rows_of(tables):
    """Ids and embeddings, in order of ids."""
    table = pa.concat_tables(tables).sort_by("id")
    rows = [row or [0.0] * 384 for row in table["embedding"].to_pylist()]
    return table["id"].to_pylist(), np.array(rows)


def expected_rows(cards, count):
    encoded = list(encode_batches(batches(count), cards=cards, adapter="docs"))
    return rows_of([pa.Table.from_batches(encoded)])


@requirement("R5.12")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)  # Dask's own
def test_on_dask_with_a_worker_killed_nothing_is_lost_or_doubled(cards, tmp_path):
    bag = pytest.importorskip("dask.bag", reason="needs the cluster extra")
    distributed = pytest.importorskip("distributed")
    work = partial(killing, once=str(tmp_path / "once"), cards=cards, adapter="docs")
    options = {"n_workers": 2, "threads_per_worker": 1}
    options |= {"dashboard_address": None, "host": "127.0.0.1"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster):
        found = bag.from_sequence(batches(4), npartitions=4).map_partitions(work).compute()
    assert (tmp_path / "once").exists()
    ids, rows = rows_of([pa.Table.from_batches([batch]) for batch in found])
    known, expected = expected_rows(cards, 4)
    assert ids == known
    assert np.allclose(rows, expected, atol=1e-5)


@requirement("R5.12")
@pytest.mark.foreign
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.timeout(200)
def test_on_ray_nothing_is_lost_or_doubled(cards, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the cluster extra")
    monkeypatch.setenv("HOME", str(tmp_path))
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        table = pa.Table.from_batches(batches(4))

        work = partial(encode_batches, cards=cards, adapter="docs")
        blocks = ray.data.from_arrow(table).repartition(4)
        encoded = blocks.map_batches(work, batch_format="pyarrow", num_cpus=0.5)
        ids, rows = rows_of(ray.get(encoded.to_arrow_refs()))
    finally:
        ray.shutdown()
    known, expected = expected_rows(cards, 4)
    assert ids == known
    assert np.allclose(rows, expected, atol=1e-5)


@requirement("R5.12", "R25.2")
def test_the_command_streams_a_parquet_file(cards, tmp_path):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(pa.Table.from_batches(batches(3)), source)
    done = shell("encode", "--parquet", source, "--out", out, "--card", cards[0], "--json")
    assert (done.returncode, done.stdout) == (0, f'{{"file": "{out}", "rows": 21}}\n')
    ids, rows = rows_of([parquet.read_table(out)])
    known, expected = expected_rows(cards, 3)
    assert ids == known
    assert np.allclose(rows, expected, atol=1e-5)
    out.unlink()
    for argv, message in (
        (["--parquet", source], "--out"),
        (["--parquet", tmp_path / "none", "--out", out], "none"),
        (["--parquet", cards[0], "--out", out], "a Parquet file"),
        (["--parquet", source, "--out", out, "--column", "body"], "body"),
        (["--route", "x"], "--parquet"),
        (["--parquet", source, "--out", out, "--card", cards[0], "--card", cards[1]], "--adapter"),
    ):
        done = shell("encode", *argv)
        assert done.returncode == (2 if message.startswith("--") else 1)
        assert message in done.stderr.splitlines()[-1]
        assert not out.exists()
