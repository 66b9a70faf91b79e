"""Rows are found by what the model's folder says of similarity, as sentence-transformers computes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines.kinds import bge_m3, colbert, splade
from engines.model_shapes import Shape, mpnet
from lab.dataset import make_spec
from lab.results import some_results
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.util import SimilarityFunction

from embedstream.dataset.similarity import similarity
from embedstream.dataset.values import Ragged
from embedstream.outputs import SIMILARITIES, Kind, Output
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.giving import resolve_outputs
from embedstream_worker.model_folder import Trust

EACH = [(kind, name) for kind, names in SIMILARITIES.items() for name in names]


def padded(values: Ragged) -> torch.Tensor:
    """Weights of a vocabulary of 100, [texts, 100]."""
    assert values.indices is not None
    made = torch.zeros(len(values), 100)
    rows = np.repeat(np.arange(len(values)), values.counts)
    made[rows, values.indices.astype(np.int64)] = torch.from_numpy(values.values)
    return made


@pytest.mark.holds("Right")
@pytest.mark.parametrize(("kind", "name"), EACH)
def test_scores_are_those_of_the_library(kind: Kind, name: Any) -> None:
    dim = {"dense": 16, "sparse": 100, "multivector": 4}[kind]
    output = Output(name="x", kind=kind, dtype="float32", dim=dim, similarity=name)
    found, query = (some_results([kind], rows, seed)[kind] for rows, seed in ((40, 1), (1, 2)))
    theirs: Any = SimilarityFunction.to_similarity_fn(name)
    if not isinstance(found, Ragged):
        assert not isinstance(query, Ragged)
        found, query = found * np.float32(3), query * np.float32(2)
        expected = theirs(torch.from_numpy(query), torch.from_numpy(found))
    elif kind == "sparse":
        assert isinstance(query, Ragged)
        expected = theirs(padded(query), padded(found))
    else:
        assert isinstance(query, Ragged)
        texts = [torch.from_numpy(found.values[slice(*found.offsets[at : at + 2])]) for at in range(len(found))]
        expected = theirs([torch.from_numpy(query.values)], texts)
    np.testing.assert_allclose(similarity(output, query, found), np.asarray(expected).reshape(-1), atol=1e-4)


def said(folder: Path, tmp_path: Path, name: object) -> Path:
    """A copy of the model whose settings name this."""
    copy = shutil.copytree(folder, tmp_path / "model")
    path = copy / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "similarity_fn_name": name}))
    return copy


@pytest.mark.parametrize(
    ("shape", "library", "name"),
    [
        (mpnet, SentenceTransformer, "euclidean"),
        (mpnet, SentenceTransformer, None),
        (splade, SparseEncoder, "cosine"),
        (colbert, MultiVectorEncoder, "meanmaxsim"),
        (colbert, MultiVectorEncoder, "cosine"),
    ],
)
def test_the_folders_word_is_the_outputs(
    shape: Shape, library: Any, name: str | None, folder: Callable[[Shape], Path], tmp_path: Path
) -> None:
    model = said(folder(shape), tmp_path, name)
    engine = load_engine(EngineOptions(str(model), engine="torch"))
    (output,) = resolve_outputs(make_spec("/out"), engine.info)
    reference = library(str(model), device="cpu", local_files_only=True).similarity_fn_name
    assert (output.similarity or SIMILARITIES[output.kind][0]) == reference
    engine.close()


@pytest.mark.parametrize("name", ["dot", ["dot"]], ids=str)
def test_it_is_about_the_dense_vectors_of_a_model_that_gives_more_and_nonsense_is_passed_over(
    name: Any, folder: Callable[[Shape], Path], tmp_path: Path
) -> None:
    model = said(folder(bge_m3), tmp_path, name)
    engine = load_engine(EngineOptions(str(model), trust=Trust(pickle=True)))
    found = {output.kind: output.similarity for output in resolve_outputs(make_spec("/out"), engine.info)}
    assert found == {"dense": "dot" if name == "dot" else None, "sparse": None, "multivector": None}
    engine.close()
