"""Sparse vectors, vectors of tokens, scores and labels are those of the libraries that such models are made for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from engines.kinds import (
    LABELS,
    bge_m3,
    classifier,
    colbert,
    cross_encoder,
    inference_free,
    multi_label,
    reranker,
    splade,
    splade_sum,
    splade_twice,
)
from engines.model_shapes import Shape
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from embedstream.dataset.values import Matrix, Ragged
from embedstream.errors import ModelError
from embedstream.lifecycle.opening import make_spec, scores_pairs
from embedstream.outputs import Kind
from embedstream.planning import Counted
from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import Engine, Results
from embedstream_worker.engines.headed_engine import HeadedEngine
from embedstream_worker.landing import landing
from embedstream_worker.model_files import model_outputs, read_text_model
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import resolve_model
from embedstream_worker.planning import plan_of

Folder = Callable[[Shape], Path]

PICKLES = Trust(pickle=True)


@pytest.fixture(scope="module")
def some(texts: list[str]) -> list[str]:
    """300 texts: of one token, usual ones, and some that are cut."""
    return [*texts[:280], *texts[-20:]]


def results(
    engine: Engine, texts: list[str], firsts: list[str] | None = None, kinds: list[Kind] | None = None
) -> Results:
    """The worker's way: sorted, in batches, back at their rows."""
    tokens = engine.tokenizer().encode(texts, engine.info.max_length, firsts)
    assert tokens.truncated.any()
    wanted = kinds or list(engine.info.outputs)
    landings = {kind: landing(kind, engine.info.outputs[kind], len(texts)) for kind in wanted}
    for rows in cut_batches(tokens.lengths, 2048, engine.info.padded):
        found = engine.run(gather_batch(tokens, rows, 0, "document", frozenset(wanted)))
        assert set(found) == set(wanted)
        for kind in wanted:
            landings[kind].put(rows, found[kind])
    return cast("Results", {kind: place.values() for kind, place in landings.items()})


def whole(sparse: Ragged, vocabulary: int) -> Matrix:
    """As a matrix [n, vocabulary]."""
    assert sparse.indices is not None
    made = np.zeros((len(sparse), vocabulary), np.float32)
    made[np.repeat(np.arange(len(sparse)), sparse.counts), sparse.indices] = sparse.values
    return made


@pytest.mark.parametrize(
    ("shape", "fused"), [(splade, True), (splade_twice, True), (splade_sum, False), (inference_free, False)]
)
def test_sparse_vectors_are_those_of_sparse_encoder(shape: Shape, fused: bool, folder: Folder, some: list[str]) -> None:
    path = folder(shape)
    some = some if shape is splade else some[::6]
    engine = load_engine(EngineOptions(str(path)))
    assert isinstance(engine, HeadedEngine)
    assert engine.fused == fused
    reference: Any = SparseEncoder(str(path), device="cpu", local_files_only=True)
    theirs = reference.encode_document(some, convert_to_sparse_tensor=False).numpy()
    ours = results(engine, some)["sparse"]
    assert engine.info.outputs["sparse"].dim == theirs.shape[1]
    assert (ours.counts > 0).all()
    np.testing.assert_allclose(whole(ours, theirs.shape[1]), theirs, rtol=0, atol=1e-4)


def test_vectors_of_tokens_are_those_of_multi_vector_encoder(folder: Folder, some: list[str]) -> None:
    path = folder(colbert)
    engine = load_engine(EngineOptions(str(path)))
    reference: Any = MultiVectorEncoder(str(path), device="cpu", local_files_only=True)
    theirs = reference.encode_document(some, convert_to_numpy=True)
    ours = results(engine, some)["multivector"]
    assert ours.counts.tolist() == [len(vectors) for vectors in theirs]
    np.testing.assert_allclose(ours.values, np.concatenate(theirs), rtol=0, atol=1e-4)
    assert engine.info.outputs["multivector"].normalized
    infos = engine.info.outputs.values()
    held = sum(info.row_bytes * len(some) + info.token_bytes * int(ours.counts.sum()) for info in infos)
    assert held >= ours.values.nbytes


