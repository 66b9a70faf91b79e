"""For your own tests: a queue with a worker, without a Redis server and without a model. Needs `embedstream[testing]`.

    def test_my_indexer(tmp_path):
        with embedstream.testing.fleet(tmp_path) as url:
            job = Client(url).submit(records, model=MODEL, output=tmp_path / "vectors")
            assert job.wait().state == "completed"

The server is fakeredis, in this process. The worker is a real one, in a process of its own, with the model `hashing`:
equal texts have equal vectors, float32 of 384 dimensions and length 1, and the vectors have no other meaning.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from embedstream.cli.starting import environment, python_command
from embedstream.errors import UsageError, WorkerError
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream.temporary import temporary_folder

MODEL = "hashing"
"""The model that the worker serves."""

START_SECONDS = 60.0
LOOK_SECONDS = 0.02


@contextlib.contextmanager
def fleet(root: str | Path) -> Iterator[str]:
    """The URL of a queue whose worker writes below the folder `root`; both end with the block.

    Raises:
        UsageError: fakeredis is not installed.
        WorkerError: the worker does not start.
    """
    try:
        from fakeredis import TcpFakeServer
    except ImportError:
        raise UsageError("fakeredis is not installed: pip install 'embedstream[testing]'") from None
    with TcpFakeServer(("127.0.0.1", 0)) as server, tempfile.TemporaryFile(dir=temporary_folder()) as log:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"redis://127.0.0.1:{server.server_address[1]}"
        command = python_command("embedstream_worker", "--model", MODEL, "--redis", url, "--output-root", str(root))
        worker = subprocess.Popen(command, env=environment(), stderr=log)
        try:
            broker, end = Broker(connect(url), MODEL), time.monotonic() + START_SECONDS
            while not any(each.state == "ready" for each in broker.workers()):
                if worker.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise WorkerError(f"the worker did not start: {log.read().decode(errors='replace').strip()}")
                time.sleep(LOOK_SECONDS)
            yield url
        finally:
            worker.kill()
            worker.wait()
            server.shutdown()
