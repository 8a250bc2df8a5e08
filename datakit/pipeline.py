"""Running a recipe, from Python or a command line: recipe -> parts -> version."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datakit.engine import Spread, execute
from datakit.errors import InputError
from datakit.loop import rare_collections
from datakit.models.book import Meter
from datakit.models.budget import Budget
from datakit.models.chat import ChatModel
from datakit.models.identity import default_state
from datakit.models.ledger import Ledger
from datakit.models.prices import price_of
from datakit.models.specs import ChatSpec, EmbedSpec, HashingSpec, OpenAISpec, ScriptedSpec, Spec
from datakit.recipe import Recipe, check_trust, load_recipe
from datakit.release import release
from datakit.session import Session, Settings, Watch
from datakit.step import SourceStep, roles
from datakit.text import dollars
from datakit.versions import Version
from datakit.work import perform


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    outputs: str | Path = "outputs",
    state: str | Path | None = None,
    offline: bool = False,
    lanes: int = 1,
    spread: Spread | None = None,
    watch: Watch | None = None,
    models: Mapping[str, ChatModel] | None = None,
    max_usd: float | None = None,
    max_tokens: int | None = None,
    finish_partial: bool = False,
) -> Version:
    """Run a recipe and return its version: a new one, or the one that already says the same.

    recipe: a loaded recipe, a file, a shipped name, or a mapping. limit: at most so many source
    rows, released as `<name>-limit-<n>`. overrides: `path=value` texts. state: the folder of
    ledger and vectors. spread: who does the works; here, one after another, by default. models:
    chat models by role that answer instead of the recipe's. max_usd, max_tokens: caps for this
    run, instead of the recipe's budget. finish_partial: send nothing, and release the rows that
    are complete as a pre-release.

    Raises RecipeError, InputError, GateFailed, Stopped, OutsideError or BugError.
    """
    watch = watch or Watch()
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    settings = settings_of(
        loaded,
        outputs,
        state,
        limit=limit,
        offline=offline,
        max_usd=max_usd,
        max_tokens=max_tokens,
        finish_partial=finish_partial,
    )
    with rare_collections():
        markers = execute(loaded, settings, spread or here(watch, models), lanes)
        _count_batches(settings, watch.meter)
        version, is_new = release(loaded, settings, markers)
    watch.released(version, is_new)
    return version


def here(watch: Watch, models: Mapping[str, ChatModel] | None = None) -> Spread:
    """Do works in this process, one after another."""
    return lambda works: [perform(work, watch, models) for work in works]


def _count_batches(settings: Settings, meter: Meter) -> None:
    """Count what batches brought: answers went into the ledger, and were replayed from there."""
    names = {
        spec.resolved_identity()
        for spec in settings.models.values()
        if isinstance(spec, OpenAISpec) and spec.mode == "batch"
    }
    if not names:
        return
    with Ledger.opened(settings.state) as ledger:
        rows = ledger.db.execute(
            "SELECT model, outcome, COUNT(*), SUM(input_tokens), SUM(output_tokens), SUM(usd) "
            "FROM attempts WHERE run = ? AND outcome != 'replayed' GROUP BY 1, 2",
            (settings.run,),
        ).fetchall()
    for model, outcome, count, tokens_in, tokens_out, usd in rows:
        if model not in names:
            continue
        meter.usd += usd
        if outcome != "ok":
            meter.failed += count
            meter.wasted_usd += usd
            continue
        meter.sent += count
        meter.input_tokens += tokens_in
        meter.output_tokens += tokens_out
        meter.replayed = max(0, meter.replayed - count)
        meter.saved_usd = max(0.0, meter.saved_usd - usd)


def settings_of(
    recipe: Recipe,
    outputs: str | Path,
    state: str | Path | None,
    *,
    limit: int | None = None,
    offline: bool = False,
    max_usd: float | None = None,
    max_tokens: int | None = None,
    finish_partial: bool = False,
) -> Settings:
    """The settings of a run, after everything that only the world outside the recipe can tell.

    Recorded answers are read in. Raises RecipeError or InputError; nothing is spent.
    """
    folder = Path(state).resolve() if state else default_state()
    settings = Settings(
        outputs=Path(outputs).resolve(),
        state=folder,
        base=recipe.base,
        seed=recipe.seed,
        rows_per_part=recipe.rows_per_part,
        limit=limit,
        offline=offline,
        finish_partial=finish_partial,
        recipe=recipe.name,
        run=uuid.uuid4().hex[:12],
        budget=_budget(recipe, folder, max_usd, max_tokens),
        models=recipe.models,
    )
    settings = settings.model_copy(update={"private": _checked_outside(recipe, settings)})
    read_recorded(recipe, settings)
    return settings


def _budget(
    recipe: Recipe, state: Path, max_usd: float | None, max_tokens: int | None
) -> Budget | None:
    """The cap of this run. Raises InputError where dollars are capped and a price is not known."""
    budget = recipe.budget
    if max_usd is not None or max_tokens is not None:
        budget = Budget(max_usd=max_usd, max_tokens=max_tokens)
    if budget is None or budget.max_usd is None:
        return budget
    for placed in recipe.steps:
        for _, role, _ in roles(placed.step):
            spec = recipe.models[role]
            if isinstance(spec, ChatSpec) and price_of(spec, state) is None:
                raise InputError(
                    f"a cap of {dollars(budget.max_usd)} cannot hold: nobody knows what "
                    f"models.{role} ({spec.model!r}) costs; give it `price: {{input: USD, "
                    "output: USD}` for a million tokens, or cap tokens instead"
                )
    return budget


def _checked_outside(recipe: Recipe, settings: Settings) -> bool:
    """What only the world outside the recipe can tell, before anything is spent.

    Whether the source's rows are private; raises RecipeError where they would reach a model that
    is not trusted, InputError where a key is missing.
    """
    source = recipe.steps[0].step
    assert isinstance(source, SourceStep)
    with Session(settings, [], Watch()) as session:
        private = source.is_private(session.kit(recipe.steps[0].alias))
    if private:
        check_trust(recipe)
    for placed in recipe.steps:
        for _, role, _ in roles(placed.step):
            spec = recipe.models[role]
            if isinstance(spec, OpenAISpec) and spec.base_url and not settings.offline:
                spec.api_key()
    return private


def read_recorded(recipe: Recipe, settings: Settings) -> None:
    """Read the recipe's recorded answers, where it names some, into the ledger."""
    if recipe.recorded is None:
        return
    path = recipe.base / recipe.recorded
    with Ledger.opened(settings.state) as ledger:
        ledger.load(path)


def rehearsal(recipe: Recipe, words: int | None = None) -> Recipe:
    """The recipe with every chat model scripted and every embedder hashing: no cost, no wait.

    words: how long a scripted answer is, about.
    """
    models: dict[str, Spec] = {}
    for role, spec in recipe.models.items():
        if isinstance(spec, EmbedSpec):
            models[role] = HashingSpec(kind="hashing")
        elif isinstance(spec, ScriptedSpec) and words is None:
            models[role] = spec
        else:
            assert isinstance(spec, ChatSpec)
            models[role] = ScriptedSpec(
                kind="scripted", model=f"scripted-{role}", sampling=spec.sampling, words=words
            )
    return recipe.model_copy(
        update={"models": models, "recorded": None, "gate": {}, "budget": None}
    )
