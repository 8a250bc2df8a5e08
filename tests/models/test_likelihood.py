"""Scores of given texts: the request, both forms of reply, hostile ones, and real servers."""

import asyncio
import math
import os
from pathlib import Path

import pytest
from endpoint import Endpoint
from endpoint_answers import scores
from hypothesis import example, given, settings
from hypothesis import strategies as st
from steps_kit import assistant, opened, scripted, served, user

from datakit.annotation.likelihood import ReferenceLikelihood
from datakit.errors import InputError, Refused, Rejected, Unanswered, Unparsable
from datakit.models.chat import Reply, wire_request
from datakit.models.likelihood import Likelihood, ask_likelihood, read_likelihood
from datakit.models.sampling import Sampling
from datakit.models.specs import OpenAISpec, VLLMSpec
from datakit.session import Watch

SPEC = OpenAISpec(kind="openai", model="m")


def echoed(tokens, logprobs, text=None, offsets=None, **fields):
    """A reply that echoes its text; offsets are the true ones where none are given."""
    if offsets is None:
        offsets = [len("".join(tokens[:number])) for number in range(len(tokens))]
    said = {"tokens": tokens, "token_logprobs": logprobs, "text_offset": offsets}
    text = "".join(tokens) if text is None else text
    return Reply(text=text, logprobs=said, finish_reason="length", **fields)


def prompted(tokens, logprobs, text="?"):
    """A reply in vLLM's own form, which says nothing of the first token but its place."""
    entries = [
        {str(number): {"logprob": value, "rank": 3, "decoded_token": token}}
        for number, (token, value) in enumerate(zip(tokens, logprobs, strict=True))
    ]
    return Reply(text=text, logprobs=[None, *entries[1:]])


# The request.


def test_a_request_echoes_and_generates_nothing():
    body = wire_request(SPEC, ask_likelihood("Once", " upon"))
    assert body == {
        "prompt": "Once upon",
        "logprobs": 0,
        "echo": True,
        "max_tokens": 0,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    more = wire_request(SPEC, ask_likelihood("a", "b", max_tokens=1, add_special_tokens=False))
    assert (more["max_tokens"], more["add_special_tokens"]) == (1, False)


def test_a_request_does_not_depend_on_how_the_role_answers():
    sampling = Sampling(temperature=2, top_p=0.1, max_tokens=9)
    hot = OpenAISpec(kind="openai", model="m", sampling=sampling)
    assert wire_request(hot, ask_likelihood("a", "b")) == wire_request(
        SPEC, ask_likelihood("a", "b")
    )


@pytest.mark.parametrize(
    ("completion", "reason"), [("", "empty"), ("\ud800", "not_text"), ("a\udfff", "not_text")]
)
def test_what_cannot_be_scored_is_not_asked(completion, reason):
    with pytest.raises(Rejected) as raised:
        ask_likelihood("a", completion)
    assert raised.value.reason == reason


# Replies.

TEXT = ["Once", " upon", " a", " time"]
LOGPROBS = [None, -1.0, -2.0, -4.0]


@pytest.mark.parametrize("form", [echoed, prompted])
@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("Once", [-1.0, -2.0, -4.0]),
        ("Once upon", [-2.0, -4.0]),
        # The token that straddles the border is the completion's.
        ("Once up", [-1.0, -2.0, -4.0]),
        ("Once upo", [-1.0, -2.0, -4.0]),
        ("Once upon a tim", [-4.0]),
    ],
)
def test_the_tokens_of_the_completion_are_summed(form, prompt, found):
    whole = "".join(TEXT)
    read = read_likelihood(form(TEXT, LOGPROBS), prompt, whole[len(prompt) :])
    assert read == Likelihood(
        sum=math.fsum(found), per_token=math.fsum(found) / len(found), tokens=len(found)
    )


def test_what_was_generated_does_not_count():
    for generated in ([" more"], ["", " more"], [""], ["<|end|>"]):
        tokens = [*TEXT, *generated]
        logprobs = [*LOGPROBS, *([-7.0] * len(generated))]
        for shown in ("".join(tokens), "".join(TEXT)):
            read = read_likelihood(echoed(tokens, logprobs, shown), "Once upon a", " time")
            assert (read.sum, read.tokens) == (-4.0, 1)


