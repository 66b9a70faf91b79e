"""The compose file: read by compose itself, and every service's command run as a process of this machine."""

from __future__ import annotations

import json
import re
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import redis.exceptions
from e2e.harness import assert_exact, wait_until, write_corpus
from lab.s3 import S3Server
from lab_engines import faulty

from deploy.compose_lab import Container, Stack, seconds, stack, write_env
from deploy.images import REPOSITORY, compose, services
from embedstream.metrics import metrics
from embedstream.server.connection import connect
from embedstream_gateway.api_keys import make_key

SLOW = "[[fault:slow]]"
"""0.2 s of a worker's time in each text that holds it."""


@pytest.fixture(scope="module")
def env_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_env(tmp_path_factory.mktemp("compose") / "env", REDIS_PASSWORD="word")


def service_names(env_file: Path, *profiles: str) -> set[str]:
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    done = compose(*chosen, "config", "--services", env_file=env_file)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_without_a_password_compose_says_what_to_do(tmp_path: Path) -> None:
    done = compose("config", env_file=write_env(tmp_path / "env"))
    assert done.returncode != 0
    assert "copy .env.example to .env" in done.stderr


def test_the_example_of_the_env_file_names_every_variable(tmp_path: Path) -> None:
    example = (REPOSITORY / ".env.example").read_text()
    asked = set(re.findall(r"\$\{(\w+)", (REPOSITORY / "docker-compose.yml").read_text()))
    named = set(re.findall(r"^(\w+)=", example, flags=re.MULTILINE))
    assert named == asked | {"COMPOSE_PROFILES"}
    filled = tmp_path / "env"
    filled.write_text(example.replace("REDIS_PASSWORD=", "REDIS_PASSWORD=word"))
    assert service_names(filled) == {"redis", "coordinator", "worker"}


def test_an_example_that_is_not_filled_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "env").write_text((REPOSITORY / ".env.example").read_text())
    assert "copy .env.example to .env" in compose("config", env_file=tmp_path / "env").stderr


@pytest.mark.parametrize("page", ["README.md", "docs/deploy.md", "docker-compose.yml", ".env.example"])
def test_pages_name_services_and_profiles_that_exist(page: str, env_file: Path) -> None:
    running = services(env_file)
    text = (REPOSITORY / page).read_text()
    named = re.findall(r"docker compose (?:run --rm|exec|stop|up -d --build) ([a-z][\w-]*)", text)
    named += re.findall(r"--scale ([\w-]+)=", text)
    assert set(named) <= set(running)
    profiles = {profile for said in running.values() for profile in said.get("profiles", [])}
    assert {name for line in re.findall(r"COMPOSE_PROFILES=([\w,]+)", text) for name in line.split(",")} <= profiles


def test_profiles_choose_the_device_and_the_monitoring(env_file: Path) -> None:
    always = {"redis", "coordinator"}
    assert service_names(env_file, "gpu") == always | {"worker"}
    assert service_names(env_file, "cpu") == always | {"worker-cpu"}
    assert service_names(env_file, "cpu", "monitoring") == always | {"worker-cpu", "prometheus", "grafana"}
    assert service_names(env_file, "cpu", "gateway") == always | {"worker-cpu", "gateway"}


