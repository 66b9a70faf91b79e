"""From a model folder to graphs of whatever kind a converter writes, with the original's vectors to check them by."""

from __future__ import annotations

import gc
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import tokenizers

from embedstream_worker.engines.base import Role
from embedstream_worker.engines.checking import check_batches
from embedstream_worker.engines.headed_engine import load_torch
from embedstream_worker.engines.openvino_cache import Conversion, NotConvertible
from embedstream_worker.engines.text_input import InputKind
from embedstream_worker.engines.torch_graph import Original, graph_names
from embedstream_worker.engines.torch_loading import quiet
from embedstream_worker.models import ModelFolder

Write = Callable[[Original, Role, Path], None]
"""Writes the graph of one role to a path."""


def convert_with(write: Write, suffix: str, folder: ModelFolder, into: Path) -> Conversion:
    """Write `<role><suffix>` for each way through the model, and run the check's texts through the original.

    Raises:
        ModelError: the model cannot be loaded.
        NotConvertible: there is nothing to gain from it; or what `write` raises.
    """
    engine = load_torch(folder, "cpu", "float32")
    model = engine.text_model
    if model.input.kind is not InputKind.PADDED:
        raise NotConvertible("it is a table of vectors, which torch looks up as fast")
    if not isinstance(model.input.source, tokenizers.Tokenizer):
        raise NotConvertible("its tokenizer is written in Python, which is the slower half of it")
    outputs = engine.info.outputs
    references = [engine.run(batch) for batch in check_batches(model)]
    graphs = graph_names(engine.modules, model)
    for role, name in graphs.items():
        if role == name:
            write(engine, role, into / f"{role}{suffix}")
    engine.close()
    gc.collect()  # the weights are in the graphs now; the originals' memory is wanted back before those are compiled
    return Conversion(model, graphs, outputs, references)


@contextmanager
def silence() -> Iterator[None]:
    """No reports, and no warnings about tracing."""
    with quiet(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
