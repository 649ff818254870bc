"""A child that begins in a control group, on the real kernel."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinetta.runtime.shim import hierarchy
from spinetta.runtime.shim.forking import fork_into

pytestmark = pytest.mark.contract


def own_v2() -> Path | None:
    """Our folder in version 2, if it can be written to."""
    trees = hierarchy.everywhere(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    own = next((tree.own for tree in trees if tree.version == 2), None)
    return own if own is not None and os.access(own, os.W_OK) else None


@pytest.fixture
def group() -> Iterator[Path]:
    own = own_v2()
    if own is None:
        pytest.skip("no control groups of version 2 that we may use")
    made = own / f"spinetta-forking-{secrets.token_hex(4)}"
    made.mkdir()
    yield made
    made.rmdir()


def told_by_child(folder: str) -> tuple[bool, str]:
    """Whether it was forked into the group, and what the child finds."""
    receive, send = os.pipe()
    pid, inside = fork_into(folder, 300)
    if pid == 0:
        try:
            os.write(send, Path("/proc/self/cgroup").read_bytes() + f"{os.getpid()} {os.getppid()}".encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as said:
        text = said.read()
    assert os.waitpid(pid, 0) == (pid, 0)
    assert text.endswith(f"{pid} {os.getpid()}")
    return inside, text


def test_the_child_begins_in_the_group(group: Path) -> None:
    inside, text = told_by_child(str(group))
    if not inside:
        pytest.skip("this kernel, or a filter of system calls, has no clone3 into a group")
    assert any(line.startswith("0::") and line.endswith(f"/{group.name}") for line in text.splitlines())


def test_without_such_a_group_it_is_a_fork_like_any_other(tmp_path: Path) -> None:
    before = Path("/proc/self/cgroup").read_text()
    for folder in (tmp_path, tmp_path / "none"):
        inside, text = told_by_child(str(folder))
        assert not inside
        assert text.startswith(before)
