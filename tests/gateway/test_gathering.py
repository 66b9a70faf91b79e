"""What many callers ask at once goes together, and each gets its own."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from embedstream.api.interactive import EmbedReply, EmbedRequest, make_pairs, make_request
from embedstream.errors import BrokerError
from embedstream.queue.workers import WorkerRecord
from embedstream.tracing import Traces
from embedstream_gateway.fleet import LiveModel
from embedstream_gateway.gathering import MOST_WAITING_BYTES, PIECE_BYTES, PIECE_TEXTS, Gathering, Rows
from embedstream_gateway.refusals import Refusal

WORKER = WorkerRecord(
    name="w",
    host="h",
    pid=1,
    model="m",
    fingerprint="f",
    engine="e",
    device="cpu",
    dtype="float32",
    roots=(),
    state="ready",
    started=0.0,
)
MODEL = LiveModel("m", (WORKER,))


class Queue:
    """Answers each text with its length, once it may."""

    def __init__(self, fingerprints: tuple[str, ...] = ("f",)) -> None:
        self.requests: list[EmbedRequest] = []
        self.open = asyncio.Event()
        self._fingerprints = fingerprints

    async def ask(self, request: EmbedRequest, queue: str, timeout: float) -> EmbedReply | None:
        assert queue == "m"
        assert timeout > 0
        request.check()
        self.requests.append(request)
        fingerprint = self._fingerprints[len(self.requests) % len(self._fingerprints)]
        await self.open.wait()
        if "down" in request.texts:
            raise BrokerError("Redis is away")
        if "silent" in request.texts:
            return None
        if "bad" in request.texts:
            return EmbedReply(error=f"text {request.texts.index('bad')}: empty: it is bad")
        if "broken" in request.texts:
            return EmbedReply(error="out of order", internal=True)
        lengths = np.array([len(text) for text in request.texts])
        long = tuple(np.flatnonzero(lengths > 5).tolist())
        numbers, counts = lengths.astype("<f4").tobytes(), lengths.astype("<u4").tobytes()
        return EmbedReply(dim=1, vectors=numbers, counts=counts, cut=long, fingerprint=fingerprint)


def request(*texts: str) -> EmbedRequest:
    return make_request(texts, "document", None, None, None)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def ask_all(queue: Queue, gathering: Gathering, *requests: EmbedRequest) -> list[Rows | BaseException]:
    """One after another, while the queue does not answer yet."""
    tasks = []
    for each in requests:
        tasks.append(asyncio.create_task(gathering.run(MODEL, each)))
        await settle()
    queue.open.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_comes_while_others_are_under_way_goes_together_and_each_gets_its_own() -> None:
    queue = Queue()
    texts = ["x" * length for length in range(1, 65)]
    found = await ask_all(queue, Gathering(queue, 10, Traces()), *(request(text, "abc") for text in texts))
    assert [len(sent.texts) for sent in queue.requests] == [2, 2, 124]
    for text, rows in zip(texts, found, strict=True):
        assert isinstance(rows, Rows)
        assert rows.numbers.tolist() == [[len(text)], [3]]
        assert rows.tokens.tolist() == [len(text), 3]
        assert rows.cut == ((0,) if len(text) > 5 else ())


async def test_only_the_same_settings_go_together() -> None:
    queue = Queue()
    queries = [make_request(("q",), "query", None, None, None) for _ in range(4)]
    pairs = [make_pairs(f"question {number}", ["a"], None) for number in range(3)]
    await ask_all(queue, Gathering(queue, 10, Traces()), *(request("d") for _ in range(4)), *queries, *pairs)
    for sent in queue.requests:
        assert set(sent.texts) in ({"d"}, {"q"}, {"a"})
        assert (sent.role == "query") == (sent.texts[0] == "q")
    assert sum(sent.query is not None for sent in queue.requests) == 3


async def test_a_long_request_is_cut_into_pieces_and_comes_back_whole() -> None:
    queue = Queue()
    texts = ["x" * (number % 9 + 1) for number in range(2 * PIECE_TEXTS + 10)]
    (rows,) = await ask_all(queue, Gathering(queue, 10, Traces()), request(*texts))
    assert isinstance(rows, Rows)
    assert rows.tokens.tolist() == [len(text) for text in texts]
    assert list(rows.cut) == [at for at, text in enumerate(texts) if len(text) > 5]
    assert max(len(sent.texts) for sent in queue.requests) <= PIECE_TEXTS


async def test_a_text_that_cannot_be_embedded_costs_only_its_own_request() -> None:
    queue = Queue()
    found = await ask_all(
        queue, Gathering(queue, 10, Traces()), *(request(t) for t in ("1", "2", "fine", "bad", "good"))
    )
    assert isinstance(found[3], Refusal)
    assert (found[3].status, str(found[3])) == (400, "text 0: empty: it is bad")
    assert all(isinstance(rows, Rows) for at, rows in enumerate(found) if at != 3)


async def test_a_text_at_fault_is_named_by_its_place_among_all_texts_of_its_request() -> None:
    queue = Queue()
    texts = ["fine"] * (PIECE_TEXTS + 5)
    texts[PIECE_TEXTS + 2] = "bad"
    (refused,) = await ask_all(queue, Gathering(queue, 10, Traces()), request(*texts))
    assert isinstance(refused, Refusal)
    assert str(refused) == f"text {PIECE_TEXTS + 2}: empty: it is bad"
    texts[PIECE_TEXTS + 2] = "x" * (2 * 1024 * 1024)
    (refused,) = await ask_all(queue, Gathering(queue, 10, Traces()), request(*texts))
    assert isinstance(refused, Refusal)
    assert str(refused).startswith(f"text {PIECE_TEXTS + 2} has 2,097,152 bytes")


async def test_requests_that_are_too_much_together_are_answered_one_by_one() -> None:
    queue = Queue()
    pairs = make_pairs("q" * 100_000, ["a"] * 50, None)
    found = await ask_all(queue, Gathering(queue, 10, Traces()), *[pairs] * 4)
    assert all(isinstance(rows, Rows) for rows in found), found


@pytest.mark.parametrize(
    ("text", "kind", "status"), [("down", BrokerError, None), ("silent", Refusal, 503), ("broken", Refusal, 500)]
)
async def test_what_is_no_requests_own_fault_ends_every_request_that_went_together(
    text: str, kind: type[Exception], status: int | None
) -> None:
    queue = Queue()
    found = await ask_all(queue, Gathering(queue, 10, Traces()), *(request(t) for t in ("1", "2", "a", text)))
    assert [isinstance(each, kind) for each in found] == [False, False, True, True]
    assert getattr(found[3], "status", None) == status


async def test_one_answer_holds_no_vectors_of_two_models() -> None:
    queue = Queue(("new", "old"))
    (refused,) = await ask_all(queue, Gathering(queue, 10, Traces()), request(*["x"] * (PIECE_TEXTS + 1)))
    assert isinstance(refused, Refusal)
    assert refused.status == 503


async def test_a_caller_that_waits_too_long_is_told_so_and_its_texts_are_not_sent_any_more() -> None:
    queue = Queue()
    gathering = Gathering(queue, 0.05, Traces())
    tasks = []
    for text in ("1", "2", "late"):
        tasks.append(asyncio.create_task(gathering.run(MODEL, request(text))))
        await settle()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(each, Refusal) and each.status == 503 and each.retry_after for each in found)
    queue.open.set()
    await settle()
    assert [sent.texts for sent in queue.requests] == [("1",), ("2",)]
    assert isinstance((await ask_all(queue, gathering, request("next")))[0], Rows)


async def test_more_than_the_bound_is_not_kept_waiting() -> None:
    queue = Queue()
    texts = ["x" * (1024 * 1024)] * 8
    rounds = MOST_WAITING_BYTES // (8 * 1024 * 1024)
    gathering = Gathering(queue, 10, Traces())
    found = await ask_all(queue, gathering, *(request(*texts) for _ in range(rounds + 2)))
    refused = [each for each in found if isinstance(each, Refusal)]
    assert [each.status for each in refused] == [429, 429]
    assert all(each.retry_after for each in refused)
    assert max(sum(map(len, sent.texts)) for sent in queue.requests) == PIECE_BYTES
    (later,) = await ask_all(queue, gathering, request(*texts))
    assert isinstance(later, Rows), "what was answered does not count any more"
