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

import numpy as np
import polars as pl

from datakit.diff import Change, compare, next_version
from datakit.engine import Markers
from datakit.errors import DatakitError, GateFailed, OutsideError
from datakit.export import (
    ConfigWriter,
    Hashes,
    config_hashes,
    dataset_digest,
    described,
    in_order,
    published,
    write_frames,
)
from datakit.ids import Ids
from datakit.lineage import (
    REJECTS,
    Placed,
    bridging_rejects,
    duplicate_roots,
    funnel,
    rejects,
    row_roots,
    source_roots,
)
from datakit.models.specs import ChatSpec, EmbedSpec
from datakit.recipe import Bound, Recipe
from datakit.records import Candidates, Judged
from datakit.report.numbers import gate, report_numbers
from datakit.report.samples import samples
from datakit.report.tally import Tally
from datakit.session import Settings
from datakit.shelf import move, next_partial, point_to_latest, replace, sweep
from datakit.splits import Names, Roots, Splits, assign_splits, read_roots, root_frames
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
    partial_numbers,
    version_numbers,
)

DEFAULT_GATE = {"rows": Bound(min=1), "failures.share": Bound(max=0.1)}
"""What holds unless a recipe says otherwise: some rows, and few that a model failed on."""

_PARTIAL_GATE = {"rows": Bound(min=1)}
"""What holds of a pre-release, whatever the recipe says of the whole."""

_PACKAGES = ("polars", "pyarrow", "pydantic")


def release(recipe: Recipe, settings: Settings, markers: Markers) -> tuple[Version, bool]:
    """The version of a finished run, and whether it is new.

    The same rows under the same recipe are the version that exists. Where rows wait for answers
    that were not to be asked for, it is a pre-release of the others: no later version is compared
    with it. Raises GateFailed after writing the version to `candidates/`, and OutsideError where
    more rows went unanswered than the gate allows, or the disk failed.
    """
    name = recipe.name if settings.limit is None else f"{recipe.name}-limit-{settings.limit}"
    home = dataset_folder(settings.outputs, name)
    sweep(home)
    while True:
        known, partial = _numbers(settings, name)
        before = find_version(settings.outputs, f"{name}@{known[-1]}") if known else None
        draft = _Draft(recipe, settings, markers, name, before)
        try:
            if before is not None and draft.is_run_of(before):
                return before, False
            draft.write()
            for standing in draft.rivals(partial):
                if draft.is_same_as(standing):
                    return standing, False
            return draft.publish(), True
        except FileExistsError as error:
            if _numbers(settings, name) == (known, partial):
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


