"""Training data: pairs of texts as an Arrow table, in a value with the few operations that training needs.

Columns: ``query`` and ``positive`` (never empty), ``negative`` (may be null), ``quality`` in [0, 1], and ``group``, the
source that a pair comes from: data are split by group, since pairs of one source resemble each other.
"""

import ast
import json
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lora.errors import ArgumentError, CardNotFoundError, DataError
from lora.store import PathLike, replacing

SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("positive", pa.string(), nullable=False),
        pa.field("negative", pa.string()),
        pa.field("quality", pa.float64(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
    ]
)

Row: TypeAlias = Mapping[str, Any] | Sequence[str]
"""A pair: a mapping with a column's values, or ``(query, positive[, negative])``."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """A data set of pairs.

    Parameters
    ----------
    table
        A table with `SCHEMA`'s columns; build one with `Pairs.of` or an importer.

    Raises
    ------
    DataError
        If columns are missing, a query or positive is empty, or a quality is outside [0, 1].

    Examples
    --------
    >>> pairs = Pairs.of([("open a file", "builtins.open"), {"query": "quit", "positive": "sys.exit", "group": "sys"}])
    >>> len(pairs), pairs.statistics()["groups"]
    (2, 2)

    Requirements: R21.5
    """

    table: pa.Table

    def __post_init__(self) -> None:
        missing = set(SCHEMA.names) - set(self.table.column_names)
        if missing:
            raise DataError("pairs", f"columns {SCHEMA.names}", f"none called {sorted(missing)}")
        try:
            table = self.table.select(SCHEMA.names).cast(SCHEMA)
        except (pa.ArrowException, ValueError) as error:
            raise DataError("pairs", "the pairs schema", error) from error
        for column in ("query", "positive"):
            empty = pc.index(pc.equal(pc.utf8_trim_whitespace(table[column]), ""), value=True).as_py()
            if empty >= 0:
                raise DataError(f"pairs: row {empty}: {column}", "text", "an empty string")
        inside = pc.and_(pc.greater_equal(table["quality"], 0.0), pc.less_equal(table["quality"], 1.0))
        if not pc.all(inside, min_count=0).as_py():
            raise DataError("pairs: quality", "numbers in [0, 1]", "others")
        object.__setattr__(self, "table", table.combine_chunks())

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Self:
        """Pairs of rows; an omitted group is the row's position.

        Raises
        ------
        DataError
            Naming the row that is not a pair.
        """
        records = [_record(row, index) for index, row in enumerate(rows)]
        try:
            return cls(pa.Table.from_pylist(records, schema=SCHEMA))
        except (pa.ArrowException, TypeError) as error:
            raise DataError("pairs", "text and numbers", error) from error

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read an Arrow file that `save` wrote, a Parquet file or a JSONL file, by its ending.

        Raises
        ------
        CardNotFoundError, DataError
            If there is no such file, or it does not hold pairs.
        """
        path = Path(path)
        if not path.is_file():
            raise CardNotFoundError(str(path), "a data set", "nothing there")
        try:
            if path.suffix == ".parquet":
                return cls(_completed(pq.read_table(path)))
            if path.suffix in (".jsonl", ".json"):
                return cls.of(_json_rows(path))
            with pa.memory_map(str(path)) as source:
                return cls(_completed(pa.ipc.open_file(source).read_all()))
        except pa.ArrowException as error:
            raise DataError(str(path), "an Arrow, Parquet or JSONL file", error) from error

    @classmethod
    def from_chat(cls, path: PathLike) -> Self:
        """Pairs from chat transcripts: JSONL, ``{"messages": [{"role": …, "content": …}, …]}`` a line.

        A user's message is the query of the assistant's answer right after it; a transcript is a group.

        Raises
        ------
        DataError
            If a line is no transcript, or none holds a question with its answer.
        """
        rows: list[Row] = []
        for index, record in enumerate(_json_rows(Path(path))):
            try:
                turns = [(str(turn["role"]), str(turn["content"])) for turn in record["messages"]]
            except (KeyError, TypeError) as error:
                raise DataError(f"{path}: line {index + 1}", "messages with role and content", error) from error
            rows += [
                {"query": asked, "positive": told, "group": f"transcript {index}"}
                for (role, asked), (next_role, told) in pairwise(turns)
                if (role, next_role) == ("user", "assistant") and asked.strip() and told.strip()
            ]
        if not rows:
            raise DataError(str(path), "a question followed by its answer", "none")
        return cls.of(rows)

    def save(self, path: PathLike) -> None:
        """Write the pairs as an Arrow file, or as Parquet if the path ends so; atomically."""
        with replacing(path) as file:
            if Path(path).suffix == ".parquet":
                pq.write_table(self.table, file)
            else:
                with pa.ipc.new_file(file, SCHEMA) as writer:
                    writer.write_table(self.table)

    def add(self, other: "Pairs | Iterable[Row]") -> "Pairs":
        """These pairs and others."""
        more = other if isinstance(other, Pairs) else Pairs.of(other)
        return Pairs(pa.concat_tables([self.table, more.table]))

    def split(self, share: float = 0.8, *, seed: int = 0) -> "tuple[Pairs, Pairs]":
        """Two parts with no group in common, the first with `share` of the groups.

        Raises
        ------
        ArgumentError
            If the share is not in (0, 1).
        DataError
            If there are fewer than two groups.

        Notes
        -----
        Requirements: R17.3, R21.5
        """
        if not 0 < share < 1:
            raise ArgumentError("share", "a number in (0, 1)", share)
        groups = sorted(set(self.table["group"].to_pylist()))
        if len(groups) < 2:
            raise DataError("pairs: split", "at least two groups", len(groups))
        order = np.random.default_rng(seed).permutation(len(groups))
        size = min(max(round(share * len(groups)), 1), len(groups) - 1)
        first = pa.array([groups[i] for i in order[:size]], pa.string())
        inside = pc.is_in(self.table["group"], first)
        return Pairs(self.table.filter(inside)), Pairs(self.table.filter(pc.invert(inside)))

    def unique(self) -> "Pairs":
        """The pairs less those whose query and positive came before."""
        seen: dict[tuple[str, str], int] = {}
        for row, key in enumerate(zip(self.queries, self.positives, strict=True)):
            seen.setdefault(key, row)
        return self.take(list(seen.values()))

    def take(self, rows: Sequence[int]) -> "Pairs":
        """The pairs at these positions, in this order."""
        return Pairs(self.table.take(pa.array(rows, pa.int64())))

    def statistics(self) -> dict[str, Any]:
        """Numbers of rows, groups, negatives and distinct positives; mean quality and lengths in characters."""

        def mean(values: pa.ChunkedArray) -> float:
            return float(pc.mean(values).as_py() or 0.0)

        return {
            "rows": len(self),
            "groups": pc.count_distinct(self.table["group"]).as_py(),
            "positives": pc.count_distinct(self.table["positive"]).as_py(),
            "negatives": len(self) - self.table["negative"].null_count,
            "mean_quality": mean(self.table["quality"]),
            "mean_query_length": mean(pc.utf8_length(self.table["query"])),
            "mean_positive_length": mean(pc.utf8_length(self.table["positive"])),
        }

    @property
    def queries(self) -> list[str]:
        """The query column."""
        queries: list[str] = self.table["query"].to_pylist()
        return queries

    @property
    def positives(self) -> list[str]:
        """The positive column."""
        positives: list[str] = self.table["positive"].to_pylist()
        return positives

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __eq__(self, other: object) -> bool:
        return self.table.equals(other.table) if isinstance(other, Pairs) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


