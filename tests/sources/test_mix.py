"""Several inputs as one: shares, conflicts, licences, measures, and what becomes of every row."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import polars as pl
import pytest
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from steps_kit import assistant, candidates, pair, user

from datakit.errors import InputError, RecipeError
from datakit.kit import Kit
from datakit.records import Candidates, Label, Pair
from datakit.sources._mix_choices import SURVEY, taken_of, without_conflicts
from datakit.sources._mix_inputs import MixInput, open_input
from datakit.sources.mix import Mix
from datakit.tables import to_frame
from datakit.versions import Manifest, PublishedFile, flatten, measure_names

MANIFEST = {
    "parent": None,
    "change": "minor",
    "created": "2026-01-01T00:00:00Z",
    "datakit": "0.1.0",
    "description": "",
    "licenses": {},
    "recipe": {},
    "recipe_digest": "",
    "limit": None,
    "models": {},
    "funnel": [],
    "splits": {},
    "gate": {},
    "environment": {},
}


@pytest.fixture
def publish(tmp_path):
    """Writes a version of one file; gives its folder."""

    def publish(name, rows, version="1.0.0", kind=Pair, **fields):
        folder = tmp_path / "outputs" / "datasets" / name / "versions" / version
        path = folder / "default" / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame = to_frame(kind, rows)
        flatten(kind, frame, measure_names(frame), ["topic"]).write_parquet(path)
        file = PublishedFile(
            path=path.relative_to(folder).as_posix(),
            config="default",
            split="train",
            rows=len(rows),
            bytes=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        about = MANIFEST | {"name": name, "version": version, "files": [file]} | fields
        about |= {"digest": file.sha256, "configs": {"default": kind.__name__}}
        (folder / "manifest.json").write_text(Manifest.model_validate(about).model_dump_json())
        return folder

    return publish


@pytest.fixture
def write(tmp_path):
    """Writes pairs q0.. as JSON Lines (or Parquet): (question, chosen, rejected) and more."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pl.DataFrame(rows).write_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return write


def plain(mark, count, start=0, **more):
    return [
        {"prompt": f"{mark}{i}?", "chosen": f"good {i}", "rejected": f"bad {i}", **more}
        for i in range(start, start + count)
    ]


def asked(rows):
    return [row.prompt[0].content for row in rows]


def reasons(out):
    return Counter(row["reason"] for row in out.dropped)


def test_all_rows_without_shares_and_every_input_reads_by_its_own_step(run, write, publish):
    publish("made", [pair(f"v{i}", "y", "n", measures={"judge.margin": i / 2}) for i in range(3)])
    write("one.jsonl", plain("a", 4))
    write("folder/two.parquet", plain("b", 5))
    inputs = [{"from": "made@1.0.0"}, {"from": "one.jsonl"}, {"from": "folder/", "cap": 2}]
    out = run("sources.mix", kind="Pair", inputs=inputs)
    assert asked(out.kept)[:7] == ["v0", "v1", "v2", "a0?", "a1?", "a2?", "a3?"]
    assert len(out.kept) == 9
    assert reasons(out) == {"not_taken": 3}
    assert len({row.id for row in out.kept}) == 9


@pytest.mark.parametrize("kept", ["pairs.jsonl", "pairs.parquet", "data/*.jsonl", "./data"])
def test_addresses_of_files(kept, run, write):
    write("pairs.jsonl", plain("a", 2))
    write("pairs.parquet", plain("a", 2))
    write("data/pairs.jsonl", plain("a", 2))
    out = run("sources.mix", kind="Pair", inputs=[{"from": kept}])
    assert sorted(asked(out.kept)) == ["a0?", "a1?"]


WHERE = {
    "no/such.jsonl": "no file",
    "./both": "both Parquet and JSON Lines",
    "./empty": "holds no data",
    "hub:org": "is not hub:org/name",
    "missing@1.0.0": "no version of dataset 'missing'",
}


