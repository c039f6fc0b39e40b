"""What a run does with the machine's memory."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from etude.core import devices

def touched(times=10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        held = [torch.ones(1 << 20) for _ in range(6)]  # 24 MB, as a step's activations
        del held
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times

free = touched()
with devices.kept_memory():
    touched(1)
    kept = touched()
print(free, kept, touched())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize("own", [False, True])
def test_pages_are_touched_once(own, monkeypatch):
    """Steps that free and ask for 6,144 pages touch them anew; in a run they stay, unless the user has chosen otherwise."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    if own:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    said = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True).stdout
    free, kept, after = map(float, said.split())
    assert free > 500
    assert kept > 500 if own else kept < 50
    assert after > 500
