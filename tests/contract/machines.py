"""This machine as others see it: another user's, with other ids, other control groups. Nothing of it stays."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import spinetta

UID = 64123
USER = "spinetta-guest"
FIRST_ID = 2_000_000
LIMIT_S = 60.0
USUAL = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UNIFIED = "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"  # as on a machine with version 2 alone

SUPPORT = """
import asyncio, dataclasses, json, sys
from pathlib import Path
from spinetta.runtime.detect import container_support
found = asyncio.run(container_support(Path(sys.argv[1]), program=sys.argv[2]))
print(json.dumps(dataclasses.asdict(found)))
"""


@dataclass(frozen=True)
class Machine:
    """A directory, a copy of the package in it that everybody may read, and commands to run before others.

    Attributes:
        uid: who runs things; 0: root.
        before: shell commands in the private mount namespace, as root.
    """

    home: Path
    uid: int = 0
    before: tuple[str, ...] = ()

    def argv(self, command: Sequence[str]) -> list[str]:
        """A command line that runs `command` here."""
        who = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"] if self.uid else []
        script = " && ".join([*self.before, "exec " + shlex.join([*who, *command])])
        return ["unshare", "--mount", "sh", "-c", script]

    def env(self) -> dict[str, str]:
        """For it."""
        paths = [str(self.home / "lib"), *(p for p in sys.path if p.endswith("site-packages"))]
        return {
            "PATH": USUAL,
            "PYTHONPATH": ":".join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(self.home / "tmp"),
            "HOME": str(self.home),
        }

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.argv(command), env=self.env(), cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=LIMIT_S, check=False,
        )  # fmt: skip

    def support(self, program: str = "auto") -> dict[str, Any]:
        """What `container_support` finds out here; and that it leaves nothing behind."""
        data_dir = self.home / "data"
        done = self.run("/usr/bin/python3", "-c", SUPPORT, str(data_dir), program)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert list(data_dir.iterdir()) == []
        assert list((self.home / "tmp").iterdir()) == []
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@contextmanager
def machine(*, uid: int = 0, ids: bool = False, before: Sequence[str] = ()) -> Iterator[Machine]:
    """`uid`: of a user without rights; `ids`: it has a range in /etc/subuid."""
    with tempfile.TemporaryDirectory(prefix="spinetta-machine-") as folder:
        home = Path(folder)
        home.chmod(0o755)
        lib = home / "lib" / "spinetta"
        shutil.copytree(Path(spinetta.__file__).parent, lib, ignore=shutil.ignore_patterns("__pycache__"))
        (home / "data").mkdir()
        (home / "tmp").mkdir()
        mounts = []
        if uid:
            passwd = Path("/etc/passwd").read_text()
            (home / "passwd").write_text(f"{passwd}{USER}:x:{uid}:{uid}::{home}:/bin/sh\n")
            (home / "subids").write_text(f"{USER}:{FIRST_ID}:65536\n" if ids else "")
            mounts = [
                f"mount --bind {home}/passwd /etc/passwd",
                *(f"touch {path} && mount --bind {home}/subids {path}" for path in ("/etc/subuid", "/etc/subgid")),
            ]
            subprocess.run(
                ["chown", "-R", f"{uid}:{uid}", str(home / "data"), str(home / "tmp"), str(home)], check=True
            )
        yield Machine(home, uid, (*mounts, *before))
