"""The manifests as kustomize renders them, against the schemas of Kubernetes and of KEDA."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import redis
import redis.exceptions
import yaml
from e2e.harness import wait_until
from lab.redis_servers import free_port

from deploy.images import REPOSITORY, Dockerfile, tool
from embedstream.jobs import DEFAULT_MODEL, queue_name
from embedstream.metrics import metrics
from embedstream.server.connection import connect

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
FOLDERS = (".", "gpu", "base")
VERSIONS = ("1.29", "1.37")
CRD = Path(__file__).parent / "schemas" / "keda.sh_scaledobjects.yaml"
"""Of KEDA, as it is installed in a cluster."""

Manifest = dict[str, Any]


@functools.cache
def rendered(folder: str) -> str:
    command = [tool("kubectl"), "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "deprecated" not in done.stderr, done.stderr
    return done.stdout


def render(folder: str) -> list[Manifest]:
    """`kubectl apply -k` without the cluster."""
    return list(yaml.safe_load_all(rendered(folder)))


def all_manifests() -> list[Manifest]:
    return [*render("."), yaml.safe_load((KUBERNETES / "submit.yaml").read_text())]


def the(kind: str, name: str, folder: str = ".") -> Manifest:
    (found,) = [each for each in render(folder) if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def container(manifest: Manifest) -> Manifest:
    (found,) = manifest["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def scaled_object_schema() -> Any:
    """The CRD's schema, in which what is not named is refused."""
    (version,) = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"]["additionalProperties"] = True
    return closed(schema)


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items()}
    if isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    return made


