"""Networks of containers when something else goes wrong: plugins that hang or are gone, other rules, full subnets."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinetta import cni
from spinetta import network as rules
from spinetta.runtime import netattempts
from spinetta.runtime import network as networks
from spinetta.runtime.netattempts import Joined
from spinetta.runtime.netgates import NetworkSettings
from spinetta.runtime.netplace import Place
from spinetta.runtime.network import Network
from tests.contract.nets import (
    MACHINE,
    NETWORKS,
    OUTSIDE,
    THIRD,
    TINY,
    World,
    answers,
    caught,
    forwards,
    ip,
    joined_for_good,
    left,
    made_in,
    only_rules,
    opened,
    place,
    third,
    world,
)
from tests.contract.shims import asynchronous, until

pytestmark = NETWORKS
SETTINGS = NetworkSettings("n1")
HANGS = """#!/bin/sh
[ "$CNI_COMMAND" = VERSION ] && echo '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}' && exit
exec sleep 600
"""


QUESTION = bytes(12) + b"\1a\0\0\1\0\1"


def udp_of(joined: Joined) -> socket.socket:
    """A socket of a container's."""
    return made_in(space_of(joined), socket.SOCK_DGRAM, "0.0.0.0")  # noqa: S104


def space_of(joined: Joined) -> str:
    """A container's network namespace, as `made_in` finds it."""
    return os.path.relpath(joined.netns_path, "/run/netns")


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
        assert (left(here, where), forwards(here)) == ([], False)
    assert time.monotonic() - began < 2.0 + networks.CLEARED_S + 10.0


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
    assert (left(here, where), forwards(here)) == ([], False)


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
    assert (left(here, where), forwards(here)) == ([], False)


@asynchronous
async def test_a_plugin_that_refuses_to_delete_is_done_without(
    here: World, where: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netattempts, "AGAIN_S", 0.05)
    async with opened(where, here) as network:
        await joined_for_good(network, "a.1")
        (tmp_path / "ptp").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "ptp").chmod(0o755)
        network._attempts._plugins = str(tmp_path)
        network.release("a.1")
        await until(lambda: only_rules(here, where))
    assert left(here, where) == []


# --- what others add to the machine's rules --------------------------------------------------------------------------


@contextlib.contextmanager
def neighbour(here: World, address: str, *, bridge: bool) -> Iterator[str]:
    """A namespace behind a bridge of the machine's, or at a cable, as another engine's containers are."""
    name = f"spn{random.randrange(16**6):06x}"
    ip("netns", "add", name)
    try:
        ours = "port0" if bridge else "docker0"
        ip("link", "add", ours, "netns", here.machine, "type", "veth", "peer", "name", "eth0", "netns", name)
        if bridge:
            ip("-n", here.machine, "link", "add", "docker0", "type", "bridge")
            ip("-n", here.machine, "link", "set", "port0", "master", "docker0", "up")
        for space, device, own in ((here.machine, "docker0", "172.17.0.1"), (name, "eth0", address)):
            ip("-n", space, "addr", "add", f"{own}/16", "dev", device)
            ip("-n", space, "link", "set", device, "up")
        ip("-n", name, "route", "add", "default", "via", "172.17.0.1")
        yield name
    finally:
        ip("netns", "del", name, check=False)


@pytest.mark.parametrize("bridge", [True, False])
@asynchronous
async def test_what_others_publish_on_the_machine_is_not_reached(where: Place, bridge: bool) -> None:
    redirects = "add table ip admin; add chain ip admin pre { type nat hook prerouting priority dstnat; }; "
    redirects += "add rule ip admin pre fib daddr type local tcp dport 8080 dnat to 172.17.0.2:80"
    with world(forwards=True) as here, neighbour(here, "172.17.0.2", bridge=bridge) as other:
        here.on_machine("nft", redirects)
        published = here.serve(other, "172.17.0.2", port=80)
        async with opened(where, here) as network:
            joined = await joined_for_good(network, "a.1")
            reached = here.outside_of_it("busybox", "nc", "-w", "2", MACHINE, "8080")
            assert reached == f"you are {OUTSIDE}\n", "else this proves nothing"
            assert [caught(joined, to, 8080) for to in (MACHINE, "10.231.0.1", "172.17.0.1")] == [""] * 3
            assert published.heard == [OUTSIDE]
            assert (caught(joined, "172.17.0.2", 80) == "") is bridge
            network.release("a.1")


