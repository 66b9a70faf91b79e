"""Where temporary files lie."""

from __future__ import annotations

import tempfile

from embedstream.errors import OutputError


def temporary_folder() -> str:
    """The system's folder for temporary files: the first that can be written of TMPDIR, /tmp and the usual others.

    Raises:
        OutputError: none of them can be written.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise OutputError(
            f"no folder for temporary files ({error.strerror}): make one of these writable, or name another (TMPDIR)"
        ) from error
