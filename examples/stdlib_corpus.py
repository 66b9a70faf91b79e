"""A corpus that every Python carries: the docstrings of its standard library, as JSON lines.

    python examples/stdlib_corpus.py corpus.jsonl              # about 2,900 records
    python examples/stdlib_corpus.py corpus.jsonl --all        # about 8,500

Each record is `{"id": "json.dumps", "title": "json.dumps", "text": "Serialize ``obj`` to …"}`. The same Python
gives the same file.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}

SPECIALIST = {"idlelib", "lib2to3", "distutils", "turtledemo", "turtle", "tkinter", "encodings", "pydoc_data", "msilib"}
"""Left out of the short corpus: many docstrings that answer few people's questions."""

SHORT_TEXT = 60
"""Characters. The short corpus leaves out shorter texts, such as "Return the name."."""


def find_docstrings(library: Path, everything: bool) -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of all that has one, in the order of file names and lines."""
    for file in sorted(library.rglob("*.py")):
        names = file.relative_to(library).with_suffix("").parts
        if NOT_THE_LIBRARY.intersection(names) or (not everything and names[0] in SPECIALIST):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            try:
                tree = ast.parse(file.read_bytes())
            except SyntaxError:
                continue
        module = ".".join(name for name in names if name != "__init__")
        module = module.removeprefix("_py")  # _pydatetime holds the docstrings of datetime
        yield from walk(tree, module)


def walk(node: ast.Module | Definition, name: str) -> Iterator[tuple[str, str]]:
    """The docstring of a definition, then those of the definitions in it; inner functions are left out."""
    text = ast.get_docstring(node)
    if text and text.strip():
        yield name, inspect.cleandoc(text)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in definitions(node):
            yield from walk(child, f"{name}.{child.name}")


def definitions(node: ast.AST) -> Iterator[Definition]:
    """Definitions right below a node, also those behind `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from definitions(child)


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def build(library: Path, everything: bool) -> Iterator[dict[str, str]]:
    """The records, each id once."""
    seen: set[str] = set()
    for name, text in find_docstrings(library, everything):
        wanted = everything or (is_public(name) and len(text) >= SHORT_TEXT)
        if wanted and name not in seen:
            seen.add(name)
            yield {"id": name, "title": name, "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the standard library's docstrings as JSON lines.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--all", action="store_true", help="private names, short texts and specialist packages too")
    chosen = parser.parse_args()
    records = list(build(Path(sysconfig.get_path("stdlib")), chosen.all))
    chosen.file.parent.mkdir(parents=True, exist_ok=True)
    with chosen.file.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    print(f"{chosen.file}: {len(records):,} records")


if __name__ == "__main__":
    main()
