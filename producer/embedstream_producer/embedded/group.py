"""Processes that end when this one ends, however it ends."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from embedstream.cli.starting import environment

_KEEPER = "trap '' HUP INT TERM; read -r _; rm -rf \"$0\"; kill -KILL 0"
"""Waits for the end of its standard input, which the system closes when the process at its other end is gone."""


class Group:
    """A process group whose processes are all killed, and a folder removed, when it is closed or this process ends.

    A process that is being started holds the keeper's standard input open until it is in the group, so none is missed.
    The group is no terminal's foreground: Ctrl-C there is for this process alone.

    Raises `OSError` if no process can be started.
    """

    def __init__(self, claim: int, folder: Path) -> None:
        """`claim`: an open file that every process of the group holds open, too."""
        self.folder = folder
        self._claim = claim
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, str(folder)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(claim,),
            process_group=0,
        )

    def start(
        self, command: Sequence[str], log: IO[bytes], env: Mapping[str, str], *, fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a process that reads nothing and writes into `log`. It inherits `fds`."""
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(self._claim, *fds),
            process_group=self._keeper.pid,
        )

    def close(self) -> None:
        """End them all. Twice is harmless."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()
