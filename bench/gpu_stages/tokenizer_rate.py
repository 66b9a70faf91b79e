"""`python -m gpu_stages.tokenizer_rate TOKENIZER TEXTS THREADS SECONDS` prints the tokens a second of so many threads.

A process of its own, as the library's pool of threads is made once, by what the environment says.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tokenizers

from embedstream_worker.tokenizing import FastTokenizer, Limits

_TEXTS_AT_ONCE = 1024  # as blocks have them
_LONGEST = 512


def main() -> None:
    file, texts, threads, seconds = sys.argv[1:]
    everything = json.loads(Path(texts).read_text())
    pieces = [everything[start : start + _TEXTS_AT_ONCE] for start in range(0, len(everything), _TEXTS_AT_ONCE)]
    source = tokenizers.Tokenizer.from_file(file)

    def work(number: int) -> int:
        tokenizer, done = FastTokenizer(source, Limits(_LONGEST, 3)), 0
        tokenizer.encode(pieces[0][:16], _LONGEST)
        for piece in itertools.islice(itertools.cycle(pieces), number, None):
            done += len(tokenizer.encode(piece, _LONGEST).ids)
            if time.perf_counter() > end:
                break
        return done

    begun = time.perf_counter()
    end = begun + float(seconds)
    with ThreadPoolExecutor(int(threads)) as pool:
        done = sum(pool.map(work, range(int(threads))))
    print(done / (time.perf_counter() - begun))


if __name__ == "__main__":
    main()
