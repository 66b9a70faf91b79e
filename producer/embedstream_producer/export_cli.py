"""embed-export."""

from __future__ import annotations

from typing import Literal

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run


@click.command(
    cls=Command,
    examples=[
        "embed-export corpus.jsonl.vectors faiss:corpus.faiss",
        "embed-export corpus.jsonl.vectors lance:lancedb --table docs",
        "embed-export corpus.jsonl.vectors qdrant:http://localhost:6333",
    ],
)
@click.argument("dataset")
@click.argument("target")
@click.option("--column", help="The vectors to export, if the dataset has several.")
@click.option("--table", help="Name of the table or collection.  [default: DATASET's name up to its first dot]")
@click.option(
    "--since",
    type=click.IntRange(min=0),
    metavar="GENERATION",
    help="The target holds this generation: put there what has changed since, and remove what is gone.",
)
@click.option("--json", "as_json", is_flag=True, envvar="EMBEDSTREAM_JSON", help="One JSON object on standard output.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "json"]),
    default="auto",
    help="json: one event a line on standard error; auto: a bar on a terminal, lines in a log.",
)
@click.version_option(package_name="embedstream")
def export_command(
    dataset: str,
    target: str,
    column: str | None,
    table: str | None,
    since: int | None,
    as_json: bool,
    progress: Literal["auto", "json"],
) -> None:
    """Put a finished dataset into a search library or a vector database. DATASET is a folder or an S3 URL.

    TARGET is lance:FOLDER, faiss:FILE, usearch:FILE, qdrant:URL or qdrant:FOLDER, milvus:URL or milvus:FILE.db,
    pgvector:URL, or pinecone-parquet:FILE. Ids, texts and kept fields go with the vectors. The same command again
    changes nothing, and goes on after a kill.

    Where the target's search is approximate, the command measures how many of the nearest rows it finds.
    """
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream_producer.exporting.export import show_export

    show_export(dataset, target, column, table, since, as_json, progress)


def main() -> None:
    """Entry point."""
    run(export_command)
