"""The model's stage with engines that fail on purpose: every row comes back to its place, or with its reason."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.dataset import dense
from lab.worker import share

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.input_hash import input_hashes
from embedstream.dataset.values import Ragged
from embedstream.errors import DeviceLost, ModelError
from embedstream.jobs import JobSpec
from embedstream.outputs import Kind
from embedstream.records import Recipe
from embedstream_worker.ahead import Ahead
from embedstream_worker.engines.base import (
    EngineInfo,
    OutOfMemory,
    OutputInfo,
    Results,
    Role,
    TextTokenizer,
    TokenBatch,
    Tokens,
)
from embedstream_worker.held import EmbeddedGroup, TokenizedGroup
from embedstream_worker.infer import Infer, Urgent
from embedstream_worker.jobs import OpenJob
from embedstream_worker.pipeline import Channel, Closed, Life, start_stage
from embedstream_worker.work import Work

DIM = 2
RECIPE = Recipe(model="m", fingerprint="f", engine="fake", dtype="float32", normalized=False, max_length=512)


class FakeEngine:
    """The vector of a text is (its first token, its length); `before` sees a batch's first tokens and may raise."""

    in_flight = 1

    def __init__(self, before: Callable[[list[int]], None] = lambda _: None, padded: bool = False) -> None:
        self.info = EngineInfo("fake", "cpu", "float32", "f", 512, padded, 64, {"dense": OutputInfo(DIM, False)})
        self.calls: list[list[int]] = []
        self.costs: list[int] = []
        self.nan: set[int] = set()
        self.nan_in_float32: set[int] = set()
        self.zero: set[int] = set()
        self.exact_calls: list[int] = []
        self.exact_errors: dict[int, Exception] = {}
        self.alive = True
        self._before = before

    def run(self, batch: TokenBatch) -> Results:
        first = batch.ids[batch.offsets[:-1]]
        self.calls.append(first.tolist())
        self.costs.append(batch.longest * len(batch) if self.info.padded else len(batch.ids))
        self._before(first.tolist())
        vectors = np.stack([first, batch.lengths], axis=1).astype(np.float32)
        vectors[[int(row) in self.nan for row in first]] = np.nan
        vectors[[int(row) in self.zero for row in first]] = 0
        return {"dense": vectors}

    def run_exact(self, batch: TokenBatch) -> Results:
        [row] = batch.ids[batch.offsets[:-1]].tolist()
        self.exact_calls.append(row)
        if row in self.exact_errors:
            raise self.exact_errors[row]
        vector = [np.nan if row in self.nan_in_float32 else row, batch.longest]
        return {"dense": np.array([vector], np.float32)}

    def warm_up(self, batch_tokens: int) -> None:  # noqa: ARG002 - as the protocol has it
        if not self.alive:
            raise RuntimeError("dead")

    def close(self) -> None: ...

    def tokenizer(self) -> TextTokenizer:
        raise NotImplementedError

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:
        raise NotImplementedError


