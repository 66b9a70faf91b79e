"""What the JSON files of a model folder may say: how vectors are computed, never what is run or fetched.

sentence-transformers and transformers hand much of what these files say on as keyword arguments and attributes. Some of
those choose classes to import, kernels to fetch, files to unpickle. So modules and arguments are allowed by name; of
`config.json`, whose names are as many as there are architectures, what reaches beyond the folder is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from embedstream.errors import ModelError

_BASE = {"Dense": "dense", "Normalize": "normalize", "Router": "router", "Transformer": "transformer"}
_DENSE = {
    "CNN": "cnn",
    "Dropout": "dropout",
    "LayerNorm": "layer_norm",
    "Pooling": "pooling",
    "StaticEmbedding": "static_embedding",
    "WeightedLayerPooling": "weighted_layer_pooling",
}
_SPARSE = {
    "MLMTransformer": "mlm_transformer",
    "SparseAutoEncoder": "sparse_auto_encoder",
    "SparseStaticEmbedding": "sparse_static_embedding",
    "SpladePooling": "splade_pooling",
}
_OLD, _NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"


def _spellings() -> dict[str, str]:
    kinds = {f"{_NEW}.normalize.Normalize": "Normalize", "sentence_transformers.base.modules.router.Asym": "Router"}
    kinds |= {f"{_OLD}.Asym": "Router", f"{_OLD}.Asym.Asym": "Router", f"{_NEW}.Asym": "Router"}
    for home, files in ("sentence_transformers.base.modules", _BASE), (_NEW, _DENSE):
        for kind, file in files.items():
            names = (
                f"{_OLD}.{kind}",
                f"{_OLD}.{kind}.{kind}",
                f"{_NEW}.{kind}",
                f"{home}.{kind}",
                f"{home}.{file}.{kind}",
            )
            kinds |= dict.fromkeys(names, kind)
    sparse, old = "sentence_transformers.sparse_encoder.modules", "sentence_transformers.sparse_encoder.models"
    for kind, file in _SPARSE.items():
        homes = (f"{old}.{kind}", f"{old}.{file}", sparse, f"{sparse}.{file}", old)
        kinds |= {f"{home}.{kind}": kind for home in homes}
    for home in (sparse, old):
        kinds |= {f"{home}.{kind}": kind for kind in _BASE if kind != "Normalize"}
    tokens = "sentence_transformers.multi_vector_encoder.modules"
    kinds |= dict.fromkeys(
        (f"{tokens}.MultiVectorMask", f"{tokens}.multi_vector_mask.MultiVectorMask"), "MultiVectorMask"
    )
    return kinds


MODULE_KINDS = _spellings()
"""sentence-transformers' modules of which models are made that an engine runs, in all spellings: type -> class."""

TRANSFORMER_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""What a Transformer module's settings may be called."""

_ATTENTION = ("eager", "sdpa")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_CHOICES = {  # any other name is that of a kernel: code, fetched from the hub
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "experts_implementation": _EXPERTS,
    "_experts_implementation": _EXPERTS,
}

# sentence-transformers drops trust_remote_code, and the worker's own word comes after it.
_EVERYWHERE = {"dtype", "torch_dtype", "trust_remote_code"}
_MODEL_ARGUMENTS = _EVERYWHERE | {"add_pooling_layer", "attn_implementation"}
_CONFIG_ARGUMENTS = _EVERYWHERE | {
    *("attn_implementation", "is_causal", "is_decoder", "num_labels", "output_attentions", "output_hidden_states"),
    *("use_bidirectional_attention", "use_cache"),
}
_TOKENIZER_ARGUMENTS = _EVERYWHERE | {
    *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "do_lower_case"),
    *("fix_mistral_regex", "from_slow", "legacy", "model_max_length", "padding_side", "strip_accents"),
    *("tokenize_chinese_chars", "truncation_side", "use_fast"),
}
_ARGUMENTS = {
    "model_args": _MODEL_ARGUMENTS,
    "model_kwargs": _MODEL_ARGUMENTS,
    "config_args": _CONFIG_ARGUMENTS,
    "config_kwargs": _CONFIG_ARGUMENTS,
    "tokenizer_args": _TOKENIZER_ARGUMENTS,
    "processor_kwargs": _TOKENIZER_ARGUMENTS,
}
_TRANSFORMER_KEYS = {
    *("do_lower_case", "document_length", "max_seq_length", "modality_config", "module_output_name"),
    *("processing_kwargs", "query_expansion", "query_length", "transformer_task", "unpad_inputs"),
}

