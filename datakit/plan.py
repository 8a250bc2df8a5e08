"""What a run will ask and cost, before it asks anything.

The steps that send nothing are done for real (the run reuses them). The first requests that the
ledger does not know are counted one by one; what follows from answers that nobody has yet is
scaled from a rehearsal with scripted models. Tokens of an answer are those that the same step
got from the same model before (`--sample` sends some rows to find out), else an assumption.
"""

import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datakit.engine import Markers, execute, stages
from datakit.models.batch_files import write_requests
from datakit.models.ledger import Ledger
from datakit.models.prices import AS_OF, price_of
from datakit.models.specs import ChatSpec, OpenAISpec, Price, VLLMSpec
from datakit.models.vllm import phases, visible_gpus
from datakit.pipeline import here, rehearsal, settings_of
from datakit.recipe import Recipe
from datakit.session import Settings, Watch
from datakit.step import roles
from datakit.values import Value

ROWS = 20
"""Source rows of the rehearsal."""

ANSWER_TOKENS = (60.0, 250.0, 1000.0)
"""Of an answer in words that nobody has measured: least, assumed, most."""
SCHEMA_TOKENS = (20.0, 60.0, 250.0)
"""Of an answer that fits a schema."""
TOKENS_PER_CHARACTER = (0.2, 0.25, 0.4)

Range = tuple[float, float, float]
"""Least, expected, most."""


class Cost(Value):
    """What one step will ask of one model: (least, expected, most); usd None: no known price."""

    step: str
    role: str
    model: str
    known: int
    calls: Range
    input_tokens: Range
    output_tokens: Range
    usd: Range | None
    is_measured: bool


class Plan(Value):
    """What a run will ask.

    usd: None where a price is not known. loads: the local models that are up together, turn after
    turn. notes: what the numbers rest on.
    """

    recipe: str
    costs: tuple[Cost, ...]
    usd: Range | None
    loads: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


class _Use(NamedTuple):
    """What a step asked of a model: calls, characters of requests, tokens."""

    calls: int
    characters: int
    input_tokens: int
    output_tokens: int
    least_output: int
    most_output: int


def plan_of(
    recipe: Recipe,
    outputs: Path,
    state: Path | None = None,
    sample: int | None = None,
    max_usd: float | None = None,
) -> Plan:
    """The plan of a recipe; nothing is sent unless `sample` says how many source rows to send.

    Raises what a run raises before it sends anything, and Stopped where `max_usd` ends a sample.
    """
    if sample is not None:
        _send(recipe, outputs, state, sample, max_usd)
    watch, markers, settings = _counted(recipe, outputs, state, "count")
    rows = _Rows(recipe, settings.state, markers, *_rehearsed(recipe))
    history = _history(settings.state, recipe.name)
    costs: list[Cost] = []
    for placed in recipe.steps:
        for role in dict.fromkeys(role for _, role, _ in roles(placed.step)):
            spec = recipe.models[role]
            if isinstance(spec, ChatSpec):
                found = watch.meter.outstanding.get((placed.alias, role), (0, 0))
                used = history.get((placed.alias, spec.resolved_identity()))
                known = watch.meter.known[placed.alias, role]
                costs.append(rows.cost(placed.alias, role, spec, found, known, used))
    sums = [cost.usd for cost in costs]
    usd = None if None in sums else _sum([one for one in sums if one is not None])
    loads = tuple(tuple(phase) for phase in _loads(recipe))
    return Plan(
        recipe=recipe.name,
        costs=tuple(costs),
        usd=usd,
        loads=loads,
        notes=tuple(_notes(recipe, settings.state, costs)),
    )


def outstanding(recipe: Recipe, outputs: Path, state: Path | None, file: Path) -> int:
    """Write the requests that a run would send now to a batch file; returns how many."""
    _, _, settings = _counted(recipe, outputs, state, "queue")
    with Ledger.opened(settings.state) as ledger:
        return write_requests(ledger, file, run=settings.run)


def _send(
    recipe: Recipe, outputs: Path, state: Path | None, rows: int, max_usd: float | None
) -> None:
    """Run the first source rows for real; their answers stay in the ledger."""
    settings = settings_of(recipe, outputs, state, limit=rows, max_usd=max_usd)
    execute(recipe, settings, here(Watch()))


def _counted(
    recipe: Recipe, outputs: Path, state: Path | None, mode: str
) -> tuple[Watch, Markers, Settings]:
    """Do what can be done without sending; the watch counts what would be sent."""
    watch = Watch()
    settings = settings_of(recipe, outputs, state).model_copy(update={"instead": mode})
    return watch, execute(recipe, settings, here(watch), through=True), settings


def _rehearsed(recipe: Recipe) -> tuple[Markers, dict[tuple[str, str], _Use]]:
    """The rehearsal's parts, and what each step asked of each role."""
    words = int(ANSWER_TOKENS[1] * 0.75)
    fake = rehearsal(recipe, words)
    with tempfile.TemporaryDirectory(prefix="datakit-plan-") as folder:
        settings = Settings(
            outputs=Path(folder) / "outputs",
            state=Path(folder) / "state",
            base=recipe.base,
            seed=recipe.seed,
            rows_per_part=recipe.rows_per_part,
            limit=ROWS,
            recipe=recipe.name,
            run=uuid.uuid4().hex,
            models=fake.models,
        )
        markers = execute(fake, settings, here(Watch()))
        used = _history(settings.state, recipe.name)
    named = {spec.resolved_identity(): role for role, spec in fake.models.items()}
    return markers, {(step, named[model]): use for (step, model), use in used.items()}


