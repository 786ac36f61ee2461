"""The README's benchmark table is that of a committed report."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
if not (Path(sys.path[0]) / "report.py").is_file():
    pytest.skip("the tests run without the source tree", allow_module_level=True)

from report_data import load
from report_readme import insert_table

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_that_of_a_committed_report():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    reports = list((ROOT / "bench/results").glob("*/report.json"))
    assert reports
    assert any(insert_table(readme, load(report)) == readme for report in reports)
