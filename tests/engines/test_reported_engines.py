"""What people reported of models in other tools, tried on the engines: each test carries its reports' names."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from e2e.harness import environment
from engines.embedding import embed, lowest_cosine
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from embedstream.errors import ModelError
from embedstream_worker.engines import torch_device, torch_loading
from embedstream_worker.engines.torch_engine import TorchEngine
from embedstream_worker.models import resolve_model
from embedstream_worker.tokenize import encode_rows

ADDED = ("aaaa", "eg", "deb", "\u200c", "ccfc")
"""Normalized, and one of them normalized to nothing: with tokenizers 0.23 some texts panic, others take all memory."""


@pytest.fixture(scope="module")
def panicking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM whose tokenizer has these tokens."""
    folder = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(resolve_model("all-MiniLM-L6-v2").path, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=True) for token in ADDED])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_tokenizers_1349_a_text_on_which_the_tokenizer_panics_costs_itself_alone(panicking: Path) -> None:
    engine = TorchEngine(resolve_model(str(panicking)), "cpu", "bfloat16")
    tokens, errors = encode_rows(engine.tokenizer(), ["hello", "\u00a3", "good text", "the panic \u00a35"], "", 256)
    assert {row: code for row, (code, _) in errors.items()} == {1: "tokenizer_error", 3: "tokenizer_error"}
    assert "AddedVocabulary bad split" in errors[1][1]
    assert tokens.lengths.tolist() == [7, 0, 10, 0]


def test_tokenizers_1349_a_panic_while_a_model_is_loaded_is_an_error(
    panicking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_loading, "HARMLESS", "\u00a3")
    with pytest.raises(ModelError, match="bad split"):
        TorchEngine(resolve_model(str(panicking)), "cpu", "float32")


def test_tokenizers_1014_a_text_that_takes_all_memory_ends_the_process_as_any_poison_does(panicking: Path) -> None:
    """What follows is in `tests/e2e/test_poison.py`: the text alone, after three workers."""
    program = f"""
import resource, tokenizers
from embedstream_worker.tokenizing import FastTokenizer, Limits
tokenizer = FastTokenizer(tokenizers.Tokenizer.from_file("{panicking}/tokenizer.json"), Limits(512, 3))
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
tokenizer.encode(["a\u0300" * 50], 256)
"""
    ended = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, check=False)
    assert ended.returncode == -signal.SIGABRT


def deberta(folder: Path, max_seq_length: int) -> SentenceTransformer:
    """Relative positions, and 64 of them in its configuration."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("all-MiniLM-L6-v2").path)
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
    )
    transformers.DebertaV2Model(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = SentenceTransformer(modules=[Transformer(str(folder / "base")), Pooling(32, "mean")], device="cpu")
    model.save(str(folder / "model"), create_model_card=False)
    (folder / "model" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))
    return SentenceTransformer(str(folder / "model"), device="cpu")


@pytest.mark.parametrize("max_seq_length", [40, 200])
def test_transformers_16998_relative_positions_are_cut_where_sentence_transformers_cuts(
    tmp_path: Path, max_seq_length: int
) -> None:
    reference = deberta(tmp_path, max_seq_length)
    text = "one two three " * 50
    engine = TorchEngine(resolve_model(str(tmp_path / "model")), "cpu", "float32")
    assert engine.tokenizer().encode([text], engine.info.max_length).lengths.tolist() == [min(max_seq_length, 152)]
    assert lowest_cosine(embed(engine, [text]), reference.encode([text])) >= 0.99999


def test_openvino_37838_torch_takes_no_more_threads_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(torch_device, "cpu_cores", lambda: 1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    try:
        torch_device.share_cores(torch.device("cpu"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
