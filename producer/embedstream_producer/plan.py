"""`embed-submit --plan`: what a job would be, without embedding anything."""

from __future__ import annotations

import contextlib
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
import redis

from embedstream.cli.starting import environment, python_command
from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.corpus.parts import Part
from embedstream.dataset.input_hash import entered
from embedstream.dataset.roots import is_redis
from embedstream.errors import EmbedstreamError
from embedstream.jobs import JobSpec
from embedstream.planning import Counted, Measure, Measured, TokenCounter, receive, send
from embedstream.queue.blocks import Block
from embedstream.queue.broker import Broker
from embedstream.queue.queues import look_at_queue
from embedstream.records import Recipe
from embedstream.server.connection import connect, mask
from embedstream.terminal import counted, duration
from embedstream_producer.progress import Progress

SAMPLE_ROWS = 32_768
"""Rows whose tokens are known at once, at most: a mean of them is within some permille of that of all."""

AT_ONCE_ROWS, AT_ONCE_CHARACTERS = 1024, 1024 * 1024
"""Texts that are tokenized in one message: enough for all cores."""

ROW_BYTES = {True: 120, False: 24}
"""Of a row besides vector and text, by whether the output is Redis: its key there, its id and numbers in files."""

MEASURED_SECONDS = 5.0

_ENDED = "the process that counts tokens and embeds has ended"

_ALL = 1 << 64
_SPREAD = 0x9E3779B97F4A7C15
"""Multiples of it, modulo 2 ** 64, are spread evenly however many there are (Weyl, by the golden ratio)."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the texts, prompt and special tokens included, after the cut."""

    total: int
    mean: float
    p50: int
    p95: int
    longest: int
    truncated: int
    """Texts longer than the model takes."""
    sampled: int
    """Rows that were tokenized; all figures are estimates if these are not all."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The object that `--plan --json` prints. Counts of rows are exact."""

    rows: int
    """That would be embedded."""
    refused: dict[str, int]
    """By kind."""
    skipped: int
    duplicate_texts: int
    """Rows whose text an earlier row has."""
    tokens: Tokens | None
    """None: see `tokens_unknown`."""
    tokens_unknown: str
    recipe: Recipe | None
    warning: str
    output: str
    output_bytes: int | None
    """About: vectors and texts before compression. None: the vectors' length is not known."""
    tokens_per_second: float | None
    """Of the queue, or as measured here; None: unknown until a worker has run."""
    measured: bool
    """Whether that was measured here."""
    seconds: float | None
    seconds_unknown: str
    """Why nothing could be measured."""


def make_plan(
    spec: JobSpec,
    parts: Sequence[Part],
    redis_url: str | None,
    progress: Progress,
    measure: Mapping[str, str] | None = None,
) -> tuple[Plan, str]:
    """Read the corpus, as the job would; returns the plan, and the recipe in words.

    `measure`: embed some texts here, with these flags of a worker, to know how fast that is.

    Raises:
        InputError: a part cannot be read.
        OutputError: no room for the index of ids and texts.
    """
    rows = skipped = repeated = text_bytes = 0
    refused: Counter[str] = Counter()
    with CountingProcess(spec) as process, DuplicateIndex() as ids, DuplicateIndex() as texts:
        sample = Sample(process.count)
        for part in parts:
            for block in part.blocks(spec, ids, on_position=_told(part.index, progress.reading)):
                found = entered(block.rows, spec.query_field)
                places: list[Any] = block.rows.column("row").to_pylist()
                rows += len(found)
                skipped += block.skipped
                refused.update(refusal.code for refusal in block.refused)
                text_bytes += _text_bytes(block)
                repeated += sum(earlier is not None for earlier in texts.check(part.index, places, found))
                if process.about.trouble == "":
                    sample.add(part.index, places, found)
        tokens = sample.tokens(rows)
        about, measured = process.about, None
        if measure is not None and tokens is not None:
            progress.phase("loading the model, and embedding for some seconds")
            measured = process.measure(sample.first, measure)
    pace = _pace(redis_url, spec) if measured is None else measured.tokens_per_second
    others = rows * ROW_BYTES[is_redis(spec.output)] + text_bytes * spec.text
    plan = Plan(
        rows=rows,
        refused=dict(sorted(refused.items())),
        skipped=skipped,
        duplicate_texts=repeated,
        tokens=tokens,
        tokens_unknown=about.trouble,
        recipe=measured.recipe if measured and measured.recipe else about.recipe,
        warning=about.warning,
        output=mask(spec.output),
        output_bytes=None if about.vector_bytes is None else rows * about.vector_bytes + others,
        measured=measured is not None and not measured.trouble,
        tokens_per_second=pace or None,
        seconds=tokens.total / pace if tokens is not None and pace else None,
        seconds_unknown=measured.trouble if measured else "",
    )
    return plan, measured.words if measured and measured.words else about.words


