"""Training data: pairs of texts as an Arrow table, in a value with the few operations that training
needs.

Columns: ``query`` and ``positive`` (never empty), ``negative`` (may be null), ``quality`` in [0,
1], and ``group``, the source that a pair comes from: data are split by group, since pairs of one
source resemble each other.

Requirements: R17, R21.
"""

import ast
import json
import sysconfig
import warnings
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

    Args:
        table: A table with `SCHEMA`'s columns; build one with `Pairs.of` or an importer.

    Raises:
        DataError: If columns are missing, a query or positive is empty, or a quality is outside [0,
            1].

    Examples:
        >>> pairs = Pairs.of([("open a file", "builtins.open"), {"query": "quit", "positive": "sys.exit", "group": "sys"}])
        >>> len(pairs), pairs.statistics()["groups"]
        (2, 2)
    """

    table: pa.Table

    def __post_init__(self) -> None:
        missing = set(SCHEMA.names) - set(self.table.column_names)
        if missing:
            raise DataError("pairs", f"columns {SCHEMA.names}", f"none called {sorted(missing)}")
        try:
            table = self.table.select(SCHEMA.names).cast(SCHEMA)
            table.validate(full=True)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise DataError("pairs", "the pairs schema", error) from error
        for column in ("query", "positive"):
            empty = pc.index(
                pc.equal(pc.utf8_trim_whitespace(table[column]), ""), value=True
            ).as_py()
            if empty >= 0:
                raise DataError(f"pairs: row {empty}: {column}", "text", "an empty string")
        inside = pc.and_(
            pc.greater_equal(table["quality"], 0.0), pc.less_equal(table["quality"], 1.0)
        )
        outside = pc.index(inside, value=False).as_py()
        if outside >= 0:
            found = table["quality"][outside].as_py()
            raise DataError(f"pairs: row {outside}: quality", "a number in [0, 1]", found)
        object.__setattr__(self, "table", table.combine_chunks())

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Self:
        """Pairs of rows; an omitted group is the row's position.

        Raises:
            DataError: Naming the row that is not a pair.
        """
        return cls(
            _table(_record(row, index, f"pairs: row {index}") for index, row in enumerate(rows))
        )

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read an Arrow file that `save` wrote, a Parquet file or a JSONL file, by its ending.

        Raises:
            CardNotFoundError, DataError: If there is no such file, or it does not hold pairs.
        """
        path = Path(path)
        if not path.is_file():
            raise CardNotFoundError(str(path), "a data set", "nothing there")
        try:
            if path.suffix == ".parquet":
                return cls(_completed(pq.read_table(path)))
            if path.suffix in (".jsonl", ".json"):
                lines = enumerate(_json_rows(path))
                return cls(
                    _table(
                        _record(row, index, f"{path}: line {line}") for index, (line, row) in lines
                    )
                )
            with pa.memory_map(str(path)) as source:
                return cls(_completed(pa.ipc.open_file(source).read_all()))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(str(path), "an Arrow, Parquet or JSONL file", error) from error

    @classmethod
    def from_chat(cls, path: PathLike) -> Self:
        """Pairs from chat transcripts: JSONL, ``{"messages": [{"role": …, "content": …}, …]}`` a
        line.

        A user's message is the query of the assistant's answer right after it; a transcript is a
        group.

        Raises:
            DataError: If a line is no transcript, or none holds a question with its answer.
        """
        rows: list[Row] = []
        for index, (line, record) in enumerate(_json_rows(Path(path))):
            where = f"{path}: line {line}"
            try:
                turns = [(turn["role"], turn["content"] or "") for turn in record["messages"]]
            except (KeyError, TypeError) as error:
                raise DataError(where, "messages with role and content", error) from error
            for _, content in turns:
                if not isinstance(content, str):
                    raise DataError(where, "content that is text", repr(content)[:80])
            rows += [
                {"query": asked, "positive": told, "group": f"transcript {index}"}
                for (role, asked), (next_role, told) in pairwise(turns)
                if (role, next_role) == ("user", "assistant") and asked.strip() and told.strip()
            ]
        if not rows:
            raise DataError(str(path), "a question followed by its answer", "none")
        return cls.of(rows)

    def save(self, path: PathLike) -> None:
        """Write the pairs as an Arrow file, or as Parquet or JSONL if the path ends so; atomically."""
        with replacing(path) as file:
            if Path(path).suffix == ".parquet":
                pq.write_table(self.table, file)
            elif Path(path).suffix in (".jsonl", ".json"):
                file.writelines(f"{json.dumps(row)}\n".encode() for row in self.table.to_pylist())
            else:
                with pa.ipc.new_file(file, SCHEMA) as writer:
                    writer.write_table(self.table)

    def add(self, other: "Pairs | Iterable[Row]") -> "Pairs":
        """These pairs and others."""
        more = other if isinstance(other, Pairs) else Pairs.of(other)
        return Pairs(pa.concat_tables([self.table, more.table]))

    def split(self, share: float = 0.8, *, seed: int = 0) -> "tuple[Pairs, Pairs]":
        """Two parts with no group in common, the first with `share` of the groups.

        Raises:
            ArgumentError: If the share is not in (0, 1).
            DataError: If there are fewer than two groups.
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

    def sample(self, size: int, seed: int) -> "Pairs":
        """At most `size` pairs, drawn without replacement and kept in their order."""
        order = np.random.default_rng([seed, size]).permutation(len(self))
        return self.take(sorted(order[:size].tolist()))

    def statistics(self) -> dict[str, Any]:
        """Numbers of rows, groups, negatives and distinct positives; mean quality and lengths in
        characters.
        """

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
    """First docstring sentence → qualified name (or source) of every public function and class in a
    source tree.

    The code is parsed, never imported. A pair's group is its top-level module, so that a split
    holds out whole modules.

    Args:
        source: A folder of Python packages and modules; None for the standard library of this
            Python.
        answer: ``"name"``: the dotted name; ``"code"``: the source without its docstring.

    Raises:
        DataError: If nothing is found.
    """
    if answer not in ("name", "code"):
        raise ArgumentError("answer", "'name' or 'code'", repr(answer))
    root = Path(source or sysconfig.get_paths()["stdlib"])
    rows = [
        row
        for path in sorted(root.rglob("*.py"))
        if path.is_file() and _wanted(path.relative_to(root))
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
        part in left_out or part.startswith(("_", "config-"))
        for part in path.with_suffix("").parts[:-1]
    ) and (not path.name.startswith(("_", "test_")) or path.name == "__init__.py")


def _rows(path: Path, root: Path, answer: str) -> Iterator[dict[str, str]]:
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        with (
            warnings.catch_warnings()
        ):  # of invalid escapes in the source read: whatever the filters, it is parsed
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return  # templates and broken samples are no modules
    for name, node in _definitions(tree, module):
        sentence = first_sentence(ast.get_docstring(node) or "")
        if len(sentence.split()) >= 3 and _fits("query", sentence):
            text = name if answer == "name" else _code(node)
            yield {"query": sentence, "positive": text, "group": parts[0]}


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Any]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}".lstrip(".")
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, name)


def first_sentence(text: str) -> str:
    r"""The first sentence of a docstring, on one line.

    Examples:
        >>> first_sentence("Return the\n    absolute value. Of a number.")
        'Return the absolute value.'
    """
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    head, stop, _ = paragraph.partition(". ")
    return head + stop.strip()


def _code(node: Any) -> str:
    body = node.body[1:] or [ast.Pass()]
    return ast.unparse(
        ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), "body": body}), node)
    )


def _record(row: Row, index: int, where: str) -> dict[str, Any]:
    """The row with every column; its group is its position if it names none."""
    if isinstance(row, str) or not isinstance(row, Mapping | Sequence):
        raise DataError(where, "a mapping, or (query, positive[, negative])", type(row).__name__)
    if not isinstance(row, Mapping):
        if len(row) > 3:
            raise DataError(where, "(query, positive[, negative])", f"{len(row)} values")
        row = dict(zip(("query", "positive", "negative"), row, strict=False))
    if not {"query", "positive"} <= set(row) <= set(SCHEMA.names):
        raise DataError(where, f"query, positive and at most {SCHEMA.names[2:]}", list(row))
    for column, value in row.items():
        if not _fits(column, value):
            expected = {"quality": "a number in [0, 1]", "negative": "text or null"}.get(
                column, "text"
            )
            raise DataError(f"{where}: {column}", expected, repr(value)[:80])
    return {"negative": None, "quality": 1.0, "group": str(index), **row}


def _fits(column: str, value: object) -> bool:
    if column == "quality":
        return isinstance(value, int | float | np.number) and bool(0 <= value <= 1)
    if value is None:
        return column == "negative"
    if (
        not isinstance(value, str) or value.encode(errors="ignore").decode() != value
    ):  # lone surrogates
        return False
    return column in ("negative", "group") or bool(value.strip())


def _table(records: Iterable[dict[str, Any]]) -> pa.Table:
    try:
        return pa.Table.from_pylist(list(records), schema=SCHEMA)
    except (pa.ArrowException, TypeError) as error:
        raise DataError("pairs", "text and numbers", error) from error


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


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON value on each line that is not blank, with the line's number."""
    if not path.is_file():
        raise CardNotFoundError(str(path), "a data set", "nothing there")
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number}", "JSON", error) from error
            yield number, value
