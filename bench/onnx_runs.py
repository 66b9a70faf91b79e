"""ONNX Runtime, one run at a time against several in flight, by threads per run: which of them pays, and what it costs.

    python bench/onnx_runs.py                 about 4 minutes on 2 cores; prints a table in Markdown
    python bench/onnx_runs.py --rounds 5      more rounds

All settings take turns, round after round, on the same batches. Tokenizing is done before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import corpora
from measure import machine, quantile, spread, table

from embedstream.machine import cpu_cores
from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.onnx_engine import OnnxEngine
from embedstream_worker.models import resolve_model


@dataclass
class Setting:
    """Threads of one run, and how many runs are in flight."""

    threads: int
    runs: int
    engine: OnnxEngine
    texts_per_second: list[float] = field(default_factory=list)
    cores_busy: list[float] = field(default_factory=list)
    cores_of_others: list[float] = field(default_factory=list)
    batch_ms: list[float] = field(default_factory=list)
    text_ms: list[float] = field(default_factory=list)

    def measure(self, batches: list[TokenBatch], alone: list[TokenBatch]) -> None:
        """One round: all batches, then single texts one after the other."""
        begun, cpu, machine_cpu = time.perf_counter(), time.process_time(), machine_cpu_seconds()
        with ThreadPoolExecutor(self.runs) as threads:
            self.batch_ms += threads.map(self._timed, batches)
        wall = time.perf_counter() - begun
        own = time.process_time() - cpu
        self.cores_busy.append(own / wall)
        self.cores_of_others.append(max(0.0, machine_cpu_seconds() - machine_cpu - own) / wall)
        self.texts_per_second.append(sum(map(len, batches)) / wall)
        self.text_ms += [self._timed(batch) for batch in alone]

    def _timed(self, batch: TokenBatch) -> float:
        begun = time.perf_counter()
        self.engine.run(batch)
        return (time.perf_counter() - begun) * 1e3

    def row(self) -> list[str]:
        return [
            "synchronous" if self.runs == 1 else f"{self.runs} in flight",
            str(self.threads),
            spread(self.texts_per_second),
            f"{statistics.median(self.batch_ms):.0f}",
            f"{quantile(self.batch_ms, 0.95):.0f}",
            f"{statistics.median(self.text_ms):.1f}",
            f"{statistics.median(self.cores_busy):.2f}",
            f"{statistics.median(self.cores_of_others):.2f}",
        ]


def machine_cpu_seconds() -> float:
    """Processor time of all programs since the machine started: what others took makes a round worthless."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


HEAD = [
    "runs",
    "threads each",
    "texts/s",
    "batch p50 ms",
    "batch p95 ms",
    "one text p50 ms",
    "cores busy",
    "cores of others",
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=2048, help="in one batch")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    folder, cores = resolve_model(given.model), cpu_cores()
    settings = []
    for threads, runs in sorted({(1, 1), (cores, 1), (1, cores), (1, cores + 1), (cores, 2), (max(1, cores // 2), 2)}):
        engine = OnnxEngine(folder, "cpu", threads=threads, runs=runs)
        engine.warm_up(given.tokens)
        settings.append(Setting(threads, runs, engine))
    texts = corpora.docstrings(given.texts)
    first = settings[0].engine
    tokens = first.tokenizer().encode(texts, first.info.max_length)
    batches = [gather_batch(tokens, rows, 0, "document") for rows in cut_batches(tokens.lengths, given.tokens, True)]
    alone = [first.text_model.input.sample(1, 24, "document")] * 20
    head = f"{machine()}; {len(texts)} docstrings, {int(tokens.lengths.sum())} tokens, {len(batches)} batches"
    print(f"{head}; {given.rounds} rounds")
    for turn in range(given.rounds):
        for setting in settings[turn % len(settings) :] + settings[: turn % len(settings)]:
            setting.measure(batches, alone)
    print(table(HEAD, [setting.row() for setting in settings]))


if __name__ == "__main__":
    main()
