"""What is said of a machine's containers is true: of root, of users without rights, of programs that do not work."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spinetta.runtime.detect import VERSION_BYTES_MAX, find_program, program_output
from spinetta.runtime.trial import container_config
from tests.cluster.harness import eventually
from tests.contract.machines import FIRST_ID, LIMIT_S, SUPPORT, UID, UNIFIED, USER, Machine, machine

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to be other users"),
]
SLEEP = ["/bin/busybox", "sleep", "100"]


def groups_left(pid_part: str = "spinetta-trial-") -> set[str]:
    found = subprocess.run(
        ["find", "/sys/fs/cgroup", "-type", "d", "-name", f"{pid_part}*"], capture_output=True, text=True, check=False
    )  # some may go meanwhile
    return set(found.stdout.split())


def test_root() -> None:
    with machine() as here:
        found = here.support()
    assert found["works"], found
    assert Path(found["program"]).is_absolute()
    assert found["kind"] in ("runc", "crun")
    assert found["init"]
    assert (found["rootless"], found["ids"]) == (False, "range")
    assert found["first_uid"] >= 65536
    assert found["overlay"]
    assert found["user_namespaces"]
    assert found["pid_namespaces"]
    assert found["start_s"] < 5.0
    assert set(found["limits"]) >= {"walltime", "open files"}


def test_crun_where_it_works() -> None:
    """crun is taken on a machine with version 2 alone; where both are mounted it refuses, and runc is."""
    if not find_program("crun"):
        pytest.skip("there is no crun")
    with machine(before=[UNIFIED]) as here:
        found = here.support()
    assert (found["cgroup_mode"], found["kind"], found["works"]) == ("v2", "crun", True), found
    with machine() as here:
        found = here.support("crun")
    if found["cgroup_mode"] == "hybrid":
        assert not found["works"]
        assert any("cgroups in hybrid mode not supported" in w for w in found["warnings"]), found["warnings"]
    elif found["cgroup_mode"] == "v1":
        # Below a group of one's own, as in a session, it does not stay; at the top it may.
        assert found["works"] or any("groups other than those it is told" in w for w in found["warnings"]), found
    else:
        assert found["works"]


def test_without_any_cgroups() -> None:
    with machine(before=["umount -R /sys/fs/cgroup"]) as here:
        found = here.support()
    assert (found["cgroup_mode"], found["controllers"], found["joins_groups"]) == ("none", [], False)
    assert set(found["limits_missing"]) == {"cpu", "memory", "pids"}


@pytest.mark.parametrize("ids", [True, False], ids=["with ids", "without ids"])
def test_a_user_without_rights(ids: bool) -> None:
    """Containers run without root; and one run by hand, as it is said to work, has the ids and limits it is said to."""
    if ids and not find_program("newuidmap"):
        pytest.skip("there is no newuidmap")
    with machine(uid=UID, ids=ids) as here:
        found = here.support("runc")
        assert found["works"], found
        assert found["rootless"]
        assert found["ids"] == ("range" if ids else "user")
        assert (found["first_uid"], found["first_gid"]) == ((FIRST_ID, FIRST_ID) if ids else (0, 0))
        assert found["overlay_writable"]
        assert not found["joins_groups"], "no control groups are delegated to a user that was made a second ago"
        assert set(found["limits_missing"]) == {"cpu", "memory", "pids"}
        told = {f["check"]: f for f in found["findings"] if f["level"] >= 2}
        assert ("ids" in told) is not ids
        if not ids:
            assert f"usermod --add-subuids {1_000_000}-" in told["ids"]["mend"]
            assert USER in told["ids"]["mend"]
        status, groups = look_into_a_container(here, found, ids=ids)
    ours = FIRST_ID + 1000 if ids else UID
    assert status["Uid"].split() == [str(ours)] * 4
    assert status["NoNewPrivs"] == "1"
    # It is in no group of its own, so no limit of one can hold.
    assert groups == Path("/proc/self/cgroup").read_text()


def look_into_a_container(here: Machine, found: dict[str, Any], *, ids: bool) -> tuple[dict[str, str], str]:
    """Run one as that user, with the ids that were told, and see from outside whose it is."""
    bundle = here.home / "tmp" / "bundle"
    for name in ("proc", "dev", "bin"):
        (bundle / "rootfs" / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", bundle / "rootfs" / "bin")
    # In the namespace of the trial our user is 0, and its range begins with 1.
    maps = [[0, 1, 65536]] if ids else [[0, 0, 1]]
    config = container_config(maps, rootfs=str(bundle / "rootfs"), user=1000 if ids else 0, group_path="")
    config["process"]["args"] = SLEEP
    (bundle / "config.json").write_text(json.dumps(config))
    subprocess.run(["chown", "-R", f"{UID}:{UID}", str(bundle)], check=True)
    runc = f"{found['program']} --root {bundle}/state"
    script = f"""
        {runc} create --bundle {bundle} --pid-file {bundle}/pid one </dev/null >/dev/null 2>{bundle}/errors
        {runc} start one && cat {bundle}/pid && echo && read line
        {runc} delete --force one
    """
    maps_of = [f"--map-users={FIRST_ID},1,65536", f"--map-groups={FIRST_ID},1,65536"] if ids else []
    argv = ["unshare", "--user", "--mount", "--map-root-user", *maps_of, "sh", "-c", script]
    with subprocess.Popen(
        here.argv(argv), env=here.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, (bundle / "errors").read_text()
            pid = int(line)
            command = Path(f"/proc/{pid}/cmdline")
            eventually(lambda: "sleep" in command.read_text(), within_s=40, what="the container's command runs")
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            groups = Path(f"/proc/{pid}/cgroup").read_text()
        finally:
            process.stdin.write("\n")
            process.stdin.close()
            process.wait(LIMIT_S)
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}, groups


def program(folder: Path, text: str) -> str:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo docker 1.0", "is neither runc nor crun: --version printed 'docker 1.0'"),
        (
            "case $1 in --version) echo runc version 1.3.4;; *) echo out of luck >&2; exit 3;; esac",
            "create: out of luck",
        ),
        ("case $1 in --version) echo runc version 1.3.4;; esac", "its init is not there"),  # says nothing, does nothing
    ],
)
def test_programs_that_do_not_work(tmp_path: Path, text: str, said: str) -> None:
    with machine() as here:
        found = here.support(program(tmp_path, text))
    assert not found["works"]
    assert any(said in w for w in found["warnings"]), found["warnings"]
    assert found["overlay"], "what has nothing to do with it is found out all the same"


def test_no_such_program() -> None:
    with machine() as here:
        found = here.support("/no/such/runc")
    assert any("there is no program /no/such/runc" in w for w in found["warnings"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_trial_that_is_broken_off_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of a container's start: all that it started is dead; after Ctrl-C nothing lies about either."""
    real, mark = find_program("runc"), f"spinetta-mark-{os.getpid()}-{number}"
    slow = program(
        tmp_path,
        f'case "$*" in --version) exec {real} --version;; '
        f'*" start "*) echo >{tmp_path}/begun; exec -a {mark} sleep 100;; *) exec {real} "$@";; esac',
    )
    Path(slow).write_text(Path(slow).read_text().replace("#!/bin/sh", "#!/bin/bash"))
    with machine() as here:
        argv = [sys.executable, "-c", SUPPORT, str(here.home / "data"), slow]
        with subprocess.Popen(argv, env=here.env(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            eventually((tmp_path / "begun").exists, within_s=30, what="a container is being started")
            process.send_signal(number)
            process.wait(LIMIT_S)
        part = f"spinetta-trial-{process.pid}-"
        eventually(lambda: not commands_with(mark, part), within_s=40, what="all of it is dead")
        if number == signal.SIGINT:
            assert list((here.home / "data").iterdir()) == []
            assert list((here.home / "tmp").iterdir()) == []
            assert groups_left(part) == set()
        for folder in sorted(groups_left(part), reverse=True):
            Path(folder).rmdir()  # of a killed one: nobody was left to do it


def commands_with(*marks: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(mark in line for mark in marks) and folder.name != str(os.getpid()):
            found.append(line)
    return found


def test_what_a_program_prints_in_pieces_is_read_whole(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nprintf skopeo; sleep 0.1; echo ' version 1.9.3'\n")
    program.chmod(0o755)
    assert asyncio.run(program_output([str(program)])) == "skopeo version 1.9.3\n"
    program.write_text("#!/bin/sh\nexec head -c 100000 /dev/zero\n")
    assert len(str(asyncio.run(program_output([str(program)], timeout_s=5)))) <= VERSION_BYTES_MAX
