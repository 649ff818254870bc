"""Records as files: whole or not there, and never believed when they are damaged."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .wire import KEY, Message

SEALED_SINCE = 2  # records from this version on have a checksum; without one they are damaged
RECORD_BYTES_MAX = 1 << 20  # ours have less than 20 KiB; anything larger is not ours
BROKEN_MAX = 100  # kept for people to look at
_NEW = ".new"  # of what is to replace a record, see `put_beside`


@dataclass(frozen=True)
class Records:
    """What a folder holds: records by name, and the names of what is none."""

    found: dict[str, Message] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def _checksum(record: Mapping[str, object]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def seal(record: Mapping[str, object]) -> Message:
    """The record with a checksum: a flipped bit must not turn an exit code into another, or a pid into a stranger's."""
    return {**record, "sum": _checksum(record)}


def unseal(data: bytes) -> Message:
    """The record in `data`. ValueError: it is damaged, or none."""
    if len(data) > RECORD_BYTES_MAX:
        raise ValueError("too large")
    try:
        record = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("no object")
    version, checksum = record.get("v"), record.pop("sum", None)
    if checksum is None and isinstance(version, int) and version < SEALED_SINCE:
        return record
    if checksum != _checksum(record):
        raise ValueError("its checksum is wrong")
    return record


def put_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, so that after a crash it is whole: the old or the new. Its folder is not synced."""
    _write_beside(path, data, synced=True).rename(path)


def put_beside(path: Path, data: bytes) -> None:
    """Write what is to replace `path` beside it, where `read_records` finds it whatever becomes of the processes.

    Not synced: after a power cut the old one counts. `settle` makes it `path`.
    """
    _write_beside(path, data, synced=False).rename(beside(path))


def settle(path: Path) -> None:
    """Sync what was written beside `path`, and put it there. Its folder is not synced."""
    new = beside(path)
    fd = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    new.rename(path)


def beside(path: Path) -> Path:
    """Where `put_beside` writes."""
    return path.with_name(f".{path.name}{_NEW}")


def _write_beside(path: Path, data: bytes, *, synced: bool) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if synced:
            os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(fd)
    return temporary


def overwrite(path: Path, data: bytes) -> bool:
    """Write over what is at `path`, which takes no new room on a full disk; a crash may leave it damaged."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.pwrite(fd, data, 0) != len(data):
            return False
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def sync_folder(path: Path) -> None:
    """Make renames and removals in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_records(folder: Path) -> Records:
    """All records of a folder, with what was written beside them and is whole. Left-over temporary files go."""
    records = Records()
    for path in sorted(folder.iterdir()):  # those that begin with a dot come first
        name = path.name
        if name.startswith("."):
            name = name[1:].removesuffix(_NEW)
            if is_key(name) and path == beside(folder / name) and _read_into(records, name, path):
                with contextlib.suppress(OSError):  # a read-only disk: it counts all the same
                    settle(folder / name)
                    sync_folder(folder)
                continue
            with contextlib.suppress(OSError):  # a read-only disk, or somebody's folder
                path.unlink()
        elif name not in records.found and not _read_into(records, name, path):
            records.broken.append(name)
    return records


def _read_into(records: Records, name: str, path: Path) -> bool:
    """Whether there is a record."""
    try:
        with path.open("rb") as file:
            records.found[name] = unseal(file.read(RECORD_BYTES_MAX + 1))
    except (OSError, ValueError):
        return False
    return True


def put_aside(path: Path, broken: Path) -> Path | None:
    """Move what is no record to the folder `broken`, of which the newest stay; None when it cannot be moved."""
    target = broken / f"{path.name[:200]}.{os.urandom(4).hex()}"
    try:
        broken.mkdir(mode=0o700, exist_ok=True)
        path.rename(target)
        old = sorted(broken.iterdir(), key=lambda each: each.lstat().st_mtime)[:-BROKEN_MAX]
    except OSError:
        return target if target.exists() else None
    for each in old:
        with contextlib.suppress(OSError):
            each.unlink()
    return target


def is_key(name: str) -> bool:
    """Whether a file of this name can be the record of anything."""
    return KEY.match(name) is not None
