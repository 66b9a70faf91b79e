"""Libraries in Rust panic where others raise; to Python that is no `Exception`, and would end the thread it is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Panicked(Exception):
    """A library in Rust gave up on what it was given. The process is sound."""


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Raises `Panicked` in the place of a panic, whose class belongs to the library and cannot be imported."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise Panicked(str(error)) from error
