"""Findings: what each says of a text, on examples, and on texts that are made to hurt."""

import time

import polars as pl
import pytest
from filters_kit import HOSTILE, ZERO_WIDTH, frame_of
from steps_kit import assistant, candidates, pair, prompt, user

from datakit import findings
from datakit.records import Candidates, Conversation, Edit, Label, Message, Pair, Prompt
from datakit.tables import to_frame


def found(finding, *texts):
    return frame_of(*texts).select(text=finding(pl.col("text")))["text"].to_list()


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with that request.",
        "Sorry, I cannot provide the home address of a person.",
        "As an AI language model, I am not able to generate such content.",
        "I cannot and will not help you do this.",
        "I'm afraid I can't do that.",
        "I won't help you with that, and you should not do it.",
        "I must respectfully decline.",
        "  \n\nI cannot fulfill your request. I'm just an AI.",
        "I’m committed to ethical standards, so I can’t help with that.",
        "I'm sorry, but that's not something I can help with.",
        "It would not be appropriate for me to say.\nIt is not appropriate for me to say more.",
        "Hello! However, I must inform you that I cannot provide answers that promote harm.",
        "I am unable to assist you in this matter.",
    ],
)
def test_a_refusal_is_found(text):
    assert found(findings.refuses, text) == [True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! Here is how you prune an apple tree.",
        "I can't recommend this book highly enough.",
        "I can't help but wonder what comes next.",
        "I can't believe how good this is.",
        "I wouldn't recommend it as a first book.",
        "As an AI language model, I don't have feelings, but here is a poem.",
        "I cannot provide personal opinions, but the book is well liked.",
        "Men cannot survive without food.",
        "I'm sorry to hear that. Here is what may help you sleep.",
        "You cannot provide more than ten names.",
        'The spy said: "They cannot help us."',
        "Plants can't move, so they cannot help themselves.",
        "The answer is 42." + " And so on." * 60 + " I cannot help with that.",
    ],
)
def test_what_is_no_refusal_is_not_found(text):
    assert found(findings.refuses, text) == [False]


@pytest.mark.parametrize(
    ("text", "families"),
    [
        ("<|im_start|>user\nhi<|im_end|>", ["pipe_token"]),
        ("so it ends <|endoftext|>", ["pipe_token"]),
        ("<|START_OF_TURN_TOKEN|>", ["pipe_token"]),
        ("<｜User｜>hi", ["wide_pipe_token"]),
        ("[INST] hi [/INST]", ["inst"]),
        ("<<SYS>> be nice <</SYS>>", ["inst"]),
        ("<start_of_turn>user", ["turn"]),
        ("done.</s>", ["sentence"]),
        ("done.</s> \n", ["sentence"]),
        ("</s><s>[INST]", ["inst", "sentence"]),
        ("### Response:\nfine", ["heading"]),
        ("Human: hi\n\nAssistant: hello", ["transcript"]),
        ("  User: hi\nAssistant: hello", ["transcript"]),
    ],
)
def test_a_template_is_found_by_family(text, families):
    assert found(findings.templates, text) == [families]
    assert found(findings.has_template, text) == [True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "let (<|>) = alt in a <|> b |> c",
        "if (a <| b |> c)",
        "<s>struck out</s> and more",
        "# Response\nfine",
        "## Instruction manual",
        "The human: a study. The assistant: a role.",
        "Human: an animal that talks.",
        "arr[INSTANCE]",
        "a || b <| c",
    ],
)
def test_what_is_no_template_is_not_found(text):
    assert found(findings.templates, text) == [[]]
    assert found(findings.has_template, text) == [False]


def test_words_are_runs_and_the_characters_of_scripts_without_spaces():
    texts = ("", " ", "one", " one  two\nthree ", "你好世界", "I like 寿司 a lot", "don't stop")
    assert found(findings.count_words, *texts) == [0, 0, 1, 3, 4, 6, 2]


def test_small_findings():
    assert found(findings.is_blank, "", " \n", ZERO_WIDTH, "a", "\x00") == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert found(findings.whitespace_edges, "a", " a", "a\n", "a b", "") == [
        False,
        True,
        True,
        False,
        False,
    ]
    texts = ("a", "a\u200bb", "\u202eabc", "👩‍👩‍👧", "tab\tline\n", "nul\x00")
    assert found(findings.has_invisible, *texts) == [False, True, True, False, False, True]


@pytest.mark.parametrize(
    ("roles", "ordered"),
    [
        (["user"], True),
        (["system", "user", "assistant"], True),
        (["user", "assistant", "user", "assistant"], True),
        (["user", "user"], False),
        (["assistant", "user"], False),
        (["user", "system", "assistant"], False),
        (["system", "system", "user"], False),
    ],
)
def test_the_order_of_roles(roles, ordered):
    frame = pl.DataFrame({"roles": [roles]})
    assert frame.select(findings.in_role_order(pl.col("roles"))).item() is ordered


def test_null_stays_null():
    frame = pl.DataFrame({"text": [None]}, schema={"text": pl.String()})
    for finding in (
        findings.refuses,
        findings.has_template,
        findings.templates,
        findings.count_words,
        findings.is_blank,
        findings.whitespace_edges,
        findings.has_invisible,
    ):
        assert frame.select(finding(pl.col("text"))).item() is None, finding.__name__


def test_hostile_texts_take_linear_time():
    started = time.monotonic()
    for finding in (findings.refuses, findings.templates, findings.has_template):
        found(finding, *HOSTILE)
    assert time.monotonic() - started < 30


def test_listed_words_are_whole_and_need_no_edge_where_a_script_shows_none():
    pattern = findings.listed_pattern(["bad", "shut up", "c++", "坏蛋"])
    texts = ("bad!", "badly", "shut  up", "shutup", "i use c++ now", "你坏蛋啊", "a.b", "ba d")
    hits = frame_of(*texts).select(pl.col("text").str.contains(pattern))["text"].to_list()
    assert hits == [True, False, True, False, True, True, False, False]


def sides(kind, row):
    texts = findings.sided_texts(to_frame(kind, [row]))
    return list(zip(texts["side"], texts["text"], strict=True))


def test_the_texts_of_every_kind_stand_on_their_sides():
    system = Message(role="system", content="s")
    two = (*user("u"), *assistant("a"), *user("v"))
    assert sides(Prompt, prompt("q")) == [("prompt", "q")]
    assert sides(Pair, pair("q", "c", "r")) == [("prompt", "q"), ("chosen", "c"), ("rejected", "r")]
    assert sides(Pair, pair("q", "c", "c", pair_kind="prompt", prompt_rejected=user("p"))) == [
        ("prompt.chosen", "q"),
        ("prompt.rejected", "p"),
        ("chosen", "c"),
        ("rejected", "c"),
    ]
    assert sides(Candidates, candidates("q", "x", "y")) == [
        ("prompt", "q"),
        ("response", "x"),
        ("response", "y"),
    ]
    label = Label(prompt=(system, *two), completion=assistant("c"), desirable=True)
    assert sides(Label, label) == [("prompt", "s\nu\na\nv"), ("response", "c")]
    assert sides(Conversation, Conversation(messages=two)) == [
        ("prompt", "u\nv"),
        ("response", "a"),
    ]
    assert sides(Conversation, Conversation(messages=user("u"))) == [("prompt", "u")]
    assert sides(Edit, Edit(draft="d", edited="")) == [("draft", "d"), ("edited", "")]
