"""What the three duplicate steps share: who stays, in which order, and against what."""

import itertools
import json
import random

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from steps_kit import HASHING, applied, candidates, opened, pair, prompt

import datakit as dk
from datakit.curation.exact import Exact
from datakit.curation.minhash import Minhash
from datakit.curation.near import Near
from datakit.errors import InputError
from datakit.records import Candidates, Pair, Prompt
from datakit.tables import to_frame

STEPS = {
    "exact": Exact,
    "minhash": lambda **fields: Minhash(threshold=0.5, **fields),
    "near": lambda **fields: Near(threshold=0.8, **fields),
}
TOPICS = ("How do I prune an old apple tree in winter", "Write a short poem about the sea at night")


@pytest.fixture(params=list(STEPS))
def step(request):
    return STEPS[request.param]


def group(topic, sources=("b", "a", "c"), values=(1.0, 3.0, 2.0)):
    """Three rows that say the same in texts of different lengths, the second the longest."""
    return [
        prompt(
            topic + mark,
            origin=f"{topic}{place}",
            source=source,
            measures={"q.score": value},
        )
        for place, (mark, source, value) in enumerate(
            zip(("?", "???", "!!"), sources, values, strict=True)
        )
    ]


def rows_of_two_groups():
    return group(TOPICS[0]) + group(TOPICS[1])


def dropped_for(split):
    return dict(zip(split.dropped["id"], split.dropped["related"], strict=True))


# -- policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "stays"),
    [
        ({"keep": "first"}, 0),
        ({"keep": "longest"}, 1),
        ({"keep": "highest", "by": "q.score"}, 1),
        ({"keep": "source", "sources": ("c", "a")}, 2),
        ({"keep": "source", "sources": ("a",)}, 1),
    ],
)
def test_each_policy_keeps_its_row_and_the_others_name_it(step, fields, stays, tmp_path):
    rows = rows_of_two_groups()
    split = applied(step(**fields), Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [rows[stays].id, rows[3 + stays].id]
    assert split.kept["measure.cluster_size"].to_list() == [3.0, 3.0]
    assert dropped_for(split) == {
        rows[base + place].id: rows[base + stays].id
        for base in (0, 3)
        for place in range(3)
        if place != stays
    }
    assert all(reason.endswith("duplicate") for reason in split.dropped["reason"])


@pytest.mark.parametrize(
    "fields",
    [
        {"keep": "longest"},
        {"keep": "highest", "by": "q.score"},
        {"keep": "source", "sources": ("a", "b")},
    ],
)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_survivors_do_not_depend_on_the_order_of_the_rows(step, fields, tmp_path, data):
    marks = ("", "?", "!", "??", " please", " now")
    draws = st.tuples(
        st.sampled_from(TOPICS), st.sampled_from(marks), st.sampled_from("abc"), st.integers(0, 2)
    )
    drawn = data.draw(st.lists(draws, min_size=1, max_size=12))
    rows = [
        prompt(topic + mark, origin=str(place), source=source, measures={"q.score": value})
        for place, (topic, mark, source, value) in enumerate(drawn)
    ]
    # Someone has the measure and the source, or the policy is refused.
    rows.append(prompt("Something else", source="a", measures={"q.score": 1.0}))
    linkage = (
        {} if step is Exact else {"linkage": data.draw(st.sampled_from(["components", "star"]))}
    )
    made = step(**fields, **linkage)
    expected = applied(made, Prompt, rows, tmp_path)
    shuffled = applied(made, Prompt, data.draw(st.permutations(rows)), tmp_path)
    assert shuffled.kept.sort("id").equals(expected.kept.sort("id"))
    assert shuffled.dropped.sort("id").equals(expected.dropped.sort("id"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep": "highest"}, "by: <measure>"),
        ({"by": "q.score"}, "by: <measure>"),
        ({"keep": "source"}, "sources"),
        ({"keep": "longest", "sources": ("a",)}, "sources"),
    ],
)
def test_a_policy_and_what_it_goes_by_go_together(step, fields, said):
    with pytest.raises(ValidationError, match=said):
        step(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep": "highest", "by": "q.scor"}, "no row has the measure 'q.scor'"),
        ({"keep": "source", "sources": ("x", "y")}, r"no row is of a source of \['x', 'y'\]"),
    ],
)
def test_a_policy_that_knows_no_row_is_refused(step, fields, said, tmp_path):
    with pytest.raises(InputError, match=said):
        applied(step(**fields), Prompt, rows_of_two_groups(), tmp_path)


CHAIN = [" ".join(f"w{word}" for word in range(start, start + 30)) for start in (0, 8, 16, 24)]
"""Each shares 22 of its 30 words with the next, and 14 with the one after."""