@pytest.mark.parametrize("address", WHERE)
def test_an_address_that_names_nothing(address, run, write, tmp_path):
    write("both/a.jsonl", plain("a", 1))
    write("both/a.parquet", plain("a", 1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=WHERE[address]):
        run("sources.mix", kind="Pair", inputs=[{"from": address}])


def test_addresses_on_the_hub(tmp_path):
    kit = Kit("mix", 0, tmp_path, tmp_path, {}, {}, {})
    full = open_input(MixInput(address="hub:org/set/config:test@v1"), "Pair", kit)
    assert (full.dataset, full.config, full.split, full.revision) == (
        "org/set",
        "config",
        "test",
        "v1",
    )
    short = open_input(MixInput(address="hub:org/set", license="mit"), "Pair", kit)
    assert (short.config, short.split, short.revision, short.license) == (
        None,
        "train",
        "main",
        "mit",
    )


READ = """
import asyncio, sys
from pathlib import Path
from datakit.kit import Kit
from datakit.sources.mix import Mix

kit = Kit("mix", 0, Path(), Path(), {}, {}, {})
inputs = [{"from": "hub:org/set", "share": 0.5}, {"from": sys.argv[1], "share": 0.5}]
mix = Mix.model_validate({"kind": "Pair", "inputs": inputs})

async def rows():
    return [type(row).__name__ for part in mix.ranges(kit) for row in await mix.read(part, kit)]

print("RESULT", *asyncio.run(rows()))
"""


def test_the_hub_and_a_file_together(write, tmp_path):
    write("a.jsonl", plain("a", 5))
    pl.DataFrame(plain("h", 3)).write_parquet(tmp_path / "x.parquet")
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += b"  - split: train\n    path: t-*\n---\n"
    files = {"README.md": card, "t-0.parquet": (tmp_path / "x.parquet").read_bytes()}
    with HubServer({"org/set": files}) as url:
        environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", READ, str(tmp_path / "a.jsonl")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert Counter(line.split()[1:]) == {"Pair": 6, "Reject": 2}


def test_names_of_inputs():
    names = {
        "made@1.2.0": "made",
        "hub:org/My-Set/config:train@v1": "my_set",
        "data/Some File.v2.jsonl": "some_file",
        "../x/*.parquet": "x",
        "2024.jsonl": "input_2024",
    }
    assert {one: MixInput(address=one).called for one in names} == names
    assert MixInput.model_validate({"from": "a", "name": "b"}).called == "b"


# -- shares --------------------------------------------------------------------------------------


def test_shares_are_of_the_largest_total(run, write):
    write("a.jsonl", plain("a", 100))
    write("b.jsonl", plain("b", 30))
    inputs = [{"from": "a.jsonl", "share": 0.75}, {"from": "b.jsonl", "share": 0.25}]
    out = run("sources.mix", kind="Pair", inputs=inputs)
    assert Counter(text[0] for text in asked(out.kept)) == {"a": 90, "b": 30}
    assert reasons(out) == {"not_taken": 10}
    spare = out.dropped[0]
    assert spare["detail"] == "90 of 100 rows of this input are taken"
    assert spare["raw"].startswith("a/")
    capped = [inputs[0], inputs[1] | {"cap": 10}]
    out = run("sources.mix", kind="Pair", inputs=capped)
    assert Counter(text[0] for text in asked(out.kept)) == {"a": 30, "b": 10}
    out = run("sources.mix", kind="Pair", inputs=inputs, rows=41)
    assert Counter(text[0] for text in asked(out.kept)) == {"a": 31, "b": 10}


def test_strict_states_both_numbers(run, write):
    write("a.jsonl", plain("a", 100))
    write("b.jsonl", plain("b", 30))
    inputs = [{"from": "a.jsonl", "share": 0.5}, {"from": "b.jsonl", "share": 0.5}]
    loose = run("sources.mix", kind="Pair", inputs=inputs, rows=100)
    assert len(loose.kept) == 60
    with pytest.raises(InputError, match=r"'b' .* has 30 rows, .* 0\.5 of 100 rows needs 50"):
        run("sources.mix", kind="Pair", inputs=inputs, rows=100, strict=True)
    write("b.jsonl", [])
    with pytest.raises(InputError, match=r"'b' .* has no row for its share"):
        run("sources.mix", kind="Pair", inputs=inputs)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 9), st.integers(1, 400)), min_size=1),
    st.none() | st.integers(1, 500),
)
def test_taken_rows_against_brute_force(given_inputs, rows):
    whole = sum(part for _, part, _ in given_inputs)
    shares = [Fraction(str(part / whole)) for _, part, _ in given_inputs]
    shares = [share / sum(shares) for share in shares]
    inputs = [
        MixInput(address=f"x{i}", share=part / whole, cap=cap)
        for i, (_, part, cap) in enumerate(given_inputs)
    ]
    most = [min(have, cap) for have, _, cap in given_inputs]
    counts = taken_of(inputs, [have for have, _, _ in given_inputs], rows)
    total = 0
    while (rows is None or total < rows) and all(
        share * (total + 1) <= limit for share, limit in zip(shares, most, strict=True)
    ):
        total += 1
    assert sum(counts) == total
    for count, share, limit in zip(counts, shares, most, strict=True):
        assert count <= limit
        assert abs(count - share * total) < 1


