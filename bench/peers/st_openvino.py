"""sentence-transformers' own `encode` on its OpenVINO backend. Arguments: model folder, texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peers.protocol import serve
from peers.st_encode import Encode
from sentence_transformers import SentenceTransformer
from sentence_transformers.backend import export_static_quantized_openvino_model

CALIBRATED_WITH = 300
"""Of the texts themselves, which is the best that can be done for them."""

HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


class OpenVino(Encode):
    """Settings as `Encode` has them; of `dtype` also int8, its static quantization."""

    def __init__(self, folder: str, texts: Path) -> None:
        """`texts`: a JSON list of them; beside it the model is kept as it was converted."""
        super().__init__(folder)
        self._texts = texts
        self._exported = texts.with_name("openvino")
        SentenceTransformer(folder, device="cpu", backend="openvino").save_pretrained(str(self._exported))

    def _load(self, dtype: str) -> SentenceTransformer:
        quantized = self._exported / "openvino" / "openvino_model_qint8_quantized.xml"
        if dtype == "int8" and not quantized.exists():
            self._quantize()
        return SentenceTransformer(
            str(self._exported),
            device="cpu",
            backend="openvino",
            model_kwargs={
                "file_name": quantized.name if dtype == "int8" else "openvino_model.xml",
                "ov_config": {"INFERENCE_PRECISION_HINT": HINTS[dtype]},
            },
        )

    def _quantize(self) -> None:
        data = self._texts.with_name("calibration")
        data.mkdir()
        texts: list[str] = json.loads(self._texts.read_text("utf-8"))
        lines = [json.dumps({"text": text}) for text in texts[:CALIBRATED_WITH]]
        (data / "train.jsonl").write_text("\n".join(lines), "utf-8")
        export_static_quantized_openvino_model(
            self._load("float32"),
            quantization_config=None,
            model_name_or_path=str(self._exported),
            dataset_name=str(data),
            dataset_config_name="default",
            dataset_split="train",
            column_name="text",
        )


if __name__ == "__main__":
    serve(OpenVino(sys.argv[1], Path(sys.argv[2])))
