"""How long a query takes over a million rows: the first one reads the dataset, the next ones find it in memory.

Vectors are random. To load a model and to run it for the query comes on top.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import machine, spread, table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from lab.dataset import Dataset, make_content, make_spec, vectors

from embedstream.api.search import KEPT_BYTES, Searchable
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.values import Ragged, Results, ranges_of, to_columns
from embedstream.outputs import Output
from embedstream.records import ShardContent

DIM, VOCABULARY = 384, 30_522
SHARD_ROWS = 20_000
TEXT = "Texts have two hundred characters, as pieces of many corpora do. ".ljust(200, ".")
ROW_WEIGHTS, QUERY_WEIGHTS = 100, 20  # of a sparse vector
QUERIES = 9


def dense(rows: int, seed: int) -> Results:
    return {"dense": vectors(rows, seed, DIM)}


def sparse(rows: int, seed: int, weights: int = ROW_WEIGHTS) -> Results:
    random = np.random.default_rng(seed)
    indices = random.integers(1, VOCABULARY // weights, (rows, weights)).cumsum(axis=1).astype(np.uint32)
    return {"sparse": Ragged(np.full(rows, weights), random.random(rows * weights, np.float32) + 0.01, indices.ravel())}


RANGES = ranges_of([vectors(1000, 1, DIM)])
FLOATS = Output(name="v", kind="dense", dtype="float32", dim=DIM, normalized=True)
HALVES = Output(name="v", kind="dense", dtype="float16", dim=DIM, normalized=True)
BYTES = Output(name="v", kind="dense", dtype="int8", dim=DIM, normalized=True, ranges=RANGES)
BITS = Output(name="v", kind="dense", dtype="ubinary", dim=DIM)
WEIGHTS = Output(name="v", kind="sparse", dtype="float32", dim=VOCABULARY)

MEASURED: dict[str, tuple[Output, Callable[[int, int], Results]]] = {
    "float32": (FLOATS, dense),
    "float16": (HALVES, dense),
    "int8": (BYTES, dense),
    "ubinary": (BITS, dense),
    "sparse": (WEIGHTS, sparse),
}


def write(folder: Path, output: Output, make: Callable[[int, int], Results], rows: int) -> None:
    """A finished dataset."""
    spec = make_spec(str(folder), keep=())
    dataset = Dataset(FolderSink(spec.output, spec), spec)
    dataset.sink.check()
    for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        results = make(count, shard)
        made = make_content(
            spec,
            f"{shard:04d}",
            [(0, start // 10)],
            rows_per_block=count,
            matrix=results.get("dense"),
            outputs=[output],
        )
        data, (values,) = made.data, to_columns(output, results[output.kind])
        for name, column in (("text", pa.array([TEXT] * count)), ("v", values)):
            at = data.schema.get_field_index(name)
            data = data.set_column(at, data.schema.field(at), column)
        dataset.write(ShardContent(made.record, data, made.errors))
    dataset.end()


def measure(folder: Path, name: str) -> None:
    """Print a line of the table."""
    _, make = MEASURED[name]
    dataset = Searchable(str(folder), keep_bytes=KEPT_BYTES)
    queries = [sparse(1, seed, QUERY_WEIGHTS) if make is sparse else dense(1, seed) for seed in range(QUERIES)]
    taken, used = [], []
    for query in queries:
        begun, cpu = time.perf_counter(), time.process_time()
        hits = dataset.search(query, 5)
        taken.append(time.perf_counter() - begun)
        used.append(time.process_time() - cpu)
        assert len(hits) == 5
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(lines["VmHWM"].split()[0]) / 1024
    later = f"{spread(taken[1:], 2)} | {statistics.median(used[1:]):.2f}"
    print(f"| {name} | {taken[0]:.2f} | {used[0]:.2f} | {later} | {peak:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", choices=MEASURED, help="one of them")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        measure(options.folder, options.only)
        return
    print(f"{machine()}. {options.rows:,} rows.\n")
    head = ("vectors", "first query, s", "its CPU, s", "later ones, s", "their CPU, s", "peak, MiB")
    print(table(head, []), flush=True)
    for name in [options.only] if options.only else MEASURED:
        with tempfile.TemporaryDirectory(prefix="embedstream-bench-") as place:
            folder = Path(place) / "dataset"
            write(folder, *MEASURED[name], options.rows)
            command = [sys.executable, __file__, "--folder", str(folder), "--only", name]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
