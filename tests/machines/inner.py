"""What is found out on machines of each kind: run inside by `test_machines`, by name, and found by nobody else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from spinetta.checkup import Level
from spinetta.runtime.detect import ContainerSupport, container_support
from spinetta.runtime.processes import open_process
from spinetta.runtime.shim.hierarchy import LEAF

LIMITS = {"cpu", "memory", "pids"}


def found(folder: Path, program: str = "auto") -> ContainerSupport:
    return asyncio.run(container_support(folder, program=program))


def own_groups() -> str:
    return Path("/proc/self/cgroup").read_text()


def test_version_1(tmp_path: Path) -> None:
    """runc: crun would leave the groups it is told, from below a group like a session's."""
    assert "memory:/user.slice\n" in own_groups()
    here = found(tmp_path)
    assert (here.cgroup_mode, here.works, here.kind, here.joins_groups) == ("v1", True, "runc", True), here
    assert set(here.limits) >= LIMITS
    assert [f.seen for f in here.findings if "groups other than those it is told" in f.seen]
    here = found(tmp_path, "crun")
    assert not here.works
    assert [w for w in here.warnings if "groups other than those it is told" in w], here.warnings


def test_version_2(tmp_path: Path) -> None:
    """crun, from a session that holds processes and lacks controllers."""
    assert "0::/user.slice/session-1.scope\n" in own_groups()
    for program, kind in (("auto", "crun"), ("runc", "runc")):
        here = found(tmp_path, program)
        assert (here.cgroup_mode, here.works, here.kind, here.joins_groups) == ("v2", True, kind, True), here
        assert set(here.limits) >= LIMITS


def test_a_process_that_has_gone_while_its_session_goes_on() -> None:
    script = "import os, sys, time; pid = os.fork(); pid and os._exit(0); print(flush=True); sys.stdin.read()"
    leader = subprocess.Popen(
        [sys.executable, "-S", "-c", script], start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with leader:
        assert leader.stdout is not None
        assert leader.stdin is not None
        leader.stdout.readline()
        leader.wait(30)
        with pytest.raises(ProcessLookupError):
            open_process(leader.pid)
        leader.stdin.close()


def test_both_versions(tmp_path: Path) -> None:
    here = found(tmp_path)
    assert (here.cgroup_mode, here.works, here.kind, here.joins_groups) == ("hybrid", True, "runc", True), here
    assert set(here.limits) >= LIMITS


def test_a_user_with_a_delegated_group(tmp_path: Path) -> None:
    """Everything but to be root: the container is nested in a user namespace with a range of ids."""
    for program, kind in (("auto", "crun"), ("runc", "runc")):
        here = found(tmp_path, program)
        assert (here.rootless, here.ids, here.kind, here.joins_groups) == (True, "range", kind, True), here
        assert set(here.limits) >= LIMITS
        assert here.overlay_writable
        [node] = [f for f in here.findings if "root only, if only of a user namespace" in f.seen]
        assert node.level is Level.WARNING
        assert "unshare --user --mount --map-root-user --map-users=" in node.mend
    assert own_groups().endswith(f"/node.service/{LEAF}\n")


def test_a_user_with_nothing_delegated(tmp_path: Path) -> None:
    """A container runs, and a node says why it runs none: it could not find what is in it."""
    here = found(tmp_path)
    assert (here.works, here.rootless, here.joins_groups) == (True, True, False), here
    assert not LIMITS & set(here.limits)
    assert [w for w in here.warnings if "a node can make no control groups here" in w], here.warnings
