"""Models with code or pickles of their own: what runs when it is trusted, and that nothing runs when it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engines.embedding import MINILM, embed
from engines.model_shapes import bert_mean_without_prompt
from safetensors.torch import load_file

from embedstream.errors import ModelError
from embedstream_worker.engines.torch_engine import TorchEngine
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import resolve_model

OWN_CODE = """
import pathlib
from transformers import BertConfig, BertModel

pathlib.Path({marker!r}).write_text("ran")

class OwnConfig(BertConfig):
    model_type = "brand_new"

class OwnModel(BertModel):
    config_class = OwnConfig
"""

EMBED = """
import sys
from pathlib import Path
import numpy as np
from engines.embedding import embed
from embedstream.errors import ModelError
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.model_folder import Trust

folder, vectors, marker = sys.argv[1:]

def load(code):
    return load_engine(EngineOptions(folder, engine="torch", dtype="float32", trust=Trust(code=code)))

try:
    load(code=False)
except ModelError as error:
    print(error, "(ran)" if Path(marker).exists() else "(did not run)")
np.save(vectors, embed(load(code=True), ["a text", "another text"]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bert_mean_without_prompt(tmp_path / "model", resolve_model(MINILM).path, [])


def run(tmp_path: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what runs code of a model's keeps a copy of it, where this variable says."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), *sys.path]))
    return subprocess.run(
        [sys.executable, "-c", EMBED, *map(str, args)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.holds("Closed")
def test_code_of_the_models_own_runs_only_when_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    marker, vectors = tmp_path / "ran", tmp_path / "vectors.npy"
    ours = TorchEngine(resolve_model(str(folder)), "cpu", "float32")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "brand_new",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(OWN_CODE.format(marker=str(marker)))
    done = run(tmp_path, folder, vectors, marker)
    assert done.returncode == 0, done.stderr
    assert "needs code of its own" in done.stdout
    assert "(did not run)" in done.stdout
    assert marker.exists()
    np.testing.assert_allclose(np.load(vectors), embed(ours, ["a text", "another text"]), atol=1e-6)


def test_pickled_weights_give_the_same_vectors_when_they_are_allowed(folder: Path) -> None:
    plain = TorchEngine(resolve_model(str(folder)), "cpu", "float32")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    pickled = TorchEngine(resolve_model(str(folder), trust=Trust(pickle=True)), "cpu", "float32")
    np.testing.assert_array_equal(embed(pickled, ["a text"]), embed(plain, ["a text"]))
    assert pickled.info.fingerprint != plain.info.fingerprint


class Runs:
    """A pickle of it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._marker,)


@pytest.mark.holds("Closed")
def test_a_pickle_that_runs_code_is_refused_even_when_pickles_are_allowed(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"embeddings.word_embeddings.weight": Runs(marker)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = resolve_model(str(folder), trust=Trust(pickle=True))
    with pytest.raises(ModelError, match="cannot be loaded"):
        TorchEngine(found, "cpu", "float32")
    assert not marker.exists()
