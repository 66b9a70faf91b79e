"""Model folders made to run code, to fetch it, or to have more read than they hold: all are refused in one sentence."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from e2e.harness import run
from engines.embedding import MINILM, load_reference
from engines.model_shapes import bert_mean_without_prompt
from sentence_transformers.util import import_from_string
from sentence_transformers.util.deprecated_import import DEPRECATED_MODULE_PATHS
from transformers.integrations import hub_kernels

from embedstream.errors import ModelError
from embedstream_worker.engines.torch_engine import TorchEngine
from embedstream_worker.fingerprint import DECIDING_SUFFIXES
from embedstream_worker.model_folder import Trust
from embedstream_worker.model_settings import MODULE_KINDS
from embedstream_worker.models import resolve_model

Attack = Callable[[Path], None]
"""Makes a model folder an evil one."""


class Runs:
    """A pickle of it makes the folder `ran`, next to the model's."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._marker,)


@pytest.fixture(scope="module")
def innocent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_mean_without_prompt(tmp_path_factory.mktemp("innocent"), resolve_model(MINILM).path, [])


@pytest.fixture
def folder(innocent: Path, tmp_path: Path) -> Path:
    return shutil.copytree(innocent, tmp_path / "model")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What is there once evil code has run."""
    return tmp_path / "ran"


def change(path: Path, **settings: Any) -> None:
    """Add to a JSON object in a file, or make one."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | settings))


def list_module(folder: Path, type_name: str, path: str) -> None:
    """Add a module to a model."""
    listed = json.loads((folder / "modules.json").read_text())
    listed.append({"idx": len(listed), "name": str(len(listed)), "path": path, "type": type_name})
    (folder / "modules.json").write_text(json.dumps(listed))


def pickle_weights(folder: Path, name: str = "pytorch_model.bin") -> None:
    """Put a pickle in the place of a folder's weights that runs whoever loads it without restriction."""
    torch.save({"weight": Runs(folder.parents[0] / "ran")}, folder / name)
    (folder / "model.safetensors").unlink()


def nest(folder: Path, into: str) -> Path:
    """A copy of the model below itself, whose weights are an evil pickle that its settings have unpickled."""
    inner = folder / into
    shutil.copytree(folder, inner, ignore=shutil.ignore_patterns(into.partition("/")[0]))
    (inner / "model.safetensors").unlink()
    torch.save({"weight": Runs(folder.parent / "ran")}, inner / "pytorch_model.bin")
    change(inner / "sentence_bert_config.json", model_args={"weights_only": False, "dtype": "auto"})
    change(inner / "config.json", dtype=None)  # so that the type is read off the weights
    return inner


def route(folder: Path, router_type: str, settings: str, inner_type: str) -> None:
    """Put a router in front of the model, with a whole model below it."""
    router = folder / "route"
    nest(folder, "route/inner")
    change(router / settings, types={"inner": inner_type}, structure={"document": ["inner"]}, parameters={})
    entry = {"idx": 0, "name": "0", "path": "route", "type": router_type}
    (folder / "modules.json").write_text(json.dumps([entry]))


WHOLE_MODELS = (
    "sentence_transformers.SentenceTransformer",
    "sentence_transformers.SentenceTransformer.SentenceTransformer",
    "sentence_transformers.sentence_transformer.model.SentenceTransformer",
    "sentence_transformers.CrossEncoder",
    "sentence_transformers.sparse_encoder.SparseEncoder",
    "sentence_transformers.multi_vector_encoder.MultiVectorEncoder",
    "sentence_transformers.models.WordEmbeddings",
    "sentence_transformers.models.CLIPModel",
    "sentence_transformers.models.BoW",
    "sentence_transformers.util.import_from_string",
)
ROUTERS = (
    ("sentence_transformers.models.Router", "router_config.json"),
    ("sentence_transformers.base.modules.router.Router", "router_config.json"),
    ("sentence_transformers.models.Asym", "config.json"),
    ("sentence_transformers.models.Asym.Asym", "router_config.json"),
)


