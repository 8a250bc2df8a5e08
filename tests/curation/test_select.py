"""Subset selection: budgets, quotas, rows that must stay, weights, and what is said of the rest."""

import random

import numpy as np
import pytest
from pydantic import ValidationError
from selection_twins import information
from steps_kit import EQUAL_TO_ROW_0, HASHING, applied, candidates, equal_in_parts, prompt

from datakit.curation._isa import delta_entropy, isa_order
from datakit.curation._policies import flattens_at, percentiles
from datakit.curation._room import Room, even_shares, quota_rows
from datakit.curation.select import Select
from datakit.errors import InputError
from datakit.models.embed import Hashing
from datakit.records import Candidates, Pair, Prompt

WORDS = [
    "apple",
    "bread",
    "cedar",
    "delta",
    "ember",
    "field",
    "grove",
    "harbor",
    "island",
    "lantern",
    "meadow",
    "north",
]


def texts(count, seed=0):
    """Distinct texts that share words, so that some say what others say."""
    rng = random.Random(seed)
    return [f"{place} {' '.join(rng.choices(WORDS, k=6))}" for place in range(count)]


def prompts(count, seed=0):
    return [prompt(text) for text in texts(count, seed)]


METHODS = ["entropy", "facility", "k_center", "isa", "longest", "random"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("keep", "rows", "kept"),
    [
        (1, 12, 1),
        (5, 12, 5),
        (12, 12, 12),
        (100, 12, 12),
        (0.25, 12, 3),
        (0.5, 12, 6),
        (0.99, 12, 12),
        (0.01, 12, 1),
        (0.5, 1, 1),
        (3, 0, 0),
        (0.5, 0, 0),
    ],
)
def test_a_budget_is_a_number_of_rows_or_a_share_of_them(keep, rows, kept, method, tmp_path):
    split = applied(Select(keep=keep, method=method), Prompt, prompts(rows), tmp_path)
    assert (split.kept.height, split.dropped.height) == (kept, rows - kept)


@pytest.mark.parametrize("keep", [0, -1, -0.5, 1.0, 2.5, float("inf"), float("nan")])
def test_a_budget_that_is_neither_is_refused(keep):
    with pytest.raises(ValidationError, match="keep"):
        Select(keep=keep)


