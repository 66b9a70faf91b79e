"""Sparse vectors, vectors of tokens, scores and labels are those of the libraries that such models are made for."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from engines.embedding import lowest_cosine
from engines.kinds import (
    LABELS,
    bge_m3,
    classifier,
    colbert,
    cross_encoder,
    inference_free,
    multi_label,
    pylate,
    reranker,
    splade,
    splade_sum,
    splade_twice,
    stanford,
)
from engines.model_shapes import Shape
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from embedstream.dataset.values import Matrix, Ragged, Values
from embedstream.errors import ModelError
from embedstream.lifecycle.opening import make_spec, scores_pairs
from embedstream.outputs import Kind, OutputSpec
from embedstream.planning import Counted
from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import HARMLESS, Engine, Results, TokenBatch
from embedstream_worker.engines.checking import difference
from embedstream_worker.engines.headed_engine import HeadedEngine
from embedstream_worker.engines.openvino_cache import Cache
from embedstream_worker.engines.openvino_engine import OpenVinoEngine
from embedstream_worker.engines.precision import Precision
from embedstream_worker.giving import resolve_output
from embedstream_worker.landing import landing
from embedstream_worker.model_files import model_outputs, read_text_model
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import resolve_model
from embedstream_worker.planning import plan_of

Folder = Callable[[Shape], Path]
Started = Callable[..., Engine]

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


@pytest.fixture(scope="module")
def started(folder: Folder) -> Started:
    """Loads a model, once for all tests; with OpenVINO without a trial, which takes seconds."""

    @functools.cache
    def start(shape: Shape, name: str = "torch", dtype: Precision = "float32") -> Engine:
        model = resolve_model(str(folder(shape)), trust=PICKLES)
        if name == "openvino":
            return OpenVinoEngine(model, dtype, model.fingerprint(), Cache())
        return load_engine(EngineOptions(str(folder(shape)), engine=name, dtype=dtype, trust=PICKLES))

    return start


def fewer(some: list[str], name: str, dtype: Precision) -> list[str]:
    """Torch in float32 is held to the libraries on all texts; the others, checked against it at load, on 60 of them."""
    return some if (name, dtype) == ("torch", "float32") else some[::5]


def assert_near(ours: Values, theirs: Values, dtype: Precision, most: float = 1e-2) -> None:
    """As `checking` has it; in bfloat16 `most` counts."""
    numbers = theirs.values if isinstance(theirs, Ragged) else theirs
    assert np.ptp(numbers) > 1e-3
    greatest = max(1.0, float(np.abs(numbers).max()))
    assert difference(ours, theirs) <= greatest * {"float32": 1e-4, "bfloat16": most}[dtype]


def as_ragged(matrix: Matrix) -> Ragged:
    """Of vectors as long as the vocabulary, what is not 0."""
    rows, indices = matrix.nonzero()
    counts = np.bincount(rows, minlength=len(matrix)).astype(np.int64)
    return Ragged(counts, matrix[rows, indices], indices.astype(np.uint32))


def whole(sparse: Ragged, vocabulary: int) -> Matrix:
    """As a matrix [n, vocabulary]."""
    assert sparse.indices is not None
    made = np.zeros((len(sparse), vocabulary), np.float32)
    made[np.repeat(np.arange(len(sparse)), sparse.counts), sparse.indices] = sparse.values
    return made


Way = tuple[Shape, str, Precision]

ENGINES: list[tuple[str, Precision]] = [
    *(("torch", "float32"), ("torch", "bfloat16"), ("openvino", "float32"), ("openvino", "bfloat16"))
]
PAIRS_ENGINES: list[tuple[str, Precision]] = [*ENGINES, ("onnxruntime", "float32")]


def ways(usual: Shape, engines: list[tuple[str, Precision]], *others: Shape) -> list[Way]:
    """The usual model in each engine and precision, the others in float32 by torch and OpenVINO."""
    exact = [each for each in ENGINES if each[1] == "float32"]
    return [(usual, *each) for each in engines] + [(shape, *each) for shape in others for each in exact]


@pytest.mark.parametrize(("shape", "name", "dtype"), ways(splade, ENGINES, splade_twice, splade_sum, inference_free))
def test_sparse_vectors_are_those_of_sparse_encoder(
    shape: Shape, name: str, dtype: Precision, started: Started, folder: Folder, some: list[str]
) -> None:
    some = fewer(some, name, dtype) if shape is splade else some[::6]
    engine = started(shape, name, dtype)
    reference: Any = SparseEncoder(str(folder(shape)), device="cpu", local_files_only=True)
    theirs = reference.encode_document(some, convert_to_sparse_tensor=False).numpy()
    ours = results(engine, some)["sparse"]
    assert engine.info.outputs["sparse"].dim == theirs.shape[1]
    assert (ours.counts > 0).all()
    if reference.max_active_dims is not None:  # near the cut others may be kept
        assert_near(ours, as_ragged(theirs), dtype, most=0.1)
        return
    mine = whole(ours, theirs.shape[1])
    assert_near(mine, theirs, dtype, most=0.1)
    assert lowest_cosine(mine, theirs) >= {"float32": 0.99999, "bfloat16": 0.999}[dtype]


@pytest.mark.parametrize("shape", [splade, splade_twice, splade_sum, inference_free])
def test_sparse_encoders_run_without_a_matrix_of_all_tokens_and_the_vocabulary(shape: Shape, started: Started) -> None:
    engine = started(shape)
    assert isinstance(engine, HeadedEngine)
    assert engine.sliced


@pytest.mark.parametrize(
    ("shape", "name", "dtype"),
    [
        *((colbert, *each) for each in ENGINES),
        *((shape, name, "float32") for shape in (pylate, stanford) for name in ("torch", "openvino")),
    ],
)
def test_vectors_of_tokens_are_those_of_multi_vector_encoder(
    shape: Shape, name: str, dtype: Precision, started: Started, folder: Folder, some: list[str]
) -> None:
    engine, some = started(shape, name, dtype), fewer(some, name, dtype)
    reference: Any = MultiVectorEncoder(str(folder(shape)), device="cpu", local_files_only=True)
    theirs = reference.encode_document(some, convert_to_numpy=True)
    prompt = engine.prompt("document", None, None)
    assert prompt == {"colbert": "", "pylate": "[D] ", "stanford": "[unused1] "}[shape.__name__]
    ours = results(engine, [prompt + text for text in some])["multivector"]
    assert_near(ours, Ragged(np.array([*map(len, theirs)]), np.concatenate(theirs)), dtype, most=0.02)
    assert engine.info.outputs["multivector"].normalized
    infos = engine.info.outputs.values()
    held = sum(info.row_bytes * len(some) + info.token_bytes * int(ours.counts.sum()) for info in infos)
    assert held >= ours.values.nbytes


@pytest.mark.parametrize(("shape", "name", "dtype"), ways(cross_encoder, PAIRS_ENGINES, reranker))
def test_scores_of_pairs_are_those_of_cross_encoder(
    shape: Shape, name: str, dtype: Precision, started: Started, folder: Folder, some: list[str]
) -> None:
    engine, some = started(shape, name, dtype), fewer(some, name, dtype)
    assert engine.info.pairs
    assert scores_pairs(str(folder(shape)))
    firsts = [*reversed(some)]
    reference: Any = CrossEncoder(str(folder(shape)), device="cpu", local_files_only=True)
    theirs = reference.predict(list(zip(firsts, some, strict=True)))
    assert_near(results(engine, some, firsts)["score"], theirs.reshape(-1, 1), dtype)


@pytest.mark.parametrize(("shape", "name", "dtype"), ways(classifier, PAIRS_ENGINES, multi_label))
def test_labels_are_those_of_a_pipeline(
    shape: Shape, name: str, dtype: Precision, started: Started, folder: Folder, some: list[str]
) -> None:
    engine, path, some = started(shape, name, dtype), str(folder(shape)), fewer(some, name, dtype)
    assert not scores_pairs(path)
    assert engine.info.outputs["labels"].labels == LABELS
    pipeline: Any = transformers.pipeline("text-classification", model=path, top_k=None, truncation=True, device="cpu")
    theirs = [{each["label"]: each["score"] for each in found} for found in pipeline(some)]
    expected = np.array([[found[label] for label in LABELS] for found in theirs], np.float32)
    assert_near(results(engine, some)["labels"], expected, dtype)


@pytest.mark.parametrize(("name", "dtype"), PAIRS_ENGINES)
def test_pairs_are_classified_too(
    name: str, dtype: Precision, started: Started, folder: Folder, some: list[str]
) -> None:
    engine, some = started(classifier, name, dtype), fewer(some, name, dtype)
    firsts = [*reversed(some)]
    reference: Any = CrossEncoder(str(folder(classifier)), device="cpu", local_files_only=True)
    theirs = reference.predict(list(zip(firsts, some, strict=True)), apply_softmax=True)
    assert_near(results(engine, some, firsts)["labels"], theirs, dtype)


@pytest.mark.parametrize(("name", "dtype"), ENGINES)
def test_three_results_of_one_pass_are_those_of_bge_m3(
    name: str, dtype: Precision, started: Started, folder: Folder, some: list[str]
) -> None:
    """By FlagEmbedding's formulas; 1.4.2 itself gave the same to 1e-7."""
    path, engine, some = folder(bge_m3), started(bge_m3, name, dtype), fewer(some, name, dtype)
    ours = results(engine, some)
    reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    assert_near(ours["dense"], np.array(reference.encode(some)), dtype)
    states: Any = reference.encode(some, output_value="token_embeddings")
    tokens = reference.tokenizer(some, truncation=True)["input_ids"]
    sparse_head, token_head = (torch.load(path / f"{name}_linear.pt") for name in ("sparse", "colbert"))
    special = {getattr(reference.tokenizer, f"{name}_token_id") for name in ("cls", "eos", "pad", "unk")}
    assert ours["sparse"].counts.max() > 3
    expected = np.zeros((len(some), engine.info.outputs["sparse"].dim), np.float32)
    vectors = []
    for row, (text, ids) in enumerate(zip(states, tokens, strict=True)):
        text = text[: len(ids)]
        weights = torch.relu(text @ sparse_head["weight"].T + sparse_head["bias"])[:, 0].tolist()
        for id, weight in zip(ids, weights, strict=True):
            if id not in special:
                expected[row, id] = max(expected[row, id], weight)
        found = torch.nn.functional.normalize(text[1:] @ token_head["weight"].T + token_head["bias"], dim=-1)
        vectors.append(found.numpy())
    assert_near(ours["sparse"], as_ragged(expected), dtype)
    assert_near(ours["multivector"], Ragged(np.array([*map(len, vectors)]), np.concatenate(vectors)), dtype, most=0.02)
    dense = results(engine, some[-30:] + some[:5], kinds=["dense"])
    assert_near(dense["dense"][:30], ours["dense"][-30:], dtype)


