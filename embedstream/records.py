"""What is recorded of shards and datasets: in footers, in Redis, in manifests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import pyarrow as pa

from embedstream.outputs import Output, has_ranges, without_ranges

ShardName = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Za-z_-]{1,64}\Z")]
"""Names become file names, wherever records and manifests come from."""


def part_file(shard: str) -> str:
    """The name of a shard's file of rows."""
    return f"part-{shard}.parquet"


def errors_file(shard: str) -> str:
    """The name of a shard's file of error rows."""
    return f"_errors-{shard}.arrow"


class PartContent(msgspec.Struct, frozen=True):
    """What a producer read of a part: the bytes as they lie, compressed or not."""

    bytes: Annotated[int, msgspec.Meta(ge=0, le=2**53)] | None
    """None for a stream, which has no size that could be looked at."""
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class BlockRecord(msgspec.Struct, frozen=True):
    """One block as a shard holds it."""

    part: int
    block: int
    rows: int
    """Rows written."""
    failed: int
    """Error rows: refused by the producer, or failed in the worker."""
    skipped: int
    sum: str
    """`Block.sum()` in hex."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that decides the results of a text, as the worker used it. `…_from` says where a value was found: in the
    model's `folder`, in a `flag` of the job, `none in the folder`, or nowhere, so that it was `assumed`."""

    model: str
    """As the job names it."""
    source: str = ""
    """Where the worker found it."""
    revision: str | None = None
    """The commit of a model of the hub."""
    fingerprint: str
    """Of the files that decide."""
    engine: str
    dtype: str
    """Precision of the computation."""
    pooling: str = ""
    """In sentence-transformers' words; empty for a model with a way of its own."""
    pooling_from: str = ""
    normalized: bool
    max_length: int
    """Tokens of the longest text, special tokens included; longer ones are cut."""
    max_length_from: str = ""
    prompt: str = ""
    prompt_from: str = ""


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard holds: written into its footer, committed to Redis, listed by the manifest."""

    name: ShardName
    """Of `part_file` and `errors_file`; unique forever."""
    job: str
    space: str
    blocks: tuple[BlockRecord, ...]
    rows: int
    failed: int
    skipped: int
    truncated: int
    duplicates: int = 0
    """Rows that took the results of an equal text, so that the model did not run for them."""
    reused: int = 0
    """Rows that took the results of an equal text in the dataset that is updated."""
    tokens: int
    padded: int
    """Tokens with the padding that the model computed beside them."""
    outputs: tuple[Output, ...]
    dtype: str
    """Precision of the computation: float32, bfloat16."""
    engine: str
    worker: str
    prompt: str = ""
    """What entered the model in front of every text; `input_hash` is over both."""
    recipe: Recipe | None = None
    """None: its worker did not say."""
    bytes: int = 0
    """Size of the data file; 0 until it is written."""
    sha256: str = ""
    """Of the data file, in hex; empty until it is written, and for sinks without files."""
    errors_sha256: str = ""
    """The same of the file of error rows; empty if no row failed."""

    def __post_init__(self) -> None:
        if not has_ranges(self.rows, self.outputs):
            raise ValueError(f"shard {self.name} does not say what its int8 numbers stand for")

    def has(self, rows: int, outputs: tuple[Output, ...]) -> bool:
        """Whether its columns may lie beside so many rows of these outputs: where there are none, or here, the ranges
        of int8 may be missing."""
        if rows and self.rows:
            return self.outputs == outputs
        return without_ranges(self.outputs) == without_ranges(outputs)


@dataclass(frozen=True)
class ShardContent:
    """What a worker hands to a sink: rows in dataset schema, error rows in errors schema (see `schema`), any order."""

    record: ShardRecord
    data: pa.Table
    errors: pa.Table


class BlockRun(msgspec.Struct, frozen=True, order=True):
    """Consecutive blocks of a part, `first` to `last`."""

    part: int
    first: int
    last: int


BlockRuns = tuple[BlockRun, ...]

NO_BLOCKS = msgspec.Raw(b"[]")


class ManifestErrors(msgspec.Struct, frozen=True, omit_defaults=True):
    """A shard's error rows, and the file that they lie in, if the output has files."""

    rows: int
    file: str = ""
    sha256: str = ""


class ManifestShard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A shard as the manifest lists it. Its blocks stay JSON in memory: as objects they take ten times as much, and a
    billion chunks have millions of them."""

    name: ShardName
    file: str = ""
    """The file of its rows, in the manifest's folder; empty if the output has no files. So are its size and sum."""
    rows: int
    bytes: int = 0
    sha256: str = ""
    dtype: str
    runs: msgspec.Raw = msgspec.field(name="blocks")
    """`BlockRuns` as compact JSON."""
    errors: ManifestErrors | None = None
    """None if no row failed."""

    @property
    def blocks(self) -> BlockRuns:
        """Decoded at each look."""
        return msgspec.json.decode(self.runs, type=BlockRuns)

    @property
    def failed(self) -> int:
        """Error rows."""
        return self.errors.rows if self.errors else 0

    @property
    def errors_sha256(self) -> str:
        """Of the file of error rows."""
        return self.errors.sha256 if self.errors else ""


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What an update changed."""

    generation: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    """The one that it made."""
    file: Annotated[str, msgspec.Meta(pattern=r"\A_changes-[0-9a-f]{16}\.arrow\Z")]
    """Arrow IPC: `id`, `chunk` and `change` (added, changed or removed) of each row that is not as it was."""
    sha256: str
    added: int
    changed: int
    """Rows of the same id and chunk with another text or other kept fields."""
    removed: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What readers trust. A file that it does not list does not exist for them."""

    v: int
    job: str
    state: str
    """completed, failed or cancelled; the last two may be partial."""
    partial: bool
    """Whether blocks are missing."""
    spec: msgspec.Raw
    """The `JobSpec`, without credentials in its output."""
    space: str
    prompt: str = ""
    """What entered the model in front of every text; part of the space."""
    recipes: tuple[Recipe, ...] = ()
    """How the results were made: several recipes if workers differed, in their engine, say."""
    outputs: tuple[Output, ...]
    """Empty if no row was written, and none was asked for by name."""
    parts: tuple[ManifestPart, ...]
    rows: int
    failed: int
    skipped: int
    truncated: int
    duplicates: int = 0
    reused: int = 0
    tokens: int
    padded: int
    created: float
    ended: float
    """Unix seconds, by the Redis server's clock."""
    engines: tuple[str, ...]
    shards: tuple[ManifestShard, ...]
    retries: tuple[str, ...] = ()
    """Jobs over failed rows whose shards, listed without blocks, were added; the times are of the job over all rows."""
    generation: int = 0
    """How often the dataset was updated."""
    changes: tuple[Changes, ...] = ()
    """What each update changed, the newest last."""
    before: tuple[str, ...] = ()
    """Jobs of older generations, whose files count no more."""

    @property
    def embedded(self) -> int:
        """Rows that the model ran for."""
        return self.rows - self.reused - self.duplicates


class ManifestPart(msgspec.Struct, frozen=True):
    """One input."""

    name: str
    """As in `JobSpec.parts`."""
    blocks: int
    """Blocks in the part; -1 if the job ended before that was known."""
    rows: int
    failed: int
    bytes: int | None = None
    sha256: str | None = None
    """As in `PartContent`; null if the producer did not say."""
