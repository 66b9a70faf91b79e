"""What a job is: its spec, its states and their legal moves, and what can be seen of it."""

from __future__ import annotations

import enum
import hashlib
import math
import re
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from embedstream.errors import EmbedstreamError, UsageError
from embedstream.outputs import NAMES, OutputSpec, Task, check_outputs, column_names

FORMAT_VERSION = 1
"""Version of spec, block and manifest formats."""

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

MOST_KEPT = 1000
"""Kept fields: each costs a block some bytes a row, whatever it holds."""

LONGEST_PROMPT_BYTES = 64 * 1024
"""A prompt enters the model with every text, so its length counts as often as there are rows."""

LONGEST_SETTING_BYTES = 8 * 1024
"""Of every other setting: twice the longest path."""

MOST_TOKENS = 2**20
"""No text within a block's bounds has more."""

KeptType: TypeAlias = Literal["string", "int64", "float64", "bool"]

CorpusFormat: TypeAlias = Literal["jsonl", "json", "csv", "parquet", "arrow", "text"]
"""Of a part: JSON lines, a JSON array, CSV or TSV, Parquet, Arrow IPC, a folder of texts."""

ChunkBy: TypeAlias = Literal["recursive", "sentence", "markdown"]
"""Where texts are cut: at paragraphs, lines, sentences and words, in this order; at sentences; or as the first, with
headings and blocks of Markdown before all."""

RESERVED_COLUMNS = frozenset(
    {"part", "row", "id", "chunk", "start", "end", "text", "text_pair", "n_tokens", "truncated", "input_hash"}
)
"""Columns of the dataset that a kept field may not replace (nor may it take an output's name)."""


QUERY_FIELD = "query"
"""The first of a pair, unless another field is named."""

RUN_FIELDS = (QUERY_FIELD, "query_id", "doc_id")
"""Kept fields of the rows of a run, which come after those of the documents."""


class Retry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What makes a job one over failed rows of a finished dataset: they are added to it when the job ends."""

    manifest: str
    """Digest of the manifest that is to be replaced: a job over the same rows of the same dataset is the same job."""
    space: str
    """The dataset's: no vector of another may be added."""
    ranges: str = ""
    """Of its int8 columns, as `encode_ranges` gives them; empty: it has none, or no rows."""