def _history(state: Path, recipe: str) -> dict[tuple[str, str], _Use]:
    """By step and model, what was asked and answered so far."""
    sql = (
        "SELECT attempts.step, attempts.model, COUNT(*), SUM(LENGTH(answers.request)), "
        "SUM(attempts.input_tokens), SUM(attempts.output_tokens), MIN(attempts.output_tokens), "
        "MAX(attempts.output_tokens) FROM attempts JOIN answers ON answers.key = attempts.key "
        "WHERE attempts.outcome = 'ok' AND attempts.recipe = ? GROUP BY 1, 2"
    )
    with Ledger.opened(state) as ledger:
        return {(row[0], row[1]): _Use(*row[2:]) for row in ledger.db.execute(sql, (recipe,))}


class _Rows:
    """How many rows reach each step, and what each of them asks there."""

    def __init__(
        self,
        recipe: Recipe,
        state: Path,
        markers: Markers,
        rehearsed: Markers,
        asked: dict[tuple[str, str], _Use],
    ) -> None:
        self._asked = asked
        self._state = state
        self._entered = [sum(done.rows_in for done in dones) for dones in rehearsed]
        kept = [sum(done.rows for done in dones) for dones in rehearsed]
        share = [out / into if into else 1.0 for out, into in zip(kept, self._entered, strict=True)]
        self._place = {placed.alias: at for at, placed in enumerate(recipe.steps)}
        waiting = [
            sum(done.rows_in for done in dones if done.status == "pending") for dones in markers
        ]
        waiting += [0] * (len(recipe.steps) - len(waiting))
        # Rows that reach a step when those that wait before it go on: at the rehearsal's share,
        # and all of them.
        self._coming: list[tuple[float, float]] = []
        expected = most = 0.0
        for at, rows in enumerate(waiting):
            self._coming.append((expected, most))
            expected = (expected + rows) * share[at]
            most = (most + rows) * max(share[at], 1.0)

    def cost(
        self,
        alias: str,
        role: str,
        spec: ChatSpec,
        found: tuple[int, int],
        known: int,
        used: _Use | None,
    ) -> Cost:
        """What a step will ask of a role."""
        at = self._place[alias]
        expected, most = self._coming[at]
        each = self._asked.get((alias, role), _Use(0, 0, 0, 0, 0, 0))
        per_row = each.calls / self._entered[at] if self._entered[at] else 0.0
        calls = (
            float(found[0]),
            found[0] + expected * per_row,
            found[0] + most * per_row,
        )
        characters = each.characters / each.calls if each.calls else 0.0
        sizes = [found[1] + (count - found[0]) * characters for count in calls]
        rates = TOKENS_PER_CHARACTER
        output = _answer_tokens(spec, each)
        if used is not None:
            rates = (used.input_tokens / used.characters,) * 3
            mean = used.output_tokens / used.calls
            # Two standard errors of a spread that is at most a quarter of the range, about.
            spread = (used.most_output - used.least_output) / 2 / used.calls**0.5
            output = (max(0.0, mean - spread), mean, mean + spread)
        tokens_in = _range(size * rate for size, rate in zip(sizes, rates, strict=True))
        tokens_out = _range(count * size for count, size in zip(calls, output, strict=True))
        price = price_of(spec, self._state)
        return Cost(
            step=alias,
            role=role,
            model=spec.model,
            known=known,
            calls=calls,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            usd=None if price is None else _usd(price, tokens_in, tokens_out),
            is_measured=used is not None,
        )


def _answer_tokens(spec: ChatSpec, each: _Use) -> Range:
    """Tokens of an answer that nobody has measured: short where the rehearsal's fits a schema."""
    is_short = each.calls > 0 and each.most_output < ANSWER_TOKENS[1] / 4
    least, expected, most = SCHEMA_TOKENS if is_short else ANSWER_TOKENS
    ceiling = spec.sampling.max_tokens or most
    return min(least, ceiling), min(expected, ceiling), float(ceiling)


def _usd(price: Price, tokens_in: Range, tokens_out: Range) -> Range:
    return _range(price.usd(one, two) for one, two in zip(tokens_in, tokens_out, strict=True))


def _range(values: Iterable[float]) -> Range:
    least, expected, most = values
    return least, expected, most


def _sum(ranges: Sequence[Range]) -> Range:
    return _range(sum(one[at] for one in ranges) for at in range(3))


def _loads(recipe: Recipe) -> list[list[str]]:
    """The local models of each stage, as they are up in turns."""
    found: list[list[str]] = []
    for _, stage in stages(recipe.steps):
        named = dict.fromkeys(role for placed in stage for _, role, _ in roles(placed.step))
        local = {role: spec for role in named if isinstance(spec := recipe.models[role], VLLMSpec)}
        found += phases(local, visible_gpus()) if local else []
    return found


def _notes(recipe: Recipe, state: Path, costs: Sequence[Cost]) -> Iterator[str]:
    """What the numbers rest on."""
    assumed = [cost.step for cost in costs if not cost.is_measured and cost.calls[2]]
    if assumed:
        yield (
            f"tokens of {', '.join(dict.fromkeys(assumed))} are assumed; `--sample 20` sends 20 "
            "source rows and measures them"
        )
    for role in dict.fromkeys(cost.role for cost in costs):
        spec = recipe.models[role]
        assert isinstance(spec, ChatSpec)
        if price_of(spec, state) is None:
            yield (
                f"no price is known for models.{role} ({spec.model!r}): give it `price: {{input: "
                "USD, output: USD}` for a million tokens"
            )
        elif spec.price is None and isinstance(spec, OpenAISpec) and spec.urls:
            yield f"the price of models.{role} ({spec.model!r}) is that of {AS_OF}"
        if isinstance(spec, OpenAISpec) and spec.mode == "batch":
            yield f"models.{role} is asked through the batch API, at half the price"
