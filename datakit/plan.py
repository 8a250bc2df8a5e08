"""What a run will ask and cost, before it asks anything.

The steps that send nothing are done for real (the run reuses them). The first requests that the
ledger does not know are counted one by one; what follows from answers that nobody has yet is
scaled from rehearsals with scripted models. Tokens of an answer are those that the same step
got from the same model before (`--sample` sends some rows to find out), else an assumption.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit

from datakit.engine import Markers, execute, stages
from datakit.errors import InputError, Stopped
from datakit.estimate import Counts, Estimate, Range, Rows, history, rehearsed, summed
from datakit.models.batch_files import write_requests
from datakit.models.gpus import phases, visible_gpus
from datakit.models.ledger import Ledger
from datakit.models.prices import AS_OF, TABLE, price_of
from datakit.models.specs import ChatSpec, OpenAISpec, Price, VLLMSpec
from datakit.pipeline import here, settings_of
from datakit.recipe import Recipe
from datakit.session import Settings, Watch
from datakit.step import roles
from datakit.values import Value


class Cost(Value):
    """What one step will ask of one model: (least, expected, most); usd None: no known price.

    known: answers that are there already. is_measured: the tokens are those that the step got from
    the model before.
    """

    step: str
    role: str
    model: str
    known: int
    calls: Counts
    input_tokens: Counts
    output_tokens: Counts
    usd: Range | None
    is_measured: bool


class Plan(Value):
    """What a run will ask.

    usd: of the models whose price is known; None where none is. loads: the local models that are
    up together, turn after turn. notes: what the numbers rest on.
    """

    recipe: str
    costs: tuple[Cost, ...]
    usd: Range | None
    is_priced: bool
    loads: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def plan_of(
    recipe: Recipe,
    outputs: Path,
    state: Path | None = None,
    sample: int | None = None,
    max_usd: float | None = None,
) -> Plan:
    """The plan of a recipe; nothing is sent unless `sample` says how many source rows to send.

    max_usd: caps what the sample spends. Raises what a run raises before it sends anything.
    """
    if max_usd is not None and sample is None:
        raise InputError("--max-usd caps what a sample spends: give --sample too")
    stopped = _send(recipe, outputs, state, sample, max_usd) if sample else ""
    watch, markers, settings = _counted(recipe, outputs, state, "count")
    rows = Rows(recipe, markers, rehearsed(recipe, settings))
    used = history(settings.state, recipe.name)
    costs: list[Cost] = []
    for placed in recipe.steps:
        for role in dict.fromkeys(role for _, role, _ in roles(placed.step)):
            spec = recipe.models[role]
            if isinstance(spec, ChatSpec):
                place = (placed.alias, role)
                found = watch.meter.outstanding.get(place, (0, 0))
                past = used.get((placed.alias, spec.resolved_identity()))
                costs.append(
                    _cost(
                        rows.estimate(placed, role, spec, found, past),
                        place,
                        spec,
                        watch.meter.known[place],
                        price_of(spec, settings.state),
                    )
                )
    priced = [cost.usd for cost in costs if cost.usd is not None]
    loads, lacking = _loads(recipe)
    return Plan(
        recipe=recipe.name,
        costs=tuple(costs),
        usd=summed(priced) if priced else None,
        is_priced=len(priced) == len(costs),
        loads=loads,
        notes=(
            *filter(None, (stopped, lacking)),
            *(f"what {alias} will ask is not known: no row came so far" for alias in rows.unseen),
            *_notes(recipe, settings.state, costs),
        ),
    )


def outstanding(recipe: Recipe, outputs: Path, state: Path | None, file: Path) -> int:
    """Write the requests that a run would send now to a batch file; returns how many."""
    _, _, settings = _counted(recipe, outputs, state, "queue")
    with Ledger.opened(settings.state) as ledger:
        return write_requests(ledger, file, run=settings.run)


def _send(
    recipe: Recipe, outputs: Path, state: Path | None, rows: int, max_usd: float | None
) -> str:
    """Run the first source rows for real; their answers stay in the ledger.

    Returns what stopped it, where the budget did.
    """
    settings = settings_of(recipe, outputs, state, limit=rows, max_usd=max_usd)
    try:
        execute(recipe, settings, here(Watch()))
    except Stopped as stop:
        return f"the sample stopped: {str(stop).partition(';')[0]}"
    return ""


def _counted(
    recipe: Recipe, outputs: Path, state: Path | None, mode: str
) -> tuple[Watch, Markers, Settings]:
    """Do what can be done without sending; the watch counts what would be sent."""
    watch = Watch()
    # Offline, for nothing is sent, so that no key is needed.
    settings = settings_of(recipe, outputs, state, offline=True)
    counting = {"instead": mode, "finish_partial": mode == "count"}
    settings = settings.model_copy(update=counting)
    return watch, execute(recipe, settings, here(watch), through=True), settings


def _cost(
    found: Estimate, place: tuple[str, str], spec: ChatSpec, known: int, price: Price | None
) -> Cost:
    usd = None
    if price is not None:
        least, expected, most = (
            round(price.usd(one, two), 6)
            for one, two in zip(found.input_tokens, found.output_tokens, strict=True)
        )
        usd = least, expected, most
    return Cost(
        step=place[0],
        role=place[1],
        model=spec.resolved_identity(),
        known=known,
        calls=found.calls,
        input_tokens=found.input_tokens,
        output_tokens=found.output_tokens,
        usd=usd,
        is_measured=found.is_measured,
    )


def _loads(recipe: Recipe) -> tuple[tuple[tuple[str, ...], ...], str]:
    """The local models of each stage, as they are up in turns; or why they cannot be here."""
    found: list[tuple[str, ...]] = []
    for _, stage in stages(recipe.steps):
        named = dict.fromkeys(role for placed in stage for _, role, _ in roles(placed.step))
        local = {role: spec for role in named if isinstance(spec := recipe.models[role], VLLMSpec)}
        try:
            found += map(tuple, phases(local, visible_gpus()) if local else [])
        except InputError as error:
            return (), f"this machine cannot run it: {error}"
    return tuple(found), ""


def _notes(recipe: Recipe, state: Path, costs: Sequence[Cost]) -> Iterator[str]:
    """What the numbers rest on."""
    assumed = [cost.step for cost in costs if not cost.is_measured and cost.calls[2]]
    if assumed:
        yield (
            f"the tokens of {_listed(assumed)} are assumed; `--sample 20` sends 20 source rows "
            "and measures them"
        )
    specs: dict[str, ChatSpec] = {}
    for cost in costs:
        spec = recipe.models[cost.role]
        assert isinstance(spec, ChatSpec)
        specs[cost.role] = spec
    for role in dict.fromkeys(cost.role for cost in costs if cost.calls[2]):
        spec = specs[role]
        if isinstance(spec, OpenAISpec) and not spec.urls:
            yield (
                f"models.{role} has no base_url, and what it has no recorded answer to stops a run"
            )
    for role, spec in specs.items():
        if price_of(spec, state) is None:
            yield (
                f"no price is known for models.{role} ({spec.model!r}): give it `price: {{input: "
                "USD, output: USD}` for a million tokens"
            )
    dated = [f"models.{role}" for role, spec in specs.items() if _is_dated(spec, state)]
    if dated:
        yield (
            f"the price{'' if len(dated) == 1 else 's'} of {_listed(dated)} "
            f"{'is' if len(dated) == 1 else 'are'} of {AS_OF}, {_age(AS_OF)}: see what your "
            "provider asks now, and set `price:` where it differs"
        )
    batches = [
        f"models.{role}"
        for role, spec in specs.items()
        if isinstance(spec, OpenAISpec) and spec.mode == "batch"
    ]
    if batches:
        verb = "is" if len(batches) == 1 else "are"
        yield f"{_listed(batches)} {verb} asked through the batch API, at half the price"


def _listed(names: Iterable[str]) -> str:
    *most, last = dict.fromkeys(names)
    return f"{', '.join(most)} and {last}" if most else last


def _is_dated(spec: ChatSpec, state: Path) -> bool:
    """Whether the price comes from the table that ships, and not from the user."""
    if spec.price is not None or not isinstance(spec, OpenAISpec) or not spec.urls:
        return False
    host = urlsplit(spec.urls[0]).hostname or ""
    # No prices.yaml lies below a file of that name.
    shipped = price_of(spec, state / "prices.yaml" / "none")
    return spec.model in TABLE.get(host, {}) and price_of(spec, state) == shipped


def _age(month: str) -> str:
    """How long ago a month was."""
    year, number = map(int, month.split("-"))
    today = date.today()
    months = (today.year - year) * 12 + today.month - number
    return "this month" if months < 1 else f"{months} month{'' if months == 1 else 's'} ago"
