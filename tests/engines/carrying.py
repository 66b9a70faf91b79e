"""Model folders that carry a graph for ONNX Runtime, as exporters write it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

NAMES = ("input_ids", "attention_mask", "token_type_ids")
AXES = {0: "batch_size", 1: "sequence_length"}


class Carried(torch.nn.Module):
    """What a graph holds: a transformer without its tail, or with one of its own, or a scoring one."""

    def __init__(self, folder: Path, output: str) -> None:
        super().__init__()
        head = transformers.AutoModelForSequenceClassification if output == "logits" else transformers.AutoModel
        self.model = head.from_pretrained(folder)
        self.output = output

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        given = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types)
        tensor: torch.Tensor = given.logits if self.output == "logits" else given.last_hidden_state
        return tensor[:, 0] if self.output == "sentence_embedding" else tensor


def carry(folder: Path, weights: Path, output: str = "last_hidden_state") -> None:
    """Write the transformer that lies in `weights` as the folder's `onnx/model.onnx`."""
    (folder / "onnx").mkdir(exist_ok=True)
    torch.onnx.export(
        Carried(weights, output).eval(),
        tuple(torch.ones(2, 9, dtype=torch.int64) for _ in NAMES),
        str(folder / "onnx" / "model.onnx"),
        input_names=[*NAMES],
        output_names=[output],
        dynamic_axes=dict.fromkeys(NAMES, AXES)
        | {output: AXES if output == "last_hidden_state" else {0: "batch_size"}},
        opset_version=17,
        dynamo=False,
    )
