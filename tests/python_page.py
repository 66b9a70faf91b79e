"""`python tests/python_page.py > docs/python.md` makes that page of the Python API from signatures and docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from reference_page import field_docs, table

import embedstream
import embedstream.testing
from embedstream import errors
from embedstream.api.embeddings import SparseVector
from embedstream.dataset.schema import ErrorRow
from embedstream.jobs import Chunking, JobSpec, JobState, JobStatus
from embedstream.lifecycle.opening import SpecSettings

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
WIDTH = 120

INTRODUCTION = """\
# Python API

A `Client` submits records as jobs, follows them, reads their vectors, and embeds a few texts at once. With the URL of a
fleet's Redis `pip install .` without extras is enough, as the models run in the workers. Without one it works on this
machine alone, as `embed-submit` does, and needs `pip install '.[local]'`. `open_dataset` needs neither.

## Examples

On one machine, without a server of your own; the first use of a model starts a worker, which takes some seconds:

```python
import embedstream

with embedstream.Client() as client:
    job = client.submit(["one text", "another", "a third"], output="three.vectors")
    print(job.wait().rows, "rows")
    print(client.embed("a question").shape)

print(embedstream.open_dataset("three.vectors").head(1, columns=["id", "text"]).to_pylist())
```

With a fleet: submit records as a stream, wait, and read the vectors:

```python
import embedstream

client = embedstream.Client("redis://host:6379/0")
records = ({"id": f"doc-{n}", "text": f"text number {n}", "year": 2000 + n} for n in range(1000))
job = client.submit(records, output="/data/numbers", keep=["year:int64"])
status = job.wait(progress=lambda status: print(status.rows, "rows so far"))
print(status.state, status.rows, "rows,", status.failed, "failed")

for batch in job.results(["id", "year", "embedding"]):  # pyarrow.RecordBatch, shard by shard
    print(batch.num_rows, batch.schema.field("embedding").type)
```

A table is read by the column: of pyarrow, pandas or polars, or anything else with Arrow's interface. The same records
into the same output again go on with an unfinished job, and do nothing for a finished one:

```python
import pyarrow as pa

import embedstream

table = pa.table({"id": ["a", "b", "c"], "text": ["one text", "another", ""], "score": [0.5, 0.25, 0.125]})
with embedstream.Client("redis://host:6379/0") as client:
    job = client.submit(table, output="/data/table", keep=["score"])
    print(job.wait().rows, "rows")
    for error in job.errors():
        print(error.line, error.id, error.code, error.message)
```

Errors say what is wrong, where, and what to do. All are `EmbedstreamError`s:

```python
import embedstream

client = embedstream.Client("redis://host:6379/0")
try:
    client.submit(["a text"], output="/data/failing", prompt="passage: ", prompt_name="document")
except embedstream.UsageError as error:
    print(error)
```

What else a model gives for a few texts is asked for by `outputs`, as `--emit` takes them: other dtypes and sizes of
dense vectors, and weights of tokens or a vector for each token where the model has them:

```python
import embedstream

with embedstream.Client("redis://host:6379/0") as client:
    found = client.embed(["a question", "another"], outputs=["dense=half:float16", "dense=bits:ubinary:64"])
    for name, rows in found.items():
        print(name, rows.shape, rows.dtype)
```

With asyncio, for example in a web server; `embed` then takes some milliseconds and blocks no thread:

```python
import asyncio

from embedstream import AsyncClient


async def main() -> None:
    async with AsyncClient("redis://host:6379/0") as client:
        vectors = await client.embed(["a question", "another"])
        print(vectors.shape, vectors.dtype)


asyncio.run(main())
```

"""

EXPLAINED = {"submit": "`settings`: [those of the job](#settings-of-a-job), as the flags of `embed-submit`."}
"""What a method's docstring leaves to the types."""

INTERNAL = {"check", "push", "make_spec", "queue_of", "unanswered", "look"}
"""Public between our own modules alone."""


