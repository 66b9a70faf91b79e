"""The stand-in for a Redis server where none can be had: `python -m embedstream_producer.embedded.fake_server FD`.

FD is a listening socket that the starter passed on.
"""

from __future__ import annotations

import socket
import sys

from fakeredis import TcpFakeServer


def serve(listener: socket.socket) -> None:
    """Answer on `listener` until this process is killed."""
    server = TcpFakeServer(("127.0.0.1", 0), bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_address = listener.getsockname()
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
