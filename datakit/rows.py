"""What holds for every row, whatever the grain: keys, identity, decisions, conservation."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import polars as pl

from datakit.errors import BugError, InputError, Rejected, RowError
from datakit.ids import ID_BYTES
from datakit.kit import Kit
from datakit.recipe import PlacedStep
from datakit.records import SCHEMA_VERSION, Record
from datakit.session import Settings
from datakit.step import DROPPED, Reject, Split, roles
from datakit.tables import BATCH, from_frame, to_frame
from datakit.text import digest
from datakit.values import SPLIT_NAME

Dropped = dict[str, Any]
"""One row of DROPPED; what is not said is empty."""


def part_key(
    placed: PlacedStep,
    kind: str,
    inputs: Sequence[str],
    settings: Settings,
    kit: Kit,
    inert: frozenset[str] = frozenset(),
    outside: str | None = None,
) -> str:
    """The name of a part: a hash of everything that can change what is in it.

    Step, version, fields (a model role counts as the model behind it), alias, seed, the content of
    the input rows and how the output is cut, everything read from outside, and the version of the
    record schemas. outside: in place of the fingerprint of all that the step reads from outside.
    """
    step = placed.step
    fields = step.model_dump(mode="json", exclude=set(step.inert | inert))
    named = [
        (field, settings.models[role].fingerprint())
        for field, role, _ in roles(step)
        if field in fields
    ]
    for field, _ in named:
        fields[field] = [found for name, found in named if name == field]
    return digest(
        {
            "step": [placed.name, step.version, placed.alias, fields],
            "seed": settings.seed,
            "kind": kind,
            "inputs": list(inputs),
            "outside": step.fingerprint(kit) if outside is None else outside,
            "schema": SCHEMA_VERSION,
        }
    )


def identified(
    found: Iterable[Record | Reject], seen: Counter[str], dropped: list[Dropped], left: int | None
) -> Iterator[Record]:
    """Rows with origin and id, `left` at most; counts into `seen`.

    What cannot be a row is added to `dropped` as it is met.
    """
    rows = 0
    for one in found:
        if rows == left:
            break
        if isinstance(one, Record) and one.split and not SPLIT_NAME.fullmatch(one.split):
            raise InputError(
                f"the source declares a split {one.split!r}; names are of a-z, 0-9 and _; map "
                "another column to `split`, or none"
            )
        if isinstance(one, Reject):
            lost = _reject(one.place, one.reason, one.detail, one.raw)
            dropped.append(lost | {"related": one.related})
        elif one.id:
            rows += 1
            yield one
        elif one.origin and seen[f"key:{one.origin}"]:
            detail = f"the key {one.origin!r} stands on an earlier row too"
            raw = one.model_dump_json()
            dropped.append(_reject(one.origin, "duplicate_key", detail, raw))
        else:
            content = one.content
            name = f"key:{one.origin}" if one.origin else content
            seen[name] += 1
            origin = f"{name}#{seen[name]}"
            row_id = one.id_at(origin, content)
            update = {"origin": origin, "id": row_id, "roots": (row_id,)}
            rows += 1
            yield one.model_copy(update=update)


def _reject(place: str, reason: str, detail: str, raw: str) -> Dropped:
    return {
        "id": digest([place, reason, raw], ID_BYTES),
        "kind": Rejected.kind,
        "reason": reason,
        "detail": detail,
        "raw": raw,
    }


def derived(out: Record, parents: Sequence[Record], alias: str, slot: int) -> Record:
    """The output under its own id; a row whose content stands is still the same row."""
    if len(parents) == 1 and out.id == parents[0].id and out.body() == parents[0].body():
        return out
    return out.derived(parents, alias, slot)


def drop_of(row: Record, error: RowError) -> Dropped:
    """The row as it stands in the rejects."""
    return {
        "id": row.id,
        "kind": error.kind,
        "reason": error.reason,
        "detail": error.detail,
        "raw": error.raw,
        "transient": error.transient,
        "record": error.partial or row.model_dump_json(),
    }


def dropped_frame(drops: Sequence[Dropped]) -> pl.DataFrame:
    """Dropped rows as a table of DROPPED."""
    return _filled(pl.DataFrame(list(drops), schema=DROPPED))


def _filled(frame: pl.DataFrame) -> pl.DataFrame:
    """A frame of DROPPED with empty text for what is not said."""
    return frame.with_columns(
        pl.col(pl.String).fill_null(""), pl.col("transient").fill_null(value=False)
    )


def decided(
    frame: pl.DataFrame, split: Split, alias: str, kind: type[Record]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A step's decision applied to the rows of one part, in their order."""
    decision = split.kept
    own = [name for name in decision.columns if name in kind.table_schema() and name != "id"]
    joined = frame.drop(own).join(decision, on="id", how="inner", maintain_order="left")
    for column, prefix in (("measures", "measure."), ("labels", "label.")):
        added = [name for name in decision.columns if name.startswith(prefix)]
        if added:
            joined = joined.with_columns(_added(column, prefix, added, alias))
    kept = joined.select(kind.table_schema().names())
    if set(own) & set(kind.own):
        kept = _reidentified(frame, kept, alias, kind)
    extra = [name for name in split.dropped.columns if name in DROPPED and name != "id"]
    lost = frame.join(split.dropped.select("id", *extra), on="id", maintain_order="left")
    records = [row.model_dump_json() for row in from_frame(kind, lost.select(frame.columns))]
    dropped = pl.DataFrame(
        {name: lost[name] for name in ("id", *extra)} | {"record": records},
        schema_overrides={"record": pl.String()},
    )
    missing = [
        pl.lit(None, kind_of).alias(name)
        for name, kind_of in DROPPED.items()
        if name not in dropped.columns
    ]
    filled = dropped.with_columns(missing).with_columns(pl.col("kind").fill_null(Rejected.kind))
    return kept, _filled(filled.select(DROPPED.names()))


