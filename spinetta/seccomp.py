"""Which system calls a container may make: a list of what is allowed, made from the capabilities it has.

What is not listed fails with EPERM, also what kernels to come will add. The list holds what ordinary programs need and
what concerns nobody but the caller. What it leaves out reaches the kernel's own state (modules, keys, clocks, other
name spaces), is new and large (io_uring, bpf), or opens files behind the back of the mount table. As strong as what
containerd and Docker do by default, and stronger in three places: address families are listed rather than two of them
refused, the 32-bit call that would go round that is not allowed, and calls of other machines (32-bit programs, x32) end
the program unless its image is for such a one.
docs/adr/0033-isolation-by-default.md says more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

EPERM, ENOSYS = 1, 38
ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"

# The machine's own calls, and those of its 32-bit programs. Machines that are not here get their own calls only.
ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
    "s390x": ("SCMP_ARCH_S390X", "SCMP_ARCH_S390"),
}
OF_MACHINE: Mapping[str, str] = {
    "x86_64": "arch_prctl modify_ldt map_shadow_stack",
    "aarch64": "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls",
    "s390x": "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr s390_guarded_storage",
    "ppc64le": "sync_file_range2 swapcontext",
    "riscv64": "riscv_flush_icache riscv_hwprobe",
}

# A call that has several names (for 32-bit ids, sizes and times) is allowed by all of them.
EVERYBODY: Mapping[str, str] = {
    "a process and its life": """
        execve execveat exit exit_group fork vfork wait4 waitpid waitid getpid gettid getppid getpgid getpgrp setpgid
        getsid setsid set_tid_address prctl uname umask getcwd chdir fchdir pause restart_syscall sysinfo times
        getrusage pidfd_open pidfd_send_signal process_mrelease set_thread_area get_thread_area rseq membarrier
    """,
    "who it is": """
        getuid getuid32 geteuid geteuid32 getgid getgid32 getegid getegid32 getresuid getresuid32 getresgid
        getresgid32 getgroups getgroups32 setuid setuid32 setgid setgid32 setreuid setreuid32 setregid setregid32
        setresuid setresuid32 setresgid setresgid32 setfsuid setfsuid32 setfsgid setfsgid32 setgroups setgroups32
        capget capset
    """,
    "its limits and its share": """
        getrlimit ugetrlimit setrlimit prlimit64 getpriority setpriority ioprio_get ioprio_set sched_yield
        sched_getaffinity sched_setaffinity sched_getattr sched_setattr sched_getparam sched_setparam
        sched_getscheduler sched_setscheduler sched_get_priority_max sched_get_priority_min sched_rr_get_interval
        sched_rr_get_interval_time64 getcpu
    """,
    "less than it has": "seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self",
    "looking at others of its own container": "ptrace process_vm_readv process_vm_writev",
    "signals": """
        kill tkill tgkill alarm rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_tgsigqueueinfo
        rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 sigaltstack sigprocmask sigreturn signalfd
        signalfd4
    """,
    "memory": """
        brk mmap mmap2 munmap mremap mprotect madvise mincore msync mlock mlock2 mlockall munlock munlockall mseal
        memfd_create memfd_secret pkey_alloc pkey_free pkey_mprotect remap_file_pages cachestat
    """,
    "waiting for each other": """
        futex futex_time64 futex_wait futex_wake futex_requeue futex_waitv get_robust_list set_robust_list eventfd
        eventfd2 semget semop semctl semtimedop semtimedop_time64 shmget shmat shmdt shmctl msgget msgsnd msgrcv
        msgctl ipc mq_open mq_unlink mq_notify mq_getsetattr mq_timedsend mq_timedsend_time64 mq_timedreceive
        mq_timedreceive_time64
    """,
    "time, to read and to wait for": """
        time gettimeofday clock_gettime clock_gettime64 clock_getres clock_getres_time64 clock_nanosleep
        clock_nanosleep_time64 nanosleep adjtimex clock_adjtime clock_adjtime64 getitimer setitimer timer_create
        timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
        timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64
    """,
    "waiting for files": """
        select _newselect pselect6 pselect6_time64 poll ppoll ppoll_time64 epoll_create epoll_create1 epoll_ctl
        epoll_ctl_old epoll_wait epoll_wait_old epoll_pwait epoll_pwait2 inotify_init inotify_init1 inotify_add_watch
        inotify_rm_watch fanotify_mark
    """,
    "opening, reading, writing": """
        open openat openat2 creat close close_range dup dup2 dup3 pipe pipe2 fcntl fcntl64 ioctl flock read readv
        pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek _llseek readahead fadvise64 fadvise64_64
        fallocate ftruncate ftruncate64 truncate truncate64 copy_file_range sendfile sendfile64 splice tee vmsplice
        sync syncfs fsync fdatasync sync_file_range io_setup io_submit io_cancel io_getevents io_pgetevents
        io_pgetevents_time64 io_destroy
    """,
    "names of files": """
        access faccessat faccessat2 stat stat64 lstat lstat64 fstat fstat64 fstatat64 newfstatat statx statfs
        statfs64 fstatfs fstatfs64 getdents getdents64 mkdir mkdirat rmdir link linkat unlink unlinkat symlink
        symlinkat readlink readlinkat rename renameat renameat2 mknod mknodat name_to_handle_at
    """,
    "what files are": """
        chmod fchmod fchmodat fchmodat2 chown chown32 lchown lchown32 fchown fchown32 fchownat utime utimes
        utimensat utimensat_time64 futimesat getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr
        setxattrat listxattr llistxattr flistxattr listxattrat removexattr lremovexattr fremovexattr removexattrat
    """,
    "connections, once there is a socket": """
        bind connect listen accept accept4 getsockname getpeername getsockopt setsockopt socketpair shutdown send
        sendto sendmsg sendmmsg recv recvfrom recvmsg recvmmsg recvmmsg_time64
    """,
    "random numbers": "getrandom",
}

# What a capability is for, and without it would fail in the kernel anyhow: refused a step earlier.
OF_CAPABILITY: Mapping[str, str] = {
    "BPF": "bpf",
    "DAC_READ_SEARCH": "open_by_handle_at",
    "PERFMON": "perf_event_open",
    "SYS_ADMIN": """
        bpf perf_event_open clone clone3 unshare setns mount mount_setattr move_mount open_tree fsopen fsconfig fsmount
        fspick umount umount2 pivot_root fanotify_init lookup_dcookie quotactl quotactl_fd sethostname setdomainname
        syslog
    """,
    "SYS_BOOT": "reboot",
    "SYS_CHROOT": "chroot",
    "SYS_MODULE": "init_module finit_module delete_module",
    "SYS_NICE": "get_mempolicy set_mempolicy set_mempolicy_home_node mbind",
    "SYS_PACCT": "acct",
    "SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "SYS_RAWIO": "iopl ioperm",
    "SYS_TIME": "settimeofday stime clock_settime clock_settime64",
    "SYS_TTY_CONFIG": "vhangup",
    "SYSLOG": "syslog",
}

# Listed, not two of them refused: the kernel loads a module for whoever asks for a family, and the rare ones are where
# its errors are. The comparison is of 64 bits, of which the kernel takes 32, so a list of what is refused could be
# gone round with a bit above them. Not `socketcall`, whose family stands in memory where no filter can look.
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}
FAMILIES_RAW = {"AF_PACKET": 17}  # with NET_RAW

# clone(2) with any of these makes a name space, and in a user name space of its own everybody has all capabilities:
# the half of the kernel that is meant for root.
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

# personality(2): what is usual, 32-bit machine names, the release as 2.6, both, and the question what it is. Others
# turn off the randomness of addresses, or make unreadable memory executable.
PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)


def profile(capabilities: Collection[str], arch: str, *, programs_32: bool = False) -> dict[str, object]:
    """``linux.seccomp`` of an OCI configuration.

    Args:
        capabilities: names without ``CAP_`` that the container has.
        arch: as uname(2) calls the machine, e.g. ``x86_64``.
        programs_32: its 32-bit programs run, too. They cost each start 5 ms, and have no sockets.
    """
    held = set(capabilities)
    plain = _names(*EVERYBODY.values(), OF_MACHINE.get(arch, ""))
    for capability, calls in OF_CAPABILITY.items():
        if capability in held:
            plain |= _names(calls)
    rules: list[dict[str, object]] = [{"names": sorted(plain), "action": ALLOW}]
    if "SYS_ADMIN" not in held:
        # The flags are the second argument on s390 and the first elsewhere.
        rules.append(_when("clone", 1 if arch == "s390x" else 0, "SCMP_CMP_MASKED_EQ", NEW_NAMESPACES, 0))
        # Its flags stand in memory. C libraries that hear "no such call" use clone instead; on EPERM they give up.
        rules.append({"names": ["clone3"], "action": ERRNO, "errnoRet": ENOSYS})
    rules += [_when("personality", 0, "SCMP_CMP_EQ", value) for value in PERSONALITIES]
    families = sorted((FAMILIES | (FAMILIES_RAW if "NET_RAW" in held else {})).values())
    rules += [_when("socket", 0, "SCMP_CMP_EQ", family) for family in families]
    # By name, and with another number than the default's: libseccomp would allow it by itself where it cannot look at
    # the arguments, and runc leaves out what says the same as the default.
    rules.append({"names": ["socketcall"], "action": ERRNO, "errnoRet": ENOSYS})
    made: dict[str, object] = {"defaultAction": ERRNO, "defaultErrnoRet": EPERM, "syscalls": rules}
    if arch in ARCHITECTURES:
        made["architectures"] = list(ARCHITECTURES[arch][: 1 + programs_32])
    return made


def _names(*calls: str) -> set[str]:
    return {name for some in calls for name in some.split()}


def _when(name: str, index: int, operator: str, value: int, value_two: int | None = None) -> dict[str, object]:
    """Allowed if one argument compares."""
    condition: dict[str, object] = {"index": index, "value": value, "op": operator}
    if value_two is not None:
        condition["valueTwo"] = value_two
    return {"names": [name], "action": ALLOW, "args": [condition]}
