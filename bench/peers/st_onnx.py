"""sentence-transformers' own `encode` on its ONNX backend. Arguments: model folder, folder for its graphs, texts."""

from __future__ import annotations

import sys
from pathlib import Path

from peers.protocol import serve
from peers.st_encode import Encode
from sentence_transformers import SentenceTransformer
from sentence_transformers.backend import export_dynamic_quantized_onnx_model


class Onnx(Encode):
    """Settings as `Encode` has them; `dtype` is float32, or int8 for its dynamic quantization."""

    def __init__(self, folder: str, exported: Path) -> None:
        """`exported`: the model as ONNX, made if it is not there."""
        super().__init__(folder)
        self._exported = exported
        flags = Path("/proc/cpuinfo").read_text()
        self._processor = next(each for each in ("avx512_vnni", "avx512f", "avx2") if each in flags).removesuffix("f")
        if not self._graph("int8").exists():
            model = SentenceTransformer(folder, device="cpu", backend="onnx")
            model.save_pretrained(str(exported))
            export_dynamic_quantized_onnx_model(model, self._processor, str(exported))

    def _load(self, dtype: str) -> SentenceTransformer:
        return SentenceTransformer(
            str(self._exported), device="cpu", backend="onnx", model_kwargs={"file_name": self._graph(dtype).name}
        )

    def _graph(self, dtype: str) -> Path:
        name = f"model_qint8_{self._processor}" if dtype == "int8" else "model"
        return self._exported / "onnx" / f"{name}.onnx"


if __name__ == "__main__":
    serve(Onnx(sys.argv[1], Path(sys.argv[2])))
