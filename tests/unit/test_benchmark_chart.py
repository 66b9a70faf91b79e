"""The picture of the benchmark holds the figures of its report, and no others."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import chart  # noqa: E402

REPORT = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_that_of_the_report() -> None:
    assert (ROOT / "docs" / "benchmarks.svg").read_text("utf-8") == chart.draw(REPORT), (
        "run `python bench/chart.py docs/benchmarks.md > docs/benchmarks.svg`"
    )


def test_every_bar_is_as_long_as_its_figure_and_says_it() -> None:
    picture, bars = ElementTree.fromstring(chart.draw(REPORT)), chart.bars(REPORT)
    assert len(bars) > 4
    for bar in bars:
        assert f" {bar.median:,} ({bar.low:,} to {bar.high:,}) |" in REPORT
    lengths = [float(each.get("width", "")) for each in picture.iter(f"{SVG}rect")]
    assert lengths == pytest.approx([lengths[0] * bar.median / bars[0].median for bar in bars], abs=0.2)
    values = [each.text for each in picture.iter(f"{SVG}text") if each.get("class") == "value"]
    assert values == [f"{bar.median:,}" for bar in bars]


def test_a_report_without_the_table_has_no_picture() -> None:
    with pytest.raises(ValueError, match="the report has no"):
        chart.draw("nothing")
