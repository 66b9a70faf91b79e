"""The tests marked `holds` say which promise of the architecture page, or which fault of others, each of them holds."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"


@functools.cache
def marked() -> dict[str, list[str]]:
    """What is held, and by which tests."""
    found = defaultdict(list)
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.holds":
                        for what in mark.args:
                            found[ast.literal_eval(what)].append(f"{path.name}::{node.name}")
    return found


def promised() -> list[str]:
    promises = (DOCS / "architecture.md").read_text("utf-8").partition("## Promises")[2]
    return re.findall(r"^\d+\. \*([A-Za-z ]+?)\.?\*", promises, re.MULTILINE)


def faults() -> list[str]:
    table = (DOCS / "internals.md").read_text("utf-8").partition("## Faults of others")[2]
    return re.findall(r"^\| ([\w-]+#\d+) \|", table, re.MULTILINE)


def test_every_promise_and_every_fault_of_others_is_held_by_a_test_and_no_test_holds_anything_else() -> None:
    assert len(promised()) == 8
    assert len(faults()) > 15
    assert set(marked()) == {*promised(), *faults()}


@pytest.mark.parametrize("promise", promised())
def test_more_than_one_test_holds_a_promise(promise: str) -> None:
    assert len(marked()[promise]) > 1
