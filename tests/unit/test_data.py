"""Data sets by example: importers, their messages, and the standard library's docstrings."""

import ast
import hashlib
import json
import subprocess
import sys
from textwrap import dedent

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora.errors import ArgumentError, CardNotFoundError, DataError, StoreError
from lora.testing.plugin import requirement
from lora.training import data
from lora.training.data import Pairs, docstring_pairs

HUGE = "é" * 100_000


@requirement("R21.5")
def test_a_jsonl_file_with_the_least_and_the_most_that_a_line_may_hold_is_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"query": "c", "positive": HUGE, "negative": "e", "quality": 0.5, "group": "g"}
    lines = ['\ufeff{"query": "a", "positive": "b"}', "", json.dumps(row) + "\r", '["q", "p", "n"]']
    path.write_text("\n".join(lines), encoding="utf-8")
    assert Pairs.load(path).table.to_pylist() == [
        {"query": "a", "positive": "b", "negative": None, "quality": 1.0, "group": "0"},
        row,
        {"query": "q", "positive": "p", "negative": "n", "quality": 1.0, "group": "2"},
    ]


@requirement("R21.5")
def test_foreign_arrow_and_parquet_files_get_the_optional_columns(tmp_path):
    answers = pa.array(["c", "d"], pa.large_string())
    table = pa.table({"id": [1, 2], "query": ["a", "b"], "positive": answers})
    pq.write_table(table, tmp_path / "pairs.parquet")
    with pa.ipc.new_file(tmp_path / "pairs.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("pairs.parquet", "pairs.arrow"):
        assert Pairs.load(tmp_path / name) == Pairs.of([("a", "c"), ("b", "d")])


@requirement("R21.5")
@pytest.mark.parametrize(
    "messages", ["null", '"hello"', '[{"role": "user"}]', '[{"role": "user", "content": [{}]}]', ""]
)
def test_a_line_that_is_no_transcript_is_refused_by_its_number(tmp_path, messages):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": []}\n\n' + (f'{{"messages": {messages}}}' if messages else "[]"))
    with pytest.raises(DataError, match="line 3: expected messages with a role and text"):
        Pairs.from_chat(path)


@requirement("R21.5")
@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"ARROW1\0\0", b"PAR1", b"\0" * 4096, b"\xff\xfe{}"],
    ids=["empty", "text", "arrow", "parquet", "zeros", "utf16"],
)
@pytest.mark.parametrize("suffix", [".arrow", ".parquet", ".jsonl"])
def test_a_file_of_something_else_is_refused_by_its_name(tmp_path, content, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    if suffix == ".jsonl" and not content:
        assert len(Pairs.load(path)) == 0
        return
    with pytest.raises(DataError) as caught:
        Pairs.load(path)
    assert str(caught.value).startswith(str(path))


@requirement("R21.5")
@pytest.mark.parametrize("read", [Pairs.load, Pairs.from_chat])
def test_a_line_with_bad_bytes_or_many_brackets_is_refused_by_its_number(tmp_path, read):
    path = tmp_path / "data.jsonl"
    for line in (b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000):
        path.write_bytes(b"\n" + line)
        with pytest.raises(DataError, match="line 2: expected JSON"):
            read(path)


@requirement("R21.5")
@pytest.mark.parametrize("read", [Pairs.load, Pairs.from_chat])
def test_a_missing_data_set_and_a_folder_in_its_place_are_named(tmp_path, read):
    for path in (tmp_path, tmp_path / "nothing.jsonl", tmp_path / "no" / "where.arrow"):
        with pytest.raises(CardNotFoundError, match=str(path)) as caught:
            read(path)
        assert isinstance(caught.value, FileNotFoundError)


@requirement("R21.5")
def test_saving_fails_by_name_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    for name, kind in (("nowhere/pairs.arrow", CardNotFoundError), ("folder.parquet", StoreError)):
        with pytest.raises(kind, match=name.split("/")[0]):
            Pairs.of([("a", "b")]).save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.parquet"]


@requirement("R21.5")
def test_a_saved_file_can_be_replaced_while_it_is_loaded(tmp_path):
    path = tmp_path / "pairs.arrow"
    Pairs.of([("a", "b")]).save(path)
    loaded = Pairs.load(path)
    loaded.add([("c", "d")]).save(path)
    assert loaded.queries == ["a"]
    assert Pairs.load(path).queries == ["a", "c"]


@requirement("R21.5")
def test_rows_are_checked_where_they_enter_and_not_again(monkeypatch):
    rows = []
    monkeypatch.setattr(data, "_record", lambda row, *_: rows.append(row) or row)
    row = dict.fromkeys(data.SCHEMA.names[:3], "a") | {"quality": 1}
    pairs = Pairs.of([row | {"group": group} for group in "abc"])
    assert len(pairs.add(pairs).unique().sample(2, 0)) + sum(map(len, pairs.split())) == 4
    assert len(rows) == 3


@requirement("R21.5", "R17.3")
def test_a_split_is_drawn_by_its_seed_and_needs_two_groups_and_two_parts():
    pairs = Pairs.of([(f"q{i}", f"p{i}") for i in range(50)])
    for share in (0, 1, -0.5, 1.5, float("nan")):
        with pytest.raises(ArgumentError, match="share"):
            pairs.split(share)
    parts = {tuple(pairs.split(seed=seed)[0].queries) for seed in range(10)}
    assert len(parts) == 10
    assert all(len(part) == 40 for part in parts)
    with pytest.raises(DataError, match="at least two groups, found 1"):
        Pairs.of([{"query": "a", "positive": "b", "group": "g"}] * 3).split()


SOURCES = {
    "top.py": '''
        import bait
        def f():
            """Add the numbers given. Nothing else."""
            return 1
        async def g():
            "Wait for the\\n    other side."
            await x
        def only():
            """Do nothing at all, ever."""
        def short():
            """Too short."""
        def plain(): pass
        def _hidden():
            """Is not shown to anyone."""
        def twin():
            """Return a string of text."""
        def other():
            """Return a string of text."""
        value = "\\d"
    ''',
    "pack/__init__.py": '''
        class A:
            """Hold one A value."""
            class B:
                """Hold one B value."""
                async def m(self):
                    """Run the inner method."""
                    def local():
                        """Live inside of it."""
            class _C:
                def n(self):
                    """Hide in a class."""
    ''',
    "pack/sub/mod.py": 'def h():\n    """Go as deep as this."""\n    return "Go as deep."\n',
    "__init__.py": 'def root():\n    """Belong to the root."""\n',
    "latin.py": "# coding: latin-1\ndef café():\n    'Brew a cup of café.'\n".encode("latin-1"),
    "bom.py": b"\xef\xbb\xbfdef marked():\n    'Start with a mark.'\n",
    "bait.py": 'raise SystemExit("imported")\n',
    "broken.py": "def f(:\n",
    "unknown.py": b"# coding: klingon\ndef f():\n    'Speak in another tongue.'\n",
    "binary.py": b"\0\1\2",
    "badutf.py": b"def f():\n    'Be no \xff text at all.'\n",
    "surrogate.py": 'def f():\n    "Be half a \\ud800 character."\n',
    "test_top.py": 'def f():\n    """Test what was made."""\n',
    "tests/mod.py": 'def f():\n    """Test what was made there."""\n',
    "_private.py": 'def f():\n    """Keep this to oneself."""\n',
    "nested.py": f"x = {'(' * 5000}{')' * 5000}\n",
    "long.py": f"x = 1{' + 1' * 20_000}\ndef f():\n    'Come after a sum.'\n",
    "_hidden/mod.py": 'def f():\n    """Keep this to oneself too."""\n',
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A small source tree with what source trees may hold."""
    root = tmp_path_factory.mktemp("tree")
    for name, source in SOURCES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else dedent(source).encode())
    (root / "folder.py").mkdir()
    (root / "dangling.py").symlink_to(root / "nothing.py")
    return root


@requirement("R21.6")
def test_every_public_function_and_class_with_a_sentence_is_found_by_its_qualified_name(tree):
    rows = docstring_pairs(tree).table.select(["query", "positive", "group"]).to_pylist()
    assert len(rows) == 10
    assert {tuple(row.values()) for row in rows} == {
        ("Add the numbers given.", "top.f", "top"),
        ("Wait for the other side.", "top.g", "top"),
        ("Do nothing at all, ever.", "top.only", "top"),
        ("Hold one A value.", "pack.A", "pack"),
        ("Hold one B value.", "pack.A.B", "pack"),
        ("Run the inner method.", "pack.A.B.m", "pack"),
        ("Go as deep as this.", "pack.sub.mod.h", "pack"),
        ("Belong to the root.", "root", "__init__"),
        ("Brew a cup of café.", "latin.café", "latin"),
        ("Start with a mark.", "bom.marked", "bom"),
    }


@requirement("R21.6")
def test_the_code_of_a_pair_is_its_source_without_its_docstring(tree):
    code = docstring_pairs(tree, answer="code")
    by_query = dict(zip(code.queries, code.positives, strict=True))
    assert code.queries == docstring_pairs(tree).queries
    assert by_query["Add the numbers given."] == "def f():\n    return 1"
    assert by_query["Wait for the other side."] == "async def g():\n    await x"
    assert by_query["Do nothing at all, ever."] == "def only():\n    pass"
    assert by_query["Go as deep as this."] == "def h():\n    return 'Go as deep.'"
    assert "class B" in by_query["Hold one A value."]


@requirement("R21.6")
def test_a_tree_without_docstrings_and_an_unknown_answer_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="Python modules with docstrings"):
            docstring_pairs(folder)
    with pytest.raises(ArgumentError, match="'name', 'code' or 'rest', found 'both'"):
        docstring_pairs(tmp_path, answer="both")


SCRIPT = """
import hashlib, sys
from lora.training.data import docstring_pairs
docstring_pairs(sys.argv[1])  # imports what reading needs, now
before = set(sys.modules)
pairs = docstring_pairs()
print(hashlib.sha256(repr(pairs.table.to_pylist()).encode()).hexdigest())
print(*(name for name in set(sys.modules) - before if not name.startswith("encodings.")))
"""


@pytest.fixture(scope="module")
def stdlib():
    """The pairs of the standard library."""
    return docstring_pairs()


@requirement("R21.6")
def test_the_standard_library_gives_thousands_of_pairs_in_more_than_a_hundred_modules(stdlib):
    stats, groups = stdlib.statistics(), stdlib.table["group"].to_pylist()
    assert stats["rows"] > 3000
    assert stats["groups"] > 100
    assert len(set(stdlib.queries)) == len(stdlib)
    known = dict(zip(stdlib.positives, stdlib.queries, strict=True))
    assert known["shutil.copytree"].startswith("Recursively copy a directory tree")
    assert "json.encoder.JSONEncoder" in known
    assert all("\n" not in query and len(query.split()) >= 3 for query in stdlib.queries)
    assert [name.split(".")[0] for name in stdlib.positives] == groups == sorted(groups)


@requirement("R21.6")
def test_another_process_finds_the_same_pairs_and_imports_none_of_the_modules(stdlib, tree):
    command = [sys.executable, "-c", SCRIPT, str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    digest, imported = done.stdout.split("\n")[:2]
    assert digest == hashlib.sha256(repr(stdlib.table.to_pylist()).encode()).hexdigest()
    assert imported == ""
    assert done.stderr == ""


@pytest.mark.slow
@requirement("R21.6")
def test_no_code_of_the_standard_library_keeps_its_docstring(stdlib):
    code = docstring_pairs(answer="code")
    assert code.queries == stdlib.queries
    for text in code.positives[::10]:
        assert ast.get_docstring(ast.parse(text).body[0]) is None
