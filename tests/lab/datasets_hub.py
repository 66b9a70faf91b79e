"""A Hugging Face hub of this machine that has one data set: what its client's file system asks of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "da7a5e7000000000000000000000000000000001"


@contextlib.contextmanager
def datasets_hub(folder: Path, name: str, commit: str = COMMIT) -> Iterator[str]:
    """The address of a hub that has one data set: the files below `folder`, at one commit and its main branch.

    Of a file whose name begins with `half` the second half is refused, but for its last megabyte.
    """

    def info(path: Path) -> dict[str, object]:
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": "0" * 40}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            known = f"(?:main|{commit})"
            if re.fullmatch(rf"/api/datasets/{name}(/revision/{known})?", path):
                self._send(json.dumps({"id": name, "sha": commit, "siblings": []}).encode())
            elif (tree := re.fullmatch(rf"/api/datasets/{name}/tree/{known}/?(.*)", path)) and (
                folder / tree[1]
            ).is_dir():
                below = folder / tree[1]
                found = below.rglob("*") if "recursive=true" in self.path.lower() else below.iterdir()
                self._send(json.dumps([info(each) for each in sorted(found)]).encode())
            elif (file := re.fullmatch(rf"/datasets/{name}/resolve/{known}/(.+)", path)) and (
                folder / file[1]
            ).is_file():
                self._send((folder / file[1]).read_bytes())
            else:
                self._send(b"", 404)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            paths = [folder / path for path in asked["paths"]]
            self._send(json.dumps([info(path) for path in paths if path.exists()]).encode())

        def _send(self, content: bytes, status: int = 200) -> None:
            whole = len(content)
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if part and status == 200:
                if "/half" in self.path and whole // 2 < int(part[1]) < whole - 2**20:
                    self._send(b"", 403)
                    return
                first, last = int(part[1]), min(int(part[2] or whole), whole - 1)
                content, status = content[first : last + 1], 206
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