@pytest.mark.parametrize(("router_type", "settings"), ROUTERS)
@pytest.mark.parametrize("inner", WHOLE_MODELS)
def test_a_router_has_no_whole_model_in_it(
    folder: Path, marker: Path, router_type: str, settings: str, inner: str
) -> None:
    route(folder, router_type, settings, inner)
    with pytest.raises(ModelError, match=rf"{settings}: module type {inner} is not supported"):
        resolve_model(str(folder), trust=Trust(code=True, pickle=True))
    assert not marker.exists()


@pytest.mark.parametrize("inner", WHOLE_MODELS)
def test_a_model_has_no_whole_model_in_it(folder: Path, inner: str) -> None:
    nest(folder, "inner")
    list_module(folder, inner, "inner")
    with pytest.raises(ModelError, match=f"module type {inner} is not supported"):
        resolve_model(str(folder))


def test_the_library_alone_would_run_a_nested_models_pickle_and_embed_submit_does_not(
    folder: Path, marker: Path, tmp_path: Path
) -> None:
    route(folder, *ROUTERS[0], WHOLE_MODELS[0])
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "text": "one"}\n')
    ended = run("embed-submit", corpus, "--model", folder, "-o", tmp_path / "out")
    assert ended.returncode not in (0, 3)
    assert "is not supported; use a model made of" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not marker.exists()
    with contextlib.suppress(Exception):
        load_reference(folder)
    assert marker.exists()


def test_a_router_of_pickles_is_refused_at_any_depth(folder: Path, marker: Path) -> None:
    """What the old name of the router's settings hid, and what a second router hides from who looks at one."""
    inner = folder / "a" / "b"
    shutil.copytree(folder, inner / "c")
    pickle_weights(inner / "c")
    for at, below in (folder / "a", "b"), (inner, "c"):
        kind = "Asym" if below == "b" else "Transformer"
        change(at / "config.json", types={below: f"sentence_transformers.models.{kind}"}, structure={}, parameters={})
    list_module(folder, "sentence_transformers.models.Asym", "a")
    with pytest.raises(ModelError, match=r"a/b/c/pytorch_model\.bin: pickled weights are not loaded"):
        resolve_model(str(folder))
    assert not marker.exists()


def test_routers_in_a_circle_are_refused(folder: Path) -> None:
    (folder / "r").mkdir()
    change(folder / "r" / "router_config.json", types={".": "sentence_transformers.models.Router"})
    list_module(folder, "sentence_transformers.models.Router", "r")
    with pytest.raises(ModelError, match="listed twice"):
        resolve_model(str(folder))


