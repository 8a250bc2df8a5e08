"""Reference-model difficulty of pairs: the paper's numbers, a model computed by hand, swaps."""

import asyncio
import itertools
import json
import math
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from steps_kit import assistant, each, opened, pair, scripted, served, user

import datakit as dk
from datakit.annotation.likelihood import (
    ReferenceLikelihood,
    difficulty,
    loss_to_flip,
    vote_logit,
)
from datakit.errors import InputError, RecipeError, Rejected, Unanswered, Unparsable
from datakit.models.likelihood import Likelihood
from datakit.pipeline import rehearsal
from datakit.recipe import load_recipe
from datakit.records import Pair
from datakit.rows import part_key
from datakit.session import Watch
from datakit.templates import BUILT_IN, render_split

STEP = ReferenceLikelihood(model="m", template="plain")
FAKE = {"m": scripted(model="reference")}


def likelihood(total, tokens):
    return Likelihood(sum=total, per_token=total / tokens, tokens=tokens)


def scored(row, folder, step=STEP, models=FAKE, **options):
    """The row's measures, without the step's name."""
    (made,) = each(step, row, folder, models, **options)
    assert (made.id, made.content) == (row.id, row.content)
    return {name.removeprefix("it."): value for name, value in made.measures.items()}, made


# The numbers.


@pytest.mark.parametrize(
    ("ratio", "loss"),
    [(0, "0.6931"), (10, "0.3133"), (50, "0.0067"), (100, "0.000045"), (-20, "2.1269")],
)
def test_the_loss_at_which_a_ranking_flips(ratio, loss):
    digits = len(loss.partition(".")[2])
    assert f"{loss_to_flip(ratio, 0.1):.{digits}f}" == loss


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 100))
@example(1e6, 100.0)
@example(-1e6, 100.0)
def test_the_loss_is_exact_wherever_the_plain_formula_is(ratio, beta):
    found = loss_to_flip(ratio, beta)
    assert found >= 0
    if abs(beta * ratio) < 30:
        assert found == pytest.approx(math.log1p(math.exp(-beta * ratio)), rel=1e-9)
    # σ(x) + σ(−x) = 1: the two labels' losses differ by exactly what decides between them.
    assert loss_to_flip(-ratio, beta) - found == pytest.approx(beta * ratio, rel=1e-9, abs=1e-9)


def test_every_measure_by_hand():
    found, signed = difficulty(likelihood(-12.0, 4), likelihood(-6.0, 3), 0.1, math.log(3))
    assert found == {
        "logp.chosen": -12.0,
        "logp.rejected": -6.0,
        "per_token.chosen": -3.0,
        "per_token.rejected": -2.0,
        "tokens.chosen": 4.0,
        "tokens.rejected": 3.0,
        "logratio": 6.0,
        "logratio_per_token": 1.0,
        "correct.chosen": 0.0,
        "correct.rejected": 1.0,
        "correct_per_token.chosen": 0.0,
        "correct_per_token.rejected": 1.0,
        "loss_to_flip.chosen": pytest.approx(-math.log(1 / (1 + math.exp(-0.6)))),
        "loss_to_flip.rejected": pytest.approx(-math.log(1 / (1 + math.exp(0.6)))),
        # Three of four votes: (3/1)^(1/0.1) times π(chosen)/π(rejected) = e^-6.
        "idealised_logratio": pytest.approx(6 - 10 * math.log(3)),
        "idealised.chosen": 1.0,
        "idealised.rejected": 0.0,
    }
    assert signed == ("logratio", "logratio_per_token", "idealised_logratio")
    tied, _ = difficulty(likelihood(-2.0, 2), likelihood(-2.0, 2), 0.1)
    assert tied["correct.chosen"] == tied["correct.rejected"] == 1.0
    assert not any(name.startswith("idealised") for name in tied)


@pytest.mark.parametrize(
    ("chosen", "rejected", "share"),
    [
        (3, 1, 0.75),
        (0.75, 0.25, 0.75),
        (1, 1, 0.5),
        (1, 3, 0.25),
        (1, 0, 0.999),
        (0, 1, 0.001),
        (100_000, 1, 0.999),
        (1, 100_000, 0.001),
        (0.9999, 0.0001, 0.999),
    ],
)
def test_votes_are_shares_short_of_certainty(chosen, rejected, share):
    row = pair("q", "a", "b", measures={"p.chosen": chosen, "p.rejected": rejected})
    assert vote_logit(row, "p") == pytest.approx(math.log(share / (1 - share)))
    assert vote_logit(row.swap(), "p") == -vote_logit(row, "p")


