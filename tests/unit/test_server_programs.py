"""Which server is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedstream_producer.embedded.programs import find_program


def test_a_server_on_path_comes_first_unless_it_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    binary = tmp_path / "redis-server"
    for version, first in (("5.0.7", False), ("9.1.0", True)):
        binary.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0'\n")
        binary.chmod(0o755)
        assert (find_program().command == (str(binary),)) == first
