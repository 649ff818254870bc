"""The OCI runtime configuration of a container: isolated by default, opened only by what was asked for and allowed.

Pure: what the machine can do and what the task may do come in, a dictionary for config.json comes out. The shim fills
in ``linux.cgroupsPath`` and ``root.path``. docs/adr/0033-isolation-by-default.md says why each thing is as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

from spinetta import container, seccomp
from spinetta.errors import InvariantViolation
from spinetta.ocirequest import (
    HOSTS_FILE,
    INIT,
    RESOLV_FILE,
    SCRATCH,
    SECRETS,
    TMP,
    Device,
    Hardening,
    Host,
    IdRange,
    Request,
    cwd_refusal,
    hardening,
    mount_refusals,
    paths_to_check,
    refusals,
)

__all__ = [
    "INIT",
    "PATH_DEFAULT",
    "SCRATCH",
    "SECRETS",
    "Device",
    "Hardening",
    "Host",
    "IdRange",
    "Request",
    "cwd_refusal",
    "hardening",
    "hosts_text",
    "mount_refusals",
    "paths_to_check",
    "refusals",
    "runtime_config",
]

OCI_VERSION = "1.0.2"
TMP_BYTES_DEFAULT = 1 << 30  # it counts as the task's memory, so that this only bounds a mistake
SHM_BYTES = 64 << 20  # as everywhere
UMASK = 0o022
PATH_DEFAULT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TTY_GROUP = 5  # of /dev/pts, on every Linux

# What tells of the machine, or of others on it, and is not made separate by any name space. Covered by nothing.
MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/driver/snd",
    "/proc/interrupts",  # when keys were pressed
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/key-users",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",  # power used tells what others compute
    "/sys/firmware",
    "/sys/fs/bpf",
    "/sys/fs/selinux",
    "/sys/kernel/debug",
    "/sys/kernel/security",
    "/sys/kernel/tracing",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def runtime_config(request: Request) -> dict[str, object]:
    """The OCI configuration of a container, version 1.0.2.

    Raises:
        InvariantViolation: what is asked for would not be isolated; validation should have said so before.
    """
    if problems := refusals(request):
        raise InvariantViolation(f"not a container to start: {'; '.join(problems)}")
    host = request.host
    linux: dict[str, object] = {
        "namespaces": _namespaces(request),
        "uidMappings": [_mapping(ids) for ids in request.uids],
        "gidMappings": [_mapping(ids) for ids in request.gids],
        "maskedPaths": list(MASKED),
        "readonlyPaths": list(READ_ONLY),
    }
    if request.devices:
        linux["devices"] = [_device_node(device) for device in request.devices]
    if not host.rootless:
        linux["resources"] = {"devices": _device_rules(request.devices)}
    if host.seccomp:
        linux["seccomp"] = seccomp.profile(request.capabilities, host.arch, programs_32=request.programs_32)
    return {
        "ociVersion": OCI_VERSION,
        "hostname": request.hostname,
        "root": {"path": "rootfs", "readonly": not request.writable},
        "process": _process(request),
        "mounts": _mounts(request),
        "linux": linux,
    }


def hosts_text(hostname: str) -> str:
    """A file for /etc/hosts where there is no network: a container knows itself."""
    return f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 {hostname}\n"


# --- the parts -----------------------------------------------------------------------------------------------------


def _namespaces(request: Request) -> list[dict[str, str]]:
    kinds = ["user", "pid", "mount", "ipc", "uts"]
    if request.host.cgroup_namespace:
        kinds.append("cgroup")
    spaces = [{"type": kind} for kind in kinds]
    if request.network == "none":
        spaces.append({"type": "network"})
    elif request.network == "bridge":
        spaces.append({"type": "network", "path": request.netns_path})
    return spaces


def _mapping(ids: IdRange) -> dict[str, int]:
    return {"containerID": ids.container_id, "hostID": ids.host_id, "size": ids.size}


def _process(request: Request) -> dict[str, object]:
    capabilities = [f"CAP_{name}" for name in sorted(set(request.capabilities))]
    rlimits = {"RLIMIT_CORE": (0, 0), **request.rlimits}  # a core file is the task's memory on the node's disk
    if request.open_files[1]:
        rlimits["RLIMIT_NOFILE"] = request.open_files
    user: dict[str, object] = {"uid": request.uid, "gid": request.gid, "umask": UMASK}
    if request.groups:
        user["additionalGids"] = sorted(set(request.groups))
    init = [INIT, "-g", "--"] if request.init_path else []
    process: dict[str, object] = {
        "terminal": False,
        "user": user,
        "args": [*init, *request.command],
        "env": [f"{name}={value}" for name, value in sorted(({"PATH": PATH_DEFAULT} | dict(request.env)).items())],
        "cwd": request.cwd,
        # All five, since who is not root keeps over exec only what is ambient.
        "capabilities": {
            kind: list(capabilities) for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")
        },
        "noNewPrivileges": True,
        "rlimits": [{"type": name, "soft": soft, "hard": hard} for name, (soft, hard) in sorted(rlimits.items())],
    }
    if request.oom_score_adj is not None:
        process["oomScoreAdj"] = request.oom_score_adj
    return process


def _mounts(request: Request) -> list[dict[str, object]]:
    """In the order they are made: parents before children, and ours after the task's, so that none hides ours."""
    tmp_bytes = request.tmp_bytes or TMP_BYTES_DEFAULT
    made = [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "noexec", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", *_pts_options(request)),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", f"size={SHM_BYTES}"),  # noqa: S108
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        *_sys(request),
        _mount(TMP, "tmpfs", "tmpfs", "nosuid", "nodev", "mode=1777", f"size={tmp_bytes}"),
        _bind(SCRATCH, request.scratch_path, "rw"),
    ]
    recursive = request.host.recursive_read_only
    in_order = sorted(request.mounts, key=lambda mount: (mount.target.count("/"), mount.target))
    made += [_bind_of_node(mount, recursive) for mount in in_order]
    for path, source in ((HOSTS_FILE, request.hosts_path), (RESOLV_FILE, request.resolv_path)):
        if source:
            made.append(_bind(path, source, "ro", "noexec"))
    if request.secrets_path:
        made.append(_bind(SECRETS, request.secrets_path, "ro", "noexec"))
    if request.init_path:
        made.append(_bind(INIT, request.init_path, "ro"))
    return made


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, object]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _bind(target: str, source: str, *options: str) -> dict[str, object]:
    return _mount(target, "bind", source, "bind", "rprivate", "nosuid", "nodev", *options)


