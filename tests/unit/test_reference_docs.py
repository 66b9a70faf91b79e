from __future__ import annotations

import re

import reference_page


def test_the_reference_is_what_the_commands_are() -> None:
    assert reference_page.PAGE.read_text("utf-8") == reference_page.page(), (
        "run `python tests/reference_page.py > docs/reference.md`"
    )


def test_every_variable_that_a_program_reads_is_in_the_reference() -> None:
    page = reference_page.page()
    read: set[str] = set()
    for package in ("embedstream", "producer", "worker", "coordinator"):
        for path in (reference_page.ROOT / package).rglob("*.py"):
            source = path.read_text("utf-8")
            read |= set(re.findall(r"EMBEDSTREAM_[A-Z][A-Z_]*[A-Z]", source))
            read |= set(re.findall(r"environ(?:\.get\(|\[)\"([A-Z_]+)\"", source))
    assert len(read) > 10
    set_for_libraries = {"TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF"}
    assert read - set(re.findall(r"[A-Z][A-Z0-9_]+", page)) == set_for_libraries
