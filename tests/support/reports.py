"""Keep from pytest-xdist's controller what it has no use for: reports of setups and teardowns that passed.

A worker sends three reports for each test. To pack, send, unpack and count them took a quarter of the time of
an empty test. A setup or a teardown that failed or skipped is reported as always.

    if hasattr(config, "workerinput") and not Reports.are_all_wanted(config):
        config.pluginmanager.register(Reports())
"""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol


class Reports:
    """Run each test as pytest does, and report its call and what has not passed."""

    @staticmethod
    def are_all_wanted(config: pytest.Config) -> bool:
        """Return whether the run lists durations or writes JUnit's XML, which need the other reports."""
        return bool(config.getoption("durations", None) or config.getoption("xmlpath", None))

    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in runtestprotocol(item, log=False, nextitem=nextitem):
            if report.when == "call" or not report.passed:
                item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True