def test_kept_rows_carry_their_gain_and_the_order_in_which_they_were_taken(tmp_path):
    rows = prompts(40)
    split = applied(Select(keep=15, noise=0.2), Prompt, rows, tmp_path)
    vectors = Hashing(HASHING["embedder"]).encode([row.messages[0].content for row in rows])
    place = {row.id: number for number, row in enumerate(rows)}
    kept = split.kept.sort("measure.order")
    assert kept["measure.order"].to_list() == list(range(15))
    taken = [place[row] for row in kept["id"]]
    known = [information(vectors, taken[:count], 0.2) for count in range(16)]
    assert kept["measure.gain"].to_list() == pytest.approx(np.diff(known).tolist(), abs=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_a_dropped_row_names_its_nearest_kept_row(method, tmp_path):
    rows = prompts(40)
    split = applied(Select(keep=10, method=method), Prompt, rows, tmp_path)
    vectors = Hashing(HASHING["embedder"]).encode([row.messages[0].content for row in rows])
    place = {row.id: number for number, row in enumerate(rows)}
    exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    kept = [place[row] for row in split.kept["id"]]
    assert split.dropped.height == 30
    for row in split.dropped.iter_rows(named=True):
        to_kept = exact[place[row["id"]], kept]
        assert row["similarity"] == pytest.approx(to_kept.max(), abs=1e-6)
        cosine = exact[place[row["id"]], place[row["related"]]]
        assert cosine == pytest.approx(to_kept.max(), abs=1e-6)
        assert place[row["related"]] in kept
        assert row["reason"] == "not_selected"


def drawn(rows, folder, **how):
    split = applied(Select(keep=10, method="random"), Prompt, rows, folder, **how)
    assert split.kept.columns == ["id"], "a random row has no gain"
    return set(split.kept["id"])


def test_random_rows_are_drawn_by_seed_and_alias_and_not_by_order(tmp_path):
    rows = prompts(40)
    assert drawn(rows, tmp_path, seed=1) == drawn(rows, tmp_path, seed=1)
    assert drawn(rows, tmp_path, seed=1) != drawn(rows, tmp_path, seed=2)
    assert drawn(rows, tmp_path, alias="one") != drawn(rows, tmp_path, alias="two")
    assert drawn(rows, tmp_path) == drawn(rows[::-1], tmp_path)
    assert drawn(rows, tmp_path) == drawn(random.Random(3).sample(rows, 40), tmp_path)


@pytest.mark.parametrize("kind", [Pair, Candidates])
@pytest.mark.parametrize("over", EQUAL_TO_ROW_0)
def test_over_says_what_a_row_tells(over, kind, tmp_path):
    rows = equal_in_parts(kind)
    same = EQUAL_TO_ROW_0[over]
    split = applied(Select(keep=len(rows) - len(same), over=over), kind, rows, tmp_path)
    # What row 0 and its equals tell is worth taking once.
    assert len(set(split.kept["id"]) & {rows[place].id for place in same | {0}}) == 1
    assert split.dropped["similarity"].to_list() == pytest.approx([1] * len(same))


# -- budgets, quotas, rows that must stay ---------------------------------------------------------


def many(count=60, **measured):
    """Prompts of three sources, sizes 30 : 20 : 10, with measures by row number."""
    sources = (
        ["a"] * (count // 2) + ["b"] * (count // 3) + ["c"] * (count - count // 2 - count // 3)
    )
    return [
        prompt(
            text,
            source=source,
            labels={"topic": "odd" if place % 2 else "even"},
            measures={name.replace("_", "."): value(place) for name, value in measured.items()},
        )
        for place, (text, source) in enumerate(zip(texts(count), sources, strict=True))
    ]


def kept_of(split, rows):
    kept = set(split.kept["id"])
    return [row for row in rows if row.id in kept]


def count_by(rows):
    return {one: sum(row.source == one for row in rows) for one in "abc"}


QUOTED = [*METHODS, "deita", "highest", "lowest"]


@pytest.mark.parametrize("method", QUOTED)
def test_quotas_are_met_exactly(method, tmp_path):
    rows = many(judge_score=lambda place: place % 7)
    weighed = {"weight": "judge.score"} if method in ("deita", "highest", "lowest") else {}
    step = Select(
        keep=20,
        method=method,
        quotas={"source": {"c": 0.4, "b": 3}},
        threshold=1.0,
        **weighed,
    )
    split = applied(step, Prompt, rows, tmp_path)
    assert count_by(kept_of(split, rows)) == {"a": 9, "b": 3, "c": 8}


def test_a_quota_may_be_of_a_label(tmp_path):
    rows = many()
    step = Select(keep=12, quotas={"topic": {"odd": 1.0}})
    kept = kept_of(applied(step, Prompt, rows, tmp_path), rows)
    assert [row.labels["topic"] for row in kept] == ["odd"] * 12


@pytest.mark.parametrize(
    ("quotas", "said"),
    [
        ({"c": 11}, "ask for 11 rows with source 'c', and there are 10"),
        ({"z": 0.1}, "source 'z', and there are 0"),
        ({"a": 30, "b": 20}, "ask for 50 rows, and the budget is 40"),
        ({"a": 0, "b": 5}, "leave 35 rows for other values of 'source', and there are 10"),
    ],
)
def test_quotas_that_cannot_be_met_are_refused(quotas, said, tmp_path):
    with pytest.raises(InputError, match=said):
        applied(Select(keep=40, quotas={"source": quotas}), Prompt, many(), tmp_path)


def test_a_short_value_may_be_filled_up_by_others(tmp_path):
    rows = many()
    step = Select(keep=20, quotas={"source": {"c": 15}}, short="fill")
    assert count_by(kept_of(applied(step, Prompt, rows, tmp_path), rows))["c"] == 10
    assert len(applied(step, Prompt, rows, tmp_path).kept) == 20


@pytest.mark.parametrize("method", QUOTED)
def test_rows_that_must_stay_come_first_and_count(method, tmp_path):
    rows = many(judge_score=lambda place: place % 7)
    weighed = {"weight": "judge.score"} if method in ("deita", "highest", "lowest") else {}
    must = {"source": ("c",), "topic": ("odd",)}
    step = Select(keep=15, method=method, must_keep=must, threshold=1.0, **weighed)
    split = applied(step, Prompt, rows, tmp_path)
    wanted = {row.id for row in rows if row.source == "c" and row.labels["topic"] == "odd"}
    assert wanted <= set(split.kept["id"])
    assert split.kept.height == 15
    if method != "random":
        assert set(split.kept.sort("measure.order")["id"][: len(wanted)]) == wanted


def test_too_many_rows_that_must_stay_are_refused(tmp_path):
    with pytest.raises(InputError, match="names 30 rows, and the budget is 20"):
        applied(Select(keep=20, must_keep={"source": ("a",)}), Prompt, many(), tmp_path)
    step = Select(keep=20, must_keep={"source": ("c",)}, quotas={"source": {"c": 5}})
    with pytest.raises(InputError, match="names 10 rows of value 'c', and the quota is 5"):
        applied(step, Prompt, many(), tmp_path)
    step = Select(tokens=30, must_keep={"source": ("c",)})
    with pytest.raises(InputError, match="`must_keep` have 93 tokens, and the budget is 30"):
        applied(step, Prompt, many(), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_tokens_is_filled_and_never_passed(method, tmp_path):
    rows = many()
    split = applied(Select(tokens=100, method=method), Prompt, rows, tmp_path)
    # Seven words a row: 28/3 tokens.
    assert split.kept.height == 10


def test_tokens_may_be_a_measure_and_a_row_that_does_not_fit_is_passed_over(tmp_path):
    rows = many(count_tokens=lambda place: 50 if place % 7 == 6 else 8, judge_score=lambda p: p % 7)
    step = Select(tokens=100, tokens_by="count.tokens", method="highest", weight="judge.score")
    kept = kept_of(applied(step, Prompt, rows, tmp_path), rows)
    costs = [row.measures["count.tokens"] for row in kept]
    assert sum(costs) <= 100
    assert 100 - sum(costs) < 8
    assert costs.count(50) == 2 or costs.count(8) > 5
    with pytest.raises(InputError, match=r"have no measure 'no\.tokens'"):
        applied(Select(tokens=9, tokens_by="no.tokens"), Prompt, rows, tmp_path)
    with pytest.raises(InputError, match="has room for no row; the shortest has 9"):
        applied(Select(tokens=5), Prompt, rows, tmp_path)


def test_quotas_bound_the_tokens_of_a_value(tmp_path):
    rows = many()
    step = Select(tokens=200, quotas={"source": {"a": 0.25, "b": 2}})
    kept = count_by(kept_of(applied(step, Prompt, rows, tmp_path), rows))
    assert kept["a"] == 5
    assert kept["b"] == 2
    assert kept["c"] == 10


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "either `keep` or `tokens`"),
        ({"keep": 3, "tokens": 9}, "either `keep` or `tokens`"),
        ({"keep": 3, "tokens_by": "x"}, "belongs to `tokens`"),
        ({"keep": 3, "method": "deita"}, "needs `weight"),
        ({"keep": 3, "floor": 1.0}, "needs `weight"),
        ({"keep": 3, "method": "random", "weight": "x"}, "goes by no weight"),
        ({"keep": 3, "quotas": {"source": {"a": 1.5}}}, "neither a number of rows nor a share"),
        ({"keep": 3, "quotas": {"source": {"a": -1}}}, "neither a number of rows nor a share"),
        ({"keep": 3, "quotas": {"source": {"a": 0.6, "b": 0.6}}}, "over 1"),
        ({"keep": 3, "quotas": {"source": {}, "topic": {}}}, "at most 1"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, said):
    with pytest.raises(ValidationError, match=said):
        Select(**fields)


# -- weights and policies -------------------------------------------------------------------------


def test_weights_are_multiplied_and_a_row_without_one_is_last(tmp_path):
    rows = many(one_x=lambda place: place, two_x=lambda place: 1 if place < 30 else 0)
    rows = [*rows, prompt("a row with no measure")]
    step = Select(keep=5, method="highest", weight=("one.x", "two.x"))
    kept = kept_of(applied(step, Prompt, rows, tmp_path), rows)
    assert [row.measures["one.x"] for row in kept] == [25, 26, 27, 28, 29]
    with pytest.raises(InputError, match=r"no row has the measure 'no\.x'"):
        applied(Select(keep=5, method="lowest", weight="no.x"), Prompt, rows, tmp_path)


def test_a_floor_and_a_list_of_values_shut_rows_out_and_say_so(tmp_path):
    rows = many(judge_score=lambda place: place)
    step = Select(keep=50, floor=39.0, weight="judge.score", only={"topic": ("odd",)})
    split = applied(step, Prompt, rows, tmp_path)
    assert [row.measures["judge.score"] for row in kept_of(split, rows)] == list(range(41, 60, 2))
    why = set(split.dropped["detail"])
    assert why == {"its weight is not over the floor of 39", "`only` does not list its topic"}


def test_magpie_keeps_the_longest_answers_of_prompts_that_end(tmp_path):
    questions = ["one", "two:", "three", "four"]
    rows = [candidates(one, "x" * (10 + place)) for place, one in enumerate(questions)]
    split = applied(Select(keep=2, method="magpie_longest"), Candidates, rows, tmp_path)
    assert set(split.kept["id"]) == {rows[2].id, rows[3].id}
    why = dict(zip(split.dropped["id"], split.dropped["detail"], strict=True))
    assert why[rows[1].id] == "its prompt ends in a colon"
    with pytest.raises(InputError, match="goes by answers"):
        applied(Select(keep=2, method="magpie_longest"), Prompt, prompts(4), tmp_path)


def test_deita_says_when_a_row_is_too_like_one_that_stays(tmp_path):
    rows = [
        prompt("the same words", origin=str(place), measures={"q.x": float(place)})
        for place in range(3)
    ]
    rows.append(prompt("something else altogether", measures={"q.x": 0.5}))
    split = applied(Select(keep=3, method="deita", weight="q.x"), Prompt, rows, tmp_path)
    assert set(split.kept["id"]) == {rows[2].id, rows[3].id}
    assert split.dropped["detail"].unique().to_list() == [
        "a row that stays has a cosine of over 0.9 to it"
    ]
    assert split.dropped["related"].to_list() == [rows[2].id] * 2


def test_isa_carries_what_it_ranks_by(tmp_path):
    rows = many()
    signed = applied(Select(keep=10, method="isa"), Prompt, rows, tmp_path).kept
    absolute = applied(Select(keep=10, method="isa", order="absolute"), Prompt, rows, tmp_path).kept
    everything = applied(Select(keep=60, method="isa"), Prompt, rows, tmp_path).kept
    likely = everything.sort("measure.log_likelihood")["id"]
    assert set(signed["id"]) == set(likely[:10])
    assert set(absolute["id"]) == set(likely[-10:])
    assert sorted(signed["measure.rank"]) == list(range(10))
    scaled = everything["measure.log_likelihood"].to_numpy()
    assert everything["measure.delta_entropy"].to_numpy() == pytest.approx(delta_entropy(scaled))


@pytest.mark.parametrize("method", QUOTED)
@pytest.mark.parametrize("is_weighed", [False, True])
def test_the_order_of_the_rows_does_not_matter(method, is_weighed, tmp_path):
    rows = many(judge_score=lambda place: place % 3)
    rows += [row.identified(f"again {place}") for place, row in enumerate(rows[:20])]
    if method in ("longest", "random"):
        weighed = {}
    else:
        must_weigh = method in ("deita", "highest", "lowest")
        weighed = {"weight": "judge.score"} if is_weighed or must_weigh else {}
    step = Select(keep=25, method=method, **weighed)
    one = applied(step, Prompt, rows, tmp_path)
    other = applied(step, Prompt, random.Random(1).sample(rows, len(rows)), tmp_path)
    assert one.kept.sort("id").equals(other.kept.sort("id"))
    assert one.dropped.sort("id").equals(other.dropped.sort("id"))


@pytest.mark.parametrize("method", METHODS)
def test_empty_texts_are_alike_and_harmless(method, tmp_path):
    rows = [candidates(f"question {place}", "") for place in range(5)]
    rows += [candidates(f"other {place}", f"an answer {place}") for place in range(5)]
    split = applied(Select(keep=4, method=method, over="response"), Candidates, rows, tmp_path)
    assert (split.kept.height, split.dropped.height) == (4, 6)
    if method in ("entropy", "facility", "k_center"):
        empty = {row.id for row in rows[:5]}
        assert len(empty & set(split.kept["id"])) == 1


# -- pure functions -------------------------------------------------------------------------------


def test_shares_of_one_sum_to_the_total():
    for total in range(50):
        rows = even_shares({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, total)
        assert sum(rows.values()) == total
        assert max(rows.values()) - min(rows.values()) <= 1


def test_quota_rows_leave_the_rest_to_others():
    present = {"a": 5, "b": 9, None: 4}
    assert quota_rows("x", {"a": 0.5}, present, 6, "refuse") == ({"a": 3}, 3)
    assert quota_rows("x", {"a": 8}, present, 8, "fill") == ({"a": 5}, 3)


def test_a_room_closes_what_no_longer_fits():
    room = Room(np.array([0, 0, 1]), np.array([9, 9]), np.array([5.0, 9, 2]), None, 12)
    room.take(0)
    assert room.open.tolist() == [False, False, True]


def test_percentiles_share_ties_and_put_nothing_last():
    values = np.array([3.0, 1, 3, np.nan, 2])
    assert percentiles(values).tolist() == [0.875, 0.25, 0.875, 0.0, 0.5]
    assert percentiles(np.array([7.0])).tolist() == [1]


def test_a_curve_flattens_at_its_knee():
    assert flattens_at([10] * 5 + [0.1] * 95) == 5
    assert flattens_at([1.0] * 10) == 10
    assert flattens_at([]) == 0
    assert flattens_at([3.0]) == 1
    assert flattens_at([0.0, 0.0]) == 2


def test_isa_orders_are_the_two_readings():
    likely = np.array([-5.0, -1, -3, -1])
    assert isa_order(likely, "signed").tolist() == [0, 2, 1, 3]
    assert isa_order(likely, "absolute").tolist() == [1, 3, 2, 0]


def test_even_quotas_give_every_value_the_same_where_they_can(tmp_path):
    rows = many()
    for keep, wanted in ((21, [7, 7, 7]), (40, [15, 15, 10]), (60, [30, 20, 10])):
        split = applied(Select(keep=keep, quotas={"source": "even"}), Prompt, rows, tmp_path)
        assert list(count_by(kept_of(split, rows)).values()) == wanted
    split = applied(Select(tokens=90, quotas={"source": "even"}), Prompt, rows, tmp_path)
    assert list(count_by(kept_of(split, rows)).values()) == [3, 3, 3]
    with pytest.raises(ValidationError, match="neither `even` nor quotas by value"):
        Select(keep=3, quotas={"source": "odd"})


def test_one_value_needs_no_list(tmp_path):
    rows = many()
    split = applied(Select(keep=12, must_keep={"source": "c"}), Prompt, rows, tmp_path)
    assert count_by(kept_of(split, rows))["c"] >= 10
