"""Prompts of jobs: each is run by itself before any text with it, and noted in Redis before it is touched."""

from __future__ import annotations

from embedstream.errors import JobUnknown, ModelError, RecordDamaged
from embedstream.jobs import JobSpec
from embedstream.queue.steps import PROVEN, Code
from embedstream.server.foreign import reading
from embedstream_worker.engines.base import HARMLESS, TextTokenizer
from embedstream_worker.held import TokenizedGroup
from embedstream_worker.infer import Urgent
from embedstream_worker.jobs import PromptBeingTried
from embedstream_worker.pipeline import Channel, Closed
from embedstream_worker.shared import RETRIES, Shared

MOST_DEATHS = 3
"""So many workers a prompt may cost, as a text does."""


class Prompts:
    """Tries prompts for a worker, in the thread that opens jobs.

    All texts of a job have its prompt, so one that kills would cost a worker for every one of them. One worker at a
    time tries it; when that dies, its note stays, and the next one finds it.
    """

    def __init__(
        self,
        shared: Shared,
        tokenizer: TextTokenizer,
        infer: Channel[list[TokenizedGroup] | Urgent],
        alone: bool = False,
    ) -> None:
        """`alone`: no other worker can be on the queue, so that a worker that is noted is dead."""
        self._broker = shared.broker(RETRIES)
        self._consumer, self._activity = shared.consumer, shared.activity
        self._tokenizer = tokenizer
        self._infer = infer
        self._alone = alone

    def length(self, job: str, spec: JobSpec, prompt: str, max_length: int) -> int:
        """How many leading tokens of a text belong to the prompt, which some worker has survived by then.

        Raises:
            ModelError: it fails, or has killed too many: the job cannot be served.
            PromptBeingTried: by another worker, which lives or died a moment ago.
            JobUnknown: the job has ended.
            Closed: the model's stage has ended.
            redis.RedisError: as redis-py does.
        """
        if not prompt:
            return 0
        noted = self._broker.prompt_tries(job)
        if noted == (PROVEN,):
            return self._tokenizer.prompt_length(prompt, max_length)
        died = [name for name in noted if name != self._consumer]
        if died and not self._alone and self._broker.is_alive(died[-1]):
            raise PromptBeingTried
        if len(died) >= MOST_DEATHS:
            raise ModelError(
                f"{len(died)} workers died while they ran its prompt with nothing but a digit behind it: use another "
                f"prompt, or run this one by itself to see why"
            )
        self._note(job, *died, self._consumer)
        length = self._run(job, spec, prompt, max_length)
        self._note(job, PROVEN)
        return length

    def _run(self, job: str, spec: JobSpec, prompt: str, max_length: int) -> int:
        try:
            with reading(f"the prompt of job {job}"), self._activity.computing():
                # A prompt alone may have no token, where a text has some.
                tokens = self._tokenizer.encode([prompt + HARMLESS], max_length)
                length = self._tokenizer.prompt_length(prompt, max_length)
        except RecordDamaged as error:
            raise ModelError(str(error)) from error
        urgent = Urgent(tokens, length, spec.role)
        self._infer.put_first(urgent)
        urgent.done.wait()
        if urgent.results is None:
            raise Closed
        for code, message in urgent.errors.values():
            if code not in ("not_finite", "zero_vector"):  # that may be the fault of the digit
                raise ModelError(f"its prompt fails with nothing but a digit behind it: {code}: {message}")
        return length

    def _note(self, job: str, *names: str) -> None:
        answer = self._broker.run(self._broker.suspect_prompt(job, names))
        if answer.code is not Code.OK:
            raise JobUnknown(f"job {job} ended before its prompt was tried")
