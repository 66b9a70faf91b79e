"""What the engines of text models have in common: what they tell of themselves, tokenizers, prompts, warm-up."""

from __future__ import annotations

import abc

import numpy as np
import numpy.typing as npt

from embedstream_worker.engines.base import EngineInfo, Role, TextTokenizer, TokenBatch
from embedstream_worker.engines.text_input import TextModel, warm_up_batches


class TextEngine(abc.ABC):
    """One of them. What runs the model is the subclass's; it sets `_info` and `_text_model` when it starts."""

    in_flight = 1

    def __init__(self) -> None:
        self._info: EngineInfo | None = None
        self._text_model: TextModel | None = None

    @abc.abstractmethod
    def embed(self, batch: TokenBatch) -> dict[str, npt.NDArray[np.float32]]:
        """Vectors by output name, [n, dim], in the batch's order. Raises `OutOfMemory`."""

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise RuntimeError("the engine is not started")
        return self._info

    @property
    def text_model(self) -> TextModel:
        """Everything of the started model but its weights."""
        if self._text_model is None:
            raise RuntimeError("the engine is not started")
        return self._text_model

    def warm_up(self, batch_tokens: int) -> None:
        """Run the smallest, the longest and the fullest batch that the budget allows."""
        for batch in warm_up_batches(self.text_model, batch_tokens):
            for _ in range(self.in_flight):  # those in flight take turns, and each has memory of its own
                self.embed(batch)

    def tokenizer(self) -> TextTokenizer:
        return self.text_model.input.tokenizer()

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:
        """The prompt as sentence-transformers picks it. Raises `ModelError`: see `TextModel.prompt`."""
        return self.text_model.prompt(role, prompt, prompt_name)
