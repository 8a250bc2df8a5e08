"""Recipes: YAML to a checked value. Every mistake is found here, before anything is spent.

A message begins with the path that the user typed (`steps[2].threshold`, `models.judge.kind`) and
names the near miss.
"""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import yaml
from pydantic import Field, SerializeAsAny, TypeAdapter, ValidationError, model_validator

from datakit.catalog import find_step
from datakit.errors import InputError, RecipeError
from datakit.models.budget import Budget
from datakit.models.specs import DEFAULT_MODELS, ModelSpec, OpenAISpec, Spec
from datakit.recipe_files import find_recipe, read_yaml
from datakit.records import Record
from datakit.step import SourceStep, Step, roles
from datakit.text import digest, near_miss
from datakit.values import SPLIT_NAME, Number, Value

_ENV = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
RESERVED = ("splits", "label")
"""Names that steps cannot have: of the funnel's last line, and of the columns of labels."""
_ALIAS = r"^[a-z][a-z0-9_]*$"
_SPEC: TypeAdapter[Spec] = TypeAdapter(ModelSpec)


class Bound(Value):
    """What a gate allows of one number of the report."""

    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("needs `min`, `max` or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(
                f"contradicts itself: no number is at least {self.min:g} and at most {self.max:g}"
            )
        return self


class PlacedStep(Value):
    """A step at its place in a recipe."""

    name: str
    alias: str = Field(pattern=_ALIAS)
    step: SerializeAsAny[Step]

    def plain(self) -> dict[str, Any]:
        """As the recipe writes it."""
        fields = self.step.model_dump(mode="json")
        return {"step": self.name, "as": self.alias} | fields


