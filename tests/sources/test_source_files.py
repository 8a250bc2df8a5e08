"""Broken files, broken rows and growing files, through the engine."""

import asyncio
import gzip
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datakit.errors import InputError
from datakit.kit import Kit
from datakit.sources import jsonl, parquet

GOOD = {"prompt": "Hello?", "chosen": "Hi.", "rejected": "Go."}
CHAT = {"prompt": [{"role": "user", "content": "Hello?"}], "chosen": "Hi.", "rejected": "Go."}
BIG = "x" * 5_000_000


def pairs(*rows):
    return [{**GOOD, **row} for row in rows]


def chats(*messages):
    return [CHAT, *({**CHAT, "prompt": list(one)} for one in messages)]


# name: (rows, fields, kept, [(number, reason, parts of the detail)])
BAD_ROWS = {
    "null text": (
        pairs({}, {"prompt": None}, {"chosen": None}),
        {},
        1,
        [(2, "null_value", "column 'prompt' is null"), (3, "null_value", "column 'chosen'")],
    ),
    "empty text": (
        pairs({}, {"prompt": ""}, {"rejected": " \n"}),
        {},
        1,
        [(2, "empty_text", "column 'prompt'"), (3, "empty_text", "column 'rejected'")],
    ),
    "null messages": (
        chats([], [None], [{"role": "user", "content": None}]),
        {},
        1,
        [
            (2, "empty_text", "'prompt' holds no messages"),
            (3, "null_value", "column 'prompt[0]' is null"),
            (4, "null_value", "column 'prompt[0]' has no content"),
        ],
    ),
    "unknown role": (
        chats([{"role": "tool", "content": "x"}], [{"role": None, "content": "x"}]),
        {},
        1,
        [
            (2, "unknown_role", "column 'prompt[0]' has the role 'tool'; known: system"),
            (3, "unknown_role", "column 'prompt[0]' has the role None"),
        ],
    ),
    "prompt ends in an answer": (
        chats([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        {},
        1,
        [(2, "invalid_row", "prompt ends in a 'assistant' turn")],
    ),
    "NUL": (pairs({}, {"chosen": "a\0b"}), {}, 1, [(2, "invalid_row", "NUL")]),
    "a 5 MB prompt": (pairs({"prompt": BIG}, {"chosen": ""}), {}, 1, [(2, "empty_text", "chosen")]),
    "duplicate keys": (
        pairs({"id": "a"}, {"id": "b", "prompt": "Why?"}, {"id": "a"}, {"id": None}),
        {"columns": {"key": "id"}},
        2,
        [(0, "duplicate_key", "the key 'a'"), (4, "null_value", "column 'id', the key")],
    ),
    "no common prompt": (
        [
            {
                "chosen": "Human: a\n\nAssistant: b",
                "rejected": "Human: c\n\nAssistant: d",
            },
            {
                "chosen": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "Human: a\n\nAssistant: b\n\nHuman: x\n\nAssistant: d",
            },
            {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"},
            {"chosen": "b", "rejected": "c"},
        ],
        {},
        1,
        [
            (1, "prefix_mismatch", "0 turns in common"),
            (2, "prefix_mismatch", "2 turns in common"),
            (4, "wrong_type", "column 'chosen' is a text without"),
        ],
    ),
    "prompt beside other conversations": (
        [
            {"prompt": "a", "chosen": [U, A1], "rejected": [U, A2]}
            for U, A1, A2 in [
                [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "b"},
                    {"role": "assistant", "content": "c"},
                ]
                for text in ("a", "other")
            ]
        ],
        {},
        1,
        [(2, "prefix_mismatch", "do not hold the prompt in column 'prompt'")],
    ),
    "measures": (
        pairs({"s": "4"}, {"s": "N/A"}, {"s": "many"}),
        {"columns": {"measures": ["s"]}},
        2,
        [(3, "wrong_type", "column 's' holds str 'many', not a number")],
    ),
    "equal rows are two rows": (pairs({}, {}), {}, 2, []),
}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(name, form, run, tmp_path):
    rows, fields, kept, faults = BAD_ROWS[name]
    write(tmp_path / f"rows.{form}", rows)
    out = run(f"sources.{form}", path=f"rows.{form}", kind="Pair", **fields)
    assert len(out.kept) == kept
    assert out.rows_in == len(rows)
    assert len({row.id for row in out.kept}) == kept
    assert [(row["reason"]) for row in out.dropped] == [reason for _, reason, _ in faults]
    unit = "row" if form == "parquet" else "line"
    for row, (number, _, said) in zip(out.dropped, faults, strict=True):
        assert said in row["detail"]
        if number:
            assert row["detail"].startswith(f"rows.{form}, {unit} {number}: ")
            assert json.loads(row["raw"]) == rows[number - 1] or len(row["raw"]) == 100_000


# name: (bytes of the file, fields, error text or None, kept, [(line, reason, part of the detail)])
LINE = json.dumps(GOOD).encode()
DEEP = b'{"prompt":' + b"[" * 100_000
BAD_LINES = {
    "broken line": (
        b"\n".join([LINE, b'{"prompt": "a", "cho', b"", LINE, b"[1]", b"\xef\xbb\xbf" + LINE]),
        3,
        [(2, "broken_line", "not valid JSON"), (5, "broken_line", "a JSON list, not an object")],
    ),
    "not UTF-8": (
        LINE + b"\r\n" + LINE.replace(b"Hello", b"H\xe9llo") + b"\n",
        1,
        [(2, "broken_line", "not UTF-8 at byte ")],
    ),
    "a key missing": (LINE + b'\n{"prompt": "a"}', 1, [(2, "null_value", "column 'chosen'")]),
    "another type": (
        LINE + b"\n" + LINE.replace(b'"Hi."', b"7"),
        1,
        [(2, "wrong_type", "column 'chosen' holds int 7, not messages")],
    ),
    "half a surrogate pair": (
        LINE + b"\n" + LINE.replace(b"Hi.", b"\\ud83d") + LINE.replace(b"\n", b""),
        1,
        [(2, "broken_line", "Extra data")],
    ),
    "half a surrogate pair in a text": (
        LINE + b"\n" + LINE.replace(b"Hi.", b"\\ud83d"),
        1,
        [(2, "invalid_row", "column 'chosen' holds half of a surrogate pair")],
    ),
    "nested without end": (LINE + b"\n" + DEEP, 1, [(2, "broken_line", "not valid JSON")]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(name, run, tmp_path):
    data, kept, faults = BAD_LINES[name]
    (tmp_path / "rows.jsonl").write_bytes(data)
    out = run("sources.jsonl", path="rows.jsonl", kind="Pair")
    assert len(out.kept) == kept
    assert out.rows_in == len([line for line in data.split(b"\n") if line.strip()])
    for row, (number, reason, said) in zip(out.dropped, faults, strict=True):
        assert row["reason"] == reason
        assert row["detail"].startswith(f"rows.jsonl, line {number}: ")
        assert said in row["detail"]
        assert row["raw"]


def test_a_parquet_text_that_is_not_utf_8_rejects_its_row_only(run, tmp_path):
    texts = pa.array([b"Hi.", b"H\xe9", b"Ho."], pa.binary()).cast(pa.string(), safe=False)
    same = pa.array(["Hello?"] * 3)
    table = pa.table({"prompt": same, "chosen": texts, "rejected": pa.array(["a", "b", "c"])})
    pq.write_table(table, tmp_path / "rows.parquet")
    out = run("sources.parquet", path="rows.parquet", kind="Pair")
    assert [row.chosen[0].content for row in out.kept] == ["Hi.", "Ho."]
    [row] = out.dropped
    assert row["detail"].startswith("rows.parquet, row 2: column 'chosen' is not UTF-8")
    assert row["reason"] == "wrong_type"


def whole_parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([GOOD] * 50), sink)
    return sink.getvalue().to_pybytes()


BAD_FILES = {
    "truncated Parquet": ("rows.parquet", whole_parquet()[:-40], "cannot be read as Parquet"),
    "not Parquet": ("rows.parquet", b"prompt,chosen\n" * 9, "cannot be read as Parquet"),
    "broken pages": (
        "rows.parquet",
        b"PAR1" + b"\xff" * 200 + whole_parquet()[204:],
        "row group 0 is broken",
    ),
    "empty Parquet": ("rows.parquet", b"", "the source has no rows"),
    "empty JSONL": ("rows.jsonl", b"", "the source has no rows"),
    "only blank lines": ("rows.jsonl", b"\n \n", "the source has no rows"),
    "not one good line": ("rows.jsonl", b"a\nb\n", "rows.jsonl, line 1: not valid JSON"),
    "truncated gzip": ("rows.jsonl.gz", gzip.compress(LINE * 9)[:-12], "cannot be read"),
    "not a list": ("rows.json", b'[{"prompt": "a"}', "not a valid JSON list"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, run, tmp_path):
    file, data, said = BAD_FILES[name]
    (tmp_path / file).write_bytes(data)
    step = "sources.parquet" if file.endswith("parquet") else "sources.jsonl"
    with pytest.raises(InputError) as error:
        run(step, path=file, kind="Pair")
    assert said in str(error.value)
    if "no rows" not in said:
        assert file in str(error.value)


def test_no_rows_in_a_parquet_file(run, tmp_path):
    pq.write_table(pa.Table.from_pylist([GOOD])[:0], tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="the source has no rows"):
        run("sources.parquet", path="rows.parquet", kind="Pair")


@pytest.mark.parametrize("path", ["none.jsonl", "none/*.jsonl", "*.jsonl", "."])
def test_no_file(path, run):
    with pytest.raises(InputError, match="no file"):
        run("sources.jsonl", path=path, kind="Pair")


def test_folder_and_glob_read_files_in_order_of_their_names(run, tmp_path):
    folder = tmp_path / "set" / "b"
    folder.mkdir(parents=True)
    write(folder / "2.jsonl", pairs({"prompt": "two"}))
    write(tmp_path / "set" / "1.jsonl", pairs({"prompt": "one"}, {"chosen": ""}))
    with gzip.open(tmp_path / "set" / "c.jsonl.gz", "wb") as file:
        file.write(json.dumps(pairs({"prompt": "three"})[0]).encode())
    (tmp_path / "set" / "d.json").write_text(json.dumps([*pairs({"prompt": "four"}), 5]))
    (tmp_path / "set" / "notes.txt").write_text("no rows")
    out = run("sources.jsonl", path="set", kind="Pair")
    texts = [row.prompt[0].content for row in out.kept]
    assert texts == ["one", "two", "three", "four"]
    assert [row.source for row in out.kept] == ["1", "2", "c", "d"]
    details = [row["detail"].split(": ")[0] for row in out.dropped]
    assert details == ["1.jsonl, line 2", "d.json, item 2"]
    found = run("sources.jsonl", path="set/**/*.jsonl", kind="Pair").kept
    assert [row.prompt[0].content for row in found] == ["one", "two"]


def test_a_grown_jsonl_is_noticed_and_old_ranges_stand(run, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "RANGE_BYTES", 300)
    path = tmp_path / "rows.jsonl"
    write(path, pairs(*({"prompt": f"p{i % 7}"} for i in range(20))))
    fields = {"path": "rows.jsonl", "kind": "Pair"}
    before = run("sources.jsonl", **fields)
    assert run("sources.jsonl", **fields).keys == before.keys
    with path.open("a") as file:
        file.write('{"broken\n' + json.dumps({**GOOD, "prompt": "p3"}))
    after = run("sources.jsonl", **fields)
    old = [row.id for row in before.kept]
    assert [row.id for row in after.kept][:20] == old
    assert len(after.kept) == 21
    assert len(set(old)) == 20
    assert after.keys[: len(before.keys) - 1] == before.keys[:-1]
    assert not set(after.keys[len(before.keys) - 1 :]) & set(before.keys)
    assert [row["detail"].split(": ")[0] for row in after.dropped] == ["rows.jsonl, line 21"]


def test_a_grown_parquet_is_noticed_and_old_rows_keep_their_ids(run, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_RANGE", 4)
    rows = pairs(*({"prompt": f"p{i % 7}", "n": i} for i in range(20)))
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    fields = {"path": "rows.parquet", "kind": "Pair"}
    before = run("sources.parquet", **fields)
    assert len(before.keys) == 4
    assert run("sources.parquet", **fields).keys == before.keys
    write(path, [*rows, {**rows[0], "chosen": ""}, {**rows[0], "n": 21}])
    after = run("sources.parquet", **fields)
    assert [row.id for row in after.kept][:20] == [row.id for row in before.kept]
    assert not set(after.keys) & set(before.keys)
    assert [row["detail"].split(": ")[0] for row in after.dropped] == ["rows.parquet, row 21"]


def test_ranges_cut_where_lines_and_row_groups_end(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "RANGE_BYTES", 100)
    monkeypatch.setattr(parquet, "ROWS_PER_RANGE", 5)
    rows = pairs(*({"prompt": f"p{i}"} for i in range(12)))
    write(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=3)
    kit = Kit("src", 0, tmp_path, tmp_path, {}, {}, {})
    steps = [
        jsonl.Jsonl(kind="Pair", path="rows.jsonl"),
        parquet.Parquet(kind="Pair", path="rows.parquet"),
    ]
    for step in steps:
        found = list(step.ranges(kit))
        read = [row for part in found for row in asyncio.run(step.read(part, kit))]
        assert [row.prompt[0].content for row in read] == [f"p{i}" for i in range(12)]
        assert [part.first_row for part in found] == [1, 7] if step is steps[1] else [1, 3, 5, 7]
        assert len({(part.start, part.stop) for part in found}) == len(found)


def test_reading_is_quick(tmp_path):
    """A floor far below the 20,000 rows/s of one core, so that a slow machine passes."""
    write(tmp_path / "rows.parquet", pairs({}) * 4_000)
    kit = Kit("src", 0, tmp_path, tmp_path, {}, {}, {})
    step = parquet.Parquet(kind="Pair", path="rows.parquet")
    begin = time.perf_counter()
    for part in step.ranges(kit):
        list(asyncio.run(step.read(part, kit)))
    assert time.perf_counter() - begin < 4


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
