"""`make bench`: one corpus, one model, one run; everybody in turn, round after round. Writes its tables in Markdown.

python bench/compare.py                        about 20 minutes on 2 cores
python bench/compare.py --rounds 5             more rounds
python bench/compare.py --texts 300 --long 0   a quick look
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import chart
import corpora
import numpy as np
from contenders import Contender, EndToEnd, Peer, Run, Settings, Task, Vectors
from environments import PLACE, NotInstalled
from fleet import Server, serve_redis
from measure import machine, spread, table

from embedstream_worker.models import resolve_model

AS_IT_COMES: Settings = {"batch": 32, "threads": None, "dtype": "float32", "sorted": False}

GRIDS: dict[str, list[Settings]] = {
    "st_encode": [
        {**AS_IT_COMES, "sorted": True},
        *({**AS_IT_COMES, "dtype": "bfloat16", "batch": batch, "sorted": True} for batch in (8, 32, 128)),
        {**AS_IT_COMES, "dtype": "bfloat16"},
        {**AS_IT_COMES, "dtype": "bfloat16", "threads": 1, "sorted": True},
    ],
    "st_openvino": [
        *({**AS_IT_COMES, "dtype": "bfloat16", "batch": batch, "sorted": True} for batch in (8, 32)),
        {**AS_IT_COMES, "dtype": "bfloat16", "batch": 8},
    ],
    "st_onnx": [
        *({**AS_IT_COMES, "batch": batch, "sorted": True} for batch in (8, 32)),
        {**AS_IT_COMES, "batch": 8},
    ],
    "fastembed_embed": [
        {"batch": batch, "threads": None, "sorted": in_order}
        for batch, in_order in ((256, False), (32, False), (8, False), (8, True))
    ],
    "infinity_embed": [
        {"batch": batch, "threads": None, "dtype": dtype, "compile": False}
        for dtype, batch in (("float32", 32), ("bfloat16", 8), ("bfloat16", 32), ("bfloat16", 128))
    ],
    "onnx_loop": [
        {"threads": threads, "flying": flying, "tokens": tokens}
        for threads, flying, tokens in ((2, 1, 2048), (1, 2, 1024), (1, 2, 2048), (1, 2, 4096), (2, 2, 2048))
    ],
}
"""Settings of which the fastest on a sample is what a peer runs with."""

QUANTIZED = {"st_openvino": "static int8", "st_onnx": "dynamic int8"}
"""Peers that run once more in int8, and how they make it."""

BARE = "bare loop of the same engine"

SAMPLE = 128
"""Texts on which the settings of a grid are compared."""


@dataclass
class Entry:
    """A contender and what came of it."""

    contender: Contender
    runs: list[Run] = field(default_factory=list)
    vectors: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))
    peak: float = 0.0

    def median(self) -> float:
        return statistics.median(run.seconds for run in self.runs)


def say(text: str) -> None:
    """Progress, beside the report."""
    print(text, file=sys.stderr, flush=True)


def make_task(work: Path, folder: Path, texts: Sequence[str]) -> Task:
    work.mkdir(parents=True)
    listed = work / "texts.json"
    listed.write_text(json.dumps(list(texts)), "utf-8")
    return Task(folder, listed, corpora.write_corpus(work / "corpus.jsonl", texts), work, len(texts))


def best_of(script: str, environment: str, task: Task, report: list[str]) -> Settings:
    """The fastest settings of a grid, on a sample; the others go into the report."""
    grid = GRIDS[script]
    peer = Peer(script, script, environment, grid[0])
    peer.start(task)
    found: list[tuple[float, Settings]] = []
    for settings in grid:
        peer.configure(settings)
        found.append((min(peer.run().seconds for _ in range(2)), settings))
        say(f"  {script} {describe(settings)}: {task.count / found[-1][0]:.0f} texts/s")
    peer.stop()
    best = min(found, key=lambda pair: pair[0])[1]
    report += [
        f"| {script} | {describe(settings)} | {task.count / seconds:.0f} |{' chosen' if settings is best else ''} |"
        for seconds, settings in found
    ]
    return best


def describe(settings: Settings) -> str:
    return ", ".join(f"{name} {'default' if value is None else value}" for name, value in settings.items())


def choose(task: Task, report: list[str]) -> list[Contender]:
    """The peers, each at its best."""
    lines: list[str] = []
    chosen: list[Contender] = []
    for script, environment, name in (
        ("st_encode", "encode", "sentence-transformers `encode`, best"),
        ("st_openvino", "openvino", "sentence-transformers `encode`, OpenVINO backend, best"),
        ("st_onnx", "onnx", "sentence-transformers `encode`, ONNX backend, best"),
        ("fastembed_embed", "fastembed", "FastEmbed, best"),  # of the graph that the one before leaves
        ("infinity_embed", "infinity", "Infinity, best"),
        ("onnx_loop", "encode", "bare ONNX Runtime loop, float32"),
    ):
        try:
            best = best_of(script, environment, task, lines)
        except (NotInstalled, SystemExit) as error:
            report.append(f"{name}: not measured, as it cannot be run here: {error}\n")
            continue
        chosen.append(Peer(f"{name} ({describe(best)})", script, environment, best))
        if quantized := QUANTIZED.get(script):
            int8: Settings = {**best, "dtype": "int8"}
            chosen.append(Peer(f"{name} and {quantized} ({describe(int8)})", script, environment, int8))
    report += ["| contender | settings | texts/s on the sample | |", "| --- | --- | ---: | --- |", *lines, ""]
    return chosen


def loops() -> list[Contender]:
    return [
        Peer(f"{BARE}, {dtype}", "openvino_loop", None, {"dtype": dtype, "tokens": None})
        for dtype in ("bfloat16", "int8")
    ]


def compete(contenders: Sequence[Contender], task: Task, rounds: int) -> list[Entry]:
    """All are started, run once unmeasured (engines compile for each new shape of a batch), then run in turn."""
    entries = [Entry(contender) for contender in contenders]
    for entry in entries:
        say(f"  starting {entry.contender.name}")
        entry.contender.start(task)
    for entry in entries:
        entry.contender.run()
    for number in range(rounds):
        # Every other round backwards: nobody always follows the same neighbour.
        for entry in entries if number % 2 == 0 else reversed(entries):
            entry.runs.append(entry.contender.run())
            say(f"  round {number + 1}: {entry.contender.name}: {task.count / entry.runs[-1].seconds:.0f} texts/s")
    for entry in entries:
        entry.vectors, entry.peak = entry.contender.finish()
    return entries


def tabulate(entries: Sequence[Entry], count: int) -> str:
    """Fastest first, then the bare loops, which are no contenders but what there is to lose.

    The first entry is `encode` as it comes, to which all are compared.
    """
    reference = entries[0]
    rows = []
    for entry in sorted(entries, key=lambda entry: (entry.contender.name.startswith(BARE), entry.median())):
        speeds = [count / run.seconds for run in entry.runs]
        run = entry.runs[-1]
        cosines = (unit(entry.vectors) * unit(reference.vectors)).sum(axis=1)
        rows.append(
            [
                entry.contender.name,
                spread(speeds),
                f"{ratio(entry, reference):.2f}x",
                f"{run.tokens / entry.median():,.0f}",
                f"{100 * (1 - run.tokens / run.computed):.1f}" if run.computed else "",
                accuracy(float(cosines.min())),
                f"{cosines.min():.5f}",
                f"{cosines.mean():.5f}",
                f"{entry.peak:,.0f}",
            ]
        )
    head = ["contender", "texts/s: median (range)", "to `encode`", "tokens/s", "padding %", "accuracy"]
    return table([*head, "cosine: min", "mean", "peak MiB"], rows)


def accuracy(lowest: float) -> str:
    """The class of a contender whose worst vector has this cosine to float32."""
    return "float32" if lowest >= 0.99999 else "bfloat16" if lowest >= 0.999 else "int8"


def unit(vectors: Vectors) -> Vectors:
    normalized: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalized


def ratio(one: Entry, other: Entry) -> float:
    """How many times as fast one is as the other: the median over rounds, in which both ran within a minute or two."""
    return statistics.median(b.seconds / a.seconds for a, b in zip(one.runs, other.runs, strict=True))


def targets(entries: Sequence[Entry]) -> str:
    """The figures to reach, and what they are."""
    by_name = {entry.contender.name: entry for entry in entries}
    encode = entries[0]
    rows = []
    for dtype, least in (("bfloat16", 3.2), ("int8", 4.5)):
        ours = by_name[f"**embedstream, end to end, {dtype}**"]
        for what, other, bound in (
            ("`encode` as it comes", encode, least),
            ("the bare loop", by_name[f"{BARE}, {dtype}"], 0.95),
        ):
            reached = ratio(ours, other)
            best = min(run.seconds for run in other.runs) / min(run.seconds for run in ours.runs)
            verdict = "yes" if reached >= bound else "no"
            rows.append([f"end to end, {dtype}, to {what}", f"{bound}x", f"{reached:.2f}x", verdict, f"{best:.2f}x"])
    # On a machine that others use, the best rounds are those in which they used it least.
    return table(["ratio", "at least", "measured: median over rounds", "reached", "best round to best round"], rows)


def short_texts(server: Server, folder: Path, place: Path, count: int | None, rounds: int) -> list[str]:
    texts = corpora.docstrings(count)
    report: list[str] = []
    peers = choose(make_task(place / "sample", folder, corpora.docstrings(min(SAMPLE, len(texts)))), report)
    task = make_task(place / "short", folder, texts)
    contenders = [
        Peer("sentence-transformers `encode` as it comes (float32, batch 32)", "st_encode", "encode", AS_IT_COMES),
        *peers,
        *loops(),
        EndToEnd("bfloat16", server),
        EndToEnd("int8", server),
    ]
    entries = compete(contenders, task, rounds)
    title = f"## Short texts as they come: {len(texts):,} docstrings, all-MiniLM-L6-v2\n"
    return [title, tabulate(entries, len(texts)), "", targets(entries), "", "### The peers' settings\n", *report]


def long_texts(
    server: Server, folder: Path, place: Path, tokens: int, count: int, rounds: int, title: str
) -> list[str]:
    """Every text the same length: batching alone gains nothing."""
    task = make_task(
        place / f"long-{folder.name}-{tokens}", folder, corpora.equal_texts(folder, max(tokens, 512), count)
    )
    best: Settings = {**AS_IT_COMES, "dtype": "bfloat16", "batch": 8}
    contenders = [
        Peer("sentence-transformers `encode` as it comes (float32, batch 32)", "st_encode", "encode", AS_IT_COMES),
        Peer(f"sentence-transformers `encode` ({describe(best)})", "st_encode", "encode", best),
        loops()[0],
        EndToEnd("bfloat16", server),
        EndToEnd("int8", server),
    ]
    return [f"## {title}\n", tabulate(compete(contenders, task, rounds), count), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare embedstream with what people would use instead.")
    parser.add_argument("--texts", type=int, help="short texts [default: the whole corpus, about 2,900]")
    parser.add_argument("--long", type=int, default=256, help="long texts; 0 leaves them out [default: 256]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    parser.add_argument("--chart", type=Path, help="draw the first table into this SVG file")
    chosen = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    if chosen.output:
        chosen.output.write_text("", "utf-8")

    shown: list[str] = []

    def show(lines: Sequence[str]) -> None:
        text = "\n".join([*lines, ""])
        print(text, flush=True)
        shown.append(text)
        if chosen.output:
            with chosen.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    folder = resolve_model("all-MiniLM-L6-v2").path
    with tempfile.TemporaryDirectory(prefix="embedstream-bench-") as name, serve_redis() as server:
        place = Path(name)
        show([f"{machine()}; {server.product}, append-only file on; {chosen.rounds} rounds, alternating."])
        show(short_texts(server, folder, place, chosen.texts, chosen.rounds))
        if chosen.chart:
            chosen.chart.write_text(chart.draw("\n".join(shown)), "utf-8")
        if not chosen.long:
            return
        title = f"Texts of equal length: {chosen.long} of 512 tokens, of which all-MiniLM-L6-v2 takes 256"
        show(long_texts(server, folder, place, 256, chosen.long, chosen.rounds, title))
        for tokens in (512, 1024):
            count = max(16, chosen.long * 256 // tokens)
            title = f"Texts of equal length: {count} of {tokens} tokens, random weights of MiniLM's shape"
            model = corpora.random_model(PLACE, folder, tokens)
            show(long_texts(server, model, place, tokens, count, chosen.rounds, title))


if __name__ == "__main__":
    main()
