"""How many known contaminations `curation.decontaminate` finds, and how many clean rows it takes.

    OMP_NUM_THREADS=2 python tests/benchmarks/bench_decontaminate.py [--data ../shared/data]
        [--state FOLDER] [--speed-only]

Contaminated: items of GSM8K test and HumanEval rephrased by a model (2311.04850), the items as
they are, and items between six other instructions of one long row. Clean: instructions of public
sets, among them GSM8K's own training set and coding tasks, which are as near the benchmarks as
clean rows can be. Recall, precision and the share of clean rows that is taken come from the same
run, with all-MiniLM-L6-v2; `--state` keeps the vectors (about 9,000 texts). The last lines are the
time of n-gram matching over 100,000 rows, and of the same by sets of tuples in plain Python over a
part of them.
"""

import argparse
import itertools
import re
import tempfile
import time
from pathlib import Path

import polars as pl

from datakit.curation._overlap import Index
from datakit.curation.decontaminate import Decontaminate
from datakit.models.specs import SentenceTransformersSpec
from datakit.records import Message, Prompt
from datakit.session import Session, Settings, Watch
from datakit.tables import to_frame

CLEAN = {
    "gsm8k-train": 700,
    "gpteacher-codegen": 400,
    "hh-rlhf-first-turn": 300,
    "oasst-1k-prompts": 300,
    "gpteacher-roleplay": 150,
    "self-instruct-user252": 252,
    "self-instruct-seed": 175,
}
THRESHOLDS = (0.7, 0.75, 0.8, 0.82, 0.84, 0.85, 0.86, 0.88, 0.9, 0.95)


def rows_of(data):
    """`source`, `text` and `hit` (whether the row is contaminated)."""
    known = pl.read_parquet(data / "contamination_rephrased.parquet")
    frames = [
        known.select(pl.format("rephrased {}", "benchmark").alias("source"), text="rephrased")
    ]
    items = pl.read_parquet(data / "benchmark_prompts.parquet")
    frames.append(items.select(source=pl.lit("copies of items"), text="text"))
    mixed = pl.read_parquet(data / "instructions_mixed.parquet").with_columns(
        text=pl.when(pl.col("input") != "")
        .then(pl.format("{}\n\n{}", "instruction", "input"))
        .otherwise("instruction")
    )
    long = items.filter(pl.col("text").str.split(" ").list.len() >= 13)
    long = long.sample(300, seed=0, shuffle=True)["text"]
    around = mixed.filter(pl.col("source") == "gpteacher-roleplay")["text"].to_list()
    inside = [
        "\n\n".join([*around[6 * i : 6 * i + 3], text, *around[6 * i + 3 : 6 * i + 6]])
        for i, text in enumerate(long)
    ]
    frames.append(pl.DataFrame({"source": "items inside long rows", "text": inside}))
    known_rows = sum(frame.height for frame in frames)
    for source, rows in CLEAN.items():
        frames.append(drawn(mixed.filter(pl.col("source") == source), rows))
    dolly = pl.read_parquet(data / "instructions_dolly3k_ccbysa.parquet")
    frames.append(drawn(dolly.select(source=pl.lit("dolly"), text="instruction"), 300))
    science = pl.read_parquet(data / "mmlupro_verifiable_pairs.parquet")
    science = science.unique("prompt_id", keep="first", maintain_order=True)
    frames.append(drawn(science.select(source=pl.lit("mmlu-pro"), text="prompt"), 300))
    return pl.concat(frames).with_row_index("row").with_columns(hit=pl.col("row") < known_rows)


def drawn(frame, rows):
    some = frame.sample(min(rows, frame.height), seed=0, shuffle=True)
    return some.select(pl.col("source").cast(pl.String()), "text")


