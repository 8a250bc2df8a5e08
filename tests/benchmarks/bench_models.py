"""Calls per second, processor time and memory of our engine beside bare clients, in one run.

    python tests/benchmarks/bench_models.py [--calls 5000] [--in-flight 256] [--latency fixed:0]
    python tests/benchmarks/bench_models.py --calls 30000 --in-flight 1024 \\
        --latency lognormal:0.5:0.6

The same endpoint, the same prompts, three clients, each in a process of its own: bare aiohttp with
a retry loop (the bound), the openai package on its aiohttp transport (the peer), and a recipe of
ours with everything on: durable ledger, retries, limits, parsing, rows written, version released.
`calls/s` leaves out start and end (what the endpoint saw from its first to its last request), the
processor time leaves out nothing; `grew MB` is the peak above the process after its imports.
Machines are noisy: each client runs `--repeat` times, in turns, and its best figure counts. Read
the ratios.
"""

import argparse
import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve()
CLIENTS = ("aiohttp", "openai", "ours")


def prompts(calls):
    """As many different prompts of some forty words."""
    task = "Explain it briefly, give one worked example, name a common mistake, end on a question"
    return [
        f"Topic {number} for a reader of age {number % 60 + 8}. {task}." for number in range(calls)
    ]


async def _bare(url, calls, in_flight, out):
    import aiohttp

    waiting = iter(prompts(calls))
    with out.open("w") as file:
        connector = aiohttp.TCPConnector(limit=in_flight)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def worker():
                for prompt in waiting:
                    turns = [{"role": "user", "content": prompt}]
                    body = {"model": "any", "messages": turns, "max_tokens": 128}
                    for pause_s in (0.1, 0.2, 0.4, 0.8):
                        async with session.post(f"{url}/chat/completions", json=body) as answer:
                            if answer.status == 200:
                                reply = json.loads(await answer.read())
                                text = reply["choices"][0]["message"]["content"]
                                file.write(json.dumps({"prompt": prompt, "text": text}) + "\n")
                                break
                        await asyncio.sleep(pause_s)

            await asyncio.gather(*(worker() for _ in range(in_flight)))


async def _openai(url, calls, in_flight, out):
    import openai

    waiting = iter(prompts(calls))
    http = openai.DefaultAioHttpClient()
    with out.open("w") as file:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:

            async def worker():
                for prompt in waiting:
                    turns = [{"role": "user", "content": prompt}]
                    answer = await client.chat.completions.create(
                        model="any", messages=turns, max_tokens=128
                    )
                    text = answer.choices[0].message.content
                    file.write(json.dumps({"prompt": prompt, "text": text}) + "\n")

            await asyncio.gather(*(worker() for _ in range(in_flight)))


def _import_all():
    """What a run imports sooner or later; each package works once, for the memory of its own."""
    import aiohttp  # noqa: F401
    import polars as pl
    import pyarrow.json
    import pyarrow.parquet

    import datakit.pipeline
    import datakit.report.card
    import datakit.report.page  # noqa: F401

    frame = pl.DataFrame({"a": [1, 2], "b": [["x"], []]})
    frame.lazy().group_by("a").agg(pl.len()).collect()
    pyarrow.parquet.write_table(frame.to_arrow(), pyarrow.BufferOutputStream())


def _ours(url, calls, in_flight, out):
    import datakit as dk

    if os.environ.get("IMPORT_FIRST"):
        _import_all()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = out.with_suffix(".prompts.jsonl")
    source.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts(calls)))
    model = {"kind": "openai", "model": "any", "base_url": url, "max_in_flight": in_flight}
    recipe = {
        "name": "bench",
        "rows_per_part": 500,
        "models": {"m": model | {"sampling": {"max_tokens": 128}}},
        "steps": [
            {"step": "sources.jsonl", "kind": "Prompt", "path": str(source)},
            {"step": "annotation.respond", "models": ["m"]},
        ],
    }
    version = dk.run(recipe, outputs=out.parent / "outputs", state=out.parent / "state")
    assert version.manifest.funnel[-1].kept == calls
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out.write_text(json.dumps({"grew MB": (after - before) / 1024}))


def client(name, url, calls, in_flight, out):
    """One client's whole work, in this process."""
    if name == "ours":
        _ours(url, calls, in_flight, out)
    else:
        asyncio.run({"aiohttp": _bare, "openai": _openai}[name](url, calls, in_flight, out))


def _stats(url, reset=False):
    root = url.removesuffix("/v1")
    if reset:
        urllib.request.urlopen(urllib.request.Request(f"{root}/reset", method="POST")).close()
    with urllib.request.urlopen(f"{root}/stats") as answer:
        return json.loads(answer.read())


def measure(name, url, options, folder, imported=False):
    """Wall, processor time and memory of one client, and what the endpoint saw."""
    _stats(url, reset=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    out = folder / f"{name}.out"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    command = [sys.executable, HERE, "--client", name, "--url", url, "--out", out]
    rest = ["--calls", str(options.calls), "--in-flight", str(options.in_flight)]
    env = os.environ | ({"IMPORT_FIRST": "1"} if imported else {})
    subprocess.run([*command, *rest], check=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    stats = _stats(url)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    spent_s = stats["last_request_at"] - stats["first_request_at"]
    found = {
        "calls/s": stats["ok"] / spent_s,
        "CPU s per 1,000": cpu_s / options.calls * 1000,
        "first request s": stats["first_request_at"] - began,
        "lost": options.calls - stats["ok"],
    }
    return found | (json.loads(out.read_text()) if imported else {})


def _best(runs):
    """The best of each figure: the machine can only make it worse."""
    return {
        name: (max if name == "calls/s" else min)(run[name] for run in runs) for name in runs[0]
    }


def main():
    """Run all clients and print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--latency", default="fixed:0")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--client", choices=CLIENTS)
    parser.add_argument("--url")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.client:
        client(options.client, options.url, options.calls, options.in_flight, options.out)
        return
    endpoint = [sys.executable, HERE.parents[1] / "endpoint.py", "--no-per-body"]
    server = subprocess.Popen(
        [*endpoint, "--latency", options.latency], stdout=subprocess.PIPE, text=True
    )
    runs = {name: [] for name in CLIENTS}
    try:
        url = server.stdout.readline().split()[1]
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) / "work"
            for _ in range(options.repeat):
                for name in CLIENTS:
                    runs[name].append(measure(name, url, options, work))
            grew = measure("ours", url, options, work, imported=True)["grew MB"]
    finally:
        server.terminate()
        server.wait()
    print(
        f"{options.calls:,} calls, {options.in_flight} in flight, latency {options.latency}, "
        f"best of {options.repeat}"
    )
    found = {name: _best(of_one) for name, of_one in runs.items()}
    for name, figures in found.items():
        print(f"{name:8}", "  ".join(f"{key} {value:,.2f}" for key, value in figures.items()))
    bare, peer, ours = (found[name] for name in CLIENTS)
    cpu = "CPU s per 1,000"
    print(f"ours / aiohttp, CPU per call: {ours[cpu] / bare[cpu]:.2f} (at most 2.8)")
    print(f"ours / aiohttp, calls/s:      {ours['calls/s'] / bare['calls/s']:.2f}")
    print(f"ours / openai, calls/s:       {ours['calls/s'] / peer['calls/s']:.2f}")
    print(f"ours grew by {grew:,.0f} MB above its imports (at most 100)")


if __name__ == "__main__":
    os.environ.setdefault("DO_NOT_TRACK", "1")
    main()
