"""Which logs of ended attempts are removed."""

from __future__ import annotations

import os
from pathlib import Path

from spinetta.node.logsweep import LogDirectory, SteppedClock, sweep_logs, sweep_removed, too_many


def logs(*ages_and_sizes: tuple[float, int]) -> list[LogDirectory]:
    return [LogDirectory(Path(f"/logs/{i}"), 1000.0 - age, size) for i, (age, size) in enumerate(ages_and_sizes)]


def names(found: list[LogDirectory]) -> list[str]:
    return [d.path.name for d in found]


def test_nothing_is_removed_within_the_limits() -> None:
    assert too_many(logs((1, 10), (2, 10)), now_s=1000.0, keep_bytes=20, keep_s=5) == []


def test_the_oldest_go_until_the_rest_fits() -> None:
    found = too_many(logs((1, 10), (3, 10), (2, 10)), now_s=1000.0, keep_bytes=15, keep_s=0)
    assert names(found) == ["1", "2"]


def test_what_is_too_old_goes_whatever_its_size() -> None:
    assert names(too_many(logs((1, 10), (9, 0)), now_s=1000.0, keep_bytes=0, keep_s=5)) == ["1"]


def test_no_limits_keep_all() -> None:
    assert too_many(logs((10**6, 10**12)), now_s=1000.0, keep_bytes=0, keep_s=0) == []


def test_a_sweep_spares_what_is_held(tmp_path: Path) -> None:
    for name in ("held.1", "ended.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stdout").write_bytes(b"x" * 100)
        os.utime(tmp_path / name / "stdout", (0, 0))
    assert sweep_logs(tmp_path, {"held.1"}, now_s=10**9, keep_bytes=1, keep_s=1) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["held.1"]


def test_a_sweep_without_logs_is_nothing(tmp_path: Path) -> None:
    assert sweep_logs(tmp_path / "none", (), now_s=0.0, keep_bytes=1, keep_s=1) == 0


def test_a_clock_that_was_set_makes_nothing_old() -> None:
    wall, steady = [1000.0], [0.0]
    clock = SteppedClock(lambda: wall[0], lambda: steady[0])
    found = logs((1, 10), (900, 10))
    steady[0], wall[0] = 300.0, 1300.5  # as it should be
    assert names(too_many(found, now_s=clock.now_s(), keep_bytes=0, keep_s=1000, since_s=clock.set_at_s)) == ["1"]
    year_s = 365 * 86400.0
    steady[0], wall[0] = 600.0, 1600.0 + year_s
    assert too_many(found, now_s=clock.now_s(), keep_bytes=0, keep_s=1000, since_s=clock.set_at_s) == []
    steady[0], wall[0] = 1601.0, 2601.0 + year_s  # from then on time is time again
    doomed = too_many(found, now_s=clock.now_s(), keep_bytes=0, keep_s=1000, since_s=clock.set_at_s)
    assert sorted(names(doomed)) == ["0", "1"]
    steady[0], wall[0] = 1700.0, 1.0  # set back: what was written is of the future
    assert too_many(found, now_s=clock.now_s(), keep_bytes=0, keep_s=1000, since_s=clock.set_at_s) == []


def test_a_folder_that_cannot_be_looked_at_keeps_no_other(tmp_path: Path) -> None:
    for name in ("bad.1", "old.1"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad.1" / "stdout").symlink_to("stdout")
    (tmp_path / "old.1" / "stdout").write_bytes(b"x")
    os.utime(tmp_path / "old.1" / "stdout", (0, 0))
    assert sweep_logs(tmp_path, (), now_s=10**9, keep_bytes=0, keep_s=1) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bad.1"]


def test_the_data_of_a_seat_given_up_goes_after_a_month(tmp_path: Path) -> None:
    for name in ("etcd", "etcd.removed", "etcd.of-cdf8"):
        (tmp_path / name / "member").mkdir(parents=True)
    now_s = (tmp_path / "etcd.removed").stat().st_ctime
    month_s = 30 * 86400.0
    assert not sweep_removed(tmp_path, now_s=now_s + month_s - 1)
    assert not sweep_removed(tmp_path, now_s=now_s + 9 * month_s, since_s=now_s + 9 * month_s), "the clock was set"
    assert sweep_removed(tmp_path, now_s=now_s + month_s + 1)
    assert not sweep_removed(tmp_path, now_s=now_s + month_s + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["etcd", "etcd.of-cdf8"]
