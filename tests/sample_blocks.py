"""`python tests/sample_blocks.py` writes the sample blocks of `docs/protocol.md` into `docs/samples/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from embedstream.queue.blocks import Block, Refusal, encode_block
from embedstream.queue.packing import Packer

FOLDER = Path(__file__).parents[1] / "docs" / "samples"


def plain() -> Block:
    packer = Packer(0)
    for row, text in enumerate(["The quick brown fox", "Füchse, лисы, 狐 and 🦊", "a second line:\n\tand a tab"]):
        packer.add(row, f"doc-{row}", text, len(text.encode()))
    return _finished(packer)


def kept() -> Block:
    packer = Packer(1, KEEP["kept"])
    packer.add(10, "a", "first", 5, ("en", "2024"))
    packer.refuse(Refusal(11, "b", "empty_text", "text is empty", '{"id": "b", "text": ""}'))
    packer.skip()
    packer.add(13, "c", "dernière", 9, ("fr", None))
    return _finished(packer)


def refused() -> Block:
    packer = Packer(0)
    packer.refuse(Refusal(0, None, "invalid_json", "no JSON: ends at character 1", "{"))
    packer.refuse(Refusal(1, "é", "missing_field", "no field text or content", '{"id": "é"}'))
    return _finished(packer)


KEEP: dict[str, tuple[str, ...]] = {"plain": (), "kept": ("lang", "year"), "refused": ()}
BLOCKS = {"plain": plain, "kept": kept, "refused": refused}


def described(block: Block, keep: tuple[str, ...]) -> dict[str, Any]:
    """What the JSON file beside a body says."""
    fields = encode_block(block).fields()
    entry: dict[str, Any] = {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}
    del entry["body"]
    if block.refused:
        entry["refused"] = [msgspec.to_builtins(refusal) for refusal in block.refused]
    return {"keep": list(keep), "entry": entry, "rows": block.rows.to_pylist()}


def _finished(packer: Packer) -> Block:
    block = packer.finish()
    assert block is not None
    return block


def write() -> None:
    """All samples."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in BLOCKS.items():
        block = make()
        (FOLDER / f"{name}.arrow").write_bytes(encode_block(block).body)
        text = json.dumps(described(block, KEEP[name]), ensure_ascii=False, indent=2)
        (FOLDER / f"{name}.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    write()