def compared(rows, data, state):
    """The rows with what `prepare` finds."""
    step = Decontaminate(benchmarks=(str((data / "benchmark_prompts.parquet").resolve()),))
    prompts = [
        Prompt(messages=(Message(role="user", content=text),)).identified(str(place))
        for place, text in enumerate(rows["text"])
    ]
    spec = SentenceTransformersSpec(kind="sentence_transformers")
    settings = Settings(outputs=state, state=state, base=Path(), models={"embedder": spec})
    with Session(settings, [step], Watch()) as session:
        found = step.prepare(to_frame(Prompt, prompts), session.kit("decontaminate"))
    return pl.concat([rows, found], how="horizontal"), step


def table(rows, step):
    """One line for each method and threshold: recall, precision, and what is taken by source."""
    sources = rows["source"].unique(maintain_order=True).to_list()
    ngram = (pl.col("overlap") >= step.overlap).fill_null(value=False)
    any_ngram = (pl.col("overlap") > 0).fill_null(value=False)
    methods = {"any n-gram": any_ngram, f"n-grams >= {step.overlap:.0%}": ngram}
    for threshold in THRESHOLDS:
        methods[f"cosine >= {threshold:.2f}"] = pl.col("cosine") >= threshold
    best = pl.col("cosine") >= step.threshold
    methods[f"both at {step.threshold:.2f}"] = ngram | best
    review = step.review_threshold
    methods[f"review {review:.2f}..{step.threshold:.2f}"] = ~(ngram | best) & (
        any_ngram | (pl.col("cosine") >= review)
    )
    print("share of rows that are taken; precision over rephrased items and clean rows\n")
    for number, source in enumerate(sources):
        count = rows.filter(pl.col("source") == source).height
        print(f"  [{number}] {source} ({count:,} rows)")
    print(
        f"\n{'':20s} {'precision':>9s} {'clean':>6s} "
        + " ".join(f"[{number}]".rjust(6) for number in range(len(sources)))
    )
    for name, taken in methods.items():
        said = rows.with_columns(taken=taken)
        shares = [said.filter(pl.col("source") == source)["taken"].mean() for source in sources]
        clean = said.filter(~pl.col("hit"))["taken"]
        right = said.filter(pl.col("hit") & (pl.col("source").str.starts_with("rephrased")))[
            "taken"
        ]
        total = right.sum() + clean.sum()
        precision = f"{right.sum() / total:9.3f}" if total else f"{'':>9s}"
        print(
            f"{name:20s} {precision} {clean.mean():6.3f} "
            + " ".join(f"{share:6.3f}" for share in shares)
        )


def speed(data, n=13):
    """Rows of n-gram matching a second, ours and by sets of tuples."""
    items = pl.read_parquet(data / "benchmark_prompts.parquet")["text"].to_list()
    mixed = pl.read_parquet(data / "instructions_mixed.parquet")
    columns = ("instruction", "input", "response")
    texts = mixed.select(pl.concat_str(columns, separator="\n", ignore_nulls=True)).to_series()
    texts = texts.to_list()
    texts = list(itertools.islice(itertools.cycle(texts), 100_000))
    start = time.perf_counter()
    index = Index(items, n, 8)
    built = time.perf_counter() - start
    start = time.perf_counter()
    found = index.match(texts).height
    ours = time.perf_counter() - start
    start = time.perf_counter()
    grams = {gram for item in items for gram in tuples(item, n)}
    some = texts[:5_000]
    slow = sum(not grams.isdisjoint(tuples(text, n)) for text in some)
    theirs = time.perf_counter() - start
    rate, other = len(texts) / ours, len(some) / theirs
    print(f"\nn-grams of {len(items):,} items indexed in {built:.2f} s")
    print(f"{len(texts):,} rows matched in {ours:.2f} s: {rate:,.0f} rows/s, {found} hits")
    print(f"sets of tuples: {other:,.0f} rows/s ({slow} hits); ours is {rate / other:.1f} times it")


def tuples(text, n):
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--state", type=Path)
    parser.add_argument("--speed-only", action="store_true")
    given = parser.parse_args()
    if not given.speed_only:
        with tempfile.TemporaryDirectory() as folder:
            rows, step = compared(rows_of(given.data), given.data, given.state or Path(folder))
        table(rows, step)
    speed(given.data)


if __name__ == "__main__":
    main()
