"""Deduplication beside rensa on real texts with planted copies, and on a million rows.

    python tests/benchmarks/bench_dedup.py [--data ../shared/data] [--rensa-python PATH]
    python tests/benchmarks/bench_dedup.py --rows 1000000

The first makes a corpus of 100,000 public texts of which no two share many 4-grams (found by
counting, with no method that is measured here), and 20,000 planted copies, 4,000 of each kind:
exact, 5, 10 and 20 % of the words edited, sentences shuffled. rensa (its deduplicator, with word
n-grams made in Python as its users make them) and our steps then run in turns, each in a process
of its own. CPU s leave out imports and reading the texts, nothing else: ours has `prepare` by part,
`apply`, and all that it says of each dropped row. Recall: planted pairs of which a side was
removed. Precision: those pairs as a share of the removed rows. Machines are noisy: of `--repeat`
runs the least CPU s count. Read the ratios.

The second makes as many rows of random words, a tenth of them copies with a word changed and a
twentieth one family of a template, and runs `prepare` by parts of 20,000 rows on disk and `apply`
over all of them, as the engine does; also with a quarter of the rows, to show how time grows.

rensa is taken from here where it can be imported, or from `--rensa-python`, a Python that has it;
where it is neither, only ours runs.
"""

import argparse
import importlib.util
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
KINDS = {"exact": 0.0, "edit05": 0.05, "edit10": 0.1, "edit20": 0.2, "shuffle": 0.0}
PLANTED = 4_000
BASE = 100_000
COLUMNS = {
    "instructions_mixed": ("instruction", "response"),
    "hh_rlhf_pairs": ("first_user_turn", "chosen", "rejected"),
    "instructions_dolly3k_ccbysa": ("instruction", "input", "response"),
    "llmbar_judgments": ("completion",),
    "justeval_responses": ("response",),
    "oasst_multimodel_responses": ("response",),
    "mmlupro_verifiable_pairs": ("prompt", "chosen", "rejected"),
    "benchmark_prompts": ("text", "reference"),
    "gsm8k_model_solutions": ("solution",),
    "selfinstruct252_responses": ("response",),
    "vicuna80_judgments": ("review",),
    "vicuna80_responses": ("response",),
    "lm_generated_statements": ("statement",),
    "rmbench_chat_safety": ("response",),
    "tulu1_human_annotations": ("completion_a", "completion_b"),
}
OURS = {
    "exact": ("exact", {}),
    "minhash 1-gram 0.7": (
        "minhash",
        {"ngram": 1, "threshold": 0.7, "permutations": 126, "bands": 18},
    ),
    "minhash 3-gram 0.5": ("minhash", {"ngram": 3, "threshold": 0.5}),
    "minhash as it comes": ("minhash", {}),
}
RENSA = {"rensa 1-gram 0.7": (1, 0.7, 128, 16), "rensa 3-gram 0.5": (3, 0.5, 128, 32)}
BESIDE = {
    "minhash 1-gram 0.7": "rensa 1-gram 0.7",
    "minhash 3-gram 0.5": "rensa 3-gram 0.5",
    "minhash as it comes": "rensa 1-gram 0.7",
}


