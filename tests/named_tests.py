"""Tests named by others: `file.py::test_name`, below this folder."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).parent


def assert_there(what: str, addresses: Iterable[str]) -> None:
    """Each address leads to a test."""
    for address in addresses:
        file, _, name = address.partition("::")
        tree = ast.parse((TESTS / file).read_text("utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in names, f"{what}: {address} is gone: name the test that holds it now"
