"""Every way through the points: who breaks there, and who takes over. Each story ends with a whole job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from e2e.harness import read_manifest, read_rows, wait_until

from crash.stage import KILLED, SOME_FAILED, Order, Process, Stage, vector
from embedstream.dataset.sinks import open_sink
from embedstream.lifecycle.adoption import adopt_shards
from embedstream.server.patience import Patience

QUESTION = "a question"

Story = Callable[[Stage, Order], None]


def producer(stage: Stage, order: Order) -> None:
    """embed-submit breaks; the same command again takes over."""
    stage.worker()
    first = stage.submit(orders=order.text)
    first.strike(order)
    if order.action != "cut":
        stage.submit().wait(SOME_FAILED)
    go_on(first, order, SOME_FAILED)


def worker(stage: Stage, order: Order) -> None:
    """A worker breaks; another one takes over."""
    stage.submitted()
    broken_worker(stage, order)


def broken_worker(stage: Stage, order: Order, before: str = "") -> None:
    first = stage.worker("--burst", orders=f"{before}{order.text}")
    first.strike(order)
    if order.action != "cut":
        stage.finish()
    go_on(first, order)


def sweeper(stage: Stage, order: Order) -> None:
    """A worker that takes over from a dead one breaks."""
    stage.submitted()
    stage.worker(orders="claim.after=kill").wait(KILLED)
    stage.expire_leases(stage.broker.keys.blocks(stage.job))
    broken_worker(stage, order)


def releaser(stage: Stage, order: Order) -> None:
    """A worker that hands back what it claimed without an answer breaks."""
    stage.submitted()
    broken_worker(stage, order, before="claim.before=cut,")


def renewer(stage: Stage, order: Order) -> None:
    """A worker that waits for more, its producer being slow, breaks."""
    slow = Order("seal.before=pause")
    pushing = stage.submit("--detach", orders=slow.text)
    pushing.strike(slow)
    first = stage.worker("--burst", orders=order.text)
    first.strike(order)
    pushing.go_on()
    pushing.wait()
    if order.action != "cut":
        stage.finish()
    go_on(first, order)


def late_worker(stage: Stage, order: Order) -> None:
    """A worker held up for longer than its lease finds its blocks done by another one, and breaks."""
    stage.submitted()
    late = Order("commit.before=pause")
    first = stage.worker("--burst", orders=f"{late.text},{order.text}")
    first.strike(late)
    stage.finish()
    first.go_on()
    first.strike(order)
    go_on(first, order)


def dropper(stage: Stage, order: Order) -> None:
    """A worker meets blocks that are done already: somebody adopted the shard of a dead worker."""
    pushing = held_up_producer(stage)
    stage.worker(orders="commit.before=kill").wait(KILLED)
    spec = stage.broker.status(stage.job).spec
    adopted = adopt_shards(stage.broker, stage.job, open_sink(spec.output, spec).find_shards(), Patience())
    assert adopted.shards
    stage.expire_leases(stage.broker.keys.blocks(stage.job))
    pushing.go_on()
    pushing.wait()
    broken_worker(stage, order)


def suspicious(stage: Stage, order: Order) -> None:
    """A worker breaks that tries blocks chunk by chunk, as two others died with them."""
    stage.submitted()
    for point in ("claim.after", "sweep.after"):
        stage.worker(orders=f"{point}=kill").wait(KILLED)
        stage.expire_leases(stage.broker.keys.blocks(stage.job))
    # Whoever breaks with a chunk noted, broke of it for all that the next one knows.
    stage.condemned = int(order.point == "suspect.after" and order.action != "cut")
    broken_worker(stage, order)


def finalizer(stage: Stage, order: Order) -> None:
    """An embed-submit that writes the manifest breaks; a worker takes over."""
    computed(stage)
    first = stage.submit(orders=order.text)
    first.strike(order)
    if stage.older is not None:
        assert len(read_rows(Path(stage.output))) == read_manifest(Path(stage.output))["rows"]  # of either generation
    elif Path(stage.output, "_manifest.json").exists():
        stage.judge_folder()  # a manifest that stands is whole
    if order.action != "cut":
        stage.expire_finalize_leases()
        stage.finish()
    go_on(first, order, SOME_FAILED)


def adopter(stage: Stage, order: Order) -> None:
    """Redis was emptied; an embed-submit that takes over the shards in the output breaks."""
    pushing = held_up_producer(stage)
    stage.worker(orders="commit.after=kill").wait(KILLED)
    pushing.go_on()
    pushing.wait()
    stage.worker(orders="take_finalize.before=kill").wait(KILLED)
    stage.empty_redis()
    producer(stage, order)


def readopter(stage: Stage, order: Order) -> None:
    """Redis was emptied while a worker wrote a shard; another worker begins the job anew, by ranges of its own."""
    stage.submitted()
    first = stage.worker("--burst", orders=order.text)
    first.strike(order)
    stage.empty_redis()
    stage.submitted()
    stage.finish()
    go_on(first, order)


def canceller(stage: Stage, order: Order) -> None:
    """embed-cancel breaks; the same again, then a partial manifest, then the job goes on to its end."""
    stage.submitted()
    first = stage.cancel(orders=order.text)
    first.strike(order)
    if order.action != "cut":
        stage.cancel().wait()
    go_on(first, order)
    stage.finish()
    assert stage.broker.state(stage.job) == "cancelled"
    stage.submitted()
    stage.finish()


def remover(stage: Stage, order: Order) -> None:
    """embed-cancel of a job that is damaged in Redis breaks; the same again, then embed-submit makes the job anew."""
    stage.submitted()
    stage.damage()
    first = stage.cancel(orders=order.text)
    first.strike(order)
    if order.action != "cut":
        stage.cancel().wait(0 if order.point == "forget.before" else 2)
    go_on(first, order)
    stage.submitted()
    stage.finish()


def starter_over(stage: Stage, order: Order) -> None:
    """The output of a finished job is removed; an embed-submit that begins anew breaks."""
    stage.submitted()
    stage.finish()
    shutil.rmtree(stage.output)
    stage.worker()
    wait_until(stage.broker.workers, "a worker, by whom the producer knows that the output is a folder of this machine")
    producer(stage, order)


def answerer(stage: Stage, order: Order) -> None:
    """A worker that answers a request breaks; another one answers."""
    first = stage.worker(orders=order.text)
    asking = stage.ask(QUESTION)
    first.strike(order)
    stage.worker()
    answered(asking)
    if order.action == "pause":
        first.go_on()
    if order.action != "kill":
        first.terminate()
        first.wait()
    stage.submit().wait(SOME_FAILED)


def condemned(stage: Stage, order: Order) -> None:
    """A request of which one worker died already is the death of another: no third one tries it."""
    asking = stage.ask(QUESTION)
    stage.worker(orders="claim_requests.after=kill").wait(KILLED)
    stage.expire_leases(stage.broker.keys.interactive)
    stage.worker(orders=order.text).strike(order)
    stage.worker()
    asking.wait(1)
    assert "2 workers died of this request" in asking.err
    stage.submit().wait(SOME_FAILED)


def heir(stage: Stage, order: Order) -> None:
    """A worker that takes over a dead one's request breaks, and answers it nevertheless."""
    asking = stage.ask(QUESTION)
    stage.worker(orders="claim_requests.after=kill").wait(KILLED)
    stage.expire_leases(stage.broker.keys.interactive)
    stage.worker(orders=order.text).strike(order)
    answered(asking)
    stage.submit().wait(SOME_FAILED)


