"""R21 data sets: pairs survive every file format, split without a leak, refuse bad rows."""

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import DataError
from lora.testing.plugin import requirement
from lora.testing.tolerance import gamma
from lora.training.data import SCHEMA, Pairs, first_sentence

FORMATS = st.sampled_from([".arrow", ".parquet", ".jsonl", ".json", ""])
WORDS = ["Return", "x", ".", ". ", "\n", "\n\n", "  ", "e.g.", "é"]

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
ODD = ["a", "b", "a ", "ß", "日本", "a\0b", '"', "\u200b", "👩‍👩‍👧", "e\u0301"]
texts = st.sampled_from(ODD) | words
qualities = st.sampled_from([0.0, -0.0, 1.0, 5e-324, np.nextafter(1, 0)]) | st.floats(0, 1)
groups = st.sampled_from(["a", "b", "c", ""]) | words
rows = st.fixed_dictionaries(
    {"query": texts, "positive": texts, "group": groups},
    optional={"negative": st.none() | texts | st.just(""), "quality": qualities},
)
data_sets = st.lists(rows, max_size=8).map(Pairs.of)

BAD_LINES = ["{", "nope", '{"query": "a"}', "5", "null", '"text"', "[" * 5000]
BAD_LINES += ['{"query":"a","positive":" "}', '{"query":"a","positive":"b","quality":NaN}']
COLUMNS = st.sampled_from([*SCHEMA.names, "x"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
json_values = st.recursive(
    scalars | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(COLUMNS, inner, max_size=5),
    max_leaves=8,
)
ROLES, SAID = ["user", "assistant", "system"], ["a", "b\n", " ", "", None]
turns = st.tuples(st.sampled_from(ROLES), st.sampled_from(SAID))


def records(pairs):
    """The rows with the bits of their qualities."""
    return [{**row, "quality": row["quality"].hex()} for row in pairs.table.to_pylist()]


def written(text, suffix=".jsonl"):
    """A file with this content, in a folder that lives as long as what is returned."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / f"data{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder, path


@requirement("R21.5")
@given(data_sets, FORMATS)
def test_pairs_come_back_from_every_file_format_bit_for_bit(pairs, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"pairs{suffix}"
        pairs.save(path)
        loaded = Pairs.load(path)
        assert list(Path(folder).iterdir()) == [path]
    assert loaded == pairs
    assert records(loaded) == records(pairs)
    assert loaded.table.schema == SCHEMA


@requirement("R21.5")
@given(data_sets)
def test_rows_go_in_and_come_out_as_they_are(pairs):
    again = Pairs.of(pairs.table.to_pylist())
    assert again == pairs
    assert records(again) == records(pairs)
    assert pairs != pairs.add([("a", "b")])
    with pytest.raises(TypeError, match="unhashable"):
        hash(pairs)
    assert pairs.queries == pairs.table["query"].to_pylist()
    assert pairs.positives == pairs.table["positive"].to_pylist()


@requirement("R21.5")
@given(st.lists(st.tuples(texts, texts) | st.tuples(texts, texts, texts), max_size=5))
def test_a_tuple_says_the_same_as_a_mapping(tuples):
    mappings = [dict(zip(("query", "positive", "negative"), row, strict=False)) for row in tuples]
    pairs = Pairs.of(tuples)
    assert pairs == Pairs.of(mappings)
    assert pairs.table["group"].to_pylist() == [str(row) for row in range(len(tuples))]
    assert pairs.table["quality"].to_pylist() == [1.0] * len(tuples)


@requirement("R21.5")
@given(data_sets, st.data())
def test_chunks_and_wider_types_of_the_same_values_are_the_same_pairs(pairs, data):
    cut = data.draw(st.integers(0, len(pairs)))
    chunked = pa.concat_tables([pairs.table[:cut], pairs.table[cut:]])
    wide = chunked.set_column(0, "query", chunked["query"].cast(pa.large_string()))
    wide = wide.set_column(1, "positive", wide["positive"].dictionary_encode())
    assert Pairs(chunked) == Pairs(wide) == pairs
    assert Pairs(chunked).table["query"].num_chunks <= 1


@requirement("R21.5")
@given(data_sets, data_sets, data_sets)
def test_adding_is_concatenation(a, b, c):
    total = a.add(b).add(c)
    assert total == a.add(b.add(c))
    assert records(total) == records(a) + records(b) + records(c)
    assert a.add([]) == a == Pairs.of([]).add(a)
    assert total == a.add(b).add(c.table.to_pylist())


@requirement("R21.5", "R17.3")
@given(
    st.lists(rows, min_size=2, max_size=12).filter(lambda r: len({x["group"] for x in r}) > 1),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(0, 2**32),
)
def test_a_split_shares_no_group_loses_no_row_and_is_a_function_of_the_seed(rows, share, seed):
    pairs = Pairs.of(rows)
    first, second = pairs.split(share, seed=seed)
    assert len(first) > 0 < len(second)
    left, right = (set(part.table["group"].to_pylist()) for part in (first, second))
    assert not left & right
    everything = set(pairs.table["group"].to_pylist())
    assert left | right == everything
    assert len(left) == min(max(round(share * len(everything)), 1), len(everything) - 1)
    for part, names in ((first, left), (second, right)):
        assert records(part) == [row for row in records(pairs) if row["group"] in names]
    assert (first, second) == pairs.split(share, seed=seed)


@requirement("R21.5", "R17.3")
@given(data_sets, st.permutations(range(8)), st.integers(0, 99))
def test_a_split_does_not_depend_on_the_order_of_the_rows(pairs, order, seed):
    pairs = pairs.add([("q", "p"), ("r", "s")])
    shuffled = pairs.take([row for row in order if row < len(pairs)] + list(range(8, len(pairs))))
    for part, other in zip(pairs.split(seed=seed), shuffled.split(seed=seed), strict=True):
        assert set(part.table["group"].to_pylist()) == set(other.table["group"].to_pylist())


@requirement("R21.5")
@given(st.lists(st.builds(dict, rows, query=st.sampled_from("ab"), positive=st.sampled_from("ab"))))
def test_unique_keeps_the_first_of_each_query_and_positive(rows):
    pairs = Pairs.of(rows)
    unique = pairs.unique()
    first = {}
    for row in records(pairs):
        first.setdefault((row["query"], row["positive"]), row)
    assert records(unique) == list(first.values())
    assert unique.unique() == unique
    assert pairs.add(pairs).unique() == unique


@requirement("R21.5")
@given(data_sets, st.data())
def test_take_picks_rows_by_position(pairs, data):
    positions = st.lists(st.integers(0, len(pairs) - 1), max_size=6) if pairs else st.just([])
    first, second = data.draw(positions), data.draw(positions)
    assert records(pairs.take(first)) == [records(pairs)[row] for row in first]
    inner = [row % len(first) for row in second if first]
    assert pairs.take(first).take(inner) == pairs.take([first[row] for row in inner])
    assert pairs.take(range(len(pairs))) == pairs


@requirement("R21.5")
@given(data_sets)
def test_statistics_are_what_counting_by_hand_gives(pairs):
    rows = pairs.table.to_pylist()
    stats = pairs.statistics()

    def mean(values):
        exact = sum(values) / len(values) if values else 0.0
        return pytest.approx(exact, rel=gamma(9, np.dtype(np.float64)), abs=1e-320)

    assert stats == {
        "rows": len(rows),
        "groups": len({row["group"] for row in rows}),
        "positives": len({row["positive"] for row in rows}),
        "negatives": sum(row["negative"] is not None for row in rows),
        "mean_quality": mean([row["quality"] for row in rows]),
        "mean_query_length": mean([len(row["query"]) for row in rows]),
        "mean_positive_length": mean([len(row["positive"]) for row in rows]),
    }
    json.dumps(stats)


@requirement("R21.5")
@pytest.mark.parametrize(
    ("column", "value"),
    [(name, value) for name in ("query", "positive") for value in (" ", "\u3000", "", None)]
    + [("group", None)]
    + [("quality", v) for v in (None, float("nan"), -5e-324, np.nextafter(1, 2), float("inf"))],
)
@settings(max_examples=10)
@given(pairs=data_sets.filter(len), data=st.data())
def test_a_bad_value_in_a_table_is_refused_too(column, value, pairs, data):
    row = data.draw(st.integers(0, len(pairs) - 1))
    values = pairs.table[column].to_pylist()
    values[row] = value
    index = SCHEMA.get_field_index(column)
    table = pairs.table.set_column(index, column, pa.array(values, SCHEMA.field(column).type))
    message = column if value is None else rf"^pairs: row {row}: {column}"
    with pytest.raises(DataError, match=message):
        Pairs(table)
    with pytest.raises(DataError, match=f"the columns .*found .*{column}"):
        Pairs(pairs.table.drop_columns([column]))


@requirement("R21.5")
@given(st.lists(rows | st.sampled_from(["", "  ", "\t"]), max_size=6), st.sampled_from(BAD_LINES))
def test_a_bad_line_of_a_jsonl_file_is_refused_by_its_number_blank_lines_counted(lines, bad):
    content = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    folder, path = written("\n".join([*content, bad, '{"query":"z","positive":"z"}']))
    with folder, pytest.raises(DataError) as caught:
        Pairs.load(path)
    assert str(caught.value).startswith(f"{path}: line {len(lines) + 1}")


@requirement("R21.5")
@given(st.lists(json_values, max_size=3), st.sampled_from([Pairs.load, Pairs.from_chat]))
def test_any_json_lines_are_pairs_or_a_data_error_that_names_the_file(values, read):
    folder, path = written("\n".join(json.dumps(value) for value in values))
    with folder:
        try:
            outcome = str(len(read(path)))
        except DataError as error:
            outcome = str(error)
    assert outcome == str(len(values)) or str(path) in outcome


@requirement("R21.5")
@given(data_sets, st.sampled_from([".arrow", ".parquet", ".jsonl"]), st.data())
def test_a_damaged_file_is_pairs_or_a_data_error_but_never_a_crash(pairs, suffix, data):
    folder, path = written(b"", suffix)
    with folder:
        pairs.save(path)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3)) if raw else 0):
            place = data.draw(st.integers(0, len(raw) - 1))
            raw[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
        path.write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
        try:
            loaded = Pairs.load(path)
        except DataError:
            return
        assert Pairs.of(loaded.table.to_pylist()) == loaded


@requirement("R21.5")
@given(st.lists(st.lists(turns, max_size=6), max_size=4))
def test_a_chat_gives_each_question_with_the_answer_right_after_it(chats):
    turns_of = [[{"role": r, "content": text, "tool_calls": []} for r, text in c] for c in chats]
    lines = [json.dumps({"messages": chat}) for chat in turns_of]
    expected = []
    for number, chat in enumerate(chats):
        for (role, asked), (then, reply) in pairwise(chat):
            is_pair = (role, then) == ("user", "assistant")
            if is_pair and (asked or "").strip() and (reply or "").strip():
                expected.append((asked, reply, f"transcript {number}"))
    folder, path = written("\n".join(lines))
    with folder:
        if not expected:
            with pytest.raises(DataError, match="a question followed by its answer"):
                Pairs.from_chat(path)
            return
        pairs = Pairs.from_chat(path)
    assert [(r["query"], r["positive"], r["group"]) for r in pairs.table.to_pylist()] == expected


@requirement("R21.6")
@given(st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
def test_the_first_sentence_is_one_line_of_the_first_paragraph(text):
    sentence = first_sentence(text)
    paragraph = text.strip().split("\n\n")[0]
    assert sentence == " ".join(sentence.split())
    assert " ".join(paragraph.split()).startswith(sentence)
    assert first_sentence(sentence) == sentence
