"""Every block of the README, run as it stands, in a folder with a small corpus; what needs other machines is parsed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
from reference_page import commands

import embedstream.testing
from e2e.harness import BIN, environment, read_manifest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [README, *(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(
    r"(<!-- not run by the tests: [^>]+-->\n)?^```(\w*)\n(.*?)^```$(?:\n```text\n(.*?)^```$)?", re.M | re.S
)
BLOCKS = [(language, block, shown) for skip, language, block, shown in BLOCK.findall(README) if not skip]
URL = "redis://host:6379/0"

DOCSTRINGS = {
    "datetime.date.isoformat": "Return the date formatted according to ISO.",
    "datetime.datetime.strptime": "A new datetime parsed from a string: parse a date and a time.",
    "gzip.open": "Open a gzip-compressed file in binary or text mode.",
    "threading.Thread.join": "Wait until the thread terminates. " * 100,
}


def blocks_with(language: str, word: str) -> list[str]:
    return [block for found, block, _ in BLOCKS if found == language and word in block]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    lines = [json.dumps({"id": id, "text": text}) + "\n" for id, text in DOCSTRINGS.items()]
    (folder / "corpus.jsonl").write_text("".join(lines))
    return folder


def shell(block: str, folder: Path, **extra: str) -> str:
    """Standard output of a block of shell commands, each of which must succeed; what it left running is ended."""
    env = environment(EMBEDSTREAM_NO_WARMUP="1", PATH=f"{BIN}:{os.environ['PATH']}", **extra)
    script = f"trap 'kill $(jobs -p) 2> /dev/null || :; wait' EXIT; set -e\n{block}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def labels(output: str) -> list[str]:
    """How each line begins."""
    return [re.sub(r"[\d.]+", "0", line.split(" ")[0]) for line in output.splitlines() if not line.startswith(" ")]


def test_a_corpus_is_embedded_verified_searched_and_read_as_shown(folder: Path) -> None:
    shown = [(block, output) for language, block, output in BLOCKS if language == "sh" and output]
    assert [block.split()[1] for block, _ in shown] == ["submit", "verify", "search"]
    for block, output in shown:
        assert labels(shell(block, folder)) == labels(output)
    (reading,) = blocks_with("python", "open_dataset")
    done = subprocess.run([sys.executable, "-c", reading], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() in DOCSTRINGS, done.stderr
    changed = (folder / "corpus.jsonl").read_text().replace("gzip-compressed", "compressed")
    (folder / "changed.jsonl").write_text(changed)
    said = shell("embedstream verify corpus.jsonl.vectors --corpus changed.jsonl || test $? = 1", folder)
    assert "changed.jsonl:3" in said, "the line that was changed is not named"


def test_a_fleet_is_started_and_verified(folder: Path, redis_url: str) -> None:
    (block,) = blocks_with("sh", "embedstream worker")
    server, block = block.split("\n", 1)
    assert server.startswith("redis-server ")
    shell(block.replace(URL, redis_url).replace("/data", f"{folder}/data"), folder, EMBEDSTREAM_MODEL="hashing")
    assert read_manifest(folder / "data" / "corpus")["rows"] == len(DOCSTRINGS)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with embedstream.testing.fleet(folder) as url:
        yield url


def test_python_submits_reads_and_embeds(folder: Path, url: str) -> None:
    (block,) = blocks_with("python", URL)
    block = block.replace(URL, url).replace("/data", f"{folder}/python")
    done = subprocess.run(
        [sys.executable, "-c", block],
        env=environment(EMBEDSTREAM_MODEL="hashing"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["2 rows", "2", "(1, 384)"], done.stderr


def test_a_program_of_ones_own_is_tested(tmp_path: Path) -> None:
    (block,) = blocks_with("python", "embedstream.testing")
    (tmp_path / "test_mine.py").write_text(block)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_blocks_are_run_or_marked() -> None:
    assert [language for language, _, _ in BLOCKS] == ["text", "sh", "sh", "sh", "python", "sh", "python", "python"]


@pytest.mark.parametrize("number", range(len(PAGES)))
def test_shell_blocks_of_every_page_can_be_parsed(number: int) -> None:
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGES[number], re.M | re.S):
        done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", range(len(PAGES)))
def test_flags_in_shell_blocks_are_those_of_their_commands(number: int) -> None:
    known = {name: {opt for param in command.params for opt in param.opts} for name, command in commands().items()}
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGES[number], re.M | re.S):
        for name, rest in re.findall(
            r"(?:embed-|embedstream )(submit|status|verify|worker|coordinator|compact|search)\b(.*)", block
        ):
            used = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest.partition(" #")[0].partition(" && ")[0]))
            assert used <= known[f"embed-{name}"], rest


def test_a_command_of_the_readme_names_all_that_it_must_be_given() -> None:
    shown = "".join(block for language, block, _ in BLOCKS if language == "sh")
    for name, rest in re.findall(r"^embedstream (\w+)(.*)", shown, re.M):
        command = commands()[f"embed-{name}"]
        needed = {param.opts[0] for param in command.params if isinstance(param, click.Option) and param.required}
        assert needed <= set(rest.split()), f"embedstream {name}{rest}"


def headings(page: str) -> set[str]:
    """The anchors of a page, as they are made of its headings."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_to_files_and_headings_that_are_there(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.M):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = path.parent / parts.path if parts.path else path
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in headings(target.read_text("utf-8")), link


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) < 160


def test_the_extras_that_are_installed_exist() -> None:
    extras = set(re.findall(r"'\.\[([\w,]+)\]'", README + "".join(PAGES)))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for extra in ",".join(extras).split(","):
        assert re.search(rf"^{extra} = \[", project, re.M), extra
    assert (ROOT / "constraints.txt").exists()
