"""Exact duplicates: what folds, who stays, what is named."""

import random

import pytest
from steps_kit import EQUAL_TO_ROW_0, applied, candidates, equal_in_parts, pair, prompt, user

from datakit.curation.exact import Exact
from datakit.errors import InputError
from datakit.records import Candidates, Pair, Prompt


def dropped_for(split):
    return dict(zip(split.dropped["id"], split.dropped["related"], strict=True))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello world", "hello WORLD"),
        ("Straße", "STRASSE"),
        ("Ｈｅｌｌｏ　ｗｏｒｌｄ", "hello world"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("ﬁne office", "fine office"),
        ("cafe\u0301", "caf\u00e9"),
        ("Hello, world!", "hello world"),
        ("¿Qué tal?", "qué tal"),
        ("“Quoted” – text…", '"quoted" - text...'),
        ("  two   spaces\n\tand\u00a0tabs ", "two spaces and tabs"),
        ("one\r\ntwo", "one two"),
        ("你好，世界！", "你好 世界"),
        ("...", " ... "),
        ("+", " +\n"),
        ("", " \t\n"),
    ],
)
def test_case_width_punctuation_and_spaces_fold(one, other, tmp_path):
    # As answers, since a prompt may not be empty.
    first, second = (
        candidates(f"question {place}", text) for place, text in enumerate((one, other))
    )
    split = applied(Exact(over="response"), Candidates, [first, second], tmp_path)
    assert dropped_for(split) == {second.id: first.id}


@pytest.mark.parametrize(
    "texts",
    [
        ("+", "-", "=", "?", "🙂", "🙁"),
        ("a", "а", "α", "ａ́"),  # Latin, Cyrillic, Greek, with an accent
        ("hello", "مرحبا", "привет", "你好", "こんにちは", "안녕하세요", "नमस्ते", "שלום"),
        ("resume", "résumé"),
        ("one two", "onetwo", "two one"),
        ("10", "1 0", "１"),
    ],
)
def test_texts_that_say_different_things_all_stay(texts, tmp_path):
    rows = [prompt(text) for text in texts]
    split = applied(Exact(), Prompt, rows, tmp_path)
    assert sorted(split.kept["id"]) == sorted(row.id for row in rows)
    assert split.dropped.is_empty()


TEXTS = ("Say hello", "say HELLO!!!", "other", "Say  hello?", "Other.", "third")


@pytest.mark.parametrize(("keep", "stays"), [("first", {0, 2, 5}), ("longest", {1, 4, 5})])
def test_one_of_each_group_stays_and_the_others_name_it(keep, stays, tmp_path):
    rows = [prompt(text) for text in TEXTS]
    split = applied(Exact(keep=keep), Prompt, rows, tmp_path)
    assert set(split.kept["id"]) == {rows[place].id for place in stays}
    groups = ({0, 1, 3}, {2, 4}, {5})
    expected = {
        rows[place].id: rows[(group & stays).copy().pop()].id
        for group in groups
        for place in group - stays
    }
    assert dropped_for(split) == expected
    assert set(split.dropped["reason"]) == {"exact_duplicate"}
    assert set(split.dropped["similarity"]) == {1.0}
    assert set(split.dropped["detail"]) == {"same prompt as a row that stays"}


def test_of_equally_long_rows_the_one_with_the_smaller_id_stays(tmp_path):
    rows = [prompt(text) for text in ("b a!", "b a?", "B A.")]
    split = applied(Exact(keep="longest"), Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [min(row.id for row in rows)]


def test_the_row_that_stays_knows_how_many_said_the_same(tmp_path):
    rows = [prompt(text) for text in TEXTS]
    split = applied(Exact(), Prompt, rows, tmp_path)
    assert split.kept["measure.cluster_size"].to_list() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_stays_whatever_the_order_of_the_rows(seed, tmp_path):
    rows = [prompt(f"Word{'!' * place} {place % 4}") for place in range(24)]
    expected = applied(Exact(keep="longest"), Prompt, rows, tmp_path)
    random.Random(seed).shuffle(rows)
    shuffled = applied(Exact(keep="longest"), Prompt, rows, tmp_path)
    assert set(shuffled.kept["id"]) == set(expected.kept["id"])
    assert dropped_for(shuffled) == dropped_for(expected)


@pytest.mark.parametrize("kind", [Pair, Candidates])
@pytest.mark.parametrize("over", EQUAL_TO_ROW_0)
def test_over_says_which_part_of_a_row_is_compared(over, kind, tmp_path):
    rows = equal_in_parts(kind)
    split = applied(Exact(over=over), kind, rows, tmp_path)
    assert dropped_for(split) == {rows[place].id: rows[0].id for place in EQUAL_TO_ROW_0[over]}


@pytest.mark.parametrize(("over", "dropped"), [("prompt", 0), ("response", 1), ("row", 0)])
def test_both_prompts_of_a_pair_of_prompts_are_compared(over, dropped, tmp_path):
    rows = [
        pair("q", "a", "a", origin=other, pair_kind="prompt", prompt_rejected=user(other))
        for other in ("worse", "worst")
    ]
    assert applied(Exact(over=over), Pair, rows, tmp_path).dropped.height == dropped


def test_prompts_have_no_responses_to_be_equal_in(tmp_path):
    with pytest.raises(InputError, match="over: response"):
        applied(Exact(over="response"), Prompt, [prompt("same")], tmp_path)


@pytest.mark.parametrize("keep", ["first", "longest"])
def test_an_empty_table_stays_empty(keep, tmp_path):
    split = applied(Exact(keep=keep), Prompt, [], tmp_path)
    assert (split.kept.height, split.dropped.height) == (0, 0)
