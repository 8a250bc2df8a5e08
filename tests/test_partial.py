"""Capped runs: never over the cap, nothing asked twice, and a pre-release of what is complete."""

import json

import polars as pl
import pytest
from asking import Bill, recipe_of
from datasets import load_dataset
from endpoint import Endpoint

import datakit as dk
from datakit.errors import GateFailed, InputError, Stopped
from datakit.versions import find_version, partial_numbers, version_numbers

ROWS = 160


@pytest.fixture(scope="module")
def bill():
    return Bill()


@pytest.fixture(scope="module")
def endpoint(bill):
    with Endpoint(reply=bill) as running:
        yield running


@pytest.fixture
def go(tmp_path, endpoint, bill):
    """Run the recipe in a folder of its own; counts start anew."""
    endpoint.reset()
    bill.usd = 0.0
    recipe = recipe_of(endpoint.url, ROWS)

    def run(recipe=recipe, where=tmp_path, **more):
        return dk.run(recipe, outputs=where / "outputs", state=where / "state", **more)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, endpoint, bill):
    """A run that nothing caps, and what it cost."""
    folder = tmp_path_factory.mktemp("whole")
    bill.usd = 0.0
    recipe = recipe_of(endpoint.url, ROWS)
    version = dk.run(recipe, outputs=folder / "outputs", state=folder / "state")
    return version, bill.usd


def rows_of(version):
    return sum(version.manifest.splits.values())


def test_half_the_money_gives_nearly_half_of_the_pairs(go, whole, endpoint, tmp_path):
    complete, usd = whole
    with pytest.raises(Stopped, match="and may spend as much again; --finish-partial sends"):
        go(max_usd=usd / 2)
    asked = endpoint.stats()["requests"]
    version = go(finish_partial=True)
    assert endpoint.stats()["requests"] == asked
    assert version.address == "asking@1.0.0-partial.1"
    share = rows_of(version) / rows_of(complete)
    print(f"{share:.0%} of the pairs for half of the money")
    assert 0.4 <= share < 1
    manifest = version.manifest
    counts = {count.alias: count for count in manifest.funnel}
    pending = sum(count.pending for count in manifest.funnel)
    assert manifest.pending == pending == counts["judge"].pending + counts["respond"].pending > 0
    assert manifest.gate == {"rows": "pass"}
    assert not any(count.failed or count.unanswered for count in manifest.funnel)
    rejects = pl.read_parquet(version.folder / "rejects.parquet")
    waiting = rejects.filter(pl.col("reason") == "unfinished")
    assert waiting.height == pending
    assert set(waiting["step"]) <= {"respond", "judge"}
    assert waiting["transient"].all()
    assert set(waiting["kind"]) == {"Pending"}
    # Every row is in the pre-release or waits.
    assert rows_of(version) + rejects.height == ROWS


def test_a_pre_release_is_whole_in_itself_and_says_what_it_is(go, whole):
    _, usd = whole
    with pytest.raises(Stopped):
        go(max_usd=usd / 2)
    version = go(finish_partial=True)
    said = f"A partial pre-release: {version.manifest.pending} rows are pending"
    card = (version.folder / "README.md").read_text().split("---\n", 2)[2]
    assert said in "\n".join(card.splitlines()[:5])
    page = (version.folder / "report.html").read_text()
    assert said in page[page.index("<h1>") : page.index('<p class="lead strong">')]
    assert "--finish-partial" in page
    assert version.scan("ratings").collect().height >= rows_of(version)
    files = {"train": str(version.folder / "default" / "train-*.parquet")}
    cache = str(version.folder.parent.parent / "cache")
    table = load_dataset("parquet", data_files=files, cache_dir=cache)["train"]
    assert table.num_rows == version.manifest.splits["train"]
    report = json.loads((version.folder / "report.json").read_text())
    assert report["failures"]["rows"] == 0


def test_it_is_never_the_latest_and_is_found_by_its_address(go, whole, tmp_path):
    _, usd = whole
    with pytest.raises(Stopped):
        go(max_usd=usd / 2)
    first = go(finish_partial=True)
    again = go(finish_partial=True)
    assert (again.address, again.manifest) == (first.address, first.manifest)
    outputs = tmp_path / "outputs"
    assert version_numbers(outputs, "asking") == []
    assert partial_numbers(outputs, "asking") == ["1.0.0-partial.1"]
    assert not (outputs / "datasets" / "asking" / "latest.json").exists()
    assert find_version(outputs, "asking@1.0.0-partial.1") == first
    with pytest.raises(InputError, match=r"no whole version yet; .* asking@1\.0\.0-partial\.1"):
        find_version(outputs, "asking")
    with pytest.raises(InputError, match=r"known: 1\.0\.0-partial\.1"):
        find_version(outputs, "asking@1.0.0-partial.2")
    reader = {"step": "sources.dataset", "dataset": first.address, "kind": "Pair"}
    read = go({"name": "reader", "steps": [reader]})
    assert rows_of(read) == rows_of(first)


