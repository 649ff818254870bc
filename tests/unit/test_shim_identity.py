"""What a shim wrote of itself, read by those who must not take "unknown" for "none"; and whether it lives."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spinetta.runtime import generations, netplace
from spinetta.runtime.shim import detach, proctable
from spinetta.runtime.shim.records import seal
from spinetta.runtime.shim.remains import identity_of, living_pid, read_identity, write_identity
from spinetta.runtime.shim.wire import IDENTITY_NAME


def named(pid: int) -> dict[str, Any]:
    """What a shim with this pid would write now."""
    process = proctable.read(pid)
    assert process is not None
    return {"pid": pid, "start_ticks": process.start_ticks, "boot_id": proctable.boot_id()}


@pytest.fixture
def dead() -> Iterator[int]:
    """A process that has ended, and that nobody has waited for."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield process.pid


def unreadable(folder: Path) -> None:
    """As with a disk's error, for root as well: ELOOP."""
    (folder / IDENTITY_NAME).unlink(missing_ok=True)
    (folder / IDENTITY_NAME).symlink_to(IDENTITY_NAME)


def test_what_is_there_is_believed_by_all(tmp_path: Path) -> None:
    write_identity(tmp_path, named(os.getpid()))
    assert identity_of(tmp_path) == read_identity(tmp_path)
    assert living_pid(identity_of(tmp_path)) == netplace.shim_pid(tmp_path) == os.getpid()
    assert netplace.living_shims(tmp_path) == [os.getpid()]


def test_one_from_before_there_was_a_place_in_it(tmp_path: Path) -> None:
    (tmp_path / IDENTITY_NAME).write_text(json.dumps({"v": 1, "pid": 5}))
    assert identity_of(tmp_path) == read_identity(tmp_path) == {"v": 1, "pid": 5}


def test_what_is_not_there_or_not_to_be_trusted_is_nothing_to_all(tmp_path: Path) -> None:
    original, copy, damaged, a_file = (tmp_path / name for name in ("original", "copy", "damaged", "file"))
    original.mkdir()
    write_identity(original, named(os.getpid()))
    shutil.copytree(original, copy)
    damaged.mkdir()
    (damaged / IDENTITY_NAME).write_text(json.dumps({**seal({"v": 2, "pid": 5}), "pid": 6}))
    a_file.touch()
    for folder in (copy, damaged, a_file, tmp_path / "none"):
        assert identity_of(folder) == read_identity(folder) == {}
        assert netplace.shim_pid(folder) == 0
        assert netplace.living_shims(folder) == []
        assert not generations.is_occupied(folder)


def test_what_cannot_be_seen_is_nothing_only_to_those_who_say_so(tmp_path: Path) -> None:
    unreadable(tmp_path)
    with pytest.raises(OSError, match=IDENTITY_NAME):
        identity_of(tmp_path)
    assert read_identity(tmp_path) == {}
    assert generations.is_occupied(tmp_path)
    assert netplace.shim_pid(tmp_path) == 0, "that it sees our mounts is not known, so no networks"
    with pytest.raises(OSError, match=IDENTITY_NAME):  # that it is gone is not known, so those that are there stay
        netplace.living_shims(tmp_path)


def test_another_process_is_not_the_shim(dead: int) -> None:
    lives = named(os.getpid())
    assert living_pid(lives) == os.getpid()
    for changed in ({"start_ticks": 0}, {"boot_id": "another"}, {"pid": "1"}, {"pid": 1 << 30}, {"pid": None}):
        assert living_pid({**lives, **changed}) == 0
    assert living_pid({}) == 0
    assert living_pid(named(dead)) == 0


def test_who_holds_the_lock_and_cannot_be_seen_may_live(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detach, "PREVIOUS_GONE_S", 0.05)
    with (tmp_path / "shim.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for written, kind in ((named(os.getpid()), "busy"), (named(dead), "failed"), (None, "busy")):
            if written is None:
                unreadable(tmp_path)
            else:
                write_identity(tmp_path, written)
            with pytest.raises(detach.CannotStart) as refused:
                detach.take_lock(tmp_path, lambda: read_identity(tmp_path))
            assert refused.value.kind == kind
