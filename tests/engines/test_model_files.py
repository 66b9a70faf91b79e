"""What `--plan` reads of a model's files is what a worker has of the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engines.model_shapes import SHAPES, Shape, python_tokenizer, router

from embedstream.errors import ModelError
from embedstream_worker.engines.torch_loading import is_normalized, load_model, read_input
from embedstream_worker.model_files import read_text_model
from embedstream_worker.models import resolve_model

UNREADABLE = [router, python_tokenizer]


@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if shape not in UNREADABLE], ids=lambda shape: shape.__name__
)
def test_tokens_lengths_dimensions_and_normalization_are_those_of_the_loaded_model(
    shape: Shape, folder: Callable[[Shape], Path], texts: list[str]
) -> None:
    path = resolve_model(str(folder(shape)))
    model = load_model(path, torch.device("cpu"))
    loaded, light = read_input(model, "m"), read_text_model(path)
    assert light.input.max_length == loaded.max_length
    assert light.input.limits == loaded.limits
    assert light.dim == model.get_embedding_dimension()
    assert light.normalized == is_normalized(model)
    some = [*texts[:40], *texts[-10:]]
    ours, theirs = (each.tokenizer().encode(some, loaded.max_length) for each in (light.input, loaded))
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(ours.truncated, theirs.truncated)


@pytest.mark.parametrize("shape", UNREADABLE, ids=lambda shape: shape.__name__)
def test_what_files_do_not_tell_is_one_sentence(shape: Shape, folder: Callable[[Shape], Path]) -> None:
    with pytest.raises(ModelError, match="its tokens are known once it is loaded"):
        read_text_model(resolve_model(str(folder(shape))))
