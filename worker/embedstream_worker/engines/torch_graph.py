"""A model folder's modules as a function of tensors alone, which converters can trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from embedstream_worker.engines.base import Role
from embedstream_worker.engines.graph_inputs import third_input
from embedstream_worker.engines.text_input import TextModel

EXAMPLE_ROWS, EXAMPLE_TOKENS = 3, 16


class Original(Protocol):
    """A model as torch runs it."""

    modules: Any
    text_model: TextModel

    def tensors(self, features: dict[str, Any], role: Role) -> tuple[torch.Tensor, ...]:
        """All that it gives for a padded batch, kind by kind, as `arrays.results_of` takes it."""


class Graph(torch.nn.Module):
    """All modules and heads of a model for one role."""

    def __init__(self, original: Original, role: Role) -> None:
        super().__init__()
        self._modules_of_model = modules = original.modules
        self._original = original
        self._role = role
        self._model = original.text_model
        self._pooling_mask: list[torch.Tensor] = []
        self._hooks = [
            part.register_forward_pre_hook(self._swap_mask)
            for part in modules.modules()
            if isinstance(part, Pooling) and not part.include_prompt
        ]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, third: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """All that the model gives. `third`: as of `third_input`."""
        given = third_input(self._model)
        self._pooling_mask[:] = [third] if third is not None and given == "pooling_mask" else []
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._model.input.token_types:
            types = third if given == "token_type_ids" else None
            features["token_type_ids"] = torch.zeros_like(input_ids) if types is None else types
        return self._original.tensors(features, self._role)

    def release(self) -> None:
        """Leave the modules as they were."""
        for hook in self._hooks:
            hook.remove()

    def _swap_mask(self, _module: torch.nn.Module, inputs: tuple[dict[str, Any]]) -> tuple[dict[str, Any]]:
        # Pooling's own way to leave the prompt out depends on its values, which tracing cannot follow.
        return ({**inputs[0], "attention_mask": self._pooling_mask[0]},) if self._pooling_mask else inputs


def graph_example(model: TextModel, role: Role) -> list[torch.Tensor]:
    """Inputs for tracing a `Graph`: ids, attention mask, and the third input if there is one."""
    sample = model.input.sample(EXAMPLE_ROWS, EXAMPLE_TOKENS, role)
    ids, mask, types = (torch.from_numpy(array) for array in model.input.pad(sample))
    # Uneven on purpose: with full rows only, tracing would find that no mask is needed.
    mask[1, slice(0, 5) if model.input.padding_side == "left" else slice(-5, None)] = 0
    third = {"pooling_mask": mask.clone(), "token_type_ids": types, None: None}[third_input(model)]
    return [ids, mask] if third is None else [ids, mask, third]


def graph_names(modules: Any, model: TextModel) -> dict[Role, str]:
    """The name of each role's graph. Without ways of their own, all roles share one."""
    routed = any(isinstance(part, Router) for part in modules.modules())
    first = next(iter(model.roles))
    return {role: role if routed else first for role in model.roles}


@contextmanager
def traceable() -> Iterator[None]:
    """While a `Graph` is traced: in ways that converters know, with the same results."""
    with finite_attention(), _plain_isin():
        yield


@contextmanager
def _plain_isin() -> Iterator[None]:
    original = torch.isin

    def isin(elements: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        return (elements.unsqueeze(-1) == among).any(dim=-1)

    torch.isin = isin  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.isin = original


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
