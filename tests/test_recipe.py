"""Recipes: each mistake is found before anything is spent, under the path that the user typed."""

import json

import pytest
import yaml

from datakit.errors import InputError, RecipeError
from datakit.recipe import load_recipe
from datakit.recipe_files import new_recipe, shipped_recipes

GOOD = {
    "name": "good",
    "models": {
        "writer": {"kind": "scripted"},
        "judge": {"kind": "scripted"},
        "small": {"kind": "hashing"},
    },
    "steps": [
        {"step": "toys.numbers", "rows": 5},
        {"step": "curation.near", "embedder": "small", "threshold": 0.8},
        {"step": "annotation.respond", "models": ["writer"]},
        {"step": "annotation.judge", "judge": "judge"},
        {"step": "annotation.pair"},
    ],
}


def changed(**changes):
    """GOOD with a value at each `__`-separated path replaced; None deletes."""
    recipe = json.loads(json.dumps(GOOD))
    for path, value in changes.items():
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("__"))
        node = recipe
        for key in parents:
            node = node[key]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return recipe


def test_a_good_recipe_knows_the_kind_that_each_step_gives():
    kinds = [kind.__name__ for kind in load_recipe(GOOD).kinds()]
    assert kinds == ["Prompt", "Prompt", "Candidates", "Judged", "Pair"]


