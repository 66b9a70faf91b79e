"""Where texts are cut: nothing is left out, no chunk is too long, and the best places are taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from embedstream.chunks import Document, chunk_input
from embedstream.errors import UsageError
from embedstream.jobs import ChunkBy, Chunking
from embedstream.lifecycle.opening import SpecSettings, make_spec
from embedstream_worker import cutting
from embedstream_worker.cutting import Cutter
from embedstream_worker.engines.hashing import HashingTokenizer
from embedstream_worker.splitting import split

TEXTS = st.text(st.sampled_from("ab é😀.,;!\n\t #`。") | st.characters(exclude_categories=["Cs"]), max_size=300)
WAYS = st.sampled_from(["recursive", "sentence", "markdown"])


def chunks_of(text: str, most: int, overlap: int = 0, by: ChunkBy = "recursive") -> list[str]:
    [begins] = HashingTokenizer().begins([text])
    spans = split(text, begins, most, overlap, by)
    assert spans is not None
    return [text[start:end] for start, end in spans]


@tries(deadline=None, max_examples=300)
@given(text=TEXTS, most=st.integers(1, 40), overlap=st.integers(0, 39), by=WAYS)
def test_chunks_have_all_of_a_text_and_no_more_tokens_than_they_may(
    text: str, most: int, overlap: int, by: ChunkBy
) -> None:
    overlap = min(overlap, most - 1)
    [begins] = HashingTokenizer().begins([text])
    spans = split(text, begins, most, overlap, by)
    assert spans is not None, "no character has more than four bytes, which is a token"
    covered: set[int] = set()
    places = begins.tolist()
    for (start, end), before in zip(spans, [None, *spans], strict=False):
        chunk = text[start:end]
        assert chunk == chunk.strip()
        assert chunk
        assert sum(start <= place < end for place in places) <= most
        if before is not None:
            assert before[0] < start
            assert before[1] < end
            assert sum(start <= place < before[1] for place in places) <= overlap
        covered |= set(range(start, end))
    assert all(at in covered for at, character in enumerate(text) if not character.isspace())


@tries(deadline=None, max_examples=100)
@given(texts=st.lists(TEXTS, max_size=4), title=st.sampled_from(["", "A title"]), by=WAYS, most=st.integers(8, 40))
def test_what_enters_the_model_has_no_more_tokens_than_a_chunk_may_have(
    texts: list[str], title: str, by: ChunkBy, most: int
) -> None:
    tokenizer, chunking = HashingTokenizer(), Chunking(tokens=most, overlap=2, by=by, format="{title}: {chunk}")
    cutter = Cutter(tokenizer, "passage: ", chunking, " ")
    for text, spans in zip(texts, cutter.cut([Document(title, text) for text in texts]), strict=True):
        assert not isinstance(spans, str)
        inputs = ["passage: " + chunk_input(chunking, " ", title, text[start:end]) for start, end in spans]
        assert (tokenizer.encode(inputs, 8192).lengths <= most).all()
        assert "".join("".join(text[start:end] for start, end in spans).split()) or not text.strip()


def test_the_best_place_is_taken_and_of_equally_good_ones_the_last() -> None:
    text = "One sentence here. Another one, with a comma.\nA line of its own.\n\nA paragraph. And more of it."
    assert chunks_of(text, 20) == [
        "One sentence here. Another one, with a comma.\nA line of its own.",
        "A paragraph. And more of it.",
    ]
    assert chunks_of("One sentence. Another sentence. A third sentence.", 8) == [
        "One sentence. Another sentence.",
        "A third sentence.",
    ]
    assert chunks_of("words and words, then words and words", 6) == ["words and words,", "then words and words"]
    assert chunks_of("x" * 20, 2) == ["x" * 8, "x" * 8, "x" * 4]
    assert chunks_of("第一句。第二句。第三句。", 6) == ["第一句。第二句。", "第三句。"]


def test_a_chunk_begins_with_sentences_of_the_one_before() -> None:
    text = "First sentence. Second one. Third sentence. Fourth one. Fifth sentence."
    chunks = chunks_of(text, 11, overlap=5)
    assert chunks == ["First sentence. Second one. Third sentence.", "Third sentence. Fourth one. Fifth sentence."]
    assert chunks_of("one two three four five six", 4, overlap=2)[1].startswith("three")


def test_sections_of_markdown_begin_at_their_headings_and_blocks_of_code_stay_whole() -> None:
    text = "# Title\n\nIntro text here.\n\n## First\n\nSome text.\n\n## Second\n\n```\n# no heading\n\ncode\n```\n"
    assert chunks_of(text, 16, by="markdown") == [
        "# Title\n\nIntro text here.\n\n## First\n\nSome text.",
        "## Second\n\n```\n# no heading\n\ncode\n```",
    ]


def test_a_long_text_is_cut_in_parts_and_its_chunks_lie_where_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "SEGMENT_CHARACTERS", 200)
    text = "\n\n".join(f"Paragraph number {i} has these words." for i in range(100))
    [spans] = Cutter(HashingTokenizer(), "", Chunking(tokens=30), " ").cut([Document("", text)])
    assert not isinstance(spans, str)
    assert "".join("".join(text[start:end] for start, end in spans).split()) == "".join(text.split())


def test_a_title_that_leaves_no_room_is_told() -> None:
    chunking = Chunking(tokens=10, overlap=2)
    [good, why] = Cutter(HashingTokenizer(), "", chunking, " ").cut([Document("", "text"), Document("t" * 36, "text")])
    assert good == [(0, 4)]
    assert isinstance(why, str)
    assert "its title, with prompt and special tokens, has 10 tokens, and a chunk at most 10" in why


@pytest.mark.parametrize(
    ("chunking", "said"),
    [
        (Chunking(tokens=10, overlap=10), r"--chunk-overlap 10: must be below the size of a chunk \(--chunk-tokens\)"),
        (Chunking(tokens=10, format="{title}"), r"--chunk-format '\{title\}': must have \{chunk\} once"),
        (Chunking(tokens=10, format="{chunk}{chunk}"), "must have"),
        (Chunking(tokens=2**20 + 1), "--chunk-tokens 1048577: must be between 1 and 1,048,576"),
    ],
)
def test_what_cannot_be_is_one_sentence(chunking: Chunking, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        chunking.check()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chunk_overlap": 8}, "--chunk-overlap: texts are cut with --chunk-tokens or --on-long chunk alone"),
        ({"chunk_by": "markdown"}, "--chunk-by: texts are cut with --chunk-tokens"),
        ({"chunk_tokens": 0}, "--chunk-tokens 0: must be at least 1"),
        ({"chunk_tokens": 8, "chunk_overlap": 8}, "--chunk-overlap 8: must be below the size of a chunk"),
        ({"chunk_tokens": 8, "query_field": "q", "keep": ["q"]}, "texts of pairs are not cut"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings: SpecSettings, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_spec(queue=None, output="/out", model="hashing", revision=None, parts=("p",), settings=settings)
