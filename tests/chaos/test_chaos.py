"""A short run of the chaos, of a seed in which all kinds of faults strike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(400)
def test_a_short_chaos_loses_doubles_and_mixes_up_nothing() -> None:
    command = [sys.executable, str(Path(__file__).parent), "--seconds", "40", "--seed", "7", "--least", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
