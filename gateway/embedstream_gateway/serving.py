"""One gateway process: where it listens, and until when."""

from __future__ import annotations

import logging
import socket
import ssl
import sys
from pathlib import Path

import uvicorn

from embedstream.cli.commands import on_signals
from embedstream.errors import UsageError
from embedstream.server.connection import connect, explaining
from embedstream.server.preflight import check
from embedstream_gateway.admission import is_loopback
from embedstream_gateway.app import Plan, make_app

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 16_384
"""Beyond it a connection is answered 503 at once."""

WAITING_CONNECTIONS = 2048
"""That are not accepted yet; the system may allow fewer."""

IDLE_SECONDS = 75
"""A connection on which nothing is asked for so long is closed: above what proxies keep theirs for."""

STOP_SECONDS = 30
"""For requests under way, once this is told to stop."""


def serve(plan: Plan, host: str, port: int, certificate: Path | None, key: Path | None) -> None:
    """Until it is told to stop.

    Raises:
        UsageError: it may not or cannot listen there.
        BrokerError: Redis cannot be used.
    """
    refuse_open_door(plan, host)
    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key go together: give both")
    if certificate is not None and key is not None:
        _check_certificate(certificate, key)
    elif not is_loopback(host):
        log.warning("no --tls-cert: keys and texts go in the clear, unless a proxy in front of this speaks TLS")
    with connect(plan.redis_url, retries=0) as client, explaining(plan.redis_url):
        check(client, plan.redis_url)
    config = uvicorn.Config(
        make_app(plan),
        ssl_certfile=certificate,
        ssl_keyfile=None if key is None else str(key),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    listener = listen(host, port)
    scheme, shown = "http" if certificate is None else "https", f"[{host}]" if ":" in host else host
    log.info("serving %s://%s:%d", scheme, shown, listener.getsockname()[1])
    # uvicorn has handlers of its own while it serves, and sends itself the signal once more when it has ended.
    on_signals(lambda: sys.exit(0), 1)
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket on which connections wait. Raises `UsageError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=WAITING_CONNECTIONS)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen at {host} port {port}: {why}: choose others (--host, --port)") from error


def refuse_open_door(plan: Plan, host: str) -> None:
    """Raise `UsageError` for a gateway that every machine could use."""
    if plan.keys is None and not is_loopback(host):
        raise UsageError(
            f"--host {host}: other machines can reach it, so it needs --api-key-file: `embed-serve --new-key NAME` "
            f"makes a line of that file"
        )


def _check_certificate(certificate: Path, key: Path) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--tls-cert {certificate}, --tls-key {key}: cannot be used: {error}") from error
