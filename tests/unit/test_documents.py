"""Documents as pairs: what is read of them, what groups they have, which words tell them."""

import pytest

from lora.errors import CardNotFoundError, DataError
from lora.evolution.documents import LENGTH, Source, standard_library
from lora.testing.plugin import requirement

GUIDE = """# Title

A card is a value. It never changes once it was made.

Short.

## Use

- See [the page](http://example.org) for how `cards` are *used* here. There is more.

```
A block of code is no sentence. It would be seen here as one.
```

| a table | has no sentences. It has cells, which are left out of all. |

Topic
=====

Below a title that is underlined, text counts :class:`as such`. So it does here.

.. note:: A directive is left out. It is no sentence of the text at all.
"""


def rows(source):
    return {row["query"]: (row["positive"], row["group"]) for row in source.pairs.table.to_pylist()}


@requirement("R18.3")
def test_prose_gives_sentences_with_their_rest_and_headings_with_their_paragraphs(tmp_path):
    (tmp_path / "guide.md").write_text(GUIDE)
    first = "A card is a value.", "It never changes once it was made."
    use = "See the page for how cards are used here.", "There is more."
    under = "Below a title that is underlined, text counts as such.", "So it does here."
    assert rows(Source.read(tmp_path)) == {
        first[0]: (first[1], "guide.md > Title"),
        "Title": (" ".join(first), "guide.md > Title"),
        use[0]: (use[1], "guide.md > Title > Use"),
        "Title: Use": (" ".join(use), "guide.md > Title > Use"),
        under[0]: (under[1], "guide.md > Topic"),
        "Topic": (" ".join(under), "guide.md > Topic"),
    }
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("Some words about it all. They are long enough.")
    groups = Source.read(tmp_path).pairs.table["group"].to_pylist()
    assert set(groups) == {"guide.md", "a.txt"}  # of equal texts the first counts


@requirement("R18.3")
def test_a_query_has_one_answer_or_is_asked_with_the_name_of_its_file(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("one", "two", "three", "sub/one"):
        (tmp_path / f"{name}.md").write_text(
            f"# Why is this bad?\n\nIt is bad for part {name} of it. Nobody reads {name}, too.\n\n"
            f"This sentence is here twice. The first time it is {name}.\n\n"
            f"This sentence is here twice. The second time it is {name}.\n"
        )
    read = rows(Source.read(tmp_path))
    assert {query: group for query, (_, group) in read.items() if query.endswith("bad?")} == {
        f"{name}: Why is this bad?": f"{name}.md" for name in ("one", "two", "three", "sub/one")
    }
    assert not [query for query in read if "twice" in query]
    assert "It is bad for part one of it." in read
    assert len(read) == 8


@requirement("R18.3")
def test_a_folder_is_read_by_file_with_private_files_and_without_binaries(tmp_path):
    with pytest.raises(DataError, match="Python files with docstrings"):
        Source.read(tmp_path)
    with pytest.raises(CardNotFoundError, match="a folder of documents"):
        Source.read(tmp_path / "none")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "note.txt").write_bytes(b"Bytes that are \xff not text. Read them anyway.")
    (tmp_path / "sub" / "_tool.py").write_text(
        'def run():\n    """Run the whole tool once. Then end."""\n'
        'def _hidden():\n    """Do what nobody sees at all."""\n'
    )
    (tmp_path / "tool.py").write_text('def run():\n    """Run the other tool once."""\n')
    (tmp_path / "image.md").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "long.txt").write_text(f"A {'very ' * 99}long text begins here. It ends, too.")
    source = Source.read(tmp_path)
    assert sorted(source.texts) == ["long.txt", "sub/note.txt"]
    assert source.forms == ("names", "prose")
    assert rows(source) == {
        "Run the whole tool once.": ("sub._tool.run", "sub/_tool.py"),
        "Run the other tool once.": ("tool.run", "tool.py"),
        "Bytes that are \ufffd not text.": ("Read them anyway.", "sub/note.txt"),
        ("A " + "very " * 99)[:LENGTH]: ("It ends, too.", "long.txt"),
    }


@requirement("R18.3", "R21.6")
def test_the_standard_library_has_pairs_of_both_forms():
    names, prose = (standard_library(form) for form in ("names", "prose"))
    assert min(len(names), len(prose)) > 1000
    assert all(" " not in text for text in names.positives)
    assert sum(" " in text for text in prose.positives) > 0.9 * len(prose)
    assert max(map(len, prose.positives)) <= LENGTH


@requirement("R18.3")
def test_a_short_rule_of_tildes_is_a_heading_and_a_line_above_a_fence_is_none(tmp_path):
    sentence = "These are the words of paragraph number {}. There are a few more."
    parts = ["Title\n=====", sentence.format(1), "Sub\n~~~", sentence.format(2)]
    parts += ["Some text line\n```\ncode that nobody reads as a sentence\n```", sentence.format(3)]
    (tmp_path / "guide.rst").write_text("\n\n".join(parts))
    groups = Source.read(tmp_path).pairs.table["group"].to_pylist()
    assert set(groups) == {"guide.rst > Title", "guide.rst > Title > Sub"}
    queries = Source.read(tmp_path).pairs.queries
    assert {f"These are the words of paragraph number {n}." for n in (1, 2, 3)} <= {*queries}


@requirement("R18.3")
def test_what_links_and_hidden_folders_hold_is_not_read(tmp_path):
    outside, root = tmp_path / "outside.md", tmp_path / "root"
    outside.write_text("A sentence from outside it. Nobody named this file.")
    (root / ".hidden").mkdir(parents=True)
    (root / ".hidden" / "page.md").write_text("A sentence that is hidden. Nobody sees this file.")
    (root / "link.md").symlink_to(outside)
    (root / "page.md").write_text("A sentence that may be read. It is long enough.")
    assert list(Source.read(root).texts) == ["page.md"]


def test_text_without_an_end_of_its_markup_is_read_at_once(tmp_path):
    (tmp_path / "page.md").write_text("< " * 200_000 + "\n\nA sentence comes after it. It is read.")
    assert "A sentence comes after it." in Source.read(tmp_path).pairs.queries