def test_a_start_token_of_the_servers_own_stands_before_the_text():
    tokens, logprobs = ["<s>", "Once", " upon"], [None, -3.0, -1.0]
    for text, offsets in (("Once upon", None), ("Once upon", [0, 3, 7])):
        read = read_likelihood(echoed(tokens, logprobs, text, offsets), "Once", " upon")
        assert (read.sum, read.tokens) == (-1.0, 1)
        # With it, even the first word can be scored.
        read = read_likelihood(echoed(tokens, logprobs, text, offsets), "", "Once upon")
        assert (read.sum, read.tokens) == (-4.0, 2)
    assert read_likelihood(prompted(tokens, logprobs), "", "Once upon").sum == -4.0


def test_a_start_token_that_the_model_reads_twice_is_told():
    tokens, logprobs = ["<s>", "<s>", "Once", " upon"], [None, -9.0, -3.0, -1.0]
    with pytest.raises(Unparsable, match="another_text"):
        read_likelihood(echoed(tokens, logprobs, "<s>Once upon"), "<s>Once", " upon")


def test_spaces_that_a_tokenizer_hides_or_adds_are_its_tokens():
    hidden = ["Once", "upon", "a", "time"]
    added = [" Once", " upon", " a", " time"]
    for tokens in (hidden, added):
        for reply in (echoed(tokens, LOGPROBS, "Once upon a time"), prompted(tokens, LOGPROBS)):
            read = read_likelihood(reply, "Once upon", " a time")
            assert (read.sum, read.tokens) == (-6.0, 2)


def test_parts_of_a_character_belong_to_where_it_stands():
    # As vLLM shows them: nothing, until the part that completes the character.
    tokens, logprobs = ["a", "", "", "é", "", "😀", "!"], [None, -1, -2, -3, -4, -5, -6]
    for form in (echoed, prompted):
        for prompt, found in (("a", -21.0), ("aé", -15.0), ("aé😀", -6.0)):
            reply = form(tokens, logprobs)
            assert read_likelihood(reply, prompt, "aé😀!"[len(prompt) :]).sum == found


