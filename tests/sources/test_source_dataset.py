"""A version read by another recipe."""

import hashlib

import pytest

from datakit.errors import InputError
from datakit.records import Message, Pair
from datakit.tables import to_frame
from datakit.versions import Manifest, PublishedFile, flatten

MANIFEST = {
    "name": "made",
    "parent": None,
    "change": "minor",
    "created": "2026-01-01T00:00:00Z",
    "datakit": "0.1.0",
    "description": "",
    "licenses": {},
    "recipe": {},
    "recipe_digest": "",
    "limit": None,
    "models": {},
    "funnel": [],
    "configs": {"default": "Pair"},
    "splits": {},
    "gate": {},
    "environment": {},
}


def pair(number, **carried):
    row = Pair(
        prompt=(Message(role="user", content=f"p{number}"),),
        chosen=(Message(role="assistant", content="Hi."),),
        rejected=(Message(role="assistant", content="Go."),),
        measures={"judge.margin": number / 2},
        labels={"topic": "x"},
        parents=("parent",),
        roots=("root",),
        **carried,
    )
    return row.identified(f"key:{number}#1")


ROWS = {"train": [pair(1), pair(2)], "test": [pair(3), pair(4, split="held_out")]}


@pytest.fixture
def publish(tmp_path):
    def publish(version, splits):
        folder = tmp_path / "outputs" / "datasets" / "made" / "versions" / version
        files = []
        for split, rows in splits.items():
            path = folder / "default" / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            flatten(Pair, to_frame(Pair, rows), ["judge.margin"], ["topic"]).write_parquet(path)
            files.append(
                PublishedFile(
                    path=path.relative_to(folder).as_posix(),
                    config="default",
                    split=split,
                    rows=len(rows),
                    bytes=path.stat().st_size,
                    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                )
            )
        about = MANIFEST | {"version": version, "digest": f"digest of {version}", "files": files}
        made = Manifest.model_validate(about)
        (folder / "manifest.json").write_text(made.model_dump_json())
        return folder

    return publish


def test_rows_keep_id_origin_roots_and_measures(run, publish):
    publish("1.0.0", ROWS)
    out = run("sources.dataset", dataset="made@1.0.0", kind="Pair")
    given = [row for rows in ROWS.values() for row in rows]
    assert not out.dropped
    assert [row.model_copy(update={"split": ""}) for row in out.kept] == [
        row.model_copy(update={"split": ""}) for row in given
    ]
    assert [row.split for row in out.kept] == ["train", "train", "test", "held_out"]


def test_one_split(run, publish):
    publish("1.0.0", ROWS)
    out = run("sources.dataset", dataset="made", kind="Pair", split="test")
    assert [row.prompt[0].content for row in out.kept] == ["p3", "p4"]


def test_a_name_means_the_latest_version_of_each_run(run, publish):
    publish("1.9.0", {"train": ROWS["train"]})
    before = run("sources.dataset", dataset="made", kind="Pair")
    folder = publish("1.10.0", {"train": [*ROWS["train"], pair(5)]})
    after = run("sources.dataset", dataset="made", kind="Pair")
    assert [len(before.kept), len(after.kept)] == [2, 3]
    assert not set(before.keys) & set(after.keys)
    pinned = run("sources.dataset", dataset="made@1.9.0", kind="Pair")
    assert [row.id for row in pinned.kept] == [row.id for row in before.kept]
    by_path = run("sources.dataset", dataset=str(folder), kind="Pair")
    assert [row.id for row in by_path.kept] == [row.id for row in after.kept]


WRONG = {
    "kind": ({"kind": "Prompt"}, "holds Pair rows in config 'default', but .* as Prompt"),
    "config": ({"kind": "Pair", "config": "defualt"}, "did you mean 'default'"),
    "split": ({"kind": "Pair", "split": "trian"}, "did you mean 'train'"),
    "version": ({"kind": "Pair", "dataset": "made@2.0.0"}, "no version 2.0.0 of 'made'"),
    "name": ({"kind": "Pair", "dataset": "mode"}, "did you mean 'made'"),
    "folder": ({"kind": "Pair", "dataset": "no/such"}, "no file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_exist_is_named(name, run, publish):
    publish("1.0.0", ROWS)
    fields, said = WRONG[name]
    with pytest.raises(InputError, match=said):
        run("sources.dataset", **({"dataset": "made@1.0.0"} | fields))


def test_a_lost_file_is_named(run, publish):
    folder = publish("1.0.0", ROWS)
    (folder / "default" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="test-00000-of-00001"):
        run("sources.dataset", dataset="made", kind="Pair")
