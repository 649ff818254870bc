"""An unpacked root file system: made fit for containers, listed with hashes, compared with its list again.

Nobody but us can change it while it is worked on, so paths in it may be looked at one after the other.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spinetta.runtime.images.layers import Tell, is_special
from spinetta.runtime.images.limits import DEPTH_MAX, PASSWD_BYTES_MAX, Limits, Refused

DIRECTORIES = (
    ("proc", 0o755),
    ("dev", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("work", 0o755),
    ("run", 0o755),
    ("run/secrets", 0o755),
    ("run/secrets/spinetta", 0o755),
    (".spinetta", 0o755),
    ("etc", 0o755),
)
"""Where every container has something mounted. They must be real directories: a mount would follow a link."""
OURS = ("tmp", "run", "run/secrets", "run/secrets/spinetta", ".spinetta")
"""Of these the permissions are ours, whatever the image says: runc gives what it mounts on /tmp those of what it
covers, and through the others a user without rights gets to what is mounted within."""
INIT = ".spinetta/init"
NETWORK_FILES = {"etc/hosts": b"127.0.0.1 localhost\n::1 localhost\n", "etc/resolv.conf": b""}
"""What containers with the host's network have mounted; what the others see. The runtime would make a file that is
missing, here, in the image of all; and where distributions have a link to what they make at boot, there."""
DIFFERENCES_MAX = 20  # told of a tree that is not as it was
LINKS_MAX = 40  # followed in one path, as the kernel does
_BLOCK = 512
_NOT_THERE = "is missing"


@dataclass(slots=True)
class Measured:
    """What a tree comes to. `disk_bytes`: what it takes on the disk."""

    files: int = 0
    disk_bytes: int = 0
    removed: int = 0  # devices and sockets
    seen: set[tuple[int, int]] = field(default_factory=set)  # files with several names


# --- made fit --------------------------------------------------------------------------------------------------------


def prepare(root: Path, uid: int, gid: int) -> None:
    """Make the mount points of containers, where they are missing; `uid` and `gid` own them.

    Raises:
        Refused: one of them is a link or a file. A container whose /dev leads elsewhere could be made to write there.
    """
    for name, mode in DIRECTORIES:
        path = root / name
        try:
            path.mkdir(mode=mode)
        except FileExistsError:
            if not stat.S_ISDIR(path.lstat().st_mode):
                kind = "a symbolic link" if path.is_symlink() else "not a directory"
                raise Refused(
                    f"/{name} in the image is {kind}; every container has something mounted there",
                    reason="unsafe-root",
                    hint="make it a directory, or leave it out",
                ) from None
            if name in OURS:
                path.chmod(mode)
        else:
            path.chmod(mode)  # whatever the umask
            os.chown(path, uid, gid)
    init = root / INIT
    try:
        os.close(os.open(init, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o755))
        os.chown(init, uid, gid)
    except FileExistsError:
        if not stat.S_ISREG(init.lstat().st_mode):
            raise Refused(f"/{INIT} in the image is no plain file", reason="unsafe-root", hint="leave it out") from None
    for name, content in NETWORK_FILES.items():
        path = root / name
        if path.is_symlink():
            path.unlink()
        if not path.exists():
            path.write_bytes(content)
            path.chmod(0o644)
            os.chown(path, uid, gid)
        elif not path.is_file():
            raise Refused(f"/{name} in the image is no plain file", reason="unsafe-root", hint="leave it out")
    os.chown(root, uid, gid)
    root.chmod(0o755)


def settle(root: Path, limits: Limits, base: int, listing: Path, tell: Tell) -> tuple[Measured, str]:
    """Take out what no image may bring, measure the rest, and write its list; the list's digest.

    Args:
        root: the tree.
        limits: it is looked at again: what has been unpacked counts, not what was announced.
        base: the host's id of the container's 0; ids in the list are the container's.
        listing: to be written.
        tell: is told of bytes that have been read.
    """
    found = Measured()
    hashed = hashlib.sha256()
    with gzip.GzipFile(filename="", fileobj=listing.open("wb"), mode="wb", compresslevel=1, mtime=0) as out:
        for line in _lines(root, base, found, limits, tell, mend=True):
            hashed.update(line)
            out.write(line)
    return found, f"sha256:{hashed.hexdigest()}"


def compare(root: Path, base: int, listing: Path, digest: str, tell: Tell) -> list[str]:
    """How the tree differs from its list, in words; empty when it does not.

    Raises:
        Refused: the list itself is not what its digest says.
    """
    hashed, expected = hashlib.sha256(), []
    try:
        with gzip.open(listing, "rb") as file:
            for line in file:
                hashed.update(line)
                expected.append(line)
    except (OSError, EOFError) as e:
        raise Refused(
            f"the image's list of files cannot be read: {e}", reason="damaged", hint="pull it again"
        ) from None
    if f"sha256:{hashed.hexdigest()}" != digest:
        raise Refused("the image's list of files is damaged", reason="damaged", hint="pull it again")
    # One after the other in the same order; after a difference by name, so that one more file is one difference.
    found = list(_lines(root, base, Measured(), None, tell, mend=False))
    if found == expected:
        return []
    before, now = dict(map(_named, expected)), dict(map(_named, found))
    out = []
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = _NOT_THERE if name not in now else "was not there" if name not in before else "is not what it was"
            out.append(f"{ascii(name)[1:-1]} {what}")
        if len(out) >= DIFFERENCES_MAX:
            out.append("… and perhaps more")
            break
    return out


def _named(line: bytes) -> tuple[str, list[object]]:
    name, *rest = json.loads(line)
    return name, rest


def _lines(root: Path, base: int, found: Measured, limits: Limits | None, tell: Tell, *, mend: bool) -> Iterator[bytes]:
    """A line of each file, directories before what is in them, sorted by name."""
    waiting: list[tuple[str, int]] = [("", 0)]
    top = os.fspath(root)
    while waiting:
        name, depth = waiting.pop()
        path = f"{top}/{name}" if name else top
        entry = os.lstat(path)
        found.files += 1
        if limits is not None and found.files > limits.files_max:
            raise Refused(f"the image has more than {limits.files_max} files", reason="too-large")
        if is_special(entry.st_mode):
            if not mend:
                yield _line(name, "?", entry, base)
                continue
            Path(path).unlink()
            found.removed += 1
            found.files -= 1
            continue
        if mend:
            _drop_attributes(path)
        once = (entry.st_dev, entry.st_ino)
        if entry.st_nlink < 2 or stat.S_ISDIR(entry.st_mode) or once not in found.seen:
            found.disk_bytes += entry.st_blocks * _BLOCK
            if entry.st_nlink > 1 and not stat.S_ISDIR(entry.st_mode):
                found.seen.add(once)
        if limits is not None and found.disk_bytes > limits.bytes_max:
            raise Refused(f"the image takes more than {limits.bytes_max} bytes", reason="too-large")
        if stat.S_ISDIR(entry.st_mode):
            if depth > DEPTH_MAX:
                raise Refused(f"the image has more than {DEPTH_MAX} directories inside each other", reason="too-large")
            yield _line(name, "d", entry, base)
            inside = sorted(os.listdir(path), reverse=True)  # noqa: PTH208 - names, not paths
            waiting += [(f"{name}/{n}" if name else n, depth + 1) for n in inside]
        elif stat.S_ISLNK(entry.st_mode):
            yield _line(name, "l", entry, base, os.readlink(path))  # noqa: PTH115 - not cleaned up
        elif stat.S_ISREG(entry.st_mode):
            yield _line(name, "f", entry, base, _hash(path, tell))
        else:
            yield _line(name, "p", entry, base)


def _line(name: str, kind: str, entry: os.stat_result, base: int, content: str = "") -> bytes:
    mode = stat.S_IMODE(entry.st_mode)
    size = entry.st_size if kind == "f" else 0
    fields = [f"/{name}", kind, mode, entry.st_uid - base, entry.st_gid - base, size, content]
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _hash(path: str, tell: Tell) -> str:
    hashed = hashlib.sha256()
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0) as file:
        while data := file.read(1 << 20):
            hashed.update(data)
            tell(len(data))
    return hashed.hexdigest()


def _drop_attributes(path: str) -> None:
    """Leave no extended attributes but plain ones of users: others give rights, or steer overlayfs."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
        for name in names:
            if not name.startswith("user.") or name.startswith("user.overlay."):
                os.removexattr(path, name, follow_symlinks=False)
    except OSError as e:
        if e.errno not in (errno.ENOTSUP, errno.ENODATA, errno.EPERM):
            raise


