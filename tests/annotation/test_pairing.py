"""From verdicts to pairs: margins, ties, and who may be chosen."""

import itertools

import pytest
from pydantic import ValidationError
from steps_kit import candidates, each

from datakit.annotation.pair import Pairing
from datakit.errors import Rejected
from datakit.records import Judged, Response, Verdict

SCORES = {"first": (1.0, 0.0), "tie": (0.5, 0.5), "second": (0.0, 1.0)}


def seen(first, second, won, judge="j", form="pairwise"):
    return Verdict(judge=judge, template="t", form=form, shown=(first, second), scores=SCORES[won])


def both(better, worse):
    """A win in both orders."""
    return [seen(better, worse, "first"), seen(worse, better, "second")]


def judged(answers, verdicts):
    row = candidates("Why?", *answers)
    made = Judged(prompt=row.prompt, responses=row.responses, verdicts=tuple(verdicts))
    return made.identified("x")


def paired(row, folder, **fields):
    return each(Pairing(**fields), row, folder, {}, alias="pair")


def sides(pairs):
    return [(pair.chosen[0].content, pair.rejected[0].content) for pair in pairs]


def cut(text):
    return Response(text=text, finish_reason="length")


THREE = ("good", "fair", "poor")
IN_ORDER = [*both(0, 1), *both(1, 2), *both(0, 2)]


@pytest.mark.parametrize(
    ("verdicts", "chosen", "rejected"),
    [
        (both(0, 1), 1.0, 0.0),
        (both(1, 0), 1.0, 0.0),
        ([seen(0, 1, "first")], 1.0, 0.0),
        ([seen(0, 1, "first"), seen(1, 0, "tie")], 0.75, 0.25),
        ([*both(0, 1), seen(0, 1, "second", "k"), seen(1, 0, "second", "k")], 0.75, 0.25),
        ([*both(0, 1), *both(0, 1), *both(1, 0)], 2 / 3, 1 / 3),
    ],
)
def test_scores_margin_and_strength_are_those_of_the_verdicts(verdicts, chosen, rejected, tmp_path):
    (pair,) = paired(judged(("one", "two"), verdicts), tmp_path)
    assert pair.measures == pytest.approx(
        {
            "pair.score.chosen": chosen,
            "pair.score.rejected": rejected,
            "pair.margin": chosen - rejected,
        }
    )
    assert pair.strength == pair.measures["pair.margin"]
    assert pair.signed == ("pair.margin",)
    assert pair.pair_kind == "response"
    (better, worse) = ("two", "one") if verdicts == both(1, 0) else ("one", "two")
    assert sides([pair]) == [(better, worse)]


def test_best_worst_pairs_the_ends(tmp_path):
    assert sides(paired(judged(THREE, IN_ORDER), tmp_path)) == [("good", "poor")]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_ends_do_not_depend_on_where_the_responses_stand(order, tmp_path):
    place = {old: new for new, old in enumerate(order)}
    verdicts = [
        verdict.model_copy(update={"shown": tuple(place[one] for one in verdict.shown)})
        for verdict in IN_ORDER
    ]
    row = judged([THREE[old] for old in order], verdicts)
    assert sides(paired(row, tmp_path)) == [("good", "poor")]
    assert set(sides(paired(row, tmp_path, build="all"))) == {
        ("good", "fair"),
        ("good", "poor"),
        ("fair", "poor"),
    }


@pytest.mark.parametrize(
    ("min_margin", "pairs"), [(0, 3), (0.25, 3), (0.49, 3), (0.5, 1), (0.99, 1)]
)
def test_all_pairs_every_two_that_differ_by_more_than_the_margin(min_margin, pairs, tmp_path):
    made = paired(judged(THREE, IN_ORDER), tmp_path, build="all", min_margin=min_margin)
    assert len(made) == pairs
    assert all(pair.measures["pair.margin"] > min_margin for pair in made)


@pytest.mark.parametrize("build", ["best_worst", "all"])
@pytest.mark.parametrize(
    ("verdicts", "min_margin"),
    [
        ([seen(0, 1, "tie"), seen(1, 0, "tie")], 0),
        ([seen(0, 1, "first"), seen(1, 0, "first")], 0),  # the order decides: no preference
        ([*both(0, 1), seen(0, 1, "second", "k"), seen(1, 0, "first", "k")], 0),
        ([seen(0, 1, "first"), seen(1, 0, "tie")], 0.5),
        ([seen(0, 1, "first"), seen(1, 0, "tie")], 0.7),
    ],
)
def test_a_tie_is_no_pair(verdicts, min_margin, build, tmp_path):
    with pytest.raises(Rejected) as caught:
        paired(judged(("one", "two"), verdicts), tmp_path, build=build, min_margin=min_margin)
    assert caught.value.reason == "tie"
    assert f"not by more than {min_margin:g}" in caught.value.detail


