"""Versions on disk, and the one way that records stand in them.

    outputs/datasets/<name>/latest.json
    outputs/datasets/<name>/versions/<x.y.z>/manifest.json, <config>/<split>-00000-of-00001.parquet
    outputs/datasets/<name>/versions/<x.y.z>-partial.<n>/    a pre-release of what is complete
    outputs/datasets/<name>/candidates/<x.y.z>/    did not pass its gate, or waits for a person

In a published table every measure is a column `<alias>.<measure>` and every label a column
`label.<name>`; all else is the record's own schema. `flatten` and `unflatten` are inverses.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from pydantic import ValidationError

from datakit.errors import InputError
from datakit.records import KINDS, Record
from datakit.text import near_miss
from datakit.values import Value

_ADDRESS = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9_-]*)(@(?P<version>\d+\.\d+\.\d+(-partial\.\d+)?))?"
)
_NUMBER = re.compile(r"\d+\.\d+\.\d+")
_PARTIAL = re.compile(r"(\d+\.\d+\.\d+)-partial\.(\d+)")
_DERIVED = ("pair_key",)


class PublishedFile(Value):
    """One Parquet file of a version; sha256 of its bytes, for transport."""

    path: str
    config: str
    split: str
    rows: int
    bytes: int
    sha256: str


class StepCount(Value):
    """One step of the funnel.

    failed: dropped rows that a model failed on (refused, cut, unusable or no answer), of which
    `unanswered` are asked for again by the next run. pending: dropped rows of a pre-release that
    nobody has asked for yet.
    """

    alias: str
    step: str
    kind: str
    rows_in: int
    kept: int
    dropped: int
    reasons: dict[str, int]
    failed: int
    unanswered: int
    pending: int = 0


class Parent(Value):
    """The version before this one."""

    version: str
    digest: str


class ModelCard(Value):
    """Which model stood behind a role."""

    identity: str
    kind: str
    sampling: dict[str, object]


class Manifest(Value):
    """Everything that says what a version is and how to make it again.

    `digest` hashes every published column of every config in id order; `created` (UTC) is in no
    hash. `configs` gives the kind of each config's rows, `recipe` is the resolved recipe,
    `run_digest` hashes that recipe and every part of the run, `rejects_digest` which rows were
    dropped why. `private`: made of rows that only trusted models may see. `pending`: rows that a
    pre-release leaves out, because their answers are still to be asked for; 0 in a whole version.
    """

    schema_version: int = 1
    name: str
    version: str
    digest: str
    parent: Parent | None
    change: str
    created: str
    datakit: str
    description: str
    licenses: dict[str, int]
    recipe: dict[str, object]
    recipe_digest: str
    rejects_digest: str = ""
    private: bool = False
    run_digest: str = ""
    limit: int | None
    pending: int = 0
    models: dict[str, ModelCard]
    funnel: tuple[StepCount, ...]
    configs: dict[str, str]
    splits: dict[str, int]
    gate: dict[str, str]
    files: tuple[PublishedFile, ...]
    environment: dict[str, str]


class Version(Value):
    """A version found on disk."""

    folder: Path
    manifest: Manifest

    @property
    def address(self) -> str:
        """`name@x.y.z`, of a pre-release `name@x.y.z-partial.n`."""
        return f"{self.manifest.name}@{self.manifest.version}"

    def scan(self, config: str = "default", split: str | None = None) -> pl.LazyFrame:
        """The published table of one config, all splits or one."""
        files = [
            self.folder / file.path
            for file in self.manifest.files
            if file.config == config and split in (None, file.split)
        ]
        if not files:
            known = sorted({f"{file.config}:{file.split}" for file in self.manifest.files})
            wanted = config if split is None else f"{config}:{split}"
            raise InputError(f"{self.address} has no {wanted!r}{near_miss(wanted, known)}")
        return pl.scan_parquet(files)

    def records(self, config: str = "default", split: str | None = None) -> pl.DataFrame:
        """One config as a table of its kind's schema."""
        kind = KINDS[self.manifest.configs[config]]
        return unflatten(kind, self.scan(config, split).collect())


def dataset_folder(outputs: Path, name: str) -> Path:
    """Where the versions of a dataset lie."""
    return outputs / "datasets" / name


def number(version: str) -> tuple[int, int, int]:
    """`1.10.0` as numbers, for ordering."""
    major, minor, patch = version.split(".")
    return int(major), int(minor), int(patch)


def version_numbers(outputs: Path, name: str) -> list[str]:
    """Published versions of a dataset, oldest first; pre-releases are none."""
    return sorted(filter(_NUMBER.fullmatch, _published(outputs, name)), key=number)