def _added(column: str, prefix: str, names: Sequence[str], alias: str) -> pl.Expr:
    """The list column with the named columns folded in as `<alias>.<name>`, sorted, nulls out."""
    new = [
        pl.struct(pl.lit(f"{alias}.{name.removeprefix(prefix)}").alias("name"), value=pl.col(name))
        for name in names
    ]
    value = pl.element().struct.field("value")
    return (
        pl.concat_list(column, *new)
        .list.eval(pl.element().filter(value.is_not_null()))
        .list.eval(pl.element().sort_by(pl.element().struct.field("name")))
        .alias(column)
    )


def _reidentified(
    before: pl.DataFrame, after: pl.DataFrame, alias: str, kind: type[Record]
) -> pl.DataFrame:
    """Rows whose own fields a step rewrote become derived rows of what they were."""
    said = pl.struct(kind.own).struct.json_encode()
    was = after.select("id").join(before, on="id", how="left", maintain_order="left")
    changed = after.select(said).to_series() != was.select(said).to_series()
    frames = [after.clear()]
    pieces = zip(
        after.filter(changed).iter_slices(BATCH),
        was.filter(changed).iter_slices(BATCH),
        strict=True,
    )
    for new, old in pieces:
        both = zip(from_frame(kind, new), from_frame(kind, old), strict=True)
        frames.append(to_frame(kind, [derived(row, [one], alias, 0) for row, one in both]))
    places = pl.concat([(~changed).arg_true(), changed.arg_true()])
    return pl.concat([after.filter(~changed), *frames])[places.arg_sort()]


def conserve(alias: str, rows: pl.DataFrame, kept: pl.DataFrame, dropped: pl.DataFrame) -> None:
    """Every input id is kept, a parent of a kept row, or dropped. Raises BugError otherwise."""
    known = pl.concat([kept["id"], kept["parents"].explode().drop_nulls(), dropped["id"]])
    lost = rows.filter(~pl.col("id").is_in(known.implode()))["id"]
    both = dropped.filter(pl.col("id").is_in(kept["id"].implode()))["id"]
    if lost.len() or both.len():
        said = f"lost {lost.len()} rows" if lost.len() else f"kept and dropped {both.len()} rows"
        raise BugError(f"step {alias!r} {said}, first {(*lost, *both)[0]!r}")


def batches(groups: Sequence[pl.DataFrame], rows: int) -> list[list[pl.DataFrame]]:
    """Neighbouring groups together until they hold `rows` rows."""
    batches: list[list[pl.DataFrame]] = []
    size = rows
    for group in groups:
        if size >= rows:
            batches.append([])
            size = 0
        batches[-1].append(group)
        size += group.height
    return batches