_BEYOND = frozenset(
    {
        *("configuration_files", "transformers_weights", "gguf_file", "adapter_kwargs"),  # other files
        *("quantization_config", "fusion_config", "distributed_config"),  # other packages
        *("allow_all_kernels", "kernel_config", "use_kernels"),  # kernels from the hub
        *("backbone", "pretrained_cfg", "use_pretrained_backbone", "use_timm_backbone"),  # other models
        *("audio_tokenizer", "processor_class"),  # not for texts
    }
)
_NO_TEXT = ("rag", "timm_backbone", "timm_wrapper")  # architectures that load other folders by libraries of their own

# An AutoTokenizer or RagTokenizer would load more folders, and ask on the terminal whether to run their code.
_TOKENIZER_CLASS = re.compile(
    r"(?!Auto|Rag)[A-Z]\w*Tokenizer(Fast)?|(Tokenizers|Python|SentencePiece|MistralCommon)Backend"
)
# Of these, transformers looks for the folder's own and takes it, whatever is written here; old models name theirs.
_OWN_FILES = ("added_tokens_file", "special_tokens_map_file", "tokenizer_config_file", "tokenizer_file")
_CONTENT = ("vocab", "merges", "init_inputs", "tokenizer_object")
_FILES = re.compile(r"(?!_?name_or_path$).*_(files?|paths?|dir|folder)")
_TABLES = {
    *("added_tokens_decoder", "additional_special_tokens", "auto_map", "chat_template", "extra_special_tokens"),
    *("model_specific_special_tokens", "merges", "vocab", "task_specific_params"),
}
"""Settings of a tokenizer whose value may be a table; a token is one, too. Others are arguments of programs."""
_PIECES = {"alpha", "enable_sampling", "nbest_size", "add_bos", "add_eos", "reverse"}  # of sp_model_kwargs

_MOST = ((re.compile(r".*layers?"), 1000), (re.compile(r".*experts"), 10_000), (re.compile(r"num_labels"), 100_000))
"""Numbers of what is made before a weight is read, by the setting's name; far above those of any model."""

_TASKS = (None, "feature-extraction", "fill-mask", "sequence-classification")
_MODEL_TYPES = (None, "SentenceTransformer", "SparseEncoder", "CrossEncoder", "MultiVectorEncoder", "ColBERT")

_ACTIVATION = re.compile(r"torch\.nn\.(modules\.(activation|linear)\.)?[A-Z]\w*")


def check_settings(path: Path) -> None:
    """Prove that a JSON file of a model folder chooses nothing that is run or fetched.

    Raises:
        ModelError: it does, or is not readable; names the setting.
    """
    check = _CHECKS.get(path.name.casefold())  # some file systems open it by either
    if check is None:
        return
    for refused in check(read_settings(path)):
        raise ModelError(f"{path}: {refused} is not for a model folder to choose; remove it, or use another model")


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises `ModelError`."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); fetch the model again") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The same for a file that holds an object."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: not a configuration; fetch the model again")
    return settings


def _in_config(settings: dict[str, Any]) -> Iterator[str]:
    """The refused settings of a `config.json`, a tokenizer's or a processor's, those of nested configurations too."""
    yield from _in_values(settings)
    name = settings.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and _TOKENIZER_CLASS.fullmatch(name)):
        yield f"tokenizer_class {name}"
    activation = settings.get("activation_function")
    if isinstance(activation, str) and "." in activation:
        yield from _in_activation("activation_function", activation)
    name = "sbert_ce_default_activation_function"
    yield from _in_activation(name, settings.get(name))
    if isinstance(own := settings.get("sentence_transformers"), dict):
        yield from _in_activation("activation_fn", own.get("activation_fn"))


