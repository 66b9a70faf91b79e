"""Everything that is done to the world from outside, one kind of fault a function."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import redis
from e2e.harness import Process

from chaos.world import World

Strike = Callable[[World], bool]
"""Does it; whether it could be done now."""


def _signal_worker(world: World, *signals: tuple[int, float]) -> bool:
    return _send(world.rng.choice(world.workers), *signals)


def _signal_producer(world: World, *signals: tuple[int, float]) -> bool:
    living = [job.process for job in world.running() if job.process is not None and job.process.poll() is None]
    return bool(living) and _send(world.rng.choice(living), *signals)


def _send(process: Process, *signals: tuple[int, float]) -> bool:
    """Each signal, then so many seconds."""
    if process.poll() is not None:
        return False
    for number, seconds in signals:
        process.send_signal(number)
        time.sleep(seconds)
    return True


def worker_killed(world: World) -> bool:
    return _signal_worker(world, (signal.SIGKILL, 0))


def worker_terminated(world: World) -> bool:
    return _signal_worker(world, (signal.SIGTERM, 0))


def worker_paused(world: World) -> bool:
    """Often for longer than its leases."""
    return _signal_worker(world, (signal.SIGSTOP, world.rng.choice([0.3, 3.0, 6.0])), (signal.SIGCONT, 0))


def producer_killed(world: World) -> bool:
    return _signal_producer(world, (signal.SIGKILL, 0))


def producer_terminated(world: World) -> bool:
    return _signal_producer(world, (signal.SIGTERM, 0))


def producer_interrupted(world: World) -> bool:
    return _signal_producer(world, (signal.SIGINT, 0))


def producer_paused(world: World) -> bool:
    return _signal_producer(world, (signal.SIGSTOP, 1.0), (signal.SIGCONT, 0))


def gateway_killed(world: World) -> bool:
    return _send(world.rng.choice(world.gateways), (signal.SIGKILL, 0))


def gateway_terminated(world: World) -> bool:
    return _send(world.rng.choice(world.gateways), (signal.SIGTERM, 0))


def gateway_paused(world: World) -> bool:
    seconds = world.rng.uniform(0.5, 3.0)
    return _send(world.rng.choice(world.gateways), (signal.SIGSTOP, seconds), (signal.SIGCONT, 0))


def redis_killed(world: World) -> bool:
    world.server.restart()
    return True


def redis_away(world: World) -> bool:
    """Down for a while."""
    world.server.kill()
    time.sleep(world.rng.uniform(0.5, 3.0))
    world.server.restart()
    return True


def redis_older(world: World) -> bool:
    return world.server.restart_older(world.rng)


def redis_emptied(world: World) -> bool:
    world.server.restart_empty()
    return True


def redis_paused(world: World) -> bool:
    return _send(world.server.process, (signal.SIGSTOP, world.rng.uniform(0.5, 4.0)), (signal.SIGCONT, 0))


def connections_cut(world: World) -> bool:
    for _ in range(5):
        with contextlib.suppress(redis.RedisError):
            world.server.client.client_kill_filter(_type="normal", skipme=True)
        time.sleep(0.05)
    return True


def scripts_forgotten(world: World) -> bool:
    world.server.client.script_flush()
    return True


def output_gone(world: World) -> bool:
    """As when what was mounted there is not: a file lies in its place, so that nobody makes a new folder."""
    aside = world.outputs.with_name("aside")
    world.outputs.rename(aside)
    world.outputs.touch()
    time.sleep(world.rng.uniform(0.5, 2.0))
    world.outputs.unlink()
    aside.rename(world.outputs)
    return True


def disk_full(world: World) -> bool:
    """The outputs' file system has no byte left for a while."""
    filler = world.outputs.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"\0" * 2**20):
            pass
    time.sleep(world.rng.uniform(0.5, 2.0))
    filler.unlink()
    return True


def job_cancelled(world: World) -> bool:
    running = world.running()
    if running:
        world.cancel(world.rng.choice(running))
    return bool(running)


STRIKES: dict[str, Strike] = {
    strike.__name__: strike
    for strike in (
        worker_killed,
        worker_terminated,
        worker_paused,
        producer_killed,
        producer_terminated,
        producer_interrupted,
        producer_paused,
        gateway_killed,
        gateway_terminated,
        gateway_paused,
        redis_killed,
        redis_away,
        redis_older,
        redis_emptied,
        redis_paused,
        connections_cut,
        scripts_forgotten,
        output_gone,
        disk_full,
        job_cancelled,
    )
}


@contextlib.contextmanager
def small_disk(place: os.PathLike[str], mib: int) -> Iterator[str]:
    """A file system of so many MiB in memory; empty if that cannot be had here."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", os.fspath(place)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield os.fspath(place) if mounted else ""
    finally:
        if mounted:
            subprocess.run(["umount", "-l", os.fspath(place)], check=True)
