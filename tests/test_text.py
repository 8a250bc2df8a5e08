"""Texts: what folds together and what must not, filling, hashing, what a terminal may see."""

import pytest

from datakit.text import canonical_json, digest, fill, near_miss, normalise, plain, shorten


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, world!", "hello world"),
        ("  Hello \n world ", "hello world"),
        ("What is it?", "what is it"),
        ("“Quoted” text…", '"quoted" text'),
        ("ＦＵＬＬ width", "full width"),
        ("¿Qué es?", "qué es"),
        ("It costs 5, or so.", "it costs 5 or so"),
        ("STRASSE", "straße"),
        ("e\u0301", "\u00e9"),
    ],
)
def test_what_says_the_same_folds_together(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("What is 3 * 4?", "What is 3 / 4?"),
        ("Learn C++", "Learn C#"),
        ("Learn C++", "Learn C"),
        ("5", "-5"),
        ("3.5", "35"),
        ("0.5", ".5"),
        (".5", "5"),
        ("5!", "5"),
        ("1,5", "15"),
        ("+", "-"),
        ("दिन", "दान"),
        ("मै", "मा"),
        ("x = y", "x == y"),
        ("a_b", "a b"),
        ("$5", "€5"),
        ("we'll", "well"),
        ("?", "!"),
    ],
)
def test_what_says_something_else_does_not(one, other):
    assert normalise(one) != normalise(other)


def test_filling_is_one_pass():
    assert fill("{a} {b}", a="{b}", b="{a}") == "{b} {a}"
    assert fill('{"json": 1} {a}', a="x") == '{"json": 1} x'
    with pytest.raises(KeyError):
        fill("{missing}")


def test_a_hash_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(["a", "b"]) != digest(["b", "a"])
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_a_terminal_sees_no_control_marks():
    assert plain("\x1b[31mred\u202e\x07") == "\\x1b[31mred\\x202e\\x07"
    assert "\n" not in shorten("a\nb")
    assert len(shorten("x" * 500, 80)) == 80


def test_a_near_miss_is_named_else_everything_known():
    assert near_miss("treshold", ["threshold", "over"]) == "; did you mean 'threshold'?"
    assert near_miss("zzz", ["b", "a"]) == "; known: a, b"
    assert near_miss("zzz", []) == ""