def test_only_the_worker_of_the_gpu_profile_reserves_devices(env_file: Path) -> None:
    reserving = {
        name: said["deploy"]["resources"]["reservations"]["devices"]
        for name, said in services(env_file).items()
        if "devices" in said.get("deploy", {}).get("resources", {}).get("reservations", {})
    }
    assert list(reserving) == ["worker"]
    (device,) = reserving["worker"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_workers_have_longer_to_stop_than_they_drain(env_file: Path) -> None:
    for name in ("worker", "worker-cpu"):
        said = services(env_file)[name]
        drain = float(said["environment"]["EMBEDSTREAM_DRAIN_SECONDS"])
        assert seconds(said["stop_grace_period"]) >= drain + 10


@pytest.fixture(params=["coordinator", "gateway", "grafana", "prometheus", "redis", "submit", "worker", "worker-cpu"])
def service(request: pytest.FixtureRequest, env_file: Path) -> Any:
    return services(env_file)[request.param]


def test_no_service_is_left_out_below(env_file: Path) -> None:
    known = {"coordinator", "gateway", "grafana", "prometheus", "redis", "submit", "worker", "worker-cpu"}
    assert set(services(env_file)) == known


def test_a_service_has_no_rights_and_writes_nothing_but_its_volumes(service: Any) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert not {"privileged", "network_mode", "pid", "ipc", "devices"} & set(service)
    assert all("docker.sock" not in volume.get("source", "") for volume in service["volumes"])


def test_a_service_cannot_take_the_machines_memory_or_processes(service: Any) -> None:
    assert 0 < int(service["mem_limit"]) <= 16 << 30
    assert 0 < int(service["pids_limit"]) <= 4096


def test_no_password_is_on_a_command_line(service: Any) -> None:
    assert "word" not in str([service.get("command"), service.get("entrypoint"), service.get("healthcheck")])


def test_our_own_services_are_not_root_and_run_under_an_init(env_file: Path) -> None:
    ours = {name: said for name, said in services(env_file).items() if "build" in said}
    assert set(ours) == {"worker", "worker-cpu", "coordinator", "gateway", "submit"}
    for said in ours.values():
        assert said["init"] is True
        assert said["user"] == "1000:1000"
        assert said["image"].endswith(f":{version('embedstream')}")


def test_only_workers_can_change_the_models_that_workers_load(env_file: Path) -> None:
    having = {
        name
        for name, said in services(env_file).items()
        if any("models" in (volume.get("source"), volume["target"].strip("/")) for volume in said["volumes"])
    }
    assert having == {"worker", "worker-cpu"}


def test_redis_is_administrated_by_nobody_and_its_password_is_in_no_list_of_processes(tmp_path: Path) -> None:
    with stack(tmp_path) as fleet:
        client: Any = connect(fleet.url)
        assert client.config_get("proto-max-bulk-len") == {"proto-max-bulk-len": str(64 << 20)}
        for command in ("FLUSHALL", "SHUTDOWN", "CONFIG SET dir /tmp", "MODULE LIST", "DEBUG SLEEP 0", "ACL LIST"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
        running = Path(f"/proc/{fleet.containers[0].process.pid}/cmdline").read_bytes()
        assert b"redis-server" in running
        assert b"s3cretWord" not in running


def test_nothing_is_published_beyond_this_machine(env_file: Path) -> None:
    published = {name: [port["host_ip"] for port in said.get("ports", [])] for name, said in services(env_file).items()}
    assert {name: hosts for name, hosts in published.items() if hosts} == {
        "gateway": ["127.0.0.1"],
        "prometheus": ["127.0.0.1"],
        "grafana": ["127.0.0.1"],
    }


def test_images_that_are_not_ours_are_pinned(env_file: Path) -> None:
    for name, said in services(env_file).items():
        if "build" not in said:
            assert re.search(r":v?\d+\.\d+\.\d+", said["image"]), f"{name}: {said['image']}"


def test_every_file_that_is_mounted_exists(env_file: Path) -> None:
    for said in services(env_file).values():
        for volume in said.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).is_dir(), volume["source"]


def test_redis_keeps_its_data_and_throws_nothing_away(tmp_path: Path) -> None:
    with stack(tmp_path) as fleet:
        client = connect(fleet.url)
        settings = {name: client.config_get(name)[name] for name in ("appendonly", "maxmemory-policy", "maxmemory")}
        assert settings == {"appendonly": "yes", "maxmemory-policy": "noeviction", "maxmemory": str(2 << 30)}
        with pytest.raises(redis.AuthenticationError):
            connect(fleet.url.replace("s3cretWord", "")).ping()
        container = fleet.containers[0]
        container.environment["REDISCLI_AUTH"] = "wrong"
        assert not fleet.healthy(container)


def test_a_worker_is_healthy_only_when_it_is_ready_and_leaves_within_its_grace(tmp_path: Path) -> None:
    with stack(tmp_path) as fleet:
        container = fleet.start("worker")
        wait_until(lambda: fleet.healthy(container), "worker healthy")
        assert fleet.is_ready(container)
        assert fleet.stop(container) == 0
        assert fleet.check(container).returncode == 1


def at_work(fleet: Stack, containers: list[Container]) -> bool:
    """Whether each of them has computed rows."""
    working = {worker.pid for worker in fleet.broker.workers() if worker.rows or worker.in_hand}
    return all(container.process.pid in working for container in containers)


def test_a_job_goes_through_while_workers_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    faults = {"EMBEDSTREAM_WINDOW_TOKENS": "2000", **faulty(tmp_path / "faults")}
    with stack(tmp_path, faults) as fleet:
        corpus = tmp_path / "data" / "corpus.jsonl"
        texts = write_corpus(corpus, 12_000, length=10)
        texts = {id: f"{text} {SLOW}" if i % 40 == 0 else text for i, (id, text) in enumerate(texts.items())}
        corpus.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in texts.items()))
        output = f"{corpus}.vectors"

        first = fleet.scale("worker-cpu", 1)
        submit = fleet.start("submit", ["corpus.jsonl"])
        wait_until(lambda: at_work(fleet, first), "rows of the first worker")
        added = [*fleet.scale("worker-cpu", 3), *fleet.scale("worker", 1)]
        wait_until(lambda: at_work(fleet, added), "rows of each worker that was added in mid-job")
        assert submit.process.poll() is None, "the job was over before all had a share of it"
        assert [fleet.stop(container) for container in (first[0], added[0])] == [0, 0]

        assert submit.process.wait(120) == 0, submit.log.read_text()
        assert_exact(Path(output), texts, every=50)
        again, said = fleet.run("submit", "corpus.jsonl")
        assert again == 0, said


