"""A private Redis server for one output on one machine: started, stopped, and taken over from a run that was killed.

with OutputLock(output) as lock:
    with PrivateServer.start(lock) as server:
        ...                        # server.url; server.record_child(worker.pid)
    lock.remove_state()            # when the job is complete
"""

from embedstream_producer.embedded.lock import OutputLock
from embedstream_producer.embedded.private import PrivateFolder, state_folder
from embedstream_producer.embedded.server import PrivateServer

__all__ = ["OutputLock", "PrivateFolder", "PrivateServer", "state_folder"]
