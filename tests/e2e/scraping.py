"""Asking a process for its metrics and probes over HTTP, as Prometheus and Kubernetes do."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from e2e.harness import wait_until


def logged_url(log: Path) -> str:
    """Where a worker that was told port 0 serves, without `/metrics`."""
    found = wait_until(lambda: re.search(r"metrics at (http\S+)/metrics", log.read_text()), f"an address in {log}")
    return str(found[1])


def get(url: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(url: str) -> dict[str, Metric]:
    """Families by name, as Prometheus' own parser reads them."""
    status, text = get(f"{url}/metrics")
    assert status == 200, text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The one sample of this name that has these labels."""
    samples = [sample for family in families.values() for sample in family.samples if sample.name == name]
    (found,) = [sample for sample in samples if labels.items() <= sample.labels.items()]
    return float(found.value)