# --- who is USER? ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UserIds:
    """A user of an image, in numbers of the container; `groups` beside the first one."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def user_ids(root: Path, user: str, ids: int) -> UserIds | None:
    """What USER of an image means, by its own /etc/passwd and /etc/group; None: it says nothing.

    Raises:
        Refused: no such user or group is in the image, or its number is too high.
    """
    if not user:
        return None
    name, colon, group = user.partition(":")
    people = [line.split(":") for line in _read_inside(root, "etc/passwd")]
    groups = [line.split(":") for line in _read_inside(root, "etc/group")]
    found = _row(people, name, 0, 2, columns=4)
    if found is not None:
        uid, gid, login = int(found[2]), _number(found[3], 0), found[0]
    elif name.isascii() and name.isdecimal() and len(name) < 10:
        uid, gid, login = int(name), 0, ""
    else:
        raise Refused(f"the image's user {name[:100]!r} is not in its /etc/passwd", reason="bad-user")
    more: tuple[int, ...] = ()
    if colon and group:
        row = _row(groups, group, 0, 2, columns=3)
        if row is not None:
            gid = int(row[2])
        elif group.isascii() and group.isdecimal() and len(group) < 10:
            gid = int(group)
        else:
            raise Refused(f"the image's group {group[:100]!r} is not in its /etc/group", reason="bad-user")
    elif login:
        members = (g for g in groups if len(g) >= 4 and login in g[3].split(",") and g[2].isdecimal())
        more = tuple(sorted({int(g[2]) for g in members if len(g[2]) < 10 and int(g[2]) < ids} - {gid}))[:64]
    if uid >= ids or gid >= ids:
        raise Refused(f"the image's user {user[:100]!r} has a number beyond {ids - 1}", reason="bad-user")
    return UserIds(uid, gid, more)


def _row(rows: Sequence[Sequence[str]], word: str, name: int, number: int, *, columns: int) -> Sequence[str] | None:
    good = [
        r for r in rows if len(r) >= columns and r[number].isascii() and r[number].isdecimal() and len(r[number]) < 10
    ]
    return next((r for r in good if r[name] == word), None) or next((r for r in good if r[number] == word), None)


def _number(text: str, otherwise: int) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else otherwise


def _read_inside(root: Path, name: str) -> list[str]:
    """Lines of a file of the tree, with symbolic links understood as inside of it; none when there is no such file."""
    path = inside(root, name)
    if path is None:
        return []
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return []
        return file.read(PASSWD_BYTES_MAX).decode(errors="replace").splitlines()


def inside(root: Path, name: str) -> Path | None:
    """Where a path of the tree really is, every link understood as a container would; None when nothing is there."""
    waiting = [p for p in name.split("/") if p not in ("", ".")][::-1]
    at: list[str] = []
    links = 0
    while waiting:
        part = waiting.pop()
        if part == "..":
            at = at[:-1]  # the root's parent is the root
            continue
        path = root.joinpath(*at, part)
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISLNK(mode):
            links += 1
            if links > LINKS_MAX:
                return None
            target = os.readlink(path)  # noqa: PTH115 - the same
            if target.startswith("/"):
                at = []
            waiting += [p for p in target.split("/") if p not in ("", ".")][::-1]
        else:
            at.append(part)
    return root.joinpath(*at)
