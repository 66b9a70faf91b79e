"""embed-export, into each target and read back with that target's own library."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import lancedb
import msgspec
import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.dataset import Dataset, make_content, make_spec, make_status
from lab.postgres import postgres
from lab.results import EVERY_KIND
from milvus_lite.server_manager import server_manager_instance
from psycopg import sql
from pymilvus import MilvusClient
from qdrant_client import QdrantClient, models
from usearch.index import Index

from e2e.harness import run
from embedstream.dataset.manifest import manifest_digest
from embedstream.dataset.sinks import open_sink
from embedstream.dataset.values import from_columns
from embedstream.errors import EmbedstreamError
from embedstream.jobs import JobState, Update
from embedstream.lifecycle.update_completing import finalize_update
from embedstream.records import ShardContent
from embedstream_producer.exporting.export import export
from embedstream_producer.exporting.qdrant_collection import batches
from embedstream_producer.exporting.rows import Rows, Source

DENSE = EVERY_KIND[:5]
"""A column of each dtype, and one of fewer dimensions."""

ROWS = 60
KEPT = ("lang", "stars", "share", "is.new")
TYPES = {"stars": "int64", "share": "float64", "is.new": "bool"}

Found = dict[tuple[str, int], tuple[dict[str, Any], list[float]]]
"""What a target holds: payload and vector by id and chunk."""


def make_dataset(folder: Path, **changed: Any) -> Path:
    spec = make_spec(str(folder), **{"keep": KEPT, "keep_types": TYPES, **changed})
    dataset = Dataset(open_sink(spec.output, spec), spec)
    dataset.sink.check()
    for name, part in (("one", 0), ("two", 1)):
        dataset.write(in_chunks(make_content(spec, name, [(part, 0)], ROWS // 2, outputs=DENSE)))
    dataset.end()
    return folder


def in_chunks(content: ShardContent) -> ShardContent:
    """The same, but each fourth row is another chunk of the one before."""
    ids = content.data["id"].to_pylist()
    ids = [ids[n - 1] if n % 4 == 3 else id for n, id in enumerate(ids)]
    columns = {"id": pa.array(ids), "chunk": pa.array([int(n % 4 == 3) for n in range(len(ids))], pa.int32())}
    data, schema = content.data, content.data.schema
    for name, column in columns.items():
        data = data.set_column(schema.get_field_index(name), schema.field(name), column)
    return ShardContent(content.record, data, content.errors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("export") / "docs.jsonl.vectors")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres() as url:
        yield url


def key(row: dict[str, Any]) -> tuple[str, int]:
    return row["id"], row["chunk"]


class InFaiss:
    kind = "faiss"

    def __init__(self, place: str) -> None:
        self.place = place

    def numbered(self) -> list[dict[str, Any]]:
        return pq.read_table(f"{self.place}.ids.parquet").to_pylist()

    def held(self, column: str) -> Found:
        rows = self.numbered()
        if column == "bits":
            binary: Any = faiss.read_index_binary(self.place)
            bits = faiss.vector_to_array(binary.xb).reshape(len(rows), -1)
            vectors = np.unpackbits(bits, axis=1).astype(np.float32) * 2 - 1
        else:
            index = faiss.read_index(self.place)
            vectors = index.reconstruct_n(0, index.ntotal)
        return {key(row): (row, vector.tolist()) for row, vector in zip(rows, vectors, strict=True)}

    def nearest(self, column: str, vector: npt.NDArray[np.float32]) -> str:
        if column == "bits":
            found = faiss.read_index_binary(self.place).search(np.packbits(vector > 0)[None], 1)[1]
        else:
            found = faiss.read_index(self.place).search(vector[None], 1)[1]
        return str(self.numbered()[found[0][0]]["id"])


class InUsearch(InFaiss):
    kind = "usearch"

    def held(self, column: str) -> Found:
        rows = self.numbered()
        index: Any = Index.restore(self.place)
        assert len(index) == len(rows)
        vectors = [index.get(number) for number in range(len(rows))]
        if column == "bits":
            vectors = [np.unpackbits(vector.view(np.uint8)).astype(np.float32) * 2 - 1 for vector in vectors]
        return {key(row): (row, vector.astype(np.float32).tolist()) for row, vector in zip(rows, vectors, strict=True)}

    def nearest(self, column: str, vector: npt.NDArray[np.float32]) -> str:
        query = np.packbits(vector > 0) if column == "bits" else vector
        index: Any = Index.restore(self.place)
        return str(self.numbered()[int(index.search(query, 1).keys[0])]["id"])


class InLance:
    kind = "lance"

    def __init__(self, place: str) -> None:
        self.place = place

    def table(self) -> Any:
        return lancedb.connect(self.place).open_table("docs")

    def held(self, column: str) -> Found:
        found = {}
        for row in self.table().to_arrow().to_pylist():
            vector = np.array(row.pop(column))
            if column == "bits":
                vector = np.unpackbits(vector.astype(np.uint8)).astype(np.float32) * 2 - 1
            row["is.new"] = row.pop("is_new")
            found[key(row)] = row, vector.tolist()
        return found

    def nearest(self, column: str, vector: npt.NDArray[np.float32]) -> str:
        query = np.packbits(vector > 0) if column == "bits" else vector
        metric = "hamming" if column == "bits" else "cosine"
        search = self.table().search(query, vector_column_name=column).distance_type(metric)
        return str(search.limit(1).to_arrow()["id"][0])


class InQdrant:
    kind = "qdrant"

    def __init__(self, place: str) -> None:
        self.place = place

    def held(self, column: str) -> Found:  # noqa: ARG002
        client = QdrantClient(path=self.place)
        points, _ = client.scroll("docs", limit=1000, with_vectors=True)
        client.close()
        found = {}
        for point in points:
            payload: Any = point.payload
            vector: Any = point.vector
            row = dict.fromkeys(["id", "chunk", "text", *KEPT]) | payload
            assert payload == {name: value for name, value in row.items() if value is not None}
            found[key(row)] = row, vector
        return found

    def nearest(self, column: str, vector: npt.NDArray[np.float32]) -> str:  # noqa: ARG002
        client = QdrantClient(path=self.place)
        (hit,) = client.query_points("docs", vector.tolist(), limit=1).points
        client.close()
        payload: Any = hit.payload
        return str(payload["id"])


class InMilvus:
    kind = "milvus"

    def __init__(self, place: str) -> None:
        self.place = f"{place}.db"

    def held(self, column: str) -> Found:
        column = column if column.isidentifier() else "vector"
        client: Any = MilvusClient(self.place)
        client.load_collection("docs")  # the process that was killed had it
        found = {}
        for entity in client.query("docs", filter='embedstream_key != ""', output_fields=["*"], limit=1000):
            vector = entity.pop(column)
            assert entity.pop("embedstream_key")
            row = dict.fromkeys(["id", "chunk", "text", *KEPT]) | dict(entity)
            found[key(row)] = row, vector
        client.close()
        return found

    def nearest(self, column: str, vector: npt.NDArray[np.float32]) -> str:  # noqa: ARG002
        client: Any = MilvusClient(self.place)
        ((hit,),) = client.search("docs", [vector], limit=1, output_fields=["id"])
        client.close()
        return str(hit["entity"]["id"])


class InPinecone:
    kind = "pinecone-parquet"

    def __init__(self, place: str) -> None:
        self.place = place

    def rows(self) -> list[dict[str, Any]]:
        return pq.read_table(self.place, columns=["id", "values", "metadata"]).to_pylist()

    def held(self, column: str) -> Found:  # noqa: ARG002
        found = {}
        for row in self.rows():
            id, _, chunk = row["id"].partition("#")
            payload = dict.fromkeys(["text", *KEPT]) | json.loads(row["metadata"])
            found[id, int(chunk or 0)] = {"id": id, "chunk": int(chunk or 0), **payload}, row["values"]
        return found

    def nearest(self, column: str, vector: npt.NDArray[np.float32]) -> str:
        held = {key: np.array(values) for key, (_, values) in self.held(column).items()}
        return max(held, key=lambda key: float(held[key] @ vector / np.linalg.norm(held[key])))[0]


class InPostgres:
    kind = "pgvector"

    def __init__(self, place: str) -> None:
        self.place = place

    def held(self, column: str) -> Found:
        found = {}
        with psycopg.connect(self.place) as connection:
            names = ["id", "chunk", "text", *KEPT]
            fields = sql.SQL(", ").join(map(sql.Identifier, [*names, column]))
            asked = sql.SQL("SELECT {}::text FROM docs").format(fields)
            for *values, vector in connection.execute(asked):
                numbers = [2 * int(bit) - 1 for bit in vector] if column == "bits" else json.loads(vector)
                found[values[0], values[1]] = dict(zip(names, values, strict=True)), numbers
        return found

    def nearest(self, column: str, vector: npt.NDArray[np.float32]) -> str:
        operator, query = "<=>", str(vector.tolist())
        if column == "bits":
            operator, query = "<~>", "".join("1" if number > 0 else "0" for number in vector)
        kind = {"half": "halfvec", "bits": f"bit({len(vector)})"}.get(column, "vector")
        asked = f'SELECT id FROM docs ORDER BY "{column}" {operator} %s::{kind} LIMIT 1'
        with psycopg.connect(self.place) as connection:
            row: Any = connection.execute(asked.encode(), (query,)).fetchone()
        return str(row[0])


Held = InFaiss | InUsearch | InLance | InQdrant | InMilvus | InPinecone | InPostgres
KINDS: list[type[Held]] = [InFaiss, InUsearch, InLance, InQdrant, InMilvus, InPinecone, InPostgres]
EACH = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)


@pytest.fixture
def opened(kind: type[Held], tmp_path: Path, request: pytest.FixtureRequest) -> Held:
    """An empty place."""
    if kind is not InPostgres:
        return kind(str(tmp_path / "there"))
    url: str = request.getfixturevalue("database")
    with psycopg.connect(url) as connection:
        connection.execute("DROP TABLE IF EXISTS docs")
    return kind(url)


def target(opened: Held) -> str:
    return f"{opened.kind}:{opened.place}"


def expected(folder: Path, column: str) -> Found:
    """By an independent reader."""
    found = {}
    (output,) = (output for output in DENSE if output.name == column)
    for path in sorted(folder.glob("part-*.parquet")):
        (batch,) = pq.read_table(path).to_batches()
        vectors: Any = from_columns(output, batch)
        for row, vector in zip(batch.select(["id", "chunk", "text", *KEPT]).to_pylist(), vectors, strict=True):
            found[key(row)] = row, vector.tolist()
    return found


def assert_holds(opened: Held, folder: Path, column: str) -> None:
    """All rows with their payloads and vectors, and no others."""
    held, wanted = opened.held(column), expected(folder, column)
    assert held.keys() == wanted.keys()
    for place, (payload, numbers) in wanted.items():
        shares = [payload.pop("share"), held[place][0].pop("share")]
        sent, arrived = (np.array(np.nan if share is None else share) for share in shares)
        np.testing.assert_array_equal(arrived, sent)
        assert held[place][0] == payload
        vector, there = np.array(numbers), np.array(held[place][1])
        if opened.kind == "faiss" and column != "bits":  # whose inner product is the cosine then
            assert np.linalg.norm(there) == pytest.approx(1, abs=1e-3 if column == "half" else 1e-6)
        if opened.kind in ("faiss", "qdrant"):  # which have them at length 1
            vector, there = vector / np.linalg.norm(vector), there / np.linalg.norm(there)
        np.testing.assert_allclose(there, vector, atol=1e-3 if column == "half" else 1e-6)
        payload["share"], held[place][0]["share"] = shares


@EACH
@pytest.mark.parametrize("column", [output.name for output in DENSE])
def test_all_rows_arrive_and_find_themselves_and_a_second_export_changes_nothing(
    opened: Held, folder: Path, column: str
) -> None:
    if opened.kind in ("qdrant", "milvus", "pinecone-parquet") and column == "bits":
        with pytest.raises(EmbedstreamError, match="export other vectors"):
            export(str(folder), target(opened), column)
        return
    for _ in range(2):
        done = export(str(folder), target(opened), column)
        assert (done.rows, done.column) == (ROWS, column)
        assert_holds(opened, folder, column)
    vectors = {id: np.array(vector, np.float32) for id, (_, vector) in expected(folder, column).items()}
    for id in ("0-0", "0-29", "1-17"):
        nearest = opened.nearest(column, vectors[id, 0])
        assert nearest == id or np.array_equal(vectors[nearest, 0], vectors[id, 0])
    if opened.kind in ("faiss", "lance", "pinecone-parquet"):
        assert done.recall is None
    else:
        assert done.recall is not None
        assert 0.9 < done.recall <= 1.0
        assert done.queries == ROWS


KILLED = """
import os, signal, sys
from pathlib import Path
from embedstream_producer.exporting.export import export
from embedstream_producer.progress import WorkProgress

