"""What all tests share: one thread, nothing left to chance, and a switch that lets nothing be skipped."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
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

BUDGET = 10.0  # CPU seconds a method may cost: 110 methods and what they share then fit into 12 minutes on two cores
METHODS = 110
CLOCK = pytest.StashKey[float]()
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


@contextlib.contextmanager
def _undrawn() -> Iterator[None]:
    from matplotlib.figure import Figure
    from PIL import Image

    from etude.blocks.acting import episodes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure, "savefig", lambda self, path, **settings: Image.new("RGB", (8, 8)).save(path, format="png")
        )
        patch.setattr(Figure, "draw", lambda self, renderer: None)
        filmed = episodes._filmed
        patch.setattr(episodes, "_filmed", lambda env, policy, seed, steps, width: filmed(env, policy, seed, steps, 8))
        yield


@pytest.fixture(scope="session")
def undrawn() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """In this context figures leave an empty picture, and films are 8 pixels wide: drawing is dear, and is looked at elsewhere."""
    return _undrawn


@pytest.fixture(autouse=True)
def _numbers_are_not_drawn(request: pytest.FixtureRequest) -> Iterator[None]:
    with _undrawn() if request.node.name.startswith(("test_loop", "test_reported")) else contextlib.nullcontext():
        yield


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is spent from here on is spent on tests."""
    session.config.stash[CLOCK] = sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Note the CPU seconds of each phase, those of the child processes that it waited for with it."""
    report: Any = yield
    now, before = sum(os.times()[:4]), item.config.stash[CLOCK]
    item.config.stash[CLOCK] = now
    report.user_properties.append(("cpu", now - before))
    return _refuse(report)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The ten dearest tests, the methods above their budget, and what the suite would cost with all methods in it."""
    costs: dict[str, float] = {}
    shared = (
        0.0  # what the last test of a worker takes down was everybody's, and so were the processes that end with it
    )
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", "") in ("setup", "call"):
            costs[report.nodeid] = costs.get(report.nodeid, 0.0) + dict(report.user_properties)["cpu"]
        elif getattr(report, "when", "") == "teardown":
            shared += dict(report.user_properties)["cpu"]
    if len(costs) < 20:
        return
    terminalreporter.section("CPU seconds")
    for nodeid, spent in sorted(costs.items(), key=lambda item: -item[1])[:10]:
        terminalreporter.write_line(f"{spent:6.1f}  {nodeid}")
    methods: dict[str, float] = {}
    for nodeid, spent in costs.items():
        methods[_method(nodeid)] = methods.get(_method(nodeid), 0.0) + spent
    shared += methods.pop("", 0.0)
    for name, spent in sorted(methods.items(), key=lambda item: -item[1]):
        if spent > BUDGET:
            terminalreporter.write_line(f"{spent:6.1f}  {name} (its budget is {BUDGET:g})")
    if methods and shared:
        each = sum(methods.values()) / len(methods)
        whole = (shared + METHODS * each) / 120
        terminalreporter.write_line(
            f"{len(methods)} methods cost {each:.1f} each, the rest {shared:.0f}: {METHODS} methods would take {whole:.1f} "
            "minutes on two cores"
        )


def _method(nodeid: str) -> str:
    """The method a test belongs to, as room/name; "" for what all share."""
    file, _, test = nodeid.partition("::")
    if file.endswith("contract/test_methods.py") and "[" in test:
        return test[test.index("[") + 1 : -1]
    parts = file.split("/")
    if len(parts) < 2 or ("facts" not in parts and "learns" not in parts):
        return ""
    names = [name for name in _names() if name.startswith(parts[-2] + "/")]
    stem = parts[-1].removesuffix(".py").removeprefix("test_")
    fitting = [
        name for name in names if stem == name.rpartition("/")[2] or stem.startswith(name.rpartition("/")[2] + "_")
    ]
    return max(fitting, key=len, default="")


@functools.cache
def _names() -> list[str]:
    from etude import catalog

    return list(catalog.entries())


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
