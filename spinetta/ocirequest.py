"""What a container is made of, and what is refused before one is: by its command, ids, directories and mounts.

Pure, and stricter than `container.check_container`, which judges what a person wrote: here everything is known.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spinetta import container
from spinetta.errors import UserError
from spinetta.names import is_below

SCRATCH, TMP, SECRETS, INIT = "/work", "/tmp", "/run/secrets/spinetta", "/.spinetta/init"  # noqa: S108 - inside
HOSTS_FILE, RESOLV_FILE = "/etc/hosts", "/etc/resolv.conf"

# What every unpacked image must have before a container is made of it read-only. runc gives its /tmp the permissions of
# the directory that it covers.
MOUNT_POINT_DIRECTORIES = {"/proc": 0o755, "/dev": 0o755, "/sys": 0o755, TMP: 0o1777, SCRATCH: 0o755, SECRETS: 0o755}
MOUNT_POINT_FILES = (INIT, HOSTS_FILE, RESOLV_FILE)

MACHINES_32 = ("386", "arm")  # as images name them: those whose programs run on x86_64 and aarch64

# No mount of a task may be one of these, above, or below them.
RESERVED = ("/proc", "/sys", "/dev", "/.spinetta", SECRETS, SCRATCH, TMP, HOSTS_FILE, RESOLV_FILE)


@dataclass(frozen=True, slots=True)
class IdRange:
    """`size` ids of the container, from `container_id`, are those of the host from `host_id`."""

    container_id: int
    host_id: int
    size: int

    def __contains__(self, number: int) -> bool:
        return self.container_id <= number < self.container_id + self.size


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the node that the task was granted. `kind` is ``c`` or ``b``."""

    path: str
    kind: str
    major: int
    minor: int
    access: str = "rw"


@dataclass(frozen=True, slots=True)
class Host:
    """What this machine can do.

    Attributes:
        arch: as uname(2) calls it.
        cgroup_namespace: the kernel and the runtime have them.
        recursive_read_only: the runtime knows ``rro`` (runc 1.1, crun 1.4) and the kernel mount_setattr (5.12).
        seccomp: the runtime and the kernel have it.
        rootless: the runtime is not started as root. It cannot set rules for devices.
    """

    arch: str = "x86_64"
    cgroup_namespace: bool = True
    recursive_read_only: bool = True
    seccomp: bool = True
    rootless: bool = False


@dataclass(frozen=True, slots=True)
class Hardening:
    """What is insisted on, since of each program that starts containers an error may be known.

    A user name space, no terminal at the start and a checked root file system (`paths_to_check`) are, always.

    Attributes:
        root_inside: the command may be user 0 of the container.
        warning: what the administrator should know; empty: nothing.
    """

    root_inside: bool = False
    warning: str = ""


def user_of(
    asked: str, of_image: tuple[int, int] | None, otherwise: tuple[int, int], *, root_inside: bool
) -> tuple[int, int]:
    """User and group inside.

    Raises:
        UserError: root was asked for and may not be.
    """
    if not asked:
        return of_image if of_image is not None and of_image[0] != 0 else otherwise
    uid_text, _, gid_text = ("0" if asked == "root" else asked).partition(":")
    uid = int(uid_text)
    gid = int(gid_text) if gid_text else uid
    if uid == 0 and not root_inside:
        raise UserError("no command runs as root of its container here")
    return uid, gid


def outside(ranges: Sequence[IdRange], number: int) -> int:
    """The host's id of one of a container's."""
    for ids in ranges:
        if number in ids:
            return ids.host_id + number - ids.container_id
    raise UserError(f"user or group {number} is nobody on this node")


def hardening(*, lacks_fixes: bool, rootless: bool = False) -> Hardening:
    """What is insisted on with this program.

    runc before 1.2.8, 1.3.3 and 1.4.0-rc.3 can be led by an image, or by a container that shares a folder with the one
    that starts, to write to files of /proc that are the machine's (CVE-2025-31133, CVE-2025-52565, CVE-2025-52881).
    The kernel lets only the machine's root do that, so a user name space takes the edge off. What is left needs a
    process with rights within the container, a terminal, or an image whose /dev is not what it seems.

    Args:
        lacks_fixes: by its version, see `ociprograms.lacks_fixes`.
        rootless: it runs as an ordinary user, who could do no more than that user.
    """
    if not lacks_fixes or rootless:
        return Hardening(root_inside=True)
    return Hardening(
        warning="this version of runc lacks the fixes of CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881: tasks do "
        "not run as root of their containers, and images with symbolic links where it mounts are refused; better "
        "install runc 1.2.8, 1.3.3 or newer"
    )


