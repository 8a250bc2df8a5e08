"""Recipe files: finding those that ship, reading YAML strictly, copying one to begin with."""

import re
from pathlib import Path
from typing import Any, cast

import yaml

from datakit.errors import InputError, RecipeError
from datakit.text import near_miss


def shipped_folder(name: str) -> Path:
    """The folder `recipes` or `schemas`, in a checkout or an installed wheel."""
    package = Path(__file__).parent
    inside = package / "_shipped" / name
    return inside if inside.is_dir() else package.parent / name


def shipped_recipes() -> dict[str, Path]:
    """Every recipe that ships, by name (`quickstart`, `smoke/pairs`)."""
    folder = shipped_folder("recipes")
    files = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or shipped name."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise InputError(f"no recipe file {name!r} and no shipped recipe{near_miss(name, shipped)}")


def new_recipe(file: Path, source: str) -> None:
    """Write `file` as a copy of a recipe that works from where it is.

    The name becomes the file's, relative paths become absolute, and a header lets editors complete
    keys. Raises InputError where the file exists.
    """
    if file.exists():
        raise InputError(f"{str(file)!r} exists; name another file")
    origin = find_recipe(source)
    data = read_yaml(origin)
    text = origin.read_text(encoding="utf-8")
    base = origin.resolve().parent
    steps = [step for step in data.get("steps") or [] if isinstance(step, dict)]
    for name in {
        str(one) for one in (data.get("recorded"), *(s.get("path") for s in steps)) if one
    }:
        if (base / name).exists():
            place = rf"""((?:path|recorded):\s*)(["']?){re.escape(name)}\2(?=[\s,}}]|$)"""
            text = re.sub(place, lambda found, to=base / name: f"{found[1]}{to.resolve()}", text)
    name = re.sub(r"[^a-z0-9_-]+", "-", file.stem.lower()).strip("-") or "recipe"
    text = re.sub(r"^name: .*$", f"name: {name}", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^# yaml-language-server:.*\n", "", text)
    schema = (shipped_folder("schemas") / "recipe.schema.json").resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# yaml-language-server: $schema={schema}\n{text}", encoding="utf-8")


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = cast("Any", self.construct_object(key_node, deep=True))  # pyright: ignore[reportUnknownMemberType]
            if isinstance(key, list | dict):
                raise yaml.YAMLError("a key must be a plain value")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} is given twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises InputError or RecipeError that names the file."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read recipe {str(path)!r}: {error}") from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise RecipeError(f"recipe {str(path)!r} is not valid YAML: {said}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {str(path)!r} must be a mapping of keys to values")
    return cast("dict[str, Any]", data)