def asker(stage: Stage, order: Order) -> None:
    """A program that asks for a vector breaks, and asks again."""
    stage.worker()
    first = stage.ask(QUESTION, orders=order.text)
    first.strike(order)
    answered(stage.ask(QUESTION))
    if order.action == "pause":
        first.go_on()
    if order.action != "kill":
        answered(first)
    stage.submit().wait(SOME_FAILED)


def retrier(stage: Stage, order: Order) -> None:
    """An embed-submit that has a failed row run again breaks; the same command again."""
    suspicious(stage, Order("suspect.after=kill"))
    stage.judge()
    stage.worker(orders="take_finalize.before=pause")  # the end of the job is the command's to find
    first = stage.submit("--retry-failed", orders=order.text)
    first.strike(order)
    stage.worker()
    stage.condemned, stage.repaired = 0, 1
    if order.action != "cut":
        stage.expire_finalize_leases()
        stage.submit("--retry-failed").wait(SOME_FAILED)
    go_on(first, order, SOME_FAILED)
    wait_until(lambda: not stage.broker.unfinished(), "a worker to say that the manifest stands")


def embedded(stage: Stage, order: Order) -> None:
    """An embed-submit with its own server and worker breaks; the same command again."""
    stage.fleet = False
    stage.submit(orders=order.text).strike(order)
    stage.submit().wait(SOME_FAILED)


def computed(stage: Stage) -> None:
    """A job that waits for nothing but its manifest."""
    stage.submitted()
    stage.worker(orders="take_finalize.before=kill").wait(KILLED)


