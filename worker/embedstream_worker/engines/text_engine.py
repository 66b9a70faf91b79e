"""What the engines of text models have in common: what they tell of themselves, tokenizers, prompts, warm-up."""

from __future__ import annotations

import abc
import logging
import threading
from collections.abc import Callable

from embedstream_worker.engines.base import Engine, EngineInfo, Results, Role, TextTokenizer, TokenBatch
from embedstream_worker.engines.text_input import TextModel, warm_up_batches

log = logging.getLogger(__name__)


class TextEngine(abc.ABC):
    """One of them. What runs the model is the subclass's, whose constructor loads it."""

    in_flight = 1
    info: EngineInfo
    text_model: TextModel
    """Everything of the model but its weights."""

    def __init__(self, load_exact: Callable[[], Engine] | None = None) -> None:
        """`load_exact`: the same model in float32 on the CPU, as beside a GPU's batches there may be no memory for
        another copy. Loaded for the first vector that is not finite; not needed by an engine in float32.
        """
        self._load_exact = load_exact
        self._loading = threading.Lock()
        self._exact: Engine | None = None

    @abc.abstractmethod
    def run(self, batch: TokenBatch) -> Results:
        """What the model gives, by kind, in the batch's order. Raises `OutOfMemory`."""

    def run_exact(self, batch: TokenBatch) -> Results:
        """As `run`, in float32. Raises `OutOfMemory`; `ModelError` if the model cannot be loaded again."""
        if self._load_exact is None or self.info.dtype == "float32":
            return self.run(batch)
        return self.exact(self._load_exact, "for results with NaN or infinity").run(batch)

    def exact(self, load: Callable[[], Engine], why: str) -> Engine:
        """The same model in float32, loaded once. Raises `ModelError`."""
        with self._loading:
            if self._exact is None:
                self._exact = load()
                log.info("loaded model %s in float32 as well, %s", self.text_model.name, why)
            return self._exact

    def warm_up(self, batch_tokens: int) -> None:
        """Run the smallest, the longest and the fullest batch that the budget allows."""
        for batch in warm_up_batches(self.text_model, batch_tokens):
            for _ in range(self.in_flight):  # those in flight take turns, and each has memory of its own
                self.run(batch)

    def tokenizer(self) -> TextTokenizer:
        return self.text_model.input.tokenizer()

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:
        """The prompt as sentence-transformers picks it. Raises `ModelError`: see `TextModel.prompt`."""
        return self.text_model.prompt(role, prompt, prompt_name)

    def close(self) -> None:
        """Give the model's memory back."""
        with self._loading:
            if self._exact is not None:
                self._exact.close()
                self._exact = None


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a runtime in C++ had no memory, as it says it."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("bad_alloc", "out of memory", "annot allocate memory", "ailed to allocate")
    )
