"""`make bench-latency`: how long one text takes, with the real model.

    python bench/latency.py

One-text `Client.embed()` while the worker has nothing else to do and while it runs a bulk job, against the bare model
in this process (tokenize, one `Engine.run`). And one text through `embed-submit` in embedded mode, by phase.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import corpora
from fleet import BIN, Server, Worker, environment, serve_redis, submit
from measure import machine, quantile, table, timed

from embedstream import Client
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream_producer.embedded import state_folder
from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines import EngineOptions, load_engine

MODEL = "all-MiniLM-L6-v2"

P50_MS, P99_MS = 40, 90
"""Of a request during a bulk job."""


@dataclass(frozen=True)
class Bare:
    """The engine by itself, in this process."""

    one: list[float]
    """Seconds of a one-text call, tokenizing included."""
    batch: float
    """Seconds of a full bulk batch alone: the median over the corpus's batches."""
    batch_beside: float
    """The same while as many run as the engine wants at once."""
    flying: int


def bare(questions: list[str], texts: list[str], dtype: str) -> Bare:
    engine = load_engine(EngineOptions(MODEL, engine="openvino", dtype=dtype))  # type: ignore[arg-type]
    engine.warm_up(engine.info.batch_tokens)
    tokenizer = engine.tokenizer()

    def ask(text: str) -> None:
        tokens = tokenizer.encode([text], engine.info.max_length)
        engine.run(gather_batch(tokens, cut_batches(tokens.lengths, 1, True)[0], 0, "query"))

    ask(questions[0])
    one = [timed(partial(ask, text)) for text in questions]
    tokens = tokenizer.encode(texts, engine.info.max_length)
    rows = cut_batches(tokens.lengths, engine.info.batch_tokens, True)
    batches = [gather_batch(tokens, some, 0, "document") for some in rows[:: max(1, len(rows) // 24)]]
    alone = [timed(partial(engine.run, batch)) for batch in batches]
    beside: list[float] = []

    def run() -> None:
        beside.extend(timed(partial(engine.run, batch)) for batch in batches)

    threads = [threading.Thread(target=run) for _ in range(engine.in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flying = engine.in_flight
    engine.close()
    return Bare(one, statistics.median(alone), statistics.median(beside), flying)


def requests(server: Server, queue: str, questions: list[str], busy: Callable[[], bool] = lambda: True) -> list[float]:
    """Seconds of one-text requests, one after another, as long as `busy` says so."""
    with Client(server.url, queue=queue) as client:
        client.embed(["the first one"])
        found = []
        for question in questions:
            if not busy():
                break
            found.append(timed(partial(client.embed, [question])))
    return found


def beside_a_job(
    server: Server, place: Path, queue: str, questions: list[str], corpus: Path
) -> tuple[list[float], float]:
    """The same while a bulk job runs; and that job's texts per second."""
    reports: list[float] = []

    def bulk() -> None:
        report = submit(server, corpus, place / f"bulk-{time.monotonic_ns()}", MODEL, queue)
        reports.append(report["rows"] / report["seconds"])

    job = threading.Thread(target=bulk)
    job.start()
    broker = Broker(connect(server.url), queue)
    while job.is_alive() and not any(worker.in_hand for worker in broker.workers()):
        time.sleep(0.05)
    found = requests(server, queue, questions, job.is_alive)
    job.join()
    return found, reports[0]


def embedded_phases(place: Path, number: int, cache: Path | None = None) -> dict[str, float]:
    """Seconds since its start at which one `embed-submit` of one text reached each phase.

    `cache`: what is known of models, instead of what this machine knows. In an empty folder that is nothing.
    """
    corpus = corpora.write_corpus(place / f"one-{number}.jsonl", ["Return the sum of the numbers."])
    output = place / f"one-{number}.vectors"
    log = state_folder(str(output)) / "worker.log"
    manifest = output / "_manifest.json"
    begun, reached = time.time(), {}
    process = subprocess.Popen(
        [str(BIN / "embed-submit"), str(corpus), "-o", str(output), "--model", MODEL, "--json", "--quiet"],
        env=environment() | ({} if cache is None else {"EMBEDSTREAM_CACHE_DIR": str(cache)}),
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        now = time.time() - begun
        if "lock taken" not in reached and output.exists():
            reached["lock taken"] = now
        if "worker started" not in reached and log.exists():
            reached["worker started"] = now
        if "model found" not in reached and log.exists() and b"INFO model" in _read(log):
            reached["model found"] = now
        if "conversion begun" not in reached and log.exists() and b"converting for openvino" in _read(log):
            reached["conversion begun"] = now
        if "engine checked" not in reached and log.exists() and b"to float32 on" in _read(log):
            reached["engine checked"] = now
        if "engine ready" not in reached and log.exists() and b"ready after" in _read(log):
            reached["engine ready"] = now
        if "manifest" not in reached and manifest.exists():
            reached["manifest"] = now
        time.sleep(0.002)
    reached["end"] = time.time() - begun
    assert process.stdout is not None
    found = json.loads(manifest.read_text())
    reached["job created"] = found["created"] - begun
    return reached


def phases(runs: list[dict[str, float]]) -> str:
    names = ("lock taken", "job created", "worker started", "model found", "conversion begun", "engine checked")
    rows = []
    for name in (*names, "engine ready", "manifest", "end"):
        times = [run[name] for run in runs if name in run]
        if times:
            rows.append([name, f"{statistics.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}"])
    return table(["reached", "s: median", "range"], rows)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long one text takes.")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--bulk", type=int, help="texts of the bulk job [default: the whole corpus, four times]")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    chosen = parser.parse_args()
    texts = corpora.docstrings() * 4
    texts = texts[: chosen.bulk] if chosen.bulk else texts
    questions = [f"how do I {words} {i}?" for i, words in zip(range(chosen.requests), _verbs(), strict=False)]
    report = [f"{machine()}. all-MiniLM-L6-v2, {chosen.dtype}.\n"]
    with tempfile.TemporaryDirectory(prefix="embedstream-bench-") as folder, serve_redis() as server:
        place, queue = Path(folder), "latency"
        worker = Worker(server, place, MODEL, queue, "--dtype", chosen.dtype, "--engine", "openvino")
        corpus = corpora.write_corpus(place / "bulk.jsonl", texts)
        idle = requests(server, queue, questions)
        busy, speed = beside_a_job(server, place, queue, questions, corpus)
        worker.stop()
        alone = bare(questions, texts[:2000], chosen.dtype)
        known = [embedded_phases(place, number) for number in range(5)]
        new = [embedded_phases(place, 5 + number, place / f"cache-{number}") for number in range(3)]
    rows = [
        [name, str(len(found)), *(f"{1000 * quantile(found, share):.1f}" for share in (0.5, 0.95, 0.99))]
        for name, found in (
            ("bare model, tokenizing included", alone.one),
            ("`Client.embed`, nothing else to do", idle),
            (f"`Client.embed` during a bulk job ({speed:.0f} texts/s)", busy),
        )
    ]
    report += ["## One text now\n", table(["", "requests", "p50 ms", "p95 ms", "p99 ms"], rows), ""]
    report += [
        f"A bulk batch takes {1000 * alone.batch:.1f} ms alone, {1000 * alone.batch_beside:.1f} ms while "
        f"{alone.flying} are in the model. To reach beside them: {P50_MS} ms at p50, {P99_MS} ms at p99.",
        "",
    ]
    report += ["## One text by `embed-submit` in embedded mode\n", phases(known), ""]
    report += ["### With a model that this machine has not converted yet\n", phases(new), ""]
    print("\n".join(report))
    if chosen.output:
        chosen.output.write_text("\n".join(report) + "\n", "utf-8")


def _verbs() -> list[str]:
    return [text.split(" ", 1)[0].replace(".", " ") for text in corpora.docstrings()]


if __name__ == "__main__":
    main()