@pytest.mark.parametrize(
    ("recipe", "path", "said"),
    [
        (changed(nmae="x"), "nmae", "did you mean 'name'"),
        (changed(name=None), "name", "required"),
        (changed(name="No Good"), "name", "pattern"),
        (changed(steps=[]), "steps", "at least one"),
        (changed(steps__1__treshold=0.5), "steps[1].treshold", "did you mean 'threshold'"),
        (changed(steps__1__threshold=1.5), "steps[1].threshold", "given 1.5"),
        (changed(steps__1__threshold="high"), "steps[1].threshold", "given 'high'"),
        (changed(steps__1__over="answer"), "steps[1].over", "'prompt'"),
        (changed(steps__1__step="curation.neer"), "steps[1].step", "did you mean 'curation.near'"),
        (changed(steps__1__step="curation._texts"), "steps[1].step", "no step"),
        (changed(steps__1={"threshold": 1}), "steps[1]", "`step`"),
        (changed(steps__2__models=["wirter"]), "steps[2].models", "did you mean 'writer'"),
        (changed(steps__3__judge="small"), "steps[3].judge", "needs a model that answers"),
        (changed(steps__1__embedder="judge"), "steps[1].embedder", "needs a model that embeds"),
        (
            changed(steps__3={"step": "annotation.pair", "as": "early"}),
            "steps[3]",
            "takes Judged, but steps[2] (annotation.respond) gives Candidates",
        ),
        (changed(steps__3__as="near"), "steps[3].as", "used twice (steps[1] and steps[3])"),
        (changed(steps__3__as="splits"), "steps[3].as", "datakit's own"),
        (changed(steps__3__as="No"), "steps[3].alias", "pattern"),
        (changed(steps__0={"step": "annotation.pair"}), "steps[0]", "must read a source"),
        (changed(steps__1={"step": "toys.numbers", "as": "n"}), "steps[1]", "first step"),
        (changed(gate={"rows": {"min": 9, "max": 5}}), "gate.rows", "contradicts itself"),
        (changed(gate={"rows": {}}), "gate.rows", "needs `min`, `max` or both"),
        (changed(splits={"train": 0.9, "test": 0.2}), "splits", "add up to 1, not to 1.1"),
        (changed(splits={"../evil": 1.0}), "splits", "no name of a-z"),
        (changed(splits={"train": float("nan"), "test": 0.5}), "splits.train", "finite"),
        (changed(steps__1={"step": "curation.near", True: 3}), "steps[1].True", "no field"),
        (changed(steps__3__as="label"), "steps[3].as", "datakit's own"),
        (changed(splits={"train": 1.5, "test": -0.5}), "splits", "positive"),
        (changed(models__writer={"kind": "opnai"}), "models.writer.kind", "'openai'"),
        (changed(models__writer={"model": "x"}), "models.writer.kind", "required"),
        (
            changed(models__writer={"kind": "openai", "model": "m", "base_ulr": "http://x"}),
            "models.writer.base_ulr",
            "did you mean 'base_url'",
        ),
        (changed(models__writer={"kind": "openai"}), "models.writer.model", "required"),
        (
            changed(models__writer={"kind": "openai", "model": "m", "base_url": "localhost"}),
            "models.writer.base_url",
            "http://",
        ),
        (
            changed(models__writer={"kind": "openai", "model": "m", "api_key": "sk-1"}),
            "models.writer.api_key",
            "did you mean 'api_key_env'",
        ),
    ],
)
def test_a_mistake_is_named_by_its_path_with_the_near_miss(recipe, path, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert str(caught.value).startswith(f"{path}:"), caught.value
    assert said in str(caught.value)


def test_a_private_source_reaches_only_trusted_models():
    live = {"kind": "openai", "model": "m", "base_url": "http://x/v1"}
    private = {"steps__0__private": True, "models__writer": live}
    with pytest.raises(RecipeError, match=r"steps\[2\]\.models: .* is not `trusted: true`"):
        load_recipe(changed(**private))
    load_recipe(changed(**private | {"models__writer": live | {"trusted": True}}))


def test_a_secret_in_a_recipe_is_not_repeated():
    with pytest.raises(RecipeError) as caught:
        load_recipe(changed(models__writer={"kind": "openai", "model": "m", "api_key": "sk-1"}))
    assert "sk-1" not in str(caught.value)


def test_overrides_reach_steps_by_alias_and_number():
    recipe = load_recipe(GOOD, ["steps.near.threshold=0.7", "steps.0.rows=9", "seed=4"])
    assert recipe.steps[1].step.threshold == 0.7
    assert recipe.steps[0].step.rows == 9
    assert recipe.seed == 4


def test_the_given_mapping_stays_as_it_was():
    recipe = changed()
    load_recipe(recipe, ["steps.near.threshold=0.7"])
    assert recipe == GOOD


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "write it as path=value"),
        ("steps.neer.threshold=1", "did you mean 'near'"),
        ("name.x=1", "inside a plain value"),
        ("seed={", "not valid YAML"),
    ],
)
def test_a_wrong_override_says_which(override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(GOOD, [override])


def test_the_environment_fills_values(monkeypatch):
    monkeypatch.setenv("WRITER", "http://somewhere/v1")
    spec = {"kind": "openai", "model": "m", "base_url": "${WRITER}"}
    assert load_recipe(changed(models__writer=spec)).models["writer"].base_url.endswith("/v1")
    monkeypatch.delenv("WRITER")
    with pytest.raises(RecipeError, match=r"models\.writer\.base_url: .*'WRITER' is not set"):
        load_recipe(changed(models__writer=spec))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("name: a\nname: b\n", "'name' is given twice"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, said):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml") as caught:
        load_recipe(path)
    assert said in str(caught.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_right_and_loads_again_from_its_plain_form(name):
    recipe = load_recipe(name)
    again = load_recipe(recipe.plain())
    assert again.plain() == recipe.plain()
    assert again.kinds() == recipe.kinds()
    assert recipe.description


def test_a_new_recipe_is_a_copy_that_works_from_where_it_is(tmp_path):
    file = tmp_path / "Mine 1.yaml"
    new_recipe(file, "quickstart")
    recipe = load_recipe(file)
    assert recipe.name == "mine-1"
    assert recipe.kinds() == load_recipe("quickstart").kinds()
    assert (tmp_path / recipe.steps[0].step.path).is_file()
    assert file.read_text().startswith("# yaml-language-server: $schema=/")
    assert yaml.safe_load(file.read_text())
    with pytest.raises(InputError, match="exists"):
        new_recipe(file, "quickstart")
