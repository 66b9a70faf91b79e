"""How an output is spelled, and which sink it opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.redis_hashes import RedisSink
from embedstream.dataset.sinks import canonical_output, open_sink
from embedstream.errors import UsageError


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("redis://h?prefix=docs:", "redis://h:6379/0?prefix=docs:"),
        ("redis://H:6379/0?ttl=60&prefix=docs:", "redis://h:6379/0?prefix=docs:&ttl=60"),
        ("redis://h/?db=3&prefix=docs:", "redis://h:6379/3?prefix=docs:"),
        ("redis://u:p%40ss@h/2?prefix=a%20b%26%23:", "redis://u:p%40ss@h:6379/2?prefix=a%20b%26%23:"),
        ("redis://[::1]:7000?prefix=d:", "redis://[::1]:7000/0?prefix=d:"),
        ("rediss://h?prefix=d:&ssl_cert_reqs=none", "rediss://h:6379/0?ssl_cert_reqs=none&prefix=d:"),
        ("unix:///run/r.sock?prefix=d:", "unix:///run/r.sock?db=0&prefix=d:"),
        ("unix://u:p@/run/r.sock?prefix=d:&db=2", "unix://u:p@/run/r.sock?db=2&prefix=d:"),
        ("redis:?prefix=docs:&ttl=086400", "redis:?prefix=docs:&ttl=86400"),
        ("redis://?prefix=docs:", "redis:?prefix=docs:"),
    ],
)
def test_equal_redis_outputs_have_one_spelling(text: str, canonical: str) -> None:
    assert canonical_output(text) == canonical
    assert canonical_output(canonical) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("redis://h", "no prefix: say how keys begin"),
        ("redis:", "no prefix"),
        ("redis://h?prefix=", "no prefix"),
        ("redis://h?prefix=docs", "does not end in a colon: write prefix=docs:"),
        ("redis:?prefix=r", "does not end in a colon"),
        ("redis:?prefix=embedstream", "does not end in a colon"),
        ("redis:?prefix=docs:&prefix=", "no prefix"),
        ("redis:?prefix=embedstream:", "are the queue's"),
        ("redis://h?prefix=embedstream:x:", "are the queue's"),
        ("redis:?prefix=docs:&prefix=rq:job:", "are the queue's"),
        ("redis:?prefix=RQ:", "are the queue's"),
        ("redis:?prefix=%72q%3A", "are the queue's"),
        ("redis://h?prefix=a:#b", "write # in a prefix as %23"),
        ("redis://h?prefix=a:&ttl=0", "ttl=0 is not a number of seconds"),
        ("redis://h?prefix=a:&ttl=1d", "ttl=1d is not a number of seconds"),
        ("redis://h?prefix=a:&tll=5", "unknown setting tll"),
        ("redis://h/x?prefix=a:", "the database is not a number"),
        ("redis://h:99999?prefix=a:", "the port is not a number below 65536"),
        ("redis:?prefix=a:&db=1", "names no server"),
        ("unix://?prefix=a:", "no socket"),
        ("gs://bucket/key", "unknown scheme: give a folder"),
        ("https://u:secret@h/x", "unknown scheme"),
        ("redis://u:secret@h/x", "no prefix"),
        ("", "the output is empty"),
    ],
)
def test_an_output_that_cannot_be_used_is_one_sentence_without_password(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        canonical_output(text)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_absolute_and_normalized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("out", "./out/", "out//", str(tmp_path / "out"), "x/../out"):
        assert canonical_output(text) == str(tmp_path / "out")
    assert canonical_output("a:b/c") == str(tmp_path / "a:b" / "c")


def test_links_keep_their_names_but_climbing_out_of_one_goes_where_the_system_goes(tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    assert canonical_output(f"{tmp_path}/link/out") == f"{tmp_path}/link/out"
    assert canonical_output(f"{tmp_path}/link/../out") == f"{tmp_path}/disk/out"


def test_the_scheme_chooses_the_sink() -> None:
    assert isinstance(open_sink("/some/where"), FolderSink)
    assert isinstance(open_sink("redis:?prefix=a:", queue_url="redis://h"), RedisSink)
    assert open_sink("redis://h?prefix=a:").output == "redis://h:6379/0?prefix=a:"
    with pytest.raises(UsageError, match="means the queue's own server, and there is none"):
        open_sink("redis:?prefix=a:")
