from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from engines.embedding import MINILM, Vectors, embed, load_reference, lowest_cosine
from engines.fitting import assert_it_goes_on_after_a_batch_too_large
from engines.model_shapes import Shape, bert_without_prompt, plain_transformers, router

from embedstream.errors import ModelError
from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import TokenBatch, Twin
from embedstream_worker.engines.checking import CheckFailed, compare
from embedstream_worker.engines.fastest import load_fastest
from embedstream_worker.engines.openvino_cache import Cache
from embedstream_worker.engines.openvino_engine import OpenVinoEngine
from embedstream_worker.engines.openvino_trial import EngineUnfit, load_openvino
from embedstream_worker.engines.precision import Precision, streams_for
from embedstream_worker.fingerprint import folder_fingerprint
from embedstream_worker.models import ModelFolder, resolve_model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = bert_without_prompt(tmp_path_factory.mktemp("small"), resolve_model(MINILM).path, [])
    return resolve_model(str(folder))


@pytest.fixture(scope="module")
def minilm() -> Iterator[OpenVinoEngine]:
    engine = opened(resolve_model(MINILM), "float32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def converted(small: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the small model in it; to be copied."""
    folder = tmp_path_factory.mktemp("converted")
    opened(small, "float32", folder).close()
    return folder


def opened(folder: ModelFolder, precision: Precision, cache: Path | None = None) -> OpenVinoEngine:
    """Loaded without a trial, which takes seconds."""
    return OpenVinoEngine(folder, precision, folder_fingerprint(folder.path), Cache(cache))


def test_a_real_models_vectors_equal_sentence_transformers(minilm: OpenVinoEngine, texts: list[str]) -> None:
    some = texts[::5] + texts[-5:]
    theirs = load_reference(resolve_model(MINILM).path).encode_document(some)
    assert lowest_cosine(embed(minilm, some), theirs) >= 0.99999


def test_threads_that_embed_at_once_get_the_vectors_of_one_alone(
    small: ModelFolder, converted: Path, texts: list[str]
) -> None:
    engine = opened(small, "float32", converted)
    tokens = engine.tokenizer().encode(texts[:200], 128)
    batches = [gather_batch(tokens, rows, 0, "document") for rows in cut_batches(tokens.lengths, 512, padded=True)]

    def run(batch: TokenBatch) -> Vectors:
        return engine.run(batch)["dense"]

    alone = [run(batch) for batch in batches]
    with ThreadPoolExecutor(2 * engine.in_flight) as threads:  # more threads than requests: some have to wait
        together = list(threads.map(run, batches * 3))
    for ours, theirs in zip(together, alone * 3, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    engine.close()


def test_a_twin_gives_the_same_while_all_of_the_engines_requests_are_taken(
    minilm: OpenVinoEngine, texts: list[str]
) -> None:
    tokens = minilm.tokenizer().encode(texts[:6], 256)
    (rows,) = cut_batches(tokens.lengths, 4096, padded=True)
    batch = gather_batch(tokens, rows, 0, "query")
    expected, twin = minilm.run(batch)["dense"], minilm.twin()
    assert isinstance(minilm, Twin)
    with ThreadPoolExecutor(4 * minilm.in_flight) as threads:
        bulk = [threads.submit(minilm.run, batch) for _ in range(4 * minilm.in_flight)]
        np.testing.assert_allclose(twin.run(batch)["dense"], expected, rtol=0, atol=1e-6)
        twin.close()
    for each in bulk:  # the engine goes on without it
        np.testing.assert_allclose(each.result()["dense"], expected, rtol=0, atol=1e-6)


def test_files_that_were_spoiled_since_a_model_was_tried_are_found(
    small: ModelFolder, converted: Path, tmp_path: Path
) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path, "document")
    with pytest.raises(CheckFailed, match="cosine"):
        OpenVinoEngine(small, "float32", folder_fingerprint(small.path), Cache(tmp_path), tried=True)


def test_spoiled_files_of_the_graph_for_queries_are_found(folder: Callable[[Shape], Path], tmp_path: Path) -> None:
    routed = resolve_model(str(folder(router)))
    opened(routed, "float32", tmp_path).close()
    spoil(tmp_path, "query")
    with pytest.raises(CheckFailed, match="cosine"):
        OpenVinoEngine(routed, "float32", folder_fingerprint(routed.path), Cache(tmp_path), tried=True)


def spoil(cache: Path, graph: str) -> None:
    """Change weights in the cache's one entry."""
    [entry] = [path for path in cache.iterdir() if path.is_dir()]
    weights = np.fromfile(entry / f"{graph}.bin", np.uint8)
    weights[len(weights) // 100 : -len(weights) // 8 : 5] ^= 0xC0  # in the table of words
    weights.tofile(entry / f"{graph}.bin")


def test_vectors_are_the_callers_own(minilm: OpenVinoEngine, texts: list[str]) -> None:
    first = embed(minilm, texts[:4])
    kept = first.copy()
    embed(minilm, texts[4:8])
    np.testing.assert_array_equal(first, kept)


def test_a_worker_needs_no_torch_because_a_process_of_its_own_converts(small: ModelFolder) -> None:
    program = f"""
import sys
from embedstream_worker.engines import EngineOptions, load_engine

engine = load_engine(EngineOptions({str(small.path)!r}, engine="openvino"))
engine.warm_up(256)
print(sorted({{"torch", "transformers", "sentence_transformers", "nncf"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout == "[]\n", run.stderr


@pytest.mark.parametrize("damage", ["graph", "description", "missing"])
def test_a_damaged_cache_is_made_anew(
    small: ModelFolder, converted: Path, damage: str, tmp_path: Path, texts: list[str]
) -> None:
    before = embed(opened(small, "float32", converted), texts[:5])
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    [entry] = [path for path in tmp_path.iterdir() if path.is_dir()]
    names = {"graph": "document.bin", "description": "model.json"}
    if damage == "missing":
        (entry / "document.xml").unlink()
    else:
        path = entry / names[damage]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    np.testing.assert_array_equal(embed(opened(small, "float32", tmp_path), texts[:5]), before)
    assert (entry / "document.xml").stat().st_size > 0
    reopened = (entry / "model.json").stat().st_mtime_ns
    opened(small, "float32", tmp_path)
    assert (entry / "model.json").stat().st_mtime_ns == reopened  # whole again, and kept


def test_two_workers_may_convert_the_same_model_at_once(small: ModelFolder, tmp_path: Path, texts: list[str]) -> None:
    program = f"""
import os
from pathlib import Path
from embedstream_worker.engines import openvino_conversion  # once, for both
from embedstream_worker.engines.openvino_cache import Cache
from embedstream_worker.engines.openvino_engine import OpenVinoEngine
from embedstream_worker.models import resolve_model

other = os.fork()
OpenVinoEngine(resolve_model({str(small.path)!r}), "float32", "0" * 32, Cache(Path({str(tmp_path)!r})))
assert not other or os.waitpid(other, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], timeout=240, check=True)
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    engine = OpenVinoEngine(small, "float32", "0" * 32, Cache(tmp_path))
    assert np.isfinite(embed(engine, texts[:3])).all()


def test_a_cache_that_cannot_be_written_costs_time_alone(
    small: ModelFolder, tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    engine = opened(small, "float32", tmp_path / "file" / "cache")
    assert np.isfinite(embed(engine, texts[:3])).all()
    assert "cannot be written" in caplog.text
    engine.close()


def test_vectors_that_are_not_the_models_are_refused_and_torch_takes_over(
    small: ModelFolder, converted: Path, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the references are swapped: to the check that looks like a graph that computes something else."""
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path))
    shutil.copytree(converted, tmp_path / "openvino")
    [entry] = [path for path in (tmp_path / "openvino").iterdir() if path.is_dir()]
    with np.load(entry / "references.npz") as arrays:
        swapped = {name: np.ascontiguousarray(arrays[name][::-1]) for name in arrays.files}
    size = (entry / "references.npz").stat().st_size
    np.savez(entry / "references.npz", allow_pickle=False, **swapped)
    assert (entry / "references.npz").stat().st_size == size
    with pytest.raises(EngineUnfit, match=r"vectors in float32 have cosine .* below 0\.99999"):
        load_openvino(small, "float32")
    engine = load_fastest(small, "cpu", "float32")
    assert engine.info.engine == "torch"
    theirs = load_reference(small.path).encode_document(texts[:9])
    assert lowest_cosine(embed(engine, texts[:9]), theirs) >= 0.99999


def test_a_model_that_cannot_be_loaded_is_one_sentence_and_not_remembered(small: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small.path, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": 36'))
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_openvino(resolve_model(str(folder)), "float32", Cache(tmp_path / "cache"))
    assert not isinstance(caught.value, EngineUnfit)
    assert list((tmp_path / "cache").glob("*.verdict")) == []


def test_int8_is_the_same_space_on_every_worker_that_calibrates(
    small: ModelFolder, tmp_path: Path, texts: list[str]
) -> None:
    first, second = opened(small, "int8", tmp_path / "a"), opened(small, "int8", tmp_path / "b")
    assert first.info.fingerprint == second.info.fingerprint
    assert first.info.fingerprint.startswith(f"{folder_fingerprint(small.path)}-int8-")
    ours = embed(first, texts[:60])
    np.testing.assert_array_equal(ours, embed(second, texts[:60]))
    theirs = load_reference(small.path).encode_document(texts[:60])
    assert 0.8 <= lowest_cosine(ours, theirs) < 0.99999


def test_int8_vectors_of_a_real_model_are_near_those_in_float32(minilm: OpenVinoEngine, texts: list[str]) -> None:
    some = texts[::7] + texts[-5:]
    rounded = opened(resolve_model(MINILM), "int8")
    agreement = compare([embed(rounded, some)], [embed(minilm, some)])
    rounded.close()
    assert agreement.lowest >= 0.99
    assert agreement.mean >= 0.998


def test_int8_of_a_model_that_openvino_does_not_run_is_refused_not_replaced(tmp_path: Path) -> None:
    folder = plain_transformers(tmp_path, resolve_model(MINILM).path, [])
    with pytest.raises(ModelError, match="--dtype int8: the device is not a CPU; use another dtype"):
        load_fastest(resolve_model(str(folder)), "cuda:0", "int8")
    with pytest.raises(ModelError, match="--dtype int8: torch does not compute in it"):
        load_engine(EngineOptions(str(folder), engine="torch", dtype="int8"))


def test_another_device_than_the_cpu_is_refused_for_openvino() -> None:
    with pytest.raises(ModelError, match="--device cuda:0: openvino runs on the CPU"):
        load_engine(EngineOptions(MINILM, engine="openvino", device="cuda:0"))


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the address space by what /proc says")
def test_a_batch_that_does_not_fit_is_told_apart_and_a_smaller_one_goes_on(small: ModelFolder) -> None:
    engine = f'load_openvino(resolve_model({str(small.path)!r}), "float32")'
    assert_it_goes_on_after_a_batch_too_large("openvino_trial", engine, room_mib=400, dim=24)


def test_closing_twice_is_closing_once(small: ModelFolder, converted: Path) -> None:
    engine = opened(small, "float32", converted)
    engine.close()
    engine.close()


@pytest.mark.parametrize(("cores", "streams"), [(1, 1), (2, 2), (4, 2), (8, 2), (16, 4), (64, 16)])
def test_streams_grow_with_the_cores(cores: int, streams: int) -> None:
    assert streams_for(cores) == streams
