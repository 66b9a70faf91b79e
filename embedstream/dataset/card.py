"""The dataset card: what a dataset is and how it was made, for people. Made of the manifest alone."""

from __future__ import annotations

import datetime
import json
import re
import shlex
from collections.abc import Iterable, Iterator

from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.objects import is_object, parse_object
from embedstream.jobs import RUN_FIELDS, JobSpec, queue_name
from embedstream.masking import mask_text
from embedstream.outputs import Output
from embedstream.records import Manifest
from embedstream.terminal import counted, printable, printable_lines

CARD = "_README.md"
"""Readers of a folder of Parquet stop at a `README.md`, and pass over what begins with `_`."""

MARK = "---\n# Written by embedstream from _manifest.json. Remove this line, and what you write here stays.\n"

MOST_PARTS = 20
"""Of the corpus, that are named."""

_LONGEST = 300
"""Characters of a name or prompt that are shown."""

_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


def is_card(data: bytes) -> bool:
    """Whether a file is a card that may be replaced: no user has made it theirs."""
    return data.startswith(MARK.encode())


def render_card(manifest: Manifest) -> str:
    """The card in Markdown, with the front matter that the Hugging Face hub reads. Equal for equal manifests, and for
    the manifest of merged shards. No credentials are in it."""
    spec = manifest_spec(manifest)
    name = printable(_place(spec).rstrip("/").rpartition("/")[2], _LONGEST)
    sections = [
        _front_matter(name, manifest),
        f"# {_text(name)}\n",
        f"{counted(manifest.rows, 'row')} made by embedstream.{_missing(manifest)}\n",
        _table(["what", "value"], _facts(manifest, spec)),
        "## Columns of results\n",
        _table(["column", "kind", "numbers", "dimensions", "length 1"], map(_column, manifest.outputs)),
        "## Corpus\n",
        _table(["part", "rows", "failed", "SHA-256"], _parts(manifest)),
        "## How to read it\n",
        *_recipes(spec, manifest),
        *_command(spec),
    ]
    return mask_text("\n".join(sections))


def _front_matter(name: str, manifest: Manifest) -> str:
    return (
        f"{MARK}pretty_name: {json.dumps(name, ensure_ascii=False)}\ntags:\n- embeddings\n- embedstream\n"
        f"size_categories:\n- {_size(manifest.rows)}\n"
        'configs:\n- config_name: default\n  data_files: "*.parquet"\n---\n'
    )


def _size(rows: int) -> str:
    """As the hub sorts datasets."""
    bounds = [10 ** (3 + n) for n in range(len(_SIZES))]
    at = sum(rows >= bound for bound in bounds)
    if not at:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if at == len(bounds) else f"{_SIZES[at - 1]}<n<{_SIZES[at]}"


def _missing(manifest: Manifest) -> str:
    return f" **Its job was {manifest.state}: rows are missing.**" if manifest.partial else ""


def _facts(manifest: Manifest, spec: JobSpec) -> Iterator[tuple[str, str]]:
    recipes = manifest.recipes
    yield "model", _code(spec.model)
    yield "revision", _codes(recipe.revision or "" for recipe in recipes) or _code(spec.revision or "")
    yield "fingerprint of its files", _codes(recipe.fingerprint for recipe in recipes)
    yield "engine", _codes(f"{recipe.engine} in {recipe.dtype}" for recipe in recipes)
    yield "pooling", _codes(recipe.pooling for recipe in recipes)
    yield "longest text, in tokens", _codes(str(recipe.max_length) for recipe in recipes)
    yield (
        "prompt in front of each text",
        _code(json.dumps(manifest.prompt, ensure_ascii=False)) if manifest.prompt else "",
    )
    yield "space: equal where vectors can be compared", _code(manifest.space)
    yield "rows", f"{manifest.rows:,}"
    yield "rows that failed, in `_errors.jsonl`", f"{manifest.failed:,}"
    yield "rows left out as empty", f"{manifest.skipped:,}"
    yield "texts that were cut", f"{manifest.truncated:,}"
    yield "tokens", f"{manifest.tokens:,}"
    yield "finished", f"{datetime.datetime.fromtimestamp(manifest.ended, datetime.UTC):%Y-%m-%d %H:%M} UTC"
    yield "job", f"{_code(manifest.job)}, {manifest.state}"


