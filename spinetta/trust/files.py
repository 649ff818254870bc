"""Small private files: read with a limit, written whole or not at all, seen by nobody but their owner."""

from __future__ import annotations

import os
from pathlib import Path

from spinetta.errors import UserError
from spinetta.trust.pem import PEM_BYTES_MAX

FILE_BYTES_MAX = PEM_BYTES_MAX
RESTORE = "restore it from a backup; or move the node's data directory away and join anew with a token"
LOGIN = "log in anew with: spinetta login"


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all, also through a power cut.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        write_new(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Make a file that only its owner may read, and see it onto the disk.

    Raises:
        OSError: it could not be written, or something of that name is there.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor, so that it is 0600 from the start
        file.write(data)
        file.flush()
        os.fsync(fd)


def sync_directory(path: Path) -> None:
    """See the names in a directory onto the disk.

    Raises:
        OSError: this failed; they may or may not be there after a power cut.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def close_to_others(path: Path) -> None:
    """Take a private directory's permissions from everybody but its owner.

    Raises:
        OSError: it is another user's, who lets others in.
    """
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)


def read_private(path: Path, *, repair: bool, hint: str) -> bytes | None:
    """A small file that only its owner may read; None when there is none.

    Args:
        path: where it is.
        repair: close a file to others that they may read; otherwise refuse it.
        hint: what to do when it is damaged or has been seen.

    Raises:
        UserError: it cannot be read, is too large or not private.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                if not repair:
                    raise UserError(
                        f"{path} holds a private key, and others may read it",
                        hint=f"if nobody has: chmod 600 {path}; otherwise {hint}",
                        reason="readable-key",
                    )
                os.fchmod(file.fileno(), 0o600)
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise unreadable(path, e) from e
    if len(data) > FILE_BYTES_MAX:
        raise damaged(path, "it is too large", hint)
    return data


def damaged(path: Path, why: str, hint: str = RESTORE) -> UserError:
    """What to say of a file that makes no sense."""
    return UserError(f"{path} is damaged: {why}", hint=hint, reason="bad-credentials")


def unreadable(path: Path, error: OSError) -> UserError:
    """What to say of a file that the system does not let us read."""
    return UserError(f"{path} cannot be read: {error.strerror}", reason="bad-credentials")


def unwritable(path: Path, error: OSError) -> UserError:
    """What to say when something could not be saved."""
    return UserError(
        f"credentials cannot be written to {path}: {error.strerror}",
        hint="use a place that you may write to, on a disk with room",
        reason="disk",
    )
