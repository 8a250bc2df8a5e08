"""What lies between two passes over a stage: local models in turns, batches, a spent budget."""

import contextlib
import time
from collections.abc import Generator, Iterable

import anyio
from anyio.abc import TaskStatus
from anyio.from_thread import start_blocking_portal

from datakit.errors import Stopped
from datakit.models.batch import Queue, settle
from datakit.models.budget import said_of, scopes, spent
from datakit.models.gpus import gpu_names, phases, visible_gpus
from datakit.models.ledger import Ledger
from datakit.models.specs import OpenAISpec, VLLMSpec
from datakit.models.vllm import serving
from datakit.session import PHASE, Settings
from datakit.step import Step, roles

Served = dict[str, tuple[str, ...]]
"""The addresses of local models that are up, by role."""


class Between:
    """What has to happen before the next pass over the steps of a stage can ask more."""

    def __init__(self, settings: Settings, steps: Iterable[Step]) -> None:
        self._settings = settings
        named = dict.fromkeys(role for step in steps for _, role, _ in roles(step))
        self._specs = {role: settings.models[role] for role in named}

    @contextlib.contextmanager
    def passes(self, reasons: set[str]) -> Generator[Served]:
        """Do what the pending rows of the pass before wait for; gives where local models are up.

        Raises Stopped where the budget is spent.
        """
        if "budget" in reasons:
            self._stop()
        if "batch" in reasons:
            self._collect()
        needed = {reason.removeprefix(PHASE) for reason in reasons if reason.startswith(PHASE)}
        local = {role: spec for role, spec in self._specs.items() if isinstance(spec, VLLMSpec)}
        up: list[str] = []
        if needed:
            asked = [turn for turn in phases(local, visible_gpus()) if needed & set(turn)]
            # One that later steps ask again comes last, so that it is up once and not twice.
            up = next((turn for turn in asked if needed >= set(turn)), asked[0])
        with self._serving({role: local[role] for role in up}) as served:
            yield served

    @contextlib.contextmanager
    def _serving(self, specs: dict[str, VLLMSpec]) -> Generator[Served]:
        """Have local models up; where, by role. Their servers are watched from another thread.

        Raises what `serving` raises, at the end instead of what the body has raised.
        """
        if not specs:
            yield {}
            return
        logs = self._settings.state / "vllm" / self._settings.recipe

        async def hold(*, task_status: TaskStatus[tuple[anyio.Event, Served]]) -> None:
            over = anyio.Event()
            async with serving(specs, gpu_names(), logs) as up:
                urls = {role: tuple(one.url for one in servers) for role, servers in up.items()}
                task_status.started((over, urls))
                await over.wait()

        # The body's error stays here: an interrupt, thrown into the loop, would end the loop before
        # the servers are stopped. A second interrupt cancels the wait, and they are killed.
        with start_blocking_portal() as portal:
            held, (over, urls) = portal.start_task(hold)
            try:
                yield urls
            finally:
                portal.call(over.set)
                held.result()

    def _collect(self) -> None:
        """Send what is queued and wait for it."""
        settings = self._settings
        specs = {
            spec.resolved_identity(): spec
            for spec in self._specs.values()
            if isinstance(spec, OpenAISpec) and spec.mode == "batch" and spec.urls
        }
        with Ledger.opened(settings.state) as ledger:
            queues = [
                Queue(
                    spec,
                    ledger,
                    recipe=settings.recipe,
                    run=settings.run,
                    budget=settings.budget,
                )
                for spec in specs.values()
            ]
            settle(queues)

    def _stop(self) -> None:
        settings = self._settings
        assert settings.budget is not None
        with Ledger.opened(settings.state) as ledger:
            scope = scopes(settings.recipe, settings.run, time.time())[settings.budget.per]
            said = said_of(settings.budget, ledger, scope)
            usd, tokens = spent(ledger, scope)
        if not (usd or tokens):
            raise Stopped(f"{said}: one request may cost more; raise the cap")
        going_on = "raise the cap to go on where it stopped"
        if settings.budget.per == "run":
            going_on = "the same command goes on where it stopped, and may spend as much again"
        raise Stopped(
            f"{said}; {going_on}; --finish-partial sends nothing and makes a pre-release of the "
            "rows that are complete"
        )