@pytest.mark.parametrize("shape", [cross_encoder, reranker])
def test_scores_of_pairs_are_those_of_cross_encoder(shape: Shape, folder: Folder, some: list[str]) -> None:
    path = folder(shape)
    engine = load_engine(EngineOptions(str(path)))
    assert engine.info.pairs
    assert scores_pairs(str(path))
    firsts = [*reversed(some)]
    reference: Any = CrossEncoder(str(path), device="cpu", local_files_only=True)
    theirs = reference.predict(list(zip(firsts, some, strict=True)))
    ours = results(engine, some, firsts)["score"]
    np.testing.assert_allclose(ours[:, 0], theirs, rtol=0, atol=1e-4)
    assert np.ptp(theirs) > 1e-3


@pytest.mark.parametrize("shape", [classifier, multi_label])
def test_labels_are_those_of_a_pipeline(shape: Shape, folder: Folder, some: list[str]) -> None:
    path = folder(shape)
    engine = load_engine(EngineOptions(str(path)))
    assert not scores_pairs(str(path))
    assert engine.info.outputs["labels"].labels == LABELS
    pipeline: Any = transformers.pipeline(
        "text-classification", model=str(path), top_k=None, truncation=True, device="cpu"
    )
    theirs = [{each["label"]: each["score"] for each in found} for found in pipeline(some)]
    ours = results(engine, some)["labels"]
    np.testing.assert_allclose(ours, [[found[name] for name in LABELS] for found in theirs], rtol=0, atol=1e-4)


def test_pairs_are_classified_too(folder: Folder, some: list[str]) -> None:
    engine = load_engine(EngineOptions(str(folder(classifier))))
    firsts = [*reversed(some)]
    reference: Any = CrossEncoder(str(folder(classifier)), device="cpu", local_files_only=True)
    theirs = reference.predict(list(zip(firsts, some, strict=True)), apply_softmax=True)
    np.testing.assert_allclose(results(engine, some, firsts)["labels"], theirs, rtol=0, atol=1e-4)


