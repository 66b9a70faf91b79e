"""The seam between scheduling and models. Scheduling knows token counts; engines know everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from embedstream.dataset.values import Results as Results  # to be had here too, beside what gives them
from embedstream.outputs import Kind

Role = Literal["document", "query"]


HARMLESS = "1"
"""A text that shows whether anything can be embedded: one token in every vocabulary, and part of few added tokens."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts, flat. `ids[offsets[i]:offsets[i + 1]]` are those of text i, special tokens included."""

    ids: npt.NDArray[np.int32]  # [total]
    offsets: npt.NDArray[np.int64]  # [n + 1]
    truncated: npt.NDArray[np.bool_]  # [n]: the text was longer than the limit
    types: npt.NDArray[np.int8] | None = None  # [total]: of pairs, 1 for tokens of the second text; None: all 0

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per text, [n]."""
        return np.diff(self.offsets)

    def take(self, rows: npt.NDArray[np.int64]) -> Tokens:
        """Those of these texts, in this order; a text may be there more than once."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        types = None if self.types is None else self.types[places]
        return Tokens(self.ids[places], offsets, self.truncated[rows], types)


@dataclass(frozen=True)
class TokenBatch:
    """What goes through the model at once. Engines that need padding pad inside."""

    ids: npt.NDArray[np.int32]  # [total]
    offsets: npt.NDArray[np.int64]  # [n + 1]
    longest: int
    prompt_length: int  # leading tokens that belong to the prompt; 0 when there is none
    role: Role
    types: npt.NDArray[np.int8] | None = None  # as in `Tokens`
    kinds: frozenset[Kind] | None = None  # what is wanted of it; None: all that the model gives

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per text, [n]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class OutputInfo:
    """What one kind of output is, as `Output` has it: in float32, before a job cuts or rounds it."""

    dim: int
    normalized: bool = False
    labels: tuple[str, ...] = ()
    token_bytes: int = 0
    """What each token of a text adds in memory; 0: all texts take the same, `dim` numbers at most."""

    @property
    def row_bytes(self) -> int:
        """What each text takes in memory, whatever its tokens."""
        return 0 if self.token_bytes else 4 * self.dim


MOST_MATRIX_BYTES = 64 * 1024 * 1024
"""Of the weights of a batch's texts for the whole vocabulary, before those that are 0 are left out."""

_SHORTEST = 4
"""Tokens of texts that are taken for short where a batch of such texts has to be bounded."""


def fitting(batch_tokens: int, outputs: dict[Kind, OutputInfo]) -> int:
    """A budget of tokens on a CPU with which results that are as wide as the vocabulary stay within memory."""
    width = max((output.row_bytes for kind, output in outputs.items() if kind == "sparse"), default=0)
    return min(batch_tokens, max(1, _SHORTEST * MOST_MATRIX_BYTES // width)) if width else batch_tokens


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, for printing, and what its folder says of pooling."""

    source: str = ""
    revision: str | None = None  # the commit of a model of the hub
    pooling: str = ""  # in sentence-transformers' words; empty: in a way of its own
    pooling_from: str = ""  # folder, or assumed
    similarity: str = ""  # how results are to be compared, in sentence-transformers' words; empty: as usual


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself."""

    engine: str  # "torch", "hashing"
    device: str  # "cpu", "cuda:0", "mps"
    dtype: str  # precision of the computation: "float32", "bfloat16"
    fingerprint: str  # what the weights, tokenizer and module settings are, as a hash
    max_length: int  # tokens, special tokens included
    padded: bool  # whether a batch costs longest x n (True) or the sum of its tokens
    batch_tokens: int  # a good token budget per batch on this device
    pairs: bool = field(default=False, kw_only=True)  # whether it takes pairs of texts
    outputs: dict[Kind, OutputInfo]  # what the model gives
    card_prompts: dict[Role, str] = field(default_factory=dict)  # what its card wants in front of texts
    origin: Origin = Origin()


class TextTokenizer(Protocol):
    """Turns texts into token ids. Not safe to share between threads: make one per thread."""

    def encode(self, texts: Sequence[str], max_length: int, firsts: Sequence[str] | None = None) -> Tokens:
        """Token ids with special tokens, cut at `max_length` tokens.

        `firsts`: the first texts of pairs, of which `texts` are the second; the longer one is cut first.
        """

    def prompt_length(self, prompt: str, max_length: int) -> int:
        """How many leading tokens of a prompted text belong to the prompt."""


class Engine(Protocol):
    """One long-lived model, loaded. Life: `warm_up`, any number of `run`, `close`."""

    in_flight: int
    """How many batches it wants to hold at once."""

    @property
    def info(self) -> EngineInfo: ...

    def warm_up(self, batch_tokens: int) -> None:
        """Run the smallest, the longest and the fullest batch it will meet."""

    def tokenizer(self) -> TextTokenizer:
        """A new tokenizer, for one thread."""

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:
        """The prompt that goes in front of every text of a job. Raises `ModelError` for an unknown name."""

    def run(self, batch: TokenBatch) -> Results:
        """What the model gives for n texts, in the batch's order.

        Raises:
            OutOfMemory: the batch does not fit; a smaller one may.
            Exception: anything else is the fault of some text in the batch.
        """

    def run_exact(self, batch: TokenBatch) -> Results:
        """The same in float32, however slow: for a text whose results had NaN or infinity. Raises as `run` does."""

    def close(self) -> None: ...


@runtime_checkable
class OwnQueries(Protocol):
    """An engine that runs documents in batches, and queries one at a time in a way of their own."""

    def query(self, text: str, prompt: str | None) -> Results:
        """What the model gives for one query, in float32. `prompt`: None means the model's own. Raises `ModelError`."""


@runtime_checkable
class Twin(Protocol):
    """An engine that can load its model once more, for requests that are not to wait for its batches."""

    def twin(self) -> Engine:
        """The same model with threads of its own, for one batch at a time: loaded, and to be closed."""


class OutOfMemory(Exception):
    """The device had no memory for this batch."""
