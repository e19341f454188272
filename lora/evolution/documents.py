"""Documents of a folder as pairs to learn from.

Python files give the first sentence of a docstring and the name that it is about. Prose gives the
first sentence of a paragraph and its rest, and the headings above a paragraph and the paragraph. A
query that has several answers, such as a heading of many pages, is asked with the name of its file;
if that does not tell them, it is left out. A pair's group is its file. Prose of fewer than four
files is grouped by the two highest headings as well.

Requirements: R18.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from lora.errors import CardNotFoundError, DataError
from lora.files import PathLike, as_path, os_errors
from lora.routing import unit
from lora.training.data import Pairs, docstring_pairs, first_sentence

TEXT_FILES = (".md", ".rst", ".txt")
"""Endings of the documents that are read as prose."""

FILE_LIMIT = 2**20
"""Bytes of a document that are read."""

LENGTH = 160
"""Characters of a text in a pair; longer ones are cut off, since training would take as long."""

FEW_FILES = 4
"""With fewer files of prose, headings are groups."""

COMMON_FORM = 0.2
"""Share of the pairs from which on a form counts: a placebo of it takes part in the exam."""

_RULE = re.compile(r"([=\-~^\"'#*+`:.])\1{2,}\s*")
_MARKUP = re.compile(r":[\w:]+:(?=`)|<[^<>]*>|\]\([^)\]]*\)|\]\[[^\]\[]*\]|[`*\\\[\]]|^\s*[-+]\s+")


@dataclass(frozen=True, eq=False)
class Source:
    """Material to learn from.

    Args:
        pairs: Query and answer, grouped by source.
        texts: Documents by name, which a teacher may be asked about.
        forms: What the pairs ask for: ``"names"``, ``"prose"``.
        private: Whether they are what users asked.
    """

    pairs: Pairs
    texts: Mapping[str, str] = field(default_factory=dict)
    forms: tuple[str, ...] = ("prose",)
    private: bool = False

    @classmethod
    def read(cls, folder: PathLike) -> Self:
        """Read a folder of Python files and prose; binary files are left out."""
        root = as_path(folder)
        if not root.is_dir():
            raise CardNotFoundError(str(root), "a folder of documents", "none")
        texts = _texts(root)
        prose = _told_apart(
            {"query": query[:LENGTH], "positive": answer[:LENGTH], "group": group}
            for name, text in texts.items()
            for group, query, answer in _prose_pairs(name, text, by_heading=len(texts) < FEW_FILES)
        )
        try:
            names = _cut(docstring_pairs(root, private=True))
        except DataError:
            names = Pairs.of([])
        pairs = names.add(prose)
        if not len(pairs):
            expected = f"Python files with docstrings, or paragraphs of 8 words in {TEXT_FILES}"
            raise DataError(str(root), expected, "none")
        by_form = {"names": names, "prose": prose}
        forms = (form for form in by_form if len(by_form[form]) >= COMMON_FORM * len(pairs))
        return cls(pairs, texts, tuple(forms))


def standard_library(form: str) -> Pairs:
    """Return pairs of a form from the standard library, which placebos are trained on."""
    return _cut(docstring_pairs(answer="name" if form == "names" else "rest"))


def keywords(texts: Sequence[str], others: Sequence[str], count: int = 3) -> list[str]:
    """Return the words that tell texts from others best, by the ratio of their smoothed shares.

    Examples:
        >>> keywords(["cut the graph", "walk the graph"], ["cut the file", "walk the tree"], 1)
        ['graph']
    """
    own, other = (
        Counter(word for text in side for word in set(re.findall("[a-z]{4,}", text.lower())))
        for side in (texts, others)
    )
    ratio = {
        word: np.log((times + 0.5) / len(texts)) - np.log((other[word] + 0.5) / (len(others) + 1))
        for word, times in own.items()
        if times >= max(2, len(texts) / 100)
    }
    return sorted(ratio, key=lambda word: (-ratio[word] * own[word], word))[:count]


def medoids(embeddings: object, count: int = 3) -> list[int]:
    """Return the rows that stand for all: each one added brings most of them nearest.

    Examples:
        >>> medoids([[1, 0], [1, 0.1], [0, 1], [1, 0.2]], 2)
        [3, 2]
    """
    rows = unit(embeddings)  # type: ignore[arg-type]
    cosines = np.einsum("nd,md->nm", rows, rows)
    rows_taken: list[int] = []
    nearest = np.full(len(rows), -1.0)
    for _ in range(min(count, len(rows))):
        best = int(np.round(np.maximum(cosines, nearest).sum(axis=1), 6).argmax())
        rows_taken.append(best)
        nearest = np.maximum(nearest, cosines[best])
    return rows_taken


def _texts(root: Path) -> dict[str, str]:
    """Read the prose below a folder, by relative path, without what links or hidden names hold."""
    texts = {}
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        is_hidden = any(part.startswith(".") for part in inner.parts)
        if path.suffix in TEXT_FILES and path.is_file() and not (path.is_symlink() or is_hidden):
            with os_errors(path), path.open("rb") as file:
                text = file.read(FILE_LIMIT).decode("utf-8", "replace")
            if "\0" not in text and text.count("\ufffd") <= len(text) / 10:
                texts[str(inner)] = text
    return texts


def _cut(pairs: Pairs) -> Pairs:
    return Pairs.of(
        {**row, "query": row["query"][:LENGTH], "positive": row["positive"][:LENGTH]}
        for row in pairs.table.to_pylist()
    )


def _told_apart(rows: Iterable[Mapping[str, str]]) -> Pairs:
    """Make pairs whose queries have one answer each, with the help of the files' names."""
    pairs = Pairs.of(rows).unique()
    answers = Counter(pairs.queries)
    named = []
    for row in pairs.table.to_pylist():
        if answers[row["query"]] > 1:
            file = Path(row["group"].split(" > ")[0]).with_suffix("").as_posix()
            row["query"] = f"{file}: {row['query']}"[:LENGTH]
        named.append(row)
    answers = Counter(row["query"] for row in named)
    return Pairs.of(row for row in named if answers[row["query"]] == 1)


