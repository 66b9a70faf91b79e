"""What is shown of addresses: never a password, also where the address is wrong; and as much else as can be."""

from __future__ import annotations

import logging
import sys

import pytest

from embedstream.cli.logs import JsonFormatter
from embedstream.dataset.sinks import canonical_output
from embedstream.errors import OutputError, UsageError
from embedstream.masking import mask, mask_text
from embedstream.server.connection import connect
from embedstream.terminal import PrintableFormatter

ADDRESSES = [
    "redis://:{}@h:6379/0",
    "redis://me:{}@h:6379/0",
    "redis://{}@h",
    "redis://me:{}@",
    "rediss://:a/{}@h:6379/0",
    "redis://:12/{}@h:6379/0",
    "redis://:12?{}@h:6379/0",
    "redis://:12#{}@h:6379/0",
    "redis://:a@{}@h:6379/0",
    "redis://:a:{}@h:6379/0",
    "redis://:a%2F{}%40@h:6379/0",
    "redis://:[{}@h:6379/0",
    "redis://:{}",
    "redis://me:a/{}",
    "redis://h/0?password={}",
    "redis://h/0?db=1&PassWord={}&prefix=d:",
    "redis://h/0?p%61ssword={}",
    "redis://h/0?password=a@{}",
    "redis://h/0?auth_token={}",
    "redis://h/0?prefix=d:&db={}",
    "redis://h:6379/{}?prefix=d:",
    "redis://h:6379/0/{}",
    "redis:/:{}@h:6379/0",
    "unix://:{}@/run/redis.sock",
    "unix://me:a/{}@/run/redis.sock",
    "unix:///run/redis.sock?password={}",
    "s3://KEY:{}@bucket/key",
    "s3://KEY:SEC/{}@bucket/key",
    "s3://bucket/key?secret_key={}",
    "s3://bucket/key?X-Amz-Security-Token={}",
    "http://me:{}@proxy:80",
]
"""With a password in each: {}."""

SECRET = "hunter2"


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_password_is_shown_however_wrong_its_address(address: str) -> None:
    url = address.format(SECRET)
    for text in (mask(url), mask(f"--redis={url}"), mask_text(f"cannot reach '{url}': try again"), mask_text(url)):
        assert SECRET not in text, text


@pytest.mark.parametrize(
    "address",
    [
        "redis://h:6379/0",
        "redis://localhost",
        "redis://[::1]:6379/1?db=2",
        "redis:?prefix=docs:&ttl=86400",
        "rediss://h:1/0?ssl_ca_certs=/etc/ca.pem&ssl_keyfile=/k&prefix=docs:",
        "unix:///tmp/my redis.sock?db=0",
        "s3://bucket/a/b?endpoint_override=h:9000&scheme=http",
        "/data/a@b/out",
        "word",
        "",
    ],
)
def test_what_holds_no_password_is_shown_as_it_is(address: str) -> None:
    assert mask(address) == address
    assert mask_text(f"{address}: wrong ({address})") == f"{address}: wrong ({address})"


@pytest.mark.parametrize("text", ["a" * 10**6, f"a://{':' * 10**6}x", "?&" * 10**6], ids=["word", "colons", "settings"])
def test_what_others_wrote_costs_no_time_however_long(text: str) -> None:
    mask_text(text)
    mask(f"redis://{text}")


def test_user_server_and_prefix_of_a_well_formed_address_are_shown() -> None:
    assert mask(f"redis://me:{SECRET}@h:6379/0?prefix=docs:") == "redis://me:***@h:6379/0?prefix=docs:"
    assert mask_text("put it into the URL (redis://:PASSWORD@host)") == "put it into the URL (redis://:PASSWORD@host)"


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_cannot_be_used_is_refused_without_its_password(address: str) -> None:
    url = address.format(SECRET)
    said = []
    for use in (connect, canonical_output):
        try:
            use(url)
        except UsageError as error:
            said.append(str(error))
    assert SECRET not in " ".join(said)


def test_errors_and_logs_of_whatever_kind_hide_passwords() -> None:
    url = f"redis://:{SECRET}@h:6379/0"
    assert SECRET not in str(OutputError(f"{url}: full"))
    try:
        raise ConnectionError(f"no route to {url}")
    except ConnectionError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "lost %s", (url,), sys.exc_info())
    for formatter in (PrintableFormatter(), JsonFormatter()):
        line = formatter.format(record)
        assert "no route to redis://:***@h:6379/0" in line
        assert SECRET not in line


def test_the_revision_of_a_data_set_is_no_secret() -> None:
    address = "hf://datasets/owner/some.name@refs%2Fconvert%2Fparquet/data/part.parquet"
    assert mask(address) == address
    assert mask("hf://user:secret@host/datasets") == "hf://user:***@host/datasets"
