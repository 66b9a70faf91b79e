from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from engines.carrying import carry
from engines.embedding import MINILM, Vectors, embed, load_reference, lowest_cosine
from engines.fitting import assert_it_goes_on_after_a_batch_too_large
from engines.model_shapes import bert_cls, bert_mean_without_prompt, bert_without_prompt

from embedstream.errors import ModelError
from embedstream.machine import cpu_cores
from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.onnx_engine import OnnxEngine
from embedstream_worker.engines.openvino_cache import Cache
from embedstream_worker.engines.precision import streams_for
from embedstream_worker.models import ModelFolder, resolve_model

Carry = Callable[[Path], None]


pytestmark = pytest.mark.filterwarnings("ignore")  # tracing and exporting warn of what is known


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = bert_without_prompt(tmp_path_factory.mktemp("small"), resolve_model(MINILM).path, [])
    return resolve_model(str(folder))


@pytest.fixture(scope="module")
def engine(small: ModelFolder) -> Iterator[OnnxEngine]:
    made = started(small, threads=1, runs=2)
    yield made
    made.close()


def started(
    folder: ModelFolder,
    cache: Path | None = None,
    threads: int | None = None,
    runs: int | None = None,
    affinity: tuple[int, ...] = (),
) -> OnnxEngine:
    return OnnxEngine(
        folder, "cpu", cache=Cache(cache) if cache else None, threads=threads, runs=runs, affinity=affinity
    )


def assert_right(engine: OnnxEngine, folder: ModelFolder, texts: list[str]) -> None:
    """With a prompt that pooling leaves out, and without."""
    reference = load_reference(folder.path)
    for name in ("topic", "document"):
        theirs = reference.encode(texts, prompt_name=name)
        assert lowest_cosine(embed(engine, texts, prompt_name=name), theirs) >= 0.99999


@pytest.mark.parametrize("shape", [bert_without_prompt, bert_mean_without_prompt], ids=lambda shape: shape.__name__)
def test_a_carried_transformer_is_used_as_it_is_with_the_folders_own_tail(
    shape: Callable[[Path, Path, list[str]], Path],
    tmp_path: Path,
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    folder = resolve_model(str(shape(tmp_path, resolve_model(MINILM).path, texts)))
    carry(folder.path, folder.path)
    engine = started(folder, tmp_path / "cache")
    assert "model.onnx as it is, followed by the model's own tail" in caplog.text
    [kept] = (tmp_path / "cache").glob("*/document.onnx")
    weights = folder.path / "model.safetensors"
    assert kept.stat().st_size < weights.stat().st_size / 10  # nothing of the transformer was exported
    assert_right(engine, folder, texts[:30])


def test_a_carried_model_that_gives_vectors_of_texts_needs_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, texts: list[str]
) -> None:
    caplog.set_level("INFO")
    folder = resolve_model(str(bert_cls(tmp_path, resolve_model(MINILM).path, texts)))
    carry(folder.path, folder.path, "sentence_embedding")
    engine = started(folder, tmp_path / "cache")
    assert "model.onnx as it is" in caplog.text
    theirs = load_reference(folder.path).encode(texts[:30])
    assert lowest_cosine(embed(engine, texts[:30]), theirs) >= 0.99999


def of_another_model(folder: Path) -> None:
    weights = transformers.AutoModel.from_pretrained(folder)
    for parameter in weights.parameters():
        torch.nn.init.normal_(parameter)
    weights.save_pretrained(folder.parent / "random")
    carry(folder, folder.parent / "random")


def cut_off(folder: Path) -> None:
    carry(folder, folder)
    path = folder / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])


