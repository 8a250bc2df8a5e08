"""What the README says is true: its recipe loads, names every key, and its example step works."""

import re
from pathlib import Path

import datakit as dk
from datakit.models.specs import OpenAISpec, SentenceTransformersSpec
from datakit.recipe import Recipe, load_recipe

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(language, holding):
    """The fenced block of a language that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(one for one in blocks if holding in one)


def test_the_recipe_loads_and_names_every_key(tmp_path):
    text = block("yaml", "support-pairs")
    path = tmp_path / "support.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert [kind.__name__ for kind in recipe.kinds()][-1] == "Pair"
    models = (Recipe, OpenAISpec, SentenceTransformersSpec)
    keys = {key for model in models for key in model.model_fields} - {"base"}
    missing = {key for key in keys if not re.search(rf"\b{key}\b", text)}
    assert not missing


def test_the_example_step_works(tmp_path, monkeypatch):
    (tmp_path / "length.py").write_text(block("python", "class Length"))
    monkeypatch.syspath_prepend(tmp_path)
    recipe = {
        "name": "short",
        "steps": [
            {"step": "toys.numbers", "rows": 12},
            {"step": "length", "least": 11},
        ],
    }
    version = dk.run(recipe, outputs=tmp_path)
    counts = version.manifest.funnel[1]
    assert (counts.kept, counts.reasons) == (2, {"too_short": 10})
    assert version.scan().collect()["length.characters"].to_list() == [11.0, 11.0]


def test_every_folder_of_the_tree_exists():
    tree = block("text", "imports go down only")
    root = Path(__file__).parent.parent
    for name in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (root / name).is_dir()
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert list((root / "datakit").glob(name)) or list((root / "tests").glob(name)), name
