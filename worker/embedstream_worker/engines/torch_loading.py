"""Loading a model folder with sentence-transformers, quietly, and reading off it how its input must be built."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import tokenizers
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from embedstream.errors import ModelError
from embedstream_worker.engines.base import HARMLESS
from embedstream_worker.engines.text_input import InputKind, TextInput, static_input
from embedstream_worker.models import ModelFolder
from embedstream_worker.panics import panics_are_errors
from embedstream_worker.purpose import Purpose
from embedstream_worker.tokenizing import UNLIMITED, Limits

_OTHER_TABLES = ("wpe", "embed_positions", "position_embedding", "pos_embedding")
"""Tables of positions, with or without more rows than there are positions: their `config.json` says how many."""

_MISSING = re.compile(r"^(?:\x1b\[[0-9;]*m)*([\w.{}, \-]+?)\s*\|\s*(?:\x1b\[[0-9;]*m)*MISSING", re.MULTILINE)


_CLASSES: dict[Purpose, Any] = {
    Purpose.VECTORS: SentenceTransformer,
    Purpose.SPARSE: SparseEncoder,
    Purpose.MULTIVECTOR: MultiVectorEncoder,
    Purpose.PAIRS: CrossEncoder,
}


def load_model(folder: ModelFolder, device: torch.device) -> Any:
    """Load a checked folder in float32, by the class of sentence-transformers that it is for.

    Raises:
        ModelError: it cannot be loaded, or weights are missing from it.
    """
    with quiet() as reports:
        try:  # whatever loading raises, the user gets one sentence
            with panics_are_errors():
                model = _CLASSES[folder.purpose](
                    str(folder.path),
                    device=str(device),
                    local_files_only=True,
                    trust_remote_code=folder.needs.code,
                    # These come after what the folder's own settings say.
                    model_kwargs={
                        "dtype": torch.float32,
                        "use_safetensors": None if folder.needs.pickle else True,
                        "weights_only": True,
                    },
                )
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(f"{folder.path}: model cannot be loaded: {reason[0]}") from error
    # A pooler is no part of the vectors of a model that pools tokens.
    missing = [name for report in reports for name in _MISSING.findall(report) if not name.startswith("pooler.")]
    if missing:
        raise ModelError(f"{folder.path}: its weights lack {', '.join(missing[:3])}; fetch the model again")
    return model.float().eval()


def read_input(model: Any, name: str, documents: bool = False) -> TextInput:
    """How the model wants its tokens. `documents`: those of documents alone, where queries have a way of their own.

    Raises:
        ModelError: it wants them in a way that this engine does not know.
    """
    first = next(model.children())
    modules = [first]
    if isinstance(first, Router):
        routes = first.sub_modules
        chosen = [routes["document"]] if documents and "document" in routes else routes.values()
        modules = [next(route.children()) for route in chosen]
    try:
        with panics_are_errors():
            inputs = [_read_module(module, name, documents) for module in modules]
    except ModelError:
        raise
    except Exception as error:  # its settings may hold values of any type
        raise ModelError(f"model {name} has settings that cannot be used ({error}); fetch it again") from error
    if any(_differ(inputs[0], other) for other in inputs[1:]):
        raise ModelError(f"model {name} has another tokenizer for each role, which is not supported")
    return inputs[0]


def is_normalized(model: SentenceTransformer) -> bool:
    """Whether its vectors have length 1."""
    *_, last = model.children()
    ends = [[*route.children()][-1] for route in last.sub_modules.values()] if isinstance(last, Router) else [last]
    return all(isinstance(end, Normalize) and end.module_output_name == "sentence_embedding" for end in ends)


def excludes_prompt(model: SentenceTransformer) -> bool:
    """Whether pooling leaves the prompt's tokens out of the vectors."""
    return any(isinstance(part, Pooling) and not part.include_prompt for part in model.modules())


def _read_module(module: torch.nn.Module, name: str, documents: bool) -> TextInput:
    if isinstance(module, StaticEmbedding):
        return static_input(getattr(module.tokenizer, "backend_tokenizer", module.tokenizer))
    if not isinstance(module, Transformer):
        raise ModelError(f"model {name} begins with a {type(module).__name__} module, which is not supported")
    tokenizer = module.processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or "text" not in module.modality_config:
        raise ModelError(f"model {name} is not a text model")
    if "message" in module.modality_config:
        raise ModelError(f"model {name} puts texts into a chat template, which is not supported")
    own_lengths = (module.query_expansion, module.query_length, module.document_length)
    if not documents and any(length is not None for length in own_lengths):
        raise ModelError(f"model {name} has a length of its own for each role, which is not supported")
    options = dict(module.processing_kwargs)
    text_options = dict(options.pop("text", {}))
    max_length = int(text_options.pop("max_length", None) or module.max_seq_length or UNLIMITED)
    max_length = int((documents and module.document_length) or max_length)
    if options or text_options:
        raise ModelError(f"model {name} sets processing options ({sorted({*options, *text_options})}) not supported")
    probe = tokenizer(HARMLESS)
    token_types = "token_type_ids" in tokenizer.model_input_names
    if token_types and any(probe.get("token_type_ids", ())):
        raise ModelError(f"model {name} marks its tokens with types, which is not supported")
    longest = min(_positions(module, max_length), UNLIMITED)
    return TextInput(
        kind=InputKind.PADDED,
        source=tokenizer.backend_tokenizer if tokenizer.is_fast else tokenizer,
        limits=Limits(longest, tokenizer.num_special_tokens_to_add() + 1),
        max_length=min(max_length, longest),
        special_ids=frozenset(tokenizer.all_special_ids),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        token_types=token_types,
    )


def _positions(module: Transformer, max_length: int) -> int:
    """Most tokens that the model can place: by its table, if it has one; if not, the folder's `max_length` counts."""
    tables = False
    for part in module.model.modules():
        table = getattr(part, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            # RoBERTa and its kin begin counting after the padding's own row.
            padding = getattr(part, "padding_idx", None)
            return table.num_embeddings - (padding + 1 if isinstance(padding, int) else 0)
        tables = tables or any(isinstance(getattr(part, name, None), torch.nn.Embedding) for name in _OTHER_TABLES)
    positions = getattr(module.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return UNLIMITED
    # Relative and rotary positions go on: what the folder sets, sentence-transformers takes.
    return positions if tables or max_length >= UNLIMITED else max(positions, max_length)


def _differ(one: TextInput, other: TextInput) -> bool:
    return replace(one, source=other.source) != other or _content(one) != _content(other)


def _content(text_input: TextInput) -> str:
    source = text_input.source
    return source.to_str() if isinstance(source, tokenizers.Tokenizer) else repr(source)


class _Reports(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def quiet() -> Iterator[list[str]]:
    """No progress bars and no load reports on standard error; yields what would have been logged."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    reports = _Reports()
    loggers = [logging.getLogger(name) for name in ("transformers", "sentence_transformers")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [reports], False
    try:
        yield reports.messages
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