@dataclass(frozen=True, slots=True)
class Request:
    """One container.

    Attributes:
        command: with its arguments, without the init.
        env: what the task sees, complete.
        uid, gid, groups: inside.
        uids, gids: which ids of the host those of the container are.
        init_path: the init's program on the host, static; empty: the command is process 1 (for tests).
        scratch_path: on the host; becomes /work, the working directory unless `cwd` says otherwise.
        secrets_path: a folder on the host, seen read-only; empty: none.
        network: ``none``, ``host``, or ``bridge`` with `netns_path`.
        sys_path: on the host, a /sys that shows that namespace; empty: the machine's is seen.
        hosts_path, resolv_path: files on the host that are seen in /etc; empty: the image's.
        capabilities: names without ``CAP_``.
        tmp_bytes: size of /tmp; 0: the default.
        open_files: soft and hard limit of file descriptors; 0: the runtime's.
        rlimits: others, by name as in getrlimit(2), soft and hard.
        oom_score_adj: None: as that of the shim.
        programs_32: the image is for a 32-bit machine, whose programs this one runs.
        rules: what is insisted on beside all that.
    """

    command: tuple[str, ...]
    scratch_path: str
    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    uid: int = 1000
    gid: int = 1000
    groups: tuple[int, ...] = ()
    cwd: str = SCRATCH
    init_path: str = ""
    secrets_path: str = ""
    hostname: str = "task"
    network: str = "none"
    netns_path: str = ""
    sys_path: str = ""
    hosts_path: str = ""
    resolv_path: str = ""
    writable: bool = False
    capabilities: tuple[str, ...] = ()
    mounts: tuple[container.Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    tmp_bytes: int = 0
    open_files: tuple[int, int] = (0, 0)
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    oom_score_adj: int | None = None
    programs_32: bool = False
    host: Host = Host()
    rules: Hardening = Hardening()


def refusals(request: Request) -> list[str]:
    """What must not be started, in words; empty when all is well."""
    found = []
    if not request.command or not all(request.command[:1]):
        found.append("no command")
    if any("\0" in text for text in (*request.command, *request.env, *request.env.values())):
        found.append("a zero byte in the command or the environment")
    if any(not name or "=" in name for name in request.env):
        found.append("a variable without a name, or with = in it")
    if words := cwd_refusal(request.cwd):
        found.append(words)
    found += mount_refusals(request.mounts)
    if unknown := set(request.capabilities) - container.CAPABILITIES:
        found.append(f"no such capability: {', '.join(sorted(unknown))}")
    if request.uid == 0 and not request.rules.root_inside:
        found.append("root of the container, which is not allowed here")
    for what, ids, number in (("user", request.uids, request.uid), ("group", request.gids, request.gid)):
        if not any(0 in some for some in ids):
            found.append(f"{what} 0, as whom the runtime makes the container, is nobody outside")
        if any(some.host_id == 0 or some.size < 1 for some in ids):
            found.append(f"{what} 0 of the machine would be one of the container's")
        if not any(number in some for some in ids):
            found.append(f"{what} {number} is nobody outside")
    if not all(any(group in some for some in request.gids) for group in request.groups):
        found.append("a group that is nobody outside")
    if request.network not in container.NETWORKS or (request.network == "bridge") != bool(request.netns_path):
        found.append("a network name space goes with the network bridge, and with no other")
    if request.sys_path and not request.netns_path:
        found.append("a /sys of a network name space goes with that, and with no other")
    paths = [request.scratch_path, request.secrets_path, request.init_path, request.netns_path, request.sys_path]
    paths += [request.hosts_path, request.resolv_path, *(d.path for d in request.devices)]
    found += [f"not a plain absolute path: {path}" for path in paths if path and not _plain(path)]
    if not request.scratch_path:
        found.append("no scratch directory")
    return found


def cwd_refusal(cwd: str) -> str:
    """Why the working directory cannot be that; empty when it can.

    Below /proc a working directory can be a file that the runtime has open, outside the container (CVE-2024-21626).
    """
    if not _plain(cwd) and cwd != "/":
        return f"not a plain absolute path to work in: {cwd}"
    if top := next((top for top in ("/proc", "/sys", "/dev", "/.spinetta") if is_below(cwd, top)), ""):
        return f"nothing works in {top}"
    return ""


def mount_refusals(mounts: Iterable[container.Mount]) -> list[str]:
    """Why these mounts cannot be made, in words; empty when they can.

    One below another is refused: its mount point would be made in the other, a folder of the node that another task may
    be changing at that moment (as in CVE-2021-30465).
    """
    found = []
    seen: list[str] = []
    for mount in mounts:
        target = mount.target
        if not _plain(mount.source):
            found.append(f"not a plain absolute path to mount: {mount.source}")
        if not _plain(target):
            found.append(f"not a plain absolute path to mount at: {target}")
        elif top := next((top for top in RESERVED if is_below(target, top) or is_below(top, target)), ""):
            found.append(f"a mount at {target} would hide {top} or reach into it")
        elif other := next((other for other in seen if is_below(target, other) or is_below(other, target)), ""):
            found.append(f"mounts at {other} and {target}: one would be within the other")
        seen.append(target)
    return found


def paths_to_check(mounts: Iterable[container.Mount] = ()) -> list[str]:
    """Paths of an unpacked image, from its top, none of which may be a symbolic link, parents first.

    The runtime mounts at them; through a link it would do so somewhere else than was judged. That /dev is a link, or
    /proc, is how runc's errors of 2025 are used.
    """
    wanted = {*MOUNT_POINT_DIRECTORIES, *MOUNT_POINT_FILES, *(mount.target for mount in mounts)}
    wanted |= {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "console")}
    wanted |= {"/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd", "/proc/self", "/sys/fs", "/sys/fs/cgroup"}  # noqa: S108
    for path in list(wanted):
        while (path := posixpath.dirname(path)) != "/":
            wanted.add(path)
    return sorted(wanted, key=lambda path: (path.count("/"), path))


def _plain(path: str) -> bool:
    return (
        path.startswith("/")
        and not path.startswith("//")  # POSIX lets that mean something else, and so does normpath
        and path != "/"
        and posixpath.normpath(path) == path
        and "\0" not in path
    )
