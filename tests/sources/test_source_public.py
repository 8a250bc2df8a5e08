"""The public sets beside the checkout: every row is accounted for."""

from collections import Counter
from pathlib import Path

import polars as pl
import pytest

DATA = Path(__file__).parents[3] / "shared" / "data"
HH = DATA / "hh_rlhf_pairs.parquet"
OASST = DATA / "oasst_multimodel_responses.parquet"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not DATA.is_dir(), reason="the public data sets are not beside the checkout"
    ),
]


def test_hh_pairs(run):
    out = run(
        "sources.parquet",
        path=str(HH),
        kind="Pair",
        license="MIT",
        columns={"key": "pair_id", "labels": ["split"]},
    )
    assert out.rows_in == 5_803
    reasons = Counter(row["reason"] for row in out.dropped)
    assert reasons == {"empty_text": 4 + 7, "invalid_row": 6 + 4}
    sides = Counter(row["detail"].split("'")[1] for row in out.dropped if "empty" in row["detail"])
    assert sides == {"chosen": 4, "rejected": 7}
    ends = [row["detail"] for row in out.dropped if row["reason"] == "invalid_row"]
    assert sum("prompt ends in a 'assistant' turn" in one for one in ends) == 6
    assert sum("chosen equals rejected" in one for one in ends) == 4

    given = {row["pair_id"]: row for row in pl.read_parquet(HH).iter_rows(named=True)}
    origins = {row.origin.removeprefix("key:").removesuffix("#1"): row for row in out.kept}
    lost = {row["raw"].split('"pair_id":"')[1].split('"')[0] for row in out.dropped}
    assert origins.keys() | lost == given.keys()
    for key, row in origins.items():
        source = given[key]
        assert row.chosen[0].content == source["chosen"]
        assert row.rejected[0].content == source["rejected"]
        assert row.labels == {"split": source["split"]}
        marks = {"user": "Human: ", "assistant": "Assistant: "}
        again = "\n\n".join(marks[turn.role] + turn.content for turn in row.prompt)
        assert again == source["prompt"]
    assert sum(row["chosen"] == row["rejected"] for row in given.values()) == 4


def test_oasst_candidates(run):
    out = run(
        "sources.parquet",
        path=str(OASST),
        kind="Candidates",
        group_by="prompt_id",
        columns={"sampling": ["temperature", "top_p", "do_sample"]},
    )
    assert not out.dropped
    assert len(out.kept) == 250
    texts = Counter(
        (row.prompt[0].content, one.model, one.text) for row in out.kept for one in row.responses
    )
    given = pl.read_parquet(OASST).select("prompt", "model", "response").iter_rows()
    assert texts == Counter(given)
