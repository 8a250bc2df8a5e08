"""The schemas that ship are those of the code, and the recipes that ship fit them."""

import json

import jsonschema
import pytest
import yaml

from datakit.recipe_files import shipped_folder, shipped_recipes
from datakit.schemas import all_schemas, recipe_schema


@pytest.mark.parametrize(("name", "schema"), list(all_schemas()), ids=lambda one: str(one)[:30])
def test_a_schema_is_up_to_date(name, schema):
    shipped = json.loads((shipped_folder("schemas") / name).read_text())
    assert shipped == json.loads(json.dumps(schema)), "run `datakit schemas` and commit"


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_fits_the_schema(name):
    recipe = yaml.safe_load(shipped_recipes()[name].read_text())
    jsonschema.validate(recipe, recipe_schema())


@pytest.mark.parametrize(
    "change",
    [
        {"nmae": "x"},
        {"steps": [{"step": "curation.near", "treshold": 1}]},
        {"models": {"m": {"kind": "openai"}}},
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(change):
    recipe = yaml.safe_load(shipped_recipes()["quickstart"].read_text()) | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, recipe_schema())
