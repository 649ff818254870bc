"""Limits: what control files say, where a log is cut, how much room a directory takes, what an end is called."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
from pathlib import Path

import pytest

from spinetta.runtime.shim import usedspace
from spinetta.runtime.shim.attempt import Held
from spinetta.runtime.shim.cgroup import Cgroups, Limits
from spinetta.runtime.shim.counters import Counters, parse_io_v1, parse_io_v2, with_ended
from spinetta.runtime.shim.hierarchy import everywhere
from spinetta.runtime.shim.judging import judge
from spinetta.runtime.shim.logcap import MARKER_BYTES_MAX, cut, cut_all, end_of_cut, marker
from spinetta.runtime.shim.sysapi import EndedUsage
from spinetta.runtime.shim.usedspace import Scan
from tests.unit.test_cgroup import OWN_V1, SEPARATE_V1, UNIFIED, V1_FILES, V2_LIMITS, Machine, machine

_ = machine  # fixture
MIB = 1 << 20


# What control files say -----------------------------------------------------------------------------------------------


def test_block_io_of_both_versions() -> None:
    v1 = "8:0 Read 4096\n8:0 Write 512\n8:0 Sync 4608\n8:16 Read 1\n8:16 Total 1\nTotal 4609\n"
    assert parse_io_v1(v1) == (4097, 512)
    assert parse_io_v1("Total 0\n") == (0, 0)
    v2 = "8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\n8:0 rbytes=1 wbytes=2\n259:0\n"
    assert parse_io_v2(v2) == (1459201, 314773506)
    assert parse_io_v2("") == (0, 0)


def test_what_the_kernel_says_of_the_ended_fills_what_the_group_lacks() -> None:
    ended = EndedUsage(user_s=1.0, system_s=2.0, peak_bytes=3, io_read_bytes=40, io_write_bytes=50)
    assert with_ended(Counters(), ended) == Counters(1.0, 2.0, 3, io_read_bytes=40, io_write_bytes=50)
    # A group of version 1 has not seen what was written from the cache; neither has missed what both have.
    counted = Counters(9.0, 8.0, 7, io_read_bytes=41, io_write_bytes=0, pids_peak=6)
    assert with_ended(counted, ended) == Counters(9.0, 8.0, 7, io_read_bytes=41, io_write_bytes=50, pids_peak=6)
    assert with_ended(counted, None) == counted


def test_version_1_counts_and_shares(machine: Machine) -> None:
    group = machine.v1("cpu").v1("blkio").v1("pids").cgroups().create("a.1", Limits(cpu_millis=250, pids_max=9))
    folder = {name: machine.root / name / "spinetta-n1-0000" / "a.1" for name in ("cpu", "blkio", "pids")}
    assert (folder["cpu"] / "cpu.shares").read_text().startswith("256")
    (folder["blkio"] / "blkio.throttle.io_service_bytes").write_text("8:0 Read 10\n8:0 Write 20\n")
    (folder["pids"] / "pids.events").write_text("max 3\n")
    (folder["pids"] / "pids.peak").write_text("9\n")
    counters = group.counters()
    assert (counters.pids_refused, counters.pids_peak) == (3, 9)
    assert (counters.io_read_bytes, counters.io_write_bytes) == (10, 20)


def test_version_2_counts_and_weights(machine: Machine) -> None:
    cgroups = machine.v2("cpuset cpu io memory pids").cgroups()
    group = cgroups.create("a.1", Limits(cpu_millis=2500, memory_bytes=MIB))
    folder = machine.root / "unified/spinetta-n1-0000/a.1"
    assert (folder / "cpu.weight").read_text().startswith("250")
    for name, text in (("io.stat", "8:0 rbytes=1 wbytes=2\n"), ("pids.events", "max 1\n"), ("memory.current", "77\n")):
        (folder / name).write_text(text)
    (folder / "pids.current").write_text("5\n")  # an older kernel has no pids.peak
    counters, now = group.sample()
    assert (now.memory_bytes, now.pids) == (77, 5)
    assert (counters.io_read_bytes, counters.io_write_bytes, counters.pids_refused) == (1, 2, 1)
    (folder / "pids.current").write_text("3\n")
    assert group.sample()[0].pids_peak == 5
    assert group.counters().pids_peak == 5


@pytest.mark.parametrize(("millis", "shares", "weight"), [(1, 2, 1), (1000, 1024, 100), (10**9, 1 << 18, 10_000)])
def test_shares_stay_within_what_the_kernel_takes(machine: Machine, millis: int, shares: int, weight: int) -> None:
    for at, name in ((machine.v1("cpu"), "cpu.shares"), (Machine(machine.root / "2"), "cpu.weight")):
        at.root.mkdir(exist_ok=True)
        group = (at.v2("cpu") if name == "cpu.weight" else at).cgroups().create("a.1", Limits(cpu_millis=millis))
        assert (
            (group.paths[0] / name).read_text().split()[0].startswith(str(shares if name == "cpu.shares" else weight))
        )


def test_a_delegated_group_without_io_is_still_good(machine: Machine) -> None:
    machine.v2("cpu memory pids", own="user.slice")
    (machine.root / "unified/cgroup.controllers").write_text("cpu io memory pids\n")
    cgroups = machine.cgroups()
    assert cgroups.folders == [machine.root / "unified/user.slice/spinetta-n1-0000"]
    assert "memory-limit" in cgroups.capabilities


def test_everywhere_a_runtime_may_make_groups() -> None:
    more = "36 31 0:33 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n"
    more += "38 31 0:35 / /sys/fs/cgroup/net rw - cgroup cgroup rw,net_cls,net_prio\n"
    more += "39 31 0:36 / /sys/fs/cgroup/hugetlb ro - cgroup cgroup rw,hugetlb\n"
    own = OWN_V1 + "5:devices:/x\n12:net_cls,net_prio:/\n13:hugetlb:/\n0::/y\n"
    found = {str(tree.own): sorted(tree.controllers) for tree in everywhere(SEPARATE_V1 + UNIFIED + more, own)}
    assert found == {
        "/sys/fs/cgroup/cpu": ["cpu"],
        "/sys/fs/cgroup/cpuacct": ["cpuacct"],
        "/sys/fs/cgroup/memory/jobs/7": ["memory"],
        "/sys/fs/cgroup/freezer": ["freezer"],
        "/sys/fs/cgroup/pids": ["pids"],
        "/sys/fs/cgroup/systemd": ["name=systemd"],
        "/sys/fs/cgroup/unified/y": [],
        "/sys/fs/cgroup/devices/x": ["devices"],
        "/sys/fs/cgroup/net": ["net_cls", "net_prio"],
    }


def test_this_machines_hierarchies_are_all_found() -> None:
    mountinfo, own = (Path(f"/proc/self/{name}").read_text() for name in ("mountinfo", "cgroup"))
    trees = everywhere(mountinfo, own)
    assert all((tree.own / "cgroup.procs").exists() for tree in trees)


# Where a log is cut ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "says"),
    [(64 * MIB, "64MiB"), (1 << 30, "1GiB"), (3 << 10, "3KiB"), (1000, "1000 bytes"), (1, "1 bytes")],
)
def test_a_log_is_cut_to_its_limit(tmp_path: Path, limit: int, says: str) -> None:
    end = marker(limit)
    assert end.decode() == f"\n[spinetta: this log is cut here: its limit is {says}]\n"
    assert len(end) <= MARKER_BYTES_MAX
    if limit > MIB:
        return
    log = tmp_path / "stdout"
    assert not cut(str(log), limit)  # not there
    size = max(limit, len(end))
    log.write_bytes(b"x" * (size - 1))
    assert not cut(str(log), limit)
    log.write_bytes(b"x" * size)
    assert not cut(str(log), limit)  # as long as it may be
    log.write_bytes(b"x" * (size + 1))
    assert cut(str(log), limit)
    assert log.read_bytes() == b"x" * (size - len(end)) + end
    with log.open("ab") as more:
        more.write(b"more\n")
    assert cut(str(log), limit)
    assert cut(str(log), limit)  # nothing was written since
    assert log.read_bytes() == b"x" * (size - len(end)) + end
    assert end_of_cut(log.read_bytes() + b"more", 0) == size
    begin = min(5, size - len(end))
    assert end_of_cut(log.read_bytes()[begin:], begin) == size - begin
    assert end_of_cut(b"x" + log.read_bytes(), 0) == -1  # what a task has written itself, somewhere


def test_what_is_no_log_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert not cut(str(tmp_path / "fifo"), 10)
    (tmp_path / "target").write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError, match="symbolic links"):
        cut(str(tmp_path / "link"), 100)
    assert cut_all([str(tmp_path / name) for name in ("link", "fifo", "none")], 100) == ""
    assert (tmp_path / "target").stat().st_size == 5000
    assert cut_all([str(tmp_path / "target")], 1024) == "target was cut at the limit of 1KiB"
    (tmp_path / "stderr").write_bytes(b"x" * 5000)
    both = [str(tmp_path / name) for name in ("target", "stderr")]
    assert cut_all(both, 1024) == "target and stderr were cut at the limit of 1KiB"


def test_a_log_that_hoards_blocks_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "stdout"
    log.write_bytes(b"hello\n")
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    with log.open("rb+") as file:
        if fallocate(file.fileno(), 1, ctypes.c_long(0), ctypes.c_long(200 * MIB)):  # FALLOC_FL_KEEP_SIZE
            pytest.skip("this file system reserves nothing")
    assert (log.stat().st_size, log.stat().st_blocks * 512 >= 200 * MIB) == (6, True)
    assert not cut(str(log), 100 * MIB)  # some do that of their own accord
    assert cut(str(log), MIB)
    assert log.stat().st_blocks * 512 <= 2 * MIB
    assert log.read_bytes().startswith(b"hello\n")
    assert log.read_bytes().endswith(marker(MIB))


# How much room a directory takes --------------------------------------------------------------------------------------


def measured(root: Path) -> Scan:
    scan = Scan(str(root))
    while scan.step():
        pass
    return scan


def blocks(*paths: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in paths)


def test_blocks_are_counted_not_lengths(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
        file.write(b"x" * 8192)
    tiny = [tmp_path / f"f{n}" for n in range(10)]
    for path in tiny:
        path.write_bytes(b"x")
    scan = measured(tmp_path)
    assert scan.whole
    assert scan.used_bytes == blocks(tmp_path, sparse, *tiny)
    assert measured(tmp_path / "none").used_bytes == 0


def test_hard_links_count_once_and_symbolic_ones_as_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    for folder in (root, outside):
        (folder / "file").write_bytes(b"x" * 100_000)
    for n in range(4):
        os.link(root / "file", root / "a" / f"link{n}")
    (root / "to-outside").symlink_to(outside)
    (root / "to-root").symlink_to(".")
    whole = blocks(root, root / "a", root / "file", root / "to-outside", root / "to-root")
    assert measured(root).used_bytes == whole
    # Of more than are remembered each name counts its share.
    monkeypatch.setattr(usedspace, "LINKS_MAX", 0)
    assert abs(measured(root).used_bytes - whole) < 5


def test_a_deep_tree_takes_few_descriptors(tmp_path: Path) -> None:
    depth, fd = 600, os.open(tmp_path, os.O_RDONLY)
    for _level in range(depth):
        os.mkdir("d" * 100, dir_fd=fd)
        inner = os.open("d" * 100, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    deepest = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.write(deepest, b"x" * 1_000_000)
    os.close(deepest)
    os.close(fd)
    before, most = len(os.listdir("/proc/self/fd")), 0  # noqa: PTH208
    scan = Scan(str(tmp_path))
    while scan.step():
        most = max(most, len(os.listdir("/proc/self/fd")))  # noqa: PTH208
    assert scan.whole
    assert scan.used_bytes >= 1_000_000 + blocks(tmp_path) * depth // 2
    assert most <= before + usedspace.OPEN_FOLDERS_MAX + 3  # listing one copies its descriptor
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("depth", [0, usedspace.OPEN_FOLDERS_MAX + 5])
@pytest.mark.parametrize("away", ["moved", "removed"])
def test_one_that_is_moved_while_it_is_looked_at_hides_nothing_but_its_neighbours(
    tmp_path: Path, depth: int, away: str
) -> None:
    for name in "abcde":
        (tmp_path / name).mkdir()
    first, *_, last = os.listdir(tmp_path)  # noqa: PTH208 - in the order in which they are listed; looked at backwards
    (tmp_path / first / "file").write_bytes(b"x" * 1_000_000)
    trap = tmp_path.joinpath(last, *(["d"] * depth))
    (trap / "in" / "deepest").mkdir(parents=True)
    for number in range(usedspace.SLICE_ENTRIES):
        (trap / "in" / "deepest" / str(number)).touch()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    scan, moved = Scan(str(tmp_path)), False
    while scan.step():
        opened = {os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()}
        if not moved and str(trap / "in/deepest") in opened:
            moved = True
            if away == "moved":
                (trap / "in" / "deepest").rename(tmp_path / first / "deepest")
            else:
                shutil.rmtree(trap / "in" / "deepest")
    assert moved
    assert scan.whole == (depth == 0 or away == "removed")
    assert scan.used_bytes >= 1_000_000
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_depth_is_no_way_to_fill_our_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usedspace, "DEPTH_MAX", 100)
    tmp_path.joinpath(*(["d"] * 98)).mkdir(parents=True)
    assert measured(tmp_path).whole
    tmp_path.joinpath(*(["d"] * 102)).mkdir(parents=True)
    assert not measured(tmp_path).whole


def test_a_tree_that_changes_is_not_left(tmp_path: Path) -> None:
    """A directory that is moved out while it is looked at: what is found at its new place is not followed up."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a" / "b").mkdir(parents=True)
    (outside / "rich").mkdir(parents=True)
    (outside / "rich" / "file").write_bytes(b"x" * 1_000_000)
    for moved_after in range(12):
        scan = Scan(str(root))
        for _step in range(moved_after):
            scan.step()
        (root / "a" / "b").rename(outside / "b")
        (root / "a" / "b").symlink_to(outside)
        while scan.step():
            pass
        assert scan.used_bytes < 1_000_000
        (root / "a" / "b").unlink()
        (outside / "b").rename(root / "a" / "b")


