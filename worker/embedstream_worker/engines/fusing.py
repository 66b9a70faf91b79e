"""Fewer kernels for the same numbers: one product instead of query, key and value; GELU in the product before it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation

_PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"))
"""What transformers' attention modules call them; all three take the module's own input."""

_DENSE_GELU = (("dense", "intermediate_act_fn"), ("lin1", "activation"))
"""What transformers' feed-forward modules call a product and the activation that alone sees its output."""

_ROUNDS = 5


def fuse_projections(model: nn.Module, undo: ExitStack) -> int:
    """Compute query, key and value by one product, wherever three `Linear` of one input stand side by side.

    The product's weights replace theirs; under their names are slices of its output. Answers how many were fused.
    Closing `undo` restores them; it keeps the old weights.
    """
    fused = 0
    for part in [*model.modules()]:
        for names in _PROJECTIONS:
            linears = [linear for name in names if type(linear := getattr(part, name, None)) is nn.Linear]
            alike = {(linear.in_features, linear.bias is not None) for linear in linears}
            if len(linears) == len(names) and len(alike) == 1:
                _fuse(part, names, linears, undo)
                fused += 1
    return fused


def fuse_gelu(model: nn.Module, undo: ExitStack, tokens: int | None = None) -> int:
    """Compute a product and the GELU after it at once. Answers how many were fused; closing `undo` restores them.

    On CUDA that takes GELU's form with tanh, which differs by less than 5e-4. `tokens`: fuse only what is faster on the
    model's CUDA device with so many tokens; None: all.
    """
    found = [
        (part, dense, activation)
        for part in model.modules()
        for dense, activation in _DENSE_GELU
        if _is_product(getattr(part, dense, None)) and _is_gelu(getattr(part, activation, None))
    ]
    faster: dict[torch.Size, bool] = {}
    fused = 0
    for part, dense, activation in found:
        plain, gelu = part.get_submodule(dense), part.get_submodule(activation)
        at_once = _DenseGelu(plain)
        shape = at_once.weight.shape
        if tokens is not None and shape not in faster:
            faster[shape] = _milliseconds(at_once, tokens) < _milliseconds(nn.Sequential(plain, gelu), tokens)
        if tokens is None or faster[shape]:
            _replace(part, {dense: at_once, activation: nn.Identity()}, undo)
            fused += 1
    return fused


class _Slice(nn.Module):
    """Some columns of what it is given."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states[..., self.start : self.stop]


class _DenseGelu(nn.Module):
    """GELU(x @ weight.T + bias), with the weights of the `Linear` that it replaces."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = dense.get_parameter("weight"), dense.get_parameter("bias")

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = states.reshape(-1, states.shape[-1])
        output = torch._addmm_activation(self.bias, flat, self.weight.t(), use_gelu=True)
        return output.view(*states.shape[:-1], -1)


@torch.no_grad()
def _fuse(part: nn.Module, names: tuple[str, ...], linears: list[nn.Linear], undo: ExitStack) -> None:
    first, widths = linears[0], [linear.out_features for linear in linears]
    product = nn.Linear(
        first.in_features,
        sum(widths),
        bias=first.bias is not None,
        device=first.weight.device,
        dtype=first.weight.dtype,
    )
    product.weight.copy_(torch.cat([linear.weight for linear in linears]))
    if first.bias is not None:
        product.bias.copy_(torch.cat([linear.bias for linear in linears]))
    ends = itertools.accumulate(widths)
    slices = {name: _Slice(end - width, end) for name, width, end in zip(names, widths, ends, strict=True)}
    _replace(part, slices, undo)
    undo.callback(delattr, part, "projections")
    part.projections = product
    undo.callback(part.register_forward_pre_hook(_project, with_kwargs=True).remove)


def _project(
    part: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Attention modules use their input for its three projections and its shape alone: they get all three at once."""
    product = part.get_submodule("projections")
    if inputs:
        return (product(inputs[0]), *inputs[1:]), options
    return inputs, options | {"hidden_states": product(options["hidden_states"])}


def _replace(part: nn.Module, others: Mapping[str, nn.Module], undo: ExitStack) -> None:
    for name, other in others.items():
        undo.callback(setattr, part, name, part.get_submodule(name))
        setattr(part, name, other)


def _is_product(part: nn.Module | None) -> bool:
    return type(part) is nn.Linear and part.bias is not None


def _is_gelu(part: nn.Module | None) -> bool:
    return type(part) is GELUActivation and part.act is nn.functional.gelu


@torch.inference_mode()
def _milliseconds(module: nn.Module, tokens: int) -> float:
    """The fastest of some runs on random states, on the module's CUDA device."""
    weight = next(module.parameters())
    states = torch.randn(1, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    taken: list[float] = []
    with torch.cuda.device(weight.device):
        for _ in range(_ROUNDS):
            begun.record()
            module(states)
            ended.record()
            ended.synchronize()
            taken.append(begun.elapsed_time(ended))
    return min(taken)