KERNEL = "attacker/kernel"
ARGUMENTS: list[tuple[str, object]] = [
    ("weights_only", False),
    ("use_safetensors", False),
    ("attn_implementation", KERNEL),
    ("attn_implementation", "flash_attention_2"),
    ("allow_all_kernels", True),
    ("use_kernels", True),
    ("kernel_config", {"kernel_mapping": {}}),
    ("experts_implementation", KERNEL),
    ("gguf_file", "model.gguf"),
    ("adapter_kwargs", {"_adapter_model_path": "/tmp"}),
    ("adapter_name", "evil"),
    ("quantization_config", {"quant_method": "torchao"}),
    ("variant", "evil"),
    ("subfolder", "inner"),
    ("device_map", "auto"),
    ("code_revision", "evil"),
    ("tokenizer_type", "rag"),
    ("config", "/tmp"),
    ("_configuration_file", "evil.json"),
    ("dtype", {"": "float32"}),
]
SPELLINGS = ("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("name", "value"), ARGUMENTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ARGUMENTS)])
def test_arguments_of_loading_are_not_for_a_folder_to_choose(
    folder: Path, spelling: str, name: str, value: object
) -> None:
    settings = folder / "sentence_bert_config.json"
    change(settings, **{spelling: {name: value}})
    with pytest.raises(
        ModelError, match=rf"sentence_bert_config\.json: {spelling}\.{name}.* is not for a model folder"
    ):
        resolve_model(str(folder))


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_settings_are_read_by_all_their_names(folder: Path, kind: str) -> None:
    (folder / "sentence_bert_config.json").rename(folder / f"sentence_{kind}_config.json")
    resolve_model(str(folder))
    change(folder / f"sentence_{kind}_config.json", model_args={"weights_only": False})
    with pytest.raises(ModelError, match="weights_only is not for a model folder to choose"):
        resolve_model(str(folder))


CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("sentence_bert_config.json", {"tokenizer_name_or_path": "attacker/tokenizer"}),
    ("sentence_bert_config.json", {"transformer_task": "retrieval"}),
    ("sentence_bert_config.json", {"modality_config": {"text": {"method": "save_pretrained"}}}),
    ("sentence_bert_config.json", {"modality_config": ["text"]}),
    ("sentence_bert_config.json", {"model_args": ["weights_only"]}),
    ("config_sentence_transformers.json", {"model_type": "AnotherEncoder"}),
    ("config.json", {"attn_implementation": KERNEL}),
    ("config.json", {"_attn_implementation": KERNEL}),
    ("config.json", {"_attn_implementation": {"": "eager", "text_config": KERNEL}}),
    ("config.json", {"text_config": {"_attn_implementation": f"{KERNEL}@main:forward"}}),
    ("config.json", {"per_layer_config": [{"attn_implementation": f"paged|{KERNEL}"}]}),
    ("config.json", {"attn_implementation": "flash_attention_2"}),
    ("config.json", {"experts_implementation": "sonicmoe"}),
    ("config.json", {"quantization_config": {"quant_method": "quark"}}),
    ("config.json", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}),
    ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}}),
    ("config.json", {"transformers_weights": "adapter_model.bin"}),
    ("config.json", {"configuration_files": ["config.4.0.0.json"]}),
    ("config.json", {"fusion_config": {"a": True}}),
    ("config.json", {"distributed_config": {"tp_size": 2}}),
    ("config.json", {"use_pretrained_backbone": True, "backbone": "attacker/backbone"}),
    ("config.json", {"pretrained_cfg": {"architecture": "evil"}}),
    ("config.json", {"model_type": "timm_wrapper", "architecture": "resnet18"}),
    ("config.json", {"text_config": {"model_type": "rag"}}),
    ("CONFIG.json", {"attn_implementation": KERNEL}),
    ("\u017fentence_bert_config.json", {"model_args": {"weights_only": False}}),
    ("config.json", {"tokenizer_class": "AutoModel"}),
    ("config.json", {"tokenizer_class": ["BertTokenizer"]}),
    ("config.json", {"processor_class": "BarkProcessor"}),
    ("tokenizer_config.json", {"tokenizer_class": "RagRetriever"}),
    ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}),
    ("tokenizer_config.json", {"tokenizer_class": "AutoTokenizer"}),
    ("tokenizer_config.json", {"tokenizer_class": "pipeline"}),
    ("tokenizer_config.json", {"processor_class": "BarkProcessor"}),
    ("tokenizer_config.json", {"sudachi_kwargs": {"sudachi_config_path": "evil.json"}}),
    ("tokenizer_config.json", {"vocab": "/etc/passwd"}),
    ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
    ("tokenizer_config.json", {"merges": "/etc/passwd"}),
    ("tokenizer_config.json", {"spm_file": "/etc/passwd"}),
    ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}),
    ("tokenizer_config.json", {"tokenizer_object": {"a": 1}}),
    ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "/etc/passwd"}}),
    ("tokenizer_config.json", {"sp_model_kwargs": {"enable_sampling": True, "model_proto": "x"}}),
    ("tokenizer_config.json", {"mecab_kwargs": {"mecab_option": "-r /etc/passwd -d /tmp"}}),
    ("tokenizer_config.json", {"jumanpp_kwargs": {"a": "b"}}),
    ("tokenizer_config.json", {"any_other_program": {"options": ["-r", "/etc/passwd"]}}),
    ("tokenizer_config.json", {"lexicon_path": "/etc/passwd"}),
    ("tokenizer_config.json", {"dictionary_dir": "/etc"}),
    ("config.json", {"num_hidden_layers": 30_000}),
    ("config.json", {"num_hidden_layers": 1e300}),
    ("config.json", {"text_config": {"encoder_layers": 10**9}}),
    ("config.json", {"num_labels": 10**9}),
    ("config.json", {"num_local_experts": 10**9}),
    ("special_tokens_map.json", {"tokenizer_file": "/etc/passwd"}),
    ("special_tokens_map.json", {"vocab": "/etc/passwd"}),
    ("special_tokens_map.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ("processor_config.json", {"processor_class": "DiaProcessor"}),
    ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "/tmp"}}),
    ("preprocessor_config.json", {"processor_class": "CLIPProcessor"}),
    ("video_preprocessor_config.json", {"processor_class": "Evil"}),
    ("1_Pooling/config.json", {"activation_function": "os.system"}),
    ("1_Pooling/config.json", {"activation_function": "torch.hub.load"}),
    ("1_Pooling/config.json", {"activation_function": "torch.nn.modules.activation.os.system"}),
]


