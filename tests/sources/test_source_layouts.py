"""Every layout found in the wild, through both file sources, against a hand-written record."""

import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datakit.errors import InputError, RecipeError

U, A, S = "user", "assistant", "system"


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns):
    return [{"from": name, "value": text} for name, text in turns]


HELLO = said((U, "Hello?"))
PAIR = {"prompt": HELLO, "chosen": said((A, "Hi.")), "rejected": said((A, "Go."))}
CHAT = said((U, "Hello?"), (A, "Hi."), (U, "More?"))
LONG = {"prompt": CHAT, "chosen": said((A, "Yes.")), "rejected": said((A, "No."))}

# name: (kind, fields of the step, row, what the record must hold)
LAYOUTS = {
    "explicit conversational": ("Pair", {}, dict(PAIR), PAIR),
    "explicit strings": (
        "Pair",
        {},
        {"prompt": "Hello?", "chosen": "Hi.", "rejected": "Go."},
        PAIR,
    ),
    "texts are not stripped": (
        "Pair",
        {},
        {"prompt": " Hello? ", "chosen": "\nHi.\n", "rejected": "Go. "},
        {
            "prompt": said((U, " Hello? ")),
            "chosen": said((A, "\nHi.\n")),
            "rejected": said((A, "Go. ")),
        },
    ),
    "implicit conversational": (
        "Pair",
        {},
        {"chosen": CHAT + LONG["chosen"], "rejected": CHAT + LONG["rejected"]},
        LONG,
    ),
    "implicit, answers of two turns that begin alike": (
        "Pair",
        {},
        {
            "chosen": said((U, "Hello?"), (A, "Well,"), (A, "hi.")),
            "rejected": said((U, "Hello?"), (A, "Well,"), (A, "no.")),
        },
        {
            "prompt": HELLO,
            "chosen": said((A, "Well,"), (A, "hi.")),
            "rejected": said((A, "Well,"), (A, "no.")),
        },
    ),
    "string prompt, whole conversations (UltraFeedback binarized)": (
        "Pair",
        {"columns": {"measures": ["score_chosen", "score_rejected"]}},
        {
            "prompt": "Hello?",
            "messages": said((U, "Hello?"), (A, "Hi.")),
            "chosen": said((S, "Be kind."), (U, "Hello?"), (A, "Hi.")),
            "rejected": said((S, "Be kind."), (U, "Hello?"), (A, "Go.")),
            "score_chosen": 8.0,
            "score_rejected": 4,
        },
        {
            "prompt": said((S, "Be kind."), (U, "Hello?")),
            "chosen": said((A, "Hi.")),
            "rejected": said((A, "Go.")),
            "measures": {"src.score.chosen": 8.0, "src.score.rejected": 4.0},
            "extra": json.dumps(
                {"messages": [{"content": "Hello?", "role": U}, {"content": "Hi.", "role": A}]},
                separators=(",", ":"),
            ),
        },
    ),
    "prompt names the last turn of a longer chat": (
        "Pair",
        {},
        {
            "prompt": "More?",
            "chosen": CHAT + LONG["chosen"],
            "rejected": CHAT + LONG["rejected"],
        },
        LONG,
    ),
    "HH, whole transcripts": (
        "Pair",
        {},
        {
            "chosen": "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: More?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: More?\n\nAssistant: No.",
        },
        LONG,
    ),
    "HH, transcript prompt and last answers": (
        "Pair",
        {},
        {
            "prompt": "Human: Hello?\n\nAssistant: Hi.\n\nHuman: More?",
            "chosen": "Yes.",
            "rejected": "No.",
        },
        LONG,
    ),
    "HH, prompt ends in the cue": (
        "Pair",
        {},
        {
            "prompt": "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: More?\n\nAssistant:",
            "chosen": " Yes.",
            "rejected": " No.",
        },
        {"prompt": CHAT, "chosen": said((A, " Yes.")), "rejected": said((A, " No."))},
    ),
    "HH, prompt and whole transcripts": (
        "Pair",
        {},
        {
            "prompt": "\n\nHuman: Hello?\n\nAssistant:",
            "chosen": "\n\nHuman: Hello?\n\nAssistant: Hi.",
            "rejected": "\n\nHuman: Hello?\n\nAssistant: Go.",
        },
        PAIR,
    ),
    "an answer that echoes the prompt is an answer": (
        "Pair",
        {},
        {"prompt": "Human: Hello?", "chosen": "Hi.", "rejected": "Human: Hello?"},
        {**PAIR, "rejected": said((A, "Human: Hello?"))},
    ),
    "messages and one message a side (LLaMA-Factory)": (
        "Pair",
        {},
        {
            "conversations": sharegpt(("system", "Be kind."), ("human", "Hello?")),
            "chosen": {"from": "gpt", "value": "Hi."},
            "rejected": {"from": "gpt", "value": "Go."},
        },
        {**PAIR, "prompt": said((S, "Be kind."), (U, "Hello?"))},
    ),
    "Alpaca pair with a system column": (
        "Pair",
        {},
        {
            "system": "Be kind.",
            "instruction": "Add.",
            "input": "1 1",
            "chosen": "2",
            "rejected": "3",
        },
        {
            "prompt": said((S, "Be kind."), (U, "Add.\n\n1 1")),
            "chosen": said((A, "2")),
            "rejected": said((A, "3")),
        },
    ),
    "pair with everything mapped": (
        "Pair",
        {
            "license": "MIT",
            "source": "set",
            "columns": {
                "prompt": "q",
                "chosen": "good",
                "rejected": "bad",
                "chosen_model": "m1",
                "rejected_model": "m2",
                "rationale": "why",
                "context": "ctx",
                "key": "n",
                "license": "lic",
                "split": "part",
                "labels": ["topic"],
                "references": "gold",
            },
        },
        {
            "q": "Hello?",
            "good": "Hi.",
            "bad": "Go.",
            "m1": "a",
            "m2": "b",
            "why": "rude",
            "ctx": "door",
            "n": 7,
            "lic": "CC0-1.0",
            "part": "test",
            "topic": "manners",
            "gold": "Hey.",
        },
        {
            **PAIR,
            "origin": "key:7#1",
            "license": "CC0-1.0",
            "source": "set",
            "split": "test",
            "labels": {"topic": "manners"},
            "references": ["Hey."],
            "rationale": "rude",
            "context": "door",
            "extra": "",
        },
    ),
    "prompt as a string": ("Prompt", {}, {"prompt": "Hello?"}, {"messages": HELLO}),
    "prompt as messages": ("Prompt", {}, {"messages": CHAT}, {"messages": CHAT}),
    "prompt in ShareGPT form": (
        "Prompt",
        {},
        {"conversations": sharegpt(("human", "Hello?"), ("gpt", "Hi."), ("human", "More?"))},
        {"messages": CHAT},
    ),
    "Alpaca": (
        "Prompt",
        {"columns": {"references": "output"}},
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"messages": said((U, "Add.\n\n1 1")), "references": ["2"], "extra": ""},
    ),
    "Alpaca without an input": (
        "Prompt",
        {},
        {"instruction": "Add.", "input": "", "output": "2"},
        {"messages": said((U, "Add.")), "extra": '{"output":"2"}'},
    ),
    "content parts": (
        "Prompt",
        {},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}],
                }
            ]
        },
        {"messages": HELLO},
    ),
    "conversation": (
        "Conversation",
        {},
        {
            "messages": [{"role": "user", "content": "Hello?", "id": 1}],
            "user": 12,
            "time": "2026-01-02T03:04:05+01:00",
        },
        {"messages": HELLO, "user": "12", "time": datetime(2026, 1, 2, 2, 4, 5, tzinfo=UTC)},
    ),
    "edit": (
        "Edit",
        {"columns": {"draft": "before", "edited": "after"}},
        {"before": "a b", "after": "a c", "context": "Write.", "user": "u1"},
        {"draft": "a b", "edited": "a c", "context": said((U, "Write.")), "user": "u1"},
    ),
    "KTO": (
        "Label",
        {"columns": {"score": "stars"}},
        {"prompt": HELLO, "completion": said((A, "Hi.")), "label": True, "stars": 4},
        {"prompt": HELLO, "completion": said((A, "Hi.")), "desirable": True, "score": 4.0},
    ),
    "KTO, strings and 0": (
        "Label",
        {},
        {"prompt": "Hello?", "completion": "Go.", "label": 0},
        {"prompt": HELLO, "completion": said((A, "Go.")), "desirable": False},
    ),
    "nested responses (UltraFeedback)": (
        "Candidates",
        {},
        {
            "instruction": "Hello?",
            "models": ["a", "b"],
            "completions": [
                {
                    "model": "a",
                    "response": "Hi.",
                    "overall_score": 8.5,
                    "annotations": {
                        "helpfulness": {"Rating": "4", "Rationale": "good", "Type": "1"},
                        "honesty": {"Rating": "N/A", "Rationale": "none", "Type": "2"},
                    },
                },
                {
                    "model": "b",
                    "response": "Go.",
                    "overall_score": 2.0,
                    "annotations": {
                        "helpfulness": {"Rating": "1", "Rationale": "bad", "Type": "1"},
                        "honesty": {"Rating": "5", "Rationale": "true", "Type": "2"},
                    },
                },
            ],
        },
        {
            "prompt": HELLO,
            "responses": [
                {"model": "a", "text": "Hi.", "measures": {"helpfulness": 4, "overall_score": 8.5}},
                {
                    "model": "b",
                    "text": "Go.",
                    "measures": {"helpfulness": 1, "honesty": 5, "overall_score": 2},
                },
            ],
            "extra": (
                '{"completions":[{"annotations":{"helpfulness":{"Rationale":"good","Type":"1"},'
                '"honesty":{"Rating":"N/A","Rationale":"none","Type":"2"}}},'
                '{"annotations":{"helpfulness":{"Rationale":"bad","Type":"1"},'
                '"honesty":{"Rationale":"true","Type":"2"}}}],"models":["a","b"]}'
            ),
        },
    ),
    "one response a row": (
        "Candidates",
        {},
        {"prompt": "Hello?", "response": "Hi.", "model": "a"},
        {"prompt": HELLO, "responses": [{"text": "Hi.", "model": "a"}]},
    ),
}


