"""What docs/architecture.md promises, and the tests that hold each promise on real processes, servers and models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from named_tests import assert_there

ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"

HELD_BY = {
    "Complete": [
        "e2e/test_fleet.py::test_a_worker_killed_in_mid_job_loses_and_doubles_nothing",
        "e2e/test_fleet.py::test_two_workers_share_a_job_and_double_nothing",
        "crash/test_walk.py::test_each_row_comes_out_once_whoever_breaks",
        "broker/test_state_machine.py::test_any_order_of_steps_keeps_the_promises",
    ],
    "Durable before acknowledged": [
        "crash/test_walk.py::test_each_row_comes_out_once_whoever_breaks",
        "e2e/test_worker_faults.py::test_an_output_that_cannot_be_written_for_a_while_is_waited_for",
        "e2e/test_worker_faults.py::test_a_commit_whose_reply_is_lost_counts_once",
    ],
    "Bounded": [
        "e2e/test_scale.py::test_memory_at_two_million_rows_is_that_at_100_000",
        "e2e/test_worker_memory.py::test_a_corpus_of_refused_rows_takes_no_more_memory_than_some_shards",
        "e2e/test_unwritable_outputs.py::test_of_many_jobs_that_cannot_be_written_no_more_is_held_than_may_wait",
        "unit/test_lines.py::test_a_line_far_over_the_bound_takes_no_memory_for_its_rest",
        "unit/test_block_bounds.py::test_a_decompression_bomb_is_an_error_and_takes_no_memory",
    ],
    "Right": [
        "engines/test_model_folders.py::test_vectors_equal_sentence_transformers",
        "engines/test_torch_engine.py::test_documents_equal_sentence_transformers",
        "engines/test_torch_engine.py::test_truncation_is_flagged_exactly",
    ],
    "One space": [
        "e2e/test_embedded.py::test_vectors_of_another_model_are_never_added_to_a_half_done_dataset",
        "broker/test_contract.py::test_commit_of_another_space_is_refused",
        "unit/test_worker_jobs.py::test_a_job_of_another_space_is_refused",
    ],
    "Bad rows cost only themselves": [
        "e2e/test_fleet.py::test_bad_rows_cost_only_themselves",
        "e2e/test_poison.py::test_a_text_that_kills_costs_three_workers_and_one_row",
        "e2e/test_poison.py::test_bad_texts_that_do_not_kill_cost_only_themselves",
    ],
    "Repeatable": [
        "e2e/test_embedded.py::test_the_same_command_again_says_that_it_is_done",
        "e2e/test_embedded.py::test_killed_and_run_again_it_goes_on_and_doubles_nothing",
    ],
    "Closed": [
        "e2e/test_closed.py::test_a_decompression_bomb_ends_its_job_and_neither_the_worker_nor_another_job",
        "e2e/test_closed.py::test_a_spec_that_names_a_place_outside_of_the_roots_is_refused",
        "engines/test_trust.py::test_code_of_the_models_own_runs_only_when_it_is_trusted",
        "engines/test_trust.py::test_a_pickle_that_runs_code_is_refused_even_when_pickles_are_allowed",
    ],
}


@pytest.mark.parametrize("promise", HELD_BY)
def test_a_promise_is_held_by_tests_that_exist(promise: str) -> None:
    assert_there(promise, HELD_BY[promise])


def test_every_promise_is_here() -> None:
    promises = ARCHITECTURE.read_text("utf-8").partition("## Promises")[2]
    assert re.findall(r"^\d+\. \*([A-Za-z ]+?)\.?\*", promises, re.MULTILINE) == list(HELD_BY)
