"""What people reported of other tools and their models, tried here: each test carries its reports' names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, hub_of
from huggingface_hub import constants, hf_hub_download, snapshot_download

from embedstream.errors import ModelError
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import resolve_model

NAME = "someone/model"


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def minilm(tmp_path: Path) -> Path:
    """A copy of a whole model folder of sentence-transformers."""
    found = resolve_model("all-MiniLM-L6-v2").path
    folder = tmp_path / "model"
    shutil.copytree(found, folder)
    return folder


@pytest.fixture
def hub(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub that has what lies in the folder."""
    with hub_of(minilm, NAME) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield minilm


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_model_is_fetched_once_and_then_found_without_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = resolve_model(NAME)
    assert fetched.revision == COMMIT
    offline(monkeypatch)
    assert resolve_model(NAME).fingerprint() == fetched.fingerprint() == resolve_model(str(hub)).fingerprint()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("at_once", [True, False])
def test_semble_222_a_cache_that_another_program_filled_in_part_is_refused(
    monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    another_programs = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    if at_once:
        snapshot_download(NAME, allow_patterns=another_programs)
    for file in another_programs:
        hf_hub_download(NAME, file)
    offline(monkeypatch)
    with pytest.raises(ModelError, match=r"only a part of it is in the local cache.*modules.json.*hf download"):
        resolve_model(NAME)


def test_sentence_transformers_2456_a_plain_transformer_says_that_mean_pooling_is_assumed(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub / "modules.json").unlink()
    shutil.rmtree(hub / "1_Pooling")
    assert resolve_model(str(hub)).source.endswith(", mean pooling assumed (it has no modules.json)")
    assert resolve_model(NAME).source.endswith(", mean pooling assumed (it has no modules.json)")
    offline(monkeypatch)
    assert "mean pooling assumed" in resolve_model(NAME).source, "that it has none is known from the hub"


def test_spiceai_12970_a_repository_of_pickled_weights_names_the_flag_and_is_fetched_with_it(hub: Path) -> None:
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"the hub has only pickled weights .*pytorch_model.bin.*--allow-pickle"):
        resolve_model(NAME)
    found = resolve_model(NAME, trust=Trust(pickle=True))
    assert (found.path / "pytorch_model.bin").is_file()
    assert found.needs == Trust(pickle=True)


@pytest.mark.parametrize(
    ("architecture", "is_"),
    [
        ("BertForSequenceClassification", "a reranker or classifier"),
        ("XLMRobertaForSequenceClassification", "a reranker or classifier"),
        ("BertForTokenClassification", "a classifier of tokens"),
        ("RobertaForQuestionAnswering", "a model that answers questions"),
    ],
)
def test_mem0_4033_a_model_for_another_task_is_refused_with_what_it_is_for(
    minilm: Path, architecture: str, is_: str
) -> None:
    config = json.loads((minilm / "config.json").read_text())
    (minilm / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    resolve_model(str(minilm))  # its modules.json says that it pools
    (minilm / "modules.json").unlink()
    with pytest.raises(ModelError, match=rf"config.json: {architecture} is {is_}.*use an embedding model"):
        resolve_model(str(minilm))


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder", "MultiVectorEncoder"])
def test_mem0_4033_another_kind_of_sentence_transformers_is_refused_too(minilm: Path, kind: str) -> None:
    (minilm / "config_sentence_transformers.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=rf"is a {kind} model, which gives .*use an embedding model"):
        resolve_model(str(minilm))


def test_nativ_370_an_index_that_was_left_beside_whole_weights_is_passed_over(minilm: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (minilm / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve_model(str(minilm)).path == minilm


def test_a_git_lfs_pointer_in_the_place_of_weights_says_what_to_run(minilm: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n"
    (minilm / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match=r"a Git LFS pointer, not the weights; run `git lfs pull`"):
        resolve_model(str(minilm))