def _in_activation(setting: str, name: object) -> Iterator[str]:
    """What sentence-transformers would import and call."""
    if name is not None and not (isinstance(name, str) and _ACTIVATION.fullmatch(name)):
        yield f"{setting} {name}"


def _in_tokenizer(settings: dict[str, Any]) -> Iterator[str]:
    """The refused settings of a tokenizer: transformers hands all on as arguments, names of files among them."""
    yield from _in_config(settings)
    for key, value in settings.items():
        named = _FILES.fullmatch(key) and key not in _OWN_FILES
        if value and (named or key in _CONTENT) and not (key in ("vocab", "merges") and isinstance(value, dict | list)):
            yield key
        elif isinstance(value, dict) and key not in _TABLES and "content" not in value:
            yield from (f"{key}.{name}" for name in value if key != "sp_model_kwargs" or name not in _PIECES)


def _in_special_tokens(settings: dict[str, Any]) -> Iterator[str]:
    """The same of `special_tokens_map.json`, which is merged into them last."""
    yield from (key for key in settings if not key.endswith(("_token", "_tokens")))


def _in_values(value: object, nested: bool = False) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _in_values(item, nested=True)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if item and (key in _BEYOND or (key == "auto_map" and nested)):
            yield key
        elif (
            (key in _CHOICES and not _is_choice(item, _CHOICES[key]))
            or (key == "model_type" and item in _NO_TEXT)
            or (isinstance(item, int | float) and any(name.fullmatch(key) and item > most for name, most in _MOST))
        ):
            yield f"{key} {item}"
        yield from _in_values(item, nested=True)


def _is_choice(value: object, choices: tuple[str, ...]) -> bool:
    if isinstance(value, dict):  # one for each nested configuration
        return all(_is_choice(item, choices) for item in value.values())
    return value is None or value in choices


def _in_transformer(settings: dict[str, Any]) -> Iterator[str]:
    """The refused settings of a Transformer module."""
    for key, value in settings.items():
        if key in _ARGUMENTS:
            yield from (f"{key}.{refused}" for refused in _in_arguments(value, _ARGUMENTS[key]))
        elif key not in _TRANSFORMER_KEYS:
            yield key
    if (task := settings.get("transformer_task")) not in _TASKS:
        yield f"transformer_task {task}"
    modalities = settings.get("modality_config") or {}
    for name, modality in modalities.items() if isinstance(modalities, dict) else [("", None)]:
        if not isinstance(modality, dict) or modality.get("method") != "forward":  # any other method would be called
            yield f"modality_config.{name}"


def _in_arguments(arguments: object, allowed: set[str]) -> Iterator[str]:
    if not isinstance(arguments, dict):
        yield str(arguments)
        return
    for key, value in arguments.items():
        if key not in allowed or not isinstance(value, str | int | float | None):
            yield key
        elif key in _CHOICES and not _is_choice(value, _CHOICES[key]):
            yield f"{key} {value}"


def _in_model(settings: dict[str, Any]) -> Iterator[str]:
    """The refused settings of sentence-transformers' own file."""
    if (kind := settings.get("model_type")) not in _MODEL_TYPES:
        yield f"model_type {kind}"
    yield from _in_activation("activation_fn", settings.get("activation_fn"))


_CHECKS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "config.json": _in_config,
    "tokenizer_config.json": _in_tokenizer,
    "special_tokens_map.json": _in_special_tokens,
    "processor_config.json": _in_config,
    "preprocessor_config.json": _in_config,
    "video_preprocessor_config.json": _in_config,
    "config_sentence_transformers.json": _in_model,
    **dict.fromkeys(TRANSFORMER_SETTINGS, _in_transformer),
}
