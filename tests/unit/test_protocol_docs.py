"""`docs/protocol.md` names all that producers and workers say to each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from lab.broker import Lab, make_record, to_commit

from embedstream import keys
from embedstream.jobs import FORMAT_VERSION, JobSpec, JobState
from embedstream.keys import GROUP, RELEASED, Keys
from embedstream.queue.blocks import BASE_FIELDS, MAX_ROWS, Entry, Refusal
from embedstream.queue.steps import Code
from embedstream.records import BlockRun, Manifest, ManifestErrors, ManifestPart, ManifestShard

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text("utf-8")
SCRIPTS = sorted(
    path.stem for path in (ROOT / "embedstream" / "queue" / "scripts").glob("*.lua") if path.stem != "common"
)


def section(title: str) -> str:
    """What is said below a heading of the second level."""
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def first_cells(text: str) -> list[str]:
    """The names in the first column of a section's tables."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def every_key() -> set[str]:
    """One of each kind, with the page's placeholders for what differs."""
    own = Keys("QUEUE")
    arguments = {"worker": "NAME", "reply": "REQUEST", "caller": "REQUEST"}
    found = {keys.QUEUES, keys.COORDINATORS, keys.COMPACTIONS, keys.compaction("ID"), keys.coordinator("NAME")}
    for name, member in vars(Keys).items():
        if name.startswith("_") or name in ("queue", "prefix"):
            continue
        if isinstance(member, property):
            found.add(getattr(own, name))
        elif name in ("done", "sums"):
            found.add(getattr(own, name)("JOB", 0).removesuffix("0") + "PART")
        else:
            found.add(getattr(own, name)(arguments.get(name, "JOB")))
    return found


def test_the_page_names_every_key_and_no_other() -> None:
    named = {name for name in first_cells(section("Keys")) if name.startswith("embedstream:")}
    assert named == every_key()
    assert f"group `{GROUP}`" in PAGE
    assert f"consumer `{RELEASED}`" in PAGE


def test_the_page_names_every_field_of_a_jobs_hash_and_no_other() -> None:
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    lab = Lab(client)
    job = lab.sealed_job(1)
    (claimed,) = lab.broker.claim("worker", [job], 1, 0)
    record = make_record(job, "shard", [(0, 0)], range=1)
    assert lab.broker.run(lab.broker.commit(record, [to_commit(claimed)])).code is Code.COMMITTED
    assert lab.broker.run(lab.broker.take_finalize(job, 1000)) is not None
    cancelled = lab.create("/cancelled")
    lab.fill(cancelled, 1)
    assert lab.claim(cancelled)
    lab.broker.run(lab.broker.cancel(cancelled, grace_ms=1000))
    stored: list[Any] = [client.hgetall(lab.keys.job(each)) for each in (job, cancelled)]
    fields = {field.decode() for hashes in stored for field in hashes}
    named = {re.sub(r"(?<=:)[A-Z]+$", "", name) for name in first_cells(section("Keys").split("The job's hash:")[1])}
    assert {re.sub(r"(?<=:).+$", "", field) for field in fields} == named
    assert all(f"`{state}`" in section("Keys") for state in JobState)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_says_of_every_script_what_its_header_says(name: str) -> None:
    lines = (ROOT / "embedstream" / "queue" / "scripts" / f"{name}.lua").read_text("utf-8").splitlines()
    header = lines[: next(at for at, line in enumerate(lines) if not line.startswith("--"))]
    said = "\n".join(line.removeprefix("--").removeprefix(" ") for line in header)
    assert f"\n### {name}\n\n```\n{said}\n```\n" in PAGE, f"put the header of {name}.lua below its heading"


def test_the_page_explains_every_answer_and_no_other() -> None:
    assert first_cells(section("Steps")) == [code.value for code in Code]


def test_the_page_names_every_field_of_the_manifest() -> None:
    page = section("The manifest")
    assert set(first_cells(page)) == set(Manifest.__struct_fields__)
    _, parts, shards = page.rsplit("\n\nA ", 2)
    for said, fields in (
        (parts, ManifestPart.__struct_encode_fields__),
        (shards, ManifestShard.__struct_encode_fields__),
        (shards, ManifestErrors.__struct_encode_fields__),
    ):
        assert [field for field in fields if f"`{field}`" not in said] == []
    assert '{"part": 0, "first": 0, "last": 3}' in shards
    assert BlockRun.__struct_fields__ == ("part", "first", "last")


def test_the_page_has_the_fields_of_spec_and_block_in_their_order() -> None:
    assert tuple(first_cells(section("The spec"))) == JobSpec.__struct_fields__
    entry = Entry(
        part=0, block=0, rows=1, refused_rows=1, skipped=1, text_bytes=1, sum=b"", body=b"", refused=b""
    ).fields()
    assert first_cells(section("The block")) == [*entry, *(field.name for field in BASE_FIELDS)]
    assert ", ".join(f'"{name}"' for name in Refusal.__struct_fields__) in section("The block")
    assert f"at most {MAX_ROWS:,}" in section("The block")


def test_the_page_is_about_this_format_version() -> None:
    assert f"This page describes format version {FORMAT_VERSION}, the only one there is." in " ".join(PAGE.split())
