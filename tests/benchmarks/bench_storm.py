"""A run through a storm of faults beside a calm one: the same rows, and how much longer.

    python tests/benchmarks/bench_storm.py [--rows 20000] [--in-flight 256]

The endpoint answers after a lognormal time of 0.5 s in the mean; in the storm 5 % of the attempts
get a 500, 5 % a 429, 2 % half a body, 1 % nothing at all and 1 % a cut connection. Exits with 1
where a row is lost or doubled, or the rows differ.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

from endpoint import Endpoint  # noqa: E402

import datakit as dk  # noqa: E402

STORM = {"p500": 0.05, "p429": 0.05, "pbad": 0.02, "phang": 0.01, "pcut": 0.01}


def run(folder, url, options):
    """The version of one run and the seconds it took."""
    model = {"kind": "openai", "model": "any", "base_url": url, "timeout_s": 5, "retries": 10}
    recipe = {
        "name": "storm",
        "models": {"m": model | {"max_in_flight": options.in_flight}},
        "steps": [{"step": "toys.numbers", "rows": options.rows}, {"step": "toys.answer"}],
    }
    began = time.monotonic()
    version = dk.run(recipe, outputs=folder / "outputs", state=folder / "state")
    return version.manifest, time.monotonic() - began


def main():
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=256)
    options = parser.parse_args()
    found = {}
    for name, faults in (("calm", {}), ("storm", STORM)):
        with (
            tempfile.TemporaryDirectory() as folder,
            Endpoint(latency="lognormal:0.5:0.6", **faults) as endpoint,
        ):
            manifest, took_s = run(Path(folder), endpoint.url, options)
            stats = endpoint.stats()
        found[name] = manifest, took_s, stats
        print(
            f"{name:6} {took_s:6.1f} s, {stats['requests']:,} requests, "
            f"{manifest.funnel[-1].kept:,} rows, digest {manifest.digest[:12]}, {stats['errors']}"
        )
    (calm, calm_s, _), (storm, storm_s, stats) = found.values()
    print(f"storm / calm, time: {storm_s / calm_s:.2f} (at most 1.3)")
    rows = storm.funnel[1].kept
    is_whole = rows == stats["ok"] == stats["distinct"] == options.rows
    sys.exit(0 if is_whole and calm.digest == storm.digest else 1)


if __name__ == "__main__":
    main()
