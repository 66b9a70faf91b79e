"""What is kept of converted models, and for how long."""

from __future__ import annotations

import os
import time
from pathlib import Path

from embedstream_worker.engines.openvino_cache import UNUSED_DAYS, Cache

DAY = 24 * 3600.0


def test_converted_models_that_nobody_used_for_long_go_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    ages = {"used": UNUSED_DAYS - 1, "unused": UNUSED_DAYS + 1, "half.tmp-1": 2, "begun.tmp-2": 0.5, "mine": 999}
    for name, days in ages.items():
        (tmp_path / name).mkdir()
        if name in ("used", "unused"):
            (tmp_path / name / "model.json").touch()
        os.utime(tmp_path / name, (time.time() - days * DAY,) * 2)
    cache.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun.tmp-2", "mine", "used"]
