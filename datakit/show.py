"""What the commands print for people."""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from datakit.catalog import find_step, step_names
from datakit.engine import Markers, execute
from datakit.estimate import Range, summed, trial_outputs
from datakit.lineage import funnel
from datakit.pipeline import rehearsal
from datakit.plan import Plan
from datakit.progress import Progress
from datakit.recipe import Recipe, load_recipe
from datakit.session import Settings
from datakit.step import Step
from datakit.store import Store
from datakit.tables import from_frame
from datakit.text import dollars, plain, shorten
from datakit.versions import StepCount, Version
from datakit.work import perform


def show_version(version: Version, watch: Progress) -> None:
    """The funnel, the call counts and the folder tree of a version."""
    manifest = version.manifest
    for count in manifest.funnel:
        print(_step_line(count))
    meter = watch.meter
    print(
        f"calls: {meter.sent:,} sent, {meter.replayed:,} replayed; "
        f"tokens: {meter.input_tokens:,} in, {meter.output_tokens:,} out"
    )
    if meter.usd or meter.saved_usd:
        known = "" if meter.is_priced else " (without models whose price is not known)"
        print(
            f"paid {dollars(meter.usd)}, {dollars(meter.wasted_usd)} of it for failed tries; "
            f"replaying saved {dollars(meter.saved_usd)}{known}"
        )
    word = "new" if watch.is_new else "unchanged"
    rows = ", ".join(f"{split} {rows:,}" for split, rows in manifest.splits.items())
    print(f"{version.address} ({word}; {rows}; digest {manifest.digest[:12]})")
    folder = _short(version.folder)
    print(f"{folder}/")
    names = sorted(path.relative_to(version.folder) for path in version.folder.rglob("*.*"))
    for name in names:
        print(f"  {name}")
    unanswered = sum(count.unanswered for count in manifest.funnel)
    if unanswered:
        rows = "1 row" if unanswered == 1 else f"{unanswered:,} rows"
        print(f"{rows} went unanswered; run the same command again to ask for what is missing")
    if manifest.pending:
        wait = "1 row waits" if manifest.pending == 1 else f"{manifest.pending:,} rows wait"
        print(
            f"a partial pre-release: {wait} for answers; run the same command without "
            "--finish-partial to ask for them"
        )


def show_plan(plan: Plan) -> None:
    """What a run will ask and cost: a table, the turns of local models, what it rests on."""
    if not plan.costs:
        print(f"{plan.recipe}: no step asks a model, so a run costs nothing")
        return
    if not any(cost.calls[2] for cost in plan.costs):
        print(f"{plan.recipe}: every answer is there, so a run sends nothing")
    else:
        print(f"{'':<10} {'calls':>11} {'tokens in':>15} {'tokens out':>15} {'US$':>13}")
        for cost in plan.costs:
            print(f"{cost.step} asks {cost.role} ({plain(cost.model)}){_replayed(cost.known)}")
            numbers = (cost.calls, cost.input_tokens, cost.output_tokens)
            _show_ranges(numbers, cost.usd)
        if len(plan.costs) > 1:
            print("in all" + ("" if plan.is_priced else ", without what has no known price"))
            sums = [
                summed([getattr(cost, name) for cost in plan.costs])
                for name in ("calls", "input_tokens", "output_tokens")
            ]
            _show_ranges(sums, plan.usd)
    for number, roles in enumerate(plan.loads, start=1):
        print(f"turn {number}: vLLM serves {', '.join(roles)}")
    for note in plan.notes:
        print(f"note: {plain(note)}")


def _replayed(known: int) -> str:
    if not known:
        return ""
    return f"; replays {known:,} answer{'' if known == 1 else 's'}"


def _show_ranges(numbers: Sequence[Range], usd: Range | None) -> None:
    """Least, expected and most on a line each, or one line where they are the same."""
    whole = (*numbers, usd or (0.0, 0.0, 0.0))
    names = ("at least", "expected", "at most")
    if all(one[0] == one[2] for one in whole):
        names = ("", "exactly", "")
    for at, name in enumerate(names):
        calls, tokens_in, tokens_out, _ = (one[at] for one in whole)
        cost = "unknown" if usd is None else dollars(usd[at]) if usd[2] else "free"
        if name:
            print(
                f"  {name:<8} {calls:>11,.0f} {_about(tokens_in):>15} {_about(tokens_out):>15} "
                f"{cost:>13}"
            )


