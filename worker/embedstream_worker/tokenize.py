"""Stage 2: texts to token ids, a window at a time."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from embedstream.broker import Broker
from embedstream_worker.engines.base import TextTokenizer
from embedstream_worker.held import Held, HeldBlock, TokenizedGroup, Window
from embedstream_worker.infer import Urgent
from embedstream_worker.inputs import input_hashes
from embedstream_worker.intake import release
from embedstream_worker.jobs import OpenJob
from embedstream_worker.pipeline import Channel, Life


class Tokenize:
    """Owns its tokenizer: one is not safe to share."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        broker: Broker,
        consumer: str,
        held: Held,
        life: Life,
        source: Channel[Window],
        out: Channel[list[TokenizedGroup] | Urgent],
    ) -> None:
        self._tokenizer = tokenizer
        self._broker = broker
        self._consumer = consumer
        self._held = held
        self._life = life
        self._source = source
        self._out = out

    def run(self) -> None:
        """Until the source closes. A worker that stops hands untouched windows back."""
        while True:
            window = self._source.get()
            assert window is not None
            if self._life.stopping.is_set():
                release(self._broker, self._consumer, self._held, window.blocks)
                self._life.window_done()
                continue
            self._out.put([self._group(job, blocks) for job, blocks in by_job(window.blocks)])
            self._life.progress()

    def _group(self, job: OpenJob, blocks: list[HeldBlock]) -> TokenizedGroup:
        column: Any = pa.chunked_array([held.block.rows.column("text") for held in blocks])
        texts: list[str] = column.to_pylist()
        inputs = [job.prompt + text for text in texts] if job.prompt else texts
        return TokenizedGroup(
            job=job,
            blocks=blocks,
            tokens=self._tokenizer.encode(inputs, job.max_length),
            prompt_length=self._tokenizer.prompt_length(job.prompt, job.max_length) if job.prompt else 0,
            input_hashes=input_hashes(inputs),
        )


def by_job(blocks: list[HeldBlock]) -> list[tuple[OpenJob, list[HeldBlock]]]:
    """A window's blocks by job, jobs in order of first appearance."""
    groups: dict[str, tuple[OpenJob, list[HeldBlock]]] = {}
    for held in blocks:
        groups.setdefault(held.job.id, (held.job, []))[1].append(held)
    return list(groups.values())
