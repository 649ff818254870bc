"""Containers of our configurations, made by the real runc, without a node around them: cells to break out of.

The root file system is busybox and, mounted read-only as an administrator may allow it, this machine's own Python, so
that the programs of `tests.attacks.inside` can make any system call.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spinetta import ociconfig
from spinetta.container import Mount
from spinetta.ocirequest import MOUNT_POINT_DIRECTORIES, MOUNT_POINT_FILES, Host, IdRange, Request

HERE = Path(__file__).parent
RUNC = shutil.which("runc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
CRUN = shutil.which("crun")
ONLY_V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
# It refuses machines with both versions of cgroups: show it the newer one only.
_MOUNT_V2 = ("unshare", "--mount", "sh", "-c", 'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"', "sh")
WITH_CGROUP2 = () if ONLY_V2 else _MOUNT_V2
TINI = shutil.which("tini-static")
PYTHON_PREFIX = Path(os.path.realpath(sys.base_prefix))
PYTHON = str(PYTHON_PREFIX / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
FOLDERS = ("/bin", "/usr", "/etc", "/.spinetta", str(PYTHON_PREFIX))
FIRST_ID, IDS = 1_000_000, 65536
SECRET = "of-one-task-only"  # noqa: S105 - none
LIMIT_S = 60.0
PIDS = 64
OPEN_FILES = 1024
Change = Callable[[dict[str, Any]], None]
_numbers = itertools.count(1)


def missing() -> str:
    """What this machine lacks for these tests; empty when nothing."""
    if os.geteuid() != 0:
        return "user namespaces with many ids are made by root"
    lacking = [name for name, found in (("runc", RUNC), ("tini-static", TINI), ("busybox", shutil.which("busybox")))]
    lacking = [name for name in lacking if not shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def numbers_of(*calls: str) -> dict[str, int]:
    """The numbers of system calls on this machine, as the library that runc filters with has them."""
    library = ctypes.CDLL("libseccomp.so.2")
    found = {name: int(library.seccomp_syscall_resolve_name(name.encode())) for name in calls}
    return {name: number for name, number in found.items() if number >= 0}  # else this machine has none


class Yard:
    """A folder with an image and room for bundles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rootfs = folder / "rootfs"
        self.state = folder / "state-0"
        _make_rootfs(self.rootfs)
        self.hosts = folder / "hosts"
        self.hosts.write_text(ociconfig.hosts_text("task"))

    def folder_of(self, what: str, uid: int = 1000, **files: str) -> str:
        """A new folder that a user of the container owns, with these files."""
        path = self.folder / f"{what}-{next(_numbers)}"
        path.mkdir(mode=0o700)
        for name, text in files.items():
            (path / name).write_text(text)
            (path / name).chmod(0o400)
            os.chown(path / name, FIRST_ID + uid, FIRST_ID + uid)
        os.chown(path, FIRST_ID + uid, FIRST_ID + uid)
        return str(path)

    def request(self, command: Sequence[str], **changes: Any) -> Request:
        """What a node would ask for, with Python."""
        ids = (IdRange(0, FIRST_ID, IDS),)
        mounts = [Mount("/usr", "/usr")]
        if not PYTHON_PREFIX.is_relative_to("/usr"):
            mounts.append(Mount(str(PYTHON_PREFIX), str(PYTHON_PREFIX)))
        values: dict[str, Any] = {
            "command": tuple(command),
            "uids": ids,
            "gids": ids,
            "init_path": TINI,
            "mounts": tuple(mounts),
            "open_files": (OPEN_FILES, OPEN_FILES),
            "hosts_path": str(self.hosts),
            "host": Host(arch=os.uname().machine),
            **changes,
        }
        if "scratch_path" not in values:
            values["scratch_path"] = self.folder_of("scratch", values.get("uid", 1000))
        if "secrets_path" not in values:
            values["secrets_path"] = self.folder_of("secrets", values.get("uid", 1000), token=SECRET)
        return Request(**values)

    def run(
        self,
        command: Sequence[str],
        *,
        change: Change | None = None,
        wrapper: Sequence[str] = (),
        owner: int = 0,
        crun: bool = False,
        **changes: Any,
    ) -> Ended:
        """A container from start to end."""
        with self.started(command, change=change, wrapper=wrapper, owner=owner, crun=crun, **changes) as process:
            out, err = process.communicate(timeout=LIMIT_S)
            return Ended(process.returncode, out, err)

    @contextlib.contextmanager
    def started(
        self,
        command: Sequence[str],
        *,
        change: Change | None = None,
        wrapper: Sequence[str] = (),
        owner: int = 0,
        crun: bool = False,
        **changes: Any,
    ) -> Iterator[subprocess.Popen[str]]:
        """A container that runs until the end of the block.

        Args:
            change: made to the configuration.
            wrapper: a program that runs runc.
            owner: as whom it does so.
            crun: by crun instead, and without groups, which it would not make on every machine.
            changes: of the request.
        """
        key = f"spinetta-cell-{os.getpid()}-{next(_numbers)}"
        config: dict[str, Any] = ociconfig.runtime_config(self.request(command, **changes))
        config["root"]["path"] = str(self.rootfs)
        if crun:
            config["linux"].pop("resources", None)
        else:
            config["linux"]["cgroupsPath"] = f"/{key}" if ONLY_V2 else key
            config["linux"].setdefault("resources", {})["pids"] = {"limit": PIDS}
        if change:
            change(config)
        bundle = self.folder / key
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(config))
        state = self.folder / f"state-{owner}"
        state.mkdir(mode=0o700, exist_ok=True)
        os.chown(bundle, owner, owner)
        os.chown(state, owner, owner)
        assert RUNC
        program = [*WITH_CGROUP2, str(CRUN), "--cgroup-manager=disabled"] if crun else [RUNC]
        program += ["--root", str(state), "--log", str(bundle / "log")]
        process = subprocess.Popen(
            [*wrapper, *program, "run", "--bundle", str(bundle), key],
            stdin=subprocess.PIPE,  # not /dev/null, whose owner crun 1.8 changes, on the machine
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        process.stdin.close()
        process.stdin = None
        try:
            yield process
        finally:
            subprocess.run([*program, "delete", "--force", key], capture_output=True, timeout=LIMIT_S, check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.communicate()

    def program(self) -> list[str]:
        """The command that runs `inside.run`; arguments follow."""
        return [
            *(PYTHON, "-I", "-B", "-c"),
            "import sys; sys.path.insert(0, '/'); from tests.attacks.inside.run import main; main()",
        ]

    def told(self, *names: str, arguments: dict[str, Any], **changes: Any) -> Any:
        """What `inside.run` tells of these."""
        command = [*self.program(), json.dumps(arguments), *names]
        ended = self.run(command, **changes)
        assert ended.code == 0, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
        return json.loads(ended.out)

    def attack(self, *names: str, arguments: dict[str, Any], **changes: Any) -> dict[str, list[str]]:
        """What was achieved by attempts, by name; by all when none is named."""
        told = self.told(*names, arguments=arguments, **changes)
        assert isinstance(told, dict)
        return told

    def calls(
        self, wanted: Sequence[tuple[str, int, Sequence[Any]]], how: str = "calls", **changes: Any
    ) -> dict[str, int]:
        """What came of system calls: the result, or minus the number of the error, or of a signal and 1000."""
        told = self.told(how, arguments={"calls": wanted}, **changes)
        assert isinstance(told, dict)
        return told


@contextlib.contextmanager
def yard() -> Iterator[Yard]:
    """A yard that is gone afterwards. Others must pass through its folder, so it is not in pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="spinetta-cells-"))
    folder.chmod(0o711)
    try:
        yield Yard(folder)
    finally:
        shutil.rmtree(folder)


def _make_rootfs(top: Path) -> None:
    for path, mode in {**MOUNT_POINT_DIRECTORIES, **dict.fromkeys(FOLDERS, 0o755)}.items():
        (top / path[1:]).mkdir(parents=True, exist_ok=True)
        (top / path[1:]).chmod(mode)
    for path in MOUNT_POINT_FILES:
        (top / path[1:]).touch()
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, top / "bin/busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True, timeout=10).stdout.split()
    for applet in set(applets) - {"busybox"}:
        (top / "bin" / applet).symlink_to("busybox")
    for name in ("lib", "lib64", "lib32"):
        if Path(f"/{name}").is_symlink():
            (top / name).symlink_to(f"usr/{name}")
    (top / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\ntask:x:1000:1000::/work:/bin/sh\n")
    (top / "etc/secret-of-root").write_text("only for root of the container\n")
    (top / "etc/secret-of-root").chmod(0o600)
    shutil.copytree(HERE / "inside", top / "tests/attacks/inside", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy("/usr/bin/id", top / "bin/id-as-root")
    for folder, folders, files in os.walk(top):
        for name in (".", *folders, *files):
            os.lchown(Path(folder, name), FIRST_ID, FIRST_ID)
    # After the change of owner, which takes it away.
    (top / "bin/id-as-root").chmod(0o755 | stat.S_ISUID | stat.S_ISGID)