def make_tokens(lengths: Sequence[int]) -> Tokens:
    """Row i has `lengths[i]` tokens, each of them i."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(lengths, np.int64))])
    ids = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    return Tokens(ids, offsets, np.zeros(len(lengths), np.bool_))


def make_group(
    lengths: Sequence[int], errors: dict[int, tuple[str, str]] | None = None, texts: str = "text"
) -> TokenizedGroup:
    """`texts`: of another group, no text is equal."""
    spec = JobSpec(queue="q", output="/out", model="m", parts=("p",))
    job = OpenJob("job", spec, "", 0, 512, "space", (dense(DIM, False),), FolderSink(spec.output, spec), RECIPE)
    hashes = input_hashes([f"{texts} {i}" for i in range(len(lengths))])
    return TokenizedGroup(job, [], make_tokens(lengths), hashes, errors or {})


def run(
    engine: FakeEngine, lengths: Sequence[int], budget: int = 64, errors: dict[int, tuple[str, str]] | None = None
) -> EmbeddedGroup:
    """One group through the stage."""
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    out: Channel[list[EmbeddedGroup]] = Channel(1)
    life = Life()
    infer = Infer(share(life=life), engine, budget, Ahead(64, padded=False), source, out)
    source.put([make_group(lengths, errors)])
    source.close()
    start_stage("infer", life, infer.run, [source, out]).join(30)
    if life.failure is not None:
        raise life.failure
    groups = out.get()
    assert groups is not None
    return groups[0]


def assert_rows(result: EmbeddedGroup, lengths: Sequence[int]) -> None:
    """Each row that did not fail has its own vector."""
    assert result.done.all()
    for row, length in enumerate(lengths):
        if row not in result.errors:
            assert result.results["dense"][row].tolist() == [row, length]


LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 100), st.booleans())
def test_vectors_return_to_their_rows(lengths: list[int], budget: int, padded: bool) -> None:
    engine = FakeEngine(padded=padded)
    result = run(engine, lengths, budget)
    assert_rows(result, lengths)
    assert not result.errors
    assert sorted(row for call in engine.calls for row in call) == list(range(len(lengths)))


@pytest.mark.parametrize("error", [ValueError("once"), OutOfMemory("once")], ids=["any", "memory"])
def test_a_text_that_fails_alone_is_tried_once_more_before_it_is_blamed(error: Exception) -> None:
    once = [error]

    def before(_: list[int]) -> None:
        if once:
            raise once.pop()

    result = run(FakeEngine(before), [3], budget=4)
    assert not result.errors
    assert_rows(result, [3])


def test_a_group_without_rows_is_handed_on() -> None:
    engine = FakeEngine()
    result = run(engine, [])
    assert (result.results["dense"].shape, result.computed.shape, engine.calls) == ((0, DIM), (0,), [])


@pytest.mark.holds("infinity#242")
@settings(deadline=None)
@given(st.integers(0, 63))
def test_the_one_text_that_fails_is_found_in_few_calls(culprit: int) -> None:
    def before(rows: list[int]) -> None:
        if culprit in rows:
            raise ValueError("not this one")

    engine = FakeEngine(before)
    result = run(engine, [1] * 64, budget=64)
    assert result.errors == {culprit: ("engine_error", "ValueError: not this one")}
    assert_rows(result, [1] * 64)
    assert len(engine.calls) <= 2 + 2 * math.log2(64)


@settings(deadline=None)
@given(st.sets(st.integers(0, 31), max_size=8), LENGTHS.filter(lambda lengths: len(lengths) >= 32))
def test_several_texts_that_fail_cost_only_themselves(culprits: set[int], lengths: list[int]) -> None:
    def before(rows: list[int]) -> None:
        if culprits & set(rows):
            raise ValueError

    result = run(FakeEngine(before), lengths)
    assert set(result.errors) == culprits
    assert_rows(result, lengths)


def test_a_batch_in_which_every_text_fails_has_an_error_for_each() -> None:
    def before(_: list[int]) -> None:
        raise ValueError

    result = run(FakeEngine(before), [3, 1, 2])
    assert set(result.errors) == {0, 1, 2}
    assert result.done.all()


def test_no_text_is_blamed_for_an_engine_that_is_dead() -> None:
    def before(_: list[int]) -> None:
        engine.alive = False
        raise ValueError

    engine = FakeEngine(before)
    with pytest.raises(DeviceLost, match="dead"):
        run(engine, [1] * 8)


@pytest.mark.holds("infinity#87")
@pytest.mark.parametrize("padded", [False, True])
def test_out_of_memory_halves_the_budget_for_good_and_loses_no_row(padded: bool) -> None:
    lengths = [4] * 32

    def before(_: list[int]) -> None:
        if engine.costs[-1] > 40:
            raise OutOfMemory("too much")

    engine = FakeEngine(before, padded)
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(2)
    out: Channel[list[EmbeddedGroup]] = Channel(2)
    life = Life()
    infer = Infer(share(life=life), engine, 128, Ahead(64, padded=False), source, out)
    source.put([make_group(lengths)])
    source.put([make_group(lengths)])
    source.close()
    start_stage("infer", life, infer.run, [source, out]).join(30)
    for _ in range(2):
        groups = out.get()
        assert groups is not None
        assert not groups[0].errors
        assert_rows(groups[0], lengths)
    assert infer.budget == 32
    assert engine.costs[:2] == [128, 64]
    assert max(engine.costs[2:]) <= 32, "the budget did not stay halved"


def test_a_lone_text_that_does_not_fit_is_an_error() -> None:
    def before(rows: list[int]) -> None:
        if 1 in rows:
            raise OutOfMemory("too much")

    result = run(FakeEngine(before), [4, 50, 4])
    assert set(result.errors) == {1}
    assert result.errors[1][0] == "out_of_memory"
    assert "50 tokens" in result.errors[1][1]
    assert_rows(result, [4, 50, 4])


def test_a_vector_that_is_not_finite_is_computed_again_alone_in_float32() -> None:
    engine = FakeEngine()
    engine.nan = {2, 5}
    result = run(engine, [3] * 8)
    assert not result.errors
    assert_rows(result, [3] * 8)
    assert (engine.exact_calls, len(engine.calls)) == ([2, 5], 1)
    assert result.computed.tolist() == [3, 3, 6, 3, 3, 6, 3, 3]


@pytest.mark.holds("transformers#45491")
def test_a_vector_that_is_not_finite_in_float32_either_is_an_error_and_its_neighbours_are_not() -> None:
    engine = FakeEngine()
    engine.nan, engine.nan_in_float32 = {1, 2}, {2}
    result = run(engine, [3] * 4)
    assert {row: code for row, (code, _) in result.errors.items()} == {2: "not_finite"}
    assert_rows(result, [3] * 4)
    assert engine.exact_calls == [1, 2]


def test_model2vec_114_a_vector_of_zeros_is_an_error_and_its_neighbours_are_not() -> None:
    engine = FakeEngine()
    engine.zero = {1, 3}
    result = run(engine, [3] * 5)
    assert {row: code for row, (code, _) in result.errors.items()} == {1: "zero_vector", 3: "zero_vector"}
    assert_rows(result, [3] * 5)


def test_model2vec_114_a_vector_that_is_not_of_length_1_as_the_model_says_is_an_error() -> None:
    engine = FakeEngine()
    engine.info = replace(engine.info, outputs={"dense": OutputInfo(DIM, True)})
    result = run(engine, [1, 3])  # (0, 1) and (1, 3)
    assert {row: code for row, (code, _) in result.errors.items()} == {1: "not_normalized"}


@pytest.mark.parametrize("error", [OutOfMemory("none left"), RuntimeError("none left")])
def test_a_text_that_cannot_be_run_in_float32_keeps_its_error_and_the_budget(error: Exception) -> None:
    engine = FakeEngine()
    engine.nan, engine.exact_errors = {0}, {0: error}
    result = run(engine, [3] * 4)
    [(row, (code, message))] = result.errors.items()
    assert (row, code) == (0, "not_finite")
    assert message.endswith(f"{type(error).__name__}: none left")
    assert_rows(result, [3] * 4)
    assert engine.costs == [12]


def test_rows_that_failed_before_do_not_reach_the_model() -> None:
    engine = FakeEngine()
    result = run(engine, [2, 0, 2], errors={1: ("tokenizer_error", "why")})
    assert sorted(row for call in engine.calls for row in call) == [0, 2]
    assert result.errors == {1: ("tokenizer_error", "why")}
    assert_rows(result, [2, 0, 2])


@pytest.mark.parametrize(("padded", "computed"), [(False, [1, 3, 2]), (True, [3, 3, 3])])
def test_padding_is_counted_for_engines_that_pad(padded: bool, computed: list[int]) -> None:
    assert run(FakeEngine(padded=padded), [1, 3, 2], budget=100).computed.tolist() == computed


def test_an_urgent_request_goes_before_the_next_batch() -> None:
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    out: Channel[list[EmbeddedGroup]] = Channel(1)
    urgent = Urgent(Tokens(np.array([77], np.int32), np.array([0, 1]), np.zeros(1, np.bool_)), 0, "query")

    def before(_: list[int]) -> None:
        if len(engine.calls) == 1:
            source.put_first(urgent)

    engine, life = FakeEngine(before), Life()
    infer = Infer(share(life=life), engine, 4, Ahead(64, padded=False), source, out)
    source.put([make_group([4] * 8)])
    stage = start_stage("infer", life, infer.run, [source, out])
    groups = out.get(timeout=30)
    assert engine.calls[1] == [77]
    assert urgent.done.is_set()
    assert urgent.results is not None
    assert urgent.results["dense"].tolist() == [[77, 1]]
    assert groups is not None
    assert_rows(groups[0], [4] * 8)
    source.close()
    stage.join(30)


class Slow(Ahead):
    """A model that does 10,000 tokens a second, whatever is measured."""

    tokens_per_second = 10_000.0


def test_batches_are_short_while_requests_keep_coming_and_usual_afterwards() -> None:
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    out: Channel[list[EmbeddedGroup]] = Channel(1)
    now, requests = 0.0, [Urgent(make_tokens([1]), 0, "query") for _ in range(3)]

    def before(_: list[int]) -> None:
        nonlocal now
        if requests and engine.costs[-1] > 1:
            source.put_first(requests.pop())
        now += 1.0

    engine, life = FakeEngine(before), Life()
    infer = Infer(share(life=life), engine, 6400, Slow(6400, padded=False), source, out, clock=lambda: now)
    source.put([make_group([400] * 80)])
    stage = start_stage("infer", life, infer.run, [source, out])
    groups = out.get(timeout=30)
    assert groups is not None
    assert_rows(groups[0], [400] * 80)
    # A tenth of a second is 1,000 tokens; the last request comes with the third batch, five seconds before the last.
    assert engine.costs == [6400, 1, 800, 1, 800, 1, 800, 800, 800, 800, 5200, 5200, 5200, 5200]
    source.close()
    stage.join(30)


def test_an_urgent_request_does_not_wait_for_a_slow_writer() -> None:
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    out: Channel[list[EmbeddedGroup]] = Channel(1)
    second = threading.Event()

    def before(_: list[int]) -> None:
        if len(engine.calls) == 2:
            second.set()

    life, engine = Life(), FakeEngine(before)
    infer = Infer(share(life=life), engine, 64, Ahead(64, padded=False), source, out)
    start_stage("infer", life, infer.run, [source, out])
    source.put([make_group([1], texts="first")])
    source.put([make_group([1], texts="second")])
    assert second.wait(30)
    # The first group fills the way to the writer, the second is past its last batch: it can only wait now.
    urgent = Urgent(make_tokens([1]), 0, "query")
    source.put_first(urgent)
    assert urgent.done.wait(30)
    assert urgent.results is not None
    out.close()


def test_nobody_waits_for_an_answer_of_a_stage_that_has_ended() -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def before(_: list[int]) -> None:
        arrived.set()
        assert go_on.wait(30)
        engine.alive = False
        raise ValueError

    engine, life = FakeEngine(before), Life()
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    out: Channel[list[EmbeddedGroup]] = Channel(1)
    infer = Infer(share(life=life), engine, 64, Ahead(64, padded=False), source, out)
    source.put([make_group([1])])
    start_stage("infer", life, infer.run, [source, out])
    assert arrived.wait(30)
    waiting = Urgent(make_tokens([1]), 0, "query")
    source.put_first(waiting)
    go_on.set()
    assert waiting.done.wait(30)
    assert waiting.results is None
    with pytest.raises(Closed):
        source.put_first(Urgent(make_tokens([1]), 0, "query"))


def test_a_worker_that_stops_finishes_the_batch_that_is_in_the_model() -> None:
    life = Life()
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    out: Channel[list[EmbeddedGroup]] = Channel(1)
    engine = FakeEngine(lambda _: life.stop())
    infer = Infer(share(life=life), engine, 4, Ahead(64, padded=False), source, out)
    source.put([make_group([4, 4, 4])])
    source.close()
    start_stage("infer", life, infer.run, [source, out])
    groups = out.get(timeout=30)
    assert groups is not None
    assert groups[0].done.tolist() == [True, False, False]
    assert groups[0].results["dense"][0].tolist() == [0, 4]
    assert engine.calls == [[0]]


def test_as_many_batches_are_in_the_model_as_the_engine_wants() -> None:
    together = threading.Barrier(3, timeout=30)

    def before(_: list[int]) -> None:
        together.wait()

    engine = FakeEngine(before)
    engine.in_flight = 3
    lengths = [4] * 9
    assert_rows(run(engine, lengths, budget=4), lengths)
    assert len(engine.calls) == 9


def test_the_next_window_enters_the_model_before_the_last_batch_of_this_one_has_left() -> None:
    together = threading.Barrier(2, timeout=30)

    def before(_: list[int]) -> None:
        together.wait()

    engine = FakeEngine(before)
    engine.in_flight = 2
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(2)
    out: Channel[list[EmbeddedGroup]] = Channel(2)
    infer = Infer(share(), engine, 64, Ahead(64, padded=False), source, out)
    source.put([make_group([1])])
    source.put([make_group([2])])
    source.close()
    start_stage("infer", Life(), infer.run, [source, out]).join(30)
    for length in (1, 2):
        groups = out.get()
        assert groups is not None
        assert_rows(groups[0], [length])


def test_several_batches_that_fail_at_once_cost_only_their_culprits() -> None:
    def before(rows: list[int]) -> None:
        if {3, 17} & set(rows):
            raise ValueError

    engine = FakeEngine(before)
    engine.in_flight = 4
    result = run(engine, [1] * 32, budget=8)
    assert set(result.errors) == {3, 17}
    assert_rows(result, [1] * 32)


@pytest.mark.parametrize("again", [5.0, np.nan])
def test_a_text_whose_results_of_one_kind_are_not_finite_is_tried_once_more_for_all_kinds(again: float) -> None:
    tokens = Tokens(np.arange(3, dtype=np.int32), np.arange(4), np.zeros(3, np.bool_))
    outputs: dict[Kind, OutputInfo] = {"dense": OutputInfo(DIM), "sparse": OutputInfo(9)}
    work = Work(tokens, 0, "document", outputs, False, {})
    work.cut(100)
    ones, each = np.ones((3, DIM), np.float32), np.ones(3, np.int64)
    first = Ragged(each, np.array([1, np.nan, 3], np.float32), np.array([4, 4, 4], np.uint32))
    work.land(work.take(), {"dense": ones, "sparse": first})
    second = work.take()
    assert (second.exact, second.rows.tolist(), work.done.tolist()) == (True, [1], [True, False, True])
    weights = Ragged(np.array([2]), np.array([7, again], np.float32), np.array([2, 6], np.uint32))
    work.land(second, {"dense": 2 * ones[:1], "sparse": weights})
    sparse = work.results()["sparse"]
    assert work.over
    assert sparse.counts.tolist() == [1, 2, 1]
    np.testing.assert_array_equal(sparse.values, np.array([1, 7, again, 3], np.float32))
    assert work.results()["dense"].tolist() == [[1, 1], [2, 2], [1, 1]]
    assert [code for code, _ in work.errors.values()] == (["not_finite"] if np.isnan(again) else [])


class AskingEngine(FakeEngine):
    """Embeds queries in a way of its own, for which no batch may be in it."""

    def __init__(self) -> None:
        super().__init__(self._enter)
        self.in_flight = 2
        self.inside = 0

    def _enter(self, _: list[int]) -> None:
        self.inside += 1

    def run(self, batch: TokenBatch) -> Results:
        results = super().run(batch)
        self.inside -= 1
        return results

    def query(self, text: str, prompt: str | None) -> Results:
        assert not self.inside
        if text == "bad":
            raise ModelError(f"the query cannot be embedded: {prompt}")
        if text == "huge":
            raise MemoryError("no room for the weights")
        return {"dense": np.array([[len(text), -1]], np.float32)}


def test_queries_of_an_engines_own_way_are_asked_between_batches_and_what_fails_is_said() -> None:
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    out: Channel[list[EmbeddedGroup]] = Channel(1)
    life, nothing = Life(), make_tokens([])
    infer = Infer(share(life=life), AskingEngine(), 4, Ahead(64, padded=False), source, out)
    source.put([make_group([1] * 200)])
    thread = start_stage("infer", life, infer.run, [source, out])
    asked = [Urgent(nothing, 0, "query", queries=("a", "bbb"), prompt="p: ") for _ in range(20)]
    failing = Urgent(nothing, 0, "query", queries=("a", "bad", "b"), prompt="p: ")
    huge = Urgent(nothing, 0, "query", queries=("huge",))
    for request in (*asked, failing, huge):
        source.put_first(request)
    for request in (*asked, failing, huge):
        assert request.done.wait(30)
    source.close()
    thread.join(30)
    assert life.failure is None
    for request in asked:
        assert request.results is not None
        assert not request.errors
        np.testing.assert_array_equal(request.results["dense"], [[1, -1], [3, -1]])
    assert failing.errors == {1: ("engine_error", "the query cannot be embedded: p: ")}
    assert huge.errors == {0: ("engine_error", "no room for the weights")}
    groups = out.get()
    assert groups is not None
    assert_rows(groups[0], [1] * 200)


def test_the_pace_of_a_stage_is_that_of_its_own_batches() -> None:
    """While another engine's batch is in the model: with too slow a pace, no batch would ever count as hung."""
    shared, arrived, go_on = share(), threading.Event(), threading.Event()

    def hold(_: list[int]) -> None:
        arrived.set()
        assert go_on.wait(30)

    usual: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    own: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    out: Channel[list[EmbeddedGroup]] = Channel(1)
    held = Infer(shared, FakeEngine(hold), 64, Ahead(64, padded=False), usual, out)
    ahead = Ahead(64, padded=False)
    infer = Infer(shared, FakeEngine(), 64, ahead, own, out)
    stages = [start_stage("held", shared.life, held.run, [usual]), start_stage("infer", shared.life, infer.run, [own])]
    usual.put_first(Urgent(make_tokens([1]), 0, "query"))
    assert arrived.wait(30)
    begun = time.monotonic()
    urgent = Urgent(make_tokens([5]), 0, "query")
    own.put_first(urgent)
    assert urgent.done.wait(30)
    assert ahead.tokens_per_second >= 5 / (time.monotonic() - begun)
    go_on.set()
    for channel, stage in zip((usual, own), stages, strict=True):
        channel.close()
        stage.join(30)
