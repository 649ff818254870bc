"""The first process of a machine made by `machine`: sets it up, runs one command, powers it off.

Run by path, with the standard library only. Its argument is the folder that holds ``request.json``; what comes of it
goes to ``results`` in there: the output of the command, and ``status`` as the last file of all. Whatever goes wrong
earlier is on the console, and there is no status.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

POWER_OFF = 0x4321FEDC
FINIT_MODULE = 313  # on x86-64; there is no User Mode Linux for others
HIDDEN = ("/tmp", "/run", "/var/tmp", "/root", "/home", "/mnt", "/var/lib", "/var/log")  # the machine's own, in memory
CONTROLLERS_V1 = ("cpu,cpuacct", "blkio", "memory", "devices", "freezer", "net_cls", "pids")
CGROUPS = Path("/sys/fs/cgroup")
GUEST = 64_321  # nobody else's, also not of tests that make a user
FIRST_ID = 100_000

_libc = ctypes.CDLL(None, use_errno=True)


def mount(kind: str, target: str | Path, options: str = "", source: str = "none") -> None:
    """As mount(8) does; flags in `options` that are the kernel's own are ``ro`` alone."""
    flags = 1 if "ro" in options.split(",") else 0
    data = ",".join(word for word in options.split(",") if word != "ro")
    Path(target).mkdir(parents=True, exist_ok=True)
    if _libc.mount(source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def insert(module: str) -> None:
    """A module into the kernel: insmod may not be installed."""
    with Path(module).open("rb") as file:
        if _libc.syscall(ctypes.c_long(FINIT_MODULE), file.fileno(), b"", 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), module)


def set_up(request: dict[str, Any], folder: Path) -> None:
    """Mounts, modules, users: what a distribution's own start would have done."""
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    with contextlib.suppress(OSError):  # the kernel has done it already
        mount("devtmpfs", "/dev", "mode=755")
    mount("devpts", "/dev/pts", "mode=620,ptmxmode=666")
    mount("tmpfs", "/dev/shm", "mode=1777")
    for name, target in (("fd", "self/fd"), ("stdin", "self/fd/0"), ("stdout", "self/fd/1"), ("stderr", "self/fd/2")):
        with contextlib.suppress(FileExistsError):
            Path("/dev", name).symlink_to(f"/proc/{target}")
    for module in request["modules"]:
        insert(module)
    for place in HIDDEN:
        mount("tmpfs", place, "mode=1777" if "tmp" in place else "mode=755")
    mount("hostfs", folder / "results", str(folder / "results"))
    for path in request["shown"]:
        mount("hostfs", path, f"ro,{path}")
    Path("/run/etc/upper").mkdir(parents=True)
    Path("/run/etc/work").mkdir()
    mount("overlay", "/etc", "lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work")
    with Path("/etc/passwd").open("a") as passwd, Path("/etc/group").open("a") as group:
        passwd.write(f"guest:x:{GUEST}:{GUEST}::/home/guest:/bin/sh\n")
        group.write(f"guest:x:{GUEST}:\n")
    for name in ("subuid", "subgid"):
        Path("/etc", name).write_text(f"guest:{FIRST_ID}:65536\n" if request["ids"] else "")
    home = Path("/home/guest")
    home.mkdir()
    os.chown(home, GUEST, GUEST)
    subprocess.run(["/usr/sbin/ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/kernel/hostname").write_text("machine")


def control_groups(kind: str, *, delegated: bool) -> None:
    """Mount them as systemd does, and move ourselves to where it puts a user's session, or a delegated service."""
    if kind == "v2":
        mount("cgroup2", CGROUPS, "nsdelegate")
        _join_v2(CGROUPS, delegated=delegated)
        return
    mount("tmpfs", CGROUPS, "mode=755")
    for names in CONTROLLERS_V1:
        mount("cgroup", CGROUPS / names, names)
        session = CGROUPS / names / "user.slice"
        session.mkdir()
        (session / "cgroup.procs").write_text("0")
    mount("cgroup", CGROUPS / "systemd", "none,name=systemd")
    if kind == "hybrid":
        mount("cgroup2", CGROUPS / "unified", "nsdelegate")
        _join_v2(CGROUPS / "unified", delegated=delegated)


def _join_v2(top: Path, *, delegated: bool) -> None:
    parts = ["user.slice", f"user-{GUEST}.slice", "node.service"] if delegated else ["user.slice", "session-1.scope"]
    group = top
    # systemd passes on what somebody has asked for; to a session that is processes and memory
    wanted = "+cpu +io +memory +pids" if delegated else "+memory +pids"
    for part in parts:
        words = (group / "cgroup.controllers").read_text().split()
        for word in wanted.split():
            if word[1:] in words:
                (group / "cgroup.subtree_control").write_text(word)
        group /= part
        group.mkdir()
    if delegated:
        for kind in ("trusted", "user"):  # only root may read the first
            os.setxattr(group, f"{kind}.delegate", b"1")
        for name in (".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
            os.chown(group / name, GUEST, GUEST)
    (group / "cgroup.procs").write_text("0")


def work(request: dict[str, Any], folder: Path) -> int:
    """Run the command, in a child, so that the machine's first process is an init and nothing else."""
    results = folder / "results"
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            control_groups(request["cgroups"], delegated=request["delegated"])
            with (results / "output").open("wb") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.setsid()
            os.chdir(request["cwd"])
            if request["user"]:
                os.setgroups([])
                os.setresgid(GUEST, GUEST, GUEST)
                os.setresuid(GUEST, GUEST, GUEST)
            os.execvpe(request["argv"][0], request["argv"], request["env"])  # noqa: S606 - it is a list
        except OSError as error:
            print(f"inside: {error}", flush=True)  # noqa: T201 - the console
        finally:
            os._exit(status)
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def main(arguments: Sequence[str]) -> None:
    """Run the command, and tell what came of it."""
    folder = Path(arguments[0])
    request = json.loads((folder / "request.json").read_text())
    set_up(request, folder)
    status = work(request, folder)
    for path in map(Path, request["fetched"]):
        if path.exists():
            shutil.copy(path, folder / "results" / path.name)
    (folder / "results" / "status.new").write_text(str(status))
    (folder / "results" / "status.new").rename(folder / "results" / "status")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BaseException:  # noqa: BLE001 - the first process of a machine must not end, but say what it died of
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        _libc.reboot(POWER_OFF)
