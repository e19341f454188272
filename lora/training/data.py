"""Training data: pairs of texts as an Arrow table, with the few operations that training needs.

A negative may be null, a quality is in [0, 1], and a group is the source of a pair. Data are split
by group, since pairs of one source resemble each other.

Requirements: R17, R21.
"""

import ast
import json
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lora import checks
from lora.errors import ArgumentError, CardNotFoundError, DataError, shown
from lora.files import PathLike, as_path, os_errors, replacing

_COLUMNS = {
    "query": ("string", "text that is not empty"),
    "positive": ("string", "text that is not empty"),
    "negative": ("string", "text or null"),
    "quality": ("float64", "a number in [0, 1]"),
    "group": ("string", "text"),
}
"""Type and rule of each column."""

SCHEMA = pa.schema(
    [pa.field(name, kind, name == "negative") for name, (kind, _) in _COLUMNS.items()]
)

Row: TypeAlias = Mapping[str, Any] | Sequence[str]
"""A pair: a mapping from columns to values, or ``(query, positive[, negative])``."""

AnyPairs: TypeAlias = "Pairs | pa.Table | PathLike | Iterable[Row]"
"""What `Pairs.of` takes."""

_HIDDEN = re.compile(
    r"(^|/)((tests?|site-packages|dist-packages|idlelib|lib2to3|config|config-[^/]*)/|test_[^/]*$)"
)
"""Finds what is not documentation in a source tree: tests and installed packages."""

_PRIVATE = re.compile(r"(^|/)_(?!_init__\.py$)")
"""Finds the files and folders whose names start with _."""