def _bind_of_node(mount: container.Mount, recursive: bool) -> dict[str, object]:
    """A folder of the node, with what is mounted below it.

    "ro" alone would leave what is mounted below writable. Where the runtime cannot do better only the folder's own file
    system is seen; if there are others below, the kernel refuses.
    """
    if not recursive:
        return _bind(mount.target, mount.source, "rw" if mount.writable else "ro")
    access = ("rw",) if mount.writable else ("ro", "rro")
    options = ("rbind", "rprivate", "nosuid", "nodev", "rnosuid", "rnodev", *access)
    return _mount(mount.target, "bind", mount.source, *options)


def _pts_options(request: Request) -> list[str]:
    options = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    if any(TTY_GROUP in some for some in request.gids):
        options.append(f"gid={TTY_GROUP}")
    return options


def _sys(request: Request) -> list[dict[str, object]]:
    """A /sys is a view of a network name space, made by who made that one; without one the node's, to be read."""
    options = ["nosuid", "noexec", "nodev", "ro"]
    if request.network == "none":
        made = [_mount("/sys", "sysfs", "sysfs", *options)]
    elif request.sys_path:
        made = [_mount("/sys", "bind", request.sys_path, "bind", "rprivate", *options)]
    else:
        recursive = ["rro", "rnosuid", "rnodev", "rnoexec"] if request.host.recursive_read_only else []
        made = [_mount("/sys", "bind", "/sys", "rbind", "rprivate", *options, *recursive)]
    if request.host.cgroup_namespace:  # without one it would show the groups of all
        made.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", *options, "relatime"))
    return made


def _device_node(device: Device) -> dict[str, object]:
    return {
        "path": device.path,
        "type": device.kind,
        "major": device.major,
        "minor": device.minor,
        "fileMode": 0o666,
        "uid": 0,
        "gid": 0,
    }


def _device_rules(devices: Iterable[Device]) -> list[dict[str, object]]:
    """Nothing, but what the runtime always adds (null, zero, full, random, urandom, tty, terminals), and these."""
    granted: list[dict[str, object]] = [
        {"allow": True, "type": device.kind, "major": device.major, "minor": device.minor, "access": device.access}
        for device in devices
    ]
    return [{"allow": False, "access": "rwm"}, *granted]
