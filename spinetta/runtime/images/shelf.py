"""The directories of the store: what is there at the start, what is put in, taken out and thrown away.

::

    images/
      policy.json         skopeo's: anybody's images are taken; what they are is said by digests
      unpacked/HEX/       one image: rootfs/, files.gz (its list), image.json (its record), used
      staging/XXXX/       being fetched or unpacked; thrown away at the start
      trash/XXXX/         being removed
      uses/KEY            the digest of the image that an attempt uses; they outlive the daemon, as attempts do

All that is in them is written by this process alone. Calls block; they are short, unless said otherwise.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from pathlib import Path

from spinetta.errors import UserError
from spinetta.runtime.images import records
from spinetta.runtime.images.records import FILES, ROOTFS, USED, ImageRecord

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}\n'
IMAGES_MAX = 10_000  # at a start; each is a directory to be looked at


class Shelf:
    """The store's directory.

    Args:
        directory: is made if it is not there.
        group: the host's id of the container's root group, which may pass through to the files of images; None: only
            who we are may.
    """

    def __init__(self, directory: Path, group: int | None) -> None:
        self.directory = directory
        self._group = group
        self.unpacked = directory / "unpacked"
        self.staging = directory / "staging"
        self.trash = directory / "trash"
        self.uses = directory / "uses"
        self.policy = directory / "policy.json"

    def open(self) -> None:
        """Make what is not there, and throw away what an earlier process has not finished.

        Raises:
            UserError: the directory cannot be written to.
        """
        try:
            self.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            # Passed through by containers' root, read by nobody else.
            for path, mode in ((self.unpacked, 0o711), (self.staging, 0o700), (self.trash, 0o700), (self.uses, 0o700)):
                path.mkdir(mode=mode, exist_ok=True)
                path.chmod(mode)
            self.directory.chmod(0o711)
            self.policy.write_text(POLICY)
            for path in [*self.staging.iterdir()]:
                self.discard(path)
        except OSError as e:
            raise UserError(
                f"images cannot be kept in {self.directory}: {e.strerror}", hint="see to the disk, or set data_dir"
            ) from e

    def load(self, base: int, ids: int) -> dict[str, tuple[ImageRecord, float]]:
        """The images that are there, with when each was last used; what is no whole image of this range goes."""
        found: dict[str, tuple[ImageRecord, float]] = {}
        for path in sorted(self.unpacked.iterdir())[:IMAGES_MAX]:
            record = records.read(path)
            if record is None or (record.base, record.ids) != (base, ids):
                self.discard(path)
                continue
            found[record.digest] = record, self._used_s(path)
        return found

    def _used_s(self, path: Path) -> float:
        try:
            return (path / USED).stat().st_mtime
        except OSError:
            return path.stat().st_mtime

    # --- images ---

    def stage(self) -> Path:
        """A directory to fetch and unpack in."""
        path = self.staging / secrets.token_hex(8)
        path.mkdir(mode=0o700)
        return path

    def install(self, staging: Path, record: ImageRecord) -> None:
        """Put what was unpacked into its place, whole or not at all, also after a power cut. Waits for the disk."""
        whole = staging / "whole"
        whole.mkdir(mode=0o700)
        (staging / ROOTFS).rename(whole / ROOTFS)
        (staging / FILES).rename(whole / FILES)
        (whole / FILES).chmod(0o600)
        (whole / USED).touch(mode=0o600)
        records.write(whole, record)
        if self._group is not None:
            os.chown(whole, -1, self._group)
        whole.chmod(0o710)
        place = self.path(record)
        if place.exists():
            self.discard(place)
        whole.rename(place)
        records.sync_directory(self.unpacked)

    def path(self, record: ImageRecord) -> Path:
        """The directory of an image."""
        return self.unpacked / record.directory

    def rewrite(self, record: ImageRecord) -> None:
        """Write a record anew."""
        records.write(self.path(record), record)

    def touch(self, record: ImageRecord) -> None:
        """It is used now."""
        with contextlib.suppress(OSError):  # only the order in which images go hangs on it
            os.utime(self.path(record) / USED)

    def discard(self, path: Path) -> None:
        """Out of sight at once; removed by and by."""
        with contextlib.suppress(FileNotFoundError):
            path.rename(self.trash / f"{time.time_ns():x}-{secrets.token_hex(4)}")

    def discarded(self) -> list[Path]:
        """What is to be removed."""
        return sorted(self.trash.iterdir())

    # --- uses ---

    def used(self) -> dict[str, str]:
        """The digest of the image that each attempt uses, by its key."""
        found = {}
        for path in self.uses.iterdir():
            try:
                found[path.name] = path.read_text().strip()
            except (OSError, ValueError):
                path.unlink(missing_ok=True)
        return found

    def use(self, key: str, digest: str) -> None:
        """An attempt uses an image. (A power cut ends attempts, too: this need not outlive it.)"""
        if not _KEY.fullmatch(key):
            raise UserError(f"{key!r} cannot be the name of a file", field="key")
        (self.uses / key).write_text(digest)

    def unuse(self, key: str) -> None:
        """It does so no more. May be repeated."""
        if _KEY.fullmatch(key):
            with contextlib.suppress(OSError):  # a mark too many: the next daemon knows what really runs
                (self.uses / key).unlink(missing_ok=True)