def test_offsets_place_tokens_that_cannot_be_read():
    tokens = ["a", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"]
    reply = echoed(tokens, [None, -1.0, -2.0, -3.0], "a😀!", [0, 1, 1, 2])
    assert read_likelihood(reply, "a", "😀!").sum == -6.0
    assert read_likelihood(reply, "a😀", "!").sum == -3.0
    for wrong in ([0, 1, 1, 1], [0, 2, 1, 2], [1, 1, 1, 2], [0, 1, 1, None], [0, 1, 1, "2"]):
        with pytest.raises(Unparsable, match="another_text"):
            read_likelihood(echoed(tokens, [None, -1, -2, -3], "a😀!", wrong), "a", "😀!")


PROMPT, COMPLETION = "Once upon", " a time"


def hostile():
    nan, inf = float("nan"), float("inf")
    good = echoed(TEXT, LOGPROBS).logprobs
    for value in (nan, inf, -inf, 0.1, 1e-9, -9999.0, -1e300, "-1", True, [], {}):
        yield "invalid_logprob", echoed(TEXT, [None, -1.0, value, -4.0])
        yield "invalid_logprob", prompted(TEXT, [None, -1.0, value, -4.0])
    yield "no_logprob", echoed(TEXT, [None, -1.0, None, -4.0])
    yield "no_logprob", prompted(TEXT, [None, -1.0, None, -4.0])
    for said in (None, {}, [], "x", 3, True, {"content": []}, {"tokens": TEXT}):
        yield "no_prompt_logprobs", Reply(text=PROMPT + COMPLETION, logprobs=said)
    for change in (
        {"tokens": TEXT[:3]},
        {"tokens": []},
        {"tokens": [1, 2, 3, 4]},
        {"token_logprobs": LOGPROBS[1:]},
        {"text_offset": [0]},
    ):
        yield "no_prompt_logprobs", Reply(text=PROMPT + COMPLETION, logprobs=good | change)
    entry = {"7": {"logprob": -1.0, "decoded_token": " upon"}}
    for wrong in (
        None,
        {},
        [],
        {"7": None},
        {"7": {"logprob": -1.0}},
        {"7": {"logprob": -1.0, "decoded_token": None}},
        # Which of the two is in the text cannot be told.
        entry | {"8": {"logprob": -2.0, "decoded_token": " on"}},
    ):
        yield "no_prompt_logprobs", Reply(text="", logprobs=[None, wrong, entry])
    yield "another_text", echoed(TEXT, LOGPROBS, "Only this")
    yield "another_text", echoed(TEXT[:3], LOGPROBS[:3])
    yield "another_text", echoed(TEXT[:3], LOGPROBS[:3], PROMPT + COMPLETION)
    yield "another_text", echoed(TEXT[1:], LOGPROBS[1:], PROMPT + COMPLETION)
    yield "another_text", echoed(["Once", " upon", " a", " timely"], LOGPROBS)
    yield "another_text", echoed(TEXT, LOGPROBS, "")
    yield "another_text", prompted(["Once", " upon", " the", " time"], LOGPROBS)
    yield "another_text", prompted([*TEXT, " more"], [*LOGPROBS, -1.0])
    yield "another_text", prompted(TEXT[:2], LOGPROBS[:2])


@pytest.mark.parametrize(("reason", "reply"), list(hostile()))
def test_a_reply_that_holds_no_score_is_never_read_as_one(reason, reply):
    with pytest.raises(Unparsable) as raised:
        read_likelihood(reply, PROMPT, COMPLETION)
    assert raised.value.reason == reason


def test_the_first_token_of_a_text_has_no_score():
    with pytest.raises(Unparsable, match=r"no_logprob.*must not be empty"):
        read_likelihood(echoed(TEXT, LOGPROBS), "", "Once upon a time")
    with pytest.raises(Unparsable, match="no_logprob"):
        read_likelihood(prompted(TEXT, LOGPROBS), "On", "ce upon a time")


def test_a_filter_is_a_refusal():
    with pytest.raises(Refused):
        read_likelihood(Reply(text="", finish_reason="content_filter"), "a", "b")


@st.composite
def cut_texts(draw):
    """A text, its tokens cut at random bytes as vLLM shows them, its logprobs, and a border."""
    letters = st.sampled_from(["a", " ", "\n", "é", "漢", "😀", "<", "\u0301", "\x00"])
    text = draw(st.text(letters, min_size=2, max_size=12))
    owner = [number for number, letter in enumerate(text) for _ in letter.encode()]
    size = len(owner)
    cuts = draw(st.sets(st.integers(1, size - 1), max_size=size - 1))
    spans = [*zip([0, *sorted(cuts)], [*sorted(cuts), size], strict=True)]
    logprobs = [draw(st.floats(-20, 0)) for _ in spans]
    return text, owner, spans, logprobs, draw(st.integers(1, len(text) - 1))


def shown(text, owner, spans):
    """Each token's text: the characters that it completes."""
    ends = {number: place for place, number in enumerate(owner)}
    return [
        "".join(text[n] for n in dict.fromkeys(owner[start:stop]) if ends[n] < stop)
        for start, stop in spans
    ]


@settings(max_examples=300, deadline=None)
@given(cut_texts(), st.sampled_from([echoed, prompted]))
@example(
    ("a😀", [0, 1, 1, 1, 1], [(0, 2), (2, 4), (4, 5)], [-1.0, -2.0, -3.0], 1),
    echoed,
)
def test_any_cut_of_any_text_gives_the_sum_over_its_characters_tokens(cut, form):
    text, owner, spans, logprobs, border = cut
    tokens = shown(text, owner, spans)
    # The twin: a token counts where it ends in the completion, or holds a part of what does.
    ends = [sum(map(len, tokens[: n + 1])) for n in range(len(tokens))]
    begins = [0, *ends[:-1]]
    wanted = [
        value
        for value, begin, end in zip(logprobs, begins, ends, strict=True)
        if end > border or begin >= border
    ]
    reply = form(tokens, [None, *logprobs[1:]])
    if len(wanted) == len(tokens):
        with pytest.raises(Unparsable, match="no_logprob"):
            read_likelihood(reply, text[:border], text[border:])
        return
    read = read_likelihood(reply, text[:border], text[border:])
    assert read.tokens == len(wanted)
    assert read.sum == math.fsum(wanted)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=8,
    ),
    st.sampled_from(["tokens", "token_logprobs", "text_offset", "all"]),
)
def test_any_json_is_a_score_or_an_error_of_its_row(said, place):
    good = echoed(TEXT, LOGPROBS).logprobs
    reply = Reply(text="".join(TEXT), logprobs=said if place == "all" else good | {place: said})
    try:
        read_likelihood(reply, PROMPT, COMPLETION)
    except Unparsable:
        return
    if place == "token_logprobs":
        assert all(isinstance(value, float) for value in said[-2:])
    else:
        assert place == "text_offset"


# Through endpoints.


