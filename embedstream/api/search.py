"""Brute-force search by similarity over a dataset. Needs numpy, which comes with every model library."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from embedstream.dataset.checked import checked
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.redis_hashes import read_schema
from embedstream.dataset.roots import is_redis
from embedstream.dataset.schema import dataset_schema
from embedstream.dataset.similarity import similarity
from embedstream.dataset.sinks import open_sink
from embedstream.dataset.values import Ragged, Results, Values, from_columns
from embedstream.errors import UsageError
from embedstream.lifecycle.opening import no_dataset
from embedstream.outputs import DTYPES, Kind, Output, describe
from embedstream.records import Manifest
from embedstream.server.connection import mask
from embedstream.settings import MIB

PLACE: tuple[str, ...] = ("part", "row", "chunk")
"""What tells the rows of a dataset in files apart, in the order of the corpus."""

REDIS_PLACE: tuple[str, ...] = ("id",)
"""The same of hashes, which do not say where in the corpus they were."""

SEARCHED: tuple[Kind, ...] = ("dense", "sparse", "multivector")
"""Kinds of outputs that can be searched."""

RANKED = 100
"""Rows of each kind that are fused, or as many as are asked for if these are more."""

FUSION = 60
"""The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher, 2009)."""


KEPT_BYTES = 2 * 1024 * MIB
"""Of rows that stay in memory between queries: a million of 384 dimensions in float32 take 1.7 GB with their texts."""


@dataclass(frozen=True)
class Hit:
    """A chunk that was found."""

    score: float
    """See `similarity`. Of several kinds of outputs: the sum of 1 / (60 + rank) over the kinds."""
    id: str
    text: str | None = None
    """None if the dataset keeps no text."""
    part: int | None = None
    """None, as are row and, unless texts were cut, chunk, in Redis: a hash does not tell its place in the corpus."""
    row: int | None = None
    chunk: int | None = None


class Searchable:
    """A finished dataset, for one query or for many."""

    def __init__(
        self,
        address: str,
        redis_url: str | None = None,
        by: Kind | None = None,
        keep_bytes: int = 0,
        kinds: Container[str] = SEARCHED,
        roots: Sequence[str] = (),
    ) -> None:
        """`redis_url`: the server that `redis:?prefix=docs:` means. `by`: compare by this kind alone; None: fuse the
        ranks of all. `keep_bytes`: rows stay in memory for the next query if all of them have no more; else each query
        reads the dataset once, and holds a few thousand rows of it at a time. `kinds`: those that queries have.
        `roots`: as `open_sink` takes them.

        Raises:
            UsageError: nothing in it can be searched, or the output needs `redis_url`.
            OutputError: no finished dataset lies there.
        """
        self._sink = open_sink(address, queue_url=redis_url, roots=roots)
        manifest = self._sink.read_manifest()
        if manifest is None:
            raise no_dataset(address)
        self.manifest = manifest
        self.spec = manifest_spec(manifest)
        self.outputs = [output for output in searched(manifest, by) if output.kind in kinds]
        """Those that are compared."""
        self._keep_bytes = keep_bytes
        self._kept: list[pa.RecordBatch] | None = None
        self._place: Sequence[str] = PLACE
        if is_redis(self._sink.output):
            self._place = REDIS_PLACE if self.spec.chunking is None else (*REDIS_PLACE, "chunk")

    def search(self, query: Results, k: int = 10) -> list[Hit]:
        """The `k` chunks nearest to `query`, best first; equally near ones by their place in the corpus, or in Redis by
        their ids. Chunks that share no token with a sparse query are not found.

        `query`: of one text, by kind; kinds that are not compared, or that it does not have, are left out.

        Raises:
            UsageError: `k` is below 1, or the query is not as the dataset's outputs are.
            OutputError: the dataset has other columns than its manifest says, or cannot be read.
        """
        if k < 1:
            raise UsageError(f"-k {k}: must be at least 1")
        if not self.manifest.rows:
            return []
        outputs, where = [output for output in self.outputs if output.kind in query], mask(self._sink.output)
        if not outputs:
            raise UsageError(f"the query has {', '.join(query)}, and {where} has {describe(self.manifest.outputs)}")
        for output in outputs:
            _refuse_other(output, query[output.kind], where)
        return top_k(self._batches(), query, k, outputs, self._place)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, found to be what the manifest says."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, held = list[pa.RecordBatch](), 0
        for batch in self._read():
            held += batch.nbytes
            if held <= self._keep_bytes:
                kept.append(batch)
            else:
                self._keep_bytes = 0
                kept.clear()
            yield batch
        if self._keep_bytes:
            self._kept = kept

    def _read(self) -> Iterator[pa.RecordBatch]:
        manifest, spec, in_redis = self.manifest, self.spec, is_redis(self._sink.output)
        schema = read_schema(manifest) if in_redis else dataset_schema(spec, manifest.outputs)
        names = [*self._place, *(["id"] if "id" not in self._place else []), *(["text"] if spec.text else [])]
        names += [output.name for output in self.outputs]
        fields = [schema.field(name) for name in names]
        yield from checked(self._sink.read(names), fields, self.outputs, mask(self._sink.output))


def search(
    address: str, query: Results, k: int = 10, redis_url: str | None = None, by: Kind | None = None
) -> list[Hit]:
    """The `k` chunks nearest to one query. As `Searchable` has it."""
    return Searchable(address, redis_url, by, kinds=query).search(query, k)


def searched(manifest: Manifest, by: Kind | None = None) -> list[Output]:
    """The outputs that are searched: of each kind that can be, the most exact one. `by`: of this kind alone.

    Raises `UsageError` if there is none.
    """
    found = [
        min(same, key=lambda output: (DTYPES[output.kind].index(output.dtype), -output.dim))
        for kind in SEARCHED
        if by in (None, kind) and (same := [output for output in manifest.outputs if output.kind == kind])
    ]
    if not found:
        what = f"only {', '.join(SEARCHED)} can be searched" if by is None else f"--by {by}: there is none"
        raise UsageError(f"{what}, this dataset has {describe(manifest.outputs)}")
    return found


def _refuse_other(output: Output, query: Values, where: str) -> None:
    """Raise `UsageError` for a query that cannot be compared with the output's vectors."""
    numbers = query.values if isinstance(query, Ragged) else query
    if len(query) != 1 or isinstance(query, Ragged) != (output.kind != "dense"):
        raise UsageError(f"the query has no {output.kind} results of one text")
    if output.kind == "sparse":
        return
    dim = numbers.shape[1] if numbers.ndim == 2 else 0
    if dim < output.dim or (dim > output.dim and output.kind == "multivector"):
        raise UsageError(f"the query has shape {numbers.shape}, vectors of {where} have {output.dim} dimensions")


