from __future__ import annotations

import re
from pathlib import Path

from embedstream.metrics import metrics
from embedstream.metrics.metrics import GATEWAY_METRICS, QUEUE_METRICS, WORKER_METRICS, Metric, metrics_table

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_the_operations_page_has_every_metric_as_it_is() -> None:
    page = DOCS.read_text()
    for table in (metrics_table(WORKER_METRICS), metrics_table(QUEUE_METRICS), metrics_table(GATEWAY_METRICS)):
        assert table in page, "put in what `python -m embedstream.metrics.metrics` prints"
    packages = {f"embedstream_{name}" for name in ("producer", "worker", "coordinator", "gateway")}
    named = set(re.findall(r"embedstream_[a-z_]+", page)) - packages
    assert named == {metric.name for metric in (*WORKER_METRICS, *QUEUE_METRICS, *GATEWAY_METRICS)}


def test_every_metric_of_the_module_is_in_a_table() -> None:
    declared = {value.name for value in vars(metrics).values() if isinstance(value, Metric)}
    assert declared == {metric.name for metric in (*WORKER_METRICS, *QUEUE_METRICS, *GATEWAY_METRICS)}


def test_names_follow_the_conventions() -> None:
    for metric in (*WORKER_METRICS, *QUEUE_METRICS, *GATEWAY_METRICS):
        assert re.fullmatch(r"embedstream_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mib|percent)(_|$)", metric.name)
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(metric.buckets)
        assert metric.help.endswith(".")
