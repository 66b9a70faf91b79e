"""Running failed rows again while somebody else finishes doing so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from lab.verify import Made, make_dataset, run_again

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.schema import ErrorRow
from embedstream.errors import OutputError
from embedstream.lifecycle.retry_completing import finalize_retry
from embedstream.records import Manifest, ManifestShard, ShardRecord
from embedstream_producer.retry_failed import FailedRows
from embedstream_producer.verify import verify


class Overtaken(FolderSink):
    """Somebody else is faster, once, just when error rows are read."""

    meanwhile: Callable[[], object] | None = None

    def _overtake(self) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def read_errors(self) -> Iterator[ErrorRow]:
        found = super().read_errors()
        self._overtake()
        return found

    def keep_errors(self, manifest: Manifest, retried: Sequence[ShardRecord]) -> list[ManifestShard]:
        self._overtake()
        return super().keep_errors(manifest, retried)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_dataset(tmp_path, rows=300)


def test_failed_rows_are_those_of_the_manifest_that_came_while_they_were_read(made: Made) -> None:
    status, shards = run_again(made)
    sink = Overtaken(made.spec.output, made.spec)
    sink.meanwhile = lambda: finalize_retry(FolderSink(made.spec.output, status.spec), status, shards)
    with FailedRows(sink, made.spec) as failed:
        assert len(failed) == 0
        assert failed.manifest.retries == (status.job,)


def test_a_finalizer_that_was_overtaken_takes_what_stands(made: Made) -> None:
    status, shards = run_again(made)
    sink = Overtaken(made.spec.output, status.spec)
    sink.meanwhile = lambda: finalize_retry(FolderSink(made.spec.output, status.spec), status, shards)
    manifest = finalize_retry(sink, status, shards)
    assert manifest is not None
    assert manifest.retries == (status.job,)
    assert manifest == sink.read_manifest()
    assert verify(made.spec.output, list(map(str, made.corpus)), None).findings == {}


def test_error_rows_that_are_gone_while_the_manifest_stands_are_an_error(made: Made) -> None:
    status, shards = run_again(made)
    for path in made.folder.glob("_errors-*.arrow"):
        path.unlink()
    with pytest.raises(OutputError, match="the file is gone"):
        FailedRows(FolderSink(made.spec.output, made.spec), made.spec)
    with pytest.raises(OutputError, match="the file is gone"):
        finalize_retry(FolderSink(made.spec.output, status.spec), status, shards)
