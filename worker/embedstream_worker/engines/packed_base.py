"""Models with heads, without padding below these: the transformer takes packed texts, its heads get padded states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.packed_attention import CannotPack
from embedstream_worker.engines.packed_batch import fill_up, only
from embedstream_worker.engines.text_input import TextInput
from embedstream_worker.engines.torch_features import (
    PACKED_ARGUMENTS,
    Features,
    Packing,
    first_position,
    packed_features,
    padded_places,
    transformers_of,
)

_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})


@dataclass(frozen=True)
class _Batch:
    """What transformers are given, and how their states become padded."""

    packed: Features
    mask: torch.Tensor  # [n, longest]
    source: torch.Tensor  # [n, longest]
    padding: torch.Tensor  # [n, 1, 1]: what stands where no token does; NaN for a text that has none


class PackedBase:
    """Runs a model's transformers over packed texts. What is computed of their states stays as it is.

    Batches are to be as for padded ones: what heads compute has the size of the padded states.
    """

    def __init__(self, modules: Any, text_input: TextInput) -> None:
        self._input = text_input
        self._packing = Packing(modules)
        self._first_position = first_position(modules)
        self._bases = [part.model.base_model for part in transformers_of(modules)]
        self._batch: _Batch | None = None
        self.is_on = False

    def on(self) -> None:
        """Packed from now on, within `batch` alone. Raises `CannotPack` for a model that has its own attention."""
        self._packing.on()
        for base in self._bases:
            base.forward = partial(self._forward, base, base.forward)
        self.is_on = True

    def off(self) -> None:
        """Padded from now on."""
        if not self.is_on:
            return
        self.is_on = False
        self._packing.off()
        for base in self._bases:
            del base.forward  # the class's own again

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Padded meanwhile."""
        was_on = self.is_on
        self.off()
        try:
            yield
        finally:
            if was_on:
                self.on()

    @contextmanager
    def batch(self, batch: TokenBatch, starts: torch.Tensor, step: int) -> Iterator[None]:
        """What runs through the model meanwhile is this batch. `starts`: where its texts begin, on the device.

        `step`: the tokens become a multiple of it. Raises `ValueError` if no text has a token.
        """
        kept = batch.lengths > 0
        if not kept.any():
            raise ValueError("the text has no token")
        full = fill_up(only(batch, kept), step, self._input.limits.longest)
        ids, full_starts = (torch.from_numpy(each).to(starts.device) for each in (full.ids, full.offsets))
        packed = packed_features(self._input, full, ids, full_starts.int(), self._first_position)
        mask, source = padded_places(self._input, batch, starts)
        empty = (starts[1:] == starts[:-1]).view(-1, 1, 1)
        self._batch = _Batch(packed, mask.unsqueeze(-1), source, torch.where(empty, torch.nan, 0.0))
        try:
            yield
        finally:
            self._batch = None

    def _forward(self, base: Any, original: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        batch = self._batch
        if batch is None or len(inputs) > 1 or options.get("inputs_embeds") is not None:
            raise CannotPack("its head gives its transformer something else than tokens")
        names = PACKED_ARGUMENTS | {"input_ids"}
        if options.get("token_type_ids") is not None:
            names |= {"token_type_ids"}
        others = {name: value for name, value in options.items() if name not in _INPUTS}
        outputs = original(**others, **{name: value for name, value in batch.packed.items() if name in names})
        if outputs.get("hidden_states") is not None:
            raise CannotPack("its head takes the states of several layers")
        states = outputs.last_hidden_state[0]
        outputs.last_hidden_state = torch.where(batch.mask, states[batch.source], batch.padding.to(states.dtype))
        if outputs.get("pooler_output") is not None:
            outputs.pooler_output = base.pooler(outputs.last_hidden_state)
        return outputs