def top_k(
    batches: Iterable[pa.RecordBatch],
    query: Results,
    k: int,
    outputs: Sequence[Output],
    place: Sequence[str] = PLACE,
) -> list[Hit]:
    """The `k` best rows of all batches by one output, or by the fused ranks of several.

    `place`: the columns that tell rows apart; equally good rows come in their order, and a row that comes twice counts
    once.
    """
    depth = k if len(outputs) == 1 else max(k, RANKED)
    rankings = [_Ranking(output, query[output.kind], depth, place) for output in outputs]
    for batch in batches:
        for ranking in rankings:
            ranking.add(batch)
    found = [ranking.hits() for ranking in rankings]
    return found[0] if len(found) == 1 else _fused(found, k)


class _Ranking:
    """The best rows of all batches by one output."""

    def __init__(self, output: Output, query: Values, depth: int, place: Sequence[str]) -> None:
        self._output = output
        self._query = query
        self._depth = depth
        self._place = place
        self._least = 0.0 if output.kind == "sparse" else -np.inf
        self._best: pa.Table | None = None
        self._last: float | None = None  # the score of the last row found, once there are as many as wanted

    def add(self, batch: pa.RecordBatch) -> None:
        scores = similarity(self._output, self._query, from_columns(self._output, batch))
        # Of rows that tie with the last one found so far, places decide.
        chosen = np.flatnonzero(scores >= self._last if self._last is not None else scores > self._least)
        if not len(chosen):
            return
        if len(chosen) > self._depth:
            # Every row that ties with the last one stays until places decide.
            last = np.partition(scores[chosen], -self._depth)[-self._depth]
            chosen = chosen[scores[chosen] >= last]
        shown = [name for name in ("id", "text", *PLACE) if name in batch.schema.names]
        found = pa.table(batch.select(shown).take(chosen))
        found = found.append_column("score", pa.array(scores[chosen], pa.float32()))
        best = found if self._best is None else pa.concat_tables([self._best, found])
        best = best.sort_by([("score", "descending"), *((name, "ascending") for name in self._place)])
        self._best = _each_once(best, self._place).slice(0, self._depth)
        if len(self._best) == self._depth:
            self._last = self._best.column("score")[-1].as_py()

    def hits(self) -> list[Hit]:
        """Best first."""
        return [] if self._best is None else [Hit(**row) for row in self._best.to_pylist()]


def _fused(rankings: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    """The `k` best by reciprocal rank fusion."""
    scores: dict[Hit, float] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            row = replace(hit, score=0)
            scores[row] = scores.get(row, 0) + 1 / (FUSION + rank)
    best = sorted(scores, key=lambda row: (-scores[row], row.part or 0, row.row or 0, row.chunk or 0, row.id))
    return [replace(row, score=scores[row]) for row in best[:k]]


def _each_once(rows: pa.Table, place: Sequence[str]) -> pa.Table:
    """The rows without those whose place an earlier one has: a server that resizes its table may show a key twice."""
    places = list(zip(*(rows.column(name).to_pylist() for name in place), strict=True))
    firsts = {place: at for at, place in reversed(list(enumerate(places)))}
    return rows if len(firsts) == len(places) else rows.take(sorted(firsts.values()))
