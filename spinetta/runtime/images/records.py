"""What is remembered of an unpacked image: a file beside it, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from spinetta.imageref import DIGEST_TEXT

RECORD, USED, FILES, ROOTFS = "image.json", "used", "files.gz", "rootfs"
VERSION = 1
NAMES_MAX = 32  # of one image: they are told with it


@dataclass(frozen=True, slots=True)
class Name:
    """A name of an image: a reference, or what an administrator called it.

    Attributes:
        stamp: what a local file looked like when it was read: another stamp, another image.
        since_ms: if two images have a name after a crash the later one has it.
    """

    stamp: str = ""
    since_ms: int = 0


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An unpacked image.

    Attributes:
        digest: of its manifest here; names it.
        sources: digests under which registries have it, beside that.
        base, ids: the range of the host's ids that it was unpacked for.
        user: what its USER means: uid, gid, further groups; None when it has none.
        user_trouble: why USER means nothing.
        tree: digest of the list of its files, which is beside it.
        left_out: devices and sockets that it had.
        marked: to be removed as soon as nothing uses it.
    """

    digest: str
    sources: tuple[str, ...] = ()
    names: Mapping[str, Name] = field(default_factory=dict)
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    user: tuple[int, ...] | None = None
    user_trouble: str = ""
    workdir: str = ""
    stop_signal: str = ""
    architecture: str = ""
    base: int = 0
    ids: int = 0
    tree: str = ""
    files: int = 0
    size_bytes: int = 0
    left_out: int = 0
    created_ms: int = 0
    pinned: bool = False
    marked: bool = False

    @property
    def directory(self) -> str:
        """What its directory is called."""
        return self.digest.removeprefix("sha256:")

    def named(self, name: str, stamp: str, now_ms: int) -> ImageRecord:
        """With one name more; the oldest goes when there are too many."""
        names = {**{n: v for n, v in self.names.items() if n != name}, name: Name(stamp, now_ms)}
        return replace(self, names=dict([*names.items()][-NAMES_MAX:]))

    def unnamed(self, name: str) -> ImageRecord:
        """Without that name."""
        return replace(self, names={n: v for n, v in self.names.items() if n != name})


def from_result(digest: str, result: Mapping[str, Any], *, base: int, ids: int, now_ms: int) -> ImageRecord:
    """A record of what the worker has unpacked."""
    config, user = result["config"], result["user"]
    return ImageRecord(
        digest,
        env=tuple(config["env"]),
        entrypoint=tuple(config["entrypoint"]),
        cmd=tuple(config["cmd"]),
        user=(user["uid"], user["gid"], *user["groups"]) if user is not None else None,
        user_trouble=result["user_trouble"],
        workdir=config["workdir"],
        stop_signal=config["stop_signal"],
        architecture=config["architecture"],
        base=base,
        ids=ids,
        tree=result["tree"],
        files=result["files"],
        size_bytes=result["size_bytes"],
        left_out=result["left_out"],
        created_ms=now_ms,
    )


def encode(record: ImageRecord) -> bytes:
    """As it is written."""
    return json.dumps({"version": VERSION, **asdict(record)}, indent=1).encode()


def decode(data: bytes) -> ImageRecord | None:
    """The record; None when it is none that we understand."""
    try:
        found = json.loads(data)
        if found.pop("version") != VERSION:
            return None
        known = {f.name: found[f.name] for f in fields(ImageRecord) if f.name in found}
        for name in ("sources", "env", "entrypoint", "cmd"):
            known[name] = tuple(str(v) for v in known[name])
        known["names"] = {str(n): Name(str(v["stamp"]), int(v["since_ms"])) for n, v in known["names"].items()}
        known["user"] = tuple(int(v) for v in known["user"]) if known["user"] is not None else None
        for name in ("base", "ids", "files", "size_bytes", "left_out", "created_ms"):
            known[name] = int(known[name])
        record = ImageRecord(**known)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if DIGEST_TEXT.fullmatch(record.digest) else None


def write(directory: Path, record: ImageRecord) -> None:
    """Write it beside the image, on the disk to stay."""
    new = directory / (RECORD + ".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(encode(record))
        file.flush()
        os.fsync(file.fileno())
    new.rename(directory / RECORD)
    sync_directory(directory)


def read(directory: Path) -> ImageRecord | None:
    """What is beside an image; None when there is nothing that we understand."""
    try:
        record = decode((directory / RECORD).read_bytes())
        there = (directory / ROOTFS).is_dir() and (directory / FILES).is_file()
    except OSError:
        return None
    return record if record is not None and there and record.directory == directory.name else None


def sync_directory(directory: Path) -> None:
    """Have what is in it stay in it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