def without_tokens(folder: Path) -> None:
    carry(folder, folder, "pooler_output")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (of_another_model, "have cosine"),
        (cut_off, "cannot be loaded"),
        (without_tokens, "none of the outputs last_hidden_state"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_carried_graph_that_is_not_the_model_is_exported_anew(
    small: ModelFolder,
    damage: Carry,
    reason: str,
    tmp_path: Path,
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(small.path, tmp_path / "model")
    folder = resolve_model(str(tmp_path / "model"))
    damage(folder.path)
    engine = started(folder, tmp_path / "cache")
    [line] = [record.getMessage() for record in caplog.records if "is not used" in record.getMessage()]
    assert str(folder.path / "onnx" / "model.onnx") in line
    assert reason in line
    assert_right(engine, folder, texts[:30])


def test_a_second_start_reads_what_the_first_exported_and_needs_no_torch(
    small: ModelFolder, tmp_path: Path, texts: list[str]
) -> None:
    first = started(small, tmp_path)
    [kept] = tmp_path.glob("*/document.onnx")
    written = kept.stat().st_mtime_ns
    program = f"""
import sys
from pathlib import Path
from embedstream_worker.engines.onnx_engine import OnnxEngine
from embedstream_worker.engines.openvino_cache import Cache
from embedstream.machine import cpu_cores
from embedstream_worker.engines.precision import streams_for
from embedstream_worker.models import resolve_model

engine = OnnxEngine(resolve_model({str(small.path)!r}), "cpu", cache=Cache(Path({str(tmp_path)!r})))
engine.warm_up(256)
print(sorted({{"torch", "transformers", "sentence_transformers", "openvino"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout == "[]\n", run.stderr
    np.testing.assert_array_equal(embed(first, texts[:5]), embed(started(small, tmp_path), texts[:5]))
    assert kept.stat().st_mtime_ns == written


def test_vectors_that_are_not_the_models_are_refused(small: ModelFolder, tmp_path: Path) -> None:
    """Here the references are swapped: to the check that looks like a graph that computes something else."""
    started(small, tmp_path).close()
    [kept] = tmp_path.glob("*/references.npz")
    with np.load(kept) as arrays:
        swapped = {name: np.ascontiguousarray(arrays[name][::-1]) for name in arrays.files}
    np.savez(kept, allow_pickle=False, **swapped)
    with pytest.raises(ModelError, match=r"vectors in float32 have cosine .* below 0\.99999\); use --engine torch"):
        started(small, tmp_path)


def test_buffers_are_given_back_after_a_batch_that_fails_and_the_next_one_is_right(
    engine: OnnxEngine, texts: list[str]
) -> None:
    before = embed(engine, texts[:20])
    assert engine.held_bytes > 0
    rows, tokens = 50, 400
    too_long = TokenBatch(  # the model has 128 positions
        np.full(rows * tokens, 7, np.int32), np.arange(rows + 1) * tokens, tokens, 0, "document"
    )
    for _ in range(engine.in_flight):
        with pytest.raises(Exception, match="Non-zero status code"):
            engine.run(too_long)
    assert engine.held_bytes == 0
    np.testing.assert_array_equal(embed(engine, texts[:20]), before)


def test_buffers_grow_to_the_largest_batch_and_no_further(engine: OnnxEngine, texts: list[str]) -> None:
    for _ in range(3):
        embed(engine, texts, budget=4096)
    # Ids, mask, mask for pooling and token types, of 8 bytes each.
    assert 0 < engine.held_bytes <= engine.in_flight * 4096 * 4 * 8


def test_threads_that_embed_at_once_get_the_vectors_of_one_alone(engine: OnnxEngine, texts: list[str]) -> None:
    tokens = engine.tokenizer().encode(texts[:200], 128)
    batches = [gather_batch(tokens, rows, 0, "document") for rows in cut_batches(tokens.lengths, 512, padded=True)]

    def run(batch: TokenBatch) -> Vectors:
        return engine.run(batch)["dense"]

    alone = [run(batch) for batch in batches]
    with ThreadPoolExecutor(2 * engine.in_flight) as threads:  # more threads than slots: some have to wait
        together = list(threads.map(run, batches * 3))
    for ours, theirs in zip(together, alone * 3, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' processors from /proc")
def test_threads_of_a_run_stay_on_the_processors_they_are_given(small: ModelFolder, texts: list[str]) -> None:
    def places() -> list[str]:
        statuses = [path.read_text() for path in Path("/proc/self/task").glob("*/status")]
        return [line.split()[1] for text in statuses for line in text.splitlines() if "Cpus_allowed_list" in line]

    before = places().count("1")
    engine = started(small, threads=2, runs=1, affinity=(1,))
    assert np.isfinite(embed(engine, texts[:9])).all()
    assert places().count("1") == before + 1
    engine.close()


def test_runs_and_threads_share_the_cores_unless_they_are_given(small: ModelFolder) -> None:
    assert started(small).in_flight == streams_for(cpu_cores())
    assert started(small, threads=1).in_flight == cpu_cores()
    assert started(small, threads=1, runs=3).in_flight == 3


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the address space by what /proc says")
def test_a_batch_that_does_not_fit_is_told_apart_and_a_smaller_one_goes_on(small: ModelFolder) -> None:
    engine = f'OnnxEngine(resolve_model({str(small.path)!r}), "cpu", runs=1)'
    assert_it_goes_on_after_a_batch_too_large("onnx_engine", engine, room_mib=400, dim=24)


def test_what_it_cannot_do_is_one_sentence(small: ModelFolder) -> None:
    with pytest.raises(ModelError, match="--dtype bfloat16: onnxruntime computes in float32"):
        load_engine(EngineOptions(str(small.path), engine="onnxruntime", dtype="bfloat16"))
    with pytest.raises(ModelError, match="--device mps: onnxruntime runs on cpu or cuda:N"):
        load_engine(EngineOptions(str(small.path), engine="onnxruntime", device="mps"))
    with pytest.raises(ModelError, match="--threads 2: only --engine onnxruntime takes it"):
        load_engine(EngineOptions(str(small.path), engine="torch", threads=2))
    with pytest.raises(ModelError, match="3 processors for the 1 further threads of a run"):
        OnnxEngine(small, "cpu", threads=2, affinity=(0, 1, 2))


def test_closing_twice_is_closing_once(small: ModelFolder) -> None:
    engine = started(small)
    engine.close()
    engine.close()
