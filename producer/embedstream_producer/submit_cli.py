"""embed-submit."""

from __future__ import annotations

import os
import sys
from typing import Literal, get_args

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import INTERRUPTED, end, on_signals, run
from embedstream.jobs import DEFAULT_MODEL, ChunkBy, CorpusFormat
from embedstream.outputs import Task, parse_emit


@click.command(
    cls=Command,
    groups={
        "Where": ["output", "redis_url", "queue", "detach", "server_side"],
        "Model": ["model", "revision", "task", "emit", "role", "prompt", "prompt_name", "max_length"],
        "Rows of the corpus": [
            "id_field",
            "number_rows",
            "text_field",
            "title_field",
            "title_sep",
            "query_field",
            "run_file",
            "queries",
            "keep",
            "no_text",
            "empty",
            "corpus_format",
        ],
        "Long texts": ["on_long", "chunk_tokens", "chunk_overlap", "chunk_by", "chunk_format"],
        "Before embedding": ["plan", "plan_measure"],
        "Failed rows": ["max_errors", "retry_failed"],
        "A finished output": ["update", "update_from", "trust_unchanged"],
        "This machine's worker, without --redis": ["device", "engine", "dtype", "no_warmup"],
    },
    examples=[
        "embed-submit corpus.jsonl",
        "embed-submit corpus.jsonl.gz --model BAAI/bge-small-en-v1.5 -o vectors/",
        "embed-submit part-*.parquet --redis redis://host:6379/0 -o s3://bucket/vectors --keep lang",
        "zcat corpus.gz | embed-submit - -o vectors/",
        "embed-submit corpus.jsonl --run bm25.trec --queries queries.jsonl --model ./reranker -o reranked/",
    ],
)
@click.argument("corpus", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    help="A folder, s3://bucket/prefix, or redis://host/db?prefix=docs:  [default: CORPUS.vectors for one file]",
)
@click.option("--redis", "redis_url", help="The fleet's Redis. Without it, all happens on this machine.")
@click.option("--queue", help="Name of the queue.  [default: the model's name]")
@click.option(
    "--model", default=DEFAULT_MODEL, help="A folder, a Hugging Face id, or one an installed package carries."
)
@click.option("--revision", help="Commit, tag or branch of a Hugging Face id.")
@click.option(
    "--task",
    type=click.Choice(["auto", "embed", "rerank", "classify"]),
    default="auto",
    show_default="what the model is made for",
    help="What the model does with a row.",
)
@click.option(
    "--emit",
    multiple=True,
    metavar="KIND[=NAME][:DTYPE][:DIM]",
    help="A column of results; repeatable. KIND: dense, sparse, multivector, score, labels. DTYPE: float32, float16, "
    "int8, ubinary. DIM: the first dimensions.  [default: all that the model gives, in float32]",
)
@click.option("--role", type=click.Choice(["document", "query"]), default="document", help="What the texts are.")
@click.option(
    "--format",
    "corpus_format",
    type=click.Choice(get_args(CorpusFormat)),
    help="What the corpus is; csv is TSV, too.  [default: what each part's content shows]",
)
@click.option("--id-field", metavar="FIELD", help="Where a row has its id.  [default: _id, id, custom_id or docid]")
@click.option(
    "--number-rows", is_flag=True, help="Read no ids: make them from the numbers of file and row, such as 0-17."
)
@click.option(
    "--text-field",
    metavar="FIELD",
    help="Where a row has its text; dots lead into objects.  [default: text, content, body.input or _source.text]",
)
@click.option("--title-field", metavar="FIELD", help="Joined in front of the text; '' for none.  [default: title]")
@click.option("--title-sep", default=" ", show_default="a space", help="Between title and text.")
@click.option("--query-field", metavar="FIELD", help="The first text of a pair.  [default: query, for rerankers]")
@click.option(
    "--run",
    "run_file",
    metavar="FILE",
    help="Score the pairs of a run in TREC's format; the corpus has the texts of its documents.",
)
@click.option("--queries", metavar="FILE", help="The queries of the run, with the ids that it names.")
@click.option(
    "--keep",
    multiple=True,
    metavar="FIELD[:TYPE]",
    help="Carry a field into the dataset; repeatable. TYPE: int64, float64, bool or string.",
)
@click.option("--no-text", is_flag=True, help="Leave the text column out of the dataset.")
@click.option("--empty", type=click.Choice(["error", "skip"]), default="error", help="How to treat an empty text.")
@click.option("--prompt", help="Put in front of every text.  [default: the model's own for the role]")
@click.option("--prompt-name", help="One of the model's prompts.")
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens of a text.  [default: the model's own]")
@click.option(
    "--on-long",
    type=click.Choice(["cut", "error", "chunk"]),
    default="cut",
    help="What becomes of a text that is longer than the model takes. cut: its end is left out, and it is marked; "
    "chunk: texts are cut into chunks of what the model takes.",
)
@click.option(
    "--chunk-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cut texts into chunks of at most N tokens, prompt and special tokens included; each is a row.",
)
@click.option(
    "--chunk-overlap",
    type=click.IntRange(min=0),
    default=0,
    metavar="M",
    help="At most so many tokens of a chunk are those of the one before, too.",
)
@click.option(
    "--chunk-by",
    type=click.Choice(get_args(ChunkBy)),
    default="recursive",
    help="Where texts are cut: at paragraphs, lines, sentences and words; at sentences; or at headings first.",
)
@click.option(
    "--chunk-format",
    default="",
    metavar="FORMAT",
    help="What enters the model of a chunk, such as '{title}\\n{chunk}' (\\n: a new line).  [default: title and chunk]",
)
@click.option("--max-errors", metavar="N|P%", help="The job fails if more rows fail than this; otherwise exit 0.")
@click.option("--retry-failed", is_flag=True, help="Run again the rows of a finished output that failed in a worker.")
@click.option(
    "--update",
    is_flag=True,
    help="Bring a finished output up to date: texts that are in it keep their vectors, and rows that are gone go.",
)
@click.option(
    "--update-from", metavar="DATASET", help="As --update, but of this dataset, which stays, into another output (-o)."
)
@click.option("--plan", is_flag=True, help="Embed nothing: read the corpus, and print what the job would be.")
@click.option(
    "--plan-measure", is_flag=True, help="As --plan, and embed some texts for a few seconds to estimate the time."
)
@click.option(
    "--trust-unchanged", is_flag=True, help="Do not compare corpus and model with those of a finished output."
)
@click.option("--device", allow_from_autoenv=False, metavar="NAME", help="As for embed-worker: cpu, cuda:N or mps.")
@click.option("--engine", allow_from_autoenv=False, metavar="NAME", help="As for embed-worker: torch, openvino, …")
@click.option("--dtype", allow_from_autoenv=False, metavar="NAME", help="As for embed-worker: float32, bfloat16, int8.")
@click.option("--no-warmup", is_flag=True, allow_from_autoenv=False, help="Begin at once; the first batches are slow.")
@click.option("--detach", is_flag=True, help="End when all rows are submitted, and print the job's id.")
@click.option(
    "--server-side",
    is_flag=True,
    help="Let coordinators (embed-coordinator) read the files; end when they have begun.",
)
@click.option("--json", "as_json", is_flag=True, envvar="EMBEDSTREAM_JSON", help="One JSON object on standard output.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "json"]),
    default="auto",
    help="On standard error. auto: bars on a terminal, else lines; json: one object a line.",
)
@click.option("--quiet", is_flag=True, help="No progress.")
@click.version_option(package_name="embedstream")
def embed_submit(
    corpus: tuple[str, ...],
    output: str | None,
    redis_url: str | None,
    queue: str | None,
    model: str,
    revision: str | None,
    task: Task,
    emit: tuple[str, ...],
    role: Literal["document", "query"],
    corpus_format: CorpusFormat | None,
    id_field: str | None,
    number_rows: bool,
    text_field: str | None,
    title_field: str | None,
    title_sep: str,
    query_field: str | None,
    run_file: str | None,
    queries: str | None,
    keep: tuple[str, ...],
    no_text: bool,
    empty: Literal["error", "skip"],
    prompt: str | None,
    prompt_name: str | None,
    max_length: int | None,
    on_long: Literal["cut", "error", "chunk"],
    chunk_tokens: int | None,
    chunk_overlap: int,
    chunk_by: ChunkBy,
    chunk_format: str,
    max_errors: str | None,
    retry_failed: bool,
    update: bool,
    update_from: str | None,
    trust_unchanged: bool,
    plan: bool,
    plan_measure: bool,
    device: str | None,
    engine: str | None,
    dtype: str | None,
    no_warmup: bool,
    detach: bool,
    server_side: bool,
    as_json: bool,
    progress: Literal["auto", "json"],
    quiet: bool,
) -> None:
    """Embed a corpus. Each CORPUS is a file, a folder, a pattern of names ('docs/**/*.md'), s3://bucket/key,
    hf://datasets/owner/name@revision, or - for standard input. JSON lines or a JSON array, CSV or TSV (each plain, .gz
    or .zst), Parquet, Arrow, and folders of these, of texts, or saved by `datasets`, are recognized by their content.

    Exit codes: 0 all written, or failures within --max-errors; 1 the job failed; 2 wrong usage, or input refused; 3
    written, but some rows failed; 4 cancelled; 130 detached by Ctrl-C.
    """
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time. But not by
    # an exception: native modules do not all bear one while they are made.
    on_signals(_leave, INTERRUPTED)
    from embedstream_producer.options import Options
    from embedstream_producer.submit import submit

    on_signals(_interrupt, INTERRUPTED)
    given = {"--device": device, "--engine": engine, "--dtype": dtype}
    worker = [word for flag, value in given.items() if value is not None for word in (flag, value)]
    options = Options(
        corpus=corpus,
        output=output or None,
        redis_url=redis_url or None,
        queue=queue or None,
        model=model,
        revision=revision or None,
        max_errors=max_errors or "",
        settings={
            "format": corpus_format,
            "task": task,
            "outputs": tuple(map(parse_emit, emit)),
            "role": role,
            "prompt": prompt,
            "prompt_name": prompt_name,
            "max_length": max_length,
            "id_field": id_field,
            "number_rows": number_rows,
            "text_field": text_field,
            "title_field": title_field,
            "title_sep": title_sep,
            "query_field": query_field,
            "run": run_file is not None,
            "keep": keep,
            "text": not no_text,
            "empty": empty,
            "on_long": on_long,
            "chunk_tokens": chunk_tokens,
            "chunk_overlap": chunk_overlap,
            "chunk_by": chunk_by,
            "chunk_format": chunk_format.replace("\\n", "\n"),
        },
        retry_failed=retry_failed,
        update=update,
        update_from=update_from or None,
        trust_unchanged=trust_unchanged,
        run=run_file,
        queries=queries,
        plan=plan,
        plan_measure=plan_measure,
        worker=(*worker, *(["--no-warmup"] if no_warmup else [])),
        detach=detach,
        server_side=server_side,
        json=as_json,
        quiet=quiet,
        progress=progress,
    )
    sys.exit(submit(options))


def _leave() -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _interrupt() -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point."""
    end(lambda: run(embed_submit))
