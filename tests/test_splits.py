"""Splits: decided once by the root prompt's cluster; each test is where a naive rule fails."""

import polars as pl
import pytest

from datakit.errors import InputError
from datakit.ids import packed
from datakit.splits import Names, Roots, assign_splits, root_frames
from datakit.text import digest

HALF = {"train": 0.5, "test": 0.5}
LISTS = pl.List(pl.String())


def assign(
    roots, *, rows=None, duplicates=(), previous=None, declared=None, shares=HALF, keys=None
):
    """Splits by row, the bridging rows, and the roots that have a split."""
    keys, names = keys or {}, Names()
    before = previous or {}
    rows = rows or {f"row {root}": [root] for root in roots}

    def table(found, splits):
        key = hashed(keys.get(root, f"key {root}") for root in found)
        return Roots(hashed(found), key, names.codes(splits))

    found = assign_splits(
        [pl.Series([[digest(one, 12) for one in made] for made in rows.values()], dtype=LISTS)],
        table(roots, [(declared or {}).get(root, "") for root in roots]),
        (hashed(one for one, _ in duplicates), hashed(other for _, other in duplicates)),
        table(list(before), before.values()),
        names,
        shares,
        0,
    )
    splits = dict(zip(rows, names.spelled(found.rows), strict=True))
    bridging = [row for row, split in splits.items() if not split]
    known = {digest(root, 12): root for root in (*roots, *before)}
    written = pl.concat(root_frames(found)).select("root", "split")
    placed = {known[root]: split for root, split in written.iter_rows()}
    return {row: split for row, split in splits.items() if split}, bridging, placed


def hashed(names):
    return packed([digest(name, 12) for name in names])


def test_shares_hold_and_every_row_has_a_split():
    roots = [f"r{number}" for number in range(4000)]
    splits, bridging, _ = assign(roots, shares={"train": 0.9, "test": 0.1})
    assert len(splits) == 4000
    assert not bridging
    assert 0.08 < list(splits.values()).count("test") / 4000 < 0.12


def test_duplicates_share_a_split_where_hashing_each_row_would_not():
    roots = [f"r{number}" for number in range(40)]
    splits, _, _ = assign(roots, duplicates=[("r0", root) for root in roots[1:]])
    assert len(set(splits.values())) == 1


def test_equal_first_turns_share_a_split_without_any_duplicate_step():
    roots = [f"r{number}" for number in range(40)]
    splits, _, _ = assign(roots, keys=dict.fromkeys(roots, "the same words"))
    assert len(set(splits.values())) == 1


def test_all_rows_of_a_root_share_its_split():
    rows = {f"row {number}": ["a"] for number in range(20)}
    assert len(set(assign(["a"], rows=rows)[0].values())) == 1


def test_a_newcomer_joins_the_split_of_its_published_neighbour():
    for split in HALF:
        splits, _, _ = assign(["a", "n"], duplicates=[("n", "a")], previous={"a": split})
        assert splits == {"row a": split, "row n": split}


def test_the_bridging_newcomer_is_dropped_and_nothing_published_moves():
    """By the cluster's hash, or by its first member, b would move into train."""
    splits, bridging, roots = assign(
        ["a", "b", "n"],
        duplicates=[("n", "a"), ("n", "b")],
        previous={"a": "train", "b": "test"},
    )
    assert splits == {"row a": "train", "row b": "test"}
    assert bridging == ["row n"]
    assert "n" not in roots


def test_a_chain_of_newcomers_between_two_splits_is_dropped_whole():
    """Asked one by one, n would join train and m test, and the two are near each other."""
    splits, bridging, _ = assign(
        ["a", "b", "n", "m"],
        duplicates=[("n", "a"), ("m", "n"), ("m", "b")],
        previous={"a": "train", "b": "test"},
    )
    assert splits == {"row a": "train", "row b": "test"}
    assert sorted(bridging) == ["row m", "row n"]


def test_a_newcomer_with_the_words_of_two_splits_bridges_them_too():
    _, bridging, _ = assign(
        ["n"],
        keys={"n": "k", "a": "k"},
        previous={"a": "train", "b": "test"},
        duplicates=[("n", "b")],
    )
    assert bridging == ["row n"]


def test_published_rows_that_become_neighbours_stay_where_they_are():
    splits, bridging, _ = assign(
        ["a", "b"], duplicates=[("a", "b")], previous={"a": "train", "b": "test"}
    )
    assert splits == {"row a": "train", "row b": "test"}
    assert not bridging


def test_a_root_that_was_gone_comes_back_to_its_split():
    _, _, roots = assign(["a"], previous={"a": "test", "b": "train"})
    splits, _, _ = assign(["a", "b"], previous=roots)
    assert splits == {"row a": "test", "row b": "train"}


def test_a_new_cluster_does_not_depend_on_what_else_is_new():
    few, _, _ = assign(["a", "b"])
    many, _, _ = assign(["z", "a", "y", "b", "x"])
    assert few.items() <= many.items()


def test_a_row_with_roots_in_two_splits_bridges_them():
    rows = {"row": ["a", "b"]}
    splits, bridging, _ = assign(["a", "b"], rows=rows, previous={"a": "train", "b": "test"})
    assert splits == {}
    assert bridging == ["row"]


def test_the_sources_own_test_split_is_honoured_and_nothing_near_it_enters_train():
    splits, bridging, _ = assign(
        ["t", "near", "train_near", "far"],
        duplicates=[("near", "t"), ("train_near", "t2")],
        declared={"t": "test", "far": "train"},
    )
    assert splits["row t"] == "test"
    assert splits["row near"] == "test"
    assert splits["row far"] == "train"
    assert not bridging


def test_a_declared_train_row_near_a_declared_test_row_is_dropped():
    splits, bridging, _ = assign(
        ["t", "x"], duplicates=[("x", "t")], declared={"t": "test", "x": "train"}
    )
    assert splits == {"row t": "test"}
    assert bridging == ["row x"]


def test_a_declared_test_row_near_a_published_train_row_is_dropped():
    splits, bridging, _ = assign(
        ["a", "t"], duplicates=[("t", "a")], previous={"a": "train"}, declared={"t": "test"}
    )
    assert splits == {"row a": "train"}
    assert bridging == ["row t"]


def test_other_held_out_splits_are_honoured():
    splits, _, _ = assign(["v"], declared={"v": "validation"})
    assert splits == {"row v": "validation"}


def test_a_split_name_that_is_no_file_name_is_refused():
    with pytest.raises(InputError, match=r"'\.\./x'"):
        assign(["a"], declared={"a": "../x"})


def test_no_rows_are_no_trouble():
    assert assign([])[0] == {}
