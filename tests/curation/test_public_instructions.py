"""Exact and near duplicates in 21,000 public instructions, against plain ways to find them."""

import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from steps_kit import HASHING, applied, prompt

from datakit.curation.exact import Exact
from datakit.curation.near import Near
from datakit.models.embed import Hashing
from datakit.records import Prompt
from datakit.text import normalise

DATA = Path(__file__).parents[3] / "shared" / "data" / "instructions_mixed.parquet"
pytestmark = pytest.mark.data
THRESHOLD = 0.95


@pytest.fixture(scope="module")
def rows():
    if not DATA.is_file():
        pytest.skip("the public data sets are not beside the checkout")
    texts = pl.read_parquet(DATA, columns=["instruction"])["instruction"].drop_nulls()
    return [prompt(text, origin=str(i)) for i, text in enumerate(texts) if text.strip()]


def same_text(texts):
    """Sets of places whose texts fold to the same, of two or more."""
    found = {}
    for place, text in enumerate(texts):
        found.setdefault(normalise(text), []).append(place)
    return {frozenset(places) for places in found.values() if len(places) > 1}


def chained(texts):
    """Sets of places that chains of cosines of at least THRESHOLD join, in float64."""
    vectors = Hashing(HASHING["embedder"]).encode(texts).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-300)
    root = list(range(len(texts)))

    def head(place):
        while root[place] != place:
            place = root[place]
        return place

    for start in range(0, len(vectors), 1_000):
        one, other = np.nonzero(vectors[start : start + 1_000] @ vectors.T >= THRESHOLD)
        for first, second in zip((one + start).tolist(), other.tolist(), strict=True):
            if first < second and head(first) != head(second):
                root[head(second)] = head(first)
    found = {}
    for place in range(len(texts)):
        found.setdefault(head(place), []).append(place)
    return {frozenset(places) for places in found.values() if len(places) > 1}


@pytest.mark.parametrize(
    ("step", "plain", "least"),
    [
        (Exact(keep="longest"), same_text, 300),
        (Near(keep="longest", threshold=THRESHOLD), chained, 300),
    ],
    ids=["exact", "near"],
)
def test_every_cluster_is_the_plain_one_and_keeps_exactly_one_row(
    step, plain, least, rows, tmp_path
):
    split = applied(step, Prompt, rows, tmp_path)
    place = {row.id: number for number, row in enumerate(rows)}
    found = {}
    for lost, kept in split.dropped.select("id", "related").iter_rows():
        found.setdefault(kept, {place[kept]}).add(place[lost])
    assert set(found) <= set(split.kept["id"])
    assert {frozenset(places) for places in found.values()} == plain(
        [row.messages[-1].content for row in rows]
    )
    assert split.dropped.height >= least
    shuffled = random.Random(1).sample(rows, len(rows))
    again = applied(step, Prompt, shuffled, tmp_path)
    assert set(again.kept["id"]) == set(split.kept["id"])
    columns = ["id", "related", "similarity"]
    assert again.dropped.sort("id")[columns].equals(split.dropped.sort("id")[columns])
