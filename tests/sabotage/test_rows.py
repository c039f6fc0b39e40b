"""Every row of sabotage still applies, and every method has its six."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from etude import catalog

HERE = Path(__file__).resolve().parent
LEAST = 6


def runner() -> Any:
    spec = importlib.util.spec_from_file_location("sabotage_run", HERE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RUN = runner()
ROWS = RUN.rows()


@pytest.mark.parametrize("fault", ROWS, ids=lambda fault: f"{fault.method}: {fault.breaks}")
def test_the_row_applies(fault: Any) -> None:
    """Its text stands once in its file, and with the fault in it the file is still Python, and other Python."""
    source = (RUN.ROOT / fault.path).read_text(encoding="utf-8")
    broken = fault.put(source)
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source))
    assert fault.kind in RUN.BARS
    assert fault.method in catalog.entries()


@pytest.mark.parametrize("method", catalog.entries())
def test_every_method_is_sabotaged(method: str) -> None:
    """At least six faults a method, half of them in its loop, its flags or its reported numbers; no two alike."""
    rows = [fault for fault in ROWS if fault.method == method]
    assert len(rows) >= LEAST
    assert sum(fault.kind == "loop" for fault in rows) * 2 >= len(rows)
    assert max(Counter(fault.breaks for fault in rows).values()) == 1


def test_a_row_that_no_longer_applies_is_named() -> None:
    fault = RUN.Fault("a/b", "loop", "a/b.py", "it", "x = 1", "x = 2")
    assert fault.put("y\nx = 1\n") == "y\nx = 2\n"
    with pytest.raises(ValueError, match="'it' occurs 2 times"):
        fault.put("x = 1\nx = 1\n")


def test_the_score_counts_both_kinds() -> None:
    faults = [RUN.Fault("a/b", kind, "f", kind + str(n), "", "") for kind in ("loop", "function") for n in range(3)]
    made = RUN.score(faults, [True, False, False, False, False, True])
    assert made["loops"] == {"killed": 2, "total": 3}
    assert made["functions"] == {"killed": 2, "total": 3}
    assert made["survivors"] == ["a/b: loop0", "a/b: function2"]
