"""embed-search and the model that a dataset names: loaded only if the user has named it once, with the same content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from e2e.harness import run
from engines.embedding import MINILM
from engines.model_shapes import static_embedding

from embedstream.errors import ModelError
from embedstream_worker import known_models
from embedstream_worker.models import resolve_model
from embedstream_worker.searching import show_each, show_nearest

TEXTS = {"a": "how to parse a date", "b": "the colour of the sea"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a dataset that embed-submit made with it, and a cache with what the worker remembers."""
    root = tmp_path_factory.mktemp("made")
    static_embedding(root, resolve_model(MINILM).path, [])
    rows = [json.dumps({"id": id, "text": text}) for id, text in TEXTS.items()]
    (root / "corpus.jsonl").write_text("\n".join(rows))
    ended = run(
        *("embed-submit", root / "corpus.jsonl", "--model", root / "model", "-o", root / "vectors"),
        EMBEDSTREAM_CACHE_DIR=str(root / "cache"),
    )
    assert ended.returncode == 0, ended.stderr
    return root


@pytest.fixture
def dataset(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset; what is remembered is a copy, the model is not."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path / "cache"))
    return made / "vectors"


def nearest(dataset: Path, capsys: pytest.CaptureFixture[str], model: Path | str | None = None) -> list[str]:
    """Ids, the nearest first."""
    show_nearest(str(dataset), TEXTS["b"], 2, str(model) if model else None)
    return [line.split()[1] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]


def test_who_made_a_dataset_searches_it_without_naming_its_model(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nearest(dataset, capsys) == ["b", "a"]


def test_queries_are_answered_one_after_the_other_and_one_without_a_vector_costs_itself(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for query in TEXTS.values():
        show_nearest(str(dataset), query, 2)
        answers.append(f"{query}\n{capsys.readouterr().out}\n")
    unknown = "\ud800"  # what no tokenizer takes
    assert show_each(str(dataset), [TEXTS["a"] + "\n", " \n", unknown, TEXTS["b"]], 2) == 1
    found = capsys.readouterr()
    assert found.out == "".join(answers)
    assert found.err.startswith("Error: query 3: the query cannot be embedded: ")


def test_a_model_that_was_never_used_here_is_named_once(
    dataset: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tmp_path / "cache" / "models")
    with pytest.raises(ModelError, match=r"never used by you on this machine, .* with --model"):
        nearest(dataset, capsys)
    assert nearest(dataset, capsys, made / "model") == ["b", "a"]
    assert nearest(dataset, capsys) == ["b", "a"]


@pytest.fixture
def moved(dataset: Path, made: Path, tmp_path: Path) -> Path:
    """A dataset whose model was used in another folder than that where it lies now."""
    copy = shutil.copytree(dataset, tmp_path / "copy")
    rename_model(copy, str(tmp_path / "old"))
    known_models.remember(str(tmp_path / "old"), resolve_model(str(made / "model")).fingerprint())
    return copy


def rename_model(dataset: Path, name: str) -> None:
    manifest = json.loads((dataset / "_manifest.json").read_text())
    manifest["spec"]["model"] = name
    (dataset / "_manifest.json").write_text(json.dumps(manifest))


def test_a_model_that_has_moved_is_taken_by_its_content(
    moved: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match="old is no longer there: say with --model where it lies now"):
        nearest(moved, capsys)
    assert nearest(moved, capsys, made / "model") == ["b", "a"]


def test_a_model_that_has_changed_is_not_loaded_by_itself_nor_another_taken_for_it(
    moved: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shutil.copytree(made / "model", tmp_path / "old")
    (changed / "more.json").write_text("{}")
    with pytest.raises(ModelError, match="old has changed since you used it"):
        nearest(moved, capsys)
    with pytest.raises(ModelError, match="hashing is not the model that made this dataset"):
        nearest(moved, capsys, "hashing")


def test_a_model_that_comes_with_a_dataset_is_not_even_looked_at(made: Path, tmp_path: Path) -> None:
    foreign = shutil.copytree(made / "vectors", tmp_path / "foreign")
    (foreign / "model").mkdir()
    os.mkfifo(foreign / "model" / "modules.json")  # to open it is to wait forever
    for name in ("foreign/model", str(foreign / "model")):
        rename_model(foreign, name)
        ended = run(
            *("embed-search", foreign, "a query"),
            timeout=60,
            EMBEDSTREAM_CACHE_DIR=str(made / "cache"),
        )
        assert ended.returncode == 2
        assert f"Error: the dataset's model {name} was never used by you on this machine" in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_the_hub_is_not_asked_for_a_name_out_of_a_dataset(
    moved: Path, known: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    rename_model(moved, "somebody/something")
    if known:
        known_models.remember("somebody/something", "0" * 32)
    with pytest.raises(ModelError, match="not in the local cache" if known else "never used by you"):
        nearest(moved, capsys)


def test_what_others_could_have_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path))
    known_models.remember("a model", "0" * 32)
    assert known_models.fingerprints("a model") == {"0" * 32}
    assert known_models.fingerprints("another model") == frozenset()
    (folder,) = (tmp_path / "models").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    assert known_models.fingerprints("a model") == frozenset()
    folder.chmod(0o700)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert known_models.fingerprints("a model") == frozenset()
