"""What control groups take away, in the layouts of version 1, version 2, both at once, and inside containers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.config import Settings
from spinetta.node.detect import Machine, capacity, cgroup_limits, detect

HUGE = str((1 << 63) - 4096)  # how version 1 says "no limit"
V2 = "30 1 0:26 {at} /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate"
V1_CPU = "31 1 0:27 {at} /sys/fs/cgroup/cpu,cpuacct rw shared:1 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "32 1 0:28 {at} /sys/fs/cgroup/memory rw shared:2 - cgroup cgroup rw,memory"
SETTINGS = Settings("a", "127.0.0.1:1", "/tmp")


def machine(root: Path, groups: str, mounts: list[str], files: dict[str, str], at: str = "/") -> Path:
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text("\n".join(m.format(at=at) for m in mounts) + "\n")
    for path, text in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "at", "limits"),
    [
        ("0::/\n", [V2], {"cgroup.procs": ""}, "/", (0, 0)),
        ("0::/a/b\n", [V2], {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, "/", (1500, 0)),
        ("0::/a/b\n", [V2], {"a/memory.max": "1000000", "a/b/memory.max": "2000000"}, "/", (0, 1000000)),
        ("0::/a\n", [V2], {"a/memory.max": "max", "a/cpu.max": "max 100000"}, "/", (0, 0)),
        (
            "5:cpu,cpuacct:/x\n4:memory:/x/y\n",
            [V1_CPU, V1_MEMORY],
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": HUGE,
                "memory/x/memory.limit_in_bytes": "4096000",
                "memory/x/y/memory.limit_in_bytes": HUGE,
            },
            "/",
            (500, 4096000),
        ),
        (
            "5:cpu,cpuacct:/\n0::/\n",
            [V1_CPU, V2],
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            "/",
            (0, 0),
        ),
        # In a container: the path is told from the host's root, and the mount shows its end only.
        ("0::/docker/abc\n", [V2], {"memory.max": "5000"}, "/docker/abc", (0, 5000)),
        ("0::/docker/abc\n", [V2], {"memory.max": "5000"}, "/", (0, 5000)),
        ("0::/../other\n", [V2], {"memory.max": "5000"}, "/", (0, 5000)),
        ("", [], {}, "/", (0, 0)),
    ],
)
def test_limits(
    tmp_path: Path, groups: str, mounts: list[str], files: dict[str, str], at: str, limits: tuple[int, int]
) -> None:
    assert cgroup_limits(machine(tmp_path, groups, mounts, files, at)) == limits


def test_nonsense_is_no_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a\n", [V2, "nonsense", ""], {"a/cpu.max": "x y z", "a/memory.max": ""})
    assert cgroup_limits(root) == (0, 0)


def test_offer() -> None:
    m = Machine(cpu_count=8, memory_bytes=10 << 30, disk_free_bytes=1000)
    assert m.offer().cpu_millis == 8000
    assert m.offer().memory_bytes == 9 << 30
    assert m.offer().disk_bytes == 900
    assert replace(m, memory_bytes=100 << 30).offer().memory_bytes == 98 << 30
    limited = replace(m, cpu_limit_millis=1500, memory_limit_bytes=1000)
    assert (limited.offer().cpu_millis, limited.offer().memory_bytes) == (1500, 900)


def test_this_machine(tmp_path: Path) -> None:
    found = detect(tmp_path / "not" / "there" / "yet")
    assert found.cpu_count >= 1
    assert found.memory_bytes > 1 << 20
    offered, warnings = capacity(replace(SETTINGS, data_dir=str(tmp_path)))
    assert 0 < offered.memory_bytes < found.memory_bytes
    assert not [w for w in warnings if "offered" in w]


def test_settings_come_before_detection_and_too_much_is_warned_of() -> None:
    wanted = replace(SETTINGS, cpu_millis=10**8, memory_bytes=1 << 50, disk_bytes=1 << 60, countables=(("gpu", 2),))
    offered, warnings = capacity(wanted)
    assert (offered.cpu_millis, offered.memory_bytes, offered.disk_bytes) == (10**8, 1 << 50, 1 << 60)
    assert offered.countables == (("gpu", 2),)
    text = "\n".join(warnings)
    assert "100000 cores are offered" in text
    assert "1PiB of memory are offered" in text
    assert "1024PiB of disk are offered" in text
