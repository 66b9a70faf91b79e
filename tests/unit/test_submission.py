from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import msgspec
import pytest
import redis

from embedstream.corpus.parts import Part
from embedstream.corpus.records import Outcome
from embedstream.errors import CorpusChanged, InputError
from embedstream.lifecycle.submission import Pushed, push_job
from embedstream.queue.blocks import Block
from embedstream.queue.broker import Broker
from embedstream.queue.packing import Packer
from embedstream.queue.steps import Answer, Code, Step, Steps
from embedstream.records import PartContent
from embedstream.server.patience import Patience
from embedstream.settings import BlockLimits

JOB = "0123456789abcdef"


def blocks_of(count: int, part: int = 0, text: str = "text") -> list[Block]:
    packer = Packer(part, limits=BlockLimits(chunks=1))
    cut = [packer.add(row, f"id{row}", f"{text} {row}", 10) for row in range(count)]
    return [block for block in cut if block is not None]


class Given(Part):
    """A part whose blocks are cut already."""

    def __init__(self, read: Callable[[], Iterable[Block]], *contents: PartContent) -> None:
        super().__init__(0, "/corpus.jsonl", "corpus.jsonl")
        self._read, self._contents = read, iter(contents)

    def read(self) -> Iterator[Block]:
        yield from self._read()
        self.content = next(self._contents, None)

    def outcomes(self, *_: object) -> Iterator[Sequence[Outcome]]:
        raise AssertionError("there are blocks already")


def part_of(blocks: list[Block]) -> Given:
    return Given(lambda: blocks)


class Server(Broker):
    """Answers as Redis would, save where a test says otherwise; keeps what was asked."""

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        Steps.__init__(self, "queue")
        self.known: dict[int, list[bytes]] = {}
        for block in blocks:
            self.known.setdefault(block.part, []).append(block.sum)
        self.adopted: dict[int, list[bytes]] = {}
        self.sealed: dict[int, int] = {}
        self.sealed_with: dict[int, bytes | str] = {}
        self.sent: list[tuple[int, int]] = []
        self.pauses: list[float] = []
        self.said: list[str] = []
        self.odd: list[Callable[[str], Answer | None]] = []

    def next_block(self, job: str, part: int) -> int:  # noqa: ARG002
        return len(self.known.get(part, []))

    def sums(self, job: str, part: int, first: int, count: int) -> bytes:  # noqa: ARG002
        known = self.known.get(part, [])
        return b"".join([*known, *self.adopted.get(part, [])[len(known) :]][first : first + count])

    def run(self, step: Step[Any]) -> Any:
        for odd in self.odd:
            said = odd(step.script)
            if said is not None:
                return said
        values: tuple[Any, ...] = step.args
        return self.take(*values) if step.script == "submit" else self.close(*values)

    def take(self, part: int, block: int, *rest: Any) -> Answer:
        self.sent.append((part, block))
        sums = self.known.setdefault(part, [])
        if block > len(sums):
            return Answer(Code.GAP, number=len(sums))
        if block == len(sums):
            sums.append(rest[3])
            return Answer(Code.OK)
        return Answer(Code.DUPLICATE)

    def close(self, _: str, part: int, blocks: int, content: bytes | str) -> Answer:
        if len(self.known.get(part, [])) < blocks:
            return Answer(Code.MISSING, number=len(self.known.get(part, [])))
        self.sealed[part] = blocks
        self.sealed_with[part] = content
        return Answer(Code.OK)


def once(script: str, answer: Answer, act: Callable[[], None] = lambda: None) -> Callable[[str], Answer | None]:
    left = [answer]

    def odd(asked: str) -> Answer | None:
        if asked == script and left:
            said = left.pop()
            act()
            return said
        return None

    return odd


def push(server: Server, *parts: Given) -> Pushed:
    for number, part in enumerate(parts):
        part.index = number
    patience = Patience(server.said.append, "HOST", wait=server.pauses.append)
    return push_job(server, JOB, parts, lambda part: cast("Given", part).read(), 1 << 20, patience, jitter=lambda: 0.5)


def test_every_block_of_every_part_is_submitted_and_sealed() -> None:
    server = Server()
    assert push(server, part_of(blocks_of(3)), part_of(blocks_of(2, part=1))) is Pushed.SEALED
    assert server.sent == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert server.sealed == {0: 3, 1: 2}


def test_a_part_is_sealed_with_what_its_last_whole_reading_read() -> None:
    server = Server()
    server.odd.append(once("seal", Answer(Code.MISSING, number=2), lambda: server.known[0].__delitem__(slice(2, None))))
    part = Given(lambda: blocks_of(3), PartContent(9, "0" * 64), PartContent(10, "1" * 64))
    assert push(server, part, part_of(blocks_of(1, part=1))) is Pushed.SEALED
    assert server.sealed_with == {0: msgspec.json.encode(PartContent(10, "1" * 64)), 1: ""}


def test_blocks_that_redis_has_are_not_sent_again() -> None:
    blocks = blocks_of(5)
    server = Server(blocks[:3])
    assert push(server, part_of(blocks)) is Pushed.SEALED
    assert server.sent == [(0, 3), (0, 4)]


def test_a_corpus_that_changed_below_the_next_block_is_refused() -> None:
    server = Server(blocks_of(3))
    with pytest.raises(CorpusChanged, match=r"corpus\.jsonl: changed .*block 0 differs, lines 1 to 1.*-o"):
        push(server, part_of(blocks_of(3, text="other")))
    assert server.sent == []