@pytest.mark.parametrize(("file", "settings"), CHOICES, ids=[f"{file}-{i}" for i, (file, _) in enumerate(CHOICES)])
def test_settings_that_reach_beyond_the_folder_are_refused(folder: Path, file: str, settings: dict[str, Any]) -> None:
    change(folder / file, **settings)
    with pytest.raises(ModelError, match=rf"{file}: .* is not for a model folder to choose"):
        resolve_model(str(folder))


ALLOWED: list[tuple[str, dict[str, Any]]] = [
    ("sentence_bert_config.json", {"model_args": {"dtype": "bfloat16", "attn_implementation": "sdpa"}}),
    ("sentence_bert_config.json", {"tokenizer_args": {"padding_side": "right", "model_max_length": 64}}),
    ("sentence_bert_config.json", {"config_args": {"output_hidden_states": False, "trust_remote_code": True}}),
    ("config.json", {"quantization_config": None, "_attn_implementation": "eager", "tokenizer_class": "BertTokenizer"}),
    ("tokenizer_config.json", {"tokenizer_class": "BertTokenizerFast", "special_tokens_map_file": "/root/x.json"}),
    ("config.json", {"shared_expert_intermediate_size": 20_480, "layer_norm_eps": 1e-12, "max_window_layers": 80}),
    ("tokenizer_config.json", {"tokenizer_file": None, "init_inputs": [], "vocab_file": None}),
    ("tokenizer_config.json", {"sp_model_kwargs": {}, "name_or_path": "/root/model"}),
    ("tokenizer_config.json", {"mask_token": {"content": "[MASK]", "__type": "AddedToken"}}),
    ("tokenizer_config.json", {"sp_model_kwargs": {"enable_sampling": False}, "extra_special_tokens": {}}),
    ("special_tokens_map.json", {"cls_token": "[CLS]", "additional_special_tokens": ["[Q]"]}),
]


@pytest.mark.parametrize(("file", "settings"), ALLOWED, ids=[f"{file}-{i}" for i, (file, _) in enumerate(ALLOWED)])
def test_what_models_usually_set_is_not_refused(folder: Path, file: str, settings: dict[str, Any]) -> None:
    change(folder / file, **settings)
    TorchEngine(resolve_model(str(folder)), "cpu", "float32")


@pytest.mark.parametrize("value", ["\x1b[31mX", [1], {"a": 1}])
def test_a_setting_of_another_type_is_one_sentence(folder: Path, value: object) -> None:
    change(folder / "sentence_bert_config.json", max_seq_length=value)
    with pytest.raises(ModelError):
        TorchEngine(resolve_model(str(folder)), "cpu", "float32")


@pytest.mark.parametrize("end", ["1e999", "-1e999", "NaN", '"x"', "[1]", "1.5", "null", "[" * 100_000])
def test_offsets_of_weights_that_are_no_numbers_are_one_sentence(folder: Path, end: str) -> None:
    header = f'{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,{end}]}}}}'.encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelError, match=r"model.safetensors: .*fetch the model again"):
        resolve_model(str(folder))


