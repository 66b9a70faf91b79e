"""TLS in front of a Redis server that has none."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import trustme


@contextlib.contextmanager
def tls_proxy(port: int, folder: Path) -> Iterator[tuple[int, Path]]:
    """Speaks TLS on a port of its own and passes everything on to `port`: (its port, its authority's certificate)."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    certificate = folder / "authority.pem"
    authority.cert_pem.write_to_path(certificate)
    started: Queue[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Queue()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on(reader, inner_writer), pass_on(inner_reader, writer))

    async def main() -> None:
        server, stop = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context), asyncio.Event()
        started.put((server.sockets[0].getsockname()[1], asyncio.get_running_loop(), stop))
        await stop.wait()
        server.close()

    # Ends what still passes on, too: a task that is left to the garbage collector speaks up in somebody else's test.
    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    own_port, loop, stop = started.get(timeout=10)
    try:
        yield own_port, certificate
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
