"""`make bench-footprint`: what embedstream takes: disk for each way to install it, memory of a worker.

    python bench/footprint.py

Sizes are those of the packages in this environment: with PyPI's torch for Linux, which brings CUDA, it is gigabytes
more than with the one for CPUs.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import corpora
from fleet import Server, Worker, serve_redis, submit
from measure import machine, table
from packaging.requirements import Requirement
from peers.protocol import peak_mib

MODEL = "all-MiniLM-L6-v2"
EXTRAS = ("", "worker", "cpu", "local")


def installed(extra: str) -> dict[str, int]:
    """Bytes of each package that `embedstream[extra]` needs, embedstream itself included."""
    sizes: dict[str, int] = {}
    waiting = [("embedstream", frozenset([extra]))]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of what another system needs
            continue
        paths = (Path(str(file.locate())) for file in found.files or ())
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file())
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": each}) for each in extras):
                next_one = (needed.name.lower().replace("_", "-"), frozenset({"", *needed.extras}))
                if next_one not in seen:
                    seen.add(next_one)
                    waiting.append(next_one)
    return sizes


def sizes() -> str:
    rows = []
    for extra in EXTRAS:
        found = installed(extra)
        largest = sorted(found, key=lambda name: -found[name])[:3]
        rows.append(
            [
                f"embedstream[{extra}]" if extra else "embedstream",
                str(len(found)),
                f"{sum(found.values()) / 2**20:,.0f}",
                ", ".join(f"{name} {found[name] / 2**20:,.0f}" for name in largest),
            ]
        )
    return table(["", "packages", "MiB", "of which"], rows)


def memory(server: Server, place: Path, texts: int | None) -> str:
    """Peaks of a worker that converts its model, of the process that it does this in, and of the next worker."""
    corpus = corpora.write_corpus(place / "corpus.jsonl", corpora.docstrings(texts))
    cache = {"EMBEDSTREAM_CACHE_DIR": str(place / "cache")}
    worker = Worker(server, place, MODEL, "footprint", **cache)
    first = peak_mib(worker.pid)
    worker.stop()
    # Of all descendants that ended: the worker and its trial.
    trial = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    worker = Worker(server, place, MODEL, "footprint", **cache)
    ready, torch = peak_mib(worker.pid), "libtorch" in Path(f"/proc/{worker.pid}/maps").read_text()
    submit(server, corpus, place / "vectors", MODEL, worker.queue)
    done = peak_mib(worker.pid)
    worker.stop()
    rows = [
        ["the process that converts and checks a new model", f"{trial:,.0f}"],
        ["its worker, ready", f"{first:,.0f}"],
        [f"the next worker, ready ({'with' if torch else 'without'} torch)", f"{ready:,.0f}"],
        [f"the same after {texts or len(corpora.docstrings()):,} docstrings", f"{done:,.0f}"],
    ]
    return table(["process", "peak MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure disk and memory.")
    parser.add_argument("--texts", type=int, help="docstrings that the worker embeds [default: all, about 2,900]")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    chosen = parser.parse_args()
    report = [f"{machine()}. {MODEL}.\n", "### Installed\n", sizes(), ""]
    with tempfile.TemporaryDirectory(prefix="embedstream-bench-") as folder, serve_redis() as server:
        report += ["### Memory\n", memory(server, Path(folder), chosen.texts), ""]
    print("\n".join(report))
    if chosen.output:
        chosen.output.write_text("\n".join(report) + "\n", "utf-8")


if __name__ == "__main__":
    main()
