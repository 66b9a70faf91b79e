"""The stages of the GPU benchmark: each measures one thing, in a process of its own. This list needs no library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of `bench/gpu.py`."""

    name: str
    seconds: float
    """Its process is killed when it takes longer, loading of libraries included."""
    function: str
    """`module.function` below this package; it takes a `Bench`."""
    what: str


STAGES = (
    Stage("env", 8, "machine.describe", "versions, card, cores, compilers, disks"),
    Stage("kernels", 25, "kernels.check", "attention for packed texts against plain attention; waits for the device"),
    Stage("real", 25, "vectors.compare", "MiniLM's vectors, packed, padded and compiled, against those in float32"),
    Stage("ceilings", 20, "ceilings.measure", "what the device and the tokenizer can do at most"),
    Stage("bert", 130, "models.bert", "BERT-base: batch sizes, compiled, fewer kernels; texts of several lengths"),
    Stage("e2e", 110, "end_to_end.measure", "JSON lines to Parquet, with one worker and with two"),
    Stage("minilm", 70, "models.minilm", "MiniLM-L6"),
    Stage("modernbert", 45, "models.modernbert", "ModernBERT-base"),
    Stage("tests", 50, "cuda_tests.run", "tests/engines/test_torch_cuda.py"),
    Stage("kinds", 60, "kinds.measure", "sparse vectors, scores of pairs, BGE-M3's three, packed and padded"),
    Stage("xlmr", 35, "models.xlmr", "XLM-R-large"),
    Stage("padded", 20, "models.padded", "BERT-base in padded batches"),
    Stage("encode", 25, "models.encode", "BERT-base by sentence-transformers' own `encode`"),
    Stage("fp8", 20, "ceilings.fp8", "BERT's products in FP8"),
)
"""In the order of what they are worth, should the time not suffice for all."""
