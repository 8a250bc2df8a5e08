"""All pairs above a cosine: ours beside faiss, in processor seconds and memory, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_neighbours.py \\
        [--vectors 100000] [--thresholds 0.95 0.9 0.8] [--k 0] [--probes 0] \\
        [--vectors-file vectors.npy] [--data ../shared/data]

The vectors (float32 [n, 384]) are read from --vectors-file, or made and kept there. Embedding
100,000 real texts takes an hour, so 6,000 distinct real instructions are embedded by the packaged
MiniLM and the rest is made of them: four fifths are mixtures √w a + √(1-w) b of two real vectors
about their mean (w uniform in 0.6..1), one fifth are planted copies of other rows: a fifth of
those byte for byte, the others with a cosine of 0.8..1 to the row. The mixtures keep the mean and
the covariance of the real vectors, and the spectrum is what decides how much a bound prunes; the
run prints both spectra and the upper quantiles of the cosines, so that one can see how near they
are.

Each figure comes from a process of its own, best of --repeat in turns: faiss `IndexFlatIP`
range_search as a user would write it (blocks of 4,096 rows, pairs i < j by numpy), and
`pairs_over`. Loading is left out of the processor seconds (children and threads count), not of the
peak memory. `lost` are pairs of faiss that ours does not have, `more` the other way; faiss rounds
differently, so pairs within 1e-5 of the threshold are not counted. --k also compares `k_nearest`,
--probes the inverted file. Machines are noisy: read the ratios.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve()
REAL = 6000


def real_vectors(data):
    """float32 [6000, 384] of distinct real instructions."""
    import polars as pl

    from datakit.models.embed import SentenceTransformers
    from datakit.models.specs import SentenceTransformersSpec

    frame = pl.read_parquet(data / "instructions_mixed.parquet")
    text = (pl.col("instruction") + " " + pl.col("input")).str.slice(0, 400).str.strip_chars()
    kept = frame.filter(pl.col("instruction").str.len_chars().is_between(20, 400)).select(text)
    texts = sorted(kept.to_series().unique().to_list())
    drawn = np.random.default_rng(0).permutation(len(texts))[:REAL]
    spec = SentenceTransformersSpec(kind="sentence_transformers", max_tokens=64)
    return SentenceTransformers(spec).encode([texts[row] for row in drawn])


def made_vectors(real, count, seed=0):
    """float32 [count, d]: mixtures of real vectors and planted copies, shuffled."""
    rng = np.random.default_rng(seed)
    copies = count // 5
    mean = real.mean(axis=0)
    about = real - mean
    one, other = rng.integers(len(real), size=(2, count - copies))
    share = rng.uniform(0.6, 1, (count - copies, 1)).astype(np.float32)
    base = mean + np.sqrt(share) * about[one] + np.sqrt(1 - share) * about[other]
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    cosine = rng.uniform(0.8, 1, (copies, 1)).astype(np.float32)
    cosine[: copies // 5] = 1
    noise = about[rng.integers(len(real), size=copies)]
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    copied = cosine * base[rng.integers(len(base), size=copies)] + np.sqrt(1 - cosine**2) * noise
    made = np.concatenate([base, copied])
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made[rng.permutation(count)]


def prepare(path, count, data):
    """Make the vectors once, and show that they look like real ones."""
    real_path = path.with_suffix(".real.npy")
    if not path.exists():
        if not real_path.exists():
            np.save(real_path, real_vectors(data))
        np.save(path, made_vectors(np.load(real_path), count))
    vectors = np.load(path)
    shown = {"vectors": vectors}
    if real_path.exists():
        shown["real"] = np.load(real_path)
    for name, rows in shown.items():
        rows = rows[:REAL]
        energy = np.linalg.svd(rows, compute_uv=False) ** 2
        energy = np.cumsum(energy) / energy.sum()
        half = len(rows) // 2
        cosines = np.quantile(rows[:half] @ rows[half:].T, [0.5, 0.99, 0.999, 0.9999])
        print(
            f"{name:8} energy in 15/31/63/127 directions "
            f"{[round(float(energy[min(m, len(energy)) - 1]), 3) for m in (15, 31, 63, 127)]}, "
            f"cosines at 50/99/99.9/99.99 % {cosines.round(3).tolist()}"
        )
    return vectors


def spent():
    """Processor seconds of this process, its threads and its children."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in both)


def peak():
    """MB at most in memory since this program began."""
    # Not ru_maxrss, which a new process takes over from the one that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024


