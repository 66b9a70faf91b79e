"""From a batch's flat token ids to what a model's modules take, on the device; and models that take it packed."""

from __future__ import annotations

from typing import Any

import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import PreTrainedModel

from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.packed_attention import NAME, CannotPack
from embedstream_worker.engines.packed_batch import bound
from embedstream_worker.engines.text_input import TextInput
from embedstream_worker.engines.torch_loading import quiet

Features = dict[str, Any]

_WAITLESS_POOLING = (6, 2)
"""Of sentence-transformers: before it, pooling packed texts waits for the device in each batch."""

PACKED_ARGUMENTS = frozenset({"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


def flat_features(ids: torch.Tensor, starts: torch.Tensor) -> Features:
    """For static embeddings."""
    return {"input_ids": ids.long(), "offsets": starts[:-1].long()}


def padded_features(text_input: TextInput, batch: TokenBatch, ids: torch.Tensor, starts: torch.Tensor) -> Features:
    """Ids and attention mask, [n, longest] each, from flat ids, int [total], and where texts begin, int [n + 1].

    Waits for nothing on the device.
    """
    mask, source = padded_places(text_input, batch, starts)
    padded = torch.where(mask, ids[source], text_input.pad_id).long()
    features = _with_extras(text_input, batch, {"input_ids": padded, "attention_mask": mask.long()})
    if text_input.token_types and batch.types is not None:
        types = torch.from_numpy(batch.types).to(ids.device)
        features["token_type_ids"] = torch.where(mask, types[source], 0).long()
    return features


def padded_places(text_input: TextInput, batch: TokenBatch, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where texts stand in a padded batch, bool [n, longest], and which of the flat tokens stands there; where none
    does, any. `starts`: where texts begin, int [n + 1]. Waits for nothing on the device.
    """
    lengths = (starts[1:] - starts[:-1]).unsqueeze(1)
    place = torch.arange(batch.longest, device=starts.device)
    if text_input.padding_side == "left":
        place = place - (batch.longest - lengths)
    source = (starts[:-1].unsqueeze(1) + place).clamp_(0, max(len(batch.ids) - 1, 0)).long()
    return (place >= 0) & (place < lengths), source


def packed_features(
    text_input: TextInput, batch: TokenBatch, ids: torch.Tensor, starts: torch.Tensor, first_position: int
) -> Features:
    """Texts behind each other as one row: ids and positions [1, total], and where texts begin, int32 [n + 1].

    Waits for nothing on the device. Each text has a token. `first_position`: what models call a text's first token.
    """
    longest = bound(batch.longest)
    total = len(batch.ids)
    text = torch.repeat_interleave(
        torch.arange(len(batch), device=ids.device), (starts[1:] - starts[:-1]).long(), output_size=total
    )
    positions = torch.arange(first_position, first_position + total, device=ids.device) - starts[:-1].long()[text]
    features: Features = {
        "input_ids": ids.long().unsqueeze(0),
        "position_ids": positions.unsqueeze(0),
        "seq_idx": text.unsqueeze(0),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    features = _with_extras(text_input, batch, features)
    if text_input.token_types and batch.types is not None:
        features["token_type_ids"] = torch.from_numpy(batch.types).to(ids.device).long().unsqueeze(0)
    return features


def _with_extras(text_input: TextInput, batch: TokenBatch, features: Features) -> Features:
    if text_input.token_types:
        features["token_type_ids"] = torch.zeros_like(features["input_ids"])
    if batch.prompt_length:
        features["prompt_length"] = batch.prompt_length
    return features


def transformers_of(model: SentenceTransformer) -> list[Transformer]:
    """The transformers of a model: none, one, or one for each role."""
    return [part for part in model.modules() if isinstance(part, Transformer)]


def vocabulary_size(model: SentenceTransformer) -> int | None:
    """Ids that the model has vectors for; None if it does not say."""
    tables = [transformer.model.get_input_embeddings() for transformer in transformers_of(model)]
    sizes = [table.num_embeddings for table in tables if isinstance(table, torch.nn.Embedding)]
    return min(sizes) if len(sizes) == len(tables) and sizes else None


def first_position(model: SentenceTransformer) -> int:
    """What its transformers call the place of a text's first token: RoBERTa and its kin count from the padding's on."""
    for part in model.modules():
        padding = getattr(part, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(part, "position_embeddings", None), torch.nn.Embedding):
            return padding + 1
    return 0


class Packing:
    """Switches a model's transformers between packed and padded attention."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._transformers = transformers_of(model)
        self._padded = [part.model.config._attn_implementation for part in self._transformers]

    def on(self) -> None:
        """Packed batches from now on. Raises `CannotPack` for a model that has its own attention."""
        if not self._transformers:
            raise CannotPack("it has no transformer")
        version = sentence_transformers.__version__
        if tuple(map(int, version.split(".")[:2])) < _WAITLESS_POOLING:
            raise CannotPack(f"sentence-transformers {version} pools such batches too slowly; use 6.2 or newer")
        if not all(isinstance(part.model, PreTrainedModel) for part in self._transformers):
            raise CannotPack("it is no model of transformers' own")
        with quiet():
            for part in self._transformers:
                part.model.set_attn_implementation(NAME)
                if part.model_forward_params is not None:
                    part.model_forward_params |= PACKED_ARGUMENTS
        if any(part.model.config._attn_implementation != NAME for part in self._transformers):
            self.off()
            raise CannotPack("its attention is its own")

    def off(self) -> None:
        """Padded batches from now on."""
        with quiet():
            for part, name in zip(self._transformers, self._padded, strict=True):
                part.model.set_attn_implementation(name)
