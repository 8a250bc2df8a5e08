"""Repetition: the vectorised measures against plain twins, and the bounds over them."""

from collections import Counter

import polars as pl
import pytest
from filters_kit import HOSTILE, measured, reasons, run, whatever_the_order
from hypothesis import given, settings
from hypothesis import strategies as st
from steps_kit import candidates, pair, prompt

from datakit.curation import repetition as module
from datakit.curation.repetition import Repetition, repetition
from datakit.errors import InputError
from datakit.records import Candidates, Pair, Prompt

# -- twins, of texts whose words stand between single spaces and line feeds ----------------------


def lines_twin(text):
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    again = [line for place, line in enumerate(lines) if line in lines[:place]]
    characters = sum(map(len, lines))
    if not lines:
        return 0, 0
    return len(again) / len(lines), sum(map(len, again)) / characters


def covered(words, starts, n):
    marked = {place for start in starts for place in range(start, start + n)}
    return sum(len(words[place]) for place in marked) / max(1, sum(map(len, words)))


def repeated_twin(words, n):
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    again = [start for start, gram in enumerate(grams) if gram in grams[:start]]
    return covered(words, again, n)


def top_twin(words, n):
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    counts = {gram: times for gram, times in Counter(grams).items() if times > 1}
    if not counts:
        return 0
    best = max(counts, key=lambda gram: (counts[gram], sum(map(len, gram)), -grams.index(gram)))
    return covered(words, [start for start, gram in enumerate(grams) if gram == best], n)


def run_twin(words):
    longest = length = 0
    for place, word in enumerate(words):
        length = length + 1 if place and words[place - 1] == word else 1
        longest = max(longest, length)
    return longest


WORDS = st.lists(st.sampled_from(["a", "b", "cc", "D", "d", "你"]), max_size=25)
TEXTS = st.lists(WORDS.map(" ".join), max_size=4).map("\n".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, max_size=6), st.integers(2, 4), st.integers(1, 4))
def test_measures_are_those_of_the_twins(texts, n, top_n):
    found = repetition(pl.Series(texts, dtype=pl.String()), n, top_n)
    assert found.height == len(texts)
    for text, row in zip(texts, found.iter_rows(named=True), strict=True):
        words = text.lower().split()
        lines, characters = lines_twin(text)
        assert row["repeated_lines"] == pytest.approx(lines)
        assert row["repeated_line_characters"] == pytest.approx(characters)
        assert row["repeated_share"] == pytest.approx(repeated_twin(words, n))
        assert row["top_share"] == pytest.approx(top_twin(words, top_n))
        assert row["longest_run"] == run_twin(words)


def test_scripts_without_spaces_have_words_too():
    found = repetition(pl.Series(["你好" * 10, "你好世界"]), 5, 3)
    assert found["repeated_share"].to_list() == pytest.approx([0.9, 0])


def test_pieces_change_nothing(monkeypatch):
    rows = [candidates(f"q{place}", "a b c " * place, "x\nx\ny") for place in range(9)]
    whole = [row.measures for row in run(Repetition(), Candidates, rows)[0]]
    monkeypatch.setattr(module, "_TEXT_BYTES", 7)
    assert [row.measures for row in run(Repetition(), Candidates, rows)[0]] == whole


LOOP = "and so on and so forth " * 20


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["", "", "", ""]),
        ({"max_repeated_share": 0.5}, ["", "repeated_ngrams", "", ""]),
        ({"max_top_share": 0.18}, ["", "top_ngram", "", "top_ngram"]),
        ({"max_repeated_lines": 0.3}, ["", "", "repeated_lines", ""]),
        ({"max_repeated_line_characters": 0.2}, ["", "", "repeated_line_characters", ""]),
        ({"max_longest_run": 3}, ["", "", "", "long_run"]),
        ({"over": "prompt", "max_longest_run": 3}, ["", "", "", ""]),
        ({"over": "row", "max_longest_run": 3}, ["", "", "", "long_run"]),
    ],
)
def test_bounds(fields, expected):
    rows = [
        pair("q", "Cut the dead wood in late winter.", "Leave it."),
        pair("q", LOOP, "Leave it."),
        pair("q", "Leave it.", "same line\nsame line\nother"),
        pair("q", "no no no no", "Leave it."),
    ]
    step = Repetition(**fields)
    assert reasons(step, Pair, rows) == expected
    assert whatever_the_order(step, Pair, rows)


def test_measures_by_side():
    found = measured(Repetition(), Pair, pair("q", "no no no", "x"))
    assert found["longest_run.chosen"] == 3
    assert found["longest_run.rejected"] == 1
    many = measured(Repetition(), Candidates, candidates("q", "no no", "x"))
    assert (many["longest_run.response.min"], many["longest_run.response.max"]) == (1, 2)


def test_prompts_have_no_response_to_bound():
    assert reasons(Repetition(), Prompt, [prompt("q")]) == [""]
    with pytest.raises(InputError, match="over: response"):
        run(Repetition(max_top_share=0.1), Prompt, [prompt("q")])


def test_hostile_texts_and_an_empty_table():
    rows = [candidates(f"q{place}", text) for place, text in enumerate(HOSTILE)]
    assert reasons(Repetition(), Candidates, rows) == [""] * len(rows)
    assert run(Repetition(max_top_share=0.1), Pair, [])[0] == []
