"""datakit: preference data, built and curated.

`import datakit as dk; version = dk.run("quickstart")` runs a recipe; `version.scan()` reads it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datakit.pipeline import run
    from datakit.recipe import load_recipe

__version__ = "0.1.0"

__all__ = ["__version__", "load_recipe", "run"]


def __getattr__(name: str) -> Any:
    """Load what is asked for, so that `import datakit` costs next to nothing."""
    if name == "run":
        from datakit.pipeline import run

        return run
    if name == "load_recipe":
        from datakit.recipe import load_recipe

        return load_recipe
    raise AttributeError(f"module 'datakit' has no attribute {name!r}")
