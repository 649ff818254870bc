"""Ways out. Each returns what it achieved: nothing, when it was refused at every step."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.attacks.inside.raw import call, in_child, libc

ARGUMENTS: dict[str, Any] = {}
ATTACKS: dict[str, Callable[[], list[str]]] = {}
Attempt = Callable[[], object]
UPWARDS = "/".join([".."] * 30)


def attack(function: Callable[[], list[str]]) -> Callable[[], list[str]]:
    ATTACKS[function.__name__] = function
    return function


def achieved(attempts: Mapping[str, Attempt]) -> list[str]:
    """Which of these did not fail."""
    found = []
    for name, attempt in attempts.items():
        try:
            result = attempt()
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
        found.append(f"{name}: {str(result)[:200]}")
    return found


def checked(result: int) -> int:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def mount(kind: bytes, target: bytes = b"/work", flags: int = 0, source: bytes = b"none") -> int:
    return checked(libc.mount(source, target, kind, ctypes.c_ulong(flags), None))


def unmount(path: bytes) -> int:
    return checked(libc.umount2(path, 2))


# --- the file system -----------------------------------------------------------------------------------------------


def _create(folder: str) -> object:
    return os.open(f"{folder}/escaped", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


def _append(path: str) -> object:
    return os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b"x")


@attack
def write_outside() -> list[str]:
    folders = ["/", "/etc", "/bin", "/usr", "/usr/bin", "/.spinetta", "/run", "/run/secrets/spinetta", "/proc", "/sys"]
    folders += ["/proc/sys/kernel", "/sys/fs/cgroup", "/sys/kernel"]
    if os.geteuid() != 0:
        folders.append("/dev")  # of its own, 64 KiB; what root makes there is gone with it
    files = ["/.spinetta/init", "/bin/busybox", "/etc/passwd", "/usr/bin/id", "/run/secrets/spinetta/token"]
    tries: dict[str, Attempt] = {folder: partial(_create, folder) for folder in folders}
    tries |= {file: partial(_append, file) for file in files}
    return achieved(tries)


@attack
def read_what_is_roots() -> list[str]:
    if os.geteuid() == 0:
        return []
    return achieved({"secret": Path("/etc/secret-of-root").read_text})


@attack
def paths_of_the_host() -> list[str]:
    """By their own path, by the root of other processes, upwards from the scratch directory, through open files."""
    ways = ["", f"/work/{UPWARDS}", "/proc/1/root", f"/proc/1/cwd/{UPWARDS}"]
    ways += [f"{process}/root" for process in Path("/proc").glob("[0-9]*")]
    ways += [f"/proc/self/fd/{number}/{UPWARDS}" for number in range(3, 32)]
    paths = [f"{way}{path}" for way in ways for path in ARGUMENTS["host_files"]]
    return achieved({path: Path(path).read_bytes for path in paths})


@attack
def what_shows_of_the_host() -> list[str]:
    """Nothing that a name space or a mask should have hidden."""
    masked = ("/proc/keys", "/proc/kallsyms", "/proc/timer_list", "/proc/interrupts", "/proc/key-users")
    found = achieved({path: partial(_unmasked, Path(path)) for path in masked})
    for path in ("/sys/firmware", "/proc/acpi", "/proc/scsi", "/sys/kernel/debug", "/sys/devices/virtual/powercap"):
        if Path(path).is_dir() and list(Path(path).iterdir()):
            found.append(path)
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found += [line[4] for line in lines if line[6] != "-"]  # mounts would go from here to there, or from there to here
    if any(line.rpartition(":")[2] != "/" for line in Path("/proc/self/cgroup").read_text().splitlines()):
        found.append("the names of its groups")
    return found


def _unmasked(path: Path) -> object:
    if path.samefile("/dev/null"):
        raise PermissionError("it is masked")
    return path.read_bytes()


@attack
def mount_something() -> list[str]:
    bind, remount = 4096, 32
    tries: dict[str, Attempt] = {
        "tmpfs": partial(mount, b"tmpfs"),
        "proc": partial(mount, b"proc"),
        "sysfs": partial(mount, b"sysfs"),
        "cgroup": partial(mount, b"cgroup"),
        "bind": partial(mount, b"", flags=bind, source=b"/proc"),
        "root writable": partial(mount, b"", b"/", remount | bind),
        "settings writable": partial(mount, b"", b"/proc/sys", remount | bind),
        "unmask": partial(unmount, b"/proc/kcore"),
        "unmask keys": partial(unmount, b"/proc/keys"),
        "take the init away": partial(unmount, b"/.spinetta/init"),
        "another root": partial(os.chroot, "/work"),
    }
    if os.geteuid() != 0:
        tries["umount"] = partial(subprocess.run, ["umount", "/usr"], check=True, capture_output=True)
    return achieved(tries)


def _device(path: str, kind: int, number: int) -> object:
    os.mknod(path, kind | 0o666, number)
    return os.open(path, os.O_RDONLY)


@attack
def make_devices() -> list[str]:
    wanted = {
        "mem": (stat.S_IFCHR, os.makedev(1, 1)),
        "kmsg": (stat.S_IFCHR, os.makedev(1, 11)),
        "disk": (stat.S_IFBLK, os.makedev(*ARGUMENTS["disk"])),
    }
    tries: dict[str, Attempt] = {}
    for folder in ("/work", "/tmp", "/dev/shm"):
        for name, (kind, number) in wanted.items():
            tries[f"{folder}/{name}"] = partial(_device, f"{folder}/{name}", kind, number)
    for path in ("/dev/mem", "/dev/kmsg", "/dev/fuse", "/dev/kvm", "/dev/sda", "/dev/vda"):
        tries[path] = partial(os.open, path, os.O_RDWR)
    return achieved(tries)


@attack
def open_by_handle() -> list[str]:
    """Files of the same file system by number, past all mounts: how an early container runtime was broken out of."""
    scratch = os.open("/work", os.O_RDONLY)
    handle = struct.pack("=Ii8s", 8, 1, struct.pack("=II", 2, 0))  # the root directory of an ext4
    return achieved({"root": partial(call, ARGUMENTS["numbers"]["open_by_handle_at"], scratch, handle, os.O_RDONLY)})


# --- processes -----------------------------------------------------------------------------------------------------


@attack
def see_processes_of_the_host() -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if line and b"tests.attacks.inside" not in line:
            found.append(f"{process}: {line!r}")
    return found


def _not_ours() -> list[int]:
    """Process ids of the host that are not also ids of ours."""
    pids: list[int] = ARGUMENTS["host_pids"]
    return [p for p in pids if ARGUMENTS.get("taken") or not Path(f"/proc/{p}").exists()]


@attack
def signal_processes_of_the_host() -> list[str]:
    tries: dict[str, Attempt] = {}
    for pid in _not_ours():
        tries[f"kill {pid}"] = partial(os.kill, pid, signal.SIGKILL)
        tries[f"group {pid}"] = partial(os.killpg, pid, signal.SIGKILL)
        tries[f"pidfd {pid}"] = partial(os.pidfd_open, pid)
    return achieved(tries)


@attack
def trace_processes_of_others() -> list[str]:
    seize, attach = 0x4206, 16
    ptrace, reading = ARGUMENTS["numbers"]["ptrace"], ARGUMENTS["numbers"]["process_vm_readv"]
    here = ctypes.create_string_buffer(8)
    vector = struct.pack("PN", ctypes.addressof(here), 8)
    tries: dict[str, Attempt] = {}
    for pid in _not_ours():
        tries[f"seize {pid}"] = partial(call, ptrace, seize, pid, 0, 0)
        tries[f"attach {pid}"] = partial(call, ptrace, attach, pid, 0, 0)
        tries[f"mem {pid}"] = partial(os.open, f"/proc/{pid}/mem", os.O_RDWR)
        tries[f"read {pid}"] = partial(call, reading, pid, vector, 1, vector, 1, 0)
    return achieved(tries)


@attack
def join_name_spaces() -> list[str]:
    """Even its own again, with which some have gained what they had given up."""
    number = ARGUMENTS["numbers"]["setns"]
    spaces = [os.open(path, os.O_RDONLY) for path in Path("/proc/self/ns").iterdir()]
    return achieved({str(space): partial(call, number, space, 0) for space in spaces})


def _cloned(number: int, flag: int) -> int:
    pid = call(number, flag | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return pid


@attack
def new_name_spaces() -> list[str]:
    unshare, clone = ARGUMENTS["numbers"]["unshare"], ARGUMENTS["numbers"]["clone"]
    flags = {"user": 0x10000000, "mount": 0x00020000, "pid": 0x20000000, "net": 0x40000000, "cgroup": 0x02000000}
    found = [f"unshare {name}" for name, flag in flags.items() if in_child(partial(call, unshare, flag)) >= 0]
    return found + [f"clone {name}" for name, flag in flags.items() if in_child(partial(_cloned, clone, flag)) >= 0]


# --- privileges ----------------------------------------------------------------------------------------------------


@attack
def become_somebody_else() -> list[str]:
    if os.geteuid() == 0:
        return []  # it is root of its own ids, and nobody outside
    tries: dict[str, Attempt] = {
        "setuid": partial(os.setuid, 0),
        "setresuid": partial(os.setresuid, 0, 0, 0),
        "setgid": partial(os.setgid, 0),
        "setgroups": partial(os.setgroups, [0]),
    }
    found = achieved(tries)
    for option, own in (
        ("-u", os.getuid()),
        ("-g", os.getgid()),
    ):  # a program that root has marked as to be run as root
        said = subprocess.run(["/bin/id-as-root", option], capture_output=True, text=True, timeout=10, check=True)
        if said.stdout.strip() != str(own):
            found.append(f"{option}: {said.stdout}")
    return found


@attack
def capabilities_it_has() -> list[str]:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    found = [f"{name}: {status[name]}" for name in status if name.startswith("Cap") and int(status[name], 16)]
    if status["NoNewPrivs"] != "1":
        found.append("new privileges")
    if status["Seccomp"] != "2":
        found.append("any system call")
    return found


@attack
def raise_limits() -> list[str]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = [f"{hard} open files"] if hard != ARGUMENTS["open_files"] else []
    tries: dict[str, Attempt] = {
        "files": partial(resource.setrlimit, resource.RLIMIT_NOFILE, (hard + 1, hard + 1)),
        "core": partial(resource.setrlimit, resource.RLIMIT_CORE, (1, 1)),
        "nice": partial(os.setpriority, os.PRIO_PROCESS, 0, -10),
        "real time": partial(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(10)),
        "oom": partial(Path("/proc/self/oom_score_adj").write_text, "-1000"),
    }
    limits = ("memory.limit_in_bytes", "pids.max", "cpu.cfs_quota_us", "memory.max", "cpu.max", "cgroup.procs", "tasks")
    for folder in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
        files = [folder / name for name in limits if (folder / name).exists()]
        tries |= {str(file): partial(file.write_text, "-1") for file in files}
    return found + achieved(tries)


# --- the kernel ----------------------------------------------------------------------------------------------------


@attack
def write_to_the_kernel() -> list[str]:
    writes = {
        "/proc/sys/kernel/core_pattern": "|/work/escape",
        "/proc/sys/kernel/modprobe": "/work/escape",
        "/proc/sys/kernel/hostname": "escaped",
        "/proc/sys/vm/overcommit_memory": "1",
        "/proc/sys/fs/binfmt_misc/register": ":x:M::x::/work/escape:",
        "/proc/sysrq-trigger": "h",  # prints a help text, should it work
        "/proc/1/oom_score_adj": "-1000",
        "/proc/self/uid_map": "0 0 1",
        "/proc/self/setgroups": "allow",
        "/proc/irq/default_smp_affinity": "1",
        "/sys/kernel/uevent_helper": "/work/escape",
        "/sys/power/state": "freeze",
        "/sys/kernel/mm/transparent_hugepage/enabled": "never",
    }
    tries: dict[str, Attempt] = {}
    for folder in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
        writes |= {f"{folder}/release_agent": "/work/escape", f"{folder}/notify_on_release": "1"}
        writes |= {f"{folder}/devices.allow": "a", f"{folder}/cgroup.subtree_control": "+memory"}
        tries[f"a group in {folder}"] = (folder / "escape").mkdir
    tries |= {path: partial(Path(path).write_text, text) for path, text in writes.items() if Path(path).exists()}
    return achieved(tries)


@attack
def read_the_kernels_log() -> list[str]:
    tries: dict[str, Attempt] = {
        "syslog": partial(call, ARGUMENTS["numbers"]["syslog"], 3, b"\0" * 100, 99),
        "/dev/kmsg": Path("/dev/kmsg").read_bytes,
        "/proc/kmsg": partial(_unmasked, Path("/proc/kmsg")),
        "dmesg": partial(subprocess.run, ["dmesg"], check=True, capture_output=True),
    }
    return achieved(tries)


# --- the network ---------------------------------------------------------------------------------------------------


def _connect(family: int, address: Any) -> object:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        sock.connect(address)
    return "connected"


@attack
def reach_services_of_the_host() -> list[str]:
    tries: dict[str, Attempt] = {}
    for host, port in ARGUMENTS["tcp"]:
        tries[f"{host}:{port}"] = partial(_connect, socket.AF_INET, (host, port))
    for path in ARGUMENTS["unix"]:
        tries[path] = partial(_connect, socket.AF_UNIX, path)
    for name in ARGUMENTS["abstract"]:
        tries[f"@{name}"] = partial(_connect, socket.AF_UNIX, f"\0{name}")
    return achieved(tries)


def _datagram(address: str) -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return sock.sendto(b"x", (address, 53))


@attack
def other_networks() -> list[str]:
    names = {line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]} - {"lo"}
    # Some kernels make some in every name space, whoever asks for it; those are down.
    found = [name for name in names if int(Path("/sys/class/net", name, "flags").read_text(), 16) & 1]
    tries: dict[str, Attempt] = {
        "a datagram": partial(_datagram, "192.0.2.1"),
        "raw": partial(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1),
        "packets": partial(socket.socket, 17, socket.SOCK_RAW, 0),
    }
    return found + achieved(tries)
