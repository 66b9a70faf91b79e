"""One run of embed-submit: from a corpus to a finished dataset."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

from embedstream.corpus.chunking import with_tokenizer
from embedstream.corpus.parts import Part
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import open_sink
from embedstream.jobs import JobSpec, JobState, JobStatus, parse_max_errors
from embedstream.lifecycle.handing_over import hand_over, wait_for_readers, without_coordinator
from embedstream.lifecycle.opening import (
    make_spec,
    with_types,
)
from embedstream.queue.broker import Broker
from embedstream.records import Manifest
from embedstream.server.connection import connect
from embedstream.terminal import echo, echo_json
from embedstream_producer import report
from embedstream_producer.corpus import part_name, total_bytes
from embedstream_producer.expanding import expand
from embedstream_producer.hub import pinned
from embedstream_producer.options import Options, check_options, resolve_output
from embedstream_producer.plan import lines as plan_lines
from embedstream_producer.plan import make_plan
from embedstream_producer.progress import LogHandler, Progress
from embedstream_producer.retry_failed import FailedRows
from embedstream_producer.run import DETACHED, Run, show
from embedstream_producer.server_side import part_names
from embedstream_producer.trec_run import check_corpus
from embedstream_producer.updating import Updating

UNCOMPARED = (
    "whether the corpus is still the one that was embedded was not looked at, as it is not read here: the same command "
    "without --server-side looks, where the corpus lies"
)


def submit(options: Options) -> int:
    """From the command line to the end of its job; returns the exit code.

    Raises `EmbedstreamError` for what is refused, `KeyboardInterrupt` never.
    """
    check_options(options)
    if options.redis_url is not None:
        connect(options.redis_url)  # refuses what is no URL, also where no server is asked because all is finished
    output = resolve_output(options)
    format = options.settings.get("format")
    corpus = expand(options.corpus, format)
    if options.run is not None and options.queries is not None:
        corpus = [pinned(options.run), pinned(options.queries), *corpus]
    spec = make_spec(
        queue=options.queue,
        output=output,
        model=options.model,
        revision=options.revision,
        parts=part_names(corpus) if options.server_side else [part_name(source) for source in corpus],
        settings=options.settings,
    )
    spec = with_tokenizer(spec)
    if options.plan or options.plan_measure:
        return _plan(options, spec, corpus)
    if options.server_side:
        spec = with_types(spec)
        return _submit_server_side(options, spec, open_sink(spec.output, spec, options.redis_url))
    parts = check_corpus(corpus, spec, _tell(options))
    spec = with_types(spec, (part.kept_types for part in parts))
    sink = open_sink(spec.output, spec, options.redis_url)
    updating = Updating(spec, sink, options.update_from) if options.update or options.update_from else None
    with contextlib.ExitStack() as stack:
        failed = None
        if options.retry_failed:
            failed = stack.enter_context(FailedRows(sink, spec))
            spec, sink = failed.spec, open_sink(spec.output, failed.spec, options.redis_url)
        return _submit(options, spec, sink, parts, failed, updating)


def _plan(options: Options, spec: JobSpec, corpus: Sequence[str]) -> int:
    parts = check_corpus(corpus, spec, _tell(options))
    with Progress(options.quiet, total_bytes(parts), format=options.progress) as progress:
        for part in parts:
            progress.tell(part.advice or "")
        progress.phase("reading the corpus")
        try:
            plan, words = make_plan(spec, parts, options.redis_url, progress, _measure(options))
        except KeyboardInterrupt:
            return DETACHED
    if options.json:
        echo_json(plan)
    else:
        for line in plan_lines(plan, words):
            echo(line)
    return 0


def _measure(options: Options) -> dict[str, str] | None:
    if not options.plan_measure:
        return None
    flags = [word for word in options.worker if word != "--no-warmup"]
    return {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}


def _submit_server_side(options: Options, spec: JobSpec, sink: Sink) -> int:
    assert options.redis_url is not None, "checked by submit"
    with Progress(options.quiet, None, format=options.progress) as progress:
        stands, said = hand_over(options.redis_url, spec, sink, options.max_errors, progress.notice)
        progress.tell(said)
        if isinstance(stands, JobStatus) and stands.state is JobState.SUBMITTING:
            missing = without_coordinator(Broker(connect(options.redis_url), spec.queue), spec, options.redis_url)
            if missing:
                progress.say(missing)
            else:
                wait_for_readers(options.redis_url, spec, progress.notice)
    result = report.from_manifest(stands) if isinstance(stands, Manifest) else report.from_status(stands)
    if options.json:
        echo_json(result)
    elif not isinstance(stands, Manifest):
        echo(spec.job)
    else:
        echo(f"{result.output} is finished already; nothing was done")
        if not options.trust_unchanged and not options.quiet:
            echo(UNCOMPARED, err=True)
        for line in report.lines(result, sink, redis_url=options.redis_url):
            echo(line)
    return report.exit_code(result, parse_max_errors(options.max_errors)) if isinstance(stands, Manifest) else 0


def _submit(
    options: Options,
    spec: JobSpec,
    sink: Sink,
    parts: Sequence[Part],
    failed: FailedRows | None,
    updating: Updating | None,
) -> int:
    with Progress(options.quiet, total_bytes(parts), format=options.progress) as progress:
        handler = LogHandler(progress)
        logging.getLogger("embedstream").addHandler(handler)
        run = Run(options, spec, sink, parts, progress, failed, updating)
        try:
            code = run.run()
        except KeyboardInterrupt:
            code = run.interrupted()
        finally:
            logging.getLogger("embedstream").removeHandler(handler)
    if run.result is not None:
        show(options, run)
    return code


def _tell(options: Options) -> Callable[[str], None] | None:
    """What says a line before there is any progress."""
    return None if options.quiet else lambda line: echo(line, err=True)