def faiss_pairs(vectors, args):
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    keys, cosines = [], []
    for start in range(0, len(vectors), 4096):
        ends, found, others = index.range_search(vectors[start : start + 4096], args.threshold)
        counts = np.diff(ends.astype(np.int64))
        rows = np.repeat(np.arange(start, start + len(counts)), counts)
        after = others > rows
        keys.append(rows[after] * len(vectors) + others[after])
        cosines.append(found[after])
    return np.concatenate(keys), np.concatenate(cosines), 1.0


def our_pairs(vectors, args):
    from datakit.neighbours import pairs_over

    pairs = pairs_over(vectors, args.threshold)
    return pairs.first * len(vectors) + pairs.second, pairs.similarity, pairs.recall


def our_ivf(vectors, args):
    from datakit.neighbours import pairs_over
    from datakit.neighbours_ivf import IVF

    pairs = pairs_over(vectors, args.threshold, approximate=IVF(probes=args.probes))
    return pairs.first * len(vectors) + pairs.second, pairs.similarity, pairs.recall


def faiss_nearest(vectors, args):
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    cosines, others = index.search(vectors, args.k + 1)
    return others, cosines, 1.0


def our_nearest(vectors, args):
    from datakit.neighbours import k_nearest

    others, cosines = k_nearest(vectors, vectors, args.k + 1)
    return others, cosines, 1.0


CLIENTS = {
    "faiss": faiss_pairs,
    "ours": our_pairs,
    "ivf": our_ivf,
    "faiss-k": faiss_nearest,
    "ours-k": our_nearest,
}


def client(args):
    """One measurement; keys and cosines go to a file, the figures to standard output."""
    vectors = np.load(args.vectors_file)
    before, clock = spent(), time.perf_counter()
    keys, cosines, recall = CLIENTS[args.client](vectors, args)
    figures = {
        "cpu": spent() - before,
        "wall": time.perf_counter() - clock,
        "rss": peak(),
        "recall": recall,
    }
    np.savez(args.out, keys=keys, cosines=cosines)
    print(json.dumps(figures))


def measured(args, names, threshold):
    """The best figures of each client, and what it found."""
    best, found = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):
            for name in names:
                out = Path(folder) / f"{name}.npz"
                command = [
                    sys.executable, str(HERE), "--client", name, "--threshold", str(threshold),
                    "--vectors-file", str(args.vectors_file), "--out", str(out),
                    "--k", str(args.k), "--probes", str(args.probes),
                ]  # fmt: skip
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                figures = json.loads(said.splitlines()[-1])
                if name not in best or figures["cpu"] < best[name]["cpu"]:
                    best[name] = figures
                with np.load(out) as file:
                    found[name] = (file["keys"], file["cosines"])
    return best, found


def show(name, figures, peer, text):
    print(
        f"  {name:8} {figures['cpu']:7.1f} CPU s  {figures['wall']:7.1f} s  "
        f"{figures['rss']:6.0f} MB  {figures['cpu'] / peer:6.3f} of faiss  {text}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.95, 0.9, 0.8])
    parser.add_argument("--k", type=int, default=0)
    parser.add_argument("--probes", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--vectors-file", type=Path)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "../shared/data")
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--threshold", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.vectors_file = args.vectors_file or Path(f"vectors-{args.vectors}.npy")
    if args.client:
        client(args)
        return
    vectors = prepare(args.vectors_file, args.vectors, args.data)
    print(
        f"{vectors.shape[0]} x {vectors.shape[1]} vectors ({vectors.nbytes / 2**20:.0f} MB), "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, best of {args.repeat}"
    )
    for threshold in args.thresholds:
        names = ["faiss", "ours"] + ["ivf"] * (args.probes > 0)
        best, found = measured(args, names, threshold)
        keys, cosines = found["faiss"]
        clear = keys[cosines >= threshold + 1e-5]
        print(f"cosine >= {threshold}: {len(keys)} pairs by faiss")
        for name in names:
            got, similarity = found[name]
            lost = len(np.setdiff1d(clear, got))
            more = len(np.setdiff1d(got[similarity >= threshold + 1e-5], keys))
            text = f"recall {1 - lost / max(len(clear), 1):.6f}  lost {lost}  more {more}"
            if name == "ivf":
                text += f"  (measured by itself {best[name]['recall']:.4f})"
            show(name, best[name], best["faiss"]["cpu"], text)
    if args.k:
        best, found = measured(args, ["faiss-k", "ours-k"], 0)
        off = np.abs(found["faiss-k"][1] - found["ours-k"][1]).max()
        print(f"{args.k} nearest and itself; cosines differ by at most {off:.1e}")
        for name in best:
            show(name, best[name], best["faiss-k"]["cpu"], "")


if __name__ == "__main__":
    main()
