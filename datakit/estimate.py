"""How many requests follow from answers that nobody has yet, and what tokens they take.

Rehearsals with scripted models, whose answers are short, middling and long, say how many requests
each step makes of a row and how long they are; what the same step asked of the same model before
says it better.
"""

import math
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from datakit.engine import Markers, execute
from datakit.models.ledger import Ledger
from datakit.models.sampling import Sampling
from datakit.models.specs import ChatSpec, ScriptedSpec, Spec
from datakit.pipeline import here, rehearsal
from datakit.recipe import PlacedStep, Recipe
from datakit.session import Settings, Watch
from datakit.store import Done

ROWS = 20
"""Source rows of a rehearsal."""

ANSWER_TOKENS = (60.0, 250.0, 1000.0)
"""Of an answer in words that nobody has measured: least, assumed, most."""
SCHEMA_TOKENS = (20.0, 60.0, 250.0)
"""Of an answer that fits a schema."""
TOKENS_PER_CHARACTER = (0.2, 0.25, 0.4)
WORDS_PER_TOKEN = 0.75
LOST = 0.8
"""The least share of rows that go on where a step decides on answers, of those expected."""
AGAIN = 1.25
"""The most requests a row makes, of those expected: an unusable answer is asked for again."""

Range = tuple[float, float, float]
"""Least, expected, most."""
Counts = tuple[int, int, int]
"""The same, in whole numbers."""


class Use(NamedTuple):
    """What a step asked of a model: calls, characters of requests, tokens."""

    calls: int
    characters: int
    input_tokens: int
    output_tokens: int
    least_output: int
    most_output: int


_NOTHING = Use(0, 0, 0, 0, 0, 0)


class Rehearsed(NamedTuple):
    """The parts of a rehearsal, and what each step asked of each role."""

    markers: Markers
    asked: dict[tuple[str, str], Use]


class Estimate(NamedTuple):
    """What a step will ask of a role; is_measured: its tokens were seen before."""

    calls: Counts
    input_tokens: Counts
    output_tokens: Counts
    is_measured: bool


def summed(ranges: Sequence[Range]) -> Range:
    """All of them together."""
    return _range(sum(one[at] for one in ranges) for at in range(3))


def history(state: Path, recipe: str) -> dict[tuple[str, str], Use]:
    """By step and model, what was asked and answered so far."""
    sql = (
        "SELECT attempts.step, attempts.model, COUNT(*), SUM(LENGTH(answers.request)), "
        "SUM(attempts.input_tokens), SUM(attempts.output_tokens), MIN(attempts.output_tokens), "
        "MAX(attempts.output_tokens) FROM attempts JOIN answers ON answers.key = attempts.key "
        "WHERE attempts.outcome = 'ok' AND attempts.recipe = ? GROUP BY 1, 2"
    )
    with Ledger.opened(state) as ledger:
        return {(row[0], row[1]): Use(*row[2:]) for row in ledger.db.execute(sql, (recipe,))}


def rehearsed(recipe: Recipe, settings: Settings) -> list[Rehearsed]:
    """A rehearsal with short, one with middling and one with long answers."""
    return [_rehearsed(recipe, settings, tokens) for tokens in ANSWER_TOKENS]


def trial_outputs(folder: Path, outputs: Path) -> Path:
    """A place for the parts of a trial, from where the versions in `outputs` can be read."""
    place = folder / "outputs"
    place.mkdir()
    (place / "datasets").symlink_to(outputs.resolve() / "datasets")
    return place


def _rehearsed(recipe: Recipe, settings: Settings, tokens: float) -> Rehearsed:
    fake = rehearsal(recipe, max(2, round(tokens * WORDS_PER_TOKEN)))
    models: dict[str, Spec] = {}
    for role, spec in fake.models.items():
        ceiling = spec.sampling.max_tokens if isinstance(spec, ScriptedSpec) else None
        if ceiling is not None:
            words = max(2, round(min(tokens, ceiling) * WORDS_PER_TOKEN))
            models[role] = spec.model_copy(update={"words": words})
        else:
            models[role] = spec
    fake = fake.model_copy(update={"models": models})
    with tempfile.TemporaryDirectory(prefix="datakit-plan-") as folder:
        trial = Settings(
            outputs=trial_outputs(Path(folder), settings.outputs),
            state=Path(folder) / "state",
            base=recipe.base,
            seed=recipe.seed,
            rows_per_part=recipe.rows_per_part,
            limit=ROWS,
            recipe=recipe.name,
            run=uuid.uuid4().hex,
            models=models,
        )
        markers = execute(fake, trial, here(Watch()))
        used = history(trial.state, recipe.name)
    named = {spec.resolved_identity(): role for role, spec in models.items()}
    return Rehearsed(markers, {(step, named[model]): use for (step, model), use in used.items()})


