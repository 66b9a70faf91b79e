"""What people reported of other tools and their models, tried here: each test carries its reports' names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from huggingface_hub import constants, hf_hub_download, snapshot_download
from lab.hub import COMMIT, hub_of
from tokenizers.models import WordLevel

from embedstream.errors import ModelError
from embedstream_worker.engines.base import Role
from embedstream_worker.engines.text_input import InputKind, TextInput, TextModel
from embedstream_worker.families import card_prompts
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import resolve_model
from embedstream_worker.purpose import Purpose
from embedstream_worker.tokenizing import Limits

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
    with pytest.raises(ModelError, match=rf"config.json: {architecture} is {is_}.*use another model"):
        resolve_model(str(minilm))


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "XLMRobertaForSequenceClassification"])
def test_mem0_4033_a_reranker_or_classifier_is_never_taken_for_an_embedding_model(
    minilm: Path, architecture: str
) -> None:
    config = json.loads((minilm / "config.json").read_text())
    (minilm / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    (minilm / "modules.json").unlink()
    found = resolve_model(str(minilm))
    assert found.purpose is Purpose.PAIRS
    assert "mean pooling" not in found.source


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder", "MultiVectorEncoder"])
def test_mem0_4033_another_kind_of_sentence_transformers_is_known_by_what_it_says_of_itself(
    minilm: Path, kind: str
) -> None:
    (minilm / "config_sentence_transformers.json").write_text(json.dumps({"model_type": kind}))
    assert resolve_model(str(minilm)).purpose == kind


def test_nativ_370_an_index_that_was_left_beside_whole_weights_is_passed_over(minilm: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (minilm / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve_model(str(minilm)).path == minilm


def test_a_git_lfs_pointer_in_the_place_of_weights_says_what_to_run(minilm: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n"
    (minilm / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match=r"a Git LFS pointer, not the weights; run `git lfs pull`"):
        resolve_model(str(minilm))


def test_a_git_lfs_pointer_in_the_place_of_a_tokenizer_says_what_to_run(minilm: Path) -> None:
    (minilm / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 466247\n")
    with pytest.raises(ModelError, match=r"tokenizer\.json: a Git LFS pointer, not the file itself; run `git lfs"):
        resolve_model(str(minilm))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "this is an adapter: merge it into its base model"),
        ("model-q4.gguf", r"its weights are for llama\.cpp"),
        ("onnx/decoder.onnx", "its weights are for ONNX Runtime alone"),
        ("notes.json", "fetch the model again"),
    ],
)
def test_spiceai_12970_a_folder_with_other_weights_alone_says_so(minilm: Path, name: str, message: str) -> None:
    (minilm / "model.safetensors").unlink()
    (minilm / name).parent.mkdir(exist_ok=True)
    (minilm / name).write_text("{}")
    with pytest.raises(ModelError, match=rf"model\.safetensors: missing; {message}"):
        resolve_model(str(minilm))


def of_names(**prompts: str) -> TextModel:
    source = TextInput(InputKind.FLAT, tokenizers.Tokenizer(WordLevel({"a": 0}, unk_token="a")), Limits(9, 1), 9)
    return TextModel("m", source, prompts, None, {"document": 2, "query": 2}, True, False)


@pytest.mark.parametrize(
    ("prompts", "document", "query"),
    [
        ({"query": "Q ", "passage": "P ", "document": ""}, "P ", "Q "),  # as sentence-transformers loads the first two
        ({"query": "Q ", "document": "D ", "passage": "P "}, "D ", "Q "),
        ({"query": "", "document": "", "search_query": "Q ", "search_document": "P "}, "P ", "Q "),
        ({"query": "", "document": "", "Retrieval-query": "Q ", "retrieval.passage": "P "}, "P ", "Q "),
        ({"question": "Q ", "doc": "P "}, "P ", "Q "),
        ({"query": "Q ", "text": "P "}, "P ", "Q "),
        ({"query": "Q ", "document": "", "classification": "C "}, "", "Q "),
    ],
)
def test_fastembed_251_each_role_takes_its_sides_prompt_under_any_of_the_names_in_use(
    prompts: dict[str, str], document: str, query: str
) -> None:
    model = of_names(**prompts)
    assert (model.prompt("document", None, None), model.prompt("query", None, None)) == (document, query)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [{"query": "Q "}, {"query": "Q ", "document": "D "}, {}])
def test_sentence_transformers_own_names_give_what_it_puts_in_front(prompts: dict[str, str], minilm: Path) -> None:
    (minilm / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    from sentence_transformers import SentenceTransformer  # loading it takes seconds

    theirs = SentenceTransformer(str(minilm), device="cpu")
    ours = of_names(**{name: prompt or "" for name, prompt in theirs.prompts.items()})
    sides: list[tuple[Any, Role]] = [(theirs.encode_query, "query"), (theirs.encode_document, "document")]
    for encode, role in sides:
        np.testing.assert_array_equal(encode(["x"]), theirs.encode(["x"], prompt=ours.prompt(role, None, None)))


@pytest.mark.parametrize(
    ("name", "model_type", "document", "query"),
    [
        ("intfloat/e5-base-v2", "bert", "passage: ", "query: "),
        ("intfloat/multilingual-e5-small", "xlm-roberta", "passage: ", "query: "),
        ("intfloat/multilingual-e5-large-instruct", "xlm-roberta", None, "Instruct: "),
        ("nomic-ai/nomic-embed-text-v1.5", "nomic_bert", "search_document: ", "search_query: "),
        ("BAAI/bge-small-en-v1.5", "bert", None, "Represent this sentence"),
        ("BAAI/bge-small-zh-v1.5", "bert", None, "为这个句子"),
        ("BAAI/bge-m3", "xlm-roberta", None, None),
        ("Qwen/Qwen3-Embedding-0.6B", "qwen3", None, "Instruct: "),
        ("Alibaba-NLP/gte-Qwen2-1.5B-instruct", "qwen2", None, "Instruct: "),
        ("thenlper/gte-base", "bert", None, None),
        ("Snowflake/snowflake-arctic-embed-l-v2.0", "xlm-roberta", None, "query: "),
        ("sentence-transformers/all-MiniLM-L6-v2", "bert", None, None),
        ("someone/e5-basement", "bert", None, None),
        ("someone/e5-base-v2", "llama", None, None),  # of the name alone
    ],
)
def test_uv_scripts_a_family_is_known_by_name_and_config(
    tmp_path: Path, name: str, model_type: str, document: str | None, query: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    cached = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text(json.dumps({"model_type": model_type}))
    for found in card_prompts(name, tmp_path), card_prompts(str(cached), cached):
        assert found.get("document") == document
        assert (found.get("query") or "").startswith(query or "\0") or query is None is found.get("query")