def held_up_producer(stage: Stage) -> Process:
    """An embed-submit that has submitted and sealed one of its two parts, and paused."""
    order = Order("submit.before#3=pause")
    pushing = stage.submit("--detach", orders=order.text)
    pushing.strike(order)
    return pushing


def answered(asking: Process) -> None:
    asking.wait()
    np.testing.assert_allclose(json.loads(asking.out), vector(QUESTION), atol=1e-6)


def go_on(first: Process, order: Order, code: int = 0) -> None:
    """Whoever was paused or cut off comes to its own good end."""
    if order.action == "pause":
        first.go_on()
    if order.action != "kill":
        first.wait(code)


@dataclass(frozen=True)
class Walk:
    """One story with one order."""

    story: Story
    order: Order
    to_redis: bool = False
    int8: bool = False
    """Whether the job has a column in int8."""
    updates: bool = False
    """Whether it updates a dataset."""

    def __str__(self) -> str:
        more = "".join(f"-{what}" for what in ("to_redis", "int8", "updates") if getattr(self, what))
        return f"{self.story.__name__}{more.replace('_', '-')}-{self.order.text}"


def walks() -> list[Walk]:
    """All of them."""
    made: list[Walk] = []

    def add(
        story: Story,
        *points: str,
        actions: str = "kill pause",
        to_redis: bool = False,
        int8: bool = False,
        updates: bool = False,
    ) -> None:
        orders = (Order(f"{point}={action}") for point in points for action in actions.split())
        made.extend(Walk(story, order, to_redis, int8, updates) for order in orders)

    def add_step(
        story: Story, step: str, turn: str = "", cuts: str = "cut cut*5", to_redis: bool = False, int8: bool = False
    ) -> None:
        add(story, f"{step}.before{turn}", actions=f"kill pause {cuts}", to_redis=to_redis, int8=int8)
        add(story, f"{step}.after{turn}", to_redis=to_redis, int8=int8)

    add_step(producer, "create")
    add_step(producer, "submit", "#2")
    add_step(producer, "seal")
    add_step(producer, "seal", "#2")
    add(worker, "claim.before", actions="cut cut*5")
    add(worker, "claim.after")
    add(worker, "file.written", "file.renamed", "file.written#2", "file.renamed#2")
    add_step(worker, "commit")
    add_step(worker, "commit", to_redis=True)
    add(worker, "hashes.written", to_redis=True)
    add_step(worker, "calibrate", int8=True)
    add(worker, "calibrate.before", "calibrate.after", "hashes.written", "commit.before", to_redis=True, int8=True)
    add(worker, "file.written", "commit.before", "commit.after", int8=True)
    add(late_worker, "shard.discarded", int8=True)
    add(readopter, "calibrate.before", "commit.before", int8=True)
    add(retrier, "create.after", "take_finalize.after", int8=True)
    add_step(worker, "retire")
    add(sweeper, "sweep.before", actions="cut cut*5")
    add(sweeper, "sweep.after")
    add_step(releaser, "release")
    add_step(renewer, "renew")
    add(late_worker, "shard.discarding", "shard.discarded")
    add_step(dropper, "drop")
    add_step(suspicious, "suspect")
    add_step(finalizer, "take_finalize", cuts="cut")
    add(finalizer, "file.written", "file.renamed", "file.written#2", "file.renamed#2")
    add_step(finalizer, "finalized")
    add_step(adopter, "commit")
    add_step(adopter, "commit", "#2")
    add_step(canceller, "cancel", cuts="cut")
    add_step(remover, "forget", cuts="cut")
    add(starter_over, "forgetting.half")
    add_step(asker, "request")
    add(answerer, "claim_requests.before", actions="cut cut*5")
    add(answerer, "claim_requests.after")
    add_step(answerer, "reply")
    add(heir, "sweep_requests.before", actions="cut cut*5")
    add(condemned, "sweep_requests.after", actions="kill")
    add(retrier, "create.after", "seal.after#2", "take_finalize.after", "file.renamed", "file.renamed#2")
    add(retrier, "finalized.before", "finalized.after")
    add(embedded, "create.after", "submit.after#3", "seal.after#2", actions="kill")
    add(producer, "create.after", "submit.before#2", "seal.after#2", updates=True)
    add(worker, "file.written", "commit.before", "commit.after", updates=True)
    add(finalizer, "take_finalize.after", "finalized.before", "finalized.after", updates=True)
    add(finalizer, *(f"file.renamed#{turn}" for turn in (1, 2, 3, 4)), updates=True)  # changes, manifest, errors, card
    add(adopter, "commit.after", updates=True)
    add(embedded, "submit.after#3", actions="kill", updates=True)
    return made
