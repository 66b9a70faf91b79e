"""A Hugging Face hub of this machine: what the client asks of it to look at a model and to fetch its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee0000000000000000000000000000000001"


@contextlib.contextmanager
def hub_of(folder: Path, name: str) -> Iterator[str]:
    """The address of a hub that has one model: the files below `folder`."""

    def files() -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def info() -> object:
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files()]
        return {"id": name, "sha": COMMIT, "siblings": siblings}

    def tree() -> object:
        return [
            {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": "0" * 40}
            for path in files()
        ]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{name}"):
                self._send(json.dumps(tree() if "/tree/" in path else info()).encode())
                return
            _, found, rest = path.partition(f"/{name}/resolve/")
            file = folder / rest.partition("/")[2]
            if found and file.is_file():
                self._send(file.read_bytes())
            else:
                self._send(b"", 404)

        do_HEAD = do_GET

        def _send(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
