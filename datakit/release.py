"""From a run's parts to an immutable version: splits, configs, gate, number, manifest.

A version is written whole into a draft folder and then renamed into place, so it exists or it does
not. Who loses a race for a number starts again against the winner's version.
"""

import importlib.metadata
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from typing import Any

import polars as pl

from datakit.diff import Change, compare, next_version
from datakit.engine import Markers
from datakit.errors import DatakitError, GateFailed, OutsideError
from datakit.export import (
    ConfigWriter,
    dataset_digest,
    described,
    published,
    row_hashes,
    write_frames,
)
from datakit.lineage import (
    REJECTS,
    Placed,
    bridging_rejects,
    chunks,
    duplicate_roots,
    funnel,
    rejects,
    source_roots,
)
from datakit.models.specs import ChatSpec, EmbedSpec
from datakit.recipe import Bound, Recipe
from datakit.records import Candidates, Judged
from datakit.report.numbers import gate, report_numbers
from datakit.report.samples import samples
from datakit.report.tally import Tally
from datakit.session import Settings
from datakit.shelf import move, point_to_latest, replace, sweep
from datakit.splits import ROOTS, Splits, assign_splits
from datakit.step import roles
from datakit.store import Done, Store, write_json
from datakit.text import digest
from datakit.versions import (
    Manifest,
    ModelCard,
    Parent,
    PublishedFile,
    StepCount,
    Version,
    dataset_folder,
    find_version,
    open_version,
    version_numbers,
)

DEFAULT_GATE = {"rows": Bound(min=1), "failures.share": Bound(max=0.1)}
"""What holds unless a recipe says otherwise: some rows, and few that a model failed on."""

_PACKAGES = ("polars", "pyarrow", "pydantic")


def release(recipe: Recipe, settings: Settings, markers: Markers) -> tuple[Version, bool]:
    """The version of a finished run, and whether it is new.

    The same rows under the same recipe are the version that exists. Raises GateFailed after
    writing the version to `candidates/`, and OutsideError where more rows went unanswered than the
    gate allows, or the disk failed.
    """
    name = recipe.name if settings.limit is None else f"{recipe.name}-limit-{settings.limit}"
    home = dataset_folder(settings.outputs, name)
    sweep(home)
    while True:
        known = version_numbers(settings.outputs, name)
        before = find_version(settings.outputs, f"{name}@{known[-1]}") if known else None
        draft = _Draft(recipe, settings, markers, name, before)
        try:
            if before is not None and draft.is_run_of(before):
                return before, False
            draft.write()
            if before is not None and draft.is_same_as(before):
                return before, False
            return draft.publish(), True
        except FileExistsError as error:
            if version_numbers(settings.outputs, name) == known:
                raise OutsideError(
                    f"{error.filename2!r} is in the way and holds no manifest: a copy or removal "
                    "that was cut off? Remove it and run the same command again"
                ) from error
        except DatakitError:
            raise
        except OSError as error:
            raise OutsideError(f"cannot write the version of {name!r}: {error}") from error
        finally:
            shutil.rmtree(draft.folder, ignore_errors=True)
            point_to_latest(settings.outputs, name)


