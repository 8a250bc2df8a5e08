"""Benchmark items found by n-grams and by embeddings, against brute force."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from steps_kit import (
    EQUAL_TO_ROW_0,
    HASHING,
    applied,
    candidates,
    equal_in_parts,
    opened,
    pair,
    prompt,
)

from datakit.curation import _benchmarks
from datakit.curation._benchmarks import each_text
from datakit.curation._overlap import Index, words_of
from datakit.curation.decontaminate import Decontaminate
from datakit.errors import InputError
from datakit.models.embed import Hashing
from datakit.records import Candidates, Conversation, Edit, Label, Message, Pair, Prompt
from datakit.tables import to_frame

ROOT = Path(__file__).parents[2]
DUCKS = (
    "Janet's ducks lay sixteen eggs per day. She eats three for breakfast every morning and bakes "
    "muffins for her friends every day with four."
)
ITEMS = [
    {"benchmark": "gsm", "item_id": "0", "text": DUCKS},
    {
        "benchmark": "truth",
        "item_id": "7",
        "text": "What happens if you eat watermelon seeds today?",
    },
    {"benchmark": "truth", "item_id": "8", "text": "Who won?"},
]


@pytest.fixture
def items(tmp_path):
    """Writes a benchmark; gives its name."""

    def items(rows=ITEMS, name="bench.jsonl"):
        path = tmp_path / name
        if path.suffix == ".parquet":
            pl.DataFrame(rows).write_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return items


def found(split):
    return {row["id"]: row for row in split.dropped.iter_rows(named=True)}


# -- n-grams -------------------------------------------------------------------------------------


def plain_words(text):
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())


def brute(texts, items, n, shortest):
    """(share of the best item, all best items) of each text that shares an n-gram with any."""
    found = {}
    for place, text in enumerate(texts):
        words = plain_words(text)
        shares = {}
        for item, said in enumerate(items):
            wanted = plain_words(said)
            size = min(n, len(wanted))
            if size < min(shortest, n) or not wanted:
                continue
            grams = {tuple(wanted[i : i + size]) for i in range(len(wanted) - size + 1)}
            held = {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
            if grams & held:
                shares[item] = (len(grams & held) / len(grams), len(grams & held))
        if shares:
            best = max(shares.values())
            found[place] = best[0], min(i for i, one in shares.items() if one == best)
    return found


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "é", "F"]), max_size=12).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6), st.integers(1, 4), st.integers(1, 4)
)
def test_matches_are_those_of_brute_force(texts, items, n, shortest):
    matches = Index(items, n, shortest).match(texts)
    expected = brute(texts, items, n, shortest)
    assert matches["text"].is_sorted()
    assert {row["text"]: (row["share"], row["item"]) for row in matches.iter_rows(named=True)} == {
        place: (pytest.approx(share), item) for place, (share, item) in expected.items()
    }
    for row in matches.iter_rows(named=True):
        span, said = row["span"].split(), plain_words(items[row["item"]])
        words = plain_words(texts[row["text"]])
        assert span in [words[i : i + len(span)] for i in range(len(words))]
        size = min(n, len(said))
        grams = [said[i : i + size] for i in range(len(said))]
        assert all(span[i : i + size] in grams for i in range(len(span) - size + 1))


def test_many_texts_are_matched_as_few_are(monkeypatch):
    draw = random.Random(0)
    words = [f"w{i}" for i in range(12)]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 40))) for _ in range(300)]
    items = [" ".join(draw.choices(words, k=draw.randint(0, 12))) for _ in range(60)]
    whole = Index(items, 3, 2).match(texts)
    monkeypatch.setattr("datakit.curation._overlap._TEXTS", 7)
    monkeypatch.setattr("datakit.curation._overlap._CHARACTERS", 200)
    assert Index(items, 3, 2).match(texts).equals(whole)
    expected = brute(texts, items, 3, 2)
    assert dict(zip(whole["text"], whole["item"], strict=True)) == {
        place: item for place, (_, item) in expected.items()
    }


def test_the_span_is_the_longest_run():
    text = "one two three four five six seven. x x four five six x one two three four five y"
    item = "one two three four five six"
    [row] = Index([item], 3, 3).match([text]).to_dicts()
    assert (row["share"], row["span"]) == (1.0, item)


def test_words_of_any_script():
    said = words_of(["Janet’s ÉCOLE ３.5", "今天天气abc", "", " \x00\u202e!? ", "สวัสดี"])
    split = [said.series.gather(np.flatnonzero(said.texts == i)).to_list() for i in range(5)]
    assert split[:4] == [["janet", "s", "école", "3", "5"], [*"今天天气", "abc"], [], []]
    assert len(split[4]) > 3


def test_no_texts_and_no_items():
    assert Index([], 13, 8).match(["a b c"]).height == 0
    assert Index(["", "a"], 13, 8).match(["", "a"]).height == 0
    assert Index(["a b"], 1, 1).match([]).height == 0


def test_a_few_copies_among_many_rows():
    draw = random.Random(1)
    words = [f"w{i}" for i in range(3_000)]
    items = [" ".join(draw.choices(words, k=40)) for _ in range(5_000)]
    some = [" ".join(draw.choices(words, k=50)) for _ in range(2_000)]
    texts = some * 10 + items[:100]
    matches = Index(items, 13, 8).match(texts)
    assert matches["item"].to_list() == list(range(100))
    assert matches["text"].to_list() == list(range(20_000, 20_100))
    assert matches["share"].to_list() == [1.0] * 100


# -- the step ------------------------------------------------------------------------------------


def test_a_copy_is_dropped_with_item_method_and_words(items, tmp_path):
    rows = [
        prompt(f"Please solve this: {DUCKS.upper()} How many are left?"),
        prompt("WHAT happens if you eat watermelon seeds, today"),
        prompt("Who won?"),
        prompt("How do I prune an apple tree?"),
    ]
    step = Decontaminate(benchmarks=(items(),), method="ngram")
    split = applied(step, Prompt, rows, tmp_path)
    hits = found(split)
    assert set(hits) == {rows[0].id, rows[1].id}
    first = hits[rows[0].id]
    assert (first["reason"], first["related"], first["similarity"]) == ("contaminated", "gsm/0", 1)
    assert first["detail"].startswith("ngram: 100% of the n-grams of gsm/0, as 'janet s ducks lay")
    assert hits[rows[1].id]["related"] == "truth/7"
    assert split.kept["measure.benchmark_overlap"].to_list() == [0, 0]
    assert split.kept["measure.benchmark_similarity"].to_list() == [None, None]


def test_a_small_overlap_is_kept_for_review(items, tmp_path):
    words = DUCKS.split()
    rows = [prompt(" ".join(words[:14]) + " and then something else altogether."), prompt("x y z")]
    step = Decontaminate(benchmarks=(items(),), method="ngram", overlap=0.5)
    kept = applied(step, Prompt, rows, tmp_path).kept
    assert 0 < kept["measure.benchmark_overlap"][0] < 0.5
    assert kept["label.near_miss"].to_list() == ["ngram", None]
    assert kept["label.nearest_benchmark"].to_list() == ["gsm/0", None]
    low = applied(step.model_copy(update={"overlap": 0.05}), Prompt, rows, tmp_path)
    assert low.dropped["similarity"].to_list() == [kept["measure.benchmark_overlap"][0]]


def test_embeddings_against_brute_force(items, tmp_path):
    texts = [DUCKS.replace("Janet", "Joan"), "What happens if you eat seeds?", "Who won", "Bread"]
    rows = [prompt(text) for text in texts]
    embed = Hashing(HASHING["embedder"]).encode
    cosines = embed(texts).astype(np.float64) @ embed([one["text"] for one in ITEMS]).T
    names = [f"{one['benchmark']}/{one['item_id']}" for one in ITEMS]
    cut = float(np.sort(cosines.max(1))[2]) - 1e-4
    step = Decontaminate(
        benchmarks=(items(),), method="embedding", threshold=cut, review_threshold=cut / 2
    )
    split = applied(step, Prompt, rows, tmp_path)
    hits = found(split)
    for row, cosine in zip(rows, cosines, strict=True):
        best = cosine.max()
        assert (row.id in hits) == (best >= cut)
        if row.id in hits:
            assert hits[row.id]["related"] == names[cosine.argmax()]
            assert hits[row.id]["similarity"] == pytest.approx(best, abs=1e-6)
            assert hits[row.id]["detail"].startswith(f"embedding: cosine {best:.3f} to ")
        else:
            kept = split.kept.row(by_predicate=pl.col("id") == row.id, named=True)
            assert kept["measure.benchmark_similarity"] == pytest.approx(best, abs=1e-6)
            assert kept["label.nearest_benchmark"] == names[cosine.argmax()]
            assert (kept["label.near_miss"] == "embedding") == (best >= cut / 2)


def test_both_is_the_union(items, tmp_path):
    rows = [
        prompt("Read on. " * 80 + DUCKS),
        prompt(DUCKS.replace("eggs", "egg").replace("muffins", "muffin").replace("She", "Who")),
        prompt("How do I prune an apple tree?"),
    ]
    hits = {}
    for method in ("ngram", "embedding", "both"):
        step = Decontaminate(benchmarks=(items(),), method=method, threshold=0.9)
        hits[method] = set(found(applied(step, Prompt, rows, tmp_path)))
    assert hits["ngram"] == {rows[0].id}
    assert hits["embedding"] == {rows[1].id}
    assert hits["both"] == hits["ngram"] | hits["embedding"]


@pytest.mark.parametrize("kind", [Pair, Candidates])
@pytest.mark.parametrize("over", ["prompt", "response", "row"])
def test_over_names_what_is_compared(kind, over, items, tmp_path):
    rows = equal_in_parts(kind)
    texts = {
        "prompt": ["How do I prune an apple tree?"],
        "response": ["Cut the dead wood in late winter."],
    }
    wanted = texts.get(over, [texts["prompt"][0]])
    name = items([{"text": text} for text in wanted])
    step = Decontaminate(benchmarks=(name,), method="ngram", ngram=4, shortest=3, over=over)
    dropped = set(found(applied(step, kind, rows, tmp_path)))
    compared = EQUAL_TO_ROW_0["prompt" if over == "row" else over]
    assert dropped == {rows[i].id for i in compared | {0}}


def test_the_answer_of_a_row_counts_by_itself(items, tmp_path):
    row = pair("Tell me a story about numbers, please.", DUCKS, "No, I do not tell any stories.")
    step = Decontaminate(benchmarks=(items(),), method="embedding", threshold=0.99)
    [hit] = applied(step, Pair, [row], tmp_path).dropped.to_dicts()
    assert hit["similarity"] == pytest.approx(1)


def message(text, role="user"):
    return Message(role=role, content=text)


EVERY_KIND = {
    Prompt: Prompt(messages=(message("q"),)),
    Conversation: Conversation(messages=(message("q"), message("a", "assistant"), message(" "))),
    Edit: Edit(context=(message("c"),), draft="d", edited="e"),
    Candidates: candidates("q", "one", "two"),
    Pair: pair("q", "y", "n", context="c"),
    Label: Label(prompt=(message("q"),), completion=(message("a", "assistant"),), desirable=True),
}
TEXTS = {
    Prompt: ["q"],
    Conversation: ["q", "a"],
    Edit: ["c", "d", "e"],
    Candidates: ["q", "one", "two"],
    Pair: ["q", "c", "y", "n"],
    Label: ["q", "a"],
}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_is_taken_text_by_text(kind, items, tmp_path):
    row = EVERY_KIND[kind].identified("x")
    frame = to_frame(kind, [row])
    assert sorted(each_text(frame, "row")["text"]) == sorted(TEXTS[kind])
    split = applied(Decontaminate(benchmarks=(items(),)), kind, [row], tmp_path)
    assert split.kept["id"].to_list() == [row.id]


def test_no_rows_and_rows_that_say_nothing(items, tmp_path):
    step = Decontaminate(benchmarks=(items(),))
    assert applied(step, Prompt, [], tmp_path).kept.height == 0
    row = Edit(draft="", edited=" ").identified("x")
    kept = applied(step, Edit, [row], tmp_path).kept
    assert kept["measure.benchmark_overlap"].to_list() == [0]
    assert kept["measure.benchmark_similarity"].to_list() == [None]
    with pytest.raises(InputError, match="these rows have no response"):
        applied(step.model_copy(update={"over": "response"}), Prompt, [prompt("x")], tmp_path)


def test_order_does_not_matter(items, tmp_path):
    rows = [prompt(text) for text in (DUCKS, "Who won", "a b", "What happens if you eat seeds?")]
    step = Decontaminate(benchmarks=(items(),), threshold=0.6, review_threshold=0.3)
    one = applied(step, Prompt, rows, tmp_path)
    other = applied(step, Prompt, rows[::-1], tmp_path)
    for side in ("kept", "dropped"):
        assert getattr(one, side).sort("id").equals(getattr(other, side).sort("id"))


def test_hostile_texts(items, tmp_path):
    name = items([{"benchmark": "b\x1b[2J", "item_id": "i\n", "text": "x\x00 " * 20 + "\u202e y"}])
    rows = [prompt("x\x00 " * 30), prompt("z" * 300_000), prompt("\U0001f600" * 50), prompt("{id}")]
    split = applied(Decontaminate(benchmarks=(name,), method="ngram"), Prompt, rows, tmp_path)
    [hit] = split.dropped.to_dicts()
    assert "\x1b" not in hit["detail"] + hit["related"]
    assert len(hit["detail"]) <= 600


# -- benchmarks ----------------------------------------------------------------------------------


def hit_of(tmp_path, row, *benchmarks, **fields):
    step = Decontaminate(benchmarks=benchmarks, method="ngram", **fields)
    return [one["related"] for one in applied(step, Prompt, [row], tmp_path).dropped.to_dicts()]


def test_columns_and_names_of_benchmarks(items, tmp_path):
    row = prompt(DUCKS)
    assert hit_of(tmp_path, row, items(name="bench.parquet")) == ["gsm/0"]
    assert hit_of(tmp_path, row, items([{"text": "x"}, {"text": DUCKS}], "my.jsonl")) == ["my/1"]
    name = items([{"q": "x", "a": DUCKS, "n": 5, "b": None}], "own.jsonl")
    columns = {"text": ("q", "a"), "item_id": "n", "benchmark": "b"}
    assert hit_of(tmp_path, row, name, columns=columns) == ["own/5"]
    both = items([{"benchmark": "zzz", "item_id": 1, "text": DUCKS}], "z.jsonl")
    assert hit_of(tmp_path, row, both, items()) == ["gsm/0"]


WRONG = {
    "no file": ({}, "none.jsonl", "no file"),
    "no text": ([{"question": "x"}], "a.jsonl", "no column 'text'; map one"),
    "no column": ([{"text": "x"}], "b.jsonl", "no column 'txt' for 'text'; did you mean 'text'"),
    "type": ([{"text": 4}], "c.jsonl", "holds Int64, not text"),
    "blank": ([{"text": " "}], "d.jsonl", "every text is blank"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_benchmarks_are_named(name, items, tmp_path):
    rows, file, said = WRONG[name]
    if rows:
        items(rows, file)
    columns = {"text": "txt"} if name == "no column" else {}
    with pytest.raises(InputError, match=said):
        hit_of(tmp_path, prompt("x"), file, columns=columns)


def test_a_broken_file_is_named(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(b"\x00\x01 no table")
        with pytest.raises(InputError, match="cannot be read as Parquet or JSON Lines"):
            hit_of(tmp_path, prompt("x"), name)


def test_wrong_fields():
    with pytest.raises(ValidationError, match="is above threshold"):
        Decontaminate(benchmarks=("a",), threshold=0.5, review_threshold=0.6)
    with pytest.raises(ValidationError, match="no role 'txt'; did you mean 'text'"):
        Decontaminate(benchmarks=("a",), columns={"txt": "x"})
    with pytest.raises(ValidationError):
        Decontaminate(benchmarks=())


def test_other_bytes_are_another_fingerprint(items, tmp_path):
    step = Decontaminate(benchmarks=(items(),))
    with opened(step, tmp_path, HASHING) as session:
        kit = session.kit("it")
        first = step.fingerprint(kit)
        items(ITEMS[:1])
        assert step.fingerprint(kit) != first
        items()
        assert step.fingerprint(kit) == first


def test_thresholds_compare_nothing_again():
    reads = Decontaminate.prepared_by
    assert not reads & {"threshold", "review_threshold", "overlap"}
    assert reads | {"threshold", "review_threshold", "overlap"} == set(Decontaminate.model_fields)


def test_items_are_read_once(items, tmp_path, monkeypatch):
    calls = []
    read = _benchmarks._items
    monkeypatch.setattr(_benchmarks, "_items", lambda *given: calls.append(given) or read(*given))
    step = Decontaminate(benchmarks=(items([{"text": "only read once, at any number of parts"}]),))
    for text in ("a", "b", "c"):
        applied(step, Prompt, [prompt(text)], tmp_path)
    assert len(calls) == 1


READ = """
import sys
from pathlib import Path
from datakit.curation._benchmarks import fingerprint, read_items
from datakit.errors import DatakitError
from datakit.kit import Kit