@pytest.mark.parametrize(
    "measures",
    [{}, {"p.chosen": 1.0}, {"p.chosen": 0, "p.rejected": 0}, {"p.chosen": -1, "p.rejected": 2}],
)
def test_a_row_without_votes_is_dropped_before_anything_is_asked(measures, tmp_path):
    watch = Watch()
    row = pair("q", "a", "b", measures=measures, strength=0.9)
    with pytest.raises(Rejected, match="no_votes"):
        scored(row, tmp_path, STEP.model_copy(update={"votes": "p"}), watch=watch)
    assert watch.meter.sent == 0


# A model by hand: every answer of the server is recomputed here by the chain rule.

CORPUS = "the cat sat on the mat. the dog sat on the cat. user: assistant: a dog and a cat.\n\n" * 3


class Bigram:
    """Letters in pairs, counted with one added: log π(next | last)."""

    def __init__(self):
        self.pairs, self.singles = Counter(itertools.pairwise(CORPUS)), Counter(CORPUS)

    def logprob(self, last, letter):
        return math.log((self.pairs[last, letter] + 1) / (self.singles[last] + 1_114_112))

    def completion(self, prompt, completion):
        text = prompt + completion
        return math.fsum(self.logprob(text[n - 1], text[n]) for n in range(len(prompt), len(text)))


