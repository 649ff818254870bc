"""Networks of containers when something else goes wrong: plugins that hang or are gone, other rules, full subnets."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from spinetta import cni
from spinetta.runtime import network as networks
from spinetta.runtime.netplace import Place
from spinetta.runtime.network import Network, NetworkSettings
from tests.contract.nets import World, here, joined_for_good, left, may_make_worlds, only_rules, opened, where
from tests.contract.shims import asynchronous, until

pytestmark = [pytest.mark.contract, pytest.mark.skipif(not may_make_worlds(), reason="only root makes networks")]
_ = (here, where)  # fixtures
SETTINGS = NetworkSettings("n1")
HANGS = """#!/bin/sh
[ "$CNI_COMMAND" = VERSION ] && echo '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}' && exit
exec sleep 600
"""


def forwards(here: World) -> str:
    return here.on_machine("cat", "/proc/sys/net/ipv4/ip_forward").strip()


@pytest.fixture
def hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins that do not answer."""
    folder = tmp_path / "hangs"
    folder.mkdir()
    for name in cni.PLUGINS:
        (folder / name).write_text(HANGS)
        (folder / name).chmod(0o755)
    monkeypatch.setattr(cni, "FOLDERS", (str(folder),))


@pytest.mark.usefixtures("hangs")
@asynchronous
async def test_a_plugin_that_hangs_keeps_no_node_from_starting(
    here: World, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "BEGIN_S", 2.0)
    began = time.monotonic()
    async with Network.open(where, SETTINGS, keep=(), prefix=here.prefix) as network:
        assert "not made and taken down within 2 s (ptp did not end)" in network.trouble
        assert (left(here, where), forwards(here)) == ([], "0")
    assert time.monotonic() - began < 2.0 + networks.CLEARED_S + 2.0


@asynchronous
async def test_what_was_left_by_others_keeps_no_node_from_starting(
    here: World, where: Place, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    async with opened(where, here) as network:
        for key in ("dead.1", "lives.1"):
            await joined_for_good(network, key)
    request.getfixturevalue("hangs")
    monkeypatch.setattr(networks, "BEGIN_S", 2.0)
    monkeypatch.setattr(networks, "CLEARED_S", 0.5)
    monkeypatch.setattr(networks, "CLOSE_S", 0.5)
    monkeypatch.setattr(networks, "GUARD_EVERY_S", 0.1)
    async with Network.open(where, SETTINGS, keep=("lives.1",), prefix=here.prefix) as network:
        assert "(ptp did not end)" in network.trouble
        assert where.names() == ["dead.1", "lives.1"]
        here.on_machine("nft", "flush", "ruleset")
        await until(lambda: "spinetta" in here.on_machine("nft", "list", "tables"))  # who lives is still looked after
    monkeypatch.undo()
    async with opened(where, here, ("lives.1",)) as network:
        assert where.names() == ["lives.1"]
        network.release("lives.1")
    assert (left(here, where), forwards(here)) == ([], "0")


@asynchronous
async def test_plugins_that_are_gone_leave_nothing(
    here: World, where: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(where, here) as network:
        await joined_for_good(network, "dead.1")
        await joined_for_good(network, "b.1")
    monkeypatch.setattr(cni, "FOLDERS", (str(tmp_path),))
    async with Network.open(where, SETTINGS, keep=("b.1",), prefix=here.prefix) as network:
        assert "apt install" in network.trouble
        await until(lambda: where.names() == ["b.1"])
        network.release("b.1")
        await until(lambda: not where.names())
    assert (left(here, where), forwards(here)) == ([], "0")


@asynchronous
async def test_a_plugin_that_refuses_to_delete_is_done_without(
    here: World, where: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "AGAIN_S", 0.05)
    async with opened(where, here) as network:
        await joined_for_good(network, "a.1")
        (tmp_path / "ptp").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "ptp").chmod(0o755)
        network._plugins = str(tmp_path)
        network.release("a.1")
        await until(lambda: only_rules(here, where))
    assert left(here, where) == []
