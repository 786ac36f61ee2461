"""The README's benchmark table is that of a committed report."""

from pathlib import Path

import pytest

pytest.importorskip("bench", reason="the tests run without the source tree")

from bench.report.files import load
from bench.report.readme import insert_table

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_that_of_a_committed_report():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    reports = list((ROOT / "bench/results").glob("*/report.json"))
    assert reports
    assert any(insert_table(readme, load(report)) == readme for report in reports)