class Server(ThreadingHTTPServer):
    """Serves the bigram model as an endpoint that refuses to generate nothing."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.form, self.bodies = Bigram(), "echo", []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.path != "/v1/completions" or not body.get("echo") or body["max_tokens"] < 1:
            return self.say(400, {"error": {"message": "max_tokens must be at least 1"}})
        text, model = body["prompt"], self.server.model
        scores = [model.logprob(a, b) for a, b in itertools.pairwise(text)]
        choice = {"text": f"{text}x", "finish_reason": "length"}
        if self.server.form == "echo":
            choice["logprobs"] = {
                "tokens": [*text, "x"],
                "token_logprobs": [None, *scores, -5.0],
                "text_offset": list(range(len(text) + 1)),
            }
        elif self.server.form == "prompt_logprobs":
            choice["prompt_logprobs"] = [None] + [
                {str(ord(letter)): {"logprob": score, "rank": 1, "decoded_token": letter}}
                for letter, score in zip(text[1:], scores, strict=True)
            ]
        return self.say(200, {"choices": [choice], "usage": {"prompt_tokens": len(text)}})

    def say(self, status, payload):
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def live(server, **fields):
    return {"m": served(server.url, "bigram", **{"extra_body": {"max_tokens": 1}} | fields)}


def by_hand(server, prompt, answer, template="plain"):
    before, after = render_split(prompt, answer, BUILT_IN[template])
    return server.model.completion(before, after), len(after)


@pytest.mark.parametrize("form", ["echo", "prompt_logprobs"])
@pytest.mark.parametrize("template", BUILT_IN)
def test_a_pair_is_scored_as_by_hand(server, tmp_path, form, template):
    server.form = form
    row = pair("the cat?", "a dog sat on the mat 😀.", "漢字 zzz")
    step = ReferenceLikelihood(model="m", template=template, beta=0.5)
    found, made = scored(row, tmp_path, step, live(server))
    chosen, long = by_hand(server, row.prompt, row.chosen, template)
    rejected, short = by_hand(server, row.prompt, row.rejected, template)
    assert found["logp.chosen"] == pytest.approx(chosen, rel=1e-12)
    assert found["logp.rejected"] == pytest.approx(rejected, rel=1e-12)
    assert (found["tokens.chosen"], found["tokens.rejected"]) == (long, short)
    assert found["per_token.chosen"] == pytest.approx(chosen / long)
    assert found["logratio"] == pytest.approx(rejected - chosen)
    assert found["correct.chosen"] == float(chosen >= rejected)
    assert found["loss_to_flip.chosen"] == loss_to_flip(found["logratio"], 0.5)
    assert set(made.signed) == {"it.logratio", "it.logratio_per_token"}
    sent = {body.get("add_special_tokens") for body in server.bodies}
    assert sent == ({None} if template == "plain" else {False})
    assert len(server.bodies) == 2


def test_a_server_that_refuses_to_generate_nothing_is_told_of(server, tmp_path):
    with pytest.raises(Unanswered, match="max_tokens must be at least 1"):
        scored(pair("q", "a", "b"), tmp_path, STEP, live(server, extra_body={}))


def test_a_server_without_scores_drops_the_row(server, tmp_path):
    server.form = "none"
    with pytest.raises(Unparsable, match="no_prompt_logprobs"):
        scored(pair("q", "a", "b"), tmp_path, STEP, live(server))


def test_all_turns_of_an_answer_count(server, tmp_path):
    tail = assistant("a cat.") + user("and?") + assistant("a dog.")
    row = Pair(prompt=user("the"), chosen=tail, rejected=assistant("no")).identified("x")
    found, _ = scored(row, tmp_path, STEP, live(server))
    assert found["logp.chosen"] == pytest.approx(by_hand(server, row.prompt, tail)[0], rel=1e-12)


def prompt_pair(good, bad, answer):
    return Pair(
        prompt=user(good),
        prompt_rejected=user(bad),
        chosen=assistant(answer),
        rejected=assistant(answer),
        pair_kind="prompt",
    ).identified("x")


def test_one_answer_is_scored_after_either_of_two_prompts(server, tmp_path):
    row = prompt_pair("the cat", "zq", "sat")
    found, _ = scored(row, tmp_path, STEP, live(server))
    for side, prompt in (("chosen", row.prompt), ("rejected", row.prompt_rejected)):
        wanted = by_hand(server, prompt, row.chosen)[0]
        assert found[f"logp.{side}"] == pytest.approx(wanted, rel=1e-12)
    voted = row.model_copy(update={"measures": {"p.chosen": 2.0, "p.rejected": 1.0}})
    with pytest.raises(Rejected, match="not_comparable"):
        scored(voted, tmp_path, STEP.model_copy(update={"votes": "p"}), live(server))


def test_a_side_that_was_not_answered_leaves_the_row_for_the_next_run(server, tmp_path):
    down = {"m": served("http://127.0.0.1:9/v1", "bigram")}
    with pytest.raises(Unanswered):
        scored(pair("q", "a", "b"), tmp_path, STEP, down)
    assert scored(pair("q", "a", "b"), tmp_path, STEP, live(server))


# The opposite label.

TEXTS = st.text(st.sampled_from("ab \n😀漢é<|{%"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    TEXTS,
    st.lists(TEXTS, min_size=2, max_size=2, unique=True),
    st.sampled_from(["response", "prompt"]),
    st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    st.sampled_from([0.01, 0.1, 1.0, 10.0]),
)
def test_the_swapped_row_has_the_measures_of_the_opposite_label(
    tmp_path_factory, one, two, kind, votes, beta
):
    folder = tmp_path_factory.mktemp("swap")
    measures = {} if votes is None else {"p.chosen": votes[0], "p.rejected": votes[1]}
    if kind == "prompt":
        row, votes = prompt_pair(*two, one), None
    else:
        row = pair(one, *two, measures=measures)
    step = ReferenceLikelihood(model="m", beta=beta, votes=None if votes is None else "p")
    (made,) = each(step, row, folder, FAKE)
    (again,) = each(step, row.swap(), folder, FAKE)
    assert made.swap().measures == again.measures
    assert set(made.swap().signed) == set(again.signed)
    assert made.swap().swap().measures == made.measures
    assert ("it.idealised.chosen" in made.measures) is (votes is not None)


# In a recipe.


def test_a_step_keeps_what_a_row_has_and_can_stand_twice(tmp_path):
    row = pair("q", "a", "b", measures={"old": 1.0}, signed=("old",))
    _, first = scored(row, tmp_path, alias="small")
    _, both = scored(first, tmp_path, alias="large")
    assert {"old", "small.logratio", "large.logratio"} <= set(both.measures)
    assert both.signed[:2] == ("old", "small.logratio")


def test_the_templates_text_is_in_the_key(tmp_path):
    file, other = tmp_path / "one.jinja", tmp_path / "other.jinja"
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file.write_text(source)
    other.write_text(f"!{source}")

    def key(template):
        step = ReferenceLikelihood(model="m", template=template)
        with opened(step, tmp_path, FAKE) as session:
            kit, given = session.kit("it"), session.settings
            placed = load_recipe("smoke/likelihood").steps[-1]
            placed = placed.model_copy(update={"step": step, "alias": "it"})
            return part_key(placed, "Pair", ["1"], given, kit)

    first = key("one.jinja")
    assert key("one.jinja") == first
    file.write_text(f" {source}")
    changed = key("one.jinja")
    assert len({first, changed, key("other.jinja"), key("chatml"), key("llama3"), key(None)}) == 6


def test_a_template_that_is_no_use_is_told_before_anything_is_asked(tmp_path):
    (tmp_path / "think.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    for template, said in (
        ("think.jinja", "template_splits"),
        ("none.jinja", "no file"),
        ("chatlm", "no file"),
    ):
        step = ReferenceLikelihood(model="m", template=template)
        with opened(step, tmp_path, FAKE) as session, pytest.raises(InputError, match=said):
            step.fingerprint(session.kit("it"))


@pytest.mark.parametrize("beta", [0, -1, float("inf"), float("nan")])
def test_beta_is_above_zero_and_finite(beta):
    recipe = {"name": "x", "models": {"m": {"kind": "scripted"}}}
    steps = [{"step": "sources.jsonl", "path": "x", "kind": "Pair"}]
    steps.append({"step": "annotation.likelihood", "model": "m", "beta": beta})
    with pytest.raises(RecipeError, match=r"steps\[1\]\.beta"):
        load_recipe(recipe | {"steps": steps})


def test_a_recipe_is_rehearsed_and_run(tmp_path):
    recipe = load_recipe("smoke/likelihood")
    version = dk.run(recipe, outputs=tmp_path / "o", state=tmp_path / "s")
    rows = version.scan().collect()
    assert rows.height > 0
    names = ("logp.chosen", "logratio", "correct.chosen", "loss_to_flip.chosen", "idealised.chosen")
    found = rows.select(pl.col(f"likelihood.{name}").alias(name) for name in names)
    assert found.null_count().sum_horizontal().item() == 0
    assert found["logp.chosen"].max() < 0
    agrees = (found["logratio"] <= 0) == (found["correct.chosen"] == 1)
    assert agrees.all()
    again = dk.run(recipe, outputs=tmp_path / "o", state=tmp_path / "s", offline=True)
    assert again.address == version.address
    dk.run(rehearsal(recipe), outputs=tmp_path / "o2", state=tmp_path / "s2", limit=20)


def test_the_shipped_recipe_runs_on_a_file(server, tmp_path):
    rows = {"prompt": ["the cat?", "the dog?"], "chosen": ["sat", "on"], "rejected": ["zq", "the"]}
    pl.DataFrame(rows).write_parquet(tmp_path / "pairs.parquet")
    overrides = [f"steps.pairs.path={tmp_path / 'pairs.parquet'}"]
    overrides += ["models.reference.extra_body={max_tokens: 1}"]
    overrides += [f"models.reference.base_url={server.url}"]
    version = dk.run(
        "reference_difficulty", overrides=overrides, outputs=tmp_path / "o", state=tmp_path / "s"
    )
    found = version.scan().select("reference.logp.chosen").collect()
    assert found.height == 2
    wanted = {
        round(by_hand(server, user(q), assistant(a), "chatml")[0], 9)
        for q, a in zip(rows["prompt"], rows["chosen"], strict=True)
    }
    assert {round(value, 9) for value in found.to_series()} == wanted


def test_nothing_is_asked_twice(server, tmp_path):
    async def scores(kit):
        return await kit.settle(kit.score("m", user("q"), assistant("a"), "plain") for _ in "ab")

    with opened(STEP, tmp_path, live(server)) as session:

        async def run():
            try:
                return await scores(session.kit("it"))
            finally:
                await session.close_models()

        first, second = asyncio.run(run())
    assert first == second
    assert len(server.bodies) == 1
