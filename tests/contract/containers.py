"""Real containers for tests of the shim: a root file system with busybox, and OCI configurations made by hand.

The configuration that nodes make is in `spinetta.ociconfig`, and tested there; here a plain one serves.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spinetta.runtime.protocol import ContainerLaunch, Launch
from spinetta.runtime.shim import remains
from tests.contract.shims import groups_of, launch, until

RUNC, CRUN = "/usr/sbin/runc", "/usr/bin/crun"
PROGRAM = os.environ.get("SPINETTA_TEST_CONTAINER_PROGRAM", RUNC)  # tests/machines runs the same over others
INIT = "/usr/bin/tini-static"
OUTSIDE = 1_000_000  # the host's id of a container's root
INSIDE = 1000  # who runs in it
OWNER = (OUTSIDE + INSIDE, OUTSIDE + INSIDE)
MOUNT_POINTS = ("proc", "dev", "sys", "tmp", "work", "outside", "run/secrets/spinetta")
ENV = {"PATH": "/bin"}
MASKED = ("/proc/kcore", "/proc/keys", "/sys/firmware")


def make_rootfs(folder: Path, owner: int = OUTSIDE) -> Path:
    """A root file system with busybox, owned by the container's root; `owner` 0: to be made an image of."""
    (folder / "bin").mkdir(parents=True)
    (folder / ".spinetta").mkdir()
    for name in MOUNT_POINTS:
        (folder / name).mkdir(parents=True)
    (folder / "tmp").chmod(0o1777)
    shutil.copy("/bin/busybox", folder / "bin/busybox")
    for name in ("sh", "sleep", "cat", "id", "ls", "echo", "kill", "touch", "setsid", "env", "ps", "true", "grep"):
        (folder / "bin" / name).symlink_to("busybox")
    shutil.copy(INIT, folder / ".spinetta/init")
    for where, folders, files in os.walk(folder):
        for name in ("", *folders, *files):
            os.chown(Path(where) / name, owner, owner, follow_symlinks=False)
    return folder


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("image") / "rootfs"
    yield make_rootfs(folder)
    shutil.rmtree(folder)


def config(
    state_dir: Path, key: str, *command: str, env: Mapping[str, str] = ENV, init: bool = True, writable: bool = False
) -> dict[str, Any]:
    """What the runtime is to be told, but for the control group and the root."""
    bind = ["rbind", "rw", "nosuid", "nodev"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": INSIDE, "gid": INSIDE},
            "args": ["/.spinetta/init", "-g", "--", *command] if init else list(command),
            "env": [f"{name}={value}" for name, value in env.items()],
            "cwd": "/work",
            "capabilities": {name: [] for name in ("bounding", "effective", "permitted", "ambient", "inheritable")},
            "noNewPrivileges": True,
        },
        "root": {"readonly": not writable},
        "hostname": "cell",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
            {"destination": "/work", "type": "bind", "source": str(state_dir / "scratch" / key), "options": bind},
            {
                "destination": "/run/secrets/spinetta",
                "type": "bind",
                "source": str(state_dir / "bundle/secrets"),
                "options": ["bind", "ro", "nosuid", "nodev", "noexec"],
            },
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "user", "cgroup")],
            "uidMappings": [{"containerID": 0, "hostID": OUTSIDE, "size": 65536}],
            "gidMappings": [{"containerID": 0, "hostID": OUTSIDE, "size": 65536}],
            "maskedPaths": list(MASKED),
        },
    }


def contained(
    state_dir: Path,
    rootfs: Path,
    key: str,
    *command: str,
    env: Mapping[str, str] = ENV,
    init: bool = True,
    writable: bool = False,
    program: str = PROGRAM,
    lower: tuple[Path, ...] = (),
    **changes: Any,
) -> Launch:
    """An attempt in a container."""
    built = config(state_dir.absolute(), key, *command, env=env, init=init, writable=writable)
    layers = tuple(map(str, (*lower, rootfs)))
    container = ContainerLaunch(program, built, layers, writable, OWNER)
    return replace(launch(key, *command, **changes), env=dict(env), container=container)


def script(state_dir: Path, rootfs: Path, key: str, text: str, **changes: Any) -> Launch:
    """A shell's script in a container."""
    return contained(state_dir, rootfs, key, "/bin/sh", "-c", text, **changes)


def traces(state_dir: Path, key: str = "") -> list[str]:
    """What is left of containers on this machine: groups (of `key` or of all), mounts, and what the runtime knows."""
    name = remains.name_of(state_dir, "n1")
    left = [str(path) for path in groups_of(key or name) if name in path.parts]
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(state_dir) in line]
    for folder in ("bundle", "runc"):
        if (state_dir / folder).is_dir():
            left += map(str, (state_dir / folder).iterdir())
    return left


async def gone(state_dir: Path, *keys: str) -> None:
    """Nothing is left of them: a dying process may keep its groups for a moment longer than it is told of."""
    for key in keys:
        await until(lambda key=key: not traces(state_dir, key))  # type: ignore[misc]


def standing_in(folder: Path, prelude: str, program: str = PROGRAM) -> str:
    """A program in the runtime's place, which does something before it: `command` is what it is asked, `root` where."""
    path = folder / f"standing-in-{len(list(folder.iterdir()))}"
    path.write_text(
        '#!/bin/sh\nroot=$2\nfor command in "$@"; do case $command in create|start|delete) break;; esac; done\n'
        f'{prelude}\nexec {program} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)
