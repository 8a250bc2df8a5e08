"""Helpers for the tests of single steps: kits over the shipped fakes, rows, and scripts."""

import asyncio
import json
import re

import polars as pl

from datakit.models.specs import HashingSpec, OpenAISpec, ScriptedSpec
from datakit.records import Candidates, Message, Pair, Prompt, Response
from datakit.session import Session, Settings, Watch
from datakit.tables import to_frame

HASHING = {"embedder": HashingSpec(kind="hashing", dimensions=64)}


def opened(step, folder, models, *, seed=0, offline=False, watch=None):
    """A session for one step; use as `with`."""
    settings = Settings(
        outputs=folder / "outputs",
        state=folder / "state",
        base=folder,
        seed=seed,
        offline=offline,
        models=models,
    )
    return Session(settings, [step], watch or Watch())


def each(step, row, folder, models, *, alias="it", seed=0, offline=False, watch=None):
    """What a row step makes of one row."""

    async def made(session):
        try:
            return await step.each(row, session.kit(alias))
        finally:
            await session.close_models()

    with opened(step, folder, models, seed=seed, offline=offline, watch=watch) as session:
        return asyncio.run(made(session))


def applied(step, kind, rows, folder, *, alias="it", seed=0, models=None):
    """The Split of a table step over records, its prepared columns beside the record's."""
    frame = to_frame(kind, rows)
    with opened(step, folder, HASHING if models is None else models, seed=seed) as session:
        kit = session.kit(alias)
        prepared = step.prepare(frame, kit)
        assert prepared["id"].to_list() == frame["id"].to_list()
        table = pl.concat([frame.lazy(), prepared.lazy().drop("id")], how="horizontal")
        split = step.apply(table, kit)
    both = [*split.kept["id"], *split.dropped["id"]]
    assert sorted(both) == sorted(frame["id"]), "every row is on exactly one side"
    return split


def user(text):
    return (Message(role="user", content=text),)


def assistant(text):
    return (Message(role="assistant", content=text),)


def prompt(text, origin=None, **fields):
    """A prompt; its id follows from `origin`, by default the text."""
    return Prompt(messages=user(text), **fields).identified(text if origin is None else origin)


def candidates(question, *answers, **fields):
    """Candidates; an answer is a text or a Response."""
    responses = tuple(
        one if isinstance(one, Response) else Response(text=one, finish_reason="stop", model="m")
        for one in answers
    )
    made = Candidates(prompt=user(question), responses=responses, **fields)
    return made.identified(question)


def pair(question, chosen, rejected, origin=None, **fields):
    made = Pair(
        prompt=user(question), chosen=assistant(chosen), rejected=assistant(rejected), **fields
    )
    return made.identified(origin or f"{question}/{chosen}/{rejected}")


def scripted(function="default", model="scripted", **fields):
    """A scripted model; `function` is the name of a script in this module."""
    script = function if function == "default" else f"steps_kit:{function}"
    return ScriptedSpec(kind="scripted", model=model, script=script, **fields)


def served(url, model, **fields):
    """A model behind an endpoint, which is asked once and no more."""
    return OpenAISpec(kind="openai", base_url=url, model=model, retries=0, **fields)


# -- scripts: (request, draw) -> the text of the answer ------------------------------------------

BLOCK = re.compile(r"<(answer_[ab]_*)>\n(.*?)\n</\1>", re.DOTALL)


def shown(request):
    """The two texts that a judge is shown, as A and B."""
    found = BLOCK.findall("\n".join(turn["content"] for turn in request["messages"]))
    longest = max(len(tag) for tag, _ in found)
    first, second = (text for tag, text in found if len(tag) == longest)
    return first, second


def said(verdict, reason="because"):
    return json.dumps({"reason": reason, "verdict": verdict})


def says_a(request, draw):
    return said("A")


def says_tie(request, draw):
    return said("tie")


def says_longer(request, draw):
    first, second = shown(request)
    return said("tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B")


def says_longer_unless_short_first(request, draw):
    """No verdict where the shorter text is shown first."""
    first, second = shown(request)
    return said("A") if len(first) >= len(second) else "I would rather not say."


def says_prose(request, draw):
    return "Answer A is better, I think."


def says_nothing(request, draw):
    return "  \n "


def says_nothing_at_odd_draws(request, draw):
    return "" if draw % 2 else f"answer {draw}"


def says_what_it_was_asked(request, draw):
    turns = [f"{turn['role']}={turn['content']}" for turn in request["messages"]]
    return f"{draw}: {' | '.join(turns)}"


def says_nul(request, draw):
    return "a\x00b"


# -- rows that are equal in some parts -----------------------------------------------------------


def equal_in_parts(kind):
    """Row 0, one with its prompt, one with its answers, one with both, and one with neither."""
    old, new = "How do I prune an apple tree?", "Which bread keeps longest in summer?"
    good, bad = "Cut the dead wood in late winter.", "Just leave the branches alone, friend."
    rye, wheat = "Rye bread, for its acid.", "White toast goes stale within a day."
    made = pair if kind is Pair else candidates
    rows = [made(old, good, bad), made(old, rye, wheat), made(new, good, bad), made(old, good, bad)]
    rows.append(made("What is the tide?", "The moon pulls at the sea.", "Nobody has found out."))
    return [row.identified(str(place)) for place, row in enumerate(rows)]


EQUAL_TO_ROW_0 = {"prompt": {1, 3}, "response": {2, 3}, "row": {3}}
"""By what is compared: the rows of `equal_in_parts` that row 0 makes superfluous."""
