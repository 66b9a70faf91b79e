"""A model folder's modules as a function of tensors alone, which converters can trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from embedstream_worker.engines.base import Role
from embedstream_worker.engines.text_input import TextModel
from embedstream_worker.engines.torch_engine import sentence_vectors

EXAMPLE_ROWS, EXAMPLE_TOKENS = 3, 16


class Graph(torch.nn.Module):
    """All modules of a model for one role."""

    def __init__(self, modules: SentenceTransformer, model: TextModel, role: Role) -> None:
        super().__init__()
        self._modules_of_model = modules
        self._role = role
        self._token_types = model.input.token_types
        self._pooling_mask: list[torch.Tensor] = []
        self._hooks = [
            part.register_forward_pre_hook(self._swap_mask)
            for part in modules.modules()
            if isinstance(part, Pooling) and not part.include_prompt
        ]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pooling_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Vectors, [n, dim]. `pooling_mask`: the attention mask without the prompt, if pooling leaves that out."""
        self._pooling_mask[:] = [] if pooling_mask is None else [pooling_mask]
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._token_types:
            features["token_type_ids"] = torch.zeros_like(input_ids)
        return sentence_vectors(self._modules_of_model, features, self._role)

    def release(self) -> None:
        """Leave the modules as they were."""
        for hook in self._hooks:
            hook.remove()

    def _swap_mask(self, _module: torch.nn.Module, inputs: tuple[dict[str, Any]]) -> tuple[dict[str, Any]]:
        # Pooling's own way to leave the prompt out depends on its values, which tracing cannot follow.
        return ({**inputs[0], "attention_mask": self._pooling_mask[0]},) if self._pooling_mask else inputs


def graph_example(model: TextModel, role: Role) -> list[torch.Tensor]:
    """Inputs for tracing a `Graph`: ids, attention mask, and the mask for pooling if that leaves the prompt out."""
    example = [
        torch.from_numpy(array) for array in model.input.pad(model.input.sample(EXAMPLE_ROWS, EXAMPLE_TOKENS, role))
    ]
    # Uneven on purpose: with full rows only, tracing would find that no mask is needed.
    example[1][1, slice(0, 5) if model.input.padding_side == "left" else slice(-5, None)] = 0
    if model.excludes_prompt:
        example.append(example[1].clone())
    return example


def graph_names(modules: SentenceTransformer, model: TextModel) -> dict[Role, str]:
    """The name of each role's graph. Without ways of their own, all roles share one."""
    routed = any(isinstance(part, Router) for part in modules.modules())
    first = next(iter(model.roles))
    return {role: role if routed else first for role in model.roles}


@contextmanager
def finite_attention() -> Iterator[None]:
    """Let tokens that may look at nothing look at everything: paddings far from any text, with sliding windows.

    Torch gives them zeros, converters' kernels NaN, which would go from there to all others as 0 x NaN.
    """
    original = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def masked(*arguments: Any, local_size: int | None = None, **options: Any) -> torch.Tensor | None:
        mask: torch.Tensor | None = original(*arguments, local_size=local_size, **options)
        if mask is None or local_size is None:
            return mask
        return mask | ~mask.any(dim=-1, keepdim=True)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = masked
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = original
