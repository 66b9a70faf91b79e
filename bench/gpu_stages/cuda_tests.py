"""The stage `tests`: the engine's own tests on a GPU; what each says is known at once."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from gpu_stages import material
from gpu_stages.context import Bench
from gpu_stages.setting_up import ROOT

_FILE = "tests/engines/test_torch_cuda.py"
_LONGEST_REASON = 300


class _Outcomes:
    """A plugin of pytest's."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            reason = report.longreprtext.strip().splitlines()[-1:] or ["it says nothing"]
            self._bench.note(report.nodeid.partition("::")[2], failed=reason[0][:_LONGEST_REASON])


def run(bench: Bench) -> None:
    """Raises `SystemExit` if they cannot even be collected."""
    os.chdir(ROOT)
    os.environ["EMBEDSTREAM_TEST_MODEL"] = str(material.minilm(bench))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # of plugins that happen to be here
    outcomes = _Outcomes(bench)
    code = pytest.main([_FILE, "-v", "-p", "no:cacheprovider"], plugins=[outcomes])
    bench.note(_FILE, **outcomes.counts)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {code.name if isinstance(code, pytest.ExitCode) else code}")
