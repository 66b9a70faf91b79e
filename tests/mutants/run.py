"""Break the code on purpose and see the tests turn red: `make mutants`, or some by a word of their names; those of the
files that the last commit changed by `--changed`.

Each mutant lives in a copy of the tree and runs its own tests alone. Exit code 1 if one survives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants.catalogue import MUTANTS, ROOT, Mutant

AT_ONCE = 2
TEST_SECONDS = 60
"""A mutant whose test hangs is found out, too."""

COPIED = ("embedstream", "producer", "worker", "coordinator", "tests", "examples", "pyproject.toml")

KILLED = "killed"

CHANGED = "--changed"

GREEN, RED = 0, 1
"""pytest's exit codes for passed and failed; any other says that the tests did not run."""


def run_tests(tests: Sequence[str], mutant: Mutant | None = None) -> tuple[int, str]:
    """pytest's exit code, and its last words."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, root / name)
        for edit in mutant.edits if mutant else ():
            edit.apply(root)
        applications = [root, *(root / name for name in ("producer", "worker", "coordinator"))]
        paths = os.pathsep.join(map(str, applications))
        options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "--timeout", str(TEST_SECONDS)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=root,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    return done.returncode, done.stdout[-40_000:] + done.stderr[-2000:]


def judge(mutant: Mutant) -> tuple[str, float, str]:
    """Killed, survived, or not run; how long that took, in seconds; and what the tests said."""
    begun = time.monotonic()
    code, words = run_tests(mutant.tests, mutant)
    seconds = time.monotonic() - begun
    why = re.search(r"^E +(.*)", words, re.MULTILINE)
    if code == RED and why is not None:
        return KILLED, seconds, why[1][:100]
    return "SURVIVED" if code == GREEN else "NOT RUN", seconds, words[-6000:]


def changed_files() -> set[str]:
    """The files that the last commit changed, and those that are changed since; none where git does not know."""
    done = subprocess.run(
        ["git", "diff", "--name-only", "HEAD~1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return set(done.stdout.split())


def main(wanted: Sequence[str]) -> int:
    if wanted == [CHANGED]:
        files = changed_files()
        chosen = [mutant for mutant in MUTANTS if any(edit.path in files for edit in mutant.edits)]
        if not chosen:
            print("no mutant is of a file that the last commit changed")
            return 0
    else:
        chosen = [mutant for mutant in MUTANTS if not wanted or any(word in mutant.name for word in wanted)]
    if not chosen:
        print("no mutant has any of these words in its name")
        return 2
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    code, words = run_tests(tests)
    if code != GREEN:
        print(f"the tests are not green without any mutant:\n{words}")
        return 1
    bad = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutant, (verdict, seconds, words) in zip(chosen, pool.map(judge, chosen), strict=True):
            bad += verdict != KILLED
            print(f"{verdict:9} {seconds:5.1f} s  {mutant.name}\n{'':19}{words}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
