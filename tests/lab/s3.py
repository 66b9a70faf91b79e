"""A server that speaks the S3 protocol, for tests: a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
from botocore.config import Config

START_SECONDS = 60.0

ADMIN = {"AWS_ACCESS_KEY_ID": "admin", "AWS_SECRET_ACCESS_KEY": "secret-of-admin"}


class S3Server:
    """moto's server on a port of its own. A context manager."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._records = tempfile.TemporaryDirectory(prefix="es-s3-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MOTO_RECORDER_FILEPATH": f"{self._records.name}/requests"},
        )

    def __enter__(self) -> S3Server:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self._process.poll() is None, "the S3 server has ended"
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return self
        raise AssertionError("the S3 server does not answer")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._records.cleanup()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to work with the server."""
        return {**ADMIN, "AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "us-east-1"}

    def client(self, service: str = "s3") -> Any:
        """An independent client: no part of what is tested."""
        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=ADMIN["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=ADMIN["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
        )

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))

    def unfinished_uploads(self, bucket: str) -> list[str]:
        return [upload["Key"] for upload in self.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ())]

    def user(self, name: str, *allowed: str) -> dict[str, str]:
        """The environment of a user who may do only these actions. From here on permissions are checked."""
        iam = self.client("iam")
        iam.create_user(UserName=name)
        self.allow(name, *allowed)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        self.check_permissions(True)
        given = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
        return {**self.environment, **given}

    def allow(self, name: str, *allowed: str) -> None:
        """A user may do only these actions from here on."""
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": list(allowed), "Resource": "*"}]}
        document = str(policy).replace("'", '"')
        self.client("iam").put_user_policy(UserName=name, PolicyName="only", PolicyDocument=document)

    def check_permissions(self, check: bool) -> None:
        """Whether the server looks at who asks."""
        self._order("reset-auth", b"0" if check else b"inf")

    @contextlib.contextmanager
    def requests(self) -> Iterator[list[str]]:
        """The methods of what is asked of objects meanwhile, once it is over."""
        methods: list[str] = []
        self._order("recorder/reset-recording")
        self._order("recorder/start-recording")
        yield methods
        self._order("recorder/stop-recording")
        with urllib.request.urlopen(f"{self.url}/moto-api/recorder/download-recording") as recording:
            methods += [json.loads(line)["method"] for line in recording.read().splitlines()]

    def _order(self, what: str, data: bytes = b"") -> None:
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.url}/moto-api/{what}", data, headers, method="POST")
        urllib.request.urlopen(request).close()
