"""What lies between two passes over a stage: local models in turns, batches, a spent budget."""

import contextlib
import time
from collections.abc import Generator, Iterable

from anyio.from_thread import start_blocking_portal

from datakit.errors import Stopped
from datakit.models.batch import Queue, settle
from datakit.models.budget import said_of, scopes
from datakit.models.ledger import Ledger
from datakit.models.specs import OpenAISpec, VLLMSpec
from datakit.models.vllm import gpu_names, phases, serving, visible_gpus
from datakit.session import PHASE, Settings
from datakit.step import Step, roles


class Between:
    """What has to happen before the next pass over the steps of a stage can ask more."""

    def __init__(self, settings: Settings, steps: Iterable[Step]) -> None:
        self._settings = settings
        named = dict.fromkeys(role for step in steps for _, role, _ in roles(step))
        self._specs = {role: settings.models[role] for role in named}

    @contextlib.contextmanager
    def passes(self, reasons: set[str]) -> Generator[dict[str, tuple[str, ...]]]:
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
        for phase in phases(local, visible_gpus()) if needed else []:
            if needed & set(phase):
                up = phase
                break
        with self._serving({role: local[role] for role in up}) as served:
            yield served

    @contextlib.contextmanager
    def _serving(self, specs: dict[str, VLLMSpec]) -> Generator[dict[str, tuple[str, ...]]]:
        """Have local models up; where, by role. Their servers are watched from another thread."""
        if not specs:
            yield {}
            return
        logs = self._settings.state / "vllm"
        with start_blocking_portal() as portal:
            servers = serving(specs, gpu_names(), logs)
            with portal.wrap_async_context_manager(servers) as up:
                yield {role: tuple(one.url for one in replicas) for role, replicas in up.items()}

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
        raise Stopped(
            f"{said}; what was answered is kept: raise the cap to go on, or add "
            "--finish-partial for a version of the rows that are complete"
        )