class Update(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What makes a job one that makes a newer generation of a dataset: texts that are in it already keep their results,
    if the worker's model makes results of the same space."""

    manifest: str
    """Digest of the manifest that the job begins with."""
    corpus: str = ""
    """Digest of the sums of its parts and of its settings: with files that have changed since, or other settings, it is
    another job. With a stream among them, it is another one each time."""
    space: str
    """The dataset's."""
    ranges: str = ""
    """As in `Retry`."""
    source: str = ""
    """The dataset's address; empty: it is the output itself, where the new manifest takes the place of the old one."""


class Chunking(msgspec.Struct, frozen=True, kw_only=True):
    """How texts are cut into chunks, each of which is a row. Nothing of them is left out."""

    tokens: int
    """Most tokens that enter the model for a chunk, prompt, title and special tokens included; 0: what it takes."""
    overlap: int = 0
    """Most tokens that a chunk has in common with the one before."""
    by: ChunkBy = "recursive"
    format: str = ""
    """What enters the model, `{title}` and `{chunk}` replaced; empty: the title, if any, `title_sep` and the chunk."""
    tokenizer: str = ""
    """Sum of the model's tokenizer, by which texts are cut."""

    def check(self) -> None:
        """Raise `UsageError` for what cannot be."""
        if not 0 <= self.tokens <= MOST_TOKENS:
            raise UsageError(f"--chunk-tokens {self.tokens}: must be between 1 and {MOST_TOKENS:,}")
        if self.overlap < 0 or (self.tokens and self.overlap >= self.tokens):
            raise UsageError(f"--chunk-overlap {self.overlap}: must be below the size of a chunk (--chunk-tokens)")
        check_setting("--chunk-format", self.format)
        if self.format and self.format.count("{chunk}") != 1:
            raise UsageError(f"--chunk-format {self.format!r}: must have {{chunk}} once, and may have {{title}}")


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides which rows come out of a job and what their vectors are. It never changes once created."""

    queue: str
    output: str
    """Where results go: an absolute folder path or a `redis:` URL (see `embedstream.dataset.sink`)."""
    model: str
    revision: str | None = None
    parts: tuple[str, ...]
    """One source name per part: the absolute path of a file, or of a folder of texts or a pattern of their names; an
    address; `-` for standard input, `records` for Python records."""
    format: CorpusFormat | None = None
    """Of all parts; None: each is recognized by its content."""
    role: Literal["document", "query"] = "document"
    prompt: str | None = None
    prompt_name: str | None = None
    max_length: int | None = None
    """Tokens, special tokens included; None: the model's own."""
    id_field: str | None = None
    number_rows: bool = False
    """Whether a row's id is the number of its part, a dash and its number there, both from 0."""
    text_field: str | None = None
    title_field: str | None = None
    title_sep: str = " "
    query_field: str | None = None
    """The kept field that is the first of a pair, the text being the second; None: a row is one text."""
    keep: tuple[str, ...] = ()
    keep_types: dict[str, KeptType] = {}
    """Types of their columns, by name; strings, where none is given."""
    text: bool = True
    """Whether the dataset keeps the text column."""
    empty: Literal["error", "skip"] = "error"
    run: bool = False
    """Whether the parts are pairs of ids (a run in TREC's format), then the queries' texts, then those of documents."""
    chunking: Chunking | None = None
    """None: each text is one row."""
    on_long: Literal["cut", "error"] = "cut"
    """What becomes of a text that is longer than the model takes. No chunk is cut."""
    task: Task = "auto"
    outputs: tuple[OutputSpec, ...] = ()
    """Empty: all that the model gives for the task, one output of each kind."""
    retry: Retry | None = None
    """None: the job is over all rows."""
    update: Update | None = None
    """None: every text is embedded."""
    v: int = FORMAT_VERSION

    @property
    def job(self) -> str:
        """The job's id: a hash of queue and output, so the same command finds the same job."""
        if self.retry is not None:
            return job_id(self.queue, self.output, self.retry.manifest)
        return job_id(
            self.queue, self.output, f"update {self.update.manifest} {self.update.corpus}" if self.update else ""
        )

    @property
    def whole_job(self) -> str:
        """The id of the job over all rows of this output: another one's, if this one runs failed rows again."""
        return job_id(self.queue, self.output)

    @property
    def updates(self) -> bool:
        """Whether its manifest takes the place of the one that it began with."""
        return self.update is not None and not self.update.source

    @property
    def columns(self) -> frozenset[str]:
        """Names of the dataset's columns that are no output's."""
        return RESERVED_COLUMNS.union(self.keep)

    @property
    def kept(self) -> tuple[str, ...]:
        """The kept fields with their types, as `--keep` takes them."""
        return tuple(f"{name}:{self.keep_types[name]}" if name in self.keep_types else name for name in self.keep)

    def encode(self) -> bytes:
        """Canonical JSON: equal specs give equal bytes."""
        return msgspec.json.encode(self, order="deterministic")

    def check(self) -> None:
        """Raise `UsageError` for a combination that cannot run."""
        if not self.queue or any(c in self.queue for c in "{}\0\n"):
            raise UsageError(f"queue name {self.queue!r}: use letters, digits, dots, slashes and dashes (--queue)")
        named = ("queue", "output", "model", "revision", "id_field", "text_field", "title_field", "title_sep")
        if self.run and (self.number_rows or self.query_field != QUERY_FIELD):
            raise UsageError("--run: pairs are named by the ids of a run: leave out --number-rows and --query-field")
        if self.run and (len(self.parts) < 3 or self.keep[-3:] != RUN_FIELDS):
            raise UsageError("--run: name the run, its queries (--queries), and its corpus")
        if self.query_field is not None and self.query_field not in self.keep:
            raise UsageError(f"--query-field {self.query_field}: keep it, too (--keep)")
        if self.query_field is not None and self.keep_types.get(self.query_field, "string") != "string":
            raise UsageError(f"--query-field {self.query_field}: is a text: leave the type out of --keep")
        if self.query_field is not None and (self.prompt is not None or self.prompt_name is not None):
            raise UsageError("--query-field: no prompt goes in front of a pair: leave --prompt out")
        for name in named:
            check_setting(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.chunking is not None:
            self.chunking.check()
            if self.query_field is not None:
                raise UsageError("--chunk-tokens: texts of pairs are not cut: leave it out")
        if self.number_rows and self.id_field is not None:
            raise UsageError("--number-rows and --id-field exclude each other")
        check_prompting(self.prompt, self.prompt_name, self.max_length)
        check_outputs(self.outputs, RESERVED_COLUMNS)
        for output in self.outputs:
            check_setting("--emit", output.name)
        names = [column_names(output.kind, output.name) for output in self.outputs] or [(NAMES["dense"],)]
        taken = RESERVED_COLUMNS.union(*names)
        for name in self.keep:
            check_setting("--keep", name)
            if name in taken:
                raise UsageError(f"--keep {name}: the dataset has a column of that name already")
        if len(self.keep) > MOST_KEPT:
            raise UsageError(f"--keep names {len(self.keep):,} fields: at most {MOST_KEPT:,} are carried")
        if len(set(self.keep)) != len(self.keep):
            raise UsageError("--keep names a field twice")
        if unknown := self.keep_types.keys() - set(self.keep):
            raise UsageError(f"a type is given for {min(unknown)}, which is not kept (--keep)")


def check_prompting(prompt: str | None, prompt_name: str | None, max_length: int | None) -> None:
    """Raise `UsageError` for what neither a job nor a request may put in front of its texts, or cut them to."""
    if prompt is not None and prompt_name is not None:
        raise UsageError("--prompt and --prompt-name exclude each other")
    check_setting("--prompt", prompt, LONGEST_PROMPT_BYTES)
    check_setting("--prompt-name", prompt_name)
    if max_length is not None and not 1 <= max_length <= MOST_TOKENS:
        bound = "at least 1 token" if max_length < 1 else f"at most {MOST_TOKENS:,} tokens"
        raise UsageError(f"--max-length {max_length}: must be {bound}")


def check_setting(flag: str, text: str | None, most: int = LONGEST_SETTING_BYTES) -> None:
    """Raise `UsageError` for a setting of more than `most` bytes of UTF-8, or that has no UTF-8."""
    try:
        size = 0 if text is None else len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag}: character {error.start + 1} has no UTF-8: repair it") from error
    if size > most:
        raise UsageError(f"{flag}: has {size:,} bytes, at most {most:,} are allowed: shorten it")


def decode_spec(data: bytes | str) -> JobSpec:
    """Decode and check a spec that came from Redis or a manifest.

    Raises:
        UsageError: it is not a spec of this version.
    """
    refuse_other_version(data, "job spec", UsageError)
    try:
        spec = msgspec.json.decode(data, type=JobSpec)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"job spec cannot be read: {error}") from error
    spec.check()
    return spec