@pytest.mark.parametrize("shape", [splade, colbert, reranker, classifier])
def test_a_plan_counts_the_tokens_that_the_loaded_model_would_have(
    shape: Shape, started: Started, folder: Folder, some: list[str]
) -> None:
    model = str(folder(shape))
    engine, firsts = started(shape), None
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


def test_heads_that_are_pickles_are_left_out_unless_pickles_are_allowed(folder: Folder, started: Started) -> None:
    engine = load_engine(EngineOptions(str(folder(bge_m3)), engine="torch"))
    assert list(engine.info.outputs) == ["dense"]
    assert engine.info.fingerprint != started(bge_m3).info.fingerprint
    with pytest.raises(ModelError, match=r"m gives dense vectors; if its folder has .* set EMBEDSTREAM_ALLOW_PICKLE=1"):
        resolve_output(OutputSpec(name="sparse", kind="sparse"), "m", engine.info.outputs)


def test_what_an_engine_does_not_run_is_one_sentence(folder: Folder) -> None:
    with pytest.raises(ModelError, match="--engine onnxruntime: runs models of one dense vector, rerankers and class"):
        load_engine(EngineOptions(str(folder(splade)), engine="onnxruntime"))
    with pytest.raises(ModelError, match="--dtype int8: is for models of one dense vector"):
        load_engine(EngineOptions(str(folder(splade)), engine="openvino", dtype="int8"))


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
        load_engine(EngineOptions(str(path), engine="torch", trust=PICKLES))


