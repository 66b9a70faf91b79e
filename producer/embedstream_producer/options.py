"""What the command line of embed-submit says, and what of it goes together."""

from __future__ import annotations

import os
from dataclasses import dataclass

from embedstream.dataset.objects import is_object, parse_object
from embedstream.errors import UsageError
from embedstream.jobs import parse_max_errors
from embedstream.lifecycle.opening import SpecSettings
from embedstream_producer.expanding import STDIN, VECTORS
from embedstream_producer.hub import is_hub
from embedstream_producer.progress import ProgressFormat
from embedstream_producer.trees import split_pattern


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    corpus: tuple[str, ...]
    output: str | None
    redis_url: str | None
    queue: str | None
    model: str
    revision: str | None
    max_errors: str
    settings: SpecSettings
    retry_failed: bool = False
    update: bool = False
    """Bring the output up to date."""
    update_from: str | None = None
    """Take over what this dataset has, in a new output."""
    trust_unchanged: bool = False
    plan: bool = False
    plan_measure: bool = False
    run: str | None = None
    """A run in TREC's format, whose pairs are scored."""
    queries: str | None = None
    """The queries of the run."""
    worker: tuple[str, ...] = ()
    """Flags of embed-worker for the one that this command starts."""
    detach: bool = False
    server_side: bool = False
    json: bool = False
    quiet: bool = False
    progress: ProgressFormat = "auto"


def check_options(options: Options) -> None:
    """Raise `UsageError` for flags that exclude each other, or lack one that they need."""
    parse_max_errors(options.max_errors)
    if options.detach and options.redis_url is None:
        raise UsageError("--detach needs --redis: without it, server and worker end with this command")
    if options.worker and options.redis_url is not None:
        raise UsageError(
            f"{options.worker[0]}: sets this command's own worker: give it to embed-worker, or leave out --redis"
        )
    if options.server_side and options.redis_url is None:
        raise UsageError("--server-side needs --redis: coordinators find the job there")
    if options.server_side and options.retry_failed:
        raise UsageError("--server-side and --retry-failed exclude each other: failed rows are read on this machine")
    if (options.run is None) != (options.queries is None):
        raise UsageError("--run and --queries belong together: a run names its queries by their ids")
    if options.run is not None and options.server_side:
        raise UsageError("--server-side and --run exclude each other: a run is read on this machine")
    _check_updating(options)
    if (options.plan or options.plan_measure) and (options.server_side or options.retry_failed):
        raise UsageError("--plan reads the corpus here, and all of it: leave out --server-side and --retry-failed")


def _check_updating(options: Options) -> None:
    flags = {"--update": options.update, "--update-from": options.update_from is not None}
    updating = next((flag for flag, given in flags.items() if given), None)
    others = {
        "--update-from": options.update and options.update_from is not None,
        "--retry-failed": options.retry_failed,
        "--server-side": options.server_side,
        "--plan": options.plan or options.plan_measure,
        "--trust-unchanged": options.trust_unchanged,
    }
    for other, given in others.items():
        if updating is not None and given:
            raise UsageError(f"{updating} and {other} exclude each other: leave one of them out")


def resolve_output(options: Options) -> str:
    """`-o`, or `<corpus>.vectors` for one file or folder, or `<run>.vectors`."""
    if options.output:
        return options.output
    if options.run is not None:
        return f"{options.run}{VECTORS}"
    if len(options.corpus) != 1:
        raise UsageError("several files become one dataset: say where it goes (-o OUTPUT)")
    if options.corpus[0] == STDIN:
        raise UsageError("standard input has no name: say where the vectors go (-o OUTPUT)")
    corpus = options.corpus[0].rstrip("/")
    if corpus.rpartition("/")[2] in ("", ".", ".."):
        corpus = os.path.abspath(options.corpus[0])  # noqa: PTH100 - as it is in `part_name`
    if is_hub(corpus) or split_pattern(corpus)[1]:
        raise UsageError(f"{corpus}: is no file or folder here that an output could lie beside: say where it goes (-o)")
    return parse_object(corpus, "corpus").sibling(VECTORS) if is_object(corpus) else f"{corpus}{VECTORS}"
