"""`datakit ledger ...`: the answers that were paid for."""

import json
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datakit.cli_options import Json_, Outputs_, Recipe_, Set_, State_, loaded, stoppable
from datakit.errors import InputError
from datakit.text import dollars, plain, shorten

if TYPE_CHECKING:
    from datakit.models.ledger import Ledger

ledger_app = typer.Typer(help="The answers that were paid for.", no_args_is_help=True)

Model_ = Annotated[str | None, typer.Option(help="Only this model's answers.")]
File_ = Annotated[Path, typer.Argument(help="The JSONL file.")]


def _opened(state: Path | None) -> "closing[Ledger]":
    from datakit.models.identity import default_state
    from datakit.models.ledger import Ledger

    return Ledger.opened(state or default_state())


@ledger_app.command("stats")
def stats(state: State_ = None, as_json: Json_ = False) -> None:
    """Count answers and tokens by model, and dollars by recipe."""
    with _opened(state) as book:
        answers, spending, path = book.stats(), book.spending(), book.path
    if as_json:
        print(json.dumps({"path": str(path), "models": answers, "spending": spending}))
        return
    print(path)
    for row in answers:
        print(
            f"{plain(row['model'])}: {_answers(row['answers'])}, "
            f"{row['input_tokens']:,} tokens in, {row['output_tokens']:,} out"
        )
    for row in spending:
        print(
            f"{plain(row['recipe'])} / {plain(row['model'])}: {row['sent']:,} sent for "
            f"{dollars(row['paid_usd'])}, {row['failed']:,} of them failed "
            f"({dollars(row['wasted_usd'])} wasted); {row['replayed']:,} replayed "
            f"({dollars(row['saved_usd'])} saved)"
        )


@ledger_app.command("list")
def list_(
    model: Model_ = None,
    count: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 20,
    state: State_ = None,
    as_json: Json_ = False,
) -> None:
    """Show the answers written last, newest first."""
    with _opened(state) as book:
        found = book.newest(model, count)
    for key, entry, written in found:
        if as_json:
            print(json.dumps({"key": key, "written": written} | entry.model_dump(mode="json")))
            continue
        when = datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M:%S")
        print(f"{key[:12]}  {when}  {plain(entry.model)}  draw {entry.draw}")
        print(f"  {shorten(_asked(entry.request), 110)}\n  -> {shorten(entry.reply.text, 110)}")


@ledger_app.command("show")
def show(
    key: Annotated[str, typer.Argument(help="An answer's key, or how it begins.")],
    state: State_ = None,
    as_json: Json_ = False,
) -> None:
    """Show one answer: what was asked, what came, and every attempt."""
    with _opened(state) as book:
        whole, entry, attempts = book.find(key)
    tries = [attempt._asdict() for attempt in attempts]
    data = {"key": whole} | entry.model_dump(mode="json") | {"attempts": tries}
    # Escaped as ASCII, nothing in it can move the cursor of a terminal.
    print(json.dumps(data, indent=None if as_json else 2))


@ledger_app.command("prune")
def prune(
    model: Model_ = None,
    before: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Written before this day (UTC).")
    ] = None,
    unusable: Annotated[
        bool, typer.Option("--unusable", help="Empty, cut by their length, or filtered.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Really remove them.")] = False,
    state: State_ = None,
) -> None:
    """Forget answers that meet every condition; a run that needs them asks again."""
    moment = before.replace(tzinfo=UTC).timestamp() if before else None
    with _opened(state) as book:
        count = book.prune(model, moment, unusable, yes)
    it = "it" if count == 1 else "them"
    print(f"{_answers(count)} removed" if yes else f"{_answers(count)}; --yes removes {it}")


@ledger_app.command("export")
def export(file: File_, model: Model_ = None, state: State_ = None) -> None:
    """Write answers to a file."""
    with _opened(state) as book:
        print(f"{_answers(book.export(file, model))} written to {file}")


@ledger_app.command("import")
def import_(file: File_, state: State_ = None) -> None:
    """Read answers from a file, all or none: an export, or the output of a provider's batch."""
    from datakit.models.batch_files import holds_responses, read_responses

    with stoppable(), _opened(state) as book:
        count, fresh = read_responses(book, file) if holds_responses(file) else book.load(file)
    print(f"{_answers(count)} read, {fresh:,} of them new")


@ledger_app.command("requests")
def requests(
    recipe: Recipe_,
    file: File_,
    overrides: Set_ = [],  # noqa: B006
    outputs: Outputs_ = Path("outputs"),
    state: State_ = None,
) -> None:
    """Write the requests that a run would send now as a batch file, to be answered anywhere."""
    from datakit.plan import outstanding

    if file.exists():
        raise InputError(f"{str(file)!r} exists; name another file")
    with stoppable():
        count = outstanding(loaded(recipe, overrides), outputs, state, file)
    if not count:
        file.unlink()
        print("every request that can be asked now is answered: run the recipe")
        return
    print(
        f"{count:,} request{'' if count == 1 else 's'} written to {file}; read the answers back "
        "with `datakit ledger import`, then run the recipe"
    )


def _answers(count: int) -> str:
    return f"{count:,} answer{'' if count == 1 else 's'}"


def _asked(request: dict[str, Any]) -> str:
    """The last words of a request, of whatever shape: an import may hold any."""
    messages = request.get("messages")
    last: Any = messages[-1] if isinstance(messages, list) and messages else request.get("prompt")
    return str(last.get("content") if isinstance(last, dict) else last)