def test_the_draw_depends_on_rows_and_seed_not_on_order_or_other_inputs(run, write):
    rows = plain("a", 60)
    write("a/one.jsonl", rows[:40])
    write("a/two.jsonl", rows[40:])
    write("b.jsonl", plain("b", 20))
    inputs = [
        {"from": "./a", "share": 0.5, "name": "a"},
        {"from": "b.jsonl", "share": 0.5},
    ]
    first = run("sources.mix", kind="Pair", inputs=inputs)
    write("a/one.jsonl", rows[50:][::-1])
    write("a/two.jsonl", rows[:50][::-1])
    second = run("sources.mix", kind="Pair", inputs=inputs[::-1])
    assert {row.id for row in first.kept} == {row.id for row in second.kept}
    assert len(first.kept) == 40
    capped = run("sources.mix", kind="Pair", inputs=[{"from": "./a", "name": "a", "cap": 10}])
    assert {row.id for row in capped.kept} < {row.id for row in first.kept}


def test_a_second_run_has_the_same_keys_and_reads_nothing_again(run, write, publish):
    publish("made", [pair(f"v{i}", "y", "n") for i in range(30)])
    write("a.jsonl", plain("a", 12))
    inputs = [{"from": "made", "share": 0.5}, {"from": "a.jsonl", "share": 0.5}]
    first = run("sources.mix", kind="Pair", inputs=inputs)
    second = run("sources.mix", kind="Pair", inputs=inputs)
    assert first.keys == second.keys
    assert [row.id for row in first.kept] == [row.id for row in second.kept]
    write("a.jsonl", plain("a", 13))
    third = run("sources.mix", kind="Pair", inputs=inputs)
    # One row more on one side is one more on the other: the parts of both are new.
    assert not set(first.keys) & set(third.keys)
    assert {row.id for row in first.kept} < {row.id for row in third.kept}
    assert len(third.kept) == 26


# -- rows that cannot both stay ------------------------------------------------------------------


def test_the_same_row_in_two_versions_stays_once(run, publish):
    rows = [pair(f"v{i}", "y", "n") for i in range(5)]
    publish("one", rows[:3])
    publish("two", rows[1:])
    out = run("sources.mix", kind="Pair", inputs=[{"from": "one"}, {"from": "two"}])
    assert [row.id for row in out.kept] == [row.id for row in rows]
    assert reasons(out) == {"repeated_row": 2}
    assert out.dropped[0]["detail"] == "the same row stands in input 'one'"
    assert json.loads(out.dropped[0]["raw"])["id"] == rows[1].id


