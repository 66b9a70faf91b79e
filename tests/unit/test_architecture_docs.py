"""`docs/architecture.md` names folders, files and functions that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
HOPS = re.findall(r"^\| (\d+) \| `([\w.]+)` \| `([\w/.]+)` \|", PAGE, re.MULTILINE)


def functions(path: Path) -> set[str]:
    """Functions of a file, and methods as `Class.method`."""
    tree = ast.parse(path.read_text("utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_hop_is_a_function_of_its_file() -> None:
    assert [int(number) for number, _, _ in HOPS] == list(range(1, len(HOPS) + 1))
    assert 20 <= len(HOPS) <= 24
    for _, name, path in HOPS:
        assert name in functions(ROOT / path), f"{path} has no {name}"


def test_every_folder_of_code_is_named() -> None:
    table = PAGE.partition("## Where things are")[2].partition("## Promises")[0]
    named = set(re.findall(r"`([\w/]+)/`", table))
    for name in named:
        assert (ROOT / name).is_dir(), name
    packages = {"embedstream", *(f"{part}/embedstream_{part}" for part in ("producer", "worker", "coordinator"))}
    for package in packages:
        below = {path.parent.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        assert {path.as_posix() for path in below} <= named


def test_every_file_of_the_steps_is_there() -> None:
    steps = PAGE.partition("in ten steps")[2].partition("### In hops")[0]
    assert len(re.findall(r"^\d+\. ", steps, re.MULTILINE)) == 10
    names = {path.name for folder in ("embedstream", "producer", "worker") for path in (ROOT / folder).rglob("*.*")}
    for file in re.findall(r"`[\w/…]*?([\w]+\.(?:py|lua))`", steps):
        assert file in names, file
