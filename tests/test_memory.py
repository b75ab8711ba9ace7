"""data/memory.py: what the machine, control groups of either version and ulimit leave."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data import memory
from tests.support import tiny


def group(folder: Path, version: int, limit: object, use: int, cached: int) -> None:
    """Write the files of a control group."""
    names = memory._FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{use}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


@pytest.fixture
def available(tmp_path, monkeypatch):
    """Ask in a system whose control groups lie in a folder of the test."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "cgroup")
    return memory.available


def test_without_control_groups_the_machine_decides(available):
    assert 0 < available() <= psutil.virtual_memory().total


def test_the_narrowest_group_of_version_2_decides(available, tmp_path):
    (tmp_path / "cgroup").write_text("0::/slice/job\n")
    group(tmp_path / "slice", 2, 9_000_000, 1_000_000, 0)
    group(tmp_path / "slice" / "job", 2, "max", 500_000, 0)
    assert available() == 8_000_000
    group(tmp_path / "slice" / "job", 2, 4_000_000, 3_500_000, 2_000_000)
    assert available() == 2_500_000, "cached files are given up"
    group(tmp_path / "slice" / "job", 2, 1_000, 3_500_000, 0)
    assert available() == 0


def test_groups_of_version_1_decide(available, tmp_path):
    (tmp_path / "cgroup").write_text("4:memory:/docker/abc\n3:cpu:/docker/abc\n0::/\n")
    group(tmp_path / "memory", 1, 7_000_000, 1_000_000, 500_000)  # as a container sees its own group
    assert available() == 6_500_000


def test_ulimit_decides(tmp_path):
    program = "import resource; from data import memory; resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31)); "
    program += "print(memory.available())"
    done = subprocess.run([sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 1 << 31
