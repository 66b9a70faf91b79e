from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import pytest

from embedstream.errors import CorpusChanged, InputError
from embedstream.lifecycle.submission import Part, Pushed, push_job
from embedstream.queue.blocks import Block
from embedstream.queue.packing import Packer
from embedstream.queue.plans import Action, NextBlock, Pause, Plan, Sums
from embedstream.queue.steps import Answer, Code, Step, Steps
from embedstream.records import PartContent
from embedstream.settings import BlockLimits

JOB = "0123456789abcdef"


def blocks_of(count: int, part: int = 0, text: str = "text") -> list[Block]:
    packer = Packer(part, limits=BlockLimits(chunks=1))
    cut = [packer.add(row, f"id{row}", f"{text} {row}", 10) for row in range(count)]
    return [block for block in cut if block is not None]


def part_of(blocks: list[Block]) -> Part:
    return Part("corpus.jsonl", lambda: iter(blocks))


class Server:
    """Answers a plan as Redis would, save where a script says otherwise; keeps what was asked."""

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self.sums: dict[int, list[bytes]] = {}
        for block in blocks:
            self.sums.setdefault(block.part, []).append(block.sum)
        self.adopted: dict[int, list[bytes]] = {}
        self.sealed: dict[int, int] = {}
        self.contents: dict[int, bytes | str] = {}
        self.sent: list[tuple[int, int]] = []
        self.pauses: list[float] = []
        self.odd: list[Callable[[str], Answer | None]] = []

    def run(self, plan: Plan[Pushed]) -> Pushed:
        answer: Any = None
        while True:
            try:
                action = plan.send(answer)
            except StopIteration as end:
                return Pushed(end.value)
            answer = self.answer(action)

    def answer(self, action: Action) -> Any:
        match action:
            case Pause(seconds):
                self.pauses.append(seconds)
                return None
            case NextBlock(_, part):
                return len(self.sums.get(part, []))
            case Sums(_, part, first, count):
                known = self.sums.get(part, [])
                return b"".join([*known, *self.adopted.get(part, [])[len(known) :]][first : first + count])
            case Step(script=script, args=args):
                for odd in self.odd:
                    said = odd(script)
                    if said is not None:
                        return said
                values: tuple[Any, ...] = args
                return self.submit(*values) if script == "submit" else self.seal(*values)
        raise AssertionError(action)

    def submit(self, part: int, block: int, *rest: Any) -> Answer:
        self.sent.append((part, block))
        sums = self.sums.setdefault(part, [])
        if block > len(sums):
            return Answer(Code.GAP, number=len(sums))
        if block == len(sums):
            sums.append(rest[3])
            return Answer(Code.OK)
        return Answer(Code.DUPLICATE)

    def seal(self, _: str, part: int, blocks: int, content: bytes | str) -> Answer:
        if len(self.sums.get(part, [])) < blocks:
            return Answer(Code.MISSING, number=len(self.sums.get(part, [])))
        self.sealed[part] = blocks
        self.contents[part] = content
        return Answer(Code.OK)


def once(script: str, answer: Answer, act: Callable[[], None] = lambda: None) -> Callable[[str], Answer | None]:
    left = [answer]

    def odd(asked: str) -> Answer | None:
        if asked == script and left:
            act()
            return left.pop()
        return None

    return odd


def push(server: Server, *parts: Part) -> Pushed:
    return server.run(push_job(Steps("queue"), JOB, parts, 1 << 20, jitter=lambda: 0.5))


def test_every_block_of_every_part_is_submitted_and_sealed() -> None:
    server = Server()
    assert push(server, part_of(blocks_of(3)), part_of(blocks_of(2, part=1))) is Pushed.SEALED
    assert server.sent == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert server.sealed == {0: 3, 1: 2}


def test_a_part_is_sealed_with_what_its_last_whole_reading_read() -> None:
    server, read = Server(), [PartContent(9, "0" * 64), PartContent(10, "1" * 64)]
    server.odd.append(once("seal", Answer(Code.MISSING, number=2), lambda: server.sums[0].__delitem__(slice(2, None))))
    part = Part("corpus.jsonl", lambda: iter(blocks_of(3)), content=lambda: read.pop(0))
    assert push(server, part, part_of(blocks_of(1, part=1))) is Pushed.SEALED
    assert server.contents == {0: msgspec.json.encode(PartContent(10, "1" * 64)), 1: ""}


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
        del server.sums[0][1:]

    def lossy() -> Iterator[Block]:
        for block in blocks:
            if block.number == 3 and len(server.sent) == 3:
                lose_all_but_one()
            yield block

    assert push(server, Part("corpus.jsonl", lossy)) is Pushed.SEALED
    assert server.sums[0] == [block.sum for block in blocks]
    assert server.sent == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 1), (0, 2), (0, 3), (0, 4)]


def test_blocks_lost_before_the_seal_are_submitted_again() -> None:
    blocks = blocks_of(4)
    server = Server()
    server.odd.append(once("seal", Answer(Code.MISSING, number=2), lambda: server.sums[0].__delitem__(slice(2, None))))
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
        push(server, Part("-", source))


def test_a_full_queue_is_waited_for_with_growing_pauses() -> None:
    server = Server()
    server.odd += [once("submit", Answer(Code.FULL)) for _ in range(12)]
    assert push(server, part_of(blocks_of(1))) is Pushed.SEALED
    assert server.sent == [(0, 0)]
    assert server.pauses == sorted(server.pauses)
    assert server.pauses[0] == pytest.approx(0.02)
    assert server.pauses[-1] == pytest.approx(0.2)


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
    plan = push_job(Steps("queue"), JOB, [part_of(blocks)], 1 << 20)
    assert server.answer(plan.send(None)) == b"".join(block.sum for block in blocks)
    assert isinstance(plan.send(b""), NextBlock)
    assert isinstance(plan.send(3), Sums)
    with pytest.raises(StopIteration) as end:
        plan.send(b"")
    assert end.value.value is Pushed.LOST


def test_a_block_that_another_run_changed_is_refused() -> None:
    server = Server()
    server.odd.append(once("submit", Answer(Code.CHANGED, number=0)))
    with pytest.raises(CorpusChanged):
        push(server, part_of(blocks_of(1)))