moment, dataset, target = sys.argv[1:]

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Killing(WorkProgress):
    def advance(self, rows):
        if rows:
            kill()

if moment == "in the middle":
    export(dataset, target, "embedding", progress=Killing(quiet=True))
replace, calls = Path.replace, []
def replacing(path, place):
    calls.append(path)
    if len(calls) == int(moment):
        kill()
    return replace(path, place)
Path.replace = replacing
export(dataset, target, "embedding")
"""


def killed(moment: str, folder: Path, opened: Held) -> None:
    """An export that is killed at this moment."""
    server_manager_instance.release_all()  # Milvus Lite holds its file as long as the process lives
    command = [sys.executable, "-c", KILLED, moment, str(folder), target(opened)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@EACH
@pytest.mark.parametrize("before", [False, True], ids=["new", "there before"])
def test_an_export_that_was_killed_in_the_middle_is_whole_when_it_is_run_again(
    opened: Held, folder: Path, before: bool
) -> None:
    if before:
        export(str(folder), target(opened), "embedding")
    killed("in the middle", folder, opened)
    if before:
        assert_holds(opened, folder, "embedding")
    export(str(folder), target(opened), "embedding")
    assert_holds(opened, folder, "embedding")
    if opened.kind in ("faiss", "usearch", "pinecone-parquet"):
        place = Path(opened.place)
        assert {path.name for path in place.parent.glob(".*")} == set(), "nothing is left of the one that was killed"


def update(folder: Path) -> None:
    """Another generation: a row is gone, one has another text and vector, one another field, one is new."""
    manifest = open_sink(str(folder)).read_manifest()
    assert manifest is not None
    begun = Update(manifest=manifest_digest(manifest), space=manifest.space)
    spec = make_spec(str(folder), keep=KEPT, keep_types=TYPES, update=begun)
    sink, records = open_sink(spec.output, spec), []
    for name, part in (("one", 0), ("two", 1)):
        content = in_chunks(make_content(spec, name, [(part, 0)], ROWS // 2, outputs=DENSE))
        rows, changed = content.data.to_pylist(), {1: ["text", "input_hash", "embedding"], 2: ["lang"]}
        for at, names in changed.items() if part else ():
            rows[at] |= {each: rows[7][each] for each in names}
        if part:
            rows[0]["id"] = "it's \0 new"
        data = pa.Table.from_pylist(rows, schema=content.data.schema)
        record = msgspec.structs.replace(content.record, name=f"{name}-again")
        records.append(sink.write_shard(ShardContent(record, data, content.errors)))
    made = finalize_update(sink, make_status(spec, 2), records, 2000.0, ())
    assert made is not None
    changes = made.changes[-1]
    assert (changes.added, changes.changed, changes.removed) == (1, 2, 1)


@pytest.mark.parametrize("kind", [InLance, InQdrant, InMilvus, InPostgres], ids=lambda kind: kind.kind)
def test_what_changed_since_a_generation_is_put_there_and_what_is_gone_is_removed(opened: Held, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "docs.jsonl.vectors")
    export(str(folder), target(opened), "embedding")
    update(folder)
    for _ in range(2):
        done = export(str(folder), target(opened), "embedding", since=0)
        assert (done.rows, done.removed, done.generation) == (3, 1, 1)
        held, wanted = opened.held("embedding"), expected(folder, "embedding")
        if opened.kind == "pgvector":
            wanted = {(id.replace("\0", "\ufffd"), chunk): row for (id, chunk), row in wanted.items()}
        assert held.keys() == wanted.keys()
        assert all(held[place][0]["text"] == row["text"] for place, (row, _) in wanted.items())
        assert all(held[place][0]["lang"] == row["lang"] for place, (row, _) in wanted.items())
    assert export(str(folder), target(opened), "embedding", since=1).rows == 0
    with pytest.raises(EmbedstreamError, match="generations 0 to 1"):
        export(str(folder), target(opened), "embedding", since=2)


@EACH
def test_an_updated_dataset_replaces_its_earlier_export(opened: Held, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "docs.jsonl.vectors")
    for _ in range(2):  # the first try makes no place that the second could take for an export
        with pytest.raises(EmbedstreamError, match="leave"):
            export(str(folder), target(opened), "embedding", since=0)
    export(str(folder), target(opened), "embedding")
    update(folder)
    export(str(folder), target(opened), "embedding")
    assert len(opened.held("embedding")) == ROWS + (opened.kind in ("qdrant", "milvus", "pgvector"))


@pytest.mark.parametrize("kind", [InFaiss, InUsearch], ids=lambda kind: kind.kind)
@pytest.mark.parametrize("moment", ["1", "2"])
def test_ids_are_never_beside_the_index_of_another_export(opened: Held, folder: Path, moment: str) -> None:
    export(str(folder), target(opened), "embedding")
    killed(moment, folder, opened)
    assert not Path(opened.place).exists()
    export(str(folder), target(opened), "embedding")
    assert_holds(opened, folder, "embedding")


def occupy(opened: Held) -> None:
    """Put something else there."""
    match opened.kind:
        case "faiss" | "usearch" | "pinecone-parquet":
            Path(opened.place).write_bytes(b"a thesis")
        case "lance":
            lancedb.connect(opened.place).create_table("docs", pa.table({"id": ["theirs"]}))
        case "qdrant":
            client = QdrantClient(path=opened.place)
            client.create_collection("docs", models.VectorParams(size=16, distance=models.Distance.DOT))
            client.close()
        case "milvus":
            theirs: Any = MilvusClient(opened.place)
            theirs.create_collection("docs", dimension=16)
            theirs.close()
        case "pgvector":
            with psycopg.connect(opened.place) as connection:
                connection.execute("CREATE TABLE docs (id text)")


@EACH
def test_a_place_that_holds_something_else_is_refused(opened: Held, folder: Path) -> None:
    occupy(opened)
    with pytest.raises(EmbedstreamError, match=r"holds something that embed-export did not write: choose another"):
        export(str(folder), target(opened), "embedding")
    if opened.kind == "faiss":
        assert Path(opened.place).read_bytes() == b"a thesis"


@EACH
def test_vectors_that_cannot_be_compared_do_not_meet_in_one_place(opened: Held, folder: Path) -> None:
    export(str(folder), target(opened), "embedding")
    with pytest.raises(EmbedstreamError, match=r"holds an export with column embedding, and this dataset has short"):
        export(str(folder), target(opened), "short")
    assert_holds(opened, folder, "embedding")


@EACH
def test_a_damaged_dataset_is_named_and_an_earlier_export_stands(opened: Held, folder: Path, tmp_path: Path) -> None:
    copy = make_dataset(tmp_path / "docs.copy")
    export(str(copy), target(opened), "embedding")
    (copy / "part-two.parquet").write_bytes(b"PAR1")
    with pytest.raises(EmbedstreamError, match=r"part-two\.parquet: "):
        export(str(copy), target(opened), "embedding")
    assert_holds(opened, folder, "embedding")


@EACH
def test_a_dataset_without_rows_is_exported_as_one(opened: Held, tmp_path: Path) -> None:
    spec = make_spec(str(tmp_path / "docs.none"), keep=KEPT, keep_types=TYPES)
    dataset = Dataset(open_sink(spec.output, spec), spec)
    dataset.sink.check()
    dataset.write(make_content(spec, rows_per_block=0, outputs=DENSE))
    dataset.end()
    done = export(spec.output, target(opened), "embedding")
    assert (done.rows, done.recall, opened.held("embedding")) == (0, None, {})


@EACH
def test_a_column_may_have_any_name(opened: Held, tmp_path: Path) -> None:
    spec = make_spec(str(tmp_path / "docs.odd"))
    dataset = Dataset(open_sink(spec.output, spec), spec)
    dataset.sink.check()
    name = '50% of "it\'s" {x}'
    dataset.write(make_content(spec, outputs=[msgspec.structs.replace(DENSE[0], name=name), DENSE[1]]))
    dataset.end()
    done = export(spec.output, target(opened), name)
    assert (done.rows, done.recall) == (3, None if opened.kind in ("faiss", "lance", "pinecone-parquet") else 1)


@pytest.mark.parametrize("kind", [InQdrant, InPostgres], ids=lambda kind: kind.kind)
def test_two_datasets_whose_vectors_can_be_compared_may_share_a_table(
    opened: Held, folder: Path, tmp_path: Path
) -> None:
    export(str(folder), target(opened), "embedding")
    export(str(make_dataset(tmp_path / "docs.more")), target(opened), "embedding")
    assert_holds(opened, folder, "embedding")


@pytest.mark.parametrize("kind", [InFaiss, InLance], ids=lambda kind: kind.kind)
def test_a_place_that_is_replaced_whole_is_not_taken_from_another_dataset(
    opened: Held, folder: Path, tmp_path: Path
) -> None:
    export(str(folder), target(opened), "embedding")
    with pytest.raises(EmbedstreamError, match=r"holds an export with job"):
        export(str(make_dataset(tmp_path / "docs.more")), target(opened), "embedding")


@pytest.mark.parametrize("kind", [InPostgres], ids=lambda kind: kind.kind)
def test_a_character_that_postgresql_lacks_costs_no_export(opened: Held, tmp_path: Path) -> None:
    spec = make_spec(str(tmp_path / "docs.nul"), keep=KEPT, keep_types=TYPES)
    dataset = Dataset(open_sink(spec.output, spec), spec)
    dataset.sink.check()
    content = make_content(spec, outputs=DENSE)
    texts = pa.array(["one\0two", "", "three"])
    data = content.data.set_column(
        content.data.schema.get_field_index("text"), content.data.schema.field("text"), texts
    )
    dataset.write(ShardContent(content.record, data, content.errors))
    dataset.end()
    export(spec.output, target(opened), "embedding")
    assert sorted(payload["text"] for payload, _ in opened.held("embedding").values()) == ["", "one\ufffdtwo", "three"]


@pytest.mark.parametrize("kind", [InPostgres], ids=lambda kind: kind.kind)
def test_each_table_has_one_index_whatever_other_tables_are_called(opened: Held, folder: Path) -> None:
    tables = ["t" * 52 + "a", "t" * 52 + "b", "t_hnsw", "t"]
    for table in [*tables, *tables]:
        export(str(folder), target(opened), "embedding", table)
    with psycopg.connect(opened.place) as connection:
        asked = "SELECT tablename FROM pg_indexes WHERE indexdef LIKE '%USING hnsw%' AND tablename LIKE 't%'"
        found: list[Any] = connection.execute(asked).fetchall()
    assert sorted(name for (name,) in found) == sorted(tables)


@pytest.mark.parametrize(("dim", "text"), [(4096, ""), (8, "ж\n" * 10_000)], ids=["wide vectors", "long texts"])
def test_a_request_to_qdrant_is_one_that_a_server_takes(dim: int, text: str) -> None:
    ids = [f"r-{n}" for n in range(500)]
    columns: dict[str, Any] = {"id": ids, "chunk": [0] * len(ids), "text": [text] * len(ids)}
    vectors = np.random.default_rng(7).standard_normal((len(ids), dim)).astype(np.float32)
    sent: list[Any] = []
    for points in batches(Rows(pa.RecordBatch.from_pydict(columns), vectors)):
        assert len(json.dumps(points.model_dump())) < 32 * 1024 * 1024
        assert len(points.ids) == len(points.vectors)
        sent += points.payloads or []
    assert [payload["id"] for payload in sent] == ids


def test_half_of_the_nearest_rows_is_half_a_recall(folder: Path) -> None:
    from embedstream_producer.exporting.recall import K, Sample, recall

    source = Source(str(folder), "embedding")
    sample = Sample(source)
    for batch in source.batches():
        sample.see(batch)
    wanted = expected(folder, "embedding")
    ids = list(wanted)
    matrix = np.array([vector for _, vector in wanted.values()])
    nearest = [[ids[n] for n in row[:K]] for row in np.argsort(-(matrix @ matrix.T), axis=1)]
    others = [[ids[n] for n in row[-K:]] for row in np.argsort(-(matrix @ matrix.T), axis=1)]
    mixed = [[*near[: K // 2], *far[: K // 2]] for near, far in zip(nearest, others, strict=True)]
    twice = [[*near[: K // 2], *near[: K // 2]] for near in nearest]
    for found, share in ((nearest, 1), (others, 0), (mixed, 0.5), (twice, 0.5), ([[]] * ROWS, 0)):
        assert recall(source, sample, found, source.batches()) == pytest.approx(share)


def test_the_command_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    done = run("embed-export", folder, f"usearch:{tmp_path}/u", "--column", "half")
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    assert first.startswith(f"exported: {ROWS} rows to usearch:{tmp_path}/u (16 dimensions, ")
    assert re.fullmatch(rf"recall@10: (1\.000|0\.9\d\d) against exact search, by {ROWS} rows of the dataset", second)
    done = run("embed-export", folder, f"lance:{tmp_path}/l", "--column", "half", "--json")
    said = json.loads(done.stdout)
    assert (said["rows"], said["dim"], said["dtype"], said["recall"]) == (ROWS, 16, "float16", None)


BAD: dict[str, tuple[list[str], str]] = {
    "no target": (["{folder}", "elastic:x"], r"elastic:x: names no target: give lance:PLACE"),
    "no place": (["{folder}", "faiss"], r"faiss: names no target"),
    "no column": (["{folder}", "faiss:x"], r"has several dense vectors: choose one: --column embedding \| half"),
    "another column": (["{folder}", "faiss:x", "--column", "y"], r"there are no dense vectors y to export"),
    "a table of a file": (["{folder}", "faiss:x", "--table", "y"], r"faiss has no tables: leave it out"),
    "an odd table": (["{folder}", "lance:x", "--table", "../y"], r"letters, digits, _ and - make a name"),
    "no dataset": (["{empty}", "faiss:x"], r"no _manifest\.json: not a dataset, or its job has not ended yet"),
    "an unfinished one": (["{unfinished}", "faiss:x"], r"was cancelled before all rows were embedded"),
    "one in Redis": (["redis:?prefix=docs:", "faiss:x"], r"is in Redis, which has no files"),
    "no folder": (["{folder}", "faiss:nowhere/x", "--column", "half"], r"there is no folder nowhere: make it"),
    "no server": (["{folder}", "qdrant:http://127.0.0.1:1", "--column", "half"], r"run the same embed-export again"),
    "no database": (
        ["{folder}", "pgvector:postgresql://me:secret@127.0.0.1:1/x", "--column", "half"],
        r"pgvector:postgresql://me:\*\*\*@127\.0\.0\.1:1/x: .*refused.*: mend that",
    ),
    "no URL": (["{folder}", "pgvector:host=x password=secret", "--column", "half"], r"give the database's URL"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path, case: str) -> None:
    arguments, says = BAD[case]
    (tmp_path / "empty").mkdir()
    spec = make_spec(str(tmp_path / "unfinished"))
    unfinished = Dataset(open_sink(spec.output, spec), spec)
    unfinished.sink.check()
    unfinished.write(make_content(spec))
    unfinished.end(JobState.CANCELLED, sealed=False)
    places = {"folder": folder, "empty": tmp_path / "empty", "unfinished": spec.output}
    done = run("embed-export", *(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert re.search(says, done.stderr), done.stderr
    assert "secret" not in done.stderr