class Rows:
    """How many rows will reach each step, and what each of them asks there.

    markers: the parts of the run so far, up to the first stage with rows that wait for answers.
    """

    def __init__(self, recipe: Recipe, markers: Markers, trials: Sequence[Rehearsed]) -> None:
        self._trials = trials
        middling = trials[1].markers
        self._entered = [sum(done.rows_in for done in dones) for dones in middling]
        kept = [sum(done.rows for done in dones) for dones in middling]
        share = [out / into if into else 1.0 for out, into in zip(kept, self._entered, strict=True)]
        self._place = {placed.alias: at for at, placed in enumerate(recipe.steps)}
        self.unseen: dict[str, None] = {}
        # Rows that will come to each step, when those that wait before it go on.
        self._coming: list[Range] = []
        coming = (0.0, 0.0, 0.0)
        for at in range(len(recipe.steps)):
            if at == len(markers):
                # What is through waits for the rest of its table.
                coming = _range(rows + sum(done.rows for done in markers[-1]) for rows in coming)
            self._coming.append(coming)
            waiting = _waiting(markers[at]) if at < len(markers) else 0
            least, expected, most = (rows + waiting for rows in coming)
            coming = least * share[at] * LOST, expected * share[at], most * max(share[at], 1.0)

    def estimate(
        self,
        placed: PlacedStep,
        role: str,
        spec: ChatSpec,
        found: tuple[int, int],
        past: Use | None,
    ) -> Estimate:
        """What a step will ask of a role.

        found: requests, and their characters, that were counted already. past: what the step asked
        of the role's model before.
        """
        at = self._place[placed.alias]
        least, expected, most = self._coming[at]
        place = placed.alias, role
        trials = [one.asked.get(place, _NOTHING) for one in self._trials]
        each = trials[1]
        if expected and not each.calls:
            self.unseen[placed.alias] = None
        per_row = each.calls / self._entered[at] if self._entered[at] else 0.0
        calls = (
            found[0] + math.floor(least * per_row),
            found[0] + round(expected * per_row),
            found[0] + math.ceil(most * per_row * AGAIN),
        )
        if past is not None:
            # Two standard errors of a spread that is half the mean, or what was seen.
            error = 1 / past.calls**0.5
            per_character = past.input_tokens / max(1, past.characters)
            rates = _around(per_character, per_character * min(error / 2, 0.5))
            length = past.characters / past.calls
            lengths = _around(length, length * error / 2)
            mean = past.output_tokens / past.calls
            spread = max(past.most_output - past.least_output, mean) / 2
            output = _around(mean, spread * error)
        else:
            rates = TOKENS_PER_CHARACTER
            lengths = _range(one.characters / max(1, one.calls) for one in trials)
            output = _answer_tokens(placed, spec, each)
        characters = [
            found[1] + (count - found[0]) * length
            for count, length in zip(calls, lengths, strict=True)
        ]
        return Estimate(
            calls=calls,
            input_tokens=_whole(size * rate for size, rate in zip(characters, rates, strict=True)),
            output_tokens=_whole(count * size for count, size in zip(calls, output, strict=True)),
            is_measured=past is not None,
        )


def _waiting(dones: Iterable[Done]) -> int:
    """Rows that wait for answers."""
    return sum(
        sum(done.reasons.values()) if done.status == "pending" else done.unanswered
        for done in dones
    )


def _answer_tokens(placed: PlacedStep, spec: ChatSpec, each: Use) -> Range:
    """Tokens of an answer that nobody has measured: short where the rehearsal's fits a schema."""
    is_short = each.calls > 0 and each.most_output < ANSWER_TOKENS[1] / 4
    least, expected, most = SCHEMA_TOKENS if is_short else ANSWER_TOKENS
    own = getattr(placed.step, "sampling", None)
    stated = own.max_tokens if isinstance(own, Sampling) else None
    ceiling = float(stated or spec.sampling.max_tokens or most)
    # An answer in words may go on for as long as it is let.
    most = min(most, ceiling) if is_short else ceiling
    return min(least, ceiling), min(expected, ceiling), most


def _around(mean: float, error: float) -> Range:
    return max(0.0, mean - error), mean, mean + error


def _whole(values: Iterable[float]) -> Counts:
    least, expected, most = values
    return math.floor(least), round(expected), math.ceil(most)


def _range(values: Iterable[float]) -> Range:
    least, expected, most = values
    return least, expected, most
