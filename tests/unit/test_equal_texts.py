"""Equal texts enter the model once, and every row that has one gets its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.dataset import dense

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.input_hash import input_hashes
from embedstream.dataset.values import Ragged, Values
from embedstream.jobs import JobSpec
from embedstream.outputs import Kind
from embedstream.records import Recipe
from embedstream_worker.engines.base import OutputInfo, Results
from embedstream_worker.engines.hashing import HashingTokenizer
from embedstream_worker.equal_texts import ENTRY_BYTES, Begun, Recent
from embedstream_worker.held import EmbeddedGroup, RowErrors, TokenizedGroup
from embedstream_worker.jobs import OpenJob
from embedstream_worker.tokenize import encode_rows

RECIPE = Recipe(model="m", fingerprint="f", engine="fake", dtype="float32", normalized=False, max_length=512)
OUTPUTS: dict[Kind, OutputInfo] = {
    "dense": OutputInfo(2),
    "sparse": OutputInfo(300),
    "multivector": OutputInfo(2, token_bytes=8),
}


def model(text: str) -> dict[Kind, list[list[float]]]:
    """What a text gives of each kind, as a function of the text alone."""
    letters = sorted(set(text))
    return {
        "dense": [[float(len(text)), float(sum(map(ord, text)))]],
        "sparse": [[ord(letter), text.count(letter)] for letter in letters],
        "multivector": [[float(ord(letter)), 1.0] for letter in text],
    }


def some_results(texts: Sequence[str], kinds: Sequence[Kind]) -> dict[Kind, Values]:
    made = [model(text) for text in texts]
    values: dict[Kind, Values] = {}
    for kind in kinds:
        rows = [of[kind] for of in made]
        flat = np.array([number for row in rows for number in row], np.float32).reshape(-1, 2)
        counts = np.array([len(row) for row in rows], np.int64)
        if kind == "dense":
            values[kind] = flat
        elif kind == "sparse":
            values[kind] = Ragged(counts, flat[:, 1], flat[:, 0].astype(np.uint32))
        else:
            values[kind] = Ragged(counts, flat)
    return values


def group_of(
    texts: Sequence[str],
    space: str = "space",
    errors: RowErrors | None = None,
    note: Callable[[int | None], None] | None = None,
) -> TokenizedGroup:
    spec = JobSpec(queue="q", output="/out", model="m", parts=("p",))
    job = OpenJob("job", spec, "", 0, 512, space, (dense(2, False),), FolderSink(spec.output, spec), RECIPE)
    tokens, _ = encode_rows(HashingTokenizer(), texts, "", 512)
    return TokenizedGroup(job, [], tokens, input_hashes(texts), errors or {}, note)


class Model:
    """Windows through a model that remembers which texts it has computed."""

    def __init__(self, kinds: Sequence[Kind] = ("dense",), recent: Recent | None = None) -> None:
        self.computed: list[str] = []
        self.fails: set[str] = set()
        self._kinds = kinds
        self._recent = recent or Recent()

    def begin(self, group: TokenizedGroup) -> Begun:
        begun = Begun(group, {kind: OUTPUTS[kind] for kind in self._kinds}, False, self._recent)
        begun.work.cut(30)
        return begun

    def run(self, texts: Sequence[str], batches: int | None = None, **given: object) -> EmbeddedGroup:
        """`batches`: it is stopped after so many."""
        begun = self.begin(group_of(texts, **given))  # type: ignore[arg-type]
        work = begun.work
        while work.waiting:
            if batches == 0:
                work.stop()
                break
            taken = work.take()
            entered = [taken.batch.ids[a:b].tobytes() for a, b in zip(*_bounds(taken.batch.offsets), strict=True)]
            batch = [next(text for text in texts if _ids(text) == ids) for ids in entered]
            if self.fails & set(batch):
                if len(batch) > 1:
                    work.again([np.array([row]) for row in taken.rows])
                else:
                    work.fail(int(taken.rows[0]), "engine_error", "no")
                continue
            self.computed += batch
            results: Results = some_results(batch, self._kinds)  # type: ignore[assignment]
            work.land(taken, results)
            batches = None if batches is None else batches - 1
        return begun.embedded()


def _bounds(offsets: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[list[int], list[int]]:
    return offsets[:-1].tolist(), offsets[1:].tolist()


def _ids(text: str) -> bytes:
    return HashingTokenizer().encode([text], 512).ids.tobytes()


def assert_results(found: EmbeddedGroup, texts: Sequence[str], kinds: Sequence[Kind]) -> None:
    results: Mapping[Kind, Values] = found.results  # type: ignore[assignment]
    for kind, expected in some_results(texts, kinds).items():
        values = results[kind]
        if isinstance(expected, Ragged):
            assert isinstance(values, Ragged)
            assert (values.counts.tolist(), values.values.tolist()) == (
                expected.counts.tolist(),
                expected.values.tolist(),
            )
            if expected.indices is not None and values.indices is not None:
                assert values.indices.tolist() == expected.indices.tolist()
        else:
            assert not isinstance(values, Ragged)
            assert values.tolist() == expected.tolist()


TEXTS = ["a", "b", "ab", "ba", "aab", "long text", "c" * 40]
WINDOWS = st.lists(st.lists(st.sampled_from(TEXTS), max_size=20), max_size=4)
KINDS = st.lists(st.sampled_from(list(OUTPUTS)), min_size=1, unique=True)


@settings(deadline=None, max_examples=60)
@given(WINDOWS, KINDS)
def test_each_text_is_computed_once_and_all_its_rows_have_its_results(
    windows: list[list[str]], kinds: list[Kind]
) -> None:
    model = Model(kinds)
    seen: set[str] = set()
    for texts in windows:
        found = model.run(texts)
        assert_results(found, texts, kinds)
        assert found.done.all()
        assert not found.errors
        new = [text not in seen and text not in texts[:row] for row, text in enumerate(texts)]
        assert found.duplicates.tolist() == [not each for each in new]
        seen |= set(texts)
    assert sorted(model.computed) == sorted(seen)


@pytest.mark.parametrize(("space", "kinds"), [("another", ["dense"]), ("space", ["dense", "sparse"])])
def test_nothing_is_taken_from_results_that_were_made_in_another_way(space: str, kinds: list[Kind]) -> None:
    recent = Recent()
    Model(recent=recent).run(["a"])
    second = Model(kinds, recent)
    assert_results(second.run(["a"], space=space), ["a"], kinds)
    assert second.computed == ["a"]


def test_a_text_that_fails_fails_in_all_its_rows_and_is_tried_again_in_the_next_window() -> None:
    model = Model()
    model.fails = {"bad"}
    found = model.run(["a", "bad", "b", "bad"])
    assert found.errors == dict.fromkeys([1, 3], ("engine_error", "no"))
    model.fails.clear()
    assert not model.run(["bad"]).errors
    assert model.computed == ["a", "b", "bad"]


def test_a_text_that_no_tokenizer_could_bear_reaches_no_model_and_no_later_window() -> None:
    model, error = Model(), ("tokenizer_error", "no")
    assert model.run(["odd", "a", "odd"], errors={0: error, 2: error}).errors == {0: error, 2: error}
    assert model.run(["odd"]).errors == {}
    assert model.computed == ["a", "odd"]


def test_a_text_that_a_job_does_not_want_fails_in_it_though_its_results_are_known_from_another() -> None:
    model, error = Model(), ("too_long", "no")
    model.run(["long", "a"])
    found = model.run(["a", "long", "b", "long"], errors={1: error, 3: error})
    assert found.errors == {1: error, 3: error}
    assert not model.run(["long"]).errors


def test_rows_of_a_text_that_a_stopping_worker_leaves_are_all_left() -> None:
    model = Model()
    texts = ["x" * 150, "y" * 150, "y" * 150, "x" * 150]
    assert model.run(texts, batches=1).done.tolist() == [True, False, False, True]
    assert model.run(texts).done.all()
    assert model.computed == ["x" * 150, "y" * 150]


def test_a_block_with_which_workers_died_shows_of_each_row_what_it_does() -> None:
    model = Model()
    model.run(["a"])
    assert not model.run(["a", "b", "a"], note=lambda _: None).duplicates.any()
    assert model.computed == ["a", "a", "b", "a"]


def test_progress_counts_all_rows_of_a_text_that_is_computed() -> None:
    begun = Model().begin(group_of(["aa", "b", "aa"]))
    taken = begun.work.take()
    begun.work.land(taken, some_results(["aa", "b"], ["dense"]))  # type: ignore[arg-type]
    assert (begun.in_hand.rows, begun.in_hand.tokens, begun.in_hand.padded) == (3, 3, 3)


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    row = ENTRY_BYTES + 8
    model = Model(recent=Recent(4 * row))
    model.run(["a", "b"])
    model.run(["c", "d"])
    model.run(["a", "e"])  # a moves to the newest, b is pushed out with the oldest window
    assert model.computed == ["a", "b", "c", "d", "e"]
    model.run(["a", "c"])
    assert model.computed == ["a", "b", "c", "d", "e"]
    model.run(["b"])
    assert model.computed[-1] == "b"


def test_of_a_window_that_is_larger_than_the_memory_its_last_texts_are_remembered() -> None:
    model = Model(recent=Recent(2 * (ENTRY_BYTES + 8)))
    model.run(["a", "b", "c"])
    model.run(["b", "c"])
    assert model.computed == ["a", "b", "c"]
    model.run(["a"])
    assert model.computed[-1] == "a"