def test_a_gateway_is_healthy_with_keys_and_serves_whom_has_one(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    secret, line = make_key("test", ["embed"])
    (tmp_path / "keys" / "keys.txt").write_text(line)
    with stack(tmp_path, EMBEDSTREAM_KEYS=str(tmp_path / "keys")) as fleet:
        fleet.scale("worker-cpu", 1)
        gateway = fleet.start("gateway")
        wait_until(lambda: fleet.healthy(gateway), "gateway healthy")
        url = f"http://127.0.0.1:{gateway.environment['EMBEDSTREAM_SERVE_PORT']}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": f"Bearer {secret}"}).json()["data"]
        assert fleet.stop(gateway) == 0


def test_a_coordinator_is_healthy_reads_a_corpus_by_itself_and_tells_what_is_queued(tmp_path: Path) -> None:
    with stack(tmp_path) as fleet:
        coordinator = fleet.start("coordinator")
        wait_until(lambda: fleet.healthy(coordinator), "coordinator healthy")
        texts = write_corpus(tmp_path / "data" / "corpus.jsonl", 2000)
        output = tmp_path / "data" / "corpus.jsonl.vectors"
        code, said = fleet.run("submit", "corpus.jsonl", "--server-side")
        assert code == 0, said
        address = f"http://127.0.0.1:{coordinator.environment['EMBEDSTREAM_METRICS_PORT']}/metrics"

        def queued_seconds() -> float:
            """As the autoscaler asks for it, while no worker is there."""
            with urllib.request.urlopen(address) as answer:
                told = {
                    line.split("{")[0]: line.split()[-1] for line in answer.read().decode().splitlines() if "{" in line
                }
            tokens, pace = (float(told.get(metric.name, 0)) for metric in (metrics.QUEUE_TOKENS, metrics.QUEUE_PACE))
            return tokens / pace if pace else 0.0

        wait_until(queued_seconds, "seconds to drain, told with no worker alive")
        looked = fleet.execute(coordinator, "embed-status", "--json")
        assert looked.returncode == 0, looked.stderr
        assert output.name in looked.stdout
        fleet.scale("worker-cpu", 1)
        wait_until((output / "_manifest.json").exists, "the manifest")
        assert_exact(output, texts, every=50)
        wait_until(lambda: queued_seconds() == 0, "nothing left to drain")
        assert fleet.stop(coordinator) == 0
        assert fleet.check(coordinator).returncode != 0
        for container in fleet.containers:
            assert "NOPERM" not in container.log.read_text(), "Redis' user may do all that the fleet does"


def test_corpora_and_vectors_lie_in_a_bucket_with_the_credentials_of_the_env_file(
    tmp_path: Path, s3_server: S3Server
) -> None:
    bucket, client = "compose", s3_server.client()
    client.create_bucket(Bucket=bucket)
    texts: dict[str, str] = {}
    for name in ("a", "b"):
        texts |= write_corpus(tmp_path / f"{name}.jsonl", 1500)
        client.upload_file(str(tmp_path / f"{name}.jsonl"), bucket, f"in/{name}.jsonl")
    corpora = [f"s3://{bucket}/in/{name}.jsonl" for name in ("a", "b")]
    roots = {"EMBEDSTREAM_INPUT_ROOTS": f"s3://{bucket}/in", "EMBEDSTREAM_OUTPUT_ROOTS": f"s3://{bucket}/out"}
    with stack(tmp_path, {"AWS_EC2_METADATA_DISABLED": "true"}, **roots, **s3_server.environment) as fleet:
        fleet.start("coordinator")
        fleet.scale("worker-cpu", 2)
        code, said = fleet.run("submit", *corpora, "-o", f"s3://{bucket}/out/vectors", "--server-side")
        assert code == 0, said
        manifest = "out/vectors/_manifest.json"
        wait_until(lambda: manifest in s3_server.keys(bucket, "out/"), "the manifest")
        write_corpus(tmp_path / "data" / "corpus.jsonl", 10)
        code, said = fleet.run("submit", "corpus.jsonl")
        assert (code, "output root" in said) == (2, True), said
    here = tmp_path / "here"
    here.mkdir()
    for key in s3_server.keys(bucket, "out/vectors/"):
        client.download_file(bucket, key, str(here / Path(key).name))
    assert_exact(here, texts, every=50)


def test_a_wrong_password_is_one_sentence(tmp_path: Path) -> None:
    with stack(tmp_path) as fleet:
        write_corpus(tmp_path / "data" / "corpus.jsonl", 10)
        fleet.services["submit"]["environment"]["EMBEDSTREAM_REDIS_URL"] = "redis://:wrong@redis:6379/0"
        code, said = fleet.run("submit", "corpus.jsonl")
        assert code == 2
        assert "password" in said
        assert "Traceback" not in said
