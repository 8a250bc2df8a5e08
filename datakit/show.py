"""What the commands print for people."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from datakit.catalog import find_step, step_names
from datakit.engine import Markers, execute
from datakit.lineage import funnel
from datakit.pipeline import rehearsal
from datakit.plan import Plan
from datakit.progress import Progress
from datakit.recipe import Recipe, load_recipe
from datakit.records import from_frame
from datakit.session import Settings
from datakit.step import Step
from datakit.store import Store
from datakit.text import plain, shorten
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
        known = "" if meter.is_priced else " (models without a known price not counted)"
        print(
            f"paid ${meter.usd:,.4f}, of which ${meter.wasted_usd:,.4f} for failed tries; "
            f"replaying saved ${meter.saved_usd:,.4f}{known}"
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
        print(f"{unanswered:,} rows went unanswered; run the same command again to ask for them")


def show_plan(plan: Plan) -> None:
    """What a run will ask and cost: a table, the turns of local models, what it rests on."""
    table = Table(box=None, pad_edge=False)
    for name in ("step", "role", "model"):
        table.add_column(name, overflow="fold")
    for name in ("known", "calls", "tokens in", "tokens out", "US$"):
        table.add_column(name, justify="right")
    for cost in plan.costs:
        table.add_row(
            cost.step,
            cost.role,
            plain(cost.model),
            f"{cost.known:,}",
            _between(cost.calls),
            _between(cost.input_tokens),
            _between(cost.output_tokens),
            "unknown" if cost.usd is None else _between(cost.usd, 2),
        )
    console = Console(soft_wrap=True)
    console.print(table)
    if plan.usd is not None:
        console.print(f"in all: US$ {_between(plan.usd, 2)}", highlight=False)
    for number, roles in enumerate(plan.loads, start=1):
        console.print(f"turn {number}: vLLM serves {', '.join(roles)}", highlight=False)
    for note in plan.notes:
        console.print(f"note: {plain(note)}", highlight=False, markup=False)


def _between(numbers: tuple[float, float, float], places: int = 0) -> str:
    """The expected number, and the range where it is one."""
    least, expected, most = (f"{number:,.{places}f}" for number in numbers)
    return expected if least == most else f"{expected} ({least}-{most})"


def show_rehearsal(source: str, rows: int, overrides: Sequence[str]) -> None:
    """Run with scripted models in a temporary folder; print counts and a sample of each step."""
    recipe = rehearsal(load_recipe(source, overrides))
    with tempfile.TemporaryDirectory(prefix="datakit-rehearsal-") as folder:
        settings = Settings(
            outputs=Path(folder) / "outputs",
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
