"""Files that change as one, in a directory.

A node's files belong together: a key without its certificate, or a certificate of one authority beside the bundle of
another, would keep it out of its cluster for ever. So each change writes a whole new *generation* of files, and one
rename of a link makes it the current one::

    DATA/trust/            0700
      current -> 3         what counts
      3/                   ca.pem, node.pem, node.key, sealing.key; of a voter also etcd-ca.pem, etcd.pem, etcd.key
      .new-4/              a generation that is being written; has its own name only when it is complete
      pending.pem          keys that a node waits for certificates for

After a crash at any point either all of a change is there or nothing of it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from spinetta.trust import files

CURRENT = "current"

_NAME = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)


def current(directory: Path) -> int | None:
    """The number of the generation that counts; None when there is none.

    Raises:
        UserError: that cannot be told.
    """
    link = directory / CURRENT
    try:
        name = str(link.readlink())
    except (FileNotFoundError, NotADirectoryError):
        # No link yet, or lost: a generation with a name is complete. Without it a node would take itself for one of
        # an open cluster.
        try:
            name = str(max(_all(directory)))
        except (ValueError, FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise files.unreadable(directory, e) from e
        try:
            _point(directory, int(name))
        except OSError as e:
            raise files.unwritable(directory, e) from e
    except OSError as e:
        raise files.damaged(link, f"it is no link ({e.strerror})") from e
    if not _NAME.fullmatch(name):
        raise files.damaged(link, "it points elsewhere")
    return int(name)


def save(directory: Path, contents: Mapping[str, bytes], newer_than: int) -> int:
    """Write the next generation, make it the current one, remove those before. Its number, which is above
    `newer_than`.

    Raises:
        UserError: it cannot be written (reason ``disk``). What was current still is.
    """
    target = unfinished = directory
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.close_to_others(directory)
        serial = 1 + max((newer_than, *_all(directory)))
        target, unfinished = directory / str(serial), directory / f".new-{serial}"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a daemon that ended in the middle
        unfinished.mkdir(mode=0o700)
        for name, data in contents.items():
            files.write_new(unfinished / name, data)
        files.sync_directory(unfinished)
        unfinished.rename(target)
        files.sync_directory(directory)  # the files, before anything points to them
        _point(directory, serial)
    except OSError as e:
        if unfinished != directory:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
        raise files.unwritable(directory, e) from e
    with contextlib.suppress(OSError):  # the change counts: what is left over is for the next one to remove
        files.sync_directory(directory)
        for old in _all(directory):
            if old != serial:
                shutil.rmtree(directory / str(old), ignore_errors=True)
        for left in directory.glob(".new-*"):
            shutil.rmtree(left, ignore_errors=True)
    return serial


def _all(directory: Path) -> list[int]:
    return [int(p.name) for p in directory.iterdir() if _NAME.fullmatch(p.name)]


def _point(directory: Path, serial: int) -> None:
    link = directory / f".{CURRENT}"
    link.unlink(missing_ok=True)
    link.symlink_to(str(serial), target_is_directory=True)
    link.replace(directory / CURRENT)