@dataclass(frozen=True)
class Pairs:
    """A data set of pairs.

    Args:
        table: A table with the columns of `SCHEMA`; build one with `Pairs.of`.

    Examples:
        >>> pairs = Pairs.of([("open a file", "builtins.open"), ("quit", "sys.exit")])
        >>> len(pairs), pairs.statistics()["groups"]
        (2, 2)
    """

    table: pa.Table

    def __post_init__(self) -> None:
        names = self.table.column_names if isinstance(self.table, pa.Table) else []
        if missing := set(SCHEMA.names) - set(names):
            expected = f"a table with the columns {SCHEMA.names}"
            raise DataError("pairs", expected, f"none called {sorted(missing)}")
        object.__setattr__(self, "table", _pairs(_table_rows(self.table, "pairs")).table)

    @staticmethod
    def of(source: AnyPairs) -> "Pairs":
        """Make pairs of rows, of a table, or of the file at a path.

        A group that is left out is the position of the row.
        """
        if isinstance(source, Pairs):
            return source
        if isinstance(source, str | os.PathLike):
            return Pairs.load(source)
        if isinstance(source, pa.Table | pa.RecordBatch):
            return _pairs(_table_rows(source, "pairs"))
        if not isinstance(source, Iterable):
            expected = "pairs as rows, as a table or as the path of a file"
            raise DataError("pairs", expected, shown(source))
        return _pairs((f"pairs: row {index}", row) for index, row in enumerate(source))

    @staticmethod
    def load(path: PathLike) -> "Pairs":
        """Read a Parquet file, a JSONL file, or an Arrow file, by the path's ending."""
        path = _existing(path)
        if path.suffix in (".jsonl", ".json"):
            return _pairs(json_lines(path))
        try:
            if path.suffix == ".parquet":
                table = pq.read_table(path)
            else:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError, ValueError) as error:
            problem = error if getattr(error, "errno", 0) else "another form, or a broken file"
            raise DataError(str(path), "an Arrow, Parquet or JSONL file", problem) from error
        return _pairs(_table_rows(table, str(path)))

    @staticmethod
    def from_chat(path: PathLike) -> "Pairs":
        """Read chats: a JSON object ``{"messages": [{"role": …, "content": …}, …]}`` on each line.

        A user's message and the assistant's right after it are a pair; a chat is a group.
        """
        rows = []
        for index, (where, chat) in enumerate(json_lines(_existing(path))):
            try:
                turns = [(turn["role"], turn["content"] or "") for turn in chat["messages"]]
                texts = [str.strip(content) for _, content in turns]
            except (KeyError, TypeError) as error:
                raise DataError(where, "messages with a role and text as content", error) from error
            answered = zip(pairwise(turns), pairwise(texts), strict=True)
            for ((asker, query), (replier, answer)), stripped in answered:
                if (asker, replier) == ("user", "assistant") and all(stripped):
                    row = {"query": query, "positive": answer, "group": f"transcript {index}"}
                    rows.append((where, row))
        if not rows:
            raise DataError(str(path), "a question followed by its answer", "none")
        return _pairs(rows)

    def save(self, path: PathLike) -> None:
        """Write the pairs as Parquet, JSONL or Arrow, by the path's ending; atomically."""
        with replacing(path) as file:
            if Path(path).suffix == ".parquet":
                pq.write_table(self.table, file)
            elif Path(path).suffix in (".jsonl", ".json"):
                file.writelines(f"{json.dumps(row)}\n".encode() for row in self.table.to_pylist())
            else:
                with pa.ipc.new_file(file, SCHEMA) as writer:
                    writer.write_table(self.table)

    def add(self, other: AnyPairs) -> "Pairs":
        """Return these pairs followed by others."""
        return _checked(pa.concat_tables([self.table, Pairs.of(other).table]))

    def split(self, share: float = 0.8, *, seed: int = 0) -> "tuple[Pairs, Pairs]":
        """Split at random into two parts without a common group; the first has `share` of them."""
        share = checks.share(share, "share", "(0, 1)")
        groups = np.unique(self.table["group"].to_numpy())
        if len(groups) < 2:
            raise DataError("pairs: split", "at least two groups", len(groups))
        size = min(max(round(share * len(groups)), 1), len(groups) - 1)
        rng = np.random.default_rng(checks.integer(seed, "seed", 0))
        drawn = pa.array(rng.permutation(groups)[:size])
        in_first = pc.is_in(self.table["group"], drawn)
        first, second = (self.table.filter(part) for part in (in_first, pc.invert(in_first)))
        return _checked(first), _checked(second)

    def unique(self) -> "Pairs":
        """Leave out each pair whose query and positive occurred before."""
        rows: dict[tuple[str, str], int] = {}
        for row, pair in enumerate(zip(self.queries, self.positives, strict=True)):
            rows.setdefault(pair, row)
        return self.take(list(rows.values()))

    def take(self, rows: Sequence[int]) -> "Pairs":
        """Return the pairs at these positions, in this order."""
        try:
            return _checked(self.table.take(pa.array(rows, pa.int64())))
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise ArgumentError("rows", f"positions in {len(self)} pairs", shown(rows)) from error

    def sample(self, size: int, seed: int) -> "Pairs":
        """Draw at most `size` pairs without replacement, and keep their order."""
        key = [checks.integer(seed, "seed", 0), checks.integer(size, "size", 0)]
        order = np.random.default_rng(key).permutation(len(self))
        return self.take(np.sort(order[:size]).tolist())

    def statistics(self) -> dict[str, Any]:
        """Count rows, groups, positives, negatives; average quality and lengths in characters."""
        table = self.table
        means = {
            "mean_quality": table["quality"],
            "mean_query_length": pc.utf8_length(table["query"]),
            "mean_positive_length": pc.utf8_length(table["positive"]),
        }
        return {
            "rows": len(self),
            "groups": len(table["group"].unique()),
            "positives": len(table["positive"].unique()),
            "negatives": len(table["negative"].drop_null()),
            **{name: pc.mean(column).as_py() or 0.0 for name, column in means.items()},
        }

    @property
    def queries(self) -> list[str]:
        """The query column."""
        return self.table["query"].to_pylist()  # type: ignore[no-any-return]

    @property
    def positives(self) -> list[str]:
        """The positive column."""
        return self.table["positive"].to_pylist()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return int(self.table.num_rows)