# What an end is called ------------------------------------------------------------------------------------------------


def held_of(tmp_path: Path, *, pids_max: int = 0, memory_bytes: int = 0) -> Held:
    return Held(
        key="a.1",
        service=False,
        argv=["x"],
        env={},
        cwd="",
        stdout="",
        stderr="",
        record_path=tmp_path / "a.1",
        scratch=None,
        limits=Limits(memory_bytes=memory_bytes, pids_max=pids_max),
        walltime_s=5.0,
        grace_s=60.0,
        stop_wait_s=1.0,
        token=0,
        incarnation="",
    )


@pytest.mark.parametrize(
    ("stopped", "oom", "refused", "code"), [*itertools.product(["", "walltime", "disk-limit"], [0, 1], [0, 2], [0, 3])]
)
def test_each_end_has_one_reason(tmp_path: Path, stopped: str, oom: int, refused: int, code: int) -> None:
    held = held_of(tmp_path, pids_max=7)
    held.status, held.stop_why, held.signalled = (True, code), stopped, bool(stopped)
    reason, message = judge(held, Counters(oom_kills=oom, pids_refused=refused), succeeded=code == 0)
    if stopped:
        assert reason == stopped
    elif oom:
        assert reason == "out-of-memory"
    elif refused and code:
        assert reason == "out-of-pids"
    else:
        assert (reason, bool(message)) == ("exit", bool(refused))
    assert ("another process or thread, 2 times: its limit is 7" in message) == bool(refused)


def test_a_limit_above_the_tasks_own_is_told(tmp_path: Path) -> None:
    held = held_of(tmp_path)
    held.status = (False, 6)
    reason, message = judge(held, Counters(pids_refused=1), succeeded=False)
    assert reason == "out-of-pids"
    assert message.endswith("once: the limit is that of a group above the task's")
    held.spawn_error = "program not found: x"
    assert judge(held, Counters(pids_refused=1), succeeded=False) == ("spawn-failed", "program not found: x")


def test_a_machine_that_lacks_the_counters_says_nothing(machine: Machine) -> None:
    assert "pids.events" not in V1_FILES["pids"]
    assert "io.stat" not in V2_LIMITS
    counters = machine.v1("pids").cgroups().create("a.1", Limits()).counters()
    assert counters == Counters()
    assert Cgroups("spinetta-n1-0000", []).create("a.1", Limits()).sample()[1].pids == 0