def _column(output: Output) -> tuple[str, ...]:
    kinds = {"sparse": "tokens", "labels": "labels"}
    size = f"{output.dim:,} {kinds.get(output.kind, '')}".rstrip()
    return _codes(output.columns), output.kind, output.dtype, size, "yes" if output.normalized else ""


def _parts(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    for part in manifest.parts[:MOST_PARTS]:
        yield _code(part.name), f"{part.rows:,}", f"{part.failed:,}", _code(part.sha256 or "")
    if len(manifest.parts) > MOST_PARTS:
        yield f"and {len(manifest.parts) - MOST_PARTS:,} more, in `_manifest.json`", "", "", ""


def _recipes(spec: JobSpec, manifest: Manifest) -> Iterator[str]:
    place = _place(spec)
    opened = spec.output if is_object(spec.output) else place
    partial = ", partial=True" if manifest.partial else ""
    yield _fenced("python", f"import embedstream\n\ndataset = embedstream.open_dataset({opened!r}{partial})\n")
    if manifest.partial:
        return
    files = f"{place}/*.parquet"
    yield _fenced("python", f"import polars as pl\n\nframe = pl.scan_parquet({files!r})\n")
    quoted = files.replace("'", "''")
    yield _fenced("sql", f"SELECT * FROM '{printable(quoted)}' LIMIT 5;  -- DuckDB\n")


def _command(spec: JobSpec) -> Iterator[str]:
    if "records" not in spec.parts:  # of a program
        yield "## How it was made\n"
        yield _fenced("sh", f"{printable_lines(shlex.join(submit_command(spec)))}\n")


def submit_command(spec: JobSpec) -> list[str]:
    """The words of an `embed-submit` that makes a job of this spec; of many parts the first ones."""
    parts = spec.parts[:MOST_PARTS]
    words = ["embed-submit", *(parts[2:] if spec.run else parts), "-o", spec.output, "--model", spec.model]
    if spec.run:
        words += ["--run", spec.parts[0], "--queries", spec.parts[1]]
    if spec.queue != queue_name(spec.model):
        words += ["--queue", spec.queue]
    default = JobSpec(queue="", output="", model="", parts=())
    for field in _PLAIN:
        value = getattr(spec, field)
        if value != getattr(default, field) and not (spec.run and field == "query_field"):
            flag = f"--{field.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    for output in spec.outputs:
        words += ["--emit", str(output)]
    for field in spec.kept[: -len(RUN_FIELDS)] if spec.run else spec.kept:
        words += ["--keep", field]
    if not spec.text:
        words += ["--no-text"]
    if cut := spec.chunking:
        words += ["--chunk-tokens", str(cut.tokens)] if cut.tokens else ["--on-long", "chunk"]
        words += ["--chunk-overlap", str(cut.overlap)] if cut.overlap else []
        words += ["--chunk-by", cut.by] if cut.by != type(cut)(tokens=0).by else []
        words += ["--chunk-format", cut.format.replace("\n", "\\n")] if cut.format else []
    return words


_PLAIN = (
    "revision",
    "task",
    "role",
    "format",
    "id_field",
    "number_rows",
    "text_field",
    "title_field",
    "title_sep",
    "query_field",
    "empty",
    "prompt",
    "prompt_name",
    "max_length",
    "on_long",
)
"""Settings with a flag of their own name."""


def _place(spec: JobSpec) -> str:
    """Where its files are, as a reader calls it: an address without settings, or a folder's own name."""
    if is_object(spec.output):
        return f"s3://{parse_object(spec.output, 'output').path}"
    return spec.output.rpartition("/")[2] or "."


def _table(head: list[str], rows: Iterable[tuple[str, ...]]) -> str:
    """In Markdown; facts without a value are left out."""
    lines = [head, ["---"] * len(head), *(row for row in rows if len(row) > 2 or row[1])]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _codes(texts: Iterable[str]) -> str:
    """Each once, in order."""
    return ", ".join(_code(text) for text in dict.fromkeys(texts) if text)


def _code(text: str) -> str:
    """A text as code within a table, whatever it holds."""
    if not text:
        return ""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    blank = " " if len(fence) > 1 else ""
    return f"{fence}{blank}{printable(text, _LONGEST)}{blank}{fence}".replace("|", "\\|")


def _text(text: str) -> str:
    """A text that is no Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~])", r"\\\1", text)


def _fenced(language: str, code: str) -> str:
    fence = "`" * max(3, max(map(len, re.findall("`+", code)), default=0) + 1)
    return f"{fence}{language}\n{code}{fence}\n"
