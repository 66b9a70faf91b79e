"""What scheduling and tokenizing must know of a text model beside its weights. Needs no model library to be loaded."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import tokenizers

from embedstream.errors import ModelError
from embedstream_worker.engines.base import HARMLESS, Role, TextTokenizer, TokenBatch
from embedstream_worker.tokenizing import UNLIMITED, FastTokenizer, Limits, PythonTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RETRIEVAL = ("search_", "retrieval_", "s2p_")
ROLE_PROMPTS: dict[Role, tuple[str, ...]] = {
    "document": ("document", "passage", "corpus", "doc", "text"),
    "query": ("query", "question"),
}
"""Names that models give to a role's prompt: those of `encode_document` and `encode_query` first, in their order; then
the same behind `_RETRIEVAL`, in any spelling."""

_WARM_ROW_TOKENS = 64  # a usual short text: many rows at once

LONGEST_TRIED = 32_768
"""Tokens of the longest text that is tried before there is work. Models without a limit would take one as long as the
budget, which hardly any corpus has."""


class InputKind(enum.Enum):
    PADDED = "padded"  # [n, longest] ids and mask
    FLAT = "flat"  # [total] ids and offsets, for static embeddings


@dataclass(frozen=True)
class TextInput:
    """How the first module of a model wants its tokens."""

    kind: InputKind
    source: tokenizers.Tokenizer | PreTrainedTokenizerBase  # the latter for tokenizers written in Python
    limits: Limits
    max_length: int
    special_ids: frozenset[int] = frozenset()
    add_special_tokens: bool = True
    pad_id: int = 0
    padding_side: str = "right"
    truncation_side: str = "right"
    token_types: bool = False

    def tokenizer(self) -> TextTokenizer:
        """A new tokenizer, for one thread."""
        if not isinstance(self.source, tokenizers.Tokenizer):
            return PythonTokenizer(self.source, self.limits)
        return FastTokenizer(
            self.source, self.limits, self.special_ids, self.truncation_side, add_special_tokens=self.add_special_tokens
        )

    def pad(self, batch: TokenBatch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids, attention mask and token types, [n, longest] each."""
        places = np.arange(batch.longest)
        lengths = batch.lengths[:, None]
        mask = places >= batch.longest - lengths if self.padding_side == "left" else places < lengths
        ids, types = np.full(mask.shape, self.pad_id, np.int64), np.zeros(mask.shape, np.int64)
        ids[mask] = batch.ids
        if batch.types is not None:
            types[mask] = batch.types
        return ids, mask.astype(np.int64), types

    def sample(self, rows: int, tokens: int, role: Role) -> TokenBatch:
        """Equal rows of about so many tokens, special tokens included: at least one text token each."""
        text = self.tokenizer().encode([HARMLESS], self.max_length).ids
        tokens = max(tokens, len(text), 1)
        row = np.resize(text, tokens) if len(text) else np.zeros(tokens, np.int32)
        return TokenBatch(np.tile(row, rows), np.arange(rows + 1, dtype=np.int64) * tokens, tokens, 0, role)


def static_input(source: tokenizers.Tokenizer) -> TextInput:
    """Of a model that is a table of vectors; `source` cuts as its file says."""
    cut = source.truncation or {}
    return TextInput(
        kind=InputKind.FLAT,
        source=source,
        limits=Limits(UNLIMITED, 1),
        max_length=int(cut.get("max_length", UNLIMITED)),
        add_special_tokens=False,
        truncation_side=cut.get("direction", "right"),
    )


@dataclass(frozen=True)
class TextModel:
    """Everything of a text model but its weights."""

    name: str
    input: TextInput
    prompts: dict[str, str]
    default_prompt_name: str | None
    roles: dict[Role, int]
    """Those that it serves, with the dimensions of their vectors."""
    normalized: bool
    """Whether its vectors have length 1."""
    excludes_prompt: bool
    """Whether pooling leaves the prompt's tokens out."""
    pairs: bool = False
    """Whether it takes pairs of texts."""

    @property
    def dim(self) -> int:
        return next(iter(self.roles.values()))

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:
        """The prompt as sentence-transformers picks it; an explicit empty one is none.

        Order: `prompt`, `prompt_name`, the role's own, the model's default. Names that stand for no prompt give way to
        those that have one: sentence-transformers adds an empty `document` and `query` to every model.

        Raises:
            ModelError: the model has no prompt of that name, or does not serve the role.
        """
        if role not in self.roles:
            raise ModelError(f"model {self.name} has no route for --role {role}")
        if prompt is not None:
            return prompt
        if prompt_name is not None:
            if prompt_name not in self.prompts:
                known = ", ".join(sorted(self.prompts)) or "none"
                raise ModelError(f"model {self.name} has no prompt {prompt_name!r} (it has: {known})")
            return self.prompts[prompt_name]
        named = {re.sub(r"[^a-z0-9]+", "_", name.casefold()): own for name, own in self.prompts.items()}
        names = [before + name for before in ("", *_RETRIEVAL) for name in ROLE_PROMPTS[role]]
        if found := [named[name] for name in names if name in named]:
            return next(filter(None, found), "")
        return self.prompts.get(self.default_prompt_name or "", "")


def warm_up_batches(model: TextModel, batch_tokens: int) -> list[TokenBatch]:
    """The smallest, the longest and the fullest batch that the budget allows, for every role."""
    longest = max(1, min(model.input.max_length, batch_tokens, LONGEST_TRIED))
    short = min(_WARM_ROW_TOKENS, longest)
    shapes = dict.fromkeys([(1, 1), (max(1, batch_tokens // longest), longest), (max(1, batch_tokens // short), short)])
    return [model.input.sample(rows, tokens, role) for rows, tokens in shapes for role in model.roles]
