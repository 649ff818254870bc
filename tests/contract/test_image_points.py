"""Mount points that an image brings along: what of them counts, and what does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spinetta.container import ContainerSpec
from tests.contract.containers import RUNC, make_rootfs
from tests.contract.oldshims import home
from tests.contract.shims import asynchronous
from tests.contract.test_runtimes import World, ran

pytestmark = [pytest.mark.contract, pytest.mark.skipif(not Path(RUNC).exists(), reason="runc is not installed")]
_ = home  # a fixture


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
@asynchronous
async def test_everybody_may_write_to_tmp_whatever_the_image_says(home: Path, tmp_path: Path, writable: bool) -> None:
    """runc gives what it mounts the permissions of what it covers."""
    image = make_rootfs(tmp_path / "image", 0)
    (image / "tmp").chmod(0o755)
    (image / ".spinetta").chmod(0o700)
    (image / "run").chmod(0o700)
    (image / "run" / "secrets").chmod(0o700)
    os.chown(image / "tmp", 7, 7)
    async with World("runc", home, image).connect() as rt:
        wants = ContainerSpec(f"rootfs:{image}", writable=writable)
        script = "id -u; touch /tmp/x && ls -ld /tmp; ls /run/secrets/spinetta"
        made = World("runc", home, image).launch("tmp.1", "/bin/sh", "-c", script, env={}, wants=wants)
        ended = await ran(rt, made)
        said = rt.log_path("tmp.1", "stdout").read_text()
        assert ended.exit_code == 0, (ended, rt.log_path("tmp.1", "stderr").read_text())
        assert said.startswith("1000\ndrwxrwxrwt"), said
