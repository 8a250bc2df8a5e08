"""The engine: no row lost, each part once, keys that move when they must."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datakit.engine import execute
from datakit.errors import BugError, InputError
from datakit.lineage import chunks
from datakit.recipe import load_recipe
from datakit.session import Settings, Watch
from datakit.step import DROPPED
from datakit.store import Store, cut
from datakit.work import perform


@pytest.fixture
def go(tmp_path):
    """Runs a line of steps; returns (markers, watch, store)."""

    def run(steps, *, limit=None, lanes=1, rows_per_part=20, seed=0, model=None):
        models = {"m": {"kind": "scripted"} | (model or {})}
        fields = {"name": "toy", "models": models, "rows_per_part": rows_per_part, "seed": seed}
        recipe = load_recipe(fields | {"steps": steps})
        settings = Settings(
            outputs=tmp_path / "outputs",
            state=tmp_path / "state",
            base=tmp_path,
            seed=seed,
            rows_per_part=rows_per_part,
            limit=limit,
            models=recipe.models,
        )
        watch = Watch()
        markers = execute(
            recipe, settings, lambda works: [perform(work, watch) for work in works], lanes
        )
        return markers, watch, Store(settings.outputs)

    return run


def rows_of(store, dones):
    return store.scan(chunks(dones), pl.Schema({"id": pl.String()})).collect()


NUMBERS = {"step": "toys.numbers", "rows": 120}
ANSWER = {"step": "toys.answer"}
LINE = [NUMBERS, {"step": "curation.exact"}, {"step": "toys.evens"}, ANSWER]


def test_every_row_is_kept_or_dropped_with_a_reason_at_every_step(go):
    steps = [NUMBERS | {"modulo": 90}, *LINE[1:3], ANSWER | {"skip": "question 4"}]
    markers, _, store = go(steps)
    before = None
    for dones in markers:
        kept = rows_of(store, dones)
        dropped = pl.concat([store.dropped(done) for done in dones])
        if before is not None:
            parents = kept["parents"].explode().drop_nulls()
            accounted = set(kept["id"]) | set(parents) | set(dropped["id"])
            assert set(before["id"]) <= accounted
        assert dropped.filter(pl.col("reason") == "").height == 0
        before = kept
    assert [sum(done.rows for done in dones) for dones in markers] == [120, 90, 45, 39]
    assert [sum(done.dropped_rows for done in dones) for dones in markers] == [0, 30, 45, 6]


def test_a_dropped_row_keeps_its_whole_record(go):
    markers, _, store = go([NUMBERS, {"step": "toys.evens"}])
    dropped = store.dropped(markers[1][0])
    assert dropped.schema == DROPPED
    assert '"content":"question 1"' in dropped["record"][0]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("toys.lossy", "lost 1 rows"),
        ("toys.silent", "returned nothing for row"),
        ("toys.crash", "ZeroDivisionError"),
    ],
)
def test_a_step_that_breaks_its_contract_stops_the_run_by_name(go, step, said):
    with pytest.raises(BugError, match=said) as caught:
        go([NUMBERS, {"step": step, "as": "broken"}])
    assert "'broken'" in str(caught.value)


def test_a_finished_run_is_not_done_again(go, tmp_path):
    go(LINE)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*.*")}
    _, watch, _ = go(LINE)
    assert watch.meter.sent == watch.meter.replayed == 0
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").rglob("*.*")}


def test_a_changed_field_recomputes_its_step_and_those_after_and_asks_nothing_twice(go):
    first, _, _ = go(LINE)
    second, watch, _ = go([*LINE[:2], LINE[2], ANSWER | {"skip": "question 4"}])
    keys = [[{done.key for done in dones} for dones in run] for run in (first, second)]
    assert keys[0][:3] == keys[1][:3]
    assert not keys[0][3] & keys[1][3]
    assert watch.meter.sent == 0
    assert watch.meter.replayed > 0


@pytest.mark.parametrize(
    ("change", "sends"),
    [
        ({"model": "other"}, True),
        ({"revision": "2"}, True),
        ({"sampling": {"temperature": 0.5}}, True),
        ({"extra_body": {"top_k": 3}}, True),
        ({"max_in_flight": 3}, False),
        ({"trusted": True}, False),
    ],
    ids=str,
)
def test_what_changes_an_answer_asks_again_and_nothing_else_does(go, change, sends):
    go(LINE)
    _, watch, _ = go(LINE, model=change)
    assert (watch.meter.sent > 0) is sends


def test_an_overwritten_checkpoint_is_another_model_and_a_moved_one_is_not(go, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    assert go(LINE, model={"model": str(folder)})[1].meter.sent > 0
    moved = folder.rename(tmp_path / "moved")
    assert go(LINE, model={"model": str(moved)})[1].meter.sent == 0
    (moved / "model.safetensors").write_bytes(b"trained")
    assert go(LINE, model={"model": str(moved)})[1].meter.sent > 0


def test_another_seed_or_alias_is_another_part(go):
    keys = [
        {done.key for done in go(steps, seed=seed)[0][-1]}
        for steps, seed in (
            (LINE, 0),
            (LINE, 1),
            ([*LINE[:3], ANSWER | {"as": "reply"}], 0),
        )
    ]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]


def test_a_source_that_grew_is_noticed_and_old_rows_are_not_asked_again(go):
    markers, _, store = go([NUMBERS, ANSWER])
    grown, watch, _ = go([NUMBERS | {"rows": 130}, ANSWER])
    assert watch.meter.sent == 10
    old, new = rows_of(store, markers[-1]), rows_of(store, grown[-1])
    assert old["id"].to_list() == new["id"].to_list()[:120]


def test_an_edited_source_row_is_asked_again_and_only_it(go):
    go([NUMBERS, ANSWER])
    _, watch, _ = go([NUMBERS | {"edited": 7}, ANSWER])
    assert watch.meter.sent == 1


def test_copies_keep_their_numbers_when_the_source_is_read_in_pieces(go):
    steps = [NUMBERS | {"modulo": 60}]
    first, _, store = go(steps)
    grown, _, _ = go([NUMBERS | {"modulo": 60, "rows": 180}])
    ids = rows_of(store, grown[0])["id"]
    assert ids.n_unique() == 180
    assert ids.to_list()[:120] == rows_of(store, first[0])["id"].to_list()


@pytest.mark.parametrize("lanes", [2, 3, 50])
def test_lanes_give_the_same_parts(go, lanes):
    one, _, _ = go(LINE)
    many, watch, _ = go(LINE, lanes=lanes)
    assert one == many
    assert watch.meter.sent == 0


def test_output_order_is_input_order(go):
    markers, _, store = go([NUMBERS, ANSWER])
    texts = [row[0]["content"] for row in rows_of(store, markers[-1])["prompt"]]
    assert texts == [f"question {number}" for number in range(120)]


def test_a_row_step_may_give_several_rows(go):
    markers, _, store = go([NUMBERS, ANSWER | {"copies": 3}])
    rows = rows_of(store, markers[-1])
    assert rows.height == 360
    assert rows["id"].n_unique() == 360


@pytest.mark.parametrize("limit", [1, 50, 75, 500])
def test_a_limit_takes_the_first_rows(go, limit):
    markers, _, store = go([NUMBERS], limit=limit)
    full, _, _ = go([NUMBERS])
    ids = rows_of(store, markers[0])["id"].to_list()
    assert ids == rows_of(store, full[0])["id"].to_list()[:limit]


def test_a_frame_step_adds_measures_and_labels_under_its_alias(go):
    markers, _, store = go([NUMBERS, {"step": "toys.evens", "as": "filter"}])
    row = rows_of(store, markers[-1]).row(0, named=True)
    assert row["measures"] == [{"name": "filter.two", "value": 2.0}]
    assert {"name": "filter.seen", "value": "yes"} in row["labels"]


def test_a_row_that_is_rewritten_is_a_derived_row(go):
    markers, _, store = go([NUMBERS, {"step": "toys.upper"}])
    before, after = rows_of(store, markers[0]), rows_of(store, markers[1])
    assert after["messages"][3][0]["content"] == "QUESTION 3"
    assert after["parents"].list.first().to_list() == before["id"].to_list()
    assert not set(after["id"]) & set(before["id"])
    assert after["roots"].to_list() == before["roots"].to_list()


def test_a_group_is_whole_and_in_its_order(go):
    markers, _, store = go([{"step": "toys.grouped"}, {"step": "toys.runs"}])
    rows = rows_of(store, markers[1])
    assert rows["messages"].list.first().struct.field("content").to_list() == [
        "8,5,2",
        "7,4,1",
        "6,3,0",
    ]
    assert [len(parents) for parents in rows["parents"]] == [3, 3, 3]
    assert sum(done.dropped_rows for done in markers[1]) == 3


def test_an_empty_source_is_an_error(go):
    with pytest.raises(InputError, match="no rows"):
        go([NUMBERS | {"rows": 0}])


IDS = st.lists(st.integers(0, 2**64), unique=True, max_size=300).map(
    lambda numbers: [f"{number:024x}" for number in numbers]
)


@given(IDS, st.integers(1, 20), st.integers(1, 40))
def test_cutting_keeps_every_row_in_order_whatever_the_pieces(ids, rows, piece):
    frame = pl.DataFrame({"id": ids}, schema={"id": pl.String()})
    pieces = [frame.slice(start, piece) for start in range(0, len(ids), piece)]
    parts = [part["id"].to_list() for part in cut(pieces, rows)]
    assert [one for part in parts for one in part] == ids
    assert parts == [part["id"].to_list() for part in cut([frame], rows)]
    assert all(0 < len(part) <= 2 * rows for part in parts)


def test_a_row_less_moves_few_borders():
    """Cutting every n rows would change every part after the missing row."""
    ids = [f"{hash_:024x}" for hash_ in (n * 2654435761 % 2**64 for n in range(5000))]
    parts = {tuple(p["id"]) for p in cut([pl.DataFrame({"id": ids})], 100)}
    fewer = {tuple(p["id"]) for p in cut([pl.DataFrame({"id": ids[:2000] + ids[2001:]})], 100)}
    assert len(fewer - parts) <= 3


@pytest.mark.parametrize("step", ["curation.exact", "curation.near", "curation.select"])
def test_a_table_step_that_no_row_reaches_is_done(go, step):
    fields = {"step": step, "as": "last"} | ({"keep": 3} if step.endswith("select") else {})
    nothing = {"step": "toys.answer", "skip": "question"}
    markers, _, _ = go([NUMBERS | {"rows": 2}, nothing, fields])
    assert [sum(done.rows for done in dones) for dones in markers] == [2, 0, 0]