def lines(plan: Plan, words: str) -> Iterator[str]:
    """For people."""
    refused = ", ".join(f"{number:,} {code}" for code, number in plan.refused.items())
    yield f"plan:    {counted(plan.rows, 'row')} to embed; nothing was embedded"
    if plan.refused:
        yield f"refused: {counted(sum(plan.refused.values()), 'row')} ({refused})"
    if plan.skipped:
        yield f"skipped: {counted(plan.skipped, 'row')} of empty texts"
    if plan.duplicate_texts:
        yield f"duplicate texts: {plan.duplicate_texts:,}"
    if plan.tokens is None:
        yield f"tokens:  unknown: {plan.tokens_unknown}"
    else:
        tokens, exact = plan.tokens, plan.tokens.sampled == plan.rows
        about, how = ("", "") if exact else ("about ", f"; estimated from {tokens.sampled:,} rows")
        yield (
            f"tokens:  {about}{tokens.total:,} (mean {tokens.mean:.1f}, p50 {tokens.p50:,}, p95 {tokens.p95:,}, "
            f"longest {tokens.longest:,}{how})"
        )
        yield f"truncated: {about}{counted(tokens.truncated, 'text')} longer than the model takes"
    if words:
        yield words
    if plan.warning:
        yield plan.warning
    if plan.output_bytes is not None:
        yield f"output:  about {plan.output_bytes / 1e6:,.1f} MB in {plan.output}"
    if plan.seconds is None:
        yield f"time:    unknown{f': {plan.seconds_unknown}' if plan.seconds_unknown else ' until a worker has run'}"
    else:
        whose = "as measured here," if plan.measured else "at the queue's"
        yield f"time:    about {duration(plan.seconds)}, {whose} {plan.tokens_per_second:,.0f} tokens/s"


class Sample:
    """Rows spread evenly over the corpus, whatever its size: the same ones each time."""

    def __init__(self, count: Callable[[list[str]], Counted | None], most: int = SAMPLE_ROWS) -> None:
        """`count`: of a message; None: no more can be counted, and then nothing is known of any row."""
        self._count = count
        self._most = most
        self._bound = _ALL
        self._waiting: list[tuple[int, str]] = []
        self._characters = 0
        self._lengths: list[tuple[int, int, bool]] = []
        self.first: list[str] = []
        """Those of the first message."""

    def add(self, part: int, rows: Sequence[int], texts: Sequence[str]) -> None:
        """Rows that are not in the sample are passed over."""
        for row, text in zip(rows, texts, strict=True):
            place = ((part << 40 | row) + 1) * _SPREAD % _ALL
            if place < self._bound:
                self._waiting.append((place, text))
                self._characters += len(text)
                if len(self._waiting) >= AT_ONCE_ROWS or self._characters >= AT_ONCE_CHARACTERS:
                    self._tokenize()

    def tokens(self, rows: int) -> Tokens | None:
        """What the sample says of so many rows; None if there is none."""
        self._tokenize()
        if not self._lengths:
            return None
        lengths = sorted(length for _, length, _ in self._lengths)
        sampled = len(lengths)
        mean = sum(lengths) / sampled
        return Tokens(
            total=round(mean * rows),
            mean=round(mean, 2),
            p50=lengths[(sampled - 1) // 2],
            p95=lengths[(sampled - 1) * 95 // 100],
            longest=lengths[-1],
            truncated=round(sum(cut for *_, cut in self._lengths) * rows / sampled),
            sampled=sampled,
        )

    def _tokenize(self) -> None:
        if not self._waiting:
            return
        texts = [text for _, text in self._waiting]
        self.first = self.first or texts
        found = self._count(texts)
        if found is None:
            self._waiting, self._lengths, self._bound = [], [], 0
            return
        self._lengths += [
            (place, length, cut)
            for (place, _), length, cut in zip(self._waiting, found.tokens, found.truncated, strict=True)
        ]
        self._waiting, self._characters = [], 0
        while len(self._lengths) > self._most:
            self._bound //= 2
            self._lengths = [each for each in self._lengths if each[0] < self._bound]


class CountingProcess:
    """Counts tokens: a process, as only that of a worker loads model libraries. A context manager."""

    def __init__(self, spec: JobSpec) -> None:
        self._process = subprocess.Popen(
            python_command("embedstream_worker.planning"),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._ask, self._answer = self._process.stdin, self._process.stdout
        self.about = self._about(spec)

    def _about(self, spec: JobSpec) -> TokenCounter:
        with contextlib.suppress(OSError):
            send(self._ask, spec)
            if (about := receive(self._answer, TokenCounter)) is not None:
                return about
        return TokenCounter(trouble=_ENDED)

    def count(self, texts: list[str]) -> Counted | None:
        """Of a model that tells its tokens. None: the process has ended, which `about` then says."""
        with contextlib.suppress(OSError):
            send(self._ask, texts)
            if (found := receive(self._answer, Counted)) is not None:
                return found
        self.about = TokenCounter(trouble=_ENDED)
        return None

    def measure(self, texts: list[str], flags: Mapping[str, str]) -> Measured:
        """How fast they are embedded here."""
        with contextlib.suppress(OSError):
            send(self._ask, Measure(texts=texts, seconds=MEASURED_SECONDS, flags=dict(flags)))
            if (found := receive(self._answer, Measured)) is not None:
                return found
        return Measured(trouble=_ENDED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._ask.close()
        self._process.kill()
        self._process.wait()
        self._answer.close()


def _told(part: int, on_position: Callable[[int, int], None]) -> Callable[[int], None]:
    return lambda read: on_position(part, read)


def _text_bytes(block: Block) -> int:
    return int(block.rows.column("text").nbytes)


def _pace(url: str | None, spec: JobSpec) -> float | None:
    """Tokens a second of the queue's workers that are ready, or of one; None if none was ever measured."""
    if url is None:
        return None
    try:
        look = look_at_queue(Broker(connect(url, retries=0), spec.queue))
    except (redis.RedisError, EmbedstreamError):
        return None
    return look.worker_tokens_per_second * max(1, look.ready_workers) if look.measured else None
