"""Whatever oddities a corpus mixes, every row ends once, for the right reason, and nothing is a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from conftest import RedisServer
from e2e.harness import assert_vectors, fleet, read_errors, read_rows, run
from hypothesis import HealthCheck, Phase, event, given, note, settings
from lab.hashing_reference import reference_vector
from lab.oddities import Code, Corpus, corpora

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Block, decode_block, encode_block
from embedstream_producer.corpus import check_sources, part_name
from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines.hashing import MAX_LENGTH, HashingEngine

CORPORA = int(os.environ.get("EMBEDSTREAM_FUZZ_CORPORA", "400"))
"""Read in this process; one of 40 by whole commands, too."""

Found = dict[tuple[int, int], tuple[str, str] | Code]
ENGINE = HashingEngine(8)


def fuzz(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def names_of(corpus: Corpus, folder: Path) -> list[str]:
    """The corpus as files, and how a command names them."""
    folder.mkdir(exist_ok=True)
    for source in corpus.sources:
        (folder / source.name).write_bytes(source.data)
    names = [str(folder / source.name) for source in corpus.sources]
    return ["-", *names[1:]] if corpus.piped else names


def read(corpus: Corpus, folder: Path) -> Found | None:
    """How the rows end, by place, as a producer reads them and a worker takes them; None if the corpus is refused."""
    names = names_of(corpus, folder)
    spec = JobSpec(
        queue="q",
        output="/out",
        model="hashing",
        parts=tuple(map(part_name, names)),
        empty=corpus.settings.empty,
        number_rows=corpus.settings.number_rows,
    )
    found: Found = {}
    with DuplicateIndex() as index:
        try:
            parts = check_sources(names, BytesIO(corpus.sources[0].data), spec=spec)
            for part in parts:
                blocks = list(part.blocks(spec, index))
                for place, end in ends(sent(block, len(parts)) for block in blocks):
                    assert place not in found, "a row ends twice"
                    found[place] = end
                if not part.once:
                    again = part.blocks(spec, index)
                    assert [block.sum for block in again] == [block.sum for block in blocks], (
                        "the same file, other blocks"
                    )
        except InputError as error:
            note(f"refused: {error}")
            return None
    return found


def sent(block: Block, parts: int) -> Block:
    """As a worker has it."""
    fields = encode_block(block).fields().items()
    raw = {name.encode(): value if isinstance(value, bytes) else str(value).encode() for name, value in fields}
    return decode_block(raw, (), parts)


def ends(blocks: Iterator[Block]) -> Iterator[tuple[tuple[int, int], tuple[str, str] | Code]]:
    for block in blocks:
        rows = block.rows.to_pylist()
        assert_embedded([row["text"] for row in rows])
        yield from (((block.part, row["row"]), (row["id"], row["text"])) for row in rows)
        for refusal in block.refused:
            assert refusal.message.strip()
            assert "\n" not in refusal.message
            yield (block.part, refusal.row), Code(refusal.code)


def assert_embedded(texts: Sequence[str]) -> None:
    tokens = ENGINE.tokenizer().encode(texts, MAX_LENGTH)
    for rows in cut_batches(tokens.lengths, 65_536, padded=False):
        vectors = ENGINE.run(gather_batch(tokens, rows, 0, "document"))["dense"]
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


@fuzz(CORPORA)
@given(corpora())
def test_every_row_ends_once_and_for_the_right_reason(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> None:
    found = read(corpus, tmp_path_factory.getbasetemp() / "corpus")
    event("refused" if found is None else "read")
    assert found == corpus.verdicts()


def test_whole_commands_end_with_the_right_exit_code_and_rows(redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.client().flushall()
    taken = count()

    @settings(fuzz(max(CORPORA // 40, 1)), phases=[Phase.generate])  # a command takes too long to look for the smallest
    @given(corpora().filter(lambda corpus: not corpus.piped))
    def ends_rightly(corpus: Corpus) -> None:
        folder = tmp_path / str(next(taken))
        expected = corpus.verdicts()
        flags = ["--empty", corpus.settings.empty, *(["--number-rows"] if corpus.settings.number_rows else [])]
        made = run(
            "embed-submit", *names_of(corpus, folder), "-o", folder / "out", "--model", "hashing", *flags,
            "--redis", redis_server.url,
        )  # fmt: skip
        note(made.stderr)
        assert "Traceback" not in made.stderr
        good = {place: end for place, end in (expected or {}).items() if isinstance(end, tuple)}
        bad = {place: end for place, end in (expected or {}).items() if isinstance(end, Code)}
        code = 2 if expected is None else 0 if not bad else 3 if good else 1
        assert made.returncode == code
        if expected is None:
            assert not (folder / "out").exists()
            return
        rows = {(row["part"], row["row"]): row for row in read_rows(folder / "out")}
        assert {place: (row["id"], row["text"]) for place, row in rows.items()} == good
        assert_vectors(
            {str(place): row["embedding"] for place, row in rows.items()},
            {str(place): reference_vector(text) for place, (_, text) in good.items()},
        )
        parts = [str(folder / source.name) for source in corpus.sources]
        errors = [
            ((parts.index(error["file"]), error["line"] - 1), error["code"]) for error in read_errors(folder / "out")
        ]
        assert errors == sorted(bad.items())

    with fleet(redis_server.url, tmp_path) as here:
        here.start_worker()
        ends_rightly()
