"""The lock of a data directory: what cannot be locked is said, not thrown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spinetta.errors import UserError
from spinetta.node.lock import DirectoryLock, holder


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with DirectoryLock(tmp_path):
        script = "import pathlib, sys, spinetta.node.lock as lock; print(lock.holder(pathlib.Path(sys.argv[1])))"
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
        assert done.stdout == f"{os.getpid()}\n"
        with (
            pytest.raises(UserError, match=f"a daemon runs on .* already .process {os.getpid()}"),
            DirectoryLock(tmp_path),
        ):
            pass
    assert holder(tmp_path) is None


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "daemon.lock").mkdir()
    with pytest.raises(UserError, match="cannot be opened: Is a directory"), DirectoryLock(tmp_path):
        pass
    file = tmp_path / "file"
    file.touch()
    assert holder(file) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_users_directory(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path):
        pid = os.fork()
        if pid == 0:  # the child
            os.setuid(65534)
            try:
                os.chdir("/")
                holder(tmp_path)
            except UserError as e:
                os._exit(7 if "cannot be opened: Permission denied" in str(e) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("content", ["", "no number\n", "99999999\n", "\0" * 32])
def test_what_is_written_in_it_is_not_needed(tmp_path: Path, content: str) -> None:
    """A full disk, or a damaged file: a daemon starts, and is found."""
    with DirectoryLock(tmp_path):
        (tmp_path / "daemon.lock").write_text(content)
        script = "import pathlib, sys, spinetta.node.lock as lock; print(lock.holder(pathlib.Path(sys.argv[1])))"
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
        assert done.stdout == f"{os.getpid()}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_no_daemon_from_starting(tmp_path: Path) -> None:
    (tmp_path / "daemon.lock").symlink_to("/dev/full")
    with DirectoryLock(tmp_path):
        pass
