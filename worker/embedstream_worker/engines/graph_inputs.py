"""What the graphs take that are converted from torch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.text_input import TextInput, TextModel

Integers = npt.NDArray[np.int64]


def third_input(model: TextModel) -> Literal["pooling_mask", "token_type_ids"] | None:
    """What a graph takes beside ids and attention mask, of the same shape: the attention mask without the prompt, if
    pooling leaves that out; of pairs, which text a token is of, if the model asks for it.
    """
    if model.excludes_prompt:
        return "pooling_mask"
    return "token_type_ids" if model.pairs and model.input.token_types else None


def graph_inputs(model: TextModel, batch: TokenBatch) -> tuple[Integers, ...]:
    """Ids, attention mask, and the third input if there is one: [n, longest] each."""
    ids, mask, types = model.input.pad(batch)
    match third_input(model):
        case "pooling_mask":
            return ids, mask, _without_prompt(model.input, mask, batch)
        case "token_type_ids":
            return ids, mask, types
        case _:
            return ids, mask


def _without_prompt(text_input: TextInput, mask: Integers, batch: TokenBatch) -> Integers:
    if not batch.prompt_length:
        return mask
    first = batch.longest - batch.lengths if text_input.padding_side == "left" else np.zeros(len(batch), np.int64)
    return np.where(np.arange(batch.longest) >= first[:, None] + batch.prompt_length, mask, 0)