class _Draft:
    """A version being written."""

    def __init__(
        self,
        recipe: Recipe,
        settings: Settings,
        markers: Markers,
        name: str,
        before: Version | None,
    ) -> None:
        self.recipe = recipe
        self.settings = settings
        self.markers = markers
        self.name = name
        self.before = before
        self.store = Store(settings.outputs)
        self.home = dataset_folder(settings.outputs, name)
        self.folder = self.home / f".draft-{uuid.uuid4().hex}"
        self.kinds = recipe.kinds()
        self.files: list[PublishedFile] = []
        self.hashes: dict[str, pl.DataFrame] = {}
        self.configs: dict[str, str] = {}
        self.report: dict[str, Any] = {}
        self.recipe_digest = _recipe_digest(recipe)
        self.run_digest = digest(
            [
                self.recipe_digest,
                [[one.key, one.dropped, one.rows] for step in markers for one in step],
            ]
        )
        self.funnel: tuple[StepCount, ...] = ()
        self.digest = ""
        self.rejects_digest = ""

    def write(self) -> None:
        """Every file but those that hold the number."""
        self.folder.mkdir(parents=True)
        kind, dones = self.kinds[-1], self.markers[-1]
        splits = self._splits(dones)
        tally = Tally(kind)
        rows = Placed(self.store, kind, dones, splits.rows)
        self._config("default", rows, tally.add)
        rated = self._ratings()
        judged = None
        if rated is not None:
            self._config("ratings", rated, tally.add_judged if _is_judged(rated) else _unseen)
            judged = rated.find if _is_judged(rated) else None
        self.digest = dataset_digest(self.hashes.items())
        splits.roots.write_parquet(self.folder / "splits.parquet")
        self._write_rejects(splits)
        self.funnel = (
            *funnel(self.recipe.steps, self.kinds, self.markers),
            StepCount(
                alias="splits",
                step="splits",
                kind=kind.__name__,
                rows_in=splits.rows.height + splits.bridging.height,
                kept=splits.rows.height,
                dropped=splits.bridging.height,
                reasons={"bridges_splits": splits.bridging.height}
                if splits.bridging.height
                else {},
                failed=0,
                unanswered=0,
            ),
        )
        shown = samples(tally, rows.find, judged)
        self.report = report_numbers(tally, shown, self.funnel)

    @cached_property
    def _roots(self) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
        """The source's roots, their duplicates, and the roots of the version before."""
        previous = pl.DataFrame(schema=ROOTS)
        if self.before is not None:
            previous = pl.read_parquet(self.before.folder / "splits.parquet")
        roots = source_roots(self.store, self.kinds[0], self.markers[0])
        return roots, duplicate_roots(self.store, self.markers), previous

    def _splits(self, dones: Sequence[Done]) -> Splits:
        """The split of each row of a step."""
        schema = pl.Schema({"id": pl.String(), "roots": pl.List(pl.String())})
        rows = self.store.scan(chunks(dones), schema).select("id", "roots").collect()
        return assign_splits(rows, *self._roots, self.recipe.splits, self.recipe.seed)

    def _ratings(self) -> Placed | None:
        """The last step that gives candidates, where the recipe goes on to something else."""
        for dones, kind in zip(self.markers[-2::-1], self.kinds[-2::-1], strict=True):
            if issubclass(kind, Candidates) and not issubclass(self.kinds[-1], Candidates):
                return Placed(self.store, kind, dones, self._splits(dones).rows)
        return None

    def _config(self, config: str, rows: Placed, seen: Callable[[pl.DataFrame], None]) -> None:
        """Write one config part by part; `seen` is handed each part."""
        names = rows.names()
        writer = ConfigWriter(self.folder, config)
        for frame in rows.frames():
            writer.write(published(rows.kind, frame, *names))
            seen(frame)
        files, self.hashes[config] = writer.close()
        self.files += files
        self.configs[config] = rows.kind.__name__

    def _write_rejects(self, splits: Splits) -> None:
        brief: list[pl.DataFrame] = []

        def lost() -> Iterator[pl.DataFrame]:
            last = self.kinds[-1], self.markers[-1]
            for frame in chain(
                [pl.DataFrame(schema=REJECTS)],
                rejects(self.store, self.markers),
                bridging_rejects(self.store, *last, splits.bridging),
            ):
                brief.append(frame.select("step", "id", "reason"))
                yield frame

        write_frames(self.folder / "rejects.parquet", lost())
        self.rejects_digest = digest(pl.concat(brief).sort(pl.all()).rows())

    def is_run_of(self, before: Version) -> bool:
        """Whether the version came of these very parts."""
        return before.manifest.run_digest == self.run_digest

    def is_same_as(self, before: Version) -> bool:
        """Whether nothing is new: the same rows kept and dropped, and a recipe of equal meaning."""
        manifest = before.manifest
        return (manifest.digest, manifest.rejects_digest, manifest.recipe_digest) == (
            self.digest,
            self.rejects_digest,
            self.recipe_digest,
        )

    def publish(self) -> Version:
        """Number the version and put it in its place.

        Raises FileExistsError where another run took the number, GateFailed where the gate did
        not hold.
        """
        from datakit.report.card import render_card
        from datakit.report.page import render_page

        change = self._change()
        version = "1.0.0"
        if self.before is not None:
            version = next_version(self.before.manifest.version, change)
        # An empty dataset is never what was wanted, unless the recipe says so.
        # A limited run is a trial, which bounds meant for the whole cannot judge.
        bounds = self.recipe.gate if self.settings.limit is None else {}
        verdicts = gate(self.report, DEFAULT_GATE | bounds)
        self._enough_answered(verdicts)
        failed = {path: said for path, said in verdicts.items() if said != "pass"}
        manifest = self._manifest(version, change, verdicts)
        (self.folder / "report.html").write_text(
            render_page(manifest, self.report), encoding="utf-8"
        )
        (self.folder / "README.md").write_text(render_card(manifest, self.report), encoding="utf-8")
        write_json(self.folder / "report.json", self.report)
        write_json(self.folder / "manifest.json", manifest.model_dump(mode="json"))
        if failed:
            target = self.home / "candidates" / version
            replace(self.folder, target)
            said = "; ".join(
                f"{path}: {why.removeprefix('fail: ')}" for path, why in failed.items()
            )
            raise GateFailed(
                f"{self.name}@{version} did not pass its gate: {said}. It lies in {target}"
            )
        target = self.home / "versions" / version
        target.parent.mkdir(exist_ok=True)
        move(self.folder, target)
        # What failed under this number before is superseded.
        shutil.rmtree(self.home / "candidates" / version, ignore_errors=True)
        return open_version(target)

    def _enough_answered(self, verdicts: dict[str, str]) -> None:
        """Too many rows without an answer are no verdict on the data, but an outage."""
        unanswered = sum(count.unanswered for count in self.funnel)
        if unanswered and verdicts["failures.share"] != "pass":
            said = verdicts["failures.share"].removeprefix("fail: ")
            raise OutsideError(
                f"{unanswered:,} rows went unanswered ({said}), and nothing is published; run the "
                "same command again to ask for them, or allow more in gate.failures.share.max"
            )

    def _change(self) -> Change:
        if self.before is None:
            return Change(rows_after=self.report["rows"], added=self.report["rows"])
        manifest = self.before.manifest
        old = self.before.scan().collect()
        if manifest.configs["default"] != self.configs["default"]:
            return Change(rows_before=old.height, removed=old.height, added=self.report["rows"])
        files = [self.folder / file.path for file in self.files if file.config == "default"]
        new = pl.scan_parquet(files) if files else old.clear().lazy()
        change = compare(old.lazy(), new, (row_hashes(old), self.hashes["default"]))
        others = {*manifest.configs, *self.configs} - {"default"}
        changed = [config for config in sorted(others) if self._rows_changed(config)]
        return change.model_copy(update={"configs": tuple(changed)})

    def _rows_changed(self, config: str) -> bool:
        """Whether a config holds other rows than that of the version before."""
        assert self.before is not None
        if config not in self.hashes or config not in self.before.manifest.configs:
            return True
        old = row_hashes(self.before.scan(config).collect())
        return dataset_digest([("", old)]) != dataset_digest([("", self.hashes[config])])

    def _manifest(self, version: str, change: Change, verdicts: dict[str, str]) -> Manifest:
        before = self.before.manifest if self.before else None
        for name in ("splits.parquet", "rejects.parquet"):
            rows = pl.scan_parquet(self.folder / name).select(pl.len()).collect().item()
            self.files.append(described(self.folder, name, "", "", rows))
        splits: dict[str, int] = {}
        for file in self.files:
            if file.config == "default":
                splits[file.split] = file.rows
        return Manifest(
            name=self.name,
            version=version,
            digest=self.digest,
            parent=Parent(version=before.version, digest=before.digest) if before else None,
            change=change.summary() if before else "first version",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            datakit=importlib.metadata.version("datakit"),
            description=self.recipe.description,
            licenses=self.report["licenses"],
            recipe=self.recipe.plain(),
            recipe_digest=self.recipe_digest,
            rejects_digest=self.rejects_digest,
            private=self.settings.private,
            run_digest=self.run_digest,
            limit=self.settings.limit,
            models={role: self._model_card(role) for role in _roles(self.recipe)},
            funnel=self.funnel,
            configs=self.configs,
            splits=splits,
            gate=verdicts,
            files=tuple(self.files),
            environment={"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in _PACKAGES},
        )

    def _model_card(self, role: str) -> ModelCard:
        spec = self.recipe.models[role]
        assert isinstance(spec, ChatSpec | EmbedSpec)
        sampling = spec.sampling.over(spec.sampling) if isinstance(spec, ChatSpec) else {}
        return ModelCard(
            identity=spec.resolved_identity(),
            kind=str(spec.model_dump()["kind"]),
            sampling=dict(sampling),
        )


def _unseen(frame: pl.DataFrame) -> None:
    del frame


def _is_judged(rows: Placed) -> bool:
    return issubclass(rows.kind, Judged)


def _roles(recipe: Recipe) -> list[str]:
    """The model roles that some step names."""
    return sorted({role for placed in recipe.steps for _, role, _ in roles(placed.step)})


def _recipe_digest(recipe: Recipe) -> str:
    """What the recipe means: addresses, windows and time limits of models do not count."""
    models = {role: recipe.models[role].fingerprint() for role in _roles(recipe)}
    return digest(recipe.plain() | {"models": models})
