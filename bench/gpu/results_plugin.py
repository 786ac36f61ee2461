"""A pytest plugin that writes each result immediately, so that a run that is cut or crashes keeps its results.

KDKERNELS_TEST_RESULTS names the file: one line of JSON for the collection, and one for each test.
"""

import json
import os
from pathlib import Path


def _write(**values):
    with Path(os.environ["KDKERNELS_TEST_RESULTS"]).open("a") as file:
        file.write(json.dumps(values) + "\n")


def _message(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return crash.message[:600]
    # A skipped test has the location and the reason instead.
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text[-600:]


def pytest_collectreport(report):
    if report.outcome != "passed":
        _write(test=report.nodeid, outcome=report.outcome, seconds=0.0, message=_message(report))


def pytest_collection_finish(session):
    _write(collected=len(session.items))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        message = "" if report.outcome == "passed" else _message(report)
        _write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)
