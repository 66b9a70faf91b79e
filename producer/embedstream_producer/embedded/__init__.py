"""A private Redis server for one output on one machine. It and its worker end with the process that starts them.

with OutputLock(output) as lock, PrivateServer.start(lock) as server:
    ...  # server.url; server.group.start(worker)
"""

from embedstream_producer.embedded.lock import OutputLock
from embedstream_producer.embedded.private import PrivateFolder, state_folder
from embedstream_producer.embedded.server import PrivateServer

__all__ = ["OutputLock", "PrivateFolder", "PrivateServer", "state_folder"]