def test_a_reranker_takes_no_prompt_of_a_role_and_one_with_a_default_is_refused(folder: Folder, tmp_path: Path) -> None:
    model = shutil.copytree(folder(cross_encoder), tmp_path / "model")
    settings = model / "config_sentence_transformers.json"
    prompts = {"prompts": {"query": "find: ", "document": "text: "}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **prompts}))
    assert load_engine(EngineOptions(str(model), engine="torch")).prompt("document", None, None) == ""
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "default_prompt_name": "query"}))
    with pytest.raises(ModelError, match="puts a prompt in front of pairs"):
        load_engine(EngineOptions(str(model), engine="torch"))


def test_a_model_that_is_too_coarse_in_bfloat16_runs_in_float32(
    folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its attention sees one token alone, and rounding decides which."""
    caplog.set_level("INFO")
    model = shutil.copytree(folder(reranker), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    loud = {name: weight * 8 if "encoder" in name and weight.ndim == 2 else weight for name, weight in weights.items()}
    save_file(loud, model / "model.safetensors", metadata={"format": "pt"})
    info = load_engine(EngineOptions(str(model), device="cpu")).info
    assert (info.engine, info.dtype) == ("openvino", "float32")
    assert load_engine(EngineOptions(str(model), device="cpu")).info == info
    assert caplog.text.count("converting for openvino, once") == 1


@pytest.mark.parametrize(("shape", "name"), [(splade, "torch"), (bge_m3, "torch"), (reranker, "openvino")])
def test_every_task_is_warmed_up_with_its_smallest_longest_and_fullest_batch(
    shape: Shape, name: str, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ran = started(shape, name, "float32"), list[tuple[int, int]]()
    run = engine.run

    def noting(batch: TokenBatch) -> Results:
        ran.append((len(batch), batch.longest))
        return run(batch)

    monkeypatch.setattr(engine, "run", noting)
    engine.warm_up(512)
    longest = engine.info.max_length
    smallest = int(engine.tokenizer().encode([HARMLESS], longest).lengths[0])
    assert set(ran) == {(1, smallest), (512 // longest, longest), (8, 64)}
