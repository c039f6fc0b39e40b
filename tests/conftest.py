"""What all tests share: one thread a process, and the switch that lets nothing be skipped where the datasets are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

NO_SKIP = "ETUDE_NO_SKIP"  # set to 1 where every dataset and extra is present: a skipped test is a failed one there


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    return _refuse(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report: Any = yield
    return _refuse(report)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``, all contract tests of one method go to one worker (they share its runs), and so does a test file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByMethodOrFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return test[test.index("[") :] if file.endswith("contract/test_methods.py") and "[" in test else file

    return ByMethodOrFile(config, log)


def _refuse(report: Any) -> Any:
    """Turn a skip into a failure that quotes its reason (an expected failure stays what it is)."""
    if os.environ.get(NO_SKIP) == "1" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{NO_SKIP}=1 allows no skipped test. {reason}"
    return report
