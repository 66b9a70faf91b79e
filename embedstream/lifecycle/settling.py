"""A dataset that is finished, and a Redis that does not know it: it was restored from an earlier copy of its file."""

from __future__ import annotations

import logging

import redis

from embedstream.dataset.sink import Sink
from embedstream.errors import EmbedstreamError
from embedstream.jobs import JobSpec
from embedstream.lifecycle.finalizing import end_finished
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect

log = logging.getLogger(__name__)


def settle_finished(url: str, spec: JobSpec, sink: Sink) -> None:
    """End the job of a finished dataset if Redis takes it for unfinished, and answers."""
    try:
        broker = Broker(connect(url, retries=0), spec.queue)
        state = broker.state(spec.job)
        if state is not None and not state.ended:
            end_finished(broker, spec, sink)
    except (redis.RedisError, EmbedstreamError) as error:
        log.debug("job %s: how it stands in Redis is not known: %s", spec.job, error)
