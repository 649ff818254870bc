"""Ways out of a container, tried in real ones made of our configuration by the real runc: each is refused.

What is tried stands in `tests.attacks.inside`. So that "refused" means something, the same attempts are made in
containers from which one protection was taken, and succeed there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spinetta.ocirequest import Hardening
from tests.attacks.cells import CRUN, FIRST_ID, OPEN_FILES, RUNC, Yard, missing, numbers_of, yard
from tests.attacks.inside.attempts import ATTACKS
from tests.cluster.harness import eventually

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all is there")

AS_ROOT: dict[str, Any] = {"uid": 0, "gid": 0, "rules": Hardening(root_inside=True)}
NUMBERS = ("open_by_handle_at", "ptrace", "process_vm_readv", "setns", "unshare", "clone", "syslog")


@pytest.fixture(scope="module")
def cells() -> Iterator[Yard]:
    with yard() as made:
        yield made


def _disk() -> tuple[int, int]:
    """A disk of this machine, whole."""
    found = sorted(path.read_text() for path in Path("/sys/block").glob("[sv]d?/dev"))
    major, _, minor = (found or ["8:0"])[0].strip().partition(":")
    return int(major), int(minor)


@dataclasses.dataclass
class Prey:
    """What the attackers are after: of this machine, and of another task."""

    arguments: dict[str, Any]
    pids: list[int]


@pytest.fixture(scope="module")
def prey(cells: Yard) -> Iterator[Prey]:
    keys = cells.folder / "keys"
    keys.mkdir()
    (keys / "node.key").write_text("a private key")
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        shim = stack.enter_context(socket.socket(socket.AF_UNIX))
        shim.bind(str(cells.folder / "shim.sock"))
        shim.listen()
        (cells.folder / "shim.sock").chmod(0o666)
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("\0" + (name := f"spinetta-cells-{os.getpid()}"))
        abstract.listen()
        # As another task would be seen: its user is ours.
        neighbour = subprocess.Popen(["sleep", "300"], user=FIRST_ID + 1000, group=FIRST_ID + 1000)
        stack.callback(neighbour.wait)
        stack.callback(neighbour.kill)
        scratch, secrets = cells.folder_of("scratch"), cells.folder_of("secrets", token="of another")  # noqa: S106 - none
        other = stack.enter_context(
            cells.started(["sh", "-c", "echo mine > result && sleep 300"], scratch_path=scratch, secrets_path=secrets)
        )
        eventually(lambda: Path(scratch, "result").exists(), within_s=30, what="the other task runs")
        children = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
        yield Prey(
            arguments={
                "numbers": numbers_of(*NUMBERS),
                "host_files": [str(keys / "node.key"), f"{scratch}/result", f"{secrets}/token", "/etc/shadow"],
                "host_pids": [neighbour.pid, other.pid, os.getpid(), *map(int, children)],
                "tcp": [["127.0.0.1", etcd.getsockname()[1]]],
                "unix": [str(cells.folder / "shim.sock")],
                "abstract": [name],
                "disk": _disk(),
                "open_files": OPEN_FILES,
            },
            pids=[neighbour.pid, other.pid],
        )
        assert neighbour.poll() is None, "a neighbour was ended"
        assert other.poll() is None, "another task was ended"


@pytest.fixture(scope="module", params=["task", "root", "crun"])
def outcome(request: pytest.FixtureRequest, cells: Yard, prey: Prey) -> dict[str, list[str]]:
    """All attempts at once, by an ordinary user, and by root of the container, who has no capabilities either."""
    if request.param == "crun" and not CRUN:
        pytest.skip("crun is not installed")
    changes = {"root": AS_ROOT, "crun": {"crun": True}}.get(request.param, {})
    return cells.attack(arguments=prey.arguments, **changes)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_tried_is_refused(outcome: dict[str, list[str]], name: str) -> None:
    assert outcome[name] == []


def test_with_the_hosts_network_only_its_services_are_reached(cells: Yard, prey: Prey) -> None:
    told = cells.attack(arguments=prey.arguments, network="host")
    reached = told.pop("reach_services_of_the_host")
    assert len(reached) == 2, "the address and the abstract socket, not the path"
    told.pop("other_networks")
    assert told == {name: [] for name in told}


# --- that the attempts are real ones -------------------------------------------------------------------------------


def without(*kinds: str) -> Any:
    """Without these name spaces."""

    def change(config: dict[str, Any]) -> None:
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] not in kinds]
        if "pid" in kinds:  # a /proc of its own goes with processes of its own
            for mount in config["mounts"]:
                if mount["destination"] == "/proc":
                    mount.update(type="bind", source="/proc", options=["rbind"])

    return change


def _no_filter(config: dict[str, Any]) -> None:
    del config["linux"]["seccomp"]


def _new_privileges(config: dict[str, Any]) -> None:
    config["process"]["noNewPrivileges"] = False
    del config["linux"]["seccomp"]  # one may be had without that promise only by root


def _capable(config: dict[str, Any]) -> None:
    for kind in config["process"]["capabilities"]:
        config["process"]["capabilities"][kind] = ["CAP_SYS_ADMIN", "CAP_SYS_CHROOT"]
    del config["linux"]["seccomp"]


def _unmasked(config: dict[str, Any]) -> None:
    config["linux"]["maskedPaths"] = []


def _keys_seen(config: dict[str, Any]) -> None:
    keys = str(Path(config["root"]["path"]).parent / "keys")
    config["mounts"].append({"destination": keys, "type": "bind", "source": keys, "options": ["bind"]})


def _writable(config: dict[str, Any]) -> None:
    config["root"]["readonly"] = False


def _many_files(config: dict[str, Any]) -> None:
    config["process"]["rlimits"] = []


@pytest.mark.parametrize(
    ("name", "change", "as_root"),
    [
        ("signal_processes_of_the_host", without("pid"), False),
        ("see_processes_of_the_host", without("pid"), False),
        ("trace_processes_of_others", None, False),
        ("paths_of_the_host", _keys_seen, False),
        ("new_name_spaces", _no_filter, False),
        ("capabilities_it_has", _no_filter, False),
        ("become_somebody_else", _new_privileges, False),
        ("mount_something", _capable, True),
        ("join_name_spaces", _capable, True),
        ("other_networks", None, False),
        ("what_shows_of_the_host", _unmasked, False),
        ("write_outside", _writable, True),
        ("raise_limits", _many_files, False),
    ],
)
def test_without_its_protection_it_succeeds(cells: Yard, prey: Prey, name: str, change: Any, as_root: bool) -> None:
    changes: dict[str, Any] = dict(AS_ROOT) if as_root else {}
    arguments = prey.arguments
    with contextlib.ExitStack() as stack:
        victim = subprocess.Popen(["sleep", "300"], user=FIRST_ID + 1000, group=FIRST_ID + 1000)
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        if name == "signal_processes_of_the_host":
            arguments = arguments | {"host_pids": [victim.pid], "taken": True}
        if name == "trace_processes_of_others":
            arguments = arguments | {"host_pids": [1], "taken": True}  # its own first process is none of others
        if name == "other_networks":
            if {interface for _, interface in socket.if_nameindex()} == {"lo"}:
                pytest.skip("this machine has no network")
            changes["network"] = "host"
        told = cells.attack(name, arguments=arguments, change=change, **changes)
        assert told[name] != []
    for path in (*cells.rootfs.rglob("escaped"),):
        path.unlink()


# --- system calls --------------------------------------------------------------------------------------------------

# By number of arguments 64-bit; -1 and 1 are addresses where nothing is.
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000
DANGEROUS: dict[str, list[Any]] = {
    # keys of the kernel, which no name space divides well
    "keyctl": [0, -3, 0],
    "add_key": ["user", "name", "text", 4, -2],
    "request_key": ["user", "name", None, 0],
    # programs and events within the kernel
    "bpf": [0, 1, 0],
    "perf_event_open": [1, 0, -1, -1, 0],
    "userfaultfd": [0x100001],
    "io_uring_setup": [0, 1],
    "io_uring_enter": [-1, 0, 0, 0, 0, 0],
    "io_uring_register": [-1, 0, 0, 0],
    "fanotify_init": [0x10000000, 0],
    # what is mounted
    "mount": [1, 1, 1, 0, 0],
    "umount2": [1, 0],
    "pivot_root": [1, 1],
    "fsopen": [1, 0],
    "fsconfig": [-1, 0, 0, 0, 0],
    "fsmount": [-1, 0, 0],
    "fspick": [-1, 1, 0],
    "open_tree": [-1, 1, 1],
    "move_mount": [-1, 1, -1, 1, 0],
    "mount_setattr": [-1, 1, 0, 1, 32],
    "chroot": [1],
    "quotactl": [0, 1, 0, 0],
    "open_by_handle_at": [-1, 1, 0],
    # name spaces
    "unshare": [CLONE_NEWUSER],
    "setns": [-1, 0],
    "clone": [CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0],
    "clone with a mount name space": [CLONE_NEWUSER | CLONE_NEWNS | signal.SIGCHLD, 0, 0, 0, 0],
    # the machine
    "reboot": [0, 0, 0, 0],
    "kexec_load": [0, 0, 0, 0],
    "kexec_file_load": [-1, -1, 0, 0, 0],
    "init_module": [1, 0, 1],
    "finit_module": [-1, 1, 0],
    "delete_module": [1, 0],
    "swapon": [1, 0],
    "swapoff": [1],
    "acct": [0],
    "iopl": [0],
    "ioperm": [0, 1, 0],
    "settimeofday": [1, 0],
    "clock_settime": [0, 1],
    "sethostname": [1, 1],
    "setdomainname": [1, 1],
    "syslog": [10, 0, 0],
    "vhangup": [],
    # other processes, and where memory is
    "kcmp": [1, 1, 0, 0, 0],
    "pidfd_getfd": [-1, 0, 0],
    "process_madvise": [-1, 0, 0, 0, 0],
    "mbind": [0, 0, 99, 0, 0, 0],
    "set_mempolicy": [99, 0, 0],
    "get_mempolicy": [0, 0, 0, 0, 99],
    "move_pages": [0, 0, 0, 0, 0, 0],
    "migrate_pages": [0, 0, 0, 0],
    # ways to run what is not allowed
    "personality": [0x0040000],
    "personality that reads as executable": [0x0400000],
    "socket": [38, 5, 0],  # AF_ALG
    "socket of the hypervisor": [40, 1, 0],  # AF_VSOCK
    "socket with a bit above": [1 << 32 | 38, 5, 0],
    "socket of RDS": [21, 5, 0],
    "socket of packets": [17, 3, 0],
}
# The kernel says the same to root of a user name space, with all its capabilities: two that refuse, then.
REFUSED_ANYHOW = {
    "bpf", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "swapon", "swapoff", "acct",
    "settimeofday", "clock_settime", "vhangup", "syslog", "open_by_handle_at", "ioperm", "iopl", "userfaultfd",
    "quotactl", "socket of packets", "fanotify_init", "add_key", "request_key",
}  # fmt: skip
EPERM, ENOSYS = -1, -38


@pytest.mark.parametrize("crun", [False, True], ids=["runc", "crun"])
def test_each_dangerous_system_call_is_refused_by_the_filter(cells: Yard, crun: bool) -> None:
    if crun and not CRUN:
        pytest.skip("crun is not installed")
    numbers = numbers_of(*(name.split()[0] for name in DANGEROUS))
    wanted = [(name, numbers[word], given) for name, given in DANGEROUS.items() if (word := name.split()[0]) in numbers]
    assert len(wanted) > 40
    # All capabilities, so that what refuses is the filter.
    told = cells.calls(wanted, change=_all_capabilities, crun=crun, **AS_ROOT)
    assert {name: code for name, code in told.items() if code != EPERM} == {}

    def unfiltered(config: dict[str, Any]) -> None:
        _all_capabilities(config)
        _no_filter(config)

    told = cells.calls(wanted, change=unfiltered, crun=crun, **AS_ROOT)
    assert {name for name, code in told.items() if code == EPERM} <= REFUSED_ANYHOW


def _all_capabilities(config: dict[str, Any]) -> None:
    features = subprocess.run([str(RUNC), "features"], capture_output=True, check=True, timeout=30).stdout
    names = json.loads(features)["linux"]["capabilities"]
    config["process"]["capabilities"] = dict.fromkeys(config["process"]["capabilities"], names)


def test_programs_are_told_that_there_is_no_clone3_and_use_clone(cells: Yard) -> None:
    told = cells.calls([("clone3", 435, [1, 64]), ("unknown", 1000, [0])])
    assert told["clone3"] == ENOSYS
    assert told["unknown"] in (EPERM, ENOSYS)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="two more ways to make system calls are x86's")
@pytest.mark.skipif("User Mode Linux" in Path("/proc/cpuinfo").read_text(), reason="this kernel takes all ways for one")
@pytest.mark.parametrize("crun", [False, True], ids=["runc", "crun"])
def test_other_ways_to_make_system_calls_are_no_way_round(cells: Yard, crun: bool) -> None:
    if crun and not CRUN:
        pytest.skip("crun is not installed")
    calls_32: dict[str, tuple[int, list[Any]]] = {
        "getpid": (20, []),
        "socketcall for a socket of AF_ALG": (102, [1, [38, 5, 0]]),
        "socketcall for a socket": (102, [1, [1, 1, 0]]),
        "socket of AF_ALG": (359, [38, 5, 0]),
        "mount": (21, [0, 0, 0]),
        "unshare": (310, [CLONE_NEWUSER]),
        "clone": (120, [CLONE_NEWUSER | signal.SIGCHLD, 0, 0]),
        "keyctl": (288, [0, 0xFFFFFFFD, 0]),
        "bpf": (357, [0, 0, 0]),
        "add_key": (286, [0, 0, 0]),
        "io_uring_setup": (425, [0, 1]),
    }
    wanted = [(name, number, given) for name, (number, given) in calls_32.items()]
    killed, no_such_machine = -1000 - signal.SIGSYS, -1000 - signal.SIGSEGV  # kernels may be without 32-bit programs
    changes = {"change": _all_capabilities, "crun": crun, **AS_ROOT}
    told = cells.calls(wanted, "calls_of_32_bits", **changes)
    assert set(told.values()) <= {killed, no_such_machine}
    told = cells.calls(wanted, "calls_of_32_bits", programs_32=True, **changes)
    works = told.pop("getpid")
    assert works > 0 or works == no_such_machine
    assert {name: code for name, code in told.items() if code not in (EPERM, ENOSYS, no_such_machine)} == {}
    with_bit: dict[str, tuple[int, list[int]]] = {"getpid": (39, []), "keyctl": (250, [0, -3, 0]), "mount": (165, [0])}
    x32 = [(name, 0x40000000 | number, given) for name, (number, given) in with_bit.items()]
    for programs_32 in (False, True):
        told = cells.calls(x32, programs_32=programs_32, **changes)
        assert {name: code for name, code in told.items() if code not in (EPERM, ENOSYS, killed)} == {}
