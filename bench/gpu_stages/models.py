"""The stages that measure one model each: on token ids, without tokenizing, as fast as the engine takes them."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embedstream_worker.engines.base import Tokens
from embedstream_worker.engines.checking import check_batches
from embedstream_worker.engines.compiling import compiling, release
from embedstream_worker.engines.fusing import fuse_projections
from embedstream_worker.engines.torch_engine import TorchEngine
from gpu_stages import material
from gpu_stages.context import Bench
from gpu_stages.material import BERT_BASE, LONGEST, MINILM_L6, MODERNBERT_BASE, XLMR_LARGE, Work
from gpu_stages.measuring import Started, profile_of, rate, start_engine, waits_of

USUAL = "log-normal"
"""The corpus that figures are compared on: lengths as they come in life, 128 tokens on average."""
EAGER, COMPILED = "eager", "compiled, fewer kernels"
"""What a worker runs without and with `--compile`."""

_BUDGETS = (16_384, 32_768, 65_536, 131_072)
_TOKENS = 4_000_000  # of each corpus: several of the largest batches, again and again


class Subject:
    """One model and its texts; each figure is noted as soon as it is known."""

    def __init__(self, bench: Bench, name: str, folder: Path) -> None:
        self._bench = bench
        self.name = name
        self.folder = folder
        self.text = material.RealText(bench)
        self.work: Work | None = None
        self._tokens: dict[tuple[str, int], Tokens] = {}

    @contextmanager
    def engine(self, form: str, *, padded: bool = False, compiles: bool = False) -> Iterator[TorchEngine]:
        """A started one, closed afterwards. What it counts as work is known from the first one."""
        started: Started = start_engine(self._bench, self.folder, padded=padded, compiles=compiles)
        self._bench.note(f"start of {self.name}, {form}", **started.figures)
        if self.work is None:
            self.work = material.work_of(started.engine.modules)
        try:
            yield started.engine
        finally:
            started.engine.close()

    def rate(self, engine: TorchEngine, form: str, corpus: str = USUAL, budget: int | None = None) -> None:
        """Note tokens a second."""
        what = f"{self.name}, {form}, {corpus}" + (f", {budget} tokens a batch" if budget else "")
        with self._bench.part(what):
            tokens, work = self.tokens(engine, corpus), self._work()
            if self._bench.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            found = rate(engine, tokens, work, self._bench.seconds, budget)
            if self._bench.on_gpu:
                found["peak_memory_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            self._bench.note(what, model=self.name, form=form, corpus=corpus, **found)

    def kernels(self, engine: TorchEngine, form: str) -> None:
        """Note what ran on the device, and what was waited for."""
        tokens = self.tokens(engine, USUAL)
        with self._bench.part(f"kernels of {self.name}, {form}"):
            found = profile_of(engine, tokens, self._work(), self._bench.device)
            self._bench.note(f"kernels of {self.name}, {form}", **found)
        if self._bench.on_gpu:
            with self._bench.part(f"waits of {self.name}, {form}"):
                self._bench.note(f"waits of {self.name}, {form}", **{"waits for": waits_of(engine, tokens)})

    def tokens(self, engine: TorchEngine, corpus: str) -> Tokens:
        """The ids of a corpus, made once."""
        longest = min(LONGEST, engine.info.max_length)
        if (corpus, longest) not in self._tokens:
            total = 8_000 if self._bench.tiny else _TOKENS
            lengths = material.lognormal_lengths(total)
            if corpus != USUAL:
                lengths = np.full(max(1, total // int(corpus)), int(corpus))
            self._tokens[corpus, longest] = engine.tokenizer().encode(self.text.cut(lengths), longest)
        return self._tokens[corpus, longest]

    def _work(self) -> Work:
        if self.work is None:
            raise RuntimeError("no engine has been started")
        return self.work


def bert(bench: Bench) -> None:
    """First what a worker runs without and with `--compile`, then what each step on the way there brings."""
    subject = Subject(bench, BERT_BASE.name, material.random_model(bench, BERT_BASE))
    with subject.engine(EAGER) as eager:
        subject.rate(eager, EAGER)
        subject.kernels(eager, EAGER)
        for budget in (512, 1024) if bench.tiny else _BUDGETS:
            subject.rate(eager, EAGER, USUAL, budget)
        for corpus in ("100", "512"):
            subject.rate(eager, EAGER, corpus)
        with bench.part(COMPILED), subject.engine(COMPILED, compiles=True) as compiled:
            for corpus in (USUAL, "100", "512"):
                subject.rate(compiled, COMPILED, corpus)
            subject.kernels(compiled, COMPILED)
        for form, fuses in (("compiled", False), ("compiled, one QKV product", True)):
            with bench.part(form):
                _compile(eager, fuses)
                subject.rate(eager, form)
                release(eager.modules)


def _compile(engine: TorchEngine, fuses: bool) -> None:
    with ExitStack() as undo, compiling(engine.modules):
        if fuses:
            fuse_projections(engine.modules, undo)
        for batch in check_batches(engine.text_model):
            engine.run(batch)
        undo.pop_all()


def minilm(bench: Bench) -> None:
    """So small that the host is as busy as the device."""
    _measure(bench, MINILM_L6.name, material.random_model(bench, MINILM_L6), ("100",))


def modernbert(bench: Bench) -> None:
    """Rotary positions, gated units, windows in two of three layers."""
    _measure(bench, MODERNBERT_BASE.name, material.random_model(bench, MODERNBERT_BASE), ("512",))


def xlmr(bench: Bench) -> None:
    """Large products, as most multilingual models have."""
    _measure(bench, XLMR_LARGE.name, material.random_model(bench, XLMR_LARGE), ("512",))


def padded(bench: Bench) -> None:
    """What packing is worth."""
    subject = Subject(bench, BERT_BASE.name, material.random_model(bench, BERT_BASE))
    with subject.engine("padded", padded=True) as engine:
        for corpus in (USUAL, "512"):
            subject.rate(engine, "padded", corpus)
        subject.kernels(engine, "padded")


def _measure(bench: Bench, name: str, folder: Path, corpora: tuple[str, ...]) -> None:
    subject = Subject(bench, name, folder)
    for form, compiles in ((EAGER, False), (COMPILED, True)):
        with bench.part(f"{name}, {form}"), subject.engine(form, compiles=compiles) as engine:
            for corpus in (USUAL, *corpora):
                subject.rate(engine, form, corpus)
            subject.kernels(engine, form)


def encode(bench: Bench) -> None:
    """As it comes, and at a better setting. Tokenizing is included, as it cannot be had without."""
    folder = material.random_model(bench, BERT_BASE)
    texts = material.RealText(bench).cut(material.lognormal_lengths(8_000 if bench.tiny else _TOKENS))
    better = str(bench.dtype).removeprefix("torch.")
    for dtype, batch_size in (("float32", 32), (better, 64 if bench.tiny else 256)):
        form = f"encode, {dtype}, {batch_size} a batch"
        with bench.part(form):
            found = _encode_rate(bench, folder, texts, dtype, batch_size)
            bench.note(f"{BERT_BASE.name}, {form}", model=BERT_BASE.name, form=form, corpus=USUAL, **found)


def _encode_rate(bench: Bench, folder: Path, texts: list[str], dtype: str, batch_size: int) -> dict[str, Any]:
    model = SentenceTransformer(
        str(folder), device=str(bench.device), local_files_only=True, model_kwargs={"dtype": getattr(torch, dtype)}
    )
    work = material.work_of(model)
    some = texts[: 2 * batch_size]
    run = functools.partial(model.encode, batch_size=batch_size, show_progress_bar=False)
    run(some)
    begun = time.perf_counter()
    run(some)
    count = int(len(some) * bench.seconds / (time.perf_counter() - begun))
    chosen = list(itertools.islice(itertools.cycle(texts), max(batch_size, min(count, 8 * len(texts)))))
    begun = time.perf_counter()
    run(chosen)
    taken = time.perf_counter() - begun
    lengths = np.array([len(ids) for ids in model.tokenizer(chosen, truncation=True)["input_ids"]])
    by_characters = np.argsort([-len(text) for text in chosen], kind="stable")  # as `encode` sorts
    computed = sum(
        int(lengths[rows].max()) * len(rows)
        for rows in (by_characters[start : start + batch_size] for start in range(0, len(chosen), batch_size))
    )
    return {
        "budget": batch_size,
        "tokens_per_second": round(float(lengths.sum()) / taken),
        "tflops": round(work.flops(lengths) / taken / 1e12, 3),
        "padding": round(1 - float(lengths.sum()) / computed, 4),
    }
