"""A step's decision applied to the rows of a part."""

import polars as pl
import pytest
from steps_kit import prompt

from datakit.records import Prompt
from datakit.rows import decided
from datakit.step import Split
from datakit.tables import from_frame, to_frame

ROWS = [prompt(f"question {number}").identified(f"{number}") for number in range(7)]


@pytest.mark.parametrize("places", [(), (0,), (1, 4), (6, 2), tuple(range(7))])
def test_only_rows_that_a_step_rewrote_become_others_and_all_keep_their_place(places):
    frame = to_frame(Prompt, ROWS)
    new = to_frame(
        Prompt,
        [prompt(f"masked {place}") if place in places else row for place, row in enumerate(ROWS)],
    )
    kept = frame.select("id").with_columns(new["messages"])
    lost = pl.DataFrame(schema={"id": pl.String(), "reason": pl.String()})
    found = from_frame(Prompt, decided(frame, Split(kept, lost), "mask", Prompt)[0])
    for place, (row, was) in enumerate(zip(found, ROWS, strict=True)):
        if place in places:
            assert row.messages[-1].content == f"masked {place}"
            assert row.id != was.id
            assert row.parents == (was.id,)
        else:
            assert row == was