@pytest.mark.slow
def test_more_answers_make_the_next_one_and_the_whole_is_compared_with_neither(
    go, whole, endpoint, tmp_path
):
    complete, usd = whole
    for share, number in ((3, 1), (3, 2)):
        with pytest.raises(Stopped):
            go(max_usd=usd / share)
        assert go(finish_partial=True).manifest.version == f"1.0.0-partial.{number}"
    last = go()
    assert last.address == "asking@1.0.0"
    assert last.manifest.digest == complete.manifest.digest
    assert (last.manifest.parent, last.manifest.change) == (None, "first version")
    assert last.manifest.pending == 0
    assert find_version(tmp_path / "outputs", "asking") == last
    stats = endpoint.stats()
    assert stats["requests"] == stats["distinct"] == 4 * ROWS
    # Nothing is pending any more.
    assert go(finish_partial=True).manifest == last.manifest


def test_after_a_whole_version_it_takes_the_next_number(go, endpoint, tmp_path):
    small = recipe_of(endpoint.url, 40)
    before = go(small)
    grown = recipe_of(endpoint.url, 60)
    with pytest.raises(Stopped):
        go(grown, max_usd=8)
    version = go(grown, finish_partial=True)
    assert version.address == "asking@1.1.0-partial.1"
    assert version.manifest.parent.version == "1.0.0"
    assert json.loads((tmp_path / "outputs/datasets/asking/latest.json").read_text()) == {
        "version": "1.0.0"
    }
    old = dict(before.scan().select("id", "split").collect().iter_rows())
    assert old.items() <= dict(version.scan().select("id", "split").collect().iter_rows()).items()
    last = go(grown)
    assert (last.manifest.version, last.manifest.parent.version) == ("1.1.0", "1.0.0")


def test_where_no_row_is_complete_nothing_is_published(go, tmp_path):
    with pytest.raises(GateFailed, match=f"no row of 'asking' is complete yet.*{ROWS} rows wait"):
        go(finish_partial=True)
    assert not list((tmp_path / "outputs" / "datasets" / "asking").iterdir())


@pytest.mark.slow
def test_a_table_step_over_what_is_complete_does_not_poison_the_whole(go, whole, endpoint):
    _, usd = whole
    recipe = recipe_of(endpoint.url, ROWS)
    recipe["models"]["embedder"] = {"kind": "hashing"}
    recipe["steps"].insert(2, {"step": "curation.near", "threshold": 0.95, "as": "thin"})
    recipe["steps"].append({"step": "curation.exact"})
    with pytest.raises(Stopped):
        go(recipe, max_usd=usd / 6)
    early = go(recipe, finish_partial=True) if _has_rows(go, recipe) else None
    with pytest.raises(Stopped):
        go(recipe, max_usd=usd / 2)
    later = go(recipe, finish_partial=True)
    assert later.manifest.version.startswith("1.0.0-partial.")
    assert early is None or rows_of(early) < rows_of(later)
    last = go(recipe)
    stats = endpoint.stats()
    assert stats["requests"] == stats["distinct"]
    fresh = go(recipe, where=last.folder.parents[3] / "fresh")
    assert fresh.manifest.digest == last.manifest.digest
    assert fresh.manifest.rejects_digest == last.manifest.rejects_digest


def _has_rows(go, recipe):
    try:
        go(recipe, finish_partial=True)
    except GateFailed:
        return False
    return True


def test_a_third_of_the_money_is_not_overspent_and_nothing_is_paid_twice(go, whole, endpoint, bill):
    complete, usd = whole
    cap = usd / 3
    with pytest.raises(Stopped, match="is spent"):
        go(max_usd=cap)
    print(f"spent {bill.usd / cap:.3f} of the cap by the endpoint's count")
    assert 0.8 * cap < bill.usd <= 1.02 * cap
    last = go(max_usd=2 * usd)
    stats = endpoint.stats()
    assert stats["sent_again_after_ok"] == 0
    assert stats["requests"] == stats["distinct"] == 4 * ROWS
    assert bill.usd == pytest.approx(usd)
    assert last.manifest.digest == complete.manifest.digest


def test_a_cap_below_one_request_says_so(go):
    with pytest.raises(Stopped, match=r"\$0\.000010 .*one request may cost more; raise the cap"):
        go(max_usd=0.00001)


def test_a_limited_run_has_pre_releases_of_its_own(go, whole):
    _, usd = whole
    with pytest.raises(Stopped):
        go(max_usd=usd / 8, limit=40)
    assert go(finish_partial=True, limit=40).address == "asking-limit-40@1.0.0-partial.1"