def check(manifest: Manifest, version: str) -> None:
    """Raises if a schema does not know it so."""
    if manifest["apiVersion"].startswith("keda.sh/"):
        jsonschema.validate(manifest, scaled_object_schema())
    else:
        named = copy.deepcopy(manifest)
        named["metadata"].setdefault("name", named["metadata"].pop("generateName", ""))
        kubernetes_validate.validate(named, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_is_what_kubernetes_knows(folder: str, version: str) -> None:
    manifests = render(folder)
    assert {"Deployment", "StatefulSet", "Service", "ConfigMap"} <= {each["kind"] for each in manifests}
    for manifest in manifests:
        check(manifest, version)


def test_the_job_that_submits_is_what_kubernetes_knows() -> None:
    check(yaml.safe_load((KUBERNETES / "submit.yaml").read_text()), VERSIONS[-1])


def test_a_field_that_nobody_knows_is_found() -> None:
    deployment, scaled = the("Deployment", "worker"), the("ScaledObject", "worker")
    deployment["spec"]["template"]["spec"]["terminationGrace"] = 40
    with pytest.raises(jsonschema.ValidationError):
        check(deployment, VERSIONS[-1])
    scaled["spec"]["coolDownPeriod"] = 900
    with pytest.raises(jsonschema.ValidationError):
        check(scaled, VERSIONS[-1])


def test_the_kustomization_of_the_docs_makes_a_fleet_of_ones_own(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "deploy.md").read_text()
    (block,) = re.findall(r"```yaml\n(# kustomization.yaml\n.*?)```", page, flags=re.DOTALL)
    (tmp_path / "kustomization.yaml").write_text(block)
    shutil.copytree(KUBERNETES, tmp_path / "embedstream" / "deploy" / "kubernetes")
    done = subprocess.run([tool("kubectl"), "kustomize", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {
        (each["kind"], each["metadata"]["name"].partition("-")[0]): each for each in yaml.safe_load_all(done.stdout)
    }
    for manifest in made.values():
        check(manifest, VERSIONS[-1])
    model = made["ConfigMap", "embedstream"]["data"]["EMBEDSTREAM_MODEL"]
    assert f'"{queue_name(model)}"' in made["ScaledObject", "worker"]["spec"]["triggers"][0]["metadata"]["query"]
    assert container(made["Deployment", "worker"])["image"] == "images.example/worker-cuda:1"
    config = container(made["Deployment", "worker"])["envFrom"][0]["configMapRef"]["name"]
    assert config == made["ConfigMap", "embedstream"]["metadata"]["name"]


def test_every_file_is_used() -> None:
    used = {KUBERNETES / "submit.yaml"}
    for kustomization in KUBERNETES.rglob("kustomization.yaml"):
        said = yaml.safe_load(kustomization.read_text())
        names = [*said.get("resources", []), *(patch["path"] for patch in said.get("patches", []))]
        used |= {kustomization, *(kustomization.parent / name for name in names)}
    assert {path for path in KUBERNETES.rglob("*") if path.is_file()} <= used


def test_all_is_in_one_namespace() -> None:
    for manifest in all_manifests():
        if manifest["kind"] == "Namespace":
            assert manifest["metadata"]["name"] == "embedstream"
        else:
            assert manifest["metadata"]["namespace"] == "embedstream"


def test_what_is_referred_to_exists() -> None:
    manifests = all_manifests()
    names = {(each["kind"], each["metadata"].get("name")) for each in manifests}
    for manifest in manifests:
        template = manifest["spec"].get("template") if manifest["kind"] != "ConfigMap" and "spec" in manifest else None
        for volume in template["spec"].get("volumes", []) if template else []:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
        for source in container(manifest).get("envFrom", []) if template else []:
            assert ("ConfigMap", source["configMapRef"]["name"]) in names
    assert ("Deployment", the("ScaledObject", "worker")["spec"]["scaleTargetRef"]["name"]) in names
    selector = the("Service", "redis")["spec"]["selector"].items()
    assert selector <= the("StatefulSet", "redis")["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", ["worker", "coordinator"])
def test_probes_ask_the_port_at_which_metrics_are_served(name: str) -> None:
    said = container(the("Deployment", name))
    env = {each["name"]: each.get("value") for each in said["env"]}
    (port,) = said["ports"]
    annotations = the("Deployment", name)["spec"]["template"]["metadata"]["annotations"]
    assert str(port["containerPort"]) == env["EMBEDSTREAM_METRICS_PORT"] == annotations["prometheus.io/port"]
    assert env["EMBEDSTREAM_METRICS_HOST"] == "0.0.0.0"
    assert (said["readinessProbe"]["httpGet"], said["livenessProbe"]["httpGet"]) == (
        {"path": "/readyz", "port": port["name"]},
        {"path": "/healthz", "port": port["name"]},
    )


def test_a_gateway_listens_where_its_probes_its_service_and_prometheus_ask_and_has_keys() -> None:
    deployment, service = the("Deployment", "gateway"), the("Service", "gateway")
    said, template = container(deployment), deployment["spec"]["template"]
    env = {each["name"]: each.get("value") for each in said["env"]}
    (port,) = said["ports"]
    annotations = template["metadata"]["annotations"]
    assert str(port["containerPort"]) == env["EMBEDSTREAM_SERVE_PORT"] == annotations["prometheus.io/port"]
    assert said["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
    assert [each["targetPort"] for each in service["spec"]["ports"]] == [port["name"]]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert env["EMBEDSTREAM_API_KEY_FILE"].startswith("/keys/")
    assert {"name": "keys", "secret": {"secretName": "embedstream-api-keys"}} in template["spec"]["volumes"]


def test_a_worker_has_longer_to_stop_than_it_drains_and_minutes_to_start() -> None:
    template = the("Deployment", "worker")["spec"]["template"]["spec"]
    env = {each["name"]: each.get("value") for each in template["containers"][0]["env"]}
    assert template["terminationGracePeriodSeconds"] >= float(env["EMBEDSTREAM_DRAIN_SECONDS"]) + 10
    startup = template["containers"][0]["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


def test_only_workers_of_the_gpu_fleet_ask_for_a_device() -> None:
    assert container(the("Deployment", "worker", "gpu"))["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in container(the("Deployment", "worker", "base"))["resources"]["limits"]
    assert container(the("Deployment", "worker", "gpu"))["image"].startswith("embedstream/worker-cuda:")
    assert container(the("Deployment", "worker", "base"))["image"].startswith("embedstream/worker-cpu:")


def pods() -> list[Manifest]:
    """Every pod's template, of all folders."""
    made = [*all_manifests(), *render("gpu"), *render("base")]
    return [each["spec"]["template"] for each in made if "template" in each.get("spec", {})]


def test_pods_run_without_rights_and_as_the_image_does() -> None:
    user = int((Dockerfile().said("runtime", "USER") or "").split(":")[0])
    for template in pods():
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all("hostPath" not in volume for volume in pod.get("volumes", []))
        for inner in pod["containers"]:
            assert inner["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert inner["image"].startswith("redis:") or pod["securityContext"]["runAsUser"] == user
        assert not {"initContainers", "ephemeralContainers"} & set(pod)


def test_pods_are_bounded_in_memory_and_on_disk() -> None:
    for template in pods():
        for inner in template["spec"]["containers"]:
            assert inner["resources"]["limits"]["memory"]
            assert {"cpu", "memory"} <= set(inner["resources"]["requests"])
        for volume in template["spec"].get("volumes", []):
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]


def test_images_have_the_version_of_the_project_or_a_release_of_their_own() -> None:
    for template in pods():
        for inner in template["spec"]["containers"]:
            name, _, tag = inner["image"].partition(":")
            ours = name.startswith("embedstream/")
            assert tag == version("embedstream") if ours else re.match(r"\d+\.\d+\.\d+", tag), inner["image"]


def test_no_other_pod_is_let_into_the_namespace_with_more_rights() -> None:
    labels = the("Namespace", "embedstream")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def selects(selector: Manifest, template: Manifest) -> bool:
    labels = template["metadata"].get("labels", {})
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


def admitted(template: Manifest) -> dict[str, list[Manifest]]:
    """Who may connect to a pod, by the port's name."""
    found: dict[str, list[Manifest]] = {}
    for policy in render("."):
        if policy["kind"] == "NetworkPolicy" and selects(policy["spec"]["podSelector"], template):
            for rule in policy["spec"].get("ingress", []):
                for port in rule["ports"]:
                    found.setdefault(port["port"], []).extend(rule["from"])
    return found


def test_only_the_fleet_reaches_redis_and_only_monitoring_reaches_metrics() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in render("base") if each["kind"] == "NetworkPolicy"}
    assert policies["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    assert "egress" not in policies["redis"]
    assert "Egress" in policies["redis"]["policyTypes"]
    for template in pods():
        name = template["metadata"]["labels"]["app.kubernetes.io/name"]
        ports = {port["name"] for inner in template["spec"]["containers"] for port in inner.get("ports", [])}
        told = admitted(template)
        assert set(told) == ports
        for peer in told.get("redis", []):
            assert "namespaceSelector" not in peer
            reached = {
                other["metadata"]["labels"]["app.kubernetes.io/name"]
                for other in pods()
                if selects(peer["podSelector"], other)
            }
            assert reached == {"coordinator", "gateway", "submit", "worker"}
        for peer in told.get("metrics", []):
            assert peer == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}, name


def test_redis_starts_as_the_manifest_says_with_its_password_in_no_list_of_processes(tmp_path: Path) -> None:
    inner = container(the("StatefulSet", "redis", "base"))
    port = free_port()
    where = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    path = f"{Path(tool('redis-server')).parent}{os.pathsep}{os.environ['PATH']}"
    server = subprocess.Popen(
        [*inner["command"], *inner["args"], *where],
        env={"PATH": path, "REDISCLI_AUTH": "s3cretWord"},
        stdout=subprocess.DEVNULL,
    )
    try:
        url = f"redis://:s3cretWord@127.0.0.1:{port}/0"

        def answers() -> bool:
            with contextlib.suppress(redis.ConnectionError):
                return bool(connect(url, retries=0).ping())
            return False

        wait_until(answers, "Redis")
        client: Any = connect(url)
        names = ("appendonly", "maxmemory-policy", "proto-max-bulk-len", "maxmemory")
        told = [client.config_get(name)[name] for name in names]
        assert told == ["yes", "noeviction", str(64 << 20), str(2 << 30)]
        for command in ("FLUSHALL", "CONFIG SET dir /tmp"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
        with pytest.raises(redis.AuthenticationError):
            connect(url.replace("s3cretWord", "wrong")).ping()
        assert b"s3cretWord" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
    finally:
        server.kill()
        server.wait()


def test_images_are_targets_of_the_dockerfile() -> None:
    targets = set(Dockerfile().parents)
    for manifest in [*all_manifests(), *render("base")]:
        if manifest["kind"] in ("Deployment", "Job"):
            name, _, _ = container(manifest)["image"].removeprefix("embedstream/").partition(":")
            assert name in targets


def test_the_autoscaler_asks_for_the_queue_of_the_configured_model_in_metrics_that_exist() -> None:
    (config,) = [each for each in render(".") if each["kind"] == "ConfigMap"]
    assert config["data"]["EMBEDSTREAM_MODEL"] == DEFAULT_MODEL
    spec = the("ScaledObject", "worker")["spec"]
    (trigger,) = spec["triggers"]
    query = trigger["metadata"]["query"]
    assert f'queue="{queue_name(DEFAULT_MODEL)}"' in query
    assert metrics.QUEUE_TOKENS.name in query
    assert metrics.QUEUE_PACE.name in query
    assert trigger["metadata"]["ignoreNullValues"] == "false", "or workers go when Prometheus does"
    assert spec["minReplicaCount"] == 0
    assert spec["cooldownPeriod"] >= 600
