"""How much of a GPU embedstream uses: tokens a second and share of the chip's matrix peak, packed and padded, and end
to end; beside sentence-transformers' own `encode`.

    python bench/gpu.py                 # on a machine with a GPU: under 10 minutes, no network
    python bench/gpu.py --tiny          # tries the benchmark itself, on the CPU: under a minute

Needs torch, transformers, sentence-transformers and pyarrow; the project need not be installed. The end-to-end part
also needs redis, msgspec, click, rich and a redis-server, and says what is missing where it cannot run.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parent.parent / "producer"))
sys.path.insert(1, str(Path(__file__).parent.parent / "worker"))
sys.path.insert(1, str(Path(__file__).parent.parent))

import gpu_end_to_end
import gpu_material
import gpu_runs
import sentence_transformers
import torch
import transformers
from gpu_material import LONGEST, SHAPES, ModelShape, Work
from gpu_runs import Rate

from embedstream_worker.engines.base import Tokens
from embedstream_worker.engines.torch_engine import Batches, TorchEngine
from embedstream_worker.models import resolve_model

TARGETS = {("BERT-base", "packed"): 0.50, ("BERT-base", "end to end"): 0.40}
"""Share of the measured matrix peak that an H200 should reach on texts of 128 tokens on average."""

END_TO_END = "BERT-base"
END_TO_END_SECONDS = 20.0
_COSINE_TEXTS = 48


@dataclass
class Bench:
    """One run of the benchmark, and what it found so far."""

    tiny: bool
    device: torch.device
    dtype: str
    seconds: float
    deadline: float
    redis_server: str | None
    peak: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)

    def time_left(self, what: str, needed: float) -> bool:
        """Whether there is time for another part; says so if not."""
        if time.monotonic() + needed < self.deadline:
            return True
        print(f"skipped for want of time: {what}", flush=True)
        return False

    def note(self, model: str, corpus: str, path: str, rate: Rate, **more: Any) -> None:
        """Keep and print one line."""
        share = rate.flops_per_second / self.peak
        target = TARGETS.get((model, path)) if corpus == "log-normal" and self.device.type == "cuda" else None
        self.results.append({"model": model, "corpus": corpus, "path": path, **asdict(rate), "mfu": share, **more})
        notes = [f"{name.replace('_', ' ')} {value}" for name, value in more.items()]
        if target is not None:
            notes.append(f"at least {target:.0%} wanted: {'reached' if share >= target else 'NOT reached'}")
        cells = [model, corpus, path, f"{rate.tokens_per_second:,.0f}", f"{share:.1%}", f"{rate.padding:.1%}"]
        print(f"| {' | '.join(cells)} | {'; '.join(notes)} |", flush=True)


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = torch.device("cpu" if options.tiny and not torch.cuda.is_available() else "cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: run this on a machine with one, or try it with --tiny")
    bench = Bench(
        tiny=options.tiny,
        device=device,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        seconds=options.seconds or (0.2 if options.tiny else 4.0),
        deadline=time.monotonic() + 60 * options.minutes,
        redis_server=options.redis_server,
    )
    if device.type == "cpu":
        torch.set_num_threads(1)  # such small products only wait for their threads
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}; {versions}, sentence-transformers {sentence_transformers.__version__}; {time.strftime('%Y-%m-%d')}")
    size = 8192 if device.type == "cuda" else 768
    bench.peak = gpu_runs.matrix_peak(device, getattr(torch, bench.dtype), size)
    print(f"matrix product of {size} x {size} random numbers in {bench.dtype}: {bench.peak / 1e12:,.2f} TFLOP/s\n")
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:
        _run(bench, Path(scratch), [shape for shape in SHAPES if options.models in (None, shape.name)])
    if options.json:
        report = {"device": name, "versions": versions, "peak_flops": bench.peak, "results": bench.results}
        options.json.write_text(json.dumps(report, indent=1))


def _run(bench: Bench, scratch: Path, shapes: Sequence[ModelShape]) -> None:
    docs = gpu_material.docstrings(everything=not bench.tiny)
    words, shares = gpu_material.words_of(docs, 30_000)
    total = 16_000 if bench.tiny else 8_000_000
    corpora = {"log-normal": gpu_material.lognormal_texts(words, shares, total), "docstrings": docs[: total // 100]}
    print("| model | corpus | path | tokens/s | of the matrix peak | padding | |")
    print("|---|---|---|---:|---:|---:|---|", flush=True)
    # First the one with a figure to reach, so that a run cut short has it.
    for shape in sorted(shapes, key=lambda shape: shape.name != END_TO_END):
        if not bench.time_left(shape.name, 60 if not bench.tiny else 5):
            continue
        folder = gpu_material.make_model(shape, scratch / shape.name, words, bench.tiny)
        reference = gpu_runs.load(folder, bench.device, "float32")
        work = gpu_material.work_of(reference)
        rates = _engine(bench, shape.name, folder, reference, work, corpora)
        del reference
        _encode(bench, shape.name, folder, work, corpora)
        if shape.name == END_TO_END and bench.time_left("end to end", 90 if not bench.tiny else 10):
            _end_to_end(bench, shape.name, folder, work, corpora["log-normal"], rates, scratch)


def _engine(
    bench: Bench, name: str, folder: Path, reference: Any, work: Work, corpora: dict[str, list[str]]
) -> dict[str, float]:
    """Packed and padded; tokens a second on the log-normal corpus by path."""
    rates: dict[str, float] = {}
    paths: tuple[Batches, Batches] = ("packed", "padded")
    for path in paths:
        engine = TorchEngine(
            resolve_model(str(folder)), str(bench.device), "auto" if bench.device.type == "cuda" else "float32", path
        )
        begun = time.perf_counter()
        engine.start()
        started = time.perf_counter() - begun
        tokenizer = engine.tokenizer()
        for corpus, texts in corpora.items():
            tokens: Tokens = tokenizer.encode(texts, LONGEST)
            rate = gpu_runs.engine_rate(engine, tokens, work, bench.seconds)
            more: dict[str, Any] = {}
            if corpus == "log-normal":
                rates[path] = rate.tokens_per_second
                some = texts[:_COSINE_TEXTS]
                more["lowest_cosine"] = round(gpu_runs.lowest_cosine(engine, tokens, reference, some), 6)
                more |= {"budget": engine.info.batch_tokens, "seconds_to_start": round(started, 1)}
                if engine.info.dtype != bench.dtype:
                    more["computed_in"] = engine.info.dtype
                if engine.info.padded and path == "packed":
                    more["ran"] = "padded, as this model cannot be packed"
            if bench.device.type == "cuda":
                more["device_busy"] = f"{gpu_runs.busy_share(engine, tokens):.1%}"
                if path == "packed" and corpus == "log-normal":
                    more["synchronizations_in_a_batch"] = gpu_runs.synchronizations(engine, tokens)
                    more["peak_memory_GB"] = round(torch.cuda.max_memory_allocated(bench.device) / 1e9, 1)
            bench.note(name, corpus, path, rate, **more)
        engine.close()
    return rates


def _encode(bench: Bench, name: str, folder: Path, work: Work, corpora: dict[str, list[str]]) -> None:
    large = 64 if bench.tiny else 256
    for label, dtype, batch_size in (
        ("encode as it comes", "float32", 32),
        (f"encode, {bench.dtype}, {large} a batch", bench.dtype, large),
    ):
        for corpus, texts in corpora.items() if not bench.tiny else [("log-normal", corpora["log-normal"])]:
            rate = gpu_runs.encode_rate(folder, bench.device, texts, work, bench.seconds, dtype, batch_size)
            bench.note(name, corpus, label, rate)


def _end_to_end(
    bench: Bench, name: str, folder: Path, work: Work, texts: list[str], rates: dict[str, float], scratch: Path
) -> None:
    """JSON lines to Parquet, for about as long as the packed engine would take for the same texts."""
    engine = TorchEngine(resolve_model(str(folder)), "cpu", "float32")
    engine.start()
    lengths = engine.tokenizer().encode(texts, LONGEST).lengths
    engine.close()
    wanted = rates["packed"] * (END_TO_END_SECONDS if not bench.tiny else 1.0)
    times = max(1, round(wanted / int(lengths.sum())))
    # Each text differs from all others, as no worker may profit from seeing it again.
    many = [f"{turn} {text}" for turn in range(times) for text in texts]
    options = ["--window-tokens", str(gpu_runs.WINDOW_TOKENS)]
    place = scratch / "end-to-end"
    place.mkdir()
    try:
        ran = gpu_end_to_end.run(folder, many, place, str(bench.device), bench.redis_server, options)
    except gpu_end_to_end.Skipped as reason:
        print(f"\nSKIPPED end to end: {reason}\n", flush=True)
        return
    longer = (lengths + 1).clip(max=LONGEST)  # the number in front
    total, flops = float(longer.sum()) * times, work.flops(longer) * times
    rate = Rate(total / ran.seconds, flops / ran.seconds, 0.0)
    share = rate.tokens_per_second / rates["packed"]
    bench.note(
        name, "log-normal", "end to end", rate, rows=ran.rows, seconds=round(ran.seconds, 1),
        of_the_packed_engine=f"{share:.1%}", server=ran.server,
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models and few texts; on the CPU if need be")
    parser.add_argument("--models", choices=[shape.name for shape in SHAPES], help="only this one")
    parser.add_argument("--seconds", type=float, help="of each run; default 4, or 0.2 with --tiny")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no further part is begun")
    parser.add_argument("--redis-server", metavar="PATH", help="a redis-server or valkey-server that is not on PATH")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
