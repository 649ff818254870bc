"""From what was seen of a machine to how bad it is."""

from __future__ import annotations

import pytest

from spinetta import checkup
from spinetta.checkup import Finding, Level

GIB = 1 << 30


def test_the_worst_counts() -> None:
    assert checkup.worst([]) is Level.OK
    assert checkup.worst([checkup.ok("a", ""), Finding("b", Level.WARNING, ""), Finding("c", Level.NOTE, "")]).word == (
        "warning"
    )


def test_percentiles() -> None:
    assert checkup.percentile([], 0.99) == 0.0
    assert checkup.percentile([3.0], 0.5) == 3.0
    values = [float(n) for n in range(100, 0, -1)]
    assert checkup.percentile(values, 0.5) == 50.0
    assert checkup.percentile(values, 0.99) == 99.0
    assert checkup.percentile(values, 1.0) == 100.0


@pytest.mark.parametrize(
    ("slow_s", "slow_count", "voter", "kind", "level"),
    [
        (0.5, 1, True, "ext4", Level.OK),  # one of a hundred may take long
        (0.0099, 10, True, "ext4", Level.OK),
        (0.010, 2, True, "ext4", Level.WARNING),
        (0.099, 2, True, "xfs", Level.WARNING),
        (0.100, 2, True, "ext4", Level.PROBLEM),
        (2.000, 50, False, "nfs4", Level.NOTE),
        (0.0001, 1, True, "tmpfs", Level.WARNING),
    ],
)
def test_how_fast_a_disk_must_be(slow_s: float, slow_count: int, voter: bool, kind: str, level: Level) -> None:
    times_s = [0.001] * (100 - slow_count) + [slow_s] * slow_count
    found = checkup.judge_syncs("disk-speed", times_s, kind=kind, voter=voter)
    assert found.level is level
    assert kind in found.seen
    assert bool(found.mend) is (level in (Level.WARNING, Level.PROBLEM))


def test_a_disk_that_does_nothing() -> None:
    assert checkup.judge_syncs("disk-speed", [], kind="ext4").level is Level.WARNING


@pytest.mark.parametrize(
    ("free_bytes", "free_files", "read_only", "level"),
    [
        (100 * GIB, None, False, Level.OK),
        (10 * GIB, 1_000_000, False, Level.OK),
        (10 * GIB - 1, None, False, Level.WARNING),
        (GIB - 1, None, False, Level.PROBLEM),
        (100 * GIB, 9_999, False, Level.WARNING),
        (100 * GIB, None, True, Level.PROBLEM),
    ],
)
def test_room(free_bytes: int, free_files: int | None, read_only: bool, level: Level) -> None:
    assert checkup.judge_space("disk", free_bytes, free_files, "/srv", read_only=read_only).level is level


def clock(**changes: object) -> list[Finding]:
    seen: dict[str, object] = {"source": "tsc", "synchronised": True, "stepped_s": 0.001, "over_s": 5.0}
    return checkup.judge_clock("clock", **(seen | changes))  # type: ignore[arg-type]


def test_clocks() -> None:
    assert [f.level for f in clock()] == [Level.OK]
    assert [f.level for f in clock(synchronised=None)] == [Level.OK], "not told is not no"
    assert "not known" in clock(synchronised=None)[0].seen
    assert [f.level for f in clock(synchronised=False)] == [Level.WARNING]
    assert [f.level for f in clock(source="hpet")] == [Level.NOTE]
    [stepped] = clock(stepped_s=-3600.0)
    assert stepped.level is Level.WARNING
    assert "-3600.00 s" in stepped.seen
    assert len(clock(stepped_s=1.0, synchronised=False, source="hpet")) == 3


def memory(total: int, limit: int = 0, swap: int = 0) -> list[Level]:
    return [f.level for f in checkup.judge_memory("memory", total, total // 2, limit, swap)]


def test_memory_and_swap() -> None:
    assert memory(16 * GIB) == [Level.OK, Level.OK]
    assert memory(16 * GIB, limit=GIB) == [Level.NOTE, Level.OK]
    assert memory(256 << 20) == [Level.PROBLEM, Level.OK]
    assert memory(16 * GIB, swap=GIB) == [Level.OK, Level.NOTE]


def test_open_files_and_kernels() -> None:
    assert checkup.judge_files("files", 1024, 65536).level is Level.OK
    assert checkup.judge_files("files", 1024, 4096).level is Level.WARNING
    assert checkup.judge_files("files", 256, 512).level is Level.PROBLEM
    for release, level in (
        ("6.1.0-18-amd64", Level.OK), ("5.14.0", Level.OK), ("5.10.0-28-amd64", Level.NOTE), ("4.19.0", Level.PROBLEM),
        ("strange", Level.NOTE),
    ):  # fmt: skip
        assert checkup.judge_kernel("kernel", release).level is level, release
