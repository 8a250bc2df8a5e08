"""The store: a part exists when its marker exists, whoever wrote it."""

import multiprocessing

import polars as pl
import pytest

from datakit.errors import OutsideError
from datakit.rows import dropped_frame
from datakit.store import Store, frame_digest

KEY = "ab" * 16


def part(store, ids, transient=False):
    lost = dropped_frame([{"id": "x", "reason": "no", "transient": transient}])
    frame = pl.DataFrame({"id": ids})
    return store.save(KEY, "alias", "step", "Prompt", len(ids) + 1, [frame], [lost])


def test_a_part_comes_back_as_it_was_written(tmp_path):
    store = Store(tmp_path)
    assert store.find(KEY) is None
    done = part(store, ["a", "b"])
    assert store.find(KEY) == done
    assert store.read(done.chunks[0])["id"].to_list() == ["a", "b"]
    assert done.reasons == {"no": 1}
    assert done.status == "complete"


def test_files_without_a_marker_are_no_part(tmp_path):
    store = Store(tmp_path)
    done = part(store, ["a"])
    store.path(done.chunks[0]).parent.joinpath("done.0.json").unlink()
    assert store.find(KEY) is None


def test_a_marker_of_another_release_is_no_part(tmp_path):
    store = Store(tmp_path)
    marker = store.path(part(store, ["a"]).chunks[0]).parent / "done.0.json"
    marker.write_text('{"key": "old"}')
    assert store.find(KEY) is None
    assert part(store, ["b"]).rows == 1
    assert store.find(KEY).rows == 1


def test_who_comes_second_finds_the_first_and_leaves_no_files(tmp_path):
    store = Store(tmp_path)
    first = part(store, ["a"])
    files = sorted(tmp_path.rglob("*"))
    assert part(store, ["b"]) == first
    assert sorted(tmp_path.rglob("*")) == files


def test_a_partial_part_is_followed_by_the_next_number(tmp_path):
    store = Store(tmp_path)
    assert part(store, ["a"], transient=True).status == "partial"
    assert part(store, ["a", "b"]).status == "complete"
    assert store.find(KEY).rows == 2
    assert part(store, ["a"], transient=True).rows == 2


def test_an_empty_part_is_a_part(tmp_path):
    done = part(Store(tmp_path), [])
    assert done.chunks == ()
    assert done.rows == 0


def _race(folder, name, barrier, queue):
    barrier.wait()
    done = part(Store(folder), [name])
    queue.put(done.chunks[0].file)


def test_processes_that_race_for_a_part_agree_on_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(4), context.Queue()
    racers = [
        context.Process(target=_race, args=(tmp_path, f"r{number}", barrier, queue))
        for number in range(4)
    ]
    for racer in racers:
        racer.start()
    files = {queue.get(timeout=60) for _ in racers}
    for racer in racers:
        racer.join()
    assert len(files) == 1
    assert len(list(tmp_path.rglob("*.parquet"))) == 2


def test_a_digest_is_of_the_rows_not_of_the_file():
    one = pl.DataFrame({"id": ["a", "b"], "x": [1, 2]})
    assert frame_digest(one) == frame_digest(pl.concat([one[:1], one[1:]], rechunk=False))
    assert frame_digest(one) != frame_digest(one.reverse())


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "parts").write_text("a file where a folder should be")
    with pytest.raises(OutsideError, match="cannot write part"):
        part(Store(tmp_path), ["a"])
