"""Toxicity: scores and labels that others put there, and listed words."""

import pytest
from filters_kit import HOSTILE, reasons, run, whatever_the_order
from steps_kit import HASHING, candidates, opened, pair, prompt

from datakit.curation.toxicity import Toxicity
from datakit.errors import InputError
from datakit.records import Candidates, Pair, Prompt


@pytest.fixture
def kit(tmp_path):
    lines = "# harmless stand-ins\nDarn\nshut up  # a phrase\n\n坏蛋\na.b\n"
    (tmp_path / "words.txt").write_text(lines, encoding="utf-8")
    with opened(Toxicity(wordlist="words.txt"), tmp_path, HASHING) as session:
        yield session.kit("it")


ROWS = [
    pair("q1", "a", "b", measures={"tox.chosen": 0.1, "tox.rejected": 0.5}),
    pair("q2", "a", "b", measures={"tox.chosen": 0.1, "tox.rejected": 0.6}),
    pair("q3", "a", "b", measures={"tox.chosen": 0.1}, labels={"kind": "insult"}),
]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["", "toxic_score", ""]),
        ({"max_score": 0.05}, ["toxic_score"] * 3),
        ({"missing": "drop"}, ["", "toxic_score", "no_score"]),
        ({"measures": (), "label": "kind", "labels": ("insult",)}, ["", "", "toxic_label"]),
        ({"measures": (), "label": "kind", "labels": ("threat",)}, ["", "", ""]),
    ],
)
def test_scores_and_labels(fields, expected):
    step = Toxicity(**{"measures": ("tox.chosen", "tox.rejected")} | fields)
    assert reasons(step, Pair, ROWS) == expected
    assert whatever_the_order(step, Pair, ROWS)


WORDY = [
    pair("q", "fine", "Darn! DARN it."),
    pair("q", "Oh, shut\nup now", "darning socks"),
    pair("你坏蛋啊", "a.b", "axb"),
]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["", "", ""]),
        ({"max_listed": 0}, ["listed_words"] * 3),
        ({"max_listed": 1}, ["listed_words", "", ""]),
        ({"max_listed": 0, "over": "prompt"}, ["", "", "listed_words"]),
        ({"max_listed": 0, "over": "response"}, ["listed_words"] * 3),
    ],
)
def test_listed_words(fields, expected, kit):
    step = Toxicity(wordlist="words.txt", **fields)
    assert reasons(step, Pair, WORDY, kit) == expected
    assert whatever_the_order(step, Pair, WORDY, kit)


def test_counts_are_measures_by_side_and_details_hold_no_word(kit):
    kept, _ = run(Toxicity(wordlist="words.txt"), Pair, WORDY, kit)
    assert [row.measures["it.listed.rejected"] for row in kept] == [2, 0, 0]
    assert [row.measures["it.listed.chosen"] for row in kept] == [0, 1, 1]
    _, dropped = run(Toxicity(wordlist="words.txt", max_listed=0), Pair, WORDY, kit)
    assert dropped["detail"][0] == "listed.rejected is 2.0, above 0"


def test_a_changed_list_is_another_step_and_a_comment_is_not(kit, tmp_path):
    step = Toxicity(wordlist="words.txt")
    before = step.fingerprint(kit)
    path = tmp_path / "words.txt"
    path.write_text(path.read_text(encoding="utf-8") + "# more\n", encoding="utf-8")
    assert step.fingerprint(kit) == before
    path.write_text(path.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    assert step.fingerprint(kit) != before
    assert Toxicity(measures=("x",)).fingerprint(kit) == ""


def test_long_lists_are_taken(kit, tmp_path):
    words = [f"word{number}x" for number in range(5_000)]
    (tmp_path / "long.txt").write_text("\n".join(words), encoding="utf-8")
    step = Toxicity(wordlist="long.txt", max_listed=0)
    rows = [pair("q", "has word4999x", "no"), pair("q", "word49", "no")]
    assert reasons(step, Pair, rows, kit) == ["listed_words", ""]


def test_bad_lists_are_named(kit, tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for name, said in (("empty", "holds no word"), ("bad", "UTF-8"), ("absent", "no file")):
        with pytest.raises(InputError, match=said):
            Toxicity(wordlist=f"{name}.txt").fingerprint(kit)


@pytest.mark.parametrize(
    "fields",
    [{}, {"label": "x"}, {"labels": ("x",)}, {"measures": ("x",), "max_listed": 1}],
)
def test_what_does_nothing_is_refused(fields):
    with pytest.raises(ValueError, match="`"):
        Toxicity(**fields)


def test_hostile_texts_and_an_empty_table(kit):
    step = Toxicity(wordlist="words.txt", max_listed=0)
    rows = [candidates(f"q{place}", text) for place, text in enumerate(HOSTILE)]
    assert reasons(step, Candidates, rows, kit) == [""] * len(rows)
    assert run(step, Pair, [], kit)[0] == []
    assert reasons(step, Prompt, [prompt("darn")], kit) == ["listed_words"]
