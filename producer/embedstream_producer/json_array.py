"""A JSON array -> its elements, one at a time: what lines are to JSON Lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from embedstream.corpus.records import LONGEST_LINE_BYTES
from embedstream.errors import InputError
from embedstream_producer.plain import READ_BYTES, PlainStream

_BEGIN = re.compile(r"\ufeff?\s*\[\s*")
_NEXT = re.compile(r"\s*(,\s*|\]\s*)")


class ArrayStream:
    """The elements of the array that a source is."""

    unit = "element"

    def __init__(self, plain: PlainStream, label: str, *, longest: int = LONGEST_LINE_BYTES) -> None:
        """Read `plain`, which is closed by `close`; `label` names it in errors."""
        self.plain = plain
        self._label = label
        self._longest = longest
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        # Numbers are read again where they are wanted, of any length.
        self._decode = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode
        self._element = 1
        """The one that comes next."""
        self._over = False
        plain.place = lambda: f", near element {self._element:,}"

    def batches(self) -> Iterator[tuple[int, list[bytes]]]:
        """Consecutive elements as they are written, some at a time, with the place of the first, from 0.

        Raises:
            InputError: the source cannot be read to its end, or is no JSON array to its end.
        """
        text, at_beginning, ended = "", True, False
        while not ended:
            data = self.plain.read(max(READ_BYTES, len(text)))
            ended = not data
            text += self._decoder.decode(data, ended)
            at = 0
            if at_beginning:
                begin = _BEGIN.match(text)
                if begin is None and text.strip("\ufeff \t\r\n"):
                    raise self._damaged("it does not begin with [")
                if begin is None or (begin.end() == len(text) and not ended):
                    text = text.strip()  # more white space may come than fits into memory
                    continue
                at, at_beginning = begin.end(), False
                if text.startswith("]", at):
                    at, self._over = at + 1, True
            first, elements = self._element - 1, list[bytes]()
            at = self._elements(text, at, elements, ended)
            if elements:
                yield first, elements
            text = text[at:].lstrip()
            if self._over and text:
                raise self._damaged("more follows after the array")

    def close(self) -> None:
        self.plain.close()

    def _elements(self, text: str, at: int, elements: list[bytes], ended: bool) -> int:
        """Take the elements that are whole, each with the comma behind it; where the next one begins."""
        while not self._over:
            trouble = "its end is missing"
            try:
                _, end = self._decode(text, at)
            except json.JSONDecodeError as error:
                end, trouble = len(text), error.msg
            except RecursionError:
                raise self._damaged("nested too deeply") from None
            behind = _NEXT.match(text, end)
            if behind is None:
                if end < len(text.rstrip()):
                    raise self._damaged("neither a comma nor ] follows")
                if ended:
                    raise self._damaged(trouble)
                if len(text) - at > self._longest:
                    raise InputError(
                        f"{self._label}: element {self._element:,} has more than {self._longest:,} bytes or is damaged "
                        f"({trouble}): split it, or convert the file (jq -c '.[]')"
                    )
                return at
            elements.append(text[at:end].encode("utf-8", "surrogateescape"))
            self._element += 1
            self._over = "]" in behind[0]
            at = behind.end()
        return at

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"{self._label}: is damaged at element {self._element:,} of its JSON array ({why}): make or fetch it again"
        )