def cpu_s():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mb():
    """Peak memory of this process; `ru_maxrss` would count that of whoever started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024


# -- the corpus ----------------------------------------------------------------------------------


def corpus(data, folder):
    """Base texts and planted copies as JSON lines of (text, kind, row of the original or -1)."""
    import polars as pl

    columns = [
        pl.read_parquet(data / f"{file}.parquet", columns=[name])[name].rename("text")
        for file, names in COLUMNS.items()
        for name in names
    ]
    texts = pl.concat(columns).drop_nulls().unique(maintain_order=True)
    pieces = []
    for words in texts.str.extract_all(r"\S+").to_list():
        runs = (words[start : start + 80] for start in range(0, len(words), 80))
        pieces += [" ".join(run) for run in runs if len(run) >= 8]
    table = pl.DataFrame({"text": pieces}).unique(maintain_order=True)
    table = table.sample(fraction=1, shuffle=True, seed=1).with_row_index("row")
    words = table.select("row", word=pl.col("text").str.to_lowercase().str.extract_all(r"\w+"))
    words = words.explode("word")
    four = [pl.col("word").shift(-step).over("row") for step in range(4)]
    seen = words.select("row", seen=~pl.concat_str(four, separator=" ").is_first_distinct())
    shares = seen.group_by("row").agg(share=pl.col("seen").mean())
    base = table.join(shares, on="row", maintain_order="left").filter(pl.col("share") < 0.3)
    base = base["text"].to_list()[:BASE]

    rng = random.Random(7)
    vocabulary = [word for text in base[:5000] for word in text.split()]
    picked = rng.sample(range(len(base)), PLANTED * len(KINDS))
    lines = [(text, "base", -1) for text in base]
    for number, (kind, share) in enumerate(KINDS.items()):
        for row in picked[number * PLANTED : (number + 1) * PLANTED]:
            lines.append((_copy(base[row], kind, share, vocabulary, rng), kind, row))
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    average = sum(len(text.split()) for text in base) / len(base)
    print(f"{len(base):,} texts of {average:.0f} words on average, {len(picked):,} copies planted")
    return path


def _copy(text, kind, share, vocabulary, rng):
    if kind == "exact":
        return text
    words = text.split()
    if kind == "shuffle":
        sentences = re.split(r"(?<=[.!?])\s+", text)
        if len(sentences) < 2:
            half = len(words) // 2
            return " ".join(words[half:] + words[:half])
        rng.shuffle(sentences)
        return " ".join(sentences)
    edits = max(1, round(share * len(words)))
    for place in sorted(rng.sample(range(len(words)), min(edits, len(words))), reverse=True):
        change = rng.randrange(3)
        if change == 0:
            words[place] = rng.choice(vocabulary)
        elif change == 1:
            del words[place]
        else:
            words.insert(place, rng.choice(vocabulary))
    return " ".join(words)


def read(path):
    with path.open() as file:
        texts, kinds, originals = zip(*map(json.loads, file), strict=True)
    return list(texts), kinds, originals


def score(path, removed):
    """Precision, recall, and recall by kind of a set of removed rows."""
    _, kinds, originals = read(path)
    pairs = [(row, one, kinds[row]) for row, one in enumerate(originals) if one >= 0]
    caught = dict.fromkeys(KINDS, 0)
    for row, one, kind in pairs:
        caught[kind] += row in removed or one in removed
    total = sum(caught.values())
    by_kind = {kind: round(count / PLANTED, 4) for kind, count in caught.items()}
    return {
        "removed": len(removed),
        "precision": round(total / max(1, len(removed)), 4),
        "recall": round(total / len(pairs), 4),
        **by_kind,
    }


# -- what runs in processes of their own ---------------------------------------------------------


def run_rensa(path, name):
    from rensa import RMinHash, RMinHashDeduplicator

    ngram, threshold, permutations, bands = RENSA[name]
    texts, _, _ = read(path)
    started, wall = cpu_s(), time.time()
    sets = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        grams = range(max(1, len(words) - ngram + 1))
        sets.append(list({" ".join(words[at : at + ngram]) for at in grams}))
    shingled = cpu_s() - started
    found = RMinHashDeduplicator(
        threshold=threshold, num_perm=permutations, use_lsh=True, num_bands=bands
    )
    made = RMinHash.from_token_sets(sets, permutations, 42)
    kept = found.add_pairs([(str(row), one) for row, one in enumerate(made)])
    figures = {"cpu_s": round(cpu_s() - started, 2), "wall_s": round(time.time() - wall, 2)}
    removed = {row for row, stays in enumerate(kept) if not stays}
    figures |= {"shingling_s": round(shingled, 2), "peak_mb": peak_mb()}
    return figures | score(path, removed)


def _step(name):
    from datakit.curation.exact import Exact
    from datakit.curation.minhash import Minhash

    kind, fields = OURS[name]
    return {"exact": Exact, "minhash": Minhash}[kind](**fields)


def _frame(texts, first):
    import polars as pl

    ids = pl.Series([f"{row:024x}" for row in range(first, first + len(texts))])
    turns = pl.struct(role=pl.lit("user"), content="text")
    return pl.DataFrame({"id": ids, "text": texts}).select(
        "id", messages=turns.implode().over(pl.int_range(pl.len()))
    )


def run_ours(path, name):
    import polars as pl

    step = _step(name)
    texts, _, _ = read(path)
    parts = [_frame(texts[at : at + 20_000], at) for at in range(0, len(texts), 20_000)]
    del texts
    started, wall = cpu_s(), time.time()
    prepared = [step.prepare(part, None).drop("id").lazy() for part in parts]
    done = cpu_s() - started
    table = pl.concat([pl.concat(parts).lazy(), pl.concat(prepared)], how="horizontal")
    split = step.apply(table, None)
    figures = {"cpu_s": round(cpu_s() - started, 2), "wall_s": round(time.time() - wall, 2)}
    removed = {int(one, 16) for one in split.dropped["id"]}
    figures |= {"shingling_s": round(done, 2), "peak_mb": peak_mb()}
    return figures | score(path, removed)


def run_many(path, name):
    """Parts of synthetic rows on disk: prepared one by one, decided together."""
    import polars as pl

    step = _step(name)
    files = sorted(path.glob("rows-*.parquet"))
    started, wall = cpu_s(), time.time()
    for number, file in enumerate(files):
        made = step.prepare(pl.read_parquet(file), None)
        made.drop("id").write_parquet(path / f"{name}-{number:05}.parquet")
    prepared = time.time() - wall
    extra = pl.scan_parquet(sorted(path.glob(f"{name}-*.parquet")))
    split = step.apply(pl.concat([pl.scan_parquet(files), extra], how="horizontal"), None)
    return {
        "kept": split.kept.height,
        "dropped": split.dropped.height,
        "cpu_s": round(cpu_s() - started, 1),
        "prepare_wall_s": round(prepared, 1),
        "apply_wall_s": round(time.time() - wall - prepared, 1),
        "peak_mb": peak_mb(),
    }


def make_many(rows, folder):
    """Synthetic rows in parts of 20,000."""
    import numpy as np

    folder.mkdir()
    rng = np.random.default_rng(3)
    vocabulary = np.array([f"w{number}" for number in range(50_000)])
    template = "write a short story about a {} who meets a {} near the old mill by the river"
    for number, first in enumerate(range(0, rows, 20_000)):
        count = min(20_000, rows - first)
        lengths = rng.integers(15, 45, count)
        # Frequent and rare words, as in a language.
        ranks = (len(vocabulary) * rng.random(int(lengths.sum())) ** 3).astype(np.int64)
        words = np.split(vocabulary[ranks], np.cumsum(lengths)[:-1])
        texts = [" ".join(one) for one in words]
        for row in range(0, count - 1, 10):
            copy = texts[row + 1].split()
            copy[int(rng.integers(len(copy)))] = "changed"
            texts[row] = " ".join(copy)
        for row in range(5, count, 20):
            texts[row] = template.format(*rng.choice(vocabulary, 2))
        _frame(texts, first).write_parquet(folder / f"rows-{number:05}.parquet")


RUNS = {"rensa": run_rensa, "ours": run_ours, "many": run_many}


def child(python, kind, path, name):
    """The figures of one run in a process of its own."""
    command = [python, str(HERE), "--run", kind, str(path), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(options, folder):
    path = corpus(options.data, folder)
    jobs = [("ours", name, sys.executable) for name in OURS]
    rensa = options.rensa_python
    if rensa is None and importlib.util.find_spec("rensa"):
        rensa = sys.executable
    if rensa is None:
        print("rensa: left out; name a Python that has it with --rensa-python")
    else:
        jobs += [("rensa", name, rensa) for name in RENSA]
    best = {}
    for _ in range(options.repeat):
        for kind, name, python in jobs:
            found = child(python, kind, path, name)
            if name not in best or found["cpu_s"] < best[name]["cpu_s"]:
                best[name] = found
    names = ["removed", "precision", "recall", *KINDS, "cpu_s", "shingling_s", "wall_s", "peak_mb"]
    print(f"{'':22}" + "".join(f"{name:>12}" for name in names))
    for name, found in best.items():
        print(f"{name:22}" + "".join(f"{found[one]:>12}" for one in names))
    for ours, theirs in BESIDE.items():
        if theirs in best:
            ratio = best[ours]["cpu_s"] / best[theirs]["cpu_s"]
            gains = [best[ours][one] - best[theirs][one] for one in ("precision", "recall")]
            print(
                f"{ours} / {theirs}: CPU x{ratio:.2f}, precision {gains[0]:+.4f}, "
                f"recall {gains[1]:+.4f}"
            )


def grow(options, folder):
    for rows in (options.rows // 4, options.rows):
        path = folder / str(rows)
        make_many(rows, path)
        for name in ("exact", "minhash as it comes"):
            print(f"{rows:,} rows, {name}: {child(sys.executable, 'many', path, name)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "../shared/data")
    parser.add_argument("--rensa-python")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        kind, path, name = options.run
        print(json.dumps(RUNS[kind](Path(path), name)))
        return
    with tempfile.TemporaryDirectory() as folder:
        (grow if options.rows else compare)(options, Path(folder))


if __name__ == "__main__":
    main()