def page() -> str:
    """The whole page."""
    note = "Made from the code by `python tests/python_page.py`; a test compares.\n\n"
    sections = [
        _class(embedstream.Client),
        _settings(),
        _class(embedstream.Job),
        _states(),
        _struct("JobStatus", JobStatus),
        _struct("ErrorRow", ErrorRow),
        _struct("SparseVector", SparseVector),
        _class(embedstream.AsyncClient),
        _class(embedstream.AsyncJob),
        f"## Reading a dataset\n\n{_function('open_dataset', embedstream.open_dataset)}"
        "[Recipes](reading.md) for pandas, NumPy, Polars, DuckDB and other libraries.\n\n",
        _errors(),
        _testing(),
    ]
    return (INTRODUCTION + note + "".join(sections)).rstrip() + "\n"


def _class(kind: type) -> str:
    """A class, how it is made, and its public methods and properties in the order of the source."""
    parts = [f"## {kind.__name__}\n\n{_prose(inspect.getdoc(kind) or '')}"]
    if kind.__name__.endswith("Client"):  # the others are made by it
        parts.append(_function(kind.__name__, vars(kind)["__init__"]))
    for name, member in vars(kind).items():
        if not name.startswith("_") and name not in INTERNAL and inspect.isfunction(member):
            parts.append(f"### {kind.__name__}.{name}\n\n{_function(name, member)}")
    return "".join(parts)


def _function(name: str, function: Any) -> str:
    docs = _prose(inspect.getdoc(function) or "", EXPLAINED.get(name, ""))
    return f"```python\n{_signature(name, function)}\n```\n\n{docs}"


def _signature(name: str, function: Any) -> str:
    """As it is called: without `self`, on lines of their own if one is too long."""
    whole = inspect.unwrap(function)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(whole))).body
    assert isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef)
    word = "" if name[0].isupper() else "async def " if inspect.iscoroutinefunction(whole) else "def "
    returns = "None" if tree.returns is None else ast.unparse(tree.returns)
    if whole is not function:  # a context manager
        returns = f"AbstractContextManager[{returns.removeprefix('Iterator[')}"
    arrow = f" -> {returns}" if word else ""
    words, starred = [], False
    for each in inspect.signature(whole).parameters.values():
        if each.kind is each.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        if each.name != "self":
            words.append(_parameter(each))
    line = f"{word}{name}({', '.join(words)}){arrow}"
    if len(line) <= WIDTH:
        return line
    return f"{word}{name}(\n" + "".join(f"    {each},\n" for each in words) + f"){arrow}"


def _parameter(each: inspect.Parameter) -> str:
    default = "" if each.default is each.empty else f" = {each.default!r}".replace("'", '"')
    return f"{'**' if each.kind is each.VAR_KEYWORD else ''}{each.name}: {each.annotation}{default}"


def _prose(text: str, more: str = "") -> str:
    """A docstring as Markdown: paragraphs, indented code, and what is raised as a list."""
    described, _, raised = text.partition("\nRaises:\n")
    described, inline, last = described.partition(" Raises ") if not raised else (described, "", "")
    shown = []
    for paragraph in [*re.split(r"\n\s*\n", described.strip()), *([more] if more else [])]:
        if paragraph.startswith("    "):
            shown.append(f"```python\n{textwrap.dedent(paragraph)}\n```")
        elif paragraph:
            shown.append(textwrap.fill(" ".join(paragraph.split()), WIDTH, break_long_words=False))
    if inline:
        shown.append(textwrap.fill(f"Raises {' '.join(last.split())}", WIDTH))
    if raised:
        items = re.split(r"\n(?=\S)", textwrap.dedent(raised).strip())
        named = (" ".join(item.split()).partition(": ") for item in items)
        listed = [f"`{names.replace(', ', '`, `')}`: {when}" for names, _, when in named]
        filled = (textwrap.fill(f"- {each}", WIDTH, subsequent_indent="  ") for each in listed)
        shown.append("Raises:\n\n" + "\n".join(filled))
    return "\n\n".join(shown) + "\n\n" if shown else ""