class _Versioned(msgspec.Struct):
    v: int = FORMAT_VERSION


def refuse_other_version(data: bytes | str, what: str, error: type[EmbedstreamError]) -> None:
    """Raise `error` if JSON says that it is of another format version, whatever else it holds.

    What is no such JSON passes: its own decoder says what is wrong with it.
    """
    try:
        version = msgspec.json.decode(data, type=_Versioned).v
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if version != FORMAT_VERSION:
        raise error(other_version(what, version, "this embedstream"))


def other_version(what: str, version: int, reader: str) -> str:
    """The one sentence about data of another format version: which side is the older one."""
    older = "it" if version > FORMAT_VERSION else "the side that wrote that"
    return f"{what} has format version {str(version)[:20]}, {reader} reads {FORMAT_VERSION}: upgrade {older}"


def public_spec(spec: JobSpec) -> JobSpec:
    """The spec as readers may see it: no credentials in the output's URL."""
    return msgspec.structs.replace(spec, output=without_credentials(spec.output))


def job_id(queue: str, output: str, began_with: str = "") -> str:
    """16 hex digits from queue and output; who may log in there does not matter. `began_with`: the manifest that a
    retry or an update is of."""
    named = [queue, without_credentials(output), *([began_with] if began_with else [])]
    return hashlib.blake2b("\0".join(named).encode(), digest_size=8).hexdigest()


