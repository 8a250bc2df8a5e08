"""What a GPU gains: each part beside the same work on the CPU, in one run.

    python tests/benchmarks/bench_gpu.py --texts 100000 [--data ../shared/data]
    python tests/benchmarks/bench_gpu.py --vectors 100000 [--threshold 0.9] [--repeat 3] \\
        [--vectors-file vectors.npy] [--data ../shared/data]

--vectors N: all pairs of N vectors above a cosine, `pairs_over` with device cuda (half-precision
candidates, exact float32 sums on the CPU) beside device cpu; the vectors are those of
bench_neighbours.py. Both must give the same pairs and the same bits. The first run on the GPU also
starts CUDA and is shown apart.
--texts N: embeddings per second of all-MiniLM-L6-v2 on every GPU, beside sentence-transformers' own
`encode` on the first one with the same texts: as it comes (batches of 32, float32) and tuned
(batches of 1,024, float16). Loading is left out; `cached` is ours with each vector written to the
cache. Without a GPU either part says so and stops.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_embed import packaged, real_texts
from bench_neighbours import prepare

from datakit.neighbours import pairs_over
from datakit.neighbours_gpu import accelerator, candidates


def timed(work):
    """Seconds and the result."""
    clock = time.perf_counter()
    result = work()
    return time.perf_counter() - clock, result


def vectors_part(args):
    """All pairs above the threshold on both; seconds, the share of candidates, and peak memory."""
    import torch

    path = args.vectors_file or Path(f"vectors-{args.vectors}.npy")
    vectors = prepare(path, args.vectors, args.data)
    runs = [
        timed(lambda: pairs_over(vectors, args.threshold, device="cuda"))
        for _ in range(1 + args.repeat)
    ]
    first = runs[0][0]
    gpu, found = min(runs[1:], key=lambda run: run[0])
    proposing, count = timed(
        lambda: sum(len(rows) for rows, _ in candidates(vectors, None, args.threshold, "cuda"))
    )
    cpu, expected = timed(lambda: pairs_over(vectors, args.threshold))
    same = (
        np.array_equal(found.first, expected.first)
        and np.array_equal(found.second, expected.second)
        and found.similarity.tobytes() == expected.similarity.tobytes()
    )
    print(
        f"{len(vectors)} vectors, cosine >= {args.threshold}: {len(found.first)} pairs, "
        f"{count} candidates\n"
        f"  gpu {gpu:.2f} s (candidates alone {proposing:.2f} s, first run {first:.2f} s, "
        f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MB)\n"
        f"  cpu {cpu:.2f} s, {cpu / gpu:.1f} times the gpu; the same bits: {same}"
    )


def numbered_texts(data, count):
    """Real instructions, each distinct: where they run out, numbered copies."""
    texts = real_texts(data, min(count, 20_000))
    return [
        text if number < len(texts) else f"{number} {text}"
        for number, text in zip(range(count), itertools.cycle(texts), strict=False)
    ]


def embedding(args):
    """Texts per second of each way, its part of the plain peer's, and the least cosine to it."""
    import torch

    from datakit.models.embed import CachedEmbedder, open_embedder
    from datakit.models.specs import SentenceTransformersSpec

    texts = numbered_texts(args.data, args.texts)
    plain, tuned = packaged().to("cuda:0"), packaged().to("cuda:0").half()
    spec = SentenceTransformersSpec(kind="sentence_transformers")
    ours, exact = open_embedder(spec), spec.model_copy(update={"precision": "float32"})
    exact = open_embedder(exact)
    options = {"normalize_embeddings": True, "show_progress_bar": False}
    ways = {
        "encode": lambda some: plain.encode(some, **options),
        "encode, 1,024, float16": lambda some: tuned.encode(some, batch_size=1_024, **options),
        "ours, float32": exact.encode,
        "ours": ours.encode,
    }
    print(f"{len(texts)} texts, {torch.cuda.device_count()} GPUs ({torch.cuda.get_device_name()})")
    expected, peer = None, 0.0

    def show(name, seconds, vectors):
        cosine = (np.asarray(vectors, np.float32) * expected).sum(axis=1).min()
        print(
            f"  {name:24} {len(texts) / seconds:10,.0f} texts/s ({peer / seconds:.2f} x), "
            f"cosine least {cosine:.6f}",
            flush=True,
        )

    for name, way in ways.items():
        way(texts[:2_000])
        runs = [timed(lambda way=way: way(texts)) for _ in range(args.repeat)]
        seconds, vectors = min(runs, key=lambda run: run[0])
        if expected is None:
            expected, peer = np.asarray(vectors, np.float32), seconds
        show(name, seconds, vectors)
    with tempfile.TemporaryDirectory() as folder:
        cache = CachedEmbedder(ours, Path(folder))
        show("ours, cached", *timed(lambda: cache.encode(texts)))
        show("ours, from the cache", *timed(lambda: cache.encode(texts)))
        cache.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=0)
    parser.add_argument("--texts", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vectors-file", type=Path)
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parents[2] / "../shared/data"
    )
    args = parser.parse_args()
    if not accelerator("auto"):
        print("torch sees no GPU here: nothing to measure")
        return
    if args.texts:
        embedding(args)
    if args.vectors:
        vectors_part(args)


if __name__ == "__main__":
    main()