def partial_numbers(outputs: Path, name: str) -> list[str]:
    """Pre-releases of a dataset, as `x.y.z-partial.n`, by number."""
    found = [match for one in _published(outputs, name) if (match := _PARTIAL.fullmatch(one))]
    return [one[0] for one in sorted(found, key=lambda one: (number(one[1]), int(one[2])))]


def _published(outputs: Path, name: str) -> list[str]:
    folder = dataset_folder(outputs, name) / "versions"
    return [path.parent.name for path in folder.glob("*/manifest.json")]


def find_version(outputs: Path, address: str) -> Version:
    """The version at `name` (the newest whole one), `name@x.y.z`, or in a folder given by path.

    Raises InputError where there is none, naming what exists.
    """
    if (Path(address) / "manifest.json").is_file():
        return open_version(Path(address))
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise InputError(
            f"{address!r} is neither name[@x.y.z or @x.y.z-partial.n] nor the folder of a version"
        )
    name, wanted = match["name"], match["version"]
    known = version_numbers(outputs, name)
    partial = partial_numbers(outputs, name)
    if not known and not partial:
        names = [path.name for path in (outputs / "datasets").glob("*") if path.is_dir()]
        raise InputError(
            f"no version of dataset {name!r} under {str(outputs)!r}{near_miss(name, names)}"
        )
    if wanted is None and not known:
        raise InputError(
            f"{name!r} has no whole version yet; of its pre-releases, name one: "
            f"{', '.join(f'{name}@{one}' for one in partial)}"
        )
    if wanted is not None and wanted not in known + partial:
        raise InputError(f"no version {wanted} of {name!r}; known: {', '.join(known + partial)}")
    return open_version(dataset_folder(outputs, name) / "versions" / (wanted or known[-1]))


def open_version(folder: Path) -> Version:
    """The version in `folder`."""
    path = folder / "manifest.json"
    try:
        return Version(folder=folder, manifest=Manifest.model_validate_json(path.read_bytes()))
    except OSError as error:
        raise InputError(f"cannot read the manifest {str(path)!r}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{str(path)!r} is no manifest of this release of datakit: {where}: {first['msg']}"
        ) from error


def measure_names(frame: pl.DataFrame, column: str = "measures") -> list[str]:
    """The names that occur in a record table's measures or labels, sorted."""
    names = frame[column].explode().drop_nulls().struct.field("name")
    return names.unique().sort().to_list()


def flatten(
    kind: type[Record], frame: pl.DataFrame, measures: Sequence[str], labels: Sequence[str]
) -> pl.DataFrame:
    """A record table as it is published, with one column for each named measure and label."""
    columns = [pl.col(name) for name in kind.table_schema() if name not in ("measures", "labels")]
    for column, names, prefix in (("measures", measures, ""), ("labels", labels, "label.")):
        columns += [
            pl.col(column)
            .list.eval(pl.element().filter(pl.element().struct.field("name") == name))
            .list.first()
            .struct.field("value")
            .alias(prefix + name)
            for name in names
        ]
    return frame.select(columns)


def unflatten(kind: type[Record], frame: pl.DataFrame) -> pl.DataFrame:
    """A published table as a record table of `kind.table_schema()`."""
    labels = [name for name in frame.columns if name.startswith("label.")]
    measures = [name for name in frame.columns if "." in name and name not in labels]
    known = set(kind.table_schema()) | set(_DERIVED) | set(labels) | set(measures)
    strange = [name for name in frame.columns if name not in known]
    if strange:
        raise InputError(f"column {strange[0]!r} belongs to no {kind.__name__}")
    return frame.with_columns(
        _listed(measures, "", pl.Float64()).alias("measures"),
        _listed(labels, "label.", pl.String()).alias("labels"),
    ).select(pl.col(name).cast(dtype) for name, dtype in kind.table_schema().items())


def _listed(names: Sequence[str], prefix: str, dtype: pl.DataType) -> pl.Expr:
    """Columns as a list of (name, value), sorted by name, nulls left out."""
    if not names:
        return pl.lit([], pl.List(pl.Struct({"name": pl.String(), "value": dtype})))
    pairs = [
        pl.struct(pl.lit(name.removeprefix(prefix)).alias("name"), value=pl.col(name).cast(dtype))
        for name in sorted(names)
    ]
    value = pl.element().struct.field("value")
    return pl.concat_list(*pairs).list.eval(pl.element().filter(value.is_not_null()))