@asynchronous
async def test_a_bridge_may_be_the_way_out(here: World, where: Place) -> None:
    ip("-n", here.machine, "link", "add", "br0", "type", "bridge")
    ip("-n", here.machine, "link", "set", "uplink0", "master", "br0")
    ip("-n", here.machine, "addr", "flush", "dev", "uplink0")
    ip("-n", here.machine, "addr", "add", f"{MACHINE}/24", "dev", "br0")
    ip("-n", here.machine, "link", "set", "br0", "up")
    ip("-n", here.machine, "route", "add", "default", "via", OUTSIDE)
    async with opened(where, here) as network:
        joined = await joined_for_good(network, "a.1")
        assert caught(joined, OUTSIDE, here.serve(here.outside, OUTSIDE).port) == f"you are {MACHINE}"
        network.release("a.1")


@asynchronous
async def test_a_connection_that_was_made_without_the_rules_ends_with_them(
    here: World, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "GUARD_EVERY_S", 0.1)
    ours = here.serve(here.machine, MACHINE, udp=True)
    async with opened(where, here) as network:
        joined = await joined_for_good(network, "a.1")
        mend = network._gates.mend if network._gates else None
        assert mend is not None
        gone = iter((OSError(5, "for a trial"), TimeoutError()))

        async def fails_twice() -> None:
            if error := next(gone, None):
                raise error
            if ours.heard:
                await mend()

        monkeypatch.setattr(network._gates, "mend", fails_twice)
        here.on_machine("nft", "flush", "ruleset")
        with udp_of(joined) as calling:
            calling.settimeout(5)
            calling.connect((MACHINE, ours.port))
            calling.send(QUESTION)
            assert calling.recv(100)
            await until(lambda: "spinetta" in here.on_machine("nft", "list", "tables"))
            calling.send(QUESTION)
            with pytest.raises(OSError, match="No route to host"):
                calling.recv(100)
        assert len(ours.heard) == 1
        network.release("a.1")


# --- what containers do to others ------------------------------------------------------------------------------------


@asynchronous
async def test_a_container_has_no_more_connections_than_its_share(
    here: World, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "FLOWS_MAX", 20)
    outside = here.serve(here.outside, OUTSIDE)
    async with opened(where, here) as network:
        greedy, other = await joined_for_good(network, "a.1"), await joined_for_good(network, "b.1")
        with udp_of(greedy) as calling:
            for port in range(6000, 6100):
                with contextlib.suppress(OSError):
                    calling.sendto(b"x", (OUTSIDE, port))
        assert 20 <= int(here.on_machine("cat", "/proc/sys/net/netfilter/nf_conntrack_count")) < 40
        assert caught(greedy, OUTSIDE, outside.port) == ""
        assert caught(other, OUTSIDE, outside.port) == f"you are {MACHINE}"
        for key in ("a.1", "b.1"):
            network.release(key)


@asynchronous
async def test_nobody_sends_with_anothers_address_where_paths_are_not_checked(here: World, where: Place) -> None:
    here.on_machine("sh", "-c", "echo 2 > /proc/sys/net/ipv4/conf/all/rp_filter")
    async with opened(where, here) as network:
        one, two = await joined_for_good(network, "a.1"), await joined_for_good(network, "b.1")
        with made_in(here.outside, socket.SOCK_DGRAM, OUTSIDE) as outside:
            outside.settimeout(5)
            outside.bind((OUTSIDE, 0))
            for address, said in ((two.address, b"another's"), (one.address, b"its own")):
                with udp_of(one) as calling:
                    calling.setsockopt(socket.IPPROTO_IP, socket.IP_TRANSPARENT, 1)
                    calling.bind((address, 0))
                    calling.sendto(said, outside.getsockname())
            assert outside.recv(100) == b"its own"
        for key in ("a.1", "b.1"):
            network.release(key)


