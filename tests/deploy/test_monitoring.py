"""Alert rules, the dashboard and what is scraped: every expression parses, and every metric in it exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from deploy.compose_lab import write_env
from deploy.images import REPOSITORY, services
from embedstream.metrics import metrics

PROMETHEUS = REPOSITORY / "deploy" / "prometheus"
GRAFANA = REPOSITORY / "deploy" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "embedstream.json"

SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds to whatever it scrapes."""


def series() -> dict[str, set[str]]:
    """Every time series that is exposed, and its labels."""
    found: dict[str, set[str]] = {}
    for metric in (*metrics.WORKER_METRICS, *metrics.QUEUE_METRICS):
        labels = {*metric.labels, *SCRAPED}
        if metric.kind == "histogram":
            found |= {f"{metric.name}_{end}": labels for end in ("sum", "count")}
            found[f"{metric.name}_bucket"] = {*labels, "le"}
        else:
            found[metric.name] = labels
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return read


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    scaled = yaml.safe_load((REPOSITORY / "deploy" / "kubernetes" / "keda" / "scaledobject.yaml").read_text())
    for trigger in scaled["spec"]["triggers"]:
        yield "scaledobject", trigger["metadata"]["query"]


def nodes(node: Any, kind: type) -> Iterator[Any]:
    """Every node of a kind in a syntax tree."""
    if isinstance(node, kind):
        yield node
    below = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    for inner in (*below, *(getattr(node, "args", None) or ())):
        if inner is not None and not isinstance(inner, str | float):
            yield from nodes(inner, kind)


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_metric_and_label_that_is_asked_for_exists(where: str, expression: str) -> None:
    known = series()
    tree = promql_parser.parse(expression)
    found = list(nodes(tree, promql_parser.VectorSelector))
    assert {each.name for each in found} == set(re.findall(r"embedstream_\w+", expression)), where
    assert found
    for selector in found:
        assert selector.name in known, where
        assert {matcher.name for matcher in selector.matchers.matchers} <= known[selector.name], where
    for aggregate in nodes(tree, promql_parser.AggregateExpr):
        for selector in nodes(aggregate.expr, promql_parser.VectorSelector):
            assert set(aggregate.modifier.labels if aggregate.modifier else ()) <= known[selector.name], where


def test_counters_are_only_asked_for_their_growth() -> None:
    for where, expression in expressions():
        for name in re.findall(r"(?:rate|increase)\((\w+)", expression):
            assert name.endswith(("_total", "_bucket", "_sum", "_count")), where
        grown = len(re.findall(r"(?:rate|increase)\(", expression))
        assert grown == len(re.findall(r"embedstream_\w+(?:_total|_bucket|_sum|_count)\b", expression)), where


def test_rules_cover_what_goes_wrong_and_say_what_to_do() -> None:
    named = {rule["alert"]: rule for rule in rules()}
    wanted = {"NoProgress", "ErrorsRising", "QueueAge", "WorkerLost", "NoWorker", "StalledJob", "RedisUnreachable"}
    assert set(named) == {f"Embedstream{name}" for name in wanted}
    for rule in named.values():
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not in any package of the index")
@pytest.mark.parametrize("command", [["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]])
def test_prometheus_own_tool_agrees(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_scrapes_what_compose_runs_where_it_serves(tmp_path: Path) -> None:
    running = services(write_env(tmp_path / "env", REDIS_PASSWORD="word"))
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    scraped = set()
    for job in config["scrape_configs"]:
        (discovery,) = job["dns_sd_configs"]
        for name in discovery["names"]:
            scraped.add(name)
            assert running[name]["environment"]["EMBEDSTREAM_METRICS_PORT"] == str(discovery["port"])
            assert running[name]["environment"]["EMBEDSTREAM_METRICS_HOST"] == "0.0.0.0"
    assert scraped == {name for name, said in running.items() if "METRICS_PORT" in str(said.get("environment"))}


def test_grafana_finds_its_dashboard_and_its_source(tmp_path: Path) -> None:
    grafana = services(write_env(tmp_path / "env", REDIS_PASSWORD="word"))["grafana"]
    mounted = {volume["target"]: Path(volume["source"]) for volume in grafana["volumes"]}
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert mounted[str(home.parent)] / home.name == DASHBOARD
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "embedstream.yml").read_text())["providers"]
    assert provider["options"]["path"] == str(home.parent)
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
