"""What a task asks for beyond a plain process, what a node's administrator allows, and whether the two meet.

Both are lists of words, so that they travel in a queue hint and in a node's record, and compare without either side's
configuration. A task's `needs`: ``container``, ``network:host``, ``capability:SYS_PTRACE``, ``user:root``,
``mount:/data/x``, ``mount-rw:/scratch/y``, ``image:/srv/images/a.tar``, ``image:docker://HOST/REPOSITORY``,
``open-files:5000``. A node's `allows`: the same words, where a path stands for all that lies below it and a number for
all that are less, and ``process`` and ``container`` for what it runs.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from spinetta import imageref, names, openfiles
from spinetta.errors import UserError

PROCESS, CONTAINER = "process", "container"
BRIDGE, ROOT = "network:bridge", "user:root"
NETWORKS = ("none", "host", "bridge")
MOUNTS_MAX = 64  # each is a mount at every start
MOUNT_BYTES_MAX = 8 << 10  # of all their paths: they are in the queue hint, which every hungry node reads, page by page
CAPABILITIES_MAX = 41  # as many as the kernel knows
IMAGE_CHARS_MAX = 1024  # it is in the queue hint, which every hungry node reads
PATH_CHARS_MAX = 4096  # the kernel's own limit
MEMORY_BYTES_MIN = 6 << 20  # what runc needs itself, before it makes way for the command; with less it hardly gets on
KEEP_SCRATCH_MAX_S = 30 * 86400.0  # a month: it is the node's disk
ALLOWS_MAX = 128  # they travel with every heartbeat of the node's record, …
ALLOWS_BYTES_MAX = 8 << 10  # … which has 32 KiB at most, with its images
TMP_BYTES_MAX = 1 << 50
# fmt: off
CAPABILITIES = frozenset(
    {
        "AUDIT_CONTROL", "AUDIT_READ", "AUDIT_WRITE", "BLOCK_SUSPEND", "BPF", "CHECKPOINT_RESTORE", "CHOWN",
        "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "IPC_LOCK", "IPC_OWNER", "KILL", "LEASE",
        "LINUX_IMMUTABLE", "MAC_ADMIN", "MAC_OVERRIDE", "MKNOD", "NET_ADMIN", "NET_BIND_SERVICE",
        "NET_BROADCAST", "NET_RAW", "PERFMON", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYSLOG", "SYS_ADMIN",
        "SYS_BOOT", "SYS_CHROOT", "SYS_MODULE", "SYS_NICE", "SYS_PACCT", "SYS_PTRACE", "SYS_RAWIO",
        "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "WAKE_ALARM",
    }
)
# fmt: on
_PATHS = ("mount", "mount-rw")
_USER = re.compile(r"[0-9]{1,5}(:[0-9]{1,5})?", re.ASCII)
_ID_MAX = 65534  # 65535 means "no change" to some calls


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or folder of the node that a container sees. Absolute paths; `source` is the node's, `target` its own."""

    source: str
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """How a task is isolated.

    Attributes:
        image: such as ``docker://host/name:tag``, a digest or name of an image that the node has, or a path.
        network: ``none``, ``host`` or ``bridge``.
        writable: the root file system may be written to; what is written is gone with the attempt.
        user: ``UID`` or ``UID:GID`` inside, ``root``; empty: the image's, unless that is root.
        capabilities: names without ``CAP_``, sorted.
        mounts: by target.
        tmp_bytes: size of /tmp; 0: the node's default.
    """

    image: str
    network: str = "none"
    writable: bool = False
    user: str = ""
    capabilities: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    tmp_bytes: int = 0


# --- what a task needs ---------------------------------------------------------------------------------------------


def needs(asked: ContainerSpec | None, open_files_max: int = 0) -> tuple[str, ...]:
    """All that a node must allow for the task, sorted; empty for a plain process that asks for nothing."""
    wanted: set[str] = {openfiles.word(open_files_max)} if open_files_max else set()
    if asked is None:
        return tuple(wanted)
    wanted.add(CONTAINER)
    if asked.network != "none":
        wanted.add(network_need(asked.network))
    wanted |= {f"capability:{name}" for name in asked.capabilities}
    if asked.user.split(":")[0] in ("0", "root"):
        wanted.add(ROOT)
    wanted |= {mount_need(m) for m in asked.mounts}
    if need := _image_need(asked.image):
        wanted.add(need)
    return tuple(sorted(wanted))


def network_need(network: str) -> str:
    """The word for one of `NETWORKS` but ``none``, of which there is no need."""
    return f"network:{network}"


def mount_need(mount: Mount) -> str:
    """The word for one mount."""
    return f"{'mount-rw' if mount.writable else 'mount'}:{mount.source}"


def _image_need(image: str) -> str:
    try:
        return imageref.need(imageref.parse(image))
    except UserError:
        return f"no-image:{image}"  # not written by any client of ours: a word that nobody can allow


def refusals(wanted: Iterable[str], allows: Collection[str]) -> list[str]:
    """Words of `wanted` that a node with these `allows` does not grant, sorted. A task without words is a process.

    A node whose record tells nothing (of a version before containers) runs processes.
    """
    asked = set(wanted) or {PROCESS}
    if CONTAINER not in asked:
        asked.add(PROCESS)
    granted = set(allows) or {PROCESS}
    return sorted(need for need in asked if not is_granted(need, granted))


