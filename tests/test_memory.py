"""Memory that is freed stays with the process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labelwise import environment
from labelwise.environment import container_limit
from labelwise.learning.memory import available_memory

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

FREED_BEFORE = """
from pathlib import Path
import numpy as np
from labelwise.learning.memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

held = [np.ones(2**16, dtype=np.uint8) for _ in range(1024)]
last = np.ones(2**16, dtype=np.uint8)  # above them in memory, so that nothing ends with them
del held
before = resident()
keep_freed_memory()
print(before - resident())
"""


def faults(how: str) -> int:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is asked to keep memory")
def test_kept_memory_is_not_mapped_again() -> None:
    assert faults("keep") * 10 < faults("leave")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is asked to keep memory")
def test_what_was_freed_before_goes_back() -> None:
    ran = subprocess.run([sys.executable, "-c", FREED_BEFORE], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 50e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="containers run Linux")
@pytest.mark.parametrize(
    ("limit", "use", "statistics"),
    [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ],
)
def test_pages_of_files_do_not_count_as_memory_a_container_has_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, use: str, statistics: str
) -> None:
    monkeypatch.setattr(environment, "_CGROUPS", tmp_path)
    assert container_limit() == float("inf")
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("1000000\n", encoding="ascii")
    (tmp_path / use).write_text("900000\n", encoding="ascii")
    words = "anon 150000\nfile 750000\ninactive_file 500000\nactive_file 250000\n"
    (tmp_path / statistics).write_text(words, encoding="ascii")
    assert container_limit() == 1_000_000
    assert available_memory(torch.device("cpu")) == 850_000


@pytest.mark.skipif(not Path("/sys/fs/cgroup/memory.max").exists(), reason="no cgroup of version 2 here")
def test_a_machine_without_a_limit_has_none() -> None:
    if Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip() == "max":
        assert container_limit() == float("inf")