def test_a_corpus_that_became_shorter_is_refused() -> None:
    blocks = blocks_of(3)
    with pytest.raises(CorpusChanged, match="block 2 is missing"):
        push(Server(blocks), part_of(blocks[:2]))


@pytest.mark.parametrize("changed", [2, 4])
def test_a_corpus_that_changed_in_an_adopted_block_is_refused_before_the_holes_are_filled(changed: int) -> None:
    blocks, others = blocks_of(5), blocks_of(5, text="other")
    server = Server()
    server.adopted = {0: [b"\0" * 8, b"\0" * 8, blocks[2].sum, b"\0" * 8, blocks[4].sum]}
    with pytest.raises(CorpusChanged) as refused:
        push(server, part_of([*blocks[:changed], others[changed], *blocks[changed + 1 :]]))
    assert refused.value.block == changed
    assert server.sent == []


def test_a_corpus_that_became_shorter_than_what_was_adopted_is_refused_before_the_holes_are_filled() -> None:
    blocks = blocks_of(5)
    server = Server()
    server.adopted = {0: [b"\0" * 8, *(block.sum for block in blocks[1:])]}
    with pytest.raises(CorpusChanged):
        push(server, part_of(blocks[:3]))
    assert server.sent == []


def test_a_gap_sends_the_producer_back_to_the_block_that_redis_lost() -> None:
    blocks = blocks_of(5)
    server = Server()

    def lose_all_but_one() -> None:
        del server.known[0][1:]

    def lossy() -> Iterator[Block]:
        for block in blocks:
            if block.number == 3 and len(server.sent) == 3:
                lose_all_but_one()
            yield block

    assert push(server, Given(lossy)) is Pushed.SEALED
    assert server.known[0] == [block.sum for block in blocks]
    assert server.sent == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 1), (0, 2), (0, 3), (0, 4)]


def test_blocks_lost_before_the_seal_are_submitted_again() -> None:
    blocks = blocks_of(4)
    server = Server()
    server.odd.append(once("seal", Answer(Code.MISSING, number=2), lambda: server.known[0].__delitem__(slice(2, None))))
    assert push(server, part_of(blocks)) is Pushed.SEALED
    assert server.sent[4:] == [(0, 2), (0, 3)]
    assert server.sealed == {0: 4}


def test_a_source_that_can_be_read_once_says_so_when_it_must_be_read_again() -> None:
    reads: list[int] = []

    def source() -> Iterable[Block]:
        if reads:
            raise InputError("standard input cannot be read again")
        reads.append(1)
        return blocks_of(3)

    server = Server()
    server.odd.append(once("submit", Answer(Code.GAP, number=0)))
    with pytest.raises(InputError, match="cannot be read again"):
        push(server, Given(source))


def test_a_full_queue_is_waited_for_with_growing_pauses() -> None:
    server = Server()
    server.odd += [once("submit", Answer(Code.FULL)) for _ in range(12)]
    assert push(server, part_of(blocks_of(1))) is Pushed.SEALED
    assert server.sent == [(0, 0)]
    assert server.pauses == sorted(server.pauses)
    assert server.pauses[0] == pytest.approx(0.02)
    assert server.pauses[-1] == pytest.approx(0.2)
    assert server.said == ["the queue is full, waiting for workers", ""]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("submit", "the queue is full, waiting for workers"),
        ("seal", "Redis is out of memory, waiting for workers"),
    ],
)
def test_a_server_without_memory_is_waited_for_as_a_full_queue(script: str, says: str) -> None:
    server = Server()

    def refuse() -> None:
        raise redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")

    server.odd += [once(script, Answer(Code.OK), refuse) for _ in range(3)]
    assert push(server, part_of(blocks_of(1))) is Pushed.SEALED
    assert server.said == [says, ""]
    assert max(server.pauses) <= 0.2


def test_a_full_queue_and_a_trouble_are_each_said_once_and_their_end_once() -> None:
    server = Server()

    def lose() -> None:
        raise redis.ConnectionError("cut")

    server.odd += [once("submit", Answer(Code.FULL)) for _ in range(2)]
    server.odd += [once("submit", Answer(Code.OK), lose) for _ in range(2)]
    assert push(server, part_of(blocks_of(2))) is Pushed.SEALED
    assert server.said == [
        "the queue is full, waiting for workers",
        "Redis at HOST cannot be reached, waiting for it",
        "",
    ]


def test_pushing_stops_when_the_job_was_ended_elsewhere() -> None:
    server = Server()
    server.odd.append(once("submit", Answer(Code.ENDED, "cancelled")))
    assert push(server, part_of(blocks_of(3))) is Pushed.ENDED
    assert server.sent == []


@pytest.mark.parametrize("script", ["submit", "seal"])
def test_a_job_that_redis_forgot_is_reported_as_lost(script: str) -> None:
    server = Server()
    server.odd.append(once(script, Answer(Code.UNKNOWN_JOB)))
    assert push(server, part_of(blocks_of(3))) is Pushed.LOST


def test_a_job_forgotten_while_its_sums_are_compared_is_lost() -> None:
    blocks = blocks_of(3)
    server = Server(blocks)
    server.odd.append(once("submit", Answer(Code.OK)))
    asked = iter([b"".join(block.sum for block in blocks), b"", b""])
    server.sums = lambda *_: next(asked)  # type: ignore[method-assign]
    assert push(server, part_of(blocks)) is Pushed.LOST
    assert server.sent == []


def test_a_block_that_another_run_changed_is_refused() -> None:
    server = Server()
    server.odd.append(once("submit", Answer(Code.CHANGED, number=0)))
    with pytest.raises(CorpusChanged):
        push(server, part_of(blocks_of(1)))
