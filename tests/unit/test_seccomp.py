"""The list of system calls, held to facts of capabilities(7), syscalls(2) and what is known of dangerous ones."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from spinetta import container, seccomp

NEVER = """
    keyctl add_key request_key userfaultfd io_uring_setup io_uring_enter io_uring_register kexec_load
    kexec_file_load swapon swapoff nfsservctl uselib sysfs _sysctl ustat vm86 vm86old create_module query_module
    get_kernel_syms move_pages migrate_pages
""".split()  # noqa: SIM905 - a list is a page long
# What a capability is for, from capabilities(7) and the calls' own pages.
WITH = {
    "BPF": "bpf",
    "DAC_READ_SEARCH": "open_by_handle_at",
    "PERFMON": "perf_event_open",
    "SYSLOG": "syslog",
    "SYS_ADMIN": "mount umount2 pivot_root setns unshare fsopen move_mount open_tree mount_setattr sethostname clone3",
    "SYS_BOOT": "reboot",
    "SYS_CHROOT": "chroot",
    "SYS_MODULE": "init_module finit_module delete_module",
    "SYS_NICE": "mbind set_mempolicy",
    "SYS_PACCT": "acct",
    "SYS_PTRACE": "kcmp pidfd_getfd",
    "SYS_RAWIO": "iopl ioperm",
    "SYS_TIME": "settimeofday clock_settime",
    "SYS_TTY_CONFIG": "vhangup",
}
ORDINARY = """
    read write open openat openat2 close execve execveat fork vfork wait4 mmap mprotect brk futex epoll_wait poll
    ppoll socketpair connect bind accept4 sendmsg recvmsg kill tgkill rt_sigaction clock_gettime nanosleep
    getrandom prctl prlimit64 sched_setaffinity memfd_create statx newfstatat renameat2 copy_file_range pidfd_open
    landlock_restrict_self seccomp close_range faccessat2 epoll_pwait2 futex_waitv rseq membarrier
    inotify_add_watch shmget semop msgsnd mq_open timerfd_create eventfd2 signalfd4 io_submit getdents64 ptrace
    process_vm_readv
""".split()  # noqa: SIM905 - a list is a page long
NEW_USER, NEW_NET, THREAD = 0x10000000, 0x40000000, 0x003D0F00


def rules(*capabilities: str, arch: str = "x86_64") -> list[dict[str, Any]]:
    made = seccomp.profile(capabilities, arch)["syscalls"]
    assert isinstance(made, list)
    return made


def allowed(name: str, *arguments: int, capabilities: tuple[str, ...] = (), arch: str = "x86_64") -> bool:
    """As the kernel would decide, by the rules' own words."""
    for rule in rules(*capabilities, arch=arch):
        if name in rule["names"] and all(_holds(c, arguments) for c in rule.get("args", ())):
            return bool(rule["action"] == "SCMP_ACT_ALLOW")
    return False


def _holds(condition: dict[str, Any], arguments: tuple[int, ...]) -> bool:
    value = arguments[condition["index"]]
    if condition["op"] == "SCMP_CMP_EQ":
        return bool(value == condition["value"])
    assert condition["op"] == "SCMP_CMP_MASKED_EQ"
    return bool(value & condition["value"] == condition["valueTwo"])


@pytest.mark.parametrize("name", ORDINARY)
def test_what_ordinary_programs_need_is_allowed(name: str) -> None:
    assert allowed(name)


@pytest.mark.parametrize("name", NEVER)
def test_some_calls_are_for_nobody(name: str) -> None:
    assert not allowed(name, capabilities=tuple(container.CAPABILITIES))


@pytest.mark.parametrize(("capability", "name"), [(c, n) for c, names in WITH.items() for n in names.split()])
def test_some_calls_come_with_a_capability(capability: str, name: str) -> None:
    assert not allowed(name)
    assert allowed(name, capabilities=(capability,))


def test_capabilities_have_names_that_exist() -> None:
    assert set(seccomp.OF_CAPABILITY) <= container.CAPABILITIES


def test_threads_are_made_and_name_spaces_are_not() -> None:
    assert allowed("clone", THREAD)
    assert not allowed("clone", NEW_USER)
    assert not allowed("clone", THREAD | NEW_NET)
    assert allowed("clone", NEW_USER, capabilities=("SYS_ADMIN",))
    assert allowed("clone", 0, THREAD, arch="s390x")
    assert not allowed("clone", 0, NEW_USER, arch="s390x")


@pytest.mark.parametrize("arch", ["x86_64", "aarch64", "riscv64"])
def test_clone3_is_not_there_rather_than_refused(arch: str) -> None:
    (rule,) = (rule for rule in rules(arch=arch) if rule["names"] == ["clone3"])
    assert (rule["action"], rule["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)


def test_families_of_addresses_are_listed() -> None:
    assert [f for f in range(64) if allowed("socket", f)] == [1, 2, 10, 16]
    assert [f for f in range(64) if allowed("socket", f, capabilities=("NET_RAW",))] == [1, 2, 10, 16, 17]
    assert not allowed("socket", 1 << 32 | 38), "the kernel would take it for 38"
    assert not allowed("socketcall", 1)


def test_personalities_that_weaken_are_refused() -> None:
    assert allowed("personality", 0xFFFFFFFF)
    assert allowed("personality", 0)
    assert not allowed("personality", 0x0040000)  # ADDR_NO_RANDOMIZE
    assert not allowed("personality", 0x0400000)  # READ_IMPLIES_EXEC


def test_no_call_has_two_answers() -> None:
    for capabilities in ((), ("SYS_ADMIN",), tuple(container.CAPABILITIES)):
        plain = [name for rule in rules(*capabilities) if "args" not in rule for name in rule["names"]]
        assert len(plain) == len(set(plain))
        assert not set(plain) & {name for rule in rules(*capabilities) if "args" in rule for name in rule["names"]}


def test_calls_of_other_machines_are_for_images_of_those() -> None:
    assert seccomp.profile((), "x86_64")["architectures"] == ["SCMP_ARCH_X86_64"]
    both = seccomp.profile((), "x86_64", programs_32=True)["architectures"]
    assert both == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "and x32 is nobody's"
    assert seccomp.profile((), "aarch64", programs_32=True)["architectures"] == ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    assert "architectures" not in seccomp.profile((), "riscv64"), "it is that of the machine"


def test_names_are_those_of_the_kernel() -> None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("no libseccomp on this machine")
    # Newer than Debian 12's library.
    newer = {"mseal", "getxattrat", "setxattrat", "listxattrat", "removexattrat", "cachestat", "fchmodat2"}
    newer |= {"map_shadow_stack", "futex_wait", "futex_wake", "futex_requeue", "riscv_hwprobe"}
    known = {
        name: library.seccomp_syscall_resolve_name(name.encode()) != -1
        for arch in ("x86_64", "aarch64", "s390x", "ppc64le", "riscv64")
        for rule in rules(*container.CAPABILITIES, arch=arch)
        for name in rule["names"]
    }
    assert {name for name, there in known.items() if not there} <= newer
    assert len(known) > 350
