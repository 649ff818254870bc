"""The programs that do the work, skopeo and umoci: kept from what is not theirs, and their words understood."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spinetta.runtime.images.limits import POLL_S, SAID_CHARS_MAX, STALL_S, Limits, Refused, no_space

_CLONE_NEWNS = 0x0002_0000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MS_REMOUNT = 32
_SYS_MOUNT_SETATTR = 442  # the same number on all machines
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY = 1
_PR_SET_PDEATHSIG = 1
_FATAL = re.compile(r'level=(?:fatal|error) msg="((?:[^"\\]|\\.)*)"')
_OTHER_ARCHIVE = re.compile(r"index\.json: no such file|manifest\.json: file does not exist")
_PASSED_ON = (
    "HOME", "XDG_RUNTIME_DIR", "REGISTRY_AUTH_FILE", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)

Watch = Callable[[], int]
"""How many bytes have come so far; may raise Refused."""


def die_with_parent(parent: int) -> None:
    """Have the kernel kill us when the process that started us dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was faster
        os.kill(os.getpid(), signal.SIGKILL)


def find(program: str) -> str:
    """Where a program is.

    Raises:
        Refused: it is not installed.
    """
    found = shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if found is None:
        raise Refused(
            f"{program} is not installed here", reason="missing-tool", hint=f"install it: apt-get install {program}"
        )
    return found


def environment(tmp: Path) -> dict[str, str]:
    """What a tool gets of ours: where to find things, and how the site reaches its registries."""
    given = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TMPDIR": str(tmp), **given}


def run(
    command: Sequence[str],
    cwd: Path,
    *,
    watch: Watch | None = None,
    confine: Path | None = None,
    limits: Limits | None = None,
) -> bytes:
    """Run a tool to its end; what it wrote.

    Args:
        command: program and arguments.
        cwd: its working directory; what it says goes to files there.
        watch: looked at now and then; when what it tells does not grow for `STALL_S`, the tool is ended.
        confine: the only directory that it can write to, as far as the kernel lets us see to that.
        limits: the largest file that it can write.

    Raises:
        Refused: it failed.
    """
    parent = os.getpid()

    def in_child() -> None:
        die_with_parent(parent)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # Go reserves more than it uses
        if limits is not None:
            most = limits.file_bytes_max
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        if confine is not None and os.geteuid() == 0:
            _shut_in(confine)

    out_path, err_path = cwd / "tool.out", cwd / "tool.err"
    with out_path.open("w+b") as out, err_path.open("w+b") as err:
        process = subprocess.Popen(
            [find(command[0]), *command[1:]],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(cwd),
            preexec_fn=in_child,
        )
        try:
            code = _waited(process, watch)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code:
            err.seek(0)
            raise understood(command[0], err.read(1 << 16).decode(errors="replace"), code)
        out.seek(0)
        return out.read(1 << 24)


def _waited(process: subprocess.Popen[bytes], watch: Watch | None) -> int:
    last, since_s = -1, time.monotonic()
    while True:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            come = watch() if watch is not None else -1
        if come != last:
            last, since_s = come, time.monotonic()
        elif time.monotonic() - since_s > STALL_S:
            raise Refused(
                f"nothing has come for {STALL_S:g} s",
                reason="stalled",
                hint="see to the registry or the disk; try again",
            )


def _shut_in(directory: Path) -> None:
    """A mount namespace of its own in which only `directory` can be written to, and nothing is a device or setuid.

    Belt and braces: layers have been looked at, and umoci keeps to its directory by itself. Where the kernel does not
    let us (before 5.12, or in a container without the right), these two must do.
    """
    where = os.fsencode(directory)
    none = ctypes.c_char_p(None)
    if _libc.unshare(ctypes.c_int(_CLONE_NEWNS)) < 0:
        return
    if _libc.mount(none, b"/", none, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), none) < 0:
        os._exit(127)  # mounts below must not reach the host
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR), ctypes.c_int(_AT_FDCWD), b"/", ctypes.c_uint(_AT_RECURSIVE), attributes,
        ctypes.c_size_t(32),
    )  # fmt: skip
    if result < 0:
        return
    _libc.mount(where, where, none, ctypes.c_ulong(_MS_BIND), none)
    flags = ctypes.c_ulong(_MS_BIND | _MS_REMOUNT | _MS_NOSUID | _MS_NODEV)
    _libc.mount(none, where, none, flags, none)
    os.chdir(directory)  # the working directory was reached by the mount below


def understood(program: str, said: str, code: int) -> Refused:
    """What a tool's last words mean."""
    messages = _FATAL.findall(said)
    lines = [line for line in said.splitlines() if line.strip()]
    if messages:
        words = messages[-1].replace('\\"', '"').replace("\\n", " ")
    else:
        words = re.sub(r"^\W*", "", lines[-1]).strip() if lines else f"it ended with {code}"
    words = "".join(c if c.isprintable() else "?" for c in words)[:SAID_CHARS_MAX]
    low = said.lower()
    if "no space left" in low or "disk quota exceeded" in low:
        return no_space()
    if "file too large" in low or code in (-signal.SIGXFSZ, 128 + signal.SIGXFSZ):
        return Refused("a file of the image is too large", reason="too-large", hint="data belongs in a mount")
    if any(w in low for w in ("did not match", "digest mismatch", "does not match expected", "verification error")):
        return Refused(f"the image is damaged: {words}", reason="damaged", hint="get it again")
    if _OTHER_ARCHIVE.search(low):
        return Refused(
            f"that is no archive of this kind: {words}",
            hint="docker-archive: what docker save writes; oci-archive: a packed OCI layout; rootfs: what docker export"
            " writes; or the path alone, and it is found out",
        )
    if any(w in low for w in ("manifest unknown", "name unknown", "not found: ", "no such file or directory")):
        return Refused(f"there is no such image: {words}", reason="not-found", hint="check its name and tag")
    if any(w in low for w in ("unauthorized", "denied", "authentication required")):
        return Refused(
            f"the registry does not let this node have it: {words}",
            reason="registry-denied",
            hint="log in there: REGISTRY_AUTH_FILE",
        )
    if "choose an image" in low or "more than one image" in low:
        return Refused(f"there are several images in it: {words}", reason="ambiguous", hint="add :TAG to its path")
    unreachable = (
        "connection refused",
        "no such host",
        "timeout",
        "connection reset",
        "network is unreachable",
        " eof",
    )
    if any(w in low for w in (*unreachable, "tls: ", "x509: ", "server gave http response")):
        return Refused(
            f"the registry cannot be reached: {words}",
            reason="registry-unreachable",
            hint="registries in plain HTTP: insecure = true in registries.conf",
        )
    return Refused(f"{program}: {words}", reason="tool-failed")


def size_of(directory: Path) -> int:
    """Bytes of the files in a directory and those below, as far as they are there while others write."""
    total = 0
    waiting = [directory]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue
    return total


def free_bytes(directory: Path) -> int:
    """What is free on the disk for us."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def free_inodes(directory: Path) -> int:
    """How many more files the disk can have; a great number where it has no limit."""
    found = os.statvfs(directory)
    return found.f_favail if found.f_files else sys.maxsize


def sync(directory: Path) -> None:
    """All of the file system on the disk, to stay."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(ctypes.c_int(fd)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)
