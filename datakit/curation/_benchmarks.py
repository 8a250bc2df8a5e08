"""Benchmark items, read from files or from the Hub, and the texts of rows that meet them."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from datakit.curation._texts import Over
from datakit.errors import InputError, OutsideError
from datakit.kit import Kit
from datakit.text import digest, near_miss, shorten

Columns = Mapping[str, str | tuple[str, ...]]

ROLES = ("benchmark", "item_id", "text")
_HUB = re.compile(
    r"hub:(?P<dataset>[\w.-]+/[\w.-]+)(/(?P<config>[^:@/]+))?(:(?P<split>[^:@]+))?"
    r"(@(?P<revision>.+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PROMPTS = ("messages", "prompt", "prompt_rejected", "context")
_ANSWERS = ("chosen", "rejected", "completion", "draft", "edited", "responses")


@dataclass(frozen=True, eq=False)
class Items:
    """Distinct texts of benchmark items, sorted. names: `benchmark/item_id` of each."""

    names: tuple[str, ...]
    texts: tuple[str, ...]


def each_text(frame: pl.DataFrame, over: Over) -> pl.DataFrame:
    """`row` (number) and `text` of every turn and every answer that is not blank, by row."""
    names = (*(_PROMPTS if over != "response" else ()), *(_ANSWERS if over != "prompt" else ()))
    lists = [_listed(name, frame.schema[name]) for name in names if name in frame.columns]
    if not lists:
        raise InputError(f"`over: {over}` compares nothing here: these rows have no {over}")
    rows = frame.select(text=pl.concat_list(lists)).with_row_index("row").explode("text")
    return rows.filter(pl.col("text").str.strip_chars().fill_null("") != "")


def _listed(name: str, dtype: pl.DataType) -> pl.Expr:
    """A column of texts, turns or responses as a list of texts."""
    if dtype == pl.String:
        return pl.concat_list(pl.col(name))
    inside = "text" if name == "responses" else "content"
    return pl.col(name).list.eval(pl.element().struct.field(inside)).cast(pl.List(pl.String()))


def fingerprint(addresses: Sequence[str], kit: Kit) -> str:
    """Of the bytes of every file and the commit of every set on the Hub."""
    return digest([_mark(address, kit) for address in addresses])


def read_items(addresses: Sequence[str], columns: Columns, kit: Kit) -> Items:
    """The items of all benchmarks; of equal texts the one with the first name.

    Read once as long as the bytes stand. Raises InputError where a file has not the columns, and
    OutsideError where the Hub does not answer.
    """
    named = tuple((role, (at,) if isinstance(at, str) else at) for role, at in columns.items())
    places = tuple(
        (at, at if at.startswith("hub:") else str(kit.path(at)), _mark(at, kit)) for at in addresses
    )
    return _together(places, named)


@lru_cache(maxsize=4)
def _together(
    places: tuple[tuple[str, str, str], ...], columns: tuple[tuple[str, tuple[str, ...]], ...]
) -> Items:
    """The items at (address, place, mark of the bytes)."""
    found = pl.concat([_items(address, place, columns) for address, place, _ in places])
    items = found.sort("name", "text").unique("text", keep="first", maintain_order=True)
    if not items.height:
        raise InputError("the benchmarks hold no item: every text is blank")
    return Items(tuple(shorten(name) for name in items["name"]), tuple(items["text"]))


def _items(
    address: str, place: str, columns: tuple[tuple[str, tuple[str, ...]], ...]
) -> pl.DataFrame:
    """`name` and `text` of one benchmark's items."""
    mapped = dict(columns)
    table = _hub_table(place) if address.startswith("hub:") else _file_table(Path(place))
    for role, names in columns:
        for name in names:
            if name not in table.columns:
                raise InputError(
                    f"benchmark {address!r}: no column {name!r} for {role!r}"
                    f"{near_miss(name, table.columns)}; columns: {', '.join(table.columns)}"
                )
    texts = mapped.get("text", ("text",))
    if texts[0] not in table.columns:
        raise InputError(
            f"benchmark {address!r}: no column {texts[0]!r}; map one with `columns: {{text: NAME}}`"
            f"; columns: {', '.join(table.columns)}"
        )
    for name in texts:
        if table.schema[name] not in (pl.String(), pl.Null()):
            raise InputError(
                f"benchmark {address!r}: column {name!r} holds {table.schema[name]}, not text"
            )
    whole = re.split(r"[/:@]", address.removeprefix("hub:"))
    stem = whole[1] if address.startswith("hub:") else Path(address).name.partition(".")[0]
    benchmark = _column(mapped.get("benchmark", ("benchmark",))[0], table, pl.lit(stem))
    number = pl.int_range(pl.len()).cast(pl.String())
    item = _column(mapped.get("item_id", ("item_id",))[0], table, number)
    name = pl.format("{}/{}", benchmark, item).alias("name")
    found = pl.concat([table.select(name, text=pl.col(one).cast(pl.String())) for one in texts])
    return found.filter(pl.col("text").str.strip_chars().fill_null("") != "")


