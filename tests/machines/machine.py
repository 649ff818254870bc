"""Machines unlike this one: Linux as an ordinary program (User Mode Linux), with control groups of a chosen kind.

A machine has this one's files, read-only, and file systems of its own in memory wherever something is written. It sees
no process and no network but its own. It boots in three seconds, runs one command, and is gone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.machines import inside

PROGRAM = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")
MODULES_WANTED = ("kernel/fs/overlayfs/overlay.ko",)
MEMORY_MIB = 1536
OFF_S = 30.0  # to power off and be gone, once its command has ended
ROOT = Path(__file__).parents[2]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str:
    """Why there are no such machines here; empty when there are."""
    if not shutil.which(PROGRAM):
        return "user-mode-linux is not installed"
    if not modules():
        return f"{MODULES} lacks {MODULES_WANTED[0]}"
    return "" if os.geteuid() == 0 else "takes root, to show a machine the files of this one"


def modules() -> list[Path]:
    """The kernel's modules that are loaded, in this order; empty when one is not there."""
    for version in sorted(MODULES.glob("*")) if MODULES.is_dir() else []:
        found = [version / name for name in MODULES_WANTED]
        if all(path.exists() for path in found):
            return found
    return []


@dataclass(frozen=True)
class Machine:
    """A kind of machine.

    Attributes:
        cgroups: v1, v2 or hybrid, in which the command is where systemd puts a user's session.
        delegated: v2 only: it is in a group of its own instead, as by ``Delegate=yes``, which is the guest's.
        user: the command runs as an ordinary user, `guest`; else as root.
        ids: that user has a range of ids in /etc/subuid and /etc/subgid.
    """

    cgroups: str
    delegated: bool = False
    user: bool = False
    ids: bool = True


@dataclass(frozen=True)
class Done:
    """What came of it: exit code of the command (None: it did not get that far), its output, the console, files."""

    status: int | None
    output: str
    console: str
    files: Path
    seconds: float


@contextmanager
def ran(
    machine: Machine, argv: Sequence[str], *, limit_s: float, env: Mapping[str, str] | None = None,
    fetched: Sequence[str] = (),
) -> Iterator[Done]:  # fmt: skip
    """Boot a machine, run a command in it to its end, power it off; its files are there for the length of the block.

    Args:
        machine: what kind.
        argv: the command, in the root of this repository, which it may not write to.
        limit_s: for all of it. The machine is switched off then, and the status is None.
        env: more variables for it.
        fetched: absolute paths in the machine of files that are wanted when it has ended.
    """
    with tempfile.TemporaryDirectory(prefix="spinetta-uml-") as name:
        folder = Path(name).resolve()
        for part in ("results", "memory"):
            (folder / part).mkdir()
        (folder / "results").chmod(0o777)
        folder.chmod(0o755)
        request = {
            "cgroups": machine.cgroups,
            "delegated": machine.delegated,
            "user": machine.user,
            "ids": machine.ids,
            "modules": list(map(str, modules())),
            "shown": _shown(),
            "argv": list(argv),
            "cwd": str(ROOT),
            "env": {**_env(machine), **(env or {})},
            "fetched": list(fetched),
        }
        (folder / "request.json").write_text(json.dumps(request))
        init = folder / "init"
        init.write_text(f"#!/bin/sh\nexec {shlex.join([sys.executable, '-I', '-B', inside.__file__, str(folder)])}\n")
        init.chmod(0o755)
        begun_s = time.monotonic()
        _boot(folder, limit_s)
        results = folder / "results"
        status = int((results / "status").read_text()) if (results / "status").exists() else None
        yield Done(status, _text(results / "output"), _text(folder / "console"), results, time.monotonic() - begun_s)


def _boot(folder: Path, limit_s: float) -> None:
    """Run the kernel to its end. It is the child of the first process of a pid namespace, which dies with us.

    In a mount namespace where nothing of this machine can be written to but the results, and its memory is a file
    system of its own: /dev/shm is small in many containers.
    """
    results, memory = folder / "results", folder / "memory"
    script = " && ".join(
        (
            f"mount --bind {results} {results}",
            f"mount -t tmpfs -o size={MEMORY_MIB + 64}m none {memory}",
            "mount -o remount,ro,bind /",
            shlex.join(["exec", *_kernel(folder)]),
        )
    )
    # unshare waits for its child whatever it is told: SIGKILL, by us or because we died, is all that ends it.
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    argv = ["setpriv", "--pdeathsig", "KILL", *namespaces, "sh", "-c", script]
    with (folder / "console").open("wb") as console:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, env=_kernel_env(memory)
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()  # and with it the namespace and all that is in it
            process.wait(OFF_S)


def _kernel(folder: Path) -> list[str]:
    return [
        str(shutil.which(PROGRAM)), f"mem={MEMORY_MIB}M", "umid=machine", f"uml_dir={folder}/memory/", "root=/dev/root",
        "rootfstype=hostfs", "rootflags=/", "ro", f"init={folder}/init", "con=null", "con0=null,fd:1",
        "panic=1", "loglevel=4",
    ]  # fmt: skip


def _kernel_env(memory: Path) -> dict[str, str]:
    return {"PATH": PATH, "TMPDIR": str(memory), "HOME": str(memory)}


def _env(machine: Machine) -> dict[str, str]:
    home = "/home/guest" if machine.user else "/root"
    return {
        "PATH": PATH, "HOME": home, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1",
        "USER": "guest" if machine.user else "root", "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
    }  # fmt: skip


def _shown() -> list[str]:
    """What of this machine lies where the other has something of its own, and is needed there."""
    wanted = [ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(inside.__file__).parent]
    hidden = [path for path in wanted if any(path.is_relative_to(place) for place in inside.HIDDEN)]
    return sorted(
        {str(path) for path in hidden if not any(path != other and path.is_relative_to(other) for other in hidden)}
    )


def _text(path: Path, limit_bytes: int = 1 << 20) -> str:
    try:
        return path.read_bytes()[-limit_bytes:].decode(errors="replace")
    except FileNotFoundError:
        return ""
