"""Objects in S3, or in a store that speaks its protocol: addresses, connections, and what to say when one fails.

Credentials are the environment's (AWS_ACCESS_KEY_ID and its kin, ~/.aws, the machine's role), never part of an address.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from embedstream.errors import UsageError
from embedstream.masking import mask

if TYPE_CHECKING:
    from pyarrow.fs import S3FileSystem

SCHEME = "s3://"

CONNECT_SECONDS = 5.0
ATTEMPTS = 3
"""With pauses in between: a second or two of trouble pass unseen, and nobody waits longer to hear of it."""

_SETTINGS = ("endpoint_override", "region", "scheme")

_PERMISSIONS = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "HeadObject": "s3:GetObject and s3:ListBucket",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
}
"""What each operation needs, as policies spell it."""

_REFUSED = re.compile(
    r"AWS Error (?P<code>[A-Z_]+)(?: \([^)]*\))? during (?P<operation>\w+) operation: (?P<detail>.*)", re.S
)
_CREDENTIALS = ("INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID", "UNRECOGNIZED_CLIENT")


@dataclass(frozen=True)
class ObjectAddress:
    """A key, or the beginning of keys, in a bucket."""

    bucket: str
    key: str
    """Without a slash at its beginning or end; empty: the whole bucket."""
    endpoint: str | None = None
    """host[:port] of a store that is not AWS' own; None: what AWS_ENDPOINT_URL says, if it is set."""
    scheme: str = "https"
    """How to speak to `endpoint`."""
    region: str | None = None

    @property
    def url(self) -> str:
        """The canonical spelling; equal for equal places."""
        return self.child("")

    @property
    def path(self) -> str:
        """As Arrow's file system calls it."""
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    def sibling(self, suffix: str) -> str:
        """The address of the key that is this one and a suffix."""
        return replace(self, key=f"{self.key}{suffix}").url

    def child(self, name: str) -> str:
        """The address of a key below this one; of this one for an empty name."""
        settings = {
            "endpoint_override": self.endpoint,
            "region": self.region,
            "scheme": self.scheme if self.scheme != "https" else None,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        query = f"?{urlencode(given, safe=':/', quote_via=quote)}" if given else ""
        return f"{SCHEME}{'/'.join(filter(None, (self.path, name)))}{query}"


def is_object(address: str) -> bool:
    """Whether an input, output or root lies in an object store."""
    return address[: len(SCHEME)].lower() == SCHEME


def parse_object(text: str, what: str, *, whole_bucket: bool = False) -> ObjectAddress:
    """Read `s3://bucket/key?endpoint_override=host:port&scheme=http&region=name`; `what` it is, for messages.

    Raises:
        UsageError: it cannot be used; the message shows no credentials.
    """
    place, _, query = text[len(SCHEME) :].partition("?")
    bucket, _, key = place.partition("/")
    if "@" in bucket:
        raise UsageError(
            f"{what} {SCHEME}…@{bucket.rpartition('@')[2]}: an address holds no credentials: "
            f"give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    settings = dict(parse_qsl(query, keep_blank_values=True))
    unknown = set(settings) - set(_SETTINGS)
    shown = f"{what} {mask(SCHEME + ''.join(c if c.isprintable() else '?' for c in place))}"
    if unknown:
        raise UsageError(f"{shown}: unknown setting {min(unknown)}: known are {', '.join(_SETTINGS)}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        raise UsageError(f"{shown}: this is no bucket's name: write {SCHEME}bucket/name")
    key = key.strip("/")
    if not key and not whole_bucket:
        raise UsageError(f"{shown}: names a bucket and no key: write {SCHEME}{bucket}/name")
    if (key and any(part in ("", ".", "..") for part in key.split("/"))) or not key.isprintable():
        raise UsageError(f"{shown}: keys with empty or dotted parts cannot be used: take another name")
    endpoint = settings.get("endpoint_override") or None
    scheme = settings.get("scheme") or "https"
    if endpoint is not None and "://" in endpoint:
        scheme, _, endpoint = endpoint.partition("://")
    if scheme not in ("http", "https") or (endpoint is None and "scheme" in settings):
        raise UsageError(f"{shown}: scheme is http or https, and goes with endpoint_override=host:port")
    if endpoint is not None and not re.fullmatch(r"[A-Za-z0-9.\[\]:_-]+", endpoint := endpoint.rstrip("/")):
        raise UsageError(f"{shown}: endpoint_override is not host:port")
    return ObjectAddress(bucket, key, endpoint, scheme, settings.get("region") or None)


def file_system(address: ObjectAddress, environ: Mapping[str, str] = os.environ) -> S3FileSystem:
    """Arrow's file system for a bucket. One for all addresses alike; may be shared between threads.

    Raises:
        OSError: the bucket's region is unknown, and AWS cannot be asked; see `explain_object`.
        UsageError: AWS_ENDPOINT_URL is no URL.
    """
    endpoint, scheme = endpoint_of(address, environ)
    region = address.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or None
    if region is None and endpoint is None:
        region = _region(address.bucket)
    return _file_system(endpoint, scheme, region)


def endpoint_of(address: ObjectAddress, environ: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """host[:port] and scheme of the store, by the address or else the environment; None: AWS' own.

    Raises:
        UsageError: AWS_ENDPOINT_URL is no URL.
    """
    # Arrow looks at these only when it reads an address itself.
    url = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    if address.endpoint is not None or not url:
        return address.endpoint, address.scheme
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError("AWS_ENDPOINT_URL is no URL: write http://host:port or https://host")
    return parts.netloc.rpartition("@")[2], parts.scheme


@functools.cache
def _file_system(endpoint: str | None, scheme: str, region: str | None) -> S3FileSystem:
    # Not at the top: it starts the machinery of AWS' library, which few jobs need.
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    # The stubs do not know them all.
    options: dict[str, Any] = {
        "endpoint_override": endpoint,
        "scheme": scheme,
        "region": region,
        "connect_timeout": CONNECT_SECONDS,
        "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        # Of an upload that could not even begin, a delayed one would put an empty object there when it is dropped.
        "allow_delayed_open": False,
    }
    return S3FileSystem(**options)


@functools.cache
def _region(bucket: str) -> str:
    from pyarrow.fs import resolve_s3_region

    return resolve_s3_region(bucket)


def explain_object(address: ObjectAddress, error: OSError) -> str:
    """Why an operation failed and what to do, in half a sentence that follows the address and a colon."""
    if isinstance(error, FileNotFoundError):
        return "there is no such object: check bucket and key"
    found = _REFUSED.search(str(error))
    if found is None:
        return str(error)
    code, operation = found["code"], found["operation"]
    detail = re.sub(r" ?\(Request ID: [^)]*\)", "", found["detail"]).strip()
    match code:
        case "NETWORK_CONNECTION":
            why = detail.rpartition("Details: ")[2]
            return f"the store cannot be reached ({why}): check the network, the region and AWS_ENDPOINT_URL"
        case "NO_SUCH_BUCKET":
            return f"there is no bucket {address.bucket}: create it, or correct the name"
        case "ACCESS_DENIED":
            needed = _PERMISSIONS.get(operation, operation)
            return f"permission denied: the credentials (AWS_ACCESS_KEY_ID, …) must allow {needed} there"
        case _ if code in _CREDENTIALS:
            return "the store does not know the credentials: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        case _:
            return f"the store answered {code} to {operation} ({detail})"
