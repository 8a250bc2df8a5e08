"""The command line: `datakit ...` and `python -m datakit`.

Exit codes: 0 done, 1 the data failed a gate, 2 wrong input, 3 stopped and resumable, 4 the outside
world failed, 70 a bug.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from datakit import __version__
from datakit.cli_ledger import ledger_app
from datakit.cli_options import (
    Json_,
    MaxTokens_,
    MaxUsd_,
    Outputs_,
    Recipe_,
    Set_,
    State_,
    loaded,
    stoppable,
)
from datakit.errors import DatakitError, InputError, OutsideError
from datakit.text import plain, shorten

app = typer.Typer(
    name="datakit",
    help="Preference data, built and curated: a recipe becomes a versioned dataset.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(ledger_app, name="ledger")


def _version(value: bool) -> None:
    if value:
        print(f"datakit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    del version
    _Debug.on = debug


class _Debug:
    """Whether an error shows its traceback."""

    on = False


@app.command()
def run(
    recipe: Recipe_,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="At most so many source rows: a trial, as a dataset apart, without gate."
        ),
    ] = None,
    overrides: Set_ = [],  # noqa: B006
    outputs: Outputs_ = Path("outputs"),
    state: State_ = None,
    offline: Annotated[bool, typer.Option("--offline", help="Send nothing; only replay.")] = False,
    lanes: Annotated[int, typer.Option(min=1, help="Cut row steps into so many works.")] = 1,
    max_usd: MaxUsd_ = None,
    max_tokens: MaxTokens_ = None,
    finish_partial: Annotated[
        bool,
        typer.Option(
            "--finish-partial",
            help="Send nothing; make a pre-release of the rows that are complete.",
        ),
    ] = False,
    as_json: Json_ = False,
) -> None:
    """Run a recipe to a version."""
    from datakit.pipeline import run as run_recipe
    from datakit.progress import Progress

    checked = loaded(recipe, overrides)
    with stoppable(), Progress() as watch:
        version = run_recipe(
            checked,
            limit=limit,
            outputs=outputs,
            state=state,
            offline=offline,
            lanes=lanes,
            watch=watch,
            max_usd=max_usd,
            max_tokens=max_tokens,
            finish_partial=finish_partial,
        )
    if as_json:
        found = version.manifest.model_dump(mode="json")
        print(json.dumps(found | {"folder": str(version.folder), "new": watch.is_new}))
    else:
        from datakit.show import show_version

        show_version(version, watch)


@app.command()
def check(recipe: Recipe_, overrides: Set_ = []) -> None:  # noqa: B006
    """Find every mistake in a recipe without running it."""
    checked = loaded(recipe, overrides)
    line = " -> ".join(
        f"{placed.alias} ({kind.__name__})"
        for placed, kind in zip(checked.steps, checked.kinds(), strict=True)
    )
    print(f"{checked.name}: {len(checked.steps)} steps\n{line}")


@app.command()
def rehearse(
    recipe: Recipe_,
    rows: Annotated[int, typer.Option(min=1, help="Source rows to use.")] = 20,
    overrides: Set_ = [],  # noqa: B006
    outputs: Outputs_ = Path("outputs"),
) -> None:
    """Run the whole recipe on a few rows with scripted models: no cost, nothing kept."""
    from datakit.show import show_rehearsal

    with stoppable():
        show_rehearsal(recipe, rows, overrides, outputs)


@app.command()
def plan(
    recipe: Recipe_,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Send so many source rows first, and measure; they are kept."),
    ] = None,
    max_usd: MaxUsd_ = None,
    overrides: Set_ = [],  # noqa: B006
    outputs: Outputs_ = Path("outputs"),
    state: State_ = None,
    as_json: Json_ = False,
) -> None:
    """Say what a run will ask, and what that costs, without sending anything."""
    from datakit.plan import plan_of
    from datakit.show import show_plan

    checked = loaded(recipe, overrides)
    with stoppable():
        found = plan_of(checked, outputs, state, sample, max_usd)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        show_plan(found)


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The recipe file to write.")],
    source: Annotated[
        str, typer.Option("--from", metavar="RECIPE", help="The recipe to copy.")
    ] = "quickstart",
) -> None:
    """Write a recipe file that begins as a copy of another."""
    from datakit.recipe_files import new_recipe

    new_recipe(file, source)
    print(f"wrote {file}; next: datakit rehearse {file}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One step, in full.")] = None,
    as_json: Json_ = False,
) -> None:
    """List the steps, or show one with its fields."""
    from datakit.show import show_methods

    show_methods(name, as_json=as_json)


@app.command()
def schemas(
    folder: Annotated[Path, typer.Option("--out", help="Where to write them.")] = Path("schemas"),
) -> None:
    """Write the JSON Schemas of recipes, records and manifests."""
    from datakit.schemas import write_schemas

    for path in write_schemas(folder):
        print(path)


@app.command()
def doctor(
    install_vllm: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Build a virtual environment with vLLM in DIR."),
    ] = None,
    state: State_ = None,
) -> None:
    """Say what is installed and what is missing, or set up vLLM beside it."""
    from datakit.doctor import build_vllm_environment, diagnose

    if install_vllm is not None:
        print(build_vllm_environment(install_vllm))
        return
    for line in diagnose(state):
        print(line)


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


def main() -> None:
    """Run the command line and exit with the code that says what happened."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except typer.Abort:
        sys.exit(InputError.exit_code)
    except BrokenPipeError:
        # Whoever read the output has seen enough; the rest of it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except DatakitError as error:
        if _Debug.on:
            print(plain(traceback.format_exc()), file=sys.stderr)
        print(f"datakit: {plain(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"datakit: {plain(str(error))}", file=sys.stderr)
        sys.exit(OutsideError.exit_code)
    except Exception as error:
        usage = getattr(error, "exit_code", None)
        if usage is not None and hasattr(error, "show"):
            error.show()  # type: ignore[attr-defined]
            sys.exit(usage)
        if _Debug.on:
            print(plain(traceback.format_exc()), file=sys.stderr)
        name = type(error).__name__
        print(
            f"datakit: a bug: {name}: {shorten(str(error), 300)}; run again with "
            "`datakit --debug ...` for the traceback",
            file=sys.stderr,
        )
        sys.exit(70)
