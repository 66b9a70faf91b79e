"""`make bench-pipeline`: everything but the model, with the hashing engine.

    python bench/pipeline.py                                  10 k, 100 k and 1 M chunks, then stage by stage
    python bench/pipeline.py --chunks 100000 --profile        and where the worker's threads spend their time

End to end: JSON lines -> embed-submit -> Redis -> one embed-worker -> Parquet and manifest. The producer alone: the
same lines into Redis, with no worker. The stages: each one's own functions, called directly on one thread.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import corpora
from environments import PLACE, python_of
from fleet import BIN, Server, Worker, cpu_seconds, environment, serve_redis, submit
from measure import machine, table
from peers.protocol import peak_mib
from stages import measure_stages

from embedstream.queue.broker import Broker
from embedstream.server.connection import connect

MODEL = "hashing"
CHARACTERS = 500
WAITING = ("Condition.wait ", "_worker (concurrent", "Thread._wait_for_tstate_lock", "Event.wait ")
PRODUCER_BYTES = str(8 * 2**30)
"""A bound that the producer alone does not meet."""


def end_to_end(server: Server, place: Path, chunks: int, profile: Path | None) -> list[str]:
    """One job through one worker that is warm; what it took."""
    corpus = corpora.write_corpus(place / f"{chunks}.jsonl", corpora.synthetic_texts(chunks, CHARACTERS))
    worker = Worker(server, place, MODEL, f"pipeline-{chunks}")
    recorder = None
    try:
        submit(server, warm_corpus(place), place / f"warm-{chunks}", MODEL, worker.queue)
        if profile is not None:
            program = python_of("profile").with_name("py-spy")
            record = [str(program), "record", "--pid", str(worker.pid), "--format", "raw", "--threads", "--rate", "100"]
            recorder = subprocess.Popen([*record, "--output", str(profile)], stdout=subprocess.DEVNULL)
            time.sleep(1.0)  # it looks around first
        before = cpu_seconds(worker.pid), cpu_seconds(server.pid)
        report = submit(server, corpus, place / f"{chunks}", MODEL, worker.queue)
        used = cpu_seconds(worker.pid) - before[0], cpu_seconds(server.pid) - before[1]
        peak = peak_mib(worker.pid)
    finally:
        if recorder is not None:
            recorder.send_signal(signal.SIGINT)
            recorder.wait()
        worker.stop()
    if report["rows"] != chunks:
        raise SystemExit(f"{report['rows']} rows of {chunks}")
    shutil.rmtree(place / f"{chunks}")
    seconds = report["seconds"]
    return [
        f"{chunks:,}",
        f"{seconds:.2f}",
        f"{chunks / seconds:,.0f}",
        *(f"{1e6 * each / chunks:.1f}" for each in used),
        f"{peak:,.0f}",
    ]


def warm_corpus(place: Path) -> Path:
    path = place / "warm.jsonl"
    return path if path.exists() else corpora.write_corpus(path, corpora.synthetic_texts(2000, CHARACTERS, seed=7))


def producer_alone(server: Server, place: Path, chunks: int, number: int) -> list[str]:
    """JSON lines into Redis. The job's own time: from its creation to the last block, without starting Python."""
    corpus = place / f"{chunks}.jsonl"
    if not corpus.exists():
        corpora.write_corpus(corpus, corpora.synthetic_texts(chunks, CHARACTERS))
    queue, output = f"producer-{number}", place / f"producer-{number}"
    command = [str(BIN / "embed-submit"), str(corpus), "-o", str(output), "--redis", server.url, "--queue", queue]
    begun = time.perf_counter()
    subprocess.run(
        [*command, "--model", MODEL, "--detach", "--quiet"],
        env={**environment(), "EMBEDSTREAM_QUEUE_BYTES": PRODUCER_BYTES},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    whole = time.perf_counter() - begun
    broker = Broker(connect(server.url), queue)
    job = broker.active_jobs()[0]
    status = broker.status(job)
    pushing = status.pushed - status.created
    broker.run(broker.cancel(job))
    return [f"{chunks:,}", f"{pushing:.2f}", f"{chunks / pushing:,.0f}", f"{whole:.2f}", f"{chunks / whole:,.0f}"]


def hot_lines(profile: Path, count: int = 20) -> str:
    """The lines on which the worker's threads spend their time, from py-spy's raw format; waiting is left out."""
    found: dict[tuple[str, str], int] = {}
    for line in profile.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        frames = stack.split(";")
        if not frames[-1].startswith(WAITING):
            key = (frames[0].partition("): ")[2], frames[-1])
            found[key] = found.get(key, 0) + int(samples)
    total = sum(found.values())
    ordered = sorted(found.items(), key=lambda item: -item[1])[:count]
    rows = [[f"`{frame}`", thread, f"{100 * samples / total:.1f}"] for (thread, frame), samples in ordered]
    return table(["where", "thread", "% of samples"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure everything but the model.")
    parser.add_argument("--chunks", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--producer-chunks", type=int, default=200_000, help="for the producer alone")
    parser.add_argument("--profile", action="store_true", help="also run py-spy over the worker (last size)")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    chosen = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    report: list[Any] = [f"{machine()}. Texts of {CHARACTERS} characters.\n"]
    with tempfile.TemporaryDirectory(prefix="embedstream-bench-") as folder, serve_redis() as server:
        place = Path(folder)
        rows = []
        for chunks in chosen.chunks:
            rows.append(end_to_end(server, place, chunks, None))
            print(rows[-1], file=sys.stderr)
        head = ["chunks", "s", "chunks/s", "worker CPU, µs/chunk", "Redis CPU, µs/chunk", "worker peak MiB"]
        report += ["## End to end, one worker\n", table(head, rows), ""]
        alone = [producer_alone(server, place, chosen.producer_chunks, number) for number in range(3)]
        head = ["chunks", "s", "chunks/s", "s with Python's start", "chunks/s with it"]
        report += ["## The producer alone, JSON lines to Redis\n", table(head, alone), ""]
        report += ["## Where each microsecond goes, one thread\n", measure_stages(server, place), ""]
        if chosen.profile:
            profile = place / "profile.txt"
            end_to_end(server, place, chosen.chunks[-1], profile)
            report += ["## Profile of the worker\n", hot_lines(profile), ""]
    print("\n".join(report))
    if chosen.output:
        chosen.output.write_text("\n".join(report) + "\n", "utf-8")


if __name__ == "__main__":
    main()
