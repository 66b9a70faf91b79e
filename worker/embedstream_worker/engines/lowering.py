"""Transformers of a loaded model in bfloat16, and what follows them in float32."""

from __future__ import annotations

from typing import Any

import torch

from embedstream_worker.engines.torch_features import transformers_of


def to_bfloat16(module: torch.nn.Module) -> None:
    """All but the frequencies that positions are made from: rounded, they would misplace the tokens of long texts."""
    kept = {name: buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2].endswith("inv_freq")}
    module.to(torch.bfloat16)
    for name, buffer in kept.items():
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, buffer)


def lower_below_heads(modules: Any) -> None:
    """Transformers in bfloat16; their heads, such as the layer that scores, and all other modules in float32."""
    for transformer in transformers_of(modules):
        base = transformer.model.base_model
        _untie(transformer.model, base)
        to_bfloat16(base)
        if base is transformer.model:  # whose own hooks are passed over
            transformer.register_forward_hook(_upcast)
        else:
            base.register_forward_hook(_upcast)


def _untie(model: torch.nn.Module, base: torch.nn.Module) -> None:
    """Give heads weights of their own where they share those of the base, as decoders do its table of tokens."""
    below = set(base.modules())
    shared = set(base.parameters())
    for module in model.modules():
        for name, parameter in [] if module in below else [*module.named_parameters(recurse=False)]:
            if parameter in shared:
                setattr(module, name, torch.nn.Parameter(parameter.clone(), requires_grad=False))


def _upcast(_module: torch.nn.Module, _inputs: Any, outputs: Any) -> Any:
    for name, value in outputs.items():
        outputs[name] = upcast(value)
    return outputs


def upcast(value: Any) -> Any:
    """A tensor in float32, if it is in bfloat16."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
