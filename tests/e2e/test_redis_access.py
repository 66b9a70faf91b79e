"""Who may use Redis and how it is reached: refusals in one sentence, TLS, a user with few rights, what costs work."""

from __future__ import annotations

import json
import re
import signal
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import redis
from lab.redis_servers import OwnServer, free_port, own_server
from lab.tls import tls_proxy

from e2e.harness import MODEL, assert_exact, fleet, run, start_submit, wait_until, write_corpus
from embedstream.api.client import Client
from embedstream.cli import commands
from embedstream.server.connection import connect
from embedstream.server.preflight import shortcomings
from embedstream_producer.cancel_cli import cancel
from embedstream_producer.status_cli import status
from embedstream_producer.submit_cli import embed_submit
from embedstream_worker.cli import worker

SECRET = "s3cret-pass"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with own_server() as made:
        yield made


class Impostor(socketserver.ThreadingTCPServer):
    """Listens and answers with something."""

    daemon_threads = True

    def __init__(self, handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class WebServer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


class Redis60(socketserver.StreamRequestHandler):
    """As much of it as is asked before it is refused."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                length = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(length + 2)[:-2].upper())
            self.wfile.write(self.answer(words[0]))

    def answer(self, command: bytes) -> bytes:
        if command == b"PING":
            return b"+PONG\r\n"
        if command == b"INFO":
            text = b"# Server\r\nredis_version:6.0.16\r\nredis_mode:standalone\r\n"
            return b"$%d\r\n%s\r\n" % (len(text), text)
        if command == b"HELLO":
            return b"%1\r\n$5\r\nproto\r\n:3\r\n"
        return b"-ERR unknown command `%s`, with args beginning with: \r\n" % command


class Redis5(Redis60):
    """It does not know the first command that any client sends."""

    def answer(self, command: bytes) -> bytes:
        return super().answer(b"" if command == b"HELLO" else command).replace(b"``", b"`HELLO`")


@pytest.fixture(scope="module")
def urls(server: OwnServer) -> Iterator[dict[str, str]]:
    """A URL for each kind of server that cannot be used."""
    with (
        Impostor(WebServer) as web,
        Impostor(Redis5) as five,
        Impostor(Redis60) as six,
        own_server("--cluster-enabled", "yes") as cluster,
        own_server("--requirepass", SECRET) as guarded,
    ):
        yield {
            "nobody": f"redis://:{SECRET}@127.0.0.1:{free_port()}/0",
            "no host": "redis://no-such-host.invalid:6379/0",
            "no password": guarded.tcp_url,
            "wrong password": guarded.tcp_url.replace("redis://", "redis://:wr0ng-pass@"),
            "web server": f"redis://127.0.0.1:{web.server_address[1]}/0",
            "older": f"redis://127.0.0.1:{five.server_address[1]}/0",
            "old": f"redis://127.0.0.1:{six.server_address[1]}/0",
            "cluster": cluster.tcp_url,
            "no database": server.tcp_url.replace("/0", "/99"),
            "odd database": server.tcp_url.replace("/0", "/main"),
            "odd setting": f"{server.tcp_url}?decode_responses=true",
            "no tls": f"rediss://127.0.0.1:{web.server_address[1]}/0",
            "no authority": server.tcp_url.replace("redis://", "rediss://") + "?ssl_ca_certs=/no/such.pem",
            "tls setting": f"{server.tcp_url}?ssl_ca_certs=/ca.pem",
            "cluster url": "redis+cluster://h:6379",
        }
        for impostor in (web, five, six):
            impostor.shutdown()


SENTENCES = {
    "nobody": "cannot be reached .* check the URL and that a Redis server runs there",
    "no host": "no-such-host.invalid:6379/0 cannot be reached",
    "no password": "refuses the password: put user and password into the URL",
    "wrong password": "refuses the password",
    "web server": "does not speak the Redis protocol: check host and port",
    "older": "is older than 6.2, the oldest that will do",
    "old": "is version 6.0.16, and 6.2 is the oldest that will do",
    "cluster": "is a cluster node, .* use a single server",
    "no database": "has no such database",
    "odd database": "the database is not a number",
    "odd setting": "unknown setting decode_responses",
    "no tls": "TLS failed .* check certificate and that the port speaks TLS",
    "no authority": "a certificate file named in the URL .* cannot be read",
    "tls setting": "ssl_ca_certs means nothing without TLS: use rediss://",
    "cluster url": "use redis://host:6379/0",
}


@pytest.fixture
def handlers() -> Iterator[None]:
    """Commands set signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("what", SENTENCES)
def test_every_command_refuses_in_one_sentence(
    urls: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "b"}\n')
    monkeypatch.chdir(tmp_path)
    lines: list[tuple[click.Command, list[str]]] = [
        (embed_submit, ["c.jsonl", "-o", "out", "--model", MODEL]),
        (worker, ["--model", MODEL]),
        (status, []),
        (cancel, ["0123456789abcdef"]),
    ]
    for command, arguments in lines:
        monkeypatch.setattr("sys.argv", [str(command.name), *arguments, "--redis", urls[what]])
        with pytest.raises(SystemExit) as caught:
            commands.run(command)
        said = capsys.readouterr()
        assert caught.value.code == 2, said.err
        assert re.search(SENTENCES[what], said.err), said.err
        assert said.err.count("\n") == 1, said.err
        assert SECRET not in said.err
        assert "wr0ng-pass" not in said.err
    assert not (tmp_path / "out").exists()


def test_a_job_through_tls(server: OwnServer, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 500)
    with tls_proxy(server.port, tmp_path) as (port, authority):
        url = f"rediss://127.0.0.1:{port}/1?ssl_ca_certs={authority}"
        with fleet(url, tmp_path) as workers:
            workers.start_worker()
            done = run("embed-submit", tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", url, "--model", MODEL)
            assert done.returncode == 0, done.stderr
            assert run("embed-status", "--redis", url).returncode == 0
            with Client(url) as client:
                assert client.embed(["now"], model=MODEL).shape == (1, 384)
        stranger = run("embed-status", "--redis", url.partition("?")[0])
        assert stranger.returncode == 2
        assert "TLS failed" in stranger.stderr
        assert "Traceback" not in stranger.stderr
    assert_exact(tmp_path / "out", texts)


def documented_user() -> str:
    """The ACL rule of docs/operations.md, for one queue."""
    text = OPERATIONS.read_text().replace("\\\n", "")
    (rule,) = re.findall(r"^ACL SETUSER embedstream (.*)$", text, re.MULTILINE)
    return str(rule).replace("QUEUE", MODEL)


def test_a_user_with_the_documented_rights_can_do_everything(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 2000)
    with own_server() as server:
        rule = documented_user().replace("PASSWORD", SECRET).split()
        server.client().execute_command("ACL", "SETUSER", "embedstream", *rule)
        server.client().execute_command("ACL", "SETUSER", "default", "off")
        url = server.tcp_url.replace("redis://", f"redis://embedstream:{SECRET}@")
        with fleet(url, tmp_path) as workers:
            process = workers.start_worker()
            base = ["--redis", url, "--model", MODEL, "--json"]
            for output in (str(tmp_path / "out"), "redis:?prefix=docs:&ttl=600"):
                done = run("embed-submit", tmp_path / "c.jsonl", "-o", output, *base)
                assert done.returncode == 0, done.stderr
                assert "Redis" not in done.stderr, "it complains of what it may not ask"
            job = json.loads(done.stdout)["job"]
            with Client(url) as client:
                assert sum(batch.num_rows for batch in client.job(job, output=output).results()) == 2000
                assert client.embed(["now"], model=MODEL).shape == (1, 384)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            begun = run("embed-submit", tmp_path / "c.jsonl", "-o", tmp_path / "two", *base, "--detach")
            second = json.loads(begun.stdout)["job"]
            assert run("embed-cancel", second, "--redis", url).returncode == 0
            assert second in run("embed-status", "--redis", url).stdout
            log = "".join(path.read_text() for path in tmp_path.glob("worker-*.log"))
            assert "NOPERM" not in log
            assert "WARNING" not in log, log
        denied = run("embed-submit", tmp_path / "c.jsonl", "-o", "redis:?prefix=other:", *base)
        assert denied.returncode == 2
        assert "Traceback" not in denied.stderr
    assert_exact(tmp_path / "out", texts, every=20)


def test_a_user_of_one_queue_can_do_nothing_to_another_and_is_not_disturbed_by_it(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 10)
    with own_server() as server:
        server.client().execute_command(
            "ACL", "SETUSER", "embedstream", *documented_user().replace("PASSWORD", SECRET).split()
        )
        url = server.tcp_url.replace("redis://", f"redis://embedstream:{SECRET}@")
        with Client(server.url, queue="theirs") as theirs:
            foreign = theirs.submit(["a text"], output=str(tmp_path / "theirs"), model=MODEL).id
        args = ["-o", tmp_path / "out", "--model", MODEL, "--detach"]
        done = run("embed-submit", tmp_path / "c.jsonl", *args, "--redis", url, "--json")
        assert done.returncode == 0, done.stderr
        waiting = start_submit(tmp_path / "c.jsonl", *args[:-1], "--redis", url)
        assert waiting.stderr is not None
        said = next(line for line in waiting.stderr if "waiting for a worker" in line)
        assert "no queue has one" in said
        waiting.kill()
        waiting.communicate()
        listed = run("embed-status", "--redis", url)
        assert listed.returncode == 0, listed.stderr
        assert json.loads(done.stdout)["job"] in listed.stdout
        assert "theirs" not in listed.stdout
        for command in ("embed-status", "embed-cancel"):
            for queue in ([], ["--queue", "theirs"]):
                refused = run(command, foreign, *queue, "--redis", url)
                assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        script = "return redis.call('del', ARGV[1])"
        with connect(url) as client, pytest.raises(redis.ResponseError, match="key"):
            client.eval(script, 0, f"embedstream:{{theirs}}:job:{foreign}")
        with Client(server.url) as theirs:
            assert theirs.job(foreign).status().submitted == 1


def test_a_server_that_may_lose_work_is_warned_of_at_the_start(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 50)
    with own_server("--maxmemory-policy", "allkeys-lru", "--appendonly", "no") as server:
        with fleet(server.url, tmp_path) as workers:
            workers.start_worker()
            args = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", server.url, "--model", MODEL]
            said = run("embed-submit", *args).stderr
            log = (tmp_path / "worker-0.log").read_text()
        for text in (said, log):
            assert "has maxmemory-policy allkeys-lru: when its memory is full it may throw away jobs" in text
            assert "keeps nothing on disk: when it restarts, its jobs are gone" in text
        client = server.client()
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("save", "900 1")
        assert shortcomings(client, server.url) == []


def test_nothing_is_said_where_config_is_forbidden() -> None:
    with own_server("--maxmemory-policy", "allkeys-lru", "--rename-command", "CONFIG", "") as server:
        assert shortcomings(server.client(), server.url) == []
    with own_server("--maxmemory-policy", "allkeys-lru") as server:
        server.client().execute_command("ACL", "SETUSER", "few", "on", ">x", "~*", "+@all", "-config")
        url = server.tcp_url.replace("redis://", "redis://few:x@")
        with connect(url) as client:
            assert shortcomings(client, url) == []


def test_a_full_server_drains_and_every_row_comes_out(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 8_000)
    with own_server("--maxmemory-policy", "noeviction") as server, fleet(server.url, tmp_path) as workers:
        client = server.client()
        args = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", server.url, "--model", MODEL, "--json"]
        submit = start_submit(*args, EMBEDSTREAM_QUEUE_BYTES=str(400_000))
        wait_until(lambda: int(client.get(workers.broker.keys.bytes) or 0) > 350_000, "a full queue")
        # Now somebody else takes what the rest of the queue would need.
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 100_000)
        with pytest.raises(redis.OutOfMemoryError):
            client.set("more", b"x", ex=60)
        workers.start_worker(wait=False)
        out, err = submit.communicate(timeout=120)
        assert submit.returncode == 0, err
        assert json.loads(out)["rows"] == 8_000
        client.set("more", b"x", ex=60)
    assert_exact(tmp_path / "out", texts, every=50)
