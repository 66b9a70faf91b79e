"""How much of a GPU embedstream uses: stage by stage, so that what goes wrong in one costs that one alone.

    python bench/gpu.py --out FOLDER                          # under 10 minutes, no network
    python bench/gpu.py --out FOLDER --stages kernels,bert    # some of them
    python bench/gpu.py --out FOLDER --tiny                   # tries the benchmark itself, on the CPU if need be

Needs torch, transformers, sentence-transformers, tokenizers and pyarrow; the project need not be installed. What else
a machine lacks is taken from the folder that `bench/gpu_pack.py` makes. FOLDER then has `results.jsonl`, a figure a
line as soon as it is known; `report.txt`, the table that is printed last; and `stages.log`, all that stages printed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from gpu_stages import STAGES, Stage
from gpu_stages.report import table
from gpu_stages.results import OK, Results
from gpu_stages.runner import run_stage
from gpu_stages.setting_up import ROOT, set_up

SHORTEST_SECONDS = 5.0
"""A stage is not begun with less."""

TINY_SECONDS = 120.0
"""For any stage with `--tiny`: on a busy machine loading libraries alone takes long."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BROUGHT = ROOT / ".gpu"
MEMORY = Path("/dev/shm")


class Told(BaseException):
    """A signal told the run to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.jsonl")
    results.forget([stage.name for stage in options.stages])
    for number in SIGNALS:
        signal.signal(number, _tell)
    code = 0
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-bench-", ignore_cleanup_errors=True) as scratch:
            shared = MEMORY if MEMORY.is_dir() else Path(scratch)
            with tempfile.TemporaryDirectory(prefix="gpu-bench-", dir=shared, ignore_cleanup_errors=True) as memory:
                _run(options, results, Path(scratch), Path(memory))
    except Told as told:
        code = 128 + told.number
        _note_missing(options.stages, results, f"not begun: told to end by {signal.Signals(told.number).name}")
    print(_report(options.out, results), flush=True)
    sys.exit(code)


def _run(options: argparse.Namespace, results: Results, scratch: Path, memory: Path) -> None:
    end = time.monotonic() + 60 * options.minutes

    def say(line: str) -> None:
        print(line, flush=True)
        results.note("set-up", what=line)

    results.forget(["set-up"])
    (scratch / "work").mkdir()
    environment = set_up(options.brought, scratch / "packages", scratch / "cache", say)
    places = {"results": results.path, "scratch": scratch / "work", "memory": memory, "brought": options.brought}
    arguments = [word for name, place in places.items() for word in (f"--{name}", str(place.resolve()))]
    for stage in options.stages:
        left = end - time.monotonic()
        if left < SHORTEST_SECONDS:
            results.note(stage.name, ended=f"not begun: {options.minutes:g} minutes are over")
            continue
        _run_stage(
            stage,
            min(TINY_SECONDS if options.tiny else stage.seconds, left),
            [*arguments, *["--tiny"] * options.tiny],
            environment,
            options.out,
        )
        _report(options.out, results)  # should this process be killed


def _run_stage(stage: Stage, seconds: float, arguments: list[str], environment: dict[str, str], out: Path) -> None:
    results, begun = Results(out / "results.jsonl"), time.monotonic()
    command = [sys.executable, "-m", "gpu_stages", stage.name, *arguments]

    def say(pid: int) -> None:
        print(f"{stage.name}: process {pid}, {seconds:.0f} s at most: {stage.what}", flush=True)

    try:
        ended = run_stage(command, seconds, out / "stages.log", environment, say)
    except Told as told:
        results.note(stage.name, ended=f"told to end by {signal.Signals(told.number).name}")
        raise
    results.note(stage.name, ended=ended, seconds=round(time.monotonic() - begun, 1))
    if ended != OK:
        print(f"{stage.name}: {ended}", flush=True)


def _note_missing(stages: list[Stage], results: Results, why: str) -> None:
    ended = {figure["stage"] for figure in results.read() if "ended" in figure}
    for stage in stages:
        if stage.name not in ended:
            results.note(stage.name, ended=why)


def _report(out: Path, results: Results) -> str:
    peaks = [figure["tflops"] for figure in results.find("ceilings", what="matrix product")]
    text = table(results.read(), peaks[-1] if peaks else None)
    (out / "report.txt").write_text(text + "\n")
    return text


def _tell(number: int, _frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # once is enough: what runs is ended, and the table printed
    raise Told(number)


def _stages(names: str) -> list[Stage]:
    known = {stage.name: stage for stage in STAGES}
    wanted = list(known) if names == "all" else names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stage is called {', '.join(unknown)}; use all, or of {','.join(known)}")
    return [known[name] for name in wanted]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", type=_stages, default="all", help="names with commas between, in this order, or all"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything; a stage gets what is left")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="for results.jsonl, report.txt, stages.log"
    )
    parser.add_argument("--brought", type=Path, default=BROUGHT, metavar="FOLDER", help="what bench/gpu_pack.py made")
    parser.add_argument("--tiny", action="store_true", help="small models and few texts, on the CPU if need be")
    return parser.parse_args()


if __name__ == "__main__":
    main()
