"""Addresses in object stores: their one spelling, which of them a root allows, and no credentials anywhere."""

from __future__ import annotations

import pytest

from embedstream.dataset.objects import endpoint_of, parse_object
from embedstream.dataset.roots import allows
from embedstream.dataset.sinks import canonical_output
from embedstream.errors import UsageError
from embedstream.jobs import job_id


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("S3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a b%20c", "s3://bucket/a b%20c"),
        (
            "s3://bucket/a?scheme=http&endpoint_override=host:9000",
            "s3://bucket/a?endpoint_override=host:9000&scheme=http",
        ),
        (
            "s3://bucket/a?endpoint_override=http%3A%2F%2Fhost:9000/",
            "s3://bucket/a?endpoint_override=host:9000&scheme=http",
        ),
        ("s3://bucket/a?endpoint_override=https://host", "s3://bucket/a?endpoint_override=host"),
        ("s3://bucket/a?region=eu-central-1", "s3://bucket/a?region=eu-central-1"),
    ],
)
def test_a_prefix_has_one_spelling(text: str, url: str) -> None:
    assert canonical_output(text) == url
    assert canonical_output(url) == url


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket", "names a bucket and no key: write s3://bucket/name"),
        ("s3:///key", "is no bucket's name"),
        ("s3://b_/../x", "empty or dotted parts"),
        ("s3://bucket/a//b", "empty or dotted parts"),
        ("s3://bucket/a\nb", "empty or dotted parts"),
        ("s3://AKIA:secret@bucket/a", "holds no credentials: give them as AWS_ACCESS_KEY_ID"),
        ("s3://bucket/a?access_key=AKIA&secret_key=secret", "unknown setting access_key"),
        ("s3://bucket/a?scheme=http", "goes with endpoint_override"),
        ("s3://bucket/a?endpoint_override=host&scheme=ftp", "scheme is http or https"),
        ("s3://bucket/a?endpoint_override=u:secret@host", "endpoint_override is not host:port"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_sentence_without_credentials(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        canonical_output(text)
    assert "secret@" not in str(caught.value)
    assert "=secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vectors_lie_beside_their_corpus() -> None:
    corpus = parse_object("s3://bucket/a/c.jsonl?region=x", "corpus")
    assert corpus.sibling(".vectors") == "s3://bucket/a/c.jsonl.vectors?region=x"


def test_a_child_lies_before_the_settings() -> None:
    address = parse_object("s3://bucket/a?region=x", "output")
    assert address.child("_errors.jsonl") == "s3://bucket/a/_errors.jsonl?region=x"


def test_the_endpoint_of_the_environment_is_for_addresses_that_name_none() -> None:
    environ = {"AWS_ENDPOINT_URL": "http://user:secret@store:9000", "AWS_ENDPOINT_URL_S3": ""}
    assert endpoint_of(parse_object("s3://bucket/a", "output"), environ) == ("store:9000", "http")
    own = parse_object("s3://bucket/a?endpoint_override=other", "output")
    assert endpoint_of(own, environ) == ("other", "https")
    assert endpoint_of(parse_object("s3://bucket/a", "output"), {}) == (None, "https")
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL is no URL"):
        endpoint_of(parse_object("s3://bucket/a", "output"), {"AWS_ENDPOINT_URL": "store:9000"})


@pytest.mark.parametrize(
    ("root", "output", "allowed"),
    [
        ("s3://bucket/a", "s3://bucket/a", True),
        ("s3://bucket/a", "s3://bucket/a/b", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket", "s3://bucket/ab", True),
        ("s3://bucket", "s3://bucket2/ab", False),
        ("s3://bucket/a?region=x", "s3://bucket/a/b", True),
        ("s3://bucket/a", "s3://bucket/a?endpoint_override=elsewhere", False),
        ("s3://bucket/a?endpoint_override=h", "s3://bucket/a?endpoint_override=h&scheme=http", False),
        ("s3://bucket/a?endpoint_override=h", "s3://bucket/a/b?endpoint_override=h", True),
        ("/", "s3://bucket/a", False),
        ("redis:", "s3://bucket/a", False),
        ("s3://bucket", "/bucket/a", False),
    ],
)
def test_a_root_allows_its_own_store_and_what_lies_below_it(root: str, output: str, allowed: bool) -> None:
    assert allows([root], output) is allowed


def test_jobs_of_equal_prefixes_are_one_job() -> None:
    assert job_id("q", canonical_output("s3://bucket/a/")) == job_id("q", canonical_output("s3://bucket/a"))
