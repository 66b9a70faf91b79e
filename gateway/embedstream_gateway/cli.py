"""embed-serve."""

from __future__ import annotations

from pathlib import Path

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.cli.logs import LogFormat, identify, set_up, tell_error
from embedstream.errors import UsageError

TIMEOUT_SECONDS = 30.0
"""As `Client.embed` waits."""

FILE_DAYS = 30.0
"""As long as OpenAI keeps a batch's files."""


@click.command(
    cls=Command,
    groups={
        "Where it listens": ["host", "port", "tls_cert", "tls_key"],
        "Who may use it": ["api_key_file", "new_key", "scopes"],
        "What it may read and write": ["files", "file_days", "output_roots"],
        "Operations": ["timeout", "log_format"],
    },
    examples=[
        "embed-serve --redis redis://host:6379/0",
        "embed-serve --redis redis://host:6379/0 --host 0.0.0.0 --api-key-file keys.txt",
        "embed-serve --new-key search --scope read --scope embed",
    ],
)
@click.option("--redis", "redis_url", help="The fleet's Redis: redis://host:6379/0, rediss://, unix://.")
@click.option("--host", envvar="EMBEDSTREAM_SERVE_HOST", default="127.0.0.1", help="Address to listen at.")
@click.option(
    "--port",
    envvar="EMBEDSTREAM_SERVE_PORT",
    type=click.IntRange(0, 65535),
    default=8080,
    help="Port to listen at; 0: any free one, which is logged.",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain, to speak TLS.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="Keys by their hashes, one a line. Needed unless only this machine can reach it.",
)
@click.option("--new-key", metavar="NAME", help="Print a new key and its line for that file, and exit.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["read", "embed", "submit", "admin"]),
    default=("read", "embed"),
    help="What the new key may do; repeatable.",
)
@click.option(
    "--files",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for uploads and results of batches, which workers may write to under the same path. [default: none]",
)
@click.option(
    "--file-days",
    type=click.FloatRange(min=0, min_open=True),
    default=FILE_DAYS,
    help="How long these are kept.",
)
@click.option(
    "--output-root",
    "output_roots",
    multiple=True,
    envvar=["EMBEDSTREAM_OUTPUT_ROOT", "EMBEDSTREAM_OUTPUT_ROOTS"],
    help="Folder or URL below which jobs that are submitted here may write, and failed rows be read; repeatable. "
    "[default: none]",
)
@click.option(
    "--timeout",
    envvar="EMBEDSTREAM_SERVE_TIMEOUT",
    type=click.FloatRange(0.1, 600),
    default=TIMEOUT_SECONDS,
    help="Seconds that a request waits for a worker.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="json: one object a line.")
@click.version_option(package_name="embedstream")
def serve_command(
    redis_url: str | None,
    host: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    api_key_file: Path | None,
    new_key: str | None,
    scopes: tuple[str, ...],
    files: Path | None,
    file_days: float,
    output_roots: tuple[str, ...],
    timeout: float,
    log_format: LogFormat,
) -> None:
    """Serve a fleet over HTTP, for the clients of OpenAI and others.

    It keeps no state: any number of them may run, and each may be killed. Exit codes: 0 told to stop; 2 it cannot run
    with these settings.
    """
    if new_key is not None:
        from embedstream_gateway.api_keys import make_key

        secret, line = make_key(new_key, scopes)
        click.echo(f"key, shown only now: {secret}\nline for --api-key-file: {line}")
        return
    if not redis_url:
        raise UsageError("no Redis: give --redis URL, or set EMBEDSTREAM_REDIS_URL")
    set_up(log_format)
    identify(gateway=f"{host}:{port}")
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream.dataset.roots import canonical_root
    from embedstream_gateway.api_keys import read_keys
    from embedstream_gateway.app import Plan
    from embedstream_gateway.serving import serve

    keys = None if api_key_file is None else read_keys(api_key_file)
    plan = Plan(
        redis_url=redis_url,
        keys=keys,
        timeout=timeout,
        files=None if files is None else files.absolute(),
        file_days=file_days,
        output_roots=tuple(map(canonical_root, output_roots)),
    )
    serve(plan, host, port, tls_cert, tls_key)


def main() -> None:
    """Entry point."""
    run(serve_command, tell_error)
