"""The parts of what makes a container of a launch, by value."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spinetta.container import Mount
from spinetta.errors import UserError
from spinetta.model import Reason
from spinetta.ociconfig import PATH_DEFAULT
from spinetta.ocirequest import SECRETS, Device, IdRange, outside, user_of
from spinetta.runtime.protocol import Launch
from spinetta.runtime.runc import Unfit, _make_skeleton, devices_of, environment, resolve_mounts

OTHERWISE = (1000, 1000)


def launch(**env: str) -> Launch:
    return Launch("k.1", ["true"], env, "", 0, 0, 0, 0.0, 60.0, 1, "life")


@pytest.mark.parametrize(
    ("asked", "of_image", "found"),
    [
        ("", None, OTHERWISE),
        ("", (0, 0), OTHERWISE),
        ("", (0, 7), OTHERWISE),
        ("", (33, 34), (33, 34)),
        ("5", (33, 34), (5, 5)),
        ("5:6", None, (5, 6)),
        ("5:0", None, (5, 0)),
        ("root", (33, 34), (0, 0)),
        ("0:5", None, (0, 5)),
    ],
)
def test_users(asked: str, of_image: tuple[int, int] | None, found: tuple[int, int]) -> None:
    assert user_of(asked, of_image, OTHERWISE, root_inside=True) == found
    if found[0] == 0:
        with pytest.raises(UserError, match="no command runs as root"):
            user_of(asked, of_image, OTHERWISE, root_inside=False)
    else:
        assert user_of(asked, of_image, OTHERWISE, root_inside=False) == found


def test_the_task_says_more_than_its_image_and_the_image_more_than_we() -> None:
    found = environment(("PATH=/opt/bin", "A=image", "=odd", "EMPTY="), launch(A="task", B="2"))
    assert found == {"PATH": "/opt/bin", "LANG": "C.UTF-8", "HOME": "/work", "A": "task", "B": "2", "EMPTY": ""}
    assert environment((), launch())["PATH"] == PATH_DEFAULT
    secret = Launch("k.1", ["true"], {"SPINETTA_SECRETS": "x"}, "", 0, 0, 0, 0.0, 60.0, 1, "i", secrets=(("a", b""),))
    assert environment((), secret)["SPINETTA_SECRETS"] == SECRETS


def test_ids_outside() -> None:
    ranges = (IdRange(0, 100_000, 10), IdRange(10, 5, 1))
    assert [outside(ranges, n) for n in (0, 9, 10)] == [100_000, 100_009, 5]
    with pytest.raises(UserError, match="11 is nobody"):
        outside(ranges, 11)


def test_mounts_go_where_their_links_lead_if_that_is_allowed(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data, other):
        folder.mkdir()
    (data / "inside").mkdir()
    (data / "near").symlink_to("inside")
    (data / "far").symlink_to(other)
    allowed = (f"mount:{data}",)
    (found,) = resolve_mounts((Mount(f"{data}/near", "/x"),), allowed)
    assert found == Mount(f"{data}/inside", "/x")
    with pytest.raises(UserError, match="does not allow"):
        resolve_mounts((Mount(f"{data}/far", "/x"),), allowed)
    with pytest.raises(UserError, match="does not allow"):  # allowed to be read only
        resolve_mounts((Mount(f"{data}/near", "/x", writable=True),), allowed)
    assert resolve_mounts((Mount(f"{data}/far", "/x"),), (*allowed, f"mount-rw:{other}"))[0].source == str(other)
    with pytest.raises(UserError, match="No such file"):
        resolve_mounts((Mount(f"{data}/nothing", "/x"),), allowed)


def test_devices() -> None:
    devices = {"gpu": ("/dev/null", "/dev/zero"), "bad": ("/etc/hostname",), "gone": ("/dev/nothing-here",)}
    assert devices_of((("gpu", 1), ("fpga", 2)), devices) == (
        Device("/dev/null", "c", 1, 3),
        Device("/dev/zero", "c", 1, 5),
    )
    assert devices_of((), devices) == ()
    for name, words in (("bad", "is none"), ("gone", "No such file")):
        with pytest.raises(Unfit, match=words) as caught:
            devices_of(((name, 1),), devices)
        assert caught.value.reason is Reason.NODE_UNFIT


def test_mount_points_that_many_want_at_once(tmp_path: Path) -> None:
    lacking = [(f"/a/b/{n}", True) for n in range(20)] + [("/a/file", False)]
    uid, gid = os.geteuid(), os.getegid()
    for again in range(10):
        folder, together = tmp_path / "all" / str(again), threading.Barrier(8)

        def make(folder: Path = folder, together: threading.Barrier = together) -> None:
            together.wait(10)
            _make_skeleton(folder, lacking, uid, gid)

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(make) for _ in range(8)]:
                done.result(20)
        assert (folder / "a" / "file").is_file()
        assert len(list((folder / "a" / "b").iterdir())) == 20
    assert len(list((tmp_path / "all").iterdir())) == 10  # nothing half-made is left
