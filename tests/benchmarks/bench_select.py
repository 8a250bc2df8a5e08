"""Choosing 10,000 of 100,000 rows: our ways beside the published ones, in one run, on one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_select.py \\
        [--apricot /path/to/venv/bin/python] [--rows 100000] [--keep 10000] [--only facility deita]

Vectors: 4,000 real instructions of `instructions_mixed.parquet` (`--data`, default ../shared/data),
embedded once by the packaged all-MiniLM-L6-v2, and grown to --rows: each row is a mixture of a real
vector and one of its 20 nearest, plus noise of the real vectors' spectrum; kept in --cache. So the
figures say how the ways compare, not what they give on other data.

Peers: `facility`: exact faiss neighbours (64) and apricot-select's lazy greedy, under --apricot, an
interpreter that has apricot-select, faiss-cpu and scipy; left out without it. `k_center`, `deita`:
the published loops. `entropy`: a dense greedy, which updates every row at every step. Each in a
process of its own. FL is the mean over all rows of the best cosine to a row taken, exact; `same`
the share of rows that both took; logdet the sum of gains. Read the ratios of processor time.
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
ROOT = HERE.parents[2]
WAYS = ("facility", "deita", "k_center", "entropy")


def grown(real, rows, seed=0, level=0.7):
    """Unit vectors [rows, d] between near real ones, with noise of their spectrum."""
    rng = np.random.default_rng(seed)
    cosines = real @ real.T
    np.fill_diagonal(cosines, -2)
    near = np.argpartition(-cosines, 20, axis=1)[:, :20]
    one = rng.integers(0, len(real), rows)
    other = near[one, rng.integers(0, 20, rows)]
    share = rng.uniform(0, 0.5, (rows, 1)).astype(np.float32)
    _, size, axes = np.linalg.svd(real - real.mean(axis=0), full_matrices=False)
    noise = rng.normal(size=(rows, len(size))).astype(np.float32)
    noise = (noise * (size / np.sqrt(len(real))).astype(np.float32)) @ axes
    strength = level * rng.uniform(0, 2, (rows, 1)).astype(np.float32)
    vectors = (1 - share) * real[one] + share * real[other] + strength * noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def vectors_file(data, cache, rows):
    path = cache / f"select-{rows}.npy"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    real = cache / "select-real.npy"
    if not real.exists():
        import polars as pl

        from datakit.models.embed import open_embedder
        from datakit.models.specs import SentenceTransformersSpec

        texts = pl.read_parquet(data / "instructions_mixed.parquet")["instruction"]
        texts = texts.drop_nulls().unique(maintain_order=True)
        texts = texts.filter(texts.str.len_chars() > 0).sample(4000, seed=0).str.head(400)
        spec = SentenceTransformersSpec(kind="sentence_transformers")
        np.save(real, open_embedder(spec).encode(texts.to_list()))
    np.save(path, grown(np.load(real), rows))
    return path


def ours(way, vectors, keep, score):
    from datakit.curation import _deita, _entropy, _facility, _k_center
    from datakit.curation._room import Room

    room, none = Room.of_rows(len(vectors), keep), np.zeros(0, np.int64)
    match way:
        case "facility":
            return _facility.facility(vectors, room, none)
        case "deita":
            return _deita.score_first(vectors, score, room, none)
        case "k_center":
            return _k_center.k_center(vectors, room, np.array([score.argmax()]))
        case _:
            return _entropy.entropy(vectors, room, none, 0.1)


def published_deita(vectors, keep, score):
    """One row at a time: its cosine to all that are kept, lengths included, as its code has it."""
    kept = np.empty((keep, vectors.shape[1]), np.float32)
    rows = []
    for row in np.argsort(-score, kind="stable").tolist():
        if len(rows) == keep:
            break
        some = kept[: len(rows)]
        lengths = np.linalg.norm(some, axis=1) * np.linalg.norm(vectors[row])
        if not rows or ((some @ vectors[row]) / lengths).max() <= 0.9:
            kept[len(rows)] = vectors[row]
            rows.append(row)
    return rows, []


def published_k_center(vectors, keep, score):
    rows = [int(score.argmax())]
    far = 1 - vectors @ vectors[rows[0]]
    while len(rows) < keep:
        rows.append(int(far.argmax()))
        np.minimum(far, 1 - vectors @ vectors[rows[-1]], out=far)
    return rows, []


def dense_entropy(vectors, keep, _score, noise=0.1):
    exact = vectors.astype(np.float64)
    left = np.einsum("nd,nd->n", exact, exact)
    inverse = np.eye(exact.shape[1])
    rows, gains = [], []
    for _ in range(keep):
        best = int(left.argmax())
        variance = left[best]
        rows.append(best)
        gains.append(0.5 * np.log1p(variance / noise))
        direction = inverse @ exact[best]
        inverse -= np.outer(direction, direction) / (variance + noise)
        left -= (exact @ direction) ** 2 / (variance + noise)
        left[rows] = -1
    return rows, gains


def apricot_facility(vectors, keep, _score):
    import faiss
    import scipy.sparse as sp
    from apricot import FacilityLocationSelection

    count, width = len(vectors), 64
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    cosine, found = index.search(vectors, width)
    places = np.repeat(np.arange(count), width), found.ravel()
    graph = sp.csr_matrix((np.clip(cosine, 0, None).ravel().astype("f8"), places), (count, count))
    graph = graph.maximum(graph.T).tocsr()
    choice = FacilityLocationSelection(keep, metric="precomputed", optimizer="lazy", verbose=False)
    choice.fit(graph)
    return choice.ranking.tolist(), []


PEERS = {
    "facility": apricot_facility,
    "deita": published_deita,
    "k_center": published_k_center,
    "entropy": dense_entropy,
}


def worker(who, way, path, keep, out):
    vectors = np.load(path)
    score = np.random.default_rng(0).random(len(vectors))
    began, spent = time.perf_counter(), time.process_time()
    if who == "ours":
        taken = ours(way, vectors, keep, score)
        rows, gains = taken.rows, taken.gains
    else:
        rows, gains = PEERS[way](vectors, keep, score)
    figures = {
        "cpu_s": round(time.process_time() - spent, 2),
        "wall_s": round(time.perf_counter() - began, 2),
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "gains": float(np.sum(gains)),
    }
    np.save(out, np.asarray(rows))
    print(json.dumps(figures))


def measured(python, who, way, path, keep, folder):
    out = Path(folder) / f"{who}-{way}-{keep}.npy"
    arguments = [python, str(HERE), "--worker", who, way, str(path), str(keep), str(out)]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{who} {way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]), np.load(out)


def coverage(vectors, rows):
    blocks = range(0, len(vectors), 4096)
    return np.concatenate([(vectors[a : a + 4096] @ vectors[rows].T).max(axis=1) for a in blocks])


def compare(way, path, keep, apricot, folder):
    vectors = np.load(path)
    name = f"{way} {keep:,} of {len(vectors):,}"
    found = {"ours": measured(sys.executable, "ours", way, path, keep, folder)}
    if way != "facility" or apricot:
        python = apricot if way == "facility" else sys.executable
        found["peer"] = measured(python, "peer", way, path, keep, folder)
    for who, (figures, rows) in found.items():
        best = coverage(vectors, rows)
        line = f"{name:28} {who:5} cpu {figures['cpu_s']:8.2f} s  wall {figures['wall_s']:8.2f} s"
        line += (
            f"  rss {figures['rss_mb']:5d} MB  FL {best.mean():.4f}  radius {1 - best.min():.4f}"
        )
        print(line + (f"  logdet {figures['gains']:.2f}" if way == "entropy" else ""), flush=True)
    if len(found) == 2:
        (mine, rows), (theirs, others) = found["ours"], found["peer"]
        same = len(set(rows.tolist()) & set(others.tolist())) / keep
        line = f"{'':28} ratio cpu {mine['cpu_s'] / theirs['cpu_s']:.3f}  same {same:.4f}"
        line += f"  same order {float(np.mean(rows == others)):.4f}"
        if way == "entropy":
            line += f"  logdet ratio {mine['gains'] / theirs['gains']:.6f}"
        print(line, flush=True)


def recall(path, neighbours=32):
    from datakit.curation._facility import neighbour_graph

    vectors = np.load(path)
    index, _ = neighbour_graph(vectors, neighbours)
    asked = np.random.default_rng(1).choice(len(vectors), min(1000, len(vectors)), replace=False)
    cosines = vectors[asked] @ vectors.T
    exact = np.argpartition(-cosines, neighbours, axis=1)[:, :neighbours]
    found = [len(set(a) & set(b)) / neighbours for a, b in zip(index[asked], exact, strict=True)]
    print(f"recall of our graph, {neighbours} neighbours: {np.mean(found):.4f}", flush=True)


def main():
    if sys.argv[1:2] == ["--worker"]:
        who, way, path, keep, out = sys.argv[2:]
        worker(who, way, path, int(keep), out)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "bench-select")
    parser.add_argument("--apricot", help="python that has apricot-select, faiss-cpu and scipy")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--keep", type=int, default=10_000)
    parser.add_argument("--recall", action="store_true", help="of our graph, before all else")
    parser.add_argument("--only", nargs="*", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    path = vectors_file(options.data, options.cache, options.rows)
    if options.recall:
        recall(path)
    with tempfile.TemporaryDirectory() as folder:
        for way in options.only:
            if way != "entropy":
                compare(way, path, options.keep, options.apricot, folder)
                continue
            small = vectors_file(options.data, options.cache, options.rows // 10)
            compare(way, small, options.keep // 10, None, folder)
            for keep in (1, 2, 4, 8):
                figures, _ = measured(
                    sys.executable, "ours", way, path, options.keep * keep // 10, folder
                )
                print(f"entropy {options.keep * keep // 10:,} {figures}", flush=True)


if __name__ == "__main__":
    main()