def scored(model, folder, prompt, completion, *, template="plain", watch=None, offline=False):
    step = ReferenceLikelihood(model="m", template=template)

    async def asked(session):
        try:
            return await session.kit("it").score("m", prompt, completion, template)
        finally:
            await session.close_models()

    with opened(step, folder, {"m": model}, watch=watch, offline=offline) as session:
        return asyncio.run(asked(session))


def test_a_score_over_http_is_that_of_the_servers_tokens(tmp_path):
    prompt, answer = user("Why is  the sky blue?"), assistant("Because 😀 of\nlight. ")
    before = "user: Why is  the sky blue?\n\nassistant:"
    text = f"{before} Because 😀 of\nlight. \n\n"
    rows = scores("any", "", text, 0)
    wanted = [values[token] for at, token, values in rows if at + len(token) > len(before)]
    with Endpoint() as endpoint:
        found = scored(served(endpoint.url, "any"), tmp_path, prompt, answer)
        watch = Watch()
        again = scored(served(endpoint.url, "any"), tmp_path, prompt, answer, watch=watch)
    assert (found.sum, found.tokens) == (math.fsum(wanted), len(wanted))
    assert again == found
    assert (watch.meter.sent, watch.meter.replayed) == (0, 1)
    stranger = scored(served(endpoint.url, "any"), tmp_path, prompt, answer, offline=True)
    assert stranger == found


def test_an_endpoint_that_fails_leaves_the_row_for_the_next_run(tmp_path):
    with Endpoint(p500=1.0) as endpoint, pytest.raises(Unanswered):
        scored(served(endpoint.url, "any"), tmp_path, user("a"), assistant("b"))


def test_the_fake_scores_alike_each_time(tmp_path):
    def found(model, prompt, answer):
        return scored(model, tmp_path, user(prompt), assistant(answer))

    first = found(scripted(), "a", "b c")
    assert found(scripted(), "a", "b c") == first
    assert found(scripted("says_a"), "a", "b c") == first
    assert found(scripted(model="other"), "a", "b c").sum != first.sum
    assert found(scripted(), "b", "b c").sum != first.sum
    assert first.sum < 0
    assert first.tokens == 3


def test_a_model_without_a_folder_needs_a_template(tmp_path):
    for model in (served("http://127.0.0.1:9/v1", "any"), served("http://127.0.0.1:9/v1", "/no")):
        with pytest.raises(InputError, match="which chat template does model"):
            scored(model, tmp_path, user("a"), assistant("b"), template=None)
    assert scored(scripted(), tmp_path, user("a"), assistant("b"), template=None).tokens


VLLM = os.environ.get("DATAKIT_TEST_VLLM", "")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="DATAKIT_TEST_VLLM names no Python")
def test_vllm_scores_as_a_forward_pass_does(tmp_path):
    from tiny_model import make_tiny_model

    from datakit.models.vllm import serving

    folder = make_tiny_model(tmp_path / "model")
    spec = VLLMSpec(
        kind="vllm",
        model=str(folder),
        python=VLLM,
        gpus=0,
        args={"max_model_len": 1024, "enforce_eager": True, "dtype": "bfloat16"},
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
    )
    pairs = [
        ("Why is the sky blue?", "Because of light."),
        ("漢字とは?", "😀 naïve — «да»\n\n\tand so on"),
        ("x", " leading space, trailing space "),
        ("the quick brown fox", "jumps over the lazy dog " * 20),
    ]

    async def run():
        async with serving({"m": spec}, [], tmp_path / "logs") as servers:
            url = servers["m"][0].url
            made = served(url, str(folder))
            return [
                await asyncio.to_thread(
                    scored, made, tmp_path, user(question), assistant(answer), template=None
                )
                for question, answer in pairs
            ]

    for (question, answer), found in zip(pairs, asyncio.run(run()), strict=True):
        total, tokens = forward(folder, question, answer)
        assert found.tokens == tokens
        # The weights are bfloat16: 8 bits of a mantissa, and each side rounds in its own order.
        assert found.sum == pytest.approx(total, abs=0.02 * tokens, rel=0.005)


def forward(folder: Path, question, answer):
    """The sum of log-probabilities by transformers' own forward pass, and how many tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": "user", "content": question}]
    before = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    # The template ends the prompt with a line break, which is a token of its own there.
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    mapped = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    first = next(n for n, (_, end) in enumerate(mapped["offset_mapping"]) if end > len(before))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    each = [logprobs[n - 1, ids[n]].item() for n in range(first, len(ids))]
    return math.fsum(each), len(each)