def _prose_pairs(name: str, text: str, *, by_heading: bool) -> list[tuple[str, str, str]]:
    pairs, asked = [], set[tuple[str, ...]]()
    for headings, paragraph in _paragraphs(text):
        group = " > ".join([name, *headings[:2]]) if by_heading else name
        head = first_sentence(paragraph)
        rest = paragraph[len(head) :].strip()
        if min(len(head.split()), len(rest.split())) >= 3:
            pairs.append((group, head, rest))
        if headings and headings not in asked:
            asked.add(headings)
            pairs.append((group, ": ".join(headings[-2:]), paragraph))
    return pairs


def _paragraphs(text: str) -> list[tuple[tuple[str, ...], str]]:
    """Return paragraphs with the headings above them; no code, tables, directives or short ones."""
    paragraphs: list[tuple[tuple[str, ...], str]] = []
    headings: list[tuple[int, str]] = []
    marks: list[str] = []
    lines: list[str] = []
    is_code = is_rule = False
    for line, below in pairwise([*text.split("\n"), "", ""]):
        fence = None if is_rule else re.match(r"\s*(```|~~~)", line)
        is_code ^= bool(fence)
        title = re.match(r"(#{1,6})\s+(.+)", line)
        is_text = re.match(r"\S", line) and not _RULE.fullmatch(line)
        underlined = bool(is_text and _RULE.fullmatch(below))
        if underlined and below[0] in "`~":  # a shorter one opens code
            underlined = len(below.strip()) >= len(line.strip())
        is_rule = underlined and not is_code
        level = 0
        if not is_code and (title or underlined):
            if underlined and below[0] not in marks:
                marks.append(below[0])
            level = len(title[1]) if title else marks.index(below[0]) + 1
        elif not (is_code or fence or _RULE.fullmatch(line)) and re.match(
            r"\s{0,2}(?!\.\. |\|)\S", line
        ):
            lines.append(line)
            continue
        paragraph = _plain(" ".join(lines))
        letters = sum(letter.isalpha() or letter == " " for letter in paragraph)
        if len(paragraph.split()) >= 8 and letters > 0.7 * len(paragraph):
            paragraphs.append((tuple(heading for _, heading in headings), paragraph))
        lines = []
        if level:
            heading = _plain(title[2] if title else line)
            headings = [entry for entry in headings if entry[0] < level]
            headings += [(level, heading)] if heading else []
    return paragraphs


def _plain(text: str) -> str:
    """Return a text without the marks of roles, links, code and lists, on one line."""
    return " ".join(_MARKUP.sub("", text).split())
