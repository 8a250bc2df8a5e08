"""Versions: written whole, numbered by what changed, the same rows never twice."""

import json
import multiprocessing
import os
import shutil
import time

import polars as pl
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

import datakit as dk
from datakit.diff import Change, next_version
from datakit.errors import GateFailed, InputError, NotRecorded, OutsideError
from datakit.recipe import load_recipe
from datakit.records import Pair
from datakit.tables import from_frame
from datakit.versions import find_version, version_numbers

LINE = {
    "name": "line",
    "models": {"m": {"kind": "scripted"}},
    "steps": [{"step": "toys.numbers", "rows": 200, "modulo": 190}, {"step": "toys.answer"}],
}


@pytest.fixture
def go(tmp_path):
    def run(*overrides, recipe=LINE, **more):
        return dk.run(recipe, outputs=tmp_path, overrides=overrides, **more)

    return run


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart, from its recorded answers."""
    folder = tmp_path_factory.mktemp("quickstart")
    # The hashing embedder keeps the heavy model out of the fast tests.
    fast = ["models.embedder.kind=hashing", "steps.near.threshold=0.86", "splits.test=0.2"]
    return dk.run(
        "quickstart",
        outputs=folder / "outputs",
        state=folder / "state",
        overrides=[*fast, "splits.train=0.8"],
    )


def test_a_version_holds_what_it_should(quickstart):
    names = {path.name for path in quickstart.folder.rglob("*.*")}
    assert {
        "manifest.json",
        "README.md",
        "report.html",
        "report.json",
        "rejects.parquet",
        "splits.parquet",
        "train-00000-of-00001.parquet",
        "test-00000-of-00001.parquet",
    } == names
    assert not list(quickstart.folder.parent.parent.glob(".draft-*"))


def test_default_is_the_explicit_conversational_form(quickstart):
    frame = quickstart.scan().collect()
    assert set(frame["prompt"].list.last().struct.field("role")) == {"user"}
    assert set(frame["chosen"].list.first().struct.field("role")) == {"assistant"}
    assert frame["chosen"].list.len().to_list() == [1] * frame.height
    assert (frame["chosen"] != frame["rejected"]).all()
    assert "margin" not in frame.columns
    assert frame["pair.margin"].min() > 0


def test_it_loads_with_datasets_alone(quickstart):
    rows = load_dataset(
        "parquet",
        data_files={"train": str(quickstart.folder / "default" / "train-*.parquet")},
        cache_dir=str(quickstart.folder.parent / "cache"),
    )["train"]
    assert rows.num_rows == quickstart.manifest.splits["train"]
    assert rows[0]["prompt"][0].keys() == {"role", "content"}


def test_files_carry_no_note_of_a_library_and_only_small_types(quickstart):
    for file in quickstart.manifest.files:
        if file.config:
            schema = pq.read_schema(quickstart.folder / file.path)
            assert not schema.metadata
            assert "large" not in str(schema)


def test_ratings_keep_every_candidate_and_every_raw_verdict(quickstart):
    ratings = quickstart.scan("ratings").collect()
    counts = {count.alias: count for count in quickstart.manifest.funnel}
    assert ratings.height == counts["judge"].kept > counts["pair"].kept
    assert ratings["verdicts"].list.len().to_list() == [2] * ratings.height
    shown = ratings["verdicts"].explode().struct.field("shown").to_list()
    assert {tuple(one) for one in shown} == {(0, 1), (1, 0)}
    assert all(json.loads(raw) for raw in ratings["verdicts"].explode().struct.field("raw"))


def test_every_source_row_is_in_the_version_or_in_the_rejects(quickstart):
    rejects = pl.read_parquet(quickstart.folder / "rejects.parquet")
    kept = quickstart.scan().collect()
    roots = set(kept["roots"].explode())
    lost = {root for record in rejects["record"] for root in json.loads(record)["roots"]}
    assert len(roots | lost) == 72
    assert not roots & lost
    assert rejects.filter(pl.col("reason") == "").height == 0


def test_planted_duplicates_name_the_row_that_stays(quickstart):
    rejects = pl.read_parquet(quickstart.folder / "rejects.parquet")
    exact = rejects.filter(pl.col("reason") == "exact_duplicate")
    planted = {"key:q018#1", "key:q038#1", "key:q048#1", "key:q060#1", "key:q067#1"}
    assert {json.loads(record)["origin"] for record in exact["record"]} == planted
    assert exact["similarity"].to_list() == [1.0] * 5


def test_published_rows_are_records_again(quickstart):
    rows = from_frame(Pair, quickstart.records())
    assert [row.identified(row.origin).id for row in rows] == [row.id for row in rows]


def test_the_manifest_says_how_to_make_it_again(quickstart):
    manifest = quickstart.manifest
    again = load_recipe(manifest.recipe)
    assert again.plain() == manifest.recipe
    assert manifest.models["writer"].identity == "recorded:writer"
    assert manifest.gate == {"rows": "pass", "failures.share": "pass"}
    assert sum(file.rows for file in manifest.files if file.config == "default") == sum(
        manifest.splits.values()
    )


def test_offline_a_missing_answer_is_one_sentence(tmp_path):
    fast = ["models.embedder.kind=hashing", "steps.near.threshold=0.86"]
    recipe = load_recipe("quickstart", fast).model_copy(update={"recorded": None})
    with pytest.raises(NotRecorded, match="'recorded:writer'"):
        dk.run(recipe, outputs=tmp_path, overrides=())


def test_the_same_run_is_the_same_version(go):
    first, second = go(), go()
    assert first.address == second.address == "line@1.0.0"
    assert first.manifest == second.manifest


def test_the_same_rows_under_another_window_are_the_same_version(go):
    go()
    assert go("models.m.max_in_flight=3").address == "line@1.0.0"


@pytest.mark.parametrize(
    ("override", "number", "change"),
    [
        ("steps.numbers.rows=210", "1.1.0", "rows: 10 added"),
        ("steps.numbers.rows=195", "1.1.0", "rows: 5 removed"),
        ("steps.numbers.rows=100", "2.0.0", "rows: 100 removed"),
        ("steps.answer.as=reply", "2.0.0", None),
        ("description=better words", "1.0.1", "the same rows; card, recipe or files changed"),
    ],
)
def test_the_number_says_what_changed(go, override, number, change):
    go()
    manifest = go(override).manifest
    assert manifest.version == number
    assert change in (None, manifest.change)
    assert manifest.parent.version == "1.0.0"


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (Change(rows_before=100, relabelled=5), "1.3.0"),
        (Change(rows_before=100, relabelled=4, removed=2), "2.0.0"),
        (Change(rows_before=100, rescored=100), "1.3.0"),
        (Change(rows_before=100, columns_added=("x",)), "1.3.0"),
        (Change(rows_before=100, columns_removed=("x",)), "2.0.0"),
        (Change(rows_before=100), "1.2.4"),
    ],
)
def test_the_smallest_number_that_says_so(change, number):
    assert next_version("1.2.3", change) == number


def test_old_versions_stay_as_they_were(go):
    first = go()
    files = {path: path.read_bytes() for path in first.folder.rglob("*.*")}
    go("steps.numbers.rows=210")
    assert files == {path: path.read_bytes() for path in first.folder.rglob("*.*")}


def test_published_rows_keep_their_split_when_the_source_grows(go):
    before = dict(go().scan().select("id", "split").collect().iter_rows())
    after = dict(go("steps.numbers.rows=400").scan().select("id", "split").collect().iter_rows())
    assert before.items() <= after.items()


def test_a_limited_run_is_a_dataset_apart(go, tmp_path):
    assert go("gate.rows.min=500", limit=50).address == "line-limit-50@1.0.0"
    assert version_numbers(tmp_path, "line") == []


def test_a_failed_gate_publishes_nothing_and_keeps_the_candidate(go, tmp_path):
    with pytest.raises(GateFailed, match=r"rows.*200.*500"):
        go("gate.rows.min=500")
    assert version_numbers(tmp_path, "line") == []
    candidate = tmp_path / "datasets" / "line" / "candidates" / "1.0.0"
    assert (candidate / "report.html").is_file()
    assert go().address == "line@1.0.0"


def test_an_empty_dataset_is_not_published(go, tmp_path):
    with pytest.raises(GateFailed, match="rows is 0, below 1"):
        go("steps.answer.skip=question")
    assert version_numbers(tmp_path, "line") == []
    assert go().manifest.gate == {"rows": "pass", "failures.share": "pass"}


def test_only_what_was_dropped_may_change_and_that_is_a_version_too(go, tmp_path):
    # Row 201 says `question 10`, which is too short.
    short = {"step": "curation.length", "over": "prompt", "min_characters": len("question 100")}
    recipe = LINE | {"steps": [LINE["steps"][0], short, LINE["steps"][1]]}
    first = go(recipe=recipe)
    second = go("steps.numbers.rows=201", recipe=recipe)
    assert second.manifest.digest == first.manifest.digest
    assert second.manifest.version == "1.0.1"
    assert pl.read_parquet(second.folder / "rejects.parquet").height == 111
    assert second.manifest.funnel[0].rows_in == 201


PAIRS = {
    "name": "pairs",
    "models": {name: {"kind": "scripted", "model": name} for name in ("w", "d", "j")},
    "steps": [
        {"step": "toys.numbers", "rows": 30},
        {"step": "annotation.respond", "models": ["w", "d"]},
        {"step": "annotation.judge", "judge": "j"},
        {"step": "annotation.pair"},
    ],
}


def test_another_judge_that_says_the_same_relabels_nothing(go):
    first = go(recipe=PAIRS)
    second = go('models.j.revision="2"', recipe=PAIRS)
    ids = [set(version.scan().collect()["id"]) for version in (first, second)]
    assert ids[0] == ids[1]
    assert second.manifest.version == "1.1.0"
    assert second.manifest.change == "config 'ratings' changed"


def test_a_version_remembers_that_its_rows_are_private(go, tmp_path):
    private = {"step": "toys.numbers", "rows": 30, "private": True}
    assert go(recipe=PAIRS | {"steps": [private, *PAIRS["steps"][1:]]}).manifest.private
    stranger = {"kind": "openai", "model": "x", "base_url": "http://127.0.0.1:1/v1"}
    leak = {
        "name": "leak",
        "models": {"s": stranger},
        "steps": [
            {"step": "sources.dataset", "dataset": "pairs", "kind": "Pair"},
            {"step": "annotation.judge", "judge": "s"},
        ],
    }
    with pytest.raises(InputError, match=r"the source is private, and models\.s is not"):
        go(recipe=leak)


def test_a_missing_key_is_found_before_anything_is_asked(go, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    judge = {"kind": "openai", "model": "x", "base_url": "http://127.0.0.1:1/v1"}
    models = PAIRS["models"] | {"j": judge | {"api_key_env": "NO_SUCH_KEY"}}
    with pytest.raises(InputError, match="'NO_SUCH_KEY'"):
        go(recipe=PAIRS | {"models": models})


def test_a_folder_in_the_way_is_named_and_a_copy_of_a_version_is_none(go, tmp_path):
    versions = tmp_path / "datasets" / "line" / "versions"
    (versions / "1.0.0" / "default").mkdir(parents=True)
    with pytest.raises(OutsideError, match=r"versions/1\.0\.0' is in the way"):
        go()
    (versions / "1.0.0" / "default").rmdir()
    first = go()
    shutil.copytree(first.folder, versions / "1.0.0-copy")
    assert go().address == "line@1.0.0"


def test_the_pointer_to_the_newest_heals(go, tmp_path):
    go()
    pointer = tmp_path / "datasets" / "line" / "latest.json"
    pointer.unlink()
    go()
    assert json.loads(pointer.read_text()) == {"version": "1.0.0"}


def test_a_candidate_is_gone_when_its_number_is_published_and_old_drafts_are_swept(go, tmp_path):
    home = tmp_path / "datasets" / "line"
    for _ in range(2):
        with pytest.raises(GateFailed):
            go("gate.rows.min=500")
    for name, age_s in (("old", 100_000), ("young", 10)):
        draft = home / f".draft-{name}"
        draft.mkdir()
        os.utime(draft, (time.time() - age_s,) * 2)
    go()
    assert not (home / "candidates" / "1.0.0").exists()
    assert [draft.name for draft in home.glob(".draft-*")] == [".draft-young"]


def test_a_lost_part_is_made_again(go, tmp_path):
    first = go()
    for path in (tmp_path / "parts").rglob("*.parquet"):
        path.unlink()
    assert go("description=again").manifest.digest == first.manifest.digest


def test_a_gate_on_a_number_that_does_not_exist_fails(go):
    with pytest.raises(GateFailed, match="row"):
        go("gate.rowz.min=5")


def test_a_version_that_does_not_exist_is_named_with_what_does(go, tmp_path):
    go()
    with pytest.raises(InputError, match=r"known: 1\.0\.0"):
        find_version(tmp_path, "line@9.9.9")
    with pytest.raises(InputError, match="did you mean 'line'"):
        find_version(tmp_path, "lines")
    with pytest.raises(InputError, match="neither"):
        find_version(tmp_path, "What is this?")


async def _in_a_loop(go):
    return go()


def test_it_runs_where_a_loop_already_runs(go):
    import asyncio

    assert asyncio.run(_in_a_loop(go)).address == "line@1.0.0"


def _release(folder, rows, barrier, queue):
    from datakit import engine, release

    execute = engine.execute

    def wait(*arguments):
        markers = execute(*arguments)
        barrier.wait()
        return markers

    import datakit.pipeline as module

    module.execute = wait
    del release
    version = module.run(LINE, outputs=folder, overrides=[f"steps.numbers.rows={rows}"])
    queue.put((rows, version.manifest.version, version.manifest.splits))


def test_two_releases_that_race_take_two_numbers(tmp_path):
    """Both are ready to publish before either does; different rows, one dataset."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    racers = [
        context.Process(target=_release, args=(tmp_path, rows, barrier, queue))
        for rows in (200, 230)
    ]
    for racer in racers:
        racer.start()
    found = {rows: (version, splits) for rows, version, splits in (queue.get() for _ in racers)}
    for racer in racers:
        racer.join()
    assert len({version for version, _ in found.values()}) == 2
    assert [sum(splits.values()) for _, splits in (found[200], found[230])] == [200, 230]
    versions = version_numbers(tmp_path, "line")
    assert len(versions) == 2
    newest = json.loads((tmp_path / "datasets" / "line" / "latest.json").read_text())
    assert newest == {"version": versions[-1]}
    older, newer = (find_version(tmp_path, f"line@{one}") for one in versions)
    splits = [dict(v.scan().select("id", "split").collect().iter_rows()) for v in (older, newer)]
    assert all(splits[1].get(row, split) == split for row, split in splits[0].items())
