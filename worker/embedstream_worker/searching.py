"""Brute force over a dataset, the query embedded as the dataset was."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

import click
import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from embedstream.api.search import KEPT_BYTES, Searchable
from embedstream.dataset.values import Matrix, Ragged, Values
from embedstream.errors import ModelError, OutputError
from embedstream.jobs import JobSpec, model_address, model_folder
from embedstream.masking import mask
from embedstream.outputs import Kind
from embedstream_worker import known_models
from embedstream_worker.engines import HASHING_MODEL, EngineOptions, load_engine
from embedstream_worker.engines.base import Engine, OwnQueries, Results, TokenBatch
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.families import missing
from embedstream_worker.jobs import space_id
from embedstream_worker.model_folder import NOTHING, Trust
from embedstream_worker.models import is_carried, resolve_model
from embedstream_worker.purpose import has_heads
from embedstream_worker.tokenizing import encode_each

INDENT = 7

TEXT_WIDTH = 200
"""Characters of a text that are shown."""


def show_nearest(
    output: str,
    query: str,
    k: int,
    model: str | None = None,
    trust: Trust = NOTHING,
    prompt: str | None = None,
    redis_url: str | None = None,
    by: Kind | None = None,
) -> None:
    """Print the `k` chunks of the dataset in `output` that are nearest to the query.

    `model`: as the user names it, where the dataset's own name for it does not do. `prompt`: in front of the query; if
    None, the model's own. `redis_url`: the server that an output `redis:?prefix=docs:` means. `by`: as `Searchable` has
    it.

    Raises:
        UsageError: an output that cannot be used, or that needs `redis_url`; or nothing in it can be searched.
        OutputError: no finished dataset lies there, or it is empty.
        ModelError: as `QueryModel`.
    """
    dataset = _opened(output, redis_url, by)
    _show(dataset, QueryModel(dataset, model, trust).embed(query, prompt), k)


def show_each(
    output: str,
    queries: Iterable[str],
    k: int,
    model: str | None = None,
    trust: Trust = NOTHING,
    prompt: str | None = None,
    redis_url: str | None = None,
    by: Kind | None = None,
) -> int:
    """As `show_nearest`, for one query after the other, each as soon as it is there: below the query, and with an empty
    line behind. The model is loaded once, and rows stay in memory while they have no more than `KEPT_BYTES`.

    Queries that cannot be embedded are said on standard error, with their number from 1; answers how many. Blank ones
    are passed over.
    """
    dataset = _opened(output, redis_url, by, KEPT_BYTES)
    loaded, failed = QueryModel(dataset, model, trust), 0
    for number, query in enumerate(map(str.strip, queries), 1):
        if not query:
            continue
        try:
            results = loaded.embed(query, prompt)
        except ModelError as error:
            click.echo(f"Error: query {number}: {error}", err=True)
            failed += 1
            continue
        click.echo(printable(query))
        _show(dataset, results, k)
        click.echo()
    return failed


def _opened(output: str, redis_url: str | None, by: Kind | None, keep_bytes: int = 0) -> Searchable:
    """Raises as `Searchable`; `OutputError` for an empty one, too."""
    dataset = Searchable(output, redis_url, by, keep_bytes)
    if not dataset.manifest.rows:
        raise OutputError(f"{mask(output)}: the dataset is empty")
    return dataset


def _show(dataset: Searchable, results: Results, k: int) -> None:
    spec, console = dataset.spec, Console(highlight=False)
    digits = 3 if len(results) == 1 else 4  # fused scores are small
    for hit in dataset.search(results, k):
        piece = "" if spec.chunking is None or hit.chunk is None else f" chunk {hit.chunk}"
        click.echo(f"{hit.score:.{digits}f}  {printable(hit.id)}{piece}")
        if hit.text is not None:
            # Where titles are the ids, the text begins with what the line above says.
            show_text(printable(hit.text.removeprefix(hit.id + spec.title_sep)), console)


def show_text(text: str, console: Console) -> None:
    """Below its id, indented: on a terminal as a paragraph of its width, elsewhere as one line."""
    if console.is_terminal:
        console.print(Padding(Text(text), (0, 0, 0, INDENT)))
    else:
        click.echo(" " * INDENT + text)


class QueryModel:
    """A dataset's own model, loaded for queries."""

    def __init__(self, dataset: Searchable, model: str | None = None, trust: Trust = NOTHING) -> None:
        """`model`: as the user names it.

        Raises:
            ModelError: the model may not be loaded, or is not the one that made the dataset.
        """
        manifest, spec = dataset.manifest, dataset.spec
        self._kinds = kinds = [output.kind for output in dataset.outputs]
        name = "hashing" if manifest.engines == ("hashing",) else "auto"
        dtype: Dtype = "int8" if any(shard.dtype == "int8" for shard in manifest.shards) else "auto"
        if not set(kinds) <= {"dense"}:  # other kinds' queries go the libraries' own way, which is in torch
            name, dtype = "torch", "float32"
        chosen, revision = (HASHING_MODEL, None) if name == "hashing" else _choose(spec, model, trust)
        self._engine = load_engine(EngineOptions(chosen, revision, name, dtype=dtype, trust=trust))
        info = self._engine.info
        self._max_length = spec.max_length or info.max_length
        if not set(kinds) <= set(info.outputs) and not trust.pickle:
            raise ModelError(
                f"{model or spec.model} gives {', '.join(info.outputs)} alone, the dataset has {', '.join(kinds)}: if "
                f"some of its weights are pickles and you trust its authors, give --allow-pickle"
            )
        space = space_id(info, spec, manifest.prompt, self._max_length)
        if space != manifest.space or not set(kinds) <= set(info.outputs):
            raise ModelError(
                f"{model or spec.model} is not the model that made this dataset ({spec.model}, as it was then): its "
                f"vectors cannot be compared; give that model with --model"
            )
        if model is not None:
            known_models.remember(model_address(model), info.fingerprint)
        self._warning = missing(info, "query")

    def embed(self, query: str, prompt: str | None = None) -> Results:
        """What the model gives for a query in that role: the kinds that are compared, if they say something.

        `prompt`: in front of the query; if None, the model's own. Raises `ModelError`: it gives nothing.
        """
        engine = self._engine
        if isinstance(engine, OwnQueries):
            results = engine.query(query, prompt)
        else:
            given, prompt = prompt, engine.prompt("query", prompt, None)
            if given is None and not prompt and self._warning:
                click.echo(self._warning, err=True)
                self._warning = ""  # once is enough
            results = _run(engine, prompt, query, self._max_length)
        numbers = {kind: _numbers(results[kind]) for kind in self._kinds}
        if not all(np.isfinite(found).all() for found in numbers.values()):
            raise ModelError("the query cannot be compared: the model gave NaN or infinity")
        telling = {kind: results[kind] for kind, found in numbers.items() if found.any()}
        if not telling:
            what = "a vector of zeros" if self._kinds == ["dense"] else "nothing but zeros"
            raise ModelError(f"the query cannot be compared: the model gave {what}, it knows no part of the text")
        return cast("Results", telling)


