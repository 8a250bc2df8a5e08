"""Rows per second and memory of the rule filters, beside a plain loop of `re` over the same texts.

    python tests/benchmarks/bench_filters.py [--rows 100000] [--filters pii-flag pii-loop]

Human pairs, repeated up to `--rows` and told apart by a number, as one record table in parts of
`--part` rows. Each filter runs in a process of its own, over all parts; `rows/s` leaves out reading
and imports, `peak MB` is the whole process. `hit rows` are those that are dropped or hold a find.
The bound for the PII scan is what one would write in an afternoon: every pattern of ours over every
text by `re`, row by row, without the quick look, on the first `--bound` rows of the same table.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

NAMES = (
    "length",
    "turns",
    "markup",
    "refusal",
    "repetition",
    "language",
    "toxicity",
    "threshold",
    "pii-flag",
    "pii-mask",
    "pii-loop",
)


def table(data, rows):
    """Pairs as a record table; every text carries the number of its copy, so none is cached."""
    from datakit.records import Pair

    pairs = pl.read_parquet(data / "hh_rlhf_pairs.parquet")
    pairs = pairs.filter(pl.col("chosen") != pl.col("rejected"))
    copies = -(-rows // pairs.height)
    numbered = pl.concat([pairs.with_columns(copy=pl.lit(str(copy))) for copy in range(copies)])
    numbered = numbered.head(rows)

    def turn(role, name):
        text = pl.format("{} ({})", pl.col(name), pl.col("copy"))
        return pl.concat_list(pl.struct(role=pl.lit(role), content=text)).alias(name)

    made = numbered.select(
        turn("user", "prompt"),
        turn("assistant", "chosen"),
        turn("assistant", "rejected"),
        id=pl.format("{}-{}", pl.col("pair_id"), pl.col("copy")),
    )
    empty = pl.DataFrame(schema=Pair.table_schema())
    filled = pl.concat([empty, made], how="diagonal")
    defaults = [
        pl.col(name).fill_null("")
        if kind == pl.String
        else pl.col(name).fill_null([])
        if isinstance(kind, pl.List)
        else pl.col(name)
        for name, kind in Pair.table_schema().items()
    ]
    return filled.select(defaults)


def step_of(name, folder):
    """The filter of that name with every bound set."""
    from datakit.curation.language import Language
    from datakit.curation.length import Length
    from datakit.curation.markup import Markup
    from datakit.curation.pii import Pii
    from datakit.curation.refusal import Refusal
    from datakit.curation.repetition import Repetition
    from datakit.curation.threshold import Threshold
    from datakit.curation.toxicity import Toxicity
    from datakit.curation.turns import Turns

    words = folder / "words.txt"
    words.write_text("\n".join(f"word{number}" for number in range(400)) + "\nidiot\n")
    return {
        "length": Length(min_words=1, max_words=1_000, max_ratio=50),
        "turns": Turns(min_turns=1, order="alternating", empty="drop"),
        "markup": Markup(policy="drop", over="response"),
        "refusal": Refusal(drop="one_sided"),
        "repetition": Repetition(max_repeated_share=0.5, max_top_share=0.5),
        "language": Language(allow=("en",)),
        "toxicity": Toxicity(wordlist=str(words), max_listed=0),
        "threshold": Threshold(measure="a.b", min=0, missing="keep"),
        "pii-flag": Pii(policy="flag"),
        "pii-mask": Pii(policy="mask"),
    }[name]


class _Files:
    """All that these filters use of a kit."""

    def path(self, name):
        return Path(name)


def one(name, path, part, bound):
    """One filter over all parts: rows, seconds, rows dropped or found."""
    frames = list(pl.read_parquet(path).iter_slices(part))
    if name == "pii-loop":
        return loop(pl.concat(frames).head(bound))
    with tempfile.TemporaryDirectory() as folder:
        step = step_of(name, Path(folder))
        warm = frames[0].head(10)
        step.apply(warm, _Files())
        started = time.perf_counter()
        lost = 0
        for frame in frames:
            split = step.apply(frame, _Files())
            lost += split.dropped.height
            if name.startswith("pii"):
                lost += int((split.kept["measure.entities"] > 0).sum())
        return sum(frame.height for frame in frames), time.perf_counter() - started, lost


def loop(frame):
    """The bound: the same patterns over every text of every row, in plain Python."""
    from datakit.findings_pii import entities

    texts = [
        [turn["content"] for name in ("prompt", "chosen", "rejected") for turn in row[name]]
        for row in frame.select("prompt", "chosen", "rejected").iter_rows(named=True)
    ]
    started = time.perf_counter()
    found = sum(any(list(map(entities, row))) for row in texts)
    return frame.height, time.perf_counter() - started, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--part", type=int, default=10_000)
    parser.add_argument("--bound", type=int, default=10_000)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--filters", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--one", choices=NAMES, help="for its own child processes")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.one:
        rows, seconds, lost = one(options.one, options.table, options.part, options.bound)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(rows, seconds, lost, peak)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        made = table(options.data, options.rows)
        made.write_parquet(path)
        size = made.estimated_size("mb")
        del made
        print(f"{options.rows:,} pairs, {size:,.0f} MB in memory")
        print(f"{'filter':<12}{'s':>8}{'rows/s':>12}{'hit rows':>10}{'peak MB':>9}")
        speed = {}
        for name in options.filters:
            command = [sys.executable, __file__, "--one", name, "--table", str(path)]
            command += ["--part", str(options.part), "--bound", str(options.bound)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows, seconds, lost, peak = map(float, done.stdout.split())
            speed[name] = rows / seconds
            line = f"{name:<12}{seconds:>8.2f}{speed[name]:>12,.0f}{lost:>10,.0f}{peak:>9,.0f}"
            print(line, flush=True)
        if {"pii-flag", "pii-loop"} <= set(speed):
            ratio = speed["pii-flag"] / speed["pii-loop"]
            print(f"PII scan against the plain loop: {ratio:.1f} times as fast")


if __name__ == "__main__":
    main()
