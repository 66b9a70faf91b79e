"""Nothing outside the roots is read or written, even while somebody swaps folders below them for links."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.broker import Lab

from embedstream.dataset.beneath import open_beneath
from embedstream.dataset.storage import Folder
from embedstream.errors import InputError, OutputError
from embedstream.jobs import JobSpec
from embedstream.queue.coordination import note_repeated
from embedstream.server.connection import connect
from embedstream_coordinator import functions
from embedstream_coordinator.context import Context

SECRET, PUBLIC = "root:$6$TOPSECRET", "public"


def write(path: Path, text: str) -> None:
    path.parent.mkdir()
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": ["a"], "text": [text]}), path)
    else:
        path.write_text(json.dumps({"id": "a", "text": text}) + "\n")


@contextlib.contextmanager
def swapping(folder: Path, secret: Path) -> Iterator[None]:
    """A folder is a link to the secret one, and is the folder again, as fast as a thread can."""
    away, link, over = folder.with_name("away"), folder.with_name("link"), threading.Event()
    link.symlink_to(secret)

    def swap() -> None:
        while not over.is_set():
            for old, new in ((folder, away), (link, folder), (folder, link), (away, folder)):
                os.rename(old, new)  # noqa: PTH104  (by far the fastest)

    with running(swap, over):
        yield


@contextlib.contextmanager
def turning(link: Path, *targets: Path) -> Iterator[None]:
    """A link leads to one folder and the other, in turn, and is never missing."""
    over, new = threading.Event(), link.with_name("new-link")

    def turn() -> None:
        for target in itertools.cycle(targets):
            new.symlink_to(target)
            new.replace(link)
            if over.is_set():
                return

    with running(turn, over):
        yield


@contextlib.contextmanager
def running(act: Callable[[], None], over: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_lies_outside_never_reaches_the_queue(redis_url: str, tmp_path: Path, suffix: str) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    part = inside / "sub" / f"c{suffix}"
    write(part, PUBLIC)
    write(outside / part.name, SECRET)
    lab = Lab(connect(redis_url))
    context = Context(redis_url=redis_url, input_roots=(str(inside),), output_roots=("/",))
    read, ask = 0, lab.client
    with swapping(part.parent, outside):
        for n in range(250):
            spec = msgspec.structs.replace(lab.spec(f"/out/{n}", 1), parts=(str(part),))
            lab.broker.run(lab.broker.create(spec))
            note_repeated(lab.broker, spec.job, 0, [])
            with contextlib.suppress(InputError):
                functions.ingest(context, lab.broker.queue, spec.job, 0)
            entries: Any = ask.xrange(lab.keys.blocks(spec.job))
            text = b"".join(value for _, fields in entries for value in fields.values())
            assert SECRET.encode() not in text
            read += bool(entries)
    assert read, "the folder was there now and then"


def test_what_lies_outside_is_never_open_in_thousands_of_tries(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    part = inside / "sub" / "c.jsonl"
    write(part, PUBLIC)
    write(outside / part.name, SECRET)
    found: set[str] = set()
    with swapping(part.parent, outside):
        for _ in range(5000):
            with contextlib.suppress(OSError, ValueError):
                descriptor = open_beneath([str(inside)], str(part), os.O_RDONLY)
                with os.fdopen(descriptor, "rb") as file:
                    found.add(json.loads(file.read())["text"])
    assert found == {PUBLIC}


def test_nothing_outside_is_ever_read_as_a_dataset(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder, text in ((inside / "out", PUBLIC), (outside, SECRET)):
        folder.mkdir(parents=True)
        (folder / "_manifest.json").write_text(text)
        (folder / f"part-{text[:4]}.parquet").write_text(text)
    roots, names, found = [str(inside)], set[str](), set[str | None]()
    with swapping(inside / "out", outside):
        for _ in range(3000):
            storage = Folder(inside / "out", roots)
            with contextlib.suppress(OutputError):
                names |= {*storage.names(), *storage.sizes()}
            with contextlib.suppress(OutputError):
                found.add((storage.read("_manifest.json") or b"").decode())
            with contextlib.suppress(OutputError):
                found.add(storage.open("_manifest.json").read().decode())
    assert names == {"_manifest.json", "part-publ.parquet"}
    assert found == {"", PUBLIC}


def test_nothing_outside_is_ever_written_or_removed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "real" / "out").mkdir(parents=True)
    (inside / "sub").symlink_to("real")
    (outside / "out").mkdir(parents=True)
    (outside / "out" / "part-a.parquet").write_text("precious")
    storage, written = Folder(inside / "sub" / "out", [str(inside)]), 0
    with turning(inside / "sub", inside / "real", outside):
        for _ in range(1000):
            with contextlib.suppress(OutputError):
                storage.prove_writable()
            with contextlib.suppress(OutputError):
                storage.write("part-a.parquet", [b"rows"])
                written += 1
            with contextlib.suppress(OutputError):
                storage.remove(["part-a.parquet"])
            with contextlib.suppress(OutputError):
                Folder(inside / "sub" / "new", [str(inside)]).prepare()
    assert written
    assert sorted(path.name for path in outside.rglob("*")) == ["out", "part-a.parquet"]
    assert (outside / "out" / "part-a.parquet").read_text() == "precious"


@pytest.mark.parametrize(
    ("root", "path", "allowed"),
    [
        ("in", "in/sub/c.jsonl", True),
        ("in", "in/link/c.jsonl", True),
        ("in/sub/c.jsonl", "in/sub/c.jsonl", True),
        ("way", "way/sub/c.jsonl", True),
        ("in", "in/out/c.jsonl", False),
        ("in", "in/../outside/c.jsonl", False),
        ("in", "inside/c.jsonl", False),
        ("in", "in/loop", False),
    ],
)
def test_links_lead_where_they_lead_as_long_as_that_is_below_the_root(
    tmp_path: Path, root: str, path: str, allowed: bool
) -> None:
    (tmp_path / "in").mkdir()
    for folder in ("in/sub", "outside", "inside"):
        write(tmp_path / folder / "c.jsonl", PUBLIC)
    (tmp_path / "in" / "link").symlink_to("sub")
    (tmp_path / "in" / "out").symlink_to("../outside")
    (tmp_path / "in" / "loop").symlink_to("loop")
    (tmp_path / "way").symlink_to("in")
    with contextlib.ExitStack() as stack:
        if not allowed:
            stack.enter_context(pytest.raises((ValueError, OSError)))
        os.close(open_beneath([str(tmp_path / root)], str(tmp_path / path), os.O_RDONLY))


def test_a_pipe_below_the_root_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    context = Context(redis_url="", input_roots=(str(tmp_path),), output_roots=())
    with pytest.raises(InputError, match="is no regular file"):
        context.open_input(str(tmp_path / "pipe"), os.O_RDONLY)


def test_a_spec_names_no_part_that_a_coordinator_would_take_for_its_own_input(tmp_path: Path) -> None:
    context = Context(redis_url="", input_roots=(str(tmp_path),), output_roots=())
    for part in ("-", "records", "relative", "/etc/passwd", f"{tmp_path}/../x", f"{tmp_path}/x\0y"):
        with pytest.raises((InputError, ValueError)):
            context.open_input(JobSpec(queue="q", output="/o", model="m", parts=(part,)).parts[0], os.O_RDONLY)
