"""The contract of every step in the catalog; a new file in a step folder is tested by being there.

The rows that a step is tried on are those that reach it in a shipped recipe, rehearsed.
"""

import json
import pickle
import subprocess
import sys
import typing

import grimp
import pytest

from datakit.catalog import find_step, step_names
from datakit.engine import execute
from datakit.lineage import chunks
from datakit.pipeline import rehearsal, run
from datakit.recipe import PlacedStep, load_recipe
from datakit.recipe_files import shipped_recipes
from datakit.records import KINDS
from datakit.rows import part_key
from datakit.session import Session, Settings, Watch
from datakit.step import Role, SourceStep, Step
from datakit.store import Store
from datakit.work import perform

STEPS = step_names()
HEAVY = ("torch", "faiss", "vllm", "sentence_transformers", "datasets", "prefect", "openai")
NEEDS_NETWORK = ("sources.hub",)


def recipes_with(name):
    """Shipped recipes that use a step, those that run on what ships first."""
    found = [recipe for recipe in shipped_recipes() if name in _step_names(recipe)]
    return sorted(found, key=lambda recipe: not recipe.startswith("smoke/"))


def _step_names(recipe):
    return [placed.name for placed in load_recipe(recipe).steps]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A step name to (placed step, its input kind, its markers in two runs, settings)."""
    outputs = tmp_path_factory.mktemp("outputs")
    first = rehearsal(load_recipe("smoke/pairs"))
    for folder in ("one", "two"):
        run(first, outputs=outputs / folder, state=outputs / "state")
    done = {}

    def rehearse(name):
        recipe_name = recipes_with(name)[0]
        if recipe_name not in done:
            recipe = rehearsal(load_recipe(recipe_name))
            runs = []
            for folder in ("one", "two"):
                settings = Settings(
                    outputs=outputs / folder,
                    state=outputs / f"state-{folder}",
                    base=recipe.base,
                    seed=recipe.seed,
                    rows_per_part=7,
                    limit=20,
                    models=recipe.models,
                )
                markers = execute(recipe, settings, lambda works: [perform(w) for w in works])
                runs.append((settings, markers))
            done[recipe_name] = (recipe, runs)
        recipe, runs = done[recipe_name]
        position = [placed.name for placed in recipe.steps].index(name)
        return recipe, position, runs

    return rehearse


@pytest.mark.parametrize("name", STEPS)
def test_a_step_says_source_takes_gives_measures_and_drops(name):
    documentation = sys.modules[find_step(name).__module__].__doc__ or ""
    for section in ("Source:", "Takes:", "Gives:", "Measures:", "Drops:"):
        assert section in documentation, f"{name} has no {section!r} in its docstring"
    assert find_step(name).__doc__


@pytest.mark.parametrize("name", STEPS)
def test_a_step_says_what_it_takes(name):
    takes = find_step(name).takes()
    assert all(
        issubclass(kind, tuple(KINDS.values())) or kind.__name__ == "Record" for kind in takes
    )


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_a_recipe(name):
    assert recipes_with(name), f"no recipe under recipes/ uses {name}"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_survives_pickle_and_json(name):
    recipe = load_recipe(recipes_with(name)[0])
    step = next(placed.step for placed in recipe.steps if placed.name == name)
    assert pickle.loads(pickle.dumps(step)) == step
    assert type(step).model_validate_json(step.model_dump_json()) == step


@pytest.mark.parametrize("name", [name for name in STEPS if name not in NEEDS_NETWORK])
def test_a_step_gives_the_same_bytes_from_the_same_seed_and_loses_no_row(name, rehearsed):
    recipe, position, runs = rehearsed(name)
    digests = []
    for settings, markers in runs:
        store = Store(settings.outputs)
        dones = markers[position]
        digests.append([chunk.digest for chunk in chunks(dones)])
        kind = recipe.kinds()[position]
        frame = store.scan(chunks(dones), kind.table_schema()).collect()
        assert frame.schema == kind.table_schema()
        assert frame.height > 0
        # The engine has checked each part; these are the sums.
        given = sum(done.rows_in for done in dones)
        if position:
            assert given == sum(done.rows for done in markers[position - 1])
        lost = {row for done in dones for row in store.dropped(done)["id"]}
        assert given <= frame["id"].n_unique() + len(lost)
    assert digests[0] == digests[1]


def _others(annotation, value):
    """Values of a field's type that differ from `value`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _others(args[0], value)
    if origin is typing.Literal:
        return [one for one in args if one != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1]
    if isinstance(value, str):
        return [f"{value}x"]
    if value is None:
        inner = next(one for one in args if one is not type(None))
        return [{str: "x", int: 3, float: 0.5}.get(typing.get_origin(inner) or inner, "x")]
    if isinstance(value, tuple):
        return [(*value, *value) if value else ("x",)]
    if isinstance(value, dict):
        return [value | {"x": "y"}]
    return [value.model_copy(update={"seed": 5})]


@pytest.mark.parametrize("name", STEPS)
def test_every_field_moves_the_key_unless_declared_inert(name, tmp_path):
    recipe = load_recipe(recipes_with(name)[0])
    recipe = recipe.model_copy(
        update={
            "models": recipe.models
            | {
                f"{role}x": spec.model_copy(update={"identity": "x"})
                for role, spec in recipe.models.items()
            }
        }
    )
    placed = next(placed for placed in recipe.steps if placed.name == name)
    settings = Settings(outputs=tmp_path, state=tmp_path, base=recipe.base, models=recipe.models)
    with Session(settings, [], Watch()) as session:
        kit = session.kit(placed.alias)
        # What is read from outside has tests of its own; here the fields alone are at stake.
        keys = {part_key(_deaf(placed, placed.step), "Prompt", ["1"], settings, kit)}
        for field, info in type(placed.step).model_fields.items():
            is_role = any(isinstance(mark, Role) for mark in info.metadata)
            for other in _others(info.annotation, getattr(placed.step, field)):
                if _names_roles(info.annotation) and not is_role:
                    other = (*getattr(placed.step, field), f"{getattr(placed.step, field)[0]}x")
                step = placed.step.model_copy(update={field: other})
                key = part_key(_deaf(placed, step), "Prompt", ["1"], settings, kit)
                inert = field in type(step).inert
                assert (key in keys) is inert, f"{name}.{field} = {other!r}"
                keys.add(key)


def _names_roles(annotation):
    return "Role(" in repr(annotation)


def _deaf(placed, step):
    """The step with nothing read from outside."""

    class Deaf(type(step)):
        def fingerprint(self, kit):
            return ""

    Deaf.__module__ = "deaf"
    return PlacedStep.model_construct(
        name=placed.name, alias=placed.alias, step=Deaf.model_construct(**dict(step))
    )


def test_no_step_loads_a_heavy_package():
    code = (
        "import sys, json\n"
        "from datakit.catalog import find_step, step_names\n"
        "found = {}\n"
        "for name in step_names():\n"
        "    find_step(name)\n"
        f"    found[name] = [one for one in {HEAVY!r} if one in sys.modules]\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not {name: heavy for name, heavy in json.loads(done.stdout).items() if heavy}


def test_steps_never_import_each_other():
    graph = grimp.build_graph("datakit")
    modules = {f"datakit.{name}" for name in STEPS}
    for module in modules:
        assert not graph.find_modules_directly_imported_by(module) & modules


def test_sources_come_first_and_are_the_only_ones_that_take_nothing():
    for name in STEPS:
        step = find_step(name)
        assert issubclass(step, Step)
        assert issubclass(step, SourceStep) is name.startswith("sources.") is (not step.takes())
