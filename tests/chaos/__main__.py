"""`make chaos SECONDS=600 SEED=1`: break everything, in turn and at random; then let it heal, and count every row.

Producers, workers, gateways and the Redis server are processes of their own, watched over by a supervisor that starts
again who ended. HTTP clients send texts and batches to the gateways meanwhile, and again where they are told to. When
the time is over, every job and every request must come to its end; then a reader that shares nothing with them judges
each output against its corpus. Exit 0 only if no row is lost, doubled or wrong, nothing is left over, and all that
should have happened has happened.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos.corpora import HARMS
from chaos.faults import STRIKES, small_disk
from chaos.judge import Verdict, judge_folder, judge_hashes, leaked_keys
from chaos.world import QUEUE, World
from embedstream.queue.broker import Broker

ANSWERS = ("COMMITTED", "ALREADY", "CONFLICT", "UNKNOWN_JOB", "GAP")
"""What must have been answered at least once in a run of full length."""

FULL = 5
"""How often each kind of fault strikes in such a run, at least."""

CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE)

JOBS_AT_ONCE = 3
EDITED = 0.4
"""How often a finished job's corpus is edited rather than a new one written."""

HEAL_SECONDS = 300.0
DISK_MIB = 600


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def rage(world: World, seconds: float, rows: int, strikes: Counter[str], kinds: list[str]) -> None:
    """Break things until the time is over. Each kind in its turn, in an order of chance, so that all come equally."""
    end, deck = time.monotonic() + seconds, list[str]()
    while time.monotonic() < end:
        world.tend()
        world.server.keep_copy()
        while len(world.running()) < JOBS_AT_ONCE:
            ended = [job for job in world.jobs if job.finished and not job.output.startswith("redis:")]
            if ended and world.rng.random() < EDITED:
                world.edit(world.rng.choice(ended))
            else:
                world.new_job(world.rng.randint(rows // 2, rows), world.rng.choice(["folder", "folder", "redis"]))
        if not deck:
            deck = world.rng.sample(kinds, len(kinds))
        kind = deck.pop()
        if STRIKES[kind](world):
            strikes[kind] += 1
        time.sleep(world.rng.uniform(0.1, 0.8))


def heal(world: World) -> list[str]:
    """No more faults: every job comes to its end, and so does the same command once more. What does not."""
    world.calm = True
    world.server.wait()
    for caller in world.callers:
        caller.stop()
    for gateway in world.gateways:
        gateway.terminate()  # one that starts ends the jobs of batches that were over when Redis forgot that
    end = time.monotonic() + HEAL_SECONDS
    while world.running() and time.monotonic() < end:
        world.tend()
        time.sleep(0.1)
    if world.running():
        return [f"job {job.number} is not finished after {HEAL_SECONDS:.0f} s of peace" for job in world.running()]
    while not all(caller.wait(0) for caller in world.callers):
        if time.monotonic() > end:
            return [f"a caller of the gateways has no answer after {HEAL_SECONDS:.0f} s of peace"]
        world.tend()
        time.sleep(0.1)
    # Redis may have gone back to a time before a job's end, or forgotten an output of its own.
    for job in world.jobs:
        job.finished = False
        job.process = None
        world.start(job)
        while not job.finished and time.monotonic() < end:
            world.tend()
            time.sleep(0.05)
    # The program that was to end a job may be dead: then its lease must expire first.
    broker = Broker(world.server.client, QUEUE)
    while broker.outbox() and time.monotonic() < end:
        world.tend()
        time.sleep(0.1)
    return [f"job {job.number}: the same command once more does not end" for job in world.running()]


def judge(world: World) -> tuple[list[str], Verdict]:
    """All outputs. What is wrong, and the sums."""
    problems, total = [], Verdict()
    for job in world.jobs:
        if job.output.startswith("redis:"):
            verdict = judge_hashes(world.server.client, f"job{job.number}:", job.expected, job.several)
        else:
            verdict = judge_folder(job.output, job.expected, job.several)
        for what in ("lost", "doubled", "wrong"):
            found = getattr(verdict, what)
            getattr(total, what).extend(found)
            problems += [f"job {job.number}: {what}: {one}" for one in found[:10]]
        total.rows += verdict.rows
        total.blamed += verdict.blamed
    return problems, total


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description="Break everything, then count rows.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000, help="most rows of a corpus")
    parser.add_argument("--least", type=int, default=FULL, help="how often each kind of fault must have struck")
    parser.add_argument("--keep", action="store_true", help="leave the logs of a run that passed, too")
    chosen = parser.parse_args()
    say(f"seed {chosen.seed}, {chosen.seconds:.0f} s")
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    (place / "disk").mkdir()
    with small_disk(place / "disk", DISK_MIB) as disk:
        kinds = [kind for kind in STRIKES if disk or kind != "disk_full"]
        if not disk:
            say("*** NO FULL DISK: a small file system cannot be mounted here (that takes root on Linux) ***")
        world = World(place, place / "disk" / "outputs", random.Random(chosen.seed), chosen.workers)
        strikes: Counter[str] = Counter()
        try:
            rage(world, chosen.seconds, chosen.rows, strikes, kinds)
            say(f"peace: {len(world.jobs)} jobs, {len(world.running())} of them unfinished")
            problems = heal(world)
            world.stop()
            if not problems:
                wrong, total = judge(world)
                problems += [*wrong, *(f"over HTTP: {what}" for what in world.seen.wrong[:10])]
                problems += [f"key {key} never expires" for key in leaked_keys(world.server.client)]
                report(world, strikes, total)
            problems += crashes(world)
            problems += shortfalls(world, strikes, kinds, chosen.least)
        finally:
            world.close()
    for problem in problems:
        say(f"PROBLEM: {problem}")
    if problems or chosen.keep:
        say(f"logs: {place} (seed {chosen.seed})")
    else:
        shutil.rmtree(place)
    return 1 if problems else 0


def crashes(world: World) -> list[str]:
    """Processes that ended in native code, as nobody makes them do; their logs say where."""
    ends = Counter((*world.worker_ends, *world.gateway_ends)) + Counter(code for job in world.jobs for code in job.ends)
    return [
        f"{times} processes ended by {signal.Signals(-code).name}" for code, times in ends.items() if code in CRASHES
    ]


def spied(world: World) -> Counter[str]:
    return Counter(world.spied.read_text().splitlines())


def text_faults(world: World) -> Counter[str]:
    """How often texts did harm."""
    found: Counter[str] = Counter()
    for file in world.strikes.iterdir():
        found[file.name.split("-")[0]] += file.stat().st_size
    return found


def shortfalls(world: World, strikes: Counter[str], kinds: list[str], least: int) -> list[str]:
    """What should have happened and has not."""
    answers: Counter[str] = Counter()
    for line, times in spied(world).items():
        answers[line.split()[1]] += times
    harms = text_faults(world)
    return [
        *(f"{kind} struck {strikes[kind]} times, not {least}" for kind in kinds if strikes[kind] < least),
        *(f"a text's {kind} struck {harms[kind]} times, not {least}" for kind in HARMS if harms[kind] < least),
        *(f"no {what} came to their end over HTTP" for what in ("requests", "batches") if not world.seen.answers[what]),
        *(f"nobody was answered {answer}" for answer in ANSWERS if least >= FULL and not answers[answer]),
    ]


def report(world: World, strikes: Counter[str], total: Verdict) -> None:
    seen = spied(world)
    redelivered = sum(times for line, times in seen.items() if line.startswith("delivery") and line != "delivery 1")
    harms = text_faults(world)
    ends = Counter(code for job in world.jobs for code in job.ends)
    lines = [
        f"faults: {_listed(strikes)}",
        f"faults of texts: {_listed(harms)}; failpoints given: {world.ordered}",
        f"answers: {_listed(Counter({k: v for k, v in seen.items() if not k.startswith('delivery')}))}",
        f"blocks delivered more than once: {redelivered}",
        f"workers ended with: {_listed(Counter(map(str, world.worker_ends)))}",
        f"gateways ended with: {_listed(Counter(map(str, world.gateway_ends)))}",
        f"over HTTP: {_listed(world.seen.answers)}; {world.seen.blamed} lines blamed, {len(world.seen.wrong)} wrong",
        f"producers ended with: {_listed(Counter(map(str, ends.elements())))}",
        f"{len(world.jobs)} jobs, {sum(job.generation for job in world.jobs)} updates, {total.rows} rows, "
        f"{total.blamed} blamed for what broke while they were tried alone; "
        f"lost {len(total.lost)}, doubled {len(total.doubled)}, wrong {len(total.wrong)}",
    ]
    for line in lines:
        say(line)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())