def docstring_pairs(
    source: PathLike | None = None, *, answer: str = "name", private: bool = False
) -> Pairs:
    """Pair the first docstring sentence of every public function and class with its name or code.

    The code is parsed, never imported. A sentence that occurs twice is left out.

    Args:
        source: A folder of Python files; None for the standard library.
        answer: ``"name"``: the dotted name; ``"code"``: the source without its docstring;
            ``"rest"``: the rest of the docstring.
        private: Also read files whose names start with _. A group is then a file, otherwise a
            top-level module.

    Raises:
        DataError: No public definition has such a docstring.
        ArgumentError: `answer` is none of these.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(f"{folder}/io.py").write_text('def load(): "Read a file."')
        ...     docstring_pairs(folder).positives
        ['io.load']
    """
    if answer not in ("name", "code", "rest"):
        raise ArgumentError("answer", "'name', 'code' or 'rest'", repr(answer))
    root = as_path(source or sysconfig.get_paths()["stdlib"])
    rows = []
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        where = inner.as_posix()
        is_hidden = _HIDDEN.search(where) or (_PRIVATE.search(where) and not private)
        if path.is_file() and not is_hidden:
            parts = inner.with_suffix("").parts
            module = ".".join(part for part in parts if part != "__init__")
            for name, node in _definitions(_parsed(path), module):
                text = " ".join((ast.get_docstring(node) or "").split())
                sentence = first_sentence(ast.get_docstring(node) or "")
                if len(sentence.split()) >= 3 and is_text(sentence):
                    node.body = node.body[1:] or [ast.Pass()]
                    positive = name
                    if answer != "name":
                        positive = text[len(sentence) :] if answer == "rest" else ast.unparse(node)
                    if is_text(positive):
                        group = where if private else parts[0]
                        rows.append({"query": sentence, "positive": positive, "group": group})
    if not rows:
        raise DataError(str(root), "Python modules with docstrings", "none")
    count = Counter(row["query"] for row in rows)
    return Pairs.of(row for row in rows if count[row["query"]] == 1)


def first_sentence(text: str) -> str:
    r"""Return the first sentence of a docstring, on one line.

    Examples:
        >>> first_sentence("Return the\n    absolute value. Of a number.")
        'Return the absolute value.'
    """
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph, maxsplit=1)[0]


def _parsed(path: Path) -> ast.Module:
    """Parse a module; a template or a broken sample is an empty one."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in the source
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return ast.Module([], [])


def _definitions(parent: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in parent.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}".lstrip(".")
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, name)


def _pairs(rows: Iterable[tuple[str, Any]]) -> Pairs:
    records = [_record(row, index, where) for index, (where, row) in enumerate(rows)]
    return _checked(pa.Table.from_pylist(records, schema=SCHEMA))


def _table_rows(table: pa.Table | pa.RecordBatch, where: str) -> list[tuple[str, Any]]:
    try:
        table.validate(full=True)
        names = [name for name in SCHEMA.names if name in table.schema.names]
        rows = table.select(names).to_pylist()
    except (pa.ArrowException, LookupError, ValueError, OverflowError) as error:
        raise DataError(where, f"the columns {SCHEMA.names}", error) from error
    return [(f"{where}: row {index}", row) for index, row in enumerate(rows)]


def _checked(table: pa.Table) -> Pairs:
    pairs = object.__new__(Pairs)
    object.__setattr__(pairs, "table", table.combine_chunks())
    return pairs


def _record(row: Any, index: int, where: str) -> dict[str, Any]:
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) <= 3:
        row = dict(zip(SCHEMA.names, row, strict=False))
    if not isinstance(row, Mapping) or not {"query", "positive"} <= set(row) <= set(_COLUMNS):
        expected = f"(query, positive[, negative]) or a mapping with some of {SCHEMA.names}"
        raise DataError(where, expected, shown(row, 80))
    record = {"negative": None, "quality": 1.0, "group": str(index), **row}
    for name, value in record.items():
        if name == "quality":
            number = isinstance(value, int | float | np.integer | np.floating)
            valid = number and not isinstance(value, bool) and 0 <= value <= 1
        else:
            valid = is_text(value, empty=name in ("negative", "group"))
        if not valid and not (name == "negative" and value is None):
            raise DataError(f"{where}: {name}", _COLUMNS[name][1], shown(value, 80))
    return record | {"quality": float(record["quality"])}


def is_text(value: object, *, empty: bool = False) -> bool:
    """Tell whether a value is text that UTF-8 can hold, not a lone surrogate, and not blank."""
    if not isinstance(value, str) or value.encode(errors="ignore").decode() != value:
        return False
    return empty or bool(value.strip())


def _existing(path: PathLike) -> Path:
    if not as_path(path).is_file():
        raise CardNotFoundError(str(path), "a data set", "nothing there")
    return Path(path)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the JSON value on each line that is not blank, after the place that an error names."""
    with os_errors(path):
        lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(where, "JSON", error) from error
            yield where, value
