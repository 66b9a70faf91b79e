"""The list of mutants fits the code: each can be applied, and the tests that it names are there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from crash.walks import walks
from mutants.catalogue import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_its_tests_are_there(mutant: Mutant, tmp_path: Path) -> None:
    for edit in mutant.edits:
        path = tmp_path / edit.path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((ROOT / edit.path).read_text())
        edit.apply(tmp_path)
    for test in mutant.tests:
        file, name = test.split("::")
        assert re.search(rf"^(async )?def {name.partition('[')[0]}\(", (ROOT / file).read_text(), re.MULTILINE), test
        if file.startswith("tests/crash/"):
            assert name.partition("[")[2].removesuffix("]") in {str(walk) for walk in walks()}, test


def test_each_mutant_has_a_name_of_its_own() -> None:
    assert [name for name, times in Counter(mutant.name for mutant in MUTANTS).items() if times > 1] == []