def docstring_pairs(source: PathLike | None = None, *, answer: str = "name") -> Pairs:
    """First docstring sentence → qualified name (or source) of every public function and class in a source tree.

    The code is parsed, never imported. A pair's group is its top-level module, so that a split holds out whole modules.

    Parameters
    ----------
    source
        A folder of Python packages and modules; None for the standard library of this Python.
    answer
        ``"name"``: the dotted name; ``"code"``: the source without its docstring.

    Raises
    ------
    DataError
        If nothing is found.

    Notes
    -----
    Requirements: R21.6
    """
    if answer not in ("name", "code"):
        raise ArgumentError("answer", "'name' or 'code'", repr(answer))
    root = Path(source or sysconfig.get_paths()["stdlib"])
    rows = [
        row
        for path in sorted(root.rglob("*.py"))
        if _wanted(path.relative_to(root))
        for row in _rows(path, root, answer)
    ]
    if not rows:
        raise DataError(str(root), "Python modules with docstrings", "none")
    queries = Counter(row["query"] for row in rows)
    return Pairs.of(
        row for row in rows if queries[row["query"]] == 1
    )  # "Return a string." asks for nothing in particular


def _wanted(path: Path) -> bool:
    left_out = {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "__pycache__",
        "config",
    }
    return not any(
        part in left_out or part.startswith(("_", "config-")) for part in path.with_suffix("").parts[:-1]
    ) and (not path.name.startswith(("_", "test_")) or path.name == "__init__.py")


def _rows(path: Path, root: Path, answer: str) -> Iterator[dict[str, str]]:
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return  # templates and samples of other encodings are no modules
    for name, node in _definitions(tree, module):
        sentence = first_sentence(ast.get_docstring(node) or "")
        if len(sentence.split()) >= 3:
            text = name if answer == "name" else _code(node)
            yield {"query": sentence, "positive": text, "group": parts[0]}


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Any]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, name)


def first_sentence(text: str) -> str:
    r"""The first sentence of a docstring, on one line.

    Examples
    --------
    >>> first_sentence("Return the\n    absolute value. Of a number.")
    'Return the absolute value.'
    """
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    head, stop, _ = paragraph.partition(". ")
    return head + stop.strip()


def _code(node: Any) -> str:
    body = node.body[1:] or [ast.Pass()]
    return ast.unparse(type(node)(**{**dict(ast.iter_fields(node)), "body": body}))


def _record(row: Row, index: int) -> dict[str, Any]:
    if isinstance(row, str) or not isinstance(row, Mapping | Sequence):
        raise DataError(f"pairs: row {index}", "a mapping, or (query, positive)", type(row).__name__)
    given = dict(row) if isinstance(row, Mapping) else dict(zip(("query", "positive", "negative"), row, strict=False))
    unknown = set(given) - set(SCHEMA.names)
    if unknown or not {"query", "positive"} <= set(given):
        raise DataError(f"pairs: row {index}", f"query, positive and at most {SCHEMA.names[2:]}", sorted(given))
    return {"negative": None, "quality": 1.0, "group": str(index), **given}


def _completed(table: pa.Table) -> pa.Table:
    """The table with the optional columns that it lacks."""
    rows = table.num_rows
    for name, values in (
        ("negative", pa.nulls(rows, pa.string())),
        ("quality", pa.array(np.ones(rows))),
        ("group", pa.array([str(row) for row in range(rows)], pa.string())),
    ):
        if name not in table.column_names:
            table = table.append_column(name, values)
    return table


def _json_rows(path: Path) -> Iterator[Any]:
    """The JSON value on each line."""
    if not path.is_file():
        raise CardNotFoundError(str(path), "a data set", "nothing there")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}: line {number}", "JSON", error) from error