def _numbers(settings: Settings, name: str) -> tuple[list[str], list[str]]:
    """The versions and the pre-releases that there are."""
    return version_numbers(settings.outputs, name), partial_numbers(settings.outputs, name)


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
        self.hashes: dict[str, Hashes] = {}
        self.configs: dict[str, str] = {}
        self.report: dict[str, Any] = {}
        self.recipe_digest = recipe.digest
        self.run_digest = digest(
            [
                self.recipe_digest,
                [[one.key, one.dropped, one.rows] for step in markers for one in step],
            ]
        )
        self.pending = 0
        if settings.finish_partial:
            self.pending = sum(done.unanswered for step in markers for done in step)
        self.funnel: tuple[StepCount, ...] = ()
        self.digest = ""
        self.rejects_digest = ""

    def write(self) -> None:
        """Every file but those that hold the number."""
        self.folder.mkdir(parents=True)
        kind, dones = self.kinds[-1], self.markers[-1]
        splits = self._splits(dones)
        tally = Tally(kind)
        rows = Placed(self.store, kind, dones, splits.rows, splits.names)
        self._config("default", rows, tally.add)
        rated = self._ratings()
        judged = None
        if rated is not None:
            self._config("ratings", rated, tally.add_judged if _is_judged(rated) else _unseen)
            judged = rated.find if _is_judged(rated) else None
        self.digest = dataset_digest(self.hashes.items())
        write_frames(self.folder / "splits.parquet", root_frames(splits))
        self._write_rejects(splits)
        counts = funnel(self.recipe.steps, self.kinds, self.markers)
        placed = int(np.count_nonzero(splits.rows))
        bridging = len(splits.rows) - placed
        self.funnel = (
            *(map(_waiting, counts) if self.pending else counts),
            StepCount(
                alias="splits",
                step="splits",
                kind=kind.__name__,
                rows_in=placed + bridging,
                kept=placed,
                dropped=bridging,
                reasons={"bridges_splits": bridging} if bridging else {},
                failed=0,
                unanswered=0,
            ),
        )
        shown = samples(tally, rows.find, judged)
        self.report = report_numbers(tally, shown, self.funnel)

    @cached_property
    def _roots(self) -> tuple[Roots, tuple[Ids, Ids], Roots, Names]:
        """The source's roots, their duplicates, the roots of the version before, the splits."""
        names = Names()
        previous = Roots.joined([])
        if self.before is not None:
            previous = read_roots(self.before.folder / "splits.parquet", names)
        roots = source_roots(self.store, self.kinds[0], self.markers[0], names)
        return roots, duplicate_roots(self.store, self.markers), previous, names

    def _splits(self, dones: Sequence[Done]) -> Splits:
        """The split of each row of a step."""
        rows = row_roots(self.store, dones)
        return assign_splits(rows, *self._roots, self.recipe.splits, self.recipe.seed)

    def _ratings(self) -> Placed | None:
        """The last step that gives candidates, where the recipe goes on to something else."""
        for dones, kind in zip(self.markers[-2::-1], self.kinds[-2::-1], strict=True):
            if issubclass(kind, Candidates) and not issubclass(self.kinds[-1], Candidates):
                splits = self._splits(dones)
                return Placed(self.store, kind, dones, splits.rows, splits.names)
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
                bridging_rejects(self.store, *last, splits),
            ):
                brief.append(frame.select("step", "id", "reason"))
                yield frame

        write_frames(self.folder / "rejects.parquet", lost())
        self.rejects_digest = digest(pl.concat(brief).sort(pl.all()).rows())

    def is_run_of(self, before: Version) -> bool:
        """Whether the version came of these very parts."""
        return before.manifest.run_digest == self.run_digest

    def rivals(self, partial: Sequence[str]) -> list[Version]:
        """The versions that this one may be already."""
        if not self.pending:
            return [self.before] if self.before else []
        found = [open_version(self.home / "versions" / one) for one in partial]
        return [one for one in found if one.manifest.parent == self.parent]

    @property
    def parent(self) -> Parent | None:
        """The whole version before this one."""
        if self.before is None:
            return None
        return Parent(version=self.before.manifest.version, digest=self.before.manifest.digest)

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
        if self.pending:
            self._some_complete()
            version = next_partial(self.settings.outputs, self.name, version)
        # An empty dataset is never what was wanted, unless the recipe says so.
        # A limited run is a trial, which bounds meant for the whole cannot judge.
        bounds = self.recipe.gate if self.settings.limit is None else {}
        bounds = _PARTIAL_GATE if self.pending else DEFAULT_GATE | bounds
        verdicts = gate(self.report, bounds)
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

    def _some_complete(self) -> None:
        if self.report["rows"] == 0:
            wait = "1 row waits" if self.pending == 1 else f"{self.pending:,} rows wait"
            raise GateFailed(
                f"no row of {self.name!r} is complete yet, and nothing is published: {wait} for "
                "answers; run the same command without --finish-partial to ask for them"
            )

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
        old = self.before.scan()
        if manifest.configs["default"] != self.configs["default"]:
            rows = sum(file.rows for file in manifest.files if file.config == "default")
            return Change(rows_before=rows, removed=rows, added=self.report["rows"])
        files = [self.folder / file.path for file in self.files if file.config == "default"]
        new = pl.scan_parquet(files) if files else old.clear()
        hashes = config_hashes(self.before, "default"), self.hashes["default"]
        change = compare(old, new, hashes)
        others = {*manifest.configs, *self.configs} - {"default"}
        changed = [config for config in sorted(others) if self._rows_changed(config)]
        return change.model_copy(update={"configs": tuple(changed)})

    def _rows_changed(self, config: str) -> bool:
        """Whether a config holds other rows than that of the version before."""
        assert self.before is not None
        if config not in self.hashes or config not in self.before.manifest.configs:
            return True
        old = config_hashes(self.before, config)
        return not np.array_equal(in_order(old), in_order(self.hashes[config]))

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
            parent=self.parent,
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
            pending=self.pending,
            models={role: self._model_card(role) for role in self.recipe.roles()},
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


def _waiting(count: StepCount) -> StepCount:
    """A step's counts in a pre-release: what nobody answered has not been asked for."""
    lost = count.unanswered
    return count.model_copy(
        update={"failed": count.failed - lost, "unanswered": 0, "pending": lost}
    )


def _unseen(frame: pl.DataFrame) -> None:
    del frame


def _is_judged(rows: Placed) -> bool:
    return issubclass(rows.kind, Judged)