class Recipe(Value):
    """A line of steps and all that a run needs to know.

    rows_per_part: about how many rows are worked on and stored together. recorded: a ledger export
    that is read in before the run. gate: bounds on numbers of the report, by dotted path. splits:
    share of prompt clusters by split, adding up to 1.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    description: str = ""
    license: str = ""
    seed: int = 0
    rows_per_part: int = Field(default=200, ge=1)
    recorded: str | None = None
    models: dict[str, SerializeAsAny[Spec]] = {}
    steps: tuple[PlacedStep, ...] = Field(min_length=1)
    budget: Budget | None = None
    gate: dict[str, Bound] = {}
    splits: dict[str, Number] = {"train": 0.95, "test": 0.05}
    base: Path = Field(default=Path(), exclude=True)

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as JSON data; loads again to an equal recipe."""
        data = self.model_dump(mode="json", exclude={"steps", "models"})
        models = {
            name: spec.model_dump(mode="json")
            for name, spec in self.models.items()
            if DEFAULT_MODELS.get(name) != spec
        }
        return data | {"models": models, "steps": [placed.plain() for placed in self.steps]}

    def kinds(self) -> list[type[Record]]:
        """The kind that each step gives, in order."""
        kinds: list[type[Record]] = []
        for placed in self.steps:
            kinds.append(placed.step.gives(kinds[-1] if kinds else None))
        return kinds

    def roles(self) -> list[str]:
        """The model roles that some step names, sorted."""
        return sorted({role for placed in self.steps for _, role, _ in roles(placed.step)})

    @property
    def digest(self) -> str:
        """What it means: a budget, and addresses, windows and limits of models do not count."""
        models = {role: self.models[role].fingerprint() for role in self.roles()}
        plain = {key: value for key, value in self.plain().items() if key != "budget"}
        return digest(plain | {"models": models})


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe in a file, under a shipped name, or in a mapping.

    overrides: `path=value` texts, the value read as YAML; a step is addressed by its alias or its
    number (`steps.near.threshold=0.8`). Raises RecipeError, or InputError for an unreadable file.
    """
    if isinstance(source, Mapping):
        data, base = copy.deepcopy(dict(source)), Path.cwd()
    else:
        path = find_recipe(str(source))
        data, base = read_yaml(path), path.resolve().parent
    for override in overrides:
        _override(data, override)
    return _build(cast("dict[str, Any]", _with_environment(data, "")), base)


def notes(recipe: Recipe) -> list[str]:
    """What is allowed and yet may surprise."""
    used = {role for placed in recipe.steps for _, role, _ in roles(placed.step)}
    return [
        f"models.{role} has neither revision nor identity: if {spec.model!r} is replaced behind "
        "its name, old answers still count"
        for role, spec in recipe.models.items()
        if role in used
        and isinstance(spec, OpenAISpec)
        and spec.base_url
        and spec.resolved_identity() == spec.model
    ]


def _override(data: dict[str, Any], text: str) -> None:
    path, equals, raw = text.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {text!r}: write it as path=value")
    *parents, last = path.split(".")
    node: Any = data
    for name in parents:
        if isinstance(node, list):
            node = node[_step_number(cast("list[Any]", node), name, text)]
        elif isinstance(node, dict):
            node = cast("dict[str, Any]", node).setdefault(name, {})
        else:
            raise RecipeError(f"--set {text!r}: {name!r} is inside a plain value")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not valid YAML") from error
    if isinstance(node, list):
        steps = cast("list[Any]", node)
        steps[_step_number(steps, last, text)] = value
    elif isinstance(node, dict):
        cast("dict[str, Any]", node)[last] = value
    else:
        raise RecipeError(f"--set {text!r}: {last!r} is inside a plain value")


def _step_number(steps: list[Any], name: str, text: str) -> int:
    if name.isdigit() and int(name) < len(steps):
        return int(name)
    aliases = [_alias(step) for step in steps]
    if name in aliases:
        return aliases.index(name)
    raise RecipeError(f"--set {text!r}: no step {name!r}{near_miss(name, aliases)}")


def _alias(step: Mapping[str, Any]) -> str:
    return str(step.get("as") or str(step.get("step", "")).rpartition(".")[2])


def _with_environment(value: object, path: str) -> object:
    """`value` with every `${NAME}` replaced from the environment."""
    if isinstance(value, str):

        def lookup(found: re.Match[str]) -> str:
            name = found.group(1)
            if name not in os.environ:
                raise RecipeError(f"{path}: the environment variable {name!r} is not set")
            return os.environ[name]

        return _ENV.sub(lookup, value)
    if isinstance(value, dict):
        mapping = cast("dict[str, object]", value)
        return {
            key: _with_environment(inner, f"{path}.{key}".lstrip("."))
            for key, inner in mapping.items()
        }
    if isinstance(value, list):
        items = cast("list[object]", value)
        return [_with_environment(inner, f"{path}[{i}]") for i, inner in enumerate(items)]
    return value


def _build(data: dict[str, Any], base: Path) -> Recipe:
    known = set(Recipe.model_fields) - {"base"}
    for key in data:
        if key not in known:
            raise RecipeError(f"{key}: unknown key{near_miss(key, known)}")
    models = _models(data.get("models") or {})
    raw_steps = data.get("steps")
    if not isinstance(raw_steps, list) or not raw_steps:
        raise RecipeError("steps: a recipe needs a list of at least one step")
    steps = [_placed(step, i) for i, step in enumerate(cast("list[Any]", raw_steps))]
    fields = data | {"models": models, "steps": steps, "base": base}
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(_first_error(error, "", Recipe)) from error
    _check(recipe)
    return recipe


def _models(data: object) -> dict[str, Spec]:
    if not isinstance(data, dict):
        raise RecipeError("models: must be a mapping of role names to model specs")
    specs: dict[str, Spec] = dict(DEFAULT_MODELS)
    for role, spec in cast("dict[str, Any]", data).items():
        path = f"models.{role}"
        try:
            specs[role] = _SPEC.validate_python(spec)
        except ValidationError as error:
            raise RecipeError(_first_error(error, path, None)) from error
    return specs


def _placed(data: Any, number: int) -> PlacedStep:
    path = f"steps[{number}]"
    if not isinstance(data, dict) or "step" not in data:
        raise RecipeError(f"{path}: each step is a mapping with a key `step`, its name")
    fields = dict(cast("dict[str, Any]", data))
    name, alias = str(fields.pop("step")), _alias(cast("dict[str, Any]", data))
    fields.pop("as", None)
    try:
        step_class = find_step(name)
    except InputError as error:
        raise RecipeError(f"{path}.step: {error}") from error
    for field in fields:
        if field not in step_class.model_fields:
            raise RecipeError(
                f"{path}.{field}: {name} has no field {field!r}"
                f"{near_miss(field, step_class.model_fields)}"
            )
    try:
        step = step_class.model_validate(fields)
        return PlacedStep(name=name, alias=alias, step=step)
    except ValidationError as error:
        raise RecipeError(_first_error(error, path, step_class)) from error


def _first_error(error: ValidationError, path: str, model: type[Value] | None) -> str:
    """The first problem in one line: path, what is wrong, the value."""
    first = error.errors()[0]
    where = path
    tags = {"openai", "scripted", "sentence_transformers", "hashing"}
    for part in first["loc"]:
        if isinstance(part, int):
            where += f"[{part}]"
        elif part not in tags:
            where += f".{part}"
    where = where.lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where}: this field is required"
    if first["type"] == "extra_forbidden":
        known = model.model_fields if model else _all_spec_fields()
        return f"{where}: unknown field{near_miss(str(first['loc'][-1]), known)}"
    if first["type"] == "union_tag_not_found":
        return f"{where}.kind: this field is required; known: {', '.join(sorted(tags))}"
    if first["type"] == "union_tag_invalid":
        return f"{where}.kind: {message}"
    given = first["input"]
    shown = f" (given {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message}{shown}"


def _all_spec_fields() -> set[str]:
    pending: list[type[Spec]] = [Spec]
    fields: set[str] = set()
    while pending:
        spec = pending.pop()
        fields |= set(spec.model_fields)
        pending += spec.__subclasses__()
    return fields


def _check(recipe: Recipe) -> None:
    """What only the whole recipe can tell. Raises RecipeError at the first contradiction."""
    seen: dict[str, int] = {}
    kind: type[Record] | None = None
    for number, placed in enumerate(recipe.steps):
        path = f"steps[{number}]"
        if placed.alias in RESERVED:
            raise RecipeError(f"{path}.as: {placed.alias!r} is a name of datakit's own")
        if placed.alias in seen:
            raise RecipeError(
                f"{path}.as: alias {placed.alias!r} is used twice (steps[{seen[placed.alias]}] and "
                f"{path}); give one of them another with `as:`"
            )
        seen[placed.alias] = number
        is_source = isinstance(placed.step, SourceStep)
        if is_source != (number == 0):
            raise RecipeError(
                f"{path}: {placed.name} reads a source and can only be the first step"
                if is_source
                else f"{path}: the first step must read a source, {placed.name} does not"
            )
        takes = type(placed.step).takes()
        if kind is not None and not issubclass(kind, takes):
            wanted = " or ".join(sorted(one.__name__ for one in takes))
            raise RecipeError(
                f"{path}: {placed.name} takes {wanted}, but steps[{number - 1}] "
                f"({recipe.steps[number - 1].name}) gives {kind.__name__}"
            )
        kind = placed.step.gives(kind)
        _check_roles(recipe, placed, path)
    source = recipe.steps[0].step
    if isinstance(source, SourceStep) and source.private:
        check_trust(recipe)
    for name in recipe.splits:
        if not SPLIT_NAME.fullmatch(name):
            raise RecipeError(f"splits: {name!r} is no name of a-z, 0-9 and _")
    total = sum(recipe.splits.values())
    if any(share <= 0 for share in recipe.splits.values()) or abs(total - 1) > 1e-9:
        raise RecipeError(f"splits: shares must be positive and add up to 1, not to {total:g}")


def check_trust(recipe: Recipe) -> None:
    """Refuse a recipe whose private rows would reach an endpoint that is not trusted."""
    for number, placed in enumerate(recipe.steps):
        for field, role, _ in roles(placed.step):
            spec = recipe.models[role]
            if isinstance(spec, OpenAISpec) and not spec.trusted:
                raise RecipeError(
                    f"steps[{number}].{field}: the source is private, and models.{role} is not "
                    "`trusted: true`"
                )


def _check_roles(recipe: Recipe, placed: PlacedStep, path: str) -> None:
    for field, role, purpose in roles(placed.step):
        spec = recipe.models.get(role)
        if spec is None:
            raise RecipeError(
                f"{path}.{field}: model role {role!r} is not defined under `models`"
                f"{near_miss(role, recipe.models)}"
            )
        if spec.purpose != purpose:
            wanted = "answers requests" if purpose == "chat" else "embeds texts"
            raise RecipeError(
                f"{path}.{field}: needs a model that {wanted}, but models.{role} is of another kind"
            )