def test_a_key_is_of_its_input(run, write):
    write("a.jsonl", [row | {"k": i} for i, row in enumerate(plain("a", 3))])
    write("b.jsonl", [row | {"k": i // 2} for i, row in enumerate(plain("b", 4))])
    columns = {"key": "k"}
    inputs = [{"from": "a.jsonl", "columns": columns}, {"from": "b.jsonl", "columns": columns}]
    out = run("sources.mix", kind="Pair", inputs=inputs)
    assert len(out.kept) == 5
    assert reasons(out) == {"repeated_row": 2}
    assert {row.origin for row in out.kept} >= {"a/key:0#1", "b/key:0#1"}


def test_equal_rows_without_keys_are_rows_of_their_own(run, write):
    write("a.jsonl", plain("x", 2) * 2)
    write("b.jsonl", plain("x", 2))
    out = run("sources.mix", kind="Pair", inputs=[{"from": "a.jsonl"}, {"from": "b.jsonl"}])
    assert len({row.id for row in out.kept}) == 6
    assert not out.dropped


def flipped(rows):
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


POLICIES = {
    "drop_both": {"a": 2, "b": 2},
    "keep_first": {"a": 4, "b": 2},
    "highest_priority": {"a": 2, "b": 4},
}


@pytest.mark.parametrize("conflicts", POLICIES)
def test_opposite_labels(conflicts, run, write):
    write("a.jsonl", [*plain("x", 2), *plain("a", 2)])
    write("b.jsonl", [*flipped(plain("x", 2)), *plain("b", 2)])
    inputs = [{"from": "a.jsonl"}, {"from": "b.jsonl", "priority": 1}]
    out = run("sources.mix", kind="Pair", inputs=inputs, conflicts=conflicts)
    assert Counter(row.source for row in out.kept) == POLICIES[conflicts]
    lost = [row for row in out.dropped if row["reason"] == "label_conflict"]
    assert len(lost) == len(out.dropped) == 8 - len(out.kept)
    ids = {row.id for row in out.kept}
    gone = {json.loads(row["raw"])["id"] for row in lost}
    for row in lost:
        assert row["detail"].endswith(row["related"])
        assert row["related"] in (gone if conflicts == "drop_both" else ids)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from("pq"), st.booleans()), max_size=9),
    st.permutations([0, 1, 1]),
    st.booleans(),
)
def test_conflicts_against_brute_force(rows, ranks, decide):
    frame = pl.DataFrame(
        [
            (i, i, one, ranks[one], "", "", "", "", "", key, side)
            for i, (one, key, side) in enumerate(rows)
        ],
        schema=SURVEY,
        orient="row",
    ).with_columns(
        name=pl.col("input").cast(pl.String()),
        origin=pl.col("at").cast(pl.String()),
        reason=pl.lit(None, pl.String()),
        detail=pl.lit(None, pl.String()),
        related=pl.lit(""),
    )
    made = without_conflicts(frame, decide=decide).sort("at")
    lost = set()
    for wanted in "pq":
        group = [(i, one, side) for i, (one, name, side) in enumerate(rows) if name == wanted]
        if len({one for _, one, _ in group}) < 2 or len({side for _, _, side in group}) < 2:
            continue
        best = min(ranks[one] for _, one, _ in group)
        sides = {side for _, one, side in group if ranks[one] == best}
        keeps = sides if decide and len(sides) == 1 else set()
        lost |= {i for i, _, side in group if side not in keeps}
    assert set(made.filter(reason="label_conflict")["at"]) == lost
    assert made["detail"].null_count() == len(rows) - len(lost)
    assert made.height == len(rows)


def test_conflicts_are_between_inputs_and_equal_labels_are_none(run, write):
    write("a.jsonl", [*plain("x", 1), *flipped(plain("x", 1)), *plain("y", 1)])
    write("b.jsonl", plain("y", 1))
    inputs = [{"from": "a.jsonl"}, {"from": "b.jsonl"}]
    out = run("sources.mix", kind="Pair", inputs=inputs)
    assert len(out.kept) == 4


def test_a_winner_that_contradicts_itself_decides_nothing(run, write):
    write("a.jsonl", [*plain("x", 1), *flipped(plain("x", 1))])
    write("b.jsonl", [*plain("x", 1), *plain("y", 1)])
    inputs = [{"from": "a.jsonl"}, {"from": "b.jsonl"}]
    out = run("sources.mix", kind="Pair", inputs=inputs, conflicts="keep_first")
    assert asked(out.kept) == ["y0?"]
    assert reasons(out) == {"label_conflict": 3}