def _settings() -> str:
    docs, defaults = field_docs(JobSpec), dict(_defaults(JobSpec)) | {"chunk_tokens": None}
    defaults |= {f"chunk_{name}": default for name, default in _defaults(Chunking)}
    own = field_docs(SpecSettings)
    rows = [
        [f"`{name}`", f"`{kind}`", f"`{defaults[name]!r}`", own.get(name) or docs.get(name, OF_FLAGS.get(name, ""))]
        for name, kind in _annotations(SpecSettings)
    ]
    head = ["setting", "type", "default", "what"]
    return f"## Settings of a job\n\nKeyword arguments of `submit`.\n\n{table(head, rows)}\n"


OF_FLAGS = {
    "role": "Chooses the model's prompt.",
    "prompt": "Put in front of every text; None: the model's own for the role.",
    "prompt_name": "One of the model's prompts.",
    "id_field": "None: `_id`, `id`, `custom_id` or `docid`.",
    "text_field": "None: `text`, `content`, and the fields of well-known dumps.",
    "title_field": "Put in front of the text; None: `title`; an empty string: none.",
    "title_sep": "Between title and text.",
    "empty": "How to treat an empty text.",
    "task": "What the model does with a row: `auto`, `embed`, `rerank` or `classify`.",
}
"""Settings that the flags of embed-submit describe."""


def _struct(name: str, kind: type[Any]) -> str:
    docs = field_docs(kind)
    rows = [[f"`{field}`", f"`{type}`", docs.get(field, "")] for field, type in _annotations(kind)]
    members = [
        [f"`{field}`", f"`{inspect.signature(member.fget).return_annotation}`", inspect.getdoc(member) or ""]
        for field, member in vars(kind).items()
        if isinstance(member, property) and member.fget is not None
    ]
    return f"## {name}\n\n{_prose(inspect.getdoc(kind) or '')}{table(['field', 'type', 'what'], rows + members)}\n"


def _states() -> str:
    found = re.findall(r'^    [A-Z]+ = "(\w+)"  # (.+)$', inspect.getsource(JobState), re.MULTILINE)
    assert [value for value, _ in found] == [state.value for state in JobState]
    rows = [[f'`"{value}"`', f"{what[0].upper()}{what[1:]}."] for value, what in found]
    return f"## JobState\n\nA string of one of these values.\n\n{table(['value', 'when'], rows)}\n"


def _errors() -> str:
    def below(kind: type[errors.EmbedstreamError], depth: int = 0) -> Iterator[str]:
        public = kind.__name__ in embedstream.__all__
        what = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
        home = "" if public else " (`embedstream.errors`)"
        yield f"{'  ' * depth}- `{kind.__name__}`{home}: {what}\n"
        for each in sorted(kind.__subclasses__(), key=lambda each: each.__name__):
            if each.__module__ == errors.__name__:
                yield from below(each, depth + 1)

    return f"## Errors\n\n{''.join(below(errors.EmbedstreamError))}\n"


def _testing() -> str:
    docs = inspect.getdoc(embedstream.testing) or ""
    model = f"`embedstream.testing.MODEL` is `{embedstream.testing.MODEL!r}`.\n\n"
    return (
        f"## Testing your program\n\n{_prose(docs)}{model}### fleet\n\n{_function('fleet', embedstream.testing.fleet)}"
    )


def _annotations(kind: type) -> list[tuple[str, str]]:
    """Public fields with their types as they are written, in order."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    return [
        (each.target.id, ast.unparse(each.annotation))
        for each in tree.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]


def _defaults(kind: type[msgspec.Struct]) -> Iterator[tuple[str, object]]:
    for field in msgspec.structs.fields(kind):
        yield field.name, None if field.default is msgspec.NODEFAULT else field.default


if __name__ == "__main__":
    print(page(), end="")
