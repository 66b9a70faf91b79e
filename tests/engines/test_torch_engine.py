from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engines.embedding import MINILM, Vectors, embed, load_reference, lowest_cosine
from engines.fitting import assert_it_goes_on_after_a_batch_too_large
from engines.model_shapes import bert_mean_without_prompt, nearly_equal_vectors, plain_transformers, router, xlm_roberta
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from embedstream.errors import ModelError
from embedstream_worker.engines import torch_device
from embedstream_worker.engines.base import OutOfMemory, Results, TokenBatch
from embedstream_worker.engines.precision import tokenizer_threads
from embedstream_worker.engines.text_input import warm_up_batches
from embedstream_worker.engines.torch_device import pick_dtype, share_cores
from embedstream_worker.engines.torch_engine import Batches, TorchEngine
from embedstream_worker.models import resolve_model
from embedstream_worker.tokenizing import UNLIMITED, Limits


@pytest.fixture(scope="module")
def minilm() -> Iterator[TorchEngine]:
    engine = started(MINILM)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    return load_reference(resolve_model(MINILM).path)


def started(model: str | Path) -> TorchEngine:
    return TorchEngine(resolve_model(str(model)), "cpu", "float32")


@pytest.mark.holds("Right")
def test_documents_equal_sentence_transformers(
    minilm: TorchEngine, reference: SentenceTransformer, texts: list[str]
) -> None:
    assert len(texts) >= 200
    ours, theirs = embed(minilm, texts), reference.encode_document(texts)
    assert lowest_cosine(ours, theirs) >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


