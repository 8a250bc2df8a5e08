"""Finding steps. A step's name is its module path; a module holds exactly one step.

`curation.near` is `datakit/curation/near.py`. Any other dotted path is a third party's module. The
folders are the registry: adding a file adds a method.
"""

import importlib
import importlib.util
import inspect
import pkgutil

from datakit.errors import InputError
from datakit.step import GRAINS, Step
from datakit.text import near_miss

FOLDERS = ("sources", "synthesis", "curation", "annotation")


def step_names() -> list[str]:
    """Names of all steps that ship, sorted."""
    return sorted(
        f"{folder}.{module.name}"
        for folder in FOLDERS
        for module in pkgutil.iter_modules(importlib.import_module(f"datakit.{folder}").__path__)
        if not module.name.startswith("_")
    )


def find_step(name: str) -> type[Step]:
    """The step class of that name.

    Raises InputError where there is no such module, or it does not hold exactly one step.
    """
    own = name.partition(".")[0] in FOLDERS
    path = f"datakit.{name}" if own else name
    try:
        found = importlib.util.find_spec(path) is not None
    except (ImportError, ValueError):
        found = False
    hidden = name.rpartition(".")[2].startswith("_")
    if not found or hidden or name in FOLDERS:
        raise InputError(f"no step {name!r}{near_miss(name, step_names())}")
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise InputError(
            f"step {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    steps = [
        thing
        for thing in vars(module).values()
        if inspect.isclass(thing)
        and issubclass(thing, Step)
        and thing.__module__ == module.__name__
        and thing not in GRAINS
        # A parametrised grain, as RowStep[Prompt, Pair], is put into the module that names it.
        and not thing.__pydantic_generic_metadata__["args"]
    ]
    if len(steps) != 1:
        names = ", ".join(step.__name__ for step in steps) or "none"
        raise InputError(f"module {path!r} must hold exactly one Step, it holds: {names}")
    return steps[0]
