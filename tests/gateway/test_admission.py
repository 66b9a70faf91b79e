"""Who may use a gateway, and what it refuses before it does any work."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import httpx
import pytest
from e2e.harness import run
from gateway.conftest import Served

from embedstream.errors import UsageError
from embedstream_gateway.api_keys import SCOPES, make_key, read_keys
from embedstream_gateway.scopes import needed

EMBED = {"model": "hashing", "input": "a text"}


def test_without_a_key_nothing_but_probes_is_served(served: Served) -> None:
    with served.http(None) as client:
        for path in ("/health", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/", "/openapi.json", "/nowhere"):
            refused = client.get(path)
            assert refused.status_code == 401
            assert "Bearer" in refused.headers["WWW-Authenticate"] or path == "/"
        for key in ("es-wrong", "é", served.keys["admin"][:-1]):
            sent = {b"Authorization": f"Bearer {key}".encode()}
            assert client.post("/v1/embeddings", json=EMBED, headers=sent).status_code == 401


@pytest.mark.parametrize(
    ("scope", "embeds", "reads", "submits"),
    [
        ("read", 403, 200, 403),
        ("embed", 200, 403, 403),
        ("submit", 403, 403, 404),
        ("admin", 200, 200, 404),
    ],
)
def test_a_key_may_do_what_its_scopes_say(served: Served, scope: str, embeds: int, reads: int, submits: int) -> None:
    with served.http(scope) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/embeddings", json=EMBED).status_code == embeds
        assert client.get("/metrics").status_code == reads
        assert client.get("/v1/files/file-0").status_code == submits
        refused = client.delete("/nowhere")
        assert refused.status_code == (404 if scope == "admin" else 403)


def test_a_browser_sends_the_key_as_a_password(served: Served) -> None:
    with served.http(None) as client:
        asked = client.get("/")
        assert (asked.status_code, asked.headers["WWW-Authenticate"].partition(" ")[0]) == (401, "Basic")
        assert client.get("/v1/models", auth=("anyone", served.keys["read"])).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "{url}"}, 200),
        ({}, 200),
    ],
    ids=["cross-site", "same-site", "other-origin", "no-origin", "same-origin", "typed", "own-origin", "program"],
)
def test_no_page_of_another_site_changes_anything(served: Served, headers: dict[str, str], status: int) -> None:
    with served.http() as client:
        sent = {name: value.format(url=served.url) for name, value in headers.items()}
        assert client.post("/v1/embeddings", json=EMBED, headers=sent).status_code == status


def test_without_keys_only_this_machine_is_served_and_only_by_its_own_name(served: Served) -> None:
    _, url = served.fleet.start_gateway()
    assert httpx.get(f"{url}/v1/models").status_code == 200
    for host in ("evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "10.0.0.1"):
        assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == 403
    refused = run("embed-serve", "--redis", served.fleet.url, "--host", "0.0.0.0", "--port", 0)
    assert refused.returncode == 2
    assert "--api-key-file" in refused.stderr


def test_a_body_beyond_the_bound_is_refused_before_it_is_read(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {served.keys['embed']}\r\n"
            f"Content-Length: 9999999999\r\n\r\n".encode()
        )
        assert b"413" in connection.recv(100)


def test_a_body_without_a_length_is_bounded_too(served: Served) -> None:
    with served.http() as client:
        refused = client.post("/v1/embeddings", content=(b" " * 2**20 for _ in range(17)))
        assert refused.status_code == 413
        assert "16 MiB" in refused.json()["error"]["message"]


def test_an_answer_tells_a_browser_to_run_nothing_and_to_keep_nothing(served: Served) -> None:
    with served.http() as client:
        for path in ("/v1/models", "/nowhere", "/health"):
            headers = client.get(path).headers
            assert headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cache-Control"] == "no-store"
            assert "server" not in headers


def test_a_request_keeps_its_id_if_it_is_one(served: Served) -> None:
    with served.http() as client:
        assert client.get("/health", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
        for other in ("a b", "x" * 65, "<script>"):
            assert client.get("/health", headers={"X-Request-Id": other}).headers["X-Request-Id"] != other


def test_every_method_and_path_that_no_rule_names_is_for_administrators() -> None:
    assert needed("PATCH", "/v1/models") == "admin"
    assert needed("POST", "/page/jobs/0123/cancel") == "admin"
    assert needed("POST", "/page/new") == "submit"
    assert needed("DELETE", "/jobs/0123456789abcdef") == "admin"


def test_the_file_holds_no_secret_and_each_key_is_found(tmp_path: Path) -> None:
    made = [make_key(f"app-{scope}", [scope]) for scope in SCOPES]
    file = tmp_path / "keys.txt"
    file.write_text("\n".join(line for _, line in made))
    file.chmod(stat.S_IRUSR)
    keys = read_keys(file)
    for scope, (secret, line) in zip(SCOPES, made, strict=True):
        found = keys.find(secret)
        assert found is not None
        assert (found.name, found.scopes) == (f"app-{scope}", frozenset([scope]))
        assert secret not in line
    assert keys.find("es-guess") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "# only a comment",
        "name read es-a-secret-that-was-put-here-by-mistake",
        "name read",
        "name write sha256:" + "0" * 64,
        "na/me read sha256:" + "0" * 64,
        "name read, sha256:" + "0" * 64,
        "name read sha256:" + "0" * 64 + "\nname embed sha256:" + "1" * 64,
        b"\xff\xfe",
    ],
    ids=["empty", "comment", "secret", "short", "scope", "name", "comma", "twice", "bytes"],
)
def test_a_file_that_is_no_list_of_keys_is_refused_and_not_shown(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "keys.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=r"keys\.txt") as refused:
        read_keys(file)
    assert "mistake" not in str(refused.value)