def test_equal_texts_are_no_pair_whatever_the_verdicts(tmp_path):
    row = judged(("same", "same", "another"), [*both(0, 1), *both(0, 2), *both(2, 1)])
    pairs = sides(paired(row, tmp_path, build="all"))
    assert pairs == [("same", "another"), ("another", "same")]
    with pytest.raises(Rejected, match="tie"):
        paired(judged(("same", "same"), both(0, 1)), tmp_path)


@pytest.mark.parametrize("build", ["best_worst", "all"])
@pytest.mark.parametrize(
    ("answers", "verdicts", "scored"),
    [
        (("one", "two"), [], 0),
        (("one",), [], 0),
        (("one", "two"), [seen(0, 1, "first", form="rating")], 0),
        (("one", "two"), [seen(0, 1, "first", form="ranking")], 0),
    ],
)
def test_without_pairwise_verdicts_a_row_is_unjudged(answers, verdicts, scored, build, tmp_path):
    with pytest.raises(Rejected) as caught:
        paired(judged(answers, verdicts), tmp_path, build=build)
    assert caught.value.reason == "unjudged"
    assert caught.value.detail == f"{scored} of {len(answers)} have verdicts"


def test_a_response_that_was_never_judged_is_in_no_pair(tmp_path):
    row = judged(("unseen", "one", "two"), both(2, 1))
    assert sides(paired(row, tmp_path, build="all")) == [("two", "one")]


@pytest.mark.parametrize("build", ["best_worst", "all"])
def test_where_only_cut_answers_are_better_the_row_is_dropped(build, tmp_path):
    row = judged((cut("one"), "two"), both(0, 1))
    with pytest.raises(Rejected) as caught:
        paired(row, tmp_path, build=build)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize(
    ("answers", "build", "pairs"),
    [
        ((cut("good"), "fair", "poor"), "best_worst", [("fair", "poor")]),
        ((cut("good"), "fair", "poor"), "all", [("fair", "poor")]),
        (("good", cut("fair"), "poor"), "best_worst", [("good", "poor")]),
        (("good", cut("fair"), "poor"), "all", [("good", "fair"), ("good", "poor")]),
        (("good", "fair", cut("poor")), "best_worst", [("good", "poor")]),
        ((cut("good"), "fair", cut("poor")), "all", [("fair", "poor")]),
    ],
)
def test_a_cut_answer_may_be_rejected_and_is_never_chosen(answers, build, pairs, tmp_path):
    assert sides(paired(judged(answers, IN_ORDER), tmp_path, build=build)) == pairs


def test_a_pair_says_how_its_answers_were_made(tmp_path):
    good = Response(
        text="good", model="x", sampling='{"top_p":1}', finish_reason="stop", reasoning="hm"
    )
    (pair,) = paired(judged((cut("bad"), good), both(1, 0)), tmp_path)
    assert pair.chosen_from.model_dump() == good.model_dump(exclude={"text", "measures"})
    assert pair.rejected_from.finish_reason == "length"
    assert [turn.role for turn in (*pair.chosen, *pair.rejected)] == ["assistant"] * 2


@pytest.mark.parametrize("build", ["best_worst", "all"])
def test_swapping_a_pair_turns_its_scores_and_its_margin_alike(build, tmp_path):
    pairs = paired(judged(THREE, IN_ORDER), tmp_path, build=build)
    for pair in pairs:
        other = pair.swap()
        assert sides([other]) == [(pair.rejected[0].content, pair.chosen[0].content)]
        assert other.measures == {
            "pair.score.chosen": pair.measures["pair.score.rejected"],
            "pair.score.rejected": pair.measures["pair.score.chosen"],
            "pair.margin": -pair.measures["pair.margin"],
        }
        difference = other.measures["pair.score.chosen"] - other.measures["pair.score.rejected"]
        assert other.measures["pair.margin"] == difference
        assert other.strength == pair.strength
        assert other.pair_key == pair.pair_key
        assert other.swap() == pair.identified(pair.origin)


@pytest.mark.parametrize("min_margin", [-0.1, 1, 2])
def test_a_margin_is_a_difference_of_scores(min_margin):
    with pytest.raises(ValidationError, match="min_margin"):
        Pairing(min_margin=min_margin)
