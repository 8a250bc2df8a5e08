"""A million rows through exact and MinHash duplicates and rule filters to a version.

    python tests/benchmarks/bench_million.py [--rows 1000000] [--than 250000]

Made-up prompts of some twenty words from a vocabulary of 20,000, a tenth of them copies of an
earlier one with up to two words changed. Runs the same recipe over --than rows and over --rows in
processes of their own, and prints seconds, rows/s and peak memory of each, and seconds a row of the
larger as a ratio to those of the smaller: about 1 where no step is quadratic.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = [
    {"step": "curation.exact"},
    {"step": "curation.minhash"},
    {"step": "curation.length", "over": "prompt", "min_words": 8},
    {"step": "curation.turns", "max_turns": 8},
    {"step": "curation.markup", "policy": "drop"},
    {"step": "curation.pii", "policy": "drop"},
]


def write_rows(path, rows, seed=0):
    """Prompts as JSON lines, some at a time."""
    draw = random.Random(seed)
    words = [f"{a}{b}" for a in "bcdfghklmnprstvw" for b in range(1250)]
    recent = []
    with path.open("w") as file:
        for number in range(rows):
            if recent and number % 10 == 0:
                said = list(draw.choice(recent))
                for _ in range(draw.randrange(3)):
                    said[draw.randrange(len(said))] = draw.choice(words)
            else:
                said = draw.choices(words, k=draw.randrange(6, 34))
                recent.append(said)
                if len(recent) > 5_000:
                    recent.pop(0)
            file.write(json.dumps({"prompt": " ".join(said)}) + "\n")


def one(rows, folder):
    """One run in this process; prints its figures as JSON."""
    import datakit as dk

    source = folder / "rows.jsonl"
    write_rows(source, rows)
    recipe = {
        "name": "million",
        "steps": [{"step": "sources.jsonl", "kind": "Prompt", "path": str(source)}, *STEPS],
    }
    began, cpu = time.monotonic(), time.process_time()
    version = dk.run(recipe, outputs=folder / "outputs", state=folder / "state")
    figures = {"s": time.monotonic() - began, "cpu_s": time.process_time() - cpu}
    status = Path("/proc/self/status").read_text()
    figures["peak_mb"] = int(status.split("VmHWM:")[1].split()[0]) / 1024
    kept = {count.alias: count.kept for count in version.manifest.funnel}
    print(json.dumps(figures | {"kept": kept}))


def main():
    """Both runs, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--than", type=int, default=250_000)
    parser.add_argument("--one", type=int)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.folder)
        return
    found = []
    for rows in (options.than, options.rows):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one", str(rows), "--folder", folder]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures = json.loads(out.splitlines()[-1])
        found.append(figures["cpu_s"] / rows)
        print(
            f"{rows:,} rows: {figures['s']:,.0f} s, {figures['cpu_s']:,.0f} CPU s, "
            f"{rows / figures['s']:,.0f} rows/s, peak {figures['peak_mb']:,.0f} MB; "
            + ", ".join(f"{alias} {kept:,}" for alias, kept in figures["kept"].items()),
            flush=True,
        )
    print(f"CPU seconds a row, larger / smaller: {found[1] / found[0]:.2f}")


if __name__ == "__main__":
    os.environ.setdefault("DO_NOT_TRACK", "1")
    main()
