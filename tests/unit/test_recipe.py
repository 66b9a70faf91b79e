"""What decides the vectors, and whether the model's folder says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedstream.jobs import JobSpec
from embedstream.outputs import Kind
from embedstream_worker.engines.base import EngineInfo, Origin, OutputInfo
from embedstream_worker.models import ModelFolder
from embedstream_worker.recipe import origin_of, recipe_of

OLD = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": False}


def folder(path: Path, modules: list[str], pooling: dict[str, Any] | None = None) -> ModelFolder:
    listed = [
        {"idx": at, "name": str(at), "path": f"{at}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for at, kind in enumerate(modules)
    ]
    if modules:
        (path / "modules.json").write_text(json.dumps(listed))
    for at, kind in enumerate(modules):
        (path / f"{at}_{kind}").mkdir()
        if kind == "Pooling" and pooling is not None:
            (path / f"{at}_{kind}" / "config.json").write_text(json.dumps(pooling))
    return ModelFolder(path, "m", "0123", "from a test")


@pytest.mark.parametrize(
    ("modules", "pooling", "mode", "by"),
    [
        (["Transformer", "Pooling", "Normalize"], OLD | {"pooling_mode_cls_token": True}, "cls", "folder"),
        (["Transformer", "Pooling"], OLD | {"pooling_mode_lasttoken": True}, "lasttoken", "folder"),
        (
            ["Transformer", "Pooling"],
            OLD | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "cls+mean",
            "folder",
        ),
        (["Transformer", "Pooling"], {"pooling_mode": "max"}, "max", "folder"),
        (["Transformer", "Pooling"], {"word_embedding_dimension": 3}, "mean", "folder"),
        (["StaticEmbedding"], None, "mean", "folder"),
        ([], None, "mean", "assumed"),
    ],
)
def test_pooling_is_named_and_whether_the_folder_says_it(
    modules: list[str], pooling: dict[str, Any] | None, mode: str, by: str, tmp_path: Path
) -> None:
    assert origin_of(folder(tmp_path, modules, pooling)) == Origin("from a test", "0123", mode, by)


@pytest.mark.parametrize(
    ("outputs", "normalized"),
    [
        ({"dense": True, "sparse": False, "multivector": True}, True),
        ({"dense": False, "sparse": False, "multivector": True}, False),
        ({"sparse": False}, False),
        ({"score": False}, False),
    ],
)
def test_vectors_alone_say_whether_a_model_normalizes(outputs: dict[Kind, bool], normalized: bool) -> None:
    info = EngineInfo(
        engine="torch",
        device="cpu",
        dtype="float32",
        fingerprint="",
        max_length=8,
        padded=True,
        batch_tokens=0,
        outputs={kind: OutputInfo(4, unit) for kind, unit in outputs.items()},
    )
    spec = JobSpec(queue="q", output="/out", model="m", parts=())
    assert recipe_of(info, spec, "", 8).normalized == normalized
