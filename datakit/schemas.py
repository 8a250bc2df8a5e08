"""JSON Schemas of recipes, records and manifests, generated from the code."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from datakit.catalog import find_step, step_names
from datakit.models.specs import ModelSpec
from datakit.recipe import Recipe
from datakit.records import KINDS
from datakit.versions import Manifest


def all_schemas() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, schema) of each."""
    yield "recipe.schema.json", recipe_schema()
    yield "manifest.schema.json", Manifest.model_json_schema()
    for name, kind in KINDS.items():
        yield f"records/{name.lower()}.schema.json", kind.model_json_schema()


def recipe_schema() -> dict[str, Any]:
    """The schema that editors complete recipes by: each step with the fields of its name."""
    schema = Recipe.model_json_schema()
    definitions: dict[str, Any] = schema.get("$defs", {})
    definitions.pop("PlacedStep", None)
    models = TypeAdapter(ModelSpec).json_schema(ref_template="#/$defs/{model}")
    definitions |= models.pop("$defs", {})
    branches: list[dict[str, Any]] = []
    for name in step_names():
        step = find_step(name).model_json_schema(ref_template="#/$defs/{model}")
        definitions |= step.pop("$defs", {})
        step["properties"] = {
            "step": {"const": name},
            "as": {"type": "string", "description": "The step's alias in this recipe."},
        } | step.get("properties", {})
        step["required"] = ["step", *step.get("required", [])]
        step["additionalProperties"] = False
        definitions[name] = step
        branches.append(
            {
                "if": {"properties": {"step": {"const": name}}, "required": ["step"]},
                "then": {"$ref": f"#/$defs/{name}"},
            }
        )
    schema["$defs"] = definitions
    schema["properties"]["models"]["additionalProperties"] = models
    schema["properties"]["steps"]["items"] = {
        "type": "object",
        "required": ["step"],
        "properties": {"step": {"type": "string", "examples": step_names()}},
        "allOf": branches,
    }
    schema["title"] = "datakit recipe"
    return schema


def write_schemas(folder: Path) -> list[Path]:
    """Write every schema; returns the files."""
    written: list[Path] = []
    for name, schema in all_schemas():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(schema, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.append(path)
    return written