@pytest.mark.holds("Right", "sentence-transformers#4060")
def test_truncation_is_flagged_exactly(minilm: TorchEngine, reference: SentenceTransformer, texts: list[str]) -> None:
    full = [len(ids) for ids in reference.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    tokens = minilm.tokenizer().encode(texts, 256)
    assert tokens.truncated.tolist() == [length > 256 for length in full]
    assert tokens.truncated.sum() >= 20
    assert tokens.lengths.tolist() == [min(length, 256) for length in full]


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with prompts."""
    folder = tmp_path_factory.mktemp("prompted") / "model"
    shutil.copytree(resolve_model(MINILM).path, folder)
    prompts = {"query": "query: ", "passage": "passage: ", "topic": "cluster by topic: "}
    config = {"prompts": prompts, "default_prompt_name": "topic", "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return folder


def test_prompts_are_picked_as_sentence_transformers_picks_them(prompted: Path, texts: list[str]) -> None:
    engine, reference, some = started(prompted), load_reference(prompted), texts[:40]
    cases: list[tuple[Vectors, npt.NDArray[np.float32]]] = [
        (embed(engine, some, "query"), reference.encode_query(some)),
        # Its own `encode_document` stops at a `document` that it has added, and that is empty.
        (embed(engine, some, "document"), reference.encode(some, prompt_name="passage")),
        (embed(engine, some, "document", prompt_name="topic"), reference.encode_document(some, prompt_name="topic")),
        (embed(engine, some, "query", prompt_name="topic"), reference.encode(some, prompt="cluster by topic: ")),
        (embed(engine, some, "query", prompt="say: "), reference.encode_query(some, prompt="say: ")),
        (embed(engine, some, "query", prompt=""), reference.encode_query(some, prompt="")),
    ]
    for ours, theirs in cases:
        assert lowest_cosine(ours, theirs) >= 0.99999
    assert engine.prompt("query", None, None) == "query: "
    assert engine.prompt("query", "", None) == ""


def test_an_unknown_prompt_name_is_refused_with_the_known_ones(prompted: Path) -> None:
    with pytest.raises(ModelError, match=r"no prompt 'quary' \(it has: document, passage, query, topic\)"):
        started(prompted).prompt("query", None, "quary")


@pytest.mark.parametrize("max_length", [3, 16, 300])
def test_a_jobs_own_max_length_equals_the_models_setting(
    minilm: TorchEngine, reference: SentenceTransformer, texts: list[str], max_length: int
) -> None:
    some = texts[:20] + texts[-5:]
    before = reference.max_seq_length
    try:
        reference.max_seq_length = max_length
        theirs = reference.encode_document(some)
    finally:
        reference.max_seq_length = before
    assert lowest_cosine(embed(minilm, some, max_length=max_length), theirs) >= 0.99999


@pytest.mark.parametrize(("max_length", "message"), [(513, "has 512 positions"), (2, "use at least 3")])
def test_a_max_length_that_the_model_cannot_serve_is_refused(
    minilm: TorchEngine, max_length: int, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        minilm.tokenizer().encode(["text"], max_length)


def test_a_prompt_that_pooling_leaves_out_changes_only_what_it_should(tmp_path: Path, texts: list[str]) -> None:
    folder = bert_mean_without_prompt(tmp_path, resolve_model(MINILM).path, texts)
    engine, some = started(folder), texts[:20]
    theirs = load_reference(folder).encode_query(some, prompt="find this: ")
    np.testing.assert_allclose(embed(engine, some, "query"), theirs, rtol=0, atol=1e-5)
    included = load_reference(folder)
    included.set_pooling_include_prompt(True)
    assert np.abs(included.encode_query(some) - theirs).max() > 1e-3


def test_positions_that_begin_after_the_paddings_are_counted_right(tmp_path: Path, texts: list[str]) -> None:
    engine = started(xlm_roberta(tmp_path, resolve_model(MINILM).path, texts))
    assert engine.info.max_length == 100
    assert np.isfinite(embed(engine, texts[-3:], max_length=128)).all()
    with pytest.raises(ModelError, match="has 128 positions"):
        embed(engine, texts[-3:], max_length=129)


def test_a_model_whose_vectors_bfloat16_would_change_runs_in_float32_and_says_so(
    tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_device, "cpu_has_bfloat16", lambda: True)
    folder = nearly_equal_vectors(tmp_path, resolve_model(MINILM).path, texts)
    engine = TorchEngine(resolve_model(str(folder)), "cpu", "auto")
    assert engine.info.dtype == "float32"
    assert "runs in float32: its vectors in bfloat16 have cosine" in caplog.text
    scale = np.abs(theirs := load_reference(folder).encode_document(texts[:20])).max()
    np.testing.assert_allclose(embed(engine, texts[:20]) / scale, theirs / scale, rtol=0, atol=5e-2)
    with pytest.raises(ModelError, match="cannot run in bfloat16: its vectors in bfloat16 have cosine"):
        TorchEngine(resolve_model(str(folder)), "cpu", "bfloat16")


def test_each_role_takes_its_own_route(tmp_path: Path, texts: list[str]) -> None:
    engine = started(router(tmp_path, resolve_model(MINILM).path, texts))
    queries, documents = embed(engine, texts[:5], "query", prompt=""), embed(engine, texts[:5], "document")
    assert np.abs(queries - documents).max() > 1e-3


def test_vectors_do_not_depend_on_batching(minilm: TorchEngine, texts: list[str]) -> None:
    some = texts[:30] + texts[-2:]
    together, alone = embed(minilm, some, budget=10_000), embed(minilm, some, budget=1)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_warming_up_runs_the_smallest_and_the_fullest_batch_within_the_budget(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started(plain_transformers(tmp_path, resolve_model(MINILM).path, texts))
    costs: list[int] = []
    run = engine.run

    def noting(batch: TokenBatch) -> Results:
        costs.append(batch.longest * len(batch))
        return run(batch)

    monkeypatch.setattr(engine, "run", noting)
    engine.warm_up(1024)
    assert (min(costs), max(costs)) == (3, 1024), "one token between the two that enclose a text, and a full batch"


def test_loading_says_nothing_on_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started(plain_transformers(tmp_path, resolve_model(MINILM).path, []))
    capfd.readouterr()
    started(tmp_path / "model")
    assert capfd.readouterr() == ("", "")


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model(MINILM).path, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.3.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights lack encoder\.layer\.3\.output\.dense\.weight"):
        started(folder)


def test_a_folder_whose_configuration_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model(MINILM).path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 36}))
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        started(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the address space by what /proc says")
def test_a_batch_that_does_not_fit_is_told_apart_and_a_smaller_one_goes_on(tmp_path: Path) -> None:
    folder = plain_transformers(tmp_path, resolve_model(MINILM).path, [])
    engine = f'TorchEngine(resolve_model({str(folder)!r}), "cpu", "float32")'
    assert_it_goes_on_after_a_batch_too_large("torch_engine", engine, room_mib=300, dim=32)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_libraries_that_find_no_memory_ask_for_a_smaller_batch(
    said: str, minilm: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Vectors:
        raise RuntimeError(said)

    monkeypatch.setattr(minilm, "_run", full)
    with pytest.raises(OutOfMemory, match="1 texts of up to 2 tokens: CUDA"):
        minilm.run(TokenBatch(np.array([7, 8], np.int32), np.array([0, 2]), 2, 0, "document"))


@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_a_closed_engine_holds_no_weights(batches: Batches, tmp_path: Path) -> None:
    folder = plain_transformers(tmp_path, resolve_model(MINILM).path, [])
    engine = TorchEngine(resolve_model(str(folder)), "cpu", "bfloat16", batches)
    weights = [weakref.ref(parameter) for parameter in engine.modules.parameters()]
    engine.close()
    assert [weight() for weight in weights if weight() is not None] == []


def test_the_chosen_gpu_is_asked_for_its_precision_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]  # an old card, beside which there is a new one

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[0] == 1)
    assert pick_dtype("auto", torch.device("cuda:1")) == "bfloat16"
    assert pick_dtype("auto", torch.device("cuda:0")) == "float32"


def test_beside_a_gpu_tokenizing_leaves_cores_to_the_threads_that_feed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_device, "cpu_cores", lambda: 16)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    interval = sys.getswitchinterval()
    try:
        share_cores(torch.device("cuda:0"))
        assert (os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"]) == ("true", "13")
        assert sys.getswitchinterval() < 0.001
        assert tokenizer_threads() <= 3
        monkeypatch.setenv("RAYON_NUM_THREADS", "4")
        share_cores(torch.device("cuda:0"))
        assert os.environ["RAYON_NUM_THREADS"] == "4", "a user's own choice"
    finally:
        sys.setswitchinterval(interval)
        monkeypatch.delenv("TOKENIZERS_PARALLELISM")
        monkeypatch.delenv("RAYON_NUM_THREADS")


def test_a_model_without_a_limit_is_not_tried_with_a_text_as_long_as_the_budget(minilm: TorchEngine) -> None:
    model = minilm.text_model
    unlimited = replace(model, input=replace(model.input, max_length=UNLIMITED, limits=Limits(UNLIMITED, 3)))
    shapes = [(len(batch), batch.longest) for batch in warm_up_batches(unlimited, 1 << 18)]
    assert max(longest for _, longest in shapes) == 32_768
    assert (8, 32_768) in shapes, "as many as fill the budget"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "a"}, {"PYTORCH_ALLOC_CONF": "a"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "b"}, {"PYTORCH_CUDA_ALLOC_CONF": "b"}),
    ],
)
def test_gpu_memory_is_taken_in_segments_that_grow_unless_the_user_says_otherwise(
    given: dict[str, str], used: dict[str, str], tmp_path: Path
) -> None:
    program = (
        "import os, sys; from embedstream_worker.engines.torch_environment import set_up; set_up();"
        "assert 'torch' not in sys.modules;"
        "print({name: value for name, value in os.environ.items() if name.startswith('PYTORCH')},"
        " os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTORCH", "TORCH"))}
    environment |= given | {"EMBEDSTREAM_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == f"{used} {tmp_path / 'inductor'}"


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "nonsense"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    with pytest.raises(ModelError, match=f"--device {device}: "):
        TorchEngine(resolve_model(MINILM), device)
