"""Control groups: what is found in the texts of various machines, and what is done in a tree of files like theirs."""

from __future__ import annotations

import errno
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from spinetta.runtime.shim import hierarchy
from spinetta.runtime.shim.cgroup import CAPABILITIES, Cgroups, Limits, members, sweep
from spinetta.runtime.shim.counters import Counters
from spinetta.runtime.shim.hierarchy import Hierarchy, detect

DEBIAN_12 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
SEPARATE_V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
"""
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
JOINED_V1 = """\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
"""
OWN_V1 = "9:name=systemd:/\n8:pids:/\n6:freezer:/\n4:memory:/jobs/7\n2:cpuacct:/\n1:cpu:/\n"


def found(mountinfo: str, cgroup: str) -> tuple[list[tuple[int, set[str], str]], list[str]]:
    trees, problems = detect(mountinfo, cgroup)
    return [(tree.version, set(tree.controllers), str(tree.own)) for tree in trees], problems


def test_version_2_of_debian_12() -> None:
    assert found(DEBIAN_12, "0::/system.slice/ssh.service\n") == (
        [(2, set(), "/sys/fs/cgroup/system.slice/ssh.service")],
        [],
    )


def test_separate_version_1_mounts_with_an_empty_version_2() -> None:
    trees, problems = found(SEPARATE_V1 + UNIFIED, OWN_V1 + "0::/\n")
    assert trees == [
        (1, {"cpu"}, "/sys/fs/cgroup/cpu"),
        (1, {"cpuacct"}, "/sys/fs/cgroup/cpuacct"),
        (1, {"memory"}, "/sys/fs/cgroup/memory/jobs/7"),
        (1, {"freezer"}, "/sys/fs/cgroup/freezer"),
        (1, {"pids"}, "/sys/fs/cgroup/pids"),
        (2, set(), "/sys/fs/cgroup/unified"),
    ]
    assert problems == []


def test_joined_version_1_mounts() -> None:
    trees, _ = found(JOINED_V1, "3:cpu,cpuacct:/a:b\n4:memory:/\n")
    assert trees == [
        (1, {"cpu", "cpuacct"}, "/sys/fs/cgroup/cpu,cpuacct/a:b"),
        (1, {"memory"}, "/sys/fs/cgroup/memory"),
    ]


def test_a_container_that_sees_its_part_only() -> None:
    mount = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    assert found(mount, "4:memory:/docker/abc/x\n")[0] == [(1, {"memory"}, "/sys/fs/cgroup/memory/x")]
    assert found(mount, "4:memory:/docker/abc\n")[0] == [(1, {"memory"}, "/sys/fs/cgroup/memory")]
    trees, problems = found(mount, "4:memory:/docker/abcdef\n")
    assert trees == []
    assert problems == ["the cgroup /docker/abcdef is not below /docker/abc, which is mounted at /sys/fs/cgroup/memory"]


def test_read_only_mounts_and_odd_paths() -> None:
    mount = "35 31 0:32 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n"
    assert found(mount, "0::/\n") == ([], ["/sys/fs/cgroup is mounted read-only"])
    mount = r"35 31 0:32 / /mnt/my\040groups rw - cgroup2 cgroup rw" + "\n"
    assert found(mount, "0::/\n")[0] == [(2, set(), "/mnt/my groups")]


@pytest.mark.parametrize(("mountinfo", "cgroup"), [("", ""), ("nonsense\n", "nonsense\n"), (DEBIAN_12, "")])
def test_nothing_of_use(mountinfo: str, cgroup: str) -> None:
    assert found(mountinfo, cgroup) == ([], [])


# A tree of files ----------------------------------------------------------------------------------------------------

V1_FILES: Mapping[str, Mapping[str, str]] = {
    "memory": {
        "memory.limit_in_bytes": "9223372036854771712\n",
        "memory.memsw.limit_in_bytes": "9223372036854771712\n",
        "memory.max_usage_in_bytes": "4096\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
    },
    "cpu": {"cpu.cfs_period_us": "0\n", "cpu.cfs_quota_us": "-1\n", "cpu.shares": "1024\n"},
    "cpuacct": {"cpuacct.usage_user": "1500000000\n", "cpuacct.usage_sys": "250000000\n"},
    "pids": {"pids.max": "max\n"},
    "freezer": {"freezer.state": "THAWED\n"},
    "blkio": {},
}
V2_BASIC = {
    "cgroup.procs": "",
    "cgroup.events": "populated 0\nfrozen 0\n",
    "cgroup.kill": "",
    "cgroup.subtree_control": "",
}
V2_BASIC |= {"cpu.stat": "usage_usec 3\nuser_usec 2000000\nsystem_usec 500000\n"}
V2_LIMITS = {"memory.max": "max\n", "memory.swap.max": "max\n", "memory.peak": "8192\n", "cpu.max": "max 100000\n"}
V2_LIMITS |= {"cpu.weight": "100\n"}
V2_LIMITS |= {"memory.events": "low 0\noom 3\noom_kill 2\n", "pids.max": "max\n"}


def populate(folder: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        (folder / name).write_text(content)


class Machine:
    """A directory that looks like the mounted hierarchies of one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trees: list[Hierarchy] = []

    def v1(self, *controllers: str) -> Machine:
        mount = self.root / ",".join(controllers)
        mount.mkdir()
        self.trees.append(Hierarchy(1, frozenset(controllers), mount, mount))
        return self

    def v2(self, controllers: str, own: str = "", subtree: str = "") -> Machine:
        mount = self.root / "unified"
        group = mount / own
        group.mkdir(parents=True)
        for folder in (mount, group):
            populate(folder, V2_BASIC | {"cgroup.controllers": f"{controllers}\n", "cgroup.subtree_control": subtree})
        self.trees.append(Hierarchy(2, frozenset(), mount, group))
        return self

    def make_dir(self, path: Path) -> None:
        """As mkdir, and the files appear, as the kernel has it."""
        path.mkdir()
        tree = next(tree for tree in self.trees if path.is_relative_to(tree.mount))
        if tree.version == 1:
            populate(path, {"cgroup.procs": ""})
            for controller in tree.controllers:
                populate(path, V1_FILES[controller])
        else:
            enabled = (path.parent / "cgroup.subtree_control").read_text().replace("+", "")
            populate(path, V2_BASIC | {"cgroup.controllers": enabled})
            populate(path, V2_LIMITS if enabled else {})

    def cgroups(self, problems: tuple[str, ...] = ()) -> Cgroups:
        return Cgroups("spinetta-n1-0000", self.trees, problems, self.make_dir)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_version_1_limits_and_counters(machine: Machine) -> None:
    cgroups = machine.v1("memory").v1("cpu").v1("cpuacct").v1("pids").v1("freezer").cgroups()
    assert cgroups.capabilities == CAPABILITIES
    assert cgroups.missing == {}
    group = cgroups.create("a.1", Limits(cpu_millis=1500, memory_bytes=1 << 20, pids_max=9))
    memory, cpu, pids = (machine.root / name / "spinetta-n1-0000" / "a.1" for name in ("memory", "cpu", "pids"))
    assert (memory / "memory.limit_in_bytes").read_text().startswith("1048576")
    assert (memory / "memory.memsw.limit_in_bytes").read_text().startswith("1048576")
    assert (cpu / "cpu.cfs_period_us").read_text().startswith("100000")
    assert (cpu / "cpu.cfs_quota_us").read_text().startswith("150000")
    assert (pids / "pids.max").read_text().startswith("9")
    assert group.counters() == Counters(1.5, 0.25, 4096, 0)
    assert sorted(group.join_files()) == sorted(
        str(machine.root / name / "spinetta-n1-0000" / "a.1" / "cgroup.procs")
        for name in ("memory", "cpu", "cpuacct", "pids", "freezer")
    )
    (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert group.counters().oom_kills == 2
    group.kill()
    assert (machine.root / "freezer/spinetta-n1-0000/a.1/freezer.state").read_text().strip() == "THAWED"
    assert not group.populated()


def test_version_2_limits_and_counters(machine: Machine) -> None:
    cgroups = machine.v2("cpuset cpu io memory pids").cgroups()
    assert cgroups.capabilities == CAPABILITIES
    group = cgroups.create("a.1", Limits(cpu_millis=5, memory_bytes=1 << 20, pids_max=9))
    folder = machine.root / "unified/spinetta-n1-0000/a.1"
    assert (folder / "memory.max").read_text().startswith("1048576")
    assert (folder / "memory.swap.max").read_text().startswith("0")
    assert (folder / "cpu.max").read_text().startswith("1000 100000")  # the least that the kernel takes
    assert (folder / "pids.max").read_text().startswith("9")
    assert group.counters() == Counters(2.0, 0.5, 8192, 2)
    (folder / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert group.populated()
    group.kill()
    assert (folder / "cgroup.kill").read_text() == "1"
    assert set((machine.root / "unified/cgroup.subtree_control").read_text().split()) == {
        "+memory",
        "+cpu",
        "+pids",
        "+io",
    }


def test_hybrid_takes_each_where_it_is(machine: Machine) -> None:
    cgroups = machine.v1("memory").v1("cpu", "cpuacct").v1("pids").v1("freezer").v2("").cgroups()
    assert cgroups.capabilities == CAPABILITIES
    group = cgroups.create("a.1", Limits(memory_bytes=1 << 20))
    # cgroup.kill and cpu.stat of version 2 are better than the freezer and cpuacct.
    assert {path.parent.parent.name for path in group.paths} == {"unified", "memory", "cpu,cpuacct", "pids"}
    assert group.counters() == Counters(2.0, 0.5, 4096, 0)


def test_what_is_missing_is_said(machine: Machine) -> None:
    cgroups = machine.v1("cpu").cgroups(("/sys/fs/cgroup/memory is mounted read-only",))
    assert cgroups.capabilities == ("cpu-limit", "cgroup-kill")
    assert cgroups.missing["memory-limit"] == "/sys/fs/cgroup/memory is mounted read-only"
    nothing = Cgroups("spinetta-n1-0000", [])
    assert nothing.capabilities == ()
    assert nothing.missing["cgroup-kill"] == "no usable cgroup hierarchy is mounted"
    group = nothing.create("a.1", Limits(memory_bytes=1))
    assert (group.paths, group.kills, group.populated(), group.remove()) == ([], False, False, True)


def test_a_limit_that_is_refused_leaves_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroups = machine.v1("memory").cgroups()

    def refuse(path: Path, content: str) -> None:
        raise OSError(errno.EINVAL, "refused", str(path))

    def rmdir(path: Path) -> None:
        for file in path.iterdir():
            file.unlink()
        os.rmdir(path)  # noqa: PTH106

    monkeypatch.setattr(Path, "rmdir", rmdir)
    monkeypatch.setattr("spinetta.runtime.shim.cgroup.write_text", refuse)
    with pytest.raises(OSError, match="refused"):
        cgroups.create("a.1", Limits(memory_bytes=1))
    assert not (machine.root / "memory/spinetta-n1-0000/a.1").exists()


def busy(group: Path) -> Callable[[Path, str], None]:
    """Write as the kernel does when `group` holds processes: no controllers below it."""
    really = hierarchy.write_text

    def write(path: Path, content: str) -> None:
        if path == group / "cgroup.subtree_control" and (group / "cgroup.procs").read_text():
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        if path.name == "cgroup.procs":
            (group / "cgroup.procs").write_text("")
        really(path, content)

    return write


def test_version_2_a_busy_group_gives_way_to_one_above(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.v2("cpu memory pids", own="session-1.scope")
    own = machine.root / "unified/session-1.scope"
    (own / "cgroup.procs").write_text("1234\n")
    monkeypatch.setattr(hierarchy, "write_text", busy(own))
    cgroups = machine.cgroups()
    assert cgroups.folders == [machine.root / "unified/spinetta-n1-0000"]
    assert cgroups.capabilities == CAPABILITIES


def test_version_2_a_delegated_group_is_emptied_into_a_leaf(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.v2("cpu memory pids", own="spinetta.service")
    own = machine.root / "unified/spinetta.service"
    (own / "cgroup.procs").write_text("1234\n")
    (own / hierarchy.LEAF).mkdir()
    (own / hierarchy.LEAF / "cgroup.procs").write_text("")
    monkeypatch.setattr(hierarchy, "write_text", busy(own))
    monkeypatch.setattr(hierarchy, "delegated", lambda group, _top: group == own)
    assert machine.cgroups().folders == [own / "spinetta-n1-0000"]
    assert (own / hierarchy.LEAF / "cgroup.procs").read_text() == "1234"
    # The next daemon of the service may find itself in the leaf.
    tree = Hierarchy(2, frozenset(), machine.root / "unified", own / hierarchy.LEAF)
    assert hierarchy.base_v2(tree) == (own, frozenset({"cpu", "memory", "pids"}), [])


def test_who_was_handed_a_group(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.v2("cpu memory pids", own="user.slice/node.service")
    top = machine.root / "unified"
    own = top / "user.slice/node.service"
    (own / "cgroup.procs").write_text("")
    owners = {own.parent: 0, own / "cgroup.procs": 0}
    stat = Path.stat

    def owned(path: Path, **how: bool) -> os.stat_result:
        found = list(stat(path, **how))
        found[4] = owners.get(path, found[4])
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", owned)
    for us, of_own, of_above, ours in ((0, 0, 0, False), (7, 7, 0, True), (7, 7, 7, False), (7, 0, 0, False)):
        monkeypatch.setattr(os, "geteuid", lambda us=us: us)
        owners.update({own.parent: of_above, own / "cgroup.procs": of_own})
        assert hierarchy.delegated(own, top) is ours
    assert not hierarchy.delegated(top, top)  # the kernel's own has no type
    (top / "cgroup.type").write_text("domain\n")
    assert hierarchy.delegated(top, top)


def test_version_2_that_gives_some_is_better_than_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.v2("cpu memory pids", own="user@7.service")
    own, really = machine.root / "unified/user@7.service", hierarchy.write_text
    (own / "cgroup.controllers").write_text("memory pids\n")

    def refuse(path: Path, content: str) -> None:
        if path.parent == own.parent:
            raise OSError(errno.EACCES, "Permission denied", str(path))
        really(path, content)

    monkeypatch.setattr(hierarchy, "write_text", refuse)
    cgroups = machine.cgroups()
    assert cgroups.folders == [own / "spinetta-n1-0000"]
    assert {"memory-limit", "pids-limit"} <= set(cgroups.capabilities)
    assert "user@7.service has no cpu" in cgroups.missing["cpu-limit"]


def test_version_2_that_gives_nothing_says_why(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.v2("cpu memory pids", own="a")

    def refuse(path: Path, content: str) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(hierarchy, "write_text", refuse)
    cgroups = machine.cgroups()
    assert "memory-limit" not in cgroups.capabilities
    assert "cannot pass on its controllers: Permission denied" in cgroups.missing["memory-limit"]
    assert "cpu-usage" in cgroups.capabilities


# This machine --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["all", "version 1", "version 2"])
def real(request: pytest.FixtureRequest) -> Iterator[Cgroups]:
    """Real groups of this machine, of one version or both, removed afterwards."""
    read = (Path(f"/proc/self/{name}").read_text() for name in ("mountinfo", "cgroup"))
    trees, problems = detect(*read)
    if request.param != "all":
        trees = [tree for tree in trees if f"version {tree.version}" == request.param]
    if not trees:
        pytest.skip(f"this machine has no cgroups of {request.param}")
    cgroups = Cgroups(f"spinetta-test-{uuid.uuid4().hex[:8]}", trees, problems)
    yield cgroups
    assert sweep(cgroups.folders, 10.0) == []
    assert [folder for folder in cgroups.folders if folder.exists()] == []


def test_real_groups_kill_all_that_is_in_them(real: Cgroups) -> None:
    group = real.create("a.1", Limits())
    join = "; ".join(f"echo 0 > {path}" for path in group.join_files())
    script = f"{join}; setsid sh -c 'sleep 1000 & sleep 1000' & sleep 1000 & echo up; wait"
    with subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert group.populated()
        assert process.pid in members(group.paths[0])
        assert not group.remove()
        while group.populated():
            group.kill()
        assert process.wait(10) == -9
    counters = group.counters()
    assert counters.cpu_user_s is not None
    while not group.remove():
        pass


def test_real_groups_inside_groups_are_swept(real: Cgroups) -> None:
    group = real.create("a.1", Limits())
    inner = group.paths[0] / "made by the task"
    inner.mkdir()
    with subprocess.Popen(["/bin/sh", "-c", f"echo 0 > '{inner}/cgroup.procs'; echo up; sleep 1000"], stdout=-1) as sh:
        assert sh.stdout is not None
        assert sh.stdout.readline() == b"up\n"
        assert sweep(real.folders, 10.0) == []
        assert sh.wait(10) == -9