def _run(engine: Engine, prompt: str, query: str, max_length: int) -> Results:
    """Raises `ModelError` for a query that the tokenizer cannot bear."""
    tokenizer = engine.tokenizer()
    tokens, errors = encode_each(tokenizer, [prompt + query], max_length)
    if errors:
        raise ModelError(f"the query cannot be embedded: {': '.join(errors[0])}")
    prompt_length = tokenizer.prompt_length(prompt, max_length) if prompt else 0
    return engine.run(TokenBatch(tokens.ids, tokens.offsets, len(tokens.ids), prompt_length, "query"))


def _numbers(values: Values) -> Matrix:
    return values.values if isinstance(values, Ragged) else values


def _choose(spec: JobSpec, model: str | None, trust: Trust) -> tuple[str, str | None]:
    """Name and revision of the model to load: a dataset may come from anybody, and loading a model is no small matter.

    So it is the one that the user names, or one that was loaded for this user before by the name in the dataset, with
    the same content, or that an installed package carries. The hub is not asked for a name out of a dataset.

    Raises:
        ModelError: there is none.
    """
    if model is not None:
        return model, spec.revision if model == spec.model else None
    if spec.model == HASHING_MODEL or (spec.revision is None and is_carried(spec.model)):
        return spec.model, None
    before = known_models.fingerprints(spec.model)
    if not before:
        raise ModelError(
            f"the dataset's model {spec.model} was never used by you on this machine, and is not loaded because a "
            f"dataset names it: give it, or the folder where it lies, with --model"
        )
    place = model_folder(spec.model)
    if place is not None and not place.is_dir():
        raise ModelError(f"the dataset's model {spec.model} is no longer there: say with --model where it lies now")
    folder = resolve_model(spec.model, spec.revision, trust, offline=True)
    fingerprint = folder.fingerprint()
    if not any(known.startswith(fingerprint) for known in before):  # int8 adds to it
        raise ModelError(
            f"the dataset's model {spec.model} has changed since you used it: look at it, and give it with --model"
            + (", and with --allow-pickle if you did so then" if has_heads(folder.path) and not trust.pickle else "")
        )
    return str(folder.path), None


def printable(text: str) -> str:
    """One line of visible characters, cut at `TEXT_WIDTH`."""
    line = "".join(c if c.isprintable() else " " for c in re.sub(r"\s+", " ", text[: 4 * TEXT_WIDTH])).strip()
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"