def test_two_prompts_of_one_answer_can_contradict_too(run, publish):
    def row(one, other):
        made = Pair(
            pair_kind="prompt",
            prompt=user(one),
            prompt_rejected=user(other),
            chosen=assistant("x"),
            rejected=assistant("x"),
        )
        return made.identified(one)

    publish("one", [row("p", "q"), row("r", "s")])
    publish("two", [row("q", "p"), row("r", "s")])
    inputs = [{"from": "one"}, {"from": "two"}]
    out = run("sources.mix", kind="Pair", inputs=inputs)
    assert reasons(out) == {"label_conflict": 2, "repeated_row": 1}
    assert asked(out.kept) == ["r"]


# -- what rows carry -----------------------------------------------------------------------------


def test_measures_begin_with_the_name_of_their_input(run, write, publish):
    made = pair("v", "y", "n", measures={"judge.margin": 0.5, "len.chosen": 3})
    publish("made", [made.model_copy(update={"signed": ("judge.margin",)})])
    write("a.jsonl", plain("a", 1, score=4, score_chosen=2))
    columns = {"measures": ["score", "score_chosen"]}
    inputs = [{"from": "made"}, {"from": "a.jsonl", "columns": columns, "weight": 2.5}]
    one, other = run("sources.mix", kind="Pair", inputs=inputs).kept
    assert one.measures == {"made.judge.margin": 0.5, "made.len.chosen": 3, "src.weight": 1}
    assert one.signed == ("made.judge.margin",)
    assert (one.id, one.origin, one.roots) == (made.id, made.origin, made.roots)
    assert other.measures == {"a.score": 4, "a.score.chosen": 2, "src.weight": 2.5}
    assert other.swap().measures["a.score.rejected"] == 2
    assert other.roots == (other.id,)


def test_the_weight_of_a_label_stands_in_its_column(run, write):
    write("a.jsonl", [{"prompt": "p", "completion": "c", "label": True}])
    inputs = [{"from": "a.jsonl", "weight": 3}]
    [row] = run("sources.mix", kind="Label", inputs=inputs).kept
    assert isinstance(row, Label)
    assert (row.weight, row.measures) == (3, {})


def test_responses_keep_their_measures(run, publish):
    row = candidates("q", "one", "two")
    scored = [one.model_copy(update={"measures": {"judge.score": 1.0}}) for one in row.responses]
    publish("made", [row.model_copy(update={"responses": tuple(scored)})], kind=Candidates)
    [out] = run("sources.mix", kind="Candidates", inputs=[{"from": "made"}]).kept
    assert [one.measures for one in out.responses] == [{"made.judge.score": 1.0}] * 2
    assert out.id == row.id


def test_rejects_of_an_input_are_kept_and_name_it(run, write):
    write("a.jsonl", [*plain("a", 1), {"prompt": "p", "chosen": "", "rejected": "x"}])
    out = run("sources.mix", kind="Pair", inputs=[{"from": "a.jsonl"}, {"from": "b.jsonl"}][:1])
    assert reasons(out) == {"empty_text": 1}
    assert len(out.kept) == 1


def test_a_limit_takes_the_first_rows(run, write):
    write("a.jsonl", plain("a", 5))
    write("b.jsonl", plain("b", 5))
    inputs = [{"from": "a.jsonl"}, {"from": "b.jsonl"}]
    assert len(run("sources.mix", kind="Pair", inputs=inputs, limit=7).kept) == 7


# -- licences, kinds, privacy --------------------------------------------------------------------


def test_licences_stay_and_fill_what_is_not_stated(run, write, publish):
    publish("made", [pair("v", "y", "n", license="mit"), pair("w", "y", "n")])
    write("a.jsonl", [*plain("a", 1, lic="apache-2.0"), *plain("b", 1, lic=None)])
    inputs = [
        {"from": "made", "license": "cc-by-4.0"},
        {"from": "a.jsonl", "license": "cc0-1.0", "columns": {"license": "lic"}},
    ]
    out = run("sources.mix", kind="Pair", inputs=inputs, require="commercial")
    assert [row.license for row in out.kept] == ["mit", "cc-by-4.0", "apache-2.0", "cc0-1.0"]


