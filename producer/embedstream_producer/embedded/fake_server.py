"""The stand-in for a Redis server where none can be had: `python -m embedstream_producer.embedded.fake_server FD`.

FD is a listening socket that the starter passed on. It serves until the other end of its standard input is closed,
which the system does when the starter ends, however it ends; nothing outlives it, as nothing is on disk.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType

from fakeredis import TcpFakeServer


def serve(listener: socket.socket) -> None:
    """Answer on `listener` until standard input ends or SIGTERM comes."""
    server = TcpFakeServer(("127.0.0.1", 0), bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_address = listener.getsockname()
    server.daemon_threads = True
    server.block_on_close = False

    def starter_ended() -> None:
        while os.read(0, 1):
            pass
        server.shutdown()

    def terminated(_number: int, _frame: FrameType | None) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()

    signal.signal(signal.SIGTERM, terminated)
    threading.Thread(target=starter_ended, daemon=True).start()
    server.serve_forever(poll_interval=0.05)
    server.server_close()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