kit = Kit("it", 0, Path(), Path(), {}, {}, {})
for address in sys.argv[1:]:
    try:
        items = read_items([address], {}, kit)
        print("RESULT", items.names, items.texts, len(fingerprint([address], kit)))
    except DatakitError as error:
        print("RESULT", type(error).__name__, error)
"""


def test_benchmarks_on_the_hub(tmp_path):
    place = ROOT / "tests" / "sources" / "hub_server.py"
    spec = importlib.util.spec_from_file_location("hub_server_here", place)
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    pl.DataFrame({"item_id": [4], "text": ["an item"]}).write_parquet(tmp_path / "x.parquet")
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += b"  - split: test\n    path: t-*\n---\n"
    files = {"README.md": card, "t-0.parquet": (tmp_path / "x.parquet").read_bytes()}
    with server.HubServer({"org/bench": files}) as url:
        environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("HF_HUB_OFFLINE", None)
        asked = ["hub:org/bench", f"hub:org/bench@{server.COMMIT}", "hub:org/bench:none"]
        asked += ["hub:org/none", "hub:org"]
        done = subprocess.run(
            [sys.executable, "-c", READ, *asked],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    said = "RESULT ('bench/4',) ('an item',) 32"
    assert lines[:2] == [said, said]
    assert lines[2].startswith("RESULT InputError benchmark 'hub:org/bench:none' cannot be read")
    assert lines[3].startswith("RESULT OutsideError cannot read benchmark 'org/none'")
    assert "is not hub:org/name" in lines[4]


# -- known contamination -------------------------------------------------------------------------

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no public data at {DATA}")
def test_n_grams_find_copies_and_none_of_the_rephrased(tmp_path):
    known = pl.read_parquet(DATA / "contamination_rephrased.parquet")
    known = known.filter(pl.col("benchmark") == "gsm8k_test")
    items = pl.read_parquet(DATA / "benchmark_prompts.parquet")["text"].to_list()
    index = Index(items, 13, 8)
    assert index.match(known["rephrased"].to_list()).height == 0
    copies = index.match(items)
    assert copies.filter(pl.col("share") > 0.999).height == copies.height
    assert copies.height == sum(len(plain) >= 8 for plain in map(plain_words, items))