IMPOSSIBLE = {
    "share-alike": ("compatible", "cc-by-sa-4.0", "gpl-2.0", "exclude each other.*'a'.*'b'"),
    "nc": ("commercial", "mit", "cc-by-nc-4.0", r"commercial.*'b' \(cc-by-nc-4\.0\)"),
    "unknown": ("commercial", "mit", "", r"'b' \(unknown\)"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_mix_names_the_inputs(name, run, write):
    require, one, other, said = IMPOSSIBLE[name]
    write("a.jsonl", plain("a", 1))
    write("b.jsonl", plain("b", 1))
    inputs = [{"from": "a.jsonl", "license": one}, {"from": "b.jsonl", "license": other}]
    with pytest.raises(InputError, match=said):
        run("sources.mix", kind="Pair", inputs=inputs, require=require)
    assert len(run("sources.mix", kind="Pair", inputs=inputs, require="nothing").kept) == 2


def test_other_kinds_are_refused(run, write, publish):
    publish("made", [pair("v", "y", "n")])
    with pytest.raises(InputError, match="holds Pair rows"):
        run("sources.mix", kind="Prompt", inputs=[{"from": "made"}])
    write("a.jsonl", [{"prompt": "p"}])
    with pytest.raises(InputError, match="a Pair needs role"):
        run("sources.mix", kind="Pair", inputs=[{"from": "made"}, {"from": "a.jsonl"}])
    with pytest.raises(InputError, match="from versions only"):
        run("sources.mix", kind="Judged", inputs=[{"from": "a.jsonl"}])
    inputs = [{"from": "made", "columns": {"prompt": "p"}}]
    with pytest.raises(InputError, match="no columns to map"):
        run("sources.mix", kind="Pair", inputs=inputs)


def test_a_private_input_makes_the_mix_private(write, publish, tmp_path):
    publish("open", [pair("v", "y", "n")])
    publish("secret", [pair("w", "y", "n")], private=True)
    write("a.jsonl", plain("a", 1))
    kit = Kit("mix", 0, tmp_path, tmp_path / "outputs", {}, {}, {})

    def is_private(*inputs, **fields):
        return Mix.model_validate({"kind": "Pair", "inputs": inputs} | fields).is_private(kit)

    assert not is_private({"from": "open"}, {"from": "a.jsonl"})
    assert is_private({"from": "open"}, {"from": "secret"})
    assert is_private({"from": "open"}, {"from": "a.jsonl", "private": True})
    assert is_private({"from": "open"}, private=True)


WRONG = {
    "one share": ({"inputs": [{"from": "a", "share": 1}, {"from": "b"}]}, "'b' has none"),
    "sum": ({"inputs": [{"from": "a", "share": 0.5}, {"from": "b", "share": 0.4}]}, "add up to 1"),
    "twice": ({"inputs": [{"from": "a@1.0.0"}, {"from": "a@2.0.0"}]}, "two inputs are called 'a'"),
    "reserved": ({"inputs": [{"from": "label"}]}, "can be called 'label'"),
    "rows": ({"inputs": [{"from": "a"}], "rows": 3}, "no input states a share"),
    "strict": ({"inputs": [{"from": "a", "share": 1}], "strict": True}, "`strict` needs `rows`"),
    "role": ({"inputs": [{"from": "./a", "columns": {"prmpt": "x"}}]}, "did you mean 'prompt'"),
    "none": ({"inputs": []}, "at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields(name):
    fields, said = WRONG[name]
    with pytest.raises(ValidationError, match=said):
        Mix.model_validate({"kind": "Pair"} | fields)


def test_a_recipe_names_the_place_of_a_mistake(run):
    with pytest.raises(RecipeError, match=r"steps\[0\]\.inputs\[0\]\.shar: unknown field"):
        run("sources.mix", kind="Pair", inputs=[{"from": "a", "shar": 1}])


def test_hostile_texts_pass_through(run, write):
    texts = ["\u202e", "{prompt}", "'; --", "x" * 100_000, "\U0001f600"]
    rows = [{"prompt": text, "chosen": text + "+", "rejected": text + "-"} for text in texts]
    write("a.jsonl", rows)
    write("b.jsonl", flipped(rows[:3]))
    inputs = [{"from": "a.jsonl"}, {"from": "b.jsonl"}]
    out = run("sources.mix", kind="Pair", inputs=inputs, conflicts="keep_first")
    assert asked(out.kept) == texts
    assert reasons(out) == {"label_conflict": 3}