@pytest.mark.parametrize("file", ["config.json", "sentence_bert_config.json"])
def test_no_kernel_is_fetched_for_a_folder(folder: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(name: str, **_: object) -> object:
        asked.append(name)
        raise OSError("no network here")

    for module in hub_kernels, transformers.modeling_utils:
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", fetch)
    settings: dict[str, Any] = {"attn_implementation": KERNEL}
    change(folder / file, **(settings if file == "config.json" else {"model_args": settings}))
    with pytest.raises(ModelError, match="is not for a model folder to choose"):
        resolve_model(str(folder))
    assert asked == []
    with pytest.raises(ValueError, match="no network here"):
        load_reference(folder)
    assert asked == [KERNEL]


def index_of_a_pickle(folder: Path) -> None:
    pickle_weights(folder, "weights.dat")
    change(folder / "pytorch_model.bin.index.json", weight_map={"weight": "weights.dat"}, metadata={})


def index_of_tensors_that_names_a_pickle(folder: Path) -> None:
    pickle_weights(folder, "weights.dat")
    change(folder / "model.safetensors.index.json", weight_map={"weight": "weights.dat"}, metadata={})


def index_that_leads_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    change(folder / "model.safetensors.index.json", weight_map={"weight": "../model.safetensors"}, metadata={})


def index_in_front_of_a_pickled_dense(folder: Path) -> None:
    """sentence-transformers' own modules read no index, but the pickle beside it."""
    dense = folder / "2_Dense"
    dense.mkdir()
    shutil.copy(folder / "model.safetensors", dense)
    (dense / "model.safetensors").rename(dense / "part.safetensors")
    change(dense / "model.safetensors.index.json", weight_map={"weight": "part.safetensors"})
    (dense / "pytorch_model.bin").write_bytes(b"\x80")
    list_module(folder, "sentence_transformers.models.Dense", "2_Dense")


def pickled_layer_norm(folder: Path) -> None:
    norm = folder / "2_LayerNorm"
    norm.mkdir()
    (norm / "pytorch_model.bin").write_bytes(b"\x80")
    list_module(folder, "sentence_transformers.models.LayerNorm", "2_LayerNorm")


def adapter_beside_the_model(folder: Path) -> None:
    change(folder / "adapter_config.json", base_model_name_or_path="attacker/model", peft_type="LORA")


def adapter_above_the_model(folder: Path) -> None:
    """transformers looks for it in the root, whichever folder the module's is."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != "modules.json":
            path.rename(inner / path.name)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    adapter_beside_the_model(folder)


def linked_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder.parent / "elsewhere")
    weights.symlink_to(folder.parent / "elsewhere")


def linked_settings(folder: Path) -> None:
    settings = folder / "1_Pooling" / "config.json"
    settings.rename(folder.parent / "elsewhere")
    settings.symlink_to("../../elsewhere")


def linked_module(folder: Path) -> None:
    (folder / "1_Pooling").rename(folder.parent / "elsewhere")
    (folder / "1_Pooling").symlink_to("../elsewhere")


def linked_folder_of_templates(folder: Path) -> None:
    outside = folder.parent / "templates"
    outside.mkdir()
    (folder / "additional_chat_templates").symlink_to(outside)


def linked_graph(folder: Path) -> None:
    (folder.parent / "model.onnx").write_bytes(b"onnx")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").symlink_to(folder.parent / "model.onnx")


def pipe_for_settings(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "tokenizer_config.json")


def false_blobs(folder: Path) -> None:
    """What looks like the hub's cache, whose blobs lie elsewhere."""
    snapshots = folder.parent / "cache" / "snapshots"
    snapshots.mkdir(parents=True)
    (folder.parent / "secrets").mkdir()
    (folder.parent / "cache" / "blobs").symlink_to("../secrets")
    (folder / "model.safetensors").rename(folder.parent / "secrets" / "one")
    (folder / "model.safetensors").symlink_to("../../blobs/one")
    folder.rename(snapshots / "model")
    folder.symlink_to(snapshots / "model")


def module_at(path: str) -> Attack:
    def attack(folder: Path) -> None:
        list_module(folder, "sentence_transformers.models.Pooling", path)

    attack.__name__ = f"module_at_{path[:12]!r}"
    return attack


def module_in_a_link_loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    list_module(folder, "sentence_transformers.models.Pooling", "loop")


def nested_lists(folder: Path) -> None:
    (folder / "modules.json").write_text("[" * 100_000)


def nested_settings(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def tokenizer_settings_that_are_a_list(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


ATTACKS: list[tuple[Attack, str]] = [
    (index_of_a_pickle, r"pytorch_model\.bin\.index\.json: pickled weights are not loaded"),
    (index_of_tensors_that_names_a_pickle, r"weights\.dat is no name for weights"),
    (index_that_leads_out, r"\.\./model\.safetensors is no name for weights"),
    (index_in_front_of_a_pickled_dense, r"2_Dense/pytorch_model\.bin: pickled weights are not loaded"),
    (pickled_layer_norm, r"2_LayerNorm/pytorch_model\.bin: pickled weights are not loaded"),
    (adapter_beside_the_model, r"adapter_config\.json: an adapter is not loaded"),
    (adapter_above_the_model, r"model/adapter_config\.json: an adapter is not loaded"),
    (linked_weights, r"model\.safetensors: a link out of the folder"),
    (linked_settings, r"1_Pooling/config\.json: a link out of the folder"),
    (linked_module, "module path '1_Pooling' leads out of the folder"),
    (linked_folder_of_templates, "additional_chat_templates: a link out of the folder"),
    (linked_graph, r"onnx/model\.onnx: a link out of the folder"),
    (pipe_for_settings, r"tokenizer_config\.json: neither a file nor a folder"),
    (false_blobs, r"model\.safetensors: a link out of the folder"),
    (module_at("/etc"), "leads out of the folder"),
    (module_at("../.."), "leads out of the folder"),
    (module_at("..\\.."), "leads out of the folder"),
    (module_at("C:\\model"), "leads out of the folder"),
    (module_at("a\0b"), "leads out of the folder"),
    (module_at("a" * 5000), "not readable as a model"),
    (module_in_a_link_loop, "not readable as a model"),
    (nested_lists, r"modules\.json: not readable as JSON"),
    (nested_settings, r"config\.json: not readable as JSON"),
    (tokenizer_settings_that_are_a_list, r"tokenizer_config\.json: not a configuration"),
]


@pytest.mark.parametrize(("attack", "message"), ATTACKS, ids=[attack.__name__ for attack, _ in ATTACKS])
@pytest.mark.parametrize("trust", [Trust(), Trust(code=True)], ids=["untrusted", "code"])
def test_folders_that_are_not_what_they_seem_are_refused(
    folder: Path, marker: Path, attack: Attack, message: str, trust: Trust
) -> None:
    attack(folder)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder), trust=trust)
    assert not marker.exists()


def test_allowed_pickles_are_read_by_the_restricted_unpickler_alone(folder: Path, marker: Path) -> None:
    pickle_weights(folder)
    found = resolve_model(str(folder), trust=Trust(pickle=True))
    with pytest.raises(ModelError, match="cannot be loaded"):
        TorchEngine(found, "cpu", "float32")
    assert not marker.exists()
    (folder / "pytorch_model.bin").rename(folder / "weights.dat")
    change(folder / "pytorch_model.bin.index.json", weight_map={"weight": "weights.dat"})
    with pytest.raises(ModelError, match=r"weights\.dat is no name for weights"):
        resolve_model(str(folder), trust=Trust(pickle=True))


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    TorchEngine(resolve_model(str(snapshot)), "cpu", "float32")


def test_files_below_nested_routers_are_in_the_fingerprint(folder: Path) -> None:
    inner = folder / "a" / "b"
    shutil.copytree(folder, inner)
    change(folder / "a" / "config.json", types={"b": "sentence_transformers.models.Transformer"})
    list_module(folder, "sentence_transformers.models.Asym", "a")
    before = resolve_model(str(folder)).fingerprint()
    change(inner / "sentence_bert_config.json", max_seq_length=3)
    assert resolve_model(str(folder)).fingerprint() != before


def test_the_modules_that_are_allowed_are_sentence_transformers_own_in_every_spelling() -> None:
    """Read off the installed package: whatever is new there, or has moved, shows here."""
    allowed = {import_from_string(spelling) for spelling in MODULE_KINDS}
    for spelling, kind in MODULE_KINDS.items():
        assert import_from_string(spelling).__name__ == kind
    for old, new in DEPRECATED_MODULE_PATHS.items():
        found = getattr(importlib.import_module(new), old.rpartition(".")[2], None)
        assert (old in MODULE_KINDS) == (found in allowed)
    for module in allowed:
        assert f"{module.__module__}.{module.__name__}" in MODULE_KINDS


def test_every_file_that_a_tokenizer_reads_is_in_the_fingerprint() -> None:
    tokenizers = [getattr(transformers, name) for name in dir(transformers) if name.endswith("Tokenizer")]
    read = [
        name
        for each in tokenizers
        if issubclass(each, transformers.PreTrainedTokenizerBase)
        for name in each.vocab_files_names.values()
    ]
    assert len(read) > 100
    assert {Path(name).suffix for name in read} <= DECIDING_SUFFIXES
