"""The command line: `datakit ...` and `python -m datakit`.

Exit codes: 0 done, 1 the data failed a gate, 2 wrong input, 3 stopped and resumable, 4 the outside
world failed, 70 a bug.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from datakit import __version__
from datakit.errors import DatakitError, InputError, OutsideError, Stopped
from datakit.text import plain, shorten

if TYPE_CHECKING:
    from datakit.recipe import Recipe

app = typer.Typer(
    name="datakit",
    help="Preference data, built and curated: a recipe becomes a versioned dataset.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
ledger_app = typer.Typer(help="The answers that were paid for.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")

Recipe_ = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A file, or a shipped recipe's name.")
]
Set_ = Annotated[
    list[str], typer.Option("--set", metavar="PATH=VALUE", help="Change a value of the recipe.")
]
Outputs_ = Annotated[Path, typer.Option("--outputs", help="Where parts and versions go.")]
State_ = Annotated[
    Path | None, typer.Option("--state", help="Where the ledger and the vectors lie.")
]
Json_ = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


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


def _loaded(recipe: str, overrides: Sequence[str]) -> "Recipe":
    """The checked recipe, after saying what may surprise in it."""
    from datakit.recipe import load_recipe, notes

    loaded = load_recipe(recipe, overrides)
    for note in notes(loaded):
        print(f"note: {plain(note)}", file=sys.stderr)
    return loaded


@contextlib.contextmanager
def _stoppable() -> Generator[None]:
    """Make a signal an error of ours, before the parser of the command line takes it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(str(stop) or "stopped by SIGINT") from stop


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
    as_json: Json_ = False,
) -> None:
    """Run a recipe to a version."""
    from datakit.pipeline import run as run_recipe
    from datakit.progress import Progress

    loaded = _loaded(recipe, overrides)
    with _stoppable(), Progress() as watch:
        version = run_recipe(
            loaded,
            limit=limit,
            outputs=outputs,
            state=state,
            offline=offline,
            lanes=lanes,
            watch=watch,
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
    loaded = _loaded(recipe, overrides)
    line = " -> ".join(
        f"{placed.alias} ({kind.__name__})"
        for placed, kind in zip(loaded.steps, loaded.kinds(), strict=True)
    )
    print(f"{loaded.name}: {len(loaded.steps)} steps\n{line}")


@app.command()
def rehearse(
    recipe: Recipe_,
    rows: Annotated[int, typer.Option(min=1, help="Source rows to use.")] = 20,
    overrides: Set_ = [],  # noqa: B006
) -> None:
    """Run the whole recipe on a few rows with scripted models: no cost, nothing kept."""
    from datakit.show import show_rehearsal

    with _stoppable():
        show_rehearsal(recipe, rows, overrides)


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


@ledger_app.command("export")
def ledger_export(
    file: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    model: Annotated[str | None, typer.Option(help="Only this model's answers.")] = None,
    state: State_ = None,
) -> None:
    """Write answers to a file."""
    from datakit.models.identity import default_state
    from datakit.models.ledger import Ledger

    with Ledger.opened(state or default_state()) as book:
        print(f"{book.export(file, model):,} answers written to {file}")


@ledger_app.command("import")
def ledger_import(
    file: Annotated[Path, typer.Argument(help="The JSONL file to read.")], state: State_ = None
) -> None:
    """Read answers from a file, all or none."""
    from datakit.models.identity import default_state
    from datakit.models.ledger import Ledger

    with _stoppable(), Ledger.opened(state or default_state()) as book:
        count, fresh = book.load(file)
    print(f"{count:,} answers read, {fresh:,} of them new")


@ledger_app.command("stats")
def ledger_stats(state: State_ = None, as_json: Json_ = False) -> None:
    """Count answers and tokens by model."""
    from datakit.models.identity import default_state
    from datakit.models.ledger import Ledger

    with Ledger.opened(state or default_state()) as book:
        stats, path = book.stats(), book.path
    if as_json:
        print(json.dumps({"path": str(path), "models": stats}))
        return
    print(path)
    for row in stats:
        print(
            f"{plain(row['model'])}: {row['answers']:,} answers, "
            f"{row['input_tokens']:,} tokens in, {row['output_tokens']:,} out"
        )


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


def main() -> None:
    """Run the command line and exit with the code that says what happened."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)
    again = "; the same command goes on where it stopped, and sends no answered request again"
    try:
        sys.exit(app(standalone_mode=False))
    except Stopped as stop:
        print(f"datakit: {stop}{again}", file=sys.stderr)
        sys.exit(Stopped.exit_code)
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