def without_credentials(output: str) -> str:
    """An output without who logs in there: the place itself."""
    return re.sub(r"^(rediss?|unix)://[^/?#]*@", r"\1://", output)


def model_folder(model: str) -> Path | None:
    """The folder that a model's name means, if it means one: an existing folder, or what is written as a path.

    Raises:
        UsageError: the name is empty, or none that a folder can have.
    """
    if not model.strip():
        raise UsageError("the model's name is empty: give a folder or a Hugging Face id (--model)")
    try:
        path = Path(model).expanduser()
        named = path.is_dir() or model.startswith(("/", "./", "../", "~")) or model in (".", "..")
        return path.absolute() if named else None
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_name(model, error) from error


def _no_name(model: str, error: Exception) -> UsageError:
    return UsageError(f"model {model[:100]!r}: no name of a folder or a model ({str(error)[:100]})")


def model_address(model: str) -> str:
    """A model as a spec names it: a folder by its absolute path, anything else as it is."""
    folder = model_folder(model)
    return model if folder is None else str(folder)


def queue_name(model: str) -> str:
    """The queue that serves a model unless another is named: a folder's name, or the id itself.

    Raises:
        UsageError: as `model_folder`.
    """
    folder = model_folder(model)
    try:
        name = model if folder is None else folder.resolve().name
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_name(model, error) from error
    return re.sub(r"[^A-Za-z0-9._/-]", "-", name)


def differing_field(existing: JobSpec, wanted: JobSpec) -> str | None:
    """The first setting in which two specs differ, as the user spells it; None if there is none.

    Credentials are no setting, nor is whether a job runs failed rows again, or updates.
    """
    existing, wanted = (
        msgspec.structs.replace(public_spec(spec), retry=None, update=None) for spec in (existing, wanted)
    )
    # The model first: the queue is named after it, and whoever changes the one thinks of it, not of the other.
    for name in ("model", *JobSpec.__struct_fields__):
        if getattr(existing, name) != getattr(wanted, name):
            spelled = {"parts": "corpus", "text": "no_text", "outputs": "emit", "chunking": "chunk_tokens"}
            return spelled.get(name, name).replace("_", "-")
    return None


class JobState(enum.StrEnum):
    SUBMITTING = "submitting"  # the producer is still adding blocks
    RUNNING = "running"  # all rows are submitted, and not all are committed
    FINALIZING = "finalizing"  # all blocks are done, or the job was ended early; the manifest is not written yet
    COMPLETED = "completed"  # the manifest is written; some rows may have failed
    FAILED = "failed"  # every row failed, or more than `max_errors`; the manifest is partial or full of errors
    CANCELLED = "cancelled"  # ended by the user; the manifest is partial

    @property
    def open(self) -> bool:
        """Whether it has blocks to come or to do."""
        return self in (JobState.SUBMITTING, JobState.RUNNING)

    @property
    def ended(self) -> bool:
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.SUBMITTING: frozenset({JobState.RUNNING, JobState.FINALIZING}),
    JobState.RUNNING: frozenset({JobState.FINALIZING}),
    JobState.FINALIZING: frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset({JobState.SUBMITTING}),
    JobState.CANCELLED: frozenset({JobState.SUBMITTING}),
}
"""Legal moves; the scripts make them compare-and-set."""


