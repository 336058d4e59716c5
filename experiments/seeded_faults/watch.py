"""A pytest plugin that notes what happens while it happens, for `run.py`, which loads it.

Each line of the file that `SEEDED_FAULTS_WATCH` names is a JSON object: a test that has begun, one
that has ended, or one that has failed. A run that is killed has told all of it by then.
"""

import json
import os
import time


def _note(event, nodeid, **more):
    with open(os.environ["SEEDED_FAULTS_WATCH"], "a", encoding="utf-8") as file:
        line = {"event": event, "test": nodeid, "time": time.monotonic(), **more}
        file.write(json.dumps(line) + "\n")


def _failure(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Without a crash entry, as of a failed import, the last line says what was wrong
    _note("failed", report.nodeid, why=" ".join(lines[:2] if crash else lines[-1:])[:300])


def pytest_runtest_logstart(nodeid):
    _note("begun", nodeid)


def pytest_runtest_logfinish(nodeid):
    _note("ended", nodeid)


def pytest_runtest_logreport(report):
    if report.failed:
        _failure(report)


def pytest_collectreport(report):
    if report.failed:
        _failure(report)
