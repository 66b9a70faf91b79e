"""`pip install .` without extras: the packages that `dependencies` bring, and no other, can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import embedstream.testing
from e2e.harness import BIN, environment

ROOT = Path(__file__).parents[2]

PROGRAM = """
import embedstream

with embedstream.Client({url!r}) as client:
    job = client.submit(["one text", "another"], output={output!r}, model="hashing")
    print(job.wait().rows, sum(batch.num_rows for batch in job.results()))
    print(client.embed("a text", model="hashing").shape)
print(embedstream.open_dataset({output!r}).count_rows())
"""


def distributions() -> set[str]:
    """Those that a plain install brings."""
    waiting: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    found: set[str] = set()
    while waiting:
        needed = Requirement(waiting.pop())
        name = canonicalize_name(needed.name)
        if name not in found and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += metadata.requires(name) or []
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that have a plain install."""
    own = distributions() | {"embedstream"}
    others = [
        module
        for module, names in metadata.packages_distributions().items()
        if not own.intersection(map(canonicalize_name, names)) and not module.startswith(("embedstream", "_"))
    ]
    assert {"torch", "tokenizers", "prometheus_client", "rq", "fakeredis"} <= set(others)
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        f"find, others = PathFinder.find_spec, frozenset({sorted(others)!r})\n"
        "PathFinder.find_spec = lambda name, *more: None if name.partition('.')[0] in others else find(name, *more)\n"
    )
    return environment(PYTHONPATH=str(site))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    lines = (json.dumps({"id": str(n), "text": f"text number {n}"}) for n in range(20))
    (folder / "c.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with embedstream.testing.fleet(folder) as url:
        yield url


def ran(command: Sequence[str], env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    words = [str(BIN / command[0]), *command[1:]]
    return subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


def test_it_submits_follows_verifies_and_reads(plain: dict[str, str], folder: Path, url: str) -> None:
    redis = ["--redis", url]
    for command, said in [
        (["embed-submit", "c.jsonl", "--model", "hashing", "--plan"], "tokens:  unknown: tokenizers is not installed"),
        (["embed-submit", "c.jsonl", "--model", "hashing", *redis], "completed: 20 rows"),
        (["embed-status", *redis], "completed  20 of 20 rows"),
        (["embed-verify", "c.jsonl.vectors", "--corpus", "c.jsonl"], "compared with 20 rows of the corpus"),
        (["embed-compact", "c.jsonl.vectors"], "1 shard before, 1 now"),
    ]:
        done = ran(command, plain, folder)
        assert (done.returncode, said in done.stdout) == (0, True), (command, done.stdout, done.stderr)
    code = PROGRAM.format(url=url, output=str(folder / "python"))
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=False)
    assert done.stdout == "2 2\n(1, 384)\n2\n", done.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["embed-worker", "--redis", "redis://127.0.0.1:1"], "worker"),
        (["embed-search", "c.jsonl.vectors", "a question"], "worker"),
        (["embed-submit", "c.jsonl", "-o", "other"], "local"),
        (["embed-coordinator", "--redis", "redis://127.0.0.1:1"], "coordinator"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_it_lacks_is_named_with_the_extra_that_brings_it(
    command: list[str], extra: str, plain: dict[str, str], folder: Path
) -> None:
    done = ran(command, plain, folder)
    assert done.returncode == 2
    assert "is not installed" in done.stderr
    assert f"pip install 'embedstream[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
