"""What is said of a machine that cannot do something, and how to mend it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from spinetta.checkup import Finding, Level
from spinetta.ociprograms import HYBRID, NONE, V2, HostIds, Program
from spinetta.runtime.detect import support_of
from spinetta.runtime.detectwords import Seen
from spinetta.runtime.groups import Groups, look_at_groups

RUNC = Program("/usr/sbin/runc", "runc", (1, 3, 4), "runc version 1.3.4")
GROUPS = Groups(HYBRID, ("cpu", "memory", "pids"), (), "spinetta-trial-1", "spinetta-trial-1")
IDS = HostIds(1_000_000, 65536)
SEEN = Seen(
    wanted="auto", data_dir="/srv/n1", user="root", rootless=False, groups=GROUPS, found=(RUNC,), unusable=(),
    inits=("/usr/bin/tini-static",), uids=IDS, gids=IDS, subuids=(), newuidmap=True, userns_settings={},
    fuse_overlayfs="",
)  # fmt: skip
RAN = {"program": RUNC.path, "init": "/usr/bin/tini-static", "problem": "", "groups": "", "seconds": 0.05}
TRIED = {"mode": "root", "overlay": {"read_only": "", "writable": ""}, "programs": [RAN]}
FACTS: dict[str, Any] = {"user_namespace": "", "idmapped": "", "tried": [TRIED]}


def bad(seen: Seen = SEEN, facts: dict[str, Any] = FACTS) -> dict[str, Finding]:
    """The last finding of each check that is worse than a note."""
    return {f.check: f for f in support_of(seen, facts, seen.found).findings if f.level > Level.NOTE}


def tried(**changes: Any) -> dict[str, Any]:
    return {**FACTS, "tried": [{**TRIED, **changes}]}


def test_all_is_well() -> None:
    found = support_of(SEEN, FACTS, (RUNC,))
    assert bad() == {}
    assert (found.works, found.program, found.init, found.ids, found.first_uid) == (
        True, RUNC.path, "/usr/bin/tini-static", "range", 1_000_000,
    )  # fmt: skip
    assert (found.overlay, found.overlay_writable, found.joins_groups, found.idmapped) == (True, True, True, True)
    assert found.warnings == ()
    assert found.limits_missing == ()


def test_nothing_is_installed() -> None:
    found = bad(replace(SEEN, found=(), inits=()), {**FACTS, "tried": [{**TRIED, "programs": []}]})
    assert found["runtime"].mend == "apt install runc (or crun)"
    assert found["init"].mend.startswith("apt install tini")
    assert support_of(replace(SEEN, found=()), tried(programs=[]), ()).works is False


def test_a_program_that_fails_is_quoted() -> None:
    broken = {**RAN, "problem": "create: no such thing", "init": ""}
    assert "/usr/sbin/runc: create: no such thing" in bad(facts=tried(programs=[broken]))["runtime"].seen


def test_user_namespaces_that_are_switched_off() -> None:
    seen = replace(
        SEEN, rootless=True, user="ann", uids=None, gids=None, userns_settings={"user.max_user_namespaces": "0"}
    )
    facts = {
        "user_namespace": "No space left on device",
        "idmapped": None,
        "tried": [{"mode": "user", "refused": "namespaces: No space left on device"}],
    }
    found = bad(seen, facts)["namespaces"]
    assert "user.max_user_namespaces = 0" in found.seen
    assert found.mend == "sysctl -w user.max_user_namespaces=15000 (and in /etc/sysctl.d)"
    debian = replace(seen, userns_settings={"kernel.unprivileged_userns_clone": "0"})
    assert "unprivileged_userns_clone=1" in bad(debian, facts)["namespaces"].mend
    ubuntu = replace(seen, userns_settings={"kernel.apparmor_restrict_unprivileged_userns": "1"})
    refused = {**facts, "user_namespace": "", "tried": [{"mode": "user", "refused": "mount: Permission denied"}]}
    assert "apparmor_restrict_unprivileged_userns=0" in bad(ubuntu, refused)["namespaces"].mend


def test_a_user_without_ids_of_its_own() -> None:
    user = {**TRIED, "mode": "user"}
    seen = replace(SEEN, rootless=True, user="ann", uids=None, gids=None, subuids=(HostIds(1_000_000, 65536, "bob"),))
    found = bad(seen, {**FACTS, "idmapped": None, "tried": [user]})["ids"]
    assert found.mend == "usermod --add-subuids 1065536-1131071 --add-subgids 1065536-1131071 ann"
    assert "root in a container is ann" in found.weakens
    without = replace(seen, newuidmap=False)
    assert bad(without, {**FACTS, "tried": [user]})["ids"].mend.endswith("&& apt install uidmap")
    has = replace(seen, uids=IDS, gids=IDS, newuidmap=False)
    assert bad(has, {**FACTS, "tried": [user]})["ids"].mend == "apt install uidmap"
    refused = {"mode": "range", "refused": "newuidmap: write to uid_map failed: Operation not permitted"}
    found = bad(replace(has, newuidmap=True), {**FACTS, "tried": [refused, user]})["ids"]
    assert "Operation not permitted" in found.seen
    found = bad(has, {**FACTS, "tried": [user]})["runtime"]
    assert "--map-users=1000000,1,65536 --map-groups=1000000,1,65536 spinetta node join" in found.mend
    support = support_of(seen, {**FACTS, "tried": [user]}, (RUNC,))
    assert (support.ids, support.first_uid, support.rootless) == ("user", 0, True)


def test_root_of_a_namespace_without_ids() -> None:
    """Its root would be root in the container: nothing is tried, and the node is told that there are no containers."""
    seen = replace(SEEN, uids=None, gids=None)
    found = bad(seen, tried(programs=[]))
    assert "no 65536 ids" in found["runtime"].seen
    assert "no 65536 ids" in found["ids"].seen
    assert support_of(seen, tried(programs=[]), ()).works is False


def test_ids_that_another_user_has() -> None:
    found = bad(replace(SEEN, subuids=(HostIds(1_000_500, 65536, "bob"),)))["ids"]
    assert "bob has 1000500-1066035 of them" in found.seen
    assert found.mend == "spinetta node join --container-ids 1066036"
    assert "ids" not in bad(replace(SEEN, subuids=(HostIds(1_000_000, 65536, "spinetta"),)))


def test_overlays_that_cannot_be_had() -> None:
    found = bad(facts=tried(overlay={"read_only": "No such device (mount overlay)", "writable": "No such device"}))
    assert found["overlay"].mend == "modprobe overlay"
    found = bad(facts=tried(overlay={"read_only": "", "writable": "Invalid argument (mount overlay)"}))
    assert "on the file system of /srv/n1" in found["overlay"].seen
    support = support_of(SEEN, tried(overlay={"read_only": "", "writable": "x"}), (RUNC,))
    assert (support.overlay, support.overlay_writable) == (True, False)


def test_limits_that_are_not_to_be_had() -> None:
    none = Groups(NONE, (), (), "x", "")
    assert "can make no control groups" in bad(replace(SEEN, groups=none))["runtime"].seen
    found = bad(replace(SEEN, groups=none))["cgroups"]
    assert "limits of cpu, memory, pids are not enforced" in found.weakens
    assert found.mend == "mount -t cgroup2 none /sys/fs/cgroup"
    part = Groups(V2, ("pids",), ("/sys/fs/cgroup/user.slice belongs to another user",), "x", "")
    found = bad(replace(SEEN, groups=part, rootless=True))["cgroups"]
    assert "belongs to another user" in found.seen
    assert "Delegate=yes" in found.mend


def test_a_trial_that_was_not_to_be_had() -> None:
    found = support_of(SEEN, {"problem": "/srv: Read-only file system"}, (RUNC,))
    assert found.works is False
    assert any("Read-only file system" in w for w in found.warnings)


def test_groups_of_a_machine_without_any(tmp_path: Path) -> None:
    assert look_at_groups(tmp_path).mode == NONE
    (tmp_path / "mountinfo").write_text("24 1 0:22 / /proc rw - proc proc rw\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    found = look_at_groups(tmp_path)
    assert (found.mode, found.controllers, found.trial_path) == (NONE, (), "")


def unified(tmp_path: Path, own: str, *, passes: str = "", processes: str = "1\n") -> Groups:
    """Groups as files: what can be decided without a kernel."""
    top = tmp_path / "cg"
    group = top / own.strip("/")
    group.mkdir(parents=True)
    (tmp_path / "mountinfo").write_text(f"30 1 0:26 / {top} rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "cgroup").write_text(f"0::{own}\n")
    for folder in {top, *[p for p in group.parents if top in p.parents], group}:
        (folder / "cgroup.controllers").write_text("cpu io memory pids cpuset")
        (folder / "cgroup.subtree_control").write_text(passes)
        (folder / "cgroup.procs").write_text(processes)
        if folder != top:
            (folder / "cgroup.type").write_text("domain")
    return look_at_groups(tmp_path)


def test_groups_of_version_two(tmp_path: Path) -> None:
    found = unified(tmp_path / "a", "/system.slice/spinetta.service", processes="")
    assert found.mode == V2
    assert set(found.controllers) >= {"cpu", "memory", "pids"}
    assert found.trial_path.startswith("/system.slice/spinetta.service/spinetta-trial-")
    # A group with processes in it cannot pass anything on; the one at the top may all the same.
    found = unified(tmp_path / "b", "/user.slice")
    assert found.trial_path.startswith("/spinetta-trial-")
    assert found.problems == ()
    found = unified(tmp_path / "c", "/user.slice", passes="cpu memory pids")
    assert found.trial_path.startswith("/user.slice/")