def matches(found, wanted):
    """`wanted` may leave out fields, at any depth."""
    if isinstance(wanted, dict):
        return all(name in found and matches(found[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(matches, found, wanted))
    return found == wanted


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, form, run, tmp_path):
    kind, fields, row, wanted = LAYOUTS[name]
    write(tmp_path / f"rows.{form}", [row])
    [record] = run(f"sources.{form}", path=f"rows.{form}", kind=kind, **fields).kept
    found = listed(record.model_dump())
    assert matches(found, wanted), found
    assert type(record).__name__ == kind
    assert record.roots == (record.id,)
    if "source" not in wanted:
        assert record.source == "rows"


def listed(value):
    """Tuples as lists."""
    if isinstance(value, dict):
        return {name: listed(one) for name, one in value.items()}
    return [listed(one) for one in value] if isinstance(value, tuple | list) else value


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


GROUP = [
    {"pid": 1, "prompt": "Hello?", "response": "Hi.", "model": "a", "t": 0.5, "s": 3, "lic": "MIT"},
    {"pid": 2, "prompt": "Why?", "response": "So.", "model": "a", "t": None, "s": 1, "lic": "MIT"},
    {"pid": 1, "prompt": "Hello?", "response": "", "model": "b", "t": 0.5, "s": 2, "lic": "MIT"},
    {"pid": 1, "prompt": "Hello?", "response": "Go.", "model": "c", "t": 1.0, "s": 1, "lic": "X"},
    {"pid": 1, "prompt": "Other?", "response": "Ok.", "model": "d", "t": 1.0, "s": 1, "lic": "X"},
    {"pid": 3, "prompt": "Empty?", "response": None, "model": "d", "t": 1.0, "s": 1, "lic": "X"},
]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_with_equal_values_are_one_candidates(form, run, tmp_path):
    write(tmp_path / f"rows.{form}", GROUP)
    columns = {"sampling": ["t"], "score": ["s"], "license": "lic"}
    out = run(
        f"sources.{form}", path=f"rows.{form}", kind="Candidates", group_by="pid", columns=columns
    )
    first, second = out.kept
    assert [(one.text, one.model, one.sampling) for one in first.responses] == [
        ("Hi.", "a", '{"t":0.5}'),
        ("Go.", "c", '{"t":1.0}'),
    ]
    assert [one.measures for one in first.responses] == [{"s": 3.0}, {"s": 1.0}]
    assert first.license == "MIT AND X"
    assert json.loads(first.extra) == {"pid": 1, "responses": [{}, {"lic": "X"}]}
    assert [one.sampling for one in second.responses] == [""]
    reasons = [(row["reason"], row["detail"].split(": ")[0]) for row in out.dropped]
    unit = "row" if form == "parquet" else "line"
    assert reasons == [
        ("empty_text", f"rows.{form}, {unit} 3"),
        ("prefix_mismatch", f"rows.{form}, {unit} 5"),
        ("null_value", f"rows.{form}, {unit} 6"),
    ]


WRONG_FIELDS = {
    "unknown role": ({"kind": "Pair", "columns": {"choosen": "a"}}, "did you mean 'chosen'"),
    "list for one": ({"kind": "Pair", "columns": {"chosen": ["a", "b"]}}, "takes one column"),
    "two prompts": (
        {"kind": "Prompt", "columns": {"prompt": "a", "messages": "b"}},
        "'prompt' and 'messages' exclude each other",
    ),
    "group_by of pairs": ({"kind": "Pair", "group_by": "id"}, "group_by makes Candidates"),
    "nested and grouped": (
        {"kind": "Candidates", "group_by": "id", "columns": {"responses": "r"}},
        "group_by takes one response",
    ),
    "no kind": ({}, "kind: this field is required"),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_wrong_field_is_a_recipe_error(name, run):
    fields, said = WRONG_FIELDS[name]
    with pytest.raises(RecipeError, match=r"steps\[0\]") as error:
        run("sources.jsonl", path="x.jsonl", **fields)
    assert said in str(error.value)


WRONG_FILES = {
    "missing": (
        "Pair",
        {},
        {"prompt": "a", "choosen": "b", "rejected": "c"},
        ["'chosen'", "did you mean 'choosen'", "columns: prompt, choosen, rejected", "map it"],
    ),
    "no prompt": ("Prompt", {}, {"text": "a"}, ["'prompt'", "; columns: text", "map it"]),
    "mapped to nothing": (
        "Prompt",
        {"columns": {"prompt": "txt"}},
        {"text": "a"},
        ["no column 'txt'", "did you mean 'text'"],
    ),
    "ambiguous": (
        "Prompt",
        {},
        {"prompt": "a", "instruction": "b"},
        ["'prompt' and 'instruction'", "say which"],
    ),
    "ambiguous side": (
        "Pair",
        {},
        {"prompt": "a", "chosen": "b", "chosen_response": "c", "rejected": "d"},
        ["'chosen' and 'chosen_response'"],
    ),
    "numbers as answers": (
        "Pair",
        {},
        {"prompt": "a", "chosen": 1, "rejected": 2},
        ["'chosen' holds number", "list/struct/text"],
    ),
    "text as label": (
        "Label",
        {},
        {"prompt": "a", "completion": "b", "label": "yes"},
        ["'label' holds text"],
    ),
    "no column to group by": (
        "Candidates",
        {"group_by": "pid"},
        {"prompt": "a", "response": "b"},
        ["no column 'pid' to group by"],
    ),
}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_cannot_fit_is_refused_before_its_rows_are_read(name, form, run, tmp_path):
    kind, fields, row, said = WRONG_FILES[name]
    write(tmp_path / f"rows.{form}", [row])
    with pytest.raises(InputError) as error:
        run(f"sources.{form}", path=f"rows.{form}", kind=kind, **fields)
    for part in [f"rows.{form}", *said]:
        assert part in str(error.value)


def test_an_optional_column_of_another_type_is_left_in_extra(run, tmp_path):
    row = {"prompt": "Hello?", "chosen": "Hi.", "rejected": "Go.", "context": 3}
    write(tmp_path / "rows.parquet", [row])
    [record] = run("sources.parquet", path="rows.parquet", kind="Pair").kept
    assert record.extra == '{"context":3}'


def test_extra_is_json_whatever_it_holds(run, tmp_path):
    when = datetime(2026, 1, 2, tzinfo=UTC)
    row = {"prompt": "Hello?", "when": when, "raw": b"\xff\x00", "x": float("nan"), "n": [{"a": 1}]}
    write(tmp_path / "rows.parquet", [row])
    [record] = run("sources.parquet", path="rows.parquet", kind="Prompt").kept
    wanted = {"when": "2026-01-02T00:00:00+00:00", "raw": "/wA=", "x": None, "n": [{"a": 1}]}
    assert json.loads(record.extra) == wanted