def _about(number: float) -> str:
    """Three digits that count: more would promise too much."""
    places = 0 if number < 1000 else 2 - math.floor(math.log10(number))
    return f"{round(number, places):,.0f}"


def show_rehearsal(source: str, rows: int, overrides: Sequence[str], outputs: Path) -> None:
    """Run with scripted models in a temporary folder; print counts and a sample of each step.

    outputs: where the versions lie that a recipe may read.
    """
    recipe = rehearsal(load_recipe(source, overrides))
    with tempfile.TemporaryDirectory(prefix="datakit-rehearsal-") as folder:
        settings = Settings(
            outputs=trial_outputs(Path(folder), outputs),
            state=Path(folder) / "state",
            base=recipe.base,
            seed=recipe.seed,
            rows_per_part=recipe.rows_per_part,
            limit=rows,
            models=recipe.models,
        )
        markers = execute(recipe, settings, lambda works: [perform(work) for work in works])
        for position, count in enumerate(funnel(recipe.steps, recipe.kinds(), markers)):
            print(_step_line(count))
            print(f"    {_sample(recipe, Store(settings.outputs), markers, position)}")
    print("rehearsed with scripted models; nothing was sent and nothing is kept")


def _sample(recipe: Recipe, store: Store, markers: Markers, position: int) -> str:
    """The own fields of a step's first row, a line each."""
    kind = recipe.kinds()[position]
    for done in markers[position]:
        for chunk in done.chunks:
            row = from_frame(kind, store.read(chunk))[0]
            fields = {name: value for name, value in row.body().items() if value}
            said = [f"{name}: {shorten(_spoken(value), 160)}" for name, value in fields.items()]
            return "\n    ".join(said)
    return "(no row came this far)"


def _spoken(value: object) -> str:
    """Turns as `role: text`, all else as JSON."""
    if isinstance(value, list):
        items = cast("list[Any]", value)
        if all(isinstance(item, dict) and item.keys() == {"role", "content"} for item in items):
            return " / ".join(f"{item['role']}: {item['content']}" for item in items)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _step_line(count: StepCount) -> str:
    reasons = ", ".join(f"{reason} {rows:,}" for reason, rows in count.reasons.items())
    dropped = f"{count.dropped:,} dropped" + (f" ({reasons})" if reasons else "")
    return f"{count.alias:<12} {count.rows_in:>8,} in {count.kept:>8,} kept  {dropped}"


def _short(path: Path) -> str:
    """A path as seen from here where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def show_methods(name: str | None, as_json: bool) -> None:
    """One line for each step, or one step in full."""
    steps = {one: find_step(one) for one in ([name] if name else step_names())}
    if as_json:
        print(json.dumps({one: _described(step) for one, step in steps.items()}))
    elif name is None:
        width = max(map(len, steps))
        for one, step in steps.items():
            print(f"{one:<{width}}  {_described(step)['summary']}")
    else:
        _show_step(name, steps[name])


def _show_step(name: str, step: type[Step]) -> None:
    import sys

    print(f"{name}\n\n{sys.modules[step.__module__].__doc__ or ''}\nFields:")
    for field, said in _described(step)["fields"].items():
        print(f"  {field}: {said}")


def _described(step: type[Step]) -> dict[str, Any]:
    import sys

    documentation = sys.modules[step.__module__].__doc__ or ""
    fields = {
        name: f"{_type_name(field.annotation)}"
        + (" (required)" if field.is_required() else f" = {field.default!r}")
        for name, field in step.model_fields.items()
    }
    return {
        "summary": documentation.strip().split("\n")[0],
        "takes": [kind.__name__ for kind in step.takes()],
        "fields": fields,
    }


def _type_name(annotation: Any) -> str:
    return (
        annotation.__name__
        if isinstance(annotation, type)
        else str(annotation).replace("typing.", "")
    )
