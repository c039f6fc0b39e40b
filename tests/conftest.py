"""What all tests share: one thread, nothing left to chance, and a switch that lets nothing be skipped."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# the same examples every time, however slow the machine is
settings.register_profile("etude", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("etude")

# what tests run is not remembered as trusted in the home of whoever runs them
os.environ["ETUDE_CACHE"] = tempfile.mkdtemp(prefix="etude-tests-")
atexit.register(shutil.rmtree, os.environ["ETUDE_CACHE"], ignore_errors=True)

NO_SKIP = "ETUDE_NO_SKIP"  # set to 1 where every dataset and extra is present: a skipped test is a failed one there


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a generator of its own is the same every time, in whatever order the tests run.

    One thread, too: the tests have small tensors and a process a core.
    """
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 – libraries draw from it
    torch.manual_seed(0)


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
