from pathlib import Path

import msgspec
import pytest

from embedstream.dataset.roots import allows, check_output
from embedstream.errors import EmbedstreamError, OutputError
from embedstream.lifecycle.opening import refuse_forbidden
from embedstream.queue.workers import WorkerRecord


def test_a_root_allows_itself_and_what_lies_below_it(tmp_path: Path) -> None:
    assert allows([str(tmp_path)], str(tmp_path))
    assert allows([str(tmp_path)], str(tmp_path / "a" / "b"))


def test_a_sibling_whose_name_begins_like_the_root_is_outside(tmp_path: Path) -> None:
    assert not allows([str(tmp_path / "out")], str(tmp_path / "out2"))


def test_dots_and_links_do_not_lead_out_of_a_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    assert not allows([str(root)], str(root / ".." / "elsewhere"))
    assert not allows([str(root)], str(root / "link" / "elsewhere"))


def test_a_linked_root_allows_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert allows([str(tmp_path / "link")], str(tmp_path / "real" / "out"))


def test_the_file_system_root_allows_every_folder_and_no_server() -> None:
    assert allows(["/"], "/srv/vectors")
    assert not allows(["/"], "redis:?prefix=docs:")


def test_no_roots_allow_nothing() -> None:
    assert not allows([], "/srv/vectors")


@pytest.mark.parametrize(
    ("root", "output", "allowed"),
    [
        ("redis:", "redis:?prefix=docs:", True),
        ("redis:", "redis://other/0?prefix=docs:", False),
        ("redis:?prefix=docs:", "redis:?prefix=docs:en:", True),
        ("redis:?prefix=docs:", "redis:?prefix=cache:", False),
        ("redis:", "/srv/vectors", False),
        ("redis://host", "redis://host:6379/3?prefix=docs:", True),
        ("redis://host", "redis://user:secret@host/3?prefix=docs:", True),
        ("redis://host", "redis://host2/3?prefix=docs:", False),
        ("redis://host", "rediss://host/3?prefix=docs:", False),
        ("redis://host:6380", "redis://host/0?prefix=docs:", False),
        ("redis://host/3", "redis://host/4?prefix=docs:", False),
        ("redis://host/3?prefix=docs:", "redis://host/3?prefix=docs:en:", True),
        ("redis://host/3?prefix=docs:", "redis://host/3?prefix=cache:", False),
        ("redis://host:port", "redis://host/3?prefix=docs:", False),
    ],
)
def test_a_server_root_allows_outputs_on_that_server(root: str, output: str, allowed: bool) -> None:
    assert allows([root], output) is allowed


def test_any_of_several_roots_suffices() -> None:
    assert allows(["/srv/a", "redis:", "/srv/b"], "/srv/b/out")


@pytest.mark.parametrize(
    "output",
    [
        "REDIS://elsewhere:6379/0?prefix=a:",
        "redis:///0?prefix=a:",
        "relative/out",
        "/srv/../etc",
        "redis:?prefix=rq:job:",
        "redis:?prefix=r",
        "redis:?prefix=docs:&prefix=rq:",
        "file:///srv/out",
        "",
    ],
)
def test_an_output_in_no_canonical_spelling_is_allowed_nowhere(output: str) -> None:
    with pytest.raises(EmbedstreamError):
        check_output([str(Path.cwd()), "/", "redis:"], output)


@pytest.mark.parametrize("output", ["redis:?prefix=a:", "/srv/out"])
def test_a_canonical_output_below_a_root_passes(output: str) -> None:
    check_output(["/srv", "redis:"], output)
    with pytest.raises(OutputError, match="is outside this worker's output roots"):
        check_output(["/elsewhere", "rediss:"], output)


@pytest.mark.parametrize(
    ("output", "root"),
    [("/data/x/vectors", "/data/x"), ("redis:?prefix=docs:", "redis:"), ("redis://h:1/0?prefix=d:", "redis://h:1/0")],
    ids=["folder", "queue", "redis"],
)
def test_a_refused_output_comes_with_the_root_that_would_allow_it(output: str, root: str) -> None:
    named = dict.fromkeys(("name", "host", "model", "fingerprint", "engine", "device", "dtype", "state"), "x")
    worker = WorkerRecord(pid=1, started=0.0, roots=("/elsewhere",), **named)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=f"add --output-root {root} to a worker"):
        refuse_forbidden([worker], output)
    refuse_forbidden([msgspec.structs.replace(worker, roots=(root,))], output)
