"""What a row carries besides what it says: key, license, labels, measures, all other columns."""

from collections.abc import Mapping

from datakit.errors import Rejected
from datakit.sources._cells import compact_json, moment, number, optional_text, scalar, texts
from datakit.sources._layouts import Layout, Row


def carried(layout: Layout, row: Row, unread: Mapping[str, object] | None = None) -> Row:
    """What every kind carries, as far as the row has it."""
    columns = layout.columns
    fields: Row = {
        "license": license_of(layout, row),
        "source": optional(layout, row, "source") or layout.source,
        "split": optional(layout, row, "split"),
    }
    if "key" in columns:
        name = columns["key"][0]
        if row.get(name) in (None, ""):
            raise Rejected("null_value", f"column {name!r}, the key, is empty")
        fields["origin"] = scalar(row[name], name)
    if "labels" in columns:
        fields["labels"] = {
            _sided(layout, name): scalar(row[name], name)
            for name in columns["labels"]
            if row.get(name) is not None
        }
    if "measures" in columns:
        fields["measures"] = {
            f"{layout.prefix}{_sided(layout, name)}": found
            for name in columns["measures"]
            if (found := number(row.get(name), name)) is not None
        }
    if "references" in columns:
        fields["references"] = [
            text for name in columns["references"] for text in texts(row.get(name), name)
        ]
    rest: Row = {name: row[name] for name in row if name not in layout.used}
    if unread:
        rest.update(unread)
    if rest:
        fields["extra"] = compact_json(rest)
    return fields


def license_of(layout: Layout, row: Row) -> str:
    """The license of a row: its own, else that of all."""
    return optional(layout, row, "license") or layout.license


def _sided(layout: Layout, name: str) -> str:
    """The name of a pair's column with its side last, so that a swapped label swaps it too."""
    if layout.kind == "Pair":
        for side in ("chosen", "rejected"):
            for mark in "_-":
                if name.startswith(side + mark):
                    return f"{name.removeprefix(side + mark)}.{side}"
                if name.endswith(mark + side):
                    return f"{name.removesuffix(mark + side)}.{side}"
    return name


def person(layout: Layout, row: Row) -> Row:
    """Who and when."""
    user, when = layout.column("user"), layout.column("time")
    fields: Row = {}
    if user is not None and row.get(user) is not None:
        fields["user"] = scalar(row[user], user)
    if when is not None:
        fields["time"] = moment(row.get(when), when)
    return fields


def optional(layout: Layout, row: Row, role: str) -> str:
    """The text of a role, empty where the file or the row has none."""
    name = layout.column(role)
    return "" if name is None else optional_text(row.get(name), name)
