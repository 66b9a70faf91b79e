"""A model's blocks, compiled by torch.compile: one after another, as all of them share the compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sentence_transformers import SentenceTransformer
from torch.fx.experimental import _config as shapes
from transformers.modeling_layers import GradientCheckpointingLayer

from embedstream_worker.engines.torch_features import transformers_of

BACKEND = "inductor"


class CannotCompile(Exception):
    """Torch cannot compile the model here."""


@contextmanager
def compiling(model: SentenceTransformer) -> Iterator[None]:
    """What runs through the model meanwhile compiles its blocks, for sequences of any length and number.

    After it nothing is compiled any more in this process, whatever the thread: a shape that would need it runs eagerly.
    Compiled code is kept where `torch_environment` says, for the next start.

    Raises:
        CannotCompile: no blocks are known, or running the model failed; it is then as it was.
    """
    blocks = _blocks(model)
    if not blocks:
        raise CannotCompile("transformers does not tell its blocks")
    torch.compiler.set_stance("default")
    for block in blocks:
        block.compile(dynamic=True, fullgraph=True, backend=BACKEND)
    try:
        # Dimensions that are equal by chance in the first batch need not be so in the next.
        with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            yield
    except Exception as error:
        release(model)
        reason = " ".join(str(error).split("\n", 2)[:2]).strip()  # of a compiler's error, the second line has it
        raise CannotCompile(f"{type(error).__name__}: {reason}") from error
    torch.compiler.set_stance("eager_on_recompile")


def release(model: SentenceTransformer) -> None:
    """Run the blocks as they were written, and forget what was compiled in this process."""
    for block in _blocks(model):
        block._compiled_call_impl = None
    torch.compiler.reset()
    torch.compiler.set_stance("default")


def _blocks(model: SentenceTransformer) -> list[torch.nn.Module]:
    """Those that a model repeats, and its embeddings."""
    return [
        part
        for transformer in transformers_of(model)
        for part in transformer.model.modules()
        if isinstance(part, GradientCheckpointingLayer)
        or type(part).__name__ in (getattr(transformer.model, "_no_split_modules", None) or ())
    ]
