"""What several commands share: their options, and how they load a recipe and stop."""

import contextlib
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from datakit.errors import Stopped
from datakit.text import plain

if TYPE_CHECKING:
    from datakit.recipe import Recipe

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
MaxUsd_ = Annotated[
    float | None, typer.Option("--max-usd", min=0, help="Stop before this run costs more.")
]
MaxTokens_ = Annotated[
    int | None, typer.Option("--max-tokens", min=0, help="Stop before this run uses more.")
]


def loaded(recipe: str, overrides: Sequence[str]) -> "Recipe":
    """The checked recipe, after saying what may surprise in it."""
    from datakit.recipe import load_recipe, notes

    checked = load_recipe(recipe, overrides)
    for note in notes(checked):
        print(f"note: {plain(note)}", file=sys.stderr)
    return checked


@contextlib.contextmanager
def stoppable() -> Generator[None]:
    """Make a signal an error of ours, before the parser of the command line takes it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        said = str(stop) or "stopped by SIGINT"
        again = "the same command goes on where it stopped, and sends no answered request again"
        raise Stopped(f"{said}; {again}") from stop
