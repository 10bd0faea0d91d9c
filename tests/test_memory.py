"""Memory that is freed stays with the process."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from labelwise.learning.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def use():
    np.ones(64 * 2**20, dtype=np.uint8)  # 16,384 pages, written and freed

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is asked to keep memory")
def test_kept_memory_is_not_mapped_again() -> None:
    assert faults("keep") * 10 < faults("leave")
