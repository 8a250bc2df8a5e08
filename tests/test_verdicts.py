"""Estimators over verdicts, by hand."""

import pytest

from datakit.records import Verdict
from datakit.verdicts import first_share, flip_share, mean_scores

SCORES = {"first": (1.0, 0.0), "tie": (0.5, 0.5), "second": (0.0, 1.0)}


def seen(first, second, won, judge="j", aspect="overall", template="t"):
    """A verdict on two responses; `won`: first, tie or second as shown."""
    return Verdict(
        judge=judge,
        template=template,
        form="pairwise",
        aspect=aspect,
        shown=(first, second),
        scores=SCORES[won],
    )


RATING = Verdict(judge="j", template="t", form="rating", shown=(0,), scores=(7,), scale="1-10")
RANKING = Verdict(judge="j", template="t", form="ranking", shown=(1, 0, 2), scores=(1, 2, 3))


@pytest.mark.parametrize(
    ("verdicts", "responses", "means"),
    [
        ([], 2, [None, None]),
        ([], 0, []),
        ([RATING, RANKING], 3, [None, None, None]),
        ([seen(0, 1, "first")], 3, [1, 0, None]),
        ([seen(1, 0, "first")], 2, [0, 1]),
        ([seen(0, 1, "tie")], 2, [0.5, 0.5]),
        ([seen(0, 1, "first"), seen(1, 0, "second")], 2, [1, 0]),
        ([seen(0, 1, "first"), seen(1, 0, "first")], 2, [0.5, 0.5]),
        ([seen(0, 1, "first"), seen(1, 0, "tie")], 2, [0.75, 0.25]),
        ([seen(0, 1, "first"), seen(1, 2, "first"), seen(2, 0, "tie")], 3, [0.75, 0.5, 0.25]),
        (
            [seen(0, 1, "first", "j"), seen(0, 1, "second", "k"), seen(0, 1, "first", "l")],
            2,
            [2 / 3, 1 / 3],
        ),
        (
            [seen(0, 1, "first", aspect="help"), seen(0, 1, "tie", aspect="harm"), RATING],
            2,
            [0.75, 0.25],
        ),
    ],
)
def test_a_mean_score_counts_wins_and_half_of_ties_over_all_that_show_the_response(
    verdicts, responses, means
):
    assert mean_scores(verdicts, responses) == pytest.approx(means)


@pytest.mark.parametrize(
    ("verdicts", "share"),
    [
        ([], None),
        ([RATING], None),
        ([seen(0, 1, "tie"), seen(1, 0, "tie")], None),
        ([seen(0, 1, "first"), seen(1, 0, "first")], 1),
        ([seen(0, 1, "second"), seen(1, 0, "second")], 0),
        ([seen(0, 1, "first"), seen(1, 0, "second")], 0.5),
        ([seen(0, 1, "first"), seen(1, 0, "tie"), RATING], 1),
        ([seen(0, 1, "first", "j"), seen(1, 0, "second", "k"), seen(0, 1, "second", "k")], 1 / 3),
    ],
)
def test_first_share_counts_decided_verdicts_for_what_was_shown_first(verdicts, share):
    assert first_share(verdicts) == pytest.approx(share)


@pytest.mark.parametrize(
    ("verdicts", "share"),
    [
        ([], None),
        ([seen(0, 1, "first")], None),
        ([seen(0, 1, "first"), seen(0, 1, "second")], None),  # one order only
        ([seen(0, 1, "first"), seen(1, 0, "first")], 1),
        ([seen(1, 0, "second"), seen(0, 1, "second")], 1),
        ([seen(0, 1, "first"), seen(1, 0, "second")], 0),
        ([seen(0, 1, "first"), seen(1, 0, "tie")], 0),
        ([seen(0, 1, "tie"), seen(1, 0, "tie")], 0),
        ([seen(0, 1, "first"), seen(1, 0, "first"), seen(0, 2, "tie"), seen(2, 0, "tie")], 0.5),
        ([seen(0, 1, "first"), seen(1, 0, "first"), seen(2, 1, "first")], 1),
        ([seen(0, 1, "first", "j"), seen(1, 0, "first", "k")], None),
        ([seen(0, 1, "first", aspect="help"), seen(1, 0, "first", aspect="harm")], None),
        ([seen(0, 1, "first", template="t"), seen(1, 0, "first", template="u")], None),
        (
            [
                seen(0, 1, "first", "j"),
                seen(1, 0, "first", "j"),
                seen(0, 1, "first", "k"),
                seen(1, 0, "second", "k"),
            ],
            0.5,
        ),
        ([seen(0, 1, "first"), seen(1, 0, "first"), RATING, RANKING], 1),
    ],
)
def test_flip_share_counts_pairs_whose_winner_changes_with_the_order(verdicts, share):
    assert flip_share(verdicts) == pytest.approx(share)
