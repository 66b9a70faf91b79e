"""embedstream cache."""

from __future__ import annotations

import shutil

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.terminal import echo
from embedstream_worker.cache import cache_root

KINDS = {
    "openvino": "models converted for this processor",
    "onnx": "models converted for ONNX Runtime",
    "inductor": "compiled models",
    "models": "which models were used here",
    "starts": "how fast models are here, and with which batches",
    "sha256": "checksums of model files",
    "devices": "which GPUs are in use",
}


@click.command(cls=Command, examples=["embedstream cache", "embedstream cache --clear"])
@click.option("--clear", is_flag=True, help="Remove all of it. The next worker makes what it needs again.")
@click.version_option(package_name="embedstream")
def cache(clear: bool) -> None:
    """Show or clear what workers keep on this machine, such as converted models."""
    root = cache_root()
    total = 0
    # The folder may be the user's own, with other things in it.
    for folder in (folder for kind in sorted(KINDS) if (folder := root / kind).is_dir()):
        size = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
        total += size
        echo(f"{size / 1e6:10,.1f} MB  {folder.name}: {KINDS[folder.name]}")
        if clear:
            shutil.rmtree(folder)
    echo(f"{total / 1e6:10,.1f} MB  in {root}{', now removed' if clear else ''}")


def main() -> None:
    """Entry point."""
    run(cache)
