"""The curation flow: a recipe becomes a version, one Prefect task for each (steps, lane).

    python -m flows.curate quickstart
    prefect deployment run ...            (see flows/README.md)

A task is a work of the engine, never a row; consecutive row steps run depth first and are one task.
Tables never pass through Prefect: a task takes a plain value and returns the markers of what it
stored. No result is cached by Prefect, because the store already knows what is done.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from datakit.engine import Markers, Work
from datakit.pipeline import run
from datakit.session import Watch
from datakit.versions import Version
from datakit.work import perform


@task(name="work", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def work(name: str, value: Work) -> Markers:
    """Do one work; `name` is for people."""
    watch = Watch()
    markers = perform(value, watch)
    rows = sum(done.rows for done in markers[-1])
    meter = watch.meter
    get_run_logger().info(
        "%s: %d rows kept, %d calls sent, %d replayed", name, rows, meter.sent, meter.replayed
    )
    return markers


def spread(works: Sequence[Work]) -> list[Markers]:
    """Submit every work to the flow's task runner and wait for all."""
    futures = [work.submit(one.name, one) for one in works]
    return [future.result() for future in futures]


@flow(name="curate", flow_run_name="curate {recipe}")
def curate(
    recipe: str,
    limit: int | None = None,
    overrides: list[str] | None = None,
    outputs: str = "outputs",
    state: str | None = None,
    offline: bool = False,
    lanes: int = 1,
    max_usd: float | None = None,
    max_tokens: int | None = None,
    finish_partial: bool = False,
) -> str:
    """Run a recipe (a file, or a shipped recipe's name) to a version; returns `name@x.y.z`.

    outputs: where parts and versions go. state: the folder of ledger and vectors. offline: send
    nothing. lanes: cut row steps into so many tasks, which divide a model's window of requests.
    max_usd, max_tokens: caps for this run. finish_partial: send nothing, and release what is
    complete.
    """
    version = run(
        recipe,
        limit=limit,
        overrides=overrides or [],
        outputs=Path(outputs),
        state=state,
        offline=offline,
        lanes=lanes,
        spread=spread,
        max_usd=max_usd,
        max_tokens=max_tokens,
        finish_partial=finish_partial,
    )
    create_markdown_artifact(
        funnel_markdown(version),
        key=f"funnel-{version.manifest.name.replace('_', '-')}",
        description=f"Funnel of {version.address}",
    )
    return version.address


def funnel_markdown(version: Version) -> str:
    """The funnel of a version as a Markdown table. Every word in it is the recipe's or ours."""
    manifest = version.manifest
    lines = [
        f"# {version.address}",
        "",
        f"{manifest.change}; digest `{manifest.digest}`",
        "",
        "| step | rows in | kept | dropped | why |",
        "|---|---:|---:|---:|---|",
    ]
    for count in manifest.funnel:
        why = ", ".join(f"{reason} {rows:,}" for reason, rows in count.reasons.items())
        lines.append(
            f"| {count.alias} | {count.rows_in:,} | {count.kept:,} | {count.dropped:,} | {why} |"
        )
    lines += ["", "| gate | verdict |", "|---|---|"]
    lines += [f"| `{path}` | {said} |" for path, said in manifest.gate.items()]
    lines += ["", f"Report: `{version.folder / 'report.html'}`"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(curate(sys.argv[1]))