@pytest.mark.parametrize(("linkage", "kept"), [("components", [0]), ("star", [0, 2])])
def test_a_star_bounds_a_chain(linkage, kept, tmp_path):
    rows = [prompt(text) for text in CHAIN]
    step = Minhash(ngram=1, threshold=0.5, linkage=linkage)
    split = applied(step, Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [rows[place].id for place in kept]
    similarity = split.dropped["similarity"].to_list()
    expected = [22 / 38, 14 / 46, 6 / 54] if linkage == "components" else [22 / 38, 22 / 38]
    assert similarity == expected


# -- against -------------------------------------------------------------------------------------


def published(folder, rows, name="old", number="1.0.0", kind="Prompt"):
    """A version of these rows, as it lies on disk."""
    version = folder / "outputs" / "datasets" / name / "versions" / number
    (version / "default").mkdir(parents=True)
    frame = to_frame({"Prompt": Prompt, "Pair": Pair}[kind], rows).drop("measures", "labels")
    path = version / "default" / "train-00000-of-00001.parquet"
    frame.write_parquet(path)
    manifest = {
        "name": name,
        "version": number,
        "digest": f"digest-of-{name}-{number}-{len(rows)}",
        "parent": None,
        "change": "",
        "created": "",
        "datakit": "",
        "description": "",
        "licenses": {},
        "recipe": {},
        "recipe_digest": "",
        "limit": None,
        "models": {},
        "funnel": [],
        "configs": {"default": kind},
        "splits": {"train": len(rows)},
        "gate": {},
        "files": [
            {
                "path": "default/train-00000-of-00001.parquet",
                "config": "default",
                "split": "train",
                "rows": len(rows),
                "bytes": path.stat().st_size,
                "sha256": "",
            }
        ],
        "environment": {},
    }
    (version / "manifest.json").write_text(json.dumps(manifest))
    return version


def test_a_row_that_duplicates_a_published_one_is_dropped_for_it(step, tmp_path):
    old = prompt(TOPICS[0] + "!?!", origin="old")
    published(tmp_path, [old, prompt("Something else", origin="else")])
    rows = rows_of_two_groups()
    split = applied(step(against="old"), Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [rows[3].id]
    lost = split.dropped.filter(pl.col("related") == old.id)
    assert set(lost["id"]) == {row.id for row in rows[:3]}
    assert all(detail.endswith("a row of old@1.0.0") for detail in lost["detail"])
    inside = split.dropped.filter(pl.col("related") == rows[3].id)
    assert all(detail.endswith("a row that stays") for detail in inside["detail"])
    assert split.dropped["similarity"].to_list() == pytest.approx([1.0] * 5, abs=1e-6)


@pytest.mark.parametrize("keep", ["first", "longest"])
def test_published_rows_stay_whatever_comes_before_them(step, keep, tmp_path):
    rows = rows_of_two_groups()
    # Of the first group the last row stands there, of the second the first two do.
    stands = [rows[2], rows[3], rows[4]]
    published(tmp_path, stands)
    split = applied(step(against="old@1.0.0", keep=keep), Prompt, rows, tmp_path)
    assert set(split.kept["id"]) == {row.id for row in stands}
    found = dropped_for(split)
    assert found[rows[0].id] == found[rows[1].id] == rows[2].id
    assert found[rows[5].id] in {rows[3].id, rows[4].id}
    assert all(detail.endswith("a row that stays") for detail in split.dropped["detail"])


def test_a_refresh_keeps_every_row_that_it_kept_before(step, tmp_path):
    rng = random.Random(2)
    texts = [topic + mark for topic in TOPICS for mark in ("", "?", " please?", " now", "!!!")]
    rows = [prompt(text, origin=str(place)) for place, text in enumerate(texts)]
    first = rows[1::2]
    kept = set(applied(step(keep="longest"), Prompt, first, tmp_path).kept["id"])
    published(tmp_path, [row for row in first if row.id in kept])
    rng.shuffle(rows)
    again = applied(step(keep="longest", against="old"), Prompt, rows, tmp_path)
    assert kept <= set(again.kept["id"])


def test_rows_that_became_other_rows_of_the_version_stay_too(step, tmp_path):
    """A version of pairs, and the prompts that they were made of: by parents and by roots."""
    rows = rows_of_two_groups()
    parent = rows[0].model_copy(update={"roots": (rows[0].id,)})
    made = pair(TOPICS[0] + "?", "Yes.", "No.").derived([parent], "pair", 0)
    published(tmp_path, [made], kind="Pair")
    rows[0] = parent
    split = applied(step(against="old"), Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [rows[0].id, rows[3].id]
    assert dropped_for(split)[rows[1].id] == rows[0].id

    between = candidates(TOPICS[0] + "?", "Yes.", "No.").derived([parent], "respond", 0)
    other = candidates(TOPICS[0] + "!", "Of course.")
    split = applied(step(against="old"), Candidates, [other, between], tmp_path)
    assert split.kept["id"].to_list() == [between.id]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("form", ["text", "prompt", "turns"])
def test_a_file_is_a_reference_too(step, form, suffix, tmp_path):
    text = TOPICS[1] + "?!"
    value = [{"role": "user", "content": text}] if form == "turns" else text
    column = "messages" if form == "turns" else form
    table = pl.DataFrame({"other": [1, 2], column: [None, value]})
    path = tmp_path / f"held_out.{suffix}"
    table.write_parquet(path) if suffix == "parquet" else table.write_ndjson(path)
    rows = rows_of_two_groups()
    split = applied(step(against=path.name), Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [rows[0].id]
    found = dropped_for(split)
    assert {found[row.id] for row in rows[3:]} == {f"held_out.{suffix}#2"}


def test_a_file_with_ids_names_them_and_keeps_ours(step, tmp_path):
    rows = rows_of_two_groups()
    ids = [rows[1].id, "outside"]
    table = pl.DataFrame({"id": ids, "prompt": ["a changed text", TOPICS[1]]})
    table.write_parquet(tmp_path / "ref.parquet")
    split = applied(step(against="ref.parquet"), Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [rows[1].id]
    assert {dropped_for(split)[row.id] for row in rows[3:]} == {"outside"}


def test_what_stands_there_enters_the_fingerprint(step, tmp_path):
    def fingerprint(against):
        made = step(against=against)
        with opened(made, tmp_path, HASHING) as session:
            return made.fingerprint(session.kit("it"))

    published(tmp_path, [prompt("one")])
    published(tmp_path, [prompt("two")], name="other")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    found = [fingerprint(one) for one in ("old", "other", "a.jsonl")]
    path.write_text('{"text": "three"}\n')
    found.append(fingerprint("a.jsonl"))
    published(tmp_path, [prompt("one"), prompt("two")], number="1.1.0")
    found.append(fingerprint("old"))
    assert len(set(found)) == len(found)
    assert fingerprint("old@1.1.0") == fingerprint("old") == found[-1]
    assert fingerprint(None) == ""


@pytest.mark.parametrize(
    ("against", "said"),
    [
        ("nowhere", "no version of dataset 'nowhere'.*leave `against` out until a version exists"),
        ("old@3.0.0", "no version 3.0.0 of 'old'"),
        ("No Name", "is neither name"),
        ("nowhere/1.0.0", "no file"),
        ("nothing.parquet", "no file"),
        ("broken.parquet", "against: broken.parquet.*cannot be read"),
        ("broken.jsonl", "against: broken.jsonl.*cannot be read"),
        ("strange.jsonl", "needs one of messages, prompt.*or `text`; it has x, y"),
        ("number.jsonl", "column 'prompt' is neither a text nor a list of turns"),
    ],
)
def test_a_reference_that_is_none_is_refused(step, against, said, tmp_path):
    published(tmp_path, [prompt("one")])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not")
    (tmp_path / "broken.jsonl").write_text('{"text": "a\n')
    (tmp_path / "strange.jsonl").write_text('{"x": "a", "y": 1}\n')
    (tmp_path / "number.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(InputError, match=said):
        applied(step(against=against), Prompt, [prompt("one")], tmp_path)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_against_something_and_rows_against_nothing(step, rows, tmp_path):
    published(tmp_path, [prompt("one")] * (1 - rows))
    split = applied(step(against="old"), Prompt, [prompt("two")][:rows], tmp_path)
    assert (split.kept.height, split.dropped.height) == (rows, 0)


# -- through the engine --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "minhash", "near"])
def test_a_run_against_its_own_version_adds_only_what_is_new(name, tmp_path):
    def run(texts, **fields):
        lines = [{"key": str(place), "prompt": text} for place, text in enumerate(texts)]
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        recipe = {
            "name": "own",
            "models": {"embedder": {"kind": "hashing"}},
            "steps": [
                {
                    "step": "sources.jsonl",
                    "kind": "Prompt",
                    "path": str(tmp_path / "in.jsonl"),
                    "columns": {"key": "key", "prompt": "prompt"},
                },
                {"step": f"curation.{name}", "keep": "longest", **fields},
            ],
        }
        version = dk.run(recipe, outputs=tmp_path / "outputs", state=tmp_path / "state")
        return dict(version.records().select("id", "messages").iter_rows())

    before = run([TOPICS[0], TOPICS[0] + "?", TOPICS[1]])
    assert len(before) == 2
    # Longer copies of both come in, and something new.
    texts = [TOPICS[0], TOPICS[0] + "?", TOPICS[1], TOPICS[0] + "!!!", TOPICS[1] + "?!", "New one"]
    after = run(texts, against="own")
    assert before.keys() < after.keys()
    assert len(after) == 3


def test_a_new_threshold_prepares_nothing_again(tmp_path, monkeypatch):
    counts = itertools.count()
    for made in (Minhash, Near):
        plain = made.prepare

        def prepare(self, frame, kit, plain=plain):
            next(counts)
            return plain(self, frame, kit)

        monkeypatch.setattr(made, "prepare", prepare)

    def run(minhash, near):
        overrides = [f"steps.minhash.threshold={minhash}", f"steps.near.threshold={near}"]
        dk.run(
            "smoke/deduplicated",
            outputs=tmp_path / "outputs",
            state=tmp_path / "state",
            overrides=overrides,
        )
        return next(counts)

    first = run(0.5, 0.9)
    assert run(0.45, 0.9) == first + 1, "the same rows pass, and only the decision is made again"
    assert run(0.45, 0.95) == first + 2