@asynchronous
async def test_what_belongs_to_no_connection_does_not_leave_under_its_own_address(here: World, where: Place) -> None:
    """A packet that nobody can put down to a connection is not translated, so it is not to leave at all."""
    async with opened(where, here) as network:
        joined = await joined_for_good(network, "a.1")
        with (
            made_in(here.outside, socket.SOCK_RAW, OUTSIDE, socket.IPPROTO_TCP) as outside,
            made_in(space_of(joined), socket.SOCK_RAW, joined.address, socket.IPPROTO_TCP) as calling,
        ):
            outside.settimeout(5)
            for number in range(3):  # the end of a connection that there never was
                calling.sendto(tcp_header(joined.address, 1000 + number, flags=0x04), (OUTSIDE, 0))
            assert caught(joined, OUTSIDE, here.serve(here.outside, OUTSIDE).port) == f"you are {MACHINE}"
            seen = {socket.inet_ntoa(outside.recv(2000)[12:16]) for _packet in range(4)}
        assert seen == {MACHINE}
        network.release("a.1")


def tcp_header(source: str, port: int, *, flags: int) -> bytes:
    """One without anything behind it, to the world outside."""
    header = struct.pack("!HHIIBBHHH", port, 80, 1, 0, 5 << 4, flags, 1024, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(OUTSIDE) + struct.pack("!HH", socket.IPPROTO_TCP, len(header))
    total = sum(struct.unpack(f"!{(len(pseudo) + len(header)) // 2}H", pseudo + header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:16] + struct.pack("!H", checksum) + header[18:]


@asynchronous
async def test_where_clouds_tell_a_machine_its_secrets(here: World, where: Place) -> None:
    for address in ("100.100.100.200", "168.63.129.16"):
        ip("-n", here.outside, "addr", "add", f"{address}/32", "dev", "lan0")
    secrets = here.serve(here.outside, "0.0.0.0", port=80)  # noqa: S104
    names = here.serve(here.outside, "168.63.129.16", port=53)
    async with opened(where, here) as network:
        joined = await joined_for_good(network, "a.1")
        assert [caught(joined, a, 80) for a in ("100.100.100.200", "168.63.129.16")] == ["", ""]
        assert caught(joined, "168.63.129.16", names.port) == f"you are {MACHINE}"
        assert caught(joined, OUTSIDE, 80) == f"you are {MACHINE}"
        assert secrets.heard == [MACHINE]
        network.release("a.1")


# --- what the machine was before -------------------------------------------------------------------------------------


@asynchronous
async def test_a_machine_that_forwarded_for_some_does_so_again_and_for_no_others_meanwhile(
    here: World, where: Place, tmp_path: Path
) -> None:
    with third(here, "lab0") as space, place(tmp_path / "second", tmp_path / "run") as second:
        settings = "cd /proc/sys/net/ipv4; echo 0 > conf/all/accept_redirects; echo 1 > conf/lab0/forwarding"
        here.on_machine("sh", "-c", settings)
        shown = ("sh", "-c", "cd /proc/sys/net/ipv4; grep . ip_forward conf/*/forwarding conf/*/accept_redirects")
        before = here.on_machine(*shown)
        async with opened(where, here) as network:
            async with opened(second, here):
                pass
            joined = await joined_for_good(network, "a.1")
            assert caught(joined, OUTSIDE, here.serve(here.outside, OUTSIDE).port) == f"you are {MACHINE}"
            assert not answers(here.outside, THIRD), "what came in by the uplink was not forwarded, and is not"
            with made_in(space, socket.SOCK_DGRAM, THIRD) as calling:
                outside = here.serve(here.outside, OUTSIDE, udp=True)
                calling.sendto(QUESTION, (OUTSIDE, outside.port))
                await until(lambda: outside.heard)  # what came in by the other was
            network.release("a.1")
        assert here.on_machine(*shown) == before


@asynchronous
async def test_a_full_subnet_turns_the_network_off_for_nobody(here: World, where: Place) -> None:
    keys = tuple(f"t{i}.1" for i in range(5))
    async with opened(where, here, subnet=TINY) as network:
        for key in keys:
            await joined_for_good(network, key)
    async with opened(where, here, keys, subnet=TINY) as network:
        assert where.names() == list(keys)
        network.release("t3.1")
        assert (await joined_for_good(network, "new.1")).address
        for key in where.names():
            network.release(key)
    assert (left(here, where), forwards(here)) == ([], False)
