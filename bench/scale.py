"""`make bench-scale`: how a fleet grows, how jobs share it, and what one Redis carries.

    python bench/scale.py                           workers, fairness, ceiling and size, some six minutes
    python bench/scale.py --only ceiling size       some of them

The workers have an engine that takes a fixed time per token and sleeps meanwhile, as a device does from the processor's
view: what is measured is everything around the model.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import corpora
from ceiling import SIZE_HEAD, measure_ceiling, measure_size
from fleet import BIN, Server, Worker, cpu_seconds, environment, serve_redis, submit
from measure import machine, table

from embedstream.queue.broker import Broker
from embedstream.server.connection import connect

MODEL, QUEUE = "hashing", "scale"
CHARACTERS = 200
TOKENS = CHARACTERS // 4
CHUNKS_PER_SECOND = 700
"""Of one worker: 8 of them reach 5,600, and two cores can follow."""

WORKER_BATCH = ("--batch-tokens", "3200")
"""64 chunks in the model at once."""

WORKER_OPTIONS = (*WORKER_BATCH, "--window-tokens", "12800")
"""A block in a window: at the end of a job no worker has much that others lack."""


@contextlib.contextmanager
def workers() -> Iterator[list[Worker]]:
    """An empty fleet, to be added to; stopped at the end."""
    fleet: list[Worker] = []
    try:
        yield fleet
    finally:
        for worker in fleet:
            worker.stop()


def add(fleet: list[Worker], count: int, server: Server, place: Path, options: Sequence[str] = WORKER_OPTIONS) -> None:
    """Start workers until there are so many."""
    pace = {"EMBEDSTREAM_ENGINE": "paced", "PACED_ENGINE_TOKENS_PER_SECOND": str(CHUNKS_PER_SECOND * TOKENS)}
    pace["PYTHONPATH"] = str(Path(__file__).parents[1] / "tests")  # where the package of this engine lies
    while len(fleet) < count:
        fleet.append(Worker(server, place, MODEL, QUEUE, *options, **pace))


def growth(server: Server, place: Path, fleet: list[Worker], counts: list[int], seconds: float) -> str:
    """As much work per worker, for more and more workers."""
    rows, first = [], 0.0
    for count in counts:
        add(fleet, count, server, place)
        chunks = round(count * CHUNKS_PER_SECOND * seconds)
        corpus = corpora.write_corpus(place / "growth.jsonl", corpora.synthetic_texts(chunks, CHARACTERS))
        pids = [server.pid, *(worker.pid for worker in fleet)]
        before, redis = sum(map(cpu_seconds, pids)), cpu_seconds(server.pid)
        report = submit(server, corpus, place / f"growth-{count}", MODEL, QUEUE)
        used, redis = sum(map(cpu_seconds, pids)) - before, cpu_seconds(server.pid) - redis
        if report["rows"] != chunks:
            raise SystemExit(f"{report['rows']} rows of {chunks}")
        pace = chunks / report["seconds"]
        first = first or pace / count
        rows.append([
            str(count), f"{chunks:,}", f"{report['seconds']:.2f}", f"{pace:,.0f}", f"{pace / count / first:.1%}",
            f"{pace / count / CHUNKS_PER_SECOND:.1%}", f"{used / report['seconds']:.2f}",
            f"{redis / report['seconds']:.3f}",
        ])  # fmt: skip
        print(rows[-1], file=sys.stderr)
    head = [
        "workers",
        "chunks",
        "s",
        "chunks/s",
        "of linear",
        "of the engines' own pace",
        "cores in use",
        "of it Redis",
    ]
    return table(head, rows)


def joining(server: Server, place: Path, fleet: list[Worker], seconds: float) -> str:
    """A job of one worker, and one to which three more come after a quarter of that time. Windows: as by default."""
    chunks = round(CHUNKS_PER_SECOND * seconds)
    corpus = corpora.write_corpus(place / "joining.jsonl", corpora.synthetic_texts(chunks, CHARACTERS))
    add(fleet, 1, server, place, WORKER_BATCH)
    alone = submit(server, corpus, place / "joining-alone", MODEL, QUEUE)["seconds"]
    ready: list[float] = []

    def join() -> None:
        time.sleep(seconds / 4)
        begun = time.monotonic()
        add(fleet, 4, server, place, WORKER_BATCH)
        ready.append(time.monotonic() - begun)

    thread = threading.Thread(target=join)
    thread.start()
    joined = submit(server, corpus, place / "joining", MODEL, QUEUE)["seconds"]
    thread.join()
    at_best = alone - (alone - seconds / 4 - ready[0]) * 3 / 4
    rows = [
        ["1 worker", f"{alone:.1f}", ""],
        [f"3 more after {seconds / 4:.0f} s, ready {ready[0]:.1f} s later", f"{joined:.1f}", f"{at_best:.1f}"],
    ]
    return table([f"a job of {chunks:,} chunks", "s", "at best"], rows)


def fairness(server: Server, place: Path, large: int, small: int = 1000, times: int = 3) -> str:
    """A small job alone, then beside a large one that was there before it."""
    texts = list(corpora.synthetic_texts(20_000, CHARACTERS))
    with (place / "large.jsonl").open("w", encoding="utf-8") as file:
        pairs = zip(range(large), itertools.cycle(texts), strict=False)
        file.writelines(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in pairs)
    corpus = corpora.write_corpus(place / "small.jsonl", texts[:small])
    alone = [submit(server, corpus, place / f"alone-{i}", MODEL, QUEUE)["seconds"] for i in range(times)]
    command = [str(BIN / "embed-submit"), str(place / "large.jsonl"), "-o", str(place / "large"), "--model", MODEL]
    process = subprocess.Popen(
        [*command, "--redis", server.url, "--queue", QUEUE, "--quiet"], env=environment(), stdout=subprocess.DEVNULL
    )
    broker = Broker(connect(server.url), QUEUE)
    try:
        while not (jobs := broker.active_jobs()) or broker.status(jobs[0]).submitted < large / 10:
            if process.poll() is not None:
                raise SystemExit("the large job is not there")
            time.sleep(0.1)
        beside = [submit(server, corpus, place / f"beside-{i}", MODEL, QUEUE)["seconds"] for i in range(times)]
        status = broker.status(jobs[0])
        if status.state.value not in ("submitting", "running"):
            raise SystemExit("the large job ended too early: nothing was shared")
        broker.run(broker.cancel(jobs[0]))
    finally:
        process.terminate()
        process.wait()
    rows = [
        [name, *(f"{seconds:.2f}" for seconds in told)]
        for name, told in [("alone", alone), (f"beside a job of {large:,} ({status.submitted:,} queued)", beside)]
    ]
    return table([f"a job of {small:,} chunks", *(f"s, run {i + 1}" for i in range(times))], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how a fleet grows and what one Redis carries.")
    parts = ["workers", "joining", "fairness", "ceiling", "size"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=30, help="of work for each worker")
    parser.add_argument("--large", type=int, default=1_000_000, help="chunks of the job beside which another runs")
    parser.add_argument("--ceiling-seconds", type=float, default=5)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 2, 16, 64])
    chosen = parser.parse_args()
    print(f"{machine()}.\n")
    with tempfile.TemporaryDirectory(prefix="embedstream-bench-") as folder, serve_redis() as server:
        place = Path(folder)
        with workers() as fleet:
            if "workers" in chosen.only:
                told = growth(server, place, fleet, sorted(chosen.workers), chosen.seconds)
                print(f"## Workers of {CHUNKS_PER_SECOND} chunks/s each\n\n{told}\n", flush=True)
        with workers() as fleet:
            if "joining" in chosen.only:
                print(
                    f"## Workers that come in the middle of a job\n\n{joining(server, place, fleet, 60)}\n", flush=True
                )
        with workers() as fleet:
            if "fairness" in chosen.only:
                add(fleet, max(chosen.workers), server, place)
                print(f"## Jobs side by side, {len(fleet)} workers\n\n{fairness(server, place, chosen.large)}\n")
        if "ceiling" in chosen.only:
            told = measure_ceiling(server, place, chosen.ceiling_seconds)
            print(f"## {server.product} without a model\n\n{told}\n", flush=True)
        if "size" in chosen.only:
            rows = [measure_size(server, place, millions) for millions in sorted(chosen.millions)]
            print(f"## What a job leaves in Redis, and its manifest\n\n{table(SIZE_HEAD, rows)}\n")


if __name__ == "__main__":
    main()
