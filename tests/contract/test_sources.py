"""What a container mounts of its node, while another task that may write there changes what is on the way to it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.model import Reason
from spinetta.runtime.protocol import Launch
from spinetta.runtime.shim import bundle
from tests.contract.containers import PROGRAM, rootfs, script, traces
from tests.contract.shims import asynchronous, isolate, ran, runtime, state_dir, until

pytestmark = pytest.mark.contract
_ = (isolate, rootfs, state_dir)  # fixtures


def mounting(state_dir: Path, rootfs: Path, key: str, source: Path, text: str) -> Launch:
    """A script in a container that sees a folder of the node at /outside, a file in the place of the init."""
    made = script(state_dir, rootfs, key, text, program=PROGRAM, init=False)
    assert made.container is not None
    config = dict(made.container.config)
    target = "/.spinetta/init" if source.is_file() else "/outside"
    bind = {"destination": target, "type": "bind", "source": str(source), "options": ["rbind", "rw"]}
    config["mounts"] = [*config["mounts"], bind]  # type: ignore[misc]  # it is a list
    return replace(made, container=replace(made.container, config=config, sources=(str(source),)))


@asynchronous
async def test_a_link_that_is_put_in_the_place_of_a_source_is_not_followed(
    state_dir: Path, rootfs: Path, tmp_path: Path, isolate: bool
) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    for folder in (shared / "deep/mine", other / "mine"):
        folder.mkdir(parents=True)
    (shared / "deep/mine/told").write_text("mine\n")
    (other / "mine/told").write_text("of another\n")
    (shared / "file").write_text("a file\n")
    text = "cat /outside/told || cat /.spinetta/init"
    async with runtime(state_dir, isolate=isolate) as rt:
        for key, source in (("a.1", shared / "deep/mine"), ("a.2", shared / "file")):
            ended = await ran(rt, mounting(state_dir, rootfs, key, source, text))
            assert ended.exit_code == 0, ended
        assert rt.log_path("a.1", "stdout").read_text() == "mine\n"
        assert rt.log_path("a.2", "stdout").read_text() == "a file\n"
        # Judged, and then exchanged: the folder itself, or one above it.
        attempts = [mounting(state_dir, rootfs, key, shared / "deep/mine", text) for key in ("b.1", "b.2")]
        (shared / "deep/mine").rename(shared / "deep/was")
        (shared / "deep/mine").symlink_to(other / "mine")
        ended = await ran(rt, attempts[0])
        assert (ended.reason, ended.exit_code) == (Reason.NODE_UNFIT, None), ended
        assert "symbolic link" in ended.message
        (shared / "deep").rename(shared / "was")
        (shared / "deep").symlink_to(other)
        assert (await ran(rt, attempts[1])).reason is Reason.NODE_UNFIT
        for key in ("b.1", "b.2"):
            out = rt.log_path(key, "stdout")
            assert not out.exists() or out.read_text() == ""
            await until(lambda key=key: not traces(state_dir, key))  # type: ignore[misc]


def test_no_descriptor_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    os.close(bundle.open_plainly(str(tmp_path)))
    for path, why in (("link", "symbolic link"), ("link/link", "symbolic link"), ("nothing/below", "No such file")):
        with pytest.raises(OSError, match=why):
            bundle.open_plainly(str(tmp_path / path))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