def test_three_results_of_one_pass_are_those_of_bge_m3(folder: Folder, some: list[str]) -> None:
    """By FlagEmbedding's formulas; 1.4.2 itself gave the same to 1e-7."""
    path = folder(bge_m3)
    engine = load_engine(EngineOptions(str(path), trust=PICKLES))
    ours = results(engine, some)
    reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    np.testing.assert_allclose(ours["dense"], reference.encode(some), rtol=0, atol=1e-5)
    states: Any = reference.encode(some, output_value="token_embeddings")
    tokens = reference.tokenizer(some, truncation=True)["input_ids"]
    sparse_head, token_head = (torch.load(path / f"{name}_linear.pt") for name in ("sparse", "colbert"))
    special = {getattr(reference.tokenizer, f"{name}_token_id") for name in ("cls", "eos", "pad", "unk")}
    offsets = ours["sparse"].offsets
    assert ours["sparse"].counts.max() > 3
    begun = 0
    for row, (text, ids) in enumerate(zip(states, tokens, strict=True)):
        text = text[: len(ids)]
        weights = torch.relu(text @ sparse_head["weight"].T + sparse_head["bias"])[:, 0].tolist()
        expected: dict[int, float] = {}
        for id, weight in zip(ids, weights, strict=True):
            if id not in special and weight > expected.get(id, 0):
                expected[id] = weight
        assert ours["sparse"].indices is not None
        mine = slice(offsets[row], offsets[row + 1])
        found = dict(zip(ours["sparse"].indices[mine].tolist(), ours["sparse"].values[mine].tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-4)
        vectors = torch.nn.functional.normalize(text[1:] @ token_head["weight"].T + token_head["bias"], dim=-1)
        here = ours["multivector"].values[begun : begun + len(vectors)]
        np.testing.assert_allclose(here, vectors.numpy(), rtol=0, atol=1e-4)
        assert ours["multivector"].counts[row] == len(vectors)
        begun += len(vectors)
    dense = results(engine, some[-30:] + some[:5], kinds=["dense"])
    np.testing.assert_allclose(dense["dense"][:30], ours["dense"][-30:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [splade, colbert, reranker, classifier])
def test_a_plan_counts_the_tokens_that_the_loaded_model_would_have(
    shape: Shape, folder: Folder, some: list[str]
) -> None:
    model = str(folder(shape))
    engine, firsts = load_engine(EngineOptions(model)), None
    spec = make_spec(queue=None, output="/out", model=model, revision=None, parts=["p"], settings={})
    texts = some
    if shape is reranker:
        firsts = [*reversed(some)]
        texts = [f"{first}\0{text}" for first, text in zip(firsts, some, strict=True)]
    plan = plan_of(spec)
    tokens = engine.tokenizer().encode(some, engine.info.max_length, firsts)
    assert plan.count(texts) == Counted(tokens.lengths.tolist(), tokens.truncated.tolist())
    light = resolve_model(model)
    outputs = model_outputs(light, read_text_model(light))
    assert [(kind, each.dim, each.labels) for kind, each in outputs.items()] == [
        (kind, each.dim, each.labels) for kind, each in engine.info.outputs.items()
    ]


def test_heads_that_are_pickles_are_left_out_unless_pickles_are_allowed(folder: Folder) -> None:
    engine = load_engine(EngineOptions(str(folder(bge_m3))))
    assert list(engine.info.outputs) == ["dense"]
    assert engine.info.fingerprint != load_engine(EngineOptions(str(folder(bge_m3)), trust=PICKLES)).info.fingerprint


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_for_vectors_alone_is_refused(engine: str, folder: Folder) -> None:
    with pytest.raises(ModelError, match="use --engine torch"):
        load_engine(EngineOptions(str(folder(splade)), engine=engine))


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def label_without_utf8(path: Path) -> None:
    change(path / "config.json", id2label={"0": "a\ud800", "1": "b", "2": "c"})


def labels_of_megabytes(path: Path) -> None:
    change(path / "config.json", id2label={"0": "a" * 2**20, "1": "b", "2": "c"})


def activation_of_no_score(path: Path) -> None:
    change(path / "config.json", sentence_transformers={"activation_fn": "torch.nn.GLU"})


def another_purpose(path: Path) -> None:
    change(path / "config_sentence_transformers.json", model_type="CrossEncoder")


def head_of_repeated_numbers(path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(10**10, 32)}, path / "colbert_linear.pt")


def head_of_another_width(path: Path) -> None:
    torch.save({"weight": torch.zeros(1, 7)}, path / "sparse_linear.pt")


def head_of_many_weights(path: Path) -> None:
    torch.save({"weight": torch.zeros(5, 32)}, path / "sparse_linear.pt")


@pytest.mark.parametrize(
    ("shape", "attack", "says"),
    [
        (classifier, label_without_utf8, "surrogates not allowed"),
        (classifier, labels_of_megabytes, "labels have 1,048,578 bytes"),
        (reranker, activation_of_no_score, "cannot run: RuntimeError: Halving dimension"),
        (splade_sum, another_purpose, "cannot run: KeyError: 'scores'"),
        (bge_m3, head_of_repeated_numbers, r"colbert_linear\.pt: .*a tensor repeats its numbers"),
        (bge_m3, head_of_another_width, r"sparse_linear\.pt: .*vectors of 7 dimensions, not 32"),
        (bge_m3, head_of_many_weights, "cannot run: RuntimeError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_gives_something_else_than_it_says_is_one_sentence(
    shape: Shape, attack: Callable[[Path], None], says: str, folder: Folder, tmp_path: Path
) -> None:
    path = shutil.copytree(folder(shape), tmp_path / "model")
    attack(path)
    with pytest.raises(ModelError, match=says):
        load_engine(EngineOptions(str(path), trust=PICKLES))


def test_a_reranker_takes_no_prompt_of_a_role_and_one_with_a_default_is_refused(folder: Folder, tmp_path: Path) -> None:
    model = shutil.copytree(folder(cross_encoder), tmp_path / "model")
    settings = model / "config_sentence_transformers.json"
    prompts = {"prompts": {"query": "find: ", "document": "text: "}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **prompts}))
    assert load_engine(EngineOptions(str(model))).prompt("document", None, None) == ""
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "default_prompt_name": "query"}))
    with pytest.raises(ModelError, match="puts a prompt in front of pairs"):
        load_engine(EngineOptions(str(model)))