def _column(name: str, table: pl.DataFrame, otherwise: pl.Expr) -> pl.Expr:
    """A column as text, or `otherwise` where there is none or nothing in it."""
    if name not in table.columns:
        return otherwise
    return pl.coalesce(pl.col(name).cast(pl.String()), otherwise)


def _file_table(path: Path) -> pl.DataFrame:
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        return pl.read_ndjson(path, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(
            f"benchmark {str(path)!r} cannot be read as Parquet or JSON Lines: "
            f"{shorten(str(error))}"
        ) from error


def _hub(address: str) -> tuple[str, str | None, str, str]:
    """Dataset, config, split and revision of an address."""
    found = _HUB.fullmatch(address)
    if found is None:
        raise InputError(f"{address!r} is not hub:org/name[/config][:split][@revision]")
    # Benchmarks are test sets.
    split, revision = found["split"] or "test", found["revision"] or "main"
    return found["dataset"], found["config"], split, _commit(found["dataset"], revision)


@lru_cache(maxsize=64)
def _commit(dataset: str, revision: str) -> str:
    """The commit behind a revision, looked up once a process."""
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, revision=revision).sha or revision
    except Exception as error:
        raise _unreachable(dataset, revision, error) from error


def _hub_table(address: str) -> pl.DataFrame:
    dataset, config, split, commit = _hub(address)
    from datasets import load_dataset

    try:
        found: Any = load_dataset(dataset, config, split=split, revision=commit)
    except ValueError as error:  # a config or a split that does not exist
        raise InputError(
            f"benchmark {address!r} cannot be read: {shorten(str(error), 300)}"
        ) from error
    except Exception as error:
        raise _unreachable(dataset, commit, error) from error
    table = pl.from_arrow(found.with_format("arrow")[:])
    assert isinstance(table, pl.DataFrame)
    return table


def _unreachable(dataset: str, revision: str, error: Exception) -> OutsideError:
    said = shorten(str(error), 300).rstrip(".")
    return OutsideError(
        f"cannot read benchmark {dataset!r} @ {revision!r} from the Hub: {type(error).__name__}: "
        f"{said}; check the name, the revision, the network and, for a private dataset, HF_TOKEN"
    )


def _mark(address: str, kit: Kit) -> str:
    if address.startswith("hub:"):
        return digest(list(_hub(address)))
    path = kit.path(address)
    about = path.stat()
    return _bytes_hash(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=256)
def _bytes_hash(path: Path, size: int, mtime_ns: int) -> str:
    """Hex blake2b of a file's bytes, read once as long as size and time stand."""
    del size, mtime_ns
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise InputError(f"benchmark {str(path)!r} cannot be read: {error}") from error
