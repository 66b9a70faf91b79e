"""`python -m gpu_stages NAME …`: one stage, as `bench/gpu.py` starts it."""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path

from gpu_stages import STAGES
from gpu_stages.results import Results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[stage.name for stage in STAGES])
    for name in ("results", "scratch", "memory", "brought"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    from embedstream_worker.engines.torch_environment import set_up

    set_up()
    from gpu_stages.context import Bench

    [function] = [stage.function for stage in STAGES if stage.name == options.stage]
    module, _, name = function.partition(".")
    bench = Bench(
        options.stage, Results(options.results), options.scratch, options.memory, options.brought, options.tiny
    )
    getattr(importlib.import_module(f"gpu_stages.{module}"), name)(bench)


if __name__ == "__main__":
    main()