class MaxErrors(msgspec.Struct, frozen=True):
    """A bound on failed rows: a count, or a share of all rows."""

    count: int | None = None
    percent: float | None = None

    def exceeded(self, failed: int, total: int) -> bool:
        """Whether `failed` rows of `total` are more than allowed."""
        if self.count is not None:
            return failed > self.count
        if self.percent is not None:
            return total > 0 and failed * 100 > self.percent * total
        return False

    def __str__(self) -> str:
        if self.count is not None:
            return str(self.count)
        return "" if self.percent is None else f"{self.percent:g}%"


def parse_max_errors(text: str | None) -> MaxErrors:
    """Read `N` or `P%`; an empty string or None is no bound."""
    if not text:
        return MaxErrors()
    try:
        if text.endswith("%"):
            percent = float(text[:-1])
            if math.isfinite(percent) and 0 <= percent <= 100:
                return MaxErrors(percent=percent)
        elif int(text) >= 0:
            return MaxErrors(count=int(text))
    except ValueError:
        pass
    raise UsageError(f"--max-errors {text}: give a number of rows (100) or a share (0.5%)")


def verdict(rows: int, failed: int, max_errors: MaxErrors) -> JobState:
    """How a job whose blocks are all done ends: `failed` counts error rows, `rows` the written ones."""
    if failed and (rows == 0 or max_errors.exceeded(failed, rows + failed)):
        return JobState.FAILED
    return JobState.COMPLETED


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A job at one moment. Times are Unix seconds of the Redis server's clock."""

    job: str
    """Its id."""
    state: JobState
    spec: JobSpec
    created: float
    ended: float | None
    """None until it has ended."""
    now: float
    """When this status was read."""
    pushed: float
    """When the producer last added a block."""
    committed: float
    """When a shard was last committed (creation time before the first)."""
    submitted: int
    """Rows handed to the workers so far, refused ones included."""
    rows: int
    """Rows written."""
    failed: int
    """Error rows: refused by the producer or failed in the worker."""
    skipped: int
    """Rows left out on purpose (`empty="skip"`)."""
    truncated: int
    """Rows whose text was longer than the model takes."""
    duplicates: int = 0
    """Rows that took the results of an equal text, so that the model did not run for them."""
    reused: int = 0
    """Rows that took the results of an equal text in the dataset that is updated."""
    tokens: int
    """Tokens of the written rows."""
    padded: int
    """Tokens with the padding that the model computed beside them."""
    blocks: int
    """Blocks submitted."""
    done: int
    """Blocks committed."""
    queued_bytes: int
    """Bytes of its blocks in Redis."""
    sealed: bool
    """Whether all parts are sealed, so `submitted` is final."""
    space: str
    """What makes its vectors comparable with others'; empty before the first shard."""
    max_errors: str
    """The bound on failed rows as it was given."""
    workers: dict[str, int] = {}
    """Rows written, by the worker that wrote them."""
    verdict: str = ""
    """`cancelled` or `failed` if the job was ended early; else empty."""
    reason: str = ""
    """Why a job was ended early."""
    manifest: str = ""
    """The manifest as JSON, for outputs in Redis."""

    @property
    def seconds(self) -> float:
        """From creation to the manifest, or until now."""
        return max(0.0, (self.ended if self.ended is not None else self.now) - self.created)

    @property
    def padding(self) -> float:
        """Share of computed tokens that were padding, 0..1."""
        return 1.0 - self.tokens / self.padded if self.padded else 0.0

    @property
    def stalled(self) -> bool:
        """Unfinished, and neither producer nor worker has moved it for a minute."""
        return not self.state.ended and self.now - max(self.pushed, self.committed) > STALLED_SECONDS


STALLED_SECONDS = 60.0
