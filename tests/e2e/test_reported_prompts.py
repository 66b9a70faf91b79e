"""What a user reads of a prompt that is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

from e2e.harness import read_manifest, run, write_corpus
from embedstream_worker.models import resolve_model


def test_uv_scripts_a_missing_prompt_of_a_known_family_is_told_once_with_the_way(tmp_path: Path) -> None:
    """The folder is called like a model of such a family, and has a config like theirs."""
    model, corpus, output = tmp_path / "e5-base-v2", tmp_path / "c.jsonl", tmp_path / "out"
    shutil.copytree(resolve_model("all-MiniLM-L6-v2").path, model)
    write_corpus(corpus, 2)
    how = ["--engine", "torch", "--dtype", "float32", "--no-warmup"]
    done = run("embed-submit", corpus, "--model", model, "-o", output, *how)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: ") == 1
    assert (
        f"recipe: {model} (from folder {model}), torch in float32, mean pooling (folder), normalized, at most 256 "
        "tokens (folder), no prompt (none in the folder)\n"
    ) in done.stderr
    [recipe] = read_manifest(output)["recipes"]
    assert recipe.pop("fingerprint")
    assert recipe == {
        "model": str(model), "source": f"from folder {model}", "engine": "torch", "dtype": "float32",
        "pooling": "mean", "pooling_from": "folder", "normalized": True, "max_length": 256,
        "max_length_from": "folder", "prompt_from": "none in the folder",
    }  # fmt: skip
    assert "role document, and this model's card wants one in front of every text: " in done.stderr
    assert "give it with --prompt 'passage: ', or confirm that there is none with --prompt ''" in done.stderr
    found = run("embed-search", output, "a question")
    assert found.returncode == 0, found.stderr
    assert "give it with --prompt 'query: '" in found.stderr