def is_granted(need: str, granted: Collection[str]) -> bool:
    """Whether one word is among these allowances, or below one of them."""
    if need in granted:
        return True
    if (number := openfiles.number_of(need)) is not None:
        return number <= openfiles.most(granted)
    if need.startswith(imageref.ALLOWANCE):
        return imageref.refusal(need, granted) is None
    kind, colon, path = need.partition(":")
    if not colon or kind not in _PATHS:
        return False
    kinds = ("mount", "mount-rw") if kind == "mount" else (kind,)  # what may be written may be read
    if path != posixpath.normpath(path):
        return False  # `..` would lead out of what is allowed
    return any(
        names.is_below(path, allowed.partition(":")[2]) for allowed in granted if allowed.partition(":")[0] in kinds
    )


# --- is it well formed? --------------------------------------------------------------------------------------------


def check_container(asked: ContainerSpec, field: str) -> None:
    """Raise UserError, naming ``FIELD.part``, unless the container can be asked for."""
    if not asked.image:
        raise UserError("a container needs an image", field=f"{field}.image", hint=imageref.FORMS)
    if len(asked.image) > IMAGE_CHARS_MAX:
        raise UserError(
            f"the image's reference has {len(asked.image)} characters",
            field=f"{field}.image",
            hint=f"at most {IMAGE_CHARS_MAX}",
            reason="too-large",
        )
    imageref.parse(asked.image, f"{field}.image")
    if asked.network not in NETWORKS:
        raise UserError(
            f"no network is called {names.quoted(asked.network)}", field=f"{field}.network", hint=", ".join(NETWORKS)
        )
    if asked.user and asked.user != "root":
        ids = asked.user.split(":") if _USER.fullmatch(asked.user) else []
        if not ids or any(int(number) > _ID_MAX for number in ids):
            raise UserError(
                f"not a user of a container: {names.quoted(asked.user)}",
                field=f"{field}.user",
                hint=f"UID or UID:GID, numbers up to {_ID_MAX}; nothing for the image's own",
            )
    if len(asked.capabilities) > CAPABILITIES_MAX:
        raise UserError("more capabilities than there are", field=f"{field}.capabilities", reason="too-large")
    for name in asked.capabilities:
        check_capability(name, f"{field}.capabilities")
    if not 0 <= asked.tmp_bytes <= TMP_BYTES_MAX:
        raise UserError(f"{asked.tmp_bytes} is out of range for the size of /tmp", field=f"{field}.tmp_bytes")
    if len(asked.mounts) > MOUNTS_MAX:
        raise UserError(
            f"{len(asked.mounts)} mounts", field=f"{field}.mounts", hint=f"at most {MOUNTS_MAX}", reason="too-large"
        )
    size = sum(len(m.source.encode(errors="replace")) + len(m.target.encode(errors="replace")) for m in asked.mounts)
    if size > MOUNT_BYTES_MAX:
        raise UserError(
            f"the paths of all mounts have {size} bytes",
            field=f"{field}.mounts",
            hint=f"at most {MOUNT_BYTES_MAX}; mount a directory above them",
            reason="too-large",
        )
    targets: set[str] = set()
    for i, mount in enumerate(asked.mounts):
        here = f"{field}.mounts[{i}]"
        check_path(mount.source, f"{here}.source")
        check_path(mount.target, f"{here}.target")
        if mount.target in targets:
            raise UserError(f"two mounts at {names.quoted(mount.target)}", field=f"{here}.target", hint="give it once")
        targets.add(mount.target)


def check_capability(name: str, field: str) -> None:
    """Raise UserError unless it is the name of a Linux capability, without ``CAP_``."""
    if name not in CAPABILITIES:
        raise UserError(
            f"no capability is called {names.quoted(name)}", field=field, hint="e.g. SYS_PTRACE; see capabilities(7)"
        )


def check_path(path: str, field: str) -> None:
    """Raise UserError unless it is a plain absolute path: no ``..``, nothing twice, nothing that cannot be printed."""
    names.check_printable(path, "the path", field)
    if not path.startswith("/") or path == "/" or posixpath.normpath(path) != path or path.startswith("//"):
        raise UserError(
            f"not a plain absolute path: {names.quoted(path)}",
            field=field,
            hint="e.g. /data/genomes, without .. and //",
        )
    if len(path) > PATH_CHARS_MAX:
        raise UserError(f"the path has {len(path)} characters", field=field, hint=f"at most {PATH_CHARS_MAX}")


def check_allowance(word: str, field: str = "") -> str:
    """One of a node's allowances, as an administrator writes it.

    Raises:
        UserError: it is none.
    """
    kind, _, what = word.partition(":")
    networks = ", ".join(map(network_need, NETWORKS[1:]))
    hint = f"{networks}, capability:NAME, {ROOT}, mount:/PATH, mount-rw:/PATH, image:/PATH or image:docker://HOST"
    if kind == "network" and what in NETWORKS[1:]:
        return word
    if kind == "capability":
        check_capability(what, field)
        return word
    if word == ROOT:
        return word
    if kind == "image" and what.startswith("docker://"):
        what = what.rstrip("/")
        imageref.parse(what if "/" in what.removeprefix("docker://") else f"{what}/any", field)
        return word.rstrip("/")
    if kind in (*_PATHS, "image"):
        check_path(what, field)
        return word
    raise UserError(f"not an allowance: {names.quoted(word)}", field=field, hint=hint)


def check_allowances(words: Collection[str], field: str = "") -> None:
    """Raise UserError where tasks may write to what others may name as their image, or to the way there.

    An image's path is judged, then unpacked by root: a link put there meanwhile would make any of the node's
    directories an image.
    """
    writable = [word.partition(":")[2] for word in sorted(words) if word.startswith("mount-rw:")]
    for image in imageref.local_prefixes(sorted(words)):
        for path in writable:
            if names.is_below(image, path) or names.is_below(path, image):
                raise UserError(
                    f"tasks may write to {path}, and name what is in {image} as their image: one could make an image of"
                    " any directory of this node",
                    field=field,
                    hint="keep images where no task may write, or import them by name",
                )
